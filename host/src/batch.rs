//! A batch: shared bytes and an index of fixed size per message.
//!
//! The bytes of a batch are segments that nobody changes: the first is the
//! body of a log frame as it was read, each later one what a step added. An
//! unchanged message keeps its bytes through a whole chain of steps; only its
//! [`Entry`] moves. Entries have the layout of the plugin contract's input
//! index (`wit/plugin.wit`, interface `arena`): a plugin gets them as they are.

use std::ops::Deref;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use zerocopy::{Immutable, IntoBytes};

/// Position of a message in a stream: counts from 0, never reused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Offset(pub u64);

/// Part of a stream whose messages stay in order.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, IntoBytes, Immutable)]
pub struct Partition(pub u16);

/// Flags of a message, as in the plugin contract.
pub mod flags {
    pub const QOS_MASK: u16 = 0b11;
    pub const RETAIN: u16 = 1 << 2;
    pub const DUP: u16 = 1 << 3;
    pub const EVENT_TIME: u16 = 1 << 4;
    pub const UTF8: u16 = 1 << 5;
    pub const FITS_NAMESPACE: u16 = 1 << 6;
    pub const CHANGED: u16 = 1 << 7;
}

/// The contract's bound for one byte string, MQTT's largest packet.
pub const SPAN_BYTES_MAX: usize = 268_435_455;
/// Segments 0..=14; 15 means "the answer's own data" in the plugin contract.
pub const SEGMENTS_MAX: usize = 15;

/// Where some bytes lie: `begin` within a segment, then segment (4 bits) and length (28 bits).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, IntoBytes, Immutable)]
pub struct Span {
    pub begin: u32,
    pub segment_and_len: u32,
}

impl Span {
    pub const EMPTY: Span = Span { begin: 0, segment_and_len: 0 };

    /// `segment` at most 15, `len` at most [`SPAN_BYTES_MAX`].
    ///
    /// # Panics
    ///
    /// Panics where a part does not fit: a span cut short would name other bytes.
    #[inline]
    pub fn new(segment: usize, begin: usize, len: usize) -> Self {
        assert!(segment <= SEGMENTS_MAX && len <= SPAN_BYTES_MAX && begin <= u32::MAX as usize);
        Self { begin: begin as u32, segment_and_len: (segment as u32) << 28 | len as u32 }
    }

    #[inline]
    pub fn segment(self) -> usize {
        (self.segment_and_len >> 28) as usize
    }

    #[inline]
    pub fn len(self) -> usize {
        (self.segment_and_len & 0x0fff_ffff) as usize
    }

    #[inline]
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    #[inline]
    pub fn range(self) -> std::ops::Range<usize> {
        self.begin as usize..self.begin as usize + self.len()
    }
}

/// One message of a batch: 64 bytes, a cache line.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, IntoBytes, Immutable)]
pub struct Entry {
    /// See [`flags`].
    pub flags: u16,
    pub partition: Partition,
    /// Offset minus the batch's base offset.
    pub offset: u32,
    /// When the listener received it, microseconds since 1970, UTC.
    pub received_us: u64,
    /// Microseconds since 1970, UTC; meaningful where [`flags::EVENT_TIME`] is set.
    pub event_us: i64,
    pub topic: Span,
    pub payload: Span,
    /// Encoded as in the plugin contract: see [`crate::properties`].
    pub properties: Span,
    /// Empty: the default route.
    pub route: Span,
    pub device: Span,
}

/// The index of a batch: shared until somebody changes it, so that a batch can
/// be kept while a step works on it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entries(Arc<Vec<Entry>>);

impl Entries {
    /// For changing them; copies them first where they are shared.
    pub fn to_mut(&mut self) -> &mut Vec<Entry> {
        Arc::make_mut(&mut self.0)
    }
}

impl Deref for Entries {
    type Target = [Entry];

    fn deref(&self) -> &[Entry] {
        &self.0
    }
}

impl From<Vec<Entry>> for Entries {
    fn from(entries: Vec<Entry>) -> Self {
        Self(Arc::new(entries))
    }
}

impl FromIterator<Entry> for Entries {
    fn from_iter<I: IntoIterator<Item = Entry>>(entries: I) -> Self {
        Vec::from_iter(entries).into()
    }
}

