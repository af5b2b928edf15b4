//! A pipeline that writes to a stream, and one that reads it: whenever the first dies, each message that the steps
//! make is in the stream once, in the order of its device, and so it comes to the sinks of the second.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::harness::{Act, Process, World, chain, number, sorted, step, text};
use crate::batch::Offset;
use crate::pipeline::Filter;
use crate::sinks::stream::Target;
use crate::step::Chain;
use crate::stream::memory::MemoryStream;
use crate::stream::{Read, Stream};

const DEVICES: u64 = 5;

#[derive(Clone, Debug)]
enum Op {
    Publish(u64),
    Crash,
    Restart,
    /// What is appended to the stream is not durable until `Free`.
    Hold,
    /// The stream has no room until `Free`.
    Fill,
    Free,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        6 => (1..300_u64).prop_map(Op::Publish),
        3 => Just(Op::Crash),
        1 => Just(Op::Restart),
        2 => Just(Op::Hold),
        1 => Just(Op::Fill),
        2 => Just(Op::Free),
    ];
    prop::collection::vec(op, 1..30)
}

fn steps() -> Chain {
    let shape = step("shape", |message, _| match number(&text(message)) % 20 {
        2 => Act::Drop,
        3 => Act::Times(2),
        4 => Act::Refuse("not JSON".to_owned()),
        5 => Act::Route("noise"),
        6 => Act::Route("alert"),
        _ => Act::Pass,
    });
    chain(1, &[shape])
}

fn copies_of(n: u64) -> usize {
    match n % 20 {
        2 | 4 | 5 => 0,
        3 => 2,
        _ => 1,
    }
}

struct Host {
    world: World,
    clean: Arc<MemoryStream>,
}

impl Host {
    /// The stream has another number of partitions than the one that is read.
    fn new() -> Self {
        let mut world = World::new(3, &[("default", "w"), ("alert", "w"), ("noise", "drop")]);
        let clean = MemoryStream::with_hooks("clean", 2);
        world.config.to = Some("clean".to_owned());
        world.targets.insert("clean".to_owned(), Target::new(Arc::clone(&clean) as Arc<dyn Stream>, None));
        Self { world, clean }
    }

    /// The pipeline that reads the stream, without steps.
    fn reader(&self, routes: &[(&str, &str)]) -> World {
        let mut world = World::new(2, routes);
        (world.stream, world.memory) = (Arc::clone(&self.clean) as Arc<dyn Stream>, Arc::clone(&self.clean));
        (world.dead, world.dead_memory) = (Arc::clone(&self.world.dead), Arc::clone(&self.world.dead_memory));
        world.pipeline = "reader".to_owned();
        world
    }

    async fn restarted(&self, process: Process, crash: bool) -> Process {
        match crash {
            true => {
                process.handle.crash();
                process.handle.join().await;
            }
            false => process.stop().await,
        }
        self.world.start(steps()).await
    }

    fn free(&self) {
        self.clean.set_no_space(false);
        self.clean.release_commits();
    }

    /// Payloads of the stream, in its order.
    async fn written(&self) -> Vec<String> {
        written(&self.clean).await
    }
}

async fn written(stream: &MemoryStream) -> Vec<String> {
    let mut cursor = stream.cursor(Offset(0));
    let mut written = Vec::new();
    while let Some(Read::Batch(batch)) = cursor.try_next().await.unwrap() {
        written.extend(batch.messages().map(|message| text(&message)));
    }
    written
}

fn expected(published: u64) -> Vec<String> {
    let copies = |n: u64| std::iter::repeat_n(format!("d{}:{n}", n % DEVICES), copies_of(n));
    sorted((0..published).flat_map(copies).collect())
}

fn assert_in_order(payloads: &[String]) {
    let mut last: BTreeMap<&str, u64> = BTreeMap::new();
    for payload in payloads {
        let device = payload.split(':').next().unwrap();
        let n = number(payload);
        assert!(last.insert(device, n).is_none_or(|before| before <= n), "{payload}");
    }
}

