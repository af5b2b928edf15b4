//! `headworks status`: the problems of the running host, since when they exist, what is at stake, and
//! what to do.

use std::process::ExitCode;
use std::time::{Duration, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::admin_client::{self, NoAnswer, NotRunning};
use super::args::{Format, StatusArgs};
use super::block_on;
use super::output::{Out, complain, unless_closed};
use crate::admin::{Component, Problem};
use crate::config;
use crate::units::Period;

/// Exit code for problems. The codes follow monitoring plugins: 0 is fine, 2 is a wrong command line or
/// config.
const PROBLEMS: u8 = 1;
const NOT_RUNNING: u8 = 3;

#[derive(Deserialize, Serialize)]
struct Status {
    problems: Vec<Problem>,
    version: String,
    components: Vec<Component>,
    pipelines: Vec<Pipeline>,
}

#[derive(Deserialize, Serialize)]
struct Pipeline {
    name: String,
    sinks: Vec<Sink>,
    redrive: Option<Redrive>,
}

/// The running redrive of a pipeline's dead letters, or the last one since the host started.
#[derive(Deserialize, Serialize)]
struct Redrive {
    running: bool,
    /// Seconds since 1970.
    since: f64,
    ended: Option<f64>,
    letters_sent: u64,
    letters_refused: u64,
    letters_pending: u64,
    /// Counts that a host of an older version does not report.
    #[serde(default)]
    letters_sent_before: u64,
    #[serde(default)]
    letters_possible_duplicates: u64,
}

#[derive(Deserialize, Serialize)]
struct Sink {
    name: String,
    lag_messages: u64,
    rows: Rows,
    /// Rows of dead letters that were sent again. A host of an older version does not report them.
    #[serde(default)]
    redriven: Rows,
}

/// Rows by outcome since the host started.
#[derive(Default, Deserialize, Serialize)]
struct Rows {
    written: u64,
    /// Rows that were already in the table, or that a trigger left out.
    ignored: u64,
    rejected: u64,
}

pub fn status(args: &StatusArgs, out: &mut Out) -> anyhow::Result<ExitCode> {
    let config = config::load(args.config.config.as_deref())?.config;
    let asked = block_on(async {
        let mut status: Value = admin_client::get(&config, "/api/status").await?;
        let mut problems: Value = admin_client::get(&config, "/api/problems").await?;
        status["problems"] = problems["problems"].take();
        Ok(serde_json::from_value::<Status>(status)?)
    });
    let status = match asked {
        Ok(status) => status,
        Err(error) if error.is::<NotRunning>() => {
            match args.format.format {
                Format::Json => {
                    unless_closed(out.json(&json!({ "running": false, "reason": error.to_string() })))?;
                }
                Format::Text => complain(&format!("headworks: {error}")),
            }
            return Ok(ExitCode::from(NOT_RUNNING));
        }
        Err(error) if error.is::<NoAnswer>() => {
            match args.format.format {
                Format::Json => {
                    let reason = error.to_string();
                    unless_closed(out.json(&json!({ "running": true, "answers": false, "reason": reason })))?;
                }
                Format::Text => complain(&format!("headworks: {error}")),
            }
            return Ok(ExitCode::from(PROBLEMS));
        }
        Err(error) => return Err(error),
    };
    let printed = match args.format.format {
        Format::Json => {
            let Status { problems, version, components, pipelines } = &status;
            out.json(&json!({
                "running": true, "version": version, "problems": problems, "components": components,
                "pipelines": pipelines,
            }))
        }
        Format::Text => print(&status, out),
    };
    unless_closed(printed)?;
    Ok(if status.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(PROBLEMS) })
}

fn print(status: &Status, out: &mut Out) -> anyhow::Result<()> {
    let count = match status.problems.len() {
        0 => "no problems".to_owned(),
        1 => "1 problem".to_owned(),
        many => format!("{many} problems"),
    };
    out.head(&format!("headworks {} runs, {count}", status.version))?;
    for Problem { part, kind, cause, since, seconds, at_stake, advice } in &status.problems {
        let kind = kind.replace('_', " ");
        let ago = Period(Duration::from_secs(*seconds));
        out.line("")?;
        out.head(&format!("{part}: {kind}"))?;
        out.paragraph(2, &format!("since {since} ({ago})"))?;
        out.paragraph(2, cause)?;
        let at_stake = at_stake.to_string();
        if !at_stake.is_empty() {
            out.paragraph(2, &format!("at stake: {at_stake}"))?;
        }
        out.paragraph(2, &format!("to do: {advice}"))?;
    }
    out.line("")?;
    let width = status.components.iter().map(|component| component.name.chars().count()).max().unwrap_or(0);
    for Component { name, ready, detail } in &status.components {
        // The whole reason stands above.
        let state = if *ready { "works" } else { detail.split(':').next().unwrap_or_default() };
        let more = rows(status, name).or_else(|| redrive(status, name));
        let more = more.map(|more| format!(", {more}")).unwrap_or_default();
        out.line(format!("{name:width$}  {state}{more}"))?;
    }
    Ok(())
}

