//! Which damaged offsets were counted and logged already: damage is one fault, however many
//! readers come upon it.

use std::ops::Range;

/// Spans that are remembered; messages of further ones count for each reader.
const SPANS_MAX: usize = 1_000;

/// What was told of a log's damage since it was opened.
#[derive(Default)]
pub struct Told {
    counted: Spans,
    logged: Spans,
}

impl Told {
    /// Notes damage that a line of the log names.
    pub fn log(&mut self, damage: Range<u64>) {
        self.logged.add(damage);
    }

    /// Notes damage that a reader came upon. Returns how many of its messages were not counted
    /// before, and whether a line is to name it.
    pub fn read(&mut self, damage: Range<u64>) -> (u64, bool) {
        (self.counted.add(damage.clone()), self.logged.add(damage) > 0)
    }
}

/// Offsets, as spans that do not touch, in order.
#[derive(Default)]
struct Spans(Vec<Range<u64>>);

impl Spans {
    /// Returns how many of the offsets are new.
    fn add(&mut self, mut span: Range<u64>) -> u64 {
        let begin = self.0.partition_point(|known| known.end < span.start);
        let end = self.0.partition_point(|known| known.start <= span.end);
        let met = &self.0[begin..end];
        let known: u64 =
            met.iter().map(|known| span.end.min(known.end).saturating_sub(span.start.max(known.start))).sum();
        let new = span.end.saturating_sub(span.start).saturating_sub(known);
        if let (Some(first), Some(last)) = (met.first(), met.last()) {
            span = span.start.min(first.start)..span.end.max(last.end);
        } else if span.is_empty() || self.0.len() >= SPANS_MAX {
            return new;
        }
        self.0.splice(begin..end, [span]);
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_is_counted_and_logged_once_however_many_read_it() {
        let mut told = Told::default();
        told.log(10..20);
        assert_eq!(told.read(10..20), (10, false), "its line is there already");
        assert_eq!(told.read(10..20), (0, false));
        assert_eq!(told.read(15..25), (5, true));
        assert_eq!(told.read(12..14), (0, false));
        assert_eq!(told.read(0..5), (5, true));
        assert_eq!(told.read(0..30), (10, true));
        assert_eq!((told.counted.0.len(), &told.counted.0[0]), (1, &(0..30)), "one span");
    }

    #[test]
    fn spans_are_bounded() {
        let mut spans = Spans::default();
        for at in 0..2 * SPANS_MAX as u64 {
            assert_eq!(spans.add(at * 3..at * 3 + 1), 1);
        }
        assert_eq!(spans.0.len(), SPANS_MAX);
        assert_eq!(spans.add(0..3 * SPANS_MAX as u64), 2 * SPANS_MAX as u64);
    }
}
