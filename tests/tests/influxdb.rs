//! A real InfluxDB: what is acknowledged is a point, once, through kill -9 of the host and of the server;
//! text comes back as it was sent; what the server does not take is a dead letter.
//!
//! `CRASH_ROUNDS` raises the number of kills (6 if not set).

use std::time::Duration;

use headworks::batch::Offset;
use headworks::sinks::{Claim, POSITIONS_PREFIX, look_up};
use headworks::stream::log::ReadOnly;
use headworks_tests::events::Events;
use headworks_tests::host::Host;
use headworks_tests::influxdb::Influxdb;
use headworks_tests::mosquitto;
use headworks_tests::process::run;
use headworks_tests::publisher::{Address, Plan, Publisher, Sent};
use headworks_tests::telemetry::{self, Repeats, Rows};

/// Only a hung test meets it.
const PATIENCE: Duration = Duration::from_secs(180);

fn config(server: &Influxdb, more: &str) -> String {
    let sink = format!("{{ type: influxdb, url: \"{}\", version: 1, database: iot{more} }}", server.url());
    // A server that is back is found soon.
    telemetry::config(&sink).replace(
        "routes: { default: warehouse }",
        "routes: { default: warehouse }, sink_backoff: { min: 50ms, max: 500ms }",
    )
}

/// Waits until every message of the stream is a point, or was seen not to be one: up to where the sink's
/// position is proven durable.
fn written(host: &Host) {
    let end = host.end();
    let data = host.folder.join("data");
    let reached = || {
        let log = ReadOnly::open(&data.join("streams/telemetry"), Offset(0)).remembered().ok()??;
        let headworks::stream::Identity { log, generation, partitions } = log.identity;
        let (pipeline, sink) = ("telemetry".to_owned(), "warehouse".to_owned());
        let claim = Claim { pipeline, sink, log, generation, partitions, formerly: Vec::new() };
        let entries = ReadOnly::open(&data.join("broker"), Offset(0)).state(POSITIONS_PREFIX).ok()?;
        let looked = look_up(&entries, vec![claim], "").ok()?.pop()?;
        (looked.positions.len() == usize::from(partitions)
            && looked.positions.iter().all(|position| position.next.0 >= end))
        .then_some(())
    };
    Events::of_files([data.join("broker")]).until("all is written", PATIENCE, reached);
}

/// Points as device and value, by both.
fn points(server: &Influxdb) -> Rows {
    let rows = server.query("SELECT \"device_id\",\"value\" FROM telemetry");
    let of = |row: &Vec<serde_json::Value>| {
        (row[1].as_str().expect("a tag").to_owned(), row[2].as_f64().expect("a number") as u64)
    };
    let mut points: Rows = rows.iter().map(of).collect();
    points.sort();
    points
}

