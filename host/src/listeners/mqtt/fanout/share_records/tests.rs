//! Members of one share, some of which end with their connections, and a host that is killed.

use std::collections::BTreeSet;

use bytes::BytesMut;
use futures_util::FutureExt;
use proptest::prelude::*;

use super::super::pass_on::tests::{Member, SHARE, World};
use super::*;
use crate::batch::Offset;
use crate::listeners::mqtt::aliases::Aliases;
use crate::listeners::mqtt::config::Config;
use crate::listeners::mqtt::fanout::catch_up;
use crate::listeners::mqtt::fuzzing::broker;
use crate::listeners::mqtt::outbound::{self, Peer, Space};
use crate::listeners::mqtt::wire::{PUBACK, PUBCOMP, PUBREC, Version};
use crate::stream::memory::MemoryStream;

type Offsets = BTreeSet<u64>;

/// What the members hold, but for deliveries with QoS 2 that were begun to a session that ends with its
/// connection: nobody else may have them (MQTT 5.0, 4.8.2).
fn held(world: &World) -> Offsets {
    let mut offsets = Offsets::new();
    for session in world.broker.sessions.all() {
        let outbox = session.outbox();
        if outbox.is_kept() {
            outbox.references(|place, _| _ = offsets.insert(place.offset));
        } else {
            offsets.extend(outbox.held_by(SHARE).filter_map(|it| Some(it.source.place()?.offset)));
        }
    }
    offsets
}

/// Sends what may be sent, and acknowledges the message with this packet id.
fn acknowledge(world: &World, session: &Session, packet_id: u16) {
    let peer = Peer { version: Version::V5, window: 10, packet_bytes_max: 1 << 20 };
    let mut aliases = Aliases::new(0);
    let space = || Space { bytes_max: 1 << 20, has_room: &|_| true };
    for acknowledged in [None, Some(PUBACK), Some(PUBREC), Some(PUBCOMP)] {
        let mut outbox = session.outbox();
        acknowledged.into_iter().for_each(|first| _ = outbox.acked(first, packet_id, 0));
        drop(outbox);
        for _ in 0..2 {
            let scope = || (world.broker.live.positions_of(&world.broker, session), 1 << 10);
            let scope = scope();
            let mut outbox = session.outbox();
            outbox.settle(&*world.store);
            outbox.fill(peer, &mut aliases, None, &world.broker.clock, space(), &mut BytesMut::new());
            outbox.record(&*world.store, || scope);
        }
    }
}

/// A host that starts with this state, and whose sessions have caught up.
async fn restarted(world: &World, store: Arc<MemoryStream>) -> Arc<Broker> {
    let again = broker(&Config::default(), world.stream.clone(), store);
    catch_up(again.clone(), 0).await;
    again
}

fn had_by_all(broker: &Broker) -> Vec<u64> {
    let mut found = Vec::new();
    for session in broker.sessions.all() {
        session.outbox().references(|place, _| found.push(place.offset));
    }
    found.sort_unstable();
    found
}

/// What the sessions have, once they have caught up, that a host finds which starts with this state.
async fn after_a_crash(world: &World, store: Arc<MemoryStream>) -> Vec<u64> {
    had_by_all(&*restarted(world, store).await)
}

fn copy(world: &World) -> Arc<MemoryStream> {
    world.store.copied(Offset(0))
}

/// As house-keeping does.
fn note_all(world: &World) {
    world.broker.sessions.all().iter().for_each(|session| session.note(&world.broker, Vec::new()));
    let _ = world.broker.live.write_share_records(&world.broker);
}

fn records(world: &World) -> usize {
    world.store.state(outbound::SHARE).len()
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
        acknowledge(&world, &unkept.session, 0);
        note_all(&world);
        let found = after_a_crash(&world, copy(&world)).await;
        let all: Offsets = (0..first + count as u64).collect();
        assert!(count > 90 || found.len() == all.len(), "each once, as far as a record has room");
        assert_eq!(found.into_iter().collect::<Offsets>(), all);
    }
    drop(kept);
}

#[tokio::test]
async fn a_member_whose_client_was_there_gets_what_others_held_before_one_whose_client_was_away() {
    let world = World::new();
    let (away, unkept) = (world.connected("away").await, world.member_for("c", 0).await);
    world.broker.live.resume(&unkept.session);
    world.publish(10).await;
    world.close(away).await;
    let there = world.connected("there").await;
    note_all(&world);
    let again = broker(&Config::default(), world.stream.clone(), copy(&world));
    let waiting = |client_id: &str| again.sessions.get(client_id).unwrap().outbox().sizes().0;
    assert_eq!((waiting("there"), waiting("away")), (10, 0));
    drop(there);
}

