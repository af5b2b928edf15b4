//! Sends dead letters again, each once however often it is asked for.
//!
//! A redrive first copies the letters it is asked for to the end of the dead
//! letters and marks them, in one append: a letter is copied once or not at
//! all. Then it delivers copies, in order, with positions of its own in each
//! sink (pipeline `NAME/redrive`, the log of the dead letters), so that a copy
//! becomes a row once even where a redrive died half-way: the next start goes on
//! with what is left. A copy goes to the sinks that its letter names. A letter is
//! sent once each of them is past its copy; until then it is pending ([`again`]).
//! What the same step or sink refuses again is open again; what another one
//! refuses is a new letter, which names the sink that it was for.
//!
//! [`again`]: super::again

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use super::again::{Again, Ended, KeyValue, MARK_PREFIX, Mark, mark_key, marks};
use super::dead_letters::{DeadLetters, Error as DeadLettersError, Source, new_message};
use super::delivery::{Control, Lend, Returned};
use super::known::{Reader, index_within_offset};
use super::letter::{self, Letter};
use super::routes::Sorted;
use super::status::SinkShared;
use super::worker::{Shared, Stripped, unknown_routes, without_letters};
use super::writer::{Failed, Writer};
use crate::batch::{Batch, Offset, Partition, Span};
use crate::problems::step_problems;
use crate::sinks::{Epoch, Rows, Sink};
use crate::step::{Attempt, Chain, Outcome, Refused, RefusedKind, Step};
use crate::stream::{self, AppendError, Read, ReadError, StateChange, Stream, Ticket};

/// Runs of one message that asks for a retry.
const ATTEMPTS_MAX: u32 = 3;
/// Messages refused again before the sink's position moves past them, so that what
/// is remembered of them is forgotten.
const REFUSED_AT_ONCE: u64 = 1_000;
/// Why a sink gets nothing yet: it has not come to the message of a letter.
const AHEAD: &str = "ahead";
/// How long a redrive waits for a sink that is not far from it, and between two tries.
const AHEAD_WAIT_MAX: Duration = Duration::from_secs(5);
const AHEAD_PAUSE: Duration = Duration::from_millis(200);
/// Marks removed in one append.
const MARKS_MAX: usize = 4_096;
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
    #[error("{0}")]
    Held(String),
    #[error(
        "the dead letters have no room, which a redrive needs: free disk space, or raise \
         dead_letters.max_bytes; what has been taken is pending"
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
    let marks = marks(dead_letters.state(MARK_PREFIX));
    let mut open = Vec::new();
    each(dead_letters, |batch| {
        for message in batch.messages().filter(|_| !dead_letters.is_past_age(batch.now_us)) {
            let wanted = Letter::of(&message).is_some_and(|letter| {
                !letter.is_copy() && pipeline.is_none_or(|pipeline| letter.pipeline == pipeline)
            });
            let is_open = matches!(marks.get(&message.offset().0), None | Some(Mark::Open { .. }));
            if wanted && is_open && open.len() < LIST_MAX {
                open.push(message.offset());
            }
        }
        Ok(())
    })
    .await?;
    Ok(open)
}

