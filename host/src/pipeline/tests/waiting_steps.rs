//! New steps wait while a sink that lags needs as many versions as are kept: through restarts, holds,
//! and whatever the folder has by then.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use super::harness::{Act, Process, World, chain, number, recall, step, text};
use super::versions::{DEVICES, all_read, assert_each_in_one_sink, route, swapped, world};
use crate::pipeline::State;
use crate::problems::Problem;
use crate::sinks::memory::MemoryDatabase;
use crate::step::{Chain, RecallError, Step, StepFactory, StepId, VERSIONS_MAX};

/// The generation of the newest version that is kept.
const NEWEST: u64 = VERSIONS_MAX as u64;
/// Messages of each version, and of all.
const EACH: u64 = 20;
const ALL: u64 = 100 + NEWEST * EACH;

/// The sink to the right is away and needs all versions, the newest of which is `newest`.
async fn full(world: &World, newest: Arc<dyn StepFactory>) -> Process {
    let process = world.start(chain(1, &[route(0)])).await;
    world.publish_many(DEVICES, 0, 100);
    process.drained().await;
    world.database("right").block();
    for generation in 1..=NEWEST {
        if generation > 1 {
            let steps = if generation == NEWEST { Arc::clone(&newest) } else { route(generation) };
            // A version that has run nothing is not kept beside the one that takes its place.
            swapped(&process, generation, &[steps]).await;
        }
        world.publish_many(DEVICES, 100 + (generation - 1) * EACH, EACH);
        all_read(&process).await;
    }
    process
}

async fn crashed(process: Process) {
    process.handle.crash();
    process.handle.join().await;
}

async fn waits(process: &Process) {
    let status = process.until("waits", |status| status.swap_waits.is_some()).await;
    assert!(status.swap_waits.unwrap().contains("sink \"right\""));
    process.until("at work", |status| status.state == State::Running).await;
}

/// The sink is back: the steps that wait begin, and nothing is lost.
async fn begins(world: &World, process: Process, generation: u64, count: u64) {
    world.database("right").unblock();
    let has_begun =
        |s: &crate::pipeline::PipelineStatus| s.chain == Some(generation) && s.swap_waits.is_none();
    process.until("begun", has_begun).await;
    world.publish_many(DEVICES, count, EACH);
    process.drained().await;
    assert_each_in_one_sink(world, count + EACH);
    assert!(world.failures.standing().is_empty() && world.letters().await.is_empty());
    process.stop().await;
}

/// A step made again from its recipe, as another process makes it.
struct MadeAgain(Arc<dyn StepFactory>, Arc<Mutex<BTreeSet<String>>>);

impl StepFactory for MadeAgain {
    fn id(&self) -> &StepId {
        self.0.id()
    }

    fn describe(&self) -> String {
        self.0.describe()
    }

    fn instantiate(&self, worker: u32) -> Result<Box<dyn Step>, Vec<Problem>> {
        self.0.instantiate(worker)
    }

    fn recipe(&self) -> String {
        self.0.recipe()
    }

    fn let_go(&self) {
        self.1.lock().unwrap().insert(self.recipe());
    }
}

/// Lets steps be made again as other ones; returns the recipes of those that were let go.
fn make_again(world: &mut World) -> Arc<Mutex<BTreeSet<String>>> {
    let let_go: Arc<Mutex<BTreeSet<String>>> = Arc::default();
    let of_steps = Arc::clone(&let_go);
    world.recall = Some(Arc::new(move |recipe| {
        Ok(Arc::new(MadeAgain(recall(recipe)?, Arc::clone(&of_steps))) as Arc<dyn StepFactory>)
    }));
    let_go
}

