//! Detects a slow disk: a disk that answers late again and again is one problem, which ends after it has
//! answered in time for a while.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::commit::STALL_LEAST;
use crate::stream::Slow;

/// Duration from which a write or sync is slow.
const CALL_LEAST: Duration = Duration::from_secs(1);
/// Time without a slow call after which the disk is no longer slow.
const SLOW_FOR: Duration = Duration::from_secs(60);
/// Total duration of slow calls within [`SLOW_FOR`] from which the disk is slow. A single call of
/// [`STALL_LEAST`] suffices too.
const SUM_LEAST: Duration = Duration::from_secs(10);

/// Recent slow calls.
#[derive(Default)]
pub struct Slowness {
    /// End and duration of each call; at most as many as fit into [`SLOW_FOR`] one after the other.
    calls: VecDeque<(Instant, Duration)>,
    since: Option<Instant>,
}

impl Slowness {
    /// Records a call that has ended `now`.
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
