//! The load generator: hand-encoded packets, one thread per publisher, so that
//! it takes as little as can be of the cores it shares with the broker.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant, SystemTime};

use headworks::threads::take_short_slices;
use headworks_tests::mqtt::{self, Connection, Version, kind};

use crate::crowd::Crowd;

/// Messages of one publisher: a template whose packet id and number are patched in place.
pub struct Template {
    bytes: Vec<u8>,
    packet_id_at: usize,
}

impl Template {
    /// QoS 1, MQTT 3.1.1.
    pub fn new(topic: &str, payload: &[u8]) -> Self {
        let mut bytes = Vec::new();
        mqtt::publish(&mut bytes, Version::V311, 1, false, topic, 1, payload);
        let packet_id_at = bytes.len() - payload.len() - 2;
        Self { bytes, packet_id_at }
    }

    fn push(&self, out: &mut Vec<u8>, packet_id: u16) {
        let at = out.len();
        out.extend_from_slice(&self.bytes);
        out[at + self.packet_id_at..at + self.packet_id_at + 2].copy_from_slice(&packet_id.to_be_bytes());
    }
}

/// What all publishers together got acknowledged, and how long it took.
#[derive(Clone, Copy, Debug)]
pub struct Acked {
    pub messages: u64,
    pub took: Duration,
}

impl Acked {
    pub fn per_second(&self) -> f64 {
        self.messages as f64 / self.took.as_secs_f64()
    }
}

/// Publishers that each keep `window` messages in flight for `duration`, then await the last acks.
pub fn closed_loop(
    addr: SocketAddr,
    publishers: usize,
    window: u16,
    payload: &[u8],
    duration: Duration,
) -> Acked {
    let barrier = Arc::new(Barrier::new(publishers));
    let threads: Vec<_> = (0..publishers)
        .map(|number| {
            let topic = format!("acme/site-01/temperature/load-{number:04}/reading");
            let (template, barrier) = (Template::new(&topic, payload), barrier.clone());
            std::thread::spawn(move || {
                let mut connection = connect(addr, &format!("load-{number:04}"));
                barrier.wait();
                let begin = Instant::now();
                let messages = keep_window(&mut connection, &template, window, begin + duration);
                (messages, begin.elapsed())
            })
        })
        .collect();
    let done: Vec<_> = threads.into_iter().map(|thread| thread.join().expect("a publisher")).collect();
    Acked {
        messages: done.iter().map(|(messages, _)| messages).sum(),
        took: done.iter().map(|(_, took)| *took).max().unwrap_or_default(),
    }
}

fn keep_window(connection: &mut Connection, template: &Template, window: u16, end: Instant) -> u64 {
    let (mut sent, mut acked) = (0u64, 0u64);
    let mut out = Vec::new();
    loop {
        let open = Instant::now() < end;
        if !open && acked == sent {
            return acked;
        }
        out.clear();
        while open && sent - acked < u64::from(window) {
            template.push(&mut out, packet_id(sent));
            sent += 1;
        }
        connection.stream.write_all(&out).expect("the broker reads");
        connection
            .receive(|packet| {
                assert_eq!(
                    (packet.kind(), packet.packet_id()),
                    (kind::PUBACK, packet_id(acked)),
                    "acks come in order"
                );
                acked += 1;
            })
            .expect("the broker acknowledges");
    }
}

