//! What MQTT 3.1.1 and 5.0 have in common, packet by packet, against the real
//! host: connections, sessions, wills, the flows of each QoS. (Topics and
//! retained messages: `mqtt_both_topics.rs`.) `host/docs/mqtt-conformance.md` says which statement each test covers.
//!
//! That something is not delivered is shown by a message that is, sent after it.

use headworks_tests::host::{Host, Shared};
use headworks_tests::mqtt::Version::{self, V5};
use headworks_tests::packets::{
    Client, Connect, PINGREQ, Publish, Will, ack, subscribe, unique, unsubscribe,
};

static HOST: Shared = Shared::new();

fn both(test: impl Fn(&Host, Version)) {
    HOST.in_both_versions("mqtt-both", test);
}

#[test]
fn connack_comes_first_and_each_request_is_answered_in_turn() {
    both(|host, version| {
        let mut client = Client::raw(host.mqtt(), version);
        let connect = Connect::new(version, &unique("client")).bytes();
        let subscribe = subscribe(version, 5, &[], &[("a", 1)]);
        let unsubscribe = unsubscribe(version, 6, &["a"]);
        let all = [connect, PINGREQ.to_vec(), subscribe, unsubscribe, PINGREQ.to_vec()].concat();
        client.send(all);
        let firsts: Vec<u8> = (0..5).map(|_| client.receive().first).collect();
        assert_eq!(firsts, [0x20, 0xd0, 0x90, 0xb0, 0xd0]);
        client.leave();
    });
}

#[test]
fn nothing_but_connect_may_come_first() {
    both(|host, version| {
        for bytes in [
            PINGREQ.to_vec(),
            vec![0xe0, 0],
            Publish::new("a", 0, 0, "x").bytes(version),
            subscribe(version, 1, &[], &[("a", 0)]),
            ack(0x62, 1),
        ] {
            let mut client = Client::raw(host.mqtt(), version);
            client.send(bytes);
            client.closed();
        }
    });
}

#[test]
fn client_ids_of_letters_and_digits_and_longer_ones_are_taken() {
    both(|host, version| {
        let long = "x".repeat(200);
        for client_id in ["Z", "0123456789ABCDEFGHIJabc", "nopqrstuvwxyzLMNOPQRSTU", "a client/ü", &long] {
            Client::clean(host.mqtt(), version, client_id).leave();
        }
    });
}

#[test]
fn what_follows_a_refused_connect_is_not_processed() {
    both(|host, version| {
        let topic = unique("refused");
        let mut watcher = Client::unique(host, version);
        watcher.subscribe(&topic, 0);
        let refused = Connect::new(version, &"x".repeat(2_000));
        let mut bad = Client::raw(host.mqtt(), version);
        bad.send([refused.bytes(), Publish::new(&topic, 1, 1, "no").bytes(version)].concat());
        let answer = bad.receive();
        let code = if version == V5 { 0x85 } else { 2 };
        assert_eq!((answer.first, &answer.body[..2]), (0x20, &[0, code][..]));
        bad.closed();
        Client::unique(host, version).publish_through(&Publish::new(&topic, 1, 1, "yes"));
        assert_eq!(watcher.delivered().text(), "yes");
    });
}

#[test]
fn session_present_says_whether_there_was_a_session() {
    both(|host, version| {
        let client_id = unique("session");
        let (clean, resuming) = (Connect::new(version, &client_id), Connect::resuming(version, &client_id));
        for (connect, present) in
            [(&resuming, false), (&resuming, true), (&clean, false), (&resuming, false), (&resuming, true)]
        {
            let client = Client::open(host.mqtt(), connect);
            assert_eq!(client.session_present, present, "{connect:?}");
            client.leave();
        }
        Client::open(host.mqtt(), &clean).leave();
    });
}

#[test]
fn a_session_keeps_subscriptions_and_messages_while_its_client_is_away() {
    both(|host, version| {
        let (topic, away) = (unique("away"), Connect::resuming(version, &unique("away")));
        let mut subscriber = Client::open(host.mqtt(), &away);
        assert_eq!(subscriber.subscribe(&topic, 2), 2);
        subscriber.leave();
        let mut publisher = Client::unique(host, version);
        for (qos, text) in [(1, "one"), (2, "two"), (1, "three")] {
            publisher.publish_through(&Publish::new(&topic, qos, 1, text));
        }
        let mut subscriber = Client::open(host.mqtt(), &away);
        assert!(subscriber.session_present);
        for wanted in ["one", "two", "three"] {
            let got = subscriber.delivered();
            assert_eq!((got.text(), got.dup), (wanted, false));
        }
        publisher.publish_through(&Publish::new(&topic, 1, 1, "live"));
        assert_eq!(subscriber.delivered().text(), "live");
    });
}

