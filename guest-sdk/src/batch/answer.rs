//! The writer of an answer.

use alloc::borrow::Cow;
use alloc::string::String;
use alloc::vec::Vec;

use super::{Message, Messages};
use crate::abi::{self, entry, origin, record, set, verdict};

/// What becomes of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on as it is. After [`Output::emit`] it is a fault, which would lose what
    /// was emitted: emit the message too, and end with [`Verdict::Emit`].
    Keep,
    /// It ends here, on purpose.
    Drop,
    /// The records made with [`Output::emit`] go on in its place. Without one it is
    /// a fault: a message that ends on purpose is [`Verdict::Drop`].
    Emit,
    /// This message is bad: to dead letters with this reason, the others go on.
    Fail(Cow<'static, str>),
    /// Something outside is not ready: the batch comes again after a backoff.
    Retry(Cow<'static, str>),
}

impl Verdict {
    pub fn fail(reason: impl Into<Cow<'static, str>>) -> Self {
        Self::Fail(reason.into())
    }

    pub fn retry(reason: impl Into<Cow<'static, str>>) -> Self {
        Self::Retry(reason.into())
    }
}

impl From<crate::json::Error> for Verdict {
    /// `payload is not JSON: expected a value at byte 0`
    fn from(error: crate::json::Error) -> Self {
        Self::Fail(alloc::format!("payload is not JSON: {error}").into())
    }
}

/// The answer to a batch, as in interface `arena`.
#[derive(Debug, Default)]
pub struct Answer {
    /// Empty as long as every message is kept.
    pub verdicts: Vec<u8>,
    /// Empty as long as there is no record.
    pub outputs: Vec<u8>,
    pub data: Vec<u8>,
    /// Messages of the batch.
    count: usize,
    /// Whether a message is not kept.
    decided: bool,
    /// What `data` will probably need, so that it is allocated once.
    data_bytes: usize,
}

impl Answer {
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts the answer to another batch; keeps what it allocated.
    pub fn begin(&mut self, messages: &Messages<'_>) {
        self.clear();
        self.count = messages.len();
        self.decided = false;
        self.verdicts.resize(self.count, verdict::KEEP);
        self.data_bytes = messages.bytes_len() + 64 * messages.len();
    }

    /// Back to the answer that keeps all; keeps what it allocated.
    pub fn clear(&mut self) {
        self.verdicts.clear();
        self.outputs.clear();
        self.data.clear();
    }

    /// Fills what was left open: the header of the outputs. Keeping all is no verdicts.
    pub fn finish(&mut self) {
        if !self.decided {
            self.verdicts.clear();
        }
        if self.outputs.is_empty() {
            return;
        }
        let records = (self.outputs.len() - abi::OUTPUT_HEADER_BYTES) / abi::STRIDE_BYTES;
        let header = [abi::LAYOUT, abi::OUTPUT_HEADER_WORDS as u32, abi::STRIDE_WORDS as u32, records as u32];
        for (slot, word) in self.outputs.chunks_exact_mut(abi::WORD_BYTES).zip(header) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
    }

    /// The verdict of message `number`. Nothing to do where it is kept, and no
    /// growing: a call that comes back would take the registers of the loop over
    /// the messages, in wasm, even if it is never made.
    #[inline(always)]
    fn decide(&mut self, number: u32, verdict: u8) {
        if verdict != verdict::KEEP {
            self.verdicts[number as usize] = verdict;
            self.decided = true;
        }
    }

    #[inline(always)]
    fn push_record(&mut self, source: u32) -> Record<'_> {
        if self.outputs.is_empty() {
            self.first_record();
        }
        let at = self.outputs.len();
        self.outputs.extend_from_slice(&[0; abi::STRIDE_BYTES]);
        let record: &mut [u8; abi::STRIDE_BYTES] =
            self.outputs[at..].first_chunk_mut().expect("a record was just appended");
        record[..4].copy_from_slice(&source.to_le_bytes());
        Record { record, data: &mut self.data, set: 0 }
    }

    #[cold]
    fn first_record(&mut self) {
        self.outputs.reserve(abi::OUTPUT_HEADER_BYTES + self.count * abi::STRIDE_BYTES);
        self.outputs.resize(abi::OUTPUT_HEADER_BYTES, 0);
        self.data.reserve(self.data_bytes);
    }

    /// Records that the verdict does not want.
    #[cold]
    fn take_back(&mut self, (outputs, data): (usize, usize)) {
        self.outputs.truncate(outputs);
        self.data.truncate(data);
    }

    #[cold]
    fn refuse(
        &mut self,
        source: u32,
        before: Option<(usize, usize)>,
        verdict: u8,
        reason: Cow<'static, str>,
    ) {
        if let Some(before) = before {
            self.take_back(before);
        }
        let end = reason.floor_char_boundary(abi::REASON_BYTES_MAX);
        self.push_record(source).payload(&reason.as_bytes()[..end]);
        self.decide(source, verdict);
    }
}

