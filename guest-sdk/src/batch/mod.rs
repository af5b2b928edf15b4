//! A batch of messages and the answer to it, over plain bytes.
//!
//! [`Messages`] borrows what the host handed over and gives [`Message`]s that
//! borrow from it; [`Answer`] collects verdicts and outputs. Both work the same
//! natively as in wasm, so that a plugin's function can be tested and measured
//! on either side. Nothing is allocated per message.

mod answer;
mod message;

pub use answer::{Answer, Output, Record, Verdict};
pub use message::{Header, Message, Messages, Property};

/// Asks `each` about every message, in order.
#[inline(always)]
pub fn run(
    messages: &Messages<'_>,
    answer: &mut Answer,
    mut each: impl FnMut(&Message<'_>, &mut Output<'_>) -> Verdict,
) {
    answer.begin(messages);
    let mut number = 0;
    for entries in messages.stretches() {
        for entry in entries {
            let message = messages.message(entry, number);
            let mut output = Output::new(answer, &message);
            let verdict = each(&message, &mut output);
            output.end(verdict);
            number += 1;
        }
    }
    answer.finish();
}

#[cfg(test)]
mod tests;
