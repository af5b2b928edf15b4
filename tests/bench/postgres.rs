//! Rows a second into PostgreSQL, batches of 5,000, index on device_id and
//! time: our sink with its position in the transaction, the server's own binary
//! COPY from files of 5,000 rows, and the reference page's execute_values.
//! Beside it, what rows cost that the server rejects.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use headworks::batch::{Batch, Entry, Offset, Partition, Span, flags};
use headworks::sinks::{self, Advance, BuildContext, Claim, Journal, Outcome, Rows};
use headworks::stream::memory::MemoryStream;
use headworks::telemetry::Failures;
use headworks::topic::Namespace;
use headworks_tests::folder::{Folder, root};
use headworks_tests::postgres::{Database, Postgres};
use headworks_tests::process::run as run_command;
use headworks_tests::python;

use crate::readings::{DEVICES, Reading};
use crate::results::Results;
use crate::rounds;
use crate::server_copy::ServerCopy;

const BATCH: usize = 5_000;
const BATCHES: usize = 40;
const ROWS: usize = BATCH * BATCHES;
/// 2026-01-01T00:00:00Z.
const BEGIN_US: u64 = 1_767_225_600_000_000;

pub fn run(results: &mut Results) {
    let server = Postgres::start();
    let mut database = server.database();
    let folder = Folder::new("bench-postgres");
    let copy = ServerCopy::new("bench-postgres-copy", BATCHES as u64, BATCH as u64);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    let batches: Vec<Batch> = (0..BATCHES).map(|number| batch(number, None)).collect();
    let flawed = |every| (0..BATCHES).map(|number| batch(number, Some(every))).collect::<Vec<Batch>>();
    let (one_in_hundred, one_in_ten) = (flawed(100), flawed(10));

    fresh_table(&mut database);
    runtime.block_on(sink(database.url(), &batches, 0));
    check(&mut database);
    copy.take(&mut database);
    let records = folder.write("records.jsonl", records());

    let (mut ours, mut copies, mut inserts) = (Vec::new(), Vec::new(), Vec::new());
    let (mut clean, mut rejecting_1pct, mut rejecting_10pct) = (Vec::new(), Vec::new(), Vec::new());
    // A log of its own for each claim.
    let mut log = rounds() as u32;
    for round in 1..=rounds() {
        fresh_table(&mut database);
        ours.push(ROWS as f64 / runtime.block_on(sink(database.url(), &batches, round as u32)));
        check(&mut database);

        fresh_table(&mut database);
        copies.push(ROWS as f64 / copy.write(&mut database).as_secs_f64());
        check(&mut database);

        fresh_table(&mut database);
        let script = root().join("tests/clients/batch_insert.py");
        let seconds = run_command(
            python::command()
                .arg(script)
                .args([database.url(), "telemetry"])
                .arg(&records)
                .arg(BATCH.to_string()),
        );
        inserts.push(ROWS as f64 / seconds.trim().parse::<f64>().expect("seconds"));
        check(&mut database);

        // The same table and constraint, with no bad row, with one in a hundred and with one in ten.
        for (batches, seconds, bad) in [
            (&batches, &mut clean, 0),
            (&one_in_hundred, &mut rejecting_1pct, ROWS / 100),
            (&one_in_ten, &mut rejecting_10pct, ROWS / 10),
        ] {
            fresh_table(&mut database);
            database.execute("ALTER TABLE telemetry ADD CHECK (value >= 0)");
            log += 1;
            seconds.push(runtime.block_on(sink(database.url(), batches, log)));
            let there: i64 = database.query("SELECT count(*) FROM telemetry")[0].get(0);
            assert_eq!(there, (ROWS - bad) as i64, "all good rows, no bad one");
        }
    }
    results.add("postgres_rows_per_s", &ours);
    results.add("postgres_rows_per_s_server_copy", &copies);
    results.add("postgres_rows_per_s_psycopg2", &inserts);
    results.add_ratio("postgres_rows_ratio_vs_server_copy", &ours, &copies);
    results.add_ratio("postgres_rows_ratio_vs_psycopg2", &ours, &inserts);
    results.add_ratio("reject_cost_ratio_1pct", &rejecting_1pct, &clean);
    results.add_ratio("reject_cost_ratio_10pct", &rejecting_10pct, &clean);
}

