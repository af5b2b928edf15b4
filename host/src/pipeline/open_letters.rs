//! Counts the dead letters that are open: rejected, and not sent again.
//!
//! The counts are of the letters that are there, whichever process wrote them. A look
//! reads what is new, and the marks of redrives where the stream has changed.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::letter::Letter;
use super::marks::{MARK_PREFIX, Mark, Marks, Reopened};
use crate::batch::Offset;
use crate::stream::{GapCause, Read, ReadError, Stream, Ticket};

/// Set in the letter's word where a redrive has sent it.
const CLOSED: u16 = 1 << 15;
/// Letters appended within this age together.
const AGE_US: u64 = 1_000_000;
/// A letter is a recent one for an hour. A run of rejections is over after an hour without one.
const RECENT_US: u64 = 3_600 * 1_000_000;
/// Characters of a reason that are kept.
const REASON_CHARS_MAX: usize = 200;

/// Two bytes for each message in the dead letters.
pub struct OpenLetters {
    dead_letters: Arc<dyn Stream>,
    pipelines: Vec<Pipeline>,
    /// Offset of the first of `letters`.
    first: u64,
    /// By offset: 0 for what is no letter, else one more than the number of its pipeline.
    letters: VecDeque<u16>,
    /// Offsets where letters of one age end, and the append time of the last of them.
    ages: VecDeque<(u64, u64)>,
    /// Open letters that retention removed and nobody has asked for yet, by pipeline.
    gone: BTreeMap<String, u64>,
    /// As of the last look.
    looked_at: Option<(Ticket, Offset)>,
}

struct Pipeline {
    name: String,
    open: u64,
    possible_duplicates: u64,
    /// When the newest run of rejections began: microseconds since 1970, UTC.
    run_us: u64,
    /// Reason of the newest letter, shortened.
    newest: String,
}

/// The open letters of a pipeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Open {
    pub letters: u64,
    /// Those among them that were rejected within the last [`RECENT_US`].
    pub recent: u64,
    /// Why the newest message was rejected, shortened.
    pub newest: String,
    /// Those among them that another copy of the data folder may have sent.
    pub possible_duplicates: u64,
    /// When the run of rejections began that the newest of them belongs to, to the second: microseconds
    /// since 1970, UTC. No hour of a run is without an open letter.
    pub since_us: u64,
}

impl OpenLetters {
    pub fn new(dead_letters: Arc<dyn Stream>) -> Self {
        let first = dead_letters.bounds().start.0;
        Self {
            dead_letters,
            pipelines: Vec::new(),
            first,
            letters: VecDeque::new(),
            ages: VecDeque::new(),
            gone: BTreeMap::new(),
            looked_at: None,
        }
    }

    /// Returns the open letters of each pipeline that has some.
    pub async fn look(&mut self) -> Result<BTreeMap<String, Open>, ReadError> {
        let start = self.dead_letters.bounds().start;
        let now = (*self.dead_letters.durable().borrow(), start);
        if self.looked_at != Some(now) {
            self.read_on().await?;
            self.mark();
            self.looked_at = Some(now);
            self.find_runs();
        }
        let first = self.first;
        self.forget_below(start.0);
        while let Some((end, append_us)) = self.ages.front().copied()
            && self.dead_letters.is_past_age(append_us)
        {
            self.forget_below(end);
        }
        if self.first > first {
            self.find_runs();
        }
        let recent = self.count_recent(now_us().saturating_sub(RECENT_US));
        let open = self.pipelines.iter().zip(recent).filter(|(pipeline, _)| pipeline.open > 0);
        Ok(open.map(|(pipeline, recent)| (pipeline.name.clone(), self.open_of(pipeline, recent))).collect())
    }

    /// Returns how many open letters retention removed since the last call, by pipeline: their
    /// messages are lost. Those that it removed before they were read, copies of redrives among
    /// them, have no pipeline (`""`).
    pub fn take_gone(&mut self) -> BTreeMap<String, u64> {
        std::mem::take(&mut self.gone)
    }

