//! Configuration of one stream.

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
    /// Topic filters of the messages that this stream takes. The first stream with a matching filter
    /// takes a message. If unset: the default stream takes all messages that no other stream takes, and
    /// a stream that a pipeline writes to takes no messages of devices.
    pub topics: Vec<String>,
    /// For a stream that only pipelines write: makes its messages available to MQTT subscribers, with
    /// this prefix and `/` in front of their topics. If unset, subscribers do not receive them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topic_prefix: Option<String>,
    /// What determines the order: all messages with the same key are in one partition, and stay in
    /// order.
    pub key: Key,
    /// Number of parts that are processed in parallel. It cannot be changed once the stream exists.
    pub partitions: u16,
    /// How long messages are kept.
    pub retention: Retention,
    /// Size of a segment file, the unit that retention removes.
    pub segment_bytes: ByteSize,
    /// Most bytes that wait for one commit. Beyond this, devices wait.
    pub commit_buffer_bytes_max: ByteSize,
    /// Bytes of the most recent messages that are kept in memory, so that readers that are up to date
    /// need no disk.
    pub tail_bytes_max: ByteSize,
    /// Preallocated bytes for a full disk, with which the stream can still be opened, and dead letters
    /// written.
    pub reserve_bytes: ByteSize,
    /// For benchmarks only: a delay that is added to every sync, as on a slower disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sync_delay: Option<Period>,
    /// The stream may use its reserve while it runs. Set by the host, not by a config.
    #[serde(skip)]
    pub may_use_reserve: bool,
    /// A message that is larger than the commit buffer gets a commit of its own. Such a message was in
    /// the buffer of another stream, which may be larger. Set by the host, not by a config.
    #[serde(skip)]
    pub takes_any_message: bool,
}

/// What determines the order of messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Key {
    /// The device that the topic names, otherwise the client that published.
    #[default]
    DeviceId,
}

/// How long messages are kept. Retention removes whole segments, and never one that a reader with
/// `on_lag: block` has yet to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Retention {
    /// Age at which messages are removed, up to one eighth later, and no longer shown. `null` keeps them
    /// until `max_bytes` is reached.
    pub max_age: Option<Period>,
    /// Bytes that all segment files may take. The oldest are removed to stay below.
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
    /// Returns the configuration of the dead letters: a small stream, which may use its reserve, and
    /// takes every message that another stream took.
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

    /// Adds every problem of the section.
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
