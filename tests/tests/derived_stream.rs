//! A pipeline writes what its steps make to a stream: MQTT clients subscribe to it below a prefix, `streams tail`
//! shows it, and another pipeline makes rows of it.

use std::process::{Command, Stdio};

use headworks_tests::host::{Host, prebuilt};
use headworks_tests::process::{Lines, run};
use headworks_tests::{mosquitto, telemetry};

const CONFIG: &str = "streams:
  telemetry: { topics: ['acme/+/+/+/reading'], partitions: 4 }
  clean: { topic_prefix: clean, partitions: 2 }
pipelines:
  telemetry: { from: telemetry, to: clean }
  rows: { from: clean, steps: [], routes: { default: warehouse } }
sinks:
  warehouse: { type: sqlite, path: data/telemetry.db, table: telemetry }
";

const TOPIC: &str = "acme/site-01/temperature/sensor-1/reading";

fn start(name: &str) -> Host {
    let mut host = Host::prepare(name, CONFIG);
    host.drop_plugin("10-normalize.wasm", prebuilt("normalize"));
    host.run();
    host
}

/// As a device sends it: its field `ts` is no time yet.
fn publish(host: &Host, topic: &str, value: u64) {
    let (_, payload) = telemetry::message("sensor-1", value);
    run(mosquitto::publish(host.mqtt()).args(["-q", "1", "-t", topic, "-m", &payload]));
}

fn subscriber(host: &Host, args: &[&str]) -> Lines {
    let mut command = Command::new("mosquitto_sub");
    command.args(mosquitto::subscribe(host.mqtt()).get_args());
    command.args(["-v", "-q", "1"]).args(args).stdout(Stdio::piped());
    Lines::of(&mut command)
}

#[test]
fn what_the_steps_made_is_a_row_is_shown_and_reaches_subscribers_below_the_prefix() {
    let host = start("derived");
    // Each ends with its second message.
    let mut clean = subscriber(&host, &["-d", "-C", "2", "-t", "clean/#"]);
    let mut raw = subscriber(&host, &["-d", "-C", "2", "-t", "acme/#"]);
    clean.find("received SUBACK");
    raw.find("received SUBACK");
    publish(&host, TOPIC, 1);
    publish(&host, TOPIC, 2);
    for value in [1, 2] {
        let made = clean.find(&format!("clean/{TOPIC} "));
        assert!(made.contains(&format!("\"value\":{value}")), "{made}");
        // Once: the same message does not come from both streams.
        let sent = raw.find(&format!("{TOPIC} "));
        assert!(!sent.contains("clean/") && sent.contains(&format!("\"value\":{value}")), "{sent}");
        assert_ne!(
            made.split_once(' ').map(|made| made.1),
            sent.split_once(' ').map(|sent| sent.1),
            "normalized"
        );
    }
    assert!(clean.end().success() && raw.end().success());
    // A device of that name writes to its own stream, not to this one.
    publish(&host, &format!("clean/{TOPIC}"), 3);
    let path = host.folder.join("data/telemetry.db");
    host.writes("two rows", || (telemetry::sqlite_count(&path, "telemetry") == 2).then_some(()));
    assert_eq!(
        telemetry::sqlite_rows(&path, "telemetry"),
        [("sensor-1".to_owned(), 1), ("sensor-1".to_owned(), 2)]
    );
    let shown = host.cli_json(&["streams", "tail", "clean"]);
    let topics: Vec<_> = shown.iter().map(|message| message["topic"].as_str().expect("a topic")).collect();
    assert_eq!(topics, [TOPIC, TOPIC], "as pipelines see them");
    let listed = host.cli(&["streams", "list"]);
    assert!(listed.contains("what pipelines write"), "{listed}");
}

#[test]
fn what_waits_for_a_subscriber_of_a_derived_stream_is_there_after_kill_9() {
    let mut host = start("derived-session");
    // Subscribes, and leaves its session.
    let away = subscriber(&host, &["-c", "-i", "away", "-E", "-t", "clean/#"]);
    assert!(away.end().success());
    publish(&host, TOPIC, 1);
    let path = host.folder.join("data/telemetry.db");
    host.writes("a row", || (telemetry::sqlite_count(&path, "telemetry") == 1).then_some(()));
    host.kill();
    host.run();
    let mut back = subscriber(&host, &["-c", "-i", "away", "-C", "1", "-t", "clean/#"]);
    let made = back.find(&format!("clean/{TOPIC} "));
    assert!(made.contains("\"value\":1"), "{made}");
    assert!(back.end().success());
}
