//! Closes dead letters that nobody will send again: of a device that sends nonsense, of a part that
//! the host has no more. They are no problem from then on, and no redrive takes them.

use std::collections::BTreeSet;
use std::sync::Arc;

use uuid::Uuid;

use super::letter::Letter;
use super::marks::{MARK_PREFIX, Mark, Marks, Sent, mark_key};
use super::sink_names::{NAMES_PREFIX, SinkNames};
use super::{DeadLettersError, Filter};
use crate::batch::{MessageRef, Offset};
use crate::stream::{AppendError, Read, StateChange, Stream, Ticket};

/// Letters that are closed in one append.
const CLOSED_MAX: usize = 4_096;

/// Closes letters that are open, and those that a redrive has taken and not sent (their sink may be
/// gone for good), of any pipeline where none is named. Returns their number once the marks are
/// durable. No redrive may run meanwhile.
pub async fn discard(
    dead_letters: &Arc<dyn Stream>,
    filter: &Filter,
    pipeline: Option<&str>,
) -> Result<u64, DeadLettersError> {
    let marks = Marks::read(&dead_letters.state(MARK_PREFIX));
    let names = SinkNames::read(&dead_letters.state(NAMES_PREFIX));
    let is_wanted = |message: &MessageRef<'_>| {
        let is_closed = marks.get(message.offset().0) == Some(&Mark::Sent);
        !is_closed && Letter::of(message).is_some_and(|letter| fits(filter, pipeline, &names, &letter))
    };
    let mut letters = Vec::new();
    let end = dead_letters.bounds().end;
    let mut cursor = dead_letters.peek(dead_letters.bounds().start);
    while cursor.position() < end
        && let Some(read) = cursor.try_next().await?
    {
        let Read::Batch(batch) = read else { continue };
        letters.extend(batch.messages().filter(is_wanted).map(|message| message.offset().0));
    }
    let mut last = Ticket::default();
    for letters in letters.chunks(CLOSED_MAX) {
        // No pass sent them, and no database must have them.
        let mut changes = Sent::records(Uuid::nil(), "", &BTreeSet::new(), None, letters);
        let own = letters.iter().filter(|letter| marks.get(**letter).is_some());
        changes.extend(own.map(|letter| (mark_key(Offset(*letter)), None)));
        let changes: Vec<_> =
            changes.iter().map(|(key, value)| StateChange { key, value: value.as_deref() }).collect();
        last = loop {
            match dead_letters.append(&[], &changes) {
                Ok(appended) => break appended.ticket,
                Err(AppendError::Full) => dead_letters.writable().await,
                Err(error) => return Err(error.into()),
            }
        };
    }
    if last > Ticket::default() && dead_letters.durable().wait_for(|ticket| *ticket >= last).await.is_err() {
        return Err(AppendError::Stopped(dead_letters.stopped().await).into());
    }
    Ok(letters.len() as u64)
}

