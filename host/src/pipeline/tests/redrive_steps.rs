//! Where letters enter the steps again: steps that were removed, renamed, moved, added or mended.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::harness::{Act, Process, World, chain, published, sorted, step, text};
use crate::batch::Offset;
use crate::pipeline::again::is_pending;
use crate::pipeline::reasons::REASONS_MAX;
use crate::pipeline::{Ended, Filter, MARK_PREFIX, Mark, Marks, RedriveError, Reopened, Summary, list_open};
use crate::properties::{self, Origin};
use crate::sinks::memory::Fault;
use crate::step::{Chain, StepFactory};
use crate::stream::{NewMessage, Read};

type Steps = Vec<Arc<dyn StepFactory>>;

/// Adds its name to the payload.
fn tag(name: &'static str) -> Arc<dyn StepFactory> {
    step(name, move |message, _| Act::Payload(format!("{name} {}", text(message))))
}

pub(super) fn refusing(name: &str) -> Arc<dyn StepFactory> {
    step(name, |_, _| Act::Refuse("no table".to_owned()))
}

pub(super) fn passing(name: &str) -> Arc<dyn StepFactory> {
    step(name, |_, _| Act::Pass)
}

/// Waits until new steps run.
pub(super) async fn flip(process: &Process, generation: u64, steps: &[Arc<dyn StepFactory>]) {
    process.chain.send_replace(chain(generation, steps));
    process.until("flipped", |status| status.chain == Some(generation)).await;
}

/// A process with a letter for each of three messages, which these steps rejected.
pub(super) async fn with_letters(world: &World, steps: &[Arc<dyn StepFactory>]) -> Process {
    let process = world.start(chain(1, steps)).await;
    world.publish_many(1, 0, 3);
    process.drained().await;
    assert_eq!(world.letters().await.len(), 3);
    process
}

pub(super) async fn redrive(process: &Process) -> Summary {
    process.handle.redrive(&Filter::default()).await.unwrap()
}

/// What the list says of each open letter: the newest reason, and how often it was rejected again.
pub(super) async fn told(world: &World) -> Vec<(String, u32)> {
    let marks = Marks::read(&world.dead.state(MARK_PREFIX));
    let letters = world.letters().await;
    let open = list_open(&*world.dead, None).await.unwrap();
    let one = |offset: Offset| {
        let tries = marks.get(offset.0).map(Mark::tries).unwrap_or_default();
        let reason = marks.reasons().text(tries).unwrap_or(&letters[offset.0 as usize].1);
        (reason.to_owned(), tries.count)
    };
    open.into_iter().map(one).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_goes_on_with_the_steps_of_now_that_its_message_has_not_been_through() {
    let cases: [(&str, Steps, &str); 7] = [
        ("mended", vec![tag("a"), passing("check"), tag("b")], "b a"),
        ("removed", vec![tag("a"), tag("b")], "b a"),
        ("removed, and it was the last", vec![tag("a")], "a"),
        ("renamed", vec![tag("a"), tag("other"), tag("b")], "b other a"),
        ("one was added before it", vec![tag("a"), tag("redact"), passing("check"), tag("b")], "b redact a"),
        ("one was added in its place, behind", vec![tag("a"), tag("b"), tag("redact")], "redact b a"),
        ("moved behind the next", vec![tag("a"), tag("b"), tag("check")], "check b a"),
    ];
    for (what, now, expected) in cases {
        let world = World::new(1, &[("default", "w other")]);
        let process = with_letters(&world, &[tag("a"), refusing("check"), tag("b")]).await;
        flip(&process, 2, &now).await;
        let summary = redrive(&process).await;
        assert_eq!((summary.sent, summary.letters.sent, summary.refused), (6, 3, 0), "{what}");
        assert_eq!(redrive(&process).await.sent, 0);
        let rows: Vec<_> = published(1, 3).iter().map(|row| format!("{expected} {row}")).collect();
        for sink in ["w", "other"] {
            assert_eq!(sorted(world.payloads(sink)), sorted(rows.clone()), "{what}");
        }
        assert!(list_open(&*world.dead, None).await.unwrap().is_empty());
        process.stop().await;
    }
}

/// It would leave a step out that redacts, or convert twice what a step converted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_that_fits_nowhere_among_the_steps_waits_until_a_person_says_where_it_enters() {
    let cases: [(&str, Steps, &str, &str); 4] = [
        (
            "one was added at the front",
            vec![tag("redact"), tag("a"), passing("check")],
            "redact",
            "a redact a",
        ),
        ("moved to the front", vec![passing("check"), tag("a")], "check", "a a"),
        ("the one before it may have another name", vec![tag("renamed"), passing("check")], "check", "a"),
        ("to no step at all", vec![tag("redact"), tag("a")], "routes", "a"),
    ];
    for (what, now, from_step, expected) in cases {
        let world = World::new(1, &[("default", "w")]);
        let process = with_letters(&world, &[tag("a"), refusing("check")]).await;
        flip(&process, 2, &now).await;
        let summary = redrive(&process).await;
        assert_eq!((summary.sent, summary.letters.refused), (0, 3), "{what}");
        let told = told(&world).await;
        assert!(told.iter().all(|(why, n)| why.contains("--from-step") && *n == 1), "{what}: {told:?}");
        assert_eq!(world.letters().await.len(), 3, "no second letter");
        let unknown = Filter { from_step: Some("cheque".to_owned()), ..Filter::default() };
        let error = process.handle.redrive(&unknown).await.unwrap_err();
        assert!(matches!(&error, RedriveError::NoStep(_, known) if known.ends_with(", routes")), "{error}");
        let said = Filter { from_step: Some(from_step.to_owned()), ..Filter::default() };
        assert_eq!(process.handle.redrive(&said).await.unwrap().letters.sent, 3, "{what}");
        let rows: Vec<_> = published(1, 3).iter().map(|row| format!("{expected} {row}")).collect();
        assert_eq!(sorted(world.payloads("w")), sorted(rows), "{what}");
        process.stop().await;
    }
}

