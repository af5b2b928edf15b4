//! Counters of the MQTT listener. Handles are created once, and the hot path counts once for each read,
//! not for each message.

use std::path::Path;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use metrics::{Counter, Gauge, counter, gauge};

use super::outbound::{Filled, Full};
use super::wire::{self, Version};
use crate::room::Room;
use crate::telemetry::{Metric, MetricKind};

/// Packet types by number (MQTT 5.0, 2.1.2).
const TYPES: [&str; 16] = [
    "",
    "connect",
    "connack",
    "publish",
    "puback",
    "pubrec",
    "pubrel",
    "pubcomp",
    "subscribe",
    "suback",
    "unsubscribe",
    "unsuback",
    "pingreq",
    "pingresp",
    "disconnect",
    "auth",
];
/// Packet types that clients send, and that the host sends. PUBLISH, its acknowledgements and AUTH are
/// sent by both.
const BY_CLIENTS: [usize; 11] = [1, 3, 4, 5, 6, 7, 8, 10, 12, 14, 15];
const BY_US: [usize; 11] = [2, 3, 4, 5, 6, 7, 9, 11, 13, 14, 15];
/// Indices in [`Counters::bytes`].
pub(super) const RECEIVED: usize = 0;
pub(super) const SENT: usize = 1;

/// Causes and outcomes whose counters exist from the start. The help texts list them.
const DISCONNECTS: &[&str] = &[
    "client",
    "lost",
    "taken_over",
    "keep_alive",
    "malformed",
    "refused",
    "slow",
    "kicked",
    "listener_closed",
    "stopped",
    "shutdown",
];
const REFUSED_CONNECTS: &[&str] = &[
    "bad_credentials",
    "guessing",
    "bad_auth_method",
    "not_authorized",
    "client_id",
    "session_owner",
    "access_unavailable",
    "broker_state",
    "will_not_authorized",
    "will_topic_levels",
    "will_bytes_max",
    "wills_bytes_max",
    "connections_per_user",
    "connect_rate",
    "connections_max",
    "handshakes_max",
    "sessions_max",
    "proxy",
    "tls_no_certificate",
    "tls_unknown_ca",
    "tls_expired",
    "tls_revoked",
    "tls",
    "websocket",
    "websocket_origin",
    "timeout",
    "lost",
    "malformed",
    "invalid",
    "stopped",
];
const REFUSED_SUBSCRIBES: &[&str] = &[
    "invalid",
    "not_authorized",
    "questions_max",
    "subscriptions_per_client_max",
    "subscription_bytes_per_client_max",
    "subscriptions_bytes_max",
    "broker_state",
];
const TLS_RELOADS: &[&str] = &["taken", "refused"];
/// Packets that can carry "not authorized" (0x87).
const NOT_AUTHORIZED: &[&str] = &["connack", "puback", "pubrec", "suback", "unsuback", "disconnect"];

