//! Configuration of authentication and access rules (`mqtt.access`) and of rate limits (`mqtt.limits`).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rules::{self, Action, Effect};
use crate::plugin;
use crate::problems::{KeyPath, Problems};
use crate::units::{ByteSize, Period};

/// Most rules of the config, of a token, or of an answer.
pub const RULES_MAX: usize = 1_000;

/// Who may connect, publish and subscribe. If this section is set, anything that no rule allows is
/// refused.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Authenticators, asked in this order until one recognises the client. A client without user name,
    /// password and certificate is anonymous; it is served if its listener has `allow_anonymous`.
    pub authenticate: Vec<Authenticator>,
    /// The first matching rule decides. If no rule matches, the action is refused.
    pub rules: Vec<Rule>,
    /// Patterns of the client ids that a client may use. If set, an id that matches no pattern is
    /// refused. `%u` is the user name, `{field}` the client's value of that field, `*` any characters.
    /// If unset, a user can take over the session of another user's client id. A client id that the
    /// broker assigned is always allowed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub client_ids: Vec<String>,
    /// Values for `{field}` in the topics of rules, by user name: `alice: { site: factory-01 }`.
    pub users: BTreeMap<String, BTreeMap<String, String>>,
    /// What happens when an MQTT 3.1.1 client publishes to a topic that is denied, which MQTT 3.1.1
    /// cannot report to the client: `close` ends the connection, `drop` acknowledges the message and
    /// drops it, which is counted.
    pub denied_publish: DeniedPublish,
    /// What happens to a subscription that matches both allowed and denied topics, such as `#` where
    /// `plant/secret` is denied: `filter` grants it, and does not deliver messages of denied topics;
    /// `refuse` refuses it.
    pub overlap: Overlap,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Overlap {
    /// The subscription is granted. Messages of denied topics are not delivered, retained messages
    /// included.
    #[default]
    Filter,
    /// The subscription is refused.
    Refuse,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DeniedPublish {
    /// The connection is closed.
    #[default]
    Close,
    /// The message is acknowledged, dropped and counted.
    Drop,
}

/// One way to identify a client.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Authenticator {
    /// A file of users and argon2id hashes, made by `headworks passwd`.
    Passwords(Passwords),
    /// A JSON Web Token, sent as the password.
    Jwt(Jwt),
    /// The client certificate that was verified in the TLS handshake.
    Certificate(Certificate),
    /// An external service that is asked over HTTP.
    Http(Http),
    /// A WebAssembly plugin that identifies clients.
    Plugin(Plugin),
}

/// A file with one line `user:hash` for each user. It is read again when it changes, unless the changed
/// file has no users. A user created with `--scram` can also log in with SCRAM-SHA-256 (MQTT 5).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Passwords {
    /// File of users and password hashes, written by `headworks passwd`.
    pub file: PathBuf,
}

/// Tokens signed with HS256/384/512, RS256/384/512, ES256 or ES384. One of `secret_file`,
/// `public_key_file` and `jwks_file` holds the keys, and is read again when it changes. A token must
/// have `exp`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Jwt {
    /// Secret for HS256, HS384 and HS512, at least 32 bytes. A newline at its end is ignored. A file
    /// that holds a key, a certificate or a key set is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_file: Option<PathBuf>,
    /// RSA or EC public key in PEM format (`BEGIN PUBLIC KEY`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub public_key_file: Option<PathBuf>,
    /// File with a JSON Web Key Set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jwks_file: Option<PathBuf>,
    /// The value that the claim `iss` must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub issuer: Option<String>,
    /// The value that the claim `aud` must have or contain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audience: Option<String>,
    /// Tolerated difference between the clocks of the issuer and of this host.
    #[serde(default = "default_leeway")]
    pub leeway: Period,
    /// The claim that holds the user name.
    #[serde(default = "default_user_claim")]
    pub user_claim: String,
    /// The claim that holds rules, in the format of `rules`. They are tried before the rules of the
    /// config.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rules_claim: Option<String>,
}

/// The name in the certificate that the listener's `tls.identity` selects becomes the user name. Needs
/// `tls.client_ca` on the listener.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Certificate {}

