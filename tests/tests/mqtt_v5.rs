//! What MQTT 5.0 says for itself, packet by packet, against the real host.
//! `host/docs/mqtt-conformance.md` says which statement each test covers.
//! Properties and flows are in `mqtt_v5_messages.rs`.

use std::sync::Arc;

use headworks_tests::host::{Host, Shared};
use headworks_tests::mqtt::Version::V5;
use headworks_tests::packets::{
    Client, Connect, Publish, Will, ack, field, packet, subscribe, unique, unsubscribe, user, var_int,
};

static HOST: Shared = Shared::new();

fn host() -> Arc<Host> {
    HOST.get("mqtt-v5", "")
}

fn client(host: &Host) -> Client {
    Client::clean(host.mqtt(), V5, &unique("client"))
}

fn connect() -> Connect {
    Connect::new(V5, &unique("connect"))
}

/// Malformed packet and protocol error: which of both it is, the standard does not always say.
const BROKEN: &[u8] = &[0x81, 0x82];
const MALFORMED: &[u8] = &[0x81];
const PROTOCOL: &[u8] = &[0x82];

#[test]
fn a_connect_that_breaks_the_rules_is_refused_with_its_reason() {
    let host = host();
    let plain = connect();
    let with = |properties: &[u8]| Connect { properties: properties.into(), ..plain.clone() };
    let will = |topic: &[u8], properties: &[u8]| Connect {
        will: Some(Will { topic: topic.into(), properties: properties.into(), ..Will::new("", 1) }),
        ..plain.clone()
    };
    let username = |username: &[u8]| Connect { username: Some(username.into()), ..plain.clone() };
    let response_topic = |topic: &str| [vec![0x08], field(topic)].concat();
    let cases: Vec<(&str, Connect, &[u8])> = vec![
        ("reserved flag", Connect { flip: 0x01, ..plain.clone() }, MALFORMED),
        ("will QoS without will", Connect { flip: 0x08, ..plain.clone() }, MALFORMED),
        ("will retain without will", Connect { flip: 0x20, ..plain.clone() }, MALFORMED),
        ("will flag without will", Connect { flip: 0x04, ..plain.clone() }, MALFORMED),
        ("will QoS 3", Connect { flip: 0x10, ..will(b"t", &[]) }, MALFORMED),
        ("will without its flag", Connect { flip: 0x0c, ..will(b"t", &[]) }, MALFORMED),
        ("user name flag without user name", Connect { flip: 0x80, ..plain.clone() }, MALFORMED),
        ("user name without its flag", Connect { flip: 0x80, ..username(b"u") }, MALFORMED),
        ("password flag without password", Connect { flip: 0x40, ..plain.clone() }, MALFORMED),
        (
            "password without its flag",
            Connect { password: Some(b"p".into()), flip: 0x40, ..plain.clone() },
            MALFORMED,
        ),
        ("user name is not UTF-8", username(b"\xff"), MALFORMED),
        ("user name has a NUL", username(b"a\0"), MALFORMED),
        ("client id is not UTF-8", Connect { client_id: b"\xed\xa0\x80".into(), ..plain.clone() }, MALFORMED),
        ("client id has a NUL", Connect { client_id: b"a\0".into(), ..plain.clone() }, &[0x81, 0x85]),
        ("client id is too long", Connect { client_id: vec![b'x'; 2_000], ..plain.clone() }, &[0x85]),
        ("will topic is not UTF-8", will(b"\xff", &[]), MALFORMED),
        ("will topic has a NUL", will(b"a\0", &[]), MALFORMED),
        ("will topic has a wildcard", will(b"a/+", &[]), &[0x90]),
        ("will topic is empty", will(b"", &[]), &[0x90]),
        ("will's response topic has a wildcard", will(b"t", &response_topic("r/#")), PROTOCOL),
        ("will with a property it does not have", will(b"t", &[0x21, 0, 1]), MALFORMED),
        ("will's user property is not UTF-8", will(b"t", b"\x26\0\x01\xff\0\0"), MALFORMED),
        ("receive maximum 0", with(&[0x21, 0, 0]), BROKEN),
        ("maximum packet size 0", with(&[0x27, 0, 0, 0, 0]), BROKEN),
        ("maximum packet size too small", with(&[0x27, 0, 0, 0, 5]), &[0x95]),
        ("a property twice", with(&[0x21, 0, 9, 0x21, 0, 9]), BROKEN),
        ("request problem information 2", with(&[0x17, 2]), BROKEN),
        ("a property that CONNECT does not have", with(&[0x23, 0, 1]), MALFORMED),
        ("a property that nothing has", with(&[0x7f]), MALFORMED),
        ("a property that is cut short", with(&[0x11, 0]), MALFORMED),
        ("a user property with a NUL", with(&user("a\0", "b")), MALFORMED),
        ("authentication data without a method", with(&[0x16, 0, 1, 1]), PROTOCOL),
        ("an unknown authentication method", with(&[vec![0x15], field("X")].concat()), &[0x8c]),
    ];
    for (what, connect, codes) in cases {
        let mut client = Client::raw(host.mqtt(), V5);
        client.send(connect.bytes());
        let answer = client.try_receive().unwrap_or_else(|| panic!("{what}: closed without a CONNACK"));
        assert_eq!((answer.first, answer.body[0]), (0x20, 0), "{what}: {answer:?}");
        assert!(codes.contains(&answer.body[1]), "{what}: {:#x}", answer.body[1]);
        assert_eq!(client.try_receive(), None, "{what}");
    }
    let good = plain.bytes();
    let mut client = Client::raw(host.mqtt(), V5);
    client.send([&[0x12], &good[1..]].concat());
    client.closed();
    client = Client::raw(host.mqtt(), V5);
    client.send(Connect { name: "MQTQ", ..plain }.bytes());
    client.closed();
}

