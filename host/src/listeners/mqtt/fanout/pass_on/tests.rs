//! Members of one share that come and go.

use futures_util::FutureExt;

use super::*;
use crate::batch::{Offset, Partition};
use crate::listeners::mqtt::config::Config;
use crate::listeners::mqtt::fanout::{SendRetained, Subscription};
use crate::listeners::mqtt::fuzzing::broker;
use crate::listeners::mqtt::session::Turn;
use crate::listeners::mqtt::subscriptions::{Filter, Options};
use crate::stream::memory::MemoryStream;
use crate::stream::{NewMessage, Read, Stream};

pub(in super::super) const SHARE: &str = "$share/g/a";

#[derive(Clone)]
pub(in super::super) struct World {
    pub broker: Arc<Broker>,
    pub stream: Arc<MemoryStream>,
    pub store: Arc<MemoryStream>,
}

pub(in super::super) struct Member {
    pub session: Arc<Session>,
    pub turn: Turn,
}

impl World {
    pub fn new() -> Self {
        let (stream, store) = (MemoryStream::with_hooks("s", 1), MemoryStream::with_hooks("broker", 1));
        Self { broker: broker(&Config::default(), stream.clone(), store.clone()), stream, store }
    }

    /// A member whose client is away.
    pub async fn member(&self, client_id: &str) -> Member {
        self.member_for(client_id, 600).await
    }

    /// A member whose session outlives its connection by `expiry_s`. It resumes its session if it has one.
    pub async fn member_for(&self, client_id: &str, expiry_s: u32) -> Member {
        let sessions = &self.broker.sessions;
        let (session, turn) = sessions.claim(client_id, usize::MAX).await.unwrap();
        sessions.open(&self.broker, &session, Default::default(), false, expiry_s).await.unwrap();
        self.subscribe(&session, 1);
        Member { session, turn }
    }

    /// Subscribes to the share, as a connection does before it answers.
    pub fn subscribe(&self, session: &Arc<Session>, qos: u8) {
        self.subscribe_to(session, SHARE, qos);
    }

    pub fn subscribe_to(&self, session: &Arc<Session>, filter: &str, qos: u8) {
        let options = Options { qos, no_local: false, retain_as_published: false, id: 0 };
        let filter = Filter::parse(filter).unwrap();
        let plain = Subscription { filter, options, retained: SendRetained::Never };
        self.broker.live.subscribe(&self.broker, session, &[plain]);
        session.note(&self.broker, Vec::new());
    }

    /// One whose client is there.
    pub async fn connected(&self, client_id: &str) -> Member {
        let member = self.member(client_id).await;
        self.broker.live.resume(&member.session);
        member
    }

    /// Publishes with QoS 1 and delivers.
    pub async fn publish(&self, count: usize) {
        self.publish_with(count, &[1]).await;
    }

    /// Publishes and delivers, with these QoS in turn.
    pub async fn publish_with(&self, count: usize, qos: &[u8]) {
        self.publish_to("a", count, qos).await;
    }

    pub async fn publish_to(&self, topic: &str, count: usize, qos: &[u8]) {
        let message = |qos: &u8| NewMessage {
            topic,
            payload: b"x",
            properties: b"",
            route: "",
            device: "",
            partition: Partition(0),
            flags: (*qos).into(),
            received_us: crate::listeners::mqtt::now_us(),
            event_us: 0,
        };
        let messages: Vec<_> = qos.iter().cycle().take(count).map(message).collect();
        let appended = self.stream.append(&messages, &[]).unwrap();
        let mut cursor = self.stream.cursor(appended.first);
        let end = Offset(appended.first.0 + count as u64);
        while cursor.position() < end {
            let Read::Batch(batch) = cursor.next().await.unwrap() else { panic!("a gap") };
            let (mut next, mut wakes) = (0, Wakes::new(&self.broker));
            while next < batch.len() {
                next = self.broker.live.deliver_some(&self.broker, 0, 0, &batch, next, &mut wakes);
            }
        }
    }

    pub async fn close(&self, member: Member) -> Arc<Session> {
        self.broker
            .sessions
            .close(&self.broker, &member.session, member.turn, None, self.broker.clock.now_us())
            .await;
        member.session
    }
}

fn waiting(session: &Session) -> usize {
    session.outbox().sizes().0
}

#[tokio::test]
async fn a_message_goes_to_a_member_that_keeps_it_rather_than_to_one_that_would_lose_it() {
    let world = World::new();
    let (one, two) = (world.member("one").await.session, world.member("two").await.session);
    world.subscribe(&one, 0);
    world.publish(10).await;
    assert_eq!((waiting(&one), waiting(&two)), (0, 10), "the client of the one is away, and takes QoS 0");
    // Its client is there, and reads too slowly; the other's is away.
    let slow = world.member_for("slow", 0).await.session;
    world.broker.live.resume(&slow);
    let room = world.broker.config().queue_messages_max as usize;
    world.publish(room + 10).await;
    assert_eq!((waiting(&slow), waiting(&two)), (room, 20));
}

