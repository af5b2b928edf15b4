//! Messages a second over HTTP that are durable, one in flight on each of 64 connections, 256 B: beside the
//! same load over MQTT QoS 1, and beside hyper alone, which answers and writes nothing.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use headworks_tests::host::Host;
use http_body_util::{BodyExt, Empty};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, body};
use hyper_util::rt::TokioIo;

use crate::ingest::config;
use crate::load::{Acked, closed_loop};
use crate::results::Results;
use crate::rounds;

const CONNECTIONS: usize = 64;
const PAYLOAD: [u8; 256] = [b'x'; 256];
/// Messages of a batch, on each of so many connections.
const BATCH: u64 = 100;
const BATCH_CONNECTIONS: usize = 8;
const ROUND: Duration = Duration::from_secs(3);

pub fn run(results: &mut Results) {
    let listeners = "http: { listeners: [ { bind: 127.0.0.1:0 } ] }\n";
    let mut host = Host::start("bench-http", &format!("{listeners}{}", config("")));
    let bare = bare();
    let (mut ours, mut mqtt, mut alone, mut batches) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds() {
        alone.push(posts(bare, CONNECTIONS, 1).per_second());
        mqtt.push(counted(&host, |host| closed_loop(host.mqtt(), CONNECTIONS, 1, &PAYLOAD, ROUND)));
        ours.push(counted(&host, |host| posts(host.http(0), CONNECTIONS, 1)));
        batches.push(counted(&host, |host| posts(host.http(0), BATCH_CONNECTIONS, BATCH)));
    }
    host.stop();
    results.add("http_acks_per_s", &ours);
    results.add("http_acks_per_s_mqtt", &mqtt);
    results.add("http_acks_per_s_bare_hyper", &alone);
    results.add_ratio("http_acks_ratio_vs_mqtt", &ours, &mqtt);
    results.add_ratio("http_acks_ratio_vs_bare_hyper", &ours, &alone);
    results.add("http_batch_msgs_per_s", &batches);
}

/// A round whose answers are all of durable messages.
fn counted(host: &Host, round: impl FnOnce(&Host) -> Acked) -> f64 {
    let durable = || host.metric("headworks_stream_messages_total", &[("stream", "telemetry")]) as u64;
    let before = durable();
    let acked = round(host);
    assert_eq!(durable() - before, acked.messages, "every answer is of durable messages");
    acked.per_second()
}

/// hyper as the listener has it, its answers at once.
fn bare() -> SocketAddr {
    let (sender, address) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("loopback");
            sender.send(listener.local_addr().expect("bound")).expect("awaited");
            loop {
                let Ok((io, _)) = listener.accept().await else { continue };
                io.set_nodelay(true).expect("a socket");
                let answer = service_fn(|request: Request<body::Incoming>| async {
                    request.into_body().collect().await?;
                    let answer = Response::builder().status(204).body(Empty::<bytes::Bytes>::new());
                    Ok::<_, hyper::Error>(answer.expect("a status"))
                });
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(io), answer));
            }
        });
    });
    address.recv().expect("it listens")
}

/// Connections that each post `batch` messages a request for [`ROUND`], one request after the other.
fn posts(addr: SocketAddr, connections: usize, batch: u64) -> Acked {
    let barrier = Arc::new(Barrier::new(connections));
    let threads: Vec<_> = (0..connections)
        .map(|number| {
            let barrier = barrier.clone();
            let request = request(number, batch);
            std::thread::spawn(move || {
                let mut io = TcpStream::connect(addr).expect("it listens");
                io.set_nodelay(true).expect("a socket");
                barrier.wait();
                let (begin, mut requests) = (Instant::now(), 0);
                while begin.elapsed() < ROUND {
                    io.write_all(&request).expect("it reads");
                    answered(&mut io);
                    requests += 1;
                }
                (requests * batch, begin.elapsed())
            })
        })
        .collect();
    let done: Vec<_> = threads.into_iter().map(|thread| thread.join().expect("a client")).collect();
    Acked {
        messages: done.iter().map(|(messages, _)| messages).sum(),
        took: done.iter().map(|(_, took)| *took).max().unwrap_or_default(),
    }
}

fn request(number: usize, batch: u64) -> Vec<u8> {
    let topic = format!("acme/site-01/temperature/load-{number:04}/reading");
    let payload = String::from_utf8_lossy(&PAYLOAD).into_owned();
    let (path, body) = match batch {
        1 => (format!("/messages/{topic}"), payload),
        _ => (
            "/batch".to_owned(),
            format!("{{\"topic\":\"{topic}\",\"payload\":\"{payload}\"}}\n").repeat(batch as usize),
        ),
    };
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nHost: host\r\nContent-Type: application/x-ndjson\r\nContent-Length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
}

/// Reads one answer of 2xx, whole.
fn answered(io: &mut TcpStream) {
    let (mut input, mut bytes) = (Vec::new(), [0; 1024]);
    loop {
        let len = io.read(&mut bytes).expect("an answer");
        assert!(len > 0, "the connection is kept");
        input.extend_from_slice(&bytes[..len]);
        let Some(end) = input.windows(4).position(|four| four == b"\r\n\r\n") else { continue };
        let head = String::from_utf8_lossy(&input[..end]).to_ascii_lowercase();
        assert!(head.starts_with("http/1.1 20"), "{head}");
        let body = head.split("content-length: ").nth(1).and_then(|rest| rest.lines().next()?.parse().ok());
        if input.len() == end + 4 + body.unwrap_or(0) {
            return;
        }
    }
}
