//! Wakes many connections for which there are deliveries together.
//!
//! A wakeup from a thread of another runtime takes a lock and usually a system call. If threads share
//! cores, the woken thread also takes the core from live delivery, writes one message, and returns the
//! core. Gathered wakeups cost a third of that: a subscriber receives several messages in one write, and
//! the runtime's own threads queue its connections.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::listeners::mqtt::Broker;
use crate::listeners::mqtt::outbound::Offer;
use crate::listeners::mqtt::session::Session;

/// Longest time that a connection waits while a batch has more messages to deliver.
const GATHERED_TIME: Duration = Duration::from_millis(1);
/// Number of connections up to which they are woken directly, because a task for it would cost as much.
const FEW: usize = 2;
/// Number of connections that one task wakes, while its thread serves no other.
const WOKEN_AT_ONCE: usize = 256;

/// Connections that have something to send and have not been woken. They are woken when this is dropped.
pub struct Wakes<'b> {
    broker: &'b Broker,
    sessions: Vec<Arc<Session>>,
    since: Instant,
}

impl<'b> Wakes<'b> {
    pub fn new(broker: &'b Broker) -> Self {
        Self { broker, sessions: Vec::new(), since: Instant::now() }
    }

    /// Counts the result of a delivery, and gathers the session's connection if it must be woken.
    pub(super) fn offered(&mut self, session: &Arc<Session>, offer: Offer) {
        let dropped = |full, count| self.broker.counters.dropped_at(full).increment(count);
        match offer {
            Offer::Queued | Offer::Away | Offer::Before => {}
            Offer::QueuedInsteadOf(count, full) => dropped(full, count.into()),
            Offer::QueuedFirst => self.add(session),
            Offer::Dropped(full) => dropped(full, 1),
            Offer::Overflow(full) => {
                dropped(full, 1);
                session.overflow.store(true, Ordering::Release);
                self.add(session);
            }
        }
    }

    fn add(&mut self, session: &Arc<Session>) {
        if self.sessions.is_empty() {
            self.since = Instant::now();
        }
        self.sessions.push(session.clone());
    }

    /// Wakes the connections if the first of them has waited for [`GATHERED_TIME`].
    pub(super) fn send_due(&mut self) {
        if !self.sessions.is_empty() && self.since.elapsed() >= GATHERED_TIME {
            self.send();
        }
    }

    fn send(&mut self) {
        if self.sessions.len() <= FEW {
            wake(&self.sessions);
            self.sessions.clear();
            return;
        }
        while !self.sessions.is_empty() {
            let some = self.sessions.split_off(self.sessions.len().saturating_sub(WOKEN_AT_ONCE));
            self.broker.connections.spawn(async move { wake(&some) });
        }
    }
}

impl Drop for Wakes<'_> {
    fn drop(&mut self) {
        self.send();
    }
}

fn wake(sessions: &[Arc<Session>]) {
    sessions.iter().for_each(|session| session.wake.notify_one());
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::listeners::mqtt::config::Config;
    use crate::listeners::mqtt::fuzzing;
    use crate::listeners::mqtt::outbound::Full;
    use crate::stream::memory::MemoryStream;

    fn broker() -> Arc<Broker> {
        let stream = |name| MemoryStream::new(name, 1);
        fuzzing::broker(&Config::default(), stream("s"), stream("broker"))
    }

    async fn sessions(broker: &Broker, count: usize) -> Vec<Arc<Session>> {
        let mut sessions = Vec::new();
        for number in 0..count {
            let claimed = broker.sessions.claim(&format!("{count}-{number}"), usize::MAX).await;
            let (session, _) = claimed.expect("there is no bound");
            // Claiming a session wakes the connection that has it.
            assert!(is_woken(&session));
            sessions.push(session);
        }
        sessions
    }

    fn is_woken(session: &Arc<Session>) -> bool {
        session.wake.notified().now_or_never().is_some()
    }

    #[tokio::test]
    async fn every_connection_that_has_something_to_send_is_woken() {
        let broker = broker();
        for count in [1, FEW, FEW + 1, WOKEN_AT_ONCE, 2 * WOKEN_AT_ONCE + 1] {
            let sessions = sessions(&broker, count).await;
            let mut wakes = Wakes::new(&broker);
            sessions.iter().for_each(|session| wakes.offered(session, Offer::QueuedFirst));
            assert!(!sessions.iter().any(is_woken), "wakes are gathered");
            drop(wakes);
            for session in &sessions {
                session.wake.notified().await;
            }
        }
    }

    #[tokio::test]
    async fn a_connection_that_has_nothing_new_to_do_is_not_woken() {
        let broker = broker();
        let sessions = sessions(&broker, 1).await;
        let session = &sessions[0];
        let mut wakes = Wakes::new(&broker);
        let full = Full::Queue;
        for offer in [Offer::QueuedInsteadOf(1, full), Offer::Away, Offer::Before, Offer::Dropped(full)] {
            wakes.offered(session, offer);
        }
        wakes.offered(session, Offer::Queued);
        drop(wakes);
        assert!(!is_woken(session));
        Wakes::new(&broker).offered(session, Offer::Overflow(full));
        assert!(is_woken(session));
        assert!(session.overflow.load(Ordering::Acquire), "it is to be disconnected");
    }
}
