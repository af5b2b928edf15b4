//! `headworks plugin`: creates, lists, inspects, measures and removes plugins.

use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use bytes::Bytes;
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::args::{Format, PluginCommand};
use super::output::{self, Out, one_line};
use super::{admin_client, plugin_new};
use crate::batch::{Batch, Entry, Offset, Partition, Span, flags};
use crate::config::{self, Config, Loaded};
use crate::hints::Hint;
use crate::plugin::{self, FileState, Inspection, Listed, PluginState, PluginStatus, Runner};
use crate::step::{Attempt, Outcome, Refused, RefusedKind, Step};
use crate::topic::Namespace;

const BATCH_MESSAGES: u64 = 256;
/// Characters of a summary and of topics that fit into 80 columns. `--format json` has all of them.
const SUMMARY_CHARS_MAX: usize = 76;
const TOPICS_CHARS_MAX: usize = 30;

pub fn plugin(command: PluginCommand, out: &mut Out) -> anyhow::Result<()> {
    match command {
        PluginCommand::New { name, sdk } => plugin_new::new(&name, &sdk, out),
        PluginCommand::List { config, format } => {
            list(&config::load(config.config.as_deref())?, format.format, out)
        }
        PluginCommand::Inspect { file, format } => {
            let inspection = plugin::inspect(&file, None)?;
            match format.format {
                Format::Json => out.json(&inspection)?,
                Format::Text => show(&inspection, out)?,
            }
            match inspection.problem {
                Some(problem) => anyhow::bail!("{}: {problem}", file.display()),
                None => Ok(()),
            }
        }
        PluginCommand::Bench { file, plugin_config, messages, topic, payload, format } => {
            let plugin_config = match plugin_config {
                Some(path) => read_config(&path)?,
                None => Value::Null,
            };
            bench(&file, &plugin_config, messages, &topic, payload.as_bytes(), format.format, out)
        }
        PluginCommand::Remove { name, config } => {
            let config = config::load(config.config.as_deref())?.config;
            remove(&config, &name, out)
        }
    }
}

fn remove(config: &Config, name: &str, out: &mut Out) -> anyhow::Result<()> {
    let dir = &config.plugins.dir;
    let listed = plugin::survey(dir, &config.plugin_cache_dir())?;
    let removed = listed.into_iter().filter(|listed| listed.state == FileState::Removed);
    let named = config.pipelines.values().flat_map(|pipeline| pipeline.steps.iter().flatten());
    let missed: Vec<String> =
        removed.map(|listed| listed.name).chain(named.map(|step| step.plugin.clone())).collect();
    let files = plugin::remove(dir, name, &missed)?;
    for file in &files {
        out.line(format!("removed {}", file.display()))?;
    }
    if files.is_empty() {
        out.line(format!(
            "no file of `{name}` is in {}; pipelines that waited for it may go on without it",
            dir.display()
        ))?;
    }
    Ok(())
}

/// One plugin in the output of `--format json`.
#[derive(Serialize)]
struct Line {
    /// Name of the step, as `plugin remove` takes it.
    name: String,
    /// `ready`, `loading`, `failed`, `removed`, or `not-used` if the last good version runs: see
    /// `problem`.
    state: &'static str,
    #[serde(flatten)]
    inspection: Inspection,
    /// Set if the file is used, but probably not as intended.
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<String>,
}

/// The part of `/api/status` that this command reads.
#[derive(Deserialize)]
struct Running {
    plugins: Vec<PluginStatus>,
    pipelines: Vec<RunningPipeline>,
}

#[derive(Deserialize)]
struct RunningPipeline {
    name: String,
    state: String,
    steps_generation: Option<u64>,
    swap_refused: Option<String>,
    #[serde(default)]
    swap_waits: Option<String>,
}

/// Lists the files as the running host sees them, or as they are in the folder if no host runs.
fn list(loaded: &Loaded, format: Format, out: &mut Out) -> anyhow::Result<()> {
    let dir = &loaded.config.plugins.dir;
    let running = match super::block_on(admin_client::get::<Running>(&loaded.config, "/api/status")) {
        Ok(running) => Some(running),
        Err(error) => {
            output::complain(&format!("{error:#}; this is what lies in {}", output::shown(dir)));
            None
        }
    };
    let lines = lines(loaded, running.as_ref())?;
    if format == Format::Json {
        return lines.iter().try_for_each(|line| out.json(line));
    }
    if lines.is_empty() {
        out.line(format!("no plugins in {}: drop a .wasm file in", dir.display()))?;
    } else {
        let head = ["FILE", "NAME", "VERSION", "TOPICS"].map(str::to_owned).to_vec();
        let table: Vec<_> = std::iter::once(head).chain(lines.iter().flat_map(rows)).collect();
        out.table(&table)?;
    }
    for pipeline in running.iter().flat_map(|running| &running.pipelines) {
        let steps = pipeline.steps_generation.map_or("none yet".to_owned(), |number| number.to_string());
        out.line(format!("pipeline {}: steps of generation {steps}, {}", pipeline.name, pipeline.state))?;
        if let Some(reason) = pipeline.swap_refused.as_ref().or(pipeline.swap_waits.as_ref()) {
            out.line(format!("  its newest steps are not used: {reason}"))?;
        }
    }
    Ok(())
}

