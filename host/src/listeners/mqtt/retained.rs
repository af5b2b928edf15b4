//! The last retained message of each topic, in memory and bounded.
//! (That they survive a restart is the broker issue's: a checkpoint derived
//! from the log.)

use std::collections::HashMap;
use std::sync::Arc;

use super::outbound::Message;
use crate::batch::Offset;
use crate::topic::TopicFilter;

/// A retained message and where it lies: a subscriber gets it from here only
/// if the live delivery has passed it, so that it comes once, and never before
/// it is durable.
#[derive(Clone)]
pub struct Kept {
    pub message: Arc<Message>,
    pub stream: usize,
    pub offset: Offset,
}

#[derive(Default)]
pub struct Retained {
    topics: HashMap<Box<str>, Kept>,
    bytes: usize,
    messages_max: usize,
    bytes_max: usize,
}

impl Retained {
    pub fn new(messages_max: usize, bytes_max: usize) -> Self {
        Self { messages_max, bytes_max, ..Self::default() }
    }

    /// Keeps, replaces or, with an empty payload, removes. False when there was
    /// no room: the topic then has no retained message, rather than an old one.
    pub fn set(&mut self, kept: Kept) -> bool {
        let topic = kept.message.topic();
        if let Some(old) = self.topics.remove(topic) {
            self.bytes -= old.message.len();
        }
        if kept.message.payload().is_empty() {
            return true;
        }
        let bytes = self.bytes + kept.message.len();
        if self.topics.len() >= self.messages_max || bytes > self.bytes_max {
            return false;
        }
        self.bytes = bytes;
        self.topics.insert(topic.into(), kept);
        true
    }

    pub fn matching(&self, filter: &TopicFilter) -> Vec<Kept> {
        if !filter.as_str().contains(['+', '#']) {
            return self.topics.get(filter.as_str()).cloned().into_iter().collect();
        }
        let matches = self.topics.iter().filter(|(topic, _)| filter.matches(topic));
        matches.map(|(_, kept)| kept.clone()).collect()
    }
}
