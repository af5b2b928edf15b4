//! Rules that the schema cannot express: those of each part, and that the parts fit together. Reads no
//! files, and reports all problems at once.

use std::collections::{BTreeMap, BTreeSet};

use super::{Config, suggest};
use crate::listeners::transport::Bind;
use crate::pipeline;
use crate::problems::{KeyPath, Problems};
use crate::topic::{Namespace, TopicFilter};
use crate::units::ByteSize;

/// Longest name in bytes. Names are parts of file names, metric labels and keys.
const NAME_BYTES_MAX: usize = 64;
/// Name of the stream of dead letters, which always exists.
pub const DEAD_LETTERS: &str = "dead-letters";

pub fn validate(config: &Config, problems: &mut Problems) {
    let root = KeyPath::root();
    if config.data_dir.as_os_str().is_empty() {
        problems.add(root.key("data_dir"), "must not be empty");
    }
    if let Err(error) = Namespace::parse(&config.topics) {
        problems.add(root.key("topics"), error.to_string());
    }
    config.mqtt.validate(&root.key("mqtt"), problems);
    config.http.validate(&root.key("http"), config.mqtt.asks_for_credentials(), problems);
    config.plugins.validate(&root.key("plugins"), problems);
    config.devices.validate(&root.key("devices"), problems);
    config.dead_letters.validate(&root.key("dead_letters"), problems);
    config.admin.validate(&root.key("admin"), problems);
    streams(config, problems);
    sinks(config, problems);
    pipelines(config, problems);
    addresses(config, problems);
}

/// Returns warnings about settings that are valid but probably not intended.
pub fn warnings(config: &Config) -> Vec<String> {
    let mut warnings = Vec::new();
    for (name, sink) in &config.sinks {
        warnings.extend(sink.warnings(&format!("sinks.{name}")));
        if !config.pipelines.values().any(|pipeline| pipeline.sinks().contains(name.as_str())) {
            warnings.push(format!("sinks.{name}: no route leads here"));
        }
    }
    let steps = config.pipelines.iter().flat_map(|(name, pipeline)| {
        let steps = pipeline.steps.iter().flatten().enumerate();
        steps.map(move |(i, step)| (format!("pipelines.{name}.steps[{i}].limits"), step.limits))
    });
    for (path, limits) in steps.chain([("plugins.limits".to_owned(), Some(config.plugins.limits))]) {
        if limits.is_some_and(|limits| limits.retries_max.is_some()) {
            warnings.push(format!("{path}.retries_max: set pipelines.<name>.retries.max instead"));
        }
    }
    warnings
}

/// Parses a path in the format of serde_path_to_error.
pub fn key_path(path: &str) -> KeyPath {
    KeyPath::root().key(path.trim_matches('.'))
}

