//! A queue entry of a subscriber, and the bounds of the queue.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde::{Deserialize, Serialize};

use super::Message;
use crate::listeners::mqtt::config::Config;
use crate::listeners::mqtt::subscriptions::Options;

/// Place of a message in a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    pub stream: u16,
    pub offset: u64,
}

#[derive(Clone)]
pub enum Source {
    Stream {
        stream: u16,
        offset: u64,
    },
    /// A retained message, which the retained messages hold too.
    Retained(Arc<Message>),
    /// A message of `$SYS`.
    Broker(Arc<Message>),
}

impl Source {
    pub fn stream(&self) -> Option<u16> {
        self.place().map(|place| place.stream)
    }

    pub fn place(&self) -> Option<Place> {
        match *self {
            Self::Stream { stream, offset } => Some(Place { stream, offset }),
            _ => None,
        }
    }
}

/// A message for one subscriber.
#[derive(Clone)]
pub struct Queued {
    pub source: Source,
    /// Body of a stream's message; `None` if it must be read from the stream.
    pub body: Option<Arc<Message>>,
    /// Broker time at which the message was queued.
    pub since_us: u64,
    /// Size: see [`Message::len`].
    pub len: u32,
    pub qos: u8,
    pub retain: bool,
    /// Whether the message is out of the order of its stream: retained, or given back by another
    /// session.
    pub apart: bool,
    /// Whether the message may have been sent before a restart.
    pub may_be_again: bool,
    /// Subscription identifiers, usually none. Those of a stream's message belong to its body, and are
    /// determined again when that is read.
    pub ids: Ids,
    /// The shared subscription through which the message was received.
    pub share: Option<ShareFilter>,
}

/// Size of a queue entry without its content. Most queued messages are in their streams and take only
/// this.
pub const REFERENCE_BYTES: usize = size_of::<Queued>();
const _: () = assert!(REFERENCE_BYTES <= 64);

/// Filter of a shared subscription, as a client wrote it. The pointer is thin because a queue has many.
pub type ShareFilter = Arc<Box<str>>;

/// The identifiers of the subscriptions that a message matches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Ids {
    #[default]
    None,
    One(u32),
    /// Several identifiers. Messages of a queue share them if they are equal. The pointer is thin
    /// because a queue has many.
    Many(Arc<Box<[u32]>>),
}

impl Ids {
    /// Returns the identifiers for one subscription. `id` 0 means none.
    pub fn one(id: u32) -> Self {
        if id == 0 { Self::None } else { Self::One(id) }
    }

    pub fn as_slice(&self) -> &[u32] {
        match self {
            Self::None => &[],
            Self::One(id) => std::slice::from_ref(id),
            Self::Many(ids) => ids,
        }
    }
}

impl FromIterator<u32> for Ids {
    fn from_iter<I: IntoIterator<Item = u32>>(ids: I) -> Self {
        let mut ids = ids.into_iter();
        match (ids.next(), ids.next()) {
            (None, _) => Self::None,
            (Some(one), None) => Self::One(one),
            (Some(one), Some(two)) => {
                let all: Box<[u32]> = [one, two].into_iter().chain(ids).collect();
                Self::Many(all.into())
            }
        }
    }
}

impl Queued {
    /// Creates an entry for one subscription, as for a retained message, whose bytes others hold too.
    pub fn whole(source: Source, qos: u8, options: Options, since_us: u64) -> Self {
        let len = match &source {
            Source::Retained(message) | Source::Broker(message) => message.len(),
            Source::Stream { .. } => 0,
        };
        Self {
            apart: true,
            source,
            body: None,
            since_us,
            len: len as u32,
            qos,
            retain: true,
            may_be_again: false,
            ids: Ids::one(options.id),
            share: None,
        }
    }

    pub fn message(&self) -> Option<&Arc<Message>> {
        match &self.source {
            Source::Stream { .. } => self.body.as_ref(),
            Source::Retained(message) | Source::Broker(message) => Some(message),
        }
    }

    /// Returns the place from which the message must be read before it can be sent.
    pub fn place(&self) -> Option<Place> {
        self.source.place().filter(|_| self.body.is_none())
    }

    /// Returns the size for the queue's bound in bytes.
    pub fn bytes(&self) -> usize {
        self.len as usize + size_of_val(self.ids.as_slice())
    }

    pub fn held(&self) -> usize {
        if self.body.is_some() { self.bytes() } else { 0 }
    }

    /// Returns the identifier of the only subscription through which it can have been received; 0 if
    /// there is none.
    pub fn own_id(&self) -> u32 {
        let is_own = self.share.is_some() || self.source.place().is_none();
        self.ids.as_slice().first().copied().filter(|_| is_own).unwrap_or(0)
    }

