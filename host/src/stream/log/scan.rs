//! Walks the frames of one segment in order, over whatever the disk gives:
//! recovery, catching-up cursors and `seek_time` share it.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use bytes::Bytes;

use super::disk::File;
use super::frame::{self, Broken, Header, flags};
use super::segment::{self, FRAMES_AT};
use super::tail::Frame;

/// Read at once; a larger frame is read whole.
const CHUNK_BYTES: u64 = 1 << 20;
/// Read at a place that does not follow what was read before, where the scan is for few
/// frames: no more than a header. What follows is read in ever larger chunks.
const CHUNK_BYTES_LEAST: u64 = 512;

pub struct Scan {
    file: Arc<dyn File>,
    marker: u64,
    partitions: u16,
    /// Bytes of the file that may hold frames.
    limit: u64,
    at: u64,
    /// The next frame's sequence, if none is missing.
    expected: u64,
    chunk: Bytes,
    chunk_at: u64,
    /// Of the last chunk, where it is for few frames.
    ahead: Option<u64>,
}

/// A place between frames.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    at: u64,
    expected: u64,
}

/// Bytes between two landmarks; few in tests, so that all of them come by some.
const LANDMARK_EVERY_BYTES: u64 = if cfg!(test) { 1 << 10 } else { 256 << 10 };

/// Places in one segment that readers have come by, so that the next one
/// begins near what it wants.
#[derive(Clone, Debug, Default)]
pub struct Landmarks(Arc<Mutex<Vec<(u64, Place)>>>);

impl Landmarks {
    /// The scan stood at `place`, and all frames before it are below `offset`.
    pub fn pass(&self, offset: u64, place: Place) {
        let mut known = super::lock(&self.0);
        let last = known.last().map_or(FRAMES_AT, |(_, place)| place.at);
        if place.at >= last + LANDMARK_EVERY_BYTES {
            known.push((offset, place));
        }
    }

    /// The last one at or before `offset`.
    pub fn before(&self, offset: u64) -> Option<(u64, Place)> {
        let known = super::lock(&self.0);
        let after = known.partition_point(|(at, _)| *at <= offset);
        known.get(after.checked_sub(1)?).copied()
    }
}

/// What lies at the scan's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A frame with a whole header; its body is checked by [`Scan::body`].
    Frame { header: Header, at: u64 },
    /// Bytes without a frame, before the next one.
    Broken { at: u64, end: u64 },
    /// No frame from `at` on; `torn` bytes there are not zero.
    End { at: u64, torn: u64 },
}

impl Scan {
    pub fn new(file: Arc<dyn File>, segment: &segment::Header, limit: u64) -> Self {
        Self {
            file,
            marker: segment.salt,
            partitions: segment.partitions,
            limit,
            at: FRAMES_AT,
            expected: segment.first_frame,
            chunk: Bytes::new(),
            chunk_at: 0,
            ahead: None,
        }
    }

    /// Reads of frames that are passed over no more than their headers.
    pub fn for_few(mut self) -> Self {
        self.ahead = Some(CHUNK_BYTES_LEAST);
        self
    }

    /// More of the file may hold frames now.
    pub fn extend(&mut self, limit: u64) {
        self.limit = self.limit.max(limit);
    }

    /// Where it stands, to come back to.
    pub fn place(&self) -> Place {
        Place { at: self.at, expected: self.expected }
    }

    pub fn back_to(&mut self, place: Place) {
        (self.at, self.expected) = (place.at, place.expected);
    }

    /// What was read before counts no more: the file may hold something else there now.
    pub fn refresh(&mut self, limit: u64) {
        self.limit = limit;
        self.chunk = Bytes::new();
    }

    /// Looks no further than what was read before.
    pub fn stay_in_chunk(&mut self) {
        self.limit = self.chunk_at + self.chunk.len() as u64;
    }

    /// Sequence of the next frame, if none is missing.
    pub fn expected(&self) -> u64 {
        self.expected
    }

    pub fn next(&mut self) -> io::Result<Step> {
        let at = self.at;
        if let Some(header) = self.header_at(at)? {
            self.at = at + header.total_len();
            if header.flags & flags::MARK == 0 {
                self.expected = header.sequence + 1;
            }
            return Ok(Step::Frame { header, at });
        }
        Ok(match self.search(at + frame::ALIGN as u64)? {
            Ok(found) => {
                self.at = found;
                Step::Broken { at, end: found }
            }
            Err(torn_end) => Step::End { at, torn: torn_end.saturating_sub(at) },
        })
    }

