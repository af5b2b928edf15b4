//! Line protocol: `measurement,tag=text field=1.5,other="text" 1771840800123456789`.
//!
//! The text forms are those that InfluxDB 1 and 2 read (their `models` package: a backslash counts only
//! before the characters that it escapes), and those of InfluxDB 3 (where a backslash is escaped too).
//! Text that none of these forms can represent is an error here, so that the server never receives
//! another text than was intended.

use std::fmt::Write;

/// How a server reads backslashes in names and tags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backslash {
    /// Literally, except before a character that it escapes.
    Plain,
    /// A backslash is written as two.
    Escaped,
}

/// Error for text that no form of the line protocol can represent.
const LINE_END: &str = "it has a line end, which the line protocol cannot hold";
const TRAILING_BACKSLASH: &str = "it ends in a backslash, which InfluxDB 1 and 2 cannot hold";

/// Appends the name of a measurement.
pub fn push_measurement(line: &mut String, name: &str, backslash: Backslash) -> Result<(), &'static str> {
    check_measurement(name)?;
    push(line, name, &[',', ' '], backslash)
}

pub fn check_measurement(name: &str) -> Result<(), &'static str> {
    match name {
        "" => Err("it is empty"),
        // A comment, for the server.
        name if name.starts_with('#') => Err("it begins with #, which the line protocol takes for a comment"),
        name => check_text(name),
    }
}

/// Checks the name of a tag or field.
pub fn check_key(name: &str) -> Result<(), &'static str> {
    check_text(name)?;
    if name.ends_with('\\') { Err(TRAILING_BACKSLASH) } else { Ok(()) }
}

fn check_text(text: &str) -> Result<(), &'static str> {
    if text.contains(['\n', '\r']) { Err(LINE_END) } else { Ok(()) }
}

/// Appends the name of a tag or field, or the text of a tag, which must not be empty.
pub fn push_key(line: &mut String, text: &str, backslash: Backslash) -> Result<(), &'static str> {
    check_text(text)?;
    push(line, text, &[',', '=', ' '], backslash)
}

fn push(line: &mut String, text: &str, escaped: &[char], backslash: Backslash) -> Result<(), &'static str> {
    if backslash == Backslash::Plain && text.ends_with('\\') {
        return Err(TRAILING_BACKSLASH);
    }
    for c in text.chars() {
        if escaped.contains(&c) || c == '\\' && backslash == Backslash::Escaped {
            line.push('\\');
        }
        line.push(c);
    }
    Ok(())
}

/// Appends the text of a field.
pub fn push_text(line: &mut String, text: &str) {
    line.push('"');
    for c in text.chars() {
        if matches!(c, '"' | '\\') {
            line.push('\\');
        }
        line.push(c);
    }
    line.push('"');
}

/// Appends a finite number in the shortest form that reads as the same number.
pub fn push_float(line: &mut String, number: f64) {
    write!(line, "{number:?}").expect("a String takes it");
}

pub fn push_integer(line: &mut String, number: i64) {
    write!(line, "{number}i").expect("a String takes it");
}

pub fn push_bool(line: &mut String, is_true: bool) {
    line.push_str(if is_true { "true" } else { "false" });
}