/// What is for letters of other steps, or of earlier versions, leaves no step of these out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_that_fits_by_itself_enters_there_whatever_step_a_person_names() {
    let world = World::new(1, &[("default", "w")]);
    let wrong = step("route", |_, _| Act::Route("alrt"));
    let process = with_letters(&world, &[tag("a"), wrong, tag("redact")]).await;
    flip(&process, 2, &[tag("a"), tag("route"), tag("redact")]).await;
    let routes = || Some("routes".to_owned());
    let said = Filter { step: routes(), from_step: routes(), ..Filter::default() };
    assert_eq!(process.handle.redrive(&said).await.unwrap().sent, 3);
    let rows: Vec<_> = published(1, 3).iter().map(|row| format!("redact route a {row}")).collect();
    assert_eq!(sorted(world.payloads("w")), sorted(rows));
    process.stop().await;
}

/// A person had the message enter at `a`, though it had been through `b`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_that_entered_earlier_leaves_no_step_out_that_is_behind_the_one_that_rejected_it() {
    let wrong = step("b", |_, _| Act::Route("alrt"));
    for (what, b) in [("rejects", refusing("b")), ("gives a wrong route", wrong)] {
        let world = World::new(1, &[("default", "w")]);
        let process = with_letters(&world, &[tag("a"), tag("b"), refusing("c")]).await;
        flip(&process, 2, &[passing("front"), tag("a"), b, passing("c")]).await;
        let said = Filter { from_step: Some("a".to_owned()), ..Filter::default() };
        let summary = process.handle.redrive(&said).await.unwrap();
        assert_eq!((summary.letters.sent, summary.new), (3, 3), "{what}");
        flip(&process, 3, &[tag("a"), tag("b"), passing("c")]).await;
        assert_eq!(redrive(&process).await.sent, 3, "{what}");
        let rows: Vec<_> = published(1, 3).iter().map(|row| format!("b a b a {row}")).collect();
        assert_eq!(sorted(world.payloads("w")), sorted(rows), "{what}");
        process.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_person_who_says_where_letters_enter_sends_none_that_a_sink_rejected() {
    let world = World::new(1, &[("default", "w")]);
    world.database("w").refuse(|message| text(message).ends_with('1').then(|| "no column".to_owned()));
    let check = step("check", |message, _| match text(message).ends_with('2') {
        true => Act::Refuse("no".to_owned()),
        false => Act::Pass,
    });
    let process = world.start(chain(1, &[check])).await;
    world.publish_many(1, 0, 3);
    process.drained().await;
    world.database("w").refuse(|_| None);
    flip(&process, 2, &[tag("check")]).await;
    let said = Filter { from_step: Some("check".to_owned()), ..Filter::default() };
    assert_eq!(process.handle.redrive(&said).await.unwrap().sent, 1);
    assert_eq!(redrive(&process).await.sent, 1);
    assert_eq!(sorted(world.payloads("w")), ["check d0:2", "d0:0", "d0:1"]);
    process.stop().await;
}

/// Hosts of earlier versions took it; now it stands for the routes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_step_that_has_the_name_of_the_routes_takes_no_message_from_them() {
    let world = World::new(1, &[("default", "w")]);
    let n = Arc::new(AtomicUsize::new(0));
    let named = step("routes", move |_, _| match n.fetch_add(1, Ordering::Relaxed) % 2 {
        0 => Act::Refuse("no".to_owned()),
        _ => Act::Pass,
    });
    let process = with_letters(&world, &[step("split", |_, _| Act::Times(2)), named]).await;
    assert_eq!(sorted(world.payloads("w")), published(1, 3), "the second of each");
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_person_who_means_a_step_by_the_name_of_the_routes_leaves_no_step_out_behind_it() {
    for (now, enters_at) in [("routes", "routes"), ("gate", "gate")] {
        let world = World::new(1, &[("default", "w")]);
        let process = with_letters(&world, &[passing("a"), refusing("routes"), tag("redact")]).await;
        flip(&process, 2, &[passing("b"), passing(now), tag("redact")]).await;
        assert_eq!(redrive(&process).await.letters.refused, 3, "it fits nowhere by itself");
        let said = |step: &str| Filter { from_step: Some(step.to_owned()), ..Filter::default() };
        if now != "routes" {
            let summary = process.handle.redrive(&said("routes")).await.unwrap();
            assert_eq!((summary.sent, summary.letters.refused), (0, 3));
            let told = told(&world).await;
            assert!(told.iter().all(|(why, _)| why.contains("a step named routes")), "{told:?}");
        }
        assert_eq!(process.handle.redrive(&said(enters_at)).await.unwrap().sent, 3);
        assert_eq!(sorted(world.payloads("w")), ["redact d0:0", "redact d0:1", "redact d0:2"]);
        process.stop().await;
    }
}

/// What it had been through stays with it, also where another step rejects it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_that_another_step_rejects_goes_on_from_there() {
    let world = World::new(1, &[("default", "w")]);
    let process = with_letters(&world, &[tag("a"), refusing("check"), tag("b")]).await;
    flip(&process, 2, &[tag("a"), tag("b"), refusing("late")]).await;
    let summary = redrive(&process).await;
    assert_eq!((summary.letters.sent, summary.new), (3, 3));
    // None of `a` and `b` a second time, whatever became of `late`.
    flip(&process, 3, &[tag("a"), tag("b"), tag("last")]).await;
    assert_eq!(redrive(&process).await.sent, 3);
    let rows: Vec<_> = published(1, 3).iter().map(|row| format!("last b a {row}")).collect();
    assert_eq!(sorted(world.payloads("w")), sorted(rows));
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_with_a_wrong_route_run_the_step_again_that_gave_it() {
    let world = World::new(1, &[("default", "w"), ("alert", "alerts")]);
    let wrong = step("route", |_, _| Act::Route("alrt"));
    let process = with_letters(&world, &[tag("a"), wrong, tag("b")]).await;
    let (payload, reason) = &world.letters().await[0];
    assert_eq!(payload, "a d0:0", "as the step saw it");
    assert!(
        reason.contains("\"alrt\" is not one of") && reason.ends_with("step \"route\" gave it"),
        "{reason}"
    );
    assert_eq!(redrive(&process).await.letters, Ended { refused: 3, ..Ended::default() }, "wrong as before");
    assert_eq!(told(&world).await[0], (reason.clone(), 1));
    flip(&process, 2, &[tag("a"), step("route", |_, _| Act::Route("alert")), tag("b")]).await;
    assert_eq!(redrive(&process).await.sent, 3);
    assert_eq!(sorted(world.payloads("alerts")), ["b a d0:0", "b a d0:1", "b a d0:2"]);
    assert!(world.payloads("w").is_empty());
    process.stop().await;
}

/// After a crash a letter has a part of the one message; the other one gets its wrong route only then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_with_a_wrong_route_is_told_apart_from_one_beside_it_that_is_rejected_in_part() {
    let world = World::new(1, &[("default", "w")]);
    let split = step("split", |message, _| match text(message).ends_with('0') {
        true => Act::Times(2),
        false => Act::Pass,
    });
    let n = Arc::new(AtomicUsize::new(0));
    let check = step("check", move |message, _| {
        match text(message).ends_with('0') && n.fetch_add(1, Ordering::Relaxed) == 0 {
            true => Act::Refuse("no".to_owned()),
            false => Act::Pass,
        }
    });
    let is_broken = Arc::new(AtomicBool::new(false));
    let breaks = Arc::clone(&is_broken);
    let route = step("route", move |message, _| {
        match text(message).ends_with('1') && breaks.load(Ordering::Acquire) {
            true => Act::Route("alrt"),
            false => Act::Pass,
        }
    });
    let steps = chain(1, &[split, check, route]);
    let process = world.start(steps.clone()).await;
    process.drained().await;
    world.database("w").block();
    world.publish(&[("d0", 0), ("d0", 1)]);
    process.until("rejected", |_| world.dead.bounds().end > Offset(0)).await;
    process.handle.crash();
    process.handle.join().await;
    world.database("w").unblock();
    assert_eq!(world.letters().await.len(), 1);
    is_broken.store(true, Ordering::Release);
    let process = world.start(steps).await;
    process.drained().await;
    let letters = world.letters().await;
    assert!(letters.len() == 2 && letters[1].1.ends_with("step \"route\" gave it"), "{letters:?}");
    is_broken.store(false, Ordering::Release);
    assert_eq!(redrive(&process).await.letters.sent, 2);
    assert_eq!(sorted(world.payloads("w")), ["d0:0", "d0:0", "d0:1"]);
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_route_of_one_of_several_messages_makes_none_of_the_others_a_second_time() {
    let world = World::new(1, &[("default", "w")]);
    let split = step("split", |_, _| Act::Times(2));
    let seen = Arc::new(AtomicUsize::new(0));
    let n = Arc::clone(&seen);
    let wrong = step("route", move |_, _| match n.fetch_add(1, Ordering::Relaxed) % 2 {
        0 => Act::Route("alrt"),
        _ => Act::Pass,
    });
    let process = with_letters(&world, &[split, wrong]).await;
    assert_eq!(world.payloads("w").len(), 3);
    flip(&process, 2, &[step("split", |_, _| Act::Times(2)), passing("route")]).await;
    assert_eq!(redrive(&process).await.letters.refused, 3);
    assert!(world.payloads("w") == published(1, 3) && told(&world).await[0].0.contains("\"alrt\""));
    process.stop().await;
}

/// Who mends one thing learns of the next.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_newest_reason_of_a_letter_is_kept_with_the_number_of_tries_over_a_restart() {
    let world = World::new(1, &[("default", "w other")]);
    world.database("w").refuse(|message| Some(format!("no column, {}", text(message))));
    let reasons = |world: &World| {
        let world = world.clone();
        async move { told(&world).await }
    };
    let process = world.start(chain(1, &[])).await;
    world.publish_many(1, 0, 2);
    process.drained().await;
    let first = [("no column, d0:0".to_owned(), 0), ("no column, d0:1".to_owned(), 0)];
    assert_eq!(reasons(&world).await, first);
    redrive(&process).await;
    assert_eq!(reasons(&world).await, first.clone().map(|(reason, _)| (reason, 1)));
    world.database("w").refuse(|message| {
        Some(if text(message).ends_with('1') { "too long".to_owned() } else { "not null".to_owned() })
    });
    redrive(&process).await;
    process.stop().await;
    let process = world.start(chain(1, &[])).await;
    process.until("steps", |status| status.chain.is_some()).await;
    let second = [("not null".to_owned(), 2), ("too long".to_owned(), 2)];
    assert_eq!(reasons(&world).await, second);
    // Taken, and not come to: still told.
    world.database("w").set_down(Some("connection refused"));
    assert_eq!(redrive(&process).await.letters.pending, 2);
    let marks = Marks::read(&world.dead.state(MARK_PREFIX));
    assert_eq!(marks.reasons().text(marks.get(0).unwrap().tries()), Some("not null"));
    world.database("w").set_down(None);
    world.database("w").refuse(|_| None);
    assert_eq!(redrive(&process).await.sent, 2);
    redrive(&process).await;
    let marks = Marks::read(&world.dead.state(MARK_PREFIX));
    assert_eq!(marks.reasons().len(), 0, "what no letter has is not kept");
    process.stop().await;
}

