//! Finds the dead letters that a database had and does not have any more: it was restored from
//! before the redrive that sent them, or another database is in its place.
//!
//! A pass commits rows and its position in one transaction. A database whose position of a pass
//! lies below a letter that a record ([`marks`](super::marks)) says the pass sent has lost the
//! letter's row. A delivery compares the two whenever its sink opens. The letters that are missing
//! are open again for that sink, once no redrive runs: listed, and sent by the next redrive.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use uuid::Uuid;

use super::dead_letters::Error;
use super::destinations::Destinations;
use super::letter::Names;
use super::marks::{
    Change, Mark, Marks, Pending, Reopened, Runs, SENT_PREFIX, Sent, mark_key, of_pass, records,
};
use super::routes::SinkNumber;
use crate::batch::Offset;
use crate::sinks::{LogPosition, Name};
use crate::stream::{AppendError, Read, ReadError, StateChange, Stream, Ticket};

/// Letters that are opened in one append.
const OPENED_MAX: usize = 1_024;

/// What passes have sent to the sinks of a pipeline.
pub struct SentLetters {
    dead_letters: Arc<dyn Stream>,
    names: Names,
    /// Found, and not yet open again.
    missing: Mutex<Vec<Missing>>,
    is_found: Notify,
    /// Held from the look at a record to its change.
    records: Mutex<()>,
}

/// Records of what a sink's database does not have, with how far it says that each pass got, by
/// partition.
struct Missing {
    sink: SinkNumber,
    records: Vec<(Sent, Vec<Offset>)>,
}

impl SentLetters {
    pub fn new(dead_letters: Arc<dyn Stream>, names: Names) -> Self {
        Self {
            dead_letters,
            names,
            missing: Mutex::default(),
            is_found: Notify::new(),
            records: Mutex::default(),
        }
    }

    /// Returns the records that name a sink. Its database has their letters if it is asked after
    /// this call, unless it has lost them.
    pub fn expected(&self, sink: SinkNumber) -> Vec<Sent> {
        let state = self.dead_letters.state(SENT_PREFIX);
        records(&state).filter(|record| self.is_of(record, sink)).collect()
    }

    /// The names under which the passes of a sink have positions: its ids.
    pub fn claims(&self, sink: SinkNumber) -> Vec<Name> {
        let pipelines = self.names.redrives();
        let names = pipelines
            .iter()
            .flat_map(|pipeline| self.names.sinks[sink].iter().map(|sink| (pipeline.clone(), sink.clone())));
        names.collect()
    }

    /// Compares records with how far the sink's database says that their passes got.
    pub fn compare(&self, sink: SinkNumber, expected: Vec<Sent>, positions: &[LogPosition]) {
        let partitions = usize::from(self.dead_letters.identity().partitions);
        let mut passes: BTreeMap<Uuid, Vec<Offset>> = BTreeMap::new();
        for (pass, partition, next) in positions {
            let reached = passes.entry(*pass).or_insert_with(|| vec![Offset(0); partitions]);
            if let Some(reached) = reached.get_mut(usize::from(partition.0)) {
                *reached = (*reached).max(*next);
            }
        }
        let reached =
            |record: &Sent| passes.get(&record.pass).cloned().unwrap_or_else(|| vec![Offset(0); partitions]);
        let records: Vec<_> = expected
            .into_iter()
            .map(|record| (reached(&record), record))
            .filter(|(reached, record)| reached.iter().any(|next| next.0 < record.letters.bounds().end))
            .map(|(reached, record)| (record, reached))
            .collect();
        if !records.is_empty() {
            self.missing().push(Missing { sink, records });
            self.is_found.notify_one();
        }
    }

    /// Returns once letters were found to be missing.
    pub async fn is_found(&self) {
        self.is_found.notified().await;
    }

    /// Forgets that a sink's database must have what was sent to it: the positions of its passes
    /// are gone, and not the rows. The letters stay closed. Returns the append to wait for.
    pub async fn believe(&self, sink: SinkNumber) -> Result<Ticket, Error> {
        let mut last = Ticket::default();
        for record in self.expected(sink) {
            let believed = || {
                let record = self.record(&record.key()).filter(|record| self.is_of(record, sink))?;
                Some(vec![Sent { sinks: self.others(&record, sink), ..record }.change()])
            };
            let ticket = self.change(believed).await?.ok_or(AppendError::NoSpace)?;
            last = last.max(ticket);
        }
        Ok(last)
    }

    /// Opens what was found to be missing, and returns how many letters that are, by sink. No
    /// redrive may run meanwhile. What has no room is found again when the sink opens again.
    pub async fn put_back(&self) -> Result<BTreeMap<SinkNumber, u64>, Error> {
        let found = std::mem::take(&mut *self.missing());
        let mut opened = BTreeMap::new();
        for Missing { sink, records } in found {
            for (record, reached) in records {
                let letters: Vec<u64> = self.above(&record, &reached).await?.into_iter().collect();
                for letters in letters.chunks(OPENED_MAX) {
                    let count = AtomicU64::new(0);
                    let open = || {
                        let (had, changes) = self.open(sink, record.pass, letters);
                        count.store(had, Ordering::Relaxed);
                        changes
                    };
                    let Some(_) = self.change(open).await? else { return Ok(opened) };
                    *opened.entry(sink).or_default() += count.into_inner();
                }
            }
        }
        Ok(opened)
    }

