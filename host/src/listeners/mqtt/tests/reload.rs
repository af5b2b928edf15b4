//! A configuration that changes while the listener runs.

use std::net::TcpListener;

use super::access::{Guarded, access, guarded, refused_with, rules, signed_in};
use super::*;
use crate::access::{PasswordFile, Rule};
use crate::listeners::mqtt::config::Endpoint;

/// Prepares the configuration in force with a change.
async fn prepare(host: &Host, change: impl FnOnce(&mut Config)) -> Result<Prepared, Error> {
    let mut config = Config::clone(&host.handle.config());
    change(&mut config);
    host.handle.prepare(&config).await
}

async fn reload(host: &Host, change: impl FnOnce(&mut Config)) {
    prepare(host, change).await.unwrap().commit();
}

fn set_rules(config: &mut Config, yaml: &str) {
    config.access.as_mut().unwrap().rules = rules(yaml);
}

fn endpoint(address: SocketAddr) -> Endpoint {
    Endpoint::at(Bind::Tcp(address))
}

fn any_port() -> Endpoint {
    endpoint("127.0.0.1:0".parse().unwrap())
}

/// An address that nothing is bound to.
fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

async fn connects(address: SocketAddr) -> Client {
    let mut client = Client::over(TcpStream::connect(address).await.unwrap());
    client.send(clean("by-another-address")).await;
    assert!(matches!(client.receive().await, Packet::ConnectAck(_)));
    client
}

#[tokio::test]
async fn an_address_that_stays_keeps_its_connections_and_a_new_one_is_served() {
    let stream = MemoryStream::with_manual_commit("s", 1);
    let host = Host::with(stream.clone()).await;
    let mut client = host.clean("c").await;
    client.send(publish("a", QoS::AtLeastOnce, 1)).await;
    stream.awaited().await;
    let prepared = prepare(&host, |config| {
        config.listeners.push(any_port());
        config.receive_maximum = 7;
    });
    let prepared = prepared.await.unwrap();
    assert_eq!(host.handle.addresses().len(), 1);
    let told = ["mqtt: listens on 127.0.0.1:0", "mqtt.receive_maximum: 1024 becomes 7, for new connections"];
    assert_eq!((prepared.changes(), prepared.needs_restart().len()), (&told.map(str::to_owned)[..], 0));
    prepared.commit();
    stream.commit();
    assert_eq!(client.receive().await, puback(1));
    let addresses = host.handle.addresses();
    assert_eq!(addresses[0].tcp(), Some(host.address));
    connects(addresses[1].tcp().unwrap()).await.nothing_but_ping().await;
    assert_eq!(host.client(clean("d")).await.1.receive_max.get(), 7);
    client.nothing_but_ping().await;
    host.stop().await;
}

#[tokio::test]
async fn an_address_that_is_gone_ends_its_connections_once_what_they_sent_is_acknowledged() {
    let stream = MemoryStream::with_manual_commit("s", 1);
    let patient = |config: &mut Config| config.drain_timeout = Period(HUNG_AFTER);
    let streams = Streams::new(vec![], stream.clone());
    let host = Host::start(streams, MemoryStream::new("broker", 1), patient).await;
    let mut before = host.clean("c").await;
    before.send(publish("a", QoS::AtLeastOnce, 1)).await;
    stream.awaited().await;
    // It has said nothing yet.
    let mut silent = Client::open(&host).await;
    reload(&host, |config| config.listeners = vec![endpoint(free_address())]).await;
    assert_eq!(silent.try_receive().await, None);
    stream.commit();
    assert_eq!(before.receive().await, puback(1));
    assert_eq!(before.disconnected().await, Reason::AdministrativeAction);
    connects(host.handle.addresses()[0].tcp().unwrap()).await.nothing_but_ping().await;
    // Its socket is closed before the next reload looks at addresses.
    prepare(&host, |config| config.listeners.push(endpoint(host.address))).await.unwrap().commit();
    connects(host.address).await.nothing_but_ping().await;
    host.stop().await;
}