/// A device that puts what it sent into each reason must not fill the state.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn passes_that_go_on_together_keep_no_more_reasons_than_one() {
    let world = World::new(1, &[("default", "w")]);
    let count = 3 * REASONS_MAX as u64;
    world.database("w").refuse(|_| Some("no column".to_owned()));
    let process = world.start(chain(1, &[])).await;
    world.publish_many(1, 0, count);
    process.drained().await;
    world.database("w").set_down(Some("away"));
    for pass in 0..3 {
        let ids = (0..count).filter(|id| id % 3 == pass).map(Offset).collect();
        let some = Filter { ids: Some(ids), ..Filter::default() };
        process.handle.redrive(&some).await.unwrap();
    }
    let new = Arc::new(AtomicUsize::new(0));
    let reason =
        move |_: &crate::batch::MessageRef<'_>| Some("x".repeat(1 + new.fetch_add(1, Ordering::Relaxed)));
    world.database("w").refuse(reason);
    world.database("w").set_down(None);
    let summary = redrive(&process).await;
    assert_eq!(summary.letters.pending, 0);
    let marks = Marks::read(&world.dead.state(MARK_PREFIX));
    assert!((0..count).all(|letter| marks.get(letter).unwrap().tries().count > 0));
    assert_eq!(marks.reasons().len(), REASONS_MAX);
    process.stop().await;
}

