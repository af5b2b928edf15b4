//! What a thousand clients that misbehave cost a hundred honest ones: the 99th
//! percentile of the acks' delay with them beside, to that without. The same with
//! the log in memory: what is left of it are the cores.

use std::net::SocketAddr;
use std::sync::{Mutex, TryLockError, mpsc};
use std::time::{Duration, Instant, SystemTime};

use headworks_tests::folder::Folder;
use headworks_tests::host::{Host, MQTT};
use headworks_tests::misbehaving::{Crowd, Script, raise_open_files, scripts};
use headworks_tests::mosquitto::Mosquitto;
use headworks_tests::mqtt::{self, Version};

use crate::load::{open_loop, percentile};
use crate::results::Results;
use crate::rounds;

const PUBLISHERS: usize = 100;
const MESSAGES_PER_S: f64 = 4_000.0;
const PAYLOAD: [u8; 256] = [b'x'; 256];
const ROUND: Duration = Duration::from_secs(4);
/// A disk has hiccups: single syncs of 20 ms to a second, whoever writes, every few
/// seconds. A round's 99th percentile has them in it or not, so there are more rounds.
const ON_DISK: usize = 2;
/// So many of the crowd step at the same moment: a thousand at once would be one
/// client in this process, and measure how long it takes to send.
const TOGETHER: usize = 20;
/// Between two steps of one client: its own work is not what is measured.
const STEP: Duration = Duration::from_millis(20);

pub fn run(results: &mut Results) {
    raise_open_files();
    let mosquitto = Mosquitto::start();
    let mut host = Host::start("bench-honest", "");
    let mut in_memory = Host::prepare_in(Folder::in_memory("bench-honest"), MQTT, "");
    in_memory.run();
    let mut measured = [
        ("", ON_DISK, host.mqtt(), Vec::new(), Vec::new()),
        ("_log_in_memory", 1, in_memory.mqtt(), Vec::new(), Vec::new()),
        ("_mosquitto", 1, mosquitto.addr, Vec::new(), Vec::new()),
    ];
    for _ in 0..rounds() {
        for (_, times, addr, alone, beside) in &mut measured {
            for _ in 0..*times {
                alone.push(p99_us(*addr));
                beside.push(p99_us_beside(*addr));
            }
        }
    }
    host.stop();
    in_memory.stop();
    for (of, _, _, alone, beside) in &measured {
        results.add(&format!("honest_p99_us{of}"), alone);
        results.add_ratio(&format!("honest_p99_ratio_beside_misbehaving{of}"), beside, alone);
    }
}

fn p99_us(addr: SocketAddr) -> f64 {
    let message = |number: usize, _: u64, _: SystemTime, out: &mut Vec<u8>, packet_id: u16| {
        let topic = format!("acme/site-01/temperature/honest-{number}/reading");
        mqtt::publish(out, Version::V311, 1, false, &topic, packet_id, &PAYLOAD);
    };
    let mut delays = open_loop(addr, PUBLISHERS, MESSAGES_PER_S, ROUND, message);
    percentile(&mut delays, 0.99)
}

/// With the whole crowd there; each of the thousand begins anew once while it is
/// measured, evenly spread over that time.
fn p99_us_beside(addr: SocketAddr) -> f64 {
    let measuring = Mutex::new(());
    let (all_there, there) = mpsc::channel();
    std::thread::scope(|scope| {
        // Let go of when the measurement ends, and when it fails.
        let held = measuring.lock();
        let measuring = &measuring;
        scope.spawn(move || {
            let scripts = scripts();
            let mut parts: Vec<_> = scripts.chunks(TOGETHER).map(|part| Part::new(addr, part)).collect();
            let count = parts.len() as u32;
            for at in (0..count).cycle() {
                if !matches!(measuring.try_lock(), Err(TryLockError::WouldBlock)) {
                    return;
                }
                parts[at as usize].step(addr, ROUND * at / count);
                if parts.iter().all(|part| part.begun > 0) {
                    // Nobody listens any more after the first time.
                    let _ = all_there.send(());
                }
                std::thread::sleep(STEP / count);
            }
        });
        there.recv().expect("the crowd comes");
        let p99 = p99_us(addr);
        drop(held);
        p99
    })
}

struct Part<'s> {
    scripts: &'s [Script],
    crowd: Crowd,
    since: Instant,
    begun: u32,
}

impl<'s> Part<'s> {
    fn new(addr: SocketAddr, scripts: &'s [Script]) -> Self {
        Self { scripts, crowd: Crowd::new(addr, Vec::new()), since: Instant::now(), begun: 0 }
    }

    /// `first`: it begins so long after the first part, and so they stay apart.
    fn step(&mut self, addr: SocketAddr, first: Duration) {
        if !self.crowd.step() && self.since.elapsed() >= first + ROUND * self.begun {
            self.crowd = Crowd::new(addr, self.scripts.to_vec());
            self.begun += 1;
        }
    }
}
