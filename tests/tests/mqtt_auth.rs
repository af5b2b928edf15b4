//! Enhanced authentication of MQTT 5 with SCRAM-SHA-256, against the real host:
//! packet by packet, and by a client that people use.

use std::sync::Arc;

use headworks_tests::folder::root;
use headworks_tests::host::{Host, Shared};
use headworks_tests::misbehaving::raise_open_files;
use headworks_tests::mqtt::Version::V5;
use headworks_tests::node;
use headworks_tests::packets::{
    Client, Connect, Packet, Publish, auth, auth_properties, each_property, field, unique,
};
use headworks_tests::process::run;
use headworks_tests::scram::{Final, Login};

static HOST: Shared = Shared::new();
const METHOD: &str = "SCRAM-SHA-256";
const MORE: u8 = 0x18;
const AGAIN: u8 = 0x19;

/// Users whose password is their name; `old` has none for SCRAM.
fn start(name: &str, connect_timeout: &str) -> Host {
    let mqtt = format!(
        "mqtt:
  connect_timeout: {connect_timeout}
  listeners:
    - {{ bind: 127.0.0.1:0 }}
  access:
    authenticate:
      - {{ type: passwords, file: passwords }}
    rules:
      - {{ effect: allow, topics: [\"%u/#\"] }}
"
    );
    let mut host = Host::prepare_with(name, &mqtt, "");
    let scram = ["--scram", "--scram-iterations", "4096"];
    for (user, options) in [("ann", &scram[..]), ("bob", &scram), ("old", &[])] {
        host.passwd(user, user, options);
    }
    host.run();
    host
}

fn host() -> Arc<Host> {
    HOST.get_with(|| start("mqtt-auth", "20s"))
}

fn connect(login: &Login) -> Connect {
    Connect { properties: auth_properties(METHOD, &login.first()), ..Connect::new(V5, &unique("auth")) }
}

/// Method and data of an AUTH or a CONNACK.
fn said(properties: &[u8]) -> (String, Vec<u8>) {
    let properties = each_property(properties);
    let find =
        |id: u8| properties.iter().find(|(known, _)| *known == id).expect("the property").1[2..].to_vec();
    (String::from_utf8(find(0x15)).expect("text"), find(0x16))
}

/// An AUTH with `code`; its data.
fn auth_data(packet: &Packet, code: u8) -> Vec<u8> {
    assert_eq!((packet.first, packet.body[0]), (0xf0, code), "{packet:?}");
    let (method, data) = said(&packet.body[2..]);
    assert_eq!((usize::from(packet.body[1]), &*method), (packet.body.len() - 2, METHOD));
    data
}

/// CONNECT is sent, server-first-message has come.
fn challenged(host: &Host, login: &Login) -> (Client, Final) {
    let mut client = Client::raw(host.mqtt(), V5);
    client.send(connect(login).bytes());
    let server_first = auth_data(&client.receive(), MORE);
    let answer = login.answer(&server_first);
    (client, answer)
}

fn logged_in(host: &Host, user: &str) -> Client {
    let (mut client, answer) = challenged(host, &Login::new("n,,", user, user));
    client.send(auth(MORE, METHOD, &answer.message));
    let connack = client.receive();
    assert_eq!((connack.first, &connack.body[..2]), (0x20, &[0, 0][..]), "{connack:?}");
    let (method, data) = said(&connack.body[3..]);
    assert_eq!((&*method, &*data), (METHOD, answer.server_final.as_bytes()), "the server proves itself too");
    client
}

/// A CONNACK that says no, and the end.
fn refused(client: &mut Client) -> u8 {
    let connack = client.receive();
    assert_eq!((connack.first, connack.body[0]), (0x20, 0), "{connack:?}");
    client.closed();
    connack.body[1]
}

#[test]
fn who_proves_the_password_is_the_user_whom_the_rules_know() {
    let host = host();
    let mut ann = logged_in(&host, "ann");
    ann.publish_through(&Publish::new("ann/x", 1, 1, "x"));
    ann.publish(&Publish::new("bob/x", 1, 2, "x"));
    ann.expect_refused(0x40, 2, 0x87);
    let (mut client, answer) = challenged(&host, &Login::new("y,,", "bob", "bob"));
    client.send(auth(MORE, METHOD, &answer.message));
    assert_eq!(client.receive().body[1], 0, "who could bind a channel may do without");
    let mut plain = Connect::new(V5, &unique("plain"));
    (plain.username, plain.password) = (Some("ann".into()), Some("ann".into()));
    Client::open(host.mqtt(), &plain).leave();
}

#[test]
fn who_guesses_a_password_by_scram_is_told_to_wait_and_other_users_are_not() {
    let host = start("mqtt-auth-guesses", "20s");
    let guess = |_| {
        let (mut client, answer) = challenged(&host, &Login::new("n,,", "ann", "wrong"));
        client.send(auth(MORE, METHOD, &answer.message));
        refused(&mut client)
    };
    let told: Vec<u8> = (0..16).map(guess).collect();
    assert_eq!(told[..5], [0x87; 5], "the first ones cost no wait");
    assert!(told.contains(&0x9f), "connection rate exceeded: {told:02x?}");
    logged_in(&host, "bob");
    assert!(host.metric("headworks_mqtt_refused_connects_total", &[("cause", "guessing")]) >= 1.0);
}

#[test]
fn the_packets_of_an_exchange_are_counted() {
    let host = start("mqtt-auth-counted", "20s");
    let login = Login::new("n,,", "ann", "ann");
    let mut client = Client::raw(host.mqtt(), V5);
    let connect = connect(&login).bytes();
    client.send(&connect);
    let challenge = client.receive();
    let answer = login.answer(&auth_data(&challenge, MORE));
    let auth = auth(MORE, METHOD, &answer.message);
    client.send(&auth);
    assert_eq!(client.receive().body[1], 0);
    for name in ["headworks_mqtt_packets_received_total", "headworks_mqtt_packets_sent_total"] {
        assert_eq!(host.metric(name, &[("type", "auth")]), 1.0, "{name}");
    }
    let received = host.metric("headworks_mqtt_bytes_total", &[("direction", "received")]);
    assert_eq!(received, (connect.len() + auth.len()) as f64);
}

#[test]
fn a_wrong_password_and_users_that_do_not_exist_look_alike_also_after_a_restart() {
    let mut host = start("mqtt-auth-decoys", "20s");
    let attempt = |host: &Host, user: &str| {
        let (mut client, answer) = challenged(host, &Login::new("n,,", user, "wrong"));
        client.send(auth(MORE, METHOD, &answer.message));
        assert_eq!(refused(&mut client), 0x87, "{user}");
        answer.salt
    };
    let users = ["ann", "old", "eve"];
    let salts = users.map(|user| attempt(&host, user));
    assert!(salts[0] != salts[1] && salts[1] != salts[2]);
    assert!(host.stop().success());
    host.run();
    assert_eq!(users.map(|user| attempt(&host, user)), salts);
}

#[test]
fn an_exchange_that_goes_wrong_is_refused_with_its_reason() {
    let host = host();
    let ann = || Login::new("n,,", "ann", "ann");
    for (what, connect, reason) in [
        ("channel binding", connect(&Login::new("p=tls-exporter,,", "ann", "ann")), 0x87),
        ("acting for another", connect(&Login::new("n,a=bob,", "ann", "ann")), 0x87),
        ("another user name in CONNECT", Connect { username: Some("bob".into()), ..connect(&ann()) }, 0x87),
        ("no data", Connect { properties: [vec![0x15], field(METHOD)].concat(), ..connect(&ann()) }, 0x87),
        (
            "another method",
            Connect { properties: auth_properties("SCRAM-SHA-1", "n,,n=a,r=b"), ..connect(&ann()) },
            0x8c,
        ),
    ] {
        let mut client = Client::raw(host.mqtt(), V5);
        client.send(connect.bytes());
        assert_eq!(refused(&mut client), reason, "{what}");
    }
    for (what, bytes, reason) in [
        ("a publish before CONNACK", Publish::new("ann/x", 0, 0, "x").bytes(V5), 0x82),
        ("a PINGREQ before CONNACK", vec![0xc0, 0], 0x82),
        ("a second CONNECT", connect(&ann()).bytes(), 0x82),
        ("AUTH of another method", auth(MORE, "SCRAM-SHA-1", "x"), 0x82),
        ("AUTH without a method", vec![0xf0, 2, MORE, 0], 0x82),
        ("authenticating again before CONNACK", auth(AGAIN, METHOD, &ann().first()), 0x82),
        ("AUTH that says success", vec![0xf0, 0], 0x82),
        ("AUTH with an unknown reason", auth(0x17, METHOD, "x"), 0x81),
        ("a proof that is none", auth(MORE, METHOD, "c=biws,r=x,p=AA=="), 0x87),
    ] {
        let (mut client, _) = challenged(&host, &ann());
        client.send(bytes);
        assert_eq!(refused(&mut client), reason, "{what}");
    }
    let (mut client, _) = challenged(&host, &ann());
    client.send([0xe0, 0]);
    client.closed();
    // An answer that the client would not take is not sent.
    let mut small = Client::raw(host.mqtt(), V5);
    let connect = connect(&ann());
    small.send(
        Connect { properties: [connect.properties.clone(), vec![0x27, 0, 0, 0, 80]].concat(), ..connect }
            .bytes(),
    );
    assert_eq!(refused(&mut small), 0x95);
}

#[test]
fn an_answer_that_never_comes_ends_the_connection() {
    let host = start("mqtt-auth-late", "2s");
    let login = Login::new("n,,", "ann", "ann");
    let (mut client, _) = challenged(&host, &login);
    client.closed();
    let mut client = logged_in(&host, "ann");
    client.send(auth(AGAIN, METHOD, &login.first()));
    auth_data(&client.receive(), MORE);
    assert_eq!(client.disconnected(), 0x87);
}

#[test]
fn a_client_authenticates_again_while_everything_else_goes_on() {
    let host = host();
    let mut client = logged_in(&host, "ann");
    // Others publish as ann, too.
    let topic = unique("ann/again");
    client.subscribe(&topic, 0);
    for _ in 0..2 {
        let login = Login::new("n,,", "ann", "ann");
        client.send(auth(AGAIN, METHOD, &login.first()));
        let answer = login.answer(&auth_data(&client.receive(), MORE));
        client.publish(&Publish::new(&topic, 0, 0, "between"));
        assert_eq!(client.delivered().text(), "between");
        client.send(auth(MORE, METHOD, &answer.message));
        let server_final = auth_data(&client.receive(), 0);
        assert_eq!(server_final, answer.server_final.as_bytes());
    }
    client.publish_through(&Publish::new(&topic, 0, 0, "after"));
}

#[test]
fn authenticating_again_that_goes_wrong_ends_the_connection_with_its_reason() {
    let host = host();
    let login = |user: &str, password: &str| Login::new("n,,", user, password);
    for (what, user, password) in
        [("a wrong password", "ann", "wrong"), ("another user", "bob", "bob"), ("nobody", "eve", "eve")]
    {
        let (mut client, login) = (logged_in(&host, "ann"), login(user, password));
        client.send(auth(AGAIN, METHOD, &login.first()));
        let answer = login.answer(&auth_data(&client.receive(), MORE));
        client.send(auth(MORE, METHOD, &answer.message));
        assert_eq!(client.disconnected(), 0x87, "{what}");
    }
    let first = login("ann", "ann").first();
    for (what, bytes, reason) in [
        ("another method", auth(AGAIN, "SCRAM-SHA-1", &first), 0x82),
        ("no method", vec![0xf0, 2, AGAIN, 0], 0x82),
        ("an answer to nothing", auth(MORE, METHOD, &first), 0x82),
        ("success, said by the client", auth(0, METHOD, ""), 0x82),
        ("a malformed first message", auth(AGAIN, METHOD, "p=x,,n=ann,r=x"), 0x87),
    ] {
        let mut client = logged_in(&host, "ann");
        client.send(bytes);
        assert_eq!(client.disconnected(), reason, "{what}");
    }
    let mut client = logged_in(&host, "ann");
    client.send(auth(AGAIN, METHOD, &first));
    auth_data(&client.receive(), MORE);
    client.send(auth(AGAIN, METHOD, &first));
    assert_eq!(client.disconnected(), 0x82, "once more before the end");
}

#[test]
fn mqtt_js_logs_in_by_scram() {
    let host = host();
    let script = root().join("tests/clients/scram.js");
    let login = |password: &str| {
        let url = format!("mqtt://{}", host.mqtt());
        run(node::command().arg(&script).args([&url, "ann", password]))
    };
    assert_eq!(login("ann").trim(), "the server proved itself; published");
    assert_eq!(login("wrong").trim(), "refused 135");
}

/// What a hash of `headworks passwd` is computed in.
const VERIFICATION_BYTES: u64 = 19 << 20;
/// What a client that logs in takes beside it, with room to spare.
const LOGIN_BYTES: u64 = 12 << 10;

#[test]
fn a_thousand_logins_at_once_take_the_memory_of_as_many_verifications_as_run_at_a_time() {
    const LOGINS: u64 = 1_000;
    raise_open_files();
    let mut host = start("mqtt-auth-memory", "5s");
    // Each has a line of its own, and is verified by itself.
    let file = host.folder.join("passwords");
    let line = std::fs::read_to_string(&file).expect("written by the host");
    let hash = line.lines().find_map(|line| line.strip_prefix("old:")).expect("a user").to_owned();
    let users: String = (0..LOGINS).map(|n| format!("u{n}:{hash}\n")).collect();
    std::fs::write(&file, users).expect("our file");
    host.stop();
    host.run();
    let before = host.process().peak_bytes();
    let mut clients: Vec<Client> = (0..LOGINS)
        .map(|n| {
            let mut login = Connect::new(V5, &unique("many"));
            (login.username, login.password) = (Some(format!("u{n}").into()), Some("old".into()));
            let mut client = Client::raw(host.mqtt(), V5);
            client.send(login.bytes());
            client
        })
        .collect();
    let codes: Vec<u8> = clients.iter_mut().map(|client| client.receive().body[1]).collect();
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
    let at_a_time = cores.div_ceil(2);
    let accepted = codes.iter().filter(|code| **code == 0).count() as u64;
    assert!(accepted > at_a_time, "{accepted} accepted");
    assert!(codes.iter().all(|code| [0, 0x88].contains(code)), "the others are told to try again");
    let took = host.process().peak_bytes().saturating_sub(before);
    println!("{accepted} of {LOGINS} accepted, {} KiB", took >> 10);
    assert!(took <= at_a_time * VERIFICATION_BYTES + LOGINS * LOGIN_BYTES, "{took} bytes");
}
