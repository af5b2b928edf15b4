//! The model: whatever a sink answers, whichever version of a plugin runs,
//! however far a sink lags and whenever the process dies, each message is in
//! each sink once, or in one letter that names that sink, never both. A message
//! that the versions send to different sinks is in one of them, and in it again after its database
//! was restored.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::harness::{Act, Process, World, chain, number, recall, step, text};
use crate::pipeline::{Filter, ROUTES_STEP};
use crate::sinks::memory::{Backup, Fault};
use crate::step::{Chain, RecallError, VERSIONS_MAX};
use crate::units::{ByteSize, Period};

#[derive(Clone, Debug)]
enum Op {
    Publish(u64),
    Fail {
        sink: usize,
        fault: u8,
    },
    /// Of a sink, until the next one: it lags, and gets a lane of its own.
    Block(usize),
    Unblock,
    /// The process dies without a word, at whatever it does.
    Crash,
    Restart,
    /// To this version of the plugins.
    Swap(u64),
    Redrive,
    /// Of a sink's database.
    Backup(usize),
    /// The process dies, and a sink's database is what it was at its last backup.
    Restore(usize),
    /// A sink lags, the steps change until they wait for it, and the process dies.
    Fill(usize),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        8 => (1..400_u64).prop_map(Op::Publish),
        4 => (0..2_usize, 0..4_u8).prop_map(|(sink, fault)| Op::Fail { sink, fault }),
        3 => (0..2_usize).prop_map(Op::Block),
        3 => Just(Op::Unblock),
        2 => Just(Op::Crash),
        1 => Just(Op::Restart),
        5 => (1..5_u64).prop_map(Op::Swap),
        1 => Just(Op::Redrive),
        2 => (0..2_usize).prop_map(Op::Backup),
        2 => (0..2_usize).prop_map(Op::Restore),
        1 => (0..2_usize).prop_map(Op::Fill),
    ];
    prop::collection::vec(op, 1..40)
}

fn fault(number: u8) -> Fault {
    match number {
        0 => Fault::UnknownWritten,
        1 => Fault::UnknownLost,
        2 => Fault::Retry("connection reset".to_owned()),
        _ => Fault::TooMuch("statement timeout".to_owned()),
    }
}

const SINKS: [&str; 2] = ["a", "b"];
const DEVICES: u64 = 7;

/// Of these every version makes one row, in a sink of its own.
fn is_routed(n: u64) -> bool {
    n % 20 == 5
}

/// Each version refuses other messages, in two places, and routes others to
/// nowhere. Version 0 takes all.
fn steps(generation: u64, version: u64) -> Chain {
    let refuses = move |n: u64, by: u64, of: u64| {
        version > 0 && !is_routed(n) && (n / of + n).wrapping_mul(by) % of == version
    };
    let parse = step("parse", move |message, _| match refuses(number(&text(message)), 5, 13) {
        true => Act::Refuse("not JSON".to_owned()),
        false => Act::Pass,
    });
    let shape = step("shape", |message, _| match number(&text(message)) % 20 {
        2 => Act::Drop,
        3 => Act::Times(2),
        _ => Act::Pass,
    });
    let check = step("check", move |message, _| match number(&text(message)) {
        n if is_routed(n) => Act::Route(SINKS[version as usize % 2]),
        n if refuses(n, 3, 11) => Act::Refuse("out of range".to_owned()),
        n if refuses(n, 7, 17) => Act::Route("nowhere"),
        _ => Act::Pass,
    });
    chain(generation, &[parse, shape, check])
}

/// How many rows a message makes.
fn rows_of(n: u64) -> usize {
    match n % 20 {
        2 => 0,
        3 => 2,
        _ => 1,
    }
}

struct Host {
    world: World,
    generation: u64,
    version: u64,
    /// By version: the same steps again are the same version.
    chains: BTreeMap<u64, Chain>,
    /// Since every sink had caught up: one that lags needs each of them.
    swaps: usize,
    /// By sink, with the swaps since every sink had caught up: what it needs once it is restored.
    backups: [Option<(Backup, usize)>; 2],
    process: Process,
}

