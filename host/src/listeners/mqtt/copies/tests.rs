//! The copies alone: looks at sessions while messages move from one to another.

use futures_util::FutureExt;

use super::*;
use crate::listeners::mqtt::config::Config;
use crate::listeners::mqtt::fanout::{SendRetained, Subscription, Wakes};
use crate::listeners::mqtt::fuzzing::broker;
use crate::listeners::mqtt::session::{Session, Turn};
use crate::listeners::mqtt::subscriptions::{Filter, Options};
use crate::stream::memory::MemoryStream;

const SHARE: &str = "$share/g/a";
const OPTIONS: Options = Options { qos: 1, no_local: false, retain_as_published: false, id: 0 };

fn plain(filter: Filter) -> Subscription {
    Subscription { filter, options: OPTIONS, retained: SendRetained::Never }
}

struct World {
    broker: Arc<Broker>,
    stream: Arc<MemoryStream>,
}

/// A client of the share, which is there or away.
struct Member {
    session: Arc<Session>,
    turn: Turn,
}

impl World {
    fn new() -> Self {
        let stream = MemoryStream::with_hooks("s", 1);
        let broker = broker(&Config::default(), stream.clone(), MemoryStream::new("broker", 1));
        Self { broker, stream }
    }

    fn member(&self, client_id: &str, expiry_s: u32) -> Member {
        let sessions = &self.broker.sessions;
        let (session, turn) = now(sessions.claim(client_id, 9)).unwrap();
        now(sessions.open(&self.broker, &session, Default::default(), false, expiry_s)).unwrap();
        self.join(&session);
        Member { session, turn }
    }

    fn join(&self, session: &Arc<Session>) {
        let filter = Filter::parse(SHARE).unwrap();
        self.broker.live.subscribe(&self.broker, session, &[plain(filter)]);
    }

    fn leave(&self, member: &Member) {
        now(self.broker.live.unsubscribe(&self.broker, &member.session, SHARE));
    }

    /// Publishes and delivers, one message to each topic.
    async fn publish(&self, topics: &[&str]) {
        let messages: Vec<_> = topics.iter().map(|topic| message(topic, b"")).collect();
        let batch = self.append(&messages).await;
        assert_eq!(
            self.broker.live.deliver_some(&self.broker, 0, 0, &batch, 0, &mut Wakes::new(&self.broker)),
            topics.len()
        );
    }

