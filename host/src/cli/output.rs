//! What goes to stdout: text, tables, JSON lines; colours only on a terminal.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};

use jiff::Timestamp;
use serde::Serialize;

/// Stdout, or a buffer in tests.
pub struct Out {
    to: Box<dyn Write>,
    pub coloured: bool,
}

impl Out {
    pub fn stdout() -> Self {
        let coloured = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self { to: Box::new(io::stdout().lock()), coloured }
    }

    pub fn line(&mut self, line: impl AsRef<str>) -> anyhow::Result<()> {
        Ok(writeln!(self.to, "{}", line.as_ref())?)
    }

    /// One line.
    pub fn json(&mut self, value: &impl Serialize) -> anyhow::Result<()> {
        serde_json::to_writer(&mut self.to, value)?;
        Ok(writeln!(self.to)?)
    }

    pub fn json_pretty(&mut self, value: &impl Serialize) -> anyhow::Result<()> {
        serde_json::to_writer_pretty(&mut self.to, value)?;
        Ok(writeln!(self.to)?)
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
            let line = if number == 0 { self.bold(line) } else { line.to_owned() };
            self.line(line)?;
        }
        Ok(())
    }

    pub fn bold(&self, text: &str) -> String {
        if self.coloured { format!("\x1b[1m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// To stderr. Where that takes nothing the exit code says it alone.
pub fn complain(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// `headworks ... | head` ended early: no failure.
pub fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let kind = cause
            .downcast_ref::<io::Error>()
            .map(io::Error::kind)
            .or_else(|| cause.downcast_ref::<serde_json::Error>().and_then(serde_json::Error::io_error_kind));
        kind == Some(io::ErrorKind::BrokenPipe)
    })
}

/// `2026-11-23T06:28:00.125Z`, from microseconds since 1970.
pub fn time(us: impl TryInto<i64> + Copy + Display) -> String {
    match us.try_into().map(Timestamp::from_microsecond) {
        Ok(Ok(time)) => format!("{time:.3}"),
        _ => us.to_string(),
    }
}

/// One line of at most `chars_max`; control characters cannot reach the terminal.
pub fn one_line(text: &str, chars_max: usize) -> String {
    let mut line: String =
        text.chars().take(chars_max).map(|c| if c.is_control() { ' ' } else { c }).collect();
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
    fn times_are_utc_to_the_millisecond() {
        assert_eq!(time(1_700_000_000_123_456_u64), "2023-11-14T22:13:20.123Z");
        assert_eq!(time(-1_500_000_i64), "1969-12-31T23:59:58.500Z");
    }

    #[test]
    fn a_rows_last_cell_moves_no_column() {
        let rows = [vec!["a", "b", "c"], vec!["long last cell of its row"], vec!["1", "2", "3"]];
        let rows = rows.map(|row| row.into_iter().map(str::to_owned).collect::<Vec<_>>());
        let file = tempfile::NamedTempFile::new().unwrap();
        Out { to: Box::new(file.reopen().unwrap()), coloured: false }.table(&rows).unwrap();
        assert_eq!(
            std::fs::read_to_string(file.path()).unwrap(),
            "a  b  c\nlong last cell of its row\n1  2  3\n"
        );
    }

    #[test]
    fn what_devices_send_cannot_drive_the_terminal() {
        assert_eq!(one_line("a\x1b[2Jb\nc", 20), "a [2Jb c");
        assert_eq!(one_line("abcdef", 4), "abc…");
    }
}
