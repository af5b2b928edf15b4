//! QoS 2 packet ids that clients have not released.
//!
//! Ids of persistent sessions are state of a stream, whose size is limited, so their total number is
//! limited too. A client for whose publish there is no room waits until an id is released, by itself or
//! by another client. A client without an open id always gets one, so that it can proceed one message at
//! a time, however many ids others hold.
//!
//! An id whose release is not durable is remembered until it is: a crash would open it again, so a
//! client that repeats its PUBREL must not be answered earlier than the first time.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, DefaultHasher};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::batch::flags;
use crate::properties::{self, Origin, facts};
use crate::stream::Ticket;

/// Most ids of all clients, besides the first of each. An id takes 17 bytes of state: with retained
/// messages and wills, the ids fit into a stream's state (`STATE_BYTES_MOST`).
pub const OPEN_IDS_MAX: usize = if cfg!(test) { 50 } else { 1_000_000 };

/// Place of the message of a QoS 2 packet id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    pub stream: usize,
    /// Ticket of the append that opened or releases the id; `None` while that append is being prepared.
    pub ticket: Option<Ticket>,
    /// Hash of the message; `None` for an id that 0.1.0 opened.
    pub content: Option<Content>,
}

/// Hash that tells whether a publish with an open packet id repeats the message that opened it, whatever
/// DUP says. A device that lost its state starts again with ids that its session knows, and sets DUP on
/// a message that never arrived. Two different messages have the same hash once in 2^32. The hash covers
/// topic, payload, RETAIN and properties, but not the expiry, which a device may count down before it
/// sends a message again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content([u8; 4]);

impl Content {
    pub fn of(topic: &str, payload: &[u8], properties: &[u8], flags: u16) -> Self {
        let mut hash = xxh3_64_with_seed(payload, xxh3_64(topic.as_bytes()));
        for property in properties::iter(properties) {
            if (property.origin, property.name) == (Origin::Listener as u8, facts::EXPIRY_S) {
                continue;
            }
            hash = xxh3_64_with_seed(property.name.as_bytes(), hash);
            hash = xxh3_64_with_seed(property.value, hash);
        }
        hash = hash.wrapping_add(u64::from(flags & (flags::RETAIN | flags::UTF8)));
        Self((hash as u32).to_le_bytes())
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    pub fn read(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

/// State of a packet id in a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// The client has not released the id.
    Open(Received),
    /// The removal of the id's record is not known to be durable. PUBCOMP waits for it, and so does a
    /// message in another stream that uses the id. The number of these ids is limited by the commit
    /// buffers in which the removals wait, and by the number of pending acknowledgements.
    Releasing(Received),
}

/// The packet ids of one session.
pub struct OpenIds {
    /// Ids by number. The map has no hash key of its own, which would take memory in each session: a
    /// packet id has too few values for a client to choose many that collide.
    ids: HashMap<u16, Known, BuildHasherDefault<DefaultHasher>>,
    /// Number of open ids.
    open: usize,
    room: Arc<OpenIdsRoom>,
}

/// Room for the ids of all sessions.
#[derive(Default)]
pub struct OpenIdsRoom {
    open: AtomicUsize,
    freed: Notify,
}

impl Received {
    /// Returns the earliest ticket for which an acknowledgement of this id may wait. For an id whose
    /// append is being prepared, that is the coming append.
    pub fn least(self) -> Ticket {
        self.ticket.unwrap_or_default()
    }

    /// Returns whether the append is durable, given the durable ticket of its stream.
    pub fn is_durable(self, durable: Ticket) -> bool {
        self.ticket.is_some_and(|ticket| ticket <= durable)
    }
}

impl Known {
    fn received(&mut self) -> &mut Received {
        match self {
            Self::Open(received) | Self::Releasing(received) => received,
        }
    }
}

impl OpenIds {
    pub fn new(room: Arc<OpenIdsRoom>) -> Self {
        Self { ids: HashMap::default(), open: 0, room }
    }

    /// Returns whether another id may be opened.
    pub fn has_room(&self) -> bool {
        self.open == 0 || self.room.is_there()
    }

    pub fn known(&self, id: u16) -> Option<Known> {
        self.ids.get(&id).copied()
    }

    /// Returns the place of the message of an open id.
    pub fn get(&self, id: u16) -> Option<Received> {
        match self.known(id) {
            Some(Known::Open(received)) => Some(received),
            _ => None,
        }
    }

    /// Returns the place of an id's release that may not be durable yet.
    pub fn releasing(&self, id: u16) -> Option<Received> {
        match self.known(id) {
            Some(Known::Releasing(received)) => Some(received),
            _ => None,
        }
    }

    /// Returns the open ids.
    pub fn all(&self) -> Vec<(u16, Received)> {
        let open = self.ids.iter().filter_map(|(id, known)| match known {
            Known::Open(received) => Some((*id, *received)),
            Known::Releasing(_) => None,
        });
        open.collect()
    }

    /// Opens an id. Returns its previous state, for [`OpenIds::put_back`].
    pub fn open(&mut self, id: u16, received: Received) -> Option<Known> {
        self.set(id, Some(Known::Open(received)))
    }

    /// Records the ticket of the append that opens or releases an id.
    pub fn appended(&mut self, id: u16, ticket: Ticket) {
        if let Some(known) = self.ids.get_mut(&id) {
            known.received().ticket = Some(ticket);
        }
    }

    /// Releases an id, and returns its open state. The ticket follows with the append.
    pub fn release(&mut self, id: u16) -> Option<Received> {
        let released = self.get(id)?;
        self.set(id, Some(Known::Releasing(Received { ticket: None, ..released })));
        Some(released)
    }

    /// Takes back a change of an id that no stream accepted, by restoring the previous state.
    pub fn put_back(&mut self, id: u16, before: Option<Known>) {
        self.set(id, before);
    }

    /// Forgets the release of an id if it is durable, given the durable ticket of its stream.
    pub fn released(&mut self, id: u16, stream: usize, durable: Ticket) {
        if self.releasing(id).is_some_and(|it| it.stream == stream && it.is_durable(durable)) {
            self.ids.remove(&id);
        }
    }

    /// Forgets all durable releases, given the durable ticket of each stream.
    pub fn settle(&mut self, durable: &[Ticket]) {
        self.ids.retain(|_, known| match known {
            Known::Open(_) => true,
            Known::Releasing(it) => !it.is_durable(durable[it.stream]),
        });
    }

    /// Forgets all ids, and returns those that were open.
    pub fn release_all(&mut self) -> Vec<(u16, Received)> {
        let open = self.all();
        self.room.free(std::mem::take(&mut self.open));
        self.ids = HashMap::default();
        open
    }

    fn set(&mut self, id: u16, known: Option<Known>) -> Option<Known> {
        let is_open = |known| matches!(known, Some(Known::Open(_)));
        let before = match known {
            Some(known) => self.ids.insert(id, known),
            None => self.ids.remove(&id),
        };
        match (is_open(before), is_open(known)) {
            (false, true) => {
                self.open += 1;
                self.room.open.fetch_add(1, Ordering::AcqRel);
            }
            (true, false) => {
                self.open -= 1;
                self.room.free(1);
            }
            _ => {}
        }
        before
    }
}

impl OpenIdsRoom {
    /// Waits until there is room. Cancel safe.
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
