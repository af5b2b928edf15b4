//! Access plugins in the real host: what they decide, and what a bad one does.

use std::io::Write;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use headworks::access::PasswordFile;
use headworks_tests::certificates::Authority;
use headworks_tests::host::{Host, Shared, fresh};
use headworks_tests::mosquitto;
use headworks_tests::mqtt::Connection;
use headworks_tests::mqtt::Version::{V5, V311};
use headworks_tests::packets::{
    Client, Connect, PINGREQ, Publish, Will, ack, auth, auth_properties, each_property, field, subscribe,
    unique,
};
use headworks_tests::process::{Lines, run};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

static HOSTILE: Shared = Shared::new();

fn start(name: &str, plugin: &str, config: &str, more: &str) -> Host {
    start_with(name, plugin, config, 50, more)
}

fn start_with(name: &str, plugin: &str, config: &str, cpu_ms: u32, more: &str) -> Host {
    let mut host = prepare(name, plugin, "", config, cpu_ms, more);
    host.run();
    host
}

/// `listener`: beside a plain one.
fn prepare(name: &str, plugin: &str, listener: &str, config: &str, cpu_ms: u32, more: &str) -> Host {
    let mqtt = format!(
        "mqtt:
  listeners:
    - {{ bind: 127.0.0.1:0 }}
{listener}
  connect_timeout: 60s
  access:
    authenticate:
      - {{ type: plugin, file: access/gate.wasm, config: {config}, limits: {{ cpu_ms: {cpu_ms}, memory: 16MiB }} }}
{more}"
    );
    let host = Host::prepare_with(name, &mqtt, "");
    let mut users = PasswordFile::default();
    users.set("ann", "ann", None).expect("a user");
    host.folder.write("passwords", users.to_text());
    std::fs::create_dir_all(host.folder.join("access")).expect("our folder");
    replace(&host, plugin);
    host
}

fn replace(host: &Host, plugin: &str) {
    let bytes = std::fs::read(fresh(plugin)).expect("built");
    let part = host.folder.write("access/.part", bytes);
    std::fs::rename(part, host.folder.join("access/gate.wasm")).expect("our folder");
}

fn hostile() -> Arc<Host> {
    HOSTILE.get_with(|| start("access-hostile", "hostile-access", "{}", ""))
}

fn calls(host: &Host, outcome: &str) -> f64 {
    host.metric("headworks_access_plugin_calls_total", &[("outcome", outcome)])
}

/// The reason of the CONNACK.
fn answer(host: &Host, connect: &Connect) -> (u8, Client) {
    let mut client = Client::raw(host.mqtt(), V5);
    client.send(connect.bytes());
    let connack = client.receive();
    assert_eq!(connack.first, 0x20, "{connack:?}");
    (connack.body[1], client)
}

fn reason(host: &Host, client_id: &str) -> u8 {
    answer(host, &Connect::new(V5, client_id)).0
}

/// What a publish is told.
fn published(client: &mut Client, topic: &str) -> u8 {
    client.publish(&Publish::new(topic, 1, 1, "x"));
    client.receive().body.get(2).copied().unwrap_or(0)
}

