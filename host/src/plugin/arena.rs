//! The arena: a batch and its answer as bytes (`wit/plugin.wit`, interface
//! `arena`), and the check of an answer.
//!
//! Rule: every word of an answer is checked before any is used; one fault
//! fails the whole call. [`Answer::check`] does only that, [`Answer::apply`]
//! then cannot fail.

use super::bindings::batch::headworks::plugin::arena::Answer as Raw;
use super::config::Limits;
use crate::batch::{Batch, Entry, Partition, Span, flags};
use crate::properties::{self, Origin};
use crate::step::{Refused, RefusedKind};
use crate::topic::{self, DEVICE_ID_BYTES_MAX, Namespace};

pub(super) const LAYOUT: u32 = 1;
pub(super) const INPUT_HEADER_WORDS: usize = 16;
pub(super) const STRIDE_WORDS: usize = 16;
pub(super) const OUTPUT_HEADER_WORDS: usize = 8;
/// Most messages of one call.
pub(super) const COUNT_MAX: usize = 65_536;
/// Header and stride may grow, not without end.
const GROWTH_WORDS_MAX: usize = 256;
const ROUTE_BYTES_MAX: usize = 64;
const REASON_BYTES_MAX: usize = 4 << 10;
/// A payload over its source's: a letter of it must fit into one append.
const PAYLOAD_GROWTH_MAX: usize = 4 << 20;
/// The segment that means the answer's `data`.
pub(super) const DATA_SEGMENT: usize = 15;

/// Header flags of the input.
pub(super) mod call {
    pub const ALONE_AFTER_TRAP: u32 = 4;
}

pub(super) mod verdict {
    pub const KEEP: u8 = 0;
    pub const DROP: u8 = 1;
    pub const EMIT: u8 = 2;
    pub const FAIL: u8 = 3;
    pub const RETRY: u8 = 4;
}

/// Bits of an output record's word 1.
pub(super) mod set {
    pub const TOPIC: u32 = 1;
    pub const PAYLOAD: u32 = 2;
    pub const PROPERTIES: u32 = 4;
    pub const ROUTE: u32 = 8;
    pub const EVENT_TIME: u32 = 16;
    pub const DEVICE: u32 = 32;
    pub const FLAGS: u32 = 64;
}

const OUTPUT_FLAGS: u16 = flags::QOS_MASK | flags::RETAIN | flags::UTF8;

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

/// Writes the input index of `batch` into `out`, and says how many bytes the
/// spans have together and which segments they use (bit per segment).
pub(super) fn write_index(
    out: &mut Vec<u8>,
    batch: &Batch,
    partition: Partition,
    call_flags: u32,
    attempt: u32,
) -> (u64, u16) {
    let count = batch.entries.len();
    out.resize((INPUT_HEADER_WORDS + STRIDE_WORDS * count) * 4, 0);
    let (base, now) = (batch.base.0, batch.now_us);
    let header: [u32; INPUT_HEADER_WORDS] = [
        LAYOUT,
        INPUT_HEADER_WORDS as u32,
        STRIDE_WORDS as u32,
        count as u32,
        partition.0.into(),
        call_flags,
        base as u32,
        (base >> 32) as u32,
        now as u32,
        (now >> 32) as u32,
        // Watermark: none yet, i64::MIN.
        0,
        0x8000_0000,
        attempt,
        0,
        0,
        0,
    ];
    let (head, body) = out.split_at_mut(INPUT_HEADER_WORDS * 4);
    for (bytes, word) in head.as_chunks_mut::<4>().0.iter_mut().zip(header) {
        *bytes = word.to_le_bytes();
    }
    let mut bytes = 0;
    for (place, entry) in body.as_chunks_mut::<64>().0.iter_mut().zip(&batch.entries) {
        write_entry(place, entry);
        for span in [entry.topic, entry.payload, entry.properties, entry.route] {
            bytes += span.len() as u64;
        }
    }
    (bytes, used_segments(batch))
}

/// Bit per segment; a batch straight from the log has one.
fn used_segments(batch: &Batch) -> u16 {
    if batch.segments.len() == 1 {
        return 1;
    }
    // An empty span names no segment.
    let of = |span: Span| u16::from(!span.is_empty()) << span.segment();
    batch.entries.iter().flat_map(spans).map(of).fold(0, |used, one| used | one)
}

pub(super) fn spans(entry: &Entry) -> [Span; 5] {
    [entry.topic, entry.payload, entry.properties, entry.route, entry.device]
}

