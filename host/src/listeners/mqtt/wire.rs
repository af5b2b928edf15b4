//! The hand-written codec for packets of the hot path: framing, PUBLISH in both directions, and the four
//! acknowledgements. They are parsed in place in the connection's read buffer, so that a message is
//! copied once, into its stream. All other packets use `rmqtt-codec`; a property test checks that both
//! parse a PUBLISH alike.
//!
//! Format: MQTT 5.0, sections 2 and 3.3 to 3.7.

mod codec;
mod encode;

use rmqtt_codec::error::DecodeError;
use rmqtt_codec::v5::{DisconnectReasonCode, ToReasonCode};

pub use codec::{Packet, check_connect, client_id, decode};
pub use encode::{
    ACK_BYTES_MAX, OutPublish, put_ack, put_ack_with, put_pingresp, put_var_int, put_with_reason,
};

/// Packet types in the upper half of a packet's first byte.
pub const CONNECT: u8 = 0x10;
pub const CONNACK: u8 = 0x20;
pub const PUBLISH: u8 = 0x30;
pub const PUBACK: u8 = 0x40;
pub const PUBREC: u8 = 0x50;
pub const PUBREL: u8 = 0x62;
pub const PUBCOMP: u8 = 0x70;
pub const PINGREQ: u8 = 0xc0;
const SUBSCRIBE: u8 = 0x82;
const SUBACK: u8 = 0x90;
const UNSUBACK: u8 = 0xb0;
const PINGRESP: u8 = 0xd0;
const DUP: u8 = 0x08;
pub const DISCONNECT: u8 = 0xe0;

/// Identifiers of properties.
const REASON_STRING: u8 = 0x1f;
const TOPIC_ALIAS: u8 = 0x23;

/// Longest CONNECT, and longest AUTH before CONNACK, because the client is not known yet.
pub const CONNECT_BYTES_MAX: usize = 64 << 10;

/// PUBCOMP, PUBREL: packet identifier not found.
pub const NOT_FOUND: u8 = 0x92;
/// PUBACK, PUBREC: not authorized.
pub const NOT_AUTHORIZED: u8 = 0x87;
/// PUBACK, PUBREC: topic name invalid.
pub const TOPIC_NAME_INVALID: u8 = 0x90;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// 3.1
    V31,
    /// 3.1.1
    V3,
    V5,
}

impl Version {
    /// Returns the first byte of a packet without the DUP flag, which MQTT 3.1 (2.1) also has for
    /// PUBREL, SUBSCRIBE and UNSUBSCRIBE and which is not used here.
    #[inline]
    pub fn first(self, first: u8) -> u8 {
        match first & 0xf0 {
            0x60 | 0x80 | 0xa0 if self == Self::V31 => first & !DUP,
            _ => first,
        }
    }
}

/// A violation of the protocol or the rules by a client, which ends its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Reason code for MQTT 5's DISCONNECT.
    pub code: DisconnectReasonCode,
    pub what: &'static str,
}

impl Fault {
    pub const fn malformed(what: &'static str) -> Self {
        Self { code: DisconnectReasonCode::MalformedPacket, what }
    }

    pub const fn protocol(what: &'static str) -> Self {
        Self { code: DisconnectReasonCode::ProtocolError, what }
    }

    /// Returns whether the packet is well-formed, but not permitted.
    pub fn is_refusal(&self) -> bool {
        self.code == DisconnectReasonCode::NotAuthorized
    }
}

impl From<DecodeError> for Fault {
    fn from(error: DecodeError) -> Self {
        let what = match error {
            DecodeError::UnsupportedPacketType => return Self::malformed("packet type or its flags"),
            DecodeError::Utf8Error => return Self::malformed("text is not UTF-8"),
            DecodeError::InvalidTopicFilter => return Self::protocol("no topic filter, or an empty one"),
            DecodeError::MaxSizeExceeded { .. } => "packet is larger than allowed",
            DecodeError::PacketIdRequired => "packet id",
            DecodeError::InvalidLength => "a length in the packet",
            _ => "a field of the packet",
        };
        Self { code: error.to_reason_code(), what }
    }
}

