//! The part of an outbox that outlives the host: state of the broker's stream.
//!
//! - `qr` + epoch, the note: for each stream, the position of live delivery for this session, and the
//!   earlier messages that were not complete. Later messages are found again in the streams. Notes are
//!   written at intervals. An old note only causes duplicates: of QoS 1 messages, and of messages of a
//!   share, with QoS 2 too, to another member than the one that had them.
//!   A retained message is named by its id, not by its topic, which may be longer than a record.
//!   Subscription identifiers are determined again from the filters.
//! - `oi` + epoch + packet id: a QoS 2 message in delivery. The record is durable before its PUBLISH is
//!   sent, and again before its PUBREL.
//! - `os` + epoch + stream: QoS 2 messages below this offset have such a record, or had one and are
//!   complete. It is in the same append as the record.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use super::again::{Parts, Unlisted};
use super::filters::FilterChanges;
use super::share_record::FoundShare;
use super::{Ids, InFlight, Queued, ShareFilter, Source};
use crate::listeners::mqtt::blobs::Id;
use crate::listeners::mqtt::outbound::Message;
use crate::listeners::mqtt::retained;
use crate::listeners::mqtt::session::{Change, subscription_key};
use crate::stream::{Identity, STATE_VALUE_BYTES_MAX, Ticket};

pub const NOTE: &[u8] = b"qr";
pub const STEP: &[u8] = b"oi";
pub const SENT: &[u8] = b"os";

/// Bytes of all notes together in a stream's state.
const NOTES_BYTES_MAX: usize = 24 << 20;
/// Number of messages by which live delivery may be ahead of a note. A restart reads them again.
pub const NOTE_EVERY_MESSAGES: u64 = 1 << 18;

/// Bytes that the packets in flight of one session may take of the state of the broker's stream. Further
/// messages wait for acknowledgements of the client.
pub const SESSION_STEPS_BYTES_MAX: usize = 256 << 10;

pub(super) const FORMAT: u8 = 3;
const PHASE_SENT: u8 = 3;
const PHASE_RELEASED: u8 = 2;
/// Format of a note that names no part of a stream with unlisted messages.
const FORMAT_2: u8 = 2;
/// Format of 0.1.0, which stores a retained message by its topic, and all subscription identifiers with
/// each entry.
const FORMAT_1: u8 = 1;
const PHASE_SENT_1: u8 = 1;
const IDENTITY_BYTES: usize = 20;

const RETAIN: u8 = 1 << 2;
const APART: u8 = 1 << 3;
const IN_FLIGHT: u8 = 1 << 4;
const IDS: u8 = 1 << 5;
const SHARE: u8 = 1 << 6;
const RETAINED: u8 = 1 << 7;

/// The durable records of an outbox. Changes are numbered, and a packet is sent once the number of its
/// change is durable.
pub struct Kept {
    epoch: u64,
    streams: Arc<[Identity]>,
    /// Changes that are not appended yet.
    changes: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
    made: u64,
    /// Appended changes: the number up to which a ticket makes them durable.
    appended: VecDeque<(u64, Ticket)>,
    durable: u64,
    /// For each stream, one past the last QoS 2 message that has had a record.
    sent: Box<[u64]>,
    /// PUBRELs in the order of their PUBRECs, with the numbers of their changes.
    pub releases: VecDeque<(u16, u64)>,
    /// Whether a message was acknowledged since the last note.
    pub changed: bool,
    /// Positions in the last note.
    noted: Box<[u64]>,
    /// Whether the next append must contain a note, because it covers messages out of the order of their
    /// streams.
    pub note_due: bool,
    /// Whether the changes found no room.
    pub refused: bool,
    /// Changes of subscriptions that are not appended yet: see [`filters`](super::filters).
    pub filters: FilterChanges,
    /// Filters whose changes may not be appended before the record of their share.
    pub awaiting_records: BTreeSet<Box<str>>,
    /// Whether the last note found no room.
    pub note_refused: bool,
    /// Bytes of the records of packets in flight in the state of the broker's stream.
    steps_bytes: usize,
    /// Whether the records are no longer true of the streams: see
    /// [`Outbox::renew`](super::Outbox::renew).
    pub is_stale: bool,
    /// Messages that the session gave to other members of a share, until
    /// [`Outbox::passed_on`](super::Outbox::passed_on). The session's notes list them too, since those
    /// of the other members do not yet.
    pub passing_on: Vec<Queued>,
}

