//! A pipeline with several sinks: its steps run once for each message and write to a stream that each sink reads.
//! Whenever the process dies, and whichever sinks the pipeline gets and loses, each sink has each message once.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::harness::{Act, OUT, Process, World, chain, counting, number, published, sorted, step, text};
use crate::pipeline::{Filter, RouteTarget, State};
use crate::sinks::memory::Fault;
use crate::step::Chain;
use crate::stream::memory::MemoryStream;
use crate::stream::{OnLag, Stream};

const DEVICES: u64 = 5;
const SINKS: [&str; 3] = ["a", "b", "c"];

#[derive(Clone, Debug)]
enum Op {
    Publish(u64),
    Crash,
    Restart,
    /// From the next start on, which comes at once, the pipeline has these of the sinks.
    Sinks(u8, bool),
    Down(usize),
    Up(usize),
    /// The next commits to a sink are cut off, or their answers are.
    Cut(usize, bool),
    /// What is appended to the out stream is not durable until `Free`.
    Hold,
    /// The out stream has no room until `Free`.
    Fill,
    Free,
    /// Retention takes what no reader keeps from it.
    Trim,
    /// The steps as they are reject what they rejected: nothing is sent.
    Redrive,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        8 => (1..200_u64).prop_map(Op::Publish),
        3 => Just(Op::Crash),
        1 => Just(Op::Restart),
        4 => (1..8_u8, any::<bool>()).prop_map(|(sinks, crash)| Op::Sinks(sinks, crash)),
        1 => (0..3_usize).prop_map(Op::Down),
        2 => (0..3_usize).prop_map(Op::Up),
        1 => (0..3_usize, any::<bool>()).prop_map(|(sink, answer)| Op::Cut(sink, answer)),
        1 => Just(Op::Hold),
        1 => Just(Op::Fill),
        2 => Just(Op::Free),
        3 => Just(Op::Trim),
        1 => Just(Op::Redrive),
    ];
    prop::collection::vec(op, 1..30)
}

fn act(n: u64) -> Act {
    match n % 20 {
        2 => Act::Drop,
        3 => Act::Times(2),
        4 => Act::Refuse("not JSON".to_owned()),
        5 => Act::Route("noise"),
        6 => Act::Route("alert"),
        _ => Act::Pass,
    }
}

fn steps() -> Chain {
    chain(1, &[step("shape", |message, _| act(number(&text(message))))])
}

fn mended() -> Chain {
    let shape = step("shape", |message, _| match act(number(&text(message))) {
        Act::Refuse(_) => Act::Pass,
        act => act,
    });
    chain(2, &[shape])
}

fn copies_of(n: u64) -> usize {
    match n % 20 {
        2 | 5 => 0,
        3 => 2,
        _ => 1,
    }
}

fn payload(n: u64) -> String {
    format!("d{}:{n}", n % DEVICES)
}

fn expected(published: u64) -> Vec<String> {
    sorted((0..published).flat_map(|n| std::iter::repeat_n(payload(n), copies_of(n))).collect())
}

/// In the order of each device, but for what was rejected at first.
fn assert_in_order(sink: &str, payloads: &[String]) {
    let mut last: BTreeMap<&str, u64> = BTreeMap::new();
    for payload in payloads.iter().filter(|payload| number(payload) % 20 != 4) {
        let device = payload.split(':').next().unwrap();
        let n = number(payload);
        let own = payloads.iter().filter(|other| other.starts_with(device)).collect::<Vec<_>>();
        assert!(last.insert(device, n).is_none_or(|before| before <= n), "{sink}: {payload} {own:?}");
    }
}

/// Says only what is different.
fn assert_same(sink: &str, rows: Vec<String>, expected: Vec<String>, may_lack: bool) {
    let (mut more, mut missing) = (sorted(rows), Vec::new());
    for payload in expected {
        match more.iter().position(|row| *row == payload) {
            Some(place) => drop(more.remove(place)),
            None => missing.push(payload),
        }
    }
    let lacks = !missing.is_empty() && !may_lack;
    assert!(more.is_empty() && !lacks, "{sink}: too many: {more:?}, missing: {missing:?}");
}

