use tokio::net::TcpStream;

use super::*;
use crate::access::Identity;
use crate::listeners::mqtt::config::Config;
use crate::listeners::mqtt::fuzzing::broker;
use crate::listeners::mqtt::outbound;
use crate::listeners::mqtt::wire::Version;
use crate::stream::Stream;
use crate::stream::conformance::message;
use crate::stream::memory::MemoryStream;

#[tokio::test]
async fn a_slow_reader_is_not_silent_while_it_is_not_read() {
    let stores = || MemoryStream::new("s", 1);
    let broker = &broker(&Config::default(), stores(), stores());
    for (unwritten, ends) in [(WRITE_PAUSE_BYTES, false), (WRITE_BYTES_MAX, true)] {
        let (session, _turn) = broker.sessions.claim("c", 9).await.unwrap();
        let version = Version::V5;
        let rights = broker.access.rights(Identity::default(), "c", None);
        let mut connection = Connection {
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
            out: BytesMut::zeroed(unwritten),
            counted: unwritten,
            acks_waiting: Part::of(&broker.counters.acks_waiting),
            last_read: Instant::now(),
            keep_alive: Some(Duration::ZERO),
            outward: None,
            drain_until: None,
            has_left: false,
        };
        let silent_since = connection.last_read;
        connection.out.advance(1);
        connection.wrote(1);
        assert_eq!(connection.last_read == silent_since, ends, "{unwritten}");
    }
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

/// Its future is most of what an idle connection costs: what grows it grows each of them.
#[test]
fn an_idle_connection_takes_little_memory() {
    let size = size_of_future(serve::<TcpStream>);
    assert!(size <= 1_424, "{size} bytes: is something kept that could be boxed?");
}
