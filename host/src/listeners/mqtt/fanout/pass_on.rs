//! What a member of shared subscriptions held goes to the other members when it leaves.
//!
//! Members may leave together, each with a long queue: the messages move in small parts, between
//! which the live delivery and whoever subscribes have their turn. While a client is away and
//! may come back, its messages go only to members that are there and have room; where there is none,
//! they stay.

#[cfg(test)]
pub(super) mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, RwLockReadGuard, RwLockWriteGuard};

use tokio::task::yield_now;

use super::sent::Sent;
use super::{Index, Live, Passed, Wakes};
use crate::listeners::mqtt::Broker;
use crate::listeners::mqtt::lock_order::{Locked, Rank, in_order};
use crate::listeners::mqtt::outbound::{Place, ShareFilter};
use crate::listeners::mqtt::session::Session;
use crate::listeners::mqtt::subscriptions::Share;

/// Messages that move in one go, in which nobody may subscribe. Those of one share go to one
/// member, as far as it has room: each of the members that get any is noted.
const PASSED_ON_AT_ONCE: usize = 64;

/// What leaves.
#[derive(Clone, Copy)]
pub enum Departure<'a> {
    /// The client, and its session waits for it.
    Client,
    /// The session, one of its shares.
    Share(&'a str),
    /// The session, all of its shares.
    Session,
}

impl Live {
    /// Gives what a member of shared subscriptions held to the others: see
    /// [`Outbox::give_back`](crate::listeners::mqtt::outbound::Outbox::give_back).
    pub async fn pass_on(&self, broker: &Broker, session: &Session, departure: Departure<'_>) {
        let (mut shares, mut left) = session.outbox().shares(matches!(departure, Departure::Session));
        if let Departure::Share(filter) = departure {
            shares.retain(|share| &**share == filter);
        }
        let given_by = shares.clone();
        let mut takers = BTreeMap::new();
        while left > 0 && !shares.is_empty() {
            let moved = self.pass_some(broker, session, departure, &mut shares, &mut takers);
            // What comes back, for want of another member, is not passed on again.
            left = if moved < PASSED_ON_AT_ONCE { 0 } else { left.saturating_sub(moved) };
            if left > 0 {
                yield_now().await;
            }
        }
        // Before a note of `session` without them: a crash between the two repeats, never loses.
        let mut all_noted = true;
        for (number, taker) in takers.values().enumerate() {
            if number > 0 {
                yield_now().await;
            }
            all_noted &= self.note_taker(broker, taker);
        }
        if session.outbox().is_kept() && takers.values().any(|taker| !taker.outbox().is_kept()) {
            let is_written = |share| self.write_share_record(broker, share).is_ok();
            all_noted &= given_by.iter().all(|share| is_written(share));
        }
        if all_noted {
            session.outbox().passed_on();
        }
    }

    /// Passes on some messages that came by `shares`, and leaves out those shares that nobody takes
    /// any of. Returns how many.
    fn pass_some(
        &self,
        broker: &Broker,
        session: &Session,
        departure: Departure<'_>,
        shares: &mut BTreeSet<Box<str>>,
        takers: &mut BTreeMap<u64, Arc<Session>>,
    ) -> usize {
        let passed = self.transfers();
        let index = self.index();
        if matches!(departure, Departure::Client) {
            shares.retain(|share| self.is_anyone_ready(&index, share));
        }
        let is_given = |share: &str| shares.contains(share);
        let ended = matches!(departure, Departure::Session);
        let given = session.outbox().give_back(is_given, ended, PASSED_ON_AT_ONCE);
        if let Some(seen) = &passed.seen {
            let places = given.iter().filter_map(|queued| queued.source.place());
            seen.lock().unwrap_or_else(PoisonError::into_inner).extend(places);
        }
        let moved = given.len();
        let mut wakes = Wakes::new(broker);
        let mut turns: BTreeMap<ShareFilter, (&Share<Arc<Session>>, usize)> = BTreeMap::new();
        for queued in given {
            let Some(filter) = queued.share.clone() else { continue };
            let turn = turns.get(&filter).copied().or_else(|| {
                let share = index.tree.share(&filter)?;
                Some((share, share.next_turn()))
            });
            let Some((share, first)) = turn else { continue };
            turns.insert(filter, (share, first));
            // Out of turn for whoever gets it now.
            let taker = self.deliver_to_one(share, first, &Sent::Again(queued), &mut wakes);
            takers.extend(taker.map(|taker| (taker.number, taker.clone())));
        }
        if !session.outbox().is_kept() {
            takers
                .values()
                .filter(|taker| taker.outbox().is_kept())
                .for_each(|taker| passed.shares.took(taker));
        }
        moved
    }

    fn is_anyone_ready(&self, index: &Index, filter: &str) -> bool {
        let Some(share) = index.tree.share(filter) else { return false };
        let arrivals = self.arrivals.load(Ordering::Acquire);
        if share.is_deserted(arrivals) {
            return false;
        }
        let mut all_are_away = true;
        for member in &share.members {
            let outbox = member.session.outbox();
            all_are_away &= !outbox.is_connected();
            if outbox.has_room(self.limits) {
                return true;
            }
        }
        if all_are_away {
            share.set_deserted(arrivals);
        }
        false
    }

    /// Begins to note what moves from one session to another.
    pub fn note_passed(&self) {
        // Waits for moves that nobody noted.
        self.passed_to_change().seen = Some(Mutex::default());
    }

    /// What moved since [`Live::note_passed`], the last of which has arrived. Each once, however
    /// often it moved.
    pub fn passed(&self) -> BTreeSet<Place> {
        let seen = self.passed_to_change().seen.take();
        seen.map_or_else(BTreeSet::new, |seen| seen.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// Lets messages move between the members of shares.
    pub(super) fn transfers(&self) -> Locked<RwLockReadGuard<'_, Passed>> {
        in_order(Rank::Passed, || self.passed.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn passed_to_change(&self) -> Locked<RwLockWriteGuard<'_, Passed>> {
        in_order(Rank::Passed, || self.passed.write().unwrap_or_else(PoisonError::into_inner))
    }
}
