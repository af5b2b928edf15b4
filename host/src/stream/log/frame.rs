//! A frame: one commit, as it lies in a segment. Little-endian, 8-aligned.
//!
//! | at | size | field |
//! | --- | --- | --- |
//! | 0 | 8 | salted marker: the segment's random salt; finds the next frame after damage, rejects stale bytes |
//! | 8 | 2 | header length, at least 104; a reader skips what it does not know |
//! | 10 | 1 | kind: 1 data, 2 control, 3 gap, 4 pad |
//! | 11 | 1 | codec of the body: 0 none |
//! | 12 | 2 | flags, see [`flags`] |
//! | 14 | 2 | reserved, 0 |
//! | 16 | 4 | stored length of the body |
//! | 20 | 4 | raw length of the body |
//! | 24 | 8 | base offset: of the first message, or of the next one |
//! | 32 | 4 | count of messages |
//! | 36 | 4 | CRC32C of the stored body |
//! | 40 | 8 | durable through, frames: all with a smaller sequence were synced before this was written |
//! | 48 | 8 | durable through, offset: one past the last message of those |
//! | 56 | 8 | append time, microseconds since 1970: never goes back |
//! | 64 | 8 | least received time |
//! | 72 | 8 | greatest received time |
//! | 80 | 8 | frame sequence |
//! | 88 | 4 | previous frame's header CRC |
//! | 92 | 8 | reserved, 0 |
//! | header length - 4 | 4 | CRC32C of the header before it |
//!
//! The body is sections: `u16 type | u16 stride (0: none) | u32 length | bytes | zeros up to 8`.
//! Types: 1 entries, 2 data, 3 state changes, 4 QoS 2 (session, epoch, packet id,
//! phase; reserved, carried as state changes for now). Unknown ones are skipped.
//!
//! An entry, 40 bytes: `u16 flags | u16 partition | u32 begin in data | u64 received |
//! i64 event | u16 topic length | u16 device begin in topic, or 65535: it follows the
//! topic | u16 device length | u16 route length | u32 payload length | u32 properties
//! length`; its data: topic, device, payload, properties, route.
//! A state change: `u16 key length | u8 1 put, 0 remove | u8 0 | u32 value length | key | value`.

use std::ops::Range;

use super::crc;
use crate::batch::{Entry, Partition, SPAN_BYTES_MAX, Span};
use crate::stream::{NewMessage, STATE_KEY_BYTES_MAX, STATE_VALUE_BYTES_MAX};

pub const HEADER_BYTES: usize = 104;
pub const ENTRY_BYTES: usize = 40;
pub const SECTION_BYTES: usize = 8;
pub const ALIGN: usize = 8;
const CHANGE_BYTES: usize = 8;
const DEVICE_FOLLOWS: u16 = u16::MAX;

const ENTRIES: u16 = 1;
const DATA: u16 = 2;
const STATE: u16 = 3;

pub mod flags {
    /// First frame of a checkpoint. The state map is empty before it.
    pub const CHECKPOINT_BEGIN: u16 = 1;
    /// Last frame of a checkpoint.
    pub const CHECKPOINT_END: u16 = 2;
    /// Only states what is durable. The next frame may overwrite it.
    pub const MARK: u16 = 4;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    Data = 1,
    Control = 2,
    Gap = 3,
    Pad = 4,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub marker: u64,
    pub kind: Kind,
    pub flags: u16,
    pub stored_len: u32,
    pub base: u64,
    pub count: u32,
    pub body_crc: u32,
    pub durable_frames: u64,
    pub durable_through: u64,
    pub append_us: u64,
    pub received_least_us: u64,
    pub received_greatest_us: u64,
    pub sequence: u64,
    pub previous_crc: u32,
    /// Header length as read or written.
    pub header_len: u16,
    pub crc: u32,
}

/// Why bytes are not a valid frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    #[error("the bytes end within the frame")]
    Short,
    #[error("the header's length or CRC is wrong")]
    Header,
    #[error("the body's CRC is wrong")]
    Body,
    #[error("a codec or kind that this version does not know")]
    Unknown,
    #[error("the sections do not match the body")]
    Sections,
    #[error("an entry points outside the data, or its text is not UTF-8")]
    Entry,
    #[error("a state change is not whole")]
    State,
}

