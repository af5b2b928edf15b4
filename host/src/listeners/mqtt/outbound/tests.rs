//! The outbox alone: its windows, bounds and what it makes durable.

mod again;
mod lent;

use proptest::prelude::*;
use uuid::Uuid;

use bytes::BytesMut;

use super::*;
use crate::access::Verdict;
use crate::listeners::mqtt::aliases::Aliases;
use crate::listeners::mqtt::clock::{self, Clock};
use crate::listeners::mqtt::retained::Retained;
use crate::listeners::mqtt::subscriptions::{Filter, Options};
use crate::listeners::mqtt::wire::{self, Version};
use crate::properties::{self, Origin};
use crate::room::{Holding, Room};
use crate::stream::memory::MemoryStream;
use crate::stream::{Identity, StateChange, StateEntries};

const LIMITS: QueueLimits =
    QueueLimits { messages_max: 10, bytes_max: 1 << 20, when_full: WhenFull::DropOldest };

fn peer(window: u16, packet_bytes_max: usize) -> Peer {
    Peer { version: Version::V5, window, packet_bytes_max }
}

fn queued(offset: u64, qos: u8, share: Option<&str>) -> Queued {
    Queued {
        source: Source::Stream { stream: 0, offset },
        body: None,
        since_us: offset * 1_000_000,
        len: 100,
        qos,
        retain: false,
        apart: false,
        may_be_again: false,
        ids: Ids::None,
        share: share.map(|share| Arc::new(share.into())),
    }
}

fn message(payload: &str, properties: &[u8]) -> Arc<Message> {
    Message::new("t", payload.as_bytes(), properties, 2, crate::listeners::mqtt::now_us()).into()
}

fn body(payload: &str) -> Body {
    Body { message: message(payload, b""), ids: Ids::None }
}

fn clock() -> Clock {
    Clock::new(clock::system(), None, 0).0
}

fn offer(outbox: &mut Outbox, queued: Queued) -> Offer {
    let text = match queued.source {
        Source::Stream { offset, .. } => offset.to_string(),
        _ => String::new(),
    };
    outbox.offer(queued, LIMITS, || Some(message(&text, b"")))
}

/// A write buffer beside which there is memory for any message.
fn space(bytes_max: usize) -> Space<'static> {
    Space { bytes_max, has_room: &|_| true }
}

/// An outbox that was sent these payloads, by a share where there is one.
fn sent(qos: u8, payloads: &[&str], properties: &[u8], share: Option<&str>) -> Outbox {
    let mut outbox = Outbox { connected: true, ..Outbox::default() };
    for (offset, payload) in payloads.iter().enumerate() {
        let body = || Some(message(payload, properties));
        outbox.offer(queued(offset as u64, qos, share), LIMITS, body);
    }
    let filled = outbox.fill(
        peer(10, usize::MAX),
        &mut Aliases::new(0),
        None,
        &clock(),
        space(1 << 20),
        &mut BytesMut::new(),
    );
    assert_eq!(filled.sent, payloads.len() as u64);
    outbox
}

/// A new connection, for which what was sent with these payloads has been read again.
fn resume(outbox: &mut Outbox, payloads: &[&str], properties: &[u8]) {
    outbox.disconnected();
    outbox.resume();
    let read = payloads.iter().enumerate().map(|(offset, payload)| {
        let body = Body { message: message(payload, properties), ids: Ids::None };
        (Place { stream: 0, offset: offset as u64 }, Some(body))
    });
    assert_eq!(outbox.loaded(&read.collect(), |_| true), 0);
}

#[test]
fn what_is_in_flight_is_bounded_in_bytes_also_where_it_was_retained() {
    let large = "x".repeat(300_000);
    let held = |outbox: &Outbox| {
        assert_eq!(outbox.inflight_held, outbox.inflight.iter().map(InFlight::held).sum::<usize>());
        outbox.inflight_held
    };
    let mut outbox = sent(1, &["1", "2"], &[], None);
    assert_eq!((outbox.sizes().2, held(&outbox)), (2, 0), "what lies in a stream is read again there");
    resume(&mut outbox, &["1", "2"], &[]);
    assert!(held(&outbox) > 0, "until it is sent again");

    let mut outbox = Outbox { connected: true, ..Outbox::default() };
    let options = Options { qos: 1, no_local: false, retain_as_published: false, id: 0 };
    let huge = "x".repeat(2 * IN_FLIGHT_BYTES_MAX);
    for payload in [&*large; 5].into_iter().chain([&*huge, &*large]) {
        let retained = Source::Retained(message(payload, &[]));
        let queued = Queued::whole(retained, 1, options, 0);
        outbox.offer(queued, QueueLimits { bytes_max: usize::MAX, ..LIMITS }, || None);
    }
    let fill = |outbox: &mut Outbox| {
        let peer = peer(10, usize::MAX);
        let out = &mut BytesMut::new();
        outbox.fill(peer, &mut Aliases::new(0), None, &clock(), space(usize::MAX), out).sent
    };
    assert_eq!(fill(&mut outbox), 3);
    assert!(held(&outbox) <= IN_FLIGHT_BYTES_MAX);
    outbox.acked(wire::PUBACK, 1, 0);
    assert_eq!(fill(&mut outbox), 1, "each that is acknowledged makes room");
    [2, 3].into_iter().for_each(|id| assert_eq!(outbox.acked(wire::PUBACK, id, 0), Acked::Nothing));
    assert_eq!(fill(&mut outbox), 1, "the next is too large beside another");
    [4, 5].into_iter().for_each(|id| assert_eq!(outbox.acked(wire::PUBACK, id, 0), Acked::Nothing));
    assert_eq!((held(&outbox), fill(&mut outbox)), (0, 1), "and goes alone");
    outbox.acked(wire::PUBACK, 6, 0);
    assert_eq!(fill(&mut outbox), 1);
}

