//! What clients are told: of each message, and of a request as a whole.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::LazyLock;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use hyper::header::{self, HeaderValue};
use hyper::{Response, StatusCode};

use super::requests::Open;

/// A client that is told to come again does so after this, where nothing else is known.
pub const RETRY_AFTER: Duration = Duration::from_secs(1);
/// The same while a disk is full or whoever knows the clients cannot be asked.
pub const RETRY_AFTER_LONG: Duration = Duration::from_secs(10);

/// Bytes of a list of messages that are written at a time.
const PIECE_BYTES: usize = 4 << 10;

pub type Answer = Response<AnswerBody>;

/// The body of an answer, and its request, which is under way until the body is sent.
#[derive(Default)]
pub struct AnswerBody {
    text: Text,
    open: Option<Open>,
}

enum Text {
    Whole(Bytes),
    /// Written piece by piece, as the client takes it: a client that takes nothing costs a byte a message.
    Messages {
        outcomes: Box<[Outcome]>,
        next: usize,
        left: u64,
    },
}

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

    /// Returns its entry in the list of a batch's messages.
    fn json(self) -> &'static str {
        static ALL: LazyLock<Vec<String>> = LazyLock::new(|| {
            let json = |code| match Outcome::of(code) {
                Some(outcome) => {
                    let status = outcome.status().as_u16();
                    match outcome.reason() {
                        "" => format!("{{\"status\":{status}}}"),
                        reason => {
                            let reason = serde_json::Value::from(reason);
                            format!("{{\"status\":{status},\"error\":{reason}}}")
                        }
                    }
                }
                None => String::new(),
            };
            (0..=Outcome::Unavailable as u8).map(json).collect()
        });
        &ALL[self as usize]
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
            Self::Unavailable => "the access check is unavailable now: send the message again later",
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
    let mut answer = with(status, Text::Whole((body + "\n").into()));
    retry(&mut answer, retry_after);
    answer
}

/// Answers for one message.
pub fn of_one(outcome: Outcome, retry_after: Duration) -> Answer {
    if outcome == Outcome::Accepted {
        let mut answer = Response::new(AnswerBody::default());
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
    let text = match rejected {
        0 => Text::Whole(format!("{{\"accepted\":{accepted},\"rejected\":0}}\n").into()),
        _ => Text::of_messages(outcomes),
    };
    let first = outcomes.iter().copied().find(|outcome| *outcome != Outcome::Accepted);
    let status = match first {
        None => StatusCode::OK,
        Some(_) if accepted > 0 => StatusCode::MULTI_STATUS,
        Some(first) => first.status(),
    };
    let mut answer = with(status, text);
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

fn with(status: StatusCode, text: Text) -> Answer {
    let mut answer = Response::new(AnswerBody { text, open: None });
    *answer.status_mut() = status;
    let json = HeaderValue::from_static("application/json");
    answer.headers_mut().insert(header::CONTENT_TYPE, json);
    answer
}

impl AnswerBody {
    /// Keeps the request under way until the body is sent.
    pub fn hold(&mut self, mut open: Open) {
        let has_body = !self.is_end_stream();
        open.answered(has_body);
        // An answer without a body is sent whole.
        self.open = has_body.then_some(open);
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.text.left() == 0 {
            return Poll::Ready(None);
        }
        Poll::Ready(Some(Ok(Frame::data(self.text.take()))))
    }

    fn is_end_stream(&self) -> bool {
        self.text.left() == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.text.left())
    }
}

impl Default for Text {
    fn default() -> Self {
        Self::Whole(Bytes::new())
    }
}

impl Text {
    fn of_messages(outcomes: &[Outcome]) -> Self {
        let messages: usize = outcomes.iter().map(|outcome| outcome.json().len() + 1).sum();
        // No comma is behind the last.
        let left = (head(outcomes).len() + messages - 1 + TAIL.len()) as u64;
        Self::Messages { outcomes: outcomes.into(), next: 0, left }
    }

    fn left(&self) -> u64 {
        match self {
            Self::Whole(bytes) => bytes.len() as u64,
            Self::Messages { left, .. } => *left,
        }
    }

    fn take(&mut self) -> Bytes {
        let (outcomes, next, left) = match self {
            Self::Whole(bytes) => return std::mem::take(bytes),
            Self::Messages { outcomes, next, left } => (outcomes, next, left),
        };
        let mut piece = if *next == 0 { head(outcomes) } else { String::new() };
        while piece.len() < PIECE_BYTES && *next < outcomes.len() {
            piece.push_str(outcomes[*next].json());
            *next += 1;
            piece.push_str(if *next < outcomes.len() { "," } else { TAIL });
        }
        *left -= piece.len() as u64;
        piece.into()
    }
}

/// What is in front of the list of messages.
fn head(outcomes: &[Outcome]) -> String {
    let accepted = outcomes.iter().filter(|outcome| **outcome == Outcome::Accepted).count();
    let rejected = outcomes.len() - accepted;
    format!("{{\"accepted\":{accepted},\"rejected\":{rejected},\"messages\":[")
}

/// What is behind the list of messages.
const TAIL: &str = "]}\n";

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
    fn a_long_list_is_written_in_pieces_that_are_together_as_long_as_was_said() {
        let outcomes: Vec<_> = (0..1_000).filter_map(|n| Outcome::of(n as u8 % 12)).collect();
        let mut answer = of_batch(&outcomes, RETRY_AFTER).into_body();
        let (said, mut text, mut pieces) = (answer.size_hint().exact().unwrap(), Vec::new(), 0);
        while let Some(piece) = answer.frame().now_or_never().unwrap() {
            let piece = piece.unwrap().into_data().unwrap();
            assert!(piece.len() < 2 * PIECE_BYTES);
            text.extend_from_slice(&piece);
            pieces += 1;
        }
        let body: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let statuses = body["messages"].as_array().unwrap().iter().map(|it| it["status"].as_u64().unwrap());
        assert!(statuses.eq(outcomes.iter().map(|it| u64::from(it.status().as_u16()))));
        assert_eq!((text.len() as u64, answer.is_end_stream()), (said, true));
        assert!(pieces > 10 && text.ends_with(b"]}\n"));
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
