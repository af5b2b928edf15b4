//! What happened to a dead letter's message, in its properties: UTF-8 text,
//! origin `Pipeline`, names that begin with `dead-letter`.

use std::collections::BTreeSet;
use std::sync::Arc;

use uuid::Uuid;

use super::ROUTES_STEP;
use super::dead_letters::{Refusal, Source};
use super::known::Piece;
use super::marks::Mark;
use super::routes::SinkNumber;
use super::sink_names::SinkNames;
use super::step_history::{self, NOTE_BYTES_MAX, StepHistory};
use crate::batch::{MessageRef, Offset};
use crate::properties::{self, Origin, PROPERTIES_BYTES_MAX, PROPERTIES_MAX};
use crate::sinks;
use crate::stream::{Identity, Opening};

const PREFIX: &str = "dead-letter";
const REASON: &str = "dead-letter-reason";
const KIND: &str = "dead-letter-kind";
const PIPELINE: &str = "dead-letter-pipeline";
const STEP: &str = "dead-letter-step";
const SINK: &str = "dead-letter-sink";
/// Names the sinks that have not had the message of a step's letter: `a,b`.
const SINKS: &str = "dead-letter-sinks";
/// The steps that the message of a step's letter has been through, and those ahead of it: see
/// [`StepHistory`].
const STEPS: &str = "dead-letter-steps";
/// Set where nothing else was left of the message, but for earlier letters.
const WHOLE: &str = "dead-letter-whole";
const STREAM: &str = "dead-letter-stream";
const LOG: &str = "dead-letter-log";
const GENERATION: &str = "dead-letter-generation";
const OFFSET: &str = "dead-letter-offset";
const INDEX: &str = "dead-letter-index";
/// Id of the opening of the log that wrote the message, in hexadecimal.
const OPENING: &str = "dead-letter-opening";
/// Says the offset of the letter that a redrive of 0.1.0 made this copy of.
const REDRIVE: &str = "dead-letter-redrive";

const REASON_BYTES_MAX: usize = 4_096;
/// Most properties of ours.
const OURS_MAX: usize = 15;
/// Bytes that a letter takes in an append, beside the message's own bytes and the reason.
const HEADERS_BYTES_ESTIMATE: usize = 1_024;

/// A dead letter's own properties, borrowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Letter<'a> {
    pub reason: &'a str,
    /// `failed`, `fault`, `retries`, `sink`
    pub kind: &'a str,
    pub pipeline: &'a str,
    pub step: Option<&'a str>,
    pub sink: Option<&'a str>,
    /// Sinks of a step's letter; `None`: all of the pipeline, as hosts wrote it that
    /// did not name them.
    pub sinks: Option<&'a str>,
    /// A [`StepHistory`]; `None`: a sink's letter, or the host that wrote it noted none.
    pub steps: Option<&'a str>,
    /// Nothing else was left of the message, but for earlier letters.
    pub whole: bool,
    pub stream: &'a str,
    pub log: Uuid,
    pub generation: u32,
    pub offset: u64,
    pub index: u32,
    /// Opening of the log that wrote the message. `None`: 0.1.0 did not say.
    pub opening: Option<u64>,
    /// Set: a copy of the letter with this offset, of a redrive of 0.1.0; not to be listed.
    pub redrive_of: Option<u64>,
    /// Its own offset, or that of the letter that it is a copy of.
    pub at: u64,
}

impl<'a> Letter<'a> {
    /// `None`: not a dead letter of ours.
    pub fn of(message: &MessageRef<'a>) -> Option<Self> {
        let mut texts = [None; OURS_MAX];
        const NAMES: [&str; OURS_MAX] = [
            REASON, KIND, PIPELINE, STEP, SINK, SINKS, STEPS, WHOLE, STREAM, LOG, GENERATION, OFFSET, INDEX,
            OPENING, REDRIVE,
        ];
        for property in properties::iter(message.properties()) {
            if property.origin == Origin::Pipeline as u8
                && let Some(i) = NAMES.iter().position(|name| *name == property.name)
            {
                texts[i] = std::str::from_utf8(property.value).ok();
            }
        }
        let [
            reason,
            kind,
            pipeline,
            step,
            sink,
            sinks,
            steps,
            whole,
            stream,
            log,
            generation,
            offset,
            index,
            opening,
            redrive,
        ] = texts;
        Some(Self {
            reason: reason?,
            kind: kind?,
            pipeline: pipeline?,
            step,
            sink,
            sinks,
            steps,
            whole: whole.is_some(),
            stream: stream?,
            log: log?.parse().ok()?,
            generation: generation?.parse().ok()?,
            offset: offset?.parse().ok()?,
            index: index?.parse().ok()?,
            opening: opening.and_then(|opening| u64::from_str_radix(opening, 16).ok()),
            redrive_of: redrive.and_then(|offset| offset.parse().ok()),
            at: redrive.and_then(|offset| offset.parse().ok()).unwrap_or(message.offset().0),
        })
    }

