use tokio::net::TcpStream;

use super::*;
use crate::access::Identity;
use crate::listeners::mqtt::config::Config;
use crate::listeners::mqtt::fuzzing::broker;
use crate::listeners::mqtt::outbound::{self, Loader, Waits};
use crate::listeners::mqtt::wire::Version;
use crate::stream::Stream;
use crate::stream::conformance::message;
use crate::stream::memory::MemoryStream;

/// A connection of a client that sends nothing.
fn silent(broker: &Arc<Broker>, session: Arc<Session>) -> Connection<'_, tokio::io::Empty> {
    let version = Version::V5;
    let rights = broker.access.rights(Identity::default(), "c", None);
    Connection {
        broker,
        io: tokio::io::empty(),
        session: session.clone(),
        peer: Peer { version, window: 1, packet_bytes_max: usize::MAX },
        auth: None,
        will: None,
        aliases: Aliases::new(0),
        inbound: Inbound::new(broker, version, session, rights, false),
        changing: None,
        is_bridge: false,
        tells_reasons: false,
        input: BytesMut::new(),
        stopped_at: Next::Bytes,
        partial: None,
        out: BytesMut::new(),
        counted: 0,
        acks_waiting: Part::of(&broker.counters.acks_waiting),
        last_read: Instant::now(),
        keep_alive: Some(Duration::ZERO),
        outward: None,
        drain_until: None,
        has_left: false,
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
