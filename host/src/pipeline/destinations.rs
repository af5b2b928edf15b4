//! Which sinks get the messages that steps made of a dead letter's message.
//!
//! A redrive runs the steps for one sink after another, and they may change in between: one of the
//! sinks is away, or its database is restored from a backup and gets the letter once more. So the first
//! run decides for all sinks. Its decision is in the letter's mark before a position covers the letter,
//! and in the record of what was sent ([`marks`](super::marks)). Nothing is decided by a run in which
//! some of the messages were rejected, or while the letter waits for a sink that the pipeline does not have.

use std::collections::BTreeSet;

/// Sinks by their ids, for each message that the steps made, in order. One entry stands for any number
/// of messages: all of them go to the same sinks.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Destinations(Vec<BTreeSet<String>>);

/// Begins the text: no id of a sink does.
const BEGIN: char = '=';
/// A longer decision is not noted.
const TEXT_BYTES_MAX: usize = 4_096;

impl Destinations {
    /// Returns the decision for messages that go to these sinks; `None` where it is too long.
    pub fn of(messages: impl Iterator<Item = BTreeSet<String>>) -> Option<Self> {
        let mut messages: Vec<_> = messages.collect();
        if messages.windows(2).all(|two| two[0] == two[1]) {
            messages.truncate(1);
        }
        if messages.is_empty() {
            messages.push(BTreeSet::new());
        }
        let decision = Self(messages);
        (decision.text().len() <= TEXT_BYTES_MAX).then_some(decision)
    }

    /// Returns whether a sink gets any of the messages.
    pub fn has(&self, sink: &str) -> bool {
        self.0.iter().any(|sinks| sinks.contains(sink))
    }

    /// Returns whether all messages go to the same sinks.
    pub fn is_uniform(&self) -> bool {
        self.0.len() == 1
    }

    /// Returns for each of `count` messages whether a sink gets it, or the number of messages that the
    /// decision is for, where that is another one.
    pub fn taken_by(&self, sink: &str, count: usize) -> Result<Vec<bool>, usize> {
        match &self.0[..] {
            [all] => Ok(vec![all.contains(sink); count]),
            each if each.len() == count => Ok(each.iter().map(|sinks| sinks.contains(sink)).collect()),
            each => Err(each.len()),
        }
    }

    /// Returns the decision with other ids of the sinks.
    pub fn renamed(&self, id: impl Fn(&String) -> String) -> Self {
        Self(self.0.iter().map(|sinks| sinks.iter().map(&id).collect()).collect())
    }

    /// `=a;a,b`: the sinks of the first message, and of the second one.
    pub fn text(&self) -> String {
        let sinks = |sinks: &BTreeSet<String>| sinks.iter().map(String::as_str).collect::<Vec<_>>().join(",");
        format!("{BEGIN}{}", self.0.iter().map(sinks).collect::<Vec<_>>().join(";"))
    }

    /// Reads what [`Self::text`] wrote; `None`: it is none.
    pub fn read(text: &str) -> Option<Self> {
        let sinks = |sinks: &str| sinks.split(',').filter(|id| !id.is_empty()).map(str::to_owned).collect();
        Some(Self(text.strip_prefix(BEGIN)?.split(';').map(sinks).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decided(messages: &[&str]) -> Option<Destinations> {
        let sinks = |sinks: &&str| sinks.split(' ').filter(|id| !id.is_empty()).map(str::to_owned).collect();
        Destinations::of(messages.iter().map(sinks))
    }

    #[test]
    fn a_decision_reads_as_it_was_written_and_says_which_messages_a_sink_gets() {
        for (messages, text, of_two) in [
            (&["a"][..], "=a", Ok(vec![true, true])),
            (&["a b", "a b", "a b"], "=a,b", Ok(vec![true, true])),
            (&[], "=", Ok(vec![false, false])),
            (&["", "b a"], "=;a,b", Ok(vec![false, true])),
            (&["a", "b", "a"], "=a;b;a", Err(3)),
        ] {
            let decided = decided(messages).unwrap();
            assert_eq!(decided.text(), text);
            assert_eq!(Destinations::read(text).as_ref(), Some(&decided));
            assert_eq!(decided.taken_by("a", 2), of_two);
            assert_eq!(decided.has("a"), messages.iter().any(|sinks| sinks.contains('a')));
        }
        assert_eq!(Destinations::read(""), None);
        assert_eq!(decided(&["warehouse", "alerts"].repeat(400)), None, "too long");
    }
}
