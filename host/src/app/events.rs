//! Counters whose growth within the last hour is a problem, and what a person is told of it.

use jiff::Timestamp;

use super::problems::label_value;
use crate::hints::{Hint, Hints, Letters};
use crate::listeners::refused_clients::RefusedClient;

/// A counter whose growth is an event.
pub struct Event {
    metric: &'static str,
    /// See [`problem_kind`].
    pub kind: &'static str,
    /// Labels that name the part, in this order.
    part: &'static [&'static str],
    /// A label, and its values that count; `None`: all count.
    only: Option<(&'static str, &'static [&'static str])>,
}

pub const EVENTS: &[Event] = &[
    event("headworks_stream_gap_messages_total", DAMAGED, &["stream"]).only("cause", &[DAMAGED]),
    event("headworks_pipeline_gap_messages_total", TRIMMED, &["pipeline"]).only("cause", &[TRIMMED]),
    event("headworks_dead_letters_gone_total", GONE, &["pipeline"]),
    event("headworks_mqtt_dropped_total", "dropped", &["cause"]).only("cause", DROPS),
    event("headworks_mqtt_refused_connects_total", "refused", &["cause"]),
    event("headworks_mqtt_refused_publishes_total", "refused_publishes", &["cause"]),
    event("headworks_mqtt_refused_subscribes_total", "refused_subscribes", &["cause"]),
    event("headworks_http_refused_connects_total", HTTP_CONNECTS, &["cause"]),
    event("headworks_http_refused_requests_total", HTTP_REQUESTS, &["cause"]),
    event("headworks_http_rejected_messages_total", HTTP_MESSAGES, &["cause"]),
    event("headworks_mqtt_withheld_total", "withheld", &[]),
    event("headworks_step_faults_total", "faults", &["pipeline", "step"]),
    event("headworks_step_messages_total", "skipped", &["pipeline", "step"]).only("outcome", &["skipped"]),
    event("headworks_sink_rows_total", "ignored", &["pipeline", "sink"]).only("outcome", &["ignored"]),
];
/// Kinds of gaps, and the labels of their counters: where the disk lost messages, and whose messages
/// retention removed.
const DAMAGED: &str = "damaged";
const TRIMMED: &str = "trimmed";
/// Kinds of what the HTTP listener turned away.
const HTTP_CONNECTS: &str = "http_connects";
const HTTP_REQUESTS: &str = "http_requests";
const HTTP_MESSAGES: &str = "http_messages";
/// The kind of a gap in the dead letters.
const GONE: &str = "letters_gone";
/// Causes of `headworks_mqtt_dropped_total` that an operator can do something about.
const DROPS: &[&str] = &["no_space", "queue_full", "queues_full", "queue_age", "gap", "retained_full"];
/// Causes of a refused connection that the host or its config is at fault for: one is a problem.
const TURNED_AWAY: &[&str] = &[
    "access_unavailable",
    "broker_state",
    "connect_rate",
    "connections_max",
    "connections_per_user",
    "handshakes_max",
    "sessions_max",
    "wills_bytes_max",
];
/// Causes of a refused subscription of which one is a problem.
const NO_ROOM: &[&str] = &["broker_state", "subscriptions_bytes_max"];
/// Clients that left, which no one refused.
const LEFT: &[&str] = &["lost", "stopped"];
/// What a client itself causes, such as a wrong password, is a problem past so many within the hour.
const OFTEN: u64 = 100;

/// Cause and advice of a problem, and the part that it is about.
pub struct Told {
    pub part: String,
    pub cause: String,
    pub advice: String,
}

const fn event(metric: &'static str, kind: &'static str, part: &'static [&'static str]) -> Event {
    Event { metric, kind, part, only: None }
}

impl Event {
    const fn only(self, label: &'static str, values: &'static [&'static str]) -> Self {
        Self { only: Some((label, values)), ..self }
    }

    /// Returns the name of the part, the labels and the value of a line of `/metrics` that is about this
    /// counter and counts.
    pub fn read<'l>(&self, line: &'l str) -> Option<(String, &'l str, u64)> {
        let (labels, value) = line.strip_prefix(self.metric)?.rsplit_once(' ')?;
        if !(labels.is_empty() || labels.starts_with('{')) {
            return None;
        }
        let label = |name: &str| label_value(labels, name);
        if let Some((name, values)) = self.only
            && !values.contains(&label(name)?.as_str())
        {
            return None;
        }
        let part: Option<Vec<_>> = self.part.iter().map(|name| label(name)).collect();
        Some((part?.join("/"), labels, value.parse::<f64>().ok()? as u64))
    }
}