fn world(sinks: &[&str]) -> (World, Arc<MemoryStream>) {
    let mut world = World::new(3, &[("default", "a"), ("alert", "a"), ("noise", "drop")]);
    world.set_sinks(sinks);
    world.with_out()
}

struct Host {
    world: World,
    out: Arc<MemoryStream>,
}

impl Host {
    async fn restarted(&self, process: Process, crash: bool) -> Process {
        match crash {
            true => {
                process.handle.crash();
                process.handle.join().await;
                // A log that is opened again has what was appended, or has lost it with its positions.
                self.out.release_commits();
            }
            // It drains: what it waits for must come.
            false => {
                self.free();
                process.stop().await;
            }
        }
        self.world.start(steps()).await
    }

    fn free(&self) {
        self.out.set_no_space(false);
        self.out.release_commits();
    }

    /// What retention by size may take: up to the first message that a reader keeps.
    fn trim(&self) {
        for stream in [&self.world.memory, &self.out] {
            let kept = stream.marks().into_values().filter(|(_, on_lag)| *on_lag == OnLag::Block);
            let upto = kept.map(|(next, _)| next).min();
            upto.into_iter().for_each(|upto| stream.trim(upto));
        }
    }

    fn all_up(&self) {
        self.free();
        for database in self.world.databases.values() {
            database.set_down(None);
            database.fail_no_more();
        }
    }
}

async fn play(ops: Vec<Op>) {
    let (world, out) = world(&["a", "b"]);
    let mut host = Host { world, out };
    let mut process = host.world.start(steps()).await;
    let mut published = 0;
    // Sinks that were not there when retention took something.
    let mut lacks = BTreeSet::new();
    for op in ops {
        match op {
            Op::Publish(count) => {
                host.world.publish_many(DEVICES, published, count);
                published += count;
                process.looked_after().await;
            }
            Op::Crash => process = host.restarted(process, true).await,
            Op::Restart => process = host.restarted(process, false).await,
            Op::Sinks(sinks, crash) => {
                let sinks: Vec<_> = SINKS.iter().enumerate().filter(|(i, _)| sinks & 1 << i != 0).collect();
                host.world.set_sinks(&sinks.into_iter().map(|(_, sink)| *sink).collect::<Vec<_>>());
                process = host.restarted(process, crash).await;
            }
            Op::Down(sink) => {
                host.world.databases.get(SINKS[sink]).iter().for_each(|one| one.set_down(Some("away")));
            }
            Op::Up(sink) => {
                host.world.databases.get(SINKS[sink]).iter().for_each(|one| one.set_down(None));
            }
            Op::Cut(sink, answer) => {
                let fault = match answer {
                    true => Fault::UnknownWritten,
                    false => Fault::Retry("terminating connection".to_owned()),
                };
                host.world
                    .databases
                    .get(SINKS[sink])
                    .iter()
                    .for_each(|one| one.fail_commits([fault.clone()]));
            }
            Op::Hold => host.out.hold_commits(),
            Op::Fill => host.out.set_no_space(true),
            Op::Free => host.free(),
            Op::Trim => {
                let there = host.world.config.sinks();
                // Nothing is kept for a sink that is not there.
                lacks.extend(SINKS.into_iter().filter(|sink| !there.contains(sink)));
                host.trim();
            }
            // One sink alone gets what was for all: the others, which are not there, do not.
            Op::Redrive if host.world.config.sinks().len() == 1 => {}
            Op::Redrive => {
                host.all_up();
                process.until("steps", |status| status.chain.is_some()).await;
                drop(process.handle.redrive(&Filter::default()).await);
            }
        }
        tokio::task::yield_now().await;
    }
    host.all_up();
    host.world.set_sinks(&SINKS);
    if !lacks.is_empty() {
        host.world.on_lag = OnLag::Detach;
    }
    process = host.restarted(process, false).await;
    process.drained().await;
    process.chain.send(mended()).unwrap();
    process.until("mended", |status| status.chain == Some(2)).await;
    for _ in 0..2 {
        let summary = process.handle.redrive(&Filter::default()).await.unwrap();
        assert_eq!(summary.failed, [""; 0]);
        process.drained().await;
        for sink in SINKS {
            let rows = host.world.payloads(sink);
            assert_in_order(sink, &rows);
            assert_same(sink, rows, expected(published), lacks.contains(sink));
        }
    }
    process.stop().await;
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 48,
        max_shrink_iters: 20,
        ..ProptestConfig::default()
    })]

    #[test]
    fn each_sink_has_each_message_once_whenever_the_process_dies_and_whichever_sinks_there_are(ops in ops()) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(play(ops));
    }
}

