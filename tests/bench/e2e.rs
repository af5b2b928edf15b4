//! The main job, load and database on the same cores: MQTT QoS 1 → three
//! plugins → PostgreSQL. Throughput to the committed row beside the server's own
//! COPY of the same rows alone, host CPU, memory; then delays at half of that
//! rate, from the intended send time.

use std::fmt::Write;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use headworks_tests::folder::Folder;
use headworks_tests::host::{Host, prebuilt};
use headworks_tests::mqtt::{self, Version};
use headworks_tests::postgres::{Database, Postgres};
use headworks_tests::process::run as run_command;

use crate::load::{open_loop, percentile, send_numbered};
use crate::results::Results;
use crate::rounds;

const PUBLISHERS: usize = 8;
/// Devices of one publisher, a gateway. Few devices, or one time for all
/// messages, would make the index cheaper than a plant's does.
const DEVICES_EACH: usize = 125;
/// Between two readings of one device.
const EVERY_US: u128 = 1_000_000;
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
    let folder = Folder::new("bench-e2e-copy");
    // The server's user writes and reads files here.
    run_command(std::process::Command::new("chmod").arg("777").arg(folder.path()));
    let mut all = Rounds::default();
    for _ in 0..rounds() {
        round(&server, &folder, &mut all);
    }
    results.add("e2e_msgs_per_s", &all.msgs_per_s);
    results.add("e2e_rows_per_s_server_copy", &all.copy_rows_per_s);
    results.add_ratio("e2e_ratio_vs_server_copy", &all.msgs_per_s, &all.copy_rows_per_s);
    results.add("e2e_cpu_us_per_msg", &all.cpu_us);
    results.add("e2e_ack_p99_ms", &all.ack_p99_ms);
    results.add("e2e_row_p99_ms", &all.row_p99_ms);
    results.add("host_rss_mb", &all.rss_mb);
}

fn round(server: &Postgres, folder: &Folder, all: &mut Rounds) {
    let mut database = server.database();
    let mut host = start(database.url());

    let cpu = host.process().cpu();
    let begin = Instant::now();
    let ts = micros(SystemTime::now());
    send_numbered(host.mqtt(), PUBLISHERS, WINDOW, PER_PUBLISHER, |publisher, n, out, id| {
        encode(out, publisher, n, ts + u128::from(n) * EVERY_US / DEVICES_EACH as u128, id);
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
    all.copy_rows_per_s.push(copy(&mut database, folder));

    database.execute("TRUNCATE telemetry; CHECKPOINT");
    let mut delays =
        open_loop(host.mqtt(), PUBLISHERS, rate / 2.0, OPEN_LOOP, |publisher, n, due, out, id| {
            encode(out, publisher, n, micros(due), id);
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

/// Rows a second of the server's own COPY, which writes the table's rows again
/// in the order that they have, while the host and its devices are quiet.
fn copy(database: &mut Database, folder: &Folder) -> f64 {
    let file = |number: u64| folder.join(format!("{number}.copy")).display().to_string();
    for number in 0..MESSAGES / COPY_ROWS {
        database.execute(&format!(
            "COPY (SELECT * FROM telemetry OFFSET {} LIMIT {COPY_ROWS}) TO '{}' (FORMAT binary)",
            number * COPY_ROWS,
            file(number)
        ));
    }
    database.execute("TRUNCATE telemetry; CHECKPOINT");
    let begin = Instant::now();
    for number in 0..MESSAGES / COPY_ROWS {
        database.execute(&format!("COPY telemetry FROM '{}' (FORMAT binary)", file(number)));
    }
    let rate = MESSAGES as f64 / begin.elapsed().as_secs_f64();
    assert_eq!(database.count("telemetry").unsigned_abs(), MESSAGES, "COPY writes the same rows");
    rate
}

fn start(url: &str) -> Host {
    let devices: String = (0..PUBLISHERS * DEVICES_EACH).fold(String::new(), |mut text, number| {
        let _ = write!(
            text,
            " {}: {{ location: \"hall {}\", site: north, model: T100 }},",
            device(number),
            number % 7
        );
        text
    });
    let mut host = Host::prepare(
        "bench-e2e",
        &format!(
            "streams: {{ telemetry: {{ partitions: 4 }} }}\n\
             devices: {{ table: {{{devices} }} }}\n\
             pipelines: {{ telemetry: {{ from: telemetry, routes: {{ default: warehouse, alert: warehouse }} }} }}\n\
             sinks: {{ warehouse: {{ type: postgres, url: \"{url}\", table: telemetry }} }}\n"
        ),
    );
    for (name, file) in [("normalize", "10-normalize"), ("enrich", "20-enrich"), ("route", "30-route")] {
        host.drop_plugin(&format!("{file}.wasm"), prebuilt(name));
    }
    host.folder.write("plugins/30-route.yaml", "rules:\n  - { when: { above: 1e12 }, route: alert }\n");
    host.run();
    host
}

fn micros(time: SystemTime) -> u128 {
    time.duration_since(UNIX_EPOCH).expect("after 1970").as_micros()
}

fn device(number: usize) -> String {
    format!("sensor-{number:04}")
}

fn encode(out: &mut Vec<u8>, publisher: usize, n: u64, ts_us: u128, packet_id: u16) {
    let device = device(publisher * DEVICES_EACH + n as usize % DEVICES_EACH);
    let topic = format!("acme/site-01/temperature/{device}/reading");
    let value = 15.0 + (n * 7_919 % 10_007) as f64 / 1_000.0;
    let payload =
        format!(r#"{{"device_id":"{device}","metric":"temperature_c","value":{value},"ts":{ts_us}}}"#);
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