/// The layouts match but for the partition, which shares word 0 with the flags.
#[inline]
fn write_entry(place: &mut [u8; 64], entry: &Entry) {
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let span = |span: Span| pair(span.begin, span.segment_and_len);
    let words: [u64; 8] = [
        pair(entry.flags.into(), entry.offset),
        entry.received_us,
        entry.event_us as u64,
        span(entry.topic),
        span(entry.payload),
        span(entry.properties),
        span(entry.route),
        span(entry.device),
    ];
    for (bytes, word) in place.as_chunks_mut::<8>().0.iter_mut().zip(words) {
        *bytes = word.to_le_bytes();
    }
}

/// One output record.
#[derive(Clone, Copy)]
struct Record<'a>(&'a [u8; STRIDE_WORDS * 4]);

impl Record<'_> {
    #[inline]
    fn word(&self, number: usize) -> u32 {
        let at = number * 4;
        u32::from_le_bytes([self.0[at], self.0[at + 1], self.0[at + 2], self.0[at + 3]])
    }
    #[inline]
    fn span(&self, number: usize) -> Span {
        Span { begin: self.word(number), segment_and_len: self.word(number + 1) }
    }
    #[inline]
    fn has(&self, bit: u32) -> bool {
        self.word(1) & bit != 0
    }
    fn event_us(&self) -> i64 {
        (u64::from(self.word(10)) | u64::from(self.word(11)) << 32) as i64
    }
}

/// An answer, not yet checked, with what it answers.
pub(super) struct Answer<'a> {
    /// The batch as the plugin saw it.
    pub input: &'a Batch,
    pub raw: &'a Raw,
}

/// What a step makes of its answers: entries over the batch's segments and
/// one more of new bytes.
#[derive(Default)]
pub(super) struct Collected {
    /// The first message of the batch that nothing is decided of.
    next: usize,
    pub entries: Vec<Entry>,
    /// New bytes of all answers.
    pub data: Vec<u8>,
    pub refused: Vec<Refused>,
    pub dropped: u64,
    pub retry: Option<String>,
    /// With `retry`: the step waits for a new version.
    pub held: bool,
}

/// How an answer goes into the batch that the step was given.
pub(super) struct Target<'a> {
    /// The batch that came in.
    pub batch: &'a Batch,
    /// For each message of the answer's input, its number in `batch`; `None`: the same.
    pub numbers: Option<&'a [u32]>,
    /// The answer's input has segments of its own: slices of it are copied.
    pub gathered: bool,
    pub namespace: &'a Namespace,
    /// Asked to retry as often as it may: refuse instead.
    pub retries_used_up: bool,
}

impl<'a> Answer<'a> {
    /// Whether every message is kept: nothing else to check or do.
    pub fn keeps_all(&self) -> bool {
        self.raw.outputs.is_empty()
            && (self.raw.verdicts.is_empty()
                || (self.raw.verdicts.len() == self.input.len() && self.raw.verdicts.iter().all(|v| *v == 0)))
    }

    /// Checks every word. `bytes_max`: for the sum of all spans, and for `data`.
    pub fn check(&self, limits: &Limits, bytes_max: u64) -> Result<(), Fault> {
        let (verdicts, count) = (&self.raw.verdicts[..], self.input.len());
        if !verdicts.is_empty() && verdicts.len() != count {
            return Err(Fault::VerdictCount(verdicts.len(), count));
        }
        if verdicts.iter().any(|v| *v > verdict::RETRY) {
            let at = verdicts.iter().position(|v| *v > verdict::RETRY).unwrap_or_default();
            return Err(Fault::Verdict(at, verdicts[at]));
        }
        if self.raw.data.len() as u64 > bytes_max {
            return Err(Fault::Data(self.raw.data.len(), bytes_max));
        }
        self.check_header()?;
        let mut next = Expect { verdicts, message: 0, made: 0 };
        let mut bytes = 0;
        for (number, record) in self.records().enumerate() {
            let verdict = next.take(number, record.word(0) as usize, limits)?;
            let source = &self.input.entries[record.word(0) as usize];
            self.check_record(record, verdict, source, &mut bytes)
                .map_err(|what| Fault::Record { record: number, what })?;
            if bytes > bytes_max {
                return Err(Fault::Bytes(bytes_max));
            }
        }
        next.finish()
    }

    fn header(&self) -> Option<[usize; 4]> {
        let bytes = self.raw.outputs.get(..OUTPUT_HEADER_WORDS * 4)?;
        let word = |i: usize| u32::from_le_bytes(bytes.as_chunks::<4>().0[i]) as usize;
        Some([word(0), word(1), word(2), word(3)])
    }

