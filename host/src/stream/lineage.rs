//! A reader's position in a log, in a form that can be compared with any copy of that log.
//!
//! A data folder is restored from a backup, a machine is cloned, or a disk loses the end of a file. Then
//! two logs with one UUID have different messages at the same offset, and an offset alone is not enough.
//! A [`Lineage`] lists the openings of which the reader has received messages, each with how far, as
//! followers compare leader epochs with their leader (KIP-101, KIP-320). Entries for copies of which the
//! log has nothing are kept, so that a reader that returns to such a copy is recognised there too.

use std::fmt;

use super::Opening;
use crate::batch::Offset;

/// Most openings of a lineage. A backup that is older than the oldest of them cannot be distinguished
/// from a log of which nothing was delivered.
const ENTRIES_MAX: usize = 1_024;

/// The openings whose messages were delivered. Empty if they were not recorded, as in positions of
/// Headworks 0.1.0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lineage {
    /// The last entry is the opening that wrote the message before the position.
    entries: Vec<Entry>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    opening: u64,
    /// Everything that the opening wrote below this offset was delivered. 0 if only the position tells,
    /// as for the last entry, unless a copy was delivered further than the position.
    until: Offset,
}

impl Lineage {
    /// Returns the position of a reader in the log with these `openings`, whose first stored message is
    /// `start`. `next` is its position in the log that it read last. No message of this log below the
    /// result is new to the reader, and none at or above it was delivered.
    ///
    /// Messages that the log cannot attribute to an opening (of 0.1.0, or older than the openings that
    /// it remembers) are taken for delivered as far as `next` says. If the lineage is empty, this
    /// applies to everything that was in the log before this process.
    pub fn locate(&self, next: Offset, openings: &[Opening], start: Offset) -> Offset {
        for (i, opening) in openings.iter().enumerate().rev() {
            if let Some(until) = self.until(opening.id, next) {
                // Everything before an opening that was delivered in part was delivered.
                return until.min(end(openings, i));
            }
        }
        let limit = match openings {
            [Opening { id: Opening::UNKNOWN, .. }, second, ..] => second.first,
            [.., current] if !self.knows_any() => current.first,
            [oldest, ..] => oldest.first.max(start),
            [] => start,
        };
        next.min(limit)
    }

    /// Returns the lineage of a reader that has everything in a log with these openings, now and as long
    /// as the last of them writes.
    pub fn of_all(openings: &[Opening]) -> Self {
        Self::default().moved(openings, Offset(0), Offset(u64::MAX)).unwrap_or_default()
    }

    /// Returns up to which offset the log with these `openings`, whose first stored message is `start`,
    /// is the log of which [`Lineage::of_all`] returned this lineage: the messages at lower offsets are
    /// the same.
    pub fn common(&self, openings: &[Opening], start: Offset) -> Offset {
        self.locate(Offset(u64::MAX), openings, start)
    }

    /// Returns the lineage of a position that moves from `from` to `to` in a log with these openings;
    /// `None` if it is unchanged.
    pub fn moved(&self, openings: &[Opening], from: Offset, to: Offset) -> Option<Self> {
        let tip = openings.iter().rev().find(|opening| opening.first < to).map(|opening| opening.id);
        let tip = match tip {
            Some(id) => id,
            None if to.0 == 0 && self.entries.is_empty() => return None,
            None => Opening::UNKNOWN,
        };
        let last = self.entries.last().copied();
        if last.is_some_and(|last| last.opening == tip) && from <= to {
            return None;
        }
        let mut moved = self.clone();
        if let Some(last) = last {
            moved.deliver(last.opening, from);
        }
        // Nobody wrote down what was delivered before.
        let from = if last.is_some() { from } else { Offset(0) };
        for (i, opening) in openings.iter().enumerate() {
            if opening.first < to && end(openings, i) > from && opening.id != tip {
                moved.deliver(opening.id, end(openings, i));
            }
        }
        let before = moved.entries.iter().position(|entry| entry.opening == tip);
        let tip =
            before.map_or(Entry { opening: tip, until: Offset(0) }, |place| moved.entries.remove(place));
        moved.entries.push(tip);
        let gone = moved.entries.len().saturating_sub(ENTRIES_MAX);
        moved.entries.drain(..gone);
        (moved != *self).then_some(moved)
    }

    /// Parses the output of [`fmt::Display`], if there is any.
    pub fn read(text: Option<&str>) -> Option<Self> {
        text.map_or(Some(Self::default()), Self::parse)
    }

    fn parse(text: &str) -> Option<Self> {
        let entry = |text: &str| {
            let (opening, until) = text.split_once(':').unwrap_or((text, "0"));
            let opening = u64::from_str_radix(opening, 16).ok()?;
            Some(Entry { opening, until: Offset(until.parse().ok()?) })
        };
        Some(Self { entries: text.split_ascii_whitespace().map(entry).collect::<Option<_>>()? })
    }

    /// Returns how far the messages of an opening were delivered.
    fn until(&self, opening: u64, next: Offset) -> Option<Offset> {
        if opening == Opening::UNKNOWN {
            return None;
        }
        let place = self.entries.iter().position(|entry| entry.opening == opening)?;
        let until = self.entries[place].until;
        Some(if place + 1 == self.entries.len() { until.max(next) } else { until })
    }

    fn knows_any(&self) -> bool {
        self.entries.iter().any(|entry| entry.opening != Opening::UNKNOWN)
    }

    fn deliver(&mut self, opening: u64, until: Offset) {
        match self.entries.iter_mut().find(|entry| entry.opening == opening) {
            Some(entry) => entry.until = entry.until.max(until),
            None => self.entries.push(Entry { opening, until }),
        }
    }
}

/// Returns the offset after the last message of an opening.
fn end(openings: &[Opening], of: usize) -> Offset {
    openings.get(of + 1).map_or(Offset(u64::MAX), |next| next.first)
}

/// `00000000000001f3:1200 5c0f3b7a9d21e466`: ids and how far, oldest first.
impl fmt::Display for Lineage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, Entry { opening, until }) in self.entries.iter().enumerate() {
            let space = if i == 0 { "" } else { " " };
            write!(f, "{space}{opening:016x}")?;
            if until.0 > 0 {
                write!(f, ":{}", until.0)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
