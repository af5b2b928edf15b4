//! Finds the dead letters of which a redrive of 0.1.0 did not note whether they were sent.
//!
//! Such a redrive wrote a copy of each letter to the end of the dead letters, together with an empty mark, and then
//! sent the copies, with positions of its own in each sink. If a sink was down, or the process ended, the letters
//! that were not sent were left to the next redrive of that version, and were not listed meanwhile. So an empty mark
//! of a letter that has a copy does not say that the letter was sent. [`take_over`] marks these letters as pending,
//! and the redrive that continues at each start ([`again`](super::again)) sends the copies that no position covers.
//! When it has ended, the marks are not empty any more.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::DeadLettersError;
use super::letter::{Letter, Names};
use super::marks::{Change, MARK_PREFIX, Mark, Pending, mark_key, without_outcome};
use super::redrive::MARKS_MAX;
use crate::batch::Offset;
use crate::stream::{AppendError, Read, StateChange, Stream};

/// Letters that are marked in one append.
const PART: usize = if cfg!(test) { 3 } else { MARKS_MAX };

/// Marks letters of the pipeline with these names as pending whose copies lie at `from` or behind it, at most
/// [`PART`] of them. Returns where the copies of the next part begin; `None`: there are no more, or there is no room
/// for the marks, so that a later start does it. No redrive of the pipeline may run meanwhile.
pub async fn take_over(
    dead_letters: &Arc<dyn Stream>,
    names: &Names,
    from: Offset,
) -> Result<Option<Offset>, DeadLettersError> {
    let letters = without_outcome(&dead_letters.state(MARK_PREFIX));
    let Some(first) = letters.first() else { return Ok(None) };
    let (bounds, mut changes, mut next) = (dead_letters.bounds(), Vec::new(), None);
    let mut cursor = dead_letters.peek(bounds.start.max(from).max(Offset(*first)));
    while next.is_none()
        && cursor.position() < bounds.end
        && let Some(read) = cursor.try_next().await?
    {
        let Read::Batch(batch) = read else { continue };
        for message in batch.messages().filter(|message| message.offset() >= from) {
            let Some(letter) = Letter::of(&message).and_then(|letter| unknown(&letter, &letters, names))
            else {
                continue;
            };
            if changes.len() == PART {
                next = Some(message.offset());
                break;
            }
            changes.push(pending(letter, names));
        }
    }
    append(dead_letters, &changes).await.map(|has_room| next.filter(|_| has_room))
}

/// Returns the offset of the letter if this is its copy and the mark does not say whether it was sent. A copy that
/// names a sink which the pipeline does not have is left out: nobody can say whether that sink got it.
fn unknown(copy: &Letter<'_>, letters: &BTreeSet<u64>, names: &Names) -> Option<u64> {
    let has = |name: &str| names.named(name, copy.at).any(|id| names.number(&id).is_some());
    let of = copy.redrive_of.filter(|of| letters.contains(of) && names.has(copy))?;
    copy.sink_names().into_iter().flatten().all(has).then_some(of)
}

fn pending(letter: u64, names: &Names) -> Change {
    let pending = Pending { pipeline: names.pipeline().to_owned(), ..Pending::default() };
    (mark_key(Offset(letter)), Some(Mark::Pending(pending).bytes()))
}

/// Returns whether there was room.
async fn append(dead_letters: &Arc<dyn Stream>, changes: &[Change]) -> Result<bool, DeadLettersError> {
    if changes.is_empty() {
        return Ok(true);
    }
    let changes: Vec<_> =
        changes.iter().map(|(key, value)| StateChange { key, value: value.as_deref() }).collect();
    loop {
        match dead_letters.append(&[], &changes) {
            Ok(_) => return Ok(true),
            Err(AppendError::NoSpace) => return Ok(false),
            Err(AppendError::Full) => dead_letters.writable().await,
            Err(error) => return Err(error.into()),
        }
    }
}
