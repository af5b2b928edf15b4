use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::harness::{Act, World, broken_step, chain, step, text};
use crate::batch::Offset;
use crate::pipeline::State;
use crate::units::Period;

fn tag(tag: &'static str) -> Arc<dyn crate::step::StepFactory> {
    step("tag", move |message, _| Act::Payload(format!("{tag} {}", text(message))))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_steps_take_over_at_one_offset_for_all_partitions() {
    let world = World::new(8, &[("default", "w")]);
    let process = world.start(chain(1, &[tag("old")])).await;
    for round in 0..40 {
        world.publish_many(20, round * 50, 50);
        if round == 20 {
            process.chain.send_replace(chain(2, &[tag("new")]));
            process.until("flipped", |status| status.chain == Some(2)).await;
        }
    }
    process.drained().await;
    let mut rows = world.database("w").rows();
    rows.sort_by_key(|row| row.offset);
    assert_eq!(rows.len(), 2_000);
    let first_new = rows.iter().position(|row| row.payload.starts_with(b"new")).unwrap();
    assert!(rows[..first_new].iter().all(|row| row.payload.starts_with(b"old")));
    assert!(rows[first_new..].iter().all(|row| row.payload.starts_with(b"new")));
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn steps_that_cannot_start_in_one_worker_replace_none() {
    let world = World::new(4, &[("default", "w")]);
    let process = world.start(chain(1, &[tag("old")])).await;
    process.until("running", |status| status.state == State::Running).await;
    process.chain.send_replace(chain(2, &[broken_step("tag", |worker| worker == 1)]));
    let status = process.until("refused", |status| status.swap_refused.is_some()).await;
    assert!(status.swap_refused.unwrap().contains("no such table"));
    assert_eq!(status.chain, Some(1));
    world.publish_many(9, 0, 100);
    process.drained().await;
    assert!(world.payloads("w").iter().all(|payload| payload.starts_with("old")));
    process.chain.send_replace(chain(3, &[tag("new")]));
    process.until("flipped", |status| status.chain == Some(3) && status.swap_refused.is_none()).await;
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn steps_that_could_not_start_are_tried_again() {
    let world = World::new(2, &[("default", "w")]);
    let process = world.start(chain(1, &[tag("old")])).await;
    process.until("running", |status| status.state == State::Running).await;
    let failures = AtomicU32::new(3);
    let fails = move |_| {
        failures.fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| left.checked_sub(1)).is_ok()
    };
    process.chain.send_replace(chain(2, &[broken_step("tag", fails)]));
    process.until("flipped", |status| status.chain == Some(2) && status.swap_refused.is_none()).await;
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn steps_that_take_long_to_start_hold_up_neither_the_pipeline_nor_its_end() {
    let mut world = World::new(2, &[("default", "w")]);
    world.config.drain_max = Period(std::time::Duration::from_secs(3_600));
    let process = world.start(chain(1, &[tag("old")])).await;
    process.until("running", |status| status.state == State::Running).await;
    let (gate, closed) = std::sync::mpsc::channel::<()>();
    let closed = std::sync::Mutex::new(closed);
    let begun = tokio::sync::watch::Sender::new(false);
    let begins = begun.clone();
    let starts = move |_| {
        begins.send_replace(true);
        // Until the test lets it go.
        let _ = closed.lock().unwrap().recv();
        false
    };
    process.chain.send_replace(chain(2, &[broken_step("tag", starts)]));
    begun.subscribe().wait_for(|begun| *begun).await.unwrap();
    world.publish_many(3, 0, 50);
    let mut looks = 0;
    let is_at_work = |_: &crate::pipeline::PipelineStatus| {
        looks += 1;
        looks > 3
    };
    process.until("the supervisor is at work", is_at_work).await;
    process.drained().await;
    assert!(world.payloads("w").iter().all(|payload| payload.starts_with("old")));
    let ended = tokio::time::timeout(std::time::Duration::from_secs(60), process.stop()).await;
    ended.expect("a pipeline ends while new steps of it start");
    drop(gate);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_read_before_the_first_steps_are_there() {
    let world = World::new(2, &[("default", "w")]);
    world.publish_many(5, 0, 50);
    let process = world.start(chain(0, &[])).await;
    process.until("starting", |status| status.state == State::Starting).await;
    process.chain.send_replace(chain(1, &[tag("new")]));
    process.drained().await;
    assert!(world.payloads("w").iter().all(|payload| payload.starts_with("new")));
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn why_a_reader_could_not_start_is_shown_until_it_does() {
    let world = World::new(2, &[("default", "w")]);
    world.publish_many(3, 0, 50);
    // With the first instance of each worker the steps are taken; none is left for a reader.
    let left = Arc::new(AtomicU32::new(2));
    let of_step = Arc::clone(&left);
    let none_left = move |_| {
        of_step.fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| left.checked_sub(1)).is_err()
    };
    let process = world.start(chain(1, &[broken_step("tag", none_left)])).await;
    let status = process.until("tried", |status| matches!(status.state, State::Retrying(_))).await;
    assert!(format!("{:?}", status.state).contains("no such table"), "{:?}", status.state);
    left.store(1_000, Ordering::Release);
    process.drained().await;
    let status = process.handle.status();
    assert_eq!((status.state, status.swap_refused), (State::Running, None));
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_held_chain_reads_nothing_until_it_is_let_go() {
    let world = World::new(2, &[("default", "w")]);
    let mut held = chain(1, &[tag("old")]);
    held.hold = Some("10-redact.wasm was removed".into());
    let process = world.start(held.clone()).await;
    world.publish_many(3, 0, 50);
    let status = process.until("holding", |status| matches!(status.state, State::Holding(_))).await;
    assert!(!status.is_ready());
    assert!(world.payloads("w").is_empty());
    held.hold = None;
    process.chain.send_replace(held);
    process.drained().await;
    assert_eq!(world.payloads("w").len(), 50);
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pipeline_whose_first_steps_cannot_start_begins_with_the_next() {
    let world = World::new(2, &[("default", "w")]);
    world.publish_many(3, 0, 50);
    let process = world.start(chain(1, &[broken_step("tag", |worker| worker == 0)])).await;
    process.until("holding", |status| matches!(status.state, State::Holding(_))).await;
    process.chain.send_replace(chain(2, &[tag("new")]));
    process.drained().await;
    assert_eq!(world.payloads("w").len(), 50);
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_step_that_is_held_refuses_nothing_and_gives_way_to_a_new_version() {
    for hold_is_seen in [true, false] {
        let world = World::new(2, &[("default", "w other")]);
        let asked = tokio::sync::watch::Sender::new(0_u32);
        let asks = asked.clone();
        let holding = step("tag", move |message, _| match text(message).ends_with('7') {
            true => {
                asks.send_modify(|asked| *asked += 1);
                Act::Hold("faulted")
            }
            false => Act::Pass,
        });
        let mut held = chain(1, &[holding]);
        let process = world.start(held.clone()).await;
        // More frames than wait for a worker: the new steps lie behind them.
        world.publish_many(3, 0, 500);
        // Else the hold could come before any message does.
        asked.subscribe().wait_for(|asked| *asked > 0).await.unwrap();
        if hold_is_seen {
            (held.generation, held.hold) = (2, Some("faulted".into()));
            process.chain.send_replace(held);
            process.until("holding", |status| matches!(status.state, State::Holding(_))).await;
        }
        // Both workers ask, one of them past every bound of retries.
        let bound = 2 * (world.config.retries.max + 1);
        asked.subscribe().wait_for(|asked| *asked > bound).await.unwrap();
        assert!(world.letters().await.is_empty() && world.payloads("w").len() < 500);
        process.chain.send_replace(chain(3, &[tag("new")]));
        process.drained().await;
        assert!(world.letters().await.is_empty());
        for sink in ["w", "other"] {
            assert_eq!(world.payloads(sink).len(), 500);
        }
        process.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pipeline_ends_while_its_step_is_held() {
    let mut world = World::new(2, &[("default", "w")]);
    // It ends because it is told to, not because the patience of a shutdown is over.
    world.config.drain_max = Period(std::time::Duration::from_secs(3_600));
    let process = world.start(chain(1, &[step("tag", |_, _| Act::Hold("faulted"))])).await;
    world.publish_many(3, 0, 50);
    process.until("messages at the step", |status| status.read > Offset(0)).await;
    let ended = tokio::time::timeout(std::time::Duration::from_secs(60), process.stop()).await;
    ended.expect("a held step ends with its pipeline");
    let process = world.start(chain(1, &[tag("new")])).await;
    process.drained().await;
    assert_eq!(world.payloads("w").len(), 50);
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pipeline_says_why_a_step_holds_until_it_goes_on_by_itself() {
    let world = World::new(2, &[("default", "w")]);
    let holds = Arc::new(AtomicBool::new(true));
    let of_step = Arc::clone(&holds);
    let step = step("tag", move |_, _| match of_step.load(Ordering::Acquire) {
        true => Act::Hold("no instance"),
        false => Act::Pass,
    });
    let process = world.start(chain(1, &[step])).await;
    world.publish_many(3, 0, 50);
    let told = |state: &State| matches!(state, State::Holding(why) if why == "no instance");
    process.until("holding", |status| told(&status.state)).await;
    holds.store(false, Ordering::Release);
    process.until("running", |status| status.state == State::Running).await;
    process.drained().await;
    process.stop().await;
}
