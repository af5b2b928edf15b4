//! What waits for a subscriber: a bounded queue, the QoS 1 and 2 messages that
//! it has not acknowledged, and their packets. Belongs to the session, so that
//! it outlives a connection; what outlives the host is in [`kept`].
//!
//! While the client is away its queue is references: the messages stay in
//! their streams, and are read ([`load`]) when it is their turn.

mod kept;
mod load;
mod message;
#[cfg(test)]
mod tests;

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use bytes::{BufMut, BytesMut};
use serde::{Deserialize, Serialize};

use super::aliases::{Aliases, Name};
use super::session::Change;
use super::subscriptions::Options;
use super::wire::{self, OutPublish, Version};
use crate::stream::{AppendError, Stream, Ticket};

pub use self::kept::{Found, Kept, NOTE, Restored, SENT, STEP, note_bytes_max};
pub use self::load::{Loaded, Loader};
pub use self::message::Message;

/// A connected subscriber that keeps its session has so much of its queue in
/// memory, the rest in the streams.
const HELD_BYTES_MAX: usize = 256 << 10;
/// Read from the streams at a time, for one subscriber.
const LOAD_MESSAGES_MAX: usize = 256;
const LOAD_BYTES_MAX: usize = 256 << 10;

/// Where a message of a stream lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    pub stream: u16,
    pub offset: u64,
}

#[derive(Clone)]
pub enum Source {
    Stream {
        stream: u16,
        offset: u64,
    },
    /// Held by the retained messages too.
    Retained(Arc<Message>),
    /// `$SYS`
    Broker(Arc<Message>),
}

impl Source {
    fn stream(&self) -> Option<u16> {
        match self {
            Self::Stream { stream, .. } => Some(*stream),
            _ => None,
        }
    }
}

/// One message for one subscriber.
#[derive(Clone)]
pub struct Queued {
    pub source: Source,
    /// Of a stream's message; `None`: to be read there.
    pub body: Option<Arc<Message>>,
    pub received_us: u64,
    /// See [`Message::len`].
    pub len: u32,
    pub qos: u8,
    pub retain: bool,
    /// Not in the order of its stream: retained, or given back by another.
    pub apart: bool,
    /// Perhaps sent before a restart.
    pub may_be_again: bool,
    /// Subscription identifiers, mostly none.
    pub ids: Box<[u32]>,
    /// The shared subscription that it came by.
    pub share: Option<Arc<str>>,
}

impl Queued {
    /// Of one subscription, as a retained message; its bytes are held by others too.
    pub fn whole(source: Source, qos: u8, options: Options) -> Self {
        let (received_us, len) = match &source {
            Source::Retained(message) | Source::Broker(message) => (message.received_us(), message.len()),
            Source::Stream { .. } => (0, 0),
        };
        Self {
            apart: true,
            source,
            body: None,
            received_us,
            len: len as u32,
            qos,
            retain: true,
            may_be_again: false,
            ids: Some(options.id).filter(|id| *id != 0).into_iter().collect(),
            share: None,
        }
    }

    pub fn message(&self) -> Option<&Arc<Message>> {
        match &self.source {
            Source::Stream { .. } => self.body.as_ref(),
            Source::Retained(message) | Source::Broker(message) => Some(message),
        }
    }

    /// To be read before it can be sent.
    fn place(&self) -> Option<Place> {
        match self.source {
            Source::Stream { stream, offset } if self.body.is_none() => Some(Place { stream, offset }),
            _ => None,
        }
    }

    fn held(&self) -> usize {
        if self.body.is_some() { self.len as usize } else { 0 }
    }
}

pub struct InFlight {
    packet_id: u16,
    /// `None` once PUBREC came: PUBREL is on its way.
    waiting: Option<Queued>,
    /// The change that must be durable before its packet goes out.
    after: u64,
    /// Sent before.
    dup: bool,
}

#[derive(Clone, Copy, Debug)]
pub struct QueueLimits {
    pub messages_max: usize,
    pub bytes_max: usize,
    pub when_full: WhenFull,
}

