//! Which version of a pipeline's steps runs which messages.
//!
//! A version begins at one offset for all sinks, whichever reader comes to that offset and when.
//! So a message whose route a new version changes is in the sink of the one route or of the other,
//! and never in both or in neither. A new version begins behind every message that a reader has
//! handed out and every message that a sink has: see [`Schedule::flip`]. The versions before it
//! stay until every sink is past what they run.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::lane::LaneId;
use super::records::{Key, Recorded, Records};
use super::swap::Wanted;
use super::worker::Steps;
use crate::batch::{Offset, Partition};
use crate::step::{Chain, StepFactory, VERSIONS_MAX};
use crate::stream::{AppendError, Ticket};

/// The first offset of a version, by partition.
pub type Begins = Arc<[Offset]>;

/// The versions of a pipeline's steps, oldest first: those that run messages that the stream still
/// has, at most [`VERSIONS_MAX`] of them and those that a sink needs. A message belongs to the last
/// version that begins at or before it; the first one has all that lies before.
pub struct Versions {
    list: Vec<Version>,
    records: Records,
    /// Records to be removed.
    gone: Vec<Key>,
}

struct Version {
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

impl Versions {
    /// Returns the versions that earlier processes recorded, of a stream that ends at `end`.
    pub fn new(records: Records, recorded: Vec<Recorded>, end: Offset) -> Self {
        let version = |Recorded { key, begins: before, recipes, holds }| {
            // Behind the end of a stream that lost it other messages come, which are the version's.
            let begins: Begins = (*before).iter().map(|begin: &Offset| *begin.min(&end)).collect();
            let is_recorded = begins == before;
            Version { begins, chain: None, recipes, key, is_recorded, holds, is_new: false }
        };
        let list = recorded.into_iter().map(version).collect();
        let mut versions = Self { list, records, gone: Vec::new() };
        versions.drop_idle();
        versions
    }

    pub fn len(&self) -> usize {
        self.list.len()
    }

    pub fn partitions(&self) -> usize {
        self.records.partitions()
    }

    /// Returns the generation of the newest steps; `None` before there are any in this process.
    pub fn generation(&self) -> Option<u64> {
        Some(self.list.last()?.chain.as_ref()?.generation)
    }

