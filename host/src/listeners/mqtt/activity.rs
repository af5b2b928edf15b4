//! Counters of each client's messages and their outcomes, with which an operator finds the client that
//! floods, is refused, or loses messages. They are updated once for each read or write, not for each
//! message.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, OnceLock};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::outbound::Filled;

/// Counters since the session began, or since the host started, whichever is later.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Accepted messages of the client, and the bytes of their payloads.
    pub published: u64,
    pub published_bytes: u64,
    /// Publishes of the client that were refused by the access rules or by `topic_levels_max`.
    pub refused_publishes: u64,
    /// Refused filters of the client.
    pub refused_subscribes: u64,
    /// QoS 0 messages of the client that were dropped because the disk was full.
    pub no_space: u64,
    /// Number of times that reading from the client paused because it, or all clients together, exceeded
    /// a rate in `mqtt.limits`.
    #[serde(default)]
    pub throttled: u64,
    /// Messages sent to the client. A message that is sent again is counted again.
    pub delivered: u64,
    /// Messages for the client that were dropped because its queue was full, or because they were older
    /// than `mqtt.queue_age_max`.
    pub dropped: u64,
    /// Messages for the client that expired while they were queued.
    pub expired: u64,
    /// Messages for the client that exceed its maximum packet size.
    pub too_large: u64,
    /// Messages for the client that the access rules denied.
    pub withheld: u64,
    /// Messages that were queued for the client and are no longer in their stream: damaged on disk,
    /// removed by retention, or in a stream that lost its end or is older than the session.
    #[serde(default)]
    pub gone: u64,
}

impl Counts {
    pub fn refused(&self) -> u64 {
        self.refused_publishes + self.refused_subscribes
    }

    /// Returns the number of messages for the client that it did not receive.
    pub fn missed(&self) -> u64 {
        self.dropped + self.expired + self.too_large + self.withheld + self.gone
    }
}

/// Activity of the client of one session. The session's connection writes it, and any thread can read
/// it.
#[derive(Debug, Default)]
pub struct Activity {
    /// Counters, which are allocated with the first count. A client that only listens has none.
    counters: OnceLock<Box<Counters>>,
    /// Time of the last read in microseconds since [`BEGUN`]; 0 if there was none.
    read_us: AtomicU64,
}

#[derive(Debug, Default)]
struct Counters {
    published: AtomicU64,
    published_bytes: AtomicU64,
    refused_publishes: AtomicU64,
    refused_subscribes: AtomicU64,
    no_space: AtomicU64,
    throttled: AtomicU64,
    delivered: AtomicU64,
    expired: AtomicU64,
    too_large: AtomicU64,
    withheld: AtomicU64,
    gone: AtomicU64,
}

/// Start of the times of reads, so that a read needs no second clock.
static BEGUN: LazyLock<Instant> = LazyLock::new(Instant::now);

impl Activity {
    pub fn published(&self, messages: usize, bytes: u64) {
        self.add(|counters| &counters.published, messages as u64);
        self.add(|counters| &counters.published_bytes, bytes);
    }

    pub fn refused_publish(&self) {
        self.add(|counters| &counters.refused_publishes, 1);
    }

    pub fn refused_subscribe(&self) {
        self.add(|counters| &counters.refused_subscribes, 1);
    }

    pub fn no_space(&self, messages: u64) {
        self.add(|counters| &counters.no_space, messages);
    }

    pub fn throttled(&self) {
        self.add(|counters| &counters.throttled, 1);
    }

    pub fn filled(&self, filled: &Filled) {
        self.add(|counters| &counters.delivered, filled.sent);
        self.add(|counters| &counters.expired, filled.expired);
        self.add(|counters| &counters.too_large, filled.too_large);
        self.add(|counters| &counters.withheld, filled.denied);
    }

    pub fn gone(&self, messages: u64) {
        self.add(|counters| &counters.gone, messages);
    }

    fn add(&self, counter: impl FnOnce(&Counters) -> &AtomicU64, more: u64) {
        if more > 0 {
            counter(self.counters.get_or_init(Box::default)).fetch_add(more, Ordering::Relaxed);
        }
    }

    /// Resets the activity for a new session.
    pub fn reset(&self) {
        self.read_us.store(0, Ordering::Relaxed);
        let Some(counters) = self.counters.get() else { return };
        let Counters {
            published,
            published_bytes,
            refused_publishes,
            refused_subscribes,
            no_space,
            throttled,
            delivered,
            expired,
            too_large,
            withheld,
            gone,
        } = &**counters;
        for count in [published, published_bytes, refused_publishes, refused_subscribes, no_space] {
            count.store(0, Ordering::Relaxed);
        }
        for count in [throttled, delivered, expired, too_large, withheld, gone] {
            count.store(0, Ordering::Relaxed);
        }
    }

    /// Records that bytes of the client were read.
    pub fn read(&self, at: Instant) {
        let us = at.saturating_duration_since(*BEGUN).as_micros() as u64;
        self.read_us.store(us.max(1), Ordering::Relaxed);
    }

    /// Returns the time since bytes of the client were last read.
    pub fn silent_for(&self) -> Option<Duration> {
        let us = Some(self.read_us.load(Ordering::Relaxed)).filter(|us| *us > 0)?;
        Some(BEGUN.elapsed().saturating_sub(Duration::from_micros(us)))
    }

    /// Returns the counters, except `dropped`, which the session's queue counts.
    pub fn counts(&self) -> Counts {
        let Some(counters) = self.counters.get() else { return Counts::default() };
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Counts {
            published: get(&counters.published),
            published_bytes: get(&counters.published_bytes),
            refused_publishes: get(&counters.refused_publishes),
            refused_subscribes: get(&counters.refused_subscribes),
            no_space: get(&counters.no_space),
            throttled: get(&counters.throttled),
            delivered: get(&counters.delivered),
            dropped: 0,
            expired: get(&counters.expired),
            too_large: get(&counters.too_large),
            withheld: get(&counters.withheld),
            gone: get(&counters.gone),
        }
    }
}
