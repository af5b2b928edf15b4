//! Messages that non-persistent members of a shared subscription hold are only in memory. While the
//! share has a persistent member too, the broker's stream has a record of the share, so that after a
//! restart these messages can be given to a session:
//!
//! - `sh` + filter: up to where all non-persistent members had been offered the messages of each stream,
//!   which earlier messages they held, and the part of each stream with held messages for which the
//!   record has no room. A restart gives the listed messages to one session, the heir. Lanes offer the
//!   unlisted part and all later messages once more to the members at that time, and the record stays
//!   until they have. Messages may be duplicated, but none is lost.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;

use super::again::{Parts, union};
use super::kept::{self, Before, Reader, put_entry, put_parts};
use super::{Ids, Outbox, Place, Queued, Restored, ShareFilter, is_unacknowledged_by_share};
use crate::listeners::mqtt::subscriptions::Options;
use crate::stream::Identity;

pub const SHARE: &[u8] = b"sh";

/// First byte of a record. Not that of notes: one whose notes get another format must read the records
/// that are on disks.
pub(super) const FORMAT: u8 = 3;

/// Least bytes of a message in a record.
const LISTED_BYTES: usize = 5;

/// Messages that members of a share hold, as far as a record has room for them.
pub struct Holdings {
    /// A position for each stream: all earlier messages have been offered to the members. It is read
    /// before the outboxes are examined.
    positions: Box<[u64]>,
    /// The messages that have waited longest, by time and place.
    listed: BTreeMap<(u64, Place), Queued>,
    bytes_max: usize,
    /// The parts in which the other messages lie.
    unlisted: Parts,
}

impl Holdings {
    pub fn new(positions: Box<[u64]>, bytes_max: usize) -> Self {
        let unlisted = positions.iter().map(|_| 0..0).collect();
        Self { positions, listed: BTreeMap::new(), bytes_max, unlisted }
    }

    /// Adds a message that a member holds.
    pub fn add(&mut self, place: Place, queued: &Queued) {
        if place.offset < self.positions[usize::from(place.stream)] {
            self.list(place, queued);
        }
    }

    /// Adds a part of a stream that members are still to be offered.
    pub fn add_part(&mut self, stream: usize, part: Range<u64>) {
        self.unlisted[stream] = union(self.unlisted[stream].clone(), part);
    }

    fn list(&mut self, place: Place, queued: &Queued) {
        let key = (queued.since_us, place);
        if self.listed.len() >= self.bytes_max / LISTED_BYTES {
            if self.listed.last_key_value().is_none_or(|(last, _)| key > *last) {
                cover(&mut self.unlisted, place);
                return;
            }
            if let Some(((_, last), _)) = self.listed.pop_last() {
                cover(&mut self.unlisted, last);
            }
        }
        // The record's key names the share.
        let listed = Queued { body: None, ids: Ids::None, share: None, ..queued.clone() };
        self.listed.insert(key, listed);
    }

    /// Returns the record.
    pub fn into_value(mut self, streams: &[Identity]) -> Vec<u8> {
        let (mut entries, mut before) = (Vec::new(), Before::default());
        for ((_, place), queued) in &self.listed {
            let mark = (entries.len(), before);
            put_entry(&mut entries, &mut before, queued, 0);
            if entries.len() > self.bytes_max {
                entries.truncate(mark.0);
                before = mark.1;
                cover(&mut self.unlisted, *place);
            }
        }
        let mut value = vec![FORMAT];
        put_parts(&mut value, streams, &self.positions, |stream| self.unlisted[stream].clone());
        value.extend(entries);
        value
    }
}

/// Returns the format of notes that have parts and entries as a record of this format has them.
pub(super) fn layout(format: u8) -> Option<u8> {
    (format == FORMAT).then_some(kept::FORMAT)
}

fn cover(parts: &mut Parts, place: Place) {
    let part = &mut parts[usize::from(place.stream)];
    *part = union(part.clone(), place.offset..place.offset + 1);
}

