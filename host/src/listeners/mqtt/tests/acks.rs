//! An ack means durable, also where a stream has no room or stops.

use super::*;
use crate::batch::flags;
use crate::stream::StateChange;

#[tokio::test]
async fn nothing_is_acknowledged_before_it_is_durable() {
    let stream = MemoryStream::with_manual_commit("s", 4);
    let host = Host::with(stream.clone()).await;
    let mut client = host.clean("c").await;
    client.send(publish("a/b/c/d/e", QoS::AtLeastOnce, 1)).await;
    client.send(publish("a", QoS::ExactlyOnce, 2)).await;
    client.send(publish("a", QoS::AtLeastOnce, 3)).await;
    client.nothing_but_ping().await;
    stream.commit();
    for expected in [puback(1), pubrec(2), puback(3)] {
        assert_eq!(client.receive().await, expected);
    }
    client.send(pubrel(2)).await;
    assert_eq!(client.receive().await, pubcomp(2));
    host.stop().await;
}

#[tokio::test]
async fn a_refused_publish_is_answered_in_its_turn_whether_packets_come_apart_or_in_one_read() {
    let stream = MemoryStream::with_manual_commit("s", 1);
    let host = Host::with(stream.clone()).await;
    let mut client = host.clean("c").await;
    let publishes = [("a", 1), ("$SYS/own", 2), ("a", 3), ("$SYS/own", 4)]
        .map(|(topic, packet_id)| Packet::from(publish(topic, QoS::AtLeastOnce, packet_id)));
    let refused = |packet_id| Packet::PublishAck(not_allowed(packet_id));
    for in_one_write in [false, true] {
        if in_one_write {
            client.send_all(publishes.clone()).await;
        } else {
            for publish in publishes.clone() {
                client.send(publish).await;
            }
        }
        client.nothing_but_ping().await;
        stream.commit();
        for expected in [puback(1), refused(2), puback(3), refused(4)] {
            assert_eq!(client.receive().await, expected, "in one write: {in_one_write}");
        }
    }
    host.stop().await;
}

#[tokio::test]
async fn a_stalled_stream_holds_only_its_own_acks() {
    let (slow, quick) =
        (MemoryStream::with_manual_commit("slow", 1), MemoryStream::with_manual_commit("quick", 1));
    let routed: (Vec<TopicFilter>, Arc<dyn Stream>) =
        (vec![TopicFilter::new("slow/#").unwrap()], slow.clone());
    let streams = Streams::new(vec![routed], quick.clone());
    let host = Host::start(streams, MemoryStream::new("broker", 1), |_| {}).await;
    let mut client = host.clean("c").await;
    for (topic, packet_id) in [("slow/1", 1), ("quick", 2), ("slow/2", 3), ("quick", 4)] {
        client.send(publish(topic, QoS::AtLeastOnce, packet_id)).await;
    }
    client.nothing_but_ping().await;
    quick.commit();
    assert_eq!((client.receive().await, client.receive().await), (puback(2), puback(4)));
    client.nothing_but_ping().await;
    slow.commit();
    assert_eq!((client.receive().await, client.receive().await), (puback(1), puback(3)));
    host.stop().await;
}

#[tokio::test]
async fn a_full_disk_holds_acks_and_drops_qos_0_but_answers_pings() {
    let stream = MemoryStream::with_hooks("s", 1);
    let host = Host::with(stream.clone()).await;
    let mut client = host.clean("c").await;
    stream.set_no_space(true);
    client.send(publish("t", QoS::AtMostOnce, 0)).await;
    client.send(publish("t", QoS::AtLeastOnce, 1)).await;
    client.send(publish("t", QoS::ExactlyOnce, 2)).await;
    for _ in 0..3 {
        client.nothing_but_ping().await;
    }
    stream.set_no_space(false);
    assert_eq!((client.receive().await, client.receive().await), (puback(1), pubrec(2)));
    client.nothing_but_ping().await;
    assert_eq!(stream.bounds().end, Offset(2));
    let counts = host.handle.clients().show("c").unwrap().counts;
    assert_eq!((counts.published, counts.no_space), (2, 1));
    host.stop().await;
}

