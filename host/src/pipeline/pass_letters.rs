//! What passes of redrives did with letters, as the databases of sinks tell it.
//!
//! A pass keeps in each database, beside its position and in the transaction of the rows, which
//! letters it has sent there. A data folder that is restored from before a redrive, or copied, lists
//! these letters as open: before a pass sends a letter to a sink, it looks up what other passes
//! have done with it there ([`Told`]). What is a row already is not sent. Where several messages were
//! made of a letter and some of them rejected, the other copy of the folder has new letters of
//! those that this one has not: it is sent only where that is asked for.

use std::fmt;

use uuid::Uuid;

use super::marks::Runs;
use crate::batch::Offset;
use crate::sinks::{self, Name, PassPosition, Sink};
use crate::stream::{Opening, Stream};

/// What a pass did with the letters of one partition of a log, up to its position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassLetters {
    /// The dead letters' log.
    log: Uuid,
    /// Nothing of them was rejected.
    sent: Runs,
    /// Some of what was made of them was rejected: new letters have it.
    partly: Runs,
}

impl PassLetters {
    pub fn none_of(log: Uuid) -> Self {
        Self { log, sent: Runs::default(), partly: Runs::default() }
    }

    /// Returns what it is with further letters.
    pub fn with(&self, sent: &[u64], partly: &[u64]) -> Self {
        Self {
            log: self.log,
            sent: self.sent.with(sent.iter().copied()),
            partly: self.partly.with(partly.iter().copied()),
        }
    }

    /// Reads what [`fmt::Display`] wrote.
    pub fn read(text: &str) -> Option<Self> {
        let (log, letters) = text.split_once(' ')?;
        let (sent, partly) = letters.split_once(';').unwrap_or((letters, ""));
        Some(Self { log: log.parse().ok()?, sent: sent.parse().ok()?, partly: partly.parse().ok()? })
    }
}

/// `6a204bd8-9f2f-4a0c-a5a3-52ba1bd0d7b2 3-17,20;21`: the log, what is sent, what is sent in part.
impl fmt::Display for PassLetters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.log, self.sent)?;
        if self.partly == Runs::default() { Ok(()) } else { write!(f, ";{}", self.partly) }
    }
}

/// What a sink's database tells a pass of letters.
pub struct Told {
    /// What the pass itself has done there, by partition; `None`: the database does not say.
    own: Vec<Option<PassLetters>>,
    others: Vec<Other>,
    /// A redrive of 0.1.0, of which this folder does not know, may have sent any letter below.
    unknown_below: Offset,
}

/// What another pass did with letters that this folder has.
struct Other {
    pass: Uuid,
    /// End of the letters that this folder has in common with that pass.
    common: Offset,
    letters: PassLetters,
}

/// What became of a letter in a sink's database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// No other pass sent it there.
    Open,
    SentBy(Uuid),
    /// It may be rows, all or some.
    PossibleDuplicate,
}

impl Told {
    /// Asks a sink whose `claims` are the names under which its passes have positions. `pass`: the
    /// one that asks.
    pub async fn ask(
        sink: &mut dyn Sink,
        claims: &[Name],
        pass: Uuid,
        dead_letters: &dyn Stream,
    ) -> Result<Self, sinks::Error> {
        let identity = dead_letters.identity();
        let start = dead_letters.bounds().start;
        let told = sink.passes_of(claims, identity.log, start).await?;
        let of_first_version = sink.positions_of(claims, &[identity.log]).await?;
        let openings = dead_letters.openings();
        let mut own = vec![None; usize::from(identity.partitions)];
        let mut others = Vec::new();
        for PassPosition { pass: by, position, letters } in told {
            let Some(letters) = PassLetters::read(&letters).filter(|told| told.log == identity.log) else {
                continue;
            };
            if by == pass {
                let partition = usize::from(position.partition.0);
                own.get_mut(partition).into_iter().for_each(|own| *own = Some(letters.clone()));
                continue;
            }
            let common = position.lineage.locate(position.next, &openings, start);
            others.push(Other { pass: by, common, letters });
        }
        let reached = of_first_version.iter().map(|(_, _, next)| *next).max().unwrap_or_default();
        Ok(Self { own, others, unknown_below: unknown_below(reached, &openings) })
    }

    /// What the pass itself has done in a partition.
    pub fn own(&self, partition: usize) -> Option<&PassLetters> {
        self.own.get(partition)?.as_ref()
    }

    /// Another pass begins.
    pub fn begin_pass(&mut self) {
        self.own.fill(None);
    }

    pub fn of_letter(&self, letter: u64) -> Fate {
        let by = |sent: fn(&PassLetters) -> &Runs| {
            let has = |other: &&Other| letter < other.common.0 && sent(&other.letters).contains(letter);
            self.others.iter().find(has).map(|other| other.pass)
        };
        match by(|letters| &letters.sent) {
            Some(pass) => Fate::SentBy(pass),
            None if letter < self.unknown_below.0 => Fate::PossibleDuplicate,
            None => by(|letters| &letters.partly).map_or(Fate::Open, |_| Fate::PossibleDuplicate),
        }
    }
}

/// Returns below which offset letters may have been sent by a redrive of 0.1.0 that a folder with
/// these openings does not know. Such a redrive wrote copies behind its letters, so its position,
/// `reached`, lies behind all that the folder has of that version.
fn unknown_below(reached: Offset, openings: &[Opening]) -> Offset {
    match openings {
        [Opening { id: Opening::UNKNOWN, .. }, next, ..] if reached > next.first => next.first,
        _ => Offset(0),
    }
}

impl PassLetters {
    /// Whether the pass has sent a letter, all of it or in part.
    pub fn has(&self, letter: u64) -> Option<Part> {
        match (self.sent.contains(letter), self.partly.contains(letter)) {
            (true, _) => Some(Part::All),
            (false, true) => Some(Part::Some),
            (false, false) => None,
        }
    }
}

/// How much of a letter was sent, or rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    All,
    Some,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_of_a_pass_read_as_they_were_written() {
        let log = Uuid::from_u128(7);
        let none = PassLetters::none_of(log);
        let some = none.with(&[3, 4, 5, 9], &[8]).with(&[6], &[]);
        assert_eq!(some.to_string(), format!("{log} 3-6,9;8"));
        for letters in [&none, &some, &none.with(&[u64::MAX - 1], &[])] {
            assert_eq!(PassLetters::read(&letters.to_string()).as_ref(), Some(letters));
        }
        assert_eq!((some.has(4), some.has(8), some.has(7)), (Some(Part::All), Some(Part::Some), None));
        for text in ["", "7 3-6", &format!("{log} x")] {
            assert_eq!(PassLetters::read(text), None, "{text}");
        }
    }

    #[test]
    fn a_redrive_of_the_first_version_is_unknown_where_it_got_past_what_the_folder_has_of_it() {
        let opening = |id, first| Opening { id, first: Offset(first) };
        let upgraded = [opening(Opening::UNKNOWN, 0), opening(5, 100), opening(6, 300)];
        for (openings, reached, below) in
            [(&upgraded[..], 100, 0), (&upgraded, 101, 100), (&upgraded[1..], 101, 0), (&[], 9, 0)]
        {
            assert_eq!(unknown_below(Offset(reached), openings), Offset(below), "{reached}");
        }
    }
}
