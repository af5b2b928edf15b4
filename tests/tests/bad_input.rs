//! Whatever comes in, the host keeps serving: each bad thing gives a clear
//! error or a dead letter, and nothing acknowledged is lost.

use std::io::{Read, Write};
use std::time::Duration;

use headworks_tests::host::{Host, fresh, prebuilt};
use headworks_tests::mqtt::{self, Connection, Version, kind};
use headworks_tests::publisher::{Address, Plan, Publisher, Sent};
use headworks_tests::telemetry::{self, Repeats};

#[test]
fn malformed_mqtt_ends_its_own_connection_only() {
    let mut host = Host::start("bad-mqtt", "");
    let publishers = devices(&host);
    let mut connect = Vec::new();
    mqtt::connect(&mut connect, Version::V5, "malformed", true);
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("not MQTT", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        ("a publish before CONNECT", vec![0x32, 7, 0, 1, b'a', 0, 1, 0, 0]),
        ("another protocol's name", vec![0x10, 12, 0, 4, b'M', b'Q', b'X', b'X', 4, 2, 0, 60, 0, 0]),
        ("a remaining length without end", vec![0x10, 0xff, 0xff, 0xff, 0xff, 0xff]),
        ("a reserved packet type", [connect.clone(), vec![0x00, 0]].concat()),
        ("QoS 3", [connect.clone(), vec![0x36, 7, 0, 1, b'a', 0, 1, 0, 0]].concat()),
        ("a wildcard in a topic", [connect.clone(), vec![0x32, 7, 0, 1, b'#', 0, 1, 0, 0]].concat()),
        ("packet id 0", [connect.clone(), vec![0x32, 7, 0, 1, b'a', 0, 0, 0, 0]].concat()),
        ("a topic longer than its packet", [connect.clone(), vec![0x32, 4, 0xff, 0xff, b'a', b'b']].concat()),
        ("a topic that is not UTF-8", [connect.clone(), vec![0x32, 7, 0, 1, 0xff, 0, 1, 0, 0]].concat()),
        ("a second CONNECT", [connect.clone(), connect.clone()].concat()),
    ];
    for (what, bytes) in cases {
        let mut connection = Connection::raw(host.mqtt()).expect("the host listens");
        connection.stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a socket");
        // The host may close before all is written.
        let _ = connection.stream.write_all(&bytes);
        let mut rest = Vec::new();
        match connection.stream.read_to_end(&mut rest) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => panic!("{what}: still connected"),
            _ => {}
        }
    }
    all_rows(&mut host, publishers);
}

#[test]
fn malformed_json_goes_to_dead_letters_with_its_reason() {
    let mut host = Host::prepare("bad-json", "");
    host.drop_plugin("10-normalize.wasm", prebuilt("normalize"));
    host.run();
    let publishers = devices(&host);
    let topic = "acme/site-01/temperature/broken/reading";
    let payloads: [&[u8]; 6] = [
        b"not json",
        b"{\"device_id\":\"broken\",",
        b"{\"device_id\":\"broken\",\"ts\":1700000000}",
        b"{\"device_id\":\"somebody-else\",\"value\":1,\"ts\":1700000000}",
        b"\xff\xfe\x00",
        b"",
    ];
    publish_all(&host, topic, &payloads);
    let letters = dead_letters(&host, payloads.len());
    for letter in &letters {
        assert!(letter["refused"]["reason"].as_str().is_some_and(|reason| reason.len() > 5), "{letter}");
    }
    host.says("headworks dead-letters");
    all_rows(&mut host, publishers);
}

#[test]
fn files_that_are_no_plugins_change_nothing_and_say_why() {
    let mut host = Host::prepare("bad-wasm", "");
    host.drop_plugin("10-normalize.wasm", prebuilt("normalize"));
    host.run();
    let publishers = devices(&host);
    let good = std::fs::read(prebuilt("normalize")).expect("a prebuilt plugin");

    host.drop_bytes("40-text.wasm", b"this is not wasm");
    host.says("40-text.wasm");
    let mut corrupt = good.clone();
    let middle = corrupt.len() / 2;
    corrupt[middle..middle + 64].fill(0xff);
    host.drop_bytes("41-corrupt.wasm", &corrupt);
    host.says("41-corrupt.wasm");
    // Written in place, and half of it at that.
    host.folder.write("plugins/42-half.wasm", &good[..good.len() / 2]);
    host.says("42-half.wasm");
    // A changed version of a step that runs: the running one stays.
    host.drop_bytes("10-normalize.wasm", &corrupt);
    host.says("10-normalize.wasm");
    for name in ["40-text.wasm", "41-corrupt.wasm", "42-half.wasm"] {
        std::fs::remove_file(host.folder.join("plugins").join(name)).expect("it was there");
    }
    host.drop_plugin("10-normalize.wasm", prebuilt("normalize"));
    all_rows(&mut host, publishers);
}