    /// Returns, by pipeline, how many letters are open that were appended since then.
    fn count_recent(&self, since_us: u64) -> Vec<u64> {
        let mut recent = vec![0; self.pipelines.len()];
        let age = self.ages.partition_point(|(_, append_us)| *append_us < since_us);
        let from = age.checked_sub(1).map_or(self.first, |before| self.ages[before].0);
        let passed = (from.saturating_sub(self.first) as usize).min(self.letters.len());
        for word in self.letters.range(passed..).filter(|word| **word != 0 && **word & CLOSED == 0) {
            recent[usize::from(*word) - 1] += 1;
        }
        recent
    }

    fn open_of(&self, pipeline: &Pipeline, recent: u64) -> Open {
        // Some of them may have gone since the marks were read.
        let possible_duplicates = pipeline.possible_duplicates.min(pipeline.open);
        Open {
            letters: pipeline.open,
            recent,
            newest: pipeline.newest.clone(),
            possible_duplicates,
            since_us: pipeline.run_us,
        }
    }

    /// Finds for each pipeline when its newest run of rejections began.
    fn find_runs(&mut self) {
        // Append time of the last open letter, by pipeline.
        let mut last_us: Vec<Option<u64>> = vec![None; self.pipelines.len()];
        let mut from = self.first;
        for &(end, append_us) in &self.ages {
            let words = from.saturating_sub(self.first) as usize..end.saturating_sub(self.first) as usize;
            for word in self.letters.range(words).filter(|word| **word != 0 && **word & CLOSED == 0) {
                let number = usize::from(*word) - 1;
                let last_us = last_us[number].replace(append_us);
                if last_us.is_none_or(|last_us| append_us.saturating_sub(last_us) > RECENT_US) {
                    self.pipelines[number].run_us = append_us;
                }
            }
            from = end;
        }
    }

    async fn read_on(&mut self) -> Result<(), ReadError> {
        let end = self.dead_letters.bounds().end;
        let mut cursor = self.dead_letters.peek(Offset(self.first + self.letters.len() as u64));
        while cursor.position() < end
            && let Some(read) = cursor.try_next().await?
        {
            let batch = match read {
                Read::Batch(batch) => batch,
                // Passed over at once: a look that is dropped at its next wait counts it no second time.
                Read::Gap { from, to, cause } => {
                    self.letters.resize((to.0 - self.first) as usize, 0);
                    if cause == GapCause::Trimmed {
                        *self.gone.entry(String::new()).or_default() += to.0 - from.0;
                    }
                    continue;
                }
            };
            for message in batch.messages() {
                let at = (message.offset().0 - self.first) as usize;
                // What cannot be read is no letter.
                self.letters.resize(at, 0);
                let letter = Letter::of(&message).filter(|letter| !letter.is_copy());
                let word = letter.as_ref().map_or(0, |letter| self.number_of(letter.pipeline) + 1);
                if let Some(letter) = letter {
                    let newest = &mut self.pipelines[usize::from(word) - 1].newest;
                    newest.clear();
                    newest.extend(letter.reason.chars().take(REASON_CHARS_MAX));
                }
                self.letters.push_back(word);
                self.count(word, true);
            }
            let end = self.first + self.letters.len() as u64;
            match self.ages.back_mut() {
                Some((last, append_us))
                    if append_us.div_euclid(AGE_US) == batch.now_us.div_euclid(AGE_US) =>
                {
                    (*last, *append_us) = (end, batch.now_us);
                }
                _ => self.ages.push_back((end, batch.now_us)),
            }
        }
        // A gap at the end.
        let read_to = cursor.position().0.max(self.first) - self.first;
        self.letters.resize(self.letters.len().max(read_to as usize), 0);
        Ok(())
    }

