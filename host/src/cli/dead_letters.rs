//! `headworks dead-letters`: rejected messages, each with the part that rejected it and the reason.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use indicatif::ProgressBar;
use serde_json::{Map, Value, json};

use super::args::{DeadLettersCommand, Format, LetterFilter};
use super::output::{Out, one_line, time, unless_closed};
use super::{admin_client, block_on, message, streams};
use crate::admin::{DiscardAnswer, RedriveAnswer, RedriveRequest};
use crate::batch::{Batch, MessageRef, Offset};
use crate::config::{self, Config, DEAD_LETTERS, Loaded};
use crate::hints::{Hint, Hints, Letters};
use crate::pipeline::{MARK_PREFIX, Mark, Marks, NAMES_PREFIX, Reopened, SinkNames, StepHistory};
use crate::plugin;
use crate::properties::{self, Origin};
use crate::stream::Read;
use crate::stream::log::ReadOnly;
use crate::telemetry;

const LISTED_MAX: usize = 50;
const REASON_CHARS_MAX: usize = 120;
/// Most different reasons in a summary. Further ones are counted as one.
const REASONS_MAX: usize = 1_000;
/// Time after which a host has proved its last frame to be durable.
const PROVEN_AFTER: Duration = Duration::from_millis(100);
/// Property of the copies that redrives of earlier versions made, which are not dead letters of their own.
const REDRIVE: &str = "dead-letter-redrive";

pub fn dead_letters(command: DeadLettersCommand, out: &mut Out) -> anyhow::Result<()> {
    match command {
        DeadLettersCommand::Summary { sent, filter, config, format } => {
            let config = config::load(config.config.as_deref())?.config;
            summary(&config, sent, &filter, format.format, out)
        }
        DeadLettersCommand::List { max, sent, filter, config, format } => {
            let config = config::load(config.config.as_deref())?.config;
            list(&config, max.map(NonZeroUsize::get), sent, &filter, format.format, out)
        }
        DeadLettersCommand::Show { id, config, format } => {
            let Loaded { config, source, .. } = config::load(config.config.as_deref())?;
            show(open(&config, Offset(id))?, id, &source.hints(), format.format, out)
        }
        DeadLettersCommand::Redrive {
            ids,
            all: _,
            possible_duplicates,
            from_step,
            filter,
            config,
            format,
        } => {
            let loaded = config::load(config.config.as_deref())?;
            let LetterFilter { pipeline, sink, step } = filter;
            let request = RedriveRequest { ids, pipeline, sink, step, possible_duplicates, from_step };
            block_on(redrive(&loaded, request, format.format, out))
        }
        DeadLettersCommand::Discard { ids, all: _, filter, config } => {
            let loaded = config::load(config.config.as_deref())?;
            let LetterFilter { pipeline, sink, step } = filter;
            let request = RedriveRequest { ids, pipeline, sink, step, ..RedriveRequest::default() };
            discard(&loaded, &request, out)
        }
    }
}

fn discard(loaded: &Loaded, request: &RedriveRequest, out: &mut Out) -> anyhow::Result<()> {
    let posted = admin_client::post(&loaded.config, "/api/dead-letters/discard", request);
    let DiscardAnswer { discarded } = block_on(posted)?;
    if discarded == 0 {
        let list = loaded.source.hints().command(Hint::DeadLettersList);
        bail!("nothing to discard: no open dead letter matches, see `{list}`");
    }
    out.line(format!("{discarded} dead letter{} discarded", if discarded == 1 { "" } else { "s" }))
}

fn open(config: &Config, from: Offset) -> anyhow::Result<Option<ReadOnly>> {
    streams::must_be_there(config)?;
    streams::open(config, DEAD_LETTERS, from)
}

/// What redrives did with a dead letter.
#[derive(Clone, Copy, Default)]
struct Became<'m> {
    mark: Option<&'m Mark>,
    /// How often the same part rejected the dead letter again.
    again: u32,
    /// Reason of the last rejection, if it differs from the dead letter's own.
    reason: Option<&'m str>,
}

