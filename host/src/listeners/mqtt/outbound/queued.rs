//! One message for one subscriber, and the bounds of the queue that it waits in.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Message;
use crate::listeners::mqtt::subscriptions::Options;

/// Where a message of a stream lies.
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
    /// Held by the retained messages too.
    Retained(Arc<Message>),
    /// `$SYS`
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

/// One message for one subscriber.
#[derive(Clone)]
pub struct Queued {
    pub source: Source,
    /// Body of a stream's message; `None` where it is to be read there.
    pub body: Option<Arc<Message>>,
    /// Broker time since when it waits.
    pub since_us: u64,
    /// See [`Message::len`].
    pub len: u32,
    pub qos: u8,
    pub retain: bool,
    /// Not in the order of its stream: retained, or given back by another.
    pub apart: bool,
    /// Perhaps sent before a restart.
    pub may_be_again: bool,
    /// Subscription identifiers, mostly none. Those of a stream's message go with its body
    /// and are found again when that is read.
    pub ids: Ids,
    /// The shared subscription that it came by.
    pub share: Option<ShareFilter>,
}

/// Number of bytes that a message takes in a queue beside its content. Most messages that wait
/// lie in their streams and take no more than this.
pub const REFERENCE_BYTES: usize = size_of::<Queued>();
const _: () = assert!(REFERENCE_BYTES <= 64);

/// Filter of a shared subscription, as a client wrote it. The pointer is thin because a queue has
/// many.
pub type ShareFilter = Arc<Box<str>>;

/// The identifiers of the subscriptions that a message matches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Ids {
    #[default]
    None,
    One(u32),
    /// The messages of a queue share them where they are the same. The pointer is thin because a
    /// queue has many.
    Many(Arc<Box<[u32]>>),
}

impl Ids {
    /// `id` 0: none.
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
    /// Makes an entry of one subscription, as a retained message; its bytes are held by others too.
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

    /// To be read before it can be sent.
    pub fn place(&self) -> Option<Place> {
        self.source.place().filter(|_| self.body.is_none())
    }

    /// For the queue's bound in bytes.
    pub fn bytes(&self) -> usize {
        self.len as usize + size_of_val(self.ids.as_slice())
    }

    pub fn held(&self) -> usize {
        if self.body.is_some() { self.bytes() } else { 0 }
    }

    /// The identifier of the only subscription that it can have come by; 0: none.
    pub fn own_id(&self) -> u32 {
        let is_own = self.share.is_some() || self.source.place().is_none();
        self.ids.as_slice().first().copied().filter(|_| is_own).unwrap_or(0)
    }

    /// Leaves what can be read again to be read.
    pub fn let_go(&mut self) {
        self.body = None;
        self.ids = Ids::one(self.own_id());
    }
}

/// Sums of the messages in a queue.
#[derive(Clone, Copy, Default)]
pub struct Sums {
    /// Wherever they are.
    pub bytes: usize,
    /// Bytes of these messages that are in memory.
    pub held: usize,
    /// Messages with QoS 0.
    pub at_most_once: usize,
    /// Messages out of the order of their stream.
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
    /// `None` once PUBREC came: PUBREL is on its way.
    pub waiting: Option<Queued>,
    /// The change that must be durable before its packet goes out.
    pub after: u64,
    /// Sent before.
    pub dup: bool,
    /// Bytes of its record in the broker stream's state.
    pub record: u32,
}

impl InFlight {
    /// Bytes of its message in memory.
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

/// What a full queue of a session does with one message more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WhenFull {
    /// The queue's oldest messages go.
    #[default]
    DropOldest,
    /// The new message is not queued.
    Refuse,
}

/// The bound that is met where a message finds no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// The subscriber's own queue is full.
    Queue,
    /// The queues of all subscribers together leave this one no more memory.
    Queues,
}

/// What becomes of a message that a session is given, which is not sent soon. The later ones are better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Keeps {
    /// It is lost.
    Nothing,
    /// It is kept, and the oldest of the queue are lost.
    Newest,
    /// It is kept beside the others.
    All,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Offer {
    Queued,
    /// Queued into an empty queue: wake the connection.
    QueuedFirst,
    /// Queued, and so many older ones dropped.
    QueuedInsteadOf(u32, Full),
    /// It has had this message, or came after it.
    Before,
    /// QoS 0 with nobody connected: not kept (MQTT 5.0, 3.1.2.4).
    Away,
    /// No room.
    Dropped(Full),
    /// QoS 1 or 2 with no room, and a session that ends with its connection:
    /// the subscriber is too slow.
    Overflow(Full),
}