    /// Drops a body that can be read again.
    pub fn let_go(&mut self) {
        self.body = None;
        self.ids = Ids::one(self.own_id());
    }
}

/// Sums of the messages in a queue.
#[derive(Clone, Copy, Default)]
pub struct Sums {
    /// Bytes of all messages, in memory or not.
    pub bytes: usize,
    /// Bytes of these messages that are in memory.
    pub held: usize,
    /// Number of messages with QoS 0.
    pub at_most_once: usize,
    /// Number of messages out of the order of their stream.
    pub apart: usize,
}

impl Sums {
    pub fn of<'q>(queue: impl IntoIterator<Item = &'q Queued>) -> Self {
        let mut sums = Self::default();
        queue.into_iter().for_each(|queued| sums.add(queued));
        sums
    }

    pub fn add(&mut self, queued: &Queued) {
        self.bytes += queued.bytes();
        self.held += queued.held();
        self.at_most_once += usize::from(queued.qos == 0);
        self.apart += usize::from(queued.apart);
    }

    pub fn subtract(&mut self, queued: &Queued) {
        self.bytes -= queued.bytes();
        self.held -= queued.held();
        self.at_most_once -= usize::from(queued.qos == 0);
        self.apart -= usize::from(queued.apart);
    }
}

pub struct InFlight {
    pub packet_id: u16,
    /// The message; `None` after PUBREC, when PUBREL is to be sent.
    pub waiting: Option<Queued>,
    /// Number of the change that must be durable before the packet is sent.
    pub after: u64,
    /// Whether the message was sent before.
    pub dup: bool,
    /// Bytes of its record in the state of the broker's stream.
    pub record: u32,
}

impl InFlight {
    /// Returns the bytes of its message in memory.
    pub fn held(&self) -> usize {
        self.waiting.as_ref().filter(|queued| queued.message().is_some()).map_or(0, Queued::bytes)
    }
}

#[derive(Clone, Copy, Debug)]
pub struct QueueLimits {
    pub messages_max: usize,
    pub bytes_max: usize,
    pub when_full: WhenFull,
}

impl QueueLimits {
    pub fn of(config: &Config) -> Self {
        Self {
            messages_max: config.queue_messages_max as usize,
            bytes_max: config.queue_bytes_max.0 as usize,
            when_full: config.queue_when_full,
        }
    }
}

/// The bounds of all queues, which a reload changes.
pub struct SharedLimits {
    messages_max: AtomicUsize,
    bytes_max: AtomicUsize,
    drops_oldest: AtomicBool,
}

impl SharedLimits {
    pub fn new(limits: QueueLimits) -> Self {
        let shared = Self {
            messages_max: AtomicUsize::new(0),
            bytes_max: AtomicUsize::new(0),
            drops_oldest: AtomicBool::new(false),
        };
        shared.set(limits);
        shared
    }

    /// Returns the bounds. While they change, some may be the former ones.
    #[inline]
    pub fn get(&self) -> QueueLimits {
        let drops_oldest = self.drops_oldest.load(Ordering::Relaxed);
        QueueLimits {
            messages_max: self.messages_max.load(Ordering::Relaxed),
            bytes_max: self.bytes_max.load(Ordering::Relaxed),
            when_full: if drops_oldest { WhenFull::DropOldest } else { WhenFull::Refuse },
        }
    }

    pub fn set(&self, limits: QueueLimits) {
        let QueueLimits { messages_max, bytes_max, when_full } = limits;
        self.messages_max.store(messages_max, Ordering::Relaxed);
        self.bytes_max.store(bytes_max, Ordering::Relaxed);
        self.drops_oldest.store(when_full == WhenFull::DropOldest, Ordering::Relaxed);
    }
}

/// What the full queue of a session does with another message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WhenFull {
    /// The oldest messages of the queue are dropped.
    #[default]
    DropOldest,
    /// The new message is not queued.
    Refuse,
}

/// The bound that prevents a message from being queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// The subscriber's own queue is full.
    Queue,
    /// The queues of all subscribers together leave no memory for this one.
    Queues,
}

/// What happens to a message that a session is given and that is not sent soon. Later variants are
/// better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Keeps {
    /// It is lost.
    Nothing,
    /// The message is kept, and the oldest messages of the queue are lost.
    Newest,
    /// The message is kept in addition to the others.
    All,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Offer {
    Queued,
    /// Queued into an empty queue. The connection must be woken.
    QueuedFirst,
    /// Queued, and this number of older messages dropped.
    QueuedInsteadOf(u32, Full),
    /// The session has had this message, or began after it.
    Before,
    /// QoS 0 without a connected client: not kept (MQTT 5.0, 3.1.2.4).
    Away,
    /// Dropped because there was no room.
    Dropped(Full),
    /// QoS 1 or 2 without room, in a session that ends with its connection: the subscriber is too slow.
    Overflow(Full),
}
