//! Messages that other members of a share gave to a session lie out of the order of their streams. Where
//! its note cannot list all of them it names the part of each stream in which the others lie, and a
//! restart offers the session what came by a share there once more: messages may come again, none is
//! lost.

use std::collections::HashSet;
use std::ops::Range;

use super::{Place, Queued, ShareFilter, Source};

/// What a restart offers a session again.
#[derive(Default)]
pub struct Again {
    /// The parts of its streams that are offered again, by stream.
    parts: Box<[Range<u64>]>,
    /// What the session has of them.
    known: HashSet<(Place, ShareFilter)>,
}

impl Again {
    /// `None` where all parts are empty. `known`: what the session has.
    pub fn new<'q>(parts: Box<[Range<u64>]>, known: impl Iterator<Item = &'q Queued>) -> Option<Box<Self>> {
        if parts.iter().all(Range::is_empty) {
            return None;
        }
        let known = known.filter_map(|queued| Some((queued.source.place()?, queued.share.clone()?)));
        let known = known.filter(|(place, _)| parts[usize::from(place.stream)].contains(&place.offset));
        Some(Box::new(Self { known: known.collect(), parts }))
    }

    /// First offset of a stream that is offered again, if any is.
    pub fn first(&self, stream: usize) -> Option<u64> {
        self.parts.get(stream).filter(|part| !part.is_empty()).map(|part| part.start)
    }

    /// Whether the message is for the session, though it may lie before what the session waits for.
    pub fn takes(&self, queued: &Queued) -> bool {
        let (Some(place), Some(share)) = (queued.source.place(), &queued.share) else { return false };
        let is_part = self.parts.get(usize::from(place.stream)).is_some_and(|it| it.contains(&place.offset));
        is_part && !self.known.contains(&(place, share.clone()))
    }

    /// All of a stream below `upto` has been offered again.
    pub fn pass(&mut self, stream: usize, upto: u64) {
        if let Some(part) = self.parts.get_mut(stream) {
            part.start = part.start.max(upto);
        }
    }

    pub fn is_over(&self) -> bool {
        self.parts.iter().all(Range::is_empty)
    }
}

/// The parts that a note names, by stream.
pub struct Unlisted(Box<[Range<u64>]>);

impl Unlisted {
    /// `positions`: of the live delivery, which has offered all before them again.
    pub fn new(again: Option<&Again>, positions: &[u64]) -> Self {
        let part = |(stream, position): (usize, &u64)| {
            let part = again.and_then(|again| again.parts.get(stream)).cloned().unwrap_or_default();
            part.start.max(*position)..part.end
        };
        Self(positions.iter().enumerate().map(part).collect())
    }

    /// A message that is not listed.
    pub fn add(&mut self, queued: &Queued) {
        let Source::Stream { stream, offset } = queued.source else { return };
        let part = &mut self.0[usize::from(stream)];
        *part = match part.is_empty() {
            true => offset..offset + 1,
            false => part.start.min(offset)..part.end.max(offset + 1),
        };
    }

    pub fn part(&self, stream: usize) -> &Range<u64> {
        &self.0[stream]
    }
}
