//! What a session keeps over connections and restarts.

use super::*;
use crate::batch::Partition;
use crate::stream::NewMessage;

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
async fn each_of_several_connections_that_wait_for_a_session_gets_its_turn() {
    use futures_util::FutureExt;
    let broker = broker(&Config::default(), MemoryStream::new("s", 1), MemoryStream::new("broker", 1));
    let claim = || Box::pin(broker.sessions.claim("c", 9));
    let (session, mut turn) = claim().await.unwrap();
    let mut waiting = [claim(), claim(), claim()];
    assert!(waiting.iter_mut().all(|claim| claim.now_or_never().is_none()));
    for claim in waiting {
        session.wake.notified().now_or_never().expect("who has it is told that it is wanted");
        drop(turn);
        turn = claim.now_or_never().flatten().expect("the next in turn").1;
    }
    drop(turn);
    assert!(!session.is_wanted());
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
        let broker = broker(&Config::default(), MemoryStream::new("s", 1), store.clone());
        let sessions = &broker.sessions;
        let (session, turn) = sessions.claim("c", 1).await.unwrap();
        assert_eq!(sessions.open(&broker, &session, Default::default(), false, 600).await, Ok(false));
        sessions.close(&broker, &session, turn, None);
        assert_eq!(store.state(b"se").len(), 1);

        let (session, turn) = sessions.claim("c", 1).await.unwrap();
        store.set_no_space(true);
        assert_eq!(
            sessions.open(&broker, &session, Default::default(), true, 0).now_or_never(),
            None,
            "it waits for room"
        );
        store.set_no_space(false);
        drop(turn);
        if swept {
            sessions.sweep(&broker);
        } else {
            let (session, _turn) = sessions.claim("c", 1).await.unwrap();
            assert_eq!(sessions.open(&broker, &session, Default::default(), true, 0).await, Ok(false));
        }
        assert_eq!(store.state(b"se").len(), 0, "swept: {swept}");
    }
}

/// A listener over `stream` whose sessions outlive it in `broker`.
pub(super) async fn host(
    stream: &Arc<MemoryStream>,
    broker: &Arc<MemoryStream>,
    change: impl FnOnce(&mut Config),
) -> Host {
    Host::start(Streams::new(vec![], stream.clone()), broker.clone(), change).await
}

pub(super) async fn publish_numbers(host: &Host, topic: &'static str, numbers: std::ops::Range<u16>) {
    let mut publisher = host.clean("publisher").await;
    for number in numbers {
        let payload = number.to_string().into();
        publisher.send(Publish { payload, ..publish(topic, QoS::AtLeastOnce, number + 1) }).await;
        assert_eq!(publisher.receive().await, puback(number + 1));
    }
}

impl Client {
    pub(super) async fn numbers(&mut self, count: usize) -> Vec<u16> {
        let mut numbers = Vec::new();
        for _ in 0..count {
            let publish = self.received().await;
            numbers.push(std::str::from_utf8(&publish.payload).unwrap().parse().unwrap());
            if let Some(id) = publish.packet_id {
                self.send(puback(id.get())).await;
            }
        }
        numbers
    }
}

#[tokio::test]
async fn a_client_that_was_away_gets_the_newest_that_its_queue_holds() {
    let (stream, broker) = (MemoryStream::with_hooks("s", 1), MemoryStream::with_hooks("broker", 1));
    for when_full in [outbound::WhenFull::DropOldest, outbound::WhenFull::Refuse] {
        let host = host(&stream, &broker, |config| {
            (config.queue_messages_max, config.queue_when_full) = (3, when_full);
        })
        .await;
        let (mut client, _) = host.client(resuming("c")).await;
        client.subscribe("a", QOS1).await;
        client.send(Disconnect { reason_code: Reason::NormalDisconnection, ..Disconnect::default() }).await;
        assert_eq!(client.try_receive().await, None);
        publish_numbers(&host, "a", 0..5).await;
        let (mut client, _) = host.client(resuming("c")).await;
        let expected = if when_full == outbound::WhenFull::DropOldest { [2, 3, 4] } else { [0, 1, 2] };
        assert_eq!(client.numbers(3).await, expected, "{when_full:?}");
        client.nothing_but_ping().await;
        host.stop().await;
    }
}

