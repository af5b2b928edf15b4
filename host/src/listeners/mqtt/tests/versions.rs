//! What clients of each version and kind do: MQTT 3.1, bridges, topics that begin with `$`.

use super::*;
use crate::units::Period;

async fn host_of(stream: &Arc<MemoryStream>) -> Host {
    Host::with(stream.clone()).await
}

/// Sends bytes, and reads as many as are expected.
async fn exchange(client: &mut Client, sent: &[u8], expected: &[u8]) {
    client.io.write_all(sent).await.unwrap();
    let mut answer = vec![0; expected.len()];
    timeout(HUNG_AFTER, client.io.read_exact(&mut answer)).await.unwrap().unwrap();
    assert_eq!(answer, expected, "to {}", sent.escape_ascii());
}

/// CONNECT without its header: name and level, flags, then the fields.
fn connect(protocol: &[u8], flags: u8, fields: &[&[u8]]) -> Vec<u8> {
    let mut body = [protocol, &[flags, 0, 0]].concat();
    for field in fields {
        body.extend((field.len() as u16).to_be_bytes());
        body.extend_from_slice(field);
    }
    [&[0x10, body.len() as u8], &body[..]].concat()
}

const V31: &[u8] = b"\0\x06MQIsdp\x03";
const V311: &[u8] = b"\0\x04MQTT\x04";

#[tokio::test]
async fn mqtt_3_1_sends_again_with_dup_what_3_1_1_does_not() {
    let host = host_of(&MemoryStream::with_hooks("s", 1)).await;
    let again: [(&[u8], &[u8]); 3] = [
        (b"\x8a\x06\0\x01\0\x01a\x01", b"\x90\x03\0\x01\x01"),
        (b"\x6a\x02\0\x07", b"\x70\x02\0\x07"),
        (b"\xaa\x05\0\x02\0\x01a", b"\xb0\x02\0\x02"),
    ];
    let mut client = Client::open(&host).await;
    exchange(&mut client, &connect(V31, 2, &[b"old"]), b"\x20\x02\0\0").await;
    exchange(&mut client, b"\x34\x07\0\x01x\0\x0721", b"\x50\x02\0\x07").await;
    for (sent, expected) in again {
        exchange(&mut client, sent, expected).await;
    }
    for (sent, _) in again {
        let mut client = Client::open(&host).await;
        exchange(&mut client, &connect(V311, 2, &[b"new"]), b"\x20\x02\0\0").await;
        client.io.write_all(sent).await.unwrap();
        let mut answer = Vec::new();
        timeout(HUNG_AFTER, client.io.read_to_end(&mut answer)).await.unwrap().unwrap();
        assert!(answer.is_empty(), "{answer:?}");
    }
    host.stop().await;
}

#[tokio::test]
async fn mqtt_3_1_may_leave_out_the_user_name_and_password_that_it_announces() {
    let host = host_of(&MemoryStream::with_hooks("s", 1)).await;
    let announced: [(u8, &[&[u8]]); 3] = [(0x82, &[b"c"]), (0xc2, &[b"c"]), (0xc2, &[b"c", b"ann"])];
    for (flags, fields) in announced {
        let mut client = Client::open(&host).await;
        exchange(&mut client, &connect(V31, flags, fields), b"\x20\x02\0\0").await;
        let mut client = Client::open(&host).await;
        client.io.write_all(&connect(V311, flags, fields)).await.unwrap();
        assert_eq!(client.io.read(&mut [0; 4]).await.unwrap(), 0, "closed without an answer");
    }
    host.stop().await;
}