impl<'m> Became<'m> {
    fn of(marks: &'m Marks, id: u64) -> Self {
        let mark = marks.get(id);
        let tries = mark.map(Mark::tries).unwrap_or_default();
        Self { mark, again: tries.count, reason: marks.reasons().text(tries) }
    }

    /// Returns the reason of the last rejection.
    fn reason(&self, letter: &MessageRef<'_>) -> String {
        self.reason.map_or_else(|| property(letter, "reason"), str::to_owned)
    }
}

/// Passes each matching dead letter to `take`, with what redrives did with it. Returns how many were
/// left out because they were sent again.
fn each(
    config: &Config,
    with_sent: bool,
    filter: &LetterFilter,
    mut take: impl FnMut(&MessageRef<'_>, &Became<'_>, &SinkNames) -> anyhow::Result<()>,
) -> anyhow::Result<u64> {
    let mut letters = open(config, Offset(0))?;
    let marks = marks_of(letters.as_ref())?;
    let sinks = sink_names(letters.as_ref())?;
    let (mut hidden, mut has_waited) = (0, false);
    let mut names = Names::default();
    while let Some(batch) = next_batch(letters.as_mut(), &mut has_waited)? {
        for letter in batch.messages() {
            names.add(&letter);
            if !is_wanted(&letter, filter, &sinks) {
                continue;
            }
            let became = Became::of(&marks, letter.offset().0);
            match became.mark {
                Some(Mark::Sent) if !with_sent => hidden += 1,
                _ => take(&letter, &became, &sinks)?,
            }
        }
    }
    names.check(config, filter)?;
    Ok(hidden)
}

/// Names in dead letters, including those of parts that the config no longer has.
#[derive(Default)]
struct Names {
    pipelines: BTreeSet<String>,
    sinks: BTreeSet<String>,
    steps: BTreeSet<String>,
}

impl Names {
    fn add(&mut self, letter: &MessageRef<'_>) {
        for (names, property_name) in
            [(&mut self.pipelines, "pipeline"), (&mut self.sinks, "sink"), (&mut self.steps, "step")]
        {
            let name = property(letter, property_name);
            if !name.is_empty() && !names.contains(&name) {
                names.insert(name);
            }
        }
    }

    /// Fails if the filter has a name that neither the config nor a dead letter has.
    fn check(mut self, config: &Config, filter: &LetterFilter) -> anyhow::Result<()> {
        self.pipelines.extend(config.pipelines.keys().cloned());
        self.sinks.extend(config.sinks.keys().cloned());
        self.sinks.extend(config.written_streams().into_iter().map(str::to_owned));
        let steps = config.pipelines.values().flat_map(|pipeline| pipeline.steps.iter().flatten());
        self.steps.extend(steps.map(|step| step.step_name().to_owned()));
        let of_folder = config.pipelines.values().any(|pipeline| pipeline.steps.is_none());
        if of_folder && filter.step.as_ref().is_some_and(|step| !self.steps.contains(step)) {
            let listed = plugin::survey(&config.plugins.dir, &config.plugin_cache_dir()).unwrap_or_default();
            self.steps.extend(listed.into_iter().map(|listed| listed.name));
        }
        for (wanted, known, kind) in [
            (&filter.pipeline, &self.pipelines, "pipeline"),
            (&filter.sink, &self.sinks, "sink"),
            (&filter.step, &self.steps, "step"),
        ] {
            if let Some(wanted) = wanted
                && !known.contains(wanted)
            {
                let known: Vec<&str> = known.iter().map(String::as_str).collect();
                bail!("no {kind} \"{wanted}\", known are {}", known.join(", "));
            }
        }
        Ok(())
    }
}