#[test]
fn clients_are_known_by_their_network_and_others_are_left_to_who_comes_next() {
    let config = "{ networks: [ { from: 127.0.0.0/8, name: line-4, publish: ['acme/line-4/#'], \
                  presses: [ { topics: 'acme/press/+/#', first: 1, last: 12 } ] } ] }";
    let next = "      - { type: passwords, file: passwords }\n    rules:\n      - { effect: allow, topics: ['%u/#'] }\n";
    let mqtt_users = |host: &Host| host.cli_json(&["clients", "list"]);
    let host = start("access-network", "plugin-network-gate", config, next);
    let (code, mut device) = answer(&host, &Connect::new(V5, "plc"));
    assert_eq!(code, 0);
    assert_eq!(published(&mut device, "acme/line-4/temperature"), 0);
    assert_eq!(published(&mut device, "line-4/x"), 0, "the config's rules come after the plugin's");
    assert_eq!(published(&mut device, "acme/line-5/temperature"), 0x87);
    assert_eq!(published(&mut device, "acme/press/12/state"), 0);
    assert_eq!(published(&mut device, "acme/press/13/state"), 0x87);
    assert!(
        mqtt_users(&host).iter().any(|client| client["connection"]["user"] == "line-4"),
        "{:?}",
        mqtt_users(&host)
    );
    let mut ann = Connect::new(V5, "ann");
    (ann.username, ann.password) = (Some("ann".into()), Some("ann".into()));
    let (code, mut client) = answer(&host, &ann);
    assert_eq!((code, published(&mut client, "ann/x")), (0, 0));
    ann.password = Some("wrong".into());
    assert_eq!(answer(&host, &ann).0, 0x86);
    assert!(calls(&host, "accepted") >= 1.0 && calls(&host, "passed") >= 2.0);
}

#[test]
fn a_plugin_that_faults_lets_nobody_in_and_the_next_client_is_served() {
    let host = hostile();
    for bad in [
        "loop",
        "trap",
        "eat",
        "bad-filter",
        "bad-effect",
        "no-device",
        "no-name",
        "flood",
        "liar",
        "unasked",
    ] {
        let faults = calls(&host, "fault");
        assert_eq!(reason(&host, bad), 0x88, "{bad}");
        assert!(calls(&host, "fault") > faults, "{bad} is counted");
        assert_eq!(reason(&host, &unique("good")), 0, "after {bad}");
    }
    host.says("gate.wasm failed, the client is refused: ");
    assert_eq!(reason(&host, "refused"), 0x87);
}

/// The message of a topic, as JSON.
fn stored(host: &Host, topic: &str) -> String {
    let tail =
        host.cli(&["streams", "tail", "default", "--from", "start", "--max", "1000", "--format", "json"]);
    tail.lines().find(|line| line.contains(topic)).expect("the message").to_owned()
}

#[test]
fn attributes_and_the_device_go_with_each_message_of_the_client() {
    let host = hostile();
    let (code, mut client) = answer(&host, &Connect::new(V5, "attributes"));
    assert_eq!((code, published(&mut client, "badge/topic")), (0, 0));
    let line = stored(&host, "badge/topic");
    assert!(line.contains("badge\""), "{line}");
    let with_will =
        Connect { will: Some(Will::new("acme/f/press/other/gone", 1)), ..Connect::new(V5, "device") };
    let (code, mut client) = answer(&host, &with_will);
    assert_eq!((code, published(&mut client, "acme/f/press/other/t")), (0, 0));
    client.cut();
    for topic in ["acme/f/press/other/t", "acme/f/press/other/gone"] {
        // Follows the stream: the will comes when it comes.
        let mut tail = host.command(&[
            "streams",
            "tail",
            "telemetry",
            "--follow",
            "--from",
            "start",
            "--format",
            "json",
        ]);
        let line = Lines::of(tail.args(["--config", "headworks.yaml"])).find(topic);
        assert!(line.contains("\"press-7\""), "{line}");
    }
}

#[test]
fn a_plugin_is_told_the_listener_and_its_transport() {
    let host = hostile();
    let (code, mut client) = answer(&host, &Connect::new(V5, "told"));
    assert_eq!((code, published(&mut client, "told/topic")), (0, 0));
    let line = stored(&host, "told/topic");
    assert!(line.contains("127.0.0.1:0 1"), "{line}");
}

