//! Targets of [`crate::fuzzing`]: what a client sends, and what lies in the
//! state of the streams.

use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::config::Config;
use super::copies::Copies;
use super::engines::Engines;
use super::lineages::Lineages;
use super::outbound::Message;
use super::owner::Owner;
use super::session::Change;
use super::subscriptions::{FILTER_LEVELS_MAX, Filter, Found, Options, Path, Tree};
use super::wire::{self, OutPublish, Version};
use super::{Broker, Deps, append_unawaited, connection as serving, fanout};
use crate::access::{self, Access};
use crate::batch::Offset;
use crate::ingest::Ingest;
use crate::listeners::transport::fuzzing::somebody;
use crate::stream::memory::MemoryStream;
use crate::stream::{Read, Stream, Streams};
use crate::telemetry::Failures;
use crate::topic::TopicFilter;
use crate::units::Period;

mod session;

pub use self::session::session;
pub use crate::listeners::transport::fuzzing::{proxy_header, websocket};

const PACKET_BYTES_MAX: usize = 64 << 10;
/// So short that no bound on packets in flight is met.
const SENT_BYTES_MAX: usize = 4 << 10;

/// First byte: the version; then packets.
pub fn packets(data: &[u8]) {
    let Some((&first, mut rest)) = data.split_first() else { return };
    let version = match first & 3 {
        0 => Version::V3,
        2 => Version::V31,
        _ => Version::V5,
    };
    while let Ok(Some(frame)) = wire::frame(rest, PACKET_BYTES_MAX) {
        let (whole, after) = rest.split_at(frame.len);
        assert!(matches!(wire::frame(&whole[..frame.len - 1], PACKET_BYTES_MAX), Ok(None)), "half a packet");
        match frame.first & 0xf0 {
            0x10 => drop(wire::check_connect(version, frame.body)),
            wire::PUBLISH => publish(version, &frame),
            0x40..=0x70 => drop(wire::ack(version, &frame)),
            _ => {}
        }
        drop(wire::decode(version, whole));
        rest = after;
    }
}

/// What is read as a PUBLISH is written as one that is read the same.
fn publish(version: Version, frame: &wire::Frame<'_>) {
    let Ok(read) = wire::publish(version, frame) else { return };
    let _ = wire::properties(read.properties, |_| {});
    let wire::Publish { qos, retain, dup, topic, packet_id, properties, payload } = read;
    let mut bytes = BytesMut::new();
    OutPublish { qos, retain, dup, topic, alias: 0, packet_id, properties, payload }.put(version, &mut bytes);
    let again = wire::frame(&bytes, usize::MAX).ok().flatten().expect("a whole packet");
    assert_eq!((wire::publish(version, &again), again.len), (Ok(read), bytes.len()));
}

/// The properties of a message as they go to an MQTT 5 subscriber.
pub fn sent_properties(block: &[u8]) {
    let message = Message::new("a/b", b"payload", block, 1, 0);
    wire::properties(message.properties(), |_| {}).expect("what a subscriber may be sent");
}

thread_local! {
    static RUNTIME: tokio::runtime::Runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime without I/O");
}

/// Serves a client that sends `pieces` and leaves; returns what it was told.
async fn converse(broker: &Arc<Broker>, pieces: Vec<Bytes>) -> Vec<u8> {
    let (told, gone) = (Arc::new(Mutex::new(Vec::new())), Arc::default());
    let io = Pipe { pieces: pieces.into(), waits: true, room: None, told: told.clone(), gone };
    let (remote, place) = somebody();
    tokio::task::unconstrained(serving::serve(broker.clone(), io, remote, place)).await;
    told.lock().map(|told| told.clone()).unwrap_or_default()
}