#[test]
fn a_session_is_not_kept_where_the_client_did_not_ask_for_it() {
    both(|host, version| {
        let client_id = unique("ends");
        let mut client = Client::clean(host.mqtt(), version, &client_id);
        client.subscribe("a", 1);
        client.leave();
        // Not clean, and with MQTT 5 without an expiry.
        let again = Connect { clean: false, ..Connect::new(version, &client_id) };
        assert!(!Client::open(host.mqtt(), &again).session_present);
    });
}

#[test]
fn a_will_is_published_for_every_end_but_disconnect() {
    both(|host, version| {
        let topic = unique("will");
        let mut watcher = Client::unique(host, version);
        watcher.subscribe(&format!("{topic}/#"), 2);
        let with_will = |end: &str, qos: u8, keep_alive: u16| {
            let will = Will::new(&format!("{topic}/{end}"), qos);
            let connect = Connect::new(version, &unique("will"));
            Client::open(host.mqtt(), &Connect { will: Some(will), keep_alive, ..connect })
        };
        let silent = with_will("silent", 1, 1);
        with_will("polite", 1, 9).leave();
        drop(with_will("cut", 0, 9));
        let got = watcher.delivered();
        assert_eq!(
            (got.topic, got.qos, got.retain, &got.payload[..]),
            (format!("{topic}/cut"), 0, false, &b"gone"[..])
        );
        let mut broken = with_will("broken", 2, 9);
        broken.send([0xf1, 0]);
        while broken.try_receive().is_some() {}
        let got = watcher.delivered();
        assert_eq!((got.topic, got.qos), (format!("{topic}/broken"), 2));
        // No will flag, no will.
        drop(Client::unique(host, version));
        let got = watcher.delivered();
        assert_eq!((got.topic, got.qos), (format!("{topic}/silent"), 1));
        drop(silent);
    });
}

#[test]
fn a_will_is_published_once() {
    both(|host, version| {
        let (topic, client_id) = (unique("once"), unique("once"));
        let mut watcher = Client::unique(host, version);
        watcher.subscribe(&topic, 1);
        let connect = Connect { will: Some(Will::new(&topic, 1)), ..Connect::new(version, &client_id) };
        drop(Client::open(host.mqtt(), &connect));
        assert_eq!(watcher.delivered().text(), "gone");
        // The same client without a will: the old one is not part of its state.
        drop(Client::clean(host.mqtt(), version, &client_id));
        Client::clean(host.mqtt(), version, &client_id).publish_through(&Publish::new(&topic, 1, 1, "end"));
        assert_eq!(watcher.delivered().text(), "end");
    });
}

#[test]
fn each_qos_gets_its_answer_with_its_packet_id() {
    both(|host, version| {
        let mut client = Client::unique(host, version);
        for packet_id in [1, 0x1234, 0xffff] {
            for qos in 0..=2 {
                client.publish_through(&Publish::new(&unique("answer"), qos, packet_id, "x"));
            }
        }
        // A repeated QoS 1 message is acknowledged as well, a repeated PUBREL too.
        client.publish_through(&Publish::new("again", 1, 7, "x").dup());
        client.publish_through(&Publish::new("again", 2, 7, "x"));
        client.send(ack(0x62, 7));
        let answer = client.receive();
        assert_eq!((answer.first, &answer.body[..2]), (0x70, &[0, 7][..]));
        client.leave();
    });
}

#[test]
fn acks_leave_in_the_order_of_their_publishes() {
    both(|host, version| {
        let mut client = Client::unique(host, version);
        let topic = unique("order");
        let all = (1..=40).flat_map(|id| Publish::new(&topic, 1 + id as u8 % 2, id, "x").bytes(version));
        client.send(all.collect::<Vec<u8>>());
        for id in 1..=40 {
            client.expect(ack(if id % 2 == 0 { 0x40 } else { 0x50 }, id));
        }
    });
}

#[test]
fn a_qos_2_message_sent_again_before_its_release_is_delivered_once() {
    both(|host, version| {
        let topic = unique("once");
        let mut subscriber = Client::unique(host, version);
        subscriber.subscribe(&topic, 2);
        let mut publisher = Client::unique(host, version);
        let publish = Publish::new(&topic, 2, 5, "first");
        publisher.publish(&publish);
        publisher.expect(ack(0x50, 5));
        publisher.publish(&publish.clone().dup());
        publisher.expect(ack(0x50, 5));
        publisher.send(ack(0x62, 5));
        publisher.expect(ack(0x70, 5));
        // Released: the same id is another message.
        publisher.publish_through(&Publish::new(&topic, 2, 5, "second"));
        assert_eq!(subscriber.delivered().text(), "first");
        assert_eq!(subscriber.delivered().text(), "second");
    });
}

