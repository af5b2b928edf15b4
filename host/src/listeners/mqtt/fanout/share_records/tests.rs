//! Members of one share, some of which end with their connections, and a host that is killed.

mod model;

use std::collections::BTreeSet;

use bytes::BytesMut;
use futures_util::FutureExt;

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
/// connection: nobody else may have them (MQTT 5.0, 4.8.2); and but for what such a session holds while the
/// share's first record finds no room.
fn held(world: &World) -> Offsets {
    let mut offsets = Offsets::new();
    let has_record = !world.store.state(outbound::SHARE).is_empty();
    for session in world.broker.sessions.all() {
        let outbox = session.outbox();
        if outbox.is_kept() {
            outbox.references(|place, _| _ = offsets.insert(place.offset));
        } else if has_record {
            let held = outbox.held_by_shares().filter(|(share, ..)| ****share == *SHARE);
            offsets.extend(held.map(|(_, place, _)| place.offset));
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
    assert!(world.broker.live.write_share_records_of(&world.broker, &[SHARE.into()]).is_err());
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

/// The sessions of a host that starts, by whether they are heirs.
fn heir(broker: &Broker) -> Arc<Session> {
    let is_heir = |session: &Arc<Session>| session.outbox().sizes().0 > 0;
    broker.sessions.all().into_iter().find(is_heir).expect("one of them has what the record lists")
}

/// The first offset that members of the share are still to be offered, whoever they are.
fn owed_from(broker: &Broker) -> Option<u64> {
    let passed = broker.live.transfers();
    let owed = passed.shares.by_filter.get(SHARE).into_iter().flat_map(|record| &record.owed);
    owed.flat_map(|owed| owed.left(&broker.live)).map(|(_, part)| part.start).min()
}

#[tokio::test]
async fn what_a_record_names_goes_to_another_member_where_the_heir_ends_before_it_caught_up() {
    for is_deleted in [true, false] {
        let world = World::new();
        let kept = [world.connected("a").await, world.connected("b").await];
        let unkept = world.member_for("c", 0).await;
        world.broker.live.resume(&unkept.session);
        // More than a record lists, and some behind it.
        world.publish(6_000).await;
        note_all(&world);
        world.publish(100).await;
        let (all, store) = (6_100, copy(&world));
        store.keep_states();
        let again = broker(&Config::default(), world.stream.clone(), store.clone());
        let heir = heir(&again);
        if is_deleted {
            assert!(again.sessions.delete(&again, &heir.client_id.clone()).await);
        } else {
            assert!(again.live.unsubscribe(&again, &heir, SHARE).await);
            heir.note_durable(&again).await.unwrap();
        }
        for store in store.crashes() {
            let found: Offsets = after_a_crash(&world, store).await.into_iter().collect();
            assert_eq!(found.len(), all);
        }
        catch_up(again.clone(), 0).await;
        again.sessions.sweep(&again).await;
        assert_eq!(had_by_all(&again).into_iter().collect::<Offsets>().len(), all);
        assert_eq!(store.state(outbound::SHARE).len(), 0, "nobody is owed anything any more");
        for store in store.crashes() {
            let found: Offsets = after_a_crash(&world, store).await.into_iter().collect();
            assert_eq!(found.len(), all);
        }
        drop(kept);
    }
}

#[tokio::test]
async fn what_a_record_has_no_room_for_goes_to_another_member_where_the_heir_ends_before_it_caught_up() {
    for is_deleted in [true, false] {
        let world = World::new();
        let unkept = [world.member_for("c", 0).await, world.member_for("d", 0).await];
        unkept.iter().for_each(|member| world.broker.live.resume(&member.session));
        // Held by members whose notes say nothing of it.
        let count = 14_000;
        world.publish(count).await;
        // Two are left of them when the heir has ended: a queue has room for 10,000.
        let kept = [world.connected("a").await, world.connected("b").await, world.connected("e").await];
        note_all(&world);
        let again = broker(&Config::default(), world.stream.clone(), copy(&world));
        assert!(owed_from(&again).is_some_and(|from| from < count as u64), "it does not list all of them");
        let heir = heir(&again);
        if is_deleted {
            assert!(again.sessions.delete(&again, &heir.client_id.clone()).await);
        } else {
            assert!(again.live.unsubscribe(&again, &heir, SHARE).await);
        }
        catch_up(again.clone(), 0).await;
        assert_eq!(had_by_all(&again).into_iter().collect::<Offsets>().len(), count);
        drop((kept, unkept));
    }
}

#[tokio::test]
async fn what_a_member_was_still_to_be_offered_goes_to_another_where_it_takes_qos_0_from_then_on() {
    let world = World::new();
    let (one, other) = (world.connected("one").await, world.connected("other").await);
    world.publish(10).await;
    // The note of the other one lists what it has; that of the one is older.
    other.session.note(&world.broker, Vec::new());
    let store = copy(&world);
    store.keep_states();
    let again = broker(&Config::default(), world.stream.clone(), store.clone());
    let again = World { broker: again, stream: world.stream.clone(), store: store.clone() };
    let behind = again.broker.sessions.get("one").unwrap();
    assert!(behind.is_behind());
    again.subscribe(&behind, 0);
    behind.note_durable(&again.broker).await.unwrap();
    for store in store.crashes() {
        assert_eq!(after_a_crash(&world, store).await.into_iter().collect::<Offsets>().len(), 10);
    }
    catch_up(again.broker.clone(), 0).await;
    assert_eq!(had_by_all(&again.broker).into_iter().collect::<Offsets>().len(), 10);
    drop((one, other));
}

#[tokio::test]
async fn a_record_that_finds_no_room_is_told_by_house_keeping_and_at_the_end_until_it_is_written() {
    let world = World::new();
    let (kept, unkept) = (world.connected("kept").await, world.member_for("c", 0).await);
    world.broker.live.resume(&unkept.session);
    world.publish(12).await;
    let is_told = || {
        let kinds = world.broker.failures.unsaid().into_iter();
        kinds.filter(|(kind, _)| kind.contains("the record of a shared subscription")).count() == 1
    };
    world.broker.sessions.sweep(&world.broker).await;
    assert!(!is_told());
    for at_the_end in [false, true] {
        world.publish(1).await;
        world.store.set_no_space(true);
        if at_the_end {
            world.broker.sessions.note_all(&world.broker);
        } else {
            world.broker.sessions.sweep(&world.broker).await;
        }
        assert!(is_told(), "at the end: {at_the_end}");
        world.store.set_no_space(false);
        world.broker.sessions.sweep(&world.broker).await;
        assert!(!is_told(), "it is written");
    }
    drop(kept);
}

/// What a session waits for by a share.
fn by(session: &Session, filter: &str) -> usize {
    session.outbox().places_by_shares().filter(|(share, _)| ****share == *filter).count()
}

#[tokio::test]
async fn what_an_heir_has_had_by_its_other_shares_with_qos_2_does_not_come_again_after_two_crashes() {
    let other = "$share/other/a";
    let world = World::new();
    let heir = world.connected("heir").await;
    let unkept = world.member_for("c", 0).await;
    world.broker.live.resume(&unkept.session);
    for filter in [SHARE, other] {
        world.subscribe_to(&heir.session, filter, 2);
    }
    world.publish_with(8, &[2]).await;
    let ids = heir.session.outbox().sizes().0 as u16;
    (1..=ids).for_each(|packet_id| acknowledge(&world, &heir.session, packet_id));
    assert_eq!(heir.session.outbox().sizes(), (0, 0, 0), "it has had all that was sent to it");
    let mut store = copy(&world);
    for _ in 0..2 {
        // Killed before the heir has caught up.
        store = store.copied(Offset(0));
        let again = broker(&Config::default(), world.stream.clone(), store.clone());
        assert!(again.sessions.get("heir").is_some_and(|heir| heir.is_behind()));
    }
    let again = restarted(&world, store).await;
    let heir = again.sessions.get("heir").unwrap();
    assert!(by(&heir, SHARE) >= 4, "what the other member held");
    assert_eq!(by(&heir, other), 0);
    drop(unkept);
}

#[tokio::test]
async fn no_note_leaves_out_what_a_member_gave_away_before_it_is_in_another_note_or_record() {
    for is_kept in [true, false] {
        let world = World::new();
        let (one, kept) = (world.connected("one").await, world.member("kept").await);
        world.publish(10).await;
        let other = world.member_for("other", if is_kept { 600 } else { 0 }).await;
        world.broker.live.resume(&other.session);
        note_all(&world);
        world.store.keep_states();
        world.store.set_no_space(true);
        let one = world.close(one).await;
        assert_eq!(other.session.outbox().sizes().0, 10);
        // It comes back, and its note is the first that finds room.
        world.broker.live.resume(&one);
        world.store.set_no_space(false);
        one.note(&world.broker, Vec::new());
        for store in world.store.crashes() {
            assert_eq!(after_a_crash(&world, store).await.into_iter().collect::<Offsets>().len(), 10);
        }
        // Once the others are noted, its own note lists them no more.
        world.broker.sessions.sweep(&world.broker).await;
        one.note(&world.broker, Vec::new());
        let found = after_a_crash(&world, copy(&world)).await;
        assert_eq!(found.len(), 10, "each once");
        drop(kept);
    }
}

#[tokio::test]
async fn a_session_that_ends_stays_in_the_broker_stream_until_those_it_gave_to_are_noted() {
    for is_kept in [true, false] {
        let world = World::new();
        let (one, kept) = (world.connected("one").await, world.member("kept").await);
        world.publish(10).await;
        let other = world.member_for("other", if is_kept { 600 } else { 0 }).await;
        world.broker.live.resume(&other.session);
        note_all(&world);
        world.store.keep_states();
        let one = world.close(one).await;
        note_all(&world);
        world.broker.live.resume(&one);
        world.store.set_no_space(true);
        drop(other.turn);
        let mut deleted = Box::pin(world.broker.sessions.delete(&world.broker, "other"));
        assert!((&mut deleted).now_or_never().is_none(), "it waits for space");
        world.store.set_no_space(false);
        assert!(deleted.await);
        for store in world.store.crashes() {
            assert_eq!(after_a_crash(&world, store).await.into_iter().collect::<Offsets>().len(), 10);
        }
        drop(kept);
    }
}

#[tokio::test]
async fn a_subscription_of_a_kept_session_waits_for_the_record_of_its_share() {
    let world = World::new();
    let unkept = world.member_for("c", 0).await;
    world.broker.live.resume(&unkept.session);
    world.publish(10).await;
    world.store.set_no_space(true);
    let kept = world.member("kept");
    let mut kept = Box::pin(kept);
    assert!((&mut kept).now_or_never().is_none(), "its session waits for space");
    world.store.set_no_space(false);
    let kept = kept.await;
    world.broker.live.unsubscribe(&world.broker, &kept.session, SHARE).await;
    kept.session.note_durable(&world.broker).await.unwrap();
    note_all(&world);
    assert_eq!(records(&world), 0, "nobody's session is kept that is a member");
    world.store.set_no_space(true);
    world.subscribe(&kept.session, 1);
    world.store.set_no_space(false);
    world.store.keep_states();
    // The first that finds room.
    kept.session.note(&world.broker, Vec::new());
    kept.session.note_durable(&world.broker).await.unwrap();
    for store in world.store.crashes() {
        let again = restarted(&world, store).await;
        if again.live.members(SHARE).0 > 0 {
            assert_eq!(had_by_all(&again).len(), 10);
        }
    }
    assert_eq!(after_a_crash(&world, copy(&world)).await.len(), 10);
}

/// Counts what is looked at in queues, as the work for records of shares grows.
#[tokio::test]
async fn the_work_for_records_of_shares_grows_with_what_is_held_not_with_the_shares() {
    let mut visits = Vec::new();
    for shares in [10, 100] {
        let world = World::new();
        let mut members = Vec::new();
        for number in 0..10 {
            let expiry_s = if number % 2 == 0 { 600 } else { 0 };
            members.push(world.member_for(&format!("m{number}"), expiry_s).await);
            let session = &members[number].session;
            world.broker.live.resume(session);
            (0..shares).for_each(|share| world.subscribe_to(session, &format!("$share/s{share}/b"), 1));
        }
        // The same number is held, by few shares or by many.
        world.publish_to("b", 1_000 / shares, &[1]).await;
        outbound::visits::take();
        note_all(&world);
        let written = outbound::visits::take();
        let unkept = members.remove(1);
        world.close(unkept).await;
        let left = outbound::visits::take();
        let kept = members.remove(0);
        world.close(kept).await;
        visits.push((written, left, outbound::visits::take()));
    }
    assert_eq!(visits[0], visits[1]);
    assert!(visits[0].0 <= 1_000, "each message once: {visits:?}");
}
