//! What a plugin answers (`wit/plugin.wit`, interface `arena`), read without
//! trust: no byte leaves here that was not checked.

use super::arena::{DATA_SEGMENT, LAYOUT, OUTPUT_HEADER_WORDS, STRIDE_WORDS, set, verdict};
use super::bindings::batch::headworks::plugin::arena::Answer as Raw;
use crate::batch::{Batch, Entry, Span, flags};
use crate::properties;
use crate::topic::{self, DEVICE_ID_BYTES_MAX};

/// Header and stride may grow, not without end.
const GROWTH_WORDS_MAX: usize = 256;
pub(super) const ROUTE_BYTES_MAX: usize = 64;
const REASON_BYTES_MAX: usize = 4 << 10;
/// A payload that a plugin made, unless its source's is larger still: whatever
/// the chain of steps, a letter of it fits into one append.
pub const MADE_PAYLOAD_BYTES_MAX: usize = 8 << 20;

/// Why an answer was not used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("{0} verdicts for {1} messages")]
    VerdictCount(usize, usize),
    #[error("message {0}: verdict {1}, must be 0 to 4")]
    Verdict(usize, u8),
    #[error("outputs: {0}")]
    Outputs(&'static str),
    #[error("output {record}: {what}")]
    Record { record: usize, what: &'static str },
    #[error("data: {0} bytes, at most {1} allowed (limits.output_bytes_factor)")]
    Data(usize, u64),
    #[error("more than {0} bytes out (limits.output_bytes_factor)")]
    Bytes(u64),
    #[error("message {0}: more than {1} messages out (limits.outputs_per_message_max)")]
    Messages(usize, u32),
    #[error("message {0}: its verdict needs an output record, there is none")]
    Missing(usize),
}

/// Why a record was not used.
pub(super) type Wrong = &'static str;

/// An answer whose lengths fit together; its records are not checked yet.
pub(super) struct Answer<'a> {
    /// The batch as the plugin saw it.
    pub input: &'a Batch,
    /// One per message, or none: all are kept.
    pub verdicts: &'a [u8],
    records: &'a [u8],
    /// Bytes from one record to the next, at least those of [`STRIDE_WORDS`].
    stride: usize,
    data: &'a [u8],
}

impl<'a> Answer<'a> {
    /// `data_max`: most bytes of new data.
    pub fn new(input: &'a Batch, raw: &'a Raw, data_max: u64) -> Result<Self, Fault> {
        let verdicts = &raw.verdicts[..];
        if !verdicts.is_empty() && verdicts.len() != input.len() {
            return Err(Fault::VerdictCount(verdicts.len(), input.len()));
        }
        if raw.data.len() as u64 > data_max {
            return Err(Fault::Data(raw.data.len(), data_max));
        }
        let (records, stride) = records(&raw.outputs).map_err(Fault::Outputs)?;
        Ok(Self { input, verdicts, records, stride, data: &raw.data })
    }

    /// Whether every message is kept: nothing else to check or do.
    pub fn keeps_all(&self) -> bool {
        self.records.is_empty() && self.verdicts.iter().all(|v| *v == verdict::KEEP)
    }

