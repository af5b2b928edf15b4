//! A device that keeps its promises: it resends what was not acknowledged, on
//! the same session and with the same packet ids, until everything it began is
//! acknowledged, and knows what was.

use std::collections::VecDeque;
use std::io::Write;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::mqtt::{self, Connection, Version, kind};

/// Where the broker listens now; a restart may move it. `None` while it is down.
#[derive(Clone, Debug, Default)]
pub struct Address(Arc<Watched<Place>>);

#[derive(Clone, Copy, Debug, Default)]
struct Place {
    addr: Option<SocketAddr>,
    /// Counts the changes.
    change: u64,
}

impl Address {
    pub fn new(addr: SocketAddr) -> Self {
        let address = Self::default();
        address.set(Some(addr));
        address
    }

    pub fn set(&self, addr: Option<SocketAddr>) {
        self.0.change(|place| *place = Place { addr, change: place.change + 1 });
    }

    /// Waits for an address that was not tried in vain; returns it, and what names it for the next call.
    pub fn other_than(&self, in_vain: Option<u64>) -> (SocketAddr, u64) {
        let is_new = |place: &Place| place.addr.is_some() && in_vain != Some(place.change);
        assert!(self.0.wait(HUNG_AFTER, is_new), "the host does not come back");
        let place = *self.0.get();
        match place.addr {
            Some(addr) => (addr, place.change),
            // It went away again.
            None => self.other_than(in_vain),
        }
    }
}

/// A value that others wait for.
#[derive(Debug, Default)]
pub(crate) struct Watched<T> {
    value: Mutex<T>,
    changed: Condvar,
}

impl<T> Watched<T> {
    pub(crate) fn get(&self) -> MutexGuard<'_, T> {
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut T)) {
        change(&mut self.get());
        self.changed.notify_all();
    }

    /// False where it was not in time.
    pub(crate) fn wait(&self, at_most: Duration, until: impl Fn(&T) -> bool) -> bool {
        let waited = self.changed.wait_timeout_while(self.get(), at_most, |value| !until(value));
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}

#[derive(Clone, Debug)]
pub struct Plan {
    pub device: String,
    pub version: Version,
    pub qos: u8,
    /// Unacknowledged at once.
    pub window: usize,
    /// Pause once a window is acknowledged, before the next one, so that a test may last without filling
    /// disks. Without one, each ack makes room for the next message.
    pub pause: Duration,
    /// Bytes of each payload that become no part of a row.
    pub padding: usize,
    /// Whether the message with this value is one that `normalize` rejects.
    pub is_bad: fn(u64) -> bool,
}

impl Plan {
    /// Half of the devices speak 3.1.1, half 5.0.
    pub fn new(number: usize, qos: u8) -> Self {
        Self {
            device: format!("device-q{qos}-{number}"),
            version: if number.is_multiple_of(2) { Version::V5 } else { Version::V311 },
            qos,
            window: 20,
            pause: Duration::ZERO,
            padding: 0,
            is_bad: |_| false,
        }
    }
}

/// A running device. Its messages' `value` counts from 0, one message each.
#[derive(Debug)]
pub struct Publisher {
    stop: Arc<AtomicBool>,
    address: Address,
    acked: Arc<Watched<u64>>,
    thread: JoinHandle<Sent>,
    device: String,
}

/// What a device sent: every value below `count`, each acknowledged.
#[derive(Clone, Debug)]
pub struct Sent {
    pub device: String,
    pub qos: u8,
    pub count: u64,
    pub reconnects: u32,
}

/// Only a hung test meets it: a broker that does not come back, an ack that does not come.
const HUNG_AFTER: Duration = Duration::from_secs(120);

impl Publisher {
    pub fn start(plan: Plan, address: Address) -> Self {
        let (stop, acked) = (Arc::new(AtomicBool::new(false)), Arc::new(Watched::default()));
        let device = plan.device.clone();
        let thread = std::thread::Builder::new()
            .name(device.clone())
            .spawn({
                let (stop, acked, address) = (stop.clone(), acked.clone(), address.clone());
                move || {
                    Session { plan, address, stop, acked, window: VecDeque::new(), next: 0, reconnects: 0 }
                        .run()
                }
            })
            .expect("a thread");
        Self { stop, address, acked, thread, device }
    }

    /// Messages acknowledged so far.
    pub fn acked(&self) -> u64 {
        *self.acked.get()
    }

    /// Waits until so many are acknowledged.
    pub fn await_acked(&self, count: u64) {
        let came = self.acked.wait(HUNG_AFTER, |acked| *acked >= count || self.thread.is_finished());
        assert!(came && self.acked() >= count, "{}: no more acks after {}", self.device, self.acked());
    }

