//! The simulated devices: one MQTT connection each, some readings over the
//! limit, some broken, so that every way through the host is taken.

use std::io::Write;
use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use headworks_tests::mqtt::{self, Connection, Version, kind};

use crate::scene::Counts;

/// Messages on their way at once, per device.
const WINDOW: usize = 20;
const STACK_BYTES: usize = 256 << 10;

#[derive(Clone, Copy, Debug)]
pub struct Readings {
    pub from: usize,
    pub count: usize,
}

/// What all devices are about to send.
pub struct Load {
    messages: Vec<Vec<(String, String)>>,
    expected: Counts,
}

/// What they sent, all of it acknowledged.
pub struct Sent {
    pub sent: u64,
    pub took: Duration,
    pub expected: Counts,
}

pub fn device_name(device: usize) -> String {
    format!("{}-{device:03}", ["sensor", "motor", "pump"][device % 3])
}

pub fn site(device: usize) -> &'static str {
    ["north", "south"][device % 2]
}

impl Load {
    pub fn new(devices: usize, readings: Readings, limit: f64) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_millis() as u64;
        let mut expected = Counts::default();
        let messages = (0..devices)
            .map(|device| {
                (readings.from..readings.from + readings.count)
                    .map(|n| reading(device, n, now, limit, &mut expected))
                    .collect()
            })
            .collect();
        Self { messages, expected }
    }

    /// Returns once every message is acknowledged.
    pub fn send(self, addr: SocketAddr) -> Sent {
        let sent = self.messages.iter().map(|messages| messages.len() as u64).sum();
        let begin = Instant::now();
        std::thread::scope(|scope| {
            for (device, messages) in self.messages.iter().enumerate() {
                std::thread::Builder::new()
                    .stack_size(STACK_BYTES)
                    .spawn_scoped(scope, move || {
                        publish(addr, device, messages).expect("the host takes all of it")
                    })
                    .expect("a thread");
            }
        });
        Sent { sent, took: begin.elapsed(), expected: self.expected }
    }
}

/// One in 50 is broken, one in 40 over the limit.
fn reading(device: usize, n: usize, now: u64, limit: f64, expected: &mut Counts) -> (String, String) {
    let name = device_name(device);
    let (kind, metric) =
        [("temperature", "temperature_c"), ("vibration", "velocity_mm_s"), ("pressure", "pressure_bar")]
            [device % 3];
    let topic = format!("acme/{}/{kind}/{name}/reading", site(device));
    let ts = now - 1000 + n as u64;
    if (device + n).is_multiple_of(50) {
        expected.dead_letters += 1;
        let broken = match (device / 3 + n) % 4 {
            0 => format!(r#"{{"device_id":"{name}","value":21.5,"ts":"#),
            1 => format!(r#"{{"device_id":"{name}","metric":"{metric}","ts":{ts}}}"#),
            2 => format!(r#"{{"device_id":"intruder","metric":"{metric}","value":1,"ts":{ts}}}"#),
            _ => format!(r#"{{"device_id":"{name}","metric":"{metric}","value":1,"ts":"yesterday"}}"#),
        };
        return (topic, broken);
    }
    let high = (device * 7 + n) % 40 == 1;
    let value = if high { 90.0 + (n % 10) as f64 } else { 20.0 + ((device * 3 + n) % 100) as f64 / 10.0 };
    *(if value > limit { &mut expected.alerts } else { &mut expected.rows }) += 1;
    (topic, format!(r#"{{"device_id":"{name}","metric":"{metric}","value":{value:.1},"ts":{ts}}}"#))
}

fn publish(addr: SocketAddr, device: usize, messages: &[(String, String)]) -> std::io::Result<()> {
    let mut connection = Connection::open(addr, Version::V5, &device_name(device), true)?;
    connection.stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let (mut next, mut acked) = (0, 0);
    let mut out = Vec::new();
    while acked < messages.len() {
        out.clear();
        while next < messages.len() && next - acked < WINDOW {
            let (topic, payload) = &messages[next];
            mqtt::publish(&mut out, Version::V5, 1, false, topic, next as u16 + 1, payload.as_bytes());
            next += 1;
        }
        connection.stream.write_all(&out)?;
        connection.receive(|packet| {
            assert_eq!(packet.kind(), kind::PUBACK, "{packet:?}");
            acked += 1;
        })?;
    }
    out.clear();
    mqtt::disconnect(&mut out);
    connection.stream.write_all(&out)
}
