//! The promises of every sink, as tests that each implementation runs with its own database.
//!
//! `conformance_tests!` has the promises of a sink that writes rows and positions in one transaction:
//! each row is written once. `repeating_conformance_tests!` has those of a sink whose positions advance
//! after its store has the rows: each row is written at least once, as the same row. Promises of both
//! are in both lists.
//!
//! A [`Database`] outlives its sinks, as a server outlives a process: each `sink()` stands for another
//! process that delivers to it.

use async_trait::async_trait;
use bytes::Bytes;
use uuid::Uuid;

use super::{Advance, Claim, Error, Found, Looked, Outcome, Position, RefusedRow, Rows, Sink, Written};
use crate::batch::{Batch, Entry, Offset, Partition, Span, flags};
use crate::stream::{Lineage, Opening};

mod keys;
mod passes;

pub(crate) use keys::*;
pub(crate) use passes::*;

/// A new database, and its contents.
#[async_trait]
pub trait Database: Send + Sync {
    /// Returns a sink that is not opened yet.
    async fn sink(&self) -> Box<dyn Sink>;

    /// Returns (device, value) of every row, in any order.
    async fn written(&self) -> Vec<(String, f64)>;

    /// Removes what Headworks stores beside the rows.
    async fn lose_positions(&self);

    /// Looks a claim up as `validate --connect` does. Returns `None` if there is no such check.
    async fn look(&self, _claim: &Claim) -> Option<Looked> {
        None
    }

    /// Makes this payload impossible to write. Sinks with typed columns reject `"hot"` by themselves.
    fn refuses(&self, _payload: &str) {}
}

/// Creates one `#[tokio::test]` for each promise. The argument creates a [`Database`], and may use
/// `.await`.
macro_rules! conformance_tests {
    ($database:expr) => {
        $crate::sinks::conformance::conformance_tests!($database;
            a_new_claim_has_no_positions_and_a_known_one_has_them_all,
            a_crash_between_open_and_commit_writes_nothing,
            rows_and_position_are_written_together,
            a_replayed_commit_is_fenced,
            the_older_of_two_claimants_is_fenced,
            opening_again_takes_the_claim_over,
            only_the_start_of_a_process_takes_a_claim_over,
            a_position_keeps_the_openings_that_it_was_given,
            a_position_goes_back_where_it_is_told_to,
            positions_that_are_gone_are_not_begun_again_by_a_running_host,
            a_renamed_claim_takes_its_positions_over_and_the_old_name_has_none,
            a_new_claim_is_told_whether_its_table_has_rows_and_who_wrote_them,
            a_claim_that_is_looked_up_is_told_what_it_would_find_and_is_not_taken,
            an_empty_commit_moves_only_positions,
            partitions_move_apart_and_together,
            one_partition_left_behind_fences_the_whole_commit,
            another_log_or_generation_is_another_claim,
            positions_in_other_logs_are_told_and_not_taken,
            letters_of_passes_are_kept_with_their_rows,
            two_pipelines_share_one_table,
            a_bad_row_is_named_and_the_others_wait_for_finish,
            what_is_not_finished_is_not_written,
            rows_of_several_batches_keep_their_numbers,
        );
    };
    ($database:expr; $($promise:ident,)*) => {
        $(
            #[tokio::test]
            async fn $promise() {
                let database = $database;
                $crate::sinks::conformance::$promise(&database).await;
            }
        )*
    };
}
pub(crate) use conformance_tests;

