//! `headworks dead-letters`: refused messages, each with who refused it and why.

use std::collections::HashSet;
use std::time::Duration;

use anyhow::{Context, bail};
use indicatif::ProgressBar;
use serde_json::{Map, Value};

use super::args::{DeadLettersCommand, Format, LetterFilter};
use super::output::{Out, one_line, time};
use super::{admin_client, block_on, message, streams};
use crate::admin::{RedriveAnswer, RedriveRequest};
use crate::batch::{Batch, MessageRef, Offset};
use crate::config::{self, Config, DEAD_LETTERS};
use crate::pipeline::{DONE_PREFIX, sent_again};
use crate::properties::{self, Origin};
use crate::stream::Read;
use crate::stream::log::ReadOnly;

const REASON_CHARS_MAX: usize = 120;
const SINKS_CHARS_MAX: usize = 40;
/// By then a host has proven the last frame that it wrote.
const PROVEN_AFTER: Duration = Duration::from_millis(100);
/// Set on the copies that a redrive makes; they are not letters of their own.
const REDRIVE: &str = "dead-letter-redrive";

pub fn dead_letters(command: DeadLettersCommand, out: &mut Out) -> anyhow::Result<()> {
    match command {
        DeadLettersCommand::List { max, sent, filter, config, format } => {
            let config = config::load(config.config.as_deref())?.config;
            list(open(&config, Offset(0))?, max.get(), sent, &filter, format.format, out)
        }
        DeadLettersCommand::Show { id, config, format } => {
            let config = config::load(config.config.as_deref())?.config;
            show(open(&config, Offset(id))?, id, format.format, out)
        }
        DeadLettersCommand::Redrive { ids, all: _, filter, config, format } => {
            let config = config::load(config.config.as_deref())?.config;
            let LetterFilter { pipeline, sink, step } = filter;
            block_on(redrive(&config, RedriveRequest { ids, pipeline, sink, step }, format.format, out))
        }
    }
}

fn open(config: &Config, from: Offset) -> anyhow::Result<Option<ReadOnly>> {
    streams::must_be_there(config)?;
    streams::open(config, DEAD_LETTERS, from)
}

/// `letters` reads from the first one on; `with_sent`: also those that were sent again.
fn list(
    mut letters: Option<ReadOnly>,
    max: usize,
    with_sent: bool,
    filter: &LetterFilter,
    format: Format,
    out: &mut Out,
) -> anyhow::Result<()> {
    let mut rows: std::collections::VecDeque<Vec<String>> = std::collections::VecDeque::new();
    let mut lines: std::collections::VecDeque<Map<String, Value>> = std::collections::VecDeque::new();
    let (mut found, mut hidden) = (0_u64, 0_u64);
    let mut has_waited = false;
    let sent = sent_offsets(letters.as_ref())?;
    while let Some(batch) = next_batch(letters.as_mut(), &mut has_waited)? {
        for letter in batch.messages().filter(|letter| is_wanted(letter, filter)) {
            let is_sent = sent.contains(&letter.offset().0);
            if is_sent && !with_sent {
                hidden += 1;
                continue;
            }
            found += 1;
            match format {
                Format::Text => rows.push_back(row(&letter, is_sent)),
                Format::Json => lines.push_back(to_json(&letter, is_sent)),
            }
            if rows.len() > max {
                rows.pop_front();
            }
            if lines.len() > max {
                lines.pop_front();
            }
        }
    }
    match format {
        Format::Json => lines.iter().try_for_each(|line| out.json(line)),
        Format::Text if rows.is_empty() && hidden == 0 => out.line("no dead letters"),
        Format::Text if rows.is_empty() => {
            out.line(format!("no dead letters but {hidden} that were sent again: --sent shows them"))
        }
        Format::Text => {
            let head = ["ID", "TIME", "PIPELINE", "REFUSED BY", "FOR SINKS", "DEVICE", "TOPIC", "REASON"];
            let shown = rows.len() as u64;
            let mut table = vec![head.map(str::to_owned).to_vec()];
            table.extend(rows);
            out.table(&table)?;
            if found > shown {
                out.line(format!("\n{} older ones: --max {found} shows all", found - shown))?;
            }
            if hidden > 0 {
                out.line(format!("\n{hidden} more were sent again: --sent shows them"))?;
            }
            Ok(())
        }
    }
}

/// `letters` reads from `id` on.
fn show(mut letters: Option<ReadOnly>, id: u64, format: Format, out: &mut Out) -> anyhow::Result<()> {
    let missing = || format!("no dead letter {id}: `headworks dead-letters list` shows what there is");
    let batch = next_batch(letters.as_mut(), &mut false)?.with_context(missing)?;
    let any = LetterFilter::default();
    let mut letters_of = batch.messages().filter(|letter| is_wanted(letter, &any));
    let letter = letters_of.find(|letter| letter.offset() == Offset(id)).with_context(missing)?;
    let is_sent = sent_offsets(letters.as_ref())?.contains(&id);
    if format == Format::Json {
        return out.json(&to_json(&letter, is_sent));
    }
    let mut fields: Vec<(String, String)> = vec![
        ("id".into(), id.to_string()),
        ("sent again".into(), if is_sent { "yes" } else { "no" }.into()),
        ("reason".into(), property(&letter, "reason")),
        ("refused by".into(), refused_by(&letter)),
        ("for sinks".into(), for_sinks(&letter)),
        ("kind".into(), property(&letter, "kind")),
        ("pipeline".into(), property(&letter, "pipeline")),
        (
            "message".into(),
            format!("stream {}, offset {}", property(&letter, "stream"), property(&letter, "offset")),
        ),
        ("received".into(), time(letter.entry.received_us)),
        ("topic".into(), letter.topic().to_owned()),
        ("device".into(), letter.device().to_owned()),
    ];
    if !letter.route().is_empty() {
        fields.push(("route".into(), letter.route().to_owned()));
    }
    for p in properties::iter(letter.properties()) {
        if !(p.origin == Origin::Pipeline as u8 && p.name.starts_with("dead-letter-")) {
            let value = message::payload_line(p.value);
            fields.push((format!("property {}", one_line(p.name, REASON_CHARS_MAX)), value));
        }
    }
    let width = fields.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    for (name, value) in fields {
        let value: String = value.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        out.line(format!("{}  {value}", out.bold(&format!("{name:width$}"))))?;
    }
    out.line(format!("\n{}", message::payload_whole(letter.payload())))
}

