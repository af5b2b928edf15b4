//! `$SYS` topics: the broker's statistics, under the names that Mosquitto uses (mosquitto(8), "Broker
//! Status"). They are derived from the counters every `sys_interval`; a new subscriber receives the
//! current values. They are in no stream, and only subscribers of topics below `$` receive them.

use std::future::pending;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::Broker;
use super::metrics::{Counters, RECEIVED, SENT};
use super::outbound::Message;
use super::wire;
use crate::batch::flags;
use crate::topic::TopicFilter;

const ROOT: &str = "$SYS/broker";
/// Windows of the moving averages.
const MINUTES: [u32; 3] = [1, 5, 15];

pub struct Sys {
    begin: Instant,
    loads: Mutex<Loads>,
    /// Whether a subscriber received current values since the last round, so that more may have changed
    /// for it.
    asked: AtomicBool,
}

struct Loads {
    at: Instant,
    loads: [Load; LOADS.len()],
}

/// The rate of a counter per minute, averaged over [`MINUTES`].
#[derive(Clone, Copy, Default)]
struct Load {
    total: u64,
    averages: [f64; MINUTES.len()],
}

type Total = fn(&Counters) -> u64;

const LOADS: [(&str, Total); 9] = [
    ("messages/received", |counters| counters.received.total()),
    ("messages/sent", |counters| counters.sent.total()),
    ("publish/received", |counters| counters.received.of(wire::PUBLISH)),
    ("publish/sent", |counters| counters.sent.of(wire::PUBLISH)),
    ("publish/dropped", Counters::dropped),
    ("bytes/received", |counters| counters.bytes[RECEIVED].get()),
    ("bytes/sent", |counters| counters.bytes[SENT].get()),
    ("connections", |counters| counters.received.of(wire::CONNECT)),
    ("sockets", |counters| counters.sockets.get()),
];

impl Sys {
    pub fn new() -> Self {
        let begin = Instant::now();
        let loads = Loads { at: begin, loads: [Load::default(); LOADS.len()] };
        Self { begin, loads: Mutex::new(loads), asked: AtomicBool::new(false) }
    }
}

impl Load {
    /// Updates the exponential moving average, in which old values decrease by the factor e in each
    /// window.
    fn pass(&mut self, total: u64, elapsed: Duration) {
        let new = total.saturating_sub(std::mem::replace(&mut self.total, total)) as f64;
        let a_minute = new * 60.0 / elapsed.as_secs_f64();
        for (average, minutes) in self.averages.iter_mut().zip(MINUTES) {
            let kept = (-elapsed.as_secs_f64() / (60.0 * f64::from(minutes))).exp();
            *average = a_minute + kept * (*average - a_minute);
        }
    }
}

/// Publishes changed values every `sys_interval` until shutdown.
pub async fn run(broker: Arc<Broker>) {
    let mut config = broker.config.subscribe();
    let mut last: Vec<String> = Vec::new();
    loop {
        let interval = config.borrow_and_update().sys_interval.0;
        let due = async {
            if interval.is_zero() {
                pending().await
            } else {
                tokio::time::sleep(interval).await;
            }
        };
        tokio::select! {
            () = due => {}
            // The interval may be another one.
            Ok(()) = config.changed() => continue,
            () = broker.shutdown.cancelled() => return,
        }
        broker.measure();
        broker.sys.pass(&broker.counters);
        if broker.live.wants_dollar() {
            publish(&broker, &mut last);
        }
    }
}

/// Publishes one round. `last` has the values of the previous one.
fn publish(broker: &Broker, last: &mut Vec<String>) {
    if broker.sys.asked.swap(false, Ordering::AcqRel) {
        last.clear();
    }
    let values = values(broker);
    for (i, (topic, value)) in values.iter().enumerate() {
        if last.get(i) != Some(value) {
            broker.live.publish(broker, &Arc::new(message(topic, value)));
        }
    }
    *last = values.into_iter().map(|(_, value)| value).collect();
}

/// Returns the messages for a new subscriber.
pub fn matching(broker: &Broker, filter: &TopicFilter) -> Vec<Message> {
    if broker.config().sys_interval.0.is_zero() {
        return Vec::new();
    }
    broker.sys.asked.store(true, Ordering::Release);
    let values = values(broker).into_iter().filter(|(topic, _)| filter.matches(topic));
    values.map(|(topic, value)| message(&topic, &value)).collect()
}

fn message(topic: &str, value: &str) -> Message {
    Message::new(topic, value.as_bytes(), &[], flags::RETAIN, super::now_us())
}

impl Sys {
    fn pass(&self, counters: &Counters) {
        let mut loads = self.loads.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let elapsed = now.duration_since(std::mem::replace(&mut loads.at, now));
        for (load, (_, total)) in loads.loads.iter_mut().zip(LOADS) {
            load.pass(total(counters), elapsed);
        }
    }
}