fn fits(filter: &Filter, pipeline: Option<&str>, names: &SinkNames, letter: &Letter<'_>) -> bool {
    !letter.is_copy()
        && pipeline.is_none_or(|pipeline| letter.pipeline == pipeline)
        && filter
            .sink
            .as_deref()
            .is_none_or(|sink| letter.sink.is_some_and(|by| names.is_same(sink, by, letter.at)))
        && filter.step.as_deref().is_none_or(|step| letter.step == Some(step))
        && filter.ids.as_ref().is_none_or(|ids| ids.contains(&Offset(letter.at)))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use super::*;
    use crate::pipeline::tests::harness::{Act, World, chain, sorted, step, text};
    use crate::pipeline::{OpenLetters, list_open};

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_letter_that_is_discarded_is_no_problem_and_is_not_sent_also_after_a_restart() {
        let world = World::new(2, &[("default", "w")]);
        world.database("w").refuse(|_| Some("not JSON".to_owned()));
        let process = world.start(chain(1, &[])).await;
        world.publish_many(5, 0, 10);
        process.drained().await;
        let mut letters = OpenLetters::new(Arc::clone(&world.dead));
        assert_eq!(letters.look().await.unwrap()["p"].letters, 10);
        let ids = |ids: &[u64]| Filter {
            ids: Some(ids.iter().copied().map(Offset).collect()),
            ..Filter::default()
        };
        let other = Filter { sink: Some("x".to_owned()), ..Filter::default() };
        assert_eq!(process.handle.discard(&other, None).await.unwrap(), Some(0));
        assert_eq!(process.handle.discard(&ids(&[3, 4, 99]), Some("q")).await.unwrap(), Some(0));
        assert_eq!(process.handle.discard(&ids(&[3, 4, 99]), Some("p")).await.unwrap(), Some(2));
        assert_eq!(process.handle.discard(&ids(&[3, 4]), None).await.unwrap(), Some(0), "they are closed");
        assert_eq!(letters.look().await.unwrap()["p"].letters, 8);
        assert_eq!(world.dead.state(MARK_PREFIX).len(), 1, "one record for all");
        process.stop().await;

        world.database("w").refuse(|_| None);
        let process = world.start(chain(1, &[])).await;
        process.until("steps", |status| status.chain.is_some()).await;
        assert_eq!(OpenLetters::new(Arc::clone(&world.dead)).look().await.unwrap()["p"].letters, 8);
        process.handle.redrive(&Filter::default()).await.unwrap();
        assert_eq!(world.payloads("w").len(), 8);
        // What the sink's database has is looked at between redrives, too.
        let held = loop {
            match process.handle.without_redrives() {
                Some(held) => break held,
                None => process.looked_after().await,
            }
        };
        assert_eq!(
            process.handle.discard(&Filter::default(), None).await.unwrap(),
            None,
            "not beside a redrive"
        );
        drop(held);
        process.stop().await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_letter_that_waits_for_a_sink_that_is_gone_can_be_discarded() {
        let world = World::new(1, &[("default", "w other")]);
        let process = world.start(chain(1, &[step("check", |_, _| Act::Refuse("no".to_owned()))])).await;
        world.publish_many(1, 0, 3);
        process.drained().await;
        process.stop().await;
        let mut fewer = World { config: World::new(1, &[("default", "w")]).config, ..world.clone() };
        fewer.databases.remove("other");
        let process = fewer.start(chain(1, &[step("check", |_, _| Act::Pass)])).await;
        process.until("steps", |status| status.chain.is_some()).await;
        let summary = process.handle.redrive(&Filter::default()).await.unwrap();
        assert_eq!((summary.sent, summary.letters.pending), (3, 3));
        assert_eq!(process.handle.discard(&Filter::default(), None).await.unwrap(), Some(3));
        assert_eq!(OpenLetters::new(Arc::clone(&world.dead)).look().await.unwrap().len(), 0);
        process.stop().await;
        // The sink that is back gets none of them.
        let process = world.start(chain(1, &[step("check", |_, _| Act::Pass)])).await;
        process.drained().await;
        process.until("steps", |status| status.chain.is_some()).await;
        assert_eq!(process.handle.redrive(&Filter::default()).await.unwrap().sent, 0);
        assert_eq!((world.payloads("w").len(), world.payloads("other").len()), (3, 0));
        process.stop().await;
    }

    /// A step makes two messages of one, and a sink or another step rejects both: each has a letter of its own.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn letters_of_one_message_are_decided_apart_whichever_is_first_and_over_restarts() {
        for case in 0..8 {
            let [discards_first, restarts, by_step] = [1, 2, 4].map(|bit| case & bit != 0);
            let world = World::new(1, &[("default", "w")]);
            let is_broken = Arc::new(AtomicBool::new(true));
            let steps = || {
                let n = Arc::new(AtomicUsize::new(0));
                let numbered = step("number", move |message, _| {
                    Act::Payload(format!("{} {}", text(message), n.fetch_add(1, Ordering::Relaxed) % 2))
                });
                let is_broken = Arc::clone(&is_broken);
                let check = step("check", move |_, _| match by_step && is_broken.load(Ordering::Acquire) {
                    true => Act::Refuse("no".to_owned()),
                    false => Act::Pass,
                });
                chain(1, &[step("split", |_, _| Act::Times(2)), numbered, check])
            };
            let refuses = Arc::clone(&is_broken);
            world.database("w").refuse(move |_| {
                (!by_step && refuses.load(Ordering::Acquire)).then(|| "no column".to_owned())
            });
            let mut process = world.start(steps()).await;
            world.publish_many(1, 0, 3);
            process.drained().await;
            let open = || async { list_open(&*world.dead, Some("p")).await.unwrap() };
            let letters = open().await;
            assert_eq!(letters.len(), 6);
            is_broken.store(false, Ordering::Release);
            // Of the first message one letter is sent and the other discarded; of the second one is sent.
            let decide = [(letters[0], true), (letters[1], false), (letters[3], true)];
            let mut decide = decide.to_vec();
            if discards_first {
                decide.swap(0, 1);
            }
            for (number, (letter, is_sent)) in decide.into_iter().enumerate() {
                let filter = Filter { ids: Some(vec![letter]), ..Filter::default() };
                if is_sent {
                    assert_eq!(process.handle.redrive(&filter).await.unwrap().sent, 1);
                } else {
                    let discarded = loop {
                        match process.handle.discard(&filter, None).await.unwrap() {
                            Some(discarded) => break discarded,
                            None => process.looked_after().await,
                        }
                    };
                    assert_eq!(discarded, 1);
                }
                assert_eq!(open().await.len(), 5 - number, "letter {letter:?} alone is decided");
                if restarts {
                    process.stop().await;
                    process = world.start(steps()).await;
                    process.until("steps", |status| status.chain.is_some()).await;
                    assert_eq!(open().await.len(), 5 - number, "after a restart");
                }
            }
            assert_eq!(open().await, [letters[2], letters[4], letters[5]]);
            let mut counted = OpenLetters::new(Arc::clone(&world.dead));
            assert_eq!(counted.look().await.unwrap()["p"].letters, 3);
            assert_eq!(process.handle.redrive(&Filter::default()).await.unwrap().sent, 3);
            assert_eq!(process.handle.redrive(&Filter::default()).await.unwrap().sent, 0);
            let rows = ["d0:0 0", "d0:1 0", "d0:1 1", "d0:2 0", "d0:2 1"];
            assert_eq!(sorted(world.payloads("w")), rows, "all but the discarded one, each once");
            // Nor does the pipeline write it, which reads the message again where it restarts.
            process.stop().await;
            let process = world.start(steps()).await;
            world.publish_many(1, 3, 1);
            process.drained().await;
            assert_eq!(world.payloads("w").len(), rows.len() + 2);
            process.stop().await;
        }
    }
}
