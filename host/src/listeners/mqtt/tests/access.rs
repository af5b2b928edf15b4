//! Credentials, rules and limits, through the listener.

use super::*;
use crate::access::{self, Authenticator, Limits, PasswordFile, Rule};
use crate::listeners::transport::config::{Identity, Tls};

pub(super) struct Guarded {
    pub(super) host: Host,
    pub(super) folder: tempfile::TempDir,
}

pub(super) fn rules(yaml: &str) -> Vec<Rule> {
    serde_json::from_value(crate::yaml::to_json(yaml).unwrap()).unwrap()
}

/// Users ann and bob, each with the user name as password.
pub(super) async fn guarded(yaml: &str, change: impl FnOnce(&mut Config)) -> Guarded {
    let folder = tempfile::tempdir().unwrap();
    let host = started(|config| {
        config.access = Some(access(folder.path(), yaml));
        change(config);
    });
    Guarded { host: host.await, folder }
}

pub(super) fn access(folder: &std::path::Path, yaml: &str) -> access::Config {
    let file = folder.join("passwords");
    let mut users = PasswordFile::default();
    for user in ["ann", "bob"] {
        users.set(user, user, Some(access::ITERATIONS_MIN)).unwrap();
    }
    std::fs::write(&file, users.to_text()).unwrap();
    let authenticator = serde_json::json!({ "type": "passwords", "file": file });
    access::Config {
        authenticate: vec![serde_json::from_value::<Authenticator>(authenticator).unwrap()],
        rules: rules(yaml),
        ..access::Config::default()
    }
}

async fn started(change: impl FnOnce(&mut Config)) -> Host {
    let streams = Streams::new(vec![], MemoryStream::new("s", 1));
    Host::start(streams, MemoryStream::new("broker", 1), change).await
}

pub(super) fn signed_in(client_id: &'static str, user: &'static str, password: &'static str) -> Connect {
    let password = Some(bytes::Bytes::from_static(password.as_bytes()));
    Connect { username: Some(user.into()), password, ..clean(client_id) }
}

pub(super) fn refused_with(packet: Packet) -> u8 {
    match packet {
        Packet::PublishAck(ack) => ack.reason_code.into(),
        Packet::PublishReceived(ack) => ack.reason_code.into(),
        other => panic!("{other:?}"),
    }
}

/// CONNECT of MQTT 3.1.1, clean; its CONNACK's return code.
async fn connect_v3(host: &Host, user: Option<(&str, &str)>) -> (TcpStream, u8) {
    let mut body =
        vec![0, 4, b'M', b'Q', b'T', b'T', 4, if user.is_some() { 0xc2 } else { 2 }, 0, 60, 0, 1, b'c'];
    for text in user.iter().flat_map(|(user, password)| [user, password]) {
        body.extend((text.len() as u16).to_be_bytes());
        body.extend(text.as_bytes());
    }
    let mut io = TcpStream::connect(host.address).await.unwrap();
    io.write_all(&[&[0x10, body.len() as u8], &body[..]].concat()).await.unwrap();
    let mut answer = [0; 4];
    timeout(HUNG_AFTER, io.read_exact(&mut answer)).await.unwrap().unwrap();
    (io, answer[3])
}

async fn refused(host: &Host, connect: Connect) -> ConnectAckReason {
    let (mut client, ack) = host.client(connect).await;
    assert_eq!(client.try_receive().await, None);
    ack.reason_code
}