/// Returns all values, always with the same topics in the same order.
fn values(broker: &Broker) -> Vec<(String, String)> {
    let counters = &broker.counters;
    let totals = &broker.totals;
    let connected = u64::try_from(broker.clients.load(Ordering::Acquire)).unwrap_or(0);
    let sessions = (broker.sessions.len() as u64).max(connected);
    let (retained, retained_bytes) = broker.retained().sizes();
    let waiting = totals.queued.load(Ordering::Relaxed) + totals.in_flight.load(Ordering::Relaxed);
    let stored_bytes = totals.queued_bytes.load(Ordering::Relaxed) + retained_bytes as u64;
    let mut values: Vec<(String, String)> = [
        ("clients/connected", connected),
        ("clients/disconnected", sessions - connected),
        // The names of these two in older versions of Mosquitto, which still has them.
        ("clients/active", connected),
        ("clients/inactive", sessions - connected),
        ("clients/total", sessions),
        ("clients/maximum", broker.clients_most.load(Ordering::Relaxed).max(connected)),
        ("clients/expired", counters.sessions_expired.get()),
        ("messages/received", counters.received.total()),
        ("messages/sent", counters.sent.total()),
        ("messages/stored", waiting + retained as u64),
        ("store/messages/count", waiting + retained as u64),
        ("store/messages/bytes", stored_bytes),
        ("publish/messages/received", counters.received.of(wire::PUBLISH)),
        ("publish/messages/sent", counters.sent.of(wire::PUBLISH)),
        ("publish/messages/dropped", counters.dropped()),
        ("publish/bytes/received", counters.publish_bytes.get()),
        ("publish/bytes/sent", counters.delivery_bytes.get()),
        ("bytes/received", counters.bytes[RECEIVED].get()),
        ("bytes/sent", counters.bytes[SENT].get()),
        ("subscriptions/count", broker.live.subscriptions() as u64),
        ("retained messages/count", retained as u64),
    ]
    .map(|(name, value)| (format!("{ROOT}/{name}"), value.to_string()))
    .into();
    let text = |name: &str, value: String| (format!("{ROOT}/{name}"), value);
    values.push(text("version", format!("headworks version {}", env!("CARGO_PKG_VERSION"))));
    values.push(text("uptime", format!("{} seconds", broker.sys.begin.elapsed().as_secs())));
    let loads = broker.sys.loads.lock().unwrap_or_else(PoisonError::into_inner).loads;
    for ((name, _), load) in LOADS.iter().zip(loads) {
        for (minutes, average) in MINUTES.iter().zip(load.averages) {
            values.push(text(&format!("load/{name}/{minutes}min"), format!("{average:.2}")));
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::listeners::mqtt::config::Config;
    use crate::listeners::mqtt::fanout::{SendRetained, Subscription};
    use crate::listeners::mqtt::fuzzing::broker;
    use crate::listeners::mqtt::subscriptions::{Filter, Options};
    use crate::stream::memory::MemoryStream;

    #[tokio::test]
    async fn a_subscriber_hears_of_what_went_back_since_it_came() {
        let store = || MemoryStream::new("s", 1);
        let broker = broker(&Config::default(), store(), store());
        let mut last = Vec::new();
        publish(&broker, &mut last);
        broker.client_connected(1);
        let (session, _turn) = broker.sessions.claim("c", 9).await.unwrap();
        session.outbox().resume();
        let subscribe = |retained| {
            let filter = Filter::parse("$SYS/broker/clients/connected").unwrap();
            let options = Options { qos: 0, no_local: false, retain_as_published: false, id: 0 };
            broker.live.subscribe(&broker, &session, &[Subscription { filter, options, retained }]);
        };
        let waiting = || session.outbox().sizes().0;
        subscribe(SendRetained::IfNew);
        assert_eq!(waiting(), 1, "there is 1 client");
        subscribe(SendRetained::IfNew);
        subscribe(SendRetained::Never);
        assert_eq!(waiting(), 1, "which it has been told");
        broker.client_connected(-1);
        publish(&broker, &mut last);
        assert_eq!(waiting(), 2, "there is none");
        publish(&broker, &mut last);
        assert_eq!(waiting(), 2, "and that stays so");
    }

    #[test]
    fn a_steady_rate_is_its_own_average_and_a_burst_fades() {
        let mut load = Load::default();
        let second = Duration::from_secs(1);
        for n in 1..=7_200 {
            load.pass(n * 10, second);
        }
        assert!(load.averages.iter().all(|average| (average - 600.0).abs() < 1.0), "{:?}", load.averages);
        for _ in 0..60 {
            load.pass(72_000, second);
        }
        let [one, five, fifteen] = load.averages;
        assert!((one - 600.0 / std::f64::consts::E).abs() < 1.0, "{one}");
        assert!(one < five && five < fifteen && fifteen < 600.0, "{:?}", load.averages);
        let whole = {
            let mut whole = Load::default();
            whole.pass(600, 60 * second);
            whole
        };
        let halves = {
            let mut halves = Load::default();
            halves.pass(300, 30 * second);
            halves.pass(600, 30 * second);
            halves
        };
        assert!((whole.averages[0] - halves.averages[0]).abs() < 1e-9, "whatever the interval");
    }
}
