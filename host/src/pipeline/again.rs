//! What became of letters that a redrive took: a mark on each, in the state of
//! the dead letters.
//!
//! A letter is pending from the append of its mark on, until each sink that it
//! names is past it in the pass that the mark names. It is sent then, or open again
//! for the sinks that rejected it as before: no second letter is made of it. A
//! rejection is in the mark before the sink's position covers the letter, as a letter
//! would be.
//!
//! Redrives of 0.1.0 had no passes: they sent a copy of each letter, which lies behind
//! it in the dead letters. What such a redrive left is sent from the copies.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use super::dead_letters::{DeadLetters, Refusal, Source};
use super::letter::{Letter, Names};
use super::routes::SinkNumber;
use crate::batch::{MessageRef, Offset, Partition};
use crate::stream::{Identity, Read, ReadError, StateEntries, Stream};

/// State key of a letter that a redrive took: then its offset, big-endian.
pub const MARK_PREFIX: &[u8] = b"rd";

/// A mark as the state has it.
pub type KeyValue = (Vec<u8>, Vec<u8>);

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mark {
    /// Each sink that it names has it, or another letter has what is left of it.
    Sent,
    Pending(Pending),
    /// These sinks rejected it again, as before.
    Open {
        sinks: BTreeSet<String>,
    },
}

/// A redrive of this pipeline is under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pending {
    pub pipeline: String,
    /// `None`: a redrive of 0.1.0, which sends a copy.
    pub pass: Option<Uuid>,
    /// The sinks that it is sent to, where these are not all that the letter names.
    pub only: Option<BTreeSet<String>>,
    /// Sinks that rejected it so far.
    pub rejected: BTreeSet<String>,
}

/// First byte of the mark of a letter that a pass sends: no text begins with it.
const OF_PASS: u8 = 1;

impl Mark {
    /// Empty for a letter that is sent. `pending` and the pipeline, or `open`, and the
    /// sinks, a line each. For a pass: a byte, its UUID, then lines: the pipeline, the
    /// sinks that it is sent to, those that rejected it.
    pub fn bytes(&self) -> Vec<u8> {
        let lines = |first: [&str; 2], names: &BTreeSet<String>| {
            first
                .into_iter()
                .chain(names.iter().map(String::as_str))
                .collect::<Vec<_>>()
                .join("\n")
                .into_bytes()
        };
        match self {
            Self::Sent => Vec::new(),
            Self::Open { sinks } => lines(["open", ""], sinks),
            Self::Pending(Pending { pipeline, pass: None, rejected, .. }) => {
                lines(["pending", pipeline], rejected)
            }
            Self::Pending(Pending { pipeline, pass: Some(pass), only, rejected }) => {
                let only = only.as_ref().map(joined).unwrap_or_default();
                let text = format!("{pipeline}\n{only}\n{}", joined(rejected));
                [&[OF_PASS], &pass.as_bytes()[..], text.as_bytes()].concat()
            }
        }
    }

    fn read(bytes: &[u8]) -> Self {
        if let Some((&OF_PASS, rest)) = bytes.split_first()
            && let Some((pass, text)) = rest.split_first_chunk()
        {
            let text = String::from_utf8_lossy(text);
            let mut lines = text.split('\n');
            let mut line = || lines.next().unwrap_or_default();
            let (pipeline, only, rejected) = (line().to_owned(), split(line()), split(line()));
            let only = (!only.is_empty()).then_some(only);
            return Self::Pending(Pending { pipeline, pass: Some(Uuid::from_bytes(*pass)), only, rejected });
        }
        let text = String::from_utf8_lossy(bytes);
        let mut lines = text.split('\n');
        let (kind, pipeline) = (lines.next(), lines.next().unwrap_or_default().to_owned());
        let names = lines.map(str::to_owned).collect();
        match kind {
            Some("pending") => Self::Pending(Pending { pipeline, pass: None, only: None, rejected: names }),
            Some("open") => Self::Open { sinks: names },
            _ => Self::Sent,
        }
    }
}

/// Names of sinks have no commas.
fn joined(names: &BTreeSet<String>) -> String {
    names.iter().map(String::as_str).collect::<Vec<_>>().join(",")
}

