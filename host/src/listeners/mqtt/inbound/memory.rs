//! One connection's part of the memory of all connections: topic aliases that its client set, messages
//! for which streams had no room, and buffers.

use std::sync::Arc;

use rmqtt_codec::v5::DisconnectReasonCode;

use crate::listeners::mqtt::wire::Fault;
use crate::room::{Holding, Room};

/// Approximate memory of an alias besides its topic.
const ALIAS_BYTES: usize = 32;

pub struct Memory {
    /// The aliases, boxed because most connections have none.
    aliases: Option<Box<Aliases>>,
    stalled_bytes: usize,
    buffers_bytes: usize,
    holding: Holding,
}

#[derive(Default)]
struct Aliases {
    /// Topics by the number of their alias, from 1.
    topics: Vec<Option<Arc<str>>>,
    bytes: usize,
}

impl Memory {
    pub fn of(room: &Arc<Room>) -> Self {
        let holding = Holding::of(room);
        Self { aliases: None, stalled_bytes: 0, buffers_bytes: 0, holding }
    }

    /// Returns whether a buffer may grow by `bytes`. If not, it is filled in small pieces.
    pub fn has_room(&self, bytes: usize) -> bool {
        self.holding.has_room(self.bytes() + bytes)
    }

    /// Counts messages that wait for room in their streams. They are already in memory.
    pub fn set_stalled(&mut self, bytes: usize) {
        self.stalled_bytes = bytes;
        self.holding.hold(self.bytes());
    }

    /// Counts received and unsent bytes. They are already in memory.
    pub fn set_buffers(&mut self, bytes: usize) {
        self.buffers_bytes = bytes;
        self.holding.hold(self.bytes());
    }

    pub fn alias(&self, alias: u16) -> Option<&Arc<str>> {
        self.aliases.as_ref()?.topics.get(usize::from(alias).checked_sub(1)?)?.as_ref()
    }

    /// Sets an alias, which is not 0. Clients are told how many aliases they may set, but not how large
    /// these may be: an alias for which there is no room is a fault that ends the connection.
    pub fn set_alias(&mut self, alias: u16, topic: &str) -> Result<(), Fault> {
        let known = self.alias(alias);
        if known.is_some_and(|known| **known == *topic) {
            return Ok(());
        }
        let before = known.map_or(0, |known| ALIAS_BYTES + known.len());
        let aliases_bytes = self.aliases_bytes() - before + ALIAS_BYTES + topic.len();
        if !self.holding.try_hold(aliases_bytes + self.stalled_bytes + self.buffers_bytes) {
            return Err(Fault {
                code: DisconnectReasonCode::QuotaExceeded,
                what: "a topic alias for which mqtt.connections_bytes_max has no room",
            });
        }
        let aliases = self.aliases.get_or_insert_default();
        aliases.bytes = aliases_bytes;
        let index = usize::from(alias) - 1;
        if aliases.topics.len() <= index {
            aliases.topics.resize(index + 1, None);
        }
        aliases.topics[index] = Some(topic.into());
        Ok(())
    }

    fn aliases_bytes(&self) -> usize {
        self.aliases.as_ref().map_or(0, |aliases| aliases.bytes)
    }

    fn bytes(&self) -> usize {
        self.aliases_bytes() + self.stalled_bytes + self.buffers_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aliases_are_counted_by_their_topics_and_one_without_room_changes_nothing() {
        let room = Room::new(64 << 10);
        let (mut one, mut other) = (Memory::of(&room), Memory::of(&room));
        let long = "x".repeat(30 << 10);
        one.set_alias(2, &long).unwrap();
        one.set_alias(2, &long).unwrap();
        let taken = room.taken();
        assert!((30 << 10..33 << 10).contains(&taken), "once, however often it is set: {taken}");
        assert!(one.set_alias(1, &long).is_err());
        assert_eq!((one.alias(1), one.alias(2).map(|it| it.len())), (None, Some(30 << 10)));
        assert_eq!(room.taken(), taken);
        assert!(other.set_alias(1, &"y".repeat(7 << 10)).is_ok(), "its own part");
        one.set_alias(2, "short").unwrap();
        assert!(one.has_room(30 << 10));
        one.set_alias(1, &long).unwrap();
        drop((one, other));
        assert_eq!(room.taken(), 0);
    }
}
