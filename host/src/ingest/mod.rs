//! The way in that every listener uses: from a topic and its bytes to a durable message.
//!
//! [`Ingest::place`] says which stream and which device a topic is of, [`Ingest::message`] makes the
//! message, [`Ingest::append`] appends all that one read or request brought to a stream, with the
//! changes of state that are to become durable with it, and [`Ingest::durable`] waits for that.
//! What a listener says of a message beside its bytes is written by [`facts`]. Who may publish is
//! [`crate::access`]'s to say, before any of this.
//!
//! Nothing here allocates for a message or waits, but for [`Ingest::durable`], [`Ingest::room`], and
//! [`Owned`], which keeps what a stream had no room for.

pub mod facts;
mod owned;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::Arc;

use crate::batch::flags;
use crate::stream::{AppendError, Appended, NewMessage, StateChange, Stream, Streams, Ticket, partition_of};
use crate::topic::{DEVICE_ID_BYTES_MAX, Namespace};

pub use self::owned::Owned;

/// The streams that take messages of devices, and how a topic finds its own.
pub struct Ingest {
    routes: Streams,
    /// Each once; listeners know them by number.
    streams: Arc<[Arc<dyn Stream>]>,
    /// Partition counts, by the number of the stream.
    partitions: Box<[u16]>,
    namespace: Arc<Namespace>,
}

/// Where the messages of a topic go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Number of the stream.
    pub stream: usize,
    /// The device within the topic. `None`: the topic does not fit the namespace, and its messages are of
    /// the client that published them.
    pub device: Option<Range<usize>>,
}

/// What a listener knows of a message.
#[derive(Clone, Copy, Debug)]
pub struct Draft<'m> {
    pub topic: &'m str,
    pub payload: &'m [u8],
    /// As [`crate::properties`] lays them out.
    pub properties: &'m [u8],
    pub device: &'m str,
    /// See [`flags`].
    pub flags: u16,
    /// Microseconds since 1970, UTC.
    pub received_us: u64,
}

/// Why an append was not taken, by what its caller does next. Nothing of it is in the stream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    /// The stream has no room now: await [`Ingest::room`], then try again. `lasts`: the disk is full,
    /// or retention waits for a reader, so that it may take long.
    #[error("the stream has no room")]
    NoRoom { lasts: bool },
    /// The stream never takes it.
    #[error("larger than the stream takes: {0}")]
    TooLarge(&'static str),
    /// The stream takes and acknowledges nothing more.
    #[error("the stream has stopped: {0}")]
    Stopped(Arc<str>),
}

/// The stream stopped: what was appended last may never be durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped;

/// Sums over messages that a stream took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    pub by_qos: [u64; 3],
    /// Bytes of payloads.
    pub bytes: u64,
    /// Messages whose topic does not fit the namespace.
    pub outside_namespace: u64,
}

impl Ingest {
    pub fn new(routes: Streams, namespace: Arc<Namespace>) -> Self {
        let streams: Arc<[_]> = routes.iter().cloned().collect();
        let partitions = streams.iter().map(|stream| stream.identity().partitions).collect();
        Self { routes, streams, partitions, namespace }
    }

    pub fn streams(&self) -> &Arc<[Arc<dyn Stream>]> {
        &self.streams
    }

    pub fn stream(&self, number: usize) -> &dyn Stream {
        &*self.streams[number]
    }

    pub fn routes(&self) -> &Streams {
        &self.routes
    }

    /// Returns the number of the stream that a topic belongs to.
    #[inline]
    pub fn route(&self, topic: &str) -> usize {
        if self.streams.len() == 1 { 0 } else { self.routes.number_of(topic) }
    }

    #[inline]
    pub fn place(&self, topic: &str) -> Place {
        Place { stream: self.route(topic), device: self.namespace.device_span(topic) }
    }

    /// Returns a message for the stream of this number.
    #[inline]
    pub fn message<'m>(&self, stream: usize, draft: Draft<'m>) -> NewMessage<'m> {
        let Draft { topic, payload, properties, device, flags, received_us } = draft;
        let partition = partition_of(device, self.partitions[stream]);
        NewMessage {
            topic,
            payload,
            properties,
            route: "",
            device,
            partition,
            flags,
            received_us,
            event_us: 0,
        }
    }

    /// Appends messages and changes of the stream's state, all or nothing. Never waits.
    #[inline]
    pub fn append(
        &self,
        stream: usize,
        messages: &[NewMessage<'_>],
        changes: &[StateChange<'_>],
    ) -> Result<Appended, Rejected> {
        self.streams[stream].append(messages, changes).map_err(Rejected::from)
    }

    /// Returns when an append that found no room may be tried again. Safe to drop.
    pub async fn room(&self, stream: usize) {
        self.streams[stream].writable().await;
    }

    /// Returns once the append is durable. Safe to drop.
    pub async fn durable(&self, stream: usize, ticket: Ticket) -> Result<(), Stopped> {
        let mut durable = self.streams[stream].durable();
        durable.wait_for(|durable| *durable >= ticket).await.map(drop).map_err(|_| Stopped)
    }
}

impl Place {
    /// Returns what it adds to the flags of a message.
    #[inline]
    pub fn flags(&self) -> u16 {
        if self.device.is_some() { flags::FITS_NAMESPACE } else { 0 }
    }

    /// Returns the device that the topic names, else that of the client that published it.
    #[inline]
    pub fn device_of<'m>(&self, topic: &'m str, client: &'m str) -> &'m str {
        match &self.device {
            Some(device) => &topic[device.clone()],
            None => cut_device(client),
        }
    }
}

impl From<AppendError> for Rejected {
    fn from(error: AppendError) -> Self {
        match error {
            AppendError::Full => Self::NoRoom { lasts: false },
            AppendError::NoSpace => Self::NoRoom { lasts: true },
            AppendError::TooLarge(what) => Self::TooLarge(what),
            AppendError::Stopped(reason) => Self::Stopped(reason),
        }
    }
}

impl Taken {
    pub fn of(messages: &[NewMessage<'_>]) -> Self {
        let mut taken = Self::default();
        for message in messages {
            taken.outside_namespace += u64::from(message.flags & flags::FITS_NAMESPACE == 0);
            taken.by_qos[usize::from(message.flags & flags::QOS_MASK).min(2)] += 1;
            taken.bytes += message.payload.len() as u64;
        }
        taken
    }
}

/// Returns the name of a client as a device id: at most 256 bytes.
#[inline]
pub fn cut_device(client: &str) -> &str {
    if client.len() <= DEVICE_ID_BYTES_MAX {
        return client;
    }
    &client[..client.floor_char_boundary(DEVICE_ID_BYTES_MAX)]
}
