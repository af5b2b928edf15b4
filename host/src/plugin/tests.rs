//! A bad plugin harms only its own messages.

use std::sync::Arc;

use serde_json::Value;

use super::lines::tests::{trapping, with_line};
use super::test_plugins::{
    answering, batch_plugin, guarded, guarded_with, in_data, message_plugin, narrowing, outputs, record,
    refusing, spying,
};
use super::{Limits, OnFailure, Runner};
use crate::batch::{Batch, Entry, Partition, Span, flags};
use crate::properties::{self, Origin};
use crate::step::{Attempt, Outcome, Refused, RefusedKind, Step};
use crate::units::ByteSize;

fn limits() -> Limits {
    Limits { cpu_ms: 40, memory: ByteSize::mib(8), ..Limits::default() }
}

fn runner(bytes: &[u8]) -> Runner {
    Runner::from_bytes(bytes, &Value::Null, limits(), Arc::default(), Arc::default()).unwrap()
}

/// Messages on `a/b/c/dN/e` with these payloads.
pub(super) fn batch(payloads: &[&str]) -> Batch {
    let mut bytes = Vec::new();
    let entries = payloads
        .iter()
        .enumerate()
        .map(|(number, payload)| {
            let begin = bytes.len();
            let device = format!("d{number}");
            bytes.extend_from_slice(format!("a/b/c/{device}/e").as_bytes());
            let topic = Span::new(0, begin, bytes.len() - begin);
            let payload_begin = bytes.len();
            bytes.extend_from_slice(payload.as_bytes());
            Entry {
                flags: flags::FITS_NAMESPACE | 1,
                partition: Partition(3),
                offset: number as u32,
                received_us: 5,
                topic,
                device: Span::new(0, begin + 6, device.len()),
                payload: Span::new(0, payload_begin, payload.len()),
                ..Entry::default()
            }
        })
        .collect();
    Batch { segments: vec![bytes.into()], entries, now_us: 7, exclusive: true, ..Batch::default() }
}

fn payloads(batch: &Batch) -> Vec<String> {
    batch.messages().map(|m| String::from_utf8_lossy(m.payload()).into_owned()).collect()
}

fn run(runner: &mut Runner, batch: Batch) -> Outcome {
    runner.run(batch, Partition(3), Attempt::FIRST)
}

/// The only fault's reason, everything else having passed in order.
fn only_poison_is_refused(poison: &str) -> String {
    let mut runner = runner(&guarded());
    let outcome = run(&mut runner, batch(&["one", poison, "three", "four"]));
    assert_eq!(payloads(&outcome.passed), ["one", "three", "four"]);
    assert_eq!(outcome.refused.len(), 1);
    assert_eq!((outcome.refused[0].index, outcome.refused[0].kind), (1, RefusedKind::Fault));
    // It works on.
    assert_eq!(run(&mut runner, batch(&["five"])).passed.len(), 1);
    outcome.refused.into_iter().next().unwrap().reason
}

#[test]
fn kept_messages_pass_without_a_copy() {
    let batch = batch(&["one", "two"]);
    let outcome = run(&mut runner(&guarded()), batch.clone());
    assert_eq!(outcome.passed.entries, batch.entries);
    assert_eq!(outcome.passed.segments[0].as_ptr(), batch.segments[0].as_ptr());
}

#[test]
fn a_trap_refuses_the_poison_and_the_others_pass_in_order() {
    assert!(only_poison_is_refused("P").contains("unreachable"));
}

#[test]
fn a_panics_text_becomes_the_reason() {
    assert_eq!(only_poison_is_refused("A"), "test (test:7)");
}

#[test]
fn a_trap_says_where_it_was_in_every_language_that_has_names() {
    let outcome = run(&mut runner(&trapping()), batch(&["x"]));
    let reason = &outcome.refused[0].reason;
    assert!(reason.contains("unreachable") && reason.contains("in blow_up, called by from_here"), "{reason}");
}

#[test]
fn a_trap_says_its_file_and_line_where_the_file_has_debug_information() {
    for version in [4, 5] {
        let file = with_line(&trapping(), version, "src", "plugin.c", 7);
        let outcome = run(&mut runner(&file), batch(&["x"]));
        let reason = &outcome.refused[0].reason;
        assert!(reason.contains("in blow_up (src/plugin.c:7), called by from_here"), "{reason}");
    }
}

