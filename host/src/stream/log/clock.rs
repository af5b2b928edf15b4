//! Append time: never goes back, and does not follow a clock that jumps by years.
//!
//! Gateways without a clock battery start in 1970 and may jump to anything
//! before NTP answers; retention by age must not delete on such a word.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// Before this the clock was never set: 2025-01-01.
pub const SET_US: u64 = 1_735_689_600_000_000;
/// Further ahead of the last append than this, the clock is not believed.
const JUMP_US_MAX: u64 = 5 * 365 * 24 * 3_600 * 1_000_000;

/// Microseconds since 1970, from anywhere.
pub type Wall = Arc<dyn Fn() -> u64 + Send + Sync>;

pub fn system() -> Wall {
    Arc::new(|| SystemTime::UNIX_EPOCH.elapsed().map_or(0, |t| t.as_micros() as u64))
}

pub struct Clock {
    wall: Wall,
    last_us: u64,
    last_at: Instant,
}

impl Clock {
    /// `last_us` is the last append time that the log holds, 0 for none.
    pub fn new(wall: Wall, last_us: u64) -> Self {
        Self { wall, last_us, last_at: Instant::now() }
    }

    /// The append time of a frame written now.
    pub fn stamp(&mut self) -> u64 {
        let now = (self.wall)();
        let elapsed = self.last_at.elapsed();
        self.last_at = Instant::now();
        self.last_us = next(self.last_us, now, elapsed);
        self.last_us
    }
}

fn next(last: u64, now: u64, elapsed: Duration) -> u64 {
    if last >= SET_US && now > last + JUMP_US_MAX { last + elapsed.as_micros() as u64 } else { last.max(now) }
}

/// Whether `now` may be used to judge the age of what was appended at `last`.
pub fn believable(now: u64, last: u64) -> bool {
    now >= SET_US && (last < SET_US || now <= last + JUMP_US_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn append_time_neither_goes_back_nor_follows_a_jump_by_decades() {
        let year = 365 * 24 * 3_600 * 1_000_000;
        assert_eq!(next(0, 17, Duration::ZERO), 17);
        assert_eq!(next(20, 17, Duration::ZERO), 20);
        assert_eq!(next(17, SET_US + year, Duration::ZERO), SET_US + year);
        assert_eq!(next(SET_US, SET_US + 30 * year, Duration::from_micros(3)), SET_US + 3);
        assert!(!believable(5, 0) && believable(SET_US, 5) && !believable(SET_US + 30 * year, SET_US));
    }
}
