//! Parses CONNECT.

use std::sync::Arc;

use bytes::{Buf, BytesMut};
use rmqtt_codec::v5::{ConnectAckReason, DisconnectReasonCode};
use rmqtt_codec::{v3, v5};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::Asked;
use crate::batch::flags;
use crate::ingest::facts;
use crate::listeners::mqtt::Broker;
use crate::listeners::mqtt::auth::Method;
use crate::listeners::mqtt::config::Config;
use crate::listeners::mqtt::metrics::RECEIVED;
use crate::listeners::mqtt::refused::Refused;
use crate::listeners::mqtt::will::Will;
use crate::listeners::mqtt::wire::{self, Fault, Packet, Version};
use crate::listeners::transport::Remote;
use crate::properties::facts as names;

/// Bit of the protocol level that a bridge sets (mosquitto.conf(5), `try_private`).
const BRIDGE: u8 = 0x80;

pub enum Unread {
    Lost,
    /// A fault, with the version and the client id as far as they could be read.
    Fault(Fault, Option<Version>, Option<String>),
    /// MQTT at an unknown protocol level.
    Level(u8),
}

impl Unread {
    pub fn refused(self, remote: &Remote) -> Refused {
        match self {
            Self::Lost => Refused::new("lost", None, format!("{remote} left before CONNECT")),
            Self::Fault(fault, version, client_id) => {
                let detail = match &client_id {
                    Some(client_id) => format!("client {client_id:.200} at {remote}"),
                    None => remote.to_string(),
                };
                let refused = Refused::new("malformed", client_id.as_deref(), detail);
                let refused = refused.what(fault.what);
                let reason = ConnectAckReason::try_from(u8::from(fault.code));
                let reason = reason.unwrap_or(ConnectAckReason::MalformedPacket);
                match version {
                    Some(version) => refused.told(version, reason, usize::MAX),
                    None => refused,
                }
            }
            Self::Level(level) => {
                let detail = format!("level {level} from {remote}");
                let what = "a protocol level that is not that of MQTT 3.1, 3.1.1 or 5.0";
                let refused = Refused::new("malformed", None, detail).what(what);
                refused.told(Version::V3, ConnectAckReason::UnsupportedProtocolVersion, usize::MAX)
            }
        }
    }
}

pub async fn read_connect<S: AsyncRead + Unpin>(
    broker: &Broker,
    io: &mut S,
    input: &mut BytesMut,
) -> Result<Asked, Unread> {
    let config = broker.config();
    let bytes_max = first_packet_bytes_max(&config);
    loop {
        // Refused at once: a client that speaks something else, HTTP perhaps.
        if input.first().is_some_and(|first| *first != 0x10) {
            return Err(Unread::Fault(Fault::protocol("the first packet is not CONNECT"), None, None));
        }
        let frame = wire::frame(input, bytes_max).map_err(|fault| {
            let is_large = fault.code == DisconnectReasonCode::PacketTooLarge;
            let what = if is_large { "a CONNECT of over 64 KiB and mqtt.will_bytes_max" } else { fault.what };
            Unread::Fault(Fault { what, ..fault }, None, None)
        })?;
        if let Some(frame) = frame {
            broker.counters.received.add_one(frame.first);
            let (version, is_bridge) = version(frame.body)?;
            let len = frame.len;
            let header = len - frame.body.len();
            let asked = connect(&config, version, &mut input[..len], header);
            let asked = asked.map_err(|fault| {
                let body = &input[header..len];
                let client_id = wire::client_id(version, body).map(str::to_owned);
                Unread::Fault(fault, Some(version), client_id)
            });
            input.advance(len);
            return asked.map(|asked| Asked { is_bridge, ..asked });
        }
        match io.read_buf(input).await {
            Ok(len @ 1..) => broker.counters.bytes[RECEIVED].increment(len as u64),
            _ => return Err(Unread::Lost),
        }
    }
}

/// Returns the largest size of CONNECT, and of AUTH before CONNACK. It is small because the client is
/// not known yet.
pub fn first_packet_bytes_max(config: &Config) -> usize {
    let will_bytes_max = config.will_bytes_max.0 as usize;
    config.packet_bytes_max().min(wire::CONNECT_BYTES_MAX.max(will_bytes_max))
}

/// Returns the version from protocol name and level (MQTT 5.0, 3.1.2.1 and 3.1.2.2), and whether the
/// client is a broker: Mosquitto bridges set the level's highest bit.
fn version(body: &[u8]) -> Result<(Version, bool), Unread> {
    let (level, is_31) = match body {
        [0, 4, b'M', b'Q', b'T', b'T', level, ..] => (*level, false),
        [0, 6, b'M', b'Q', b'I', b's', b'd', b'p', level, ..] => (*level, true),
        _ => return Err(Unread::Fault(Fault::protocol("the protocol is not MQTT"), None, None)),
    };
    let is_bridge = level & BRIDGE != 0;
    match (level & !BRIDGE, is_31) {
        (3, true) => Ok((Version::V31, is_bridge)),
        (4, false) => Ok((Version::V3, is_bridge)),
        (5, false) => Ok((Version::V5, is_bridge)),
        _ => Err(Unread::Level(level)),
    }
}