#[test]
fn the_first_fault_of_a_batch_is_the_one_that_is_told() {
    let reason = only_poison_is_refused("L");
    assert!(reason.starts_with("took over 40 ms of CPU"), "the limit that was set: {reason}");
    assert!(reason.contains("; alone, with an eighth of the limits: took over"), "{reason}");
    // The batch ended at the first one; the other is told for what it did alone.
    let outcome = run(&mut runner(&guarded()), batch(&["one", "P", "L", "four"]));
    let reasons: Vec<&str> = outcome.refused.iter().map(|refused| &*refused.reason).collect();
    assert!(reasons[0].contains("unreachable") && !reasons[0].contains("alone"), "{reasons:?}");
    assert!(reasons[1].starts_with("alone, with an eighth of the limits: took over"), "{reasons:?}");
}

#[test]
fn a_loop_is_cut_by_its_cpu_time() {
    assert!(only_poison_is_refused("L").contains("ms of CPU"));
}

#[test]
fn a_plugin_that_eats_memory_meets_its_limit() {
    let reason = only_poison_is_refused("M");
    assert!(reason.contains("more than 8 MiB of memory (limits.memory)"), "{reason}");
}

#[test]
fn a_message_plugin_gives_the_same_verdicts() {
    let outcome = run(&mut runner(&message_plugin()), batch(&["one", "F", "P", "four"]));
    assert_eq!(payloads(&outcome.passed), ["one", "four"]);
    let refused: Vec<_> = outcome.refused.iter().map(|r| (r.index, r.kind)).collect();
    assert_eq!(refused, [(1, RefusedKind::Failed), (2, RefusedKind::Fault)]);
    assert_eq!(outcome.refused[0].reason, "no good");
}

#[test]
fn after_three_faults_the_step_does_as_its_config_says() {
    let run_with = |on_failure| {
        let (devices, namespace) = Default::default();
        let mut runner =
            Runner::with_failure(&guarded(), &Value::Null, limits(), devices, namespace, on_failure).unwrap();
        run(&mut runner, batch(&["P1", "P2", "P3", "P4", "five"]))
    };
    let pass = run_with(OnFailure::Pass);
    assert_eq!(
        (payloads(&pass.passed), pass.refused.len()),
        (vec!["P3".into(), "P4".into(), "five".into()], 2)
    );
    let held = run_with(OnFailure::Hold).retry.unwrap();
    assert!(held.contains("on_failure: hold, the last time: ") && held.contains("unreachable"), "{held}");
    assert_eq!(run_with(OnFailure::DeadLetters).refused.len(), 4);
}

#[test]
fn every_call_that_faults_is_counted() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let mut runner = metrics::with_local_recorder(&recorder, || runner(&guarded()));
    assert_eq!(run(&mut runner, batch(&["P", "one", "P", "P"])).refused.len(), 3);
    let rendered = recorder.handle().render();
    let counted = rendered.lines().find(|line| line.starts_with("headworks_step_faults_total{"));
    let counted = counted.and_then(|line| line.rsplit_once(' ')).map(|(_, count)| count);
    assert_eq!(counted, Some("4"), "one with all messages, and one with each guilty one");
}

#[test]
fn messages_that_no_filter_matches_pass_unseen_in_order() {
    let plugin = guarded_with("1.0.0", &["a/+/+/d1/#", "a/+/+/d3/#"]);
    let outcome = run(&mut runner(&plugin), batch(&["P", "one", "P", "P", "P"]));
    assert_eq!(payloads(&outcome.passed), ["P", "one", "P", "P"]);
    assert_eq!(outcome.refused[0].index, 3);
}

