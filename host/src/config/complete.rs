//! Defaults that depend on other keys.
//!
//! - None of `streams`, `pipelines` and `sinks`: the stream `telemetry` takes the topics that match
//!   `topics`, and its messages become rows. The stream `default` takes all other topics, for
//!   subscribers only.
//! - No `streams` in any other case: one stream, `telemetry`, takes every topic.
//! - All streams have `topics`: one more stream, `default`, takes all other topics.
//! - No `sinks`: one sink, `telemetry`, writes to the table `telemetry` in `telemetry.db` in the data
//!   folder, unless all pipelines have `routes` or `to` and none leads to a sink of this name.
//! - No `pipelines`: one for each stream, with the stream's name.
//! - A pipeline without `from` reads the stream of its name, otherwise the only stream.
//! - A pipeline without `routes` sends everything to the stream of `to`, otherwise to the only sink.
//!
//! These defaults do not apply to a stream that a pipeline writes to, unless it has `topics`: devices do
//! not write to it. If there are several candidates for "the only" one, the user must name one.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::problems::{KeyPath, Problems};
use crate::topic::Namespace;

/// Name of the stream, pipeline and sink of the embedded default.
pub const TELEMETRY: &str = "telemetry";
/// Name of the stream that takes the remaining topics if all streams have `topics`.
pub const REST_STREAM: &str = "default";

/// Partitions of the stream of the embedded default.
const PARTITIONS: u16 = 4;

/// Completes `value`, which matches the schema.
pub fn complete(value: &mut Value, problems: &mut Problems) {
    let Value::Object(config) = value else {
        return;
    };
    let data_dir = config.get("data_dir").and_then(Value::as_str).unwrap_or("data").to_owned();

    let is_default = ["streams", "pipelines", "sinks"].iter().all(|name| section(config, name).is_empty());
    let fits = is_default.then(|| filter_of(config)).flatten();

    let streams = section(config, "streams");
    if let Some(fits) = fits {
        streams.insert(TELEMETRY.to_owned(), json!({ "topics": [fits], "partitions": PARTITIONS }));
        section(config, "pipelines").insert(TELEMETRY.to_owned(), json!({ "from": TELEMETRY }));
    }
    let streams = section(config, "streams");
    if streams.is_empty() {
        streams.insert(TELEMETRY.to_owned(), json!({ "partitions": PARTITIONS }));
    }
    let has_topics = |stream: &Value| {
        stream.get("topics").and_then(Value::as_array).is_some_and(|topics| !topics.is_empty())
    };
    let streams: BTreeMap<String, bool> =
        streams.iter().map(|(name, stream)| (name.clone(), has_topics(stream))).collect();

    let wants_default = wants_default_sink(section(config, "pipelines"));
    let sinks = section(config, "sinks");
    if sinks.is_empty() && wants_default {
        let path = std::path::Path::new(&data_dir).join("telemetry.db");
        sinks.insert(
            TELEMETRY.to_owned(),
            json!({ "type": "sqlite", "path": path.display().to_string(), "table": TELEMETRY }),
        );
    }
    let sinks: Vec<String> = sinks.keys().cloned().collect();

    let written = written(section(config, "pipelines"), &sinks);
    let is_written =
        |name: &str, has_topics: bool| !has_topics && written.iter().any(|written| written == name);
    let mut streams: Vec<(String, bool)> = streams.into_iter().collect();
    streams.retain(|(name, has_topics)| !is_written(name, *has_topics));
    if streams.iter().all(|(_, has_topics)| *has_topics)
        && !streams.iter().any(|(name, _)| name == REST_STREAM)
    {
        section(config, "streams").insert(REST_STREAM.to_owned(), json!({}));
        streams.push((REST_STREAM.to_owned(), false));
        streams.sort();
    }
    let streams: Vec<String> = streams.into_iter().map(|(name, _)| name).collect();
    let all_streams: Vec<String> = section(config, "streams").keys().cloned().collect();

    let pipelines = section(config, "pipelines");
    if pipelines.is_empty() {
        *pipelines = streams.iter().map(|stream| (stream.clone(), json!({ "from": stream }))).collect();
    }
    for (name, pipeline) in pipelines {
        let path = KeyPath::root().key("pipelines").key(name);
        if let Value::Object(pipeline) = pipeline {
            complete_pipeline(name, pipeline, (&streams, &all_streams), &sinks, &path, problems);
        }
    }
}

