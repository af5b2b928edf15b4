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
        Wanted::Older(_) | Wanted::Newest(..) => 0,
    };
    of_all.map(generation).collect()
}

#[tokio::test]
async fn a_version_stays_while_the_stream_has_its_messages() {
    let mut versions = versions(&MemoryStream::new("dead-letters", 1), &[[0, 0], [10, 10], [20, 20]]).await;
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
    assert_eq!((versions.list.len(), versions.needed(Offset(10))), (VERSIONS_MAX + 1, VERSIONS_MAX + 1));
    versions.tidy(Offset(0), Offset(1_000));
    assert_eq!((versions.list.len(), versions.needed(Offset(1_000))), (VERSIONS_MAX, 1));
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
    let second = versions.list[1].id;
    assert_eq!(versions.give_to_next(second), Some((Offset(10), Offset(20))));
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
    let newest = versions.list[1].id;
    assert_eq!(versions.give_to_next(newest), None, "nothing is next to it");
}

/// It was handed out to a lane before.
#[tokio::test]
async fn a_version_that_begins_earlier_by_now_is_the_same_one() {
    let dead = MemoryStream::new("dead-letters", 1);
    versions(&dead, &[[0, 0], [10, 10], [20, 20]]).await;
    let mut versions = recorded(&dead, 1_000).await;
    let needed = versions.needed_from(&begins([0, 0]));
    let newest = needed[2].0.id;
    versions.begin_newest_at(&[Offset(15); 2]);
    assert_ne!(versions.list[2].begins, needed[2].0.begins);
    assert!(versions.needs(&begins([900, 900]), newest));
    versions.made_again(newest, chain(0));
    assert!(versions.newest().is_some());
    // Not one that took its place.
    assert!(versions.replace_newest(&chain(1)).is_some());
    assert!(!versions.needs(&begins([900, 900]), newest));
}

#[tokio::test]
async fn each_version_that_found_no_room_is_recorded_once_there_is() {
    let memory = MemoryStream::with_hooks("dead-letters", 1);
    let dead: Arc<dyn Stream> = Arc::clone(&memory) as Arc<dyn Stream>;
    memory.set_no_space(true);
    let mut full = versions(&dead, &[[0, 0], [10, 10]]).await;
    full.tidy(Offset(0), Offset(0));
    assert!(!full.are_recorded() && recorded(&dead, 1_000).await.list.is_empty());
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
    let step = Arc::new(Stored(StepId { pipeline: "p".into(), step: "s".into() }, AtomicBool::new(false)));
    let steps: Arc<[Arc<dyn StepFactory>]> = Arc::new([Arc::clone(&step) as Arc<dyn StepFactory>]);
    versions.add(begins([10, 10]), &Chain { generation: 2, steps, hold: None }).unwrap();
    assert!(!versions.are_recorded());
    assert_eq!(recorded_begins(&dead, 1_000).await, [begins([0, 0])]);
    step.1.store(true, Ordering::Release);
    versions.tidy(Offset(0), Offset(0));
    assert!(versions.are_recorded());
    assert_eq!(recorded_begins(&dead, 1_000).await, [begins([0, 0]), begins([10, 10])]);
}

#[tokio::test]
async fn a_version_that_held_in_an_earlier_process_holds_until_the_next_one_has_what_it_waits_at() {
    let mut versions = versions(&MemoryStream::new("dead-letters", 1), &[[0, 0], [10, 10]]).await;
    let held = &mut versions.list[1];
    (held.holds, held.chain.as_mut().unwrap().hold) = (true, Some("held before".into()));
    versions.add(begins([20, 20]), &chain(3)).unwrap();
    versions.release();
    assert!(versions.list[1].holds);
    versions.give_way(&[Offset(15); 2]);
    assert!(!versions.list[1].holds && versions.list[1].chain.as_ref().unwrap().hold.is_none());
    assert_eq!(versions.list[2].begins, begins([15, 15]));
}
