//! Packets to a connected subscriber, and the handling of its acknowledgements.

use std::collections::{BTreeSet, HashMap};

use bytes::{BufMut, BytesMut};

use super::lent::SMALL_BYTES_MAX;
use super::{Body, IN_FLIGHT_BYTES_MAX, Ids, InFlight, Message, Outbox, Place, Queued, RetainedPage};
use crate::access::{QUESTIONS_MAX, Verdict};
use crate::listeners::mqtt::aliases::{Aliases, Name};
use crate::listeners::mqtt::clock::Clock;
use crate::listeners::mqtt::wire::{self, OutPublish, Version};
use crate::stream::Ticket;

/// Most messages that are read from the streams at once for one subscriber.
const LOAD_MESSAGES_MAX: usize = 256;
const LOAD_BYTES_MAX: usize = 256 << 10;

/// What a subscriber's packet requires.
#[derive(Debug, PartialEq, Eq)]
pub enum Acked {
    Nothing,
    /// An answer with PUBREL.
    Release,
    /// Nothing: there is no such message.
    Unknown,
}

/// How the connected client wants its packets.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    pub version: Version,
    /// Receive Maximum of the client.
    pub window: u16,
    pub packet_bytes_max: usize,
}

/// What must happen before more can be sent.
#[derive(Default)]
pub struct Waits {
    /// The broker's stream must be durable up to this ticket.
    pub durable: Option<Ticket>,
    /// The broker's stream must have room.
    pub room: bool,
    /// These messages must be read.
    pub load: Vec<Place>,
    /// These retained messages must be looked up.
    pub page: Option<RetainedPage>,
    /// Size of the message for which the client needs a permit; 0 if it needs none.
    pub permit: usize,
}

impl Waits {
    pub fn is_none(&self) -> bool {
        self.durable.is_none() && !self.room && !self.reads() && self.permit == 0
    }

    pub fn reads(&self) -> bool {
        !self.load.is_empty() || self.page.is_some()
    }
}

/// Result of `fill`.
#[derive(Default)]
pub struct Filled {
    pub sent: u64,
    pub expired: u64,
    pub too_large: u64,
    /// Number of messages that the client may not receive.
    pub denied: u64,
    /// Whether it is not known if the client may receive the next message.
    pub unanswered: bool,
    /// Size of the message that waits for memory, or for a permit, to be written; 0 if there is none.
    pub blocked: usize,
    /// Whether a message was written under the permit.
    pub used_permit: bool,
}

/// Room in a buffer to which packets are written.
#[derive(Clone, Copy)]
pub struct Space<'a> {
    /// Approximate size of the buffer up to which messages are added.
    pub bytes_max: usize,
    /// Returns whether there is memory for a larger message of so many bytes.
    pub has_room: &'a dyn Fn(usize) -> bool,
}

/// Verdict of the access rules on a message's topic; `None` if they need not be asked.
pub type Receive<'a> = Option<&'a dyn Fn(&str) -> Verdict>;

