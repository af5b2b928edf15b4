//! Bounds and refusals.

use super::*;

#[tokio::test]
async fn a_silent_client_is_disconnected_after_its_keep_alive() {
    let host = Host::with(MemoryStream::new("s", 1)).await;
    let (mut client, _) = host.client(Connect { keep_alive: 1, ..clean("c") }).await;
    assert_eq!(client.disconnected().await, Reason::KeepAliveTimeout);
    host.stop().await;
}

#[tokio::test]
async fn bounds_that_the_client_knows_are_enforced() {
    let stream = MemoryStream::with_manual_commit("s", 1);
    let streams = Streams::new(vec![], stream.clone());
    let change = |config: &mut Config| (config.receive_maximum, config.topic_alias_maximum) = (2, 3);
    let host = Host::start(streams, MemoryStream::new("broker", 1), change).await;
    let (mut client, ack) = host.client(clean("c")).await;
    assert_eq!((ack.receive_max.get(), ack.topic_alias_max, ack.shared_subscription_available), (2, 3, true));
    for packet_id in 1..=3 {
        client.send(publish("t", QoS::AtLeastOnce, packet_id)).await;
    }
    assert_eq!(client.disconnected().await, Reason::ReceiveMaximumExceeded);

    let aliased = |topic: &'static str, alias: u16| {
        let properties =
            PublishProperties { topic_alias: NonZeroU16::new(alias), ..PublishProperties::default() };
        Publish { properties: Some(properties), ..publish(topic, QoS::AtMostOnce, 0) }
    };
    let end = stream.bounds().end.0;
    let mut client = host.clean("d").await;
    for (topic, alias) in [("one", 1), ("", 1), ("two", 1), ("", 1)] {
        client.send(aliased(topic, alias)).await;
    }
    client.nothing_but_ping().await;
    stream.commit();
    let mut topics = Vec::new();
    let mut at = end;
    while topics.len() < 6 {
        let batch = batch(&*stream, at).await;
        at += batch.len() as u64;
        topics.extend(batch.messages().map(|message| message.topic().to_owned()));
    }
    assert_eq!(topics[topics.len() - 4..], ["one", "one", "two", "two"]);
    client.send(aliased("three", 4)).await;
    assert_eq!(client.disconnected().await, Reason::TopicAliasInvalid);
    host.stop().await;
}

#[tokio::test]
async fn topics_below_sys_are_the_brokers_own() {
    let stream = MemoryStream::new("s", 1);
    let host = Host::with(stream.clone()).await;
    let mut client = host.clean("c").await;
    client.send(publish("$SYS/x", QoS::AtLeastOnce, 1)).await;
    assert_eq!(client.receive().await, Packet::PublishAck(not_allowed(1)));
    // MQTT 3.1.1 knows no reason codes.
    let mut old = Client::open(&host).await;
    old.io.write_all(b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x00\x00\x01o").await.unwrap();
    old.io.write_all(b"\x32\x0a\x00\x06$SYS/x\x00\x01").await.unwrap();
    let mut answer = [0; 8];
    old.io.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"\x20\x02\x00\x00\x40\x02\x00\x01");
    assert_eq!(stream.bounds().end, Offset(0));
    host.stop().await;
}

#[tokio::test]
async fn a_client_id_is_assigned_and_bad_connects_are_refused() {
    let host = Host::with(MemoryStream::new("s", 1)).await;
    let (_client, ack) = host.client(clean("")).await;
    assert!(ack.assigned_client_id.is_some_and(|id| id.starts_with("auto-")));
    let mut client = Client::open(&host).await;
    client.io.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    assert_eq!(client.try_receive().await, None);
    let auth = Connect { auth_method: Some("X".into()), ..clean("c") };
    assert_eq!(host.client(auth).await.1.reason_code, ConnectAckReason::BadAuthenticationMethod);
    host.stop().await;
}