pub const METRICS: &[Metric] = &[
    Metric {
        name: "headworks_mqtt_connections",
        kind: MetricKind::Gauge,
        help: "Current MQTT connections.",
        labels: &[],
    },
    Metric {
        name: "headworks_mqtt_packets_received_total",
        kind: MetricKind::Counter,
        help: "MQTT packets received from clients, by type.",
        labels: &["type"],
    },
    Metric {
        name: "headworks_mqtt_packets_sent_total",
        kind: MetricKind::Counter,
        help: "MQTT packets sent to clients, by type.",
        labels: &["type"],
    },
    Metric {
        name: "headworks_mqtt_bytes_total",
        kind: MetricKind::Counter,
        help: "Bytes of MQTT read from and written to clients, by direction: received, sent.",
        labels: &["direction"],
    },
    Metric {
        name: "headworks_mqtt_refusals_total",
        kind: MetricKind::Counter,
        help: "Negative acknowledgements and DISCONNECT packets sent, by packet type (connack, puback, pubrec, pubcomp, suback, unsuback, disconnect) and reason code, such as 0x87 (MQTT 5.0, 2.4; a CONNACK of MQTT 3.1.1 has 0x01 to 0x05).",
        labels: &["packet", "code"],
    },
    Metric {
        name: "headworks_mqtt_sockets_total",
        kind: MetricKind::Counter,
        help: "Connections accepted from the network for MQTT, including those that were refused later.",
        labels: &[],
    },
    Metric {
        name: "headworks_mqtt_acks_waiting",
        kind: MetricKind::Gauge,
        help: "Acknowledgements that wait until their stream is durable.",
        labels: &[],
    },
    Metric {
        name: "headworks_mqtt_queued_messages",
        kind: MetricKind::Gauge,
        help: "Messages queued for all subscribers.",
        labels: &[],
    },
    Metric {
        name: "headworks_mqtt_queued_bytes",
        kind: MetricKind::Gauge,
        help: "Bytes of messages queued for subscribers. A message queued for several subscribers counts once per queue.",
        labels: &[],
    },
    Metric {
        name: "headworks_mqtt_memory_bytes",
        kind: MetricKind::Gauge,
        help: "Bytes of memory that all clients together use, by use: queues, subscriptions, connections. Up to 1 KiB of each client is not counted.",
        labels: &["of"],
    },
    Metric {
        name: "headworks_mqtt_memory_max_bytes",
        kind: MetricKind::Gauge,
        help: "Limit of headworks_mqtt_memory_bytes: mqtt.queues_bytes_max, mqtt.subscriptions_bytes_max, mqtt.connections_bytes_max.",
        labels: &["of"],
    },
    Metric {
        name: "headworks_mqtt_in_flight_messages",
        kind: MetricKind::Gauge,
        help: "QoS 1 and 2 messages that were sent to subscribers and are not acknowledged.",
        labels: &[],
    },
    Metric {
        name: "headworks_mqtt_retained_messages",
        kind: MetricKind::Gauge,
        help: "Number of retained messages. The limit is mqtt.retained_messages_max.",
        labels: &[],
    },
    Metric {
        name: "headworks_mqtt_retained_bytes",
        kind: MetricKind::Gauge,
        help: "Bytes of retained messages. The limit is mqtt.retained_bytes_max.",
        labels: &[],
    },
    Metric {
        name: "headworks_mqtt_wills_bytes",
        kind: MetricKind::Gauge,
        help: "Bytes of the wills of all clients, connected or not. The limit is mqtt.wills_bytes_max.",
        labels: &[],
    },
    Metric {
        name: "headworks_mqtt_subscriptions",
        kind: MetricKind::Gauge,
        help: "Subscriptions of all sessions.",
        labels: &[],
    },
    Metric {
        name: "headworks_mqtt_sessions_expired_total",
        kind: MetricKind::Counter,
        help: "Sessions that expired because their client did not connect again in time.",
        labels: &[],
    },
    Metric {
        name: "headworks_mqtt_delivery_bytes_total",
        kind: MetricKind::Counter,
        help: "Payload bytes of PUBLISH packets sent to subscribers.",
        labels: &[],
    },
    Metric {
        name: "headworks_mqtt_connects_total",
        kind: MetricKind::Counter,
        help: "MQTT connections accepted after CONNECT.",
        labels: &[],
    },
    Metric {
        name: "headworks_mqtt_disconnects_total",
        kind: MetricKind::Counter,
        help: "MQTT connections that ended, by cause: client, lost, taken_over, keep_alive, malformed, refused (by the access rules), slow, kicked (by an operator), listener_closed (by a reload), stopped, shutdown.",
        labels: &["cause"],
    },
    Metric {
        name: "headworks_mqtt_refused_connects_total",
        kind: MetricKind::Counter,
        help: "Connections that were refused before or by CONNACK, by cause: bad_credentials, guessing (too many wrong passwords for the user from the address), bad_auth_method, not_authorized, client_id, session_owner (a client without credentials used the client id of a user's session), access_unavailable, broker_state (no room to store another session), will_not_authorized, will_topic_levels, will_bytes_max, wills_bytes_max, connections_per_user, connect_rate, connections_max, handshakes_max, sessions_max, proxy, tls_no_certificate, tls_unknown_ca, tls_expired, tls_revoked, tls (any other failed handshake), websocket, websocket_origin (a browser shows a page of another site), timeout, lost, malformed, invalid, stopped.",
        labels: &["cause"],
    },
    Metric {
        name: "headworks_mqtt_tls_reloads_total",
        kind: MetricKind::Counter,
        help: "Reloads of changed certificate files, by outcome: taken, refused (the previous files stay in use).",
        labels: &["outcome"],
    },
    Metric {
        name: "headworks_mqtt_certificate_seconds_left",
        kind: MetricKind::Gauge,
        help: "Seconds until the first certificate in the file (tls.cert, tls.client_ca) expires, negative afterwards. For tls.cert only the server's own certificate counts.",
        labels: &["file"],
    },
    Metric {
        name: "headworks_mqtt_revocation_list_seconds_left",
        kind: MetricKind::Gauge,
        help: "Seconds until the first revocation list in the file (tls.crl) must be replaced, negative afterwards, infinite if no list gives a time.",
        labels: &["file"],
    },
    Metric {
        name: "headworks_mqtt_publishes_total",
        kind: MetricKind::Counter,
        help: "Messages that were received over MQTT and stored in a stream, by QoS.",
        labels: &["qos"],
    },
    Metric {
        name: "headworks_mqtt_publish_bytes_total",
        kind: MetricKind::Counter,
        help: "Payload bytes of messages that were received over MQTT and stored in a stream.",
        labels: &[],
    },
    Metric {
        name: "headworks_mqtt_publishes_outside_namespace_total",
        kind: MetricKind::Counter,
        help: "Messages that were received over MQTT and stored in a stream although their topic does not match `topics` and names no device.",
        labels: &[],
    },
    Metric {
        name: "headworks_mqtt_acks_total",
        kind: MetricKind::Counter,
        help: "PUBACK, PUBREC and PUBCOMP packets sent after the stream was durable.",
        labels: &[],
    },
    Metric {
        name: "headworks_mqtt_duplicates_total",
        kind: MetricKind::Counter,
        help: "QoS 2 publishes that were received again and not stored again.",
        labels: &[],
    },
    Metric {
        name: "headworks_mqtt_refused_publishes_total",
        kind: MetricKind::Counter,
        help: "Publishes that were refused, by cause: dollar_topic, too_large, not_authorized, topic_levels.",
        labels: &["cause"],
    },
    Metric {
        name: "headworks_mqtt_refused_subscribes_total",
        kind: MetricKind::Counter,
        help: "Topic filters that were refused in SUBACK, by cause: invalid, not_authorized, questions_max (too many filters in one SUBSCRIBE that need an answer of an access plugin), subscriptions_per_client_max, subscription_bytes_per_client_max, subscriptions_bytes_max (no memory for the subscription), broker_state (no room to store the subscription).",
        labels: &["cause"],
    },
    Metric {
        name: "headworks_mqtt_throttles_total",
        kind: MetricKind::Counter,
        help: "Number of times a connection was not read because of a publish rate in mqtt.limits.",
        labels: &[],
    },
    Metric {
        name: "headworks_mqtt_dropped_total",
        kind: MetricKind::Counter,
        help: "Messages that were dropped, by cause: no_space (QoS 0 while the disk is full), queue_full, queues_full (the queues of all subscribers have reached mqtt.queues_bytes_max), queue_age, packet_too_large, expired, not_authorized (the access rules or an access plugin deny the message to the subscriber), retained_full, gap (lost by damage, or removed by retention before they could be copied).",
        labels: &["cause"],
    },
    Metric {
        name: "headworks_mqtt_copied_messages_total",
        kind: MetricKind::Counter,
        help: "Messages that were copied for sessions before retention removed them from their stream.",
        labels: &[],
    },
    Metric {
        name: "headworks_mqtt_copies",
        kind: MetricKind::Gauge,
        help: "Messages that are kept for sessions after retention removed them from their stream.",
        labels: &[],
    },
    Metric {
        name: "headworks_mqtt_copies_bytes",
        kind: MetricKind::Gauge,
        help: "Bytes of messages that are kept for sessions after retention removed them from their stream. The limit is mqtt.queue_copies_bytes_max.",
        labels: &[],
    },
    Metric {
        name: "headworks_mqtt_stalls_total",
        kind: MetricKind::Counter,
        help: "Number of times a connection waited for room in a stream.",
        labels: &[],
    },
    Metric {
        name: "headworks_mqtt_withheld_total",
        kind: MetricKind::Counter,
        help: "Number of times a QoS 2 publish waited because clients had too many unreleased packet ids.",
        labels: &[],
    },
    Metric {
        name: "headworks_mqtt_deliveries_total",
        kind: MetricKind::Counter,
        help: "PUBLISH packets sent to subscribers.",
        labels: &[],
    },
    Metric {
        name: "headworks_mqtt_sessions",
        kind: MetricKind::Gauge,
        help: "Stored sessions, with or without a connected client.",
        labels: &[],
    },
];