/// A frame whose every word was checked. Its ranges refer to the bytes from which it was decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decoded {
    pub header: Header,
    pub entries: Range<usize>,
    pub data: Range<usize>,
    pub state: Range<usize>,
}

impl Header {
    /// Returns the length of header and body.
    pub fn total_len(&self) -> u64 {
        u64::from(self.header_len) + u64::from(self.stored_len)
    }

    pub fn end(&self) -> u64 {
        self.base + u64::from(self.count)
    }

    /// Sets length and CRC, and returns the bytes.
    pub fn encode(&mut self) -> [u8; HEADER_BYTES] {
        self.header_len = HEADER_BYTES as u16;
        let mut out = [0; HEADER_BYTES];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.marker.to_le_bytes());
        put(8, &self.header_len.to_le_bytes());
        put(10, &[self.kind as u8, 0]);
        put(12, &self.flags.to_le_bytes());
        put(16, &self.stored_len.to_le_bytes());
        put(20, &self.stored_len.to_le_bytes());
        put(24, &self.base.to_le_bytes());
        put(32, &self.count.to_le_bytes());
        put(36, &self.body_crc.to_le_bytes());
        put(40, &self.durable_frames.to_le_bytes());
        put(48, &self.durable_through.to_le_bytes());
        put(56, &self.append_us.to_le_bytes());
        put(64, &self.received_least_us.to_le_bytes());
        put(72, &self.received_greatest_us.to_le_bytes());
        put(80, &self.sequence.to_le_bytes());
        put(88, &self.previous_crc.to_le_bytes());
        self.crc = crc32c::crc32c(&out[..HEADER_BYTES - 4]);
        out[HEADER_BYTES - 4..].copy_from_slice(&self.crc.to_le_bytes());
        out
    }
}

/// Decodes the header at the start of `bytes`. Accepts any bytes.
pub fn decode_header(bytes: &[u8]) -> Result<Header, Broken> {
    let fixed = bytes.first_chunk::<HEADER_BYTES>().ok_or(Broken::Short)?;
    let header_len = u16_at(fixed, 8);
    if (header_len as usize) < HEADER_BYTES || !(header_len as usize).is_multiple_of(ALIGN) {
        return Err(Broken::Header);
    }
    let (covered, crc) =
        bytes.get(..header_len as usize).and_then(|all| all.split_last_chunk::<4>()).ok_or(Broken::Short)?;
    let crc = u32::from_le_bytes(*crc);
    if crc32c::crc32c(covered) != crc {
        return Err(Broken::Header);
    }
    let kind = match fixed[10] {
        1 => Kind::Data,
        2 => Kind::Control,
        3 => Kind::Gap,
        4 => Kind::Pad,
        _ => return Err(Broken::Unknown),
    };
    let stored_len = u32_at(fixed, 16);
    if fixed[11] != 0 || stored_len != u32_at(fixed, 20) {
        return Err(Broken::Unknown);
    }
    let header = Header {
        marker: u64_at(fixed, 0),
        kind,
        flags: u16_at(fixed, 12),
        stored_len,
        base: u64_at(fixed, 24),
        count: u32_at(fixed, 32),
        body_crc: u32_at(fixed, 36),
        durable_frames: u64_at(fixed, 40),
        durable_through: u64_at(fixed, 48),
        append_us: u64_at(fixed, 56),
        received_least_us: u64_at(fixed, 64),
        received_greatest_us: u64_at(fixed, 72),
        sequence: u64_at(fixed, 80),
        previous_crc: u32_at(fixed, 88),
        header_len,
        crc,
    };
    if header.base.checked_add(u64::from(header.count)).is_none()
        || !(stored_len as usize).is_multiple_of(ALIGN)
    {
        return Err(Broken::Header);
    }
    Ok(header)
}

