//! Live delivery: one task per stream follows its durable tail and hands each
//! message to the subscribers whose filters match.
//!
//! With nobody subscribed the tasks sleep and the streams are not read. A
//! subscriber gets a retained message from memory only where the task has
//! already passed it, decided under one lock, so that it comes exactly once.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::Notify;

use super::Broker;
use super::outbound::{Message, Offer, QueueLimits, Queued};
use super::session::Session;
use super::subscriptions::{Filter, Found, Options, Share, Subscriber, Tree, is_live};
use crate::batch::{Batch, Offset};
use crate::properties::{self, Origin};
use crate::stream::{Read, ReadError, Stream};

/// No message of this stream is delivered now.
const IDLE: u64 = u64::MAX;
/// After a read that failed.
const READ_RETRY_AFTER: Duration = Duration::from_secs(1);

pub struct Live {
    index: RwLock<Index>,
    streams: Vec<Tail>,
    /// Subscriptions below `$`.
    dollar: AtomicUsize,
    /// Subscriptions with No Local: publishers then store who they are.
    no_local: AtomicUsize,
    limits: QueueLimits,
}

#[derive(Default)]
struct Index {
    tree: Tree,
    /// Subscriptions that messages of streams can match.
    live: usize,
}

struct Tail {
    /// Offset of the next message to be delivered, or `IDLE`. Changes to and
    /// from `IDLE` under the index's write lock, moves under its read lock.
    position: AtomicU64,
    start: Notify,
}

/// How a SUBSCRIBE wants retained messages (MQTT 5.0, 3.8.3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendRetained {
    Always,
    IfNew,
    Never,
}

impl Live {
    pub fn new(streams: usize, limits: QueueLimits) -> Self {
        let tail = |_| Tail { position: AtomicU64::new(IDLE), start: Notify::new() };
        Self {
            index: RwLock::default(),
            streams: (0..streams).map(tail).collect(),
            dollar: AtomicUsize::new(0),
            no_local: AtomicUsize::new(0),
            limits,
        }
    }

    /// Whether messages need to name their publisher.
    #[inline]
    pub fn wants_publisher(&self) -> bool {
        self.no_local.load(Ordering::Relaxed) > 0
    }

    pub fn wants_dollar(&self) -> bool {
        self.dollar.load(Ordering::Relaxed) > 0
    }

    /// Subscribes, and queues the retained messages that match.
    pub fn subscribe(
        &self,
        broker: &Broker,
        session: &Arc<Session>,
        filter: &Filter,
        options: Options,
        retained: SendRetained,
    ) {
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        // Off and on again, so that the counts follow changed options.
        let new = !self.take_out(&mut index, session, filter.as_str());
        index.tree.insert(filter.as_str(), session.number, session.clone(), options);
        self.no_local.fetch_add(usize::from(options.no_local), Ordering::Relaxed);
        if new {
            session.add_filter(filter.as_str());
        }
        if !is_live(filter.as_str()) {
            self.dollar.fetch_add(1, Ordering::Relaxed);
        } else {
            index.live += 1;
            for (stream, tail) in broker.streams.iter().zip(&self.streams) {
                if tail.position.load(Ordering::Relaxed) == IDLE {
                    tail.position.store(stream.bounds().end.0, Ordering::Relaxed);
                    tail.start.notify_one();
                }
            }
        }
        let wanted = match retained {
            SendRetained::Always => true,
            SendRetained::IfNew => new,
            SendRetained::Never => false,
        };
        // A share's members get none (MQTT 5.0, 4.8.2).
        if !wanted || filter.is_shared() {
            return;
        }
        let kept = broker.retained().matching(filter.topics());
        for kept in kept {
            // Not passed yet: it comes live, once it is durable.
            if kept.offset.0 < self.streams[kept.stream].position.load(Ordering::Relaxed) {
                let qos = kept.message.qos.min(options.qos);
                let (message, ids) = (kept.message, ids(options));
                self.offer(broker, session, Queued { message, qos, retain: true, ids, share: None });
            }
        }
        if filter.topics().matches(super::CLIENTS_CONNECTED) {
            let (message, ids) = (Arc::new(broker.clients_connected()), ids(options));
            self.offer(broker, session, Queued { message, qos: 0, retain: true, ids, share: None });
        }
    }

