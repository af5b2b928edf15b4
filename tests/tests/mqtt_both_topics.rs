//! What MQTT 3.1.1 and 5.0 have in common about topics, subscriptions and
//! retained messages, packet by packet, against the real host. `host/docs/mqtt-conformance.md` says which statement each test covers.
//!
//! That something is not delivered is shown by a message that is, sent after it.

use headworks_tests::host::{Host, Shared};
use headworks_tests::mqtt::Version::{self, V5};
use headworks_tests::packets::{Client, Connect, Publish, Will, ack, unique, unsubscribe};

static HOST: Shared = Shared::new();

fn both(test: impl Fn(&Host, Version)) {
    HOST.in_both_versions("mqtt-both-topics", test);
}

/// Retains a message; it has also passed the live delivery when this returns.
fn retain(host: &Host, version: Version, publish: Publish) {
    let mut watcher = Client::unique(host, version);
    assert_eq!(watcher.subscribe(&publish.topic, 0x02), 2);
    let mut publisher = Client::unique(host, version);
    let mark = Publish::new(&publish.topic, 1, 99, "mark");
    publisher.publish_through(&publish.retained());
    publisher.publish_through(&mark);
    while watcher.delivered().text() != "mark" {}
}

/// What a new subscription gets at once: text, QoS, RETAIN.
fn retained(host: &Host, version: Version, filter: &str) -> Vec<(String, u8, bool)> {
    let mut subscriber = Client::unique(host, version);
    let end = unique("end");
    subscriber.subscribe(&end, 0);
    subscriber.subscribe(filter, 2);
    let mut found = Vec::new();
    Client::unique(host, version).publish_through(&Publish::new(&end, 1, 1, ""));
    loop {
        let publish = subscriber.delivered();
        if publish.topic == end {
            return found;
        }
        found.push((publish.text().to_owned(), publish.qos, publish.retain));
    }
}

#[test]
fn a_clean_connect_discards_what_was_there_before_but_no_retained_message() {
    both(|host, version| {
        let (topic, client_id) = (unique("clean"), unique("clean"));
        retain(host, version, Publish::new(&topic, 1, 1, "kept"));
        let resuming = Connect::resuming(version, &client_id);
        let mut old = Client::open(host.mqtt(), &resuming);
        old.subscribe(&topic, 1);
        assert_eq!(old.delivered().text(), "kept");
        old.leave();
        let mut watcher = Client::unique(host, version);
        watcher.subscribe(&topic, 1);
        Client::unique(host, version).publish_through(&Publish::new(&topic, 1, 1, "for the old one"));
        while watcher.delivered().text() != "for the old one" {}
        Client::clean(host.mqtt(), version, &client_id).leave();
        let mut new = Client::open(host.mqtt(), &resuming);
        assert!(!new.session_present);
        new.ping();
        assert_eq!(retained(host, version, &topic), [("kept".to_owned(), 1, true)]);
    });
}

#[test]
fn a_will_is_retained_only_where_it_says_so() {
    both(|host, version| {
        for retain in [false, true] {
            let topic = unique("will");
            let mut watcher = Client::unique(host, version);
            watcher.subscribe(&topic, 1);
            let will = Will { retain, ..Will::new(&topic, 1) };
            let connect = Connect::new(version, &unique("will"));
            drop(Client::open(host.mqtt(), &Connect { will: Some(will), ..connect }));
            assert!(!watcher.delivered().retain);
            let wanted: &[(String, u8, bool)] = if retain { &[("gone".into(), 1, true)] } else { &[] };
            assert_eq!(retained(host, version, &topic), wanted);
        }
    });
}

#[test]
fn a_message_goes_out_at_the_lower_of_both_qos() {
    both(|host, version| {
        for asked in 0..=2 {
            let topic = unique("qos");
            let mut subscriber = Client::unique(host, version);
            assert_eq!(subscriber.subscribe(&topic, asked), asked);
            let mut publisher = Client::unique(host, version);
            for qos in 0..=2 {
                publisher.publish_through(&Publish::new(&topic, qos, 1, "x"));
                let got = subscriber.delivered();
                assert_eq!((got.qos, got.dup, got.retain), (qos.min(asked), false, false));
            }
        }
    });
}

#[test]
fn overlapping_subscriptions_deliver_once_at_the_greatest_qos() {
    both(|host, version| {
        let topic = unique("overlap");
        let mut subscriber = Client::unique(host, version);
        let filters = [(format!("{topic}/#"), 0), (format!("{topic}/+"), 2), (format!("{topic}/x"), 1)];
        for (filter, qos) in &filters {
            subscriber.subscribe(filter, *qos);
        }
        let mut publisher = Client::unique(host, version);
        publisher.publish_through(&Publish::new(&format!("{topic}/x"), 2, 1, "one"));
        publisher.publish_through(&Publish::new(&format!("{topic}/x"), 2, 1, "end"));
        let got = subscriber.delivered();
        assert_eq!((got.text(), got.qos), ("one", 2));
        assert_eq!(subscriber.delivered().text(), "end");
    });
}

