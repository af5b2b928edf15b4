//! The promises of a sink for rows that violate a unique key of its table.

use async_trait::async_trait;

use super::{Database, advance, claim, message, rejected, rows};
use crate::sinks::{OnConflict, Outcome, Sink, Written};

/// A database whose table has the primary key (device_id, metric) and the unique key (value).
#[async_trait]
pub trait Keyed: Database {
    async fn sink_on_conflict(&self, on_conflict: OnConflict) -> Box<dyn Sink>;
}

/// Creates the tests of sinks whose table may already have a row.
macro_rules! keyed_conformance_tests {
    ($database:expr) => {
        $crate::sinks::conformance::conformance_tests!($database;
            a_row_that_is_there_is_rejected_unless_told_otherwise,
            a_row_that_is_there_is_counted_as_ignored_where_told_so,
            a_row_that_is_there_is_replaced_by_the_last_where_told_so,
            a_row_that_takes_the_place_of_one_leaves_the_rows_of_other_keys_alone,
        );
    };
}
pub(crate) use keyed_conformance_tests;

pub async fn a_row_that_is_there_is_rejected_unless_told_otherwise(database: &dyn Keyed) {
    let mut sink = database.sink().await;
    sink.open(&claim(), None).await.expect("opens");
    let first = sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.expect("commits");
    assert_eq!(first, Outcome::Committed(Written { written: 1, ignored: 0 }));
    let again = rows([message("a", "2"), message("b", "3")]);
    let refused = rejected(sink.commit(&again, &[advance(0, 1, 3)]).await);
    assert_eq!(refused.iter().map(|row| row.row).collect::<Vec<_>>(), [0]);
    assert!(refused[0].code.is_some(), "{refused:?}");
    sink.finish().await.expect("commits");
    assert_eq!(by_value(database).await, [("a".to_owned(), 1.0), ("b".to_owned(), 3.0)]);
}

pub async fn a_row_that_is_there_is_counted_as_ignored_where_told_so(database: &dyn Keyed) {
    let mut sink = database.sink_on_conflict(OnConflict::Ignore).await;
    sink.open(&claim(), None).await.expect("opens");
    sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.expect("commits");
    let again = rows([message("a", "2"), message("b", "3")]);
    let outcome = sink.commit(&again, &[advance(0, 1, 3)]).await.expect("commits");
    assert_eq!(outcome, Outcome::Committed(Written { written: 1, ignored: 1 }));
    assert_eq!(by_value(database).await, [("a".to_owned(), 1.0), ("b".to_owned(), 3.0)]);
}

pub async fn a_row_that_is_there_is_replaced_by_the_last_where_told_so(database: &dyn Keyed) {
    let mut sink = database.sink_on_conflict(OnConflict::Upsert).await;
    sink.open(&claim(), None).await.expect("opens");
    sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.expect("commits");
    let again = rows([message("a", "2"), message("b", "5"), message("a", "4")]);
    let outcome = sink.commit(&again, &[advance(0, 1, 4)]).await.expect("commits");
    let all = Written { written: 3, ignored: 0 };
    assert_eq!(outcome, Outcome::Committed(all), "one that a newer one of the batch replaces is written too");
    assert_eq!(by_value(database).await, [("a".to_owned(), 4.0), ("b".to_owned(), 5.0)]);
}

pub async fn a_row_that_takes_the_place_of_one_leaves_the_rows_of_other_keys_alone(database: &dyn Keyed) {
    let mut sink = database.sink_on_conflict(OnConflict::Upsert).await;
    sink.open(&claim(), None).await.expect("opens");
    sink.commit(&rows([message("a", "1"), message("b", "2")]), &[advance(0, 0, 2)]).await.expect("commits");
    // The second has the value of another device's row, and no row of its own yet.
    let next = rows([message("a", "11"), message("c", "2"), message("d", "4")]);
    let refused = rejected(sink.commit(&next, &[advance(0, 2, 5)]).await);
    assert_eq!(refused.iter().map(|row| row.row).collect::<Vec<_>>(), [1]);
    sink.finish().await.expect("commits");
    let expected = [("b", 2.0), ("d", 4.0), ("a", 11.0)].map(|(device, value)| (device.to_owned(), value));
    assert_eq!(by_value(database).await, expected);
}

async fn by_value(database: &dyn Keyed) -> Vec<(String, f64)> {
    let mut written = database.written().await;
    written.sort_by(|a, b| a.1.total_cmp(&b.1));
    written
}
