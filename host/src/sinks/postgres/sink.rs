//! The connection and the transaction.
//!
//! One batch takes two round trips. The first sends `BEGIN`, the check that the server process is the
//! one in which the statements were prepared, the advance of the positions, and the head of COPY. The
//! second sends the rows, and right after them the check that the table is still the bound one, and
//! `COMMIT`. The positions advance first, so that a fenced host learns of it before it sends rows.
//! Encoding and the server's work overlap, chunk by chunk.
//!
//! If the server rejects a row, the batch goes through the staging table (`stage`), which isolates the
//! row, and the transaction waits for `finish`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::BytesMut;
use tokio::time::timeout;
use tokio_postgres::{Client, Statement};
use uuid::Uuid;

use super::blocked::Blocked;
use super::config::Config;
use super::connect::{Connection, connect, settings};
use super::error::classify;
use super::positions::{self, Held, Refusal};
use super::schema::{self, no_table};
use super::stage;
use super::table::{self, Binding, Table, column_list};
use super::transaction::{Tried, begin, unknown};
use super::young::{Keeper, Slot};
use crate::batch::{Offset, Partition};
use crate::sinks::columns::Columns;
use crate::sinks::positions::holder;
use crate::sinks::{
    Advance, Claim, Epoch, Error, Found, LogPosition, Name, OnConflict, Opened, Outcome, PassPosition,
    RefusedRow, Rows, Sink, Written,
};
use crate::telemetry::Failures;
use crate::topic::Namespace;

/// Additional time beyond the server's own timeouts, for a server that does not answer at all.
const GRACE: Duration = Duration::from_secs(10);

pub struct PostgresSink {
    name: String,
    config: Config,
    columns: Columns,
    failures: Failures,
    blocked: Arc<Blocked>,
    /// Taken out while a call runs: a call that was dropped midway leaves none.
    session: Slot,
    /// The last batch had rows that the server rejected: the next one is
    /// isolated at once, for its first try would be in vain.
    isolates: bool,
    /// Number of consecutive commits that failed outside of the database.
    outside: u32,
    buffer: BytesMut,
}

/// A connection with a claim.
pub struct Session {
    pub client: Client,
    /// Ends with the session.
    pub connection: Connection,
    /// The server process, which must be the same for all transactions, because statements were prepared
    /// in it.
    pub backend: i32,
    pub blocked: Arc<Blocked>,
    pub held: Held,
    /// COPY to the table, or to the staging table if all rows go through it.
    pub copy: Statement,
    pub insert: Option<Statement>,
    /// Counts the staged rows that later rows of the batch replace.
    pub replaced: Option<Statement>,
    pub check: Statement,
    /// The table's quoted name, as in the config.
    pub name: String,
    /// The quoted name of the bound table, with its schema.
    pub table: String,
    /// The `search_path` of the session at its start.
    pub path: String,
    pub columns: Columns,
    pub binding: Binding,
    /// The staging table, created with the first rows that need it.
    pub stage: Option<Stage>,
    /// Column, schema, table and constraint of errors that concern the contents of a row.
    pub of_rows: BTreeSet<[String; 4]>,
    pub on_conflict: OnConflict,
    /// Number of consecutive commits that failed outside of the database, including those of earlier
    /// sessions.
    pub outside: u32,
    /// A transaction that waits for `finish`.
    pub uncommitted: Option<Written>,
}

pub struct Stage {
    pub copy: Statement,
    pub isolate: Statement,
    /// Keeps the temporary tables of this connection young.
    #[cfg_attr(not(test), expect(dead_code, reason = "it is held"))]
    keeper: Keeper,
}

impl PostgresSink {
    pub fn new(name: &str, mut config: Config, namespace: Arc<Namespace>, failures: Failures) -> Self {
        config.on_conflict = config.on_conflict.resolved();
        let columns = Columns::new(&config.columns, namespace);
        let blocked = Arc::new(Blocked { name: name.to_owned(), config: config.clone() });
        Self {
            name: name.to_owned(),
            config,
            columns,
            failures,
            blocked,
            session: Slot::default(),
            isolates: false,
            outside: 0,
            buffer: BytesMut::new(),
        }
    }

    /// Returns the prefix of each reason. The caller that shows the reason names the sink.
    fn context(&self) -> String {
        self.config.url.target()
    }

    #[cfg(test)]
    pub fn is_staged(&self) -> bool {
        let session = self.session.try_lock().expect("no call runs");
        session.as_ref().is_some_and(|session| session.binding.staged)
    }

