//! The `mqtt:` section of the configuration: addresses and bounds.

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

/// Most bytes of retained messages and wills together. The state of a stream holds 128 MiB, and QoS 2
/// packet ids need the rest.
const STATE_BYTES_MOST: u64 = 48 << 20;

/// MQTT 3.1.1 and 5.0 for devices and subscribers. A key that a reload changes applies at once, unless its
/// text says otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Addresses to listen on. The MQTT version is detected for each connection. A reload opens new addresses
    /// and closes those that are gone, whose clients are disconnected (0x98). Other settings of an address
    /// are for new connections.
    pub listeners: Vec<Endpoint>,
    /// Who may connect, publish and subscribe. If unset, every client may do everything. A reload changes the
    /// rights of connected clients too, and disconnects those that it no longer admits (0x87).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access: Option<access::Config>,
    /// Rate and size limits.
    pub limits: access::Limits,
    /// Largest packet that a client may send. MQTT 5 clients are told this limit. A reload changes it for
    /// new connections.
    pub max_packet_size: ByteSize,
    /// Bytes of partly received packets of all clients together. Beyond this, a packet of more than 4 KiB
    /// is not read further until there is room for all of it, and a client that has room and sends less
    /// than 10 KiB in 10 s while others wait is disconnected (0x97). A change needs a restart.
    pub partial_packets_bytes_max: ByteSize,
    /// Unacknowledged QoS 1 and 2 publishes that an MQTT 5 client may have. One more is a protocol error
    /// (0x93). A reload changes it for new connections.
    pub receive_maximum: u16,
    /// QoS 1 and 2 messages in flight. For publishes of an MQTT 3.1.1 client, its connection is not read
    /// while so many are unacknowledged. For messages to an MQTT 5 client, this is the upper limit of its
    /// Receive Maximum. A reload changes it for new connections.
    pub inflight_max: u16,
    /// Unacknowledged QoS 1 and 2 messages that may be sent to a client that names no Receive Maximum;
    /// MQTT 3.1.1 has none. At most `inflight_max`. A client may accept fewer messages than it is sent,
    /// and lose the others: a Mosquitto bridge accepts 20 with QoS 2 (`max_inflight_messages`). A larger
    /// value is faster if acknowledgements take long. A reload changes it for new connections.
    pub outbound_inflight_max: u16,
    /// Topic aliases that an MQTT 5 client may set. 0 turns them off. A reload changes it for new
    /// connections.
    pub topic_alias_maximum: u16,
    /// Topic aliases that the host uses for messages to an MQTT 5 client that accepts them. Each keeps
    /// its topic in memory. 0 turns them off. A reload changes it for new connections.
    pub outbound_topic_alias_maximum: u16,
    /// Connections at a time. A further connection is refused. Each is an open file: the hard limit on
    /// open files (`ulimit -Hn`, `LimitNOFILE=` of systemd) must be higher.
    pub connections_max: u32,
    /// Longest keep alive. An MQTT 5 client that asks for a longer one, or for none, is told this value
    /// (Server Keep Alive) and held to it. Clients of older versions cannot be told, and are held to
    /// their own. If unset, there is no limit. A reload changes it for new connections.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_alive_max: Option<Period>,
    /// Sessions kept, with or without a connected client. A new session beyond this is refused. A reload
    /// changes it for new connections.
    pub sessions_max: u32,
    /// Longest time that a session is kept while its client is not connected. MQTT 3.1.1 sessions with
    /// clean session 0 are kept for this time. A reload changes it for new connections.
    pub session_expiry_max: Period,
    /// Subscriptions of one client. Its filters together may have ten times as many topic levels.
    pub subscriptions_per_client_max: u32,
    /// Bytes of the filters to which one client is subscribed. In memory they take up to about three
    /// times as much.
    pub subscription_bytes_per_client_max: ByteSize,
    /// Messages queued for one subscriber, whether it is connected or not.
    pub queue_messages_max: u32,
    /// Bytes of messages queued for one subscriber. While the client of a persistent session is not
    /// connected, its messages are not in memory but in their streams.
    pub queue_bytes_max: ByteSize,
    /// A message that has been queued for longer is dropped.
    pub queue_age_max: Period,
    /// What happens when `queue_messages_max` or `queue_bytes_max` is reached: `drop_oldest` drops the
    /// oldest queued messages, `refuse` the new one. A connected client whose session ends with its
    /// connection is disconnected instead.
    pub queue_when_full: WhenFull,
    /// Bytes of messages that are copied for sessions before retention removes them from their streams.
    /// Messages beyond this are dropped and counted. The copies take up to about twice as much on disk. A
    /// change needs a restart.
    pub queue_copies_bytes_max: ByteSize,
    /// Memory that the queues of all subscribers take together: 64 bytes for each message that is queued
    /// or in flight, and the messages that are held in memory. One eighth is reserved for messages of
    /// more than 4 KiB that find no other room, which subscribers that read slowly use in turn; a client
    /// that takes less than 10 KiB of such a message in 10 s while others wait is disconnected (0x97).
    /// The rest is divided as follows. Up to three quarters, subscribers take what they need. Beyond
    /// that, a subscriber takes more only while it has less than its share of the last quarter; for any
    /// other the queue is full. Half of that quarter is divided evenly among the sessions whose clients
    /// are not connected, and the other half (or all of it, if all clients are connected) among those
    /// whose clients are. In addition, each session has 1 KiB. If unset: a quarter of the memory that the
    /// host may use. A change needs a restart.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queues_bytes_max: Option<ByteSize>,
    /// Memory that the subscriptions of all clients take together, divided as `queues_bytes_max` is. A
    /// further subscription is refused in SUBACK (0x97). If unset: an eighth of the memory that the host
    /// may use. A change needs a restart.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subscriptions_bytes_max: Option<ByteSize>,
    /// Memory that topic aliases, messages that wait for room in their stream, and unsent packets take
    /// for all connections together, divided as `queues_bytes_max` is. Beyond this, a client that sets a
    /// topic alias is disconnected (0x97), and packets are read and written in smaller pieces. If unset:
    /// an eighth of the memory that the host may use. A change needs a restart.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connections_bytes_max: Option<ByteSize>,
    /// Number of retained messages. A change needs a restart.
    pub retained_messages_max: u32,
    /// Bytes of retained messages. They are part of the state of their stream, and every segment of the
    /// stream begins with a copy of its state. A change needs a restart.
    pub retained_bytes_max: ByteSize,
    /// Bytes of one will with its topic, its properties and the client id. A client with a larger will is
    /// refused (0x95). A CONNECT packet has at most 64 KiB, or this size if it is larger. A reload
    /// changes it for new connections.
    pub will_bytes_max: ByteSize,
    /// Bytes of all wills. A client for whose will there is no room is refused (0x97). Wills are part of
    /// the state of their stream, as retained messages are; both together have at most 48 MiB. A change
    /// needs a restart.
    pub wills_bytes_max: ByteSize,
    /// After a restart, how long the wills of clients that were connected before are delayed at least,
    /// so that the clients can connect again.
    pub will_delay_after_restart: Period,
    /// Handshakes (PROXY, TLS, WebSocket, CONNECT) in progress at a time, for each listener. Beyond
    /// this, the address with the most connections that have not sent CONNECT loses its oldest to an
    /// address with fewer; between addresses with equally many, a new connection waits a moment and is
    /// then closed. An IPv6 network of 64 bits counts as one address, and so do all Unix sockets, and
    /// all clients behind one load balancer.
    pub handshakes_max: u32,
    /// Time from the start of MQTT on a connection to the end of its CONNECT packet. PROXY header, TLS
    /// and WebSocket handshakes together may take as long before that. A reload changes it for new
    /// connections.
    pub connect_timeout: Period,
    /// How long pending acknowledgements may still take at shutdown.
    pub drain_timeout: Period,
    /// How often `$SYS` topics are published. 0 turns them off.
    pub sys_interval: Period,
    /// Store the client id as property `client-id` with every message, even if the topic names the
    /// device. A reload changes it for new connections.
    pub keep_client_id: bool,
}