#[test]
fn connects_of_all_kinds_are_taken() {
    let host = host();
    let properties = [
        &[0x11, 0xff, 0xff, 0xff, 0xff, 0x21, 0, 1, 0x27, 0, 0, 1, 0, 0x22, 0, 9, 0x19, 1, 0x17, 0][..],
        &user("k", "v"),
        &user("k", "v"),
    ];
    let will = Will { properties: vec![0x18, 0, 0, 0, 9, 0x01, 1], retain: true, ..Will::new("t", 2) };
    let cases = [
        Connect { password: Some(b"\0\xff".into()), ..connect() },
        Connect { username: Some("ü".into()), ..connect() },
        Connect { properties: properties.concat(), will: Some(will), ..connect() },
    ];
    for connect in cases {
        let client = Client::open(host.mqtt(), &connect);
        // Nothing that was not asked for, nor what would have to be left out.
        for id in [0x12, 0x13, 0x15, 0x16, 0x1a, 0x1c, 0x1f, 0x24, 0x25, 0x26] {
            assert!(client.properties.iter().all(|(known, _)| *known != id), "{:?}", client.properties);
        }
        client.leave();
    }
}

#[test]
fn an_empty_client_id_gets_one_of_its_own_and_is_told() {
    let host = host();
    let assigned = |clean: bool| {
        let client = Client::open(host.mqtt(), &Connect { clean, ..Connect::new(V5, "") });
        assert!(!client.session_present);
        let id = client.properties.iter().find(|(id, _)| *id == 0x12).expect("assigned client identifier");
        (String::from_utf8(id.1[2..].to_vec()).unwrap(), client)
    };
    let ((one, mut client), (two, _other)) = (assigned(true), assigned(false));
    assert!(!one.is_empty() && one != two);
    // It is used as if the client had sent it.
    let mut again = Client::clean(host.mqtt(), V5, &one);
    assert_eq!(client.disconnected(), 0x8e);
    again.ping();
}