#[tokio::test]
async fn what_cannot_be_prepared_changes_nothing_and_frees_what_it_has_bound() {
    let Guarded { host, folder } = guarded("- { effect: allow, topics: ['#'] }", |_| {}).await;
    let (mut ann, _) = host.client(signed_in("ann", "ann", "ann")).await;
    let (taken, new) = (TcpListener::bind("127.0.0.1:0").unwrap(), free_address());
    let taken = taken.local_addr().map(|address| (address, taken)).unwrap();
    let broken = folder.path().join("broken.pem");
    std::fs::write(&broken, "no certificate").unwrap();
    type Change<'c> = (&'static str, Box<dyn FnOnce(&mut Config) + 'c>);
    let changes: [Change<'_>; 3] = [
        ("address already in use", Box::new(|config| config.listeners.push(endpoint(taken.0)))),
        (
            "broken.pem",
            Box::new(|config| {
                let tls = serde_json::json!({ "cert": broken, "key": broken });
                let tls = serde_json::from_value(tls).unwrap();
                config.listeners.push(Endpoint { tls: Some(tls), ..any_port() });
            }),
        ),
        (
            "no-such-file",
            Box::new(|config| {
                let passwords = serde_json::json!({ "type": "passwords", "file": "/no-such-file" });
                let authenticate = &mut config.access.as_mut().unwrap().authenticate;
                authenticate.push(serde_json::from_value(passwords).unwrap());
            }),
        ),
    ];
    let before = host.handle.config();
    for (why, change) in changes {
        let failed = prepare(&host, |config| {
            config.listeners.push(endpoint(new));
            set_rules(config, "[]");
            change(config);
        });
        let error = failed.await.err().unwrap().to_string();
        assert!(error.to_lowercase().contains(why), "{error}");
        drop(TcpListener::bind(new).unwrap());
        assert!(Arc::ptr_eq(&before, &host.handle.config()));
    }
    // As one that is prepared and given up.
    drop(prepare(&host, |config| config.listeners.push(endpoint(new))).await.unwrap());
    drop(TcpListener::bind(new).unwrap());
    ann.send(publish("a", QoS::AtLeastOnce, 1)).await;
    assert_eq!(ann.receive().await, puback(1));
    assert_eq!(host.client(signed_in("bob", "bob", "bob")).await.1.reason_code, ConnectAckReason::Success);
    host.stop().await;
}

#[tokio::test]
async fn a_key_that_needs_a_restart_keeps_its_value_and_is_named_each_time() {
    let host = Host::with(MemoryStream::new("s", 1)).await;
    for _ in 0..2 {
        let prepared = prepare(&host, |config| {
            config.queue_copies_bytes_max = ByteSize::mib(1);
            config.max_packet_size = ByteSize::mib(16);
            config.sys_interval = Period(Duration::from_secs(1));
        });
        let prepared = prepared.await.unwrap();
        assert_eq!(prepared.needs_restart(), ["mqtt.queue_copies_bytes_max", "mqtt.max_packet_size"]);
        prepared.commit();
        let config = host.handle.config();
        assert_eq!(config.queue_copies_bytes_max, Config::default().queue_copies_bytes_max);
        assert_eq!(config.max_packet_size, Config::default().max_packet_size);
        assert_eq!(config.sys_interval, Period(Duration::from_secs(1)));
    }
    host.stop().await;
}

#[tokio::test]
async fn limits_of_a_connection_are_those_of_its_beginning() {
    let host = Host::with(MemoryStream::new("s", 1)).await;
    let mut before = host.clean("before").await;
    reload(&host, |config| {
        config.max_packet_size = ByteSize::kib(1);
        config.topic_alias_maximum = 0;
        config.keep_alive_max = Some(Period(Duration::from_secs(7)));
    })
    .await;
    let (mut after, ack) = host.client(clean("after")).await;
    let told = (ack.max_packet_size, ack.topic_alias_max, ack.server_keepalive_sec);
    assert_eq!(told, (Some(1 << 10), 0, Some(7)));
    let large = || Publish { payload: vec![0; 2 << 10].into(), ..publish("a", QoS::AtLeastOnce, 1) };
    before.send(large()).await;
    assert_eq!(before.receive().await, puback(1));
    after.send(large()).await;
    assert_eq!(after.disconnected().await, Reason::PacketTooLarge);
    host.stop().await;
}

#[tokio::test]
async fn layers_of_an_address_are_for_new_connections() {
    let host = Host::with(MemoryStream::new("s", 1)).await;
    let mut before = host.clean("before").await;
    reload(&host, |config| config.listeners[0].websocket = Some(Default::default())).await;
    before.nothing_but_ping().await;
    let mut plain = TcpStream::connect(host.address).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut told = Vec::new();
    timeout(HUNG_AFTER, plain.read_to_end(&mut told)).await.unwrap().unwrap();
    assert!(told.starts_with(b"HTTP/1.1 4"), "{}", String::from_utf8_lossy(&told));
    reload(&host, |config| config.listeners[0].websocket = None).await;
    host.clean("after").await.nothing_but_ping().await;
    before.nothing_but_ping().await;
    host.stop().await;
}