/// First byte: bit 0 delivers to the client what it publishes, bit 1 begins with
/// a full disk. Second byte: how the rest, what the client sends, is cut.
pub fn connection(data: &[u8]) {
    let [mode, cut, sent @ ..] = data else { return };
    let sent = &sent[..sent.len().min(SENT_BYTES_MAX)];
    let (delivers, full) = (mode & 1 != 0, mode & 2 != 0);
    let one = Conversation::with(vec![Bytes::copy_from_slice(sent)], delivers, full);
    let other = Conversation::with(pieces(sent, *cut), delivers, full);
    // When a message is delivered, and what a full disk drops, may depend on time.
    if !delivers && !full {
        assert_eq!(one, other);
    }
}

fn pieces(sent: &[u8], cut: u8) -> Vec<Bytes> {
    let mut state = u32::from(cut);
    let (mut pieces, mut rest) = (Vec::new(), sent);
    while !rest.is_empty() {
        state = state.wrapping_mul(1_103_515_245).wrapping_add(12_345);
        let len = if cut == 0 { 1 } else { 1 + (state >> 16) as usize % usize::from(cut) };
        let (piece, after) = rest.split_at(len.min(rest.len()));
        pieces.push(Bytes::copy_from_slice(piece));
        rest = after;
    }
    pieces
}

/// What came of a connection, but for times and random names.
#[derive(Debug, PartialEq, Eq)]
struct Conversation {
    /// What the client was told, in the order of the bytes: deliveries and acks
    /// may go out sooner or later.
    told: Vec<Vec<u8>>,
    /// Topic, payload, flags.
    messages: Vec<(String, Vec<u8>, u16)>,
    /// Keys of the streams' state, counted by their kind.
    state: BTreeMap<Vec<u8>, usize>,
}

impl Conversation {
    fn with(pieces: Vec<Bytes>, delivers: bool, full: bool) -> Self {
        RUNTIME.with(|runtime| runtime.block_on(Self::take_place(pieces, delivers, full)))
    }

    async fn take_place(pieces: Vec<Bytes>, delivers: bool, full: bool) -> Self {
        let (stream, store) = (MemoryStream::with_hooks("s", 2), MemoryStream::with_hooks("broker", 1));
        let mut config = Config::default();
        if full {
            // CONNECT may wait for room, and nothing is read that would make it.
            config.connect_timeout = Period(Duration::from_millis(1));
        }
        let broker = broker(&config, stream.clone(), store.clone());
        let (told, gone) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Notify::new()));
        let room = full.then(|| (pieces.len() / 2, stream.clone()));
        if full {
            stream.set_no_space(true);
        }
        let io = Pipe { pieces: pieces.into(), waits: true, room, told: told.clone(), gone: gone.clone() };
        let (remote, place) = somebody();
        let served = tokio::task::unconstrained(serving::serve(broker.clone(), io, remote, place));
        let delivered = async {
            if delivers {
                fanout::run(broker.clone(), 0).await;
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            biased;
            () = served => {}
            // A will waits on.
            () = gone.notified() => {}
            () = delivered => {}
        }
        let told = told.lock().map(|told| told.clone()).unwrap_or_default();
        Self { told: packets_told(&told), messages: messages(&*stream), state: kinds([&*stream, &*store]) }
    }
}

/// CONNACK first, then whole packets that a codec reads. Deliveries, PUBREL and
/// what names a client by chance are left out.
fn packets_told(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut told = Vec::new();
    let mut rest = bytes;
    let mut version = Version::V3;
    while !rest.is_empty() {
        let frame = wire::frame(rest, usize::MAX).ok().flatten().expect("whole packets");
        let (whole, after) = rest.split_at(frame.len);
        let is_connack = frame.first == 0x20;
        assert_eq!(is_connack, rest.len() == bytes.len(), "CONNACK comes first and once");
        if is_connack && frame.body.len() > 2 {
            version = Version::V5;
        }
        assert!(wire::decode(version, whole).is_ok(), "{whole:?}");
        match frame.first & 0xf0 {
            0x20 => told.push(vec![0x20, frame.body[0], frame.body[1]]),
            wire::PUBLISH | 0x60 => {}
            _ => told.push(whole.to_vec()),
        }
        rest = after;
    }
    told.sort();
    told
}

