//! Format of the log lines, and what a panic does.

use std::ffi::OsStr;
use std::fmt::{self, Debug};
use std::io::{self, IsTerminal};

use jiff::Timestamp;
use tracing::field::Field;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::{FormatFields, Writer, debug_fn};
use tracing_subscriber::fmt::time::FormatTime;

use super::log_queue;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// One line for a person, coloured on a terminal.
    #[default]
    Compact,
    /// One JSON object a line.
    Json,
}

#[derive(Debug, thiserror::Error)]
pub enum InitError {
    #[error("log filter \"{filter}\": {error}: write a level, or target=level, such as info,headworks=debug")]
    Filter { filter: String, error: String },
    #[error("cannot start the thread that writes the log: {0}")]
    Thread(io::Error),
    #[error("logs were set up already")]
    Twice,
}

/// What comes before the filter, which may name the same target again. rustls warns of each server name that
/// is an IP address, as libmosquitto and mbedTLS send it, with nothing that tells who sent it;
/// h2 warns of frames that a client should not send, one line each.
const LIBRARIES: &str = "rustls=error,h2=error";

/// Once, at start. `filter` beats `RUST_LOG`; with neither, `info`.
pub fn init_logs(filter: Option<&str>, format: LogFormat) -> Result<(), InitError> {
    let filter = match filter {
        Some(filter) => filter.to_owned(),
        None => {
            std::env::var("RUST_LOG").ok().filter(|filter| !filter.is_empty()).unwrap_or("info".to_owned())
        }
    };
    let parsed = parse_filter(&filter)?;
    let queue = log_queue::to_stderr().map_err(InitError::Thread)?;
    let logs = tracing_subscriber::fmt()
        .with_env_filter(parsed)
        .with_writer(move || queue)
        .with_timer(Milliseconds)
        // Else the subscriber writes to stderr itself, and panics where it takes nothing.
        .log_internal_errors(false);
    let set = match format {
        LogFormat::Compact => {
            let coloured = std::io::stderr().is_terminal() && !no_color();
            logs.fmt_fields(escaped_fields()).compact().with_target(false).with_ansi(coloured).try_init()
        }
        LogFormat::Json => logs.json().flatten_event(true).with_writer(move || JsonLines(queue)).try_init(),
    };
    set.map_err(|_| InitError::Twice)
}

/// Parses a list of levels and `target=level`. `EnvFilter` takes a word alone that is no level as
/// a target, and would turn off the lines of all others.
fn parse_filter(filter: &str) -> Result<EnvFilter, InitError> {
    let refused = |error: String| InitError::Filter { filter: filter.to_owned(), error };
    let mut words = filter.split(',').map(str::trim).filter(|word| !word.is_empty() && !word.contains('='));
    if let Some(word) = words.find(|word| word.parse::<LevelFilter>().is_err()) {
        return Err(refused(format!(
            "\"{word}\" is no level: those are error, warn, info, debug, trace, off"
        )));
    }
    EnvFilter::try_new(format!("{LIBRARIES},{filter}")).map_err(|error| refused(error.to_string()))
}

/// Whether the user wants no colours (no-color.org).
pub fn no_color() -> bool {
    forbids_color(std::env::var_os("NO_COLOR").as_deref())
}

fn forbids_color(no_color: Option<&OsStr>) -> bool {
    no_color.is_some_and(|value| !value.is_empty())
}

/// Whether a terminal and a reader get this character as it is. Control characters steer a terminal;
/// format characters (Unicode's categories Cf, Zl and Zp) turn the direction of a text, break its line, or
/// do not show at all.
pub fn is_printable(c: char) -> bool {
    let is_format = matches!(c,
        '\u{ad}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}' | '\u{890}'..='\u{891}'
        | '\u{8e2}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{110bd}' | '\u{110cd}'
        | '\u{13430}'..='\u{1343f}' | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}'
        | '\u{e0000}'..='\u{e007f}');
    !(c.is_control() || is_format)
}

/// A text whose characters are escapes where they are not [printable](is_printable), but for line ends and
/// tabs, so that what a device, a file or a plugin says does not reach the terminal as a command.
pub fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for part in text.split_inclusive(['\n', '\t']) {
        let end = part.strip_suffix(['\n', '\t']).map_or(part.len(), str::len);
        // Writing to a String cannot fail.
        let _ = write_escaped(&mut escaped, &part[..end]);
        escaped.push_str(&part[end..]);
    }
    escaped
}

/// The same JSON. What is not printable in its strings is an escape: serde_json leaves all but the ASCII
/// control characters as they are.
pub fn json_escaped(json: &str) -> String {
    let mut escaped = String::with_capacity(json.len());
    for c in json.chars() {
        if is_printable(c) || c == '\n' {
            escaped.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                escaped += &format!("\\u{unit:04x}");
            }
        }
    }
    escaped
}

/// As [`escaped`], and line ends and tabs too: one line stays one.
fn write_escaped(to: &mut impl fmt::Write, text: &str) -> fmt::Result {
    for c in text.chars() {
        if is_printable(c) { to.write_char(c)? } else { write!(to, "{}", c.escape_debug())? }
    }
    Ok(())
}

/// The message, then ` name=value` for each field.
fn escaped_fields() -> impl for<'w> FormatFields<'w> + Send + Sync + 'static {
    debug_fn(|writer: &mut Writer<'_>, field: &Field, value: &dyn Debug| {
        match field.name() {
            "message" => {}
            // Of the `log` crate; the event has them as its metadata.
            name if name.starts_with("log.") => return Ok(()),
            name => write!(writer, " {name}=")?,
        }
        write_escaped(writer, &format!("{value:?}"))
    })
}

