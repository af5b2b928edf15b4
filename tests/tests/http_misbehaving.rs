//! HTTP/2 clients that misbehave: an honest client of each version beside them is answered all the time, and
//! they cost the host little memory.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use headworks_tests::host::Host;
use headworks_tests::http2::{self, Frames, frame};

/// Only a hung test meets it.
const HUNG_AFTER: Duration = Duration::from_secs(60);
const PLAIN: &str = "http: { listeners: [ { bind: 127.0.0.1:0 } ] }\n";
/// What a hostile client may make the host keep, for all of its connections together.
const HOSTILE_BYTES_MAX: u64 = 64 << 20;

/// Runs hostile clients beside an honest one in each version, which are answered all the time.
fn beside_honest_clients(name: &str, hostile: impl FnOnce(&Host, SocketAddr)) {
    let mut host = Host::start(name, PLAIN);
    let addr = host.http(0);
    let is_over = AtomicBool::new(false);
    let before = host.process().peak_bytes();
    std::thread::scope(|scope| {
        let over_1 = scope.spawn(|| {
            let mut client = headworks_tests::http::Connection::open(addr, HUNG_AFTER).expect("a connection");
            while !is_over.load(Ordering::Relaxed) {
                assert_eq!(client.post("/messages/honest/1", &[], b"1").expect("an answer").0, 204);
            }
        });
        let over_2 = scope.spawn(|| {
            let mut client = Frames::open(addr, &[], HUNG_AFTER).expect("a connection");
            while !is_over.load(Ordering::Relaxed) {
                client.post("/messages/honest/2", b"1").expect("204");
            }
        });
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| hostile(&host, addr)));
        is_over.store(true, Ordering::Relaxed);
        over_1.join().expect("the client of HTTP/1.1 is served");
        over_2.join().expect("the client of HTTP/2 is served");
        ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    let grown = host.process().peak_bytes().saturating_sub(before);
    assert!(grown < HOSTILE_BYTES_MAX, "{name}: {} MiB more", grown >> 20);
    assert!(host.stop().success());
}

#[test]
fn a_client_that_resets_its_requests_over_and_over_is_sent_away() {
    beside_honest_clients("http2-resets", |host, addr| {
        for _ in 0..5 {
            let client = Frames::open(addr, &[], HUNG_AFTER).expect("a connection");
            let block = http2::head("/messages/hostile");
            let said = client.flood(20_000, |client| {
                let stream = client.next_stream();
                let reset = frame(http2::RST_STREAM, 0, stream, &8_u32.to_be_bytes());
                [frame(http2::HEADERS, http2::END_HEADERS, stream, &block), reset].concat()
            });
            said.expect("its connection ends");
        }
        // The client resets each stream only after the host has read its request, which is slower.
        let mut client = Frames::open(addr, &[], HUNG_AFTER).expect("a connection");
        let ended = (0..20_000).any(|_| {
            let stream = client.next_stream();
            let head = frame(http2::HEADERS, http2::END_HEADERS, stream, &http2::head("/messages/hostile"));
            let ping = frame(http2::PING, 0, 0, &[0; 8]);
            let reset = frame(http2::RST_STREAM, 0, stream, &8_u32.to_be_bytes());
            let answered = |client: &mut Frames| loop {
                let found = client.read()?;
                if found.kind == http2::PING && found.flags & http2::ACK != 0 {
                    return std::io::Result::Ok(());
                }
            };
            client.send(&[head, ping].concat()).and_then(|()| answered(&mut client)).is_err()
                || client.send(&reset).is_err()
        });
        assert!(ended, "its connection ends");
        assert!(host.metric("headworks_http_ended_connections_total", &[("cause", "resets")]) >= 1.0);
    });
}

