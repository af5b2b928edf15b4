//! How a batch and its answer lie in bytes: the numbers of interface `arena`
//! in `wit/plugin.wit`, for both sides.

/// The only layout of outputs so far.
pub const LAYOUT: u32 = 1;
pub const WORD_BYTES: usize = 4;

/// One entry of the index, or one record of the outputs: a cache line.
pub const STRIDE_WORDS: usize = 16;
pub const STRIDE_BYTES: usize = STRIDE_WORDS * WORD_BYTES;
/// Outputs: header of 8 words.
pub const OUTPUT_HEADER_WORDS: usize = 8;
pub const OUTPUT_HEADER_BYTES: usize = OUTPUT_HEADER_WORDS * WORD_BYTES;

pub const COUNT_MAX: usize = 65_536;
/// Inputs are segments 0..=14, the answer's `data` is 15.
pub const DATA_SEGMENT: usize = 15;
pub const SPAN_BYTES_MAX: usize = (1 << 28) - 1;
pub const DEVICE_BYTES_MAX: usize = 256;
pub const ROUTE_BYTES_MAX: usize = 64;
pub const TOPIC_BYTES_MAX: usize = 65_535;
pub const PROPERTIES_BYTES_MAX: usize = 65_535;
pub const PROPERTIES_MAX: usize = 1_024;
pub const REASON_BYTES_MAX: usize = 4_096;
/// The source number of a record that a timer made.
pub const FROM_TIMER: u32 = u32::MAX;

/// Words of an entry of the index.
pub mod entry {
    pub const FLAGS: usize = 0;
    pub const OFFSET: usize = 1;
    pub const RECEIVED_US: usize = 2;
    pub const EVENT_US: usize = 4;
    pub const TOPIC: usize = 6;
    pub const PAYLOAD: usize = 8;
    pub const PROPERTIES: usize = 10;
    pub const ROUTE: usize = 12;
    pub const DEVICE: usize = 14;
}

/// Words of a record of the outputs.
pub mod record {
    pub const SOURCE: usize = 0;
    pub const SET: usize = 1;
    pub const TOPIC: usize = 2;
    pub const PAYLOAD: usize = 4;
    pub const PROPERTIES: usize = 6;
    pub const ROUTE: usize = 8;
    pub const EVENT_US: usize = 10;
    pub const DEVICE: usize = 12;
    pub const FLAGS: usize = 14;
}

/// Bits of a record's `SET` word.
pub mod set {
    pub const TOPIC: u32 = 1;
    pub const PAYLOAD: u32 = 2;
    pub const PROPERTIES: u32 = 4;
    pub const ROUTE: u32 = 8;
    pub const EVENT_US: u32 = 16;
    pub const DEVICE: u32 = 32;
    pub const FLAGS: u32 = 64;
}

/// Bits of an entry's flags.
pub mod flags {
    pub const QOS_MASK: u32 = 0b11;
    pub const RETAIN: u32 = 1 << 2;
    pub const DUP: u32 = 1 << 3;
    pub const EVENT_TIME: u32 = 1 << 4;
    pub const UTF8: u32 = 1 << 5;
    pub const FITS_NAMESPACE: u32 = 1 << 6;
    pub const CHANGED: u32 = 1 << 7;
}

/// Bytes of `verdicts`.
pub mod verdict {
    pub const KEEP: u8 = 0;
    pub const DROP: u8 = 1;
    pub const EMIT: u8 = 2;
    pub const FAIL: u8 = 3;
    pub const RETRY: u8 = 4;
}

/// Who set a property.
pub mod origin {
    pub const DEVICE: u8 = 0;
    pub const LISTENER: u8 = 1;
    pub const STEP: u8 = 2;
}

/// The second word of a span.
#[inline(always)]
pub const fn span_word(segment: usize, len: usize) -> u32 {
    (segment as u32) << 28 | len as u32
}
