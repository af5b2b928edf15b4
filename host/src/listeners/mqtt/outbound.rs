//! What waits for a subscriber: a bounded queue, the QoS 1 and 2 messages that
//! it has not acknowledged, and their packets. Belongs to the session, so that
//! it outlives a connection.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use bytes::{BufMut, BytesMut};

use super::wire::{self, OutPublish, Version};
use crate::batch::{MessageRef, flags};
use crate::properties::{self, Origin};
use crate::stream::NewMessage;

/// One message for any number of subscribers: one allocation, however many they are.
#[derive(Debug)]
pub struct Message {
    /// Topic, MQTT 5 properties, payload.
    bytes: Box<[u8]>,
    topic_len: u32,
    properties_len: u32,
    pub qos: u8,
    pub retain: bool,
    received_us: u64,
    expiry_s: Option<u32>,
}

impl Message {
    pub fn new(topic: &str, payload: &[u8], properties: &[u8], flags_: u16, received_us: u64) -> Self {
        let mut bytes = Vec::with_capacity(topic.len() + properties.len() + payload.len());
        bytes.extend_from_slice(topic.as_bytes());
        let expiry_s = put_properties(&mut bytes, properties, flags_ & flags::UTF8 != 0);
        let properties_len = (bytes.len() - topic.len()) as u32;
        bytes.extend_from_slice(payload);
        Self {
            bytes: bytes.into(),
            topic_len: topic.len() as u32,
            properties_len,
            qos: (flags_ & flags::QOS_MASK) as u8,
            retain: flags_ & flags::RETAIN != 0,
            received_us,
            expiry_s,
        }
    }

    pub fn of(message: MessageRef<'_>) -> Self {
        let (flags, received_us) = (message.entry.flags, message.entry.received_us);
        Self::new(message.topic(), message.payload(), message.properties(), flags, received_us)
    }

    pub fn of_new(message: &NewMessage<'_>) -> Self {
        let NewMessage { topic, payload, properties, flags, received_us, .. } = *message;
        Self::new(topic, payload, properties, flags, received_us)
    }

    pub fn topic(&self) -> &str {
        std::str::from_utf8(&self.bytes[..self.topic_len as usize]).unwrap_or_default()
    }

    fn properties(&self) -> &[u8] {
        &self.bytes[self.topic_len as usize..][..self.properties_len as usize]
    }

    pub fn payload(&self) -> &[u8] {
        &self.bytes[(self.topic_len + self.properties_len) as usize..]
    }

    /// For the queue's bound in bytes.
    pub fn len(&self) -> usize {
        self.bytes.len() + size_of::<Self>()
    }

    /// Seconds that it may still wait; `None` once it expired.
    fn lifetime(&self, now_us: u64) -> Option<Option<u32>> {
        let Some(expiry) = self.expiry_s else { return Some(None) };
        let waited = now_us.saturating_sub(self.received_us) / 1_000_000;
        expiry.checked_sub(waited.min(u64::from(u32::MAX)) as u32).filter(|left| *left > 0).map(Some)
    }
}

/// Properties of the plugin contract as MQTT 5 writes them, but for the expiry,
/// which is returned: it shrinks while the message waits.
fn put_properties(out: &mut Vec<u8>, encoded: &[u8], utf8: bool) -> Option<u32> {
    let put = |out: &mut Vec<u8>, id: u8, values: &[&[u8]]| {
        out.put_u8(id);
        for value in values {
            out.put_u16(value.len() as u16);
            out.put_slice(value);
        }
    };
    if utf8 {
        out.put_slice(&[0x01, 1]);
    }
    let mut expiry = None;
    for property in properties::iter(encoded) {
        if property.value.len() > usize::from(u16::MAX) {
            continue;
        }
        let listener = property.origin == Origin::Listener as u8;
        match property.name {
            "content-type" if listener => put(out, 0x03, &[property.value]),
            "response-topic" if listener => put(out, 0x08, &[property.value]),
            "correlation-data" if listener => put(out, 0x09, &[property.value]),
            "expiry-s" if listener => {
                expiry = std::str::from_utf8(property.value).ok().and_then(|text| text.parse().ok());
            }
            _ if listener => {}
            name if std::str::from_utf8(property.value).is_ok() => {
                put(out, 0x26, &[name.as_bytes(), property.value]);
            }
            _ => {}
        }
    }
    expiry
}

