//! How the versions of a pipeline's steps come to its lanes, and to their workers.
//!
//! Under one lock a lane claims the messages that it hands out, and a new version begins behind all
//! that was claimed: so it begins at one offset, whichever lane comes to that offset and when. A lane
//! hands a version to its workers before the first message that the version may run.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::lane::LaneId;
use super::versions::{Begins, ends};
use super::worker::Steps;
use crate::batch::{Offset, Partition};
use crate::stream::{AppendError, Ticket};

/// A version that begins, with its instances for one lane.
pub struct Flip {
    pub begins: Begins,
    /// One set for each worker.
    pub steps: Vec<Steps>,
    /// Must be durable before a position covers what these steps make.
    pub ticket: Ticket,
}

/// What the readers of a pipeline have handed out, and the versions that they have still to hand
/// to their workers.
#[derive(Default)]
pub struct Schedule(Mutex<Claims>);

#[derive(Default)]
struct Claims {
    /// No reader has handed out a message at or above it.
    upto: Offset,
    due: Vec<(LaneId, Flip)>,
}

impl Schedule {
    /// Says that a lane hands out messages below `upto`, and returns the versions that it hands
    /// to its workers before: each of them may begin with one of these messages.
    pub fn claim(&self, lane: LaneId, upto: Offset) -> Vec<Flip> {
        let mut claims = self.lock();
        claims.upto = claims.upto.max(upto);
        claims.due.extract_if(.., |(of, _)| *of == lane).map(|(_, flip)| flip).collect()
    }

    /// Lets a version begin for all lanes behind what any of them has handed out, and not below
    /// `at_least`, unless `record` fails for where it begins. A version that was due there and runs
    /// no message is not handed out.
    pub fn flip(
        &self,
        lanes: impl Iterator<Item = (LaneId, Vec<Steps>)>,
        at_least: &[Offset],
        record: impl FnOnce(&Begins) -> Result<Ticket, AppendError>,
    ) -> Result<(), AppendError> {
        let mut claims = self.lock();
        let begin = at_least.iter().copied().fold(claims.upto, Offset::max);
        let begins: Begins = vec![begin; at_least.len()].into();
        let ticket = record(&begins)?;
        claims.due.retain(|(_, flip)| flip.begins.iter().any(|due| *due < begin));
        let flips = lanes.map(|(lane, steps)| (lane, Flip { begins: Arc::clone(&begins), steps, ticket }));
        claims.due.extend(flips);
        Ok(())
    }

    /// A lane has ended: it hands nothing to its workers any more.
    pub fn forget(&self, lane: LaneId) {
        self.lock().due.retain(|(of, _)| *of != lane);
    }

    fn lock(&self) -> MutexGuard<'_, Claims> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A worker's instances, of the versions that it has still to run messages with, oldest first.
pub struct OfWorker(pub Vec<(Begins, Steps)>);

impl OfWorker {
    pub fn push(&mut self, begins: Begins, steps: Steps) {
        self.0.push((begins, steps));
    }

    /// Returns the place of the version of a message, and where the next one begins.
    pub fn of(&self, partition: Partition, offset: Offset) -> (usize, Option<Offset>) {
        let begin = |(begins, _): &(Begins, Steps)| begins[usize::from(partition.0)];
        let place = self.0.iter().rposition(|version| begin(version) <= offset).unwrap_or(0);
        (place, self.0[place + 1..].iter().map(begin).min())
    }

    /// Drops the versions that only run messages below `done`.
    pub fn drop_below(&mut self, done: Offset) {
        while self.0.len() > 1
            && ends(self.0[1..].iter().map(|(begins, _)| begins)).into_iter().all(|end| end <= done)
        {
            self.0.remove(0);
        }
    }
}

#[cfg(test)]
mod tests;
