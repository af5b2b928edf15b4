//! What a person is told to do about a pipeline or a sink that does not work, and what that costs
//! meanwhile. With `on_lag: block` the stream keeps what a sink lacks; with `on_lag: detach`
//! retention removes it.

use crate::config::DEAD_LETTERS;
use crate::hints::{Hint, Hints};
use crate::pipeline::{PipelineStatus, ToDo};

/// Returns what to do about a pipeline with a problem of this kind; `detaches`: so do some of its sinks.
pub fn of_pipeline(kind: &str, status: &PipelineStatus, detaches: bool, hints: &Hints) -> String {
    let advice = match kind {
        "holding" if status.wants_room => {
            "mend what the cause names; what waits goes on by itself".to_owned()
        }
        "holding" => {
            format!("`{}` shows the steps; mend the one that is named", hints.command(Hint::PluginList))
        }
        "retrying" => "mend the step that the cause names; it is started again by itself".to_owned(),
        _ => "mend the cause, then start the host again".to_owned(),
    };
    let lost = "; meanwhile retention may remove what sinks with on_lag: detach do not have yet";
    advice + if detaches { lost } else { "" }
}

/// Returns what to do about a sink with a problem of this kind.
pub fn of_sink(kind: &str, to_do: ToDo, detaches: bool) -> String {
    let advice = match (kind, to_do) {
        ("retrying", ToDo::Choose) => "choose one of the ways that the cause names",
        ("retrying", ToDo::Answer) => {
            "look at the database for locks, for triggers of the table and for a slow disk; the sink goes on by itself"
        }
        ("retrying", ToDo::Mend) => "mend what the cause names; the sink goes on by itself",
        _ => "mend what the cause names, then start the host again",
    };
    let meanwhile = match detaches {
        true => "; meanwhile retention may remove what the sink does not have yet (on_lag: detach)",
        false => {
            ", and its messages stay in the stream until it has them; once the stream is full, devices wait"
        }
    };
    advice.to_owned() + meanwhile
}

/// Says why a sink is late that works.
pub fn late_cause(status: &PipelineStatus) -> String {
    match &status.retries {
        Some(retries) => format!("the sink works, and the pipeline brings it messages slowly: {retries}"),
        None => "the sink works, and more comes than it writes, or its database is slow".to_owned(),
    }
}

/// Returns what to do about a sink that is late.
pub fn late(status: &PipelineStatus) -> &'static str {
    match status.retries {
        Some(_) => "mend the step, or what it asks for; `retries` of the pipeline bounds how long it may ask",
        None => {
            "look at the database: locks, indexes, its disk; or raise `partitions` of the stream and `workers` of \
             the pipeline"
        }
    }
}

/// Says what waits while a stream takes no appends; `is_intake`: devices' messages come into it.
pub fn waits_for(name: &str, is_intake: bool) -> &'static str {
    match name {
        _ if is_intake => "devices wait for their acknowledgements, QoS 0 messages are dropped",
        DEAD_LETTERS => "pipelines wait with what they reject",
        _ => "sessions, retained messages and wills wait",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::Offset;
    use crate::pipeline::State;

    fn status() -> PipelineStatus {
        PipelineStatus {
            name: "p".to_owned(),
            stream: "s".to_owned(),
            state: State::Running,
            since: std::time::Instant::now(),
            wants_room: false,
            chain: None,
            swap_refused: None,
            swap_waits: None,
            retries: None,
            read: Offset(0),
            end: Offset(0),
            sinks: Vec::new(),
        }
    }

    #[test]
    fn only_of_a_stream_that_devices_write_to_it_is_said_that_they_wait() {
        let says_devices = |name, is_intake| waits_for(name, is_intake).contains("devices");
        assert!(says_devices("telemetry", true) && says_devices(DEAD_LETTERS, true));
        assert!(!says_devices(DEAD_LETTERS, false) && !says_devices("broker", false));
    }

    #[test]
    fn a_late_sink_is_blamed_on_the_step_that_asks_for_retries_where_one_does() {
        let runs = status();
        assert!(late_cause(&runs).contains("database") && late(&runs).contains("database"));
        let asks = PipelineStatus { retries: Some("step enrich asks for retries: 503".to_owned()), ..runs };
        assert!(late_cause(&asks).contains("step enrich") && !late(&asks).contains("database"));
    }

    #[test]
    fn a_sink_that_may_lose_messages_is_never_told_to_keep_them() {
        let status = status();
        for kind in ["holding", "retrying", "stopped"] {
            let of_pipeline = |detaches| of_pipeline(kind, &status, detaches, &Hints::default());
            for told in [of_sink(kind, ToDo::Mend, true), of_pipeline(true)] {
                assert!(told.contains("retention may remove") && told.contains("on_lag: detach"), "{told}");
                assert!(!told.contains("stay in the stream"), "{told}");
            }
            assert!(
                !of_sink(kind, ToDo::Mend, false).contains("remove")
                    && !of_pipeline(false).contains("remove")
            );
        }
        assert!(of_sink("retrying", ToDo::Mend, false).contains("goes on by itself"));
        assert!(of_sink("retrying", ToDo::Answer, false).contains("locks"));
        assert!(of_sink("retrying", ToDo::Choose, false).starts_with("choose one of the ways"));
        assert!(of_sink("stopped", ToDo::Choose, true).contains("start the host again"));
    }
}