/// What a full queue of a session does with one message more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WhenFull {
    /// The queue's oldest messages go.
    #[default]
    DropOldest,
    /// The new message is not queued.
    Refuse,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Offer {
    Queued,
    /// Queued into an empty queue: wake the connection.
    QueuedFirst,
    /// Queued, and so many older ones dropped.
    QueuedInsteadOf(u32),
    /// It has had this message, or came after it.
    Before,
    /// QoS 0 with nobody connected: not kept (MQTT 5.0, 3.1.2.4).
    Away,
    /// No room.
    Dropped,
    /// QoS 1 or 2 with no room, and a session that ends with its connection:
    /// the subscriber is too slow.
    Overflow,
}

/// What a subscriber's packet asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Acked {
    Nothing,
    /// Answer with PUBREL.
    Release,
    /// There is no such message.
    Unknown,
}

/// How the connected client wants its packets.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    pub version: Version,
    /// Its Receive Maximum.
    pub window: u16,
    pub packet_bytes_max: usize,
}

/// Why nothing more can be sent now, though something waits.
#[derive(Default)]
pub struct Waits {
    /// For the broker stream to be durable up to here.
    pub durable: Option<Ticket>,
    /// For room in the broker stream.
    pub room: bool,
    /// For these messages.
    pub load: Vec<Place>,
}

impl Waits {
    pub fn is_none(&self) -> bool {
        self.durable.is_none() && !self.room && self.load.is_empty()
    }
}

#[derive(Default)]
pub struct Outbox {
    connected: bool,
    queue: VecDeque<Queued>,
    /// Of the queue's messages, wherever they are.
    bytes: usize,
    /// Of these in memory.
    held: usize,
    inflight: VecDeque<InFlight>,
    /// Packet ids of `inflight`.
    ids: HashSet<u16>,
    /// So many of `inflight`, from the front, this connection has been sent.
    sent: usize,
    last_id: u16,
    /// By stream: what lies below is not for it, or done.
    from: Box<[u64]>,
    /// Of a session that outlives its connection.
    kept: Option<Box<Kept>>,
}

/// What `fill` did.
#[derive(Default)]
pub struct Filled {
    pub sent: u64,
    pub expired: u64,
    pub too_large: u64,
}

impl Outbox {
    /// A new session: messages before `from` are not for it.
    pub fn begin(&mut self, from: Box<[u64]>, kept: Option<Kept>) {
        *self = Self { from, kept: kept.map(Box::new), ..Self::default() };
    }

    /// A session that a restart found.
    pub fn restore(&mut self, restored: Restored) {
        let Restored { kept, from, inflight, queue } = restored;
        *self = Self {
            ids: inflight.iter().map(|flight| flight.packet_id).collect(),
            last_id: inflight.last().map_or(0, |flight| flight.packet_id),
            bytes: queue.iter().map(|queued| queued.len as usize).sum(),
            inflight: inflight.into(),
            queue: queue.into(),
            from,
            kept: Some(Box::new(kept)),
            ..Self::default()
        };
    }

    /// The session ends with its connection from now on.
    pub fn keep_no_more(&mut self) {
        self.kept = None;
        self.inflight.iter_mut().for_each(|flight| flight.after = 0);
    }

    pub fn from(&self, stream: usize) -> u64 {
        self.from.get(stream).copied().unwrap_or(0)
    }

    /// `body` is asked for where it is to be held.
    pub fn offer(
        &mut self,
        mut queued: Queued,
        limits: QueueLimits,
        body: impl FnOnce() -> Option<Arc<Message>>,
    ) -> Offer {
        if !self.takes(&queued) {
            return Offer::Before;
        }
        if !self.connected && queued.qos == 0 {
            return Offer::Away;
        }
        let len = queued.len as usize;
        let mut dropped = 0;
        while self.queue.len() >= limits.messages_max || self.bytes + len > limits.bytes_max {
            if self.kept.is_none() || queued.qos == 0 {
                let slow = self.connected && queued.qos > 0;
                return if slow { Offer::Overflow } else { Offer::Dropped };
            }
            match limits.when_full {
                WhenFull::DropOldest if len <= limits.bytes_max && self.pop().is_some() => dropped += 1,
                _ => return Offer::Dropped,
            }
        }
        let is_held = self.connected && (self.kept.is_none() || self.held + len <= HELD_BYTES_MAX);
        if matches!(queued.source, Source::Stream { .. }) {
            queued.body = if is_held { queued.body.or_else(body) } else { None };
        }
        self.push(queued);
        match (dropped, self.queue.len()) {
            (0, 1) => Offer::QueuedFirst,
            (0, _) => Offer::Queued,
            _ => Offer::QueuedInsteadOf(dropped),
        }
    }

