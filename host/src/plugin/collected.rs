//! What a step makes of its plugin's answers. Rule: an answer is taken whole
//! or, at the first word that is wrong, not at all.

use super::answer::{Answer, Fault, Record, Wrong};
use super::arena::{DATA_SEGMENT, set, spans, verdict};
use super::bindings::batch::headworks::plugin::arena::Answer as Raw;
use super::config::Limits;
use crate::batch::{Batch, Entry, Span, flags};
use crate::properties::{self, Origin};
use crate::step::{Attempt, Outcome, Refused, RefusedKind};
use crate::topic::Namespace;

/// All that a step may make of a batch: its new bytes are one segment, which a
/// span can address.
pub(super) const BYTES_MAX: u64 = 1 << 30;
const OUTPUT_FLAGS: u16 = flags::QOS_MASK | flags::RETAIN | flags::UTF8;

/// Entries over the segments of the batch that came in and one more of new bytes.
pub(super) struct Collected {
    /// The first message of the batch that nothing is decided of.
    next: usize,
    entries: Vec<Entry>,
    /// New bytes of all answers.
    data: Vec<u8>,
    refused: Vec<Refused>,
    dropped: u64,
    retry: Option<String>,
    /// With `retry`: the step waits for a new version.
    held: bool,
    /// A message was dropped, rejected or changed.
    changed: bool,
    /// Bytes that the answers that follow may still come to.
    bytes_left: u64,
}

/// How an answer goes into the batch that the step was given.
pub(super) struct Target<'a> {
    /// The batch that came in.
    pub batch: &'a Batch,
    /// The answer's input was gathered: for each of its messages the number in
    /// `batch`; slices of it are copied. `None`: it is `batch`.
    pub numbers: Option<&'a [u32]>,
    pub namespace: &'a Namespace,
    /// On the last one a message that asks for a retry is rejected.
    pub attempt: Attempt,
}

/// Where an answer's bytes will lie once it is taken.
struct Place {
    /// The segment of new bytes.
    segment: usize,
    /// Where the answer's data begins in it.
    data_begin: usize,
    /// Where `copied` begins in it: behind the answer's data.
    copied_begin: usize,
    /// Bytes that are not the answer's own data: slices of a gathered input,
    /// properties with the listener's among them.
    copied: Vec<u8>,
    gathered: bool,
    /// Sum of the spans of the answer's messages and reasons so far.
    bytes: u64,
}

/// To undo an answer of which a part was taken.
struct Mark {
    next: usize,
    entries: usize,
    refused: usize,
    dropped: u64,
    asked: bool,
    changed: bool,
}

impl Collected {
    /// `bytes_max`: for all answers together.
    pub fn new(bytes_max: u64) -> Self {
        Self {
            next: 0,
            entries: Vec::new(),
            data: Vec::new(),
            refused: Vec::new(),
            dropped: 0,
            retry: None,
            held: false,
            changed: false,
            bytes_left: bytes_max.min(BYTES_MAX),
        }
    }

    /// Takes over the answer to `input`. `bytes_max`: for the data, and for the sum
    /// of all spans of what comes out, those that a message kept from its source
    /// too: whoever gathers or writes it copies them.
    pub fn take(
        &mut self,
        input: &Batch,
        raw: Raw,
        limits: &Limits,
        bytes_max: u64,
        target: &Target<'_>,
    ) -> Result<(), Fault> {
        let bytes_max = bytes_max.min(self.bytes_left);
        let answer = Answer::new(input, &raw, bytes_max)?;
        if answer.keeps_all() {
            return Ok(());
        }
        let data_begin = self.data.len();
        let mut place = Place {
            segment: target.batch.segments.len(),
            data_begin,
            copied_begin: data_begin + raw.data.len(),
            copied: Vec::new(),
            gathered: target.numbers.is_some(),
            bytes: 0,
        };
        let mark = self.mark();
        if let Err(fault) = self.take_messages(&answer, limits, bytes_max, target, &mut place) {
            self.back_to(mark);
            return Err(fault);
        }
        if self.data.is_empty() {
            self.data = raw.data;
        } else {
            self.data.extend_from_slice(&raw.data);
        }
        self.data.extend_from_slice(&place.copied);
        let new_bytes = (self.data.len() - data_begin) as u64;
        self.bytes_left = self.bytes_left.saturating_sub(place.bytes.max(new_bytes));
        Ok(())
    }