    fn check_header(&self) -> Result<(), Fault> {
        let length = self.raw.outputs.len();
        if length == 0 {
            return Ok(());
        }
        let Some([layout, header, stride, count]) = self.header() else {
            return Err(Fault::Outputs("shorter than their header of 8 words"));
        };
        if layout != LAYOUT as usize {
            return Err(Fault::Outputs("layout must be 1"));
        }
        if !(OUTPUT_HEADER_WORDS..=GROWTH_WORDS_MAX).contains(&header) {
            return Err(Fault::Outputs("header-words must be 8 or a little more"));
        }
        if !(STRIDE_WORDS..=GROWTH_WORDS_MAX).contains(&stride) {
            return Err(Fault::Outputs("stride must be 16 or a little more"));
        }
        if (header as u64 + stride as u64 * count as u64) * 4 != length as u64 {
            return Err(Fault::Outputs("their length is not that of header-words + stride x count"));
        }
        Ok(())
    }

    /// After [`Self::check_header`].
    fn records(&self) -> impl Iterator<Item = Record<'a>> {
        let [_, header, stride, _] = self.header().unwrap_or([0, 0, STRIDE_WORDS, 0]);
        let bytes: &'a [u8] = self.raw.outputs.get(header * 4..).unwrap_or_default();
        bytes.chunks_exact(stride * 4).filter_map(|chunk| chunk.first_chunk().map(Record))
    }

    fn check_record(
        &self,
        record: Record<'_>,
        verdict: u8,
        source: &Entry,
        total: &mut u64,
    ) -> Result<(), &'static str> {
        if verdict == verdict::FAIL || verdict == verdict::RETRY {
            if !record.has(set::PAYLOAD) {
                return Err("fail and retry need a reason as payload");
            }
            let reason = self.bytes(record.span(4)).ok_or("its reason lies outside of its segment")?;
            if reason.len() > REASON_BYTES_MAX {
                return Err("its reason has more than 4 KiB");
            }
            *total += reason.len() as u64;
            return std::str::from_utf8(reason).map(drop).map_err(|_| "its reason is not UTF-8");
        }
        if record.has(set::TOPIC) {
            let bytes = self.bytes(record.span(2)).ok_or("its topic lies outside of its segment")?;
            *total += bytes.len() as u64;
            if !std::str::from_utf8(bytes).is_ok_and(topic::is_valid_name) {
                return Err("its topic must be 1 to 65,535 bytes of UTF-8 without NUL, + and #");
            }
        }
        if record.has(set::PAYLOAD) {
            let bytes = self.bytes(record.span(4)).ok_or("its payload lies outside of its segment")?;
            *total += bytes.len() as u64;
            if bytes.len() > source.payload.len() + PAYLOAD_GROWTH_MAX {
                return Err("its payload grew by more than 4 MiB");
            }
        }
        if record.has(set::PROPERTIES) {
            let bytes = self.bytes(record.span(6)).ok_or("its properties lie outside of their segment")?;
            *total += bytes.len() as u64;
            if !properties::is_valid(bytes) {
                return Err("its properties are not well formed");
            }
            self.check_merged(bytes, source)?;
        }
        if record.has(set::ROUTE) {
            let bytes = self.bytes(record.span(8)).ok_or("its route lies outside of its segment")?;
            *total += bytes.len() as u64;
            if bytes.len() > ROUTE_BYTES_MAX || std::str::from_utf8(bytes).is_err() {
                return Err("its route must be at most 64 bytes of UTF-8");
            }
        }
        if record.has(set::DEVICE) {
            let bytes = self.bytes(record.span(12)).ok_or("its device id lies outside of its segment")?;
            *total += bytes.len() as u64;
            if bytes.len() > DEVICE_ID_BYTES_MAX || std::str::from_utf8(bytes).is_err() {
                return Err("its device id must be at most 256 bytes of UTF-8");
            }
        }
        if record.has(set::FLAGS) && record.word(14) & u32::from(flags::QOS_MASK) == 3 {
            return Err("its QoS must be 0 to 2");
        }
        Ok(())
    }

    /// The properties as they will be: the source's of origin 1, the record's of the others.
    fn check_merged(&self, new: &[u8], source: &Entry) -> Result<(), &'static str> {
        let mut merged = Vec::new();
        if merge_properties(self.input.bytes(source.properties), new, &mut merged)
            && !properties::is_valid(&merged)
        {
            return Err("its properties and the listener's are too many together");
        }
        Ok(())
    }

    #[inline]
    fn bytes(&self, span: Span) -> Option<&'a [u8]> {
        match span.segment() {
            DATA_SEGMENT => self.raw.data.get(span.range()),
            number => self.input.segments.get(number)?.get(span.range()),
        }
    }
}