fn messages(stream: &dyn Stream) -> Vec<(String, Vec<u8>, u16)> {
    use futures_util::FutureExt;
    let mut messages = Vec::new();
    let mut cursor = stream.cursor(Offset(0));
    while let Some(Ok(Some(Read::Batch(batch)))) = cursor.try_next().now_or_never() {
        let of = batch.messages().map(|m| (m.topic().to_owned(), m.payload().to_vec(), m.entry.flags));
        messages.extend(of);
    }
    messages
}

fn kinds<const N: usize>(streams: [&dyn Stream; N]) -> BTreeMap<Vec<u8>, usize> {
    let mut kinds = BTreeMap::new();
    for (key, _) in streams.iter().flat_map(|stream| stream.state(b"")) {
        *kinds.entry(key[..key.len().min(2)].to_vec()).or_default() += 1;
    }
    kinds
}

/// What connections share, without a listener.
pub(super) fn broker(config: &Config, stream: Arc<dyn Stream>, store: Arc<dyn Stream>) -> Arc<Broker> {
    broker_at(config, stream, store, super::system_clock())
}

pub(super) fn broker_at(
    config: &Config,
    stream: Arc<dyn Stream>,
    store: Arc<dyn Stream>,
    clock: super::ClockSource,
) -> Arc<Broker> {
    broker_of(config, Streams::new(vec![], stream), store, clock)
}

fn broker_of(
    config: &Config,
    streams: Streams,
    store: Arc<dyn Stream>,
    clock: super::ClockSource,
) -> Arc<Broker> {
    let deps = Deps {
        ingest: Arc::new(Ingest::new(streams, Arc::default())),
        broker: store,
        access_plugins: None,
        failures: Failures::default(),
        background: tokio::runtime::Handle::current(),
        clock,
        shutdown: CancellationToken::new(),
    };
    let access = Access::open(
        None,
        &Default::default(),
        &access::Deps { secret: &[0; 32], plugins: None, wait_max: Duration::ZERO, failures: &deps.failures },
    )
    .expect("there are no rules");
    let mut lineages = Lineages::read(&*deps.broker, deps.ingest.streams());
    let copies = Copies::new(&deps, 1 << 20, &mut lineages);
    let broker = Broker::new(config, (access, Engines::default()), copies, lineages, deps);
    // A store without room has it done later.
    let _ = broker.renew_records();
    broker
}

/// A client that sends pieces, each after a wait, then leaves; it reads everything.
struct Pipe {
    pieces: VecDeque<Bytes>,
    waits: bool,
    /// With so many pieces left the stream has room again.
    room: Option<(usize, Arc<MemoryStream>)>,
    told: Arc<Mutex<Vec<u8>>>,
    gone: Arc<Notify>,
}