/// Sends the letters that `filter` names, and those that an earlier run left; with no
/// filter only the latter. `epochs`: by sink, what this process has of the claims.
pub async fn run(
    filter: Option<&Filter>,
    chain: &Chain,
    shared: &Arc<Shared>,
    dead_letters: &Arc<dyn Stream>,
    lenders: &[Lender],
    epochs: &mut [Option<Epoch>],
) -> Result<Summary, RedriveError> {
    forget_marks(dead_letters).await?;
    let sinks: Vec<_> = lenders.iter().map(|lender| lender.name.clone()).collect();
    if let Some(filter) = filter {
        copy_wanted(filter, &sinks, shared, dead_letters).await?;
    }
    let names = |name: &str| format!("{name}/redrive");
    let pipelines: Vec<_> =
        super::names_of(&shared.name, &shared.config.renamed_from).iter().map(|name| names(name)).collect();
    let identity = dead_letters.identity();
    let again = Again::read(&**dead_letters, &shared.name, &sinks).await?;
    let letters = DeadLetters::open(
        Arc::clone(dead_letters),
        &shared.name,
        sinks,
        &**dead_letters,
        u64::MAX,
        Some(again),
    )
    .await?;
    let letters = Arc::new(letters);
    letters.check_all();
    let mut steps = instances(chain).await?;
    let mut summary = Summary::default();
    let mut reached = vec![Vec::new(); lenders.len()];
    for (number, lender) in lenders.iter().enumerate() {
        let sink = &lender.name;
        let patience = Instant::now() + AHEAD_WAIT_MAX;
        loop {
            let Some(borrowed) = Borrowed::take(&lender.control).await else {
                summary.failed.push(format!("sink \"{sink}\" has stopped"));
                break;
            };
            let claim = super::claim_of(&pipelines, &super::names_of(sink, &lender.formerly), identity);
            let writer = Writer::new(None, number, claim, &letters, shared.failures.clone());
            // Letters that are sent or open are not delivered again, whatever the position:
            // a new claim begins at the start.
            let mut writer = Writer { held: epochs[number], ..writer };
            let (sink_back, result) =
                deliver(&mut writer, lender, borrowed.sink, &mut steps, shared, dead_letters, &mut summary)
                    .await;
            // Given back whatever happened: the delivery opens its own claim again.
            drop(borrowed.back.send(Returned { sink: sink_back, has_written: writer.written > 0 }));
            summary.refused += writer.refused;
            epochs[number] = writer.held;
            reached[number] = writer.positions;
            let reason = match result {
                Ok(Ok(())) => break,
                Err(RedriveError::Stopping) => return Err(RedriveError::Stopping),
                // Its delivery comes to the message meanwhile.
                Ok(Err(Failed::Later { kind: AHEAD, .. })) if Instant::now() < patience => {
                    tokio::time::sleep(AHEAD_PAUSE).await;
                    continue;
                }
                Ok(Err(Failed::Later { reason, .. } | Failed::Stop(reason))) => reason,
                // What went to the sinks before counts all the same.
                Err(error) => error.to_string(),
            };
            summary.failed.push(format!("sink \"{sink}\": {reason}"));
            break;
        }
    }
    let (changes, ended) = letters.again().map(|again| again.ended(&reached)).unwrap_or_default();
    set_marks(dead_letters, &changes).await?;
    summary.letters = ended;
    summary.new = letters.made();
    Ok(summary)
}

/// Takes away the marks of letters that retention has removed.
async fn forget_marks(dead_letters: &Arc<dyn Stream>) -> Result<(), RedriveError> {
    let start = dead_letters.bounds().start;
    let gone = marks(dead_letters.state(MARK_PREFIX)).into_keys().filter(|offset| *offset < start.0);
    let keys: Vec<_> = gone.map(|offset| mark_key(Offset(offset))).collect();
    for keys in keys.chunks(MARKS_MAX) {
        change(dead_letters, keys.iter().map(|key| StateChange { key, value: None }).collect()).await?;
    }
    Ok(())
}

async fn set_marks<'m>(dead_letters: &Arc<dyn Stream>, marks: &'m [KeyValue]) -> Result<(), RedriveError> {
    for marks in marks.chunks(MARKS_MAX) {
        let set = |(key, value): &'m KeyValue| StateChange { key, value: Some(value) };
        change(dead_letters, marks.iter().map(set).collect()).await?;
    }
    Ok(())
}

/// Changes marks; where there is no room, not now: a later run does.
async fn change(dead_letters: &Arc<dyn Stream>, changes: Vec<StateChange<'_>>) -> Result<(), RedriveError> {
    loop {
        match dead_letters.append(&[], &changes) {
            Ok(_) | Err(AppendError::NoSpace) => return Ok(()),
            Err(AppendError::Full) => dead_letters.writable().await,
            Err(error) => return Err(DeadLettersError::from(error).into()),
        }
    }
}