#[tokio::test]
async fn a_client_says_the_right_password_or_is_told_no() {
    let Guarded { host, folder } = guarded("[]", |_| {}).await;
    let (mut ann, ack) = host.client(signed_in("ann", "ann", "ann")).await;
    assert_eq!(ack.reason_code, ConnectAckReason::Success);
    for (user, password) in [("ann", "bob"), ("eve", "ann")] {
        let reason = refused(&host, signed_in("c", user, password)).await;
        assert_eq!(reason, ConnectAckReason::BadUserNameOrPassword);
        assert_eq!(connect_v3(&host, Some((user, password))).await.1, 4);
    }
    assert_eq!(refused(&host, clean("c")).await, ConnectAckReason::NotAuthorized);
    assert_eq!(connect_v3(&host, None).await.1, 5);
    // An emptied file is not in force, and one with another line of hers ends her connection.
    let file = folder.path().join("passwords");
    let mut users = PasswordFile::parse(&std::fs::read(&file).unwrap()).unwrap();
    access::put_file(&file, "");
    let (mut bob, ack) = host.client(signed_in("bob", "bob", "bob")).await;
    assert_eq!(ack.reason_code, ConnectAckReason::Success);
    users.set("ann", "other", None).unwrap();
    access::put_file(&file, users.to_text());
    assert_eq!(ann.disconnected().await, Reason::NotAuthorized);
    let said = host.handle.clients.0.failures.unsaid();
    let why = |(kind, _): &(String, u64)| kind == "mqtt: the credentials of a connected client were revoked";
    assert!(said.iter().any(why), "{said:?}");
    bob.nothing_but_ping().await;
    host.stop().await;
}

#[tokio::test]
async fn a_publish_that_no_rule_allows_is_refused_and_the_others_go_on() {
    let yaml = "- { effect: allow, user: ann, topics: ['up/%c/#'] }";
    let Guarded { host, .. } = guarded(yaml, |_| {}).await;
    let (mut client, _) = host.client(signed_in("c", "ann", "ann")).await;
    client.send(publish("up/d/x", QoS::AtLeastOnce, 1)).await;
    assert_eq!(refused_with(client.receive().await), 0x87);
    client.send(publish("up/d/x", QoS::ExactlyOnce, 2)).await;
    assert_eq!(refused_with(client.receive().await), 0x87);
    client.send(publish("up/d/x", QoS::AtMostOnce, 0)).await;
    for (topic, packet_id) in [("up/c/x", 3), ("up/c/x", 4), ("up/c", 5)] {
        client.send(publish(topic, QoS::AtLeastOnce, packet_id)).await;
        assert_eq!(client.receive().await, puback(packet_id));
    }
    client.nothing_but_ping().await;
    let (mut other, _) = host.client(signed_in("d", "bob", "bob")).await;
    other.send(publish("up/d/x", QoS::AtLeastOnce, 1)).await;
    assert_eq!(refused_with(other.receive().await), 0x87);
    host.stop().await;
}

#[tokio::test]
async fn an_mqtt_3_client_that_publishes_where_it_may_not_is_closed_or_its_message_dropped() {
    for drops in [false, true] {
        let Guarded { host, .. } = guarded("[]", |config| {
            let access = config.access.as_mut().unwrap();
            access.denied_publish =
                if drops { access::DeniedPublish::Drop } else { access::DeniedPublish::Close };
        })
        .await;
        let (mut io, code) = connect_v3(&host, Some(("ann", "ann"))).await;
        assert_eq!(code, 0);
        io.write_all(&[0x32, 6, 0, 1, b'x', 0, 7, b'1']).await.unwrap();
        let mut answer = Vec::new();
        if drops {
            answer.resize(4, 0);
            timeout(HUNG_AFTER, io.read_exact(&mut answer)).await.unwrap().unwrap();
            assert_eq!(answer, [0x40, 2, 0, 7]);
        } else {
            timeout(HUNG_AFTER, io.read_to_end(&mut answer)).await.unwrap().unwrap();
            assert!(answer.is_empty(), "{answer:?}");
        }
        host.stop().await;
    }
}

#[tokio::test]
async fn only_what_is_allowed_whole_is_subscribed_to() {
    let yaml = "[{ effect: deny, topics: [a/secret] }, { effect: allow, action: subscribe, topics: [a/#] }]";
    let refuse = |config: &mut Config| {
        config.access.as_mut().unwrap().overlap = access::Overlap::Refuse;
    };
    let Guarded { host, .. } = guarded(yaml, refuse).await;
    let (mut client, _) = host.client(signed_in("c", "ann", "ann")).await;
    assert_eq!(client.subscribe("a/b/#", QOS1).await, SubscribeAckReason::GrantedQos1);
    for filter in ["a/#", "a/secret", "#", "$SYS/#", "b"] {
        assert_eq!(client.subscribe(filter, QOS1).await, SubscribeAckReason::NotAuthorized, "{filter}");
    }
    host.stop().await;
}

