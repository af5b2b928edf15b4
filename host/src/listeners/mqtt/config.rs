//! The `mqtt:` section of the configuration: where to listen and every bound.

use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::outbound::WhenFull;
use crate::access;
use crate::listeners::transport::config::{self as transport, ProxyProtocol, Tls};
use crate::listeners::transport::{Bind, SocketMode, origin, websocket};
use crate::problems::{KeyPath, Problems};
use crate::units::{ByteSize, Period};

/// Most bytes of retained messages and wills together. A stream's state holds 64 MiB: QoS 2
/// packet ids need room beside.
const STATE_BYTES_MOST: u64 = 48 << 20;

/// MQTT 3.1.1 and 5.0 for devices and subscribers.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where to listen; the version of MQTT is found per connection.
    pub listeners: Vec<Endpoint>,
    /// Who may connect, publish and subscribe; left out: everybody, everything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access: Option<access::Config>,
    /// How fast and how much.
    pub limits: access::Limits,
    /// Largest packet that a client may send; MQTT 5 clients are told.
    pub max_packet_size: ByteSize,
    /// Bytes of packets of all clients together that have not come whole. Past it a packet of
    /// more than 4 KiB waits for room before it is read on, and a client that has room and
    /// sends less than 10 KiB in 10 s while others wait is disconnected (0x97).
    pub partial_packets_bytes_max: ByteSize,
    /// QoS 1 and 2 publishes that an MQTT 5 client may have unacknowledged;
    /// one more is a protocol error (0x93).
    pub receive_maximum: u16,
    /// QoS 1 and 2 messages in flight: publishes of an MQTT 3.1.1 client that are not
    /// acknowledged, past which its connection is read no further, and the most that an MQTT 5
    /// client's Receive Maximum counts for.
    pub inflight_max: u16,
    /// QoS 1 and 2 messages sent to a client that it has not acknowledged, where the client names
    /// no Receive Maximum, as MQTT 3.1.1 has none; at most `inflight_max`. A client may take fewer
    /// than are sent and lose the others: a bridge of Mosquitto takes 20 of QoS 2
    /// (`max_inflight_messages`). More are faster where answers take long.
    pub outbound_inflight_max: u16,
    /// Topic aliases that an MQTT 5 client may set; 0 turns them off.
    pub topic_alias_maximum: u16,
    /// Topic aliases that the host uses towards an MQTT 5 client that takes some;
    /// each keeps its topic in memory. 0 turns them off.
    pub outbound_topic_alias_maximum: u16,
    /// Connections at a time; one more is refused. Each is an open file: the hard limit on
    /// those (`ulimit -Hn`, `LimitNOFILE=` of systemd) must be higher.
    pub connections_max: u32,
    /// Longest keep alive: an MQTT 5 client that asks for a longer one, or for none, is told
    /// this one (Server Keep Alive) and held to it. Older versions cannot be told; they are
    /// held to their own. Unset: no bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_alive_max: Option<Period>,
    /// Sessions kept, connected or not; a new one past it is refused.
    pub sessions_max: u32,
    /// Longest time that a session is kept without its client; MQTT 3.1.1
    /// sessions (clean session 0) are kept so long.
    pub session_expiry_max: Period,
    /// Subscriptions of one client. Its filters have at most ten times as many topic
    /// levels together.
    pub subscriptions_per_client_max: u32,
    /// Bytes of the filters that one client is subscribed to; in memory up to about three times as much.
    pub subscription_bytes_per_client_max: ByteSize,
    /// Messages that wait for one subscriber, connected or away.
    pub queue_messages_max: u32,
    /// Bytes that wait for one subscriber. While a client with a persistent
    /// session is away they are not in memory, but in their streams.
    pub queue_bytes_max: ByteSize,
    /// A message that has waited longer is dropped.
    pub queue_age_max: Period,
    /// What happens where one of these bounds is met. A client that is connected
    /// and whose session ends with its connection is disconnected instead.
    pub queue_when_full: WhenFull,
    /// Bytes of messages that are copied for sessions before retention takes them from
    /// their streams; past it they are dropped and counted. On disk up to about twice as much.
    pub queue_copies_bytes_max: ByteSize,
    /// Memory that the queues of all subscribers take together: 64 bytes for each message that
    /// waits or is in flight, and the messages that are held in memory. One eighth of it is for
    /// messages of more than 4 KiB that find no room otherwise, of subscribers that read slowly,
    /// in turn; a client that takes less than 10 KiB of its one in 10 s while others wait is
    /// disconnected (0x97). Past three quarters of the rest a subscriber gets more only while it
    /// has less than its part of the last quarter; one that has more meets a full queue. One half
    /// of that quarter is divided evenly among the sessions whose clients are away, the other half,
    /// or all of it where none is away, among those whose clients are connected. Beside it each
    /// session has 1 KiB. Unset: a quarter of the memory that the host may use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queues_bytes_max: Option<ByteSize>,
    /// Memory that the subscriptions of all clients take together, shared as `queues_bytes_max`
    /// is; one more is refused in SUBACK (0x97). Unset: an eighth of the memory that the host may
    /// use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subscriptions_bytes_max: Option<ByteSize>,
    /// Memory that topic aliases, messages that wait for room in their stream and packets that
    /// are not yet written take for all connections together, shared as `queues_bytes_max` is. A
    /// client that sets an alias for which there is no room is disconnected (0x97); packets are
    /// then read and written in smaller pieces. Unset: an eighth of the memory that the host may
    /// use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connections_bytes_max: Option<ByteSize>,
    /// Retained messages.
    pub retained_messages_max: u32,
    /// Bytes of retained messages. They are part of their stream's state, of
    /// which every segment of the stream begins with a copy.
    pub retained_bytes_max: ByteSize,
    /// Bytes of one will with its topic, its properties and the client's id; a client
    /// with a larger one is refused (0x95). A CONNECT is at most 64 KiB, or this where
    /// it is more.
    pub will_bytes_max: ByteSize,
    /// Bytes of all wills; a client whose will finds no room is refused (0x97). They are
    /// part of their stream's state, as retained messages are: 48 MiB for both.
    pub wills_bytes_max: ByteSize,
    /// After a restart, the wills of clients that the last run lost are held so
    /// long at least, for the clients to come back.
    pub will_delay_after_restart: Period,
    /// Handshakes (PROXY, TLS, WebSocket, CONNECT) in progress at a time, for each
    /// listener. Past it the address with the most connections that have not sent CONNECT
    /// loses its oldest to one with fewer (IPv6: a network of 64 bits; all Unix sockets and
    /// all behind one load balancer count as one address); between equals a connection waits
    /// a moment, then is closed.
    pub handshakes_max: u32,
    /// From the first byte's wait to the end of CONNECT; before it, as long again
    /// for PROXY, TLS and WebSocket together.
    pub connect_timeout: Period,
    /// At shutdown, how long waiting acknowledgements may still take.
    pub drain_timeout: Period,
    /// How often `$SYS` topics are published; 0 turns them off.
    pub sys_interval: Period,
    /// Store the client id as property `client-id` with every message, also
    /// where the topic names the device.
    pub keep_client_id: bool,
}