/// A message of its own for each number; `until` messages in all, `window` in flight.
pub fn send_numbered(
    addr: SocketAddr,
    publishers: usize,
    window: u64,
    per_publisher: u64,
    message: impl Fn(usize, u64, &mut Vec<u8>, u16) + Send + Sync,
) -> Duration {
    let barrier = Barrier::new(publishers);
    let begin = std::sync::Mutex::new(None);
    std::thread::scope(|scope| {
        for number in 0..publishers {
            let (message, barrier, begin) = (&message, &barrier, &begin);
            scope.spawn(move || {
                let mut connection = connect(addr, &format!("load-{number:04}"));
                barrier.wait();
                begin.lock().expect("no panic").get_or_insert_with(Instant::now);
                let (mut sent, mut acked) = (0, 0);
                let mut out = Vec::new();
                while acked < per_publisher {
                    out.clear();
                    while sent < per_publisher && sent - acked < window {
                        message(number, sent, &mut out, packet_id(sent));
                        sent += 1;
                    }
                    connection.stream.write_all(&out).expect("the broker reads");
                    connection
                        .receive(|packet| {
                            assert_eq!(packet.kind(), kind::PUBACK, "{packet:?}");
                            acked += 1;
                        })
                        .expect("the broker acknowledges");
                }
            });
        }
    });
    begin.into_inner().expect("no panic").expect("somebody began").elapsed()
}

/// Open loop: message `n` of a publisher is due at `n / rate`, whether or not
/// earlier ones were acknowledged, the publishers evenly apart; returns each
/// ack's delay from that time in µs. One thread sends and one receives, however
/// many publishers there are; like devices, which have machines of their own,
/// they wait for no tick of this one's scheduler.
pub fn open_loop(
    addr: SocketAddr,
    publishers: usize,
    rate: f64,
    duration: Duration,
    message: impl Fn(usize, u64, SystemTime, &mut Vec<u8>, u16) + Send + Sync,
) -> Vec<u32> {
    let each = (rate * duration.as_secs_f64()) as u64 / publishers as u64;
    let due = |number: usize, n: u64| {
        Duration::from_secs_f64((n * publishers as u64 + number as u64) as f64 / rate)
    };
    let mut crowd = Crowd::connect(addr, "load", publishers, None);
    let mut streams = crowd.streams();
    let pause = Duration::from_millis(300);
    let (begin, begin_wall) = (Instant::now() + pause, SystemTime::now() + pause);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            take_short_slices();
            let mut out = Vec::new();
            let mut sent = vec![0; publishers];
            while sent.iter().any(|sent| *sent < each) {
                for (number, sent) in sent.iter_mut().enumerate() {
                    let now = Instant::now().saturating_duration_since(begin);
                    out.clear();
                    while *sent < each && due(number, *sent) <= now {
                        message(number, *sent, begin_wall + due(number, *sent), &mut out, packet_id(*sent));
                        *sent += 1;
                    }
                    if !out.is_empty() {
                        streams[number].write_all(&out).expect("the broker reads");
                    }
                }
                std::thread::sleep(Duration::from_micros(500));
            }
        });
        let total = each as usize * publishers;
        let receiver = scope.spawn(move || {
            take_short_slices();
            let mut acked = vec![0; publishers];
            let mut delays = Vec::with_capacity(total);
            while delays.len() < total {
                crowd.receive(|number, packet, _| {
                    let n = acked[number];
                    assert_eq!((packet.kind(), packet.packet_id()), (kind::PUBACK, packet_id(n)));
                    acked[number] += 1;
                    let delay = Instant::now().saturating_duration_since(begin + due(number, n));
                    delays.push(delay.as_micros() as u32);
                });
            }
            delays
        });
        receiver.join().expect("a receiver")
    })
}

pub fn percentile(values: &mut [u32], share: f64) -> f64 {
    assert!(!values.is_empty(), "nothing was measured");
    let at = ((values.len() - 1) as f64 * share).round() as usize;
    f64::from(*values.select_nth_unstable(at).1)
}

/// Who the load's clients say they are; a broker that asks nobody takes it too.
pub const USER: (&str, &str) = ("load", "of the benchmark");

fn connect(addr: SocketAddr, client_id: &str) -> Connection {
    let connection = Connection::open_as(addr, Version::V311, client_id, true, Some(USER));
    let connection = connection.expect("the broker accepts");
    connection.stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a socket");
    connection
}

/// 1..=65,535.
fn packet_id(n: u64) -> u16 {
    (n % 65_535) as u16 + 1
}
