//! A message that is delivered to subscribers.

use bytes::BufMut;

use crate::batch::{MessageRef, flags};
use crate::listeners::mqtt::clock::Clock;
use crate::properties::{self, Origin, facts};
use crate::stream::NewMessage;

/// A message for any number of subscribers, in a single allocation.
#[derive(Debug)]
pub struct Message {
    /// Topic, MQTT 5 properties, payload.
    bytes: Box<[u8]>,
    topic_len: u32,
    properties_len: u32,
    pub qos: u8,
    pub retain: bool,
    received_us: u64,
    expiry_s: Option<u32>,
}

impl Message {
    pub fn new(topic: &str, payload: &[u8], properties: &[u8], flags_: u16, received_us: u64) -> Self {
        let mut bytes = Vec::with_capacity(topic.len() + properties.len() + payload.len());
        bytes.extend_from_slice(topic.as_bytes());
        let expiry_s = put_properties(&mut bytes, properties, flags_ & flags::UTF8 != 0);
        let properties_len = (bytes.len() - topic.len()) as u32;
        bytes.extend_from_slice(payload);
        Self {
            bytes: bytes.into(),
            topic_len: topic.len() as u32,
            properties_len,
            qos: (flags_ & flags::QOS_MASK) as u8,
            retain: flags_ & flags::RETAIN != 0,
            received_us,
            expiry_s,
        }
    }

    pub fn of(message: MessageRef<'_>) -> Self {
        let (flags, received_us) = (message.entry.flags, message.entry.received_us);
        Self::new(message.topic(), message.payload(), message.properties(), flags, received_us)
    }

    pub fn of_new(message: &NewMessage<'_>) -> Self {
        let NewMessage { topic, payload, properties, flags, received_us, .. } = *message;
        Self::new(topic, payload, properties, flags, received_us)
    }

    pub fn topic(&self) -> &str {
        std::str::from_utf8(&self.bytes[..self.topic_len as usize]).unwrap_or_default()
    }

    /// Returns the properties as MQTT 5 encodes them, without their length.
    pub fn properties(&self) -> &[u8] {
        &self.bytes[self.topic_len as usize..][..self.properties_len as usize]
    }

    pub fn payload(&self) -> &[u8] {
        &self.bytes[(self.topic_len + self.properties_len) as usize..]
    }

    /// Returns the size for the queue's bound in bytes.
    pub fn len(&self) -> usize {
        self.bytes.len() + size_of::<Self>()
    }

    /// Returns the size, as [`Message::len`], of a message that is not copied out of its stream's frame.
    pub fn len_of(message: MessageRef<'_>) -> u32 {
        let bytes = message.topic().len() + message.properties().len() + message.payload().len();
        (bytes + size_of::<Self>()) as u32
    }

    pub fn received_us(&self) -> u64 {
        self.received_us
    }

    /// Returns the number of seconds for which the message may still wait; `None` if it has expired.
    pub fn lifetime(&self, clock: &Clock) -> Option<Option<u32>> {
        let Some(expiry) = self.expiry_s else { return Some(None) };
        let waited = clock.now_us().saturating_sub(clock.of_wall(self.received_us)) / 1_000_000;
        expiry.checked_sub(waited.min(u64::from(u32::MAX)) as u32).filter(|left| *left > 0).map(Some)
    }
}

/// Encodes properties of the plugin contract as MQTT 5 properties. The expiry is returned instead,
/// because it decreases while the message waits.
fn put_properties(out: &mut Vec<u8>, encoded: &[u8], utf8: bool) -> Option<u32> {
    let put = |out: &mut Vec<u8>, id: u8, values: &[&[u8]]| {
        out.put_u8(id);
        for value in values {
            out.put_u16(value.len() as u16);
            out.put_slice(value);
        }
    };
    if utf8 {
        out.put_slice(&[0x01, 1]);
    }
    let mut expiry = None;
    for property in properties::iter(encoded) {
        if property.value.len() > usize::from(u16::MAX) {
            continue;
        }
        let listener = property.origin == Origin::Listener as u8;
        match property.name {
            facts::CONTENT_TYPE if listener => put(out, 0x03, &[property.value]),
            facts::RESPONSE_TOPIC if listener => put(out, 0x08, &[property.value]),
            facts::CORRELATION_DATA if listener => put(out, 0x09, &[property.value]),
            facts::EXPIRY_S if listener => {
                expiry = std::str::from_utf8(property.value).ok().and_then(|text| text.parse().ok());
            }
            _ if listener => {}
            name if is_sendable(name.as_bytes()) && is_sendable(property.value) => {
                put(out, 0x26, &[name.as_bytes(), property.value]);
            }
            _ => {}
        }
    }
    expiry
}

/// Returns whether a text is valid in MQTT: UTF-8 without U+0000 (1.5.4). A plugin's properties may
/// contain any bytes.
fn is_sendable(text: &[u8]) -> bool {
    std::str::from_utf8(text).is_ok_and(|text| !text.contains('\0'))
}