#[tokio::test]
async fn a_subscription_that_overlaps_a_denied_topic_gets_all_others_live_and_retained() {
    let yaml = "[{ effect: allow, action: publish, topics: ['#'] }, \
        { effect: deny, action: subscribe, topics: [a/+/secret] }, \
        { effect: allow, action: subscribe, topics: [a/#] }]";
    let Guarded { host, .. } = guarded(yaml, |_| {}).await;
    let (mut publisher, _) = host.client(signed_in("p", "ann", "ann")).await;
    let mut publish_all = async |retain| {
        for topic in ["a/b/secret", "a/b/open", "a/c/secret", "a/d"] {
            publisher.send(Publish { retain, ..publish(topic, QoS::AtLeastOnce, 1) }).await;
            assert_eq!(publisher.receive().await, puback(1));
        }
    };
    publish_all(true).await;
    let (mut client, _) = host.client(signed_in("c", "ann", "ann")).await;
    assert_eq!(client.subscribe("a/b/secret", QOS1).await, SubscribeAckReason::NotAuthorized);
    assert_eq!(client.subscribe("a/#", QOS1).await, SubscribeAckReason::GrantedQos1);
    let mut topics = Vec::new();
    for packet_id in 1..=4 {
        if packet_id == 3 {
            publish_all(false).await;
        }
        topics.push(client.received().await.topic.to_string());
        client.send(puback(packet_id)).await;
    }
    topics[..2].sort();
    assert_eq!(topics, ["a/b/open", "a/d", "a/b/open", "a/d"]);
    client.nothing_but_ping().await;
    host.stop().await;
}

#[tokio::test]
async fn a_will_is_held_to_the_rules_when_it_is_left() {
    let Guarded { host, .. } = guarded("- { effect: allow, topics: [ok] }", |_| {}).await;
    let will =
        |topic: &'static str| Connect { last_will: Some(last_will(topic)), ..signed_in("c", "ann", "ann") };
    assert_eq!(refused(&host, will("no")).await, ConnectAckReason::NotAuthorized);
    assert_eq!(host.client(will("ok")).await.1.reason_code, ConnectAckReason::Success);
    host.stop().await;
}

#[tokio::test]
async fn a_session_is_of_the_user_who_made_it() {
    let yaml = "[{ effect: allow, user: ann, topics: ['#'] }, { effect: allow, topics: [open] }]";
    let Guarded { host, .. } = guarded(yaml, |config| config.listeners[0].allow_anonymous = true).await;
    let kept = |user| Connect {
        clean_start: false,
        session_expiry_interval_secs: 600,
        ..signed_in("c", user, user)
    };
    let (mut ann, _) = host.client(kept("ann")).await;
    ann.subscribe("private/+", QOS1).await;
    ann.subscribe("open", QOS1).await;
    ann.send(Disconnect::default()).await;
    assert_eq!(ann.try_receive().await, None);
    let (mut other, _) = host.client(signed_in("p", "ann", "ann")).await;
    let (mut watcher, _) = host.client(signed_in("w", "ann", "ann")).await;
    watcher.subscribe("#", QOS1).await;
    for (topic, packet_id) in [("private/x", 1), ("open", 2)] {
        other.send(publish(topic, QoS::AtLeastOnce, packet_id)).await;
        assert_eq!(other.receive().await, puback(packet_id));
        // Delivered to all by the one task that delivers.
        assert_eq!(&*watcher.received().await.topic, topic);
    }
    // A client without credentials neither goes on with it nor ends it, nor its connection.
    let (mut ann, ack) = host.client(kept("ann")).await;
    assert!(ack.session_present);
    assert_eq!(&*ann.received().await.topic, "private/x");
    assert_eq!(&*ann.received().await.topic, "open");
    assert_eq!(refused(&host, resuming("c")).await, ConnectAckReason::ClientIdentifierNotValid);
    assert_eq!(refused(&host, clean("c")).await, ConnectAckReason::ClientIdentifierNotValid);
    ann.nothing_but_ping().await;
    ann.send(Disconnect::default()).await;
    assert_eq!(ann.try_receive().await, None);
    assert_eq!(refused(&host, clean("c")).await, ConnectAckReason::ClientIdentifierNotValid);
    // Another user gets nothing of it, and its owner is told that it has ended.
    for (user, other) in [("bob", "ann"), ("ann", "bob")] {
        let (mut client, ack) = host.client(kept(user)).await;
        assert!(!ack.session_present, "{user} after {other}");
        client.nothing_but_ping().await;
        let (_, ack) = host.client(kept(user)).await;
        assert!(ack.session_present, "{user} again");
    }
    // One of nobody is anybody's to end, and nobody's to go on with.
    assert!(!host.client(resuming("open")).await.1.session_present);
    let of_ann = Connect { client_id: "open".into(), ..kept("ann") };
    assert!(!host.client(of_ann).await.1.session_present);
    host.stop().await;
}

