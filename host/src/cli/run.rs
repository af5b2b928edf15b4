//! `headworks run`.

use super::args::ConfigArgs;
use crate::telemetry::{self, LogFormat};
use crate::{app, config};

pub fn run(args: &ConfigArgs, log: Option<&str>, format: LogFormat) -> anyhow::Result<()> {
    telemetry::init_logs(log, format)?;
    let loaded = config::load(args.config.as_deref())?;
    telemetry::end_on_panic();
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(app::run(loaded.config, loaded.source))
}
