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
    assert_eq!(
        subscriber.subscribe("$share/g/a", QOS1).await,
        SubscribeAckReason::SharedSubscriptionNotSupported
    );
    assert_eq!(subscriber.subscribe("a/#/b", QOS1).await, SubscribeAckReason::TopicFilterInvalid);
    assert_eq!(
        subscriber.subscribe("$SYS/broker/clients/connected", QOS1).await,
        SubscribeAckReason::GrantedQos1
    );
    assert_eq!(&subscriber.received().await.payload[..], b"2");
    let _third = host.clean("x").await;
    assert_eq!(&subscriber.received().await.payload[..], b"3");
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