#[tokio::test]
async fn a_share_has_a_record_only_while_it_has_members_with_and_without_a_kept_session() {
    let world = World::new();
    let unkept = world.member_for("c", 0).await;
    world.publish(10).await;
    note_all(&world);
    assert_eq!(records(&world), 0, "nobody's session is kept");
    let kept = world.connected("a").await;
    assert_eq!(records(&world), 1);
    world.close(unkept).await;
    note_all(&world);
    assert_eq!(records(&world), 0, "all sessions are kept");
    let unkept = world.member_for("c", 0).await;
    assert_eq!(records(&world), 1);
    // A restart gives it to its heir, and needs it no more.
    let store = copy(&world);
    let again = broker(&Config::default(), world.stream.clone(), store.clone());
    again.renew_records().unwrap();
    assert_eq!(store.state(outbound::SHARE).len(), 0);
    world.close(kept).await;
    world.broker.sessions.delete(&world.broker, "a").await;
    note_all(&world);
    assert_eq!(records(&world), 0, "nobody's session is kept");
    drop(unkept);
}

#[tokio::test]
async fn a_restart_that_is_killed_before_and_after_each_append_loses_nothing_that_a_record_lists() {
    let world = World::new();
    let kept = world.connected("a").await;
    let unkept = world.member_for("c", 0).await;
    world.broker.live.resume(&unkept.session);
    // More than a note lists.
    world.publish(6_000).await;
    note_all(&world);
    let store = copy(&world);
    store.keep_states();
    let again = broker(&Config::default(), world.stream.clone(), store.clone());
    again.renew_records().unwrap();
    again.sessions.sweep(&again).await;
    catch_up(again.clone(), 0).await;
    again.sessions.sweep(&again).await;
    for store in store.crashes() {
        let found: Offsets = after_a_crash(&world, store).await.into_iter().collect();
        assert_eq!(found.len(), 6_000);
    }
    drop(kept);
}

fn holders(world: &World) -> usize {
    let passed = world.broker.live.transfers();
    passed.shares.by_filter.get(SHARE).map_or(0, |record| record.holders.len())
}

#[tokio::test]
async fn a_session_that_ended_is_not_remembered_while_the_broker_stream_has_no_space() {
    let world = World::new();
    let kept = world.connected("kept").await;
    let mut unkept = Vec::new();
    for number in 0..5 {
        let member = world.member_for(&format!("m{number}"), 0).await;
        world.broker.live.resume(&member.session);
        unkept.push(member);
    }
    world.publish(12).await;
    assert_eq!(holders(&world), 5);
    world.store.set_no_space(true);
    for member in unkept {
        world.close(member).await;
    }
    assert!(world.broker.live.write_share_record(&world.broker, SHARE).is_err());
    assert_eq!(holders(&world), 0);
    // The record still covers what the kept session was given and has not noted.
    let found: Offsets = after_a_crash(&world, copy(&world)).await.into_iter().collect();
    assert_eq!(found.len(), 12);
    world.store.set_no_space(false);
    note_all(&world);
    assert_eq!(records(&world), 0);
    assert_eq!(after_a_crash(&world, copy(&world)).await.len(), 12);
    drop(kept);
}

#[tokio::test]
async fn a_record_covers_a_session_that_ends_until_nothing_more_is_delivered_to_it() {
    let world = World::new();
    let kept = world.connected("kept").await;
    let unkept = world.member_for("c", 0).await;
    world.broker.live.resume(&unkept.session);
    // A session that ends has no filters before it leaves the index.
    unkept.session.remove_filter(SHARE);
    note_all(&world);
    world.publish(10).await;
    note_all(&world);
    let found: Offsets = after_a_crash(&world, copy(&world)).await.into_iter().collect();
    assert_eq!(found.len(), 10);
    drop(kept);
}

#[tokio::test]
async fn a_record_covers_what_a_session_is_still_to_be_given_that_is_kept_no_more() {
    let world = World::new();
    let (one, other) = (world.connected("one").await, world.member("other").await);
    world.publish(10).await;
    // The other one's says that it was given none; those of the one were not noted.
    other.session.note(&world.broker, Vec::new());
    let store = copy(&world);
    let again = broker(&Config::default(), world.stream.clone(), store.clone());
    let again = World { broker: again, stream: world.stream.clone(), store };
    assert!(had_by_all(&again.broker).is_empty());
    let unkept = again.member_for("one", 0).await;
    assert_eq!(after_a_crash(&again, copy(&again)).await.len(), 10);
    drop((one, unkept));
}

#[derive(Clone, Debug)]
enum Do {
    /// A member whose session is kept, or not.
    Join(bool),
    Leave(usize),
    /// It resumes its session if it has one.
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
    /// House-keeping looks at all sessions and records.
    Sweep,
}

