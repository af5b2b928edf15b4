//! The small durable map beside the messages. Each segment begins with a
//! checkpoint of all of it, so that older segments can go.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::frame::{change_len, push_change};

/// First byte of keys that belong to the log itself: where attached readers are.
pub const OWN: u8 = 0;
/// First byte of the keys of the stream's users.
pub const USERS: u8 = 1;
/// All keys and values together: as many sessions as the broker takes by default, and what
/// they note. Past it nothing is added until something was removed.
pub const STATE_BYTES_MAX: usize = 128 << 20;
/// Of one checkpoint frame.
const CHECKPOINT_FRAME_BYTES: usize = 1 << 20;

pub type Blob = Arc<[u8]>;
/// A key, and its value or its removal.
pub type Change = (Blob, Option<Blob>);

/// `space`, then `key`.
pub fn key(space: u8, key: &[u8]) -> Blob {
    [&[space], key].concat().into()
}

#[derive(Clone, Default)]
pub struct State {
    map: BTreeMap<Blob, Blob>,
    bytes: usize,
}

impl State {
    pub fn apply(&mut self, (key, value): Change) {
        let before = match value {
            Some(value) => {
                self.bytes += key.len() + value.len();
                self.map.insert(Arc::clone(&key), value)
            }
            None => self.map.remove(&key),
        };
        if let Some(before) = before {
            self.bytes -= key.len() + before.len();
        }
    }

    /// Whether the changes add to it, and past its bound. Where a key is changed
    /// twice, both count.
    pub fn outgrows(&self, changes: &[Change]) -> bool {
        let (mut added, mut removed) = (0, 0);
        for (key, value) in changes {
            added += value.as_ref().map_or(0, |value| key.len() + value.len());
            removed += self.map.get(key).map_or(0, |before| key.len() + before.len());
        }
        added > removed && self.bytes + added - removed > STATE_BYTES_MAX
    }

    pub fn clear(&mut self) {
        *self = Self::default();
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Entries whose keys begin with `prefix`, in order.
    pub fn range<'a>(&'a self, prefix: &'a [u8]) -> impl Iterator<Item = (&'a Blob, &'a Blob)> {
        let from = self.map.range::<[u8], _>((std::ops::Bound::Included(prefix), std::ops::Bound::Unbounded));
        from.take_while(move |(key, _)| key.starts_with(prefix))
    }

    /// All of it as state sections, each of bounded size; at least one, which may be empty.
    pub fn checkpoint(&self) -> Vec<Vec<u8>> {
        let mut sections = vec![Vec::new()];
        for (key, value) in &self.map {
            let last = sections.last_mut().expect("never empty");
            if !last.is_empty() && last.len() + change_len(key, Some(value)) > CHECKPOINT_FRAME_BYTES {
                sections.push(Vec::new());
            }
            push_change(sections.last_mut().expect("never empty"), key, Some(value));
        }
        sections
    }
}
