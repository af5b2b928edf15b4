//! Messages that a step or a sink refused, in a stream of their own.
//!
//! A letter is the message as the refusing step or sink saw it, with what
//! happened in its properties ([`Letter`]). It is keyed by where it came from
//! (log, generation, offset, pipeline, step or sink, index), so that a batch
//! that is delivered again after a crash does not make a second letter, and a
//! message that has a letter does not become a row as well.
//! Order of effects: `host/decisions/delivery-order.md`.

use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use xxhash_rust::xxh3::xxh3_64;

use super::letter::{self, Letter};
use super::metrics;
use crate::batch::{MessageRef, Offset};
use crate::step::RefusedKind;
use crate::stream::{
    AppendError, Attachment, Identity, NewMessage, OnLag, Read, ReadError, StateChange, Stream, Ticket,
    partition_of,
};

/// Keys remembered at or above the slowest sink's position, about 50 bytes
/// each; past it refusals wait until that sink has moved.
const KEYS_MAX: usize = 1_000_000;
/// Letters and bytes of one append; half of the smallest commit buffer.
const APPEND_LETTERS_MAX: usize = 256;
const APPEND_BYTES_MAX: usize = 512 << 10;
/// State key of the place in the dead letters from which a start reads its keys.
const SCAN_KEY: &str = "dead-letters/scan/";

