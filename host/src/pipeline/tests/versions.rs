//! New steps begin at one message for all sinks, wherever the sinks are: a message whose route
//! changes is in one of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::harness::{Act, Process, World, chain, number, published, recall, sorted, step, text};
use crate::pipeline::{PipelineStatus, State};
use crate::sinks::Begin;
use crate::sinks::memory::{Backup, Fault};
use crate::step::{RecallError, StepFactory, VERSIONS_MAX};
use crate::units::ByteSize;

pub(super) const DEVICES: u64 = 10;

pub(super) fn world() -> World {
    world_of(&[("default", "left"), ("other", "right")])
}

fn world_of(routes: &[(&str, &str)]) -> World {
    let mut world = World::new(4, routes);
    // A few frames fill a queue.
    world.config.sink_queue_bytes_max = ByteSize(64 << 10);
    world.config.read_ahead_bytes_max = ByteSize(64 << 10);
    world
}

/// Every second message goes to each sink, and every version sends it to the other one.
pub(super) fn route(version: u64) -> Arc<dyn StepFactory> {
    step("route", move |message, _| match (number(&text(message)) + version).is_multiple_of(2) {
        true => Act::Pass,
        false => Act::Route("other"),
    })
}

pub(super) async fn swapped(process: &Process, generation: u64, steps: &[Arc<dyn StepFactory>]) {
    process.chain.send_replace(chain(generation, steps));
    process.until("swapped", |status| status.chain == Some(generation)).await;
}

pub(super) async fn all_read(process: &Process) {
    process.until("all read", |status| status.read == status.end).await;
}

pub(super) fn assert_each_in_one_sink(world: &World, count: u64) {
    let rows = sorted([world.payloads("left"), world.payloads("right")].concat());
    let missing = |of: &[String], in_: &[String]| of.iter().filter(|it| !in_.contains(it)).count();
    let all = published(DEVICES, count);
    assert!(rows == all, "{} rows of {count} messages, {} in neither sink", rows.len(), missing(&all, &rows));
}

