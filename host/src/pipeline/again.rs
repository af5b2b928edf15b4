//! The letters that one pass of a redrive sends.
//!
//! A letter is pending from the append of its mark ([`marks`](super::marks)) on, until
//! each sink that it names is past it in the pass that the mark names. It is sent then, or
//! open again for the sinks that rejected it as before: no second letter is made of it. A
//! rejection is in the mark before the sink's position covers the letter, as a letter
//! would be.
//!
//! Redrives of 0.1.0 had no passes: they sent a copy of each letter, which lies behind
//! it in the dead letters. What such a redrive left is sent from the copies.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::{AddAssign, Range};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use super::dead_letters::{DeadLetters, Refusal};
use super::destinations::Destinations;
use super::known::Piece;
use super::letter::{Letter, Names};
use super::marks::{Change, MARK_PREFIX, Mark, Marks, Pending, Reopened, Sent, mark_key};
use super::pass_letters::{Fate, Part, Told};
use super::reasons::{self, KeptReasons, Noted, Tries};
use super::routes::SinkNumber;
use crate::batch::{MessageRef, Offset, Partition};
use crate::stream::{Identity, Read, ReadError, Stream};

/// Whether a redrive of the pipeline with these names ended before all it took was sent.
pub fn is_pending(dead_letters: &dyn Stream, pipelines: &[String]) -> bool {
    let of_it = |mark: &Mark| matches!(mark, Mark::Pending(pending) if pipelines.contains(&pending.pipeline));
    Marks::read(&dead_letters.state(MARK_PREFIX)).own().any(|(_, mark)| of_it(mark))
}

/// The letters that one pass sends and that are pending, by the offset of what is sent:
/// the letter itself, or its copy where a redrive of 0.1.0 left one.
pub struct Again {
    names: Names,
    pass: Mutex<Option<Uuid>>,
    sendings: Mutex<BTreeMap<u64, Sending>>,
    reasons: Arc<KeptReasons>,
}

/// What is to be remembered of letters that are rejected as before.
pub struct Rejections {
    pub changes: Vec<Change>,
    /// Until the changes are appended.
    noted: Noted,
    /// Each letter by its offset, with the sinks that have rejected it and its tries.
    sendings: Vec<(u64, BTreeSet<String>, Tries)>,
}

pub struct Sending {
    letter: u64,
    partition: Partition,
    /// The first piece of whoever refused it.
    by: Piece,
    /// Hash of the letter's own reason.
    reason: u64,
    /// The pipeline's sinks that it goes to.
    names: Vec<SinkNumber>,
    /// Ids of sinks that the pipeline does not have any more: it waits for them.
    kept: BTreeSet<String>,
    only: Option<BTreeSet<String>>,
    rejected: BTreeSet<String>,
    /// Sinks that have it from other passes, of which this folder did not know.
    sent_by: BTreeMap<SinkNumber, Uuid>,
    /// Sinks that may have it, all or some of what is made of it.
    doubtful: BTreeSet<SinkNumber>,
    may_repeat: bool,
    tries: Tries,
    from_step: Option<String>,
    /// Which sinks its messages go to, once that is decided.
    to: Option<Destinations>,
}

/// What a person said of a letter, or an earlier run, before the steps run for a sink.
#[derive(Default)]
pub struct Asked {
    /// The step where it enters.
    pub from_step: Option<String>,
    /// It may repeat rows.
    pub may_repeat: bool,
    /// Which sinks its messages go to.
    pub to: Option<Destinations>,
    /// The sinks that it is sent to, where these are not all that it names.
    pub only: Option<Vec<SinkNumber>>,
}

impl Sending {
    /// `taken`: what its mark says, or will say.
    pub fn of(
        message: &MessageRef<'_>,
        letter: &Letter<'_>,
        pipeline: &DeadLetters,
        taken: &Pending,
    ) -> Self {
        let only = taken.only.as_ref();
        let names = pipeline.names();
        let is_wanted = |id: &str| only.is_none_or(|only| only.contains(id));
        let named = letter.sink_names().into_iter().flatten().flat_map(|name| names.named(name, letter.at));
        let own = |id: &String| names.number(id).map_or(id, |sink| &names.sinks[sink][0]).clone();
        Self {
            letter: letter.redrive_of.unwrap_or(message.offset().0),
            partition: message.entry.partition,
            by: Piece::of(letter.source(names), 0),
            reason: reasons::hash(letter.reason),
            names: (0..names.sinks.len())
                .filter(|sink| {
                    // It rejected the letter when the pipeline had no stream between the steps and the sinks.
                    let rejected = || only.is_some_and(|only| only.contains(names.id(*sink)));
                    names.names(letter, *sink) || pipeline.began_behind(letter, *sink) || rejected()
                })
                .filter(|sink| names.sinks[*sink].iter().any(|id| is_wanted(id)))
                .collect(),
            kept: named.filter(|id| is_wanted(id) && names.number(id).is_none()).collect(),
            only: only.cloned(),
            rejected: taken.rejected.iter().map(own).collect(),
            sent_by: BTreeMap::new(),
            doubtful: BTreeSet::new(),
            may_repeat: taken.may_repeat,
            tries: taken.tries,
            from_step: taken.from_step.clone(),
            to: taken.to.as_ref().map(|to| to.renamed(own)),
        }
    }