/// Decodes the whole frame at the start of `bytes`, and checks every entry. Accepts any bytes.
pub fn decode(bytes: &[u8], partitions: u16) -> Result<Decoded, Broken> {
    let header = decode_header(bytes)?;
    let body_at = header.header_len as usize;
    let body = bytes.get(body_at..body_at + header.stored_len as usize).ok_or(Broken::Short)?;
    if crc32c::crc32c(body) != header.body_crc {
        return Err(Broken::Body);
    }
    let mut decoded = Decoded { header, entries: 0..0, data: 0..0, state: 0..0 };
    let mut at = 0;
    while at < body.len() {
        let section = body.get(at..at + SECTION_BYTES).ok_or(Broken::Sections)?;
        let (kind, stride, len) = (u16_at(section, 0), u16_at(section, 2), u32_at(section, 4) as usize);
        let begin = at + SECTION_BYTES;
        let end = begin.checked_add(len).filter(|end| *end <= body.len()).ok_or(Broken::Sections)?;
        let range = body_at + begin..body_at + end;
        match kind {
            ENTRIES if stride as usize != ENTRY_BYTES => return Err(Broken::Unknown),
            ENTRIES => decoded.entries = range,
            DATA => decoded.data = range,
            STATE => decoded.state = range,
            _ => {}
        }
        at = end.next_multiple_of(ALIGN);
    }
    let entries = &bytes[decoded.entries.clone()];
    if entries.len() != header.count as usize * ENTRY_BYTES {
        return Err(Broken::Sections);
    }
    let data = &bytes[decoded.data.clone()];
    if !entries.chunks_exact(ENTRY_BYTES).all(|entry| entry_is_valid(entry, data, partitions)) {
        return Err(Broken::Entry);
    }
    let mut state = Changes(&bytes[decoded.state.clone()]);
    if !state.by_ref().all(|(key, value)| {
        key.len() <= STATE_KEY_BYTES_MAX + 1 && value.is_none_or(|value| value.len() <= STATE_VALUE_BYTES_MAX)
    }) || !state.0.is_empty()
    {
        return Err(Broken::State);
    }
    Ok(decoded)
}

/// Returns the length of a frame with these parts.
pub fn frame_len(entries: usize, data: usize, state: usize) -> usize {
    let section = |len: usize| if len == 0 { 0 } else { SECTION_BYTES + len.next_multiple_of(ALIGN) };
    HEADER_BYTES + section(entries) + section(data) + section(state)
}

/// The small parts around entries, data and state. [`Around::parts`] returns all parts in the order in
/// which they are written.
pub struct Around {
    header: [u8; HEADER_BYTES],
    sections: [[u8; SECTION_BYTES]; 3],
}

impl Around {
    /// Fills in lengths and CRCs of `header`.
    pub fn new(header: &mut Header, entries: &[u8], data: &[u8], state: &[u8]) -> Self {
        Self::summed(header, (entries, crc32c::crc32c(entries)), (data, crc32c::crc32c(data)), state)
    }

    /// Fills in lengths and CRCs for entries and data whose CRC32C is known, without reading them.
    pub fn summed(
        header: &mut Header,
        (entries, entries_crc): (&[u8], u32),
        (data, data_crc): (&[u8], u32),
        state: &[u8],
    ) -> Self {
        let section = |kind: u16, stride: usize, bytes: &[u8]| {
            let mut out = [0; SECTION_BYTES];
            out[..2].copy_from_slice(&kind.to_le_bytes());
            out[2..4].copy_from_slice(&(stride as u16).to_le_bytes());
            out[4..].copy_from_slice(&(bytes.len() as u32).to_le_bytes());
            out
        };
        let sections =
            [section(ENTRIES, ENTRY_BYTES, entries), section(DATA, 0, data), section(STATE, 0, state)];
        header.stored_len = (frame_len(entries.len(), data.len(), state.len()) - HEADER_BYTES) as u32;
        let mut around = Self { header: [0; HEADER_BYTES], sections };
        let [_, entries_head, _, entries_pad, data_head, _, rest @ ..] = around.parts(entries, data, state);
        let sum = |crc, parts: &[&[u8]]| parts.iter().fold(crc, |crc, part| crc32c::crc32c_append(crc, part));
        let crc = crc::followed_by(sum(0, &[entries_head]), entries_crc, entries.len() as u32);
        let crc = crc::followed_by(sum(crc, &[entries_pad, data_head]), data_crc, data.len() as u32);
        header.body_crc = sum(crc, &rest);
        around.header = header.encode();
        around
    }

