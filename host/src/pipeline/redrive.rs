//! Sends dead letters again, each once however often it is asked for.
//!
//! A redrive is a pass over the dead letters. It takes the letters that it is asked
//! for in parts, the oldest first: it marks those of a part as pending, and delivers
//! them from where they lie, with positions of its own in each sink (pipeline
//! `NAME/redrive`, a log that only this pass has), so that a letter becomes a row once
//! even where a redrive died half-way: the next start goes on with what is pending. A
//! letter goes to the sinks that it names, and is sent once each of them is past it
//! ([`again`]). A step's letter goes through the steps of now that its message has not been
//! through ([`step_history`](super::step_history)). What the same step or sink refuses again is open again; what another
//! one refuses is a new letter, which names the sink that it was for.
//!
//! What a pass has taken and not sent keeps retention by size waiting for as long as
//! the pass moves on; a pass that ends or stands holds nothing back.
//!
//! [`again`]: super::again

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::Batching;
use super::again::{Again, Ended, Sending};
use super::dead_letters::{DeadLetters, Error as DeadLettersError, Source};
use super::delivery::{Lend, Returned};
use super::destinations::Destinations;
use super::forget_marks::forget_marks;
use super::known::{Reader, index_within_offset};
use super::letter::{Letter, Names};
use super::marks::{Change, MARK_PREFIX, Mark, Marks, Pending, Reopened, mark_key};
use super::metrics::SinkMetrics;
use super::pass_letters::{PassLetters, Told};
use super::redrive_steps::{Steps, original};
use super::routes::SinkNumber;
use super::status::SinkShared;
use super::step_history;
use super::worker::Shared;
use super::writer::{Failed, Pace, Writer};
use crate::batch::{Batch, MessageRef, Offset};
use crate::sinks::{Epoch, Rows, Sink};
use crate::step::Chain;
use crate::stream::{self, AppendError, Attachment, OnLag, Read, ReadError, StateChange, Stream, Ticket};

/// Messages refused again before the sink's position moves past them, so that what
/// is remembered of them is forgotten.
const REFUSED_AT_ONCE: u64 = 1_000;
/// Why a sink gets nothing yet: it has not come to the message of a letter.
const AHEAD: &str = "ahead";
/// How long a redrive waits for a sink that is not far from it, and between two tries.
const AHEAD_WAIT_MAX: Duration = Duration::from_secs(5);
const AHEAD_PAUSE: Duration = Duration::from_millis(200);
/// Letters of one part of a pass.
const PART: usize = if cfg!(test) { 64 } else { 8_192 };
/// Letters of one pass: a sink's database lists those that the pass has sent.
const PASS_LETTERS_MAX: usize = 8 * PART;
/// Marks in one append, and their bytes.
pub const MARKS_MAX: usize = 4_096;
const MARKS_BYTES_MAX: usize = 256 << 10;
/// Letters of one `ids` filter and of a listing.
const LIST_MAX: usize = 100_000;

/// Which letters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Only those that this sink refused.
    pub sink: Option<String>,
    /// Only those that this step refused.
    pub step: Option<String>,
    /// Only these, by their offset in the dead letters.
    pub ids: Option<Vec<Offset>>,
    /// Also those that another copy of the data folder may have sent: their rows may come twice.
    pub possible_duplicates: bool,
    /// Only those that a step refused. Where the steps that a message has been through do not say where
    /// it enters, it enters at this one.
    pub from_step: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Rows written.
    pub sent: u64,
    /// Rows and messages refused again.
    pub refused: u64,
    /// What became of the letters themselves.
    pub letters: Ended,
    /// New letters: of messages that another step or sink rejected.
    pub new: u64,
    /// Sinks that could not take theirs, and why: ask again later.
    pub failed: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum RedriveError {
    #[error("the pipeline has no steps yet: wait until it runs")]
    NoSteps,
    #[error(transparent)]
    DeadLetters(#[from] DeadLettersError),
    #[error("step {0} cannot start: {1}")]
    Step(String, String),
    #[error("no step \"{0}\", known are {1}")]
    NoStep(String, String),
    #[error("{0}")]
    Held(String),
    #[error(
        "the dead letters have no room, which a redrive needs: free disk space, or raise \
         dead_letters.max_bytes; what is not sent is pending, or listed as before"
    )]
    NoRoom,
    #[error("the host stops")]
    Stopping,
}