#[tokio::test]
async fn a_full_commit_buffer_holds_acks_and_loses_nothing_once_there_is_room() {
    let stream = MemoryStream::with_manual_commit("s", 1);
    let streams = Streams::new(vec![], stream.clone());
    let change = |config: &mut Config| config.max_packet_size = ByteSize::mib(10);
    let host = Host::start(streams, MemoryStream::new("broker", 1), change).await;
    let mut client = host.clean("c").await;
    let large = Bytes::from(vec![b'x'; 9 << 20]);
    client.send(Publish { payload: large.clone(), ..publish("one", QoS::AtLeastOnce, 1) }).await;
    // The second does not fit beside the first; what comes after it waits behind it.
    client.send(Publish { payload: large, ..publish("two", QoS::AtLeastOnce, 2) }).await;
    client.send(publish("three", QoS::ExactlyOnce, 3)).await;
    client.send(publish("four", QoS::AtMostOnce, 0)).await;
    client.nothing_but_ping().await;
    stream.commit();
    assert_eq!(client.receive().await, puback(1));
    client.nothing_but_ping().await;
    stream.commit();
    assert_eq!((client.receive().await, client.receive().await), (puback(2), pubrec(3)));
    client.nothing_but_ping().await;
    let mut topics = Vec::new();
    while topics.len() < stream.bounds().end.0 as usize {
        let batch = batch(&*stream, topics.len() as u64).await;
        topics.extend(batch.messages().map(|message| message.topic().to_owned()));
    }
    assert_eq!(topics, ["one", "two", "three", "four"]);
    host.stop().await;
}

#[tokio::test]
async fn a_full_commit_buffer_whose_commit_finds_no_room_drops_qos_0_and_holds_acks() {
    let stream = MemoryStream::with_manual_commit("s", 1);
    let streams = Streams::new(vec![], stream.clone());
    let change = |config: &mut Config| config.max_packet_size = ByteSize::mib(10);
    let host = Host::start(streams, MemoryStream::new("broker", 1), change).await;
    let mut client = host.clean("c").await;
    let large = |topic, qos, packet_id| {
        let payload = Bytes::from(vec![b'x'; 9 << 20]);
        Publish { payload, ..publish(topic, qos, packet_id) }
    };
    client.send(large("one", QoS::AtLeastOnce, 1)).await;
    client.send(large("two", QoS::AtMostOnce, 0)).await;
    client.nothing_but_ping().await;
    stream.set_no_space(true);
    // More than is read of a client that waits.
    for _ in 0..3 {
        client.send(large("three", QoS::AtMostOnce, 0)).await;
    }
    client.send(publish("four", QoS::AtLeastOnce, 4)).await;
    client.nothing_but_ping().await;
    let no_space = || host.handle.clients().show("c").unwrap().counts.no_space;
    assert_eq!(no_space(), 4);
    stream.set_no_space(false);
    stream.commit();
    assert_eq!(client.receive().await, puback(1));
    stream.commit();
    assert_eq!(client.receive().await, puback(4));
    assert_eq!((stream.bounds().end, no_space()), (Offset(2), 4));
    host.stop().await;
}

#[tokio::test]
async fn a_stream_that_stops_ends_its_connections_without_acks() {
    let stream = MemoryStream::with_manual_commit("s", 1);
    let host = Host::with(stream.clone()).await;
    let mut client = host.clean("c").await;
    client.send(publish("t", QoS::AtLeastOnce, 1)).await;
    client.nothing_but_ping().await;
    stream.fail("the disk is gone");
    assert_eq!(client.disconnected().await, Reason::ServerShuttingDown);
    host.stop().await;
}

#[tokio::test]
async fn shutdown_lets_waiting_acks_out_and_says_so() {
    let stream = MemoryStream::with_manual_commit("s", 1);
    let host = Host::with(stream.clone()).await;
    let mut client = host.clean("c").await;
    client.send(publish("t", QoS::AtLeastOnce, 1)).await;
    client.nothing_but_ping().await;
    host.shutdown.cancel();
    stream.commit();
    assert_eq!(client.receive().await, puback(1));
    assert_eq!(client.disconnected().await, Reason::ServerShuttingDown);
    host.stop().await;
}

