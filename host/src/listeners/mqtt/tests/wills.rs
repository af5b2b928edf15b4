//! When a will is published.

use futures_util::FutureExt;
use tokio::time::Instant;

use super::*;
use crate::listeners::mqtt::transport::fuzzing::somebody;
use crate::listeners::mqtt::will::{self, Will};

#[tokio::test]
async fn a_will_is_published_when_its_client_is_lost_and_only_then() {
    let host = Host::with(MemoryStream::new("s", 1)).await;
    let mut watcher = host.clean("w").await;
    watcher.subscribe("will/+", QOS1).await;
    let with_will = |client_id: &'static str, topic: &'static str| Connect {
        last_will: Some(last_will(topic)),
        ..clean(client_id)
    };
    let (mut polite, _) = host.client(with_will("polite", "will/polite")).await;
    polite.send(Packet::Disconnect(Disconnect::new(Reason::NormalDisconnection))).await;
    assert_eq!(polite.try_receive().await, None);
    drop(host.client(with_will("lost", "will/lost")).await);
    assert_eq!(&*watcher.received().await.topic, "will/lost");
    host.stop().await;
}

/// A client that was lost, with a will that waits `delay_s`; the stream that the will is for.
struct Lost {
    broker: Arc<Broker>,
    stream: Arc<dyn Stream>,
    store: Arc<MemoryStream>,
    session: Arc<session::Session>,
    will: Will,
}

impl Lost {
    async fn new(delay_s: u32, expiry_s: u32) -> Self {
        let stream = MemoryStream::new("s", 1);
        let store = MemoryStream::with_hooks("broker", 1);
        let broker = broker(&Config::default(), stream.clone(), store.clone());
        let (session, turn) = broker.sessions.claim("c", 9).await.unwrap();
        assert_eq!(broker.sessions.open(&broker, &session, false, expiry_s).await, Ok(false));
        let mut will = Will {
            topic: "will".into(),
            payload: "gone".into(),
            properties: Vec::new(),
            flags: 1,
            delay_s,
            device: None,
            record: None,
        };
        let place = broker.wills.enter(&broker, will.state_bytes("c")).unwrap();
        will.keep(&broker, "c", place).await.unwrap();
        broker.sessions.close(&broker, &session, turn, None);
        Self { broker, stream, store, session, will }
    }

    fn seen(self) -> (Seen, impl Future<Output = ()>) {
        let Self { broker, stream, store, session, will } = self;
        let (connects, epoch) = (session.connects.load(Ordering::Acquire), session.epoch());
        let seen = Seen { broker: broker.clone(), stream, store };
        (seen, async move { will::lost(&broker, &session, connects, epoch, will).await })
    }
}

struct Seen {
    broker: Arc<Broker>,
    stream: Arc<dyn Stream>,
    store: Arc<MemoryStream>,
}

impl Seen {
    /// Wills published, and wills kept.
    fn wills(&self) -> (u64, usize) {
        (self.stream.bounds().end.0, self.stream.state(b"wi").len())
    }

    /// The client connects again.
    async fn back(&self, clean: bool) {
        let (session, _turn) = self.broker.sessions.claim("c", 9).await.unwrap();
        self.broker.sessions.open(&self.broker, &session, clean, 600).await.unwrap();
        session.connected(clients::Connection {
            version: "5.0".into(),
            address: "test".into(),
            user: None,
            since_us: 0,
            keep_alive_s: 0,
        });
    }
}

#[tokio::test]
async fn a_connect_that_is_given_up_is_no_return_of_the_client() {
    let (seen, lost) = Lost::new(1, 600).await.seen();
    {
        let sessions = &seen.broker.sessions;
        let (session, _turn) = sessions.claim("c", 9).await.unwrap();
        seen.store.set_no_space(true);
        let opened = sessions.open(&seen.broker, &session, false, 600).now_or_never();
        assert_eq!(opened, None, "it waits for room");
        seen.store.set_no_space(false);
    }
    timeout(HUNG_AFTER, lost).await.expect("published in the end");
    assert_eq!(seen.wills(), (1, 0));
}

#[tokio::test]
async fn a_connect_that_is_given_up_over_its_will_leaves_no_session() {
    let stream = MemoryStream::with_hooks("s", 1);
    let broker = broker(&Config::default(), stream.clone(), MemoryStream::new("broker", 1));
    let connect = Connect { last_will: Some(last_will("will")), ..clean("c") };
    let (mut client, mut io) = tokio::io::duplex(1_024);
    let mut sent = BytesMut::new();
    Codec::default().encode(connect.into(), &mut sent).unwrap();
    client.write_all(&sent).await.unwrap();
    stream.set_no_space(true);
    let (remote, _) = somebody();
    let mut input = BytesMut::new();
    let given_up = async {
        // What it does in the background is done meanwhile, on this thread.
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        biased;
        _ = handshake::accept(&broker, &mut io, &mut input, &remote) => panic!("its will waits for room"),
        () = given_up => {}
    }
    assert_eq!(broker.sessions.len(), 1);
    broker.sessions.sweep(&broker);
    assert_eq!(broker.sessions.len(), 0);
    assert!(broker.wills.bytes() > 0, "its removal waits for room, too");
    stream.set_no_space(false);
    drop(broker.wills.enter(&broker, 1));
    assert_eq!(broker.wills.bytes(), 0);
}

#[tokio::test]
async fn a_will_counts_until_it_is_published_or_forgotten() {
    for (delay_s, is_back) in [(0, false), (600, true)] {
        let (seen, lost) = Lost::new(delay_s, 600).await.seen();
        assert!(seen.broker.wills.bytes() > 0);
        if is_back {
            seen.back(false).await;
        }
        timeout(HUNG_AFTER, lost).await.expect("it waits for nobody");
        assert_eq!((seen.wills().1, seen.broker.wills.bytes()), (0, 0));
    }
}