    /// Whether the pass delivers it to a sink.
    fn goes_to(&self, sink: SinkNumber) -> bool {
        self.names.contains(&sink) && !self.sent_by.contains_key(&sink) && !self.doubtful.contains(&sink)
    }

    /// Whether the routes of now say which sinks get its messages: those that the pipeline does not have
    /// any more are in none of them.
    fn is_decidable(&self) -> bool {
        self.kept.is_empty()
    }

    pub fn goes_anywhere(&self) -> bool {
        !self.names.is_empty()
    }

    /// Ids of the sinks that the pipeline does not have any more.
    pub fn kept(&self) -> &BTreeSet<String> {
        &self.kept
    }
}

/// How many letters ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ended {
    pub sent: u64,
    pub refused: u64,
    pub pending: u64,
    /// Another copy of the data folder had sent them.
    pub sent_before: u64,
    /// Another copy of the data folder may have sent them: open, and sent only where that is asked for.
    pub possible_duplicates: u64,
}

impl AddAssign for Ended {
    fn add_assign(&mut self, other: Self) {
        self.sent += other.sent;
        self.refused += other.refused;
        self.pending += other.pending;
        self.sent_before += other.sent_before;
        self.possible_duplicates += other.possible_duplicates;
    }
}

impl Again {
    /// A pass that has taken nothing yet.
    pub fn begin(names: &Names, reasons: &Arc<KeptReasons>) -> Self {
        Self::of(names, Some(Uuid::new_v4()), BTreeMap::new(), reasons)
    }

    fn of(
        names: &Names,
        pass: Option<Uuid>,
        sendings: BTreeMap<u64, Sending>,
        reasons: &Arc<KeptReasons>,
    ) -> Self {
        Self {
            names: names.clone(),
            pass: Mutex::new(pass),
            sendings: Mutex::new(sendings),
            reasons: Arc::clone(reasons),
        }
    }

    /// Begins another pass, with the letters that come after those of this one. What is pending of
    /// this one is left to another redrive.
    pub fn renew(&self) {
        *self.pass.lock().unwrap_or_else(PoisonError::into_inner) = Some(Uuid::new_v4());
        self.lock().clear();
    }

