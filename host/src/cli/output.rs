//! What goes to stdout: text, tables, JSON lines; colours only on a terminal.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::path::Path;

use jiff::Timestamp;
use serde::Serialize;

use crate::telemetry::{self, escaped, is_printable, json_escaped};

/// Width of what is not a terminal, and of one that does not say.
const COLUMNS: usize = 80;
/// A narrower terminal breaks lines itself.
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

    /// Text as it is, its control characters but line ends and tabs as escapes.
    pub fn line(&mut self, text: impl AsRef<str>) -> anyhow::Result<()> {
        Ok(writeln!(self.to, "{}", escaped(text.as_ref()))?)
    }

    /// A bold line.
    pub fn head(&mut self, text: &str) -> anyhow::Result<()> {
        let (on, off) = self.bold();
        Ok(writeln!(self.to, "{on}{}{off}", escaped(text))?)
    }

    /// `name` in bold, padded to `width`, and its value.
    pub fn field(&mut self, name: &str, width: usize, value: &str) -> anyhow::Result<()> {
        let (on, off) = self.bold();
        let (name, value) = (escaped(&format!("{name:width$}")), escaped(value));
        Ok(writeln!(self.to, "{on}{name}{off}  {value}")?)
    }

    /// Parts one after the other, two spaces between them, as many on a line as fit its
    /// width. The first line begins with `first` spaces, the others with [`INDENT`].
    pub fn flow(&mut self, first: usize, parts: &[String]) -> anyhow::Result<()> {
        let parts = parts.iter().filter(|part| !part.is_empty()).map(String::as_str);
        let lines = fill(parts, "  ", [first, INDENT], self.columns);
        lines.iter().try_for_each(|line| self.line(line))
    }

    /// Words of a text, each line with `indent` spaces in front.
    pub fn paragraph(&mut self, indent: usize, text: &str) -> anyhow::Result<()> {
        let lines = fill(text.split_whitespace(), " ", [indent, indent], self.columns);
        lines.iter().try_for_each(|line| self.line(line))
    }

    /// One line.
    pub fn json(&mut self, value: &impl Serialize) -> anyhow::Result<()> {
        Ok(writeln!(self.to, "{}", json_escaped(&serde_json::to_string(value)?))?)
    }

    pub fn json_pretty(&mut self, value: &impl Serialize) -> anyhow::Result<()> {
        Ok(writeln!(self.to, "{}", json_escaped(&serde_json::to_string_pretty(value)?))?)
    }

    /// Columns aligned, the last one as long as it is; the first row is the head.
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

/// Pieces joined by `gap` into lines of at most `columns`, where no piece is longer
/// itself. `indents` are those of the first line and of the others.
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

/// A path as a message names it: absolute, since a relative one is relative to the
/// working directory, which a reader may not know.
pub fn shown(path: &Path) -> String {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).display().to_string()
}

/// Writes a line to stderr, behind the log's.
pub fn complain(text: &str) {
    telemetry::say(&format!("{}\n", escaped(text)));
}

/// Whether whoever read the output has enough of it, as `head` does: no failure.
pub fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let kind = cause
            .downcast_ref::<io::Error>()
            .map(io::Error::kind)
            .or_else(|| cause.downcast_ref::<serde_json::Error>().and_then(serde_json::Error::io_error_kind));
        kind == Some(io::ErrorKind::BrokenPipe)
    })
}

/// Lets a command go on to its exit code where the reader of stdout has gone: what it found does not
/// depend on who reads it.
pub fn unless_closed(printed: anyhow::Result<()>) -> anyhow::Result<()> {
    printed.or_else(|error| if is_closed_pipe(&error) { Ok(()) } else { Err(error) })
}

/// `2026-11-23T06:28:00.125Z`, from microseconds since 1970.
pub fn time(us: impl TryInto<i64> + Copy + Display) -> String {
    match us.try_into().map(Timestamp::from_microsecond) {
        Ok(Ok(time)) => format!("{time:.3}"),
        _ => us.to_string(),
    }
}

/// One line of at most `chars_max`; what is not printable cannot reach the terminal.
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