fn lines(loaded: &Loaded, running: Option<&Running>) -> anyhow::Result<Vec<Line>> {
    let config = &loaded.config;
    let cache = config.plugin_cache_dir();
    let listed = plugin::survey(&config.plugins.dir, &cache)?;
    let known = |name: &str| running?.plugins.iter().find(|plugin| plugin.name == name);
    let mut lines = Vec::new();
    for Listed { name, path, state, note } in &listed {
        let inspect = || {
            plugin::inspect(path, Some(&cache))
                .unwrap_or_else(|error| without_inspection(path, error.to_string()))
        };
        let (state, inspection) = match (state, known(name).map(|plugin| &plugin.state)) {
            (FileState::Refused(reason), _) => ("failed", without_inspection(path, reason.clone())),
            (FileState::Removed, _) => ("removed", without_inspection(path, removed(loaded, name))),
            (FileState::There, Some(PluginState::Loading)) => {
                ("loading", without_inspection(path, "is being loaded".to_owned()))
            }
            (FileState::There, Some(PluginState::Failed(reason))) => {
                let runs = known(name).is_some_and(|plugin| plugin.runs);
                let state = if runs { "not-used" } else { "failed" };
                (state, without_inspection(path, reason.clone()))
            }
            (FileState::There, _) => {
                let inspection = inspect();
                (if inspection.problem.is_some() { "failed" } else { "ready" }, inspection)
            }
        };
        lines.push(Line { name: name.clone(), state, inspection, note: note.clone() });
    }
    // Steps that run on without their file.
    let is_listed = |name: &str| listed.iter().any(|listed| listed.name == name);
    for status in running.iter().flat_map(|running| &running.plugins).filter(|it| !is_listed(&it.name)) {
        if let PluginState::Removed(reason) = &status.state {
            let inspection = without_inspection(&config.plugins.dir.join(&status.file), reason.clone());
            lines.push(Line { name: status.name.clone(), state: "removed", inspection, note: None });
        }
    }
    Ok(lines)
}

fn rows(line: &Line) -> Vec<Vec<String>> {
    let Line { name, state, inspection, note } = line;
    let file = Path::new(&inspection.file).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut rows = vec![match (&inspection.description, &inspection.problem) {
        (_, Some(problem)) if *state == "failed" => vec![file, format!("cannot run: {problem}")],
        (_, Some(problem)) if *state == "not-used" => {
            vec![file, format!("not used, the last good version runs: {problem}")]
        }
        (_, Some(problem)) => vec![file, format!("{state}: {problem}")],
        (Some(plugin), None) => {
            let topics = if plugin.topics.is_empty() { "all".to_owned() } else { plugin.topics.join(" ") };
            vec![file, name.clone(), plugin.version.clone(), one_line(&topics, TOPICS_CHARS_MAX)]
        }
        (None, None) => vec![file],
    }];
    if let (Some(plugin), None) = (&inspection.description, &inspection.problem) {
        let own = if plugin.name == *name { String::new() } else { format!("{}: ", plugin.name) };
        let summary = one_line(&format!("{own}{}", plugin.summary), SUMMARY_CHARS_MAX);
        rows.extend((!summary.is_empty()).then(|| vec![format!("  {summary}")]));
    }
    rows.extend(note.as_ref().map(|note| vec![format!("  {note}")]));
    rows
}

/// Returns which pipelines wait for a removed file, and what to do.
fn removed(loaded: &Loaded, name: &str) -> String {
    let in_folder_mode = loaded.config.pipelines.iter().filter(|(_, pipeline)| pipeline.steps.is_none());
    let waiting: Vec<&str> = in_folder_mode.map(|(name, _)| name.as_str()).collect();
    let holds = match waiting.as_slice() {
        [] => String::new(),
        waiting => format!("{} waits for it; ", waiting.join(", ")),
    };
    let remove = loaded.source.hints().command(Hint::PluginRemove(name));
    format!("{holds}put it back, or run `{remove}` to continue without it")
}

/// Returns the entry of a file that cannot be inspected, so that the others are still listed.
fn without_inspection(file: &Path, problem: String) -> Inspection {
    Inspection { file: file.display().to_string(), problem: Some(problem), ..Inspection::default() }
}

