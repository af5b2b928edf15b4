//! Shows that rumqttd acknowledges messages that it then loses: a publisher
//! sends QoS 1 messages and counts the PUBACKs, a link inside the same process
//! reads them slowly and counts what arrives.
//!
//! `cargo run --release` prints one line. host/decisions/broker.md tells why
//! it matters.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};
use std::thread;
use std::time::{Duration, Instant};

use rumqttd::{Broker, Config, ConnectionSettings, Notification, RouterConfig, ServerSettings};

const MESSAGES: u64 = 100_000;
const WINDOW: u64 = 100;
const PAYLOAD_BYTES: usize = 256;
const SEGMENT_BYTES: usize = 1 << 20;
const SEGMENTS: usize = 10;
const READER_DELAY: Duration = Duration::from_micros(100);
/// The reader is done when nothing came for so long.
const QUIET: Duration = Duration::from_secs(5);

fn main() {
    let port = TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("bound").port();
    let mut broker = Broker::new(config(port));
    let (mut sender, mut receiver) = broker.link("slow-reader").expect("a link");
    thread::spawn(move || broker.start().expect("the broker runs"));
    sender.subscribe("#").expect("subscribed");

    let received = Arc::new(AtomicU64::new(0));
    let count = received.clone();
    let reader = thread::spawn(move || {
        let mut last = Instant::now();
        while last.elapsed() < QUIET {
            match receiver.recv_deadline(Instant::now() + QUIET) {
                Ok(Some(Notification::Forward(_))) => {
                    count.fetch_add(1, Ordering::Relaxed);
                    last = Instant::now();
                    thread::sleep(READER_DELAY);
                }
                Ok(Some(Notification::Unschedule)) => receiver.ready().expect("the router runs"),
                _ => {}
            }
        }
    });

    let acknowledged = publish(port);
    reader.join().expect("the reader ends");
    let received = received.load(Ordering::Relaxed);
    println!(
        "published {MESSAGES}, acknowledged {acknowledged}, received {received}, lost {}",
        acknowledged - received
    );
}

/// Sends all messages with a window of unacknowledged ones; returns the PUBACKs.
fn publish(port: u16) -> u64 {
    let mut socket = loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(socket) => break socket,
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    };
    socket.write_all(b"\x10\x0f\x00\x04MQTT\x04\x02\x00\x3c\x00\x03pub").expect("CONNECT sent");
    let mut answer = [0; 4];
    socket.read_exact(&mut answer).expect("CONNACK");

    let (mut sent, mut acknowledged) = (0, 0);
    let mut buffer = [0; 4_096];
    let mut pending = 0;
    while acknowledged < MESSAGES {
        while sent < MESSAGES && sent - acknowledged < WINDOW {
            socket.write_all(&packet((sent % 65_535 + 1) as u16)).expect("PUBLISH sent");
            sent += 1;
        }
        let n = socket.read(&mut buffer[pending..]).expect("PUBACK");
        assert!(n > 0, "the broker closed the connection after {acknowledged} acks");
        pending += n;
        acknowledged += (pending / 4) as u64;
        pending %= 4;
    }
    acknowledged
}

fn packet(id: u16) -> Vec<u8> {
    let topic = b"acme/site/temperature/sensor/reading";
    let len = 2 + topic.len() + 2 + PAYLOAD_BYTES;
    let mut out = vec![0x32, (len % 128) as u8 | 0x80, (len / 128) as u8, 0, topic.len() as u8];
    out.extend_from_slice(topic);
    out.extend_from_slice(&id.to_be_bytes());
    out.resize(out.len() + PAYLOAD_BYTES, b'x');
    out
}

fn config(port: u16) -> Config {
    let connections = ConnectionSettings {
        connection_timeout_ms: 60_000,
        max_payload_size: 20_480,
        max_inflight_count: 200,
        auth: None,
        external_auth: None,
        dynamic_filters: true,
    };
    let server = ServerSettings {
        name: "v4".into(),
        listen: ([127, 0, 0, 1], port).into(),
        tls: None,
        next_connection_delay_ms: 1,
        connections,
    };
    let router = RouterConfig {
        max_connections: 100,
        max_outgoing_packet_count: 200,
        max_segment_size: SEGMENT_BYTES,
        max_segment_count: SEGMENTS,
        ..RouterConfig::default()
    };
    Config { router, v4: Some([("1".into(), server)].into()), ..Config::default() }
}