/// The process ends between the rejection and the sink's position past it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redrive_that_goes_on_after_a_kill_counts_a_try_once_and_enters_where_it_was_told_to() {
    let world = World::new(1, &[("default", "w")]);
    let process = with_letters(&world, &[tag("a"), refusing("check")]).await;
    let later = |mended: &Arc<AtomicBool>| {
        let mended = Arc::clone(mended);
        step("late", move |message, _| {
            match !mended.load(Ordering::Acquire) && text(message).ends_with('1') {
                true => Act::Refuse("no".to_owned()),
                false => Act::Payload(format!("late {}", text(message))),
            }
        })
    };
    let steps = |mended: &Arc<AtomicBool>| chain(2, &[tag("front"), tag("a"), tag("check"), later(mended)]);
    let mended = Arc::new(AtomicBool::new(false));
    process.chain.send_replace(steps(&mended));
    process.until("flipped", |status| status.chain == Some(2)).await;
    redrive(&process).await;
    assert_eq!(told(&world).await.iter().map(|(_, n)| *n).collect::<Vec<_>>(), [1, 1, 1]);
    world.database("w").fail_commits([Fault::Passes, Fault::UnknownLost]);
    let said = Filter { from_step: Some("check".to_owned()), ..Filter::default() };
    let summary = process.handle.redrive(&said).await.unwrap();
    assert_eq!((summary.sent, summary.letters.pending, summary.new), (0, 3, 1));
    process.handle.crash();
    process.handle.join().await;
    let process = world.start(steps(&mended)).await;
    process.until("resumed", |_| !is_pending(&*world.dead, &["p".to_owned()])).await;
    assert_eq!(sorted(world.payloads("w")), ["late check a d0:0", "late check a d0:2"]);
    assert_eq!(world.letters().await.len(), 4, "one that `late` rejected");
    mended.store(true, Ordering::Release);
    // It has not been through `front`.
    assert_eq!(redrive(&process).await.letters.refused, 1);
    let said = Filter { from_step: Some("late".to_owned()), ..Filter::default() };
    assert_eq!(process.handle.redrive(&said).await.unwrap().sent, 1);
    assert_eq!(sorted(world.payloads("w")), ["late check a d0:0", "late check a d0:1", "late check a d0:2"]);
    process.stop().await;
}