/// Where a plugin puts what it makes of one message.
pub struct Output<'a> {
    answer: &'a mut Answer,
    source: u32,
    /// Lengths of outputs and data before its first record.
    before: Option<(usize, usize)>,
}

impl<'a> Output<'a> {
    #[inline(always)]
    pub(super) fn new(answer: &'a mut Answer, message: &Message<'_>) -> Self {
        Self { answer, source: message.number() as u32, before: None }
    }

    /// One more message in place of this one; what is not set on it stays as
    /// the message has it. Counts if the verdict is [`Verdict::Emit`]; to keep the
    /// message beside others, emit it as well.
    #[inline(always)]
    pub fn emit(&mut self) -> Record<'_> {
        self.before.get_or_insert((self.answer.outputs.len(), self.answer.data.len()));
        self.answer.push_record(self.source)
    }

    #[inline(always)]
    pub(super) fn end(self, verdict: Verdict) {
        let Self { answer, source, before } = self;
        let verdict = match verdict {
            Verdict::Emit if before.is_some() => return answer.decide(source, verdict::EMIT),
            Verdict::Keep if before.is_none() => verdict::KEEP,
            Verdict::Keep => kept_and_emitted(),
            Verdict::Emit => emitted_nothing(),
            Verdict::Drop => verdict::DROP,
            Verdict::Fail(reason) => return answer.refuse(source, before, verdict::FAIL, reason),
            Verdict::Retry(reason) => return answer.refuse(source, before, verdict::RETRY, reason),
        };
        if let Some(before) = before {
            answer.take_back(before);
        }
        answer.decide(source, verdict);
    }
}

#[cold]
fn kept_and_emitted() -> u8 {
    panic!("emitted a message and then kept its source: emit the source too, end with Verdict::Emit")
}

#[cold]
fn emitted_nothing() -> u8 {
    panic!("Verdict::Emit without a message emitted: use Verdict::Drop")
}

/// One message of the answer.
pub struct Record<'a> {
    record: &'a mut [u8; abi::STRIDE_BYTES],
    data: &'a mut Vec<u8>,
    set: u32,
}