pub struct Queued {
    pub message: Arc<Message>,
    pub qos: u8,
    pub retain: bool,
    /// Subscription identifiers, mostly none.
    pub ids: Vec<u32>,
    /// The shared subscription that it came by.
    pub share: Option<Arc<str>>,
}

struct InFlight {
    packet_id: u16,
    /// `None` once PUBREC came: PUBREL is on its way.
    waiting: Option<Queued>,
}

#[derive(Clone, Copy, Debug)]
pub struct QueueLimits {
    pub messages_max: usize,
    pub bytes_max: usize,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Offer {
    Queued,
    /// Queued into an empty queue: wake the connection.
    QueuedFirst,
    /// QoS 0 with nobody connected: not kept (MQTT 5.0, 3.1.2.4).
    Away,
    /// No room.
    Dropped,
    /// QoS 1 or 2 with no room: the subscriber is too slow.
    Overflow,
}

/// How the connected client wants its packets.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    pub version: Version,
    /// Its Receive Maximum.
    pub window: u16,
    pub packet_bytes_max: usize,
}

#[derive(Default)]
pub struct Outbox {
    pub connected: bool,
    queue: VecDeque<Queued>,
    bytes: usize,
    inflight: VecDeque<InFlight>,
    /// Packet ids of `inflight`.
    ids: HashSet<u16>,
    /// So many of `inflight`, from the front, this connection has been sent.
    sent: usize,
    last_id: u16,
}

/// What `fill` did.
#[derive(Default)]
pub struct Filled {
    pub sent: u64,
    pub expired: u64,
    pub too_large: u64,
}

impl Outbox {
    pub fn offer(&mut self, queued: Queued, limits: QueueLimits) -> Offer {
        if !self.connected && queued.qos == 0 {
            return Offer::Away;
        }
        let bytes = self.bytes + queued.message.len();
        if self.queue.len() >= limits.messages_max || bytes > limits.bytes_max {
            let slow = self.connected && queued.qos > 0;
            return if slow { Offer::Overflow } else { Offer::Dropped };
        }
        self.bytes = bytes;
        self.queue.push_back(queued);
        if self.queue.len() == 1 { Offer::QueuedFirst } else { Offer::Queued }
    }

    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Messages that wait, their bytes, and messages sent and not acknowledged.
    pub fn sizes(&self) -> (usize, usize, usize) {
        (self.queue.len(), self.bytes, self.inflight.len())
    }