#[tokio::test]
async fn connections_beyond_a_lower_bound_stay_and_a_higher_one_lets_more_in() {
    let host = Host::with(MemoryStream::new("s", 1)).await;
    let mut first = host.clean("first").await;
    reload(&host, |config| config.connections_max = 1).await;
    assert_eq!(Client::open(&host).await.try_receive().await, None);
    first.nothing_but_ping().await;
    reload(&host, |config| config.connections_max = 2).await;
    host.clean("second").await.nothing_but_ping().await;
    first.nothing_but_ping().await;
    host.stop().await;
}

#[tokio::test]
async fn a_right_that_is_taken_or_given_counts_at_the_next_publish_of_a_connected_client() {
    let Guarded { host, .. } = guarded("- { effect: allow, topics: [up] }", |_| {}).await;
    let (mut ann, _) = host.client(signed_in("ann", "ann", "ann")).await;
    for (allowed, denied) in [("up", "down"), ("down", "up"), ("up", "down")] {
        reload(&host, |config| set_rules(config, &format!("- {{ effect: allow, topics: [{allowed}] }}")))
            .await;
        ann.send(publish(denied, QoS::AtLeastOnce, 1)).await;
        assert_eq!(refused_with(ann.receive().await), 0x87);
        ann.send(publish(allowed, QoS::AtLeastOnce, 2)).await;
        assert_eq!(ann.receive().await, puback(2));
    }
    host.stop().await;
}

#[tokio::test]
async fn a_subscriber_gets_nothing_more_of_a_topic_that_was_taken_from_it() {
    let all = "- { effect: allow, topics: ['#'] }";
    let Guarded { host, .. } = guarded(all, |_| {}).await;
    let (mut ann, _) = host.client(signed_in("ann", "ann", "ann")).await;
    let (mut bob, _) = host.client(signed_in("bob", "bob", "bob")).await;
    for filter in ["open/#", "secret/#"] {
        assert_eq!(ann.subscribe(filter, QOS1).await, SubscribeAckReason::GrantedQos1);
    }
    let deny = "- { effect: deny, user: ann, action: subscribe, topics: ['secret/#', open/1] }\n";
    reload(&host, |config| set_rules(config, &format!("{deny}{all}"))).await;
    for (topic, packet_id) in [("secret/1", 1), ("open/1", 2), ("open/2", 3)] {
        bob.send(publish(topic, QoS::AtLeastOnce, packet_id)).await;
        assert_eq!(bob.receive().await, puback(packet_id));
    }
    let received = ann.received().await;
    assert_eq!(&*received.topic, "open/2");
    ann.send(puback(received.packet_id.unwrap().get())).await;
    ann.nothing_but_ping().await;
    assert_eq!(host.handle.clients().show("ann").unwrap().filters, ["open/#"]);
    assert_eq!(ann.subscribe("secret/#", QOS1).await, SubscribeAckReason::NotAuthorized);
    // Given back, it is there for a new subscription.
    reload(&host, |config| set_rules(config, all)).await;
    assert_eq!(ann.subscribe("secret/#", QOS1).await, SubscribeAckReason::GrantedQos1);
    bob.send(publish("secret/1", QoS::AtMostOnce, 0)).await;
    assert_eq!(&*ann.received().await.topic, "secret/1");
    host.stop().await;
}

#[tokio::test]
async fn messages_that_wait_for_a_slow_subscriber_go_with_its_right() {
    let all = "- { effect: allow, topics: ['#'] }";
    let Guarded { host, .. } = guarded(all, |config| config.outbound_inflight_max = 1).await;
    let (mut ann, _) = host.client(signed_in("ann", "ann", "ann")).await;
    let (mut bob, _) = host.client(signed_in("bob", "bob", "bob")).await;
    assert_eq!(ann.subscribe("#", QOS1).await, SubscribeAckReason::GrantedQos1);
    for (topic, packet_id) in [("a", 1), ("secret", 2), ("b", 3)] {
        bob.send(publish(topic, QoS::AtLeastOnce, packet_id)).await;
        assert_eq!(bob.receive().await, puback(packet_id));
    }
    let first = ann.received().await;
    assert_eq!(&*first.topic, "a");
    let deny = "- { effect: deny, action: subscribe, topics: [secret] }\n";
    reload(&host, |config| set_rules(config, &format!("{deny}{all}"))).await;
    ann.send(puback(first.packet_id.unwrap().get())).await;
    let next = ann.received().await;
    assert_eq!(&*next.topic, "b");
    ann.send(puback(next.packet_id.unwrap().get())).await;
    ann.nothing_but_ping().await;
    host.stop().await;
}