impl AsyncRead for Pipe {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let left = self.pieces.len();
        if let Some((_, stream)) = self.room.take_if(|(until, _)| left <= *until) {
            stream.set_no_space(false);
        }
        self.waits = !self.waits;
        if !self.waits {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if let Some(mut piece) = self.pieces.pop_front() {
            let now = piece.split_to(piece.len().min(out.remaining()));
            out.put_slice(&now);
            if !piece.is_empty() {
                self.pieces.push_front(piece);
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        if let Ok(mut told) = self.told.lock() {
            told.extend_from_slice(bytes);
        }
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        self.gone.notify_one();
    }
}

/// A line each: `>` and a topic, or a filter.
pub fn topic_filters(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut tree = Tree::default();
    let mut filters: Vec<Filter> = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('>')).take(64) {
        let deep = line.split('/').nth(FILTER_LEVELS_MAX).is_some();
        let Some(filter) = Filter::parse(line).filter(|_| !deep) else { continue };
        let options = Options { qos: 1, no_local: false, retain_as_published: false, id: 0 };
        assert!(tree.insert(filter.as_str(), filters.len() as u64, (), options, true));
        filters.push(filter);
    }
    let check = |tree: &Tree<()>, filters: &BTreeMap<u64, &Filter>| {
        for topic in text.lines().filter_map(|line| line.strip_prefix('>')).take(64) {
            let mut found = Vec::new();
            tree.matches(topic, &mut Path::default(), &mut |met| match met {
                Found::One(subscriber) => found.push(subscriber.number),
                Found::Share(share) => found.extend(share.members.iter().map(|member| member.number)),
            });
            found.sort_unstable();
            let of = |by: fn(&TopicFilter, &str) -> bool| -> Vec<u64> {
                let met = filters.iter().filter(|(_, filter)| by(filter.topics(), topic));
                met.map(|(number, _)| *number).collect()
            };
            assert_eq!((&found, of(TopicFilter::matches)), (&of(naive), found.clone()), "{topic}");
        }
    };
    let mut numbered: BTreeMap<u64, &Filter> = (0..).zip(&filters).collect();
    check(&tree, &numbered);
    for number in (0..filters.len() as u64).filter(|number| number % 3 != 0) {
        let filter = numbered.remove(&number).expect("it is there");
        assert!(tree.remove(filter.as_str(), number).is_some());
    }
    check(&tree, &numbered);
}

/// MQTT 5.0, 4.7, word by word.
fn naive(filter: &TopicFilter, topic: &str) -> bool {
    fn levels(filter: &[&str], topic: &[&str]) -> bool {
        match (filter, topic) {
            (["#"], _) | ([], []) => true,
            ([first, filter @ ..], [level, topic @ ..]) if *first == "+" || first == level => {
                levels(filter, topic)
            }
            _ => false,
        }
    }
    let filter: Vec<&str> = filter.as_str().split('/').collect();
    if topic.starts_with('$') && matches!(filter[0], "#" | "+") {
        return false;
    }
    levels(&filter, &topic.split('/').collect::<Vec<_>>())
}

/// Entries of the state: which stream and kind, length of the rest of the key,
/// two bytes of length of the value, key, value.
pub fn broker_state(data: &[u8]) {
    const KINDS: [&[u8]; 10] = [b"se", b"sf", b"q2", b"rt", b"wi", b"qr", b"oi", b"os", b"", b"sh"];
    let (stream, store) = (MemoryStream::new("s", 2), MemoryStream::new("broker", 1));
    let mut rest = data;
    while let [kind, key_len, high, low, after @ ..] = rest {
        let value_len = usize::from(u16::from_be_bytes([*high, *low]));
        let Some((key, after)) = after.split_at_checked((*key_len).into()) else { break };
        let Some((value, after)) = after.split_at_checked(value_len) else { break };
        let key = [KINDS[usize::from(kind & 0x7f) % KINDS.len()], key].concat();
        let change: Change = (key, Some(value.to_vec()));
        append_unawaited(if kind & 0x80 == 0 { &*store } else { &*stream }, &[change]);
        rest = after;
    }
    // The clock's record is another at each start.
    let all = || {
        let mut all = [store.state(b""), stream.state(b"")];
        all[0].retain(|(key, _)| key != super::clock::KEY);
        all
    };
    let config = Config::default();
    // Nothing runs on it: there is no connection.
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let _within = runtime.enter();
    let loaded = broker(&config, stream.clone(), store.clone());
    let (left, sessions) = (all(), loaded.sessions.len());
    // What could not be read was taken away at once.
    let again = broker(&config, stream.clone(), store.clone());
    assert_eq!((all(), again.sessions.len()), (left, sessions));
    for session in again.sessions.all() {
        let client_id = &*session.client_id;
        runtime.block_on(again.wills.client_is_back(&again, client_id, &Owner::default(), false));
    }
    runtime.block_on(again.sessions.sweep(&again));
    assert!(again.sessions.len() <= sessions);
}
