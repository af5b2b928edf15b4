//! Encodes outgoing packets of the hot path into the connection's buffer: the four acknowledgements,
//! PUBLISH, PINGRESP, DISCONNECT.

use bytes::{BufMut, BytesMut};

use super::{PINGRESP, PUBLISH, REASON_STRING, TOPIC_ALIAS, Version};

/// Longest reason string. Longer ones are cut.
const REASON_BYTES_MAX: usize = 200;
/// Largest acknowledgement with a reason string.
pub const ACK_BYTES_MAX: usize = 256;

/// Encodes a successful acknowledgement, which is the same in all versions.
#[inline]
pub fn put_ack(out: &mut BytesMut, first: u8, packet_id: u16) {
    out.put_slice(&[first, 2, (packet_id >> 8) as u8, packet_id as u8]);
}

/// Encodes an acknowledgement with a reason code. MQTT 3.1.1 has none, and always reports success.
pub fn put_ack_with(out: &mut BytesMut, version: Version, first: u8, packet_id: u16, code: u8) {
    match version {
        Version::V31 | Version::V3 => put_ack(out, first, packet_id),
        Version::V5 => out.put_slice(&[first, 3, (packet_id >> 8) as u8, packet_id as u8, code]),
    }
}

pub fn put_pingresp(out: &mut BytesMut) {
    out.put_slice(&[PINGRESP, 0]);
}

/// Encodes an MQTT 5 packet that consists of `head` and an optional reason string.
pub fn put_with_reason(out: &mut BytesMut, first: u8, head: &[u8], reason: &str) {
    let reason = &reason[..reason.floor_char_boundary(REASON_BYTES_MAX)];
    let properties = if reason.is_empty() { 0 } else { 3 + reason.len() };
    out.put_u8(first);
    put_var_int(out, head.len() + var_int_len(properties) + properties);
    out.put_slice(head);
    put_var_int(out, properties);
    if !reason.is_empty() {
        out.put_u8(REASON_STRING);
        out.put_u16(reason.len() as u16);
        out.put_slice(reason.as_bytes());
    }
}

/// A PUBLISH to a subscriber.
#[derive(Clone, Copy, Debug)]
pub struct OutPublish<'a> {
    pub qos: u8,
    pub retain: bool,
    pub dup: bool,
    pub topic: &'a str,
    /// MQTT 5 topic alias; 0 if there is none.
    pub alias: u16,
    pub packet_id: u16,
    /// Encoded MQTT 5 properties without their length; not sent to MQTT 3.1.1 clients.
    pub properties: &'a [u8],
    pub payload: &'a [u8],
}

impl OutPublish<'_> {
    /// Returns the number of bytes after the fixed header.
    pub fn remaining_len(&self, version: Version) -> usize {
        let properties = match version {
            Version::V31 | Version::V3 => 0,
            Version::V5 => var_int_len(self.properties_len()) + self.properties_len(),
        };
        2 + self.topic.len() + if self.qos > 0 { 2 } else { 0 } + properties + self.payload.len()
    }

    fn properties_len(&self) -> usize {
        self.properties.len() + if self.alias > 0 { 3 } else { 0 }
    }

    pub fn put(&self, version: Version, out: &mut BytesMut) {
        let remaining = self.remaining_len(version);
        out.reserve(5 + remaining);
        out.put_u8(PUBLISH | u8::from(self.dup) << 3 | self.qos << 1 | u8::from(self.retain));
        put_var_int(out, remaining);
        out.put_u16(self.topic.len() as u16);
        out.put_slice(self.topic.as_bytes());
        if self.qos > 0 {
            out.put_u16(self.packet_id);
        }
        if version == Version::V5 {
            put_var_int(out, self.properties_len());
            if self.alias > 0 {
                out.put_u8(TOPIC_ALIAS);
                out.put_u16(self.alias);
            }
            out.put_slice(self.properties);
        }
        out.put_slice(self.payload);
    }
}

pub fn put_var_int(out: &mut impl BufMut, mut value: usize) {
    loop {
        let byte = (value & 0x7f) as u8;
        value >>= 7;
        if value == 0 {
            return out.put_u8(byte);
        }
        out.put_u8(byte | 0x80);
    }
}

fn var_int_len(value: usize) -> usize {
    match value {
        0..=127 => 1,
        128..=16_383 => 2,
        16_384..=2_097_151 => 3,
        _ => 4,
    }
}