fn fresh_table(database: &mut Database) {
    database.execute(
        "DROP TABLE IF EXISTS telemetry;
         CREATE TABLE telemetry (
             time        TIMESTAMPTZ NOT NULL,
             device_id   TEXT        NOT NULL,
             location    TEXT,
             metric      TEXT        NOT NULL,
             value       DOUBLE PRECISION NOT NULL
         );
         CREATE INDEX ON telemetry (device_id, time);
         CHECKPOINT",
    );
}

fn check(database: &mut Database) {
    let rows = database.query(
        "SELECT count(*), count(DISTINCT (device_id, time)), count(location), count(DISTINCT device_id) FROM telemetry",
    );
    let counts: [i64; 4] = std::array::from_fn(|i| rows[0].get(i));
    assert_eq!(counts, [ROWS as i64, ROWS as i64, ROWS as i64, DEVICES as i64], "all rows, once");
}

async fn sink(url: &str, batches: &[Batch], round: u32) -> f64 {
    let config: sinks::Config =
        serde_json::from_value(serde_json::json!({ "type": "postgres", "url": url, "table": "telemetry" }))
            .expect("a sink's config");
    let namespace = Arc::new(Namespace::parse(Namespace::DEFAULT_PATTERN).expect("the default"));
    // Of sinks without transactions only.
    let unused = MemoryStream::new("unused", 1);
    let journal = Journal::new(unused.clone(), unused);
    let mut sink =
        config.build(BuildContext { name: "bench", namespace, journal, failures: Failures::default() });
    let claim = Claim {
        pipeline: "bench".into(),
        sink: "bench".into(),
        log: uuid::Uuid::from_u128(u128::from(round) + 1),
        generation: 0,
        partitions: 1,
        formerly: Vec::new(),
    };
    sink.open(&claim, None).await.expect("PostgreSQL runs");
    let begin = Instant::now();
    for (number, batch) in batches.iter().enumerate() {
        let mut rows = Rows::default();
        rows.push_batch(batch.clone());
        let from = Offset((number * BATCH) as u64);
        let advance = Advance {
            partition: Partition(0),
            from,
            to: Offset(from.0 + BATCH as u64),
            lineage: None,
            letters: None,
        };
        if let Outcome::Rejected(_) = sink.commit(&rows, &[advance]).await.expect("PostgreSQL answers") {
            // A pipeline writes its dead letters here.
            sink.finish().await.expect("PostgreSQL takes the others");
        }
    }
    begin.elapsed().as_secs_f64()
}

/// With one value below zero in `bad_every`.
fn batch(number: usize, bad_every: Option<usize>) -> Batch {
    let mut bytes = Vec::new();
    let mut entries = Vec::new();
    for i in 0..BATCH {
        let n = number * BATCH + i;
        let mut span = |part: &[u8]| {
            let begin = bytes.len();
            bytes.extend_from_slice(part);
            Span::new(0, begin, part.len())
        };
        let mut reading = Reading::new(n as u64, BEGIN_US);
        if bad_every.is_some_and(|every| n % every == every / 2) {
            reading.value = -reading.value;
        }
        entries.push(Entry {
            flags: flags::FITS_NAMESPACE | flags::EVENT_TIME,
            offset: i as u32,
            received_us: BEGIN_US,
            event_us: reading.time_us as i64,
            topic: span(reading.topic().as_bytes()),
            payload: span(reading.payload(r#","location":"north hall 3""#).as_bytes()),
            device: span(reading.device.as_bytes()),
            ..Entry::default()
        });
    }
    Batch {
        base: Offset((number * BATCH) as u64),
        now_us: BEGIN_US,
        segments: vec![Bytes::from(bytes)],
        entries: entries.into(),
        exclusive: true,
    }
}

fn records() -> String {
    let record = |n| {
        let Reading { device, time_us, value } = Reading::new(n as u64, BEGIN_US);
        let (seconds, micros) = ((time_us - BEGIN_US) / 1_000_000, time_us % 1_000_000);
        let time = format!("2026-01-01 00:{:02}:{:02}.{micros:06}+00", seconds / 60, seconds % 60);
        format!("[\"{time}\",\"{device}\",\"north hall 3\",\"temperature_c\",{value}]\n")
    };
    (0..ROWS).map(record).collect()
}
