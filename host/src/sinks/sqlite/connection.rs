//! The file, its table, and the transaction. Its calls block, so they run on the sink's thread.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, ErrorCode, OpenFlags, Statement, TransactionBehavior, ffi};
use uuid::Uuid;

use super::config::Config;
use super::positions::{self, Held};
use super::table::{bind, create_table, has_rows, insert, is_there};
use super::values::{Affinity, bind_value};
use crate::batch::{Offset, Partition};
use crate::sinks::columns::{Columns, TIME_BYTES};
use crate::sinks::positions::holder;
use crate::sinks::{
    Advance, Claim, Epoch, Error, LogPosition, Name, Opened, Outcome, PassPosition, RefusedRow, Rows, Written,
};

/// Parameters of one INSERT of several rows: enough to share the cost of a statement, and far below
/// SQLite's limit of 32,766.
const PARAMETERS: usize = 160;
/// Size to which the `-wal` file is reduced once its rows are in the database file and no reader needs
/// it.
const WAL_BYTES_KEPT: u64 = 8 << 20;
/// Size of the `-wal` file from which on a reader that holds it is reported: far above the 1,000 pages
/// of a checkpoint and a batch.
const WAL_BYTES_SAID: u64 = 256 << 20;

/// An open file with a claim.
pub struct Session {
    connection: Connection,
    held: Held,
    columns: Columns,
    /// Affinity of each column.
    affinities: Vec<Affinity>,
    /// Number of rows of the INSERT with several rows.
    many: usize,
    insert_many: String,
    insert_one: String,
    path: PathBuf,
    files: Files,
    /// Schema version. If it changes, another program changed the schema.
    schema_version: i64,
    /// A transaction that waits for `finish`.
    uncommitted: Option<Written>,
    /// File that holds rows until a checkpoint.
    wal: PathBuf,
}

