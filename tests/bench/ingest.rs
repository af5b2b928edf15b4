//! Acks a second of 8 publishers, QoS 1, 256 B, window 100: ours after the sync
//! of each message, mosquitto as Debian ships it.

use std::time::Duration;

use headworks_tests::host::Host;
use headworks_tests::mosquitto::Mosquitto;

use crate::load::{Acked, USER, closed_loop};
use crate::results::Results;
use crate::rounds;

const PUBLISHERS: usize = 8;
const WINDOW: u16 = 100;
const PAYLOAD: [u8; 256] = [b'x'; 256];
const ROUND: Duration = Duration::from_secs(3);
const SYNC_DELAYS: [(&str, &str); 4] = [("0.1", "100us"), ("1", "1ms"), ("5", "5ms"), ("10", "10ms")];

pub fn run(results: &mut Results) {
    let mosquitto = Mosquitto::start();
    let (mut host, mut guarded) = (host(""), guarded());
    let (mut ours, mut theirs, mut with_access) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds() {
        theirs.push(round(mosquitto.addr).per_second());
        ours.push(counted(&host).per_second());
        with_access.push(counted(&guarded).per_second());
    }
    host.stop();
    guarded.stop();
    drop(mosquitto);
    results.add("ingest_acks_per_s", &ours);
    results.add("ingest_acks_per_s_mosquitto", &theirs);
    results.add_ratio("ingest_acks_ratio_vs_mosquitto", &ours, &theirs);
    results.add("ingest_acks_per_s_with_access", &with_access);
    results.add_ratio("ingest_acks_ratio_vs_mosquitto_with_access", &with_access, &theirs);

    let by_delay: Vec<(&str, Vec<f64>)> = SYNC_DELAYS
        .iter()
        .map(|(name, delay)| {
            let mut host = self::host(&format!(", sync_delay: {delay}"));
            let acks = (0..rounds()).map(|_| counted(&host).per_second()).collect();
            host.stop();
            (*name, acks)
        })
        .collect();
    results.add_object("ingest_acks_by_sync_ms", &by_delay);
}

/// Everything is logged and synced, then dropped by the pipeline, as a broker without subscribers does.
pub fn host(stream: &str) -> Host {
    Host::start("bench-ingest", &config(stream))
}

/// The same with a password file and rules: each device publishes below its own id only.
fn guarded() -> Host {
    let mqtt = "mqtt:\n  listeners: [ { bind: 127.0.0.1:0 } ]\n  access:\n    \
        authenticate: [ { type: passwords, file: passwords } ]\n    rules:\n      \
        - { effect: deny, action: publish, topics: [\"acme/+/secret/#\"] }\n      \
        - { effect: allow, user: \"ops-*\", topics: [\"#\"] }\n      \
        - { effect: allow, user: load, action: publish, topics: [\"acme/+/+/%c/+\"] }\n";
    let mut host = Host::prepare_with("bench-ingest-access", mqtt, &config(""));
    let (name, password) = USER;
    host.passwd(name, password, &[]);
    host.run();
    host
}

pub fn config(stream: &str) -> String {
    format!(
        "streams: {{ telemetry: {{ partitions: 4, retention: {{ max_bytes: 2GiB }}{stream} }} }}\n\
         sinks: {{ unused: {{ type: sqlite, path: data/unused.db }} }}\n\
         pipelines: {{ telemetry: {{ from: telemetry, routes: {{ default: drop, unused: unused }} }} }}\n"
    )
}

fn round(addr: std::net::SocketAddr) -> Acked {
    closed_loop(addr, PUBLISHERS, WINDOW, &PAYLOAD, ROUND)
}

/// A round whose acks are all of durable messages.
fn counted(host: &Host) -> Acked {
    let durable = || host.metric("headworks_stream_messages_total", &[("stream", "telemetry")]) as u64;
    let before = durable();
    let acked = round(host.mqtt());
    let after = durable();
    assert_eq!(after - before, acked.messages, "every ack is of one durable message");
    acked
}
