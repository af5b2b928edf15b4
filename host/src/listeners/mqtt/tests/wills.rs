//! When a will is published.

use futures_util::FutureExt;
use tokio::time::Instant;

use super::*;
use crate::listeners::mqtt::owner::Owner;
use crate::listeners::mqtt::will::{self, Will};
use crate::listeners::transport::fuzzing::somebody;

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
    stream: Arc<MemoryStream>,
    store: Arc<MemoryStream>,
}

impl Lost {
    async fn new(delay_s: u32, expiry_s: u32) -> Self {
        Self::with_room(delay_s, expiry_s, true).await
    }

    async fn with_room(delay_s: u32, expiry_s: u32, has_room: bool) -> Self {
        let stream = MemoryStream::with_hooks("s", 1);
        let store = MemoryStream::with_hooks("broker", 1);
        let broker = broker(&Config::default(), stream.clone(), store.clone());
        let (session, turn) = broker.sessions.claim("c", 9).await.unwrap();
        let opened = broker.sessions.open(&broker, &session, Owner::default(), false, expiry_s).await;
        assert_eq!(opened, Ok(false));
        let mut will = will(delay_s);
        let place = broker.wills.enter(&broker, will.state_bytes("c")).unwrap();
        will.keep(&broker, "c", place).await.unwrap();
        stream.set_no_space(!has_room);
        will::lost(&broker, "c", expiry_s, will).await;
        broker.sessions.close(&broker, &session, turn, None, broker.clock.now_us()).await;
        Self { broker, stream, store }
    }

    /// Wills published, and wills kept.
    fn wills(&self) -> (u64, usize) {
        (self.stream.bounds().end.0, self.stream.state(b"wi").len())
    }

    /// The client connects again.
    async fn back(&self, clean: bool) {
        let (session, _turn) = self.broker.sessions.claim("c", 9).await.unwrap();
        let owner = Owner::default();
        let resumed = self.broker.sessions.open(&self.broker, &session, owner.clone(), clean, 600).await;
        self.broker.wills.client_is_back(&self.broker, "c", &owner, resumed.unwrap()).await;
    }

    /// What comes of wills in so many seconds.
    fn after(&self, seconds: u64) -> (u64, usize) {
        self.broker.wills.publish_due(&self.broker, Instant::now() + Duration::from_secs(seconds));
        self.wills()
    }
}

fn will(delay_s: u32) -> Will {
    Will {
        topic: "will".into(),
        payload: "gone".into(),
        properties: Vec::new(),
        flags: 1,
        delay_s,
        device: None,
        record: None,
    }
}

#[tokio::test]
async fn a_connect_that_is_given_up_is_no_return_of_the_client() {
    let lost = Lost::new(1, 600).await;
    {
        let sessions = &lost.broker.sessions;
        let (session, _turn) = sessions.claim("c", 9).await.unwrap();
        lost.store.set_no_space(true);
        let opened = sessions.open(&lost.broker, &session, Owner::default(), false, 600).now_or_never();
        assert_eq!(opened, None, "it waits for room");
        lost.store.set_no_space(false);
    }
    assert_eq!(lost.after(1), (1, 0));
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
    let (remote, place) = somebody();
    let mut input = BytesMut::new();
    let given_up = async {
        // What it does in the background is done meanwhile, on this thread.
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        biased;
        _ = handshake::accept(&broker, &mut io, &mut input, &remote, &place) => panic!("its will waits for room"),
        () = given_up => {}
    }
    assert_eq!(broker.sessions.len(), 1);
    broker.sessions.sweep(&broker).await;
    assert_eq!(broker.sessions.len(), 0);
    assert!(broker.wills.bytes() > 0, "its removal waits for room, too");
    stream.set_no_space(false);
    drop(broker.wills.enter(&broker, 1));
    assert_eq!(broker.wills.bytes(), 0);
}

