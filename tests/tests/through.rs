//! A pipeline with several sinks, which each read the stream that its steps write: kill -9 of the host and of
//! PostgreSQL under load, sinks that the pipeline gets and loses between kills, sinks that are down or go up and
//! down. Each sink has each acknowledged message once, each bad message is one dead letter, and sinks that work
//! have everything while others are down.
//!
//! `CRASH_ROUNDS` raises the number of kills (6 if not set); `CRASH_SEED` (printed) gives the same changes again.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use headworks::stream::partition_of;
use headworks_tests::events::Events;
use headworks_tests::host::{Host, prebuilt};
use headworks_tests::influxdb::Influxdb;
use headworks_tests::moments::Moments;
use headworks_tests::mosquitto;
use headworks_tests::postgres::{self, Database, Postgres};
use headworks_tests::process::run;
use headworks_tests::publisher::{Address, Plan, Publisher, Sent};
use headworks_tests::telemetry::{self, Repeats, Rows};

/// Only a hung test meets it.
const PATIENCE: Duration = Duration::from_secs(180);
const PARTITIONS: u16 = 4;
/// Sinks by name, as the pipeline has them in the tests with three.
const ALL: &[&str] = &["pg", "lite", "influx"];
/// The stream that the steps write.
const OUT: &str = "telemetry.out";

/// `normalize` rejects these.
fn is_bad(value: u64) -> bool {
    value % 50 == 13
}

/// A constraint of PostgreSQL's table rejects these.
fn breaks_check(value: u64) -> bool {
    value % 50 == 7
}

