//! What sessions wait for is copied before retention takes it from its stream.

use super::sessions::{host, publish_numbers};
use super::*;
use crate::batch::{Partition, flags};
use crate::stream::{NewMessage, StateChange};

/// Of a stream, how far the copies say that it may go.
fn reached(stream: &MemoryStream) -> Offset {
    stream.marks()[READER].0
}

fn waiting(host: &Host, client_id: &str) -> usize {
    host.handle.clients().show(client_id).unwrap().queued
}

/// Appended by somebody else, `waited` ago.
fn append(stream: &MemoryStream, payloads: &[&str], properties: &[u8], waited: Duration) {
    let received_us = now_us() - waited.as_micros() as u64;
    let messages: Vec<NewMessage<'_>> = payloads
        .iter()
        .map(|payload| NewMessage {
            topic: "a",
            payload: payload.as_bytes(),
            properties,
            route: "",
            device: "",
            partition: Partition(0),
            flags: 1 & flags::QOS_MASK,
            received_us,
            event_us: 0,
        })
        .collect();
    stream.append(&messages, &[]).unwrap();
}

/// A session that is away, for which five messages wait.
async fn away(host: &Host, qos: QoS) {
    let (mut client, _) = host.client(resuming("c")).await;
    client.subscribe("a", SubscriptionOptions { qos, ..QOS1 }).await;
    client.send(Disconnect { reason_code: Reason::NormalDisconnection, ..Disconnect::default() }).await;
    assert_eq!(client.try_receive().await, None);
    publish_numbers(host, "a", 0..5).await;
}

#[tokio::test]
async fn what_waits_is_copied_before_retention_takes_it_and_once_for_all_sessions() {
    let (stream, broker) = (MemoryStream::with_hooks("s", 1), MemoryStream::with_hooks("broker", 1));
    let host = host(&stream, &broker, |_| {}).await;
    let (mut other, _) = host.client(resuming("other")).await;
    other.subscribe("a", QOS1).await;
    other.send(Disconnect { reason_code: Reason::NormalDisconnection, ..Disconnect::default() }).await;
    assert_eq!(other.try_receive().await, None);
    away(&host, QoS::AtLeastOnce).await;
    stream.ask(Offset(3)).await;
    assert_eq!(reached(&stream), Offset(3), "no more than was asked for");
    assert_eq!(broker.bounds().end, Offset(3), "one copy of each");
    stream.trim(Offset(3));
    stream.ask_and_trim(Offset(5)).await;
    for id in ["c", "other"] {
        let (mut client, _) = host.client(resuming(id)).await;
        assert_eq!(client.numbers(5).await, [0, 1, 2, 3, 4]);
        client.nothing_but_ping().await;
    }
    host.stop().await;
}

#[tokio::test]
async fn copies_are_found_again_after_a_restart_also_by_a_session_whose_note_is_old() {
    let (stream, broker) = (MemoryStream::with_hooks("s", 1), MemoryStream::with_hooks("broker", 1));
    let first = host(&stream, &broker, |_| {}).await;
    away(&first, QoS::AtLeastOnce).await;
    let note = broker.state(b"qr");
    stream.ask_and_trim(Offset(3)).await;
    first.stop().await;
    // As a crash would leave it: the note of when the client left.
    let notes: Vec<_> = note.iter().map(|(key, value)| StateChange { key, value: Some(value) }).collect();
    broker.append(&[], &notes).unwrap();
    let second = host(&stream, &broker, |_| {}).await;
    publish_numbers(&second, "a", 5..6).await;
    stream.ask_and_trim(Offset(6)).await;
    let (mut client, _) = second.client(resuming("c")).await;
    assert_eq!(client.numbers(6).await, [0, 1, 2, 3, 4, 5]);
    client.nothing_but_ping().await;
    second.stop().await;
}

