//! The broker beside mosquitto, by the CPU of the broker's process: a message
//! to many subscribers, pairs of publisher and subscriber, what filters cost that
//! a message does not meet, and a wildcard subscription beside many retained
//! messages. What the load takes is not in it.
//! Every message sent must be delivered: else there is no figure.

use std::io::Write;
use std::net::SocketAddr;
use std::time::Duration;

use headworks_tests::mosquitto::Mosquitto;
use headworks_tests::mqtt::{self, Connection, Version, kind};

use crate::crowd::Crowd;
use crate::ingest;
use crate::results::Results;
use crate::rounds;

const PAYLOAD: [u8; 256] = [b'x'; 256];

/// One publisher, QoS 0: bursts of so many, the next once all have the last.
const FANOUT_SUBSCRIBERS: usize = 500;
const FANOUT_BURST: u64 = 10;
const FANOUT_MESSAGES: u64 = 2_000;
/// The same message by message: no batch helps.
const FANOUT_SINGLE_MESSAGES: u64 = 400;

/// Each pair has a topic of its own and so many in flight, QoS 1 both ways.
const PAIRS: usize = 100;
const PAIR_WINDOW: u64 = 10;
const PAIR_MESSAGES: u64 = 2_000;

/// Filters of one client.
const FILTERS_PER_CLIENT: usize = 1_000;
const FILTER_CLIENTS: usize = 100;
/// The two hosts take turns within a round, so that the machine's moods meet both.
const FILTERED_TURNS: u64 = 5;
const FILTERED_MESSAGES: u64 = 200_000;
const MARK: &str = "mark";

/// As many as `retained_messages_max` lets there be; each lookup finds one of them.
const RETAINED_TOPICS: u64 = 100_000;
/// A process' CPU time comes in ticks of 10 ms: fewer lookups would take a few of them.
const LOOKUP_CLIENTS: u64 = 10;
const LOOKUPS_PER_CLIENT: u64 = 2_000;
const LOOKUPS: u64 = LOOKUP_CLIENTS * LOOKUPS_PER_CLIENT;
const LOOKUPS_AT_ONCE: u64 = 100;

type CpuOf<'a> = &'a dyn Fn() -> Duration;

pub fn run(results: &mut Results) {
    fanout_and_pairs(results);
    foreign_filters(results);
    retained_lookups(results);
}