/// Creates the tests of a sink whose store has no transactions. The argument is as for
/// `conformance_tests`.
macro_rules! repeating_conformance_tests {
    ($database:expr) => {
        $crate::sinks::conformance::conformance_tests!($database;
            a_new_claim_has_no_positions_and_a_known_one_has_them_all,
            a_crash_between_open_and_commit_writes_nothing,
            rows_and_position_are_written_together,
            a_replayed_commit_is_fenced,
            the_older_of_two_claimants_is_fenced,
            opening_again_takes_the_claim_over,
            only_the_start_of_a_process_takes_a_claim_over,
            a_position_keeps_the_openings_that_it_was_given,
            a_position_goes_back_where_it_is_told_to,
            a_renamed_claim_takes_its_positions_over_and_the_old_name_has_none,
            a_new_claim_is_told_who_wrote_to_its_target,
            a_claim_that_is_looked_up_is_told_what_it_would_find_and_is_not_taken,
            an_empty_commit_moves_only_positions,
            partitions_move_apart_and_together,
            one_partition_left_behind_fences_the_whole_commit,
            another_log_or_generation_is_another_claim,
            positions_in_other_logs_are_told_and_not_taken,
            letters_of_passes_are_kept_with_their_rows,
            two_pipelines_share_one_table,
            a_bad_row_is_named_and_the_position_waits_for_finish,
            what_is_not_finished_moves_no_position,
            rows_of_several_batches_keep_their_numbers,
        );
    };
}
pub(crate) use repeating_conformance_tests;

/// Creates the tests of sinks whose table has a deferred foreign key of `device_id`: the devices `a` and
/// `b` exist, and a trigger adds `new` after its row.
macro_rules! deferred_conformance_tests {
    ($database:expr) => {
        $crate::sinks::conformance::conformance_tests!($database;
            a_row_whose_deferred_foreign_key_fails_is_rejected_alone,
        );
    };
}
pub(crate) use deferred_conformance_tests;

pub fn claim() -> Claim {
    Claim {
        pipeline: "telemetry".to_owned(),
        sink: "warehouse".to_owned(),
        log: Uuid::from_u128(0x5eed),
        generation: 0,
        partitions: 1,
        formerly: Vec::new(),
    }
}

/// Returns a message of this device. The payload is a bare number if it can be written.
pub fn message(device: &'static str, payload: &'static str) -> (&'static str, &'static str) {
    (device, payload)
}

/// 2026-02-23T10:00:00.123456Z, at which the messages are received.
pub const RECEIVED_US: u64 = 1_771_840_800_123_456;

/// Returns one batch, whose topics name the devices.
pub fn batch<'m>(messages: impl IntoIterator<Item = (&'m str, &'m str)>) -> Batch {
    let mut bytes = Vec::new();
    let mut entries = Vec::new();
    for (offset, (device, payload)) in messages.into_iter().enumerate() {
        let topic_begin = bytes.len();
        bytes.extend_from_slice(format!("acme/factory-01/temperature/{device}/reading").as_bytes());
        let topic_len = bytes.len() - topic_begin;
        let payload_begin = bytes.len();
        bytes.extend_from_slice(payload.as_bytes());
        entries.push(Entry {
            flags: flags::UTF8 | flags::FITS_NAMESPACE,
            offset: offset as u32,
            received_us: RECEIVED_US,
            topic: Span::new(0, topic_begin, topic_len),
            payload: Span::new(0, payload_begin, payload.len()),
            device: Span::new(0, topic_begin + "acme/factory-01/temperature/".len(), device.len()),
            ..Entry::default()
        });
    }
    Batch {
        base: Offset(0),
        now_us: RECEIVED_US,
        segments: vec![Bytes::from(bytes)],
        entries: entries.into(),
        exclusive: true,
    }
}

pub fn rows<'m>(messages: impl IntoIterator<Item = (&'m str, &'m str)>) -> Rows {
    let mut rows = Rows::default();
    rows.push_batch(batch(messages));
    rows
}

pub fn advance(partition: u16, from: u64, to: u64) -> Advance {
    Advance {
        partition: Partition(partition),
        from: Offset(from),
        to: Offset(to),
        lineage: None,
        letters: None,
    }
}

pub fn position(partition: u16, next: u64) -> Position {
    Position { partition: Partition(partition), next: Offset(next), lineage: Lineage::default() }
}

/// Opens the claim in another process.
async fn opened(database: &dyn Database, claim: &Claim) -> (Box<dyn Sink>, Vec<Position>) {
    let mut sink = database.sink().await;
    let mut positions = sink.open(claim, None).await.expect("opens").positions;
    positions.sort_by_key(|position| position.partition.0);
    (sink, positions)
}

