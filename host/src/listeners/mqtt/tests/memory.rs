//! Memory that all clients take together has bounds, and whoever takes little of it is served.

use tokio::io::{DuplexStream, duplex};

use super::*;
use crate::listeners::transport::fuzzing::somebody;
use crate::room::{FREE_BYTES, Holding};

/// A host with so much memory for each: queues, subscriptions, connections.
async fn host_with(stream: Arc<dyn Stream>, memory: ByteSize) -> Host {
    let streams = Streams::new(vec![], stream);
    let change = |config: &mut Config| {
        config.queues_bytes_max = Some(memory);
        config.subscriptions_bytes_max = Some(memory);
        config.connections_bytes_max = Some(memory);
    };
    Host::start(streams, MemoryStream::new("broker", 1), change).await
}

fn rooms(host: &Host) -> Rooms {
    host.handle.clients().0.rooms.clone()
}

async fn until(what: &str, is_so: impl Fn() -> bool) {
    let waited = timeout(HUNG_AFTER, async {
        while !is_so() {
            tokio::task::yield_now().await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("{what}"));
}

#[tokio::test]
async fn subscriptions_of_all_clients_share_their_memory_and_who_has_few_gets_more() {
    let host = host_with(MemoryStream::new("s", 1), ByteSize::kib(64)).await;
    let (room, (granted, full)) =
        (rooms(&host).subscriptions, (SubscribeAckReason::GrantedQos1, SubscribeAckReason::QuotaExceeded));
    let filter = |n: usize| -> &'static str { format!("{n:040}/+/x").leak() };
    let mut few = host.client(resuming("few")).await.0;
    let mut many = host.clean("many").await;
    let mut count = 0;
    while many.subscribe(filter(count), QOS1).await == granted {
        count += 1;
    }
    assert!((40..120).contains(&count), "{count}");
    assert_eq!(many.subscribe(filter(0), QOS1).await, granted, "one that it has takes no more");
    for n in 0..5 {
        assert_eq!(few.subscribe(filter(n), QOS1).await, granted, "{n}");
    }
    assert!(room.taken() <= room.bytes_max() && room.taken() > room.bytes_max() / 2);
    assert_eq!(many.subscribe(filter(count), QOS1).await, full);
    many.send(Packet::Disconnect(Disconnect::new(Reason::NormalDisconnection))).await;
    until("what a session had is given back with it", || room.taken() < 8 << 10).await;
    for n in 5..40 {
        assert_eq!(few.subscribe(filter(n), QOS1).await, granted, "{n}");
    }
    let topic_filters = (0..40).map(|n| filter(n).into()).collect();
    few.send(Unsubscribe { packet_id: id(9), user_properties: vec![], topic_filters }).await;
    assert!(matches!(few.receive().await, Packet::UnsubscribeAck(_)));
    assert_eq!(room.taken(), 0);
    host.stop().await;
}

#[tokio::test]
async fn a_subscribe_past_the_memory_gets_what_has_room_and_takes_no_more() {
    let host = host_with(MemoryStream::new("s", 1), ByteSize::kib(16)).await;
    let room = rooms(&host).subscriptions;
    let mut client = host.client(resuming("c")).await.0;
    let topic_filters = (0..100).map(|n| (format!("{n:040}").into(), QOS1)).collect();
    client.send(Subscribe { packet_id: id(9), id: None, user_properties: vec![], topic_filters }).await;
    let Packet::SubscribeAck(ack) = client.receive().await else { panic!("not SUBACK") };
    let granted = ack.status.iter().filter(|status| **status == SubscribeAckReason::GrantedQos1).count();
    assert!((10..50).contains(&granted), "{granted}");
    assert_eq!(host.handle.clients().show("c").unwrap().subscriptions, granted);
    assert!(room.taken() <= room.bytes_max() / 4 * 3);
    assert!(host.handle.clients().delete("c").await);
    assert_eq!(room.taken(), 0);
    host.stop().await;
}

#[tokio::test]
async fn topic_aliases_of_all_clients_share_their_memory_and_one_without_room_ends_its_connection() {
    let host = host_with(MemoryStream::new("s", 1), ByteSize::kib(64)).await;
    let room = rooms(&host).connections;
    let aliased = |bytes: usize, alias: u16| {
        let topic: &'static str = "x".repeat(bytes).leak();
        let properties =
            PublishProperties { topic_alias: NonZeroU16::new(alias), ..PublishProperties::default() };
        Publish { properties: Some(properties), ..publish(topic, QoS::AtMostOnce, 0) }
    };
    let (mut many, mut few) = (host.clean("many").await, host.clean("few").await);
    for alias in 1..=2 {
        many.send(aliased(20 << 10, alias)).await;
        many.nothing_but_ping().await;
        // Again, and by the alias alone.
        many.send(aliased(20 << 10, alias)).await;
        many.nothing_but_ping().await;
    }
    assert!((38 << 10..48 << 10).contains(&room.taken()), "{}", room.taken());
    many.send(aliased(20 << 10, 3)).await;
    assert_eq!(many.disconnected().await, Reason::QuotaExceeded);
    for alias in 1..=16 {
        few.send(aliased(100, alias)).await;
    }
    few.nothing_but_ping().await;
    until("a connection gives back what it had", || room.taken() < 8 << 10).await;
    few.send(aliased(40 << 10, 1)).await;
    few.nothing_but_ping().await;
    drop(few);
    until("all is given back", || room.taken() == 0).await;
    host.stop().await;
}

#[tokio::test]
async fn waiting_messages_of_all_sessions_share_their_memory_and_who_has_few_keeps_all() {
    let host = host_with(MemoryStream::new("s", 1), ByteSize::kib(256)).await;
    let (room, clients) = (rooms(&host).queues, host.handle.clients());
    for name in ["many", "few"] {
        let mut client = host.client(resuming(name)).await.0;
        client.subscribe(name, QOS1).await;
    }
    until("both are away", || {
        ["many", "few"].iter().all(|it| clients.show(it).unwrap().connection.is_none())
    })
    .await;
    let mut publisher = host.clean("publisher").await;
    let mut send = async |topic: &'static str, count: u16| {
        let packets = (1..=count).map(|id| publish(topic, QoS::AtLeastOnce, id).into());
        publisher.send_all(packets).await;
        for id in 1..=count {
            assert_eq!(publisher.receive().await, puback(id));
        }
    };
    for _ in 0..10 {
        send("many", 500).await;
    }
    send("few", 100).await;
    until("all are delivered", || clients.show("few").unwrap().queued == 100).await;
    let many = clients.show("many").unwrap();
    assert!((2_000..3_200).contains(&many.queued), "{many:?}");
    assert_eq!(many.counts.dropped, 5_000 - many.queued as u64);
    assert_eq!(clients.0.counters.queues_full.get(), many.counts.dropped);
    assert!(room.taken() <= room.bytes_max() && many.session_bytes > 64 * many.queued);

    let (mut few, ack) = host.client(resuming("few")).await;
    assert!(ack.session_present);
    for _ in 0..100 {
        let packet_id = few.received().await.packet_id.unwrap().get();
        few.send(puback(packet_id)).await;
    }
    // The newest are there.
    let (mut many, _) = host.client(resuming("many")).await;
    many.received().await;
    drop(many);
    assert!(clients.delete("many").await);
    assert!(room.taken() < 8 << 10, "{}", room.taken());
    host.stop().await;
}

#[tokio::test]
async fn sessions_that_are_away_take_no_room_from_a_subscriber_that_is_there() {
    let host = host_with(MemoryStream::new("s", 1), ByteSize::kib(256)).await;
    let (room, clients) = (rooms(&host).queues, host.handle.clients());
    for n in 0..50 {
        let mut client = host.client(resuming(format!("away-{n}").leak())).await.0;
        client.subscribe("#", QOS1).await;
        client.send(Disconnect { reason_code: Reason::NormalDisconnection, ..Disconnect::default() }).await;
        assert_eq!(client.try_receive().await, None);
    }
    let mut publisher = host.clean("publisher").await;
    let mut send = async || {
        publisher.send_all((1..=100).map(|id| publish("t", QoS::AtLeastOnce, id).into())).await;
        for id in 1..=100 {
            assert_eq!(publisher.receive().await, puback(id));
        }
    };
    for _ in 0..5 {
        send().await;
    }
    until("the others fill what they may", || clients.0.counters.queues_full.get() > 10_000).await;
    assert!(room.taken() > room.bytes_max() / 2, "{}", room.taken());
    let mut there = host.client(Connect { receive_max: Some(id(10)), ..clean("there") }).await.0;
    there.subscribe("#", QOS1).await;
    send().await;
    for _ in 0..100 {
        let packet_id = there.received().await.packet_id.unwrap().get();
        there.send(puback(packet_id)).await;
    }
    assert_eq!(clients.show("there").unwrap().counts.dropped, 0);
    host.stop().await;
}

#[tokio::test]
async fn without_memory_for_their_buffers_connections_go_on_in_small_pieces() {
    let host = host_with(MemoryStream::new("s", 1), ByteSize::kib(64)).await;
    let mut all = Holding::of(&rooms(&host).connections);
    all.hold(64 << 10);
    let (mut subscriber, mut publisher) = (host.clean("subscriber").await, host.clean("publisher").await);
    subscriber.subscribe("t", QOS1).await;
    let large = |id| Publish { payload: vec![b'x'; 3_000].into(), ..publish("t", QoS::AtLeastOnce, id) };
    publisher.send_all((1..=100).map(|id| large(id).into())).await;
    for id in 1..=100 {
        assert_eq!(publisher.receive().await, puback(id));
    }
    for _ in 0..100 {
        let received = subscriber.received().await;
        assert_eq!(received.payload.len(), 3_000);
        subscriber.send(puback(received.packet_id.unwrap().get())).await;
    }
    host.stop().await;
}

/// A client whose socket takes no more than 4 KiB that it has not read.
async fn slow_reader(host: &Host, client_id: &'static str) -> Client<DuplexStream> {
    let (io, served) = duplex(4 << 10);
    let (remote, place) = somebody();
    tokio::spawn(connection::serve(host.handle.clients().0.clone(), served, remote, place));
    let mut client = Client::over(io);
    client.send(clean(client_id)).await;
    assert!(matches!(client.receive().await, Packet::ConnectAck(_)));
    client
}

#[tokio::test]
async fn without_memory_large_messages_go_to_slow_readers_in_turn_and_reach_all_of_them() {
    const LARGE: usize = 20 << 10;
    let host = host_with(MemoryStream::new("s", 1), ByteSize::kib(256)).await;
    let (rooms, broker) = (rooms(&host), host.handle.clients().0.clone());
    let mut all = [&rooms.queues, &rooms.connections].map(Holding::of);
    all.iter_mut().for_each(|all| all.hold((256 << 10) + FREE_BYTES));
    let mut readers = Vec::new();
    for name in ["a", "b", "c", "d", "e", "f"] {
        let mut reader = slow_reader(&host, name).await;
        reader.subscribe("large", QOS1).await;
        readers.push(reader);
    }
    let mut publisher = host.clean("publisher").await;
    let taken = || rooms.queues.taken() + rooms.connections.taken();
    let before = taken();
    for id in 1..=3 {
        let payload = vec![b'x'; LARGE].into();
        publisher.send(Publish { payload, ..publish("large", QoS::AtLeastOnce, id) }).await;
        assert_eq!(publisher.receive().await, puback(id));
    }
    // There are permits for 32 KiB, so that one has its message.
    until("all but one wait", || broker.outgoing_permits.waiting() == readers.len() - 1).await;
    assert!(taken() < before + (32 << 10) + (8 << 10), "{before} {}", taken());
    let read = readers.iter_mut().map(async |reader| {
        for _ in 0..3 {
            let received = reader.received().await;
            assert_eq!(received.payload.len(), LARGE);
            reader.send(puback(received.packet_id.unwrap().get())).await;
        }
        reader.nothing_but_ping().await;
    });
    futures_util::future::join_all(read).await;
    assert!(!broker.outgoing_permits.is_taken() && !broker.outgoing_permits.is_wanted());
    host.stop().await;
}

#[tokio::test]
async fn what_waits_for_room_in_a_stream_is_counted_until_it_is_appended() {
    let stream = MemoryStream::with_hooks("s", 1);
    let host = host_with(stream.clone(), ByteSize::mib(1)).await;
    let room = rooms(&host).connections;
    let mut client = host.clean("c").await;
    stream.set_no_space(true);
    let large = |id| Publish { payload: vec![b'x'; 3_000].into(), ..publish("t", QoS::AtLeastOnce, id) };
    client.send_all((1..=5).map(|id| large(id).into())).await;
    client.nothing_but_ping().await;
    assert!(room.taken() > 10 << 10, "{}", room.taken());
    stream.set_no_space(false);
    for id in 1..=5 {
        assert_eq!(client.receive().await, puback(id));
    }
    client.nothing_but_ping().await;
    assert!(room.taken() < 8 << 10, "{}", room.taken());
    host.stop().await;
}
