//! What a session keeps over connections and restarts.

use futures_util::FutureExt;

use super::*;
use crate::batch::Partition;
use crate::listeners::mqtt::fanout::Wakes;
use crate::stream::{NewMessage, StateChange};

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

/// Each thread takes the locks that [`lock_order`](super::lock_order) lists, which panics where one
/// of them takes two in the wrong order.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn sessions_begin_and_end_while_others_are_swept_listed_and_deleted() {
    const ROUNDS: usize = 1_000;
    async fn connect(broker: Arc<Broker>, client_id: String) {
        for round in 0..ROUNDS {
            let (session, turn) = broker.sessions.claim(&client_id, 9).await.unwrap();
            let expiry_s = [0, 600, 600, 1][round % 4];
            let owner = Default::default();
            broker.sessions.open(&broker, &session, owner, round % 4 < 2, expiry_s).await.unwrap();
            // One that has expired, and one that waits.
            let ended_us = if expiry_s == 1 { 1 } else { broker.clock.now_us() };
            broker.sessions.close(&broker, &session, turn, None, ended_us).await;
        }
    }
    async fn look(broker: Arc<Broker>) {
        let clients = Clients(broker.clone());
        for _ in 0..ROUNDS {
            broker.sessions.sweep(&broker).await;
            clients.list("", "", 9, ClientOrder::Queued);
            clients.measure();
            assert!(!clients.kick("c0").await, "nobody is connected");
            clients.delete("c1").await;
        }
    }
    let broker = broker(&Config::default(), MemoryStream::new("s", 1), MemoryStream::new("broker", 1));
    let connects = (0..3).map(|number| tokio::spawn(connect(broker.clone(), format!("c{number}"))));
    let all = connects.chain([tokio::spawn(look(broker.clone()))]).collect::<Vec<_>>();
    for done in all {
        done.await.unwrap();
    }
    assert_eq!(broker.sessions.len(), broker.sessions.all().len());
}