impl Outbox {
    /// Writes messages that may be sent, up to about `bytes_max` in `out`. Messages are written in
    /// order: a message about which `receive` does not know yet, or for which there is no room in
    /// `space`, delays all later ones.
    pub fn fill(
        &mut self,
        peer: Peer,
        aliases: &mut Aliases,
        receive: Receive<'_>,
        clock: &Clock,
        space: Space<'_>,
        out: &mut BytesMut,
    ) -> Filled {
        let mut filled = Filled::default();
        let bytes_max = space.bytes_max;
        let durable = self.kept.as_ref().map_or(u64::MAX, |kept| kept.durable());
        if let Some(kept) = &mut self.kept {
            while let Some((packet_id, after)) = kept.releases.front()
                && *after <= durable
            {
                wire::put_ack(out, wire::PUBREL, *packet_id);
                kept.releases.pop_front();
            }
        }
        if self.head().is_none() && self.sent == self.inflight.len() {
            return filled;
        }
        let window = usize::from(peer.window);
        while out.len() < bytes_max {
            match self.receives(receive) {
                Verdict::Yes => {}
                Verdict::No => {
                    filled.denied += 1;
                    if self.sent < self.inflight.len() {
                        self.give_up(self.sent);
                    } else {
                        self.take();
                        if let Some(kept) = &mut self.kept {
                            kept.changed = true;
                        }
                    }
                    continue;
                }
                Verdict::Ask => {
                    filled.unanswered = true;
                    break;
                }
            }
            if self.sent < self.inflight.len() {
                let flight = &self.inflight[self.sent];
                if self.sent >= window || flight.after > durable {
                    break;
                }
                if !self.fits(flight.waiting.as_ref(), space, &mut filled) {
                    break;
                }
                let is_sent = match &flight.waiting {
                    Some(queued) if queued.message().is_none() => break,
                    Some(queued) => {
                        filled.put(queued, flight.packet_id, flight.dup, clock, peer, aliases, out)
                    }
                    None => {
                        wire::put_ack(out, wire::PUBREL, flight.packet_id);
                        true
                    }
                };
                if is_sent {
                    let flight = &mut self.inflight[self.sent];
                    flight.dup = true;
                    // Only another connection sends it again, and reads it anew.
                    self.inflight_held -= flight.held();
                    flight.waiting.iter_mut().for_each(Queued::let_go);
                    self.inflight_held += flight.held();
                    self.sent += 1;
                } else {
                    self.give_up(self.sent);
                }
                continue;
            }
            match self.head() {
                Some(head) if head.message().is_none() => break,
                Some(head) if head.qos == 0 => {
                    if !self.fits(Some(head), space, &mut filled) {
                        break;
                    }
                    let queued = self.take().expect("it has a head");
                    filled.put(&queued, 0, false, clock, peer, aliases, out);
                }
                Some(_) if self.may_stage(window) => self.stage(window, receive, bytes_max),
                _ => break,
            }
        }
        if filled.used_permit {
            self.lent = None;
        }
        self.count();
        filled
    }

    /// Returns whether a message may be written. One that is larger than the buffer needs memory of its
    /// own, or the permit, which is for one message.
    fn fits(&self, queued: Option<&Queued>, space: Space<'_>, filled: &mut Filled) -> bool {
        let Some(message) = queued.and_then(Queued::message) else { return true };
        let bytes = message.len();
        if bytes <= space.bytes_max || (space.has_room)(bytes) {
            return true;
        }
        if filled.used_permit || !self.is_lent_to(message) {
            filled.blocked = bytes;
            return false;
        }
        filled.used_permit = true;
        true
    }

    /// Returns the verdict on the next message, if it is in memory.
    fn receives(&self, receive: Receive<'_>) -> Verdict {
        let next = match self.inflight.get(self.sent) {
            Some(flight) => flight.waiting.as_ref(),
            None => self.head(),
        };
        receive.zip(next.and_then(Queued::message)).map_or(Verdict::Yes, |(it, message)| it(message.topic()))
    }

    /// Returns the topics of the next messages in memory about which `receive` does not know, each once.
    pub fn unanswered(&self, receive: Receive<'_>) -> Vec<Box<str>> {
        let again = self.inflight.iter().skip(self.sent).filter_map(|flight| flight.waiting.as_ref());
        let next = again
            .chain(self.retained.iter().flat_map(|retained| retained.heads()))
            .chain(&self.queue)
            .take(QUESTIONS_MAX)
            .filter_map(Queued::message);
        let topics: BTreeSet<&str> = next.map(|message| message.topic()).collect();
        let is_open = |topic: &&str| receive.is_some_and(|receive| receive(topic) == Verdict::Ask);
        let topics = topics.into_iter().filter(is_open);
        topics.map(Into::into).collect()
    }

    fn may_stage(&self, window: usize) -> bool {
        let bytes = self.head().map_or(0, Queued::bytes);
        let has_bytes = self.inflight_held == 0 || self.inflight_held + bytes <= IN_FLIGHT_BYTES_MAX;
        has_bytes && self.inflight.len() < window && self.kept.as_ref().is_none_or(|kept| kept.has_room())
    }

    /// Gives the first message a packet id. If it needs a durable record first, all following messages
    /// that need one get theirs too.
    fn stage(&mut self, window: usize, receive: Receive<'_>, bytes_max: usize) {
        let mut bytes = 0;
        while let Some(queued) = self.take() {
            bytes += queued.len as usize;
            let packet_id = self.next_id();
            let (after, record) = match &mut self.kept {
                Some(kept) if queued.qos == 2 => kept.send(packet_id, &queued),
                _ => (0, 0),
            };
            let dup = queued.qos == 1 && queued.may_be_again;
            let flight = InFlight { packet_id, waiting: Some(queued), after, dup, record };
            self.inflight_held += flight.held();
            self.inflight.push_back(flight);
            let is_next = |next: &&Queued| {
                let message = next.message().filter(|_| next.qos == 2);
                message.is_some_and(|it| receive.is_none_or(|may| may(it.topic()) == Verdict::Yes))
            };
            let has_next = self.head().filter(is_next).is_some();
            if after == 0 || !has_next || !self.may_stage(window) || bytes >= bytes_max {
                return;
            }
        }
    }