#[test]
fn a_plugin_is_shown_the_certificates_of_a_tls_client_its_own_first() {
    let tls = "    - { bind: 127.0.0.1:0, tls: { cert: server.pem, key: server.key, client_ca: ca.pem } }";
    let mut host = prepare("access-certificates", "hostile-access", tls, "{}", 50, "");
    let ca = Authority::new(&host.folder);
    ca.sign(&host.folder, "server", 1);
    let device = ca.sign(&host.folder, "device-7", 7);
    host.run();
    let chain = [&device.cert, &ca.ca].map(|file| std::fs::read(file).expect("our file")).concat();
    let chain = host.folder.write("chain.pem", chain);
    let mut publish = mosquitto::publish(host.listener(1));
    publish.arg("--cafile").arg(&ca.ca).arg("--cert").arg(&chain).arg("--key").arg(&device.key);
    run(publish.args(["-i", "shown", "-q", "1", "-t", "shown/tls", "-m", "x"]));
    let certificates = CertificateDer::pem_file_iter(&chain).expect("our file");
    let hex = |der: &[u8]| der.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let shown: Vec<_> = certificates.map(|certificate| hex(&certificate.expect("PEM"))).collect();
    let line = stored(&host, "shown/tls");
    assert!(line.contains(&format!("\"{} then {}\"", shown[0], shown[1])), "{line}");

    let mut plain = Client::clean(host.mqtt(), V5, "shown");
    assert_eq!(published(&mut plain, "shown/plain"), 0);
    assert!(!stored(&host, "shown/plain").contains(&shown[0]));
}

#[test]
fn a_client_is_disconnected_when_its_identity_is_valid_no_longer() {
    let host = start("access-short", "hostile-access", "{}", "");
    let (code, mut client) = answer(&host, &Connect::new(V5, "short"));
    assert_eq!((code, client.disconnected()), (0, 0x87));
    Client::clean(host.mqtt(), V311, "short").closed();
    // Also one that leaves the host no moment without something to read.
    let mut busy = Connection::raw(host.mqtt()).expect("the host listens").stream;
    busy.write_all(&Connect::new(V5, "short").bytes()).expect("it is read");
    let (acks, hung) = (ack(0x40, 1).repeat(4_000), Instant::now() + Duration::from_secs(30));
    while busy.write_all(&acks).is_ok() {
        assert!(Instant::now() < hung, "it is served on");
    }
}

#[test]
fn what_rules_leave_open_is_asked_of_the_plugin_once() {
    let host = start("access-asks", "hostile-access", "{}", "");
    let mut client = Client::clean(host.mqtt(), V5, "asks");
    assert_eq!(published(&mut client, "free"), 0);
    assert_eq!(calls(&host, "answered"), 0.0, "a rule decides without it");
    for _ in 0..3 {
        assert_eq!(published(&mut client, "asked/yes"), 0);
        assert_eq!(published(&mut client, "asked/no"), 0x87);
    }
    client.publish(&Publish::new("asked/no", 2, 1, "x"));
    client.expect_refused(0x50, 1, 0x87);
    client.publish(&Publish::new("asked/no", 0, 0, "x"));
    client.ping();
    assert_eq!(calls(&host, "answered"), 2.0);
    // In the order in which they came, with questions among them.
    let topic = |n: u16| if n.is_multiple_of(3) { "free".to_owned() } else { format!("asked/{n}") };
    let burst = (1..=30).flat_map(|n| Publish::new(&topic(n), 1, n, "x").bytes(V5));
    client.send(burst.collect::<Vec<u8>>());
    for n in 1..=30 {
        client.expect(ack(0x40, n));
    }
    let after = calls(&host, "answered");
    assert!((3.0..=6.0).contains(&after), "many topics in one call: {after}");
    for _ in 0..2 {
        let filters = [("asked/a/#", 1), ("asked/no", 1), ("free/#", 1), ("#", 1), ("asked/yes", 0)];
        assert_eq!(client.subscribe_all(&[], &filters), [1, 0x87, 1, 1, 0]);
    }
    assert_eq!(calls(&host, "answered"), after + 1.0);
    assert_eq!(calls(&host, "fault"), 0.0);

    let mut old = Client::clean(host.mqtt(), V311, "asks-too");
    assert_eq!(old.subscribe_all(&[], &[("asked/x", 1), ("asked/no", 1)]), [1, 0x80]);
    old.publish_through(&Publish::new("asked/yes", 2, 1, "x"));
    old.publish(&Publish::new("asked/no", 1, 2, "x"));
    old.closed();
}