/// One address to listen on.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Endpoint {
    /// Address and port, `127.0.0.1:1883`, port 0 takes a free one; or a Unix
    /// socket, `unix:/run/headworks/mqtt.sock`.
    pub bind: Bind,
    /// Serve TLS on this address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<Tls>,
    /// Serve MQTT over WebSocket on this address; `{}` for the defaults.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub websocket: Option<WebSocket>,
    /// A load balancer is in front and says whose connection it is, by the PROXY
    /// protocol, version 2. Connections of others are closed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_protocol: Option<ProxyProtocol>,
    /// Mode of the Unix socket's file: who may connect; `"0660"` if unset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<SocketMode>,
    /// Serve clients without credentials, as far as `access.rules` let them; with
    /// `access` this is needed on loopback too. Needed for an address that is not
    /// loopback, unless `access.authenticate` or `tls.client_ca` asks who is there.
    #[serde(default)]
    pub allow_anonymous: bool,
}

/// MQTT over WebSocket, subprotocol `mqtt`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct WebSocket {
    /// Path of the URL that clients connect to, or several; `"*"` for any.
    pub path: Paths,
    /// Largest message that a client may send, in one frame or several; unset:
    /// twice `max_packet_size`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_frame_size: Option<ByteSize>,
    /// Web pages that may connect, by their origin as browsers say it
    /// (`https://plant.example.com`), `"*"` for all. Pages of the host that they
    /// connect to need no entry where that is an address, `localhost`, or a name with
    /// TLS here; clients that are no browsers send no `Origin` and are not held to it.
    pub origins: Vec<String>,
}

/// Paths of URLs.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum Paths {
    One(String),
    Several(Vec<String>),
}

impl Default for Paths {
    /// What clients ask for that are given none.
    fn default() -> Self {
        Self::Several(["/mqtt", "/", "/ws"].map(str::to_owned).into())
    }
}

