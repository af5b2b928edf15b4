//! What became of letters that a redrive took: a mark on each, in the state of
//! the dead letters.
//!
//! A letter is pending from the append of its copy on, until each sink that it
//! names is past the copy. It is sent then, or open again for the sinks that
//! rejected it as before: no second letter is made of it. A rejection is in the
//! mark before the sink's position covers the copy, as a letter would be.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::dead_letters::{Refusal, Source};
use super::letter::Letter;
use super::routes::SinkNumber;
use crate::batch::{Offset, Partition};
use crate::stream::{Read, ReadError, StateEntries, Stream};

/// State key of a letter that a redrive took: then its offset, big-endian.
pub const MARK_PREFIX: &[u8] = b"rd";

/// A mark as the state has it.
pub type KeyValue = (Vec<u8>, Vec<u8>);

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mark {
    /// Each sink that it names has it, or another letter has what is left of it.
    Sent,
    /// A redrive of this pipeline is under way; these sinks rejected it so far.
    Pending { pipeline: String, rejected: BTreeSet<String> },
    /// These sinks rejected it again, as before.
    Open { sinks: BTreeSet<String> },
}

impl Mark {
    /// Empty for a letter that is sent, as 0.1.0 wrote it; else `pending` and the
    /// pipeline, or `open`, and the sinks, a line each.
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
            Self::Pending { pipeline, rejected } => lines(["pending", pipeline], rejected),
            Self::Open { sinks } => lines(["open", ""], sinks),
        }
    }

    fn read(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes);
        let mut lines = text.split('\n');
        let (kind, pipeline) = (lines.next(), lines.next().unwrap_or_default().to_owned());
        let names = lines.map(str::to_owned).collect();
        match kind {
            Some("pending") => Self::Pending { pipeline, rejected: names },
            Some("open") => Self::Open { sinks: names },
            _ => Self::Sent,
        }
    }
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

/// Whether a redrive of this pipeline ended before all it took was sent.
pub fn is_pending(dead_letters: &dyn Stream, pipeline: &str) -> bool {
    let of_it = |mark: &Mark| matches!(mark, Mark::Pending { pipeline: of, .. } if of == pipeline);
    marks(dead_letters.state(MARK_PREFIX)).values().any(of_it)
}

/// The letters of one pipeline that are pending, by the offset of their copies.
pub struct Again {
    pipeline: String,
    sinks: Vec<String>,
    copies: Mutex<BTreeMap<u64, Sending>>,
}

struct Sending {
    letter: u64,
    partition: Partition,
    /// Whether a sink refused it, and the name of that sink or step.
    by_sink: bool,
    by: String,
    /// The pipeline's sinks that it names.
    names: Vec<SinkNumber>,
    /// It names a sink that the pipeline does not have any more: its copy waits for it.
    is_kept: bool,
    rejected: BTreeSet<String>,
}

/// How many letters ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ended {
    pub sent: u64,
    pub refused: u64,
    pub pending: u64,
}

impl Again {
    pub async fn read(
        dead_letters: &dyn Stream,
        pipeline: &str,
        sinks: &[String],
    ) -> Result<Self, ReadError> {
        let mut pending: BTreeMap<u64, BTreeSet<String>> = BTreeMap::new();
        for (letter, mark) in marks(dead_letters.state(MARK_PREFIX)) {
            if let Mark::Pending { pipeline: of, rejected } = mark
                && of == pipeline
            {
                pending.insert(letter, rejected);
            }
        }
        // By letter: the last of its copies is the one under way.
        let mut last = BTreeMap::new();
        let end = dead_letters.bounds().end;
        let mut cursor = dead_letters.peek(dead_letters.bounds().start);
        while !pending.is_empty()
            && cursor.position() < end
            && let Some(read) = cursor.try_next().await?
        {
            let Read::Batch(batch) = read else { continue };
            for message in batch.messages() {
                let Some(letter) = Letter::of(&message) else { continue };
                let Some(rejected) = letter.redrive_of.and_then(|of| pending.get(&of)) else { continue };
                let (by_sink, by) = match letter.source() {
                    Source::Sink(by) => (true, by),
                    Source::Step(by) => (false, by),
                };
                let sending = Sending {
                    letter: letter.redrive_of.unwrap_or_default(),
                    partition: message.entry.partition,
                    by_sink,
                    by: by.to_owned(),
                    names: (0..sinks.len()).filter(|sink| letter.names(&sinks[*sink])).collect(),
                    is_kept: letter
                        .sink
                        .or(letter.sinks)
                        .iter()
                        .flat_map(|names| names.split(','))
                        .any(|name| !sinks.iter().any(|sink| sink == name)),
                    rejected: rejected.clone(),
                };
                last.insert(sending.letter, (message.offset().0, sending));
            }
        }
        let copies = Mutex::new(last.into_values().collect());
        Ok(Self { pipeline: pipeline.to_owned(), sinks: sinks.to_vec(), copies })
    }

