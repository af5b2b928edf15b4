//! `validate --connect`: checks what the sink would find, in a read-only transaction, so that the server
//! itself prevents writes. The function that isolates rejected rows is created and rolled back.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use tokio_postgres::Client;

use super::config::Config;
use super::connect::{connect, settings};
use super::error::describe;
use super::positions::{self, Refusal};
use super::schema::{self, no_table, quoted, quoted_table};
use super::stage;
use super::table::{Binding, Ignores, Table};
use super::transaction::BEGIN;
use crate::sinks::columns::Columns;
use crate::sinks::config::table_parts;
use crate::sinks::{Checked, Claim, Error, Found, Looked, OnConflict};
use crate::telemetry::Failures;
use crate::topic::Namespace;

/// The user and the settings of the session.
const SESSION: &str = "
SELECT current_user::text, current_schema()::text,
       pg_is_in_recovery(), current_setting('default_transaction_read_only')::boolean";

/// Rights on the table of positions that this user lacks; no row if there is no table.
const POSITIONS: &str = "
SELECT string_agg(lacks, ', ') FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE']) AS lacks
WHERE NOT has_table_privilege(to_regclass('headworks_positions'), lacks)";

/// Whether this user may alter the table of positions.
const OWNS: &str =
    "SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = to_regclass('headworks_positions')::oid";

/// Whether this user may create tables in a schema; no row if there is no schema.
const CREATE: &str = "SELECT has_schema_privilege(oid, 'CREATE') FROM pg_namespace WHERE nspname = $1";

/// Sequences for defaults of columns, such as those of SERIAL, that this user may not use.
const SEQUENCES: &str = "
SELECT DISTINCT s.oid::regclass::text
FROM pg_attrdef d JOIN pg_attribute a ON a.attrelid = d.adrelid AND a.attnum = d.adnum
JOIN pg_depend p ON p.classid = 'pg_attrdef'::regclass AND p.objid = d.oid AND p.refclassid = 'pg_class'::regclass
JOIN pg_class s ON s.oid = p.refobjid
WHERE d.adrelid = to_regclass($1)::oid AND NOT a.attname = ANY ($2)
  AND CASE WHEN s.relkind = 'S' THEN NOT has_sequence_privilege(s.oid, 'USAGE, UPDATE') ELSE false END
ORDER BY 1";

/// See [`crate::sinks::SinkConfig::check`].
pub async fn check(name: &str, config: &Config, namespace: Arc<Namespace>, claims: Vec<Claim>) -> Checked {
    let mut checked = Checked::default();
    let limit = config.connect_timeout.0;
    let target = config.url.target();
    let silent = |limit: Duration| format!("{target}: no answer for {} s", limit.as_secs());
    match connect(name, config, &Failures::default()).await {
        Err(error) => checked.problems.push(error.to_string()),
        Ok((client, connection)) => {
            let mut check = Check { config, client, checked: &mut checked };
            let outcome = timeout(limit, check.all(namespace, claims)).await;
            let end = connection.end();
            drop(connection);
            match outcome {
                Err(_) => checked.problems.push(silent(limit)),
                Ok(Err(error)) => {
                    let error = Error::Retry(format!("{target}: {}", describe(&error)));
                    checked.problems.push(end.explain(error).await.to_string());
                }
                Ok(Ok(())) => {}
            }
        }
    }
    checked
}

struct Check<'c> {
    config: &'c Config,
    client: Client,
    checked: &'c mut Checked,
}

/// The user, quoted for SQL, and the schema for names without one.
struct Session {
    user: String,
    schema: Option<String>,
}

