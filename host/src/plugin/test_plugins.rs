//! Plugins written for tests: core modules in text with the contract's metadata.

use wit_component::StringEncoding;
use wit_parser::Resolve;

use super::arena::{DATA_SEGMENT, LAYOUT, OUTPUT_HEADER_WORDS, STRIDE_WORDS};

const DESCRIPTION: usize = 1024;
const READY: usize = 1200;
const ANSWER: usize = 1304;
const STRINGS: usize = 2048;
const BLOBS: usize = 8192;
const REASON: usize = 100_000;
const HEAP: usize = 131_072;

/// Acts on the first payload byte of each message: P trap, A abort with a
/// text, L loop, M eat memory; keeps all else.
pub fn guarded() -> Vec<u8> {
    batch_plugin("1.0.0", &[], &each_payload(""), "")
}

/// The same with another version and topics.
pub fn guarded_with(version: &str, topics: &[&str]) -> Vec<u8> {
    batch_plugin(version, topics, &each_payload(""), "")
}

/// Gives this answer to every batch that has a message.
pub fn answering(verdicts: &[u8], outputs: &[u8], data: &[u8]) -> Vec<u8> {
    answering_after("", verdicts, outputs, data)
}

/// The same, after this code.
pub fn answering_after(before: &str, verdicts: &[u8], outputs: &[u8], data: &[u8]) -> Vec<u8> {
    let (at_outputs, at_data) = (BLOBS + verdicts.len(), BLOBS + verdicts.len() + outputs.len());
    let blobs = format!("(data (i32.const {BLOBS}) \"{}{}{}\")", hex(verdicts), hex(outputs), hex(data));
    let words = [BLOBS, verdicts.len(), at_outputs, outputs.len(), at_data, data.len()];
    let mut body = format!("{before}(if (local.get $index_len) (then ");
    for (number, word) in words.iter().enumerate() {
        body += &format!("(i32.store (i32.const {}) (i32.const {word}))", ANSWER + number * 4);
    }
    batch_plugin("1.0.0", &[], &(body + "))"), &blobs)
}

/// Emits the first message with all of segment 0 as its payload.
pub fn spying() -> Vec<u8> {
    let of_segment_0 = outputs(&[record(0, &[(2, 4, [0, 0])])]);
    let length_at = BLOBS + 1 + (OUTPUT_HEADER_WORDS + 5) * 4;
    let store = format!("(i32.store (i32.const {length_at}) (local.get $data_len))");
    answering_after(&store, &[2], &of_segment_0, b"")
}

/// `init` narrows to so many topics.
pub fn narrowing(topics: u32) -> Vec<u8> {
    let ready = format!("(data (i32.const {READY}) \"{}\")", hex_words(&[0, 1, BLOBS as u32, topics]));
    batch_plugin("1.0.0", &[], "", &ready)
}

/// Fails messages that start with F with the reason "no good", keeps the others.
pub fn message_plugin() -> Vec<u8> {
    let process = format!(
        r#"(func (export "headworks:plugin/message@1.0.0#process")
          (param i32 i32 i32 i32) (param $payload i32) (param $len i32)
          (param i32 i32 i32 i32 i64 i32 i64 i64 i32) (result i32)
          (i32.store (i32.const {ANSWER}) (i32.const 0))
          (if (i32.eq (i32.load8_u (local.get $payload)) (i32.const 70)) (then
            (i32.store (i32.const {ANSWER}) (i32.const 3))
            (i32.store (i32.const {}) (i32.const {BLOBS}))
            (i32.store (i32.const {}) (i32.const 7))))
          (if (i32.eq (i32.load8_u (local.get $payload)) (i32.const 80)) (then unreachable))
          (i32.const {ANSWER}))
        (data (i32.const {BLOBS}) "no good")"#,
        ANSWER + 4,
        ANSWER + 8
    );
    embed(&module("1.0.0", &[], &process), "message-plugin")
}

/// `init` refuses the config.
pub fn refusing() -> Vec<u8> {
    refusing_times(1)
}

