//! MQTT 5.0's properties, subscription options and flow control, packet by
//! packet, against the real host. `host/docs/mqtt-conformance.md` says which
//! statement each test covers.

use std::sync::Arc;

use headworks_tests::host::{Host, Shared};
use headworks_tests::mqtt::Version::V5;
use headworks_tests::packets::{
    Client, Connect, Publish, Will, ack, field, subscribe, unique, user, var_int,
};

static HOST: Shared = Shared::new();

const NO_LOCAL: u8 = 0x04;
const RETAIN_AS_PUBLISHED: u8 = 0x08;

fn host() -> Arc<Host> {
    HOST.get("mqtt-v5-messages", "")
}

fn client(host: &Host) -> Client {
    Client::clean(host.mqtt(), V5, &unique("client"))
}

fn with_properties(host: &Host, properties: impl Into<Vec<u8>>) -> Client {
    let connect = Connect::new(V5, &unique("client"));
    Client::open(host.mqtt(), &Connect { properties: properties.into(), ..connect })
}

/// The end of a client's session, for want of packets: more than a second later.
fn a_second_later(host: &Host) {
    let connect = Connect { keep_alive: 1, ..Connect::new(V5, &unique("clock")) };
    assert_eq!(Client::open(host.mqtt(), &connect).disconnected(), 0x8d);
}

/// Every property that a publisher may set and the host passes on, but the expiry.
fn all_properties() -> Vec<u8> {
    [
        user("b", "1"),
        vec![0x01, 1],
        user("a", "2"),
        [vec![0x03], field("text/plain; \u{feff}x")].concat(),
        user("b", "1"),
        [vec![0x08], field("answers/hére")].concat(),
        user("", ""),
        [vec![0x09], field([0, 0xff, 0x0b, 0])].concat(),
        user("client-id", "not a name of ours"),
    ]
    .concat()
}

/// As pairs, user properties in their order, the others by identifier.
fn sorted(publish: &Publish) -> Vec<(u8, Vec<u8>)> {
    let mut properties = publish.each_property();
    properties.sort_by_key(|(id, _)| *id);
    properties
}

#[test]
fn properties_are_carried_unchanged_and_user_properties_in_order() {
    let host = host();
    let topic = unique("carried");
    let mut subscribers = [0, 1, 2].map(|qos| {
        let mut subscriber = client(&host);
        subscriber.subscribe(&topic, qos);
        subscriber
    });
    let publish = Publish::new(&topic, 2, 1, "x").with(all_properties());
    client(&host).publish_through(&publish);
    for subscriber in &mut subscribers {
        assert_eq!(sorted(&subscriber.delivered()), sorted(&publish));
    }
}

#[test]
fn a_will_carries_its_properties_and_user_properties_in_order() {
    let host = host();
    let topic = unique("will");
    let mut watcher = client(&host);
    watcher.subscribe(&topic, 1);
    let will = Will { properties: all_properties(), ..Will::new(&topic, 1) };
    let connect = Connect { will: Some(will), ..Connect::new(V5, &unique("will")) };
    drop(Client::open(host.mqtt(), &connect));
    let wanted = Publish::new(&topic, 1, 1, "").with(all_properties());
    assert_eq!(sorted(&watcher.delivered()), sorted(&wanted));
}

#[test]
fn a_retained_message_keeps_its_properties() {
    let host = host();
    let topic = unique("retained");
    let mut watcher = client(&host);
    watcher.subscribe(&topic, 0);
    let publish = Publish::new(&topic, 1, 1, "x").with(all_properties()).retained();
    client(&host).publish_through(&publish);
    watcher.delivered();
    let mut subscriber = client(&host);
    subscriber.subscribe(&topic, 0);
    assert_eq!(sorted(&subscriber.delivered()), sorted(&publish));
}

