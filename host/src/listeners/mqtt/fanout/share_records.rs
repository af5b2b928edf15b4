//! The records of shares that have members with a kept session and members without: see
//! [`outbound::Holdings`](crate::listeners::mqtt::outbound::Holdings).
//!
//! No note says what a session holds that ends with its connection. A share has a record
//! before such a session is given the first message beside a member whose session is kept. From then
//! on the record covers what those sessions hold, whichever notes are written: it is replaced only
//! by one that lists what they hold at that moment, after the notes of those that were given some of it.
//! When a session that is kept gives messages to one that is not, the record is replaced before the
//! note that lists them is.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError, RwLockWriteGuard};

use super::{Live, Passed, Subscription};
use crate::listeners::mqtt::acks::Stopped;
use crate::listeners::mqtt::lock_order::Locked;
use crate::listeners::mqtt::outbound::{FoundShare, Holdings, SHARE, note_bytes_max};
use crate::listeners::mqtt::session::Session;
use crate::listeners::mqtt::subscriptions::{Options, is_shared};
use crate::listeners::mqtt::{Broker, append, append_unawaited};
use crate::stream::{AppendError, Stream, Ticket};

/// The shares that have a record, or are to have one, and who may hold messages that only the records
/// list.
pub(super) struct ShareRecords {
    by_filter: BTreeMap<Box<str>, Record>,
    /// Sessions that are kept and whose notes do not list yet what sessions that are not kept gave
    /// them. Each is added after it was given the messages, and taken out before it is noted.
    takers: Mutex<BTreeMap<u64, Arc<Session>>>,
}

#[derive(Default)]
struct Record {
    /// The members whose sessions end with their connections, and those that were and still hold
    /// messages by the share. Each is added when it joins, or when the record begins.
    holders: BTreeMap<u64, Arc<Session>>,
    /// What the broker stream has, if it has a record.
    written: Option<Vec<u8>>,
}

impl ShareRecords {
    /// The records that a start found.
    pub fn of(found: Heirs) -> Self {
        let takers = found.iter().map(|(_, heir)| (heir.number, heir.clone())).collect();
        let record = |filter| (filter, Record { holders: BTreeMap::new(), written: Some(Vec::new()) });
        let by_filter = found.into_iter().map(|(filter, _)| record(filter)).collect();
        Self { by_filter, takers: Mutex::new(takers) }
    }

    /// A session that is kept was given messages by one that is not.
    pub fn took(&self, taker: &Arc<Session>) {
        let mut takers = self.takers.lock().unwrap_or_else(PoisonError::into_inner);
        takers.insert(taker.number, taker.clone());
    }

    fn noted(&self, taker: &Session) {
        self.takers.lock().unwrap_or_else(PoisonError::into_inner).remove(&taker.number);
    }

    /// Notes the sessions that were given messages, so that records need not list these any more.
    fn note_takers(&mut self, broker: &Broker) -> Result<(), AppendError> {
        let takers = self.takers.get_mut().unwrap_or_else(PoisonError::into_inner);
        while let Some(taker) = takers.first_entry() {
            taker.get().try_note(broker)?;
            taker.remove();
        }
        Ok(())
    }

    /// Replaces a record by what its holders hold now, or removes it where it is not needed.
    fn replace(
        &mut self,
        broker: &Broker,
        filter: &str,
        is_needed: impl Fn(&Record) -> bool,
    ) -> Result<Ticket, AppendError> {
        let noted = self.note_takers(broker);
        let bytes_max = note_bytes_max(broker.sessions.len() + self.by_filter.len());
        let Some(record) = self.by_filter.get_mut(filter) else { return Ok(Ticket::default()) };
        // Also while nothing can be appended: sessions would be remembered for ever that come and end.
        record.renew_holders(filter, broker.live.unkept_members(filter));
        let set = noted.and_then(|()| {
            let value = is_needed(record).then(|| record.value(broker, filter, bytes_max));
            record.set(broker, filter, value)
        });
        if record.written.is_none() && record.holders.is_empty() {
            self.by_filter.remove(filter);
        }
        set
    }
}

