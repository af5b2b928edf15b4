//! The file, its table, and the transaction. Blocks: runs on the sink's thread.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rusqlite::types::Null;
use rusqlite::{Connection, ErrorCode, Statement, TransactionBehavior};

use super::config::Config;
use super::positions::{self, Held};
use crate::sinks::columns::{Columns, Kind, Mismatch, TIME_BYTES, Value, write_time};
use crate::sinks::{Advance, Claim, Error, Position, RefusedRow, Rows, holder};

/// Parameters of one INSERT of several rows: enough to share the cost of a
/// statement, far below SQLite's own bound of 32,766.
const PARAMETERS: usize = 160;
/// Refused rows named in one answer; the rest come with the next try.
const REFUSED_MAX: usize = 10_000;

/// An open file with a claim.
pub struct Session {
    connection: Connection,
    held: Held,
    columns: Columns,
    /// Rows of the long INSERT.
    many: usize,
    insert_many: String,
    insert_one: String,
    /// (device, inode): another one means that somebody replaced the file.
    file: (u64, u64),
}

impl Session {
    pub fn open(
        config: &Config,
        columns: &Columns,
        claim: &Claim,
        context: &str,
    ) -> Result<(Self, Vec<Position>), Error> {
        let path = &config.path;
        let failed = |error: rusqlite::Error| classify(context, error);
        let setup = |reason: String| Error::Setup(format!("{context}: {reason}"));
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder)
                .map_err(|error| setup(format!("cannot make the folder {}: {error}", folder.display())))?;
        }
        let mut connection = Connection::open(path).map_err(failed)?;
        connection.busy_timeout(config.busy_timeout.0).map_err(failed)?;
        // FULL: a commit is on the disk when it returns, as the log's position relies on it.
        connection.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;").map_err(failed)?;
        connection.set_prepared_statement_cache_capacity(8);
        let mut columns = columns.clone();
        let transaction =
            connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(failed)?;
        positions::create(&transaction).map_err(failed)?;
        if config.create {
            transaction.execute_batch(&create_table(config, &columns)).map_err(failed)?;
        }
        bind(&transaction, config, &mut columns).map_err(failed)?.map_err(setup)?;
        let (held, positions) = Held::claim(&transaction, claim, &holder()).map_err(failed)?;
        transaction.commit().map_err(failed)?;
        let many = (PARAMETERS / columns.columns.len().max(1)).max(1);
        let session = Self {
            file: identity(path).ok_or_else(|| Error::Retry(format!("{context}: the file went away")))?,
            insert_many: insert(config, &columns, many),
            insert_one: insert(config, &columns, 1),
            connection,
            held,
            columns,
            many,
        };
        Ok((session, positions))
    }

    pub fn commit(
        &mut self,
        path: &Path,
        context: &str,
        rows: &Rows,
        advance: &[Advance],
    ) -> Result<(), Error> {
        let failed = |error: rusqlite::Error| classify(context, error);
        if identity(path) != Some(self.file) {
            // What is written to a removed file is lost when it is closed.
            return Err(Error::Retry(format!("{context}: the file was removed or replaced")));
        }
        let transaction =
            self.connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(failed)?;
        for step in advance {
            if !self.held.advance(&transaction, step).map_err(failed)? {
                let reason = self.held.usurper(&transaction, step).map_err(failed)?;
                return Err(Error::Fenced(format!("{context}: {reason}")));
            }
        }
        let mut refused = Vec::new();
        {
            let mut many = transaction.prepare_cached(&self.insert_many).map_err(failed)?;
            let mut one = transaction.prepare_cached(&self.insert_one).map_err(failed)?;
            let mut writer = Writer { columns: &self.columns, rows, refused: &mut refused };
            let mut row = 0;
            while row < rows.len() {
                let end = (row + self.many).min(rows.len());
                let is_whole = end - row == self.many;
                if !is_whole || !writer.write(&mut many, row..end).map_err(failed)? {
                    for row in row..end {
                        writer.write(&mut one, row..row + 1).map_err(failed)?;
                    }
                }
                if writer.refused.len() >= REFUSED_MAX {
                    break;
                }
                row = end;
            }
        }
        if !refused.is_empty() {
            return Err(Error::Rows(refused));
        }
        // Committed last: before this line a crash redelivers, never loses.
        transaction.commit().map_err(|error| match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy) => classify(context, error),
            _ => Error::Unknown(format!("{context}: {error}")),
        })
    }
}

