//! Live delivery: one task for each stream follows its durable tail and offers each message to the
//! subscribers whose filters match.
//!
//! Without subscribers the tasks sleep and the streams are not read. A subscriber receives a retained
//! message from memory only if the task has already passed it. This is decided under one lock, so that
//! each message is delivered exactly once.
//!
//! After a restart delivery begins at the end of the stream. Sessions that had not been offered all
//! earlier messages catch up in lanes of their own ([`Lane`]), the nearest first, and then join live
//! delivery. So messages that wait for one client delay no other client.

mod lanes;
mod one_member;
mod owed;
mod pass_on;
mod sent;
mod share_records;
mod wakes;

use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use self::lanes::{Lane, lanes};
use self::sent::{Met, Sent};
use self::share_records::ShareRecords;
use super::Broker;
use super::lock_order::{Locked, Rank, in_order};
use super::outbound::{Ids, Message, Place, QueueLimits, RetainedFrom, SharedLimits};
use super::session::Session;
use super::subscriptions::{Filter, Options, Path, Tree, is_live, is_shared};
use super::sys;
use crate::batch::{Batch, MessageRef, Offset};
use crate::properties::{self, Origin, facts};
use crate::stream::{GapCause, Read, ReadError, Stream};

pub use self::lanes::catch_up;
pub use self::owed::Found as FoundShare;
pub use self::pass_on::Departure;
pub use self::share_records::{FoundRecords, RECORDS_AT_ONCE};
pub use self::wakes::Wakes;

/// Position of a stream of which no messages are delivered now.
const IDLE: u64 = u64::MAX;
/// Pause after a failed read.
const READ_RETRY_AFTER: Duration = Duration::from_secs(1);
/// Most messages and copies of them that are handed out without a break. Meanwhile this thread serves no
/// connection, and no client can subscribe.
const HANDED_OUT_MAX: usize = 1_024;
/// Number of messages after which a run ends early if it takes long, because the queues are long and in
/// no CPU cache.
const HANDED_OUT_LEAST: usize = 256;
const HANDED_OUT_TIME: Duration = Duration::from_micros(100);
/// Filters that are added or removed without a break, while nothing is delivered.
pub const FILTERS_AT_ONCE: usize = 32;

pub struct Live {
    index: RwLock<Index>,
    streams: Vec<Tail>,
    /// Number of all subscriptions.
    subscriptions: AtomicUsize,
    /// Number of subscriptions below `$`.
    dollar: AtomicUsize,
    /// Number of subscriptions with No Local, which require messages to name their publisher.
    no_local: AtomicUsize,
    limits: SharedLimits,
    /// Number of lanes that have not caught up, of all streams.
    lanes: AtomicUsize,
    /// Number of clients that have connected, plus one: see [`Share::is_deserted`].
    arrivals: AtomicU64,
    /// Held for reading while messages move between members of shares, and for writing while none may
    /// move and no session may join a share.
    passed: RwLock<Passed>,
}

struct Passed {
    /// While all sessions are being examined: the messages that moved between sessions.
    seen: Option<Mutex<BTreeSet<Place>>>,
    shares: ShareRecords,
}

#[derive(Default)]
struct Index {
    tree: Tree,
    /// Number of subscriptions that messages of streams can match.
    live: usize,
}

struct Tail {
    /// End of the stream when the host started.
    begun_at: u64,
    /// Offset of the next message to deliver, or `IDLE`. It changes to and from `IDLE` under the index's
    /// write lock, and advances under its read lock.
    position: AtomicU64,
    start: Notify,
    /// Lanes, the nearest first. A session refers to its lane by number, from 1.
    lanes: Box<[Lane]>,
}

/// Which retained messages a SUBSCRIBE requests (MQTT 5.0, 3.8.3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendRetained {
    Always,
    IfNew,
    Never,
}

/// A filter to which a client subscribes.
pub struct Subscription {
    pub filter: Filter,
    pub options: Options,
    pub retained: SendRetained,
}

impl Live {
    /// Changes the bounds of all queues. What is queued beyond lower ones stays until its time.
    pub fn set_limits(&self, limits: QueueLimits) {
        self.limits.set(limits);
    }

