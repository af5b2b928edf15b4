//! What members of shared subscriptions hold whose sessions end with their connections is in memory
//! only. The note of another member, whose session is kept, lists it too, so that a restart has
//! a session to give it to.

use std::collections::BTreeMap;
use std::ops::Range;

use super::again::Unlisted;
use super::{Ids, Outbox, Place, Queued, ShareFilter, is_unacknowledged_by_share};
use crate::listeners::mqtt::subscriptions::Options;

/// What a note is made of beside the outbox.
pub struct NoteScope {
    /// By stream: all messages below have been offered to the session. Read before the outbox is
    /// locked, and before `unkept` is looked up.
    pub positions: Box<[u64]>,
    pub bytes_max: usize,
    /// `None` where the session notes nothing for others.
    pub unkept: Option<Unkept>,
}

/// What a session notes for other members of its shares.
pub struct Unkept {
    /// The messages that have waited longest, by the time since when, their places, and the order in
    /// which they were found.
    listed: BTreeMap<(u64, Place, usize), Queued>,
    listed_max: usize,
    found: usize,
    /// By stream: where the others lie.
    unlisted: Box<[Range<u64>]>,
}

impl NoteScope {
    /// The scope of a session that notes nothing for others.
    pub fn new(positions: Box<[u64]>, bytes_max: usize) -> Self {
        Self { positions, bytes_max, unkept: None }
    }

    /// Adds to `unlisted` the messages of others that are not listed.
    pub(super) fn add_unlisted(&self, unlisted: &mut Unlisted) {
        for (stream, part) in self.unkept.iter().flat_map(|unkept| unkept.unlisted.iter().enumerate()) {
            unlisted.cover(stream, part.clone());
        }
    }

    /// Returns the messages of others that are listed.
    pub(super) fn listed(&self) -> impl Iterator<Item = &Queued> {
        self.unkept.iter().flat_map(|unkept| unkept.listed.values())
    }

    /// Returns what lies from the positions up to `upto`, where the note goes that far: another member
    /// may have been given messages of it since that one was looked at.
    pub(super) fn since(&self, stream: usize, upto: u64) -> Range<u64> {
        if self.unkept.is_some() { self.positions[stream]..upto } else { 0..0 }
    }
}

impl Unkept {
    /// At most `listed_max` messages are listed one by one.
    pub fn new(streams: usize, listed_max: usize) -> Self {
        Self { listed: BTreeMap::new(), listed_max, found: 0, unlisted: vec![0..0; streams].into() }
    }

    /// Adds what `outbox` holds by `share` of the streams below `positions`. A restart finds the rest
    /// in the streams. `options`: with which it is to be delivered.
    pub fn add(&mut self, outbox: &Outbox, share: &ShareFilter, options: Options, positions: &[u64]) {
        let inflight = outbox.inflight.iter().filter(|flight| is_unacknowledged_by_share(flight));
        let inflight = inflight.filter_map(|flight| flight.waiting.as_ref());
        let queue = outbox.queue.iter().filter(|queued| queued.qos > 0);
        for queued in inflight.chain(queue) {
            if let (Some(place), Some(by)) = (queued.source.place(), &queued.share)
                && place.offset < positions[usize::from(place.stream)]
                && by == share
            {
                self.add_one(queued, place, options);
            }
        }
    }

    fn add_one(&mut self, queued: &Queued, place: Place, options: Options) {
        self.found += 1;
        let key = (queued.since_us, place, self.found);
        if self.listed.len() == self.listed_max {
            if self.listed.last_key_value().is_none_or(|(last, _)| key > *last) {
                self.cover(place);
                return;
            }
            if let Some(((_, last, _), _)) = self.listed.pop_last() {
                self.cover(last);
            }
        }
        let qos = queued.qos.min(options.qos);
        let retain = queued.retain && options.retain_as_published;
        let ids = Ids::one(options.id);
        self.listed.insert(key, Queued { body: None, ids, qos, retain, apart: true, ..queued.clone() });
    }

    fn cover(&mut self, place: Place) {
        let part = &mut self.unlisted[usize::from(place.stream)];
        *part = union(part.clone(), place.offset..place.offset + 1);
    }
}

/// Returns the shortest range that covers both.
pub(super) fn union(one: Range<u64>, other: Range<u64>) -> Range<u64> {
    match (one.is_empty(), other.is_empty()) {
        (true, _) => other,
        (_, true) => one,
        _ => one.start.min(other.start)..one.end.max(other.end),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::listeners::mqtt::outbound::{QueueLimits, Source, WhenFull};

    const OPTIONS: Options = Options { qos: 1, no_local: false, retain_as_published: false, id: 7 };

    fn holding(offsets: Range<u64>, share: &ShareFilter) -> Outbox {
        let mut outbox = Outbox::default();
        outbox.begin(Box::new([0]), None);
        outbox.resume();
        let limits = QueueLimits { messages_max: 1_000, bytes_max: 1 << 20, when_full: WhenFull::Refuse };
        for offset in offsets {
            let queued = Queued {
                source: Source::Stream { stream: 0, offset },
                body: None,
                since_us: 1_000_000 * offset,
                len: 1,
                qos: 2,
                retain: true,
                apart: false,
                may_be_again: false,
                ids: Ids::None,
                share: Some(share.clone()),
            };
            outbox.offer(queued, limits, || None);
        }
        outbox
    }

    #[test]
    fn what_waits_longest_is_listed_one_by_one_and_the_rest_is_a_part_of_the_stream_behind_it() {
        let (share, other): (ShareFilter, ShareFilter) =
            (Arc::new("$share/g/a".into()), Arc::new("$share/h/a".into()));
        let mut scope = NoteScope::new(Box::new([500]), 1 << 10);
        let mut unkept = Unkept::new(1, 10);
        for held in [holding(300..400, &share), holding(3..8, &share), holding(490..600, &share)] {
            unkept.add(&held, &share, OPTIONS, &scope.positions);
            unkept.add(&held, &other, OPTIONS, &scope.positions);
        }
        scope.unkept = Some(unkept);
        let offset = |queued: &Queued| queued.source.place().map(|place| place.offset).unwrap();
        let listed: Vec<u64> = scope.listed().map(offset).collect();
        assert_eq!(listed, [3, 4, 5, 6, 7, 300, 301, 302, 303, 304]);
        let mut unlisted = Unlisted::new(None, &scope.positions);
        scope.add_unlisted(&mut unlisted);
        assert_eq!(*unlisted.part(0), 305..500);
        // As the member is given messages that lists them.
        assert!(scope.listed().all(|it| (it.qos, it.retain, it.apart, it.own_id()) == (1, false, true, 7)));
    }
}