#[test]
fn a_packet_id_is_free_after_its_puback_whatever_dup_says() {
    both(|host, version| {
        let topic = unique("free");
        let mut subscriber = Client::unique(host, version);
        subscriber.subscribe(&topic, 1);
        let mut publisher = Client::unique(host, version);
        publisher.publish_through(&Publish::new(&topic, 1, 3, "one"));
        publisher.publish_through(&Publish::new(&topic, 1, 3, "two").dup());
        assert_eq!(subscriber.delivered().text(), "one");
        let second = subscriber.delivered();
        assert_eq!((second.text(), second.dup), ("two", false), "DUP is the sender's own");
    });
}

#[test]
fn deliveries_in_flight_have_packet_ids_of_their_own() {
    both(|host, version| {
        let topic = unique("ids");
        let mut subscriber = Client::unique(host, version);
        subscriber.subscribe(&topic, 2);
        let mut publisher = Client::unique(host, version);
        for id in 1..=6 {
            publisher.publish_through(&Publish::new(&topic, 1 + id as u8 % 2, id, "x"));
        }
        let mut ids: Vec<u16> = (0..6).map(|_| subscriber.published().packet_id).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!((ids.len(), ids.contains(&0)), (6, false), "{ids:?}");
    });
}

#[test]
fn messages_keep_their_order() {
    both(|host, version| {
        let topic = unique("order");
        let mut subscribers = [0, 1, 2].map(|qos| {
            let mut subscriber = Client::unique(host, version);
            subscriber.subscribe(&topic, qos);
            subscriber
        });
        let mut publisher = Client::unique(host, version);
        let all = (1..=50).flat_map(|id| Publish::new(&topic, 1, id, &id.to_string()).bytes(version));
        publisher.send(all.collect::<Vec<u8>>());
        for subscriber in &mut subscribers {
            for id in 1..=50 {
                assert_eq!(subscriber.delivered().text(), id.to_string());
            }
        }
    });
}

#[test]
fn what_is_not_acknowledged_comes_again_in_order_after_a_reconnect_and_only_then() {
    both(|host, version| {
        let topic = unique("again");
        let resuming = Connect::resuming(version, &unique("again"));
        let mut subscriber = Client::open(host.mqtt(), &resuming);
        subscriber.subscribe(&topic, 2);
        let mut publisher = Client::unique(host, version);
        for (id, qos) in [(1, 1), (2, 2), (3, 1), (4, 2), (5, 2)] {
            publisher.publish_through(&Publish::new(&topic, qos, id, &id.to_string()));
        }
        let first: Vec<Publish> = (0..5).map(|_| subscriber.published()).collect();
        assert!(first.iter().all(|publish| !publish.dup));
        // The second has come as far as PUBREL, the fifth is done.
        let [released, done] = [first[1].packet_id, first[4].packet_id];
        for id in [released, done] {
            subscriber.send(ack(0x50, id));
            subscriber.expect(ack(0x62, id));
        }
        subscriber.send(ack(0x70, done));
        subscriber.ping();
        drop(subscriber);
        let mut subscriber = Client::open(host.mqtt(), &resuming);
        assert_eq!(subscriber.published(), first[0].clone().dup());
        subscriber.expect(ack(0x62, released));
        assert_eq!(subscriber.published(), first[2].clone().dup());
        assert_eq!(subscriber.published(), first[3].clone().dup());
        subscriber.send(ack(0x70, released));
        subscriber.ping();
    });
}

#[test]
fn a_pubrec_for_an_unknown_message_is_released_too() {
    both(|host, version| {
        let mut client = Client::unique(host, version);
        client.send(ack(0x50, 9));
        let answer = client.receive();
        let code: &[u8] = if version == V5 { &[0x92] } else { &[] };
        assert_eq!((answer.first, answer.body), (0x62, [&[0, 9], code].concat()));
        client.leave();
    });
}

#[test]
fn packets_may_come_in_pieces() {
    both(|host, version| {
        let topic = unique("pieces");
        let mut client = Client::unique(host, version);
        client.subscribe(&topic, 1);
        let publish = Publish::new(&topic, 1, 1, "x").bytes(version);
        for byte in publish.iter().chain(&PINGREQ) {
            client.send([*byte]);
        }
        let mut firsts: Vec<u8> = (0..3).map(|_| client.receive().first).collect();
        firsts.sort_unstable();
        assert_eq!(firsts, [0x32, 0x40, 0xd0]);
    });
}

#[test]
fn nothing_is_processed_after_disconnect() {
    both(|host, version| {
        let topic = unique("after");
        let mut watcher = Client::unique(host, version);
        watcher.subscribe(&topic, 0);
        let mut leaving = Client::unique(host, version);
        leaving.send([vec![0xe0, 0], Publish::new(&topic, 0, 0, "no").bytes(version)].concat());
        leaving.closed();
        Client::unique(host, version).publish_through(&Publish::new(&topic, 1, 1, "yes"));
        assert_eq!(watcher.delivered().text(), "yes");
    });
}
