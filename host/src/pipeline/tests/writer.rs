//! What a writer promises of each row, whatever the sink and the dead letters do.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::batch::{Batch, Entry, Offset, Span};
use crate::pipeline::dead_letters::DeadLetters;
use crate::pipeline::letter::Names;
use crate::pipeline::writer::{Failed, Writer};
use crate::pipeline::{Letter, claim_of};
use crate::sinks::Rows;
use crate::sinks::memory::{Fault, MemoryDatabase};
use crate::stream::memory::MemoryStream;
use crate::stream::{Delivered, Read, Stream};
use crate::telemetry::Failures;

struct World {
    database: MemoryDatabase,
    source: Arc<dyn Stream>,
    dead: Arc<dyn Stream>,
    letters: Arc<DeadLetters>,
    writer: Writer,
}

impl World {
    async fn new(share: u64) -> Self {
        let database = MemoryDatabase::default();
        let dead: Arc<dyn Stream> = MemoryStream::with_hooks("dead-letters", 1);
        let source = MemoryStream::new("telemetry", 1);
        let names = Names::new(vec!["p".to_owned()], vec!["w".to_owned()], Arc::default());
        let letters = DeadLetters::open(Arc::clone(&dead), names, &*source, share, None).await;
        let letters = Arc::new(letters.unwrap());
        let claim = claim_of(&["p".to_owned()], &["w".to_owned()], source.identity());
        let sink = Box::new(database.sink());
        let mut writer = Writer::new(Some(sink), 0, claim, &letters, Failures::default());
        writer.pace.hold_max = Duration::from_millis(1);
        writer.open(&*source, Delivered::ToNobody).await.unwrap();
        Self { database, source, dead, letters, writer }
    }

    /// Tries until all is written, as a delivery does. Returns the tries that failed.
    async fn write(&mut self, rows: &mut Rows, upto: u64) -> usize {
        for failed in 0..100 {
            match self.writer.write(rows, &[Offset(upto)]).await {
                Ok(()) => return failed,
                Err(Failed::Later { .. }) => self.reopen().await,
                Err(Failed::Stop(reason)) => panic!("{reason}"),
            }
        }
        panic!("no end of it");
    }

    async fn reopen(&mut self) {
        self.writer.open(&*self.source, Delivered::ToNobody).await.unwrap();
        self.letters.forget_below(0, self.writer.positions[0]);
    }

    fn written(&self) -> Vec<u64> {
        self.database.rows().iter().map(|row| row.offset.0).collect()
    }

    /// Offsets of the messages that have a letter, one for each letter.
    async fn rejected(&self) -> Vec<u64> {
        let mut cursor = self.dead.cursor(Offset(0));
        let mut rejected = Vec::new();
        while let Some(read) = cursor.try_next().await.unwrap() {
            let Read::Batch(batch) = read else { continue };
            rejected.extend(batch.messages().map(|letter| Letter::of(&letter).unwrap().offset));
        }
        rejected
    }
}

/// So many rows for each offset.
fn rows(offsets: u32, of_each: usize) -> Rows {
    let entry = |offset| Entry { offset, topic: Span::new(0, 0, 3), ..Entry::default() };
    let entries = (0..offsets).flat_map(|offset| std::iter::repeat_n(entry(offset), of_each)).collect();
    let mut rows = Rows::default();
    rows.push_batch(Batch { segments: vec![Bytes::from_static(b"a/b")], entries, ..Batch::default() });
    rows
}