impl Paths {
    pub fn all(&self) -> &[String] {
        match self {
            Self::One(path) => std::slice::from_ref(path),
            Self::Several(paths) => paths,
        }
    }
}

fn is_path(path: &str) -> bool {
    path == websocket::ANY || (path.starts_with('/') && !path.contains(['?', '#', ' ']))
}

impl WebSocket {
    pub fn settings(&self, config: &Config) -> websocket::Settings {
        let frame_bytes_max = self.max_frame_size.map_or(2 * config.max_packet_size.0, |size| size.0);
        websocket::Settings {
            protocol: "MQTT",
            // As registered, and what clients of MQTT 3.1 said before it was.
            subprotocols: &["mqtt", "mqttv3.1"],
            paths: self.path.all().to_vec(),
            origins: self.origins.clone(),
            frame_bytes_max: frame_bytes_max as usize,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listeners: vec![Endpoint::at(Bind::Tcp(SocketAddr::from(([127, 0, 0, 1], 1883))))],
            access: None,
            limits: access::Limits::default(),
            max_packet_size: ByteSize::mib(1),
            partial_packets_bytes_max: ByteSize::mib(256),
            receive_maximum: 1_024,
            inflight_max: 1_024,
            outbound_inflight_max: 20,
            topic_alias_maximum: 16,
            outbound_topic_alias_maximum: 64,
            connections_max: 100_000,
            keep_alive_max: None,
            sessions_max: 200_000,
            session_expiry_max: Period(Duration::from_secs(7 * 24 * 3_600)),
            subscriptions_per_client_max: 10_000,
            subscription_bytes_per_client_max: ByteSize::mib(2),
            queue_messages_max: 10_000,
            queue_bytes_max: ByteSize::mib(16),
            queue_age_max: Period(Duration::from_secs(7 * 24 * 3_600)),
            queue_when_full: WhenFull::DropOldest,
            queue_copies_bytes_max: ByteSize::mib(512),
            queues_bytes_max: None,
            subscriptions_bytes_max: None,
            connections_bytes_max: None,
            retained_messages_max: 100_000,
            retained_bytes_max: ByteSize::mib(32),
            will_bytes_max: ByteSize::kib(64),
            wills_bytes_max: ByteSize::mib(16),
            will_delay_after_restart: Period(Duration::from_secs(30)),
            handshakes_max: 4_096,
            connect_timeout: Period(Duration::from_secs(10)),
            drain_timeout: Period(Duration::from_secs(5)),
            sys_interval: Period(Duration::from_secs(10)),
            keep_client_id: false,
        }
    }
}

impl Config {
    /// Returns how many QoS 1 and 2 messages a client is sent that it has not acknowledged.
    pub fn outbound_window(&self, receive_maximum: Option<NonZeroU16>) -> u16 {
        receive_maximum.map_or(self.outbound_inflight_max, NonZeroU16::get).min(self.inflight_max)
    }