#[tokio::test]
async fn the_will_of_a_client_that_may_not_publish_it_any_more_is_forgotten() {
    let Guarded { host, .. } = guarded("- { effect: allow, topics: ['#'] }", |_| {}).await;
    let with_will = Connect { last_will: Some(last_will("up/gone")), ..signed_in("ann", "ann", "ann") };
    let (mut ann, _) = host.client(with_will).await;
    let (mut bob, _) = host.client(signed_in("bob", "bob", "bob")).await;
    assert_eq!(bob.subscribe("up/#", QOS1).await, SubscribeAckReason::GrantedQos1);
    let deny = "- { effect: deny, user: ann, topics: ['up/#'] }\n- { effect: allow, topics: ['#'] }";
    reload(&host, |config| set_rules(config, deny)).await;
    ann.nothing_but_ping().await;
    drop(ann);
    let gone = async {
        while host.handle.clients().show("ann").is_some() {
            tokio::task::yield_now().await;
        }
    };
    timeout(HUNG_AFTER, gone).await.unwrap();
    bob.nothing_but_ping().await;
    host.stop().await;
}

#[tokio::test]
async fn a_client_is_disconnected_once_the_authenticator_that_admitted_it_is_gone() {
    let Guarded { host, folder } = guarded("- { effect: allow, topics: ['#'] }", |_| {}).await;
    let (mut ann, _) = host.client(signed_in("ann", "ann", "ann")).await;
    let other = folder.path().join("other");
    std::fs::create_dir(&other).unwrap();
    let added = access(&other, "[]").authenticate;
    reload(&host, |config| config.access.as_mut().unwrap().authenticate.extend(added.clone())).await;
    ann.nothing_but_ping().await;
    let prepared =
        prepare(&host, |config| config.access.as_mut().unwrap().authenticate = added).await.unwrap();
    assert!(prepared.changes()[1].contains("1 of the authenticators"), "{:?}", prepared.changes());
    prepared.commit();
    assert_eq!(ann.disconnected().await, Reason::NotAuthorized);
    // Its name and password are in the other file too.
    let (mut ann, ack) = host.client(signed_in("ann", "ann", "ann")).await;
    assert_eq!(ack.reason_code, ConnectAckReason::Success);
    // A line that goes from the file that is in use now ends the connection, as before a reload.
    let mut users = PasswordFile::default();
    users.set("bob", "bob", None).unwrap();
    crate::access::put_file(&other.join("passwords"), users.to_text());
    assert_eq!(ann.disconnected().await, Reason::NotAuthorized);
    host.stop().await;
}

#[tokio::test]
async fn clients_without_credentials_stay_only_where_the_listener_serves_them() {
    let host = Host::with(MemoryStream::new("s", 1)).await;
    let (mut stays, mut goes) = (host.clean("stays").await, None);
    for allows in [true, false] {
        let rules: Vec<Rule> = rules("- { effect: allow, topics: [a] }");
        reload(&host, |config| {
            config.access = Some(crate::access::Config { rules, ..Default::default() });
            config.listeners[0].allow_anonymous = allows;
        })
        .await;
        if allows {
            stays.send(publish("b", QoS::AtLeastOnce, 1)).await;
            assert_eq!(refused_with(stays.receive().await), 0x87);
            goes = Some(host.clean("goes").await);
        }
    }
    assert_eq!(stays.disconnected().await, Reason::NotAuthorized);
    assert_eq!(goes.unwrap().disconnected().await, Reason::NotAuthorized);
    let ack = host.client(clean("refused")).await.1;
    assert_eq!(ack.reason_code, ConnectAckReason::NotAuthorized);
    host.stop().await;
}

#[tokio::test]
async fn a_client_id_that_its_user_may_not_have_any_more_ends_its_connection() {
    let Guarded { host, .. } = guarded("[]", |_| {}).await;
    let (mut ann, _) = host.client(signed_in("ann", "ann", "ann")).await;
    let (mut other, _) = host.client(signed_in("other", "ann", "ann")).await;
    let (mut assigned, _) = host.client(signed_in("", "ann", "ann")).await;
    reload(&host, |config| config.access.as_mut().unwrap().client_ids = vec!["%u".to_owned()]).await;
    assert_eq!(other.disconnected().await, Reason::NotAuthorized);
    ann.nothing_but_ping().await;
    assigned.nothing_but_ping().await;
    host.stop().await;
}

#[tokio::test]
async fn a_reload_of_the_same_changes_nothing() {
    let Guarded { host, .. } = guarded("[]", |_| {}).await;
    let prepared = prepare(&host, |_| {}).await.unwrap();
    assert!(prepared.changes().is_empty() && prepared.needs_restart().is_empty());
    let before = host.handle.access().get();
    prepared.commit();
    assert!(Arc::ptr_eq(&before, &host.handle.access().get()));
    host.stop().await;
}
