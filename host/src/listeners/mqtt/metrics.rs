//! Counters of the MQTT listener. Handles are made once; the hot path counts
//! once per read, not per message.

use metrics::{Counter, Gauge, counter, gauge};

use crate::telemetry::{Metric, MetricKind};

pub const METRICS: &[Metric] = &[
    Metric {
        name: "headworks_mqtt_connections",
        kind: MetricKind::Gauge,
        help: "MQTT connections now.",
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
        help: "MQTT connections that ended, by cause: client, lost, taken_over, keep_alive, malformed, refused (by the access rules), slow, kicked (by an operator), stopped, shutdown.",
        labels: &["cause"],
    },
    Metric {
        name: "headworks_mqtt_refused_connects_total",
        kind: MetricKind::Counter,
        help: "Connections refused before or by CONNACK, by cause: bad_credentials, bad_auth_method, not_authorized, client_id, access_unavailable, will_not_authorized, will_topic_levels, connections_per_user, connect_rate, connections_max, handshakes_max, sessions_max, proxy, tls, websocket, timeout, lost, malformed, invalid, stopped.",
        labels: &["cause"],
    },
    Metric {
        name: "headworks_mqtt_tls_reloads_total",
        kind: MetricKind::Counter,
        help: "Changed certificate files, by outcome: taken, refused (the old ones stay in use).",
        labels: &["outcome"],
    },
    Metric {
        name: "headworks_mqtt_publishes_total",
        kind: MetricKind::Counter,
        help: "Messages taken into a stream, by QoS.",
        labels: &["qos"],
    },
    Metric {
        name: "headworks_mqtt_publish_bytes_total",
        kind: MetricKind::Counter,
        help: "Payload bytes of messages taken into a stream.",
        labels: &[],
    },
    Metric {
        name: "headworks_mqtt_acks_total",
        kind: MetricKind::Counter,
        help: "PUBACK, PUBREC and PUBCOMP sent after the stream was durable.",
        labels: &[],
    },
    Metric {
        name: "headworks_mqtt_duplicates_total",
        kind: MetricKind::Counter,
        help: "QoS 2 publishes that came again and were not appended again.",
        labels: &[],
    },
    Metric {
        name: "headworks_mqtt_refused_publishes_total",
        kind: MetricKind::Counter,
        help: "Publishes refused, by cause: dollar_topic, too_large, not_authorized, topic_levels.",
        labels: &["cause"],
    },
    Metric {
        name: "headworks_mqtt_refused_subscribes_total",
        kind: MetricKind::Counter,
        help: "Topic filters refused by the access rules.",
        labels: &[],
    },
    Metric {
        name: "headworks_mqtt_throttles_total",
        kind: MetricKind::Counter,
        help: "Times a connection was not read because of a publish rate of mqtt.limits.",
        labels: &[],
    },
    Metric {
        name: "headworks_mqtt_dropped_total",
        kind: MetricKind::Counter,
        help: "Messages dropped, by cause: no_space (QoS 0 on a full disk), queue_full, queue_age, packet_too_large, expired, retained_full, gap (retention or damage took them first).",
        labels: &["cause"],
    },
    Metric {
        name: "headworks_mqtt_stalls_total",
        kind: MetricKind::Counter,
        help: "Times a connection waited for room in a stream.",
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
        help: "Sessions kept, connected or not.",
        labels: &[],
    },
];

pub(super) struct Counters {
    pub connections: Gauge,
    pub connects: Counter,
    pub publishes: [Counter; 3],
    pub publish_bytes: Counter,
    pub acks: Counter,
    pub duplicates: Counter,
    pub stalls: Counter,
    pub deliveries: Counter,
    pub sessions: Gauge,
    pub dollar_topics: Counter,
    pub too_large: Counter,
    pub not_authorized: Counter,
    pub topic_levels: Counter,
    pub refused_subscribe: Counter,
    pub throttles: Counter,
    pub no_space: Counter,
    pub queue_full: Counter,
    pub queue_age: Counter,
    pub packet_too_large: Counter,
    pub expired: Counter,
    pub retained_full: Counter,
    pub gap: Counter,
}

impl Counters {
    pub fn new() -> Self {
        let dropped = |cause: &'static str| counter!("headworks_mqtt_dropped_total", "cause" => cause);
        let refused =
            |cause: &'static str| counter!("headworks_mqtt_refused_publishes_total", "cause" => cause);
        let publishes = |qos: &'static str| counter!("headworks_mqtt_publishes_total", "qos" => qos);
        Self {
            connections: gauge!("headworks_mqtt_connections"),
            connects: counter!("headworks_mqtt_connects_total"),
            publishes: [publishes("0"), publishes("1"), publishes("2")],
            publish_bytes: counter!("headworks_mqtt_publish_bytes_total"),
            acks: counter!("headworks_mqtt_acks_total"),
            duplicates: counter!("headworks_mqtt_duplicates_total"),
            stalls: counter!("headworks_mqtt_stalls_total"),
            deliveries: counter!("headworks_mqtt_deliveries_total"),
            sessions: gauge!("headworks_mqtt_sessions"),
            dollar_topics: refused("dollar_topic"),
            too_large: refused("too_large"),
            not_authorized: refused("not_authorized"),
            topic_levels: refused("topic_levels"),
            refused_subscribe: counter!("headworks_mqtt_refused_subscribes_total"),
            throttles: counter!("headworks_mqtt_throttles_total"),
            no_space: dropped("no_space"),
            queue_full: dropped("queue_full"),
            queue_age: dropped("queue_age"),
            packet_too_large: dropped("packet_too_large"),
            expired: dropped("expired"),
            retained_full: dropped("retained_full"),
            gap: dropped("gap"),
        }
    }

    pub fn disconnected(&self, cause: &'static str) {
        counter!("headworks_mqtt_disconnects_total", "cause" => cause).increment(1);
    }

    pub fn refused_connect(&self, cause: &'static str) {
        counter!("headworks_mqtt_refused_connects_total", "cause" => cause).increment(1);
    }

    pub fn tls_reload(&self, outcome: &'static str) {
        counter!("headworks_mqtt_tls_reloads_total", "outcome" => outcome).increment(1);
    }
}
