//! Records of shares that have both persistent and non-persistent members: see
//! [`outbound::Holdings`](crate::listeners::mqtt::outbound::Holdings).
//!
//! No note lists what a non-persistent session holds. A share has a record before such a session
//! receives the first message beside a persistent member. From then on the record covers what the
//! non-persistent sessions hold, whichever notes are written. It is replaced only by a record that lists
//! what they hold at that moment, and only after the notes of the sessions that received some of it.
//! When a persistent session gives messages to a non-persistent one, the record is replaced before the
//! note that lists them. The record also names what lanes are still to offer to the members (`owed`).
//!
//! A record that is refused for want of room is [`Pending`]. Until it is written, no note omits, and no
//! end of a session removes, messages that would then be in no record.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLockWriteGuard};

use super::owed::{Found, Owed};
use super::{Live, Passed, Subscription};
use crate::listeners::mqtt::acks::Stopped;
use crate::listeners::mqtt::lock_order::Locked;
use crate::listeners::mqtt::outbound::{FoundShare, Holdings, Place, SHARE, note_bytes_max};
use crate::listeners::mqtt::session::Session;
use crate::listeners::mqtt::subscriptions::{Options, is_shared};
use crate::listeners::mqtt::{Broker, append_unawaited};
use crate::stream::{AppendError, StateChange, Stream, Ticket};

/// Records that are made without a break, while no message moves between members and no session joins a
/// share. The queues of the holders are walked once for all of them.
pub const RECORDS_AT_ONCE: usize = 4_096;
/// Approximate number of bytes of records in one append.
const AT_ONCE_BYTES: usize = 1 << 20;

/// The shares that have or need a record, and what must be written before other changes.
pub(super) struct ShareRecords {
    by_filter: BTreeMap<Box<str>, Record>,
    pending: Mutex<Pending>,
}

/// Changes that notes and records do not contain yet.
#[derive(Default)]
struct Pending {
    /// Persistent sessions whose notes do not yet list messages that others gave them. A session is
    /// added after it received the messages, and removed before it is noted.
    takers: BTreeMap<u64, Arc<Session>>,
    /// Shares whose records do not yet cover what members hold or are owed, each with the sessions that
    /// may not append a change of that filter before.
    due: BTreeMap<Box<str>, BTreeMap<u64, Arc<Session>>>,
    /// Sessions whose notes list messages that they gave to others, because the others' notes and
    /// records do not list them yet.
    givers: BTreeMap<u64, Arc<Session>>,
}

#[derive(Default)]
struct Record {
    /// Non-persistent members, and former ones that still hold messages of the share. A session is added
    /// when it joins, or when the record begins.
    holders: BTreeMap<u64, Arc<Session>>,
    /// Messages that lanes are still to offer to the members.
    owed: Vec<Owed>,
    /// The record in the broker's stream, if there is one.
    written: Option<Vec<u8>>,
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.takers.is_empty() && self.due.is_empty() && self.givers.is_empty()
    }

    /// Marks the record of a share as written, or as not needed.
    fn written(&mut self, filter: &str) {
        let waiting = self.due.remove(filter).unwrap_or_default();
        waiting.values().for_each(|session| session.outbox().record_written(filter));
    }
}

