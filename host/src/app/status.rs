//! What the running host says of itself: `/healthz`, `/readyz`, `/api/status`.
//! What a person should act on is in `problems`.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::problems::label_value;
use super::{Host, held_folder};
use crate::admin::Component;
use crate::listeners::transport::reach;
use crate::pipeline::{PipelineStatus, RedriveStatus, SinkStatus, State};
use crate::plugin::{PluginState, PluginStatus};
use crate::stream::Stream;

impl Host {
    /// Why the process should be restarted.
    pub fn unhealthy(&self) -> Option<String> {
        let stopped = self.streams.iter().find(|stream| is_stopped(stream.as_ref()))?;
        Some(format!("stream \"{}\" has stopped", stopped.name()))
    }

    /// Whether devices are acknowledged: a sink, a plugin or a pipeline that does
    /// not work costs no device its acknowledgement.
    pub fn ready(&self) -> Vec<Component> {
        let intake = self.streams.iter().filter(|stream| self.takes_messages(stream.name()));
        intake.map(|stream| self.stream_component(stream.as_ref())).chain(self.reach_and_folders()).collect()
    }

    /// Whether clients reach the listeners, and whether what they are acknowledged for goes to folders that
    /// the next start finds.
    fn reach_and_folders(&self) -> [Component; 2] {
        let standing = self.failures.standing();
        let fault = |kind| standing.iter().find(|fault| fault.kind == kind);
        let ends = self.stop_listening.is_cancelled().then(|| "the host ends".to_owned());
        let unreached = fault(reach::KIND).map(|fault| format!("{}: {}", fault.part, fault.cause));
        let away = fault(held_folder::KIND).map(|fault| format!("{}: {}", fault.part, fault.cause));
        [("listeners", ends.or(unreached)), ("data folder", away)]
            .map(|(name, fault)| component(name.to_owned(), fault.is_none(), &fault.unwrap_or_default()))
    }

    /// Every part and whether it works.
    fn components(&self) -> Vec<Component> {
        let streams = self.streams.iter().map(|stream| self.stream_component(stream.as_ref()));
        let pipelines = self.pipelines.iter().flat_map(|pipeline| {
            let status = pipeline.status();
            let of = |sink: &SinkStatus| {
                let name = format!("sink {}/{}", status.name, sink.name);
                component(name, status.works(sink), &sink_text(&status, sink))
            };
            let sinks: Vec<_> = status.sinks.iter().map(of).collect();
            let whole = component(
                format!("pipeline {}", status.name),
                status.state == State::Running,
                &state_text(&status.state),
            );
            std::iter::once(whole).chain(sinks)
        });
        let plugins = self.plugins.status().into_iter().map(|plugin| {
            let name = format!("plugin {}", if plugin.name.is_empty() { &plugin.file } else { &plugin.name });
            match &plugin.state {
                // While one is being loaded the version before runs, or its pipelines say that they start.
                PluginState::Active | PluginState::Loading => component(name, true, ""),
                PluginState::Failed(reason) if plugin.runs => {
                    component(name, false, &format!("the last good version runs: {reason}"))
                }
                PluginState::Failed(reason) => component(name, false, &format!("does not run: {reason}")),
                PluginState::Removed(reason) => component(name, false, &format!("removed: {reason}")),
            }
        });
        streams.chain(self.reach_and_folders()).chain(pipelines).chain(plugins).collect()
    }

    fn stream_component(&self, stream: &dyn Stream) -> Component {
        let name = format!("stream {}", stream.name());
        let waits = |cause: &str| format!("{cause}: {}", self.waits_for(stream.name()));
        if is_stopped(stream) {
            component(name, false, "stopped")
        } else if stream.stall().is_some() {
            component(name, false, &waits("the disk does not answer"))
        } else if let Some(lack) = stream.lack() {
            component(name, false, &waits(&lack.to_string()))
        } else {
            component(name, true, "")
        }
    }

    pub fn status(&self) -> Value {
        let streams: Vec<_> = self.streams.iter().map(|stream| stream_status(stream.as_ref())).collect();
        let metrics = self.prometheus.render();
        let pipelines = self.pipelines.iter().map(|pipeline| {
            let status = pipeline.status();
            let rows = |metric, sink: &SinkStatus| rows(&metrics, metric, &status.name, &sink.name);
            let lag = |sink: &SinkStatus| self.oldest_age(&status, sink);
            let mut shown = pipeline_status(&status, lag, rows);
            shown["redrive"] = pipeline.last_redrive().map_or(Value::Null, redrive_status);
            shown
        });
        let pipelines: Vec<_> = pipelines.collect();
        let plugins: Vec<PluginStatus> = self.plugins.status();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "components": self.components(),
            "streams": streams,
            "pipelines": pipelines,
            "plugins": plugins,
        })
    }
}

