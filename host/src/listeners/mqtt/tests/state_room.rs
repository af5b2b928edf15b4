//! Durable state is bounded: who finds no room for more of it waits, or is
//! refused, and nobody else notices.

use futures_util::FutureExt;

use super::*;
use crate::listeners::mqtt::open_ids::OPEN_IDS_MAX;
use crate::listeners::mqtt::owner::Owner;

const FIRST_NEW_ID: u16 = OPEN_IDS_MAX as u16 + 1;

/// Opens all the QoS 2 packet ids that there are, from 1 on.
async fn open_all(client: &mut Client) {
    let ids = 1..FIRST_NEW_ID;
    client.send_all(ids.clone().map(|id| publish("a/b", QoS::ExactlyOnce, id).into())).await;
    for id in ids {
        assert_eq!(client.receive().await, pubrec(id));
    }
}

fn open_ids(stream: &dyn Stream) -> usize {
    stream.state(b"q2").len()
}

#[tokio::test]
async fn a_qos_2_publish_without_room_for_its_id_waits_on_its_own_connection_until_others_release_theirs() {
    let stream = MemoryStream::new("s", 1);
    let host = Host::with(stream.clone()).await;
    let mut holder = host.client(resuming("holder")).await.0;
    open_all(&mut holder).await;
    let mut waiting = host.client(resuming("waiting")).await.0;
    waiting.send(publish("a/b", QoS::ExactlyOnce, 1)).await;
    assert_eq!(waiting.receive().await, pubrec(1), "who has none open always gets one");
    waiting
        .send_all([publish("a/b", QoS::ExactlyOnce, 2).into(), publish("a/b", QoS::AtLeastOnce, 3).into()])
        .await;
    waiting.nothing_but_ping().await;
    assert_eq!(open_ids(&*stream), OPEN_IDS_MAX + 1);

    let mut other = host.clean("other").await;
    for qos in [QoS::AtMostOnce, QoS::AtLeastOnce] {
        other.send(publish("a/b", qos, if qos == QoS::AtMostOnce { 0 } else { 7 })).await;
    }
    assert_eq!(other.receive().await, puback(7));
    holder.send(publish("a/b", QoS::ExactlyOnce, 1)).await;
    assert_eq!(holder.receive().await, pubrec(1), "one that is open already takes no room");

    for id in [1, 2] {
        holder.send(pubrel(id)).await;
        assert_eq!(holder.receive().await, pubcomp(id));
    }
    assert_eq!(waiting.receive().await, pubrec(2));
    assert_eq!(waiting.receive().await, puback(3));
    host.stop().await;
}

#[tokio::test]
async fn the_pubrels_behind_a_publish_that_waits_make_room_for_it_and_count_once() {
    let stream = MemoryStream::new("s", 1);
    let host = Host::with(stream.clone()).await;
    let mut client = host.client(resuming("c")).await.0;
    open_all(&mut client).await;
    let (new, newer) = (FIRST_NEW_ID, FIRST_NEW_ID + 1);
    let publish = |id| Packet::from(publish("a/b", QoS::ExactlyOnce, id));
    client.send_all([publish(new), pubrel(1), publish(newer), pubrel(2)]).await;
    let mut answers = Vec::new();
    for _ in 0..4 {
        answers.push(client.receive().await);
    }
    for answer in [pubcomp(1), pubcomp(2), pubrec(new), pubrec(newer)] {
        assert!(answers.contains(&answer), "{answer:?} is not among {answers:?}");
    }
    client.nothing_but_ping().await;
    assert_eq!(open_ids(&*stream), OPEN_IDS_MAX);
    host.stop().await;
}

