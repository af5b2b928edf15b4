//! What MQTT 3.1.1 says for itself, packet by packet, against the real host.
//! `host/docs/mqtt-conformance.md` says which statement each test covers.

use std::sync::Arc;

use headworks_tests::host::{Host, Shared};
use headworks_tests::mqtt::Version::V311;
use headworks_tests::packets::{
    Client, Connect, Publish, Will, ack, field, packet, subscribe, unique, unsubscribe,
};

static HOST: Shared = Shared::new();

fn host() -> Arc<Host> {
    HOST.get("mqtt-v3", "")
}

fn client(host: &Host) -> Client {
    Client::clean(host.mqtt(), V311, &unique("client"))
}

#[test]
fn a_connect_that_breaks_the_rules_is_closed_without_an_answer() {
    let host = host();
    let plain = Connect::new(V311, "rules");
    let will = |topic: &[u8]| Connect {
        will: Some(Will { topic: topic.into(), ..Will::new("", 1) }),
        ..plain.clone()
    };
    let username = |username: &[u8]| Connect { username: Some(username.into()), ..plain.clone() };
    let cases = [
        ("reserved flag", Connect { flip: 0x01, ..plain.clone() }),
        ("will QoS without will", Connect { flip: 0x08, ..plain.clone() }),
        ("will retain without will", Connect { flip: 0x20, ..plain.clone() }),
        ("will flag without will", Connect { flip: 0x04, ..plain.clone() }),
        ("will QoS 3", Connect { flip: 0x10, ..will(b"t") }),
        ("will without its flag", Connect { flip: 0x0c, ..will(b"t") }),
        ("user name flag without user name", Connect { flip: 0x80, ..plain.clone() }),
        ("user name without its flag", Connect { flip: 0x80, ..username(b"u") }),
        ("password without user name", Connect { password: Some(b"p".into()), ..plain.clone() }),
        ("password without its flag", Connect { password: Some(b"p".into()), flip: 0x40, ..username(b"u") }),
        ("password flag without password", Connect { flip: 0x40, ..username(b"u") }),
        ("user name is not UTF-8", username(b"\xff")),
        ("user name has a surrogate", username(b"\xed\xa0\x80")),
        ("user name has a NUL", username(b"a\0b")),
        ("will topic is not UTF-8", will(b"\xc3\x28")),
        ("will topic has a NUL", will(b"a\0")),
        ("will topic has a wildcard", will(b"a/#")),
        ("client id is not UTF-8", Connect { client_id: b"\xff\xfe".into(), ..plain.clone() }),
        ("another protocol", Connect { name: "MQTQ", ..plain.clone() }),
    ];
    for (what, connect) in cases {
        let mut client = Client::raw(host.mqtt(), V311);
        client.send(connect.bytes());
        assert_eq!(client.try_receive(), None, "{what}");
    }
    // The fixed header's flags, and a body that is cut short.
    let good = plain.bytes();
    for bytes in [[&[0x11], &good[1..]].concat(), packet(0x10, &[&good[2..good.len() - 1]])] {
        let mut client = Client::raw(host.mqtt(), V311);
        client.send(bytes);
        client.closed();
    }
}

#[test]
fn connects_of_all_kinds_are_taken() {
    let host = host();
    let plain = Connect::new(V311, "");
    let cases = [
        plain.clone(),
        Connect { username: Some("ü".into()), ..plain.clone() },
        Connect { username: Some(b"".into()), password: Some(b"\0\xff".into()), ..plain.clone() },
        Connect {
            will: Some(Will { retain: true, ..Will::new("t", 2) }),
            username: Some(b"u".into()),
            password: Some(b"".into()),
            ..plain.clone()
        },
    ];
    for connect in cases {
        Client::open(host.mqtt(), &connect).leave();
    }
    let old = Connect { name: "MQIsdp", level: 3, ..Connect::new(V311, &unique("old")) };
    Client::open(host.mqtt(), &old).leave();
}

#[test]
fn an_unknown_protocol_level_is_told_return_code_1() {
    let host = host();
    for level in [0, 3, 6, 0x80, 0x86] {
        let mut client = Client::raw(host.mqtt(), V311);
        client.send(Connect { level, ..Connect::new(V311, "level") }.bytes());
        client.expect([0x20, 2, 0, 1]);
        client.closed();
    }
}