#[test]
fn a_second_connection_with_a_client_id_takes_the_session_over() {
    let host = host();
    let (topic, resuming) = (unique("taken"), Connect::resuming(V5, &unique("taken")));
    let mut first = Client::open(host.mqtt(), &resuming);
    first.subscribe(&topic, 1);
    let mut second = Client::open(host.mqtt(), &resuming);
    assert_eq!(first.disconnected(), 0x8e);
    assert!(second.session_present);
    client(&host).publish_through(&Publish::new(&topic, 1, 1, "x"));
    assert_eq!(second.delivered().text(), "x");
}

#[test]
fn a_silent_client_is_disconnected_after_its_keep_alive() {
    let host = host();
    let mut client = Client::open(host.mqtt(), &Connect { keep_alive: 1, ..connect() });
    assert!(client.properties.iter().all(|(id, _)| *id != 0x13), "no keep alive but its own");
    assert_eq!(client.disconnected(), 0x8d);
}

#[test]
fn packets_that_break_the_rules_end_the_connection_with_their_reason() {
    let host = host();
    let publish = |topic: &[u8], first: u8| packet(first, &[&field(topic), b"\0\x01\0x"]);
    let with = |properties: &[u8]| Publish::new("t", 1, 1, "x").with(properties).bytes(V5);
    let alias = |topic: &str, alias: u16| {
        Publish::new(topic, 0, 0, "").with([&[0x23][..], &alias.to_be_bytes()].concat())
    };
    let filter = |filter: &[u8], options: &[u8]| packet(0x82, &[&[0, 1, 0], &field(filter), options]);
    let disconnect =
        |code: u8, properties: &[u8]| packet(0xe0, &[&[code], &var_int(properties.len()), properties]);
    let cases: Vec<(&str, Vec<u8>, &[u8])> = vec![
        ("packet type 0", vec![0x00, 0], MALFORMED),
        ("a second CONNECT", connect().bytes(), PROTOCOL),
        ("a CONNACK", vec![0x20, 3, 0, 0, 0], PROTOCOL),
        ("a SUBACK", vec![0x90, 4, 0, 1, 0, 0], PROTOCOL),
        ("AUTH without a method in CONNECT", vec![0xf0, 0], PROTOCOL),
        ("AUTH with flags", vec![0xf1, 0], MALFORMED),
        ("QoS 3", publish(b"t", 0x36), MALFORMED),
        ("DUP with QoS 0", publish(b"t", 0x38), MALFORMED),
        ("a `#` in a topic", publish(b"a/#", 0x32), &[0x90]),
        ("a `+` in a topic", publish(b"+", 0x32), &[0x90]),
        ("neither topic nor alias", publish(b"", 0x32), PROTOCOL),
        ("a NUL in a topic", publish(b"a\0b", 0x32), MALFORMED),
        ("a topic that is not UTF-8", publish(b"\xff", 0x32), MALFORMED),
        ("packet id 0 in PUBLISH", Publish::new("t", 2, 0, "x").bytes(V5), BROKEN),
        ("properties longer than the packet", packet(0x30, &[&field("t"), &[9, 1]]), MALFORMED),
        ("topic alias 0", alias("t", 0).bytes(V5), &[0x94]),
        ("topic alias over the maximum", alias("t", 17).bytes(V5), &[0x94]),
        ("topic alias never set", alias("", 5).bytes(V5), PROTOCOL),
        ("a subscription identifier in PUBLISH", with(&[0x0b, 1]), PROTOCOL),
        ("a property twice", with(&[0x01, 1, 0x01, 1]), PROTOCOL),
        ("payload format 2", with(&[0x01, 2]), BROKEN),
        ("a property that PUBLISH does not have", with(&[0x11, 0, 0, 0, 1]), MALFORMED),
        ("a wildcard in the response topic", with(&[vec![0x08], field("a/+")].concat()), PROTOCOL),
        ("a response topic that is not UTF-8", with(b"\x08\0\x01\xff"), MALFORMED),
        ("a content type that is not UTF-8", with(b"\x03\0\x01\xff"), MALFORMED),
        ("a content type with a NUL", with(b"\x03\0\x01\0"), MALFORMED),
        ("a user property that is not UTF-8", with(b"\x26\0\x01a\0\x01\xff"), MALFORMED),
        ("a user property with a NUL", with(&user("a", "\0")), MALFORMED),
        ("PUBACK with flags", vec![0x41, 2, 0, 1], MALFORMED),
        ("PUBREL without its flags", vec![0x60, 2, 0, 1], MALFORMED),
        (
            "SUBSCRIBE without its flags",
            [&[0x80], &subscribe(V5, 1, &[], &[("a", 0)])[1..]].concat(),
            MALFORMED,
        ),
        ("SUBSCRIBE without a filter", subscribe(V5, 1, &[], &[]), PROTOCOL),
        ("SUBSCRIBE without options", filter(b"a", b""), MALFORMED),
        ("SUBSCRIBE with QoS 3", filter(b"a", &[3]), BROKEN),
        ("SUBSCRIBE with retain handling 3", filter(b"a", &[0x30]), BROKEN),
        ("SUBSCRIBE with a reserved bit", filter(b"a", &[0x40]), MALFORMED),
        ("SUBSCRIBE with the other reserved bit", filter(b"a", &[0x80]), MALFORMED),
        ("SUBSCRIBE with packet id 0", subscribe(V5, 0, &[], &[("a", 0)]), BROKEN),
        ("SUBSCRIBE with identifier 0", subscribe(V5, 1, &[0x0b, 0], &[("a", 0)]), BROKEN),
        ("SUBSCRIBE with two identifiers", subscribe(V5, 1, &[0x0b, 1, 0x0b, 2], &[("a", 0)]), BROKEN),
        ("a filter that is not UTF-8", filter(b"\xff", &[0]), MALFORMED),
        ("a NUL in a filter", filter(b"a\0", &[0]), MALFORMED),
        ("UNSUBSCRIBE without its flags", [&[0xa0], &unsubscribe(V5, 1, &["a"])[1..]].concat(), MALFORMED),
        ("UNSUBSCRIBE without a filter", unsubscribe(V5, 1, &[]), PROTOCOL),
        ("UNSUBSCRIBE with no UTF-8", packet(0xa2, &[&[0, 1, 0], &field(b"\xff")]), MALFORMED),
        ("PINGREQ with flags", vec![0xc1, 0], MALFORMED),
        ("DISCONNECT with flags", vec![0xe1, 0], MALFORMED),
        ("DISCONNECT with an unknown reason", disconnect(0x03, &[]), BROKEN),
        ("DISCONNECT that revives the session", disconnect(0, &[0x11, 0, 0, 0, 9]), PROTOCOL),
        ("a remaining length of five bytes", vec![0x30, 0x80, 0x80, 0x80, 0x80, 1], MALFORMED),
        ("a packet over the maximum packet size", vec![0x30, 0x80, 0x80, 0x80, 0x7f], &[0x95]),
    ];
    for (what, bytes, codes) in cases {
        let mut client = client(&host);
        client.send(bytes);
        let answer = client.try_receive().unwrap_or_else(|| panic!("{what}: closed without a DISCONNECT"));
        assert_eq!(answer.first, 0xe0, "{what}: {answer:?}");
        assert!(codes.contains(&answer.body[0]), "{what}: {:#x}", answer.body[0]);
        assert_eq!(client.try_receive(), None, "{what}");
    }
}