#[tokio::test]
async fn a_message_names_its_device_and_keeps_its_properties() {
    let stream = MemoryStream::new("s", 4);
    let host = Host::with(stream.clone()).await;
    let mut client = host.clean("client-7").await;
    let properties = PublishProperties {
        content_type: Some("json".into()),
        is_utf8_payload: true,
        user_properties: vec![("k".into(), "v".into())],
        ..PublishProperties::default()
    };
    let fits = publish("acme/f1/temp/sensor-1/reading", QoS::AtLeastOnce, 1);
    client.send(Publish { properties: Some(properties), ..fits }).await;
    assert_eq!(client.receive().await, puback(1));
    client.send(publish("test/hello", QoS::AtLeastOnce, 2)).await;
    assert_eq!(client.receive().await, puback(2));
    let (one, two) = (batch(&*stream, 0).await, batch(&*stream, 1).await);
    let (one, two) = (one.message(0), two.message(0));
    assert_eq!((one.device(), two.device()), ("sensor-1", "client-7"));
    assert_eq!(one.entry.flags, 1 | flags::UTF8 | flags::FITS_NAMESPACE);
    let kept: Vec<_> = properties::iter(one.properties()).map(|p| (p.origin, p.name, p.value)).collect();
    assert_eq!(kept, [(1, "content-type", &b"json"[..]), (0, "k", b"v")]);
    assert_eq!(properties::get(two.properties(), Origin::Listener, "client-id"), Some(&b"client-7"[..]));
    assert_eq!(two.payload(), b"21");
    host.stop().await;
}

#[tokio::test]
async fn a_repeated_pubrel_is_answered_no_sooner_than_its_release_is_durable() {
    for reconnects in [false, true] {
        let (one, other) = (MemoryStream::with_hooks("one", 1), MemoryStream::with_hooks("other", 1));
        let routed: (Vec<TopicFilter>, Arc<dyn Stream>) =
            (vec![TopicFilter::new("one/#").unwrap()], one.clone());
        let streams = Streams::new(vec![routed], other.clone());
        let host = Host::start(streams, MemoryStream::new("broker", 1), |_| {}).await;
        let mut client = host.client(resuming("c")).await.0;
        let publishes = [publish("one/1", QoS::ExactlyOnce, 1), publish("other", QoS::ExactlyOnce, 2)];
        client.send_all(publishes.map(Packet::from)).await;
        assert_eq!([client.receive().await, client.receive().await].len(), 2);
        one.hold_commits();
        other.hold_commits();
        client.send_all([pubrel(1), pubrel(2), pubrel(1)]).await;
        client.nothing_but_ping().await;
        if reconnects {
            let (again, ack) = host.client(resuming("c")).await;
            assert!(ack.session_present);
            client = again;
        }
        client.send_all([pubrel(1), pubrel(2)]).await;
        client.nothing_but_ping().await;
        // What is sent again is answered as an id that is not open, and no sooner.
        let again = |packet_id| {
            let reason_code = PublishAck2Reason::PacketIdNotFound;
            let ack = PublishAck2 { packet_id: id(packet_id), reason_code, ..PublishAck2::default() };
            Packet::PublishComplete(ack)
        };
        let (first, repeated) = if reconnects { (vec![], 1) } else { (vec![pubcomp(1)], 2) };
        other.commit();
        if !reconnects {
            assert_eq!(client.receive().await, pubcomp(2));
        }
        assert_eq!(client.receive().await, again(2));
        client.nothing_but_ping().await;
        one.commit();
        for expected in first.into_iter().chain((0..repeated).map(|_| again(1))) {
            assert_eq!(client.receive().await, expected);
        }
        host.stop().await;
    }
}

#[tokio::test]
async fn a_change_of_subscriptions_is_durable_before_the_client_can_ask_for_it_again() {
    let store = MemoryStream::with_hooks("broker", 1);
    let host = Host::start(Streams::new(vec![], MemoryStream::new("s", 1)), store.clone(), |_| {}).await;
    let mut client = host.client(resuming("c")).await.0;
    client.subscribe("a", QOS1).await;
    store.hold_commits();
    let topic_filters = vec!["a".into()];
    let unsubscribe = Unsubscribe { packet_id: id(1), user_properties: vec![], topic_filters };
    client.send(unsubscribe).await;
    store.awaited().await;
    drop(client);
    let mut again = Client::open(&host).await;
    again.send(resuming("c")).await;
    // The client is not told that it is back before the removal is durable.
    host.clean("other").await.nothing_but_ping().await;
    assert!(futures_util::poll!(std::pin::pin!(again.receive())).is_pending());
    store.commit();
    loop {
        tokio::select! {
            ack = again.receive() => break assert!(matches!(ack, Packet::ConnectAck(_))),
            // What the next owner of the session makes durable waits for a commit too.
            () = tokio::task::yield_now() => store.commit(),
        }
    }
    host.stop().await;
}

