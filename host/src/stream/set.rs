//! All streams of a host, and the mapping from topics to streams.

use std::sync::Arc;

use super::Stream;
use crate::topic::TopicFilter;

/// A stream and the filters of its topics.
type Routed = (Vec<TopicFilter>, Arc<dyn Stream>);

/// Maps every topic to exactly one stream: the first whose filter matches, otherwise the default.
#[derive(Clone)]
pub struct Streams {
    routed: Arc<[Routed]>,
    default: Arc<dyn Stream>,
}

impl Streams {
    pub fn new(routed: Vec<Routed>, default: Arc<dyn Stream>) -> Self {
        Self { routed: routed.into(), default }
    }

    pub fn route(&self, topic: &str) -> &Arc<dyn Stream> {
        self.routed
            .iter()
            .find(|(filters, _)| filters.iter().any(|filter| filter.matches(topic)))
            .map_or(&self.default, |(_, stream)| stream)
    }

    /// Returns the index of the topic's stream in [`Streams::iter`].
    pub fn number_of(&self, topic: &str) -> usize {
        let mut routed = self.routed.iter();
        let found = routed.position(|(filters, _)| filters.iter().any(|filter| filter.matches(topic)));
        found.unwrap_or(self.routed.len())
    }

    pub fn get(&self, name: &str) -> Option<&Arc<dyn Stream>> {
        self.iter().find(|stream| stream.name() == name)
    }

    /// Returns a set with the result of `kept` for each stream, without those for which it returns
    /// `None`. The default stream stays the same.
    pub fn filtered(&self, kept: impl Fn(&Arc<dyn Stream>) -> Option<Arc<dyn Stream>>) -> Self {
        let routed =
            self.routed.iter().filter_map(|(filters, stream)| Some((filters.clone(), kept(stream)?)));
        Self { routed: routed.collect(), default: Arc::clone(&self.default) }
    }

    /// Returns each stream once, the default last.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<dyn Stream>> {
        self.routed.iter().map(|(_, stream)| stream).chain([&self.default])
    }
}