impl Session {
    pub fn open(
        config: &Config,
        columns: &Columns,
        claim: &Claim,
        held: Option<Epoch>,
        before: Option<Files>,
        context: &str,
    ) -> Result<(Self, Opened), Error> {
        let path = &config.path;
        let failed = |error: rusqlite::Error| classify(context, error);
        let setup = |reason: String| Error::Setup(format!("{context}: {reason}"));
        let mut flags = OpenFlags::default();
        let wal = wal_of(path);
        let mut is_replaced = false;
        if let Some(before) = before {
            // A new file would take the place of the one that is gone.
            flags.remove(OpenFlags::SQLITE_OPEN_CREATE);
            is_replaced = match identity(path) {
                None => return Err(setup(gone(&wal))),
                now => now != Some(before.file),
            };
            if is_replaced && identity(&wal).is_some_and(|now| before.wal == Some(now)) {
                return Err(setup(mixed(&wal)));
            }
        } else if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder)
                .map_err(|error| setup(format!("cannot make the folder {}: {error}", folder.display())))?;
        }
        let mut connection = Connection::open_with_flags(path, flags).map_err(failed)?;
        connection.busy_timeout(config.busy_timeout.0).map_err(failed)?;
        // FULL: a commit is on the disk when it returns, as the log's position relies on it.
        connection
            .execute_batch(&format!(
                "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA journal_size_limit = {WAL_BYTES_KEPT};"
            ))
            .map_err(failed)?;
        connection.set_prepared_statement_cache_capacity(8);
        let mut columns = columns.clone();
        let transaction =
            connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(failed)?;
        positions::create(&transaction).map_err(failed)?;
        let is_filled = has_rows(&transaction, config).map_err(failed)?;
        let (held, opened) = Held::claim(&transaction, claim, held, &holder(), (&config.table, is_filled))
            .map_err(failed)?
            .map_err(|error| error.within(context))?;
        if is_replaced && opened.positions.is_empty() {
            return Err(setup(format!(
                "another file was put into its place while the host runs, and the {} are not in it: nothing is \
                 written. Put the file back, together with {}; or restart the host to go on in this one, into \
                 which it writes what the stream still has",
                claim.positions_text(),
                wal.display()
            )));
        }
        // A table that this sink filled before and that is gone was taken away by somebody.
        // Beside one that is there nothing is made, no index either.
        let creates = config.create && opened.positions.is_empty();
        if creates && !is_there(&transaction, config).map_err(failed)? {
            transaction.execute_batch(&create_table(config, &columns)).map_err(failed)?;
        }
        let bound = bind(&transaction, config, &mut columns, !opened.positions.is_empty())
            .map_err(failed)?
            .map_err(setup)?;
        let schema_version = schema_version(&transaction).map_err(failed)?;
        transaction.commit().map_err(failed)?;
        columns.warn_of_times_without_unit(&claim.sink);
        for warning in &bound.warnings {
            tracing::warn!(sink = claim.sink, "{warning}");
        }
        let many = (PARAMETERS / columns.columns.len().max(1)).max(1);
        let wal = wal_of(path);
        // Once it is certain that the path is that of the file that was opened.
        let files = Files::of(path, &wal)
            .filter(|_| !has_moved(&connection))
            .filter(|files| identity(path) == Some(files.file))
            .ok_or_else(|| Error::Retry(format!("{context}: the file was moved or removed just now")))?;
        let session = Self {
            path: path.clone(),
            files,
            insert_many: insert(config, &columns, &bound, many),
            insert_one: insert(config, &columns, &bound, 1),
            connection,
            held,
            columns,
            affinities: bound.affinities,
            many,
            schema_version,
            uncommitted: None,
            wal,
        };
        Ok((session, opened))
    }

    /// Returns the files that hold the rows.
    pub fn files(&self) -> Files {
        self.files
    }

    pub fn commit(&mut self, context: &str, rows: &Rows, advance: &[Advance]) -> Result<Outcome, Error> {
        self.check_files().map_err(|reason| Error::Retry(format!("{context}: {reason}")))?;
        if self.uncommitted.take().is_some() {
            self.roll_back();
            return Err(Error::Retry(format!("{context}: the last commit was not finished")));
        }
        let mut rejected = BTreeMap::new();
        let mut many = self.many;
        let mut check = Check::AtCommit;
        let written = loop {
            match self.write(context, rows, advance, many, check, &mut rejected) {
                Ok(Wrote::All(written)) => break written,
                // A trigger's RAISE(ROLLBACK): again, and where it was not clear which row, one by one.
                Ok(Wrote::RolledBack) => many = 1,
                // COMMIT would fail, and not say for which rows.
                Ok(Wrote::Unresolved) => {
                    self.roll_back();
                    check = Check::EachInsert;
                }
                Err(error) => {
                    self.roll_back();
                    return Err(error);
                }
            }
        };
        if rejected.is_empty() {
            self.end(context)?;
            return Ok(Outcome::Committed(written));
        }
        // What no function or trigger could run for any row is hardly about the row.
        let alone = rejected.len() == rows.len() && rejected.values().all(|of| of.doubtful);
        let mut rejected: Vec<RefusedRow> = rejected.into_values().map(|of| of.row).collect();
        if alone {
            self.roll_back();
            let (context, reason) = (context.to_owned(), rejected.swap_remove(0).reason);
            return Err(Error::Doubtful { context, reason });
        }
        self.uncommitted = Some(written);
        Ok(Outcome::Rejected(rejected))
    }

    /// Returns the positions that claims of these names have in these logs; see
    /// [`crate::sinks::Sink::positions_of`].
    pub fn positions_of(
        &self,
        context: &str,
        claims: &[Name],
        logs: &[Uuid],
    ) -> Result<Vec<LogPosition>, Error> {
        positions::positions_of(&self.connection, claims, logs).map_err(|error| classify(context, error))
    }

    pub fn passes_of(
        &self,
        context: &str,
        claims: &[Name],
        log: Uuid,
        above: Offset,
    ) -> Result<Vec<PassPosition>, Error> {
        positions::passes_of(&self.connection, claims, log, above).map_err(|error| classify(context, error))
    }

    /// Replaces the records of dead letters in positions, in the transaction that waits for its end.
    pub fn set_letters(&mut self, context: &str, letters: &[(Partition, String)]) -> Result<(), Error> {
        for (partition, letters) in letters {
            let set = self.held.set_letters(&self.connection, *partition, letters);
            set.map_err(|error| classify(context, error))?;
        }
        Ok(())
    }

    /// Commits the transaction that a commit with rejected rows left open.
    pub fn finish(&mut self, context: &str) -> Result<Written, Error> {
        let written = self
            .uncommitted
            .take()
            .ok_or_else(|| Error::Retry(format!("{context}: there is no transaction to finish")))?;
        self.end(context)?;
        Ok(written)
    }

    /// Begins a transaction and writes all rows except those in `rejected`, to which it adds rows that
    /// cannot be written.
    fn write(
        &self,
        context: &str,
        rows: &Rows,
        advance: &[Advance],
        many: usize,
        check: Check,
        rejected: &mut BTreeMap<usize, Rejected>,
    ) -> Result<Wrote, Error> {
        let failed = |error: rusqlite::Error| classify(context, error);
        self.connection.execute_batch("BEGIN IMMEDIATE").map_err(failed)?;
        if schema_version(&self.connection).map_err(failed)? != self.schema_version {
            return Err(Error::Retry(format!("{context}: the schema has changed: opening the file again")));
        }
        for step in advance {
            if !self.held.advance(&self.connection, step).map_err(failed)? {
                return Err(self.held.refusal(&self.connection, step).map_err(failed)?.within(context));
            }
        }
        let todo: Vec<usize> = (0..rows.len()).filter(|row| !rejected.contains_key(row)).collect();
        let mut long = self.connection.prepare_cached(&self.insert_many).map_err(failed)?;
        let mut short = self.connection.prepare_cached(&self.insert_one).map_err(failed)?;
        let mut written = 0;
        for chunk in todo.chunks(many) {
            if chunk.len() == self.many && self.many > 1 {
                match self.insert(&mut long, rows, chunk, check).map_err(failed)? {
                    Inserted::Rows(count) => {
                        written += count;
                        continue;
                    }
                    Inserted::RolledBack(_) => return Ok(Wrote::RolledBack),
                    Inserted::Rejected(_) => {}
                }
            }
            for row in chunk {
                match self.insert(&mut short, rows, &[*row], check).map_err(failed)? {
                    Inserted::Rows(count) => written += count,
                    Inserted::Rejected(reason) => drop(rejected.insert(*row, reason)),
                    Inserted::RolledBack(reason) => {
                        rejected.insert(*row, reason);
                        return Ok(Wrote::RolledBack);
                    }
                }
            }
        }
        if check == Check::AtCommit && foreign_keys_unresolved(&self.connection).map_err(failed)? {
            return Ok(Wrote::Unresolved);
        }
        let kept = (rows.len() - rejected.len()) as u64;
        Ok(Wrote::All(Written { written, ignored: kept.saturating_sub(written) }))
    }

    /// Inserts rows with one statement, all or none of them.
    fn insert(
        &self,
        statement: &mut Statement<'_>,
        rows: &Rows,
        chunk: &[usize],
        check: Check,
    ) -> rusqlite::Result<Inserted> {
        let mut reader = self.columns.reader();
        let mut time = String::with_capacity(TIME_BYTES);
        let mut failure = None;
        for (place, row) in chunk.iter().enumerate() {
            let base = place * self.columns.columns.len();
            let outcome = reader.read(*row, rows.get(*row), |i, value| {
                let declared = (self.columns.columns[i].kind, self.affinities[i]);
                match bind_value(statement, base + i + 1, declared, value, &mut time) {
                    Ok(outcome) => outcome,
                    Err(error) => {
                        failure.get_or_insert(error);
                        Ok(())
                    }
                }
            });
            if let Err(row) = outcome {
                return Ok(Inserted::Rejected(Rejected { row, doubtful: false }));
            }
        }
        if let Some(error) = failure {
            return Err(error);
        }
        // RAISE(FAIL) keeps what its statement did before: the savepoint does not.
        self.connection.prepare_cached("SAVEPOINT headworks_rows")?.execute([])?;
        let error = match statement.raw_execute() {
            Ok(_) if check == Check::EachInsert && foreign_keys_unresolved(&self.connection)? => {
                self.take_back()?;
                let row = RefusedRow {
                    row: chunk[0],
                    reason: "FOREIGN KEY constraint failed".to_owned(),
                    code: Some(ffi::SQLITE_CONSTRAINT_FOREIGNKEY.to_string()),
                };
                return Ok(Inserted::Rejected(Rejected { row, doubtful: false }));
            }
            Ok(count) => {
                self.connection.prepare_cached("RELEASE headworks_rows")?.execute([])?;
                return Ok(Inserted::Rows(count as u64));
            }
            Err(error) => error,
        };
        let doubtful = error.sqlite_error_code() == Some(ErrorCode::Unknown);
        if !doubtful && !is_data(&error) {
            return Err(error);
        }
        let code = error.sqlite_error().map(|error| error.extended_code.to_string());
        let row = RefusedRow { row: chunk[0], reason: error.to_string(), code };
        let rejected = Rejected { row, doubtful };
        if self.connection.is_autocommit() {
            return Ok(Inserted::RolledBack(rejected));
        }
        self.take_back()?;
        Ok(Inserted::Rejected(rejected))
    }

    /// Rolls back to the savepoint.
    fn take_back(&self) -> rusqlite::Result<()> {
        self.connection.execute_batch("ROLLBACK TO headworks_rows; RELEASE headworks_rows")
    }

    /// Returns the size of the `-wal` file, if it is so large that a reader must be holding it: SQLite
    /// starts it again as soon as no reader uses an older state of the file.
    pub fn wal_held(&self) -> Option<u64> {
        let size = std::fs::metadata(&self.wal).ok()?.len();
        (size >= WAL_BYTES_SAID).then_some(size)
    }

    fn end(&self, context: &str) -> Result<(), Error> {
        // Committed last: before this line a crash redelivers, never loses.
        self.connection.execute_batch("COMMIT").map_err(|error| {
            let outcome = match error.sqlite_error_code() {
                Some(ErrorCode::DatabaseBusy) => classify(context, error),
                _ => Error::Unknown(format!("{context}: {error}")),
            };
            self.roll_back();
            outcome
        })?;
        // Believed only where the rows are under their path: what is written to a file that somebody
        // removed is gone with the connection.
        self.check_files().map_err(|reason| Error::Unknown(format!("{context}: {reason}")))
    }

    /// Checks that the committed data is at the path of the file.
    fn check_files(&self) -> Result<(), &'static str> {
        match Files::of(&self.path, &self.wal) {
            Some(files) if files == self.files => Ok(()),
            // To open it anew brings what lies in that file into the database.
            Some(files) if files.file == self.files.file => {
                Err("its -wal file was moved or removed while the host wrote to it: opening the file again")
            }
            _ => Err("the file was moved, removed or replaced while the host wrote to it"),
        }
    }

    fn roll_back(&self) {
        if !self.connection.is_autocommit() {
            // Fails where there is no transaction any more.
            drop(self.connection.execute_batch("ROLLBACK"));
        }
    }
}