#[test]
fn a_message_expires_while_it_waits_and_tells_how_long_it_still_may() {
    let host = host();
    let topic = unique("expires");
    let resuming = Connect::resuming(V5, &unique("expires"));
    let mut subscriber = Client::open(host.mqtt(), &resuming);
    subscriber.subscribe(&topic, 1);
    subscriber.leave();
    let mut publisher = client(&host);
    for (id, expiry, text) in [(1, 1, "short"), (2, 1_000, "long"), (3, 0, "at once")] {
        let expiry: u32 = expiry;
        let properties = [&[0x02][..], &expiry.to_be_bytes()].concat();
        publisher.publish_through(&Publish::new(&topic, 1, id, text).with(properties));
    }
    a_second_later(&host);
    let mut subscriber = Client::open(host.mqtt(), &resuming);
    let got = subscriber.delivered();
    assert_eq!(got.text(), "long");
    let (id, left) = got.each_property().remove(0);
    let left = u32::from_be_bytes(left.try_into().unwrap());
    assert!(id == 0x02 && (1..1_000).contains(&left), "{left} s left");
    publisher.publish_through(&Publish::new(&topic, 1, 1, "end"));
    assert_eq!(subscriber.delivered().text(), "end");
}

#[test]
fn a_retained_message_expires() {
    let host = host();
    let topic = unique("expires");
    let mut watcher = client(&host);
    watcher.subscribe(&topic, 1);
    let publish = Publish::new(&topic, 1, 1, "short").with([0x02, 0, 0, 0, 1]).retained();
    client(&host).publish_through(&publish);
    assert_eq!(watcher.delivered().text(), "short");
    a_second_later(&host);
    let mut subscriber = client(&host);
    subscriber.subscribe(&topic, 1);
    subscriber.ping();
}

#[test]
fn receive_maximum_of_the_client_bounds_what_it_has_unacknowledged() {
    let host = host();
    let topic = unique("window");
    let mut subscriber = with_properties(&host, [0x21, 0, 2]);
    let zero = unique("zero");
    subscriber.subscribe_all(&[], &[(&topic, 2), (&zero, 0)]);
    let mut publisher = client(&host);
    for (id, qos) in [(1, 1), (2, 2), (3, 2), (4, 1), (5, 1)] {
        publisher.publish_through(&Publish::new(&topic, qos, id, &id.to_string()));
    }
    let (first, second) = (subscriber.published(), subscriber.published());
    // Full: everything but QoS 1 and 2 goes on.
    subscriber.ping();
    assert_eq!(subscriber.unsubscribe("none"), [0x11]);
    subscriber.send(ack(0x50, second.packet_id));
    subscriber.expect(ack(0x62, second.packet_id));
    subscriber.ping();
    // Each PUBACK and PUBCOMP makes room for one, a PUBREC that refuses too.
    subscriber.send(ack(0x40, first.packet_id));
    let third = subscriber.published();
    subscriber.ping();
    subscriber.send(ack(0x70, second.packet_id));
    let fourth = subscriber.published();
    subscriber.ping();
    subscriber.send([0x50, 3, (third.packet_id >> 8) as u8, third.packet_id as u8, 0x83]);
    let fifth = subscriber.published();
    let texts = [&first, &second, &third, &fourth, &fifth].map(|publish| publish.text().to_owned());
    assert_eq!(texts, ["1", "2", "3", "4", "5"]);
}

#[test]
fn a_delivery_that_the_client_refused_does_not_come_again() {
    let host = host();
    let topic = unique("refused");
    let resuming = Connect::resuming(V5, &unique("refused"));
    let mut subscriber = Client::open(host.mqtt(), &resuming);
    subscriber.subscribe(&topic, 2);
    let mut publisher = client(&host);
    for (id, qos) in [(1, 1), (2, 2), (3, 1)] {
        publisher.publish_through(&Publish::new(&topic, qos, id, &id.to_string()));
    }
    for first in [0x40, 0x50] {
        let id = subscriber.published().packet_id;
        subscriber.send([first, 3, (id >> 8) as u8, id as u8, 0x80]);
    }
    let third = subscriber.published();
    subscriber.ping();
    drop(subscriber);
    let mut subscriber = Client::open(host.mqtt(), &resuming);
    assert_eq!(subscriber.published(), third.dup());
    subscriber.ping();
}

