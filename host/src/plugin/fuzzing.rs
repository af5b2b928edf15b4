//! Targets of [`crate::fuzzing`]: what a plugin answers, and what its file is.

use super::answer::ROUTE_BYTES_MAX;
use super::arena::{spans, verdict};
use super::bindings::batch::headworks::plugin::arena::Answer as Raw;
use super::collected::{Collected, Target};
use super::compile::Compiled;
use super::config::Limits;
use super::lines::{self, Lines};
use super::load::Report;
use crate::batch::{Batch, Entry, Span, flags};
use crate::properties;
use crate::step::{Attempt, Outcome, RefusedKind};
use crate::topic::{self, DEVICE_ID_BYTES_MAX, Namespace};

const MESSAGES: usize = 4;
/// The custom section by which a core module is made a component.
const METADATA: &[u8] = b"component-type";

/// An answer of the compiling child, and a plugin file, its debug information too. Files with
/// metadata are parsed no further: they may overflow the parser's stack, which is why a child parses
/// them (see `compile_tests.rs`).
pub fn load(bytes: &[u8]) {
    if let Some(compiled) = Compiled::decode(bytes.to_vec()) {
        assert!(compiled.report.kind.is_ok() != compiled.artifact.is_empty());
        assert!(Compiled::decode(compiled.encode()).is_some_and(|again| again.artifact == compiled.artifact));
        find_lines(compiled.lines);
    }
    find_lines(lines::of(bytes));
    if bytes.windows(METADATA.len()).any(|part| part == METADATA) {
        return;
    }
    let (report, component) = Report::of(bytes);
    assert!(report.kind.is_ok() != component.is_empty());
    let names = report.imports.iter().chain(&report.exports);
    assert!(
        names
            .chain(&report.kind.err().map(|error| error.to_string()))
            .all(|text| !text.contains(char::is_control))
    );
}

/// Looks for what is at some places of a table.
fn find_lines(table: Vec<u8>) {
    let lines = Lines::read(table);
    for offset in [0, 5, 100, 1_000, u32::MAX as usize, usize::MAX] {
        assert!(lines.at(offset).is_none_or(|(file, _)| file.len() <= lines.bytes().len()));
    }
}

/// First byte: how many verdicts follow it, and by bit 7 whether the input was
/// gathered. Then a byte of length and so much data, then the output records.
pub fn answer(bytes: &[u8]) {
    let Some((&first, rest)) = bytes.split_first() else { return };
    let Some((verdicts, rest)) = rest.split_at_checked(usize::from(first & 7)) else { return };
    let Some((&len, rest)) = rest.split_first() else { return };
    let Some((data, outputs)) = rest.split_at_checked(len.into()) else { return };
    let raw = Raw { verdicts: verdicts.into(), outputs: outputs.into(), data: data.into() };
    check(raw, first & 0x80 != 0);
}

pub fn input(messages: usize) -> Batch {
    let entry = |number: u32| Entry {
        offset: number,
        topic: Span::new(0, 0, 3),
        payload: Span::new(0, 3, 5),
        ..Entry::default()
    };
    Batch {
        segments: vec![bytes::Bytes::from_static(b"a/bhello, world")],
        entries: (0..messages as u32).map(entry).collect(),
        ..Batch::default()
    }
}

/// Whatever a plugin answers, what is let through is a batch that every reader
/// may trust.
pub fn check(raw: Raw, gathered: bool) {
    let batch = input(MESSAGES);
    let namespace = Namespace::default();
    let numbers = [0, 1, 2, 3];
    let target = Target {
        batch: &batch,
        numbers: gathered.then_some(&numbers[..]),
        namespace: &namespace,
        attempt: Attempt::ONLY,
    };
    let verdicts = raw.verdicts.clone();
    let mut collected = Collected::new(1 << 20);
    if collected.take(&batch, raw, &Limits::default(), 1 << 20, &target).is_err() {
        // Nothing of it was taken: the batch goes on as it came.
        let Outcome { passed, refused, dropped, retry, .. } = collected.into_outcome(batch.clone());
        assert_eq!((passed.entries, passed.segments), (batch.entries, batch.segments));
        assert!(refused.is_empty() && dropped == 0 && retry.is_none());
        return;
    }
    let Outcome { passed, refused, dropped, .. } = collected.into_outcome(batch);
    for entry in &passed.entries {
        for span in spans(entry) {
            assert!(span.is_empty() || passed.segments[span.segment()].get(span.range()).is_some());
        }
        for text in [entry.topic, entry.route, entry.device] {
            assert!(std::str::from_utf8(passed.bytes(text)).is_ok());
        }
        assert!(topic::is_valid_name(passed.text(entry.topic)));
        assert!(passed.bytes(entry.route).len() <= ROUTE_BYTES_MAX);
        assert!(passed.bytes(entry.device).len() <= DEVICE_ID_BYTES_MAX);
        assert!(properties::is_valid(passed.bytes(entry.properties)));
        assert!(entry.flags & flags::QOS_MASK != 3);
    }
    assert!(passed.entries.windows(2).all(|pair| pair[0].offset <= pair[1].offset));
    assert!(refused.windows(2).all(|pair| pair[0].index < pair[1].index));
    let of = |wanted: &[u8]| verdicts.iter().filter(|verdict| wanted.contains(verdict)).count();
    assert_eq!(dropped as usize, of(&[verdict::DROP]));
    assert_eq!(refused.len(), of(&[verdict::FAIL, verdict::RETRY]));
    assert!(refused.iter().all(|refused| refused.kind != RefusedKind::Fault));
}