#[test]
fn a_packet_id_in_flight_is_not_given_again() {
    let mut outbox = Outbox { connected: true, last_id: u16::MAX - 1, ..Outbox::default() };
    let send = |outbox: &mut Outbox| {
        assert_eq!(offer(outbox, queued(1, 1, None)), Offer::QueuedFirst);
        outbox.fill(
            peer(3, usize::MAX),
            &mut Aliases::new(0),
            None,
            &clock(),
            space(usize::MAX),
            &mut BytesMut::new(),
        );
        outbox.last_id
    };
    assert_eq!([send(&mut outbox), send(&mut outbox)], [u16::MAX, 1]);
    // Round once more: 1 is still out, 65,535 is not.
    outbox.acked(wire::PUBACK, u16::MAX, 0);
    outbox.last_id = u16::MAX - 1;
    assert_eq!([send(&mut outbox), send(&mut outbox)], [u16::MAX, 2]);
}

#[test]
fn a_resumed_session_is_sent_again_within_what_its_client_takes_now() {
    let large = "x".repeat(100);
    let mut outbox = sent(1, &["1", &large, "3", "4"], &[], None);
    resume(&mut outbox, &["1", &large, "3", "4"], &[]);
    let mut out = BytesMut::new();
    let filled = outbox.fill(peer(2, 50), &mut Aliases::new(0), None, &clock(), space(1 << 20), &mut out);
    assert_eq!((filled.sent, filled.too_large), (2, 1), "1 and 3");
    assert!(out.iter().filter(|byte| **byte == 0x3a).count() == 2, "with DUP: {out:x?}");
    assert_eq!(
        outbox.fill(peer(2, 50), &mut Aliases::new(0), None, &clock(), space(1 << 20), &mut out).sent,
        0,
        "its window is full"
    );
    outbox.acked(0x40, 1, 0);
    assert_eq!(
        outbox.fill(peer(2, 50), &mut Aliases::new(0), None, &clock(), space(1 << 20), &mut out).sent,
        1,
        "4"
    );
}

#[test]
fn what_is_sent_again_tells_what_is_left_of_its_expiry() {
    let mut properties = Vec::new();
    properties::push(&mut properties, Origin::Listener, "expiry-s", b"1000");
    let mut outbox = sent(1, &["1"], &properties, None);
    resume(&mut outbox, &["1"], &properties);
    let mut out = BytesMut::new();
    outbox.fill(peer(2, 50), &mut Aliases::new(0), None, &clock(), space(1 << 20), &mut out);
    let at = out.windows(3).position(|bytes| bytes == [0x02, 0, 0]).expect("the property");
    let left = u16::from_be_bytes([out[at + 3], out[at + 4]]);
    assert!((990..=1_000).contains(&left), "{left}");
}

#[test]
fn what_a_share_gave_with_qos_2_stays_with_its_member() {
    let mut outbox = sent(2, &["1", "2"], &[], Some("$share/g/t"));
    let any = |_: &str| true;
    assert!(outbox.give_back(any, true, 9).is_empty(), "sent, and not acknowledged");
    outbox.acked(wire::PUBREC, 1, 0x83);
    assert!(outbox.give_back(any, true, 9).is_empty(), "refused by the member");
    let mut outbox = sent(1, &["1", "2"], &[], Some("$share/g/t"));
    assert!(outbox.give_back(any, false, 9).is_empty(), "the member may come back");
    assert_eq!(outbox.give_back(|filter| filter == "$share/h/t", true, 9).len(), 0);
    assert_eq!(outbox.shares(true).1, 2);
    assert_eq!(outbox.give_back(any, true, 1).len(), 1);
    assert_eq!(outbox.give_back(any, true, 9).len(), 1);
}

#[test]
fn a_qos_2_message_that_cannot_be_sent_again_still_frees_its_packet_id() {
    let large = "x".repeat(100);
    let mut outbox = sent(2, &[&large], &[], None);
    resume(&mut outbox, &[&large], &[]);
    let mut out = BytesMut::new();
    outbox.fill(peer(10, 50), &mut Aliases::new(0), None, &clock(), space(1 << 20), &mut out);
    assert_eq!(&out[..], [0x62, 2, 0, 1], "a PUBREL");
    assert_eq!(outbox.sizes().2, 1, "its id is not given again");
    outbox.acked(wire::PUBCOMP, 1, 0);
    assert_eq!(outbox.sizes().2, 0);
}

#[test]
fn who_is_connected_is_sent_nothing_again_when_its_rights_change() {
    for (may_see, more) in [(true, 1), (false, 0)] {
        let mut outbox = sent(1, &["1", "2"], &[], None);
        offer(&mut outbox, queued(2, 1, None));
        outbox.keep_only(|_| may_see);
        let mut out = BytesMut::new();
        let filled =
            outbox.fill(peer(10, usize::MAX), &mut Aliases::new(0), None, &clock(), space(1 << 20), &mut out);
        assert_eq!(filled.sent, more);
        for packet_id in 1..=2 + more as u16 {
            outbox.acked(wire::PUBACK, packet_id, 0);
        }
        assert_eq!(outbox.sizes(), (0, 0, 0));
    }
}

