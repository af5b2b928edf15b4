//! What a session keeps over connections and restarts.

use super::*;

#[tokio::test]
async fn a_qos_2_message_is_appended_once_over_reconnect_and_restart() {
    let stream = MemoryStream::with_manual_commit("s", 1);
    let broker = MemoryStream::new("broker", 1);
    let streams = || Streams::new(vec![], stream.clone() as Arc<dyn Stream>);
    let host = Host::start(streams(), broker.clone(), |_| {}).await;
    let (mut client, ack) = host.client(resuming("c")).await;
    assert!(!ack.session_present);
    client.send(publish("t", QoS::ExactlyOnce, 7)).await;
    client.nothing_but_ping().await;
    // The connection is cut before PUBREC.
    drop(client);
    let (mut client, ack) = host.client(resuming("c")).await;
    assert!(ack.session_present);
    client.send(Publish { dup: true, ..publish("t", QoS::ExactlyOnce, 7) }).await;
    client.nothing_but_ping().await;
    stream.commit();
    assert_eq!(client.receive().await, pubrec(7));
    drop(client);
    host.stop().await;

    let host = Host::start(streams(), broker.clone(), |_| {}).await;
    let (mut client, ack) = host.client(resuming("c")).await;
    assert!(ack.session_present);
    client.send(publish("t", QoS::ExactlyOnce, 7)).await;
    assert_eq!(client.receive().await, pubrec(7));
    assert_eq!(stream.bounds().end, Offset(1));
    client.send(pubrel(7)).await;
    client.nothing_but_ping().await;
    stream.commit();
    assert_eq!(client.receive().await, pubcomp(7));
    client.send(pubrel(7)).await;
    let unknown = PublishAck2 {
        packet_id: id(7),
        reason_code: PublishAck2Reason::PacketIdNotFound,
        ..PublishAck2::default()
    };
    assert_eq!(client.receive().await, Packet::PublishComplete(unknown));
    // Released: the same id is a new message.
    client.send(publish("t", QoS::ExactlyOnce, 7)).await;
    client.nothing_but_ping().await;
    stream.commit();
    assert_eq!(client.receive().await, pubrec(7));
    assert_eq!(stream.bounds().end, Offset(2));
    // A clean start forgets it, here and after a restart.
    drop(client);
    let (client, ack) = host.client(clean("c")).await;
    assert!(!ack.session_present);
    drop(client);
    host.stop().await;
    stream.commit();
    assert_eq!(stream.state(b"q2").len() + broker.state(b"se").len(), 0);
}

#[tokio::test]
async fn a_session_and_its_subscriptions_survive_a_restart() {
    let (stream, broker) = (MemoryStream::new("s", 1), MemoryStream::new("broker", 1));
    let host = Host::start(Streams::new(vec![], stream.clone()), broker.clone(), |_| {}).await;
    let (mut client, _) = host.client(resuming("c")).await;
    assert_eq!(client.subscribe("a/#", QOS1).await, SubscribeAckReason::GrantedQos1);
    drop(client);
    host.stop().await;

    let host = Host::start(Streams::new(vec![], stream), broker, |_| {}).await;
    let mut publisher = host.clean("p").await;
    publisher.send(publish("a/b", QoS::AtLeastOnce, 1)).await;
    assert_eq!(publisher.receive().await, puback(1));
    let (mut client, ack) = host.client(resuming("c")).await;
    assert!(ack.session_present);
    let message = client.received().await;
    assert_eq!((&*message.topic, message.qos), ("a/b", QoS::AtLeastOnce));
    // Not acknowledged: it comes again, marked as a duplicate.
    drop(client);
    let (mut client, _) = host.client(resuming("c")).await;
    assert!(client.received().await.dup);
    host.stop().await;
}

#[tokio::test]
async fn a_second_connection_takes_the_session_over() {
    let host = Host::with(MemoryStream::new("s", 1)).await;
    let mut first = host.clean("c").await;
    let mut second = host.clean("c").await;
    assert_eq!(first.disconnected().await, Reason::SessionTakenOver);
    second.nothing_but_ping().await;
    host.stop().await;
}

#[tokio::test]
async fn a_packet_id_past_receive_maximum_is_not_remembered() {
    let stream = MemoryStream::new("s", 1);
    let streams = Streams::new(vec![], stream.clone());
    let change = |config: &mut Config| config.receive_maximum = 1;
    let host = Host::start(streams, MemoryStream::new("broker", 1), change).await;
    let (mut client, _) = host.client(resuming("c")).await;
    client.send(publish("t", QoS::ExactlyOnce, 1)).await;
    assert_eq!(client.receive().await, pubrec(1));
    client.send(publish("t", QoS::ExactlyOnce, 2)).await;
    assert_eq!(client.disconnected().await, Reason::ReceiveMaximumExceeded);
    let (mut client, ack) = host.client(resuming("c")).await;
    assert!(ack.session_present);
    client.send(publish("t", QoS::ExactlyOnce, 2)).await;
    assert_eq!(client.receive().await, pubrec(2));
    assert_eq!(stream.bounds().end, Offset(2), "sent again, it is appended");
    host.stop().await;
}

#[tokio::test]
async fn a_clean_start_given_up_before_it_is_durable_still_ends_the_old_session() {
    use futures_util::FutureExt;
    for swept in [true, false] {
        let store = MemoryStream::with_hooks("broker", 1);
        let deps = Deps {
            streams: Streams::new(vec![], MemoryStream::new("s", 1)),
            broker: store.clone(),
            namespace: Arc::default(),
            failures: Failures::default(),
            shutdown: CancellationToken::new(),
        };
        let access = Access::open(None, &Default::default(), &deps.failures).unwrap();
        let broker = Broker::new(&Config::default(), access, deps);
        let sessions = &broker.sessions;
        let (session, turn) = sessions.claim("c", 1).await.unwrap();
        assert_eq!(sessions.open(&broker, &session, false, 600).await, Ok(false));
        sessions.close(&broker, &session, turn, None);
        assert_eq!(store.state(b"se").len(), 1);

        let (session, turn) = sessions.claim("c", 1).await.unwrap();
        store.set_no_space(true);
        assert_eq!(sessions.open(&broker, &session, true, 0).now_or_never(), None, "it waits for room");
        store.set_no_space(false);
        drop(turn);
        if swept {
            sessions.sweep(&broker);
        } else {
            let (session, _turn) = sessions.claim("c", 1).await.unwrap();
            assert_eq!(sessions.open(&broker, &session, true, 0).await, Ok(false));
        }
        assert_eq!(store.state(b"se").len(), 0, "swept: {swept}");
    }
}
