//! Measures how long the verification of a password takes on this machine at present.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Time after which a measurement is repeated.
const FRESH: Duration = Duration::from_secs(1);
/// Most different costs that are measured separately.
const COSTS_MAX: usize = 16;

#[derive(Debug, Default)]
pub struct Pace {
    mean: Option<Duration>,
    /// The last measured duration of each cost, and when its next measurement is due.
    last: BTreeMap<u64, (Duration, Instant)>,
}

impl Pace {
    pub fn mean(&self) -> Duration {
        self.mean.unwrap_or_default().max(Duration::from_millis(1))
    }

    pub fn note(&mut self, cost: u64, took: Duration, now: Instant) {
        self.mean = Some(self.mean.map_or(took, |mean| (mean * 7 + took) / 8));
        if self.last.len() >= COSTS_MAX {
            self.last.clear();
        }
        self.last.insert(cost, (took, now));
    }

    /// Returns whether the caller is to measure a hash of this cost. Only one caller at a time is.
    pub fn is_due(&mut self, cost: u64, now: Instant) -> bool {
        let expected = self.expected(cost);
        let (_, at) = self.last.entry(cost).or_insert((expected, now - FRESH));
        let is_due = now.saturating_duration_since(*at) >= FRESH;
        if is_due {
            *at = now;
        }
        is_due
    }

    /// Returns the last measured duration, or an estimate from another cost.
    pub fn expected(&self, cost: u64) -> Duration {
        let in_proportion = || {
            let (other, (took, _)) = self.last.iter().next_back()?;
            Some(took.mul_f64(cost as f64 / *other.max(&1) as f64))
        };
        self.last.get(&cost).map(|(took, _)| *took).or_else(in_proportion).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_those_who_ask_measures_and_the_others_go_by_the_last_measurement() {
        let (mut pace, now) = (Pace::default(), Instant::now());
        let ms = Duration::from_millis;
        pace.note(10, ms(40), now);
        assert!(!pace.is_due(10, now + ms(999)));
        assert!(pace.is_due(10, now + ms(1_000)) && !pace.is_due(10, now + ms(1_001)));
        assert_eq!(pace.expected(10), ms(40));
        assert!(pace.is_due(30, now) && !pace.is_due(30, now));
        assert_eq!(pace.expected(30), ms(120));
        pace.note(30, ms(200), now);
        assert_eq!((pace.expected(30), pace.mean()), (ms(200), ms(60)));
    }
}
