//! The arena: a batch and its answer as bytes (`wit/plugin.wit`, interface
//! `arena`). This is the layout and the way in; the way out is [`super::answer`].

use zerocopy::IntoBytes;

use super::bindings::batch::headworks::plugin::arena::Header;
use crate::batch::{Batch, Entry, Partition, Span};

pub(super) const LAYOUT: u32 = 1;
pub(super) const STRIDE_WORDS: usize = 16;
pub(super) const OUTPUT_HEADER_WORDS: usize = 8;
/// Most messages of one call.
pub(super) const COUNT_MAX: usize = 65_536;
/// The segment that means the answer's `data`.
pub(super) const DATA_SEGMENT: usize = 15;

const _: () = assert!(size_of::<Entry>() == STRIDE_WORDS * 4);
#[cfg(target_endian = "big")]
compile_error!("the index is little-endian, and here the entries of a batch as they lie in memory");

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

pub(super) fn header(batch: &Batch, partition: Partition, flags: u32, attempt: u32) -> Header {
    Header {
        stride: STRIDE_WORDS as u32,
        partition: partition.0.into(),
        flags,
        attempt,
        base_offset: batch.base.0,
        now_us: batch.now_us,
        // None yet.
        watermark_us: i64::MIN,
    }
}

/// The index of `batch`: its entries as they are.
pub(super) fn index(batch: &Batch) -> &[u8] {
    batch.entries.as_bytes()
}

/// How many bytes the spans of `batch` have together, device ids aside, which
/// mostly lie in a topic, and which segments they use (bit per segment).
pub(super) fn extent(batch: &Batch) -> (u64, u16) {
    let of = |entry: &Entry| {
        let spans = [entry.topic, entry.payload, entry.properties, entry.route];
        spans.iter().map(|span| span.len() as u64).sum::<u64>()
    };
    (batch.entries.iter().map(of).sum(), used_segments(batch))
}

/// How many bytes the spans of these messages have together.
pub(super) fn bytes_in<'e>(entries: impl Iterator<Item = &'e Entry>) -> u64 {
    entries.flat_map(spans).map(|span| span.len() as u64).sum()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::flags;

    #[test]
    fn header_and_index_lie_as_the_contract_says() {
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
        let header = header(&batch, Partition(5), call::ALONE_AFTER_TRAP, 3);
        assert_eq!((header.stride, header.partition, header.flags, header.attempt), (16, 5, 4, 3));
        assert_eq!((header.base_offset, header.now_us, header.watermark_us), (0x1_0000_0007, 9, i64::MIN));
        let words: Vec<u32> =
            index(&batch).chunks_exact(4).map(|w| u32::from_le_bytes(w.try_into().unwrap())).collect();
        let partition = 5 << 16;
        assert_eq!(words[16..28], [partition | u32::from(flags::RETAIN), 1, 3, 2, 0, 0, 0, 3, 3, 5, 0, 0]);
        assert_eq!((words.len(), extent(&batch)), (32, (16, 1)));
    }
}
