//! What `make bench` measures, in wasm through the host and natively through
//! the same reader: [`pass`], [`emit`] and [`json`].
//!
//! Natively: `headworks_guest::batch::run(&messages, &mut answer, plugin_bench::pass)`.
//! In wasm the config says which, `{"work": "json"}`, and the same is called.

use headworks_guest::batch::{Answer, run};
use headworks_guest::prelude::*;

/// What a plugin costs that does nothing.
#[inline(always)]
pub fn pass(message: &Message<'_>, _: &mut Output<'_>) -> Verdict {
    // Reads what any plugin would, so that the work is not optimised away.
    if message.topic_bytes().is_empty() { Verdict::Drop } else { Verdict::Keep }
}

/// Every message gets a new payload of the same size.
#[inline(always)]
pub fn emit(message: &Message<'_>, out: &mut Output<'_>) -> Verdict {
    out.emit().payload(message.payload()).verdict()
}

/// Finds one field and adds one.
#[inline(always)]
pub fn json(message: &Message<'_>, out: &mut Output<'_>) -> Verdict {
    let payload = message.payload();
    match json::get(payload, "value") {
        Ok(Some(value)) => out
            .emit()
            .payload_with(|buffer| {
                json::insert_field(payload, "value_copy", value.as_bytes(), buffer)
                    .expect("it was checked above");
            })
            .verdict(),
        Ok(None) => Verdict::Keep,
        Err(error) => error.into(),
    }
}

struct Bench {
    work: Work,
}

#[derive(Clone, Copy)]
enum Work {
    Pass,
    Emit,
    Json,
}

impl Plugin for Bench {
    fn new(config: &Config, _: &Context) -> Result<Self, Vec<Problem>> {
        let mut fields = config.fields();
        let choices = [("pass", Work::Pass), ("emit", Work::Emit), ("json", Work::Json)];
        let bench = Bench { work: fields.choice("work", &choices, Work::Pass) };
        fields.finish().map(|()| bench)
    }

    fn process(&mut self, message: &Message<'_>, out: &mut Output<'_>) -> Verdict {
        match self.work {
            Work::Pass => pass(message, out),
            Work::Emit => emit(message, out),
            Work::Json => json(message, out),
        }
    }

    fn process_all(&mut self, messages: &Messages<'_>, answer: &mut Answer) {
        match self.work {
            Work::Pass => run(messages, answer, pass),
            Work::Emit => run(messages, answer, emit),
            Work::Json => run(messages, answer, json),
        }
    }
}

headworks_guest::plugin!(Bench);