/// A counter whose value can be read, for `$SYS`.
pub(super) struct Count {
    total: AtomicU64,
    metric: Counter,
}

impl Count {
    fn new(metric: Counter) -> Self {
        Self { total: AtomicU64::new(0), metric }
    }

    pub fn increment(&self, count: u64) {
        self.total.fetch_add(count, Ordering::Relaxed);
        self.metric.increment(count);
    }

    pub fn get(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }
}

/// Packets of one direction by type.
pub(super) struct Packets([Count; 16]);

/// Packets of one read or one write by type, before they are added to the counters.
pub(super) type Few = [u32; 16];

impl Packets {
    fn new(name: &'static str, types: [usize; 11]) -> Self {
        Self(std::array::from_fn(|number| {
            let is_used = types.contains(&number);
            Count::new(if is_used { counter!(name, "type" => TYPES[number]) } else { Counter::noop() })
        }))
    }

    pub fn add(&self, few: &Few) {
        for (count, few) in self.0.iter().zip(few).filter(|(_, few)| **few > 0) {
            count.increment((*few).into());
        }
    }

    /// Counts a packet by its first byte.
    pub fn add_one(&self, first: u8) {
        self.0[usize::from(first >> 4)].increment(1);
    }

    pub fn of(&self, first: u8) -> u64 {
        self.0[usize::from(first >> 4)].get()
    }

