//! Takes away what the state of the dead letters says of letters that retention has removed, and texts of
//! reasons that no mark names any more.
//!
//! The redrives of other pipelines go on meanwhile. Under the lock of the reasons nobody takes a letter, or
//! notes a reason, between the look at the marks and the append that removes some; a reason that was noted
//! before, and whose mark is not appended yet, stays.

use std::sync::Arc;

use super::DeadLettersError;
use super::marks::{MARK_PREFIX, Mark, Marks, Pending, mark_key, records};
use super::reasons::{self, KeptReasons};
use super::redrive::MARKS_MAX;
use crate::batch::Offset;
use crate::stream::{AppendError, StateChange, Stream};

/// What a key is of that is to be removed.
enum Of {
    /// A letter that a redrive had taken, and not sent.
    Lost,
    Gone,
    Reason(u64),
}

/// Returns how many of the letters whose marks are taken away a redrive of the pipeline with these names had
/// taken, and not sent. Where there is no room, a later call does the rest.
pub async fn forget_marks(
    dead_letters: &Arc<dyn Stream>,
    pipelines: &[String],
    reasons: &KeptReasons,
) -> Result<u64, DeadLettersError> {
    let mut lost = 0;
    loop {
        match forget(&**dead_letters, pipelines, reasons, &mut lost) {
            Ok(()) | Err(AppendError::NoSpace) => return Ok(lost),
            Err(AppendError::Full) => dead_letters.writable().await,
            Err(error) => return Err(error.into()),
        }
    }
}

fn forget(
    dead_letters: &dyn Stream,
    pipelines: &[String],
    reasons: &KeptReasons,
    lost: &mut u64,
) -> Result<(), AppendError> {
    let mut change = reasons.change();
    let start = dead_letters.bounds().start;
    let state = dead_letters.state(MARK_PREFIX);
    let marks = Marks::read(&state);
    let mut keys = Vec::new();
    for (offset, mark) in marks.own().filter(|(offset, _)| *offset < start.0) {
        let of = match mark {
            // Its copy may be there.
            Mark::Pending(Pending { pass: None, .. }) => continue,
            // Its own pipeline tells of it.
            Mark::Pending(pending) if !pipelines.contains(&pending.pipeline) => continue,
            Mark::Pending(_) => Of::Lost,
            Mark::Sent | Mark::Open { .. } => Of::Gone,
        };
        keys.push((mark_key(Offset(offset)), of));
    }
    let unused = change.unused(marks.own().map(|(_, mark)| mark.tries()));
    keys.extend(unused.into_iter().map(|reason| (reasons::key(reason), Of::Reason(reason))));
    let gone = records(&state).filter(|sent| sent.letters.bounds().end <= start.0);
    keys.extend(gone.map(|sent| (sent.key(), Of::Gone)));
    for keys in keys.chunks(MARKS_MAX) {
        let removed: Vec<_> = keys.iter().map(|(key, _)| StateChange { key, value: None }).collect();
        dead_letters.append(&[], &removed)?;
        for (_, of) in keys {
            match of {
                Of::Lost => *lost += 1,
                Of::Reason(reason) => change.forget(*reason),
                Of::Gone => {}
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::pipeline::marks::{Change, Reopened};
    use crate::pipeline::reasons::{Noted, Reasons, Tries, hash};
    use crate::stream::conformance::message;
    use crate::stream::memory::MemoryStream;

    fn append(stream: &MemoryStream, changes: &[Change]) {
        let changes: Vec<_> =
            changes.iter().map(|(key, value)| StateChange { key, value: value.as_deref() }).collect();
        stream.append(&[], &changes).unwrap();
    }

    /// The mark of a letter that was rejected again.
    fn open(letter: u64, tries: Tries) -> Change {
        let sinks = BTreeSet::from(["w".to_owned()]);
        let mark = Mark::Open { sinks, why: Reopened::Rejected(tries), to: None };
        (mark_key(Offset(letter)), Some(mark.bytes()))
    }

    fn pending(letter: u64, pipeline: &str) -> Change {
        let pass = Some(uuid::Uuid::from_u128(1));
        let pending = Pending { pipeline: pipeline.to_owned(), pass, ..Pending::default() };
        (mark_key(Offset(letter)), Some(Mark::Pending(pending).bytes()))
    }

    /// Another pipeline's redrive begins at any moment between the note of a reason and its mark.
    #[tokio::test]
    async fn the_reason_of_a_letter_is_kept_whenever_another_redrive_begins() {
        for moment in 0..4 {
            let memory = MemoryStream::with_hooks("dead-letters", 1);
            let stream = Arc::clone(&memory) as Arc<dyn Stream>;
            let kept = Arc::new(KeptReasons::of(&*stream));
            let begin = async |at| {
                if moment == at {
                    forget_marks(&stream, &["other".to_owned()], &kept).await.unwrap();
                }
            };
            let mut noted = Noted::new(&kept);
            begin(0).await;
            let tries = noted.note(Tries::default(), false, "column 2: too long", hash("column 1"));
            begin(1).await;
            append(&memory, &[vec![open(3, tries)], noted.changes().collect()].concat());
            begin(2).await;
            drop(noted);
            begin(3).await;
            let marks = Marks::read(&stream.state(MARK_PREFIX));
            let tries = marks.get(3).unwrap().tries();
            assert_eq!(marks.reasons().text(tries), Some("column 2: too long"), "{moment}");
            // No mark names it any more.
            append(&memory, &[(mark_key(Offset(3)), None)]);
            forget_marks(&stream, &["other".to_owned()], &kept).await.unwrap();
            assert_eq!(Reasons::read(&stream.state(MARK_PREFIX)).len(), 0, "{moment}");
            assert_eq!(kept.change().unused(std::iter::empty()), Vec::<u64>::new());
        }
    }

    #[tokio::test]
    async fn marks_of_letters_that_are_gone_go_but_for_those_that_another_pipeline_has_to_tell_of() {
        let memory = MemoryStream::with_hooks("dead-letters", 1);
        let stream = Arc::clone(&memory) as Arc<dyn Stream>;
        let kept = KeptReasons::of(&*stream);
        memory.append(&[message("a/b", b"x"); 9], &[]).unwrap();
        let marks = [pending(1, "p"), pending(2, "q"), open(3, Tries::default()), pending(8, "p")];
        append(&memory, &marks);
        memory.trim(Offset(5));
        let left = || Marks::read(&stream.state(MARK_PREFIX)).own().map(|(at, _)| at).collect::<Vec<_>>();
        // A full buffer is waited for, and each letter is counted once.
        memory.set_buffer_full(true);
        let pipelines = ["p".to_owned()];
        let (lost, ()) = tokio::join!(forget_marks(&stream, &pipelines, &kept), async {
            memory.refused().await;
            memory.set_buffer_full(false);
        });
        assert_eq!((lost.unwrap(), left()), (1, vec![2, 8]));
        assert_eq!(forget_marks(&stream, &pipelines, &kept).await.unwrap(), 0);
        memory.set_no_space(true);
        assert_eq!(forget_marks(&stream, &["q".to_owned()], &kept).await.unwrap(), 0, "it is told later");
        memory.set_no_space(false);
        assert_eq!(forget_marks(&stream, &["q".to_owned()], &kept).await.unwrap(), 1);
        assert_eq!(left(), [8]);
    }
}
