//! Messages that a step or a sink refused, in a stream of their own.
//!
//! A letter is the message as the refusing step or sink saw it, with what
//! happened in its properties ([`Letter`]), and names the sinks that have not
//! had the message. It is keyed by where it came from (log, generation, offset,
//! pipeline, step or sink, index) for each of them, so that a batch that is
//! delivered again after a crash does not make a second letter, and a message
//! that has a letter for a sink does not become a row there as well.
//! Order of effects: `host/decisions/delivery-order.md`.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::known::{Known, Piece, Reader, Seen, Stale};
use super::letter::{self, Letter};
use super::metrics;
use super::routes::SinkNumber;
use crate::batch::{Batch, MessageRef, Offset, Partition};
use crate::step::RefusedKind;
use crate::stream::{
    AppendError, Attachment, Identity, NewMessage, OnLag, Read, ReadError, StateChange, Stream, Ticket,
    partition_of,
};

/// Keys remembered at or above the slowest sink's position, one a letter and
/// sink it names, about 50 bytes each; past it refusals wait until that sink
/// has moved.
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
    /// Of the message in its source, whatever the steps made of it.
    pub partition: Partition,
    /// Among the messages of the same offset that the step or sink saw.
    pub index: u32,
    /// The only one of them.
    pub alone: bool,
    /// With it all of them are refused: nothing else is left of the message.
    pub closes: bool,
}

impl Refusal<'_> {
    pub fn piece(&self) -> Piece {
        if self.alone { Piece::WHOLE } else { Piece::of(self.source, self.index) }
    }
}

/// What [`DeadLetters::refuse`] did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Refused {
    /// Covers every letter so far.
    pub ticket: Ticket,
    /// New letters.
    pub letters: u64,
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
    /// Of the pipeline, in its order.
    sinks: Vec<String>,
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

