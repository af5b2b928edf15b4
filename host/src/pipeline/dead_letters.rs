//! Messages that a step or a sink refused, in a stream of their own.
//!
//! A letter is the message as the refusing step or sink saw it, with what
//! happened in its properties ([`Letter`]), and names the sinks that have not
//! had the message. It is keyed by where it came from (log, generation, offset,
//! pipeline, step or sink, index) for each of them, so that a batch that is
//! delivered again after a crash does not make a second letter, and a message
//! that has a letter for a sink does not become a row there as well.
//! Order of effects: `host/decisions/delivery-order.md`.
//!
//! Letters that a sink may still meet again have a bounded room, given back as the
//! sinks commit. Nothing waits for room that only its own progress would bring: a
//! worker hands out what it is done with before it waits, and waits only for what
//! was handed out ([`Known::room_comes`]). A sink has the same room for itself, from
//! one commit to the next: its letters are needed until it has committed the rows
//! beside them, and for nobody else.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout_at};
use uuid::Uuid;

use super::ROUTES_STEP;
use super::again::Again;
use super::known::{Known, Piece, Reader, Remembered, Room, Seen, Stale};
use super::letter::{self, Letter, Names};
use super::marks::{MARK_PREFIX, Marks};
use super::metrics;
use super::missing::SentLetters;
use super::outlet::HandedOut;
use super::pass_letters::{Part, Told};
use super::routes::SinkNumber;
use crate::batch::{Batch, MessageRef, Offset, Partition};
use crate::step::RefusedKind;
use crate::stream::{
    AppendError, Attachment, Identity, NewMessage, OnLag, Opening, Read, ReadError, StateChange, Stream,
    Ticket, partition_of,
};

/// Keys remembered at or above each sink's position, one a letter and sink it
/// names, about 100 bytes each. Past it the steps' refusals wait until a sink has moved.
pub const KEYS_MAX: usize = if cfg!(test) { 4_096 } else { 1_000_000 };
/// Letters and bytes of one append; half of the smallest commit buffer.
const APPEND_LETTERS_MAX: usize = 256;
const APPEND_BYTES_MAX: usize = 512 << 10;
/// State key of the place in the dead letters from which a start reads its keys.
const SCAN_KEY: &str = "dead-letters/scan/";
/// State key of where a sink of a pipeline began, if not at the beginning.
const BEGUN_KEY: &str = "dead-letters/begun/";

/// Who refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source<'a> {
    Step(&'a str),
    /// No step did: the message has a route that the pipeline does not have. Apart from a step of that
    /// name, which hosts of earlier versions may have had.
    Routes,
    Sink(&'a str),
}

impl<'a> Source<'a> {
    /// The name in letters and metrics.
    pub fn name(self) -> &'a str {
        match self {
            Self::Step(name) | Self::Sink(name) => name,
            Self::Routes => ROUTES_STEP,
        }
    }
}