#[test]
fn an_empty_client_id_needs_a_clean_session_and_gets_one_of_its_own() {
    let host = host();
    let mut refused = Client::raw(host.mqtt(), V311);
    refused.send(Connect { clean: false, ..Connect::new(V311, "") }.bytes());
    refused.expect([0x20, 2, 0, 2]);
    refused.closed();
    let mut first = Client::clean(host.mqtt(), V311, "");
    let mut second = Client::clean(host.mqtt(), V311, "");
    assert!(!first.session_present && !second.session_present);
    first.ping();
    second.ping();
}

#[test]
fn a_second_connect_closes_the_connection() {
    let host = host();
    let connect = Connect::new(V311, &unique("twice"));
    let mut client = Client::open(host.mqtt(), &connect);
    client.send(connect.bytes());
    client.closed();
}

#[test]
fn a_second_connection_with_a_client_id_ends_the_first() {
    let host = host();
    let client_id = unique("taken");
    let mut first = Client::clean(host.mqtt(), V311, &client_id);
    let mut second = Client::clean(host.mqtt(), V311, &client_id);
    first.closed();
    second.ping();
}

#[test]
fn a_silent_client_is_closed_after_its_keep_alive() {
    let host = host();
    let connect = Connect { keep_alive: 1, ..Connect::new(V311, &unique("silent")) };
    Client::open(host.mqtt(), &connect).closed();
}

#[test]
fn packets_that_break_the_rules_close_the_connection() {
    let host = host();
    let publish = |topic: &[u8], first: u8| packet(first, &[&field(topic), b"\0\x01x"]);
    let filter = |filter: &[u8], qos: &[u8]| packet(0x82, &[&[0, 1], &field(filter), qos]);
    let cases = [
        ("packet type 0", vec![0x00, 0]),
        ("packet type 15", vec![0xf0, 0]),
        ("a CONNACK", vec![0x20, 2, 0, 0]),
        ("a SUBACK", vec![0x90, 3, 0, 1, 0]),
        ("a PINGRESP", vec![0xd0, 0]),
        ("QoS 3", publish(b"t", 0x36)),
        ("DUP with QoS 0", publish(b"t", 0x38)),
        ("a `#` in a topic", publish(b"a/#", 0x32)),
        ("a `+` in a topic", publish(b"a/+/b", 0x30)),
        ("an empty topic", publish(b"", 0x32)),
        ("a NUL in a topic", publish(b"a\0b", 0x32)),
        ("a topic that is not UTF-8", publish(b"\xff", 0x32)),
        ("a topic with a surrogate", publish(b"\xed\xbf\xbf", 0x30)),
        ("a PUBLISH without a packet id", packet(0x32, &[&field("t")])),
        ("packet id 0 in PUBLISH", packet(0x34, &[&field("t"), &[0, 0]])),
        ("a topic longer than its packet", vec![0x30, 3, 0xff, 0xff, b'a']),
        ("PUBACK with flags", vec![0x41, 2, 0, 1]),
        ("PUBREC with flags", vec![0x52, 2, 0, 1]),
        ("PUBREL without its flags", vec![0x60, 2, 0, 1]),
        ("PUBCOMP with flags", vec![0x72, 2, 0, 1]),
        ("a PUBREL that is too long", vec![0x62, 3, 0, 1, 0]),
        ("SUBSCRIBE without its flags", [&[0x80], &subscribe(V311, 1, &[], &[("a", 0)])[1..]].concat()),
        ("SUBSCRIBE without a filter", subscribe(V311, 1, &[], &[])),
        ("SUBSCRIBE without a QoS", filter(b"a", b"")),
        ("SUBSCRIBE with QoS 3", filter(b"a", &[3])),
        ("SUBSCRIBE with reserved bits", filter(b"a", &[0x81])),
        ("SUBSCRIBE with packet id 0", subscribe(V311, 0, &[], &[("a", 0)])),
        ("a filter that is not UTF-8", filter(b"\xc0\x80", &[0])),
        ("a NUL in a filter", filter(b"a\0", &[0])),
        ("an empty filter", filter(b"", &[0])),
        ("UNSUBSCRIBE without its flags", [&[0xa0], &unsubscribe(V311, 1, &["a"])[1..]].concat()),
        ("UNSUBSCRIBE without a filter", unsubscribe(V311, 1, &[])),
        ("UNSUBSCRIBE with a NUL", packet(0xa2, &[&[0, 1], &field(b"a\0")])),
        ("UNSUBSCRIBE with no UTF-8", packet(0xa2, &[&[0, 1], &field(b"\xff")])),
        ("PINGREQ with flags", vec![0xc1, 0]),
        ("DISCONNECT with flags", vec![0xe1, 0]),
        ("a remaining length of five bytes", vec![0x30, 0x80, 0x80, 0x80, 0x80, 1]),
        ("a packet over max_packet_size", vec![0x30, 0x80, 0x80, 0x80, 0x7f]),
    ];
    for (what, bytes) in cases {
        let mut client = client(&host);
        client.send(bytes);
        assert_eq!(client.try_receive(), None, "{what}");
    }
}