#[test]
fn a_will_is_asked_for_when_it_is_left() {
    let host = hostile();
    for (topic, code) in [("asked/yes", 0), ("asked/no", 0x87), ("asked/trap", 0x88)] {
        let connect = Connect { will: Some(Will::new(topic, 1)), ..Connect::new(V5, &unique("asks")) };
        assert_eq!(answer(&host, &connect).0, code, "{topic}");
    }
}

#[test]
fn deliveries_that_rules_leave_open_are_asked_for_and_keep_their_order() {
    let host = hostile();
    let mut publisher = Client::clean(host.mqtt(), V5, &unique("good"));
    let dropped = || host.metric("headworks_mqtt_dropped_total", &[("cause", "not_authorized")]);
    for connect in [Connect::new(V5, &unique("asks")), Connect::resuming(V5, &unique("asks"))] {
        let (mut client, before) = (Client::open(host.mqtt(), &connect), dropped());
        let root = unique("asked/root");
        assert_eq!(client.subscribe(&format!("{root}/#"), 2), 2);
        assert_eq!(client.subscribe("asked/open/#", 2), 2);
        let mut publish = |from: usize| {
            for (n, topic) in ["a", "subscribe", "b", "no", "subscribe", "a", "c"].iter().enumerate() {
                let (qos, id) = (((from + n) % 3) as u8, 1 + n as u16);
                publisher.publish_through(&Publish::new(&format!("{root}/{topic}"), qos, id, &n.to_string()));
            }
        };
        let delivered = |client: &mut Client, numbers: &[&str]| {
            for number in numbers {
                assert_eq!(client.delivered().text(), *number);
            }
        };
        for from in 0..3 {
            publish(from);
            delivered(&mut client, &["0", "2", "5", "6"]);
        }
        client.ping();
        assert!(dropped() >= before + 9.0);
        if connect.clean {
            continue;
        }
        // What waited while it was away is asked for too; QoS 0 did not wait.
        client.leave();
        let mut witness = Client::clean(host.mqtt(), V5, &unique("asks"));
        assert_eq!(witness.subscribe(&format!("{root}/#"), 0), 0);
        publish(0);
        // The last of them has been handed out.
        delivered(&mut witness, &["0", "2", "5", "6"]);
        let mut client = Client::open(host.mqtt(), &connect);
        assert!(client.session_present);
        delivered(&mut client, &["2", "5"]);
        client.ping();
    }
}

#[test]
fn a_question_that_ends_in_a_fault_is_refused_and_others_do_not_wait_for_it() {
    let host = start_with("access-slow", "hostile-access", "{}", 1_500, "");
    let open = |client_id: &str| Client::clean(host.mqtt(), V5, client_id);
    let (mut slow, mut other) = (open("asks-slow"), open("asks-other"));
    slow.publish(&Publish::new("free", 1, 1, "x"));
    slow.expect(ack(0x40, 1));
    slow.publish(&Publish::new("asked/slow", 1, 2, "x"));
    slow.publish(&Publish::new("free", 1, 3, "x"));
    slow.publish(&Publish::new("asked/yes", 1, 4, "x"));
    assert_eq!(published(&mut other, "free"), 0);
    assert_eq!(published(&mut other, "asked/yes"), 0);
    assert_eq!(other.subscribe("asked/x", 1), 1);
    // Nothing is answered out of turn, but for this.
    slow.ping();
    slow.expect_refused(0x40, 2, 0x87);
    slow.expect(ack(0x40, 3));
    slow.expect(ack(0x40, 4));
    // A SUBSCRIBE waits in the same way.
    slow.send([subscribe(V5, 9, &[], &[("asked/3/slow", 1), ("asked/4", 1)]), PINGREQ.to_vec()].concat());
    slow.expect([0xd0, 0]);
    assert_eq!(slow.codes(0x90, 9), [0x87, 1]);
    assert_eq!(published(&mut slow, "asked/5"), 0);
    let faults = calls(&host, "fault");
    assert_eq!(published(&mut other, "asked/trap"), 0x87);
    assert_eq!(calls(&host, "fault"), faults + 1.0);
    assert_eq!(published(&mut other, "asked/more"), 0);
    host.says("gate.wasm failed, what was asked is refused: ");
    // A client that goes while it is asked for leaves the instance to others.
    slow.publish(&Publish::new("asked/2/slow", 1, 5, "x"));
    slow.cut();
    assert_eq!(published(&mut open("asks-new"), "asked/yes"), 0);
}