    /// Finds everything that is wrong; reads no file.
    pub fn validate(&self, path: &KeyPath, problems: &mut Problems) {
        for (i, endpoint) in self.listeners.iter().enumerate() {
            let at = path.key("listeners").index(i);
            endpoint.entry().validate(&at, self.asks_for_credentials(), problems);
            endpoint.validate(&at, self.max_packet_size, problems);
        }
        if let Some(access) = &self.access {
            access.validate(&path.key("access"), problems);
        }
        self.limits.validate(&path.key("limits"), problems);
        let size = |key: &str, value: u64, least: u64, most: u64, problems: &mut Problems| {
            if value < least || value > most {
                problems.add(path.key(key), format!("must be {least} to {most}, is {value}"));
            }
        };
        size("max_packet_size", self.max_packet_size.0, 1_024, crate::batch::SPAN_BYTES_MAX as u64, problems);
        let partial = self.partial_packets_bytes_max.0;
        size("partial_packets_bytes_max", partial, self.max_packet_size.0, 1 << 40, problems);
        size("receive_maximum", self.receive_maximum.into(), 1, 65_535, problems);
        size("inflight_max", self.inflight_max.into(), 1, 65_535, problems);
        size("outbound_inflight_max", self.outbound_inflight_max.into(), 1, 65_535, problems);
        size("topic_alias_maximum", self.topic_alias_maximum.into(), 0, 1_024, problems);
        let outbound = self.outbound_topic_alias_maximum;
        size("outbound_topic_alias_maximum", outbound.into(), 0, 1_024, problems);
        size("handshakes_max", self.handshakes_max.into(), 1, 1_000_000, problems);
        size("connections_max", self.connections_max.into(), 1, 10_000_000, problems);
        size("sessions_max", self.sessions_max.into(), 1, 10_000_000, problems);
        let per_client = self.subscriptions_per_client_max;
        size("subscriptions_per_client_max", per_client.into(), 1, 1_000_000, problems);
        let bytes = self.subscription_bytes_per_client_max.0;
        size("subscription_bytes_per_client_max", bytes, 1, 1 << 30, problems);
        size("queue_messages_max", self.queue_messages_max.into(), 1, 10_000_000, problems);
        size("queue_bytes_max", self.queue_bytes_max.0, 1_024, 1 << 40, problems);
        size("queue_copies_bytes_max", self.queue_copies_bytes_max.0, 0, 1 << 40, problems);
        for (key, bytes) in [
            ("queues_bytes_max", self.queues_bytes_max),
            ("subscriptions_bytes_max", self.subscriptions_bytes_max),
            ("connections_bytes_max", self.connections_bytes_max),
        ] {
            if let Some(bytes) = bytes {
                size(key, bytes.0, 64 << 10, 1 << 40, problems);
            }
        }
        let (retained, wills) = (self.retained_bytes_max.0, self.wills_bytes_max.0);
        size("retained_bytes_max", retained, 0, STATE_BYTES_MOST, problems);
        if retained.saturating_add(wills) > STATE_BYTES_MOST {
            let sum = format!("retained_bytes_max ({retained}) and wills_bytes_max ({wills})");
            problems.add(
                path.key("wills_bytes_max"),
                format!("{sum} must be at most {STATE_BYTES_MOST} together"),
            );
        }
        if self.will_bytes_max.0 > wills {
            let message = format!("must be at most wills_bytes_max ({wills}), is {}", self.will_bytes_max.0);
            problems.add(path.key("will_bytes_max"), message);
        }
        if self.queue_age_max.0.is_zero() {
            problems.add(path.key("queue_age_max"), "must be longer than 0s");
        }
        if let Some(Period(max)) = self.keep_alive_max
            && !(Duration::from_secs(1)..=Duration::from_secs(u16::MAX.into())).contains(&max)
        {
            problems.add(path.key("keep_alive_max"), format!("must be 1s to 65535s, is {}", Period(max)));
        }
        if self.connect_timeout.0.is_zero() {
            problems.add(path.key("connect_timeout"), "must be longer than 0s");
        }
    }

    /// Reads the files that it names; adds what is wrong with them.
    pub fn look(&self, path: &KeyPath, problems: &mut Problems) {
        for (i, endpoint) in self.listeners.iter().enumerate() {
            if let Some(tls) = &endpoint.tls {
                tls.look(&path.key("listeners").index(i).key("tls"), problems);
            }
        }
        if let Some(access) = &self.access {
            access::look(access, &path.key("access"), problems);
        }
    }

    /// Whether clients that nobody knows are refused.
    pub fn asks_for_credentials(&self) -> bool {
        self.access.as_ref().is_some_and(|access| !access.authenticate.is_empty())
    }
}

impl Endpoint {
    /// Plain MQTT.
    pub fn at(bind: Bind) -> Self {
        Self { bind, tls: None, websocket: None, proxy_protocol: None, mode: None, allow_anonymous: false }
    }

    /// `mqtt`, `mqtt tls`, `mqtt websocket tls proxied`
    pub fn kind(&self) -> String {
        let mut kind = "mqtt".to_owned();
        let layers = [
            (self.websocket.is_some(), " websocket"),
            (self.tls.is_some(), " tls"),
            (self.proxy_protocol.is_some(), " proxied"),
        ];
        layers.iter().filter(|(is_there, _)| *is_there).for_each(|(_, name)| kind += name);
        kind
    }

    /// Returns what it is below WebSocket and MQTT.
    pub fn entry(&self) -> transport::Endpoint {
        transport::Endpoint {
            bind: self.bind.clone(),
            tls: self.tls.clone(),
            proxy_protocol: self.proxy_protocol.clone(),
            mode: self.mode,
            allow_anonymous: self.allow_anonymous,
        }
    }