pub async fn a_new_claim_has_no_positions_and_a_known_one_has_them_all(database: &dyn Database) {
    let claim = Claim { partitions: 3, ..claim() };
    let (mut sink, positions) = opened(database, &claim).await;
    assert_eq!(positions, []);
    let start = [advance(0, 7, 7), advance(1, 7, 7), advance(2, 7, 7)];
    sink.commit(&Rows::default(), &start).await.expect("a new claim begins anywhere");
    let (_, positions) = opened(database, &claim).await;
    assert_eq!(positions, [position(0, 7), position(1, 7), position(2, 7)]);
}

pub async fn a_crash_between_open_and_commit_writes_nothing(database: &dyn Database) {
    drop(opened(database, &claim()).await);
    let (mut sink, positions) = opened(database, &claim()).await;
    assert_eq!(positions, [], "nothing was ever committed for this claim");
    assert_eq!(database.written().await, []);
    sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.expect("commits");
    assert_eq!(opened(database, &claim()).await.1, [position(0, 1)]);
}

pub async fn rows_and_position_are_written_together(database: &dyn Database) {
    let (mut sink, _) = opened(database, &claim()).await;
    let first = rows([message("a", "1"), message("b", "2.5")]);
    sink.commit(&first, &[advance(0, 0, 2)]).await.expect("commits");
    sink.commit(&rows([message("a", "-3e2")]), &[advance(0, 2, 3)]).await.expect("commits");
    let mut written = database.written().await;
    written.sort_by(|a, b| a.1.total_cmp(&b.1));
    assert_eq!(written, [("a".to_owned(), -300.0), ("a".to_owned(), 1.0), ("b".to_owned(), 2.5)]);
    assert_eq!(opened(database, &claim()).await.1, [position(0, 3)]);
}

pub async fn a_replayed_commit_is_fenced(database: &dyn Database) {
    let (mut sink, _) = opened(database, &claim()).await;
    let batch = rows([message("a", "1")]);
    sink.commit(&batch, &[advance(0, 0, 1)]).await.expect("commits");
    let error = sink.commit(&batch, &[advance(0, 0, 1)]).await.expect_err("written before");
    assert!(matches!(error, Error::Fenced(_)), "{error:?}");
    assert_eq!(database.written().await.len(), 1);
}

pub async fn the_older_of_two_claimants_is_fenced(database: &dyn Database) {
    let (mut older, _) = opened(database, &claim()).await;
    older.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.expect("commits");
    let (mut newer, positions) = opened(database, &claim()).await;
    assert_eq!(positions, [position(0, 1)]);
    let error = older.commit(&rows([message("a", "2")]), &[advance(0, 1, 2)]).await.expect_err("fenced");
    assert!(matches!(error, Error::Fenced(_)), "{error:?}");
    newer.commit(&rows([message("a", "2")]), &[advance(0, 1, 2)]).await.expect("commits");
    let error = older.commit(&Rows::default(), &[advance(0, 2, 3)]).await.expect_err("fenced for good");
    assert!(matches!(error, Error::Fenced(_)), "{error:?}");
    assert_eq!(database.written().await.len(), 2);
}

pub async fn opening_again_takes_the_claim_over(database: &dyn Database) {
    let (mut sink, _) = opened(database, &claim()).await;
    sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.expect("commits");
    let positions = sink.open(&claim(), None).await.expect("opens again").positions;
    assert_eq!(positions, [position(0, 1)]);
    sink.commit(&rows([message("a", "2")]), &[advance(0, 1, 2)]).await.expect("commits");
    assert_eq!(database.written().await.len(), 2);
}