#[test]
fn all_rounds_of_an_exchange_go_to_the_instance_that_asked() {
    // Its own: a fault of another test would end the exchanges of the instance.
    let host = start("access-rounds", "hostile-access", "{}", "");
    let connect =
        || Connect { properties: auth_properties("badge", "first"), ..Connect::new(V5, &unique("rounds")) };
    let asked = |client: &mut Client| {
        let packet = client.receive();
        assert_eq!((packet.first, packet.body[0]), (0xf0, 0x18), "{packet:?}");
        each_property(&packet.body[2..]).into_iter().find(|(id, _)| *id == 0x16).expect("data").1
    };
    let open = || {
        let mut client = Client::raw(host.mqtt(), V5);
        client.send(connect().bytes());
        let number = asked(&mut client);
        (client, number)
    };
    let ((mut one, first), (mut two, second)) = (open(), open());
    assert_ne!(first, second, "each exchange has a number of its own");
    one.send(auth(0x18, "badge", "more"));
    assert_eq!(asked(&mut one), first);
    for client in [&mut one, &mut two] {
        client.send(auth(0x18, "badge", "done"));
        let connack = client.receive();
        assert_eq!((connack.first, connack.body[1]), (0x20, 0));
    }
    // Rounds are bounded, and a trap in one ends the exchange.
    let (mut endless, _) = open();
    let refused = loop {
        endless.send(auth(0x18, "badge", "more"));
        let packet = endless.receive();
        if packet.first == 0x20 {
            break packet.body[1];
        }
    };
    assert_eq!(refused, 0x87);
    let (mut trapping, _) = open();
    trapping.send(auth(0x18, "badge", "trap"));
    assert_eq!(trapping.receive().body[1], 0x88);
    let unknown =
        Connect { properties: [vec![0x15], field("badge")].concat(), ..Connect::new(V5, "refused") };
    assert_eq!(answer(&host, &unknown).0, 0x87);
}

/// A client that has proved itself to [`hostile`] by a method, with what CONNECT says beside.
fn by_method(host: &Host, connect: Connect) -> Client {
    let mut client = Client::raw(host.mqtt(), V5);
    client.send(Connect { properties: auth_properties("badge", "first"), ..connect }.bytes());
    expect_auth(&mut client, 0x18);
    client.send(auth(0x18, "badge", "done"));
    let connack = client.receive();
    assert_eq!((connack.first, connack.body[1]), (0x20, 0));
    client
}

fn expect_auth(client: &mut Client, code: u8) {
    let packet = client.receive();
    assert_eq!((packet.first, packet.body.first().copied().unwrap_or(0)), (0xf0, code), "{packet:?}");
}

#[test]
fn while_a_client_authenticates_again_the_rest_of_its_connection_goes_on() {
    let host = start("access-again", "hostile-access", "{}", "");
    let mut client = by_method(&host, Connect::new(V5, "again"));
    let publish = Publish::new("x", 0, 0, "between").bytes(V5);
    // What stands behind an AUTH is answered before it.
    client.send([auth(0x19, "badge", "again"), publish, PINGREQ.to_vec()].concat());
    client.expect([0xd0, 0]);
    expect_auth(&mut client, 0x18);
    client.send([auth(0x18, "badge", "done"), PINGREQ.to_vec()].concat());
    client.expect([0xd0, 0]);
    expect_auth(&mut client, 0);
    client.send(auth(0x19, "badge", "again"));
    expect_auth(&mut client, 0x18);
    client.send([auth(0x18, "badge", "loop"), PINGREQ.to_vec()].concat());
    client.expect([0xd0, 0]);
    assert_eq!(client.disconnected(), 0x87, "a fault lets nobody stay");

    let mut hasty = by_method(&host, Connect::new(V5, "hasty"));
    hasty.send([auth(0x19, "badge", "again"), auth(0x18, "badge", "done")].concat());
    assert_eq!(hasty.disconnected(), 0x82, "it answers what it was not asked yet");
}