    fn validate(&self, at: &KeyPath, max_packet_size: ByteSize, problems: &mut Problems) {
        if let Some(WebSocket { path, max_frame_size, origins }) = &self.websocket {
            let at = at.key("websocket");
            for (i, origin) in origins.iter().enumerate().filter(|(_, origin)| !origin::is_valid(origin)) {
                let message =
                    format!("must be an origin such as https://plant.example.com, or \"*\", is \"{origin}\"");
                problems.add(at.key("origins").index(i), message);
            }
            if path.all().is_empty() {
                problems.add(at.key("path"), "must name a path such as /mqtt");
            }
            for path in path.all().iter().filter(|path| !is_path(path)) {
                problems.add(at.key("path"), format!("must be a path such as /mqtt, is \"{path}\""));
            }
            let (least, most) = (max_packet_size.0, 2 * crate::batch::SPAN_BYTES_MAX as u64);
            if let Some(size) = max_frame_size
                && (size.0 < least || size.0 > most)
            {
                let range = format!("must be {least} (max_packet_size) to {most}, is {}", size.0);
                problems.add(at.key("max_frame_size"), range);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_may_have_as_many_subscriptions_as_a_home_or_fleet_controller_makes() {
        let config = Config::default();
        assert!(config.subscriptions_per_client_max >= 10_000);
        // Of 200 bytes each.
        assert!(config.subscription_bytes_per_client_max.0 >= 10_000 * 200);
    }

    #[test]
    fn clients_that_were_told_no_path_find_the_websocket() {
        let settings = WebSocket::default().settings(&Config::default());
        assert!(["", "/", "/mqtt", "/mqtt/", "/ws"].iter().all(|path| settings.serves(path)));
        assert!(!settings.serves("/mqtts"));
    }

    fn problems(config: &Config) -> Vec<String> {
        let mut problems = Problems::default();
        config.validate(&KeyPath::root().key("mqtt"), &mut problems);
        problems.into_vec().into_iter().map(|p| format!("{}: {}", p.path.as_str(), p.message)).collect()
    }

    #[test]
    fn the_default_is_valid_and_listens_on_loopback_only() {
        assert!(problems(&Config::default()).is_empty());
        assert!(Config::default().listeners.iter().all(|endpoint| endpoint.entry().is_local()));
    }

    #[test]
    fn an_open_address_without_credentials_is_refused_until_somebody_says_so() {
        let mut config: Config = serde_json::from_str(
            r#"{ "listeners": [{ "bind": "0.0.0.0:1883" }, { "bind": "0.0.0.0:1883" }], "receive_maximum": 0 }"#,
        )
        .unwrap();
        let found = problems(&config);
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(found[0].starts_with("mqtt.listeners[0].bind: 0.0.0.0:1883 can be reached"), "{found:?}");
        config.listeners.truncate(1);
        config.listeners[0].allow_anonymous = true;
        config.receive_maximum = 10;
        assert!(problems(&config).is_empty());
    }

    #[test]
    fn retained_messages_and_wills_leave_room_in_a_streams_state() {
        let of = |json: &str| problems(&serde_json::from_str(json).unwrap());
        assert!(of(r#"{ "retained_bytes_max": "40MiB", "wills_bytes_max": "8MiB" }"#).is_empty());
        let found = of(r#"{ "retained_bytes_max": "40MiB", "will_bytes_max": "17MiB" }"#);
        assert_eq!(
            found,
            [
                "mqtt.wills_bytes_max: retained_bytes_max (41943040) and wills_bytes_max (16777216) \
                 must be at most 50331648 together",
                "mqtt.will_bytes_max: must be at most wills_bytes_max (16777216), is 17825792",
            ]
        );
    }

    #[test]
    fn everything_wrong_with_a_listener_is_said_at_once() {
        let config: Config = serde_json::from_str(
            r#"{ "listeners": [
                { "bind": "unix:/run/mqtt.sock", "tls": { "cert": "a", "key": "b", "crl": "c" },
                  "proxy_protocol": { "from": [] } },
                { "bind": "127.0.0.1:1883", "mode": "0600", "proxy_protocol": { "from": ["10.0.0.0/8"] },
                  "websocket": { "path": "mqtt", "max_frame_size": 10, "origins": ["null", "plant.example"] } }
            ], "handshakes_max": 0 }"#,
        )
        .unwrap();
        let keys: Vec<String> =
            problems(&config).iter().map(|line| line.split(": ").next().unwrap().to_owned()).collect();
        let listener = |n: u32, key: &str| format!("mqtt.listeners[{n}].{key}");
        // The first is not served to loopback only either: a load balancer brings others.
        assert_eq!(
            keys,
            [
                listener(0, "bind"),
                listener(0, "tls"),
                listener(0, "proxy_protocol"),
                listener(0, "tls.crl"),
                listener(0, "proxy_protocol.from"),
                listener(1, "bind"),
                listener(1, "mode"),
                listener(1, "websocket.origins[1]"),
                listener(1, "websocket.path"),
                listener(1, "websocket.max_frame_size"),
                "mqtt.handshakes_max".to_owned(),
            ]
        );
    }
}