#[tokio::test]
async fn a_will_counts_until_it_is_published_or_forgotten() {
    for (delay_s, is_back) in [(0, false), (600, true)] {
        let lost = Lost::new(delay_s, 600).await;
        assert_eq!(lost.broker.wills.bytes() > 0, is_back);
        if is_back {
            lost.back(false).await;
        }
        assert_eq!((lost.wills().1, lost.broker.wills.bytes()), (0, 0));
    }
}

#[tokio::test]
async fn a_will_that_is_forgotten_for_good_has_no_record_when_that_is_told() {
    let stream = MemoryStream::with_hooks("s", 1);
    let broker = broker(&Config::default(), stream.clone(), MemoryStream::new("broker", 1));
    for has_room in [true, false] {
        let mut will = will(0);
        let place = broker.wills.enter(&broker, will.state_bytes("c")).unwrap();
        will.keep(&broker, "c", place).await.unwrap();
        stream.set_no_space(!has_room);
        let forgotten = will.forget_durably(&broker).now_or_never();
        assert_eq!(forgotten, has_room.then_some(Ok(())));
        assert_eq!(stream.state(b"wi").is_empty(), has_room);
        stream.set_no_space(false);
        // What was given up for want of room is removed once there is some.
        drop(broker.wills.enter(&broker, 1));
        assert_eq!((stream.state(b"wi").len(), broker.wills.bytes()), (0, 0));
    }
}

#[tokio::test]
async fn wills_of_the_last_run_count_also_past_the_bound_until_their_clients_are_back() {
    let lost = Lost::new(600, 600).await;
    let config = Config { wills_bytes_max: ByteSize(1), ..Config::default() };
    let next = broker(&config, lost.stream.clone(), lost.store.clone());
    assert_eq!(next.wills.bytes(), lost.broker.wills.bytes());
    assert!(next.wills.enter(&next, 1).is_none());
    next.wills.client_is_back(&next, "c", &Owner::default(), false).await;
    assert_eq!((lost.wills(), next.wills.bytes()), ((0, 0), 0));
    assert!(next.wills.enter(&next, 1).is_some());
}

#[tokio::test]
async fn a_will_of_the_last_run_waits_for_its_own_user() {
    let stream = MemoryStream::with_hooks("s", 1);
    let run = || broker(&Config::default(), stream.clone(), MemoryStream::new("broker", 1));
    let first = run();
    let mut will = will(600);
    properties::push(&mut will.properties, Origin::Listener, "username", b"ann");
    let place = first.wills.enter(&first, will.state_bytes("c")).unwrap();
    will.keep(&first, "c", place).await.unwrap();
    let next = run();
    for owner in [Owner::Anonymous, Owner::User("bob".into())] {
        next.wills.client_is_back(&next, "c", &owner, false).await;
        assert_eq!(stream.state(b"wi").len(), 1, "{owner}");
    }
    next.wills.client_is_back(&next, "c", &Owner::User("ann".into()), false).await;
    assert_eq!((stream.state(b"wi").len(), stream.bounds().end), (0, Offset(0)));
}

#[tokio::test]
async fn a_will_that_meets_a_full_disk_is_published_once_there_is_room() {
    let lost = Lost::with_room(0, 600, false).await;
    assert_eq!(lost.after(1), (0, 1), "it waits");
    lost.stream.set_no_space(false);
    assert_eq!(lost.after(0), (0, 1), "not before its next try");
    assert_eq!(lost.after(3), (1, 0));
    assert_eq!(lost.broker.wills.bytes(), 0);
}