#[tokio::test]
async fn steps_run_once_for_each_message_however_long_a_sink_is_away() {
    let (world, out) = world(&SINKS);
    let (ran, steps) = counting();
    let process = world.start(steps).await;
    world.database("b").set_down(Some("away"));
    world.publish_many(DEVICES, 0, 1_000);
    process
        .until("the others have all", |status| {
            status.sinks.iter().all(|sink| sink.name == "b" || sink.lag_messages == 0)
        })
        .await;
    assert_eq!(ran.load(Ordering::Acquire), 1_000);
    world.database("b").set_down(None);
    process.drained().await;
    assert_eq!((ran.load(Ordering::Acquire), out.bounds().end.0), (1_000, 1_000));
    for sink in SINKS {
        assert_eq!(sorted(world.payloads(sink)), published(DEVICES, 1_000), "{sink}");
    }
    process.stop().await;
}

#[tokio::test]
async fn a_message_that_a_step_rejects_is_one_dead_letter_and_comes_to_all_sinks_with_it() {
    let (world, _) = world(&SINKS);
    let process = world.start(steps()).await;
    world.database("c").set_down(Some("away"));
    world.publish(&[("d", 1), ("d", 4), ("d", 7)]);
    process
        .until("rejected", |status| {
            status.sinks.iter().any(|sink| sink.name == OUT && sink.lag_messages == 0)
        })
        .await;
    assert_eq!(world.letters().await, [("d:4".to_owned(), "not JSON".to_owned())]);
    process.chain.send(mended()).unwrap();
    process.until("mended", |status| status.chain == Some(2)).await;
    let summary = process.handle.redrive(&Filter::default()).await.unwrap();
    assert_eq!((summary.sent, summary.failed), (1, Vec::new()), "a sink that is away keeps nobody from it");
    world.database("c").set_down(None);
    process.drained().await;
    for sink in SINKS {
        assert_eq!(world.payloads(sink), ["d:1", "d:7", "d:4"], "{sink}");
    }
    assert_eq!(world.letters().await.len(), 1);
    process.stop().await;
}

#[tokio::test]
async fn a_row_that_one_sink_rejects_is_its_dead_letter_alone() {
    let (world, _) = world(&["a", "b"]);
    world.database("b").refuse(|row| (row.payload() == b"d:7").then(|| "value: too large".to_owned()));
    let process = world.start(steps()).await;
    world.publish(&[("d", 1), ("d", 7), ("d", 8)]);
    process.drained().await;
    assert_eq!(world.payloads("a"), ["d:1", "d:7", "d:8"]);
    assert_eq!(world.payloads("b"), ["d:1", "d:8"]);
    assert_eq!(world.open_letters("b").await, [("d:7".to_owned(), "b".to_owned())]);
    world.database("b").refuse(|_| None);
    process.handle.redrive(&Filter::default()).await.unwrap();
    assert_eq!(world.payloads("b"), ["d:1", "d:8", "d:7"]);
    assert_eq!(world.payloads("a").len(), 3);
    process.stop().await;
}

