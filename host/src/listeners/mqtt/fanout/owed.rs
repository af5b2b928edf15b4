//! Messages that lanes are still to offer to the members of shares, whichever sessions are members then.
//!
//! A lane offers a session that a restart found behind the messages that its note does not cover. If the
//! session leaves a share first, the other members are owed these messages. They are also owed messages
//! that the record of a share does not list. The lane gives each such message to one member, unless a
//! session that catches up takes it anyway. Until then the record of the share names the parts in which
//! these messages lie, so that no crash loses one.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Lane, Live, Passed};
use crate::listeners::mqtt::outbound::{Parts, Place, ShareFilter, union};
use crate::listeners::mqtt::session::Session;
use crate::listeners::mqtt::subscriptions::Options;

/// Messages that the members of one share are owed.
pub struct Owed {
    streams: Box<[OfStream]>,
    /// Messages in its parts that a member already has.
    known: HashSet<Place>,
}

/// The part of one stream.
#[derive(Clone, Default)]
struct OfStream {
    /// The lane that offers the part.
    lane: u8,
    /// The parts for messages published with QoS 1, and with QoS 2.
    parts: [Range<u64>; 2],
}

impl OfStream {
    fn is_empty(&self) -> bool {
        self.parts.iter().all(Range::is_empty)
    }

    fn has_all(&self, other: &Self) -> bool {
        let has = |(one, other): (&Range<u64>, &Range<u64>)| {
            other.is_empty() || one.start <= other.start && other.end <= one.end
        };
        self.parts.iter().zip(&other.parts).all(has)
    }
}

impl Owed {
    fn new(streams: impl Iterator<Item = OfStream>) -> Self {
        Self { streams: streams.collect(), known: HashSet::new() }
    }

    fn parts(&self, stream: usize) -> &[Range<u64>; 2] {
        &self.streams[stream].parts
    }

    /// Returns the first owed offset of a stream, if there is one.
    pub(super) fn first(&self, stream: usize) -> Option<u64> {
        let parts = self.parts(stream).iter().filter(|part| !part.is_empty());
        parts.map(|part| part.start).min()
    }

    pub(super) fn set_lane(&mut self, stream: usize, lane: u8) {
        self.streams[stream].lane = lane;
    }

    /// Returns whether a message that a lane has reached, published with this QoS, is to be offered.
    pub(super) fn has(&self, place: Place, lane: u8, qos: u8) -> bool {
        let stream = &self.streams[usize::from(place.stream)];
        let Some(part) = stream.parts.get(usize::from(qos.wrapping_sub(1))) else { return false };
        stream.lane == lane && part.contains(&place.offset) && !self.known.contains(&place)
    }

    /// Returns the parts of streams that the lanes have not reached yet.
    pub(super) fn left<'o>(&'o self, live: &'o Live) -> impl Iterator<Item = (usize, Range<u64>)> + use<'o> {
        let part = |(number, stream): (usize, &'o OfStream)| {
            let lane = live.streams[number].lane(stream.lane)?;
            let at = lane.position.load(Ordering::Acquire);
            let end = stream.parts.iter().filter(|part| !part.is_empty()).map(|part| part.end).max()?;
            let start = self.first(number)?.max(at);
            (start < end).then_some((number, start..end))
        };
        self.streams.iter().enumerate().filter_map(part)
    }

    /// Merges another entry, if this adds no other message. Returns whether it did.
    pub(super) fn merge(&mut self, other: &Self) -> bool {
        let streams = || self.streams.iter().zip(&other.streams);
        let is_alike = |(one, other): (&OfStream, &OfStream)| {
            let mut parts = one.parts.iter().zip(&other.parts);
            let is_whole = |(one, other): (&Range<u64>, &Range<u64>)| {
                one.is_empty() || other.is_empty() || one.start <= other.end && other.start <= one.end
            };
            (one.is_empty() || other.is_empty() || one.lane == other.lane) && parts.all(is_whole)
        };
        let has_all = self.known == other.known || streams().all(|(one, other)| one.has_all(other));
        let is_merged = has_all && self.known.is_subset(&other.known) && streams().all(is_alike);
        if is_merged {
            for (one, other) in self.streams.iter_mut().zip(&other.streams).filter(|(_, it)| !it.is_empty()) {
                one.lane = other.lane;
                for (part, other) in one.parts.iter_mut().zip(&other.parts) {
                    *part = union(part.clone(), other.clone());
                }
            }
        }
        is_merged
    }

    /// Extends the parts to the messages from `from` on, and for QoS 2 from `from_qos_2` on.
    fn cover(&mut self, stream: usize, from: u64, from_qos_2: u64) {
        for (part, from) in self.streams[stream].parts.iter_mut().zip([from, from_qos_2]) {
            part.end = part.end.min(from);
        }
    }
}

