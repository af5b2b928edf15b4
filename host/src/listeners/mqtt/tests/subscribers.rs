//! What subscribers get.

use super::*;

#[tokio::test]
async fn subscribers_get_what_matches_and_what_was_retained() {
    let host = Host::with(MemoryStream::new("s", 1)).await;
    let mut publisher = host.clean("p").await;
    publisher.send(Publish { retain: true, ..publish("a/kept", QoS::AtLeastOnce, 1) }).await;
    assert_eq!(publisher.receive().await, puback(1));
    let mut subscriber = host.clean("s").await;
    assert_eq!(subscriber.subscribe("a/+", QOS1).await, SubscribeAckReason::GrantedQos1);
    let kept = subscriber.received().await;
    assert_eq!((&*kept.topic, kept.retain), ("a/kept", true));
    for (i, topic) in ["b", "a/live", "a/b/c"].into_iter().enumerate() {
        publisher.send(publish(topic, QoS::ExactlyOnce, i as u16 + 2)).await;
    }
    let live = subscriber.received().await;
    assert_eq!(
        (&*live.topic, live.retain, live.qos, &live.payload[..]),
        ("a/live", false, QoS::AtLeastOnce, &b"21"[..])
    );
    subscriber.nothing_but_ping().await;
    assert_eq!(subscriber.subscribe("$share/g", QOS1).await, SubscribeAckReason::TopicFilterInvalid);
    assert_eq!(subscriber.subscribe("a/#/b", QOS1).await, SubscribeAckReason::TopicFilterInvalid);
    host.stop().await;
}

#[tokio::test]
async fn a_client_that_asks_for_no_local_does_not_hear_itself() {
    let host = Host::with(MemoryStream::new("s", 1)).await;
    let mut one = host.clean("one").await;
    let mut two = host.clean("two").await;
    one.subscribe("#", SubscriptionOptions { no_local: true, ..QOS1 }).await;
    one.send(publish("own", QoS::AtMostOnce, 0)).await;
    one.nothing_but_ping().await;
    two.send(publish("other", QoS::AtMostOnce, 0)).await;
    assert_eq!(&*one.received().await.topic, "other");
    host.stop().await;
}

/// A bridge of Mosquitto that has come back throws away what it is sent over its `max_inflight_messages`.
#[tokio::test]
async fn a_client_without_a_receive_maximum_is_sent_a_few_messages_at_a_time() {
    assert_eq!(Config::default().outbound_inflight_max, 20);
    let streams = Streams::new(vec![], MemoryStream::new("s", 1));
    let change = |config: &mut Config| config.outbound_inflight_max = 2;
    let host = Host::start(streams, MemoryStream::new("broker", 1), change).await;
    let mut few = host.clean("few").await;
    let (mut more, _) = host.client(Connect { receive_max: Some(id(3)), ..clean("more") }).await;
    few.subscribe("t", QOS1).await;
    more.subscribe("t", QOS1).await;
    let mut publisher = host.clean("p").await;
    for packet_id in 1..=4 {
        publisher.send(publish("t", QoS::AtLeastOnce, packet_id)).await;
        assert_eq!(publisher.receive().await, puback(packet_id));
    }
    for (client, window) in [(&mut few, 2), (&mut more, 3)] {
        let mut ids = Vec::new();
        for _ in 0..window {
            ids.extend(client.received().await.packet_id);
        }
        client.nothing_but_ping().await;
        client.send(puback(ids[0].get())).await;
        client.received().await;
        client.nothing_but_ping().await;
    }
    host.stop().await;
}

#[tokio::test]
async fn a_slow_subscriber_is_bounded_and_disconnected() {
    let streams = Streams::new(vec![], MemoryStream::new("s", 1));
    let host = Host::start(streams, MemoryStream::new("broker", 1), |c| c.queue_messages_max = 10).await;
    let (mut slow, _) = host.client(Connect { receive_max: Some(id(1)), ..clean("slow") }).await;
    slow.subscribe("#", QOS1).await;
    let mut publisher = host.clean("p").await;
    for packet_id in 1..=12 {
        publisher.send(publish("t", QoS::AtLeastOnce, packet_id)).await;
        assert_eq!(publisher.receive().await, puback(packet_id));
    }
    assert_eq!(slow.disconnected().await, Reason::QuotaExceeded);
    publisher.nothing_but_ping().await;
    host.stop().await;
}

