//! Log lines for failures that repeat: the first one at once, its repeats with their
//! count at most once a minute, and what is still unsaid when the host ends.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::hints::{Hint, Hints};

/// Time between two lines about the same failure.
const REPEAT_AFTER: Duration = Duration::from_secs(60);
/// Time between two looks for repeats that are due.
const FLUSH_EVERY: Duration = Duration::from_secs(5);
/// Kinds remembered of each [`Source`]; failures of further kinds share one.
const KINDS_MAX: usize = 256;
/// Subjects of one kind that have a line of their own; further ones share a line.
const SUBJECTS_MAX: usize = 16;
const TEXT_CHARS_MAX: usize = 1_000;
const SUBJECT_CHARS_MAX: usize = 200;
const RELOAD_REFUSED: &str = "reload_refused";
/// Kind of a problem of a file that a look waits for.
const NO_ANSWER: &str = "file_stalled";
/// A look at a file that takes longer is told.
const LOOK_MAX: Duration = Duration::from_secs(10);

/// Logs each failure once and counts its repeats, so that a bad device cannot fill
/// the log and nothing that repeats is hidden.
#[derive(Clone, Debug, Default)]
pub struct Failures {
    kinds: Arc<Mutex<Kinds>>,
    /// By part and kind.
    standing: Arc<Mutex<BTreeMap<(String, &'static str), Standing>>>,
    looks: Arc<Mutex<Looks>>,
    hints: Hints,
}

/// A fault that lasts until somebody mends it: a problem for as long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// `file devices.yaml`
    pub part: String,
    /// One of the kinds of problems.
    pub kind: &'static str,
    pub cause: String,
    /// Says what to do.
    pub advice: String,
}

/// Looks at files that are under way, by their number.
#[derive(Debug, Default)]
struct Looks {
    next: u64,
    under_way: BTreeMap<u64, (PathBuf, Instant)>,
}

/// A look at a file or a folder, until it is dropped: one that takes long is told.
#[derive(Debug)]
pub struct Look {
    looks: Arc<Mutex<Looks>>,
    number: u64,
}

impl Drop for Look {
    fn drop(&mut self) {
        self.looks.lock().unwrap_or_else(PoisonError::into_inner).under_way.remove(&self.number);
    }
}

/// What stands behind a failure.
#[derive(Clone, Copy, Debug)]
enum Source {
    Host,
    /// A client, perhaps one that nobody knows.
    Client,
}

/// What is remembered of each source. Clients have a table of their own, so that no number of
/// their failures takes the lines of the host's.
#[derive(Debug, Default)]
struct Kinds {
    of_host: HashMap<String, Kind>,
    of_clients: HashMap<String, Kind>,
}

#[derive(Debug, Default)]
struct Kind {
    /// By client, device or user; `""` where a failure has none.
    subjects: HashMap<String, Seen>,
    /// All further subjects together.
    others: Option<Seen>,
}

#[derive(Debug)]
struct Seen {
    said_at: Instant,
    unsaid: u64,
    /// Detail and show of the newest one.
    detail: String,
    show: String,
}

#[derive(Debug, PartialEq, Eq)]
struct Line {
    text: String,
    /// Failures that the first report of its kind was about, when more than one.
    count: Option<u64>,
    /// Failures since the line before.
    repeats: Option<u64>,
    show: String,
}

impl Failures {
    /// `hints` make the commands in lines.
    pub fn showing(hints: Hints) -> Self {
        Self { hints, ..Self::default() }
    }

    /// A command for a line, or for a text that says what to do.
    pub fn hint(&self, hint: Hint<'_>) -> String {
        self.hints.command(hint)
    }

    /// Reports failures of one kind that no client or device stands behind; see [`Self::report_by`].
    pub fn report(&self, kind: &str, count: u64, detail: &str, show: &str) {
        self.report_by(kind, "", count, detail, show);
    }

    /// Reports `count` failures. Repeats are counted by kind and subject.
    ///
    /// `kind` names the fault (`mqtt: connect refused: a password without a user name`),
    /// `subject` the client, device or user that causes it, `detail` this one case, and
    /// `show` a command that shows more, of [`Self::hint`] (`""`: none).
    pub fn report_by(&self, kind: &str, subject: &str, count: u64, detail: &str, show: &str) {
        self.report_of(Source::Host, kind, subject, count, detail, show);
    }

