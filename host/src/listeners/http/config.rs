//! The `http:` section of the configuration: addresses and bounds.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::batch::SPAN_BYTES_MAX;
use crate::listeners::transport::config::Endpoint;
use crate::problems::{KeyPath, Problems};
use crate::units::{ByteSize, Period};

/// Upper bound of `batch_messages_max`.
const BATCH_MESSAGES_MOST: u32 = 10_000;

/// Most requests of one HTTP/2 connection at a time.
const HTTP2_STREAMS_MOST: u64 = 1_000;

/// HTTP for devices and gateways that post their messages: `POST /messages/TOPIC` for one,
/// `POST /batch` for many. Who may do so is said in `mqtt.access` and `mqtt.limits`. A key that a
/// reload changes applies at once, unless its text says otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Addresses to listen on. If unset, there is no HTTP listener. A reload opens new addresses and closes
    /// those that are gone, whose connections end after their requests. Other settings of an address are for
    /// new connections.
    pub listeners: Vec<Endpoint>,
    /// Largest payload of one message. A larger one is answered with 413. A reload changes it for new
    /// connections.
    pub max_message_size: ByteSize,
    /// Largest body of a batch. A larger one is answered with 413. A reload changes it for new
    /// connections.
    pub max_batch_size: ByteSize,
    /// Most messages in one batch. A larger batch is answered with 413. A reload changes it for new
    /// connections.
    pub batch_messages_max: u32,
    /// Bytes of the bodies of all clients together that are not answered. Past it a body of more than 4
    /// KiB waits for room before it is read on, and a client that has room and sends less than 10 KiB in
    /// 10 s while others wait is answered with 408. Bodies of HTTP/2 requests that wait may take as much
    /// again, at most 64 KiB each; past it such a request is answered with 429. A change needs a restart.
    pub partial_bodies_bytes_max: ByteSize,
    /// Connections at a time, each of which is an open file. Beyond this, the address with the most
    /// connections that wait for a request loses its oldest to an address with fewer; otherwise the new
    /// connection is closed. An IPv6 network of 64 bits counts as one address, and so do all Unix
    /// sockets, and all clients behind one load balancer.
    pub connections_max: u32,
    /// Requests of one HTTP/2 connection at a time. The client is told this number, and a request past it
    /// is refused. All connections together may have 4,096 requests at a time beside the first of each;
    /// further ones are answered with 429. A reload changes it for new connections.
    pub http2_streams_max: u32,
    /// Longest time from the begin of a connection to the end of its first request's headers. PROXY and
    /// TLS together may take as long before that. The body of any request may take as long, and a second
    /// more for each KiB. A reload changes it for new connections.
    pub request_timeout: Period,
    /// How long a connection without a request is kept, measured to the end of the next request's
    /// headers. A reload changes it for new connections.
    pub idle_timeout: Period,
    /// How long requests in progress may still take at shutdown.
    pub drain_timeout: Period,
    /// How long a request with an `Idempotency-Key` is remembered. A request that repeats the key in
    /// this time gets the same answer, and its messages are not stored again.
    pub idempotency_window: Period,
    /// Number of `Idempotency-Key`s that are remembered. Beyond this, the client with the most keys
    /// loses its oldest. The keys are part of the state of their stream, and every segment of the stream
    /// begins with a copy of its state.
    pub idempotency_keys_max: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listeners: Vec::new(),
            max_message_size: ByteSize::mib(1),
            max_batch_size: ByteSize::mib(4),
            batch_messages_max: 1_000,
            partial_bodies_bytes_max: ByteSize::mib(64),
            connections_max: 4_096,
            http2_streams_max: 64,
            request_timeout: Period(Duration::from_secs(30)),
            idle_timeout: Period(Duration::from_secs(60)),
            drain_timeout: Period(Duration::from_secs(5)),
            idempotency_window: Period(Duration::from_secs(24 * 3_600)),
            idempotency_keys_max: 50_000,
        }
    }
}

