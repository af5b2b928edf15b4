//! Output to stdout: text, tables and JSON lines, with colours only on a terminal.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::path::Path;

use jiff::Timestamp;
use serde::Serialize;

use crate::telemetry::{self, escaped, is_printable, json_escaped};

/// Width if the output is not a terminal, or the terminal does not report its width.
const COLUMNS: usize = 80;
/// Least width. A narrower terminal breaks lines itself.
const COLUMNS_MIN: usize = 40;
/// Indent of the lines after the first one of a record.
const INDENT: usize = 4;

/// Stdout, or a buffer in tests.
pub struct Out {
    to: Box<dyn Write>,
    coloured: bool,
    columns: usize,
}

impl Out {
    pub fn stdout() -> Self {
        let coloured = io::stdout().is_terminal() && !telemetry::no_color();
        let size = rustix::termios::tcgetwinsize(io::stdout()).ok();
        let columns = size.map(|size| usize::from(size.ws_col)).filter(|columns| *columns >= COLUMNS_MIN);
        Self { to: Box::new(io::stdout().lock()), coloured, columns: columns.unwrap_or(COLUMNS) }
    }

    /// Prints a line. Control characters other than line ends and tabs are escaped.
    pub fn line(&mut self, text: impl AsRef<str>) -> anyhow::Result<()> {
        Ok(writeln!(self.to, "{}", escaped(text.as_ref()))?)
    }

    /// Prints a line in bold.
    pub fn head(&mut self, text: &str) -> anyhow::Result<()> {
        let (on, off) = self.bold();
        Ok(writeln!(self.to, "{on}{}{off}", escaped(text))?)
    }

    /// Prints `name` in bold, padded to `width`, and its value.
    pub fn field(&mut self, name: &str, width: usize, value: &str) -> anyhow::Result<()> {
        let (on, off) = self.bold();
        let (name, value) = (escaped(&format!("{name:width$}")), escaped(value));
        Ok(writeln!(self.to, "{on}{name}{off}  {value}")?)
    }

    /// Prints parts, separated by two spaces, as many on a line as fit. The first line is indented by
    /// `first` spaces, the others by [`INDENT`].
    pub fn flow(&mut self, first: usize, parts: &[String]) -> anyhow::Result<()> {
        let parts = parts.iter().filter(|part| !part.is_empty()).map(String::as_str);
        let lines = fill(parts, "  ", [first, INDENT], self.columns);
        lines.iter().try_for_each(|line| self.line(line))
    }

    /// Prints a text as a paragraph that is indented by `indent` spaces.
    pub fn paragraph(&mut self, indent: usize, text: &str) -> anyhow::Result<()> {
        let lines = fill(text.split_whitespace(), " ", [indent, indent], self.columns);
        lines.iter().try_for_each(|line| self.line(line))
    }

    /// Prints a value as one line of JSON.
    pub fn json(&mut self, value: &impl Serialize) -> anyhow::Result<()> {
        Ok(writeln!(self.to, "{}", json_escaped(&serde_json::to_string(value)?))?)
    }

    pub fn json_pretty(&mut self, value: &impl Serialize) -> anyhow::Result<()> {
        Ok(writeln!(self.to, "{}", json_escaped(&serde_json::to_string_pretty(value)?))?)
    }

    /// Prints a table with aligned columns, of which the last is not padded. The first row is the
    /// header.
    pub fn table(&mut self, rows: &[Vec<String>]) -> anyhow::Result<()> {
        let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = rows.iter().filter(|row| column + 1 < row.len()).map(|row| &row[column]);
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for (number, row) in rows.iter().enumerate() {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                line += cell;
                if column + 1 < row.len() {
                    line.extend(std::iter::repeat_n(' ', widths[column] + 2 - cell.chars().count()));
                }
            }
            let line = line.trim_end();
            if number == 0 { self.head(line)? } else { self.line(line)? }
        }
        Ok(())
    }

    fn bold(&self) -> (&'static str, &'static str) {
        if self.coloured { ("\x1b[1m", "\x1b[0m") } else { ("", "") }
    }
}

/// Joins pieces with `gap` into lines of at most `columns`, unless a single piece is longer. `indents`
/// are those of the first line and of the others.
fn fill<'p>(
    pieces: impl Iterator<Item = &'p str>,
    gap: &str,
    indents: [usize; 2],
    columns: usize,
) -> Vec<String> {
    let mut lines = vec![" ".repeat(indents[0])];
    let mut wide = indents[0];
    let mut is_first = true;
    for piece in pieces {
        let more = piece.chars().count();
        let line = lines.last_mut().expect("never empty");
        if is_first {
            line.push_str(piece);
            wide += more;
        } else if wide + gap.len() + more <= columns {
            line.push_str(gap);
            line.push_str(piece);
            wide += gap.len() + more;
        } else {
            lines.push(" ".repeat(indents[1]) + piece);
            wide = indents[1] + more;
        }
        is_first = false;
    }
    lines
}