const NUL: Fault = Fault::malformed("text has a NUL character");

/// A whole packet at the front of a buffer.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    pub first: u8,
    pub body: &'a [u8],
    /// Size of the packet with its header.
    pub len: usize,
}

/// Returns the first packet of `bytes`; `None` if it is incomplete.
#[inline]
pub fn frame(bytes: &[u8], packet_bytes_max: usize) -> Result<Option<Frame<'_>>, Fault> {
    let Some((&first, rest)) = bytes.split_first() else { return Ok(None) };
    let Some((len, used)) = var_int(rest)? else { return Ok(None) };
    let header = 1 + used;
    if header + len > packet_bytes_max {
        return Err(Fault {
            code: DisconnectReasonCode::PacketTooLarge,
            what: "packet is larger than max_packet_size",
        });
    }
    Ok(bytes.get(header..header + len).map(|body| Frame { first, body, len: header + len }))
}

/// Returns the size of the packet at the front, once its header is complete.
pub fn packet_len(bytes: &[u8]) -> Option<usize> {
    let (len, used) = var_int(bytes.get(1..)?).ok()??;
    Some(1 + used + len)
}

/// Describes the first packet of `bytes`, which exceeds the allowed size, with its topic if that has
/// been received, so that an operator can find the device.
pub fn too_large(mut bytes: &[u8], packet_bytes_max: usize) -> Option<String> {
    while let Ok(Some(frame)) = frame(bytes, packet_bytes_max) {
        bytes = &bytes[frame.len..];
    }
    let len = packet_len(bytes).filter(|len| *len > packet_bytes_max)?;
    if bytes[0] & 0xf0 != PUBLISH {
        return Some(format!("a packet of {len} bytes"));
    }
    let (_, used) = var_int(&bytes[1..]).ok()??;
    let topic = || {
        let (head, rest) = bytes.get(1 + used..)?.split_at_checked(2)?;
        std::str::from_utf8(rest.get(..usize::from(u16::from_be_bytes([head[0], head[1]])))?).ok()
    };
    let topic = topic().map(|topic| format!(" to topic \"{topic}\"")).unwrap_or_default();
    Some(format!("a message of {len} bytes{topic}"))
}

/// Decodes a variable byte integer, and returns it with its length; `None` if it is incomplete.
#[inline]
fn var_int(bytes: &[u8]) -> Result<Option<(usize, usize)>, Fault> {
    let mut value = 0;
    for (i, &byte) in bytes.iter().take(4).enumerate() {
        value |= usize::from(byte & 0x7f) << (7 * i);
        if byte & 0x80 == 0 {
            return Ok(Some((value, i + 1)));
        }
    }
    if bytes.len() >= 4 { Err(Fault::malformed("a length of more than four bytes")) } else { Ok(None) }
}

/// A PUBLISH, borrowed from the read buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Publish<'a> {
    pub qos: u8,
    pub retain: bool,
    pub dup: bool,
    /// Topic; empty if a topic alias replaces it.
    pub topic: &'a str,
    /// Packet id; 0 with QoS 0.
    pub packet_id: u16,
    /// Encoded MQTT 5 properties, which [`properties`] decodes.
    pub properties: &'a [u8],
    pub payload: &'a [u8],
}

#[inline]
pub fn publish<'a>(version: Version, frame: &Frame<'a>) -> Result<Publish<'a>, Fault> {
    let qos = frame.first >> 1 & 0b11;
    let dup = frame.first & 8 != 0;
    if qos == 3 {
        return Err(Fault::malformed("QoS 3"));
    }
    if dup && qos == 0 {
        return Err(Fault::malformed("DUP with QoS 0"));
    }
    let mut rest = frame.body;
    let topic = text(&mut rest)?;
    // The loop has no early exit, so that the compiler can vectorize it. A valid topic is read to its end anyway.
    let valid = !topic.bytes().fold(false, |found, byte| found | matches!(byte, b'+' | b'#'));
    if !valid || (topic.is_empty() && version != Version::V5) {
        return Err(Fault {
            code: DisconnectReasonCode::TopicNameInvalid,
            what: "topic is empty or has a wildcard",
        });
    }
    let packet_id = if qos == 0 { 0 } else { packet_id(&mut rest)? };
    let properties = if version == Version::V5 { sized(&mut rest)? } else { &[] };
    Ok(Publish { qos, retain: frame.first & 1 != 0, dup, topic, packet_id, properties, payload: rest })
}

