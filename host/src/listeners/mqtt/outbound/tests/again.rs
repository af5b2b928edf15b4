//! What other members of a share gave to a session, and its note has no room for.

use std::collections::BTreeMap;

use super::*;

const SHARE: &str = "$share/g/t";
const LIMITS: QueueLimits = QueueLimits { messages_max: 1_000, ..super::LIMITS };

/// A session that joined its share at offset 300 and was then given all messages before 100, which
/// lie before what it waits for itself.
fn given() -> Durable {
    let mut session = Durable::new();
    session.outbox.begin(Box::new([300]), Some(Kept::new(EPOCH, session.identities.clone())));
    for offset in 0..100 {
        let qos = 1 + (offset % 2) as u8;
        let given = Queued { apart: true, may_be_again: true, ..queued(offset, qos, Some(SHARE)) };
        session.outbox.offer(given, LIMITS, || None);
    }
    assert_eq!(session.outbox.sizes().0, 100);
    session
}

/// Replays the stream as a restart does.
fn replay(session: &mut Durable, offsets: std::ops::Range<u64>, share: Option<&str>) {
    for offset in offsets {
        let qos = 1 + (offset % 2) as u8;
        session.outbox.offer(queued(offset, qos, share), LIMITS, || None);
    }
}

fn counts(session: &Durable) -> BTreeMap<u64, usize> {
    let mut counts = BTreeMap::new();
    session.offsets().into_iter().for_each(|offset| *counts.entry(offset).or_default() += 1);
    counts
}

fn each_once() -> BTreeMap<u64, usize> {
    (0..100).map(|offset| (offset, 1)).collect()
}

#[test]
fn messages_of_a_share_that_a_note_has_no_room_for_come_again_after_a_crash() {
    let mut session = given();
    session.note(400, 96);
    session.commit();
    session.crash();
    let listed = session.offsets().len() as u64;
    assert!((1..50).contains(&listed) && session.outbox.begins_at(0) == listed, "{listed}");
    assert_eq!(session.outbox.from(0), 400);

    // A second crash, half-way.
    replay(&mut session, listed..50, Some(SHARE));
    session.note(50, 96);
    session.commit();
    session.crash();
    let begins_at = session.outbox.begins_at(0);
    replay(&mut session, begins_at..400, Some(SHARE));
    assert_eq!(counts(&session), each_once());
    session.outbox.pass(0, 400);
    replay(&mut session, 0..100, Some(SHARE));
    assert_eq!(counts(&session), each_once(), "once the replay is over they are old");
}

#[test]
fn what_came_by_no_share_does_not_come_again_with_them() {
    let mut session = given();
    session.note(400, 96);
    session.commit();
    session.crash();
    let before = counts(&session);
    replay(&mut session, 0..400, None);
    assert_eq!(counts(&session), before);
}

#[test]
fn a_note_with_room_for_all_of_them_leaves_nothing_to_come_again() {
    let mut session = given();
    session.note(400, 1 << 20);
    session.commit();
    session.crash();
    assert_eq!((counts(&session), session.outbox.begins_at(0)), (each_once(), 400));
}

/// A note of the version before has no parts of streams.
#[test]
fn a_note_of_format_2_is_read() {
    let mut session = given();
    session.note(400, 1 << 20);
    session.commit();
    let note = session.saved.iter_mut().find(|(key, _)| key.starts_with(NOTE)).unwrap();
    // Format, number of streams, identity, offset in two bytes, length of the part.
    let len_at = 1 + 1 + 20 + 2;
    assert_eq!((note.1[0], note.1[len_at]), (3, 0));
    note.1[0] = 2;
    note.1.remove(len_at);
    session.crash();
    assert_eq!((counts(&session), session.outbox.begins_at(0)), (each_once(), 400));
}

/// Records of this format are on disks, whatever format notes and records get.
#[test]
fn a_record_of_a_share_says_for_ever_what_it_says() {
    let identity = Identity { log: Uuid::from_u128(7), generation: 1, partitions: 1 };
    // One stream: offered below 9, of which 5 and 6 are not listed. Then offset 2, QoS 1, 2 s old, 100 bytes.
    let record = [&[3, 1][..], identity.log.as_bytes(), &[0, 0, 0, 1, 9, 2, 5, 1, 0, 4, 4, 100]].concat();
    // It has a format of its own: notes may get another, in another layout, and records are read as before.
    assert_eq!((share_record::FORMAT, share_record::layout(record[0])), (3, Some(kept::FORMAT)));
    let mut member = Outbox::default();
    [2, 5, 6, 9].iter().for_each(|offset| _ = offer(&mut member, queued(*offset, 1, Some(SHARE))));
    let mut held = Holdings::new(Box::new([9]), 9);
    member.held_by_shares().for_each(|(_, place, queued)| held.add(place, queued));
    assert_eq!(held.into_value(&[identity]), record);
    let options = Options { qos: 1, ..Options::default() };
    let mut found = Found::default();
    found.shares.push(FoundShare { filter: Arc::new(SHARE.into()), value: record, options });
    let heir = found.restore(EPOCH, Arc::new([identity]), &[20], &[20], &|_, _| None);
    assert_eq!(
        heir.queue.iter().map(|queued| queued.source.place()).collect::<Vec<_>>(),
        [Some(Place { stream: 0, offset: 2 })]
    );
    assert_eq!(heir.owed[0].1[0], 5..20);
}