fn fanout_and_pairs(results: &mut Results) {
    let mosquitto = Mosquitto::start();
    let mut host = ingest::host("");
    let addrs = [host.mqtt(), mosquitto.addr];
    let (ours, theirs) = (host.process(), mosquitto.process());
    let cpus: [CpuOf<'_>; 2] = [&|| ours.cpu(), &|| theirs.cpu()];

    let kinds = [("fanout", FANOUT_BURST, FANOUT_MESSAGES), ("fanout_single", 1, FANOUT_SINGLE_MESSAGES)];
    for (name, burst, messages) in kinds {
        let mut cpu_us = [Vec::new(), Vec::new()];
        for _ in 0..rounds() {
            for i in [1, 0] {
                let took = fanout(addrs[i], cpus[i], burst, messages);
                cpu_us[i].push(micros(took, messages * FANOUT_SUBSCRIBERS as u64));
            }
        }
        results.add(&format!("{name}_cpu_us"), &cpu_us[0]);
        results.add(&format!("{name}_cpu_us_mosquitto"), &cpu_us[1]);
        results.add_ratio(&format!("{name}_ratio_vs_mosquitto"), &cpu_us[1], &cpu_us[0]);
    }

    let mut cpu_us = [Vec::new(), Vec::new()];
    for _ in 0..rounds() {
        for i in [1, 0] {
            cpu_us[i].push(micros(pairs(addrs[i], cpus[i]), PAIRS as u64 * PAIR_MESSAGES));
        }
    }
    results.add("pubsub_cpu_us", &cpu_us[0]);
    results.add("pubsub_cpu_us_mosquitto", &cpu_us[1]);
    results.add_ratio("pubsub_ratio_vs_mosquitto", &cpu_us[1], &cpu_us[0]);
    host.stop();
}

fn micros(cpu: Duration, count: u64) -> f64 {
    cpu.as_nanos() as f64 / 1_000.0 / count as f64
}

fn fanout(addr: SocketAddr, cpu: CpuOf<'_>, burst: u64, messages: u64) -> Duration {
    let filter = |_| "acme/site-01/news/#".to_owned();
    let mut subscribers = Crowd::connect(addr, "reader", FANOUT_SUBSCRIBERS, Some((0, &filter)));
    let mut publisher = Crowd::connect(addr, "writer", 1, None);
    let mut out = Vec::new();
    for _ in 0..burst {
        mqtt::publish(&mut out, Version::V311, 0, false, "acme/site-01/news/load-0000", 0, &PAYLOAD);
    }
    let mut delivered = vec![0; FANOUT_SUBSCRIBERS];
    let before = cpu();
    for sent in (burst..=messages).step_by(burst as usize) {
        publisher.send(0, &out);
        let mut missing = burst * FANOUT_SUBSCRIBERS as u64;
        while missing > 0 {
            subscribers.receive(|number, packet, _| {
                assert_eq!((packet.first, packet.body.len()), (0x30, 2 + 27 + PAYLOAD.len()));
                delivered[number] += 1;
                missing -= 1;
            });
        }
        assert!(delivered.iter().all(|count| *count == sent), "each subscriber gets each message once");
    }
    cpu() - before
}

fn pairs(addr: SocketAddr, cpu: CpuOf<'_>) -> Duration {
    let topic = |pair: usize| format!("acme/site-01/temperature/pair-{pair:04}/reading");
    let mut subscribers = Crowd::connect(addr, "pair-reader", PAIRS, Some((1, &topic)));
    let mut publishers = Crowd::connect(addr, "pair-writer", PAIRS, None);
    let mut states = vec![Pair::default(); PAIRS];
    let topics: Vec<String> = (0..PAIRS).map(topic).collect();
    let before = cpu();
    let mut out = Vec::new();
    loop {
        for (number, state) in states.iter_mut().enumerate() {
            out.clear();
            while state.sent < PAIR_MESSAGES && state.sent - state.acked.min(state.delivered) < PAIR_WINDOW {
                state.sent += 1;
                mqtt::publish(
                    &mut out,
                    Version::V311,
                    1,
                    false,
                    &topics[number],
                    state.sent as u16,
                    &PAYLOAD,
                );
            }
            if !out.is_empty() {
                publishers.send(number, &out);
            }
        }
        if states.iter().any(|state| state.delivered < state.sent) {
            subscribers.receive(|number, packet, answer| {
                assert_eq!(packet.first, 0x32, "QoS 1, sent once");
                let at = 2 + topics[number].len();
                assert_eq!(packet.body.len(), at + 2 + PAYLOAD.len());
                states[number].delivered += 1;
                answer.extend([0x40, 2, packet.body[at], packet.body[at + 1]]);
            });
        }
        if states.iter().any(|state| state.acked < state.sent) {
            publishers.receive(|number, packet, _| {
                let state = &mut states[number];
                state.acked += 1;
                assert_eq!((packet.kind(), u64::from(packet.packet_id())), (kind::PUBACK, state.acked));
            });
        }
        if states.iter().all(|state| state.delivered == PAIR_MESSAGES && state.acked == PAIR_MESSAGES) {
            return cpu() - before;
        }
        assert!(states.iter().all(|state| state.delivered <= state.sent), "each message is delivered once");
    }
}

#[derive(Clone, Default)]
struct Pair {
    sent: u64,
    acked: u64,
    delivered: u64,
}

/// CPU of a publish that only the log wants: beside filters that it does not
/// meet, though they share levels with its topic, and beside one.
fn foreign_filters(results: &mut Results) {
    let mut hosts = [ingest::host(""), ingest::host("")];
    let mut foreign: Vec<Connection> =
        (0..FILTER_CLIENTS).map(|number| foreign_client(hosts[1].mqtt(), number)).collect();
    let mut cpu_us = [Vec::new(), Vec::new()];
    for _ in 0..rounds() {
        // Within their keep alive.
        foreign.iter_mut().for_each(|client| client.ping().expect("the broker answers"));
        let mut took = [Duration::ZERO; 2];
        for i in [0, 1].repeat(FILTERED_TURNS as usize) {
            let addr = hosts[i].mqtt();
            let process = hosts[i].process();
            took[i] += unmet(addr, &|| process.cpu());
        }
        for (cpu_us, took) in cpu_us.iter_mut().zip(took) {
            cpu_us.push(micros(took, FILTERED_TURNS * FILTERED_MESSAGES));
        }
    }
    let [one, many] = cpu_us;
    results.add("publish_cpu_us_1_filter", &one);
    results.add("publish_cpu_us_100k_filters", &many);
    results.add_ratio("subscribe_cost_ratio_100k", &many, &one);
    hosts.iter_mut().for_each(|host| assert!(host.stop().success()));
}

/// A SUBSCRIBE with wildcards that matches one retained message.
fn retained_lookups(results: &mut Results) {
    let mosquitto = Mosquitto::start();
    let mut host = ingest::host("");
    let addrs = [host.mqtt(), mosquitto.addr];
    addrs.into_iter().for_each(retain_all);
    let (ours, theirs) = (host.process(), mosquitto.process());
    let cpus: [CpuOf<'_>; 2] = [&|| ours.cpu(), &|| theirs.cpu()];
    let mut us = [Vec::new(), Vec::new()];
    for round in 0..rounds() as u64 {
        for i in [1, 0] {
            let numbers: Vec<u64> =
                (0..LOOKUPS).map(|n| (round * LOOKUPS + n) * 499 % RETAINED_TOPICS).collect();
            let took =
                numbers.chunks(LOOKUPS_PER_CLIENT as usize).map(|some| look_up(addrs[i], cpus[i], some));
            us[i].push(micros(took.sum(), LOOKUPS));
        }
    }
    results.add("retained_lookup_us_100k", &us[0]);
    results.add("retained_lookup_us_100k_mosquitto", &us[1]);
    results.add_ratio("retained_lookup_ratio_vs_mosquitto", &us[0], &us[1]);
    host.stop();
}

fn retained_topic(n: u64) -> String {
    format!("acme/site-{}/dev-{}/state/{}", n % 7, n / 10, n % 10)
}

fn retain_all(addr: SocketAddr) {
    let mut connection = Connection::open(addr, Version::V311, "retains", true).expect("the broker accepts");
    let numbers: Vec<u64> = (0..RETAINED_TOPICS).collect();
    for numbers in numbers.chunks(500) {
        let mut out = Vec::new();
        for (packet_id, n) in (1..).zip(numbers) {
            let from = out.len();
            mqtt::publish(&mut out, Version::V311, 1, false, &retained_topic(*n), packet_id, b"v");
            out[from] |= 1;
        }
        connection.stream.write_all(&out).expect("the broker reads");
        let mut acked = 0;
        while acked < numbers.len() {
            connection.receive(|packet| acked += usize::from(packet.kind() == kind::PUBACK)).expect("acks");
        }
    }
}

/// A client subscribes to a filter for each of these topics.
fn look_up(addr: SocketAddr, cpu: CpuOf<'_>, numbers: &[u64]) -> Duration {
    let mut connection = Connection::open(addr, Version::V311, "looks-up", true).expect("the broker accepts");
    let before = cpu();
    for numbers in numbers.chunks(LOOKUPS_AT_ONCE as usize) {
        let mut out = Vec::new();
        for (packet_id, n) in (1..).zip(numbers) {
            let filter = format!("acme/+/dev-{}/+/{}", n / 10, n % 10);
            mqtt::subscribe(&mut out, Version::V311, packet_id, &[(&filter, 0)]);
        }
        connection.stream.write_all(&out).expect("the broker reads");
        let (mut subscribed, mut found) = (0, 0);
        while (subscribed, found) != (numbers.len(), numbers.len()) {
            let each = |packet: mqtt::Packet<'_>| match packet.kind() {
                kind::SUBACK => subscribed += 1,
                kind::PUBLISH => found += 1,
                other => panic!("packet {other:#x}"),
            };
            connection.receive(each).expect("the broker answers");
        }
    }
    cpu() - before
}

fn foreign_client(addr: SocketAddr, number: usize) -> Connection {
    let mut connection = Connection::open(addr, Version::V311, &format!("foreign-{number}"), true)
        .expect("the broker accepts");
    let filters: Vec<String> =
        (0..FILTERS_PER_CLIENT).map(|i| foreign_filter(number * FILTERS_PER_CLIENT + i)).collect();
    for filters in filters.chunks(100) {
        let filters: Vec<(&str, u8)> = filters.iter().map(|filter| (&**filter, 0)).collect();
        connection.subscribe(Version::V311, &filters).expect("the broker subscribes");
    }
    connection
}

/// None matches `acme/site-01/temperature/load-NNNN/reading`; each shares levels with it.
fn foreign_filter(n: usize) -> String {
    match n % 8 {
        0 => format!("acme/site-01/temperature/other-{n}/#"),
        1 => format!("acme/site-01/temperature/+/alarm-{n}"),
        2 => format!("acme/+/temperature/other-{n}/reading"),
        3 => format!("acme/site-01/+/+/state-{n}/#"),
        4 => format!("+/site-01/temperature/+/limit-{n}"),
        5 => format!("+/+/+/other-{n}/+"),
        6 => format!("acme/site-{n}/temperature/#"),
        _ => format!("+/+/temperature/+/reading/{n}"),
    }
}

/// Until the fan-out has passed all: a last message that is delivered says so.
fn unmet(addr: SocketAddr, cpu: CpuOf<'_>) -> Duration {
    let mut mark = Crowd::connect(addr, "mark-reader", 1, Some((0, &|_| MARK.to_owned())));
    let mut publisher = Crowd::connect(addr, "load", 1, None);
    let mut out = Vec::new();
    for number in 0..100 {
        let topic = format!("acme/site-01/temperature/load-{number:04}/reading");
        mqtt::publish(&mut out, Version::V311, 0, false, &topic, 0, &PAYLOAD);
    }
    let before = cpu();
    for _ in 0..FILTERED_MESSAGES / 100 {
        publisher.send(0, &out);
    }
    out.clear();
    mqtt::publish(&mut out, Version::V311, 0, false, MARK, 0, b"");
    publisher.send(0, &out);
    let mut marks = 0;
    while marks == 0 {
        mark.receive(|_, packet, _| {
            assert_eq!(packet.body.len(), 2 + MARK.len(), "nothing else was asked for");
            marks += 1;
        });
    }
    assert_eq!(marks, 1);
    cpu() - before
}
