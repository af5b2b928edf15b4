//! THE wiring; written where all parts are merged.

use crate::config;

pub async fn run(_config: config::Config, _source: config::Source) -> anyhow::Result<()> {
    anyhow::bail!("nothing is wired yet")
}