#[tokio::test]
async fn sinks_that_an_earlier_version_left_at_different_places_each_go_on_where_they_were() {
    let (through, out) = world(&["a", "b"]);
    let mut before = through.clone();
    before.out = None;
    let process = before.start(steps()).await;
    before.publish_many(DEVICES, 0, 100);
    process.drained().await;
    before.database("b").set_down(Some("away"));
    before.publish_many(DEVICES, 100, 300);
    process
        .until("a has all", |status| {
            status.sinks.iter().any(|sink| sink.name == "a" && sink.lag_messages == 0)
        })
        .await;
    process.stop().await;
    before.database("b").set_down(None);
    let process = through.start(steps()).await;
    through.publish_many(DEVICES, 400, 100);
    process.drained().await;
    process.stop().await;
    let rows = expected(500).into_iter().filter(|payload| number(payload) % 20 != 4).collect::<Vec<_>>();
    for sink in ["a", "b"] {
        assert_in_order(sink, &through.payloads(sink));
        assert_eq!(sorted(through.payloads(sink)), rows, "{sink}");
    }
    let in_out = rows.iter().filter(|payload| number(payload) >= 400).count();
    assert_eq!(out.bounds().end.0, in_out as u64, "what came before is not written to it");
}

#[tokio::test]
async fn a_sink_that_is_away_while_the_pipeline_goes_through_a_stream_holds_nobody_up_and_shows_why() {
    let (world, _) = world(&["a", "b"]);
    world.database("b").set_down(Some("connection refused"));
    let process = world.start(steps()).await;
    world.publish_many(DEVICES, 0, 40);
    let status = process
        .until("a has all", |status| {
            status.sinks.iter().all(|sink| sink.name == "b" || sink.committed == Some(sink.end))
                && status.sinks.iter().any(|sink| sink.name == OUT && sink.lag_messages == 0)
        })
        .await;
    assert_eq!(status.state, State::Running);
    let state_of_b =
        || process.handle.status().sinks.into_iter().find(|sink| sink.name == "b").unwrap().state;
    assert!(matches!(state_of_b(), State::Retrying(reason) if reason.contains("connection refused")));
    process.stop().await;
    // As well where it is away at a start, and had begun to read the stream.
    world.database("b").set_down(None);
    let process = world.start(steps()).await;
    process.drained().await;
    process.stop().await;
    world.database("b").set_down(Some("connection refused"));
    let process = world.start(steps()).await;
    world.publish_many(DEVICES, 40, 20);
    let status = process.until("b is told", |status| {
        status
            .sinks
            .iter()
            .any(|sink| sink.name == "b" && matches!(sink.state, State::Retrying(_)) && sink.lag_messages > 0)
    });
    let status = status.await;
    let b = status.sinks.iter().find(|sink| sink.name == "b").unwrap();
    assert_eq!(b.stream, OUT, "what it lacks is there");
    process.stop().await;
}

#[tokio::test]
async fn the_source_keeps_nothing_for_sinks_that_read_the_out_stream() {
    let (world, out) = world(&["a", "b"]);
    let process = world.start(steps()).await;
    world.publish_many(DEVICES, 0, 100);
    process.drained().await;
    let readers = |stream: &MemoryStream| stream.marks().into_keys().collect::<Vec<_>>();
    assert_eq!(readers(&world.memory), [format!("p/{OUT}")]);
    assert_eq!(readers(&out), ["p/a", "p/b"]);
    process.stop().await;
    // And holds nothing back where a sink is away at the next start.
    world.database("b").set_down(Some("away"));
    let process = world.start(steps()).await;
    process.until("a runs", |status| status.sinks[0].committed.is_some() && status.chain.is_some()).await;
    let marks = world.memory.marks();
    let end = world.memory.bounds().end;
    assert!(marks.iter().all(|(_, (next, _))| *next == end), "{marks:?}");
    process.stop().await;
}

#[tokio::test]
async fn a_database_that_is_restored_from_before_it_read_the_out_stream_gets_what_it_lacks_of_both() {
    let (world, _) = world(&["a", "b"]);
    let process = world.start(steps()).await;
    world.publish_many(DEVICES, 0, 100);
    process.drained().await;
    process.stop().await;
    let backup = world.database("b").backup();
    let process = world.start(steps()).await;
    world.publish_many(DEVICES, 100, 100);
    process.drained().await;
    process.stop().await;
    world.database("b").restore(&backup);
    let process = world.start(steps()).await;
    process.drained().await;
    process.stop().await;
    assert_eq!(sorted(world.payloads("b")), sorted(world.payloads("a")));
}

