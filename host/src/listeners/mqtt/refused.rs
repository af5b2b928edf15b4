//! A refused connection: its log line and its CONNACK.

use bytes::BytesMut;
use rmqtt_codec::v5::ConnectAckReason;

use super::Broker;
use super::wire::{self, Version};
use crate::listeners::transport::Address;

#[derive(Debug)]
pub struct Refused {
    pub cause: &'static str,
    /// Which of several faults with the same cause it was; empty if there is only one.
    what: &'static str,
    /// Client or user by which repeated refusals are counted, if known.
    who: Option<String>,
    /// Description of the client, for the log.
    detail: String,
    /// Whether the underlying failure has a log line of its own.
    is_reported: bool,
    told: Option<Told>,
}

/// Information for the client.
#[derive(Debug)]
struct Told {
    version: Version,
    reason: ConnectAckReason,
    packet_bytes_max: usize,
}

impl Refused {
    pub fn new(cause: &'static str, who: Option<&str>, detail: impl Into<String>) -> Self {
        Self {
            cause,
            what: "",
            who: who.map(str::to_owned),
            detail: detail.into(),
            is_reported: false,
            told: None,
        }
    }

    pub fn what(self, what: &'static str) -> Self {
        Self { what, ..self }
    }

    pub fn reported(self) -> Self {
        Self { is_reported: true, ..self }
    }

    pub fn told(self, version: Version, reason: ConnectAckReason, packet_bytes_max: usize) -> Self {
        Self { told: Some(Told { version, reason, packet_bytes_max }), ..self }
    }

    /// Counts and reports the refusal, and adds it to the list. A client that only disconnected is
    /// counted.
    pub fn report(&self, broker: &Broker, address: &Address) {
        if self.cause == "lost" {
            return broker.counters.refused_connect(self.cause);
        }
        let kind = match self.what {
            "" => format!("mqtt: connect refused: {}", self.cause),
            what => format!("mqtt: connect refused: {}: {what}", self.cause),
        };
        let kind = (!self.is_reported).then_some(&*kind);
        broker.refuse(self.cause, kind, self.who.as_deref(), address, &self.detail);
    }

    /// Returns the version and its CONNACK; `None` if the version has no suitable CONNACK.
    pub fn answer(&self) -> Option<(Version, BytesMut)> {
        let Told { version, reason, packet_bytes_max } = self.told.as_ref()?;
        let mut out = BytesMut::new();
        if *version == Version::V5 {
            let what = if self.what.is_empty() { explained(self.cause) } else { self.what };
            let head = [0, (*reason).into()];
            wire::put_with_reason(&mut out, wire::CONNACK, &head, what);
            if out.len() > *packet_bytes_max {
                out.clear();
                wire::put_with_reason(&mut out, wire::CONNACK, &head, "");
            }
        } else {
            out.extend_from_slice(&[wire::CONNACK, 2, 0, return_code(*reason)?]);
        }
        Some((*version, out))
    }
}

/// Returns the return code of MQTT 3.1.1 (3.2.2.3).
fn return_code(reason: ConnectAckReason) -> Option<u8> {
    Some(match reason {
        ConnectAckReason::UnsupportedProtocolVersion => 1,
        ConnectAckReason::ClientIdentifierNotValid => 2,
        ConnectAckReason::BadUserNameOrPassword => 4,
        ConnectAckReason::NotAuthorized => 5,
        ConnectAckReason::QuotaExceeded
        | ConnectAckReason::PacketTooLarge
        | ConnectAckReason::ConnectionRateExceeded
        | ConnectAckReason::ServerUnavailable => 3,
        _ => return None,
    })
}

/// Returns the reason string for a cause, without information that helps to guess credentials.
fn explained(cause: &str) -> &'static str {
    match cause {
        "bad_credentials" => "wrong user name or password",
        "bad_auth_method" => "authentication method not offered",
        "not_authorized" => "credentials needed",
        "client_id" => "this user may not have this client id",
        "session_owner" => "this client id has a session of another user",
        "access_unavailable" => "credentials cannot be checked now, try again",
        "guessing" => "too many wrong passwords, try again later",
        "connect_rate" => "too many connections per second, try again",
        "connections_per_user" => "this user has too many connections",
        "broker_state" | "sessions_max" => "no room for another session",
        "will_not_authorized" => "the will's topic is not allowed",
        "will_topic_levels" => "the will's topic has too many levels",
        "will_bytes_max" => "the will is too large",
        "wills_bytes_max" => "no room for another will",
        "stopped" => "the broker is stopping",
        _ => "",
    }
}