/// Copies and marks, one append a letter, so that each is copied once.
async fn copy_wanted(
    filter: &Filter,
    sinks: &[String],
    shared: &Shared,
    dead_letters: &Arc<dyn Stream>,
) -> Result<(), RedriveError> {
    let marks = marks(dead_letters.state(MARK_PREFIX));
    let partitions = dead_letters.identity().partitions;
    let end = dead_letters.bounds().end;
    let mut cursor = dead_letters.peek(dead_letters.bounds().start);
    let mut last = Ticket::default();
    while cursor.position() < end
        && let Some(read) = cursor.try_next().await?
    {
        let Read::Batch(batch) = read else { continue };
        if dead_letters.is_past_age(batch.now_us) {
            continue;
        }
        for message in batch.messages().filter(|message| message.offset() < end) {
            let Some(letter) = Letter::of(&message) else { continue };
            let only = match marks.get(&message.offset().0) {
                None => None,
                Some(Mark::Open { sinks }) => Some(sinks),
                Some(Mark::Sent | Mark::Pending { .. }) => continue,
            };
            let names = |sink: &String| letter.names(sink) && only.is_none_or(|only| only.contains(sink));
            let wanted = !letter.is_copy()
                && letter.pipeline == &*shared.name
                // Else it would be marked as sent, and had gone nowhere.
                && sinks.iter().any(names)
                && filter.sink.as_deref().is_none_or(|sink| letter.sink == Some(sink))
                && filter.step.as_deref().is_none_or(|step| letter.step == Some(step))
                && filter.ids.as_ref().is_none_or(|ids| ids.contains(&message.offset()));
            if !wanted {
                continue;
            }
            let properties = letter::copy_properties(&message, only);
            let copy = new_message(&message, &properties, partitions);
            let key = mark_key(message.offset());
            let pending =
                Mark::Pending { pipeline: shared.name.to_string(), rejected: BTreeSet::new() }.bytes();
            let mark = StateChange { key: &key, value: Some(&pending) };
            last = loop {
                match dead_letters.append(&[copy], &[mark]) {
                    Ok(appended) => break appended.ticket,
                    Err(AppendError::Full) => dead_letters.writable().await,
                    Err(AppendError::NoSpace) => return Err(RedriveError::NoRoom),
                    Err(error) => return Err(DeadLettersError::from(error).into()),
                }
            };
        }
    }
    if last != Ticket::default() && dead_letters.durable().wait_for(|ticket| *ticket >= last).await.is_err() {
        let reason = dead_letters.stopped().await;
        return Err(DeadLettersError::from(AppendError::Stopped(reason)).into());
    }
    Ok(())
}

type Delivered = Result<Result<(), Failed>, RedriveError>;

/// Delivers one sink's part of all copies that it has not got.
async fn deliver(
    writer: &mut Writer,
    lender: &Lender,
    sink: Box<dyn Sink>,
    steps: &mut Vec<Box<dyn Step>>,
    shared: &Arc<Shared>,
    dead_letters: &Arc<dyn Stream>,
    summary: &mut Summary,
) -> (Box<dyn Sink>, Delivered) {
    writer.sink = Some(sink);
    let result = deliver_with(writer, lender, steps, shared, dead_letters, summary).await;
    let sink = writer.sink.take().expect("nobody borrows from a redrive");
    (sink, result)
}

