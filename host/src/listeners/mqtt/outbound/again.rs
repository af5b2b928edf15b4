//! Messages that other members of a share gave to a session, which are out of the order of their
//! streams. If the session's note cannot list all of them, it names the part of each stream in which the
//! others lie. A restart offers the session the messages of the share in that part once more. Messages
//! may be duplicated, but none is lost.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use super::{Place, Queued, Source};

/// Messages that a restart offers to a session again.
#[derive(Default)]
pub struct Again {
    /// The parts of the streams that are offered again, by stream.
    parts: Parts,
    /// The messages in these parts that the session has, by share.
    known: HashMap<Box<str>, HashSet<Place>>,
}

/// A part of each stream.
pub type Parts = Box<[Range<u64>]>;

impl Again {
    /// Returns `None` if all parts are empty. `known` are the messages that the session has.
    pub fn new<'q>(parts: Parts, known: impl Iterator<Item = &'q Queued>) -> Option<Box<Self>> {
        let mut again = Self { parts, known: HashMap::new() };
        if again.is_over() {
            return None;
        }
        for queued in known {
            let (Some(place), Some(share)) = (queued.source.place(), &queued.share) else { continue };
            if again.has(place) {
                match again.known.get_mut(&***share) {
                    Some(known) => _ = known.insert(place),
                    None => _ = again.known.insert((**share).clone(), HashSet::from([place])),
                }
            }
        }
        Some(Box::new(again))
    }

    fn has(&self, place: Place) -> bool {
        self.parts.get(usize::from(place.stream)).is_some_and(|part| part.contains(&place.offset))
    }

    /// Returns the part of a stream in which messages of a share are offered again.
    pub fn part(&self, stream: usize) -> Range<u64> {
        self.parts.get(stream).cloned().unwrap_or_default()
    }

    /// Returns the messages in the parts that the session had received by a share when the host started.
    pub fn known(&self, share: &str) -> HashSet<Place> {
        self.known.get(share).cloned().unwrap_or_default()
    }

    /// Returns the first offset of a stream that is offered again, if any.
    pub fn first(&self, stream: usize) -> Option<u64> {
        Some(self.part(stream)).filter(|part| !part.is_empty()).map(|part| part.start)
    }

    /// Returns whether the message is for the session, although it may lie before the messages for which
    /// the session waits.
    pub fn takes(&self, queued: &Queued) -> bool {
        let (Some(place), Some(share)) = (queued.source.place(), &queued.share) else { return false };
        self.has(place) && !self.known.get(&***share).is_some_and(|known| known.contains(&place))
    }

    /// Records that all messages of a stream below `upto` have been offered again.
    pub fn pass(&mut self, stream: usize, upto: u64) {
        if let Some(part) = self.parts.get_mut(stream) {
            part.start = part.start.max(upto);
        }
    }

    pub fn is_over(&self) -> bool {
        self.parts.iter().all(Range::is_empty)
    }
}

/// Returns the shortest range that covers both.
pub fn union(one: Range<u64>, other: Range<u64>) -> Range<u64> {
    match (one.is_empty(), other.is_empty()) {
        (true, _) => other,
        (_, true) => one,
        _ => one.start.min(other.start)..one.end.max(other.end),
    }
}

/// The parts that a note names, by stream.
pub struct Unlisted(Parts);

impl Unlisted {
    /// Creates the parts. `positions` are those of live delivery, which has offered all messages before
    /// them again.
    pub fn new(again: Option<&Again>, positions: &[u64]) -> Self {
        let part = |(stream, position): (usize, &u64)| {
            let part = again.map_or(0..0, |again| again.part(stream));
            part.start.max(*position)..part.end
        };
        Self(positions.iter().enumerate().map(part).collect())
    }

    /// Adds a message that is not listed.
    pub fn add(&mut self, queued: &Queued) {
        let Source::Stream { stream, offset } = queued.source else { return };
        let part = &mut self.0[usize::from(stream)];
        *part = union(part.clone(), offset..offset + 1);
    }

    pub fn part(&self, stream: usize) -> &Range<u64> {
        &self.0[stream]
    }
}