#[test]
fn a_publish_that_is_not_allowed_is_acknowledged_all_the_same() {
    let host = host();
    let mut client = client(&host);
    for qos in 0..=2 {
        client.publish_through(&Publish::new("$SYS/mine", qos, 4, "x"));
    }
}

#[test]
fn more_publishes_than_may_be_in_flight_are_read_later_and_all_acknowledged() {
    let host = host();
    let mut client = client(&host);
    let all = (1..=3_000).flat_map(|id| Publish::new("inflight", 1, id, "x").bytes(V311));
    client.send(all.collect::<Vec<u8>>());
    for id in 1..=3_000 {
        client.expect(ack(0x40, id));
    }
}

#[test]
fn the_log_names_who_is_refused_or_sent_away_and_why() {
    let proxied = "{ bind: 127.0.0.1:0, allow_anonymous: true, proxy_protocol: { from: [127.0.0.0/8] } }";
    let mqtt = format!("mqtt: {{ listeners: [ {{ bind: 127.0.0.1:0 }}, {proxied} ] }}");
    let mut host = Host::prepare_with("mqtt-named", &mqtt, "");
    host.run();
    let plain = |client_id: &str| Connect::new(V311, client_id);
    let refused = |connect: Connect| {
        let mut client = Client::raw(host.mqtt(), V311);
        client.send(connect.bytes());
        while client.try_receive().is_some() {}
    };
    // A health check of another protocol, again and again, hides no client.
    for _ in 0..3 {
        let mut check = Client::raw(host.mqtt(), V311);
        check.send(*b"GET / HTTP/1.0\r\n\r\n");
        check.closed();
    }
    refused(Connect { password: Some(b"x".into()), ..plain("plc-7") });
    refused(Connect { clean: false, ..plain("") });
    refused(plain(&"x".repeat(513)));
    refused(Connect { will: Some(Will::new("a/+", 1)), ..plain("plc-8") });
    // One id at two addresses; a device that comes back from where it was is nothing to tell.
    let at = |address: u8, client_id: &str| {
        let mut client = Client::raw(host.listener(1), V311);
        let addresses = [192, 0, 2, address, 127, 0, 0, 1, 0xc3, 0x50, 0x07, 0x5b];
        client.send([&b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c"[..], &addresses].concat());
        client.send(plain(client_id).bytes());
        assert_eq!(client.receive().first, 0x20, "CONNACK");
        client
    };
    for (first, second, client_id) in [(7, 7, "back"), (7, 9, "twin")] {
        let mut first = at(first, client_id);
        let _second = at(second, client_id);
        first.closed();
    }
    // Two devices behind one router.
    let mut routed = at(8, "routed");
    for _ in 0..3 {
        let other = at(8, "routed");
        std::mem::replace(&mut routed, other).closed();
    }
    Client::open(host.mqtt(), &Connect { keep_alive: 1, ..plain("quiet") }).closed();
    for said in [
        "malformed: the first packet is not CONNECT: 127.0.0.1:",
        "malformed: a password without a user name: client plc-7 at 127.0.0.1:",
        "invalid: no client id with clean session 0: set a client id, or clean session 1: client without an id",
        "invalid: a client id of more than 512 bytes: client xxx",
        "invalid: a will whose topic is empty or has a wildcard: client plc-8 at 127.0.0.1:",
        "one client id, two connections: client twin at 192.0.2.7:50000: taken over from 192.0.2.9:50000",
        "one client id, two connections: client routed at 192.0.2.8:50000: taken over from 192.0.2.8:50000, \
         3 times within a minute",
        "client was silent for longer than its keep alive: client quiet at 127.0.0.1:",
    ] {
        host.says(said);
    }
    assert!(!host.log().contains("client back at"), "{}", host.log());
}
