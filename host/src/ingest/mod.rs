//! The path from a topic and a payload to a durable message, which all listeners share.
//!
//! [`Ingest::place`] returns the stream and the device of a topic. [`Ingest::message`] builds the
//! message. [`Ingest::append`] appends all messages of one read or request for a stream, together with
//! the state changes that must become durable with them. [`Ingest::durable`] waits until they are.
//! [`facts`] encodes what a listener knows about a message besides its payload. [`crate::access`]
//! decides before all this whether a client may publish.
//!
//! Nothing here allocates for a message or waits, except [`Ingest::durable`], [`Ingest::room`], and
//! [`Owned`], which stores a message for which a stream had no room.

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

/// The streams that take messages of devices, and the mapping from topics to them.
pub struct Ingest {
    routes: Streams,
    /// Each stream once. Listeners refer to a stream by its index.
    streams: Arc<[Arc<dyn Stream>]>,
    /// Partition counts, by the index of the stream.
    partitions: Box<[u16]>,
    namespace: Arc<Namespace>,
}

/// The stream and device of a topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index of the stream.
    pub stream: usize,
    /// Range of the device in the topic. `None` if the topic does not match the namespace; the device is
    /// then the client that published.
    pub device: Option<Range<usize>>,
}

/// What a listener knows about a message.
#[derive(Clone, Copy, Debug)]
pub struct Draft<'m> {
    pub topic: &'m str,
    pub payload: &'m [u8],
    /// Properties in the encoding of [`crate::properties`].
    pub properties: &'m [u8],
    pub device: &'m str,
    /// Flags: see [`flags`].
    pub flags: u16,
    /// Microseconds since 1970, UTC.
    pub received_us: u64,
}

/// Why an append was rejected, by what the caller does next. None of the append is in the stream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    /// The stream has no room now. The caller awaits [`Ingest::room`] and tries again. `lasts` means
    /// that the disk is full or that retention waits for a reader, so that it may take long.
    #[error("the stream has no room")]
    NoRoom { lasts: bool },
    /// The stream can never take the append.
    #[error("larger than the stream takes: {0}")]
    TooLarge(&'static str),
    /// The stream has stopped and takes nothing more.
    #[error("the stream has stopped: {0}")]
    Stopped(Arc<str>),
}

/// The stream stopped. What was appended last may never become durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped;

/// Totals of messages that a stream took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    pub by_qos: [u64; 3],
    /// Bytes of payloads.
    pub bytes: u64,
    /// Number of messages whose topic does not match the namespace.
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

    /// Returns the index of the stream to which a topic belongs.
    #[inline]
    pub fn route(&self, topic: &str) -> usize {
        if self.streams.len() == 1 { 0 } else { self.routes.number_of(topic) }
    }

    #[inline]
    pub fn place(&self, topic: &str) -> Place {
        Place { stream: self.route(topic), device: self.namespace.device_span(topic) }
    }

    /// Builds a message for a stream.
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

    /// Appends messages and changes of the stream's state, all or nothing. Does not block.
    #[inline]
    pub fn append(
        &self,
        stream: usize,
        messages: &[NewMessage<'_>],
        changes: &[StateChange<'_>],
    ) -> Result<Appended, Rejected> {
        self.streams[stream].append(messages, changes).map_err(Rejected::from)
    }

    /// Waits until an append that found no room may be tried again. Cancel safe.
    pub async fn room(&self, stream: usize) {
        self.streams[stream].writable().await;
    }

    /// Waits until the append is durable. Cancel safe.
    pub async fn durable(&self, stream: usize, ticket: Ticket) -> Result<(), Stopped> {
        let mut durable = self.streams[stream].durable();
        durable.wait_for(|durable| *durable >= ticket).await.map(drop).map_err(|_| Stopped)
    }
}

impl Place {
    /// Returns the flags that are added to each message.
    #[inline]
    pub fn flags(&self) -> u16 {
        if self.device.is_some() { flags::FITS_NAMESPACE } else { 0 }
    }

    /// Returns the device that the topic names, otherwise that of the client.
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

/// Returns the name of a client as a device id of at most 256 bytes.
#[inline]
pub fn cut_device(client: &str) -> &str {
    if client.len() <= DEVICE_ID_BYTES_MAX {
        return client;
    }
    &client[..client.floor_char_boundary(DEVICE_ID_BYTES_MAX)]
}