async fn deliver_with(
    writer: &mut Writer,
    lender: &Lender,
    steps: &mut Vec<Box<dyn Step>>,
    shared: &Arc<Shared>,
    dead_letters: &Arc<dyn Stream>,
    summary: &mut Summary,
) -> Delivered {
    if let Err(failed) = writer.open(&**dead_letters, stream::Delivered::ToNobody).await {
        return Ok(Err(failed));
    }
    let marks = marks(dead_letters.state(MARK_PREFIX));
    let is_pending = |letter: &Letter<'_>| {
        let mark = letter.redrive_of.and_then(|of| marks.get(&of));
        // Without a mark retention has removed the letter, and not this copy.
        !matches!(mark, Some(Mark::Sent | Mark::Open { .. }))
    };
    let committed = lender.shared.committed.load(Ordering::Acquire);
    let name = writer.claim.sink.clone();
    let end = dead_letters.bounds().end;
    let from = writer.positions.iter().copied().min().unwrap_or_default();
    let mut cursor = dead_letters.cursor(from);
    let mut refused_since = 0;
    while cursor.position() < end
        && let Some(read) = cursor.try_next().await?
    {
        let Read::Batch(batch) = read else { continue };
        let ahead = batch.messages().find_map(|message| {
            let letter = Letter::of(&message).filter(|letter| letter.is_copy() && letter.names(&name))?;
            let is_ahead = shared.letters.is_of_source(&letter)
                && is_pending(&letter)
                && message.offset() >= writer.positions[usize::from(message.entry.partition.0)]
                && (committed == u64::MAX || letter.offset >= committed);
            is_ahead.then_some(letter.redrive_of.unwrap_or_default())
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
        for i in 0..batch.len() {
            let message = batch.message(i);
            let position = writer.positions[usize::from(message.entry.partition.0)];
            let Some(letter) = Letter::of(&message) else { continue };
            if !letter.is_copy() || letter.pipeline != &*shared.name || message.offset() < position {
                continue;
            }
            if !letter.names(&name) || !is_pending(&letter) {
                continue;
            }
            let out = match letter.source() {
                Source::Sink(_) => Some(original(&batch, i)),
                Source::Step(step) => {
                    let offset = message.offset();
                    let known = writer.letters.seen(std::iter::once(writer.number), offset, offset);
                    let known = known.and_then(|mut known| known.pop());
                    let mut reader = known.unwrap_or(Reader { sink: writer.number, ..Reader::default() });
                    if reader.seen.has_whole(offset) {
                        continue;
                    }
                    let (sorted, refused) =
                        through(original(&batch, i), step, steps, shared, &writer.letters, &mut reader)
                            .await?;
                    summary.refused += refused;
                    refused_since += refused;
                    sorted.and_then(|sorted| sorted.for_sink(writer.number))
                }
            };
            let Some(mut out) = out else { continue };
            for entry in out.entries.to_mut() {
                entry.partition = message.entry.partition;
            }
            let known = |j: &usize| {
                let offset = out.offset(&out.entries[*j]);
                writer.letters.has_row(writer.number, offset, index_within_offset(&out, *j))
            };
            refused_before.extend((0..out.len()).filter(known).map(|j| rows.len() + j));
            rows.push_batch(out);
        }
        if !refused_before.is_empty() {
            rows = rows.select((0..rows.len()).filter(|row| !refused_before.contains(row)));
        }
        let count = rows.len() as u64;
        let refused = writer.refused;
        let upto = vec![cursor.position(); writer.positions.len()];
        if let Err(error) = writer.letters.durable(writer.letters.ticket()).await {
            return Ok(Err(Failed::Stop(error.to_string())));
        }
        if rows.is_empty() && refused_since < REFUSED_AT_ONCE && cursor.position() < end {
            continue;
        }
        refused_since = 0;
        if let Err(failed) = writer.write(&mut rows, &upto).await {
            summary.sent += count - rows.len() as u64 - (writer.refused - refused);
            return Ok(Err(failed));
        }
        summary.sent += count - (writer.refused - refused);
        let lowest = writer.positions.iter().copied().min().unwrap_or_default();
        writer.letters.forget_below(writer.number, lowest);
    }
    Ok(Ok(()))
}

/// A copy as the message that was refused.
fn original(batch: &Batch, i: usize) -> Batch {
    let message = batch.message(i);
    let properties = letter::without_letter(message.properties());
    let mut entry = *message.entry;
    let mut segments = batch.segments.clone();
    entry.properties = Span::new(segments.len(), 0, properties.len());
    segments.push(properties.into());
    Batch { base: batch.base, now_us: batch.now_us, segments, entries: vec![entry].into(), exclusive: false }
}

/// Runs a message for one sink from the step on that refused it. What is
/// refused again becomes a new letter for that sink.
async fn through(
    mut batch: Batch,
    from: &str,
    steps: &mut Vec<Box<dyn Step>>,
    shared: &Shared,
    letters: &DeadLetters,
    reader: &mut Reader,
) -> Result<(Option<Sorted>, u64), RedriveError> {
    let mut refused = 0;
    let begin = if from == super::ROUTES_STEP {
        steps.len()
    } else {
        let place = steps.iter().position(|step| &*step.id().step == from);
        match place {
            Some(place) => place,
            None => {
                let reason = format!("step \"{from}\" is not among the pipeline's steps any more");
                let again = [Refused { index: 0, kind: RefusedKind::Failed, reason }];
                refused += refuse(&batch, None, from, &again, letters, reader).await?;
                return Ok((None, refused));
            }
        }
    };
    for place in begin..steps.len() {
        let name = Arc::clone(&steps[place].id().step);
        let indexes;
        (batch, indexes) = without_letters(batch, &name, std::slice::from_ref(reader));
        if batch.is_empty() {
            return Ok((None, refused));
        }
        let partition = batch.entries.first().map(|entry| entry.partition).unwrap_or_default();
        let all = (0..batch.len() as u32).collect::<Vec<_>>();
        let mut attempt = Attempt::FIRST;
        let outcome = loop {
            let outcome = run_step(steps, place, batch.clone(), partition, attempt).await?;
            match &outcome.retry {
                Some(reason) if outcome.held => return Err(RedriveError::Held(reason.clone())),
                Some(_) if !attempt.is_last => {
                    let number = attempt.number + 1;
                    attempt = Attempt { number, is_last: number == ATTEMPTS_MAX };
                }
                _ => break outcome,
            }
        };
        if let Some(reason) = &outcome.retry {
            let again: Vec<_> = all
                .iter()
                .map(|index| Refused { index: *index, kind: RefusedKind::Retries, reason: reason.clone() })
                .collect();
            refused += refuse(&batch, indexes, &name, &again, letters, reader).await?;
            return Ok((None, refused));
        }
        refused += refuse(&batch, indexes, &name, &outcome.refused, letters, reader).await?;
        batch = outcome.passed;
        if batch.is_empty() {
            return Ok((None, refused));
        }
    }
    let (batch, indexes) = without_letters(batch, super::ROUTES_STEP, std::slice::from_ref(reader));
    let sorted = shared.routes.sort(batch);
    let unknown = unknown_routes(&shared.routes, &sorted.batch, &sorted.unknown);
    refused += refuse(&sorted.batch, indexes, super::ROUTES_STEP, &unknown, letters, reader).await?;
    Ok((Some(sorted), refused))
}

/// Off the async threads, as long as the step's limits let it take. After `Stopping`
/// there are no steps any more.
async fn run_step(
    steps: &mut Vec<Box<dyn Step>>,
    place: usize,
    batch: Batch,
    partition: Partition,
    attempt: Attempt,
) -> Result<Outcome, RedriveError> {
    let mut taken = std::mem::take(steps);
    let run = move || (taken[place].run(batch, partition, attempt), taken);
    match tokio::task::spawn_blocking(run).await {
        Ok((outcome, taken)) => {
            *steps = taken;
            Ok(outcome)
        }
        Err(_) => Err(RedriveError::Stopping),
    }
}

/// How many new letters there are. `indexes`: as [`without_letters`] gave them.
async fn refuse(
    batch: &Batch,
    indexes: Option<Vec<u32>>,
    step: &str,
    refused: &[Refused],
    letters: &DeadLetters,
    reader: &mut Reader,
) -> Result<u64, RedriveError> {
    let partition = batch.entries.first().map(|entry| entry.partition).unwrap_or_default();
    let batch = Stripped { batch, indexes, partition };
    let refusals = batch.refusals(step, refused);
    let refused = letters.refuse(&refusals, std::slice::from_mut(reader)).await?;
    if refused.done < refusals.len() { Err(RedriveError::NoRoom) } else { Ok(refused.letters) }
}

async fn instances(chain: &Chain) -> Result<Vec<Box<dyn Step>>, RedriveError> {
    let chain = chain.clone();
    let make = move || {
        let mut steps = Vec::new();
        for factory in chain.steps.iter() {
            let made = factory
                .instantiate(0)
                .map_err(|problems| RedriveError::Step(factory.describe(), step_problems(&problems)))?;
            steps.push(made);
        }
        Ok(steps)
    };
    match tokio::task::spawn_blocking(make).await {
        Ok(made) => made,
        Err(_) => Err(RedriveError::Stopping),
    }
}

/// A sink that redrives borrow from its delivery.
pub struct Lender {
    pub name: String,
    /// The name that it had.
    pub formerly: Option<String>,
    pub control: mpsc::Sender<Control>,
    /// Up to where the delivery itself is.
    pub shared: Arc<SinkShared>,
}

struct Borrowed {
    sink: Box<dyn Sink>,
    back: oneshot::Sender<Returned>,
}

impl Borrowed {
    /// `None`: its delivery has stopped.
    async fn take(lender: &mpsc::Sender<Control>) -> Option<Self> {
        let (give, given) = oneshot::channel();
        let (back, returned) = oneshot::channel();
        lender.send(Control::Lend(Lend { give, back: returned })).await.ok()?;
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