/// A redrive that was interrupted goes on with other steps than it began with.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_step_rejected_that_was_removed_in_the_middle_of_a_redrive_is_not_written_beside_its_letter() {
    let world = World::new(1, &[("default", "w")]);
    let split = || step("split", |_, _| Act::Times(2));
    let n = Arc::new(AtomicUsize::new(0));
    let check = step("check", move |_, _| match n.fetch_add(1, Ordering::Relaxed) % 2 {
        0 => Act::Refuse("no".to_owned()),
        _ => Act::Pass,
    });
    let process = with_letters(&world, &[refusing("first")]).await;
    flip(&process, 2, &[passing("first"), split(), check]).await;
    world.database("w").fail_commits([Fault::Passes, Fault::Retry("down".to_owned())]);
    let summary = redrive(&process).await;
    assert_eq!((summary.letters.pending, summary.new), (3, 3));
    flip(&process, 3, &[passing("first"), split()]).await;
    let summary = redrive(&process).await;
    assert_eq!((summary.sent, summary.letters.sent, summary.letters.possible_duplicates), (3, 3, 3));
    assert_eq!(sorted(world.payloads("w")), published(1, 3), "those of the new letters");
    let repeat = Filter { possible_duplicates: true, ..Filter::default() };
    assert_eq!(process.handle.redrive(&repeat).await.unwrap().sent, 6, "as it was asked to");
    process.stop().await;
}