#[test]
fn a_message_over_the_clients_maximum_packet_size_is_left_out() {
    let host = host();
    let topic = unique("size");
    let mut subscriber = with_properties(&host, [0x27, 0, 0, 1, 0, 0x21, 0, 1]);
    subscriber.subscribe(&topic, 1);
    let mut publisher = client(&host);
    publisher.publish_through(&Publish::new(&topic, 1, 1, &"x".repeat(300)));
    publisher.publish_through(&Publish::new(&topic, 1, 1, "x").with(user("k", &"x".repeat(300))));
    // It counts as sent: it takes no place in the window of one.
    publisher.publish_through(&Publish::new(&topic, 1, 1, "small"));
    assert_eq!(subscriber.delivered().text(), "small");
    subscriber.ping();
}

#[test]
fn an_answer_over_the_clients_maximum_packet_size_ends_the_connection() {
    let host = host();
    let mut subscriber = with_properties(&host, [0x27, 0, 0, 0, 40]);
    let filters: Vec<String> = (0..100).map(|number| format!("filter/{number}")).collect();
    let filters: Vec<(&str, u8)> = filters.iter().map(|filter| (&**filter, 0)).collect();
    subscriber.send(subscribe(V5, 1, &[], &filters));
    assert_eq!(subscriber.disconnected(), 0x95);
}

#[test]
fn topic_aliases_of_a_client_hold_for_its_connection() {
    let host = host();
    let topic = unique("alias");
    let mut watcher = client(&host);
    watcher.subscribe(&format!("{topic}/#"), 1);
    let aliased =
        |topic: &str, alias: u8, id: u16, text: &str| Publish::new(topic, 1, id, text).with([0x23, 0, alias]);
    let resuming = Connect::resuming(V5, &unique("alias"));
    let mut publisher = Client::open(host.mqtt(), &resuming);
    let most = publisher.properties.iter().find(|(id, _)| *id == 0x22).expect("topic alias maximum").1[1];
    let (one, two) = (format!("{topic}/1"), format!("{topic}/2"));
    let steps = [(&one[..], 1, &one), ("", 1, &one), (&two, most, &two), ("", most, &two), ("", 1, &one)];
    for (id, (sent, alias, _)) in (1..).zip(steps) {
        publisher.publish_through(&aliased(sent, alias, id, ""));
    }
    // Set again, it means another topic.
    publisher.publish_through(&aliased(&two, 1, 9, ""));
    publisher.publish_through(&aliased("", 1, 9, ""));
    for wanted in steps.map(|(_, _, wanted)| wanted).into_iter().chain([&two, &two]) {
        let got = watcher.delivered();
        assert_eq!((&got.topic, got.each_property()), (wanted, vec![]));
    }
    drop(publisher);
    let mut publisher = Client::open(host.mqtt(), &resuming);
    assert!(publisher.session_present);
    publisher.publish(&aliased("", 1, 1, ""));
    assert_eq!(publisher.disconnected(), 0x82);
}

#[test]
fn topic_aliases_sent_to_a_client_stay_within_its_maximum() {
    let host = host();
    let topics = [unique("alias"), unique("alias"), unique("alias")];
    for most in [0, 2] {
        let mut subscriber = with_properties(&host, [0x22, 0, most]);
        for topic in &topics {
            subscriber.subscribe(topic, 0);
        }
        let mut publisher = client(&host);
        let mut known = std::collections::HashMap::new();
        let mut by_alias_only = 0;
        for topic in topics.iter().cycle().take(9) {
            publisher.publish_through(&Publish::new(topic, 1, 1, "x"));
            let got = subscriber.delivered();
            let alias = got.each_property().into_iter().find(|(id, _)| *id == 0x23);
            let Some((_, alias)) = alias else {
                assert_eq!(got.topic, *topic);
                continue;
            };
            assert!((1..=u16::from(most)).contains(&u16::from_be_bytes([alias[0], alias[1]])));
            if got.topic.is_empty() {
                by_alias_only += 1;
            } else {
                known.insert(alias.clone(), got.topic);
            }
            assert_eq!(known[&alias], *topic);
        }
        // The first topics have one, and are written out once.
        assert_eq!((known.len(), by_alias_only), (usize::from(most), 2 * usize::from(most)));
    }
}