fn show(inspection: &Inspection, out: &mut Out) -> anyhow::Result<()> {
    out.line(format!("file      {} ({} bytes)", inspection.file, inspection.bytes))?;
    out.line(format!("sha256    {}", inspection.sha256))?;
    if let Some(plugin) = &inspection.description {
        out.line(format!("plugin    {} {}", plugin.name, plugin.version))?;
        out.line(format!("summary   {}", plugin.summary))?;
        let topics = if plugin.topics.is_empty() { "all".to_owned() } else { plugin.topics.join(", ") };
        out.line(format!("topics    {topics}"))?;
        if !plugin.config_schema.is_empty() {
            out.line(format!("config    {}", plugin.config_schema))?;
        }
    }
    for name in &inspection.granted {
        out.line(format!("granted   {name}"))?;
    }
    for (name, why) in &inspection.denied {
        out.line(format!("denied    {name}: {why}"))?;
    }
    for name in &inspection.exports {
        out.line(format!("exports   {name}"))?;
    }
    Ok(())
}

fn bench(
    file: &Path,
    plugin_config: &Value,
    messages: u64,
    topic: &str,
    payload: &[u8],
    format: Format,
    out: &mut Out,
) -> anyhow::Result<()> {
    let mut runner = Runner::load(file, plugin_config)?;
    let batch = made_up(topic, payload);
    let rounds = messages.div_ceil(BATCH_MESSAGES);
    // Hidden where stderr is no terminal.
    let progress = ProgressBar::new(rounds * BATCH_MESSAGES)
        .with_style(ProgressStyle::with_template("{bar:40} {pos}/{len} {per_sec}")?);
    let (mut passed, mut dropped, mut refused) = (0, 0, 0);
    let mut first_refusal = None;
    let begin = Instant::now();
    for round in 0..rounds {
        let outcome = runner.run(batch.clone(), Partition(0), Attempt::FIRST);
        passed += outcome.passed.len() as u64;
        dropped += outcome.dropped;
        refused += outcome.refused.len() as u64;
        if let (0, Some(fault)) = (passed + dropped, only_faults(&outcome)) {
            anyhow::bail!(
                "{}: nothing was measured, because the plugin failed on every message: {fault}; choose a \
                 --topic, --payload and --plugin-config that it takes",
                file.display()
            );
        }
        first_refusal =
            first_refusal.or_else(|| outcome.refused.first().map(|refused| refused.reason.clone()));
        if round % 64 == 0 {
            progress.set_position(round * BATCH_MESSAGES);
        }
    }
    let took = begin.elapsed();
    progress.finish_and_clear();
    let count = rounds * BATCH_MESSAGES;
    let ns = took.as_nanos() as f64 / count as f64;
    let per_second = count as f64 / took.as_secs_f64();
    let name = runner.description().name.clone();
    if format == Format::Json {
        return out.json(&json!({
            "plugin": name, "messages": count, "ns_per_message": ns, "messages_per_s": per_second,
            "passed": passed, "dropped": dropped, "refused": refused, "first_refusal": first_refusal,
        }));
    }
    out.line(format!(
        "{name}: {count} messages in {took:.2?}: {ns:.0} ns a message, {per_second:.0} messages/s"
    ))?;
    out.line(format!("passed {passed}, dropped {dropped}, refused {refused}"))?;
    match first_refusal {
        Some(reason) => out.line(format!("the first refusal: {reason}")),
        None => Ok(()),
    }
}

/// Returns the first fault if there were only faults, whose duration says nothing about a plugin.
fn only_faults(outcome: &Outcome) -> Option<&str> {
    let is_fault = |refused: &Refused| refused.kind == RefusedKind::Fault;
    let first = outcome.refused.first().filter(|_| outcome.refused.iter().all(is_fault))?;
    Some(&first.reason)
}

/// Returns one batch of copies of one message.
fn made_up(topic: &str, payload: &[u8]) -> Batch {
    let bytes: Vec<u8> = [topic.as_bytes(), payload].concat();
    let device = Namespace::default().device_span(topic);
    let fits = if device.is_some() { flags::FITS_NAMESPACE } else { 0 };
    let device = device.unwrap_or(0..topic.len().min(crate::topic::DEVICE_ID_BYTES_MAX));
    let entry = Entry {
        flags: 1 | fits,
        received_us: 1_700_000_000_000_000,
        topic: Span::new(0, 0, topic.len()),
        payload: Span::new(0, topic.len(), payload.len()),
        device: Span::new(0, device.start, device.len()),
        ..Entry::default()
    };
    let entries = (0..BATCH_MESSAGES as u32).map(|offset| Entry { offset, ..entry }).collect();
    Batch {
        base: Offset(0),
        now_us: 1_700_000_000_000_000,
        segments: vec![Bytes::from(bytes)],
        entries,
        exclusive: true,
    }
}

fn read_config(path: &Path) -> anyhow::Result<Value> {
    let shown = path.display();
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {shown}"))?;
    crate::yaml::to_json(&text).map_err(|error| anyhow::anyhow!("{shown}: {error}"))
}