#[tokio::test]
async fn a_sink_that_lags_too_far_loses_what_retention_takes_and_the_others_nothing() {
    let (mut world, out) = world(&["a", "b"]);
    world.on_lag = OnLag::Detach;
    let process = world.start(steps()).await;
    world.publish_many(DEVICES, 0, 10);
    process.drained().await;
    world.database("b").set_down(Some("away"));
    world.publish_many(DEVICES, 10, 90);
    process
        .until("a has all", |status| {
            status.sinks.iter().any(|sink| {
                sink.name == "a"
                    && sink.lag_messages == 0
                    && sink.committed == Some(sink.end)
                    && sink.end.0 > 50
            })
        })
        .await;
    process.stop().await;
    out.trim(out.bounds().end);
    let process = world.start(steps()).await;
    process
        .until("told", |status| status.sinks.iter().any(|sink| sink.name == "b" && sink.gone_messages > 0))
        .await;
    world.database("b").set_down(None);
    world.publish_many(DEVICES, 100, 10);
    process.drained().await;
    process.stop().await;
    let rows: Vec<_> = expected(110).into_iter().filter(|payload| number(payload) % 20 != 4).collect();
    let is_kept = |payload: &&String| !(10..100).contains(&number(payload));
    assert_eq!(sorted(world.payloads("a")), rows);
    assert_eq!(sorted(world.payloads("b")), rows.iter().filter(is_kept).cloned().collect::<Vec<_>>());
}

#[tokio::test]
async fn redrives_of_a_pipeline_that_has_one_sink_left_send_what_was_for_all() {
    let (mut world, _) = world(&["a", "b"]);
    let process = world.start(steps()).await;
    world.publish(&[("d", 1), ("d", 4)]);
    process.drained().await;
    process.stop().await;
    world.set_sinks(&["b"]);
    let process = world.start(mended()).await;
    process.until("steps", |status| status.chain.is_some()).await;
    process.drained().await;
    let summary = process.handle.redrive(&Filter::default()).await.unwrap();
    assert_eq!((summary.sent, summary.failed), (1, Vec::new()));
    assert_eq!(world.payloads("b"), ["d:1", "d:4"]);
    assert_eq!(world.payloads("a"), ["d:1"]);
    process.stop().await;
}

#[tokio::test]
async fn a_sink_that_is_alone_again_keeps_what_it_lacks_of_the_source() {
    let (mut world, _) = world(&["a", "b"]);
    let process = world.start(steps()).await;
    world.publish_many(DEVICES, 0, 20);
    process.drained().await;
    process.stop().await;
    world.set_sinks(&["a"]);
    let process = world.start(steps()).await;
    process.until("it reads the source", |status| status.sinks[0].stream == "telemetry").await;
    world.database("a").set_down(Some("away"));
    world.publish_many(DEVICES, 20, 20);
    process.looked_after().await;
    let kept = world.memory.marks().into_values().map(|(next, _)| next.0).min();
    assert!(kept.is_some_and(|kept| kept <= 20), "{:?}", world.memory.marks());
    world.database("a").set_down(None);
    process.drained().await;
    process.stop().await;
    let rows: Vec<_> = expected(40).into_iter().filter(|payload| number(payload) % 20 != 4).collect();
    assert_eq!(sorted(world.payloads("a")), rows);
}

#[tokio::test]
async fn a_database_from_when_the_pipeline_had_several_sinks_gets_what_it_lacks_once_it_has_one() {
    let (mut world, _) = world(&["a", "b"]);
    let process = world.start(steps()).await;
    world.publish_many(DEVICES, 0, 100);
    process.drained().await;
    process.stop().await;
    let backup = world.database("a").backup();
    let process = world.start(steps()).await;
    world.publish_many(DEVICES, 100, 100);
    process.drained().await;
    process.stop().await;
    world.set_sinks(&["a"]);
    let process = world.start(steps()).await;
    world.publish_many(DEVICES, 200, 100);
    process.drained().await;
    process.until("it reads the source", |status| status.sinks[0].stream == "telemetry").await;
    process.drained().await;
    process.stop().await;
    let before = sorted(world.payloads("a"));
    world.database("a").restore(&backup);
    let process = world.start(steps()).await;
    process.until("it reads the source", |status| status.sinks[0].stream == "telemetry").await;
    process.drained().await;
    process.stop().await;
    assert_eq!(sorted(world.payloads("a")), before);
}