    /// Whether the message is news to this session.
    pub fn takes(&self, queued: &Queued) -> bool {
        match queued.source {
            Source::Stream { stream, offset } if !queued.apart => {
                let is_sent =
                    || queued.qos == 2 && self.kept.as_ref().is_some_and(|it| it.was_sent(stream, offset));
                offset >= self.from(stream.into()) && !is_sent()
            }
            _ => true,
        }
    }

    fn push(&mut self, queued: Queued) {
        self.bytes += queued.len as usize;
        self.held += queued.held();
        self.queue.push_back(queued);
    }

    fn pop(&mut self) -> Option<Queued> {
        let queued = self.queue.pop_front()?;
        self.bytes -= queued.len as usize;
        self.held -= queued.held();
        Some(queued)
    }

    fn count_again(&mut self) {
        self.bytes = self.queue.iter().map(|queued| queued.len as usize).sum();
        self.held = self.queue.iter().map(Queued::held).sum();
    }

    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Messages that wait, their bytes, and messages sent and not acknowledged.
    pub fn sizes(&self) -> (usize, usize, usize) {
        (self.queue.len(), self.bytes, self.inflight.len())
    }

    /// Whether it would be sent soon: a shared subscription prefers such a member.
    pub fn is_ready(&self, queued: &Queued, limits: QueueLimits) -> bool {
        self.connected
            && self.queue.len() < limits.messages_max
            && self.bytes < limits.bytes_max
            && self.takes(queued)
    }

    /// Takes out what came by shared subscriptions (by `filter`, or by any) and
    /// was not sent yet, for another member. `ended`: the client will not come
    /// back, so also what it was sent with QoS 1 and has not acknowledged. What
    /// was sent with QoS 2 stays its own (MQTT 5.0, 4.8.2).
    pub fn give_back(&mut self, filter: Option<&str>, ended: bool) -> Vec<Queued> {
        let is_shared = |queued: &Queued| {
            queued.share.as_deref().is_some_and(|share| filter.is_none_or(|filter| filter == share))
        };
        let mut given = Vec::new();
        if ended {
            let is_given = |flight: &InFlight| {
                flight.waiting.as_ref().is_some_and(|queued| queued.qos == 1 && is_shared(queued))
            };
            let (back, own) = std::mem::take(&mut self.inflight).into_iter().partition::<Vec<_>, _>(is_given);
            self.inflight = own.into();
            self.sent = 0;
            for flight in back {
                self.ids.remove(&flight.packet_id);
                given.extend(flight.waiting);
            }
        }
        if self.queue.iter().any(is_shared) {
            let (shared, own) = std::mem::take(&mut self.queue).into_iter().partition::<Vec<_>, _>(is_shared);
            self.queue = own.into();
            self.count_again();
            given.extend(shared);
        }
        if let Some(kept) = &mut self.kept {
            kept.changed |= !given.is_empty();
        }
        given
    }

    /// Forgets what waits of topics that the client may not see any more. What
    /// is not in memory is looked at when it is read: [`Outbox::loaded`].
    pub fn keep_only(&mut self, may_see: impl Fn(&str) -> bool) {
        let stays = |queued: &Queued| queued.message().is_none_or(|message| may_see(message.topic()));
        self.queue.retain(stays);
        self.count_again();
        self.sent = 0;
        let mut at = 0;
        while let Some(flight) = self.inflight.get(at) {
            if flight.waiting.as_ref().is_none_or(stays) || self.give_up(at) {
                at += 1;
            }
        }
    }

    /// The connection ended: what waits is references again.
    pub fn disconnected(&mut self) {
        self.connected = false;
        self.queue.retain(|queued| queued.qos > 0);
        let waiting = self.inflight.iter_mut().filter_map(|flight| flight.waiting.as_mut());
        if self.kept.is_some() {
            self.queue.iter_mut().chain(waiting).for_each(|queued| queued.body = None);
            self.queue.shrink_to_fit();
        }
        self.count_again();
    }

    /// A new connection: what the last one left unacknowledged is sent again
    /// (4.4), in order and before anything else, by [`Outbox::fill`].
    pub fn resume(&mut self) {
        self.connected = true;
        self.sent = 0;
        if let Some(kept) = &mut self.kept {
            kept.releases.clear();
        }
    }

