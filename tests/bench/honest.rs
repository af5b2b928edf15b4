//! What a thousand clients that misbehave cost the honest ones: the 99th
//! percentile of the acks' delay with them beside, to that without.

use std::sync::{Mutex, TryLockError};
use std::time::Duration;

use headworks_tests::host::Host;
use headworks_tests::misbehaving::{Crowd, Script, raise_open_files, scripts};
use headworks_tests::mqtt::{self, Version};

use crate::load::{open_loop, percentile};
use crate::results::Results;
use crate::rounds;

const PUBLISHERS: usize = 8;
const MESSAGES_PER_S: f64 = 4_000.0;
const PAYLOAD: [u8; 256] = [b'x'; 256];
const ROUND: Duration = Duration::from_secs(4);
/// So many of the crowd step at the same moment: a thousand at once would be one
/// client in this process, and measure how long it takes to send.
const TOGETHER: usize = 20;
/// Between two steps of one client: its own work is not what is measured.
const STEP: Duration = Duration::from_millis(20);

pub fn run(results: &mut Results) {
    raise_open_files();
    let mut host = Host::start("bench-honest", "");
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    for _ in 0..rounds() {
        alone.push(p99_us(&host));
        beside.push(p99_us_beside(&host));
    }
    host.stop();
    results.add("honest_p99_us", &alone);
    results.add_ratio("honest_p99_ratio_beside_misbehaving", &beside, &alone);
}

fn p99_us(host: &Host) -> f64 {
    let message = |number: usize, _: u64, _: Duration, out: &mut Vec<u8>, packet_id: u16| {
        let topic = format!("acme/site-01/temperature/honest-{number}/reading");
        mqtt::publish(out, Version::V311, 1, false, &topic, packet_id, &PAYLOAD);
    };
    let mut delays = open_loop(host.mqtt(), PUBLISHERS, MESSAGES_PER_S, ROUND, message);
    percentile(&mut delays, 0.99)
}

/// With a crowd whose members begin anew whenever those beside them have done all.
fn p99_us_beside(host: &Host) -> f64 {
    let measuring = Mutex::new(());
    std::thread::scope(|scope| {
        // Let go of when the measurement ends, and when it fails.
        let held = measuring.lock();
        scope.spawn(|| {
            let scripts = scripts();
            let parts: Vec<_> = scripts.chunks(TOGETHER).collect();
            let new = |part: &&[Script]| Crowd::new(host.mqtt(), part.to_vec());
            let mut crowds: Vec<_> = parts.iter().map(new).collect();
            for at in (0..parts.len()).cycle() {
                if !matches!(measuring.try_lock(), Err(TryLockError::WouldBlock)) {
                    return;
                }
                if !crowds[at].step() {
                    crowds[at] = new(&parts[at]);
                }
                std::thread::sleep(STEP / parts.len() as u32);
            }
        });
        let p99 = p99_us(host);
        drop(held);
        p99
    })
}