impl Kept {
    pub fn new(epoch: u64, streams: Arc<[Identity]>) -> Self {
        let none: Box<[u64]> = vec![0; streams.len()].into();
        Self {
            epoch,
            changes: BTreeMap::new(),
            made: 0,
            appended: VecDeque::new(),
            durable: 0,
            sent: none.clone(),
            releases: VecDeque::new(),
            changed: false,
            noted: none,
            note_due: false,
            refused: false,
            filters: FilterChanges::new(),
            awaiting_records: BTreeSet::new(),
            note_refused: false,
            steps_bytes: 0,
            is_stale: false,
            passing_on: Vec::new(),
            streams,
        }
    }

    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    pub fn durable(&self) -> u64 {
        self.durable
    }

    /// Returns whether this QoS 2 message was taken from the queue before a restart.
    pub fn was_sent(&self, stream: u16, offset: u64) -> bool {
        self.sent.get(usize::from(stream)).is_some_and(|sent| offset < *sent)
    }

    /// Returns the offset below which QoS 2 messages of a stream were taken from the queue before a
    /// restart.
    pub fn sent(&self, stream: usize) -> u64 {
        self.sent.get(stream).copied().unwrap_or(0)
    }

    /// Restores the watermark of a stream. Only messages below `valid` are those to which it refers.
    fn restore_sent(&mut self, stream: usize, sent: u64, valid: u64) {
        self.sent[stream] = sent.min(valid);
        if sent > valid {
            let key = key(SENT, self.epoch, &identity_bytes(&self.streams[stream]));
            self.set(key, Some(valid.to_be_bytes().into()));
            self.is_stale = true;
        }
    }

    /// Returns whether another QoS 2 message may get a packet id.
    pub fn has_room(&self) -> bool {
        self.steps_bytes < SESSION_STEPS_BYTES_MAX
    }

    /// Records the packet id of a QoS 2 message. Returns the number of the change, and the bytes of its
    /// record.
    pub fn send(&mut self, packet_id: u16, queued: &Queued) -> (u64, u32) {
        self.made += 1;
        if let (Source::Stream { stream, offset }, false) = (&queued.source, queued.apart) {
            let number = usize::from(*stream);
            self.sent[number] = offset + 1;
            let key = key(SENT, self.epoch, &identity_bytes(&self.streams[number]));
            self.set(key, Some((offset + 1).to_be_bytes().into()));
        } else {
            self.note_due = true;
        }
        let record = self.set_step(PHASE_SENT, packet_id, Some(queued));
        (self.made, record)
    }

    /// Records the release of a message, whose PUBREL may be sent once the returned number is durable.
    pub fn release(&mut self, flight: &mut InFlight) {
        self.made += 1;
        self.steps_bytes -= flight.record as usize;
        flight.record = self.set_step(PHASE_RELEASED, flight.packet_id, None);
        flight.after = self.made;
    }

    pub fn done(&mut self, flight: &InFlight) {
        self.made += 1;
        self.steps_bytes -= flight.record as usize;
        self.set(key(STEP, self.epoch, &flight.packet_id.to_be_bytes()), None);
    }

    /// Takes back a packet id whose record was not appended.
    pub fn take_back(&mut self, flight: &InFlight) {
        self.steps_bytes -= flight.record as usize;
        self.changes.remove(&key(STEP, self.epoch, &flight.packet_id.to_be_bytes()));
    }

    fn set_step(&mut self, phase: u8, packet_id: u16, queued: Option<&Queued>) -> u32 {
        let mut value = vec![phase];
        put_number(&mut value, self.made);
        if let Some(queued) = queued {
            let stream = queued.source.stream().unwrap_or_default();
            value.extend(identity_bytes(&self.streams[usize::from(stream)]));
            put_entry(&mut value, &mut Before::default(), queued, 0);
        }
        let key = key(STEP, self.epoch, &packet_id.to_be_bytes());
        let record = key.len() + value.len();
        self.steps_bytes += record;
        self.set(key, Some(value));
        record as u32
    }