    /// Whether it would be sent soon: a shared subscription prefers such a member.
    pub fn is_ready(&self, limits: QueueLimits) -> bool {
        self.connected && self.queue.len() < limits.messages_max && self.bytes < limits.bytes_max
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
            self.bytes -= shared.iter().map(|queued| queued.message.len()).sum::<usize>();
            self.queue = own.into();
            given.extend(shared);
        }
        given
    }

    /// Forgets what waits of topics that the client may not see any more.
    pub fn keep_only(&mut self, may_see: impl Fn(&str) -> bool) {
        self.queue.retain(|queued| may_see(queued.message.topic()));
        self.bytes = self.queue.iter().map(|queued| queued.message.len()).sum();
        let stays = |queued: &Queued| may_see(queued.message.topic());
        self.inflight.retain(|flight| flight.waiting.as_ref().is_none_or(stays));
        self.ids = self.inflight.iter().map(|flight| flight.packet_id).collect();
        self.sent = 0;
    }

    /// A new connection: what the last one left unacknowledged is sent again
    /// (4.4), in order and before anything else, by [`Outbox::fill`].
    pub fn resume(&mut self) {
        self.connected = true;
        self.sent = 0;
    }

    /// Writes what may go, up to about `bytes_max` in `out`.
    pub fn fill(&mut self, peer: Peer, bytes_max: usize, out: &mut BytesMut) -> Filled {
        let mut filled = Filled::default();
        if self.queue.is_empty() && self.sent == self.inflight.len() {
            return filled;
        }
        let now_us = super::now_us();
        let window = usize::from(peer.window);
        while self.sent < self.inflight.len().min(window) && out.len() < bytes_max {
            let InFlight { packet_id, waiting } = &self.inflight[self.sent];
            let is_sent = match waiting {
                Some(queued) => filled.put(queued, *packet_id, true, now_us, peer, out),
                None => {
                    wire::put_ack(out, wire::PUBREL, *packet_id);
                    true
                }
            };
            if is_sent {
                self.sent += 1;
            } else {
                self.remove(self.sent);
            }
        }
        while self.sent == self.inflight.len()
            && let Some(head) = self.queue.front()
            && out.len() < bytes_max
            && (head.qos == 0 || self.inflight.len() < window)
        {
            let queued = self.queue.pop_front().expect("it has a front");
            self.bytes -= queued.message.len();
            let packet_id = if queued.qos == 0 { 0 } else { self.next_id() };
            let is_sent = filled.put(&queued, packet_id, false, now_us, peer, out);
            if is_sent && queued.qos > 0 {
                self.inflight.push_back(InFlight { packet_id, waiting: Some(queued) });
                self.sent += 1;
            } else {
                self.ids.remove(&packet_id);
            }
        }
        if self.queue.is_empty() && self.queue.capacity() > 64 {
            self.queue = VecDeque::new();
        }
        filled
    }

    fn remove(&mut self, at: usize) {
        if let Some(flight) = self.inflight.remove(at) {
            self.ids.remove(&flight.packet_id);
            self.sent -= usize::from(at < self.sent);
        }
    }

    /// PUBACK, PUBREC, PUBCOMP from the subscriber; what to answer.
    pub fn acked(&mut self, first: u8, packet_id: u16, code: u8) -> Option<u8> {
        let at = self.inflight.iter().position(|flight| flight.packet_id == packet_id);
        if first == wire::PUBREC && code < 0x80 {
            let flight = at.map(|at| &mut self.inflight[at])?;
            flight.waiting = None;
            return Some(wire::PUBREL);
        }
        if let Some(at) = at {
            self.remove(at);
        }
        None
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
}

impl Filled {
    /// False, and nothing written, where the message expired or its packet is
    /// larger than the client takes.
    fn put(
        &mut self,
        queued: &Queued,
        packet_id: u16,
        dup: bool,
        now_us: u64,
        peer: Peer,
        out: &mut BytesMut,
    ) -> bool {
        let lifetime = match queued.message.lifetime(now_us) {
            Some(lifetime) => lifetime,
            // What was begun is finished (MQTT 5.0, 4.3.3).
            None if dup => Some(1),
            None => {
                self.expired += 1;
                return false;
            }
        };
        let before = out.len();
        put(queued, packet_id, dup, lifetime, peer, out);
        if out.len() - before > peer.packet_bytes_max {
            out.truncate(before);
            self.too_large += 1;
            return false;
        }
        self.sent += 1;
        true
    }
}

