//! Append time, and the ages of appended messages.
//!
//! Gateways without a clock battery start at any time and jump by decades, and a time server may be
//! wrong for a while. Append time follows the wall clock, never goes back, and accepts a jump ahead
//! after it has lasted [`BELIEVED_AFTER`]. Ages are measured in *elapsed* time, which follows the
//! monotonic clock, whatever the wall clock does. A [`Timeline`] relates the two, and is part of the
//! log's state, so that messages keep their age over a restart. Time during which the host did not run
//! counts as far as the wall clock shows it; more than [`OFF_TRUSTED`] counts only after the wall clock
//! has shown it for [`COUNTED_AFTER`].

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// Earliest plausible time, 2025-01-01. Before it the clock was never set.
pub const SET_US: u64 = 1_735_689_600_000_000;
/// Smallest change of the wall clock that counts as a jump. Smaller ones are corrections.
pub const JUMP_LEAST: Duration = Duration::from_secs(60);
/// Largest jump ahead that is ever accepted, and longest time that the host may have been off.
pub const JUMP_MAX: Duration = Duration::from_secs(5 * 365 * 24 * 3_600);
/// How long a jump ahead must have lasted before append time follows it.
const BELIEVED_AFTER: Duration = Duration::from_secs(60);
/// Time off that is accepted without a further check of the clock.
const OFF_TRUSTED: Duration = Duration::from_secs(24 * 3_600);
/// How long the host must have run without a jump of the clock before a longer time off counts.
const COUNTED_AFTER: Duration = Duration::from_secs(600);
/// Factor by which append time passes more slowly than real time while the wall clock is behind.
const SLOWER: u64 = 1_000;
/// Most spans that are remembered.
const SPANS_MAX: usize = 32;
const SPAN_BYTES: usize = 17;
const FORMAT: u8 = 1;

/// Returns microseconds of the wall clock since 1970, and of the monotonic clock since an arbitrary
/// time.
pub type Source = Arc<dyn Fn() -> (u64, u64) + Send + Sync>;

/// Returns the machine's clocks.
pub fn system() -> Source {
    let begun = Instant::now();
    Arc::new(move || {
        let wall = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_micros() as u64);
        (wall, begun.elapsed().as_micros() as u64)
    })
}

/// Returns whether a time is plausible, so that it can be used to determine an age.
pub fn is_set(us: u64) -> bool {
    us >= SET_US
}

/// The clock with which frames are stamped and ages are measured.
pub struct Clock {
    source: Source,
    /// Elapsed time and monotonic time at one moment.
    began_us: (u64, u64),
    timeline: Timeline,
    last_us: u64,
    was_set: bool,
    /// Wall time minus elapsed time for a jump ahead that is not accepted yet, and since when.
    jump: Option<(i64, u64)>,
    /// A long time off that does not count yet, and the elapsed time at which it will.
    off: Option<(u64, u64)>,
    /// Number of changes of the timeline since the log was opened.
    changes: u64,
    is_changed: bool,
}

impl Clock {
    /// Continues from `last_us`, the last append time in the log; 0 if there is none.
    pub fn new(source: Source, timeline: Timeline, last_us: u64) -> Self {
        let (wall_us, monotonic_us) = source();
        let mut elapsed_us = timeline.elapsed_at(last_us);
        let mut clock = Self {
            source,
            began_us: (0, monotonic_us),
            timeline,
            last_us,
            was_set: is_set(wall_us),
            jump: None,
            off: None,
            changes: 0,
            is_changed: false,
        };
        let off_us = wall_us.saturating_sub(last_us);
        if last_us == 0 {
            elapsed_us = wall_us;
        } else if off_us == 0 || !is_set(last_us) || off_us > micros(JUMP_MAX) {
            // No time off that the wall clock could tell: `now` decides.
        } else if off_us <= micros(OFF_TRUSTED) {
            elapsed_us += off_us;
            if clock.timeline.last().is_slow {
                clock.go_on(wall_us, elapsed_us, false);
            }
        } else {
            clock.go_on(wall_us, elapsed_us, false);
            clock.off = Some((off_us, elapsed_us + micros(COUNTED_AFTER)));
        }
        clock.began_us.0 = elapsed_us;
        clock
    }