    /// Creates live delivery with the `sessions` and `shares` of the last run.
    pub fn new(
        streams: &[Arc<dyn Stream>],
        limits: QueueLimits,
        sessions: &[Arc<Session>],
        mut shares: Vec<FoundShare>,
    ) -> Self {
        let mut tail = |(number, stream): (usize, &Arc<dyn Stream>)| {
            let end = stream.bounds().end.0;
            Tail {
                begun_at: end,
                position: AtomicU64::new(IDLE),
                start: Notify::new(),
                lanes: lanes(sessions, &mut shares, streams.len(), number, end),
            }
        };
        let streams: Vec<Tail> = streams.iter().enumerate().map(&mut tail).collect();
        Self {
            index: RwLock::default(),
            lanes: AtomicUsize::new(streams.iter().map(|tail| tail.lanes.len()).sum()),
            streams,
            subscriptions: AtomicUsize::new(0),
            dollar: AtomicUsize::new(0),
            no_local: AtomicUsize::new(0),
            limits: SharedLimits::new(limits),
            arrivals: AtomicU64::new(1),
            passed: RwLock::new(Passed { seen: None, shares: ShareRecords::of(shares) }),
        }
    }

    #[inline]
    fn index(&self) -> Locked<RwLockReadGuard<'_, Index>> {
        in_order(Rank::Subscriptions, || self.index.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn index_to_change(&self) -> Locked<RwLockWriteGuard<'_, Index>> {
        in_order(Rank::Subscriptions, || self.index.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// Returns whether messages must name their publisher.
    #[inline]
    pub fn wants_publisher(&self) -> bool {
        self.no_local.load(Ordering::Relaxed) > 0
    }

    pub fn wants_dollar(&self) -> bool {
        self.dollar.load(Ordering::Relaxed) > 0
    }

    /// Returns a position for each stream: all earlier messages have been offered to all sessions.
    pub fn positions(&self, streams: &[Arc<dyn Stream>]) -> Box<[u64]> {
        let position = |(stream, tail): (&Arc<dyn Stream>, &Tail)| {
            // Read first: one that joins the live delivery meanwhile does so no earlier.
            let lanes = tail.lanes.iter().map(|lane| lane.position.load(Ordering::Acquire));
            lanes.min().unwrap_or(IDLE).min(tail.live_position(&**stream))
        };
        streams.iter().zip(&self.streams).map(position).collect()
    }

    /// Returns a position for each stream: all earlier messages have been offered to this session.
    pub fn positions_of(&self, broker: &Broker, session: &Session) -> Box<[u64]> {
        let position = |(number, stream): (usize, &Arc<dyn Stream>)| {
            let tail = &self.streams[number];
            let lane = tail.lane(session.lane(number)).map(|lane| lane.position.load(Ordering::Acquire));
            // It may have joined the live delivery just now.
            lane.filter(|at| *at != IDLE).unwrap_or_else(|| tail.live_position(&**stream))
        };
        broker.streams.iter().enumerate().map(position).collect()
    }

    /// Returns a position for each stream: all earlier messages have been offered to the sessions that
    /// were created since the host started.
    fn live_positions(&self, broker: &Broker) -> Box<[u64]> {
        broker.streams.iter().zip(&self.streams).map(|(stream, tail)| tail.live_position(&**stream)).collect()
    }

    pub fn subscriptions(&self) -> usize {
        self.subscriptions.load(Ordering::Relaxed)
    }

    /// Subscribes, and queues the matching retained messages. With more subscriptions in one call, it
    /// waits for live delivery less often, and live delivery waits longer for it.
    pub fn subscribe(&self, broker: &Broker, session: &Arc<Session>, subscriptions: &[Subscription]) {
        let mut joining = self.join_shares(broker, session, subscriptions);
        let mut index = self.index_to_change();
        let mut wanted = Vec::new();
        for one in subscriptions {
            if self.put_in(broker, joining.as_deref_mut(), &mut index, session, one) {
                wanted.push(one);
            }
        }
        drop((index, joining));
        for Subscription { filter, options, .. } in wanted.into_iter().filter(|one| !one.filter.is_live()) {
            let messages = sys::matching(broker, filter.topics());
            session.outbox().give_whole(filter, *options, broker.clock.now_us(), messages);
        }
    }

    /// Adds a subscription. Returns whether retained messages were requested; those of streams are then
    /// to be delivered.
    fn put_in(
        &self,
        broker: &Broker,
        passed: Option<&mut Passed>,
        index: &mut Index,
        session: &Arc<Session>,
        &Subscription { ref filter, options, retained }: &Subscription,
    ) -> bool {
        // Off and on again, so that the counts follow changed options.
        let before = self.take_out(index, session, filter.as_str());
        let is_new = before.is_none();
        if let (Some(before), Some(passed), 0) = (before, passed, options.qos) {
            self.owe(passed, session, filter.as_str(), before);
        }
        if session.add_filter(filter.as_str(), options) {
            session.outbox().change_filter(filter.as_str(), Some(options));
        }
        let is_kept = session.outbox().is_kept();
        index.tree.insert(filter.as_str(), session.number, session.clone(), options, is_kept);
        self.subscriptions.fetch_add(1, Ordering::Relaxed);
        self.no_local.fetch_add(usize::from(options.no_local), Ordering::Relaxed);
        if !filter.is_live() {
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
            SendRetained::IfNew => is_new,
            SendRetained::Never => false,
        };
        // A share's members get none (MQTT 5.0, 4.8.2).
        if !wanted || filter.is_shared() {
            session.outbox().change_retained(filter.as_str(), options);
            return false;
        }
        if filter.is_live() {
            let mut upto = self.positions_of(broker, session);
            let mut outbox = session.outbox();
            // What was not passed yet comes live, once it is durable.
            upto.iter_mut().enumerate().for_each(|(stream, upto)| *upto = outbox.from(stream).max(*upto));
            outbox.give_retained(filter, options, RetainedFrom { since_us: broker.clock.now_us(), upto });
        }
        true
    }

    /// Marks the client of a session as connected, so that its outbox may be sent.
    pub fn resume(&self, session: &Session) {
        session.outbox().resume();
        self.arrivals.fetch_add(1, Ordering::AcqRel);
    }

    /// Unsubscribes a filter. Returns whether the session had it.
    pub async fn unsubscribe(&self, broker: &Broker, session: &Arc<Session>, filter: &str) -> bool {
        let had = {
            let mut leaving = self.leave_shares(session, [filter]);
            let mut index = self.index_to_change();
            session.remove_filter(filter);
            let had = self.leave(leaving.as_deref_mut(), &mut index, session, filter);
            let mut outbox = session.outbox();
            outbox.end_retained(filter);
            if had {
                outbox.change_filter(filter, None);
            }
            had
        };
        if is_shared(filter) {
            self.pass_on(broker, session, Departure::Share(filter)).await;
        }
        had
    }

    /// Unsubscribes an ending session from all of its `filters`. Messages that it holds of shares are
    /// still to be passed on.
    pub fn forget(&self, session: &Arc<Session>, filters: &[Box<str>]) {
        for some in filters.chunks(FILTERS_AT_ONCE) {
            let mut leaving = self.leave_shares(session, some.iter().map(|filter| &**filter));
            let mut index = self.index_to_change();
            for filter in some {
                self.leave(leaving.as_deref_mut(), &mut index, session, filter);
            }
        }
    }

    /// If the session leaves a share of which it was still to be offered messages, returns a guard,
    /// while which no message moves between members of shares.
    fn leave_shares<'f>(
        &self,
        session: &Session,
        filters: impl IntoIterator<Item = &'f str>,
    ) -> Option<Locked<RwLockWriteGuard<'_, Passed>>> {
        let is_owed = session.is_behind() && filters.into_iter().any(is_shared);
        is_owed.then(|| self.passed_to_change())
    }

