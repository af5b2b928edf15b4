//! `headworks validate`: all problems, or what would run; with `--connect` also whether each sink
//! would write.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use futures_util::future::join_all;
use serde_json::{Value, json};

use super::args::{Format, ValidateArgs};
use super::output::Out;
use super::{FAILED, block_on};
use crate::app::banner::{Started, summary};
use crate::config::{self, Config};
use crate::sinks::Checked;
use crate::topic::Namespace;

pub fn validate(args: &ValidateArgs, out: &mut Out) -> anyhow::Result<ExitCode> {
    let loaded = match config::load_with_files(args.config.config.as_deref()) {
        Err(config::Error::Invalid(problems)) if args.format.format == Format::Json => {
            out.json(&json!({ "valid": false, "problems": problems }))?;
            return Err(config::Error::Invalid(problems).into());
        }
        loaded => loaded?,
    };
    let sinks = args.connect.then(|| block_on(check_sinks(&loaded.config))).transpose()?;
    if args.format.format == Format::Json {
        let mut said = json!({ "valid": true, "warnings": loaded.warnings, "config": loaded.config });
        if let Some(sinks) = &sinks {
            said["sinks"] =
                sinks.iter().map(|(name, checked)| ((*name).to_owned(), to_json(checked))).collect();
        }
        out.json(&said)?;
    } else {
        out.line(format!("{}: valid", loaded.source))?;
        out.line("")?;
        out.line(summary(&Started::of(&loaded.config, &loaded.source)).trim_end())?;
        for warning in &loaded.warnings {
            out.line(format!("\nwarning: {warning}"))?;
        }
        if let Some(sinks) = &sinks {
            out.line("")?;
            print(&loaded.config, sinks, out)?;
        }
    }
    let all_work = sinks.iter().flatten().all(|(_, checked)| checked.problems.is_empty());
    Ok(if all_work { ExitCode::SUCCESS } else { ExitCode::from(FAILED) })
}

/// All at the same time; in the order of their names.
async fn check_sinks(config: &Config) -> anyhow::Result<Vec<(&str, Checked)>> {
    let namespace = Arc::new(Namespace::parse(&config.topics).context("topics")?);
    let checks = config.sinks.iter().map(|(name, sink)| {
        let namespace = namespace.clone();
        async move { (name.as_str(), sink.check(name, namespace).await) }
    });
    Ok(join_all(checks).await)
}

fn to_json(checked: &Checked) -> Value {
    let Checked { found, problems, warnings } = checked;
    json!({ "works": problems.is_empty(), "found": found, "problems": problems, "warnings": warnings })
}

/// One line for a sink that would write, and one for each problem of another.
fn print(config: &Config, sinks: &[(&str, Checked)], out: &mut Out) -> anyhow::Result<()> {
    for (name, Checked { found, problems, warnings }) in sinks {
        let target = config.sinks.get(*name).map(|sink| sink.describe()).unwrap_or_default();
        let name = format!("sinks.{name}");
        for problem in problems {
            out.line(format!("{name}: does not work: {problem}"))?;
        }
        if problems.is_empty() {
            out.line(format!("{name}: works: {target}, {}", found.join(", ")))?;
        }
        for warning in warnings {
            out.line(format!("{name}: warning: {warning}"))?;
        }
    }
    Ok(())
}
