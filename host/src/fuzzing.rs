//! What fuzzers run: each target is a function of bytes that panics where a
//! promise is broken. `host/fuzz` hands them to libFuzzer; the tests below run
//! each on its corpus (`host/fuzz/corpus/TARGET`) and a fixed number of changed
//! inputs, the same ones every time. Not part of a normal build.

use std::path::PathBuf;

use crate::config::fuzzing::config;
use crate::listeners::http::batch::{Format, taken};
use crate::listeners::mqtt::fuzzing::{
    broker_state, connection, packets, proxy_header, sent_properties, session, topic_filters, websocket,
};
use crate::plugin::fuzzing::{answer, load};
use crate::stream::log::fuzzing::log_frame;

#[derive(Clone, Copy)]
pub struct Target {
    pub name: &'static str,
    pub run: fn(&[u8]),
    /// Changed inputs that the tests run.
    pub inputs: usize,
}

pub const TARGETS: [Target; 13] = [
    Target { name: "mqtt_packets", run: packets, inputs: 60_000 },
    Target { name: "mqtt_connection", run: connection, inputs: 4_000 },
    Target { name: "mqtt_session", run: session, inputs: 2_000 },
    Target { name: "topic_filters", run: topic_filters, inputs: 20_000 },
    Target { name: "broker_state", run: broker_state, inputs: 4_000 },
    Target { name: "proxy_header", run: proxy_header, inputs: 60_000 },
    Target { name: "websocket", run: websocket, inputs: 10_000 },
    Target { name: "http_batch", run: http_batch, inputs: 60_000 },
    Target { name: "log_frame", run: log_frame, inputs: 60_000 },
    Target { name: "plugin_answer", run: answer, inputs: 60_000 },
    Target { name: "plugin_load", run: load, inputs: 20_000 },
    Target { name: "properties", run: properties, inputs: 60_000 },
    Target { name: "config", run: config, inputs: 300 },
];

/// For the programs of `host/fuzz`.
pub fn run(name: &str, data: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name).expect("a target has this name");
    (target.run)(data);
}

/// Where the first inputs of a target are.
pub fn corpus(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "fuzz/corpus", name].iter().collect()
}

/// First byte: bit 0, a message a line; bit 1, a topic for messages that name none. What is taken can be sent
/// to subscribers.
fn http_batch(data: &[u8]) {
    let Some((mode, body)) = data.split_first() else { return };
    let format = if mode & 1 == 0 { Format::Array } else { Format::Lines };
    let topic = (mode & 2 != 0).then_some("a/b");
    taken(body, format, topic).iter().for_each(|properties| sent_properties(properties));
}