    /// Removes a filter from the index. Returns whether the session had it.
    fn leave(
        &self,
        passed: Option<&mut Passed>,
        index: &mut Index,
        session: &Arc<Session>,
        filter: &str,
    ) -> bool {
        let before = self.take_out(index, session, filter);
        if let (Some(before), Some(passed)) = (before, passed.filter(|_| is_shared(filter))) {
            self.owe(passed, session, filter, before);
        }
        before.is_some()
    }

    /// Removes a filter from the index. Returns the options with which the session had subscribed.
    fn take_out(&self, index: &mut Index, session: &Session, filter: &str) -> Option<Options> {
        let options = index.tree.remove(filter, session.number)?;
        self.subscriptions.fetch_sub(1, Ordering::Relaxed);
        self.no_local.fetch_sub(usize::from(options.no_local), Ordering::Relaxed);
        if !is_live(filter) {
            self.dollar.fetch_sub(1, Ordering::Relaxed);
        } else {
            index.live -= 1;
        }
        Some(options)
    }

    /// Publishes a message that is in no stream, such as `$SYS`.
    pub fn publish(&self, broker: &Broker, message: &Arc<Message>) {
        let index = self.index();
        let (mut found, mut path) = (Met::default(), Path::default());
        index.tree.matches(message.topic(), &mut path, &mut |one| found.push(one));
        let sent = Sent::Broker(message, broker.clock.now_us());
        self.deliver(&mut found, None, &sent, None, &mut Wakes::new(broker));
    }

