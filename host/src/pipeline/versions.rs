//! Which version of a pipeline's steps runs which messages.
//!
//! A version begins at one offset for all sinks, whichever reader comes to that offset and when.
//! So a message whose route a new version changes is in the sink of the one route or of the other,
//! and never in both or in neither. A new version begins behind every message that a reader has
//! handed out and every message that a sink has: see [`super::schedule`]. The versions before it
//! stay until every sink is past what they run.

use std::sync::Arc;

use super::records::{Key, Recorded, Records};
use super::swap::Wanted;
use crate::batch::Offset;
use crate::step::{Chain, StepFactory, VERSIONS_MAX};
use crate::stream::{AppendError, Ticket};

/// The first offset of a version, by partition.
pub type Begins = Arc<[Offset]>;

/// Names a version within this process, wherever it begins by now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VersionId(u64);

/// The versions of a pipeline's steps, oldest first: those that run messages that the stream still
/// has, at most [`VERSIONS_MAX`] of them and those that a sink needs: no further one is added to so
/// many that are needed. A message belongs to the last
/// version that begins at or before it; the first one has all that lies before.
pub struct Versions {
    list: Vec<Version>,
    next_id: u64,
    records: Records,
    /// Records to be removed.
    gone: Vec<Key>,
}

/// A version that a lane needs, and where it begins.
pub struct Needed {
    pub id: VersionId,
    pub begins: Begins,
}

struct Version {
    id: VersionId,
    begins: Begins,
    /// `None`: to be made again from the recipes by the lane that needs it.
    chain: Option<Chain>,
    recipes: Vec<String>,
    /// Key of its record.
    key: Key,
    /// Whether the record is there and says the same.
    is_recorded: bool,
    /// Whether it waits at a message for the next version.
    holds: bool,
    /// Whether it began in this process.
    is_new: bool,
}

impl Versions {
    /// Returns the versions that earlier processes recorded, of a stream that ends at `end`.
    pub fn new(records: Records, recorded: Vec<Recorded>, end: Offset) -> Self {
        let version = |(id, recorded)| {
            let Recorded { key, begins: before, recipes, holds } = recorded;
            // Behind the end of a stream that lost it other messages come, which are the version's.
            let begins: Begins = (*before).iter().map(|begin: &Offset| *begin.min(&end)).collect();
            let is_recorded = begins == before;
            let id = VersionId(id);
            Version { id, begins, chain: None, recipes, key, is_recorded, holds, is_new: false }
        };
        let next_id = recorded.len() as u64;
        let list = (0..).zip(recorded).map(version).collect();
        let mut versions = Self { list, next_id, records, gone: Vec::new() };
        versions.drop_idle();
        versions
    }

    pub fn partitions(&self) -> usize {
        self.records.partitions()
    }

    /// Returns the generation of the newest steps; `None` before there are any in this process.
    pub fn generation(&self) -> Option<u64> {
        Some(self.newest()?.generation)
    }

    /// Returns the steps of the newest version; `None` before there are any in this process.
    pub fn newest(&self) -> Option<&Chain> {
        self.list.last()?.chain.as_ref()
    }

    /// Returns whether the newest version is made of what `chain` is made of.
    pub fn is_newest(&self, chain: &Chain) -> bool {
        self.list.last().is_some_and(|newest| newest.recipes == recipes(chain))
    }

    /// Returns whether the newest version has the steps of `chain`, the very same.
    pub fn runs(&self, chain: &Chain) -> bool {
        let same = |(a, b): (&Arc<_>, &Arc<_>)| Arc::ptr_eq(a, b);
        self.newest().is_some_and(|newest| {
            newest.steps.len() == chain.steps.len() && newest.steps.iter().zip(&*chain.steps).all(same)
        })
    }

    /// Lets a process begin with `chain`, before it has read a message: as the newest version where
    /// that has the same steps, or else from `taken` on. The first version of all has every message.
    pub fn begin(&mut self, taken: &[Offset], chain: &Chain) -> Result<(), AppendError> {
        let begins = match self.list.last_mut() {
            None => vec![Offset(0); self.partitions()].into(),
            Some(newest) if recipes(chain) == newest.recipes => {
                newest.chain = Some(chain.clone());
                return Ok(());
            }
            // It has run nothing.
            Some(newest) if newest.is_new => Arc::clone(&newest.begins),
            Some(_) => taken.into(),
        };
        self.add(begins, chain).map(drop)
    }

    /// Adds the newest version, and drops those that run no message because of it. The ticket is
    /// that of its record.
    pub fn add(&mut self, begins: Begins, chain: &Chain) -> Result<Ticket, AppendError> {
        let (recipes, key) = (recipes(chain), self.records.next_key());
        let (id, chain) = (self.new_id(), Some(chain.clone()));
        self.list.push(Version {
            id,
            begins,
            chain,
            recipes,
            key,
            is_recorded: false,
            holds: false,
            is_new: true,
        });
        let recorded = self.record();
        match recorded {
            Ok(_) => self.drop_idle(),
            Err(_) => drop(self.list.pop()),
        }
        recorded
    }

