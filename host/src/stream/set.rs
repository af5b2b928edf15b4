//! All streams of a host, and which one a topic belongs to.

use std::sync::Arc;

use super::Stream;
use crate::topic::TopicFilter;

/// Every topic belongs to exactly one stream: the first whose filter matches,
/// else the default.
#[derive(Clone)]
pub struct Streams {
    routed: Arc<[(Vec<TopicFilter>, Arc<dyn Stream>)]>,
    default: Arc<dyn Stream>,
}

impl Streams {
    pub fn new(routed: Vec<(Vec<TopicFilter>, Arc<dyn Stream>)>, default: Arc<dyn Stream>) -> Self {
        Self { routed: routed.into(), default }
    }

    pub fn route(&self, topic: &str) -> &Arc<dyn Stream> {
        self.routed
            .iter()
            .find(|(filters, _)| filters.iter().any(|filter| filter.matches(topic)))
            .map_or(&self.default, |(_, stream)| stream)
    }

    pub fn get(&self, name: &str) -> Option<&Arc<dyn Stream>> {
        self.iter().find(|stream| stream.name() == name)
    }

    /// Each once, the default last.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<dyn Stream>> {
        self.routed.iter().map(|(_, stream)| stream).chain([&self.default])
    }
}