#[tokio::test]
async fn without_room_for_its_record_a_new_session_or_subscription_is_refused_and_known_ones_go_on() {
    let broker = MemoryStream::with_hooks("broker", 1);
    let streams = Streams::new(vec![], MemoryStream::new("s", 1));
    let host = Host::start(streams, broker.clone(), |_| {}).await;
    let mut known = host.client(resuming("known")).await.0;
    let (granted, full) = (SubscribeAckReason::GrantedQos1, SubscribeAckReason::QuotaExceeded);
    assert_eq!(known.subscribe("a/b", QOS1).await, granted);
    broker.set_state_room(STATE_ROOM_BYTES - 1);

    assert_eq!(host.client(resuming("new")).await.1.reason_code, ConnectAckReason::QuotaExceeded);
    let mut old = Client::open(&host).await;
    old.io.write_all(b"\x10\x0d\x00\x04MQTT\x04\x00\x00\x00\x00\x01o").await.unwrap();
    let mut answer = Vec::new();
    old.io.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, b"\x20\x02\x00\x03");
    assert_eq!(known.subscribe("c/d", QOS1).await, full);
    assert_eq!(known.subscribe("a/b", QOS1).await, granted);
    drop(known);
    let (mut known, ack) = host.client(resuming("known")).await;
    assert!(ack.session_present);
    known.nothing_but_ping().await;
    // What ends with its connection needs no room.
    assert_eq!(host.clean("brief").await.subscribe("c/d", QOS1).await, granted);

    broker.set_state_room(STATE_ROOM_BYTES);
    assert_eq!(known.subscribe("c/d", QOS1).await, granted);
    host.stop().await;
}

#[tokio::test]
async fn the_second_half_of_the_state_is_for_clients_with_few_subscriptions() {
    let broker = MemoryStream::with_hooks("broker", 1);
    let streams = Streams::new(vec![], MemoryStream::new("s", 1));
    let host = Host::start(streams, broker.clone(), |_| {}).await;
    let (granted, full) = (SubscribeAckReason::GrantedQos1, SubscribeAckReason::QuotaExceeded);
    let filter = |n: usize| -> &'static str { format!("{n:01000}").leak() };
    let share = STATE_SHARE_BYTES / 1_000;
    let (mut large, mut small) =
        (host.client(resuming("large")).await.0, host.client(resuming("small")).await.0);
    for n in 0..=share {
        assert_eq!(large.subscribe(filter(n), QOS1).await, granted);
    }
    broker.set_state_room(STATE_BYTES_MAX / 2 - 1);
    assert_eq!(large.subscribe("d", QOS1).await, full);
    for n in 0..=share {
        assert_eq!(small.subscribe(filter(n), QOS1).await, if n < share { granted } else { full });
    }
    assert_eq!(host.client(resuming("new")).await.0.subscribe("d", QOS1).await, granted);
    host.stop().await;
}

/// The default `sessions_max`, with ids and four filters of 64 bytes each, and notes as
/// long as they may be.
#[tokio::test]
async fn as_many_persistent_sessions_as_the_default_allows_fit_in_the_state() {
    let (stream, broker) = (MemoryStream::with_hooks("s", 1), MemoryStream::with_hooks("broker", 1));
    let host = Host::start(Streams::new(vec![], stream.clone()), broker.clone(), |_| {}).await;
    let name = |n: usize| -> &'static str { format!("{n:064}").leak() };
    let (mut client, _) = host.client(resuming(name(0))).await;
    for n in 0..4 {
        client.subscribe(name(n), QOS1).await;
    }
    // One more byte of each key says whose it is.
    let bytes: usize = [&b"se"[..], b"sf", outbound::NOTE]
        .iter()
        .flat_map(|kind| broker.state(kind))
        .map(|(key, value)| 1 + key.len() + value.len())
        .sum();
    let sessions = Config::default().sessions_max as usize;
    let all = sessions * (bytes + outbound::note_bytes_max(sessions));
    let most = STATE_BYTES_MAX - STATE_ROOM_BYTES;
    assert!(all <= most, "{bytes} bytes a session, {all} of {most}");
    host.stop().await;
}

#[tokio::test]
async fn connects_that_are_given_up_while_nothing_can_be_appended_leave_few_keys() {
    let store = MemoryStream::with_hooks("broker", 1);
    let broker = broker(&Config::default(), MemoryStream::new("s", 1), store.clone());
    let (session, _turn) = broker.sessions.claim("c", 9).await.unwrap();
    let open = || broker.sessions.open(&broker, &session, Owner::default(), true, 600);
    store.set_no_space(true);
    for _ in 0..1_000 {
        assert!(open().now_or_never().is_none(), "it waits for room");
    }
    assert!(session.stale_keys() < 300, "{}", session.stale_keys());
    store.set_no_space(false);
    open().await.unwrap();
    assert_eq!((session.stale_keys(), store.state(b"se").len(), store.state(b"qr").len()), (0, 1, 1));
}