#[test]
fn a_packet_that_its_new_alias_would_make_too_large_goes_without() {
    let fill = |packet_bytes_max: usize| {
        let mut outbox = Outbox { connected: true, ..Outbox::default() };
        for offset in 0..2 {
            let body = || Some(Message::new("topic", b"12345", &[], 0, 0).into());
            outbox.offer(queued(offset, 0, None), LIMITS, body);
        }
        let mut out = BytesMut::new();
        let aliases = &mut Aliases::new(1);
        let filled =
            outbox.fill(peer(10, packet_bytes_max), aliases, None, &clock(), space(1 << 20), &mut out);
        (filled.sent, filled.too_large, out.len())
    };
    // Header 2, topic 7, length of properties 1, payload 5; the alias 3, its topic then 2.
    assert_eq!(fill(18), (2, 0, 18 + 13));
    assert_eq!(fill(17), (2, 0, 15 + 15));
    assert_eq!(fill(14), (0, 2, 0));
}

#[test]
fn a_message_that_must_be_asked_for_holds_what_is_behind_it_and_a_denied_one_goes() {
    let mut outbox = Outbox { connected: true, ..Outbox::default() };
    let messages = [("yes", 0), ("no", 1), ("open", 1), ("yes", 2), ("open/2", 0), ("no", 0)];
    for (offset, (topic, qos)) in messages.into_iter().enumerate() {
        let body = Message::new(topic, b"x", b"", qos.into(), crate::listeners::mqtt::now_us());
        outbox.offer(queued(offset as u64, qos, None), LIMITS, || Some(body.into()));
    }
    let mut fill = |answered: bool| {
        let receive = |topic: &str| match topic {
            "no" => Verdict::No,
            "open" | "open/2" if !answered => Verdict::Ask,
            _ => Verdict::Yes,
        };
        let (aliases, out) = (&mut Aliases::new(0), &mut BytesMut::new());
        let filled =
            outbox.fill(peer(10, usize::MAX), aliases, Some(&receive), &clock(), space(1 << 20), out);
        let unanswered = outbox.unanswered(Some(&receive));
        assert_eq!(filled.unanswered, !unanswered.is_empty());
        (filled.sent, filled.denied, unanswered.join(" "))
    };
    assert_eq!(fill(false), (1, 1, "open open/2".to_owned()));
    assert_eq!(fill(false), (0, 0, "open open/2".to_owned()));
    assert_eq!(fill(true), (3, 1, String::new()));
}

/// A session that outlives its connection, over a stream in memory.
struct Durable {
    outbox: Outbox,
    broker: Arc<MemoryStream>,
    /// What is durable of it.
    saved: StateEntries,
    identities: Arc<[Identity]>,
    given_up: u64,
}

const EPOCH: u64 = 7;

impl Durable {
    fn new() -> Self {
        let identities: Arc<[Identity]> =
            [Identity { log: Uuid::from_u128(1), generation: 1, partitions: 1 }].into();
        let mut outbox = Outbox::default();
        outbox.begin(Box::new([0]), Some(Kept::new(EPOCH, identities.clone())));
        outbox.resume();
        let broker = MemoryStream::with_manual_commit("broker", 1);
        let mut session = Self { outbox, broker, saved: Vec::new(), identities, given_up: 0 };
        session.note(0, 1 << 10);
        session.commit();
        session
    }

    fn commit(&mut self) {
        self.broker.commit();
        self.saved = self.broker.state(b"");
    }

    /// What the client gets now.
    fn fill(&mut self) -> Vec<u8> {
        let mut out = BytesMut::new();
        self.outbox.settle(&*self.broker);
        self.outbox.fill(peer(10, 1 << 20), &mut Aliases::new(0), None, &clock(), space(1 << 20), &mut out);
        self.given_up += self.outbox.record(&*self.broker, || (Box::new([0]), 1 << 10));
        out.to_vec()
    }

    fn note(&mut self, position: u64, bytes_max: usize) {
        let changes = self.outbox.note(&[position], bytes_max);
        self.broker.append(&[], &crate::listeners::mqtt::borrowed(&changes)).unwrap();
        self.outbox.noted();
    }

    /// The host is killed and comes back: what was durable is there.
    fn crash(&mut self) {
        self.crash_with(u64::MAX);
    }

    /// The same, with a stream that ends there; how many messages are lost.
    fn crash_with(&mut self, end: u64) -> usize {
        self.crash_on(end, end)
    }

    /// The same, with a stream that has other messages from `valid` on.
    fn crash_on(&mut self, end: u64, valid: u64) -> usize {
        self.broker = MemoryStream::with_manual_commit("broker", 1);
        for (key, value) in &self.saved {
            self.broker.append(&[], &[StateChange { key, value: Some(value) }]).unwrap();
        }
        self.broker.commit();
        let mut found = Found::default();
        for kind in [NOTE, STEP, SENT] {
            for (key, value) in self.broker.state(kind) {
                assert!(found.add(kind, &key[kind.len() + 8..], &value));
            }
        }
        let restored = found.restore(EPOCH, self.identities.clone(), &[end], &[valid], &|_, _| None);
        let lost = restored.lost;
        assert!(restored.from[0] <= valid, "it would miss what comes now");
        self.outbox.restore(restored);
        self.outbox.resume();
        lost
    }

    fn offsets(&self) -> Vec<u64> {
        let offset = |queued: &Queued| match queued.source {
            Source::Stream { offset, .. } => offset,
            _ => u64::MAX,
        };
        let inflight = self.outbox.inflight.iter().filter_map(|flight| flight.waiting.as_ref());
        inflight.chain(&self.outbox.queue).map(offset).collect()
    }
}

#[test]
fn what_a_session_noted_past_the_end_of_a_shortened_stream_is_left_out_and_counted() {
    let mut session = Durable::new();
    for (offset, qos) in [(3, 1), (4, 2), (5, 1), (6, 2), (7, 1)] {
        offer(&mut session.outbox, queued(offset, qos, None));
    }
    session.fill();
    session.note(8, 1 << 10);
    session.commit();
    assert_eq!(session.crash_with(5), 3);
    let mut left = session.offsets();
    left.sort_unstable();
    assert_eq!(left, [3, 4]);
}