async fn redrive(
    config: &Config,
    request: RedriveRequest,
    format: Format,
    out: &mut Out,
) -> anyhow::Result<()> {
    // Hidden where stderr is no terminal.
    let progress = ProgressBar::new_spinner().with_message("sending again");
    progress.enable_steady_tick(Duration::from_millis(120));
    let answer = admin_client::post(config, "/api/dead-letters/redrive", &request).await;
    progress.finish_and_clear();
    let answer: RedriveAnswer = answer?;
    if format == Format::Json {
        out.json(&answer)?;
    } else if answer.sent + answer.refused == 0 && answer.failed.is_empty() {
        out.line("nothing to send: no such letters, or they were sent again before")?;
    } else {
        out.line(format!("{} written, {} refused again", answer.sent, answer.refused))?;
    }
    if !answer.failed.is_empty() {
        bail!("not all could be sent, try again later: {}", answer.failed.join("; "));
    }
    Ok(())
}

/// The next messages that are there; damaged or trimmed ones are passed over.
fn next_batch(letters: Option<&mut ReadOnly>, has_waited: &mut bool) -> anyhow::Result<Option<Batch>> {
    let Some(letters) = letters else {
        return Ok(None);
    };
    loop {
        match letters.read()? {
            Some(Read::Batch(batch)) => return Ok(Some(batch)),
            Some(Read::Gap { .. }) => {}
            // A running host proves its last letters durable in the file a moment after it wrote them.
            None if !*has_waited => {
                *has_waited = true;
                std::thread::sleep(PROVEN_AFTER);
            }
            None => return Ok(None),
        }
    }
}

fn is_wanted(letter: &MessageRef<'_>, filter: &LetterFilter) -> bool {
    let fits = |wanted: &Option<String>, name: &str| {
        wanted.as_ref().is_none_or(|wanted| property(letter, name) == *wanted)
    };
    properties::get(letter.properties(), Origin::Pipeline, REDRIVE).is_none()
        && fits(&filter.pipeline, "pipeline")
        && fits(&filter.sink, "sink")
        && fits(&filter.step, "step")
}

/// Letters that a redrive took, whatever became of them.
fn sent_offsets(letters: Option<&ReadOnly>) -> anyhow::Result<HashSet<u64>> {
    let state = letters.map(|letters| letters.state(DONE_PREFIX)).transpose()?;
    Ok(sent_again(state.unwrap_or_default()))
}

fn row(letter: &MessageRef<'_>, is_sent: bool) -> Vec<String> {
    vec![
        if is_sent { format!("{} (sent)", letter.offset().0) } else { letter.offset().0.to_string() },
        time(letter.entry.received_us),
        property(letter, "pipeline"),
        refused_by(letter),
        one_line(&for_sinks(letter), SINKS_CHARS_MAX),
        one_line(letter.device(), 40),
        one_line(letter.topic(), 60),
        one_line(&property(letter, "reason"), REASON_CHARS_MAX),
    ]
}

fn refused_by(letter: &MessageRef<'_>) -> String {
    match (property(letter, "step"), property(letter, "sink")) {
        (step, _) if !step.is_empty() => format!("step {step}"),
        (_, sink) => format!("sink {sink}"),
    }
}

/// The sinks that have not had the message: where a redrive sends it.
fn for_sinks(letter: &MessageRef<'_>) -> String {
    match (property(letter, "sinks"), property(letter, "sink")) {
        (names, _) if !names.is_empty() => names.replace(',', ", "),
        (_, sink) if !sink.is_empty() => sink,
        // Written by a host that did not name them.
        _ => "all".to_owned(),
    }
}

fn to_json(letter: &MessageRef<'_>, is_sent: bool) -> Map<String, Value> {
    let mut all = message::to_json(letter);
    all.insert("sent_again".into(), is_sent.into());
    if let Some(id) = all.remove("offset") {
        all.insert("id".into(), id);
    }
    let mut refused = Map::new();
    for name in
        ["reason", "kind", "pipeline", "step", "sink", "stream", "log", "generation", "offset", "index"]
    {
        let value = property(letter, name);
        let number = matches!(name, "generation" | "offset" | "index").then(|| value.parse::<u64>().ok());
        match number.flatten() {
            Some(number) => refused.insert(name.into(), number.into()),
            None if value.is_empty() => None,
            None => refused.insert(name.into(), value.into()),
        };
    }
    let sinks = property(letter, "sinks");
    if !sinks.is_empty() {
        refused.insert("sinks".into(), sinks.split(',').collect());
    }
    if let Some(Value::Array(properties)) = all.get_mut("properties") {
        properties.retain(|p| !p["name"].as_str().is_some_and(|name| name.starts_with("dead-letter-")));
    }
    all.insert("refused".into(), refused.into());
    all
}

fn property(letter: &MessageRef<'_>, name: &str) -> String {
    let value = properties::get(letter.properties(), Origin::Pipeline, &format!("dead-letter-{name}"));
    value.map(String::from_utf8_lossy).unwrap_or_default().into_owned()
}
