//! Batches without the messages that letters have already.

use super::dead_letters::{Refusal, Source};
use super::known::{Piece, Reader, Seen, before_last, index_within_offset};
use crate::batch::{Batch, Entry, Offset, Partition};
use crate::step::Refused;

/// Without the messages that are in letters for the sinks at hand, all of them:
/// they must not pass now, be it that a step has changed.
pub fn without_whole(batch: Batch, seen: &Seen) -> Batch {
    if seen.is_empty() {
        return batch;
    }
    let offset = |entry: &Entry| Offset(batch.base.0 + u64::from(entry.offset));
    batch.filtered(|entry| !seen.has_whole(offset(entry)))
}

/// Without what this step, or the routes, put into letters for the sinks at hand, which are
/// those that the letters name alike. `Some`: the places that the others had
/// within their offsets.
pub fn without_letters(batch: Batch, source: Source<'_>, readers: &[Reader]) -> (Batch, Option<Vec<u32>>) {
    let Some(seen) = readers.first().map(|reader| &reader.seen).filter(|seen| !seen.is_empty()) else {
        return (batch, None);
    };
    let mut indexes = Vec::new();
    let mut entries = Vec::new();
    for (i, entry) in batch.entries.iter().enumerate() {
        let index = index_within_offset(&batch, i);
        if !seen.has(batch.offset(entry), Piece::of(source, index)) {
            indexes.push(index);
            entries.push(*entry);
        }
    }
    if entries.len() == batch.len() {
        return (batch, None);
    }
    (Batch { entries: entries.into(), exclusive: false, ..batch }, Some(indexes))
}

/// A batch as [`without_letters`] left it.
pub struct Stripped<'a> {
    pub batch: &'a Batch,
    pub indexes: Option<Vec<u32>>,
    pub partition: Partition,
}

impl Stripped<'_> {
    /// `refused`: by index, ascending.
    pub fn refusals<'r>(
        &'r self,
        source: Source<'r>,
        refused: &'r [Refused],
        steps: &'r str,
    ) -> Vec<Refusal<'r>> {
        let one = |(k, of): (usize, &'r Refused)| {
            let entry = of.index as usize;
            let before = before_last(self.batch, entry);
            let index = self.indexes.as_ref().map(|indexes| indexes[entry]);
            Refusal {
                message: self.batch.message(entry),
                source,
                kind: of.kind,
                reason: &of.reason,
                partition: self.partition,
                index: index.unwrap_or_else(|| index_within_offset(self.batch, entry)),
                steps,
                alone: before == Some(0),
                closes: before.is_some_and(|n| k >= n && refused[k - n].index as usize == entry - n),
            }
        };
        refused.iter().enumerate().map(one).collect()
    }
}