#[tokio::test]
async fn a_connection_past_connections_max_is_closed_and_one_that_ends_makes_room() {
    let streams = || Streams::new(vec![], MemoryStream::new("s", 1));
    let change = |config: &mut Config| config.connections_max = 2;
    let host = Host::start(streams(), MemoryStream::new("broker", 1), change).await;
    let (mut first, mut second) = (host.clean("a").await, host.clean("b").await);
    let mut third = Client::open(&host).await;
    // Closed already, perhaps.
    let _ = third.io.write_all(b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x00\x00\x01c").await;
    assert_eq!(third.try_receive().await, None);
    first.nothing_but_ping().await;
    second.send(Packet::Disconnect(Disconnect::new(Reason::NormalDisconnection))).await;
    assert_eq!(second.try_receive().await, None);
    host.clean("c").await.nothing_but_ping().await;
    first.nothing_but_ping().await;
    host.stop().await;
}

#[tokio::test]
async fn a_session_past_sessions_max_is_refused_with_the_code_of_its_version_and_known_ones_go_on() {
    let streams = Streams::new(vec![], MemoryStream::new("s", 1));
    let change = |config: &mut Config| config.sessions_max = 1;
    let host = Host::start(streams, MemoryStream::new("broker", 1), change).await;
    drop(host.client(resuming("known")).await);
    assert_eq!(host.client(clean("new")).await.1.reason_code, ConnectAckReason::QuotaExceeded);
    let mut old = Client::open(&host).await;
    old.io.write_all(b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x00\x00\x01o").await.unwrap();
    let mut answer = Vec::new();
    old.io.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, b"\x20\x02\x00\x03");
    let (mut known, ack) = host.client(resuming("known")).await;
    assert!(ack.session_present);
    known.nothing_but_ping().await;
    // The session ends with its client, and makes room.
    drop(known);
    let (mut known, _) = host.client(clean("known")).await;
    known.send(Packet::Disconnect(Disconnect::new(Reason::NormalDisconnection))).await;
    assert_eq!(known.try_receive().await, None);
    host.clean("new").await.nothing_but_ping().await;
    host.stop().await;
}

#[tokio::test]
async fn a_subscription_past_a_clients_bounds_is_refused_and_one_that_is_given_up_makes_room() {
    let streams = Streams::new(vec![], MemoryStream::new("s", 1));
    let host = Host::start(streams, MemoryStream::new("broker", 1), |config| {
        (config.subscriptions_per_client_max, config.subscription_bytes_per_client_max) = (3, ByteSize(12));
    })
    .await;
    let (mut client, _) = host.client(resuming("c")).await;
    let filters = ["a/b/c", "a/b/c/d/e", "d", "a/b/c"].map(|filter| (filter.into(), QOS1));
    let (packet_id, topic_filters) = (id(9), filters.into());
    client.send(Subscribe { packet_id, id: None, user_properties: vec![], topic_filters }).await;
    let Packet::SubscribeAck(ack) = client.receive().await else { panic!("not SUBACK") };
    let (granted, full) = (SubscribeAckReason::GrantedQos1, SubscribeAckReason::QuotaExceeded);
    assert_eq!(ack.status, [granted, full, granted, granted]);
    for (filter, status) in [("e/f/g/h", full), ("e", granted), ("f", full), ("e", granted)] {
        assert_eq!(client.subscribe(filter, QOS1).await, status, "{filter}");
    }
    let topic_filters = vec!["a/b/c".into()];
    client.send(Unsubscribe { packet_id: id(9), user_properties: vec![], topic_filters }).await;
    assert!(matches!(client.receive().await, Packet::UnsubscribeAck(_)));
    assert_eq!(client.subscribe("e/f/g/h", QOS1).await, granted);
    // Another client has bounds of its own.
    assert_eq!(host.clean("d").await.subscribe("e/f/g/h", QOS1).await, granted);
    host.stop().await;
}

#[test]
fn no_bytes_of_a_client_end_the_listener() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let host = runtime.block_on(Host::with(MemoryStream::new("s", 1)));
    let packets = prop_oneof![
        Just(Packet::from(publish("a/b", QoS::ExactlyOnce, 3))),
        Just(Packet::from(Subscribe {
            packet_id: id(1),
            id: NonZeroU16::new(3).map(Into::into),
            user_properties: vec![("a".into(), "b".into())],
            topic_filters: vec![("a/+".into(), QOS1)],
        })),
        Just(pubrel(3)),
        Just(pubrec(1)),
        Just(Packet::PingRequest),
        Just(Packet::from(clean("again"))),
        Just(Packet::Disconnect(Disconnect::new(Reason::DisconnectWithWillMessage))),
    ];
    let damage = (any::<prop::sample::Index>(), any::<u8>());
    let strategy = (prop::collection::vec(packets, 0..6), prop::collection::vec(damage, 0..4), any::<bool>());
    let config = ProptestConfig { cases: 300, ..ProptestConfig::default() };
    proptest!(config, |((packets, damage, connect) in strategy)| {
        let mut bytes = BytesMut::new();
        let mut codec = Codec::default();
        if connect {
            codec.encode(clean("bad").into(), &mut bytes).unwrap();
        }
        let begin = if connect { bytes.len() } else { 0 };
        for packet in packets {
            codec.encode(packet, &mut bytes).unwrap();
        }
        let len = bytes.len() - begin;
        for (at, value) in damage.into_iter().filter(|_| len > 0) {
            let at = begin + at.index(len);
            bytes[at] = value;
        }
        runtime.block_on(async {
            let mut bad = TcpStream::connect(host.address).await.unwrap();
            // Refused already, perhaps.
            let _ = bad.write_all(&bytes).await;
            let _ = bad.shutdown().await;
            let mut rest = Vec::new();
            let _ = timeout(HUNG_AFTER, bad.read_to_end(&mut rest)).await.expect("the listener lets go");
        });
    });
    runtime.block_on(async {
        host.clean("honest").await.nothing_but_ping().await;
        host.stop().await;
    });
}