impl ShareRecords {
    /// Creates the records that a start found.
    pub fn of(found: Vec<Found>) -> Self {
        let takers = found.iter().map(|share| (share.heir.number, share.heir.clone())).collect();
        let record = |owed| Record { owed: vec![owed], written: Some(Vec::new()), ..Record::default() };
        let by_filter = found.into_iter().map(|share| (share.filter, record(share.owed))).collect();
        Self { by_filter, pending: Mutex::new(Pending { takers, ..Pending::default() }) }
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pending_mut(&mut self) -> &mut Pending {
        self.pending.get_mut().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a session received messages from another, or messages that it was owed.
    pub fn took(&self, taker: &Arc<Session>) {
        if taker.outbox().is_kept() {
            self.pending().takers.insert(taker.number, taker.clone());
        }
    }

    fn noted(&self, taker: &Session) {
        self.pending().takers.remove(&taker.number);
    }

    /// Notes that a persistent session gave messages of a share to a non-persistent one. Its notes list
    /// them until the record does.
    pub fn gave(&self, filter: &str) {
        let mut pending = self.pending();
        if !pending.due.contains_key(filter) {
            pending.due.insert(filter.into(), BTreeMap::new());
        }
    }

    /// Makes `giver` list in its notes what it gives, until nothing is pending.
    pub fn lists(&self, giver: &Arc<Session>) {
        self.pending().givers.insert(giver.number, giver.clone());
    }

    /// Makes the change of a filter by `session` wait for the record of the share.
    pub fn await_record(&mut self, filter: &str, session: &Arc<Session>) {
        session.outbox().await_record(filter);
        let waiting = self.pending_mut().due.entry(filter.into()).or_default();
        waiting.insert(session.number, session.clone());
    }

    /// Returns whether members are owed a message that a lane has reached.
    pub fn owes(&self, filter: &str, place: Place, lane: u8, qos: u8) -> bool {
        self.by_filter.get(filter).is_some_and(|record| record.owed.iter().any(|it| it.has(place, lane, qos)))
    }

    /// Adds what members of a share are owed. Returns whether it is anything.
    pub fn owe(&mut self, filter: &str, owed: impl Iterator<Item = Owed>) -> bool {
        let mut is_any = false;
        for owed in owed {
            let record = self.by_filter.entry(filter.into()).or_default();
            // Of many sessions that leave, or one that does again and again, it is one.
            if !record.owed.iter_mut().any(|known| known.merge(&owed)) {
                record.owed.push(owed);
            }
            is_any = true;
        }
        is_any
    }

    /// Notes the sessions that received messages, so that records need not list these any more.
    fn note_takers(&mut self, broker: &Broker) -> Result<(), AppendError> {
        let takers = &mut self.pending_mut().takers;
        while let Some(taker) = takers.first_entry() {
            taker.get().try_note(broker)?;
            taker.remove();
        }
        Ok(())
    }

    /// Writes everything that is pending.
    fn settle(&mut self, broker: &Broker) -> Result<(), AppendError> {
        let due: Vec<Box<str>> = self.pending_mut().due.keys().cloned().collect();
        self.replace(broker, &due, Record::is_needed)?;
        let givers = std::mem::take(&mut self.pending_mut().givers);
        givers.values().for_each(|giver| giver.outbox().passed_on());
        Ok(())
    }

    /// Replaces records by what their holders hold now and their members are owed, or removes those that
    /// are not needed. `is_needed` receives the number of persistent members.
    fn replace(
        &mut self,
        broker: &Broker,
        filters: &[Box<str>],
        is_needed: impl Fn(&Record, usize) -> bool,
    ) -> Result<Ticket, AppendError> {
        let is_written = |filter: &&str| self.by_filter.get(*filter).is_some_and(|it| it.written.is_some());
        let (written, new): (Vec<&str>, Vec<_>) =
            filters.iter().map(|filter| &**filter).partition(is_written);
        // A new one says no less than was said before.
        let begun = self.write(broker, &new, &is_needed);
        let replaced = match self.note_takers(broker) {
            Ok(()) => self.write(broker, &written, &is_needed),
            Err(error) => {
                // Also while nothing can be appended: sessions would be remembered for ever that come and end.
                self.gather(broker, &written);
                Err(error)
            }
        };
        Ok(begun?.max(replaced?))
    }

    fn write(
        &mut self,
        broker: &Broker,
        filters: &[&str],
        is_needed: &impl Fn(&Record, usize) -> bool,
    ) -> Result<Ticket, AppendError> {
        let mut held = self.gather(broker, filters);
        let (mut some, mut bytes, mut ticket) = (Vec::new(), 0, Ticket::default());
        for filter in filters {
            let Some(record) = self.by_filter.get(*filter) else {
                // No member can hold what a restart would have somebody to give to.
                self.pending_mut().written(filter);
                continue;
            };
            let held = held.remove(filter).filter(|_| is_needed(record, broker.live.members(filter).0));
            let value = held.map(|held| held.holdings.into_value(&broker.identities));
            bytes += filter.len() + value.as_ref().map_or(0, Vec::len);
            some.push((*filter, value));
            if bytes >= AT_ONCE_BYTES {
                ticket = self.append(broker, std::mem::take(&mut some))?;
                bytes = 0;
            }
        }
        Ok(ticket.max(self.append(broker, some)?))
    }

    /// Appends the records that have changed, and removes those that are no longer needed.
    fn append(
        &mut self,
        broker: &Broker,
        records: Vec<(&str, Option<Vec<u8>>)>,
    ) -> Result<Ticket, AppendError> {
        let is_changed = |(filter, value): &&(&str, Option<Vec<u8>>)| {
            self.by_filter.get(*filter).is_some_and(|record| record.written != *value)
        };
        let changed: Vec<_> =
            records.iter().filter(is_changed).map(|(filter, value)| (key(filter), value)).collect();
        let changes: Vec<_> =
            changed.iter().map(|(key, value)| StateChange { key, value: value.as_deref() }).collect();
        let mut ticket = Ticket::default();
        if !changes.is_empty() {
            ticket = broker.broker.append(&[], &changes)?.ticket;
        }
        for (filter, value) in records {
            self.pending_mut().written(filter);
            let Some(record) = self.by_filter.get_mut(filter) else { continue };
            record.written = value;
            if record.written.is_none() && !record.has_any() {
                self.by_filter.remove(filter);
            }
        }
        Ok(ticket)
    }

    /// Makes the non-persistent members holders, and removes former holders. An ending session is a
    /// member, and receives messages, until it is removed from the index. Returns what the holders of
    /// each share hold, for which each queue is walked once.
    fn gather<'f>(&mut self, broker: &Broker, filters: &[&'f str]) -> HashMap<&'f str, Held> {
        let bytes_max = note_bytes_max(broker.sessions.len() + self.by_filter.len());
        let mut sessions: BTreeMap<u64, Arc<Session>> = BTreeMap::new();
        let mut held: HashMap<&str, Held> = HashMap::new();
        // Read before the outboxes: what lies behind may have been given to any of them since.
        let live = broker.live.live_positions(broker);
        for &filter in filters {
            let Some(record) = self.by_filter.get_mut(filter) else { continue };
            let members = broker.live.unkept_members(filter);
            let holds = members.keys().copied().collect();
            record.holders.extend(members);
            record.owed.retain(|owed| owed.left(&broker.live).next().is_some());
            let mut holdings = Holdings::new(record.positions(broker, &live), bytes_max);
            let parts = record.owed.iter().flat_map(|owed| owed.left(&broker.live));
            parts.for_each(|(stream, part)| holdings.add_part(stream, part));
            sessions.extend(record.holders.iter().map(|(number, session)| (*number, session.clone())));
            held.insert(filter, Held { holdings, holders: holds });
        }
        for (number, session) in &sessions {
            let outbox = session.outbox();
            if outbox.is_kept() {
                continue;
            }
            for (share, place, queued) in outbox.held_by_shares() {
                if let Some(held) = held.get_mut(&***share) {
                    held.holdings.add(place, queued);
                    held.holders.insert(*number);
                }
            }
        }
        for (filter, held) in &held {
            if let Some(record) = self.by_filter.get_mut(*filter) {
                record.holders.retain(|number, _| held.holders.contains(number));
            }
        }
        held
    }
}

