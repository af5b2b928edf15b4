//! The embedded log, in which acknowledged means durable.
//!
//! An append is copied into the buffer of the next frame (`append`). The committer writes that frame,
//! syncs once, and publishes it (`commit`). Readers take it from the tail in memory or from disk
//! (`tail`, `cursor`, `scan`). Segments are created ahead, and removed by retention (`retain`). Opening
//! finds torn, damaged and unproven frames (`recover`). The layout on disk is in `segment` and `frame`;
//! `disk` is the interface to the disk.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::watch;

mod append;
pub mod clock;
mod commit;
mod crc;
mod cursor;
pub mod disk;
pub mod frame;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod generations;
mod measure;
mod open;
mod read_only;
mod recover;
mod retain;
mod roll;
mod scan;
pub mod segment;
#[cfg(test)]
pub(crate) mod sim;
mod slow;
mod state;
mod tail;
#[cfg(test)]
mod tests;
mod told;
mod unreadable;

pub use clock::SET_US as CLOCK_SET_US;
pub use disk::{Disk, RealDisk, SlowDisk, SyncSite};
pub use measure::METRICS;
pub use read_only::{ReadOnly, Remembered};
pub use recover::{Damage, OpenError, Recovery};
pub use state::STATE_BYTES_MAX;
pub use unreadable::Unread;

use super::{
    AppendError, Appended, Attachment, Config, Cursor, GapCause, Identity, Lack, NewMessage, OnLag, Opening,
    ReadError, Slow, Stall, StateChange, Stream, Ticket,
};
use crate::batch::Offset;
use crate::telemetry::Failures;
use crate::threads;

/// A stream in a folder of its own. When it is dropped, buffered appends are committed.
pub struct Log {
    inner: Arc<Inner>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// Shared state. Lock order: `writer`, `trimming`, then `front`, `back` or any other, one at a time.
pub(crate) struct Inner {
    name: String,
    dir: PathBuf,
    disk: Arc<dyn Disk>,
    identity: Identity,
    buffer_bytes_max: usize,
    takes_any_message: bool,
    segment_bytes: u64,
    reserve_bytes: u64,
    max_bytes: u64,
    max_age: Option<Duration>,
    /// Set until the log serves. Its first segment may then exceed `max_bytes`.
    opening: AtomicBool,
    may_use_reserve: AtomicBool,
    use_reserve_while_running: bool,
    clock: Mutex<clock::Clock>,
    /// Metadata of this opening.
    metadata: generations::Metadata,
    openings: Vec<Opening>,
    metrics: measure::Meters,
    told: Mutex<told::Told>,
    /// Why readers cannot read now, by the number of the reader.
    read_faults: Mutex<BTreeMap<u64, String>>,
    failures: Failures,

    front: Mutex<append::Front>,
    /// Wakes the committer. It is used together with `front`.
    wake: Condvar,
    writer: Mutex<commit::Writer>,
    /// The active segment and its file, for callers that must not wait for the committer.
    active: Mutex<(u64, Arc<dyn disk::File>)>,
    back: RwLock<Back>,
    /// Code of the [`Lack`] for which appends wait; 0 while they are accepted.
    lack: AtomicU8,
    /// Set while the disk has no room for the reserve, because it was used or could not be created.
    reserve_lacks_room: AtomicBool,
    /// Set while an expired segment cannot be removed.
    removal_fails: AtomicBool,

    /// Since when the committer is working on the disk.
    at_work_since: Mutex<Option<Instant>>,
    slowness: Mutex<slow::Slowness>,
    prepared: Mutex<Option<retain::Prepared>>,
    prepare_asked: AtomicBool,
    /// Permits one round at a time. True if a removal still has to be synced.
    trimming: Mutex<bool>,
    wanted: Mutex<retain::Wanted>,
    /// Wakes the keeper. It is used together with `wanted`.
    keeper: Condvar,