impl Outbox {
    /// Returns the messages that other members of shares are to receive if this session no longer
    /// exists, by share and place.
    pub fn held_by_shares(&self) -> impl Iterator<Item = (&ShareFilter, Place, &Queued)> {
        let inflight = self.inflight.iter().filter(|flight| is_unacknowledged_by_share(flight));
        let inflight = inflight.filter_map(|flight| flight.waiting.as_ref());
        let queue = self.queue.iter().filter(|queued| queued.qos > 0);
        let held = inflight.chain(queue);
        #[cfg(test)]
        let held = held.inspect(|_| visits::add());
        held.filter_map(|queued| Some((queued.share.as_ref()?, queued.source.place()?, queued)))
    }

    /// Returns the messages of shares that are queued, or in flight before their PUBREC.
    pub fn places_by_shares(&self) -> impl Iterator<Item = (&ShareFilter, Place)> {
        let inflight = self.inflight.iter().filter_map(|flight| flight.waiting.as_ref());
        inflight
            .chain(&self.queue)
            .filter_map(|queued| Some((queued.share.as_ref()?, queued.source.place()?)))
    }
}

/// The messages that a session has, by the share through which it received them.
pub type KnownByShare = HashMap<ShareFilter, HashSet<Place>>;

/// A record that a restart found.
pub struct FoundShare {
    pub filter: ShareFilter,
    pub value: Vec<u8>,
    /// Options with which its heir has subscribed.
    pub options: Options,
}

impl Restored {
    /// Gives the session the messages that a record of a share lists and that the session does not have.
    /// Returns the parts of the streams with messages that the record does not list. `ends` are the ends
    /// of the streams; messages from `valid` on differ from those that were recorded.
    pub(super) fn inherit(
        &mut self,
        found: &FoundShare,
        number: &dyn Fn(&[u8]) -> Option<u16>,
        ends: &[u64],
        valid: &[u64],
        known: &KnownByShare,
    ) -> Parts {
        let mut parts: Parts = ends.iter().map(|_| 0..0).collect();
        // Ends where the record does not go on.
        let _ = self.read_record(found, number, ends, valid, known, &mut parts);
        parts
    }

    /// Returns the messages that the session has, by share.
    pub(super) fn known_by_share(&self) -> KnownByShare {
        let mut known = KnownByShare::new();
        let own = self.inflight.iter().filter_map(|flight| flight.waiting.as_ref()).chain(&self.queue);
        for queued in own {
            if let (Some(share), Some(place)) = (&queued.share, queued.source.place()) {
                known.entry(share.clone()).or_default().insert(place);
            }
        }
        known
    }

    fn read_record(
        &mut self,
        found: &FoundShare,
        number: &dyn Fn(&[u8]) -> Option<u16>,
        ends: &[u64],
        valid: &[u64],
        known: &KnownByShare,
        parts: &mut Parts,
    ) -> Option<()> {
        let mut record = Reader(&found.value);
        let layout = layout(record.byte()?)?;
        let streams = record.parts(layout, number)?;
        for (stream, upto, unlisted) in &streams {
            let Some(stream) = stream.map(usize::from) else { continue };
            let unlisted = unlisted.start..unlisted.end.min(valid[stream]);
            parts[stream] = union(unlisted, (*upto).min(valid[stream])..ends[stream]);
        }
        let streams: Vec<Option<u16>> = streams.into_iter().map(|(stream, ..)| stream).collect();
        let known = known.get(&found.filter);
        let is_known = |place: &Place| known.is_some_and(|known| known.contains(place));
        let mut before = Before::default();
        while !record.0.is_empty() {
            let (queued, _) = record.entry(layout, &mut before, &streams, &|_, _| None)?;
            let queued = queued.filter(|queued| queued.source.place().is_none_or(|place| !is_known(&place)));
            self.queue.extend(queued.map(|queued| Queued {
                qos: queued.qos.min(found.options.qos),
                retain: queued.retain && found.options.retain_as_published,
                ids: Ids::one(found.options.id),
                share: Some(found.filter.clone()),
                apart: true,
                may_be_again: true,
                ..queued
            }));
        }
        Some(())
    }
}

/// Counts the queue entries that this thread examines for records of shares.
#[cfg(test)]
pub mod visits {
    use std::cell::Cell;

    thread_local! {
        static COUNT: Cell<usize> = const { Cell::new(0) };
    }

    pub fn add() {
        COUNT.set(COUNT.get() + 1);
    }

    /// Returns the count since the last call.
    pub fn take() -> usize {
        COUNT.take()
    }
}