    /// Offers messages of a batch, from index `first` and at most [`HANDED_OUT_MAX`], to the sessions of
    /// a lane. Returns the index of the next message.
    pub fn deliver_some(
        &self,
        broker: &Broker,
        stream: usize,
        lane: u8,
        batch: &Batch,
        first: usize,
        wakes: &mut Wakes<'_>,
    ) -> usize {
        let messages = (first..batch.len()).map(|at| batch.message(at));
        let messages = messages.map(|message| (message.offset().0, message));
        first + self.deliver_first(broker, stream, lane, messages, wakes)
    }

    /// Offers the first of some messages of a stream, with their offsets. Returns how many.
    fn deliver_first<'m>(
        &self,
        broker: &Broker,
        stream: usize,
        lane: u8,
        messages: impl Iterator<Item = (u64, MessageRef<'m>)>,
        wakes: &mut Wakes<'_>,
    ) -> usize {
        broker.check_clock();
        let tail = &self.streams[stream];
        let has_lanes = self.lanes.load(Ordering::Acquire) > 0;
        // While a record is made no lane gives members of shares what they are owed.
        let passed = (lane > 0).then(|| self.transfers());
        let owing = passed.as_ref().map(|passed| &passed.shares);
        let index = self.index();
        let (mut found, mut path) = (Met::default(), Path::default());
        let (mut count, mut handed_out) = (0, 0);
        let begun = Instant::now();
        for (offset, message) in messages {
            index.tree.matches(message.topic(), &mut path, &mut |one| found.push(one));
            handed_out += 1 + found.len();
            if has_lanes {
                found.ones.retain(|subscriber| subscriber.session.lane(stream) == lane);
                if lane > 0 && offset >= tail.begun_at {
                    // The live delivery gives it to one of its members.
                    found.shares.clear();
                }
            }
            if !found.is_empty() {
                let publisher = self
                    .wants_publisher()
                    .then(|| properties::get(message.properties(), Origin::Listener, facts::CLIENT_ID))
                    .flatten();
                let place = Place { stream: stream as u16, offset };
                let may_be_again = offset < tail.begun_at;
                let since_us = broker.clock.of_wall(message.entry.received_us);
                let whole = OnceCell::new();
                let sent = Sent::Live { place, lane, message, since_us, may_be_again, whole };
                self.deliver(&mut found, publisher, &sent, owing, wakes);
            }
            count += 1;
            tail.position(lane).store(offset + 1, Ordering::Release);
            let is_long = || handed_out >= HANDED_OUT_LEAST && begun.elapsed() >= HANDED_OUT_TIME;
            if handed_out >= HANDED_OUT_MAX || is_long() {
                break;
            }
        }
        count
    }

    /// Delivers one copy to each session, however many of its filters match, with the highest QoS and
    /// all identifiers (MQTT 5.0, 3.3.4), and one copy to each share. Empties `found`. `owing` belongs
    /// to a lane.
    fn deliver(
        &self,
        found: &mut Met<'_>,
        publisher: Option<&[u8]>,
        sent: &Sent<'_>,
        owing: Option<&ShareRecords>,
        wakes: &mut Wakes<'_>,
    ) {
        let Met { ones, shares } = found;
        if let Some(publisher) = publisher {
            ones.retain(|s| !s.options.no_local || s.session.client_id.as_bytes() != publisher);
        }
        if ones.is_empty() && shares.is_empty() {
            return;
        }
        if ones.len() > 1 {
            ones.sort_unstable_by_key(|subscriber| subscriber.number);
        }
        for same in ones.chunk_by(|a, b| a.number == b.number) {
            let qos = same.iter().map(|s| s.options.qos).max().unwrap_or(0);
            let as_published = same.iter().any(|s| s.options.retain_as_published);
            let ids: Ids = same.iter().map(|s| s.options.id).filter(|id| *id != 0).collect();
            if let Some(queued) = sent.queued(qos, as_published, ids, None) {
                let offered = same[0].session.outbox().offer(queued, self.limits.get(), || sent.whole());
                wakes.offered(&same[0].session, offered);
            }
        }
        for share in shares.drain(..) {
            let taker = self.deliver_to_one(share, share.next_turn(), sent, wakes);
            if let (None, Some(records)) = (taker, owing) {
                self.deliver_owed(records, share, sent, wakes);
            }
        }
        ones.clear();
    }
}

/// Delivers messages of one stream while there are subscribers. Ends at shutdown.
pub async fn run(broker: Arc<Broker>, number: usize) {
    let tail = &broker.live.streams[number];
    loop {
        tokio::select! {
            () = tail.start.notified() => {}
            () = broker.shutdown.cancelled() => return,
        }
        tokio::select! {
            () = follow(&broker, number, 0) => {}
            () = broker.shutdown.cancelled() => return,
        }
    }
}

