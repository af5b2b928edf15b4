//! The connection and the transaction.
//!
//! One batch is two round trips: `BEGIN`, the advance of the positions and the
//! head of COPY go out together; then the rows, `COMMIT` right behind them. The
//! positions move first, so that a fenced host learns it before it sends rows.
//! Encoding and the server's work overlap, a chunk at a time.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::SinkExt;
use futures_util::future::{join, join3};
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_postgres::{Client, CopyInSink, Statement};

use super::config::{Config, SslMode};
use super::encode::{HEADER, TRAILER, Target};
use super::error::{classify, classify_copy, describe};
use super::positions::{self, Held};
use super::schema::{self, Table};
use super::tls;
use crate::sinks::columns::Columns;
use crate::sinks::config::OnConflict;
use crate::sinks::{Advance, Claim, Error, Position, RefusedRow, Rows, Sink, holder};
use crate::topic::Namespace;

/// Bytes that are encoded before they go to the server.
const CHUNK_BYTES: usize = 64 << 10;
/// Refused rows named in one answer; the rest come with the next try.
const REFUSED_MAX: usize = 10_000;
/// Over the server's own timeouts, for one that does not answer at all.
const GRACE: Duration = Duration::from_secs(10);

pub struct PostgresSink {
    name: String,
    config: Config,
    columns: Columns,
    /// Taken while a call runs: a call that was dropped midway leaves none.
    session: Option<Session>,
    buffer: BytesMut,
}