    pub fn total(&self) -> u64 {
        self.0.iter().map(Count::get).sum()
    }
}

/// A part of a total, which is subtracted when this is dropped.
pub(super) struct Part<'t> {
    total: &'t AtomicI64,
    own: i64,
}

impl<'t> Part<'t> {
    pub fn of(total: &'t AtomicI64) -> Self {
        Self { total, own: 0 }
    }

    pub fn set(&mut self, now: usize) {
        let now = now as i64;
        if now != self.own {
            self.total.fetch_add(now - self.own, Ordering::Relaxed);
            self.own = now;
        }
    }
}

impl Drop for Part<'_> {
    fn drop(&mut self) {
        self.set(0);
    }
}

pub(super) struct Counters {
    pub received: Packets,
    pub sent: Packets,
    /// Bytes received and sent.
    pub bytes: [Count; 2],
    pub sockets: Count,
    pub acks_waiting: AtomicI64,
    pub sessions_expired: Count,
    pub delivery_bytes: Count,
    pub connections: Gauge,
    pub connects: Counter,
    pub publishes: [Counter; 3],
    pub publish_bytes: Count,
    pub outside_namespace: Counter,
    pub acks: Counter,
    pub duplicates: Counter,
    pub stalls: Counter,
    pub withheld: Counter,
    pub deliveries: Counter,
    gauges: Gauges,
    pub dollar_topics: Counter,
    pub too_large: Counter,
    pub not_authorized: Counter,
    pub topic_levels: Counter,
    pub throttles: Counter,
    pub no_space: Count,
    pub queue_full: Count,
    pub queues_full: Count,
    pub queue_age: Count,
    pub packet_too_large: Count,
    pub expired: Counter,
    pub denied: Counter,
    pub retained_full: Counter,
    pub gap: Count,
    pub copied: Counter,
}

