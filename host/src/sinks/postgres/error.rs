//! What an error of the server means for the next step: by its SQLSTATE.
//! Codes: PostgreSQL documentation, appendix A.

use std::error::Error as _;

use tokio_postgres::error::DbError;

use crate::sinks::{Error, RefusedRow};

/// While nothing of this transaction can have been committed.
pub fn classify(context: &str, error: &tokio_postgres::Error) -> Error {
    let reason = format!("{context}: {}", describe(error));
    let Some(db) = error.as_db_error() else {
        return if is_setup(error) { Error::Setup(reason) } else { Error::Retry(reason) };
    };
    match kind(db.code().code()) {
        Kind::Data => Error::Data(describe_db(db)),
        Kind::Setup => Error::Setup(reason),
        Kind::Retry => Error::Retry(reason),
    }
}

/// An error of COPY: names the row where the server does.
pub fn classify_copy(context: &str, error: &tokio_postgres::Error, rows: usize) -> Error {
    match classify(context, error) {
        Error::Data(reason) => match error.as_db_error().and_then(copy_row).filter(|row| *row < rows) {
            Some(row) => Error::Rows(vec![RefusedRow { row, reason }]),
            None => Error::Data(reason),
        },
        other => other,
    }
}

enum Kind {
    Data,
    Setup,
    Retry,
}

fn kind(code: &str) -> Kind {
    match (code.get(..2).unwrap_or_default(), code) {
        // A standby, after a failover: the url's other host, or this one again, will do.
        (_, "25006") => Kind::Retry,
        // Data, integrity, a view's check; and a row that is too big for an index,
        // which no waiting mends.
        ("22" | "23" | "44" | "54", _) => Kind::Data,
        // Syntax and access, authorization, no such database or schema, not supported,
        // raised by a user's trigger.
        ("42" | "28" | "3D" | "3F" | "0A" | "0L" | "0P" | "P0", _) => Kind::Setup,
        _ => Kind::Retry,
    }
}

/// From `COPY telemetry, line 17, column value`; lines count from 1, also in
/// binary COPY. Where the server speaks another language there is none.
fn copy_row(db: &DbError) -> Option<usize> {
    db.where_()?.lines().filter_map(line_of_copy).next()
}

fn line_of_copy(context: &str) -> Option<usize> {
    let (_, rest) = context.strip_prefix("COPY ")?.rsplit_once(", line ")?;
    let digits = rest.split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse::<usize>().ok()?.checked_sub(1)
}

/// Errors that no server sent, but that a person must mend.
fn is_setup(error: &tokio_postgres::Error) -> bool {
    let text = error.to_string();
    text.starts_with("invalid configuration") || text.starts_with("authentication error")
        || text.starts_with("error performing TLS handshake")
}

pub fn describe(error: &tokio_postgres::Error) -> String {
    if let Some(db) = error.as_db_error() {
        return describe_db(db);
    }
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

fn describe_db(db: &DbError) -> String {
    let mut text = format!("{} (SQLSTATE {})", db.message(), db.code().code());
    for more in [db.detail(), db.hint()].into_iter().flatten() {
        text = format!("{text}: {more}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_row_is_read_from_the_context() {
        for (context, row) in [
            ("COPY telemetry, line 1, column value", Some(0)),
            ("COPY telemetry, line 5000", Some(4_999)),
            ("COPY odd, line 3, line 17: \"x\"", Some(16)),
            ("PL/pgSQL function f() line 3 at RAISE", None),
            ("COPY telemetry, line 0", None),
        ] {
            assert_eq!(line_of_copy(context), row, "{context}");
        }
    }
}
