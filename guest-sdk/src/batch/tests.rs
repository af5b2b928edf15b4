use alloc::string::{String, ToString};
use alloc::vec::Vec;

use super::*;
use crate::abi;
use crate::testing::BatchBuilder;

fn namespace() -> Vec<String> {
    ["org", "site", "device_type", "device_id", "measurement"].map(String::from).to_vec()
}

fn batch() -> BatchBuilder {
    let mut batch = BatchBuilder::new(1_000_000);
    batch.message("acme/north/t/t-1/reading", b"{\"value\":1}", "t-1", true);
    batch.message("test/hello", b"ping", "client-7", false);
    batch.message("acme/north/t/t-2/reading", b"", "t-2", true);
    batch
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at * 4..at * 4 + 4].try_into().unwrap())
}

#[test]
fn a_message_reads_as_it_was_written() {
    let (batch, names) = (batch(), namespace());
    let messages = batch.messages(&names);
    let message = messages.get(0).unwrap();
    assert_eq!(message.topic(), "acme/north/t/t-1/reading");
    assert_eq!((message.device(), message.route(), message.payload()), ("t-1", "", &b"{\"value\":1}"[..]));
    assert_eq!((message.field("site"), message.field("measurement")), (Some("north"), Some("reading")));
    assert_eq!(message.field("colour"), None);
    assert_eq!((message.event_us(), message.now_us()), (None, 1_000_000));
    assert_eq!(messages.get(1).unwrap().field("site"), None, "its topic does not fit");
    assert_eq!((messages.len(), messages.get(3).is_none()), (3, true));
    assert_eq!(messages.get(2).unwrap().offset(), 2);
}

#[test]
fn keeping_all_answers_with_nothing() {
    let (batch, names) = (batch(), namespace());
    let mut answer = Answer::new();
    run(&batch.messages(&names), &mut answer, |_, _| Verdict::Keep);
    assert_eq!((answer.verdicts.len(), answer.outputs.len(), answer.data.len()), (0, 0, 0));
}

#[test]
fn verdicts_and_records_lie_as_the_contract_says() {
    let (batch, names) = (batch(), namespace());
    let mut answer = Answer::new();
    run(&batch.messages(&names), &mut answer, |message, out| match message.number() {
        0 => Verdict::Keep,
        1 => Verdict::fail("no"),
        _ => {
            out.emit().payload(b"new").event_us(-5);
            out.emit().route("alert").verdict()
        }
    });
    assert_eq!(answer.verdicts, [0, 3, 2]);
    assert_eq!((0..4).map(|i| word(&answer.outputs, i)).collect::<Vec<_>>(), [1, 8, 16, 3]);
    assert_eq!(answer.outputs.len(), 32 + 3 * 64);
    let record = |i: usize| &answer.outputs[32 + i * 64..];
    assert_eq!((word(record(0), 0), word(record(0), 1)), (1, abi::set::PAYLOAD));
    assert_eq!((word(record(0), 4), word(record(0), 5)), (0, 15 << 28 | 2));
    assert_eq!((word(record(1), 0), word(record(1), 1)), (2, abi::set::PAYLOAD | abi::set::EVENT_US));
    assert_eq!((word(record(1), 10), word(record(1), 11)), (-5i32 as u32, u32::MAX));
    assert_eq!((word(record(2), 0), word(record(2), 1)), (2, abi::set::ROUTE));
    assert_eq!(answer.data, b"nonewalert");
}

#[test]
fn records_without_the_verdict_to_emit_are_taken_back() {
    let (batch, names) = (batch(), namespace());
    let mut answer = Answer::new();
    run(&batch.messages(&names), &mut answer, |message, out| {
        out.emit().payload(b"never");
        if message.number() == 1 { Verdict::retry("later") } else { Verdict::Drop }
    });
    assert_eq!(answer.verdicts, [1, 4, 1]);
    assert_eq!(word(&answer.outputs, 3), 1);
    assert_eq!(answer.data, b"later");
}