/// When deferred foreign keys are checked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Check {
    AtCommit,
    /// After each INSERT, of which all rows or none are kept: rows that can be committed alone are
    /// written.
    EachInsert,
}

/// Returns whether a foreign key has no parent row yet, so that COMMIT would fail.
fn foreign_keys_unresolved(connection: &Connection) -> rusqlite::Result<bool> {
    let (mut current, mut highest) = (0, 0);
    // SAFETY: the handle is that of an open connection, which is borrowed here and used by this
    // thread alone; both pointers are to integers that live to the end of the call.
    #[allow(unsafe_code)]
    let code = unsafe {
        ffi::sqlite3_db_status(
            connection.handle(),
            ffi::SQLITE_DBSTATUS_DEFERRED_FKS,
            &raw mut current,
            &raw mut highest,
            0,
        )
    };
    match code {
        ffi::SQLITE_OK => Ok(current != 0),
        code => Err(rusqlite::Error::SqliteFailure(ffi::Error::new(code), None)),
    }
}

/// A row that cannot be written. `doubtful` means that the error may affect all rows.
struct Rejected {
    row: RefusedRow,
    doubtful: bool,
}

enum Wrote {
    All(Written),
    /// A trigger ended the transaction.
    RolledBack,
    /// A deferred foreign key has no parent row.
    Unresolved,
}