/// Walks the verdicts beside the records.
struct Expect<'a> {
    verdicts: &'a [u8],
    message: usize,
    /// Records of `message` so far.
    made: u32,
}

impl Expect<'_> {
    /// The verdict of `source`, to which the next record belongs.
    #[inline]
    fn take(&mut self, record: usize, source: usize, limits: &Limits) -> Result<u8, Fault> {
        let Some(verdict) = self.verdicts.get(source).copied() else {
            let what = "its source must be the number of a message that has a verdict";
            return Err(Fault::Record { record, what });
        };
        if source < self.message {
            return Err(Fault::Record { record, what: "its source must not descend" });
        }
        if source > self.message {
            self.skip_to(source)?;
        }
        self.made += 1;
        match verdict {
            verdict::EMIT if self.made <= limits.outputs_per_message_max => Ok(verdict),
            verdict::EMIT => Err(Fault::Messages(source, limits.outputs_per_message_max)),
            verdict::FAIL | verdict::RETRY if self.made == 1 => Ok(verdict),
            verdict::FAIL | verdict::RETRY => {
                Err(Fault::Record { record, what: "fail and retry have exactly one record" })
            }
            _ => Err(Fault::Record { record, what: "its message is kept or dropped" }),
        }
    }

    /// Every message from here to `next` that needs a record has one.
    #[inline]
    fn skip_to(&mut self, next: usize) -> Result<(), Fault> {
        let first = if self.made > 0 { self.message + 1 } else { self.message };
        if let Some(missing) = self.verdicts[first..next].iter().position(|v| *v >= verdict::EMIT) {
            return Err(Fault::Missing(first + missing));
        }
        (self.message, self.made) = (next, 0);
        Ok(())
    }

    fn finish(mut self) -> Result<(), Fault> {
        let end = self.verdicts.len();
        if end == 0 { Ok(()) } else { self.skip_to(end) }
    }
}

impl Collected {
    /// Takes over a checked answer to `input`.
    pub fn apply(&mut self, input: &Batch, mut raw: Raw, target: &Target<'_>) {
        let data_begin = self.append(std::mem::take(&mut raw.data));
        let answer = &Answer { input, raw: &raw };
        let mut records = answer.records().peekable();
        self.entries.reserve(input.len());
        for message in 0..input.len() {
            let number = target.numbers.map_or(message, |numbers| numbers[message] as usize);
            self.keep_until(target.batch, number);
            self.next = number + 1;
            let source = &target.batch.entries[number];
            match answer.raw.verdicts.get(message).copied().unwrap_or(verdict::KEEP) {
                verdict::KEEP => self.entries.push(*source),
                verdict::DROP => self.dropped += 1,
                verdict::EMIT => {
                    while let Some(record) = records.next_if(|record| record.word(0) as usize == message) {
                        self.emit(record, source, answer, data_begin, target);
                    }
                }
                verdict => {
                    if let Some(record) = records.next() {
                        let reason = self.reason(record, answer, data_begin);
                        self.refuse(number as u32, verdict, reason, target);
                    }
                }
            }
        }
    }

    /// Messages from where the last answer ended up to `end` pass untouched.
    #[inline]
    pub fn keep_until(&mut self, batch: &Batch, end: usize) {
        if self.next < end {
            self.entries.extend_from_slice(&batch.entries[self.next..end]);
            self.next = end;
        }
    }

    /// A message that made the plugin fault.
    pub fn refuse_fault(&mut self, batch: &Batch, refused: Refused) {
        self.keep_until(batch, refused.index as usize);
        self.next = refused.index as usize + 1;
        self.refused.push(refused);
    }

    /// The batch that goes on, over the segments of the one that came in.
    pub fn into_batch(self, batch: &Batch) -> (Batch, Vec<Refused>, u64, Option<String>) {
        let mut segments = batch.segments.clone();
        if !self.data.is_empty() {
            segments.push(self.data.into());
        }
        let passed = Batch { base: batch.base, now_us: batch.now_us, segments, entries: self.entries.into() };
        (passed, self.refused, self.dropped, self.retry)
    }

    fn append(&mut self, data: Vec<u8>) -> usize {
        if self.data.is_empty() {
            self.data = data;
            return 0;
        }
        let begin = self.data.len();
        self.data.extend_from_slice(&data);
        begin
    }

    fn refuse(&mut self, index: u32, verdict: u8, reason: String, target: &Target<'_>) {
        match verdict {
            verdict::RETRY if !target.retries_used_up => {
                self.retry.get_or_insert(reason);
            }
            verdict::RETRY => self.refused.push(Refused { index, kind: RefusedKind::Retries, reason }),
            _ => self.refused.push(Refused { index, kind: RefusedKind::Failed, reason }),
        }
    }

