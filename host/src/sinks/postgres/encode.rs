//! Encodes rows in PostgreSQL's binary COPY format directly into the buffer for the socket
//! (documentation of COPY, "Binary Format"; the formats of types are those of their `*send` functions).
//! `BinaryCopyInWriter` is not used, because it goes through `&dyn ToSql` and a boxed error for every
//! field.

use std::borrow::Cow;

use bytes::{BufMut, BytesMut};
use headworks_guest::json::{self, Kind as JsonKind, Raw};
use tokio_postgres::types::Type;

use crate::sinks::columns::{Mismatch, Value};

/// `PGCOPY\n\377\r\n\0`, no flags, no header extension.
pub const HEADER: [u8; 19] = *b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
pub const TRAILER: [u8; 2] = (-1_i16).to_be_bytes();
/// PostgreSQL's epoch, 2000-01-01, in microseconds since 1970.
const EPOCH_US: i64 = 946_684_800_000_000;
pub const DAY_US: i64 = 86_400_000_000;
/// Valid timestamps, from 4714-11-24 BC to the year 294277, in microseconds since 2000
/// (datatype/timestamp.h).
const TIMESTAMPS: std::ops::Range<i64> = -211_813_488_000_000_000..9_223_371_331_200_000_000;
/// Largest field that PostgreSQL accepts: MaxAllocSize, less room for headers.
const FIELD_BYTES_MAX: usize = 1_000_000_000;
/// MAXDIM of PostgreSQL's arrays.
const ARRAY_DIMENSIONS_MAX: usize = 6;

/// A supported type of a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    Bool,
    Int2,
    Int4,
    Int8,
    Float4,
    Float8,
    Numeric(Length),
    Text(Length),
    Timestamp,
    Date,
    Json,
    Jsonb,
    Bytea,
    Uuid,
    /// An array, written in its text form.
    Array {
        /// Whether its elements are JSON, so that a string element keeps its quotes.
        of_json: bool,
    },
    /// Any other type, written in its text form, which the server parses when the row leaves the staging
    /// table.
    Other,
}

/// Limit in a column's declared type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    Any,
    /// Most characters of `varchar(n)` and `char(n)`.
    Chars(u32),
    /// Digits before the decimal point of `numeric(p, s)`.
    Digits(i32),
}

impl Target {
    pub fn of(oid: u32, length: Length) -> Self {
        let Some(known) = Type::from_oid(oid) else { return Self::Other };
        match known {
            Type::BOOL => Self::Bool,
            Type::INT2 => Self::Int2,
            Type::INT4 => Self::Int4,
            Type::INT8 => Self::Int8,
            Type::FLOAT4 => Self::Float4,
            Type::FLOAT8 => Self::Float8,
            Type::NUMERIC => Self::Numeric(length),
            Type::TEXT | Type::VARCHAR | Type::BPCHAR | Type::NAME => Self::Text(length),
            // Without a time zone: UTC.
            Type::TIMESTAMPTZ | Type::TIMESTAMP => Self::Timestamp,
            Type::DATE => Self::Date,
            Type::JSON => Self::Json,
            Type::JSONB => Self::Jsonb,
            Type::BYTEA => Self::Bytea,
            Type::UUID => Self::Uuid,
            _ => Self::Other,
        }
    }

    /// Returns the type in the staging table.
    pub fn staged(self) -> Self {
        if self == Self::Jsonb { Self::Json } else { self }
    }