#[tokio::test]
async fn an_owner_is_known_after_a_restart_and_a_session_of_0_1_0_is_of_who_has_it_first() {
    let yaml = "[{ effect: allow, topics: ['#'] }]";
    let store = MemoryStream::with_hooks("broker", 1);
    let folder = tempfile::tempdir().unwrap();
    let start = async || {
        let streams = Streams::new(vec![], MemoryStream::new("s", 1));
        Host::start(streams, store.clone(), |config| config.access = Some(access(folder.path(), yaml))).await
    };
    let kept = |user| Connect {
        clean_start: false,
        session_expiry_interval_secs: 600,
        ..signed_in("c", user, user)
    };
    let host = start().await;
    drop(host.client(kept("ann")).await);
    host.stop().await;
    let host = start().await;
    assert!(host.client(kept("ann")).await.1.session_present);
    host.stop().await;
    let host = start().await;
    assert!(!host.client(kept("bob")).await.1.session_present);
    host.stop().await;
    let (key, mut record) = store.state(b"se").remove(0);
    assert!(record.ends_with(b"bob"));
    record.truncate(21);
    append_unawaited(&*store, &[(key, Some(record))]);
    for (user, present) in [("ann", true), ("bob", false)] {
        let host = start().await;
        assert_eq!(host.client(kept(user)).await.1.session_present, present, "{user}");
        host.stop().await;
    }
}

#[tokio::test]
async fn a_session_whose_user_may_see_less_now_begins_anew_and_its_client_is_told() {
    let store = MemoryStream::with_hooks("broker", 1);
    let folder = tempfile::tempdir().unwrap();
    let start = async |yaml| {
        let streams = Streams::new(vec![], MemoryStream::new("s", 1));
        Host::start(streams, store.clone(), |config| config.access = Some(access(folder.path(), yaml))).await
    };
    let ann =
        || Connect { clean_start: false, session_expiry_interval_secs: 600, ..signed_in("c", "ann", "ann") };
    for (rules, present) in [
        ("[{ effect: allow, topics: ['#'] }]", false),
        ("[{ effect: allow, topics: [a, b] }]", true),
        ("[{ effect: allow, topics: [a] }]", false),
    ] {
        let host = start(rules).await;
        let (mut client, ack) = host.client(ann()).await;
        assert_eq!(ack.session_present, present, "{rules}");
        client.subscribe("a", QOS1).await;
        client.subscribe("b", QOS1).await;
        host.stop().await;
    }
}

