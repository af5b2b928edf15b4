//! Records which damaged offsets were already counted and logged, because damage is one fault, however
//! many readers find it.

use std::ops::Range;

/// Most spans that are remembered. Messages of further spans are counted for each reader.
const SPANS_MAX: usize = 1_000;

/// Damaged offsets of a log that a start or a reader found, as spans that do not touch, in order.
#[derive(Default)]
pub struct Told(Vec<Range<u64>>);

impl Told {
    /// Adds a span, and returns how many of its offsets were not counted before.
    pub fn add(&mut self, mut span: Range<u64>) -> u64 {
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
    fn damage_is_counted_once_however_many_read_it() {
        let mut told = Told::default();
        assert_eq!(told.add(10..20), 10);
        assert_eq!(told.add(10..20), 0);
        assert_eq!(told.add(15..25), 5);
        assert_eq!(told.add(12..14), 0);
        assert_eq!(told.add(0..5), 5);
        assert_eq!(told.add(0..30), 10);
        assert_eq!((told.0.len(), &told.0[0]), (1, &(0..30)), "one span");
    }

    #[test]
    fn spans_are_bounded() {
        let mut spans = Told::default();
        for at in 0..2 * SPANS_MAX as u64 {
            assert_eq!(spans.add(at * 3..at * 3 + 1), 1);
        }
        assert_eq!(spans.0.len(), SPANS_MAX);
        assert_eq!(spans.add(0..3 * SPANS_MAX as u64), 2 * SPANS_MAX as u64);
    }
}
