//! How one stream of the config is kept.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::problems::{KeyPath, Problems};
use crate::topic::{TopicFilter, is_valid_name};
use crate::units::{ByteSize, Period};

/// Most bytes of a topic prefix, so that it takes little of the room for topics.
const PREFIX_BYTES_MAX: usize = 256;

/// A stream in the embedded log.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Topic filters of the messages that belong here; the first stream that
    /// matches takes a message. None: the default stream takes what no other wants;
    /// a stream that a pipeline writes to takes none from devices.
    pub topics: Vec<String>,
    /// For a stream that only pipelines write: MQTT clients may subscribe to its messages, whose topics they
    /// see with this and `/` in front. Left out: no subscriber gets them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topic_prefix: Option<String>,
    /// What keeps its order: all messages with the same key are in one partition.
    pub key: Key,
    /// Parts that are worked on side by side. Cannot be changed once the stream exists.
    pub partitions: u16,
    /// How long messages are kept.
    pub retention: Retention,
    /// Size of a segment file, the unit that retention removes.
    pub segment_bytes: ByteSize,
    /// Most that waits for one commit; past it devices wait.
    pub commit_buffer_bytes_max: ByteSize,
    /// Most recent messages kept in memory, so that live readers touch no disk.
    pub tail_bytes_max: ByteSize,
    /// Preallocated for a full disk: lets the stream open then, and dead letters go on.
    pub reserve_bytes: ByteSize,
    /// For benchmarks only: added to every sync, as a slower disk would take.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sync_delay: Option<Period>,
    /// Set by the host, not by a config: may use the reserve while it runs.
    #[serde(skip)]
    pub may_use_reserve: bool,
    /// Set by the host, not by a config: a message that is larger than the commit buffer goes into
    /// a commit of its own. It was in the buffer of another stream, which may have had more room.
    #[serde(skip)]
    pub takes_any_message: bool,
}

/// What keeps its order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Key {
    /// The device that a topic names, else the client that published.
    #[default]
    DeviceId,
}

/// How long messages are kept. Whole segments go, and never one that a reader
/// with `on_lag: block` has yet to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Retention {
    /// Messages older than this go, by an eighth of it later at most, and are shown no more; `null`
    /// keeps them until `max_bytes`.
    pub max_age: Option<Period>,
    /// The oldest go when all segment files together would take more than this.
    pub max_bytes: ByteSize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            topics: Vec::new(),
            topic_prefix: None,
            key: Key::DeviceId,
            partitions: 4,
            retention: Retention::default(),
            segment_bytes: ByteSize::mib(64),
            commit_buffer_bytes_max: ByteSize::mib(16),
            tail_bytes_max: ByteSize::mib(32),
            reserve_bytes: ByteSize::mib(16),
            sync_delay: None,
            may_use_reserve: false,
            takes_any_message: false,
        }
    }
}

impl Default for Retention {
    fn default() -> Self {
        Self { max_age: Some(Period(Duration::from_secs(7 * 24 * 60 * 60))), max_bytes: ByteSize::gib(20) }
    }
}

impl Config {
    /// What the stream of dead letters uses: small, it may use the reserve, and takes what other
    /// streams took.
    pub fn dead_letters() -> Self {
        Self {
            partitions: 1,
            retention: Retention {
                max_age: Some(Period(Duration::from_secs(30 * 24 * 60 * 60))),
                max_bytes: ByteSize::gib(1),
            },
            segment_bytes: ByteSize::mib(16),
            may_use_reserve: true,
            takes_any_message: true,
            ..Self::default()
        }
    }