fn rounds() -> u64 {
    std::env::var("CRASH_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(6)
}

/// All below the head: one pipeline to these sinks, given by name and config.
fn config(sinks: &[(String, String)]) -> String {
    let names: Vec<&str> = sinks.iter().map(|(name, _)| name.as_str()).collect();
    let configs: String = sinks.iter().map(|(name, sink)| format!("  {name}: {sink}\n")).collect();
    format!(
        "streams: {{ telemetry: {{ partitions: {PARTITIONS} }} }}\n\
         pipelines: {{ telemetry: {{ from: telemetry, routes: {{ default: [{}] }}, \
         sink_backoff: {{ min: 20ms, max: 200ms }} }} }}\n\
         sinks:\n{configs}",
        names.join(", ")
    )
}

fn sqlite(file: &str) -> String {
    format!("{{ type: sqlite, path: data/{file}.db, table: telemetry, busy_timeout: 100ms }}")
}

fn postgres(url: &str, table: &str) -> String {
    format!("{{ type: postgres, url: \"{url}\", table: {table} }}")
}

fn devices(address: &Address) -> Vec<Publisher> {
    [(0, 1), (1, 1), (2, 2), (3, 2)]
        .map(|(number, qos)| {
            let plan = Plan { pause: Duration::from_millis(2), is_bad, ..Plan::new(number, qos) };
            Publisher::start(plan, address.clone())
        })
        .into()
}

fn acks_go_on(publishers: &[Publisher], more: u64) {
    for publisher in publishers {
        publisher.await_acked(publisher.acked() + more);
    }
}

/// One device for each partition. A sink that has the only message of each has all that was acknowledged
/// before, or has rejected it: partitions keep their order through the steps and the stream.
fn markers(name: &str) -> Vec<String> {
    let of = |partition| {
        let names = (0..).map(|number| format!("marker-{name}-{number}"));
        names.into_iter().find(|name| partition_of(name, PARTITIONS).0 == partition).expect("endless")
    };
    (0..PARTITIONS).map(of).collect()
}

/// Publishes them; returns what was sent.
fn mark(addr: SocketAddr, name: &str) -> Vec<Sent> {
    let of = |device: String| {
        let (topic, payload) = telemetry::message(&device, 0);
        run(mosquitto::publish(addr).args(["-q", "1", "-t", &topic, "-m", &payload]));
        Sent { device, qos: 2, count: 1, reconnects: 0 }
    };
    markers(name).into_iter().map(of).collect()
}

fn marked(table: &str, name: &str) -> String {
    format!("{table} WHERE device_id LIKE 'marker-{name}-%'")
}

fn await_sqlite(host: &Host, path: &Path, name: &str) {
    let rows = || telemetry::sqlite_count(path, &marked("telemetry", name));
    host.writes("SQLite has all", || (rows() == u64::from(PARTITIONS)).then_some(()));
}

fn await_postgres(database: &mut Database, table: &str, name: &str) {
    let all = |database: &mut Database| {
        (database.count(&marked(table, name)) == i64::from(PARTITIONS)).then_some(())
    };
    database.changes(table, "PostgreSQL has all", all);
}

fn await_influxdb(host: &Host, server: &Influxdb, name: &str) {
    let prefix = format!("marker-{name}-");
    let all = || {
        let rows = points(server);
        let marked = rows.iter().filter(|(device, _)| device.starts_with(&prefix)).count();
        (marked == usize::from(PARTITIONS)).then_some(())
    };
    // The position of the InfluxDB sink is written to the broker's stream after the points were written.
    Events::of_files([host.folder.join("data/broker")]).until("InfluxDB has all", PATIENCE, all);
}

/// Points as device and value, by both: the server sorts them by the devices' time.
fn points(server: &Influxdb) -> Rows {
    let rows = server.query("SELECT \"device_id\",\"value\" FROM telemetry");
    let of = |row: &Vec<serde_json::Value>| {
        (row[1].as_str().expect("a tag").to_owned(), row[2].as_f64().expect("a number") as u64)
    };
    let mut points: Rows = rows.iter().map(of).collect();
    points.sort();
    points
}

/// PostgreSQL with a constraint, SQLite and InfluxDB, and a host with a pipeline to some of the three.
struct Three {
    postgres: Postgres,
    url: String,
    influxdb: Influxdb,
    host: Host,
}

impl Three {
    fn start(name: &str, sinks: &[&str]) -> Self {
        let (postgres, influxdb) = (Postgres::start(), Influxdb::start());
        let mut database = postgres.database();
        database.execute(
            "CREATE TABLE telemetry (
                 time      TIMESTAMPTZ NOT NULL,
                 device_id TEXT NOT NULL,
                 location  TEXT,
                 metric    TEXT NOT NULL,
                 value     DOUBLE PRECISION NOT NULL CHECK (value::bigint % 50 <> 7)
             )",
        );
        let url = database.url().to_owned();
        let host = Host::prepare(name, "");
        let mut three = Self { postgres, url, influxdb, host };
        three.set_sinks(sinks);
        three.host.drop_plugin("10-normalize.wasm", prebuilt("normalize"));
        three.host.run();
        three
    }

    /// Counts from the next start on.
    fn set_sinks(&self, names: &[&str]) {
        let of = |name: &&str| {
            let sink = match *name {
                "pg" => postgres(&self.url, "telemetry"),
                "lite" => sqlite("telemetry"),
                _ => format!(
                    "{{ type: influxdb, url: \"{}\", version: 1, database: iot }}",
                    self.influxdb.url()
                ),
            };
            ((*name).to_owned(), sink)
        };
        let path = self.host.folder.join("headworks.yaml");
        let text = std::fs::read_to_string(&path).expect("our file");
        let head = text.split("streams:").next().expect("a head");
        let config = config(&names.iter().map(of).collect::<Vec<_>>());
        std::fs::write(&path, format!("{head}{config}")).expect("our file");
    }

    fn restart_host(&mut self, address: &Address) {
        address.set(None);
        self.host.kill();
        self.host.launch();
        self.host.wait_serving();
        address.set(Some(self.host.mqtt()));
    }

    /// The pipeline has all three sinks: waits until each has all, and checks rows and dead letters. Returns how
    /// many letters a bad message has at most.
    fn finish(mut self, publishers: Vec<Publisher>) -> usize {
        let mut sent: Vec<Sent> = publishers.into_iter().map(Publisher::finish).collect();
        assert!(sent.iter().all(|device| device.count > 50), "{sent:?}");
        sent.extend(mark(self.host.mqtt(), "end"));
        let path = self.host.folder.join("data/telemetry.db");
        await_sqlite(&self.host, &path, "end");
        let mut database = Database::connect(&self.url).expect("the server runs");
        await_postgres(&mut database, "telemetry", "end");
        await_influxdb(&self.host, &self.influxdb, "end");
        let assert_rows = |rows: Rows, is_left_out: fn(u64) -> bool| {
            telemetry::assert_rows_without(&rows, &sent, Repeats::OfQos1, is_left_out);
        };
        let lite = telemetry::sqlite_rows(&path, "telemetry");
        let times = counted(&lite);
        let influx = points(&self.influxdb);
        // A repeat of QoS 1 is a message of its own: the sinks have it as often as each other.
        assert_eq!(times, counted(&influx), "SQLite and InfluxDB have the same");
        let pg = telemetry::postgres_rows(&mut database, "telemetry");
        let has = |(_, value): &(String, u64)| !breaks_check(*value);
        let expected: BTreeMap<_, _> =
            times.iter().filter(|(row, _)| has(row)).map(|(row, times)| (row.clone(), *times)).collect();
        assert_eq!(counted(&pg), expected, "PostgreSQL has the same but for what it rejects");
        assert_rows(lite, is_bad);
        assert_rows(influx, is_bad);
        assert_rows(pg, |value| is_bad(value) || breaks_check(value));
        let letters_max = self.assert_letters(&sent, &times);
        assert!(self.host.stop().success());
        letters_max
    }

    /// Each bad message is a dead letter once for each sink, and so is each row that PostgreSQL rejects. Sinks that
    /// read the steps' stream have one letter together; one that the pipeline got later, and that runs what
    /// came before through the steps, has a letter of its own, or with those that it got beside.
    fn assert_letters(&self, sent: &[Sent], rows: &BTreeMap<(String, u64), usize>) -> usize {
        let letters = self.host.cli_json(&["dead-letters", "list"]);
        let (mut of_steps, mut of_postgres) = (BTreeMap::<_, Vec<&str>>::new(), BTreeMap::new());
        let mut letters_at = BTreeMap::new();
        for letter in &letters {
            let (payload, refused) = (&letter["payload"], &letter["refused"]);
            let device = payload["device_id"].as_str().expect("a device").to_owned();
            let row = (device, payload["value"].as_u64().expect("a number"));
            // A repeat of QoS 1 has an offset of its own.
            let place = (row, refused["log"].to_string(), refused["offset"].as_u64());
            *letters_at.entry(place.clone()).or_insert(0) += 1;
            match refused["sinks"].as_array() {
                Some(sinks) => {
                    let sinks = sinks.iter().map(|sink| sink.as_str().expect("a name"));
                    let sinks = sinks.flat_map(|sink| if sink == OUT { ALL.to_vec() } else { vec![sink] });
                    of_steps.entry(place).or_default().extend(sinks);
                }
                None => {
                    let second = of_postgres.insert(place, refused["sink"].as_str());
                    assert_eq!(second, None, "a second letter of the same row: {letter}");
                }
            }
        }
        let letters_of = |place| letters_at.get(place).copied().unwrap_or(0);
        let letters_max = of_steps.keys().map(letters_of).max().unwrap_or(0);
        for (place, sinks) in &mut of_steps {
            sinks.sort_unstable();
            assert_eq!(sinks[..], ["influx", "lite", "pg"], "{place:?}: one letter for each sink");
        }
        assert!(of_postgres.values().all(|sink| *sink == Some("pg")), "{of_postgres:?}");
        let rows_of = |place: &((String, u64), String, Option<u64>)| place.0.clone();
        let of_steps: Rows = of_steps.keys().map(rows_of).collect();
        let of_postgres: Rows = of_postgres.keys().map(rows_of).collect();
        assert!(of_steps.iter().all(|(_, value)| is_bad(*value)), "{of_steps:?}");
        let (of_steps, of_postgres) = (counted(&of_steps), counted(&of_postgres));
        let expected = rows.iter().filter(|((_, value), _)| breaks_check(*value));
        let expected = expected.map(|(row, times)| (row.clone(), *times)).collect();
        assert_eq!(of_postgres, expected, "a letter for each row that PostgreSQL rejects");
        for Sent { device, qos, count, .. } in sent {
            for value in (0..*count).filter(|value| is_bad(*value)) {
                let letters = of_steps.get(&(device.clone(), value)).copied().unwrap_or(0);
                let is_once = letters == 1 || *qos == 1 && letters > 1;
                assert!(is_once, "{letters} letters of {device}'s bad message {value} (QoS {qos})");
            }
        }
        letters_max
    }
}

