use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::harness::{Act, World, chain, counting, published, sorted, step, text};
use crate::batch::Offset;
use crate::pipeline::again::is_pending;
use crate::pipeline::dead_letters::{KEYS_MAX, new_message};
use crate::pipeline::marks::mark_key;
use crate::pipeline::{Ended, Filter, MARK_PREFIX, RedriveError, State, list_open};
use crate::properties::{self, Origin};
use crate::sinks::Begin;
use crate::sinks::memory::Fault;
use crate::stream::{OnLag, Read, StateChange};
use crate::units::Period;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_sink_refused_goes_to_that_sink_once() {
    let world = World::new(2, &[("default", "w other")]);
    let broken = Arc::new(AtomicBool::new(true));
    let is_broken = Arc::clone(&broken);
    world.database("w").refuse(move |message| {
        (is_broken.load(Ordering::Acquire) && text(message).ends_with('3')).then(|| "no column".to_owned())
    });
    let process = world.start(chain(1, &[])).await;
    world.publish_many(5, 0, 100);
    process.drained().await;
    assert_eq!(world.letters().await.len(), 10);

    // Still refused: new letters, nothing lost.
    let summary = process.handle.redrive(&Filter::default()).await.unwrap();
    assert_eq!((summary.sent, summary.refused, summary.failed.len()), (0, 10, 0));
    assert_eq!(list_open(&*world.dead, Some("p")).await.unwrap().len(), 10);

    broken.store(false, Ordering::Release);
    let one = list_open(&*world.dead, Some("p")).await.unwrap()[0];
    let filter = Filter { ids: Some(vec![one]), ..Filter::default() };
    assert_eq!(process.handle.redrive(&filter).await.unwrap().sent, 1);
    assert_eq!(process.handle.redrive(&filter).await.unwrap().sent, 0);
    assert_eq!(process.handle.redrive(&Filter::default()).await.unwrap().sent, 9);
    assert_eq!(process.handle.redrive(&Filter::default()).await.unwrap().sent, 0);
    assert_eq!(sorted(world.payloads("w")), published(5, 100));
    assert_eq!(world.payloads("other").len(), 100);
    assert!(list_open(&*world.dead, None).await.unwrap().is_empty());

    // The pipeline itself goes on.
    world.publish_many(5, 100, 100);
    process.drained().await;
    assert_eq!(world.payloads("w").len(), 200);
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pipeline_that_holds_sends_no_letter_past_a_step_that_is_missing() {
    let world = World::new(2, &[("default", "w")]);
    let broken = Arc::new(AtomicBool::new(true));
    let is_broken = Arc::clone(&broken);
    world.database("w").refuse(move |_| is_broken.load(Ordering::Acquire).then(|| "no column".to_owned()));
    let redact = || step("redact", |_, _| Act::Payload("redacted".to_owned()));
    let process = world.start(chain(1, &[redact()])).await;
    world.publish_many(1, 0, 3);
    process.drained().await;
    broken.store(false, Ordering::Release);

    let mut held = chain(2, &[]);
    held.hold = Some("1-redact.wasm was removed".into());
    process.chain.send_replace(held);
    process.until("holding", |status| matches!(status.state, State::Holding(_))).await;
    let error = process.handle.redrive(&Filter::default()).await.unwrap_err();
    assert!(matches!(&error, RedriveError::Held(why) if why.contains("1-redact.wasm")), "{error}");
    assert_eq!((list_open(&*world.dead, Some("p")).await.unwrap().len(), world.payloads("w").len()), (3, 0));

    process.chain.send_replace(chain(3, &[redact()]));
    process.until("running", |status| status.state == State::Running).await;
    assert_eq!(process.handle.redrive(&Filter::default()).await.unwrap().sent, 3);
    assert_eq!(world.payloads("w"), ["redacted"; 3]);
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_step_refused_goes_from_that_step_to_every_sink_once() {
    let world = World::new(2, &[("default", "w other")]);
    let broken = Arc::new(AtomicBool::new(true));
    let is_broken = Arc::clone(&broken);
    let tag = step("tag", |message, _| Act::Payload(format!("tagged {}", text(message))));
    let check = step("check", move |message, _| {
        match is_broken.load(Ordering::Acquire) && text(message).ends_with('3') {
            true => Act::Refuse("table not there".to_owned()),
            false => Act::Pass,
        }
    });
    let process = world.start(chain(1, &[tag, check])).await;
    world.publish_many(5, 0, 100);
    process.drained().await;
    assert_eq!(world.letters().await.len(), 10);
    // Each sink's part is refused again for itself.
    assert_eq!(process.handle.redrive(&Filter::default()).await.unwrap().refused, 20);
    assert_eq!(world.open_letters("w").await.len(), 10);
    assert_eq!(world.open_letters("other").await.len(), 10);
    broken.store(false, Ordering::Release);
    assert_eq!(process.handle.redrive(&Filter::default()).await.unwrap().sent, 20);
    assert_eq!(process.handle.redrive(&Filter::default()).await.unwrap().sent, 0);
    let expected: Vec<_> = published(5, 100).into_iter().map(|payload| format!("tagged {payload}")).collect();
    for sink in ["w", "other"] {
        assert_eq!(sorted(world.payloads(sink)), sorted(expected.clone()), "{sink}");
    }
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_that_is_refused_again_stays_one_letter_for_the_sinks_that_have_not_had_it() {
    let world = World::new(1, &[("default", "w other")]);
    let broken = Arc::new(AtomicBool::new(true));
    let is_broken = Arc::clone(&broken);
    let check = step("check", move |message, _| {
        match is_broken.load(Ordering::Acquire) && text(message).ends_with('3') {
            true => Act::Refuse("table not there".to_owned()),
            false => Act::Pass,
        }
    });
    let process = world.start(chain(1, &[check])).await;
    world.publish_many(1, 0, 10);
    process.drained().await;
    let first = list_open(&*world.dead, None).await.unwrap();
    for _ in 0..3 {
        let summary = process.handle.redrive(&Filter::default()).await.unwrap();
        assert_eq!((summary.sent, summary.letters), (0, Ended { refused: 1, ..Ended::default() }));
        assert_eq!(list_open(&*world.dead, None).await.unwrap(), first);
        assert_eq!(world.letters().await.len(), 1);
    }
    // The step lets it through now, one of the sinks refuses it: a letter of that sink.
    broken.store(false, Ordering::Release);
    world.database("other").refuse(|message| text(message).ends_with('3').then(|| "no column".to_owned()));
    let summary = process.handle.redrive(&Filter::default()).await.unwrap();
    assert_eq!((summary.sent, summary.refused), (1, 1));
    for _ in 0..3 {
        assert_eq!(world.open_letters("w").await, []);
        assert_eq!(world.open_letters("other").await, [("d0:3".to_owned(), "other".to_owned())]);
        process.handle.redrive(&Filter::default()).await.unwrap();
        assert_eq!(world.letters().await.len(), 2);
    }
    world.database("other").refuse(|_| None);
    let summary = process.handle.redrive(&Filter::default()).await.unwrap();
    assert_eq!((summary.sent, summary.letters), (1, Ended { sent: 1, ..Ended::default() }));
    assert!(list_open(&*world.dead, None).await.unwrap().is_empty());
    for sink in ["w", "other"] {
        assert_eq!(sorted(world.payloads(sink)), published(1, 10), "{sink}");
    }
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_is_pending_for_a_sink_that_the_pipeline_does_not_have_any_more() {
    let world = World::new(1, &[("default", "w other")]);
    let refusing = step("check", |_, _| Act::Refuse("no".to_owned()));
    let process = world.start(chain(1, &[refusing])).await;
    world.publish_many(1, 0, 3);
    process.drained().await;
    process.stop().await;
    let mut fewer = World { config: World::new(1, &[("default", "w")]).config, ..world.clone() };
    fewer.databases.remove("other");
    let process = fewer.start(chain(1, &[step("check", |_, _| Act::Pass)])).await;
    process.until("has steps", |status| status.chain.is_some()).await;
    let summary = process.handle.redrive(&Filter::default()).await.unwrap();
    assert_eq!((summary.sent, summary.letters.pending), (3, 3));
    assert_eq!(process.handle.redrive(&Filter::default()).await.unwrap().sent, 0);
    process.stop().await;
    // Back again, it gets what it has not had.
    let process = world.start(chain(1, &[step("check", |_, _| Act::Pass)])).await;
    process.until("resumed", |_| !is_pending(&*world.dead, &["p".to_owned()])).await;
    assert_eq!(sorted(world.payloads("other")), published(1, 3));
    assert_eq!(sorted(world.payloads("w")), published(1, 3));
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redrive_that_ends_with_its_process_goes_on_at_the_next_start() {
    let world = World::new(2, &[("default", "w")]);
    world.database("w").refuse(|message| {
        let n = super::harness::number(&text(message));
        (n < 10).then(|| "no column".to_owned())
    });
    let process = world.start(chain(1, &[])).await;
    world.publish_many(3, 0, 20);
    process.drained().await;
    // Of ten letters one is refused again, then the sink fails and the process ends.
    world.database("w").refuse(|message| text(message).ends_with(":4").then(|| "still no column".to_owned()));
    world.database("w").fail_commits([Fault::Retry("down".to_owned())]);
    let summary = process.handle.redrive(&Filter::default()).await.unwrap();
    assert_eq!((summary.sent, summary.letters.pending), (0, 10));
    assert!(list_open(&*world.dead, None).await.unwrap().is_empty());
    process.stop().await;
    let process = world.start(chain(1, &[])).await;
    process.until("resumed", |_| !is_pending(&*world.dead, &["p".to_owned()])).await;
    assert_eq!(world.payloads("w").len(), 19);
    assert_eq!(world.open_letters("w").await, [("d1:4".to_owned(), "w".to_owned())]);
    world.database("w").refuse(|_| None);
    process.handle.redrive(&Filter::default()).await.unwrap();
    assert_eq!(sorted(world.payloads("w")), published(3, 20));
    process.stop().await;
}

/// What a redrive of 0.1.0 writes before it sends anything: for each of these letters a copy with an empty mark.
async fn copy_as_the_first_version(world: &World, letters: &[Offset]) {
    let mut cursor = world.dead.cursor(Offset(0));
    let end = world.dead.bounds().end;
    while cursor.position() < end {
        let Some(Read::Batch(batch)) = cursor.try_next().await.unwrap() else { continue };
        for message in batch.messages().filter(|message| letters.contains(&message.offset())) {
            let mut properties = message.properties().to_vec();
            let letter = message.offset().0.to_string();
            properties::push(&mut properties, Origin::Pipeline, "dead-letter-redrive", letter.as_bytes());
            let copy = new_message(&message, &properties, world.dead.identity().partitions);
            let (key, value) = (mark_key(message.offset()), Some(&[][..]));
            world.dead.append(&[copy], &[StateChange { key: &key, value }]).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn letters_that_a_redrive_of_the_first_version_copied_and_did_not_send_are_sent_once() {
    let world = World::new(1, &[("default", "w other")]);
    for sink in ["w", "other"] {
        world.database(sink).refuse(|_| Some("no column".to_owned()));
    }
    let process = world.start(chain(1, &[])).await;
    world.publish_many(2, 0, 10);
    process.drained().await;
    process.stop().await;
    let letters = list_open(&*world.dead, None).await.unwrap();
    assert_eq!(letters.len(), 20);
    world.database("w").refuse(|_| None);
    world.database("other").refuse(|message| text(message).ends_with(":4").then(|| "still".to_owned()));
    let is_unknown =
        |at: usize| world.dead.state(&mark_key(letters[at])).iter().any(|(_, mark)| mark.is_empty());
    for (part, sink) in [(0..7, "other"), (7..20, "w")] {
        copy_as_the_first_version(&world, &letters[part.clone()]).await;
        // One of the sinks is down for a while.
        world.database(sink).fail_commits([Fault::Retry("down".to_owned())]);
        let process = world.start(chain(1, &[])).await;
        let is_over = || !is_pending(&*world.dead, &["p".to_owned()]) && !part.clone().any(is_unknown);
        process.until("the redrive has ended", |_| is_over()).await;
        process.stop().await;
    }
    // As a start finds it if the positions in the sinks survived a crash, and what the marks say did not.
    let is_sent =
        |at: &Offset| !world.dead.state(&mark_key(*at)).iter().any(|(_, mark)| mark.starts_with(b"open"));
    for letter in letters.iter().filter(|letter| is_sent(letter)) {
        world.dead.append(&[], &[StateChange { key: &mark_key(*letter), value: Some(&[]) }]).unwrap();
    }
    let process = world.start(chain(1, &[])).await;
    process.until("the redrive has ended", |_| !(0..20).any(is_unknown)).await;
    assert_eq!(process.handle.redrive(&Filter::default()).await.unwrap().sent, 0);
    assert_eq!(sorted(world.payloads("w")), published(2, 10));
    assert_eq!(world.payloads("other").len(), 9);
    assert_eq!(world.open_letters("other").await, [("d0:4".to_owned(), "other".to_owned())]);
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pipeline_that_stops_while_it_goes_on_with_a_redrive_drains_all_the_same() {
    let world = World::new(2, &[("default", "w")]);
    let database = world.database("w");
    database.refuse(|message| (super::harness::number(&text(message)) < 10).then(|| "no column".to_owned()));
    let process = world.start(chain(1, &[])).await;
    world.publish_many(3, 0, 20);
    process.drained().await;
    database.refuse(|_| None);
    database.fail_commits([Fault::Retry("down".to_owned())]);
    let summary = process.handle.redrive(&Filter::default()).await.unwrap();
    assert_eq!(summary.letters.pending, 10);
    process.stop().await;
    database.set_commits_blocked(true);
    let (ran, steps) = counting();
    let process = world.start(steps).await;
    process.until("a commit of the redrive", |_| database.commits_waiting() > 0).await;
    world.publish_many(3, 20, 10);
    process.until("the steps", |_| ran.load(Ordering::Acquire) == 10).await;
    process.shutdown.cancel();
    database.set_commits_blocked(false);
    process.stop().await;
    let read = |payload: &String| super::harness::number(payload) >= 10;
    let drained: Vec<_> = world.payloads("w").into_iter().filter(read).collect();
    let all_read: Vec<_> = published(3, 30).into_iter().filter(read).collect();
    assert_eq!(sorted(drained), all_read, "what was read");
    // The redrive ends between two batches, and goes on with the rest.
    let process = world.start(chain(1, &[])).await;
    process.until("resumed", |_| !is_pending(&*world.dead, &["p".to_owned()])).await;
    assert_eq!(sorted(world.payloads("w")), published(3, 30), "each once");
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redrive_that_fails_half_way_is_finished_by_the_next() {
    for fault in [Fault::UnknownWritten, Fault::UnknownLost, Fault::Retry("down".to_owned())] {
        let world = World::new(1, &[("default", "w")]);
        let broken = Arc::new(AtomicBool::new(true));
        let is_broken = Arc::clone(&broken);
        world
            .database("w")
            .refuse(move |_| is_broken.load(Ordering::Acquire).then(|| "no column".to_owned()));
        let process = world.start(chain(1, &[])).await;
        world.publish_many(2, 0, 10);
        process.drained().await;
        broken.store(false, Ordering::Release);
        // The first commit of a pass only sets its positions.
        world.database("w").fail_commits([Fault::Passes, fault]);
        let summary = process.handle.redrive(&Filter::default()).await.unwrap();
        assert_eq!(summary.failed.len(), 1, "{summary:?}");
        process.handle.redrive(&Filter::default()).await.unwrap();
        assert_eq!(sorted(world.payloads("w")), published(2, 10));
        process.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_refused_again_before_a_sink_fails_is_not_written_by_the_next_redrive_too() {
    let world = World::new(1, &[("default", "w")]);
    let broken = Arc::new(AtomicBool::new(true));
    let is_broken = Arc::clone(&broken);
    let check = step("check", move |message, _| {
        match is_broken.load(Ordering::Acquire) && !text(message).ends_with('5') {
            true => Act::Refuse("no table".to_owned()),
            false => Act::Pass,
        }
    });
    world.database("w").refuse(|message| text(message).ends_with('5').then(|| "no column".to_owned()));
    let process = world.start(chain(1, &[check])).await;
    world.publish_many(2, 0, 10);
    process.drained().await;
    assert_eq!(world.letters().await.len(), 10);
    let marks = world.dead_memory.marks().len();
    // Nine are refused again, then the sink fails.
    world.database("w").refuse(|_| None);
    world.database("w").fail_commits([Fault::Passes, Fault::Retry("down".to_owned())]);
    let summary = process.handle.redrive(&Filter::default()).await.unwrap();
    assert_eq!((summary.refused, summary.failed.len()), (9, 1));
    broken.store(false, Ordering::Release);
    let sent = process.handle.redrive(&Filter::default()).await.unwrap().sent;
    let more = process.handle.redrive(&Filter::default()).await.unwrap().sent;
    assert_eq!(sent + more, 10);
    assert_eq!(sorted(world.payloads("w")), published(2, 10));
    // The pipeline's own mark stays, a redrive's goes.
    assert_eq!(world.dead_memory.marks().len(), marks);
    assert!(world.dead_memory.marks().keys().any(|name| name == "p/telemetry/dead-letters"));
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn marks_of_letters_that_retention_removed_go_with_them() {
    let world = World::new(1, &[("default", "w")]);
    world.database("w").refuse(|_| Some("no column".to_owned()));
    let process = world.start(chain(1, &[])).await;
    world.publish_many(2, 0, 10);
    process.drained().await;
    world.database("w").refuse(|_| None);
    assert_eq!(process.handle.redrive(&Filter::default()).await.unwrap().sent, 10);
    assert_eq!(world.dead.state(MARK_PREFIX).len(), 1, "one record for all");
    for (start, records) in [(6, 1), (10, 0)] {
        world.dead_memory.trim(Offset(start));
        process.handle.redrive(&Filter::default()).await.unwrap();
        assert_eq!(world.dead.state(MARK_PREFIX).len(), records);
    }
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_past_its_age_is_neither_listed_nor_sent() {
    let world = World::new(2, &[("default", "w")]);
    let broken = Arc::new(AtomicBool::new(true));
    let is_broken = Arc::clone(&broken);
    world.database("w").refuse(move |_| is_broken.load(Ordering::Acquire).then(|| "no column".to_owned()));
    let process = world.start(chain(1, &[])).await;
    world.publish_many(5, 0, 10);
    process.drained().await;
    world.dead_memory.pass_age();
    world.publish_many(5, 10, 3);
    process.drained().await;
    broken.store(false, Ordering::Release);
    assert_eq!(list_open(&*world.dead, None).await.unwrap().len(), 3);
    assert_eq!(process.handle.redrive(&Filter::default()).await.unwrap().sent, 3);
    assert_eq!(world.payloads("w").len(), 3);
    world.dead_memory.pass_age();
    assert!(list_open(&*world.dead, None).await.unwrap().is_empty());
    process.stop().await;
}

/// Else retention may remove the letter, and the message becomes a row of its own beside it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_is_sent_again_only_once_its_sink_is_past_the_message() {
    let world = World::new(1, &[("default", "w")]);
    let broken = Arc::new(AtomicBool::new(true));
    let is_broken = Arc::clone(&broken);
    let check = step("check", move |message, _| {
        match is_broken.load(Ordering::Acquire) && text(message).ends_with('3') {
            true => Act::Refuse("table not there".to_owned()),
            false => Act::Pass,
        }
    });
    // Its sink gathers, and commits nothing.
    let mut slow = world.clone();
    slow.batching.rows_max = 1_000_000;
    slow.batching.wait_max = Duration::from_secs(3_600);
    slow.config.progress_every = Period(Duration::from_secs(3_600));
    let process = slow.start(chain(1, &[Arc::clone(&check)])).await;
    world.publish_many(1, 0, 10);
    while world.letters().await.is_empty() {
        process.looked_after().await;
    }
    broken.store(false, Ordering::Release);
    let summary = process.handle.redrive(&Filter::default()).await.unwrap();
    assert_eq!((summary.sent, summary.letters.pending), (0, 1));
    assert!(summary.failed[0].contains("has not come to the message of dead letter 0"), "{summary:?}");
    process.handle.crash();
    process.handle.join().await;
    world.dead_memory.trim(Offset(2));
    let process = world.start(chain(1, &[check])).await;
    process.drained().await;
    process.until("steps", |status| status.chain.is_some()).await;
    process.handle.redrive(&Filter::default()).await.unwrap();
    assert_eq!(sorted(world.payloads("w")), published(1, 10));
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redrive_waits_for_a_sink_that_is_about_to_pass_the_message() {
    let mut world = World::new(1, &[("default", "w")]);
    world.config.progress_every = Period(Duration::from_millis(300));
    let broken = Arc::new(AtomicBool::new(true));
    let is_broken = Arc::clone(&broken);
    let check = step("check", move |_, _| match is_broken.load(Ordering::Acquire) {
        true => Act::Refuse("table not there".to_owned()),
        false => Act::Pass,
    });
    let process = world.start(chain(1, &[check])).await;
    world.publish_many(1, 0, 10);
    while world.letters().await.len() < 10 {
        process.looked_after().await;
    }
    broken.store(false, Ordering::Release);
    let summary = process.handle.redrive(&Filter::default()).await.unwrap();
    assert_eq!((summary.sent, summary.failed.len()), (10, 0), "{summary:?}");
    assert_eq!(sorted(world.payloads("w")), published(1, 10));
    process.stop().await;
}

/// Its position is not all that knows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_that_was_sent_is_not_sent_again_where_the_positions_are_gone() {
    let mut world = World::new(1, &[("default", "w")]);
    let broken = Arc::new(AtomicBool::new(true));
    let is_broken = Arc::clone(&broken);
    world.database("w").refuse(move |message| {
        (is_broken.load(Ordering::Acquire) && text(message).ends_with('3')).then(|| "no column".to_owned())
    });
    let process = world.start(chain(1, &[])).await;
    world.publish_many(1, 0, 10);
    process.drained().await;
    broken.store(false, Ordering::Release);
    assert_eq!(process.handle.redrive(&Filter::default()).await.unwrap().sent, 1);
    process.stop().await;
    world.database("w").lose_positions();
    world.begin = Some(Begin::Now);
    let process = world.start(chain(1, &[])).await;
    process.until("steps", |status| status.chain.is_some()).await;
    process.drained().await;
    assert_eq!(process.handle.redrive(&Filter::default()).await.unwrap().sent, 0);
    assert_eq!(sorted(world.payloads("w")), published(1, 10));
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redrive_holds_no_letters_back_whether_it_ends_or_fails() {
    let world = World::new(1, &[("default", "w")]);
    world.database("w").refuse(|_| Some("no column".to_owned()));
    let process = world.start(chain(1, &[])).await;
    world.publish_many(2, 0, 10);
    process.drained().await;
    // What a version left whose redrives held them back.
    drop(world.dead.attach("p/dead-letters/dead-letters", crate::batch::Offset(0), OnLag::Block));
    world.database("w").set_down(Some("connection refused"));
    let summary = process.handle.redrive(&Filter::default()).await.unwrap();
    assert_eq!((summary.failed.len(), summary.letters.pending), (1, 10));
    assert!(world.dead_memory.marks().values().all(|(_, on_lag)| *on_lag == OnLag::Detach));
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redrive_that_finds_no_room_gives_the_sink_back_and_the_next_one_goes_on() {
    let world = World::new(1, &[("default", "w")]);
    let mends = Arc::new(AtomicBool::new(false));
    let is_mended = Arc::clone(&mends);
    let check = step("check", move |_, _| match is_mended.load(Ordering::Acquire) {
        true => Act::Pass,
        false => Act::Refuse("no".to_owned()),
    });
    // It refuses what `check` lets through, which makes new letters, where there is no room.
    let (full, dead) = (Arc::new(AtomicBool::new(true)), Arc::clone(&world.dead_memory));
    let is_full = Arc::clone(&full);
    let fill = step("fill", move |_, _| {
        dead.set_no_space(is_full.load(Ordering::Acquire));
        if is_full.load(Ordering::Acquire) { Act::Refuse("full".to_owned()) } else { Act::Pass }
    });
    let process = world.start(chain(1, &[check, fill])).await;
    world.publish_many(2, 0, 10);
    process.drained().await;
    mends.store(true, Ordering::Release);
    let summary = process.handle.redrive(&Filter::default()).await.unwrap();
    assert!(summary.failed[0].contains("have no room"), "{summary:?}");
    assert!(matches!(process.handle.redrive(&Filter::default()).await, Ok(_) | Err(RedriveError::NoRoom)));
    world.dead_memory.set_no_space(false);
    full.store(false, Ordering::Release);
    // The sink is back with its pipeline.
    world.publish_many(2, 10, 10);
    process.drained().await;
    process.handle.redrive(&Filter::default()).await.unwrap();
    assert_eq!(sorted(world.payloads("w")), published(2, 20));
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redrive_of_more_letters_than_are_remembered_ends() {
    let world = World::new(1, &[("default", "w")]);
    let by = Arc::new(AtomicBool::new(true));
    let check = |name, by: &Arc<AtomicBool>, when| {
        let by = Arc::clone(by);
        step(name, move |_, _| match by.load(Ordering::Acquire) == when {
            true => Act::Refuse("no".to_owned()),
            false => Act::Pass,
        })
    };
    let process = world.start(chain(1, &[check("first", &by, true), check("second", &by, false)])).await;
    let count = 2 * KEYS_MAX as u64;
    world.publish_many(2, 0, count);
    process.drained().await;
    by.store(false, Ordering::Release);
    let summary = process.handle.redrive(&Filter::default()).await.unwrap();
    assert_eq!((summary.refused, summary.letters.sent, summary.failed), (count, count, Vec::new()));
    assert_eq!(world.open_letters("w").await.len() as u64, count);
    process.stop().await;
}

/// Nothing that a redrive does may cost a letter: not its own, and no other pipeline's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redrive_adds_no_messages_to_the_dead_letters_however_often_it_is_asked_for() {
    let world = World::new(1, &[("default", "w")]);
    let broken = Arc::new(AtomicBool::new(true));
    let is_broken = Arc::clone(&broken);
    world.database("w").refuse(move |_| is_broken.load(Ordering::Acquire).then(|| "no column".to_owned()));
    let process = world.start(chain(1, &[])).await;
    world.publish_many(3, 0, 200);
    process.drained().await;
    let end = world.dead.bounds().end;
    for _ in 0..3 {
        let summary = process.handle.redrive(&Filter::default()).await.unwrap();
        assert_eq!(summary.letters, Ended { refused: 200, ..Ended::default() });
        assert_eq!(list_open(&*world.dead, None).await.unwrap().len(), 200);
    }
    broken.store(false, Ordering::Release);
    assert_eq!(process.handle.redrive(&Filter::default()).await.unwrap().letters.sent, 200);
    assert_eq!(sorted(world.payloads("w")), published(3, 200));
    assert_eq!(world.dead.bounds().end, end);
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_retention_takes_of_letters_that_are_pending_is_told() {
    let world = World::new(1, &[("default", "w")]);
    world.database("w").refuse(|_| Some("no column".to_owned()));
    let process = world.start(chain(1, &[])).await;
    world.publish_many(2, 0, 10);
    process.drained().await;
    world.database("w").refuse(|_| None);
    world.database("w").set_down(Some("connection refused"));
    let summary = process.handle.redrive(&Filter::default()).await.unwrap();
    assert_eq!(summary.letters.pending, 10);
    world.database("w").set_down(None);
    world.dead_memory.trim(Offset(4));
    let summary = process.handle.redrive(&Filter::default()).await.unwrap();
    assert_eq!((summary.sent, summary.letters.sent), (6, 6));
    assert!(summary.failed[0].starts_with("4 dead letters could not be sent"), "{summary:?}");
    let summary = process.handle.redrive(&Filter::default()).await.unwrap();
    assert_eq!((summary.sent, summary.failed), (0, Vec::new()), "told once");
    process.stop().await;
}

/// The route had no sink when it was rejected; the sink that it has now began behind it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_goes_to_the_sink_of_its_route_that_began_after_it_was_rejected() {
    for (begin, sent) in [(Some(Begin::Now), 1), (Some(Begin::Start), 0)] {
        let world = World::new(1, &[("default", "w")]);
        let alert = || {
            step("alert", |message, _| match text(message).ends_with('3') {
                true => Act::Route("alert"),
                false => Act::Pass,
            })
        };
        let process = world.start(chain(1, &[alert()])).await;
        world.publish_many(1, 0, 10);
        process.drained().await;
        process.stop().await;
        assert_eq!(world.letters().await.len(), 1);
        let both = World::new(1, &[("default", "w"), ("alert", "alerts")]);
        let mut databases = world.databases.clone();
        databases.insert("alerts".to_owned(), both.database("alerts").clone());
        let both = World { config: both.config, databases, begin, ..world.clone() };
        let process = both.start(chain(1, &[alert()])).await;
        // The new sink begins here, or gets all.
        process.drained().await;
        both.publish_many(1, 10, 10);
        process.drained().await;
        process.until("steps", |status| status.chain.is_some()).await;
        let summary = process.handle.redrive(&Filter::default()).await.unwrap();
        assert_eq!((summary.sent, summary.letters.sent), (sent, 1), "{begin:?}");
        process.stop().await;
        assert_eq!(sorted(both.payloads("alerts")), ["d0:13", "d0:3"], "{begin:?}");
        assert_eq!(both.payloads("w").len(), 18);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn letters_of_the_names_that_a_pipeline_and_its_sinks_had_are_sent_once() {
    let world = World::new(1, &[("default", "w")]);
    world.database("w").refuse(|message| text(message).ends_with('3').then(|| "no column".to_owned()));
    let check = || {
        step("check", |message, _| match text(message).ends_with('4') {
            true => Act::Refuse("no".to_owned()),
            false => Act::Pass,
        })
    };
    // Killed between the letters and the position past them.
    world.database("w").fail_commits([Fault::Passes, Fault::UnknownLost]);
    let process = world.start(chain(1, &[check()])).await;
    world.publish_many(1, 0, 10);
    while world.letters().await.is_empty() {
        process.looked_after().await;
    }
    process.handle.crash();
    process.handle.join().await;
    let renamed = World::new(1, &[("default", "lake")]);
    let mut renamed = World { config: renamed.config, pipeline: "q".to_owned(), ..world.clone() };
    renamed.databases = [("lake".to_owned(), world.database("w").clone())].into();
    renamed.renamed_from = [("lake".to_owned(), "w".to_owned())].into();
    renamed.config.renamed_from = Some("p".to_owned());
    let process = renamed.start(chain(1, &[check()])).await;
    process.drained().await;
    assert_eq!(renamed.letters().await.len(), 2, "one for each message that was rejected");
    renamed.database("lake").refuse(|_| None);
    process.until("steps", |status| status.chain.is_some()).await;
    let old = Filter { sink: Some("w".to_owned()), ..Filter::default() };
    assert_eq!(process.handle.redrive(&old).await.unwrap().letters.sent, 1);
    process.chain.send_replace(chain(2, &[step("check", |_, _| Act::Pass)]));
    process.until("flipped", |status| status.chain == Some(2)).await;
    assert_eq!(process.handle.redrive(&Filter::default()).await.unwrap().letters.sent, 1);
    assert!(list_open(&*world.dead, None).await.unwrap().is_empty());
    assert_eq!(sorted(renamed.payloads("lake")), published(1, 10));
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_that_begins_again_does_not_stop_another_whose_letters_are_behind_it() {
    let mut world = World::new(1, &[("default", "w other")]);
    world.dead_letters_bytes_max = 2_000;
    let process = world.start(chain(1, &[step("check", |_, _| Act::Refuse("no".to_owned()))])).await;
    world.publish_many(1, 0, 100);
    process.drained().await;
    process.stop().await;
    world.database("w").lose_positions();
    world.begin = Some(Begin::Start);
    let process = world.start(chain(1, &[step("check", |_, _| Act::Refuse("no".to_owned()))])).await;
    world.publish_many(1, 100, 100);
    process.drained().await;
    process.stop().await;
    assert_eq!(world.letters().await.len(), 200);
}