fn complete_pipeline(
    name: &str,
    pipeline: &mut Map<String, Value>,
    (streams, all_streams): (&[String], &[String]),
    sinks: &[String],
    path: &KeyPath,
    problems: &mut Problems,
) {
    if !pipeline.contains_key("from") {
        let named: Vec<&String> = streams.iter().filter(|stream| *stream != REST_STREAM).collect();
        let is_own = pipeline.get("to").is_some_and(|to| to == name);
        let from: &str = match named.as_slice() {
            _ if !is_own && all_streams.iter().any(|stream| stream == name) => name,
            [only] => only,
            [] => REST_STREAM,
            _ => {
                let streams = streams.join(", ");
                problems.add(path.key("from"), format!("is missing, must name a stream: one of {streams}"));
                ""
            }
        };
        pipeline.insert("from".to_owned(), from.into());
    }
    if pipeline.get("routes").and_then(Value::as_object).is_none_or(Map::is_empty) {
        if let Some(to) = pipeline.get("to").filter(|to| to.is_string()).cloned() {
            pipeline.insert("routes".to_owned(), json!({ "default": to }));
            return;
        }
        if let [_, _, ..] = sinks {
            let sinks = sinks.join(", ");
            let message = format!("is missing, must name a sink, since there are several: one of {sinks}");
            problems.add(path.key("routes").key("default"), message);
        }
        // The first one, so that only the one problem is said.
        pipeline.insert("routes".to_owned(), json!({ "default": sinks.first() }));
    }
}

fn wants_default_sink(pipelines: &Map<String, Value>) -> bool {
    let leads_there = |target: &Value| match target {
        Value::Array(names) => names.iter().any(|name| name == TELEMETRY),
        name => name == TELEMETRY,
    };
    let wants = |pipeline: &Value| match pipeline.get("routes").and_then(Value::as_object) {
        Some(routes) if !routes.is_empty() => routes.values().any(leads_there),
        _ => pipeline.get("to").is_none(),
    };
    pipelines.is_empty() || pipelines.values().any(wants)
}

/// Returns the names that pipelines write to and that are not names of sinks.
fn written(pipelines: &Map<String, Value>, sinks: &[String]) -> Vec<String> {
    let routes = |pipeline: &Value| match pipeline.get("routes").and_then(Value::as_object) {
        Some(routes) => routes.values().cloned().collect(),
        None => Vec::new(),
    };
    let targets = pipelines.values().flat_map(|pipeline| {
        let targets = routes(pipeline).into_iter().flat_map(|target| match target {
            Value::Array(names) => names,
            name => vec![name],
        });
        targets.chain(pipeline.get("to").cloned()).collect::<Vec<_>>()
    });
    let names = targets.filter_map(|target| target.as_str().map(str::to_owned));
    names.filter(|name| !sinks.contains(name)).collect()
}

/// Returns a filter for the topics with as many levels as `topics` names; `None` if `topics` is not
/// valid.
fn filter_of(config: &Map<String, Value>) -> Option<String> {
    let pattern = config.get("topics").and_then(Value::as_str).unwrap_or(Namespace::DEFAULT_PATTERN);
    let namespace = Namespace::parse(pattern).ok()?;
    Some(vec!["+"; namespace.fields().len()].join("/"))
}

fn section<'c>(config: &'c mut Map<String, Value>, name: &str) -> &'c mut Map<String, Value> {
    let section = config.entry(name).or_insert_with(|| Value::Object(Map::new()));
    if !section.is_object() {
        *section = Value::Object(Map::new());
    }
    section.as_object_mut().expect("made an object above")
}
