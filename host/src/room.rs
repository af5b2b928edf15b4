//! Memory that clients take together, and the part of each in it.
//!
//! Three quarters of a [`Room`] are for whoever comes first. A holder takes of the last quarter
//! only while it has no more than its part, which is that quarter divided by the number of
//! holders: a few that take all that they can get leave the others their parts. Where clients of
//! some holders are away, these share the first half of the last quarter, and the others the second
//! half: however many are away, they take no part from those that are there. Beside the room each
//! holder has [`FREE_BYTES`], whatever others hold, so that one that comes late and asks for little
//! is served. A part of a room may be reserved: whoever hands it out says what is held of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Number of bytes that a holder has beside the room.
pub const FREE_BYTES: usize = 1 << 10;
/// A holder takes from the room, and gives back to it, so many bytes at a time.
const UNIT_BYTES: usize = 1 << 10;

/// A bound on what all holders take together.
#[derive(Debug)]
pub struct Room {
    bytes_max: usize,
    /// Bytes of these that no holder gets here: others hand them out.
    reserved: usize,
    taken: AtomicUsize,
    holders: AtomicUsize,
    /// Number of these holders whose clients are away.
    away: AtomicUsize,
}

/// What one holder takes of a room, which dropping it gives back. The default belongs to no room
/// and has no bound.
#[derive(Debug, Default)]
pub struct Holding {
    room: Option<Arc<Room>>,
    /// Number of bytes that the holder has taken of the room, in whole units.
    taken: usize,
    is_away: bool,
}

impl Room {
    pub fn new(bytes_max: usize) -> Arc<Self> {
        Self::with_reserve(bytes_max, 0)
    }

    /// A room of `bytes_max`, less what is `reserved` for holdings that are made without asking.
    pub fn with_reserve(bytes_max: usize, reserved: usize) -> Arc<Self> {
        let (taken, holders, away) = Default::default();
        Arc::new(Self { bytes_max, reserved, taken, holders, away })
    }

    pub fn bytes_max(&self) -> usize {
        self.bytes_max
    }

    /// Returns the number of bytes that no holder gets here.
    pub fn reserved(&self) -> usize {
        self.reserved
    }

    /// Returns the number of bytes that all holders have taken.
    pub fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }

    /// Returns the number of bytes that holders share.
    fn shared(&self) -> usize {
        self.bytes_max - self.reserved
    }

    /// Returns the number of bytes for whoever comes first.
    fn common(&self) -> usize {
        self.shared() - self.shared() / 4
    }

    /// Returns the number of bytes up to which all may come while a holder takes of the last quarter,
    /// and the number up to which the holder may have then.
    fn last(&self, is_away: bool) -> (usize, usize) {
        let (shared, quarter) = (self.shared(), self.shared() / 4);
        let away = self.away.load(Ordering::Relaxed);
        let others = self.holders.load(Ordering::Relaxed).saturating_sub(away);
        match (is_away, away) {
            (true, _) => (shared - quarter / 2, quarter / 2 / away.max(1)),
            (false, 0) => (shared, quarter / others.max(1)),
            (false, _) => (shared, quarter / 2 / others.max(1)),
        }
    }

    /// Returns whether a holder that has `holds` bytes may bring the sum of all to `taken`.
    fn admits(&self, taken: usize, holds: usize, is_away: bool) -> bool {
        let is_last = || {
            let (upto, part) = self.last(is_away);
            taken <= upto && holds <= part
        };
        taken <= self.common() || is_last()
    }

    /// Takes `more` bytes for a holder that has `holds` with them. Returns false where there is no room.
    fn try_take(&self, more: usize, holds: usize, is_away: bool) -> bool {
        let more = |taken: usize| Some(taken + more).filter(|taken| self.admits(*taken, holds, is_away));
        self.taken.fetch_update(Ordering::AcqRel, Ordering::Relaxed, more).is_ok()
    }
}

impl Holding {
    pub fn of(room: &Arc<Room>) -> Self {
        room.holders.fetch_add(1, Ordering::Relaxed);
        Self { room: Some(room.clone()), ..Self::default() }
    }