/// One address to listen on.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Endpoint {
    /// Address and port, such as `127.0.0.1:1883`; port 0 selects a free port. Or a Unix socket, such as
    /// `unix:/run/headworks/mqtt.sock`.
    pub bind: Bind,
    /// Serve TLS on this address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<Tls>,
    /// Serve MQTT over WebSocket on this address; `{}` for the defaults.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub websocket: Option<WebSocket>,
    /// A load balancer connects to this address and names the client of each connection in a PROXY
    /// protocol header, version 2. Connections from other addresses are closed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_protocol: Option<ProxyProtocol>,
    /// File mode of the Unix socket, which decides who may connect. `"0660"` if unset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<SocketMode>,
    /// Serve clients without credentials, as far as `access.rules` allow. Needed for an address that is
    /// not loopback, unless `access.authenticate` or `tls.client_ca` identifies clients; with `access`
    /// it is needed on loopback too.
    #[serde(default)]
    pub allow_anonymous: bool,
}

/// MQTT over WebSocket, subprotocol `mqtt`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct WebSocket {
    /// Path of the URL that clients connect to, or several paths. `"*"` allows any path.
    pub path: Paths,
    /// Largest message that a client may send, in one frame or several. If unset: twice
    /// `max_packet_size`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_frame_size: Option<ByteSize>,
    /// Web pages that may connect, by origin as a browser sends it (`https://plant.example.com`); `"*"`
    /// allows all. A page that was served from the same host name needs no entry if that name is an
    /// address, `localhost`, or a name that this listener serves with TLS. Clients that are not browsers
    /// send no `Origin`, and this list does not apply to them.
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
    /// Paths that clients use if none is configured in them.
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
    pub fn packet_bytes_max(&self) -> usize {
        self.max_packet_size.0 as usize
    }

    /// Returns the number of unacknowledged QoS 1 and 2 messages that may be sent to a client.
    pub fn outbound_window(&self, receive_maximum: Option<NonZeroU16>) -> u16 {
        receive_maximum.map_or(self.outbound_inflight_max, NonZeroU16::get).min(self.inflight_max)
    }

    /// Adds every problem of the section. Reads no file.
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

    /// Reads the files that the section names and adds what is wrong with them.
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

    /// Returns whether clients that no authenticator recognises are refused.
    pub fn asks_for_credentials(&self) -> bool {
        self.access.as_ref().is_some_and(|access| !access.authenticate.is_empty())
    }
}

impl Endpoint {
    /// Returns an endpoint for plain MQTT.
    pub fn at(bind: Bind) -> Self {
        Self { bind, tls: None, websocket: None, proxy_protocol: None, mode: None, allow_anonymous: false }
    }

    /// Returns the kind of the endpoint: `mqtt`, `mqtt tls`, `mqtt websocket tls proxied`.
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

    /// Returns the endpoint's settings below WebSocket and MQTT.
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
