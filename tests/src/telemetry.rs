//! The tests' telemetry: `(device_id, value)` names a message, and what must
//! have become of it.

use std::collections::HashMap;
use std::path::Path;

use crate::host::Host;
use crate::postgres::Database;
use crate::publisher::Sent;

/// Topic and payload of a device's message number `value`, as the reference page's publisher builds it. No two
/// messages of a device have the same time, as no two points of a series in InfluxDB may have.
pub fn message(device: &str, value: u64) -> (String, String) {
    (
        format!("acme/site-01/temperature/{device}/reading"),
        format!(
            r#"{{"device_id":"{device}","metric":"temperature_c","value":{value},"ts":{}}}"#,
            1_700_000_000_000 + value
        ),
    )
}

/// Topic and payload of a message that `normalize` rejects: its timestamp is missing.
pub fn bad_message(device: &str, value: u64) -> (String, String) {
    (
        format!("acme/site-01/temperature/{device}/reading"),
        format!(r#"{{"device_id":"{device}","metric":"temperature_c","value":{value}}}"#),
    )
}

/// Rows as `(device_id, value)` in the order in which they were committed.
pub type Rows = Vec<(String, u64)>;

pub fn postgres_rows(database: &mut Database, table: &str) -> Rows {
    database
        .query(&format!("SELECT device_id, value FROM {table} ORDER BY ctid"))
        .iter()
        .map(|row| (row.get(0), row.get::<_, f64>(1) as u64))
        .collect()
}

pub fn sqlite_rows(path: &Path, table: &str) -> Rows {
    let database = rusqlite::Connection::open_with_flags(path, rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    database.busy_timeout(std::time::Duration::from_secs(20)).expect("a timeout");
    let mut statement = database
        .prepare(&format!("SELECT device_id, value FROM {table} ORDER BY rowid"))
        .unwrap_or_else(|error| panic!("{table}: {error}"));
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get::<_, f64>(1)? as u64)));
    rows.expect("a query").collect::<Result<_, _>>().expect("rows")
}

/// Rows of a SQLite table; 0 while there is none.
pub fn sqlite_count(path: &Path, table: &str) -> u64 {
    sqlite_number(path, &format!("SELECT count(*) FROM {table}"))
}

/// Waits until every message of the stream is a row of this file, or was seen not to be one.
pub fn written_to_sqlite(host: &Host, path: &Path) {
    let end = host.end();
    host.writes("all is written", || (sqlite_number(path, WRITTEN) >= end).then_some(()));
}

/// Waits until a sink of a pipeline that has several is past so many messages of the stream that the steps write.
pub fn read_behind_steps(host: &Host, path: &Path, messages: u64) {
    let past = format!(
        "(SELECT log FROM headworks_positions GROUP BY log HAVING min(coalesce(next_offset, 0)) >= {messages})"
    );
    host.writes("the sink has all", || (sqlite_count(path, &past) > 0).then_some(()));
}

/// Waits until every message of the stream is a row of this database, or was seen not to be one.
pub fn written_to_postgres(host: &Host, database: &mut Database) {
    let end = host.end();
    database.changes("headworks_positions", "all is written", |database| {
        let row = &database.query(WRITTEN)[0];
        (row.get::<_, Option<i64>>(0)? >= end.cast_signed()).then_some(())
    });
}

/// Up to where the sink has everything: the positions move with the rows.
const WRITTEN: &str = "SELECT min(coalesce(next_offset, 0)) FROM headworks_positions";

/// 0 where there is no such file or table yet.
fn sqlite_number(path: &Path, sql: &str) -> u64 {
    rusqlite::Connection::open_with_flags(path, rusqlite::OpenFlags::SQLITE_OPEN_READ_WRITE)
        .and_then(|database| {
            database.busy_timeout(std::time::Duration::from_secs(20))?;
            // A commit changes the file before others see it: this waits for its end.
            database.execute_batch("BEGIN IMMEDIATE")?;
            database.query_row(sql, [], |row| row.get::<_, i64>(0))
        })
        .map_or(0, |count| count as u64)
}

/// What may happen to a QoS 1 message whose ack was lost with its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repeats {
    /// No connection broke: exactly once, whatever the QoS.
    None,
    /// Connections broke: QoS 1 at least once, QoS 2 exactly once.
    OfQos1,
}

/// Every message acknowledged is a row, nothing else is, first arrivals are in order per device.
pub fn assert_rows(rows: &Rows, sent: &[Sent], repeats: Repeats) {
    assert_rows_without(rows, sent, repeats, |_| false);
}

/// The same where messages with some values must be no rows.
pub fn assert_rows_without(rows: &Rows, sent: &[Sent], repeats: Repeats, is_left_out: impl Fn(u64) -> bool) {
    let first_from = |value: u64| (value..).find(|value| !is_left_out(*value)).expect("some are rows");
    let mut seen: HashMap<&str, (Vec<u32>, u64)> = sent
        .iter()
        .map(|device| (device.device.as_str(), (vec![0; device.count as usize], first_from(0))))
        .collect();
    for (device, value) in rows {
        let (counts, next) =
            seen.get_mut(device.as_str()).unwrap_or_else(|| panic!("unknown device {device}"));
        let count = counts.get_mut(*value as usize).unwrap_or_else(|| panic!("{device} never sent {value}"));
        *count += 1;
        assert!(!is_left_out(*value), "{device}: {value} must be no row");
        if *count == 1 {
            assert_eq!(*value, *next, "{device}: first arrival out of order");
            *next = first_from(*next + 1);
        }
    }
    for device in sent {
        let (counts, _) = &seen[device.device.as_str()];
        let missing: Vec<usize> =
            (0..counts.len()).filter(|value| counts[*value] == 0 && !is_left_out(*value as u64)).collect();
        assert!(
            missing.is_empty(),
            "{} (QoS {}): {} of {} acknowledged messages lost, the first {:?}",
            device.device,
            device.qos,
            missing.len(),
            device.count,
            missing.first()
        );
        if device.qos == 2 || repeats == Repeats::None {
            let doubled: Vec<usize> = (0..counts.len()).filter(|value| counts[*value] > 1).collect();
            assert!(
                doubled.is_empty(),
                "{} (QoS {}): {} messages more than once, the first {:?}",
                device.device,
                device.qos,
                doubled.len(),
                doubled.first()
            );
        }
    }
}

/// Config for [`Host`](crate::host::Host): one stream of four partitions to one sink.
pub fn config(sink: &str) -> String {
    format!(
        "streams: {{ telemetry: {{ partitions: 4 }} }}\n\
         pipelines: {{ telemetry: {{ from: telemetry, routes: {{ default: warehouse }} }} }}\n\
         sinks:\n  warehouse: {sink}\n"
    )
}

pub fn sqlite_sink() -> String {
    "{ type: sqlite, path: data/telemetry.db, table: telemetry }".to_owned()
}

pub fn postgres_sink(url: &str) -> String {
    format!("{{ type: postgres, url: \"{url}\", table: telemetry }}")
}
