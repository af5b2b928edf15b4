//! The listener over real sockets, against streams in memory. That something
//! has not been sent yet is shown by a PINGREQ: its answer comes first.

mod access;
mod acks;
mod activity;
mod copies;
mod limits;
mod memory;
mod reload;
mod sessions;
mod state_room;
mod subscribers;
mod subscribing;
mod sys;
mod versions;
mod wills;

use std::net::SocketAddr;
use std::num::NonZeroU16;

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;
use rmqtt_codec::types::{Publish, QoS};
use rmqtt_codec::v5::{
    Codec, Connect, ConnectAck, ConnectAckReason, Disconnect, DisconnectReasonCode as Reason, LastWill,
    Packet, PublishAck, PublishAck2, PublishAck2Reason, PublishAckReason, PublishProperties, RetainHandling,
    Subscribe, SubscribeAckReason, SubscriptionOptions, Unsubscribe, UnsubscribeAckReason,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_util::codec::{Decoder, Encoder};

use super::fuzzing::broker;
use super::*;
use crate::batch::{Batch, Offset};
use crate::properties::{self, Origin};
use crate::stream::Streams;
use crate::stream::memory::MemoryStream;
use crate::topic::TopicFilter;
use crate::units::ByteSize;

/// Only a hung test meets it.
const HUNG_AFTER: Duration = Duration::from_secs(30);

/// QoS 1, "gone".
fn last_will(topic: &'static str) -> LastWill {
    LastWill {
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
    }
}

struct Host {
    address: SocketAddr,
    shutdown: CancellationToken,
    handle: Handle,
}

impl Host {
    async fn start(streams: Streams, broker: Arc<dyn Stream>, change: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config::default();
        config.listeners[0].bind = "127.0.0.1:0".parse().unwrap();
        change(&mut config);
        let shutdown = CancellationToken::new();
        let deps = Deps {
            ingest: Arc::new(Ingest::new(streams, Arc::default())),
            broker,
            failures: Failures::default(),
            access_plugins: None,
            background: tokio::runtime::Handle::current(),
            clock: system_clock(),
            shutdown: shutdown.clone(),
        };
        let handle = start(&config, deps).await.unwrap();
        Self { address: handle.addresses()[0].tcp().unwrap(), shutdown, handle }
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

struct Client<S = TcpStream> {
    io: S,
    input: BytesMut,
    codec: Codec,
}

impl Client {
    async fn open(host: &Host) -> Self {
        Self::over(TcpStream::connect(host.address).await.unwrap())
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    fn over(io: S) -> Self {
        Self { io, input: BytesMut::new(), codec: Codec::default() }
    }

    async fn send(&mut self, packet: impl Into<Packet>) {
        self.send_all([packet.into()]).await;
    }

    /// In one write, which the host reads at once.
    async fn send_all(&mut self, packets: impl IntoIterator<Item = Packet>) {
        let mut out = BytesMut::new();
        for packet in packets {
            self.codec.encode(packet, &mut out).unwrap();
        }
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

fn not_allowed(packet_id: u16) -> PublishAck {
    let reason_string = Some("publishing to this topic is not allowed".into());
    PublishAck { reason_code: PublishAckReason::NotAuthorized, reason_string, ..success(packet_id) }
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