    /// Sets the change of a key. The last change of a key is written.
    fn set(&mut self, key: Vec<u8>, value: Option<Vec<u8>>) {
        self.changes.insert(key, value);
    }

    /// Returns the number of the last change.
    pub fn made(&self) -> u64 {
        self.made
    }

    pub fn changes(&self) -> &BTreeMap<Vec<u8>, Option<Vec<u8>>> {
        &self.changes
    }

    /// Records that the changes were appended.
    pub fn appended(&mut self, ticket: Ticket) {
        self.changes.clear();
        self.refused = false;
        self.appended.push_back((self.made, ticket));
    }

    pub fn is_appended(&self, number: u64) -> bool {
        number <= self.durable || self.appended.back().is_some_and(|(upto, _)| number <= *upto)
    }

    pub fn settle(&mut self, durable: Ticket) {
        while let Some((upto, ticket)) = self.appended.front()
            && *ticket <= durable
        {
            self.durable = *upto;
            self.appended.pop_front();
        }
    }

    pub fn has_appended(&self) -> bool {
        !self.appended.is_empty()
    }

    /// Returns the ticket with which a change is durable; `None` if it is not appended.
    pub fn ticket(&self, number: u64) -> Option<Ticket> {
        self.appended.iter().find(|(upto, _)| number <= *upto).map(|(_, ticket)| *ticket)
    }

    /// Returns whether a restart would have to read or send much again.
    pub fn wants_note(&self, positions: &[u64]) -> bool {
        let far = |(at, noted): (&u64, &u64)| at.saturating_sub(*noted) >= NOTE_EVERY_MESSAGES;
        self.changed
            || self.note_due
            || !self.filters.is_empty()
            || positions.iter().zip(&self.noted).any(far)
    }

    /// Returns the note. `positions` are positions that live delivery has reached, read before the
    /// outbox was locked; changes up to `with` are in the same append. Of `queue`, messages that can be
    /// found again in their stream come last.
    #[expect(clippy::too_many_arguments, reason = "each is one part of the outbox, or a bound")]
    pub fn note<'q>(
        &mut self,
        positions: &[u64],
        from: &[u64],
        mut unlisted: Unlisted,
        inflight: impl Iterator<Item = &'q InFlight>,
        queue: impl Iterator<Item = &'q Queued>,
        bytes_max: usize,
        with: u64,
    ) -> Change {
        let mut entries = Vec::new();
        let mut before = Before::default();
        let mut upto: Box<[u64]> =
            positions.iter().zip(from).map(|(position, from)| *position.max(from)).collect();
        let mut left_out: Box<[Option<u64>]> = vec![None; upto.len()].into();
        let mut add = |queued: &Queued, packet_id: u16| {
            let place = match queued.source {
                Source::Stream { stream, offset } if !queued.apart => Some((usize::from(stream), offset)),
                _ => None,
            };
            // Once one of a stream is left out, so are all that follow it. They may lie before it:
            // what is passed on comes first here.
            if let Some((stream, offset)) = place
                && let Some(first) = &mut left_out[stream]
            {
                *first = offset.min(*first);
                return;
            }
            let mark = (entries.len(), before);
            put_entry(&mut entries, &mut before, queued, packet_id);
            let is_listed = entries.len() <= bytes_max;
            if !is_listed {
                entries.truncate(mark.0);
                before = mark.1;
            }
            match place {
                Some((stream, offset)) if is_listed => upto[stream] = upto[stream].max(offset + 1),
                Some((stream, offset)) => left_out[stream] = Some(offset),
                None if is_listed => {}
                None => unlisted.add(queued),
            }
        };
        for flight in inflight {
            match &flight.waiting {
                Some(queued) if queued.qos == 1 => add(queued, flight.packet_id),
                // It has no record yet, also not by the append that this note goes with.
                Some(queued) if flight.after > with && !self.is_appended(flight.after) => add(queued, 0),
                _ => {}
            }
        }
        for queued in &self.passing_on {
            add(queued, 0);
        }
        for queued in queue.filter(|queued| queued.qos > 0) {
            add(queued, 0);
        }
        for (upto, left_out) in upto.iter_mut().zip(&left_out) {
            *upto = left_out.unwrap_or(*upto);
        }
        let mut value = vec![FORMAT];
        put_parts(&mut value, &self.streams, &upto, |stream| unlisted.part(stream).clone());
        value.extend(entries);
        self.noted = upto;
        (self.changed, self.note_due) = (false, false);
        (key(NOTE, self.epoch, &[]), Some(value))
    }

    /// Returns all keys that the session may have in the broker's stream.
    pub fn keys(&self, inflight: impl Iterator<Item = u16>) -> Vec<Vec<u8>> {
        let sent = self.streams.iter().zip(&self.sent).filter(|(_, sent)| **sent > 0);
        let sent = sent.map(|(identity, _)| key(SENT, self.epoch, &identity_bytes(identity)));
        let steps = inflight.map(|id| key(STEP, self.epoch, &id.to_be_bytes()));
        // Removals that were not appended yet.
        let open = self.changes.iter().filter(|(_, value)| value.is_none()).map(|(key, _)| key.clone());
        let filters = self.filters.iter().filter(|(_, options)| options.is_none());
        let open = open.chain(filters.map(|(filter, _)| subscription_key(self.epoch, filter)));
        [key(NOTE, self.epoch, &[])].into_iter().chain(sent).chain(steps).chain(open).collect()
    }
}

