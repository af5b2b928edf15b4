//! The bounded queue between the workers of a lane and one sink's delivery.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use super::known::Seen;
use super::routes::SinkNumber;
use crate::batch::{Batch, Offset};
use crate::stream::Ticket;

/// Bundles that wait for one sink.
const OUTLET_BUNDLES_MAX: usize = 64;
/// The unit of a queue's room.
const ROOM_UNIT_BYTES: u64 = 1_024;

/// What one worker made of `from..upto` for one sink.
pub struct Bundle {
    pub worker: u16,
    pub workers: u16,
    pub from: Offset,
    /// Nothing more will come of this worker's partitions below it.
    pub upto: Offset,
    pub batches: Vec<Batch>,
    /// Letters for the sink that the steps took into account.
    pub seen: Seen,
    /// Must be durable before a position covers the bundle.
    pub letters: Ticket,
    /// A worker waits for the sink's position to move past `upto`.
    pub urgent: bool,
    /// Freed when the rows are committed; `None` for a bundle without rows.
    pub room: Option<OwnedSemaphorePermit>,
}

/// The workers' end. Clones share the queue.
#[derive(Clone)]
pub struct Outlet {
    pub sink: SinkNumber,
    queue: mpsc::Sender<Bundle>,
    room: Arc<Semaphore>,
    room_max: u32,
    cancel: CancellationToken,
    waits: Arc<Mutex<Waits>>,
    handed_out: Arc<HandedOut>,
}

/// A delivery's end.
pub struct Intake {
    queue: mpsc::Receiver<Bundle>,
    put_back: Option<Bundle>,
    /// The pipeline took the sink out of the lane.
    pub cancel: CancellationToken,
    /// Where the lane began to send; `u64::MAX` until it does.
    pub starts_at: Arc<AtomicU64>,
    pub handed_out: Arc<HandedOut>,
}

/// How far each worker of a lane has handed out to one sink.
#[derive(Debug)]
pub struct HandedOut(Vec<AtomicU64>);

impl HandedOut {
    pub fn new(workers: u16) -> Self {
        Self((0..workers).map(|_| AtomicU64::new(0)).collect())
    }

    pub fn set(&self, worker: u16, upto: Offset) {
        if let Some(handed_out) = self.0.get(usize::from(worker)) {
            handed_out.store(upto.0, Ordering::Release);
        }
    }

    /// All below it was handed out by every worker.
    pub fn all_below(&self) -> Offset {
        Offset(self.0.iter().map(|upto| upto.load(Ordering::Acquire)).min().unwrap_or_default())
    }
}

#[derive(Debug, PartialEq, Eq)]
pub enum OutletClosed {
    /// The lane goes on without this sink.
    Detached,
    /// The pipeline stops.
    Aborted,
}

/// Sends each outlet its bundle, and blocks until all have room. Those that have room get theirs before any
/// other is waited for, and those that have none are waited for together: so each of them is seen to be full.
/// Returns the first reason why a bundle went to nobody.
pub fn send_all<'o>(
    bundles: impl Iterator<Item = (&'o Outlet, Bundle)>,
    abort: &CancellationToken,
    runtime: &Handle,
) -> Result<(), OutletClosed> {
    let mut result = Ok(());
    let mut waiting = Vec::new();
    for (outlet, bundle) in bundles {
        if outlet.detached() {
            result = Err(OutletClosed::Detached);
        } else if let Err(bundle) = outlet.send_now(bundle) {
            waiting.push(outlet.send_when_free(bundle, abort));
        }
    }
    if waiting.is_empty() {
        return result;
    }
    let sent = runtime.block_on(join_all(waiting));
    let closed = sent.into_iter().chain([result]).filter_map(Result::err);
    match closed.max_by_key(|closed| matches!(closed, OutletClosed::Aborted)) {
        Some(closed) => Err(closed),
        None => Ok(()),
    }
}

/// Time in which at least one worker has waited for the sink.
#[derive(Default)]
struct Waits {
    /// Number of workers that wait now.
    waiting: usize,
    /// Since when some worker has waited.
    since: Option<Instant>,
    /// Time of the waits before.
    ended: Duration,
}

