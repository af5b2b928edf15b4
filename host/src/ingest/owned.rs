//! A message that waits for room in its stream after the buffer in which it was received was reused.

use super::{Draft, Ingest};
use crate::stream::NewMessage;

pub struct Owned {
    topic: Box<str>,
    payload: Box<[u8]>,
    properties: Box<[u8]>,
    device: Box<str>,
    pub flags: u16,
    received_us: u64,
}

impl Owned {
    pub fn of(message: &NewMessage<'_>) -> Self {
        Self {
            topic: message.topic.into(),
            payload: message.payload.into(),
            properties: message.properties.into(),
            device: message.device.into(),
            flags: message.flags,
            received_us: message.received_us,
        }
    }

    /// Returns the number of bytes of memory that the message takes.
    pub fn bytes(&self) -> usize {
        let parts = self.topic.len() + self.payload.len() + self.properties.len() + self.device.len();
        size_of::<Self>() + parts
    }

    /// Returns the message for a stream.
    pub fn message(&self, ingest: &Ingest, stream: usize) -> NewMessage<'_> {
        let Self { topic, payload, properties, device, flags, received_us } = self;
        let (flags, received_us) = (*flags, *received_us);
        ingest.message(stream, Draft { topic, payload, properties, device, flags, received_us })
    }
}