/// A block of properties is whole or not valid, and a valid one can be sent.
fn properties(data: &[u8]) {
    use crate::properties::{Origin, is_valid, iter};
    let whole: usize = iter(data).map(|it| 8 + it.name.len() + it.value.len()).sum();
    assert!(whole <= data.len());
    if !is_valid(data) {
        return;
    }
    assert_eq!(whole, data.len());
    // The listener's own are never those of a message's sender.
    if iter(data).all(|property| property.origin != Origin::Listener as u8) {
        sent_properties(data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// xorshift64*: Vigna, "An experimental exploration of Marsaglia's xorshift generators, scrambled".
    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: usize) -> usize {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % bound.max(1)
        }

        fn range(&mut self, len: usize) -> std::ops::Range<usize> {
            let (a, b) = (self.below(len + 1), self.below(len + 1));
            a.min(b)..a.max(b)
        }
    }

    const TELLING: [u8; 16] =
        [0, 1, 2, 3, 4, 0x10, 0x20, 0x23, 0x26, b'#', b'+', b'/', 0x7f, 0x80, 0xfe, 0xff];

    /// One to four changes of kinds that parsers trip over.
    fn change(random: &mut Random, corpus: &[Vec<u8>]) -> Vec<u8> {
        let mut input = corpus[random.below(corpus.len())].clone();
        for _ in 0..1 + random.below(4) {
            let at = random.below(input.len());
            match random.below(9) {
                0 if !input.is_empty() => input[at] ^= 1 << random.below(8),
                1 if !input.is_empty() => input[at] = TELLING[random.below(TELLING.len())],
                2 if !input.is_empty() => {
                    input[at] = input[at].wrapping_add(random.below(7) as u8).wrapping_sub(3)
                }
                3 => input.truncate(at),
                4 => drop(input.drain(random.range(input.len()))),
                5 => {
                    let again = input[random.range(input.len())].to_vec();
                    input.splice(at..at, again);
                }
                6 => {
                    let other = &corpus[random.below(corpus.len())];
                    let part = other[random.range(other.len())].to_vec();
                    input.splice(at..at, part);
                }
                7 => input.extend_from_slice(&corpus[random.below(corpus.len())]),
                _ => input.insert(at, random.below(256) as u8),
            }
        }
        input.truncate(4_096);
        input
    }

    /// The same as `fuzz/fuzz_targets` has, and each has inputs to begin with.
    #[test]
    fn every_target_has_its_program_and_its_corpus() {
        let programs =
            std::fs::read_dir([env!("CARGO_MANIFEST_DIR"), "fuzz/fuzz_targets"].iter().collect::<PathBuf>());
        let mut programs: Vec<_> = programs
            .unwrap()
            .map(|file| file.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned())
            .collect();
        let mut names = TARGETS.map(|target| target.name);
        programs.sort();
        names.sort();
        assert_eq!(programs, names);
        let manifest: PathBuf = [env!("CARGO_MANIFEST_DIR"), "fuzz/Cargo.toml"].iter().collect();
        let manifest = std::fs::read_to_string(manifest).unwrap();
        for name in names {
            assert!(manifest.contains(&format!("path = \"fuzz_targets/{name}.rs\"")), "{name}");
            assert!(!inputs(name).is_empty(), "{name}");
        }
    }

    fn inputs(name: &str) -> Vec<Vec<u8>> {
        let mut files: Vec<_> =
            std::fs::read_dir(corpus(name)).unwrap().map(|file| file.unwrap().path()).collect();
        files.sort();
        files.iter().map(|file| std::fs::read(file).unwrap()).collect()
    }

    fn hold(name: &str) {
        let target = TARGETS.iter().find(|target| target.name == name).unwrap();
        let corpus = inputs(name);
        corpus.iter().for_each(|input| (target.run)(input));
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        for number in 0..target.inputs {
            let input = change(&mut random, &corpus);
            let held = std::panic::catch_unwind(|| (target.run)(&input));
            assert!(held.is_ok(), "{name}, input {number}: {}", input.escape_ascii());
        }
    }

    macro_rules! hold {
        ($($test:ident: $target:literal,)*) => {
            $(#[test] fn $test() { hold($target); })*
        };
    }

    hold! {
        no_bytes_break_the_reading_of_packets: "mqtt_packets",
        no_bytes_break_a_connection_and_how_they_are_cut_changes_nothing: "mqtt_connection",
        a_session_is_what_its_model_says_over_connections_and_restarts: "mqtt_session",
        filters_find_what_a_naive_matcher_finds: "topic_filters",
        no_state_on_disk_breaks_the_start_of_the_broker: "broker_state",
        no_proxy_header_is_taken_by_half: "proxy_header",
        no_frames_break_a_websocket_and_how_they_are_cut_changes_nothing: "websocket",
        no_bytes_break_the_reading_of_the_log: "log_frame",
        no_answer_of_a_plugin_breaks_the_host: "plugin_answer",
        no_plugin_file_or_compilers_answer_breaks_the_host: "plugin_load",
        a_valid_block_of_properties_can_be_sent: "properties",
        no_text_breaks_the_reading_of_the_config: "config",
    }
}