#[tokio::test]
async fn each_message_goes_to_one_member_of_a_share_in_turn_and_to_everyone_else() {
    let host = Host::with(MemoryStream::new("s", 1)).await;
    let (mut one, mut two, mut all) =
        (host.clean("one").await, host.clean("two").await, host.clean("all").await);
    assert_eq!(one.subscribe("$share/g/a/+", QOS1).await, SubscribeAckReason::GrantedQos1);
    let qos0 = SubscriptionOptions { qos: QoS::AtMostOnce, ..QOS1 };
    assert_eq!(two.subscribe("$share/g/a/+", qos0).await, SubscribeAckReason::GrantedQos0);
    all.subscribe("a/#", QOS1).await;
    let mut publisher = host.clean("p").await;
    for (i, topic) in ["a/1", "a/2", "a/3", "a/4"].into_iter().enumerate() {
        publisher.send(publish(topic, QoS::AtLeastOnce, i as u16 + 1)).await;
    }
    let every = &["a/1", "a/2", "a/3", "a/4"][..];
    for (client, topics, qos) in [
        (&mut one, &["a/1", "a/3"][..], QoS::AtLeastOnce),
        (&mut two, &["a/2", "a/4"], QoS::AtMostOnce),
        (&mut all, every, QoS::AtLeastOnce),
    ] {
        for topic in topics {
            let received = client.received().await;
            assert_eq!((&*received.topic, received.qos), (*topic, qos));
        }
        client.nothing_but_ping().await;
    }
    host.stop().await;
}

#[tokio::test]
async fn what_a_member_of_a_share_held_goes_to_another_when_it_leaves() {
    let host = Host::with(MemoryStream::new("s", 1)).await;
    let (mut gone, _) = host.client(Connect { receive_max: Some(id(1)), ..clean("gone") }).await;
    gone.subscribe("$share/g/#", QOS1).await;
    let mut publisher = host.clean("p").await;
    for (i, topic) in ["a/1", "a/2", "a/3"].into_iter().enumerate() {
        publisher.send(publish(topic, QoS::AtLeastOnce, i as u16 + 1)).await;
        assert_eq!(publisher.receive().await, puback(i as u16 + 1));
    }
    // One it was sent and did not acknowledge, two wait for its window.
    assert_eq!(&*gone.received().await.topic, "a/1");
    let mut other = host.clean("other").await;
    other.subscribe("$share/g/#", QOS1).await;
    drop(gone);
    let mut topics = Vec::new();
    for _ in 0..3 {
        topics.push(other.received().await.topic.to_string());
    }
    topics.sort();
    assert_eq!(topics, ["a/1", "a/2", "a/3"]);
    host.stop().await;
}

#[tokio::test]
async fn no_local_on_a_shared_subscription_is_a_protocol_error() {
    let host = Host::with(MemoryStream::new("s", 1)).await;
    let mut client = host.clean("c").await;
    let topic_filters = vec![("$share/g/a".into(), SubscriptionOptions { no_local: true, ..QOS1 })];
    client.send(Subscribe { packet_id: id(9), id: None, user_properties: vec![], topic_filters }).await;
    assert_eq!(client.disconnected().await, Reason::ProtocolError);
    host.stop().await;
}

/// Publishes a retained message with this topic.
async fn retain(client: &mut Client, topic: &'static str) {
    client.send(Publish { retain: true, ..publish(topic, QoS::AtLeastOnce, 1) }).await;
    assert_eq!(client.receive().await, puback(1));
}

#[tokio::test]
async fn no_local_keeps_a_clients_own_retained_messages_from_it_also_after_a_restart() {
    let no_local = SubscriptionOptions { no_local: true, ..QOS1 };
    let (stream, broker) = (MemoryStream::with_hooks("s", 1), MemoryStream::with_hooks("broker", 1));
    let start = || {
        let streams = Streams::new(vec![], stream.clone() as Arc<dyn Stream>);
        Host::start(streams, broker.clone(), |_| {})
    };
    let first = start().await;
    let (mut own, mut other) = (first.clean("own").await, first.clean("other").await);
    retain(&mut own, "r/own").await;
    retain(&mut other, "r/other").await;
    // What the other one publishes last is the topic's.
    retain(&mut own, "r/replaced").await;
    retain(&mut other, "r/replaced").await;
    let (mut will, _) = first
        .client(Connect {
            last_will: Some(LastWill { retain: true, ..last_will("r/will") }),
            ..clean("own-will")
        })
        .await;
    will.send(Disconnect { reason_code: Reason::DisconnectWithWillMessage, ..Disconnect::default() }).await;
    let mut watcher = first.clean("watcher").await;
    watcher.subscribe("r/will", QOS1).await;
    assert_eq!(&*watcher.received().await.topic, "r/will");
    drop((own, other, will));
    let mut host = first;
    for _ in 0..2 {
        for (client_id, own_topic) in [("own", "r/own"), ("own-will", "r/will"), ("another", "")] {
            let mut client = host.clean(client_id).await;
            client.subscribe("r/#", no_local).await;
            let all = ["r/other", "r/own", "r/replaced", "r/will"];
            let wanted: Vec<&str> = all.into_iter().filter(|topic| *topic != own_topic).collect();
            let mut topics = Vec::new();
            for _ in &wanted {
                topics.push(client.received().await.topic.to_string());
            }
            topics.sort();
            assert_eq!(topics, wanted, "{client_id}");
            client.nothing_but_ping().await;
        }
        host.stop().await;
        host = start().await;
    }
    let mut own = host.clean("own").await;
    own.subscribe("r/own", QOS1).await;
    assert_eq!(&*own.received().await.topic, "r/own", "without No Local it has its own, too");
    host.stop().await;
}