#[test]
fn a_part_of_the_payload_points_into_the_input() {
    let (batch, names) = (batch(), namespace());
    let messages = batch.messages(&names);
    let mut answer = Answer::new();
    run(&messages, &mut answer, |message, out| match message.number() {
        0 => out.emit().payload_part(message, 1..8).verdict(),
        _ => Verdict::Keep,
    });
    assert_eq!(word(&answer.outputs[32..], 5), 7, "segment 0, length 7");
    assert!(answer.data.is_empty());
}

#[test]
fn an_answer_is_used_again_without_remains() {
    let (batch, names) = (batch(), namespace());
    let mut answer = Answer::new();
    run(&batch.messages(&names), &mut answer, |_, out| out.emit().payload(b"x").verdict());
    run(&batch.messages(&names), &mut answer, |_, _| Verdict::Keep);
    assert!(answer.verdicts.is_empty() && answer.outputs.is_empty() && answer.data.is_empty());
}

#[test]
fn a_longer_stride_is_read_past() {
    let (batch, names) = (batch(), namespace());
    let (header, index, data) = batch.parts();
    let header = Header { stride: 18, ..header };
    let mut wider = Vec::new();
    for entry in index.chunks(64) {
        wider.extend(entry);
        wider.extend([0xff; 8]);
    }
    let messages = Messages::new(header, &wider, [data], &names).unwrap();
    let topics = |messages: &Messages<'_>| {
        let (mut of_run, mut numbers) = (Vec::new(), Vec::new());
        run(messages, &mut Answer::new(), |message, _| {
            of_run.push(message.topic().to_string());
            numbers.push(message.number());
            Verdict::Keep
        });
        assert!(numbers.into_iter().eq(0..messages.len()));
        assert_eq!(of_run, messages.iter().map(|m| m.topic().to_string()).collect::<Vec<_>>());
        of_run
    };
    assert_eq!(topics(&messages), topics(&batch.messages(&names)));
    assert_eq!(topics(&messages)[2], "acme/north/t/t-2/reading");
    wider.truncate(wider.len() - 1);
    assert!(Messages::new(header, &wider, [data], &names).is_none(), "an entry is cut");
    assert!(Messages::new(Header { stride: 15, ..header }, index, [data], &names).is_none());
}

#[test]
fn a_part_of_a_payload_never_reaches_into_another_message() {
    let (batch, names) = (batch(), namespace());
    let messages = batch.messages(&names);
    let part = |range: core::ops::Range<usize>| {
        let mut answer = Answer::new();
        run(&messages, &mut answer, |message, out| match message.number() {
            0 => out.emit().payload_part(message, range.clone()).verdict(),
            _ => Verdict::Keep,
        });
        let at = abi::OUTPUT_HEADER_WORDS + abi::record::PAYLOAD;
        (word(&answer.outputs, at), word(&answer.outputs, at + 1) & 0x0fff_ffff)
    };
    let (begin, length) = part(0..usize::MAX);
    assert_eq!(length, 11);
    assert_eq!(part(2..5), (begin + 2, 3));
    assert_eq!(part(5..100), (begin + 5, 6));
    assert_eq!(part(50..100), (begin + 11, 0));
}

#[test]
fn what_would_lose_a_message_without_a_word_is_a_fault() {
    let faults = |each: fn(&mut Output<'_>) -> Verdict| {
        let (batch, names) = (batch(), namespace());
        std::panic::catch_unwind(|| {
            run(&batch.messages(&names), &mut Answer::new(), |_, out| each(out));
        })
        .is_err()
    };
    assert!(faults(|out| {
        out.emit().route("alert");
        Verdict::Keep
    }));
    assert!(faults(|_| Verdict::Emit));
    assert!(faults(|out| out.emit().properties([("n".repeat(70_000).as_str(), &b""[..])]).verdict()));
    assert!(!faults(|out| {
        out.emit().route("alert");
        out.emit().verdict()
    }));
}