    async fn append(&self, messages: &[NewMessage<'_>]) -> Batch {
        let appended = self.stream.append(messages, &[]).unwrap();
        let Read::Batch(batch) = self.stream.cursor(appended.first).next().await.unwrap() else { panic!() };
        batch
    }
}

fn message<'a>(topic: &'a str, payload: &'a [u8]) -> NewMessage<'a> {
    NewMessage {
        topic,
        payload,
        properties: b"",
        route: "",
        device: "",
        partition: Partition(0),
        flags: 1,
        received_us: crate::listeners::mqtt::now_us(),
        event_us: 0,
    }
}

fn now<T>(ready: impl Future<Output = T>) -> T {
    tokio::task::unconstrained(ready).now_or_never().expect("there is nothing to wait for")
}

fn waits(session: &Session) -> Vec<Place> {
    let mut places = Vec::new();
    session.outbox().references(|place, _| places.push(place));
    places
}

/// What the members of a share do, all at once, between two sessions that are looked at.
const MOVES: [fn(&World, [Member; 3]); 5] = [
    |world, [first, ..]| world.leave(&first),
    |world, [first, ..]| {
        now(world.broker.sessions.close(
            &world.broker,
            &first.session,
            first.turn,
            None,
            world.broker.clock.now_us(),
        ));
    },
    |world, [first, ..]| {
        now(world.broker.sessions.close(
            &world.broker,
            &first.session,
            first.turn,
            Some(0),
            world.broker.clock.now_us(),
        ));
    },
    // Out, back in, and what it held comes back to it.
    |world, [first, second, third]| {
        world.leave(&first);
        world.join(&first.session);
        world.leave(&second);
        world.leave(&third);
    },
    // All of it to one who was not there when the look began.
    |world, [first, second, third]| {
        world.member("new", 600);
        [first, second, third].iter().for_each(|member| world.leave(member));
    },
];

#[tokio::test]
async fn a_look_sees_what_moves_between_the_members_of_a_share_meanwhile() {
    // Which session comes first is another each time.
    for round in 0..20 {
        for (number, moves) in MOVES.into_iter().enumerate() {
            let world = World::new();
            let members = ["first", "second", "third"].map(|client_id| world.member(client_id, 600));
            for member in &members {
                let own = Filter::parse(&format!("own/{}", member.session.client_id)).unwrap();
                world.broker.live.subscribe(&world.broker, &member.session, &[plain(own)]);
            }
            // All for the one that is there.
            members[0].session.outbox().resume();
            world.publish(&["a"; 6]).await;
            world.publish(&["own/first", "own/second", "own/third"]).await;
            assert_eq!(waits(&members[0].session).len(), 7);
            let (mut seen, mut calls, mut members) = (BTreeSet::new(), 0, Some(members));
            look(&world.broker, |places| {
                seen.extend(places.iter().map(|(place, _)| place.offset));
                if calls == round % 3 {
                    moves(&world, members.take().unwrap());
                }
                calls += 1;
            });
            assert!((0..6).all(|offset| seen.contains(&offset)), "moves {number}: {seen:?}");
            let all: usize = world.broker.sessions.all().iter().map(|session| waits(session).len()).sum();
            assert!(all >= 6, "moves {number}: {all} wait");
        }
    }
}

#[tokio::test]
async fn what_members_hand_on_between_two_steps_of_retention_has_its_copy() {
    let world = World::new();
    let members = ["first", "second", "third"].map(|client_id| world.member(client_id, 600));
    members[0].session.outbox().resume();
    for round in 0..6 {
        world.publish(&["a"; 4]).await;
        let Range { start, end } = world.stream.bounds();
        save(&world.broker, 0, start.0..end.0).await.unwrap();
        world.stream.trim(end);
        let member = &members[round % 3];
        world.leave(member);
        world.join(&member.session);
    }
    let waiting: Vec<Place> = members.iter().flat_map(|member| waits(&member.session)).collect();
    assert_eq!(waiting.iter().map(|place| place.offset).collect::<BTreeSet<_>>(), (0..24).collect());
    assert_eq!(waiting.len(), 24, "each for one of them");
    assert!(waiting.iter().all(|place| world.broker.copies.find(*place).is_some()));
    assert_eq!(world.broker.copies.sizes().0, 24);
}

#[tokio::test]
async fn what_a_member_holds_whose_session_ends_with_its_connection_is_copied_for_the_others() {
    let world = World::new();
    let (first, second) = (world.member("first", 0), world.member("second", 600));
    first.session.outbox().resume();
    world.publish(&["a"; 3]).await;
    save(&world.broker, 0, 0..3).await.unwrap();
    world.stream.trim(Offset(3));
    now(world.broker.sessions.close(
        &world.broker,
        &first.session,
        first.turn,
        None,
        world.broker.clock.now_us(),
    ));
    let waiting = waits(&second.session);
    assert_eq!(waiting.len(), 3);
    assert!(waiting.iter().all(|place| world.broker.copies.find(*place).is_some()));
}

#[tokio::test]
async fn copies_are_read_by_pages_of_a_bounded_size_and_each_is_in_one() {
    let world = World::new();
    let copies = &world.broker.copies;
    let payload = vec![7; REPLAY_BYTES as usize / 3];
    for offset in 0..5 {
        let batch = world.append(&[message("a", &payload)]).await;
        copies.append(&mut vec![(Place { stream: 0, offset }, (batch, 0))], None).await.unwrap();
    }
    let (mut offsets, mut from) = (Vec::new(), 0);
    while from < 9 {
        let page = copies.page(0, from..9).await.unwrap();
        offsets.push(page.found.iter().map(|(offset, _)| *offset).collect::<Vec<_>>());
        from = page.next;
    }
    assert_eq!(offsets, [vec![0, 1], vec![2, 3], vec![4]]);
}
