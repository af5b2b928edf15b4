//! What each client did and what became of it, for an operator who looks for the one that
//! floods, is refused, or loses messages. Counted once a read or a write, not once a message.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, OnceLock};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::outbound::Filled;

/// Counts since the session began, or since the host started where that was later.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Messages that were taken in from the client, and the bytes of their payloads.
    pub published: u64,
    pub published_bytes: u64,
    /// Publishes of the client that the access rules or `topic_levels_max` refused.
    pub refused_publishes: u64,
    /// Filters of the client that were refused.
    pub refused_subscribes: u64,
    /// QoS 0 messages of the client that were dropped because the disk was full.
    pub no_space: u64,
    /// Times that the client was read no further for a while, because it or all clients together
    /// publish more than `mqtt.limits` allows.
    #[serde(default)]
    pub throttled: u64,
    /// Messages that were sent to the client; a message that is sent again counts again.
    pub delivered: u64,
    /// Messages for the client that its queue had no room for, or that waited in it for longer
    /// than `mqtt.queue_age_max`.
    pub dropped: u64,
    /// Messages for the client whose own expiry passed while they waited.
    pub expired: u64,
    /// Messages for the client that are larger than it takes.
    pub too_large: u64,
    /// Messages for the client that the access rules withheld.
    pub withheld: u64,
    /// Messages that waited for the client and are not in their stream any more: damaged on disk, removed by
    /// retention, or in a stream that lost its end or is older than the session.
    #[serde(default)]
    pub gone: u64,
}

impl Counts {
    pub fn refused(&self) -> u64 {
        self.refused_publishes + self.refused_subscribes
    }

    /// Messages for the client that it did not get.
    pub fn missed(&self) -> u64 {
        self.dropped + self.expired + self.too_large + self.withheld + self.gone
    }
}

/// What the client of one session did. Its connection writes this; anybody reads it.
#[derive(Debug, Default)]
pub struct Activity {
    /// Made with the first count: a client that only listens has none.
    counters: OnceLock<Box<Counters>>,
    /// Microseconds from [`BEGUN`]; 0: not yet.
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

/// Times of reads count from here, so that a read asks no second clock.
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

    /// A new session begins.
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

    /// Bytes came from the client.
    pub fn read(&self, at: Instant) {
        let us = at.saturating_duration_since(*BEGUN).as_micros() as u64;
        self.read_us.store(us.max(1), Ordering::Relaxed);
    }

    /// How long ago bytes came from the client.
    pub fn silent_for(&self) -> Option<Duration> {
        let us = Some(self.read_us.load(Ordering::Relaxed)).filter(|us| *us > 0)?;
        Some(BEGUN.elapsed().saturating_sub(Duration::from_micros(us)))
    }

    /// Without `dropped`, which the session's queue counts.
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
