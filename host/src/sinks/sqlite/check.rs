//! `validate --connect`: checks what the sink would find. The file is opened read-only, and no file is
//! created beside it.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::{Connection, ErrorCode, OpenFlags};
use rustix::fs::{Access, access};

use super::config::Config;
use super::positions;
use super::table::{bind, has_keys, has_rows, insert, is_there};
use crate::sinks::columns::Columns;
use crate::sinks::{Checked, Claim, Found, Looked, OnConflict};
use crate::topic::Namespace;

/// See [`crate::sinks::SinkConfig::check`].
pub fn check(config: &Config, namespace: Arc<Namespace>, claims: Vec<Claim>) -> Checked {
    let mut checked = Checked::default();
    let mut config = config.clone();
    config.on_conflict = config.on_conflict.resolved();
    if let Err(reason) = look(&config, &Columns::new(&config.columns, namespace), claims, &mut checked) {
        checked.problems.push(reason);
    }
    checked
}

fn look(config: &Config, columns: &Columns, claims: Vec<Claim>, checked: &mut Checked) -> Result<(), String> {
    let path = &config.path;
    let shown = path.display();
    folder(path)?;
    let creates = |checked: &mut Checked| checked.found.push(format!("creates the table {}", config.table));
    let data = match std::fs::metadata(path) {
        Ok(data) => data,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            checked.found.push(format!("creates the file {shown}"));
            if !config.create {
                return Err(format!(
                    "there is no file {shown}: create it and its table, or set `create: true`"
                ));
            }
            creates(checked);
            let nothing = |claim| Looked { claim, positions: Vec::new(), found: Found::default() };
            checked.claims = claims.into_iter().map(nothing).collect();
            return Ok(());
        }
        Err(error) => return Err(format!("cannot read {shown}: {error}")),
    };
    if data.is_dir() || data.file_type().is_socket() {
        return Err(format!("{shown} is not a file: correct `path`"));
    }
    access(path, Access::READ_OK | Access::WRITE_OK)
        .map_err(|error| format!("cannot write to {shown}: {error}: let this user write there"))?;
    let failed = |error: rusqlite::Error| match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase) => {
            format!("{shown} is not a SQLite database: move the file away, or correct `path`")
        }
        Some(ErrorCode::DatabaseCorrupt) => format!("{shown}: {error}: restore the file, or move it away"),
        _ => format!("{shown}: {error}"),
    };
    let connection = open(path).map_err(failed)?;
    connection.busy_timeout(config.busy_timeout.0).map_err(failed)?;
    for claim in claims {
        let has_rows = has_rows(&connection, config).map_err(failed)?;
        let (positions, found) =
            positions::look(&connection, &claim, (&config.table, has_rows)).map_err(failed)??;
        checked.claims.push(Looked { claim, positions, found });
    }
    let was_there = checked.claims.iter().any(|looked| !looked.positions.is_empty());
    if !is_there(&connection, config).map_err(failed)? && config.create && !was_there {
        creates(checked);
        return Ok(());
    }
    let mut columns = columns.clone();
    let bound = bind(&connection, config, &mut columns, was_there).map_err(failed)??;
    // Compiled and not run: SQLite answers as it would to the real one.
    connection.prepare(&insert(config, &columns, &bound, 1)).map_err(|error| format!("{shown}: {error}"))?;
    checked.warnings.extend(bound.warnings);
    if config.on_conflict == OnConflict::Ignore && !has_keys(&connection, config).map_err(failed)? {
        checked.warnings.push(format!(
            "on_conflict: ignore has no effect: table {} has no unique key, so no row meets another",
            config.table
        ));
    }
    checked.found.push(format!("table {} is there", config.table));
    Ok(())
}

/// Returns whether the sink could create its files: the database and those that SQLite creates beside
/// it.
fn folder(path: &Path) -> Result<(), String> {
    let path = std::path::absolute(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let wanted = path.parent().unwrap_or(&path);
    let there: PathBuf = wanted.ancestors().find(|folder| folder.exists()).unwrap_or(wanted).to_owned();
    let shown = there.display();
    if !there.is_dir() {
        return Err(format!("{shown} is not a folder: correct `path`"));
    }
    access(&there, Access::WRITE_OK | Access::EXEC_OK).map_err(|error| {
        format!("cannot write to the folder {shown}: {error}: let this user write there, or correct `path`")
    })
}

/// Opens the database. If there is no WAL, SQLite creates no files beside it.
fn open(path: &Path) -> rusqlite::Result<Connection> {
    let wal = PathBuf::from(format!("{}-wal", path.display()));
    let is_whole = std::fs::metadata(wal).map_or(true, |data| data.len() == 0);
    let mut url = "file://".to_owned();
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    for byte in path.as_os_str().as_encoded_bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'-' | b'_' => {
                url.push(char::from(*byte))
            }
            other => url += &format!("%{other:02X}"),
        }
    }
    url += if is_whole { "?immutable=1" } else { "?mode=ro" };
    Connection::open_with_flags(url, OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI)
}