    /// Returns the append time of a frame written now.
    pub fn now(&mut self) -> u64 {
        let (wall_us, _) = (self.source)();
        let elapsed_us = self.elapsed_us();
        let span = self.timeline.last();
        let on_time_us = span.append_at(elapsed_us);
        let was_set = std::mem::replace(&mut self.was_set, is_set(wall_us));
        let is_near = wall_us.abs_diff(on_time_us) <= micros(JUMP_LEAST);
        let jump = self.jump.take();
        if is_near && !span.is_slow {
            self.count_time_off(elapsed_us);
            self.last_us = self.last_us.max(wall_us);
        } else if wall_us <= on_time_us {
            if !span.is_slow {
                self.go_on(self.last_us, elapsed_us, true);
            }
            self.last_us = self.last_us.max(self.timeline.last().append_at(elapsed_us));
        } else if is_near || self.is_believed(jump, wall_us, elapsed_us, on_time_us, was_set) {
            self.last_us = self.last_us.max(wall_us);
            self.go_on(self.last_us, elapsed_us, false);
        } else {
            self.last_us = self.last_us.max(on_time_us);
        }
        self.last_us
    }

    /// Returns the append time of `ago`. Messages that were appended before are older.
    pub fn ago(&self, ago: Duration) -> u64 {
        self.timeline.append_at(self.elapsed_us().saturating_sub(micros(ago)))
    }

    /// Returns the timeline for the next opening, if it has changed since the last call. The keeper
    /// stores it while nothing is appended.
    pub fn changed(&mut self) -> Option<Vec<u8>> {
        std::mem::take(&mut self.is_changed).then(|| self.timeline.encode())
    }

    /// Returns the timeline for the next opening, and the number of its last change.
    pub fn timeline(&self) -> (u64, &Timeline) {
        (self.changes, &self.timeline)
    }

    /// Records that the last result of `changed` could not be stored, so that it is returned again.
    pub fn not_saved(&mut self) {
        self.is_changed = true;
    }

    fn elapsed_us(&self) -> u64 {
        let (elapsed_us, monotonic_us) = self.began_us;
        elapsed_us + (self.source)().1.saturating_sub(monotonic_us)
    }

    fn is_believed(
        &mut self,
        jump: Option<(i64, u64)>,
        wall_us: u64,
        elapsed_us: u64,
        on_time_us: u64,
        was_set: bool,
    ) -> bool {
        if !was_set || !is_set(on_time_us) {
            return true;
        }
        if wall_us - on_time_us > micros(JUMP_MAX) {
            return false;
        }
        let ahead_us = wall_us.cast_signed() - elapsed_us.cast_signed();
        let known = jump.filter(|(known_us, _)| known_us.abs_diff(ahead_us) <= micros(JUMP_LEAST));
        let (_, since_us) = *self.jump.insert(known.unwrap_or((ahead_us, elapsed_us)));
        elapsed_us - since_us >= micros(BELIEVED_AFTER)
    }

    fn go_on(&mut self, from_us: u64, elapsed_us: u64, is_slow: bool) {
        self.timeline.push(Span { from_us, elapsed_us, is_slow });
        self.jump = None;
        self.off = None;
        self.change();
    }

    fn count_time_off(&mut self, elapsed_us: u64) {
        if let Some((off_us, _)) = self.off.take_if(|(_, at_us)| elapsed_us >= *at_us) {
            self.timeline.0.last_mut().expect("never empty").elapsed_us += off_us;
            self.began_us.0 += off_us;
            self.change();
        }
    }

    fn change(&mut self) {
        self.changes += 1;
        self.is_changed = true;
    }
}

/// How append time passed: spans, the oldest first, never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timeline(Vec<Span>);

/// From here on append time passes as elapsed time does, or more slowly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    from_us: u64,
    elapsed_us: u64,
    is_slow: bool,
}

impl Default for Timeline {
    /// The timeline of a log without jumps, such as those of version 0.1.0.
    fn default() -> Self {
        Self(vec![Span { from_us: 0, elapsed_us: 0, is_slow: false }])
    }
}

impl Timeline {
    /// Returns the elapsed time for an append time.
    pub fn elapsed_at(&self, append_us: u64) -> u64 {
        let (span, next) = self.find(|span| span.from_us <= append_us);
        let rate = if span.is_slow { SLOWER } else { 1 };
        let since_us = append_us.saturating_sub(span.from_us).saturating_mul(rate);
        let before_us = span.from_us.saturating_sub(append_us);
        let elapsed_us = span.elapsed_us.saturating_add(since_us).saturating_sub(before_us);
        next.map_or(elapsed_us, |next| elapsed_us.min(next.elapsed_us))
    }

    /// Returns the append time for an elapsed time.
    pub fn append_at(&self, elapsed_us: u64) -> u64 {
        let (span, next) = self.find(|span| span.elapsed_us <= elapsed_us);
        let append_us = span.append_at(elapsed_us);
        next.map_or(append_us, |next| append_us.min(next.from_us))
    }