fn qos2(topic: &'static str, payload: &'static str, packet_id: u16, dup: bool) -> Publish {
    Publish { payload: payload.into(), dup, ..publish(topic, QoS::ExactlyOnce, packet_id) }
}

/// What is under `one/` goes into `one`, all else into `other`.
async fn routed(one: &Arc<MemoryStream>, other: &Arc<MemoryStream>, store: &Arc<dyn Stream>) -> Host {
    let routed: (Vec<TopicFilter>, Arc<dyn Stream>) = (vec![TopicFilter::new("one/#").unwrap()], one.clone());
    Host::start(Streams::new(vec![routed], other.clone()), store.clone(), |_| {}).await
}

fn lengths(streams: [&Arc<MemoryStream>; 2]) -> [(u64, usize); 2] {
    streams.map(|stream| (stream.bounds().end.0, stream.state(b"q2").len()))
}

#[tokio::test]
async fn an_open_packet_id_with_another_message_is_a_new_message_whatever_dup_says() {
    let (stream, store) = (MemoryStream::new("s", 1), MemoryStream::new("broker", 1));
    let start = || Host::start(Streams::new(vec![], stream.clone()), store.clone(), |_| {});
    let mut host = start().await;
    let expected = [
        ("1", false, 1),
        // The store of the client is lost.
        ("2", false, 2),
        // Sent again, by a client that says so or not.
        ("2", false, 2),
        ("2", true, 2),
        // Its store is lost again, and so was the message when it was sent first.
        ("3", true, 3),
        ("3", true, 3),
        ("1", true, 4),
    ];
    for (n, (payload, dup, messages)) in expected.into_iter().enumerate() {
        if n % 2 == 1 {
            // Known after a restart too.
            host.stop().await;
            host = start().await;
        }
        let mut client = host.client(resuming("c")).await.0;
        client.send(qos2("a/b", payload, 1, dup)).await;
        assert_eq!(client.receive().await, pubrec(1));
        assert_eq!(stream.bounds().end, Offset(messages), "{n}");
        assert_eq!(stream.state(b"q2").len(), 1);
    }
    let mut client = host.client(resuming("c")).await.0;
    client.send(pubrel(1)).await;
    assert_eq!(client.receive().await, pubcomp(1));
    assert!(stream.state(b"q2").is_empty());
    host.stop().await;
}

#[tokio::test]
async fn a_message_that_differs_in_its_properties_alone_is_another_but_for_its_expiry() {
    let stream = MemoryStream::new("s", 1);
    let host = Host::with(stream.clone()).await;
    let mut client = host.client(resuming("c")).await.0;
    let call = |correlation: &'static str, expiry_s| {
        let properties = PublishProperties {
            correlation_data: Some(correlation.into()),
            message_expiry_interval: std::num::NonZeroU32::new(expiry_s),
            ..PublishProperties::default()
        };
        Publish { properties: Some(properties), ..qos2("a", "{}", 1, false) }
    };
    let retained = Publish { retain: true, ..call("B", 60) };
    for (publish, messages) in
        [(call("A", 60), 1), (call("A", 50), 1), (call("B", 60), 2), (call("B", 60), 2), (retained, 3)]
    {
        client.send(publish).await;
        assert_eq!(client.receive().await, pubrec(1));
        assert_eq!(stream.bounds().end, Offset(messages));
    }
    host.stop().await;
}