    /// Everything that is wrong, at once.
    pub fn validate(&self, path: &KeyPath, problems: &mut Problems) {
        for (i, topic) in self.topics.iter().enumerate() {
            if let Err(error) = TopicFilter::new(topic) {
                problems.add(path.key("topics").index(i), error.to_string());
            }
        }
        if let Some(prefix) = &self.topic_prefix {
            self.validate_prefix(prefix, &path.key("topic_prefix"), problems);
        }
        if !(1..=1024).contains(&self.partitions) {
            problems.add(path.key("partitions"), format!("must be 1 to 1024, is {}", self.partitions));
        }
        let mut within = |path: KeyPath, size: ByteSize, least: ByteSize, most: ByteSize| {
            if size < least || size > most {
                problems.add(path, format!("must be {least} to {most}, is {size}"));
            }
        };
        let kib = |n: u64| ByteSize(n << 10);
        within(path.key("segment_bytes"), self.segment_bytes, ByteSize::mib(1), ByteSize::gib(1));
        within(
            path.key("commit_buffer_bytes_max"),
            self.commit_buffer_bytes_max,
            ByteSize::mib(1),
            ByteSize::mib(256),
        );
        within(path.key("tail_bytes_max"), self.tail_bytes_max, kib(64), ByteSize::gib(16));
        within(path.key("reserve_bytes"), self.reserve_bytes, ByteSize(0), ByteSize::gib(1));
        let least = ByteSize(4 * self.segment_bytes.0);
        within(path.key("retention").key("max_bytes"), self.retention.max_bytes, least, ByteSize(u64::MAX));
        if let Some(age) = self.retention.max_age
            && age.0 < Duration::from_secs(60)
        {
            problems.add(path.key("retention").key("max_age"), format!("must be at least 1m, is {age}"));
        }
    }

    fn validate_prefix(&self, prefix: &str, path: &KeyPath, problems: &mut Problems) {
        let has_empty_level = prefix.split('/').any(str::is_empty);
        if !is_valid_name(prefix) || has_empty_level || prefix.starts_with('$') {
            let message = format!("must be topic levels such as clean or site/clean, is \"{prefix}\"");
            problems.add(path.clone(), message);
        } else if prefix.len() > PREFIX_BYTES_MAX {
            problems.add(path.clone(), format!("must be at most {PREFIX_BYTES_MAX} bytes"));
        }
        if !self.topics.is_empty() {
            let message =
                "is for a stream that only pipelines write, and `topics` lets devices write to this one";
            problems.add(path.clone(), message);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_valid_and_every_problem_is_found_at_once() {
        let check = |config: &Config| {
            let mut problems = Problems::default();
            config.validate(&KeyPath::root().key("streams").key("a"), &mut problems);
            problems.into_vec()
        };
        assert_eq!(check(&Config::default()), []);
        assert_eq!(check(&Config::dead_letters()), []);
        let bad = Config {
            topics: vec!["a/#/b".into()],
            partitions: 0,
            segment_bytes: ByteSize(7),
            ..Config::default()
        };
        let paths: Vec<_> = check(&bad).iter().map(|p| p.path.as_str().to_owned()).collect();
        assert_eq!(paths, ["streams.a.topics[0]", "streams.a.partitions", "streams.a.segment_bytes"]);
    }

    #[test]
    fn a_topic_prefix_is_whole_levels_that_a_client_may_subscribe_to() {
        let check = |prefix: &str, topics: &[&str]| {
            let topics = topics.iter().map(|topic| (*topic).to_owned()).collect();
            let config = Config { topic_prefix: Some(prefix.to_owned()), topics, ..Config::default() };
            let mut problems = Problems::default();
            config.validate(&KeyPath::root(), &mut problems);
            problems.into_vec().len()
        };
        for good in ["clean", "site/clean"] {
            assert_eq!(check(good, &[]), 0, "{good}");
        }
        for bad in ["", "/", "clean/", "/clean", "a//b", "a/+", "#", "$SYS", "$share/x", &"x".repeat(257)] {
            assert_eq!(check(bad, &[]), 1, "{bad}");
        }
        assert_eq!(check("clean", &["a/#"]), 1, "devices write to it");
    }
}