/// The same problem so many times.
pub fn refusing_times(times: usize) -> Vec<u8> {
    refusing_because("too big", times)
}

/// The same with this reason.
pub fn refusing_because(reason: &str, times: usize) -> Vec<u8> {
    // result: 1 (error), list of problems: path "/max", the reason.
    let path = STRINGS + 32;
    let problem = hex_words(&[path as u32, 4, REASON as u32, reason.len() as u32]);
    let problems = format!(
        r#"(data (i32.const {READY}) "{}")(data (i32.const {BLOBS}) "{}")(data (i32.const {path}) "/max")
        (data (i32.const {REASON}) "{reason}")"#,
        hex_words(&[1, BLOBS as u32, times as u32, 0, 0, 0]),
        problem.repeat(times),
    );
    batch_plugin("1.0.0", &[], "", &problems)
}

/// A component's worth of one function that takes long to compile.
pub fn bomb(statements: usize) -> Vec<u8> {
    let mut code = String::from("(func (export \"bomb\") (param i32)");
    for local in 0..200 {
        code += &format!("(local $l{local} i32)");
    }
    for n in 0..statements {
        let (a, b, c) = (n * 7 % 200, n * 13 % 200, n * 29 % 200);
        code += &format!(
            "(if (i32.lt_s (local.get $l{a}) (local.get $l{b})) (then (local.set $l{c} (i32.add (local.get $l{a}) (i32.mul (local.get $l{b}) (local.get 0))))) (else (local.set $l{a} (i32.sub (local.get $l{c}) (local.get 0)))))"
        );
    }
    batch_plugin("1.0.0", &[], "", &(code + ")"))
}

/// An output record that sets what `fields` says: (bit, word, span or word pair).
pub fn record(source: u32, fields: &[(u32, usize, [u32; 2])]) -> Vec<u32> {
    let mut words = vec![0; STRIDE_WORDS];
    words[0] = source;
    for (bit, at, pair) in fields {
        words[1] |= bit;
        words[*at] = pair[0];
        if *at + 1 < STRIDE_WORDS {
            words[*at + 1] = pair[1];
        }
    }
    words
}

/// A span into the answer's data.
pub fn in_data(begin: u32, len: u32) -> [u32; 2] {
    [begin, (DATA_SEGMENT as u32) << 28 | len]
}

pub fn outputs(records: &[Vec<u32>]) -> Vec<u8> {
    let count = records.len() as u32;
    let header = [LAYOUT, OUTPUT_HEADER_WORDS as u32, STRIDE_WORDS as u32, count, 0, 0, 0, 0];
    header.iter().chain(records.iter().flatten()).flat_map(|word| word.to_le_bytes()).collect()
}

fn each_payload(more: &str) -> String {
    format!(
        r#"(local.set $n (i32.shr_u (local.get $index_len) (i32.const 6)))
        (local.set $entry (local.get $index))
        (block $done (loop $next
          (br_if $done (i32.ge_u (local.get $i) (local.get $n)))
          (local.set $span (i32.load offset=36 (local.get $entry)))
          (if (i32.and (local.get $span) (i32.const 0x0fffffff)) (then
            (local.set $segment (local.get $data))
            (if (i32.shr_u (local.get $span) (i32.const 28)) (then
              (local.set $segment (i32.load (i32.sub
                (i32.add (local.get $later) (i32.shl (i32.shr_u (local.get $span) (i32.const 28)) (i32.const 3)))
                (i32.const 8))))))
            (local.set $byte (i32.load8_u (i32.add (local.get $segment) (i32.load offset=32 (local.get $entry)))))
            (if (i32.eq (local.get $byte) (i32.const 80)) (then unreachable))
            (if (i32.eq (local.get $byte) (i32.const 65)) (then
              (call $abort (i32.const {STRINGS}) (i32.const 4) (i32.const {STRINGS}) (i32.const 4) (i32.const 7))))
            (if (i32.eq (local.get $byte) (i32.const 76)) (then (loop $forever (br $forever))))
            (if (i32.eq (local.get $byte) (i32.const 77)) (then
              (loop $eat (br_if $eat (i32.ne (memory.grow (i32.const 16)) (i32.const -1)))) unreachable))
            {more}
          ))
          (local.set $i (i32.add (local.get $i) (i32.const 1)))
          (local.set $entry (i32.add (local.get $entry) (i32.const 64)))
          (br $next)))"#
    )
}

