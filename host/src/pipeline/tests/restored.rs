//! Dead letters that were sent, and a database that does not have them any more; and a data folder
//! from before they were sent.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::harness::{Act, Process, World, chain, number, published, sorted, step, text};
use crate::batch::Offset;
use crate::pipeline::again::is_pending;
use crate::pipeline::{
    Ended, Filter, MARK_PREFIX, Mark, Marks, OpenLetters, PipelineStatus, Reopened, State, list_open,
};
use crate::sinks::Begin;
use crate::sinks::memory::Fault;
use crate::stream::Stream;

/// A world whose databases reject messages below `rejected`, until the result is `false`.
fn rejecting(partitions: u16, sinks: &str, rejected: u64) -> (World, Arc<AtomicBool>) {
    let world = World::new(partitions, &[("default", sinks)]);
    let broken = Arc::new(AtomicBool::new(true));
    for database in world.databases.values() {
        let is_broken = Arc::clone(&broken);
        database.refuse(move |message| {
            let is_rejected = number(&text(message)) < rejected && is_broken.load(Ordering::Acquire);
            is_rejected.then(|| "no column".to_owned())
        });
    }
    (world, broken)
}

async fn started(world: &World) -> Process {
    let process = world.start(chain(1, &[])).await;
    process.until("steps", |status| status.chain.is_some()).await;
    process.drained().await;
    process
}

async fn redrive(process: &Process, ids: Option<&[Offset]>) -> u64 {
    let filter = Filter { ids: ids.map(<[_]>::to_vec), ..Filter::default() };
    let summary = process.handle.redrive(&filter).await.unwrap();
    assert_eq!(summary.failed, Vec::<String>::new());
    summary.sent
}

fn marks(world: &World) -> Marks {
    Marks::read(&world.dead.state(MARK_PREFIX))
}