async fn play(ops: Vec<Op>) {
    let host = Host::new();
    let mut process = host.world.start(steps()).await;
    let mut published = 0;
    for op in ops {
        match op {
            Op::Publish(count) => {
                host.world.publish_many(DEVICES, published, count);
                published += count;
                process.looked_after().await;
            }
            Op::Crash => process = host.restarted(process, true).await,
            // It drains: what it waits for must come.
            Op::Restart => {
                host.free();
                process = host.restarted(process, false).await;
            }
            Op::Hold => host.clean.hold_commits(),
            Op::Fill => host.clean.set_no_space(true),
            Op::Free => host.free(),
        }
        tokio::task::yield_now().await;
    }
    host.free();
    process.drained().await;
    let written = host.written().await;
    assert_in_order(&written);
    assert_eq!(sorted(written), expected(published));
    assert_eq!(
        sorted(host.world.payloads("w")),
        expected(published),
        "beside it, a sink of the same pipeline"
    );
    let refused = (0..published).filter(|n| n % 20 == 4).map(|n| format!("d{}:{n}", n % DEVICES));
    let refused = sorted(refused.collect());
    for sink in ["clean", "w"] {
        let letters = host.world.open_letters(sink).await.into_iter().map(|(payload, _)| payload);
        assert_eq!(sorted(letters.collect()), refused, "{sink}");
    }
    let reader = host.reader(&[("default", "rows")]);
    let reading = reader.start(chain(1, &[])).await;
    reading.drained().await;
    let rows = reader.payloads("rows");
    assert_in_order(&rows);
    assert_eq!(sorted(rows), expected(published));
    reading.stop().await;
    process.stop().await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 50, ..ProptestConfig::default() })]

    #[test]
    fn what_the_steps_make_is_in_the_stream_once_whenever_the_process_dies(ops in ops()) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(play(ops));
    }
}

#[tokio::test]
async fn a_pipeline_that_reads_a_stream_of_another_has_its_own_routes_for_the_routes_it_knows() {
    let host = Host::new();
    let process = host.world.start(steps()).await;
    host.world.publish(&[("d", 1), ("d", 6), ("d", 5)]);
    process.drained().await;
    for (routes, alerts) in
        [(&[("default", "rows"), ("alert", "alerts")][..], 1), (&[("default", "rows")], 0)]
    {
        let reader = host.reader(routes);
        let reading = reader.start(chain(1, &[])).await;
        reading.drained().await;
        assert_eq!(
            reader.database("rows").rows().len(),
            2 - alerts,
            "a route that it does not have is no fault"
        );
        if alerts > 0 {
            assert_eq!(reader.payloads("alerts"), ["d:6"]);
        }
        reading.stop().await;
    }
    assert_eq!(host.world.letters().await, []);
    process.stop().await;
}

#[tokio::test]
async fn a_stream_that_is_added_gets_what_comes_and_one_that_was_removed_what_it_had_not() {
    let host = Host::new();
    let mut before = host.world.clone();
    (before.config.to, before.targets) = (None, BTreeMap::new());
    let process = before.start(steps()).await;
    host.world.publish(&[("d", 1), ("d", 7)]);
    process.drained().await;
    process.stop().await;
    let process = host.world.start(steps()).await;
    host.world.publish(&[("d", 8)]);
    process.drained().await;
    process.stop().await;
    assert_eq!(host.written().await, ["d:8"]);

    let (mut world, again) = (host.world.clone(), MemoryStream::with_hooks("clean", 2));
    let target = Target::new(Arc::clone(&again) as Arc<dyn Stream>, None);
    world.targets.insert("clean".to_owned(), target);
    let process = world.start(steps()).await;
    world.publish(&[("d", 9)]);
    process.drained().await;
    process.stop().await;
    assert_eq!(written(&again).await, ["d:9"]);
    assert_eq!(world.payloads("w"), ["d:1", "d:7", "d:8", "d:9"]);
}

#[tokio::test]
async fn a_dead_letter_that_is_sent_again_comes_into_the_stream_once() {
    let host = Host::new();
    let process = host.world.start(steps()).await;
    host.world.publish(&[("d", 1), ("d", 4)]);
    process.drained().await;
    assert_eq!(host.written().await, ["d:1"]);
    process.chain.send(chain(2, &[step("shape", |_, _| Act::Pass)])).unwrap();
    process.until("mended", |status| status.chain == Some(2)).await;
    for _ in 0..2 {
        process.handle.redrive(&Filter::default()).await.unwrap();
        assert_eq!(host.written().await, ["d:1", "d:4"]);
        assert_eq!(host.world.payloads("w"), ["d:1", "d:4"]);
    }
    process.stop().await;
}