fn streams(config: &Config, problems: &mut Problems) {
    let path = KeyPath::root().key("streams");
    let written = config.written_streams();
    let mut taking_the_rest: Option<&str> = None;
    let mut seen: Vec<(&str, TopicFilter)> = Vec::new();
    for (name, stream) in &config.streams {
        let path = path.key(name);
        let pipeline = name.strip_suffix(pipeline::OUT);
        match pipeline.and_then(|pipeline| config.pipelines.get_key_value(pipeline)) {
            Some((pipeline, of)) if config.out_stream(pipeline, of).as_ref() == Some(name) => {}
            Some((pipeline, _)) => {
                let message = format!("pipeline `{pipeline}` has one sink, and no stream in front of it");
                problems.add(path.clone(), message);
            }
            None => check_name(name, &path, problems),
        }
        if name == DEAD_LETTERS {
            problems.add(path.clone(), "is the name of the stream of refused messages, take another");
        }
        stream.validate(&path, problems);
        // Once as a message, once as its topic's retained message; its properties too.
        let (packet, buffer) = (config.mqtt.max_packet_size, stream.commit_buffer_bytes_max);
        let needed = ByteSize((2 * packet.0).saturating_add(1 << 20));
        if buffer < needed {
            let message = format!(
                "must be at least {needed}, twice mqtt.max_packet_size ({packet}) and 1 MiB, is {buffer}; \
                 a packet must fit into one commit"
            );
            problems.add(path.key("commit_buffer_bytes_max"), message);
        }
        let needed = ByteSize(config.http.commit_bytes_least());
        if buffer < needed {
            let message = format!(
                "must be at least {needed}, the larger of http.max_batch_size and http.max_message_size and \
                 1 MiB, is {buffer}; the messages of a request must fit into one commit"
            );
            problems.add(path.key("commit_buffer_bytes_max"), message);
        }
        let is_written = written.contains(name.as_str());
        if stream.topic_prefix.is_some() && !is_written {
            let message = "is for a stream that a pipeline writes to, and none writes to this one";
            problems.add(path.key("topic_prefix"), message);
        }
        if stream.topics.is_empty() && !is_written {
            if let Some(other) = taking_the_rest {
                let message =
                    format!("must be set: stream `{other}` takes the topics that no stream names already");
                problems.add(path.key("topics"), message);
            }
            taking_the_rest = taking_the_rest.or(Some(name));
        }
        for (i, filter) in stream.topics.iter().enumerate() {
            let Ok(filter) = TopicFilter::new(filter) else {
                continue; // said by the stream itself
            };
            if let Some((other, theirs)) =
                seen.iter().find(|(other, theirs)| other != name && overlap(theirs, &filter))
            {
                let message = format!(
                    "`{filter}` overlaps `{theirs}` of stream `{other}`: every topic belongs to one stream"
                );
                problems.add(path.key("topics").index(i), message);
            }
            seen.push((name, filter));
        }
    }
    if taking_the_rest.is_none() {
        problems.add(path, "one stream must leave out `topics`, to take what no other wants");
    }
}

fn sinks(config: &Config, problems: &mut Problems) {
    let namespace = Namespace::parse(&config.topics);
    for (name, sink) in &config.sinks {
        let path = KeyPath::root().key("sinks").key(name);
        check_name(name, &path, problems);
        if name == "drop" {
            problems.add(path.clone(), "`drop` is the route that drops, take another name");
        }
        sink.validate(&path, problems);
        check_renamed(sink.renamed_from(), &path, config.sinks.keys(), problems);
        if let Ok(namespace) = &namespace {
            sink.validate_namespace(namespace, &path, problems);
        }
    }
}

fn pipelines(config: &Config, problems: &mut Problems) {
    for (name, pipeline) in &config.pipelines {
        let path = KeyPath::root().key("pipelines").key(name);
        check_name(name, &path, problems);
        pipeline.validate(&path, problems);
        check_renamed(pipeline.renamed_from.as_deref(), &path, config.pipelines.keys(), problems);
        if !pipeline.from.is_empty() && !config.streams.contains_key(&pipeline.from) {
            problems.add(path.key("from"), no_such("stream", &pipeline.from, config.streams.keys()));
        }
        if let Some(to) = pipeline.to.as_ref().filter(|to| !to.is_empty()) {
            let path = path.key("to");
            if !config.streams.contains_key(to) {
                problems.add(path, no_such("stream", to, config.streams.keys()));
            } else if config.sinks.contains_key(to) {
                let message = format!("`{to}` is the name of a sink too: give the stream another name");
                problems.add(path, message);
            }
        }
        if let Some(circle) = circle(config, name, pipeline) {
            let path = path.key(if pipeline.to.is_some() { "to" } else { "routes" });
            problems.add(path, format!("leads back to the stream that the pipeline reads: {circle}"));
        }
        for (route, target) in &pipeline.routes {
            for sink in target.sinks().iter().filter(|sink| !sink.is_empty()) {
                if !config.sinks.contains_key(sink) && !config.streams.contains_key(sink) {
                    problems.add(path.key("routes").key(route), no_such("sink", sink, config.sinks.keys()));
                }
            }
        }
        let mut steps: BTreeMap<&str, usize> = BTreeMap::new();
        for (i, step) in pipeline.steps.iter().flatten().enumerate() {
            let path = path.key("steps").index(i);
            step.validate(&path, problems);
            let name = step.step_name();
            if let Some(first) = steps.insert(name, i) {
                let message =
                    format!("step {first} is `{name}` already, tell them apart with `as: {name}-2`");
                problems.add(path, message);
            }
        }
    }
}