#[tokio::test]
async fn copies_outlive_the_segments_of_the_brokers_stream_for_as_long_as_somebody_waits() {
    let (stream, broker) = (MemoryStream::with_hooks("s", 1), MemoryStream::with_hooks("broker", 1));
    let host = host(&stream, &broker, |_| {}).await;
    away(&host, QoS::AtLeastOnce).await;
    stream.ask_and_trim(Offset(5)).await;
    assert_eq!(broker.bounds(), Offset(0)..Offset(5));
    broker.ask_and_trim(Offset(5)).await;
    assert_eq!(broker.bounds(), Offset(5)..Offset(10), "appended again");
    let (mut client, _) = host.client(resuming("c")).await;
    for number in 0..5 {
        assert_eq!(client.numbers(1).await, [number]);
    }
    client.nothing_but_ping().await;
    broker.ask_and_trim(Offset(10)).await;
    assert_eq!(broker.bounds(), Offset(10)..Offset(10), "nobody waits for them any more");
    host.stop().await;
}

#[tokio::test]
async fn what_is_over_a_bound_is_not_copied() {
    let (stream, broker) = (MemoryStream::with_hooks("s", 1), MemoryStream::with_hooks("broker", 1));
    // Over the queue's bound.
    let first = host(&stream, &broker, |config| config.queue_messages_max = 2).await;
    away(&first, QoS::AtLeastOnce).await;
    stream.ask_and_trim(Offset(5)).await;
    assert_eq!(broker.bounds().end, Offset(2));
    first.stop().await;
    // Over the bound of all copies: dropped, and what comes later is delivered.
    let second = host(&stream, &broker, |config| config.queue_copies_bytes_max = ByteSize(1)).await;
    publish_numbers(&second, "a", 5..7).await;
    assert_eq!(waiting(&second, "c"), 4);
    stream.ask_and_trim(Offset(6)).await;
    assert_eq!(waiting(&second, "c"), 3, "it is not counted as waiting any more");
    let (mut client, _) = second.client(resuming("c")).await;
    assert_eq!(client.numbers(3).await, [3, 4, 6]);
    client.nothing_but_ping().await;
    second.stop().await;
}

#[tokio::test]
async fn nothing_goes_before_its_copy_is_durable() {
    let (stream, broker) = (MemoryStream::with_hooks("s", 1), MemoryStream::with_hooks("broker", 1));
    let host = host(&stream, &broker, |_| {}).await;
    away(&host, QoS::AtLeastOnce).await;
    broker.hold_commits();
    let mut asked = std::pin::pin!(stream.ask(Offset(3)));
    tokio::select! {
        biased;
        () = &mut asked => panic!("the messages may go, and their copies are not durable"),
        () = broker.awaited() => {}
    }
    assert_eq!(reached(&stream), Offset(0));
    while tokio::select! { biased; () = &mut asked => false, () = broker.awaited() => true } {
        broker.commit();
    }
    assert_eq!((reached(&stream), broker.bounds().end), (Offset(3), Offset(3)));
    broker.commit();
    host.stop().await;
}

#[tokio::test]
async fn copies_that_a_crash_left_beside_their_messages_are_not_made_again() {
    let (stream, broker) = (MemoryStream::with_hooks("s", 1), MemoryStream::with_hooks("broker", 1));
    let first = host(&stream, &broker, |_| {}).await;
    away(&first, QoS::AtLeastOnce).await;
    stream.ask(Offset(5)).await;
    assert_eq!(broker.bounds().end, Offset(5));
    first.stop().await;
    let second = host(&stream, &broker, |_| {}).await;
    assert_eq!(reached(&stream), Offset(0));
    stream.ask_and_trim(Offset(5)).await;
    assert_eq!(broker.bounds().end, Offset(5));
    let (mut client, _) = second.client(resuming("c")).await;
    assert_eq!(client.numbers(5).await, [0, 1, 2, 3, 4]);
    client.nothing_but_ping().await;
    second.stop().await;
}

