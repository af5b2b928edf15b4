//! How a redrive runs the messages of dead letters through the steps.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::again::Asked;
use super::dead_letters::{DeadLetters, Refusal, Source};
use super::destinations::Destinations;
use super::known::{Piece, Reader};
use super::letter::{self, Letter};
use super::redrive::RedriveError;
use super::routes::{Routes, SinkNumber, Sorted};
use super::step_history::StepHistory;
use super::stripped::{Stripped, without_letters};
use super::unrouted::{Inputs, Unrouted};
use super::worker::Shared;
use crate::batch::{Batch, Partition, Span};
use crate::problems::step_problems;
use crate::step::{Attempt, Chain, Outcome, Refused, RefusedKind, Step};

/// Runs of one message that asks for a retry.
const ATTEMPTS_MAX: u32 = 3;

/// A redrive's own instances of the steps of a chain.
pub struct Steps {
    /// After [`RedriveError::Stopping`] there are none any more.
    steps: Vec<Box<dyn Step>>,
    names: Vec<Arc<str>>,
}

/// What the steps made of a message for one sink.
#[derive(Default)]
pub struct Made {
    /// What the sink gets; `None`: nothing.
    pub out: Option<Batch>,
    /// Which sinks get what was made of the message, where this run decides it.
    pub to: Option<Destinations>,
    /// Messages that were rejected.
    pub refused: u64,
    /// Nothing was run: see [`is_by_others`].
    pub is_doubtful: bool,
}

/// A message of a letter on its way.
struct Message<'a> {
    history: StepHistory,
    /// Place of the step that it enters at.
    entry: usize,
    partition: Partition,
    letters: &'a DeadLetters,
    reader: &'a mut Reader,
    made: Made,
}

impl Message<'_> {
    /// Rejects the whole message as who rejected it before, for a reason of the redrive itself.
    async fn refuse_whole(
        &mut self,
        batch: &Batch,
        letter: &Letter<'_>,
        reason: String,
    ) -> Result<(), RedriveError> {
        let by = letter.source(self.letters.names());
        let refused = [Refused { index: 0, kind: RefusedKind::Failed, reason }];
        let batch = Stripped { batch, indexes: None, partition: self.partition };
        self.refuse(&batch.refusals(by, &refused, letter.steps.unwrap_or_default())).await
    }

    async fn refuse(&mut self, refusals: &[Refusal<'_>]) -> Result<(), RedriveError> {
        let refused = self.letters.refuse(refusals, std::slice::from_mut(self.reader)).await?;
        self.made.refused += refused.letters;
        if refused.done < refusals.len() { Err(RedriveError::NoRoom) } else { Ok(()) }
    }
}

impl Steps {
    pub async fn of(chain: &Chain) -> Result<Self, RedriveError> {
        let names = chain.steps.iter().map(|step| Arc::clone(&step.id().step)).collect();
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
            Ok(made) => made.map(|steps| Self { steps, names }),
            Err(_) => Err(RedriveError::Stopping),
        }
    }

    pub fn names(&self) -> &[Arc<str>] {
        &self.names
    }

    /// Runs the message of a step's letter for one sink, from the step on where [`Letter::entry`] has it
    /// enter. What is rejected becomes a letter for that sink, or stays the one that it is.
    pub async fn run(
        &mut self,
        batch: Batch,
        letter: &Letter<'_>,
        asked: &Asked,
        shared: &Shared,
        letters: &DeadLetters,
        reader: &mut Reader,
    ) -> Result<Made, RedriveError> {
        let partition = batch.entries.first().map(|entry| entry.partition).unwrap_or_default();
        if !asked.may_repeat && is_by_others(reader, &self.names, letters.names().sink(reader.sink)) {
            return Ok(Made { is_doubtful: true, ..Made::default() });
        }
        let history = StepHistory::default();
        let mut message = Message { history, entry: 0, partition, letters, reader, made: Made::default() };
        match letter.entry(asked.from_step.as_deref(), &self.names) {
            Ok(entry) => {
                message.history = letter.history_at(entry, &self.names);
                message.entry = entry;
            }
            Err(reason) => {
                message.refuse_whole(&batch, letter, reason).await?;
                return Ok(message.made);
            }
        }
        let (made, inputs) = self.through(batch.clone(), shared.routes.now(), &mut message).await?;
        let sorted = match made.is_empty() {
            true => shared.routes.now().sort(made),
            false => route(made, inputs, &self.names, shared, &mut message).await?,
        };
        if let Err(reason) = message.give(&sorted, letter, asked) {
            message.refuse_whole(&batch, letter, reason).await?;
        }
        Ok(message.made)
    }

    async fn through(
        &mut self,
        mut batch: Batch,
        routes: &Routes,
        message: &mut Message<'_>,
    ) -> Result<(Batch, Inputs), RedriveError> {
        let mut inputs = Inputs::from(message.entry);
        for place in message.entry..self.names.len() {
            let name = Arc::clone(&self.names[place]);
            let indexes;
            (batch, indexes) =
                without_letters(batch, Source::Step(&name), std::slice::from_ref(message.reader));
            if batch.is_empty() {
                break;
            }
            let outcome = self.run_step(place, &batch, message.partition).await?;
            let history = message.history.through(&self.names, message.entry, place).to_string();
            let stripped = Stripped { batch: &batch, indexes, partition: message.partition };
            message.refuse(&stripped.refusals(Source::Step(&name), &outcome.refused, &history)).await?;
            let input = std::mem::replace(&mut batch, outcome.passed);
            inputs.keep(place, input, routes.are_known(&batch));
        }
        Ok((batch, inputs))
    }

    /// Runs one step, again where it asks for it.
    async fn run_step(
        &mut self,
        place: usize,
        batch: &Batch,
        partition: Partition,
    ) -> Result<Outcome, RedriveError> {
        let mut attempt = Attempt::FIRST;
        let mut outcome = loop {
            let outcome = self.run_once(place, batch.clone(), partition, attempt).await?;
            match &outcome.retry {
                Some(reason) if outcome.held => return Err(RedriveError::Held(reason.clone())),
                Some(_) if !attempt.is_last => {
                    let number = attempt.number + 1;
                    attempt = Attempt { number, is_last: number == ATTEMPTS_MAX };
                }
                _ => break outcome,
            }
        };
        if let Some(reason) = outcome.retry.take() {
            let all = 0..batch.len() as u32;
            let refused = |index| Refused { index, kind: RefusedKind::Retries, reason: reason.clone() };
            outcome = Outcome { refused: all.map(refused).collect(), ..Outcome::default() };
        }
        Ok(outcome)
    }

    /// Off the async threads, as long as the step's limits let it take. After `Stopping`
    /// there are no steps any more.
    async fn run_once(
        &mut self,
        place: usize,
        batch: Batch,
        partition: Partition,
        attempt: Attempt,
    ) -> Result<Outcome, RedriveError> {
        let mut taken = std::mem::take(&mut self.steps);
        let run = move || (taken[place].run(batch, partition, attempt), taken);
        match tokio::task::spawn_blocking(run).await {
            Ok((outcome, taken)) => {
                self.steps = taken;
                Ok(outcome)
            }
            Err(_) => Err(RedriveError::Stopping),
        }
    }
}

