use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::last::{LAST_BYTES_LEAST, LAST_BYTES_MAX, LAST_OUT_MAX};
use super::*;
use crate::access::Identity;
use crate::listeners::mqtt::config::Config;
use crate::listeners::mqtt::fuzzing::broker;
use crate::listeners::mqtt::outbound::{self, Loader, Waits};
use crate::listeners::mqtt::wire::Version;
use crate::listeners::transport::Address;
use crate::listeners::transport::fuzzing::somebody;
use crate::stream::Stream;
use crate::stream::conformance::message;
use crate::stream::memory::MemoryStream;

/// A connection of a client that sends nothing.
fn silent(broker: &Arc<Broker>, session: Arc<Session>) -> Connection<'_, tokio::io::Empty> {
    connection(broker, session, tokio::io::empty())
}

pub(super) fn connection<S>(broker: &Arc<Broker>, session: Arc<Session>, io: S) -> Connection<'_, S> {
    connection_of(broker, session, Version::V5, io)
}

pub(super) fn connection_of<S>(
    broker: &Arc<Broker>,
    session: Arc<Session>,
    version: Version,
    io: S,
) -> Connection<'_, S> {
    let rights = broker.access.get().rights(Identity::default(), "c", None);
    Connection {
        broker,
        io,
        remote: Arc::new(somebody().0),
        session: session.clone(),
        peer: Peer { version, window: 1, packet_bytes_max: usize::MAX },
        auth: None,
        will: None,
        aliases: Aliases::new(0),
        inbound: Inbound::new(broker, (version, broker.config()), session, rights, false),
        changing: None,
        is_bridge: false,
        is_id_assigned: false,
        renewing: None,
        tells_reasons: false,
        input: BytesMut::new(),
        stopped_at: Next::Bytes,
        partial: None,
        out: BytesMut::new(),
        counted: 0,
        acks_waiting: Part::of(&broker.counters.acks_waiting),
        last_read: Instant::now(),
        keep_alive_s: Some(0),
        outward: None,
        drains: false,
        has_left: false,
        last: None,
    }
}

#[tokio::test]
async fn a_slow_reader_is_not_silent_while_it_is_not_read() {
    let stores = || MemoryStream::new("s", 1);
    let broker = &broker(&Config::default(), stores(), stores());
    for (unwritten, ends) in [(WRITE_PAUSE_BYTES, false), (WRITE_BYTES_MAX, true)] {
        let (session, _turn) = broker.sessions.claim("c", 9).await.unwrap();
        let mut connection = silent(broker, session);
        (connection.out, connection.counted) = (BytesMut::zeroed(unwritten), unwritten);
        let silent_since = connection.last_read;
        connection.out.advance(1);
        connection.wrote(1);
        assert_eq!(connection.last_read == silent_since, ends, "{unwritten}");
    }
}

#[tokio::test]
async fn who_has_a_permit_and_gets_nowhere_gives_it_up_and_ends_where_its_client_does_not_read() {
    let stores = || MemoryStream::new("s", 1);
    let broker = &broker(&Config::default(), stores(), stores());
    let (session, _turn) = broker.sessions.claim("c", 9).await.unwrap();
    let (mut outward, bytes) = (Outward::default(), 20 << 10);
    let (outbox, permits) = (&mut session.outbox(), &broker.outgoing_permits);
    assert!(outward.set_permit(bytes, false, false, outbox, permits), "given at once");
    assert!(!outward.set_permit(bytes, false, false, outbox, permits), "its message is being read");
    assert!(permits.is_taken() && outbox.is_lent_for(bytes));
    outward.permitted(Err(TooSlow), outbox).unwrap();
    assert!(!permits.is_taken() && !outbox.is_lent());
    assert!(outward.set_permit(bytes, false, false, outbox, permits), "it asks again");
    assert!(!outward.set_permit(0, false, false, outbox, permits) && !permits.is_taken(), "it needs none");
    assert!(outward.set_permit(bytes, false, false, outbox, permits));
    assert!(!outward.set_permit(bytes, true, true, outbox, permits), "its packet is in the buffer");
    let ended = outward.permitted(Err(TooSlow), outbox);
    assert!(matches!(ended, Err(End::Fault(fault)) if fault.code == DisconnectReasonCode::QuotaExceeded));
}

#[tokio::test]
async fn who_is_at_something_else_keeps_no_turn_to_read_from_others() {
    let stream = MemoryStream::with_hooks("s", 1);
    let broker = &broker(&Config::default(), stream.clone(), MemoryStream::new("broker", 1));
    let (session, _turn) = broker.sessions.claim("c", 9).await.unwrap();
    let places = || (0..3).map(|offset| outbound::Place { stream: 0, offset }).collect::<Vec<_>>();
    let loader = || Loader::new(&mut Waits { load: places(), ..Waits::default() }, broker, &session);
    // Nobody waits for these, and what they read is yet to come.
    let _others: Vec<_> = (0..outbound::LOADS_MAX).map(|_| loader()).collect();
    tokio::task::yield_now().await;
    assert_eq!(broker.loads.available_permits(), 0);
    let mut one = loader();
    stream.append(&[message("a", b"x"); 3], &[]).unwrap();
    let loaded = one.loaded().await.unwrap().messages;
    assert!(places().iter().all(|place| loaded[place].is_some()), "all of one batch");
}