#[tokio::test]
async fn copies_are_kept_until_the_live_delivery_of_a_new_run_has_come_by() {
    let (stream, broker) = (MemoryStream::with_hooks("s", 1), MemoryStream::with_hooks("broker", 1));
    let first = host(&stream, &broker, |_| {}).await;
    away(&first, QoS::AtLeastOnce).await;
    let note = broker.state(b"qr");
    stream.ask_and_trim(Offset(5)).await;
    first.stop().await;
    let notes: Vec<_> = note.iter().map(|(key, value)| StateChange { key, value: Some(value) }).collect();
    broker.append(&[], &notes).unwrap();
    let second = host(&stream, &broker, |_| {}).await;
    broker.ask_and_trim(broker.bounds().end).await;
    let (mut client, _) = second.client(resuming("c")).await;
    assert_eq!(client.numbers(5).await, [0, 1, 2, 3, 4]);
    client.nothing_but_ping().await;
    second.stop().await;
}

#[tokio::test]
async fn an_expired_message_is_not_copied_and_waits_no_more() {
    let (stream, broker) = (MemoryStream::with_hooks("s", 1), MemoryStream::with_hooks("broker", 1));
    let host = host(&stream, &broker, |_| {}).await;
    away(&host, QoS::AtLeastOnce).await;
    let mut expiry = Vec::new();
    properties::push(&mut expiry, Origin::Listener, "expiry-s", b"60");
    append(&stream, &["5"], &expiry, Duration::from_secs(61));
    append(&stream, &["6"], &expiry, Duration::ZERO);
    stream.ask_and_trim(Offset(7)).await;
    assert_eq!(broker.bounds().end, Offset(6));
    assert_eq!(waiting(&host, "c"), 6);
    let (mut client, _) = host.client(resuming("c")).await;
    assert_eq!(client.numbers(6).await, [0, 1, 2, 3, 4, 6]);
    client.nothing_but_ping().await;
    host.stop().await;
}

#[tokio::test]
async fn what_waits_for_a_slow_client_is_copied_but_for_qos_0() {
    let (stream, broker) = (MemoryStream::with_hooks("s", 1), MemoryStream::with_hooks("broker", 1));
    let host = host(&stream, &broker, |_| {}).await;
    let (mut client, _) = host.client(Connect { receive_max: Some(id(1)), ..resuming("c") }).await;
    client.subscribe("a", QOS1).await;
    publish_numbers(&host, "a", 0..2).await;
    let mut publisher = host.clean("publisher").await;
    publisher.send(publish("a", QoS::AtMostOnce, 0)).await;
    publisher.nothing_but_ping().await;
    assert_eq!(client.received().await.payload, "0");
    stream.ask_and_trim(Offset(3)).await;
    assert_eq!(broker.bounds().end, Offset(2), "one on its way, and one that waits");
    drop(client);
    let (mut client, _) = host.client(resuming("c")).await;
    assert_eq!(client.numbers(2).await, [0, 1]);
    host.stop().await;
}

#[tokio::test]
async fn retention_waits_for_the_live_delivery_which_finds_who_waits() {
    const COUNT: usize = 40_000;
    let (stream, broker) = (MemoryStream::with_hooks("s", 1), MemoryStream::with_hooks("broker", 1));
    let host = host(&stream, &broker, |config| config.queue_messages_max = COUNT as u32).await;
    let (mut client, _) = host.client(resuming("c")).await;
    client.subscribe("a", QOS1).await;
    client.send(Disconnect { reason_code: Reason::NormalDisconnection, ..Disconnect::default() }).await;
    assert_eq!(client.try_receive().await, None);
    append(&stream, &[""; COUNT], &[], Duration::ZERO);
    stream.ask_and_trim(Offset(COUNT as u64)).await;
    assert_eq!(broker.bounds().end, Offset(COUNT as u64));
    host.stop().await;
}