#[tokio::test]
async fn wills_of_the_last_run_count_also_past_the_bound_until_their_clients_are_back() {
    let (seen, _lost) = Lost::new(600, 600).await.seen();
    let config = Config { wills_bytes_max: ByteSize(1), ..Config::default() };
    let next = broker(&config, seen.stream.clone(), seen.store.clone());
    assert_eq!(next.wills.bytes(), seen.broker.wills.bytes());
    assert!(next.wills.enter(&next, 1).is_none());
    next.wills.client_is_back(&next, "c");
    assert_eq!((seen.wills().1, next.wills.bytes()), (0, 0));
    assert!(next.wills.enter(&next, 1).is_some());
}

#[tokio::test]
async fn a_client_whose_will_is_too_large_or_finds_no_room_is_refused_and_takes_nothing_over() {
    let streams = Streams::new(vec![], MemoryStream::new("s", 1));
    let host = Host::start(streams, MemoryStream::new("broker", 1), |config| {
        (config.will_bytes_max, config.wills_bytes_max) = (ByteSize(1_000), ByteSize(1_500));
    })
    .await;
    let leaving = |client_id: &'static str, payload_len: usize| Connect {
        last_will: Some(LastWill { message: vec![b'x'; payload_len].into(), ..last_will("will") }),
        ..clean(client_id)
    };
    let (mut first, ack) = host.client(leaving("first", 800)).await;
    assert_eq!(ack.reason_code, ConnectAckReason::Success);
    let mut second = host.clean("second").await;
    for (client_id, payload_len, reason) in [
        ("second", 1_000, ConnectAckReason::PacketTooLarge),
        ("second", 800, ConnectAckReason::QuotaExceeded),
        ("third", 800, ConnectAckReason::QuotaExceeded),
    ] {
        let (mut refused, ack) = host.client(leaving(client_id, payload_len)).await;
        assert_eq!((ack.reason_code, refused.try_receive().await), (reason, None), "{client_id}");
    }
    first.nothing_but_ping().await;
    second.nothing_but_ping().await;
    let (_third, ack) = host.client(leaving("third", 300)).await;
    assert_eq!(ack.reason_code, ConnectAckReason::Success);
    host.stop().await;
}

#[tokio::test]
async fn a_will_says_whose_it_is_as_a_publish_does() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("passwords");
    let mut users = crate::access::PasswordFile::default();
    users.set("ann", "ann", None).unwrap();
    std::fs::write(&file, users.to_text()).unwrap();
    let access = serde_json::json!({
        "authenticate": [{ "type": "passwords", "file": file }],
        "rules": [{ "effect": "allow", "topics": ["#"] }],
    });
    let stream = MemoryStream::new("s", 1);
    let host = Host::start(Streams::new(vec![], stream.clone()), MemoryStream::new("broker", 1), |config| {
        config.access = Some(serde_json::from_value(access).unwrap());
        config.keep_client_id = true;
    })
    .await;
    let topic = "acme/f/press/p7/state";
    let (mut client, _) = host
        .client(Connect {
            username: Some("ann".into()),
            password: Some("ann".into()),
            last_will: Some(last_will(topic)),
            ..clean("c")
        })
        .await;
    client.send(publish(topic, QoS::AtLeastOnce, 1)).await;
    assert_eq!(client.receive().await, puback(1));
    drop(client);
    let mut said = Vec::new();
    for from in 0..2 {
        let batch = batch(&*stream, from).await;
        let message = batch.messages().next().unwrap();
        said.push(
            ["username", "client-id"].map(|name| {
                properties::get(message.properties(), Origin::Listener, name).map(<[u8]>::to_vec)
            }),
        );
    }
    assert_eq!(said[0], [Some(b"ann".to_vec()), Some(b"c".to_vec())]);
    assert_eq!(said[1], said[0]);
    host.stop().await;
}

#[tokio::test]
async fn a_will_waits_for_its_delay_and_no_longer_than_its_session() {
    for (delay_s, expiry_s) in [(1, 600), (600, 1)] {
        let (seen, lost) = Lost::new(delay_s, expiry_s).await.seen();
        let begin = Instant::now();
        let mut lost = Box::pin(lost);
        assert_eq!((lost.as_mut().now_or_never(), seen.wills()), (None, (0, 1)));
        timeout(HUNG_AFTER, lost).await.expect("published in the end");
        assert_eq!(seen.wills(), (1, 0));
        assert!(begin.elapsed() >= Duration::from_secs(1), "not before its time");
    }
    let (seen, lost) = Lost::new(0, 600).await.seen();
    assert_eq!((lost.now_or_never(), seen.wills()), (Some(()), (1, 0)));
}

#[tokio::test]
async fn a_waiting_will_is_forgotten_when_its_session_goes_on_and_sent_when_that_ends() {
    for (clean, published) in [(false, 0), (true, 1)] {
        let (seen, lost) = Lost::new(600, 600).await.seen();
        let mut lost = Box::pin(lost);
        assert_eq!(lost.as_mut().now_or_never(), None);
        seen.back(clean).await;
        timeout(HUNG_AFTER, lost).await.expect("its client is back");
        assert_eq!(seen.wills(), (published, 0), "clean start: {clean}");
    }
}

#[tokio::test]
async fn a_waiting_will_stays_for_the_next_run_at_a_shutdown() {
    let (seen, lost) = Lost::new(600, 600).await.seen();
    seen.broker.shutdown.cancel();
    timeout(HUNG_AFTER, lost).await.expect("the host stops");
    assert_eq!(seen.wills(), (0, 1));
}
