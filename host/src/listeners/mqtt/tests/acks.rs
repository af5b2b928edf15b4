//! An ack means durable, also where a stream has no room or stops.

use super::*;
use crate::batch::flags;

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
    let session = host.handle.clients().0.sessions.get("c").unwrap();
    while !session.is_wanted() {
        tokio::task::yield_now().await;
    }
    // The session is not handed on before the removal is durable.
    host.clean("other").await.nothing_but_ping().await;
    assert!(session.is_wanted());
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

#[tokio::test]
async fn an_open_packet_id_with_another_message_that_is_no_duplicate_is_a_new_message() {
    let (stream, store) = (MemoryStream::new("s", 1), MemoryStream::new("broker", 1));
    let sent = |payload: &'static str, dup| Publish {
        payload: payload.into(),
        dup,
        ..publish("a/b", QoS::ExactlyOnce, 1)
    };
    let start = || Host::start(Streams::new(vec![], stream.clone()), store.clone(), |_| {});
    let mut host = start().await;
    let expected = [
        ("1", false, 1),
        // Its store is lost: a message that it sends again would say so, or be the same.
        ("2", false, 2),
        ("2", false, 2),
        ("3", true, 2),
        ("3", false, 3),
    ];
    for (n, (payload, dup, messages)) in expected.into_iter().enumerate() {
        if n % 2 == 1 {
            // Known after a restart too.
            host.stop().await;
            host = start().await;
        }
        let mut client = host.client(resuming("c")).await.0;
        client.send(sent(payload, dup)).await;
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