/// A message to be put into dead letters.
#[derive(Clone, Copy, Debug)]
pub struct Refusal<'a> {
    pub message: MessageRef<'a>,
    pub source: Source<'a>,
    pub kind: RefusedKind,
    pub reason: &'a str,
    /// Partition of the message in its source, whatever the steps made of it.
    pub partition: Partition,
    /// Among the messages of the same offset that the step or sink saw.
    pub index: u32,
    /// A [`StepHistory`](super::step_history::StepHistory) of the message; empty for a sink.
    pub steps: &'a str,
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
    /// Number of refusals, from the first on, that have their letters.
    pub done: usize,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    #[error("dead letters: {0}")]
    Append(#[from] AppendError),
    #[error("dead letters: {0}")]
    Read(#[from] ReadError),
}

/// Whether the stream that the sinks read has a letter from a pass of a redrive, by its partition and offset.
pub type OutHas = Box<dyn Fn(Uuid, Partition, Offset) -> bool + Send + Sync>;

/// The dead letters of one pipeline, of messages from one stream.
pub struct DeadLetters {
    stream: Arc<dyn Stream>,
    names: Names,
    /// Where each sink began in the source; 0: not known, or at the beginning.
    begun: Vec<AtomicU64>,
    source: Identity,
    openings: Vec<Opening>,
    source_name: String,
    scan_key: String,
    known: Mutex<Known>,
    /// Room was given back, or a sink has another lane.
    room_moved: Notify,
    /// Offsets below it may have letters already: redelivered, or read by two lanes.
    check_below: AtomicU64,
    attachment: Box<dyn Attachment>,
    /// Bytes of letters that a sink may still meet again: this pipeline's share.
    bytes_max: u64,
    /// Set in a redrive: which letters are sent again. It bounds its letters itself.
    again: Option<Again>,
    /// New letters so far.
    made: AtomicU64,
    sent: Arc<SentLetters>,
    out_has: OnceLock<OutHas>,
    waiting: Mutex<Waiters>,
}

/// Calls that wait for room, and what the last of them saw.
#[derive(Debug, Default)]
struct Waiters {
    count: usize,
    waiting: Option<Waiting>,
}

/// What refusals wait for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// Room in this pipeline's share, which these sinks hold, the one with most
    /// letters first.
    Sinks(Vec<SinkNumber>),
    /// Room in the log of the dead letters, which is full for all pipelines.
    Log,
}

impl DeadLetters {
    /// Reads the keys of letters that may still be redelivered from `source`.
    pub async fn open(
        stream: Arc<dyn Stream>,
        names: Names,
        source: &dyn Stream,
        bytes_max: u64,
        again: Option<Again>,
    ) -> Result<Self, Error> {
        let (source_name, openings) = (source.name(), source.openings());
        let source = source.identity();
        let pipeline = names.pipeline().to_owned();
        let sinks = names.sinks.len();
        let scan_key = |pipeline: &str| format!("{SCAN_KEY}{pipeline}/{}/{}", source.log, source.generation);
        let kept =
            |key: &str| stream.state(key.as_bytes()).into_iter().find(|(found, _)| found == key.as_bytes());
        // A redrive takes any letter.
        let mut keys = names.pipelines.iter().filter(|_| again.is_none());
        let saved = keys
            .find_map(|name| kept(&scan_key(name)))
            .and_then(|(_, value)| Scan::read(&value, &names))
            .unwrap_or_default();
        let begun = (0..sinks)
            .map(|sink| {
                let keys = names.pipelines.iter().flat_map(|pipeline| {
                    names.sinks[sink].iter().map(|name| begun_key(pipeline, name, &source))
                });
                let value = keys.into_iter().find_map(|key| kept(&key)).map(|(_, value)| value);
                let at = value.and_then(|value| value.try_into().ok()).map_or(0, u64::from_le_bytes);
                AtomicU64::new(at)
            })
            .collect();
        let from = Offset(saved.from).max(stream.bounds().start);
        // A pipeline whose letters wait must not hold back those of another: where
        // retention takes them before their sinks are past them, their messages are
        // decided anew after a restart.
        let attachment =
            stream.attach(&format!("{pipeline}/{source_name}/dead-letters"), from, OnLag::Detach);
        if again.is_some() {
            // Takes away the mark of a version whose redrives held retention back.
            attachment.detach();
        }
        let letters = Self {
            sent: Arc::new(SentLetters::new(Arc::clone(&stream), names.own())),
            stream,
            known: Mutex::new(Known::new(sinks, source.partitions)),
            bytes_max,
            again,
            begun,
            source,
            openings,
            source_name: source_name.to_owned(),
            scan_key: scan_key(&pipeline),
            names,
            out_has: OnceLock::new(),
            room_moved: Notify::new(),
            check_below: AtomicU64::new(0),
            attachment,
            made: AtomicU64::new(0),
            waiting: Mutex::default(),
        };
        letters.scan(from, None).await?;
        for (sink, floor) in saved.floors.into_iter().enumerate() {
            letters.lock().set_floor(sink, floor);
        }
        letters.check_redelivered();
        Ok(letters)
    }