impl<'e> IntoIterator for &'e Entries {
    type Item = &'e Entry;
    type IntoIter = std::slice::Iter<'e, Entry>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// Messages of one stream in offset order. Several entries may have the same
/// offset: a step made more than one message of one.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    pub base: Offset,
    /// Append time of the frame that the batch comes from, microseconds since
    /// 1970, UTC: the same again on replay. A batch never spans two frames.
    pub now_us: u64,
    /// Bytes that the entries' spans point into, at most [`SEGMENTS_MAX`].
    pub segments: Vec<Bytes>,
    pub entries: Entries,
    /// The segments hold the bytes of these messages and nothing else, so that a
    /// step may be given the segments whole. False once a message was taken out or
    /// changed: a later step must not see what was there.
    pub exclusive: bool,
}

impl Batch {
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub fn offset(&self, entry: &Entry) -> Offset {
        Offset(self.base.0 + u64::from(entry.offset))
    }

    #[inline]
    pub fn bytes(&self, span: Span) -> &[u8] {
        if span.is_empty() { &[] } else { &self.segments[span.segment()][span.range()] }
    }

    /// Topic, route and device are UTF-8 by the checks at the listener, at the
    /// log's recovery and at every plugin's answer.
    #[inline]
    pub fn text(&self, span: Span) -> &str {
        std::str::from_utf8(self.bytes(span)).unwrap_or_default()
    }

    /// A view of message `i`.
    pub fn message(&self, i: usize) -> MessageRef<'_> {
        MessageRef { batch: self, entry: &self.entries[i] }
    }

    pub fn messages(&self) -> impl Iterator<Item = MessageRef<'_>> {
        self.entries.iter().map(|entry| MessageRef { batch: self, entry })
    }

    /// Index of entry `i` among the entries of its offset.
    pub fn index_within_offset(&self, i: usize) -> u32 {
        let offset = self.entries[i].offset;
        self.entries[..i].iter().rev().take_while(|entry| entry.offset == offset).count() as u32
    }

    /// The same bytes, with the entries that `keep` holds.
    pub fn filtered(&self, mut keep: impl FnMut(&Entry) -> bool) -> Batch {
        let entries: Entries = self.entries.iter().filter(|entry| keep(entry)).copied().collect();
        Batch {
            base: self.base,
            now_us: self.now_us,
            segments: self.segments.clone(),
            exclusive: self.exclusive && entries.len() == self.len(),
            entries,
        }
    }
}

/// One message of a batch, borrowed.
#[derive(Clone, Copy, Debug)]
pub struct MessageRef<'b> {
    pub batch: &'b Batch,
    pub entry: &'b Entry,
}

impl<'b> MessageRef<'b> {
    pub fn offset(&self) -> Offset {
        self.batch.offset(self.entry)
    }
    pub fn topic(&self) -> &'b str {
        self.batch.text(self.entry.topic)
    }
    pub fn payload(&self) -> &'b [u8] {
        self.batch.bytes(self.entry.payload)
    }
    pub fn properties(&self) -> &'b [u8] {
        self.batch.bytes(self.entry.properties)
    }
    pub fn route(&self) -> &'b str {
        self.batch.text(self.entry.route)
    }
    pub fn device(&self) -> &'b str {
        self.batch.text(self.entry.device)
    }
    pub fn event_us(&self) -> Option<i64> {
        (self.entry.flags & flags::EVENT_TIME != 0).then_some(self.entry.event_us)
    }
}

const _: () = assert!(std::mem::size_of::<Entry>() == 64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_keeps_segment_begin_and_length() {
        let span = Span::new(15, 7, SPAN_BYTES_MAX);
        assert_eq!((span.segment(), span.range().start, span.len()), (15, 7, SPAN_BYTES_MAX));
    }

    #[test]
    fn an_entry_lies_as_the_plugin_contract_says() {
        assert_eq!(std::mem::offset_of!(Entry, offset), 4);
        assert_eq!(std::mem::offset_of!(Entry, received_us), 8);
        assert_eq!(std::mem::offset_of!(Entry, event_us), 16);
        assert_eq!(std::mem::offset_of!(Entry, topic), 24);
        assert_eq!(std::mem::offset_of!(Entry, payload), 32);
        assert_eq!(std::mem::offset_of!(Entry, properties), 40);
        assert_eq!(std::mem::offset_of!(Entry, route), 48);
        assert_eq!(std::mem::offset_of!(Entry, device), 56);
    }
}
