//! Permits for large packets. One budget is for partly received packets of all connections, another for
//! outgoing messages for which there is no other memory.
//!
//! A connection continues with a packet larger than [`FREE_BYTES`] when it has a permit for all of it.
//! Permits are given in the order of requests, so that a packet with a permit can be completed. A client
//! that has a permit and sends or takes less than [`PROGRESS_BYTES_MIN`] in [`PROGRESS_EVERY`] while
//! others wait is disconnected. All its bytes count as progress, whichever packet they belong to.

use std::future::pending;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep_until};

/// Size up to which a packet needs no permit, because every connection may hold as much.
pub const FREE_BYTES: usize = 4 << 10;
/// Unit in which the budget is counted.
const UNIT_BYTES: usize = 1 << 10;
/// Least progress of a client with a permit, about 1 KiB/s, which is slower than GPRS.
const PROGRESS_BYTES_MIN: u64 = 10 << 10;
const PROGRESS_EVERY: Duration = Duration::from_secs(10);

/// The budget that all connections share.
pub struct Permits {
    units: Arc<Semaphore>,
    units_max: u32,
    waiting: AtomicUsize,
}

impl Permits {
    pub fn new(bytes_max: u64) -> Arc<Self> {
        let units_max = u32::try_from(bytes_max / UNIT_BYTES as u64).unwrap_or(u32::MAX).max(1);
        let units = Arc::new(Semaphore::new(units_max as usize));
        Arc::new(Self { units, units_max, waiting: AtomicUsize::new(0) })
    }

    /// Returns whether connections wait for permits. If so, less is read of each connection that has not
    /// asked yet.
    pub fn is_wanted(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// Returns the number of connections that wait for a permit.
    #[cfg(test)]
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Returns whether any packet holds a permit.
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

struct Waits<'r>(&'r Permits);

impl<'r> Waits<'r> {
    fn new(room: &'r Permits) -> Self {
        room.waiting.fetch_add(1, Ordering::Relaxed);
        Self(room)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The permit of one connection for a large packet, or its place among the waiting ones.
pub struct Permit {
    room: Arc<Permits>,
    bytes: usize,
    /// Bytes that have passed since the permit was requested, of this packet and of others that kept the
    /// permit.
    passed: u64,
    state: State,
}

enum State {
    Waits(Pin<Box<dyn Future<Output = OwnedSemaphorePermit> + Send>>),
    Has {
        _room: OwnedSemaphorePermit,
        /// When progress was last checked, and how many bytes had passed then.
        looked: (Instant, u64),
    },
}

/// The client has a permit for a large packet and hardly makes progress while others wait.
#[derive(Debug, PartialEq, Eq)]
pub struct TooSlow;

impl Permit {
    /// Requests a permit for a packet of `bytes`. `None` means that there is no packet, or that its
    /// length is not known yet. A permit is kept for the next packet if that is no larger.
    pub fn set(permit: &mut Option<Box<Self>>, bytes: Option<usize>, room: &Arc<Permits>) {
        let Some(bytes) = bytes.filter(|bytes| *bytes > FREE_BYTES) else {
            *permit = None;
            return;
        };
        if permit.as_deref().is_some_and(|known| known.bytes >= bytes) {
            return;
        }
        // What a smaller one had is free for this one, too.
        *permit = None;
        let units =
            u32::try_from(bytes.div_ceil(UNIT_BYTES)).map_or(room.units_max, |it| it.min(room.units_max));
        let state = match room.units.clone().try_acquire_many_owned(units) {
            Ok(taken) => State::Has { _room: taken, looked: (Instant::now(), 0) },
            Err(_) => State::Waits(Box::pin(room.clone().take(units))),
        };
        *permit = Some(Box::new(Self { room: room.clone(), bytes, passed: 0, state }));
    }

    /// Counts bytes that have passed.
    pub fn add(&mut self, bytes: usize) {
        self.passed += bytes as u64;
    }

    /// Returns whether the permit was given.
    pub fn is_given(&self) -> bool {
        matches!(self.state, State::Has { .. })
    }

    /// Returns the size of the packet for which the permit is.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Waits until the permit is given. Returns an error if its packet makes too little progress while
    /// others wait. Never returns if nothing is waited for. Cancel safe.
    pub async fn changed(permit: Option<&mut Self>) -> Result<(), TooSlow> {
        let Some(permit) = permit else { return pending().await };
        // Boxed: a connection that waits for nothing does not carry it.
        Box::pin(async move {
            let Self { room, passed, state, .. } = permit;
            let looked = match state {
                State::Waits(taken) => {
                    *state = State::Has { _room: taken.await, looked: (Instant::now(), *passed) };
                    return Ok(());
                }
                State::Has { looked, .. } => looked,
            };
            loop {
                sleep_until(looked.0 + PROGRESS_EVERY).await;
                if room.is_wanted() && *passed < looked.1 + PROGRESS_BYTES_MIN {
                    return Err(TooSlow);
                }
                *looked = (Instant::now(), *passed);
            }
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    impl Permit {
        /// As if its progress had been looked at long ago.
        fn age(&mut self) {
            let State::Has { looked, .. } = &mut self.state else { panic!("it has no room") };
            looked.0 = looked.0.checked_sub(2 * PROGRESS_EVERY).unwrap();
        }
    }

    #[tokio::test]
    async fn a_large_packet_waits_for_room_and_one_that_hardly_comes_gives_it_up() {
        let room = &Permits::new(128 << 10);
        let large = 100_000;
        let (mut small, mut one, mut two) = (None, None, None);
        for (permit, bytes) in [(&mut small, FREE_BYTES), (&mut one, large), (&mut two, large)] {
            Permit::set(permit, Some(bytes), room);
        }
        assert!(small.is_none());
        let may_read = |permit: &Option<Box<Permit>>| permit.as_ref().is_none_or(|it| it.is_given());
        assert!(may_read(&one) && !may_read(&two));
        one.as_mut().unwrap().age();
        assert_eq!(Permit::changed(one.as_deref_mut()).now_or_never(), None, "nobody waits yet");
        let mut waits = Box::pin(Permit::changed(two.as_deref_mut()));
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
            Permit::set(&mut one, Some(next), room);
            one.as_mut().unwrap().age();
            assert_eq!(Permit::changed(one.as_deref_mut()).now_or_never(), expected, "{came} bytes");
        }
        // It is whole, or its connection has ended.
        Permit::set(&mut one, None, room);
        assert_eq!(waits.await, Ok(()));
        assert!(may_read(&two) && !room.is_wanted());
    }
}