/// Whether a step that is not there now has put some of what is made of the message into a letter,
/// in an earlier run of the pass: the steps of now would make it once more.
fn is_by_others(reader: &Reader, steps: &[Arc<str>], sink: &str) -> bool {
    if reader.seen.is_empty() {
        return false;
    }
    let steps = || steps.iter().map(|step| Source::Step(step)).chain([Source::Routes, Source::Sink(sink)]);
    let is_own = |piece: Piece| steps().any(|source| piece.is_of(source));
    reader.seen.pieces().any(|piece| piece != Piece::WHOLE && !is_own(piece))
}

impl Message<'_> {
    /// Gives the sink what was made of the message for it: by an earlier decision, or by the routes.
    /// Returns why neither says what the sink is to get.
    fn give(&mut self, sorted: &Sorted, letter: &Letter<'_>, asked: &Asked) -> Result<(), String> {
        let names = self.letters.names();
        let sink = self.reader.sink;
        let are_all_there = self.reader.seen.is_empty();
        // Which of several messages are left, where some are rejected, no decision says.
        if let Some(to) = asked.to.as_ref().filter(|to| are_all_there || to.is_uniform()) {
            let count = sorted.batch.len();
            if count == 0 {
                return Ok(());
            }
            let taken = to.taken_by(names.id(sink), count).map_err(|before| {
                format!(
                    "earlier steps made {before} messages of it for different sinks, and the steps of now make \
                     {count}: which of them are for sink \"{}\" is not known; put the steps back that make {before}, or \
                     discard the dead letter",
                    names.sink(sink)
                )
            })?;
            let mut taken = taken.into_iter().enumerate();
            // Those without a route are in letters of their own by now.
            let is_for_it = |(i, is_taken): (usize, bool)| is_taken && !sorted.unknown.contains(&i);
            let out = sorted.batch.filtered(|_| taken.next().is_some_and(is_for_it));
            self.made.out = (!out.is_empty()).then_some(out);
            return Ok(());
        }
        let leads_to: BTreeSet<SinkNumber> = sorted.sinks().flatten().copied().collect();
        if let Some(only) = &asked.only
            && only.iter().all(|wanted| !leads_to.contains(wanted))
            && let Some(other) = leads_to.iter().find(|other| names.names(letter, **other))
        {
            return Err(format!(
                "the steps lead it to sink \"{}\" now, and this redrive sends it to sink \"{}\" only: have the steps lead \
                 it there, or discard the dead letter",
                names.sink(*other),
                names.sink(sink)
            ));
        }
        if are_all_there {
            let ids = |sinks: &[SinkNumber]| sinks.iter().map(|sink| names.id(*sink).to_owned()).collect();
            self.made.to = Destinations::of(sorted.sinks().map(ids));
        }
        self.made.out = sorted.for_sink(sink).filter(|out| !out.is_empty());
        Ok(())
    }
}

/// Sorts what came out of all steps, and rejects what has no route.
async fn route(
    batch: Batch,
    inputs: Inputs,
    steps: &[Arc<str>],
    shared: &Shared,
    message: &mut Message<'_>,
) -> Result<Sorted, RedriveError> {
    let (batch, indexes) = without_letters(batch, Source::Routes, std::slice::from_ref(message.reader));
    let sorted = shared.routes.now().sort(batch);
    let (history, entry) = (message.history.clone(), message.entry);
    let history = |place| history.through(steps, entry, place);
    let readers = std::slice::from_ref(&*message.reader);
    let unrouted = Unrouted::new(&sorted, &inputs, readers, shared.routes.now(), steps, history);
    let stripped = Stripped { batch: &sorted.batch, indexes, partition: message.partition };
    message.refuse(&unrouted.refusals(&stripped)).await?;
    Ok(sorted)
}

/// A letter as the message that was refused.
pub fn original(batch: &Batch, i: usize) -> Batch {
    let message = batch.message(i);
    let properties = letter::without_letter(message.properties());
    let mut entry = *message.entry;
    let mut segments = batch.segments.clone();
    entry.properties = Span::new(segments.len(), 0, properties.len());
    segments.push(properties.into());
    Batch { base: batch.base, now_us: batch.now_us, segments, entries: vec![entry].into(), exclusive: false }
}
