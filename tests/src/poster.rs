//! A device that posts its messages over HTTP: it repeats a request, with the same Idempotency-Key, until
//! it is answered with 2xx, and knows what was.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::http::Connection;
use crate::http2;
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

/// A connection that several devices share: an HTTP/2 one, made anew once it is lost.
#[derive(Debug)]
pub struct Shared {
    address: Address,
    connection: Mutex<Option<Arc<http2::Client>>>,
}

/// The answer to a request, and the number of connections that were made for it.
struct Posted {
    status: u16,
    answer: String,
    reconnects: u32,
}

impl Shared {
    pub fn new(address: Address) -> Arc<Self> {
        Arc::new(Self { address, connection: Mutex::default() })
    }

    fn get(&self) -> Arc<http2::Client> {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let connect = || Arc::new(http2::Client::plain(self.address.other_than(None).0));
        connection.get_or_insert_with(connect).clone()
    }

    fn lost(&self, lost: &Arc<http2::Client>) {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        if connection.as_ref().is_some_and(|open| Arc::ptr_eq(open, lost)) {
            *connection = None;
        }
    }
}

impl Poster {
    /// Posts single messages with `batch` 1, else batches of so many, over a connection of its own.
    pub fn start(device: &str, batch: u64, address: Address) -> Self {
        let (mut connection, mut place) = (None, None);
        Self::start_over(device, batch, move |path, headers, body| {
            let mut reconnects = 0;
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
                match open.post(path, headers, body.as_bytes()) {
                    Ok((status, answer)) => return Posted { status, answer, reconnects },
                    Err(_) => connection = None,
                }
            }
        })
    }

    /// The same, over the connection of several devices.
    pub fn start_on(device: &str, batch: u64, shared: Arc<Shared>) -> Self {
        let mut connection = None;
        Self::start_over(device, batch, move |path, headers, body| {
            let mut reconnects = 0;
            loop {
                let open = connection.get_or_insert_with(|| {
                    reconnects += 1;
                    shared.get()
                });
                match open.post(path, headers, body) {
                    Ok(answer) => {
                        return Posted { status: answer.status, answer: answer.body, reconnects };
                    }
                    Err(_) => {
                        shared.lost(open);
                        connection = None;
                    }
                }
            }
        })
    }

    fn start_over(
        device: &str,
        batch: u64,
        mut post: impl FnMut(&str, &[(&str, &str)], &str) -> Posted + Send + 'static,
    ) -> Self {
        let (stop, acked) = (Arc::new(AtomicBool::new(false)), Arc::new(Watched::default()));
        let (stopped, counted, device) = (stop.clone(), acked.clone(), device.to_owned());
        let thread = std::thread::spawn(move || {
            let (mut count, mut reconnects) = (0, 0);
            while !stopped.load(Ordering::Relaxed) {
                let (path, body) = request(&device, count, batch);
                let key = format!("{device}-{count}");
                let headers = [("Idempotency-Key", &*key), ("Content-Type", "application/x-ndjson")];
                let posted = post(&path, &headers, &body);
                let Posted { status, answer, .. } = &posted;
                assert!(matches!(status, 200 | 204), "{device}: {status} {answer}");
                reconnects += posted.reconnects;
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
