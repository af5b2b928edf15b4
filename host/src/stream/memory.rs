//! A stream that keeps its messages in memory, for tests.
//!
//! It keeps the promises of the trait, except that nothing survives the process.
//! [`MemoryStream::with_manual_commit`] delays durability until [`MemoryStream::commit`], so that a test
//! can show that no acknowledgement is sent earlier. [`MemoryStream::fail`] simulates a failed sync.

mod hooks;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use tokio::sync::watch;
use uuid::Uuid;

use super::{
    AppendError, Appended, Attachment, BeginNow, Cursor, Delivered, GapCause, Identity, Lack, NewMessage,
    OnLag, Opening, Read, ReadError, STATE_KEY_BYTES_MAX, STATE_VALUE_BYTES_MAX, StateChange, Stream, Ticket,
};
use crate::batch::{Batch, Entry, Offset, Span};

/// Most bytes that wait for a manual commit. Further appends are refused with `Full`.
const COMMIT_BUFFER_BYTES_MAX: usize = 16 << 20;

/// A handle. Clones refer to the same stream.
#[derive(Clone)]
pub struct MemoryStream(Arc<Shared>);

struct Shared {
    name: String,
    identity: Identity,
    openings: Vec<Opening>,
    manual: AtomicBool,
    inner: Mutex<Inner>,
    /// Changes when a reader or a waiting writer may have something to do.
    moved: watch::Sender<u64>,
}

struct Inner {
    frames: Vec<Arc<Batch>>,
    pending: Vec<Arc<Batch>>,
    pending_bytes: usize,
    start: u64,
    /// One past the last durable message.
    end: u64,
    next: u64,
    ticket: u64,
    clock_us: u64,
    full: bool,
    no_space: bool,
    append_bytes_max: usize,
    buffer_full: bool,
    /// Append time before which messages are past their age.
    kept_since_us: u64,
    state: BTreeMap<Vec<u8>, Vec<u8>>,
    state_room: usize,
    marks: BTreeMap<String, (u64, OnLag, watch::Sender<Offset>)>,
    /// Positions of readers before they were attached, until they state their positions.
    remembered: BTreeMap<String, Offset>,
    /// See [`Stream::lose`].
    lost: Vec<(Range<Offset>, GapCause)>,
    advanced: BTreeSet<String>,
    told: BTreeMap<String, BeginNow>,
    stopped: Option<Arc<str>>,
    /// See [`MemoryStream::keep_states`].
    states: Option<Vec<BTreeMap<Vec<u8>, Vec<u8>>>>,
    /// The durable ticket; `None` once stopped.
    durable: Option<watch::Sender<Ticket>>,
}

impl MemoryStream {
    /// Returns a stream in which every append is durable at once.
    #[allow(clippy::new_ret_no_self)]
    pub fn new(name: &str, partitions: u16) -> Arc<dyn Stream> {
        Arc::new(Self::build(name, partitions, false))
    }

    /// Returns a stream in which nothing is durable before [`Self::commit`].
    pub fn with_manual_commit(name: &str, partitions: u16) -> Arc<Self> {
        Arc::new(Self::build(name, partitions, true))
    }

    /// Returns a stream as `new` does, with the hooks of the concrete type.
    pub fn with_hooks(name: &str, partitions: u16) -> Arc<Self> {
        Arc::new(Self::build(name, partitions, false))
    }