fn component(name: String, ready: bool, detail: &str) -> Component {
    Component { name, ready, detail: if ready { String::new() } else { detail.to_owned() } }
}

pub(super) fn is_stopped(stream: &dyn Stream) -> bool {
    stream.durable().has_changed().is_err()
}

/// The state of a sink: one that could write, and that nothing reaches, waits for its pipeline.
fn sink_text(status: &PipelineStatus, sink: &SinkStatus) -> String {
    match sink.state == State::Running && !status.works(sink) {
        true => format!("waits for its pipeline: {}", state_text(&status.state)),
        false => state_text(&sink.state),
    }
}

fn state_text(state: &State) -> String {
    match state {
        State::Starting => "starting".to_owned(),
        State::Running => "running".to_owned(),
        State::Holding(reason) => format!("holding: {reason}"),
        State::Retrying(reason) => format!("retrying: {reason}"),
        State::Stopped(reason) => format!("stopped: {reason}"),
    }
}

fn stream_status(stream: &dyn Stream) -> Value {
    let identity = stream.identity();
    let bounds = stream.bounds();
    json!({
        "name": stream.name(),
        "log": identity.log.to_string(),
        "generation": identity.generation,
        "partitions": identity.partitions,
        "first": bounds.start.0,
        "end": bounds.end.0,
    })
}

/// Seconds since 1970, UTC, by the time that passed: a clock that was set meanwhile changes no age.
fn seconds(at: Instant) -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.saturating_sub(at.elapsed()).as_secs_f64()
}

/// Rows of a sink by outcome since the host started, as `/metrics` has them.
fn rows(metrics: &str, metric: &str, pipeline: &str, sink: &str) -> Value {
    let count = |outcome: &str| -> u64 {
        let mut lines = metrics.lines().filter_map(|line| line.strip_prefix(metric));
        let found = lines.find_map(|line| {
            let (labels, value) = line.rsplit_once(' ')?;
            let is = |label, wanted| label_value(labels, label).as_deref() == Some(wanted);
            (is("pipeline", pipeline) && is("sink", sink) && is("outcome", outcome)).then_some(value)
        });
        found.and_then(|value| value.parse::<f64>().ok()).unwrap_or_default() as u64
    };
    json!({ "written": count("written"), "ignored": count("ignored"), "rejected": count("refused") })
}

fn pipeline_status(
    status: &PipelineStatus,
    lag: impl Fn(&SinkStatus) -> Option<Duration>,
    rows: impl Fn(&'static str, &SinkStatus) -> Value,
) -> Value {
    let sink = |sink: &SinkStatus| {
        json!({
            "name": sink.name,
            "stream": sink.stream,
            "end": sink.end.0,
            "state": sink_text(status, sink),
            "committed": sink.committed.map(|offset| offset.0),
            "lag_messages": sink.lag_messages,
            "gone_messages": sink.gone_messages,
            "rows": rows("headworks_sink_rows_total", sink),
            "redriven": rows("headworks_redrive_rows_total", sink),
            "lag_seconds": lag(sink).map(|lag| lag.as_secs_f64()),
            "since": seconds(sink.since),
            "last_commit": sink.last_commit.map(seconds),
            "own_lane": sink.own_lane,
        })
    };
    json!({
        "name": status.name,
        "stream": status.stream,
        "state": state_text(&status.state),
        "steps_generation": status.chain,
        "swap_refused": status.swap_refused,
        "swap_waits": status.swap_waits,
        "read": status.read.0,
        "end": status.end.0,
        "sinks": status.sinks.iter().map(sink).collect::<Vec<_>>(),
    })
}

/// The redrive of a pipeline's dead letters that runs, or the last one.
fn redrive_status(redrive: RedriveStatus) -> Value {
    json!({
        "running": redrive.ended.is_none(),
        "since": seconds(redrive.since),
        "ended": redrive.ended.map(seconds),
        "letters_sent": redrive.letters.sent,
        "letters_refused": redrive.letters.refused,
        "letters_pending": redrive.letters.pending,
        "letters_sent_before": redrive.letters.sent_before,
        "letters_possible_duplicates": redrive.letters.possible_duplicates,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::Ended;

    #[test]
    fn a_redrive_tells_whether_it_runs_and_what_became_of_its_letters() {
        let letters = Ended { sent: 3, refused: 2, pending: 1, sent_before: 4, possible_duplicates: 5 };
        let now = Instant::now();
        for (ended, running) in [(None, true), (Some(now), false)] {
            let mut shown = redrive_status(RedriveStatus { since: now, ended, letters });
            let times = ["since", "ended"].map(|time| shown[time].take().is_number());
            assert_eq!(times, [true, !running]);
            let expected = json!({
                "running": running, "since": null, "ended": null, "letters_sent": 3, "letters_refused": 2,
                "letters_pending": 1, "letters_sent_before": 4, "letters_possible_duplicates": 5,
            });
            assert_eq!(shown, expected);
        }
    }
}