/// What a start found about a share.
pub struct Found {
    pub filter: Box<str>,
    /// The session that received the messages listed in the share's record.
    pub heir: Arc<Session>,
    /// Messages that the record does not list.
    pub owed: Owed,
}

impl Found {
    /// Returns the shares that have a record, with their heirs and what they are owed. `parts` names
    /// where the unlisted messages lie. `subscriptions` and `sessions` are all that the start found.
    pub fn of<'s>(
        shares: Vec<(Box<str>, Arc<Session>)>,
        parts: &HashMap<ShareFilter, Parts>,
        subscriptions: &[(Arc<Session>, String, Options)],
        sessions: impl Iterator<Item = &'s Arc<Session>>,
    ) -> Vec<Self> {
        let mut found: HashMap<Box<str>, (Arc<Session>, Owed)> = HashMap::new();
        for (filter, heir) in shares {
            let parts = parts.get(&filter).map_or(&[][..], |parts| parts);
            let of_stream = |part: &Range<u64>| OfStream { lane: 0, parts: [part.clone(), part.clone()] };
            found.insert(filter, (heir, Owed::new(parts.iter().map(of_stream))));
        }
        for (session, filter, options) in subscriptions {
            let Some((_, owed)) = found.get_mut(&**filter).filter(|_| options.qos > 0) else { continue };
            let outbox = session.outbox();
            for stream in 0..owed.streams.len() {
                let from = outbox.from(stream);
                owed.cover(stream, from, outbox.begins_with_qos(stream, options.qos));
            }
        }
        for session in sessions {
            for (share, place) in session.outbox().places_by_shares() {
                if let Some((_, owed)) = found.get_mut(&***share)
                    && owed.parts(place.stream.into()).iter().any(|part| part.contains(&place.offset))
                {
                    owed.known.insert(place);
                }
            }
        }
        found.into_iter().map(|(filter, (heir, owed))| Self { filter, heir, owed }).collect()
    }
}

impl Live {
    /// Records that a session leaves a share, or subscribes to it with QoS 0: messages of the share that
    /// lanes were still to offer to the session are owed to the other members. No message is delivered
    /// meanwhile.
    pub(super) fn owe(&self, passed: &mut Passed, session: &Arc<Session>, filter: &str, options: Options) {
        if options.qos == 0 || !session.is_behind() {
            return;
        }
        let outbox = session.outbox();
        let of_streams = |part: &dyn Fn(usize, u64) -> [Range<u64>; 2]| {
            Owed::new(self.streams.iter().enumerate().map(|(number, tail)| {
                let lane = session.lane(number);
                match tail.lane(lane) {
                    Some(Lane { position, .. }) => {
                        OfStream { lane, parts: part(number, position.load(Ordering::Acquire)) }
                    }
                    None => OfStream::default(),
                }
            }))
        };
        let own = of_streams(&|stream, at| {
            let end = self.streams[stream].begun_at;
            let from = outbox.from(stream).max(at);
            [from..end, outbox.begins_with_qos(stream, options.qos).max(at)..end]
        });
        let mut again = of_streams(&|stream, at| {
            let part = outbox.again_in(stream);
            let part = part.start.max(at)..part.end;
            [part.clone(), part]
        });
        again.known = outbox.known_again(filter);
        let is_kept = outbox.is_kept();
        drop(outbox);
        let owed = [own, again].into_iter().filter(|owed| owed.left(self).next().is_some());
        if passed.shares.owe(filter, owed) && is_kept {
            // The session's notes still say that it is to be offered them.
            passed.shares.await_record(filter, session);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owed(lane: u8, part: Range<u64>, known: &[u64]) -> Owed {
        let mut owed = Owed::new([OfStream { lane, parts: [part.clone(), part] }].into_iter());
        owed.known = known.iter().map(|offset| Place { stream: 0, offset: *offset }).collect();
        owed
    }

    #[test]
    fn what_many_sessions_leave_is_merged_where_nothing_else_comes_with_it() {
        let offered = |one: &Owed, lane| {
            let has = |offset: &u64| one.has(Place { stream: 0, offset: *offset }, lane, 1);
            (0..30).filter(has).collect::<Vec<u64>>()
        };
        let mut one = owed(1, 10..20, &[]);
        for from in (0..20).rev() {
            assert!(one.merge(&owed(1, from..20, &[])));
            assert_eq!(offered(&one, 1), (from.min(10)..20).collect::<Vec<_>>());
        }
        assert!(one.merge(&owed(1, 3..9, &[5])), "it offers more than that");
        assert!(!one.merge(&owed(2, 0..20, &[])), "another lane offers it");
        assert!(!one.merge(&owed(1, 22..25, &[])), "there is a gap");
        let mut knows = owed(1, 0..20, &[5]);
        assert!(!knows.merge(&owed(1, 0..20, &[])), "the other one has not had it");
        assert_eq!(offered(&knows, 1).len(), 19);
        assert!(!owed(1, 0..10, &[]).merge(&owed(1, 5..20, &[15])));
    }
}
