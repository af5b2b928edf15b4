//! Positions that go back, that are gone, and where a sink begins that has none.

use std::time::Duration;

use super::harness::{Process, World, chain, sorted};
use crate::batch::Offset;
use crate::pipeline::{PipelineStatus, State};
use crate::sinks::Begin;
use crate::sinks::memory::Fault;
use crate::stream::{GapCause, OnLag};
use crate::units::Period;

/// What retention keeps for the sink.
fn kept_from(world: &World) -> u64 {
    world.memory.marks()["p/w"].0.0
}

fn world() -> World {
    let mut world = World::new(2, &[("default", "w")]);
    world.config.sink_backoff.max = Period(Duration::from_millis(5));
    world
}

fn says(status: &PipelineStatus, text: &str) -> bool {
    matches!(&status.sinks[0].state, State::Retrying(why) | State::Stopped(why) if why.contains(text))
}

/// Until the sink says this and waits for a person.
async fn asked(world: &World, text: &str) {
    let process = world.start(chain(1, &[])).await;
    process.until("asked", |status| says(status, text)).await;
    process.stop().await;
}

async fn has_opened(process: &Process) {
    process.until("open", |status| status.sinks[0].committed.is_some()).await;
}

/// Each of these messages is one row, and nothing else is.
fn has_rows(world: &World, of: std::ops::Range<u64>) {
    let expected = of.map(|n| format!("d{}:{n}", n % 3)).collect();
    assert_eq!(sorted(world.payloads("w")), sorted(expected));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_database_that_went_back_needs_again_is_kept_while_it_takes_nothing() {
    let world = world();
    let process = world.start(chain(1, &[])).await;
    world.publish_many(3, 0, 100);
    process.drained().await;
    assert_eq!(kept_from(&world), 100);
    world.database("w").go_back(Offset(30));
    // It opens, and takes no row.
    world.database("w").fail_commits(vec![Fault::Retry("locked".to_owned()); 10_000]);
    world.publish_many(3, 100, 10);
    let went_back = |status: &PipelineStatus| status.sinks[0].committed == Some(Offset(30));
    let status = process.until("went back", went_back).await;
    assert_eq!(kept_from(&world), 30);
    assert_eq!(status.sinks[0].lag_messages, 80);
    process.handle.crash();
    process.handle.join().await;
    world.database("w").fail_no_more();
    let process = world.start(chain(1, &[])).await;
    process.drained().await;
    process.stop().await;
    has_rows(&world, 0..110);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_sink_says_which_messages_are_gone_and_keeps_the_others() {
    let world = world();
    let process = world.start(chain(1, &[])).await;
    world.publish_many(3, 0, 100);
    process.drained().await;
    world.memory.trim(Offset(50));
    world.database("w").go_back(Offset(30));
    world.database("w").fail_commits([Fault::Retry("the server was restarted".to_owned())]);
    world.publish_many(3, 100, 10);
    let status = process.until("stopped", |s| matches!(s.sinks[0].state, State::Stopped(_))).await;
    assert!(says(&status, "the messages at offsets 30 to 49"), "{status:?}");
    assert_eq!((kept_from(&world), status.sinks[0].committed), (50, Some(Offset(30))));
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn begin_now_is_the_first_start_however_long_the_database_is_away() {
    let mut world = world();
    world.begin = Some(Begin::Now);
    world.publish_many(3, 0, 10);
    world.database("w").set_down(Some("connection refused"));
    for from in [10, 20] {
        let process = world.start(chain(1, &[])).await;
        world.publish_many(3, from, 10);
        process.until("down", |status| says(status, "connection refused")).await;
        let sink = process.handle.status().sinks.remove(0);
        assert_eq!((sink.next, sink.lag_messages), (Offset(10), from), "what waits is told");
        process.stop().await;
    }
    world.database("w").set_down(None);
    let process = world.start(chain(1, &[])).await;
    process.drained().await;
    process.stop().await;
    has_rows(&world, 10..30);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_that_began_now_and_lost_its_position_skips_nothing_unasked() {
    for is_emptied in [false, true] {
        let mut world = world();
        world.begin = Some(Begin::Now);
        world.publish_many(3, 0, 10);
        let process = world.start(chain(1, &[])).await;
        has_opened(&process).await;
        world.publish_many(3, 10, 10);
        process.drained().await;
        process.stop().await;
        has_rows(&world, 10..20);
        let mut before = 10;
        if is_emptied {
            world.database("w").replace();
            before = 0;
        } else {
            world.database("w").lose_positions();
        }
        world.publish_many(3, 20, 10);
        for _ in 0..2 {
            asked(&world, "the sink has begun before, as `begin: now` in sinks.w said").await;
        }
        assert_eq!(world.payloads("w").len(), before);
        // As the reason says: the key is taken out, and set again.
        world.begin = None;
        if !is_emptied {
            asked(&world, "are not in headworks_positions").await;
            world.begin = Some(Begin::Now);
            let process = world.start(chain(1, &[])).await;
            has_opened(&process).await;
            world.publish_many(3, 30, 10);
            process.drained().await;
            process.stop().await;
            assert_eq!(world.payloads("w").len(), before + 10);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_begin_now_a_new_table_under_a_running_host_gets_what_the_one_before_has_not() {
    let mut world = world();
    world.begin = Some(Begin::Now);
    world.publish_many(3, 0, 10);
    let process = world.start(chain(1, &[])).await;
    has_opened(&process).await;
    world.publish_many(3, 10, 40);
    process.drained().await;
    world.database("w").set_down(Some("locked"));
    world.publish_many(3, 50, 50);
    process.until("down", |status| says(status, "locked")).await;
    assert_eq!(world.database("w").replace().len(), 40);
    world.database("w").set_down(None);
    process.drained().await;
    process.stop().await;
    has_rows(&world, 50..100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_sink_without_a_position_may_need_is_kept_until_a_person_decides() {
    let world = world();
    let process = world.start(chain(1, &[])).await;
    world.publish_many(3, 0, 100);
    process.drained().await;
    // The rows of the positions are gone, and the claim is there.
    world.database("w").lose_position(0);
    world.database("w").lose_position(1);
    world.database("w").fail_commits([Fault::Retry("the server was restarted".to_owned())]);
    world.publish_many(3, 100, 10);
    process.until("asked", |status| says(status, "are gone")).await;
    assert_eq!(kept_from(&world), 0);
    process.stop().await;
}

/// The same database under another name of the sink and its pipeline.
fn renamed(world: &World) -> World {
    let config = World::new(2, &[("default", "lake")]).config;
    let mut renamed = World { config, pipeline: "q".to_owned(), ..world.clone() };
    renamed.databases = [("lake".to_owned(), world.database("w").clone())].into();
    renamed.renamed_from = [("lake".to_owned(), "w".to_owned())].into();
    renamed.config.renamed_from = Some("p".to_owned());
    renamed
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_that_was_never_open_keeps_its_place_under_another_name() {
    for begin in [None, Some(Begin::Now)] {
        let mut world = world();
        (world.begin, world.on_lag) = (begin, OnLag::Detach);
        world.publish_many(3, 0, 10);
        world.database("w").set_down(Some("connection refused"));
        let process = world.start(chain(1, &[])).await;
        process.until("down", |status| says(status, "connection refused")).await;
        world.publish_many(3, 10, 10);
        process.stop().await;
        world.database("w").set_down(None);
        let (gone, lost) = match begin {
            // What came after the first start is written, though the name is new.
            Some(_) => (10, vec![]),
            None => (15, vec![(Offset(0)..Offset(15), GapCause::Trimmed)]),
        };
        world.memory.trim(Offset(gone));
        let renamed = renamed(&world);
        let process = renamed.start(chain(1, &[])).await;
        process.drained().await;
        process.stop().await;
        has_rows(&world, gone..20);
        assert_eq!(world.memory.lost(), lost, "{begin:?}");
        assert_eq!(world.memory.marks().keys().collect::<Vec<_>>(), ["q/lake"]);
    }
}