#[test]
fn topic_aliases_sent_to_a_client_end_with_its_connection() {
    let host = host();
    let topic = unique("alias");
    // Expires after ten minutes, takes ten aliases.
    let properties = vec![0x11, 0, 0, 2, 0x58, 0x22, 0, 10];
    let resuming = Connect { properties, ..Connect::resuming(V5, &unique("alias")) };
    let alias_one = (0x23, vec![0, 1]);
    let mut publisher = client(&host);
    for is_new in [true, false] {
        let mut subscriber = Client::open(host.mqtt(), &resuming);
        assert_ne!(subscriber.session_present, is_new);
        if is_new {
            subscriber.subscribe(&topic, 1);
        }
        for wanted in [&topic[..], ""] {
            publisher.publish_through(&Publish::new(&topic, 0, 0, "x"));
            let got = subscriber.delivered();
            assert_eq!((&got.topic[..], got.each_property()), (wanted, vec![alias_one.clone()]));
        }
        subscriber.leave();
    }
}

#[test]
fn a_delivery_names_the_subscriptions_that_it_matches() {
    let host = host();
    let topic = unique("ids");
    let mut subscriber = client(&host);
    let exact = format!("{topic}/x");
    let most = 268_435_455;
    let id = |id: usize| [vec![0x0b], var_int(id)].concat();
    subscriber.subscribe_all(&id(7), &[(&exact, 1), ("another", 1)]);
    subscriber.subscribe_all(&id(most), &[(&format!("{topic}/#"), 2)]);
    subscriber.subscribe(&format!("{topic}/+"), 0);
    let mut publisher = client(&host);
    let mut ids = |publish: Publish| {
        publisher.publish_through(&publish);
        let mut ids = subscriber.delivered().each_property();
        ids.sort();
        ids
    };
    let wanted = |numbers: &[usize]| -> Vec<(u8, Vec<u8>)> {
        let mut ids: Vec<_> = numbers.iter().map(|number| (0x0b, var_int(*number))).collect();
        ids.sort();
        ids
    };
    assert_eq!(ids(Publish::new(&exact, 2, 1, "")), wanted(&[7, most]));
    assert_eq!(ids(Publish::new(&format!("{topic}/x/y"), 2, 1, "")), wanted(&[most]));
    // Subscribed again, the identifier is replaced, or gone.
    subscriber.subscribe_all(&id(128), &[(&exact, 1)]);
    subscriber.subscribe(&format!("{topic}/#"), 2);
    publisher.publish_through(&Publish::new(&exact, 2, 1, ""));
    assert_eq!(subscriber.delivered().each_property(), wanted(&[128]));
}

#[test]
fn a_retained_message_names_the_subscription_that_asked() {
    let host = host();
    let topic = unique("ids");
    let mut watcher = client(&host);
    watcher.subscribe(&topic, 1);
    client(&host).publish_through(&Publish::new(&topic, 1, 1, "x").retained());
    watcher.delivered();
    let mut subscriber = client(&host);
    subscriber.subscribe_all(&[0x0b, 9], &[(&topic, 1)]);
    assert_eq!(subscriber.delivered().each_property(), [(0x0b, vec![9])]);
}