/// Writes whole JSON lines without what is not printable.
struct JsonLines<W>(W);

impl<W: io::Write> io::Write for JsonLines<W> {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        self.0.write_all(json_escaped(&String::from_utf8_lossy(lines)).as_bytes())?;
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// `2026-11-23T06:28:00.125Z`
struct Milliseconds;

impl FormatTime for Milliseconds {
    fn format_time(&self, writer: &mut Writer<'_>) -> fmt::Result {
        write!(writer, "{:.3}", Timestamp::now())
    }
}

/// From here on a panic is logged and ends the process with code 101: a host
/// that goes on without one of its tasks would look alive and not be.
/// Everything acknowledged is durable, so an end at any instant is safe.
pub fn end_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        let payload = panic.payload();
        let message = payload
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
            .unwrap_or("panic");
        let at = panic.location().map(ToString::to_string).unwrap_or_default();
        let thread = std::thread::current().name().unwrap_or("?").to_owned();
        let backtrace = std::backtrace::Backtrace::capture();
        tracing::error!(at, thread, "{message}: this is a bug in headworks, the process ends");
        // Many lines of our own.
        log_queue::say(&format!("{backtrace}\n"));
        log_queue::exit(101);
    }));
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tracing_subscriber::fmt::MakeWriter;

    use super::*;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl<'w> MakeWriter<'w> for Buffer {
        type Writer = Self;

        fn make_writer(&'w self) -> Self {
            self.clone()
        }
    }

    #[test]
    fn a_log_filter_with_a_word_that_is_no_level_is_refused() {
        for filter in ["warning", "inf", "verbose", "info,headworks", "headworks=warning"] {
            let refused = parse_filter(filter).unwrap_err().to_string();
            assert!(refused.starts_with(&format!("log filter \"{filter}\": ")), "{refused}");
        }
        for filter in ["warn", "INFO", "off", "info,headworks=debug", "warn,headworks::stream=trace", "3"] {
            parse_filter(filter).unwrap();
        }
    }

    #[test]
    fn a_panic_ends_the_process_with_101_once_all_log_lines_are_out() {
        const PANICS: &str = "HEADWORKS_TEST_PANICS";
        if std::env::var_os(PANICS).is_some() {
            init_logs(Some("info"), LogFormat::Compact).unwrap();
            end_on_panic();
            (0..1_000).for_each(|number| tracing::info!(number, "before"));
            panic!("lost its way");
        }
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        let test = "telemetry::logs::tests::a_panic_ends_the_process_with_101_once_all_log_lines_are_out";
        child.args(["--exact", test, "--nocapture"]).env(PANICS, "1");
        let ended = child.output().unwrap();
        let log = String::from_utf8_lossy(&ended.stderr);
        let (before, panic) = log.split_once("ERROR lost its way: this is a bug in headworks").unwrap();
        assert_eq!(before.lines().filter(|line| line.contains(" before number=")).count(), 1_000);
        assert!(panic.contains("backtrace"), "{panic}");
        assert_eq!(ended.status.code(), Some(101));
    }

    #[test]
    fn colours_are_off_where_the_variable_has_any_value() {
        let forbids = |value: Option<&str>| forbids_color(value.map(OsStr::new));
        assert!(forbids(Some("1")) && forbids(Some("0")));
        assert!(!forbids(Some("")) && !forbids(None));
    }

    #[test]
    fn a_text_for_the_terminal_keeps_its_lines_only() {
        assert_eq!(escaped("a\x1b[2J\tb\u{9b}\n"), "a\\u{1b}[2J\tb\\u{9b}\n");
        assert_eq!(escaped("\u{202e}b\u{2028}c\u{feff}"), "\\u{202e}b\\u{2028}c\\u{feff}");
        let text = "na\u{ef}ve e\u{301} \u{5e9}\u{5dc}\u{5d5}\u{5dd} \u{2603}";
        assert_eq!(escaped(text), text, "what is written in any language stays");
    }

    #[test]
    fn json_says_the_same_without_what_is_not_printable() {
        let text = "a\u{202e}b\u{2028}\u{e0041}\u{9b}\n";
        let json = json_escaped(&serde_json::to_string_pretty(&[text]).unwrap());
        assert_eq!(json, "[\n  \"a\\u202eb\\u2028\\udb40\\udc41\\u009b\\n\"\n]");
        assert_eq!(serde_json::from_str::<[String; 1]>(&json).unwrap(), [text]);
    }

    #[test]
    fn a_logged_text_is_one_line_without_terminal_commands_and_its_time_has_milliseconds() {
        let buffer = Buffer::default();
        let logs = tracing_subscriber::fmt()
            .with_writer(buffer.clone())
            .with_timer(Milliseconds)
            .fmt_fields(escaped_fields())
            .compact()
            .with_target(false)
            .with_ansi(false)
            .finish();
        let none: Option<u64> = None;
        tracing::subscriber::with_default(logs, || {
            tracing::warn!(user = "ann\u{9b}2J", file = %"a\x1b[2J", none, "client x\nERROR all is lost à");
        });
        let text = String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap();
        let (time, rest) = text.split_once(' ').unwrap();
        assert_eq!(time.len(), "2026-11-23T06:28:00.125Z".len(), "{text}");
        let rest = rest.trim_start();
        assert!(rest.starts_with("WARN client x\\nERROR all is lost à "), "{text}");
        assert!(rest.contains("ann\\u{9b}2J") && rest.contains("file=a\\u{1b}[2J"), "{text}");
        assert_eq!(text.chars().filter(|c| c.is_control()).count(), 1, "{text:?}");
    }
}