impl Check<'_> {
    async fn all(
        &mut self,
        namespace: Arc<Namespace>,
        claims: Vec<Claim>,
    ) -> Result<(), tokio_postgres::Error> {
        let row = self.client.query_one(SESSION, &[]).await?;
        let user: String = row.get(0);
        let session = Session { user: quoted(&user), schema: row.get(1) };
        let (is_standby, is_read_only): (bool, bool) = (row.get(2), row.get(3));
        self.checked.found.push(format!("user {user}"));
        if is_standby {
            self.problem(
                "the server is a standby, which cannot be written to: name the primary in `url`, or all \
                 hosts and ?target_session_attrs=read-write",
            );
            return Ok(());
        }
        if is_read_only {
            self.problem(format!(
                "default_transaction_read_only is on for user {user}: turn it off with ALTER ROLE or ALTER DATABASE"
            ));
        }
        self.client.batch_execute(&format!("{BEGIN} READ ONLY")).await?;
        self.client.batch_execute(&settings(self.config)).await?;
        let may_be_read = self.positions(&session).await?;
        let was_there = self.claims(claims, may_be_read).await?;
        let lacks = stage::lacks_right(&self.client).await?;
        let tries_stage = lacks.is_empty() && !is_read_only;
        self.checked.problems.extend(lacks);
        let columns = Columns::new(&self.config.columns, namespace);
        // Its answer may end the transaction, so it comes last.
        match Table::read(&self.client, &quoted_table(&self.config.table)).await {
            Ok(Some(table)) => self.table(&table, columns, &session, tries_stage).await,
            Ok(None) => self.missing(&columns, &session, was_there).await,
            Err(error) if is_denied(&error) => {
                let schema = table_parts(&self.config.table).swap_remove(0);
                let reason = describe(&error);
                self.problem(format!(
                    "{reason}: GRANT USAGE ON SCHEMA {} TO {}",
                    quoted(&schema),
                    session.user
                ));
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Checks the table of positions. Returns whether it exists and can be read.
    async fn positions(&mut self, session: &Session) -> Result<bool, tokio_postgres::Error> {
        let exists = "SELECT to_regclass('headworks_positions') IS NOT NULL";
        if !self.client.query_one(exists, &[]).await?.get::<_, bool>(0) {
            match self.may_create(session.schema.as_deref()).await? {
                Ok(()) => self.checked.found.push("creates the table headworks_positions".to_owned()),
                Err(reason) => self.problem(format!(
                    "there is no table headworks_positions, which holds up to where rows were written, and {reason}, \
                     or create it as host/docs/databases.md shows",
                    reason = reason.with_grant(session)
                )),
            }
            return Ok(false);
        }
        if let Some(change) = positions::upgrade(&self.client).await? {
            match self.client.query_one(OWNS, &[]).await?.get(0) {
                true => self.checked.found.push("adds columns to the table headworks_positions".to_owned()),
                false => self.problem(format!(
                    "the table headworks_positions is of an earlier version: let its owner run `{change}`"
                )),
            }
        }
        let lacks: Option<String> = self.client.query_one(POSITIONS, &[]).await?.get(0);
        let Some(lacks) = lacks else { return Ok(true) };
        self.problem(format!(
            "permission denied for table headworks_positions: GRANT {lacks} ON headworks_positions TO {}",
            session.user
        ));
        Ok(false)
    }

    /// Looks up what each claim would find. Returns whether one of them has positions.
    async fn claims(&mut self, claims: Vec<Claim>, may_be_read: bool) -> Result<bool, tokio_postgres::Error> {
        let mut was_there = false;
        let table = quoted_table(&self.config.table);
        for claim in claims {
            let mut positions = Vec::new();
            if may_be_read {
                positions = match positions::look(&self.client, &claim).await {
                    Ok(positions) => positions,
                    Err(Refusal::Server(error)) => return Err(error),
                    Err(Refusal::Sink(error)) => {
                        self.problem(error.to_string());
                        continue;
                    }
                };
            }
            let mut found = Found::default();
            if positions.is_empty() {
                found.has_rows = schema::has_rows(&self.client, &table).await?;
                if may_be_read {
                    found.others = positions::others(&self.client, &claim, &table).await?;
                    found.other_logs = positions::other_logs(&self.client, &claim, &table).await?;
                }
            }
            was_there |= !positions.is_empty();
            self.checked.claims.push(Looked { claim, positions, found });
        }
        Ok(was_there)
    }

    /// Checks what the sink would do about a missing table.
    async fn missing(
        &mut self,
        columns: &Columns,
        session: &Session,
        was_there: bool,
    ) -> Result<(), tokio_postgres::Error> {
        let table = &self.config.table;
        let creates = self.config.create && !was_there;
        if !creates || schema::in_other_case(&self.client, table).await?.is_some() {
            let reason = no_table(&self.client, table, was_there).await?;
            self.problem(reason);
            return Ok(());
        }
        if let Err(reason) = schema::create_table(self.config, columns) {
            self.problem(reason);
        }
        let parts = table_parts(table);
        let schema = if parts.len() > 1 { parts.first().cloned() } else { session.schema.clone() };
        match self.may_create(schema.as_deref()).await? {
            Ok(()) => self.checked.found.push(format!("creates the table {table}")),
            Err(reason) => {
                let reason = reason.with_grant(session);
                self.problem(format!("there is no table {table}, and {reason}, or create the table"));
            }
        }
        Ok(())
    }

    /// Checks whether the sink can write to the table.
    async fn table(
        &mut self,
        table: &Table,
        mut columns: Columns,
        session: &Session,
        tries_stage: bool,
    ) -> Result<(), tokio_postgres::Error> {
        let name = &self.config.table;
        let on_conflict = self.config.on_conflict.resolved();
        self.checked.warnings.extend(table.warnings(name));
        let binding = match table.bind(name, &mut columns, on_conflict) {
            Ok(binding) => binding,
            Err(reason) => {
                self.problem(reason);
                return Ok(());
            }
        };
        if on_conflict == OnConflict::Ignore {
            self.checked.warnings.extend(match binding.ignores {
                Ignores::Nothing => Some(format!(
                    "on_conflict: ignore has no effect: table {name} has no unique key that a row fills, so no row \
                     meets another"
                )),
                _ if table.numbers_keys(|name| columns.columns.iter().any(|column| column.name == *name)) => {
                    Some(format!(
                        "on_conflict: ignore has no effect: each unique key of table {name} has a column that the \
                         table numbers by itself, so no row meets another; add a key of columns that rows fill"
                    ))
                }
                Ignores::AnyKey { of_table: true } => Some(format!(
                    "on_conflict: ignore leaves a row out as well that meets a key which table {name} fills itself, \
                     as after a restore that set its sequence back: ON CONFLICT can name one key, and here rows \
                     fill several, or a trigger does; drop one, or set on_conflict: reject"
                )),
                Ignores::Key(_) | Ignores::AnyKey { .. } => None,
            });
        }
        let filled: Vec<&str> = columns.columns.iter().map(|column| column.name.as_str()).collect();
        let table = quoted_table(name);
        for row in self.client.query(SEQUENCES, &[&table, &filled]).await? {
            let sequence: String = row.get(0);
            self.problem(format!(
                "permission denied for sequence {sequence}, which numbers the rows: \
                 GRANT USAGE ON SEQUENCE {sequence} TO {}",
                session.user
            ));
        }
        let explain = stage::explain(&table, &columns, &binding, on_conflict);
        match self.client.batch_execute(&explain).await {
            Ok(()) => {
                self.checked.found.push(format!("table {name} is there"));
                if tries_stage {
                    self.stage(&columns, &binding).await?;
                }
            }
            Err(error) if is_denied(&error) => {
                let rights = match on_conflict {
                    OnConflict::Reject | OnConflict::Refuse => "INSERT",
                    OnConflict::Ignore | OnConflict::Auto => "SELECT, INSERT",
                    OnConflict::Upsert => "SELECT, INSERT, UPDATE",
                };
                let reason = describe(&error);
                self.problem(format!("{reason}: GRANT {rights} ON {table} TO {}", session.user));
            }
            Err(error) if error.as_db_error().is_some() => {
                let reason = describe(&error);
                self.problem(format!("table {name}: {reason}"));
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Creates the function that isolates rejected rows, and rolls it back, to find out what prevents
    /// it. A read-only transaction does not permit this test.
    async fn stage(&mut self, columns: &Columns, binding: &Binding) -> Result<(), tokio_postgres::Error> {
        let begin = format!("ROLLBACK; {BEGIN}; {}", settings(self.config));
        self.client.batch_execute(&begin).await?;
        let path = super::table::search_path(&self.client).await?;
        let table = quoted_table(&self.config.table);
        let sql = stage::create(&table, columns, binding, self.config.on_conflict.resolved(), &path);
        let made = self.client.batch_execute(&sql).await;
        self.client.batch_execute("ROLLBACK").await?;
        match made {
            Err(error) if error.as_db_error().is_some() => {
                self.problem(format!("{}: {}", stage::CANNOT, describe(&error)));
                Ok(())
            }
            made => made,
        }
    }

    async fn may_create(
        &self,
        schema: Option<&str>,
    ) -> Result<Result<(), CannotCreate>, tokio_postgres::Error> {
        let Some(schema) = schema else { return Ok(Err(CannotCreate::NoneSearched)) };
        let row = self.client.query_opt(CREATE, &[&schema]).await?;
        Ok(match row.map(|row| row.get(0)) {
            Some(true) => Ok(()),
            Some(false) => Err(CannotCreate::Denied(schema.to_owned())),
            None => Err(CannotCreate::NoSchema(schema.to_owned())),
        })
    }

    fn problem(&mut self, reason: impl Into<String>) {
        self.checked.problems.push(reason.into());
    }
}

enum CannotCreate {
    Denied(String),
    NoSchema(String),
    /// No schema of the user's search_path exists.
    NoneSearched,
}

impl CannotCreate {
    fn with_grant(&self, session: &Session) -> String {
        let user = &session.user;
        match self {
            Self::Denied(schema) => {
                let schema = quoted(schema);
                format!(
                    "user {user} may not create one in schema {schema}: GRANT CREATE ON SCHEMA {schema} TO {user}"
                )
            }
            Self::NoSchema(schema) => {
                format!("there is no schema {schema}: CREATE SCHEMA {}", quoted(schema))
            }
            Self::NoneSearched => {
                format!(
                    "no schema of user {user}'s search_path exists: set it with ALTER ROLE, or create one"
                )
            }
        }
    }
}

fn is_denied(error: &tokio_postgres::Error) -> bool {
    error.as_db_error().is_some_and(|db| db.code().code() == "42501")
}
