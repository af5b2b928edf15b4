//! Streams that pipelines write to: as sinks, and as subscribers see them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::config::Config;
use crate::pipeline::{self, Batching, OutPart, SinkPart};
use crate::sinks::{Begin, stream::Target};
use crate::stream::{OnLag, Prefixed, Stream, Streams};
use crate::units::ByteSize;

/// A message waits at most so long for others before they are appended to the stream that a pipeline writes:
/// each append is a sync, which wears a flash disk.
const STREAM_WAIT_MAX: Duration = Duration::from_millis(50);

/// The same for the stream between a pipeline's steps and its sinks: each sink gets the message so much later.
const OUT_WAIT_MAX: Duration = Duration::from_millis(10);

/// Returns the streams that pipelines write to, each once, however many pipelines write to it.
pub fn targets(config: &Config, streams: &Streams) -> BTreeMap<String, Target> {
    let written = config.written_streams().into_iter().filter_map(|name| streams.get(name));
    let target = |stream: &Arc<dyn Stream>| {
        let name = stream.name().to_owned();
        let prefix = config.streams[&name].topic_prefix.as_deref();
        (name, Target::new(Arc::clone(stream), prefix))
    };
    written.map(target).collect()
}

/// Returns the streams whose messages MQTT clients may get, as these see them.
pub fn for_subscribers(config: &Config, streams: &Streams) -> Streams {
    streams.filtered(|stream| {
        let prefix = config.streams[stream.name()].topic_prefix.as_deref();
        match prefix {
            Some(prefix) => Some(Arc::new(Prefixed::new(Arc::clone(stream), prefix))),
            None => config.has_subscribers(stream.name()).then(|| Arc::clone(stream)),
        }
    })
}

/// Returns the stream between a pipeline's steps and its sinks: one that the steps write, or one of `left_over`,
/// from when the pipeline had several sinks.
pub fn out_part(
    config: &Config,
    (name, pipeline): (&str, &pipeline::Config),
    targets: &BTreeMap<String, Target>,
    streams: &Streams,
    left_over: &BTreeMap<String, Arc<dyn Stream>>,
) -> Option<OutPart> {
    let out = pipeline::out_stream_of(name);
    let former = pipeline.renamed_from.as_deref().map(pipeline::out_stream_of);
    if config.out_stream(name, pipeline).is_some() {
        let target = targets.get(&out)?.clone();
        let part = sink_part(config, &out, &target);
        let batching = Batching { wait_max: OUT_WAIT_MAX, ..part.batching };
        let part = SinkPart { renamed_from: former, batching, ..part };
        return Some(OutPart { part, stream: Arc::clone(streams.get(&out)?), target, is_written: true });
    }
    let stream = Arc::clone(left_over.get(&out)?);
    let target = Target::new(Arc::clone(&stream), None);
    let part = SinkPart { renamed_from: former, ..sink_part_of(&out, &target, ByteSize::mib(16)) };
    Some(OutPart { part, stream, target, is_written: false })
}

/// A stream that a pipeline writes to, as one of the pipeline's sinks.
pub fn sink_part(config: &Config, name: &str, target: &Target) -> SinkPart {
    sink_part_of(name, target, config.streams[name].commit_buffer_bytes_max)
}

fn sink_part_of(name: &str, target: &Target, commit_buffer_bytes_max: ByteSize) -> SinkPart {
    // An append has topics and properties beside the payloads.
    let bytes_max = commit_buffer_bytes_max.0 / 2;
    let batching = Batching { bytes_max, wait_max: STREAM_WAIT_MAX, ..Batching::default() };
    SinkPart {
        name: name.to_owned(),
        sink: target.sink(),
        target: format!("stream {name}"),
        batching,
        on_lag: OnLag::Block,
        renamed_from: None,
        begin: Some(Begin::Now),
        is_stream: true,
    }
}