/// A connection with a claim.
struct Session {
    client: Client,
    connection: AbortHandle,
    held: Held,
    copy: Statement,
    /// From the temporary table, where COPY goes there.
    insert: Option<Statement>,
    columns: Columns,
    targets: Vec<Target>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl PostgresSink {
    pub fn new(name: &str, config: Config, namespace: Arc<Namespace>) -> Self {
        let columns = Columns::new(&config.columns, namespace);
        Self { name: name.to_owned(), config, columns, session: None, buffer: BytesMut::new() }
    }

    fn context(&self) -> String {
        format!("sink \"{}\": {}", self.name, self.config.url.target())
    }

    /// No call takes longer, whatever the server does.
    fn deadline(&self) -> Duration {
        self.config.statement_timeout.0 + self.config.lock_timeout.0 + GRACE
    }

    async fn connect(&self) -> Result<(Client, AbortHandle), Error> {
        let context = format!("sink \"{}\": cannot connect to {}", self.name, self.config.url.target());
        let setup = |reason: String| Error::Setup(format!("sink \"{}\": {reason}", self.name));
        let mut target = self.config.url.parse().map_err(setup)?;
        if let Some(password) = &self.config.password {
            target.password(password.read().map_err(setup)?);
        }
        let mode = self.config.sslmode();
        let dead_after = self.config.dead_after.0;
        target
            .ssl_mode(match mode {
                SslMode::Disable => tokio_postgres::config::SslMode::Disable,
                SslMode::Prefer => tokio_postgres::config::SslMode::Prefer,
                _ => tokio_postgres::config::SslMode::Require,
            })
            .application_name(format!("headworks/{}", self.name))
            .connect_timeout(self.config.connect_timeout.0)
            .tcp_user_timeout(dead_after)
            .keepalives_idle(dead_after / 2)
            .keepalives_interval((dead_after / 6).max(Duration::from_secs(1)))
            .keepalives_retries(3);
        let tls = tls::connector(mode, &self.config.tls).map_err(setup)?;
        let (client, connection) = target.connect(tls).await.map_err(|error| classify(&context, &error))?;
        let name = self.name.clone();
        let task = tokio::spawn(async move {
            if let Err(error) = connection.await {
                // Whoever waits for an answer gets an error of its own.
                tracing::debug!(sink = name, error = describe(&error), "connection ended");
            }
        });
        let connection = task.abort_handle();
        let ms = |period: crate::units::Period| period.0.as_millis();
        let settings = format!(
            "SET lock_timeout = {}; SET statement_timeout = {}; \
             SET idle_in_transaction_session_timeout = {}; SET client_min_messages = warning; \
             SELECT set_config('synchronous_commit', 'on', false) \
             WHERE current_setting('synchronous_commit') IN ('off', 'local')",
            ms(self.config.lock_timeout),
            ms(self.config.statement_timeout),
            ms(self.config.dead_after),
        );
        client.batch_execute(&settings).await.map_err(|error| classify(&context, &error))?;
        Ok((client, connection))
    }

    async fn try_open(&self, claim: &Claim) -> Result<(Session, Vec<Position>), Error> {
        let (client, connection) = self.connect().await?;
        let context = self.context();
        let server = |error: tokio_postgres::Error| classify(&context, &error);
        client.batch_execute("BEGIN").await.map_err(server)?;
        client.batch_execute(positions::LOCK).await.map_err(server)?;
        self.create_missing(&client).await?;
        let table = Table::read(&client, &self.config.table).await.map_err(server)?.ok_or_else(|| {
            Error::Setup(format!("{context}: there is no table {}: create it, or set `create: true`", self.config.table))
        })?;
        let mut columns = self.columns.clone();
        let targets = table
            .bind(&self.config.table, &mut columns)
            .map_err(|reason| Error::Setup(format!("{context}: {reason}")))?;
        let (held, positions) = Held::claim(&client, claim, &holder()).await.map_err(server)?;
        client.batch_execute("COMMIT").await.map_err(server)?;

        let (into, insert) = self.target(&client, &columns, &table).await.map_err(server)?;
        let list = schema::column_list(&columns);
        let copy = format!("COPY {into} ({list}) FROM STDIN (FORMAT binary)");
        let copy = client.prepare(&copy).await.map_err(server)?;
        let insert = match insert {
            Some(insert) => Some(client.prepare(&insert).await.map_err(server)?),
            None => None,
        };
        Ok((Session { client, connection, held, copy, insert, columns, targets }, positions))
    }

    /// Within the transaction of `open`, under its lock.
    async fn create_missing(&self, client: &Client) -> Result<(), Error> {
        let context = self.context();
        let server = |error: tokio_postgres::Error| classify(&context, &error);
        let exists = "SELECT to_regclass($1) IS NOT NULL";
        let known: bool =
            client.query_one(exists, &[&"headworks_positions"]).await.map_err(server)?.get(0);
        if !known {
            client.batch_execute(positions::CREATE).await.map_err(|error| {
                classify(&format!("{context}: cannot create the table headworks_positions"), &error)
            })?;
        }
        let table = schema::quoted_table(&self.config.table);
        let known: bool = client.query_one(exists, &[&table]).await.map_err(server)?.get(0);
        if known || !self.config.create {
            return Ok(());
        }
        let sql = schema::create_table(&self.config, &self.columns)
            .map_err(|reason| Error::Setup(format!("{context}: {reason}")))?;
        let creating = format!("{context}: cannot create table {}", self.config.table);
        client.batch_execute(&sql).await.map_err(|error| classify(&creating, &error))?;
        let timescale = client
            .query_opt(
                "SELECT EXISTS (SELECT 1 FROM pg_extension WHERE extname = name)
                 FROM pg_available_extensions WHERE name = 'timescaledb'",
                &[],
            )
            .await
            .map_err(server)?
            .map(|row| row.get::<_, bool>(0));
        match (timescale, schema::hypertable(&self.config, &self.columns)) {
            (Some(true), Some(sql)) => {
                client.batch_execute(&sql).await.map_err(|error| classify(&creating, &error))?;
            }
            (Some(false), Some(_)) => {
                let hint = "CREATE EXTENSION timescaledb, then create_hypertable with migrate_data";
                tracing::info!(sink = self.name, hint, "TimescaleDB is installed but not enabled here");
            }
            _ => {}
        }
        tracing::info!(sink = self.name, table = self.config.table, "created the table");
        Ok(())
    }

    /// Where COPY goes, and the statement that takes the rows on from there.
    async fn target(
        &self,
        client: &Client,
        columns: &Columns,
        table: &Table,
    ) -> Result<(String, Option<String>), tokio_postgres::Error> {
        let name = schema::quoted_table(&self.config.table);
        let through_stage = match self.config.on_conflict {
            OnConflict::Auto => table.has_unique_key,
            OnConflict::Ignore => true,
            OnConflict::Refuse => false,
        };
        if !through_stage {
            return Ok((name, None));
        }
        let list = schema::column_list(columns);
        client
            .batch_execute(&format!(
                "CREATE TEMPORARY TABLE headworks_stage ON COMMIT DELETE ROWS AS SELECT {list} FROM {name} WITH NO DATA"
            ))
            .await?;
        let insert =
            format!("INSERT INTO {name} ({list}) SELECT {list} FROM headworks_stage ON CONFLICT DO NOTHING");
        Ok(("headworks_stage".to_owned(), Some(insert)))
    }
}

#[async_trait]
impl Sink for PostgresSink {
    async fn open(&mut self, claim: &Claim) -> Result<Vec<Position>, Error> {
        self.session = None;
        let limit = self.config.connect_timeout.0 + self.deadline();
        let (session, positions) = timeout(limit, self.try_open(claim)).await.map_err(|_| {
            Error::Retry(format!("{}: no answer for {} s", self.context(), limit.as_secs()))
        })??;
        self.session = Some(session);
        Ok(positions)
    }

    async fn commit(&mut self, rows: &Rows, advance: &[Advance]) -> Result<(), Error> {
        if rows.is_empty() && advance.is_empty() {
            return Ok(());
        }
        let context = self.context();
        let session = self
            .session
            .take()
            .ok_or_else(|| Error::Retry(format!("{context}: not open: the last call did not end well")))?;
        let limit = self.deadline();
        let outcome = match timeout(limit, session.commit(&context, rows, advance, &mut self.buffer)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Error::Unknown(format!("{context}: no answer for {} s", limit.as_secs()))),
        };
        // After these the transaction is over and the connection good.
        if matches!(outcome, Ok(()) | Err(Error::Rows(_) | Error::Data(_))) {
            self.session = Some(session);
        }
        outcome
    }
}

