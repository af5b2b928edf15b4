//! What a person is told to do about a pipeline or a sink that does not work, and what that costs
//! meanwhile. With `on_lag: block` the stream keeps what a sink lacks; with `on_lag: detach`
//! retention removes it.

use crate::hints::{Hint, Hints};
use crate::pipeline::{NO_ANSWER, PipelineStatus};

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
pub fn of_sink(kind: &str, cause: &str, detaches: bool) -> String {
    let advice = match kind {
        // Some of the ways that the cause names are settings.
        "retrying" if cause.contains("restart") => "choose one of the ways that the cause names",
        "retrying" if cause.starts_with(NO_ANSWER) => {
            "look at the database for locks, for triggers of the table and for a slow disk; the sink goes on by itself"
        }
        "retrying" => "mend what the cause names; the sink goes on by itself",
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::Offset;
    use crate::pipeline::State;

    #[test]
    fn a_sink_that_may_lose_messages_is_never_told_to_keep_them() {
        let status = PipelineStatus {
            name: "p".to_owned(),
            stream: "s".to_owned(),
            state: State::Running,
            since: std::time::Instant::now(),
            wants_room: false,
            chain: None,
            swap_refused: None,
            swap_waits: None,
            read: Offset(0),
            end: Offset(0),
            sinks: Vec::new(),
        };
        for kind in ["holding", "retrying", "stopped"] {
            let of_pipeline = |detaches| of_pipeline(kind, &status, detaches, &Hints::default());
            for told in [of_sink(kind, "", true), of_pipeline(true)] {
                assert!(told.contains("retention may remove") && told.contains("on_lag: detach"), "{told}");
                assert!(!told.contains("stay in the stream"), "{told}");
            }
            assert!(!of_sink(kind, "", false).contains("remove") && !of_pipeline(false).contains("remove"));
        }
        assert!(of_sink("retrying", "", false).contains("goes on by itself"));
        let slow = format!("{NO_ANSWER} 15 s from db:5432/iot table t");
        assert!(of_sink("retrying", &slow, false).contains("locks"));
        let to_choose = "put the rows back, or set `begin: start`, and restart";
        assert!(of_sink("retrying", to_choose, false).starts_with("choose one of the ways"));
        assert!(of_sink("stopped", "", true).contains("start the host again"));
    }
}
