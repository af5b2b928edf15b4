//! Access plugins in the real host: what they decide, and what a bad one does.

use std::sync::Arc;
use std::time::Duration;

use headworks::access::PasswordFile;
use headworks_tests::host::{Host, Shared, fresh};
use headworks_tests::mqtt::Version::V5;
use headworks_tests::packets::{
    Client, Connect, Publish, auth, auth_properties, each_property, field, unique,
};
use headworks_tests::process::eventually;

static HOSTILE: Shared = Shared::new();

fn start(name: &str, plugin: &str, config: &str, more: &str) -> Host {
    let mqtt = format!(
        "mqtt:
  listeners:
    - {{ bind: 127.0.0.1:0 }}
  access:
    authenticate:
      - {{ type: plugin, file: access/gate.wasm, config: {config}, limits: {{ cpu_ms: 50, memory: 16MiB }} }}
{more}"
    );
    let mut host = Host::prepare_with(name, &mqtt, "");
    let mut users = PasswordFile::default();
    users.set("ann", "ann", None).expect("a user");
    host.folder.write("passwords", users.to_text());
    std::fs::create_dir_all(host.folder.join("access")).expect("our folder");
    replace(&host, plugin);
    host.run();
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
    let config = "{ networks: [ { from: 127.0.0.0/8, name: line-4, publish: ['acme/line-4/#'] } ] }";
    let next = "      - { type: passwords, file: passwords }\n    rules:\n      - { effect: allow, topics: ['%u/#'] }\n";
    let mqtt_users = |host: &Host| host.cli_json(&["clients", "list"]);
    let host = start("access-network", "plugin-network-gate", config, next);
    let (code, mut device) = answer(&host, &Connect::new(V5, "plc"));
    assert_eq!(code, 0);
    assert_eq!(published(&mut device, "acme/line-4/temperature"), 0);
    assert_eq!(published(&mut device, "line-4/x"), 0, "the config's rules come after the plugin's");
    assert_eq!(published(&mut device, "acme/line-5/temperature"), 0x87);
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
    for bad in
        ["loop", "trap", "eat", "bad-filter", "bad-effect", "ask", "no-name", "flood", "liar", "unasked"]
    {
        let faults = calls(&host, "fault");
        assert_eq!(reason(&host, bad), 0x88, "{bad}");
        assert!(calls(&host, "fault") > faults, "{bad} is counted");
        assert_eq!(reason(&host, &unique("good")), 0, "after {bad}");
    }
    host.says("gate.wasm failed, the client is refused: ");
    assert_eq!(reason(&host, "refused"), 0x87);
}

#[test]
fn attributes_go_with_each_message_of_the_client() {
    let host = hostile();
    let (code, mut client) = answer(&host, &Connect::new(V5, "attributes"));
    assert_eq!((code, published(&mut client, "badge/topic")), (0, 0));
    let tail =
        host.cli(&["streams", "tail", "telemetry", "--from", "start", "--max", "100", "--format", "json"]);
    let line = tail.lines().find(|line| line.contains("badge/topic")).expect("the message");
    assert!(line.contains("badge\""), "{line}");
}

#[test]
fn a_client_is_disconnected_when_its_identity_is_valid_no_longer() {
    let host = hostile();
    let (code, mut client) = answer(&host, &Connect::new(V5, "short"));
    assert_eq!((code, client.disconnected()), (0, 0x87));
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

#[test]
fn a_changed_file_counts_from_the_next_connect_and_a_broken_one_changes_nothing() {
    let host = start("access-reload", "hostile-access", "{}", "");
    assert_eq!(reason(&host, "anybody"), 0);
    host.folder.write("access/gate.wasm", "no plugin");
    assert_eq!(reason(&host, "anybody"), 0);
    host.says("gate.wasm: not WebAssembly");
    // A plugin that is one for messages.
    replace(&host, "hostile");
    assert_eq!(reason(&host, "anybody"), 0);
    replace(&host, "plugin-network-gate");
    eventually("the new plugin decides", Duration::from_secs(30), || {
        (reason(&host, "anybody") == 0x87).then_some(())
    });
}

#[test]
fn an_access_plugin_among_the_steps_is_refused_by_name() {
    let mut host = Host::prepare("access-step", "");
    host.drop_plugin("10-gate.wasm", fresh("plugin-network-gate"));
    host.launch();
    host.says("is an access plugin, no step: name its file in mqtt.access.authenticate");
}