fn split(names: &str) -> BTreeSet<String> {
    names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// Marks by their letter's offset, from the dead letters' state below [`MARK_PREFIX`].
pub fn marks(state: StateEntries) -> BTreeMap<u64, Mark> {
    let mark = |(key, value): (Vec<u8>, Vec<u8>)| {
        let offset = key.strip_prefix(MARK_PREFIX)?.try_into().ok().map(u64::from_be_bytes)?;
        Some((offset, Mark::read(&value)))
    };
    state.into_iter().filter_map(mark).collect()
}

pub fn mark_key(offset: Offset) -> Vec<u8> {
    [MARK_PREFIX, &offset.0.to_be_bytes()].concat()
}

/// Whether a redrive of the pipeline with these names ended before all it took was sent.
pub fn is_pending(dead_letters: &dyn Stream, pipelines: &[String]) -> bool {
    let of_it = |mark: &Mark| matches!(mark, Mark::Pending(pending) if pipelines.contains(&pending.pipeline));
    marks(dead_letters.state(MARK_PREFIX)).values().any(of_it)
}

/// The letters that one pass sends and that are pending, by the offset of what is sent:
/// the letter itself, or its copy where a redrive of 0.1.0 left one.
pub struct Again {
    names: Names,
    pass: Option<Uuid>,
    sendings: Mutex<BTreeMap<u64, Sending>>,
}

pub struct Sending {
    letter: u64,
    partition: Partition,
    /// Whether a sink refused it, and the name of that sink or step.
    by_sink: bool,
    by: String,
    /// The pipeline's sinks that it goes to.
    names: Vec<SinkNumber>,
    /// It names a sink that the pipeline does not have any more, and waits for it.
    is_kept: bool,
    only: Option<BTreeSet<String>>,
    rejected: BTreeSet<String>,
}

impl Sending {
    pub fn of(
        message: &MessageRef<'_>,
        letter: &Letter<'_>,
        pipeline: &DeadLetters,
        only: Option<&BTreeSet<String>>,
        rejected: &BTreeSet<String>,
    ) -> Self {
        let names = pipeline.names();
        let (by_sink, by) = match letter.source(names) {
            Source::Sink(by) => (true, by),
            Source::Step(by) => (false, by),
        };
        let is_wanted = |name: &str| only.is_none_or(|only| only.contains(name));
        let named = letter.sink.or(letter.sinks).into_iter().flat_map(|names| names.split(','));
        Self {
            letter: letter.redrive_of.unwrap_or(message.offset().0),
            partition: message.entry.partition,
            by_sink,
            by: by.to_owned(),
            names: (0..names.sinks.len())
                .filter(|sink| names.names(letter, *sink) || pipeline.began_behind(letter, *sink))
                .filter(|sink| names.sinks[*sink].iter().any(|name| is_wanted(name)))
                .collect(),
            is_kept: named.filter(|name| is_wanted(name)).any(|name| names.number(name).is_none()),
            only: only.cloned(),
            rejected: rejected.clone(),
        }
    }

    pub fn goes_anywhere(&self) -> bool {
        !self.names.is_empty()
    }
}

/// How many letters ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ended {
    pub sent: u64,
    pub refused: u64,
    pub pending: u64,
}

impl Again {
    /// A pass that has taken nothing yet.
    pub fn begin(names: &Names) -> Self {
        Self::of(names, Some(Uuid::new_v4()), BTreeMap::new())
    }

    fn of(names: &Names, pass: Option<Uuid>, sendings: BTreeMap<u64, Sending>) -> Self {
        Self { names: names.clone(), pass, sendings: Mutex::new(sendings) }
    }

