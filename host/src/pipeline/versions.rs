//! Which version of a pipeline's steps runs which messages.
//!
//! A version begins at one offset for all sinks, whichever reader comes to that offset and when.
//! So a message whose route a new version changes is in the sink of the one route or of the other,
//! and never in both or in neither. A new version begins behind every message that a reader has
//! handed out and every message that a sink has: see [`Schedule::flip`]. The versions before it
//! stay until every sink is past what they run.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::lane::LaneId;
use super::records::{Key, Records, Remembered};
use super::worker::Steps;
use crate::batch::{Offset, Partition};
use crate::step::{Chain, Recall, StepFactory};
use crate::stream::{AppendError, Ticket};

/// The first offset of a version, by partition.
pub type Begins = Arc<[Offset]>;

/// The versions of a pipeline's steps that some sink still needs, oldest first. A message belongs
/// to the last version that begins at or before it; the first one has all that lies before.
pub struct Versions {
    list: Vec<Version>,
    records: Records,
    recall: Recall,
    /// Records to be removed.
    gone: Vec<Key>,
}

struct Version {
    begins: Begins,
    /// `None`: of an earlier process, and not made again yet.
    chain: Option<Chain>,
    recipes: Vec<String>,
    /// Key of the version's record.
    key: Option<Key>,
    /// The record is there, and says where it begins.
    is_noted: bool,
    /// Of this process.
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
    /// `remembered` by earlier processes, of a stream that ends at `end`.
    pub fn new(records: Records, remembered: Vec<Remembered>, end: Offset, recall: Recall) -> Self {
        let version = |Remembered { key, begins, recipes }| {
            // A stream that lost its end goes on there.
            let begins = (*begins).iter().map(|begin: &Offset| *begin.min(&end)).collect();
            Version { begins, chain: None, recipes, key: Some(key), is_noted: true, is_new: false }
        };
        let list = remembered.into_iter().map(version).collect();
        let mut versions = Self { list, records, recall, gone: Vec::new() };
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
        let recipes = recipes(chain);
        let chain = Some(chain.clone());
        self.list.push(Version { begins, chain, recipes, key: None, is_noted: false, is_new: true });
        match self.note() {
            Ok(ticket) => {
                self.drop_idle();
                Ok(ticket)
            }
            Err(error) => {
                self.list.pop();
                Err(error)
            }
        }
    }

    /// Lets the newest version begin at `begins` where that is earlier.
    pub fn begin_newest_at(&mut self, begins: &[Offset]) -> Result<(), AppendError> {
        let Some(newest) = self.list.last_mut() else { return Ok(()) };
        newest.begins = newest.begins.iter().zip(begins).map(|(a, b)| *a.min(b)).collect();
        let noted = self.note();
        self.drop_idle();
        noted.map(drop)
    }

    /// Records where the newest version begins. It goes on without a record where there is no room
    /// for one: see [`Self::is_noted`].
    fn note(&mut self) -> Result<Ticket, AppendError> {
        let Some(newest) = self.list.last_mut() else { return Ok(Ticket::default()) };
        let noted = match &newest.key {
            Some(key) => self.records.set(key, &newest.begins, &newest.recipes),
            None => self.records.add(&newest.begins, &newest.recipes).map(|(key, ticket)| {
                newest.key = Some(key);
                ticket
            }),
        };
        newest.is_noted = noted.is_ok();
        match noted {
            Err(AppendError::NoSpace | AppendError::TooLarge(_)) => Ok(Ticket::default()),
            noted => noted,
        }
    }

    /// Returns whether a restart can tell where the newest version began.
    pub fn is_noted(&self) -> bool {
        self.list.last().is_none_or(|version| version.is_noted)
    }

    /// Returns the versions of messages at or above `from`, by partition, oldest first. One of an
    /// earlier process that cannot be made again is dropped, and the next one has its messages:
    /// `lost` is told why.
    pub fn needed_from(&mut self, from: &[Offset], mut lost: impl FnMut(String)) -> Vec<(Begins, Chain)> {
        let mut i = self.first_above(from);
        let first = i;
        while i + 1 < self.list.len() {
            match self.make(i) {
                Ok(()) => i += 1,
                Err(why) => {
                    lost(why);
                    self.give_to_next(i);
                }
            }
        }
        let made = |version: &Version| Some((Arc::clone(&version.begins), version.chain.clone()?));
        self.list[first..].iter().filter_map(made).collect()
    }