fn counted(rows: &Rows) -> BTreeMap<(String, u64), usize> {
    let mut times = BTreeMap::new();
    for row in rows {
        *times.entry(row.clone()).or_default() += 1;
    }
    times
}

#[test]
fn three_sinks_have_each_acknowledged_message_once_after_kills_of_host_and_database() {
    let mut three = Three::start("through-kills", ALL);
    let address = Address::new(three.host.mqtt());
    let publishers = devices(&address);
    for round in 0..rounds() {
        acks_go_on(&publishers, 30 + 83 * round % 300);
        if round % 3 != 0 {
            three.postgres.kill();
            acks_go_on(&publishers, 50);
        }
        if round % 4 == 3 {
            three.influxdb.kill();
        }
        if round % 3 != 1 {
            three.restart_host(&address);
        }
        acks_go_on(&publishers, 50);
        if round % 4 == 3 {
            three.influxdb.restart();
        }
        if round % 3 != 0 {
            three.postgres.restart();
        }
    }
    assert_eq!(three.finish(publishers), 1, "one letter for all sinks");
}

#[test]
fn sinks_that_a_pipeline_gets_and_loses_between_kills_have_each_message_once() {
    let mut moments = Moments::seeded("through-changes");
    let of_rounds: [&[&str]; 7] =
        [ALL, &["lite", "influx"], &["influx"], &["pg", "lite"], &["lite"], &["pg", "influx"], &["pg"]];
    let mut three = Three::start("through-changes", &["pg"]);
    let address = Address::new(three.host.mqtt());
    let publishers = devices(&address);
    for round in 0..rounds() {
        acks_go_on(&publishers, 30 + 83 * round % 300);
        let is_down = round % 2 == 1;
        if is_down {
            three.postgres.kill();
            acks_go_on(&publishers, 50);
        }
        // The first round has one sink, the second all three and two of them. Later rounds have any.
        let number = if round < 2 { round } else { moments.below(of_rounds.len() as u64) };
        three.set_sinks(of_rounds[number as usize]);
        three.restart_host(&address);
        acks_go_on(&publishers, 50);
        if is_down {
            three.postgres.restart();
        }
    }
    three.set_sinks(ALL);
    three.restart_host(&address);
    three.finish(publishers);
}