#[tokio::test]
async fn a_stream_without_room_keeps_no_record_of_wills_in_another() {
    let (full, free) = (MemoryStream::with_hooks("full", 1), MemoryStream::with_hooks("free", 1));
    let routed: (Vec<TopicFilter>, Arc<dyn Stream>) =
        (vec![TopicFilter::new("full/#").unwrap()], full.clone());
    let streams = Streams::new(vec![routed], free.clone());
    let host = Host::start(streams, MemoryStream::new("broker", 1), |_| {}).await;
    let broker = host.handle.clients().0.clone();
    let mut wills = Vec::new();
    for (client_id, topic) in [("a", "free"), ("b", "full/b"), ("c", "free"), ("d", "full/d")] {
        let mut will = Will { topic: topic.into(), ..will(0) };
        let place = broker.wills.enter(&broker, will.state_bytes(client_id)).unwrap();
        will.keep(&broker, client_id, place).await.unwrap();
        wills.push(will);
    }
    full.set_no_space(true);
    for will in wills {
        will.forget(&broker);
    }
    assert_eq!((full.state(b"wi").len(), free.state(b"wi").len()), (2, 0));
    full.set_no_space(false);
    drop(broker.wills.enter(&broker, 1));
    assert_eq!((full.state(b"wi").len(), broker.wills.bytes()), (0, 0));
    host.stop().await;
}

#[tokio::test]
async fn the_will_of_a_connection_that_is_taken_over_comes_before_what_the_new_one_publishes() {
    let stream = MemoryStream::new("s", 1);
    let host = Host::with(stream.clone()).await;
    for (round, delay_s) in [None, Some(600)].into_iter().enumerate() {
        let last_will = LastWill { will_delay_interval_sec: delay_s, ..last_will("state") };
        let (_old, _) = host
            .client(Connect { last_will: Some(last_will), session_expiry_interval_secs: 600, ..clean("c") })
            .await;
        // A clean start ends the session, and with it the will's delay.
        let mut new = host.clean("c").await;
        new.send(publish("state", QoS::AtLeastOnce, 1)).await;
        assert_eq!(new.receive().await, puback(1));
        let at = 2 * round as u64;
        let payloads = [batch(&*stream, at).await, batch(&*stream, at + 1).await]
            .map(|batch| batch.message(0).payload().to_vec());
        assert_eq!(payloads, [b"gone".to_vec(), b"21".to_vec()], "delay {delay_s:?}");
        new.send(Disconnect::default()).await;
        assert_eq!(new.try_receive().await, None);
    }
    host.stop().await;
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
    for (delay_s, expiry_s) in [(60, 600), (600, 60)] {
        let lost = Lost::new(delay_s, expiry_s).await;
        assert_eq!(lost.wills(), (0, 1));
        assert_eq!(lost.after(30), (0, 1), "not before its time");
        assert_eq!(lost.after(60), (1, 0));
    }
    assert_eq!(Lost::new(0, 600).await.wills(), (1, 0));
}

#[tokio::test]
async fn a_waiting_will_is_published_at_its_time() {
    let lost = Lost::new(1, 600).await;
    let waiting = tokio::spawn(will::publish_waiting(lost.broker.clone()));
    let cursor = &mut lost.stream.cursor(Offset(0));
    assert!(timeout(HUNG_AFTER, cursor.next()).await.expect("published in the end").is_ok());
    lost.broker.shutdown.cancel();
    timeout(HUNG_AFTER, waiting).await.expect("it ends").unwrap();
}

#[tokio::test]
async fn a_waiting_will_is_forgotten_when_its_session_goes_on_and_sent_when_that_ends() {
    for (clean, published) in [(false, 0), (true, 1)] {
        let lost = Lost::new(600, 600).await;
        assert_eq!(lost.wills(), (0, 1));
        lost.back(clean).await;
        assert_eq!(lost.wills(), (published, 0), "clean start: {clean}");
        assert_eq!(lost.after(600), (published, 0));
    }
}

#[tokio::test]
async fn a_waiting_will_stays_for_the_next_run_at_a_shutdown() {
    let lost = Lost::new(600, 600).await;
    lost.broker.shutdown.cancel();
    timeout(HUNG_AFTER, will::publish_waiting(lost.broker.clone())).await.expect("the host stops");
    assert_eq!(lost.wills(), (0, 1));
}