impl Config {
    /// Adds every problem of the section. Reads no file. `asks_for_credentials` says whether
    /// `mqtt.access` refuses unknown clients.
    pub fn validate(&self, path: &KeyPath, asks_for_credentials: bool, problems: &mut Problems) {
        for (i, endpoint) in self.listeners.iter().enumerate() {
            let at = path.key("listeners").index(i);
            endpoint.validate(&at, asks_for_credentials, problems);
        }
        let mut size = |key: &str, value: u64, least: u64, most: u64| {
            if value < least || value > most {
                problems.add(path.key(key), format!("must be {least} to {most}, is {value}"));
            }
        };
        let most = SPAN_BYTES_MAX as u64;
        size("max_message_size", self.max_message_size.0, 1, most);
        size("max_batch_size", self.max_batch_size.0, 1, most);
        size("batch_messages_max", self.batch_messages_max.into(), 1, BATCH_MESSAGES_MOST.into());
        let partial = self.partial_bodies_bytes_max.0;
        size("partial_bodies_bytes_max", partial, self.body_bytes_max(), 1 << 40);
        size("connections_max", self.connections_max.into(), 1, 1_000_000);
        size("http2_streams_max", self.http2_streams_max.into(), 1, HTTP2_STREAMS_MOST);
        size("idempotency_keys_max", self.idempotency_keys_max.into(), 1, 1_000_000);
        for (key, period) in [
            ("request_timeout", &self.request_timeout),
            ("idle_timeout", &self.idle_timeout),
            ("idempotency_window", &self.idempotency_window),
        ] {
            if period.0.is_zero() {
                problems.add(path.key(key), "must be longer than 0s");
            }
        }
    }

    /// Reads the files that the section names and adds what is wrong with them.
    pub fn look(&self, path: &KeyPath, problems: &mut Problems) {
        for (i, endpoint) in self.listeners.iter().enumerate() {
            if let Some(tls) = &endpoint.tls {
                tls.look(&path.key("listeners").index(i).key("tls"), problems);
            }
        }
    }

    /// Returns warnings about settings that are valid but probably not intended, each beginning with its
    /// key. Reads the files that the section names.
    pub fn warnings(&self, takes_secrets: bool) -> Vec<String> {
        let mut warnings = Vec::new();
        for (i, endpoint) in self.listeners.iter().enumerate() {
            let at = format!("http.listeners[{i}]");
            warnings.extend(endpoint.tls.iter().flat_map(|tls| tls.warnings(&format!("{at}.tls"))));
            if endpoint.is_clear_text() && takes_secrets {
                warnings.push(format!(
                    "{at}: passwords and tokens cross the network in clear text: set tls, or bind to 127.0.0.1"
                ));
            }
        }
        warnings
    }

    /// Returns the size of the largest body of any request.
    pub fn body_bytes_max(&self) -> u64 {
        self.max_message_size.0.max(self.max_batch_size.0)
    }

    /// Returns the smallest commit buffer with which a stream can take all messages of the largest
    /// request.
    pub fn commit_bytes_least(&self) -> u64 {
        if self.listeners.is_empty() { 0 } else { self.body_bytes_max().saturating_add(1 << 20) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(config: &Config) -> Vec<String> {
        let mut problems = Problems::default();
        config.validate(&KeyPath::root().key("http"), false, &mut problems);
        problems.into_vec().into_iter().map(|problem| problem.path.as_str().to_owned()).collect()
    }

    #[test]
    fn an_open_address_without_credentials_is_refused_until_somebody_says_so() {
        let of = |json: &str| problems(&serde_json::from_str(json).unwrap());
        assert_eq!(of("{}"), [""; 0]);
        assert_eq!(of(r#"{ "listeners": [{ "bind": "127.0.0.1:8088" }] }"#), [""; 0]);
        assert_eq!(of(r#"{ "listeners": [{ "bind": "0.0.0.0:8088" }] }"#), ["http.listeners[0].bind"]);
        assert_eq!(of(r#"{ "listeners": [{ "bind": "0.0.0.0:8088", "allow_anonymous": true }] }"#), [""; 0]);
    }

    #[test]
    fn bounds_that_cannot_hold_are_named() {
        let config = serde_json::from_str(
            r#"{ "batch_messages_max": 0, "partial_bodies_bytes_max": "1MiB", "idle_timeout": "0s" }"#,
        );
        let wrong = ["http.batch_messages_max", "http.partial_bodies_bytes_max", "http.idle_timeout"];
        assert_eq!(problems(&config.unwrap()), wrong);
    }
}
