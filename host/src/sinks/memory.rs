//! A sink that keeps its rows in memory and fails on demand, for tests of code that delivers to sinks.
//! Positions, epochs and fencing are as in a database.
//!
//! A [`MemoryDatabase`] outlives its sinks, as a server outlives a process: `database.sink()` is what
//! one process holds.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use tokio::sync::watch;
use uuid::Uuid;

use super::positions::Usurper;
use super::{
    Advance, Claim, Epoch, Error, Found, LogPosition, Name, Opened, OtherLog, Outcome, PassPosition,
    Position, RefusedRow, Rows, Sink, Written,
};
use crate::batch::{MessageRef, Offset, Partition};
use crate::stream::Lineage;

/// A row as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryRow {
    pub partition: Partition,
    pub offset: Offset,
    pub topic: String,
    pub device: String,
    pub route: String,
    pub payload: Vec<u8>,
}

/// What the next call does instead of its work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// No fault: the call succeeds.
    Passes,
    TooMuch(String),
    Doubtful(String),
    Retry(String),
    /// The commit is written, but the answer is lost.
    UnknownWritten,
    /// The commit is not written, and the answer is lost.
    UnknownLost,
    Fenced(String),
    Setup(String),
}

type Refuse = Box<dyn Fn(&MessageRef<'_>) -> Option<String> + Send>;

#[derive(Clone)]
pub struct MemoryDatabase {
    state: Arc<Mutex<State>>,
    /// Number of rows written so far, for waiting callers.
    written: watch::Sender<usize>,
    blocked: watch::Sender<bool>,
    commits_blocked: watch::Sender<bool>,
}

#[derive(Default)]
struct State {
    rows: Vec<MemoryRow>,
    claims: HashMap<Key, Claimed>,
    refuse: Option<Refuse>,
    suspect: Option<Refuse>,
    down: Option<String>,
    open_faults: VecDeque<Fault>,
    commit_faults: VecDeque<Fault>,
    opens: usize,
    commits: usize,
    /// Number of rows of each transaction that wrote any, in order.
    transactions: Vec<usize>,
}

/// Rows and positions of a [`MemoryDatabase`] at one time.
pub struct Backup {
    rows: Vec<MemoryRow>,
    claims: HashMap<Key, Claimed>,
}

/// Name, log and generation.
type Key = (Name, Uuid, u32);

fn key(claim: &Claim) -> Key {
    ((claim.pipeline.clone(), claim.sink.clone()), claim.log, claim.generation)
}

#[derive(Clone)]
struct Claimed {
    epoch: u64,
    /// Positions by partition; `None` until the first advance.
    next: Vec<Option<(Offset, Lineage)>>,
    /// [`Advance::letters`] of each partition.
    letters: Vec<Option<String>>,
}

impl Default for MemoryDatabase {
    fn default() -> Self {
        Self {
            state: Arc::default(),
            written: watch::Sender::new(0),
            blocked: watch::Sender::new(false),
            commits_blocked: watch::Sender::new(false),
        }
    }
}

impl MemoryDatabase {
    pub fn sink(&self) -> MemorySink {
        MemorySink { database: self.clone(), mine: None, uncommitted: None }
    }

    pub fn rows(&self) -> Vec<MemoryRow> {
        self.lock().rows.clone()
    }

    /// Returns the rows of each transaction that wrote any, in order.
    pub fn transactions(&self) -> Vec<Vec<MemoryRow>> {
        let state = self.lock();
        let mut rows = state.rows.iter().cloned();
        state.transactions.iter().map(|count| rows.by_ref().take(*count).collect()).collect()
    }

    /// Waits until at least this many rows are written.
    pub async fn rows_at_least(&self, count: usize) {
        // The sender lives as long as `self`.
        let _ = self.written.subscribe().wait_for(|written| *written >= count).await;
    }

    /// Returns the positions of a claim; empty if it was never opened or advanced.
    pub fn positions(&self, claim: &Claim) -> Vec<Position> {
        self.lock().claims.get(&key(claim)).map(Claimed::positions).unwrap_or_default()
    }

    /// Removes all claims, as if the table of positions were dropped.
    pub fn lose_positions(&self) {
        self.lock().claims.clear();
    }

    /// Restores positions and rows to the state at which the stream had these offsets, as if a backup
    /// were restored, or a standby that was behind took over.
    pub fn go_back(&self, to: Offset) {
        let state = &mut *self.lock();
        state.rows.retain(|row| row.offset < to);
        for (next, _) in state.claims.values_mut().flat_map(|claimed| claimed.next.iter_mut().flatten()) {
            *next = to.min(*next);
        }
    }

    /// Removes rows and positions, as if another database replaced this one. Returns the rows.
    pub fn replace(&self) -> Vec<MemoryRow> {
        let state = &mut *self.lock();
        state.claims.clear();
        std::mem::take(&mut state.rows)
    }

    /// Returns rows and positions, as a backup contains them.
    pub fn backup(&self) -> Backup {
        let state = self.lock();
        Backup { rows: state.rows.clone(), claims: state.claims.clone() }
    }

    /// Restores exactly the contents of a backup.
    pub fn restore(&self, backup: &Backup) {
        let state = &mut *self.lock();
        (state.rows, state.claims) = (backup.rows.clone(), backup.claims.clone());
    }

    /// Removes the position of one partition.
    pub fn lose_position(&self, partition: u16) {
        self.lock().claims.values_mut().for_each(|claimed| claimed.next[usize::from(partition)] = None);
    }

    /// Makes rows for which `refuse` returns a reason impossible to write.
    pub fn refuse(&self, refuse: impl Fn(&MessageRef<'_>) -> Option<String> + Send + 'static) {
        self.lock().refuse = Some(Box::new(refuse));
    }

    /// Makes rows for which `suspect` returns a reason fail. If a commit has other rows too, they are
    /// rejected; otherwise the reason may be the table's, and the commit fails with a set-up error.
    pub fn suspect(&self, suspect: impl Fn(&MessageRef<'_>) -> Option<String> + Send + 'static) {
        self.lock().suspect = Some(Box::new(suspect));
    }

    /// Makes the next calls of `open` fail, one for each fault. Later calls succeed.
    pub fn fail_opens(&self, faults: impl IntoIterator<Item = Fault>) {
        self.lock().open_faults.extend(faults);
    }

    /// Makes the next calls of `commit` fail, one for each fault. Later calls succeed.
    pub fn fail_commits(&self, faults: impl IntoIterator<Item = Fault>) {
        self.lock().commit_faults.extend(faults);
    }

    /// Cancels all pending faults.
    pub fn fail_no_more(&self) {
        let state = &mut *self.lock();
        state.open_faults.clear();
        state.commit_faults.clear();
    }

    /// Makes all calls fail for this reason, until it is `None`.
    pub fn set_down(&self, reason: Option<&str>) {
        self.lock().down = reason.map(str::to_owned);
    }

    /// Makes calls wait until [`MemoryDatabase::unblock`].
    pub fn block(&self) {
        self.blocked.send_replace(true);
    }

    pub fn unblock(&self) {
        self.blocked.send_replace(false);
    }

    /// Makes only commits of rows wait until they are unblocked.
    pub fn set_commits_blocked(&self, blocked: bool) {
        self.commits_blocked.send_replace(blocked);
    }

    /// Returns the number of waiting commits.
    pub fn commits_waiting(&self) -> usize {
        self.commits_blocked.receiver_count()
    }

    /// Returns the number of calls of `open`, including failed ones.
    pub fn opens(&self) -> usize {
        self.lock().opens
    }

    /// Returns the number of calls of `commit`, including failed ones.
    pub fn commits(&self) -> usize {
        self.lock().commits
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn unblocked(&self) {
        // The sender lives as long as `self`.
        let _ = self.blocked.subscribe().wait_for(|blocked| !blocked).await;
    }
}

impl Claimed {
    fn new(partitions: usize) -> Self {
        Self { epoch: 0, next: vec![None; partitions], letters: vec![None; partitions] }
    }

    /// Returns the last holder of the claim, if there was one.
    fn highest(&self) -> Option<Usurper> {
        (self.epoch > 0).then(|| Usurper {
            epoch: self.epoch,
            holder: "another process".to_owned(),
            at: None,
        })
    }

    fn positions(&self) -> Vec<Position> {
        let position = |(i, known): (usize, &Option<(Offset, Lineage)>)| {
            let (next, lineage) = known.clone()?;
            Some(Position { partition: Partition(i as u16), next, lineage })
        };
        self.next.iter().enumerate().filter_map(position).collect()
    }
}

/// Takes over the positions of the first former name of the claim that has any.
fn rename(claims: &mut HashMap<Key, Claimed>, claim: &Claim) {
    if claims.get(&key(claim)).is_some_and(|claimed| !claimed.positions().is_empty()) {
        return;
    }
    let formerly = |name: &Name| (name.clone(), claim.log, claim.generation);
    for name in claim.formerly.iter().map(formerly) {
        let Some(old) = claims.get_mut(&name).filter(|old| !old.positions().is_empty()) else { continue };
        let next = std::mem::replace(&mut old.next, vec![None; usize::from(claim.partitions)]);
        old.epoch += 1;
        let letters = old.letters.clone();
        let epoch = claims.get(&key(claim)).map_or(0, |claimed| claimed.epoch);
        claims.insert(key(claim), Claimed { epoch, next, letters });
        return;
    }
}

pub struct MemorySink {
    database: MemoryDatabase,
    mine: Option<(Claim, Epoch)>,
    /// What `finish` commits, and how its answer is lost.
    uncommitted: Option<(Rows, Vec<Advance>, Option<Fault>)>,
}

#[async_trait]
impl Sink for MemorySink {
    async fn open(&mut self, claim: &Claim, held: Option<Epoch>) -> Result<Opened, Error> {
        self.database.unblocked().await;
        self.uncommitted = None;
        let mut state = self.database.lock();
        state.opens += 1;
        if let Some(reason) = &state.down {
            return Err(Error::Retry(reason.clone()));
        }
        if let Some(fault) = state.open_faults.pop_front() {
            fault.strike()?;
        }
        let State { rows, claims, .. } = &mut *state;
        if held.is_none() {
            rename(claims, claim);
        }
        let highest = claims.get(&key(claim)).and_then(Claimed::highest);
        let epoch = claim.take(held, highest.as_ref(), !rows.is_empty())?;
        let claimed = claims.entry(key(claim)).or_insert_with(|| Claimed::new(usize::from(claim.partitions)));
        claimed.epoch = epoch.0;
        self.mine = Some((claim.clone(), epoch));
        let positions = claimed.positions();
        let others = claims.iter().filter(|(other, claimed)| {
            other.0 != key(claim).0
                && (other.1, other.2) == (claim.log, claim.generation)
                && !claimed.positions().is_empty()
        });
        let mut others: Vec<Name> = others.map(|(other, _)| other.0.clone()).collect();
        others.sort();
        let other_logs = claims.iter().filter(|(other, claimed)| {
            other.0 == key(claim).0 && other.1 != claim.log && !claimed.positions().is_empty()
        });
        let other_logs = other_logs.map(|(other, _)| OtherLog { log: other.1, claimed_at: None }).collect();
        let found = match positions.is_empty() {
            true => Found { has_rows: !rows.is_empty(), others, other_logs },
            false => Found::default(),
        };
        Ok(Opened { epoch, positions, found })
    }

    async fn positions_of(&mut self, claims: &[Name], logs: &[Uuid]) -> Result<Vec<LogPosition>, Error> {
        let state = self.database.lock();
        let is_asked = |(name, log, _): &Key| claims.contains(name) && logs.contains(log);
        let asked = state.claims.iter().filter(|(key, _)| is_asked(key));
        let of = |(key, claimed): (&Key, &Claimed)| {
            let log = key.1;
            claimed.positions().into_iter().map(move |at| (log, at.partition, at.next)).collect::<Vec<_>>()
        };
        Ok(asked.flat_map(of).collect())
    }

    async fn passes_of(
        &mut self,
        claims: &[Name],
        log: Uuid,
        above: Offset,
    ) -> Result<Vec<PassPosition>, Error> {
        let state = self.database.lock();
        let log = log.to_string();
        let of = |((name, pass, _), claimed): (&Key, &Claimed)| {
            let is_asked = claims.contains(name);
            let positions = claimed.positions().into_iter().filter(|at| is_asked && at.next > above);
            let told = positions.filter_map(|position| {
                let letters = claimed.letters[usize::from(position.partition.0)].clone()?;
                letters.starts_with(&log).then_some(PassPosition { pass: *pass, position, letters })
            });
            told.collect::<Vec<_>>()
        };
        Ok(state.claims.iter().flat_map(of).collect())
    }

    async fn commit(&mut self, rows: &Rows, advance: &[Advance]) -> Result<Outcome, Error> {
        self.database.unblocked().await;
        if !rows.is_empty() {
            let _ = self.database.commits_blocked.subscribe().wait_for(|blocked| !blocked).await;
        }
        self.uncommitted = None;
        let mut state = self.database.lock();
        state.commits += 1;
        if let Some(reason) = &state.down {
            return Err(Error::Retry(reason.clone()));
        }
        let fault = state.commit_faults.pop_front();
        let fault = match fault {
            None | Some(Fault::UnknownWritten) => fault,
            Some(fault) => fault.strike().map(|()| None)?,
        };
        let reasons = |refuse: &Option<Refuse>| -> Vec<RefusedRow> {
            let reason = |message: &MessageRef<'_>| refuse.as_ref().and_then(|refuse| refuse(message));
            let rejected = rows.iter().enumerate();
            rejected
                .filter_map(|(row, message)| Some(RefusedRow { row, reason: reason(&message)?, code: None }))
                .collect()
        };
        let mut rejected = reasons(&state.refuse);
        let suspected = reasons(&state.suspect);
        self.check(&state, advance)?;
        if let Some(first) = suspected.first().filter(|_| suspected.len() == rows.len()) {
            return Err(Error::Setup(first.reason.clone()));
        }
        rejected.extend(suspected);
        rejected.sort_by_key(|rejected| rejected.row);
        if !rejected.is_empty() {
            let is_rejected = |row: &usize| rejected.binary_search_by_key(row, |r| r.row).is_ok();
            let kept = rows.select((0..rows.len()).filter(|row| !is_rejected(row)));
            drop(state);
            self.uncommitted = Some((kept, advance.to_vec(), fault));
            return Ok(Outcome::Rejected(rejected));
        }
        let written = self.write(&mut state, rows, advance);
        fault.map_or(Ok(()), Fault::strike)?;
        Ok(Outcome::Committed(written))
    }

    async fn set_letters(&mut self, letters: &[(Partition, String)]) -> Result<(), Error> {
        let (_, advance, _) =
            self.uncommitted.as_mut().ok_or_else(|| Error::Retry("nothing to finish".to_owned()))?;
        for (partition, letters) in letters {
            let own = advance.iter_mut().filter(|step| step.partition == *partition);
            own.for_each(|step| step.letters = Some(letters.clone()));
        }
        Ok(())
    }

    async fn finish(&mut self) -> Result<Written, Error> {
        self.database.unblocked().await;
        let (rows, advance, fault) =
            self.uncommitted.take().ok_or_else(|| Error::Retry("nothing to finish".to_owned()))?;
        let mut state = self.database.lock();
        self.check(&state, &advance)?;
        let written = self.write(&mut state, &rows, &advance);
        fault.map_or(Ok(()), Fault::strike)?;
        Ok(written)
    }
}

impl MemorySink {
    /// Checks that all positions are ours to advance.
    fn check(&self, state: &State, advance: &[Advance]) -> Result<(), Error> {
        let (claim, epoch) =
            self.mine.as_ref().ok_or_else(|| Error::Retry("commit before open".to_owned()))?;
        let claimed = state.claims.get(&key(claim)).ok_or_else(|| Error::Retry(claim.gone()))?;
        let next = |partition: Partition| {
            let known = claimed.next.get(usize::from(partition.0))?.as_ref();
            known.map(|(next, _)| next.0)
        };
        let is_ours = |step: &Advance| next(step.partition).is_none_or(|next| next == step.from.0);
        if claimed.epoch != epoch.0 || !advance.iter().all(is_ours) {
            let theirs = |step: &&Advance| !is_ours(step);
            let moved: Vec<_> = advance.iter().filter(theirs).cloned().collect();
            return Err(claim.refusal(*epoch, claimed.highest().as_ref(), &moved, next));
        }
        Ok(())
    }

    fn write(&self, state: &mut State, rows: &Rows, advance: &[Advance]) -> Written {
        let (claim, _) = self.mine.as_ref().expect("checked before");
        let claimed = state.claims.get_mut(&key(claim)).expect("checked before");
        for step in advance {
            let known = &mut claimed.next[usize::from(step.partition.0)];
            let before = known.take().map(|(_, lineage)| lineage).unwrap_or_default();
            *known = Some((step.to, step.lineage.clone().unwrap_or(before)));
            if step.letters.is_some() {
                claimed.letters[usize::from(step.partition.0)].clone_from(&step.letters);
            }
        }
        state.rows.extend(rows.iter().map(|message| MemoryRow {
            partition: message.entry.partition,
            offset: message.offset(),
            topic: message.topic().to_owned(),
            device: message.device().to_owned(),
            route: message.route().to_owned(),
            payload: message.payload().to_vec(),
        }));
        if !rows.is_empty() {
            state.transactions.push(rows.len());
        }
        self.database.written.send_replace(state.rows.len());
        Written { written: rows.len() as u64, ignored: 0 }
    }
}

impl Fault {
    fn strike(self) -> Result<(), Error> {
        Err(match self {
            Self::Passes => return Ok(()),
            Self::TooMuch(reason) => Error::TooMuch(reason),
            Self::Doubtful(reason) => Error::Doubtful { context: "memory".to_owned(), reason },
            Self::Retry(reason) => Error::Retry(reason),
            Self::UnknownWritten | Self::UnknownLost => Error::Unknown("connection lost".to_owned()),
            Self::Fenced(reason) => Error::Fenced(reason),
            Self::Setup(reason) => Error::Setup(reason),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sinks::conformance::{self, Database, claim, message, rows};

    #[async_trait]
    impl Database for MemoryDatabase {
        async fn sink(&self) -> Box<dyn Sink> {
            Box::new(MemoryDatabase::sink(self))
        }

        async fn written(&self) -> Vec<(String, f64)> {
            let number = |row: &MemoryRow| String::from_utf8_lossy(&row.payload).parse().unwrap_or(f64::NAN);
            self.rows().iter().map(|row| (row.device.clone(), number(row))).collect()
        }

        async fn lose_positions(&self) {
            MemoryDatabase::lose_positions(self);
        }

        fn refuses(&self, row: &str) {
            let refused = row.as_bytes().to_vec();
            self.refuse(move |message| {
                (message.payload() == refused).then(|| "column \"value\": refused".to_owned())
            });
        }
    }

    crate::sinks::conformance::conformance_tests!(MemoryDatabase::default());

    #[tokio::test]
    async fn an_unknown_commit_is_resolved_by_open() {
        for (fault, expected) in [(Fault::UnknownWritten, 2), (Fault::UnknownLost, 0)] {
            let database = MemoryDatabase::default();
            let mut sink = database.sink();
            let held = Some(sink.open(&claim(), None).await.unwrap().epoch);
            let advance = [conformance::advance(0, 0, 0)];
            sink.commit(&Rows::default(), &advance).await.unwrap();
            database.fail_commits([fault]);
            let batch = rows([message("a", "1"), message("a", "2")]);
            let error = sink.commit(&batch, &[conformance::advance(0, 0, 2)]).await.unwrap_err();
            assert!(matches!(error, Error::Unknown(_)), "{error:?}");
            let positions = sink.open(&claim(), held).await.unwrap().positions;
            assert_eq!(positions, [conformance::position(0, expected)]);
            assert_eq!(database.rows().len() as u64, expected);
        }
    }
}