/// More, and a change may wait for the sink that lags, or steps that a backup needs are not kept.
const SWAPS_MAX: usize = VERSIONS_MAX - 2;

impl Host {
    async fn new() -> Self {
        let mut world = World::new(3, &[("default", "a b"), ("a", "a"), ("b", "b")]);
        world.config.lag_after = Period(std::time::Duration::from_millis(10));
        world.config.sink_queue_bytes_max = ByteSize(8 << 10);
        world.config.read_ahead_bytes_max = ByteSize(8 << 10);
        world.database("b").refuse(|message| text(message).ends_with('9').then(|| "nine".to_owned()));
        // The first time that it is asked for, a step cannot be made yet.
        let asked: Mutex<BTreeSet<String>> = Mutex::default();
        world.recall = Some(Arc::new(move |recipe| match asked.lock().unwrap().insert(recipe.to_owned()) {
            true => Err(RecallError::Later("no file descriptors".to_owned())),
            false => recall(recipe),
        }));
        let chains: BTreeMap<_, _> = (0..5).map(|version| (version, steps(0, version))).collect();
        let process = world.start(Chain { generation: 1, ..chains[&1].clone() }).await;
        Self { world, generation: 1, version: 1, chains, swaps: 0, backups: [None, None], process }
    }

    fn chain(&self) -> Chain {
        Chain { generation: self.generation, ..self.chains[&self.version].clone() }
    }

    async fn restarted(mut self, crash: bool, restored: Option<usize>) -> Self {
        let chain = self.chain();
        if crash {
            self.process.handle.crash();
            self.process.handle.join().await;
        } else {
            self.unblock();
            self.process.stop().await;
        }
        if let Some(sink) = restored
            && let Some((backup, swaps)) = &self.backups[sink]
        {
            self.world.database(SINKS[sink]).restore(backup);
            self.swaps = self.swaps.max(*swaps);
        }
        self.process = self.world.start(chain).await;
        self
    }

    /// For each sink a message's rows, and what its letters for it stand for,
    /// are what the message makes.
    async fn each_once(&self, published: u64) {
        let mut routed = vec![0; published as usize];
        for sink in SINKS {
            let (mut rows, mut letters) = (vec![0; published as usize], vec![0; published as usize]);
            for payload in self.world.payloads(sink) {
                rows[number(&payload) as usize] += 1;
            }
            for (payload, by) in self.world.open_letters(sink).await {
                let n = number(&payload);
                // What the first step refused is all of what would have become of it.
                letters[n as usize] += if by == "parse" { rows_of(n) } else { 1 };
            }
            for n in (0..published as usize).filter(|n| is_routed(*n as u64)) {
                routed[n] += rows[n] + letters[n];
            }
            let all = (0..published as usize).map(|n| (n, rows[n], letters[n]));
            let all = all.filter(|(n, ..)| !is_routed(*n as u64));
            let wrong: Vec<_> =
                all.filter(|(n, rows, letters)| rows + letters != rows_of(*n as u64)).collect();
            assert!(wrong.is_empty(), "{sink}: (message, rows, letters) {wrong:?}");
        }
        let wrong: Vec<_> = (0..published).filter(|n| is_routed(*n) && routed[*n as usize] != 1).collect();
        assert!(wrong.is_empty(), "in neither sink, or in both: {wrong:?}");
    }

    async fn has_letters_to_repair(&self) -> bool {
        for sink in SINKS {
            if self.world.open_letters(sink).await.iter().any(|(_, by)| by != ROUTES_STEP) {
                return true;
            }
        }
        false
    }

    fn unblock(&self) {
        SINKS.iter().for_each(|sink| self.world.database(sink).unblock());
    }

