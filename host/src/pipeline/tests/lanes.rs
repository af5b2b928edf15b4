use super::harness::{Act, World, chain, published, sorted, step, text};
use crate::batch::Offset;
use crate::pipeline::State;
use crate::pipeline::supervisor::MERGE_DISTANCE_MESSAGES;
use crate::sinks::memory::Fault;
use crate::units::ByteSize;

fn world() -> World {
    let mut world = World::new(4, &[("default", "fast slow")]);
    // A few frames fill a queue.
    world.config.sink_queue_bytes_max = ByteSize(64 << 10);
    world.config.read_ahead_bytes_max = ByteSize(64 << 10);
    world
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_sink_down_delays_only_itself_and_catches_up() {
    let world = world();
    let process = world.start(chain(1, &[step("pass", |_, _| Act::Pass)])).await;
    world.publish_many(10, 0, 100);
    process.drained().await;
    world.database("slow").block();
    world.publish_many(10, 100, 20_000);
    world.database("fast").rows_at_least(20_100).await;
    assert_eq!(world.payloads("slow").len(), 100);
    world.database("slow").unblock();
    process.drained().await;
    process.until("together again", |s| s.sinks.iter().all(|sink| !sink.own_lane)).await;
    world.publish_many(10, 20_100, 1_000);
    process.drained().await;
    for sink in ["fast", "slow"] {
        assert_eq!(sorted(world.payloads(sink)), published(10, 21_100), "{sink}");
    }
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_whose_write_fails_as_it_is_to_join_the_others_joins_them_later() {
    let mut world = world();
    world.config.workers = Some(1);
    let slow = world.database("slow");
    slow.set_down(Some("connection refused"));
    slow.set_commits_blocked(true);
    // As far from the others as a sink that joins them may be, and the rows of its first commit.
    world.publish_many(10, 0, MERGE_DISTANCE_MESSAGES + 40);
    let process = world.start(chain(1, &[])).await;
    world.database("fast").rows_at_least(MERGE_DISTANCE_MESSAGES as usize + 40).await;
    slow.set_down(None);
    process
        .until("a commit from a lane of its own", |s| slow.commits_waiting() > 0 && s.sinks[1].own_lane)
        .await;
    // Now it is near enough, and asked to join.
    process.looked_after().await;
    process.looked_after().await;
    slow.fail_commits([Fault::Retry("terminating connection".to_owned())]);
    slow.set_commits_blocked(false);
    process.drained().await;
    process.until("together", |s| s.sinks.iter().all(|sink| !sink.own_lane)).await;
    assert_eq!(sorted(world.payloads("slow")), published(10, MERGE_DISTANCE_MESSAGES + 40));
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_that_is_down_at_the_start_does_not_hold_the_others() {
    let world = world();
    world.database("slow").block();
    world.publish_many(10, 0, 5_000);
    let process = world.start(chain(1, &[])).await;
    world.database("fast").rows_at_least(5_000).await;
    world.database("slow").unblock();
    process.drained().await;
    assert_eq!(sorted(world.payloads("slow")), published(10, 5_000));
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_refused_in_two_lanes_has_one_letter_for_each_sink() {
    let world = world();
    let check = step("check", |message, _| match text(message).ends_with('7') {
        true => Act::Refuse("seven".to_owned()),
        false => Act::Pass,
    });
    let process = world.start(chain(1, &[check])).await;
    world.publish_many(10, 0, 100);
    process.drained().await;
    world.database("slow").block();
    world.publish_many(10, 100, 20_000);
    world.database("fast").rows_at_least(18_090).await;
    world.database("slow").unblock();
    process.drained().await;
    assert_eq!(world.payloads("slow").len(), 18_090);
    // Where the sinks were together one letter names both.
    assert!(world.letters().await.len() < 2 * 2_010);
    for sink in ["fast", "slow"] {
        let letters = world.open_letters(sink).await.into_iter().map(|(payload, _)| payload).collect();
        let all = sorted([world.payloads(sink), letters].concat());
        assert_eq!(all, published(10, 20_100), "{sink}");
    }
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_only_sink_down_stops_the_reader_within_its_bounds() {
    let mut world = World::new(2, &[("default", "w")]);
    world.config.sink_queue_bytes_max = ByteSize(64 << 10);
    world.config.read_ahead_bytes_max = ByteSize(64 << 10);
    let process = world.start(chain(1, &[])).await;
    process.until("running", |status| status.state == State::Running).await;
    world.database("w").block();
    world.publish_many(10, 0, 50_000);
    // Where the reader stands still it has filled its bounds: 64 KiB each are
    // at most some hundred frames of ten messages.
    let (mut before, mut still) = (Offset(u64::MAX), 0);
    process
        .until("pushed back", |status| {
            let moved = status.read != before || status.read == Offset(0);
            still = if moved { 0 } else { still + 1 };
            before = status.read;
            still == 5
        })
        .await;
    assert!(before < Offset(10_000), "{before:?}");
    world.database("w").unblock();
    process.drained().await;
    assert_eq!(sorted(world.payloads("w")), published(10, 50_000));
    process.stop().await;
}

/// On one thread, whose recorder it is.
#[tokio::test]
async fn a_message_that_two_readers_run_through_the_steps_counts_as_read_once() {
    let recorder = crate::admin::metrics::builder().build_recorder();
    let rendered = recorder.handle();
    let _recorder = metrics::set_default_local_recorder(&recorder);
    let world = world();
    let check = step("check", |message, _| match text(message).ends_with("77") {
        true => Act::Refuse("seven".to_owned()),
        false => Act::Pass,
    });
    let process = world.start(chain(1, &[check])).await;
    world.publish_many(10, 0, 100);
    process.drained().await;
    world.database("slow").block();
    world.publish_many(10, 100, 20_000);
    world.database("fast").rows_at_least(19_899).await;
    world.database("slow").unblock();
    process.drained().await;
    assert_eq!(world.payloads("slow").len(), 19_899);
    let text = rendered.render();
    for (outcome, count) in [("read", "20100"), ("passed", "19899"), ("refused", "201")] {
        let series = format!("headworks_pipeline_messages_total{{pipeline=\"p\",outcome=\"{outcome}\"}} ");
        assert_eq!(text.lines().find_map(|line| line.strip_prefix(&series)), Some(count), "{text}");
    }
    process.stop().await;
}