impl From<ReadError> for RedriveError {
    fn from(error: ReadError) -> Self {
        Self::DeadLetters(error.into())
    }
}

/// Offsets of the letters that no redrive sent or sends, oldest first, at most 100,000.
pub async fn list_open(dead_letters: &dyn Stream, pipeline: Option<&str>) -> Result<Vec<Offset>, ReadError> {
    let marks = Marks::read(&dead_letters.state(MARK_PREFIX));
    let mut open = Vec::new();
    each(dead_letters, |batch| {
        for message in batch.messages().filter(|_| !dead_letters.is_past_age(batch.now_us)) {
            let wanted = Letter::of(&message).is_some_and(|letter| {
                !letter.is_copy() && pipeline.is_none_or(|pipeline| letter.pipeline == pipeline)
            });
            if wanted && marks.is_open(message.offset().0) && open.len() < LIST_MAX {
                open.push(message.offset());
            }
        }
        Ok(())
    })
    .await?;
    Ok(open)
}

/// What this process has of the claims of its redrives.
pub type Epochs = BTreeMap<(SinkNumber, Option<Uuid>), Epoch>;

/// Sends what earlier redrives left, and the letters that `filter` names.
pub async fn run(
    filter: Option<&Filter>,
    chain: &Chain,
    shared: &Arc<Shared>,
    dead_letters: &Arc<dyn Stream>,
    lenders: &[Lender],
    epochs: &mut Epochs,
    stopping: &CancellationToken,
) -> Result<Summary, RedriveError> {
    let mut summary = Summary::default();
    let names = shared.letters.names().clone();
    let gone = forget_marks(dead_letters, &names.pipelines, &shared.reasons).await?;
    if gone > 0 {
        summary.failed.push(cannot_be_read(gone));
    }
    let left = Again::left(&**dead_letters, &shared.letters, &shared.reasons).await?;
    let steps = Steps::of(chain).await?;
    if let Some(step) = filter.and_then(|filter| filter.from_step.as_deref())
        && step_history::place_of(step, steps.names()).is_none()
    {
        return Err(RedriveError::NoStep(step.to_owned(), step_history::known(steps.names())));
    }
    let mut redrive = Redrive {
        names,
        steps,
        shared,
        dead_letters,
        lenders,
        epochs,
        stopping,
        summary,
        left: HashSet::new(),
        without_sink: BTreeMap::new(),
    };
    for again in left {
        redrive.left.extend(again.letters());
        let from = again.start().unwrap_or_default();
        let mut pass = redrive.begin(again, from).await?;
        redrive.send_part(&mut pass).await?;
        redrive.end(&pass);
    }
    if let Some(filter) = filter {
        redrive.take_and_send(filter).await?;
    }
    Ok(redrive.summary)
}

/// Says that letters which a pass had taken are gone.
fn cannot_be_read(letters: u64) -> String {
    format!("{letters} dead letters could not be sent: retention has removed them, or they cannot be read")
}

/// Sets marks and records, those first that come first. Where there is no room for all of them, a
/// later run sets the others.
async fn set_marks<'m>(dead_letters: &Arc<dyn Stream>, marks: &'m [Change]) -> Result<(), RedriveError> {
    for marks in marks.chunk_by(together()) {
        let set = |(key, value): &'m Change| StateChange { key, value: value.as_deref() };
        if change(dead_letters, marks.iter().map(set).collect()).await?.is_none() {
            break;
        }
    }
    Ok(())
}

/// Whether a mark goes into one append with those before it: for `chunk_by`.
fn together() -> impl FnMut(&Change, &Change) -> bool {
    let bytes_of = |(key, value): &Change| key.len() + value.as_ref().map_or(0, Vec::len);
    let (mut count, mut bytes) = (1, 0);
    move |_, mark| {
        count += 1;
        bytes += bytes_of(mark);
        let fits = count <= MARKS_MAX && bytes <= MARKS_BYTES_MAX;
        if !fits {
            (count, bytes) = (1, bytes_of(mark));
        }
        fits
    }
}

