//! PostgreSQL dies under load: devices are acknowledged all the while, memory
//! stays bounded, and afterwards every message is a row, once and in order.

use std::time::Duration;

use headworks_tests::host::Host;
use headworks_tests::postgres::{Database, Postgres};
use headworks_tests::publisher::{Address, Plan, Publisher, Sent};
use headworks_tests::telemetry::{self, Repeats};

const RSS_BYTES_MAX: u64 = 400 << 20;
/// Bytes that devices send while the database is away: more than the host may keep in memory.
const BACKLOG_BYTES: u64 = RSS_BYTES_MAX / 2 * 3;
const PADDING_BYTES: usize = 16 << 10;

#[test]
fn a_database_killed_and_restarted_under_load_gets_every_row_once() {
    let mut server = Postgres::start();
    let database = server.database();
    let url = database.url().to_owned();
    drop(database);
    let mut host = Host::start("pg-kills", &telemetry::config(&telemetry::postgres_sink(&url)));
    let publishers = devices(&host, |plan| Plan { pause: Duration::from_millis(5), ..plan });
    for _ in 0..5 {
        let mut database = Database::connect(&url).expect("the server runs");
        let rows = database.count("telemetry");
        database.changes("telemetry", "new rows", |database| {
            (database.count("telemetry") > rows + 200).then_some(())
        });
        server.kill();
        acks_go_on(&publishers);
        server.restart();
    }
    finish(&mut host, publishers, &url);
}

#[test]
fn a_database_that_is_away_costs_neither_acks_nor_memory_nor_rows() {
    let mut server = Postgres::start();
    let database = server.database();
    let url = database.url().to_owned();
    drop(database);
    let mut host = Host::start("pg-outage", &telemetry::config(&telemetry::postgres_sink(&url)));
    let publishers = devices(&host, |plan| Plan { padding: PADDING_BYTES, ..plan });
    acks_go_on(&publishers);
    server.kill();
    let acked = || publishers.iter().map(Publisher::acked).sum::<u64>();
    let (before, mut rss_max) = (acked(), 0);
    while (acked() - before) * (PADDING_BYTES as u64) < BACKLOG_BYTES {
        acks_go_on(&publishers);
        rss_max = rss_max.max(host.process().rss_bytes());
    }
    assert!(rss_max < RSS_BYTES_MAX, "the host grew to {} MiB", rss_max >> 20);
    server.restart();
    finish(&mut host, publishers, &url);
}

fn devices(host: &Host, plan: impl Fn(Plan) -> Plan) -> Vec<Publisher> {
    let address = Address::new(host.mqtt());
    [(0, 1), (1, 1), (2, 1), (3, 2)]
        .map(|(number, qos)| Publisher::start(plan(Plan::new(number, qos)), address.clone()))
        .into()
}

fn acks_go_on(publishers: &[Publisher]) {
    for device in publishers {
        device.await_acked(device.acked() + 21);
    }
}

fn finish(host: &mut Host, publishers: Vec<Publisher>, url: &str) {
    let sent: Vec<Sent> = publishers.into_iter().map(Publisher::finish).collect();
    assert!(sent.iter().all(|device| device.reconnects == 0), "no device's connection broke: {sent:?}");
    let mut database = Database::connect(url).expect("the server runs");
    telemetry::written_to_postgres(host, &mut database);
    telemetry::assert_rows(&telemetry::postgres_rows(&mut database, "telemetry"), &sent, Repeats::None);
    assert!(host.stop().success());
}
