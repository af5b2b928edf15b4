//! The broker's time, by which sessions, queues and message expiry are aged. It advances evenly, even if
//! the machine's clock jumps: on a gateway without a clock battery that clock starts anywhere and jumps
//! by decades.
//!
//! Broker time starts at the machine's wall clock and then follows the monotonic clock. If the two
//! differ by more than [`JUMP_LEAST`], the wall clock has jumped, and later wall times are converted
//! with another difference. The differences are state of the broker's stream (`ck`), so that time stamps
//! from before a jump keep their age, even after a restart. The time during which the host did not run
//! counts if the clock was set both before and after.

use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use crate::stream::log::clock::{JUMP_LEAST, JUMP_MAX, SET_US as CLOCK_SET_US};
pub use crate::stream::log::clock::{Source, system};

/// Key in the state of the broker's stream.
pub const KEY: &[u8] = b"ck";
const JUMP_LEAST_US: u64 = JUMP_LEAST.as_micros() as u64;
/// Longest time for which the host is assumed to have been off, if the clock is right.
const OFF_MAX_US: u64 = JUMP_MAX.as_micros() as u64;
/// Number of jumps that are remembered.
const JUMPS_MAX: usize = 16;
const FORMAT: u8 = 1;

pub struct Clock {
    source: Source,
    /// Broker time minus monotonic time.
    base_us: u64,
    /// Spans between jumps, the newest last, never empty.
    spans: RwLock<Vec<Span>>,
}

/// Span between two jumps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    /// Start and end in wall time.
    from_us: u64,
    to_us: u64,
    /// Broker time minus wall time.
    ahead_us: i64,
}

/// A jump of the wall clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Jump {
    pub is_forward: bool,
    pub by: Duration,
}

impl Jump {
    fn by(difference_us: i64) -> Self {
        Self { is_forward: difference_us > 0, by: Duration::from_micros(difference_us.unsigned_abs()) }
    }
}

impl Clock {
    /// Creates the clock. `saved` is the result of [`Clock::to_bytes`] in the last run, and `newest_us`
    /// the latest broker time that is known of that run. Returns the jump if the wall clock does not
    /// continue from there.
    pub fn new(source: Source, saved: Option<&[u8]>, newest_us: u64) -> (Self, Option<Jump>) {
        let (saved_us, mut spans) = saved.and_then(from_bytes).unwrap_or_default();
        let newest_us = newest_us.max(saved_us);
        let (wall_us, monotonic_us) = source();
        let last = spans.last().copied().unwrap_or(Span { from_us: 0, to_us: u64::MAX, ahead_us: 0 });
        if spans.is_empty() {
            spans.push(last);
        }
        let expected_us = newest_us.saturating_add_signed(last.ahead_us.saturating_neg());
        let is_set = wall_us >= CLOCK_SET_US && expected_us >= CLOCK_SET_US;
        let goes_on =
            wall_us + JUMP_LEAST_US >= expected_us && wall_us <= expected_us.saturating_add(OFF_MAX_US);
        let mut jump = None;
        if newest_us > 0 && !(is_set && goes_on) {
            jump = Some(Jump::by(difference(wall_us, expected_us)));
            push(
                &mut spans,
                expected_us,
                Span { from_us: wall_us, to_us: u64::MAX, ahead_us: difference(newest_us, wall_us) },
            );
        }
        let ahead_us = spans.last().map_or(0, |span| span.ahead_us);
        let now_us = wall_us.saturating_add_signed(ahead_us);
        (Self { source, base_us: now_us.saturating_sub(monotonic_us), spans: RwLock::new(spans) }, jump)
    }

    /// Returns the current broker time.
    pub fn now_us(&self) -> u64 {
        self.base_us.saturating_add((self.source)().1)
    }

    /// Converts a wall time in the past to broker time.
    pub fn of_wall(&self, wall_us: u64) -> u64 {
        let spans = self.spans.read().unwrap_or_else(PoisonError::into_inner);
        let newest = spans.last().expect("never empty");
        let now_us = || self.now_us().saturating_add_signed(newest.ahead_us.saturating_neg());
        let is_within =
            |span: &&Span| span.from_us <= wall_us.saturating_add(JUMP_LEAST_US) && wall_us <= span.to_us;
        let span = match spans.as_slice() {
            [only] => only,
            // Of two that fit the later one; nothing was stamped in the future.
            [older @ .., _] if wall_us > now_us().saturating_add(JUMP_LEAST_US) => {
                older.iter().rev().find(is_within).unwrap_or(newest)
            }
            all => all.iter().rev().find(is_within).unwrap_or(newest),
        };
        wall_us.saturating_add_signed(span.ahead_us)
    }

    /// Converts a broker time to the wall time that the clock would show now.
    pub fn to_wall(&self, us: u64) -> u64 {
        let spans = self.spans.read().unwrap_or_else(PoisonError::into_inner);
        us.saturating_add_signed(spans.last().expect("never empty").ahead_us.saturating_neg())
    }