#[test]
fn the_last_retained_message_goes_to_each_new_subscription() {
    both(|host, version| {
        let topic = unique("retained");
        for (qos, text) in [(1, "first"), (2, "second"), (0, "third"), (1, "last")] {
            retain(host, version, Publish::new(&topic, qos, 1, text));
            assert_eq!(retained(host, version, &topic), [(text.to_owned(), qos, true)]);
        }
        // Each subscription anew, the same again included.
        let mut subscriber = Client::unique(host, version);
        for _ in 0..2 {
            subscriber.subscribe(&topic, 1);
            let got = subscriber.delivered();
            assert_eq!((got.text(), got.retain), ("last", true));
        }
    });
}

#[test]
fn a_message_without_retain_leaves_the_retained_one() {
    both(|host, version| {
        let topic = unique("retained");
        // `retain` sends a message without RETAIN after it.
        retain(host, version, Publish::new(&topic, 1, 1, "kept"));
        assert_eq!(retained(host, version, &topic), [("kept".to_owned(), 1, true)]);
    });
}

#[test]
fn an_empty_retained_message_is_delivered_and_removes_the_retained_one() {
    both(|host, version| {
        let topic = unique("removed");
        retain(host, version, Publish::new(&topic, 1, 1, "kept"));
        let mut subscriber = Client::unique(host, version);
        subscriber.subscribe(&topic, 1);
        assert!(subscriber.delivered().retain);
        Client::unique(host, version).publish_through(&Publish::new(&topic, 1, 1, "").retained());
        let got = subscriber.delivered();
        assert_eq!((got.text(), got.retain), ("", false), "live, it is a message as any other");
        assert_eq!(retained(host, version, &topic), []);
    });
}

#[test]
fn suback_has_a_code_per_filter_in_order_and_handles_each_by_itself() {
    both(|host, version| {
        let topic = unique("many");
        let mut subscriber = Client::unique(host, version);
        let (one, two, three) = (format!("{topic}/1"), format!("{topic}/2/#"), format!("{topic}/+/3"));
        let filters =
            [(&one[..], 2), ("a/#/b", 1), (&two, 1), ("a+", 0), ("+a/b", 0), ("a#", 0), (&three, 0)];
        let bad = if version == V5 { 0x8f } else { 0x80 };
        assert_eq!(subscriber.subscribe_all(&[], &filters), [2, bad, 1, bad, bad, bad, 0]);
        let mut publisher = Client::unique(host, version);
        for (level, qos) in [("1", 2), ("2/x/y", 1), ("x/3", 0)] {
            publisher.publish_through(&Publish::new(&format!("{topic}/{level}"), 2, 1, level));
            let got = subscriber.delivered();
            assert_eq!((got.text(), got.qos), (level, qos));
        }
    });
}

#[test]
fn subscribing_again_replaces_the_subscription() {
    both(|host, version| {
        let topic = unique("replaced");
        let mut subscriber = Client::unique(host, version);
        assert_eq!(subscriber.subscribe(&topic, 2), 2);
        assert_eq!(subscriber.subscribe(&topic, 0), 0);
        let mut publisher = Client::unique(host, version);
        publisher.publish_through(&Publish::new(&topic, 2, 1, "one"));
        publisher.publish_through(&Publish::new(&topic, 2, 1, "two"));
        for wanted in ["one", "two"] {
            let got = subscriber.delivered();
            assert_eq!((got.text(), got.qos), (wanted, 0));
        }
        subscriber.unsubscribe(&topic);
        publisher.publish_through(&Publish::new(&topic, 2, 1, "three"));
        subscriber.ping();
    });
}

#[test]
fn unsubscribe_takes_out_the_identical_filter_and_no_other() {
    both(|host, version| {
        let topic = unique("out");
        let mut subscriber = Client::unique(host, version);
        let (plus, exact) = (format!("{topic}/+"), format!("{topic}/x"));
        subscriber.subscribe_all(&[], &[(&plus, 1), (&exact, 1)]);
        // Filters that match the same topics are not the same filters.
        let codes: &[u8] = if version == V5 { &[0x11, 0, 0x11] } else { &[] };
        subscriber.send(unsubscribe(version, 8, &[&format!("{topic}/#"), &exact, "never/there"]));
        assert_eq!(subscriber.codes(0xb0, 8), codes);
        let mut publisher = Client::unique(host, version);
        publisher.publish_through(&Publish::new(&exact, 1, 1, "by the other filter"));
        assert_eq!(subscriber.delivered().text(), "by the other filter");
        subscriber.unsubscribe(&plus);
        subscriber.subscribe(&topic, 1);
        publisher.publish_through(&Publish::new(&exact, 1, 1, "no"));
        publisher.publish_through(&Publish::new(&topic, 1, 1, "yes"));
        assert_eq!(subscriber.delivered().text(), "yes");
    });
}