    pub fn parts<'a>(&'a self, entries: &'a [u8], data: &'a [u8], state: &'a [u8]) -> [&'a [u8]; 10] {
        let [(e0, e1, e2), (d0, d1, d2), (s0, s1, s2)] =
            [(0, entries), (1, data), (2, state)].map(|(i, bytes): (usize, &'a [u8])| {
                let padding: &[u8] = &[0; ALIGN][..bytes.len().next_multiple_of(ALIGN) - bytes.len()];
                if bytes.is_empty() {
                    (&[][..], bytes, padding)
                } else {
                    (&self.sections[i][..], bytes, padding)
                }
            });
        [&self.header, e0, e1, e2, d0, d1, d2, s0, s1, s2]
    }
}

/// Appends a message's entry and data. Lengths must be within their bounds ([`message_fits`]).
#[inline]
pub fn push_message(entries: &mut bytes::BytesMut, data: &mut bytes::BytesMut, m: &NewMessage<'_>) {
    let device_at = slice_begin(m.topic, m.device);
    let mut entry = [0; ENTRY_BYTES];
    entry[0..2].copy_from_slice(&m.flags.to_le_bytes());
    entry[2..4].copy_from_slice(&m.partition.0.to_le_bytes());
    entry[4..8].copy_from_slice(&(data.len() as u32).to_le_bytes());
    entry[8..16].copy_from_slice(&m.received_us.to_le_bytes());
    entry[16..24].copy_from_slice(&m.event_us.to_le_bytes());
    entry[24..26].copy_from_slice(&(m.topic.len() as u16).to_le_bytes());
    entry[26..28].copy_from_slice(&device_at.unwrap_or(DEVICE_FOLLOWS).to_le_bytes());
    entry[28..30].copy_from_slice(&(m.device.len() as u16).to_le_bytes());
    entry[30..32].copy_from_slice(&(m.route.len() as u16).to_le_bytes());
    entry[32..36].copy_from_slice(&(m.payload.len() as u32).to_le_bytes());
    entry[36..40].copy_from_slice(&(m.properties.len() as u32).to_le_bytes());
    entries.extend_from_slice(&entry);
    data.extend_from_slice(m.topic.as_bytes());
    if device_at.is_none() {
        data.extend_from_slice(m.device.as_bytes());
    }
    data.extend_from_slice(m.payload);
    data.extend_from_slice(m.properties);
    data.extend_from_slice(m.route.as_bytes());
}

/// Returns the most data bytes that [`push_message`] adds.
#[inline]
pub fn message_bytes(m: &NewMessage<'_>) -> usize {
    m.topic.len() + m.device.len() + m.payload.len() + m.properties.len() + m.route.len()
}