/// Whether a line of `/metrics` counts rows that were written, and of which sink. The database counts no
/// row at all where a view or a trigger writes each of them elsewhere.
pub fn written(line: &str) -> Option<String> {
    const WRITTEN: Event =
        event("headworks_sink_rows_total", "written", &["pipeline", "sink"]).only("outcome", &["written"]);
    WRITTEN.read(line).filter(|(_, _, rows)| *rows > 0).map(|(sink, ..)| sink)
}

/// Returns the kind of the problem that events of a kind are.
pub fn problem_kind(kind: &'static str) -> &'static str {
    match kind {
        DAMAGED | TRIMMED | GONE => "gap",
        HTTP_CONNECTS | HTTP_REQUESTS => "refused",
        HTTP_MESSAGES => "refused_publishes",
        kind => kind,
    }
}

/// Whether the count of an hour is a problem.
pub fn is_problem(kind: &str, name: &str, count: u64) -> bool {
    let least = match kind {
        // They come again once the host is back.
        HTTP_REQUESTS if name == "stopping" => return false,
        HTTP_REQUESTS if name == "not_durable" => 0,
        HTTP_CONNECTS | HTTP_REQUESTS => return is_problem("refused", name, count),
        HTTP_MESSAGES => OFTEN,
        "refused" if LEFT.contains(&name) => return false,
        "refused" if TURNED_AWAY.contains(&name) => 0,
        "refused_subscribes" if NO_ROOM.contains(&name) => 0,
        "refused" | "refused_publishes" | "refused_subscribes" => OFTEN,
        _ => 0,
    };
    count > least
}

/// Returns what a person is told of a `count` within the last hour; `last` is the newest client of a
/// refused connection.
pub fn told(kind: &str, name: &str, count: u64, last: Option<&RefusedClient>, hints: &Hints) -> Told {
    let counted = |one: &str, many: &str| match count {
        1 => format!("1 {one} within the last hour"),
        count => format!("{count} {many} within the last hour"),
    };
    let messages = |what: &str| counted(&format!("message was {what}"), &format!("messages were {what}"));
    match kind {
        DAMAGED => Told {
            part: format!("stream {name}"),
            cause: messages("found damaged or missing on disk") + ", and cannot be read",
            advice: "look at the disk; the log names the offsets".to_owned(),
        },
        TRIMMED => Told {
            part: format!("pipeline {name}"),
            cause: messages("removed by retention") + ", before the pipeline read them",
            advice: "fix the sink that lags, or raise retention of the stream; the log names the offsets"
                .to_owned(),
        },
        GONE => Told {
            part: if name.is_empty() { "dead letters".to_owned() } else { format!("pipeline {name}") },
            cause: counted(
                "dead letter is gone that nobody sent again",
                "dead letters are gone that nobody sent again",
            ) + ": retention removed them",
            advice: format!(
                "send dead letters again soon after the cause is mended: `{}`; or raise max_bytes and max_age of \
                 dead_letters",
                hints.command(Hint::Redrive(letters_of(name)))
            ),
        },
        "dropped" => dropped(name, &messages("dropped"), hints),
        "refused" => {
            refused(name, &counted("connection was refused", "connections were refused"), last, hints)
        }
        "refused_publishes" | "refused_subscribes" => {
            let what = if kind == "refused_publishes" {
                counted("publish was refused", "publishes were refused")
            } else {
                counted("subscription was refused", "subscriptions were refused")
            };
            let what_to_do = match name {
                "subscriptions_bytes_max" => {
                    "subscribe with fewer filters and a wildcard, or raise mqtt.subscriptions_bytes_max"
                }
                "broker_state" => "delete sessions of clients that are gone, or subscribe with fewer filters",
                _ => "mend the client, or mqtt.access.rules and the limits of mqtt",
            };
            Told {
                part: format!("clients ({name})"),
                cause: what,
                advice: format!("`{}` shows whose: {what_to_do}", hints.command(Hint::ClientsDenied)),
            }
        }
        HTTP_CONNECTS | HTTP_REQUESTS | HTTP_MESSAGES => {
            let what = match kind {
                HTTP_CONNECTS => counted("HTTP connection was refused", "HTTP connections were refused"),
                HTTP_REQUESTS => counted("HTTP request was refused", "HTTP requests were refused"),
                _ => counted("message was rejected", "messages were rejected"),
            };
            let what_to_do = match name {
                "connections_max" | "handshakes_max" => {
                    "raise http.connections_max and the limit of open files, or mend clients that keep connections"
                }
                "access_unavailable" => "mend what mqtt.access.authenticate asks; the log has its error",
                "connect_rate" | "connections_per_user" | "rate" | "topic_levels" => {
                    "raise the limit of mqtt.limits, or mend the clients that send so much"
                }
                "no_room" | "not_durable" => "look at the disk, and at what `no_space` and `stalled` say",
                _ => "mend the clients, or their rights in mqtt.access; they are told what is wrong",
            };
            Told {
                part: format!("HTTP clients ({name})"),
                cause: what,
                advice: format!("{what_to_do}; `{}` lists clients", hints.command(Hint::ClientsRefused)),
            }
        }
        "withheld" => Told {
            part: "publishers".to_owned(),
            cause: counted("QoS 2 publish had to wait", "QoS 2 publishes had to wait")
                + ": clients do not release their packet ids with PUBREL",
            advice: format!(
                "end the sessions of the clients that are broken; `{}` shows who there is",
                hints.command(Hint::ClientsList)
            ),
        },
        "faults" => Told {
            part: format!("step {name}"),
            cause: counted(
                "call of its plugin trapped or passed a limit",
                "calls of its plugin trapped or passed a limit",
            ),
            advice: format!(
                "mend the plugin, or put the version before it back; `{}` has the reasons",
                hints.command(Hint::DeadLettersSummary(Letters::All))
            ),
        },
        "skipped" => Told {
            part: format!("step {name}"),
            cause: counted("message went on without the step", "messages went on without the step")
                + ", whose plugin failed on them: on_failure is pass",
            advice: "mend the plugin, or put the version before it back; where no message may pass without \
                     the step, set its on_failure to dead-letters or hold"
                .to_owned(),
        },
        _ => Told {
            part: format!("sink {name}"),
            cause: counted(
                "row was sent that the database did not count as written",
                "rows were sent that the database did not count as written",
            ) + ": a trigger or a rule of the table left them out, or wrote them elsewhere",
            advice: "look at the triggers and rules of the table; the messages are still in the stream for \
                     as long as its retention says"
                .to_owned(),
        },
    }
}

fn letters_of(pipeline: &str) -> Letters<'_> {
    if pipeline.is_empty() { Letters::All } else { Letters::OfPipeline(pipeline) }
}