pub async fn only_the_start_of_a_process_takes_a_claim_over(database: &dyn Database) {
    let is_fenced = |error: &Error| match error {
        Error::Fenced(text) => {
            text.contains("epoch 2 after our 1") && text.contains("stop one of the two hosts")
        }
        _ => false,
    };
    // Both lose their connections, and open again in either order.
    for older_is_first in [true, false] {
        let claim = Claim { pipeline: format!("p{older_is_first}"), ..claim() };
        let (mut older, mut newer) = (database.sink().await, database.sink().await);
        let older_held = Some(older.open(&claim, None).await.expect("opens").epoch);
        older.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.expect("commits");
        let newer_held = Some(newer.open(&claim, None).await.expect("takes over").epoch);
        if older_is_first {
            let error = older.open(&claim, older_held).await.expect_err("fenced");
            assert!(is_fenced(&error), "{error:?}");
        }
        let again = newer.open(&claim, newer_held).await.expect("goes on");
        assert_eq!((Some(again.epoch), again.positions), (newer_held, vec![position(0, 1)]));
        let error = older.open(&claim, older_held).await.expect_err("fenced");
        assert!(is_fenced(&error), "{error:?}");
        newer.commit(&rows([message("a", "2")]), &[advance(0, 1, 2)]).await.expect("goes on");
        // A restart is a start.
        let (mut restarted, positions) = opened(database, &claim).await;
        assert_eq!(positions, [position(0, 2)]);
        restarted.commit(&rows([message("a", "3")]), &[advance(0, 2, 3)]).await.expect("commits");
        newer.open(&claim, newer_held).await.expect_err("fenced");
    }
    assert_eq!(database.written().await.len(), 6);
}

pub async fn a_position_keeps_the_openings_that_it_was_given(database: &dyn Database) {
    let opening = |id, first| Opening { id, first: Offset(first) };
    let log = [opening(7, 0), opening(u64::MAX, 3)];
    let one = Lineage::default().moved(&log, Offset(0), Offset(2)).expect("it is of the first opening");
    let two = one.moved(&log, Offset(2), Offset(5)).expect("it is of the second one too");
    let with =
        |from, to, lineage: &Lineage| Advance { lineage: Some(lineage.clone()), ..advance(0, from, to) };
    let (mut sink, _) = opened(database, &claim()).await;
    sink.commit(&rows([message("a", "1")]), &[with(0, 2, &one)]).await.expect("commits");
    let kept = |next, lineage: &Lineage| vec![Position { lineage: lineage.clone(), ..position(0, next) }];
    assert_eq!(opened(database, &claim()).await.1, kept(2, &one));
    let (mut sink, _) = opened(database, &claim()).await;
    sink.commit(&Rows::default(), &[advance(0, 2, 3)]).await.expect("commits");
    assert_eq!(opened(database, &claim()).await.1, kept(3, &one), "unless told otherwise");
    let (mut sink, _) = opened(database, &claim()).await;
    database.refuses("\"hot\"");
    let bad = rows([message("a", "1"), message("b", "\"hot\"")]);
    rejected(sink.commit(&bad, &[with(3, 5, &two)]).await);
    sink.finish().await.expect("commits");
    assert_eq!(opened(database, &claim()).await.1, kept(5, &two));
}

pub async fn a_position_goes_back_where_it_is_told_to(database: &dyn Database) {
    let (mut sink, _) = opened(database, &claim()).await;
    sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 9)]).await.expect("commits");
    sink.commit(&Rows::default(), &[advance(0, 9, 4)]).await.expect("goes back");
    sink.commit(&rows([message("a", "2")]), &[advance(0, 4, 5)]).await.expect("goes on from there");
    assert_eq!(opened(database, &claim()).await.1, [position(0, 5)]);
}

pub async fn positions_that_are_gone_are_not_begun_again_by_a_running_host(database: &dyn Database) {
    let mut sink = database.sink().await;
    let held = Some(sink.open(&claim(), None).await.expect("opens").epoch);
    sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.expect("commits");
    database.lose_positions().await;
    let error = sink.commit(&rows([message("a", "2")]), &[advance(0, 1, 2)]).await.expect_err("gone");
    assert!(!matches!(error, Error::Fenced(_)), "nobody else is there: {error:?}");
    for _ in 0..2 {
        let error = sink.open(&claim(), held).await.expect_err("gone");
        assert!(matches!(&error, Error::Choose(text) if text.contains("are gone")), "{error:?}");
    }
    assert_eq!(database.written().await.len(), 1);
}

