//! The arena: a batch and its answer as bytes (`wit/plugin.wit`, interface
//! `arena`). This is the layout and the way in; the way out is [`super::answer`].

use crate::batch::{Batch, Entry, Partition, Span};

pub(super) const LAYOUT: u32 = 1;
pub(super) const INPUT_HEADER_WORDS: usize = 16;
pub(super) const STRIDE_WORDS: usize = 16;
pub(super) const OUTPUT_HEADER_WORDS: usize = 8;
/// Most messages of one call.
pub(super) const COUNT_MAX: usize = 65_536;
/// The segment that means the answer's `data`.
pub(super) const DATA_SEGMENT: usize = 15;

/// Header flags of the input.
pub(super) mod call {
    pub const ALONE_AFTER_TRAP: u32 = 4;
}

pub(super) mod verdict {
    pub const KEEP: u8 = 0;
    pub const DROP: u8 = 1;
    pub const EMIT: u8 = 2;
    pub const FAIL: u8 = 3;
    pub const RETRY: u8 = 4;
}

/// Bits of an output record's word 1.
pub(super) mod set {
    pub const TOPIC: u32 = 1;
    pub const PAYLOAD: u32 = 2;
    pub const PROPERTIES: u32 = 4;
    pub const ROUTE: u32 = 8;
    pub const EVENT_TIME: u32 = 16;
    pub const DEVICE: u32 = 32;
    pub const FLAGS: u32 = 64;
}

/// Writes the input index of `batch` into `out`, and says how many bytes the
/// spans have together and which segments they use (bit per segment).
pub(super) fn write_index(
    out: &mut Vec<u8>,
    batch: &Batch,
    partition: Partition,
    call_flags: u32,
    attempt: u32,
) -> (u64, u16) {
    let count = batch.entries.len();
    out.resize((INPUT_HEADER_WORDS + STRIDE_WORDS * count) * 4, 0);
    let (base, now) = (batch.base.0, batch.now_us);
    let header: [u32; INPUT_HEADER_WORDS] = [
        LAYOUT,
        INPUT_HEADER_WORDS as u32,
        STRIDE_WORDS as u32,
        count as u32,
        partition.0.into(),
        call_flags,
        base as u32,
        (base >> 32) as u32,
        now as u32,
        (now >> 32) as u32,
        // Watermark: none yet, i64::MIN.
        0,
        0x8000_0000,
        attempt,
        0,
        0,
        0,
    ];
    let (head, body) = out.split_at_mut(INPUT_HEADER_WORDS * 4);
    for (bytes, word) in head.as_chunks_mut::<4>().0.iter_mut().zip(header) {
        *bytes = word.to_le_bytes();
    }
    let mut bytes = 0;
    for (place, entry) in body.as_chunks_mut::<64>().0.iter_mut().zip(&batch.entries) {
        write_entry(place, entry);
        for span in [entry.topic, entry.payload, entry.properties, entry.route] {
            bytes += span.len() as u64;
        }
    }
    (bytes, used_segments(batch))
}

/// Bit per segment; a batch straight from the log has one.
fn used_segments(batch: &Batch) -> u16 {
    if batch.segments.len() == 1 {
        return 1;
    }
    // An empty span names no segment.
    let of = |span: Span| u16::from(!span.is_empty()) << span.segment();
    batch.entries.iter().flat_map(spans).map(of).fold(0, |used, one| used | one)
}

pub(super) fn spans(entry: &Entry) -> [Span; 5] {
    [entry.topic, entry.payload, entry.properties, entry.route, entry.device]
}

/// The layouts match but for the partition, which shares word 0 with the flags.
#[inline]
fn write_entry(place: &mut [u8; 64], entry: &Entry) {
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let span = |span: Span| pair(span.begin, span.segment_and_len);
    let words: [u64; 8] = [
        pair(entry.flags.into(), entry.offset),
        entry.received_us,
        entry.event_us as u64,
        span(entry.topic),
        span(entry.payload),
        span(entry.properties),
        span(entry.route),
        span(entry.device),
    ];
    for (bytes, word) in place.as_chunks_mut::<8>().0.iter_mut().zip(words) {
        *bytes = word.to_le_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::flags;

    #[test]
    fn the_index_lies_as_the_contract_says() {
        let entry = |offset| Entry {
            offset,
            topic: Span::new(0, 0, 3),
            payload: Span::new(0, 3, 5),
            ..Entry::default()
        };
        let mut batch = Batch {
            segments: vec![bytes::Bytes::from_static(b"a/bhello")],
            entries: (0..2).map(entry).collect(),
            ..Batch::default()
        };
        (batch.base.0, batch.now_us) = (0x1_0000_0007, 9);
        batch.entries.to_mut()[1].partition = Partition(5);
        batch.entries.to_mut()[1].flags = flags::RETAIN;
        batch.entries.to_mut()[1].received_us = 0x2_0000_0003;
        let mut index = Vec::new();
        let (bytes, used) = write_index(&mut index, &batch, Partition(5), call::ALONE_AFTER_TRAP, 3);
        let words: Vec<u32> =
            index.chunks_exact(4).map(|w| u32::from_le_bytes(w.try_into().unwrap())).collect();
        assert_eq!(words[..16], [1, 16, 16, 2, 5, 4, 7, 1, 9, 0, 0, 1 << 31, 3, 0, 0, 0]);
        assert_eq!(words[32..44], [flags::RETAIN.into(), 1, 3, 2, 0, 0, 0, 3, 3, 5, 0, 0]);
        assert_eq!((words.len(), bytes, used), (48, 16, 1));
    }
}
