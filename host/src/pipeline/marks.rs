//! What the state of the dead letters says of letters that redrives took.
//!
//! A letter that a redrive has taken has a mark of its own: it is pending, or open again for
//! the sinks that rejected it. Letters that a pass has sent have none: a record names them by
//! their offsets, with the pass and the sinks that they went to. A record takes a few bytes for
//! thousands of letters that lie together, and tells what a database must have:
//! [`missing`](super::missing) compares it with the pass's position there. A letter's own mark
//! says more than a record that names the letter.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::num::ParseIntError;
use std::ops::Range;
use std::str::FromStr;

use uuid::Uuid;

use super::destinations::Destinations;
use super::reasons::{Reasons, Tries};
use crate::batch::Offset;
use crate::stream::StateEntries;

/// Begins the state keys of marks and of records.
pub const MARK_PREFIX: &[u8] = b"r";
/// State key of a letter's own mark: then its offset, big-endian.
const LETTER_PREFIX: &[u8] = b"rd";
/// State key of a record: then the pass's UUID, and the offset of its first letter, big-endian.
pub const SENT_PREFIX: &[u8] = b"rs";
/// Letters of one record: it fits into a value of the state however far apart they lie.
const RECORD_LETTERS_MAX: usize = 4_096;

/// A change of the state: a key, and its value or its removal.
pub type Change = (Vec<u8>, Option<Vec<u8>>);

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mark {
    /// Each sink that it names has it, or another letter has what is left of it.
    Sent,
    Pending(Pending),
    /// It is open for these sinks.
    Open {
        sinks: BTreeSet<String>,
        why: Reopened,
        /// Which sinks its messages go to, where a redrive has decided that.
        to: Option<Destinations>,
    },
}

/// Why a letter is open that a redrive took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reopened {
    /// The sinks rejected it again, or a step did for them.
    Rejected(Tries),
    /// A sink among them had it, and its database lost it.
    Lost,
    /// A redrive may have made rows of it, all or some: one of another copy of the data folder, or one
    /// during which steps were taken out. It is sent only where that is asked for.
    PossibleDuplicate,
}

/// A redrive of this pipeline is under way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    pub pipeline: String,
    /// `None`: a redrive of 0.1.0, which sends a copy.
    pub pass: Option<Uuid>,
    /// The sinks that it is sent to, where these are not all that the letter names.
    pub only: Option<BTreeSet<String>>,
    /// Sinks that rejected it so far.
    pub rejected: BTreeSet<String>,
    /// It is sent though it may be rows already.
    pub may_repeat: bool,
    pub tries: Tries,
    /// The step that it enters at, where a person said so.
    pub from_step: Option<String>,
    /// Which sinks its messages go to, where that is decided.
    pub to: Option<Destinations>,
}

/// Mark of a letter that is sent. An empty one, of 0.1.0, says that too: see [`without_outcome`].
const SENT: &str = "sent";
/// First byte of the mark of a letter that a pass sends: no text begins with it.
const OF_PASS: u8 = 1;
/// Second line of the mark of a letter that a database has lost.
const WAS_SENT: &str = "was sent";
/// Second line of the mark of a letter that may be rows already, and last line of one that is sent
/// all the same.
const POSSIBLE_DUPLICATE: &str = "possible duplicate";

impl Reopened {
    fn text(self) -> Cow<'static, str> {
        match self {
            Self::Rejected(tries) => tries.text().into(),
            Self::Lost => WAS_SENT.into(),
            Self::PossibleDuplicate => POSSIBLE_DUPLICATE.into(),
        }
    }

    fn read(text: &str) -> Self {
        match text {
            WAS_SENT => Self::Lost,
            POSSIBLE_DUPLICATE => Self::PossibleDuplicate,
            tries => Self::Rejected(Tries::read(tries)),
        }
    }
}

impl Mark {
    /// How often redrives had the letter rejected as before.
    pub fn tries(&self) -> Tries {
        match self {
            Self::Open { why: Reopened::Rejected(tries), .. } => *tries,
            Self::Pending(pending) => pending.tries,
            Self::Open { .. } | Self::Sent => Tries::default(),
        }
    }