    /// Makes truncating the temporary tables due.
    #[cfg(test)]
    pub fn age_stage(&self) {
        let session = self.session.try_lock().expect("no call runs");
        session
            .as_ref()
            .and_then(|session| session.stage.as_ref())
            .expect("rows went through it")
            .keeper
            .wake();
    }

    fn take(&self, slot: &mut Option<Session>) -> Result<Session, Error> {
        slot.take().ok_or_else(|| {
            Error::Retry(format!(
                "{}: the connection was given up, because the last call did not end well",
                self.context()
            ))
        })
    }

    /// Runs a transaction, or its end, within the deadline.
    async fn within<T>(&self, call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let limit = self.deadline();
        timeout(limit, call).await.unwrap_or_else(|_| {
            Err(Error::Unknown(format!("{}: no answer for {} s", self.context(), limit.as_secs())))
        })
    }

    /// Returns the longest time of a transaction, whatever the server does.
    fn deadline(&self) -> Duration {
        self.config.statement_timeout.0 + self.config.lock_timeout.0 + GRACE
    }

    async fn try_open(
        &self,
        (client, connection): (Client, Connection),
        claim: &Claim,
        held: Option<Epoch>,
    ) -> Result<(Session, Opened), Error> {
        let context = self.context();
        let server = |error: tokio_postgres::Error| classify(&context, &error);
        let backend = begin(&client, None).await.map_err(server)?.backend;
        client.batch_execute(&settings(&self.config)).await.map_err(server)?;
        if let Err(error) = client.batch_execute(positions::LOCK).await {
            return Err(self.blocked.classify(&context, &error).await);
        }
        self.create_positions(&client, claim, held).await?;
        let name = schema::quoted_table(&self.config.table);
        let held = Held::claim(&client, claim, held, &holder(), &name).await;
        let (held, positions) = match held {
            Ok(claimed) => claimed,
            Err(Refusal::Server(error)) => {
                return Err(self.blocked.classify(&context, &error).await);
            }
            Err(Refusal::Sink(error)) => return Err(error.within(&context)),
        };
        let lacks = stage::lacks_right(&client).await.map_err(server)?;
        if !lacks.is_empty() {
            return Err(Error::Setup(format!("{context}: {}", lacks.join("; "))));
        }
        // A table that this sink filled before and that is gone was taken away by somebody.
        if self.config.create && positions.is_empty() {
            self.create_table(&client).await?;
        }
        // Names are resolved anew in each statement, so from here on this one stands for the table.
        let qualified = table::qualified(&client, &name).await.map_err(server)?;
        let table = Table::read(&client, &qualified).await.map_err(server)?;
        let table = match table {
            Some(table) => table,
            None => {
                let was_there = !positions.is_empty();
                let reason = no_table(&client, &self.config.table, was_there).await.map_err(server)?;
                return Err(Error::Setup(format!("{context}: {reason}")));
            }
        };
        for warning in table.warnings(&self.config.table) {
            tracing::warn!(sink = self.name, "{warning}");
        }
        let mut columns = self.columns.clone();
        let binding = table
            .bind(&self.config.table, &mut columns, self.config.on_conflict)
            .map_err(|reason| Error::Setup(format!("{context}: {reason}")))?;
        let mut found = Found::default();
        if positions.is_empty() {
            let has_rows = schema::has_rows(&client, &qualified).await.map_err(server)?;
            let others = positions::others(&client, claim, &qualified).await.map_err(server)?;
            let other_logs = positions::other_logs(&client, claim, &qualified).await.map_err(server)?;
            found = Found { has_rows, others, other_logs };
        }
        held.set_table(&client, &qualified).await.map_err(server)?;
        let path = table::search_path(&client).await.map_err(server)?;

        columns.warn_of_times_without_unit(&self.name);
        let check = client.prepare(&table::check()).await.map_err(server)?;
        let mut replaced = None;
        let (stage, copy, insert) = if binding.staged {
            let stage = self.stage(&client, &qualified, &columns, &binding, &path).await?;
            let insert = stage::insert(&qualified, &columns, &binding, self.config.on_conflict);
            let insert = client.prepare(&insert).await.map_err(server)?;
            if self.config.on_conflict == OnConflict::Upsert {
                let sql = stage::replaced(&columns, &binding, "headworks_stage");
                replaced = Some(client.prepare(&sql).await.map_err(server)?);
            }
            let copy = stage.copy.clone();
            (Some(stage), copy, Some(insert))
        } else {
            let create = stage::create(&qualified, &columns, &binding, self.config.on_conflict, &path);
            stage::attempt(&client, &create).await.map_err(|error| self.cannot_stage(&error))?;
            let copy = format!("COPY {qualified} ({}) FROM STDIN (FORMAT binary)", column_list(&columns));
            (None, client.prepare(&copy).await.map_err(server)?, None)
        };
        // After the statements: they are prepared where the transactions run.
        client.batch_execute("COMMIT").await.map_err(server)?;
        let session = Session {
            client,
            connection,
            backend,
            blocked: Arc::clone(&self.blocked),
            held,
            copy,
            insert,
            replaced,
            check,
            name,
            table: qualified,
            path,
            columns,
            binding,
            stage,
            of_rows: BTreeSet::new(),
            on_conflict: self.config.on_conflict,
            outside: self.outside,
            uncommitted: None,
        };
        let epoch = session.held.epoch;
        Ok((session, Opened { epoch, positions, found }))
    }