#[test]
fn a_delivery_that_was_begun_is_finished_after_unsubscribe() {
    both(|host, version| {
        let topic = unique("begun");
        let resuming = Connect::resuming(version, &unique("begun"));
        let mut subscriber = Client::open(host.mqtt(), &resuming);
        subscriber.subscribe(&topic, 2);
        Client::unique(host, version).publish_through(&Publish::new(&topic, 2, 1, "x"));
        let got = subscriber.published();
        subscriber.unsubscribe(&topic);
        drop(subscriber);
        let mut subscriber = Client::open(host.mqtt(), &resuming);
        assert_eq!(subscriber.published(), got.clone().dup());
        subscriber.send(ack(0x50, got.packet_id));
        subscriber.expect(ack(0x62, got.packet_id));
        subscriber.send(ack(0x70, got.packet_id));
        subscriber.ping();
    });
}

#[test]
fn filters_match_as_the_standard_says() {
    let cases = [
        ("sport/tennis/player1/#", "sport/tennis/player1", true),
        ("sport/tennis/player1/#", "sport/tennis/player1/ranking", true),
        ("sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon", true),
        ("sport/#", "sport", true),
        ("#", "sport/tennis", true),
        ("#", "/", true),
        ("sport/tennis/+", "sport/tennis/player2", true),
        ("sport/tennis/+", "sport/tennis/player1/ranking", false),
        ("sport/+", "sport", false),
        ("sport/+", "sport/", true),
        ("+", "sport", true),
        ("+/tennis/#", "sport/tennis/x", true),
        ("+/+", "/finance", true),
        ("/+", "/finance", true),
        ("+", "/finance", false),
        ("+/+/+", "a//b", true),
        ("a//b", "a/b", false),
        ("ACCOUNTS", "Accounts", false),
        ("/finance", "finance", false),
        ("two words", "two words", true),
        ("two words", "two  words", false),
        ("\u{e9}", "e\u{301}", false),
        ("\u{feff}bom", "\u{feff}bom", true),
        ("\u{feff}bom", "bom", false),
        ("/", "/", true),
    ];
    both(|host, version| {
        let mut publisher = Client::unique(host, version);
        for (filter, topic, wanted) in cases {
            let (end, text) = (unique("end"), unique("text"));
            let mut subscriber = Client::unique(host, version);
            subscriber.subscribe_all(&[], &[(filter, 0), (&end, 0)]);
            publisher.publish_through(&Publish::new(topic, 1, 1, &text));
            publisher.publish_through(&Publish::new(&end, 1, 1, ""));
            let mut got = false;
            loop {
                // Others of this host publish as well.
                let publish = subscriber.delivered();
                match publish.topic == end {
                    true => break,
                    false if publish.payload == text.as_bytes() => {
                        assert_eq!(publish.topic, topic, "carried unchanged");
                        got = true;
                    }
                    false => {}
                }
            }
            assert_eq!(got, wanted, "{filter} {topic} {version:?}");
        }
    });
}

#[test]
fn wildcards_at_the_front_do_not_match_dollar_topics() {
    both(|host, version| {
        let end = unique("end");
        let mut subscriber = Client::unique(host, version);
        subscriber.subscribe_all(&[], &[("#", 0), ("+/broker/clients/connected", 0), ("+/#", 0)]);
        let mut dollar = Client::unique(host, version);
        assert_eq!(dollar.subscribe("$SYS/broker/clients/#", 0), 0);
        assert_eq!(dollar.delivered().topic, "$SYS/broker/clients/connected");
        // One more client changes the count.
        Client::unique(host, version).publish_through(&Publish::new(&end, 1, 1, ""));
        assert!(dollar.delivered().topic.starts_with("$SYS/"));
        loop {
            let topic = subscriber.delivered().topic;
            assert!(!topic.starts_with('$'), "{topic}");
            if topic == end {
                break;
            }
        }
    });
}

#[test]
fn topics_may_be_as_long_as_their_field() {
    both(|host, version| {
        let mut topic = unique("long/");
        topic.push_str(&"x".repeat(65_535 - topic.len()));
        let mut client = Client::unique(host, version);
        client.subscribe(&topic, 0);
        client.publish(&Publish::new(&topic, 0, 0, "x"));
        assert_eq!(client.published().topic.len(), 65_535);
    });
}
