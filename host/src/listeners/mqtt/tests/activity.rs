//! What is counted for each client.

use super::*;

async fn leave(mut client: Client) {
    client.send(Disconnect { reason_code: Reason::NormalDisconnection, ..Disconnect::default() }).await;
    assert_eq!(client.try_receive().await, None);
}

#[tokio::test]
async fn each_client_shows_what_it_published_what_it_got_and_what_it_missed() {
    let change = |config: &mut Config| {
        config.queue_messages_max = 2;
        config.subscriptions_per_client_max = 1;
    };
    let streams = Streams::new(vec![], MemoryStream::new("s", 1));
    let host = Host::start(streams, MemoryStream::new("broker", 1), change).await;
    let (mut subscriber, _) = host.client(resuming("subscriber")).await;
    assert_eq!(subscriber.subscribe("t", QOS1).await, SubscribeAckReason::GrantedQos1);
    assert_eq!(subscriber.subscribe("u", QOS1).await, SubscribeAckReason::QuotaExceeded);
    let mut publisher = host.clean("publisher").await;
    publisher.send(publish("t", QoS::AtLeastOnce, 1)).await;
    assert_eq!(publisher.receive().await, puback(1));
    let first = subscriber.received().await;
    subscriber.send(puback(first.packet_id.unwrap().get())).await;
    leave(subscriber).await;
    for packet_id in 2..=6 {
        publisher.send(publish("t", QoS::AtLeastOnce, packet_id)).await;
        assert_eq!(publisher.receive().await, puback(packet_id));
    }
    publisher.send(publish("$SYS/t", QoS::AtLeastOnce, 7)).await;
    assert_eq!(publisher.receive().await, Packet::PublishAck(not_allowed(7)));
    // Delivered behind all that went before.
    publisher.subscribe("marker", QOS1).await;
    publisher.send(publish("marker", QoS::AtMostOnce, 0)).await;
    publisher.received().await;

    let clients = host.handle.clients();
    let shown = |client_id: &str| clients.show(client_id).unwrap();
    let (from, to) = (shown("publisher"), shown("subscriber"));
    let expected =
        Counts { published: 7, published_bytes: 14, delivered: 1, refused_publishes: 1, ..Counts::default() };
    assert_eq!(from.counts, expected);
    let expected = Counts { delivered: 1, dropped: 3, refused_subscribes: 1, ..Counts::default() };
    assert_eq!(to.counts, expected);
    assert!(to.session_bytes > "t".len() && to.last_seen_us.unwrap() >= 1_000_000, "{to:?}");
    assert!(from.last_seen_us.unwrap() >= to.last_seen_us.unwrap());

    let first = |order| clients.list("", "", 1, order).1.remove(0).client_id;
    for (order, expected) in [
        (ClientOrder::Id, "publisher"),
        (ClientOrder::Published, "publisher"),
        (ClientOrder::Queued, "subscriber"),
        (ClientOrder::Missed, "subscriber"),
    ] {
        assert_eq!(first(order), expected, "{order:?}");
    }
    assert_eq!(clients.list("", "", 1, ClientOrder::Missed).0, 2, "found, though one is listed");
    host.stop().await;
}

#[tokio::test]
async fn a_resumed_session_counts_on_and_a_clean_start_begins_anew() {
    let host = Host::with(MemoryStream::new("s", 1)).await;
    let published = |host: &Host| host.handle.clients().show("c").unwrap().counts.published;
    for (connect, expected) in [(resuming("c"), 1), (resuming("c"), 2), (clean("c"), 1)] {
        let (mut client, _) = host.client(connect).await;
        client.send(publish("t", QoS::AtLeastOnce, 1)).await;
        assert_eq!(client.receive().await, puback(1));
        assert_eq!(published(&host), expected);
        leave(client).await;
    }
    host.stop().await;
}