#[test]
fn what_a_session_noted_of_lost_messages_is_never_taken_for_what_has_their_offsets_later() {
    let mut session = Durable::new();
    for (offset, qos) in [(3, 1), (4, 2), (5, 1), (6, 2), (7, 1)] {
        offer(&mut session.outbox, queued(offset, qos, None));
    }
    for _ in 0..3 {
        session.fill();
        session.commit();
    }
    assert_eq!(session.outbox.sizes(), (0, 0, 5), "all are sent");
    session.note(8, 1 << 10);
    session.commit();
    // The stream is longer than the notes say, with other messages from 5 on: 5, 6 and 7 are gone.
    assert_eq!(session.crash_on(20, 5), 3);
    assert_eq!((session.outbox.from(0), session.outbox.is_stale()), (5, true));
    session.outbox.renew(&*session.broker, &[0], 1 << 10).unwrap();
    session.commit();
    // Nothing was acknowledged since. What was written anew says all that a start needs.
    assert_eq!((session.crash_on(30, 30), session.outbox.is_stale()), (0, false));
    assert_eq!(session.outbox.from(0), 5);
    let mut left = session.offsets();
    left.sort_unstable();
    assert_eq!(left, [3, 4]);
    for (offset, qos) in [(5, 1), (6, 2), (7, 2)] {
        assert!(session.outbox.takes(&queued(offset, qos, None)), "{offset} is another message");
    }
    assert!(!session.outbox.takes(&queued(4, 2, None)));
    let steps = session.broker.state(STEP);
    assert_eq!(steps.len(), 2, "the packet id of 6 stays in use until its PUBREL is answered");
}

#[test]
fn a_qos_2_publish_and_its_pubrel_go_out_only_when_their_step_is_durable() {
    let mut session = Durable::new();
    offer(&mut session.outbox, queued(5, 2, None));
    assert_eq!(session.fill(), b"", "its packet id is not durable");
    assert!(session.outbox.waits(peer(10, 1 << 20)).durable.is_some());
    session.commit();
    assert_eq!(session.fill()[0], 0x34);
    assert!(session.outbox.waits(peer(10, 1 << 20)).is_none());
    assert_eq!(session.outbox.acked(wire::PUBREC, 1, 0), Acked::Nothing);
    assert_eq!(session.fill(), b"", "the release is not durable");
    assert_eq!(session.outbox.acked(wire::PUBREC, 1, 0), Acked::Nothing, "said twice");
    session.commit();
    assert_eq!(session.fill(), [0x62, 2, 0, 1]);
    session.crash();
    assert_eq!(session.fill(), [0x62, 2, 0, 1], "and again after a crash");
    session.outbox.acked(wire::PUBCOMP, 1, 0);
    session.fill();
    session.commit();
    session.crash();
    assert_eq!(session.fill(), b"");
    assert_eq!(offer(&mut session.outbox, queued(5, 2, None)), Offer::Before, "it had this one");
    assert_eq!(offer(&mut session.outbox, queued(5, 1, None)), Offer::QueuedFirst, "not so with QoS 1");
}

#[test]
fn a_message_sent_before_a_crash_comes_again_with_its_packet_id_and_dup() {
    let mut session = Durable::new();
    session.outbox.last_id = 40;
    offer(&mut session.outbox, queued(5, 2, None));
    session.fill();
    session.commit();
    let first = session.fill();
    session.crash();
    let wanted = session.outbox.waits(peer(10, 1 << 20)).load;
    assert_eq!(wanted, [Place { stream: 0, offset: 5 }]);
    let loaded = [(wanted[0], Some(body("5")))].into();
    assert_eq!(session.outbox.loaded(&loaded, |_| true), 0);
    let mut again = session.fill();
    assert_eq!(again[0], 0x3c, "PUBLISH, QoS 2, DUP");
    again[0] = 0x34;
    assert_eq!(again, first);
}

#[test]
fn a_note_that_is_too_long_leaves_the_rest_to_be_found_in_the_stream() {
    let mut session = Durable::new();
    session.outbox.disconnected();
    for offset in 0..10 {
        offer(&mut session.outbox, queued(offset * 3, 1, None));
    }
    session.note(100, 40);
    session.commit();
    session.crash();
    let listed = session.offsets();
    assert!(!listed.is_empty() && listed.len() < 10, "{listed:?}");
    assert_eq!(session.outbox.from(0), listed.len() as u64 * 3, "the first that is not listed");
}

#[test]
fn a_full_queue_drops_its_oldest_or_refuses_as_it_is_told() {
    let mut session = Durable::new();
    session.outbox.disconnected();
    for offset in 0..10 {
        offer(&mut session.outbox, queued(offset, 1, None));
    }
    assert_eq!(offer(&mut session.outbox, queued(10, 1, None)), Offer::QueuedInsteadOf(1, Full::Queue));
    let refuse = QueueLimits { when_full: WhenFull::Refuse, ..LIMITS };
    assert_eq!(session.outbox.offer(queued(11, 1, None), refuse, || None), Offer::Dropped(Full::Queue));
    let small = QueueLimits { bytes_max: 50, ..LIMITS };
    assert_eq!(session.outbox.offer(queued(12, 1, None), small, || None), Offer::Dropped(Full::Queue));
    assert_eq!(session.offsets(), (1..=10).collect::<Vec<_>>());
    assert_eq!(session.outbox.drop_older(5_000_000), 4);
    assert_eq!(session.offsets(), (5..=10).collect::<Vec<_>>());
    assert_eq!((session.outbox.take_lost(), session.outbox.take_lost()), (7, 0), "told once");
}