impl Record<'_> {
    #[inline(always)]
    pub fn payload(&mut self, payload: &[u8]) -> &mut Self {
        self.bytes(record::PAYLOAD, set::PAYLOAD, payload)
    }

    /// Writes the payload where it is to lie, without a copy. `write` appends.
    #[inline(always)]
    pub fn payload_with(&mut self, write: impl FnOnce(&mut Vec<u8>)) -> &mut Self {
        let begin = self.data.len();
        write(self.data);
        self.span(record::PAYLOAD, set::PAYLOAD, begin)
    }

    /// A part of the message's own payload: costs nothing. What of `range` lies beyond
    /// the payload is left out: there are other messages.
    pub fn payload_part(&mut self, message: &Message<'_>, range: core::ops::Range<usize>) -> &mut Self {
        let end = range.end.min(message.payload().len());
        let start = range.start.min(end);
        let (begin, rest) = message.span(entry::PAYLOAD);
        self.word(record::PAYLOAD, begin + start as u32);
        self.word(record::PAYLOAD + 1, rest & 0xf000_0000 | (end - start) as u32);
        self.mark(set::PAYLOAD)
    }

    /// A topic name: no wildcards, no NUL.
    pub fn topic(&mut self, topic: &str) -> &mut Self {
        self.bytes(record::TOPIC, set::TOPIC, topic.as_bytes())
    }

    /// At most 64 bytes; empty for the default route.
    pub fn route(&mut self, route: &str) -> &mut Self {
        self.bytes(record::ROUTE, set::ROUTE, route.as_bytes())
    }

    /// At most 256 bytes.
    pub fn device(&mut self, device: &str) -> &mut Self {
        self.bytes(record::DEVICE, set::DEVICE, device.as_bytes())
    }

    /// Microseconds since 1970, UTC.
    #[inline]
    pub fn event_us(&mut self, event_us: i64) -> &mut Self {
        self.word(record::EVENT_US, event_us as u32);
        self.word(record::EVENT_US + 1, (event_us >> 32) as u32);
        self.mark(set::EVENT_US)
    }

    /// See [`abi::flags`]: QoS, retain, UTF-8.
    pub fn flags(&mut self, flags: u32) -> &mut Self {
        self.word(record::FLAGS, flags);
        self.mark(set::FLAGS)
    }

    /// Replaces the properties of devices and steps; protocol facts stay.
    ///
    /// # Panics
    ///
    /// Panics where a name has more than 65,535 bytes.
    pub fn properties<'p>(&mut self, properties: impl IntoIterator<Item = (&'p str, &'p [u8])>) -> &mut Self {
        let begin = self.data.len();
        for (name, value) in properties {
            let name_len = u16::try_from(name.len()).expect("a property's name has at most 65,535 bytes");
            self.data.extend_from_slice(&[origin::STEP, 0]);
            self.data.extend_from_slice(&name_len.to_le_bytes());
            self.data.extend_from_slice(&(value.len() as u32).to_le_bytes());
            self.data.extend_from_slice(name.as_bytes());
            self.data.extend_from_slice(value);
        }
        self.span(record::PROPERTIES, set::PROPERTIES, begin)
    }

    /// Ends a chain: `return out.emit().route("alert").verdict();`
    #[inline(always)]
    pub fn verdict(&mut self) -> Verdict {
        Verdict::Emit
    }

    #[inline(always)]
    fn bytes(&mut self, at: usize, bit: u32, bytes: &[u8]) -> &mut Self {
        let begin = self.data.len();
        self.data.extend_from_slice(bytes);
        self.span(at, bit, begin)
    }

    /// The span of `data` from `begin` to its end.
    #[inline(always)]
    fn span(&mut self, at: usize, bit: u32, begin: usize) -> &mut Self {
        let len = self.data.len() - begin;
        self.word(at, begin as u32);
        self.word(at + 1, abi::span_word(abi::DATA_SEGMENT, len));
        self.mark(bit)
    }

    #[inline(always)]
    fn mark(&mut self, bit: u32) -> &mut Self {
        self.set |= bit;
        self.word(record::SET, self.set);
        self
    }

    #[inline(always)]
    fn word(&mut self, at: usize, word: u32) {
        let at = at * abi::WORD_BYTES;
        self.record[at..at + abi::WORD_BYTES].copy_from_slice(&word.to_le_bytes());
    }
}

/// So that a `?` on a text works in functions that return `Result<_, Verdict>`.
impl From<String> for Verdict {
    fn from(reason: String) -> Self {
        Self::Fail(reason.into())
    }
}