    /// The passes that earlier redrives of a pipeline left.
    pub async fn left(dead_letters: &dyn Stream, pipeline: &DeadLetters) -> Result<Vec<Self>, ReadError> {
        let names = pipeline.names();
        let marks = marks(dead_letters.state(MARK_PREFIX));
        let pending: BTreeMap<u64, Pending> = marks
            .into_iter()
            .filter_map(|(letter, mark)| match mark {
                Mark::Pending(pending) if names.pipelines.contains(&pending.pipeline) => {
                    Some((letter, pending))
                }
                _ => None,
            })
            .collect();
        let bounds = dead_letters.bounds();
        let (Some((first, _)), Some((last, _))) = (pending.first_key_value(), pending.last_key_value())
        else {
            return Ok(Vec::new());
        };
        // Copies may lie anywhere behind.
        let end = match pending.values().any(|pending| pending.pass.is_none()) {
            true => bounds.end,
            false => Offset(last + 1),
        };
        let mut passes: BTreeMap<Option<Uuid>, BTreeMap<u64, (u64, Sending)>> = BTreeMap::new();
        let mut cursor = dead_letters.peek(bounds.start.max(Offset(*first)));
        while cursor.position() < end
            && let Some(read) = cursor.try_next().await?
        {
            let Read::Batch(batch) = read else { continue };
            for message in batch.messages() {
                let Some(letter) = Letter::of(&message) else { continue };
                let at = message.offset().0;
                let Some(pending) = pending.get(&letter.redrive_of.unwrap_or(at)) else { continue };
                if letter.is_copy() != pending.pass.is_none() {
                    continue;
                }
                let sending =
                    Sending::of(&message, &letter, pipeline, pending.only.as_ref(), &pending.rejected);
                // The last of a letter's copies is the one under way.
                passes.entry(pending.pass).or_default().insert(sending.letter, (at, sending));
            }
        }
        let again = |(pass, sendings): (_, BTreeMap<u64, (u64, Sending)>)| {
            Self::of(names, pass, sendings.into_values().collect())
        };
        Ok(passes.into_iter().map(again).collect())
    }

    pub fn pass(&self) -> Option<Uuid> {
        self.pass
    }

    /// The log of a pass, as the sinks' positions name it: each pass begins anew.
    pub fn identity(&self, dead_letters: Identity) -> Identity {
        match self.pass {
            Some(pass) => Identity { log: pass, generation: 0, partitions: dead_letters.partitions },
            None => dead_letters,
        }
    }

    /// The mark of a letter that this pass takes.
    pub fn mark(&self, only: Option<&BTreeSet<String>>) -> Mark {
        self.pending_mark(only.cloned(), BTreeSet::new())
    }

    fn pending_mark(&self, only: Option<BTreeSet<String>>, rejected: BTreeSet<String>) -> Mark {
        Mark::Pending(Pending { pipeline: self.names.pipeline().to_owned(), pass: self.pass, only, rejected })
    }

    /// Their marks are appended.
    pub fn take(&self, sendings: impl IntoIterator<Item = (Offset, Sending)>) {
        self.lock().extend(sendings.into_iter().map(|(offset, sending)| (offset.0, sending)));
    }

    /// Where the first of what it sends lies.
    pub fn start(&self) -> Option<Offset> {
        self.lock().keys().next().copied().map(Offset)
    }

    /// Where what goes to this sink lies, if there is any.
    pub fn range(&self, sink: SinkNumber) -> Option<Range<Offset>> {
        let sendings = self.lock();
        let mut own = sendings.iter().filter(|(_, sending)| sending.names.contains(&sink)).map(|(at, _)| *at);
        let first = own.next()?;
        Some(Offset(first)..Offset(own.next_back().unwrap_or(first) + 1))
    }

    pub fn goes_to(&self, offset: Offset, sink: SinkNumber) -> bool {
        self.lock().get(&offset.0).is_some_and(|sending| sending.names.contains(&sink))
    }

    /// What lies there cannot be read any more; returns how many that are.
    pub fn lose(&self, range: Range<Offset>) -> u64 {
        let mut sendings = self.lock();
        let before = sendings.len();
        sendings.retain(|at, _| !range.contains(&Offset(*at)));
        (before - sendings.len()) as u64
    }