    /// Says whether the client for which it holds is away.
    #[inline]
    pub fn set_away(&mut self, is_away: bool) {
        if self.is_away == is_away {
            return;
        }
        self.is_away = is_away;
        if let Some(room) = &self.room {
            if is_away {
                room.away.fetch_add(1, Ordering::Relaxed);
            } else {
                room.away.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }

    /// Sets what the holder has to `bytes`. Returns false and changes nothing where the room has none
    /// for the difference.
    #[inline]
    pub fn try_hold(&mut self, bytes: usize) -> bool {
        let wanted = units(bytes);
        if wanted <= self.taken {
            self.give_back(wanted);
            return true;
        }
        let Some(room) = &self.room else { return true };
        let has_room = room.try_take(wanted - self.taken, wanted, self.is_away);
        if has_room {
            self.taken = wanted;
        }
        has_room
    }

    /// Sets what the holder has to `bytes`, whether there is room or not. This is for what is in
    /// memory already, and for the one message or packet that a client needs to make progress.
    #[inline]
    pub fn hold(&mut self, bytes: usize) {
        let wanted = units(bytes);
        if wanted <= self.taken {
            return self.give_back(wanted);
        }
        if let Some(room) = &self.room {
            room.taken.fetch_add(wanted - self.taken, Ordering::AcqRel);
            self.taken = wanted;
        }
    }

    /// Returns whether [`Holding::try_hold`] would succeed now.
    pub fn has_room(&self, bytes: usize) -> bool {
        let Some(room) = &self.room else { return true };
        let wanted = units(bytes);
        wanted <= self.taken || room.admits(room.taken() + wanted - self.taken, wanted, self.is_away)
    }

    /// Returns whether the holder has more than its part while less than one part is left for all.
    /// It should then give back more than it takes.
    pub fn gives_way(&self) -> bool {
        let Some(room) = &self.room else { return false };
        let (upto, part) = room.last(self.is_away);
        let part = part.max(UNIT_BYTES);
        self.taken > part && room.taken() + part > upto
    }

    /// One unit more than `wanted` is kept, so that a message that comes and goes does not
    /// touch the counter that all holders share.
    fn give_back(&mut self, wanted: usize) {
        let kept = if wanted == 0 { 0 } else { wanted + UNIT_BYTES };
        if let Some(room) = &self.room
            && kept < self.taken
        {
            room.taken.fetch_sub(self.taken - kept, Ordering::AcqRel);
            self.taken = kept;
        }
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        self.set_away(false);
        if let Some(room) = &self.room {
            room.taken.fetch_sub(self.taken, Ordering::AcqRel);
            room.holders.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Returns the number of bytes that a holder of `bytes` takes of its room.
fn units(bytes: usize) -> usize {
    bytes.saturating_sub(FREE_BYTES).next_multiple_of(UNIT_BYTES)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KIB: usize = 1 << 10;

    /// Takes a unit at a time until there is no room; the bytes that it has then.
    fn fill(holding: &mut Holding) -> usize {
        let mut bytes = FREE_BYTES + holding.taken;
        while holding.try_hold(bytes + UNIT_BYTES) {
            bytes += UNIT_BYTES;
        }
        bytes
    }

    #[test]
    fn those_who_come_first_leave_each_other_its_part_of_the_last_quarter() {
        let room = Room::new(80 * KIB);
        let mut holdings: Vec<Holding> = (0..10).map(|_| Holding::of(&room)).collect();
        assert_eq!(fill(&mut holdings[0]), FREE_BYTES + 60 * KIB);
        for holding in &mut holdings[1..] {
            assert_eq!(fill(holding), FREE_BYTES + 2 * KIB, "whoever came before it");
        }
        assert_eq!(room.taken(), 78 * KIB, "the first has more than its part already");
        let mut late = Holding::of(&room);
        assert!(late.try_hold(FREE_BYTES), "beside the room");
        drop(holdings);
        assert_eq!((room.taken(), room.holders.load(Ordering::Relaxed)), (0, 1));
        assert_eq!(fill(&mut late), FREE_BYTES + 60 * KIB);
    }

    #[test]
    fn what_is_reserved_is_of_the_room_and_no_holder_gets_it_by_asking() {
        let room = Room::with_reserve(80 * KIB, 20 * KIB);
        assert_eq!((room.bytes_max(), room.reserved()), (80 * KIB, 20 * KIB));
        let (mut one, mut other) = (Holding::of(&room), Holding::of(&room));
        assert_eq!(fill(&mut one), FREE_BYTES + 45 * KIB);
        assert_eq!(fill(&mut other), FREE_BYTES + 7 * KIB, "half of a quarter of 60 KiB");
        other.hold(FREE_BYTES + 27 * KIB);
        assert_eq!(room.taken(), 72 * KIB, "under a permit");
        assert!(!one.try_hold(FREE_BYTES + 46 * KIB));
    }

    #[test]
    fn however_many_are_away_they_take_no_part_of_those_that_are_there() {
        let room = Room::new(80 * KIB);
        let mut holdings: Vec<Holding> = (0..100).map(|_| Holding::of(&room)).collect();
        holdings.iter_mut().for_each(|holding| holding.set_away(true));
        for holding in &mut holdings[..90] {
            fill(holding);
        }
        assert_eq!(room.taken(), 60 * KIB);
        let (mut one, mut other) = (Holding::of(&room), Holding::of(&room));
        assert_eq!(fill(&mut one), FREE_BYTES + 5 * KIB);
        drop(holdings.split_off(10));
        // Of ten that are away.
        assert_eq!(fill(&mut holdings[1]), FREE_BYTES + KIB);
        assert_eq!(fill(&mut other), FREE_BYTES + 5 * KIB);
        assert!(holdings[0].gives_way() && !one.gives_way());
        one.set_away(true);
        assert!(one.gives_way(), "its part is that of those who are away");
        drop((holdings, one));
        assert_eq!(fill(&mut other), FREE_BYTES + 60 * KIB);
        drop(other);
        assert_eq!((room.taken(), room.away.load(Ordering::Relaxed)), (0, 0));
    }

    #[test]
    fn a_holder_with_more_than_its_part_gives_way_once_others_come_that_find_no_room() {
        let room = Room::new(80 * KIB);
        let mut holdings: Vec<Holding> = (0..4).map(|_| Holding::of(&room)).collect();
        holdings.iter_mut().for_each(|holding| holding.hold(FREE_BYTES + 15 * KIB));
        assert!(!holdings.iter().any(Holding::gives_way), "there is room for the others");
        holdings.iter_mut().for_each(|holding| holding.hold(FREE_BYTES + 20 * KIB));
        holdings.extend((0..6).map(|_| Holding::of(&room)));
        assert!(!holdings[9].try_hold(FREE_BYTES + 2 * KIB), "the room is full");
        let give_way: Vec<bool> = holdings.iter().map(Holding::gives_way).collect();
        assert_eq!(give_way, [[true; 4].as_slice(), &[false; 6]].concat());
        holdings[0].hold(FREE_BYTES);
        assert!(holdings[9].try_hold(FREE_BYTES + 2 * KIB) && !holdings[1].gives_way());
    }

    #[test]
    fn what_has_no_room_changes_nothing_and_what_is_there_already_is_counted() {
        let room = Room::new(8 * KIB);
        let (mut one, mut other) = (Holding::of(&room), Holding::of(&room));
        one.hold(FREE_BYTES + 20 * KIB);
        assert_eq!(room.taken(), 20 * KIB, "past the bound");
        assert!(!other.try_hold(FREE_BYTES + 1) && other.try_hold(FREE_BYTES));
        assert!(!other.has_room(FREE_BYTES + 1) && other.has_room(FREE_BYTES));
        assert!(one.try_hold(FREE_BYTES + 10 * KIB), "less than before");
        one.hold(0);
        assert_eq!(room.taken(), 0);
        assert!(Holding::default().try_hold(usize::MAX / 2), "of no room");
    }

    proptest! {
        #[test]
        fn the_bound_holds_and_nothing_is_given_back_twice(
            steps in prop::collection::vec((0..5_usize, 0..40 * KIB), 1..200),
        ) {
            let room = Room::new(64 * KIB);
            let mut holdings: Vec<Holding> = (0..5).map(|_| Holding::of(&room)).collect();
            let mut holds = [0; 5];
            for (at, bytes) in steps {
                if holdings[at].try_hold(bytes) {
                    holds[at] = bytes;
                } else {
                    prop_assert!(bytes > holds[at] && bytes > FREE_BYTES + 3 * KIB, "its part is its own");
                }
                prop_assert!(room.taken() <= room.bytes_max());
                prop_assert_eq!(room.taken(), holdings.iter().map(|holding| holding.taken).sum::<usize>());
                for (holding, bytes) in holdings.iter().zip(holds) {
                    prop_assert!(holding.taken + FREE_BYTES >= bytes, "all that it has is counted");
                }
            }
            drop(holdings);
            prop_assert_eq!(room.taken(), 0);
        }
    }
}