    /// Lets the newest version begin at `begins` where that is earlier: see [`Self::record`].
    fn begin_newest_at(&mut self, begins: &[Offset]) {
        if let Some(newest) = self.list.last_mut() {
            newest.begin_at(begins);
            self.drop_idle();
        }
    }

    /// Says that a version of this process waits at a message for the next one.
    pub fn hold(&mut self, generation: u64) {
        let is_it =
            |version: &&mut Version| version.chain.as_ref().is_some_and(|it| it.generation == generation);
        // Those of earlier processes have one generation; only the newest of them can hold.
        if let Some(version) = self.list.iter_mut().rfind(is_it) {
            version.is_recorded &= version.holds;
            version.holds = true;
        }
    }

    /// Returns whether other steps wait at a message for these.
    pub fn holds_for(&self, chain: &Chain) -> bool {
        let recipes = recipes(chain);
        self.list.iter().any(|version| version.holds && version.recipes != recipes)
    }

    /// Lets the newest version begin at `begins` where that is earlier: no version before it waits.
    pub fn give_way(&mut self, begins: &[Offset]) {
        self.begin_newest_at(begins);
        self.list.iter_mut().rev().skip(1).for_each(Version::release);
    }

    /// Says that no version waits at a message, but for one that held in an earlier process: see
    /// [`Wanted::Newest`].
    pub fn release(&mut self) {
        let waits = |version: &Version| version.chain.as_ref().is_some_and(|chain| chain.hold.is_some());
        self.list.iter_mut().filter(|version| !waits(version)).for_each(Version::release);
    }

    /// Puts `chain` in the place of the newest version, which cannot be made again. Returns where
    /// that begins.
    pub fn replace_newest(&mut self, chain: &Chain) -> Option<Offset> {
        let id = self.new_id();
        let newest = self.list.last_mut()?;
        let (chain, recipes) = (Some(chain.clone()), recipes(chain));
        let (begins, key) = (Arc::clone(&newest.begins), newest.key.clone());
        *newest = Version { id, begins, chain, recipes, key, is_recorded: false, holds: false, is_new: true };
        newest.begins.iter().min().copied()
    }