    /// Appends a field: its length, then its bytes.
    #[inline]
    pub fn put(self, value: Value<'_>, out: &mut BytesMut) -> Result<(), Mismatch> {
        if value == Value::Null {
            out.put_i32(-1);
            return Ok(());
        }
        match self {
            Self::Float8 => {
                let number = value.f64().ok_or(Mismatch("a number"))?;
                out.put_i32(8);
                out.put_f64(number);
            }
            Self::Text(length) => {
                let text = text_of(value)?;
                if let Length::Chars(most) = length
                    && text.len() > most as usize
                    // What is cut off may be blank: SQL, assignment of character strings.
                    && text.chars().skip(most as usize).any(|c| c != ' ')
                {
                    return Err(Mismatch("text that fits the column's length"));
                }
                put_bytes(text.as_bytes(), out)?;
            }
            Self::Other => put_bytes(text_of(value)?.as_bytes(), out)?,
            Self::Array { of_json } => put_bytes(array_of(value, of_json)?.as_bytes(), out)?,
            Self::Timestamp => {
                let us = value.time_us().ok_or(Mismatch("a time"))?;
                let since = us.checked_sub(EPOCH_US).filter(|since| TIMESTAMPS.contains(since));
                out.put_i32(8);
                out.put_i64(since.ok_or(Mismatch("a time that PostgreSQL can hold"))?);
            }
            Self::Date => {
                let days = value.day().ok_or(Mismatch("a date"))? - EPOCH_US / DAY_US;
                if !TIMESTAMPS.contains(&days.saturating_mul(DAY_US)) {
                    return Err(Mismatch("a date that PostgreSQL can hold"));
                }
                out.put_i32(4);
                out.put_i32(days as i32);
            }
            Self::Float4 => {
                let number = value.f64().ok_or(Mismatch("a number"))? as f32;
                if !number.is_finite() {
                    return Err(Mismatch("a number that a real can hold"));
                }
                out.put_i32(4);
                out.put_f32(number);
            }
            Self::Int8 => {
                out.put_i32(8);
                out.put_i64(value.i64().ok_or(Mismatch("a whole number"))?);
            }
            Self::Int4 => {
                let number = value.i64().ok_or(Mismatch("a whole number"))?;
                out.put_i32(4);
                out.put_i32(
                    i32::try_from(number).map_err(|_| Mismatch("a number that an integer can hold"))?,
                );
            }
            Self::Int2 => {
                let number = value.i64().ok_or(Mismatch("a whole number"))?;
                out.put_i32(2);
                out.put_i16(
                    i16::try_from(number).map_err(|_| Mismatch("a number that a smallint can hold"))?,
                );
            }
            Self::Numeric(length) => put_numeric(value, length, out)?,
            Self::Bool => {
                out.put_i32(1);
                out.put_u8(u8::from(value.bool().ok_or(Mismatch("true or false"))?));
            }
            Self::Json => {
                put_bytes(value.json_text().ok_or(Mismatch("JSON"))?.as_bytes(), out)?;
            }
            Self::Jsonb => {
                let text = value.json_text().ok_or(Mismatch("JSON"))?;
                out.put_i32(field_len(text.len() + 1)?);
                out.put_u8(1);
                out.put_slice(text.as_bytes());
            }
            Self::Bytea => put_bytes(&value.bytes().ok_or(Mismatch("bytes"))?, out)?,
            Self::Uuid => {
                let text = value.text().ok_or(Mismatch("a UUID"))?;
                let uuid = uuid::Uuid::try_parse(text.trim()).map_err(|_| Mismatch("a UUID"))?;
                out.put_i32(16);
                out.put_slice(uuid.as_bytes());
            }
        }
        Ok(())
    }
}

