//! The main job, load and database on the same cores: MQTT QoS 1 → three
//! plugins → PostgreSQL. Throughput to the committed row beside the server's own
//! COPY of the same rows alone, host CPU, memory; then delays at half of that
//! rate, from the intended send time.

use std::fmt::Write;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use headworks_tests::host::{Host, prebuilt};
use headworks_tests::mqtt::{self, Version};
use headworks_tests::postgres::{Database, Postgres};

use crate::load::{open_loop, percentile, send_numbered};
use crate::readings::{DEVICES, Reading, device};
use crate::results::Results;
use crate::rounds;
use crate::server_copy::ServerCopy;

const PUBLISHERS: usize = 8;
/// Devices of one publisher, a gateway.
const DEVICES_EACH: u64 = DEVICES / PUBLISHERS as u64;
/// Rows of one COPY, as many as the sink's transaction takes at most.
const COPY_ROWS: u64 = 5_000;
const WINDOW: u64 = 500;
const PER_PUBLISHER: u64 = 50_000;
const MESSAGES: u64 = PUBLISHERS as u64 * PER_PUBLISHER;
const OPEN_LOOP: Duration = Duration::from_secs(8);

#[derive(Default)]
struct Rounds {
    msgs_per_s: Vec<f64>,
    copy_rows_per_s: Vec<f64>,
    cpu_us: Vec<f64>,
    rss_mb: Vec<f64>,
    ack_p99_ms: Vec<f64>,
    row_p99_ms: Vec<f64>,
}

pub fn run(results: &mut Results) {
    let server = Postgres::start();
    let copy = ServerCopy::new("bench-e2e-copy", MESSAGES / COPY_ROWS, COPY_ROWS);
    let mut all = Rounds::default();
    for _ in 0..rounds() {
        round(&server, &copy, &mut all);
    }
    results.add("e2e_msgs_per_s", &all.msgs_per_s);
    results.add("e2e_rows_per_s_server_copy", &all.copy_rows_per_s);
    results.add_ratio("e2e_ratio_vs_server_copy", &all.msgs_per_s, &all.copy_rows_per_s);
    results.add("e2e_cpu_us_per_msg", &all.cpu_us);
    results.add("e2e_ack_p99_ms", &all.ack_p99_ms);
    results.add("e2e_row_p99_ms", &all.row_p99_ms);
    results.add("host_rss_mb", &all.rss_mb);
}

fn round(server: &Postgres, copy: &ServerCopy, all: &mut Rounds) {
    let mut database = server.database();
    let mut host = start(database.url());

    let cpu = host.process().cpu();
    let begin = Instant::now();
    let ts = micros(SystemTime::now());
    send_numbered(host.mqtt(), PUBLISHERS, WINDOW, PER_PUBLISHER, |publisher, n, out, id| {
        encode(out, &Reading::new(number(publisher, n), ts), id);
    });
    rows(&host, &mut database, MESSAGES);
    let took = begin.elapsed();
    let cpu = host.process().cpu() - cpu;
    let distinct =
        database.query("SELECT count(*) FROM (SELECT DISTINCT device_id, time FROM telemetry) AS once");
    assert_eq!(distinct[0].get::<_, i64>(0).unsigned_abs(), MESSAGES, "every message is a row, once");
    let rate = MESSAGES as f64 / took.as_secs_f64();
    all.msgs_per_s.push(rate);
    all.cpu_us.push(cpu.as_micros() as f64 / MESSAGES as f64);
    all.copy_rows_per_s.push(copy_rows_per_s(&mut database, copy));

    database.execute("TRUNCATE telemetry; CHECKPOINT");
    let mut delays =
        open_loop(host.mqtt(), PUBLISHERS, rate / 2.0, OPEN_LOOP, |publisher, n, due, out, id| {
            encode(out, &Reading { time_us: micros(due), ..Reading::new(number(publisher, n), 0) }, id);
        });
    rows(&host, &mut database, delays.len() as u64);
    all.ack_p99_ms.push(percentile(&mut delays, 0.99) / 1000.0);
    // The event time is the intended send time; xmin's commit is the row's.
    let late = database.query(
        "SELECT percentile_disc(0.99) WITHIN GROUP (
             ORDER BY extract(epoch FROM pg_xact_commit_timestamp(xmin) - time) * 1000)::float8 FROM telemetry",
    );
    all.row_p99_ms.push(late[0].get(0));
    all.rss_mb.push(peak_rss_mb(host.process().id()));
    assert!(host.stop().success());
}

/// Measures COPY of the rows that the table has, while the host and its devices are quiet.
fn copy_rows_per_s(database: &mut Database, copy: &ServerCopy) -> f64 {
    copy.take(database);
    database.execute("TRUNCATE telemetry; CHECKPOINT");
    let took = copy.write(database);
    assert_eq!(database.count("telemetry").unsigned_abs(), MESSAGES, "COPY writes the same rows");
    MESSAGES as f64 / took.as_secs_f64()
}

fn start(url: &str) -> Host {
    let sink = format!("warehouse: {{ type: postgres, url: \"{url}\", table: telemetry }}");
    with_plugins("bench-e2e", "warehouse", &sink)
}

/// A host with the three plugins and one pipeline to these sinks; `sinks` configures them.
pub fn with_plugins(name: &str, to: &str, sinks: &str) -> Host {
    let devices: String = (0..DEVICES).fold(String::new(), |mut text, number| {
        let _ = write!(
            text,
            " {}: {{ location: \"hall {}\", site: north, model: T100 }},",
            device(number),
            number % 7
        );
        text
    });
    let mut host = Host::prepare(
        name,
        &format!(
            "streams: {{ telemetry: {{ partitions: 4 }} }}\n\
             devices: {{ table: {{{devices} }} }}\n\
             pipelines: {{ telemetry: {{ from: telemetry, routes: {{ default: {to}, alert: {to} }} }} }}\n\
             sinks: {{ {sinks} }}\n"
        ),
    );
    for (name, file) in [("normalize", "10-normalize"), ("enrich", "20-enrich"), ("route", "30-route")] {
        host.drop_plugin(&format!("{file}.wasm"), prebuilt(name));
    }
    host.folder.write("plugins/30-route.yaml", "rules:\n  - { when: { above: 1e12 }, route: alert }\n");
    host.run();
    host
}

pub fn micros(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).expect("after 1970").as_micros() as u64
}

/// Over all devices, of a gateway's reading number `n`: its devices take turns.
pub fn number(publisher: usize, n: u64) -> u64 {
    n / DEVICES_EACH * DEVICES + publisher as u64 * DEVICES_EACH + n % DEVICES_EACH
}

pub fn encode(out: &mut Vec<u8>, reading: &Reading, packet_id: u16) {
    let (topic, payload) = (reading.topic(), reading.payload(""));
    mqtt::publish(out, Version::V311, 1, false, &topic, packet_id, payload.as_bytes());
}

/// Returns right after the commit of the last one. (Positions of partitions with nothing to write follow later.)
fn rows(host: &Host, database: &mut Database, wanted: u64) {
    let end = host.end().cast_signed();
    database.changes("headworks_positions", "all rows are committed", |database| {
        let furthest = database.query("SELECT coalesce(max(next_offset), 0) FROM headworks_positions");
        // Counting takes CPU from the host: only near the end.
        let is_near = furthest[0].get::<_, i64>(0) >= end;
        (is_near && database.count("telemetry").unsigned_abs() >= wanted).then_some(())
    });
}

/// The most memory that the process ever had (VmHWM).
fn peak_rss_mb(process: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("Linux");
    let kib: f64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
    kib / 1024.0
}