fn list(
    config: &Config,
    max: Option<usize>,
    with_sent: bool,
    filter: &LetterFilter,
    format: Format,
    out: &mut Out,
) -> anyhow::Result<()> {
    let mut found = 0_u64;
    let mut kept: VecDeque<Listed> = VecDeque::new();
    let max = max.or((format == Format::Text).then_some(LISTED_MAX));
    let hidden = each(config, with_sent, filter, |letter, became, sinks| {
        found += 1;
        match (format, max) {
            (Format::Json, None) => out.json(&to_json(letter, became))?,
            (Format::Json, Some(_)) => kept.push_back(Listed::Json(to_json(letter, became))),
            (Format::Text, _) => kept.push_back(Listed::Text(lines(letter, became, sinks))),
        }
        if max.is_some_and(|max| kept.len() > max) {
            kept.pop_front();
        }
        Ok(())
    })?;
    let shown = kept.len() as u64;
    for letter in kept {
        match letter {
            Listed::Json(letter) => out.json(&letter)?,
            Listed::Text(Lines { head, what, reason }) => {
                out.flow(0, &head)?;
                out.flow(4, &what)?;
                out.paragraph(4, &reason)?;
            }
        }
    }
    if format == Format::Json {
        return Ok(());
    }
    if found > shown {
        out.line(format!("\n{} older ones: --max {found} shows all", found - shown))?;
    }
    say_hidden(found, hidden, out)
}

enum Listed {
    Json(Map<String, Value>),
    Text(Lines),
}

struct Lines {
    head: Vec<String>,
    what: Vec<String>,
    reason: String,
}

/// Prints how many dead letters were left out, below the list or instead of it.
fn say_hidden(shown: u64, hidden: u64, out: &mut Out) -> anyhow::Result<()> {
    match (shown, hidden) {
        (0, 0) => out.line("no dead letters"),
        (0, _) => out.line(format!(
            "no dead letters but {hidden} that were sent again or discarded: --sent shows them"
        )),
        (_, 0) => Ok(()),
        _ => out.line(format!("\n{hidden} more were sent again or discarded: --sent shows them")),
    }
}

/// One reason in the output of `dead-letters summary`.
struct Reason {
    count: u64,
    /// The newest dead letter with this reason.
    newest: Map<String, Value>,
}

fn summary(
    config: &Config,
    with_sent: bool,
    filter: &LetterFilter,
    format: Format,
    out: &mut Out,
) -> anyhow::Result<()> {
    let mut reasons: HashMap<[String; 3], Reason> = HashMap::new();
    let mut found = 0;
    let hidden = each(config, with_sent, filter, |letter, became, _| {
        found += 1;
        let pipeline = property(letter, "pipeline");
        let mut key = [pipeline.clone(), refused_by(letter), telemetry::alike(&became.reason(letter))];
        if reasons.len() >= REASONS_MAX && !reasons.contains_key(&key) {
            key = [pipeline, String::new(), String::new()];
        }
        let newest = to_json(letter, became);
        let count = reasons.get(&key).map_or(0, |reason| reason.count) + 1;
        reasons.insert(key, Reason { count, newest });
        Ok(())
    })?;
    let mut sorted: Vec<_> = reasons.into_iter().collect();
    sorted.sort_by(|(a, x), (b, y)| (y.count, a).cmp(&(x.count, b)));
    for ([pipeline, refused_by, alike], Reason { count, newest }) in sorted {
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let is_rest = alike.is_empty();
        let reason = if is_rest { "other reasons".to_owned() } else { text(&newest["refused"]["reason"]) };
        if format == Format::Json {
            out.json(&json!({
                "count": count, "pipeline": pipeline, "refused_by": refused_by, "reason": reason,
                "newest": { "id": newest["id"], "received": newest["received"], "device": newest["device"], "topic": newest["topic"] },
            }))?;
            continue;
        }
        out.head(&format!("{count}  {refused_by} of pipeline {pipeline}"))?;
        out.paragraph(4, &reason)?;
        let [id, received, device, topic] =
            ["id", "received", "device", "topic"].map(|name| text(&newest[name]));
        out.flow(4, &[format!("newest: {id}"), received, format!("device {device}"), topic])?;
    }
    if format == Format::Json { Ok(()) } else { say_hidden(found, hidden, out) }
}

