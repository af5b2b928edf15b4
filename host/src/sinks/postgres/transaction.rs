//! One transaction: positions, rows, the check of the table, COMMIT.

use std::collections::BTreeMap;
use std::pin::pin;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::SinkExt;
use futures_util::future::{join, join3, join4};
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, CopyInSink, Row, SimpleQueryMessage};

use super::connect::text_forms;
use super::encode::{DAY_US, HEADER, TRAILER, Target};
use super::error::{self, Kind, classify, describe, is_end};
use super::schema::literal;
use super::sink::Session;
use super::table::{self, Table};
use crate::sinks::{Advance, Error, OnConflict, Outcome, RefusedRow, Rows, Written};

/// Number of consecutive commits that must fail outside of the database ([`Kind::Outside`]) before a row
/// is considered as the cause.
const OUTSIDE_TRIES: u32 = 3;
/// Most constraints that are remembered as concerning the contents of a row.
const OF_ROWS_MAX: usize = 1_000;
/// Bytes that are encoded before they are sent to the server.
const CHUNK_BYTES: usize = 64 << 10;
/// Age beyond which a row no longer waits for its partition.
const WAITS_MAX: Duration = Duration::from_secs(86_400);
/// Most that the time of a row may differ from its time of receipt for its partition to be expected: an
/// earlier time means that a device had stored the message, a later one that its clock is wrong.
const BEHIND_MAX: Duration = Duration::from_secs(30 * 60);
const AHEAD_MAX: Duration = Duration::from_secs(5 * 60);

/// Begins a transaction in which each statement sees the catalog as of its own start, whatever
/// `default_transaction_isolation` is. With a snapshot older than the lock of the table, the check of
/// the table would see it as it was before another session changed it. `default_transaction_read_only`
/// is left as it is, because providers set it when the disk is nearly full.
pub const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED";

/// Result of one transaction.
pub enum Tried {
    Done(Outcome),
    /// The server rejected a row, so the rows must be isolated.
    Isolate,
}

/// Why the rows of one transaction were not written.
enum Failure {
    /// The server or the connection failed before COMMIT was sent.
    Write(tokio_postgres::Error),
    /// The server or the connection failed after COMMIT was sent.
    Commit(tokio_postgres::Error),
    /// The table is not the bound one.
    Changed,
}

/// Result of the statements of one transaction, up to COMMIT.
struct Sent {
    /// Rows that could not be encoded.
    rejected: Vec<RefusedRow>,
    written: u64,
    /// Result of `headworks_isolate`.
    isolated: Option<Vec<Row>>,
}