/// Messages that `headworks_mqtt_dropped_total` counts under `cause`.
fn dropped(cause: &str, messages: &str, hints: &Hints) -> Told {
    let (part, why, advice) = match cause {
        "no_space" => (
            "publishers",
            "QoS 0, and their stream had no room",
            format!(
                "`{}` says what a stream lacks now; publish with QoS 1 what must not be lost",
                hints.command(Hint::Status)
            ),
        ),
        "retained_full" => (
            "retained messages",
            "not kept for new subscribers, because there are too many",
            "raise mqtt.retained_messages_max or mqtt.retained_bytes_max, or clear topics that nobody needs"
                .to_owned(),
        ),
        "gap" => (
            "subscribers",
            "damaged on disk, or removed by retention while they waited in a queue",
            "look at the log and the disk, or raise retention of the stream or mqtt.queue_copies_bytes_max"
                .to_owned(),
        ),
        "queue_age" => (
            "subscribers",
            "they waited longer than mqtt.queue_age_max",
            format!("`{}` shows whose they were", hints.command(Hint::ClientsMissed)),
        ),
        "queues_full" => (
            "subscribers",
            "the queues of all subscribers together had no memory left for more",
            format!(
                "`{}` shows who holds the most: delete sessions of clients that are gone, or raise \
                 mqtt.queues_bytes_max",
                hints.command(Hint::ClientsQueued)
            ),
        ),
        _ => (
            "subscribers",
            "their queue was full",
            format!("`{}` shows whose they were", hints.command(Hint::ClientsMissed)),
        ),
    };
    Told { part: format!("{part} ({cause})"), cause: format!("{messages}: {why}"), advice }
}

