//! Whether the disk of a log is slow: one that answers late again and again is one problem, which ends once it
//! has answered in time for a while.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::commit::STALL_LEAST;
use crate::stream::Slow;

/// A write or sync that takes longer is a slow one.
const CALL_LEAST: Duration = Duration::from_secs(1);
/// The disk is slow until none was for this time.
const SLOW_FOR: Duration = Duration::from_secs(60);
/// It is from the moment on that slow calls took this long within [`SLOW_FOR`], or one took [`STALL_LEAST`].
const SUM_LEAST: Duration = Duration::from_secs(10);

/// Slow calls of the last while.
#[derive(Default)]
pub struct Slowness {
    /// When each ended, and how long it took; no more than fit into [`SLOW_FOR`] one after the other.
    calls: VecDeque<(Instant, Duration)>,
    since: Option<Instant>,
}

impl Slowness {
    /// Notes a call that has ended `now`.
    pub fn ended(&mut self, began: Instant, now: Instant) {
        let took = now.saturating_duration_since(began);
        if took >= CALL_LEAST.min(STALL_LEAST) {
            self.forget(now);
            self.calls.push_back((now, took));
        }
    }

    /// Returns since when the disk is slow.
    pub fn at(&mut self, now: Instant) -> Option<Slow> {
        self.forget(now);
        let Some(longest) = self.calls.iter().map(|(_, took)| *took).max() else {
            self.since = None;
            return None;
        };
        let sum: Duration = self.calls.iter().map(|(_, took)| *took).sum();
        if self.since.is_none() && (sum >= SUM_LEAST || longest >= STALL_LEAST) {
            self.since = self.calls.front().and_then(|(ended, took)| ended.checked_sub(*took));
        }
        self.since.map(|since| Slow { since, longest })
    }

    fn forget(&mut self, now: Instant) {
        while self.calls.front().is_some_and(|(ended, _)| now.saturating_duration_since(*ended) >= SLOW_FOR) {
            self.calls.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In tests a call stalls after some milliseconds, so that the sum is tried with such.
    #[test]
    fn a_disk_that_answers_late_again_and_again_is_one_problem_until_it_has_been_fast_for_a_while() {
        let (mut slowness, start) = (Slowness::default(), Instant::now());
        let mut now = start;
        for _ in 0..20 {
            slowness.ended(now, now + STALL_LEAST);
            now += STALL_LEAST;
            assert_eq!(slowness.at(now), Some(Slow { since: start, longest: STALL_LEAST }));
            // As between two syncs.
            now += SLOW_FOR / 20;
            assert_eq!(slowness.at(now).map(|slow| slow.since), Some(start));
        }
        now += SLOW_FOR;
        assert_eq!(slowness.at(now), None);
        slowness.ended(now, now + STALL_LEAST / 4);
        assert_eq!(slowness.at(now + STALL_LEAST), None, "a fast call");
    }
}