/// Returns the most bytes of one session's note.
pub fn note_bytes_max(sessions: usize) -> usize {
    (NOTES_BYTES_MAX / sessions.max(1)).clamp(96, STATE_VALUE_BYTES_MAX / 2)
}

/// Finds a retained message by its id and the time at which it was received.
pub type FindRetained<'a> = &'a dyn Fn(&Id, u64) -> Option<Arc<Message>>;

/// The records of one session's outbox in the broker's stream.
#[derive(Default)]
pub struct Found {
    note: Option<Vec<u8>>,
    steps: Vec<(u16, Vec<u8>)>,
    sent: Vec<(Vec<u8>, u64)>,
    /// The records of shares of which the session is the heir.
    pub shares: Vec<FoundShare>,
}

/// An outbox as it was, or as far as it is known.
pub struct Restored {
    pub kept: Kept,
    /// Position for each stream: earlier messages are listed or complete. It is the end of the stream if
    /// nothing is known.
    pub from: Box<[u64]>,
    /// For each stream, the part with unlisted messages that members of a share gave the session.
    pub unlisted: Parts,
    /// For the shares of which the session is the heir: the parts of the streams that the record does
    /// not list, which the members of the share are to be offered.
    pub owed: Vec<(ShareFilter, Parts)>,
    pub inflight: Vec<InFlight>,
    pub queue: Vec<Queued>,
    /// Number of noted messages that their streams do not have.
    pub lost: usize,
}

impl Found {
    /// Adds a record, given its key without prefix and epoch. Returns false if the record is invalid.
    pub fn add(&mut self, kind: &[u8], rest: &[u8], value: &[u8]) -> bool {
        match (kind, rest.len()) {
            (NOTE, 0) => self.note = Some(value.to_vec()),
            (STEP, 2) => self.steps.push((u16::from_be_bytes([rest[0], rest[1]]), value.to_vec())),
            (SENT, IDENTITY_BYTES) => match <[u8; 8]>::try_from(value) {
                Ok(value) => self.sent.push((rest.to_vec(), u64::from_be_bytes(value))),
                Err(_) => return false,
            },
            _ => return false,
        }
        true
    }