/// Notes which sinks get the messages that were made of letters: once this returns, no position covers
/// the letters before it is durable.
async fn decide(
    dead_letters: &Arc<dyn Stream>,
    letters: &DeadLetters,
    decided: Vec<(Offset, Destinations)>,
) -> Result<(), RedriveError> {
    let again = letters.again().expect("of a redrive");
    for marks in again.decisions(&decided).chunk_by(together()) {
        let set = marks.iter().map(|(key, value)| StateChange { key, value: value.as_deref() });
        let ticket = change(dead_letters, set.collect()).await?.ok_or(RedriveError::NoRoom)?;
        letters.cover(ticket);
    }
    again.decide(decided);
    Ok(())
}

/// Changes marks; `None`: there is no room.
async fn change(
    dead_letters: &Arc<dyn Stream>,
    changes: Vec<StateChange<'_>>,
) -> Result<Option<Ticket>, RedriveError> {
    loop {
        match dead_letters.append(&[], &changes) {
            Ok(appended) => return Ok(Some(appended.ticket)),
            Err(AppendError::NoSpace) => return Ok(None),
            Err(AppendError::Full) => dead_letters.writable().await,
            Err(error) => return Err(DeadLettersError::from(error).into()),
        }
    }
}

/// One run of the redrives of a pipeline.
struct Redrive<'a> {
    names: Names,
    steps: Steps,
    shared: &'a Arc<Shared>,
    dead_letters: &'a Arc<dyn Stream>,
    lenders: &'a [Lender],
    epochs: &'a mut Epochs,
    /// Ends it between two batches: the delivery whose sink it has borrowed is to drain.
    stopping: &'a CancellationToken,
    summary: Summary,
    /// Letters that earlier redrives left.
    left: HashSet<u64>,
    /// Number of letters that go nowhere, by the sink that the pipeline does not have.
    without_sink: BTreeMap<String, u64>,
}

/// One pass, and the letters that are made of what it sends.
struct Pass {
    letters: Arc<DeadLetters>,
    hold: Hold,
    /// Positions of each sink by partition, once they are known.
    reached: Vec<Vec<Offset>>,
    /// What the database of each sink told of letters, and what the pass has done with them since.
    told: Vec<(Option<Told>, Vec<PassLetters>)>,
    /// Letters that it has taken.
    taken: usize,
}

impl Pass {
    fn again(&self) -> &Again {
        self.letters.again().expect("of a redrive")
    }

    /// Another pass takes its place, for the letters that come after those of this one.
    fn renew(&mut self) {
        self.again().renew();
        self.reached.iter_mut().for_each(Vec::clear);
        for (told, letters) in &mut self.told {
            told.iter_mut().for_each(Told::begin_pass);
            letters.clear();
        }
        self.taken = 0;
    }
}

/// Keeps retention by size waiting, until it is dropped.
struct Hold(Box<dyn Attachment>);

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.detach();
    }
}

