//! Sinks whose stores have no transactions: the positions are in the host.
//!
//! A [`Target`] writes rows, and writes a row that comes again over the one that is there. [`Journaled`]
//! makes a [`Sink`] of it: the position moves, durably, once the target has the rows. A crash between the
//! two brings the rows again, each as the row that it was. Why the positions are in the streams of the
//! host that no reader can fill up, and what that promises: `host/decisions/journaled-sinks.md`.

use std::sync::Arc;

use async_trait::async_trait;
use uuid::Uuid;

use super::state_positions::{self, Change, Entries, StatePositions, Store};
use super::{
    Advance, Claim, Epoch, Error, LogPosition, Looked, Name, Opened, Outcome, PassPosition, RefusedRow, Rows,
    Sink, Written,
};
use crate::batch::{Offset, Partition};
use crate::stream::{AppendError, StateEntries, Stream, Ticket};

/// Most bytes of one append of positions, unless one partition has more.
const APPEND_BYTES_MAX: usize = 256 << 10;

/// A store of rows without transactions.
#[async_trait]
pub trait Target: Send {
    /// Names the store and what of it is written to. Sinks of one name fill one place.
    fn place(&self) -> String;

    /// Connects, and finds out whether rows could be written now. Called before the first `put`, and
    /// again after an error other than `TooMuch` and `Doubtful`.
    async fn open(&mut self) -> Result<(), Error>;

    /// Writes rows. With `Ok` the store keeps all of them but the rejected. With an error it may have
    /// any of them, and all come again. `Unknown` and `Fenced` are not for a target: where an answer was
    /// lost, that is `Retry`.
    ///
    /// A row that comes again must take the place of the one that is there. What tells is its identity:
    /// the log, the message's partition and offset, and the row's index among those that were made of
    /// the message ([`Rows::index`]); its bytes are the same too, unless the steps or the table of
    /// devices were changed in between.
    async fn put(&mut self, rows: &Rows) -> Result<Put, Error>;
}

/// What a target did with rows.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Put {
    pub written: Written,
    /// Rows that it can never write.
    pub rejected: Vec<RefusedRow>,
}

/// Where the positions of sinks are kept whose stores have no transactions.
#[derive(Clone)]
pub struct Journal(Arc<Streams>);

struct Streams {
    /// Has the positions of pipelines.
    positions: StatePositions,
    /// Has those of redrives, beside the letters that they are positions in.
    dead_letters: StatePositions,
}

impl Journal {
    /// `positions`: a stream that takes changes of its state whatever readers lag. It must not be one
    /// that a sink reads: a stream that is full until the sink moves on could not take the position
    /// with which it does.
    pub fn new(positions: Arc<dyn Stream>, dead_letters: Arc<dyn Stream>) -> Self {
        let [positions, dead_letters] = [positions, dead_letters].map(StatePositions::new);
        Self(Arc::new(Streams { positions, dead_letters }))
    }

    fn of(&self, pipeline: &str) -> &StatePositions {
        if super::is_redrive(pipeline) { &self.0.dead_letters } else { &self.0.positions }
    }

    /// Takes a claim, durably.
    async fn take(&self, claim: &Claim, held: Option<Epoch>, target: &str) -> Result<Opened, Error> {
        let positions = self.of(&claim.pipeline);
        let take = |entries: Entries<'_>| {
            let (opened, mut changes) = state_positions::take(entries, claim, held, Store::Named(target))?;
            if super::is_redrive(&claim.pipeline) && held.is_none() {
                let names: Vec<Name> = claim.names().collect();
                let start = positions.stream().bounds().start;
                changes.extend(state_positions::forgotten(entries, &names, claim.log, start));
            }
            Ok((opened, changes))
        };
        let (opened, ticket) = append(positions, take).await?;
        // What an earlier call appended and did not wait for is durable then, too.
        durable(positions.stream(), ticket).await?;
        Ok(opened)
    }

    /// Returns an error unless the positions are where `advance` says, and the claim is ours.
    fn check(&self, claim: &Claim, ours: Epoch, advance: &[Advance]) -> Result<(), Error> {
        let positions = self.of(&claim.pipeline);
        positions.look(|entries| state_positions::check(entries, claim, ours, advance))
    }

    /// Moves positions, durably.
    async fn advance(&self, claim: &Claim, ours: Epoch, advance: &[Advance]) -> Result<(), Error> {
        let positions = self.of(&claim.pipeline);
        let mut last = Ticket::default();
        for steps in advance.chunk_by(together()) {
            let moved = |entries: Entries<'_>| Ok(((), state_positions::moved(entries, claim, ours, steps)?));
            ((), last) = append(positions, moved).await?;
        }
        if advance.is_empty() {
            return self.check(claim, ours, &[]);
        }
        durable(positions.stream(), last).await
    }
}