    /// Restores the outbox. `ends` are the ends of the streams, and `valid` the offsets up to which they
    /// have the messages to which the records refer.
    pub fn restore(
        self,
        epoch: u64,
        streams: Arc<[Identity]>,
        ends: &[u64],
        valid: &[u64],
        retained: FindRetained<'_>,
    ) -> Restored {
        let number = |identity: &[u8]| {
            streams.iter().position(|known| identity_bytes(known) == identity).map(|at| at as u16)
        };
        let mut kept = Kept::new(epoch, streams.clone());
        for (identity, sent) in &self.sent {
            if let Some(number) = number(identity) {
                kept.restore_sent(number.into(), *sent, valid[usize::from(number)]);
            }
        }
        let mut steps: Vec<(u64, InFlight)> = Vec::new();
        for (packet_id, value) in &self.steps {
            let mut rest = Reader(value);
            let (Some(phase), Some(made)) = (rest.byte(), rest.number()) else { continue };
            let format = match phase {
                PHASE_SENT => Some(FORMAT),
                PHASE_SENT_1 => Some(FORMAT_1),
                _ => None,
            };
            let waiting = format.map(|format| {
                let numbers = [number(rest.bytes(IDENTITY_BYTES)?)];
                rest.entry(format, &mut Before::default(), &numbers, retained)
            });
            // What cannot be sent again is ended with a PUBREL, that its id gets free at the client too.
            let waiting = waiting.flatten().and_then(|(queued, _)| queued);
            let record = (STEP.len() + size_of_val(&epoch) + size_of_val(packet_id) + value.len()) as u32;
            steps.push((made, InFlight { packet_id: *packet_id, waiting, after: 0, dup: true, record }));
            kept.steps_bytes += record as usize;
            kept.made = kept.made.max(made);
        }
        steps.sort_unstable_by_key(|(made, _)| *made);
        kept.durable = kept.made;
        let mut restored = Restored {
            from: ends.into(),
            unlisted: ends.iter().map(|_| 0..0).collect(),
            owed: Vec::new(),
            inflight: steps.into_iter().map(|(_, flight)| flight).collect(),
            queue: Vec::new(),
            kept,
            lost: 0,
        };
        if let Some(note) = &self.note {
            let _ = restored.read_note(&mut Reader(note), &number, retained);
            restored.go_back(valid);
        }
        if !self.shares.is_empty() {
            let known = restored.known_by_share();
            for share in &self.shares {
                let parts = restored.inherit(share, &number, ends, valid, &known);
                restored.owed.push((share.filter.clone(), parts));
            }
        }
        restored.leave_out_lost(valid);
        restored.kept.noted = restored.from.clone();
        restored.kept.changed = restored.kept.is_stale || !self.shares.is_empty();
        restored
    }
}

impl Restored {
    /// Goes back to where the streams have other messages than the noted ones, or none, because the data
    /// folder was restored in parts or a stream lost its end.
    fn go_back(&mut self, valid: &[u64]) {
        for (from, valid) in self.from.iter_mut().zip(valid) {
            self.kept.is_stale |= *from > *valid;
            *from = (*from).min(*valid);
        }
        for (part, valid) in self.unlisted.iter_mut().zip(valid) {
            part.end = part.end.min(*valid);
        }
    }

    /// Removes messages that the streams do not have.
    fn leave_out_lost(&mut self, valid: &[u64]) {
        let is_lost = |queued: &Queued| match queued.source {
            Source::Stream { stream, offset } => {
                valid.get(usize::from(stream)).is_some_and(|valid| offset >= *valid)
            }
            Source::Retained(_) | Source::Broker(_) => false,
        };
        let before = self.queue.len() + self.inflight.len();
        self.queue.retain(|queued| !is_lost(queued));
        self.inflight.retain(|flight| {
            !flight.waiting.as_ref().is_some_and(|queued| queued.qos == 1 && is_lost(queued))
        });
        self.lost = before - self.queue.len() - self.inflight.len();
        for flight in &mut self.inflight {
            if flight.waiting.take_if(|queued| is_lost(queued)).is_some() {
                self.lost += 1;
                // Ended with a PUBREL, that its id gets free at the client too.
                self.kept.release(flight);
            }
        }
        self.kept.is_stale |= self.lost > 0;
    }