impl Redrive<'_> {
    /// `from`: where the first of its letters lies.
    async fn begin(&mut self, again: Again, from: Offset) -> Result<Pass, RedriveError> {
        let dead_letters = self.dead_letters;
        let hold = Hold(dead_letters.attach(&format!("{}/redrive", self.shared.name), from, OnLag::Hold));
        let letters = DeadLetters::open(
            Arc::clone(dead_letters),
            self.names.clone(),
            &**dead_letters,
            u64::MAX,
            Some(again),
        )
        .await?;
        letters.check_all();
        let reached = vec![Vec::new(); self.names.sinks.len()];
        let told = reached.iter().map(|_| (None, Vec::new())).collect();
        Ok(Pass { letters: Arc::new(letters), hold, reached, told, taken: 0 })
    }

    /// A new pass, part by part. A sink that cannot take its letters ends it: what is not
    /// taken then is listed as before.
    async fn take_and_send(&mut self, filter: &Filter) -> Result<(), RedriveError> {
        let bounds = self.dead_letters.bounds();
        let marks = Marks::read(&self.dead_letters.state(MARK_PREFIX));
        let mut pass: Option<Pass> = None;
        let mut from = Some(bounds.start);
        while let Some(begin) = from {
            let part = self.next_part(filter, &marks, begin..bounds.end).await?;
            let Some((first, _)) = part.letters.first() else { break };
            let first = *first;
            let pass = match &mut pass {
                Some(pass) => pass,
                None => {
                    pass.insert(self.begin(Again::begin(&self.names, &self.shared.reasons), first).await?)
                }
            };
            if pass.taken + part.letters.len() > PASS_LETTERS_MAX {
                self.end(pass);
                pass.renew();
            }
            pass.taken += part.letters.len();
            pass.hold.0.advance(first);
            from = match self.take(pass.again(), part).await {
                Ok(next) => next,
                // What went before counts all the same.
                Err(error @ RedriveError::NoRoom) if self.summary.letters != Ended::default() => {
                    self.summary.failed.push(error.to_string());
                    break;
                }
                Err(error) => return Err(error),
            };
            self.send_part(pass).await?;
            if !self.summary.failed.is_empty() {
                break;
            }
        }
        if let Some(pass) = pass {
            self.end(&pass);
        }
        for (sink, letters) in std::mem::take(&mut self.without_sink) {
            let are = if letters == 1 { "dead letter is" } else { "dead letters are" };
            self.summary.failed.push(format!(
                "sink \"{sink}\": the pipeline does not have it any more, {letters} {are} for it: put it back into the \
                 routes, name it in renamed_from of the sink that takes its place, or discard them"
            ));
        }
        Ok(())
    }

    /// What is pending now waits for another redrive.
    fn end(&mut self, pass: &Pass) {
        let pending = pass.again().pending();
        self.summary.letters.pending += pending;
        self.shared.redrives.add(Ended { pending, ..Ended::default() });
        if pending == 0 {
            let of_pass = pass.again().pass();
            self.epochs.retain(|(_, pass), _| *pass != of_pass || of_pass.is_none());
        }
    }

    /// The first letters that are wanted, and not taken by another redrive.
    async fn next_part(
        &mut self,
        filter: &Filter,
        marks: &Marks,
        range: Range<Offset>,
    ) -> Result<Part, RedriveError> {
        let mut part = Part::default();
        let mut cursor = self.dead_letters.peek(range.start);
        while cursor.position() < range.end
            && let Some(read) = cursor.try_next().await?
        {
            let Read::Batch(batch) = read else { continue };
            if self.dead_letters.is_past_age(batch.now_us) {
                continue;
            }
            for message in batch.messages().filter(|message| range.contains(&message.offset())) {
                let Some(letter) = Letter::of(&message).filter(|letter| self.is_wanted(filter, letter))
                else {
                    continue;
                };
                let offset = message.offset();
                if filter.ids.as_ref().is_some_and(|ids| !ids.contains(&offset)) {
                    continue;
                }
                let mark = marks.get(offset.0);
                let (only, is_doubtful) = match mark {
                    None => (None, false),
                    Some(Mark::Open { sinks, why, .. }) => (Some(sinks), *why == Reopened::PossibleDuplicate),
                    Some(Mark::Sent | Mark::Pending(_)) => continue,
                };
                let taken = Pending {
                    only: only.cloned(),
                    may_repeat: filter.possible_duplicates,
                    tries: mark.map(Mark::tries).unwrap_or_default(),
                    from_step: filter.from_step.clone(),
                    to: mark.and_then(Mark::destinations).cloned(),
                    ..Pending::default()
                };
                let sending = Sending::of(&message, &letter, &self.shared.letters, &taken);
                // Else it would be marked as sent, and had gone nowhere.
                if !sending.goes_anywhere() {
                    for sink in sending.kept() {
                        let sink = self.names.name_of(sink).to_owned();
                        *self.without_sink.entry(sink).or_default() += 1;
                    }
                    continue;
                }
                if part.letters.len() == PART {
                    part.next = Some(offset);
                    return Ok(part);
                }
                if is_doubtful && !filter.possible_duplicates {
                    // Those that were left are counted.
                    self.summary.letters.possible_duplicates += u64::from(!self.left.contains(&offset.0));
                    continue;
                }
                part.letters.push((offset, sending));
            }
        }
        Ok(part)
    }

    fn is_wanted(&self, filter: &Filter, letter: &Letter<'_>) -> bool {
        let is_by = |sink| letter.sink.is_some_and(|by| self.names.is_same(sink, by, letter.at));
        !letter.is_copy()
            && self.names.has(letter)
            && filter.sink.as_deref().is_none_or(is_by)
            && filter.step.as_deref().is_none_or(|step| letter.step == Some(step))
            && (filter.from_step.is_none() || letter.sink.is_none())
    }

    /// Marks the letters of a part, durably. Where there is no room for all of them it takes
    /// the first ones. Returns where the next part begins, if there is one.
    async fn take(&mut self, again: &Again, mut part: Part) -> Result<Option<Offset>, RedriveError> {
        let mut last = Ticket::default();
        let mut is_first = true;
        while !part.letters.is_empty() {
            let mark = |(offset, sending): &(Offset, Sending)| {
                (mark_key(*offset), Some(again.mark(sending).bytes()))
            };
            let mut marks: Vec<Change> = part.letters.iter().take(MARKS_MAX).map(mark).collect();
            marks.truncate(marks.chunk_by(together()).next().map_or(0, <[_]>::len));
            let rest = part.letters.split_off(marks.len());
            let letters = std::mem::replace(&mut part.letters, rest);
            let changes: Vec<_> =
                marks.iter().map(|(key, value)| StateChange { key, value: value.as_deref() }).collect();
            last = loop {
                let appended = {
                    let _change = self.shared.reasons.change();
                    self.dead_letters.append(&[], &changes)
                };
                match appended {
                    Ok(appended) => break appended.ticket,
                    Err(AppendError::Full) => self.dead_letters.writable().await,
                    Err(AppendError::NoSpace) if is_first => return Err(RedriveError::NoRoom),
                    Err(AppendError::NoSpace) => {
                        part.next = letters.first().map(|(offset, _)| *offset);
                        self.shared.letters.durable(last).await?;
                        return Ok(part.next);
                    }
                    Err(error) => return Err(DeadLettersError::from(error).into()),
                }
            };
            is_first = false;
            again.take(letters);
        }
        self.shared.letters.durable(last).await?;
        Ok(part.next)
    }

    /// Sends what a pass has taken.
    async fn send_part(&mut self, pass: &mut Pass) -> Result<(), RedriveError> {
        let made = pass.letters.made();
        for number in 0..self.lenders.len() {
            if pass.again().range(number).is_some()
                && let Some(reason) = self.send_to(number, pass).await?
            {
                self.summary.failed.push(format!("sink \"{}\"{reason}", self.names.sink(number)));
            }
        }
        let (changes, ended) = pass.again().ended(&pass.reached);
        set_marks(self.dead_letters, &changes).await?;
        // What was sent is not lost, though retention may have taken it since.
        let gone = pass.again().lose(Offset(0)..self.dead_letters.bounds().start);
        if gone > 0 {
            self.summary.failed.push(cannot_be_read(gone));
        }
        let summary = &mut self.summary;
        summary.letters += ended;
        self.shared.redrives.add(ended);
        summary.new += pass.letters.made() - made;
        Ok(())
    }

    /// Delivers to one sink. Returns why not all of it, if so; what went there before counts
    /// all the same.
    async fn send_to(&mut self, number: SinkNumber, pass: &mut Pass) -> Result<Option<String>, RedriveError> {
        let (lenders, shared) = (self.lenders, self.shared);
        let lender = &lenders[number];
        let of_pass = pass.again().pass();
        let identity = pass.again().identity(self.dead_letters.identity());
        let pipelines = self.names.redrives();
        let patience = Instant::now() + AHEAD_WAIT_MAX;
        let mut has_learned = false;
        loop {
            let Some(borrowed) = Borrowed::take(&lender.lends).await else {
                return Ok(Some(" has stopped".to_owned()));
            };
            let claim = super::claim_of(&pipelines, &self.names.sinks[number], identity);
            let writer = Writer::new(None, number, claim, &pass.letters, shared.failures.clone());
            let held = self.epochs.get(&(number, of_pass)).copied();
            let metrics = SinkMetrics::of_redrive(&shared.name, self.names.sink(number));
            let pace = Pace::new(&lender.batching);
            let (told, pass_letters) = std::mem::take(&mut pass.told[number]);
            let sink = Some(borrowed.sink);
            let mut writer = Writer { sink, held, metrics, pace, told, pass_letters, ..writer };
            let result = self.deliver(&mut writer, lender, &pass.hold, has_learned).await;
            has_learned = true;
            // Given back whatever happened: the delivery opens its own claim again.
            let sink = writer.sink.take().expect("nobody borrows from a redrive");
            drop(borrowed.back.send(Returned { sink, has_written: writer.written > 0 }));
            self.summary.refused += writer.refused;
            if let Some(held) = writer.held {
                self.epochs.insert((number, of_pass), held);
            }
            pass.reached[number] = writer.positions;
            pass.told[number] = (writer.told, writer.pass_letters);
            let reason = match result {
                Ok(Ok(())) => return Ok(None),
                Err(RedriveError::Stopping) => return Err(RedriveError::Stopping),
                // Its delivery comes to the message meanwhile.
                Ok(Err(Failed::Later { kind: AHEAD, .. })) if Instant::now() < patience => {
                    tokio::time::sleep(AHEAD_PAUSE).await;
                    continue;
                }
                Ok(Err(Failed::Later { reason, .. } | Failed::Stop(reason))) => reason,
                Err(error) => error.to_string(),
            };
            return Ok(Some(format!(": {reason}")));
        }
    }

    /// Delivers one sink's part of what a pass has taken, where the sink has not got it.
    async fn deliver(
        &mut self,
        writer: &mut Writer,
        lender: &Lender,
        hold: &Hold,
        has_learned: bool,
    ) -> Result<Result<(), Failed>, RedriveError> {
        let (shared, number) = (self.shared, writer.number);
        let letters = Arc::clone(&writer.letters);
        let again = letters.again().expect("of a redrive");
        let Some(range) = again.range(number) else { return Ok(Ok(())) };
        // The letters that are sent or open are not taken, whatever the position: a new claim
        // begins at the start.
        if let Err(failed) = writer.open(&**self.dead_letters, stream::Delivered::ToNobody).await {
            return Ok(Err(failed));
        }
        // Not once more in one part: what it has sent since would look as if it came from elsewhere.
        if !has_learned
            && let Some(pass) = again.pass()
            && let Err(failed) = writer.learn(pass, &**self.dead_letters).await
        {
            return Ok(Err(failed));
        }
        let from = writer.positions.iter().copied().min().unwrap_or_default().max(range.start);
        let mut cursor = self.dead_letters.cursor(from);
        let mut refused_since = 0;
        while cursor.position() < range.end
            && let Some(read) = cursor.try_next().await?
        {
            if self.stopping.is_cancelled() {
                return Err(RedriveError::Stopping);
            }
            let batch = match read {
                Read::Batch(batch) => batch,
                Read::Gap { from, to, .. } => {
                    let gone = again.lose(from..to.min(range.end));
                    if gone > 0 {
                        self.summary.failed.push(cannot_be_read(gone));
                    }
                    continue;
                }
            };
            let is_due = |message: &MessageRef<'_>| {
                message.offset() >= writer.positions[usize::from(message.entry.partition.0)]
                    && again.goes_to(message.offset(), number)
            };
            let ahead = batch.messages().filter(is_due).find_map(|message| {
                let letter = Letter::of(&message)?;
                lender.is_before(&letter).then_some(letter.redrive_of.unwrap_or(message.offset().0))
            });
            if let Some(letter) = ahead {
                // Should retention remove the letter, the message itself would become a row too.
                let reason = format!(
                    "has not come to the message of dead letter {letter} yet: send the letters again later"
                );
                return Ok(Err(Failed::Later { kind: AHEAD, reason }));
            }
            let mut rows = Rows::default();
            let mut refused_before = HashSet::new();
            let mut decided = Vec::new();
            for i in 0..batch.len() {
                let message = batch.message(i);
                let Some(letter) = Letter::of(&message).filter(|_| is_due(&message)) else { continue };
                let out = match letter.source(&self.names) {
                    Source::Sink(_) => Some(original(&batch, i)),
                    Source::Step(_) | Source::Routes => {
                        let offset = message.offset();
                        let asked = again.asked(offset);
                        if asked.to.as_ref().is_some_and(|to| !to.has(self.names.id(number))) {
                            continue;
                        }
                        let known = letters.seen(std::iter::once(number), offset, offset);
                        let known = known.and_then(|mut known| known.pop());
                        let mut reader = known.unwrap_or(Reader { sink: number, ..Reader::default() });
                        if reader.seen.has_whole(offset) {
                            continue;
                        }
                        let message = original(&batch, i);
                        let made = self.steps.run(message, &letter, &asked, shared, &letters, &mut reader);
                        let made = made.await?;
                        if made.is_doubtful {
                            again.doubt(offset, number);
                            continue;
                        }
                        self.summary.refused += made.refused;
                        refused_since += made.refused;
                        decided.extend(made.to.map(|to| (offset, to)));
                        made.out
                    }
                };
                let Some(mut out) = out else { continue };
                for entry in out.entries.to_mut() {
                    entry.partition = message.entry.partition;
                }
                let known = |j: &usize| {
                    let offset = out.offset(&out.entries[*j]);
                    letters.has_row(number, offset, index_within_offset(&out, *j))
                };
                refused_before.extend((0..out.len()).filter(known).map(|j| rows.len() + j));
                rows.push_batch(out);
            }
            if !refused_before.is_empty() {
                rows = rows.select((0..rows.len()).filter(|row| !refused_before.contains(row)));
            }
            let count = rows.len() as u64;
            let refused = writer.refused;
            decide(self.dead_letters, &letters, decided).await?;
            // No further than what is taken: the letters behind it may be in the next part.
            let next = cursor.position().min(range.end);
            let upto = vec![next; writer.positions.len()];
            if let Err(error) = letters.durable(letters.ticket()).await {
                return Ok(Err(Failed::Stop(error.to_string())));
            }
            if rows.is_empty() && refused_since < REFUSED_AT_ONCE && next < range.end {
                continue;
            }
            refused_since = 0;
            if let Err(failed) = writer.write(&mut rows, &upto).await {
                self.summary.sent += count - rows.len() as u64 - (writer.refused - refused);
                return Ok(Err(failed));
            }
            self.summary.sent += count - (writer.refused - refused);
            hold.0.moves_on();
            let lowest = writer.positions.iter().copied().min().unwrap_or_default();
            letters.forget_below(number, lowest);
        }
        Ok(Ok(()))
    }
}

