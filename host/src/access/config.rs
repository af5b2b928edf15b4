//! `mqtt.access`: who a client is, and what it may do; `mqtt.limits`: how much.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rules::{self, Action, Effect};
use crate::plugin;
use crate::problems::{KeyPath, Problems};
use crate::units::{ByteSize, Period};

/// Rules of the config, of a token, or of an answer.
pub const RULES_MAX: usize = 1_000;

/// Who may connect, publish and subscribe. With this section set, what no rule
/// allows is refused.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Asked in this order until one knows the client. A client without user
    /// name, password and certificate is anonymous: served where its listener
    /// has `allow_anonymous`.
    pub authenticate: Vec<Authenticator>,
    /// The first rule that fits decides; where none fits the answer is no.
    pub rules: Vec<Rule>,
    /// What client ids a client may have, where this is set: one that fits none is
    /// refused. `%u` is the user name, `{field}` the client's value of that field,
    /// `*` any characters. Left out, a user may take the session of another's
    /// client id over. An id that the broker gave out is always fine.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub client_ids: Vec<String>,
    /// Values for `{field}` in topics of rules, by user name:
    /// `alice: { site: factory-01 }`.
    pub users: BTreeMap<String, BTreeMap<String, String>>,
    /// What an MQTT 3.1.1 client meets that publishes where it may not; its
    /// version has no way to be told.
    pub denied_publish: DeniedPublish,
    /// What a subscription meets that matches denied topics beside allowed ones, such as
    /// `#` where `plant/secret` is denied.
    pub overlap: Overlap,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Overlap {
    /// It is granted; messages of denied topics, retained ones too, are not delivered.
    #[default]
    Filter,
    /// It is refused.
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

/// One way to know a client.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Authenticator {
    /// A file of users and argon2id hashes, made by `headworks passwd`.
    Passwords(Passwords),
    /// A JSON Web Token as password.
    Jwt(Jwt),
    /// The client certificate that the TLS handshake has verified.
    Certificate(Certificate),
    /// A service that is asked by HTTP.
    Http(Http),
    /// A WebAssembly plugin that decides.
    Plugin(Plugin),
}

/// A line `user:hash` for each user; read again when it changes, if it has any. A user made
/// with `--scram` may log in by SCRAM-SHA-256 (MQTT 5) too.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Passwords {
    /// File of users and password hashes that `headworks passwd` writes.
    pub file: PathBuf,
}

/// Tokens signed with HS256/384/512, RS256/384/512, ES256 or ES384; one of
/// `secret_file`, `public_key_file` and `jwks_file` names the keys, which are
/// read again when the file changes. A token must have `exp`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Jwt {
    /// Secret for HS256, HS384 and HS512, at least 32 bytes; a newline at its end is left out. A key,
    /// certificate or key set is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_file: Option<PathBuf>,
    /// RSA or EC public key, PEM (`BEGIN PUBLIC KEY`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub public_key_file: Option<PathBuf>,
    /// JSON Web Key Set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jwks_file: Option<PathBuf>,
    /// The value that `iss` must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub issuer: Option<String>,
    /// The value that `aud` must have or hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audience: Option<String>,
    /// Clocks may differ by this much.
    #[serde(default = "default_leeway")]
    pub leeway: Period,
    /// The claim that is the user name.
    #[serde(default = "default_user_claim")]
    pub user_claim: String,
    /// The claim with rules, of the shape of `rules`; they come before the config's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rules_claim: Option<String>,
}

/// The name in it, which the listener's `tls.identity` chooses, becomes the user
/// name. Needs `tls.client_ca` on the listener.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Certificate {}

/// `POST {"action": "connect", "client_id", "username", "password", "ip"}`, answered
/// with 200 and `{"allow": bool, "superuser": bool, "rules": [...], "fields": {...}}`;
/// without `allow` the next authenticator is asked. Whatever else comes, or
/// nothing in time, refuses the client as Server Unavailable. It is asked for clients with neither
/// user name nor password only where the listener has `allow_anonymous`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Http {
    /// `http://host:port/path`, or with https.
    pub url: String,
    /// CAs for https, PEM, read again when the file changes; left out, those that
    /// the system trusts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// For the answer, from the request on.
    #[serde(default = "default_timeout")]
    pub timeout: Period,
    /// An answer is used again for so long; 0s asks each time.
    #[serde(default = "default_cache_ttl")]
    pub cache_ttl: Period,
    /// Answers kept.
    #[serde(default = "default_cache_entries_max")]
    pub cache_entries_max: u32,
    /// Requests at a time; others wait, by turns among the addresses that clients come from.
    #[serde(default = "default_requests_max")]
    pub requests_max: u32,
}

/// A component that exports `access` (`wit/plugin.wit`), read again when its file
/// changes; one that does not start leaves the old one in place. It may accept
/// a client with a name and rules, refuse it, or leave it to the next
/// authenticator. A fault or a call over its limits refuses as Server Unavailable.
/// Rules with the effect `ask` have it asked for topics, while the client is connected.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Plugin {
    /// The `.wasm` file; not in the plugins folder, whose files are steps.
    pub file: PathBuf,
    /// The plugin's config.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub config: serde_json::Value,
    /// Limits of one call.
    #[serde(default)]
    pub limits: plugin::Limits,
    /// Instances, and calls at a time; others wait by turns: those of connected clients first, then among the addresses that clients come from.
    #[serde(default = "default_instances_max")]
    pub instances_max: u32,
}

/// One rule. It fits a client when all of `user`, `client` and `anonymous` that
/// are set do, and `*` in them stands for any characters.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Whether a client that the rule matches may do what the rule is about.
    pub effect: Effect,
    /// User names, `line-*`. A client without a user name has none that fits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Client ids.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<String>,
    /// true: only clients without a user name; false: only those with one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub anonymous: Option<bool>,
    /// What the rule is about: publishing to its topics, subscribing to them, or both.
    #[serde(default)]
    pub action: Action,
    /// Topic filters. `%c` is the client id, `%u` the user name, `{field}` the
    /// client's value of that field, from `users`, the token's claims or the
    /// HTTP answer. Where a client has no such value, or one that is not a single
    /// level, an allowing filter fits nothing and a denying one the whole level. An
    /// allow rule never matches when a substituted value puts `$` at the start of the topic.
    pub topics: Vec<String>,
}

/// Bounds that hold with and without `access`; what is left out is not bounded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Publishes a second of one client, with bursts of a second's worth. Past it
    /// the client is read slower; nothing is refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_messages_per_s: Option<u32>,
    /// Bytes of publishes a second of one client; the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_bytes_per_s: Option<ByteSize>,
    /// Publishes a second of all clients together; the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub messages_per_s: Option<u32>,
    /// Bytes of publishes a second of all clients together; the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_s: Option<ByteSize>,
    /// Levels of a topic that is published to; past it the publish is refused (0x90).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topic_levels_max: Option<u32>,
    /// Connections of one user name at a time; one more is refused (0x97), but not a
    /// client that takes its own session over.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connections_per_user_max: Option<u32>,
    /// CONNECT packets a second of all clients, with bursts of a second's worth;
    /// one more is refused (0x9F), unless it comes from an address (of IPv6: a /64) that
    /// has had less than its share of this second.
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
    /// Finds everything that is wrong; reads no file.
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