    #[inline]
    pub fn record(&self, number: usize) -> Option<Record<'a>> {
        self.records.get(number * self.stride..)?.first_chunk().map(Record)
    }

    /// Why `record` is not what was to come next: a record of `message`, or
    /// none where every message had its turn.
    #[cold]
    pub fn misplaced(&self, record: usize, message: usize) -> Fault {
        let Some(source) = self.record(record).map(Record::source) else { return Fault::Missing(message) };
        let of_source = self.verdicts.get(source).copied();
        let again = record.checked_sub(1).and_then(|last| self.record(last));
        let what = match of_source {
            None => "its source must be the number of a message that has a verdict",
            Some(_) if source > message => return Fault::Missing(message),
            Some(verdict::KEEP | verdict::DROP) => "its message is kept or dropped",
            Some(verdict::FAIL | verdict::RETRY) if again.is_some_and(|last| last.source() == source) => {
                "fail and retry have exactly one record"
            }
            Some(_) => "its source must not descend",
        };
        Fault::Record { record, what }
    }

    pub fn reason(&self, record: Record<'_>) -> Result<&'a str, Wrong> {
        if !record.has(set::PAYLOAD) {
            return Err("fail and retry need a reason as payload");
        }
        let bytes = self.bytes(record.payload()).ok_or("its reason lies outside of its segment")?;
        if bytes.len() > REASON_BYTES_MAX {
            return Err("its reason has more than 4 KiB");
        }
        std::str::from_utf8(bytes).map_err(|_| "its reason is not UTF-8")
    }

    pub fn topic(&self, record: Record<'_>) -> Result<&'a str, Wrong> {
        let bytes = self.bytes(record.topic()).ok_or("its topic lies outside of its segment")?;
        let name = std::str::from_utf8(bytes).ok().filter(|name| topic::is_valid_name(name));
        name.ok_or("its topic must be 1 to 65,535 bytes of UTF-8 without NUL, + and #")
    }

    #[inline]
    pub fn payload(&self, record: Record<'_>, source: &Entry) -> Result<&'a [u8], Wrong> {
        let bytes = self.bytes(record.payload()).ok_or("its payload lies outside of its segment")?;
        if bytes.len() > source.payload.len().max(MADE_PAYLOAD_BYTES_MAX) {
            return Err("its payload is larger than its source's and than 8 MiB");
        }
        Ok(bytes)
    }

    pub fn properties(&self, record: Record<'_>) -> Result<&'a [u8], Wrong> {
        let bytes = self.bytes(record.properties()).ok_or("its properties lie outside of their segment")?;
        if !properties::is_valid(bytes) {
            return Err("its properties are not well formed");
        }
        Ok(bytes)
    }

    pub fn route(&self, record: Record<'_>) -> Result<&'a [u8], Wrong> {
        let bytes = self.bytes(record.route()).ok_or("its route lies outside of its segment")?;
        if bytes.len() > ROUTE_BYTES_MAX || std::str::from_utf8(bytes).is_err() {
            return Err("its route must be at most 64 bytes of UTF-8");
        }
        Ok(bytes)
    }

    pub fn device(&self, record: Record<'_>) -> Result<&'a [u8], Wrong> {
        let bytes = self.bytes(record.device()).ok_or("its device id lies outside of its segment")?;
        if bytes.len() > DEVICE_ID_BYTES_MAX || std::str::from_utf8(bytes).is_err() {
            return Err("its device id must be at most 256 bytes of UTF-8");
        }
        Ok(bytes)
    }

    #[inline]
    fn bytes(&self, span: Span) -> Option<&'a [u8]> {
        match span.segment() {
            DATA_SEGMENT => self.data.get(span.range()),
            number => self.input.segments.get(number)?.get(span.range()),
        }
    }
}

/// The records of `outputs` and their stride in bytes.
fn records(outputs: &[u8]) -> Result<(&[u8], usize), Wrong> {
    if outputs.is_empty() {
        return Ok((outputs, STRIDE_WORDS * 4));
    }
    let (words, _) = outputs.as_chunks::<4>();
    let Some(words) = words.first_chunk::<OUTPUT_HEADER_WORDS>() else {
        return Err("shorter than their header of 8 words");
    };
    let [layout, header, stride, count, ..] = words.map(|word| u32::from_le_bytes(word) as usize);
    if layout != LAYOUT as usize {
        return Err("layout must be 1");
    }
    if !(OUTPUT_HEADER_WORDS..=GROWTH_WORDS_MAX).contains(&header) {
        return Err("header-words must be 8 or a little more");
    }
    if !(STRIDE_WORDS..=GROWTH_WORDS_MAX).contains(&stride) {
        return Err("stride must be 16 or a little more");
    }
    if (header as u64 + stride as u64 * count as u64) * 4 != outputs.len() as u64 {
        return Err("their length is not that of header-words + stride x count");
    }
    Ok((&outputs[header * 4..], stride * 4))
}

/// One output record.
#[derive(Clone, Copy)]
pub(super) struct Record<'a>(&'a [u8; STRIDE_WORDS * 4]);

impl Record<'_> {
    /// Number of the message it was made of.
    #[inline]
    pub fn source(self) -> usize {
        self.word(0) as usize
    }

    /// Whether any of these bits of [`set`] is set.
    #[inline]
    pub fn has(self, bit: u32) -> bool {
        self.word(1) & bit != 0
    }

    pub fn topic(self) -> Span {
        self.span(2)
    }

    #[inline]
    pub fn payload(self) -> Span {
        self.span(4)
    }

    pub fn properties(self) -> Span {
        self.span(6)
    }

    pub fn route(self) -> Span {
        self.span(8)
    }

    pub fn event_us(self) -> i64 {
        (u64::from(self.word(10)) | u64::from(self.word(11)) << 32) as i64
    }

    pub fn device(self) -> Span {
        self.span(12)
    }

    pub fn flags(self) -> Result<u16, Wrong> {
        let flags = self.word(14) as u16;
        if flags & flags::QOS_MASK == 3 { Err("its QoS must be 0 to 2") } else { Ok(flags) }
    }

    #[inline]
    fn word(self, number: usize) -> u32 {
        let at = number * 4;
        u32::from_le_bytes([self.0[at], self.0[at + 1], self.0[at + 2], self.0[at + 3]])
    }

    #[inline]
    fn span(self, number: usize) -> Span {
        Span { begin: self.word(number), segment_and_len: self.word(number + 1) }
    }
}
