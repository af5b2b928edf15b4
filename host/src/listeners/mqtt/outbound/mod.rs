//! The outbox of a subscriber: a bounded queue, its unacknowledged QoS 1 and 2 messages, and their
//! packets. It belongs to the session, so it outlives a connection. The part that outlives the host is
//! in [`kept`].
//!
//! While the client is not connected, the queue holds only references. The messages stay in their
//! streams, and are read ([`load`]) when it is their turn.

mod again;
mod filters;
mod kept;
mod lent;
mod load;
mod message;
mod queued;
mod retained;
mod send;
mod share_record;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashSet, VecDeque};
use std::hash::{BuildHasherDefault, DefaultHasher};
use std::ops::Range;
use std::sync::Arc;

use self::again::{Again, Unlisted};
use self::lent::Lent;
use self::retained::Deliveries;
use super::session::Change;
use crate::room::{Holding, Room};
use crate::stream::{AppendError, Stream};

pub use self::again::{Parts, union};
pub use self::filters::FilterPage;
pub use self::kept::{Found, Kept, NOTE, Restored, SENT, STEP, note_bytes_max};
pub use self::load::{Body, LOADS_MAX, Loaded, Loader, look_up};
pub use self::message::Message;
pub use self::queued::{
    Full, Ids, InFlight, Keeps, Offer, Place, QueueLimits, Queued, REFERENCE_BYTES, ShareFilter,
    SharedLimits, Source, Sums, WhenFull,
};
pub use self::retained::{RetainedFrom, RetainedPage};
pub use self::send::{Acked, Filled, Peer, Space, Waits};
#[cfg(test)]
pub use self::share_record::visits;
pub use self::share_record::{FoundShare, Holdings, SHARE};

/// Bytes of its queue that a connected persistent session has in memory. The rest stays in the streams.
const HELD_BYTES_MAX: usize = 256 << 10;
/// Bytes in memory of a subscriber's messages in flight, or one message. Messages that were sent and are
/// in a stream are not in memory.
const IN_FLIGHT_BYTES_MAX: usize = 1 << 20;
/// Number of entries that a queue allocates beyond twice its messages. It frees any more.
const SPARE_PLACES: usize = 64;

#[derive(Default)]
pub struct Outbox {
    connected: bool,
    queue: VecDeque<Queued>,
    /// Sums over the queue, which may be long, so it is not walked for them.
    sums: Sums,
    inflight: VecDeque<InFlight>,
    /// Bytes of messages in flight that are in memory.
    inflight_held: usize,
    /// Packet ids of `inflight`.
    ids: HashSet<u16, BuildHasherDefault<DefaultHasher>>,
    /// Number of messages in flight, from the front, that were sent on this connection.
    sent: usize,
    last_id: u16,
    /// First offset, per stream, that this session still needs.
    from: Box<[u64]>,
    /// Messages that a restart offers in addition.
    again: Option<Box<Again>>,
    /// Retained messages for its new subscriptions. Boxed, because many clients have no subscriptions.
    retained: Option<Box<Deliveries>>,
    /// Number of the newest subscription for which retained messages are, or were, to be delivered.
    last_retained: u64,
    /// The identifiers of the last message that had several.
    last_ids: Option<Arc<Box<[u32]>>>,
    /// Messages of a persistent session that found no room or waited too long, and that are not reported
    /// yet.
    lost: u64,
    /// Messages that found no room or waited too long, reported or not.
    dropped: u64,
    /// Durable records of a persistent session.
    kept: Option<Box<Kept>>,
    /// The permit for a large message for which there is no memory.
    lent: Option<Box<Lent>>,
    /// The outbox's part of the memory of all outboxes.
    memory: Holding,
}

impl Outbox {
    /// Creates an outbox whose memory counts in `room`.
    pub fn within(room: &Arc<Room>) -> Self {
        let mut outbox = Self { memory: Holding::of(room), ..Self::default() };
        outbox.count();
        outbox
    }

    /// Begins a new session, which receives no messages before `from`.
    pub fn begin(&mut self, from: Box<[u64]>, kept: Option<Kept>) {
        let memory = std::mem::take(&mut self.memory);
        *self = Self { from, kept: kept.map(Box::new), memory, ..Self::default() };
        self.count();
    }