impl DeadLetters {
    /// Reads the keys of letters that may still be redelivered.
    pub async fn open(
        stream: Arc<dyn Stream>,
        pipeline: &str,
        sinks: Vec<String>,
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
            known: Mutex::new(Known::new(sinks.len(), source.partitions)),
            sinks,
            source,
            source_name: source_name.to_owned(),
            scan_key,
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

    /// Puts messages into dead letters, each once for each of the readers'
    /// sinks that has not had it, however often it is refused. Waits while they
    /// are full. The letters survive a crash once [`Self::durable`] returns for
    /// the ticket, which covers those of other lanes too.
    pub async fn refuse(&self, refusals: &[Refusal<'_>], readers: &mut [Reader]) -> Result<Refused, Error> {
        let mut done = Refused { ticket: self.lock().ticket, letters: 0 };
        let names_bytes = self.sinks.iter().map(|name| name.len() + 1).sum::<usize>();
        let mut rest = refusals;
        while !rest.is_empty() {
            let mut bytes = 0;
            let fits = rest
                .iter()
                .take(APPEND_LETTERS_MAX)
                .take_while(|refusal| {
                    bytes += letter::bytes_estimate(refusal, names_bytes);
                    bytes <= APPEND_BYTES_MAX
                })
                .count()
                .max(1);
            let (chunk, after) = rest.split_at(fits);
            let appended = self.append(chunk, readers).await?;
            done = Refused { ticket: appended.ticket, letters: done.letters + appended.letters };
            rest = after;
        }
        Ok(done)
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

    /// What readers for these sinks know before they run the messages from
    /// `first` to `last`. `None`: none of them has a letter.
    pub fn seen(
        &self,
        sinks: impl Iterator<Item = SinkNumber>,
        first: Offset,
        last: Offset,
    ) -> Option<Vec<Reader>> {
        if first >= self.check_below() {
            return None;
        }
        let known = self.lock();
        let readers: Vec<_> =
            sinks.map(|sink| Reader { sink, seen: known.seen(sink, first, last) }).collect();
        readers.iter().any(|reader| !reader.seen.is_empty()).then_some(readers)
    }

    /// Whether a sink refused this row before.
    pub fn has_row(&self, sink: SinkNumber, offset: Offset, index: u32) -> bool {
        let own = Piece::of(Source::Sink(&self.sinks[sink]), index);
        let seen = self.lock().seen(sink, offset, offset);
        seen.has_whole(offset) || seen.has(offset, own)
    }

    /// As [`Known::take`].
    pub fn take(
        &self,
        sink: SinkNumber,
        batches: &[Batch],
        seen: &Seen,
        partitions: impl Iterator<Item = usize>,
        upto: Offset,
    ) -> Result<Vec<(usize, usize)>, Stale> {
        self.lock().take((sink, &self.sinks[sink]), batches, seen, partitions, upto)
    }

    /// As [`Known::set_received`].
    pub fn set_received(&self, sink: SinkNumber, received: &[Offset]) {
        self.lock().set_received(sink, received);
    }

    /// Messages at or above it cannot have a letter yet.
    pub fn check_below(&self) -> Offset {
        Offset(self.check_below.load(Ordering::Acquire))
    }

    /// One lane reads: only what has a letter now can come again.
    pub fn check_redelivered(&self) {
        let highest = self.lock().highest().map_or(0, |offset| offset.0 + 1);
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
        known.forget_below(offset);
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

    async fn append(&self, refusals: &[Refusal<'_>], readers: &mut [Reader]) -> Result<Refused, Error> {
        loop {
            let room = self.forgotten.notified();
            let error = match self.try_append(refusals, readers) {
                Ok(Some(appended)) => {
                    *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = None;
                    return Ok(appended);
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

    /// `None`: too many keys. Who the letters name is decided with the append.
    fn try_append(
        &self,
        refusals: &[Refusal<'_>],
        readers: &mut [Reader],
    ) -> Result<Option<Refused>, AppendError> {
        let mut known = self.lock();
        let fresh: Vec<_> = refusals
            .iter()
            .map(|refusal| (refusal, known.names(refusal, readers)))
            .filter(|(_, names)| !names.is_empty())
            .collect();
        if fresh.is_empty() {
            return Ok(Some(Refused { ticket: known.ticket, letters: 0 }));
        }
        if known.len() + fresh.iter().map(|(_, names)| names.len()).sum::<usize>() > KEYS_MAX {
            return Ok(None);
        }
        let mut trimmed = 0;
        let properties: Vec<Vec<u8>> = fresh
            .iter()
            .map(|(refusal, names)| {
                let names: Vec<_> = names.iter().map(|sink| &*self.sinks[*sink]).collect();
                let (bytes, whole) =
                    letter::properties(refusal, &names, &self.pipeline, &self.source_name, &self.source);
                trimmed += u64::from(!whole);
                bytes
            })
            .collect();
        let partitions = self.stream.identity().partitions;
        let messages: Vec<_> = fresh
            .iter()
            .zip(&properties)
            .map(|((refusal, _), properties)| new_message(&refusal.message, properties, partitions))
            .collect();
        // Where a start begins to read keys: rides in the same frame.
        let from = known.order.front().map_or(self.stream.bounds().end.0, |(at, _)| *at);
        let scan = [from.to_le_bytes(), known.floor.to_le_bytes()].concat();
        let scan = StateChange { key: self.scan_key.as_bytes(), value: Some(&scan) };
        let appended = self.stream.append(&messages, &[scan])?;
        known.ticket = known.ticket.max(appended.ticket);
        for (i, (refusal, names)) in fresh.iter().enumerate() {
            known.note(refusal, names, readers);
            known.order.push_back((appended.first.0 + i as u64, refusal.message.offset().0));
        }
        // All of one call come from one step or sink.
        let (Source::Step(source) | Source::Sink(source)) = fresh[0].0.source;
        metrics::dead_letters(&self.pipeline, source).increment(fresh.len() as u64);
        if trimmed > 0 {
            metrics::properties_dropped(&self.pipeline).increment(trimmed);
        }
        Ok(Some(Refused { ticket: known.ticket, letters: fresh.len() as u64 }))
    }

    async fn scan(&self, from: Offset) -> Result<(), Error> {
        let end = self.stream.bounds().end;
        let mut cursor = self.stream.cursor(from);
        let mut keys = Vec::new();
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
                let named = (0..self.sinks.len()).filter(|sink| letter.names(&self.sinks[*sink]));
                for sink in named {
                    keys.push((sink, Offset(letter.offset), letter.piece()));
                    if letter.whole {
                        keys.push((sink, Offset(letter.offset), Piece::WHOLE));
                    }
                }
                order.push_back((message.offset().0, letter.offset));
            }
        }
        let mut known = self.lock();
        for (sink, offset, piece) in keys {
            known.insert(sink, offset, piece);
        }
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