#[test]
fn emitted_messages_have_what_was_set_and_keep_the_rest() {
    let data = b"new/topicpayloadroutedevice";
    let fields = [
        (1, 2, in_data(0, 9)),
        (2, 4, in_data(9, 7)),
        (8, 8, in_data(16, 5)),
        (16, 10, [77, 0]),
        (32, 12, in_data(21, 6)),
        (64, 14, [2 | 4, 0]),
    ];
    let records = [record(1, &fields), record(1, &[(2, 4, [0, 4])])];
    let mut plugin = runner(&answering(&[0, 2, 1], &outputs(&records), data));
    let mut input = batch(&["zero", "one", "two"]);
    let mut bytes = Vec::new();
    properties::push(&mut bytes, Origin::Listener, "client-id", b"c");
    input.segments.push(bytes.clone().into());
    input.entries.to_mut()[1].properties = Span::new(1, 0, bytes.len());
    let outcome = run(&mut plugin, input);
    assert_eq!((outcome.dropped, outcome.passed.len()), (1, 3));
    let first = outcome.passed.message(1);
    assert_eq!((first.topic(), first.payload(), first.route()), ("new/topic", &b"payload"[..], "route"));
    assert_eq!((first.device(), first.event_us()), ("device", Some(77)));
    assert_eq!(first.entry.flags, 2 | flags::RETAIN | flags::EVENT_TIME | flags::CHANGED);
    assert_eq!(properties::get(first.properties(), Origin::Listener, "client-id"), Some(&b"c"[..]));
    let second = outcome.passed.message(2);
    // A slice of the input: the first four bytes of segment 0.
    assert_eq!((second.topic(), second.payload()), ("a/b/c/d1/e", &b"a/b/"[..]));
    assert_eq!(second.entry.partition, Partition(3));
}

#[test]
fn the_listeners_facts_cannot_be_set_or_lost() {
    let mut forged = Vec::new();
    properties::push(&mut forged, Origin::Listener, "client-id", b"forged");
    properties::push(&mut forged, Origin::Device, "k", b"v");
    let records = [record(0, &[(4, 6, in_data(0, forged.len() as u32))])];
    let mut input = batch(&["x"]);
    let mut facts = Vec::new();
    properties::push(&mut facts, Origin::Listener, "client-id", b"true");
    properties::push(&mut facts, Origin::Device, "old", b"");
    input.segments.push(facts.clone().into());
    input.entries.to_mut()[0].properties = Span::new(1, 0, facts.len());
    let outcome = run(&mut runner(&answering(&[2], &outputs(&records), &forged)), input);
    let message = outcome.passed.message(0);
    let found: Vec<_> = properties::iter(message.properties()).map(|p| (p.name, p.value)).collect();
    assert_eq!(found, [("client-id", &b"true"[..]), ("k", &b"v"[..])]);
}

#[test]
fn fail_refuses_with_its_reason_and_retry_comes_again_until_its_bound() {
    let reason = [record(0, &[(2, 4, in_data(0, 8))])];
    let outcome = run(&mut runner(&answering(&[3], &outputs(&reason), b"not JSON")), batch(&["x"]));
    assert_eq!((outcome.refused[0].kind, &*outcome.refused[0].reason), (RefusedKind::Failed, "not JSON"));
    let mut retrying = runner(&answering(&[4, 0], &outputs(&reason), b"not yet!"));
    let mut run = |attempt| retrying.run(batch(&["x", "kept"]), Partition(0), attempt);
    assert_eq!(run(Attempt::FIRST).retry.as_deref(), Some("not yet!"));
    let last = run(Attempt { number: 3, is_last: true });
    assert_eq!((last.retry, last.refused.len(), payloads(&last.passed)), (None, 1, vec!["kept".to_owned()]));
    let Refused { kind, reason, .. } = &last.refused[0];
    assert_eq!(
        (*kind, &**reason),
        (RefusedKind::Retries, "asked for a retry 3 times, the last time: not yet!")
    );
}

#[test]
fn a_sparse_batch_gives_the_same_result_as_a_dense_one() {
    let all = batch(&["zero", "one", "P", "three", "four", "five", "six", "seven"]);
    let sparse = Batch { entries: vec![all.entries[1], all.entries[7]].into(), ..all };
    let outcome = run(&mut runner(&guarded()), sparse);
    assert_eq!(payloads(&outcome.passed), ["one", "seven"]);
    let message = outcome.passed.message(1);
    assert_eq!((message.topic(), message.device()), ("a/b/c/d7/e", "d7"));
}

#[test]
fn a_batch_with_all_segments_in_use_still_takes_new_bytes() {
    let mut input = batch(&["x"]);
    input.segments.resize(crate::batch::SEGMENTS_MAX, bytes::Bytes::from_static(b"filler"));
    let records = [record(0, &[(2, 4, in_data(0, 3))])];
    let outcome = run(&mut runner(&answering(&[2], &outputs(&records), b"new")), input);
    assert_eq!(payloads(&outcome.passed), ["new"]);
    assert_eq!(outcome.passed.message(0).topic(), "a/b/c/d0/e");
}