    /// Returns the staging table and its statements.
    async fn stage(
        &self,
        client: &Client,
        table: &str,
        columns: &Columns,
        binding: &Binding,
        path: &str,
    ) -> Result<Stage, Error> {
        let sql = stage::create(table, columns, binding, self.config.on_conflict, path);
        client.batch_execute(&sql).await.map_err(|error| self.cannot_stage(&error))?;
        let server = |error: tokio_postgres::Error| classify(&self.context(), &error);
        let copy = client.prepare(stage::COPY).await.map_err(server)?;
        let isolate = client.prepare(stage::ISOLATE).await.map_err(server)?;
        let truncate =
            if stage::has_probe(columns, binding) { stage::TRUNCATE_BOTH } else { stage::TRUNCATE };
        let keeper = Keeper::new(&self.session, &self.name, self.context(), self.deadline(), truncate);
        Ok(Stage { copy, isolate, keeper })
    }

    fn cannot_stage(&self, error: &tokio_postgres::Error) -> Error {
        classify(&format!("{}: {}", self.context(), stage::CANNOT), error)
    }

    /// Creates the table of positions, within the transaction of `open` and under its lock. A table that
    /// this process has used (`held`) is not created again, unless the sink's own table is empty.
    async fn create_positions(
        &self,
        client: &Client,
        claim: &Claim,
        held: Option<Epoch>,
    ) -> Result<(), Error> {
        let context = self.context();
        let server = |error: tokio_postgres::Error| classify(&context, &error);
        let exists = "SELECT to_regclass($1) IS NOT NULL";
        let known: bool = client.query_one(exists, &[&"headworks_positions"]).await.map_err(server)?.get(0);
        let change = match known {
            true => positions::upgrade(client).await.map_err(server)?,
            false => {
                let table = schema::quoted_table(&self.config.table);
                if held.is_some() && schema::has_rows(client, &table).await.map_err(server)? {
                    return Err(Error::Choose(format!("{context}: {}", claim.gone())));
                }
                Some(positions::CREATE.to_owned())
            }
        };
        let Some(change) = change else { return Ok(()) };
        client.batch_execute(&change).await.map_err(|error| match known {
            true => classify(&format!("{context}: cannot bring headworks_positions to this version"), &error)
                .and(&format!("let its owner run `{change}`")),
            false => classify(&format!("{context}: cannot create the table headworks_positions"), &error),
        })
    }