/// Shows one dead letter. `letters` reads from `id` on.
fn show(
    mut letters: Option<ReadOnly>,
    id: u64,
    hints: &Hints,
    format: Format,
    out: &mut Out,
) -> anyhow::Result<()> {
    let missing =
        || format!("no dead letter {id}: `{}` shows what there is", hints.command(Hint::DeadLettersList));
    let batch = next_batch(letters.as_mut(), &mut false)?.with_context(missing)?;
    let any = LetterFilter::default();
    let sinks = sink_names(letters.as_ref())?;
    let mut letters_of = batch.messages().filter(|letter| is_wanted(letter, &any, &sinks));
    let letter = letters_of.find(|letter| letter.offset() == Offset(id)).with_context(missing)?;
    let marks = marks_of(letters.as_ref())?;
    let became = Became::of(&marks, id);
    let mark = became.mark;
    if format == Format::Json {
        return out.json(&to_json(&letter, &became));
    }
    let mut fields: Vec<(String, String)> = vec![
        ("id".into(), id.to_string()),
        ("sent again".into(), sent_again(mark).into()),
        ("reason".into(), became.reason(&letter)),
        ("refused by".into(), refused_by(&letter)),
        ("first refused".into(), time(letter.batch.now_us)),
        ("for sinks".into(), for_sinks(&letter, mark, &sinks)),
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
    if became.again > 0 {
        fields.push(("refused again".into(), times(became.again)));
    }
    if became.reason.is_some() {
        fields.push(("first reason".into(), property(&letter, "reason")));
    }
    fields.extend(step_fields(&letter));
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
        out.field(&name, width, &one_line(&value, usize::MAX))?;
    }
    out.line(format!("\n{}", message::payload_whole(letter.payload())))
}

async fn redrive(
    loaded: &Loaded,
    request: RedriveRequest,
    format: Format,
    out: &mut Out,
) -> anyhow::Result<()> {
    // Hidden where stderr is no terminal.
    let progress = ProgressBar::new_spinner().with_message("sending again");
    progress.enable_steady_tick(Duration::from_millis(120));
    let answer = admin_client::post(&loaded.config, "/api/dead-letters/redrive", &request).await;
    progress.finish_and_clear();
    let answer: RedriveAnswer = answer?;
    let is_nothing = is_nothing(&answer);
    unless_closed(match format {
        Format::Json => out.json(&answer),
        Format::Text if !is_nothing => out.line(redriven(&answer)),
        Format::Text if request.ids.is_empty() => out.line("nothing to send: no open dead letter matches"),
        Format::Text => Ok(()),
    })?;
    let list = loaded.source.hints().command(Hint::DeadLettersList);
    if is_nothing && !request.ids.is_empty() {
        bail!("nothing to send: no open dead letter has such an id, see `{list}`");
    }
    if answer.letters_possible_duplicates > 0 {
        bail!("{}", possible_duplicates(answer.letters_possible_duplicates, &loaded.source.hints()));
    }
    if !answer.failed.is_empty() {
        bail!("not all could be sent: {}", answer.failed.join("; "));
    }
    if is_all_refused(&answer) {
        bail!("all were refused again: `{list}` shows by whom and why");
    }
    Ok(())
}

fn is_nothing(answer: &RedriveAnswer) -> bool {
    let became_something = answer.letters_sent
        + answer.letters_refused
        + answer.letters_pending
        + answer.letters_sent_before
        + answer.letters_possible_duplicates;
    became_something == 0 && answer.failed.is_empty()
}

/// Returns the hint for dead letters that are only sent on request.
fn possible_duplicates(count: u64, hints: &Hints) -> String {
    let (letters, are) = if count == 1 { ("dead letter", "is") } else { ("dead letters", "are") };
    format!(
        "{count} {letters} {are} not sent that may be rows already, all or in part: another copy of this data folder \
         may have sent them, or a step was removed in the middle of their redrive; `{}` marks them; look for their rows, then send them all the same with `{}`, or close them with `{}`",
        hints.command(Hint::DeadLettersList),
        hints.command(Hint::RedrivePossibleDuplicates),
        hints.command(Hint::Discard(Letters::All)),
    )
}