    fn find(&self, is_before: impl FnMut(&Span) -> bool) -> (Span, Option<Span>) {
        let next = self.0.partition_point(is_before).max(1);
        (self.0[next - 1], self.0.get(next).copied())
    }

    fn last(&self) -> Span {
        *self.0.last().expect("never empty")
    }

    fn push(&mut self, span: Span) {
        self.0.push(span);
        if self.0.len() > SPANS_MAX {
            // What was appended in it counts as younger than it is, never as older.
            self.0.remove(1);
        }
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![FORMAT];
        for Span { from_us, elapsed_us, is_slow } in &self.0 {
            bytes.extend(from_us.to_le_bytes());
            bytes.extend(elapsed_us.to_le_bytes());
            bytes.push(u8::from(*is_slow));
        }
        bytes
    }

    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (&[FORMAT], rest) = bytes.split_first_chunk()? else { return None };
        let (spans, []) = rest.as_chunks::<SPAN_BYTES>() else { return None };
        let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
        let span = |bytes: &[u8; SPAN_BYTES]| Span {
            from_us: word(&bytes[..8]),
            elapsed_us: word(&bytes[8..16]),
            is_slow: bytes[16] != 0,
        };
        let is_empty = spans.is_empty();
        (!is_empty).then(|| Self(spans.iter().map(span).collect()))
    }
}

impl Span {
    fn append_at(self, elapsed_us: u64) -> u64 {
        let rate = if self.is_slow { SLOWER } else { 1 };
        let before_us = self.elapsed_us.saturating_sub(elapsed_us);
        (self.from_us + elapsed_us.saturating_sub(self.elapsed_us) / rate).saturating_sub(before_us)
    }
}

fn micros(period: Duration) -> u64 {
    period.as_micros() as u64
}

#[cfg(test)]
pub mod tests {
    use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

    use super::*;

    const SECOND: u64 = 1_000_000;
    const HOUR: u64 = 3_600 * SECOND;
    const DAY: u64 = 24 * HOUR;
    const YEAR: u64 = 365 * DAY;
    pub const NOW: u64 = SET_US + YEAR;

    /// Clocks that a test sets.
    #[derive(Default)]
    pub struct Hands {
        passed_us: AtomicU64,
        wall_us: AtomicI64,
    }

    impl Hands {
        pub fn at(wall_us: u64) -> Arc<Self> {
            Arc::new(Self { passed_us: 0.into(), wall_us: (wall_us as i64).into() })
        }

        pub fn source(self: &Arc<Self>) -> Source {
            let hands = self.clone();
            Arc::new(move || {
                let passed = hands.passed_us.load(Ordering::Relaxed);
                (hands.wall_us.load(Ordering::Relaxed).saturating_add_unsigned(passed) as u64, passed)
            })
        }

        pub fn pass(&self, us: u64) {
            self.passed_us.fetch_add(us, Ordering::Relaxed);
        }

        /// Moves only the wall clock.
        pub fn jump(&self, by_us: i64) {
            self.wall_us.fetch_add(by_us, Ordering::Relaxed);
        }

        pub fn wall(self: &Arc<Self>) -> u64 {
            (self.source())().0
        }
    }

    /// The clock of a run, in which one frame is appended each second.
    struct Run {
        hands: Arc<Hands>,
        clock: Clock,
        /// Append times, and the real times at which they were stamped.
        appended: Vec<(u64, u64)>,
        passed_us: u64,
    }

    impl Run {
        fn at(wall_us: u64) -> Self {
            let hands = Hands::at(wall_us);
            let clock = Clock::new(hands.source(), Timeline::default(), 0);
            Self { hands, clock, appended: Vec::new(), passed_us: 0 }
        }

        fn pass(&mut self, seconds: u64) {
            for _ in 0..seconds {
                self.hands.pass(SECOND);
                self.passed_us += SECOND;
                let now_us = self.clock.now();
                assert!(self.appended.last().is_none_or(|(last_us, _)| *last_us <= now_us), "it went back");
                self.appended.push((now_us, self.passed_us));
            }
        }

        /// Lets time pass without appends.
        fn away(&mut self, us: u64) {
            self.hands.pass(us);
            self.passed_us += us;
        }

        fn restart(&mut self, off_us: u64, wall_us: u64) {
            let saved = Timeline::decode(&self.clock.timeline.encode()).unwrap();
            self.hands = Hands::at(wall_us);
            self.clock = Clock::new(self.hands.source(), saved, self.clock.last_us);
            self.passed_us += off_us;
        }