struct Writer<'a> {
    columns: &'a Columns,
    rows: &'a Rows,
    refused: &'a mut Vec<RefusedRow>,
}

impl Writer<'_> {
    /// Writes rows with one statement. False: none is written, and it takes one
    /// by one to see which are bad; a single bad row is named at once.
    fn write(
        &mut self,
        statement: &mut Statement<'_>,
        range: std::ops::Range<usize>,
    ) -> rusqlite::Result<bool> {
        let single = range.len() == 1;
        let first = range.start;
        let mut reader = self.columns.reader();
        let mut time = String::with_capacity(TIME_BYTES);
        let mut failure = None;
        for row in range {
            let base = (row - first) * self.columns.columns.len();
            let outcome = reader.read(row, self.rows.get(row), |i, value| {
                match bind_value(statement, base + i + 1, self.columns.columns[i].kind, value, &mut time) {
                    Ok(outcome) => outcome,
                    Err(error) => {
                        failure.get_or_insert(error);
                        Ok(())
                    }
                }
            });
            if let Err(reason) = outcome {
                if single {
                    self.refused.push(reason);
                }
                return Ok(false);
            }
        }
        if let Some(error) = failure {
            return Err(error);
        }
        match statement.raw_execute() {
            Ok(_) => Ok(true),
            Err(error) if is_data(&error) => {
                if single {
                    self.refused.push(RefusedRow { row: first, reason: error.to_string() });
                }
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}

fn bind_value(
    statement: &mut Statement<'_>,
    at: usize,
    kind: Option<Kind>,
    value: Value<'_>,
    time: &mut String,
) -> rusqlite::Result<Result<(), Mismatch>> {
    macro_rules! bind {
        ($value:expr, $expected:literal) => {
            match $value {
                Some(value) => statement.raw_bind_parameter(at, value)?,
                None => return Ok(Err(Mismatch($expected))),
            }
        };
    }
    if value == Value::Null {
        return statement.raw_bind_parameter(at, Null).map(Ok);
    }
    match kind {
        Some(Kind::Timestamptz) => {
            time.clear();
            if value.time_us().and_then(|us| write_time(us, time)).is_none() {
                return Ok(Err(Mismatch("a time")));
            }
            statement.raw_bind_parameter(at, time.as_str())?;
        }
        Some(Kind::Double) => bind!(value.f64(), "a number"),
        Some(Kind::Bigint) => bind!(value.i64(), "a whole number"),
        Some(Kind::Bool) => bind!(value.bool(), "true or false"),
        Some(Kind::Text) => bind!(value.text().as_deref(), "text"),
        Some(Kind::Jsonb) => bind!(value.json_text().as_deref(), "JSON"),
        Some(Kind::Bytes) => bind!(value.bytes().as_deref(), "bytes"),
        // As it is: a number as a number, the rest as text.
        None => match (value.i64(), value.f64(), value.bool()) {
            (Some(whole), ..) => statement.raw_bind_parameter(at, whole)?,
            (_, Some(number), _) => statement.raw_bind_parameter(at, number)?,
            (.., Some(yes)) => statement.raw_bind_parameter(at, yes)?,
            _ => bind!(value.text().as_deref(), "text"),
        },
    }
    Ok(Ok(()))
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn create_table(config: &Config, columns: &Columns) -> String {
    let lines: Vec<String> = columns
        .columns
        .iter()
        .map(|column| {
            let kind = match column.kind {
                Some(Kind::Timestamptz | Kind::Text | Kind::Jsonb) => " TEXT",
                Some(Kind::Double) => " DOUBLE PRECISION",
                Some(Kind::Bigint) => " BIGINT",
                Some(Kind::Bool) => " BOOLEAN",
                Some(Kind::Bytes) => " BLOB",
                None => "",
            };
            format!("    {}{kind}{}", quoted(&column.name), if column.required { " NOT NULL" } else { "" })
        })
        .collect();
    let table = quoted(&config.table);
    let mut sql = format!("CREATE TABLE IF NOT EXISTS {table} (\n{}\n);\n", lines.join(",\n"));
    if let (Some(device), Some(time)) = (columns.device(), columns.time()) {
        let index = quoted(&format!("{}_{}_{}_idx", config.table, device.name, time.name));
        let (device, time) = (quoted(&device.name), quoted(&time.name));
        sql += &format!("CREATE INDEX IF NOT EXISTS {index} ON {table} ({device}, {time});\n");
    }
    sql
}

fn insert(config: &Config, columns: &Columns, rows: usize) -> String {
    let list: Vec<String> = columns.columns.iter().map(|column| quoted(&column.name)).collect();
    let row = format!("({})", vec!["?"; list.len()].join(", "));
    let conflict = match config.on_conflict {
        super::super::OnConflict::Refuse => "",
        _ => " ON CONFLICT DO NOTHING",
    };
    let table = quoted(&config.table);
    format!("INSERT INTO {table} ({}) VALUES {}{conflict}", list.join(", "), vec![row; rows].join(", "))
}

/// Compares with the table that is there; takes over its NOT NULL.
fn bind(
    connection: &Connection,
    config: &Config,
    columns: &mut Columns,
) -> rusqlite::Result<Result<(), String>> {
    let mut statement = connection.prepare(
        "SELECT name, \"notnull\" <> 0 AND dflt_value IS NULL AND pk = 0 FROM pragma_table_info(?1)",
    )?;
    let known: Vec<(String, bool)> = statement
        .query_map([&config.table], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<rusqlite::Result<_>>()?;
    let table = &config.table;
    if known.is_empty() {
        return Ok(Err(format!("there is no table {table}: create it, or set `create: true`")));
    }
    for column in &mut columns.columns {
        let found = known.iter().find(|(name, _)| name.eq_ignore_ascii_case(&column.name));
        let Some((_, not_null)) = found else {
            let names: Vec<&str> = known.iter().map(|(name, _)| name.as_str()).collect();
            return Ok(Err(format!(
                "table {table} has no column \"{}\": it has {}; add it, or say in `columns` which to fill",
                column.name,
                names.join(", ")
            )));
        };
        column.required |= not_null;
    }
    let missing = known.iter().find(|(name, not_null)| {
        *not_null && !columns.columns.iter().any(|column| column.name.eq_ignore_ascii_case(name))
    });
    Ok(match missing {
        Some((name, _)) => Err(format!(
            "column \"{name}\" of table {table} is NOT NULL without a default, and `columns` does not fill it"
        )),
        None => Ok(()),
    })
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let data = std::fs::metadata(path).ok()?;
    Some((data.dev(), data.ino()))
}

fn is_data(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(ErrorCode::ConstraintViolation | ErrorCode::TypeMismatch | ErrorCode::TooBig)
    )
}

fn classify(context: &str, error: rusqlite::Error) -> Error {
    let reason = format!("{context}: {error}");
    match error.sqlite_error_code() {
        _ if is_data(&error) => Error::Data(error.to_string()),
        Some(
            ErrorCode::DatabaseBusy
            | ErrorCode::DatabaseLocked
            | ErrorCode::DiskFull
            | ErrorCode::SystemIoFailure
            | ErrorCode::OutOfMemory
            | ErrorCode::OperationInterrupted
            | ErrorCode::SchemaChanged,
        ) => Error::Retry(reason),
        _ => Error::Setup(reason),
    }
}