#[tokio::test]
async fn a_database_from_before_the_second_sink_is_filled_and_asks_nobody() {
    let (mut world, _) = world(&["a"]);
    let process = world.start(steps()).await;
    world.publish_many(DEVICES, 0, 100);
    process.drained().await;
    process.stop().await;
    let backup = world.database("a").backup();
    world.set_sinks(&["a", "b"]);
    let process = world.start(steps()).await;
    world.publish_many(DEVICES, 100, 100);
    process.drained().await;
    process.stop().await;
    let before = sorted(world.payloads("a"));
    world.database("a").restore(&backup);
    let process = world.start(steps()).await;
    process.drained().await;
    process.stop().await;
    assert_eq!(sorted(world.payloads("a")), before);
}

#[tokio::test]
async fn a_sink_that_is_away_at_a_start_keeps_nothing_of_the_source_that_it_has_left() {
    let (world, _) = world(&["a", "b"]);
    let process = world.start(steps()).await;
    world.publish_many(DEVICES, 0, 20);
    process.drained().await;
    process.stop().await;
    world.database("b").set_down(Some("away"));
    let process = world.start(steps()).await;
    world.publish_many(DEVICES, 20, 20);
    process
        .until("the steps have all", |status| {
            status.sinks.iter().any(|sink| sink.name == OUT && sink.committed == Some(sink.end))
        })
        .await;
    let holds = |(next, on_lag): (crate::batch::Offset, OnLag)| {
        on_lag == OnLag::Block && next < world.memory.bounds().end
    };
    assert!(!world.memory.marks().into_values().any(holds), "{:?}", world.memory.marks());
    process.stop().await;
}

#[tokio::test]
async fn a_letter_waits_for_a_new_sink_that_runs_the_steps_itself_and_comes_to_it_once() {
    let (mut world, _) = world(&["a", "b"]);
    let process = world.start(steps()).await;
    world.publish_many(DEVICES, 0, 100);
    process.drained().await;
    process.stop().await;
    world.set_sinks(&SINKS);
    world.database("c").set_down(Some("away"));
    let process = world.start(mended()).await;
    process.until("steps", |status| status.chain.is_some()).await;
    let summary = process.handle.redrive(&Filter::default()).await.unwrap();
    assert_eq!(summary.sent, 0, "c would have it from the steps and from the stream");
    process.stop().await;
    world.database("c").set_down(None);
    let process = world.start(mended()).await;
    process.drained().await;
    for _ in 0..2 {
        process.handle.redrive(&Filter::default()).await.unwrap();
        process.drained().await;
        for sink in SINKS {
            assert_same(sink, world.payloads(sink), expected(100), false);
        }
    }
    process.stop().await;
}

#[tokio::test]
async fn sinks_that_come_back_under_another_name_and_pipelines_go_on_where_they_were() {
    let (mut world, _) = world(&["a", "b"]);
    let process = world.start(steps()).await;
    world.publish_many(DEVICES, 0, 100);
    process.drained().await;
    process.stop().await;
    // The one that is left has another name from the same start on.
    let database = world.databases.remove("b").unwrap();
    world.databases.insert("x".to_owned(), database);
    world.renamed_from.insert("x".to_owned(), "b".to_owned());
    world.set_sinks(&["x"]);
    let process = world.start(steps()).await;
    world.publish_many(DEVICES, 100, 50);
    process.drained().await;
    process.until("it reads the source", |status| status.sinks[0].stream == "telemetry").await;
    process.drained().await;
    process.stop().await;
    let rows: Vec<_> = expected(150).into_iter().filter(|payload| number(payload) % 20 != 4).collect();
    assert_eq!(sorted(world.payloads("x")), rows);
}