#[tokio::test]
async fn what_retention_took_before_its_subscriber_came_is_passed_over() {
    let (stream, broker) = (MemoryStream::with_hooks("s", 1), MemoryStream::with_hooks("broker", 1));
    let host = host(&stream, &broker, |_| {}).await;
    let (mut client, _) = host.client(resuming("c")).await;
    client.subscribe("a", QOS1).await;
    drop(client);
    // The session has seen its client go once a second connection has it.
    let (client, _) = host.client(resuming("c")).await;
    drop(client);
    let mut other = host.clean("other").await;
    other.subscribe("a", QOS1).await;
    publish_numbers(&host, "a", 0..5).await;
    // Delivered: what waits for the other one has been offered to it too.
    assert_eq!(other.numbers(5).await.len(), 5);
    stream.trim(Offset(3));
    let (mut client, _) = host.client(resuming("c")).await;
    assert_eq!(client.numbers(2).await, [3, 4]);
    client.nothing_but_ping().await;
    host.stop().await;
}

#[tokio::test]
async fn retained_messages_that_wait_survive_a_restart() {
    let (stream, broker) = (MemoryStream::with_hooks("s", 1), MemoryStream::with_hooks("broker", 1));
    let first = host(&stream, &broker, |_| {}).await;
    let mut publisher = first.clean("publisher").await;
    for (id, topic) in [(1, "r/1"), (2, "r/2")] {
        publisher.send(Publish { retain: true, ..publish(topic, QoS::AtLeastOnce, id) }).await;
        assert_eq!(publisher.receive().await, puback(id));
    }
    let (mut client, _) = first.client(Connect { receive_max: Some(id(1)), ..resuming("c") }).await;
    client.subscribe("r/+", QOS1).await;
    let one = client.received().await;
    assert!(one.retain);
    // Not acknowledged; the other was not sent. One of them is replaced meanwhile.
    first.stop().await;
    let second = host(&stream, &broker, |_| {}).await;
    let (mut client, _) = second.client(resuming("c")).await;
    let mut topics = [client.received().await, client.received().await].map(|it| (it.topic, it.retain));
    topics.sort();
    assert_eq!(topics, [("r/1".into(), true), ("r/2".into(), true)]);
    client.nothing_but_ping().await;
    second.stop().await;
}

#[tokio::test]
async fn a_new_subscriber_gets_nothing_of_the_past_while_old_sessions_catch_up() {
    let (stream, broker) = (MemoryStream::with_hooks("s", 1), MemoryStream::with_hooks("broker", 1));
    let first = host(&stream, &broker, |_| {}).await;
    let (mut client, _) = first.client(resuming("old")).await;
    client.subscribe("a", QOS1).await;
    let notes = broker.state(outbound::NOTE);
    publish_numbers(&first, "a", 0..3).await;
    assert_eq!(client.numbers(3).await, [0, 1, 2]);
    first.stop().await;
    // As after a crash: what was noted since is lost.
    for (key, value) in &notes {
        broker.append(&[], &[StateChange { key, value: Some(value) }]).unwrap();
    }
    let second = host(&stream, &broker, |_| {}).await;
    let mut new = second.clean("new").await;
    new.subscribe("a", QOS1).await;
    let (mut client, _) = second.client(resuming("old")).await;
    publish_numbers(&second, "a", 3..4).await;
    assert_eq!(new.numbers(1).await, [3], "what came after its SUBACK");
    assert_eq!(client.numbers(4).await, [0, 1, 2, 3]);
    second.stop().await;
}

