//! Messages that retention removed before sinks had them (`on_lag: detach`): told as soon as they are
//! gone, and counted once for a pipeline, however many of its sinks and readers lack them.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::metrics;
use crate::stream::GapCause;

/// Counts what a pipeline's sinks can never have.
pub struct Gone {
    counted: Mutex<Counted>,
    counter: ::metrics::Counter,
}

impl Gone {
    pub fn new(pipeline: &str) -> Self {
        Self { counted: Mutex::default(), counter: metrics::gap(pipeline, GapCause::Trimmed.as_str()) }
    }

    /// Counts those of the messages that are not counted yet.
    pub fn count(&self, messages: Range<u64>) {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        self.counter.increment(counted.add(messages));
    }
}

/// The messages that were counted: all that are gone between the first and the last of them. What is
/// gone is always the front of the stream, so that one range is enough.
#[derive(Debug, Default)]
pub struct Counted(Range<u64>);

impl Counted {
    /// Returns how many of the messages were not counted before.
    pub fn add(&mut self, messages: Range<u64>) -> u64 {
        if messages.is_empty() {
            return 0;
        }
        if self.0.is_empty() {
            self.0 = messages.clone();
            return messages.end - messages.start;
        }
        let below = messages.end.min(self.0.start).saturating_sub(messages.start);
        let above = messages.end.saturating_sub(messages.start.max(self.0.end));
        self.0 = self.0.start.min(messages.start)..self.0.end.max(messages.end);
        below + above
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_that_are_gone_are_counted_once_in_whatever_parts_they_are_told() {
        let mut counted = Counted::default();
        assert_eq!(counted.add(7..7), 0);
        assert_eq!(counted.add(100..150), 50);
        assert_eq!(counted.add(100..200), 50, "the front of the stream moves on");
        assert_eq!(counted.add(120..200), 0, "another sink lacks some of them");
        assert_eq!(counted.add(80..200), 20, "a third one lacks more");
        assert_eq!(counted.add(500..600), 100, "much later");
        assert_eq!(counted.add(80..600), 0);
    }
}