    async fn swap(&mut self, version: u64) {
        if self.swaps >= SWAPS_MAX {
            self.unblock();
            self.process.drained().await;
            self.swaps = 0;
        }
        self.swaps += 1;
        for backup in &mut self.backups {
            backup.iter_mut().for_each(|(_, swaps)| *swaps += 1);
            // Steps that it needs are not kept any more.
            backup.take_if(|(_, swaps)| *swaps > SWAPS_MAX);
        }
        self.change(version);
    }

    fn change(&mut self, version: u64) {
        (self.generation, self.version) = (self.generation + 1, version);
        self.process.chain.send_replace(self.chain());
    }

    async fn fill(&mut self, sink: usize, published: &mut u64) {
        self.world.database(SINKS[sink]).block();
        for change in 0..=VERSIONS_MAX as u64 {
            self.world.publish_many(DEVICES, *published, 20);
            *published += 20;
            self.process.looked_after().await;
            self.change(1 + change % 4);
            let generation = self.generation;
            let is_taken = |status: &crate::pipeline::PipelineStatus| {
                status.chain == Some(generation) || status.swap_waits.is_some()
            };
            self.process.until("taken", is_taken).await;
        }
        // A backup may need more than are kept, until all have caught up.
        (self.swaps, self.backups) = (SWAPS_MAX + 1, [None, None]);
    }

    /// Sends these again, and what an earlier redrive left.
    async fn redrive(&self, filter: &Filter) {
        self.process.until("steps", |status| status.chain.is_some()).await;
        for filter in [filter, &Filter { ids: Some(Vec::new()), ..Filter::default() }] {
            // A fault is one answer: as many tries as a run can have made.
            for _ in 0..50 {
                if self.process.handle.redrive(filter).await.unwrap().failed.is_empty() {
                    break;
                }
            }
        }
    }
}

async fn play(ops: Vec<Op>) {
    let mut host = Host::new().await;
    let mut published = 0;
    for op in ops {
        match op {
            Op::Publish(count) => {
                host.world.publish_many(DEVICES, published, count);
                published += count;
                host.process.looked_after().await;
            }
            Op::Fail { sink, fault: number } => {
                host.world.database(SINKS[sink]).fail_commits([fault(number)]);
            }
            Op::Block(sink) => host.world.database(SINKS[sink]).block(),
            Op::Unblock => host.unblock(),
            Op::Crash => host = host.restarted(true, None).await,
            Op::Restart => host = host.restarted(false, None).await,
            Op::Swap(version) => host.swap(version).await,
            Op::Fill(sink) => {
                host.fill(sink, &mut published).await;
                host = host.restarted(true, None).await;
            }
            Op::Backup(sink) => {
                host.backups[sink] = (host.swaps <= SWAPS_MAX)
                    .then_some((host.world.database(SINKS[sink]).backup(), host.swaps));
            }
            Op::Restore(sink) => host = host.restarted(true, Some(sink)).await,
            Op::Redrive => {
                host.unblock();
                // What it sends is not in them.
                host.backups = [None, None];
                host.redrive(&Filter::default()).await;
            }
        }
        tokio::task::yield_now().await;
    }
    host.unblock();
    host.process.drained().await;
    host.redrive(&Filter { ids: Some(Vec::new()), ..Filter::default() }).await;
    host.each_once(published).await;
    // All that is repaired becomes rows, once; nobody repaired the route.
    host.world.database("b").refuse(|_| None);
    host.swap(0).await;
    let generation = host.generation;
    host.process.until("repaired", |status| status.chain == Some(generation)).await;
    // Once more where a fault that is left refuses one again.
    while host.has_letters_to_repair().await {
        host.redrive(&Filter::default()).await;
    }
    host.each_once(published).await;
    host.process.stop().await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 50, ..ProptestConfig::default() })]

    #[test]
    fn every_message_is_in_each_sink_once_or_in_one_letter_that_names_it(ops in ops()) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(play(ops));
    }
}
