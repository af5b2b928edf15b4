//! A SUBSCRIBE or UNSUBSCRIBE of a persistent session is answered once it is durable. While the
//! broker's stream has no room that may take long: everything else of the connection goes on.

use super::*;

/// A host whose broker stream is `store`, the first client of the test, and the stream of messages.
async fn start(store: &Arc<MemoryStream>, connect: Connect) -> (Host, Client, Arc<MemoryStream>) {
    let stream = MemoryStream::with_hooks("s", 1);
    let host = Host::start(Streams::new(vec![], stream.clone()), store.clone(), |_| {}).await;
    let client = host.client(connect).await.0;
    (host, client, stream)
}

fn subscribe(filter: &'static str) -> Packet {
    let topic_filters = vec![(filter.into(), QOS1)];
    Subscribe { packet_id: id(9), id: None, user_properties: vec![], topic_filters }.into()
}

fn unsubscribe(filter: &'static str) -> Packet {
    Unsubscribe { packet_id: id(8), user_properties: vec![], topic_filters: vec![filter.into()] }.into()
}

fn goodbye() -> Packet {
    Disconnect { reason_code: Reason::NormalDisconnection, ..Disconnect::default() }.into()
}

impl Client {
    async fn granted(&mut self) {
        match self.receive().await {
            Packet::SubscribeAck(ack) => assert_eq!(ack.status, [SubscribeAckReason::GrantedQos1]),
            other => panic!("{other:?}"),
        }
    }

