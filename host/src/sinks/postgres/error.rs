//! Classifies errors of the server by SQLSTATE, according to what the sink does next. Codes: PostgreSQL
//! documentation, appendix A.

use std::error::Error as _;
use std::io::ErrorKind;

use tokio_postgres::error::DbError;

use crate::sinks::Error;

/// Most lines of a server's context in a reason, and most characters of each.
const CONTEXT_LINES_MAX: usize = 3;
const CONTEXT_CHARS_MAX: usize = 200;

/// What to do about a pooler that gives each transaction another server connection.
pub const POOLER: &str = "a pooler is in between that hands server connections out by transaction, such as PgBouncer \
     with pool_mode = transaction; set pool_mode = session for this user and database, or connect to PostgreSQL directly";

/// Returns whether only such a pooler can cause the error: a prepared statement, or the staging table of
/// this session, exists before it was created, or is missing afterwards.
fn is_by_pooler(error: &tokio_postgres::Error) -> bool {
    error.as_db_error().is_some_and(|db| match db.code().code() {
        "26000" | "42P05" => true,
        "42P07" => db.message().contains("headworks_stage"),
        _ => false,
    })
}

/// Classifies an error outside of writing rows, at a time when nothing of this transaction can have been
/// committed.
pub fn classify(context: &str, error: &tokio_postgres::Error) -> Error {
    if is_by_pooler(error) {
        return Error::Setup(format!("{context}: {}: {POOLER}", describe(error)));
    }
    next(error)(format!("{context}: {}", describe(error)))
}

/// Classifies an error of a connection attempt, and adds what to do about it.
pub fn cannot_connect(error: &tokio_postgres::Error) -> Error {
    let advice = advice(error).map(|advice| format!("; {advice}")).unwrap_or_default();
    next(error)(format!("{}{advice}", describe(error)))
}

fn next(error: &tokio_postgres::Error) -> fn(String) -> Error {
    let Some(db) = error.as_db_error() else {
        return if is_setup(error) { Error::Setup } else { Error::Retry };
    };
    match of_write(db.code().code()) {
        Kind::Row { certain: true } => Error::Setup,
        Kind::Row { .. } if is_setup_code(db.code().code()) => Error::Setup,
        Kind::Row { .. } | Kind::Outside | Kind::Retry | Kind::TooMuch => Error::Retry,
    }
}

/// Meaning of an error that occurred while rows were written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A row may be the cause. With `certain` it is the cause, even if nothing else was written.
    Row {
        certain: bool,
    },
    /// Something outside of the database failed, such as another server or a file that a trigger or a
    /// foreign table uses. All rows may be affected, as while that server is down, or only one.
    Outside,
    /// Too many rows at once for a limit of time or memory.
    TooMuch,
    Retry,
}

/// Classifies an SQLSTATE. Codes that the server does not define come from RAISE in a trigger, so they
/// concern the row.
pub fn of_write(code: &str) -> Kind {
    match (code.get(..2).unwrap_or_default(), code) {
        // A cancelled statement (`statement_timeout`), out of memory, a configured limit.
        (_, "57014" | "53200" | "53400") => Kind::TooMuch,
        // A standby, after a failover: the url's other host, or this one again, will do.
        // A lock that was not there in time.
        (_, "25006" | "55P03") => Kind::Retry,
        // Connection (a session that ends has no code), system, foreign server.
        ("08" | "58" | "HV", _) => Kind::Outside,
        // Transaction state and rollback, resources, operator.
        ("25" | "26" | "40" | "53" | "57", _) => Kind::Retry,
        // A sequence at its end, a trigger's function that does not return what it must.
        (_, "2200H" | "2F005" | "39P01") => Kind::Row { certain: false },
        // Not supported, invalid authorization, names and syntax, the state of an object,
        // an internal error: of a trigger or an extension for this row, or of the table for all.
        ("0A" | "0L" | "0P" | "28" | "2B" | "3D" | "3F" | "42" | "55" | "F0" | "XX", _) => {
            Kind::Row { certain: false }
        }
        _ => Kind::Row { certain: true },
    }
}

/// Returns whether extensions raise this code for single rows, although a table can also cause it for
/// all rows.
pub fn is_doubtful(code: &str) -> bool {
    code.starts_with("0A") || code.starts_with("XX") || code == "53400"
}

