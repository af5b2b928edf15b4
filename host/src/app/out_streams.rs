//! The streams between the steps of pipelines and their sinks that the config does not have: of a pipeline that
//! had another name, or several sinks.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};

use crate::config::Config;
use crate::pipeline;
use crate::stream::{self, AppendError, Stream, Streams};
use crate::telemetry::Standing;

/// Gives the out stream of a pipeline that was renamed its new name.
pub fn rename(config: &Config, data_dir: &Path) -> anyhow::Result<()> {
    let streams = data_dir.join("streams");
    for (name, pipeline) in &config.pipelines {
        let Some(former) = &pipeline.renamed_from else { continue };
        let (from, to) =
            (streams.join(pipeline::out_stream_of(former)), streams.join(pipeline::out_stream_of(name)));
        if from.exists() && to.exists() {
            bail!(
                "pipelines.{name}: {} and {} are both there: pipeline \"{name}\" takes the place of \"{former}\", whose \
                 stream is the first one; move the second one away, which an earlier pipeline of the name \"{name}\" left",
                from.display(),
                to.display()
            );
        }
        if from.exists() {
            std::fs::rename(&from, &to)
                .with_context(|| format!("cannot rename {} to {}", from.display(), to.display()))?;
        }
    }
    Ok(())
}

/// Returns the out streams that are not written any more and that sinks may have to read, with how they are kept:
/// as the stream that their pipeline reads.
pub fn left_over(
    config: &Config,
    data_dir: &Path,
    dead_letters: &dyn Stream,
    streams: &Streams,
) -> Vec<(String, stream::Config)> {
    let is_left = |(name, pipeline): &(&String, &pipeline::Config)| {
        let source = streams.get(&pipeline.from).map(Arc::clone)?;
        let out = pipeline::out_stream_of(name);
        let is_there = data_dir.join("streams").join(&out).exists();
        let names = pipeline::names_of(name, &pipeline.renamed_from);
        let is_read = pipeline::need_out(dead_letters, &names, source.identity());
        let like = config.streams.get(&pipeline.from)?;
        let like = stream::Config { topics: Vec::new(), topic_prefix: None, ..like.clone() };
        (config.out_stream(name, pipeline).is_none() && is_there && is_read).then_some((out, like))
    };
    config.pipelines.iter().filter_map(|pipeline| is_left(&pipeline)).collect()
}

/// Says why a pipeline does not run.
pub fn not_recorded(pipeline: &str, error: &AppendError) -> Standing {
    let cause = format!(
        "it does not run: its sinks have changed, and which streams they read now cannot be recorded in the dead letters: \
         {error}"
    );
    tracing::error!(pipeline, "{cause}");
    Standing {
        part: format!("pipeline {pipeline}"),
        kind: "stopped",
        cause,
        advice: "free disk space, or raise dead_letters.max_bytes, then restart the host; or put the sinks back that the \
                 pipeline had. What comes meanwhile stays in its stream"
            .to_owned(),
    }
}