#[tokio::test]
async fn a_session_that_disconnect_lengthened_on_a_full_disk_survives_a_restart() {
    let (stream, store) = (MemoryStream::new("s", 1), MemoryStream::with_hooks("broker", 1));
    let start = || broker(&Config::default(), stream.clone(), store.clone());
    // What comes before the restart, and the expiry that the session then has.
    type Before = (fn(&Broker), u32);
    let befores: [Before; 3] = [
        (|broker| broker.sessions.sweep(broker).now_or_never().unwrap(), 600),
        (|broker| broker.sessions.note_all(broker), 600),
        // The next connection decides.
        (
            |broker| {
                let (session, _turn) = broker.sessions.claim("c", 9).now_or_never().flatten().unwrap();
                let opened = broker.sessions.open(broker, &session, Default::default(), false, 5);
                assert_eq!(opened.now_or_never(), Some(Ok(true)));
                broker.sessions.sweep(broker).now_or_never().unwrap();
            },
            5,
        ),
    ];
    for (before, expiry_s) in befores {
        let broker = start();
        let (session, turn) = broker.sessions.claim("c", 9).await.unwrap();
        broker.sessions.open(&broker, &session, Default::default(), true, 60).await.unwrap();
        store.set_no_space(true);
        broker.sessions.close(&broker, &session, turn, Some(600), broker.clock.now_us()).await;
        store.set_no_space(false);
        before(&broker);
        assert_eq!(start().sessions.get("c").unwrap().expiry_s(), expiry_s);
    }
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
    for swept in [true, false] {
        let store = MemoryStream::with_hooks("broker", 1);
        let broker = broker(&Config::default(), MemoryStream::new("s", 1), store.clone());
        let sessions = &broker.sessions;
        let (session, turn) = sessions.claim("c", 1).await.unwrap();
        assert_eq!(sessions.open(&broker, &session, Default::default(), false, 600).await, Ok(false));
        sessions.close(&broker, &session, turn, None, broker.clock.now_us()).await;
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
            sessions.sweep(&broker).await;
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
async fn a_session_gets_each_message_of_a_stream_that_lost_its_end_and_grew_past_the_sessions_note() {
    let (stream, broker) = (MemoryStream::with_hooks("s", 1), MemoryStream::with_hooks("broker", 1));
    let first = host(&stream, &broker, |_| {}).await;
    let (mut client, _) = first.client(resuming("c")).await;
    client.subscribe("a", QOS1).await;
    client.send(Disconnect { reason_code: Reason::NormalDisconnection, ..Disconnect::default() }).await;
    assert_eq!(client.try_receive().await, None);
    publish_numbers(&first, "a", 0..5).await;
    first.stop().await;

    let shortened = stream.copied(Offset(2));
    let second = host(&shortened, &broker, |_| {}).await;
    let kinds = [b"qr", b"os", b"oi"];
    let notes: Vec<_> = kinds.iter().flat_map(|kind| broker.state(*kind)).collect();
    publish_numbers(&second, "a", 10..18).await;
    second.stop().await;
    // As a crash would leave it: the notes of the start, and a stream that is longer than they were.
    let notes = notes.iter().map(|(key, value)| StateChange { key, value: Some(value) });
    broker.append(&[], &notes.collect::<Vec<_>>()).unwrap();

    let third = host(&shortened.copied(Offset(10)), &broker, |_| {}).await;
    let (mut client, ack) = third.client(resuming("c")).await;
    assert!(ack.session_present);
    assert_eq!(client.numbers(10).await, [0, 1, 10, 11, 12, 13, 14, 15, 16, 17]);
    client.nothing_but_ping().await;
    third.stop().await;
}

/// What the host of a full disk could not write anew is compared once more.
#[tokio::test]
async fn a_session_skips_nothing_though_its_note_could_not_be_written_anew() {
    let (stream, broker) = (MemoryStream::with_hooks("s", 1), MemoryStream::with_hooks("broker", 1));
    let first = host(&stream, &broker, |_| {}).await;
    let (mut client, _) = first.client(resuming("c")).await;
    client.subscribe("a", QOS1).await;
    publish_numbers(&first, "a", 0..5).await;
    assert_eq!(client.numbers(5).await, [0, 1, 2, 3, 4]);
    client.send(Disconnect { reason_code: Reason::NormalDisconnection, ..Disconnect::default() }).await;
    assert_eq!(client.try_receive().await, None);
    first.stop().await;

    let shortened = stream.copied(Offset(2));
    broker.set_no_space(true);
    let second = host(&shortened, &broker, |_| {}).await;
    publish_numbers(&second, "a", 10..14).await;
    second.stop().await;
    broker.set_no_space(false);
    let third = host(&shortened.copied(Offset(6)), &broker, |_| {}).await;
    let (mut client, _) = third.client(resuming("c")).await;
    assert_eq!(client.numbers(4).await, [10, 11, 12, 13]);
    client.nothing_but_ping().await;
    third.stop().await;
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
    sessions.sweep(&broker).await;
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
    assert_eq!(
        broker.live.deliver_some(&broker, 0, 0, &batch(&*stream, first.0).await, 0, &mut Wakes::new(&broker)),
        1
    );
    let waiting = |client_id| sessions.get(client_id).unwrap().outbox().sizes().0;
    assert_eq!((waiting("stays"), waiting("waits")), (1, 1));
}

#[tokio::test]
async fn a_restart_counts_the_subscriptions_of_a_session_once() {
    let (stream, broker) = (MemoryStream::with_hooks("s", 1), MemoryStream::with_hooks("broker", 1));
    let limits = |config: &mut Config| {
        config.subscriptions_per_client_max = 3;
        config.subscription_bytes_per_client_max = ByteSize(6);
    };
    let mut seen = Vec::new();
    for _ in 0..3 {
        let host = host(&stream, &broker, limits).await;
        let (mut client, _) = host.client(resuming("c")).await;
        for filter in ["a/#", "a/+", "a/#"] {
            assert_eq!(client.subscribe(filter, QOS1).await, SubscribeAckReason::GrantedQos1);
        }
        assert_eq!(client.subscribe("b", QOS1).await, SubscribeAckReason::QuotaExceeded, "bytes");
        let shown = host.handle.clients().show("c").unwrap();
        seen.push((shown.subscriptions, shown.filters));
        host.stop().await;
    }
    assert_eq!(seen, vec![(2, vec!["a/#".to_owned(), "a/+".to_owned()]); 3]);
    let host = host(&stream, &broker, |config| config.subscriptions_per_client_max = 3).await;
    let (mut client, _) = host.client(resuming("c")).await;
    assert_eq!(client.subscribe("b", QOS1).await, SubscribeAckReason::GrantedQos1, "the third");
    assert_eq!(client.subscribe("c", QOS1).await, SubscribeAckReason::QuotaExceeded);
    host.stop().await;
}

impl Client {
    /// Finishes each QoS 2 message before the next; their topics.
    async fn finished(&mut self, count: usize) -> Vec<String> {
        let mut topics = Vec::new();
        while topics.len() < count {
            let publish = self.received().await;
            let packet_id = publish.packet_id.unwrap().get();
            topics.push(publish.topic.to_string());
            self.send(pubrec(packet_id)).await;
            assert_eq!(self.receive().await, pubrel(packet_id));
            self.send(pubcomp(packet_id)).await;
        }
        topics
    }
}

/// Retained messages beyond all bounds of its queue reach a new subscriber, each once,
/// though it leaves meanwhile and the host ends.
#[tokio::test]
async fn retained_messages_reach_a_new_subscriber_over_reconnect_and_restart() {
    let (stream, broker) = (MemoryStream::with_hooks("s", 1), MemoryStream::with_hooks("broker", 1));
    let small =
        |config: &mut Config| (config.queue_messages_max, config.queue_bytes_max) = (3, ByteSize::kib(1));
    let first = host(&stream, &broker, small).await;
    let mut publisher = first.clean("publisher").await;
    let long: &'static str = "x".repeat(crate::topic::TOPIC_BYTES_MAX - 2).leak();
    let mut topics: Vec<String> = (0..300).map(|n| format!("r/{n:03}")).collect();
    topics.push(format!("r/{long}"));
    for topic in &topics {
        let topic = topic.clone().into();
        publisher.send(Publish { retain: true, topic, ..publish("r", QoS::ExactlyOnce, 1) }).await;
        assert_eq!(publisher.receive().await, pubrec(1));
        publisher.send(pubrel(1)).await;
        assert_eq!(publisher.receive().await, pubcomp(1));
    }
    let connect = || Connect { receive_max: Some(id(1)), ..resuming("c") };
    let (mut client, _) = first.client(connect()).await;
    let qos2 = SubscriptionOptions { qos: QoS::ExactlyOnce, ..QOS1 };
    client.subscribe("r/+", qos2).await;
    let mut given = client.finished(100).await;
    let (mut client, _) = first.client(connect()).await;
    given.extend(client.finished(100).await);
    // One is on its way as the host ends.
    let begun = client.received().await;
    first.stop().await;

    let second = host(&stream, &broker, small).await;
    let (mut client, _) = second.client(connect()).await;
    given.extend(client.finished(101).await);
    client.nothing_but_ping().await;
    assert!(given.contains(&begun.topic.to_string()));
    given.sort();
    assert_eq!(given, topics);
    assert!(broker.state(b"sf").iter().all(|(_, value)| value.len() == 5), "nothing is left to be given");
    // A subscriber with a queue as small, that asks for less.
    let mut other = second.clean("other").await;
    for options in [QOS1, SubscriptionOptions { qos: QoS::AtMostOnce, ..QOS1 }] {
        other.subscribe("r/#", options).await;
        let mut given = Vec::new();
        for _ in &topics {
            let publish = other.received().await;
            if let Some(id) = publish.packet_id {
                other.send(puback(id.get())).await;
            }
            given.push(publish.topic.to_string());
        }
        given.sort();
        assert_eq!(given, topics);
    }
    other.nothing_but_ping().await;
    second.stop().await;
}

/// What replaces a retained message comes after it, and comes once.
#[tokio::test]
async fn a_retained_message_that_is_replaced_while_it_waits_comes_live() {
    let (stream, broker) = (MemoryStream::with_hooks("s", 1), MemoryStream::with_hooks("broker", 1));
    let host = host(&stream, &broker, |_| {}).await;
    let mut publisher = host.clean("publisher").await;
    let mut publish_all = async |payload: &'static str| {
        for topic in ["r/0", "r/1", "r/2", "r/3"] {
            let message =
                Publish { retain: true, payload: payload.into(), ..publish(topic, QoS::AtLeastOnce, 1) };
            publisher.send(message).await;
            assert_eq!(publisher.receive().await, puback(1));
        }
    };
    publish_all("old").await;
    let (mut client, _) = host.client(Connect { receive_max: Some(id(1)), ..clean("c") }).await;
    client.subscribe("r/#", QOS1).await;
    let mut got = vec![client.received().await];
    publish_all("new").await;
    while got.iter().filter(|it| it.payload == "new").count() < 4 {
        let id = got.last().and_then(|it| it.packet_id).unwrap();
        client.send(puback(id.get())).await;
        got.push(client.received().await);
    }
    for topic in ["r/0", "r/1", "r/2", "r/3"] {
        let of: Vec<_> =
            got.iter().filter(|it| &*it.topic == topic).map(|it| (&it.payload[..], it.retain)).collect();
        let new = (&b"new"[..], false);
        assert!(of == [new] || of == [(&b"old"[..], true), new], "{topic}: {of:?}");
    }
    host.stop().await;
}

#[tokio::test]
async fn identifiers_are_found_again_for_what_waited_for_a_client_that_was_away() {
    let (stream, broker) = (MemoryStream::with_hooks("s", 1), MemoryStream::with_hooks("broker", 1));
    let ids = async |host: &Host| {
        let (mut client, _) = host.client(resuming("c")).await;
        let publish = client.received().await;
        let mut ids: Vec<_> =
            publish.properties.unwrap().subscription_ids.iter().map(|id| id.get()).collect();
        ids.sort_unstable();
        ids
    };
    let first = host(&stream, &broker, |_| {}).await;
    let (mut client, _) = first.client(resuming("c")).await;
    for (number, filter) in [(1, "a/+"), (2, "b"), (3, "a/#")] {
        let topic_filters = vec![(filter.into(), QOS1)];
        let id_ = std::num::NonZeroU32::new(number);
        client.send(Subscribe { packet_id: id(9), id: id_, user_properties: vec![], topic_filters }).await;
        assert!(matches!(client.receive().await, Packet::SubscribeAck(_)));
    }
    client.send(Disconnect { reason_code: Reason::NormalDisconnection, ..Disconnect::default() }).await;
    assert_eq!(client.try_receive().await, None);
    publish_numbers(&first, "a/x", 0..1).await;
    assert_eq!(ids(&first).await, [1, 3]);
    first.stop().await;
    let second = host(&stream, &broker, |_| {}).await;
    assert_eq!(ids(&second).await, [1, 3], "not acknowledged, after a restart");
    second.stop().await;
}

#[tokio::test]
async fn a_jump_of_the_clock_ends_no_session_and_nothing_that_waits() {
    use crate::listeners::mqtt::clock::tests::{Hands, NOW};
    use crate::listeners::mqtt::fuzzing::broker_at;
    let hour = 3_600_000_000_u64;
    for jump in [26 * 365 * 24 * hour as i64, -(10 * 365 * 24 * hour as i64)] {
        let (stream, store) = (MemoryStream::new("s", 1), MemoryStream::new("broker", 1));
        let hands = Hands::at(NOW);
        let config = Config::default();
        let broker = broker_at(&config, stream.clone(), store.clone(), hands.source());
        let sessions = &broker.sessions;
        let (session, turn) = sessions.claim("c", 9).await.unwrap();
        sessions.open(&broker, &session, Default::default(), true, 600).await.unwrap();
        let filter = subscriptions::Filter::parse("a").unwrap();
        let options = subscriptions::Options { qos: 1, ..Default::default() };
        let retained = fanout::SendRetained::Never;
        broker.live.subscribe(&broker, &session, &[Subscription { filter, options, retained }]);
        sessions.close(&broker, &session, turn, None, broker.clock.now_us()).await;
        let mut expires_in_10_minutes = Vec::new();
        properties::push(&mut expires_in_10_minutes, Origin::Listener, "expiry-s", b"600");
        let wall = || (hands.source())().0;
        let publish = async || {
            let message = NewMessage {
                topic: "a",
                payload: b"x",
                properties: &expires_in_10_minutes,
                route: "",
                device: "d",
                partition: Partition(0),
                flags: 1,
                received_us: wall(),
                event_us: 0,
            };
            let first = stream.append(&[message], &[]).unwrap().first;
            assert_eq!(
                broker.live.deliver_some(
                    &broker,
                    0,
                    0,
                    &batch(&*stream, first.0).await,
                    0,
                    &mut Wakes::new(&broker)
                ),
                1
            );
        };
        publish().await;
        hands.pass(hour / 12);
        hands.jump(jump);
        publish().await;
        sessions.sweep(&broker).await;
        let left = |broker: &Broker| broker.sessions.get("c").map(|session| session.outbox().sizes().0);
        assert_eq!(left(&broker), Some(2));
        let old = outbound::Message::of(batch(&*stream, 0).await.message(0));
        assert_eq!(old.lifetime(&broker.clock), Some(Some(300)), "of the 600 s, 300 have passed");
        sessions.note_all(&broker);
        let again = broker_at(&config, stream.clone(), store.clone(), hands.source());
        assert_eq!(left(&again), Some(2));
        hands.pass(hour / 12 + 1);
        assert_eq!(old.lifetime(&broker.clock), None, "and then it ends");
        hands.pass(hour / 12);
        again.sessions.sweep(&again).await;
        assert_eq!(left(&again), None, "600 s without its client");
    }
}

/// One client has much to catch up with after a restart; nobody else waits for it.
#[tokio::test]
async fn what_waits_for_one_client_after_a_restart_delays_nobody_elses_messages() {
    let (stream, broker) = (MemoryStream::with_hooks("s", 1), MemoryStream::with_hooks("broker", 1));
    let first = host(&stream, &broker, |_| {}).await;
    let (mut client, _) = first.client(resuming("far")).await;
    client.subscribe("a/#", QOS1).await;
    client.subscribe("$share/g/s", QOS1).await;
    let notes = broker.state(outbound::NOTE);
    publish_numbers(&first, "a/1", 0..3).await;
    first.stop().await;
    // As after a crash: what was noted since is lost.
    for (key, value) in &notes {
        broker.append(&[], &[StateChange { key, value: Some(value) }]).unwrap();
    }
    let broker = fuzzing::broker(&Config::default(), stream.clone(), broker.clone());
    let far = broker.sessions.get("far").unwrap();
    let (near, _turn) = broker.sessions.claim("near", 9).await.unwrap();
    broker.sessions.open(&broker, &near, Default::default(), true, 0).await.unwrap();
    near.outbox().resume();
    let subscribe = |filter| {
        let filter = subscriptions::Filter::parse(filter).unwrap();
        let options = subscriptions::Options { qos: 1, ..Default::default() };
        let retained = fanout::SendRetained::Never;
        broker.live.subscribe(&broker, &near, &[Subscription { filter, options, retained }]);
    };
    subscribe("a/2");
    let append = |topic| {
        let message = NewMessage {
            topic,
            payload: b"7",
            properties: &[],
            route: "",
            device: "d",
            partition: Partition(0),
            flags: 1,
            received_us: now_us(),
            event_us: 0,
        };
        stream.append(&[message], &[]).unwrap().first
    };
    let places = |session: &session::Session| {
        let mut offsets = Vec::new();
        session.outbox().references(|place, _| offsets.push(place.offset));
        offsets
    };
    // Only the live delivery runs.
    let live = append("a/2");
    let shared = append("s");
    for offset in [live, shared] {
        broker.live.deliver_some(
            &broker,
            0,
            0,
            &batch(&*stream, offset.0).await,
            0,
            &mut Wakes::new(&broker),
        );
    }
    assert_eq!(near.outbox().sizes().0, 1);
    assert_eq!(places(&far), [shared.0], "the only member of its share; the rest in its order");
    assert_eq!(broker.live.positions_of(&broker, &far)[0], 0);
    fanout::catch_up(broker.clone(), 0).await;
    assert_eq!(places(&far), [shared.0, 0, 1, 2, live.0], "each once");
    let next = append("a/3");
    broker.live.deliver_some(&broker, 0, 0, &batch(&*stream, next.0).await, 0, &mut Wakes::new(&broker));
    assert_eq!(places(&far).last(), Some(&next.0), "it belongs to the live delivery");
    assert_eq!(places(&far).len(), 6);
}

#[tokio::test]
async fn a_session_that_is_deleted_is_gone_with_all_that_it_left_connected_or_not() {
    let (stream, broker) = (MemoryStream::with_hooks("s", 1), MemoryStream::with_hooks("broker", 1));
    let host = host(&stream, &broker, |_| {}).await;
    for is_there in [false, true] {
        let (mut client, _) = host.client(resuming("c")).await;
        client.subscribe("a", QOS1).await;
        if !is_there {
            let bye = Disconnect { reason_code: Reason::NormalDisconnection, ..Disconnect::default() };
            client.send(bye).await;
            assert_eq!(client.try_receive().await, None);
        }
        publish_numbers(&host, "a", 0..2).await;
        assert!(host.handle.clients().delete("c").await);
        if is_there {
            assert_eq!(client.disconnected().await, Reason::AdministrativeAction);
        }
        assert!(!host.handle.clients().delete("c").await, "it is gone");
        let kinds = [&b"se"[..], b"sf", outbound::NOTE];
        assert!(kinds.iter().all(|kind| broker.state(kind).is_empty()));
        let (_, ack) = host.client(resuming("c")).await;
        assert!(!ack.session_present);
        assert!(host.handle.clients().delete("c").await);
    }
    host.stop().await;
}