impl Session {
    /// Commits within a deadline: see [`crate::sinks::Sink::commit`].
    pub async fn commit(
        &mut self,
        context: &str,
        rows: &Rows,
        advance: &[Advance],
        isolates: bool,
        buffer: &mut BytesMut,
    ) -> Result<Tried, Error> {
        let server = |error: tokio_postgres::Error| classify(context, &error);
        let client = &self.client;
        let begun = self.begin();
        let moved = async {
            match advance {
                [] => Ok(0),
                advance => self.held.advance(client, advance).await,
            }
        };
        if rows.is_empty() {
            let (begun, moved) = join(begun, moved).await;
            self.check_begun(context, begun.map_err(server)?)?;
            let moved = match moved {
                Ok(moved) => moved,
                Err(error) => return Err(self.blocked.classify(context, &error).await),
            };
            if moved != advance.len() as u64 {
                return Err(self.fenced(context, advance).await);
            }
            client.batch_execute("COMMIT").await.map_err(|error| unknown(context, &error))?;
            return Ok(Tried::Done(Outcome::Committed(Written::default())));
        }
        let copy = match &self.stage {
            Some(stage) if isolates => &stage.copy,
            _ => &self.copy,
        };
        // Polled in this order, so sent in this order.
        let (begun, moved, copy) = join3(begun, moved, client.copy_in(copy)).await;
        // Before any row: elsewhere, the statements of these names are another client's.
        self.check_begun(context, begun.map_err(server)?)?;
        let moved = match moved {
            Ok(moved) => moved,
            Err(error) => return Err(self.blocked.classify(context, &error).await),
        };
        if moved != advance.len() as u64 {
            // Ends COPY: what follows would wait behind it.
            drop(copy);
            return Err(self.fenced(context, advance).await);
        }
        let copy = match copy {
            Ok(copy) => copy,
            Err(error) => return Err(self.blocked.classify(context, &error).await),
        };
        let sent = match self.send(copy, rows, isolates, buffer).await {
            Ok(sent) => sent,
            Err(failure) => return self.failed(context, failure, rows, isolates).await,
        };
        let (rejected, total) = match sent.isolated {
            None => {
                self.outside = 0;
                (sent.rejected, sent.written)
            }
            Some(isolated) => {
                let outcome = match self.why_all_wait(&isolated).await.map_err(server)? {
                    Some(reason) => Err(reason),
                    None => self.isolated(rows, sent.rejected, &isolated),
                };
                match outcome {
                    Ok(outcome) => outcome,
                    Err(error) => {
                        self.client.batch_execute("ROLLBACK").await.map_err(server)?;
                        return Err(error.within(context));
                    }
                }
            }
        };
        let kept = (rows.len() - rejected.len()) as u64;
        let written = Written { written: total, ignored: kept.saturating_sub(total) };
        if rejected.is_empty() && !isolates {
            return Ok(Tried::Done(Outcome::Committed(written)));
        }
        if rejected.is_empty() {
            self.client.batch_execute("COMMIT").await.map_err(|error| unknown(context, &error))?;
            return Ok(Tried::Done(Outcome::Committed(written)));
        }
        self.uncommitted = Some(written);
        Ok(Tried::Done(Outcome::Rejected(rejected)))
    }

    /// Adds to an error why the connection has ended, if it has.
    pub async fn explain(&self, error: Error) -> Error {
        match self.client.is_closed() {
            true => self.connection.end().explain(error).await,
            false => error,
        }
    }

    /// Begins a transaction of this session.
    pub async fn begin(&self) -> Result<Begun, tokio_postgres::Error> {
        begin(&self.client, Some(self)).await
    }

    /// Checks that the transaction runs in the server process in which the statements were prepared, and
    /// that the configured name still denotes the bound table: a table may have been created in a schema
    /// that is searched earlier.
    pub fn check_begun(&self, context: &str, begun: Begun) -> Result<(), Error> {
        let (own, backend) = (self.backend, begun.backend);
        if backend != own {
            let pooler = error::POOLER;
            return Err(Error::Setup(format!(
                "{context}: the server's process changes between transactions, from {own} to {backend}: {pooler}"
            )));
        }
        if !begun.means_table {
            let (name, table) = (&self.name, &self.table);
            return Err(Error::Retry(format!(
                "{context}: {name} no longer means {table}: opening the sink again"
            )));
        }
        Ok(())
    }

