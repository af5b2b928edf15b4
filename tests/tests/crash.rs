//! kill -9 of the host at random moments under load (after so many acks, or so
//! many changes of its files while it starts): every acknowledged message
//! is a row, QoS 2 exactly once.
//!
//! `CRASH_ROUNDS` raises the number of kills (12 if not set).

use std::time::Duration;

use headworks_tests::host::{Host, prebuilt};
use headworks_tests::moments::Moments;
use headworks_tests::postgres;
use headworks_tests::publisher::{Address, Plan, Publisher, Sent};
use headworks_tests::telemetry::{self, Repeats};

#[test]
fn every_acknowledged_message_is_a_row_in_sqlite_after_kills_of_the_host() {
    let (host, sent) = crash("crash-sqlite", &telemetry::config(&telemetry::sqlite_sink()));
    let path = host.folder.join("data/telemetry.db");
    // All are acknowledged, so all are in the log; rows follow.
    telemetry::written_to_sqlite(&host, &path);
    telemetry::assert_rows(&telemetry::sqlite_rows(&path, "telemetry"), &sent, Repeats::OfQos1);
    assert_nothing_refused(&host);
}

#[test]
fn every_acknowledged_message_is_a_row_in_postgres_after_kills_of_the_host() {
    let mut database = postgres::shared().database();
    let config = telemetry::config(&telemetry::postgres_sink(database.url()));
    let (host, sent) = crash("crash-postgres", &config);
    telemetry::written_to_postgres(&host, &mut database);
    telemetry::assert_rows(&telemetry::postgres_rows(&mut database, "telemetry"), &sent, Repeats::OfQos1);
    assert_nothing_refused(&host);
}

#[test]
fn every_acknowledged_message_is_a_row_of_a_pipeline_that_reads_what_another_writes() {
    let config = format!(
        "streams: {{ telemetry: {{ partitions: 4 }}, clean: {{ partitions: 3 }} }}\n\
         pipelines:\n  \
           telemetry: {{ from: telemetry, to: clean }}\n  \
           rows: {{ from: clean, steps: [], routes: {{ default: warehouse }} }}\n\
         sinks:\n  warehouse: {}\n",
        telemetry::sqlite_sink()
    );
    let (host, sent) = crash("crash-derived", &config);
    let path = host.folder.join("data/telemetry.db");
    // Each message makes one of the other stream: the two have the same offsets.
    telemetry::written_to_sqlite(&host, &path);
    telemetry::assert_rows(&telemetry::sqlite_rows(&path, "telemetry"), &sent, Repeats::OfQos1);
    assert_nothing_refused(&host);
}

/// Devices publish all the while; the host is killed and started again.
fn crash(name: &str, config: &str) -> (Host, Vec<Sent>) {
    let rounds: u32 = std::env::var("CRASH_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(12);
    let mut host = Host::prepare(name, config);
    host.drop_plugin("10-normalize.wasm", prebuilt("normalize"));
    host.drop_plugin("20-enrich.wasm", prebuilt("enrich"));
    host.run();
    let address = Address::new(host.mqtt());
    let publishers: Vec<Publisher> = [(0, 1), (1, 1), (2, 2), (3, 2)]
        .map(|(number, qos)| {
            let plan = Plan { pause: Duration::from_millis(2), ..Plan::new(number, qos) };
            Publisher::start(plan, address.clone())
        })
        .into();
    let mut moments = Moments::seeded(name);
    for round in 0..rounds {
        for publisher in &publishers {
            publisher.await_acked(publisher.acked() + moments.below(500));
        }
        address.set(None);
        host.kill();
        if round % 3 == 2 {
            // Once in a while also during recovery.
            host.launch_and_kill(moments.below(40) as usize);
        }
        host.run();
        address.set(Some(host.mqtt()));
    }
    let sent: Vec<Sent> = publishers.into_iter().map(Publisher::finish).collect();
    assert!(sent.iter().all(|device| device.count > 0));
    (host, sent)
}

fn assert_nothing_refused(host: &Host) {
    let letters = host.cli_json(&["dead-letters", "list"]);
    assert!(letters.is_empty(), "{letters:?}");
}
