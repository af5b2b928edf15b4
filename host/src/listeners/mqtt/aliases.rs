//! Topic aliases for messages to one client (MQTT 5.0, 3.3.2.3.4). The first topics that are sent on a
//! connection get one each.

use std::collections::HashMap;
use std::sync::Arc;

use crate::room::{Holding, Room};

/// Size of the alias property. An alias costs as much on its first use, and replaces the topic from then
/// on.
const PROPERTY_BYTES: usize = 3;
/// Approximate memory of an alias besides its topic.
const ALIAS_BYTES: usize = 48;

pub struct Aliases {
    max: u16,
    /// The aliases, boxed because most connections have none.
    known: Option<Box<Known>>,
    room: Option<Arc<Room>>,
}

#[derive(Default)]
struct Known {
    aliases: HashMap<Box<str>, u16>,
    bytes: usize,
    /// The aliases' part of the memory of all connections.
    memory: Holding,
}

/// The topic of a PUBLISH as it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name<'t> {
    /// Topic; empty if the alias replaces it.
    pub topic: &'t str,
    /// Alias; 0 if there is none.
    pub alias: u16,
}

impl<'t> Name<'t> {
    pub fn plain(topic: &'t str) -> Self {
        Self { topic, alias: 0 }
    }

    /// Returns whether this PUBLISH defines the alias.
    pub fn is_new(self) -> bool {
        self.alias > 0 && !self.topic.is_empty()
    }
}

impl Aliases {
    /// Creates at most `max` aliases, as the client allows; 0 disables them.
    pub fn new(max: u16) -> Self {
        Self { max, known: None, room: None }
    }

    /// Creates at most `max` aliases, as far as `room` has memory.
    pub fn within(max: u16, room: &Arc<Room>) -> Self {
        Self { room: Some(room.clone()), ..Self::new(max) }
    }

    pub fn name<'t>(&self, topic: &'t str) -> Name<'t> {
        if self.max == 0 || topic.len() <= PROPERTY_BYTES {
            return Name::plain(topic);
        }
        let Some(known) = &self.known else { return Name { topic, alias: 1 } };
        let count = known.aliases.len();
        match known.aliases.get(topic) {
            Some(alias) => Name { topic: "", alias: *alias },
            None if count < usize::from(self.max) && known.memory.has_room(known.bytes_with(topic)) => {
                Name { topic, alias: count as u16 + 1 }
            }
            None => Name::plain(topic),
        }
    }

    /// Records that a PUBLISH with this name was sent.
    pub fn sent(&mut self, name: Name<'_>) {
        if name.is_new() {
            let new = || Known {
                memory: self.room.as_ref().map(Holding::of).unwrap_or_default(),
                ..Known::default()
            };
            let known = self.known.get_or_insert_with(|| new().into());
            known.bytes = known.bytes_with(name.topic);
            known.memory.hold(known.bytes);
            known.aliases.insert(name.topic.into(), name.alias);
        }
    }
}

impl Known {
    fn bytes_with(&self, topic: &str) -> usize {
        self.bytes + ALIAS_BYTES + topic.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_topic_for_whose_alias_there_is_no_memory_is_written_out() {
        let room = Room::new(12 << 10);
        let topics = ["a", "b", "c"].map(|name| name.repeat(4 << 10));
        let mut aliases = Aliases::within(3, &room);
        for topic in &topics[..2] {
            let name = aliases.name(topic);
            assert!(name.is_new() && name.topic == topic);
            aliases.sent(name);
        }
        assert_eq!(aliases.name(&topics[2]), Name::plain(&topics[2]));
        assert_eq!(aliases.name("short"), Name { topic: "short", alias: 3 }, "within its part");
        assert_eq!(aliases.name(&topics[0]), Name { topic: "", alias: 1 });
        drop(aliases);
        assert_eq!(room.taken(), 0);
    }

    proptest! {
        #[test]
        fn a_client_that_remembers_aliases_knows_every_topic(
            max in 0u16..5,
            topics in prop::collection::vec(("[a-c]{0,6}", any::<bool>()), 0..60),
        ) {
            let mut aliases = Aliases::new(max);
            let mut client: HashMap<u16, String> = HashMap::new();
            for (topic, is_sent) in &topics {
                let name = aliases.name(topic);
                prop_assert!(name.alias <= max);
                // Too large for the client, perhaps: it learns nothing.
                if !is_sent {
                    continue;
                }
                aliases.sent(name);
                if name.is_new() {
                    prop_assert!(client.insert(name.alias, name.topic.to_owned()).is_none(), "one topic each");
                }
                let known = if name.topic.is_empty() { client.get(&name.alias) } else { None };
                prop_assert_eq!(known.map_or(name.topic, |topic| topic), topic);
            }
        }
    }
}