    /// Writes what may go, up to about `bytes_max` in `out`.
    pub fn fill(
        &mut self,
        peer: Peer,
        aliases: &mut Aliases,
        bytes_max: usize,
        out: &mut BytesMut,
    ) -> Filled {
        let mut filled = Filled::default();
        let durable = self.kept.as_ref().map_or(u64::MAX, |kept| kept.durable());
        if let Some(kept) = &mut self.kept {
            while let Some((packet_id, after)) = kept.releases.front()
                && *after <= durable
            {
                wire::put_ack(out, wire::PUBREL, *packet_id);
                kept.releases.pop_front();
            }
        }
        if self.queue.is_empty() && self.sent == self.inflight.len() {
            return filled;
        }
        let now_us = super::now_us();
        let window = usize::from(peer.window);
        while out.len() < bytes_max {
            if self.sent < self.inflight.len() {
                let flight = &self.inflight[self.sent];
                if self.sent >= window || flight.after > durable {
                    break;
                }
                let is_sent = match &flight.waiting {
                    Some(queued) if queued.message().is_none() => break,
                    Some(queued) => {
                        filled.put(queued, flight.packet_id, flight.dup, now_us, peer, aliases, out)
                    }
                    None => {
                        wire::put_ack(out, wire::PUBREL, flight.packet_id);
                        true
                    }
                };
                if is_sent {
                    self.inflight[self.sent].dup = true;
                    self.sent += 1;
                } else {
                    self.give_up(self.sent);
                }
                continue;
            }
            match self.queue.front() {
                Some(head) if head.message().is_none() => break,
                Some(head) if head.qos == 0 => {
                    let queued = self.pop().expect("it has a front");
                    filled.put(&queued, 0, false, now_us, peer, aliases, out);
                }
                Some(_) if self.inflight.len() < window => self.stage(window, bytes_max),
                _ => break,
            }
        }
        if self.queue.is_empty() && self.queue.capacity() > 64 {
            self.queue = VecDeque::new();
        }
        filled
    }

    /// Gives the head a packet id; where it needs a durable record first, all
    /// that follow and need one too.
    fn stage(&mut self, window: usize, bytes_max: usize) {
        let mut bytes = 0;
        while let Some(queued) = self.pop() {
            bytes += queued.len as usize;
            let packet_id = self.next_id();
            let after = match &mut self.kept {
                Some(kept) if queued.qos == 2 => kept.send(packet_id, &queued),
                _ => 0,
            };
            let dup = queued.qos == 1 && queued.may_be_again;
            self.inflight.push_back(InFlight { packet_id, waiting: Some(queued), after, dup });
            let next = self.queue.front().filter(|next| next.qos == 2 && next.message().is_some());
            if after == 0 || next.is_none() || self.inflight.len() >= window || bytes >= bytes_max {
                return;
            }
        }
    }

    /// Ends what is in flight without its message. True where the client may
    /// know its QoS 2 packet id: a PUBREL stays to be sent, so that the id means
    /// no other message until the client has let go of it.
    fn give_up(&mut self, at: usize) -> bool {
        let Some(flight) = self.inflight.get_mut(at) else { return false };
        let is_known = flight.dup && flight.waiting.as_ref().is_some_and(|queued| queued.qos == 2);
        if !is_known {
            self.remove(at);
            return false;
        }
        flight.waiting = None;
        if let Some(kept) = &mut self.kept {
            flight.after = kept.release(flight.packet_id);
        }
        true
    }

    fn remove(&mut self, at: usize) {
        if let Some(flight) = self.inflight.remove(at) {
            self.ids.remove(&flight.packet_id);
            self.sent -= usize::from(at < self.sent);
            if let Some(kept) = &mut self.kept {
                match &flight.waiting {
                    Some(queued) if queued.qos == 1 => kept.changed = true,
                    _ => kept.done(flight.packet_id),
                }
            }
        }
    }