    async fn unsubscribed(&mut self) -> Vec<UnsubscribeAckReason> {
        match self.receive().await {
            Packet::UnsubscribeAck(ack) => ack.status,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn without_room_for_a_subscription_its_connection_goes_on_and_what_is_behind_it_keeps_its_order() {
    let store = MemoryStream::with_hooks("broker", 1);
    let (host, mut client, _) = start(&store, resuming("c")).await;
    assert_eq!(client.subscribe("old", QOS1).await, SubscribeAckReason::GrantedQos1);
    store.set_no_space(true);
    client.send_all([subscribe("new"), publish("x", QoS::AtLeastOnce, 1).into()]).await;
    client.nothing_but_ping().await;
    let mut other = host.clean("other").await;
    other.send(publish("old", QoS::AtLeastOnce, 1)).await;
    assert_eq!(other.receive().await, puback(1));
    assert_eq!(client.received().await.topic, "old", "deliveries go on");
    client.send(unsubscribe("old")).await;
    client.nothing_but_ping().await;
    assert_eq!(store.state(b"sf").len(), 1);

    store.set_no_space(false);
    client.granted().await;
    assert_eq!(client.receive().await, puback(1));
    assert_eq!(client.unsubscribed().await, [UnsubscribeAckReason::Success]);
    let kept = store.state(b"sf");
    assert!(kept.len() == 1 && kept[0].0.ends_with(b"new"), "{kept:?}");
    host.stop().await;
}

#[tokio::test]
async fn a_connection_whose_subscription_finds_no_room_ends_for_whoever_wants_it_to() {
    let store = MemoryStream::with_hooks("broker", 1);
    let (host, mut first, _) = start(&store, resuming("c")).await;
    store.set_no_space(true);
    first.send(subscribe("a")).await;
    first.nothing_but_ping().await;
    assert!(timeout(HUNG_AFTER, host.handle.clients().kick("c")).await.expect("it ends"));
    assert!(host.handle.clients().show("c").unwrap().connection.is_none());
    assert_eq!(first.disconnected().await, Reason::AdministrativeAction);

    store.set_no_space(false);
    let (mut second, ack) = host.client(resuming("c")).await;
    assert!(ack.session_present);
    store.set_no_space(true);
    second.send(subscribe("b")).await;
    second.nothing_but_ping().await;
    let mut third = Client::open(&host).await;
    third.send(resuming("c")).await;
    assert_eq!(second.disconnected().await, Reason::SessionTakenOver);
    store.set_no_space(false);
    assert!(matches!(third.receive().await, Packet::ConnectAck(ack) if ack.session_present));

    store.set_no_space(true);
    third.send(subscribe("c")).await;
    third.nothing_but_ping().await;
    host.stop().await;
    assert_eq!(third.disconnected().await, Reason::ServerShuttingDown);
}

#[tokio::test]
async fn a_client_that_falls_silent_while_its_subscription_finds_no_room_is_held_to_its_keep_alive() {
    let store = MemoryStream::with_hooks("broker", 1);
    let (host, mut client, _) = start(&store, Connect { keep_alive: 1, ..resuming("c") }).await;
    store.set_no_space(true);
    client.send(subscribe("a")).await;
    assert_eq!(client.disconnected().await, Reason::KeepAliveTimeout);
    host.stop().await;
}

#[tokio::test]
async fn an_unsubscribe_that_was_not_answered_is_durable_once_the_client_repeats_it() {
    let store = MemoryStream::with_hooks("broker", 1);
    let (host, mut client, _) = start(&store, resuming("c")).await;
    assert_eq!(client.subscribe("a", QOS1).await, SubscribeAckReason::GrantedQos1);
    store.set_no_space(true);
    client.send(unsubscribe("a")).await;
    client.nothing_but_ping().await;
    assert!(timeout(HUNG_AFTER, host.handle.clients().kick("c")).await.expect("it ends"));
    store.set_no_space(false);

    let (mut client, ack) = host.client(resuming("c")).await;
    assert!(ack.session_present);
    client.send(unsubscribe("a")).await;
    assert_eq!(client.unsubscribed().await, [UnsubscribeAckReason::NoSubscriptionExisted]);
    assert_eq!(store.state(b"sf"), []);
    host.stop().await;
}

#[tokio::test]
async fn a_client_that_says_goodbye_behind_a_subscribe_leaves_no_will() {
    let store = MemoryStream::with_hooks("broker", 1);
    let connect = || Connect { last_will: Some(last_will("will")), ..resuming("c") };
    let (host, mut client, stream) = start(&store, connect()).await;
    store.set_no_space(true);
    client.send_all([subscribe("a"), publish("x", QoS::AtMostOnce, 0).into(), goodbye()]).await;
    drop(client);
    // Its connection sees the end before another one answers.
    host.clean("other").await.nothing_but_ping().await;
    store.set_no_space(false);
    let (_client, ack) = host.client(Connect { last_will: None, ..connect() }).await;
    assert!(ack.session_present);
    let topics: Vec<_> = match stream.bounds().end {
        Offset(0) => Vec::new(),
        _ => batch(&*stream, 0).await.messages().map(|message| message.topic().to_owned()).collect(),
    };
    assert!(!topics.contains(&"will".to_owned()), "{topics:?}");
    assert_eq!(stream.state(b"wi"), []);
    host.stop().await;
}

#[tokio::test]
async fn what_a_client_sent_behind_a_subscribe_before_it_left_is_taken_in() {
    let store = MemoryStream::with_manual_commit("broker", 1);
    let stream = MemoryStream::with_hooks("s", 1);
    let host = Host::start(Streams::new(vec![], stream.clone()), store.clone(), |_| {}).await;
    let mut client = Client::open(&host).await;
    client.send(resuming("c")).await;
    store.awaited().await;
    store.commit();
    assert!(matches!(client.receive().await, Packet::ConnectAck(_)));
    client.send_all([subscribe("a"), publish("x", QoS::AtMostOnce, 0).into()]).await;
    store.awaited().await;
    drop(client);
    // Its connection sees the end before another one answers.
    host.clean("other").await.nothing_but_ping().await;
    store.commit();
    assert_eq!(batch(&*stream, 0).await.message(0).topic(), "x");
    host.stop().await;
}

#[tokio::test]
async fn deliveries_go_on_past_the_clients_window_while_its_subscription_finds_no_room() {
    let store = MemoryStream::with_hooks("broker", 1);
    let window = Connect { receive_max: Some(id(1)), ..resuming("c") };
    let (host, mut client, _) = start(&store, window).await;
    assert_eq!(client.subscribe("old", QOS1).await, SubscribeAckReason::GrantedQos1);
    store.set_no_space(true);
    client.send(subscribe("new")).await;
    client.nothing_but_ping().await;
    let mut other = host.clean("other").await;
    for number in 1..=3 {
        other.send(publish("old", QoS::AtLeastOnce, number)).await;
        assert_eq!(other.receive().await, puback(number));
        let packet_id = client.received().await.packet_id.unwrap();
        client.send(puback(packet_id.get())).await;
    }
    store.set_no_space(false);
    client.granted().await;
    client.nothing_but_ping().await;
    host.stop().await;
}

#[tokio::test]
async fn what_a_client_acknowledged_behind_a_subscribe_does_not_come_again() {
    let store = MemoryStream::with_hooks("broker", 1);
    let (host, mut client, _) = start(&store, resuming("c")).await;
    assert_eq!(client.subscribe("old", QOS1).await, SubscribeAckReason::GrantedQos1);
    for is_goodbye_said in [true, false] {
        let mut other = host.clean("other").await;
        other.send(publish("old", QoS::AtLeastOnce, 1)).await;
        let packet_id = client.received().await.packet_id.unwrap().get();
        store.set_no_space(true);
        let mut sent = vec![subscribe("new"), puback(packet_id)];
        sent.extend(is_goodbye_said.then(goodbye));
        client.send_all(sent).await;
        drop(client);
        // Its connection sees the end before another one answers.
        host.clean("third").await.nothing_but_ping().await;
        store.set_no_space(false);
        let ack;
        (client, ack) = host.client(resuming("c")).await;
        assert!(ack.session_present);
        client.nothing_but_ping().await;
    }
    host.stop().await;
}