    pub fn is_copy(&self) -> bool {
        self.redrive_of.is_some()
    }

    /// Whether it is of a message that this log has. A copy of the log has others at the same
    /// offsets where another opening wrote them.
    pub fn is_from(&self, names: &Names, source: &Identity, openings: &[Opening]) -> bool {
        let is_same = |opening| opening_of(openings, Offset(self.offset)).is_none_or(|own| own == opening);
        names.has(self)
            && self.log == source.log
            && self.generation == source.generation
            && self.opening.is_none_or(is_same)
    }

    /// Names of the sinks that are to have the message when it is sent again; `None`: all of the
    /// pipeline.
    pub fn sink_names(&self) -> Option<impl Iterator<Item = &'a str>> {
        self.sink.or(self.sinks).map(|names| names.split(','))
    }

    /// Who refused it, by the name that it has in `names`.
    pub fn source<'n>(&self, names: &'n Names) -> Source<'n>
    where
        'a: 'n,
    {
        match self.sink {
            Some(sink) => {
                let number = names.named(sink, self.at).find_map(|id| names.number(&id));
                Source::Sink(number.map_or(sink, |number| names.sink(number)))
            }
            None if self.is_by_routes() => Source::Routes,
            None => Source::Step(self.step.unwrap_or_default()),
        }
    }

    /// Whether no step rejected the message, but its route is not one of the pipeline's. A step that has
    /// the name of the routes, which hosts of earlier versions took, was the next one of those ahead.
    fn is_by_routes(&self) -> bool {
        let is_next =
            |history: StepHistory| history.ahead().first().is_some_and(|step| **step == *ROUTES_STEP);
        self.step == Some(ROUTES_STEP) && !self.history().is_some_and(is_next)
    }

    /// What the letter notes of the steps.
    pub fn history(&self) -> Option<StepHistory> {
        StepHistory::read(self.steps?)
    }

    /// Returns the place in `steps` where the message of a step's letter enters, or why it enters
    /// nowhere. `from_step`: the step that a person named for letters that fit nowhere by themselves.
    pub fn entry(&self, from_step: Option<&str>, steps: &[Arc<str>]) -> Result<usize, String> {
        let by_itself = match self.history() {
            Some(history) => history.entry(steps),
            None => step_history::entry_without_history(self.step.unwrap_or_default(), steps),
        };
        match (by_itself, from_step) {
            (Err(_), Some(step)) => {
                let entry = step_history::entry_at(step, steps)?;
                // A person who means the step that rejected it would leave out all that are behind that one.
                let was_a_step = step == ROUTES_STEP && self.step == Some(step) && !self.is_by_routes();
                if was_a_step && entry == steps.len() {
                    return Err(step_history::routes_was_a_step(steps));
                }
                Ok(entry)
            }
            (by_itself, _) => by_itself,
        }
    }

    /// Returns the steps that the message has been through where [`Letter::entry`] is `entry`. Without a
    /// note those are all steps in front of it: there is none, or a person named the place.
    pub fn history_at(&self, entry: usize, steps: &[Arc<str>]) -> StepHistory {
        self.history().unwrap_or_else(|| StepHistory::at(steps, entry))
    }

    pub fn piece(&self, names: &Names) -> Piece {
        Piece::of(self.source(names), self.index)
    }
}

/// The names of a pipeline and its sinks.
#[derive(Clone, Debug)]
pub struct Names {
    /// The name that it has, then those that it had.
    pub pipelines: Vec<String>,
    /// Ids of each sink ([`sink_names`](super::sink_names)); new records carry the first.
    pub sinks: Vec<Vec<String>>,
    /// Name of each sink in the config.
    shown: Vec<String>,
    meanings: Arc<SinkNames>,
    /// How many of the last ids of the first sink are those of a stream whose letters it takes over.
    taken_over: usize,
    /// The stream that the other sinks read, where the pipeline has one: what it gets, they get.
    out: Option<SinkNumber>,
}

