//! Members of one share, some of which end with their connections, and a host that is killed.

use std::collections::BTreeSet;

use bytes::BytesMut;
use futures_util::FutureExt;
use proptest::prelude::*;

use super::super::pass_on::tests::{Member, SHARE, World};
use super::*;
use crate::listeners::mqtt::aliases::Aliases;
use crate::listeners::mqtt::config::Config;
use crate::listeners::mqtt::fanout::catch_up;
use crate::listeners::mqtt::fuzzing::broker;
use crate::listeners::mqtt::outbound::{Peer, Space};
use crate::listeners::mqtt::wire::{PUBACK, Version};
use crate::stream::Stream;

type Offsets = BTreeSet<u64>;

fn held(session: &Session) -> Offsets {
    let mut offsets = Offsets::new();
    session.outbox().references(|place, _| _ = offsets.insert(place.offset));
    offsets
}

/// Sends what may be sent.
fn send(world: &World, session: &Session) {
    let peer = Peer { version: Version::V5, window: 10, packet_bytes_max: 1 << 20 };
    let (mut aliases, mut out) = (Aliases::new(0), BytesMut::new());
    let space = Space { bytes_max: 1 << 20, has_room: &|_| true };
    session.outbox().fill(peer, &mut aliases, None, &world.broker.clock, space, &mut out);
}

/// What the sessions have that a host finds which starts where this one is killed, once they have
/// caught up; each time.
async fn after_a_crash(world: &World) -> Vec<u64> {
    let again = broker(&Config::default(), world.stream.clone(), world.store.clone());
    catch_up(again.clone(), 0).await;
    let mut found = Vec::new();
    for session in again.sessions.all() {
        session.outbox().references(|place, _| found.push(place.offset));
    }
    found.sort_unstable();
    found
}

#[tokio::test]
async fn what_a_member_without_a_kept_session_holds_goes_to_one_that_is_kept_after_a_crash() {
    let world = World::new();
    let kept = [world.connected("a").await, world.connected("b").await];
    let unkept = world.member_for("c", 0).await;
    world.broker.live.resume(&unkept.session);
    for count in [90, 9_000] {
        let first = world.stream.bounds().end.0;
        world.publish(count).await;
        send(&world, &unkept.session);
        // House-keeping notes where they stand.
        kept.iter().for_each(|member| member.session.note(&world.broker, Vec::new()));
        let found = after_a_crash(&world).await;
        let all: Offsets = (0..first + count as u64).collect();
        assert!(count > 90 || found.len() == all.len(), "each once, as far as a note has room");
        assert_eq!(found.into_iter().collect::<Offsets>(), all);
    }
}

#[tokio::test]
async fn a_crash_while_the_member_that_notes_for_others_leaves_loses_nothing() {
    for is_deleted in [false, true] {
        let world = World::new();
        let Member { session: first, turn } = world.connected("a").await;
        let (second, unkept) = (world.connected("b").await, world.member_for("c", 0).await);
        world.broker.live.resume(&unkept.session);
        // More than moves in one go.
        world.publish(900).await;
        let note_all =
            || world.broker.sessions.all().iter().for_each(|it| it.note(&world.broker, Vec::new()));
        note_all();
        let all: Offsets = (0..900).collect();
        let mut leaving = if is_deleted {
            drop(turn);
            async { _ = world.broker.sessions.delete(&world.broker, "a").await }.boxed_local()
        } else {
            async { _ = world.broker.live.unsubscribe(&world.broker, &first, SHARE).await }.boxed_local()
        };
        while (&mut leaving).now_or_never().is_none() {
            first.note(&world.broker, Vec::new());
            assert_eq!(after_a_crash(&world).await.into_iter().collect::<Offsets>(), all);
        }
        drop(leaving);
        note_all();
        assert_eq!(after_a_crash(&world).await, all.iter().copied().collect::<Vec<_>>(), "each once");
        drop(second);
    }
}

#[tokio::test]
async fn a_member_that_is_there_notes_for_others_instead_of_one_that_is_away() {
    let world = World::new();
    let (away, unkept) = (world.connected("away").await, world.member_for("c", 0).await);
    world.broker.live.resume(&unkept.session);
    world.publish(10).await;
    let away = world.close(away).await;
    let there = world.connected("there").await.session;
    for session in [&there, &away] {
        session.note(&world.broker, Vec::new());
    }
    let again = broker(&Config::default(), world.stream.clone(), world.store.clone());
    let waiting = |client_id: &str| held(&again.sessions.get(client_id).unwrap()).len();
    assert_eq!((waiting("there"), waiting("away")), (10, 0));
}