/// Describes what a redrive did, by dead letter, and its rows.
fn redriven(answer: &RedriveAnswer) -> String {
    let count = |n: u64, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
    let mut line = format!(
        "{} sent, {} written; {} refused again, {} pending",
        count(answer.letters_sent, "dead letter"),
        count(answer.sent, "row"),
        answer.letters_refused,
        answer.letters_pending
    );
    if answer.letters_sent_before > 0 {
        let letters = count(answer.letters_sent_before, "dead letter");
        line += &format!("; {letters} sent before by another copy of this data folder, and closed");
    }
    if answer.letters_new > 0 {
        line += &format!("; {} of another step or sink", count(answer.letters_new, "new dead letter"));
    }
    line
}

/// Returns whether each dead letter is open again, or was replaced by another one.
fn is_all_refused(answer: &RedriveAnswer) -> bool {
    answer.letters_refused + answer.letters_new > 0
        && answer.sent == 0
        && answer.letters_sent <= answer.letters_new
}

/// Returns the next readable messages. Damaged and removed ones are skipped.
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

fn is_wanted(letter: &MessageRef<'_>, filter: &LetterFilter, sinks: &SinkNames) -> bool {
    let fits = |wanted: &Option<String>, name: &str| {
        wanted.as_ref().is_none_or(|wanted| property(letter, name) == *wanted)
    };
    let is_by = |wanted: &String| {
        let by = property(letter, "sink");
        !by.is_empty() && sinks.is_same(wanted, &by, letter.offset().0)
    };
    properties::get(letter.properties(), Origin::Pipeline, REDRIVE).is_none()
        && fits(&filter.pipeline, "pipeline")
        && filter.sink.as_ref().is_none_or(is_by)
        && fits(&filter.step, "step")
}

/// Returns what redrives did with dead letters.
fn marks_of(letters: Option<&ReadOnly>) -> anyhow::Result<Marks> {
    let state = letters.map(|letters| letters.state(MARK_PREFIX)).transpose()?;
    Ok(Marks::read(&state.unwrap_or_default()))
}

/// Returns the meaning of sinks' names in dead letters.
fn sink_names(letters: Option<&ReadOnly>) -> anyhow::Result<SinkNames> {
    let state = letters.map(|letters| letters.state(NAMES_PREFIX)).transpose()?;
    Ok(SinkNames::read(&state.unwrap_or_default()))
}

fn sent_again(mark: Option<&Mark>) -> &'static str {
    match mark {
        Some(Mark::Sent) => "yes, or discarded",
        Some(Mark::Pending { .. }) => "pending",
        Some(Mark::Open { why: Reopened::Lost, .. }) => "yes, and a database has lost it",
        Some(Mark::Open { why: Reopened::Rejected(_), .. }) => "refused again",
        Some(Mark::Open { why: Reopened::PossibleDuplicate, .. }) => {
            "perhaps, all or in part: by another copy of this data folder, or by a redrive during which steps were \
             removed"
        }
        None => "no",
    }
}

/// Returns the lines that show the rejecting part, the message and the reason.
fn lines(letter: &MessageRef<'_>, became: &Became<'_>, sinks: &SinkNames) -> Lines {
    let (id, mark) = (letter.offset().0, became.mark);
    let mut lines = Lines {
        head: vec![
            match mark {
                Some(Mark::Sent) => format!("{id} (closed)"),
                Some(Mark::Pending { .. }) => format!("{id} (pending)"),
                mark if is_possible_duplicate(mark) => format!("{id} (possible duplicate)"),
                Some(Mark::Open { .. }) | None => id.to_string(),
            },
            time(letter.entry.received_us),
            format!("{} of pipeline {}", refused_by(letter), property(letter, "pipeline")),
            format!("for {}", for_sinks(letter, mark, sinks)),
        ],
        what: vec![format!("device {}", letter.device()), letter.topic().to_owned()],
        reason: became.reason(letter),
    };
    if became.again > 0 {
        lines.head.push(format!("refused again {}", times(became.again)));
    }
    lines
}

fn times(count: u32) -> String {
    if count == 1 { "once".to_owned() } else { format!("{count} times") }
}