/// An outbox of a room, of a client that is away where it is `kept`, else of one that is connected.
fn within(room: &Arc<Room>, kept: bool) -> Outbox {
    let identity = Identity { log: Uuid::from_u128(1), generation: 1, partitions: 1 };
    let mut outbox = Outbox::within(room);
    outbox.begin(Box::new([0]), kept.then(|| Kept::new(EPOCH, [identity].into())));
    if !kept {
        outbox.resume();
    }
    outbox
}

const UNBOUNDED: QueueLimits = QueueLimits { messages_max: usize::MAX, bytes_max: usize::MAX, ..LIMITS };

#[test]
fn the_queues_of_all_share_their_memory_and_who_has_little_gets_its_part() {
    const REFUSE: QueueLimits = QueueLimits { when_full: WhenFull::Refuse, ..UNBOUNDED };
    let room = Room::new(256 << 10);
    let mut queues: Vec<Outbox> = (0..8).map(|_| within(&room, true)).collect();
    let fill = |outbox: &mut Outbox, limits| {
        let offered = (0..100_000).map(|offset| outbox.offer(queued(offset, 1, None), limits, || None));
        let last = offered.last().unwrap();
        (outbox.sizes().0, last)
    };
    let (first, last) = fill(&mut queues[0], REFUSE);
    assert!((2_000..=192 << 4).contains(&first), "three quarters, or a step of growth less: {first}");
    assert_eq!(last, Offer::Dropped(Full::Queues));
    let mut rest = Holding::of(&room);
    rest.hold((192 << 10) - room.taken() + crate::room::FREE_BYTES);
    for queue in &mut queues[1..] {
        // 4 KiB each, and what each has beside.
        let (count, last) = fill(queue, UNBOUNDED);
        assert!((64..=5 << 4).contains(&count), "{count}");
        assert_eq!(last, Offer::QueuedInsteadOf(1, Full::Queues), "its oldest goes");
        assert_eq!(queue.queue.back().unwrap().source.place().map(|it| it.offset), Some(99_999));
        assert_eq!(queue.take_lost(), 100_000 - count as u64);
    }
    assert!(room.taken() <= room.bytes_max());
    assert!(fill(&mut within(&room, true), UNBOUNDED).0 >= 16, "who comes late has a little");
    queues[0].clear();
    let more = fill(&mut queues[1], UNBOUNDED).0;
    assert!(more > 1_000, "what one gives back is there for the others: {more}");
    drop((queues, rest));
    assert_eq!(room.taken(), 0);
}

#[test]
fn a_queue_with_more_than_its_part_shrinks_with_each_message_while_others_find_no_room() {
    let room = Room::new(256 << 10);
    let mut large = within(&room, true);
    let offer = |outbox: &mut Outbox, offset| outbox.offer(queued(offset, 1, None), UNBOUNDED, || None);
    for offset in 0..3_000 {
        offer(&mut large, offset);
    }
    let before = large.sizes().0;
    let mut others: Vec<Outbox> = (0..7).map(|_| within(&room, true)).collect();
    for outbox in &mut others {
        for offset in 0..1_000 {
            offer(outbox, offset);
        }
    }
    let late = within(&room, true);
    let mut rest = Holding::of(&room);
    rest.hold(room.bytes_max() - room.taken() + crate::room::FREE_BYTES);
    for offset in 3_000..3_100 {
        assert_eq!(offer(&mut large, offset), Offer::QueuedInsteadOf(2, Full::Queues));
    }
    assert_eq!(large.sizes().0, before - 100);
    assert_eq!(large.queue.back().unwrap().source.place().map(|it| it.offset), Some(3_099));
    drop((late, rest));
    assert_eq!(offer(&mut large, 3_100), Offer::Queued, "nobody needs it now");
}

#[test]
fn without_memory_for_a_message_it_waits_in_its_stream_and_is_read_one_at_a_time() {
    let room = Room::new(64 << 10);
    let mut outbox = within(&room, false);
    let large = "x".repeat(20 << 10);
    let offer = |outbox: &mut Outbox, offset: u64| {
        let queued = Queued { len: large.len() as u32, ..queued(offset, 1, None) };
        outbox.offer(queued, UNBOUNDED, || Some(message(&large, b"")))
    };
    (0..5)
        .for_each(|offset| assert!(matches!(offer(&mut outbox, offset), Offer::Queued | Offer::QueuedFirst)));
    assert_eq!(outbox.queue.iter().filter(|queued| queued.body.is_some()).count(), 2, "of 48 KiB");
    let (mut sent, mut out) = (0, BytesMut::new());
    while outbox.sizes().0 > 0 {
        let fill = |outbox: &mut Outbox, out: &mut BytesMut| {
            let aliases = &mut Aliases::new(0);
            outbox.fill(peer(100, usize::MAX), aliases, None, &clock(), space(usize::MAX), out).sent
        };
        sent += fill(&mut outbox, &mut out);
        let places = outbox.waits(peer(100, usize::MAX)).load;
        assert!(places.len() <= 1 || room.taken() < 32 << 10, "no more than there is room for");
        let found = places.into_iter().map(|place| (place, Some(body(&large))));
        assert_eq!(outbox.loaded(&found.collect(), |_| true), 0);
        assert!(room.taken() <= room.bytes_max());
    }
    assert_eq!(sent, 5);
}