/// Recipes of that kind are gone.
fn lose(world: &mut World, is_gone: impl Fn(&str) -> bool + Send + Sync + 'static) {
    world.recall = Some(Arc::new(move |recipe| match is_gone(recipe) {
        true => Err(RecallError::Gone(format!("step {recipe} is gone"))),
        false => recall(recipe),
    }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_waits_once_a_sink_needs_every_version_that_is_kept() {
    let world = world();
    let process = full(&world, route(NEWEST)).await;
    process.chain.send_replace(chain(NEWEST + 1, &[route(NEWEST + 1)]));
    waits(&process).await;
    assert_eq!(process.handle.status().chain, Some(NEWEST));
    world.publish_many(DEVICES, ALL, EACH);
    begins(&world, process, NEWEST + 1, ALL + EACH).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_waits_on_after_each_restart_and_the_newest_version_runs_meanwhile() {
    let mut world = world();
    let newest = route(NEWEST);
    let mut process = full(&world, Arc::clone(&newest)).await;
    let let_go = make_again(&mut world);
    let mut count = ALL;
    // It waited before, is another one by then, or comes with the restart.
    for restart in 1..=3 {
        if restart < 3 {
            process.chain.send_replace(chain(NEWEST + restart, &[route(NEWEST + restart)]));
            waits(&process).await;
        }
        crashed(process).await;
        process = world.start(chain(1, &[route(NEWEST + restart)])).await;
        waits(&process).await;
        world.publish_many(DEVICES, count, EACH);
        count += EACH;
        all_read(&process).await;
    }
    begins(&world, process, 1, count).await;
    let let_go = let_go.lock().unwrap();
    assert_eq!((let_go.len(), let_go.contains(&newest.recipe())), (VERSIONS_MAX - 1, false));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_does_not_wait_after_a_restart_once_the_sink_has_what_the_oldest_version_ran() {
    let world = world();
    let process = full(&world, route(NEWEST)).await;
    process.chain.send_replace(chain(NEWEST + 1, &[route(NEWEST + 1)]));
    waits(&process).await;
    crashed(process).await;
    world.database("right").unblock();
    let process = world.start(chain(1, &[route(NEWEST + 1)])).await;
    begins(&world, process, 1, ALL).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn steps_that_are_the_newest_ones_again_wait_for_nothing() {
    for is_at_start in [true, false] {
        let mut world = world();
        let newest = route(NEWEST);
        let process = full(&world, Arc::clone(&newest)).await;
        make_again(&mut world);
        crashed(process).await;
        let process = if is_at_start {
            world.start(chain(1, &[newest])).await
        } else {
            let process = world.start(chain(1, &[route(NEWEST + 1)])).await;
            waits(&process).await;
            process.chain.send_replace(chain(2, &[newest]));
            process
        };
        process.until("runs", |s| s.state == State::Running && s.swap_waits.is_none()).await;
        world.publish_many(DEVICES, ALL, EACH);
        all_read(&process).await;
        begins(&world, process, if is_at_start { 1 } else { 2 }, ALL + EACH).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pipeline_that_held_goes_on_with_the_newest_version_while_other_steps_wait() {
    for is_restarted in [false, true] {
        let world = world();
        let newest = route(NEWEST);
        let process = full(&world, Arc::clone(&newest)).await;
        let generation = if is_restarted { 1 } else { NEWEST + 1 };
        let removed = Chain { hold: Some("10-redact.wasm was removed".into()), ..chain(generation, &[]) };
        let process = if is_restarted {
            crashed(process).await;
            world.start(removed).await
        } else {
            process.chain.send_replace(removed);
            process
        };
        process.until("holds", |status| matches!(status.state, State::Holding(_))).await;
        process.chain.send_replace(chain(generation + 1, &[route(NEWEST + 1)]));
        waits(&process).await;
        world.publish_many(DEVICES, ALL, EACH);
        all_read(&process).await;
        begins(&world, process, generation + 1, ALL + EACH).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_held_step_waits_at_waits_on_for_its_new_version_while_that_waits_for_a_sink() {
    for is_restarted in [false, true] {
        let mut world = world();
        make_again(&mut world);
        let asked = tokio::sync::watch::Sender::new(0);
        let (asks, mut asked) = (asked.clone(), asked.subscribe());
        let holding = step("route", move |message, _| match number(&text(message)) {
            n if n == ALL - EACH / 2 => {
                asks.send_modify(|asked| *asked += 1);
                Act::Hold("faulted")
            }
            n if n.is_multiple_of(2) => Act::Pass,
            _ => Act::Route("other"),
        });
        let process = full(&world, holding).await;
        asked.wait_for(|asked| *asked > 0).await.unwrap();
        let holds = |value: &[u8]| String::from_utf8_lossy(value).contains("\"holds\":true");
        let is_recorded = || world.dead.state(b"steps/").iter().any(|(_, value)| holds(value));
        process.until("recorded", |_| is_recorded()).await;
        let process = if is_restarted {
            crashed(process).await;
            asked.mark_unchanged();
            world.start(chain(1, &[route(NEWEST + 1)])).await
        } else {
            process.chain.send_replace(chain(NEWEST + 1, &[route(NEWEST + 1)]));
            process
        };
        let is_told = |status: &crate::pipeline::PipelineStatus| {
            status.swap_waits.is_some() && matches!(status.state, State::Holding(_))
        };
        process.until("holds and waits", is_told).await;
        begins(&world, process, if is_restarted { 1 } else { NEWEST + 1 }, ALL).await;
        assert!(!is_restarted || !asked.has_changed().unwrap_or_default(), "the old version ran it again");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn steps_wait_no_longer_where_a_version_is_gone() {
    for is_newest in [true, false] {
        let mut world = world();
        let newest = route(NEWEST);
        let process = full(&world, Arc::clone(&newest)).await;
        crashed(process).await;
        let recipe = newest.recipe();
        let lost = Mutex::new(None);
        lose(&mut world, move |it| match is_newest {
            true => it == recipe,
            // The first that is asked for once the sink is back.
            false => it != recipe && lost.lock().unwrap().get_or_insert_with(|| it.to_owned()) == it,
        });
        let process = world.start(chain(1, &[route(NEWEST + 1)])).await;
        if !is_newest {
            waits(&process).await;
            world.database("right").unblock();
        }
        process.until("begun", |s| s.chain == Some(1) && s.swap_waits.is_none()).await;
        world.publish_many(DEVICES, ALL, EACH);
        world.database("right").unblock();
        process.drained().await;
        let said = world.failures.standing();
        assert_eq!(said.len(), 1);
        let (first, last) = if is_newest { (ALL - EACH, ALL - 1) } else { (100, 100 + EACH - 1) };
        assert!(said[0].cause.contains(&format!("offsets {first} to {last}")), "{}", said[0].cause);
        process.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pipeline_takes_its_change_while_that_of_another_one_waits() {
    let world = world();
    let mut other = world.clone();
    other.pipeline = "q".to_owned();
    other.databases.values_mut().for_each(|database| *database = MemoryDatabase::default());
    let beside = other.start(chain(1, &[route(0)])).await;
    let process = full(&world, route(NEWEST)).await;
    beside.drained().await;
    crashed(process).await;
    crashed(beside).await;
    let process = world.start(chain(1, &[route(NEWEST + 1)])).await;
    let beside = other.start(chain(1, &[route(1)])).await;
    waits(&process).await;
    beside.until("begun", |s| s.chain == Some(1) && s.state == State::Running).await;
    begins(&world, process, 1, ALL).await;
    beside.drained().await;
    assert_each_in_one_sink(&other, ALL + EACH);
    beside.stop().await;
}
