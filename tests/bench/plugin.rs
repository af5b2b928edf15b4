//! What a plugin costs per message through the host's real path, against the
//! same work compiled natively: `headworks_guest::batch::run` with the same
//! function (`plugin_bench::{pass, emit, json}`), chosen once a batch on both
//! sides, over a copy of the batch made for it, as a plugin gets one; without
//! that copy is shown beside it. Batches of 256, 42 B topic, 193 B payload.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use headworks::batch::{Batch, Entry, Offset, Partition, Span, flags};
use headworks::devices::Devices;
use headworks::plugin::{Limits, Runner};
use headworks::step::{Attempt, Step};
use headworks::topic::Namespace;
use headworks_guest::batch::{Answer, Message, Messages, Output, Verdict};
use headworks_guest::testing::BatchBuilder;
use headworks_tests::host::fresh;

use crate::results::Results;
use crate::rounds;

const MESSAGES: usize = 256;
const BATCHES: usize = 2_000;
const TOPIC: &str = "acme/site-01/temperature/sensor-01/reading";
const DEVICE: &str = "sensor-01";
const NOW_US: u64 = 1_767_225_600_000_000;

pub fn run(results: &mut Results) {
    assert_eq!((TOPIC.len(), payload().len()), (42, 193));
    measure(results, "pass", plugin_bench::pass);
    measure(results, "emit", plugin_bench::emit);
    measure(results, "json", plugin_bench::json);
}

fn measure(
    results: &mut Results,
    work: &str,
    native: impl Fn(&Message<'_>, &mut Output<'_>) -> Verdict + Copy,
) {
    let wasm = std::fs::read(fresh("plugin-bench")).expect("built by plugins/build.sh");
    let config = serde_json::json!({ "work": work });
    let namespace = Arc::new(Namespace::parse(Namespace::DEFAULT_PATTERN).expect("the default"));
    let mut runner =
        Runner::from_bytes(&wasm, &config, Limits::default(), Arc::new(Devices::default()), namespace)
            .expect("the benchmark's plugin runs");
    let batch = batch();
    check(&runner.run(batch.clone(), Partition(0), Attempt::FIRST).passed, work);

    let names: Vec<String> =
        ["org", "site", "device_type", "device_id", "measurement"].map(str::to_owned).into();
    let mut builder = BatchBuilder::new(NOW_US);
    for _ in 0..MESSAGES {
        builder.message(TOPIC, payload().as_bytes(), DEVICE, true);
    }
    let mut answer = Answer::new();

    let (mut ours, mut theirs, mut without_copy) = (Vec::new(), Vec::new(), Vec::new());
    // The first pair warms caches and is thrown away.
    for round in 0..=rounds() {
        let begin = Instant::now();
        for _ in 0..BATCHES {
            let messages = builder.messages(black_box(&names));
            headworks_guest::batch::run(&messages, &mut answer, native);
            black_box(&answer);
        }
        let in_place = begin.elapsed();
        let begin = Instant::now();
        for _ in 0..BATCHES {
            let (header, index, data) = builder.parts();
            let (index, data) = (black_box(index.to_vec()), black_box(data.to_vec()));
            let messages =
                Messages::new(header, &index, [&data[..]], black_box(&names)).expect("a whole index");
            headworks_guest::batch::run(&messages, &mut answer, native);
            black_box(&answer);
        }
        let natively = begin.elapsed();
        let begin = Instant::now();
        for _ in 0..BATCHES {
            black_box(runner.run(black_box(batch.clone()), Partition(0), Attempt::FIRST));
        }
        let in_wasm = begin.elapsed();
        if round > 0 {
            let per_message =
                |time: std::time::Duration| time.as_nanos() as f64 / (BATCHES * MESSAGES) as f64;
            ours.push(per_message(in_wasm));
            theirs.push(per_message(natively));
            without_copy.push(per_message(in_place));
        }
    }
    results.add(&format!("plugin_{work}_ns"), &ours);
    results.add(&format!("plugin_{work}_ns_native"), &theirs);
    results.add_ratio(&format!("plugin_{work}_ratio_vs_native"), &ours, &theirs);
    // For the record: natively, with the messages where they are.
    results.add(&format!("plugin_{work}_ns_native_in_place"), &without_copy);
}

fn check(passed: &Batch, work: &str) {
    assert_eq!(passed.len(), MESSAGES, "{work}: all pass");
    let message = passed.message(MESSAGES - 1);
    let text = std::str::from_utf8(message.payload()).expect("JSON");
    match work {
        "json" => {
            let json: serde_json::Value = serde_json::from_str(text).expect("JSON");
            assert_eq!(json["value"], json["value_copy"]);
        }
        _ => assert_eq!(text, payload()),
    }
}

fn payload() -> String {
    let mut text = format!(
        r#"{{"device_id":"{DEVICE}","metric":"temperature_c","value":21.5,"ts":1767225600000,"unit":"celsius","firmware":"1.24.3","battery":0.87,"note":""#
    );
    while text.len() < 193 - 2 {
        text.push('n');
    }
    text + "\"}"
}

fn batch() -> Batch {
    let mut bytes = Vec::new();
    let mut span = |part: &[u8]| {
        let begin = bytes.len();
        bytes.extend_from_slice(part);
        Span::new(0, begin, part.len())
    };
    let entries = (0..MESSAGES)
        .map(|i| {
            let topic = span(TOPIC.as_bytes());
            let device = Span::new(0, topic.range().start + TOPIC.find(DEVICE).expect("in it"), DEVICE.len());
            Entry {
                flags: flags::FITS_NAMESPACE,
                offset: i as u32,
                received_us: NOW_US,
                topic,
                payload: span(payload().as_bytes()),
                device,
                ..Entry::default()
            }
        })
        .collect();
    Batch { base: Offset(0), now_us: NOW_US, segments: vec![Bytes::from(bytes)], entries, exclusive: true }
}
