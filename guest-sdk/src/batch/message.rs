//! The reader of a batch.

use alloc::string::String;

use crate::abi::{self, entry, flags};
use crate::json;

/// What holds for all messages of a batch: `header` of interface `arena`.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    /// Words from one entry of the index to the next.
    pub stride: u32,
    pub partition: u32,
    pub flags: u32,
    /// 1 at the first try; more where a step asked to retry.
    pub attempt: u32,
    pub base_offset: u64,
    /// Microseconds since 1970.
    pub now_us: u64,
    /// Microseconds since 1970; the least value is none.
    pub watermark_us: i64,
}

/// A batch, as the host handed it over.
#[derive(Clone, Copy)]
pub struct Messages<'a> {
    header: Header,
    /// All entries and nothing else.
    entries: &'a [u8],
    stride_bytes: usize,
    count: usize,
    /// As many as four bits can name, so that no span needs a bounds check here.
    segments: [&'a [u8]; 16],
    namespace: &'a [String],
}

impl Header {
    /// Of a first try, without offset and watermark.
    pub const fn at(now_us: u64) -> Self {
        Self {
            stride: abi::STRIDE_WORDS as u32,
            partition: 0,
            flags: 0,
            attempt: 1,
            base_offset: 0,
            now_us,
            watermark_us: i64::MIN,
        }
    }
}

impl<'a> Messages<'a> {
    /// `index` and `segments` lie as in interface `arena`; `namespace` has the
    /// topic pattern's field names by level. None where the entries are shorter
    /// than those that this SDK reads, or not whole.
    pub fn new(
        header: Header,
        index: &'a [u8],
        segments: impl IntoIterator<Item = &'a [u8]>,
        namespace: &'a [String],
    ) -> Option<Self> {
        let stride_bytes = header.stride as usize * abi::WORD_BYTES;
        if stride_bytes < abi::STRIDE_BYTES || !index.len().is_multiple_of(stride_bytes) {
            return None;
        }
        let mut all: [&[u8]; 16] = [&[]; 16];
        for (slot, segment) in all.iter_mut().zip(segments) {
            *slot = segment;
        }
        let count = index.len() / stride_bytes;
        Some(Self { header, entries: index, stride_bytes, count, segments: all, namespace })
    }

    #[inline]
    pub fn len(&self) -> usize {
        self.count
    }

    #[inline]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    #[inline]
    pub fn iter(&self) -> impl Iterator<Item = Message<'_>> {
        self.stretches().flatten().zip(0..).map(|(entry, number)| self.message(entry, number))
    }

    #[inline(always)]
    pub(super) fn message<'m>(&'m self, entry: &'m [u8; abi::STRIDE_BYTES], number: u32) -> Message<'m> {
        Message { batch: self, entry, number }
    }

    /// Entries that follow one another without a gap: all at once as long as
    /// the host's are not longer than this SDK's, so that the loop over them
    /// has a fixed step.
    #[inline(always)]
    pub(super) fn stretches(&self) -> impl Iterator<Item = &'a [[u8; abi::STRIDE_BYTES]]> + use<'a> {
        let (step, at_once) = match self.stride_bytes {
            abi::STRIDE_BYTES => (self.entries.len().max(1), self.count),
            longer => (longer, 1),
        };
        self.entries.chunks(step).map(move |part| &part.as_chunks().0[..at_once])
    }

    /// Message `number` of the batch, from 0.
    pub fn get(&self, number: usize) -> Option<Message<'_>> {
        let entry = self.entries.get(number.checked_mul(self.stride_bytes)?..)?.first_chunk()?;
        Some(Message { batch: self, entry, number: number as u32 })
    }

    pub fn partition(&self) -> u32 {
        self.header.partition
    }

    /// The batch's append time, microseconds since 1970: the same again on replay.
    #[inline]
    pub fn now_us(&self) -> u64 {
        self.header.now_us
    }

    /// 1 at the first try; more where a step asked to retry.
    pub fn attempt(&self) -> u32 {
        self.header.attempt
    }

    /// Bytes of all segments together.
    pub fn bytes_len(&self) -> usize {
        self.segments.iter().map(|segment| segment.len()).sum()
    }
}

/// One message, borrowed from its batch.
#[derive(Clone, Copy)]
pub struct Message<'a> {
    batch: &'a Messages<'a>,
    entry: &'a [u8; abi::STRIDE_BYTES],
    number: u32,
}