impl Names {
    /// `sinks`: as the config names them.
    pub fn new(pipelines: Vec<String>, sinks: Vec<String>, meanings: Arc<SinkNames>) -> Self {
        let ids = sinks.iter().map(|name| meanings.ids(name, u64::MAX)).collect();
        Self { pipelines, sinks: ids, shown: sinks, meanings, taken_over: 0, out: None }
    }

    /// Says which sink is the stream that the others read.
    pub fn with_out(mut self, out: Option<SinkNumber>) -> Self {
        self.out = out;
        self
    }

    /// Gives the only sink of a pipeline the letters for the stream that its sinks read before.
    pub fn taking_over(mut self, out: &str) -> Self {
        let ids = self.meanings.ids(out, u64::MAX);
        if let [only] = &mut self.sinks[..] {
            self.taken_over = ids.len();
            only.extend(ids);
        }
        self
    }

    /// Returns the names without ids that a sink took over: what was sent to a sink is asked by its own ids.
    pub fn own(&self) -> Self {
        let mut own = self.clone();
        if let Some(first) = own.sinks.first_mut() {
            first.truncate(first.len() - own.taken_over);
        }
        own.taken_over = 0;
        own
    }

    pub fn has_out(&self) -> bool {
        self.out.is_some()
    }

    /// Whether a letter is for the stream that a sink reads, and for the sink thereby.
    pub fn is_by_out(&self, letter: &Letter<'_>, sink: SinkNumber) -> bool {
        self.out.is_some_and(|out| out != sink && letter.sinks.is_some() && self.names(letter, out))
    }

    /// Whether a letter with this mark is still to be sent to the stream that the sinks read. `has`: whether that
    /// stream has the letter from a pass.
    pub fn is_open_for_out(&self, mark: Option<&Mark>, has: impl Fn(Uuid) -> bool) -> bool {
        let is_out = |sinks: &BTreeSet<String>| {
            self.out.is_some_and(|out| self.sinks[out].iter().any(|id| sinks.contains(id)))
        };
        match mark {
            None => true,
            Some(Mark::Open { sinks, .. }) => is_out(sinks),
            Some(Mark::Pending(pending)) => {
                pending.only.as_ref().is_none_or(is_out) && pending.pass.is_some_and(|pass| !has(pass))
            }
            Some(Mark::Sent) => false,
        }
    }

    /// Whether a sink is the stream that the others read.
    pub fn is_out(&self, sink: SinkNumber) -> bool {
        self.out == Some(sink)
    }

    pub fn pipeline(&self) -> &str {
        &self.pipelines[0]
    }

    /// The sink's name, which letters get.
    pub fn sink(&self, sink: SinkNumber) -> &str {
        &self.shown[sink]
    }

    /// The sink's id, which marks and records get.
    pub fn id(&self, sink: SinkNumber) -> &str {
        &self.sinks[sink][0]
    }

    /// The sink that has this name.
    pub fn with_name(&self, name: &str) -> Option<SinkNumber> {
        self.shown.iter().position(|shown| shown == name)
    }

    /// The ids that a letter at this offset means by a name.
    pub fn named(&self, name: &str, letter: u64) -> impl Iterator<Item = String> {
        self.meanings.ids(name, letter).into_iter()
    }

    /// Returns what [`SinkNames::is_same`] does.
    pub fn is_same(&self, sink: &str, by: &str, letter: u64) -> bool {
        self.meanings.is_same(sink, by, letter)
    }

    /// Whether a person can mean one of the sinks by this name.
    pub fn is_known(&self, name: &str) -> bool {
        self.meanings.meant(name).iter().any(|id| self.number(id).is_some())
    }

    /// Returns the name that a person knows of the sink with this id.
    pub fn name_of<'n>(&'n self, id: &'n str) -> &'n str {
        self.meanings.name_of(id)
    }

    /// Returns the names of the sinks in the config.
    pub fn shown(&self) -> &[String] {
        &self.shown
    }

    /// Names under which the pipeline's redrives have positions.
    pub fn redrives(&self) -> Vec<String> {
        self.pipelines.iter().map(|name| sinks::redrive_of(name)).collect()
    }

    pub fn has(&self, letter: &Letter<'_>) -> bool {
        self.pipelines.iter().any(|name| name == letter.pipeline)
    }

    /// The sink with this id.
    pub fn number(&self, id: &str) -> Option<SinkNumber> {
        self.sinks.iter().position(|ids| ids.iter().any(|own| own == id))
    }