#[test]
fn a_plugin_that_loops_traps_eats_memory_or_answers_nonsense_harms_only_its_own_messages() {
    let mut host = Host::prepare("hostile", "");
    host.drop_plugin("50-hostile.wasm", fresh("hostile"));
    host.run();
    let publishers = devices(&host);
    let wishes = ["loop", "trap", "eat", "nonsense", "flood"];
    for wish in wishes {
        let payload =
            format!(r#"{{"device_id":"bad","metric":"m","value":1,"ts":1700000000,"do":"{wish}"}}"#);
        publish_all(&host, "acme/site-01/temperature/bad/reading", &[payload.as_bytes()]);
    }
    let letters = dead_letters(&host, wishes.len());
    let reasons: Vec<&str> =
        letters.iter().filter_map(|letter| letter["refused"]["reason"].as_str()).collect();
    assert!(
        reasons.iter().any(|reason| reason.contains("a message asked for it")),
        "the panic's text is kept: {reasons:?}"
    );
    all_rows(&mut host, publishers);
}

#[test]
fn a_config_with_five_errors_shows_all_five_with_line_and_key() {
    let host = Host::prepare("bad-config", "");
    let config = "data_dir: ./data\n\
        mqtt: { listeners: [ { bind: nowhere } ] }\n\
        topics: \"{org}/{site}\"\n\
        streams: { telemetry: { partitions: 0 } }\n\
        admin: { bind: 127.0.0.1:0, colour: red }\n\
        pipelines: { telemetry: { from: telemetri, routes: { default: warehouse } } }\n\
        sinks: { warehouse: { type: sqlite, path: data/t.db } }\n";
    host.folder.write("headworks.yaml", config);
    for command in ["validate", "run"] {
        let output = host.command(&[command, "--config", "headworks.yaml"]).output().expect("it runs");
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{command} accepted it:\n{text}");
        for wanted in [
            "headworks.yaml:2: mqtt.listeners[0].bind",
            "headworks.yaml:3: topics",
            "headworks.yaml:4: streams.telemetry.partitions",
            "headworks.yaml:5: admin.colour",
            "headworks.yaml:6: pipelines.telemetry.from",
        ] {
            assert!(text.contains(wanted), "{command} does not say {wanted:?}:\n{text}");
        }
        assert!(!host.folder.join("data").exists(), "{command} touched the data folder");
    }
}

/// Two well-behaved devices whose messages must all become rows of the embedded default's table.
fn devices(host: &Host) -> Vec<Publisher> {
    let address = Address::new(host.mqtt());
    [(0, 1), (1, 2)]
        .map(|(number, qos)| {
            let plan = Plan { pause: Duration::from_millis(10), ..Plan::new(number, qos) };
            Publisher::start(plan, address.clone())
        })
        .into()
}

fn all_rows(host: &mut Host, publishers: Vec<Publisher>) {
    assert!(host.process().alive());
    publishers.iter().for_each(|publisher| publisher.await_acked(1));
    let sent: Vec<Sent> = publishers.into_iter().map(Publisher::finish).collect();
    assert!(sent.iter().all(|device| device.count > 0 && device.reconnects == 0), "{sent:?}");
    let path = host.folder.join("data/telemetry.db");
    let well = |rows: telemetry::Rows| -> telemetry::Rows {
        rows.into_iter().filter(|(device, _)| device.starts_with("device-")).collect()
    };
    telemetry::written_to_sqlite(host, &path);
    telemetry::assert_rows(&well(telemetry::sqlite_rows(&path, "telemetry")), &sent, Repeats::None);
}

/// QoS 1; returns once all are acknowledged.
fn publish_all(host: &Host, topic: &str, payloads: &[&[u8]]) {
    let mut connection = Connection::open(host.mqtt(), Version::V5, "bad", true).expect("the host listens");
    connection.stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a socket");
    let mut out = Vec::new();
    for (payload, id) in payloads.iter().zip(1..) {
        mqtt::publish(&mut out, Version::V5, 1, false, topic, id, payload);
    }
    connection.stream.write_all(&out).expect("the host reads");
    let mut acks = 0;
    while acks < payloads.len() {
        connection
            .receive(|packet| {
                assert_eq!((packet.kind(), packet.reason() >= 0x80), (kind::PUBACK, false), "{packet:?}");
                acks += 1;
            })
            .expect("acks");
    }
}

fn dead_letters(host: &Host, wanted: usize) -> Vec<serde_json::Value> {
    host.writes("dead letters", || {
        let letters = host.cli_json(&["dead-letters", "list"]);
        (letters.len() >= wanted).then_some(letters)
    })
}