/// However many messages are made of one, and whichever of them a step rejected.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redrive_that_goes_on_with_the_same_steps_doubts_nothing() {
    let world = World::new(1, &[("default", "w")]);
    const COUNT: usize = 1_100;
    let n = Arc::new(AtomicUsize::new(0));
    let check = step("check", move |_, _| match n.fetch_add(1, Ordering::Relaxed) {
        n if n < 3 * COUNT && n % COUNT == COUNT - 1 => Act::Refuse("no".to_owned()),
        _ => Act::Pass,
    });
    let process = with_letters(&world, &[refusing("first")]).await;
    flip(&process, 2, &[passing("first"), step("split", |_, _| Act::Times(COUNT)), check]).await;
    world.database("w").fail_commits([Fault::Passes, Fault::Retry("down".to_owned())]);
    assert_eq!(redrive(&process).await.letters.pending, 3);
    let first = Filter { ids: Some((0..3).map(Offset).collect()), ..Filter::default() };
    let summary = process.handle.redrive(&first).await.unwrap();
    assert_eq!((summary.letters.sent, summary.letters.possible_duplicates), (3, 0));
    process.stop().await;
}

/// The run that passed them over remembered it in memory only, and another sink had them still to come.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn possible_duplicates_of_one_sink_are_told_whichever_run_ends_their_redrive() {
    for is_restarted in [false, true] {
        let world = World::new(1, &[("default", "w z")]);
        let split = || step("split", |_, _| Act::Times(2));
        let n = Arc::new(AtomicUsize::new(0));
        let check = step("check", move |_, _| match n.fetch_add(1, Ordering::Relaxed) % 2 {
            0 => Act::Refuse("no".to_owned()),
            _ => Act::Pass,
        });
        let process = with_letters(&world, &[refusing("first")]).await;
        flip(&process, 2, &[passing("first"), split(), check]).await;
        world.database("z").set_down(Some("away"));
        world.database("w").fail_commits([Fault::Passes, Fault::Retry("down".to_owned())]);
        assert_eq!(redrive(&process).await.letters.pending, 3);
        let steps = [passing("first"), split()];
        flip(&process, 3, &steps).await;
        let summary = redrive(&process).await;
        assert_eq!((summary.letters.pending, summary.letters.possible_duplicates), (3, 0));
        let process = if is_restarted {
            process.handle.crash();
            process.handle.join().await;
            world.database("z").set_down(None);
            world.start(chain(1, &steps)).await
        } else {
            world.database("z").set_down(None);
            redrive(&process).await;
            process
        };
        process.until("ended", |_| !is_pending(&*world.dead, &["p".to_owned()])).await;
        assert_eq!(sorted(world.payloads("z")), sorted([published(1, 3), published(1, 3)].concat()));
        assert_eq!(sorted(world.payloads("w")), published(1, 3), "those of the new letters");
        let marks = Marks::read(&world.dead.state(MARK_PREFIX));
        for letter in 0..3 {
            let mark = marks.get(letter);
            let is_told = |sinks: &BTreeSet<String>| sinks.len() == 1 && sinks.contains("w");
            assert!(
                matches!(mark, Some(Mark::Open { sinks, why: Reopened::PossibleDuplicate, .. }) if is_told(sinks)),
                "{mark:?}"
            );
        }
        process.stop().await;
    }
}

