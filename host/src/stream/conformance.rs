//! The promises of every stream, as tests that any implementation runs.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::*;
use crate::batch::{Partition, flags};

/// Returns a message for a test.
pub fn message<'a>(topic: &'a str, payload: &'a [u8]) -> NewMessage<'a> {
    let device = topic.split('/').nth(1).unwrap_or("somebody");
    NewMessage {
        topic,
        payload,
        properties: b"",
        route: "",
        device,
        partition: Partition(0),
        flags: flags::UTF8,
        received_us: 7,
        event_us: 0,
    }
}

pub async fn durable(stream: &dyn Stream, ticket: Ticket) {
    stream.durable().wait_for(|durable| *durable >= ticket).await.expect("the stream runs");
}

/// Reads all messages from `from` to the end: offset and payload, or `None` for a gap.
pub async fn read_all(stream: &dyn Stream, from: u64) -> Vec<(u64, Option<Vec<u8>>)> {
    let mut cursor = stream.cursor(Offset(from));
    let mut all = Vec::new();
    while let Ok(Some(read)) = cursor.try_next().await {
        match read {
            Read::Batch(batch) => {
                all.extend(batch.messages().map(|m| (m.offset().0, Some(m.payload().to_vec()))));
            }
            Read::Gap { from, to, .. } => all.extend((from.0..to.0).map(|offset| (offset, None))),
        }
    }
    all
}

/// Runs the whole suite, each test on a new stream of 4 partitions.
pub async fn all(fresh: impl Fn() -> Arc<dyn Stream>) {
    a_message_comes_back_as_it_was(fresh()).await;
    all_but_topics(fresh).await;
}

/// Runs the suite without the tests of topics.
pub async fn all_but_topics(fresh: impl Fn() -> Arc<dyn Stream>) {
    an_append_is_adjacent_in_order_and_offsets_have_no_gaps(fresh()).await;
    a_waiting_cursor_gets_what_becomes_durable(fresh()).await;
    a_dropped_next_loses_nothing(fresh()).await;
    a_cursor_starts_at_any_offset_and_refuses_one_past_the_end(fresh()).await;
    time_leads_to_an_offset(fresh()).await;
    state_is_what_the_changes_left(fresh()).await;
    what_is_too_large_is_refused_whole(fresh()).await;
    close_commits_and_stops(fresh()).await;
    many_writers_lose_nothing(fresh()).await;
    a_reader_is_remembered_where_it_was_until_it_says_where_it_is(fresh());
}

/// What the reader can never receive is known when it states its position.
fn a_reader_is_remembered_where_it_was_until_it_says_where_it_is(stream: Arc<dyn Stream>) {
    for _ in 0..3 {
        stream.append(&[message("a/b", b"x")], &[]).expect("room for it");
    }
    let attach = |from| stream.attach("p/w", Offset(from), OnLag::Detach);
    for from in [0, 2, 3] {
        assert_eq!(attach(from).remembered(), Offset(0), "attached at {from}");
    }
    attach(2).advance(Offset(3));
    assert_eq!(attach(0).remembered(), Offset(3));
    attach(0).advance(Offset(1));
    assert_eq!(attach(0).remembered(), Offset(1), "it was restored, and said so");
}