/// Returns whether the code is of class 57P: the server ended the connection, possibly after the commit.
pub fn is_end(code: &str) -> bool {
    code.starts_with("57P")
}

/// Returns whether the code concerns names, rights or missing objects, which only an operator can fix.
fn is_setup_code(code: &str) -> bool {
    !code.starts_with("XX") && !code.starts_with("55")
}

/// Returns whether an error that no server sent needs an operator.
fn is_setup(error: &tokio_postgres::Error) -> bool {
    let text = error.to_string();
    text.starts_with("invalid configuration")
        || text.starts_with("authentication error")
        || text.starts_with("error performing TLS handshake")
}

/// Returns what an operator can do.
fn advice(error: &tokio_postgres::Error) -> Option<&'static str> {
    if let Some(db) = error.as_db_error() {
        return Some(match db.code().code() {
            "28P01" => "correct the sink's `password`, or the one in its `url`",
            "28000" => {
                "create the role, let it in in the server's pg_hba.conf, or name another user in `url`"
            }
            "3D000" => "create the database, or name another one in `url`",
            "42501" => "GRANT CONNECT ON DATABASE to the user, or name another one in `url`",
            "53300" => {
                "raise the limit that the message names (the server's max_connections, or CONNECTION LIMIT of the role \
                 or the database), or end other connections"
            }
            _ => return None,
        });
    }
    let io = || {
        let causes = std::iter::successors(error.source(), |cause| (**cause).source());
        causes.filter_map(|cause| cause.downcast_ref::<std::io::Error>()).next()
    };
    let text = describe(error);
    Some(match io().map(std::io::Error::kind) {
        Some(ErrorKind::ConnectionRefused) => "start the server, or correct host and port in `url`",
        Some(ErrorKind::TimedOut) => "is the server up, and does a firewall let this machine through?",
        _ if text.contains("failed to lookup address") => "correct the host's name in `url`",
        _ if text.contains("timed out") => "is the server up, and does a firewall let this machine through?",
        _ if text.contains("password missing") => "set the sink's `password`",
        _ if text.contains("does not support TLS") => {
            "turn TLS on at the server (ssl = on), or set `sslmode: prefer`"
        }
        _ if text.contains("UnknownIssuer") => "name the server's CA in `tls.ca`",
        _ if text.contains("CaUsedAsEndEntity") => {
            "the server's certificate is a CA's own: name its file in `tls.ca`, or give the server one that a CA \
             has signed"
        }
        _ if text.contains("certificate expired") => {
            "renew the server's certificate, or set this machine's clock"
        }
        _ if text.contains("not valid for name") || text.contains("NotValidForName") => {
            "write the name of the certificate in `url`, or set `sslmode: verify-ca`"
        }
        _ => return None,
    })
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

pub fn describe_db(db: &DbError) -> String {
    describe_parts(db.message(), db.code().code(), db.column(), [db.detail(), db.hint(), db.where_()])
}

/// Describes an error: `column "value": null value in column "value" … (SQLSTATE 23502): Failing row
/// contains …`
///
/// `more` has detail, hint and context. Of the context, only the part within our own statements is used:
/// a trigger's function and line, a line of JSON, a line and column of COPY.
pub fn describe_parts(message: &str, code: &str, column: Option<&str>, more: [Option<&str>; 3]) -> String {
    let [detail, hint, context] = more;
    let theirs = context.map(|context| {
        let ours = ["headworks_stage", "headworks_isolate", "SET CONSTRAINTS ALL"];
        let is_ours = |line: &&str| ours.iter().any(|ours| line.contains(ours));
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
        for code in ["0A000", "XX000", "42501", "55000", "2200H", "2F005", "39P01"] {
            assert_eq!(of_write(code), Kind::Row { certain: false }, "{code}");
        }
        for code in ["57014", "53200", "53400"] {
            assert_eq!(of_write(code), Kind::TooMuch, "{code}");
        }
        for code in ["57P01", "40P01", "40001", "53100", "25006", "55P03"] {
            assert_eq!(of_write(code), Kind::Retry, "{code}");
        }
        for code in ["08006", "58P01", "HV00L"] {
            assert_eq!(of_write(code), Kind::Outside, "{code}");
        }
    }
}