        /// Asserts that retention takes exactly the messages that are older than `age` for older.
        #[track_caller]
        fn keeps_for(&self, age_us: u64) {
            let since_us = self.clock.ago(Duration::from_micros(age_us));
            for (append_us, at_us) in &self.appended {
                let older_us = (self.passed_us - at_us).saturating_sub(age_us);
                assert!(older_us > 0 || *append_us >= since_us, "gone too early");
                assert!(older_us <= 2 * SECOND || *append_us < since_us, "{older_us} us late");
            }
        }

        fn follows(&mut self) {
            self.pass(1);
            assert_eq!(self.clock.last_us, self.hands.wall());
        }
    }

    #[test]
    fn a_wrong_answer_of_a_time_server_changes_neither_append_time_nor_ages() {
        for (ahead_us, lasts_s) in [(60 * DAY, 5), (HOUR, 50), (4 * YEAR, 59), (300 * YEAR, 900)] {
            let mut run = Run::at(NOW);
            run.pass(100);
            run.hands.jump(ahead_us as i64);
            run.pass(lasts_s);
            run.keeps_for(50 * SECOND);
            run.hands.jump(-(ahead_us as i64));
            run.follows();
            run.keeps_for(50 * SECOND);
        }
    }

    #[test]
    fn a_jump_ahead_that_lasts_is_followed_and_ages_nothing() {
        for ahead_us in [2 * 60 * SECOND, 60 * DAY, 4 * YEAR] {
            let mut run = Run::at(NOW);
            run.pass(100);
            run.hands.jump(ahead_us as i64);
            run.pass(62);
            run.follows();
            run.keeps_for(100 * SECOND);
            // And back again: append time nearly stands until the wall clock has caught up.
            run.hands.jump(-(ahead_us as i64));
            run.pass(119);
            run.keeps_for(200 * SECOND);
            run.keeps_for(30 * SECOND);
            assert!(run.clock.last_us.abs_diff(NOW + ahead_us + 163 * SECOND) < SECOND);
            run.away(if ahead_us > DAY { ahead_us } else { 0 });
            while run.clock.now() > run.hands.wall() {
                run.away(30 * SECOND);
            }
            run.follows();
            run.keeps_for(run.passed_us - 60 * SECOND);
        }
    }

    #[test]
    fn a_clock_that_is_set_at_last_is_followed_at_once() {
        for wall_us in [17, SET_US - DAY] {
            let mut run = Run::at(wall_us);
            run.pass(20);
            run.hands.jump((NOW - wall_us) as i64);
            run.follows();
            run.pass(20);
            run.keeps_for(30 * SECOND);
            run.restart(HOUR, 5);
            run.pass(20);
            assert!(run.clock.last_us >= NOW, "it does not go back");
            run.hands.jump((NOW + 2 * HOUR) as i64);
            run.follows();
        }
    }

    #[test]
    fn time_off_counts_a_long_one_only_once_the_clock_has_stayed_as_it_is() {
        let mut run = Run::at(NOW);
        run.pass(10);
        run.restart(HOUR, run.hands.wall() + HOUR);
        run.follows();
        run.keeps_for(HOUR / 2);
        let off_us = 60 * DAY;
        run.restart(off_us, run.hands.wall() + off_us);
        run.follows();
        assert!(
            run.clock.ago(Duration::from_micros(30 * DAY)) < run.appended[0].0,
            "nothing is that old yet"
        );
        run.pass(601);
        run.keeps_for(30 * DAY);
        run.keeps_for(300 * SECOND);
        // Where the clock was wrong at the start nothing ages by it.
        run.restart(0, run.hands.wall() + off_us);
        run.pass(30);
        run.hands.jump(-(off_us as i64));
        run.pass(2_000);
        run.keeps_for(2_500 * SECOND);
    }

    #[test]
    fn a_slow_walk_away_ages_nothing_and_many_jumps_make_nothing_older() {
        let mut run = Run::at(NOW);
        for _ in 0..200 {
            run.hands.jump(40 * SECOND as i64);
            run.pass(100);
        }
        for (append_us, at_us) in &run.appended {
            let elapsed_us = run.clock.timeline.elapsed_at(*append_us);
            assert!(elapsed_us + micros(JUMP_LEAST) >= NOW + at_us, "it is taken for older than it is");
        }
        assert!(run.clock.timeline.0.len() <= SPANS_MAX);
    }
}