#[test]
fn a_batch_larger_than_the_plugins_memory_runs_in_parts() {
    let large = "x".repeat(300 << 10);
    let outcome = run(&mut runner(&guarded()), batch(&[large.as_str(); 24]));
    assert_eq!((outcome.passed.len(), outcome.refused.len()), (24, 0));
}

#[test]
fn every_kind_of_nonsense_is_a_fault_that_names_itself() {
    let emit = |fields: &[(u32, usize, [u32; 2])]| outputs(&[record(0, fields)]);
    let header = |at: usize, word: u32| {
        let mut bytes = outputs(&[record(0, &[])]);
        bytes[at * 4..at * 4 + 4].copy_from_slice(&word.to_le_bytes());
        bytes
    };
    let data = b"a/+\xff\0ok";
    let none: Vec<u8> = Vec::new();
    let many = outputs(&vec![record(0, &[]); 65]);
    let big = outputs(&vec![record(0, &[(2, 4, [0, 11])]); 64]);
    let cases: [(&str, &[u8], &[u8]); 25] = [
        ("2 verdicts for 1 messages", &[0, 0], &none),
        ("verdict 5", &[5], &none),
        ("needs an output record", &[2], &none),
        ("needs an output record", &[3], &outputs(&[])),
        ("shorter than their header", &[2], &[0; 31]),
        ("layout must be 1", &[2], &header(0, 2)),
        ("header-words", &[2], &header(1, 7)),
        ("header-words", &[2], &header(1, u32::MAX)),
        ("stride", &[2], &header(2, 15)),
        ("their length", &[2], &header(3, 2)),
        ("their length", &[2], &header(3, u32::MAX)),
        ("its source", &[2], &outputs(&[record(1, &[])])),
        ("its source", &[2], &outputs(&[record(u32::MAX, &[])])),
        ("its source", &[], &outputs(&[record(0, &[])])),
        ("kept or dropped", &[1], &outputs(&[record(0, &[])])),
        ("exactly one record", &[3], &outputs(&vec![record(0, &[(2, 4, in_data(5, 2))]); 2])),
        ("need a reason", &[3], &outputs(&[record(0, &[])])),
        ("reason is not UTF-8", &[4], &emit(&[(2, 4, in_data(3, 1))])),
        ("more than 64", &[2], &many),
        ("its topic must", &[2], &emit(&[(1, 2, in_data(0, 3))])),
        ("its payload lies outside", &[2], &emit(&[(2, 4, in_data(6, 2))])),
        ("its payload lies outside", &[2], &emit(&[(2, 4, [u32::MAX, 15 << 28 | 0x0fff_ffff])])),
        ("its payload lies outside", &[2], &emit(&[(2, 4, [0, 1 << 28 | 1])])),
        ("its QoS", &[2], &emit(&[(64, 14, [3, 0])])),
        ("properties are not well formed", &[2], &emit(&[(4, 6, in_data(0, 5))])),
    ];
    for (expected, verdicts, outputs) in cases {
        let outcome = run(&mut runner(&answering(verdicts, outputs, data)), batch(&["x"]));
        assert_eq!(outcome.passed.len(), 0, "{expected}");
        let reason = &outcome.refused[0].reason;
        assert!(
            outcome.refused[0].kind == RefusedKind::Fault && reason.contains(expected),
            "{expected}: {reason}"
        );
    }
    for (expected, fields) in [
        ("route", (8, 8, in_data(3, 1))),
        ("device id", (32, 12, in_data(3, 1))),
        ("its topic", (1, 2, in_data(0, 0))),
        ("its topic", (1, 2, in_data(4, 1))),
    ] {
        let outcome = run(&mut runner(&answering(&[2], &emit(&[fields]), data)), batch(&["x"]));
        assert!(outcome.refused[0].reason.contains(expected), "{:?}", outcome.refused);
    }
    let few = Limits { output_bytes_min: ByteSize(16), output_bytes_factor: 1, ..limits() };
    let mut plugin =
        Runner::from_bytes(&answering(&[2], &big, b""), &Value::Null, few, Arc::default(), Arc::default())
            .unwrap();
    assert!(run(&mut plugin, batch(&["x"])).refused[0].reason.contains("bytes out"));
}