/// A property of a PUBLISH.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Property<'a> {
    Utf8(bool),
    ExpirySeconds(u32),
    ContentType(&'a str),
    ResponseTopic(&'a str),
    CorrelationData(&'a [u8]),
    TopicAlias(u16),
    User(&'a str, &'a str),
}

/// Passes each property to `visit`. Fails for properties that a client must not send.
pub fn properties<'a>(mut raw: &'a [u8], mut visit: impl FnMut(Property<'a>)) -> Result<(), Fault> {
    let mut seen = 0u64;
    while let Some((&id, rest)) = raw.split_first() {
        raw = rest;
        if id != 0x26 && id < 64 {
            if seen >> id & 1 == 1 {
                return Err(Fault::protocol("a property stands twice"));
            }
            seen |= 1 << id;
        }
        visit(match id {
            0x01 => match take(&mut raw, 1)?[0] {
                value @ (0 | 1) => Property::Utf8(value == 1),
                _ => return Err(Fault::malformed("payload format indicator")),
            },
            0x02 => {
                let value = take(&mut raw, 4)?;
                Property::ExpirySeconds(u32::from_be_bytes([value[0], value[1], value[2], value[3]]))
            }
            0x03 => Property::ContentType(text(&mut raw)?),
            0x08 => Property::ResponseTopic(response_topic(text(&mut raw)?)?),
            0x09 => Property::CorrelationData(binary(&mut raw)?),
            0x0b => return Err(Fault::protocol("a client must not send a subscription identifier")),
            TOPIC_ALIAS => {
                let value = take(&mut raw, 2)?;
                Property::TopicAlias(u16::from_be_bytes([value[0], value[1]]))
            }
            0x26 => Property::User(text(&mut raw)?, text(&mut raw)?),
            _ => return Err(Fault::malformed("a property that PUBLISH does not have")),
        });
    }
    Ok(())
}

/// Checks a response topic, which must not contain wildcards (MQTT 5.0, 3.3.2.3.5).
pub fn response_topic(topic: &str) -> Result<&str, Fault> {
    if topic.contains(['+', '#']) {
        return Err(Fault::protocol("a wildcard in the response topic"));
    }
    Ok(topic)
}

#[inline]
fn take<'a>(rest: &mut &'a [u8], len: usize) -> Result<&'a [u8], Fault> {
    let (head, tail) = rest.split_at_checked(len).ok_or(Fault::malformed("the packet is cut short"))?;
    *rest = tail;
    Ok(head)
}

#[inline]
fn binary<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], Fault> {
    let len = take(rest, 2)?;
    take(rest, u16::from_be_bytes([len[0], len[1]]).into())
}

/// Returns the bytes after a length in the form of a variable byte integer.
#[inline]
fn sized<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], Fault> {
    let (len, used) = var_int(rest)?.ok_or(Fault::malformed("properties are cut short"))?;
    *rest = &rest[used..];
    take(rest, len)
}

#[inline]
fn text<'a>(rest: &mut &'a [u8]) -> Result<&'a str, Fault> {
    let text = std::str::from_utf8(binary(rest)?).map_err(|_| Fault::malformed("text is not UTF-8"))?;
    if text.contains('\0') { Err(NUL) } else { Ok(text) }
}

#[inline]
fn packet_id(rest: &mut &[u8]) -> Result<u16, Fault> {
    let id = take(rest, 2)?;
    match u16::from_be_bytes([id[0], id[1]]) {
        0 => Err(Fault::protocol("packet id 0")),
        id => Ok(id),
    }
}