#[test]
fn a_publish_that_is_not_allowed_is_told_so_without_ending_the_connection() {
    let host = host();
    // Request Problem Information 0: a reason code and nothing more.
    let mut client = Client::open(host.mqtt(), &Connect { properties: vec![0x17, 0], ..connect() });
    client.publish(&Publish::new("$SYS/mine", 1, 4, "x"));
    client.expect([0x40, 3, 0, 4, 0x87]);
    client.publish(&Publish::new("$SYS/mine", 2, 4, "x"));
    client.expect([0x50, 3, 0, 4, 0x87]);
    // That ended the exchange: the id is free, there is nothing to release.
    client.send(ack(0x62, 4));
    client.expect([0x70, 3, 0, 4, 0x92]);
    client.publish_through(&Publish::new(&unique("free"), 2, 4, "x"));
    client.leave();
}

#[test]
fn a_session_ends_with_its_expiry() {
    let host = host();
    let (topic, client_id) = (unique("expiry"), unique("expiry"));
    let mut watcher = client(&host);
    watcher.subscribe(&topic, 1);
    let connect = Connect { clean: false, ..Connect::new(V5, &client_id) };
    let expiring = |seconds: u8| Connect { properties: vec![0x11, 0, 0, 0, seconds], ..connect.clone() };
    // The will waits longer than the session lives, so it tells of the session's end.
    let will = Will { properties: vec![0x18, 0, 0, 1, 0], ..Will::new(&topic, 1) };
    drop(Client::open(host.mqtt(), &Connect { will: Some(will), ..expiring(1) }));
    assert_eq!(watcher.delivered().text(), "gone");
    let mut back = Client::open(host.mqtt(), &expiring(100));
    assert!(!back.session_present);
    // DISCONNECT may end it at once.
    back.send([0xe0, 7, 0, 5, 0x11, 0, 0, 0, 0]);
    back.closed();
    assert!(!Client::open(host.mqtt(), &expiring(0)).session_present);
}