#[tokio::test]
async fn what_a_client_sent_before_it_came_back_is_taken_in_and_its_goodbye_first_of_all() {
    let stream = MemoryStream::new("s", 1);
    let broker = &broker(&Config::default(), stream.clone(), MemoryStream::new("broker", 1));
    const PUBLISH: [u8; 6] = [0x30, 4, 0, 1, b'x', 0];
    const GOODBYE: [u8; 2] = [0xe0, 0];
    for (said, is_thrown_out) in [(GOODBYE.as_slice(), false), (&[], true)] {
        let (session, _turn) = broker.sessions.claim("c", 9).await.unwrap();
        let (mut client, io) = tokio::io::duplex(1_024);
        client.write_all(&PUBLISH).await.unwrap();
        client.write_all(said).await.unwrap();
        let mut other = std::pin::pin!(broker.sessions.claim("c", 9));
        assert!(futures_util::poll!(&mut other).is_pending());
        let mut connection = connection(broker, session, io);
        // It has read little of what it is owed.
        (connection.out, connection.counted) = (BytesMut::zeroed(WRITE_PAUSE_BYTES), WRITE_PAUSE_BYTES);
        let end = connection.run().await;
        assert_eq!(matches!(end, End::TakenOver), is_thrown_out);
        assert_eq!(matches!(end, End::Disconnect { .. }), !is_thrown_out);
    }
    assert_eq!(stream.bounds().end.0, 2);
}

/// Gives a packet of six bytes at a time, as a WebSocket of a client that sends each in a frame of its own.
struct Frames<'a>(&'a [u8]);

impl AsyncRead for Frames<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let (frame, rest) = self.0.split_at(self.0.len().min(6));
        out.put_slice(frame);
        self.0 = rest;
        Poll::Ready(Ok(()))
    }
}

#[tokio::test]
async fn a_goodbye_is_read_that_lies_behind_many_small_frames() {
    let stream = MemoryStream::new("s", 1);
    let broker = &broker(&Config::default(), stream.clone(), MemoryStream::new("broker", 1));
    let (session, _turn) = broker.sessions.claim("c", 9).await.unwrap();
    let mut other = std::pin::pin!(broker.sessions.claim("c", 9));
    assert!(futures_util::poll!(&mut other).is_pending());
    let mut sent = [0x30, 4, 0, 1, b'x', 0].repeat(2_000);
    sent.extend([0xe0, 0]);
    let mut connection = connection(broker, session, tokio::io::join(Frames(&sent), tokio::io::sink()));
    assert!(matches!(connection.run().await, End::Disconnect { .. }));
    assert_eq!(stream.bounds().end.0, 2_000);
}

/// Each of them waits for the one before it.
#[tokio::test]
async fn a_takeover_names_the_connection_that_it_ended() {
    const CONNECT: [u8; 15] = [0x10, 13, 0, 4, b'M', b'Q', b'T', b'T', 4, 2, 0, 60, 0, 1, b'c'];
    let stores = || MemoryStream::new("s", 1);
    let broker = broker(&Config::default(), stores(), stores());
    let mut clients = Vec::new();
    for number in 1..=5 {
        let (mut client, io) = tokio::io::duplex(1_024);
        client.write_all(&CONNECT).await.unwrap();
        let (mut remote, place) = somebody();
        remote.address = Address::Ip(SocketAddr::from(([192, 0, 2, number], 50_000)));
        tokio::spawn(serve(broker.clone(), io, remote, place));
        if number == 1 {
            client.read_u8().await.unwrap();
        }
        clients.push(client);
    }
    clients[4].read_u8().await.unwrap();
    let contended = broker.takeovers.contended(std::time::Instant::now());
    assert_eq!(contended[0].newest, "client c at 192.0.2.4:50000: taken over from 192.0.2.5:50000");
    assert_eq!(contended[0].takeovers, 4);
}

/// A client that sends without end does not keep the other one waiting, nor is what it is answered kept.
#[tokio::test]
async fn a_client_whose_session_is_wanted_is_read_a_while_longer() {
    let publish = [&[0x30, 120, 0, 1, b'x'][..], &[0; 117]].concat();
    for (packet, max) in [(publish, LAST_BYTES_MAX as usize), (vec![0xc0, 0], LAST_OUT_MAX)] {
        let stores = || MemoryStream::new("s", 1);
        let broker = &broker(&Config::default(), stores(), stores());
        let (session, _turn) = broker.sessions.claim("c", 9).await.unwrap();
        let mut other = std::pin::pin!(broker.sessions.claim("c", 9));
        assert!(futures_util::poll!(&mut other).is_pending());
        let sent = packet.repeat(2 * LAST_BYTES_MAX as usize / packet.len());
        let io = tokio::io::join(&*sent, tokio::io::sink());
        let mut connection = connection(broker, session, io);
        assert!(matches!(connection.run().await, End::TakenOver));
        let read = sent.len() - connection.io.reader().len();
        assert!(read > LAST_BYTES_LEAST as usize && read <= max + READ_BYTES_MAX, "{read} of {max} bytes");
        assert!(connection.out.len() < LAST_OUT_MAX + 2 * READ_BYTES_MAX, "{} bytes", connection.out.len());
    }
}

fn size_of_future<A, B, C, D, F: Future>(_: fn(A, B, C, D) -> F) -> usize {
    size_of::<F>()
}

/// Its future is most of what an idle connection costs: what grows it grows each of them. With its
/// task's header, 112 bytes, it is allocated in steps of 128 bytes.
#[test]
fn an_idle_connection_takes_little_memory() {
    let size = size_of_future(serve::<TcpStream>);
    assert!(size <= 1_296, "{size} bytes: is something kept that could be boxed?");
}