    /// Records each version whose record does not say what it is: before a lane runs messages with
    /// it. A version goes on without a record where there is no room for one, and while a plugin
    /// file of it is not stored: see [`Self::are_recorded`].
    pub fn record(&mut self) -> Result<Ticket, AppendError> {
        let mut last = Ticket::default();
        for version in self.list.iter_mut().filter(|version| !version.is_recorded && version.is_stored()) {
            match self.records.set(&version.key, &version.begins, &version.recipes, version.holds) {
                Ok(ticket) => {
                    version.is_recorded = true;
                    last = last.max(ticket);
                }
                Err(AppendError::NoSpace | AppendError::TooLarge(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(last)
    }

    /// Returns whether a restart can tell which version has which message.
    pub fn are_recorded(&self) -> bool {
        self.list.iter().all(|version| version.is_recorded)
    }

    /// Returns the versions of messages at or above `from`, by partition, oldest first.
    pub fn needed_from(&self, from: &[Offset]) -> Vec<(Needed, Wanted)> {
        let newest = self.list.len().saturating_sub(1);
        let wanted = |(i, version): (usize, &Version)| {
            let wanted = match &version.chain {
                Some(chain) => Wanted::Chain(chain.clone()),
                None if i == newest => Wanted::Newest(version.recipes.clone(), version.holds),
                None => Wanted::Older(version.recipes.clone()),
            };
            (Needed { id: version.id, begins: Arc::clone(&version.begins) }, wanted)
        };
        self.list.iter().enumerate().skip(self.first_above(from)).map(wanted).collect()
    }

    /// Keeps the chain of a version that was made again.
    pub fn made_again(&mut self, id: VersionId, chain: Chain) {
        if let Some(i) = self.place_of(id) {
            self.list[i].chain.get_or_insert(chain);
        }
    }

    /// Drops a version that cannot be made again: the next one has its messages, in every lane.
    /// Returns the first of them and the end of the last one.
    pub fn give_to_next(&mut self, id: VersionId) -> Option<(Offset, Offset)> {
        let i = self.place_of(id)?;
        let begins = Arc::clone(&self.list[i].begins);
        let (begin, end) = (*begins.iter().min()?, *self.ends(i).iter().max()?);
        self.list.get_mut(i + 1)?.begin_at(&begins);
        self.gone.push(self.list.remove(i).key);
        Some((begin, end))
    }

    fn place_of(&self, id: VersionId) -> Option<usize> {
        self.list.iter().position(|version| version.id == id)
    }

    /// Returns whether messages at or above `from`, by partition, need a version.
    pub fn needs(&self, from: &[Offset], id: VersionId) -> bool {
        self.place_of(id).is_some_and(|place| self.first_above(from) <= place)
    }

    /// Returns the number of versions that a sink needs, where each has all below `had`.
    pub fn needed(&self, had: Offset) -> usize {
        self.list.len() - self.first_of(had)
    }

    /// Returns the first and the end of the messages at or above `from`, by partition, that were of a
    /// version which is not kept any more.
    pub fn not_kept(&self, from: &[Offset]) -> Option<(Offset, Offset)> {
        let begins = ends(self.list.iter().map(|version| &version.begins));
        let below: Vec<_> = from.iter().zip(&begins).filter(|(from, begin)| from < begin).collect();
        Some((*below.iter().map(|(from, _)| *from).min()?, *below.iter().map(|(_, begin)| *begin).max()?))
    }

    /// Drops the versions of which the stream, which begins at `start`, has no message any more, and
    /// past [`VERSIONS_MAX`] the oldest of those that no sink needs: each has all below `had`, and only
    /// one whose database goes back gets it again. Records what found no room.
    pub fn tidy(&mut self, start: Offset, had: Offset) {
        let over = self.list.len().saturating_sub(VERSIONS_MAX);
        let first = self.first_of(start).max(over.min(self.first_of(had)));
        self.gone.extend(self.list.drain(..first).map(|version| version.key));
        // Where it fails it is tried again.
        let _ = self.record();
        let needed = self.first_of(had);
        // The code of versions that nobody may ever need is not kept in memory.
        self.list[..needed].iter_mut().filter(|version| version.is_recorded).for_each(|it| it.chain = None);
        self.records.remove(&mut self.gone);
    }

    /// The steps of older versions that the newest one does not have.
    pub fn replaced(&self) -> impl Iterator<Item = &Arc<dyn StepFactory>> {
        let steps = |version: &Version| version.chain.as_ref().map(|chain| Arc::clone(&chain.steps));
        let newest = self.list.last().and_then(steps).unwrap_or_default();
        let older = self.list.iter().rev().skip(1).filter_map(|version| version.chain.as_ref());
        let older = older.flat_map(|chain| chain.steps.iter());
        older.filter(move |step| !newest.iter().any(|other| Arc::ptr_eq(other, step)))
    }

    fn ends(&self, i: usize) -> Vec<Offset> {
        ends(self.list[i + 1..].iter().map(|version| &version.begins))
    }

    fn first_of(&self, from: Offset) -> usize {
        self.first_above(&vec![from; self.partitions()])
    }

    fn first_above(&self, from: &[Offset]) -> usize {
        let last = self.list.len().saturating_sub(1);
        let is_needed = |i: &usize| self.ends(*i).iter().zip(from).any(|(end, from)| end > from);
        (0..last).find(is_needed).unwrap_or(last)
    }

    fn new_id(&mut self) -> VersionId {
        self.next_id += 1;
        VersionId(self.next_id - 1)
    }

    fn drop_idle(&mut self) {
        for i in (0..self.list.len().saturating_sub(1)).rev() {
            if self.list[i].begins.iter().zip(self.ends(i)).all(|(begin, end)| end <= *begin) {
                self.gone.push(self.list.remove(i).key);
            }
        }
    }
}

impl Version {
    fn begin_at(&mut self, begins: &[Offset]) {
        let earlier: Begins = self.begins.iter().zip(begins).map(|(a, b)| *a.min(b)).collect();
        self.is_recorded &= earlier == self.begins;
        self.begins = earlier;
    }

    /// Says that it waits at no message any more.
    fn release(&mut self) {
        self.is_recorded &= !self.holds;
        self.holds = false;
        self.chain.iter_mut().for_each(|chain| chain.hold = None);
    }

    /// Returns whether it can be made again from its recipes.
    fn is_stored(&self) -> bool {
        self.chain.as_ref().is_none_or(|chain| chain.steps.iter().all(|step| step.is_stored()))
    }
}

fn recipes(chain: &Chain) -> Vec<String> {
    chain.steps.iter().map(|step| step.recipe()).collect()
}

/// Returns by partition where the first of the versions that follow begins.
pub(super) fn ends<'b>(mut following: impl Iterator<Item = &'b Begins>) -> Vec<Offset> {
    let mut ends = following.next().map(|begins| begins.to_vec()).unwrap_or_default();
    for begins in following {
        for (end, begin) in ends.iter_mut().zip(begins.iter()) {
            *end = (*end).min(*begin);
        }
    }
    ends
}

#[cfg(test)]
mod tests;