    fn take_messages(
        &mut self,
        answer: &Answer<'_>,
        limits: &Limits,
        bytes_max: u64,
        target: &Target<'_>,
        place: &mut Place,
    ) -> Result<(), Fault> {
        // The record that comes next.
        let mut next = 0;
        self.entries.reserve(answer.input.len());
        for (message, verdict) in answer.verdicts.iter().enumerate() {
            let number = target.numbers.map_or(message, |numbers| numbers[message] as usize);
            self.keep_until(target.batch, number);
            self.next = number + 1;
            self.changed |= *verdict != verdict::KEEP;
            let source = &target.batch.entries[number];
            let expected = || answer.record(next).filter(|record| record.source() == message);
            match *verdict {
                verdict::KEEP => self.entries.push(*source),
                verdict::DROP => self.dropped += 1,
                verdict::EMIT => {
                    let mut record = expected().ok_or_else(|| answer.misplaced(next, message))?;
                    // Messages made of the same one of the stream, by this step or earlier ones.
                    let mut made = None;
                    loop {
                        // Copied from place to place and only written to there: what
                        // was just written in another width stalls a read.
                        self.entries.extend_from_slice(std::slice::from_ref(source));
                        let entry = self.entries.last_mut().expect("it was just appended");
                        set(entry, source, record, answer, target, place)
                            .map_err(|what| Fault::Record { record: next, what })?;
                        next += 1;
                        place.bytes += spans(entry).iter().map(|span| span.len() as u64).sum::<u64>();
                        if place.bytes > bytes_max {
                            return Err(Fault::Bytes(bytes_max));
                        }
                        match answer.record(next) {
                            Some(another) if another.source() == message => record = another,
                            _ => break,
                        }
                        let made = made.get_or_insert_with(|| self.siblings(target.batch, number));
                        if *made >= limits.outputs_per_message_max as usize {
                            return Err(Fault::Messages(message, limits.outputs_per_message_max));
                        }
                        *made += 1;
                    }
                }
                verdict @ (verdict::FAIL | verdict::RETRY) => {
                    let record = expected().ok_or_else(|| answer.misplaced(next, message))?;
                    let reason =
                        answer.reason(record).map_err(|what| Fault::Record { record: next, what })?;
                    place.bytes += reason.len() as u64;
                    if place.bytes > bytes_max {
                        return Err(Fault::Bytes(bytes_max));
                    }
                    self.refuse(number as u32, verdict, reason, target);
                    next += 1;
                }
                verdict => return Err(Fault::Verdict(message, verdict)),
            }
        }
        match answer.record(next) {
            None => Ok(()),
            Some(_) => Err(answer.misplaced(next, answer.input.len())),
        }
    }

    /// Returns how many messages there are so far of the offset of message
    /// `number`, of which one was just made, with those that are still to come.
    fn siblings(&self, batch: &Batch, number: usize) -> usize {
        let offset = batch.entries[number].offset;
        let of_it = |entry: &&Entry| entry.offset == offset;
        self.entries.iter().rev().take_while(of_it).count()
            + batch.entries[number + 1..].iter().take_while(of_it).count()
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
        self.changed = true;
        self.refused.push(refused);
    }

    /// The whole batch is to come again.
    pub fn ask_again(&mut self, reason: String, held: bool) {
        self.retry.get_or_insert(reason);
        self.held |= held;
    }

    pub fn asks_again(&self) -> bool {
        self.retry.is_some()
    }

    /// What becomes of `batch`, the one that came in.
    pub fn into_outcome(mut self, batch: Batch) -> Outcome {
        if self.retry.is_some() {
            return Outcome { retry: self.retry, held: self.held, ..Outcome::default() };
        }
        if self.next == 0 {
            return Outcome { passed: batch, ..Outcome::default() };
        }
        self.keep_until(&batch, batch.len());
        let Batch { base, now_us, mut segments, exclusive, .. } = batch;
        if !self.data.is_empty() {
            segments.push(self.data.into());
        }
        let exclusive = exclusive && !self.changed;
        let passed = Batch { base, now_us, segments, entries: self.entries.into(), exclusive };
        Outcome { passed, refused: self.refused, dropped: self.dropped, retry: None, held: false }
    }

    fn refuse(&mut self, index: u32, verdict: u8, reason: &str, target: &Target<'_>) {
        let reason = super::host::printable(reason);
        let Attempt { number, is_last } = target.attempt;
        let (kind, reason) = match verdict {
            verdict::RETRY if !is_last => return self.ask_again(reason, false),
            verdict::RETRY => {
                (RefusedKind::Retries, format!("asked for a retry {number} times, the last time: {reason}"))
            }
            _ => (RefusedKind::Failed, reason),
        };
        self.refused.push(Refused { index, kind, reason });
    }