    /// Whether this sink is to have the message when it is sent again.
    pub fn names(&self, letter: &Letter<'_>, sink: SinkNumber) -> bool {
        let is_it = |name| self.named(name, letter.at).any(|id| self.number(&id) == Some(sink));
        letter.sink_names().is_none_or(|mut names| names.any(is_it))
    }
}

/// What a letter takes at most in an append, before its properties are made;
/// `names_bytes`: of all sinks that it might name.
pub fn bytes_estimate(refusal: &Refusal<'_>, names_bytes: usize) -> usize {
    let message = &refusal.message;
    let own = [message.topic(), message.device(), message.route()].map(str::len).iter().sum::<usize>();
    let texts = refusal.reason.len().min(REASON_BYTES_MAX) + refusal.steps.len().min(NOTE_BYTES_MAX);
    message.payload().len() + message.properties().len() + own + texts + names_bytes + HEADERS_BYTES_ESTIMATE
}

/// The message's own properties, then the letter's. Past the bound the
/// device's own ones go first, then all that are not the letter's; `false`
/// says that some went.
pub fn properties(
    refusal: &Refusal<'_>,
    sinks: &[&str],
    pipeline: &str,
    stream: &str,
    source: &Identity,
    openings: &[Opening],
) -> (Vec<u8>, bool) {
    let mut ours = Vec::with_capacity(512);
    let mut set =
        |name: &str, value: &str| properties::push(&mut ours, Origin::Pipeline, name, value.as_bytes());
    set(REASON, shortened(refusal.reason));
    set(KIND, refusal.kind.as_str());
    set(PIPELINE, pipeline);
    match refusal.source {
        Source::Step(_) | Source::Routes => {
            set(STEP, refusal.source.name());
            set(SINKS, &sinks.join(","));
            if !refusal.steps.is_empty() && refusal.steps.len() <= NOTE_BYTES_MAX {
                set(STEPS, refusal.steps);
            }
        }
        Source::Sink(sink) => set(SINK, sink),
    }
    if refusal.closes {
        set(WHOLE, "yes");
    }
    set(STREAM, stream);
    set(LOG, &source.log.to_string());
    set(GENERATION, &source.generation.to_string());
    set(OFFSET, &refusal.message.offset().0.to_string());
    set(INDEX, &refusal.index.to_string());
    if let Some(opening) = opening_of(openings, refusal.message.offset()) {
        set(OPENING, &format!("{opening:016x}"));
    }
    beside(refusal.message.properties(), &ours)
}

/// The opening that wrote the message at this offset; `None` where the log does not know.
fn opening_of(openings: &[Opening], offset: Offset) -> Option<u64> {
    let opening = openings.iter().rev().find(|opening| opening.first <= offset)?;
    (opening.id != Opening::UNKNOWN).then_some(opening.id)
}

/// The properties that the message had before it was refused.
pub fn without_letter(bytes: &[u8]) -> Vec<u8> {
    kept(bytes, |_| true)
}

fn beside(theirs: &[u8], ours: &[u8]) -> (Vec<u8>, bool) {
    let room = PROPERTIES_BYTES_MAX - ours.len();
    let fits =
        |bytes: &[u8]| bytes.len() <= room && properties::iter(bytes).count() + OURS_MAX <= PROPERTIES_MAX;
    let all = kept(theirs, |_| true);
    if fits(&all) {
        return ([&all, ours].concat(), true);
    }
    let without_device = kept(theirs, |origin| origin != Origin::Device as u8);
    if fits(&without_device) {
        return ([&without_device, ours].concat(), false);
    }
    (ours.to_vec(), false)
}

/// Without an earlier letter's properties, and of the origins that `keep` holds.
fn kept(bytes: &[u8], keep: impl Fn(u8) -> bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    for property in properties::iter(bytes) {
        let letters = property.origin == Origin::Pipeline as u8 && property.name.starts_with(PREFIX);
        if !letters && keep(property.origin) {
            properties::push(&mut out, Origin::of(property.origin), property.name, property.value);
        }
    }
    out
}