struct Gauges {
    acks_waiting: Gauge,
    sessions: Gauge,
    queued: Gauge,
    queued_bytes: Gauge,
    in_flight: Gauge,
    retained: Gauge,
    retained_bytes: Gauge,
    wills_bytes: Gauge,
    subscriptions: Gauge,
    copies: Gauge,
    copies_bytes: Gauge,
}

/// Values that are determined by examining every session.
#[derive(Debug, Default)]
pub(super) struct Measured {
    pub sessions: usize,
    pub queued: usize,
    pub queued_bytes: usize,
    pub in_flight: usize,
    pub retained: usize,
    pub retained_bytes: usize,
    pub wills_bytes: usize,
    pub subscriptions: usize,
    pub copies: usize,
    pub copies_bytes: u64,
}

impl Counters {
    pub fn new() -> Self {
        let dropped = |cause: &'static str| counter!("headworks_mqtt_dropped_total", "cause" => cause);
        let refused =
            |cause: &'static str| counter!("headworks_mqtt_refused_publishes_total", "cause" => cause);
        let publishes = |qos: &'static str| counter!("headworks_mqtt_publishes_total", "qos" => qos);
        for (name, label, values) in [
            ("headworks_mqtt_disconnects_total", "cause", DISCONNECTS),
            ("headworks_mqtt_refused_connects_total", "cause", REFUSED_CONNECTS),
            ("headworks_mqtt_refused_subscribes_total", "cause", REFUSED_SUBSCRIBES),
            ("headworks_mqtt_tls_reloads_total", "outcome", TLS_RELOADS),
        ] {
            values.iter().for_each(|value| counter!(name, label => *value).increment(0));
        }
        for packet in NOT_AUTHORIZED {
            counter!("headworks_mqtt_refusals_total", "packet" => *packet, "code" => "0x87").increment(0);
        }
        let bytes = |direction: &'static str| {
            Count::new(counter!("headworks_mqtt_bytes_total", "direction" => direction))
        };
        Self {
            received: Packets::new("headworks_mqtt_packets_received_total", BY_CLIENTS),
            sent: Packets::new("headworks_mqtt_packets_sent_total", BY_US),
            bytes: [bytes("received"), bytes("sent")],
            sockets: Count::new(counter!("headworks_mqtt_sockets_total")),
            acks_waiting: AtomicI64::new(0),
            sessions_expired: Count::new(counter!("headworks_mqtt_sessions_expired_total")),
            delivery_bytes: Count::new(counter!("headworks_mqtt_delivery_bytes_total")),
            connections: gauge!("headworks_mqtt_connections"),
            connects: counter!("headworks_mqtt_connects_total"),
            publishes: [publishes("0"), publishes("1"), publishes("2")],
            publish_bytes: Count::new(counter!("headworks_mqtt_publish_bytes_total")),
            outside_namespace: counter!("headworks_mqtt_publishes_outside_namespace_total"),
            acks: counter!("headworks_mqtt_acks_total"),
            duplicates: counter!("headworks_mqtt_duplicates_total"),
            stalls: counter!("headworks_mqtt_stalls_total"),
            withheld: counter!("headworks_mqtt_withheld_total"),
            deliveries: counter!("headworks_mqtt_deliveries_total"),
            gauges: Gauges {
                acks_waiting: gauge!("headworks_mqtt_acks_waiting"),
                sessions: gauge!("headworks_mqtt_sessions"),
                queued: gauge!("headworks_mqtt_queued_messages"),
                queued_bytes: gauge!("headworks_mqtt_queued_bytes"),
                in_flight: gauge!("headworks_mqtt_in_flight_messages"),
                retained: gauge!("headworks_mqtt_retained_messages"),
                retained_bytes: gauge!("headworks_mqtt_retained_bytes"),
                wills_bytes: gauge!("headworks_mqtt_wills_bytes"),
                subscriptions: gauge!("headworks_mqtt_subscriptions"),
                copies: gauge!("headworks_mqtt_copies"),
                copies_bytes: gauge!("headworks_mqtt_copies_bytes"),
            },
            dollar_topics: refused("dollar_topic"),
            too_large: refused("too_large"),
            not_authorized: refused("not_authorized"),
            topic_levels: refused("topic_levels"),
            throttles: counter!("headworks_mqtt_throttles_total"),
            no_space: Count::new(dropped("no_space")),
            queue_full: Count::new(dropped("queue_full")),
            queues_full: Count::new(dropped("queues_full")),
            queue_age: Count::new(dropped("queue_age")),
            packet_too_large: Count::new(dropped("packet_too_large")),
            expired: dropped("expired"),
            denied: dropped("not_authorized"),
            retained_full: dropped("retained_full"),
            gap: Count::new(dropped("gap")),
            copied: counter!("headworks_mqtt_copied_messages_total"),
        }
    }

    /// Returns the number of messages that a subscriber, or with QoS 0 the stream, did not receive.
    pub fn dropped(&self) -> u64 {
        let full = [&self.no_space, &self.queue_full, &self.queues_full];
        let causes = full.into_iter().chain([&self.queue_age, &self.packet_too_large, &self.gap]);
        causes.map(Count::get).sum()
    }

    /// Returns the counter of messages that exceeded this bound.
    pub fn dropped_at(&self, full: Full) -> &Count {
        match full {
            Full::Queue => &self.queue_full,
            Full::Queues => &self.queues_full,
        }
    }

    pub fn filled(&self, filled: &Filled) {
        if filled.sent > 0 {
            self.deliveries.increment(filled.sent);
        }
        if filled.expired > 0 {
            self.expired.increment(filled.expired);
        }
        if filled.denied > 0 {
            self.denied.increment(filled.denied);
        }
        if filled.too_large > 0 {
            self.packet_too_large.increment(filled.too_large);
        }
    }

    /// Counts whole packets that are sent to a client.
    pub fn sending(&self, version: Version, mut packets: &[u8]) {
        if packets.is_empty() {
            return;
        }
        let (mut few, mut payload_bytes) = (Few::default(), 0);
        while let Ok(Some(frame)) = wire::frame(packets, usize::MAX) {
            few[usize::from(frame.first >> 4)] += 1;
            if frame.first & 0xf0 == wire::PUBLISH {
                payload_bytes += wire::payload_len(version, &frame) as u64;
            } else if frame.body.len() > 2 || frame.first == wire::CONNACK || frame.first == wire::DISCONNECT
            {
                wire::refusals(version, &frame, |code| self.refusal(frame.first, code));
            }
            packets = &packets[frame.len..];
        }
        self.sent.add(&few);
        if payload_bytes > 0 {
            self.delivery_bytes.increment(payload_bytes);
        }
    }

    fn refusal(&self, first: u8, code: u8) {
        let packet = TYPES[usize::from(first >> 4)];
        let code = format!("{code:#04x}");
        counter!("headworks_mqtt_refusals_total", "packet" => packet, "code" => code).increment(1);
    }

    /// Sets the gauges that are not updated continuously.
    pub fn set_gauges(&self, measured: &Measured) {
        let gauges = &self.gauges;
        let acks_waiting = self.acks_waiting.load(Ordering::Relaxed).max(0) as f64;
        gauges.acks_waiting.set(acks_waiting);
        for (gauge, value) in [
            (&gauges.sessions, measured.sessions),
            (&gauges.queued, measured.queued),
            (&gauges.queued_bytes, measured.queued_bytes),
            (&gauges.in_flight, measured.in_flight),
            (&gauges.retained, measured.retained),
            (&gauges.retained_bytes, measured.retained_bytes),
            (&gauges.wills_bytes, measured.wills_bytes),
            (&gauges.subscriptions, measured.subscriptions),
            (&gauges.copies, measured.copies),
            (&gauges.copies_bytes, measured.copies_bytes as usize),
        ] {
            gauge.set(value as f64);
        }
    }

    pub fn disconnected(&self, cause: &'static str) {
        counter!("headworks_mqtt_disconnects_total", "cause" => cause).increment(1);
    }

    pub fn refused_connect(&self, cause: &'static str) {
        counter!("headworks_mqtt_refused_connects_total", "cause" => cause).increment(1);
    }

    pub fn refused_subscribe(&self, cause: &'static str) {
        counter!("headworks_mqtt_refused_subscribes_total", "cause" => cause).increment(1);
    }

    pub fn tls_reload(&self, outcome: &'static str) {
        counter!("headworks_mqtt_tls_reloads_total", "outcome" => outcome).increment(1);
    }
}

