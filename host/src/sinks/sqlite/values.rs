//! Binds values so that SQLite returns them as they were sent.
//!
//! SQLite converts stored values by the affinity of the column (its documentation, "Datatypes In
//! SQLite", 3.1 and 3.2). In a column that is not declared as text, text that is a number becomes that
//! number: `007` is stored as 7. In a column of text, a number becomes text in SQLite's own format.

use rusqlite::Statement;
use rusqlite::types::{self, Null};

use crate::sinks::columns::{Kind, Mismatch, Value, write_time};

/// What SQLite does to a value of a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Affinity {
    /// Converts numbers to text.
    Text,
    /// Stores each value unchanged.
    Blob,
    /// Converts text to numbers.
    Integer,
    /// Converts text and whole numbers to doubles.
    Real,
    /// As `Integer`. Columns of types that SQLite does not know have this affinity, such as STRING,
    /// DATETIME and JSON.
    Numeric,
}

impl Affinity {
    pub fn of(declared: &str, is_strict: bool) -> Self {
        let declared = declared.to_ascii_uppercase();
        let has = |parts: &[&str]| parts.iter().any(|part| declared.contains(part));
        if has(&["INT"]) {
            Self::Integer
        } else if has(&["CHAR", "CLOB", "TEXT"]) {
            Self::Text
        } else if declared.is_empty() || has(&["BLOB"]) || is_strict && declared == "ANY" {
            Self::Blob
        } else if has(&["REAL", "FLOA", "DOUB"]) {
            Self::Real
        } else {
            Self::Numeric
        }
    }

    /// Returns whether it converts text to numbers.
    pub fn is_of_numbers(self) -> bool {
        matches!(self, Self::Integer | Self::Real | Self::Numeric)
    }

    /// Returns whether this text is unchanged when it is read after it was stored.
    fn keeps(self, text: &str) -> bool {
        let inner = text.trim_matches([' ', '\t', '\n', '\x0b', '\x0c', '\r']);
        // Not `inf` and `nan`, which are numbers to Rust alone.
        let number = inner.parse::<f64>().ok().filter(|_| inner.ends_with(|c: char| !c.is_alphabetic()));
        let Some(number) = number.filter(|_| self.is_of_numbers()) else { return true };
        let is_whole = text.parse::<i64>().is_ok_and(|whole| whole.to_string() == text);
        // With more digits SQLite may write other ones, and it writes a small number with an exponent.
        let digits = text.bytes().filter(u8::is_ascii_digit).count();
        let is_decimal =
            text.contains('.') && number.to_string() == text && digits <= 15 && number.abs() >= 1e-4;
        is_decimal || is_whole && self != Self::Real
    }
}

/// Binds a value to the parameter `at`.
pub fn bind_value(
    statement: &mut Statement<'_>,
    at: usize,
    (kind, affinity): (Option<Kind>, Affinity),
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
    macro_rules! bind_text {
        ($value:expr, $expected:literal) => {
            match $value {
                Some(text) if affinity.keeps(&text) => statement.raw_bind_parameter(at, text)?,
                Some(_) => return Ok(Err(NOT_KEPT)),
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
        Some(Kind::Double) if affinity == Affinity::Text => {
            bind!(value.f64().and_then(|_| value.json_text()), "a number");
        }
        Some(Kind::Double) => bind!(value.f64(), "a number"),
        Some(Kind::Bigint) if affinity == Affinity::Real => {
            let whole = value.i64().filter(|whole| (*whole as f64) as i128 == i128::from(*whole));
            bind!(whole, "a whole number that a double holds exactly");
        }
        Some(Kind::Bigint) => bind!(value.i64(), "a whole number"),
        Some(Kind::Bool) => bind!(value.bool(), "true or false"),
        Some(Kind::Text) => bind_text!(value.text(), "text"),
        // Of JSON text, SQLite takes numbers alone for numbers.
        Some(Kind::Jsonb) if affinity.is_of_numbers() && value.is_number() => {
            bind!(number(value, affinity), "a number that SQLite holds exactly");
        }
        Some(Kind::Jsonb) => bind!(value.json_text(), "JSON"),
        Some(Kind::Bytes) => bind!(value.bytes().as_deref(), "bytes"),
        // As it is: a number as a number, the rest as text.
        None if value.is_number() => {
            bind!(number(value, affinity), "a number that SQLite holds exactly");
        }
        None => match (value.i64(), value.bool()) {
            (Some(time), _) => statement.raw_bind_parameter(at, time)?,
            (None, Some(yes)) => statement.raw_bind_parameter(at, yes)?,
            (None, None) => bind_text!(value.text(), "text"),
        },
    }
    Ok(Ok(()))
}

const NOT_KEPT: Mismatch = Mismatch(
    "text that this column keeps, because SQLite makes a number of it (declare the column TEXT in the table)",
);

/// Returns a JSON number as SQLite stores it: a 64-bit integer, or a double if it is written as one or
/// the column holds only doubles.
fn number(value: Value<'_>, affinity: Affinity) -> Option<types::Value> {
    if let Some(whole) = value.i64() {
        return Some(types::Value::Integer(whole));
    }
    let is_double = affinity == Affinity::Real || value.json_text()?.contains(['.', 'e', 'E']);
    value.f64().filter(|_| is_double).map(types::Value::Real)
}