/// Returns the absolute form of a path for a message, because a reader may not know the working
/// directory.
pub fn shown(path: &Path) -> String {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).display().to_string()
}

/// Writes a line to stderr, after all pending log lines.
pub fn complain(text: &str) {
    telemetry::say(&format!("{}\n", escaped(text)));
}

/// Returns whether the reader of the output has closed it, as `head` does. This is not a failure.
pub fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let kind = cause
            .downcast_ref::<io::Error>()
            .map(io::Error::kind)
            .or_else(|| cause.downcast_ref::<serde_json::Error>().and_then(serde_json::Error::io_error_kind));
        kind == Some(io::ErrorKind::BrokenPipe)
    })
}

/// Ignores an error because the reader of stdout has closed it, so that the command can still return its
/// exit code.
pub fn unless_closed(printed: anyhow::Result<()>) -> anyhow::Result<()> {
    printed.or_else(|error| if is_closed_pipe(&error) { Ok(()) } else { Err(error) })
}

/// Formats microseconds since 1970 as `2026-11-23T06:28:00.125Z`.
pub fn time(us: impl TryInto<i64> + Copy + Display) -> String {
    match us.try_into().map(Timestamp::from_microsecond) {
        Ok(Ok(time)) => format!("{time:.3}"),
        _ => us.to_string(),
    }
}

/// Returns text as one line of at most `chars_max` characters, without unprintable characters.
pub fn one_line(text: &str, chars_max: usize) -> String {
    let mut line: String =
        text.chars().take(chars_max).map(|c| if is_printable(c) { c } else { ' ' }).collect();
    if text.chars().nth(chars_max).is_some() {
        line.pop();
        line.push('…');
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_has_gone_changes_nothing_of_how_a_command_ends() {
        let failed = |kind: io::ErrorKind| Err(io::Error::from(kind).into());
        assert!(unless_closed(failed(io::ErrorKind::BrokenPipe)).is_ok());
        assert!(unless_closed(failed(io::ErrorKind::StorageFull)).is_err());
    }

    #[test]
    fn times_are_utc_to_the_millisecond() {
        assert_eq!(time(1_700_000_000_123_456_u64), "2023-11-14T22:13:20.123Z");
        assert_eq!(time(-1_500_000_i64), "1969-12-31T23:59:58.500Z");
    }

    #[test]
    fn a_rows_last_cell_moves_no_column() {
        let rows = [vec!["a", "b", "c"], vec!["long last cell of its row"], vec!["1", "2", "3"]];
        let rows = rows.map(|row| row.into_iter().map(str::to_owned).collect::<Vec<_>>());
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut out = Out { to: Box::new(file.reopen().unwrap()), coloured: false, columns: COLUMNS };
        out.table(&rows).unwrap();
        assert_eq!(
            std::fs::read_to_string(file.path()).unwrap(),
            "a  b  c\nlong last cell of its row\n1  2  3\n"
        );
    }

    #[test]
    fn no_way_to_print_a_text_lets_a_terminals_command_through() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut out = Out { to: Box::new(file.reopen().unwrap()), coloured: false, columns: COLUMNS };
        let text = "a\x1b[2Jb\u{9b}c\x07";
        let row = vec![text.to_owned(), text.to_owned()];
        out.line(text).unwrap();
        out.head(text).unwrap();
        out.field(text, 3, text).unwrap();
        out.paragraph(2, text).unwrap();
        out.flow(0, &row).unwrap();
        out.table(&[row.clone(), row]).unwrap();
        let printed = std::fs::read_to_string(file.path()).unwrap();
        assert!(printed.lines().count() >= 7, "{printed:?}");
        assert!(printed.chars().all(|c| !c.is_control() || c == '\n'), "{printed:?}");
    }

    #[test]
    fn what_devices_send_cannot_drive_the_terminal() {
        assert_eq!(one_line("a\x1b[2Jb\nc\u{202e}d\u{2029}e", 20), "a [2Jb c d e");
        assert_eq!(one_line("abcdef", 4), "abc…");
    }

    #[test]
    fn lines_are_no_wider_than_the_terminal() {
        let lines = fill("the quick brown fox jumps".split(' '), " ", [0, 2], 11);
        assert_eq!(lines, ["the quick", "  brown fox", "  jumps"]);
        let long = fill(["a", "much too long"].into_iter(), "  ", [1, 4], 10);
        assert_eq!(long, [" a", "    much too long"]);
        assert_eq!(fill([].into_iter(), " ", [0, 0], 10), [""]);
    }
}