    fn mark(&self) -> Mark {
        Mark {
            next: self.next,
            entries: self.entries.len(),
            refused: self.refused.len(),
            dropped: self.dropped,
            asked: self.retry.is_some(),
            changed: self.changed,
        }
    }

    fn back_to(&mut self, mark: Mark) {
        self.next = mark.next;
        self.entries.truncate(mark.entries);
        self.refused.truncate(mark.refused);
        self.dropped = mark.dropped;
        self.changed = mark.changed;
        if !mark.asked {
            self.retry = None;
        }
    }
}

/// Changes `entry`, a copy of a record's `source`, as the record says.
#[inline]
fn set(
    entry: &mut Entry,
    source: &Entry,
    record: Record<'_>,
    answer: &Answer<'_>,
    target: &Target<'_>,
    place: &mut Place,
) -> Result<(), Wrong> {
    entry.flags = source.flags | flags::CHANGED;
    if record.has(set::PAYLOAD) {
        entry.payload = place.put(record.payload(), answer.payload(record, source)?);
    }
    if record.has(!set::PAYLOAD) { set_others(entry, record, answer, target, place) } else { Ok(()) }
}

/// All that a record may set but the payload; apart, so that the commonest
/// record stays short.
#[inline(never)]
fn set_others(
    entry: &mut Entry,
    record: Record<'_>,
    answer: &Answer<'_>,
    target: &Target<'_>,
    place: &mut Place,
) -> Result<(), Wrong> {
    if record.has(set::TOPIC) {
        let topic = answer.topic(record)?;
        entry.topic = place.put(record.topic(), topic.as_bytes());
        let fits = target.namespace.device_span(topic).is_some();
        entry.flags = (entry.flags & !flags::FITS_NAMESPACE) | (flags::FITS_NAMESPACE * u16::from(fits));
    }
    if record.has(set::PROPERTIES) {
        let new = answer.properties(record)?;
        entry.properties = match with_listeners(target.batch.bytes(entry.properties), new)? {
            None => place.put(record.properties(), new),
            Some(merged) => place.copy(&merged),
        };
    }
    if record.has(set::ROUTE) {
        entry.route = place.put(record.route(), answer.route(record)?);
    }
    if record.has(set::DEVICE) {
        entry.device = place.put(record.device(), answer.device(record)?);
    }
    if record.has(set::EVENT_TIME) {
        entry.event_us = record.event_us();
        entry.flags |= flags::EVENT_TIME;
    }
    if record.has(set::FLAGS) {
        entry.flags = entry.flags & !OUTPUT_FLAGS | record.flags()? & OUTPUT_FLAGS;
    }
    Ok(())
}

impl Place {
    /// Where the checked `bytes` of an answer's `span` will lie.
    #[inline]
    fn put(&mut self, span: Span, bytes: &[u8]) -> Span {
        if bytes.is_empty() {
            return Span::EMPTY;
        }
        if span.segment() == DATA_SEGMENT {
            return Span::new(self.segment, self.data_begin + span.begin as usize, bytes.len());
        }
        if self.gathered { self.copy(bytes) } else { span }
    }

    #[inline(never)]
    fn copy(&mut self, bytes: &[u8]) -> Span {
        if bytes.is_empty() {
            return Span::EMPTY;
        }
        let begin = self.copied_begin + self.copied.len();
        self.copied.extend_from_slice(bytes);
        Span::new(self.segment, begin, bytes.len())
    }
}

/// Origin 1 from the source, origins 0 and 2 from `new`; `None` where that is
/// just `new`.
fn with_listeners(source: &[u8], new: &[u8]) -> Result<Option<Vec<u8>>, Wrong> {
    let of_listener = |p: &properties::Property<'_>| p.origin == Origin::Listener as u8;
    if !properties::iter(source).any(|p| of_listener(&p)) && !properties::iter(new).any(|p| of_listener(&p)) {
        return Ok(None);
    }
    let mut merged = Vec::new();
    let kept = properties::iter(source).filter(of_listener);
    for property in kept.chain(properties::iter(new).filter(|p| !of_listener(p))) {
        properties::push(&mut merged, Origin::of(property.origin), property.name, property.value);
    }
    if !properties::is_valid(&merged) {
        return Err("its properties and the listener's are too many together");
    }
    Ok(Some(merged))
}

#[cfg(test)]
#[path = "collected_tests.rs"]
mod tests;
