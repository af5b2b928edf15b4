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
use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::dead_letters::{Refusal, Source};
use super::outlet::HandedOut;
use super::pass_letters::Part;
use super::routes::SinkNumber;
use crate::batch::{Batch, Offset};
use crate::stream::Ticket;

/// Remembered letters below which it is not worth while to tidy.
const ORDER_MIN: usize = 1_024;

/// Which of the messages of an offset: a step may make several of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Piece {
    /// Hash of the step or sink that saw it.
    by: u64,
    /// Among those that it saw.
    index: u32,
}

impl Piece {
    /// All that was left of the message is in letters: the sink gets no more of it. The first in order.
    pub const WHOLE: Self = Self { by: 0, index: 0 };
    const LAST: Self = Self { by: u64::MAX, index: u32::MAX };

    /// The `index`-th that the step or sink saw.
    pub fn of(source: Source<'_>, index: u32) -> Self {
        let tag = match source {
            Source::Step(_) => 0,
            Source::Sink(_) => 1,
            Source::Routes => 2,
        };
        Self { by: xxh3_64_with_seed(source.name().as_bytes(), tag).max(1), index }
    }

    /// Whether this step or sink saw it.
    pub fn is_of(self, source: Source<'_>) -> bool {
        self.by == Self::of(source, 0).by
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

    /// Whether any of the message is in letters.
    pub fn has_any(&self, offset: Offset) -> bool {
        self.0.range((offset.0, Piece::WHOLE)..).next().is_some_and(|(first, _)| *first == offset.0)
    }

    /// Whether all of the message is in letters.
    pub fn has_whole(&self, offset: Offset) -> bool {
        self.has(offset, Piece::WHOLE)
    }

    /// How much of a message is in letters.
    pub fn part_of(&self, offset: Offset) -> Option<Part> {
        let mut of_message = self.0.range((offset.0, Piece::WHOLE)..=(offset.0, Piece::LAST));
        let has_any = of_message.next().is_some();
        has_any.then(|| if self.has_whole(offset) { Part::All } else { Part::Some })
    }

    pub fn pieces(&self) -> impl Iterator<Item = Piece> {
        self.0.iter().map(|(_, piece)| *piece)
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
/// one made of it must not become a row. Or the sink is cut from its lane.
#[derive(Debug, PartialEq, Eq)]
pub struct Stale;

pub struct Known {
    sinks: Vec<OfSink>,
    /// Letters that some sink may still meet again, in the order of appends, among
    /// others that none will: see [`Known::tidy`].
    order: VecDeque<Remembered>,
    /// What the letters of steps in `order` hold.
    held: Room,
    /// Length of `order` when it was last tidied.
    tidied: usize,
    pub ticket: Ticket,
}

#[derive(Clone, Default)]
struct OfSink {
    letters: BTreeSet<(u64, Piece)>,
    /// Offset, by partition, below which the sink has taken everything.
    received: Vec<Offset>,
    /// Letters of messages below it are not here.
    floor: u64,
    /// How far the lane that serves the sink has handed out; `None`: no lane does.
    served: Option<Arc<HandedOut>>,
    /// Takes nothing before another lane serves it.
    is_cut: bool,
    /// Offset, by partition, from which on messages come to it by another stream: it takes none of them
    /// here, and no letter names it.
    until: Option<Vec<Offset>>,
    /// Bytes of the letters that the sink itself wrote since its last commit.
    uncommitted_bytes: u64,
}

/// What letters hold of the room for those that some sink may still meet again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// One for each letter and sink that it names.
    pub keys: usize,
    pub bytes: u64,
}

/// A letter in the dead letters.
#[derive(Clone, Copy, Debug)]
pub struct Remembered {
    /// Its offset there.
    pub at: u64,
    /// The offset of its message in the source.
    pub from: u64,
    /// A bit for each sink that it names.
    pub names: u64,
    /// Whether a step rejected the message, not a sink.
    pub by_step: bool,
    pub bytes: u64,
}

impl Remembered {
    pub fn names_of(sinks: &[SinkNumber]) -> u64 {
        sinks.iter().fold(0, |names, sink| names | 1 << sink)
    }

    /// What it holds of the room for letters of steps.
    fn room(&self) -> Room {
        match self.by_step {
            true => Room { keys: self.names.count_ones() as usize, bytes: self.bytes },
            false => Room::default(),
        }
    }
}

impl Known {
    pub fn new(sinks: usize, partitions: u16) -> Self {
        let none = OfSink { received: vec![Offset(0); usize::from(partitions)], ..OfSink::default() };
        Self {
            sinks: vec![none; sinks],
            order: VecDeque::new(),
            held: Room::default(),
            tidied: 0,
            ticket: Ticket::default(),
        }
    }

    pub fn insert(&mut self, sink: SinkNumber, offset: Offset, piece: Piece) {
        self.sinks[sink].letters.insert((offset.0, piece));
    }

    /// Room that the letters of steps hold. Some of it may be needed no more: see
    /// [`Self::tidy`].
    pub fn held(&self) -> Room {
        self.held
    }

    /// Bytes of the letters that a sink wrote since its last commit.
    pub fn uncommitted_bytes(&mut self, sink: SinkNumber) -> &mut u64 {
        &mut self.sinks[sink].uncommitted_bytes
    }

    /// Names the lane that serves a sink, by how far it has handed out.
    pub fn serve(&mut self, sink: SinkNumber, lane: Option<Arc<HandedOut>>) {
        let of = &mut self.sinks[sink];
        of.is_cut &= lane.is_none();
        of.served = lane;
    }

    /// Lets no sink take anything more of what the lanes made so far.
    pub fn cut(&mut self) {
        self.sinks.iter_mut().for_each(|of| of.is_cut = true);
    }

    /// Returns by partition the highest offset below which some sink has received everything. `begun`:
    /// where each sink began in the source. One that is still there has skipped what lies before, and
    /// received nothing.
    pub fn received(&self, begun: &[Offset]) -> Vec<Offset> {
        let own = |of: &OfSink, begun: Offset| -> Vec<Offset> {
            of.received.iter().map(|at| if *at == begun { Offset(0) } else { *at }).collect()
        };
        fold(self.sinks.iter().zip(begun).map(|(of, begun)| own(of, *begun)), Offset::max)
    }

    /// Returns by partition the offset below which each of these sinks has received everything, or
    /// skipped it.
    pub fn received_by_all(&self, sinks: &[SinkNumber]) -> Vec<Offset> {
        fold(sinks.iter().map(|sink| self.sinks[*sink].received.clone()), Offset::min)
    }

    /// Whether room for the letters of steps comes back without a worker that waits
    /// for it: some sink is not past a letter that its lane has handed out, or has a
    /// letter and no lane. All other letters are of messages that a lane has still to
    /// hand out; a worker that waited for those would wait for itself, or for
    /// another worker that waits as well.
    pub fn room_comes(&self) -> bool {
        self.sinks.iter().any(OfSink::gives_room)
    }

    /// The sinks that [`Self::room_comes`] from, those with most letters first.
    pub fn holders(&self) -> Vec<SinkNumber> {
        let mut holders: Vec<_> =
            (0..self.sinks.len()).filter(|sink| self.sinks[*sink].gives_room()).collect();
        holders.sort_by_key(|sink| std::cmp::Reverse(self.sinks[*sink].letters.len()));
        holders
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
        let by_step = !matches!(refusal.source, Source::Sink(_));
        let mut names = Vec::new();
        for reader in readers {
            let of = &self.sinks[reader.sink];
            if of.letters.contains(&(offset.0, piece)) {
                reader.seen.0.insert((offset.0, piece));
                continue;
            }
            // A row is in its sink's hands, which is past it therefore.
            let partition = usize::from(refusal.partition.0);
            let open = !by_step
                || of.received[partition] <= offset
                    && of.is_its(partition, offset)
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
        if of.is_cut {
            return Err(Stale);
        }
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
            of.received[partition] = of.received[partition].max(of.bounded(partition, upto));
        }
        Ok(refused)
    }

    /// Says from where on messages come to a sink by another stream; `None`: all come here.
    pub fn set_until(&mut self, sink: SinkNumber, until: Option<Vec<Offset>>) {
        self.sinks[sink].until = until;
    }

    /// Whether a message of a partition comes to a sink here.
    pub fn is_its(&self, sink: SinkNumber, partition: usize, offset: Offset) -> bool {
        self.sinks[sink].is_its(partition, offset)
    }

    /// A sink begins again at its positions: what lies above is open.
    pub fn set_received(&mut self, sink: SinkNumber, received: &[Offset]) {
        self.sinks[sink].received.copy_from_slice(received);
    }

    /// Messages below `offset` do not come to this sink again. Another one, which
    /// lags behind, keeps the letters that name it and no others.
    pub fn forget_below(&mut self, sink: SinkNumber, offset: Offset) {
        let of = &mut self.sinks[sink];
        of.floor = offset.0;
        of.letters = of.letters.split_off(&(offset.0, Piece::WHOLE));
        while let Some(first) = self.order.front().filter(|letter| !is_needed(&self.sinks, letter)) {
            self.held.give_back(first.room());
            self.order.pop_front();
        }
        if self.order.len() > 2 * self.tidied + ORDER_MIN {
            self.tidy();
        }
    }

    /// Takes the letters out of `order` that no sink meets again.
    pub fn tidy(&mut self) {
        let Self { sinks, order, held, tidied, .. } = self;
        order.retain(|letter| {
            let needed = is_needed(sinks, letter);
            if !needed {
                held.give_back(letter.room());
            }
            needed
        });
        *tidied = order.len();
    }

    pub fn remember(&mut self, letters: impl IntoIterator<Item = Remembered>) {
        for letter in letters {
            self.held.take(letter.room());
            self.order.push_back(letter);
        }
    }

    /// Replaces what is remembered by `letters`, which were read from the dead letters
    /// up to `read_to`; what was appended behind it stays.
    pub fn remember_anew(&mut self, letters: VecDeque<Remembered>, read_to: u64) {
        let appended: Vec<_> = self.order.drain(..).filter(|letter| letter.at >= read_to).collect();
        self.held = Room::default();
        self.remember(letters.into_iter().chain(appended));
    }

    /// The oldest letter that is remembered, by its offset in the dead letters.
    pub fn oldest(&self) -> Option<Offset> {
        self.order.front().map(|letter| Offset(letter.at))
    }

    pub fn floor(&self, sink: SinkNumber) -> u64 {
        self.sinks[sink].floor
    }

    /// Forgets the letters of messages below `floor`, and that the sink ever was past
    /// messages at or above it.
    pub fn set_floor(&mut self, sink: SinkNumber, floor: u64) {
        let of = &mut self.sinks[sink];
        of.floor = floor;
        of.letters = of.letters.split_off(&(floor, Piece::WHOLE));
    }
}

impl Room {
    fn take(&mut self, room: Self) {
        self.keys += room.keys;
        self.bytes += room.bytes;
    }

    fn give_back(&mut self, room: Self) {
        self.keys -= room.keys;
        self.bytes -= room.bytes;
    }
}

/// Combines offsets by partition.
fn fold(
    offsets: impl Iterator<Item = Vec<Offset>>,
    of_two: impl Fn(Offset, Offset) -> Offset,
) -> Vec<Offset> {
    let both = |a: Vec<Offset>, b: Vec<Offset>| a.into_iter().zip(b).map(|(a, b)| of_two(a, b)).collect();
    offsets.reduce(both).unwrap_or_default()
}

fn is_needed(sinks: &[OfSink], letter: &Remembered) -> bool {
    let needs = |(sink, of): (usize, &OfSink)| letter.names & 1 << sink != 0 && letter.from >= of.floor;
    sinks.iter().enumerate().any(needs)
}

impl OfSink {
    fn is_its(&self, partition: usize, offset: Offset) -> bool {
        self.until.as_ref().is_none_or(|until| offset < until[partition])
    }

    fn bounded(&self, partition: usize, upto: Offset) -> Offset {
        self.until.as_ref().map_or(upto, |until| upto.min(until[partition]))
    }

    fn gives_room(&self) -> bool {
        let handed_out = self.served.as_ref().map_or(u64::MAX, |lane| lane.all_below().0);
        self.letters.first().is_some_and(|(offset, _)| *offset < handed_out)
    }

    fn within(&self, first: Offset, last: Offset) -> impl Iterator<Item = &(u64, Piece)> {
        self.letters.range((first.0, Piece::WHOLE)..=(last.0.max(first.0), Piece::LAST))
    }
}

/// Place of entry `i` among the entries of its offset.
pub fn index_within_offset(batch: &Batch, i: usize) -> u32 {
    batch.index_within_offset(i)
}

/// How many entries of the same offset are before entry `i`, where none comes
/// after it.
pub fn before_last(batch: &Batch, i: usize) -> Option<usize> {
    let is_last = batch.entries.get(i + 1).is_none_or(|next| next.offset != batch.entries[i].offset);
    is_last.then(|| index_within_offset(batch, i) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{Entry, Partition};
    use crate::step::RefusedKind;

    /// A message of each offset.
    fn batch(offsets: &[u32]) -> Batch {
        let entries = offsets.iter().map(|offset| Entry { offset: *offset, ..Entry::default() });
        Batch { segments: vec![bytes::Bytes::new()], entries: entries.collect(), ..Batch::default() }
    }

    fn refusal(batch: &Batch, entry: usize, closes: bool) -> Refusal<'_> {
        Refusal {
            message: batch.message(entry),
            source: Source::Step("check"),
            kind: RefusedKind::Failed,
            reason: "no",
            partition: Partition(0),
            index: index_within_offset(batch, entry),
            steps: "",
            alone: before_last(batch, entry) == Some(0),
            closes,
        }
    }

    fn readers() -> [Reader; 2] {
        [0, 1].map(|sink| Reader { sink, ..Reader::default() })
    }

    fn take(known: &mut Known, seen: &Seen, batch: &Batch, upto: u64) -> Result<usize, Stale> {
        let refused = known.take((1, "b"), std::slice::from_ref(batch), seen, 0..1, Offset(upto))?;
        Ok(batch.len() - refused.len())
    }

    #[test]
    fn a_letter_names_the_sinks_that_are_not_past_its_message() {
        let mut known = Known::new(2, 1);
        let batch = batch(&[3, 4, 5]);
        take(&mut known, &Seen::default(), &batch, 5).unwrap();
        assert_eq!(known.names(&refusal(&batch, 1, true), &mut readers()), [0]);
        assert_eq!(known.names(&refusal(&batch, 2, true), &mut readers()), [0, 1]);
        // What it took is open again once it goes back to its position.
        known.set_received(1, &[Offset(4)]);
        assert_eq!(known.names(&refusal(&batch, 1, true), &mut readers()), [0, 1]);
    }

    #[test]
    fn a_sink_that_has_got_nothing_yet_has_received_nothing_of_what_it_skipped() {
        let mut known = Known::new(2, 2);
        let begun = [Offset(0), Offset(90)];
        known.set_received(0, &[Offset(3), Offset(7)]);
        known.set_received(1, &[Offset(90), Offset(90)]);
        assert_eq!(known.received(&begun), [Offset(3), Offset(7)]);
        assert_eq!(known.received_by_all(&[1]), [Offset(90), Offset(90)], "where it goes on");
        known.set_received(1, &[Offset(90), Offset(95)]);
        assert_eq!(known.received(&begun), [Offset(3), Offset(95)]);
    }

    #[test]
    fn what_a_run_made_that_does_not_know_of_a_letter_is_not_taken() {
        let mut known = Known::new(2, 1);
        let batch = batch(&[3, 4, 5]);
        let mut writers = readers();
        known.note(&refusal(&batch, 1, true), &[1], &mut writers);
        assert_eq!(take(&mut known, &Seen::default(), &batch, 6), Err(Stale));
        // Nothing was taken, then.
        assert_eq!(known.names(&refusal(&batch, 2, true), &mut readers()), [0, 1]);
        assert_eq!(take(&mut known, &writers[1].seen, &batch, 6), Ok(3));
        assert!(writers[0].seen.is_empty() && known.seen(0, Offset(0), Offset(9)).is_empty());
    }

    #[test]
    fn a_run_that_refuses_the_same_makes_no_second_letter_and_knows_of_the_first() {
        let mut known = Known::new(2, 1);
        let batch = batch(&[3]);
        known.note(&refusal(&batch, 0, true), &[0, 1], &mut []);
        let mut readers = readers();
        assert!(known.names(&refusal(&batch, 0, true), &mut readers).is_empty());
        assert!(readers.iter().all(|reader| reader.seen.has_whole(Offset(3))));
        // Of another step, without knowing of it: the letter that is there has the message.
        let other = Refusal { source: Source::Step("parse"), alone: false, ..refusal(&batch, 0, true) };
        assert!(known.names(&other, &mut self::readers()).is_empty());
    }

    #[test]
    fn pieces_of_a_message_have_letters_of_their_own_until_none_is_left() {
        let mut known = Known::new(2, 1);
        let batch = batch(&[3, 3]);
        let mut readers = readers();
        known.note(&refusal(&batch, 0, false), &[1], &mut readers);
        assert!(!readers[1].seen.has_whole(Offset(3)));
        assert_eq!(known.names(&refusal(&batch, 1, true), &mut readers), [0, 1]);
        known.note(&refusal(&batch, 1, true), &[1], &mut readers);
        assert!(readers[1].seen.has_whole(Offset(3)) && !readers[0].seen.has_whole(Offset(3)));
        known.forget_below(1, Offset(4));
        assert_eq!(known.highest(), None);
    }

    #[test]
    fn a_sink_that_lags_keeps_only_the_letters_that_name_it() {
        let mut known = Known::new(2, 1);
        let letter = |at, sinks: &[SinkNumber]| Remembered {
            at,
            from: at,
            names: Remembered::names_of(sinks),
            by_step: true,
            bytes: 10,
        };
        known.remember([letter(0, &[0, 1]), letter(1, &[1]), letter(2, &[1]), letter(3, &[0])]);
        known.forget_below(1, Offset(4));
        let room = |keys, bytes| Room { keys, bytes };
        assert_eq!((known.oldest(), known.held()), (Some(Offset(0)), room(5, 40)), "sink 0 needs the first");
        known.tidy();
        assert_eq!((known.oldest(), known.held()), (Some(Offset(0)), room(3, 20)));
        known.forget_below(0, Offset(1));
        assert_eq!((known.oldest(), known.held()), (Some(Offset(3)), room(1, 10)));
    }

    #[test]
    fn room_comes_from_what_a_lane_has_handed_out_and_from_a_sink_without_a_lane() {
        let mut known = Known::new(2, 1);
        assert!(!known.room_comes());
        known.insert(1, Offset(5), Piece::WHOLE);
        assert_eq!(known.holders(), [1], "it has no lane: it will get one");
        let lane = Arc::new(HandedOut::new(2));
        known.serve(1, Some(Arc::clone(&lane)));
        lane.set(0, Offset(9));
        assert!(!known.room_comes(), "the other worker is at the letter, or before it");
        lane.set(1, Offset(6));
        assert_eq!((known.room_comes(), known.holders()), (true, vec![1]));
        known.forget_below(1, Offset(6));
        assert!(!known.room_comes());
    }
}