    /// Which sinks the letter's messages go to, where that is decided.
    pub fn destinations(&self) -> Option<&Destinations> {
        match self {
            Self::Open { to, .. } => to.as_ref(),
            Self::Pending(pending) => pending.to.as_ref(),
            Self::Sent => None,
        }
    }

    /// `sent`, or `pending` and the pipeline, or `open` and why, and the sinks, a line each; one of
    /// `open` may be the destinations. For a pass: a byte, its UUID, then lines: the pipeline, the sinks
    /// that it is sent to, those that rejected it, whether it may repeat rows, its tries, the step that it
    /// enters at, and its destinations.
    pub fn bytes(&self) -> Vec<u8> {
        let lines = |first: [&str; 2], names: &BTreeSet<String>| {
            first
                .into_iter()
                .chain(names.iter().map(String::as_str))
                .collect::<Vec<_>>()
                .join("\n")
                .into_bytes()
        };
        match self {
            Self::Sent => SENT.into(),
            Self::Open { sinks, why, to } => {
                let mut bytes = lines(["open", &why.text()], sinks);
                bytes.extend(to.iter().flat_map(|to| format!("\n{}", to.text()).into_bytes()));
                bytes
            }
            Self::Pending(Pending { pipeline, pass: None, rejected, .. }) => {
                lines(["pending", pipeline], rejected)
            }
            Self::Pending(Pending {
                pipeline,
                pass: Some(pass),
                only,
                rejected,
                may_repeat,
                tries,
                from_step,
                to,
            }) => {
                let only = only.as_ref().map(joined).unwrap_or_default();
                let repeats = if *may_repeat { POSSIBLE_DUPLICATE } else { "" };
                let (rejected, tries) = (joined(rejected), tries.text());
                let from_step = from_step.as_deref().unwrap_or_default();
                let to = to.as_ref().map(Destinations::text).unwrap_or_default();
                let text = [pipeline, &*only, &rejected, repeats, &tries, from_step, &to].join("\n");
                [&[OF_PASS], &pass.as_bytes()[..], text.as_bytes()].concat()
            }
        }
    }

    fn read(bytes: &[u8]) -> Self {
        if let Some((&OF_PASS, rest)) = bytes.split_first()
            && let Some((pass, text)) = rest.split_first_chunk()
        {
            let text = String::from_utf8_lossy(text);
            let mut lines = text.split('\n');
            let mut line = || lines.next().unwrap_or_default();
            let (pipeline, only, rejected) = (line().to_owned(), split(line()), split(line()));
            let only = (!only.is_empty()).then_some(only);
            let (pass, may_repeat) = (Some(Uuid::from_bytes(*pass)), line() == POSSIBLE_DUPLICATE);
            let (tries, from_step) = (Tries::read(line()), Some(line()).filter(|step| !step.is_empty()));
            let (from_step, to) = (from_step.map(str::to_owned), Destinations::read(line()));
            return Self::Pending(Pending {
                pipeline,
                pass,
                only,
                rejected,
                may_repeat,
                tries,
                from_step,
                to,
            });
        }
        let text = String::from_utf8_lossy(bytes);
        let mut lines = text.split('\n');
        let (kind, second) = (lines.next(), lines.next().unwrap_or_default());
        let mut to = None;
        let mut is_name = |line: &&str| {
            let read = Destinations::read(line);
            let is_name = read.is_none();
            to = to.take().or(read);
            is_name
        };
        let names = lines.filter(&mut is_name).map(str::to_owned).collect();
        match kind {
            Some("pending") => {
                let pipeline = second.to_owned();
                Self::Pending(Pending { pipeline, rejected: names, ..Pending::default() })
            }
            Some("open") => Self::Open { sinks: names, why: Reopened::read(second), to },
            _ => Self::Sent,
        }
    }
}

/// Names of sinks have no commas.
fn joined(names: &BTreeSet<String>) -> String {
    names.iter().map(String::as_str).collect::<Vec<_>>().join(",")
}