/// What the holders of a share hold, and the holders.
struct Held {
    holdings: Holdings,
    holders: BTreeSet<u64>,
}

impl Record {
    /// Returns whether the record may have to list or name anything.
    fn has_any(&self) -> bool {
        !self.holders.is_empty() || !self.owed.is_empty()
    }

    /// Returns whether the share needs a record. `kept` is the number of persistent members.
    fn is_needed(&self, kept: usize) -> bool {
        self.has_any() && kept > 0
    }

    /// Returns a position for each stream: all earlier messages have been offered to the holders. `live`
    /// are the positions for sessions created since the host started. A session that a restart found may
    /// still be behind when it stops being persistent.
    fn positions(&self, broker: &Broker, live: &[u64]) -> Box<[u64]> {
        let mut positions: Box<[u64]> = live.into();
        for holder in self.holders.values().filter(|holder| holder.is_behind()) {
            let offered = broker.live.positions_of(broker, holder);
            positions
                .iter_mut()
                .zip(offered)
                .for_each(|(position, offered)| *position = offered.min(*position));
        }
        positions
    }
}

impl Live {
    /// Ensures that the shares among the filters have records before `session` joins them, if they need
    /// one then. No other session joins a share until the guard is dropped. A record for which there is
    /// no room is pending.
    pub(super) fn join_shares(
        &self,
        broker: &Broker,
        session: &Arc<Session>,
        subscriptions: &[Subscription],
    ) -> Option<Locked<RwLockWriteGuard<'_, Passed>>> {
        if !subscriptions.iter().any(|one| one.filter.is_shared()) {
            return None;
        }
        let mut passed = self.passed_to_change();
        let shares = &mut passed.shares;
        let is_kept = session.outbox().is_kept();
        let joined = subscriptions.iter().filter(|one| one.filter.is_shared() && one.options.qos > 0);
        let joined = joined.map(|one| one.filter.as_str());
        let new = joined.clone().filter(|filter| self.needs_record(shares, filter, is_kept));
        let new: Vec<Box<str>> = new.map(Into::into).collect();
        new.iter().for_each(|filter| _ = shares.by_filter.entry(filter.clone()).or_default());
        if !new.is_empty() && shares.replace(broker, &new, |_, _| true).is_err() {
            for filter in &new {
                match is_kept {
                    true => shares.await_record(filter, session),
                    false => shares.gave(filter),
                }
            }
        }
        if !is_kept {
            for filter in joined {
                // A record that is not needed now may be again before it is replaced.
                if let Some(record) = shares.by_filter.get_mut(filter) {
                    record.holders.insert(session.number, session.clone());
                }
            }
        }
        Some(passed)
    }

    /// Returns whether a share needs a record that it does not have, once a persistent or non-persistent
    /// session joins it.
    fn needs_record(&self, shares: &ShareRecords, filter: &str, is_kept: bool) -> bool {
        let (kept, unkept) = self.members(filter);
        let record = shares.by_filter.get(filter);
        let has_any = || record.is_some_and(Record::has_any);
        let is_needed = if is_kept { unkept > 0 || has_any() } else { kept > 0 };
        let is_written = || record.is_some_and(|record| record.written.is_some());
        is_needed && (!is_written() || shares.pending().due.contains_key(filter))
    }

    /// Makes a session end with its connection from now on. Returns once the records of its shares that
    /// list what it holds are durable; only then may its own notes be removed.
    pub async fn keep_no_more(&self, broker: &Broker, session: &Arc<Session>) -> Result<(), Stopped> {
        let filters: Vec<Box<str>> = self.hold(session).into_iter().collect();
        for some in filters.chunks(RECORDS_AT_ONCE) {
            broker.durable(&*broker.broker, || self.write_share_records_of(broker, some)).await?;
        }
        Ok(())
    }

    /// Makes a formerly persistent session a holder of its shares, which are returned.
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

    /// Returns the shares that have records.
    pub fn recorded_shares(&self) -> Vec<Box<str>> {
        self.transfers().shares.by_filter.keys().cloned().collect()
    }

    /// Replaces the records of some shares by what their holders hold now, or removes those that are not
    /// needed. This is repeated regularly, because a restart sends again the messages behind the
    /// positions of a record.
    pub fn write_share_records_of(
        &self,
        broker: &Broker,
        filters: &[Box<str>],
    ) -> Result<Ticket, AppendError> {
        self.passed_to_change().shares.replace(broker, filters, Record::is_needed)
    }

    /// Replaces the records of all shares that have one.
    pub fn write_share_records(&self, broker: &Broker) -> Result<(), AppendError> {
        self.settle(broker)?;
        let filters = self.recorded_shares();
        filters
            .chunks(RECORDS_AT_ONCE)
            .try_for_each(|some| self.write_share_records_of(broker, some).map(drop))
    }

    /// Writes what notes and records do not contain yet. If this is refused for want of room, a session
    /// that gave messages away, or that left a share, must not be removed from the broker's stream.
    pub fn settle(&self, broker: &Broker) -> Result<(), AppendError> {
        let is_settled = self.transfers().shares.pending().is_empty();
        match broker.broker.lack() {
            _ if is_settled => Ok(()),
            // Not tried for each session that ends meanwhile.
            Some(_) => Err(AppendError::NoSpace),
            None => self.passed_to_change().shares.settle(broker),
        }
    }

    /// Notes a session that received messages from another member of a share.
    pub(super) fn note_taker(&self, broker: &Broker, taker: &Arc<Session>) {
        let passed = self.transfers();
        passed.shares.noted(taker);
        if taker.try_note(broker).is_err() {
            passed.shares.took(taker);
        }
    }

    /// Returns the non-persistent members of a share that can hold messages, by number.
    fn unkept_members(&self, filter: &str) -> BTreeMap<u64, Arc<Session>> {
        let index = self.index();
        let members = index.tree.share(filter).into_iter().flat_map(|share| &share.members);
        let unkept = members.filter(|member| !member.is_kept && member.options.qos > 0);
        unkept.map(|member| (member.number, member.session.clone())).collect()
    }

    /// Returns the numbers of persistent and of non-persistent members of a share.
    fn members(&self, filter: &str) -> (usize, usize) {
        self.index().tree.share(filter).map_or((0, 0), |share| (share.kept, share.unkept))
    }
}

/// The records that a start finds, each for one session that is its heir.
pub struct FoundRecords(HashMap<Box<str>, (Vec<u8>, Option<Heir>)>);

struct Heir {
    session: Arc<Session>,
    epoch: u64,
    options: Options,
    /// When the client was last connected.
    last_us: u64,
}

impl FoundRecords {
    /// Reads the records from the broker's stream, and removes invalid ones.
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

    /// Considers a subscription of a persistent session. The heir is a member whose client was connected
    /// when the host ended; if there is none, it is another member.
    pub fn see(&mut self, session: &Arc<Session>, epoch: u64, filter: &str, options: Options) {
        let Some((_, heir)) = self.0.get_mut(filter).filter(|_| options.qos > 0) else { return };
        let (.., last_us) = session.presence();
        if heir.as_ref().is_none_or(|heir| heir.last_us < last_us) {
            *heir = Some(Heir { session: session.clone(), epoch, options, last_us });
        }
    }

    /// Passes each record to its heir with `give`, together with the heir's epoch, and removes records
    /// without an heir. Returns the shares with their heirs.
    pub fn give(
        self,
        stream: &dyn Stream,
        mut give: impl FnMut(u64, FoundShare),
    ) -> Vec<(Box<str>, Arc<Session>)> {
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