#[tokio::test]
async fn a_will_that_waits_for_room_comes_before_the_next_connection_of_its_client() {
    let lost = Lost::with_room(0, 600, false).await;
    {
        let mut back = std::pin::pin!(lost.back(false));
        assert_eq!(back.as_mut().now_or_never(), None, "its stream has no room");
        lost.stream.set_no_space(false);
        back.await;
        assert_eq!(lost.wills(), (1, 0));
    }
    // Given up, it still waits.
    let lost = Lost::with_room(0, 600, false).await;
    assert_eq!(lost.back(false).now_or_never(), None);
    lost.stream.set_no_space(false);
    assert_eq!(lost.after(1), (1, 0));
}

#[tokio::test]
async fn a_connect_that_is_given_up_while_an_older_will_waits_for_room_leaves_no_will_and_voids_none() {
    let (full, free) = (MemoryStream::with_hooks("full", 1), MemoryStream::with_hooks("free", 1));
    let routed: (Vec<TopicFilter>, Arc<dyn Stream>) =
        (vec![TopicFilter::new("full/#").unwrap()], full.clone());
    let streams = Streams::new(vec![routed], free.clone());
    let host = Host::start(streams, MemoryStream::new("broker", 1), |_| {}).await;
    let broker = host.handle.clients().0.clone();
    let (session, turn) = broker.sessions.claim("c", 9).await.unwrap();
    broker.sessions.open(&broker, &session, Owner::default(), false, 600).await.unwrap();
    full.set_no_space(true);
    for (topic, delay_s) in [("full/old", 0), ("free/old", 600)] {
        let mut will = Will { topic: topic.into(), ..will(delay_s) };
        if delay_s > 0 {
            let place = broker.wills.enter(&broker, will.state_bytes("c")).unwrap();
            will.keep(&broker, "c", place).await.unwrap();
        }
        will::lost(&broker, "c", 600, will).await;
    }
    broker.sessions.close(&broker, &session, turn, None, broker.clock.now_us()).await;
    let before = broker.wills.bytes();
    for _ in 0..3 {
        let (mut client, mut io) = tokio::io::duplex(1_024);
        let connect = Connect { last_will: Some(last_will("free/new")), ..resuming("c") };
        let mut sent = BytesMut::new();
        Codec::default().encode(connect.into(), &mut sent).unwrap();
        client.write_all(&sent).await.unwrap();
        let ((remote, place), mut input) = (somebody(), BytesMut::new());
        let given_up = async {
            while free.state(b"wi").len() < 2 {
                tokio::task::yield_now().await;
            }
            // It is durable at once, and its connect waits for the older one.
            for _ in 0..10 {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            biased;
            _ = handshake::accept(&broker, &mut io, &mut input, &remote, &place) => panic!("it waits for room"),
            () = timeout(HUNG_AFTER, given_up).map(|kept| kept.expect("the new will is kept")) => {}
        }
        assert_eq!((free.state(b"wi").len(), broker.wills.bytes()), (1, before), "the older one's only");
    }
    full.set_no_space(false);
    broker.wills.client_is_back(&broker, "c", &Owner::default(), true).await;
    assert_eq!((full.bounds().end, free.bounds().end), (Offset(1), Offset(0)));
    assert_eq!((free.state(b"wi").len(), broker.wills.bytes()), (0, 0), "void, once the client is back");
    host.stop().await;
}

#[tokio::test]
async fn a_will_for_a_topic_of_60_000_bytes_is_kept_and_published() {
    let host = Host::with(MemoryStream::new("s", 1)).await;
    let mut watcher = host.clean("w").await;
    watcher.subscribe("#", QOS1).await;
    let topic: &'static str = "x".repeat(60_000).leak();
    let connect = Connect {
        last_will: Some(LastWill { retain: true, ..last_will(topic) }),
        session_expiry_interval_secs: 60,
        clean_start: false,
        ..clean("lost")
    };
    drop(host.client(connect).await);
    assert_eq!(&*watcher.received().await.topic, topic);
    host.stop().await;
}