pub async fn a_renamed_claim_takes_its_positions_over_and_the_old_name_has_none(database: &dyn Database) {
    let lineage = Lineage::default().moved(&[Opening { id: 7, first: Offset(0) }], Offset(0), Offset(5));
    let (mut old, _) = opened(database, &claim()).await;
    let step = Advance { lineage: lineage.clone(), ..advance(0, 0, 5) };
    old.commit(&rows([message("a", "1")]), &[step]).await.expect("commits");
    let names = |pipeline: &str, sink: &str| (pipeline.to_owned(), sink.to_owned());
    let renamed = Claim {
        pipeline: "readings".to_owned(),
        sink: "lake".to_owned(),
        formerly: vec![names("telemetry", "lake"), names("telemetry", "warehouse")],
        ..claim()
    };
    let kept = vec![Position { lineage: lineage.unwrap_or_default(), ..position(0, 5) }];
    // It may have been tried without the old name.
    assert_eq!(opened(database, &Claim { formerly: Vec::new(), ..renamed.clone() }).await.1, []);
    let (mut new, positions) = opened(database, &renamed).await;
    assert_eq!(positions, kept);
    let error = old.commit(&rows([message("a", "2")]), &[advance(0, 5, 6)]).await.expect_err("fenced");
    assert!(matches!(error, Error::Fenced(_)), "{error:?}");
    new.commit(&rows([message("a", "2")]), &[advance(0, 5, 6)]).await.expect("goes on");
    // The name in the config may stay, and the old one is one of others.
    assert_eq!(opened(database, &renamed).await.1[0].next, Offset(6));
    let back = database.sink().await.open(&claim(), None).await.expect("opens");
    assert_eq!((back.positions, back.found.others), (Vec::new(), vec![names("readings", "lake")]));
    assert_eq!(database.written().await.len(), 2);
}

pub async fn a_new_claim_is_told_whether_its_table_has_rows_and_who_wrote_them(database: &dyn Database) {
    let names = |pipeline: &str, sink: &str| (pipeline.to_owned(), sink.to_owned());
    let other = Claim { pipeline: "alerts".to_owned(), ..claim() };
    let found = database.sink().await.open(&other, None).await.expect("opens").found;
    assert_eq!(found, Found::default());
    let (mut sink, _) = opened(database, &claim()).await;
    sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.expect("commits");
    let found = database.sink().await.open(&other, None).await.expect("opens").found;
    let others = vec![names("telemetry", "warehouse")];
    assert_eq!(found, Found { has_rows: true, others, other_logs: Vec::new() });
    let of_another_log = Claim { log: Uuid::from_u128(0xbeef), ..claim() };
    let found = database.sink().await.open(&of_another_log, None).await.expect("opens").found;
    let logs: Vec<_> = found.other_logs.iter().map(|other| other.log).collect();
    assert_eq!((found.has_rows, &found.others, logs), (true, &Vec::new(), vec![claim().log]));
    let again = database.sink().await.open(&claim(), None).await.expect("opens");
    assert_eq!((again.positions.len(), again.found), (1, Found::default()), "it is not new");
}

pub async fn a_new_claim_is_told_who_wrote_to_its_target(database: &dyn Database) {
    let names = |pipeline: &str, sink: &str| (pipeline.to_owned(), sink.to_owned());
    let other = Claim { pipeline: "alerts".to_owned(), ..claim() };
    let found = database.sink().await.open(&other, None).await.expect("opens").found;
    assert_eq!(found, Found::default());
    let (mut sink, _) = opened(database, &claim()).await;
    sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.expect("commits");
    let found = database.sink().await.open(&other, None).await.expect("opens").found;
    assert_eq!(
        found,
        Found { has_rows: true, others: vec![names("telemetry", "warehouse")], ..Found::default() }
    );
    let of_another_log = Claim { log: Uuid::from_u128(0xbeef), ..claim() };
    let found = database.sink().await.open(&of_another_log, None).await.expect("opens").found;
    assert_eq!(found, Found::default(), "its rows come as other ones");
    let again = database.sink().await.open(&claim(), None).await.expect("opens");
    assert_eq!((again.positions.len(), again.found), (1, Found::default()), "it is not new");
}