#[test]
fn sinks_that_come_back_after_another_one_had_the_pipeline_alone_have_each_message_once() {
    let mut three = Three::start("through-another", &["pg", "lite"]);
    let address = Address::new(three.host.mqtt());
    let publishers = devices(&address);
    let of_rounds: [&[&str]; 3] = [&["pg", "lite"], &["influx"], ALL];
    for names in of_rounds {
        acks_go_on(&publishers, 200);
        three.set_sinks(names);
        three.restart_host(&address);
    }
    three.finish(publishers);
}

#[test]
fn a_sink_that_goes_up_and_down_keeps_nothing_from_the_others() {
    let mut three = Three::start("through-flaps", ALL);
    let address = Address::new(three.host.mqtt());
    let publishers = devices(&address);
    let path = three.host.folder.join("data/telemetry.db");
    let mut marks = Vec::new();
    for round in 0..rounds() {
        acks_go_on(&publishers, 50);
        three.postgres.kill();
        acks_go_on(&publishers, 50);
        let name = round.to_string();
        marks.extend(mark(three.host.mqtt(), &name));
        // PostgreSQL is down all the while.
        await_sqlite(&three.host, &path, &name);
        await_influxdb(&three.host, &three.influxdb, &name);
        three.postgres.restart();
    }
    let mut sent: Vec<Sent> = publishers.into_iter().map(Publisher::finish).collect();
    sent.extend(marks);
    sent.extend(mark(three.host.mqtt(), "end"));
    await_sqlite(&three.host, &path, "end");
    await_influxdb(&three.host, &three.influxdb, "end");
    let mut database = Database::connect(&three.url).expect("the server runs");
    await_postgres(&mut database, "telemetry", "end");
    let rows = telemetry::sqlite_rows(&path, "telemetry");
    telemetry::assert_rows_without(&rows, &sent, Repeats::None, is_bad);
    telemetry::assert_rows_without(&points(&three.influxdb), &sent, Repeats::None, is_bad);
    let rows = telemetry::postgres_rows(&mut database, "telemetry");
    let is_left_out = |value| is_bad(value) || breaks_check(value);
    telemetry::assert_rows_without(&rows, &sent, Repeats::None, is_left_out);
    assert!(three.host.stop().success());
}