    /// True when the session had this filter.
    pub fn unsubscribe(&self, broker: &Broker, session: &Session, filter: &str) -> bool {
        let had = {
            let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
            session.remove_filter(filter);
            self.take_out(&mut index, session, filter)
        };
        self.pass_on(broker, session, Some(filter), false);
        had
    }

    /// Gives what a member of shared subscriptions held to the others: see
    /// [`Outbox::give_back`](super::outbound::Outbox::give_back).
    pub fn pass_on(&self, broker: &Broker, session: &Session, filter: Option<&str>, ended: bool) {
        let given = session.outbox().give_back(filter, ended);
        if given.is_empty() {
            return;
        }
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        for queued in given {
            let share = queued.share.as_ref().and_then(|filter| index.tree.share(filter));
            if let Some(share) = share {
                self.deliver_to_one(broker, share, queued.message);
            }
        }
    }

    fn take_out(&self, index: &mut Index, session: &Session, filter: &str) -> bool {
        let Some(options) = index.tree.remove(filter, session.number) else { return false };
        self.no_local.fetch_sub(usize::from(options.no_local), Ordering::Relaxed);
        if !is_live(filter) {
            self.dollar.fetch_sub(1, Ordering::Relaxed);
        } else {
            index.live -= 1;
        }
        true
    }

    /// A message that lies in no stream: `$SYS`.
    pub fn publish(&self, broker: &Broker, message: &Arc<Message>) {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        let mut found = Met::default();
        index.tree.matches(message.topic(), &mut |one| found.push(one));
        self.deliver(broker, &mut found, None, || message.clone());
    }

    fn deliver_batch(&self, broker: &Broker, tail: &Tail, batch: &Batch) {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        let mut found = Met::default();
        for message in batch.messages() {
            index.tree.matches(message.topic(), &mut |one| found.push(one));
            if !found.is_empty() {
                let publisher = self
                    .wants_publisher()
                    .then(|| properties::get(message.properties(), Origin::Listener, "client-id"))
                    .flatten();
                self.deliver(broker, &mut found, publisher, || Arc::new(Message::of(message)));
            }
        }
        if let Some(last) = batch.entries.last() {
            tail.position.store(batch.offset(last).0 + 1, Ordering::Relaxed);
        }
    }

    /// One copy per session, however many of its filters match: the greatest
    /// QoS and all identifiers (MQTT 5.0, 3.3.4); and one copy per share. Empties `found`.
    fn deliver(
        &self,
        broker: &Broker,
        found: &mut Met<'_>,
        publisher: Option<&[u8]>,
        message: impl FnOnce() -> Arc<Message>,
    ) {
        let Met { ones, shares } = found;
        if let Some(publisher) = publisher {
            ones.retain(|s| !s.options.no_local || s.session.client_id.as_bytes() != publisher);
        }
        if ones.is_empty() && shares.is_empty() {
            return;
        }
        let message = message();
        if ones.len() > 1 {
            ones.sort_unstable_by_key(|subscriber| subscriber.number);
        }
        for same in ones.chunk_by(|a, b| a.number == b.number) {
            let qos = same.iter().map(|s| s.options.qos).max().unwrap_or(0).min(message.qos);
            let retain = message.retain && same.iter().any(|s| s.options.retain_as_published);
            let ids = same.iter().flat_map(|s| ids(s.options)).collect();
            let queued = Queued { message: message.clone(), qos, retain, ids, share: None };
            self.offer(broker, &same[0].session, queued);
        }
        for share in shares.drain(..) {
            self.deliver_to_one(broker, share, message.clone());
        }
        ones.clear();
    }