fn is_possible_duplicate(mark: Option<&Mark>) -> bool {
    matches!(mark, Some(Mark::Open { why: Reopened::PossibleDuplicate, .. }))
}

fn refused_by(letter: &MessageRef<'_>) -> String {
    match (property(letter, "step"), property(letter, "sink")) {
        (step, _) if !step.is_empty() => format!("step {step}"),
        (_, sink) => format!("sink {sink}"),
    }
}

/// Returns the steps that the message of a step's dead letter has passed, and those ahead of it.
fn step_fields(letter: &MessageRef<'_>) -> Vec<(String, String)> {
    if property(letter, "step").is_empty() {
        return Vec::new();
    }
    let Some(history) = history(letter) else {
        return vec![("steps passed".into(), "not noted".into())];
    };
    let joined = |steps: &[Arc<str>]| if steps.is_empty() { "none".to_owned() } else { steps.join(", ") };
    vec![("steps passed".into(), joined(history.passed())), ("steps ahead".into(), joined(history.ahead()))]
}

/// Returns the recorded steps; `None` for a sink's dead letter, or if none were recorded.
fn history(letter: &MessageRef<'_>) -> Option<StepHistory> {
    StepHistory::read(&property(letter, "steps"))
}

/// Returns the current names of the sinks to which a redrive sends the message.
fn for_sinks(letter: &MessageRef<'_>, mark: Option<&Mark>, names: &SinkNames) -> String {
    let ids: Vec<String> = match mark {
        Some(Mark::Open { sinks, .. }) => sinks.iter().cloned().collect(),
        _ => {
            let named = [property(letter, "sinks"), property(letter, "sink")].join(",");
            let named = named.split(',').filter(|name| !name.is_empty());
            named.flat_map(|name| names.ids(name, letter.offset().0)).collect()
        }
    };
    if ids.is_empty() {
        // Written by a host that did not name them.
        return "all".to_owned();
    }
    let now: BTreeSet<&str> = ids.iter().map(|id| names.name_of(id)).collect();
    now.into_iter().collect::<Vec<_>>().join(", ")
}

