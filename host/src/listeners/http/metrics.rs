//! Counters of the HTTP listener.

use hyper::Version;
use metrics::{Counter, Gauge, counter, gauge};

use crate::telemetry::{Metric, MetricKind};

/// Causes and outcomes whose counters are there from the start; the help texts name them.
const REFUSED_CONNECTS: &[&str] = &[
    "connections_max",
    "handshakes_max",
    "proxy",
    "tls_no_certificate",
    "tls_unknown_ca",
    "tls_expired",
    "tls_revoked",
    "tls",
    "timeout",
    "lost",
];
const REFUSED_REQUESTS: &[&str] = &[
    "busy",
    "certificate",
    "bad_credentials",
    "guessing",
    "not_authorized",
    "client_id",
    "connections_per_user",
    "connect_rate",
    "access_unavailable",
    "rate",
    "path",
    "origin",
    "method",
    "length",
    "too_large",
    "encoding",
    "content_type",
    "body",
    "slow",
    "header",
    "batch",
    "idempotency_key",
    "not_durable",
    "stopping",
];
const REJECTED_MESSAGES: &[&str] = &[
    "topic",
    "dollar_topic",
    "topic_levels",
    "not_authorized",
    "too_large",
    "payload",
    "property",
    "no_room",
    "access_unavailable",
];
const ENDED_CONNECTIONS: &[&str] = &["resets", "unread"];
const TLS_RELOADS: &[&str] = &["taken", "refused"];
const VERSIONS: &[&str] = &["1.0", "1.1", "2"];
const STATUSES: &[&str] = &[
    "200", "204", "207", "400", "401", "403", "404", "405", "408", "411", "413", "415", "422", "429", "431",
    "503",
];

pub const METRICS: &[Metric] = &[
    Metric {
        name: "headworks_http_connections",
        kind: MetricKind::Gauge,
        help: "Current HTTP connections. The limit is http.connections_max.",
        labels: &[],
    },
    Metric {
        name: "headworks_http_sockets_total",
        kind: MetricKind::Counter,
        help: "Connections accepted from the network for HTTP, including those that were refused later.",
        labels: &[],
    },
    Metric {
        name: "headworks_http_refused_connects_total",
        kind: MetricKind::Counter,
        help: "HTTP connections refused before a request, by cause: connections_max, handshakes_max, proxy, tls_no_certificate, tls_unknown_ca, tls_expired, tls_revoked, tls (any other failed handshake), timeout, lost.",
        labels: &["cause"],
    },
    Metric {
        name: "headworks_http_ended_connections_total",
        kind: MetricKind::Counter,
        help: "HTTP connections ended because of what their clients did, by cause: resets (the client reset too many requests before they were answered), unread (the client did not take an answer within http.idle_timeout).",
        labels: &["cause"],
    },
    Metric {
        name: "headworks_http_requests_total",
        kind: MetricKind::Counter,
        help: "HTTP requests answered, by version of HTTP (1.0, 1.1, 2) and status code: 200, 204, 207, 400, 401, 403, 404, 405, 408, 411, 413, 415, 422, 429, 431, 503.",
        labels: &["version", "status"],
    },
    Metric {
        name: "headworks_http_refused_requests_total",
        kind: MetricKind::Counter,
        help: "HTTP requests refused as a whole, by cause: busy (of all clients too many requests at a time over one connection, or too much unread of their bodies), certificate (that of the connection was revoked or has expired since it began), bad_credentials, guessing (too many wrong passwords of the user from the address), not_authorized, client_id, connections_per_user, connect_rate, access_unavailable, rate (mqtt.limits), path, origin (a web page posts), method, length, too_large, encoding, content_type, body, slow, header, batch, idempotency_key, not_durable (the disk did not answer in time), stopping.",
        labels: &["cause"],
    },
    Metric {
        name: "headworks_http_messages_total",
        kind: MetricKind::Counter,
        help: "Messages that were received over HTTP and stored in a stream.",
        labels: &[],
    },
    Metric {
        name: "headworks_http_message_bytes_total",
        kind: MetricKind::Counter,
        help: "Payload bytes of messages that were received over HTTP and stored in a stream.",
        labels: &[],
    },
    Metric {
        name: "headworks_http_messages_outside_namespace_total",
        kind: MetricKind::Counter,
        help: "Messages that were received over HTTP and stored in a stream although their topic does not match `topics` and names no device.",
        labels: &[],
    },
    Metric {
        name: "headworks_http_rejected_messages_total",
        kind: MetricKind::Counter,
        help: "Messages of HTTP requests that were not stored, by cause: topic, dollar_topic, topic_levels, not_authorized, too_large, payload, property, no_room, access_unavailable.",
        labels: &["cause"],
    },
    Metric {
        name: "headworks_http_repeated_requests_total",
        kind: MetricKind::Counter,
        help: "HTTP requests with a known Idempotency-Key, which were answered as the first request was.",
        labels: &[],
    },
    Metric {
        name: "headworks_http_idempotency_keys",
        kind: MetricKind::Gauge,
        help: "Stored records of Idempotency-Keys, one for each stream to which a request brought messages. The limit is http.idempotency_keys_max.",
        labels: &[],
    },
    Metric {
        name: "headworks_http_idempotency_keys_forgotten_total",
        kind: MetricKind::Counter,
        help: "Records of Idempotency-Keys that were removed before http.idempotency_window had passed, because there were too many.",
        labels: &[],
    },
    Metric {
        name: "headworks_http_tls_reloads_total",
        kind: MetricKind::Counter,
        help: "Reloads of changed certificate files of HTTP listeners, by outcome: taken, refused (the previous files stay in use).",
        labels: &["outcome"],
    },
    Metric {
        name: "headworks_http_certificate_seconds_left",
        kind: MetricKind::Gauge,
        help: "Seconds until the first certificate in a file of an HTTP listener (tls.cert, tls.client_ca) expires, negative afterwards. For tls.cert only the server's own certificate counts.",
        labels: &["file"],
    },
    Metric {
        name: "headworks_http_revocation_list_seconds_left",
        kind: MetricKind::Gauge,
        help: "Seconds until the first revocation list in a file of an HTTP listener (tls.crl) must be replaced, negative afterwards, infinite if no list gives a time.",
        labels: &["file"],
    },
];