/// Sets the gauges of memory use, each with the name of its use.
pub fn set_memory(rooms: [(&'static str, &Room); 3]) {
    for (of, room) in rooms {
        gauge!("headworks_mqtt_memory_bytes", "of" => of).set(room.taken() as f64);
        gauge!("headworks_mqtt_memory_max_bytes", "of" => of).set(room.bytes_max() as f64);
    }
}

pub fn certificate_seconds_left(file: &Path, seconds: f64) {
    gauge!("headworks_mqtt_certificate_seconds_left", "file" => file.display().to_string()).set(seconds);
}

pub fn revocation_list_seconds_left(file: &Path, seconds: f64) {
    gauge!("headworks_mqtt_revocation_list_seconds_left", "file" => file.display().to_string()).set(seconds);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_help_names_each_cause_that_is_there_from_the_start_and_no_other() {
        for (name, values) in [
            ("headworks_mqtt_disconnects_total", DISCONNECTS),
            ("headworks_mqtt_refused_connects_total", REFUSED_CONNECTS),
            ("headworks_mqtt_refused_subscribes_total", REFUSED_SUBSCRIBES),
            ("headworks_mqtt_tls_reloads_total", TLS_RELOADS),
        ] {
            let help = METRICS.iter().find(|metric| metric.name == name).unwrap().help;
            let (_, list) = help.split_once(": ").unwrap();
            // What is in brackets explains.
            let list: String =
                list.split('(').map(|part| part.split_once(')').map_or(part, |(_, rest)| rest)).collect();
            let named: Vec<_> = list.trim_end_matches('.').split(',').map(str::trim).collect();
            assert_eq!(named, values, "{name}");
        }
    }

    #[test]
    fn every_packet_that_is_counted_is_shown() {
        let recorder = crate::admin::metrics::builder().build_recorder();
        let rendered = metrics::with_local_recorder(&recorder, || {
            let counters = Counters::new();
            (0..16).for_each(|kind| counters.received.add_one(kind << 4));
            (0..16).for_each(|kind| counters.sent.add_one(kind << 4));
            recorder.handle().render()
        });
        for kind in TYPES.iter().filter(|kind| !kind.is_empty()) {
            let is_shown = |name: &str| rendered.contains(&format!("{name}{{type=\"{kind}\"}} 1"));
            let shown = [
                is_shown("headworks_mqtt_packets_received_total"),
                is_shown("headworks_mqtt_packets_sent_total"),
            ];
            let one_way = match *kind {
                "connect" | "subscribe" | "unsubscribe" | "pingreq" => [true, false],
                "connack" | "suback" | "unsuback" | "pingresp" => [false, true],
                _ => [true, true],
            };
            assert_eq!(shown, one_way, "{kind}");
        }
    }
}