    /// Whether all of a copy is rejected by the step or sink that rejected its letter.
    pub fn is_same(&self, refusal: &Refusal<'_>) -> bool {
        let (by_sink, by) = match refusal.source {
            Source::Sink(by) => (true, by),
            Source::Step(by) => (false, by),
        };
        let copies = self.lock();
        let sending = copies.get(&refusal.message.offset().0);
        refusal.alone
            && refusal.closes
            && sending.is_some_and(|sending| sending.by_sink == by_sink && sending.by == by)
    }

    /// Keys and values of the marks that say that these sinks rejected these copies.
    pub fn with_rejected(&self, refusals: &[(&Refusal<'_>, Vec<SinkNumber>)]) -> Vec<KeyValue> {
        let copies = self.lock();
        let mark = |(refusal, names): &(&Refusal<'_>, Vec<SinkNumber>)| {
            let sending = copies.get(&refusal.message.offset().0)?;
            let names = names.iter().map(|sink| self.sinks[*sink].clone());
            let rejected = sending.rejected.iter().cloned().chain(names).collect();
            let mark = Mark::Pending { pipeline: self.pipeline.clone(), rejected };
            Some((mark_key(Offset(sending.letter)), mark.bytes()))
        };
        refusals.iter().filter_map(mark).collect()
    }

    /// Their marks are appended.
    pub fn reject(&self, refusals: &[(&Refusal<'_>, Vec<SinkNumber>)]) {
        let mut copies = self.lock();
        for (refusal, names) in refusals {
            if let Some(sending) = copies.get_mut(&refusal.message.offset().0) {
                sending.rejected.extend(names.iter().map(|sink| self.sinks[*sink].clone()));
            }
        }
    }

    /// Copies that a sink rejected already.
    pub fn rejected(&self, sinks: &[String]) -> Vec<(Offset, SinkNumber)> {
        let numbers = |names: &BTreeSet<String>| {
            names.iter().filter_map(|name| sinks.iter().position(|sink| sink == name)).collect::<Vec<_>>()
        };
        let of = |(copy, sending): (&u64, &Sending)| {
            let copy = Offset(*copy);
            numbers(&sending.rejected).into_iter().map(move |sink| (copy, sink)).collect::<Vec<_>>()
        };
        self.lock().iter().flat_map(of).collect()
    }

    /// What is to be written of the letters whose sinks are all past their copies.
    /// `reached`: by sink, its positions by partition, where they are known.
    pub fn ended(&self, reached: &[Vec<Offset>]) -> (Vec<KeyValue>, Ended) {
        let mut ended = Ended::default();
        let mut changes = Vec::new();
        for (copy, sending) in &*self.lock() {
            let is_past = |sink: &SinkNumber| {
                let positions = reached.get(*sink).map_or(&[][..], Vec::as_slice);
                positions.get(usize::from(sending.partition.0)).is_some_and(|position| position.0 > *copy)
            };
            if !sending.names.iter().all(is_past) || (sending.is_kept && sending.rejected.is_empty()) {
                ended.pending += 1;
                continue;
            }
            let mark = if sending.rejected.is_empty() {
                ended.sent += 1;
                Mark::Sent
            } else {
                ended.refused += 1;
                Mark::Open { sinks: sending.rejected.clone() }
            };
            changes.push((mark_key(Offset(sending.letter)), mark.bytes()));
        }
        (changes, ended)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Sending>> {
        self.copies.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_reads_as_it_was_written_and_an_empty_one_of_the_first_version_is_sent() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        let pending = |rejected| Mark::Pending { pipeline: "p".into(), rejected };
        for mark in [
            Mark::Sent,
            pending(names(&[])),
            pending(names(&["a", "b"])),
            Mark::Open { sinks: names(&["a"]) },
        ] {
            assert_eq!(Mark::read(&mark.bytes()), mark);
        }
        let old = vec![(mark_key(Offset(7)), Vec::new())];
        assert_eq!(marks(old), BTreeMap::from([(7, Mark::Sent)]));
    }
}