fn split(names: &str) -> BTreeSet<String> {
    names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

pub fn mark_key(letter: Offset) -> Vec<u8> {
    [LETTER_PREFIX, &letter.0.to_be_bytes()].concat()
}

/// Returns the letters whose own marks are empty. 0.1.0 wrote such a mark when it copied a letter, whether or not the
/// copy was sent later.
pub fn without_outcome(state: &StateEntries) -> BTreeSet<u64> {
    let is_empty = |(_, value): &&(Vec<u8>, Vec<u8>)| value.is_empty();
    state.iter().filter(is_empty).filter_map(|(key, _)| letter_of(key)).collect()
}

fn letter_of(key: &[u8]) -> Option<u64> {
    key.strip_prefix(LETTER_PREFIX)?.try_into().ok().map(u64::from_be_bytes)
}

/// Begin of the state keys of the records of a pass.
pub fn of_pass(pass: Uuid) -> Vec<u8> {
    [SENT_PREFIX, pass.as_bytes()].concat()
}

/// Offsets of letters, as ranges in order that do not touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Runs(Vec<Range<u64>>);

impl Runs {
    fn of(mut ranges: Vec<Range<u64>>) -> Self {
        ranges.sort_unstable_by_key(|range| range.start);
        let mut runs: Vec<Range<u64>> = Vec::new();
        for range in ranges {
            match runs.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => runs.push(range),
            }
        }
        Self(runs)
    }

    /// Returns the letters of all records.
    pub fn of_records(records: impl Iterator<Item = Sent>) -> Self {
        Self::of(records.flat_map(|record| record.letters.0).collect())
    }

    pub fn contains(&self, letter: u64) -> bool {
        let after = self.0.partition_point(|run| run.start <= letter);
        after > 0 && letter < self.0[after - 1].end
    }

    /// Returns the range from the first letter to behind the last.
    pub fn bounds(&self) -> Range<u64> {
        self.0.first().map_or(0, |run| run.start)..self.0.last().map_or(0, |run| run.end)
    }

    pub fn letters(&self) -> impl Iterator<Item = u64> {
        self.0.iter().cloned().flatten()
    }

    pub fn without(&self, others: &BTreeSet<u64>) -> Self {
        self.letters().filter(|letter| !others.contains(letter)).collect()
    }

    pub fn ranges(&self) -> &[Range<u64>] {
        &self.0
    }

    /// Returns the runs with those of others.
    pub fn with(&self, letters: impl IntoIterator<Item = u64>) -> Self {
        let more = letters.into_iter().map(|letter| letter..letter + 1);
        Self::of(self.0.iter().cloned().chain(more).collect())
    }

    /// Tells for each run how far it begins behind the one before, and how long it is.
    fn write(&self, bytes: &mut Vec<u8>) {
        let mut at = 0;
        for run in &self.0 {
            push_number(bytes, run.start - at);
            push_number(bytes, run.end - run.start);
            at = run.end;
        }
    }

    fn read(mut bytes: &[u8]) -> Option<Self> {
        let mut runs = Vec::new();
        let mut at = 0_u64;
        while !bytes.is_empty() {
            let start = at.checked_add(take_number(&mut bytes)?)?;
            at = start.checked_add(take_number(&mut bytes)?)?;
            runs.push(start..at);
        }
        Some(Self::of(runs))
    }
}

/// `3-17,20`: the first letter of each run, and its last.
impl fmt::Display for Runs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, run) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            write!(f, "{comma}{}", run.start)?;
            if run.end - run.start > 1 {
                write!(f, "-{}", run.end - 1)?;
            }
        }
        Ok(())
    }
}

impl FromStr for Runs {
    type Err = ParseIntError;

    /// Reads what [`fmt::Display`] wrote.
    fn from_str(text: &str) -> Result<Self, ParseIntError> {
        let run = |run: &str| {
            let (first, last) = run.split_once('-').unwrap_or((run, run));
            Ok(first.parse()?..last.parse::<u64>()?.saturating_add(1))
        };
        let runs = text.split(',').filter(|run| !run.is_empty()).map(run);
        Ok(Self::of(runs.collect::<Result<_, _>>()?))
    }
}

impl FromIterator<u64> for Runs {
    fn from_iter<I: IntoIterator<Item = u64>>(letters: I) -> Self {
        Self::of(letters.into_iter().map(|letter| letter..letter + 1).collect())
    }
}

