//! The listener over real sockets, against streams in memory. That something
//! has not been sent yet is shown by a PINGREQ: its answer comes first.

use std::num::NonZeroU16;

use bytes::BytesMut;
use proptest::prelude::*;
use rmqtt_codec::types::{Publish, QoS};
use rmqtt_codec::v5::{
    Codec, Connect, ConnectAck, ConnectAckReason, Disconnect, DisconnectReasonCode as Reason, LastWill,
    Packet, PublishAck, PublishAck2, PublishAck2Reason, PublishAckReason, PublishProperties, RetainHandling,
    Subscribe, SubscribeAckReason, SubscriptionOptions,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::codec::{Decoder, Encoder};

use super::*;
use crate::batch::{Batch, Offset};
use crate::properties::{self, Origin};
use crate::stream::memory::MemoryStream;
use crate::topic::TopicFilter;

/// Only a hung test meets it.
const HUNG_AFTER: Duration = Duration::from_secs(30);

struct Host {
    address: SocketAddr,
    shutdown: CancellationToken,
    handle: Handle,
}

impl Host {
    async fn start(streams: Streams, broker: Arc<dyn Stream>, change: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config::default();
        config.listeners[0].bind.set_port(0);
        change(&mut config);
        let shutdown = CancellationToken::new();
        let deps = Deps {
            streams,
            broker,
            namespace: Arc::default(),
            failures: Failures::default(),
            shutdown: shutdown.clone(),
        };
        let handle = start(&config, deps).await.unwrap();
        Self { address: handle.addresses()[0], shutdown, handle }
    }

    async fn with(stream: Arc<dyn Stream>) -> Self {
        Self::start(Streams::new(vec![], stream), MemoryStream::new("broker", 1), |_| {}).await
    }

    async fn stop(self) {
        self.shutdown.cancel();
        timeout(HUNG_AFTER, self.handle.join()).await.expect("the listener ends");
    }

    async fn client(&self, connect: Connect) -> (Client, ConnectAck) {
        let mut client = Client::open(self).await;
        client.send(connect).await;
        match client.receive().await {
            Packet::ConnectAck(ack) => (client, *ack),
            other => panic!("{other:?}"),
        }
    }

    async fn clean(&self, client_id: &'static str) -> Client {
        self.client(clean(client_id)).await.0
    }
}

struct Client {
    io: TcpStream,
    input: BytesMut,
    codec: Codec,
}

impl Client {
    async fn open(host: &Host) -> Self {
        let io = TcpStream::connect(host.address).await.unwrap();
        Self { io, input: BytesMut::new(), codec: Codec::default() }
    }

    async fn send(&mut self, packet: impl Into<Packet>) {
        let mut out = BytesMut::new();
        self.codec.encode(packet.into(), &mut out).unwrap();
        self.io.write_all(&out).await.unwrap();
    }

    /// `None`: the connection is closed.
    async fn try_receive(&mut self) -> Option<Packet> {
        timeout(HUNG_AFTER, async {
            loop {
                if let Some((packet, _)) = self.codec.decode(&mut self.input).unwrap() {
                    return Some(packet);
                }
                if !matches!(self.io.read_buf(&mut self.input).await, Ok(1..)) {
                    return None;
                }
            }
        })
        .await
        .expect("an answer in time")
    }

    async fn receive(&mut self) -> Packet {
        self.try_receive().await.expect("the connection is open")
    }

    /// All that was sent was taken in, and nothing was answered but this.
    async fn nothing_but_ping(&mut self) {
        self.send(Packet::PingRequest).await;
        assert_eq!(self.receive().await, Packet::PingResponse);
    }

    async fn subscribe(&mut self, filter: &'static str, options: SubscriptionOptions) -> SubscribeAckReason {
        let topic_filters = vec![(filter.into(), options)];
        self.send(Subscribe { packet_id: id(9), id: None, user_properties: vec![], topic_filters }).await;
        match self.receive().await {
            Packet::SubscribeAck(ack) => ack.status[0],
            other => panic!("{other:?}"),
        }
    }

    async fn received(&mut self) -> Publish {
        match self.receive().await {
            Packet::Publish(publish) => *publish,
            other => panic!("{other:?}"),
        }
    }

    async fn disconnected(&mut self) -> Reason {
        loop {
            match self.receive().await {
                Packet::Disconnect(disconnect) => {
                    assert_eq!(self.try_receive().await, None);
                    return disconnect.reason_code;
                }
                Packet::Publish(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

fn id(id: u16) -> NonZeroU16 {
    NonZeroU16::new(id).unwrap()
}

fn clean(client_id: &'static str) -> Connect {
    Connect { clean_start: true, client_id: client_id.into(), ..Connect::default() }
}

fn resuming(client_id: &'static str) -> Connect {
    Connect { clean_start: false, session_expiry_interval_secs: 600, ..clean(client_id) }
}

fn publish(topic: &'static str, qos: QoS, packet_id: u16) -> Publish {
    let packet_id = NonZeroU16::new(packet_id);
    let payload = "21".into();
    Publish { dup: false, retain: false, qos, topic: topic.into(), packet_id, payload, properties: None }
}

fn puback(packet_id: u16) -> Packet {
    Packet::PublishAck(success(packet_id))
}

fn pubrec(packet_id: u16) -> Packet {
    Packet::PublishReceived(success(packet_id))
}

fn pubrel(packet_id: u16) -> Packet {
    Packet::PublishRelease(PublishAck2 { packet_id: id(packet_id), ..PublishAck2::default() })
}

fn pubcomp(packet_id: u16) -> Packet {
    Packet::PublishComplete(PublishAck2 { packet_id: id(packet_id), ..PublishAck2::default() })
}

fn success(packet_id: u16) -> PublishAck {
    let reason_code = PublishAckReason::Success;
    PublishAck { packet_id: id(packet_id), reason_code, properties: vec![], reason_string: None }
}

async fn batch(stream: &dyn Stream, from: u64) -> Batch {
    match timeout(HUNG_AFTER, stream.cursor(Offset(from)).next()).await.unwrap().unwrap() {
        crate::stream::Read::Batch(batch) => batch,
        gap => panic!("{gap:?}"),
    }
}

const QOS1: SubscriptionOptions = SubscriptionOptions {
    qos: QoS::AtLeastOnce,
    no_local: false,
    retain_as_published: false,
    retain_handling: RetainHandling::AtSubscribe,
};

#[tokio::test]
async fn nothing_is_acknowledged_before_it_is_durable() {
    let stream = MemoryStream::with_manual_commit("s", 4);
    let host = Host::with(stream.clone()).await;
    let mut client = host.clean("c").await;
    client.send(publish("a/b/c/d/e", QoS::AtLeastOnce, 1)).await;
    client.send(publish("a", QoS::ExactlyOnce, 2)).await;
    client.send(publish("a", QoS::AtLeastOnce, 3)).await;
    client.nothing_but_ping().await;
    stream.commit();
    for expected in [puback(1), pubrec(2), puback(3)] {
        assert_eq!(client.receive().await, expected);
    }
    client.send(pubrel(2)).await;
    assert_eq!(client.receive().await, pubcomp(2));
    host.stop().await;
}

#[tokio::test]
async fn a_stalled_stream_holds_only_its_own_acks() {
    let (slow, quick) =
        (MemoryStream::with_manual_commit("slow", 1), MemoryStream::with_manual_commit("quick", 1));
    let routed: (Vec<TopicFilter>, Arc<dyn Stream>) =
        (vec![TopicFilter::new("slow/#").unwrap()], slow.clone());
    let streams = Streams::new(vec![routed], quick.clone());
    let host = Host::start(streams, MemoryStream::new("broker", 1), |_| {}).await;
    let mut client = host.clean("c").await;
    for (topic, packet_id) in [("slow/1", 1), ("quick", 2), ("slow/2", 3), ("quick", 4)] {
        client.send(publish(topic, QoS::AtLeastOnce, packet_id)).await;
    }
    client.nothing_but_ping().await;
    quick.commit();
    assert_eq!((client.receive().await, client.receive().await), (puback(2), puback(4)));
    client.nothing_but_ping().await;
    slow.commit();
    assert_eq!((client.receive().await, client.receive().await), (puback(1), puback(3)));
    host.stop().await;
}

#[tokio::test]
async fn a_message_names_its_device_and_keeps_its_properties() {
    let stream = MemoryStream::new("s", 4);
    let host = Host::with(stream.clone()).await;
    let mut client = host.clean("client-7").await;
    let properties = PublishProperties {
        content_type: Some("json".into()),
        is_utf8_payload: true,
        user_properties: vec![("k".into(), "v".into())],
        ..PublishProperties::default()
    };
    let fits = publish("acme/f1/temp/sensor-1/reading", QoS::AtLeastOnce, 1);
    client.send(Publish { properties: Some(properties), ..fits }).await;
    assert_eq!(client.receive().await, puback(1));
    client.send(publish("test/hello", QoS::AtLeastOnce, 2)).await;
    assert_eq!(client.receive().await, puback(2));
    let (one, two) = (batch(&*stream, 0).await, batch(&*stream, 1).await);
    let (one, two) = (one.message(0), two.message(0));
    assert_eq!((one.device(), two.device()), ("sensor-1", "client-7"));
    assert_eq!(one.entry.flags, 1 | flags::UTF8 | flags::FITS_NAMESPACE);
    let kept: Vec<_> = properties::iter(one.properties()).map(|p| (p.origin, p.name, p.value)).collect();
    assert_eq!(kept, [(1, "content-type", &b"json"[..]), (0, "k", b"v")]);
    assert_eq!(properties::get(two.properties(), Origin::Listener, "client-id"), Some(&b"client-7"[..]));
    assert_eq!(two.payload(), b"21");
    host.stop().await;
}

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
async fn a_full_disk_holds_acks_and_drops_qos_0_but_answers_pings() {
    let stream = MemoryStream::with_hooks("s", 1);
    let host = Host::with(stream.clone()).await;
    let mut client = host.clean("c").await;
    stream.set_no_space(true);
    client.send(publish("t", QoS::AtMostOnce, 0)).await;
    client.send(publish("t", QoS::AtLeastOnce, 1)).await;
    client.send(publish("t", QoS::ExactlyOnce, 2)).await;
    for _ in 0..3 {
        client.nothing_but_ping().await;
    }
    stream.set_no_space(false);
    assert_eq!((client.receive().await, client.receive().await), (puback(1), pubrec(2)));
    client.nothing_but_ping().await;
    assert_eq!(stream.bounds().end, Offset(2));
    host.stop().await;
}

#[tokio::test]
async fn a_stream_that_stops_ends_its_connections_without_acks() {
    let stream = MemoryStream::with_manual_commit("s", 1);
    let host = Host::with(stream.clone()).await;
    let mut client = host.clean("c").await;
    client.send(publish("t", QoS::AtLeastOnce, 1)).await;
    client.nothing_but_ping().await;
    stream.fail("the disk is gone");
    assert_eq!(client.disconnected().await, Reason::ServerShuttingDown);
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
async fn a_silent_client_is_disconnected_after_its_keep_alive() {
    let host = Host::with(MemoryStream::new("s", 1)).await;
    let (mut client, _) = host.client(Connect { keep_alive: 1, ..clean("c") }).await;
    assert_eq!(client.disconnected().await, Reason::KeepAliveTimeout);
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
async fn bounds_that_the_client_knows_are_enforced() {
    let stream = MemoryStream::with_manual_commit("s", 1);
    let streams = Streams::new(vec![], stream.clone());
    let change = |config: &mut Config| (config.receive_maximum, config.topic_alias_maximum) = (2, 3);
    let host = Host::start(streams, MemoryStream::new("broker", 1), change).await;
    let (mut client, ack) = host.client(clean("c")).await;
    assert_eq!(
        (ack.receive_max.get(), ack.topic_alias_max, ack.shared_subscription_available),
        (2, 3, false)
    );
    for packet_id in 1..=3 {
        client.send(publish("t", QoS::AtLeastOnce, packet_id)).await;
    }
    assert_eq!(client.disconnected().await, Reason::ReceiveMaximumExceeded);

    let aliased = |topic: &'static str, alias: u16| {
        let properties =
            PublishProperties { topic_alias: NonZeroU16::new(alias), ..PublishProperties::default() };
        Publish { properties: Some(properties), ..publish(topic, QoS::AtMostOnce, 0) }
    };
    let end = stream.bounds().end.0;
    let mut client = host.clean("d").await;
    for (topic, alias) in [("one", 1), ("", 1), ("two", 1), ("", 1)] {
        client.send(aliased(topic, alias)).await;
    }
    client.nothing_but_ping().await;
    stream.commit();
    let mut topics = Vec::new();
    let mut at = end;
    while topics.len() < 6 {
        let batch = batch(&*stream, at).await;
        at += batch.len() as u64;
        topics.extend(batch.messages().map(|message| message.topic().to_owned()));
    }
    assert_eq!(topics[topics.len() - 4..], ["one", "one", "two", "two"]);
    client.send(aliased("three", 4)).await;
    assert_eq!(client.disconnected().await, Reason::TopicAliasInvalid);
    host.stop().await;
}

#[tokio::test]
async fn dollar_topics_are_the_brokers_own() {
    let stream = MemoryStream::new("s", 1);
    let host = Host::with(stream.clone()).await;
    let mut client = host.clean("c").await;
    client.send(publish("$SYS/x", QoS::AtLeastOnce, 1)).await;
    let refused = PublishAck { reason_code: PublishAckReason::NotAuthorized, ..success(1) };
    assert_eq!(client.receive().await, Packet::PublishAck(refused));
    // MQTT 3.1.1 knows no reason codes.
    let mut old = Client::open(&host).await;
    old.io.write_all(b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x00\x00\x01o").await.unwrap();
    old.io.write_all(b"\x32\x0a\x00\x06$SYS/x\x00\x01").await.unwrap();
    let mut answer = [0; 8];
    old.io.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"\x20\x02\x00\x00\x40\x02\x00\x01");
    assert_eq!(stream.bounds().end, Offset(0));
    host.stop().await;
}

#[tokio::test]
async fn a_will_is_published_when_its_client_is_lost_and_only_then() {
    let host = Host::with(MemoryStream::new("s", 1)).await;
    let mut watcher = host.clean("w").await;
    watcher.subscribe("will/+", QOS1).await;
    let with_will = |client_id: &'static str, topic: &'static str| Connect {
        last_will: Some(LastWill {
            qos: QoS::AtLeastOnce,
            retain: false,
            topic: topic.into(),
            message: "gone".into(),
            will_delay_interval_sec: None,
            correlation_data: None,
            message_expiry_interval: None,
            content_type: None,
            user_properties: vec![],
            is_utf8_payload: None,
            response_topic: None,
        }),
        ..clean(client_id)
    };
    let (mut polite, _) = host.client(with_will("polite", "will/polite")).await;
    polite.send(Packet::Disconnect(Disconnect::new(Reason::NormalDisconnection))).await;
    assert_eq!(polite.try_receive().await, None);
    drop(host.client(with_will("lost", "will/lost")).await);
    assert_eq!(&*watcher.received().await.topic, "will/lost");
    host.stop().await;
}

#[tokio::test]
async fn shutdown_lets_waiting_acks_out_and_says_so() {
    let stream = MemoryStream::with_manual_commit("s", 1);
    let host = Host::with(stream.clone()).await;
    let mut client = host.clean("c").await;
    client.send(publish("t", QoS::AtLeastOnce, 1)).await;
    client.nothing_but_ping().await;
    host.shutdown.cancel();
    stream.commit();
    assert_eq!(client.receive().await, puback(1));
    assert_eq!(client.disconnected().await, Reason::ServerShuttingDown);
    host.stop().await;
}

#[tokio::test]
async fn a_client_id_is_assigned_and_bad_connects_are_refused() {
    let host = Host::with(MemoryStream::new("s", 1)).await;
    let (_client, ack) = host.client(clean("")).await;
    assert!(ack.assigned_client_id.is_some_and(|id| id.starts_with("auto-")));
    let mut client = Client::open(&host).await;
    client.io.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    assert_eq!(client.try_receive().await, None);
    let auth = Connect { auth_method: Some("X".into()), ..clean("c") };
    assert_eq!(host.client(auth).await.1.reason_code, ConnectAckReason::BadAuthenticationMethod);
    host.stop().await;
}

#[test]
fn no_bytes_of_a_client_end_the_listener() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let host = runtime.block_on(Host::with(MemoryStream::new("s", 1)));
    let packets = prop_oneof![
        Just(Packet::from(publish("a/b", QoS::ExactlyOnce, 3))),
        Just(Packet::from(Subscribe {
            packet_id: id(1),
            id: NonZeroU16::new(3).map(Into::into),
            user_properties: vec![("a".into(), "b".into())],
            topic_filters: vec![("a/+".into(), QOS1)],
        })),
        Just(pubrel(3)),
        Just(pubrec(1)),
        Just(Packet::PingRequest),
        Just(Packet::from(clean("again"))),
        Just(Packet::Disconnect(Disconnect::new(Reason::DisconnectWithWillMessage))),
    ];
    let damage = (any::<prop::sample::Index>(), any::<u8>());
    let strategy = (prop::collection::vec(packets, 0..6), prop::collection::vec(damage, 0..4), any::<bool>());
    let config = ProptestConfig { cases: 300, ..ProptestConfig::default() };
    proptest!(config, |((packets, damage, connect) in strategy)| {
        let mut bytes = BytesMut::new();
        let mut codec = Codec::default();
        if connect {
            codec.encode(clean("bad").into(), &mut bytes).unwrap();
        }
        let begin = if connect { bytes.len() } else { 0 };
        for packet in packets {
            codec.encode(packet, &mut bytes).unwrap();
        }
        let len = bytes.len() - begin;
        for (at, value) in damage.into_iter().filter(|_| len > 0) {
            let at = begin + at.index(len);
            bytes[at] = value;
        }
        runtime.block_on(async {
            let mut bad = TcpStream::connect(host.address).await.unwrap();
            // Refused already, perhaps.
            let _ = bad.write_all(&bytes).await;
            let _ = bad.shutdown().await;
            let mut rest = Vec::new();
            let _ = timeout(HUNG_AFTER, bad.read_to_end(&mut rest)).await.expect("the listener lets go");
        });
    });
    runtime.block_on(async {
        host.clean("honest").await.nothing_but_ping().await;
        host.stop().await;
    });
}
