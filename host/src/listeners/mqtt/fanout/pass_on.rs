//! Passes the messages of a leaving member of shared subscriptions on to the other members.
//!
//! Members may leave together, each with a long queue. The messages move in small groups, between which
//! live delivery and subscribing clients have their turn. While a disconnected client may still come
//! back, its messages go only to connected members with room; if there is none, they stay.

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

/// Messages that move without a break, while no client can subscribe. Those of one share go to one
/// member as far as it has room, because each receiving member is noted.
const PASSED_ON_AT_ONCE: usize = 64;

/// What leaves.
#[derive(Clone, Copy)]
pub enum Departure<'a> {
    /// The client disconnects, and its session stays.
    Client,
    /// The session leaves one of its shares.
    Share(&'a str),
    /// The session leaves all of its shares.
    Session,
}

impl Live {
    /// Passes messages that a member of shared subscriptions held on to the others: see
    /// [`Outbox::give_back`](crate::listeners::mqtt::outbound::Outbox::give_back).
    pub async fn pass_on(&self, broker: &Broker, session: &Arc<Session>, departure: Departure<'_>) {
        let (mut shares, mut left) = session.outbox().shares(matches!(departure, Departure::Session));
        match departure {
            // It stays with a client that comes back, rather than that more and more is in its notes only.
            Departure::Client if session.outbox().is_passing_on() && self.settle(broker).is_err() => return,
            Departure::Client => self.keep_ready(&mut shares),
            Departure::Share(filter) => shares.retain(|share| &**share == filter),
            Departure::Session => {}
        }
        let mut takers = BTreeMap::new();
        while left > 0 && !shares.is_empty() {
            let Some(moved) = self.pass_some(broker, session, departure, &mut shares, &mut takers) else {
                break;
            };
            left = left.saturating_sub(moved);
            if left > 0 {
                yield_now().await;
            }
        }
        // Before a note of `session` without them: a crash between the two repeats, never loses.
        for (number, taker) in takers.values().enumerate() {
            if number > 0 {
                yield_now().await;
            }
            self.note_taker(broker, taker);
        }
        // Refused: its notes list what it gave until another try is not.
        let _ = self.settle(broker);
    }

    /// Passes on some messages of `shares`, and removes shares of which no member takes any. Returns the
    /// number of messages, or `None` if there are no more.
    fn pass_some(
        &self,
        broker: &Broker,
        session: &Arc<Session>,
        departure: Departure<'_>,
        shares: &mut BTreeSet<Box<str>>,
        takers: &mut BTreeMap<u64, Arc<Session>>,
    ) -> Option<usize> {
        let passed = self.transfers();
        let index = self.index();
        if matches!(departure, Departure::Client) {
            let is_given = |share: &str| shares.contains(share);
            let next = session.outbox().next_shares(is_given, PASSED_ON_AT_ONCE);
            if next.is_empty() {
                return None;
            }
            for share in next.iter().filter(|share| !self.is_anyone_ready(&index, share)) {
                shares.remove(&***share);
            }
        }
        let is_given = |share: &str| shares.contains(share);
        let ended = matches!(departure, Departure::Session);
        let given = session.outbox().give_back(is_given, ended, PASSED_ON_AT_ONCE);
        if let Some(seen) = &passed.seen {
            let places = given.iter().filter_map(|queued| queued.source.place());
            seen.lock().unwrap_or_else(PoisonError::into_inner).extend(places);
        }
        let moved = given.len();
        let is_kept = session.outbox().is_kept();
        if is_kept {
            passed.shares.lists(session);
        }
        let mut wakes = Wakes::new(broker);
        let mut are_kept: BTreeMap<u64, bool> = BTreeMap::new();
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
            let Some(taker) = self.deliver_to_one(share, first, &Sent::Again(queued), &mut wakes) else {
                continue;
            };
            let is_taker_kept = *are_kept.entry(taker.number).or_insert_with(|| {
                passed.shares.took(taker);
                taker.outbox().is_kept()
            });
            if is_kept && !is_taker_kept {
                passed.shares.gave(&share.filter);
            }
            takers.entry(taker.number).or_insert_with(|| taker.clone());
        }
        let is_over = moved == 0 && !matches!(departure, Departure::Client);
        (!is_over).then_some(moved)
    }

    /// Removes the shares without a connected member that has room.
    fn keep_ready(&self, shares: &mut BTreeSet<Box<str>>) {
        let index = self.index();
        shares.retain(|share| self.is_anyone_ready(&index, share));
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
            if outbox.has_room(self.limits.get()) {
                return true;
            }
        }
        if all_are_away {
            share.set_deserted(arrivals);
        }
        false
    }

    /// Begins to record the messages that move between sessions.
    pub fn note_passed(&self) {
        // Waits for moves that nobody noted.
        self.passed_to_change().seen = Some(Mutex::default());
    }

    /// Returns the messages that moved since [`Live::note_passed`] and have all arrived. Each is
    /// returned once, however often it moved.
    pub fn passed(&self) -> BTreeSet<Place> {
        let seen = self.passed_to_change().seen.take();
        seen.map_or_else(BTreeSet::new, |seen| seen.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// Permits messages to move between the members of shares.
    pub(super) fn transfers(&self) -> Locked<RwLockReadGuard<'_, Passed>> {
        in_order(Rank::Passed, || self.passed.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn passed_to_change(&self) -> Locked<RwLockWriteGuard<'_, Passed>> {
        in_order(Rank::Passed, || self.passed.write().unwrap_or_else(PoisonError::into_inner))
    }
}