    /// Restores a session that a restart found.
    pub fn restore(&mut self, restored: Restored) {
        let Restored { kept, from, unlisted, owed: _, inflight, queue, lost: _ } = restored;
        let known = inflight.iter().filter_map(|flight| flight.waiting.as_ref()).chain(&queue);
        let again = Again::new(unlisted, known);
        *self = Self {
            ids: inflight.iter().map(|flight| flight.packet_id).collect(),
            last_id: inflight.last().map_or(0, |flight| flight.packet_id),
            sums: Sums::of(&queue),
            inflight_held: inflight.iter().map(InFlight::held).sum(),
            inflight: inflight.into(),
            queue: queue.into(),
            from,
            again,
            kept: Some(Box::new(kept)),
            memory: std::mem::take(&mut self.memory),
            ..Self::default()
        };
        self.count();
    }

    /// Makes the session end with its connection from now on.
    pub fn keep_no_more(&mut self) {
        self.kept = None;
        self.inflight.iter_mut().for_each(|flight| flight.after = 0);
    }

    pub fn from(&self, stream: usize) -> u64 {
        self.from.get(stream).copied().unwrap_or(0)
    }

    /// Returns the offset for messages published with QoS 2, for a subscription with `qos`.
    pub fn begins_with_qos(&self, stream: usize, qos: u8) -> u64 {
        let sent = self.kept.as_ref().filter(|_| qos == 2).map_or(0, |kept| kept.sent(stream));
        self.from(stream).max(sent)
    }

    /// Returns the part of a stream in which a restart offers messages of a share again.
    pub fn again_in(&self, stream: usize) -> Range<u64> {
        self.again.as_ref().map_or(0..0, |again| again.part(stream))
    }

    /// Returns the messages in these parts that the session had received by a share when the host
    /// started.
    pub fn known_again(&self, share: &str) -> HashSet<Place> {
        self.again.as_ref().map(|again| again.known(share)).unwrap_or_default()
    }

    /// Returns the offset of a stream from which a restart offers messages.
    pub fn begins_at(&self, stream: usize) -> u64 {
        let again = self.again.as_ref().and_then(|again| again.first(stream));
        again.map_or(self.from(stream), |first| first.min(self.from(stream)))
    }

    /// Records that all messages of a stream below `upto` have been offered.
    pub fn pass(&mut self, stream: usize, upto: u64) {
        self.again.iter_mut().for_each(|again| again.pass(stream, upto));
        self.again.take_if(|again| again.is_over());
        if let Some(from) = self.from.get_mut(stream) {
            *from = upto.max(*from);
        }
    }

    /// Offers a message. `body` is called if the message is to be held in memory.
    pub fn offer(
        &mut self,
        mut queued: Queued,
        limits: QueueLimits,
        body: impl FnOnce() -> Option<Arc<Message>>,
    ) -> Offer {
        if !self.takes(&queued) {
            return Offer::Before;
        }
        queued.apart |= self.again.as_ref().is_some_and(|again| again.takes(&queued));
        if !self.connected && queued.qos == 0 {
            return Offer::Away;
        }
        let may_hold =
            self.connected && (self.kept.is_none() || self.sums.held + queued.bytes() <= HELD_BYTES_MAX);
        if may_hold {
            self.share_ids(&mut queued);
        } else if queued.source.place().is_some() {
            queued.let_go();
        }
        let mut is_held = may_hold && queued.source.place().is_some();
        let (mut dropped, mut full) = (0, None);
        while let Some(bound) = self.bound_met(&mut queued, &mut is_held, limits) {
            full.get_or_insert(bound);
            self.dropped += 1;
            if self.kept.is_none() || queued.qos == 0 {
                let slow = self.connected && queued.qos > 0;
                return if slow { Offer::Overflow(bound) } else { Offer::Dropped(bound) };
            }
            self.lost += 1;
            match limits.when_full {
                WhenFull::DropOldest if queued.bytes() <= limits.bytes_max && self.pop().is_some() => {
                    dropped += 1;
                }
                _ => return Offer::Dropped(bound),
            }
        }
        if is_held {
            queued.body = queued.body.or_else(body);
        }
        self.push(queued);
        // Two for one, so that it shrinks.
        let may_shrink = self.kept.is_some() && limits.when_full == WhenFull::DropOldest;
        while may_shrink && dropped < 2 && self.gives_way() {
            (self.dropped, self.lost, dropped) = (self.dropped + 1, self.lost + 1, dropped + 1);
            full.get_or_insert(Full::Queues);
        }
        self.count();
        match (full, self.queue.len()) {
            (None, 1) => Offer::QueuedFirst,
            (None, _) => Offer::Queued,
            (Some(full), _) => Offer::QueuedInsteadOf(dropped, full),
        }
    }