#[test]
fn no_local_keeps_a_clients_own_messages_from_it() {
    let host = host();
    let topic = unique("local");
    let mut own = client(&host);
    own.subscribe(&topic, 1 | NO_LOCAL);
    let mut other = client(&host);
    other.subscribe(&topic, 1);
    own.publish_through(&Publish::new(&topic, 1, 1, "own"));
    assert_eq!(other.delivered().text(), "own");
    other.publish_through(&Publish::new(&topic, 1, 1, "other"));
    assert_eq!(own.delivered().text(), "other");
    assert_eq!(other.delivered().text(), "other", "without the option it hears itself");
}

#[test]
fn retain_handling_decides_whether_retained_messages_come() {
    let host = host();
    let topic = unique("handling");
    let mut watcher = client(&host);
    watcher.subscribe(&topic, 1);
    client(&host).publish_through(&Publish::new(&topic, 1, 1, "kept").retained());
    watcher.delivered();
    // Options, and whether it comes: for a new subscription, for one that exists.
    for (handling, new, again) in [(0, true, true), (1, true, false), (2, false, false)] {
        let mut subscriber = client(&host);
        for comes in [new, again] {
            subscriber.subscribe(&topic, 1 | handling << 4);
            if comes {
                let got = subscriber.delivered();
                assert_eq!((got.text(), got.retain), ("kept", true));
            }
            subscriber.ping();
        }
        // Taken out, it is new again.
        subscriber.unsubscribe(&topic);
        subscriber.subscribe(&topic, 1 | handling << 4);
        if new {
            assert_eq!(subscriber.delivered().text(), "kept");
        }
        subscriber.ping();
    }
}

#[test]
fn retain_as_published_keeps_the_flag_of_live_messages() {
    let host = host();
    let topic = unique("as-published");
    let mut keeps = client(&host);
    keeps.subscribe(&topic, 1 | RETAIN_AS_PUBLISHED);
    let mut clears = client(&host);
    clears.subscribe(&topic, 1);
    let mut publisher = client(&host);
    for retain in [true, false] {
        publisher.publish_through(&Publish { retain, ..Publish::new(&topic, 1, 1, "x") });
        assert_eq!((keeps.delivered().retain, clears.delivered().retain), (retain, false));
    }
}

#[test]
fn more_than_receive_maximum_in_flight_ends_the_connection() {
    let mut host = Host::prepare("mqtt-v5-window", "");
    let config = std::fs::read_to_string(host.folder.join("headworks.yaml")).expect("prepared");
    host.folder.write("headworks.yaml", config.replace("listeners:", "receive_maximum: 2, listeners:"));
    host.run();
    let mut publisher = client(&host);
    assert!(publisher.properties.contains(&(0x21, vec![0, 2])));
    // A PUBREC that is not released holds its place, and finished ones do not.
    publisher.publish_through(&Publish::new("t", 1, 1, "x"));
    for id in [2, 3] {
        publisher.publish(&Publish::new("t", 2, id, "x"));
        publisher.expect(ack(0x50, id));
    }
    publisher.publish(&Publish::new("t", 1, 4, "x"));
    assert_eq!(publisher.disconnected(), 0x93);
}

#[test]
fn a_qos_2_exchange_goes_on_although_its_message_expired() {
    let host = host();
    let topic = unique("late");
    let resuming = Connect::resuming(V5, &unique("late"));
    let mut subscriber = Client::open(host.mqtt(), &resuming);
    subscriber.subscribe(&topic, 2);
    let mut publisher = client(&host);
    publisher.publish(&Publish::new(&topic, 2, 6, "x").with([0x02, 0, 0, 0, 1]));
    publisher.expect(ack(0x50, 6));
    let first = subscriber.published();
    drop(subscriber);
    a_second_later(&host);
    publisher.send(ack(0x62, 6));
    publisher.expect(ack(0x70, 6));
    let mut subscriber = Client::open(host.mqtt(), &resuming);
    let again = subscriber.delivered();
    assert_eq!((again.packet_id, again.dup, again.text()), (first.packet_id, true, "x"));
    subscriber.ping();
}
