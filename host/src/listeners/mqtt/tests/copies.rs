//! What sessions wait for is copied before retention takes it from its stream.

use std::path::Path;

use super::sessions::{host, publish_numbers};
use super::*;
use crate::batch::{Partition, flags};
use crate::stream::log::Log;
use crate::stream::log::sim::SimDisk;
use crate::stream::{self, NewMessage, StateChange, Ticket};

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

fn expires_in_a_minute() -> Vec<u8> {
    let mut properties = Vec::new();
    properties::push(&mut properties, Origin::Listener, "expiry-s", b"60");
    properties
}

fn streams() -> (Arc<MemoryStream>, Arc<MemoryStream>) {
    (MemoryStream::with_hooks("s", 1), MemoryStream::with_hooks("broker", 1))
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
    let (stream, broker) = streams();
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
    let (stream, broker) = streams();
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
async fn a_copy_of_a_lost_message_is_never_taken_for_the_one_that_has_its_offset_now() {
    let (stream, broker) = streams();
    let first = host(&stream, &broker, |_| {}).await;
    away(&first, QoS::AtLeastOnce).await;
    let older = stream.copied(Offset(1));
    stream.ask_and_trim(Offset(3)).await;
    assert_eq!(broker.bounds().end, Offset(3), "copies of 0, 1 and 2");
    first.stop().await;
    // An older stream beside the broker's own. Twice, for the second start has nothing to compare.
    let second = host(&older, &broker, |_| {}).await;
    publish_numbers(&second, "a", 10..13).await;
    second.stop().await;
    let older = older.copied(Offset(4));
    let third = host(&older, &broker, |_| {}).await;
    // What is copied from now on counts.
    older.ask_and_trim(Offset(3)).await;
    let (mut client, _) = third.client(resuming("c")).await;
    assert_eq!(client.numbers(4).await, [0, 10, 11, 12]);
    client.nothing_but_ping().await;
    third.stop().await;
}

#[tokio::test]
async fn copies_outlive_the_segments_of_the_brokers_stream_for_as_long_as_somebody_waits() {
    let (stream, broker) = streams();
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

/// As after the bound of a packet was lowered, and that of an append with it.
#[tokio::test]
async fn a_copy_that_is_too_large_to_be_appended_again_is_counted_and_waits_no_more() {
    let (stream, broker) = streams();
    let host = host(&stream, &broker, |_| {}).await;
    away(&host, QoS::AtLeastOnce).await;
    append(&stream, &[&"x".repeat(1_000)], b"", Duration::ZERO);
    stream.ask_and_trim(Offset(6)).await;
    broker.set_append_bytes_max(900);
    broker.ask_and_trim(Offset(6)).await;
    assert_eq!(broker.bounds(), Offset(6)..Offset(11));
    assert_eq!((waiting(&host, "c"), host.handle.clients.0.counters.gap.get()), (5, 1));
    let (mut client, _) = host.client(resuming("c")).await;
    assert_eq!(client.numbers(5).await, [0, 1, 2, 3, 4]);
    client.nothing_but_ping().await;
    host.stop().await;
}

#[tokio::test]
async fn what_is_over_a_bound_is_not_copied() {
    let (stream, broker) = streams();
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
    let (stream, broker) = streams();
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
    let (stream, broker) = streams();
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
    let (stream, broker) = streams();
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
    let (stream, broker) = streams();
    let host = host(&stream, &broker, |_| {}).await;
    away(&host, QoS::AtLeastOnce).await;
    let expiry = expires_in_a_minute();
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
    let (stream, broker) = streams();
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
    let (stream, broker) = streams();
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

#[tokio::test]
async fn what_was_handled_is_never_said_to_be_less() {
    const COUNT: u64 = (1 << 18) + 10;
    let handled = |broker: &MemoryStream| {
        let (_, value) = broker.state(b"co").remove(0);
        u64::from_be_bytes(value.try_into().unwrap())
    };
    let (stream, broker) = streams();
    let host = host(&stream, &broker, |config| config.queue_messages_max = 10).await;
    let (mut client, _) = host.client(resuming("c")).await;
    client.subscribe("a", QOS1).await;
    client.send(Disconnect { reason_code: Reason::NormalDisconnection, ..Disconnect::default() }).await;
    assert_eq!(client.try_receive().await, None);
    append(&stream, &[""; COUNT as usize], &[], Duration::ZERO);
    stream.ask(Offset(COUNT)).await;
    append(&stream, &[""], &[], Duration::ZERO);
    broker.hold_commits();
    let mut asked = std::pin::pin!(stream.ask(Offset(COUNT + 1)));
    while tokio::select! { biased; () = &mut asked => false, () = broker.awaited() => true } {
        let handled = handled(&broker);
        assert!(handled >= COUNT, "{handled}");
        broker.commit();
    }
    assert_eq!(handled(&broker), COUNT + 1);
    broker.commit();
    host.stop().await;
}

/// A property of a client's own, for a message that takes its room.
fn padding() -> Vec<u8> {
    let mut properties = Vec::new();
    properties::push(&mut properties, Origin::Device, "padding", &[b'x'; 3_000]);
    properties
}

/// A stream on a disk, in segments of a few messages.
fn log(disk: &SimDisk, name: &str, bytes_max: u64) -> Arc<Log> {
    let config = stream::Config {
        segment_bytes: ByteSize(12 << 10),
        reserve_bytes: ByteSize(0),
        tail_bytes_max: ByteSize(2 << 10),
        retention: stream::Retention { max_age: None, max_bytes: ByteSize(bytes_max) },
        ..stream::Config::default()
    };
    Log::open(Arc::new(disk.clone()), Path::new("/data").join(name).as_path(), name, &config).unwrap().0
}

#[tokio::test]
async fn on_a_full_disk_retention_waits_for_the_copies_and_goes_on_by_itself() {
    let (stream, disk) = (MemoryStream::with_hooks("s", 1), SimDisk::new(3));
    let broker = log(&disk, "broker", 1 << 30);
    let host = Host::start(Streams::new(vec![], stream.clone()), broker, |_| {}).await;
    away(&host, QoS::AtLeastOnce).await;
    disk.set_bytes_max(disk.bytes());
    append(&stream, &["5", "6", "7", "8", "9", "10", "11", "12", "13", "14"], &padding(), Duration::ZERO);
    let mut asked = std::pin::pin!(stream.ask(Offset(15)));
    tokio::select! {
        biased;
        () = &mut asked => panic!("the messages may go, and there was no room for their copies"),
        () = disk.was_full() => {}
    }
    publish_numbers(&host, "a", 15..17).await;
    assert_eq!(reached(&stream), Offset(0), "publishers go on, retention waits");
    disk.set_bytes_max(u64::MAX);
    asked.await;
    stream.trim(Offset(15));
    let (mut client, _) = host.client(resuming("c")).await;
    assert_eq!(client.numbers(17).await, (0..17).collect::<Vec<_>>());
    client.nothing_but_ping().await;
    assert_eq!(host.handle.clients.0.counters.gap.get(), 0);
    host.stop().await;
}

#[tokio::test]
async fn on_a_full_disk_retention_by_bytes_goes_on_and_what_is_lost_is_counted() {
    const COUNT: u16 = 60;
    let (disk, full) = (SimDisk::new(3), SimDisk::new(3));
    let (stream, broker) = (log(&disk, "s", 64 << 10), log(&full, "broker", 1 << 30));
    let host = Host::start(Streams::new(vec![], stream.clone()), broker.clone(), |_| {}).await;
    let (mut client, _) = host.client(resuming("c")).await;
    client.subscribe("a", QOS1).await;
    client.send(Disconnect { reason_code: Reason::NormalDisconnection, ..Disconnect::default() }).await;
    assert_eq!(client.try_receive().await, None);
    full.set_bytes_max(full.bytes());
    let mut publisher = host.clean("publisher").await;
    let publish_padded = async |publisher: &mut Client, number: u16| {
        let user_properties = vec![("padding".into(), "x".repeat(3_000).into())];
        let properties = Some(PublishProperties { user_properties, ..PublishProperties::default() });
        let payload = number.to_string().into();
        let publish = publish("a", QoS::AtLeastOnce, number + 1);
        publisher.send(Publish { payload, properties, ..publish }).await;
        assert_eq!(publisher.receive().await, puback(number + 1));
    };
    for number in 0..COUNT {
        publish_padded(&mut publisher, number).await;
    }
    full.was_full().await;
    let start = stream.bounds().start.0;
    assert!(start > 0, "acknowledged, though nothing could be copied");
    full.set_bytes_max(u64::MAX);
    // Until all that has gone was copied or counted.
    let identity = stream.identity();
    let key = [b"co", &identity.log.as_bytes()[..], &identity.generation.to_be_bytes()].concat();
    let is_handled = |_: &Ticket| {
        let known = broker.state(&key).pop();
        known.is_some_and(|(_, value)| u64::from_be_bytes(value.try_into().unwrap()) >= start)
    };
    broker.durable().wait_for(is_handled).await.unwrap();
    publish_padded(&mut publisher, COUNT).await;
    let (mut client, _) = host.client(resuming("c")).await;
    let mut given = Vec::new();
    while given.last() != Some(&COUNT) {
        given.extend(client.numbers(1).await);
    }
    client.nothing_but_ping().await;
    let lost = host.handle.clients.0.counters.gap.get();
    assert!(lost > 0 && given.is_sorted());
    assert_eq!(given.len() as u64 + lost, u64::from(COUNT) + 1, "{given:?}");
    // As before: what retention takes now is copied.
    client.send(Disconnect { reason_code: Reason::NormalDisconnection, ..Disconnect::default() }).await;
    assert_eq!(client.try_receive().await, None);
    for number in 0..COUNT {
        publish_padded(&mut publisher, number).await;
    }
    let (mut client, _) = host.client(resuming("c")).await;
    assert_eq!(client.numbers(COUNT.into()).await, (0..COUNT).collect::<Vec<_>>());
    assert_eq!(host.handle.clients.0.counters.gap.get(), lost);
    host.stop().await;
}

#[tokio::test]
async fn with_no_room_in_the_brokers_stream_its_copies_stay_and_are_sorted_once_there_is() {
    let (stream, broker) = streams();
    let host = host(&stream, &broker, |_| {}).await;
    away(&host, QoS::AtLeastOnce).await;
    stream.ask_and_trim(Offset(5)).await;
    broker.set_no_space(true);
    let mut asked = std::pin::pin!(broker.ask(Offset(5)));
    tokio::select! {
        biased;
        () = &mut asked => panic!("the copies may go, and nobody could append them again"),
        () = publish_numbers(&host, "a", 5..7) => {}
    }
    broker.set_no_space(false);
    asked.await;
    broker.trim(Offset(5));
    let (mut client, _) = host.client(resuming("c")).await;
    assert_eq!(client.numbers(7).await, (0..7).collect::<Vec<_>>());
    client.nothing_but_ping().await;
    host.stop().await;
}

/// The broker's stream as it would be that much later: in it everything waits longer.
async fn aged(broker: &MemoryStream, by: Duration) -> Arc<MemoryStream> {
    let later = MemoryStream::with_hooks("broker", 1);
    let state = broker.state(b"");
    let state: Vec<_> = state.iter().map(|(key, value)| StateChange { key, value: Some(value) }).collect();
    later.append(&[], &state).unwrap();
    let mut cursor = broker.cursor(broker.bounds().start);
    while let Some(crate::stream::Read::Batch(batch)) = cursor.try_next().await.unwrap() {
        for message in batch.messages() {
            let again = NewMessage {
                topic: message.topic(),
                payload: message.payload(),
                properties: message.properties(),
                route: "",
                device: message.device(),
                partition: Partition(0),
                flags: message.entry.flags,
                received_us: message.entry.received_us - by.as_micros() as u64,
                event_us: 0,
            };
            later.append(&[again], &[]).unwrap();
        }
    }
    later
}

#[tokio::test]
async fn a_copy_that_expired_goes_when_copies_are_sorted_unless_its_sending_was_begun() {
    let (stream, broker) = streams();
    let first = host(&stream, &broker, |_| {}).await;
    let (mut other, _) = first.client(resuming("other")).await;
    other.subscribe("a", QOS1).await;
    other.send(Disconnect { reason_code: Reason::NormalDisconnection, ..Disconnect::default() }).await;
    assert_eq!(other.try_receive().await, None);
    let (mut client, _) = first.client(Connect { receive_max: Some(id(1)), ..resuming("c") }).await;
    client.subscribe("a", QOS1).await;
    let expiry = expires_in_a_minute();
    append(&stream, &["0", "1"], &expiry, Duration::ZERO);
    append(&stream, &["2"], &[], Duration::ZERO);
    assert_eq!(client.received().await.payload, "0", "begun, and not acknowledged");
    stream.ask_and_trim(Offset(3)).await;
    assert_eq!(broker.bounds().end, Offset(3));
    drop(client);
    first.stop().await;

    let later = aged(&broker, Duration::from_secs(61)).await;
    let second = host(&stream, &later, |_| {}).await;
    later.ask_and_trim(Offset(3)).await;
    assert_eq!(later.bounds(), Offset(3)..Offset(5), "0 and 2");
    assert_eq!((waiting(&second, "c"), waiting(&second, "other")), (1, 2));
    let (mut client, _) = second.client(resuming("c")).await;
    assert_eq!(client.numbers(2).await, [0, 2]);
    client.nothing_but_ping().await;
    let (mut other, _) = second.client(resuming("other")).await;
    assert_eq!(other.numbers(1).await, [2], "0 expired for it");
    other.nothing_but_ping().await;
    // Now nobody has begun what expired.
    let end = later.bounds().end;
    later.ask_and_trim(end).await;
    assert_eq!(later.bounds(), end..end);
    second.stop().await;
}

#[tokio::test]
async fn what_a_member_of_a_share_was_handed_survives_a_crash() {
    let (stream, broker) = streams();
    let first = host(&stream, &broker, |_| {}).await;
    let mut members = Vec::new();
    for client_id in ["leaves", "stays"] {
        let (mut member, _) = first.client(Connect { receive_max: Some(id(1)), ..resuming(client_id) }).await;
        member.subscribe("$share/g/a", QOS1).await;
        members.push(member);
    }
    let mut all = first.clean("all").await;
    all.subscribe("a", QOS1).await;
    publish_numbers(&first, "a", 0..6).await;
    assert_eq!(all.numbers(6).await, [0, 1, 2, 3, 4, 5]);
    let held = members[0].received().await.payload;
    let held: u16 = std::str::from_utf8(&held).unwrap().parse().unwrap();
    // Its note says that all six were offered to it.
    members[1].received().await;
    members[1].subscribe("b", QOS1).await;
    let topic_filters = vec!["$share/g/a".into()];
    members[0].send(Unsubscribe { packet_id: id(9), user_properties: vec![], topic_filters }).await;
    assert!(matches!(members[0].receive().await, Packet::UnsubscribeAck(_)));
    let crashed = aged(&broker, Duration::ZERO).await;
    first.stop().await;

    let second = host(&stream, &crashed, |_| {}).await;
    let (mut member, _) = second.client(resuming("stays")).await;
    let mut given = member.numbers(5).await;
    given.sort();
    assert_eq!(given, (0..6).filter(|number| *number != held).collect::<Vec<_>>());
    second.stop().await;
}

#[tokio::test]
async fn retention_goes_on_while_what_waits_is_copied_also_past_what_expired() {
    let (stream, broker) = streams();
    let host = host(&stream, &broker, |_| {}).await;
    away(&host, QoS::AtLeastOnce).await;
    let expiry = expires_in_a_minute();
    append(&stream, &["5"], &expiry, Duration::from_secs(61));
    (6..70).for_each(|number| append(&stream, &[&number.to_string()], &[], Duration::ZERO));
    broker.hold_commits();
    let (mut steps, mut asked) = (Vec::new(), std::pin::pin!(stream.ask(Offset(70))));
    while tokio::select! { biased; () = &mut asked => false, () = broker.awaited() => true } {
        steps.push(reached(&stream).0);
        broker.commit();
    }
    assert!(steps.contains(&64), "{steps:?}");
    assert_eq!((broker.bounds().end, waiting(&host, "c")), (Offset(69), 69), "without the one that expired");
    broker.commit();
    host.stop().await;
}