    /// Sends the rows, the insert from the staging table, the check of the table and COMMIT, all before
    /// the first answer. COMMIT is not sent if rows are, or may be, rejected.
    async fn send(
        &self,
        copy: CopyInSink<Bytes>,
        rows: &Rows,
        isolates: bool,
        buffer: &mut BytesMut,
    ) -> Result<Sent, Failure> {
        let mut copy = pin!(copy);
        let mut rejected: Vec<RefusedRow> = Vec::new();
        let mut reader = self.columns.reader();
        let staged = isolates || self.binding.staged;
        let target = |target: Target| if staged { target.staged() } else { target };
        let targets: Vec<Target> = self.binding.columns.iter().map(|of| target(of.target)).collect();
        buffer.clear();
        buffer.reserve(2 * CHUNK_BYTES);
        buffer.put_slice(&HEADER);
        for (row, message) in rows.iter().enumerate() {
            let begin = buffer.len();
            buffer.put_i16(targets.len() as i16 + i16::from(staged));
            if staged {
                buffer.put_i32(4);
                buffer.put_i32(row as i32);
            }
            let outcome = reader.read(row, message, |i, value| targets[i].put(value, buffer));
            if let Err(reason) = outcome {
                buffer.truncate(begin);
                rejected.push(reason);
            } else if buffer.len() >= CHUNK_BYTES {
                copy.feed(buffer.split().freeze()).await.map_err(Failure::Write)?;
                buffer.reserve(2 * CHUNK_BYTES);
            }
        }
        buffer.put_slice(&TRAILER);
        copy.feed(buffer.split().freeze()).await.map_err(Failure::Write)?;
        let client = &self.client;
        let insert = async {
            match &self.insert {
                Some(insert) if !isolates => client.execute(insert, &[]).await.map(Some),
                _ => Ok(None),
            }
        };
        let isolate = async {
            match &self.stage {
                Some(stage) if isolates => client.query(&stage.isolate, &[]).await.map(Some),
                _ => Ok(None),
            }
        };
        let replaced = async {
            match &self.replaced {
                Some(replaced) if !isolates => {
                    client.query_one(replaced, &[]).await.map(|row| row.get::<_, i64>(0) as u64)
                }
                _ => Ok(0),
            }
        };
        // After the rows: what wrote them holds the table against changes until COMMIT.
        let bound: [&(dyn ToSql + Sync); 2] = [&self.table, &self.binding.fingerprint];
        let check = client.execute(&self.check, &bound);
        let commits = rejected.is_empty() && !isolates;
        let commit = async {
            match commits {
                // Committed last: before this line a crash redelivers, never loses.
                true => client.batch_execute("COMMIT").await,
                false => Ok(()),
            }
        };
        let write = async { join3(insert, isolate, replaced).await };
        let (copied, (inserted, isolated, replaced), checked, committed) =
            join4(copy.finish(), write, check, commit).await;
        let failure = if commits { Failure::Commit } else { Failure::Write };
        let copied = copied.map_err(failure)?;
        let inserted = inserted.map_err(failure)?;
        let isolated = isolated.map_err(failure)?;
        let replaced = replaced.map_err(failure)?;
        checked.map_err(|error| match error.code() {
            Some(&SqlState::DIVISION_BY_ZERO) => Failure::Changed,
            _ => failure(error),
        })?;
        committed.map_err(Failure::Commit)?;
        Ok(Sent { rejected, written: inserted.unwrap_or(copied) + replaced, isolated })
    }

    /// Decides what to do after a failed transaction.
    async fn failed(
        &mut self,
        context: &str,
        failure: Failure,
        rows: &Rows,
        isolates: bool,
    ) -> Result<Tried, Error> {
        let changed = || Isolated::Changed.within(context);
        let (error, is_over) = match failure {
            Failure::Changed => return Err(changed()),
            Failure::Write(error) => (error, false),
            // COMMIT of a failed transaction has rolled it back.
            Failure::Commit(error) => (error, true),
        };
        let code = error.as_db_error().map(|db| db.code().code()).filter(|code| !is_end(code));
        let Some(code) = code else {
            // The connection ended.
            return Err(if is_over { unknown(context, &error) } else { classify(context, &error) });
        };
        let server = |error: tokio_postgres::Error| classify(context, &error);
        if !is_over {
            self.client.batch_execute("ROLLBACK").await.map_err(server)?;
        }
        let reason = || format!("{context}: {}", describe(&error));
        match error::of_write(code) {
            Kind::TooMuch if code == "53400" && rows.is_of_one_message() => {
                Err(Error::Doubtful { context: context.to_owned(), reason: describe(&error) })
            }
            Kind::TooMuch => Err(Error::TooMuch(reason())),
            // The rows of the next try are the same ones; by then whatever failed may be back.
            Kind::Outside if !isolates => {
                self.outside += 1;
                if self.outside < OUTSIDE_TRIES { Err(Error::Retry(reason())) } else { Ok(Tried::Isolate) }
            }
            Kind::Outside | Kind::Retry => Err(self.blocked.classify(context, &error).await),
            Kind::Row { .. } => {
                let now = table::fingerprint(&self.client, &self.table).await.map_err(server)?;
                if now.as_ref() != Some(&self.binding.fingerprint) {
                    return Err(changed());
                }
                // Isolating ends in an error only where no row is the cause.
                if isolates { Err(Error::Setup(reason())) } else { Ok(Tried::Isolate) }
            }
        }
    }