/// Appends the changes that `make` makes of the entries that are there.
async fn append<T: Send>(
    positions: &StatePositions,
    make: impl Fn(Entries<'_>) -> Result<(T, Vec<Change>), Error> + Send + Sync,
) -> Result<(T, Ticket), Error> {
    positions.append(&[], make).await?.map_err(|error| no_position(positions.stream(), &error))
}

/// Whether a step goes into one append with those before it: for `chunk_by`.
fn together() -> impl FnMut(&Advance, &Advance) -> bool {
    const NUMBERS_BYTES: usize = 256;
    let bytes_of = |step: &Advance| {
        let lineage = step.lineage.as_ref().map_or(0, |lineage| lineage.to_string().len());
        NUMBERS_BYTES + lineage + step.letters.as_ref().map_or(0, String::len)
    };
    let mut bytes = None;
    move |before, step| {
        let so_far = bytes.get_or_insert_with(|| bytes_of(before));
        *so_far += bytes_of(step);
        let fits = *so_far <= APPEND_BYTES_MAX;
        if !fits {
            *so_far = bytes_of(step);
        }
        fits
    }
}

async fn durable(stream: &dyn Stream, ticket: Ticket) -> Result<(), Error> {
    let is_durable = stream.durable().wait_for(|durable| *durable >= ticket).await.map(|_| ());
    is_durable
        .map_err(|_| no_position(stream, &AppendError::Stopped("a write failed, or the host stops".into())))
}

/// Why no position could be kept, and what to do.
fn no_position(stream: &dyn Stream, error: &AppendError) -> Error {
    let name = stream.name();
    let reason = match (error, stream.lack()) {
        (AppendError::NoSpace, Some(lack)) => {
            format!(
                "the stream \"{name}\", which keeps it, has {lack}: free space on the disk of the data folder"
            )
        }
        (AppendError::NoSpace, None) => format!(
            "the state of the stream \"{name}\", which keeps it, is full: delete sessions that no client needs, or \
             send or discard dead letters"
        ),
        (error, _) => format!("stream \"{name}\", which keeps it: {error}"),
    };
    Error::Retry(format!(
        "the sink's position cannot be written: {reason}; rows that were written come again"
    ))
}

/// A sink whose positions are in a [`Journal`].
pub struct Journaled<T> {
    target: T,
    journal: Journal,
    mine: Option<(Claim, Epoch)>,
    /// What `finish` moves, once the rejected rows of a `commit` are dead letters.
    uncommitted: Option<(Written, Vec<Advance>)>,
}

impl<T: Target> Journaled<T> {
    pub fn new(target: T, journal: Journal) -> Self {
        Self { target, journal, mine: None, uncommitted: None }
    }

    fn mine(&self) -> Result<(&Claim, Epoch), Error> {
        let mine = self.mine.as_ref().map(|(claim, epoch)| (claim, *epoch));
        mine.ok_or_else(|| Error::Retry(format!("{}: not open", self.target.place())))
    }

    fn nothing_to_finish(&self) -> Error {
        Error::Retry(format!("{}: nothing to finish", self.target.place()))
    }
}

#[async_trait]
impl<T: Target> Sink for Journaled<T> {
    async fn open(&mut self, claim: &Claim, held: Option<Epoch>) -> Result<Opened, Error> {
        (self.mine, self.uncommitted) = (None, None);
        self.target.open().await?;
        let opened = self.journal.take(claim, held, &self.target.place()).await?;
        self.mine = Some((claim.clone(), opened.epoch));
        Ok(opened)
    }

    async fn positions_of(&mut self, claims: &[Name], logs: &[Uuid]) -> Result<Vec<LogPosition>, Error> {
        let mut positions = Vec::new();
        for claim in claims {
            positions.extend(self.journal.of(&claim.0).positions_of(std::slice::from_ref(claim), logs));
        }
        Ok(positions)
    }

    async fn passes_of(
        &mut self,
        claims: &[Name],
        log: Uuid,
        above: Offset,
    ) -> Result<Vec<PassPosition>, Error> {
        Ok(self.journal.0.dead_letters.passes_of(claims, log, above))
    }

    async fn commit(&mut self, rows: &Rows, advance: &[Advance]) -> Result<Outcome, Error> {
        self.uncommitted = None;
        let (claim, epoch) = self.mine()?;
        self.journal.check(claim, epoch, advance)?;
        let Put { written, rejected } = match rows.is_empty() {
            true => Put::default(),
            false => self.target.put(rows).await?,
        };
        if !rejected.is_empty() {
            self.uncommitted = Some((written, advance.to_vec()));
            return Ok(Outcome::Rejected(rejected));
        }
        let (claim, epoch) = self.mine()?;
        self.journal.advance(claim, epoch, advance).await?;
        Ok(Outcome::Committed(written))
    }

    async fn set_letters(&mut self, letters: &[(Partition, String)]) -> Result<(), Error> {
        let Some((_, advance)) = &mut self.uncommitted else { return Err(self.nothing_to_finish()) };
        for (partition, letters) in letters {
            let own = advance.iter_mut().filter(|step| step.partition == *partition);
            own.for_each(|step| step.letters = Some(letters.clone()));
        }
        Ok(())
    }

    async fn finish(&mut self) -> Result<Written, Error> {
        let Some((written, advance)) = self.uncommitted.take() else { return Err(self.nothing_to_finish()) };
        let (claim, epoch) = self.mine()?;
        self.journal.advance(claim, epoch, &advance).await?;
        Ok(written)
    }
}

/// Looks claims up in the entries of a state map, all of them, that the host with this journal has, and
/// takes none.
pub fn look_up(entries: &StateEntries, claims: Vec<Claim>, target: &str) -> Result<Vec<Looked>, Error> {
    let of = |prefix: &[u8]| entries.iter().filter(|(key, _)| key.starts_with(prefix)).cloned().collect();
    let look = |claim: Claim| {
        let (positions, found) = state_positions::look(&of, &claim, Store::Named(target))?;
        Ok(Looked { claim, positions, found })
    };
    claims.into_iter().map(look).collect()
}

#[cfg(test)]
mod tests;