pub async fn a_claim_that_is_looked_up_is_told_what_it_would_find_and_is_not_taken(database: &dyn Database) {
    let Some(nothing) = database.look(&claim()).await else { return };
    assert_eq!((nothing.positions, nothing.found), (Vec::new(), Found::default()));
    let (mut sink, _) = opened(database, &claim()).await;
    sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.expect("commits");
    let names = |pipeline: &str, sink: &str| (pipeline.to_owned(), sink.to_owned());
    let claims = [
        Claim { pipeline: "alerts".to_owned(), ..claim() },
        Claim { log: Uuid::from_u128(0xbeef), ..claim() },
        Claim { partitions: 3, ..claim() },
        Claim { sink: "lake".to_owned(), formerly: vec![names("telemetry", "warehouse")], ..claim() },
    ];
    let mut looked = Vec::new();
    for claim in &claims {
        looked.push(database.look(claim).await.expect("it is checked"));
    }
    sink.commit(&rows([message("a", "2")]), &[advance(0, 1, 1)]).await.expect("nobody took its claim");
    for (claim, looked) in claims.iter().zip(looked) {
        let opened = database.sink().await.open(claim, None).await.expect("opens");
        assert_eq!((looked.positions, looked.found), (opened.positions, opened.found), "{claim:?}");
    }
}

pub async fn an_empty_commit_moves_only_positions(database: &dyn Database) {
    let (mut sink, _) = opened(database, &claim()).await;
    sink.commit(&Rows::default(), &[advance(0, 0, 5)]).await.expect("commits");
    sink.commit(&Rows::default(), &[]).await.expect("nothing at all is fine");
    assert_eq!(opened(database, &claim()).await.1, [position(0, 5)]);
    assert_eq!(database.written().await, []);
}

pub async fn partitions_move_apart_and_together(database: &dyn Database) {
    let claim = Claim { partitions: 64, ..claim() };
    let (mut sink, _) = opened(database, &claim).await;
    let all: Vec<Advance> = (0..64).map(|partition| advance(partition, 0, 10)).collect();
    sink.commit(&rows([message("a", "1")]), &all).await.expect("all at once");
    sink.commit(&rows([message("b", "2")]), &[advance(63, 10, 20)]).await.expect("one alone");
    let (_, positions) = opened(database, &claim).await;
    assert_eq!(positions.len(), 64);
    assert_eq!(positions[62..], [position(62, 10), position(63, 20)]);
}

pub async fn one_partition_left_behind_fences_the_whole_commit(database: &dyn Database) {
    let claim = Claim { partitions: 2, ..claim() };
    let (mut sink, _) = opened(database, &claim).await;
    sink.commit(&Rows::default(), &[advance(0, 0, 5), advance(1, 0, 5)]).await.expect("commits");
    let torn = [advance(0, 5, 6), advance(1, 4, 6)];
    let error = sink.commit(&rows([message("a", "1")]), &torn).await.expect_err("fenced");
    assert!(matches!(error, Error::Fenced(_)), "{error:?}");
    assert_eq!(database.written().await, []);
    assert_eq!(opened(database, &claim).await.1, [position(0, 5), position(1, 5)]);
}

pub async fn another_log_or_generation_is_another_claim(database: &dyn Database) {
    let (mut sink, _) = opened(database, &claim()).await;
    sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.expect("commits");
    let wiped = Claim { log: Uuid::from_u128(0xbeef), ..claim() };
    let repartitioned = Claim { generation: 1, ..claim() };
    for other in [wiped, repartitioned] {
        let (mut next, positions) = opened(database, &other).await;
        assert_eq!(positions, []);
        next.commit(&rows([message("a", "2")]), &[advance(0, 0, 1)]).await.expect("commits");
    }
    sink.commit(&rows([message("a", "3")]), &[advance(0, 1, 2)]).await.expect("the first goes on");
    assert_eq!(database.written().await.len(), 4);
}