#[tokio::test]
async fn large_packets_that_are_not_whole_share_one_budget() {
    let streams = Streams::new(vec![], MemoryStream::new("s", 1));
    let host = Host::start(streams, MemoryStream::new("broker", 1), |config| {
        (config.max_packet_size, config.partial_packets_bytes_max) = (ByteSize::kib(64), ByteSize::kib(64));
    })
    .await;
    let large = || Publish { payload: vec![b'x'; 60_000].into(), ..publish("t", QoS::AtLeastOnce, 1) };
    let mut bytes = BytesMut::new();
    Codec::default().encode(Packet::from(large()), &mut bytes).unwrap();
    let (mut first, mut second) = (host.clean("first").await, host.clean("second").await);
    first.io.write_all(&bytes[..10_000]).await.unwrap();
    let room = host.handle.clients().0.incoming_permits.clone();
    while !room.is_taken() {
        tokio::task::yield_now().await;
    }
    second.io.write_all(&bytes[..59_000]).await.unwrap();
    while !room.is_wanted() {
        tokio::task::yield_now().await;
    }
    // Small ones need none of it.
    host.clean("other").await.nothing_but_ping().await;
    second.io.write_all(&bytes[59_000..]).await.unwrap();
    first.io.write_all(&bytes[10_000..]).await.unwrap();
    for client in [&mut first, &mut second] {
        assert_eq!(client.receive().await, puback(1));
    }
    assert!(!room.is_wanted() && !room.is_taken());
    host.stop().await;
}

/// A client that always sends something, until its connection ends.
async fn flood(host: &Host) -> tokio::task::JoinHandle<()> {
    let (_, mut io) = host.clean("c").await.io.into_split();
    tokio::spawn(async move {
        // PUBACKs of nothing.
        let chunk = [0x40, 2, 0, 7].repeat(64 << 10);
        while io.write_all(&chunk).await.is_ok() {}
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_always_sends_something_is_taken_over_deleted_and_does_not_hold_a_stop_up() {
    let host = Host::with(MemoryStream::new("s", 1)).await;
    let first = flood(&host).await;
    let second = flood(&host).await;
    first.await.unwrap();
    assert!(host.handle.clients().delete("c").await);
    second.await.unwrap();
    let third = flood(&host).await;
    host.stop().await;
    third.await.unwrap();
}

#[tokio::test]
async fn filters_of_many_levels_are_counted_by_their_levels() {
    let streams = Streams::new(vec![], MemoryStream::new("s", 1));
    let few = |config: &mut Config| config.subscriptions_per_client_max = 10;
    let host = Host::start(streams, MemoryStream::new("broker", 1), few).await;
    let mut client = host.clean("c").await;
    let filter = |n: usize| -> &'static str { format!("{n}{}", "/x".repeat(19)).leak() };
    for n in 0..5 {
        assert_eq!(client.subscribe(filter(n), QOS1).await, SubscribeAckReason::GrantedQos1);
    }
    assert_eq!(client.subscribe("a", QOS1).await, SubscribeAckReason::QuotaExceeded);
    host.stop().await;
}