pub fn outlet(sink: SinkNumber, bytes_max: u64, workers: u16) -> (Outlet, Intake) {
    let (sender, queue) = mpsc::channel(OUTLET_BUNDLES_MAX);
    let room_max = (bytes_max / ROOM_UNIT_BYTES).clamp(1, Semaphore::MAX_PERMITS.min(1 << 30) as u64) as u32;
    let cancel = CancellationToken::new();
    let handed_out = Arc::new(HandedOut::new(workers));
    let outlet = Outlet {
        sink,
        queue: sender,
        room: Arc::new(Semaphore::new(room_max as usize)),
        room_max,
        cancel: cancel.clone(),
        waits: Arc::default(),
        handed_out: Arc::clone(&handed_out),
    };
    let starts_at = Arc::new(AtomicU64::new(u64::MAX));
    (outlet, Intake { queue, put_back: None, cancel, starts_at, handed_out })
}

impl Intake {
    /// Returns the next bundle; `None` once the workers have ended and nothing is left. Cancel safe.
    pub async fn recv(&mut self) -> Option<Bundle> {
        match self.put_back.take() {
            Some(bundle) => Some(bundle),
            None => self.queue.recv().await,
        }
    }

    /// Returns the next bundle where it is there already.
    pub fn try_recv(&mut self) -> Option<Bundle> {
        self.put_back.take().or_else(|| self.queue.try_recv().ok())
    }

    /// Makes the bundle that was received last the next one again.
    pub fn put_back(&mut self, bundle: Bundle) {
        self.put_back = Some(bundle);
    }
}

impl Outlet {
    /// Sends where there is room now, else gives the bundle back.
    fn send_now(&self, bundle: Bundle) -> Result<(), Bundle> {
        // Before the delivery can have it: from then on its letters give room back.
        self.handed_out.set(bundle.worker, bundle.upto);
        let units = self.units(&bundle);
        self.try_send(bundle, units)
    }

    /// Sends as soon as there is room.
    async fn send_when_free(&self, bundle: Bundle, abort: &CancellationToken) -> Result<(), OutletClosed> {
        let units = self.units(&bundle);
        self.waits().begin(Instant::now());
        let result = tokio::select! {
            biased;
            () = abort.cancelled() => Err(OutletClosed::Aborted),
            () = self.cancel.cancelled() => Err(OutletClosed::Detached),
            sent = self.send_later(bundle, units) => sent,
        };
        self.waits().end(Instant::now());
        result
    }

    /// A worker begins to hand out at `from`.
    pub fn begin(&self, worker: u16, from: Offset) {
        self.handed_out.set(worker, from);
    }

    pub fn detach(&self) {
        self.cancel.cancel();
    }

    pub fn detached(&self) -> bool {
        self.cancel.is_cancelled()
    }

    /// Microseconds in which at least one worker has waited for room.
    pub fn blocked_us(&self) -> u64 {
        self.waits().so_far(Instant::now()).as_micros() as u64
    }

    /// How long some worker has waited for room without a break until now.
    pub fn blocked_for(&self) -> Duration {
        let since = self.waits().since;
        since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    fn waits(&self) -> MutexGuard<'_, Waits> {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn queued_bytes(&self) -> u64 {
        (self.room_max as usize - self.room.available_permits()) as u64 * ROOM_UNIT_BYTES
    }

    fn try_send(&self, mut bundle: Bundle, units: u32) -> Result<(), Bundle> {
        let Ok(slot) = self.queue.try_reserve() else { return Err(bundle) };
        if units > 0 {
            let Ok(room) = Arc::clone(&self.room).try_acquire_many_owned(units) else { return Err(bundle) };
            bundle.room = Some(room);
        }
        slot.send(bundle);
        Ok(())
    }

