//! Of each share one member's notes list what the members hold whose sessions end with their
//! connections, so that a restart has a session to give it to.
//!
//! It is the member that wrote such a note last. Another takes over before that one leaves the share,
//! and once that one's client is away: what waits for it may wait for long.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::{Arc, RwLockWriteGuard};

use super::{Live, Passed};
use crate::listeners::mqtt::Broker;
use crate::listeners::mqtt::lock_order::Locked;
use crate::listeners::mqtt::outbound::{NoteScope, ShareFilter, Unkept};
use crate::listeners::mqtt::session::Session;
use crate::listeners::mqtt::subscriptions::{NotedBy, Options, Share, Subscriber, is_shared};

/// Smallest number of bytes of a note for each message that it lists for another member.
const LISTED_BYTES: usize = 16;

/// What a note of a session is made of beside its outbox. Until it is dropped no message moves from one
/// member of a share to another, and no member comes or leaves.
pub struct Noting<'l> {
    pub scope: NoteScope,
    /// The shares of which the note lists what others hold.
    shares: Vec<(NotedBy<Arc<Session>>, Arc<Session>)>,
    _transfers: Option<Locked<RwLockWriteGuard<'l, Passed>>>,
}

/// The members of a share for which a session's note lists what they hold.
struct Others {
    share: ShareFilter,
    noted_by: NotedBy<Arc<Session>>,
    own: Arc<Session>,
    /// With which the session would be given their messages.
    options: Options,
    unkept: Vec<Arc<Session>>,
}

impl Noting<'_> {
    /// The note was appended: other members need not list the same.
    pub fn noted(&self) {
        self.shares.iter().for_each(|(noted_by, own)| noted_by.set(Some(own.clone())));
    }
}

impl Live {
    /// Returns what a note of this session is made of.
    pub fn noting(&self, broker: &Broker, session: &Session) -> Noting<'_> {
        let is_connected = session.outbox().is_connected();
        self.noting_where(broker, session, |by| {
            by.number == session.number || (is_connected && !by.outbox().is_connected())
        })
    }

    /// Returns what a note of this session is made of that takes over from other members.
    pub fn noting_for_all(&self, broker: &Broker, session: &Session) -> Noting<'_> {
        self.noting_where(broker, session, |_| true)
    }

    /// `takes_over`: whether the note lists what the notes of this member list.
    fn noting_where(
        &self,
        broker: &Broker,
        session: &Session,
        takes_over: impl Fn(&Session) -> bool,
    ) -> Noting<'_> {
        let bytes_max = broker.note_bytes_max();
        let filters = if session.outbox().is_kept() { session.shares() } else { Vec::new() };
        let transfers = (!filters.is_empty()).then(|| self.passed_to_change());
        let mut scope = NoteScope::new(self.positions_of(broker, session), bytes_max);
        let mut shares = Vec::new();
        for filter in &filters {
            let Some(others) = self.others(session, filter, &takes_over) else { continue };
            for member in &others.unkept {
                let streams = scope.positions.len();
                let unkept =
                    scope.unkept.get_or_insert_with(|| Unkept::new(streams, bytes_max / LISTED_BYTES));
                unkept.add(&member.outbox(), &others.share, others.options, &scope.positions);
            }
            shares.push((others.noted_by, others.own));
        }
        Noting { scope, shares, _transfers: transfers }
    }

    /// Returns the members of a share for which this session's note lists what they hold; `None` where
    /// the session is not to list it.
    fn others(
        &self,
        session: &Session,
        filter: &str,
        takes_over: impl Fn(&Session) -> bool,
    ) -> Option<Others> {
        let index = self.index();
        let share = index.tree.share(filter)?;
        if noting_member(share).is_some_and(|by| !takes_over(&by)) {
            return None;
        }
        let own = share.members.iter().find(|member| member.number == session.number)?;
        if !may_note(own) {
            return None;
        }
        let unkept = share.members.iter().filter(|member| !member.session.outbox().is_kept());
        Some(Others {
            share: share.filter.clone(),
            noted_by: share.noted_by.clone(),
            own: own.session.clone(),
            options: own.options,
            unkept: unkept.map(|member| member.session.clone()).collect(),
        })
    }

    /// Has other members of these shares note what `session` has noted for others. Called before it
    /// leaves them.
    pub fn hand_over_notes(&self, broker: &Broker, session: &Session, filters: &[Box<str>]) {
        let shares = filters.iter().filter(|filter| is_shared(filter));
        let successors: BTreeMap<u64, Arc<Session>> =
            shares.filter_map(|filter| self.successor(session, filter)).map(|it| (it.number, it)).collect();
        successors.values().for_each(|successor| successor.take_over_notes(broker));
    }

    /// Has other members of its shares note what `session` holds, which is not kept from now on. Called
    /// before its own note is removed.
    pub fn note_kept_no_more(&self, broker: &Broker, session: &Session) {
        let shares = session.shares();
        let members = shares.iter().filter_map(|filter| self.notes_for(session, filter));
        let members: BTreeMap<u64, Arc<Session>> = members.map(|member| (member.number, member)).collect();
        members.values().for_each(|member| member.take_over_notes(broker));
    }

    /// Returns the member that is to note for others once `session` does not; `None` where another
    /// does already, or where there is no need.
    fn successor(&self, session: &Session, filter: &str) -> Option<Arc<Session>> {
        let _transfers = self.transfers(true);
        let index = self.index();
        let share = index.tree.share(filter)?;
        if noting_member(share).is_some_and(|by| by.number != session.number) {
            return None;
        }
        let is_needed = share.members.iter().any(|member| !member.session.outbox().is_kept());
        next_member(share, session).filter(|_| is_needed)
    }

    /// Returns the member whose note lists what others of the share hold, or that is to write one:
    /// not `session`, which does so with its next note.
    pub(super) fn notes_for(&self, session: &Session, filter: &str) -> Option<Arc<Session>> {
        let index = self.index();
        let share = index.tree.share(filter)?;
        let by = noting_member(share).or_else(|| next_member(share, session))?;
        (by.number != session.number).then_some(by)
    }
}

/// Returns the member whose note lists what others hold, if there is one.
fn noting_member(share: &Share<Arc<Session>>) -> Option<Arc<Session>> {
    share.noted_by.get().filter(|by| by.outbox().is_kept())
}

/// Returns a member other than `session` that may note for others, one whose client is there before
/// all that are away.
fn next_member(share: &Share<Arc<Session>>, session: &Session) -> Option<Arc<Session>> {
    let mut others =
        share.members.iter().filter(|member| member.number != session.number && may_note(member));
    let first = others.next()?;
    let is_connected = |member: &&Subscriber<Arc<Session>>| member.session.outbox().is_connected();
    let found = if is_connected(&first) { first } else { others.find(is_connected).unwrap_or(first) };
    Some(found.session.clone())
}

fn may_note(member: &Subscriber<Arc<Session>>) -> bool {
    member.options.qos > 0 && member.session.outbox().is_kept()
}