    /// Returns the bound that another message would exceed; `None` if there is room for it. If there is
    /// memory only for its queue entry, the message waits in its stream.
    fn bound_met(&mut self, queued: &mut Queued, is_held: &mut bool, limits: QueueLimits) -> Option<Full> {
        let is_full = self.queue.len() >= limits.messages_max;
        if is_full || self.sums.bytes + queued.bytes() > limits.bytes_max {
            return Some(Full::Queue);
        }
        let place = self.size() + self.more_places() * REFERENCE_BYTES;
        if *is_held && !self.memory.try_hold(place + queued.bytes()) {
            queued.let_go();
            *is_held = false;
        }
        (!*is_held && !self.memory.try_hold(place)).then_some(Full::Queues)
    }

    /// Drops the oldest message if others need the memory that this queue has beyond its share. Returns
    /// whether it did.
    fn gives_way(&mut self) -> bool {
        let gives_way = self.queue.len() > 1 && self.memory.gives_way() && self.pop().is_some();
        if gives_way && self.queue.capacity() > self.queue.len() / 8 * 9 {
            self.queue.shrink_to_fit();
        }
        gives_way
    }

    /// Returns the bytes of memory for queued messages and messages in flight.
    pub fn size(&self) -> usize {
        self.queue.capacity() * REFERENCE_BYTES
            + self.inflight.capacity() * size_of::<InFlight>()
            + self.sums.held
            + self.inflight_held
            + self.retained.as_ref().map_or(0, |retained| retained.bytes())
            + self.kept.as_ref().map_or(0, |kept| kept.passing_on.capacity() * REFERENCE_BYTES)
    }

    /// Returns by how many entries the queue grows for another message. A queue that doubled would take
    /// up to twice the memory that its messages need.
    fn more_places(&self) -> usize {
        match (self.queue.len(), self.queue.capacity()) {
            (_, 0) => 4,
            (len, capacity) if len == capacity => (capacity / 4).max(capacity.min(16)),
            _ => 0,
        }
    }

    /// Counts the outbox in the memory of all outboxes. Called after each change.
    fn count(&mut self) {
        give_back_places(&mut self.queue);
        give_back_places(&mut self.inflight);
        if self.ids.capacity() > 2 * self.ids.len() + SPARE_PLACES {
            self.ids.shrink_to_fit();
        }
        self.lent.take_if(|lent| lent.is_spent());
        self.memory.set_away(!self.connected);
        self.memory.hold(self.size());
    }

    /// Returns whether the session has not been offered the message.
    pub fn takes(&self, queued: &Queued) -> bool {
        match queued.source {
            _ if self.again.as_ref().is_some_and(|again| again.takes(queued)) => true,
            Source::Stream { stream, offset } if !queued.apart => {
                let is_sent =
                    || queued.qos == 2 && self.kept.as_ref().is_some_and(|it| it.was_sent(stream, offset));
                offset >= self.from(stream.into()) && !is_sent()
            }
            _ => true,
        }
    }

    /// Shares the identifiers with the previous message, because most messages of a queue match the same
    /// subscriptions.
    fn share_ids(&mut self, queued: &mut Queued) {
        let Ids::Many(ids) = &mut queued.ids else { return };
        match &self.last_ids {
            Some(last) if last == ids => *ids = last.clone(),
            _ => self.last_ids = Some(ids.clone()),
        }
    }

    /// Returns the next message to send. Retained messages come before the queue, whose messages may be
    /// newer.
    fn head(&self) -> Option<&Queued> {
        self.retained_head().or(self.queue.front())
    }

    fn take(&mut self) -> Option<Queued> {
        self.take_retained().or_else(|| self.pop())
    }