/// Returns the streams by which what a pipeline writes comes back to the stream that it reads: `a -> b -> a`.
fn circle(config: &Config, name: &str, pipeline: &pipeline::Config) -> Option<String> {
    let begin = |to| vec![pipeline.from.as_str(), to];
    let mut ways: Vec<Vec<&str>> = config.written_by(name, pipeline).map(begin).collect();
    let mut seen = BTreeSet::new();
    while let Some(way) = ways.pop() {
        let last = way[way.len() - 1];
        if last == pipeline.from {
            return Some(way.join(" -> "));
        }
        if seen.insert(last) {
            let readers = config.pipelines.iter().filter(|(_, reader)| reader.from == last);
            let next = readers.flat_map(|(name, reader)| config.written_by(name, reader));
            ways.extend(next.map(|next| [&way[..], &[next]].concat()));
        }
    }
    None
}

/// Reports two listeners with one address, which cannot both be bound.
fn addresses(config: &Config, problems: &mut Problems) {
    let root = KeyPath::root();
    let mut seen: Vec<(Bind, KeyPath)> = Vec::new();
    let listeners = config.mqtt.listeners.iter().enumerate().map(|(i, listener)| {
        (Some(listener.bind.clone()), root.key("mqtt").key("listeners").index(i).key("bind"))
    });
    let http = config.http.listeners.iter().enumerate().map(|(i, listener)| {
        (Some(listener.bind.clone()), root.key("http").key("listeners").index(i).key("bind"))
    });
    let listeners = listeners.chain(http);
    let admin = (config.admin.address().map(Bind::Tcp), root.key("admin").key("bind"));
    for (bind, path) in listeners.chain([admin]) {
        let Some(bind) = bind else {
            continue; // said by the part itself
        };
        if let Some((other, theirs)) = seen.iter().find(|(other, _)| clash(other, &bind)) {
            problems.add(path.clone(), format!("{bind} is taken by {} ({other})", theirs.as_str()));
        }
        seen.push((bind, path));
    }
}

fn clash(a: &Bind, b: &Bind) -> bool {
    match (a, b) {
        (Bind::Tcp(a), Bind::Tcp(b)) => {
            let same_ip = a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified();
            a.port() == b.port() && a.port() != 0 && same_ip
        }
        (a, b) => a == b,
    }
}

fn check_name(name: &str, path: &KeyPath, problems: &mut Problems) {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
    let starts_well = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    if !starts_well || name.len() > NAME_BYTES_MAX || !name.bytes().all(is_plain) {
        problems.add(
            path.clone(),
            format!("a name has 1 to {NAME_BYTES_MAX} letters, digits, `-` and `_`, a letter or digit first, is \"{name}\""),
        );
    }
}

/// Checks that a former name is in use nowhere, because two parts cannot have one position.
fn check_renamed<'c>(
    renamed_from: Option<&str>,
    path: &KeyPath,
    mut known: impl Iterator<Item = &'c String>,
    problems: &mut Problems,
) {
    let Some(old) = renamed_from else { return };
    let path = path.key("renamed_from");
    check_name(old, &path, problems);
    if known.any(|name| name == old) {
        problems.add(path, format!("`{old}` is still there: name the one that this one took the place of"));
    }
}

fn no_such<'c>(kind: &str, name: &str, known: impl Iterator<Item = &'c String> + Clone) -> String {
    match suggest::closest(name, known.clone().map(String::as_str)) {
        Some(meant) => format!("no {kind} `{name}`, did you mean `{meant}`?"),
        None => {
            let known: Vec<&str> = known.map(String::as_str).collect();
            format!("no {kind} `{name}`, known are {}", known.join(", "))
        }
    }
}

/// Returns whether a topic can match both filters.
fn overlap(a: &TopicFilter, b: &TopicFilter) -> bool {
    let (mut a, mut b) = (a.as_str().split('/'), b.as_str().split('/'));
    loop {
        match (a.next(), b.next()) {
            (None, None) | (Some("#"), _) | (_, Some("#")) => return true,
            (Some(x), Some(y)) if x == y || x == "+" || y == "+" => {}
            _ => return false,
        }
    }
}