/// Returns packet id and reason code of PUBACK, PUBREC, PUBREL or PUBCOMP. MQTT 5 properties of these
/// packets are not used.
pub fn ack(version: Version, frame: &Frame<'_>) -> Result<(u16, u8), Fault> {
    let mut rest = frame.body;
    let id = packet_id(&mut rest)?;
    match (version, rest.first()) {
        (_, None) => Ok((id, 0)),
        (Version::V5, Some(&code)) => Ok((id, code)),
        (_, Some(_)) => Err(Fault::malformed("an ack of more than two bytes")),
    }
}

/// Returns the size of a PUBLISH's payload; 0 for other packets.
pub fn payload_len(version: Version, frame: &Frame<'_>) -> usize {
    let read = |mut rest| {
        binary(&mut rest)?;
        if frame.first & 0b110 != 0 {
            take(&mut rest, 2)?;
        }
        if version == Version::V5 {
            sized(&mut rest)?;
        }
        Ok::<_, Fault>(rest.len())
    };
    read(frame.body).unwrap_or(0)
}

/// Passes each negative reason code of an outgoing packet to `visit`; for DISCONNECT, any reason code.
pub fn refusals(version: Version, frame: &Frame<'_>, mut visit: impl FnMut(u8)) {
    let codes = match (frame.first, frame.body) {
        (CONNACK, [_, code, ..]) if *code != 0 => std::slice::from_ref(code),
        (DISCONNECT, [code, ..]) => return visit(*code),
        (PUBACK | PUBREC | PUBREL | PUBCOMP, [_, _, code, ..]) => std::slice::from_ref(code),
        (SUBACK | UNSUBACK, [_, _, codes @ ..]) => {
            let mut codes = codes;
            if version == Version::V5 && sized(&mut codes).is_err() {
                return;
            }
            codes
        }
        _ => return,
    };
    let says_no = |code: &&u8| frame.first == CONNACK || **code >= 0x80;
    codes.iter().filter(says_no).for_each(|code| visit(*code));
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use proptest::prelude::*;
    use rmqtt_codec::{v3, v5};

    use super::*;

    #[test]
    fn a_packet_that_is_too_large_is_told_with_its_size_and_topic() {
        let publish = [b"\x30\x80\x10\x00\x03a/b".as_slice(), &[0; 100]].concat();
        let ping = b"\xc0\x00".as_slice();
        let said = too_large(&[ping, ping, &publish].concat(), 1_024);
        assert_eq!(said.as_deref(), Some("a message of 2051 bytes to topic \"a/b\""));
        assert_eq!(too_large(&publish[..6], 1_024).as_deref(), Some("a message of 2051 bytes"));
        assert_eq!(too_large(b"\x82\x80\x10", 1_024).as_deref(), Some("a packet of 2051 bytes"));
        assert_eq!(too_large(&publish, 4_096), None);
        assert_eq!(too_large(b"\x30\xff\xff\xff\xff", 1_024), None);
    }

    /// What the codec reads, in our shape; `None` where it refuses.
    fn by_codec(version: Version, whole: &[u8]) -> Option<(u8, bool, bool, String, u16, Vec<u8>)> {
        let publish = match decode(version, whole).ok()? {
            Packet::V3(v3::Packet::Publish(publish)) => publish,
            Packet::V5(v5::Packet::Publish(publish)) => publish,
            _ => return None,
        };
        let id = publish.packet_id.map_or(0, |id| id.get());
        let topic = publish.topic.to_string();
        // What by hand is checked and the codec lets through.
        let properties = publish.properties.clone().unwrap_or_default();
        let texts = properties.user_properties.iter().flat_map(|(k, v)| [k, v]);
        let mut texts = texts.chain(&properties.content_type).chain(&properties.response_topic);
        let response_topic = properties.response_topic.as_deref().unwrap_or_default();
        if texts.any(|text| text.contains('\0'))
            || response_topic.contains(['+', '#'])
            || (publish.dup && publish.qos.value() == 0)
        {
            return None;
        }
        Some((publish.qos.value(), publish.retain, publish.dup, topic, id, publish.payload.to_vec()))
    }

    fn by_hand(version: Version, whole: &[u8]) -> Option<(u8, bool, bool, String, u16, Vec<u8>)> {
        let frame = frame(whole, usize::MAX).ok()??;
        let p = publish(version, &frame).ok()?;
        properties(p.properties, |_| {}).ok()?;
        Some((p.qos, p.retain, p.dup, p.topic.to_owned(), p.packet_id, p.payload.to_vec()))
    }

    #[test]
    fn packets_that_say_no_show_their_reasons() {
        let refused = |version, packet: &[u8]| {
            let mut codes = Vec::new();
            refusals(version, &frame(packet, usize::MAX).unwrap().unwrap(), |code| codes.push(code));
            codes
        };
        for (version, packet, codes) in [
            (Version::V3, &[0x20, 2, 0, 5][..], &[5][..]),
            (Version::V3, &[0x20, 2, 1, 0], &[]),
            (Version::V5, &[0x20, 3, 0, 0x87, 0], &[0x87]),
            (Version::V5, &[0x40, 3, 0, 1, 0x90], &[0x90]),
            (Version::V5, &[0x40, 2, 0, 1], &[]),
            (Version::V3, &[0x90, 5, 0, 1, 1, 0x80, 0], &[0x80]),
            (Version::V5, &[0x90, 6, 0, 1, 0, 0x87, 2, 0x97], &[0x87, 0x97]),
            (Version::V5, &[0xe0, 1, 0x8d], &[0x8d]),
        ] {
            assert_eq!(refused(version, packet), codes, "{packet:x?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

        #[test]
        fn a_publish_is_read_as_the_codec_reads_it(
            v5 in any::<bool>(), qos in 0u8..3, bits in any::<(bool, bool)>(), topic in "[a-z/é]{1,30}",
            id in 1u16.., props in prop::collection::vec(prop_oneof![
                Just(vec![1, 1]), Just(vec![2, 0, 0, 0, 9]), Just(vec![3, 0, 1, b'x']), Just(vec![8, 0, 1, b'y']),
                Just(vec![9, 0, 2, 0, 255]), Just(vec![0x23, 0, 3]), Just(vec![0x26, 0, 1, b'k', 0, 1, b'v']),
            ], 0..4), payload in prop::collection::vec(any::<u8>(), 0..300),
            damage in prop::option::of((any::<prop::sample::Index>(), any::<u8>())),
        ) {
            let version = if v5 { Version::V5 } else { Version::V3 };
            let out = OutPublish {
                qos, retain: bits.0, dup: bits.1, topic: &topic, alias: 0, packet_id: id, properties: &props.concat(),
                payload: &payload,
            };
            let mut bytes = BytesMut::new();
            out.put(version, &mut bytes);
            prop_assert_eq!(bytes.len() - frame(&bytes, usize::MAX).unwrap().unwrap().body.len()
                + out.remaining_len(version), bytes.len());
            let whole = frame(&bytes, usize::MAX).unwrap().unwrap();
            prop_assert_eq!(payload_len(version, &whole), payload.len());
            // Damage after the fixed header, so that it stays one whole PUBLISH.
            if let Some((at, value)) = damage {
                let header = bytes.len() - out.remaining_len(version);
                let at = header + at.index(bytes.len() - header);
                bytes[at] = value;
            }
            let (hand, codec) = (by_hand(version, &bytes), by_codec(version, &bytes));
            // By hand is stricter (wildcards, subscription ids), takes an expiry of 0, and leaves a topic
            // alias of 0 to its caller; never looser else.
            match (&hand, &codec) {
                (Some(_), Some(_)) => prop_assert_eq!(hand, codec),
                (Some((.., topic, _, _)), None) => prop_assert!(
                    bytes.windows(5).any(|w| w == [2, 0, 0, 0, 0]) || bytes.windows(3).any(|w| w == [0x23, 0, 0]),
                    "only an expiry or alias of 0: {:?}", topic),
                (None, Some((.., topic, _, _))) => {
                    let strict = !crate::topic::is_valid_name(topic) || bytes.contains(&0x0b);
                    prop_assert!(strict, "refused by hand only: {:?}", bytes)
                }
                (None, None) => {}
            }
        }
    }
}