    /// The passes that earlier redrives of a pipeline left.
    pub async fn left(
        dead_letters: &dyn Stream,
        pipeline: &DeadLetters,
        reasons: &Arc<KeptReasons>,
    ) -> Result<Vec<Self>, ReadError> {
        let names = pipeline.names();
        let marks = Marks::read(&dead_letters.state(MARK_PREFIX));
        let pending: BTreeMap<u64, &Pending> = marks
            .own()
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
                let sending = Sending::of(&message, &letter, pipeline, pending);
                // The last of a letter's copies is the one under way.
                passes.entry(pending.pass).or_default().insert(sending.letter, (at, sending));
            }
        }
        let again = |(pass, sendings): (_, BTreeMap<u64, (u64, Sending)>)| {
            Self::of(names, pass, sendings.into_values().collect(), reasons)
        };
        Ok(passes.into_iter().map(again).collect())
    }

    pub fn pass(&self) -> Option<Uuid> {
        *self.pass.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The log of a pass, as the sinks' positions name it: each pass begins anew.
    pub fn identity(&self, dead_letters: Identity) -> Identity {
        match self.pass() {
            Some(pass) => Identity { log: pass, generation: 0, partitions: dead_letters.partitions },
            None => dead_letters,
        }
    }

    /// The mark of a letter that this pass takes, or has.
    pub fn mark(&self, sending: &Sending) -> Mark {
        Mark::Pending(self.pending_of(sending))
    }

    fn pending_of(&self, sending: &Sending) -> Pending {
        Pending {
            pipeline: self.names.pipeline().to_owned(),
            pass: self.pass(),
            only: sending.only.clone(),
            rejected: sending.rejected.clone(),
            may_repeat: sending.may_repeat,
            tries: sending.tries,
            from_step: sending.from_step.clone(),
            to: sending.to.clone(),
        }
    }

    pub fn asked(&self, offset: Offset) -> Asked {
        let sendings = self.lock();
        let asked = |sending: &Sending| Asked {
            from_step: sending.from_step.clone(),
            may_repeat: sending.may_repeat,
            to: sending.to.clone(),
            only: sending.only.as_ref().map(|_| sending.names.clone()),
        };
        sendings.get(&offset.0).map(asked).unwrap_or_default()
    }

    /// Returns what is to be written before a sink's position covers letters for which this is decided,
    /// those that go to one sink only excepted: nobody else has to know.
    pub fn decisions(&self, decided: &[(Offset, Destinations)]) -> Vec<Change> {
        let sendings = self.lock();
        let of_several = |(at, to): &(Offset, Destinations)| {
            let sending =
                sendings.get(&at.0).filter(|sending| sending.is_decidable() && sending.names.len() > 1)?;
            let mark = Mark::Pending(Pending { to: Some(to.clone()), ..self.pending_of(sending) });
            Some((mark_key(Offset(sending.letter)), Some(mark.bytes())))
        };
        decided.iter().filter_map(of_several).collect()
    }

    /// The decisions are written.
    pub fn decide(&self, decided: Vec<(Offset, Destinations)>) {
        let mut sendings = self.lock();
        for (at, to) in decided {
            if let Some(sending) = sendings.get_mut(&at.0).filter(|sending| sending.is_decidable()) {
                sending.to = Some(to);
            }
        }
    }

    /// A letter may be rows of a sink already, some of what is made of it. Once the sink's position is
    /// past it, a later run of the pass learns of this by [`Self::compare`].
    pub fn doubt(&self, offset: Offset, sink: SinkNumber) {
        if let Some(sending) = self.lock().get_mut(&offset.0) {
            sending.doubtful.insert(sink);
        }
    }

    /// Their marks are appended.
    pub fn take(&self, sendings: impl IntoIterator<Item = (Offset, Sending)>) {
        self.lock().extend(sendings.into_iter().map(|(offset, sending)| (offset.0, sending)));
    }

    /// The letters that it sends.
    pub fn letters(&self) -> Vec<u64> {
        self.lock().values().map(|sending| sending.letter).collect()
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
        self.lock().get(&offset.0).is_some_and(|sending| sending.goes_to(sink))
    }

    /// Returns what this pass delivers to a sink of a partition: where it lies, and its letter.
    pub fn letters_to(
        &self,
        sink: SinkNumber,
        partition: Partition,
        range: Range<Offset>,
    ) -> Vec<(Offset, u64)> {
        let sendings = self.lock();
        let own = sendings.range(range.start.0..range.end.0);
        let own = own.filter(|(_, sending)| sending.partition == partition && sending.goes_to(sink));
        own.map(|(at, sending)| (Offset(*at), sending.letter)).collect()
    }

    /// Compares what goes to a sink with what its database tells. `positions`: those of this pass;
    /// `rejected_in`: how much of a letter there is in new letters of this folder.
    pub fn compare(
        &self,
        sink: SinkNumber,
        told: &Told,
        positions: &[Offset],
        rejected_in: impl Fn(Offset) -> Option<Part>,
    ) {
        let name = self.names.id(sink);
        for (at, sending) in self.lock().iter_mut().filter(|(_, sending)| sending.names.contains(&sink)) {
            let partition = usize::from(sending.partition.0);
            let is_past = positions.get(partition).is_some_and(|position| *at < position.0);
            let own = told.own(partition).filter(|_| is_past).map(|own| own.has(sending.letter));
            if own == Some(Some(Part::All)) {
                continue;
            }
            let is_rejected = sending.rejected.contains(name);
            match told.of_letter(sending.letter) {
                Fate::SentBy(pass) => drop(sending.sent_by.insert(sink, pass)),
                Fate::PossibleDuplicate if !sending.may_repeat => drop(sending.doubtful.insert(sink)),
                _ if is_rejected => {}
                // What was not rejected would be sent, and told: an earlier run of the pass passed it over
                // as a possible duplicate, which it remembered in memory only.
                _ if own == Some(None) && rejected_in(Offset(*at)) == Some(Part::Some) => {
                    sending.doubtful.insert(sink);
                }
                _ if rejected_in(Offset(*at)).is_some() => {}
                // Another copy of the folder has got this pass so far, and has the letters of what it
                // rejected.
                _ if own == Some(Some(Part::Some)) => drop(sending.doubtful.insert(sink)),
                _ if own == Some(None) => drop(sending.rejected.insert(name.to_owned())),
                _ => {}
            }
        }
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
        let by = Piece::of(refusal.source, 0);
        let sendings = self.lock();
        let sending = sendings.get(&refusal.message.offset().0);
        refusal.alone && refusal.closes && sending.is_some_and(|sending| sending.by == by)
    }

    /// What says that these sinks rejected these letters, and why.
    pub fn reject(&self, refusals: &[(&Refusal<'_>, Vec<SinkNumber>)]) -> Rejections {
        let sendings = self.lock();
        let noted = Noted::new(&self.reasons);
        let mut rejections = Rejections { changes: Vec::new(), noted, sendings: Vec::new() };
        for (refusal, names) in refusals {
            let at = refusal.message.offset().0;
            let Some(sending) = sendings.get(&at) else { continue };
            let names = names.iter().map(|sink| self.names.id(*sink).to_owned());
            let rejected: BTreeSet<_> = sending.rejected.iter().cloned().chain(names).collect();
            // Once in a pass, however many sinks it goes to.
            let is_counted = !sending.rejected.is_empty();
            let (reason, own) = (refusal.reason, sending.reason);
            let tries = rejections.noted.note(sending.tries, is_counted, reason, own);
            let (pending, rejected_by) = (self.pending_of(sending), rejected.clone());
            let mark = Mark::Pending(Pending { rejected: rejected_by, tries, ..pending }).bytes();
            rejections.changes.push((mark_key(Offset(sending.letter)), Some(mark)));
            rejections.sendings.push((at, rejected, tries));
        }
        rejections.changes.extend(rejections.noted.changes());
        rejections
    }

    /// The changes are appended.
    pub fn note(&self, rejections: Rejections) {
        let mut sendings = self.lock();
        for (at, rejected, tries) in rejections.sendings {
            if let Some(sending) = sendings.get_mut(&at) {
                (sending.rejected, sending.tries) = (rejected, tries);
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

    /// What is to be written of the letters whose sinks are all past them, the records of what
    /// is sent first; they are pending no more. `reached`: by sink, its positions by partition,
    /// where they are known.
    pub fn ended(&self, reached: &[Vec<Offset>]) -> (Vec<Change>, Ended) {
        let mut ended = Ended::default();
        let mut marks = Vec::new();
        let mut sent: BTreeMap<(Uuid, BTreeSet<String>, Option<Destinations>), Vec<u64>> = BTreeMap::new();
        let pass = self.pass();
        let name = |sink: &SinkNumber| self.names.id(*sink).to_owned();
        self.lock().retain(|at, sending| {
            let is_past = |sink: &SinkNumber| {
                let positions = reached.get(*sink).map_or(&[][..], Vec::as_slice);
                positions.get(usize::from(sending.partition.0)).is_some_and(|position| position.0 > *at)
            };
            let mut open: BTreeSet<_> = sending.doubtful.iter().map(name).collect();
            open.extend(sending.rejected.iter().cloned());
            if !sending.names.iter().all(is_past) || (open.is_empty() && !sending.kept.is_empty()) {
                return true;
            }
            let taken = sending.names.iter().filter(|sink| sending.goes_to(**sink)).map(name);
            let mut taken: BTreeSet<_> = taken.filter(|name| !sending.rejected.contains(name)).collect();
            let is_taken = !taken.is_empty();
            // The database of a sink that got none of it cannot lose it.
            taken.retain(|name| sending.to.as_ref().is_none_or(|to| to.has(name)));
            let mut by_pass: BTreeMap<Uuid, (BTreeSet<String>, Option<Destinations>)> = BTreeMap::new();
            by_pass.extend(pass.filter(|_| is_taken).map(|pass| (pass, (taken, sending.to.clone()))));
            for (sink, by) in &sending.sent_by {
                by_pass.entry(*by).or_default().0.insert(name(sink));
            }
            for (pass, (sinks, to)) in by_pass {
                sent.entry((pass, sinks, to)).or_default().push(sending.letter);
            }
            let mark = if !open.is_empty() {
                let why = match sending.doubtful.is_empty() {
                    true => Reopened::Rejected(sending.tries),
                    false => Reopened::PossibleDuplicate,
                };
                match why {
                    Reopened::PossibleDuplicate => ended.possible_duplicates += 1,
                    Reopened::Rejected(_) | Reopened::Lost => ended.refused += 1,
                }
                open.extend(sending.kept.iter().cloned());
                Some(Mark::Open { sinks: open, why, to: sending.to.clone() })
            } else {
                match is_taken || sending.sent_by.is_empty() {
                    true => ended.sent += 1,
                    false => ended.sent_before += 1,
                }
                // No record has the letters of a redrive without a pass.
                pass.is_none().then_some(Mark::Sent)
            };
            marks.push((mark_key(Offset(sending.letter)), mark.map(|mark| mark.bytes())));
            false
        });
        let mut changes: Vec<_> = sent
            .iter()
            .flat_map(|((pass, sinks, to), letters)| {
                Sent::records(*pass, self.names.pipeline(), sinks, to.as_ref(), letters)
            })
            .collect();
        changes.append(&mut marks);
        (changes, ended)
    }

    pub fn pending(&self) -> u64 {
        self.lock().len() as u64
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Sending>> {
        self.sendings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