    fn reason(&self, record: Record<'_>, answer: &Answer<'_>, data_begin: usize) -> String {
        let span = record.span(4);
        let bytes = match span.segment() {
            DATA_SEGMENT => &self.data[data_begin..][span.range()],
            _ => answer.input.bytes(span),
        };
        super::host::printable(std::str::from_utf8(bytes).unwrap_or_default())
    }

    #[inline]
    fn emit(
        &mut self,
        record: Record<'_>,
        source: &Entry,
        answer: &Answer<'_>,
        data_begin: usize,
        target: &Target<'_>,
    ) {
        let mut entry = *source;
        entry.flags |= flags::CHANGED;
        if record.has(set::PAYLOAD) {
            entry.payload = self.place(record.span(4), answer, data_begin, target);
        }
        if record.has(set::TOPIC) {
            entry.topic = self.place(record.span(2), answer, data_begin, target);
            let fits = target.namespace.device_span(self.topic(entry.topic, target)).is_some();
            entry.flags = (entry.flags & !flags::FITS_NAMESPACE) | (flags::FITS_NAMESPACE * u16::from(fits));
        }
        if record.has(set::PROPERTIES) {
            entry.properties = self.properties(record.span(6), source, answer, data_begin, target);
        }
        if record.has(set::ROUTE) {
            entry.route = self.place(record.span(8), answer, data_begin, target);
        }
        if record.has(set::DEVICE) {
            entry.device = self.place(record.span(12), answer, data_begin, target);
        }
        if record.has(set::EVENT_TIME) {
            entry.event_us = record.event_us();
            entry.flags |= flags::EVENT_TIME;
        }
        if record.has(set::FLAGS) {
            entry.flags = entry.flags & !OUTPUT_FLAGS | record.word(14) as u16 & OUTPUT_FLAGS;
        }
        self.entries.push(entry);
    }

    /// Where the bytes of an answer's span lie in the batch that goes on.
    #[inline]
    fn place(&mut self, span: Span, answer: &Answer<'_>, data_begin: usize, target: &Target<'_>) -> Span {
        if span.is_empty() {
            return Span::EMPTY;
        }
        if span.segment() == DATA_SEGMENT {
            return self.data_span(data_begin + span.begin as usize, span.len(), target);
        }
        if !target.gathered {
            return span;
        }
        let begin = self.data.len();
        self.data.extend_from_slice(answer.input.bytes(span));
        self.data_span(begin, span.len(), target)
    }

    fn data_span(&self, begin: usize, len: usize, target: &Target<'_>) -> Span {
        Span::new(target.batch.segments.len(), begin, len)
    }

    fn properties(
        &mut self,
        span: Span,
        source: &Entry,
        answer: &Answer<'_>,
        data_begin: usize,
        target: &Target<'_>,
    ) -> Span {
        let mut merged = Vec::new();
        let new = match span.segment() {
            DATA_SEGMENT => &self.data[data_begin..][span.range()],
            _ => answer.input.bytes(span),
        };
        if !merge_properties(target.batch.bytes(source.properties), new, &mut merged) {
            return self.place(span, answer, data_begin, target);
        }
        if merged.is_empty() {
            return Span::EMPTY;
        }
        let begin = self.data.len();
        self.data.extend_from_slice(&merged);
        self.data_span(begin, merged.len(), target)
    }

    fn topic<'s>(&'s self, span: Span, target: &Target<'s>) -> &'s str {
        let bytes = if span.segment() == target.batch.segments.len() {
            &self.data[span.range()]
        } else {
            target.batch.bytes(span)
        };
        std::str::from_utf8(bytes).unwrap_or_default()
    }
}

/// Origin 1 from the source, origins 0 and 2 from `new`. False, and `out`
/// empty, where that is just `new`.
fn merge_properties(source: &[u8], new: &[u8], out: &mut Vec<u8>) -> bool {
    let of_listener = |p: &properties::Property<'_>| p.origin == Origin::Listener as u8;
    if !properties::iter(source).any(|p| of_listener(&p)) && !properties::iter(new).any(|p| of_listener(&p)) {
        return false;
    }
    let kept = properties::iter(source).filter(of_listener);
    for property in kept.chain(properties::iter(new).filter(|p| !of_listener(p))) {
        let origin = match property.origin {
            0 => Origin::Device,
            1 => Origin::Listener,
            _ => Origin::Pipeline,
        };
        properties::push(out, origin, property.name, property.value);
    }
    true
}

#[cfg(test)]
#[path = "arena_tests.rs"]
mod tests;