    /// The durable ticket; `None` once the log has stopped.
    durable: Mutex<Option<watch::Sender<Ticket>>>,
    /// Changes when there may be something new for readers.
    moved: watch::Sender<u64>,
    /// Changes when there may be room for waiting writers.
    space: watch::Sender<u64>,
    stopped: watch::Sender<Option<Arc<str>>>,
    /// Held as long as the log is open.
    _lock: Box<dyn Send + Sync>,
}

/// What readers and retention see: durable messages, in order.
struct Back {
    /// Segments, oldest first. The last one is written to.
    segments: VecDeque<recover::Segment>,
    tail: tail::Tail,
    /// One past the last durable message.
    end: u64,
    marks: BTreeMap<String, retain::Mark>,
}

impl Back {
    fn start(&self) -> u64 {
        self.segments.front().map_or(self.end, |segment| segment.header.base)
    }
}

impl Log {
    /// Opens or creates the stream in `dir`. Blocks, and reads the newest segment.
    pub fn open(
        disk: Arc<dyn Disk>,
        dir: &Path,
        name: &str,
        config: &Config,
    ) -> Result<(Arc<Self>, Recovery), OpenError> {
        let (inner, recovery) = open::open(disk, dir, name, config, clock::system())?;
        let committer = spawn("log-commit", &inner, commit::run);
        let keeper = spawn("log-keep", &inner, retain::run);
        let threads = [committer, keeper].into_iter().collect::<io::Result<_>>();
        let threads = threads.map_err(|error| OpenError::Io { dir: dir.display().to_string(), error })?;
        Ok((Arc::new(Self { inner, threads: Mutex::new(threads) }), recovery))
    }

    /// Returns the readers that retention respects and that are not attached in this process, such as
    /// those of a removed pipeline. [`Log::forget`] releases them.
    pub fn remembered(&self) -> Vec<(String, Offset)> {
        let back = read(&self.inner.back);
        let mark = |(name, mark): (&String, &retain::Mark)| {
            (Arc::strong_count(&mark.next) == 1)
                .then(|| (name.clone(), Offset(mark.next.load(std::sync::atomic::Ordering::Relaxed))))
        };
        back.marks.iter().filter_map(mark).collect()
    }

    /// Forgets a reader's position, so that retention no longer waits for it.
    pub fn forget(&self, consumer: &str) {
        self.inner.detach(consumer);
    }
}

fn spawn(name: &str, inner: &Arc<Inner>, run: fn(&Inner)) -> io::Result<JoinHandle<()>> {
    let inner = Arc::clone(inner);
    threads::spawn(name.to_owned(), move || {
        threads::take_short_slices();
        run(&inner);
    })
}

impl Drop for Log {
    fn drop(&mut self) {
        self.inner.start_closing();
        for thread in lock(&self.threads).drain(..) {
            let _ = thread.join();
        }
    }
}

#[async_trait]
impl Stream for Log {
    fn name(&self) -> &str {
        &self.inner.name
    }

    fn identity(&self) -> Identity {
        self.inner.identity
    }

