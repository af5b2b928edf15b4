//! `headworks validate`: prints all problems, or what would run; with `--connect` also whether each sink
//! would write.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use futures_util::future::join_all;
use serde_json::{Value, json};

use super::args::{Format, ValidateArgs};
use super::output::{Out, unless_closed};
use super::{FAILED, block_on, data_folder};
use crate::app::banner::{Started, summary};
use crate::batch::Offset;
use crate::config::{self, Config, Loaded};
use crate::pipeline::{self, Beginning, FirstStart, claim_of, names_of};
use crate::sinks::{CheckContext, Checked, Claim, Looked, Name, POSITIONS_PREFIX};
use crate::stream::StateEntries;
use crate::stream::log::{ReadOnly, Remembered};
use crate::topic::Namespace;

pub fn validate(args: &ValidateArgs, out: &mut Out) -> anyhow::Result<ExitCode> {
    let loaded = match config::load_with_files(args.config.config.as_deref()) {
        Err(config::Error::Invalid(problems)) if args.format.format == Format::Json => {
            unless_closed(out.json(&json!({ "valid": false, "problems": problems })))?;
            return Err(config::Error::Invalid(problems).into());
        }
        loaded => loaded?,
    };
    let sinks = args.connect.then(|| block_on(check_sinks(&loaded.config))).transpose()?;
    unless_closed(show(args, &loaded, sinks.as_deref(), out))?;
    let all_work = sinks.iter().flatten().all(|(_, checked)| checked.problems.is_empty());
    Ok(if all_work { ExitCode::SUCCESS } else { ExitCode::from(FAILED) })
}

fn show(
    args: &ValidateArgs,
    loaded: &Loaded,
    sinks: Option<&[(&str, Checked)]>,
    out: &mut Out,
) -> anyhow::Result<()> {
    if args.format.format == Format::Json {
        let mut said = json!({ "valid": true, "warnings": loaded.warnings, "config": loaded.config });
        if let Some(sinks) = sinks {
            said["sinks"] =
                sinks.iter().map(|(name, checked)| ((*name).to_owned(), to_json(checked))).collect();
        }
        return out.json(&said);
    }
    out.line(format!("{}: valid", loaded.source))?;
    out.line("")?;
    out.line(summary(&Started::of(&loaded.config, &loaded.source)).trim_end())?;
    for warning in &loaded.warnings {
        out.line(format!("\nwarning: {warning}"))?;
    }
    if let Some(sinks) = sinks {
        out.line("")?;
        print(&loaded.config, sinks, out)?;
    }
    Ok(())
}

/// Checks all sinks concurrently, and returns the results in the order of their names.
async fn check_sinks(config: &Config) -> anyhow::Result<Vec<(&str, Checked)>> {
    let namespace = Arc::new(Namespace::parse(&config.topics).context("topics")?);
    let streams: BTreeMap<&str, _> = config
        .pipelines
        .values()
        .map(|pipeline| (&*pipeline.from, remembered(config, &pipeline.from)))
        .collect();
    let journaled = journaled(config);
    let checks = config.sinks.iter().map(|(name, sink)| {
        let (namespace, streams, journaled) = (namespace.clone(), &streams, &journaled);
        async move {
            let claims = claims(config, name, streams);
            let mut checked = sink.check(CheckContext { name, namespace, journaled }, claims).await;
            decide(config, name, streams, &mut checked);
            (name.as_str(), checked)
        }
    });
    Ok(join_all(checks).await)
}

/// Returns the positions of sinks without transactions from the data folder.
fn journaled(config: &Config) -> Result<StateEntries, String> {
    let dir = config.broker_dir();
    match data_folder::is_there(&dir).map_err(|error| error.to_string())? {
        true => ReadOnly::open(&dir, Offset(0)).state(POSITIONS_PREFIX).map_err(|error| error.to_string()),
        false => Ok(StateEntries::new()),
    }
}

/// What a stream records about its readers; `None` if the stream does not exist yet.
type Stream = Result<Option<Remembered>, String>;

fn remembered(config: &Config, stream: &str) -> Stream {
    let dir = config.stream_dir(stream);
    if !data_folder::is_there(&dir).map_err(|error| error.to_string())? {
        return Ok(None);
    }
    ReadOnly::open(&dir, Offset(0)).remembered().map_err(|error| error.to_string())
}

/// Returns the claims that a host with this data folder would open on a sink.
fn claims(config: &Config, sink: &str, streams: &BTreeMap<&str, Stream>) -> Vec<Claim> {
    let renamed_from = config.sinks[sink].renamed_from().map(str::to_owned);
    let pipelines = config.pipelines.iter().filter(|(_, pipeline)| pipeline.sinks().contains(sink));
    let claim = |(name, pipeline): (&String, &pipeline::Config)| {
        let Some(Ok(Some(stream))) = streams.get(&*pipeline.from) else { return None };
        let pipelines = names_of(name, &pipeline.renamed_from);
        Some(claim_of(&pipelines, &names_of(sink, &renamed_from), stream.identity))
    };
    pipelines.filter_map(claim).collect()
}

/// Adds why the sink would be held: a table is filled a second time only on request.
fn decide(config: &Config, sink: &str, streams: &BTreeMap<&str, Stream>, checked: &mut Checked) {
    let configured = Arc::new(config.claims());
    for Looked { claim, positions, found } in &checked.claims {
        let Some(Ok(Some(stream))) = streams.get(&*config.pipelines[&claim.pipeline].from) else { continue };
        let consumer_of = |(pipeline, sink): &Name| format!("{pipeline}/{sink}");
        let own = format!("{}/{}", claim.pipeline, claim.sink);
        let consumer = stream.reader(own, claim.formerly.iter().map(consumer_of));
        let begin = FirstStart::new(config.sinks[sink].begin(), stream.begin_now(&consumer));
        if positions.is_empty()
            && let Some(told) = pipeline::other_log(claim, found, begin)
        {
            checked.warnings.push(format!("{}; {}", told.cause, told.advice));
        }
        let beginning = Beginning { begin, configured: Arc::clone(&configured), stream: None };
        let delivered = stream.delivered(&consumer);
        let start = beginning.start(claim, positions.len(), found, delivered, &stream.bounds);
        checked.problems.extend(start.err());
    }
    for (name, pipeline) in &config.pipelines {
        if let Some(Err(error)) = streams.get(&*pipeline.from).filter(|_| pipeline.sinks().contains(sink)) {
            checked.warnings.push(format!(
                "stream {} cannot be read, so that where pipeline {name} begins is not known: {error}",
                pipeline.from
            ));
        }
    }
}

fn to_json(checked: &Checked) -> Value {
    let Checked { found, problems, warnings, .. } = checked;
    json!({ "works": problems.is_empty(), "found": found, "problems": problems, "warnings": warnings })
}

/// Prints one line for a sink that would write, and one for each problem of any other.
fn print(config: &Config, sinks: &[(&str, Checked)], out: &mut Out) -> anyhow::Result<()> {
    for (name, Checked { found, problems, warnings, .. }) in sinks {
        let target = config.sinks.get(*name).map(|sink| sink.describe()).unwrap_or_default();
        let name = format!("sinks.{name}");
        for problem in problems {
            out.line(format!("{name}: does not work: {problem}"))?;
        }
        if problems.is_empty() {
            out.line(format!("{name}: works: {target}, {}", found.join(", ")))?;
        }
        for warning in warnings {
            out.line(format!("{name}: warning: {warning}"))?;
        }
    }
    Ok(())
}