/// Checks that every length fits into an entry.
#[inline]
pub fn message_fits(m: &NewMessage<'_>) -> Result<(), &'static str> {
    if m.topic.len() > crate::topic::TOPIC_BYTES_MAX {
        Err("topic")
    } else if m.device.len() > crate::topic::DEVICE_ID_BYTES_MAX {
        Err("device id")
    } else if m.route.len() > usize::from(u16::MAX) {
        Err("route")
    } else if m.properties.len() > crate::properties::PROPERTIES_BYTES_MAX {
        Err("properties")
    } else if m.payload.len() > SPAN_BYTES_MAX {
        Err("payload")
    } else {
        Ok(())
    }
}

/// Returns the offset of `part` in `whole`, if it is a slice of it.
#[inline]
fn slice_begin(whole: &str, part: &str) -> Option<u16> {
    let begin = (part.as_ptr() as usize).wrapping_sub(whole.as_ptr() as usize);
    (begin <= whole.len() && part.len() <= whole.len() - begin && begin < usize::from(DEVICE_FOLLOWS))
        .then_some(begin as u16)
}

/// Returns entry `i` as in a batch, with its spans in segment 0. The frame was checked or created here.
#[inline]
pub fn entry(entries: &[u8], i: usize) -> Entry {
    let bytes = &entries[i * ENTRY_BYTES..(i + 1) * ENTRY_BYTES];
    let lengths = Lengths::of(bytes);
    let span = |begin: usize, len: usize| Span::new(0, begin, len);
    let [topic, device, payload, properties, route] = lengths.begins();
    Entry {
        flags: u16_at(bytes, 0),
        partition: Partition(u16_at(bytes, 2)),
        offset: i as u32,
        received_us: u64_at(bytes, 8),
        event_us: u64_at(bytes, 16) as i64,
        topic: span(topic, lengths.topic),
        payload: span(payload, lengths.payload),
        properties: span(properties, lengths.properties),
        route: span(route, lengths.route),
        device: span(device, lengths.device),
    }
}

struct Lengths {
    begin: usize,
    topic: usize,
    device_at: u16,
    device: usize,
    route: usize,
    payload: usize,
    properties: usize,
}

impl Lengths {
    #[inline]
    fn of(entry: &[u8]) -> Self {
        Self {
            begin: u32_at(entry, 4) as usize,
            topic: u16_at(entry, 24) as usize,
            device_at: u16_at(entry, 26),
            device: u16_at(entry, 28) as usize,
            route: u16_at(entry, 30) as usize,
            payload: u32_at(entry, 32) as usize,
            properties: u32_at(entry, 36) as usize,
        }
    }

    /// Returns the offsets of topic, device, payload, properties, route.
    #[inline]
    fn begins(&self) -> [usize; 5] {
        let after_topic = self.begin + self.topic;
        let (device, payload) = match self.device_at {
            DEVICE_FOLLOWS => (after_topic, after_topic + self.device),
            at => (self.begin + at as usize, after_topic),
        };
        let properties = payload + self.payload;
        [self.begin, device, payload, properties, properties + self.properties]
    }
}

fn entry_is_valid(entry: &[u8], data: &[u8], partitions: u16) -> bool {
    let l = Lengths::of(entry);
    let [topic, device, _, _, route] = l.begins();
    let text = |begin: usize, len: usize| {
        data.get(begin..begin + len).is_some_and(|bytes| std::str::from_utf8(bytes).is_ok())
    };
    u16_at(entry, 2) < partitions
        && l.payload <= SPAN_BYTES_MAX
        && l.properties <= SPAN_BYTES_MAX
        && route + l.route <= data.len()
        && (l.device_at == DEVICE_FOLLOWS || l.device_at as usize + l.device <= l.topic)
        && text(topic, l.topic)
        && text(device, l.device)
        && text(route, l.route)
}

/// Appends a state change.
pub fn push_change(out: &mut Vec<u8>, key: &[u8], value: Option<&[u8]>) {
    out.extend_from_slice(&(key.len() as u16).to_le_bytes());
    out.extend_from_slice(&[u8::from(value.is_some()), 0]);
    out.extend_from_slice(&(value.map_or(0, <[u8]>::len) as u32).to_le_bytes());
    out.extend_from_slice(key);
    out.extend_from_slice(value.unwrap_or_default());
}

pub fn change_len(key: &[u8], value: Option<&[u8]>) -> usize {
    CHANGE_BYTES + key.len() + value.map_or(0, <[u8]>::len)
}

/// State changes in order, up to the first incomplete one.
pub struct Changes<'a>(pub &'a [u8]);

impl<'a> Iterator for Changes<'a> {
    type Item = (&'a [u8], Option<&'a [u8]>);

    fn next(&mut self) -> Option<Self::Item> {
        let (head, rest) = self.0.split_at_checked(CHANGE_BYTES)?;
        let (key, rest) = rest.split_at_checked(u16_at(head, 0) as usize)?;
        let (value, rest) = rest.split_at_checked(u32_at(head, 4) as usize)?;
        self.0 = rest;
        Some((key, (head[2] == 1).then_some(value)))
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
