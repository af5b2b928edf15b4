//! A pipeline with several sinks, whose steps write once to a stream that each sink reads.
//!
//! | key | what it is |
//! | --- | --- |
//! | `e2e_three_sinks_msgs_per_s` | the load and the plugins of `e2e`, one pipeline to PostgreSQL, SQLite and InfluxDB: messages a second until the last of the three has all |
//! | `e2e_three_sinks_cpu_us_per_msg` | the host's CPU for it, a message |
//! | `through_stream_cpu_us_per_msg`, `direct_cpu_us_per_msg` | the host's CPU a message, no steps, data in memory, every message a row of one SQLite file: with a second sink in the pipeline, to which no message goes, so that both read the stream; and with one sink, which reads the source |
//! | `derived_stream_cpu_us_per_msg` | the first minus the second, round by round: what the stream costs |
//! | `healthy_p99_ms`, `healthy_p99_ms_alone`, `healthy_p99_ms_beside_healthy` | 99th percentile of a row's delay in PostgreSQL, from the intended send time to the commit: beside a second sink whose table another session has locked; as the only sink; beside a second sink that works |
//! | `healthy_p99_ratio` | the first to the second, round by round |

use std::time::{Duration, Instant, SystemTime};

use headworks_tests::folder::Folder;
use headworks_tests::host::{Host, MQTT};
use headworks_tests::influxdb::Influxdb;
use headworks_tests::postgres::{Database, Postgres};
use headworks_tests::telemetry;

use crate::e2e::{encode, micros, number, with_plugins};
use crate::load::{open_loop, send_numbered};
use crate::readings::Reading;
use crate::results::Results;
use crate::rounds;

const PUBLISHERS: usize = 8;
const WINDOW: u64 = 500;
const PER_PUBLISHER: u64 = 25_000;
const MESSAGES: u64 = PUBLISHERS as u64 * PER_PUBLISHER;
/// Between two looks at what the host has written: 50 of them cost it less than one message in a thousand.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Time after which the last row must be there. Otherwise something hangs.
const WRITTEN_MAX: Duration = Duration::from_secs(180);
const OPEN_LOOP: Duration = Duration::from_secs(5);
const OPEN_LOOP_MESSAGES_PER_S: f64 = 2_000.0;

pub fn run(results: &mut Results) {
    three_sinks(results);
    derived_stream(results);
    healthy_beside_sick(results);
}

fn three_sinks(results: &mut Results) {
    let (server, influxdb) = (Postgres::start(), Influxdb::start());
    let (mut msgs_per_s, mut cpu_us) = (Vec::new(), Vec::new());
    for _ in 0..rounds() {
        let mut database = server.database();
        let mut host = with_plugins(
            "bench-three-sinks",
            "[pg, lite, influx]",
            &format!(
                "pg: {{ type: postgres, url: \"{}\", table: telemetry }}, \
                 lite: {{ type: sqlite, path: data/telemetry.db, table: telemetry }}, \
                 influx: {{ type: influxdb, url: \"{}\", version: 1, database: iot }}",
                database.url(),
                influxdb.url()
            ),
        );
        let (took, cpu) = measured(&mut host, &["pg", "lite", "influx"]);
        msgs_per_s.push(MESSAGES as f64 / took.as_secs_f64());
        cpu_us.push(cpu);
        let distinct =
            database.query("SELECT count(*) FROM (SELECT DISTINCT device_id, time FROM telemetry) AS once");
        assert_eq!(distinct[0].get::<_, i64>(0).unsigned_abs(), MESSAGES, "every message is a row, once");
        let lite = host.folder.join("data/telemetry.db");
        assert_eq!(telemetry::sqlite_count(&lite, "telemetry"), MESSAGES, "in SQLite too");
        let points = influxdb.query("SELECT count(\"value\") FROM telemetry");
        assert_eq!(points[0][1].as_u64(), Some(MESSAGES), "each is a point");
        assert!(host.stop().success());
        influxdb.post("/query?db=iot&q=DROP%20MEASUREMENT%20telemetry", "");
    }
    results.add("e2e_three_sinks_msgs_per_s", &msgs_per_s);
    results.add("e2e_three_sinks_cpu_us_per_msg", &cpu_us);
}

fn derived_stream(results: &mut Results) {
    let (mut direct, mut through) = (Vec::new(), Vec::new());
    for _ in 0..rounds() {
        direct.push(memory_cpu_us("{ default: rows }", ""));
        let unused = ", unused: { type: sqlite, path: data/unused.db, table: telemetry }";
        through.push(memory_cpu_us("{ default: rows, unused: unused }", unused));
    }
    let difference: Vec<f64> =
        through.iter().zip(&direct).map(|(through, direct)| through - direct).collect();
    results.add("through_stream_cpu_us_per_msg", &through);
    results.add("direct_cpu_us_per_msg", &direct);
    results.add("derived_stream_cpu_us_per_msg", &difference);
}

