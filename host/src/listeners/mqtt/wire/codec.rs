//! Packets that are not on the hot path, decoded by `rmqtt-codec`, and the checks that the codec does
//! not make.

use bytes::BytesMut;
use rmqtt_codec::{v3, v5};
use tokio_util::codec::Decoder;

use super::{Fault, NUL, SUBSCRIBE, Version, binary, frame, packet_id, sized, take};

/// Flags of CONNECT.
const PASSWORD: u8 = 0x40;
const USER_NAME: u8 = 0x80;

pub enum Packet {
    V3(v3::Packet),
    V5(v5::Packet),
}

pub fn decode(version: Version, whole: &[u8]) -> Result<Packet, Fault> {
    let mut bytes = BytesMut::from(whole);
    if let Some(first) = bytes.first_mut() {
        *first = version.first(*first);
    }
    if version != Version::V5
        && bytes.first() == Some(&SUBSCRIBE)
        && let Some(frame) = frame(whole, usize::MAX)?
    {
        check_subscribe_v3(frame.body)?;
    }
    let packet = match version {
        Version::V31 | Version::V3 => {
            v3::Codec::new(0).decode(&mut bytes)?.map(|(packet, _)| Packet::V3(packet))
        }
        Version::V5 => v5::Codec::new(0, 0).decode(&mut bytes)?.map(|(packet, _)| Packet::V5(packet)),
    };
    let packet = packet.ok_or(Fault::malformed("the packet is cut short"))?;
    if has_nul(&packet) { Err(NUL) } else { Ok(packet) }
}

/// Checks the upper six bits of a requested QoS, which are reserved in MQTT 3.1.1 (3.8.3). The codec
/// does not.
fn check_subscribe_v3(mut rest: &[u8]) -> Result<(), Fault> {
    packet_id(&mut rest)?;
    while !rest.is_empty() {
        binary(&mut rest)?;
        if take(&mut rest, 1)?[0] > 2 {
            return Err(Fault::malformed("a requested QoS over 2"));
        }
    }
    Ok(())
}

/// Checks what the codec does not in the body of CONNECT: contradictory flags (3.1.2), and bytes after
/// the last field. Returns the flags of the fields that are present, since an MQTT 3.1 client may leave
/// out a user name and a password that its flags announce (3.1, section 3.1).
pub fn check_connect(version: Version, mut rest: &[u8]) -> Result<u8, Fault> {
    binary(&mut rest)?;
    // Level, flags, keep alive.
    let mut flags = take(&mut rest, 4)?[1];
    let [will, password, username] = [0x04, PASSWORD, USER_NAME].map(|flag| flags & flag != 0);
    if flags & 1 != 0 {
        return Err(Fault::malformed("the reserved flag of CONNECT"));
    }
    if flags & 0x18 == 0x18 || (flags & 0x38 != 0 && !will) {
        return Err(Fault::malformed("the will flags of CONNECT"));
    }
    if version != Version::V5 && password && !username {
        return Err(Fault::malformed("a password without a user name"));
    }
    let v5 = version == Version::V5;
    if v5 {
        sized(&mut rest)?;
    }
    binary(&mut rest)?;
    if will {
        if v5 {
            sized(&mut rest)?;
        }
        binary(&mut rest)?;
        binary(&mut rest)?;
    }
    for (is_announced, flag) in [(username, USER_NAME), (password, PASSWORD)] {
        match is_announced {
            true if version == Version::V31 && rest.is_empty() => flags &= !flag,
            true => _ = binary(&mut rest)?,
            false => {}
        }
    }
    if rest.is_empty() { Ok(flags) } else { Err(Fault::malformed("bytes after the last field of CONNECT")) }
}

/// Returns the client id in the body of a CONNECT, which may be malformed after it.
pub fn client_id(version: Version, mut rest: &[u8]) -> Option<&str> {
    binary(&mut rest).ok()?;
    take(&mut rest, 4).ok()?;
    if version == Version::V5 {
        sized(&mut rest).ok()?;
    }
    let id = std::str::from_utf8(binary(&mut rest).ok()?).ok()?;
    (!id.is_empty()).then_some(id)
}

/// Returns whether a text in a client's packet contains U+0000, which the codec accepts (1.5.4). The
/// handshake checks the client id, for which it has an answer.
fn has_nul(packet: &Packet) -> bool {
    let nul = |text: &str| text.contains('\0');
    let given = |text: &Option<_>| text.as_deref().is_some_and(nul);
    let user = |properties: &v5::UserProperties| properties.iter().any(|(k, v)| nul(k) || nul(v));
    match packet {
        Packet::V3(v3::Packet::Connect(connect)) => {
            given(&connect.username) || connect.last_will.as_ref().is_some_and(|will| nul(&will.topic))
        }
        Packet::V3(v3::Packet::Subscribe { topic_filters, .. }) => topic_filters.iter().any(|(f, _)| nul(f)),
        Packet::V3(v3::Packet::Unsubscribe { topic_filters, .. }) => topic_filters.iter().any(|f| nul(f)),
        Packet::V5(v5::Packet::Connect(connect)) => {
            given(&connect.username)
                || given(&connect.auth_method)
                || user(&connect.user_properties)
                || connect.last_will.as_ref().is_some_and(|will| {
                    nul(&will.topic)
                        || given(&will.content_type)
                        || given(&will.response_topic)
                        || user(&will.user_properties)
                })
        }
        Packet::V5(v5::Packet::Subscribe(subscribe)) => {
            user(&subscribe.user_properties) || subscribe.topic_filters.iter().any(|(f, _)| nul(f))
        }
        Packet::V5(v5::Packet::Unsubscribe(unsubscribe)) => {
            user(&unsubscribe.user_properties) || unsubscribe.topic_filters.iter().any(|f| nul(f))
        }
        Packet::V5(v5::Packet::Disconnect(disconnect)) => {
            given(&disconnect.reason_string) || user(&disconnect.user_properties)
        }
        Packet::V5(v5::Packet::Auth(auth)) => {
            given(&auth.auth_method) || given(&auth.reason_string) || user(&auth.user_properties)
        }
        _ => false,
    }
}