    /// Whether the file has `before` at `at`, and zeros where the next header would
    /// be, up to the limit. Reads no more than that.
    pub fn is_still(&self, at: u64, before: &[u8]) -> io::Result<bool> {
        let mut now = vec![0; before.len() + frame::HEADER_BYTES];
        let read = self.file.read_at(&mut now, at)?;
        let room = self.limit.saturating_sub(at).min(now.len() as u64);
        let is_same = now.starts_with(before) && now[before.len()..].iter().all(|byte| *byte == 0);
        Ok(read as u64 == room && is_same)
    }

    /// The frame as it lies there.
    pub fn bytes(&mut self, header: &Header, at: u64) -> io::Result<Bytes> {
        self.window(at, header.total_len())
    }

    /// Every word of the frame, checked.
    pub fn body(&mut self, header: &Header, at: u64) -> io::Result<Result<(Frame, Bytes), Broken>> {
        let bytes = self.window(at, header.total_len())?;
        Ok(frame::decode(&bytes, self.partitions).map(|decoded| {
            let frame = Frame {
                base: header.base,
                count: header.count,
                append_us: header.append_us,
                entries: bytes.slice(decoded.entries),
                data: bytes.slice(decoded.data),
            };
            (frame, bytes.slice(decoded.state))
        }))
    }

    /// A header that belongs to this segment, is not older than the place and fits.
    fn header_at(&mut self, at: u64) -> io::Result<Option<Header>> {
        let fixed = self.window(at, frame::HEADER_BYTES as u64)?;
        if fixed.len() < frame::HEADER_BYTES || fixed[..8] != self.marker.to_le_bytes() {
            return Ok(None);
        }
        let header_len = u16::from_le_bytes([fixed[8], fixed[9]]);
        let whole = self.window(at, u64::from(header_len))?;
        Ok(frame::decode_header(&whole).ok().filter(|header| {
            header.sequence >= self.expected
                && at.checked_add(header.total_len()).is_some_and(|end| end <= self.limit)
        }))
    }

    /// The next frame from `from` on, or where the last byte ends that is not zero.
    fn search(&mut self, from: u64) -> io::Result<Result<u64, u64>> {
        let marker = self.marker.to_le_bytes();
        let mut last = 0;
        let mut at = from.saturating_sub(frame::ALIGN as u64);
        while at < self.limit {
            let chunk = self.window(at, CHUNK_BYTES)?;
            if chunk.is_empty() {
                break;
            }
            if let Some(i) = chunk.iter().rposition(|b| *b != 0) {
                last = at + i as u64 + 1;
                for (i, _) in chunk.chunks(frame::ALIGN).enumerate().filter(|(_, bytes)| **bytes == marker) {
                    let found = at + (i * frame::ALIGN) as u64;
                    if found >= from && self.header_at(found)?.is_some() {
                        return Ok(Ok(found));
                    }
                }
            }
            at += (chunk.len() as u64).next_multiple_of(frame::ALIGN as u64);
        }
        Ok(Err(last))
    }

    /// Up to `len` bytes from `at`, fewer at the limit.
    fn window(&mut self, at: u64, len: u64) -> io::Result<Bytes> {
        let wanted = at..at.saturating_add(len).min(self.limit).max(at);
        let held = self.chunk_at..self.chunk_at + self.chunk.len() as u64;
        if !(held.start <= wanted.start && wanted.end <= held.end) {
            let ahead = match &mut self.ahead {
                Some(ahead) => {
                    let follows = !self.chunk.is_empty() && held.start <= at && at <= held.end;
                    *ahead = if follows { CHUNK_BYTES.min(2 * *ahead) } else { CHUNK_BYTES_LEAST };
                    *ahead
                }
                None => CHUNK_BYTES,
            };
            let end = wanted.end.max(at.saturating_add(ahead).min(self.limit)).max(at);
            let mut bytes = vec![0; (end - at) as usize];
            let read = self.file.read_at(&mut bytes, at)?;
            bytes.truncate(read);
            self.chunk = bytes.into();
            self.chunk_at = at;
        }
        let clip = |at: u64| ((at - self.chunk_at) as usize).min(self.chunk.len());
        let Range { start, end } = clip(wanted.start)..clip(wanted.end);
        Ok(self.chunk.slice(start..end))
    }
}
