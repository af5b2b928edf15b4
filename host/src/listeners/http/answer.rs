//! What clients are told: of each message, and of a request as a whole.

use std::fmt::Write;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{self, HeaderValue};
use hyper::{Response, StatusCode};

/// A client that is told to come again does so after this, where nothing else is known.
pub const RETRY_AFTER: Duration = Duration::from_secs(1);
/// The same while a disk is full or whoever knows the clients cannot be asked.
pub const RETRY_AFTER_LONG: Duration = Duration::from_secs(10);

pub type Answer = Response<Full<Bytes>>;

/// What became of one message. The numbers are stored with idempotency keys: see
/// [`super::idempotency`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Outcome {
    /// The message is in its stream.
    Accepted = 0,
    NoTopic = 2,
    BadTopic = 3,
    ReservedTopic = 4,
    TopicLevels = 5,
    NotAuthorized = 6,
    TooLarge = 7,
    BadPayload = 8,
    BadProperty = 9,
    /// Not now: its stream has no room.
    NoRoom = 10,
    /// Not now: who would know whether it is allowed cannot be asked.
    Unavailable = 11,
}

impl Outcome {
    /// Reads a stored number.
    pub fn of(code: u8) -> Option<Self> {
        Some(match code {
            0 => Self::Accepted,
            2 => Self::NoTopic,
            3 => Self::BadTopic,
            4 => Self::ReservedTopic,
            5 => Self::TopicLevels,
            6 => Self::NotAuthorized,
            7 => Self::TooLarge,
            8 => Self::BadPayload,
            9 => Self::BadProperty,
            10 => Self::NoRoom,
            11 => Self::Unavailable,
            _ => return None,
        })
    }

    pub fn status(self) -> StatusCode {
        match self {
            Self::Accepted => StatusCode::NO_CONTENT,
            Self::NoTopic | Self::BadTopic | Self::TopicLevels | Self::BadPayload | Self::BadProperty => {
                StatusCode::BAD_REQUEST
            }
            Self::ReservedTopic | Self::NotAuthorized => StatusCode::FORBIDDEN,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::NoRoom => StatusCode::TOO_MANY_REQUESTS,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// Returns the cause that is counted; `None`: nothing is wrong.
    pub fn cause(self) -> Option<&'static str> {
        Some(match self {
            Self::Accepted => return None,
            Self::NoTopic | Self::BadTopic => "topic",
            Self::ReservedTopic => "dollar_topic",
            Self::TopicLevels => "topic_levels",
            Self::NotAuthorized => "not_authorized",
            Self::TooLarge => "too_large",
            Self::BadPayload => "payload",
            Self::BadProperty => "property",
            Self::NoRoom => "no_room",
            Self::Unavailable => "access_unavailable",
        })
    }

    pub fn reason(self) -> &'static str {
        match self {
            Self::Accepted => "",
            Self::NoTopic => "no topic: name it in the path or as \"topic\" of the message",
            Self::BadTopic => "not a topic: UTF-8, 1 to 65535 bytes, without +, # and NUL",
            Self::ReservedTopic => "topics below $SYS and $share are the host's own",
            Self::TopicLevels => "the topic has more levels than mqtt.limits.topic_levels_max",
            Self::NotAuthorized => "publishing to this topic is not allowed",
            Self::TooLarge => "larger than http.max_message_size, or than its stream takes",
            Self::BadPayload => {
                "no payload: give \"payload\", any JSON value, or \"payload_base64\", not both; base64 as in \
                 RFC 4648, section 4"
            }
            Self::BadProperty => {
                "a property that no message can have: text without NUL, at most 65535 bytes of all properties, \
                 a response topic without + and #, an expiry in whole seconds"
            }
            Self::NoRoom => "the stream has no room: send it again later",
            Self::Unavailable => "who may publish there cannot be asked now: send it again later",
        }
    }
}

/// Why a request is answered without a look at its messages.
#[derive(Debug)]
pub struct Refusal {
    pub status: StatusCode,
    /// The label that the counter of refused requests has for it.
    pub cause: &'static str,
    pub reason: String,
    pub retry_after: Option<Duration>,
    /// What the client is told to show.
    pub challenge: bool,
}

impl Refusal {
    pub fn new(status: StatusCode, cause: &'static str, reason: impl Into<String>) -> Self {
        Self { status, cause, reason: reason.into(), retry_after: None, challenge: false }
    }

    pub fn bad(cause: &'static str, reason: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, cause, reason)
    }

    pub fn retry(self, after: Duration) -> Self {
        Self { retry_after: Some(after), ..self }
    }