    async fn send_later(&self, mut bundle: Bundle, units: u32) -> Result<(), OutletClosed> {
        if units > 0 {
            let room = Arc::clone(&self.room).acquire_many_owned(units).await;
            bundle.room = Some(room.map_err(|_| OutletClosed::Detached)?);
        }
        self.queue.send(bundle).await.map_err(|_| OutletClosed::Detached)
    }

    /// A row keeps the whole segment that it lies in, so that is what counts.
    /// A bundle over the whole room takes all of it. One without rows takes none: no
    /// commit would give it back.
    fn units(&self, bundle: &Bundle) -> u32 {
        if bundle.batches.is_empty() {
            return 0;
        }
        let mut bytes = 0;
        let mut last: Option<*const u8> = None;
        for batch in &bundle.batches {
            bytes += batch.entries.len() * size_of::<crate::batch::Entry>();
            for (i, segment) in batch.segments.iter().enumerate() {
                // The frame's own segment is shared by the bundle's batches.
                if i > 0 || last != Some(segment.as_ptr()) {
                    bytes += segment.len();
                }
                if i == 0 {
                    last = Some(segment.as_ptr());
                }
            }
        }
        (bytes as u64).div_ceil(ROOM_UNIT_BYTES).clamp(1, u64::from(self.room_max)) as u32
    }
}

impl Waits {
    fn begin(&mut self, now: Instant) {
        self.waiting += 1;
        self.since.get_or_insert(now);
    }

    fn end(&mut self, now: Instant) {
        self.waiting -= 1;
        if self.waiting == 0 {
            self.ended = self.so_far(now);
            self.since = None;
        }
    }

    fn so_far(&self, now: Instant) -> Duration {
        self.ended + self.since.map_or(Duration::ZERO, |since| now.duration_since(since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(upto: u64) -> Bundle {
        // Its bytes fill a queue of a kibibyte.
        let batch = Batch { entries: vec![crate::batch::Entry::default(); 16].into(), ..Batch::default() };
        Bundle {
            worker: 0,
            workers: 1,
            from: Offset(0),
            upto: Offset(upto),
            batches: vec![batch],
            seen: Seen::default(),
            letters: Ticket::default(),
            urgent: false,
            room: None,
        }
    }

    #[tokio::test]
    async fn a_sink_with_room_waits_for_none_without_and_all_of_these_are_waited_for_together() {
        let (full, mut queues): (Vec<_>, Vec<_>) = (0..2).map(|sink| outlet(sink, 1 << 10, 1)).unzip();
        let (free, mut queue) = outlet(2, 1 << 10, 1);
        full.iter().for_each(|outlet| drop(outlet.send_now(bundle(1))));
        let (all, abort) = ([full[0].clone(), full[1].clone(), free], CancellationToken::new());
        let runtime = Handle::current();
        let sending = tokio::task::spawn_blocking(move || {
            send_all(all.iter().map(|outlet| (outlet, bundle(2))), &abort, &runtime)
        });
        assert_eq!(queue.recv().await.map(|bundle| bundle.upto), Some(Offset(2)), "it has room");
        // Only a test that fails waits for long.
        let both_wait = async {
            while full.iter().any(|outlet| outlet.waits().waiting == 0) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), both_wait).await.expect("both are seen to be full");
        full[0].detach();
        drop(queues[1].recv().await);
        assert_eq!(queues[1].recv().await.map(|bundle| bundle.upto), Some(Offset(2)));
        assert_eq!(sending.await.expect("no panic"), Err(OutletClosed::Detached));
    }

    #[test]
    fn time_in_which_several_workers_wait_counts_once_until_the_last_of_them_goes_on() {
        let begun = Instant::now();
        let at = |ms| begun + Duration::from_millis(ms);
        let mut waits = Waits::default();
        waits.begin(at(0));
        waits.begin(at(10));
        waits.end(at(20));
        assert_eq!(waits.so_far(at(30)), Duration::from_millis(30), "one still waits");
        waits.end(at(40));
        assert_eq!(waits.so_far(at(50)), Duration::from_millis(40));
        waits.begin(at(60));
        assert_eq!(waits.so_far(at(65)), Duration::from_millis(45));
    }
}
