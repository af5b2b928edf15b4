//! What a test does to a stream in memory, and asks of it, beside [`crate::stream::Stream`]: late and failed commits,
//! full disks, retention, copies of the folder.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use tokio::sync::watch;
use uuid::Uuid;

use super::{Inner, MemoryStream};
use crate::batch::{Batch, Offset};
use crate::stream::{GapCause, OnLag, Opening, Ticket};

impl MemoryStream {
    /// From now on nothing more is durable before [`Self::commit`].
    pub fn hold_commits(&self) {
        self.0.manual.store(true, Ordering::Relaxed);
    }

    /// From now on what is appended is durable at once, as what was appended before.
    pub fn release_commits(&self) {
        self.0.manual.store(false, Ordering::Relaxed);
        self.commit();
    }

    /// Makes all that was appended durable.
    pub fn commit(&self) {
        self.lock().commit();
        self.moved();
    }

    /// Returns the offset behind the last message that was appended, durable or not.
    pub fn appended(&self) -> Offset {
        Offset(self.lock().next)
    }

    /// Returns once somebody waits for what is not durable yet.
    pub async fn awaited(&self) {
        let waits = |durable: &watch::Sender<Ticket>| durable.receiver_count() > 0;
        // The sender lives as long as `self`.
        let _ = self.0.moved.subscribe().wait_for(|_| self.lock().durable.as_ref().is_some_and(waits)).await;
    }

    /// A failed sync: what was not durable never will be.
    pub fn fail(&self, reason: &str) {
        let mut inner = self.lock();
        inner.stopped.get_or_insert_with(|| reason.into());
        inner.durable = None;
        drop(inner);
        self.moved();
    }

    /// What [`crate::stream::Stream::state_room`] says from now on.
    pub fn set_state_room(&self, bytes: usize) {
        self.lock().state_room = bytes;
    }

    /// Returns what another process opens of a copy of the folder, made when the stream ended at
    /// `at`; `self` is not changed.
    pub fn copied(&self, at: Offset) -> Arc<Self> {
        let inner = self.lock();
        self.copy(&inner, at, inner.state.clone())
    }

    /// Keeps the state after each append from now on, for [`Self::crashes`].
    pub fn keep_states(&self) {
        self.lock().states = Some(Vec::new());
    }

    /// Returns what a process opens that starts after this one was killed: behind each of the appends
    /// since the last time that was asked for.
    pub fn crashes(&self) -> Vec<Arc<Self>> {
        let mut inner = self.lock();
        let states = inner.states.replace(Vec::new()).unwrap_or_default();
        states.into_iter().map(|state| self.copy(&inner, Offset(inner.end), state)).collect()
    }

    fn copy(&self, inner: &Inner, at: Offset, state: BTreeMap<Vec<u8>, Vec<u8>>) -> Arc<Self> {
        let kept = |frame: &&Arc<Batch>| frame.base.0 + frame.len() as u64 <= at.0;
        let frames: Vec<_> = inner.frames.iter().filter(kept).cloned().collect();
        let end = frames.last().map_or(inner.start, |frame| frame.base.0 + frame.len() as u64);
        let mut openings: Vec<_> = self.0.openings.iter().filter(|o| o.first.0 < end).copied().collect();
        openings.push(Opening { id: Uuid::new_v4().as_u64_pair().0, first: Offset(end) });
        let copy = Self::build(&self.0.name, self.0.identity.partitions, false);
        let mut shared = Arc::into_inner(copy.0).expect("just made");
        (shared.identity, shared.openings) = (self.0.identity, openings);
        let new = shared.inner.get_mut().unwrap_or_else(PoisonError::into_inner);
        (new.frames, new.start, new.end, new.next) = (frames, inner.start, end, end);
        (new.state, new.advanced) = (state, inner.advanced.clone());
        new.told = inner.told.clone();
        Arc::new(Self(Arc::new(shared)))
    }

    /// All that was appended until now is past its age.
    pub fn pass_age(&self) {
        let mut inner = self.lock();
        inner.clock_us += 1;
        inner.kept_since_us = inner.clock_us;
    }

    /// Appends of more bytes are refused as too large, as those are that a log's commit buffer cannot
    /// hold.
    pub fn set_append_bytes_max(&self, bytes: usize) {
        self.lock().append_bytes_max = bytes;
    }

    /// While `full`, appends are refused with `NoSpace`.
    pub fn set_no_space(&self, full: bool) {
        self.lock().no_space = full;
        self.moved();
    }

    /// While `full`, appends are refused with `Full`, as by a disk that does not answer.
    pub fn set_buffer_full(&self, full: bool) {
        let mut inner = self.lock();
        (inner.buffer_full, inner.full) = (full, inner.full && full);
        drop(inner);
        self.moved();
    }

    /// Returns once an append was refused with `Full`.
    pub async fn refused(&self) {
        self.inner_is(|inner| inner.full).await;
    }

    /// Removes what lies below `start`, as retention would.
    pub fn trim(&self, start: Offset) {
        let mut inner = self.lock();
        inner.start = start.0.clamp(inner.start, inner.end);
        let start = inner.start;
        inner.frames.retain(|frame| frame.base.0 + frame.len() as u64 > start);
    }

    /// Asks the readers for what lies below `upto`, then trims.
    pub async fn ask_and_trim(&self, upto: Offset) {
        self.ask(upto).await;
        self.trim(upto);
    }

    /// Asks the readers for what lies below `upto`; returns once it may go.
    pub async fn ask(&self, upto: Offset) {
        let mut moved = self.0.moved.subscribe();
        for (_, _, asked) in self.lock().marks.values() {
            asked.send_replace(upto);
        }
        let is_free = |inner: &Inner| {
            inner.marks.values().all(|(at, on_lag, _)| *on_lag != OnLag::Ask || *at >= upto.0)
        };
        // The sender lives as long as `self`.
        let _ = moved.wait_for(|_| is_free(&self.lock())).await;
    }

    /// Returns when the frame that holds an offset was appended, microseconds since 1970.
    pub fn append_time(&self, offset: Offset) -> u64 {
        let inner = self.lock();
        let frame = inner.frames.partition_point(|frame| frame.base.0 + frame.len() as u64 <= offset.0);
        inner.frames[frame].now_us
    }

    /// Returns what readers lost without a cursor.
    pub fn lost(&self) -> Vec<(Range<Offset>, GapCause)> {
        self.lock().lost.clone()
    }

    /// Where each attached reader is.
    pub fn marks(&self) -> BTreeMap<String, (Offset, OnLag)> {
        self.lock().marks.iter().map(|(name, (at, lag, _))| (name.clone(), (Offset(*at), *lag))).collect()
    }
}