    pub fn answer(&self) -> Answer {
        let mut answer = refused(self.status, &self.reason, self.retry_after);
        if self.challenge {
            for challenge in ["Bearer", "Basic realm=\"headworks\", charset=\"UTF-8\""] {
                answer.headers_mut().append(header::WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
            }
        }
        if self.status == StatusCode::METHOD_NOT_ALLOWED {
            answer.headers_mut().insert(header::ALLOW, HeaderValue::from_static("POST"));
        }
        answer
    }
}

fn refused(status: StatusCode, reason: &str, retry_after: Option<Duration>) -> Answer {
    let body = serde_json::json!({ "error": reason }).to_string();
    let mut answer = with(status, body + "\n");
    retry(&mut answer, retry_after);
    answer
}

/// Answers for one message.
pub fn of_one(outcome: Outcome, retry_after: Duration) -> Answer {
    if outcome == Outcome::Accepted {
        let mut answer = Response::new(Full::default());
        *answer.status_mut() = StatusCode::NO_CONTENT;
        return answer;
    }
    refused(outcome.status(), outcome.reason(), retries(outcome).then_some(retry_after))
}

/// Answers for a batch: 200 where every message was accepted, 207 with what became of each where some
/// were, else the status of the first.
pub fn of_batch(outcomes: &[Outcome], retry_after: Duration) -> Answer {
    let accepted = outcomes.iter().filter(|outcome| **outcome == Outcome::Accepted).count();
    let rejected = outcomes.len() - accepted;
    let mut body = format!("{{\"accepted\":{accepted},\"rejected\":{rejected}");
    if rejected > 0 {
        body.push_str(",\"messages\":[");
        for (number, outcome) in outcomes.iter().enumerate() {
            let comma = if number == 0 { "" } else { "," };
            let status = outcome.status().as_u16();
            let written = match outcome.reason() {
                "" => write!(body, "{comma}{{\"status\":{status}}}"),
                reason => {
                    let reason = serde_json::Value::from(reason);
                    write!(body, "{comma}{{\"status\":{status},\"error\":{reason}}}")
                }
            };
            written.expect("memory can be written");
        }
        body.push(']');
    }
    body.push_str("}\n");
    let first = outcomes.iter().copied().find(|outcome| *outcome != Outcome::Accepted);
    let status = match first {
        None => StatusCode::OK,
        Some(_) if accepted > 0 => StatusCode::MULTI_STATUS,
        Some(first) => first.status(),
    };
    let mut answer = with(status, body);
    let waits = outcomes.iter().any(|outcome| retries(*outcome));
    retry(&mut answer, waits.then_some(retry_after));
    answer
}

/// Whether the same message may be accepted later.
fn retries(outcome: Outcome) -> bool {
    matches!(outcome, Outcome::NoRoom | Outcome::Unavailable)
}

fn retry(answer: &mut Answer, after: Option<Duration>) {
    if let Some(after) = after {
        // The header has whole seconds (RFC 9110, 10.2.3), and the client is to come no sooner.
        let seconds = after.as_millis().div_ceil(1_000).max(1) as u64;
        answer.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
}

fn with(status: StatusCode, body: String) -> Answer {
    let mut answer = Response::new(Full::from(body));
    *answer.status_mut() = status;
    let json = HeaderValue::from_static("application/json");
    answer.headers_mut().insert(header::CONTENT_TYPE, json);
    answer
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use http_body_util::BodyExt;

    use super::*;

    fn text(answer: Answer) -> (u16, String) {
        let status = answer.status().as_u16();
        let body = answer.into_body().collect().now_or_never().unwrap().unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[test]
    fn a_batch_is_told_of_each_message_where_some_were_not_accepted() {
        use Outcome::{Accepted, NoRoom, NotAuthorized};
        let all = text(of_batch(&[Accepted, Accepted], RETRY_AFTER));
        assert_eq!(all, (200, "{\"accepted\":2,\"rejected\":0}\n".to_owned()));
        let some = of_batch(&[Accepted, NoRoom, NotAuthorized], Duration::from_millis(1_200));
        assert_eq!(some.headers()["retry-after"], "2");
        let (status, body) = text(some);
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        let statuses: Vec<_> =
            body["messages"].as_array().unwrap().iter().map(|it| it["status"].as_u64().unwrap()).collect();
        assert_eq!((status, statuses), (207, vec![204, 429, 403]));
        let none = of_batch(&[NotAuthorized], RETRY_AFTER);
        assert!(none.headers().get("retry-after").is_none());
        assert_eq!(text(none).0, 403);
    }

    #[test]
    fn an_outcome_is_read_as_it_was_stored() {
        for code in 0..=u8::MAX {
            if let Some(outcome) = Outcome::of(code) {
                assert_eq!(outcome as u8, code);
                assert_eq!(outcome.cause().is_none(), outcome == Outcome::Accepted);
            }
        }
    }
}