    /// Drops a version whose messages the next one has from now on, for whichever reader.
    fn give_to_next(&mut self, i: usize) {
        let gone = self.list.remove(i);
        let next = &mut self.list[i];
        next.begins = next.begins.iter().zip(&*gone.begins).map(|(a, b)| *a.min(b)).collect();
        let recorded = next.key.as_ref().map(|key| self.records.set(key, &next.begins, &next.recipes));
        // Else the record stays, and the next start gives the messages to the next version again.
        if matches!(recorded, Some(Ok(_))) {
            self.gone.extend(gone.key);
        }
    }

    /// Drops the oldest version, whose messages the next one has.
    pub fn drop_oldest(&mut self) {
        self.gone.extend(self.list.remove(0).key);
    }

    fn make(&mut self, i: usize) -> Result<(), String> {
        let version = &mut self.list[i];
        if version.chain.is_none() {
            let steps =
                version.recipes.iter().map(|recipe| (self.recall)(recipe)).collect::<Result<_, _>>()?;
            version.chain = Some(Chain { generation: 0, steps, hold: None });
        }
        Ok(())
    }

    /// Drops the versions that only run messages below `upto`, and records what found no room.
    pub fn tidy(&mut self, upto: Offset) {
        if !self.is_noted() {
            // Where it fails again, it is tried again.
            let _ = self.note();
        }
        if self.list.len() > 1 {
            let first = self.first_above(&vec![upto; self.partitions()]);
            self.gone.extend(self.list.drain(..first).filter_map(|version| version.key));
        }
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

    /// Returns once an append that found no buffer may be tried again.
    pub fn writable(&self) -> impl Future<Output = ()> {
        self.records.writable()
    }

    fn ends(&self, i: usize) -> Vec<Offset> {
        ends(self.list[i + 1..].iter().map(|version| &version.begins))
    }

    fn first_above(&self, from: &[Offset]) -> usize {
        let last = self.list.len().saturating_sub(1);
        let is_needed = |i: &usize| self.ends(*i).iter().zip(from).any(|(end, from)| end > from);
        (0..last).find(is_needed).unwrap_or(last)
    }

    fn drop_idle(&mut self) {
        for i in (0..self.list.len().saturating_sub(1)).rev() {
            if self.list[i].begins.iter().zip(self.ends(i)).all(|(begin, end)| end <= *begin) {
                self.gone.extend(self.list.remove(i).key);
            }
        }
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
    use super::*;
    use crate::pipeline::dead_letters::DeadLetters;
    use crate::pipeline::letter::Names;
    use crate::stream::Stream;
    use crate::stream::memory::MemoryStream;

    fn begins(begins: [u64; 2]) -> Begins {
        begins.into_iter().map(Offset).collect()
    }

    fn chain(generation: u64) -> Chain {
        Chain { generation, steps: Arc::new([]), hold: None }
    }

    /// With the versions that begin there, of the generations from 1 on.
    async fn versions(dead: &Arc<dyn Stream>, all: &[[u64; 2]]) -> Versions {
        let source = MemoryStream::new("telemetry", 2);
        let names = || Names::new(vec!["p".to_owned()], vec!["w".to_owned()], Arc::default());
        let letters = DeadLetters::open(Arc::clone(dead), names(), &*source, u64::MAX, None).await.unwrap();
        let identity = crate::stream::Identity { log: uuid::Uuid::nil(), ..source.identity() };
        let (records, remembered) = Records::open(Arc::clone(dead), Arc::new(letters), &names(), identity);
        let recall: Recall = Arc::new(|recipe| Err(format!("{recipe} is not there")));
        let mut versions = Versions::new(records, remembered, Offset(1_000), recall);
        for (generation, at) in (1..).zip(all) {
            versions.add(begins(*at), &chain(generation)).unwrap();
        }
        versions
    }

    fn generations(versions: &Versions) -> Vec<u64> {
        versions.list.iter().map(|version| version.chain.as_ref().unwrap().generation).collect()
    }

    fn from(versions: &mut Versions, from: [u64; 2]) -> Vec<u64> {
        let of_all = versions.needed_from(&begins(from), |why| panic!("{why}"));
        of_all.into_iter().map(|(_, chain)| chain.generation).collect()
    }

    #[tokio::test]
    async fn a_version_stays_until_every_sink_is_past_what_it_runs() {
        let mut versions =
            versions(&MemoryStream::new("dead-letters", 1), &[[0, 0], [10, 10], [20, 20]]).await;
        assert_eq!(from(&mut versions, [9, 30]), [1, 2, 3]);
        assert_eq!(from(&mut versions, [10, 10]), [2, 3]);
        versions.tidy(Offset(19));
        assert_eq!(generations(&versions), [2, 3]);
        versions.tidy(Offset(1_000));
        assert_eq!(generations(&versions), [3]);
    }

    #[tokio::test]
    async fn a_version_that_runs_nothing_is_not_kept() {
        let all = [[0, 0], [10, 10], [10, 10], [20, 20]];
        let mut versions = versions(&MemoryStream::new("dead-letters", 1), &all).await;
        assert_eq!(generations(&versions), [1, 3, 4]);
        versions.begin_newest_at(&[Offset(5), Offset(15)]).unwrap();
        assert_eq!(generations(&versions), [1, 3, 4], "of the second partition 10 to 15");
        versions.begin_newest_at(&[Offset(30), Offset(10)]).unwrap();
        assert_eq!(generations(&versions), [1, 4]);
        assert_eq!(versions.list[1].begins, begins([5, 10]));
    }

    #[tokio::test]
    async fn versions_are_remembered_while_they_are_needed() {
        let dead = MemoryStream::new("dead-letters", 1);
        let mut before = versions(&dead, &[[0, 0], [10, 10], [20, 20], [5_000, 5_000]]).await;
        before.tidy(Offset(10));
        before.begin_newest_at(&[Offset(30), Offset(2_000)]).unwrap();
        let mut after = versions(&dead, &[]).await;
        let all: Vec<_> = after.list.iter().map(|version| Arc::clone(&version.begins)).collect();
        assert_eq!(all, [begins([10, 10]), begins([20, 20]), begins([30, 1_000])], "the stream ends at 1000");
        after.begin(&[Offset(500); 2], &chain(7)).unwrap();
        assert_eq!(after.generation(), Some(7));
        // One that is not to be had any more leaves its messages to the next.
        after.list[0].recipes = vec!["a".to_owned()];
        let mut lost = Vec::new();
        assert_eq!(after.needed_from(&begins([0, 0]), |why| lost.push(why)).len(), 2);
        assert_eq!(lost, ["a is not there"]);
        after.tidy(Offset(0));
        assert_eq!(versions(&dead, &[]).await.len(), 2);
    }

    #[tokio::test]
    async fn a_version_that_cannot_be_made_again_leaves_its_messages_to_the_next_for_every_reader() {
        let dead = MemoryStream::new("dead-letters", 1);
        versions(&dead, &[[0, 0], [10, 10], [20, 20]]).await;
        for from in [[15, 15], [0, 0]] {
            let mut after = versions(&dead, &[]).await;
            after.begin(&[Offset(500); 2], &chain(7)).unwrap();
            if after.len() == 3 {
                after.list[1].recipes = vec!["a".to_owned()];
            }
            after.needed_from(&begins(from), drop);
            let all: Vec<_> = after.list.iter().map(|version| Arc::clone(&version.begins)).collect();
            assert_eq!(all, [begins([0, 0]), begins([10, 10])], "message 15 is the last version's");
            // The next reader comes after a restart.
            after.tidy(Offset(0));
        }
    }

    #[tokio::test]
    async fn steps_begin_without_room_for_a_record_and_are_noted_once_there_is() {
        let memory = MemoryStream::with_hooks("dead-letters", 1);
        let dead: Arc<dyn Stream> = Arc::clone(&memory) as Arc<dyn Stream>;
        memory.set_no_space(true);
        let mut full = versions(&dead, &[[0, 0]]).await;
        full.tidy(Offset(0));
        assert!(!full.is_noted() && versions(&dead, &[]).await.len() == 0);
        memory.set_no_space(false);
        full.tidy(Offset(0));
        assert!(full.is_noted() && versions(&dead, &[]).await.len() == 1);
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
