//! A letter names the sinks that have not had the message, and goes to those.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::harness::{Act, Process, World, chain, number, published, sorted, step, text};
use crate::batch::Offset;
use crate::pipeline::{Filter, Letter, State, Summary};
use crate::properties::{self, Origin};
use crate::step::Chain;
use crate::stream::{NewMessage, Read};
use crate::units::ByteSize;

const SINKS: [&str; 2] = ["fast", "slow"];

fn world() -> World {
    let mut world = World::new(4, &[("default", "fast slow")]);
    world.config.sink_queue_bytes_max = ByteSize(64 << 10);
    world.config.read_ahead_bytes_max = ByteSize(64 << 10);
    world
}

/// The step `check`: it refuses every message whose number ends in 7, or none.
fn check(generation: u64, refuses: bool) -> Chain {
    let check = step("check", move |message, _| match refuses && number(&text(message)) % 10 == 7 {
        true => Act::Refuse("seven".to_owned()),
        false => Act::Pass,
    });
    chain(generation, &[check])
}

/// Refuses by chance, as a step does that runs into a limit of time: while the flag is set.
fn by_chance(refuses: &Arc<AtomicBool>) -> Chain {
    let refuses = Arc::clone(refuses);
    let check = step("check", move |message, _| {
        match text(message).ends_with('7') && refuses.load(Ordering::Acquire) {
            true => Act::Refuse("seven".to_owned()),
            false => Act::Pass,
        }
    });
    chain(1, &[check])
}

async fn swap(process: &Process, next: Chain) {
    let generation = next.generation;
    process.chain.send_replace(next);
    process.until("flipped", |status| status.chain == Some(generation)).await;
}