#[test]
fn a_disconnect_may_change_how_long_the_session_is_kept() {
    let host = host();
    let connect = Connect { clean: false, ..Connect::new(V5, &unique("longer")) };
    let expiring = Connect { properties: vec![0x11, 0, 0, 0, 9], ..connect };
    let mut client = Client::open(host.mqtt(), &expiring);
    client.send([0xe0, 7, 0, 5, 0x11, 0, 0, 2, 0]);
    client.closed();
    assert!(Client::open(host.mqtt(), &expiring).session_present);
}

#[test]
fn a_will_is_not_sent_when_its_client_is_back_before_the_delay_is_over() {
    let host = host();
    let topic = unique("delayed");
    let mut watcher = client(&host);
    watcher.subscribe(&topic, 1);
    let resuming = Connect::resuming(V5, &unique("delayed"));
    let will = Will { properties: vec![0x18, 0, 0, 0, 200], ..Will::new(&topic, 1) };
    drop(Client::open(host.mqtt(), &Connect { will: Some(will), ..resuming.clone() }));
    let mut back = Client::open(host.mqtt(), &resuming);
    assert!(back.session_present);
    back.publish_through(&Publish::new(&topic, 1, 1, "back"));
    back.leave();
    client(&host).publish_through(&Publish::new(&topic, 1, 1, "end"));
    for wanted in ["back", "end"] {
        assert_eq!(watcher.delivered().text(), wanted);
    }
}

#[test]
fn a_delayed_will_is_sent_when_a_clean_start_ends_the_session() {
    let host = host();
    let topic = unique("ended");
    let mut watcher = client(&host);
    watcher.subscribe(&topic, 1);
    let resuming = Connect::resuming(V5, &unique("ended"));
    let will = Will { properties: vec![0x18, 0, 0, 0, 200], ..Will::new(&topic, 1) };
    drop(Client::open(host.mqtt(), &Connect { will: Some(will), ..resuming.clone() }));
    let _new = Client::open(host.mqtt(), &Connect { clean: true, ..resuming });
    assert_eq!(watcher.delivered().text(), "gone");
}

#[test]
fn a_disconnect_that_asks_for_it_publishes_the_will() {
    let host = host();
    for code in [0x04, 0x80, 0x00] {
        let topic = unique("asked");
        let mut watcher = client(&host);
        watcher.subscribe(&topic, 1);
        let mut leaving =
            Client::open(host.mqtt(), &Connect { will: Some(Will::new(&topic, 1)), ..connect() });
        leaving.send([0xe0, 1, code]);
        leaving.closed();
        if code == 0 {
            client(&host).publish_through(&Publish::new(&topic, 1, 1, "end"));
        }
        assert_eq!(watcher.delivered().text(), if code == 0 { "end" } else { "gone" });
    }
}