    /// Takes over what redrives made of the letters.
    fn mark(&mut self) {
        let marks = Marks::read(&self.dead_letters.state(MARK_PREFIX));
        self.count_possible_duplicates(&marks);
        let sent = marks.all_sent();
        let end = self.first + self.letters.len() as u64;
        let mut from = self.first;
        for run in sent.ranges() {
            let run = run.start.clamp(from, end)..run.end.clamp(from, end);
            self.close(from..run.start, false);
            self.close(run.clone(), true);
            from = run.end;
        }
        self.close(from..end, false);
    }

    fn count_possible_duplicates(&mut self, marks: &Marks) {
        self.pipelines.iter_mut().for_each(|pipeline| pipeline.possible_duplicates = 0);
        for (letter, mark) in marks.own() {
            let at = letter.checked_sub(self.first).and_then(|at| self.letters.get(at as usize));
            let number = at.map_or(0, |word| usize::from(*word & !CLOSED));
            if matches!(mark, Mark::Open { why: Reopened::PossibleDuplicate, .. }) && number > 0 {
                self.pipelines[number - 1].possible_duplicates += 1;
            }
        }
    }

    /// Closes the letters of a range, or opens them.
    fn close(&mut self, range: Range<u64>, is_closed: bool) {
        for offset in range {
            let word = &mut self.letters[(offset - self.first) as usize];
            let (before, was_closed) = (*word & !CLOSED, *word & CLOSED != 0);
            if before != 0 && is_closed != was_closed {
                *word ^= CLOSED;
                self.count(before, was_closed);
            }
        }
    }

    fn forget_below(&mut self, start: u64) {
        while self.first < start
            && let Some(word) = self.letters.pop_front()
        {
            self.first += 1;
            self.count(word, false);
            if word != 0 && word & CLOSED == 0 {
                let name = &self.pipelines[usize::from(word) - 1].name;
                match self.gone.get_mut(name) {
                    Some(gone) => *gone += 1,
                    None => drop(self.gone.insert(name.clone(), 1)),
                }
            }
        }
        self.first = self.first.max(start);
        while self.ages.front().is_some_and(|(end, _)| *end <= start) {
            self.ages.pop_front();
        }
    }

    /// Counts a letter, or no longer, unless it is closed.
    fn count(&mut self, word: u16, is_more: bool) {
        if word == 0 || word & CLOSED != 0 {
            return;
        }
        let open = &mut self.pipelines[usize::from(word) - 1].open;
        *open = if is_more { *open + 1 } else { *open - 1 };
    }

    fn number_of(&mut self, name: &str) -> u16 {
        let known = self.pipelines.iter().position(|pipeline| pipeline.name == name);
        let number = known.unwrap_or_else(|| {
            self.pipelines.push(Pipeline {
                name: name.to_owned(),
                open: 0,
                possible_duplicates: 0,
                run_us: 0,
                newest: String::new(),
            });
            self.pipelines.len() - 1
        });
        // Those past the number that a word can hold are counted as one.
        number.min(usize::from(CLOSED) - 2) as u16
    }
}

fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_micros() as u64)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::pipeline::Filter;
    use crate::pipeline::tests::harness::{World, chain};
    use crate::stream::memory::MemoryStream;

    async fn count(letters: &mut OpenLetters) -> u64 {
        letters.look().await.unwrap().get("p").map_or(0, |open| open.letters)
    }

    fn gone(letters: &mut OpenLetters) -> u64 {
        letters.take_gone().get("p").copied().unwrap_or_default()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn open_letters_are_counted_over_restarts_until_they_are_sent_or_gone() {
        let world = World::new(2, &[("default", "w")]);
        let broken = Arc::new(AtomicBool::new(true));
        let is_broken = Arc::clone(&broken);
        world
            .database("w")
            .refuse(move |_| is_broken.load(Ordering::Acquire).then(|| "no column".to_owned()));
        let mut letters = OpenLetters::new(Arc::clone(&world.dead));
        let process = world.start(chain(1, &[])).await;
        assert_eq!(count(&mut letters).await, 0);
        world.publish_many(5, 0, 10);
        process.drained().await;
        assert_eq!(count(&mut letters).await, 10);
        let open = letters.look().await.unwrap().remove("p").unwrap();
        assert_eq!((open.recent, &*open.newest), (10, "no column"));
        assert_eq!(letters.count_recent(now_us() + RECENT_US), [0], "an hour later none is recent");
        // Rejected again: open as before, no second letter.
        process.handle.redrive(&Filter::default()).await.unwrap();
        assert_eq!(count(&mut letters).await, 10);
        broken.store(false, Ordering::Release);
        let ids = Some(crate::pipeline::list_open(&*world.dead, None).await.unwrap()[..4].to_vec());
        process.handle.redrive(&Filter { ids, ..Filter::default() }).await.unwrap();
        assert_eq!(count(&mut letters).await, 6);
        process.stop().await;
        // Of another process.
        let mut letters = OpenLetters::new(Arc::clone(&world.dead));
        assert_eq!(count(&mut letters).await, 6);
        assert_eq!(gone(&mut letters), 0);
        world.dead_memory.trim(Offset(9));
        assert_eq!((count(&mut letters).await, gone(&mut letters)), (1, 5));
        world.dead_memory.pass_age();
        assert_eq!((count(&mut letters).await, gone(&mut letters)), (0, 1));
        assert_eq!((count(&mut letters).await, gone(&mut letters)), (0, 0));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn letters_that_go_before_they_are_read_are_counted_and_since_when_others_are_rejected_is_known() {
        let world = World::new(1, &[("default", "w")]);
        world.database("w").refuse(|_| Some("no column".to_owned()));
        let process = world.start(chain(1, &[])).await;
        let mut letters = OpenLetters::new(Arc::clone(&world.dead));
        world.publish_many(1, 0, 20);
        process.drained().await;
        world.dead_memory.trim(Offset(8));
        let since = |letters: &BTreeMap<String, Open>| letters["p"].since_us;
        let first = letters.look().await.unwrap();
        assert_eq!(first["p"].letters, 12);
        assert_eq!(letters.take_gone(), BTreeMap::from([(String::new(), 8)]));
        let appended = world.dead_memory.append_time(Offset(8));
        assert_eq!(since(&first).div_euclid(AGE_US), appended.div_euclid(AGE_US));
        process.stop().await;
    }

    /// Letters of last month that somebody keeps are no sign that messages are rejected since last month.
    #[test]
    fn a_run_of_rejections_begins_after_an_hour_in_which_no_letter_came_that_is_open() {
        let hour = RECENT_US;
        let since = |words: &[u16], hours: &[u64]| {
            let mut letters = OpenLetters::new(MemoryStream::with_hooks("dead-letters", 1));
            let numbers = [letters.number_of("p"), letters.number_of("q")];
            assert_eq!(numbers, [0, 1]);
            letters.letters = words.iter().copied().collect();
            letters.ages = (1..).zip(hours.iter().map(|hours| hours * hour / 2)).collect();
            letters.find_runs();
            letters.pipelines.iter().map(|pipeline| pipeline.run_us / (hour / 2)).collect::<Vec<_>>()
        };
        let (p, q, is_closed) = (1, 2, CLOSED);
        assert_eq!(since(&[p, p, p], &[10, 12, 14]), [10, 0], "never an hour without one");
        assert_eq!(since(&[p, p, p], &[10, 1_000, 1_001]), [1_000, 0], "the first is kept");
        assert_eq!(
            since(&[p, q, p, q], &[10, 1_000, 1_001, 1_002]),
            [1_001, 1_000],
            "each pipeline has its own"
        );
        assert_eq!(since(&[p, p | is_closed, p], &[10, 12, 14]), [14, 0], "the one between them was sent");
        assert_eq!(since(&[p, p | is_closed], &[10, 1_000]), [10, 0], "only the old one is left");
    }
}