    fn build(name: &str, partitions: u16, manual: bool) -> Self {
        Self(Arc::new(Shared {
            name: name.to_owned(),
            identity: Identity { log: Uuid::new_v4(), generation: 1, partitions: partitions.max(1) },
            openings: vec![Opening { id: Uuid::new_v4().as_u64_pair().0, first: Offset(0) }],
            manual: AtomicBool::new(manual),
            inner: Mutex::new(Inner {
                frames: Vec::new(),
                pending: Vec::new(),
                pending_bytes: 0,
                start: 0,
                end: 0,
                next: 0,
                ticket: 0,
                clock_us: 0,
                full: false,
                no_space: false,
                append_bytes_max: COMMIT_BUFFER_BYTES_MAX,
                buffer_full: false,
                kept_since_us: 0,
                state: BTreeMap::new(),
                state_room: usize::MAX,
                marks: BTreeMap::new(),
                remembered: BTreeMap::new(),
                lost: Vec::new(),
                advanced: BTreeSet::new(),
                told: BTreeMap::new(),
                stopped: None,
                states: None,
                durable: Some(watch::channel(Ticket::default()).0),
            }),
            moved: watch::channel(0).0,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn moved(&self) {
        self.0.moved.send_modify(|n| *n += 1);
    }
}

impl Inner {
    fn commit(&mut self) {
        let Some(durable) = &self.durable else { return };
        self.frames.append(&mut self.pending);
        self.pending_bytes = 0;
        self.full = false;
        self.end = self.next;
        durable.send_replace(Ticket(self.ticket));
    }

    /// Returns the messages as one frame.
    fn frame(&mut self, messages: &[NewMessage<'_>]) -> Batch {
        let mut data = BytesMut::new();
        let mut put = |bytes: &[u8]| {
            data.extend_from_slice(bytes);
            Span::new(0, data.len() - bytes.len(), bytes.len())
        };
        let entries = (0..)
            .zip(messages)
            .map(|(offset, m)| Entry {
                flags: m.flags,
                partition: m.partition,
                offset,
                received_us: m.received_us,
                event_us: m.event_us,
                topic: put(m.topic.as_bytes()),
                payload: put(m.payload),
                properties: put(m.properties),
                route: put(m.route.as_bytes()),
                device: put(m.device.as_bytes()),
            })
            .collect();
        let now = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |t| t.as_micros() as u64);
        self.clock_us = self.clock_us.max(now);
        let segments: Vec<Bytes> = vec![data.freeze()];
        Batch { base: Offset(self.next), now_us: self.clock_us, segments, entries, exclusive: true }
    }
}

impl MemoryStream {
    /// Waits until `as_asked` is true, or the stream has stopped.
    async fn inner_is(&self, as_asked: impl Fn(&Inner) -> bool + Send) {
        let mut moved = self.0.moved.subscribe();
        loop {
            {
                let inner = self.lock();
                if inner.stopped.is_some() || as_asked(&inner) {
                    return;
                }
            }
            if moved.changed().await.is_err() {
                return;
            }
        }
    }
}

#[async_trait]
impl Stream for MemoryStream {
    fn name(&self) -> &str {
        &self.0.name
    }

    fn identity(&self) -> Identity {
        self.0.identity
    }

    fn append(
        &self,
        messages: &[NewMessage<'_>],
        state: &[StateChange<'_>],
    ) -> Result<Appended, AppendError> {
        if state.iter().any(|change| {
            change.key.len() > STATE_KEY_BYTES_MAX
                || change.value.is_some_and(|v| v.len() > STATE_VALUE_BYTES_MAX)
        }) {
            return Err(AppendError::TooLarge("state change"));
        }
        let mut inner = self.lock();
        if let Some(reason) = &inner.stopped {
            return Err(AppendError::Stopped(Arc::clone(reason)));
        }
        if inner.no_space {
            return Err(AppendError::NoSpace);
        }
        if inner.buffer_full {
            inner.full = true;
            drop(inner);
            self.moved();
            return Err(AppendError::Full);
        }
        let bytes: usize =
            messages.iter().map(|m| m.topic.len() + m.payload.len() + m.properties.len()).sum();
        if bytes > inner.append_bytes_max {
            return Err(AppendError::TooLarge(AppendError::WHOLE));
        }
        if inner.pending_bytes + bytes > COMMIT_BUFFER_BYTES_MAX {
            inner.full = true;
            return Err(AppendError::Full);
        }
        let first = Offset(inner.next);
        if !messages.is_empty() {
            let frame = inner.frame(messages);
            inner.pending.push(Arc::new(frame));
            inner.pending_bytes += bytes;
            inner.next += messages.len() as u64;
        }
        for change in state {
            match change.value {
                Some(value) => drop(inner.state.insert(change.key.to_vec(), value.to_vec())),
                None => drop(inner.state.remove(change.key)),
            }
        }
        let now = inner.states.is_some().then(|| inner.state.clone());
        inner.states.iter_mut().for_each(|states| states.extend(now.clone()));
        inner.ticket += 1;
        let appended = Appended { ticket: Ticket(inner.ticket), first };
        if !self.0.manual.load(Ordering::Relaxed) {
            inner.commit();
            drop(inner);
            self.moved();
        }
        Ok(appended)
    }

    async fn writable(&self) {
        self.inner_is(|inner| !(inner.full || inner.no_space)).await;
    }

    async fn out_of_space(&self) {
        self.inner_is(|inner| inner.no_space).await;
    }

    fn durable(&self) -> watch::Receiver<Ticket> {
        let durable = match &self.lock().durable {
            Some(durable) => durable.subscribe(),
            None => watch::channel(Ticket::default()).1,
        };
        self.moved();
        durable
    }

    fn bounds(&self) -> Range<Offset> {
        let inner = self.lock();
        Offset(inner.start)..Offset(inner.end)
    }

    fn openings(&self) -> Vec<Opening> {
        self.0.openings.clone()
    }

    fn is_past_age(&self, append_us: u64) -> bool {
        append_us < self.lock().kept_since_us
    }

    fn cursor(&self, from: Offset) -> Box<dyn Cursor> {
        Box::new(MemoryCursor { stream: self.clone(), at: from.0, moved: self.0.moved.subscribe() })
    }

    fn lose(&self, lost: Range<Offset>, cause: GapCause) {
        self.lock().lost.push((lost, cause));
    }

    async fn seek_time(&self, append_us: u64) -> Result<Offset, ReadError> {
        let inner = self.lock();
        let frame = inner.frames.iter().find(|frame| frame.now_us >= append_us);
        Ok(frame.map_or(Offset(inner.end), |frame| Offset(frame.base.0.max(inner.start))))
    }

    fn attach(&self, consumer: &str, from: Offset, on_lag: OnLag) -> Box<dyn Attachment> {
        let asked = watch::channel(Offset(0)).0;
        let inner = &mut *self.lock();
        let before = inner.marks.insert(consumer.to_owned(), (from.0, on_lag, asked.clone()));
        let before = before.map_or(from, |(next, ..)| Offset(next));
        let remembered = *inner.remembered.entry(consumer.to_owned()).or_insert(before);
        Box::new(Mark { stream: self.clone(), consumer: consumer.to_owned(), remembered, asked })
    }

    fn rename_reader(&self, former: &str, consumer: &str) {
        let inner = &mut *self.lock();
        if inner.marks.contains_key(consumer) {
            return;
        }
        let consumer = || consumer.to_owned();
        if let Some(mark) = inner.marks.remove(former) {
            inner.marks.insert(consumer(), mark);
        }
        if let Some(place) = inner.remembered.remove(former) {
            inner.remembered.insert(consumer(), place);
        }
        if let Some(told) = inner.told.remove(former) {
            inner.told.insert(consumer(), told);
        }
        if inner.advanced.remove(former) {
            inner.advanced.insert(consumer());
        }
    }

    fn lack(&self) -> Option<Lack> {
        self.lock().no_space.then_some(Lack::Disk)
    }

    fn state(&self, prefix: &[u8]) -> Vec<(Vec<u8>, Vec<u8>)> {
        let inner = self.lock();
        let from = inner.state.range(prefix.to_vec()..);
        from.take_while(|(key, _)| key.starts_with(prefix)).map(|(k, v)| (k.clone(), v.clone())).collect()
    }

    fn state_room(&self) -> usize {
        self.lock().state_room
    }

    async fn stopped(&self) -> Arc<str> {
        let mut moved = self.0.moved.subscribe();
        loop {
            if let Some(reason) = &self.lock().stopped {
                return Arc::clone(reason);
            }
            if moved.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    async fn close(&self) {
        self.commit();
        self.fail("closed");
    }
}

struct MemoryCursor {
    stream: MemoryStream,
    at: u64,
    moved: watch::Receiver<u64>,
}

impl MemoryCursor {
    fn step(&mut self) -> Result<Option<Read>, ReadError> {
        let inner = self.stream.lock();
        if self.at > inner.end {
            return Err(ReadError::PastEnd { wanted: self.at, end: inner.end });
        }
        if self.at < inner.start {
            let from = Offset(std::mem::replace(&mut self.at, inner.start));
            return Ok(Some(Read::Gap { from, to: Offset(inner.start), cause: GapCause::Trimmed }));
        }
        let next = inner.frames.partition_point(|frame| frame.base.0 + frame.len() as u64 <= self.at);
        let Some(frame) = inner.frames.get(next) else {
            return match &inner.stopped {
                Some(reason) => Err(ReadError::Stopped(Arc::clone(reason))),
                None => Ok(None),
            };
        };
        let at = self.at;
        let batch = frame.filtered(|entry| frame.base.0 + u64::from(entry.offset) >= at);
        self.at = frame.base.0 + frame.len() as u64;
        Ok(Some(Read::Batch(batch)))
    }
}

#[async_trait]
impl Cursor for MemoryCursor {
    async fn next(&mut self) -> Result<Read, ReadError> {
        loop {
            self.moved.mark_unchanged();
            if let Some(read) = self.step()? {
                return Ok(read);
            }
            if self.moved.changed().await.is_err() {
                return Err(ReadError::Stopped("dropped".into()));
            }
        }
    }

    async fn try_next(&mut self) -> Result<Option<Read>, ReadError> {
        self.step()
    }

    fn position(&self) -> Offset {
        Offset(self.at)
    }
}

struct Mark {
    stream: MemoryStream,
    consumer: String,
    remembered: Offset,
    asked: watch::Sender<Offset>,
}

impl Attachment for Mark {
    fn advance(&self, next: Offset) {
        let inner = &mut *self.stream.lock();
        inner.remembered.remove(&self.consumer);
        if let Some((at, ..)) = inner.marks.get_mut(&self.consumer)
            && *at < next.0
        {
            *at = next.0;
            inner.advanced.insert(self.consumer.clone());
        }
        if let Some(told) = inner.told.get_mut(&self.consumer) {
            *told = BeginNow::Followed;
        }
        self.stream.moved();
    }

    fn moves_on(&self) {}

    fn go_back(&self, next: Offset) {
        let inner = &mut *self.stream.lock();
        if let Some((at, ..)) = inner.marks.get_mut(&self.consumer) {
            *at = next.0.max(inner.start).min(*at);
        }
        self.stream.moved();
    }

    fn begin_now(&self, is_told: bool) -> Option<BeginNow> {
        let inner = &mut *self.stream.lock();
        if !is_told {
            inner.told.remove(&self.consumer);
            return None;
        }
        Some(*inner.told.entry(self.consumer.clone()).or_insert(BeginNow::At(Offset(inner.end))))
    }

    fn remembered(&self) -> Offset {
        self.remembered
    }

    fn delivered(&self) -> Delivered {
        let advanced = &self.stream.lock().advanced;
        match advanced.contains(&self.consumer) {
            true => Delivered::ToThis,
            false if advanced.is_empty() => Delivered::ToNobody,
            false => Delivered::ToOthers,
        }
    }

    fn asked(&self) -> watch::Receiver<Offset> {
        self.asked.subscribe()
    }

    fn detach(&self) {
        let inner = &mut *self.stream.lock();
        inner.marks.remove(&self.consumer);
        inner.remembered.remove(&self.consumer);
    }
}