impl Record {
    /// Makes the members holders whose sessions are not kept, and forgets those that are holders no
    /// more. A session that ends is a member, and is given messages, until the index is without it.
    fn renew_holders(&mut self, filter: &str, unkept: BTreeMap<u64, Arc<Session>>) {
        self.holders.retain(|_, session| {
            let outbox = session.outbox();
            !outbox.is_kept() && outbox.held_by(filter).any(|queued| queued.source.place().is_some())
        });
        self.holders.extend(unkept);
    }

    /// Returns what the holders hold.
    fn value(&self, broker: &Broker, filter: &str, bytes_max: usize) -> Vec<u8> {
        // Read before the outboxes: what lies behind may have been given to any of them since.
        let mut positions = broker.live.live_positions(broker);
        // A session that a restart found may still be behind when it is kept no more.
        for holder in self.holders.values() {
            let offered = broker.live.positions_of(broker, holder);
            for (position, offered) in positions.iter_mut().zip(offered) {
                *position = offered.min(*position);
            }
        }
        let mut held = Holdings::new(&positions, bytes_max);
        self.holders.values().for_each(|holder| held.add(&holder.outbox(), filter));
        held.into_value(&broker.identities)
    }

    fn set(&mut self, broker: &Broker, filter: &str, value: Option<Vec<u8>>) -> Result<Ticket, AppendError> {
        if value == self.written {
            return Ok(Ticket::default());
        }
        let ticket = append(&*broker.broker, &[(key(filter), value.clone())])?;
        self.written = value;
        Ok(ticket)
    }
}

impl Live {
    /// Sees that the shares among the filters have records before `session` joins them, where they need
    /// one then. Nobody else joins a share until the guard is dropped.
    pub(super) fn join_shares(
        &self,
        broker: &Broker,
        session: &Arc<Session>,
        subscriptions: &[Subscription],
    ) -> Option<Locked<RwLockWriteGuard<'_, Passed>>> {
        let mut passed = None;
        for Subscription { filter, options, .. } in subscriptions.iter().filter(|one| one.filter.is_shared())
        {
            let passed = passed.get_or_insert_with(|| self.passed_to_change());
            self.join_share(broker, passed, session, filter.as_str(), *options);
        }
        passed
    }

    /// Where there is no room for the record, [`Live::write_share_record`] writes it later.
    fn join_share(
        &self,
        broker: &Broker,
        passed: &mut Passed,
        session: &Arc<Session>,
        filter: &str,
        options: Options,
    ) {
        if options.qos == 0 {
            return;
        }
        let is_kept = session.outbox().is_kept();
        let (kept, unkept) = self.members(filter);
        let record = passed.shares.by_filter.get(filter);
        // It may be needed again before it is replaced.
        let has_record = record.is_some();
        let has_holders = record.is_some_and(|record| !record.holders.is_empty());
        let is_needed = if is_kept { unkept > 0 || has_holders } else { kept > 0 };
        if is_needed {
            let _ = self.begin_record(broker, passed, filter);
        }
        if !is_kept && (is_needed || has_record) {
            let record = passed.shares.by_filter.entry(filter.into()).or_default();
            record.holders.insert(session.number, session.clone());
        }
    }

    /// Writes the record of a share that has none.
    fn begin_record(&self, broker: &Broker, passed: &mut Passed, filter: &str) -> Result<(), AppendError> {
        let record = passed.shares.by_filter.entry(filter.into()).or_default();
        if record.written.is_some() {
            record.holders.extend(self.unkept_members(filter));
            return Ok(());
        }
        passed.shares.replace(broker, filter, |_| true).map(drop)
    }

    /// Has a session end with its connection from now on. Returns once the records of its shares are
    /// durable that list what it holds; only then may its own notes be removed.
    pub async fn keep_no_more(&self, broker: &Broker, session: &Arc<Session>) -> Result<(), Stopped> {
        for filter in &self.hold(session) {
            broker.durable(&*broker.broker, || self.write_share_record(broker, filter)).await?;
        }
        Ok(())
    }

    /// Makes a session that was kept a holder of its shares, which are returned.
    fn hold(&self, session: &Arc<Session>) -> BTreeSet<Box<str>> {
        let mut passed = self.passed_to_change();
        let (mut filters, _) = session.outbox().shares(true);
        filters.extend(session.shares());
        let mut index = self.index_to_change();
        for filter in &filters {
            index.tree.keep_no_more(filter, session.number);
            let record = passed.shares.by_filter.entry(filter.clone()).or_default();
            record.holders.insert(session.number, session.clone());
        }
        session.outbox().keep_no_more();
        filters
    }

    /// The shares that have records.
    pub fn recorded_shares(&self) -> Vec<Box<str>> {
        self.transfers().shares.by_filter.keys().cloned().collect()
    }

    /// Replaces the record of a share by what its holders hold now, or removes it where it is not needed.
    /// Callers repeat it now and then: a restart sends again what came behind the positions of a record.
    pub fn write_share_record(&self, broker: &Broker, filter: &str) -> Result<Ticket, AppendError> {
        let mut passed = self.passed_to_change();
        passed
            .shares
            .replace(broker, filter, |record| !record.holders.is_empty() && self.members(filter).0 > 0)
    }

    /// The same for all shares that have one.
    pub fn write_share_records(&self, broker: &Broker) -> Result<(), AppendError> {
        self.recorded_shares().iter().try_for_each(|filter| self.write_share_record(broker, filter).map(drop))
    }

    /// Notes a session that was given messages by another member of a share. Returns whether its note
    /// was appended.
    pub(super) fn note_taker(&self, broker: &Broker, taker: &Arc<Session>) -> bool {
        let passed = self.transfers();
        passed.shares.noted(taker);
        let is_noted = taker.try_note(broker).is_ok();
        if !is_noted {
            passed.shares.took(taker);
        }
        is_noted
    }

    /// The members of a share, by number, that can hold messages and whose sessions are not kept.
    fn unkept_members(&self, filter: &str) -> BTreeMap<u64, Arc<Session>> {
        let index = self.index();
        let members = index.tree.share(filter).into_iter().flat_map(|share| &share.members);
        let unkept = members.filter(|member| !member.is_kept && member.options.qos > 0);
        unkept.map(|member| (member.number, member.session.clone())).collect()
    }

    /// Number of members of a share whose sessions are kept, and of those whose are not.
    fn members(&self, filter: &str) -> (usize, usize) {
        self.index().tree.share(filter).map_or((0, 0), |share| (share.kept, share.unkept))
    }
}