fn to_json(letter: &MessageRef<'_>, became: &Became<'_>) -> Map<String, Value> {
    let mark = became.mark;
    let mut all = message::to_json(letter);
    all.insert("sent_again".into(), (mark == Some(&Mark::Sent)).into());
    all.insert("pending".into(), matches!(mark, Some(Mark::Pending { .. })).into());
    all.insert("possible_duplicate".into(), is_possible_duplicate(mark).into());
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
    refused.insert("at".into(), time(letter.batch.now_us).into());
    refused.insert("again".into(), became.again.into());
    if let Some(reason) = became.reason {
        refused.insert("first_reason".into(), property(letter, "reason").into());
        refused.insert("reason".into(), reason.into());
    }
    let sinks = property(letter, "sinks");
    if !sinks.is_empty() {
        refused.insert("sinks".into(), sinks.split(',').collect());
    }
    if let Some(history) = history(letter) {
        let array = |steps: &[Arc<str>]| steps.iter().map(|step| &**step).collect::<Value>();
        refused.insert("steps_passed".into(), array(history.passed()));
        refused.insert("steps_ahead".into(), array(history.ahead()));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{Entry, Span};

    #[test]
    fn a_redrive_says_what_became_of_letters_and_fails_where_all_are_letters_again() {
        let answer = |letters_sent, sent, letters_refused, letters_new| RedriveAnswer {
            letters_sent,
            sent,
            letters_refused,
            letters_new,
            ..RedriveAnswer::default()
        };
        for (answer, said, is_failure) in [
            (answer(2, 4, 0, 0), "2 dead letters sent, 4 rows written; 0 refused again, 0 pending", false),
            // A step dropped the message, or the table had its row.
            (answer(1, 0, 8, 0), "1 dead letter sent, 0 rows written; 8 refused again, 0 pending", false),
            (answer(0, 0, 8, 0), "0 dead letters sent, 0 rows written; 8 refused again, 0 pending", true),
            (
                answer(1, 0, 0, 1),
                "1 dead letter sent, 0 rows written; 0 refused again, 0 pending; 1 new dead letter of another step or sink",
                true,
            ),
        ] {
            assert_eq!((redriven(&answer).as_str(), is_all_refused(&answer)), (said, is_failure));
        }
    }

    #[test]
    fn a_letter_says_why_it_was_refused_the_last_time_and_at_first() {
        let mut bytes = Vec::new();
        for (name, value) in [("reason", "no table"), ("step", "check"), ("pipeline", "telemetry")] {
            properties::push(&mut bytes, Origin::Pipeline, &format!("dead-letter-{name}"), value.as_bytes());
        }
        let properties = Span::new(0, 0, bytes.len());
        let entries = vec![Entry { properties, ..Entry::default() }].into();
        let batch = Batch { segments: vec![bytes.into()], entries, now_us: 1, ..Batch::default() };
        let letter = batch.message(0);
        let first = Became::default();
        let again = Became { again: 2, reason: Some("no column"), ..first };
        for (became, reason, first_reason) in
            [(first, "no table", None), (again, "no column", Some("no table"))]
        {
            let json = to_json(&letter, &became);
            assert_eq!(json["refused"]["reason"], reason);
            assert_eq!(json["refused"]["first_reason"].as_str(), first_reason);
            assert_eq!(json["refused"]["at"], time(1));
            assert_eq!(json["refused"]["again"], became.again);
            let lines = lines(&letter, &became, &SinkNames::default());
            assert_eq!(lines.reason, reason);
            let is_told = lines.head.contains(&"refused again 2 times".to_owned());
            assert_eq!(is_told, first_reason.is_some(), "{:?}", lines.head);
        }
    }

    #[test]
    fn a_letter_of_a_step_shows_the_steps_that_its_message_has_been_through_and_those_ahead() {
        for (noted, passed, ahead, fields) in [
            (
                Some("a,b;check"),
                json!(["a", "b"]),
                json!(["check"]),
                "steps passed: a, b; steps ahead: check",
            ),
            (Some(";check"), json!([]), json!(["check"]), "steps passed: none; steps ahead: check"),
            (None, Value::Null, Value::Null, "steps passed: not noted"),
        ] {
            let mut bytes = Vec::new();
            for (name, value) in [("step", Some("check")), ("steps", noted)] {
                let value = value.unwrap_or_default().as_bytes();
                properties::push(&mut bytes, Origin::Pipeline, &format!("dead-letter-{name}"), value);
            }
            let properties = Span::new(0, 0, bytes.len());
            let entries = vec![Entry { properties, ..Entry::default() }].into();
            let batch = Batch { segments: vec![bytes.into()], entries, ..Batch::default() };
            let letter = batch.message(0);
            let text = step_fields(&letter).into_iter().map(|(name, value)| format!("{name}: {value}"));
            assert_eq!(text.collect::<Vec<_>>().join("; "), fields);
            let json = to_json(&letter, &Became::default());
            assert_eq!(
                (&json["refused"]["steps_passed"], &json["refused"]["steps_ahead"]),
                (&passed, &ahead)
            );
        }
    }

    #[test]
    fn letters_that_another_copy_of_the_folder_sent_or_may_have_sent_are_told() {
        let sent = RedriveAnswer { letters_sent_before: 2, ..RedriveAnswer::default() };
        assert!(
            redriven(&sent)
                .ends_with("; 2 dead letters sent before by another copy of this data folder, and closed")
        );
        assert!(!is_nothing(&sent) && !is_all_refused(&sent));
        let perhaps = RedriveAnswer { letters_possible_duplicates: 1, ..RedriveAnswer::default() };
        assert!(!is_nothing(&perhaps));
        let said = possible_duplicates(1, &Hints::default());
        assert!(said.contains("1 dead letter is not sent"), "{said}");
        assert!(said.contains("`headworks dead-letters redrive --all --possible-duplicates`"), "{said}");
        let mark = Mark::Open { sinks: BTreeSet::new(), why: Reopened::PossibleDuplicate, to: None };
        assert!(is_possible_duplicate(Some(&mark)) && sent_again(Some(&mark)).starts_with("perhaps"));
    }
}