enum Inserted {
    Rows(u64),
    /// The first bad row, if there were several.
    Rejected(Rejected),
    RolledBack(Rejected),
}

/// Returns the schema version, which rises with each change of the schema.
fn schema_version(connection: &Connection) -> rusqlite::Result<i64> {
    connection.prepare_cached("PRAGMA schema_version")?.query_row([], |row| row.get(0))
}

/// Returns the `-wal` file of a database. SQLite puts it beside the file to which a link leads.
fn wal_of(path: &Path) -> PathBuf {
    let mut name = path.canonicalize().unwrap_or_else(|_| path.to_owned()).into_os_string();
    name.push("-wal");
    name.into()
}

/// The files that hold a database's rows. If they change, the database was moved, removed or replaced;
/// SQLite continues with the open files wherever they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Files {
    file: Identity,
    /// `None` if there is no `-wal` file.
    wal: Option<Identity>,
}

/// Device and inode.
type Identity = (u64, u64);

impl Files {
    /// Returns the files; `None` if there is no database.
    fn of(path: &Path, wal: &Path) -> Option<Self> {
        Some(Self { file: identity(path)?, wal: identity(wal) })
    }
}

fn identity(path: &Path) -> Option<Identity> {
    let data = std::fs::metadata(path).ok()?;
    Some((data.dev(), data.ino()))
}