    /// Creates the table if it is missing, under the same conditions as `create_positions`.
    async fn create_table(&self, client: &Client) -> Result<(), Error> {
        let context = self.context();
        let server = |error: tokio_postgres::Error| classify(&context, &error);
        let table = schema::quoted_table(&self.config.table);
        let exists = "SELECT to_regclass($1) IS NOT NULL";
        let known: bool = client.query_one(exists, &[&table]).await.map_err(server)?.get(0);
        // A second table beside the one that is meant would be filled in silence.
        if known || schema::in_other_case(client, &self.config.table).await.map_err(server)?.is_some() {
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
}

#[async_trait]
impl Sink for PostgresSink {
    async fn open(&mut self, claim: &Claim, held: Option<Epoch>) -> Result<Opened, Error> {
        let mut slot = Arc::clone(&self.session).lock_owned().await;
        *slot = None;
        self.isolates = false;
        let (client, connection) = connect(&self.name, &self.config, &self.failures).await?;
        let (limit, end) = (self.deadline(), connection.end());
        let silent =
            |_| Err(Error::Retry(format!("{}: no answer for {} s", self.context(), limit.as_secs())));
        let opened = timeout(limit, self.try_open((client, connection), claim, held)).await;
        match opened.unwrap_or_else(silent) {
            Ok((session, opened)) => {
                *slot = Some(session);
                Ok(opened)
            }
            Err(error) => Err(end.explain(error).await),
        }
    }

    async fn positions_of(&mut self, claims: &[Name], logs: &[Uuid]) -> Result<Vec<LogPosition>, Error> {
        let mut slot = Arc::clone(&self.session).lock_owned().await;
        let session = self.take(&mut slot)?;
        let context = self.context();
        let asked = async {
            let positions = positions::positions_of(&session.client, claims, logs).await;
            positions.map_err(|error| classify(&context, &error))
        };
        let positions = self.within(asked).await;
        match positions {
            Ok(_) => *slot = Some(session),
            Err(error) => return Err(session.explain(error).await),
        }
        positions
    }

    async fn passes_of(
        &mut self,
        claims: &[Name],
        log: Uuid,
        above: Offset,
    ) -> Result<Vec<PassPosition>, Error> {
        let mut slot = Arc::clone(&self.session).lock_owned().await;
        let session = self.take(&mut slot)?;
        let context = self.context();
        let asked = async {
            let passes = positions::passes_of(&session.client, claims, log, above).await;
            passes.map_err(|error| classify(&context, &error))
        };
        let passes = self.within(asked).await?;
        *slot = Some(session);
        Ok(passes)
    }

    async fn commit(&mut self, rows: &Rows, advance: &[Advance]) -> Result<Outcome, Error> {
        let mut slot = Arc::clone(&self.session).lock_owned().await;
        let waits = slot.as_ref().is_some_and(|session| session.uncommitted.is_some());
        if rows.is_empty() && advance.is_empty() && !waits {
            return Ok(Outcome::Committed(Written::default()));
        }
        let mut session = self.take(&mut slot)?;
        if waits {
            return Err(Error::Retry(format!("{}: the last commit was not finished", self.context())));
        }
        let context = self.context();
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut isolates = self.isolates && !rows.is_empty();
        let outcome = loop {
            if isolates && session.stage.is_none() {
                let made = async {
                    let server = |error: tokio_postgres::Error| classify(&context, &error);
                    let Session { client, table, columns, binding, path, .. } = &session;
                    let begun = session.begin().await.map_err(server)?;
                    session.check_begun(&context, begun)?;
                    let stage = self.stage(client, table, columns, binding, path).await?;
                    client.batch_execute("COMMIT").await.map_err(server)?;
                    Ok(stage)
                };
                session.stage = match self.within(made).await {
                    Ok(stage) => Some(stage),
                    Err(error) => return Err(session.explain(error).await),
                };
            }
            match self.within(session.commit(&context, rows, advance, isolates, &mut buffer)).await {
                Ok(Tried::Done(outcome)) => break Ok(outcome),
                Ok(Tried::Isolate) => isolates = true,
                Err(error) => break Err(session.explain(error).await),
            }
        };
        self.buffer = buffer;
        self.outside = session.outside;
        if let (Ok(outcome), false) = (&outcome, rows.is_empty()) {
            // Where nothing was written, the next batch is tried as it is: it shares nothing with this one.
            let by_server = |rejected: &Vec<RefusedRow>| {
                rejected.len() < rows.len() && rejected.iter().any(|row| row.code.is_some())
            };
            self.isolates = matches!(outcome, Outcome::Rejected(rejected) if by_server(rejected));
        }
        // After these the connection is good, and there is no transaction but one that waits.
        if matches!(outcome, Ok(_) | Err(Error::TooMuch(_) | Error::Doubtful { .. } | Error::Fenced(_))) {
            *slot = Some(session);
        }
        outcome
    }

    async fn set_letters(&mut self, letters: &[(Partition, String)]) -> Result<(), Error> {
        let mut slot = Arc::clone(&self.session).lock_owned().await;
        let session = self.take(&mut slot)?;
        let context = self.context();
        let set = async {
            let set = session.held.set_letters(&session.client, &session.path, letters).await;
            set.map_err(|error| classify(&context, &error))
        };
        self.within(set).await?;
        *slot = Some(session);
        Ok(())
    }

    async fn finish(&mut self) -> Result<Written, Error> {
        let mut slot = Arc::clone(&self.session).lock_owned().await;
        let mut session = self.take(&mut slot)?;
        let context = self.context();
        let written = session
            .uncommitted
            .take()
            .ok_or_else(|| Error::Retry(format!("{context}: there is no transaction to finish")))?;
        let commit =
            async { session.client.batch_execute("COMMIT").await.map_err(|error| unknown(&context, &error)) };
        if let Err(error) = self.within(commit).await {
            return Err(session.explain(error).await);
        }
        *slot = Some(session);
        Ok(written)
    }
}