    fn append(
        &self,
        messages: &[NewMessage<'_>],
        state: &[StateChange<'_>],
    ) -> Result<Appended, AppendError> {
        self.inner.append(messages, state)
    }

    async fn writable(&self) {
        self.inner.writable().await;
    }

    async fn out_of_space(&self) {
        self.inner.out_of_space().await;
    }

    fn durable(&self) -> watch::Receiver<Ticket> {
        match &*lock(&self.inner.durable) {
            Some(durable) => durable.subscribe(),
            None => watch::channel(Ticket::default()).1,
        }
    }

    fn bounds(&self) -> Range<Offset> {
        let back = read(&self.inner.back);
        Offset(back.start())..Offset(back.end)
    }

    fn openings(&self) -> Vec<Opening> {
        self.inner.openings.clone()
    }

    fn lose(&self, lost: Range<Offset>, cause: GapCause) {
        self.inner.lose(lost.start.0..lost.end.0, cause);
    }

    fn is_past_age(&self, append_us: u64) -> bool {
        clock::is_set(append_us) && self.inner.kept_since_us().is_some_and(|since| append_us < since)
    }

    fn cursor(&self, from: Offset) -> Box<dyn Cursor> {
        Box::new(cursor::LogCursor::new(Arc::clone(&self.inner), from, true))
    }

    fn peek(&self, from: Offset) -> Box<dyn Cursor> {
        Box::new(cursor::LogCursor::new(Arc::clone(&self.inner), from, false))
    }

    async fn seek_time(&self, append_us: u64) -> Result<Offset, ReadError> {
        let inner = Arc::clone(&self.inner);
        let sought = tokio::task::spawn_blocking(move || inner.seek_time(append_us)).await;
        sought.map_err(io::Error::other).flatten().map_err(|error| ReadError::Io(Arc::new(error)))
    }

    fn attach(&self, consumer: &str, from: Offset, on_lag: OnLag) -> Box<dyn Attachment> {
        self.inner.attach(consumer, from, on_lag)
    }

    fn rename_reader(&self, former: &str, consumer: &str) {
        self.inner.rename(former, consumer);
    }

    fn stall(&self) -> Option<Stall> {
        self.inner.stall()
    }

    fn slow(&self) -> Option<Slow> {
        lock(&self.inner.slowness).at(Instant::now())
    }

    fn lack(&self) -> Option<Lack> {
        self.inner.lack()
    }

    fn read_fault(&self) -> Option<String> {
        lock(&self.inner.read_faults).values().next().cloned()
    }

    fn is_in_place(&self) -> bool {
        self.inner.is_in_place()
    }

    fn has_room(&self) -> bool {
        self.inner.lack().is_none() && !self.inner.reserve_lacks_room.load(Ordering::Relaxed)
    }

    fn state(&self, prefix: &[u8]) -> Vec<(Vec<u8>, Vec<u8>)> {
        let prefix = state::key(state::USERS, prefix);
        let front = lock(&self.inner.front);
        front.state.range(&prefix).map(|(key, value)| (key[1..].to_vec(), value.to_vec())).collect()
    }

    fn state_room(&self) -> usize {
        state::STATE_BYTES_MAX.saturating_sub(lock(&self.inner.front).state.bytes())
    }

    async fn stopped(&self) -> Arc<str> {
        self.inner.stopped().await
    }

    async fn close(&self) {
        self.inner.start_closing();
        self.inner.stopped().await;
    }
}

impl Inner {
    /// Stops accepting appends. The committer writes what is buffered, then stops.
    fn start_closing(&self) {
        self.save_marks(true);
        lock(&self.front).closing = true;
        self.wake.notify_all();
        lock(&self.wanted).stop = true;
        self.keeper.notify_all();
    }

    fn is_in_place(&self) -> bool {
        loop {
            let (segment, file) = lock(&self.active).clone();
            let is_gone =
                |error: io::Error| matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory);
            let is_there =
                file.is_at(&self.dir.join(segment::name(segment))).unwrap_or_else(|error| !is_gone(error));
            // A segment that the log has left behind may be gone by retention.
            if is_there || lock(&self.active).0 == segment {
                return is_there;
            }
        }
    }

    /// Stops the log for good: nothing that is not durable yet will be acknowledged.
    fn fail(&self, what: &str, error: &io::Error) {
        let folder = self.dir.display();
        tracing::error!(stream = %self.name, %folder, %error,
            "cannot {what}: nothing more is acknowledged, and the host ends; look at the disk of the folder and at the \
             kernel's log (dmesg), mount it for writing again or replace it, then start the host");
        self.stop(&format!("cannot {what} in {folder}: {error}"));
    }

    fn stop(&self, reason: &str) {
        let reason: Arc<str> = reason.into();
        lock(&self.front).stopped.get_or_insert_with(|| Arc::clone(&reason));
        lock(&self.durable).take();
        self.stopped.send_if_modified(|stopped| {
            let first = stopped.is_none();
            stopped.get_or_insert(reason);
            first
        });
        self.moved.send_modify(|n| *n += 1);
        self.space.send_modify(|n| *n += 1);
    }

    async fn stopped(&self) -> Arc<str> {
        let mut stopped = self.stopped.subscribe();
        match stopped.wait_for(Option::is_some).await.ok().and_then(|reason| reason.clone()) {
            Some(reason) => reason,
            None => std::future::pending().await,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}
