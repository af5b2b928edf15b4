//! `headworks validate`: all problems, or what would run.

use serde_json::json;

use super::args::{Format, ValidateArgs};
use super::output::Out;
use crate::app::banner::{Started, summary};
use crate::config;

pub fn validate(args: &ValidateArgs, out: &mut Out) -> anyhow::Result<()> {
    let loaded = match config::load_with_files(args.config.config.as_deref()) {
        Err(config::Error::Invalid(problems)) if args.format.format == Format::Json => {
            out.json(&json!({ "valid": false, "problems": problems }))?;
            return Err(config::Error::Invalid(problems).into());
        }
        loaded => loaded?,
    };
    if args.format.format == Format::Json {
        return out.json(&json!({ "valid": true, "warnings": loaded.warnings, "config": loaded.config }));
    }
    out.line(format!("{}: valid", loaded.source))?;
    out.line("")?;
    out.line(summary(&Started::of(&loaded.config, &loaded.source)).trim_end())?;
    for warning in &loaded.warnings {
        out.line(format!("\nwarning: {warning}"))?;
    }
    Ok(())
}