#[test]
fn a_refused_config_names_its_key() {
    let error = Runner::from_bytes(&refusing(), &Value::Null, limits(), Arc::default(), Arc::default());
    assert_eq!(error.err().unwrap().to_string(), "config: config.max: too big");
}

#[test]
fn the_standard_plugins_load_and_normalize_what_a_device_sends() {
    let prebuilt = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../plugins/prebuilt");
    let load = |file: &str| {
        let bytes = std::fs::read(prebuilt.join(file)).unwrap();
        Runner::from_bytes(&bytes, &Value::Null, Limits::default(), Arc::default(), Arc::default()).unwrap()
    };
    for (file, name) in
        [("10-normalize.wasm", "normalize"), ("20-enrich.wasm", "enrich"), ("30-route.wasm", "route")]
    {
        assert_eq!(load(file).description().name, name);
    }
    let mut normalize = load("10-normalize.wasm");
    let good = r#"{"device_id":"d0","value":21.5,"ts":1700000000}"#;
    let received = Batch { now_us: 1_700_000_001_000_000, ..batch(&[good, "not JSON"]) };
    let outcome = run(&mut normalize, received);
    assert!(payloads(&outcome.passed)[0].contains("ts_utc"), "{outcome:?}");
    assert_eq!((outcome.refused[0].index, outcome.refused[0].kind), (1, RefusedKind::Failed));
}

#[test]
fn a_later_step_never_sees_bytes_that_an_earlier_one_changed_or_took_out() {
    let redacted = outputs(&[record(0, &[(2, 4, in_data(0, 8))])]);
    let mut spy = runner(&spying());
    let mut seen_after = |earlier: &[u8], input: Batch| {
        let outcome = run(&mut runner(earlier), input);
        payloads(&run(&mut spy, outcome.passed).passed).concat()
    };
    let mut dropping = answering(&[1, 0], &[], b"");
    for (earlier, input) in [
        (answering(&[2], &redacted, b"REDACTED"), batch(&["secret"])),
        (std::mem::take(&mut dropping), batch(&["secret", "open"])),
        (
            answering(&[3, 0], &outputs(&[record(0, &[(2, 4, in_data(0, 2))])]), b"no"),
            batch(&["secret", "open"]),
        ),
        (guarded(), batch(&["Psecret", "open"])),
    ] {
        let seen = seen_after(&earlier, input);
        assert!(seen.contains("a/b/c/d") && !seen.contains("secret"), "{seen}");
    }
    // Bytes of a message that another call has: of its fate here nothing is known.
    let all = batch(&["secret", "open"]);
    let part = all.filtered(|entry| entry.offset == 1);
    let seen = seen_after(&guarded(), part);
    assert!(seen.contains("open") && !seen.contains("secret"), "{seen}");
    // What nobody changed is still given whole, without a copy.
    let untouched = run(&mut runner(&guarded()), all.clone()).passed;
    assert!(untouched.exclusive && untouched.segments[0].as_ptr() == all.segments[0].as_ptr());
}

#[test]
fn a_step_that_is_not_started_again_yet_rejects_what_it_selects_and_passes_the_rest() {
    let mut step = runner(&guarded_with("1.0.0", &["a/+/+/d1/#"]));
    step.use_up_patience();
    let outcome = run(&mut step, batch(&["one", "P", "three"]));
    assert_eq!(payloads(&outcome.passed), ["one", "three"]);
    let Refused { index, kind, reason } = &outcome.refused[0];
    assert_eq!((*index, *kind), (1, RefusedKind::Fault));
    assert!(reason.contains("unreachable") && reason.contains("not started again yet"), "{reason}");
    let outcome = run(&mut step, batch(&["one", "two"]));
    assert_eq!((payloads(&outcome.passed), outcome.refused.len()), (vec!["one".to_owned()], 1));
    // The step of all messages starts at once: nobody waits who is not concerned.
    let mut all = runner(&guarded());
    all.use_up_patience();
    assert_eq!(payloads(&run(&mut all, batch(&["P", "two"])).passed), ["two"]);
}

