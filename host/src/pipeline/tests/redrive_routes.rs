//! Which sinks a dead letter goes to where the routes change in the midst of its redrive, or before
//! another one.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::harness::{Act, Process, World, chain, published, sorted, step, text};
use super::redrive_steps::{flip, passing, redrive, refusing, told, with_letters};
use crate::pipeline::again::is_pending;
use crate::pipeline::marks::{Sent, records};
use crate::pipeline::{MARK_PREFIX, Mark, Marks, Reopened, list_open};
use crate::step::StepFactory;
use crate::stream::StateChange;

const ROUTES: [(&str, &str); 2] = [("default", "w"), ("alert", "z")];

/// Gives every message this route.
fn routing(route: Option<&'static str>) -> Arc<dyn StepFactory> {
    step("route", move |_, _| route.map_or(Act::Pass, Act::Route))
}

async fn is_nothing_open(world: &World) -> bool {
    list_open(&*world.dead, None).await.unwrap().is_empty()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_goes_where_it_was_led_when_its_first_sink_took_it() {
    for (first, then, has_rows) in [(None, Some("alert"), "w"), (Some("alert"), None, "z")] {
        for is_restarted in [false, true] {
            let world = World::new(1, &ROUTES);
            let process = with_letters(&world, &[refusing("check"), routing(first)]).await;
            flip(&process, 2, &[passing("check"), routing(first)]).await;
            world.database("z").set_down(Some("away"));
            assert_eq!(redrive(&process).await.letters.pending, 3);
            let steps = [passing("check"), routing(then)];
            let process = if is_restarted {
                process.handle.crash();
                process.handle.join().await;
                world.database("z").set_down(None);
                world.start(chain(1, &steps)).await
            } else {
                flip(&process, 3, &steps).await;
                world.database("z").set_down(None);
                redrive(&process).await;
                process
            };
            process.until("ended", |_| !is_pending(&*world.dead, &["p".to_owned()])).await;
            assert!(is_nothing_open(&world).await);
            for sink in ["w", "z"] {
                let rows = if sink == has_rows { published(1, 3) } else { Vec::new() };
                assert_eq!(sorted(world.payloads(sink)), rows, "{sink}, of {has_rows}");
            }
            process.stop().await;
        }
    }
}

/// Letters that went to the first sink, whose database is restored from before then; the steps of now
/// lead to the other one.
async fn restored(is_decided: bool) -> (World, Process) {
    let world = World::new(1, &ROUTES);
    let process = with_letters(&world, &[refusing("check"), routing(None)]).await;
    let backup = world.database("w").backup();
    flip(&process, 2, &[passing("check"), routing(None)]).await;
    assert_eq!(redrive(&process).await.sent, 3);
    process.stop().await;
    if !is_decided {
        for record in records(&world.dead.state(MARK_PREFIX)) {
            let (key, value) = Sent { to: None, ..record }.change();
            let change = StateChange { key: &key, value: value.as_deref() };
            world.dead.append(&[], &[change]).unwrap();
        }
    }
    world.database("w").restore(&backup);
    let process = world.start(chain(1, &[passing("check"), routing(Some("alert"))])).await;
    let is_lost = |mark: &Mark| matches!(mark, Mark::Open { why: Reopened::Lost, .. });
    let lost = || Marks::read(&world.dead.state(MARK_PREFIX)).own().filter(|(_, it)| is_lost(it)).count();
    process.until("open again", |_| lost() == 3).await;
    process.until("steps", |status| status.chain.is_some()).await;
    process.drained().await;
    (world, process)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_goes_back_to_the_database_that_lost_it_wherever_the_steps_lead_by_then() {
    let (world, process) = restored(true).await;
    assert_eq!(redrive(&process).await.sent, 3);
    assert_eq!(sorted(world.payloads("w")), published(1, 3));
    assert!(world.payloads("z").is_empty() && is_nothing_open(&world).await);
    process.stop().await;
}

/// As an earlier version sent it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_that_a_database_lost_is_open_while_the_steps_lead_elsewhere() {
    let (world, process) = restored(false).await;
    let summary = redrive(&process).await;
    assert_eq!((summary.sent, summary.letters.refused), (0, 3));
    let told = told(&world).await;
    assert!(told.len() == 3 && told.iter().all(|(why, _)| why.contains("lead it to sink \"z\"")), "{told:?}");
    flip(&process, 2, &[passing("check"), routing(None)]).await;
    assert_eq!(redrive(&process).await.sent, 3);
    assert_eq!(sorted(world.payloads("w")), published(1, 3));
    assert!(world.payloads("z").is_empty() && is_nothing_open(&world).await);
    process.stop().await;
}

/// Makes `count` messages of one, each with its number, and gives the one with the number `alert`
/// another route.
fn splitting(count: usize, alert: usize) -> [Arc<dyn StepFactory>; 4] {
    let n = Arc::new(AtomicUsize::new(0));
    let numbered = step("number", move |message, _| {
        Act::Payload(format!("{} {}", text(message), n.fetch_add(1, Ordering::Relaxed) % count))
    });
    let route = step("route", move |message, _| match text(message).ends_with(&format!(" {alert}")) {
        true => Act::Route("alert"),
        false => Act::Pass,
    });
    [passing("check"), step("split", move |_, _| Act::Times(count)), numbered, route]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_message_that_is_made_of_a_letter_goes_where_it_was_led_when_the_first_sink_took_its_own() {
    for count in [2, 3] {
        let world = World::new(1, &ROUTES);
        let process = with_letters(&world, &[refusing("check")]).await;
        flip(&process, 2, &splitting(2, 0)).await;
        world.database("z").set_down(Some("away"));
        assert_eq!(redrive(&process).await.letters.pending, 3);
        flip(&process, 3, &splitting(count, 1)).await;
        world.database("z").set_down(None);
        redrive(&process).await;
        if count != 2 {
            let told = told(&world).await;
            let is_why = |why: &str| why.contains("the steps of now make 3");
            assert!(told.len() == 3 && told.iter().all(|(why, _)| is_why(why)), "{told:?}");
            flip(&process, 4, &splitting(2, 1)).await;
            redrive(&process).await;
        }
        assert!(is_nothing_open(&world).await);
        assert_eq!(sorted(world.payloads("w")), ["d0:0 1", "d0:1 1", "d0:2 1"]);
        assert_eq!(sorted(world.payloads("z")), ["d0:0 0", "d0:1 0", "d0:2 0"]);
        process.stop().await;
    }
}