#[tokio::test]
async fn retained_messages_that_wait_in_a_session_are_not_for_its_next_owner_either() {
    let yaml = "[{ effect: allow, user: ann, topics: ['#'] }, { effect: allow, topics: [open] }]";
    let Guarded { host, .. } = guarded(yaml, |_| {}).await;
    let (mut other, _) = host.client(signed_in("p", "ann", "ann")).await;
    for (topic, packet_id) in [("private/x", 1), ("private/y", 2)] {
        other.send(Publish { retain: true, ..publish(topic, QoS::AtLeastOnce, packet_id) }).await;
        assert_eq!(other.receive().await, puback(packet_id));
    }
    let owned = |user, expiry_s| Connect {
        clean_start: false,
        session_expiry_interval_secs: expiry_s,
        receive_max: Some(id(1)),
        ..signed_in("c", user, user)
    };
    for (unsubscribes, expiry_s) in [(false, 0), (true, 600)] {
        let (mut ann, _) = host.client(owned("ann", 600)).await;
        ann.subscribe("private/+", QOS1).await;
        // Not acknowledged, so that the other waits.
        ann.received().await;
        if unsubscribes {
            let topic_filters = vec!["private/+".into()];
            ann.send(Unsubscribe { packet_id: id(9), user_properties: vec![], topic_filters }).await;
            assert!(matches!(ann.receive().await, Packet::UnsubscribeAck(_)));
        }
        ann.send(Disconnect::default()).await;
        assert_eq!(ann.try_receive().await, None);
        let (mut bob, ack) = host.client(owned("bob", expiry_s)).await;
        assert!(!ack.session_present);
        bob.nothing_but_ping().await;
        bob.send(Disconnect::default()).await;
        assert_eq!(bob.try_receive().await, None);
    }
    host.stop().await;
}

#[tokio::test]
async fn the_anonymous_come_in_only_where_the_listener_has_them() {
    let yaml = "- { effect: allow, anonymous: true, action: publish, topics: [open] }";
    let Guarded { host, .. } = guarded(yaml, |config| config.listeners[0].allow_anonymous = true).await;
    let mut client = host.clean("c").await;
    client.send(publish("open", QoS::AtLeastOnce, 1)).await;
    assert_eq!(client.receive().await, puback(1));
    client.send(publish("shut", QoS::AtLeastOnce, 2)).await;
    assert_eq!(refused_with(client.receive().await), 0x87);
    host.stop().await;
}

#[tokio::test]
async fn a_client_over_its_rate_is_read_slower_and_nothing_is_refused() {
    let limits = Limits { client_messages_per_s: Some(20), ..Limits::default() };
    let host = started(|config| config.limits = limits).await;
    let mut client = host.clean("c").await;
    for packet_id in 1..=30 {
        client.send(publish("a", QoS::AtLeastOnce, packet_id)).await;
    }
    client.send(Packet::PingRequest).await;
    let (mut acked, mut pinged_after) = (0, None);
    while acked < 30 || pinged_after.is_none() {
        match client.receive().await {
            Packet::PingResponse => pinged_after = Some(acked),
            ack => {
                acked += 1;
                assert_eq!(ack, puback(acked));
            }
        }
    }
    assert!(pinged_after < Some(30), "PINGREQ was answered while publishes waited");
    assert!(host.handle.clients().show("c").unwrap().counts.throttled > 0, "and who looks is told");
    host.stop().await;
}

#[tokio::test]
async fn who_guesses_a_password_is_told_to_wait_and_other_users_of_the_address_are_not() {
    let Guarded { host, folder: _folder } = guarded("[]", |_| {}).await;
    const WRONG: [&str; 16] =
        ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "a", "b", "c", "d", "e", "f"];
    let mut told = Vec::new();
    for password in WRONG {
        told.push(refused(&host, signed_in("c", "ann", password)).await);
    }
    assert_eq!(told[..5], [ConnectAckReason::BadUserNameOrPassword; 5], "the first ones cost no wait");
    assert!(told.contains(&ConnectAckReason::ConnectionRateExceeded), "{told:?}");
    let (_, ack) = host.client(signed_in("c", "bob", "bob")).await;
    assert_eq!(ack.reason_code, ConnectAckReason::Success);
    host.stop().await;
}

