//! QoS 2 packet ids that clients have not released yet.
//!
//! Those of persistent sessions are state of a stream, which is bounded: so are
//! all of them together. A client that finds no room waits with its publish, and
//! goes on when an id is released, its own or another's. One that has none open
//! always gets one: however many others hold, it goes on, one message at a time.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

use crate::stream::Ticket;

/// Of all clients, beside the first of each. 13 bytes of state each: with retained
/// messages and wills they fit in a stream's state (`STATE_BYTES_MOST`).
pub const OPEN_IDS_MAX: usize = if cfg!(test) { 50 } else { 1_000_000 };

/// Where the message of a QoS 2 packet id went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    pub stream: usize,
    /// `None` while its append is still being gathered.
    pub ticket: Option<Ticket>,
}

/// Of one session.
pub struct OpenIds {
    ids: HashMap<u16, Received>,
    room: Arc<OpenIdsRoom>,
}

/// For those of all sessions.
#[derive(Default)]
pub struct OpenIdsRoom {
    open: AtomicUsize,
    freed: Notify,
}

impl Received {
    /// An ack for this id waits at least for this ticket; for an id that is
    /// being gathered the append to come is later than any.
    pub fn least(self) -> Ticket {
        self.ticket.unwrap_or_default()
    }
}

impl OpenIds {
    pub fn new(room: Arc<OpenIdsRoom>) -> Self {
        Self { ids: HashMap::new(), room }
    }

    /// Whether one more may be opened.
    pub fn has_room(&self) -> bool {
        self.ids.is_empty() || self.room.is_there()
    }

    pub fn get(&self, id: u16) -> Option<Received> {
        self.ids.get(&id).copied()
    }

    pub fn all(&self) -> &HashMap<u16, Received> {
        &self.ids
    }

    pub fn open(&mut self, id: u16, received: Received) {
        if self.ids.insert(id, received).is_none() {
            self.room.open.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Its append was taken.
    pub fn appended(&mut self, id: u16, ticket: Ticket) {
        if let Some(received) = self.ids.get_mut(&id) {
            received.ticket = Some(ticket);
        }
    }

    pub fn release(&mut self, id: u16) -> Option<Received> {
        let released = self.ids.remove(&id)?;
        self.room.free(1);
        Some(released)
    }

    pub fn release_all(&mut self) -> HashMap<u16, Received> {
        self.room.free(self.ids.len());
        std::mem::take(&mut self.ids)
    }
}

impl OpenIdsRoom {
    /// Returns once there is room. Safe to drop.
    pub async fn freed(&self) {
        loop {
            let mut freed = pin!(self.freed.notified());
            // Before the look: what is freed after it is not missed.
            freed.as_mut().enable();
            if self.is_there() {
                return;
            }
            freed.await;
        }
    }

    fn is_there(&self) -> bool {
        self.open.load(Ordering::Acquire) < OPEN_IDS_MAX
    }

    fn free(&self, ids: usize) {
        self.open.fetch_sub(ids, Ordering::AcqRel);
        // One that waits for each, in turn.
        (0..ids).for_each(|_| self.freed.notify_one());
    }
}
