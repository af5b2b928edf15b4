//! How long one part may keep others waiting: a budget of time that comes back
//! slowly, so that a fault that repeats costs the others a bounded share.

use std::time::{Duration, Instant};

/// Time that may be spent at once.
const TIME_MAX: Duration = Duration::from_secs(2);
/// Time comes back at this part of the time that passes.
const PART: u32 = 10;

#[derive(Debug)]
pub struct Patience {
    /// Negative after a wait that took longer than was left.
    left_s: f64,
    at: Instant,
}

impl Patience {
    pub fn new(now: Instant) -> Self {
        Self { left_s: TIME_MAX.as_secs_f64(), at: now }
    }

    /// Returns the time that may still be spent; zero where it is used up.
    pub fn left(&mut self, now: Instant) -> Duration {
        let back = now.saturating_duration_since(self.at).as_secs_f64() / f64::from(PART);
        self.left_s = (self.left_s + back).min(TIME_MAX.as_secs_f64());
        self.at = now;
        Duration::try_from_secs_f64(self.left_s).unwrap_or_default()
    }

    /// Takes `spent` from what is left.
    pub fn charge(&mut self, spent: Duration) {
        self.left_s -= spent.as_secs_f64();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_that_was_spent_comes_back_at_a_tenth_of_the_time_that_passes() {
        let start = Instant::now();
        let mut patience = Patience::new(start);
        assert_eq!(patience.left(start), TIME_MAX);
        patience.charge(Duration::from_secs(3));
        assert_eq!(patience.left(start), Duration::ZERO);
        assert_eq!(patience.left(start + Duration::from_secs(9)), Duration::ZERO);
        let left = patience.left(start + Duration::from_secs(15)).as_secs_f64();
        assert!((0.49..0.51).contains(&left), "{left}");
        assert_eq!(patience.left(start + Duration::from_secs(3_600)), TIME_MAX);
    }
}