    /// The letters of a record that lie where a pass has not got to.
    async fn above(&self, record: &Sent, reached: &[Offset]) -> Result<BTreeSet<u64>, ReadError> {
        let range = record.letters.bounds();
        let mut cursor = self.dead_letters.peek(Offset(range.start));
        let mut letters = BTreeSet::new();
        while cursor.position().0 < range.end
            && let Some(read) = cursor.try_next().await?
        {
            let Read::Batch(batch) = read else { continue };
            letters.extend(batch.messages().filter_map(|message| {
                let letter = message.offset();
                let is_above =
                    reached.get(usize::from(message.entry.partition.0)).is_none_or(|at| *at <= letter);
                (is_above && record.letters.contains(letter.0)).then_some(letter.0)
            }));
        }
        Ok(letters)
    }

    /// Returns how many of the letters that a pass sent to a sink are to be opened, and the changes
    /// that open them. They are one append with the records: whether a crash comes before or after
    /// it, a letter that is sent again later is not found to be missing again.
    fn open(&self, sink: SinkNumber, pass: Uuid, letters: &[u64]) -> (u64, Option<Vec<Change>>) {
        let state = self.dead_letters.state(&of_pass(pass));
        let discarded = Runs::of_records(records(&self.dead_letters.state(&of_pass(Uuid::nil()))));
        let (mut changes, mut opened) = (Vec::new(), 0);
        for record in records(&state).filter(|record| self.is_of(record, sink)) {
            let had: BTreeSet<u64> =
                letters.iter().copied().filter(|letter| record.letters.contains(*letter)).collect();
            if had.is_empty() {
                continue;
            }
            changes.push((record.key(), None));
            let kept = Sent { letters: record.letters.without(&had), ..record.clone() };
            let others = self.others(&record, sink);
            let left = Sent { sinks: others, letters: had.iter().copied().collect(), ..record };
            let to = left.to.clone();
            let is_needed = |record: &&Sent| !record.letters.ranges().is_empty() && !record.sinks.is_empty();
            changes.extend([&kept, &left].into_iter().filter(is_needed).map(Sent::change));
            for letter in had.into_iter().filter(|letter| !discarded.contains(*letter)) {
                if let Some(mark) = self.opened(letter, sink, to.clone()) {
                    changes.push((mark_key(Offset(letter)), Some(mark.bytes())));
                    opened += 1;
                }
            }
        }
        (opened, Some(changes))
    }

    /// The mark of a letter that a sink's database has lost; `None`: it stays as it is. `sent_to`: which
    /// sinks got its messages, as the record says.
    fn opened(&self, letter: u64, sink: SinkNumber, sent_to: Option<Destinations>) -> Option<Mark> {
        let name = || self.names.id(sink).to_owned();
        let state = self.dead_letters.state(&mark_key(Offset(letter)));
        match Marks::read(&state).get(letter) {
            None => Some(Mark::Open { sinks: [name()].into(), why: Reopened::Lost, to: sent_to }),
            Some(Mark::Open { sinks, why, to }) => {
                let sinks = sinks.iter().cloned().chain([name()]).collect();
                let why = match why {
                    Reopened::PossibleDuplicate => *why,
                    Reopened::Rejected(_) | Reopened::Lost => Reopened::Lost,
                };
                Some(Mark::Open { sinks, why, to: to.clone().or(sent_to) })
            }
            // Once its redrive is at its end it is open for that sink.
            Some(Mark::Pending(pending)) => {
                let rejected = pending.rejected.iter().cloned().chain([name()]).collect();
                let to = pending.to.clone().or(sent_to);
                Some(Mark::Pending(Pending { rejected, to, ..pending.clone() }))
            }
            // Discarded.
            Some(Mark::Sent) => None,
        }
    }

    fn record(&self, key: &[u8]) -> Option<Sent> {
        records(&self.dead_letters.state(key)).next()
    }

    /// Whether a record is of this pipeline and names the sink.
    fn is_of(&self, record: &Sent, sink: SinkNumber) -> bool {
        self.names.pipelines.contains(&record.pipeline)
            && record.sinks.iter().any(|name| self.names.number(name) == Some(sink))
    }

    fn others(&self, record: &Sent, sink: SinkNumber) -> BTreeSet<String> {
        record.sinks.iter().filter(|name| self.names.number(name) != Some(sink)).cloned().collect()
    }

    /// Changes the state by what `make` says of it; `None` where there is no room.
    async fn change(&self, make: impl Fn() -> Option<Vec<Change>>) -> Result<Option<Ticket>, Error> {
        loop {
            match self.try_change(&make) {
                Ok(ticket) => return Ok(Some(ticket)),
                Err(AppendError::NoSpace) => return Ok(None),
                Err(AppendError::Full) => self.dead_letters.writable().await,
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn try_change(&self, make: &impl Fn() -> Option<Vec<Change>>) -> Result<Ticket, AppendError> {
        let _changes = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(changes) = make() else { return Ok(Ticket::default()) };
        let changes: Vec<_> =
            changes.iter().map(|(key, value)| StateChange { key, value: value.as_deref() }).collect();
        Ok(self.dead_letters.append(&[], &changes)?.ticket)
    }

    fn missing(&self) -> MutexGuard<'_, Vec<Missing>> {
        self.missing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