#[tokio::test]
async fn a_bridge_of_mosquitto_is_let_in_and_does_not_hear_itself() {
    let stream = MemoryStream::with_hooks("s", 1);
    let host = host_of(&stream).await;
    let mut watcher = host.clean("watcher").await;
    watcher.subscribe("#", SubscriptionOptions { retain_as_published: true, ..QOS1 }).await;
    let will: [&[u8]; 3] = [b"bridge", b"$SYS/broker/connection/gw/state", b"0"];
    for protocol in [&b"\0\x04MQTT\x84"[..], b"\0\x06MQIsdp\x83"] {
        let mut bridge = Client::open(&host).await;
        // Its will is at QoS 1, retained.
        exchange(&mut bridge, &connect(protocol, 0x2e, &will), b"\x20\x02\0\0").await;
        exchange(&mut bridge, b"\x82\x06\0\x01\0\x01#\x00", b"\x90\x03\0\x01\0").await;
        exchange(&mut bridge, b"\x32\x07\0\x01x\0\x0121", b"\x40\x02\0\x01").await;
        watcher.received().await;
        watcher.send(Publish { retain: true, ..publish("y", QoS::AtMostOnce, 0) }).await;
        watcher.received().await;
        // Only what another published, and retained as it was published.
        exchange(&mut bridge, b"", b"\x31\x05\0\x01y21").await;
        watcher.send(Publish { payload: "".into(), retain: true, ..publish("y", QoS::AtMostOnce, 0) }).await;
        watcher.received().await;
    }
    // MQTT 5 has options for it, and the same will.
    let last_will = Some(last_will("$SYS/broker/connection/gw/state"));
    let (lost, ack) = host.client(Connect { last_will, ..clean("bridge-5") }).await;
    assert_eq!(ack.reason_code, ConnectAckReason::Success);
    drop(lost);
    watcher.nothing_but_ping().await;
    assert_eq!(stream.state(b"wi").len(), 0, "no will is kept");
    host.stop().await;
}

#[tokio::test]
async fn topics_that_begin_with_a_dollar_are_a_tree_of_their_own() {
    let stream = MemoryStream::with_hooks("s", 1);
    let host = host_of(&stream).await;
    let mut wide = host.clean("wide").await;
    for filter in ["#", "+/things/+"] {
        wide.subscribe(filter, QOS1).await;
    }
    let mut narrow = host.clean("narrow").await;
    narrow.subscribe("$aws/things/#", QOS1).await;
    let mut publisher = host.clean("p").await;
    for (topic, packet_id) in [("$aws/things/1", 1), ("$dps", 2), ("$", 3), ("$SYSTEM/x", 4)] {
        publisher.send(Publish { retain: true, ..publish(topic, QoS::AtLeastOnce, packet_id) }).await;
        assert_eq!(publisher.receive().await, puback(packet_id));
    }
    assert_eq!(&*narrow.received().await.topic, "$aws/things/1");
    narrow.nothing_but_ping().await;
    wide.nothing_but_ping().await;
    for (filter, topic) in [("$aws/+/1", "$aws/things/1"), ("$SYSTEM/#", "$SYSTEM/x"), ("$", "$")] {
        publisher.subscribe(filter, QOS1).await;
        assert_eq!(&*publisher.received().await.topic, topic);
    }
    // The broker's own.
    for (topic, packet_id) in [("$SYS", 5), ("$SYS/x", 6), ("$share/g/x", 7), ("$share", 8)] {
        publisher.send(publish(topic, QoS::AtLeastOnce, packet_id)).await;
        assert!(
            matches!(publisher.receive().await, Packet::PublishAck(ack)
            if ack.reason_code == PublishAckReason::NotAuthorized),
            "{topic}"
        );
    }
    assert_eq!(stream.bounds().end, Offset(4));
    host.stop().await;
}