#[tokio::test]
async fn rows_whose_letters_do_not_fit_into_the_share_become_letters_by_and_by() {
    let mut world = World::new(2_000).await;
    world.database.refuse(|message| (message.offset().0 % 10 != 0).then(|| "no".to_owned()));
    let failed = world.write(&mut rows(1_000, 1), 1_000).await;
    assert!(failed > 0, "all fitted at once");
    assert_eq!(world.written(), (0..1_000).step_by(10).collect::<Vec<_>>());
    assert_eq!(world.rejected().await, (0..1_000).filter(|offset| offset % 10 != 0).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_row_whose_transaction_was_given_up_for_want_of_room_is_a_row_or_a_letter_once() {
    for of_each in [1, 3] {
        let mut world = World::new(2_000).await;
        world.database.refuse(|_| Some("no".to_owned()));
        let mut waiting = rows(1_000, of_each);
        let failed = world.writer.write(&mut waiting, &[Offset(1_000)]).await.unwrap_err();
        assert!(
            matches!(&failed, Failed::Later { reason, .. } if reason.contains("wait for room")),
            "{failed:?}"
        );
        let before = world.rejected().await.len();
        assert!(before > 0 && before < 1_000 * of_each, "{before}");
        // The table is mended: what has no letter becomes a row.
        world.database.refuse(|_| None);
        world.reopen().await;
        world.write(&mut waiting, 1_000).await;
        let mut all = world.rejected().await;
        assert_eq!(all.len(), before);
        all.extend(world.written());
        all.sort_unstable();
        let expected = (0..1_000).flat_map(|offset| std::iter::repeat_n(offset, of_each));
        assert_eq!(all, expected.collect::<Vec<_>>());
    }
}

/// No position lies between the rows of a message: its letters find room together, or never.
#[tokio::test]
async fn a_message_whose_rejected_rows_exceed_the_share_becomes_letters_all_the_same() {
    let mut world = World::new(2_000).await;
    world.database.refuse(|message| (message.offset().0 == 1).then(|| "no".to_owned()));
    world.write(&mut rows(3, 100), 3).await;
    assert_eq!(world.rejected().await, [1; 100]);
    assert_eq!(world.written(), [vec![0; 100], vec![2; 100]].concat());
}

#[tokio::test]
async fn a_message_that_is_too_much_by_itself_is_tried_again_slowly() {
    for of_each in [1, 2, 5] {
        let mut world = World::new(1 << 20).await;
        let faults = || Fault::TooMuch("statement timeout".to_owned());
        world.database.fail_commits(std::iter::repeat_with(faults).take(20));
        let commits = world.database.commits();
        let failed = world.writer.write(&mut rows(2, of_each), &[Offset(2)]).await.unwrap_err();
        assert!(matches!(failed, Failed::Later { kind: "setup", .. }), "{failed:?}");
        assert_eq!(world.database.commits() - commits, 2, "all of it, then one message");
    }
}

#[tokio::test]
async fn rows_in_doubt_one_after_the_other_wait_for_one_row_of_pauses() {
    let mut world = World::new(1 << 20).await;
    let doubt = || Fault::Doubtful("operation not supported".to_owned());
    world.database.fail_commits(std::iter::repeat_with(doubt).take(3 + 8));
    assert_eq!(world.write(&mut rows(12, 1), 12).await, 3);
    assert_eq!(world.rejected().await, (0..8).collect::<Vec<_>>());
    assert_eq!(world.written(), (8..12).collect::<Vec<_>>());
}

/// Whatever made transactions small before: a limit of time, or the brake on rejections.
#[tokio::test]
async fn rows_that_cannot_be_written_alone_are_tried_with_ever_more_others() {
    let mut world = World::new(1 << 20).await;
    let faults = || Fault::TooMuch("statement timeout".to_owned());
    world.database.fail_commits(std::iter::repeat_with(faults).take(7));
    let failed = world.writer.write(&mut rows(100, 1), &[Offset(100)]).await.unwrap_err();
    assert!(matches!(failed, Failed::Later { kind: "setup", .. }), "{failed:?}");
    world.reopen().await;
    world.database.suspect(|message| (message.offset().0 < 10).then(|| "no policy".to_owned()));
    // 1, 2, 4 and 8 rows.
    assert_eq!(world.write(&mut rows(100, 1), 100).await, 4);
    assert_eq!(world.rejected().await, (0..10).collect::<Vec<_>>());
    assert_eq!(world.written(), (10..100).collect::<Vec<_>>());
    let mut world = World::new(1 << 20).await;
    world.database.suspect(|_| Some("no such table".to_owned()));
    let failed = world.writer.write(&mut rows(100, 1), &[Offset(100)]).await.unwrap_err();
    assert!(matches!(failed, Failed::Later { kind: "setup", .. }), "{failed:?}");
    assert_eq!(world.rejected().await, [0; 0]);
}
