//! An ack means durable, also where a stream has no room or stops.

use super::*;

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
async fn a_refused_publish_is_answered_in_its_turn() {
    let stream = MemoryStream::with_manual_commit("s", 1);
    let host = Host::with(stream.clone()).await;
    let mut client = host.clean("c").await;
    for (topic, packet_id) in [("a", 1), ("$own", 2), ("a", 3)] {
        client.send(publish(topic, QoS::AtLeastOnce, packet_id)).await;
    }
    client.nothing_but_ping().await;
    stream.commit();
    let refused = PublishAck { reason_code: PublishAckReason::NotAuthorized, ..success(2) };
    for expected in [puback(1), Packet::PublishAck(refused), puback(3)] {
        assert_eq!(client.receive().await, expected);
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