/// The sink to the right is away, and the one to the left has gone on without it.
async fn apart(world: &World) -> Process {
    let process = world.start(chain(1, &[route(0)])).await;
    world.publish_many(DEVICES, 0, 100);
    process.drained().await;
    world.database("right").block();
    world.publish_many(DEVICES, 100, 10_000);
    world.database("left").rows_at_least(5_050).await;
    process
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_steps_begin_at_one_message_for_a_sink_that_lags_and_for_one_that_does_not() {
    let world = world();
    let process = apart(&world).await;
    swapped(&process, 2, &[route(1)]).await;
    world.publish_many(DEVICES, 10_100, 1_000);
    world.database("left").rows_at_least(5_550).await;
    world.database("right").unblock();
    process.drained().await;
    assert_each_in_one_sink(&world, 11_100);
    let mut rows: Vec<_> = ["left", "right"]
        .into_iter()
        .flat_map(|sink| world.database(sink).rows().into_iter().map(move |row| (row.offset, sink)))
        .collect();
    rows.sort();
    let versions: Vec<_> =
        rows.iter().map(|(offset, sink)| (offset.0 % 2 == 0) == (*sink == "left")).collect();
    assert!(versions.is_sorted_by(|a, b| a >= b), "the first version runs no message after the second");
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_changes_while_a_sink_lags_lose_and_double_nothing() {
    let world = world();
    let process = apart(&world).await;
    let pass = || step("pass", |_, _| Act::Pass);
    let chains = [vec![pass(), route(1)], vec![route(0)], vec![], vec![route(0), pass()], vec![route(1)]];
    let mut count = 10_100;
    for (generation, steps) in (2..).zip(&chains) {
        swapped(&process, generation, steps).await;
        world.publish_many(DEVICES, count, 500);
        count += 500;
        all_read(&process).await;
    }
    world.database("right").unblock();
    process.drained().await;
    assert_each_in_one_sink(&world, count);
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sinks_that_part_and_join_around_changes_lose_and_double_nothing() {
    let world = world();
    let process = world.start(chain(1, &[route(0)])).await;
    let (mut count, mut generation) = (0, 1);
    for _ in 0..3 {
        for (lags, other) in [("right", "left"), ("left", "right")] {
            let before = world.payloads(other).len();
            world.database(lags).block();
            world.publish_many(DEVICES, count, 3_000);
            count += 3_000;
            world.database(other).rows_at_least(before + 1_000).await;
            swapped(&process, generation + 1, &[route(generation)]).await;
            world.database(lags).unblock();
            world.publish_many(DEVICES, count, 300);
            count += 300;
            // While the sink catches up, or joins.
            swapped(&process, generation + 2, &[route(generation + 1)]).await;
            generation += 2;
        }
        process.drained().await;
        process.until("together", |s| s.sinks.iter().all(|sink| !sink.own_lane)).await;
    }
    assert_each_in_one_sink(&world, count);
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_held_step_gives_way_at_one_message_for_sinks_that_are_apart() {
    let world = world();
    let asked = tokio::sync::watch::Sender::new(false);
    let asks = asked.clone();
    let holding = step("route", move |message, _| match number(&text(message)) {
        5_000 => {
            asks.send_replace(true);
            Act::Hold("faulted")
        }
        n if n.is_multiple_of(2) => Act::Pass,
        _ => Act::Route("other"),
    });
    let process = world.start(chain(1, &[holding])).await;
    world.publish_many(DEVICES, 0, 100);
    process.drained().await;
    world.database("right").block();
    world.publish_many(DEVICES, 100, 10_000);
    asked.subscribe().wait_for(|asked| *asked).await.unwrap();
    process.chain.send_replace(chain(2, &[route(1)]));
    // Of the messages behind the held one no sink had those of its device.
    world.database("left").rows_at_least(4_000).await;
    world.database("right").unblock();
    process.drained().await;
    assert!(world.letters().await.is_empty());
    assert_each_in_one_sink(&world, 10_100);
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_crash_each_message_has_the_steps_that_it_had_for_the_other_sink() {
    // The same steps again, or others by then; the sink that lags is back at the start, or later.
    for (is_changed, is_back) in [(false, true), (true, true), (false, false), (true, false)] {
        let world = world();
        let process = apart(&world).await;
        let newest = route(1);
        swapped(&process, 2, &[Arc::clone(&newest)]).await;
        world.publish_many(DEVICES, 10_100, 1_000);
        world.database("left").rows_at_least(5_550).await;
        process.handle.crash();
        process.handle.join().await;
        if is_back {
            world.database("right").unblock();
        }
        let process = world.start(chain(1, &[if is_changed { route(2) } else { newest }])).await;
        world.publish_many(DEVICES, 11_100, 500);
        world.database("right").unblock();
        process.drained().await;
        assert_each_in_one_sink(&world, 11_600);
        process.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pipeline_whose_earlier_steps_are_gone_goes_on_with_the_newest() {
    let mut world = world();
    let process = apart(&world).await;
    swapped(&process, 2, &[route(1)]).await;
    world.publish_many(DEVICES, 10_100, 1_000);
    world.database("left").rows_at_least(5_550).await;
    process.handle.crash();
    process.handle.join().await;
    world.database("right").unblock();
    world.recall = Some(Arc::new(|recipe| Err(RecallError::Gone(format!("step {recipe} is gone")))));
    let process = world.start(chain(1, &[route(1)])).await;
    process.drained().await;
    process.stop().await;
}

/// A server that is behind takes over for the database to the right; messages that it cannot write
/// tell the sink that its server is gone.
async fn fail_over(world: &World, process: &Process, behind: &Backup, from: u64, count: u64) {
    world.database("right").set_down(Some("gone"));
    world.publish_many(DEVICES, from, count);
    process.until("down", |status| status.sinks[1].state != State::Running).await;
    world.database("right").restore(behind);
    world.database("right").set_down(None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_went_back_gets_each_message_from_the_steps_that_ran_it_first() {
    for is_restarted in [true, false] {
        let world = world();
        let process = world.start(chain(1, &[route(0)])).await;
        world.publish_many(DEVICES, 0, 100);
        process.drained().await;
        let backup = world.database("right").backup();
        world.publish_many(DEVICES, 100, 100);
        process.drained().await;
        let newest = route(1);
        swapped(&process, 2, &[Arc::clone(&newest)]).await;
        world.publish_many(DEVICES, 200, 100);
        process.drained().await;
        // It has looked which versions are still needed.
        process.looked_after().await;
        process.looked_after().await;
        let process = if is_restarted {
            process.stop().await;
            world.database("right").restore(&backup);
            world.start(chain(1, &[newest])).await
        } else {
            fail_over(&world, &process, &backup, 300, 50).await;
            process
        };
        world.publish_many(DEVICES, if is_restarted { 300 } else { 350 }, 50);
        process.drained().await;
        assert_each_in_one_sink(&world, if is_restarted { 350 } else { 400 });
        assert!(world.failures.standing().is_empty());
        process.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn steps_that_no_sink_needs_make_room_for_a_change_and_a_database_that_needs_them_again_is_told_of() {
    let world = world();
    let process = world.start(chain(1, &[route(0)])).await;
    world.publish_many(DEVICES, 0, 100);
    process.drained().await;
    let backup = world.database("right").backup();
    let mut count = 100;
    for generation in 1..=VERSIONS_MAX as u64 + 2 {
        if generation > 1 {
            swapped(&process, generation, &[route(generation)]).await;
        }
        world.publish_many(DEVICES, count, 20);
        count += 20;
        process.drained().await;
    }
    process.until("its own look", |status| status.swap_waits.is_none()).await;
    process.looked_after().await;
    assert!(world.failures.standing().is_empty());
    fail_over(&world, &process, &backup, count, 20).await;
    process.drained().await;
    let said = world.failures.standing();
    assert_eq!(said.len(), 1);
    assert_eq!((&*said[0].part, said[0].kind), ("pipeline p", "steps_gone"));
    assert!(said[0].cause.contains("sink \"right\" went back; offsets 100 to 139"), "{}", said[0].cause);
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pipeline_is_at_work_while_the_record_of_new_steps_waits_for_a_buffer() {
    let world = world();
    let process = world.start(chain(1, &[route(0)])).await;
    world.publish_many(DEVICES, 0, 100);
    process.drained().await;
    world.dead_memory.set_buffer_full(true);
    process.chain.send_replace(chain(2, &[route(1)]));
    world.dead_memory.refused().await;
    let mut looks = 0;
    let is_at_work = |_: &crate::pipeline::PipelineStatus| {
        looks += 1;
        looks > 3
    };
    process.until("at work", is_at_work).await;
    // A sink that comes back gets a lane meanwhile.
    world.database("right").fail_commits([Fault::UnknownLost]);
    world.publish_many(DEVICES, 100, 100);
    process.drained().await;
    assert_eq!(process.handle.status().chain, Some(1));
    // The disk fills: new steps begin without a record.
    world.dead_memory.set_no_space(true);
    world.dead_memory.set_buffer_full(false);
    process.until("swapped", |status| status.chain == Some(2)).await;
    world.publish_many(DEVICES, 200, 100);
    process.drained().await;
    assert_each_in_one_sink(&world, 300);
    world.dead_memory.set_buffer_full(true);
    let ended = tokio::time::timeout(std::time::Duration::from_secs(60), process.stop()).await;
    ended.expect("a pipeline ends while a record waits");
}

/// Steps that hold at message 50 until they may go on, and whether one of their workers does.
fn holding(goes_on: &Arc<AtomicBool>) -> (Arc<dyn StepFactory>, tokio::sync::watch::Receiver<bool>) {
    let asked = tokio::sync::watch::Sender::new(false);
    let waits = asked.subscribe();
    let goes_on = Arc::clone(goes_on);
    let step = step("route", move |message, _| match number(&text(message)) {
        50 if !goes_on.load(Ordering::Acquire) => {
            asked.send_replace(true);
            Act::Hold("faulted")
        }
        _ => Act::Pass,
    });
    (step, waits)
}

fn passing() -> Arc<dyn StepFactory> {
    step("route", |_, _| Act::Pass)
}

/// Returns whether a record says that its version waits at a message.
fn is_hold_recorded(world: &World) -> bool {
    let holds = |value: &[u8]| String::from_utf8_lossy(value).contains("\"holds\":true");
    world.dead.state(b"steps/").iter().any(|(_, value)| holds(value))
}

fn waits_for_right(state: &State) -> bool {
    matches!(state, State::Holding(why) if why.contains("sink \"right\" is open"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_steps_get_what_held_ones_waited_at_though_a_sink_was_down_at_the_start() {
    for is_changed_while_it_runs in [false, true] {
        let world = World::new(4, &[("default", "left right")]);
        let (held, mut waits) = holding(&Arc::default());
        let process = world.start(chain(1, &[Arc::clone(&held)])).await;
        world.publish_many(DEVICES, 0, 100);
        waits.wait_for(|waits| *waits).await.unwrap();
        process.until("recorded", |_| is_hold_recorded(&world)).await;
        process.stop().await;
        world.database("right").set_down(Some("away"));
        let process = if is_changed_while_it_runs {
            let process = world.start(chain(1, &[held])).await;
            process.until("begun", |status| status.sinks[0].state == State::Running).await;
            process.chain.send_replace(chain(2, &[passing()]));
            process
        } else {
            world.start(chain(1, &[passing()])).await
        };
        if !is_changed_while_it_runs {
            process.until("waits", |status| waits_for_right(&status.state)).await;
        }
        all_in_both(&world, &process, 100).await;
        assert_eq!(process.handle.status().state, State::Running);
        process.stop().await;
    }
}

/// It has skipped what waited for the new steps, and has got none of it from the old ones.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_steps_get_what_held_ones_waited_at_though_a_new_sink_begins_behind_it() {
    for is_changed_while_it_runs in [false, true] {
        let mut world = World::new(4, &[("default", "left")]);
        let (held, mut waits) = holding(&Arc::default());
        let process = world.start(chain(1, &[Arc::clone(&held)])).await;
        world.publish_many(DEVICES, 0, 100);
        waits.wait_for(|waits| *waits).await.unwrap();
        process.until("recorded", |_| is_hold_recorded(&world)).await;
        process.stop().await;
        world.add_sink("default", "right");
        world.begin = Some(Begin::Now);
        let first = if is_changed_while_it_runs { held } else { passing() };
        let process = world.start(chain(1, &[first])).await;
        if is_changed_while_it_runs {
            let has_begun = |status: &PipelineStatus| status.sinks.iter().all(|s| s.state == State::Running);
            process.until("begun", has_begun).await;
            process.chain.send_replace(chain(2, &[passing()]));
        }
        process.drained().await;
        assert!(world.letters().await.is_empty(), "{:?}", world.letters().await);
        assert_eq!(sorted(world.payloads("left")), published(DEVICES, 100));
        assert!(world.payloads("right").is_empty());
        process.stop().await;
    }
}

/// The sink to the right is back: each sink gets all messages.
async fn all_in_both(world: &World, process: &Process, count: u64) {
    world.database("right").set_down(None);
    process.drained().await;
    assert!(world.letters().await.is_empty());
    for sink in ["left", "right"] {
        assert_eq!(sorted(world.payloads(sink)), published(DEVICES, count));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pipeline_that_waits_no_longer_for_a_sink_does_not_say_so() {
    for is_restarted in [true, false] {
        let world = World::new(4, &[("default", "left right")]);
        let goes_on = Arc::default();
        let (held, mut waits) = holding(&goes_on);
        if !is_restarted {
            world.database("right").set_down(Some("away"));
        }
        let mut process = world.start(chain(1, &[Arc::clone(&held)])).await;
        world.publish_many(DEVICES, 0, 100);
        waits.wait_for(|waits| *waits).await.unwrap();
        if is_restarted {
            process.until("recorded", |_| is_hold_recorded(&world)).await;
            process.stop().await;
            world.database("right").set_down(Some("away"));
            process = world.start(chain(1, &[passing()])).await;
        } else {
            process.chain.send_replace(chain(2, &[passing()]));
        }
        process.until("waits", |status| waits_for_right(&status.state)).await;
        goes_on.store(true, Ordering::Release);
        if is_restarted {
            process.chain.send_replace(chain(2, &[held]));
        }
        process.until("goes on", |status| status.state == State::Running).await;
        all_in_both(&world, &process, 100).await;
        process.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_after_a_restart_does_not_wait_for_a_sink_where_the_held_steps_went_on() {
    for is_restarted in [true, false] {
        let world = World::new(4, &[("default", "left right")]);
        let goes_on = Arc::default();
        let (held, mut waits) = holding(&goes_on);
        let mut process = world.start(chain(1, &[Arc::clone(&held)])).await;
        world.publish_many(DEVICES, 0, 100);
        waits.wait_for(|waits| *waits).await.unwrap();
        process.until("recorded", |_| is_hold_recorded(&world)).await;
        if is_restarted {
            process.stop().await;
            goes_on.store(true, Ordering::Release);
            process = world.start(chain(1, &[held])).await;
        } else {
            goes_on.store(true, Ordering::Release);
        }
        process.drained().await;
        process.until("recorded that none holds", |_| !is_hold_recorded(&world)).await;
        process.stop().await;
        world.database("right").set_down(Some("away"));
        let process = world.start(chain(1, &[passing()])).await;
        world.publish_many(DEVICES, 100, 100);
        process.until("goes on", |s| s.sinks[0].committed == Some(s.end)).await;
        all_in_both(&world, &process, 200).await;
        process.stop().await;
    }
}

/// The worker ends with its lane, since the databases go back, and the step lets the workers of the next
/// one go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_ends_while_it_waits_for_a_held_step_holds_nothing_any_more() {
    let world = World::new(4, &[("default", "left right")]);
    let asked = tokio::sync::watch::Sender::new(false);
    let (mut waits, holder) = (asked.subscribe(), std::sync::OnceLock::new());
    let held = step("route", move |message, _| {
        let thread = std::thread::current().id();
        match number(&text(message)) {
            50 if *holder.get_or_init(|| thread) == thread => {
                asked.send_replace(true);
                Act::Hold("faulted")
            }
            _ => Act::Pass,
        }
    });
    let databases = ["left", "right"].map(|sink| world.database(sink));
    let process = world.start(chain(1, &[held])).await;
    world.publish_many(DEVICES, 0, 20);
    process.drained().await;
    let backups = databases.map(|database| database.backup());
    world.publish_many(DEVICES, 20, 30);
    process.drained().await;
    databases.iter().for_each(|database| database.set_down(Some("gone")));
    world.publish_many(DEVICES, 50, 150);
    waits.wait_for(|waits| *waits).await.unwrap();
    process.until("recorded", |_| is_hold_recorded(&world)).await;
    process.until("down", |s| s.sinks.iter().all(|sink| sink.state != State::Running)).await;
    databases.iter().zip(&backups).for_each(|(database, backup)| database.restore(backup));
    databases.iter().for_each(|database| database.set_down(None));
    process.drained().await;
    process.until("runs", |status| status.state == State::Running).await;
    process.until("recorded that none holds", |_| !is_hold_recorded(&world)).await;
    process.stop().await;
    // A change does not wait for a sink.
    world.database("right").set_down(Some("away"));
    let process = world.start(chain(1, &[passing()])).await;
    world.publish_many(DEVICES, 200, 100);
    process.until("goes on", |s| s.sinks[0].committed == Some(s.end)).await;
    all_in_both(&world, &process, 300).await;
    process.stop().await;
}

/// Each is told until it was shown for long enough.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_messages_that_newer_steps_run_are_told_of() {
    let mut world = world();
    let oldest = route(0);
    let process = world.start(chain(1, &[Arc::clone(&oldest)])).await;
    world.publish_many(DEVICES, 0, 100);
    process.drained().await;
    world.database("right").block();
    let mut count = 100;
    let versions: Vec<_> = (1..4).map(route).collect();
    for (generation, version) in (1..).zip([&oldest].into_iter().chain(&versions)) {
        if generation > 1 {
            swapped(&process, generation, &[Arc::clone(version)]).await;
        }
        world.publish_many(DEVICES, count, 20);
        count += 20;
        all_read(&process).await;
    }
    process.handle.crash();
    process.handle.join().await;
    world.database("right").unblock();
    let gone = [oldest.recipe(), versions[1].recipe()];
    world.recall = Some(Arc::new(move |recipe| match gone.iter().any(|gone| gone == recipe) {
        true => Err(RecallError::Gone(format!("step {recipe} is gone"))),
        false => recall(recipe),
    }));
    let process = world.start(chain(1, &[Arc::clone(&versions[2])])).await;
    process.drained().await;
    let said = world.failures.standing();
    assert_eq!(said.iter().map(|said| said.kind).collect::<Vec<_>>(), ["steps_gone"]);
    for offsets in ["offsets 100 to 119", "offsets 140 to 159"] {
        assert!(said[0].cause.contains(offsets), "{offsets}: {}", said[0].cause);
    }
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sinks_go_on_that_do_not_need_a_version_which_cannot_be_made_yet() {
    let mut world = world_of(&[("default", "left middle right")]);
    let process = world.start(chain(1, &[passing()])).await;
    world.publish_many(DEVICES, 0, 100);
    process.drained().await;
    world.database("left").block();
    world.publish_many(DEVICES, 100, 10_000);
    let others_have_all = |status: &crate::pipeline::PipelineStatus| {
        status.sinks[1..].iter().all(|sink| sink.committed == Some(status.end))
    };
    process.until("apart", others_have_all).await;
    let newest = passing();
    swapped(&process, 2, &[Arc::clone(&newest)]).await;
    world.publish_many(DEVICES, 10_100, 100);
    process.until("apart", others_have_all).await;
    process.handle.crash();
    process.handle.join().await;
    let can_be_made = Arc::new(AtomicBool::new(false));
    let (is_there, recipe) = (Arc::clone(&can_be_made), newest.recipe());
    world.recall = Some(Arc::new(move |it| match it == recipe || is_there.load(Ordering::Acquire) {
        true => recall(it),
        false => Err(RecallError::Later(format!("step {it} cannot be made again yet"))),
    }));
    world.database("left").unblock();
    let process = world.start(chain(1, &[newest])).await;
    world.publish_many(DEVICES, 10_200, 100);
    process.until("the others go on", others_have_all).await;
    // One that waits behind it comes back into a lane.
    world.database("right").fail_commits([Fault::UnknownLost]);
    world.publish_many(DEVICES, 10_300, 100);
    process.until("the others go on", others_have_all).await;
    let is_told = |state: &State| matches!(state, State::Retrying(why) if why.contains("again yet"));
    process.until("told", |status| is_told(&status.state)).await;
    can_be_made.store(true, Ordering::Release);
    process.drained().await;
    assert_eq!(process.handle.status().state, State::Running);
    for sink in ["left", "middle", "right"] {
        assert_eq!(sorted(world.payloads(sink)), published(DEVICES, 10_400));
    }
    process.stop().await;
}