pub async fn two_pipelines_share_one_table(database: &dyn Database) {
    let (mut one, _) = opened(database, &claim()).await;
    let other = Claim { pipeline: "alerts".to_owned(), ..claim() };
    let (mut two, positions) = opened(database, &other).await;
    assert_eq!(positions, []);
    one.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.expect("commits");
    two.commit(&rows([message("a", "1")]), &[advance(0, 0, 9)]).await.expect("commits");
    assert_eq!(opened(database, &claim()).await.1, [position(0, 1)]);
    assert_eq!(opened(database, &other).await.1, [position(0, 9)]);
    assert_eq!(database.written().await.len(), 2);
}

/// Returns the rejected rows of a commit.
pub fn rejected(outcome: Result<Outcome, Error>) -> Vec<RefusedRow> {
    match outcome {
        Ok(Outcome::Rejected(rejected)) => rejected,
        other => panic!("no row was rejected: {other:?}"),
    }
}

pub async fn a_bad_row_is_named_and_the_others_wait_for_finish(database: &dyn Database) {
    database.refuses("\"hot\"");
    let (mut sink, _) = opened(database, &claim()).await;
    sink.commit(&Rows::default(), &[advance(0, 0, 0)]).await.expect("commits");
    let bad = rows([message("a", "1"), message("b", "\"hot\""), message("c", "3"), message("d", "\"hot\"")]);
    let refused = rejected(sink.commit(&bad, &[advance(0, 0, 4)]).await);
    assert_eq!(refused.iter().map(|row| row.row).collect::<Vec<_>>(), [1, 3]);
    assert!(refused[0].reason.contains("column \"value\""), "{}", refused[0].reason);
    assert_eq!(database.written().await, []);
    assert_eq!(sink.finish().await.expect("commits"), Written { written: 2, ignored: 0 });
    let mut written = database.written().await;
    written.sort_by(|a, b| a.1.total_cmp(&b.1));
    assert_eq!(written, [("a".to_owned(), 1.0), ("c".to_owned(), 3.0)]);
    sink.commit(&rows([message("a", "5")]), &[advance(0, 4, 5)]).await.expect("usable as it is");
    assert_eq!(opened(database, &claim()).await.1, [position(0, 5)]);
}

pub async fn a_bad_row_is_named_and_the_position_waits_for_finish(database: &dyn Database) {
    database.refuses("\"hot\"");
    let (mut sink, _) = opened(database, &claim()).await;
    sink.commit(&Rows::default(), &[advance(0, 0, 0)]).await.expect("commits");
    let bad = rows([message("a", "1"), message("b", "\"hot\""), message("c", "3"), message("d", "\"hot\"")]);
    let refused = rejected(sink.commit(&bad, &[advance(0, 0, 4)]).await);
    assert_eq!(refused.iter().map(|row| row.row).collect::<Vec<_>>(), [1, 3]);
    assert!(!refused[0].reason.is_empty());
    let (own, log) = ([("telemetry".to_owned(), "warehouse".to_owned())], [claim().log]);
    let at = |next| vec![(claim().log, Partition(0), Offset(next))];
    assert_eq!(sink.positions_of(&own, &log).await.expect("answers"), at(0));
    assert_eq!(sink.finish().await.expect("commits"), Written { written: 2, ignored: 0 });
    assert_eq!(sink.positions_of(&own, &log).await.expect("answers"), at(4));
    let mut written = database.written().await;
    written.sort_by(|a, b| a.1.total_cmp(&b.1));
    assert_eq!(written, [("a".to_owned(), 1.0), ("c".to_owned(), 3.0)]);
    sink.commit(&rows([message("a", "5")]), &[advance(0, 4, 5)]).await.expect("usable as it is");
    assert_eq!(opened(database, &claim()).await.1, [position(0, 5)]);
}

pub async fn what_is_not_finished_moves_no_position(database: &dyn Database) {
    database.refuses("\"hot\"");
    let (mut sink, _) = opened(database, &claim()).await;
    sink.commit(&Rows::default(), &[advance(0, 0, 0)]).await.expect("commits");
    let bad = rows([message("a", "1"), message("b", "\"hot\"")]);
    rejected(sink.commit(&bad, &[advance(0, 0, 2)]).await);
    sink.commit(&Rows::default(), &[]).await.expect("nothing at all is fine");
    assert!(matches!(sink.finish().await, Err(Error::Retry(_))), "the other call gave it up");
    rejected_again(&mut *sink, &bad).await;
    assert_eq!(sink.open(&claim(), None).await.expect("opens again").positions, [position(0, 0)]);
    assert!(matches!(sink.finish().await, Err(Error::Retry(_))), "there is nothing to finish");
}