/// Versions before noted no steps: only where no step can be left out is it sent unasked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_without_a_note_of_its_steps_is_sent_from_the_first_step_or_where_a_person_says() {
    let cases: [(&str, Chain, u64); 3] = [
        ("it is the first", chain(2, &[passing("check"), tag("b")]), 3),
        ("there may be more before it", chain(2, &[tag("redact"), passing("check")]), 0),
        ("it is no more", chain(2, &[tag("b")]), 0),
    ];
    for (what, now, sent) in cases {
        let world = World::new(1, &[("default", "w")]);
        let process = with_letters(&world, &[refusing("check")]).await;
        process.stop().await;
        let old = World { dead: without_notes(&world).await, ..world.clone() };
        let process = old.start(now).await;
        process.until("steps", |status| status.chain.is_some()).await;
        let summary = redrive(&process).await;
        assert_eq!((summary.sent, summary.letters.refused), (sent, 3 - sent), "{what}");
        let told = told(&old).await;
        let is_told =
            |why: &str| why.contains("an earlier version wrote it, or") && why.contains("4096 bytes");
        assert!(told.iter().all(|(why, _)| is_told(why)), "{what}: {told:?}");
        let said = Filter { from_step: Some("routes".to_owned()), ..Filter::default() };
        assert_eq!(process.handle.redrive(&said).await.unwrap().sent, 3 - sent, "{what}");
        process.stop().await;
    }
}

/// It has been through what is in front of the step that a person named.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_without_a_note_that_another_step_rejects_meets_no_step_in_front_of_its_entry() {
    let cases: [(&str, Steps); 2] = [
        ("the one that it enters at rejects it", vec![tag("a"), refusing("check"), tag("late")]),
        ("a later one rejects it", vec![tag("a"), tag("check"), refusing("late")]),
    ];
    for (what, now) in cases {
        let world = World::new(1, &[("default", "w")]);
        let process = with_letters(&world, &[tag("a"), refusing("first")]).await;
        process.stop().await;
        let old = World { dead: without_notes(&world).await, ..world.clone() };
        let process = old.start(chain(2, &now)).await;
        process.until("steps", |status| status.chain.is_some()).await;
        let said = Filter { from_step: Some("check".to_owned()), ..Filter::default() };
        let summary = process.handle.redrive(&said).await.unwrap();
        assert_eq!((summary.letters.sent, summary.new), (3, 3), "{what}");
        flip(&process, 3, &[tag("a"), tag("check"), tag("late")]).await;
        assert_eq!(redrive(&process).await.sent, 3, "{what}");
        let rows: Vec<_> = published(1, 3).iter().map(|row| format!("late check a {row}")).collect();
        assert_eq!(sorted(world.payloads("w")), sorted(rows), "{what}");
        process.stop().await;
    }
}

/// The same dead letters as a version before wrote them.
async fn without_notes(world: &World) -> Arc<dyn crate::stream::Stream> {
    let other: Arc<dyn crate::stream::Stream> =
        crate::stream::memory::MemoryStream::with_hooks("dead-letters", 2);
    let mut cursor = world.dead.cursor(Offset(0));
    while let Some(read) = cursor.try_next().await.unwrap() {
        let Read::Batch(batch) = read else { continue };
        for message in batch.messages() {
            let mut kept = Vec::new();
            for property in properties::iter(message.properties()) {
                if property.name != "dead-letter-steps" {
                    properties::push(&mut kept, Origin::of(property.origin), property.name, property.value);
                }
            }
            let new = NewMessage {
                topic: message.topic(),
                payload: message.payload(),
                properties: &kept,
                route: message.route(),
                device: message.device(),
                partition: message.entry.partition,
                flags: message.entry.flags,
                received_us: message.entry.received_us,
                event_us: message.entry.event_us,
            };
            other.append(&[new], &[]).unwrap();
        }
    }
    other
}