    /// PUBACK, PUBREC, PUBCOMP from the subscriber.
    pub fn acked(&mut self, first: u8, packet_id: u16, code: u8) -> Acked {
        let durable = self.kept.as_ref().map_or(u64::MAX, |kept| kept.durable());
        let is_received = first == wire::PUBREC && code < 0x80;
        // Only what this connection was sent can be acknowledged.
        let mut sent = self.inflight.iter().take(self.sent);
        let Some(at) = sent.position(|flight| flight.packet_id == packet_id) else {
            return if is_received { Acked::Unknown } else { Acked::Nothing };
        };
        let flight = &mut self.inflight[at];
        match (&flight.waiting, &mut self.kept) {
            (Some(_), Some(kept)) if is_received => {
                flight.waiting = None;
                flight.after = kept.release(packet_id);
                kept.releases.push_back((packet_id, flight.after));
                Acked::Nothing
            }
            (None, _) if is_received && flight.after > durable => Acked::Nothing,
            (_, _) if is_received => {
                flight.waiting = None;
                Acked::Release
            }
            // A client that ends what has not begun would free its id too early.
            (Some(_), _) if first == wire::PUBCOMP => Acked::Nothing,
            _ => {
                self.remove(at);
                Acked::Nothing
            }
        }
    }

    /// Each id in flight is passed over once a round of all ids.
    fn next_id(&mut self) -> u16 {
        // Ends: the window is at most 65,535 and one id is free when we come here.
        loop {
            self.last_id = self.last_id.checked_add(1).unwrap_or(1);
            if self.ids.insert(self.last_id) {
                return self.last_id;
            }
        }
    }

    /// Drops what waits since before `received_us`; how many.
    pub fn drop_older(&mut self, received_us: u64) -> u64 {
        let mut dropped = 0;
        while self.queue.front().is_some_and(|head| head.received_us < received_us) {
            self.pop();
            dropped += 1;
        }
        dropped
    }

    /// What `fill` could not go on without. After [`Outbox::record`].
    pub fn waits(&self, peer: Peer) -> Waits {
        let mut waits = Waits::default();
        if let Some(kept) = &self.kept {
            waits.room = !kept.changes().is_empty();
            let flight = self.inflight.get(self.sent).map(|flight| flight.after);
            let release = kept.releases.front().map(|(_, after)| *after);
            let after = [flight, release].into_iter().flatten().filter(|after| *after > kept.durable());
            waits.durable = after.min().and_then(|after| kept.ticket(after));
        }
        let next = self.inflight.get(self.sent).map(|flight| flight.waiting.as_ref());
        if next.unwrap_or(self.queue.front()).and_then(Queued::place).is_none() {
            return waits;
        }
        let window = usize::from(peer.window);
        let again = self.inflight.iter().skip(self.sent).take(window.saturating_sub(self.sent));
        let again = again.filter_map(|flight| flight.waiting.as_ref());
        let room = window.saturating_sub(self.inflight.len());
        let mut bytes = 0;
        for queued in again.chain(self.queue.iter().take(room)).take(LOAD_MESSAGES_MAX) {
            waits.load.extend(queued.place());
            bytes += queued.len as usize;
            if bytes >= LOAD_BYTES_MAX {
                break;
            }
        }
        waits
    }

    /// Messages that were read. Those that are no more, or that the client may
    /// not see, are given up; how many are no more.
    pub fn loaded(&mut self, loaded: &Loaded, may_see: impl Fn(&str) -> bool) -> u64 {
        let mut gone = 0;
        // Fills in the body; false: there is none.
        let mut fill = |queued: &mut Queued| {
            let Some(found) = queued.place().and_then(|place| loaded.get(&place)) else { return true };
            queued.body = found.clone().filter(|message| may_see(message.topic()));
            gone += u64::from(found.is_none());
            queued.body.is_some()
        };
        let mut at = self.sent;
        while let Some(flight) = self.inflight.get_mut(at) {
            if flight.waiting.as_mut().is_none_or(&mut fill) || self.give_up(at) {
                at += 1;
            }
        }
        let mut seen = 0;
        self.queue.retain_mut(|queued| {
            seen += 1;
            seen > LOAD_MESSAGES_MAX || fill(queued)
        });
        self.count_again();
        gone
    }

    /// Sees what is durable by now; before [`Outbox::fill`].
    pub fn settle(&mut self, stream: &dyn Stream) {
        if let Some(kept) = self.kept.as_mut().filter(|kept| kept.has_appended()) {
            let durable = *stream.durable().borrow();
            kept.settle(durable);
        }
    }