/// The host's CPU a message where every message is a row of the sink `rows`.
fn memory_cpu_us(routes: &str, more: &str) -> f64 {
    let config = format!(
        "streams: {{ telemetry: {{ partitions: 4 }} }}\n\
         pipelines: {{ telemetry: {{ from: telemetry, steps: [], routes: {routes} }} }}\n\
         sinks: {{ rows: {{ type: sqlite, path: data/telemetry.db, table: telemetry }}{more} }}\n"
    );
    let mut host = Host::prepare_in(Folder::in_memory("bench-derived"), MQTT, &config);
    host.run();
    let (_, cpu) = measured(&mut host, &["rows"]);
    assert!(host.stop().success());
    cpu
}

/// Sends all messages; returns the time until each of the sinks has written all, and the host's CPU a message in
/// microseconds.
fn measured(host: &mut Host, sinks: &[&str]) -> (Duration, f64) {
    let before = host.process().cpu();
    let (begin, ts) = (Instant::now(), micros(SystemTime::now()));
    send_numbered(host.mqtt(), PUBLISHERS, WINDOW, PER_PUBLISHER, |publisher, n, out, id| {
        encode(out, &Reading::new(number(publisher, n), ts), id);
    });
    let written = |sink| {
        let labels = [("pipeline", "telemetry"), ("sink", sink), ("outcome", "written")];
        host.metric("headworks_sink_rows_total", &labels) as u64
    };
    while sinks.iter().any(|sink| written(*sink) < MESSAGES) {
        assert!(begin.elapsed() < WRITTEN_MAX, "not all messages become rows");
        std::thread::sleep(LOOK_EVERY);
    }
    let took = begin.elapsed();
    let cpu = host.process().cpu() - before;
    (took, cpu.as_micros() as f64 / MESSAGES as f64)
}

fn healthy_beside_sick(results: &mut Results) {
    let server = Postgres::start();
    let (mut alone, mut beside_healthy, mut beside_sick) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds() {
        alone.push(row_p99_ms(&server, &["telemetry"], None));
        beside_healthy.push(row_p99_ms(&server, &["telemetry", "other"], None));
        beside_sick.push(row_p99_ms(&server, &["telemetry", "other"], Some("other")));
    }
    results.add("healthy_p99_ms", &beside_sick);
    results.add("healthy_p99_ms_alone", &alone);
    results.add("healthy_p99_ms_beside_healthy", &beside_healthy);
    results.add_ratio("healthy_p99_ratio", &beside_sick, &alone);
}

/// The delay of rows of the first table; nothing is written to the `locked` one while it is measured.
fn row_p99_ms(server: &Postgres, tables: &[&str], locked: Option<&str>) -> f64 {
    let mut database = server.database();
    let sink =
        |table: &&str| format!("{table}: {{ type: postgres, url: \"{}\", table: {table} }}", database.url());
    let sinks = tables.iter().map(sink).collect::<Vec<_>>().join(", ");
    let mut host = with_plugins("bench-healthy", &format!("[{}]", tables.join(", ")), &sinks);
    let mut locker = Database::connect(database.url()).expect("the server runs");
    if let Some(table) = locked {
        locker.execute(&format!("BEGIN; LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE"));
    }
    let delays = open_loop(
        host.mqtt(),
        PUBLISHERS,
        OPEN_LOOP_MESSAGES_PER_S,
        OPEN_LOOP,
        |publisher, n, due, out, id| {
            encode(out, &Reading { time_us: micros(due), ..Reading::new(number(publisher, n), 0) }, id);
        },
    );
    let sent = delays.len() as i64;
    let all = |database: &mut Database| (database.count(tables[0]) >= sent).then_some(());
    database.changes(tables[0], "all rows are committed", all);
    let late = database.query(
        "SELECT percentile_disc(0.99) WITHIN GROUP (
             ORDER BY extract(epoch FROM pg_xact_commit_timestamp(xmin) - time) * 1000)::float8 FROM telemetry",
    );
    if let Some(table) = locked {
        assert_eq!(locker.count(table), 0, "it was locked all the while");
        locker.execute("ROLLBACK");
        let all = |database: &mut Database| (database.count(table) >= sent).then_some(());
        database.changes(table, "the sick sink has all", all);
    }
    assert!(host.stop().success());
    late[0].get(0)
}
