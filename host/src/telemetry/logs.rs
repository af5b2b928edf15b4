//! Logs on stderr, and what a panic does.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

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
    #[error("logs were set up already")]
    Twice,
}

/// Once, at start. `filter` beats `RUST_LOG`; with neither, `info`.
pub fn init_logs(filter: Option<&str>, format: LogFormat) -> Result<(), InitError> {
    let filter = match filter {
        Some(filter) => filter.to_owned(),
        None => {
            std::env::var("RUST_LOG").ok().filter(|filter| !filter.is_empty()).unwrap_or("info".to_owned())
        }
    };
    let parsed = EnvFilter::try_new(&filter)
        .map_err(|error| InitError::Filter { filter, error: error.to_string() })?;
    let logs = tracing_subscriber::fmt()
        .with_env_filter(parsed)
        .with_writer(std::io::stderr)
        // Else a line that a full disk does not take is a panic.
        .log_internal_errors(false);
    let set = match format {
        LogFormat::Compact => {
            logs.compact().with_target(false).with_ansi(std::io::stderr().is_terminal()).try_init()
        }
        LogFormat::Json => logs.json().flatten_event(true).try_init(),
    };
    set.map_err(|_| InitError::Twice)
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
        tracing::error!(at, thread, "{message}: this is a bug in headworks, the process ends\n{backtrace}");
        std::process::exit(101);
    }));
}