pub async fn what_is_not_finished_is_not_written(database: &dyn Database) {
    database.refuses("\"hot\"");
    let (mut sink, _) = opened(database, &claim()).await;
    sink.commit(&Rows::default(), &[advance(0, 0, 0)]).await.expect("commits");
    let bad = rows([message("a", "1"), message("b", "\"hot\"")]);
    rejected(sink.commit(&bad, &[advance(0, 0, 2)]).await);
    // Whether the call after it is allowed or not: its locks are gone.
    drop(sink.commit(&Rows::default(), &[]).await);
    let (mut other, _) = opened(database, &Claim { pipeline: "other".to_owned(), ..claim() }).await;
    other.commit(&Rows::default(), &[advance(0, 0, 0)]).await.expect("nothing is locked");
    rejected_again(&mut *sink, &bad).await;
    assert_eq!(sink.open(&claim(), None).await.expect("opens again").positions, [position(0, 0)]);
    assert_eq!(database.written().await, []);
    let error = sink.finish().await.expect_err("there is nothing to finish");
    assert!(matches!(error, Error::Retry(_)), "{error:?}");
}

/// Asserts that the rows are rejected again, and not finished either.
async fn rejected_again(sink: &mut dyn Sink, bad: &Rows) {
    sink.open(&claim(), None).await.expect("opens again");
    rejected(sink.commit(bad, &[advance(0, 0, 2)]).await);
}

pub async fn a_row_whose_deferred_foreign_key_fails_is_rejected_alone(database: &dyn Database) {
    let (mut sink, _) = opened(database, &claim()).await;
    sink.commit(&Rows::default(), &[advance(0, 0, 0)]).await.expect("commits");
    let all = |of: [(usize, (&'static str, &'static str)); 3]| {
        let mut messages: Vec<_> = (0..100).map(|n| (if n % 2 == 0 { "a" } else { "b" }, "1")).collect();
        of.into_iter().for_each(|(at, message)| messages[at] = message);
        rows(messages)
    };
    let good = [(0, message("new", "1")), (7, message("new", "2")), (99, message("a", "3"))];
    let bad = [(0, message("new", "1")), (7, message("unknown", "2")), (99, message("unknown", "3"))];
    let both = [(0, message("new", "1")), (7, message("unknown", "2")), (60, message("a", "\"hot\""))];
    for (batch, (of, expected)) in
        [(bad, &[7, 99][..]), (both, &[7, 60]), (good, &[])].into_iter().enumerate()
    {
        let at = 100 * batch as u64;
        match sink.commit(&all(of), &[advance(0, at, at + 100)]).await {
            Ok(Outcome::Rejected(mut refused)) => {
                refused.sort_by_key(|row| row.row);
                assert_eq!(refused.iter().map(|row| row.row).collect::<Vec<_>>(), expected, "{refused:?}");
                assert_eq!(sink.finish().await.expect("commits").written, 98);
            }
            outcome => {
                let written = Outcome::Committed(Written { written: 100, ignored: 0 });
                assert_eq!((outcome.expect("commits"), expected.len()), (written, 0));
            }
        }
    }
    assert_eq!(database.written().await.len(), 296);
    assert_eq!(opened(database, &claim()).await.1, [position(0, 300)]);
}

pub async fn rows_of_several_batches_keep_their_numbers(database: &dyn Database) {
    database.refuses("\"hot\"");
    let (mut sink, _) = opened(database, &claim()).await;
    let mut many = Rows::default();
    many.push_batch(batch([message("a", "1"), message("a", "2")]));
    many.push_batch(batch([message("b", "3"), message("b", "\"hot\"")]));
    let refused = rejected(sink.commit(&many, &[advance(0, 0, 4)]).await);
    assert_eq!(refused.iter().map(|row| row.row).collect::<Vec<_>>(), [3]);
}
