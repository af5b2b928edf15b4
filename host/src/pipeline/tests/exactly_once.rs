//! The model: whatever a sink answers and whenever the process dies, each
//! message is in each sink once, or in dead letters once.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::harness::{Act, World, chain, step, text};
use crate::sinks::memory::Fault;

#[derive(Clone, Debug)]
enum Op {
    Publish(u64),
    Fail {
        sink: usize,
        fault: u8,
    },
    /// The process dies without a word, at whatever it does.
    Crash,
    Restart,
    Swap,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        6 => (1..200_u64).prop_map(Op::Publish),
        5 => (0..2_usize, 0..4_u8).prop_map(|(sink, fault)| Op::Fail { sink, fault }),
        2 => Just(Op::Crash),
        1 => Just(Op::Restart),
        1 => Just(Op::Swap),
    ];
    prop::collection::vec(op, 1..25)
}

fn fault(number: u8) -> Fault {
    match number {
        0 => Fault::UnknownWritten,
        1 => Fault::UnknownLost,
        2 => Fault::Retry("connection reset".to_owned()),
        _ => Fault::Data("value out of range".to_owned()),
    }
}

const SINKS: [&str; 2] = ["a", "b"];
const DEVICES: u64 = 7;

fn check_step() -> std::sync::Arc<dyn crate::step::StepFactory> {
    step("check", |message, _| {
        let text = text(message);
        if text.ends_with("11") {
            Act::Refuse("eleven".to_owned())
        } else if text.ends_with("22") {
            Act::Drop
        } else if text.ends_with("33") {
            Act::Twice
        } else if text.ends_with("44") {
            Act::Route("nowhere")
        } else {
            Act::Pass
        }
    })
}

/// How often each message must be in a sink, its bad rows aside.
fn expected(payload: &str) -> usize {
    match payload {
        p if p.ends_with("11") || p.ends_with("22") || p.ends_with("44") => 0,
        p if p.ends_with("33") => 2,
        _ => 1,
    }
}

async fn play(ops: Vec<Op>) {
    let mut world = World::new(3, &[("default", "a b")]);
    world.config.lag_after = crate::units::Period(std::time::Duration::from_millis(20));
    world.database("b").refuse(|message| text(message).ends_with('9').then(|| "nine".to_owned()));
    let mut published = 0;
    let mut generation = 1;
    let mut process = world.start(chain(generation, &[check_step()])).await;
    for op in ops {
        match op {
            Op::Publish(count) => {
                world.publish_many(DEVICES, published, count);
                published += count;
            }
            Op::Fail { sink, fault: number } => world.database(SINKS[sink]).fail_commits([fault(number)]),
            Op::Crash => {
                process.handle.crash();
                process.handle.join().await;
                process = world.start(chain(generation, &[check_step()])).await;
            }
            Op::Restart => {
                process.stop().await;
                process = world.start(chain(generation, &[check_step()])).await;
            }
            Op::Swap => {
                generation += 1;
                process.chain.send_replace(chain(generation, &[check_step()]));
            }
        }
        tokio::task::yield_now().await;
    }
    process.drained().await;
    process.stop().await;

    let mut letters: BTreeMap<(String, String), usize> = BTreeMap::new();
    for (payload, reason) in world.letters().await {
        let who = reason.split(':').next().unwrap_or_default().to_owned();
        *letters.entry((payload, who)).or_default() += 1;
    }
    for n in 0..published {
        let payload = format!("d{}:{n}", n % DEVICES);
        for sink in SINKS {
            let rows = world.payloads(sink).iter().filter(|row| **row == payload).count();
            let by_sink: usize = letters
                .iter()
                .filter(|((p, reason), _)| {
                    *p == payload && matches!(reason.as_str(), "nine" | "the data was refused")
                })
                .map(|(_, count)| count)
                .sum();
            let nine = usize::from(sink == "b" && payload.ends_with('9'));
            if by_sink == 0 {
                assert_eq!(rows, expected(&payload) - nine, "{payload} in {sink}");
            }
            assert!(rows <= expected(&payload), "{payload} in {sink}: {rows}");
        }
        let by_step = letters
            .iter()
            .filter(|((p, reason), _)| *p == payload && (reason == "eleven" || reason.starts_with("route")))
            .map(|(_, c)| c)
            .sum::<usize>();
        let refused = usize::from(payload.ends_with("11") || payload.ends_with("44"));
        assert_eq!(by_step, refused, "letters of {payload}");
    }
    // Each row that a sink refused has its letter: rows and letters add up.
    let total: usize = (0..published).map(|n| expected(&format!("d{}:{n}", n % DEVICES))).sum();
    let by_sinks: usize = letters
        .iter()
        .filter(|((_, reason), _)| matches!(reason.as_str(), "nine" | "the data was refused"))
        .map(|(_, count)| count)
        .sum();
    let rows: usize = SINKS.iter().map(|sink| world.payloads(sink).len()).sum();
    assert_eq!(rows + by_sinks, 2 * total, "rows and letters");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 50, ..ProptestConfig::default() })]

    #[test]
    fn every_message_is_in_each_sink_once_or_in_dead_letters_once(ops in ops()) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(play(ops));
    }
}