/// Seven bits a byte, the lowest first; the eighth says that more follow.
fn push_number(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn take_number(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// A record: letters that one pass sent to the same sinks, or that somebody discarded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sent {
    /// The nil UUID, and no pipeline and no sinks: they are discarded.
    pub pass: Uuid,
    pub pipeline: String,
    /// The sinks whose databases must have them. Not those of which it is not known any more.
    pub sinks: BTreeSet<String>,
    /// Which sinks the messages of each letter went to, where that was decided.
    pub to: Option<Destinations>,
    pub letters: Runs,
}

impl Sent {
    /// As many records as their bounds need.
    pub fn records(
        pass: Uuid,
        pipeline: &str,
        sinks: &BTreeSet<String>,
        to: Option<&Destinations>,
        letters: &[u64],
    ) -> Vec<Change> {
        let record = |letters: &[u64]| Self {
            pass,
            pipeline: pipeline.to_owned(),
            sinks: sinks.clone(),
            to: to.cloned(),
            letters: letters.iter().copied().collect(),
        };
        letters.chunks(RECORD_LETTERS_MAX).map(|letters| record(letters).change()).collect()
    }

    pub fn key(&self) -> Vec<u8> {
        [&of_pass(self.pass)[..], &self.letters.bounds().start.to_be_bytes()].concat()
    }

    /// The pipeline and the sinks with the destinations, a line each, then the runs.
    pub fn change(&self) -> Change {
        let to = self.to.as_ref().map(Destinations::text).unwrap_or_default();
        let mut bytes = format!("{}\n{}{to}\n", self.pipeline, joined(&self.sinks)).into_bytes();
        self.letters.write(&mut bytes);
        (self.key(), Some(bytes))
    }

    /// `None`: no record, or one that this version cannot read.
    pub fn read(key: &[u8], value: &[u8]) -> Option<Self> {
        let (pass, _) = key.strip_prefix(SENT_PREFIX)?.split_first_chunk()?;
        let mut parts = value.splitn(3, |byte| *byte == b'\n');
        let mut text = || std::str::from_utf8(parts.next()?).ok();
        let (pipeline, sinks) = (text()?.to_owned(), text()?);
        let (sinks, to) = sinks.split_at(sinks.find('=').unwrap_or(sinks.len()));
        let (sinks, to) = (split(sinks), Destinations::read(to));
        let letters = Runs::read(parts.next()?)?;
        Some(Self { pass: Uuid::from_bytes(*pass), pipeline, sinks, to, letters })
    }
}

/// The records in the dead letters' state below [`MARK_PREFIX`].
pub fn records(state: &StateEntries) -> impl Iterator<Item = Sent> {
    state.iter().filter_map(|(key, value)| Sent::read(key, value))
}

/// What became of the letters that redrives took.
#[derive(Debug, Default)]
pub struct Marks {
    own: BTreeMap<u64, Mark>,
    sent: Runs,
    reasons: Reasons,
}

impl Marks {
    /// From the dead letters' state below [`MARK_PREFIX`].
    pub fn read(state: &StateEntries) -> Self {
        let own = |(key, value): &(Vec<u8>, Vec<u8>)| Some((letter_of(key)?, Mark::read(value)));
        let sent = Runs::of_records(records(state));
        Self { own: state.iter().filter_map(own).collect(), sent, reasons: Reasons::read(state) }
    }

    pub fn reasons(&self) -> &Reasons {
        &self.reasons
    }

    /// `None`: no redrive took the letter.
    pub fn get(&self, letter: u64) -> Option<&Mark> {
        self.own.get(&letter).or_else(|| self.sent.contains(letter).then_some(&Mark::Sent))
    }

    /// Whether no redrive sent the letter to all that it names, and none sends it.
    pub fn is_open(&self, letter: u64) -> bool {
        matches!(self.get(letter), None | Some(Mark::Open { .. }))
    }

    /// The letters' own marks.
    pub fn own(&self) -> impl Iterator<Item = (u64, &Mark)> {
        self.own.iter().map(|(letter, mark)| (*letter, mark))
    }

    /// The letters that are sent.
    pub fn all_sent(&self) -> Runs {
        let is_sent = |letter: &u64| matches!(self.own.get(letter), None | Some(Mark::Sent));
        let own =
            self.own.iter().filter(|(_, mark)| **mark == Mark::Sent).map(|(letter, _)| *letter..letter + 1);
        let mut ranges: Vec<_> = own.collect();
        for run in &self.sent.0 {
            match self.own.range(run.clone()).next() {
                None => ranges.push(run.clone()),
                Some(_) => ranges.extend(run.clone().filter(is_sent).map(|letter| letter..letter + 1)),
            }
        }
        Runs::of(ranges)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn state(changes: impl IntoIterator<Item = Change>) -> StateEntries {
        changes.into_iter().filter_map(|(key, value)| Some((key, value?))).collect()
    }

    #[test]
    fn a_mark_reads_as_it_was_written_and_an_empty_one_of_the_first_version_is_sent() {
        let pending = |pass: Option<Uuid>, only, rejected| {
            let may_repeat = pass.is_some_and(|pass| pass.is_max());
            let (pipeline, tries) = ("p".into(), Tries::read(if may_repeat { "7 af" } else { "" }));
            let from_step = may_repeat.then(|| "check".to_owned());
            let to = Destinations::read(if may_repeat { "=a;a,b" } else { "" });
            Mark::Pending(Pending { pipeline, pass, only, rejected, may_repeat, tries, from_step, to })
        };
        let open =
            |sinks: &[&str], why, to| Mark::Open { sinks: names(sinks), why, to: Destinations::read(to) };
        for mark in [
            Mark::Sent,
            pending(None, None, names(&[])),
            pending(None, None, names(&["a", "b"])),
            pending(Some(Uuid::from_bytes([b'\n'; 16])), None, names(&[])),
            pending(Some(Uuid::max()), Some(names(&["a", "b"])), names(&["b"])),
            open(&["a"], Reopened::Rejected(Tries::default()), ""),
            open(&["a"], Reopened::Rejected(Tries::read("2 1f")), "=a"),
            open(&["a", "b"], Reopened::Lost, "=;b"),
            open(&["a", "b"], Reopened::PossibleDuplicate, "="),
        ] {
            assert_eq!(Mark::read(&mark.bytes()), mark);
        }
        let marks = Marks::read(&state([(mark_key(Offset(7)), Some(Vec::new()))]));
        assert_eq!(marks.get(7), Some(&Mark::Sent));
    }

    #[test]
    fn records_read_as_they_were_written_and_say_which_letters_are_sent() {
        let (near, far) = (Vec::from_iter(10..5_000), vec![0, 7, 1 << 40, u64::MAX >> 1]);
        for letters in [&near, &far, &vec![3]] {
            let pass = Uuid::from_bytes([b'\n'; 16]);
            let to = Destinations::read(if letters.len() > 4 { "=a;a,b" } else { "" });
            let changes = state(Sent::records(pass, "p", &names(&["a", "b"]), to.as_ref(), letters));
            let read: Vec<_> = records(&changes).collect();
            assert_eq!(read.iter().flat_map(|sent| sent.letters.letters()).collect::<Vec<_>>(), *letters);
            assert!(read.iter().all(|sent| sent.pass == pass && sent.sinks == names(&["a", "b"])));
            assert!(read.iter().all(|sent| sent.to == to));
            let marks = Marks::read(&changes);
            assert!(letters.iter().all(|letter| marks.get(*letter) == Some(&Mark::Sent)));
            assert!(marks.is_open(5) && marks.is_open(6_000));
            assert_eq!(marks.all_sent().letters().collect::<Vec<_>>(), *letters);
        }
        let one = state(Sent::records(
            Uuid::nil(),
            "p",
            &names(&["warehouse"]),
            None,
            &Vec::from_iter(1_000..5_000),
        ));
        assert_eq!(one.len(), 1);
        assert!(one[0].1.len() < 32, "letters that lie together take no room");
    }

    #[test]
    fn a_letter_whose_own_mark_says_more_than_a_record_is_what_the_mark_says() {
        let mut changes = Sent::records(Uuid::nil(), "p", &names(&["a"]), None, &[1, 2, 3]);
        let open = Mark::Open { sinks: names(&["b"]), why: Reopened::Rejected(Tries::default()), to: None };
        changes.push((mark_key(Offset(2)), Some(open.bytes())));
        changes.push((mark_key(Offset(9)), Some(Vec::new())));
        let marks = Marks::read(&state(changes));
        assert!(marks.is_open(2) && !marks.is_open(1));
        assert_eq!(marks.all_sent().letters().collect::<Vec<_>>(), [1, 3, 9]);
    }
}