#[tokio::test]
async fn a_client_that_would_be_silent_for_longer_is_told_the_longest_keep_alive() {
    let streams = Streams::new(vec![], MemoryStream::new("s", 1));
    let host = Host::start(streams, MemoryStream::new("broker", 1), |config| {
        config.keep_alive_max = Some(Period(Duration::from_secs(1)));
    })
    .await;
    // Held to its own, which is none.
    let mut old = Client::open(&host).await;
    exchange(&mut old, &connect(V311, 2, &[b"old"]), b"\x20\x02\0\0").await;
    for (keep_alive, told) in [(1, None), (0, Some(1)), (60, Some(1))] {
        let (mut client, ack) = host.client(Connect { keep_alive, ..clean("c") }).await;
        assert_eq!(ack.server_keepalive_sec, told);
        if keep_alive != 1 {
            assert_eq!(client.disconnected().await, Reason::KeepAliveTimeout);
        }
    }
    exchange(&mut old, b"\xc0\0", b"\xd0\0").await;
    host.stop().await;
}

#[tokio::test]
async fn a_client_is_told_why_as_far_as_it_wants_to_know() {
    let host = host_of(&MemoryStream::with_hooks("s", 1)).await;
    let bad = Connect { client_id: "x".repeat(513).into(), ..clean("") };
    let (_, ack) = host.client(bad.clone()).await;
    assert_eq!(ack.reason_string.as_deref(), Some("a client id of more than 512 bytes"));
    let small = |size| Connect { max_packet_size: std::num::NonZeroU32::new(size), ..clean("c") };
    let (_, ack) = host.client(Connect { max_packet_size: small(40).max_packet_size, ..bad }).await;
    assert_eq!((ack.reason_code, ack.reason_string), (ConnectAckReason::ClientIdentifierNotValid, None));
    for (connect, acks_say, disconnect_says) in [
        (clean("c"), true, true),
        (Connect { request_problem_info: false, ..clean("c") }, false, true),
        (small(255), false, false),
    ] {
        let (mut client, _) = host.client(connect).await;
        client.send(publish("$SYS/x", QoS::AtLeastOnce, 1)).await;
        let Packet::PublishAck(ack) = client.receive().await else { panic!("no PUBACK") };
        assert_eq!(ack.reason_string.is_some(), acks_say);
        let topic_filters = vec![("a".into(), QOS1), ("a/#/b".into(), QOS1)];
        client.send(Subscribe { packet_id: id(2), id: None, user_properties: vec![], topic_filters }).await;
        let Packet::SubscribeAck(ack) = client.receive().await else { panic!("no SUBACK") };
        assert_eq!((ack.status.len(), ack.reason_string.is_some()), (2, acks_say));
        client.send(clean("c")).await;
        let Packet::Disconnect(disconnect) = client.receive().await else { panic!("no DISCONNECT") };
        assert_eq!(disconnect.reason_string.is_some(), disconnect_says);
    }
    host.stop().await;
}

#[tokio::test]
async fn a_client_that_goes_on_sending_can_read_why_its_connection_ends() {
    let host = host_of(&MemoryStream::with_hooks("s", 1)).await;
    for (connected, ends_it) in
        [(true, clean("c")), (false, Connect { auth_method: Some("X".into()), ..clean("r") })]
    {
        let mut client = if connected { host.clean("c").await } else { Client::open(&host).await };
        // The publish lies in the host's socket when it closes its side.
        client.send_all([ends_it.into(), publish("t", QoS::AtMostOnce, 0).into()]).await;
        assert!(matches!(client.receive().await, Packet::Disconnect(_) | Packet::ConnectAck(_)));
        assert_eq!(client.try_receive().await, None);
        // A reset would come between two of these, on this machine.
        for _ in 0..3 {
            client.io.write_all(b"still sending").await.expect("no reset");
        }
    }
    host.stop().await;
}

#[tokio::test]
async fn nobody_sends_a_large_packet_before_it_is_known() {
    let host = host_of(&MemoryStream::with_hooks("s", 1)).await;
    let mut client = Client::open(&host).await;
    // A CONNECT of 64 KiB and one byte, of which only the beginning is sent.
    client.io.write_all(&[0x10, 0x81, 0x80, 0x04, 0, 4, b'M', b'Q', b'T', b'T', 5]).await.unwrap();
    assert_eq!(client.try_receive().await, None);
    host.stop().await;
}
