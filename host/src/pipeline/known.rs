//! What is known of the fate of messages: for which sink they have a letter,
//! and how far each sink has taken what the lanes gave it.
//!
//! Both lie behind one lock, so that for each sink the first of these decides:
//! the sink takes what a run of the steps made of a message, or a letter names
//! the sink. Several runs may have the same message at once: lanes, with other
//! versions of a plugin, with steps that fail by chance. [`Known::names`] leaves
//! out a sink that is past the message; [`Known::take`] refuses what a run made
//! without knowing of a letter that another one wrote.

use std::collections::{BTreeSet, VecDeque};

use xxhash_rust::xxh3::xxh3_64;

use super::dead_letters::{Refusal, Source};
use super::routes::SinkNumber;
use crate::batch::{Batch, Offset};
use crate::stream::Ticket;

/// Which of the messages of an offset: a step may make several of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Piece(u64);

impl Piece {
    /// All that was left of the message is in letters: the sink gets no more of it.
    pub const WHOLE: Self = Self(0);

    /// The `index`-th that the step or sink saw.
    pub fn of(source: Source<'_>, index: u32) -> Self {
        let (tag, name) = match source {
            Source::Step(name) => (0, name),
            Source::Sink(name) => (1, name),
        };
        let hash = xxh3_64(name.as_bytes()) ^ xxh3_64(&((u64::from(index) << 1) | tag).to_le_bytes());
        Self(hash.max(1))
    }
}

/// Letters for one sink that a run of the steps knows of, by offset.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen(BTreeSet<(u64, Piece)>);

impl Seen {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn has(&self, offset: Offset, piece: Piece) -> bool {
        self.0.contains(&(offset.0, piece))
    }

    /// Whether all of the message is in letters.
    pub fn has_whole(&self, offset: Offset) -> bool {
        self.has(offset, Piece::WHOLE)
    }

    pub fn add_all(&mut self, mut others: Self) {
        self.0.append(&mut others.0);
    }
}

/// A sink for which the steps run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reader {
    pub sink: SinkNumber,
    pub seen: Seen,
}

/// Another run put a message into a letter for the sink meanwhile: what this
/// one made of it must not become a row.
#[derive(Debug, PartialEq, Eq)]
pub struct Stale;

pub struct Known {
    sinks: Vec<OfSink>,
    /// (offset in the dead letters, offset in the source), in the order of appends.
    pub order: VecDeque<(u64, u64)>,
    /// Letters of messages below it are not here.
    pub floor: u64,
    pub ticket: Ticket,
}

#[derive(Clone, Default)]
struct OfSink {
    letters: BTreeSet<(u64, Piece)>,
    /// By partition: all below is the sink's, or was.
    received: Vec<Offset>,
}

impl Known {
    pub fn new(sinks: usize, partitions: u16) -> Self {
        let none = OfSink { letters: BTreeSet::new(), received: vec![Offset(0); usize::from(partitions)] };
        Self { sinks: vec![none; sinks], order: VecDeque::new(), floor: 0, ticket: Ticket::default() }
    }

    pub fn insert(&mut self, sink: SinkNumber, offset: Offset, piece: Piece) {
        self.sinks[sink].letters.insert((offset.0, piece));
    }

    /// Of keys: one or two for each sink that a letter names.
    pub fn len(&self) -> usize {
        self.sinks.iter().map(|of| of.letters.len()).sum()
    }

    /// The highest offset that has a letter.
    pub fn highest(&self) -> Option<Offset> {
        self.sinks.iter().filter_map(|of| of.letters.last()).map(|(offset, _)| Offset(*offset)).max()
    }

    /// Letters for a sink of the messages from `first` to `last`.
    pub fn seen(&self, sink: SinkNumber, first: Offset, last: Offset) -> Seen {
        Seen(self.sinks[sink].within(first, last).copied().collect())
    }