    /// Returns why no row is rejected of those that `headworks_isolate` returned.
    async fn why_all_wait(&mut self, isolated: &[Row]) -> Result<Option<Isolated>, tokio_postgres::Error> {
        if self.ignores_otherwise(isolated).await? {
            return Ok(Some(Isolated::Changed));
        }
        Ok(self.of_the_table(isolated).await?.map(Isolated::Setup))
    }

    /// Returns whether `on_conflict: ignore` now uses other keys than the binding. This is checked if a
    /// row conflicted with a key, and for errors that may come from ON CONFLICT itself. Keys and
    /// triggers of partitions are not in the fingerprint, because there may be thousands of them, and
    /// each transaction compares it.
    async fn ignores_otherwise(&self, isolated: &[Row]) -> Result<bool, tokio_postgres::Error> {
        let may_be_by_key = |row: &Row| match row.get::<_, Option<&str>>(2) {
            Some("23505" | "23P01") => true,
            Some(code) => error::of_write(code) == Kind::Row { certain: false },
            None => false,
        };
        if self.on_conflict != OnConflict::Ignore || !isolated.iter().any(may_be_by_key) {
            return Ok(false);
        }
        let table = Table::read(&self.client, &self.table).await?;
        let is_filled = |name: &String| self.columns.columns.iter().any(|column| column.name == *name);
        Ok(table.is_none_or(|table| table.ignores(is_filled) != self.binding.ignores))
    }

    /// Returns why all rows must wait, if a row was rejected by a constraint on columns that only the
    /// table fills: no other row would succeed.
    async fn of_the_table(&mut self, isolated: &[Row]) -> Result<Option<String>, tokio_postgres::Error> {
        let filled: Vec<&str> = self.columns.columns.iter().map(|column| column.name.as_str()).collect();
        for row in isolated {
            let text = |i: usize| row.get::<_, Option<&str>>(i).unwrap_or_default();
            let of = [6, 10, 11, 12].map(|i| text(i).to_owned());
            let [column, schema, table, constraint] = &of;
            let is_of_constraint = text(2).starts_with("23") && !(column.is_empty() && constraint.is_empty());
            if self.binding.has_rules || !is_of_constraint || self.of_rows.contains(&of) {
                continue;
            }
            let parameters: [&(dyn ToSql + Sync); 6] =
                [&self.table, schema, table, constraint, column, &filled];
            if self.client.query_one(table::FILLED_BY_TABLE, &parameters).await?.get(0) {
                return Ok(Some(format!("{}: {MEND_DEFAULT}", reason(row))));
            }
            // A trigger may name what a row holds.
            if self.of_rows.len() >= OF_ROWS_MAX {
                self.of_rows.clear();
            }
            self.of_rows.insert(of);
        }
        Ok(None)
    }

