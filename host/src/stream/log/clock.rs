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

/// What frames are stamped with and ages are measured by.
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

    /// Returns the append time of a frame written now.
    pub fn now(&mut self) -> u64 {
        let now = (self.wall)();
        let elapsed = self.last_at.elapsed();
        self.last_at = Instant::now();
        self.last_us = next(self.last_us, now, elapsed);
        self.last_us
    }
}

/// Follows `now`. Where that jumped too far ahead, time passes as it elapses. Where it is
/// behind, time passes an eighth slower until `now` has caught up: what is measured by this
/// clock neither stands still nor goes back.
fn next(last: u64, now: u64, elapsed: Duration) -> u64 {
    let elapsed = elapsed.as_micros() as u64;
    if is_set(last) && now > last + JUMP_US_MAX {
        last + elapsed
    } else if now < last {
        last + elapsed - elapsed / 8
    } else {
        now
    }
}

/// Whether a time is that of a clock that was ever set: only then may it tell an age.
pub fn is_set(us: u64) -> bool {
    us >= SET_US
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
        assert!(!is_set(5) && is_set(SET_US));
    }

    #[test]
    fn after_a_jump_ahead_and_back_append_time_passes_until_the_clock_has_caught_up() {
        let (month, second) = (30 * 24 * 3_600 * 1_000_000, Duration::from_secs(1));
        let ahead = next(SET_US, SET_US + month, second);
        assert_eq!(ahead, SET_US + month);
        let (mut last, mut now) = (ahead, SET_US);
        for _ in 0..1_000 {
            now += 1_000_000;
            last = next(last, now, second);
        }
        assert_eq!(last, ahead + 875_000_000, "seven eighths of what passed");
        assert_eq!(next(ahead, ahead + 5, second), ahead + 5, "caught up");
    }
}
