//! The `mqtt:` section of the configuration: where to listen and every bound.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::problems::{KeyPath, Problems};
use crate::units::{ByteSize, Period};

/// A stream's state holds 64 MiB: QoS 2 packet ids and wills need room beside.
const RETAINED_BYTES_MOST: u64 = 48 << 20;

/// MQTT 3.1.1 and 5.0 for devices and subscribers.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where to listen; the version of MQTT is found per connection.
    pub listeners: Vec<Endpoint>,
    /// Largest packet that a client may send; MQTT 5 clients are told.
    pub max_packet_size: ByteSize,
    /// QoS 1 and 2 publishes that an MQTT 5 client may have unacknowledged;
    /// one more is a protocol error (0x93).
    pub receive_maximum: u16,
    /// The same bound for MQTT 3.1.1, where the connection is read no further.
    pub inflight_max: u16,
    /// Topic aliases that an MQTT 5 client may set; 0 turns them off.
    pub topic_alias_maximum: u16,
    /// Connections at a time; one more is refused.
    pub connections_max: u32,
    /// Sessions kept, connected or not; a new one past it is refused.
    pub sessions_max: u32,
    /// Longest time that a session is kept without its client; MQTT 3.1.1
    /// sessions (clean session 0) are kept so long.
    pub session_expiry_max: Period,
    /// Subscriptions of one client.
    pub subscriptions_per_client_max: u32,
    /// Messages that wait for one subscriber.
    pub queue_messages_max: u32,
    /// Bytes that wait for one subscriber.
    pub queue_bytes_max: ByteSize,
    /// Retained messages.
    pub retained_messages_max: u32,
    /// Bytes of retained messages. They are part of their stream's state, of
    /// which every segment of the stream begins with a copy.
    pub retained_bytes_max: ByteSize,
    /// After a restart, the wills of clients that the last run lost are held so
    /// long at least, for the clients to come back.
    pub will_delay_after_restart: Period,
    /// From the first byte's wait to the end of CONNECT.
    pub connect_timeout: Period,
    /// At shutdown, how long waiting acknowledgements may still take.
    pub drain_timeout: Period,
    /// Store the client id as property `client-id` with every message, also
    /// where the topic names the device.
    pub keep_client_id: bool,
}

/// One address to listen on.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Endpoint {
    /// Address and port, `127.0.0.1:1883`; port 0 takes a free one.
    #[schemars(with = "String", extend("format" = "socket-address"))]
    pub bind: SocketAddr,
    /// Serve TLS on this address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<Tls>,
    /// Serve clients without credentials beyond this machine. Needed for an
    /// address that is not loopback, unless `tls.client_ca` asks for certificates.
    #[serde(default)]
    pub allow_anonymous: bool,
}

/// Certificate files, PEM.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// The server's certificate, then its intermediates.
    pub cert: PathBuf,
    /// The private key of `cert`.
    pub key: PathBuf,
    /// Certificate authorities for clients; set: clients must show a certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_ca: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listeners: vec![Endpoint {
                bind: SocketAddr::from(([127, 0, 0, 1], 1883)),
                tls: None,
                allow_anonymous: false,
            }],
            max_packet_size: ByteSize::mib(1),
            receive_maximum: 1_024,
            inflight_max: 1_024,
            topic_alias_maximum: 16,
            connections_max: 100_000,
            sessions_max: 200_000,
            session_expiry_max: Period(Duration::from_secs(7 * 24 * 3_600)),
            subscriptions_per_client_max: 1_000,
            queue_messages_max: 10_000,
            queue_bytes_max: ByteSize::mib(16),
            retained_messages_max: 100_000,
            retained_bytes_max: ByteSize::mib(32),
            will_delay_after_restart: Period(Duration::from_secs(30)),
            connect_timeout: Period(Duration::from_secs(10)),
            drain_timeout: Period(Duration::from_secs(5)),
            keep_client_id: false,
        }
    }
}

impl Config {
    /// Finds everything that is wrong; reads no file.
    pub fn validate(&self, path: &KeyPath, problems: &mut Problems) {
        for (i, endpoint) in self.listeners.iter().enumerate() {
            let at = path.key("listeners").index(i);
            if !endpoint.is_safe() {
                problems.add(
                    at.key("bind"),
                    format!(
                        "{} can be reached from other machines and there are no credentials: bind to 127.0.0.1, \
                         set tls.client_ca, or set allow_anonymous: true",
                        endpoint.bind
                    ),
                );
            }
            let twin = |other: &Endpoint| other.bind == endpoint.bind && endpoint.bind.port() != 0;
            if self.listeners[..i].iter().any(twin) {
                problems.add(at.key("bind"), format!("{} is used twice", endpoint.bind));
            }
        }
        let size = |key: &str, value: u64, least: u64, most: u64, problems: &mut Problems| {
            if value < least || value > most {
                problems.add(path.key(key), format!("must be {least} to {most}, is {value}"));
            }
        };
        size("max_packet_size", self.max_packet_size.0, 1_024, crate::batch::SPAN_BYTES_MAX as u64, problems);
        size("receive_maximum", self.receive_maximum.into(), 1, 65_535, problems);
        size("inflight_max", self.inflight_max.into(), 1, 65_535, problems);
        size("topic_alias_maximum", self.topic_alias_maximum.into(), 0, 1_024, problems);
        size("connections_max", self.connections_max.into(), 1, 10_000_000, problems);
        size("sessions_max", self.sessions_max.into(), 1, 10_000_000, problems);
        let per_client = self.subscriptions_per_client_max;
        size("subscriptions_per_client_max", per_client.into(), 1, 1_000_000, problems);
        size("queue_messages_max", self.queue_messages_max.into(), 1, 10_000_000, problems);
        size("queue_bytes_max", self.queue_bytes_max.0, 1_024, 1 << 40, problems);
        size("retained_bytes_max", self.retained_bytes_max.0, 0, RETAINED_BYTES_MOST, problems);
        if self.connect_timeout.0.is_zero() {
            problems.add(path.key("connect_timeout"), "must be longer than 0s");
        }
    }
}

impl Endpoint {
    /// Loopback, or clients that prove who they are, or somebody said so.
    pub fn is_safe(&self) -> bool {
        let mutual = self.tls.as_ref().is_some_and(|tls| tls.client_ca.is_some());
        self.bind.ip().is_loopback() || mutual || self.allow_anonymous
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(config: &Config) -> Vec<String> {
        let mut problems = Problems::default();
        config.validate(&KeyPath::root().key("mqtt"), &mut problems);
        problems.into_vec().into_iter().map(|p| format!("{}: {}", p.path.as_str(), p.message)).collect()
    }

    #[test]
    fn the_default_is_valid_and_listens_on_loopback_only() {
        assert!(problems(&Config::default()).is_empty());
        assert!(Config::default().listeners.iter().all(|endpoint| endpoint.bind.ip().is_loopback()));
    }

    #[test]
    fn an_open_address_without_credentials_is_refused_until_somebody_says_so() {
        let mut config: Config = serde_json::from_str(
            r#"{ "listeners": [{ "bind": "0.0.0.0:1883" }, { "bind": "0.0.0.0:1883" }], "receive_maximum": 0 }"#,
        )
        .unwrap();
        let found = problems(&config);
        assert_eq!(found.len(), 4, "{found:?}");
        assert!(found[0].starts_with("mqtt.listeners[0].bind: 0.0.0.0:1883 can be reached"), "{found:?}");
        config.listeners.truncate(1);
        config.listeners[0].allow_anonymous = true;
        config.receive_maximum = 10;
        assert!(problems(&config).is_empty());
    }
}