/// As much of a reason as a letter has.
pub fn shortened(reason: &str) -> &str {
    &reason[..reason.floor_char_boundary(REASON_BYTES_MAX)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{Batch, Entry, Partition, Span};
    use crate::pipeline::sink_names::NAMES_PREFIX;
    use crate::step::RefusedKind;

    fn batch(properties: Vec<u8>) -> Batch {
        let entry = Entry { properties: Span::new(0, 0, properties.len()), offset: 3, ..Entry::default() };
        Batch { segments: vec![properties.into()], entries: vec![entry].into(), ..Batch::default() }
    }

    fn openings(id: u64) -> [Opening; 1] {
        [Opening { id, first: Offset(2) }]
    }

    fn refuse(properties: Vec<u8>) -> (Vec<u8>, bool) {
        let batch = batch(properties);
        let refusal = Refusal {
            message: batch.message(0),
            source: Source::Sink("warehouse"),
            kind: RefusedKind::Sink,
            reason: "column \"value\": not a number",
            partition: Partition(0),
            index: 1,
            steps: "",
            alone: false,
            closes: false,
        };
        let source = Identity { log: Uuid::nil(), generation: 2, partitions: 1 };
        super::properties(&refusal, &["warehouse"], "telemetry", "readings", &source, &openings(7))
    }

    #[test]
    fn a_letter_says_what_happened_and_gives_the_message_back() {
        let mut theirs = Vec::new();
        properties::push(&mut theirs, Origin::Device, "k", b"v");
        let (bytes, whole) = refuse(theirs.clone());
        assert!(whole && properties::is_valid(&bytes));
        assert_eq!(without_letter(&bytes), theirs);
        let batch = batch(bytes);
        let message = batch.message(0);
        let letter = Letter::of(&message).unwrap();
        assert_eq!((letter.sink, letter.offset, letter.index), (Some("warehouse"), 3, 1));
        assert_eq!((letter.kind, letter.pipeline, letter.generation), ("sink", "telemetry", 2));
        assert!(!letter.is_copy());
        let names = |pipelines: &[&str], sinks: &[&str], state: &str| {
            let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
            let meanings = [("warehouse", state), ("store", "2 warehouse,store")]
                .map(|(name, state)| ([NAMES_PREFIX, name.as_bytes()].concat(), state.into()));
            Names::new(owned(pipelines), owned(sinks), Arc::new(SinkNames::read(&meanings.into())))
        };
        let taken = names(&["telemetry"], &["warehouse", "store"], "2 \n4 warehouse@4");
        assert_eq!(letter.at, 3, "the name was nobody's");
        assert!(!taken.names(&letter, 0) && !taken.names(&letter, 1));
        let names = names(&["readings", "telemetry"], &["lake", "store"], "9 ");
        assert!(names.names(&letter, 1) && !names.names(&letter, 0));
        assert_eq!(letter.source(&names), Source::Sink("store"));
        let source = Identity { log: Uuid::nil(), generation: 2, partitions: 1 };
        assert!(letter.is_from(&names, &source, &openings(7)), "the opening that wrote it");
        assert!(!letter.is_from(&names, &source, &openings(8)), "a copy of the log has another message");
        let newer = [Opening { id: 8, first: Offset(9) }];
        assert!(letter.is_from(&names, &source, &newer), "the log does not remember");
    }

    #[test]
    fn a_letter_is_no_longer_than_its_estimate() {
        let mut theirs = Vec::new();
        properties::push(&mut theirs, Origin::Device, "big", &vec![b'x'; 50_000]);
        let batch = batch(theirs);
        let (reason, steps) = ("r".repeat(10_000), "s".repeat(NOTE_BYTES_MAX));
        let refusal = Refusal {
            message: batch.message(0),
            source: Source::Step("normalize"),
            kind: RefusedKind::Failed,
            reason: &reason,
            partition: Partition(0),
            index: u32::MAX,
            steps: &steps,
            alone: true,
            closes: true,
        };
        let source = Identity { log: Uuid::max(), generation: u32::MAX, partitions: 1 };
        let name = "n".repeat(64);
        let sinks = [&*name; 64];
        let (bytes, whole) = super::properties(&refusal, &sinks, &name, &name, &source, &openings(u64::MAX));
        assert!(whole && bytes.len() + size_of::<Entry>() <= bytes_estimate(&refusal, 64 * 65));
    }

    #[test]
    fn where_room_is_short_the_devices_properties_go_first() {
        let mut theirs = Vec::new();
        properties::push(&mut theirs, Origin::Device, "big", &vec![b'x'; PROPERTIES_BYTES_MAX - 100]);
        properties::push(&mut theirs, Origin::Listener, "client-id", b"dev");
        let (bytes, whole) = refuse(theirs);
        assert!(!whole && properties::is_valid(&bytes));
        assert_eq!(properties::get(&bytes, Origin::Listener, "client-id"), Some(&b"dev"[..]));
        assert!(properties::get(&bytes, Origin::Device, "big").is_none());
    }
}