impl Session {
    async fn commit(
        &self,
        context: &str,
        rows: &Rows,
        advance: &[Advance],
        buffer: &mut BytesMut,
    ) -> Result<(), Error> {
        let server = |error: tokio_postgres::Error| classify(context, &error);
        let client = &self.client;
        let begin = client.batch_execute("BEGIN");
        let moved = async {
            match advance {
                [] => Ok(0),
                advance => self.held.advance(client, advance).await,
            }
        };
        if rows.is_empty() {
            let (begun, moved) = join(begin, moved).await;
            begun.map_err(server)?;
            self.check(context, moved.map_err(server)?, advance).await?;
            return client.batch_execute("COMMIT").await.map_err(|error| unknown(context, &error));
        }
        // Polled in this order, so sent in this order.
        let (begun, moved, copy) = join3(begin, moved, client.copy_in(&self.copy)).await;
        begun.map_err(server)?;
        let moved = moved.map_err(server)?;
        if moved != advance.len() as u64 {
            // Ends COPY: what follows would wait behind it.
            drop(copy);
            return self.check(context, moved, advance).await;
        }
        let copy = copy.map_err(server)?;
        match self.send(copy, rows, buffer).await {
            Sent::Committed => Ok(()),
            Sent::Refused(refused) => {
                client.batch_execute("ROLLBACK").await.map_err(server)?;
                Err(Error::Rows(refused))
            }
            // The server refused the rows: what followed in the transaction was void.
            Sent::Copy(error) if error.as_db_error().is_some() => {
                Err(classify_copy(context, &error, rows.len()))
            }
            Sent::Insert(error) if error.as_db_error().is_some() => Err(classify(context, &error)),
            Sent::Copy(error) | Sent::Insert(error) | Sent::Commit(error) => Err(unknown(context, &error)),
        }
    }

    /// Rows, the insert from the temporary table, COMMIT: all sent before the first answer.
    async fn send(&self, copy: CopyInSink<Bytes>, rows: &Rows, buffer: &mut BytesMut) -> Sent {
        let mut copy = pin!(copy);
        let mut refused: Vec<RefusedRow> = Vec::new();
        let mut reader = self.columns.reader();
        buffer.clear();
        buffer.reserve(2 * CHUNK_BYTES);
        buffer.put_slice(&HEADER);
        for (row, message) in rows.iter().enumerate() {
            let begin = buffer.len();
            buffer.put_i16(self.targets.len() as i16);
            let outcome = reader.read(row, message, |i, value| self.targets[i].put(value, buffer));
            if let Err(reason) = outcome {
                buffer.truncate(begin);
                refused.push(reason);
                if refused.len() == REFUSED_MAX {
                    break;
                }
            } else if !refused.is_empty() {
                // This transaction ends in a rollback: only look for more reasons.
                buffer.truncate(begin);
            } else if buffer.len() >= CHUNK_BYTES {
                if let Err(error) = copy.feed(buffer.split().freeze()).await {
                    return Sent::Copy(error);
                }
                buffer.reserve(2 * CHUNK_BYTES);
            }
        }
        if !refused.is_empty() {
            // Dropped without `finish`, COPY fails.
            return Sent::Refused(refused);
        }
        buffer.put_slice(&TRAILER);
        if let Err(error) = copy.feed(buffer.split().freeze()).await {
            return Sent::Copy(error);
        }
        let insert = async {
            match &self.insert {
                Some(insert) => self.client.execute(insert, &[]).await.map(|_| ()),
                None => Ok(()),
            }
        };
        // Committed last: before this line a crash redelivers, never loses.
        let (copied, inserted, committed) =
            join3(copy.finish(), insert, self.client.batch_execute("COMMIT")).await;
        match (copied, inserted, committed) {
            (Err(error), ..) => Sent::Copy(error),
            (_, Err(error), _) => Sent::Insert(error),
            (_, _, Err(error)) => Sent::Commit(error),
            (Ok(_), Ok(()), Ok(())) => Sent::Committed,
        }
    }

    /// Whether all positions were ours to move; ends the transaction if not.
    async fn check(&self, context: &str, moved: u64, advance: &[Advance]) -> Result<(), Error> {
        if moved == advance.len() as u64 {
            return Ok(());
        }
        let server = |error: tokio_postgres::Error| classify(context, &error);
        self.client.batch_execute("ROLLBACK").await.map_err(server)?;
        let reason = self.held.usurper(&self.client, advance).await.map_err(server)?;
        Err(Error::Fenced(format!("{context}: {reason}")))
    }
}

/// How far the rows came.
enum Sent {
    Committed,
    Refused(Vec<RefusedRow>),
    Copy(tokio_postgres::Error),
    Insert(tokio_postgres::Error),
    Commit(tokio_postgres::Error),
}

/// COMMIT was sent. An answer from the server says that it did not happen
/// (deferred constraints); no answer says nothing.
fn unknown(context: &str, error: &tokio_postgres::Error) -> Error {
    match error.as_db_error() {
        // 57P: the server ended the connection, perhaps after the commit.
        Some(db) if !db.code().code().starts_with("57P") => classify(context, error),
        _ => Error::Unknown(format!("{context}: {}", describe(error))),
    }
}