/// Returns whether the path that was opened leads to another file now, or to none.
fn has_moved(connection: &Connection) -> bool {
    let mut has_moved = 0_i32;
    // SAFETY: the handle is that of an open connection, which is borrowed here and used by this
    // thread alone; the name is a C string, and the pointer is to the integer that this operation
    // writes, which lives to the end of the call.
    #[allow(unsafe_code)]
    let code = unsafe {
        ffi::sqlite3_file_control(
            connection.handle(),
            c"main".as_ptr(),
            ffi::SQLITE_FCNTL_HAS_MOVED,
            (&raw mut has_moved).cast(),
        )
    };
    code != ffi::SQLITE_OK || has_moved != 0
}

/// Returns the message that the file is gone.
fn gone(wal: &Path) -> String {
    format!(
        "the file is gone: it was moved or removed while the host runs, and nothing is written. Put it back, \
         together with {}, and the sink goes on; or restart the host to begin a new file, into which it writes \
         what the stream still has",
        wal.display()
    )
}

/// Returns the message that SQLite would read rows of the previous file into the present one.
fn mixed(wal: &Path) -> String {
    let wal = wal.display();
    format!(
        "another file was put into its place while the host runs, and {wal} belongs to the file before, whose last \
         rows it has: nothing is written, for SQLite would mix the two. Put the file before back; or move {wal} away \
         with it, under the name of that file"
    )
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