#[test]
fn of_small_messages_that_were_read_and_have_no_room_any_more_the_first_is_kept() {
    let room = Room::new(1 << 20);
    let mut outbox = within(&room, true);
    let small = "x".repeat(3 << 10);
    for offset in 0..4 {
        outbox.offer(queued(offset, 1, None), UNBOUNDED, || None);
    }
    outbox.resume();
    let places = outbox.waits(peer(10, usize::MAX)).load;
    assert_eq!(places.len(), 4);
    let mut other = Holding::of(&room);
    other.hold(1 << 20);
    let found = places.into_iter().map(|place| (place, Some(body(&small))));
    assert_eq!(outbox.loaded(&found.collect(), |_| true), 0);
    let held: Vec<bool> = outbox.queue.iter().map(|queued| queued.body.is_some()).collect();
    assert_eq!(held, [true, false, false, false]);
}

#[test]
fn what_waits_and_is_in_flight_is_counted_through_all_that_becomes_of_it() {
    let room = Room::new(1 << 30);
    let mut outbox = within(&room, true);
    outbox.resume();
    let check = |outbox: &Outbox| {
        let taken = outbox.size().saturating_sub(crate::room::FREE_BYTES);
        assert!(room.taken() >= taken && room.taken() <= taken + (2 << 10), "{} {taken}", room.taken());
        assert!(outbox.queue.capacity() <= 2 * outbox.queue.len() + SPARE_PLACES);
        assert!(outbox.inflight.capacity() <= 2 * outbox.inflight.len() + SPARE_PLACES);
    };
    for offset in 0..5_000 {
        offer_large(&mut outbox, offset);
        check(&outbox);
    }
    for _ in 0..5 {
        let out = &mut BytesMut::new();
        outbox.fill(peer(1_000, usize::MAX), &mut Aliases::new(0), None, &clock(), space(usize::MAX), out);
        check(&outbox);
        for id in outbox.ids.clone() {
            outbox.acked(wire::PUBACK, id, 0);
            check(&outbox);
        }
        let places = outbox.waits(peer(1_000, usize::MAX)).load;
        let found = places.into_iter().map(|place| (place, Some(body("x"))));
        outbox.loaded(&found.collect(), |_| true);
        check(&outbox);
    }
    outbox.drop_older(4_900_000_000);
    check(&outbox);
    outbox.disconnected();
    check(&outbox);
    outbox.forget(|_| true);
    check(&outbox);
    outbox.clear();
    assert_eq!(room.taken(), 0);
}

fn offer_large(outbox: &mut Outbox, offset: u64) {
    outbox.offer(queued(offset, 1, None), UNBOUNDED, || Some(message(&offset.to_string(), b"")));
}

#[test]
fn a_page_of_retained_messages_is_one_message_where_there_is_no_memory() {
    let room = Room::new(64 << 10);
    let page = |outbox: &mut Outbox| {
        let (filter, from) = (Filter::parse("t").unwrap(), RetainedFrom { since_us: 0, upto: Box::new([0]) });
        outbox.give_retained(&filter, Options::default(), from);
        outbox.wants_page().unwrap().messages_max()
    };
    assert_eq!(page(&mut within(&room, false)), 1);
    assert!(page(&mut within(&Room::new(1 << 20), false)) > 1);
}

#[test]
fn a_delivery_whose_record_is_too_large_ends_and_is_counted_and_the_others_go_on() {
    let mut session = Durable::new();
    let share = ["$share/g/", &"x".repeat(crate::stream::STATE_VALUE_BYTES_MAX)].concat();
    offer(&mut session.outbox, queued(5, 2, Some(&share)));
    assert_eq!((session.fill(), session.given_up), (vec![], 1));
    assert!(session.outbox.waits(peer(10, 1 << 20)).is_none(), "there is nothing to wait for");
    assert_eq!(session.outbox.sizes(), (0, 0, 0));
    offer(&mut session.outbox, queued(6, 2, None));
    session.fill();
    session.commit();
    assert_eq!(session.fill()[0], 0x34);
}

#[test]
fn a_session_waits_with_its_share_of_the_state_and_goes_on_once_its_client_acknowledges() {
    let mut session = Durable::new();
    let window = peer(u16::MAX, 1 << 20);
    let limits = QueueLimits { messages_max: usize::MAX, bytes_max: usize::MAX, ..LIMITS };
    let publish = |session: &mut Durable| {
        for offset in 0..20_000 {
            session.outbox.offer(queued(offset, 2, None), limits, || Some(message("x", b"")));
        }
    };
    publish(&mut session);
    let fill = |session: &mut Durable| loop {
        let before = session.outbox.sizes().2;
        let places = session.outbox.waits(window).load;
        let found = places.into_iter().map(|it| (it, Some(body("x"))));
        session.outbox.loaded(&found.collect(), |_| true);
        session.outbox.settle(&*session.broker);
        let out = &mut BytesMut::new();
        session.outbox.fill(window, &mut Aliases::new(0), None, &clock(), space(1 << 20), out);
        session.outbox.record(&*session.broker, || (Box::new([0]), 1 << 10));
        session.commit();
        if out.is_empty() && session.outbox.sizes().2 == before {
            return before;
        }
    };
    let in_flight = fill(&mut session);
    let steps = |session: &Durable| {
        session.broker.state(STEP).iter().map(|(key, value)| key.len() + value.len()).sum::<usize>()
    };
    assert!(steps(&session) < kept::SESSION_STEPS_BYTES_MAX + 100 && in_flight < 10_000, "{in_flight}");
    session.crash();
    publish(&mut session);
    assert_eq!(fill(&mut session), in_flight, "also after a restart");
    for packet_id in 1..=100 {
        session.outbox.acked(wire::PUBREC, packet_id, 0x83);
    }
    let refilled = fill(&mut session);
    // Records of later messages are a little longer.
    assert!((in_flight - 20..=in_flight).contains(&refilled), "{refilled}: as many as were done");
}