#[test]
fn every_acknowledged_message_is_a_point_once_through_kills_of_host_and_server() {
    let rounds: u64 = std::env::var("CRASH_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(6);
    let mut server = Influxdb::start();
    let mut host = Host::start("influxdb-kills", &config(&server, ""));
    let address = Address::new(host.mqtt());
    let publishers: Vec<Publisher> = [(0, 1), (1, 1), (2, 2), (3, 2)]
        .map(|(number, qos)| {
            let plan = Plan { pause: Duration::from_millis(2), ..Plan::new(number, qos) };
            Publisher::start(plan, address.clone())
        })
        .into();
    let acks_go_on = |more: u64| {
        for publisher in &publishers {
            publisher.await_acked(publisher.acked() + more);
        }
    };
    for round in 0..rounds {
        acks_go_on(50 + 97 * round % 400);
        if round % 3 != 0 {
            server.kill();
        }
        if round % 3 != 1 {
            address.set(None);
            host.kill();
            host.launch();
            host.wait_serving();
            address.set(Some(host.mqtt()));
        }
        if round % 3 != 0 {
            acks_go_on(50);
            server.restart();
        }
    }
    let sent: Vec<Sent> = publishers.into_iter().map(Publisher::finish).collect();
    written(&host);
    telemetry::assert_rows(&points(&server), &sent, Repeats::OfQos1);
    let letters = host.cli_json(&["dead-letters", "list"]);
    assert!(letters.is_empty(), "{letters:?}");
    assert!(host.stop().success());
}

fn publish(host: &Host, device: &str, payload: &str) {
    let topic = format!("acme/site-01/temperature/{device}/reading");
    run(mosquitto::publish(host.mqtt()).args(["-q", "1", "-t", &topic, "-m", payload]));
}

#[test]
fn text_comes_back_as_it_was_sent() {
    let server = Influxdb::start();
    let mapping = ", measurement: '$last_level', tags: { name: /name }, fields: { text: /text, n: { from: /n, type: bigint } }";
    let host = Host::start("influxdb-text", &config(&server, mapping));
    let texts = [
        "plain",
        "a b",
        "a,b",
        "a=b",
        "a\"b",
        "a\\b",
        "a\\,b",
        "a\\ b",
        "\\\\x",
        "ümläut 漢字 🌡",
        "#x",
        "'single'",
        "{}",
        " leading",
        "trailing ",
        "=",
        ",",
        "\"",
        "a\tb",
        "\\n",
    ];
    for (n, text) in texts.iter().enumerate() {
        let payload = serde_json::json!({ "name": text, "text": text, "n": n }).to_string();
        publish(&host, "device-1", &payload);
    }
    // A line end is for fields only.
    publish(&host, "device-1", &serde_json::json!({ "text": "two\nlines\\", "n": texts.len() }).to_string());
    written(&host);
    let mut rows = server.query("SELECT \"n\",\"name\",\"text\" FROM reading");
    rows.sort_by_key(|row| row[1].as_i64());
    let back: Vec<_> = rows
        .iter()
        .map(|row| (row[2].as_str().unwrap_or_default(), row[3].as_str().expect("text")))
        .collect();
    let mut sent: Vec<_> = texts.iter().map(|text| (*text, *text)).collect();
    sent.push(("", "two\nlines\\"));
    assert_eq!(back, sent);
}

#[test]
fn a_point_that_the_server_does_not_take_is_a_dead_letter_and_the_others_are_written() {
    let server = Influxdb::start();
    let mut host =
        Host::prepare("influxdb-letters", &config(&server, ", fields: { value: /value, note: /note }"));
    // The type of a field is that of its first point.
    server.post("/write?db=iot", "telemetry note=\"text\"");
    host.run();
    for n in 0..9 {
        let note = if n == 4 { "5" } else { "\"fine\"" };
        publish(&host, "device-1", &format!(r#"{{"value":{n},"note":{note}}}"#));
    }
    publish(&host, "device-1", "ping");
    written(&host);
    let mut values: Vec<_> = points(&server).into_iter().map(|(_, value)| value).collect();
    values.sort_unstable();
    assert_eq!(values, [0, 1, 2, 3, 5, 6, 7, 8]);
    let letters = host.cli_json(&["dead-letters", "list"]);
    let reason =
        |letter: &serde_json::Value| letter["refused"]["reason"].as_str().expect("a reason").to_owned();
    let reasons: Vec<_> = letters.iter().map(reason).collect();
    assert_eq!(reasons.len(), 2, "{letters:?}");
    assert!(reasons[0].contains("field type conflict"), "{}", reasons[0]);
    assert!(reasons[1].starts_with("tag \"location\": the payload is not JSON"), "{}", reasons[1]);
    // The field may have another type now: the letter becomes a point, the other one stays.
    server.post("/query?db=iot&q=DROP%20MEASUREMENT%20telemetry", "");
    for sent in [&[4][..], &[4]] {
        let mut redrive = host.command(&["dead-letters", "redrive", "--all", "--config", "headworks.yaml"]);
        let output = redrive.output().expect("the binary");
        let values: Vec<_> = points(&server).into_iter().map(|(_, value)| value).collect();
        assert_eq!(values, sent, "{output:?}");
    }
    let letters = host.cli_json(&["dead-letters", "list"]);
    assert_eq!(letters.iter().map(|letter| &letter["payload"]).collect::<Vec<_>>(), ["ping"], "{letters:?}");
    assert!(host.stop().success());
}

#[test]
fn validate_says_whether_the_server_takes_points() {
    let mut server = Influxdb::start();
    let host = Host::prepare("influxdb-validate", &config(&server, ""));
    let said = host.cli(&["validate", "--connect"]);
    assert!(said.contains("sinks.warehouse: works: InfluxDB 127.0.0.1:"), "{said}");
    let refused = |host: &Host| {
        let mut command = host.command(&["validate", "--connect", "--config", "headworks.yaml"]);
        let output = command.output().expect("the binary");
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    server.post("/query?q=DROP%20DATABASE%20iot", "");
    let said = refused(&host);
    assert!(said.contains("does not work") && said.contains("CREATE DATABASE \"iot\""), "{said}");
    server.kill();
    let said = refused(&host);
    assert!(said.contains("cannot connect"), "{said}");
}