    /// Puts messages into dead letters, each once for each of the readers'
    /// sinks that has not had it, however often it is refused. Waits while they
    /// are full, but for a redrive, where [`Refused::done`] says how many have their
    /// letters. The letters survive a crash once [`Self::durable`] returns for
    /// the ticket, which covers those of other lanes too.
    pub async fn refuse(&self, refusals: &[Refusal<'_>], readers: &mut [Reader]) -> Result<Refused, Error> {
        self.refuse_until(None, refusals, readers).await
    }

    /// As [`Self::refuse`], and gives up waiting for room at `until`: the
    /// refusals from [`Refused::done`] on then have no letter.
    pub async fn refuse_until(
        &self,
        until: Option<Instant>,
        refusals: &[Refusal<'_>],
        readers: &mut [Reader],
    ) -> Result<Refused, Error> {
        let mut refused = Refused { ticket: self.lock().ticket, ..Refused::default() };
        while let Some(chunk) = self.next_chunk(refusals, refused.done) {
            let Some(appended) = self.append(until, chunk, readers).await? else { break };
            refused = Refused {
                ticket: appended.ticket,
                letters: refused.letters + appended.letters,
                done: refused.done + appended.done,
            };
        }
        Ok(refused)
    }

    /// The refusals after the first `done` that go into one append.
    fn next_chunk<'a, 'b>(&self, refusals: &'a [Refusal<'b>], done: usize) -> Option<&'a [Refusal<'b>]> {
        let rest = &refusals[done..];
        let sinks = 0..self.names.sinks.len();
        let names_bytes = sinks.map(|sink| self.names.sink(sink).len() + 1).sum::<usize>();
        let mut bytes = 0;
        let fits = rest
            .iter()
            .take(APPEND_LETTERS_MAX)
            .take_while(|refusal| {
                bytes += letter::bytes_estimate(refusal, names_bytes);
                bytes <= APPEND_BYTES_MAX
            })
            .count();
        (!rest.is_empty()).then(|| &rest[..fits.max(1)])
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

    /// As [`Self::durable`], and gives up waiting at `until`. Returns whether
    /// everything up to `ticket` survives a crash.
    pub async fn durable_until(&self, until: Instant, ticket: Ticket) -> Result<bool, Error> {
        match timeout_at(until, self.durable(ticket)).await {
            Ok(durable) => durable.map(|()| true),
            Err(_) => Ok(false),
        }
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
        let own = Piece::of(Source::Sink(self.names.sink(sink)), index);
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
        self.lock().take((sink, self.names.sink(sink)), batches, seen, partitions, upto)
    }

    /// Shares what is known of letters that redrives have sent with the dead letters of another stream of
    /// the same pipeline.
    pub fn with_sent_of(mut self, other: &Self) -> Self {
        self.sent = Arc::clone(&other.sent);
        self
    }

    /// Says for each sink from where on messages come to it by another stream: see [`Known::set_until`].
    /// A message before that which has an open letter for that stream comes to the sink with the letter.
    /// `out_has` says which letters that stream has already.
    pub async fn set_until(
        &self,
        until: Vec<Option<Vec<Offset>>>,
        out_has: Option<OutHas>,
    ) -> Result<(), Error> {
        out_has.into_iter().for_each(|has| drop(self.out_has.set(has)));
        let has_bounds = until.iter().any(Option::is_some);
        for (sink, until) in until.into_iter().enumerate() {
            self.set_until_of(sink, until);
        }
        if has_bounds { self.scan(self.stream.bounds().start, None).await } else { Ok(()) }
    }

    /// As [`Known::set_until`].
    pub fn set_until_of(&self, sink: SinkNumber, until: Option<Vec<Offset>>) {
        self.lock().set_until(sink, until);
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

    /// A sink starts at `from`: makes sure that its keys from there on are known.
    pub async fn remember_from(&self, sink: SinkNumber, from: Offset) -> Result<(), Error> {
        if from.0 < self.lock().floor(sink) {
            self.scan(self.stream.bounds().start, Some((sink, from.0))).await?;
        }
        Ok(())
    }

    /// The sink has committed all below `offset`: nothing of it comes to it again.
    pub fn forget_below(&self, sink: SinkNumber, offset: Offset) {
        let mut known = self.lock();
        if offset.0 <= known.floor(sink) {
            return;
        }
        known.forget_below(sink, offset);
        self.attachment.advance(known.oldest().unwrap_or_else(|| self.stream.bounds().end));
        drop(known);
        self.room_moved.notify_waiters();
    }

    /// A sink has committed: its positions are past the rows before its letters.
    pub fn committed(&self, sink: SinkNumber) {
        *self.lock().uncommitted_bytes(sink) = 0;
    }

    /// Names the lane that serves a sink, by how far it has handed out.
    pub fn serve(&self, sink: SinkNumber, lane: Option<Arc<HandedOut>>) {
        self.lock().serve(sink, lane);
        self.room_moved.notify_waiters();
    }

    /// An append beside the letters must be durable before any position covers what follows.
    pub fn cover(&self, ticket: Ticket) {
        let mut known = self.lock();
        known.ticket = known.ticket.max(ticket);
    }

    /// As [`Known::received`].
    pub fn received(&self) -> Vec<Offset> {
        self.lock().received(&self.begun())
    }

    /// As [`Known::received_by_all`].
    pub fn received_by_all(&self, sinks: &[SinkNumber]) -> Vec<Offset> {
        self.lock().received_by_all(sinks)
    }

    /// As [`Known::cut`]; returns what the sinks have, as [`Known::received`].
    pub fn cut(&self) -> Vec<Offset> {
        let mut known = self.lock();
        known.cut();
        known.received(&self.begun())
    }

    fn begun(&self) -> Vec<Offset> {
        self.begun.iter().map(|at| Offset(at.load(Ordering::Acquire))).collect()
    }

    /// A sink that is new to the source begins at `at`: it does not get the messages before
    /// from there, but may be sent their letters. Returns once this survives a crash.
    pub async fn begins(&self, sink: SinkNumber, at: Offset) -> Result<(), Error> {
        let key = begun_key(self.names.pipeline(), self.names.id(sink), &self.source);
        let change = StateChange { key: key.as_bytes(), value: Some(&at.0.to_le_bytes()) };
        let appended = loop {
            match self.stream.append(&[], &[change]) {
                Ok(appended) => break appended,
                Err(AppendError::Full) => self.stream.writable().await,
                Err(error) => return Err(error.into()),
            }
        };
        self.durable(appended.ticket).await?;
        self.begun[sink].store(at.0, Ordering::Release);
        Ok(())
    }

    /// Whether a sink that a step's letter does not name began behind its message, and did not
    /// get it therefore.
    pub fn began_behind(&self, letter: &Letter<'_>, sink: SinkNumber) -> bool {
        letter.sink.is_none()
            && !self.names.is_out(sink)
            && !self.names.is_by_out(letter, sink)
            && letter.offset < self.begun[sink].load(Ordering::Acquire)
            && self.is_of_source(letter)
    }

    pub fn names(&self) -> &Names {
        &self.names
    }

    /// Whether it is of a message that this pipeline reads from its stream.
    pub fn is_of_source(&self, letter: &Letter<'_>) -> bool {
        letter.is_from(&self.names, &self.source, &self.openings)
    }

    /// New letters so far.
    pub fn made(&self) -> u64 {
        self.made.load(Ordering::Relaxed)
    }

    pub fn again(&self) -> Option<&Again> {
        self.again.as_ref()
    }

    /// Compares what a pass sends to a sink with what its database tells of letters.
    pub fn compare(&self, sink: SinkNumber, told: &Told, positions: &[Offset]) {
        let known = self.lock();
        let rejected_in = |at| known.seen(sink, at, at).part_of(at);
        self.again.iter().for_each(|again| again.compare(sink, told, positions, rejected_in));
    }

    /// Returns the letters of a partition that a pass sends to a sink from a range, as far as it is
    /// known by now what is rejected: those of which all is sent, and those of which some is.
    pub fn sent_from(
        &self,
        sink: SinkNumber,
        partition: Partition,
        range: Range<Offset>,
    ) -> (Vec<u64>, Vec<u64>) {
        let known = self.lock();
        let (mut sent, mut partly) = (Vec::new(), Vec::new());
        for (at, letter) in
            self.again.iter().flat_map(|again| again.letters_to(sink, partition, range.clone()))
        {
            match known.seen(sink, at, at).part_of(at) {
                None => sent.push(letter),
                Some(Part::Some) => partly.push(letter),
                Some(Part::All) => {}
            }
        }
        (sent, partly)
    }

    /// What redrives have sent.
    pub fn sent(&self) -> &SentLetters {
        &self.sent
    }

    /// What refusals wait for, if they do.
    pub fn waiting(&self) -> Option<Waiting> {
        self.waiters().waiting.clone()
    }

    /// Bytes of letters that the steps may write before their sinks are past them.
    pub fn share_bytes(&self) -> u64 {
        self.bytes_max
    }

    /// Returns `None` where there is no room until then.
    async fn append(
        &self,
        until: Option<Instant>,
        refusals: &[Refusal<'_>],
        readers: &mut [Reader],
    ) -> Result<Option<Refused>, Error> {
        let too_late = async {
            match until {
                Some(until) => sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(too_late);
        let waits = Waits::new(self);
        loop {
            let room_moved = self.room_moved.notified();
            let waiting = match self.try_append(refusals, readers) {
                Ok(Ok(appended)) => return Ok(Some(appended)),
                // Only the commit that comes after this call gives room back.
                Ok(Err(_)) if refusals.iter().any(|refusal| matches!(refusal.source, Source::Sink(_))) => {
                    return Ok(None);
                }
                Ok(Err(holders)) => Some(Waiting::Sinks(holders)),
                // It has the sink meanwhile, and can be asked for again.
                Err(AppendError::NoSpace) if self.again.is_some() => return Ok(None),
                Err(AppendError::NoSpace) => Some(Waiting::Log),
                Err(AppendError::Full) => None,
                Err(error) => return Err(error.into()),
            };
            let is_share = matches!(waiting, Some(Waiting::Sinks(_)));
            waits.set(waiting);
            tokio::select! {
                () = room_moved, if is_share => {}
                () = self.stream.writable(), if !is_share => {}
                () = &mut too_late => return Ok(None),
            }
        }
    }

    /// Where the bound on pending letters is reached, returns the sinks that hold the
    /// room. Decides under the lock which sinks each letter names.
    fn try_append(
        &self,
        refusals: &[Refusal<'_>],
        readers: &mut [Reader],
    ) -> Result<Result<Refused, Vec<SinkNumber>>, AppendError> {
        let mut known = self.lock();
        let fresh: Vec<_> = refusals
            .iter()
            .map(|refusal| (refusal, known.names(refusal, readers)))
            .filter(|(_, names)| !names.is_empty())
            .collect();
        if fresh.is_empty() {
            return Ok(Ok(Refused { ticket: known.ticket, letters: 0, done: refusals.len() }));
        }
        // All of one call come from one step or sink.
        let by = match refusals.first().map(|refusal| refusal.source) {
            Some(Source::Sink(by)) => self.names.with_name(by),
            Some(Source::Step(_) | Source::Routes) | None => None,
        };
        match by {
            Some(sink) if self.is_full(Room { keys: 0, bytes: *known.uncommitted_bytes(sink) }) => {
                return Ok(Err(vec![sink]));
            }
            None if self.is_full(known.held()) => {
                known.tidy();
                if self.is_full(known.held()) && known.room_comes() {
                    return Ok(Err(known.holders()));
                }
            }
            _ => {}
        }
        let (again, fresh): (Vec<_>, Vec<_>) = fresh
            .into_iter()
            .partition(|(refusal, _)| self.again.as_ref().is_some_and(|again| again.is_same(refusal)));
        let mut trimmed = 0;
        let properties: Vec<Vec<u8>> = fresh
            .iter()
            .map(|(refusal, names)| {
                let names: Vec<_> = names.iter().map(|sink| self.names.sink(*sink)).collect();
                let (bytes, whole) = letter::properties(
                    refusal,
                    &names,
                    self.names.pipeline(),
                    &self.source_name,
                    &self.source,
                    &self.openings,
                );
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
        let from = known.oldest().unwrap_or_else(|| self.stream.bounds().end).0;
        let floors = (0..self.names.sinks.len()).map(|sink| known.floor(sink)).collect();
        let scan = Scan { from, floors }.bytes(&self.names);
        let scan = StateChange { key: self.scan_key.as_bytes(), value: Some(&scan) };
        let rejections = self.again.as_ref().map(|sendings| (sendings, sendings.reject(&again)));
        let marks = rejections.iter().flat_map(|(_, rejections)| &rejections.changes);
        let marks = marks.map(|(key, value)| StateChange { key, value: value.as_deref() });
        let changes: Vec<_> = std::iter::once(scan).chain(marks).collect();
        let appended = self.stream.append(&messages, &changes)?;
        known.ticket = known.ticket.max(appended.ticket);
        self.made.fetch_add(fresh.len() as u64, Ordering::Relaxed);
        if let Some((sendings, rejections)) = rejections {
            sendings.note(rejections);
        }
        for (refusal, names) in again.iter().chain(&fresh) {
            known.note(refusal, names, readers);
        }
        let mut bytes = 0;
        let remembered = fresh.iter().zip(&messages).enumerate().map(|(i, ((refusal, names), message))| {
            let own = message.payload.len() + message.properties.len() + message.topic.len();
            bytes += own as u64;
            Remembered {
                at: appended.first.0 + i as u64,
                from: refusal.message.offset().0,
                names: Remembered::names_of(names),
                by_step: by.is_none(),
                bytes: own as u64,
            }
        });
        known.remember(remembered);
        if let Some(sink) = by {
            *known.uncommitted_bytes(sink) += bytes;
        }
        if let Some((refusal, _)) = fresh.first() {
            metrics::dead_letters(self.names.pipeline(), refusal.source.name()).increment(fresh.len() as u64);
        }
        if trimmed > 0 {
            metrics::properties_dropped(self.names.pipeline()).increment(trimmed);
        }
        Ok(Ok(Refused {
            ticket: known.ticket,
            letters: (fresh.len() + again.len()) as u64,
            done: refusals.len(),
        }))
    }

    /// Whether no more may be added to what letters hold. An append is never too
    /// large for a room that has some left.
    fn is_full(&self, held: Room) -> bool {
        self.again.is_none() && (held.keys >= KEYS_MAX || held.bytes > self.bytes_max)
    }

    /// Reads the keys of letters from `from` on, but those of messages that a sink is past;
    /// `again`: the sink that begins again, and where.
    async fn scan(&self, from: Offset, again: Option<(SinkNumber, u64)>) -> Result<(), Error> {
        let end = self.stream.bounds().end;
        let mut cursor = self.stream.peek(from);
        let marks = self.names.has_out().then(|| Marks::read(&self.stream.state(MARK_PREFIX)));
        let mut keys = Vec::new();
        let mut order = VecDeque::new();
        while cursor.position() < end
            && let Some(read) = cursor.try_next().await?
        {
            let Read::Batch(batch) = read else { continue };
            for message in batch.messages() {
                let Some(letter) = Letter::of(&message) else { continue };
                if letter.is_copy() || !letter.is_from(&self.names, &self.source, &self.openings) {
                    continue;
                }
                let partition = usize::from(partition_of(message.device(), self.source.partitions).0);
                let comes_with_it = |sink: &SinkNumber| {
                    self.names.is_by_out(&letter, *sink)
                        && marks.as_ref().is_some_and(|marks| {
                            let at = (message.entry.partition, message.offset());
                            let has = |pass| self.out_has.get().is_some_and(|has| has(pass, at.0, at.1));
                            self.names.is_open_for_out(marks.get(letter.at), has)
                        })
                        && self.lock().is_its(*sink, partition, Offset(letter.offset))
                };
                let is_named = |sink: &SinkNumber| self.names.names(&letter, *sink) || comes_with_it(sink);
                let named: Vec<_> = (0..self.names.sinks.len()).filter(is_named).collect();
                for sink in &named {
                    keys.push((*sink, Offset(letter.offset), letter.piece(&self.names)));
                    if letter.whole {
                        keys.push((*sink, Offset(letter.offset), Piece::WHOLE));
                    }
                }
                let own = message.payload().len() + message.properties().len() + message.topic().len();
                order.push_back(Remembered {
                    at: message.offset().0,
                    from: letter.offset,
                    names: Remembered::names_of(&named),
                    by_step: letter.sink.is_none(),
                    bytes: own as u64,
                });
            }
        }
        for (offset, sink) in self.again.iter().flat_map(|again| again.rejected(&self.names)) {
            keys.push((sink, offset, Piece::WHOLE));
        }
        let mut known = self.lock();
        for (sink, offset, piece) in keys {
            let floor = match again {
                Some((of, floor)) if of == sink => floor,
                _ => known.floor(sink),
            };
            if offset.0 >= floor {
                known.insert(sink, offset, piece);
            }
        }
        // Under the same lock as the letters: where another sink commits, those that are needed by
        // this one only stay.
        if let Some((sink, floor)) = again {
            known.set_floor(sink, floor);
        }
        // Appended meanwhile, and not read.
        let read_to = order.back().map_or(end.0, |letter| end.0.max(letter.at + 1));
        known.remember_anew(order, read_to);
        Ok(())
    }

    fn waiters(&self) -> MutexGuard<'_, Waiters> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call that may wait: what it waits for is shown until it ends, however it ends.
struct Waits<'a>(&'a DeadLetters);

impl<'a> Waits<'a> {
    fn new(letters: &'a DeadLetters) -> Self {
        letters.waiters().count += 1;
        Self(letters)
    }

    fn set(&self, waiting: Option<Waiting>) {
        self.0.waiters().waiting = waiting;
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        let mut waiters = self.0.waiters();
        waiters.count -= 1;
        if waiters.count == 0 {
            waiters.waiting = None;
        }
    }
}

fn begun_key(pipeline: &str, sink: &str, source: &Identity) -> String {
    format!("{BEGUN_KEY}{pipeline}/{sink}/{}/{}", source.log, source.generation)
}

/// What a start needs to read the keys of letters again.
#[derive(Debug, Default, PartialEq, Eq)]
struct Scan {
    /// In the dead letters; no letter before it is needed.
    from: u64,
    /// Floor of each sink, in the order of the sinks: see [`Known::floor`].
    floors: Vec<u64>,
}

impl Scan {
    /// `from`, then for each sink its floor, the length of its name and the name.
    fn bytes(&self, names: &Names) -> Vec<u8> {
        let mut bytes = self.from.to_le_bytes().to_vec();
        for (floor, name) in self.floors.iter().zip(names.sinks.iter().map(|names| &names[0])) {
            bytes.extend(floor.to_le_bytes());
            bytes.extend((name.len() as u16).to_le_bytes());
            bytes.extend(name.as_bytes());
        }
        bytes
    }

    /// Also what 0.1.0 wrote: one floor for all sinks.
    fn read(bytes: &[u8], names: &Names) -> Option<Self> {
        let (from, mut rest) = bytes.split_first_chunk::<8>()?;
        let from = u64::from_le_bytes(*from);
        if let Ok(floor) = rest.try_into() {
            return Some(Self { from, floors: vec![u64::from_le_bytes(floor); names.sinks.len()] });
        }
        let mut floors = vec![None; names.sinks.len()];
        while let Some((floor, after)) = rest.split_first_chunk::<8>() {
            let (length, after) = after.split_first_chunk::<2>()?;
            let (name, after) = after.split_at_checked(usize::from(u16::from_le_bytes(*length)))?;
            if let Some(sink) = std::str::from_utf8(name).ok().and_then(|name| names.number(name)) {
                floors[sink] = Some(u64::from_le_bytes(*floor));
            }
            rest = after;
        }
        // A sink that is new to the pipeline may have been there before, and any letter be for it.
        let from = if floors.contains(&None) { 0 } else { from };
        Some(Self { from, floors: floors.into_iter().map(Option::unwrap_or_default).collect() })
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

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::batch::{Entry, Span};
    use crate::stream::memory::MemoryStream;

    #[test]
    fn the_place_of_a_scan_is_read_as_it_was_written_by_this_version_and_the_first() {
        let names = |sinks: &[&str]| {
            let sinks = sinks.iter().map(|name| (*name).to_owned()).collect();
            Names::new(vec!["p".to_owned()], sinks, Arc::default())
        };
        let sinks = names(&["a", "warehouse"]);
        let scan = Scan { from: 7, floors: vec![3, 9] };
        assert_eq!(Scan::read(&scan.bytes(&sinks), &sinks), Some(scan));
        let first = [7_u64.to_le_bytes(), 5_u64.to_le_bytes()].concat();
        assert_eq!(Scan::read(&first, &sinks), Some(Scan { from: 7, floors: vec![5, 5] }));
        let other = Scan { from: 7, floors: vec![3] }.bytes(&names(&["warehouse"]));
        assert_eq!(Scan::read(&other, &sinks), Some(Scan { from: 0, floors: vec![0, 3] }));
    }
    #[tokio::test]
    async fn a_pipeline_whose_share_is_used_up_waits_and_says_for_which_sink_and_another_does_not() {
        let dead: Arc<dyn Stream> = MemoryStream::with_hooks("dead-letters", 1);
        let source = MemoryStream::with_hooks("telemetry", 1);
        let open = async |name: &str, share| {
            let sinks = vec!["a".to_owned(), "c".to_owned()];
            let names = Names::new(vec![name.to_owned()], sinks, Arc::default());
            DeadLetters::open(Arc::clone(&dead), names, &*source, share, None).await.unwrap()
        };
        let (first, second) = (open("p1", 2_000).await, open("p2", 2_000).await);
        let batch = Batch {
            segments: vec![bytes::Bytes::from_static(b"a/b")],
            entries: (0..100)
                .map(|offset| Entry { offset, topic: Span::new(0, 0, 3), ..Entry::default() })
                .collect(),
            ..Batch::default()
        };
        let refuse = async |letters: &DeadLetters, entry: usize, sinks: &[SinkNumber]| {
            let refusal = Refusal {
                message: batch.message(entry),
                source: Source::Step("check"),
                kind: RefusedKind::Failed,
                reason: "no",
                partition: Partition(0),
                index: 0,
                steps: "",
                alone: true,
                closes: true,
            };
            let mut readers: Vec<_> =
                sinks.iter().map(|sink| Reader { sink: *sink, ..Reader::default() }).collect();
            letters.refuse(&[refusal], &mut readers).await.unwrap().letters
        };
        // The sinks are together at first, then `a` lags: what is left is for `c`.
        assert_eq!(refuse(&first, 0, &[0, 1]).await, 1);
        let mut waits = 1;
        while refuse(&first, waits, &[1]).now_or_never().is_some() {
            waits += 1;
        }
        let mut waiting = std::pin::pin!(refuse(&first, waits, &[1]));
        assert_eq!(waiting.as_mut().now_or_never(), None);
        assert_eq!(first.waiting(), Some(Waiting::Sinks(vec![1, 0])));
        assert_eq!(refuse(&second, 0, &[0, 1]).now_or_never(), Some(1));
        // `c` moves on, however far behind `a` is.
        first.forget_below(1, Offset(100));
        assert_eq!((waiting.await, first.waiting()), (1, None));
        assert_eq!(refuse(&first, 99, &[0]).now_or_never(), Some(1));
    }
}
