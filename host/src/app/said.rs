//! Problems that only their list would tell: the log says when each begins and when it ends.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::admin::Problem;

/// Kinds of problems that are states, and that no part of the host logs.
const SAID: &[&str] = &["low_space", "late", "queues", "memory", "swap_waits", "file_stalled"];
/// A problem that comes back within this has not ended: a value beside its bound has no line at each look.
const AWAY_MAX: Duration = Duration::from_secs(60);

/// Remembers the problems that the log has told.
#[derive(Default)]
pub struct Said(HashMap<(String, String), Lasting>);

struct Lasting {
    began: Instant,
    /// When it was there last.
    seen: Instant,
}

#[derive(Debug, PartialEq, Eq)]
enum Change<'p> {
    Begins(&'p Problem),
    Ended { part: String, kind: String, lasted: Duration },
}

impl Said {
    /// Logs which problems have begun and which have ended since the last call; `problems` are those
    /// of this moment.
    pub fn say(&mut self, problems: &[Problem]) {
        self.changes(problems, Instant::now()).iter().for_each(Change::log);
    }

    fn changes<'p>(&mut self, problems: &'p [Problem], now: Instant) -> Vec<Change<'p>> {
        let mut changes = Vec::new();
        for problem in problems.iter().filter(|problem| SAID.contains(&&*problem.kind)) {
            let key = (problem.part.clone(), problem.kind.clone());
            let lasting = self.0.entry(key).or_insert_with(|| {
                changes.push(Change::Begins(problem));
                Lasting { began: now, seen: now }
            });
            lasting.seen = now;
        }
        self.0.retain(|(part, kind), Lasting { began, seen }| {
            let is_over = now.saturating_duration_since(*seen) >= AWAY_MAX;
            if is_over {
                let (part, kind) = (part.clone(), kind.clone());
                changes.push(Change::Ended { part, kind, lasted: seen.saturating_duration_since(*began) });
            }
            !is_over
        });
        changes
    }
}

impl Change<'_> {
    fn log(&self) {
        match self {
            Self::Begins(Problem { part, kind, cause, at_stake, advice, .. }) => {
                tracing::warn!(part, kind, %at_stake, "{cause}; {advice}");
            }
            Self::Ended { part, kind, lasted } => {
                tracing::info!(part, kind, after_s = lasted.as_secs(), "the problem has ended");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::{AtStake, PROBLEM_KINDS};

    fn problem(part: &str, kind: &str) -> Problem {
        Problem {
            part: part.to_owned(),
            kind: kind.to_owned(),
            cause: "little room is left".to_owned(),
            since: String::new(),
            seconds: 0,
            at_stake: AtStake::default(),
            advice: "free space".to_owned(),
        }
    }

    #[test]
    fn a_state_is_said_once_when_it_begins_and_once_when_it_has_ended() {
        let (mut said, begin) = (Said::default(), Instant::now());
        let (disk, late) = (problem("disk of /data", "low_space"), problem("sink p/w", "late"));
        let mut changes = |problems: &[Problem], after: Duration| {
            let changes = said.changes(problems, begin + after).into_iter().map(|change| match change {
                Change::Begins(problem) => format!("{} begins", problem.kind),
                Change::Ended { kind, lasted, .. } => format!("{kind} lasted {} s", lasted.as_secs()),
            });
            let mut changes: Vec<_> = changes.collect();
            changes.sort();
            changes
        };
        let both = [disk.clone(), late];
        assert_eq!(changes(&both, Duration::ZERO), ["late begins", "low_space begins"]);
        assert!(changes(&both, Duration::from_secs(30)).is_empty());
        assert!(changes(&[], Duration::from_secs(40)).is_empty(), "it may be at its bound");
        assert!(changes(&both[..1], Duration::from_secs(60)).is_empty());
        assert_eq!(changes(&both[..1], Duration::from_secs(90)), ["late lasted 30 s"]);
        assert_eq!(changes(&[], Duration::from_secs(90) + AWAY_MAX), ["low_space lasted 90 s"]);
        assert_eq!(changes(&[disk], Duration::from_secs(900)), ["low_space begins"]);
    }

    #[test]
    fn what_the_parts_of_the_host_log_themselves_is_not_said_again() {
        assert!(SAID.iter().all(|kind| PROBLEM_KINDS.contains(kind)));
        assert_eq!(Said::default().changes(&[problem("sink p/w", "retrying")], Instant::now()), []);
    }
}