async fn a_message_comes_back_as_it_was(stream: Arc<dyn Stream>) {
    let topic = "acme/sensor-1/reading";
    let mut properties = Vec::new();
    crate::properties::push(&mut properties, crate::properties::Origin::Device, "k", b"v");
    let sent = NewMessage {
        topic,
        payload: b"\x00\xffbody",
        properties: &properties,
        route: "alert",
        device: &topic[5..13],
        partition: Partition(3),
        flags: flags::EVENT_TIME | 1,
        received_us: 123,
        event_us: -5,
    };
    let bare = NewMessage { topic: "t", payload: b"", device: "client", route: "", ..sent };
    let appended = stream.append(&[sent, bare], &[]).expect("room for it");
    durable(&*stream, appended.ticket).await;
    let Read::Batch(batch) = stream.cursor(appended.first).next().await.expect("it is there") else {
        panic!("a gap")
    };
    let m = batch.message(0);
    assert_eq!((m.topic(), m.payload(), m.properties()), (topic, sent.payload, &properties[..]));
    assert_eq!((m.route(), m.device(), m.event_us()), ("alert", "sensor-1", Some(-5)));
    assert_eq!((m.entry.partition, m.entry.received_us, m.entry.flags), (Partition(3), 123, sent.flags));
    let m = batch.message(1);
    assert_eq!((m.topic(), m.payload(), m.device(), m.route()), ("t", &b""[..], "client", ""));
}

async fn an_append_is_adjacent_in_order_and_offsets_have_no_gaps(stream: Arc<dyn Stream>) {
    let mut last = Ticket::default();
    for i in 0..20_u8 {
        let payloads = [[i, 0], [i, 1], [i, 2]];
        let messages = payloads.each_ref().map(|payload| message("a/b", payload));
        let appended = stream.append(&messages, &[]).expect("room for it");
        assert_eq!(appended.first, Offset(3 * u64::from(i)));
        last = appended.ticket;
    }
    durable(&*stream, last).await;
    assert_eq!(stream.bounds(), Offset(0)..Offset(60));
    let expected: Vec<_> = (0..60).map(|n| (n, Some(vec![(n / 3) as u8, (n % 3) as u8]))).collect();
    assert_eq!(read_all(&*stream, 0).await, expected);
}

async fn a_waiting_cursor_gets_what_becomes_durable(stream: Arc<dyn Stream>) {
    let mut cursor = stream.cursor(Offset(0));
    assert!(cursor.try_next().await.expect("the stream runs").is_none());
    let waiting = tokio::spawn(async move { cursor.next().await.expect("the stream runs") });
    stream.append(&[message("a/b", b"x")], &[]).expect("room for it");
    assert!(matches!(waiting.await.expect("no panic"), Read::Batch(batch) if batch.len() == 1));
}

async fn a_dropped_next_loses_nothing(stream: Arc<dyn Stream>) {
    let mut cursor = stream.cursor(Offset(0));
    {
        let mut next = std::pin::pin!(cursor.next());
        assert!(futures_util::future::poll_immediate(&mut next).await.is_none());
    }
    stream.append(&[message("a/b", b"x")], &[]).expect("room for it");
    assert!(matches!(cursor.next().await.expect("the stream runs"), Read::Batch(batch) if batch.len() == 1));
    assert_eq!(cursor.position(), Offset(1));
}

async fn a_cursor_starts_at_any_offset_and_refuses_one_past_the_end(stream: Arc<dyn Stream>) {
    let messages = [b"0", b"1", b"2"].map(|payload| message("a/b", payload));
    let appended = stream.append(&messages, &[]).expect("room for it");
    durable(&*stream, appended.ticket).await;
    assert_eq!(read_all(&*stream, 2).await, [(2, Some(b"2".to_vec()))]);
    assert!(stream.cursor(Offset(3)).try_next().await.expect("its end is no error").is_none());
    let refused = stream.cursor(Offset(9)).try_next().await;
    assert!(matches!(refused, Err(ReadError::PastEnd { wanted: 9, end: 3 })));
}

async fn time_leads_to_an_offset(stream: Arc<dyn Stream>) {
    for payload in [b"0", b"1"] {
        let appended = stream.append(&[message("a/b", payload)], &[]).expect("room for it");
        durable(&*stream, appended.ticket).await;
    }
    let Read::Batch(second) = stream.cursor(Offset(1)).next().await.expect("it is there") else {
        panic!("a gap")
    };
    assert_eq!(stream.seek_time(0).await.expect("a time"), Offset(0));
    assert!(stream.seek_time(second.now_us).await.expect("a time") <= Offset(1));
    assert_eq!(stream.seek_time(u64::MAX).await.expect("a time"), Offset(2));
}