    /// Reads a note as far as it is valid.
    fn read_note(
        &mut self,
        note: &mut Reader<'_>,
        number: &dyn Fn(&[u8]) -> Option<u16>,
        retained: FindRetained<'_>,
    ) -> Option<()> {
        let format = note.byte().filter(|format| [FORMAT, FORMAT_2, FORMAT_1].contains(format))?;
        // A stream that the note does not know is newer: all of it.
        let mut from: Box<[u64]> = vec![0; self.from.len()].into();
        let mut unlisted = self.unlisted.clone();
        let mut numbers = Vec::new();
        for (known, upto, part) in note.parts(format, number)? {
            if let Some(known) = known.map(usize::from) {
                from[known] = upto;
                unlisted[known] = part;
            }
            numbers.push(known);
        }
        (self.from, self.unlisted) = (from, unlisted);
        let mut before = Before::default();
        let mut shares: HashSet<ShareFilter> = HashSet::new();
        while !note.0.is_empty() {
            let (queued, packet_id) = note.entry(format, &mut before, &numbers, retained)?;
            let Some(mut queued) = queued else { continue };
            // Each text once, however many messages came by it.
            if let Some(share) = &mut queued.share {
                match shares.get(&**share) {
                    Some(known) => *share = known.clone(),
                    None => drop(shares.insert(share.clone())),
                }
            }
            let is_sent = queued.qos == 2
                && !queued.apart
                && matches!(queued.source, Source::Stream { stream, offset } if self.kept.was_sent(stream, offset));
            match packet_id {
                _ if is_sent => {}
                0 => self.queue.push(queued),
                _ => {
                    let waiting = Some(queued);
                    self.inflight.push(InFlight { packet_id, waiting, after: 0, dup: true, record: 0 });
                }
            }
        }
        Some(())
    }
}

/// The previous entry, from which most entries differ little.
#[derive(Clone, Copy, Default)]
pub(super) struct Before {
    offset: u64,
    seconds: u64,
}

/// A stream's index, if it is known, the position up to which messages are listed, and the part with
/// unlisted messages.
pub(super) type StreamPart = (Option<u16>, u64, Range<u64>);

/// Encodes for each stream the listed position and the part with unlisted messages.
pub(super) fn put_parts(
    out: &mut Vec<u8>,
    streams: &[Identity],
    upto: &[u64],
    unlisted: impl Fn(usize) -> Range<u64>,
) {
    put_number(out, streams.len() as u64);
    for (stream, (identity, upto)) in streams.iter().zip(upto).enumerate() {
        out.extend(identity_bytes(identity));
        put_number(out, *upto);
        let part = unlisted(stream);
        put_number(out, part.end.saturating_sub(part.start));
        if !part.is_empty() {
            put_number(out, part.start);
        }
    }
}

pub(super) fn put_entry(out: &mut Vec<u8>, before: &mut Before, queued: &Queued, packet_id: u16) {
    let flag = |is: bool, bit: u8| if is { bit } else { 0 };
    let is_retained = matches!(queued.source, Source::Retained(_));
    out.push(
        queued.qos
            | flag(queued.retain, RETAIN)
            | flag(queued.apart, APART)
            | flag(packet_id != 0, IN_FLIGHT)
            | flag(queued.own_id() != 0, IDS)
            | flag(queued.share.is_some(), SHARE)
            | flag(is_retained, RETAINED),
    );
    match &queued.source {
        Source::Stream { stream, offset } => {
            put_number(out, u64::from(*stream));
            put_number(out, zigzag(offset.wrapping_sub(before.offset)));
            before.offset = *offset;
        }
        Source::Retained(message) => {
            out.extend(retained::id(message.topic()));
            put_number(out, message.received_us());
        }
        Source::Broker(_) => {}
    }
    if !is_retained {
        let seconds = queued.since_us / 1_000_000;
        put_number(out, zigzag(seconds.wrapping_sub(before.seconds)));
        before.seconds = seconds;
    }
    put_number(out, u64::from(queued.len));
    if packet_id != 0 {
        out.extend(packet_id.to_be_bytes());
    }
    if queued.own_id() != 0 {
        put_number(out, u64::from(queued.own_id()));
    }
    if let Some(share) = &queued.share {
        put_bytes(out, share.as_bytes());
    }
}