#[tokio::test]
async fn an_alias_of_a_refused_topic_stays_refused() {
    let rules = r#"[{ effect: allow, topics: ["open"] }]"#;
    let Guarded { host, folder: _folder } = guarded(rules, |config| config.topic_alias_maximum = 3).await;
    let mut client = host.client(signed_in("c", "ann", "ann")).await.0;
    let aliased = |topic: &'static str, packet_id: u16, alias: u16| {
        let topic_alias = NonZeroU16::new(alias);
        let properties = PublishProperties { topic_alias, ..PublishProperties::default() };
        Publish { properties: Some(properties), ..publish(topic, QoS::AtLeastOnce, packet_id) }
    };
    for (topic, packet_id, alias, may) in [
        ("secret", 1, 1, false),
        ("", 2, 1, false),
        ("open", 3, 1, true),
        ("", 4, 1, true),
        ("secret", 5, 1, false),
        ("", 6, 1, false),
    ] {
        client.send(aliased(topic, packet_id, alias)).await;
        let code = refused_with(client.receive().await);
        assert_eq!(code == u8::from(PublishAckReason::NotAuthorized), !may, "{packet_id}: {code:#04x}");
    }
    host.stop().await;
}

#[tokio::test]
async fn a_client_id_that_is_another_users_is_refused() {
    let Guarded { host, .. } = guarded("- { effect: allow, topics: ['#'] }", |config| {
        config.access.as_mut().unwrap().client_ids = vec!["%u".to_owned(), "%u-*".to_owned()];
    })
    .await;
    let (mut ann, ack) = host.client(signed_in("ann-1", "ann", "ann")).await;
    assert_eq!(ack.reason_code, ConnectAckReason::Success);
    for client_id in ["ann-1", "ann", "c"] {
        let reason = refused(&host, signed_in(client_id, "bob", "bob")).await;
        assert_eq!(reason, ConnectAckReason::ClientIdentifierNotValid, "{client_id}");
    }
    assert_eq!(connect_v3(&host, Some(("bob", "bob"))).await.1, 2);
    ann.nothing_but_ping().await;
    // Given out by the broker, nobody else has it.
    let (_, ack) = host.client(signed_in("", "bob", "bob")).await;
    assert_eq!(ack.reason_code, ConnectAckReason::Success);
    host.stop().await;
}

#[tokio::test]
async fn limits_are_told_by_their_own_reason() {
    let Guarded { host, .. } = guarded("- { effect: allow, topics: ['#'] }", |config| {
        config.limits = Limits {
            topic_levels_max: Some(2),
            connections_per_user_max: Some(1),
            connects_per_s: Some(4),
            ..Limits::default()
        };
    })
    .await;
    let (mut first, _) = host.client(signed_in("c", "ann", "ann")).await;
    first.send(publish("a/b/c", QoS::AtLeastOnce, 1)).await;
    assert_eq!(refused_with(first.receive().await), 0x90);
    assert_eq!(refused(&host, signed_in("d", "ann", "ann")).await, ConnectAckReason::QuotaExceeded);
    // The same client again takes its own place over.
    let (_second, ack) = host.client(signed_in("c", "ann", "ann")).await;
    assert_eq!(ack.reason_code, ConnectAckReason::Success);
    loop {
        match host.client(clean("e")).await.1.reason_code {
            ConnectAckReason::NotAuthorized => {}
            reason => break assert_eq!(reason, ConnectAckReason::ConnectionRateExceeded),
        }
    }
    host.stop().await;
}

#[tokio::test]
async fn who_is_past_connections_per_user_takes_nothing_over_and_who_comes_back_does_not_count_twice() {
    let Guarded { host, .. } = guarded("- { effect: allow, topics: ['#'] }", |config| {
        config.limits.connections_per_user_max = Some(2);
    })
    .await;
    let (mut first, _) = host.client(signed_in("a", "ann", "ann")).await;
    let (_second, _) = host.client(signed_in("b", "ann", "ann")).await;
    let (mut other, _) = host.client(signed_in("c", "bob", "bob")).await;
    for client_id in ["c", "d"] {
        assert_eq!(refused(&host, signed_in(client_id, "ann", "ann")).await, ConnectAckReason::QuotaExceeded);
    }
    other.nothing_but_ping().await;
    for _ in 0..3 {
        let (again, ack) = host.client(signed_in("a", "ann", "ann")).await;
        assert_eq!(ack.reason_code, ConnectAckReason::Success);
        assert_eq!(first.disconnected().await, Reason::SessionTakenOver);
        first = again;
    }
    assert_eq!(refused(&host, signed_in("d", "ann", "ann")).await, ConnectAckReason::QuotaExceeded);
    host.stop().await;
}