#[derive(Clone, Debug)]
enum Do {
    /// A member whose session is kept, or not.
    Join(bool),
    Leave(usize),
    Come(usize),
    End(usize),
    Unsubscribe(usize),
    /// It comes back with a session that ends with its connection.
    KeepNoMore(usize),
    /// It subscribes once more, with this QoS.
    Subscribe(usize, u8),
    Publish(usize),
    Acknowledge(usize, u16),
    Note(usize),
}

fn steps() -> impl Strategy<Value = Do> {
    prop_oneof![
        2 => any::<bool>().prop_map(Do::Join),
        2 => (0..9_usize).prop_map(Do::Leave),
        2 => (0..9_usize).prop_map(Do::Come),
        1 => (0..9_usize).prop_map(Do::End),
        1 => (0..9_usize).prop_map(Do::Unsubscribe),
        1 => (0..9_usize).prop_map(Do::KeepNoMore),
        1 => (0..9_usize, 0..2_u8).prop_map(|(member, qos)| Do::Subscribe(member, qos)),
        4 => (1..30_usize).prop_map(Do::Publish),
        4 => (0..9_usize, 1..20_u16).prop_map(|(member, id)| Do::Acknowledge(member, id)),
        4 => (0..9_usize).prop_map(Do::Note),
    ]
}

/// Number of the member that stays in the share, so that there is somebody to give messages to.
const STAYS: usize = 1;

struct Run {
    world: World,
    /// Beside each the member where its client is there.
    members: Vec<(Arc<Session>, Option<Member>)>,
}

impl Run {
    async fn join(&mut self, is_kept: bool) {
        let expiry_s = if is_kept { 600 } else { 0 };
        let member = self.world.member_for(&format!("m{}", self.members.len()), expiry_s).await;
        self.world.broker.live.resume(&member.session);
        self.members.push((member.session.clone(), Some(member)));
    }

    async fn leave(&mut self, at: usize) {
        if let Some(member) = self.members[at].1.take() {
            self.world.close(member).await;
        }
    }

    async fn come(&mut self, at: usize, expiry_s: u32) {
        self.leave(at).await;
        let session = &self.members[at].0;
        if session.outbox().is_kept() {
            let member = self.world.member_for(&session.client_id.clone(), expiry_s).await;
            self.world.broker.live.resume(&member.session);
            self.members[at] = (member.session.clone(), Some(member));
        }
    }

    async fn step(&mut self, step: &Do) {
        let count = self.members.len();
        let broker = self.world.broker.clone();
        match *step {
            Do::Join(is_kept) if count < 9 => self.join(is_kept).await,
            Do::Publish(count) => self.world.publish(count).await,
            Do::Leave(at) if at < count => self.leave(at).await,
            Do::Come(at) if at < count => self.come(at, 600).await,
            Do::Note(at) if at < count => self.members[at].0.note(&broker, Vec::new()),
            Do::Acknowledge(at, id) if at < count && self.members[at].1.is_some() => {
                send(&self.world, &self.members[at].0);
                self.members[at].0.outbox().acked(PUBACK, id, 0);
            }
            Do::KeepNoMore(at) if at < count && at != STAYS => self.come(at, 0).await,
            Do::Subscribe(at, qos)
                if at < count && (at != STAYS || qos > 0) && self.members[at].1.is_some() =>
            {
                self.world.subscribe(&self.members[at].0, qos);
            }
            Do::Unsubscribe(at) if at < count && at != STAYS => {
                _ = broker.live.unsubscribe(&broker, &self.members[at].0, SHARE).await;
                self.members[at].0.note(&broker, Vec::new());
            }
            Do::End(at) if at < count && at != STAYS => {
                self.leave(at).await;
                broker.sessions.delete(&broker, &self.members[at].0.client_id.clone()).await;
            }
            _ => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]
    #[test]
    fn a_crash_loses_nothing_of_a_share_whoever_comes_and_leaves(
        steps in prop::collection::vec(steps(), 1..40),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut run = Run { world: World::new(), members: Vec::new() };
            run.join(true).await;
            run.join(true).await;
            for step in &steps {
                run.step(step).await;
            }
            let mut all: Offsets = run.world.broker.sessions.all().iter().flat_map(|it| held(it)).collect();
            for offset in after_a_crash(&run.world).await {
                all.remove(&offset);
            }
            prop_assert!(all.is_empty(), "lost: {all:?}");
            Ok(())
        })?;
    }
}
