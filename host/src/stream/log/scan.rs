//! Reads the frames of one segment in order, whatever the disk contains. Recovery, cursors that catch
//! up, and `seek_time` share it.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use bytes::Bytes;

use super::disk::File;
use super::frame::{self, Broken, Header, flags};
use super::segment::{self, FRAMES_AT};
use super::tail::Frame;

/// Bytes that are read at once. A larger frame is read as a whole.
const CHUNK_BYTES: u64 = 1 << 20;
/// Bytes that are read at a place that does not follow the previous one, if the scan is for few frames:
/// no more than a header. Further reads are increasingly larger.
const CHUNK_BYTES_LEAST: u64 = 512;

pub struct Scan {
    file: Arc<dyn File>,
    marker: u64,
    partitions: u16,
    /// End of the bytes that may hold frames.
    limit: u64,
    at: u64,
    /// Sequence number of the next frame, if none is missing.
    expected: u64,
    chunk: Bytes,
    chunk_at: u64,
    /// Size of the last chunk, if the scan is for few frames.
    ahead: Option<u64>,
}

/// A place between frames.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    at: u64,
    expected: u64,
}

/// Bytes between two landmarks. In tests there are few, so that all tests reach some.
const LANDMARK_EVERY_BYTES: u64 = if cfg!(test) { 1 << 10 } else { 256 << 10 };

/// Places in one segment that readers have passed, so that the next reader can begin near its position.
#[derive(Clone, Debug, Default)]
pub struct Landmarks(Arc<Mutex<Vec<(u64, Place)>>>);

impl Landmarks {
    /// Records that the scan was at `place`, and that all frames before it are below `offset`.
    pub fn pass(&self, offset: u64, place: Place) {
        let mut known = super::lock(&self.0);
        let last = known.last().map_or(FRAMES_AT, |(_, place)| place.at);
        if place.at >= last + LANDMARK_EVERY_BYTES {
            known.push((offset, place));
        }
    }

    /// Returns the last landmark at or before `offset`.
    pub fn before(&self, offset: u64) -> Option<(u64, Place)> {
        let known = super::lock(&self.0);
        let after = known.partition_point(|(at, _)| *at <= offset);
        known.get(after.checked_sub(1)?).copied()
    }
}

/// What is at the scan's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A frame with a valid header. [`Scan::body`] checks its body.
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

    /// Makes the scan read only the headers of frames that are skipped.
    pub fn for_few(mut self) -> Self {
        self.ahead = Some(CHUNK_BYTES_LEAST);
        self
    }

    /// Extends the part of the file that may hold frames.
    pub fn extend(&mut self, limit: u64) {
        self.limit = self.limit.max(limit);
    }

    /// Returns the present place, to which the scan can return.
    pub fn place(&self) -> Place {
        Place { at: self.at, expected: self.expected }
    }

    pub fn back_to(&mut self, place: Place) {
        (self.at, self.expected) = (place.at, place.expected);
    }

    /// Discards the bytes that were read before, because the file may have changed.
    pub fn refresh(&mut self, limit: u64) {
        self.limit = limit;
        self.chunk = Bytes::new();
    }

    /// Restricts the scan to bytes that were already read.
    pub fn stay_in_chunk(&mut self) {
        self.limit = self.chunk_at + self.chunk.len() as u64;
    }

    /// Returns the sequence number of the next frame, if none is missing.
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

    /// Returns whether the file has `before` at `at`, and zeros at the place of the next header, up to
    /// the limit. Reads no more than that.
    pub fn is_still(&self, at: u64, before: &[u8]) -> io::Result<bool> {
        let mut now = vec![0; before.len() + frame::HEADER_BYTES];
        let read = self.file.read_at(&mut now, at)?;
        let room = self.limit.saturating_sub(at).min(now.len() as u64);
        let is_same = now.starts_with(before) && now[before.len()..].iter().all(|byte| *byte == 0);
        Ok(read as u64 == room && is_same)
    }

    /// Returns the bytes of a frame.
    pub fn bytes(&mut self, header: &Header, at: u64) -> io::Result<Bytes> {
        self.window(at, header.total_len())
    }

    /// Returns a frame after every word was checked.
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

    /// Returns a header that belongs to this segment, is not older than the place, and fits.
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

    /// Returns the place of the next frame from `from` on, or the end of the last byte that is not zero.
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

    /// Returns up to `len` bytes from `at`, fewer at the limit.
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