#[tokio::test]
async fn a_message_goes_by_the_routes_of_its_time_however_late_a_sink_gets_it() {
    let (mut world, _) = world(&["a", "b"]);
    world.config.routes = [("default", "a"), ("alert", "b"), ("noise", "drop")]
        .map(|(route, sink)| (route.to_owned(), RouteTarget::One(sink.to_owned())))
        .into();
    let process = world.start(steps()).await;
    for sink in ["a", "b"] {
        world.database(sink).set_down(Some("away"));
    }
    world.publish(&[("d", 1), ("d", 6)]);
    process
        .until("the steps have all", |status| {
            status.sinks.iter().any(|sink| sink.name == OUT && sink.committed == Some(sink.end))
        })
        .await;
    process.stop().await;
    // The other way round from now on.
    world.config.routes = [("default", "b"), ("alert", "a"), ("noise", "drop")]
        .map(|(route, sink)| (route.to_owned(), RouteTarget::One(sink.to_owned())))
        .into();
    for sink in ["a", "b"] {
        world.database(sink).set_down(None);
    }
    let process = world.start(steps()).await;
    world.publish(&[("d", 7), ("d", 26)]);
    process.drained().await;
    process.stop().await;
    assert_eq!(world.payloads("a"), ["d:1", "d:26"]);
    assert_eq!(world.payloads("b"), ["d:6", "d:7"]);
}

#[tokio::test]
async fn positions_that_are_gone_are_asked_about_where_the_table_has_rows() {
    let (world, _) = world(&["a", "b"]);
    let process = world.start(steps()).await;
    world.publish_many(DEVICES, 0, 40);
    process.drained().await;
    process.stop().await;
    let before = world.payloads("a");
    world.database("a").lose_positions();
    let process = world.start(steps()).await;
    let asks = |status: &crate::pipeline::PipelineStatus| {
        let a = status.sinks.iter().find(|sink| sink.name == "a").unwrap();
        matches!(&a.state, State::Retrying(reason) if reason.contains("begin: start"))
    };
    process.until("a person is asked", asks).await;
    process.stop().await;
    assert_eq!(world.payloads("a"), before);
}

#[tokio::test]
async fn a_pipeline_that_reads_another_stream_fills_its_sinks_from_its_beginning() {
    let (world, _) = world(&["a", "b"]);
    let process = world.start(steps()).await;
    world.publish_many(DEVICES, 0, 40);
    process.drained().await;
    process.stop().await;
    let mut other = world.clone();
    let stream = MemoryStream::with_hooks("other", 3);
    (other.stream, other.memory) = (Arc::clone(&stream) as Arc<dyn Stream>, stream);
    other.publish_many(DEVICES, 100, 40);
    let process = other.start(steps()).await;
    process.drained().await;
    process.stop().await;
    let is_passed = |n: &u64| n % 20 != 4;
    let rows = (0..40).chain(100..140).filter(is_passed);
    let rows = sorted(rows.flat_map(|n| std::iter::repeat_n(payload(n), copies_of(n))).collect());
    for sink in ["a", "b"] {
        assert_eq!(sorted(world.payloads(sink)), rows, "{sink}");
    }
}

#[tokio::test]
async fn what_the_steps_need_of_the_source_stays_where_a_start_finds_no_room_for_its_roads() {
    let (mut world, _) = world(&["a", "b"]);
    let process = world.start(steps()).await;
    world.publish_many(DEVICES, 0, 40);
    process.drained().await;
    process.stop().await;
    let holds = || world_marks(&world);
    let before = holds();
    world.set_sinks(&SINKS);
    world.dead_memory.set_no_space(true);
    assert!(world.try_start(steps()).await.is_err());
    assert_eq!(world_marks(&world).get("p/p.out"), before.get("p/p.out"));
    world.dead_memory.set_no_space(false);
    world.publish_many(DEVICES, 40, 40);
    let process = world.start(steps()).await;
    process.drained().await;
    process.stop().await;
    assert_eq!(sorted(world.payloads("a")).len(), sorted(world.payloads("c")).len());
}

fn world_marks(world: &World) -> BTreeMap<String, (crate::batch::Offset, OnLag)> {
    world.memory.marks()
}