#[tokio::test]
async fn a_member_whose_queue_is_full_loses_nothing_while_another_has_room() {
    let world = World::new();
    let room = world.broker.config().queue_messages_max as usize;
    let one = world.member("one").await.session;
    world.publish(room).await;
    let two = world.member("two").await.session;
    world.publish(10).await;
    assert_eq!((waiting(&one), waiting(&two)), (room, 10));
}

#[tokio::test]
async fn a_member_that_leaves_passes_its_messages_on_in_parts_and_holds_up_nobody_between_them() {
    let world = World::new();
    let one = world.connected("one").await;
    world.publish(4 * PASSED_ON_AT_ONCE).await;
    let two = world.connected("two").await;
    let all = 4 * PASSED_ON_AT_ONCE;
    assert_eq!((waiting(&one.session), waiting(&two.session)), (all, 0));
    let session = one.session.clone();
    let mut closing = std::pin::pin!(world.close(one));
    for parts in 1..4 {
        assert!((&mut closing).now_or_never().is_none(), "after {parts} parts it is the turn of others");
        assert_eq!(waiting(&two.session), parts * PASSED_ON_AT_ONCE);
        assert!(world.broker.live.index.try_write().is_ok() && world.broker.live.passed.try_write().is_ok());
    }
    closing.await;
    assert_eq!((waiting(&session), waiting(&two.session)), (0, all));
}

#[tokio::test]
async fn what_a_member_holds_stays_where_no_other_is_there_and_moves_once_its_session_ends() {
    let world = World::new();
    let one = world.connected("one").await;
    world.publish(10).await;
    let two = world.member("two").await.session;
    let one = world.close(one).await;
    assert_eq!((waiting(&one), waiting(&two)), (10, 0));
    assert!(world.broker.sessions.delete(&world.broker, "one").await);
    assert_eq!(waiting(&two), 10);
}

#[tokio::test]
async fn members_that_leave_together_give_each_other_nothing() {
    let world = World::new();
    let mut members = Vec::new();
    for number in 0..5 {
        members.push(world.connected(&format!("m{number}")).await);
    }
    world.publish(50).await;
    // As each connection does when it ends.
    members.iter().for_each(|member| member.session.outbox().disconnected());
    let before: Vec<usize> = members.iter().map(|member| waiting(&member.session)).collect();
    let mut after = Vec::new();
    for member in members {
        let session = world.close(member).await;
        after.push(waiting(&session));
    }
    assert_eq!((before, after), (vec![10; 5], vec![10; 5]));
}

#[tokio::test]
async fn a_share_without_a_connected_member_is_not_walked_until_a_client_connects() {
    let world = World::new();
    let (one, two) = (world.member("one").await.session, world.member("two").await.session);
    world.publish(2).await;
    assert_eq!(waiting(&one) + waiting(&two), 2);
    let is_deserted = || {
        let index = world.broker.live.index.read().unwrap();
        index.tree.share(SHARE).unwrap().is_deserted(world.broker.live.arrivals.load(Ordering::Acquire))
    };
    assert!(is_deserted());
    let away = waiting(&one);
    world.broker.live.resume(&two);
    assert!(!is_deserted());
    world.publish(6).await;
    assert_eq!((waiting(&one), waiting(&two)), (away, 8 - away), "all for the one that is there");
    two.outbox().disconnected();
    world.publish(2).await;
    let three = world.connected("three").await.session;
    assert!(!is_deserted(), "a client that subscribes is there");
    world.publish(3).await;
    assert_eq!(waiting(&three), 3);
}

#[tokio::test]
async fn a_crash_while_a_member_passes_messages_on_loses_none() {
    let world = World::new();
    let one = world.connected("one").await;
    world.publish(2 * PASSED_ON_AT_ONCE).await;
    let two = world.connected("two").await;
    {
        let mut closing = std::pin::pin!(world.close(one));
        assert!((&mut closing).now_or_never().is_none(), "half of them have moved");
        // House-keeping notes where all stand.
        for session in world.broker.sessions.all().iter().filter(|session| &*session.client_id == "one") {
            session.note(&world.broker, Vec::new());
        }
    }
    drop(two);
    let again = broker(&Config::default(), world.stream.clone(), world.store.clone());
    let mut left = BTreeSet::new();
    for session in again.sessions.all() {
        session.outbox().references(|place, _| _ = left.insert(place.offset));
        let from = session.outbox().from(0);
        left.extend(from..world.stream.bounds().end.0);
    }
    assert_eq!(left.len(), 2 * PASSED_ON_AT_ONCE);
}

#[tokio::test]
async fn a_crash_after_a_member_passed_on_more_than_a_note_lists_loses_none() {
    let world = World::new();
    let one = world.connected("one").await;
    let count = 4_000;
    world.publish(count).await;
    let two = world.connected("two").await.session;
    let one = world.close(one).await;
    assert_eq!((waiting(&one), waiting(&two)), (0, count));
    let again = broker(&Config::default(), world.stream.clone(), world.store.clone());
    crate::listeners::mqtt::fanout::catch_up(again.clone(), 0).await;
    let mut left = Vec::new();
    for session in again.sessions.all() {
        session.outbox().references(|place, _| left.push(place.offset));
    }
    left.sort_unstable();
    assert_eq!(left, (0..count as u64).collect::<Vec<_>>());
}