    /// As [`Self::report_by`], for failures that a client can cause as it likes. `kind` holds
    /// nothing that the client has sent: numbers and names belong into `detail`.
    pub fn report_client(&self, kind: &str, client: &str, count: u64, detail: &str, show: &str) {
        self.report_of(Source::Client, kind, client, count, detail, show);
    }

    fn report_of(&self, source: Source, kind: &str, subject: &str, count: u64, detail: &str, show: &str) {
        if let Some(line) = self.note(source, kind, subject, count, detail, show, Instant::now()) {
            line.log();
        }
    }

    /// Reports rejected messages, each a kind and a reason, by kind and reason; reasons
    /// that differ by numbers only count as one.
    pub fn report_rejected<'r>(
        &self,
        by: &str,
        rejected: impl Iterator<Item = (&'r str, &'r str)>,
        show: &str,
    ) {
        let mut reasons: BTreeMap<(&str, String), (u64, &str)> = BTreeMap::new();
        for (kind, reason) in rejected {
            reasons.entry((kind, alike(reason))).or_insert((0, reason)).0 += 1;
        }
        for ((kind, alike), (count, reason)) in &reasons {
            self.report_by(&format!("{by}: {kind}"), alike, *count, reason, show);
        }
    }

    /// Ends the failures whose kinds begin with `prefix`: logs the repeats that no line has
    /// counted yet, and forgets them, so that the next such failure is said at once.
    pub fn end(&self, prefix: &str) {
        self.ended(prefix).iter().for_each(Line::log);
    }

    /// Notes a fault that lasts, in place of one of the same part and kind. Parts are named by the
    /// config, so that there is no number of them that grows.
    pub fn stands(&self, fault: Standing) {
        self.lock_standing().insert((fault.part.clone(), fault.kind), fault);
    }

    pub fn mended(&self, part: &str, kind: &'static str) {
        self.lock_standing().remove(&(part.to_owned(), kind));
    }

    /// Faults that last now, by part, and files that do not answer.
    pub fn standing(&self) -> Vec<Standing> {
        let unanswered = self.unanswered(Instant::now());
        self.lock_standing().values().cloned().chain(unanswered).collect()
    }

    /// Notes that a file or a folder is looked at from now on, by a thread that may wait for it.
    pub fn look_at(&self, path: &Path) -> Look {
        let mut looks = self.looks.lock().unwrap_or_else(PoisonError::into_inner);
        let number = looks.next;
        looks.next += 1;
        looks.under_way.insert(number, (path.to_owned(), Instant::now()));
        Look { looks: Arc::clone(&self.looks), number }
    }

    /// Returns what is told of the files whose looks take longer than [`LOOK_MAX`], each once.
    fn unanswered(&self, now: Instant) -> Vec<Standing> {
        let looks = self.looks.lock().unwrap_or_else(PoisonError::into_inner);
        let is_late = |(_, begun): &&(PathBuf, Instant)| now.saturating_duration_since(*begun) >= LOOK_MAX;
        let late: BTreeSet<&Path> =
            looks.under_way.values().filter(is_late).map(|(path, _)| &**path).collect();
        let told = late.into_iter().map(|path| Standing {
            part: file_part(path),
            kind: NO_ANSWER,
            cause: format!(
                "its disk does not answer for over {} s: no change of it is seen, and what it said before stays in \
                 force",
                LOOK_MAX.as_secs()
            ),
            advice: format!(
                "look at the disk or the mount of {}; the host goes on by itself once it answers",
                path.display()
            ),
        });
        told.collect()
    }

    /// Notes that a changed file is not used.
    pub fn reload_refused(&self, file: &Path, reason: &str) {
        self.stands(Standing {
            part: file_part(file),
            kind: RELOAD_REFUSED,
            cause: format!("the changed file cannot be used: {reason}; the previous contents stay in use"),
            advice: format!(
                "mend it before the host is started again, which forgets what it said before; `{}` says every mistake",
                self.hint(Hint::Validate)
            ),
        });
    }

    /// Notes that a file is used as it is.
    pub fn reloaded(&self, file: &Path) {
        self.mended(&file_part(file), RELOAD_REFUSED);
    }

    /// Logs the repeats that are due, for as long as the host runs.
    pub async fn flush_regularly(self) {
        let mut ticks = tokio::time::interval(FLUSH_EVERY);
        loop {
            ticks.tick().await;
            self.flush_due();
        }
    }

    /// Logs the repeats that are due, for an owner that has a loop of its own.
    pub fn flush_due(&self) {
        self.due(Instant::now()).iter().for_each(Line::log);
    }

    /// Logs all repeats that no line has counted yet.
    pub fn flush(&self) {
        self.due(Instant::now() + REPEAT_AFTER).iter().for_each(Line::log);
    }

    /// The line that is to be logged now, `None` where the report is a repeat.
    #[expect(clippy::too_many_arguments, reason = "a report, its source and its time")]
    fn note(
        &self,
        source: Source,
        kind: &str,
        subject: &str,
        count: u64,
        detail: &str,
        show: &str,
        now: Instant,
    ) -> Option<Line> {
        let subject = shortened(subject, SUBJECT_CHARS_MAX);
        let (mut kind, mut detail) = (shortened(kind, TEXT_CHARS_MAX), shortened(detail, TEXT_CHARS_MAX));
        let mut all = self.lock();
        let (kinds, others) = match source {
            Source::Host => (&mut all.of_host, "other failures"),
            Source::Client => (&mut all.of_clients, "other failures of clients"),
        };
        if kinds.len() >= KINDS_MAX && !kinds.contains_key(&*kind) {
            detail = format!("{kind}: {detail}").into();
            kind = others.into();
        }
        let known = kinds.entry(kind.clone().into_owned()).or_default();
        let is_new = !known.subjects.contains_key(&*subject) && known.subjects.len() < SUBJECTS_MAX;
        let new = || Seen { said_at: now, unsaid: 0, detail: detail.to_string(), show: show.to_owned() };
        if is_new {
            known.subjects.insert(subject.into_owned(), new());
            let count = (count > 1).then_some(count);
            return Some(Line { text: text(&kind, &detail), count, repeats: None, show: show.to_owned() });
        }
        let seen = match known.subjects.get_mut(&*subject) {
            Some(seen) => seen,
            None => known.others.get_or_insert_with(new),
        };
        seen.unsaid += count;
        seen.detail = detail.into_owned();
        None
    }

    /// Lines for repeats whose last line is [`REPEAT_AFTER`] old; forgets what did not repeat.
    fn due(&self, now: Instant) -> Vec<Line> {
        let mut lines = Vec::new();
        self.lock().retain(|kind, known| {
            known.subjects.retain(|_, seen| seen.repeats(now, |seen| lines.push(seen.line(kind, ""))));
            if let Some(others) = &mut known.others
                && !others.repeats(now, |seen| lines.push(seen.line(kind, ", and others")))
            {
                known.others = None;
            }
            !known.subjects.is_empty() || known.others.is_some()
        });
        lines.sort_by(|a, b| a.text.cmp(&b.text));
        lines
    }

    /// Lets so much time pass that what was said until now may be said again.
    #[cfg(test)]
    pub(crate) fn pass_time(&self) {
        self.lock().retain(|_, known| {
            let all = known.subjects.values_mut().chain(&mut known.others);
            all.for_each(|seen| seen.said_at -= REPEAT_AFTER);
            true
        });
    }

    /// Kinds, and repeats that no line has counted yet.
    #[cfg(test)]
    pub(crate) fn unsaid(&self) -> Vec<(String, u64)> {
        let unsaid =
            |known: &Kind| known.subjects.values().chain(&known.others).map(|seen| seen.unsaid).sum();
        let kinds = self.lock();
        let all = kinds.of_host.iter().chain(&kinds.of_clients);
        all.map(|(kind, known)| (kind.clone(), unsaid(known))).collect()
    }

    /// Lines for the repeats of kinds that begin with `prefix`; forgets those kinds.
    fn ended(&self, prefix: &str) -> Vec<Line> {
        let mut lines = Vec::new();
        self.lock().retain(|kind, known| {
            let has_ended = kind.starts_with(prefix);
            if has_ended {
                let unsaid = |seen: &&Seen| seen.unsaid > 0;
                lines.extend(known.subjects.values().filter(unsaid).map(|seen| seen.line(kind, "")));
                lines.extend(known.others.iter().filter(unsaid).map(|seen| seen.line(kind, ", and others")));
            }
            !has_ended
        });
        lines.sort_by(|a, b| a.text.cmp(&b.text));
        lines
    }

    fn lock_standing(&self) -> MutexGuard<'_, BTreeMap<(String, &'static str), Standing>> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, Kinds> {
        self.kinds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kinds {
    fn retain(&mut self, mut stays: impl FnMut(&String, &mut Kind) -> bool) {
        self.of_host.retain(&mut stays);
        self.of_clients.retain(stays);
    }
}

impl Seen {
    /// Says the repeats when they are due. False when it is time and nothing repeated.
    fn repeats(&mut self, now: Instant, say: impl FnOnce(&Self)) -> bool {
        if now.duration_since(self.said_at) < REPEAT_AFTER {
            return true;
        }
        let repeated = self.unsaid > 0;
        if repeated {
            say(self);
            self.said_at = now;
            self.unsaid = 0;
        }
        repeated
    }

    fn line(&self, kind: &str, end: &str) -> Line {
        let text = text(kind, &self.detail) + end;
        Line { text, count: None, repeats: Some(self.unsaid), show: self.show.clone() }
    }
}

impl Line {
    fn log(&self) {
        let Self { text, count, repeats, show } = self;
        let show = Some(show.as_str()).filter(|show| !show.is_empty());
        tracing::warn!(count, repeats, show, "{text}");
    }
}

fn file_part(file: &Path) -> String {
    format!("file {}", file.display())
}

fn text(kind: &str, detail: &str) -> String {
    if detail.is_empty() { kind.to_owned() } else { format!("{kind}: {detail}") }
}

/// A text with each number as `0`, to tell texts apart by more than the value at hand.
pub fn alike(text: &str) -> String {
    let mut alike = String::new();
    for c in text.chars() {
        match c {
            '0'..='9' if alike.ends_with('0') => {}
            '0'..='9' => alike.push('0'),
            c => alike.push(c),
        }
    }
    alike
}

fn shortened(text: &str, chars_max: usize) -> Cow<'_, str> {
    match text.char_indices().nth(chars_max) {
        Some((end, _)) => format!("{}…", &text[..end]).into(),
        None => text.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(lines: &[Line]) -> Vec<(&str, Option<u64>)> {
        lines.iter().map(|line| (&*line.text, line.repeats)).collect()
    }

    #[test]
    fn repeats_are_logged_with_their_count_even_when_the_failure_has_stopped() {
        let failures = Failures::default();
        let start = Instant::now();
        let note = |detail, count| failures.note(Source::Host, "a", "", count, detail, "", start);
        let first = note("one", 3).unwrap();
        assert_eq!((&*first.text, first.count, first.repeats), ("a: one", Some(3), None));
        assert_eq!(note("two", 193), None);
        assert_eq!(failures.due(start + REPEAT_AFTER / 2), []);
        assert_eq!(texts(&failures.due(start + REPEAT_AFTER)), [("a: two", Some(193))]);
        assert_eq!(failures.due(start + 2 * REPEAT_AFTER), []);
        assert!(
            failures.note(Source::Host, "a", "", 1, "three", "", start + 2 * REPEAT_AFTER).is_some(),
            "it is new again"
        );
    }

    #[test]
    fn what_has_ended_says_its_repeats_and_is_new_when_it_comes_again() {
        let failures = Failures::default();
        let start = Instant::now();
        let note = |kind, detail| failures.note(Source::Host, kind, detail, 1, detail, "", start).is_some();
        assert!(note("w: retry", "refused") && note("w: setup", "no table") && note("other", "x"));
        assert!(!note("w: retry", "refused") && !note("other", "x"));
        assert_eq!(texts(&failures.ended("w: ")), [("w: retry: refused", Some(1))]);
        assert_eq!(failures.ended("w: "), []);
        assert!(note("w: retry", "refused") && !note("other", "x"));
    }

    #[test]
    fn each_subject_has_its_own_line_and_count() {
        let failures = Failures::default();
        let start = Instant::now();
        for user in ["ann", "bob"] {
            let note = || failures.note(Source::Client, "wrong password", user, 1, user, "", start);
            let said = (0..3).filter_map(|_| note()).count();
            assert_eq!(said, 1, "{user}");
        }
        let lines = failures.due(start + REPEAT_AFTER);
        assert_eq!(texts(&lines), [("wrong password: ann", Some(2)), ("wrong password: bob", Some(2))]);
    }

    #[test]
    fn any_number_of_subjects_and_kinds_is_counted_in_a_bounded_number_of_lines() {
        let failures = Failures::default();
        let start = Instant::now();
        let (mut said, mut reported) = (0, 0);
        for number in 0..10_000 {
            for (kind, subject) in [("a".to_owned(), number.to_string()), (number.to_string(), String::new())]
            {
                let line = failures.note(Source::Host, &kind, &subject, 1, "x", "", start);
                said += u64::from(line.is_some());
                reported += 1;
            }
        }
        let lines = failures.due(start + REPEAT_AFTER);
        assert!(
            said + lines.len() as u64 <= (KINDS_MAX + 2 * SUBJECTS_MAX) as u64,
            "{said}, {}",
            lines.len()
        );
        assert_eq!(said + lines.iter().filter_map(|line| line.repeats).sum::<u64>(), reported);
        assert!(lines.iter().any(|line| line.text == "a: x, and others"), "{lines:?}");
    }

    #[test]
    fn each_reason_of_a_batch_is_counted_apart_but_for_its_numbers() {
        let failures = Failures::default();
        let batch = ["no value", "at byte 17", "at byte 4", "no value", "at byte 99"];
        failures.report_rejected("p/s", batch.into_iter().map(|reason| ("failed", reason)), "");
        failures.report_rejected("p/s", batch.into_iter().map(|reason| ("failed", reason)), "");
        let lines = failures.due(Instant::now() + REPEAT_AFTER);
        assert_eq!(texts(&lines), [("p/s: failed: at byte 17", Some(3)), ("p/s: failed: no value", Some(2))]);
    }

    #[test]
    fn a_fault_stands_until_it_is_mended() {
        let failures = Failures::default();
        let of = |failures: &Failures| failures.standing().into_iter().map(|it| it.part).collect::<Vec<_>>();
        failures.reload_refused(Path::new("a"), "line 1: no");
        failures.clone().reload_refused(Path::new("b"), "line 1: no");
        failures.reload_refused(Path::new("a"), "line 2: no");
        assert_eq!(of(&failures), ["file a", "file b"]);
        assert!(failures.standing()[0].cause.contains("line 2: no"));
        failures.reloaded(Path::new("a"));
        failures.reloaded(Path::new("never broken"));
        assert_eq!(of(&failures), ["file b"]);
    }

    #[test]
    fn a_file_that_does_not_answer_is_told_until_it_does() {
        let failures = Failures::default();
        let told = |after| {
            failures.unanswered(Instant::now() + after).into_iter().map(|it| it.part).collect::<Vec<_>>()
        };
        let looks = ["users", "users", "cert.pem"].map(|file| failures.clone().look_at(Path::new(file)));
        assert_eq!(told(Duration::ZERO), [""; 0], "they may answer in time");
        assert_eq!(told(LOOK_MAX), ["file cert.pem", "file users"]);
        let [first, second, third] = looks;
        drop((first, third));
        assert_eq!(told(LOOK_MAX), ["file users"]);
        drop(second);
        assert_eq!(told(LOOK_MAX), [""; 0]);
    }

    #[test]
    fn a_long_text_is_cut() {
        let failures = Failures::default();
        let long = "ä".repeat(2 << 20);
        let line = failures.note(Source::Client, "a", &long, 1, &long, "", Instant::now()).unwrap();
        assert_eq!(line.text.chars().count(), "a: ".len() + TEXT_CHARS_MAX + 1);
        let subjects = failures.lock().of_clients["a"].subjects.keys().map(String::len).collect::<Vec<_>>();
        assert_eq!(subjects, [2 * SUBJECT_CHARS_MAX + '…'.len_utf8()]);
    }

    #[test]
    fn no_number_of_failures_of_clients_takes_the_lines_of_the_hosts() {
        let failures = Failures::default();
        let start = Instant::now();
        for number in 0..10 * KINDS_MAX {
            failures.note(Source::Client, &number.to_string(), "c", 1, "x", "", start);
        }
        let line = failures.note(Source::Host, "sink w: setup", "", 1, "no table", "", start).unwrap();
        assert_eq!(line.text, "sink w: setup: no table");
        assert_eq!(failures.note(Source::Host, "sink w: setup", "", 1, "no table", "", start), None);
        assert_eq!(texts(&failures.ended("sink w: ")), [("sink w: setup: no table", Some(1))]);
        let kinds = failures.unsaid();
        assert!(kinds.len() == KINDS_MAX + 1 && kinds.iter().any(|(kind, _)| kind.contains("of clients")));
    }
}