#[test]
fn a_plugin_that_faults_only_on_several_messages_gets_fewer_at_a_time() {
    let mut together = runner(&batch_plugin(
        "1.0.0",
        &[],
        "(if (i32.gt_u (local.get $index_len) (i32.const 64)) (then unreachable))",
        "",
    ));
    let eight = ["0", "1", "2", "3", "4", "5", "6", "7"];
    for _ in 0..2 {
        let outcome = run(&mut together, batch(&eight));
        assert_eq!((payloads(&outcome.passed).len(), outcome.refused.len()), (8, 0));
    }
    assert_eq!(together.call_messages_max(), 1);
    // With time it is tried with more again.
    for _ in 0..64 {
        run(&mut together, batch(&["x"]));
    }
    assert_eq!(together.call_messages_max(), 2);
}

/// Emits 64 messages of each one, as they came; faults on several together.
fn copying(fields: &[(u32, usize, [u32; 2])]) -> Vec<u8> {
    let alone = "(if (i32.gt_u (local.get $index_len) (i32.const 64)) (then unreachable))";
    let records = outputs(&vec![record(0, fields); 64]);
    super::test_plugins::answering_after(alone, &[2], &records, b"")
}

#[test]
fn all_that_a_step_makes_of_a_batch_counts_together() {
    let large = "x".repeat(20 << 10);
    let in_bytes = 16 * large.len() as u64;
    let bytes_of =
        |batch: &Batch| batch.messages().map(|m| m.payload().len() + m.properties().len()).sum::<usize>();
    let outcome = run(&mut runner(&copying(&[])), batch(&[large.as_str(); 16]));
    assert!(bytes_of(&outcome.passed) as u64 <= 5 * in_bytes, "{}", bytes_of(&outcome.passed));
    assert!(
        outcome.refused.iter().all(|refused| refused.reason.contains("bytes out")),
        "{:?}",
        outcome.refused
    );
    // What the host adds of the listener's counts as well.
    let mut facts = Vec::new();
    properties::push(&mut facts, Origin::Listener, "correlation-data", &[0; 60_000]);
    let mut input = batch(&["x"; 16]);
    input.segments.push(facts.clone().into());
    for entry in input.entries.to_mut() {
        entry.properties = Span::new(1, 0, facts.len());
    }
    let outcome = run(&mut runner(&copying(&[(4, 6, in_data(0, 0))])), input);
    assert!(bytes_of(&outcome.passed) <= 5 * 16 * facts.len(), "{}", bytes_of(&outcome.passed));
    assert!(!outcome.refused.is_empty());
}

#[test]
fn a_chain_makes_no_more_of_one_message_than_one_step_may() {
    let mut step = runner(&copying(&[]));
    let first = run(&mut step, batch(&["x", "y"])).passed;
    assert_eq!(first.len(), 128);
    let second = run(&mut step, first);
    assert!(second.passed.len() <= 128, "{}", second.passed.len());
    assert!(second.refused[0].reason.contains("more than 64 messages out"), "{:?}", second.refused[0]);
}

#[test]
fn what_init_says_is_bounded() {
    let load = |bytes: &[u8]| {
        let loaded = Runner::from_bytes(bytes, &Value::Null, limits(), Arc::default(), Arc::default());
        loaded.err().unwrap().to_string()
    };
    let said = load(&narrowing(2_000));
    assert!(said.contains("narrows to 2000 topics, at most 1024"), "{said}");
    let said = load(&super::test_plugins::refusing_times(5_000));
    assert_eq!(said.matches("too big").count(), 64);
    let said = load(&super::test_plugins::refusing_because(&"x".repeat(4 << 10), 64));
    assert!((4 << 10..32 << 10).contains(&said.len()), "{}", said.len());
}

#[test]
fn a_plugin_is_told_which_attempt_it_is() {
    // Traps on any but the first; the header's words are the first parameters.
    let wants_first = "(if (i32.ne (local.get 3) (i32.const 1)) (then unreachable))";
    let mut runner = runner(&super::test_plugins::answering_after(wants_first, &[0], &[], b""));
    assert_eq!(payloads(&run(&mut runner, batch(&["x"])).passed), ["x"]);
    let again = runner.run(batch(&["x"]), Partition(0), Attempt { number: 2, is_last: false });
    assert_eq!(again.refused.len(), 1);
}