/// Letters that a database has lost, and the sinks that they are open for.
fn lost(world: &World) -> Vec<(u64, BTreeSet<String>)> {
    let lost = |(letter, mark): (u64, &Mark)| match mark {
        Mark::Open { sinks, why: Reopened::Lost, .. } => Some((letter, sinks.clone())),
        _ => None,
    };
    marks(world).own().filter_map(lost).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn letters_that_a_restored_database_does_not_have_are_open_again_and_sent_once() {
    let (world, broken) = rejecting(2, "w", 20);
    let process = started(&world).await;
    world.publish_many(3, 0, 30);
    process.drained().await;
    let all = list_open(&*world.dead, None).await.unwrap();
    broken.store(false, Ordering::Release);
    assert_eq!(redrive(&process, Some(&all[..8])).await, 8);
    let backup = world.database("w").backup();
    assert_eq!(redrive(&process, None).await, 12);
    world.publish_many(3, 30, 10);
    process.drained().await;
    process.stop().await;
    assert!(list_open(&*world.dead, None).await.unwrap().is_empty());

    world.database("w").restore(&backup);
    let process = world.start(chain(1, &[])).await;
    process.until("open again", |_| lost(&world).len() == 12).await;
    assert_eq!(list_open(&*world.dead, None).await.unwrap(), all[8..]);
    process.until("steps", |status| status.chain.is_some()).await;
    process.drained().await;
    assert_eq!(redrive(&process, None).await, 12);
    assert_eq!(sorted(world.payloads("w")), published(3, 40));
    process.stop().await;

    // What the database has is not missed.
    let process = started(&world).await;
    assert_eq!(redrive(&process, None).await, 0);
    assert_eq!(sorted(world.payloads("w")), published(3, 40));
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_restored_under_the_running_host_is_compared_when_the_sink_opens_again() {
    let (world, broken) = rejecting(1, "w", 10);
    let process = started(&world).await;
    world.publish_many(2, 0, 10);
    process.drained().await;
    let backup = world.database("w").backup();
    broken.store(false, Ordering::Release);
    assert_eq!(redrive(&process, None).await, 10);
    world.database("w").restore(&backup);
    world.database("w").fail_commits([Fault::Retry("terminating connection".to_owned())]);
    world.publish_many(2, 10, 10);
    process.until("open again", |_| lost(&world).len() == 10).await;
    process.drained().await;
    assert_eq!(redrive(&process, None).await, 10);
    assert_eq!(sorted(world.payloads("w")), published(2, 20));
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_that_one_of_its_databases_lost_goes_to_that_one_only() {
    let world = World::new(2, &[("default", "w other")]);
    let refusing = |generation, refuses: bool| {
        let check = step("check", move |message, _| match refuses && text(message).ends_with('3') {
            true => Act::Refuse("no".to_owned()),
            false => Act::Pass,
        });
        chain(generation, &[check])
    };
    let process = world.start(refusing(1, true)).await;
    world.publish_many(3, 0, 50);
    process.drained().await;
    process.chain.send_replace(refusing(2, false));
    process.until("flipped", |status| status.chain == Some(2)).await;
    let backup = world.database("other").backup();
    // One of the letters is refused again by one of the sinks.
    world.database("w").refuse(|message| (text(message) == "d2:23").then(|| "no column".to_owned()));
    assert_eq!(redrive(&process, None).await, 9);
    process.stop().await;
    world.database("other").restore(&backup);
    world.database("w").refuse(|_| None);
    let process = world.start(refusing(2, false)).await;
    process.until("open again", |_| lost(&world).len() == 5).await;
    process.until("steps", |status| status.chain.is_some()).await;
    process.drained().await;
    // Those of `other`, and the one that `w` refused.
    assert_eq!(redrive(&process, None).await, 6);
    for sink in ["w", "other"] {
        assert_eq!(sorted(world.payloads(sink)), published(3, 50), "{sink}");
    }
    assert!(list_open(&*world.dead, None).await.unwrap().is_empty());
    process.stop().await;
}

/// A world whose first steps refuse all messages, and second steps none.
fn refusing(generation: u64) -> crate::step::Chain {
    let check = step("check", move |_, _| match generation {
        1 => Act::Refuse("no".to_owned()),
        _ => Act::Pass,
    });
    chain(generation, &[check])
}

/// Lets a world's steps refuse `count` messages, and then sends all letters to every sink.
async fn refused_and_sent(world: &World, count: u64) {
    let process = world.start(refusing(1)).await;
    world.publish_many(3, 0, count);
    process.drained().await;
    process.chain.send_replace(refusing(2));
    process.until("flipped", |status| status.chain == Some(2)).await;
    assert_eq!(redrive(&process, None).await, count * world.databases.len() as u64);
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_database_gets_back_all_letters_that_it_lost_however_many_these_are() {
    const LETTERS: u64 = 2_500;
    let world = World::new(2, &[("default", "w")]);
    let backup = world.database("w").backup();
    refused_and_sent(&world, LETTERS).await;
    world.database("w").restore(&backup);
    let process = world.start(refusing(2)).await;
    process.until("open again", |_| lost(&world).len() as u64 == LETTERS).await;
    process.until("steps", |status| status.chain.is_some()).await;
    process.drained().await;
    assert_eq!(redrive(&process, None).await, LETTERS);
    assert_eq!(sorted(world.payloads("w")), published(3, LETTERS));
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_that_was_discarded_stays_closed_whichever_database_loses_it_later() {
    let world = World::new(2, &[("default", "w other")]);
    let backups = ["w", "other"].map(|sink| (sink, world.database(sink).backup()));
    refused_and_sent(&world, 20).await;
    for (sink, backup) in &backups {
        world.database(sink).restore(backup);
        let process = world.start(refusing(2)).await;
        process.until("steps", |status| status.chain.is_some()).await;
        process.drained().await;
        // Those of the first sink are open again, and are discarded.
        let open = if *sink == "w" { 20 } else { 0 };
        process.until("open again", |_| lost(&world).len() == open).await;
        assert_eq!(process.handle.discard(&Filter::default(), None).await.unwrap(), Some(open as u64));
        assert!(list_open(&*world.dead, None).await.unwrap().is_empty(), "{sink}");
        process.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_database_gets_the_letters_that_the_one_before_had() {
    let (world, broken) = rejecting(1, "w", 5);
    let process = started(&world).await;
    world.publish_many(2, 0, 10);
    process.drained().await;
    broken.store(false, Ordering::Release);
    assert_eq!(redrive(&process, None).await, 5);
    process.stop().await;
    world.database("w").replace();
    let process = started(&world).await;
    assert_eq!(redrive(&process, None).await, 5);
    assert_eq!(sorted(world.payloads("w")), published(2, 10));
    process.stop().await;
}

/// The rows are there: only the table of positions is not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn letters_stay_sent_where_only_the_positions_are_gone_unless_all_is_to_be_written_again() {
    for (begin, sent) in [(Begin::Now, 0), (Begin::Start, 5)] {
        let (mut world, broken) = rejecting(1, "w", 5);
        let process = started(&world).await;
        world.publish_many(2, 0, 10);
        process.drained().await;
        broken.store(false, Ordering::Release);
        assert_eq!(redrive(&process, None).await, 5);
        process.stop().await;
        world.database("w").lose_positions();
        world.begin = Some(begin);
        let process = started(&world).await;
        assert_eq!(redrive(&process, None).await, sent, "{begin:?}");
        process.stop().await;
        let rows = world.payloads("w").len();
        let process = started(&world).await;
        assert_eq!((redrive(&process, None).await, world.payloads("w").len()), (0, rows), "{begin:?}");
        process.stop().await;
    }
}

/// A later start finds the positions of the passes missing where the first one did not note what the table has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_whose_positions_are_gone_gets_new_ones_once_there_is_room_to_note_what_it_has() {
    let (mut world, broken) = rejecting(1, "w", 5);
    let process = started(&world).await;
    world.publish_many(2, 0, 10);
    process.drained().await;
    broken.store(false, Ordering::Release);
    assert_eq!(redrive(&process, None).await, 5);
    process.stop().await;
    world.database("w").lose_positions();
    world.begin = Some(Begin::Now);
    world.dead_memory.set_no_space(true);
    let process = world.start(chain(1, &[])).await;
    process.until("waits for room", waits_for_room).await;
    world.dead_memory.set_no_space(false);
    process.until("steps", |status| status.chain.is_some()).await;
    process.drained().await;
    assert_eq!(redrive(&process, None).await, 0);
    process.stop().await;
    let process = started(&world).await;
    assert_eq!(redrive(&process, None).await, 0);
    process.stop().await;
    assert_eq!(sorted(world.payloads("w")), published(2, 10));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_table_under_the_running_host_gets_positions_once_there_is_room_to_note_what_is_not_missed() {
    let (mut world, broken) = rejecting(1, "w", 5);
    world.begin = Some(Begin::Now);
    let process = started(&world).await;
    world.publish_many(2, 0, 10);
    process.drained().await;
    broken.store(false, Ordering::Release);
    assert_eq!(redrive(&process, None).await, 5);
    world.dead_memory.set_no_space(true);
    world.database("w").replace();
    world.database("w").fail_commits([Fault::Retry("terminating connection".to_owned())]);
    world.publish_many(2, 10, 10);
    process.until("waits for room", waits_for_room).await;
    world.dead_memory.set_no_space(false);
    process.drained().await;
    assert_eq!(redrive(&process, None).await, 0);
    assert_eq!(world.payloads("w").len(), 10);
    process.stop().await;
}

fn waits_for_room(status: &PipelineStatus) -> bool {
    matches!(&status.sinks[0].state, State::Retrying(reason) if reason.ends_with("the stream has no room"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn letters_that_were_sent_under_a_former_name_are_compared_as_well() {
    let (world, broken) = rejecting(1, "w", 5);
    let process = started(&world).await;
    world.publish_many(2, 0, 10);
    process.drained().await;
    let backup = world.database("w").backup();
    broken.store(false, Ordering::Release);
    assert_eq!(redrive(&process, None).await, 5);
    process.stop().await;
    let renamed = World::new(1, &[("default", "lake")]);
    let mut renamed = World { config: renamed.config, pipeline: "q".to_owned(), ..world.clone() };
    renamed.databases = [("lake".to_owned(), world.database("w").clone())].into();
    renamed.renamed_from = [("lake".to_owned(), "w".to_owned())].into();
    renamed.config.renamed_from = Some("p".to_owned());
    for (is_restored, sent) in [(false, 0), (true, 5)] {
        if is_restored {
            world.database("w").restore(&backup);
        }
        let process = started(&renamed).await;
        assert_eq!(redrive(&process, None).await, sent);
        assert_eq!(sorted(renamed.payloads("lake")), published(2, 10));
        process.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pass_that_was_not_finished_sends_all_that_it_has_taken_to_a_database_that_went_back() {
    let world = World::new(1, &[("default", "w other")]);
    let refusing = step("check", |_, _| Act::Refuse("no".to_owned()));
    let process = world.start(chain(1, &[refusing])).await;
    world.publish_many(1, 0, 6);
    process.drained().await;
    let backup = world.database("w").backup();
    process.chain.send_replace(chain(2, &[step("check", |_, _| Act::Pass)]));
    process.until("flipped", |status| status.chain == Some(2)).await;
    // `other` is away: all is pending, though `w` has it.
    world.database("other").set_down(Some("connection refused"));
    let filter = Filter::default();
    let summary = process.handle.redrive(&filter).await.unwrap();
    assert_eq!((summary.sent, summary.letters.pending), (6, 6));
    process.stop().await;
    world.database("w").restore(&backup);
    world.database("other").set_down(None);
    let process = world.start(chain(2, &[step("check", |_, _| Act::Pass)])).await;
    process.until("resumed", |_| marks(&world).own().next().is_none()).await;
    assert_eq!(redrive(&process, None).await, 0);
    for sink in ["w", "other"] {
        assert_eq!(sorted(world.payloads(sink)), published(1, 6), "{sink}");
    }
    process.stop().await;
}

/// A data folder as it is now, as a backup of it has it: another process goes on from it.
fn copied(world: &World) -> World {
    let dead_memory = world.dead_memory.copied(world.dead.bounds().end);
    let dead = Arc::clone(&dead_memory) as Arc<dyn Stream>;
    World { dead, dead_memory, ..world.clone() }
}

async fn redriven(process: &Process, possible_duplicates: bool) -> (u64, Ended) {
    let filter = Filter { possible_duplicates, ..Filter::default() };
    let summary = process.handle.redrive(&filter).await.unwrap();
    assert_eq!(summary.failed, Vec::<String>::new());
    (summary.sent, summary.letters)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_of_a_folder_send_each_letter_once_whichever_of_them_sent_it_before() {
    let (world, broken) = rejecting(2, "w", 690);
    let process = started(&world).await;
    world.publish_many(3, 0, 700);
    process.drained().await;
    let all = list_open(&*world.dead, None).await.unwrap();
    let (first, second) = (copied(&world), copied(&world));
    broken.store(false, Ordering::Release);
    // Every third letter; the others are more than one pass takes.
    let some: Vec<_> = all.iter().copied().step_by(3).collect();
    assert_eq!(redrive(&process, Some(&some)).await, 230);
    process.stop().await;
    assert_eq!(world.payloads("w").len(), 240);

    let process = started(&first).await;
    let ended = Ended { sent: 460, sent_before: 230, ..Ended::default() };
    assert_eq!(redriven(&process, false).await, (460, ended));
    assert!(list_open(&*first.dead, None).await.unwrap().is_empty());
    assert_eq!(redriven(&process, true).await, (0, Ended::default()));
    process.stop().await;
    // In turn, and from the same backup once more.
    for (world, before) in [(&world, 460), (&second, 690), (&copied(&second), 690)] {
        let process = started(world).await;
        let ended = Ended { sent_before: before, ..Ended::default() };
        assert_eq!(redriven(&process, false).await, (0, ended));
        assert!(list_open(&*world.dead, None).await.unwrap().is_empty());
        process.stop().await;
    }
    assert_eq!(sorted(world.payloads("w")), published(3, 700));
}

/// What the other copy wrote behind the place where the two part lies at the same offsets.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_sends_its_own_letters_that_lie_where_another_copy_had_others() {
    let (world, broken) = rejecting(1, "w", 20);
    let process = started(&world).await;
    world.publish_many(1, 0, 5);
    process.drained().await;
    let copy = copied(&world);
    world.publish_many(1, 5, 5);
    process.drained().await;
    broken.store(false, Ordering::Release);
    assert_eq!(redrive(&process, None).await, 10);
    process.stop().await;
    broken.store(true, Ordering::Release);
    let process = started(&copy).await;
    copy.publish_many(1, 10, 5);
    process.drained().await;
    broken.store(false, Ordering::Release);
    let ended = Ended { sent: 5, sent_before: 5, ..Ended::default() };
    assert_eq!(redriven(&process, false).await, (5, ended));
    process.stop().await;
    assert_eq!(sorted(world.payloads("w")), published(1, 15));
}

/// The database that is behind, too: the letters that it lost are sent to it by any copy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn letters_that_a_copy_found_to_be_sent_are_open_again_once_the_database_has_lost_them() {
    let (world, broken) = rejecting(1, "w", 5);
    let process = started(&world).await;
    world.publish_many(2, 0, 10);
    process.drained().await;
    let (backup, copy) = (world.database("w").backup(), copied(&world));
    broken.store(false, Ordering::Release);
    assert_eq!(redrive(&process, None).await, 5);
    process.stop().await;
    let process = started(&copy).await;
    assert_eq!(redriven(&process, false).await.0, 0);
    process.stop().await;
    world.database("w").restore(&backup);
    let process = started(&copy).await;
    assert_eq!(redriven(&process, false).await.0, 5);
    process.stop().await;
    assert_eq!(sorted(world.payloads("w")), published(2, 10));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_that_another_copy_sent_to_one_of_its_sinks_goes_to_the_other_one_only() {
    let world = World::new(2, &[("default", "w other")]);
    let refusing = |refuses: bool| {
        let check = step("check", move |message, _| match refuses && text(message).ends_with('3') {
            true => Act::Refuse("no".to_owned()),
            false => Act::Pass,
        });
        chain(1, &[check])
    };
    let process = world.start(refusing(true)).await;
    world.publish_many(3, 0, 50);
    process.drained().await;
    let backup = world.database("other").backup();
    process.stop().await;
    let copy = copied(&world);
    let process = world.start(refusing(false)).await;
    process.until("steps", |status| status.chain.is_some()).await;
    process.drained().await;
    assert_eq!(redrive(&process, None).await, 10);
    process.stop().await;
    // One of the databases went back as well.
    world.database("other").restore(&backup);
    let process = copy.start(refusing(false)).await;
    process.until("steps", |status| status.chain.is_some()).await;
    process.drained().await;
    let ended = Ended { sent: 5, ..Ended::default() };
    assert_eq!(redriven(&process, false).await, (5, ended));
    for sink in ["w", "other"] {
        assert_eq!(sorted(world.payloads(sink)), published(3, 50), "{sink}");
    }
    process.stop().await;
}

/// The backup has the letters as taken; the other copy sent one, and rejected another again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pass_that_was_under_way_at_the_backup_neither_doubles_nor_loses_what_another_copy_ended() {
    let (world, broken) = rejecting(1, "w", 6);
    let process = started(&world).await;
    world.publish_many(1, 0, 6);
    process.drained().await;
    world.database("w").set_down(Some("connection refused"));
    let summary = process.handle.redrive(&Filter::default()).await.unwrap();
    assert_eq!(summary.letters.pending, 6);
    process.stop().await;
    let copy = copied(&world);
    broken.store(false, Ordering::Release);
    world.database("w").set_down(None);
    world.database("w").refuse(|message| (number(&text(message)) == 4).then(|| "no column".to_owned()));
    let process = started(&world).await;
    process.until("resumed", |_| !is_pending(&*world.dead, &["p".to_owned()])).await;
    assert_eq!(world.open_letters("w").await, [("d0:4".to_owned(), "w".to_owned())]);
    process.stop().await;

    let process = started(&copy).await;
    process.until("resumed", |_| !is_pending(&*copy.dead, &["p".to_owned()])).await;
    assert_eq!(copy.open_letters("w").await, [("d0:4".to_owned(), "w".to_owned())]);
    world.database("w").refuse(|_| None);
    assert_eq!(redriven(&process, false).await.0, 1);
    process.stop().await;
    let process = started(&world).await;
    assert_eq!(redriven(&process, false).await, (0, Ended { sent_before: 1, ..Ended::default() }));
    process.stop().await;
    assert_eq!(sorted(world.payloads("w")), published(1, 6));
}

/// Of three messages that a step makes of one the other copy wrote two, and has a letter of the third.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_that_another_copy_sent_in_part_is_sent_only_where_that_is_asked_for() {
    let world = World::new(1, &[("default", "w")]);
    let parts = Arc::new(AtomicBool::new(false));
    let chain = |parts: &Arc<AtomicBool>| {
        let parts = Arc::clone(parts);
        let split = step("split", move |_, _| match parts.load(Ordering::Acquire) {
            true => Act::Times(3),
            false => Act::Refuse("no".to_owned()),
        });
        chain(1, &[split])
    };
    let process = world.start(chain(&parts)).await;
    world.publish_many(1, 0, 2);
    process.drained().await;
    process.stop().await;
    let copy = copied(&world);
    parts.store(true, Ordering::Release);
    let seen = std::sync::atomic::AtomicUsize::new(0);
    world.database("w").refuse(move |message| {
        let is_first = number(&text(message)) == 1 && seen.fetch_add(1, Ordering::AcqRel) == 0;
        is_first.then(|| "no column".to_owned())
    });
    let process = world.start(chain(&parts)).await;
    process.until("steps", |status| status.chain.is_some()).await;
    process.drained().await;
    assert_eq!(redrive(&process, None).await, 5);
    process.stop().await;
    world.database("w").refuse(|_| None);

    let mut counted = OpenLetters::new(Arc::clone(&copy.dead));
    let process = copy.start(chain(&parts)).await;
    process.until("steps", |status| status.chain.is_some()).await;
    process.drained().await;
    let ended = Ended { sent_before: 1, possible_duplicates: 1, ..Ended::default() };
    assert_eq!(redriven(&process, false).await, (0, ended));
    assert_eq!(list_open(&*copy.dead, None).await.unwrap().len(), 1);
    let open = counted.look().await.unwrap()["p"].clone();
    assert_eq!((open.letters, open.possible_duplicates), (1, 1));
    // However often it is asked for, and after a restart.
    assert_eq!(redriven(&process, false).await, (0, Ended { possible_duplicates: 1, ..Ended::default() }));
    process.stop().await;
    let process = copy.start(chain(&parts)).await;
    process.until("steps", |status| status.chain.is_some()).await;
    process.drained().await;
    assert_eq!(redriven(&process, true).await, (3, Ended { sent: 1, ..Ended::default() }));
    assert!(list_open(&*copy.dead, None).await.unwrap().is_empty());
    assert!(counted.look().await.unwrap().is_empty());
    process.stop().await;
    assert_eq!(world.payloads("w").len(), 8);
}

/// Two pipelines of one host, and two installations: one database, the same names.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_others_sent_to_the_same_database_is_not_taken_for_what_a_copy_sent() {
    let (world, broken) = rejecting(1, "w", 5);
    let other = World { databases: world.databases.clone(), ..World::new(1, &[("default", "w")]) };
    let beside = World { pipeline: "q".to_owned(), ..world.clone() };
    for world in [&world, &other, &beside] {
        let process = started(world).await;
        world.publish_many(1, 0, 5);
        process.drained().await;
        process.stop().await;
    }
    broken.store(false, Ordering::Release);
    // The second pipeline reads the stream of the first, which has the messages of both by then.
    for (world, letters) in [(&world, 5), (&other, 5), (&beside, 10)] {
        let process = started(world).await;
        let ended = Ended { sent: letters, ..Ended::default() };
        assert_eq!(redriven(&process, false).await, (letters, ended));
        process.stop().await;
    }
}