#[tokio::test]
async fn a_change_of_a_packet_id_that_no_stream_took_leaves_what_was_known_of_it() {
    // Each is what the first connection sends to a full disk, before it is lost.
    let cases: [&[Packet]; 4] = [
        &[pubrel(1)],
        &[qos2("t", "2", 1, false).into()],
        &[pubrel(1), qos2("t", "2", 1, false).into()],
        &[qos2("t", "2", 1, false).into(), pubrel(1), qos2("t", "1", 1, true).into()],
    ];
    for lost in cases {
        let stream = MemoryStream::with_hooks("s", 1);
        let host = Host::with(stream.clone()).await;
        let mut client = host.client(resuming("c")).await.0;
        client.send(qos2("t", "1", 1, false)).await;
        assert_eq!(client.receive().await, pubrec(1));
        stream.set_no_space(true);
        client.send_all(lost.iter().cloned()).await;
        client.nothing_but_ping().await;
        drop(client);
        let mut client = host.client(resuming("c")).await.0;
        stream.set_no_space(false);
        for (payload, messages) in [("1", 1), ("2", 2)] {
            client.send(qos2("t", payload, 1, false)).await;
            assert_eq!(client.receive().await, pubrec(1));
            assert_eq!(stream.bounds().end, Offset(messages), "{payload} after {lost:?}");
        }
        client.send(pubrel(1)).await;
        assert_eq!(client.receive().await, pubcomp(1));
        assert!(stream.state(b"q2").is_empty(), "{lost:?}");
        host.stop().await;
    }
}

#[tokio::test]
async fn a_release_that_is_not_durable_is_known_after_a_publish_that_no_stream_took() {
    let stream = MemoryStream::with_hooks("s", 1);
    let host = Host::with(stream.clone()).await;
    let mut client = host.client(resuming("c")).await.0;
    client.send(qos2("t", "1", 1, false)).await;
    assert_eq!(client.receive().await, pubrec(1));
    stream.hold_commits();
    client.send(pubrel(1)).await;
    client.nothing_but_ping().await;
    stream.set_no_space(true);
    client.send(qos2("t", "2", 1, false)).await;
    client.nothing_but_ping().await;
    drop(client);
    let mut client = host.client(resuming("c")).await.0;
    stream.set_no_space(false);
    client.send(pubrel(1)).await;
    client.nothing_but_ping().await;
    stream.commit();
    assert!(matches!(client.receive().await, Packet::PublishComplete(ack) if ack.packet_id == id(1)));
    host.stop().await;
}

/// A crash before the removal is durable leaves the record where it was, and the message is nowhere; a
/// crash after it leaves neither, and the message is sent again. There is no moment with two records.
#[tokio::test]
async fn an_open_packet_id_goes_to_another_stream_once_its_record_is_durably_gone() {
    for reconnects in [false, true] {
        let (one, other) = (MemoryStream::with_hooks("one", 1), MemoryStream::with_hooks("other", 1));
        let store = MemoryStream::new("broker", 1);
        let mut host = routed(&one, &other, &store).await;
        let mut client = host.client(resuming("c")).await.0;
        client.send(qos2("one/state", "on", 1, false)).await;
        assert_eq!(client.receive().await, pubrec(1));
        one.hold_commits();
        // Its store is lost.
        if reconnects {
            client = host.client(resuming("c")).await.0;
        }
        let moved = [qos2("boot", "hello", 1, true).into(), publish("boot", QoS::AtLeastOnce, 2).into()];
        client.send_all(moved.clone()).await;
        client.nothing_but_ping().await;
        assert_eq!(lengths([&one, &other]), [(1, 0), (0, 0)]);
        if reconnects {
            client = host.client(resuming("c")).await.0;
            client.send_all(moved).await;
            client.nothing_but_ping().await;
            assert_eq!(lengths([&one, &other]), [(1, 0), (0, 0)]);
        }
        one.commit();
        assert_eq!([client.receive().await, client.receive().await], [pubrec(1), puback(2)]);
        assert_eq!(lengths([&one, &other]), [(1, 0), (2, 1)]);
        client.send(pubrel(1)).await;
        assert_eq!(client.receive().await, pubcomp(1));
        drop(client);
        host.stop().await;
        host = routed(&one, &other, &store).await;
        let mut client = host.client(resuming("c")).await.0;
        client.send(qos2("one/state", "on", 1, false)).await;
        client.nothing_but_ping().await;
        one.commit();
        assert_eq!(client.receive().await, pubrec(1));
        assert_eq!(lengths([&one, &other]), [(2, 1), (2, 0)], "a message that equals an old one is new");
        host.stop().await;
    }
}