pub struct Counters {
    pub connections: Gauge,
    pub sockets: Counter,
    pub messages: Counter,
    pub message_bytes: Counter,
    pub outside_namespace: Counter,
    pub repeated: Counter,
}

impl Counters {
    pub fn new() -> Self {
        for (name, label, values) in [
            ("headworks_http_refused_connects_total", "cause", REFUSED_CONNECTS),
            ("headworks_http_refused_requests_total", "cause", REFUSED_REQUESTS),
            ("headworks_http_rejected_messages_total", "cause", REJECTED_MESSAGES),
            ("headworks_http_tls_reloads_total", "outcome", TLS_RELOADS),
            ("headworks_http_ended_connections_total", "cause", ENDED_CONNECTIONS),
        ] {
            values.iter().for_each(|value| counter!(name, label => *value).increment(0));
        }
        for version in VERSIONS {
            for status in STATUSES {
                requests(version, (*status).to_owned()).increment(0);
            }
        }
        Self {
            connections: gauge!("headworks_http_connections"),
            sockets: counter!("headworks_http_sockets_total"),
            messages: counter!("headworks_http_messages_total"),
            message_bytes: counter!("headworks_http_message_bytes_total"),
            outside_namespace: counter!("headworks_http_messages_outside_namespace_total"),
            repeated: counter!("headworks_http_repeated_requests_total"),
        }
    }

    pub fn refused_connect(&self, cause: &'static str) {
        counter!("headworks_http_refused_connects_total", "cause" => cause).increment(1);
    }

    pub fn refused_request(&self, cause: &'static str) {
        counter!("headworks_http_refused_requests_total", "cause" => cause).increment(1);
    }

    pub fn rejected_message(&self, cause: &'static str) {
        counter!("headworks_http_rejected_messages_total", "cause" => cause).increment(1);
    }

    pub fn ended_connection(&self, cause: &'static str) {
        counter!("headworks_http_ended_connections_total", "cause" => cause).increment(1);
    }

    pub fn answered(&self, version: Version, status: u16) {
        let version = match version {
            Version::HTTP_2 => "2",
            Version::HTTP_10 => "1.0",
            _ => "1.1",
        };
        requests(version, status.to_string()).increment(1);
    }

    pub fn tls_reload(&self, outcome: &'static str) {
        counter!("headworks_http_tls_reloads_total", "outcome" => outcome).increment(1);
    }
}

fn requests(version: &'static str, status: String) -> Counter {
    counter!("headworks_http_requests_total", "version" => version, "status" => status)
}

/// The gauge of idempotency records and the counter of those that were removed early.
pub fn idempotency() -> (Gauge, Counter) {
    (gauge!("headworks_http_idempotency_keys"), counter!("headworks_http_idempotency_keys_forgotten_total"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_help_names_each_version_of_http() {
        let requests = METRICS.iter().find(|metric| metric.name == "headworks_http_requests_total").unwrap();
        assert!(requests.help.contains(&format!("version of HTTP ({})", VERSIONS.join(", "))));
    }

    #[test]
    fn the_help_names_each_cause_that_is_there_from_the_start_and_no_other() {
        for (name, values) in [
            ("headworks_http_refused_connects_total", REFUSED_CONNECTS),
            ("headworks_http_refused_requests_total", REFUSED_REQUESTS),
            ("headworks_http_rejected_messages_total", REJECTED_MESSAGES),
            ("headworks_http_tls_reloads_total", TLS_RELOADS),
            ("headworks_http_ended_connections_total", ENDED_CONNECTIONS),
            ("headworks_http_requests_total", STATUSES),
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
}