/// Parses CONNECT. `whole` is the packet, whose body begins at `header`.
fn connect(config: &Arc<Config>, version: Version, whole: &mut [u8], header: usize) -> Result<Asked, Fault> {
    let kept_s = u32::try_from(config.session_expiry_max.0.as_secs()).unwrap_or(u32::MAX);
    let fields = wire::check_connect(version, &whole[header..])?;
    // The codec refuses an empty client id without clean start; whether it may
    // stand is for us to say.
    let name_len = usize::from(whole[header + 1]);
    let [level, flags] = &mut whole[header + 2 + name_len..][..2] else {
        return Err(Fault::malformed("CONNECT is cut short"));
    };
    *level &= !BRIDGE;
    let clean = *flags & 2 != 0;
    *flags = fields | 2;
    match version {
        Version::V31 | Version::V3 => {
            let Packet::V3(v3::Packet::Connect(connect)) = wire::decode(version, whole)? else {
                return Err(Fault::protocol("the first packet is not CONNECT"));
            };
            let connect = *connect;
            let will = connect.last_will.map(|will| Will {
                topic: (&*will.topic).into(),
                payload: will.message,
                properties: Vec::new(),
                flags: u16::from(will.qos.value()) | if will.retain { flags::RETAIN } else { 0 },
                delay_s: 0,
                device: None,
                record: None,
            });
            Ok(Asked::new(
                (version, config),
                &connect.client_id,
                connect.username.as_deref(),
                will,
                |asked| {
                    asked.password = connect.password;
                    asked.clean = clean;
                    asked.keep_alive_s = connect.keep_alive;
                    asked.expiry_s = if clean { 0 } else { kept_s };
                    asked.window = config.outbound_window(None);
                },
            ))
        }
        Version::V5 => {
            let Packet::V5(v5::Packet::Connect(connect)) = wire::decode(version, whole)? else {
                return Err(Fault::protocol("the first packet is not CONNECT"));
            };
            let connect = *connect;
            if connect.auth_data.is_some() && connect.auth_method.is_none() {
                return Err(Fault::protocol("authentication data without a method"));
            }
            if let Some(topic) = connect.last_will.as_ref().and_then(|will| will.response_topic.as_deref()) {
                wire::response_topic(topic)?;
            }
            let will = connect.last_will.map(will_v5);
            Ok(Asked::new(
                (version, config),
                &connect.client_id,
                connect.username.as_deref(),
                will,
                |asked| {
                    asked.password = connect.password;
                    asked.clean = clean;
                    asked.keep_alive_s = connect.keep_alive;
                    asked.expiry_s = connect.session_expiry_interval_secs.min(kept_s);
                    asked.window = config.outbound_window(connect.receive_max);
                    let max = connect.max_packet_size.map_or(usize::MAX, |max| max.get() as usize);
                    asked.packet_bytes_max = max;
                    asked.tells_reasons = connect.request_problem_info && max >= wire::ACK_BYTES_MAX;
                    asked.aliases_max = connect.topic_alias_max.min(config.outbound_topic_alias_maximum);
                    let data = connect.auth_data.unwrap_or_default();
                    asked.auth = connect.auth_method.map(|name| Method::new(&name, data));
                },
            ))
        }
    }
}

fn will_v5(will: v5::LastWill) -> Will {
    let mut out = Vec::new();
    let mut push = |fact: &str, value: &[u8]| facts::push(&mut out, fact, value);
    if let Some(value) = &will.content_type {
        push(names::CONTENT_TYPE, value.as_bytes());
    }
    if let Some(value) = &will.response_topic {
        push(names::RESPONSE_TOPIC, value.as_bytes());
    }
    if let Some(value) = &will.correlation_data {
        push(names::CORRELATION_DATA, value);
    }
    if let Some(value) = will.message_expiry_interval {
        push(names::EXPIRY_S, value.to_string().as_bytes());
    }
    for (name, value) in &will.user_properties {
        facts::push_user(&mut out, name, value.as_bytes());
    }
    let retain = if will.retain { flags::RETAIN } else { 0 };
    let utf8 = if will.is_utf8_payload == Some(true) { flags::UTF8 } else { 0 };
    Will {
        topic: (&*will.topic).into(),
        payload: will.message,
        properties: out,
        flags: u16::from(will.qos.value()) | retain | utf8,
        delay_s: will.will_delay_interval_sec.unwrap_or(0),
        device: None,
        record: None,
    }
}
