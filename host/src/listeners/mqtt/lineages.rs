//! Which copy of each stream the broker's records speak of.
//!
//! Notes of sessions, records of QoS 2 packets and copies name a message by stream and offset.
//! A stream that lost its end, or whose folder is older than the broker's, goes on at offsets
//! that these records have used for other messages ([`Lineage`]). So the broker's stream has, for
//! each stream, the openings that the records speak of. A start compares them with the stream's:
//! what the records say of messages from where the two part on is left out, and written anew,
//! before the stream's own openings are noted. A crash in between compares again.

use std::sync::Arc;

use super::session::Change;
use crate::stream::{Identity, Lineage, Stream};

/// Begins a key of the broker stream's state; the name of a stream follows.
const OPENINGS: &[u8] = b"ol";

/// What a start found, until the records are true again.
pub struct Lineages {
    valid: Box<[u64]>,
    changes: Vec<Change>,
}

impl Lineages {
    /// Compares the records in the `broker`'s stream with what the streams are.
    pub fn read(broker: &dyn Stream, streams: &[Arc<dyn Stream>]) -> Self {
        let mut changes = Vec::new();
        let mut valid = |stream: &Arc<dyn Stream>| {
            let key = key(&stream.identity());
            let (openings, kept) = (stream.openings(), stream.bounds());
            let text = broker.state(&key).pop().and_then(|(_, value)| String::from_utf8(value).ok());
            // 0.1.0 wrote none: the records are believed up to the end of the stream, as if it cannot be read.
            let known = Lineage::read(text.as_deref()).unwrap_or_default();
            let now = Lineage::of_all(&openings).to_string();
            if text.as_deref() != Some(&*now) {
                changes.push((key, Some(now.into_bytes())));
            }
            known.common(&openings, kept.start).0.min(kept.end.0)
        };
        let valid = streams.iter().map(&mut valid).collect();
        Self { valid, changes }
    }

    /// Returns, by stream, up to which offset the records speak of messages that it has.
    pub fn valid(&self) -> &[u64] {
        &self.valid
    }

    /// Adds what is to be written with the openings.
    pub fn change(&mut self, change: Change) {
        self.changes.push(change);
    }

    /// Returns what makes the records those of the streams as they are, to be written once all
    /// else that they say is true.
    pub fn changes(&self) -> &[Change] {
        &self.changes
    }
}

fn key(identity: &Identity) -> Vec<u8> {
    [OPENINGS, identity.log.as_bytes(), &identity.generation.to_be_bytes()].concat()
}