#[test]
fn a_will_that_the_rights_of_authenticating_again_forbid_is_forgotten() {
    let host = start("access-will", "hostile-access", "{}", "");
    let root = unique("will");
    let topic = |last: &str| format!("{root}/{last}");
    let mut witness = Client::clean(host.mqtt(), V5, "asks-will");
    assert_eq!(witness.subscribe(&topic("#"), 0), 0);
    for (data, will) in [("done", topic("allowed")), ("less", topic("forbidden"))] {
        let connect = Connect { will: Some(Will::new(&will, 0)), ..Connect::new(V5, "leaves") };
        let mut client = by_method(&host, connect);
        client.send(auth(0x19, "badge", "again"));
        expect_auth(&mut client, 0x18);
        client.send(auth(0x18, "badge", data));
        expect_auth(&mut client, 0);
        client.cut();
        // A will comes before what its client publishes on its next connection.
        let mut back = by_method(&host, Connect::new(V5, "leaves"));
        back.publish(&Publish::new(&topic("after"), 0, 0, "x"));
        if data == "done" {
            assert_eq!(witness.delivered().topic, will);
        }
        assert_eq!(witness.delivered().topic, topic("after"));
    }
    host.says(&format!("client leaves, topic {}", topic("forbidden")));
}

#[test]
fn one_address_that_keeps_the_plugin_busy_keeps_no_other_out() {
    const STRANGERS: usize = 200;
    let listener = "    - { bind: 127.0.0.1:0, proxy_protocol: { from: [127.0.0.0/8] } }";
    let mut host = prepare("access-turns", "hostile-access", listener, "{}", 50, "");
    host.run();
    assert_eq!(reason(&host, "first"), 0);
    // PROXY protocol, version 2: from 192.0.2.7.
    let header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\x02\x07\x7f\0\0\x01\x30\x39\x07\x5b";
    let connect = [&header[..], &Connect::new(V5, "loop").bytes()].concat();
    let strangers: Vec<_> = (0..STRANGERS)
        .map(|_| {
            let mut socket = TcpStream::connect(host.listener(1)).expect("the host listens");
            socket.write_all(&connect).expect("the host reads");
            socket
        })
        .collect();
    assert_eq!(reason(&host, "honest"), 0);
    let served = calls(&host, "fault");
    assert!(served < STRANGERS as f64 * 0.75, "{served} of those who came first were served first");
    drop(strangers);
}

#[test]
fn a_changed_file_counts_once_it_is_ready_and_a_broken_one_changes_nothing() {
    let host = start("access-reload", "hostile-access", "{}", "");
    assert_eq!(reason(&host, "anybody"), 0);
    host.folder.write("access/gate.wasm", "no plugin");
    assert_eq!(reason(&host, "anybody"), 0);
    host.says("gate.wasm: not WebAssembly");
    // A plugin that is one for messages.
    replace(&host, "hostile");
    assert_eq!(reason(&host, "anybody"), 0);
    host.says("is a step, no access plugin: put it into the plugins folder");
    replace(&host, "plugin-network-gate");
    assert_eq!(reason(&host, "anybody"), 0, "the old one answers while the new one is compiled");
    host.says("a changed file is in use");
    assert_eq!(reason(&host, "anybody"), 0x87);
}

#[test]
fn an_access_plugin_among_the_steps_is_refused_by_name() {
    let mut host = Host::prepare("access-step", "");
    host.drop_plugin("10-gate.wasm", fresh("plugin-network-gate"));
    host.launch();
    host.says("is an access plugin, no step: name its file in mqtt.access.authenticate");
}