/// The shares of which a start found records, and the sessions that are their heirs.
pub type Heirs = Vec<(Box<str>, Arc<Session>)>;

/// The records that a start finds, each for one session that is its heir.
pub struct FoundRecords(HashMap<Box<str>, (Vec<u8>, Option<Heir>)>);

struct Heir {
    session: Arc<Session>,
    epoch: u64,
    options: Options,
    /// When its client was there last.
    last_us: u64,
}

impl FoundRecords {
    /// Reads them from the broker's stream, and removes those that are none.
    pub fn of(stream: &dyn Stream) -> Self {
        let mut found = HashMap::new();
        for (record, value) in stream.state(SHARE) {
            match std::str::from_utf8(&record[SHARE.len()..]) {
                Ok(filter) if is_shared(filter) => _ = found.insert(filter.into(), (value, None)),
                _ => append_unawaited(stream, &[(record, None)]),
            }
        }
        Self(found)
    }

    /// Sees a subscription of a kept session. The heir is a member whose client was there when the host
    /// ended, before all whose clients were away.
    pub fn see(&mut self, session: &Arc<Session>, epoch: u64, filter: &str, options: Options) {
        let Some((_, heir)) = self.0.get_mut(filter).filter(|_| options.qos > 0) else { return };
        let (.., last_us) = session.presence();
        if heir.as_ref().is_none_or(|heir| heir.last_us < last_us) {
            *heir = Some(Heir { session: session.clone(), epoch, options, last_us });
        }
    }

    /// Gives each record to its heir by `give`, with the heir's epoch, and removes those that have none.
    /// Returns the shares with their heirs.
    pub fn give(self, stream: &dyn Stream, mut give: impl FnMut(u64, FoundShare)) -> Heirs {
        let mut given = Vec::new();
        for (filter, (value, heir)) in self.0 {
            match heir {
                Some(Heir { session, epoch, options, .. }) => {
                    give(epoch, FoundShare { filter: Arc::new(filter.clone()), value, options });
                    given.push((filter, session));
                }
                None => append_unawaited(stream, &[(key(&filter), None)]),
            }
        }
        given
    }
}

fn key(filter: &str) -> Vec<u8> {
    [SHARE, filter.as_bytes()].concat()
}