/// Describes the rows of `sink PIPELINE/SINK`.
fn rows(status: &Status, component: &str) -> Option<String> {
    let (pipeline, sink) = component.strip_prefix("sink ")?.split_once('/')?;
    let pipeline = status.pipelines.iter().find(|known| known.name == pipeline)?;
    let sink = pipeline.sinks.iter().find(|known| known.name == sink)?;
    let mut text = counted(&sink.rows);
    let Rows { written, ignored, rejected } = sink.redriven;
    if written + ignored + rejected > 0 {
        text += &format!("; of dead letters {}", counted(&sink.redriven));
    }
    Some(text)
}

fn counted(rows: &Rows) -> String {
    let mut text = format!("{} rows written", rows.written);
    for (count, what) in [(rows.ignored, "ignored"), (rows.rejected, "rejected")] {
        if count > 0 {
            text += &format!(", {count} {what}");
        }
    }
    text
}

/// Describes the redrive of `pipeline PIPELINE`.
fn redrive(status: &Status, component: &str) -> Option<String> {
    let pipeline = component.strip_prefix("pipeline ")?;
    let redrive = status.pipelines.iter().find(|known| known.name == pipeline)?.redrive.as_ref()?;
    let ago = |seconds: f64| {
        let at = UNIX_EPOCH + Duration::from_secs_f64(seconds.max(0.0));
        Period(Duration::from_secs(at.elapsed().unwrap_or_default().as_secs()))
    };
    let mut text = match redrive.ended {
        None => format!("a redrive runs since {}", ago(redrive.since)),
        Some(ended) => format!("the last redrive ended {} ago", ago(ended)),
    };
    text += &format!(": {} dead letters sent", redrive.letters_sent);
    for (count, what) in [
        (redrive.letters_sent_before, "sent before by another copy of the data folder"),
        (redrive.letters_refused, "refused again"),
        (redrive.letters_pending, "pending"),
        (redrive.letters_possible_duplicates, "that may be rows already"),
    ] {
        if count > 0 {
            text += &format!(", {count} {what}");
        }
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// What the line of `pipeline telemetry` says beside its state.
    fn shown(redrive: serde_json::Value) -> Option<String> {
        let status = json!({
            "problems": [], "version": "0", "components": [],
            "pipelines": [{ "name": "telemetry", "sinks": [], "redrive": redrive }],
        });
        let status: Status = serde_json::from_value(status).unwrap();
        assert_eq!(super::redrive(&status, "sink telemetry/w"), None);
        super::redrive(&status, "pipeline telemetry")
    }

    #[test]
    fn a_redrive_is_shown_with_since_when_and_what_became_of_its_letters() {
        let now = UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
        let mut redrive = json!({
            "running": true, "since": now - 7_200.5, "ended": null,
            "letters_sent": 3, "letters_refused": 0, "letters_pending": 0,
        });
        assert_eq!(shown(json!(null)), None);
        let said = shown(redrive.clone()).unwrap();
        assert!(
            said.starts_with("a redrive runs since 2h") && said.ends_with(": 3 dead letters sent"),
            "{said}"
        );
        redrive["running"] = false.into();
        redrive["ended"] = (now - 60.5).into();
        for (key, count) in [
            ("letters_refused", 2),
            ("letters_pending", 1),
            ("letters_sent_before", 4),
            ("letters_possible_duplicates", 5),
        ] {
            redrive[key] = count.into();
        }
        let said = shown(redrive).unwrap();
        let letters = ": 3 dead letters sent, 4 sent before by another copy of the data folder, 2 refused again, \
                       1 pending, 5 that may be rows already";
        assert!(said.starts_with("the last redrive ended 1m") && said.ends_with(letters), "{said}");
    }
}
