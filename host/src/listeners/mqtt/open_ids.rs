//! QoS 2 packet ids that clients have not released yet.
//!
//! Those of persistent sessions are state of a stream, which is bounded: so are
//! all of them together. A client that finds no room waits with its publish, and
//! goes on when an id is released, its own or another's. One that has none open
//! always gets one: however many others hold, it goes on, one message at a time.
//!
//! An id whose release is not durable yet is known until it is: a crash would open
//! it again, so that a client that sends its PUBREL again must be answered no
//! sooner than the first time.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::stream::Ticket;

/// Most ids of all clients, beside the first of each. 17 bytes of state each: with retained
/// messages and wills they fit in a stream's state (`STATE_BYTES_MOST`).
pub const OPEN_IDS_MAX: usize = if cfg!(test) { 50 } else { 1_000_000 };

/// Where the message of a QoS 2 packet id went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    pub stream: usize,
    /// Ticket of the append that opened it, or that releases it; `None` while that is still being gathered.
    pub ticket: Option<Ticket>,
    /// `None` for an id that 0.1.0 opened.
    pub content: Option<Content>,
}

/// Tells whether a publish with an open packet id is the message that opened it.
/// A device that lost its store begins with ids that its session knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content([u8; 4]);

impl Content {
    pub fn of(topic: &str, payload: &[u8]) -> Self {
        let hash = xxh3_64_with_seed(payload, xxh3_64(topic.as_bytes()));
        Self((hash as u32).to_le_bytes())
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    pub fn read(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

/// The open ids of one session.
pub struct OpenIds {
    ids: HashMap<u16, Received>,
    /// Ids whose PUBCOMP waits for the release to be durable. Bounded by the commit
    /// buffers that the releases wait in, and by the acks that may wait.
    releasing: HashMap<u16, Received>,
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

    fn is_durable(self, stream: usize, durable: Ticket) -> bool {
        self.stream == stream && self.ticket.is_some_and(|ticket| ticket <= durable)
    }
}

impl OpenIds {
    pub fn new(room: Arc<OpenIdsRoom>) -> Self {
        Self { ids: HashMap::new(), releasing: HashMap::new(), room }
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
        self.releasing.remove(&id);
        if self.ids.insert(id, received).is_none() {
            self.room.open.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// The append that opens or releases it was taken.
    pub fn appended(&mut self, id: u16, ticket: Ticket) {
        if let Some(received) = self.ids.get_mut(&id).or_else(|| self.releasing.get_mut(&id)) {
            received.ticket = Some(ticket);
        }
    }

    /// Returns what was known of the id while it was open.
    pub fn release(&mut self, id: u16) -> Option<Received> {
        let released = self.close(id)?;
        // The ticket comes with the append.
        self.releasing.insert(id, Received { ticket: None, ..released });
        Some(released)
    }

    /// Closes an id whose publish no stream took.
    pub fn close(&mut self, id: u16) -> Option<Received> {
        let closed = self.ids.remove(&id)?;
        self.room.free(1);
        Some(closed)
    }

    /// Returns where the release of an id went that may not be durable yet.
    pub fn releasing(&self, id: u16) -> Option<Received> {
        self.releasing.get(&id).copied()
    }

    /// Forgets the release of an id if it is durable where `durable` is the stream's ticket.
    pub fn released(&mut self, id: u16, stream: usize, durable: Ticket) {
        if self.releasing.get(&id).is_some_and(|it| it.is_durable(stream, durable)) {
            self.releasing.remove(&id);
        }
    }

    /// Forgets the releases that are durable; `durable` has the ticket of each stream.
    pub fn settle(&mut self, durable: &[Ticket]) {
        self.releasing.retain(|_, it| !it.is_durable(it.stream, durable[it.stream]));
    }

    pub fn release_all(&mut self) -> HashMap<u16, Received> {
        self.room.free(self.ids.len());
        self.releasing = HashMap::new();
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
