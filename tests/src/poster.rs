//! A device that posts its messages over HTTP: it repeats a request, with the same Idempotency-Key, until
//! it is answered with 2xx, and knows what was.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::http::Connection;
use crate::publisher::{Address, Sent, Watched};
use crate::telemetry::message;

/// Only a hung test meets it.
const HUNG_AFTER: Duration = Duration::from_secs(120);

/// A running device. Its messages' `value` counts from 0, one message each.
#[derive(Debug)]
pub struct Poster {
    stop: Arc<AtomicBool>,
    acked: Arc<Watched<u64>>,
    thread: JoinHandle<Sent>,
}

impl Poster {
    /// Posts single messages with `batch` 1, else batches of so many.
    pub fn start(device: &str, batch: u64, address: Address) -> Self {
        let (stop, acked) = (Arc::new(AtomicBool::new(false)), Arc::new(Watched::default()));
        let (stopped, counted, device) = (stop.clone(), acked.clone(), device.to_owned());
        let thread = std::thread::spawn(move || {
            let (mut connection, mut place, mut count, mut reconnects) = (None, None, 0, 0);
            while !stopped.load(Ordering::Relaxed) {
                let (path, body) = request(&device, count, batch);
                let key = format!("{device}-{count}");
                let headers = [("Idempotency-Key", &*key), ("Content-Type", "application/x-ndjson")];
                loop {
                    let Some(open) = &mut connection else {
                        let (addr, number) = address.other_than(place);
                        connection = Connection::open(addr, HUNG_AFTER).ok();
                        if connection.is_none() {
                            // It is going down: the next one is at another place.
                            place = Some(number);
                        }
                        reconnects += 1;
                        continue;
                    };
                    match open.post(&path, &headers, body.as_bytes()) {
                        Ok((200 | 204, _)) => break,
                        Ok((status, answer)) => panic!("{device}: {status} {answer}"),
                        Err(_) => connection = None,
                    }
                }
                count += batch;
                counted.change(|acked| *acked = count);
            }
            // Each message is once a row, as with QoS 2.
            Sent { device, qos: 2, count, reconnects }
        });
        Self { stop, acked, thread }
    }

    /// Messages answered with 2xx so far.
    pub fn acked(&self) -> u64 {
        *self.acked.get()
    }

    /// Waits until so many are.
    pub fn await_acked(&self, count: u64) {
        let came = self.acked.wait(HUNG_AFTER, |acked| *acked >= count || self.thread.is_finished());
        assert!(came && self.acked() >= count, "no more answers after {}", self.acked());
    }

    /// Sends no new messages; returns once all begun are answered.
    pub fn finish(self) -> Sent {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the device goes on")
    }
}

fn request(device: &str, first: u64, batch: u64) -> (String, String) {
    if batch == 1 {
        let (topic, payload) = message(device, first);
        return (format!("/messages/{topic}"), payload);
    }
    let lines = (first..first + batch).map(|value| {
        let (topic, payload) = message(device, value);
        format!("{{\"topic\":\"{topic}\",\"payload\":{payload}}}\n")
    });
    ("/batch".to_owned(), lines.collect())
}