#[tokio::test]
async fn a_packet_id_whose_release_is_not_durable_waits_for_it_only_in_another_stream() {
    let (one, other) = (MemoryStream::with_hooks("one", 1), MemoryStream::with_hooks("other", 1));
    let host = routed(&one, &other, &MemoryStream::new("broker", 1)).await;
    let mut client = host.client(resuming("c")).await.0;
    client.send(qos2("one/a", "1", 1, false)).await;
    assert_eq!(client.receive().await, pubrec(1));
    one.hold_commits();
    client.send_all([pubrel(1), qos2("one/a", "2", 1, false).into(), pubrel(1)]).await;
    client.send(qos2("b", "3", 1, false)).await;
    client.nothing_but_ping().await;
    assert_eq!(other.bounds().end, Offset(0));
    one.commit();
    for expected in [pubcomp(1), pubrec(1), pubcomp(1), pubrec(1)] {
        assert_eq!(client.receive().await, expected);
    }
    assert_eq!(lengths([&one, &other]), [(2, 0), (1, 1)]);
    host.stop().await;
}

#[tokio::test]
async fn a_session_that_ends_with_its_connection_moves_packet_ids_at_once() {
    let (one, other) = (MemoryStream::with_hooks("one", 1), MemoryStream::with_hooks("other", 1));
    let host = routed(&one, &other, &MemoryStream::new("broker", 1)).await;
    let mut client = host.clean("c").await;
    one.hold_commits();
    client.send_all([qos2("one/a", "1", 1, false), qos2("b", "2", 1, false)].map(Packet::from)).await;
    assert_eq!(client.receive().await, pubrec(1));
    assert_eq!(other.bounds().end, Offset(1));
    host.stop().await;
}

#[tokio::test]
async fn a_publish_that_waits_for_a_release_ends_with_the_stream() {
    let (one, other) = (MemoryStream::with_hooks("one", 1), MemoryStream::with_hooks("other", 1));
    let host = routed(&one, &other, &MemoryStream::new("broker", 1)).await;
    let mut client = host.client(resuming("c")).await.0;
    client.send(qos2("one/a", "1", 1, false)).await;
    assert_eq!(client.receive().await, pubrec(1));
    one.hold_commits();
    client.send(qos2("b", "2", 1, false)).await;
    client.nothing_but_ping().await;
    one.fail("the disk is gone");
    assert_eq!(client.disconnected().await, Reason::ServerShuttingDown);
    assert_eq!(other.bounds().end, Offset(0));
    host.stop().await;
}

#[tokio::test]
async fn a_move_to_another_stream_frees_its_place_of_receive_maximum() {
    let (one, other) = (MemoryStream::with_hooks("one", 1), MemoryStream::with_hooks("other", 1));
    let host = routed(&one, &other, &MemoryStream::new("broker", 1)).await;
    let mut client = host.client(resuming("c")).await.0;
    for _ in 0..usize::from(Config::default().receive_maximum) {
        for topic in ["one/a", "b"] {
            client.send(qos2(topic, "1", 1, false)).await;
            assert_eq!(client.receive().await, pubrec(1));
        }
    }
    host.stop().await;
}

#[tokio::test]
async fn a_packet_id_with_records_in_two_streams_is_not_open_after_a_start() {
    let (one, other) = (MemoryStream::with_hooks("one", 1), MemoryStream::with_hooks("other", 1));
    let store = MemoryStream::new("broker", 1);
    let host = routed(&one, &other, &store).await;
    let mut client = host.client(resuming("c")).await.0;
    client.send(qos2("one/state", "on", 1, false)).await;
    assert_eq!(client.receive().await, pubrec(1));
    drop(client);
    host.stop().await;
    // As where the folder of one stream is older than that of the other.
    let [(key, value)] = &one.state(b"q2")[..] else { panic!("one record") };
    other.append(&[], &[StateChange { key, value: Some(value) }]).unwrap();
    let host = routed(&one, &other, &store).await;
    assert_eq!(lengths([&one, &other]), [(1, 0), (0, 0)]);
    let mut client = host.client(resuming("c")).await.0;
    client.send(qos2("one/state", "on", 1, false)).await;
    assert_eq!(client.receive().await, pubrec(1));
    assert_eq!(lengths([&one, &other]), [(2, 1), (0, 0)]);
    host.stop().await;
}