/// Encodes a number in LEB128.
fn put_number(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_number(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn zigzag(difference: u64) -> u64 {
    let signed = difference as i64;
    ((signed << 1) ^ (signed >> 63)) as u64
}

fn unzigzag(number: u64) -> u64 {
    (number >> 1) ^ (number & 1).wrapping_neg()
}

/// Reads from the front of the bytes, and returns `None` at their end.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(bytes)
    }

    fn number(&mut self) -> Option<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(number);
            }
        }
        None
    }

    fn text(&mut self) -> Option<&'a str> {
        let len = self.number()?;
        std::str::from_utf8(self.bytes(usize::try_from(len).ok()?)?).ok()
    }

    /// Decodes the output of [`put_parts`].
    pub(super) fn parts(
        &mut self,
        format: u8,
        number: &dyn Fn(&[u8]) -> Option<u16>,
    ) -> Option<Vec<StreamPart>> {
        let mut parts = Vec::new();
        for _ in 0..self.number()? {
            let known = number(self.bytes(IDENTITY_BYTES)?);
            let upto = self.number()?;
            let len = if format == FORMAT { self.number()? } else { 0 };
            let start = if len > 0 { self.number()? } else { 0 };
            parts.push((known, upto, start..start.saturating_add(len)));
        }
        Some(parts)
    }

    /// Decodes an entry and its packet id. The entry is `None` if its message no longer exists.
    pub(super) fn entry(
        &mut self,
        format: u8,
        before: &mut Before,
        streams: &[Option<u16>],
        retained: FindRetained<'_>,
    ) -> Option<(Option<Queued>, u16)> {
        let flags = self.byte()?;
        let (source, since_us);
        if flags & RETAINED != 0 {
            let id = match format {
                FORMAT_1 => retained::id(self.text()?),
                _ => *self.bytes(size_of::<Id>())?.first_chunk()?,
            };
            since_us = u64::MAX;
            source = retained(&id, self.number()?).map(Source::Retained);
        } else {
            // A step's record names its stream itself.
            let stream = usize::try_from(self.number()?).ok()?;
            let stream = if let [only] = streams { only } else { streams.get(stream)? };
            before.offset = before.offset.wrapping_add(unzigzag(self.number()?));
            before.seconds = before.seconds.wrapping_add(unzigzag(self.number()?));
            since_us = before.seconds.saturating_mul(1_000_000);
            source = stream.map(|stream| Source::Stream { stream, offset: before.offset });
        }
        let len = self.number()? as u32;
        let packet_id = if flags & IN_FLIGHT == 0 {
            0
        } else {
            let id = self.bytes(2)?;
            u16::from_be_bytes([id[0], id[1]])
        };
        let mut own_id = 0;
        if flags & IDS != 0 {
            let count = if format == FORMAT_1 { self.number()? } else { 1 };
            for _ in 0..count {
                own_id = self.number()? as u32;
            }
        }
        let share = if flags & SHARE != 0 { Some(Arc::new(self.text()?.into())) } else { None };
        // Those of a stream's message are found again when it is read.
        let is_own = share.is_some() || flags & RETAINED != 0;
        let queued = source.map(|source| Queued {
            source,
            body: None,
            since_us,
            len,
            qos: (flags & 3).min(2),
            retain: flags & RETAIN != 0,
            apart: flags & APART != 0,
            may_be_again: packet_id != 0,
            ids: Ids::one(if is_own { own_id } else { 0 }),
            share,
        });
        Some((queued, packet_id))
    }
}

fn identity_bytes(identity: &Identity) -> [u8; IDENTITY_BYTES] {
    let mut bytes = [0; IDENTITY_BYTES];
    bytes[..16].copy_from_slice(identity.log.as_bytes());
    bytes[16..].copy_from_slice(&identity.generation.to_be_bytes());
    bytes
}

pub fn key(kind: &[u8], epoch: u64, rest: &[u8]) -> Vec<u8> {
    [kind, &epoch.to_be_bytes(), rest].concat()
}