/// Connections that `headworks_mqtt_refused_connects_total` counts under `cause`.
fn refused(cause: &str, connections: &str, last: Option<&RefusedClient>, hints: &Hints) -> Told {
    let (why, advice) = match cause {
        "access_unavailable" => (
            "what checks credentials did not say whether they are right",
            "mend the service, file or plugin of mqtt.access.authenticate; the log has its error",
        ),
        "connections_max" => (
            "as many connections as mqtt.connections_max were there",
            "raise mqtt.connections_max and the limit of open files, or disconnect clients that nobody needs",
        ),
        "handshakes_max" => (
            "as many connections as mqtt.handshakes_max were there without a CONNECT",
            "raise mqtt.handshakes_max, or keep out who connects and says nothing",
        ),
        "sessions_max" | "broker_state" => (
            "there was no room for another session",
            "lower mqtt.session_expiry_max, delete sessions of clients that are gone, or raise mqtt.sessions_max",
        ),
        "wills_bytes_max" => (
            "the wills of all clients took up mqtt.wills_bytes_max",
            "raise mqtt.wills_bytes_max, or let clients send smaller wills",
        ),
        "connect_rate" | "connections_per_user" => (
            "a limit of mqtt.limits was reached",
            "raise the limit, or mend the clients that connect so often",
        ),
        "bad_credentials" | "guessing" => {
            ("wrong user names or passwords", "give the clients the right ones, or keep out who guesses")
        }
        "not_authorized" | "client_id" | "session_owner" | "bad_auth_method" => (
            "the access rules did not let these clients in",
            "give the clients credentials, or change mqtt.access",
        ),
        "proxy" => ("no valid PROXY header", "hold the load balancer's configuration against the listener's"),
        "timeout" => ("no CONNECT within mqtt.connect_timeout", "find out who connects and says nothing"),
        tls if tls.starts_with("tls") => {
            ("the TLS handshake failed", "hold the client's certificate and CA against tls of the listener")
        }
        _ => (
            "what the clients sent was not what MQTT allows here",
            "mend the clients; the log has what is wrong",
        ),
    };
    let last = last.map_or(String::new(), |last| {
        let at = Timestamp::from_microsecond(last.last_us as i64).unwrap_or_default();
        format!("; the last one, at {at:.0}: {}", last.detail)
    });
    Told {
        part: format!("connections ({cause})"),
        cause: format!("{connections}: {why}{last}"),
        advice: format!("{advice}; `{}` lists the clients", hints.command(Hint::ClientsRefused)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::{PROBLEM_KINDS, problem_rank};
    use crate::listeners::mqtt::METRICS;

    fn part(kind: &str, name: &str) -> String {
        told(kind, name, 7, None, &Hints::default()).part
    }

    #[test]
    fn each_event_reads_its_counter_and_has_a_kind() {
        let line = r#"headworks_sink_rows_total{pipeline="p",sink="w",outcome="ignored"} 3"#;
        let read: Vec<_> =
            EVENTS.iter().filter_map(|event| Some((event.kind, event.read(line)?.0))).collect();
        assert_eq!(read, [("ignored", "p/w".to_owned())]);
        let written = line.replace("ignored", "written");
        assert!(EVENTS.iter().all(|event| event.read(&written).is_none()));
        let withheld = EVENTS.iter().find_map(|event| event.read("headworks_mqtt_withheld_total 5"));
        assert_eq!(withheld, Some((String::new(), "", 5)));
        for event in EVENTS {
            assert!(PROBLEM_KINDS.contains(&problem_kind(event.kind)), "{}", event.kind);
        }
    }

    #[test]
    fn what_happened_comes_below_what_is_wrong_now_unless_messages_are_lost() {
        let of_events: Vec<_> = EVENTS.iter().map(|event| problem_kind(event.kind)).collect();
        let is_event = |kind: &&&str| **kind != "gap" && of_events.contains(*kind);
        let states = PROBLEM_KINDS.iter().position(|kind| is_event(&kind)).expect("some are events");
        assert!(PROBLEM_KINDS[states..].iter().all(|kind| is_event(&kind)), "{:?}", &PROBLEM_KINDS[states..]);
        let order = ["stopped", "stalled", "no_space", "gap", "holding", "retrying", "late", "ignored"];
        assert!(order.is_sorted_by_key(|kind| problem_rank(kind)));
    }

    #[test]
    fn a_sink_has_written_once_a_row_of_it_is_counted() {
        let line = r#"headworks_sink_rows_total{pipeline="p",sink="w",outcome="written"} "#;
        assert_eq!(written(&format!("{line}3")), Some("p/w".to_owned()));
        assert_eq!(written(&format!("{line}0")), None);
        assert_eq!(written(&line.replace("written", "ignored")), None);
    }

    #[test]
    fn a_gap_says_whether_the_disk_or_retention_lost_the_messages_and_to_whom() {
        let said = |kind| {
            assert_eq!(problem_kind(kind), "gap");
            let Told { part, cause, .. } = told(kind, "telemetry", 2_000, None, &Hints::default());
            part + ": " + &cause
        };
        let damaged = "stream telemetry: 2000 messages were found damaged or missing on disk";
        let trimmed = "pipeline telemetry: 2000 messages were removed by retention";
        assert!(said(DAMAGED).starts_with(damaged) && said(TRIMMED).starts_with(trimmed));
        assert!(
            said(GONE).starts_with("pipeline telemetry: 2000 dead letters are gone that nobody sent again")
        );
        assert_eq!(part(GONE, ""), "dead letters");
    }

    #[test]
    fn who_lost_messages_is_told_by_what_dropped_them() {
        let parts: Vec<_> = DROPS.iter().map(|cause| part("dropped", cause)).collect();
        let wanted = [
            "publishers (no_space)",
            "subscribers (queue_full)",
            "subscribers (queues_full)",
            "subscribers (queue_age)",
            "subscribers (gap)",
            "retained messages (retained_full)",
        ];
        assert_eq!(parts, wanted);
    }

    /// Nobody is turned away without a word, and a scanner of ports is no alarm.
    #[test]
    fn a_refused_connection_is_a_problem_at_once_or_where_it_happens_often() {
        let metric = METRICS.iter().find(|metric| metric.name.contains("refused_connects")).unwrap();
        for cause in TURNED_AWAY.iter().chain(LEFT).chain(&["bad_credentials", "tls", "malformed"]) {
            assert!(metric.help.contains(cause), "{cause}");
        }
        for cause in TURNED_AWAY {
            assert!(is_problem("refused", cause, 1), "{cause}");
        }
        for cause in ["bad_credentials", "tls", "malformed", "a cause that comes later"] {
            assert!(
                !is_problem("refused", cause, OFTEN) && is_problem("refused", cause, OFTEN + 1),
                "{cause}"
            );
        }
        assert!(!is_problem("refused", "lost", u64::MAX));
        let metric = METRICS.iter().find(|metric| metric.name.contains("refused_subscribes")).unwrap();
        for cause in NO_ROOM {
            assert!(metric.help.contains(cause) && is_problem("refused_subscribes", cause, 1), "{cause}");
        }
        assert!(!is_problem("refused_subscribes", "not_authorized", OFTEN));
    }

    #[test]
    fn a_refused_connection_is_told_with_its_cause_and_the_last_client() {
        let last = RefusedClient {
            who: Some("pump-1".to_owned()),
            address: [192, 0, 2, 7].into(),
            cause: "sessions_max".to_owned(),
            detail: "client pump-1 at 192.0.2.7:50112".to_owned(),
            count: 3,
            first_us: 0,
            last_us: 1_795_415_280_000_000,
        };
        let Told { part, cause, advice } = told("refused", "sessions_max", 3, Some(&last), &Hints::default());
        assert_eq!(part, "connections (sessions_max)");
        assert_eq!(
            cause,
            "3 connections were refused within the last hour: there was no room for another session; \
             the last one, at 2026-11-23T06:28:00Z: client pump-1 at 192.0.2.7:50112"
        );
        assert!(advice.contains("mqtt.sessions_max") && advice.contains("`headworks clients refused`"));
        let one = told("refused", "sessions_max", 1, None, &Hints::default()).cause;
        assert!(one.starts_with("1 connection was refused"), "{one}");
    }
}