    /// Returns the rejected rows and the number of written ones from the result of `headworks_isolate`.
    fn isolated(
        &mut self,
        rows: &Rows,
        mut rejected: Vec<RefusedRow>,
        isolated: &[Row],
    ) -> Result<(Vec<RefusedRow>, u64), Isolated> {
        let is_encoded = |row: &usize| rejected.binary_search_by_key(row, |r| r.row).is_err();
        let sent: Vec<usize> = (0..rows.len()).filter(is_encoded).collect();
        let mut written = 0;
        let mut by_server: Vec<RefusedRow> = Vec::new();
        // Rows without a partition, each with the column of times that decides about its partition.
        let mut unplaced = Vec::new();
        for row in isolated {
            let text = |i: usize| row.get::<_, Option<&str>>(i).filter(|text| !text.is_empty());
            let Some(place) = row.get::<_, Option<i32>>(0) else {
                written = row.get::<_, i64>(1) as u64;
                continue;
            };
            let (code, reason) = (text(2).unwrap_or_default(), reason(row));
            if row.get::<_, Option<bool>>(9) == Some(true) {
                let advice = if code == "23514" { "create the partition" } else { MEND_DEFAULT };
                return Err(Isolated::Setup(format!("{reason}: {advice}")));
            }
            let Some(row) = sent.get(place as usize).copied() else { continue };
            let time = |name: &str| self.columns.columns.iter().position(|column| column.name == name);
            unplaced.extend(text(7).and_then(time).map(|column| (row, column)));
            by_server.push(RefusedRow { row, reason, code: Some(code.to_owned()) });
        }
        by_server.sort_unstable_by_key(|rejected| rejected.row);
        let at = |row: &usize| by_server.binary_search_by_key(row, |rejected| rejected.row);
        let mut newest = BTreeMap::new();
        for (row, column) in unplaced {
            let newest = *newest.entry(column).or_insert_with(|| {
                let is_written = |row: &&usize| at(row).is_err();
                sent.iter().filter(is_written).map(|row| self.time_of(rows, *row, column)).max()
            });
            let time = self.time_of(rows, row, column);
            // A row of this time or a later one was written: the partition of now is there.
            if newest.is_none_or(|newest| newest < time)
                && is_of_now(rows.get(row).entry.received_us, time)
                && let Ok(at) = at(&row)
            {
                return Err(Isolated::Setup(format!("{}: create the partition", by_server[at].reason)));
            }
        }
        let code = |row: &RefusedRow| row.code.clone().unwrap_or_default();
        let is_outside = |row: &&RefusedRow| error::of_write(&code(row)) == Kind::Outside;
        match by_server.iter().find(is_outside) {
            None => self.outside = 0,
            Some(row) if self.outside < OUTSIDE_TRIES => {
                self.outside += 1;
                return Err(Isolated::Retry(row.reason.clone()));
            }
            // Nothing tells that another row would do better.
            Some(row) if by_server.len() == sent.len() => return Err(Isolated::Setup(row.reason.clone())),
            Some(_) => {}
        }
        let is_certain = |row: &RefusedRow| error::of_write(&code(row)) == Kind::Row { certain: true };
        if by_server.len() == sent.len()
            && !by_server.iter().any(is_certain)
            && let Some(first) = by_server.first()
        {
            let doubtful = by_server.iter().all(|row| error::is_doubtful(&code(row)));
            let reason = first.reason.clone();
            return Err(if doubtful { Isolated::Doubtful(reason) } else { Isolated::Setup(reason) });
        }
        rejected.extend(by_server);
        Ok((rejected, written))
    }

    /// Returns the value of a row in a column of times, in microseconds since 1970.
    fn time_of(&self, rows: &Rows, row: usize, column: usize) -> i64 {
        let message = rows.get(row);
        let mut time = None;
        let read = self.columns.reader().read(row, message, |i, value| {
            if i == column {
                time = value.time_us().or_else(|| value.day()?.checked_mul(DAY_US));
            }
            Ok(())
        });
        // Numbers in the column's own unit are of the message's time.
        time.filter(|_| read.is_ok()).or(message.event_us()).unwrap_or(message.entry.received_us as i64)
    }