    /// To the member whose turn it is, of those that are there and keep up;
    /// where there is none, to one that will come back.
    fn deliver_to_one(&self, broker: &Broker, share: &Share<Arc<Session>>, message: Arc<Message>) {
        let queued = |options: Options| Queued {
            qos: options.qos.min(message.qos),
            retain: message.retain && options.retain_as_published,
            ids: ids(options),
            share: Some(share.filter.clone()),
            message: message.clone(),
        };
        let mut away = None;
        for member in share.in_turn() {
            let mut outbox = member.session.outbox();
            if outbox.is_ready(self.limits) {
                // Under the lock: a member that leaves now gives it on.
                let offered = outbox.offer(queued(member.options), self.limits);
                drop(outbox);
                return self.offered(broker, &member.session, offered);
            }
            away = away.or(Some(member));
        }
        if let Some(member) = away {
            self.offer(broker, &member.session, queued(member.options));
        }
    }

    fn offer(&self, broker: &Broker, session: &Session, queued: Queued) {
        let offered = session.outbox().offer(queued, self.limits);
        self.offered(broker, session, offered);
    }

    fn offered(&self, broker: &Broker, session: &Session, offer: Offer) {
        match offer {
            Offer::Queued | Offer::Away => {}
            Offer::QueuedFirst => session.wake.notify_one(),
            Offer::Dropped => broker.counters.queue_full.increment(1),
            Offer::Overflow => {
                broker.counters.queue_full.increment(1);
                session.overflow.store(true, Ordering::Release);
                session.wake.notify_one();
            }
        }
    }
}

/// Whom a message met; reused from one to the next.
#[derive(Default)]
struct Met<'t> {
    ones: Vec<&'t Subscriber<Arc<Session>>>,
    shares: Vec<&'t Share<Arc<Session>>>,
}

impl<'t> Met<'t> {
    fn push(&mut self, found: Found<'t, Arc<Session>>) {
        match found {
            Found::One(subscriber) => self.ones.push(subscriber),
            Found::Share(share) => self.shares.push(share),
        }
    }

    fn is_empty(&self) -> bool {
        self.ones.is_empty() && self.shares.is_empty()
    }
}

fn ids(options: Options) -> Vec<u32> {
    if options.id == 0 { Vec::new() } else { vec![options.id] }
}

/// Delivers one stream's messages while anybody subscribes; ends at shutdown.
pub async fn run(broker: Arc<Broker>, number: usize) {
    let stream = broker.streams[number].clone();
    let tail = &broker.live.streams[number];
    loop {
        tokio::select! {
            () = tail.start.notified() => {}
            () = broker.shutdown.cancelled() => return,
        }
        tokio::select! {
            () = follow(&broker, &*stream, tail) => {}
            () = broker.shutdown.cancelled() => return,
        }
    }
}

/// Until nobody subscribes, or the stream ends.
async fn follow(broker: &Broker, stream: &dyn Stream, tail: &Tail) {
    let from = tail.position.load(Ordering::Relaxed);
    if from == IDLE {
        return;
    }
    let mut cursor = stream.cursor(Offset(from));
    loop {
        match cursor.next().await {
            Ok(Read::Batch(batch)) => broker.live.deliver_batch(broker, tail, &batch),
            Ok(Read::Gap { from, to, .. }) => {
                let detail = format!("messages {} to {} of stream {}", from.0, to.0, stream.name());
                broker.counters.gap.increment(to.0.saturating_sub(from.0));
                broker.failures.report("mqtt: subscribers missed messages", 1, &detail, "");
                let _index = broker.live.index.read().unwrap_or_else(PoisonError::into_inner);
                tail.position.store(to.0, Ordering::Relaxed);
            }
            Err(ReadError::Io(error)) => {
                let detail = format!("stream {}: {error}", stream.name());
                broker.failures.report("mqtt: live delivery cannot read, tries again", 1, &detail, "");
                tokio::time::sleep(READ_RETRY_AFTER).await;
            }
            Err(error) => {
                let detail = format!("stream {}: {error}", stream.name());
                broker.failures.report("mqtt: live delivery ended", 1, &detail, "");
                return;
            }
        }
        let idle = broker.live.index.read().unwrap_or_else(PoisonError::into_inner).live == 0;
        if idle {
            let index = broker.live.index.write().unwrap_or_else(PoisonError::into_inner);
            if index.live == 0 {
                tail.position.store(IDLE, Ordering::Relaxed);
                return;
            }
        }
        // A long tail must not keep the connections of this thread waiting.
        tokio::task::yield_now().await;
    }
}