impl Tail {
    fn lane(&self, lane: u8) -> Option<&Lane> {
        self.lanes.get(usize::from(lane).checked_sub(1)?)
    }

    fn position(&self, lane: u8) -> &AtomicU64 {
        self.lane(lane).map_or(&self.position, |lane| &lane.position)
    }

    fn live_position(&self, stream: &dyn Stream) -> u64 {
        // Read first: a delivery that starts meanwhile starts no earlier.
        let end = stream.bounds().end.0;
        match self.position.load(Ordering::Acquire) {
            IDLE => end,
            position => position,
        }
    }
}

/// Advances a lane past messages that cannot be delivered, of which `count` are counted as a gap.
fn missed(broker: &Broker, number: usize, lane: u8, count: u64, range: std::ops::Range<u64>) {
    broker.counters.gap.increment(count);
    let _index = broker.live.index();
    broker.live.streams[number].position(lane).store(range.end, Ordering::Release);
}

/// Delivers copies of messages that retention removed while sessions waited for them.
async fn replay(
    broker: &Broker,
    number: usize,
    lane: u8,
    range: std::ops::Range<u64>,
) -> Result<(), ReadError> {
    let mut lost = broker.copies.not_handled(number, &range);
    let mut from = range.start;
    while from < range.end {
        let page = broker.copies.page(number, from..range.end).await.map_err(ReadError::Stopped)?;
        lost += page.lost;
        from = page.next;
        let mut rest = &*page.found;
        let mut wakes = Wakes::new(broker);
        while !rest.is_empty() {
            let messages = rest.iter().map(|(offset, (batch, at))| (*offset, batch.message(*at)));
            rest = &rest[broker.live.deliver_first(broker, number, lane, messages, &mut wakes)..];
            wakes.send_due();
            tokio::task::yield_now().await;
        }
    }
    if lost > 0 {
        let name = broker.streams[number].name();
        let detail = format!("messages {} to {} of stream {name}", range.start, range.end);
        broker.failures.report("mqtt: subscribers missed messages", 1, &detail, "");
    }
    missed(broker, number, lane, lost, range);
    Ok(())
}

/// Delivers until there are no subscribers or the stream ends; a lane delivers until it has caught up.
async fn follow(broker: &Broker, number: usize, lane: u8) {
    let (stream, tail) = (&*broker.streams[number], &broker.live.streams[number]);
    let from = tail.position(lane).load(Ordering::Relaxed);
    if from == IDLE {
        return;
    }
    let start = stream.bounds().start.0;
    // Not left to the cursor, which would count it as a gap.
    let mut trimmed = (from < start).then_some(from..start);
    let mut cursor = stream.cursor(Offset(from.max(start)));
    loop {
        if broker.live.join(number, lane) {
            return;
        }
        let read = match trimmed.take() {
            Some(range) => replay(broker, number, lane, range).await.map(|()| None),
            None => cursor.next().await.map(Some),
        };
        match read {
            Ok(None) => {}
            Ok(Some(Read::Batch(batch))) => {
                let mut next = 0;
                let mut wakes = Wakes::new(broker);
                while next < batch.len() {
                    next = broker.live.deliver_some(broker, number, lane, &batch, next, &mut wakes);
                    wakes.send_due();
                    tokio::task::yield_now().await;
                }
            }
            Ok(Some(Read::Gap { from, to, cause: GapCause::Trimmed })) => trimmed = Some(from.0..to.0),
            Ok(Some(Read::Gap { from, to, .. })) => {
                // Damage, which the stream has told.
                missed(broker, number, lane, to.0.saturating_sub(from.0), from.0..to.0);
            }
            Err(ReadError::Io(error)) => {
                let detail = format!("stream {}: {error}", stream.name());
                broker.failures.report("mqtt: live delivery cannot read, will try again", 1, &detail, "");
                tokio::time::sleep(READ_RETRY_AFTER).await;
            }
            Err(error) => {
                let detail = format!("stream {}: {error}", stream.name());
                broker.failures.report("mqtt: live delivery ended", 1, &detail, "");
                return;
            }
        }
        if lane > 0 {
            continue;
        }
        let idle = broker.live.index().live == 0;
        if idle {
            let index = broker.live.index_to_change();
            if index.live == 0 {
                tail.position.store(IDLE, Ordering::Relaxed);
                return;
            }
        }
    }
}