/// The service receives `POST {"action": "connect", "client_id", "username", "password", "ip"}` and
/// answers 200 with `{"allow": bool, "superuser": bool, "rules": [...], "fields": {...}}`. An answer
/// without `allow` passes the client to the next authenticator. Any other answer, or no answer within
/// `timeout`, refuses the client as Server Unavailable. The service is asked about clients that send
/// neither user name nor password only if the listener has `allow_anonymous`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Http {
    /// URL of the service: `http://host:port/path`, or with `https`.
    pub url: String,
    /// PEM file of the CAs that are trusted for https, read again when it changes. If unset, the
    /// system's CAs are trusted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// Time from the start of the request to the end of the answer.
    #[serde(default = "default_timeout")]
    pub timeout: Period,
    /// How long an answer is cached. With `0s` the service is asked about each connection.
    #[serde(default = "default_cache_ttl")]
    pub cache_ttl: Period,
    /// Number of cached answers.
    #[serde(default = "default_cache_entries_max")]
    pub cache_entries_max: u32,
    /// Number of concurrent requests. Further requests wait, served in turn by the addresses that
    /// clients connect from.
    #[serde(default = "default_requests_max")]
    pub requests_max: u32,
}

/// A component that exports `access` (`wit/plugin.wit`). It is read again when its file changes; if the
/// new version does not start, the old one stays in use. It can accept a client with a name and rules,
/// refuse it, or leave it to the next authenticator. A client is refused as Server Unavailable if the
/// call faults or exceeds its limits. Rules with the effect `ask` have the plugin decide about topics
/// while the client is connected.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Plugin {
    /// The `.wasm` file. It must not be in the plugins folder, whose files are steps.
    pub file: PathBuf,
    /// Configuration that is passed to the plugin.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub config: serde_json::Value,
    /// Limits of one call.
    #[serde(default)]
    pub limits: plugin::Limits,
    /// Number of instances, and of concurrent calls. Further calls wait: first those of connected
    /// clients are served, then the others in turn by the addresses that clients connect from.
    #[serde(default = "default_instances_max")]
    pub instances_max: u32,
}

/// One rule. It matches a client if all of `user`, `client` and `anonymous` that are set match. `*` in a
/// pattern stands for any characters.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Whether a client that the rule matches may perform the action.
    pub effect: Effect,
    /// Pattern of user names, such as `line-*`. It never matches a client without a user name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Pattern of client ids.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<String>,
    /// `true` matches only clients without a user name, `false` only clients with one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub anonymous: Option<bool>,
    /// The action that the rule decides: publishing to its topics, subscribing to them, or both.
    #[serde(default)]
    pub action: Action,
    /// Topic filters. `%c` is the client id, `%u` the user name, and `{field}` the client's value of
    /// that field, from `users`, the token's claims or the HTTP answer. If the client has no such value,
    /// or the value is not a single level, the filter of an allow rule matches nothing, and in a deny
    /// rule that level matches any value. An allow rule never matches when a substituted value puts `$`
    /// at the start of the topic.
    pub topics: Vec<String>,
}

/// Rate and size limits, which apply with and without `access`. A limit that is not set does not apply.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Publishes per second of one client, with bursts of one second's worth. Beyond the limit the client
    /// is read more slowly; nothing is refused. A reload changes it for new connections.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_messages_per_s: Option<u32>,
    /// Bytes of publishes per second of one client. Beyond the limit the client is read more slowly;
    /// nothing is refused. A reload changes it for new connections.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_bytes_per_s: Option<ByteSize>,
    /// Publishes per second of all clients together. Beyond the limit clients are read more slowly;
    /// nothing is refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub messages_per_s: Option<u32>,
    /// Bytes of publishes per second of all clients together. Beyond the limit clients are read more
    /// slowly; nothing is refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_s: Option<ByteSize>,
    /// Levels of a topic that a client publishes to. A publish to a topic with more levels is refused
    /// (0x90).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topic_levels_max: Option<u32>,
    /// Connections of one user name at a time. A further connection is refused (0x97), unless its client
    /// takes over its own session. A reload changes it for new connections.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connections_per_user_max: Option<u32>,
    /// CONNECT packets per second of all clients, with bursts of one second's worth. A further CONNECT
    /// is refused (0x9F), unless its address (an IPv6 network of 64 bits) has had less than its share in
    /// this second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connects_per_s: Option<u32>,
}