/// Each sink has each message as a row or in one letter, then redriving makes
/// all of them rows, once.
async fn each_message_once(world: &World, process: &Process, generation: u64, count: u64) {
    for sink in SINKS {
        let letters = world.open_letters(sink).await.into_iter().map(|(payload, _)| payload).collect();
        assert_eq!(sorted([world.payloads(sink), letters].concat()), published(10, count), "{sink}");
    }
    swap(process, check(generation, false)).await;
    let summary = process.handle.redrive(&Filter::default()).await.unwrap();
    assert_eq!((summary.refused, summary.failed), (0, Vec::new()));
    for sink in SINKS {
        assert_eq!(sorted(world.payloads(sink)), published(10, count), "{sink}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_step_refuses_for_a_sink_that_lags_goes_to_that_sink_only() {
    let world = world();
    let refuses = Arc::new(AtomicBool::new(false));
    let process = world.start(by_chance(&refuses)).await;
    world.publish_many(10, 0, 100);
    process.drained().await;
    world.database("slow").block();
    world.publish_many(10, 100, 20_000);
    world.database("fast").rows_at_least(20_100).await;
    refuses.store(true, Ordering::Release);
    world.database("slow").unblock();
    process.drained().await;
    assert!(world.open_letters("fast").await.is_empty());
    assert!(world.open_letters("slow").await.len() > 1_000);
    each_message_once(&world, &process, 3, 20_100).await;
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_step_lets_through_for_a_sink_that_lags_is_sent_again_to_the_others_only() {
    let world = world();
    let refuses = Arc::new(AtomicBool::new(true));
    let process = world.start(by_chance(&refuses)).await;
    world.publish_many(10, 0, 100);
    process.drained().await;
    world.database("slow").block();
    world.publish_many(10, 100, 20_000);
    world.database("fast").rows_at_least(18_090).await;
    refuses.store(false, Ordering::Release);
    world.database("slow").unblock();
    process.drained().await;
    assert_eq!(world.open_letters("fast").await.len(), 2_010);
    assert!(world.open_letters("slow").await.len() < 1_000);
    assert!(world.payloads("slow").len() > 19_000);
    each_message_once(&world, &process, 3, 20_100).await;
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_that_a_crash_left_without_a_commit_keeps_its_message_from_the_sinks_it_names() {
    let world = world();
    let process = world.start(check(1, true)).await;
    world.publish_many(10, 0, 5);
    process.drained().await;
    let mut letters = world.dead.cursor(Offset(0));
    world.database("slow").block();
    world.publish_many(10, 5, 5);
    // "fast" is past the letter's message, "slow" is not.
    world.database("fast").rows_at_least(9).await;
    let Read::Batch(letters) = letters.next().await.unwrap() else { unreachable!("nothing is trimmed") };
    let names = Letter::of(&letters.message(0)).unwrap().sinks.map(str::to_owned);
    assert_eq!(names.as_deref(), Some("fast,slow"));
    process.handle.crash();
    process.handle.join().await;
    world.database("slow").unblock();
    let process = world.start(check(1, false)).await;
    process.drained().await;
    assert_eq!(world.letters().await, [("d7:7".to_owned(), "seven".to_owned())]);
    each_message_once(&world, &process, 2, 10).await;
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_step_that_refuses_after_a_crash_makes_no_second_letter() {
    let world = world();
    let process = world.start(check(1, true)).await;
    process.drained().await;
    world.database("slow").block();
    world.database("fast").block();
    let mut letters = world.dead.cursor(Offset(0));
    world.publish_many(10, 0, 10);
    letters.next().await.unwrap();
    process.handle.crash();
    process.handle.join().await;
    SINKS.iter().for_each(|sink| world.database(sink).unblock());
    let mut parse = chain(1, &[step("parse", |_, _| Act::Refuse("not JSON".to_owned()))]);
    parse.steps = parse.steps.iter().chain(check(1, false).steps.iter()).cloned().collect();
    let process = world.start(parse).await;
    process.drained().await;
    let by_check = world.letters().await.into_iter().filter(|(_, reason)| reason == "seven").count();
    assert_eq!((world.letters().await.len(), by_check), (10, 1));
    SINKS.iter().for_each(|sink| assert!(world.payloads(sink).is_empty()));
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_that_names_no_sinks_is_for_all() {
    let world = world();
    world.publish_many(10, 0, 10);
    let mut properties = Vec::new();
    let identity = world.stream.identity();
    for (name, value) in [
        ("reason", "seven"),
        ("kind", "failed"),
        ("pipeline", "p"),
        ("step", "check"),
        ("stream", "telemetry"),
        ("log", &identity.log.to_string()),
        ("generation", &identity.generation.to_string()),
        ("offset", "7"),
        ("index", "0"),
    ] {
        let name = format!("dead-letter-{name}");
        properties::push(&mut properties, Origin::Pipeline, &name, value.as_bytes());
    }
    let letter = NewMessage {
        topic: "acme/a/b/c/d",
        payload: b"d7:7",
        properties: &properties,
        route: "",
        device: "d7",
        partition: crate::batch::Partition(0),
        flags: 0,
        received_us: 1,
        event_us: 0,
    };
    world.dead.append(&[letter], &[]).unwrap();
    let process = world.start(check(1, false)).await;
    process.drained().await;
    SINKS.iter().for_each(|sink| assert_eq!(world.payloads(sink).len(), 9, "{sink}"));
    each_message_once(&world, &process, 2, 10).await;
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_for_sinks_that_are_gone_is_kept_and_not_marked() {
    let mut world = world();
    world.database("slow").refuse(|_| Some("no column".to_owned()));
    let process = world.start(check(1, false)).await;
    world.publish_many(10, 0, 10);
    process.drained().await;
    process.stop().await;
    world.databases.remove("slow");
    let process = world.start(check(1, false)).await;
    process.until("running", |status| status.chain.is_some()).await;
    let summary = process.handle.redrive(&Filter::default()).await.unwrap();
    let [why] = &summary.failed[..] else { panic!("{summary:?}") };
    assert!(why.starts_with("sink \"slow\": ") && why.contains("10 dead letters are for it"), "{why}");
    assert!(why.contains("renamed_from"), "what to do: {why}");
    assert_eq!(summary, Summary { failed: summary.failed.clone(), ..Summary::default() });
    assert_eq!(world.open_letters("slow").await.len(), 10);
    process.stop().await;
}

/// Everything that was published is a row of `w`, or has a letter for it, once.
async fn each_is_a_row_or_a_letter(world: &World, devices: u64, count: u64) {
    let letters = world.open_letters("w").await.into_iter().map(|(payload, _)| payload).collect();
    assert_eq!(sorted([world.payloads("w"), letters].concat()), published(devices, count));
}

/// A pipeline whose letters may take about a dozen of them.
fn with_a_small_share(partitions: u16, sinks: &str) -> World {
    let mut world = World::new(partitions, &[("default", sinks)]);
    world.config.batch_messages_max = 16;
    world.dead_letters_bytes_max = 2_000;
    world
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pipeline_that_rejects_more_than_its_share_holds_goes_on() {
    for (partitions, sinks, devices, frame) in
        [(1, "w", 1, 10), (1, "w", 1, 500), (4, "w", 1, 500), (4, "w x", 10, 500)]
    {
        let world = with_a_small_share(partitions, sinks);
        let process = world.start(chain(1, &[step("check", |_, _| Act::Refuse("no".to_owned()))])).await;
        let messages: Vec<_> = (0..1_000).map(|n| (format!("d{}", n % devices), n)).collect();
        for frame in messages.chunks(frame) {
            world.publish(&frame.iter().map(|(device, n)| (device.as_str(), *n)).collect::<Vec<_>>());
        }
        process.drained().await;
        assert_eq!(
            world.letters().await.len(),
            1_000,
            "{partitions} partitions, {devices} devices, frames of {frame}"
        );
        process.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_that_rejects_rows_goes_on_where_the_letters_of_steps_take_their_share() {
    let world = with_a_small_share(4, "w");
    world
        .database("w")
        .refuse(|message| number(&text(message)).is_multiple_of(3).then(|| "no column".to_owned()));
    let half = step("check", |message, _| match number(&text(message)) % 2 {
        0 => Act::Refuse("even".to_owned()),
        _ => Act::Pass,
    });
    let process = world.start(chain(1, &[half])).await;
    world.publish_many(10, 0, 1_000);
    process.drained().await;
    assert_eq!(world.payloads("w").len(), 333);
    each_is_a_row_or_a_letter(&world, 10, 1_000).await;
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_whose_rejected_rows_exceed_the_share_stops_no_sink() {
    let world = with_a_small_share(1, "w");
    world.database("w").refuse(|message| (number(&text(message)) == 3).then(|| "no column".to_owned()));
    let process = world.start(chain(1, &[step("many", |_, _| Act::Times(100))])).await;
    world.publish_many(1, 0, 10);
    process.drained().await;
    assert_eq!(world.open_letters("w").await, vec![("d0:3".to_owned(), "w".to_owned()); 100]);
    assert_eq!(world.payloads("w").len(), 900);
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pipeline_with_a_full_share_holds_for_its_sink_and_other_steps_go_on_after_a_restart() {
    let world = with_a_small_share(4, "w");
    let odd_or_even = |generation, rejected| {
        let check = step("check", move |message, _| match number(&text(message)) % 2 == rejected {
            true => Act::Refuse("no".to_owned()),
            false => Act::Pass,
        });
        chain(generation, &[check])
    };
    let process = world.start(odd_or_even(1, 0)).await;
    world.publish_many(10, 0, 10);
    process.drained().await;
    world.database("w").set_down(Some("connection refused"));
    world.publish_many(10, 10, 990);
    let status = process.until("holds", |status| matches!(status.state, State::Holding(_))).await;
    assert!(status.wants_room && status.lag_messages() == 990, "{status:?}");
    let State::Holding(reason) = status.state else { unreachable!("it holds") };
    assert!(reason.contains("sink \"w\" does not run"), "{reason}");
    process.handle.crash();
    process.handle.join().await;
    world.database("w").set_down(None);
    let process = world.start(odd_or_even(1, 1)).await;
    process.drained().await;
    each_is_a_row_or_a_letter(&world, 10, 1_000).await;
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_share_gives_room_as_soon_as_the_sink_is_back() {
    let world = with_a_small_share(4, "w");
    let process = world.start(check(1, false)).await;
    process.drained().await;
    world.database("w").set_down(Some("connection refused"));
    swap(&process, chain(2, &[step("check", |_, _| Act::Refuse("no".to_owned()))])).await;
    world.publish_many(10, 0, 1_000);
    process.until("holds", |status| status.wants_room).await;
    world.database("w").set_down(None);
    process.drained().await;
    process.until("runs", |status| status.state == State::Running).await;
    assert_eq!(world.letters().await.len(), 1_000);
    process.stop().await;
}