/// Letters that are taken together.
#[derive(Default)]
struct Part {
    letters: Vec<(Offset, Sending)>,
    /// Where the next part begins.
    next: Option<Offset>,
}

/// A sink that runs the steps itself: its dead letters, up to where its delivery is, and where it goes on with
/// what the steps wrote.
pub type CatchesUp = (Arc<DeadLetters>, Arc<SinkShared>, Offset);

/// A sink that redrives borrow from its delivery.
pub struct Lender {
    pub lends: mpsc::Sender<Lend>,
    /// The dead letters of each stream that the sink reads, and the status that says how far its delivery is.
    pub places: Vec<(Arc<DeadLetters>, Arc<SinkShared>)>,
    /// Sinks that are new to the out stream and run the steps themselves, up to an offset of the source; only for the
    /// out stream. A letter that is sent before they are past its message would come to them twice.
    pub others: Vec<CatchesUp>,
    pub batching: Batching,
}

impl Lender {
    /// Whether the sink has not come to the message of a letter yet.
    fn is_before(&self, letter: &Letter<'_>) -> bool {
        let lacks = |letters: &DeadLetters, shared: &SinkShared| {
            let committed = shared.committed.load(Ordering::Acquire);
            letters.is_of_source(letter) && (committed == u64::MAX || letter.offset >= committed)
        };
        self.places.iter().any(|(letters, shared)| lacks(letters, shared))
            || self
                .others
                .iter()
                .any(|(letters, shared, until)| letter.offset < until.0 && lacks(letters, shared))
    }
}

struct Borrowed {
    sink: Box<dyn Sink>,
    back: oneshot::Sender<Returned>,
}

impl Borrowed {
    /// `None`: its delivery has stopped.
    async fn take(lender: &mpsc::Sender<Lend>) -> Option<Self> {
        let (give, given) = oneshot::channel();
        let (back, returned) = oneshot::channel();
        lender.send(Lend { give, back: returned }).await.ok()?;
        Some(Self { sink: given.await.ok()?, back })
    }
}

async fn each(
    dead_letters: &dyn Stream,
    mut take: impl FnMut(&Batch) -> Result<(), ReadError>,
) -> Result<(), ReadError> {
    let end = dead_letters.bounds().end;
    let mut cursor = dead_letters.peek(dead_letters.bounds().start);
    while cursor.position() < end
        && let Some(read) = cursor.try_next().await?
    {
        if let Read::Batch(batch) = read {
            take(&batch)?;
        }
    }
    Ok(())
}
