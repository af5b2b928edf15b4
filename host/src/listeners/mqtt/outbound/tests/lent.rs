//! Large messages for which there is no memory, and the permit under which one of them goes.

use super::*;

const PEER: Peer = Peer { version: Version::V5, window: 10, packet_bytes_max: usize::MAX };

/// A connected outbox with three messages of about `bytes` in their stream, and all memory taken by
/// the other.
fn without_memory(bytes: usize) -> (Outbox, Arc<Room>, Holding) {
    let room = Room::new(64 << 10);
    let mut outbox = within(&room, false);
    let mut other = Holding::of(&room);
    other.hold((64 << 10) + crate::room::FREE_BYTES);
    for offset in 0..3 {
        let queued = Queued { len: bytes as u32, ..queued(offset, 1, None) };
        outbox.offer(queued, UNBOUNDED, || None);
    }
    (outbox, room, other)
}

/// Reads what is asked for; returns how many messages that were.
fn read(outbox: &mut Outbox, bytes: usize) -> usize {
    let places = outbox.waits(PEER).load;
    let count = places.len();
    let found = places.into_iter().map(|place| (place, Some(body(&"x".repeat(bytes)))));
    assert_eq!(outbox.loaded(&found.collect(), |_| true), 0);
    count
}

/// Writes into a small buffer beside which there is no memory.
fn write(outbox: &mut Outbox) -> (Filled, usize) {
    let (mut out, space) = (BytesMut::new(), Space { bytes_max: 4 << 10, has_room: &|_| false });
    let filled = outbox.fill(PEER, &mut Aliases::new(0), None, &clock(), space, &mut out);
    (filled, out.len())
}

fn in_memory(outbox: &Outbox) -> usize {
    outbox.queue.iter().filter(|queued| queued.body.is_some()).count()
}

#[test]
fn a_large_message_without_memory_is_read_and_written_under_a_permit_for_itself_alone() {
    let large = 10 << 10;
    let (mut outbox, room, _other) = without_memory(large);
    let before = room.taken();
    for _ in 0..3 {
        assert_eq!((read(&mut outbox, large), in_memory(&outbox)), (0, 0));
        let wanted = outbox.waits(PEER).permit;
        assert!(wanted >= large, "{wanted}");
        outbox.lend(wanted);
        // It is some bytes larger in memory than its stream said, and asks for so many then.
        if read(&mut outbox, large) == 1 && in_memory(&outbox) == 0 {
            let more = outbox.waits(PEER).permit;
            assert!(more > wanted);
            outbox.lend(more);
            assert_eq!(read(&mut outbox, large), 1);
        }
        assert_eq!((in_memory(&outbox), outbox.waits(PEER).permit), (1, 0));
        assert!(outbox.holds_lent() && room.taken() > before);
        let (filled, written) = write(&mut outbox);
        assert!(filled.used_permit && filled.blocked == 0 && written > large);
        assert!(!outbox.is_lent() && room.taken() <= before + (1 << 10), "{}", room.taken());
        assert_eq!(outbox.sizes().2, 1);
        outbox.acked(wire::PUBACK, outbox.last_id, 0);
    }
    assert_eq!(outbox.sizes(), (0, 0, 0));
}

#[test]
fn a_message_in_memory_that_finds_none_for_its_packet_waits_for_a_permit() {
    let mut outbox = Outbox { connected: true, ..Outbox::default() };
    let (large, body) = (10 << 10, message(&"x".repeat(10 << 10), b""));
    for (offset, qos) in [(0, 0), (1, 1), (2, 2)] {
        outbox.offer(queued(offset, qos, None), UNBOUNDED, || Some(body.clone()));
    }
    for _ in 0..3 {
        let (filled, written) = write(&mut outbox);
        assert!(filled.blocked > large && written == 0, "{} {written}", filled.blocked);
        outbox.lend(filled.blocked - 1);
        assert_eq!(write(&mut outbox).1, 0, "too small a permit");
        outbox.lend(filled.blocked);
        let (filled, written) = write(&mut outbox);
        assert!(filled.used_permit && filled.sent == 1 && written > large);
    }
}

#[test]
fn what_was_read_under_a_permit_that_is_given_back_is_read_again() {
    let (large, taken) = (10 << 10, 64 << 10);
    let (mut outbox, room, _other) = without_memory(large);
    outbox.lend(2 * large);
    assert_eq!((read(&mut outbox, large), in_memory(&outbox)), (1, 1));
    outbox.return_lent();
    assert_eq!((in_memory(&outbox), outbox.sums.held), (0, 0));
    assert!(room.taken() <= taken + (1 << 10) && outbox.waits(PEER).permit >= large);
    // As it is where the connection ends.
    outbox.lend(2 * large);
    assert_eq!((read(&mut outbox, large), in_memory(&outbox)), (1, 1));
    outbox.disconnected();
    assert_eq!((in_memory(&outbox), outbox.is_lent()), (0, false));
}

#[test]
fn small_messages_without_memory_need_no_permit() {
    let small = 3 << 10;
    let (mut outbox, _room, _other) = without_memory(small);
    for _ in 0..3 {
        assert_eq!(outbox.waits(PEER).permit, 0);
        assert_eq!((read(&mut outbox, small), in_memory(&outbox)), (1, 1));
        let (filled, written) = write(&mut outbox);
        assert!(filled.sent == 1 && filled.blocked == 0 && written > small);
    }
}