fn steps() -> impl Strategy<Value = Do> {
    prop_oneof![
        2 => any::<bool>().prop_map(Do::Join),
        2 => (0..5_usize).prop_map(Do::Leave),
        2 => (0..5_usize).prop_map(Do::Come),
        1 => (0..5_usize).prop_map(Do::End),
        1 => (0..5_usize).prop_map(Do::Unsubscribe),
        1 => (0..5_usize).prop_map(Do::KeepNoMore),
        1 => (0..5_usize, 0..3_u8).prop_map(|(member, qos)| Do::Subscribe(member, qos)),
        3 => (1..30_usize).prop_map(Do::Publish),
        1 => (60..150_usize).prop_map(Do::Publish),
        4 => (0..5_usize, 1..20_u16).prop_map(|(member, id)| Do::Acknowledge(member, id)),
        3 => (0..5_usize).prop_map(Do::Note),
        2 => Just(Do::Sweep),
    ]
}

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
        let member = self.world.member_for(&self.members[at].0.client_id.clone(), expiry_s).await;
        self.world.broker.live.resume(&member.session);
        self.members[at] = (member.session.clone(), Some(member));
    }

    async fn step(&mut self, step: &Do) {
        let count = self.members.len();
        let broker = self.world.broker.clone();
        match *step {
            Do::Join(is_kept) if count < 5 => self.join(is_kept).await,
            Do::Publish(count) => self.world.publish_with(count, &[1, 2]).await,
            Do::Leave(at) if at < count => self.leave(at).await,
            Do::Come(at) if at < count => self.come(at, 600).await,
            Do::Note(at) if at < count => self.members[at].0.note(&broker, Vec::new()),
            Do::Sweep => broker.sessions.sweep(&broker).await,
            Do::Acknowledge(at, id) if at < count && self.members[at].1.is_some() => {
                acknowledge(&self.world, &self.members[at].0, id);
            }
            Do::KeepNoMore(at) if at < count => self.come(at, 0).await,
            Do::Subscribe(at, qos) if at < count && self.members[at].1.is_some() => {
                self.world.subscribe(&self.members[at].0, qos);
            }
            Do::Unsubscribe(at) if at < count => {
                _ = broker.live.unsubscribe(&broker, &self.members[at].0, SHARE).await;
                self.members[at].0.note(&broker, Vec::new());
            }
            Do::End(at) if at < count => {
                self.leave(at).await;
                broker.sessions.delete(&broker, &self.members[at].0.client_id.clone()).await;
            }
            _ => {}
        }
    }
}

/// Returns what a host has lost that was killed behind any append since the last time that this was asked,
/// of what members had `before` and have now. Where no member's session is kept, nothing can be.
async fn lost(world: &World, before: &Offsets) -> Offsets {
    let now = held(world);
    let both: Offsets = before.intersection(&now).copied().collect();
    let crashes = world.store.crashes().into_iter().map(|store| (store, &both));
    let mut lost = Offsets::new();
    for (store, held) in crashes.chain([(copy(world), &now)]) {
        let again = restarted(world, store).await;
        if [world.broker.as_ref(), again.as_ref()].iter().all(|it| it.live.members(SHARE).0 > 0) {
            let found: Offsets = had_by_all(&again).into_iter().collect();
            lost.extend(held.difference(&found));
        }
    }
    lost
}

/// Runs the steps, with house-keeping wherever others have their turn. Returns what a host has lost that
/// was killed at any moment.
async fn run(steps: &[Do]) -> Option<(usize, Offsets)> {
    let mut run = Run { world: World::new(), members: Vec::new() };
    run.join(true).await;
    run.join(true).await;
    run.world.store.keep_states();
    let world = run.world.clone();
    for (number, step) in steps.iter().enumerate() {
        let mut before = held(&world);
        let mut done = Box::pin(run.step(step));
        let mut is_done = false;
        while !is_done {
            is_done = (&mut done).now_or_never().is_some();
            let lost = lost(&world, &before).await;
            if !lost.is_empty() {
                return Some((number, lost));
            }
            before = held(&world);
            if !is_done {
                note_all(&world);
            }
        }
    }
    None
}

fn assert_nothing_is_lost(steps: &[Do]) -> Result<(), TestCaseError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let lost = runtime.block_on(run(steps));
    prop_assert!(lost.is_none(), "lost by a step: {lost:?}");
    Ok(())
}

#[test]
fn a_crash_loses_nothing_where_one_of_these_sequences_did() {
    use Do::*;
    let sequences: &[&[Do]] = &[
        &[Join(true), Join(false), Publish(14), KeepNoMore(2), Come(3), Leave(0), Leave(0), Leave(3)],
        &[Publish(21), Acknowledge(0, 1), Join(false), Join(false), KeepNoMore(0)],
        &[Subscribe(0, 0), Publish(2), Note(1)],
        // A record behind whose positions an heir is offered nothing again.
        &[Join(false), Publish(15), Come(0)],
        // A session gives what it holds to one that ends with its connection.
        &[Publish(1), KeepNoMore(0), Leave(1)],
        // A session that ends is on its way out of the share, and holds more than moves in one go.
        &[Leave(1), Join(false), Leave(0), Publish(65), Leave(2)],
        // What was sent stays with a session that is kept no more.
        &[Publish(21), Acknowledge(0, 11), KeepNoMore(0)],
        // One without a kept session joins while no member's is kept, beside a record.
        &[Join(false), End(0), End(1), Join(false), Come(1), Publish(20), End(2), Sweep],
    ];
    for steps in sequences {
        assert_nothing_is_lost(steps).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]
    #[test]
    fn a_crash_at_any_moment_loses_nothing_of_a_share_whoever_comes_and_leaves(
        steps in prop::collection::vec(steps(), 1..30),
    ) {
        assert_nothing_is_lost(&steps)?;
    }
}
