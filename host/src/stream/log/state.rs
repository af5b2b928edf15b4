//! The small durable map beside the messages. Each segment begins with a checkpoint of the whole map, so
//! that older segments can be removed.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::clock::Timeline;
use super::frame::{self, change_len, push_change};
use crate::stream::{STATE_KEY_BYTES_MAX, STATE_VALUE_BYTES_MAX};

/// First byte of keys of the log itself, such as the positions of readers.
pub const OWN: u8 = 0;
/// First byte of keys of the stream's users.
pub const USERS: u8 = 1;
/// First byte of the key of the [`Timeline`]. Version 0.1.0 ignores it.
pub const CLOCK: u8 = 2;
/// Most bytes of all keys and values: enough for the default number of sessions and their notes. At this
/// size nothing is added until something is removed.
pub const STATE_BYTES_MAX: usize = 128 << 20;
/// Most bytes of one checkpoint frame.
const CHECKPOINT_FRAME_BYTES: usize = 1 << 20;

pub type Blob = Arc<[u8]>;
/// A key with its new value, or its removal.
pub type Change = (Blob, Option<Blob>);

/// Returns `space` followed by `key`.
pub fn key(space: u8, key: &[u8]) -> Blob {
    [&[space], key].concat().into()
}

/// Returns the change that stores the timeline.
pub fn of_clock(timeline: &Timeline) -> Change {
    (key(CLOCK, &[]), Some(timeline.encode().into()))
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

    /// Returns whether the changes add to the map beyond its bound. If a key is changed twice, both
    /// changes count.
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

    /// Returns the entries whose keys begin with `prefix`, in order.
    pub fn range<'a>(&'a self, prefix: &'a [u8]) -> impl Iterator<Item = (&'a Blob, &'a Blob)> {
        let from = self.map.range::<[u8], _>((std::ops::Bound::Included(prefix), std::ops::Bound::Unbounded));
        from.take_while(move |(key, _)| key.starts_with(prefix))
    }

    /// Yields the map as state sections of bounded size, one for each frame of a checkpoint. There is at
    /// least one, which may be empty. Holds one section at a time.
    pub fn sections(&self) -> impl Iterator<Item = Vec<u8>> {
        let mut entries = self.map.iter().peekable();
        let mut is_first = true;
        std::iter::from_fn(move || {
            let mut section = Vec::new();
            while let Some((key, value)) = entries.next_if(|(key, value)| {
                section.is_empty() || section.len() + change_len(key, Some(value)) <= CHECKPOINT_FRAME_BYTES
            }) {
                push_change(&mut section, key, Some(value));
            }
            (std::mem::take(&mut is_first) || !section.is_empty()).then_some(section)
        })
    }

    /// Returns an upper bound of the length of a checkpoint's frames, which is slightly more than they
    /// take.
    pub fn checkpoint_bytes(&self) -> u64 {
        let sections = self.bytes + self.map.len() * change_len(&[], None);
        let fullest = CHECKPOINT_FRAME_BYTES - (STATE_KEY_BYTES_MAX + STATE_VALUE_BYTES_MAX + 64);
        let frames = sections / fullest + 1;
        (sections + frames * (frame::frame_len(0, 0, 1) + frame::ALIGN)) as u64
    }
}