#[test]
fn identifiers_count_in_the_queue_and_are_not_kept_with_what_lies_in_its_stream() {
    let ids: Ids = (1..=100).collect();
    let with_ids = |offset| Queued { ids: ids.clone(), ..queued(offset, 1, None) };
    let mut outbox = Outbox { connected: true, ..Outbox::default() };
    offer(&mut outbox, with_ids(1));
    offer(&mut outbox, Queued { ids: (1..=100).collect(), ..queued(2, 1, None) });
    assert_eq!(outbox.sizes().1, 2 * (100 + 400));
    let [Ids::Many(one), Ids::Many(two)] = [0, 1].map(|at| outbox.queue[at].ids.clone()) else { panic!() };
    assert!(Arc::ptr_eq(&one, &two), "they share them");
    let mut session = Durable::new();
    offer(&mut session.outbox, with_ids(1));
    session.outbox.disconnected();
    offer(&mut session.outbox, with_ids(2));
    assert_eq!(session.outbox.sizes().1, 200, "references");
    session.outbox.resume();
    let places = session.outbox.waits(peer(10, 1 << 20)).load;
    let found = places.into_iter().map(|it| (it, Some(Body { ids: ids.clone(), ..body("x") })));
    session.outbox.loaded(&found.collect(), |_| true);
    assert_eq!(session.outbox.sizes().1, 2 * (100 + 400), "read again, they have them again");
}

#[test]
fn what_a_new_subscription_is_given_counts_in_no_bound_and_does_not_age() {
    let mut outbox = Outbox { connected: true, ..Outbox::default() };
    let filter = Filter::parse("t").unwrap();
    let messages = || (0..30).map(|_| Message::new("t", b"x", &[], 0, 0)).collect();
    outbox.give_whole(&filter, Options::default(), 0, messages());
    assert_eq!(outbox.drop_older(u64::MAX), 0);
    for offset in 0..10 {
        assert_ne!(offer(&mut outbox, queued(offset, 0, None)), Offer::Dropped(Full::Queue));
    }
    let filled = outbox.fill(
        peer(10, 1 << 20),
        &mut Aliases::new(0),
        None,
        &clock(),
        space(1 << 20),
        &mut BytesMut::new(),
    );
    assert_eq!(filled.sent, 40);
    outbox.give_whole(&filter, Options::default(), 0, messages());
    outbox.end_retained("t");
    assert_eq!(outbox.sizes().0, 0, "unsubscribed");
}

/// As 0.1.0 wrote them: a retained message by its topic, and with all identifiers.
#[test]
fn the_records_of_0_1_0_are_read() {
    let identity = Identity { log: Uuid::from_u128(1), generation: 1, partitions: 1 };
    let stream = [&identity.log.as_bytes()[..], &1_u32.to_be_bytes()].concat();
    // QoS 1, identifiers, at offset 7 after 3 seconds, 100 bytes; then QoS 1, retained, "a/b" of 300 microseconds.
    let entries =
        [&[1 | 1 << 5, 0, 14, 6, 100, 2, 8, 9][..], &[1 | 1 << 3 | 1 << 7, 3], b"a/b", &[0xac, 2, 100]];
    let note = [&[1, 1][..], &stream, &[50], &entries.concat()].concat();
    let step = [&[1, 4][..], &stream, &[2, 0, 18, 6, 100]].concat();
    let mut found = Found::default();
    assert!(found.add(NOTE, b"", &note) && found.add(STEP, &[0, 5], &step));
    let message = Arc::new(Message::new("a/b", b"x", &[], 1, 300));
    let retained = |id: &crate::listeners::mqtt::blobs::Id, received_us| {
        let is_it = *id == crate::listeners::mqtt::retained::id("a/b") && received_us == 300;
        is_it.then(|| message.clone())
    };
    let restored = found.restore(EPOCH, [identity].into(), &[100], &[100], &retained);
    assert_eq!(&*restored.from, [50]);
    assert_eq!(restored.queue[0].source.place(), Some(Place { stream: 0, offset: 7 }));
    assert!(matches!(&restored.queue[1].source, Source::Retained(it) if Arc::ptr_eq(it, &message)));
    let flight = &restored.inflight[0];
    let place = flight.waiting.as_ref().and_then(Queued::place);
    assert_eq!((flight.packet_id, place), (5, Some(Place { stream: 0, offset: 9 })));
}

#[derive(Clone, Debug)]
enum Do {
    Publish(u8),
    Fill,
    Commit,
    /// Acknowledges the oldest packet that the client has open.
    Ack,
    Note(usize),
    Reconnect,
    Crash,
}

fn steps() -> impl Strategy<Value = Vec<Do>> {
    let one = prop_oneof![
        4 => (1..=2_u8).prop_map(Do::Publish),
        4 => Just(Do::Fill),
        3 => Just(Do::Commit),
        4 => Just(Do::Ack),
        1 => (1..200_usize).prop_map(Do::Note),
        1 => Just(Do::Reconnect),
        1 => Just(Do::Crash),
    ];
    prop::collection::vec(one, 1..120)
}

/// A client that follows the protocol, and what it was given.
#[derive(Default)]
struct Client {
    /// Packets it has not answered: first byte, packet id.
    open: VecDeque<(u8, u16)>,
    /// QoS 2 ids that were not released.
    held: HashSet<u16>,
    given: Vec<(u64, u8)>,
}