pub fn batch_plugin(version: &str, topics: &[&str], body: &str, more: &str) -> Vec<u8> {
    let process = format!(
        r#"(func (export "headworks:plugin/batch@1.0.0#process")
          (param i32 i32 i32 i32 i64 i64 i64) (param $index i32) (param $index_len i32)
          (param $data i32) (param $data_len i32) (param i32) (param $later i32) (param i32) (result i32)
          (local $i i32) (local $n i32) (local $entry i32) (local $span i32) (local $segment i32) (local $byte i32)
          {body}
          (global.set $heap (i32.const {HEAP}))
          (i32.const {ANSWER}))
        {more}"#
    );
    embed(&module(version, topics, &process), "batch-plugin")
}

fn module(version: &str, topics: &[&str], process: &str) -> String {
    let at_version = STRINGS + 16;
    let at_list = STRINGS + 64;
    let mut at = at_list + topics.len() * 8;
    let mut list = Vec::new();
    let mut text = String::new();
    for topic in topics {
        list.extend([at as u32, topic.len() as u32]);
        at += topic.len();
        text += topic;
    }
    let description = hex_words(&[
        STRINGS as u32,
        4,
        at_version as u32,
        version.len() as u32,
        STRINGS as u32,
        4,
        at_list as u32,
        topics.len() as u32,
        0,
        0,
        0,
        0,
        0,
    ]);
    format!(
        r#"(module
        (import "headworks:plugin/log@1.0.0" "abort" (func $abort (param i32 i32 i32 i32 i32)))
        (memory (export "memory") 4)
        (global $heap (mut i32) (i32.const {HEAP}))
        (func (export "cabi_realloc") (param i32 i32 i32) (param $len i32) (result i32)
          (local $p i32)
          (local.set $p (i32.and (i32.add (global.get $heap) (i32.const 7)) (i32.const -8)))
          (global.set $heap (i32.add (local.get $p) (local.get $len)))
          (block $ok (loop $grow
            (br_if $ok (i32.le_u (global.get $heap) (i32.mul (memory.size) (i32.const 65536))))
            (if (i32.eq (memory.grow (i32.const 16)) (i32.const -1)) (then unreachable))
            (br $grow)))
          (local.get $p))
        (func (export "headworks:plugin/lifecycle@1.0.0#describe") (result i32) (i32.const {DESCRIPTION}))
        (func (export "headworks:plugin/lifecycle@1.0.0#init")
          (param i32 i32 i32 i32 i32 i32 i32 i32 i64 i64 i32 i32 i32) (result i32) (i32.const {READY}))
        (data (i32.const {DESCRIPTION}) "{description}")
        (data (i32.const {STRINGS}) "test")
        (data (i32.const {at_version}) "{version}")
        (data (i32.const {at_list}) "{}{text}")
        {process})"#,
        hex_words(&list)
    )
}

/// The module in binary with the contract's metadata for `world`.
pub fn embed(text: &str, world: &str) -> Vec<u8> {
    let mut module = wat::parse_str(text).expect("a module in text");
    let mut resolve = Resolve::default();
    let contract = concat!(env!("CARGO_MANIFEST_DIR"), "/../wit/plugin.wit");
    let contract = std::fs::read_to_string(contract).expect("the contract lies in the tree");
    let package = resolve.push_source("plugin.wit", &contract).expect("the contract parses");
    let world = resolve.select_world(&[package], Some(world)).expect("the contract has this world");
    wit_component::embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8)
        .expect("a module takes it");
    module
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("\\{byte:02x}")).collect()
}

fn hex_words(words: &[u32]) -> String {
    words.iter().map(|word| hex(&word.to_le_bytes())).collect()
}
