//! Copies of a data folder: restored, or alive beside the one that they are copies of.

use std::slice;
use std::sync::Arc;
use std::time::Duration;

use super::harness::{Act, World, chain, number, sorted, step, text};
use crate::batch::Offset;
use crate::pipeline::State;
use crate::sinks::Begin;
use crate::sinks::memory::Fault;
use crate::stream::Stream;
use crate::units::Period;

impl World {
    /// Another process, on a copy of the folder as it was when the stream ended at `at`.
    fn copied(&self, at: u64) -> Self {
        let memory = self.memory.copied(Offset(at));
        Self { stream: Arc::clone(&memory) as Arc<dyn Stream>, memory, ..self.clone() }
    }

    fn end(&self) -> u64 {
        self.stream.bounds().end.0
    }

    /// Each of these messages is one row, and nothing else is.
    fn has_rows(&self, ranges: &[std::ops::Range<u64>]) {
        let expected = ranges.iter().cloned().flatten().map(|n| format!("d{}:{n}", n % 3)).collect();
        assert_eq!(sorted(self.payloads("w")), sorted(expected));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_folder_skips_and_doubles_nothing_wherever_the_database_was_at_the_start() {
    for is_away in [false, true] {
        let world = World::new(2, &[("default", "w")]);
        let process = world.start(chain(1, &[])).await;
        world.publish_many(3, 0, 100);
        process.drained().await;
        process.stop().await;
        let restored = world.copied(60);
        if is_away {
            world.database("w").block();
        }
        let process = restored.start(chain(1, &[])).await;
        // Past the position that the lost folder left.
        restored.publish_many(3, 1_000, 90);
        world.database("w").unblock();
        process.drained().await;
        process.stop().await;
        restored.has_rows(&[0..100, 1_000..1_090]);
        // Once more, and it is known.
        let again = restored.copied(restored.end());
        let process = again.start(chain(1, &[])).await;
        again.publish_many(3, 2_000, 10);
        process.drained().await;
        process.stop().await;
        again.has_rows(&[0..100, 1_000..1_090, 2_000..2_010]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_hosts_on_copies_of_a_folder_the_one_that_started_last_writes_through_any_reconnect() {
    let older = World::new(2, &[("default", "w")]);
    let on_older = older.start(chain(1, &[])).await;
    older.publish_many(3, 0, 50);
    on_older.drained().await;
    let newer = older.copied(older.end());
    let on_newer = newer.start(chain(1, &[])).await;
    on_newer.drained().await;
    // Both lose their connection, the older one first.
    older.database("w").fail_commits([Fault::Retry("connection reset".to_owned())]);
    older.publish_many(3, 100, 30);
    let status = on_older.until("fenced", |s| matches!(s.sinks[0].state, State::Stopped(_))).await;
    let State::Stopped(reason) = &status.sinks[0].state else { unreachable!("just awaited") };
    assert!(reason.contains("took the positions of pipeline \"p\" in sink \"w\" over"), "{reason}");
    assert!(reason.contains("stop one of the two hosts"), "{reason}");
    newer.database("w").fail_commits([Fault::Retry("connection reset".to_owned())]);
    newer.publish_many(3, 200, 40);
    on_newer.drained().await;
    newer.has_rows(&[0..50, 200..240]);
    on_newer.stop().await;
    on_older.stop().await;
    // The older one is what somebody decides for, then the newer one again.
    let older = older.copied(older.end());
    let process = older.start(chain(1, &[])).await;
    older.publish_many(3, 300, 10);
    process.drained().await;
    process.stop().await;
    older.has_rows(&[0..50, 200..240, 100..130, 300..310]);
    let newer = newer.copied(newer.end());
    let process = newer.start(chain(1, &[])).await;
    newer.publish_many(3, 400, 10);
    process.drained().await;
    process.stop().await;
    newer.has_rows(&[0..50, 200..240, 100..130, 300..310, 400..410]);
}

/// A dead letter of a lost message must not stand for the one that has its offset now.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_lost_its_end_does_not_take_its_new_messages_for_rejected_ones() {
    let world = World::new(1, &[("default", "w")]);
    let check = || {
        step("check", |message, _| match number(&text(message)) {
            60..100 => Act::Refuse("out of range".to_owned()),
            _ => Act::Pass,
        })
    };
    // The letters are durable, and the position is not past them when the log loses its end.
    world.publish_many(3, 0, 50);
    let process = world.start(chain(1, &[check()])).await;
    process.drained().await;
    world.database("w").block();
    world.publish_many(3, 50, 50);
    process.until("read", |status| status.read == Offset(100)).await;
    while world.letters().await.len() < 40 {
        process.looked_after().await;
    }
    process.handle.crash();
    world.database("w").unblock();
    process.handle.join().await;
    let shortened = world.copied(60);
    let process = shortened.start(chain(1, &[check()])).await;
    shortened.publish_many(3, 1_000, 40);
    process.drained().await;
    process.stop().await;
    shortened.has_rows(&[0..60, 1_000..1_040]);
}

impl World {
    /// The next process has another config, and tries again soon.
    fn changed(&self, change: impl FnOnce(&mut Self)) -> Self {
        let mut world = self.clone();
        change(&mut world);
        world
    }

    fn with_sink_renamed(&self, to: &str, renamed_from: Option<&str>) -> Self {
        self.changed(|world| {
            let database = world.databases.pop_first().expect("it has one").1;
            world.databases.insert(to.to_owned(), database);
            let target = crate::pipeline::RouteTarget::One(to.to_owned());
            world.config.routes.insert("default".to_owned(), target);
            world.renamed_from =
                renamed_from.map(|old| (to.to_owned(), old.to_owned())).into_iter().collect();
        })
    }
}

/// Until the sink says this and waits for a person.
async fn refused(world: &World, text: &str) {
    let process = world.start(chain(1, &[])).await;
    let says = |state: &State| matches!(state, State::Retrying(why) if why.contains(text));
    process.until("refused", |status| says(&status.sinks[0].state)).await;
    process.stop().await;
}

async fn delivered(world: &World, from: u64, count: u64) {
    let process = world.start(chain(1, &[])).await;
    process.until("open", |status| status.sinks[0].committed.is_some()).await;
    world.publish_many(3, from, count);
    process.drained().await;
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_or_pipeline_with_a_new_name_fills_its_table_only_when_it_is_told_to() {
    let mut world = World::new(2, &[("default", "w")]);
    world.config.sink_backoff.max = Period(Duration::from_millis(5));
    delivered(&world, 0, 100).await;
    refused(&world.with_sink_renamed("lake", None), "`renamed_from: w` in sinks.lake").await;
    let pipeline = world.changed(|world| world.pipeline = "q".to_owned());
    refused(&pipeline, "`renamed_from: p` in pipelines.q").await;
    let rows = |world: &World| world.databases.values().next().expect("one").rows().len();
    assert_eq!(rows(&world), 100);
    // Each is told its old name, one after the other.
    let world = world.with_sink_renamed("lake", Some("w"));
    delivered(&world, 100, 10).await;
    let world = world.changed(|world| {
        world.pipeline = "q".to_owned();
        world.config.renamed_from = Some("p".to_owned());
    });
    delivered(&world, 110, 10).await;
    assert_eq!(rows(&world), 120);
    // The first names have no position any more.
    refused(
        &world.changed(|world| (world.pipeline, world.config.renamed_from) = ("p".to_owned(), None)),
        "pipeline \"q\"",
    )
    .await;
    let now = world.changed(|world| {
        (world.pipeline, world.config.renamed_from) = ("new".to_owned(), None);
        world.begin = Some(Begin::Now);
    });
    delivered(&now, 120, 10).await;
    assert_eq!(rows(&world), 130);
    let again = world.changed(|world| {
        (world.pipeline, world.config.renamed_from) = ("again".to_owned(), None);
        world.begin = Some(Begin::Start);
    });
    delivered(&again, 130, 10).await;
    assert_eq!(rows(&world), 130 + 140);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_starts_without_its_positions_fills_its_table_only_when_it_is_told_to() {
    for begin in [Begin::Now, Begin::Start] {
        let mut world = World::new(2, &[("default", "w")]);
        world.config.sink_backoff.max = Period(Duration::from_millis(5));
        delivered(&world, 0, 100).await;
        world.database("w").lose_positions();
        refused(&world, "are not in headworks_positions").await;
        refused(&world, "are not in headworks_positions").await;
        assert_eq!(world.payloads("w").len(), 100);
        world.begin = Some(begin);
        delivered(&world, 100, 10).await;
        assert_eq!(world.payloads("w").len(), if begin == Begin::Now { 110 } else { 210 });
        // It is told once: from then on there is a position.
        delivered(&world, 110, 10).await;
        assert_eq!(world.payloads("w").len(), if begin == Begin::Now { 120 } else { 220 });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_partition_without_its_position_fills_nothing_twice_either() {
    let mut world = World::new(2, &[("default", "w")]);
    world.config.sink_backoff.max = Period(Duration::from_millis(5));
    delivered(&world, 0, 100).await;
    world.database("w").lose_position(1);
    refused(&world, "are gone").await;
    world.has_rows(slice::from_ref(&(0..100)));
    world.begin = Some(Begin::Now);
    delivered(&world, 100, 10).await;
    world.has_rows(slice::from_ref(&(0..110)));
}

/// A first start, a second pipeline, another log: none is asked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_somebody_else_filled_is_written_to_without_a_question() {
    let world = World::new(2, &[("default", "w")]);
    delivered(&world, 0, 10).await;
    let memory = crate::stream::memory::MemoryStream::with_hooks("telemetry", 2);
    let fresh = World { stream: memory.clone(), memory, ..world.clone() };
    delivered(&fresh, 100, 10).await;
    assert_eq!(world.payloads("w").len(), 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn positions_that_somebody_removes_under_a_host_stop_the_sink_and_fill_nothing_twice() {
    let mut world = World::new(2, &[("default", "w")]);
    world.config.sink_backoff.max = Period(Duration::from_millis(5));
    let process = world.start(chain(1, &[])).await;
    world.publish_many(3, 0, 100);
    process.drained().await;
    world.database("w").lose_positions();
    world.publish_many(3, 100, 10);
    let gone = |state: &State| matches!(state, State::Retrying(why) if why.contains("are gone"));
    process.until("said", |status| gone(&status.sinks[0].state)).await;
    world.has_rows(std::slice::from_ref(&(0..100)));
    process.stop().await;
}
