//! `headworks run`.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::args::ConfigArgs;
use crate::telemetry::{self, LogFormat};
use crate::{app, config, threads};

pub fn run(args: &ConfigArgs, log: Option<&str>, format: LogFormat) -> anyhow::Result<()> {
    telemetry::init_logs(log, format)?;
    let loaded = config::load(args.config.as_deref())?;
    telemetry::end_on_panic();
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    raise_open_files();
    threads::configure(&loaded.config.runtime);
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime
        .enable_all()
        .on_thread_start(threads::take_short_slices)
        // Only those that serve connections park.
        .on_thread_unpark(threads::begin_turn)
        .build()?;
    let ended = runtime.block_on(app::run(loaded.config, loaded.source));
    // What is durable is closed by now: no plugin that starts, no read that hangs holds up the end.
    runtime.shutdown_background();
    ended
}

/// Raises the limit on open files to the hard limit. Each connection is an open file, and shells and
/// service managers often start a process with a limit of 1,024.
fn raise_open_files() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(%error, "the limit on open files, and so on connections, cannot be raised");
    }
}
