//! The common part of all tables of positions: the holder of a claim, why a claim cannot be taken, and
//! the messages about it.

use std::ops::Range;

use super::{Advance, Claim, Epoch, Error, Name};
use crate::batch::{Offset, Partition};

/// Returns the name of this process for a fenced one: `edge-7 (process 4711)`.
pub(super) fn holder() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|name| name.trim().to_owned())
        .or_else(|_| std::env::var("HOSTNAME"))
        .unwrap_or_else(|_| "a host".to_owned());
    format!("{host} (process {})", std::process::id())
}

/// The claim of another process.
pub(super) struct Usurper {
    pub(super) epoch: u64,
    pub(super) holder: String,
    /// When the claim was taken, if known.
    pub(super) at: Option<String>,
}

impl Claim {
    /// Returns the epoch with which a claim is taken: the one after `highest`, or the one that this
    /// process holds. `has_rows` says whether the table has rows, which would be written again if a held
    /// claim is gone.
    pub(super) fn take(
        &self,
        held: Option<Epoch>,
        highest: Option<&Usurper>,
        has_rows: bool,
    ) -> Result<Epoch, Error> {
        match (held, highest) {
            (None, highest) => Ok(Epoch(highest.map_or(0, |highest| highest.epoch) + 1)),
            (Some(held), Some(highest)) if highest.epoch > held.0 => {
                Err(Error::Fenced(self.fenced_by(highest, held)))
            }
            (Some(_), None) if has_rows => Err(Error::Choose(self.gone())),
            (Some(held), _) => Ok(held),
        }
    }

    /// Returns why positions could not be advanced, given the `highest` claim and the partitions at
    /// `next`.
    pub(super) fn refusal(
        &self,
        ours: Epoch,
        highest: Option<&Usurper>,
        advance: &[Advance],
        next: impl Fn(Partition) -> Option<u64>,
    ) -> Error {
        match highest {
            None => return Error::Retry(self.gone()),
            Some(highest) if highest.epoch > ours.0 => {
                return Error::Fenced(self.fenced_by(highest, ours));
            }
            Some(_) => {}
        }
        let moved = advance.iter().map(|step| (step, next(step.partition)));
        match moved.into_iter().find(|(step, next)| *next != Some(step.from.0)) {
            Some((step, next @ Some(_))) => Error::Fenced(self.moved(step.partition, next, step.from)),
            _ => Error::Retry(self.gone()),
        }
    }

    /// Returns the name of the claim, then its former names.
    pub(super) fn names(&self) -> impl Iterator<Item = Name> {
        let own = (self.pipeline.clone(), self.sink.clone());
        std::iter::once(own).chain(self.formerly.iter().cloned())
    }

    /// Returns the message that another process has taken the claim over.
    pub(super) fn fenced_by(&self, usurper: &Usurper, ours: Epoch) -> String {
        let at = usurper.at.as_deref().map(|at| format!(" at {at}")).unwrap_or_default();
        format!(
            "{} took the {} over{at} (epoch {} after our {}): two hosts must not write as the same pipeline of \
             one log; stop one of the two hosts, then restart the other",
            usurper.holder,
            self.positions_text(),
            usurper.epoch,
            ours.0
        )
    }

    /// Returns the message that a position is not the one that this host left.
    pub(super) fn moved(&self, partition: Partition, is: Option<u64>, left: Offset) -> String {
        let is = is.map_or("nowhere".to_owned(), |next| format!("at offset {next}"));
        format!(
            "the {} are not where this host left them: partition {} is {is}, not at {}; \
             were rows of headworks_positions edited? restart the host to continue from them",
            self.positions_text(),
            partition.0,
            left.0
        )
    }

    /// Returns the message that the table has rows, or may have rows that the sink cannot see, and the
    /// positions that this host left are gone.
    pub fn gone(&self) -> String {
        let positions = self.positions_text();
        self.to_put_back(&format!(
            "the {positions} are gone from headworks_positions while the table has rows, or may have rows that the sink \
             does not see"
        ))
    }

    /// Returns the message that the table of positions has rows of some partitions only.
    pub fn partly_gone(&self) -> String {
        let positions = self.positions_text();
        self.to_put_back(&format!("the {positions} are gone from headworks_positions for some partitions"))
    }

    /// Returns the message that a sink that began according to `begin: now` has no positions any more.
    pub fn begun(&self, kept: &Range<Offset>) -> String {
        format!(
            "the {} are not in headworks_positions, and the sink has begun before, as `begin: now` in sinks.{sink} \
             said: nothing is written, so that no message is skipped; put the rows of headworks_positions back, or set \
             `begin: start` in sinks.{sink} to write what the stream still has (offsets {} to {}), and restart; or, to \
             write only what comes from now on, take `begin` out, restart, set `begin: now` again and restart",
            self.positions_text(),
            kept.start.0,
            kept.end.0.saturating_sub(1),
            sink = self.sink,
        )
    }

    fn to_put_back(&self, what: &str) -> String {
        format!(
            "{what}: nothing is written, so that no row comes twice; put the rows of headworks_positions back (and the table, where it is gone), or \
             set `begin: start` in sinks.{} to write what the stream still has again from the beginning, or \
             `begin: now` to write only what comes from now on, and restart",
            self.sink
        )
    }

    /// Returns the message that names the present holder of a claim with a former name.
    pub(super) fn renamed(&self, holder: &str) -> String {
        format!("{holder} as pipeline \"{}\", sink \"{}\"", self.pipeline, self.sink)
    }

    pub(super) fn unreadable(&self, partition: Partition) -> Error {
        Error::Setup(format!(
            "the {} have a column `openings` that cannot be read in partition {}: put back what it was, or NULL",
            self.positions_text(),
            partition.0
        ))
    }

    pub fn positions_text(&self) -> String {
        format!("positions of pipeline \"{}\" in sink \"{}\"", self.pipeline, self.sink)
    }
}