#[tokio::test]
async fn an_http_check_decides_once_for_a_while_and_refuses_when_it_does_not_answer() {
    let service = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/auth", service.local_addr().unwrap());
    let asked = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = asked.clone();
    let serving = tokio::spawn(async move {
        loop {
            let (mut io, _) = service.accept().await.unwrap();
            count.fetch_add(1, Ordering::SeqCst);
            let mut request = Vec::new();
            while !request.ends_with(b"}") {
                io.read_buf(&mut request).await.unwrap();
            }
            let body = match String::from_utf8(request).unwrap() {
                text if text.contains(r#""username":"ann""#) => {
                    r#"{"allow":true,"rules":[{"effect":"allow","topics":["{site}/x"]}],"fields":{"site":"f1"}}"#
                }
                text if text.contains(r#""username":"ann\u001b"#) => r#"{"allow":true}"#,
                text if text.contains(r#""username":"bob""#) => r#"{"allow":false}"#,
                _ => "not json",
            };
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
            io.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
        }
    });
    let yaml = format!("authenticate: [{{ type: http, url: '{url}' }}]");
    let access = serde_json::from_value(crate::yaml::to_json(&yaml).unwrap()).unwrap();
    let host = started(|config| config.access = Some(access)).await;
    for client_id in ["c", "c"] {
        let (mut client, ack) = host.client(signed_in(client_id, "ann", "x")).await;
        assert_eq!(ack.reason_code, ConnectAckReason::Success);
        client.send(publish("f1/x", QoS::AtLeastOnce, 1)).await;
        assert_eq!(client.receive().await, puback(1));
    }
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    let forged = refused(&host, signed_in("c", "ann\u{1b}[2J", "x")).await;
    assert_eq!(forged, ConnectAckReason::BadUserNameOrPassword);
    assert_eq!(refused(&host, signed_in("c", "bob", "x")).await, ConnectAckReason::BadUserNameOrPassword);
    assert_eq!(refused(&host, signed_in("c", "odd", "x")).await, ConnectAckReason::ServerUnavailable);
    serving.abort();
    assert!(serving.await.unwrap_err().is_cancelled());
    assert_eq!(refused(&host, signed_in("c", "eve", "x")).await, ConnectAckReason::ServerUnavailable);
    // Each reason has a line of its own; each client is in the list.
    let said = host.handle.clients.0.failures.unsaid().into_iter();
    let said = said.filter(|(kind, _)| kind.contains("HTTP check") || kind.contains("access_unavailable"));
    let line = "access: the HTTP check gave no answer that can be used, clients are refused".to_owned();
    assert_eq!(said.collect::<Vec<_>>(), [(line, 0)]);
    let listed = host.handle.clients().refused(9).1;
    let listed = listed.iter().filter(|client| client.cause == "access_unavailable");
    assert_eq!(listed.filter_map(|client| client.who.as_deref()).collect::<Vec<_>>(), ["eve", "odd"]);
    host.stop().await;
}

const SECURING: &str = include_str!("../../../../docs/securing.md");
const FROM_MOSQUITTO: &str = include_str!("../../../../docs/from-mosquitto.md");

fn blocks(page: &'static str, kind: &str) -> impl Iterator<Item = &'static str> {
    let fence = format!("```{kind}\n");
    let blocks: Vec<_> = page.split(&fence).skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert!(!blocks.is_empty());
    blocks.into_iter()
}

#[test]
fn the_configs_of_the_pages_are_valid() {
    let folder = tempfile::tempdir().unwrap();
    for (i, block) in blocks(SECURING, "yaml").chain(blocks(FROM_MOSQUITTO, "yaml")).enumerate() {
        let file = folder.path().join(format!("{i}.yaml"));
        std::fs::write(&file, block).unwrap();
        crate::config::load(Some(&file)).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[tokio::test]
async fn a_certificate_made_as_the_securing_page_says_names_its_user() {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};

    let folder = tempfile::tempdir().unwrap();
    for commands in blocks(SECURING, "sh") {
        let run =
            std::process::Command::new("sh").args(["-ec", commands]).current_dir(folder.path()).output();
        let run = run.unwrap();
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    }
    let file = |name: &str| folder.path().join(name);
    let yaml = blocks(SECURING, "yaml").next().unwrap();
    let value = crate::yaml::to_json(yaml).unwrap();
    let access = serde_json::from_value(value["mqtt"]["access"].clone()).unwrap();
    let host = started(|config| {
        config.access = Some(access);
        config.listeners[0].tls = Some(Tls {
            cert: file("server.pem"),
            key: file("server.key"),
            client_ca: Some(file("ca.pem")),
            client_cert: Default::default(),
            crl: None,
            identity: Identity::Cn,
        });
    })
    .await;

    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(file("ca.pem")).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let chain = vec![CertificateDer::from_pem_file(file("press-7.pem")).unwrap()];
    let key = PrivateKeyDer::from_pem_file(file("press-7.key")).unwrap();
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .unwrap();
    let socket = TcpStream::connect(host.address).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let mut io = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, socket).await.unwrap();
    let mut codec = Codec::default();
    let mut out = BytesMut::new();
    codec.encode(clean("any").into(), &mut out).unwrap();
    for (topic, packet_id) in [("acme/f/press/press-7/t", 1), ("acme/f/press/press-8/t", 2)] {
        codec.encode(publish(topic, QoS::AtLeastOnce, packet_id).into(), &mut out).unwrap();
    }
    io.write_all(&out).await.unwrap();
    let (mut input, mut acks) = (BytesMut::new(), Vec::new());
    while acks.len() < 2 {
        match timeout(HUNG_AFTER, async { codec.decode(&mut input).unwrap() }).await.unwrap() {
            Some((Packet::PublishAck(ack), _)) => acks.push((ack.packet_id.get(), u8::from(ack.reason_code))),
            Some((Packet::ConnectAck(ack), _)) => assert_eq!(ack.reason_code, ConnectAckReason::Success),
            Some((other, _)) => panic!("{other:?}"),
            None => assert_ne!(timeout(HUNG_AFTER, io.read_buf(&mut input)).await.unwrap().unwrap(), 0),
        }
    }
    acks.sort_unstable();
    assert_eq!(acks, [(1, 0), (2, 0x87)]);
    host.stop().await;
}

#[tokio::test]
async fn an_empty_user_name_is_nobodys() {
    let yaml = "- { effect: allow, anonymous: true, action: publish, topics: [open] }";
    for (allow_anonymous, code) in [(true, 0), (false, 5)] {
        let change = |config: &mut Config| config.listeners[0].allow_anonymous = allow_anonymous;
        let Guarded { host, .. } = guarded(yaml, change).await;
        assert_eq!(connect_v3(&host, Some(("", ""))).await.1, code);
        // With a password it is a login that no user has.
        assert_eq!(connect_v3(&host, Some(("", "ann"))).await.1, 4);
        host.stop().await;
    }
}

#[tokio::test]
async fn the_credentials_of_a_client_that_has_left_are_looked_at_no_longer() {
    let store = MemoryStream::with_hooks("broker", 1);
    let broker = broker(&Config::default(), MemoryStream::with_hooks("s", 1), store);
    let mut input = BytesMut::new();
    let (client, mut server) = tokio::io::duplex(64);
    drop(client);
    let for_ever = std::future::pending::<()>();
    let looked = auth::unless_gone(&broker, &mut server, &mut input, for_ever).await;
    assert_eq!(looked.map_err(|denial| denial.cause), Err("lost"));

    // One that has said all that it has to say waits for the answer.
    let (mut client, mut server) = tokio::io::duplex(64);
    client.write_all(b"early").await.unwrap();
    drop(client);
    let work = async {
        for _ in 0..9 {
            tokio::task::yield_now().await;
        }
        7
    };
    let looked = auth::unless_gone(&broker, &mut server, &mut input, work).await;
    assert_eq!(looked.map_err(|denial| denial.cause), Ok(7));
    assert_eq!(&input[..], b"early");
}