#[test]
fn endless_headers_end_their_connection() {
    beside_honest_clients("http2-continuation", |_, addr| {
        for piece in [16 << 10, 1, 0] {
            let mut client = Frames::open(addr, &[], HUNG_AFTER).expect("a connection");
            let stream = client.next_stream();
            client.send(&frame(http2::HEADERS, 0, stream, &http2::head("/messages/a"))).expect("it is read");
            let field = http2::field("x", &"y".repeat(piece / 2));
            let piece = if piece > 1 { field } else { vec![0; piece] };
            let said = client.flood(20_000, |_| frame(http2::CONTINUATION, 0, stream, &piece));
            said.expect("its connection ends");
        }
        // Many fields, each named by an index of one byte, that are long once they are looked up.
        let mut client = Frames::open(addr, &[], HUNG_AFTER).expect("a connection");
        let stream = client.next_stream();
        let long = [&[0x40_u8], &http2::field("x", &"y".repeat(3_000))[1..]].concat();
        let block = [http2::head("/messages/a"), long, vec![0xbe; 8_000]].concat();
        let flags = http2::END_HEADERS | http2::END_STREAM;
        client.send(&frame(http2::HEADERS, flags, stream, &block)).expect("it is read");
        let answer = client.find(http2::HEADERS);
        assert!(answer.as_ref().map_or(true, |answer| answer.payload[0] != http2::NO_CONTENT), "{answer:?}");
    });
}

#[test]
fn answers_that_nobody_takes_cost_little() {
    beside_honest_clients("http2-window", |_, addr| {
        // All of it fits the window that a connection has at first.
        let body = "7\n".repeat(500);
        let ndjson = http2::field("content-type", "application/x-ndjson");
        let block = [http2::head("/batch"), ndjson].concat();
        let clients: Vec<_> = (0..20)
            .map(|_| {
                // SETTINGS_INITIAL_WINDOW_SIZE: nothing may be sent.
                let mut client = Frames::open(addr, &[(4, 0)], HUNG_AFTER).expect("a connection");
                for _ in 0..60 {
                    let stream = client.next_stream();
                    let head = frame(http2::HEADERS, http2::END_HEADERS, stream, &block);
                    let data = frame(http2::DATA, http2::END_STREAM, stream, body.as_bytes());
                    client.send(&[head, data].concat()).expect("it is read");
                }
                for _ in 0..60 {
                    client.find(http2::HEADERS).expect("an answer");
                }
                client
            })
            .collect();
        assert_eq!(clients.len(), 20);
    });
}

#[test]
fn bodies_that_never_end_cost_no_more_than_their_room() {
    beside_honest_clients("http2-bodies", |_, addr| {
        // All of it says that it is long, and stops short of its end.
        let open: Vec<_> = (0..20)
            .map(|_| {
                let mut client = Frames::open(addr, &[], HUNG_AFTER).expect("a connection");
                for _ in 0..16 {
                    let stream = client.next_stream();
                    let block =
                        [http2::head("/messages/a"), http2::field("content-length", "1000000")].concat();
                    let head = frame(http2::HEADERS, http2::END_HEADERS, stream, &block);
                    client
                        .send(&[head, frame(http2::DATA, 0, stream, &[7; 3_000])].concat())
                        .expect("it is read");
                }
                client
            })
            .collect();
        let mut late = Frames::open(addr, &[], HUNG_AFTER).expect("a connection");
        late.post("/messages/late", &[1; 4_000]).expect("a small one needs no room");
        assert_eq!(open.len(), 20);
        drop(open);
        late.post("/messages/late", &[1; 16_000]).expect("there is room again");
    });
}

#[test]
fn ten_thousand_pings_and_settings_are_answered_and_hurt_nobody() {
    beside_honest_clients("http2-pings", |host, addr| {
        for (kind, payload) in [(http2::PING, &[7; 8][..]), (http2::SETTINGS, &[0, 3, 0, 0, 0, 99][..])] {
            let mut client = Frames::open(addr, &[], HUNG_AFTER).expect("a connection");
            client.send(&frame(kind, 0, 0, payload).repeat(10_000)).expect("they are read");
            let mut answers = 0;
            while answers < 10_000 {
                let found = client.read().expect("an answer");
                answers += u32::from(found.kind == kind && found.flags & http2::ACK != 0);
            }
            client.post("/messages/a", b"1").expect("204");
        }
        // Acknowledgements of what was never sent are no lines in the log.
        let mut client = Frames::open(addr, &[], HUNG_AFTER).expect("a connection");
        client.send(&frame(http2::PING, http2::ACK, 0, &[7; 8]).repeat(10_000)).expect("they are read");
        client.post("/messages/a", b"1").expect("204");
        assert!(!host.log().contains("PING"), "{}", host.log());
    });
}