    /// Which of the readers' sinks a letter must name: those that have not had
    /// the message, and have no letter of it that the run does not know. Who has
    /// this very letter already learns of it.
    pub fn names(&self, refusal: &Refusal<'_>, readers: &mut [Reader]) -> Vec<SinkNumber> {
        let (offset, piece) = (refusal.message.offset(), refusal.piece());
        let by_step = matches!(refusal.source, Source::Step(_));
        let mut names = Vec::new();
        for reader in readers {
            let of = &self.sinks[reader.sink];
            if of.letters.contains(&(offset.0, piece)) {
                reader.seen.0.insert((offset.0, piece));
                continue;
            }
            // A row is in its sink's hands, which is past it therefore.
            let open = !by_step
                || of.received[usize::from(refusal.partition.0)] <= offset
                    && of.within(offset, offset).all(|known| reader.seen.0.contains(known));
            if open {
                names.push(reader.sink);
            }
        }
        names
    }

    /// A letter was written that names these sinks.
    pub fn note(&mut self, refusal: &Refusal<'_>, names: &[SinkNumber], readers: &mut [Reader]) {
        let letter = (refusal.message.offset().0, refusal.piece());
        for sink in names {
            self.insert(*sink, refusal.message.offset(), letter.1);
            if refusal.closes {
                self.insert(*sink, refusal.message.offset(), Piece::WHOLE);
            }
        }
        for reader in readers.iter_mut().filter(|reader| names.contains(&reader.sink)) {
            reader.seen.0.insert(letter);
            if refusal.closes {
                reader.seen.0.insert((letter.0, Piece::WHOLE));
            }
        }
    }

    /// Gives a sink what a run made of messages below `upto`, those of
    /// `partitions` only. Returns which rows (batch, entry) it refused before.
    pub fn take(
        &mut self,
        sink: (SinkNumber, &str),
        batches: &[Batch],
        seen: &Seen,
        partitions: impl Iterator<Item = usize>,
        upto: Offset,
    ) -> Result<Vec<(usize, usize)>, Stale> {
        let (number, name) = sink;
        let of = &mut self.sinks[number];
        let mut refused = Vec::new();
        for (b, batch) in batches.iter().enumerate() {
            let Some(first) = batch.entries.first().map(|entry| batch.offset(entry)) else { continue };
            if of.within(first, upto).next().is_none() {
                continue;
            }
            for (i, entry) in batch.entries.iter().enumerate() {
                let offset = batch.offset(entry);
                let own = Piece::of(Source::Sink(name), index_within_offset(batch, i));
                for letter in of.within(offset, offset) {
                    if letter.1 == own {
                        refused.push((b, i));
                    } else if !seen.0.contains(letter) {
                        return Err(Stale);
                    }
                }
            }
        }
        for partition in partitions {
            of.received[partition] = of.received[partition].max(upto);
        }
        Ok(refused)
    }

    /// A sink begins again at its positions: what lies above is open.
    pub fn set_received(&mut self, sink: SinkNumber, received: &[Offset]) {
        self.sinks[sink].received.copy_from_slice(received);
    }

    pub fn forget_below(&mut self, offset: Offset) {
        self.floor = offset.0;
        for of in &mut self.sinks {
            of.letters = of.letters.split_off(&(offset.0, Piece::WHOLE));
        }
        while self.order.front().is_some_and(|(_, from)| *from < offset.0) {
            self.order.pop_front();
        }
    }
}

impl OfSink {
    fn within(&self, first: Offset, last: Offset) -> impl Iterator<Item = &(u64, Piece)> {
        self.letters.range((first.0, Piece::WHOLE)..=(last.0.max(first.0), Piece(u64::MAX)))
    }
}

/// Place of entry `i` among the entries of its offset.
pub fn index_within_offset(batch: &Batch, i: usize) -> u32 {
    let offset = batch.entries[i].offset;
    batch.entries[..i].iter().rev().take_while(|entry| entry.offset == offset).count() as u32
}

/// How many entries of the same offset are before entry `i`, where none comes
/// after it.
pub fn before_last(batch: &Batch, i: usize) -> Option<usize> {
    let is_last = batch.entries.get(i + 1).is_none_or(|next| next.offset != batch.entries[i].offset);
    is_last.then(|| index_within_offset(batch, i) as usize)
}