fn put(queued: &Queued, packet_id: u16, dup: bool, lifetime: Option<u32>, peer: Peer, out: &mut BytesMut) {
    let message = &queued.message;
    let mut publish = OutPublish {
        qos: queued.qos,
        retain: queued.retain,
        dup,
        topic: message.topic(),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_id_in_flight_is_not_given_again() {
        let peer = Peer { version: Version::V5, window: 3, packet_bytes_max: usize::MAX };
        let limits = QueueLimits { messages_max: 10, bytes_max: 1 << 20 };
        let message = Arc::new(Message::new("t", b"", &[], 1, 0));
        let mut outbox = Outbox { connected: true, last_id: u16::MAX - 1, ..Outbox::default() };
        let send = |outbox: &mut Outbox| {
            let queued = Queued { message: message.clone(), qos: 1, retain: false, ids: vec![], share: None };
            assert_eq!(outbox.offer(queued, limits), Offer::QueuedFirst);
            outbox.fill(peer, usize::MAX, &mut BytesMut::new());
            outbox.last_id
        };
        assert_eq!([send(&mut outbox), send(&mut outbox)], [u16::MAX, 1]);
        // Round once more: 1 is still out, 65,535 is not.
        outbox.acked(wire::PUBACK, u16::MAX, 0);
        outbox.last_id = u16::MAX - 1;
        assert_eq!([send(&mut outbox), send(&mut outbox)], [u16::MAX, 2]);
    }

    const LIMITS: QueueLimits = QueueLimits { messages_max: 10, bytes_max: 1 << 20 };

    fn peer(window: u16, packet_bytes_max: usize) -> Peer {
        Peer { version: Version::V5, window, packet_bytes_max }
    }

    /// An outbox that was sent these payloads, by a share where there is one.
    fn sent(qos: u8, payloads: &[&str], properties: &[u8], share: Option<&str>) -> Outbox {
        let mut outbox = Outbox { connected: true, ..Outbox::default() };
        for payload in payloads {
            let received_us = crate::listeners::mqtt::now_us();
            let message = Message::new("t", payload.as_bytes(), properties, u16::from(qos), received_us);
            let queued = Queued {
                message: message.into(),
                qos,
                retain: false,
                ids: vec![],
                share: share.map(Into::into),
            };
            outbox.offer(queued, LIMITS);
        }
        let filled = outbox.fill(peer(10, usize::MAX), 1 << 20, &mut BytesMut::new());
        assert_eq!(filled.sent, payloads.len() as u64);
        outbox
    }

    #[test]
    fn a_resumed_session_is_sent_again_within_what_its_client_takes_now() {
        let large = "x".repeat(100);
        let mut outbox = sent(1, &["1", &large, "3", "4"], &[], None);
        outbox.resume();
        let mut out = BytesMut::new();
        let filled = outbox.fill(peer(2, 50), 1 << 20, &mut out);
        assert_eq!((filled.sent, filled.too_large), (2, 1), "1 and 3");
        assert!(out.iter().filter(|byte| **byte == 0x3a).count() == 2, "with DUP: {out:x?}");
        assert_eq!(outbox.fill(peer(2, 50), 1 << 20, &mut out).sent, 0, "its window is full");
        outbox.acked(0x40, 1, 0);
        assert_eq!(outbox.fill(peer(2, 50), 1 << 20, &mut out).sent, 1, "4");
    }

    #[test]
    fn what_is_sent_again_tells_what_is_left_of_its_expiry() {
        let mut properties = Vec::new();
        properties::push(&mut properties, Origin::Listener, "expiry-s", b"1000");
        let mut outbox = sent(1, &["1"], &properties, None);
        outbox.resume();
        let mut out = BytesMut::new();
        outbox.fill(peer(2, 50), 1 << 20, &mut out);
        let at = out.windows(3).position(|bytes| bytes == [0x02, 0, 0]).expect("the property");
        let left = u16::from_be_bytes([out[at + 3], out[at + 4]]);
        assert!((990..=1_000).contains(&left), "{left}");
    }

    #[test]
    fn what_a_share_gave_with_qos_2_stays_with_its_member() {
        let mut outbox = sent(2, &["1", "2"], &[], Some("$share/g/t"));
        assert!(outbox.give_back(None, true).is_empty(), "sent, and not acknowledged");
        outbox.acked(wire::PUBREC, 1, 0x83);
        assert!(outbox.give_back(None, true).is_empty(), "refused by the member");
        let mut outbox = sent(1, &["1", "2"], &[], Some("$share/g/t"));
        assert!(outbox.give_back(None, false).is_empty(), "the member may come back");
        assert_eq!(outbox.give_back(Some("$share/h/t"), true).len(), 0);
        assert_eq!(outbox.give_back(None, true).len(), 2);
    }
}