    /// Appends what must be durable, and a note where one is due. Where there
    /// is no room it stays to be appended.
    pub fn record(
        &mut self,
        stream: &dyn Stream,
        positions: impl FnOnce() -> Box<[u64]>,
        note_bytes_max: usize,
    ) {
        let Some(kept) = &mut self.kept else { return };
        if kept.changes().is_empty() {
            return;
        }
        let mut changes = kept.changes().to_vec();
        if kept.note_due {
            // What is sent now is not to be in it.
            let sent = kept.made();
            changes.extend(self.note_with(&positions(), note_bytes_max, sent));
        }
        let Some(kept) = &mut self.kept else { return };
        match stream.append(&[], &super::borrowed(&changes)) {
            Ok(appended) => kept.appended(appended.ticket),
            Err(AppendError::Full | AppendError::NoSpace) => {
                kept.note_due |= changes.len() > kept.changes().len();
            }
            // Seen by whoever waits for the stream.
            Err(_) => {}
        }
    }

    /// Where the session stands, for the broker stream; `None`: nothing of it is
    /// kept. `positions`: of the live delivery, read before the outbox was locked.
    pub fn note(&mut self, positions: &[u64], bytes_max: usize) -> Option<Change> {
        self.note_with(positions, bytes_max, 0)
    }

    fn note_with(&mut self, positions: &[u64], bytes_max: usize, with: u64) -> Option<Change> {
        let kept = self.kept.as_mut()?;
        Some(kept.note(positions, &self.from, self.inflight.iter(), self.queue.iter(), bytes_max, with))
    }

    pub fn wants_note(&self, positions: &[u64]) -> bool {
        self.kept.as_ref().is_some_and(|kept| kept.wants_note(positions))
    }

    /// The note was not taken.
    pub fn note_failed(&mut self) {
        if let Some(kept) = &mut self.kept {
            kept.changed = true;
        }
    }

    /// All keys that it may have in the broker stream.
    pub fn keys(&self) -> Vec<Vec<u8>> {
        let ids = self.inflight.iter().map(|flight| flight.packet_id);
        self.kept.as_ref().map_or_else(Vec::new, |kept| kept.keys(ids))
    }
}

impl Filled {
    /// False, and nothing written, where the message expired or its packet is
    /// larger than the client takes.
    #[expect(clippy::too_many_arguments, reason = "each is one word of the packet or of its client")]
    fn put(
        &mut self,
        queued: &Queued,
        packet_id: u16,
        dup: bool,
        now_us: u64,
        peer: Peer,
        aliases: &mut Aliases,
        out: &mut BytesMut,
    ) -> bool {
        let Some(message) = queued.message() else { return false };
        let lifetime = match message.lifetime(now_us) {
            Some(lifetime) => lifetime,
            // What was begun is finished (MQTT 5.0, 4.3.3).
            None if dup => Some(1),
            None => {
                self.expired += 1;
                return false;
            }
        };
        let before = out.len();
        let mut name = aliases.name(message.topic());
        put(queued, message, name, packet_id, dup, lifetime, peer, out);
        if name.is_new() && out.len() - before > peer.packet_bytes_max {
            out.truncate(before);
            name.alias = 0;
            put(queued, message, name, packet_id, dup, lifetime, peer, out);
        }
        if out.len() - before > peer.packet_bytes_max {
            out.truncate(before);
            self.too_large += 1;
            return false;
        }
        aliases.sent(name);
        self.sent += 1;
        true
    }
}

#[expect(clippy::too_many_arguments, reason = "each is one word of the packet or of its client")]
fn put(
    queued: &Queued,
    message: &Message,
    name: Name<'_>,
    packet_id: u16,
    dup: bool,
    lifetime: Option<u32>,
    peer: Peer,
    out: &mut BytesMut,
) {
    let mut publish = OutPublish {
        qos: queued.qos,
        retain: queued.retain,
        dup,
        topic: name.topic,
        alias: name.alias,
        packet_id,
        properties: message.properties(),
        payload: message.payload(),
    };
    let own;
    if peer.version == Version::V5 && (lifetime.is_some() || !queued.ids.is_empty()) {
        let mut properties = message.properties().to_vec();
        if let Some(seconds) = lifetime {
            properties.put_u8(0x02);
            properties.put_u32(seconds);
        }
        for id in &queued.ids {
            properties.put_u8(0x0b);
            wire::put_var_int(&mut properties, *id as usize);
        }
        own = properties;
        publish.properties = &own;
    }
    publish.put(peer.version, out);
}