    /// Returns whether the newest version has the steps of `chain`, the very same.
    pub fn runs(&self, chain: &Chain) -> bool {
        let newest = self.list.last().and_then(|version| version.chain.as_ref());
        let same = |(a, b): (&Arc<_>, &Arc<_>)| Arc::ptr_eq(a, b);
        newest.is_some_and(|newest| {
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
        let chain = Some(chain.clone());
        self.list.push(Version {
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
        if let Some(version) = self.list.iter_mut().find(is_it) {
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
        self.release();
    }

    /// Says that no version before the newest one waits for it.
    pub fn release(&mut self) {
        let older = self.list.iter_mut().rev().skip(1);
        for version in older.filter(|version| version.holds) {
            (version.holds, version.is_recorded) = (false, false);
        }
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
    pub fn needed_from(&self, from: &[Offset]) -> Vec<(Begins, Wanted)> {
        let wanted = |version: &Version| match &version.chain {
            Some(chain) => Wanted::Chain(chain.clone()),
            None => Wanted::Recipes(version.recipes.clone()),
        };
        let needed = &self.list[self.first_above(from)..];
        needed.iter().map(|version| (Arc::clone(&version.begins), wanted(version))).collect()
    }

    /// Keeps the chain of the version that begins at `begins`, which was made again.
    pub fn made_again(&mut self, begins: &Begins, chain: Chain) {
        if let Some(i) = self.place_of(begins) {
            self.list[i].chain.get_or_insert(chain);
        }
    }

    /// Drops a version that cannot be made again: the next one has its messages, in every lane.
    /// Returns the first of them and the end of the last one.
    pub fn give_to_next(&mut self, begins: &Begins) -> Option<(Offset, Offset)> {
        let i = self.place_of(begins)?;
        let (begin, end) = (begins.iter().min()?, *self.ends(i).iter().max()?);
        self.list.get_mut(i + 1)?.begin_at(begins);
        self.gone.push(self.list.remove(i).key);
        Some((*begin, end))
    }

    /// Returns the place of the version that was handed out with these `begins`.
    fn place_of(&self, begins: &Begins) -> Option<usize> {
        self.list.iter().position(|version| Arc::ptr_eq(&version.begins, begins))
    }

    /// Drops the oldest version, whose messages the next one has. Returns the end of the last one.
    pub fn drop_oldest(&mut self) -> Offset {
        let end = self.ends(0).into_iter().max().unwrap_or_default();
        self.gone.push(self.list.remove(0).key);
        end
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

    /// Returns whether it can be made again from its recipes.
    fn is_stored(&self) -> bool {
        self.chain.as_ref().is_none_or(|chain| chain.steps.iter().all(|step| step.is_stored()))
    }
}

fn recipes(chain: &Chain) -> Vec<String> {
    chain.steps.iter().map(|step| step.recipe()).collect()
}

/// Returns by partition where the first of the versions that follow begins.
fn ends<'b>(mut following: impl Iterator<Item = &'b Begins>) -> Vec<Offset> {
    let mut ends = following.next().map(|begins| begins.to_vec()).unwrap_or_default();
    for begins in following {
        for (end, begin) in ends.iter_mut().zip(begins.iter()) {
            *end = (*end).min(*begin);
        }
    }
    ends
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
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::pipeline::dead_letters::DeadLetters;
    use crate::pipeline::letter::Names;
    use crate::problems::Problem;
    use crate::step::{Step, StepId};
    use crate::stream::Stream;
    use crate::stream::memory::MemoryStream;

    fn begins(begins: [u64; 2]) -> Begins {
        begins.into_iter().map(Offset).collect()
    }

    fn chain(generation: u64) -> Chain {
        Chain { generation, steps: Arc::new([]), hold: None }
    }

    /// A step whose plugin file may not be stored yet.
    struct Stored(StepId, AtomicBool);

    impl StepFactory for Stored {
        fn id(&self) -> &StepId {
            &self.0
        }

        fn describe(&self) -> String {
            String::new()
        }

        fn instantiate(&self, _: u32) -> Result<Box<dyn Step>, Vec<Problem>> {
            Err(Vec::new())
        }

        fn recipe(&self) -> String {
            "stored".to_owned()
        }

        fn is_stored(&self) -> bool {
            self.1.load(Ordering::Acquire)
        }
    }

    /// The versions that are recorded, of a stream that ends at `end`.
    async fn recorded(dead: &Arc<dyn Stream>, end: u64) -> Versions {
        let source = MemoryStream::new("telemetry", 2);
        let names = || Names::new(vec!["p".to_owned()], vec!["w".to_owned()], Arc::default());
        let letters = DeadLetters::open(Arc::clone(dead), names(), &*source, u64::MAX, None).await.unwrap();
        let identity = crate::stream::Identity { log: uuid::Uuid::nil(), ..source.identity() };
        let (records, recorded) = Records::open(Arc::clone(dead), Arc::new(letters), &names(), identity);
        Versions::new(records, recorded, Offset(end))
    }

    /// With the versions that begin there, of the generations from 1 on.
    async fn versions(dead: &Arc<dyn Stream>, all: &[[u64; 2]]) -> Versions {
        let mut versions = recorded(dead, 1_000).await;
        for (generation, at) in (1..).zip(all) {
            versions.add(begins(*at), &chain(generation)).unwrap();
        }
        versions
    }

    async fn recorded_begins(dead: &Arc<dyn Stream>, end: u64) -> Vec<Begins> {
        recorded(dead, end).await.list.into_iter().map(|version| version.begins).collect()
    }

    fn generations(versions: &Versions) -> Vec<u64> {
        versions.list.iter().map(|version| version.chain.as_ref().unwrap().generation).collect()
    }

    fn from(versions: &Versions, from: [u64; 2]) -> Vec<u64> {
        let of_all = versions.needed_from(&begins(from)).into_iter();
        let generation = |(_, wanted)| match wanted {
            Wanted::Chain(chain) => chain.generation,
            Wanted::Recipes(_) => 0,
        };
        of_all.map(generation).collect()
    }

    #[tokio::test]
    async fn a_version_stays_while_the_stream_has_its_messages() {
        let mut versions =
            versions(&MemoryStream::new("dead-letters", 1), &[[0, 0], [10, 10], [20, 20]]).await;
        assert_eq!(from(&versions, [9, 30]), [1, 2, 3]);
        assert_eq!(from(&versions, [10, 10]), [2, 3]);
        assert_eq!((versions.needed(Offset(9)), versions.needed(Offset(19))), (3, 2));
        versions.tidy(Offset(10), Offset(1_000));
        assert_eq!(from(&versions, [0, 0]), [0, 3], "a database that goes back needs the second one again");
        assert_eq!(versions.not_kept(&begins([10, 12])), None);
        assert_eq!(versions.not_kept(&begins([7, 12])), Some((Offset(7), Offset(10))));
        versions.tidy(Offset(1_000), Offset(1_000));
        assert_eq!(generations(&versions), [3]);
    }

    #[tokio::test]
    async fn past_the_bound_the_oldest_version_that_no_sink_needs_goes_first() {
        let all: Vec<_> = (0..VERSIONS_MAX as u64 + 2).map(|n| [10 * n, 10 * n]).collect();
        let mut versions = versions(&MemoryStream::new("dead-letters", 1), &all).await;
        versions.tidy(Offset(0), Offset(10));
        assert_eq!((versions.len(), versions.needed(Offset(10))), (VERSIONS_MAX + 1, VERSIONS_MAX + 1));
        versions.tidy(Offset(0), Offset(1_000));
        assert_eq!((versions.len(), versions.needed(Offset(1_000))), (VERSIONS_MAX, 1));
    }

    #[tokio::test]
    async fn a_version_that_runs_nothing_is_not_kept() {
        let all = [[0, 0], [10, 10], [10, 10], [20, 20]];
        let mut versions = versions(&MemoryStream::new("dead-letters", 1), &all).await;
        assert_eq!(generations(&versions), [1, 3, 4]);
        versions.begin_newest_at(&[Offset(5), Offset(15)]);
        assert_eq!(generations(&versions), [1, 3, 4], "of the second partition 10 to 15");
        versions.begin_newest_at(&[Offset(30), Offset(10)]);
        assert_eq!(generations(&versions), [1, 4]);
        assert_eq!(versions.list[1].begins, begins([5, 10]));
    }

    #[tokio::test]
    async fn versions_are_remembered_while_they_are_needed() {
        let dead = MemoryStream::new("dead-letters", 1);
        let mut before = versions(&dead, &[[0, 0], [10, 10], [20, 20], [900, 900]]).await;
        before.tidy(Offset(10), Offset(10));
        before.begin_newest_at(&[Offset(30), Offset(800)]);
        before.record().unwrap();
        let mut after = recorded(&dead, 1_000).await;
        let all: Vec<_> = after.list.iter().map(|version| Arc::clone(&version.begins)).collect();
        assert_eq!(all, [begins([10, 10]), begins([20, 20]), begins([30, 800])]);
        after.begin(&[Offset(500); 2], &chain(7)).unwrap();
        assert_eq!((after.generation(), from(&after, [0, 0])), (Some(7), vec![0, 0, 7]));
        after.tidy(Offset(20), Offset(20));
        assert_eq!(recorded_begins(&dead, 1_000).await, [begins([20, 20]), begins([30, 800])]);
    }

    #[tokio::test]
    async fn a_version_that_begins_where_the_stream_lost_its_end_begins_there_after_each_start() {
        let dead = MemoryStream::new("dead-letters", 1);
        versions(&dead, &[[0, 0], [120, 120]]).await;
        let mut after = recorded(&dead, 20).await;
        assert!(!after.are_recorded());
        assert!(after.record().unwrap() > Ticket::default() && after.are_recorded());
        assert_eq!(recorded_begins(&dead, 80).await, [begins([0, 0]), begins([20, 20])]);
    }

    #[tokio::test]
    async fn messages_of_a_version_that_is_gone_are_the_next_ones_wherever_a_lane_begins() {
        let dead = MemoryStream::new("dead-letters", 1);
        let mut versions = versions(&dead, &[[0, 0], [10, 10], [20, 20]]).await;
        let second = Arc::clone(&versions.list[1].begins);
        assert_eq!(versions.give_to_next(&second), Some((Offset(10), Offset(20))));
        let of_all = |versions: &Versions| {
            versions.list.iter().map(|version| Arc::clone(&version.begins)).collect::<Vec<_>>()
        };
        assert_eq!(
            (of_all(&versions), generations(&versions)),
            (vec![begins([0, 0]), begins([10, 10])], vec![1, 3])
        );
        assert_eq!((from(&versions, [15, 15]), from(&versions, [0, 0])), (vec![3], vec![1, 3]));
        versions.tidy(Offset(0), Offset(0));
        assert_eq!(recorded_begins(&dead, 1_000).await, of_all(&versions));
        let newest = Arc::clone(&versions.list[1].begins);
        assert_eq!(versions.give_to_next(&newest), None, "nothing is next to it");
    }

    #[tokio::test]
    async fn each_version_that_found_no_room_is_recorded_once_there_is() {
        let memory = MemoryStream::with_hooks("dead-letters", 1);
        let dead: Arc<dyn Stream> = Arc::clone(&memory) as Arc<dyn Stream>;
        memory.set_no_space(true);
        let mut full = versions(&dead, &[[0, 0], [10, 10]]).await;
        full.tidy(Offset(0), Offset(0));
        assert!(!full.are_recorded() && recorded(&dead, 1_000).await.len() == 0);
        memory.set_no_space(false);
        full.add(begins([20, 20]), &chain(3)).unwrap();
        assert!(full.are_recorded());
        let all = [begins([0, 0]), begins([10, 10]), begins([20, 20])];
        assert_eq!(recorded_begins(&dead, 1_000).await, all, "in their order");
    }

    #[tokio::test]
    async fn a_version_is_recorded_once_its_plugin_files_are_stored() {
        let dead = MemoryStream::new("dead-letters", 1);
        let mut versions = versions(&dead, &[[0, 0]]).await;
        let step =
            Arc::new(Stored(StepId { pipeline: "p".into(), step: "s".into() }, AtomicBool::new(false)));
        let steps: Arc<[Arc<dyn StepFactory>]> = Arc::new([Arc::clone(&step) as Arc<dyn StepFactory>]);
        versions.add(begins([10, 10]), &Chain { generation: 2, steps, hold: None }).unwrap();
        assert!(!versions.are_recorded());
        assert_eq!(recorded_begins(&dead, 1_000).await, [begins([0, 0])]);
        step.1.store(true, Ordering::Release);
        versions.tidy(Offset(0), Offset(0));
        assert!(versions.are_recorded());
        assert_eq!(recorded_begins(&dead, 1_000).await, [begins([0, 0]), begins([10, 10])]);
    }

    #[test]
    fn a_version_begins_behind_what_any_lane_has_handed_out() {
        let schedule = Schedule::default();
        assert!(schedule.claim(0, Offset(10)).is_empty());
        assert!(schedule.claim(1, Offset(30)).is_empty());
        let flip = |at_least: u64| {
            let lanes = [0, 1].map(|lane| (lane, vec![Steps::default()])).into_iter();
            let mut begin = None;
            let record = |begins: &Begins| {
                begin = Some(begins[0].0);
                Ok(Ticket(1))
            };
            schedule.flip(lanes, &[Offset(0), Offset(at_least)], record).unwrap();
            begin
        };
        assert_eq!(flip(0), Some(30));
        // The one before has run nothing, in any lane.
        assert_eq!(flip(30), Some(30));
        let begins = |flips: Vec<Flip>| flips.iter().map(|flip| flip.begins[0].0).collect::<Vec<_>>();
        assert_eq!(begins(schedule.claim(1, Offset(40))), [30]);
        assert_eq!(flip(50), Some(50));
        let lanes = [(0, Vec::new())].into_iter();
        assert!(schedule.flip(lanes, &[Offset(60)], |_| Err(AppendError::Full)).is_err());
        assert_eq!(begins(schedule.claim(0, Offset(20))), [30, 50]);
        schedule.forget(1);
        assert!(schedule.claim(1, Offset(60)).is_empty() && schedule.claim(0, Offset(60)).is_empty());
    }

    #[test]
    fn a_worker_runs_a_message_with_the_last_version_that_begins_before_it() {
        let mut versions = OfWorker(Vec::new());
        for at in [[0, 0], [10, 20], [15, 18]] {
            versions.push(begins(at), Steps::default());
        }
        let of = |versions: &OfWorker, partition, offset| versions.of(Partition(partition), Offset(offset));
        assert_eq!(of(&versions, 0, 9), (0, Some(Offset(10))));
        assert_eq!(of(&versions, 0, 10), (1, Some(Offset(15))));
        assert_eq!(of(&versions, 1, 17), (0, Some(Offset(18))));
        assert_eq!(of(&versions, 1, 18), (2, None));
        versions.drop_below(Offset(17));
        assert_eq!(versions.0.len(), 3);
        versions.drop_below(Offset(18));
        assert_eq!((versions.0.len(), of(&versions, 0, 18)), (1, (0, None)));
    }
}