impl<'a> Message<'a> {
    #[inline]
    pub fn payload(&self) -> &'a [u8] {
        self.bytes(entry::PAYLOAD)
    }

    /// The payload if it is UTF-8.
    pub fn text(&self) -> Option<&'a str> {
        core::str::from_utf8(self.payload()).ok()
    }

    /// A field of a payload that is a JSON object. Checks the whole payload;
    /// for several fields ask [`json::get_many`] once.
    #[inline]
    pub fn json(&self, key: &str) -> Result<Option<json::Raw<'a>>, json::Error> {
        json::get(self.payload(), key)
    }

    #[inline]
    pub fn topic(&self) -> &'a str {
        self.str(entry::TOPIC)
    }

    /// The same without the check for UTF-8.
    #[inline]
    pub fn topic_bytes(&self) -> &'a [u8] {
        self.bytes(entry::TOPIC)
    }

    /// The device that sent it: from the topic where that fits the namespace,
    /// else the client id.
    #[inline]
    pub fn device(&self) -> &'a str {
        self.str(entry::DEVICE)
    }

    #[inline]
    pub fn device_bytes(&self) -> &'a [u8] {
        self.bytes(entry::DEVICE)
    }

    /// Empty: the default route.
    #[inline]
    pub fn route(&self) -> &'a str {
        self.str(entry::ROUTE)
    }

    /// A level of the topic by its name in the namespace pattern
    /// (`message.field("site")`); none where the topic does not fit.
    pub fn field(&self, name: &str) -> Option<&'a str> {
        if !self.fits_namespace() {
            return None;
        }
        let level = self.batch.namespace.iter().position(|field| field == name)?;
        self.topic().split('/').nth(level)
    }

    #[inline]
    pub fn fits_namespace(&self) -> bool {
        self.flags() & flags::FITS_NAMESPACE != 0
    }

    /// Position in its stream.
    #[inline]
    pub fn offset(&self) -> u64 {
        self.batch.header.base_offset + u64::from(word(self.entry, entry::OFFSET))
    }

    /// Microseconds since 1970, UTC.
    #[inline]
    pub fn received_us(&self) -> u64 {
        word64(self.entry, entry::RECEIVED_US)
    }

    /// Set by an earlier step; microseconds since 1970, UTC.
    #[inline]
    pub fn event_us(&self) -> Option<i64> {
        let set = self.flags() & flags::EVENT_TIME != 0;
        set.then(|| word64(self.entry, entry::EVENT_US) as i64)
    }

    #[inline]
    pub fn flags(&self) -> u32 {
        word(self.entry, entry::FLAGS) & 0xffff
    }

    pub fn qos(&self) -> u8 {
        (self.flags() & flags::QOS_MASK) as u8
    }

    pub fn retain(&self) -> bool {
        self.flags() & flags::RETAIN != 0
    }

    /// In the order they came, duplicates kept.
    pub fn properties(&self) -> impl Iterator<Item = Property<'a>> + use<'a> {
        let mut rest = self.bytes(entry::PROPERTIES);
        core::iter::from_fn(move || {
            let (head, after) = rest.split_first_chunk::<8>()?;
            let name_len = usize::from(u16::from_le_bytes([head[2], head[3]]));
            let value_len = word(head, 1) as usize;
            let (name, after) = after.split_at_checked(name_len)?;
            let (value, after) = after.split_at_checked(value_len)?;
            rest = after;
            Some(Property { origin: head[0], name: core::str::from_utf8(name).ok()?, value })
        })
    }

    /// The first property of that name that the device sent (an MQTT 5 user property).
    pub fn property(&self, name: &str) -> Option<&'a [u8]> {
        self.properties().find(|p| p.origin == abi::origin::DEVICE && p.name == name).map(|p| p.value)
    }

    /// Number of the message in its batch, from 0.
    #[inline]
    pub fn number(&self) -> usize {
        self.number as usize
    }

    /// `now_us` of its batch: the clock of a plugin, the same again on replay.
    #[inline]
    pub fn now_us(&self) -> u64 {
        self.batch.now_us()
    }

    /// The two words of a span of the entry.
    #[inline(always)]
    pub(super) fn span(&self, at: usize) -> (u32, u32) {
        (word(self.entry, at), word(self.entry, at + 1))
    }

    /// The host promises that spans lie in their segments.
    #[inline(always)]
    fn bytes(&self, at: usize) -> &'a [u8] {
        let (begin, rest) = self.span(at);
        let len = (rest & 0x0fff_ffff) as usize;
        let begin = begin as usize;
        self.batch.segments[(rest >> 28) as usize].get(begin..begin + len).unwrap_or_default()
    }

    #[inline]
    fn str(&self, at: usize) -> &'a str {
        core::str::from_utf8(self.bytes(at)).unwrap_or_default()
    }
}

/// A property of a message: see `wit/plugin.wit`, record `property`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Property<'a> {
    /// See [`abi::origin`].
    pub origin: u8,
    pub name: &'a str,
    pub value: &'a [u8],
}

#[inline(always)]
fn word(bytes: &[u8], at: usize) -> u32 {
    // Not byte by byte: that stays four loads in wasm.
    u32::from_le_bytes(bytes.as_chunks().0[at])
}

/// Low word first.
#[inline(always)]
fn word64(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) | u64::from(word(bytes, at + 1)) << 32
}