    /// Ends a delivery in flight without its message. Returns true if the client may know its QoS 2
    /// packet id: a PUBREL is then still to be sent, so that the id stands for no other message until
    /// the client has released it.
    pub(super) fn give_up(&mut self, at: usize) -> bool {
        let Some(flight) = self.inflight.get_mut(at) else { return false };
        let is_known = flight.dup && flight.waiting.as_ref().is_some_and(|queued| queued.qos == 2);
        if !is_known {
            self.remove(at);
            return false;
        }
        self.inflight_held -= flight.held();
        flight.waiting = None;
        if let Some(kept) = &mut self.kept {
            kept.release(flight);
        }
        true
    }

    fn remove(&mut self, at: usize) {
        if let Some(flight) = self.inflight.remove(at) {
            self.ids.remove(&flight.packet_id);
            self.inflight_held -= flight.held();
            self.sent -= usize::from(at < self.sent);
            if let Some(kept) = &mut self.kept {
                match &flight.waiting {
                    Some(queued) if queued.qos == 1 => kept.changed = true,
                    _ => kept.done(&flight),
                }
            }
        }
    }

    /// Handles PUBACK, PUBREC and PUBCOMP of the subscriber.
    pub fn acked(&mut self, first: u8, packet_id: u16, code: u8) -> Acked {
        let durable = self.kept.as_ref().map_or(u64::MAX, |kept| kept.durable());
        let is_received = first == wire::PUBREC && code < 0x80;
        // Only what this connection was sent can be acknowledged.
        let mut sent = self.inflight.iter().take(self.sent);
        let Some(at) = sent.position(|flight| flight.packet_id == packet_id) else {
            return if is_received { Acked::Unknown } else { Acked::Nothing };
        };
        let flight = &mut self.inflight[at];
        if is_received {
            // PUBREL follows, whatever else comes of it.
            self.inflight_held -= flight.held();
        }
        let acked = match (&flight.waiting, &mut self.kept) {
            (Some(_), Some(kept)) if is_received => {
                flight.waiting = None;
                kept.release(flight);
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
        };
        self.count();
        acked
    }

    /// Returns the next packet id. Each id in flight is skipped once in a round of all ids.
    fn next_id(&mut self) -> u16 {
        // Ends: the window is at most 65,535 and one id is free when we come here.
        loop {
            self.last_id = self.last_id.checked_add(1).unwrap_or(1);
            if self.ids.insert(self.last_id) {
                return self.last_id;
            }
        }
    }

    /// Returns what `fill` waits for. Called after [`Outbox::record`].
    pub fn waits(&self, peer: Peer) -> Waits {
        let mut waits = Waits::default();
        if let Some(kept) = &self.kept {
            waits.room = kept.refused;
            let flight = self.inflight.get(self.sent).map(|flight| flight.after);
            let release = kept.releases.front().map(|(_, after)| *after);
            let after = [flight, release].into_iter().flatten().filter(|after| *after > kept.durable());
            waits.durable = after.min().and_then(|after| kept.ticket(after));
        }
        waits.page = self.wants_page();
        let next = self.inflight.get(self.sent).map(|flight| flight.waiting.as_ref());
        if next.unwrap_or(self.head()).and_then(Queued::place).is_none() {
            return waits;
        }
        let window = usize::from(peer.window);
        let again = self.inflight.iter().skip(self.sent).take(window.saturating_sub(self.sent));
        let again = again.filter_map(|flight| flight.waiting.as_ref());
        let room = window.saturating_sub(self.inflight.len());
        let mut first = again.clone().chain(self.queue.iter().take(room));
        let Some(first) = first.next().map(|queued| queued.len as usize) else { return waits };
        let has_room = |bytes: usize| self.memory.has_room(self.size() + bytes);
        // Without room for more, one message at a time.
        let bytes_max = if has_room(LOAD_BYTES_MAX.max(first)) { LOAD_BYTES_MAX } else { 1 };
        if bytes_max == 1 && first > SMALL_BYTES_MAX && !has_room(first) {
            waits.permit = first;
            if self.lent_bytes() < first {
                return waits;
            }
        }
        let mut bytes = 0;
        for queued in again.chain(self.queue.iter().take(room)).take(LOAD_MESSAGES_MAX) {
            waits.load.extend(queued.place());
            bytes += queued.len as usize;
            if bytes >= bytes_max {
                break;
            }
        }
        waits
    }

    /// Takes messages that were read. Messages that no longer exist, or that the client may not receive,
    /// are given up; returns the number of those that no longer exist. If there is no room for all of
    /// them, the first is kept if it is small or there is a permit for it, and the others are read again
    /// when it is their turn.
    pub fn loaded(&mut self, loaded: &HashMap<Place, Option<Body>>, may_see: impl Fn(&str) -> bool) -> u64 {
        let bytes: usize = loaded.values().flatten().map(|found| found.message.len()).sum();
        let size = self.size();
        let (has_room, mut held) = (self.memory.try_hold(size + bytes), 0);
        let found = |queued: &Queued| {
            let found = queued.place().and_then(|place| loaded.get(&place)?.as_ref());
            found.filter(|found| may_see(found.message.topic())).map(|found| &found.message)
        };
        let again = self.inflight.iter().skip(self.sent).filter_map(|flight| flight.waiting.as_ref());
        let first = again.chain(self.queue.iter().take(LOAD_MESSAGES_MAX)).find_map(found);
        let first = first.filter(|_| !has_room);
        let fits =
            first.is_none_or(|it| it.len() <= SMALL_BYTES_MAX || self.memory.try_hold(size + it.len()));
        let lent = first.filter(|it| !fits && it.len() <= self.lent_bytes());
        let keeps_first = fits || lent.is_some();
        let mut gone = 0;
        // Fills in the body; false: there is none.
        let mut fill = |queued: &mut Queued| {
            let Some(found) = queued.place().and_then(|place| loaded.get(&place)) else { return true };
            gone += u64::from(found.is_none());
            let Some(found) = found.as_ref().filter(|it| may_see(it.message.topic())) else { return false };
            held += 1;
            if !has_room && (held > 1 || !keeps_first) {
                if held == 1 {
                    // What is asked for next is its size in memory.
                    queued.len = found.message.len() as u32;
                }
                return true;
            }
            queued.body = Some(found.message.clone());
            if queued.share.is_none() {
                queued.ids = found.ids.clone();
            }
            true
        };
        let mut at = self.sent;
        while let Some(flight) = self.inflight.get_mut(at) {
            let held = flight.held();
            let stays = flight.waiting.as_mut().is_none_or(&mut fill);
            self.inflight_held += flight.held() - held;
            if stays || self.give_up(at) {
                at += 1;
            }
        }
        // What was asked for is at the front: a long queue is not walked for it.
        let mut at = 0;
        for _ in 0..self.queue.len().min(LOAD_MESSAGES_MAX) {
            let queued = &mut self.queue[at];
            self.sums.subtract(queued);
            if fill(queued) {
                self.sums.add(queued);
                at += 1;
            } else {
                self.queue.remove(at);
            }
        }
        if let Some(message) = lent {
            self.read_under_permit(message);
        }
        self.count();
        gone
    }
}

impl Filled {
    /// Writes a message. Returns false, and writes nothing, if the message has expired or its packet
    /// exceeds the client's maximum.
    #[expect(clippy::too_many_arguments, reason = "each is one word of the packet or of its client")]
    fn put(
        &mut self,
        queued: &Queued,
        packet_id: u16,
        dup: bool,
        clock: &Clock,
        peer: Peer,
        aliases: &mut Aliases,
        out: &mut BytesMut,
    ) -> bool {
        let Some(message) = queued.message() else { return false };
        let lifetime = match message.lifetime(clock) {
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
    if peer.version == Version::V5 && (lifetime.is_some() || queued.ids != Ids::None) {
        let mut properties = message.properties().to_vec();
        if let Some(seconds) = lifetime {
            properties.put_u8(0x02);
            properties.put_u32(seconds);
        }
        for id in queued.ids.as_slice() {
            properties.put_u8(0x0b);
            wire::put_var_int(&mut properties, *id as usize);
        }
        own = properties;
        publish.properties = &own;
    }
    publish.put(peer.version, out);
}