fn text_of(value: Value<'_>) -> Result<Cow<'_, str>, Mismatch> {
    let text = value.text().ok_or(Mismatch("text"))?;
    if memchr(text.as_bytes()) {
        return Err(Mismatch("text without NUL, which PostgreSQL cannot hold"));
    }
    Ok(text)
}

/// Returns a JSON array in PostgreSQL's array syntax (documentation, 8.15.2). Other values are returned
/// unchanged.
fn array_of(value: Value<'_>, of_json: bool) -> Result<Cow<'_, str>, Mismatch> {
    let json = value.json_text();
    let array = json.as_deref().and_then(|text| json::parse(text.as_bytes()).ok());
    let Some(array) = array.filter(|array| array.kind() == JsonKind::Array) else { return text_of(value) };
    let mut text = String::new();
    put_elements(array, of_json, ARRAY_DIMENSIONS_MAX, &mut text)?;
    if memchr(text.as_bytes()) {
        return Err(Mismatch("text without NUL, which PostgreSQL cannot hold"));
    }
    Ok(text.into())
}

fn put_elements(
    array: Raw<'_>,
    of_json: bool,
    dimensions_max: usize,
    out: &mut String,
) -> Result<(), Mismatch> {
    let Some(below) = dimensions_max.checked_sub(1) else {
        return Err(Mismatch("an array of at most 6 dimensions"));
    };
    let written =
        |raw: Raw<'_>| std::str::from_utf8(raw.as_bytes()).map(str::to_owned).map_err(|_| Mismatch("text"));
    out.push('{');
    for (i, element) in array.elements().enumerate() {
        if i > 0 {
            out.push(',');
        }
        match element.kind() {
            JsonKind::Null => out.push_str("NULL"),
            JsonKind::Bool | JsonKind::Number => out.push_str(&written(element)?),
            JsonKind::String if of_json => put_quoted(&written(element)?, out),
            JsonKind::String => put_quoted(&element.as_str().ok_or(Mismatch("text"))?, out),
            JsonKind::Object => put_quoted(&written(element)?, out),
            JsonKind::Array => put_elements(element, of_json, below, out)?,
        }
    }
    out.push('}');
    Ok(())
}

fn put_quoted(text: &str, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        if matches!(c, '"' | '\\') {
            out.push('\\');
        }
        out.push(c);
    }
    out.push('"');
}

/// Returns whether the bytes contain a NUL.
#[inline]
fn memchr(bytes: &[u8]) -> bool {
    bytes.contains(&0)
}

#[inline]
fn put_bytes(bytes: &[u8], out: &mut BytesMut) -> Result<(), Mismatch> {
    out.put_i32(field_len(bytes.len())?);
    out.put_slice(bytes);
    Ok(())
}

fn field_len(len: usize) -> Result<i32, Mismatch> {
    if len > FIELD_BYTES_MAX { Err(Mismatch("small enough for PostgreSQL")) } else { Ok(len as i32) }
}

/// Appends exactly the digits in the payload: groups of four decimal digits around the point
/// (`numeric_recv`).
fn put_numeric(value: Value<'_>, length: Length, out: &mut BytesMut) -> Result<(), Mismatch> {
    const NOT: Mismatch = Mismatch("a number");
    const DIGITS_MAX: usize = 1_000;
    value.f64().ok_or(NOT)?;
    let text = value.text().ok_or(NOT)?;
    let text = text.trim();
    let (negative, text) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
    let (mantissa, exponent) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
    let exponent: i64 = exponent.parse().map_err(|_| NOT)?;
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let too_long = Mismatch("a number of at most 1,000 digits");
    // The value is 0.digits * 10^point.
    let point = whole.len() as i64 + exponent;
    if whole.len() + fraction.len() > DIGITS_MAX || exponent.unsigned_abs() > DIGITS_MAX as u64 {
        return Err(too_long);
    }
    let digit = |at: i64| -> i16 {
        // Digit at 10^(point - 1 - at), zero outside of those that are written.
        let digits = whole.bytes().chain(fraction.bytes());
        usize::try_from(at).ok().and_then(|at| digits.clone().nth(at)).map_or(0, |b| i16::from(b - b'0'))
    };
    let first_group = point.div_euclid(4) + i64::from(point.rem_euclid(4) != 0);
    let digits_end = (whole.len() + fraction.len()) as i64;
    let scale = (digits_end - point).max(0);
    let mut groups = Vec::new();
    let mut at = point - first_group * 4;
    while at < digits_end.max(point) {
        groups.push((0..4).fold(0, |group, i| group * 10 + digit(at + i)));
        at += 4;
    }
    let leading = groups.iter().take_while(|group| **group == 0).count();
    groups.drain(..leading);
    while groups.last() == Some(&0) {
        groups.pop();
    }
    if let (Length::Digits(most), Some(top)) = (length, groups.first()) {
        let whole_digits = (first_group - 1 - leading as i64) * 4 + i64::from(top.ilog10()) + 1;
        if whole_digits > i64::from(most) {
            return Err(Mismatch("a number that fits the column's precision"));
        }
    }
    let weight = if groups.is_empty() { 0 } else { first_group - 1 - leading as i64 };
    out.put_i32(8 + 2 * groups.len() as i32);
    out.put_i16(groups.len() as i16);
    out.put_i16(weight as i16);
    out.put_u16(if negative && !groups.is_empty() { 0x4000 } else { 0 });
    out.put_u16(scale as u16);
    for group in groups {
        out.put_i16(group);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(target: Target, payload: &str) -> Result<Vec<u8>, Mismatch> {
        let mut out = BytesMut::new();
        target.put(Value::Payload(payload.as_bytes()), &mut out).map(|()| out.to_vec())
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert_eq!(put(Target::Int2, "40000"), Err(Mismatch("a number that a smallint can hold")));
        assert_eq!(put(Target::Float4, "1e300"), Err(Mismatch("a number that a real can hold")));
        assert_eq!(put(Target::Bool, "1"), Err(Mismatch("true or false")));
        assert!(put(Target::Text(Length::Any), "a\0b").is_err());
        assert!(put(Target::Timestamp, "-9e21").is_err());
        assert_eq!(put(Target::Bool, "true"), Ok(vec![0, 0, 0, 1, 1]));
    }

    #[test]
    fn a_date_is_the_day_as_it_stands() {
        let day = |days: i32| Ok([[0, 0, 0, 4], days.to_be_bytes()].concat());
        for (payload, days) in [
            ("\"2026-03-01\"", 9_556),
            ("\"20260301\"", 9_556),
            ("20260301", 9_556),
            ("\"2026-03-01T00:30:00+02:00\"", 9_556),
            ("1772323200", 9_556),
            ("\"1772323199999\"", 9_555),
            ("0", -10_957),
        ] {
            assert_eq!(put(Target::Date, payload), day(days), "{payload}");
        }
        assert_eq!(put(Target::Date, "\"2026-02-30\""), Err(Mismatch("a date")));
        assert_eq!(put(Target::Timestamp, "20260301120000"), Err(Mismatch("a time")));
        assert!(put(Target::Date, "-9e21").is_err());
    }

    #[test]
    fn a_declared_length_is_held_as_the_server_holds_it() {
        let text = Target::Text(Length::Chars(3));
        let number = Target::Numeric(Length::Digits(3));
        for (target, payload, fits) in [
            (text, "caf\u{e9}", false),
            (text, "fé!", true),
            (text, "abc  ", true),
            (text, "abc d", false),
            (number, "999.99", true),
            (number, "-1000", false),
            (number, "1e3", false),
            (number, "0.00012", true),
            (number, "0", true),
            (Target::Numeric(Length::Digits(5)), "99999.1", true),
            (Target::Numeric(Length::Digits(5)), "100000", false),
            (Target::Numeric(Length::Digits(-2)), "0.001", true),
            (Target::Numeric(Length::Digits(-2)), "0.01", false),
        ] {
            assert_eq!(put(target, payload).is_ok(), fits, "{target:?} {payload}");
        }
    }

    #[test]
    fn null_is_a_length_of_minus_one() {
        let mut out = BytesMut::new();
        Target::Float8.put(Value::Null, &mut out).unwrap();
        assert_eq!(out[..], [0xff; 4]);
    }
}
