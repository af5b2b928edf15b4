//! Selection of the member of a share that receives a message.
//!
//! Connected members with room come first, in turn. If there is none, the message goes to a member that
//! keeps it, rather than to one that would lose it or another message for it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::sent::Sent;
use super::share_records::ShareRecords;
use super::{Live, Wakes};
use crate::batch::flags;
use crate::listeners::mqtt::outbound::{Ids, Keeps, Queued};
use crate::listeners::mqtt::session::Session;
use crate::listeners::mqtt::subscriptions::{Options, Share, Subscriber};

impl Live {
    /// Delivers to the next connected member that keeps up, of which the one at index `first` is tried
    /// first. If there is none, delivers to a member that keeps the message until it can be sent.
    /// Returns the new owner of the message.
    pub(super) fn deliver_to_one<'s>(
        &self,
        share: &'s Share<Arc<Session>>,
        first: usize,
        sent: &Sent<'_>,
        wakes: &mut Wakes<'_>,
    ) -> Option<&'s Arc<Session>> {
        let queued = |options: Options| {
            let ids = Ids::one(options.id);
            sent.queued(options.qos, options.retain_as_published, ids, Some(share.filter.clone()))
        };
        let mut best = None;
        let mut away: Option<(&'s Subscriber<Arc<Session>>, Queued)> = None;
        let arrivals = self.arrivals.load(Ordering::Acquire);
        let is_deserted = share.is_deserted(arrivals);
        let (mut all_are_away, mut has_behind) = (true, false);
        for member in share.beginning_with(first) {
            if !sent.is_for(&member.session) {
                (has_behind, all_are_away) = (true, false);
                continue;
            }
            let Some(queued) = queued(member.options) else {
                all_are_away = false;
                continue;
            };
            let mut outbox = member.session.outbox();
            all_are_away &= !outbox.is_connected();
            if !is_deserted && outbox.is_ready(&queued, self.limits.get()) {
                // Under the lock: a member that leaves now gives it on.
                let offered = outbox.offer(queued, self.limits.get(), || sent.whole());
                drop(outbox);
                wakes.offered(&member.session, offered);
                return Some(&member.session);
            }
            let keeps = outbox.keeps(&queued, self.limits.get());
            if keeps > best {
                (best, away) = (keeps, Some((member, queued)));
            }
            if is_deserted && best == Some(Keeps::All) {
                break;
            }
        }
        // One that is behind gets it beside what it catches up with.
        if has_behind && sent.is_live() && best != Some(Keeps::All) {
            for member in share.beginning_with(first).filter(|member| !sent.is_for(&member.session)) {
                let Some(queued) = queued(member.options) else { continue };
                let queued = Queued { apart: true, ..queued };
                let keeps = member.session.outbox().keeps(&queued, self.limits.get());
                if keeps > best {
                    (best, away) = (keeps, Some((member, queued)));
                }
            }
        }
        if all_are_away && !is_deserted {
            share.set_deserted(arrivals);
        }
        let (member, queued) = away?;
        let offered = member.session.outbox().offer(queued, self.limits.get(), || sent.whole());
        wakes.offered(&member.session, offered);
        Some(&member.session)
    }

    /// Delivers a message that no session of the lane takes to any member of a share that is owed it.
    pub(super) fn deliver_owed(
        &self,
        records: &ShareRecords,
        share: &Share<Arc<Session>>,
        sent: &Sent<'_>,
        wakes: &mut Wakes<'_>,
    ) {
        let &Sent::Live { place, lane, message, .. } = sent else { return };
        let qos = (message.entry.flags & flags::QOS_MASK) as u8;
        if !records.owes(&share.filter, place, lane, qos) {
            return;
        }
        // The lane of such a member offers it in its turn.
        let catches_up = |member: &Subscriber<Arc<Session>>| {
            let options = member.options;
            let queued = || {
                let ids = Ids::one(options.id);
                sent.queued(options.qos, options.retain_as_published, ids, Some(share.filter.clone()))
            };
            member.session.lane(place.stream.into()) > 0
                && queued().is_some_and(|queued| member.session.outbox().takes(&queued))
        };
        if share.members.iter().any(catches_up) {
            return;
        }
        if let Some(taker) = self.deliver_to_one(share, share.next_turn(), &Sent::Owed(sent), wakes) {
            records.took(taker);
        }
    }
}