    /// Ends a transaction in which a position could not be advanced.
    async fn fenced(&self, context: &str, advance: &[Advance]) -> Error {
        let refusal = async {
            self.client.batch_execute("ROLLBACK").await?;
            self.begin().await?;
            let refusal = self.held.refusal(&self.client, advance).await?;
            self.client.batch_execute("ROLLBACK").await?;
            Ok::<_, tokio_postgres::Error>(refusal)
        };
        match refusal.await {
            Ok(error) => error.within(context),
            Err(error) => classify(context, &error),
        }
    }
}

/// What to do if a default of the table fails.
const MEND_DEFAULT: &str =
    "the table fills this by itself, alike for every row: fix the default, or its sequence";

/// Returns why a row that `headworks_isolate` returned cannot be inserted.
fn reason(row: &Row) -> String {
    let text = |i: usize| row.get::<_, Option<&str>>(i).filter(|text| !text.is_empty());
    let (code, message) = (text(2).unwrap_or_default(), text(3).unwrap_or_default());
    error::describe_parts(message, code, text(6), [text(4), text(5), text(8)])
}

/// Result of beginning a transaction.
pub struct Begun {
    /// The server process.
    pub backend: i32,
    /// Whether the configured name denotes the table of the session.
    pub means_table: bool,
}

/// Begins a transaction without a prepared statement, whose name might denote another client's. With a
/// `session`, sets the `search_path` of the sink's own statements and the settings for parsing text,
/// because triggers of earlier transactions may have changed them.
pub async fn begin(client: &Client, session: Option<&Session>) -> Result<Begun, tokio_postgres::Error> {
    let mut sql = format!("{BEGIN}; SELECT pg_backend_pid(); SELECT {}", text_forms());
    if let Some(Session { path, name, table, .. }) = session {
        sql += &format!(
            "; SELECT set_config('search_path', {}, true); SELECT to_regclass({}) IS NOT DISTINCT FROM to_regclass({})",
            literal(path),
            literal(name),
            literal(table),
        );
    }
    let answers = client.simple_query(&sql).await?;
    let mut rows = answers.iter().filter_map(|answer| match answer {
        SimpleQueryMessage::Row(row) => row.get(0),
        _ => None,
    });
    let backend = rows.next().and_then(|text| text.parse().ok()).unwrap_or_default();
    Ok(Begun { backend, means_table: session.is_none() || rows.next_back() == Some("t") })
}

/// Why isolating gives no rows to reject.
enum Isolated {
    Setup(String),
    Doubtful(String),
    Retry(String),
    /// The table is not the bound one.
    Changed,
}

impl Isolated {
    fn within(self, context: &str) -> Error {
        match self {
            Self::Setup(reason) => Error::Setup(format!("{context}: {reason}")),
            Self::Doubtful(reason) => Error::Doubtful { context: context.to_owned(), reason },
            Self::Retry(reason) => Error::Retry(format!("{context}: {reason}")),
            Self::Changed => {
                Error::Retry(format!("{context}: the table has changed: opening the sink again"))
            }
        }
    }
}

/// Returns whether the table should have a partition for a row of this time, which has none.
fn is_of_now(received_us: u64, time: i64) -> bool {
    let us = |period: Duration| period.as_micros() as i64;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, us);
    let received = received_us as i64;
    let around = received - us(BEHIND_MAX)..=received + us(AHEAD_MAX);
    around.contains(&time) && now.abs_diff(received) < us(WAITS_MAX).unsigned_abs()
}

/// Returns the error after COMMIT was sent. An answer of the server means that it did not commit
/// (deferred constraints); without an answer the result is unknown.
pub fn unknown(context: &str, error: &tokio_postgres::Error) -> Error {
    match error.as_db_error() {
        Some(db) if !is_end(db.code().code()) => classify(context, error),
        _ => Error::Unknown(format!("{context}: {}", describe(error))),
    }
}