fn default_leeway() -> Period {
    Period(Duration::from_secs(30))
}

fn default_user_claim() -> String {
    "sub".to_owned()
}

fn default_timeout() -> Period {
    Period(Duration::from_secs(3))
}

fn default_cache_ttl() -> Period {
    Period(Duration::from_secs(60))
}

fn default_cache_entries_max() -> u32 {
    10_000
}

fn default_instances_max() -> u32 {
    2
}

fn default_requests_max() -> u32 {
    32
}

impl Config {
    /// Adds every problem of the section. Reads no file.
    pub fn validate(&self, path: &KeyPath, problems: &mut Problems) {
        for (i, authenticator) in self.authenticate.iter().enumerate() {
            authenticator.validate(&path.key("authenticate").index(i), problems);
        }
        if self.rules.len() > RULES_MAX {
            problems.add(path.key("rules"), format!("must be at most {RULES_MAX}, are {}", self.rules.len()));
        }
        for (i, pattern) in self.client_ids.iter().enumerate() {
            if let Err(reason) = rules::check_client_id(pattern) {
                problems.add(path.key("client_ids").index(i), reason);
            }
        }
        for (i, rule) in self.rules.iter().enumerate() {
            for (t, topic) in rule.topics.iter().enumerate() {
                if let Err(reason) = rules::check_topic(topic) {
                    problems.add(path.key("rules").index(i).key("topics").index(t), reason);
                }
            }
            if rule.topics.is_empty() {
                problems.add(path.key("rules").index(i).key("topics"), "must name at least one topic filter");
            }
        }
    }
}

impl Authenticator {
    fn validate(&self, path: &KeyPath, problems: &mut Problems) {
        match self {
            Self::Passwords(_) | Self::Certificate(_) => {}
            Self::Jwt(jwt) => {
                let keys = [&jwt.secret_file, &jwt.public_key_file, &jwt.jwks_file];
                if keys.into_iter().flatten().count() != 1 {
                    problems.add(
                        path.clone(),
                        "must have exactly one of secret_file, public_key_file and jwks_file",
                    );
                }
            }
            Self::Plugin(plugin) => {
                plugin.limits.validate(&path.key("limits"), problems);
                if !(1..=64).contains(&plugin.instances_max) {
                    let message = format!("must be 1 to 64, is {}", plugin.instances_max);
                    problems.add(path.key("instances_max"), message);
                }
            }
            Self::Http(http) => {
                match crate::http_client::Address::parse(&http.url) {
                    Err(reason) => problems.add(path.key("url"), reason),
                    Ok(address) if address.tls.is_none() && http.ca.is_some() => {
                        problems.add(path.key("ca"), "is for an https url");
                    }
                    Ok(_) => {}
                }
                for (key, value) in
                    [("cache_entries_max", http.cache_entries_max), ("requests_max", http.requests_max)]
                {
                    if !(1..=1_000_000).contains(&value) {
                        problems.add(path.key(key), format!("must be 1 to 1000000, is {value}"));
                    }
                }
                if http.timeout.0.is_zero() {
                    problems.add(path.key("timeout"), "must be longer than 0s");
                }
            }
        }
    }
}

impl Limits {
    pub fn validate(&self, path: &KeyPath, problems: &mut Problems) {
        let counts = [
            ("client_messages_per_s", self.client_messages_per_s.map(u64::from)),
            ("client_bytes_per_s", self.client_bytes_per_s.map(|bytes| bytes.0)),
            ("messages_per_s", self.messages_per_s.map(u64::from)),
            ("bytes_per_s", self.bytes_per_s.map(|bytes| bytes.0)),
            ("topic_levels_max", self.topic_levels_max.map(u64::from)),
            ("connections_per_user_max", self.connections_per_user_max.map(u64::from)),
            ("connects_per_s", self.connects_per_s.map(u64::from)),
        ];
        for (key, _) in counts.into_iter().filter(|(_, count)| *count == Some(0)) {
            problems.add(path.key(key), "must be at least 1; leave it out for no bound");
        }
    }
}
