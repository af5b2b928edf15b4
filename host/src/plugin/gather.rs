//! Copies the bytes of chosen messages into one segment.

use crate::batch::{Batch, Entry, Span};

use super::arena::spans;

/// The messages `numbers` of `batch`, or all, with a segment of their own that
/// holds nothing else. Bytes that a message's topic and device share stay shared.
pub(super) fn gather(batch: &Batch, numbers: Option<&[u32]>) -> Batch {
    let all: Vec<u32>;
    let numbers = match numbers {
        Some(numbers) => numbers,
        None => {
            all = (0..batch.len() as u32).collect();
            &all
        }
    };
    let entry_of = |number: &u32| &batch.entries[*number as usize];
    let length = numbers.iter().flat_map(|number| spans(entry_of(number))).map(Span::len).sum();
    let mut bytes = Vec::with_capacity(length);
    let entries = numbers
        .iter()
        .map(|number| {
            let entry = entry_of(number);
            let mut put = |span: Span| copy(batch, span, &mut bytes);
            let topic = put(entry.topic);
            let device = match within(entry.device, entry.topic) {
                Some(begin) => Span::new(0, topic.begin as usize + begin, entry.device.len()),
                None => put(entry.device),
            };
            Entry {
                topic,
                device,
                payload: put(entry.payload),
                properties: put(entry.properties),
                route: put(entry.route),
                ..*entry
            }
        })
        .collect();
    let segments = if bytes.is_empty() { Vec::new() } else { vec![bytes.into()] };
    Batch { base: batch.base, now_us: batch.now_us, segments, entries, exclusive: true }
}

fn copy(batch: &Batch, span: Span, out: &mut Vec<u8>) -> Span {
    if span.is_empty() {
        return Span::EMPTY;
    }
    let begin = out.len();
    out.extend_from_slice(batch.bytes(span));
    Span::new(0, begin, span.len())
}

/// Where `inner` begins within `outer`, if it lies there.
fn within(inner: Span, outer: Span) -> Option<usize> {
    let lies_there = !inner.is_empty()
        && inner.segment() == outer.segment()
        && inner.range().start >= outer.range().start
        && inner.range().end <= outer.range().end;
    lies_there.then(|| inner.range().start - outer.range().start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gathered_messages_are_the_same_and_hold_nothing_of_others() {
        let text = b"acme/x/secret acme/y/open 12";
        let entry = |topic, device| Entry { topic, device, payload: Span::new(0, 26, 2), ..Entry::default() };
        let batch = Batch {
            segments: vec![text.to_vec().into()],
            entries: vec![
                entry(Span::new(0, 0, 13), Span::new(0, 5, 1)),
                entry(Span::new(0, 14, 11), Span::new(0, 19, 1)),
            ]
            .into(),
            ..Batch::default()
        };
        let gathered = gather(&batch, Some(&[1]));
        assert_eq!(gathered.segments, [&b"acme/y/open12"[..]]);
        let message = gathered.message(0);
        assert_eq!((message.topic(), message.device(), message.payload()), ("acme/y/open", "y", &b"12"[..]));
        assert_eq!(gathered.entries[0].device.range(), 5..6);
    }
}