#[tokio::test]
async fn a_session_that_ends_leaves_nothing_in_the_broker_stream() {
    let (stream, broker) = (MemoryStream::with_hooks("s", 1), MemoryStream::with_hooks("broker", 1));
    let host = host(&stream, &broker, |_| {}).await;
    let qos2 = SubscriptionOptions { qos: QoS::ExactlyOnce, ..QOS1 };
    let (mut client, _) = host.client(resuming("c")).await;
    client.subscribe("a", qos2).await;
    let mut publisher = host.clean("p").await;
    publisher.send(publish("a", QoS::ExactlyOnce, 1)).await;
    assert_eq!(publisher.receive().await, pubrec(1));
    client.received().await;
    let kinds = [outbound::NOTE, outbound::STEP, outbound::SENT];
    assert!(kinds.iter().all(|kind| !broker.state(kind).is_empty()));
    host.clean("c").await.nothing_but_ping().await;
    let left: Vec<_> = kinds.iter().flat_map(|kind| broker.state(kind)).collect();
    assert!(left.is_empty(), "{left:?}");
    host.stop().await;
}

#[tokio::test]
async fn the_sweep_ends_sessions_whose_time_is_over_with_all_that_they_left_and_no_others() {
    let (stream, store) = (MemoryStream::new("s", 1), MemoryStream::new("broker", 1));
    let host = Host::start(Streams::new(vec![], stream.clone()), store.clone(), |_| {}).await;
    let hour = 3_600_u64;
    // Client, the expiry it asks for, seconds away; it gets seven days at most.
    let clients = [
        ("over", 600, hour),
        ("waits", 600, 300),
        ("past the most", u32::MAX, 200 * hour),
        ("stays", u32::MAX, 100 * hour),
    ];
    for (client_id, session_expiry_interval_secs, _) in clients {
        let connect = Connect { session_expiry_interval_secs, ..resuming(client_id) };
        let (mut client, _) = host.client(connect).await;
        client.subscribe("a/#", QOS1).await;
        client.send(publish("b", QoS::ExactlyOnce, 7)).await;
        assert_eq!(client.receive().await, pubrec(7));
    }
    host.stop().await;
    for (client_id, _, away_s) in clients {
        let key = [b"se", client_id.as_bytes()].concat();
        // The record ends with when its client left.
        let (_, mut value) = store.state(&key).remove(0);
        let left_us = now_us() - away_s * 1_000_000;
        let at = value.len() - 8;
        value[at..].copy_from_slice(&left_us.to_be_bytes());
        append_unawaited(&*store, &[(key, Some(value))]);
    }

    let broker = broker(&Config::default(), stream.clone(), store.clone());
    let sessions = &broker.sessions;
    let (_connected, _turn) = sessions.claim("connected", 9).await.unwrap();
    assert_eq!(sessions.open(&broker, &_connected, Default::default(), true, 0).await, Ok(false));
    sessions.sweep(&broker);
    let mut left: Vec<_> = sessions.all().iter().map(|session| session.client_id.to_string()).collect();
    left.sort();
    assert_eq!(left, ["connected", "stays", "waits"]);
    let kept = [store.state(b"se"), store.state(b"sf"), stream.state(b"q2")].map(|keys| keys.len());
    assert_eq!(kept, [2, 2, 2]);
    let message = NewMessage {
        topic: "a/b",
        payload: b"x",
        properties: &[],
        route: "",
        device: "d",
        partition: Partition(0),
        flags: 1,
        received_us: now_us(),
        event_us: 0,
    };
    let first = stream.append(&[message], &[]).unwrap().first;
    assert_eq!(broker.live.deliver_some(&broker, 0, &batch(&*stream, first.0).await, 0), 1);
    let waiting = |client_id| sessions.get(client_id).unwrap().outbox().sizes().0;
    assert_eq!((waiting("stays"), waiting("waits")), (1, 1));
}
