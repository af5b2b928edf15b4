//! How much a counter grew lately.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Samples of one counter, at most this many within the window.
const SAMPLES: u32 = 60;

/// Growth of a counter, which began at 0 with the process, over a sliding window.
#[derive(Debug)]
pub struct Growth {
    window: Duration,
    /// Oldest first; the first one is the newest that is older than the window, if any is.
    samples: VecDeque<(Instant, u64)>,
    now: u64,
}

impl Growth {
    /// A counter that is 0 until `now`.
    pub fn over(window: Duration, now: Instant) -> Self {
        Self { window, samples: [(now, 0)].into(), now: 0 }
    }

    /// Takes a value in. Returns how much more it is than the last one.
    pub fn set(&mut self, value: u64, now: Instant) -> u64 {
        let more = value.saturating_sub(self.now);
        self.now = value;
        let is_due = |(at, _): &(Instant, u64)| now.duration_since(*at) >= self.window / SAMPLES;
        if self.samples.back().is_none_or(is_due) {
            self.samples.push_back((now, value));
        }
        while self.samples.get(1).is_some_and(|(at, _)| now.duration_since(*at) >= self.window) {
            self.samples.pop_front();
        }
        more
    }

    /// How much it grew within the window.
    pub fn recent(&self) -> u64 {
        self.now - self.samples.front().map_or(0, |(_, value)| (*value).min(self.now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_forgotten_after_the_window_and_a_first_event_counts() {
        let (start, hour) = (Instant::now(), Duration::from_secs(3_600));
        let mut growth = Growth::over(hour, start);
        assert_eq!((growth.set(1, start), growth.set(1, start)), (1, 0));
        assert_eq!(growth.recent(), 1, "a counter that begins with its first event");
        for minute in 1..=59 {
            growth.set(5, start + minute * hour / 60);
        }
        assert_eq!(growth.recent(), 5);
        growth.set(5, start + 2 * hour);
        growth.set(5, start + 3 * hour);
        assert_eq!(growth.recent(), 0);
        growth.set(7, start + 3 * hour);
        assert_eq!(growth.recent(), 2);
        assert!(growth.samples.len() <= SAMPLES as usize + 2);
    }
}