    /// Returns how many messages a persistent session lost since the last call.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    pub fn take_lost(&mut self) -> u64 {
        std::mem::take(&mut self.lost)
    }

    fn push(&mut self, queued: Queued) {
        self.sums.add(&queued);
        self.queue.reserve_exact(self.more_places());
        self.queue.push_back(queued);
    }

    fn pop(&mut self) -> Option<Queued> {
        let queued = self.queue.pop_front()?;
        self.sums.subtract(&queued);
        Some(queued)
    }

    fn count_inflight(&mut self) {
        self.inflight_held = self.inflight.iter().map(InFlight::held).sum();
    }

    fn retain(&mut self, stays: impl Fn(&Queued) -> bool) {
        let sums = &mut self.sums;
        self.queue.retain(|queued| {
            let stays = stays(queued);
            if !stays {
                sums.subtract(queued);
            }
            stays
        });
    }

    pub fn clear(&mut self) {
        *self = Self { memory: std::mem::take(&mut self.memory), ..Self::default() };
        self.count();
    }

    /// Returns the number of queued messages, their bytes, and the number of unacknowledged messages.
    pub fn sizes(&self) -> (usize, usize, usize) {
        let retained = self.retained.as_ref().map_or(0, |retained| retained.len());
        (self.queue.len() + retained, self.sums.bytes, self.inflight.len())
    }

    /// Returns whether the session outlives its connection.
    pub fn is_kept(&self) -> bool {
        self.kept.is_some()
    }

    /// Returns whether the client is connected.
    pub fn is_connected(&self) -> bool {
        self.connected
    }

    /// Returns whether the client is connected and there is room in the queue.
    pub fn has_room(&self, limits: QueueLimits) -> bool {
        self.connected && self.has_room_for(1, limits)
    }

    /// Returns whether there is room in the queue for a message of so many bytes.
    fn has_room_for(&self, bytes: usize, limits: QueueLimits) -> bool {
        self.queue.len() < limits.messages_max
            && self.sums.bytes + bytes <= limits.bytes_max
            && self.memory.has_room(self.size() + self.more_places() * REFERENCE_BYTES)
    }

    /// Returns whether a message would be sent soon. A shared subscription prefers such a member.
    pub fn is_ready(&self, queued: &Queued, limits: QueueLimits) -> bool {
        self.connected && self.has_room_for(queued.bytes(), limits) && self.takes(queued)
    }

    /// Returns what would happen to a message that is not sent soon; `None` if it is not for this
    /// session.
    pub fn keeps(&self, queued: &Queued, limits: QueueLimits) -> Option<Keeps> {
        let has_room = || self.has_room_for(queued.bytes(), limits);
        let gives_way = || self.is_kept() && limits.when_full == WhenFull::DropOldest;
        self.takes(queued).then(|| match queued.qos {
            0 => Keeps::Nothing,
            _ if has_room() => Keeps::All,
            _ if gives_way() => Keeps::Newest,
            _ => Keeps::Nothing,
        })
    }

    /// Returns the shared subscriptions of at most `max` messages that [`Outbox::give_back`] gives next.
    pub fn next_shares(&self, is_given: impl Fn(&str) -> bool, max: usize) -> BTreeSet<ShareFilter> {
        let shares = self.queue.iter().filter_map(|queued| queued.share.as_ref());
        shares.filter(|share| is_given(share)).take(max).cloned().collect()
    }

    /// Returns whether the session's notes list messages that it gave to others.
    pub fn is_passing_on(&self) -> bool {
        self.kept.as_ref().is_some_and(|kept| !kept.passing_on.is_empty())
    }

    /// Returns the shared subscriptions of the messages that [`Outbox::give_back`] gives, and the number
    /// of these messages.
    pub fn shares(&self, ended: bool) -> (BTreeSet<Box<str>>, usize) {
        let (mut shares, mut count) = (BTreeSet::new(), 0);
        let mut last: Option<&ShareFilter> = None;
        let inflight = self.inflight.iter().filter(|flight| ended && is_unacknowledged_by_share(flight));
        let inflight = inflight.filter_map(|flight| flight.waiting.as_ref());
        for share in inflight.chain(&self.queue).filter_map(|queued| queued.share.as_ref()) {
            if last.is_none_or(|last| !Arc::ptr_eq(last, share)) {
                shares.insert((**share).clone());
                last = Some(share);
            }
            count += 1;
        }
        (shares, count)
    }

    /// Removes the first messages, at most `max`, of the shared subscriptions for which `is_given` is
    /// true, for another member. Messages that were sent are not included. `ended` says that the client
    /// will not come back; QoS 1 messages that it was sent and has not acknowledged are then included.
    /// QoS 2 messages that it was sent stay with it (MQTT 5.0, 4.8.2). The caller reports with
    /// [`Outbox::passed_on`] when the notes of the receivers are appended.
    pub fn give_back(&mut self, is_given: impl Fn(&str) -> bool, ended: bool, max: usize) -> Vec<Queued> {
        let is_given = |queued: &Queued| queued.share.as_ref().is_some_and(|share| is_given(share));
        let mut given = Vec::new();
        if ended {
            let is_back = |flight: &InFlight| {
                is_unacknowledged_by_share(flight) && flight.waiting.as_ref().is_some_and(is_given)
            };
            let mut at = 0;
            while given.len() < max && at < self.inflight.len() {
                if !is_back(&self.inflight[at]) {
                    at += 1;
                } else if let Some(flight) = self.inflight.remove(at) {
                    self.ids.remove(&flight.packet_id);
                    given.extend(flight.waiting);
                }
            }
            self.count_inflight();
            self.sent = 0;
        }
        if given.len() < max && self.queue.iter().any(is_given) {
            let mut own = Vec::new();
            while given.len() < max
                && let Some(queued) = self.queue.pop_front()
            {
                if is_given(&queued) {
                    self.sums.subtract(&queued);
                    given.push(queued);
                } else {
                    own.push(queued);
                }
            }
            own.into_iter().rev().for_each(|queued| self.queue.push_front(queued));
        }
        if let Some(kept) = self.kept.as_mut().filter(|_| !given.is_empty()) {
            kept.changed = true;
            let listed = given.iter().filter(|queued| queued.qos > 0);
            kept.passing_on.extend(listed.map(|queued| Queued { body: None, ..queued.clone() }));
        }
        self.count();
        given
    }

    /// Records that the notes of the receivers are appended, so that the session's own notes no longer
    /// list the messages.
    pub fn passed_on(&mut self) {
        if let Some(kept) = &mut self.kept {
            kept.changed |= !kept.passing_on.is_empty();
            kept.passing_on = Vec::new();
        }
        self.count();
    }

    /// Removes queued messages of topics that the client may no longer see. Messages that are not in
    /// memory are checked when they are read: [`Outbox::loaded`]. Messages that a connected client was
    /// sent stay until it acknowledges them.
    pub fn keep_only(&mut self, may_see: impl Fn(&str) -> bool) {
        self.keep_only_retained(&may_see);
        let stays = |queued: &Queued| queued.message().is_none_or(|message| may_see(message.topic()));
        self.retain(stays);
        let mut at = if self.connected { self.sent } else { 0 };
        while let Some(flight) = self.inflight.get(at) {
            if flight.waiting.as_ref().is_none_or(stays) || self.give_up(at) {
                at += 1;
            }
        }
        self.count();
    }

    /// Passes to `see` the place of each message that is kept for the client, or for the members of a
    /// share, and whether its sending had begun. Returns false if none is kept for the client.
    pub fn references(&self, mut see: impl FnMut(Place, bool)) -> bool {
        let is_kept = |queued: &Queued| self.kept.is_some() || queued.share.is_some();
        let inflight =
            self.inflight.iter().filter_map(|it| it.waiting.as_ref().map(|queued| (queued, it.dup)));
        for (queued, is_begun) in inflight.chain(self.queue.iter().map(|queued| (queued, false))) {
            if let (Some(place), 1..) = (queued.source.place(), queued.qos)
                && is_kept(queued)
            {
                see(place, is_begun);
            }
        }
        self.kept.is_some()
    }

    /// Removes messages that are lost, and returns their number. Messages in memory stay, and so do
    /// those that a connected client was sent, until it acknowledges them.
    pub fn forget(&mut self, is_gone: impl Fn(Place) -> bool) -> u64 {
        let stays = |queued: &Queued| queued.place().is_none_or(|place| !is_gone(place));
        let before = self.queue.len();
        self.retain(stays);
        let mut gone = (before - self.queue.len()) as u64;
        let mut at = if self.connected { self.sent } else { 0 };
        while let Some(flight) = self.inflight.get(at) {
            if flight.waiting.as_ref().is_none_or(stays) {
                at += 1;
            } else {
                gone += 1;
                at += usize::from(self.give_up(at));
            }
        }
        if gone > 0 {
            self.kept.iter_mut().for_each(|kept| kept.changed = true);
            self.count();
        }
        gone
    }

    /// Handles the end of the connection: the queue holds only references again.
    pub fn disconnected(&mut self) {
        self.connected = false;
        self.return_lent();
        if self.sums.at_most_once > 0 {
            self.retain(|queued| queued.qos > 0);
        }
        self.retained.iter_mut().for_each(|retained| retained.disconnected());
        self.free_retained();
        self.last_ids = None;
        if self.kept.is_some() {
            let mut queue = self.queue.iter_mut();
            while let (1.., Some(queued)) = (self.sums.held, queue.next()) {
                self.sums.subtract(queued);
                queued.let_go();
                self.sums.add(queued);
            }
            let waiting = self.inflight.iter_mut().filter_map(|flight| flight.waiting.as_mut());
            waiting.for_each(Queued::let_go);
            self.count_inflight();
        }
        if self.queue.capacity() > 2 * self.queue.len() {
            self.queue.shrink_to_fit();
        }
        self.count();
    }

    /// Handles a new connection: messages that the last one left unacknowledged are sent again (4.4) by
    /// [`Outbox::fill`], in order and before all others.
    pub fn resume(&mut self) {
        self.connected = true;
        self.sent = 0;
        if let Some(kept) = &mut self.kept {
            kept.releases.clear();
        }
    }

    /// Drops messages queued before `since_us`, and returns their number.
    pub fn drop_older(&mut self, since_us: u64) -> u64 {
        let mut dropped = 0;
        while self.queue.front().is_some_and(|head| head.since_us < since_us) {
            self.pop();
            dropped += 1;
        }
        self.dropped += dropped;
        if self.kept.is_some() {
            self.lost += dropped;
        }
        if dropped > 0 {
            self.count();
        }
        dropped
    }

    /// Checks which changes are durable by now. Called before [`Outbox::fill`].
    pub fn settle(&mut self, stream: &dyn Stream) {
        if let Some(kept) = self.kept.as_mut().filter(|kept| kept.has_appended()) {
            let durable = *stream.durable().borrow();
            kept.settle(durable);
        }
    }

    /// Appends the changes that must become durable, with a note if one is due. `note` returns the
    /// arguments of [`Outbox::note`]. If there is no room, the changes stay pending. Returns how many
    /// deliveries ended because their records cannot be appended.
    pub fn record(&mut self, stream: &dyn Stream, note: impl FnOnce() -> (Box<[u64]>, usize)) -> u64 {
        let Some(kept) = &mut self.kept else { return 0 };
        if kept.changes().is_empty() {
            return 0;
        }
        let mut changes: Vec<Change> =
            kept.changes().iter().map(|(key, value)| (key.clone(), value.clone())).collect();
        let is_noted = kept.note_due;
        if is_noted {
            // What is sent now is not to be in it.
            let sent = kept.made();
            let (positions, bytes_max) = note();
            changes.extend(self.note_with(&positions, bytes_max, sent));
        }
        let appended = stream.append(&[], &super::borrowed(&changes));
        let Some(kept) = &mut self.kept else { return 0 };
        match appended {
            Ok(appended) => {
                kept.appended(appended.ticket);
                if is_noted {
                    self.noted();
                }
                return 0;
            }
            Err(AppendError::Full | AppendError::NoSpace) => kept.refused = true,
            // Nothing that was promised is in them.
            Err(AppendError::TooLarge(_)) => return self.give_up_unrecorded(),
            // The connection ends with its stream.
            Err(AppendError::Stopped(_)) => {}
        }
        kept.note_due |= is_noted;
        0
    }

    /// Returns whether the records about the streams must be written again.
    pub fn is_stale(&self) -> bool {
        self.kept.as_ref().is_some_and(|kept| kept.is_stale)
    }

    /// Writes the records about the streams again if they are no longer true. `positions` is as for
    /// [`Outbox::note`].
    pub fn renew(
        &mut self,
        stream: &dyn Stream,
        positions: &[u64],
        bytes_max: usize,
    ) -> Result<(), AppendError> {
        let Some(kept) = self.kept.as_ref().filter(|kept| kept.is_stale) else { return Ok(()) };
        let made = kept.made();
        let mut changes: Vec<Change> =
            kept.changes().iter().map(|(key, value)| (key.clone(), value.clone())).collect();
        changes.extend(self.note_with(positions, bytes_max, made));
        let appended = stream.append(&[], &super::borrowed(&changes));
        let Some(kept) = &mut self.kept else { return Ok(()) };
        match appended {
            Ok(appended) => {
                kept.appended(appended.ticket);
                kept.is_stale = false;
                self.noted();
                Ok(())
            }
            Err(error) => {
                kept.changed = true;
                Err(error)
            }
        }
    }

    /// Ends the QoS 2 deliveries whose records were not appended, and returns their number.
    fn give_up_unrecorded(&mut self) -> u64 {
        let Some(kept) = &mut self.kept else { return 0 };
        let before = self.inflight.len();
        let (sent, mut at) = (self.sent, 0);
        self.inflight.retain(|flight| {
            let is_recorded = flight.waiting.is_none() || kept.is_appended(flight.after);
            if !is_recorded {
                kept.take_back(flight);
                self.ids.remove(&flight.packet_id);
                self.sent -= usize::from(at < sent);
            }
            at += 1;
            is_recorded
        });
        self.count_inflight();
        self.count();
        (before - self.inflight.len()) as u64
    }

    /// Returns the note for the broker's stream; nothing for a session that is not persistent.
    /// `positions` are those of live delivery, read before the outbox was locked. The caller reports the
    /// result: [`Outbox::noted`], [`Outbox::note_failed`].
    pub fn note(&mut self, positions: &[u64], bytes_max: usize) -> Vec<Change> {
        self.note_with(positions, bytes_max, 0)
    }

    fn note_with(&mut self, positions: &[u64], bytes_max: usize, with: u64) -> Vec<Change> {
        let Some(kept) = self.kept.as_mut() else { return Vec::new() };
        let apart = self.queue.iter().filter(|queued| queued.apart).take(self.sums.apart);
        let queue = apart.chain(self.queue.iter().filter(|queued| !queued.apart));
        let mut changes =
            self.retained.as_ref().map(|retained| retained.changes(kept.epoch())).unwrap_or_default();
        let unlisted = Unlisted::new(self.again.as_deref(), positions);
        changes.push(kept.note(
            positions,
            &self.from,
            unlisted,
            self.inflight.iter(),
            queue,
            bytes_max,
            with,
        ));
        changes
    }

    /// Records that the note was accepted.
    pub fn noted(&mut self) {
        self.retained.iter_mut().for_each(|retained| retained.noted());
        self.free_retained();
        self.kept.iter_mut().for_each(|kept| kept.note_refused = false);
    }

    pub fn wants_note(&self, positions: &[u64]) -> bool {
        self.kept.as_ref().is_some_and(|kept| kept.wants_note(positions))
    }

    /// Records that the note was not accepted.
    pub fn note_failed(&mut self) {
        if let Some(kept) = &mut self.kept {
            (kept.changed, kept.note_refused) = (true, true);
        }
    }

    /// Returns whether the last note found no room.
    pub fn is_note_refused(&self) -> bool {
        self.kept.as_ref().is_some_and(|kept| kept.note_refused)
    }

    /// Returns all keys that the session may have in the broker's stream.
    pub fn keys(&self) -> Vec<Vec<u8>> {
        let ids = self.inflight.iter().map(|flight| flight.packet_id);
        self.kept.as_ref().map_or_else(Vec::new, |kept| kept.keys(ids))
    }
}

/// Shrinks a queue that has become short. Each freed entry was filled since the last time, so this costs
/// no more than filling them did.
fn give_back_places<T>(queue: &mut VecDeque<T>) {
    if queue.capacity() > 2 * queue.len() + SPARE_PLACES {
        queue.shrink_to(queue.len() + queue.len() / 4);
    }
}

/// Returns whether another member of its share may be sent the message, if its client does not come
/// back.
fn is_unacknowledged_by_share(flight: &InFlight) -> bool {
    flight.waiting.as_ref().is_some_and(|queued| queued.qos == 1 && queued.share.is_some())
}
