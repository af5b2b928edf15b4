//! What an error of the server means for the next step: by its SQLSTATE.
//! Codes: PostgreSQL documentation, appendix A.

use std::error::Error as _;

use tokio_postgres::error::DbError;

use crate::sinks::Error;

/// While nothing of this transaction can have been committed, and outside of
/// Lines of a server's context that a reason keeps, and characters of each.
const CONTEXT_LINES_MAX: usize = 3;
const CONTEXT_CHARS_MAX: usize = 200;

/// the write of rows.
pub fn classify(context: &str, error: &tokio_postgres::Error) -> Error {
    let reason = format!("{context}: {}", describe(error));
    let Some(db) = error.as_db_error() else {
        return if is_setup(error) { Error::Setup(reason) } else { Error::Retry(reason) };
    };
    match of_write(db.code().code()) {
        Kind::Row { certain: true } => Error::Setup(reason),
        Kind::Row { .. } if is_setup_code(db.code().code()) => Error::Setup(reason),
        Kind::Row { .. } | Kind::Retry | Kind::TooMuch => Error::Retry(reason),
    }
}

/// What an error says that came as rows were written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A row may be the cause. `certain`: it is, though nothing else was written either.
    Row {
        certain: bool,
    },
    /// Too many rows at once for a limit of time or memory.
    TooMuch,
    Retry,
}

/// By SQLSTATE. Codes that the server does not know itself come from RAISE in
/// a trigger, so they are about the row.
pub fn of_write(code: &str) -> Kind {
    match (code.get(..2).unwrap_or_default(), code) {
        // A cancelled statement (`statement_timeout`), out of memory, a configured limit.
        (_, "57014" | "53200" | "53400") => Kind::TooMuch,
        // A standby, after a failover: the url's other host, or this one again, will do.
        // A lock that was not there in time; a prepared statement that is gone.
        (_, "25006" | "55P03" | "26000") => Kind::Retry,
        // Connection, transaction rollback, resources, operator, system, foreign server.
        ("08" | "40" | "53" | "57" | "58" | "HV" | "25", _) => Kind::Retry,
        // Not supported, invalid authorization, names and syntax, the state of an object,
        // an internal error: of a trigger or an extension for this row, or of the table for all.
        ("0A" | "0L" | "0P" | "28" | "2B" | "3D" | "3F" | "42" | "55" | "F0" | "XX", _) => {
            Kind::Row { certain: false }
        }
        _ => Kind::Row { certain: true },
    }
}

/// Codes that extensions raise for single rows and that a table can also give
/// for all of them.
pub fn is_doubtful(code: &str) -> bool {
    code.starts_with("0A") || code.starts_with("XX") || code == "53400"
}

/// Names, rights, what is not there: nothing but a person mends it.
fn is_setup_code(code: &str) -> bool {
    !code.starts_with("XX") && !code.starts_with("55")
}

/// Errors that no server sent, but that a person must mend.
fn is_setup(error: &tokio_postgres::Error) -> bool {
    let text = error.to_string();
    text.starts_with("invalid configuration")
        || text.starts_with("authentication error")
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
    describe_parts(db.message(), db.code().code(), db.column(), [db.detail(), db.hint(), db.where_()])
}

/// `column "value": null value in column "value" … (SQLSTATE 23502): Failing row contains …`
///
/// `more`: detail, hint and context. Of the context what lies within our own statements: a
/// trigger's function and line, a line of JSON, a line and column of COPY.
pub fn describe_parts(message: &str, code: &str, column: Option<&str>, more: [Option<&str>; 3]) -> String {
    let [detail, hint, context] = more;
    let theirs = context.map(|context| {
        let is_ours = |line: &&str| line.contains("headworks_stage") || line.contains("headworks_isolate");
        let lines = context.lines().take_while(|line| !is_ours(line)).take(CONTEXT_LINES_MAX);
        lines
            .map(|line| line.chars().take(CONTEXT_CHARS_MAX).collect::<String>())
            .collect::<Vec<_>>()
            .join(", ")
    });
    let mut text = match column.filter(|column| !message.contains(&format!("\"{column}\""))) {
        Some(column) => format!("column \"{column}\": {message} (SQLSTATE {code})"),
        None => format!("{message} (SQLSTATE {code})"),
    };
    let more = [detail, hint, theirs.as_deref()];
    for more in more.into_iter().flatten().filter(|more| !more.is_empty()) {
        text = format!("{text}: {more}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_trigger_may_raise_is_about_its_row_and_what_passes_is_not() {
        for code in ["22003", "23505", "44000", "54000", "P0001", "P0002", "IOT42", "45000"] {
            assert_eq!(of_write(code), Kind::Row { certain: true }, "{code}");
        }
        for code in ["0A000", "XX000", "42501", "55000"] {
            assert_eq!(of_write(code), Kind::Row { certain: false }, "{code}");
        }
        for code in ["57014", "53200", "53400"] {
            assert_eq!(of_write(code), Kind::TooMuch, "{code}");
        }
        for code in ["57P01", "40P01", "40001", "53100", "08006", "25006", "55P03"] {
            assert_eq!(of_write(code), Kind::Retry, "{code}");
        }
    }
}
