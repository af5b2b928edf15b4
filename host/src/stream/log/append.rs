//! Appends: messages are copied, once, into the buffer of the next commit.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::BytesMut;

use super::frame;
use super::state::{self, Change, STATE_BYTES_MAX, State, USERS};
use super::{Inner, lock};
use crate::batch::Offset;
use crate::stream::{
    AppendError, Appended, Lack, NewMessage, STATE_KEY_BYTES_MAX, STATE_VALUE_BYTES_MAX, StateChange, Ticket,
};
use crate::telemetry::DiskSpace;

/// The contents of the next frame.
pub struct Pending {
    pub entries: BytesMut,
    pub data: BytesMut,
    /// CRC32C of `entries` and of `data`, so that the committer has nothing to compute between two
    /// syncs.
    pub entries_crc: u32,
    pub data_crc: u32,
    pub changes: Vec<Change>,
    changes_bytes: usize,
    pub base: u64,
    pub count: u32,
    pub received_least_us: u64,
    pub received_greatest_us: u64,
}

impl Pending {
    /// Creates pending contents with empty buffers.
    pub fn new((entries, data): (BytesMut, BytesMut)) -> Self {
        Self {
            entries,
            data,
            entries_crc: 0,
            data_crc: 0,
            changes: Vec::new(),
            changes_bytes: 0,
            base: 0,
            count: 0,
            received_least_us: u64::MAX,
            received_greatest_us: 0,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0 && self.changes.is_empty()
    }

    fn push(&mut self, messages: &[NewMessage<'_>]) {
        let (entries_from, data_from) = (self.entries.len(), self.data.len());
        for message in messages {
            frame::push_message(&mut self.entries, &mut self.data, message);
            self.received_least_us = self.received_least_us.min(message.received_us);
            self.received_greatest_us = self.received_greatest_us.max(message.received_us);
        }
        self.entries_crc = crc32c::crc32c_append(self.entries_crc, &self.entries[entries_from..]);
        self.data_crc = crc32c::crc32c_append(self.data_crc, &self.data[data_from..]);
        self.count += messages.len() as u32;
    }

    pub fn bytes(&self) -> usize {
        self.entries.len() + self.data.len() + self.changes_bytes
    }
}

/// State behind the only lock of the append path, which is held only for the copy.
pub struct Front {
    pub pending: Pending,
    /// Ticket of the pending frame.
    pub ticket: u64,
    pub next_offset: u64,
    /// State as of the last append, durable or not.
    pub state: State,
    /// The pending frame that refused an append for want of room.
    pub refused: Option<u64>,
    /// Whether the committer waits for work.
    pub idle: bool,
    /// Whether the keeper wants a new segment, because the active one is old enough.
    pub roll: bool,
    pub closing: bool,
    pub stopped: Option<Arc<str>>,
}

impl Front {
    pub fn new(next_offset: u64, state: State) -> Self {
        Self {
            pending: Pending::new(Default::default()),
            ticket: 1,
            next_offset,
            state,
            refused: None,
            idle: false,
            roll: false,
            closing: false,
            stopped: None,
        }
    }

    pub fn take(&mut self, fresh: Pending) -> (Pending, Ticket) {
        let taken = std::mem::replace(&mut self.pending, fresh);
        self.ticket += 1;
        (taken, Ticket(self.ticket - 1))
    }
}

impl Inner {
    pub fn append(
        &self,
        messages: &[NewMessage<'_>],
        changes: &[StateChange<'_>],
    ) -> Result<Appended, AppendError> {
        let mut bytes = messages.len() * frame::ENTRY_BYTES;
        for message in messages {
            frame::message_fits(message).map_err(AppendError::TooLarge)?;
            bytes += frame::message_bytes(message);
        }
        let mut changes_bytes = 0;
        for change in changes {
            if change.key.len() > STATE_KEY_BYTES_MAX {
                return Err(AppendError::TooLarge("state key"));
            }
            if change.value.is_some_and(|value| value.len() > STATE_VALUE_BYTES_MAX) {
                return Err(AppendError::TooLarge("state value"));
            }
            changes_bytes += frame::change_len(change.key, change.value) + 1;
        }
        let goes_alone = self.takes_any_message && messages.len() == 1;
        if bytes + changes_bytes > self.buffer_bytes_max && !goes_alone {
            return Err(AppendError::TooLarge(AppendError::WHOLE));
        }
        // Copied outside the lock: state changes are rare and need an allocation anyway.
        let owned: Vec<Change> =
            changes.iter().map(|c| (state::key(USERS, c.key), c.value.map(Into::into))).collect();

        let mut front = lock(&self.front);
        self.may_append(&mut front, bytes + changes_bytes)?;
        if front.state.bytes() + changes_bytes > STATE_BYTES_MAX && front.state.outgrows(&owned) {
            front.refused = Some(front.ticket);
            return Err(AppendError::NoSpace);
        }
        let first = front.next_offset;
        let Front { pending, state, .. } = &mut *front;
        if pending.count == 0 {
            pending.base = first;
        }
        pending.push(messages);
        pending.changes_bytes += changes_bytes;
        for change in owned {
            state.apply(change.clone());
            pending.changes.push(change);
        }
        front.next_offset += messages.len() as u64;
        let empty = front.pending.is_empty();
        let ticket = Ticket(if empty { front.ticket - 1 } else { front.ticket });
        let wake = std::mem::take(&mut front.idle);
        drop(front);
        if wake && !empty {
            self.wake.notify_all();
        }
        Ok(Appended { ticket, first: Offset(first) })
    }

    /// Appends a change of the log's own state, such as the position of a reader. Returns false if there
    /// is no room for it.
    pub fn append_own(&self, space: u8, key: &[u8], value: Option<&[u8]>) -> bool {
        let change: Change = (state::key(space, key), value.map(Into::into));
        let mut front = lock(&self.front);
        if self.may_append(&mut front, change.0.len() + value.map_or(0, <[u8]>::len)).is_err() {
            return false;
        }
        if front.pending.is_empty() {
            front.pending.base = front.next_offset;
        }
        front.pending.changes_bytes += frame::change_len(key, value) + 1;
        front.state.apply(change.clone());
        front.pending.changes.push(change);
        front.idle = false;
        drop(front);
        self.wake.notify_all();
        true
    }

    fn may_append(&self, front: &mut Front, bytes: usize) -> Result<(), AppendError> {
        if let Some(reason) = &front.stopped {
            return Err(AppendError::Stopped(Arc::clone(reason)));
        }
        if front.closing {
            return Err(AppendError::Stopped("closing".into()));
        }
        if self.lack().is_some() {
            return Err(AppendError::NoSpace);
        }
        if !front.pending.is_empty() && front.pending.bytes() + bytes > self.buffer_bytes_max {
            front.refused = Some(front.ticket);
            return Err(AppendError::Full);
        }
        Ok(())
    }

    pub async fn writable(&self) {
        self.space_is(|front| {
            let refused = front.refused == Some(front.ticket);
            !(refused || self.lack().is_some())
        })
        .await;
    }

    pub async fn out_of_space(&self) {
        self.space_is(|_| self.lack().is_some()).await;
    }

    /// Waits until `as_asked` is true, or the log has stopped.
    async fn space_is(&self, as_asked: impl Fn(&Front) -> bool) {
        let mut space = self.space.subscribe();
        loop {
            {
                let front = lock(&self.front);
                if front.stopped.is_some() || as_asked(&front) {
                    return;
                }
            }
            if space.changed().await.is_err() {
                return;
            }
        }
    }

    /// Returns what appends wait for.
    pub fn lack(&self) -> Option<Lack> {
        Lack::of_code(self.lack.load(Ordering::Relaxed))
    }

    /// Refuses appends while something is lacking, and reports it once.
    pub fn set_lack(&self, lack: Option<Lack>) {
        let before = Lack::of_code(self.lack.swap(lack.map_or(0, |lack| lack as u8), Ordering::Relaxed));
        if before == lack {
            return;
        }
        self.metrics.no_space(lack.is_some());
        let folder = std::path::absolute(&self.dir).unwrap_or_else(|_| self.dir.clone());
        let space = DiskSpace::of(&folder).ok();
        let free_bytes = space.map(|space| space.free);
        let (stream, shown) = (&*self.name, folder.display());
        match lack {
            Some(lack) => {
                let (cause, advice) = (lack.cause(space), lack.advice(&folder, space));
                tracing::warn!(stream, folder = %shown, free_bytes, "{cause}: appends wait; {advice}");
            }
            None => tracing::info!(stream, folder = %shown, free_bytes, "appends are accepted again"),
        }
        self.space.send_modify(|n| *n += 1);
    }
}
