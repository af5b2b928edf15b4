//! Packets that have not come whole: one budget for those of all connections.
//!
//! A connection reads on in a packet larger than [`FREE_BYTES`] once it has room for all of
//! it in the budget, in the order of asking, so that those that have room can be completed.
//! A client that has room and sends less than [`PROGRESS_BYTES_MIN`] in [`PROGRESS_EVERY`]
//! while others wait is disconnected. What counts is what it sends, whichever packets that are of.

use std::future::pending;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep_until};

/// A smaller packet needs no room: it is what a connection may keep in any case.
pub const FREE_BYTES: usize = 4 << 10;
/// The budget counts these.
const UNIT_BYTES: usize = 1 << 10;
/// About 1 KiB/s: slower than GPRS.
const PROGRESS_BYTES_MIN: u64 = 10 << 10;
const PROGRESS_EVERY: Duration = Duration::from_secs(10);

/// The budget, of all connections.
pub struct PartialRoom {
    units: Arc<Semaphore>,
    units_max: u32,
    waiting: AtomicUsize,
}

impl PartialRoom {
    pub fn new(bytes_max: u64) -> Arc<Self> {
        let units_max = u32::try_from(bytes_max / UNIT_BYTES as u64).unwrap_or(u32::MAX).max(1);
        let units = Arc::new(Semaphore::new(units_max as usize));
        Arc::new(Self { units, units_max, waiting: AtomicUsize::new(0) })
    }

    /// Whether connections wait for it: then less is read of each that has not asked yet.
    pub fn is_wanted(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// Whether any packet has room.
    #[cfg(test)]
    pub fn is_taken(&self) -> bool {
        self.units.available_permits() < self.units_max as usize
    }

    async fn take(self: Arc<Self>, units: u32) -> OwnedSemaphorePermit {
        let _waits = Waits::new(&self);
        let taken = self.units.clone().acquire_many_owned(units).await;
        taken.expect("the semaphore is never closed")
    }
}

struct Waits<'r>(&'r PartialRoom);

impl<'r> Waits<'r> {
    fn new(room: &'r PartialRoom) -> Self {
        room.waiting.fetch_add(1, Ordering::Relaxed);
        Self(room)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The packet at the front of what one connection has read.
pub struct Partial {
    room: Arc<PartialRoom>,
    bytes: usize,
    /// Bytes that have come since it was made, of this packet and of those that kept its room.
    came: u64,
    state: State,
}

enum State {
    Waits(Pin<Box<dyn Future<Output = OwnedSemaphorePermit> + Send>>),
    Has {
        _room: OwnedSemaphorePermit,
        /// When its progress was last looked at, and how many bytes had come.
        looked: (Instant, u64),
    },
}

/// The client has room for a large packet and hardly sends anything, while others wait.
#[derive(Debug, PartialEq, Eq)]
pub struct TooSlow;

impl Partial {
    /// Asks for what a packet of `bytes` needs; `None`: the packet is whole, or its length is not
    /// known yet. One that has room keeps it, also for the next packet where that is no larger.
    pub fn set(partial: &mut Option<Box<Self>>, bytes: Option<usize>, room: &Arc<PartialRoom>) {
        let Some(bytes) = bytes.filter(|bytes| *bytes > FREE_BYTES) else {
            *partial = None;
            return;
        };
        if partial.as_deref().is_some_and(|known| known.bytes >= bytes) {
            return;
        }
        // What a smaller one had is free for this one, too.
        *partial = None;
        let units =
            u32::try_from(bytes.div_ceil(UNIT_BYTES)).map_or(room.units_max, |it| it.min(room.units_max));
        let state = match room.units.clone().try_acquire_many_owned(units) {
            Ok(taken) => State::Has { _room: taken, looked: (Instant::now(), 0) },
            Err(_) => State::Waits(Box::pin(room.clone().take(units))),
        };
        *partial = Some(Box::new(Self { room: room.clone(), bytes, came: 0, state }));
    }

    /// Counts bytes that have come.
    pub fn add(&mut self, bytes: usize) {
        self.came += bytes as u64;
    }

    /// Whether the connection may be read.
    pub fn may_read(partial: Option<&Self>) -> bool {
        partial.is_none_or(|partial| matches!(partial.state, State::Has { .. }))
    }

    /// Returns once it has room, or an error where it comes too slowly and others wait.
    /// Pending where nothing is waited for. Safe to drop.
    pub async fn changed(partial: Option<&mut Self>) -> Result<(), TooSlow> {
        let Some(partial) = partial else { return pending().await };
        // Boxed: a connection that waits for nothing does not carry it.
        Box::pin(async move {
            let Self { room, came, state, .. } = partial;
            let looked = match state {
                State::Waits(taken) => {
                    *state = State::Has { _room: taken.await, looked: (Instant::now(), *came) };
                    return Ok(());
                }
                State::Has { looked, .. } => looked,
            };
            loop {
                sleep_until(looked.0 + PROGRESS_EVERY).await;
                if room.is_wanted() && *came < looked.1 + PROGRESS_BYTES_MIN {
                    return Err(TooSlow);
                }
                *looked = (Instant::now(), *came);
            }
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    impl Partial {
        /// As if its progress had been looked at long ago.
        fn age(&mut self) {
            let State::Has { looked, .. } = &mut self.state else { panic!("it has no room") };
            looked.0 = looked.0.checked_sub(2 * PROGRESS_EVERY).unwrap();
        }
    }

    #[tokio::test]
    async fn a_large_packet_waits_for_room_and_one_that_hardly_comes_gives_it_up() {
        let room = &PartialRoom::new(128 << 10);
        let large = 100_000;
        let (mut small, mut one, mut two) = (None, None, None);
        for (partial, bytes) in [(&mut small, FREE_BYTES), (&mut one, large), (&mut two, large)] {
            Partial::set(partial, Some(bytes), room);
        }
        assert!(small.is_none());
        let may_read = |partial: &Option<Box<Partial>>| Partial::may_read(partial.as_deref());
        assert!(may_read(&one) && !may_read(&two));
        one.as_mut().unwrap().age();
        assert_eq!(Partial::changed(one.as_deref_mut()).now_or_never(), None, "nobody waits yet");
        let mut waits = Box::pin(Partial::changed(two.as_deref_mut()));
        assert_eq!(waits.as_mut().now_or_never(), None);
        for (came, next, expected) in [
            (PROGRESS_BYTES_MIN as usize, large, None),
            // The packet is whole, and the read that ended it brought a part of the next one.
            (90_000, large, None),
            (60_000, large - 1, None),
            // A byte now and then is no progress, nor is another packet.
            (1, large, Some(Err(TooSlow))),
            (1, large - 1, Some(Err(TooSlow))),
        ] {
            one.as_mut().unwrap().add(came);
            Partial::set(&mut one, Some(next), room);
            one.as_mut().unwrap().age();
            assert_eq!(Partial::changed(one.as_deref_mut()).now_or_never(), expected, "{came} bytes");
        }
        // It is whole, or its connection has ended.
        Partial::set(&mut one, None, room);
        assert_eq!(waits.await, Ok(()));
        assert!(may_read(&two) && !room.is_wanted());
    }
}
