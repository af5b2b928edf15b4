//! Messages whose route the pipeline does not have.
//!
//! A step gave such a message its route. The letter has the message as that step saw it, so that a
//! redrive runs the step again: once the step is mended, the message gets another route. Where the
//! step made several messages, the others may be rows already, and must not be made a second time:
//! the letter then has the message as the routes saw it.

use std::sync::Arc;

use super::dead_letters::{Refusal, Source};
use super::known::{Reader, before_last};
use super::routes::{Routes, Sorted};
use super::step_history::StepHistory;
use super::stripped::Stripped;
use crate::batch::{Batch, MessageRef, Offset};
use crate::step::{Refused, RefusedKind};

/// What went into the steps of a chain that may have given a message at hand a route which the pipeline
/// does not have.
#[derive(Default)]
pub struct Inputs {
    /// Place of the first of these steps.
    first: usize,
    batches: Vec<Batch>,
}

impl Inputs {
    /// Of messages that enter at the step at `place`.
    pub fn from(place: usize) -> Self {
        Self { first: place, ..Self::default() }
    }

    /// Keeps what went into the step at `place`, behind those that are kept. Where the pipeline has the
    /// routes of all that came out, none of them gave an unknown one.
    pub fn keep(&mut self, place: usize, input: Batch, are_known: bool) {
        if are_known {
            self.batches.clear();
            self.first = place + 1;
        } else {
            self.batches.push(input);
        }
    }

    /// Returns the place of the step that gave the only message of an offset its route, and the message
    /// as this step saw it. `None`: it had the route from the beginning, or others were made of it. Those
    /// that letters have are missing here: see [`Unrouted::new`].
    fn of_route(&self, message: &MessageRef<'_>) -> Option<(usize, MessageRef<'_>)> {
        for (i, batch) in self.batches.iter().enumerate().rev() {
            let input = the_only_one(batch, message.offset())?;
            if input.route() != message.route() {
                return Some((self.first + i, input));
            }
        }
        None
    }
}

fn the_only_one(batch: &Batch, offset: Offset) -> Option<MessageRef<'_>> {
    let first = batch.entries.partition_point(|entry| batch.offset(entry) < offset);
    let of_it = batch.entries[first..].iter().take_while(|entry| batch.offset(entry) == offset).count();
    (of_it == 1).then(|| batch.message(first))
}

pub struct Unrouted<'b> {
    /// By index, ascending.
    pub refused: Vec<Refused>,
    /// For each of them the message as the step saw it that gave it the route, and what it had been
    /// through.
    given: Vec<Option<(MessageRef<'b>, String)>>,
    /// What the others have been through.
    behind: String,
}

impl<'b> Unrouted<'b> {
    /// `readers`: what is known of the messages; `steps`: the names of all steps; `history`: what the
    /// messages have been through in front of one of them.
    pub fn new(
        sorted: &'b Sorted,
        inputs: &'b Inputs,
        readers: &[Reader],
        routes: &Routes,
        steps: &[Arc<str>],
        history: impl Fn(usize) -> StepHistory,
    ) -> Self {
        let batch = &sorted.batch;
        let (mut refused, mut given) = (Vec::new(), Vec::new());
        for i in &sorted.unknown {
            let message = batch.message(*i);
            let is_alone = before_last(batch, *i) == Some(0)
                && !readers.iter().any(|reader| reader.seen.has_any(message.offset()));
            let by = inputs.of_route(&message).filter(|_| is_alone);
            let giver = by.map(|(place, _)| &*steps[place]);
            let reason = routes.unknown_reason(message.route(), giver);
            refused.push(Refused { index: *i as u32, kind: RefusedKind::Failed, reason });
            given.push(by.map(|(place, input)| (input, history(place).to_string())));
        }
        Self { refused, given, behind: history(steps.len()).to_string() }
    }

    /// `stripped`: the batch that was sorted.
    pub fn refusals<'r>(&'r self, stripped: &'r Stripped<'r>) -> Vec<Refusal<'r>> {
        let all = stripped.refusals(Source::Routes, &self.refused, &self.behind);
        let as_given = |(refusal, given): (Refusal<'r>, &'r Option<(MessageRef<'b>, String)>)| match given {
            Some((message, steps)) => Refusal { message: *message, steps, ..refusal },
            None => refusal,
        };
        all.into_iter().zip(&self.given).map(as_given).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_went_into_steps_that_gave_no_unknown_route_is_not_kept() {
        let mut inputs = Inputs::default();
        for (place, are_known, kept) in [(0, true, 1..1), (1, false, 1..2), (2, false, 1..3), (3, true, 4..4)]
        {
            inputs.keep(place, Batch::default(), are_known);
            assert_eq!(inputs.first..inputs.first + inputs.batches.len(), kept);
        }
    }
}