/// Who refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source<'a> {
    Step(&'a str),
    Sink(&'a str),
}

/// A message to be put into dead letters.
#[derive(Clone, Copy, Debug)]
pub struct Refusal<'a> {
    pub message: MessageRef<'a>,
    pub source: Source<'a>,
    pub kind: RefusedKind,
    pub reason: &'a str,
    /// Among the messages of the same offset that the step or sink saw.
    pub index: u32,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    #[error("dead letters: {0}")]
    Append(#[from] AppendError),
    #[error("dead letters: {0}")]
    Read(#[from] ReadError),
}

/// The dead letters of one pipeline, of messages from one stream.
pub struct DeadLetters {
    stream: Arc<dyn Stream>,
    pipeline: Arc<str>,
    source: Identity,
    source_name: String,
    scan_key: String,
    known: Mutex<Known>,
    forgotten: Notify,
    /// Offsets below it may have letters already: redelivered, or read by two lanes.
    check_below: AtomicU64,
    attachment: Box<dyn Attachment>,
    waiting: Mutex<Option<String>>,
}

#[derive(Default)]
struct Known {
    /// (offset, hash of source and index)
    keys: BTreeSet<(u64, u64)>,
    /// (offset in the dead letters, offset in the source), in the order of appends.
    order: VecDeque<(u64, u64)>,
    /// Keys below it are not here.
    floor: u64,
    ticket: Ticket,
}

impl DeadLetters {
    /// Reads the keys of letters that may still be redelivered.
    pub async fn open(
        stream: Arc<dyn Stream>,
        pipeline: &str,
        source: Identity,
        source_name: &str,
    ) -> Result<Self, Error> {
        let scan_key = format!("{SCAN_KEY}{pipeline}/{}/{}", source.log, source.generation);
        let (from, floor) = stream
            .state(scan_key.as_bytes())
            .into_iter()
            .find(|(key, _)| key == scan_key.as_bytes())
            .and_then(|(_, value)| {
                let (from, floor) = value.split_first_chunk::<8>()?;
                Some((u64::from_le_bytes(*from), u64::from_le_bytes(floor.try_into().ok()?)))
            })
            .unwrap_or((0, 0));
        let from = Offset(from).max(stream.bounds().start);
        let attachment = stream.attach(&format!("{pipeline}/{source_name}/dead-letters"), from, OnLag::Block);
        let letters = Self {
            stream,
            pipeline: pipeline.into(),
            source,
            source_name: source_name.to_owned(),
            scan_key,
            known: Mutex::default(),
            forgotten: Notify::new(),
            check_below: AtomicU64::new(0),
            attachment,
            waiting: Mutex::default(),
        };
        letters.scan(from).await?;
        letters.lock().floor = floor;
        letters.check_redelivered();
        Ok(letters)
    }

    /// Puts messages into dead letters, each once however often it is refused.
    /// Waits while they are full. The letters survive a crash once
    /// [`Self::durable`] returns for the ticket.
    pub async fn refuse(&self, refusals: &[Refusal<'_>]) -> Result<Ticket, Error> {
        let mut ticket = self.lock().ticket;
        let mut rest = refusals;
        while !rest.is_empty() {
            let mut bytes = 0;
            let fits = rest
                .iter()
                .take(APPEND_LETTERS_MAX)
                .take_while(|refusal| {
                    bytes += letter::bytes_estimate(refusal);
                    bytes <= APPEND_BYTES_MAX
                })
                .count()
                .max(1);
            let (chunk, after) = rest.split_at(fits);
            ticket = self.append(chunk).await?;
            rest = after;
        }
        Ok(ticket)
    }

    /// Returns once everything up to `ticket` survives a crash.
    pub async fn durable(&self, ticket: Ticket) -> Result<(), Error> {
        if ticket == Ticket::default() {
            return Ok(());
        }
        let mut durable = self.stream.durable();
        let reached = durable.wait_for(|reached| *reached >= ticket).await.is_ok();
        if reached { Ok(()) } else { Err(AppendError::Stopped(self.stream.stopped().await).into()) }
    }

    /// Whether a message has a letter. Only asked below [`Self::check_below`].
    pub fn contains(&self, source: Source<'_>, offset: Offset, index: u32) -> bool {
        self.lock().keys.contains(&(offset.0, hash(source, index)))
    }

    /// Whether any message from `first` to `last` has a letter, of whatever source.
    pub fn any_within(&self, first: Offset, last: Offset) -> bool {
        self.lock().keys.range((first.0, 0)..=(last.0, u64::MAX)).next().is_some()
    }

    /// Messages at or above it cannot have a letter yet.
    pub fn check_below(&self) -> Offset {
        Offset(self.check_below.load(Ordering::Acquire))
    }

    /// One lane reads: only what has a letter now can come again.
    pub fn check_redelivered(&self) {
        let highest = self.lock().keys.last().map_or(0, |(offset, _)| offset + 1);
        self.check_below.store(highest, Ordering::Release);
    }

    /// Several lanes read the same messages: each may have a letter already.
    pub fn check_all(&self) {
        self.check_below.store(u64::MAX, Ordering::Release);
    }

    /// The append that covers every letter so far.
    pub fn ticket(&self) -> Ticket {
        self.lock().ticket
    }

    /// A reader starts at `from`: makes sure that the keys from there on are known.
    pub async fn remember_from(&self, from: Offset) -> Result<(), Error> {
        if from.0 < self.lock().floor {
            self.scan(self.stream.bounds().start).await?;
            self.lock().floor = from.0;
        }
        Ok(())
    }

    /// Every sink and every worker of a lane is past `offset`: nothing below
    /// comes again.
    pub fn forget_below(&self, offset: Offset) {
        let mut known = self.lock();
        if offset.0 <= known.floor {
            return;
        }
        known.floor = offset.0;
        known.keys = known.keys.split_off(&(offset.0, 0));
        while known.order.front().is_some_and(|(_, from)| *from < offset.0) {
            known.order.pop_front();
        }
        if let Some((at, _)) = known.order.front() {
            self.attachment.advance(Offset(*at));
        } else {
            self.attachment.advance(self.stream.bounds().end);
        }
        drop(known);
        self.forgotten.notify_waiters();
    }

    /// Nothing that it remembers comes again: retention need not keep letters for it.
    pub fn release(&self) {
        self.attachment.detach();
    }

    /// Why refusals wait, if they do.
    pub fn waiting(&self) -> Option<String> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn append(&self, refusals: &[Refusal<'_>]) -> Result<Ticket, Error> {
        loop {
            let room = self.forgotten.notified();
            let error = match self.try_append(refusals) {
                Ok(Some(ticket)) => {
                    *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = None;
                    return Ok(ticket);
                }
                Ok(None) => {
                    self.wait_because("a sink that does not move pins a million dead letters");
                    room.await;
                    continue;
                }
                Err(error) => error,
            };
            match error {
                AppendError::Full => {}
                AppendError::NoSpace => self.wait_because(
                    "dead letters are full: look at them, then raise their retention or free disk space",
                ),
                AppendError::TooLarge(_) | AppendError::Stopped(_) => return Err(error.into()),
            }
            self.stream.writable().await;
        }
    }

    /// `None`: too many keys.
    fn try_append(&self, refusals: &[Refusal<'_>]) -> Result<Option<Ticket>, AppendError> {
        let mut known = self.lock();
        let fresh: Vec<_> = refusals
            .iter()
            .filter(|r| !known.keys.contains(&(r.message.offset().0, hash(r.source, r.index))))
            .collect();
        if fresh.is_empty() {
            return Ok(Some(known.ticket));
        }
        if known.keys.len() + fresh.len() > KEYS_MAX {
            return Ok(None);
        }
        let mut trimmed = 0;
        let properties: Vec<Vec<u8>> = fresh
            .iter()
            .map(|refusal| {
                let (bytes, whole) =
                    letter::properties(refusal, &self.pipeline, &self.source_name, &self.source);
                trimmed += u64::from(!whole);
                bytes
            })
            .collect();
        let partitions = self.stream.identity().partitions;
        let messages: Vec<_> = fresh
            .iter()
            .zip(&properties)
            .map(|(refusal, properties)| new_message(&refusal.message, properties, partitions))
            .collect();
        // Where a start begins to read keys: rides in the same frame.
        let from = known.order.front().map_or(self.stream.bounds().end.0, |(at, _)| *at);
        let scan = [from.to_le_bytes(), known.floor.to_le_bytes()].concat();
        let scan = StateChange { key: self.scan_key.as_bytes(), value: Some(&scan) };
        let appended = self.stream.append(&messages, &[scan])?;
        known.ticket = known.ticket.max(appended.ticket);
        for (i, refusal) in fresh.iter().enumerate() {
            let offset = refusal.message.offset().0;
            known.keys.insert((offset, hash(refusal.source, refusal.index)));
            known.order.push_back((appended.first.0 + i as u64, offset));
            let (Source::Step(source) | Source::Sink(source)) = refusal.source;
            metrics::dead_letters(&self.pipeline, source).increment(1);
        }
        if trimmed > 0 {
            metrics::properties_dropped(&self.pipeline).increment(trimmed);
        }
        Ok(Some(known.ticket))
    }

    async fn scan(&self, from: Offset) -> Result<(), Error> {
        let end = self.stream.bounds().end;
        let mut cursor = self.stream.cursor(from);
        let mut keys = BTreeSet::new();
        let mut order = VecDeque::new();
        while cursor.position() < end
            && let Some(read) = cursor.try_next().await?
        {
            let Read::Batch(batch) = read else { continue };
            for message in batch.messages() {
                let Some(letter) = Letter::of(&message) else { continue };
                if letter.is_copy() || !letter.is_from(&self.pipeline, &self.source) {
                    continue;
                }
                keys.insert((letter.offset, hash(letter.source(), letter.index)));
                order.push_back((message.offset().0, letter.offset));
            }
        }
        let mut known = self.lock();
        known.keys.append(&mut keys);
        // Appended meanwhile, and not read.
        let read_to = order.back().map_or(end.0, |(at, _)| end.0.max(at + 1));
        order.extend(known.order.iter().filter(|(at, _)| *at >= read_to));
        known.order = order;
        Ok(())
    }

    fn wait_because(&self, reason: &str) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.is_none() {
            tracing::warn!(pipeline = %self.pipeline, "{reason}");
            *waiting = Some(reason.to_owned());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A message of a batch as a new one, with other properties.
pub fn new_message<'a>(message: &MessageRef<'a>, properties: &'a [u8], partitions: u16) -> NewMessage<'a> {
    NewMessage {
        topic: message.topic(),
        payload: message.payload(),
        properties,
        route: message.route(),
        device: message.device(),
        partition: partition_of(message.device(), partitions),
        flags: message.entry.flags,
        received_us: message.entry.received_us,
        event_us: message.entry.event_us,
    }
}

/// Place of entry `i` among the entries of its offset.
pub fn index_within_offset(batch: &crate::batch::Batch, i: usize) -> u32 {
    let offset = batch.entries[i].offset;
    batch.entries[..i].iter().rev().take_while(|entry| entry.offset == offset).count() as u32
}

fn hash(source: Source<'_>, index: u32) -> u64 {
    let (tag, name) = match source {
        Source::Step(name) => (0, name),
        Source::Sink(name) => (1, name),
    };
    xxh3_64(name.as_bytes()) ^ xxh3_64(&((u64::from(index) << 1) | tag).to_le_bytes())
}