async fn state_is_what_the_changes_left(stream: Arc<dyn Stream>) {
    let put = |key, value| StateChange { key, value: Some(value) };
    stream.append(&[message("a/b", b"x")], &[put(b"q/2", b"two"), put(b"q/1", b"one")]).expect("room for it");
    let changes = [StateChange { key: b"q/2", value: None }, put(b"r", b"other"), put(b"q/1", b"new")];
    let appended = stream.append(&[], &changes).expect("room for it");
    assert_eq!(appended.first, Offset(1));
    assert_eq!(stream.state(b"q/"), [(b"q/1".to_vec(), b"new".to_vec())]);
    assert_eq!(stream.state(b"").len(), 2);
    durable(&*stream, appended.ticket).await;
    assert_eq!(stream.bounds(), Offset(0)..Offset(1));
}

async fn what_is_too_large_is_refused_whole(stream: Arc<dyn Stream>) {
    let key = vec![b'k'; STATE_KEY_BYTES_MAX + 1];
    let change = StateChange { key: &key, value: Some(b"") };
    let refused = stream.append(&[message("a/b", b"x")], &[change]);
    assert!(matches!(refused, Err(AppendError::TooLarge(_))));
    let huge = vec![0; 17 << 20];
    let refused = stream.append(&[message("a/b", b"x"), message("a/b", &huge)], &[]);
    assert!(matches!(refused, Err(AppendError::TooLarge(_))));
    assert_eq!(stream.append(&[message("a/b", b"x")], &[]).expect("room for it").first, Offset(0));
}

async fn close_commits_and_stops(stream: Arc<dyn Stream>) {
    stream.append(&[message("a/b", b"x")], &[]).expect("room for it");
    stream.close().await;
    stream.close().await;
    stream.stopped().await;
    assert_eq!(stream.bounds().end, Offset(1));
    assert!(matches!(stream.append(&[message("a/b", b"y")], &[]), Err(AppendError::Stopped(_))));
    assert!(stream.durable().changed().await.is_err());
    stream.writable().await;
    stream.out_of_space().await;
    let mut cursor = stream.cursor(Offset(0));
    assert!(matches!(cursor.next().await, Ok(Read::Batch(_))));
    assert!(matches!(cursor.next().await, Err(ReadError::Stopped(_))));
}

async fn many_writers_lose_nothing(stream: Arc<dyn Stream>) {
    let writers = (0..8_u8).map(|writer| {
        let stream = Arc::clone(&stream);
        tokio::spawn(async move {
            for n in 0..50_u8 {
                let payload = [writer, n];
                let appended = loop {
                    match stream.append(&[message("a/b", &payload)], &[]) {
                        Err(AppendError::Full) => stream.writable().await,
                        other => break other.expect("only full for a while"),
                    }
                };
                durable(&*stream, appended.ticket).await;
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.expect("no panic");
    }
    let mut seen: BTreeMap<u8, u8> = BTreeMap::new();
    for (_, payload) in read_all(&*stream, 0).await {
        let payload = payload.expect("no gap");
        let next = seen.entry(payload[0]).or_default();
        assert_eq!(payload[1], *next, "in order per writer, each once");
        *next += 1;
    }
    assert_eq!(seen.into_values().collect::<Vec<_>>(), [50; 8]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_conforms() {
    all(|| memory::MemoryStream::new("memory", 4)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn log_conforms() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let count = std::sync::atomic::AtomicU32::new(0);
    all(|| {
        let n = count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let dir = folder.path().join(n.to_string());
        let (log, recovery) =
            log::Log::open(Arc::new(log::RealDisk::default()), &dir, "log", &Config::default())
                .expect("a new folder");
        assert!(recovery.created && recovery.damaged.is_empty());
        log
    })
    .await;
}