#[test]
fn sinks_that_work_have_everything_while_ten_others_are_down_also_from_a_start_on() {
    let mut server = Postgres::start();
    let url = server.database().url().to_owned();
    let mut healthy = postgres::shared().database();
    let tables: Vec<String> = (0..5).map(|number| format!("rows_{number}")).collect();
    let files: Vec<String> = (0..5).map(|number| format!("locked-{number}")).collect();
    let mut sinks = vec![
        ("pg".to_owned(), postgres(healthy.url(), "telemetry")),
        ("lite".to_owned(), sqlite("telemetry")),
    ];
    sinks.extend(tables.iter().map(|table| (table.clone(), postgres(&url, table))));
    sinks.extend(files.iter().map(|file| (file.clone(), sqlite(file))));
    let mut host = Host::prepare("through-ten", &config(&sinks));
    host.drop_plugin("10-normalize.wasm", prebuilt("normalize"));
    host.run();
    let path_of = |host: &Host, file: &str| -> PathBuf { host.folder.join(format!("data/{file}.db")) };
    let lite = path_of(&host, "telemetry");
    let address = Address::new(host.mqtt());
    let publishers = devices(&address);
    acks_go_on(&publishers, 50);
    let mut marks = mark(host.mqtt(), "begin");
    for file in &files {
        await_sqlite(&host, &path_of(&host, file), "begin");
    }
    server.kill();
    let locks: Vec<_> = files.iter().map(|file| lock(&path_of(&host, file))).collect();
    for name in ["down", "down-at-start"] {
        acks_go_on(&publishers, 100);
        marks.extend(mark(host.mqtt(), name));
        await_sqlite(&host, &lite, name);
        await_postgres(&mut healthy, "telemetry", name);
        address.set(None);
        host.kill();
        host.launch();
        host.wait_serving();
        address.set(Some(host.mqtt()));
    }
    let mut sent: Vec<Sent> = publishers.into_iter().map(Publisher::finish).collect();
    marks.extend(mark(host.mqtt(), "end"));
    sent.extend(marks);
    await_sqlite(&host, &lite, "end");
    await_postgres(&mut healthy, "telemetry", "end");
    let assert_rows = |rows: Rows| telemetry::assert_rows_without(&rows, &sent, Repeats::OfQos1, is_bad);
    assert_rows(telemetry::sqlite_rows(&lite, "telemetry"));
    assert_rows(telemetry::postgres_rows(&mut healthy, "telemetry"));
    for lock in locks {
        let rows: i64 = lock
            .query_row("SELECT count(*) FROM telemetry WHERE device_id LIKE 'marker-down%'", [], |row| {
                row.get(0)
            })
            .expect("a query");
        assert_eq!(rows, 0, "it was down all the while");
        lock.execute_batch("ROLLBACK").expect("our transaction");
    }
    server.restart();
    for file in &files {
        let path = path_of(&host, file);
        await_sqlite(&host, &path, "end");
        assert_rows(telemetry::sqlite_rows(&path, "telemetry"));
    }
    let mut database = Database::connect(&url).expect("the server runs");
    for table in &tables {
        await_postgres(&mut database, table, "end");
        assert_rows(telemetry::postgres_rows(&mut database, table));
    }
    assert!(host.stop().success());
}

/// Keeps others from writing to a file until the transaction ends.
fn lock(path: &Path) -> rusqlite::Connection {
    let database = rusqlite::Connection::open(path).expect("the sink has made it");
    database.busy_timeout(PATIENCE).expect("a timeout");
    database.execute_batch("BEGIN IMMEDIATE").expect("the lock");
    database
}