impl Client {
    fn take(&mut self, mut packets: &[u8]) {
        while let [first, len, rest @ ..] = packets {
            let (body, rest) = rest.split_at(usize::from(*len));
            packets = rest;
            let id = |at: usize| u16::from_be_bytes([body[at], body[at + 1]]);
            if *first == wire::PUBREL {
                self.held.remove(&id(0));
                self.open.push_back((wire::PUBCOMP, id(0)));
                continue;
            }
            // Topic "t", packet id, no properties, the offset as text.
            let offset: u64 = std::str::from_utf8(&body[6..]).unwrap().parse().unwrap();
            let (qos, id) = (first >> 1 & 3, id(3));
            if qos == 1 || self.held.insert(id) {
                self.given.push((offset, qos));
            }
            self.open.push_back((if qos == 1 { wire::PUBACK } else { wire::PUBREC }, id));
        }
    }
}

proptest! {
    /// However connection and host end: no message is lost, one of QoS 2 comes
    /// once, and those of one QoS come in order, repeats aside.
    #[test]
    fn a_session_loses_nothing_and_gives_qos_2_once(steps in steps()) {
        let mut session = Durable::new();
        let mut client = Client::default();
        // What the stream holds, and how far the live delivery is.
        let mut stream: Vec<u8> = Vec::new();
        let limits = QueueLimits { messages_max: 1_000, ..LIMITS };
        let deliver = |session: &mut Durable, stream: &[u8], from: u64| {
            for (offset, qos) in stream.iter().enumerate().skip(from as usize) {
                let body = || Some(message(&offset.to_string(), b""));
                session.outbox.offer(queued(offset as u64, *qos, None), limits, body);
            }
        };
        let load = |session: &mut Durable| {
            let places = session.outbox.waits(peer(10, 1 << 20)).load;
            let loaded = places.into_iter().map(|it| (it, Some(body(&it.offset.to_string()))));
            session.outbox.loaded(&loaded.collect(), |_| true);
        };
        for step in steps.into_iter().chain([Do::Crash]) {
            match step {
                Do::Publish(qos) => {
                    stream.push(qos);
                    deliver(&mut session, &stream, stream.len() as u64 - 1);
                }
                Do::Fill => {
                    load(&mut session);
                    client.take(&session.fill());
                }
                Do::Commit => session.commit(),
                Do::Ack => {
                    if let Some((first, id)) = client.open.pop_front() {
                        session.outbox.acked(first, id, 0);
                    }
                }
                Do::Note(bytes_max) => session.note(stream.len() as u64, bytes_max),
                Do::Reconnect => {
                    client.open.clear();
                    session.outbox.disconnected();
                    session.outbox.resume();
                }
                Do::Crash => {
                    client.open.clear();
                    session.crash();
                    let from = session.outbox.from(0).min(stream.len() as u64);
                    deliver(&mut session, &stream, from);
                }
            }
        }
        for _ in 0..2 * stream.len() + 2 {
            load(&mut session);
            client.take(&session.fill());
            session.commit();
            while let Some((first, id)) = client.open.pop_front() {
                session.outbox.acked(first, id, 0);
            }
        }
        for qos in [1, 2] {
            let mut firsts: Vec<u64> = Vec::new();
            for (offset, _) in client.given.iter().filter(|(_, of)| *of == qos) {
                let again = firsts.contains(offset);
                prop_assert!(qos == 1 || !again, "{offset} twice");
                if !again {
                    firsts.push(*offset);
                }
            }
            let sent = stream.iter().enumerate().filter(|(_, of)| **of == qos).map(|(at, _)| at as u64);
            prop_assert_eq!(firsts, sent.collect::<Vec<_>>(), "QoS {}", qos);
        }
        prop_assert_eq!(session.outbox.sizes(), (0, 0, 0));
    }
}

#[test]
fn a_note_made_while_a_member_passes_messages_on_lists_them_until_the_others_have_noted_them() {
    // With room for all entries, and for few.
    for bytes_max in [1 << 10, 24] {
        let mut session = Durable::new();
        for offset in 1..=9 {
            let share = (offset % 3 > 0).then_some("$share/g/t");
            offer(&mut session.outbox, queued(offset, 1, share));
        }
        let given = session.outbox.give_back(|_| true, false, 4);
        assert_eq!(given.len(), 4);
        // A crash before the notes of those who have them now: each is listed, or comes again from the stream.
        session.note(10, bytes_max);
        session.commit();
        let (saved, outbox) = (session.saved.clone(), std::mem::take(&mut session.outbox));
        session.crash();
        let from = session.outbox.from(0);
        let listed = session.offsets();
        for offset in 1..=9 {
            assert!(listed.contains(&offset) || offset >= from, "{offset} is lost: {listed:?}, {from}");
        }
        (session.saved, session.outbox) = (saved, outbox);
        session.outbox.passed_on();
        session.note(10, 1 << 10);
        session.commit();
        session.crash();
        assert_eq!(session.offsets(), [3, 6, 7, 8, 9]);
    }
}

/// Most clients subscribe once, and then wait for months.
#[test]
fn a_subscription_takes_no_memory_for_retained_messages_once_all_are_delivered_and_recorded() {
    let mut session = Durable::new();
    let (filter, from) = (Filter::parse("t/#").unwrap(), RetainedFrom { since_us: 0, upto: Box::new([0]) });
    session.outbox.give_retained(&filter, Options::default(), from);
    let mut page = session.outbox.wants_page().unwrap();
    page.look(&Retained::default(), "client", &clock(), usize::MAX);
    session.outbox.retained_found(page, &Retained::default());
    assert!(session.outbox.retained.is_some(), "its record says that they are still to be delivered");
    assert!(!session.outbox.note(&[0], usize::MAX).is_empty());
    session.outbox.noted();
    assert!(session.outbox.retained.is_none());
    assert_eq!(session.outbox.last_retained(), 1, "numbers go on");
}