    /// No new messages; returns once all begun are acknowledged.
    pub fn finish(self) -> Sent {
        self.stop.store(true, Ordering::Relaxed);
        self.address.0.change(|_| ());
        self.thread.join().unwrap_or_else(|_| panic!("{} failed", self.device))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Awaits PUBACK or PUBREC.
    Published,
    /// QoS 2: PUBREC came, PUBREL went out, awaits PUBCOMP.
    Released,
    Done,
}

struct Session {
    plan: Plan,
    address: Address,
    stop: Arc<AtomicBool>,
    acked: Arc<Watched<u64>>,
    /// Values `next - window.len() .. next`.
    window: VecDeque<Phase>,
    next: u64,
    reconnects: u32,
}

impl Session {
    fn run(mut self) -> Sent {
        let mut known = false;
        let mut in_vain = None;
        while !self.is_stopped() || !self.window.is_empty() {
            let has_ended = || self.is_stopped() && self.window.is_empty();
            let is_new = |place: &Place| place.addr.is_some() && in_vain != Some(place.change);
            let came = self.address.0.wait(HUNG_AFTER, |place| is_new(place) || has_ended());
            assert!(came, "{}: the broker does not come back", self.plan.device);
            let place = *self.address.0.get();
            let Some(addr) = place.addr else { continue };
            let opened = Connection::open(addr, self.plan.version, &self.plan.device, false);
            let Ok(mut connection) = opened else {
                // It is going down: the next one is at another place.
                in_vain = Some(place.change);
                continue;
            };
            // The first CONNACK may be lost with the host, so the second may find a session or none.
            if known {
                assert!(connection.session_present, "{}: the broker forgot the session", self.plan.device);
                self.reconnects += 1;
            }
            known |= self.plan.qos == 2 && *self.acked.get() > 0;
            connection.stream.set_read_timeout(Some(HUNG_AFTER)).expect("a socket");
            // An error is the broker's end, or its restart: connect again.
            let _ = self.talk(&mut connection, &mut known);
        }
        Sent { device: self.plan.device, qos: self.plan.qos, count: self.next, reconnects: self.reconnects }
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn talk(&mut self, connection: &mut Connection, known: &mut bool) -> std::io::Result<()> {
        let is_paced = !self.plan.pause.is_zero();
        let mut out = Vec::new();
        self.resend(&mut out);
        loop {
            if !is_paced || self.window.is_empty() {
                while !self.is_stopped() && self.window.len() < self.plan.window {
                    self.window.push_back(Phase::Published);
                    self.next += 1;
                    self.encode(&mut out, self.next - 1, false);
                }
            }
            connection.stream.write_all(&out)?;
            out.clear();
            if self.window.is_empty() {
                mqtt::disconnect(&mut out);
                return connection.stream.write_all(&out);
            }
            match self.acks(connection, &mut out) {
                Err(error)
                    if matches!(
                        error.kind(),
                        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                    ) =>
                {
                    panic!("{}: an ack does not come", self.plan.device)
                }
                other => other?,
            }
            *known |= self.plan.qos == 2 && *self.acked.get() > 0;
            if is_paced && self.window.is_empty() {
                // Being told to stop ends it.
                self.address.0.wait(self.plan.pause, |_| self.is_stopped());
            }
        }
    }

    /// In the original order, as MQTT 4.4 and 4.6 ask.
    fn resend(&self, out: &mut Vec<u8>) {
        let first = self.next - self.window.len() as u64;
        for (value, phase) in (first..).zip(&self.window) {
            match phase {
                Phase::Published => self.encode(out, value, true),
                Phase::Released => mqtt::pubrel(out, packet_id(value)),
                Phase::Done => {}
            }
        }
    }

    fn encode(&self, out: &mut Vec<u8>, value: u64, dup: bool) {
        let (topic, mut payload) = match (self.plan.is_bad)(value) {
            true => crate::telemetry::bad_message(&self.plan.device, value),
            false => crate::telemetry::message(&self.plan.device, value),
        };
        if self.plan.padding > 0 {
            let end = payload.pop().expect("the end of an object");
            payload.extend([r#","padding":""#, &"x".repeat(self.plan.padding), "\""]);
            payload.push(end);
        }
        mqtt::publish(
            out,
            self.plan.version,
            self.plan.qos,
            dup,
            &topic,
            packet_id(value),
            payload.as_bytes(),
        );
    }

    fn acks(&mut self, connection: &mut Connection, out: &mut Vec<u8>) -> std::io::Result<()> {
        let (window, next, acked) = (&mut self.window, self.next, &self.acked);
        let mut refused = None;
        connection.receive(|packet| {
            // Packet Identifier not found: the release was durable before a kill, its PUBCOMP was
            // not sent. "This is not an error during recovery" (MQTT 5.0, 3.7.2.1).
            let is_released_before = packet.kind() == kind::PUBCOMP && packet.reason() == 0x92;
            if !matches!(packet.kind(), kind::PUBACK | kind::PUBREC | kind::PUBCOMP)
                || (packet.reason() >= 0x80 && !is_released_before)
            {
                refused = Some((packet.kind(), packet.body.to_vec()));
                return;
            }
            let first = next - window.len() as u64;
            let id = packet.packet_id();
            let Some(at) = (0..window.len()).find(|at| packet_id(first + *at as u64) == id) else { return };
            match packet.kind() {
                kind::PUBACK => window[at] = Phase::Done,
                kind::PUBREC => {
                    if window[at] == Phase::Published {
                        window[at] = Phase::Released;
                    }
                    mqtt::pubrel(out, id);
                }
                _ => window[at] = Phase::Done,
            }
            while window.front() == Some(&Phase::Done) {
                window.pop_front();
                acked.change(|acked| *acked += 1);
            }
        })?;
        match refused {
            Some((kind::DISCONNECT, body)) => Err(std::io::Error::other(format!("disconnected: {body:?}"))),
            Some(other) => panic!("{}: an answer that no device can live with: {other:?}", self.plan.device),
            None => Ok(()),
        }
    }
}

/// 1..=65,535; unique within any window.
fn packet_id(value: u64) -> u16 {
    (value % 65_535) as u16 + 1
}