    /// Compares the clocks. Must be called before recent time stamps are converted.
    pub fn check(&self) -> Option<Jump> {
        let (wall_us, monotonic_us) = (self.source)();
        let ahead_us = difference(self.base_us.saturating_add(monotonic_us), wall_us);
        let differs = |spans: &[Span]| {
            let before = spans.last().expect("never empty").ahead_us;
            before.abs_diff(ahead_us) > JUMP_LEAST_US
        };
        if !differs(&self.spans.read().unwrap_or_else(PoisonError::into_inner)) {
            return None;
        }
        let mut spans = self.spans.write().unwrap_or_else(PoisonError::into_inner);
        if !differs(&spans) {
            return None;
        }
        let before = spans.last().expect("never empty").ahead_us;
        let now_us = self.base_us.saturating_add(monotonic_us);
        let ended_us = now_us.saturating_add_signed(before.saturating_neg());
        push(&mut spans, ended_us, Span { from_us: wall_us, to_us: u64::MAX, ahead_us });
        Some(Jump::by(before.saturating_sub(ahead_us)))
    }

    /// Encodes the clock for the next run.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![FORMAT];
        bytes.extend(self.now_us().to_be_bytes());
        for Span { from_us, to_us, ahead_us } in &*self.spans.read().unwrap_or_else(PoisonError::into_inner) {
            bytes.extend([from_us.to_be_bytes(), to_us.to_be_bytes(), ahead_us.to_be_bytes()].concat());
        }
        bytes
    }
}

/// Ends the last span and begins the next one.
fn push(spans: &mut Vec<Span>, ended_us: u64, next: Span) {
    if let Some(last) = spans.last_mut() {
        last.to_us = ended_us;
    }
    spans.push(next);
    if spans.len() > JUMPS_MAX {
        spans.remove(0);
    }
}

fn difference(a: u64, b: u64) -> i64 {
    i64::try_from(i128::from(a) - i128::from(b)).unwrap_or(if a > b { i64::MAX } else { i64::MIN })
}

fn from_bytes(bytes: &[u8]) -> Option<(u64, Vec<Span>)> {
    let (&[FORMAT], rest) = bytes.split_first_chunk()? else { return None };
    let (now, rest) = rest.split_first_chunk()?;
    let (spans, []) = rest.as_chunks::<24>() else { return None };
    let span = |bytes: &[u8; 24]| {
        let word = |at: usize| bytes[at..at + 8].try_into().expect("eight bytes");
        Span {
            from_us: u64::from_be_bytes(word(0)),
            to_us: u64::from_be_bytes(word(8)),
            ahead_us: i64::from_be_bytes(word(16)),
        }
    };
    Some((u64::from_be_bytes(*now), spans.iter().map(span).collect()))
}

#[cfg(test)]
pub mod tests {
    use super::*;
    pub use crate::stream::log::clock::tests::{Hands, NOW};

    const HOUR: u64 = 3_600_000_000;
    const YEAR: u64 = 365 * 24 * HOUR;

    #[test]
    fn what_was_stamped_before_or_after_a_jump_keeps_its_age() {
        for by in [YEAR as i64 * 26, -(YEAR as i64), HOUR as i64, -(HOUR as i64)] {
            let hands = Hands::at(NOW);
            let (clock, jump) = Clock::new(hands.source(), None, 0);
            assert_eq!(jump, None);
            let age = |stamp| clock.now_us() - clock.of_wall(stamp);
            let before = hands.wall();
            hands.pass(HOUR / 2);
            assert_eq!((clock.check(), age(before)), (None, HOUR / 2));
            hands.jump(by);
            assert_eq!(clock.check(), Some(Jump::by(by)));
            assert_eq!(clock.check(), None, "said once");
            let after = hands.wall();
            hands.pass(HOUR / 4);
            assert_eq!((age(before), age(after)), (3 * HOUR / 4, HOUR / 4), "{by}");
            // The next run goes on, also where the clock was reset meanwhile.
            for off in [HOUR as i64, -(YEAR as i64), 30 * YEAR as i64] {
                let next = Hands::at(hands.wall());
                next.jump(off);
                let (then, jump) = Clock::new(next.source(), Some(&clock.to_bytes()), 0);
                let age = |stamp| then.now_us() - then.of_wall(stamp);
                let is_trusted = off == HOUR as i64;
                assert_eq!(jump.is_none(), is_trusted, "{by} {off}");
                let off = if is_trusted { HOUR } else { 0 };
                assert_eq!(age(after), HOUR / 4 + off, "{by} {off}");
                // Set back by less than it went on since: the later time that it may mean counts.
                let is_ambiguous = by == -(HOUR as i64) && is_trusted;
                let since = if is_ambiguous { 3 * HOUR / 4 } else { 3 * HOUR / 4 + off };
                assert_eq!(age(before), since, "{by} {off}");
            }
        }
    }

    #[test]
    fn a_clock_that_is_kept_right_does_not_jump_and_a_slow_walk_away_does() {
        let hands = Hands::at(NOW);
        let (clock, _) = Clock::new(hands.source(), None, 0);
        let jumps = (0..10).filter(|_| {
            hands.jump(-40_000_000);
            clock.check().is_some()
        });
        assert_eq!(jumps.count(), 5, "40 seconds ten times, told each time they are over a minute");
        assert!(clock.now_us().abs_diff(NOW) < 1_000, "broker time stands still with the monotonic clock");
    }

    #[test]
    fn records_of_a_run_that_saved_nothing_are_not_in_the_future() {
        let hands = Hands::at(17);
        let (clock, jump) = Clock::new(hands.source(), None, NOW);
        assert_eq!((clock.now_us(), jump.is_some()), (NOW, true));
        hands.pass(HOUR);
        hands.jump(NOW as i64);
        assert!(clock.check().is_some());
        assert_eq!(clock.now_us(), NOW + HOUR);
    }
}
