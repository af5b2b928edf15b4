//! One line per new kind of failure, then a count once a minute while it goes on.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Between two lines of the same kind.
const REPEAT_AFTER: Duration = Duration::from_secs(60);
/// Kinds remembered; past it the oldest are forgotten and would be said again.
const KINDS_MAX: usize = 1_024;

/// Says each kind of failure once, so that a bad device cannot fill the log.
#[derive(Clone, Debug, Default)]
pub struct Failures(Arc<Mutex<HashMap<String, Seen>>>);

#[derive(Debug)]
struct Seen {
    said_at: Instant,
    unsaid: u64,
}

impl Failures {
    /// `kind` names what repeats (`telemetry/normalize: payload is not JSON`),
    /// `detail` this one case, `show` the command that shows more.
    pub fn report(&self, kind: &str, count: u64, detail: &str, show: &str) {
        if let Some(repeats) = self.note(kind, count, Instant::now()) {
            tracing::warn!(repeats, show, "{kind}: {}", one_line(detail));
        }
    }

    /// How many went unsaid since the last line, when a line is due.
    fn note(&self, kind: &str, count: u64, now: Instant) -> Option<u64> {
        let mut kinds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(seen) = kinds.get_mut(kind) {
            seen.unsaid += count;
            if now.duration_since(seen.said_at) < REPEAT_AFTER {
                return None;
            }
            seen.said_at = now;
            return Some(std::mem::take(&mut seen.unsaid));
        }
        if kinds.len() >= KINDS_MAX
            && let Some(oldest) =
                kinds.iter().min_by_key(|(_, seen)| seen.said_at).map(|(kind, _)| kind.clone())
        {
            kinds.remove(&oldest);
        }
        kinds.insert(kind.to_owned(), Seen { said_at: now, unsaid: 0 });
        Some(count)
    }
}

/// What others say, such as a client its name, forges no line of the log.
fn one_line(text: &str) -> Cow<'_, str> {
    if !text.chars().any(char::is_control) {
        return text.into();
    }
    let escaped = |c: char| if c.is_control() { c.escape_debug().to_string() } else { c.to_string() };
    text.chars().map(escaped).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_say_is_one_line() {
        assert_eq!(one_line("user \"ann\" à b"), "user \"ann\" à b");
        assert_eq!(one_line("user x\nERROR all is lost\u{1b}[2J"), "user x\\nERROR all is lost\\u{1b}[2J");
    }

    #[test]
    fn a_kind_is_said_once_then_counted() {
        let failures = Failures::default();
        let start = Instant::now();
        assert_eq!(failures.note("a", 3, start), Some(3));
        assert_eq!(failures.note("a", 4, start), None);
        assert_eq!(failures.note("b", 1, start), Some(1));
        assert_eq!(failures.note("a", 1, start + REPEAT_AFTER), Some(5));
    }
}