    /// Whether all of a letter is rejected by the step or sink that rejected it before.
    pub fn is_same(&self, refusal: &Refusal<'_>) -> bool {
        let (by_sink, by) = match refusal.source {
            Source::Sink(by) => (true, by),
            Source::Step(by) => (false, by),
        };
        let sendings = self.lock();
        let sending = sendings.get(&refusal.message.offset().0);
        refusal.alone
            && refusal.closes
            && sending.is_some_and(|sending| sending.by_sink == by_sink && sending.by == by)
    }

    /// Keys and values of the marks that say that these sinks rejected these letters.
    pub fn with_rejected(&self, refusals: &[(&Refusal<'_>, Vec<SinkNumber>)]) -> Vec<KeyValue> {
        let sendings = self.lock();
        let mark = |(refusal, names): &(&Refusal<'_>, Vec<SinkNumber>)| {
            let sending = sendings.get(&refusal.message.offset().0)?;
            let names = names.iter().map(|sink| self.names.sink(*sink).to_owned());
            let rejected = sending.rejected.iter().cloned().chain(names).collect();
            Some((
                mark_key(Offset(sending.letter)),
                self.pending_mark(sending.only.clone(), rejected).bytes(),
            ))
        };
        refusals.iter().filter_map(mark).collect()
    }

    /// Their marks are appended.
    pub fn reject(&self, refusals: &[(&Refusal<'_>, Vec<SinkNumber>)]) {
        let mut sendings = self.lock();
        for (refusal, names) in refusals {
            if let Some(sending) = sendings.get_mut(&refusal.message.offset().0) {
                sending.rejected.extend(names.iter().map(|sink| self.names.sink(*sink).to_owned()));
            }
        }
    }

    /// What a sink rejected already.
    pub fn rejected(&self, names: &Names) -> Vec<(Offset, SinkNumber)> {
        let numbers = |rejected: &BTreeSet<String>| {
            rejected.iter().filter_map(|name| names.number(name)).collect::<Vec<_>>()
        };
        let of = |(at, sending): (&u64, &Sending)| {
            let at = Offset(*at);
            numbers(&sending.rejected).into_iter().map(move |sink| (at, sink)).collect::<Vec<_>>()
        };
        self.lock().iter().flat_map(of).collect()
    }

    /// What is to be written of the letters whose sinks are all past them; they are
    /// pending no more. `reached`: by sink, its positions by partition, where they are known.
    pub fn ended(&self, reached: &[Vec<Offset>]) -> (Vec<KeyValue>, Ended) {
        let mut ended = Ended::default();
        let mut changes = Vec::new();
        let mut sendings = self.lock();
        sendings.retain(|at, sending| {
            let is_past = |sink: &SinkNumber| {
                let positions = reached.get(*sink).map_or(&[][..], Vec::as_slice);
                positions.get(usize::from(sending.partition.0)).is_some_and(|position| position.0 > *at)
            };
            if !sending.names.iter().all(is_past) || (sending.is_kept && sending.rejected.is_empty()) {
                return true;
            }
            let mark = if sending.rejected.is_empty() {
                ended.sent += 1;
                Mark::Sent
            } else {
                ended.refused += 1;
                Mark::Open { sinks: sending.rejected.clone() }
            };
            changes.push((mark_key(Offset(sending.letter)), mark.bytes()));
            false
        });
        (changes, ended)
    }

    pub fn pending(&self) -> u64 {
        self.lock().len() as u64
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Sending>> {
        self.sendings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_reads_as_it_was_written_and_an_empty_one_of_the_first_version_is_sent() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        let pending =
            |pass, only, rejected| Mark::Pending(Pending { pipeline: "p".into(), pass, only, rejected });
        for mark in [
            Mark::Sent,
            pending(None, None, names(&[])),
            pending(None, None, names(&["a", "b"])),
            pending(Some(Uuid::from_bytes([b'\n'; 16])), None, names(&[])),
            pending(Some(Uuid::max()), Some(names(&["a", "b"])), names(&["b"])),
            Mark::Open { sinks: names(&["a"]) },
        ] {
            assert_eq!(Mark::read(&mark.bytes()), mark);
        }
        let old = vec![(mark_key(Offset(7)), Vec::new())];
        assert_eq!(marks(old), BTreeMap::from([(7, Mark::Sent)]));
    }
}
