//! Reads the log from one offset on: from the tail in memory where it can,
//! else from the disk, a large read at a time, off the runtime's threads.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::disk::{Create, File, lacking};
use super::recover::Segment;
use super::scan::{Scan, Step};
use super::segment;
use super::tail::Frame;
use super::unreadable::{GivenUp, Patched, READ_TRIES, is_unreadable, pause};
use super::{Inner, lock, read};
use crate::batch::Offset;
use crate::stream::{Cursor, GapCause, Read, ReadError};

/// Messages of one batch; a larger frame comes in parts.
pub const BATCH_MESSAGES_MAX: usize = 1_024;
/// Between two tries while there is no file descriptor, say.
const LACK_RETRY: Duration = Duration::from_millis(200);
/// Frames read ahead from disk, by a reader that goes on from one to the next; it begins
/// with the one frame that it wants.
const AHEAD_BYTES_MAX: usize = 1 << 20;
const AHEAD_BYTES_LEAST: usize = 64 << 10;

pub struct LogCursor {
    inner: Arc<Inner>,
    at: u64,
    /// What it cannot have is lost to somebody.
    counts: bool,
    moved: watch::Receiver<u64>,
    /// The frame that `at` is in.
    frame: Option<Arc<Frame>>,
    ahead: VecDeque<Piece>,
    reader: Option<DiskReader>,
    /// Tries of the read at hand that failed, and what is told of them.
    tries: u32,
    fault: Option<ReadFault>,
    /// Kept here so that a dropped `next` loses nothing.
    reading: Option<JoinHandle<(DiskReader, io::Result<Vec<Piece>>)>>,
}

enum Piece {
    Frame(Arc<Frame>),
    /// Nothing to read up to here.
    GapTo(u64),
}

enum Found {
    Read(Read),
    /// On disk.
    Disk,
    Nothing,
}

impl LogCursor {
    pub fn new(inner: Arc<Inner>, from: Offset, counts: bool) -> Self {
        let moved = inner.moved.subscribe();
        let ahead = VecDeque::new();
        Self {
            inner,
            at: from.0,
            counts,
            moved,
            frame: None,
            ahead,
            reader: None,
            tries: 0,
            fault: None,
            reading: None,
        }
    }

    /// What can be had without the disk.
    fn look(&mut self) -> Result<Found, ReadError> {
        loop {
            if let Some(frame) = &self.frame {
                if frame.base <= self.at && self.at < frame.end() {
                    let batch = frame.batch(self.at, BATCH_MESSAGES_MAX);
                    self.at += batch.len() as u64;
                    if self.at >= frame.end() {
                        self.frame = None;
                    }
                    return Ok(Found::Read(Read::Batch(batch)));
                }
                self.frame = None;
            }
            match self.ahead.pop_front() {
                Some(Piece::Frame(frame)) if frame.base > self.at => {
                    let to = frame.base;
                    self.ahead.push_front(Piece::Frame(frame));
                    return Ok(Found::Read(self.gap(to, GapCause::Damaged)));
                }
                Some(Piece::Frame(frame)) => {
                    self.frame = Some(frame);
                    continue;
                }
                Some(Piece::GapTo(to)) if to > self.at => {
                    return Ok(Found::Read(self.gap(to, GapCause::Damaged)));
                }
                Some(Piece::GapTo(_)) => continue,
                None => {}
            }
            if self.reading.is_some() {
                return Ok(Found::Disk);
            }
            let (start, end) = {
                let back = read(&self.inner.back);
                self.frame = back.tail.get(self.at);
                (back.start(), back.end)
            };
            if self.frame.is_some() {
                self.reader = None;
                continue;
            }
            if self.at > end {
                return Err(ReadError::PastEnd { wanted: self.at, end });
            }
            if self.at < start {
                return Ok(Found::Read(self.gap(start, GapCause::Trimmed)));
            }
            if self.at < end {
                return Ok(Found::Disk);
            }
            return match &lock(&self.inner.front).stopped {
                Some(reason) => Err(ReadError::Stopped(Arc::clone(reason))),
                None => Ok(Found::Nothing),
            };
        }
    }

    fn gap(&mut self, to: u64, cause: GapCause) -> Read {
        let from = std::mem::replace(&mut self.at, to);
        if self.counts {
            self.inner.lose(from..to, cause);
        }
        Read::Gap { from: Offset(from), to: Offset(to), cause }
    }

    /// More frames from the disk into `ahead`.
    async fn read_ahead(&mut self) -> Result<(), ReadError> {
        if self.reading.is_none() {
            let mut reader = self.reader.take().unwrap_or_else(|| DiskReader {
                inner: Arc::clone(&self.inner),
                open: None,
                ahead: 0,
                waits: self.counts,
                gives_up: false,
                patched: None,
            });
            reader.gives_up = self.tries >= READ_TRIES;
            let at = self.at;
            self.reading = Some(tokio::task::spawn_blocking(move || {
                let pieces = reader.read(at);
                (reader, pieces)
            }));
        }
        let Some(reading) = &mut self.reading else { return Ok(()) };
        let done = reading.await;
        self.reading = None;
        let (reader, pieces) = done.map_err(|error| ReadError::Io(Arc::new(io::Error::other(error))))?;
        self.reader = Some(reader);
        let error = match pieces {
            Ok(pieces) => {
                self.ahead.extend(pieces);
                (self.tries, self.fault) = (0, None);
                return Ok(());
            }
            Err(error) => error,
        };
        if self.counts && (is_unreadable(&error) || error.kind() == io::ErrorKind::NotFound) {
            self.wait_to_read_again(&error).await;
            return Ok(());
        }
        let Some(lack) = lacking(&error) else {
            let error = io::Error::new(error.kind(), format!("{}: {error}", self.inner.place_of(self.at)));
            return Err(ReadError::Io(Arc::new(error)));
        };
        let kind = format!("stream {}: no {lack} to read from the disk, will try again", self.inner.name);
        self.inner.failures.report(&kind, 1, &error.to_string(), "");
        tokio::time::sleep(LACK_RETRY).await;
        Ok(())
    }

    /// The disk does not give what the reader wants: it is tried again, in the end without it.
    async fn wait_to_read_again(&mut self, error: &io::Error) {
        self.tries = self.tries.saturating_add(1);
        let why = format!("{}: {error}", self.inner.place_of(self.at));
        let kind = format!("stream {}: cannot read, will try again", self.inner.name);
        self.inner.failures.report(&kind, 1, &why, "");
        self.fault = Some(ReadFault::new(Arc::clone(&self.inner), why));
        tokio::time::sleep(pause(self.tries)).await;
    }
}

/// Tells that a reader cannot read, for as long as it lives.
struct ReadFault {
    inner: Arc<Inner>,
    number: u64,
}

impl ReadFault {
    fn new(inner: Arc<Inner>, why: String) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        lock(&inner.read_faults).insert(number, why);
        Self { inner, number }
    }
}

impl Drop for ReadFault {
    fn drop(&mut self) {
        lock(&self.inner.read_faults).remove(&self.number);
    }
}

#[async_trait]
impl Cursor for LogCursor {
    async fn next(&mut self) -> Result<Read, ReadError> {
        loop {
            self.moved.mark_unchanged();
            match self.look()? {
                Found::Read(read) => return Ok(read),
                Found::Disk => self.read_ahead().await?,
                Found::Nothing => {
                    let _ = self.moved.changed().await;
                }
            }
        }
    }

    async fn try_next(&mut self) -> Result<Option<Read>, ReadError> {
        loop {
            match self.look()? {
                Found::Read(read) => return Ok(Some(read)),
                Found::Disk => self.read_ahead().await?,
                Found::Nothing => return Ok(None),
            }
        }
    }

    fn position(&self) -> Offset {
        Offset(self.at)
    }
}

/// Blocking reads of one cursor.
struct DiskReader {
    inner: Arc<Inner>,
    /// The segment that is read, and the offset that its scan is at.
    open: Option<(u64, Scan, u64)>,
    /// Bytes of frames that the next read may give beyond the first.
    ahead: usize,
    /// Whether it waits for a file that is not there.
    waits: bool,
    /// Whether what cannot be read counts as damage now.
    gives_up: bool,
    /// The file of the segment that was opened last, and what of it counts as damage.
    patched: Option<(u64, Arc<Patched>)>,
}

impl DiskReader {
    fn read(&mut self, at: u64) -> io::Result<Vec<Piece>> {
        if let Some((_, patched)) = &self.patched {
            patched.set_gives_up(self.gives_up);
        }
        let pieces = self.read_pieces(at);
        if pieces.is_err() {
            // What was passed over before the error is read again.
            self.open = None;
        }
        for bytes in self.patched.iter().flat_map(|(_, patched)| patched.take_unread()) {
            tracing::error!(stream = %self.inner.name, place = self.inner.place_of(at), ?bytes,
                "the disk does not give these bytes of the file: what they hold is lost");
        }
        pieces
    }

    /// Frames from the one that holds `at` on; empty where that was trimmed meanwhile.
    fn read_pieces(&mut self, at: u64) -> io::Result<Vec<Piece>> {
        let Some((segment, end)) = self.inner.segment_of(at) else { return Ok(Vec::new()) };
        let Segment { header, limit, landmarks, given_up, .. } = segment;
        let usable = self.open.as_ref().is_some_and(|(open, _, to)| *open == header.sequence && *to <= at);
        if !usable {
            let path = self.inner.dir.join(segment::name(header.sequence));
            let file = match self.inner.disk.open(&path, Create::ReadOnly) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return match self.inner.has(header.sequence) {
                        true => self.read_missing(&path, &given_up, end, error),
                        // Retention removed the segment meanwhile.
                        false => Ok(Vec::new()),
                    };
                }
                other => other?,
            };
            // It stays as long as its segment is read.
            let (_, patched) = match self.patched.take_if(|(of, _)| *of == header.sequence) {
                Some(known) => self.patched.insert(known),
                None => self.patched.insert((header.sequence, Arc::new(Patched::new(file, given_up)))),
            };
            let mut scan = Scan::new(Arc::clone(patched) as Arc<dyn File>, &header, limit).for_few();
            let mut to = header.base;
            if let Some((offset, place)) = landmarks.before(at) {
                scan.back_to(place);
                to = offset;
            }
            self.open = Some((header.sequence, scan, to));
        }
        let Some((_, scan, to)) = &mut self.open else { return Ok(Vec::new()) };
        scan.extend(limit);
        let mut pieces = Vec::new();
        let mut bytes = 0;
        let ahead = self.ahead;
        self.ahead = (2 * ahead).clamp(AHEAD_BYTES_LEAST, AHEAD_BYTES_MAX);
        while (bytes == 0 || bytes < ahead) && *to < end {
            landmarks.pass(*to, scan.place());
            match scan.next()? {
                Step::Frame { header, at: place } => {
                    // A frame that is missing, perhaps the last before a mark.
                    if header.base > *to {
                        pieces.push(Piece::GapTo(header.base.min(end)));
                    }
                    *to = header.end();
                    if header.end() <= at || header.base >= end || header.count == 0 {
                        continue;
                    }
                    match scan.body(&header, place)? {
                        Ok((frame, _)) => pieces.push(Piece::Frame(Arc::new(frame))),
                        Err(_) => pieces.push(Piece::GapTo(header.end())),
                    }
                    bytes += header.total_len() as usize;
                }
                Step::Broken { .. } => {}
                Step::End { .. } => {
                    *to = end;
                    pieces.push(Piece::GapTo(end));
                }
            }
        }
        Ok(pieces)
    }
}

impl DiskReader {
    /// The file of a segment up to `end` is not there, and retention did not remove it. That is a gap, unless
    /// the whole folder is elsewhere: then it is waited for.
    fn read_missing(
        &self,
        path: &Path,
        given_up: &GivenUp,
        end: u64,
        error: io::Error,
    ) -> io::Result<Vec<Piece>> {
        let gives_up = (self.gives_up || !self.waits) && self.inner.is_in_place();
        if !gives_up && !given_up.is_gone() {
            return Err(error);
        }
        if self.waits && given_up.set_gone() {
            tracing::error!(stream = %self.inner.name, file = %path.display(),
                "a file of the stream is not there, and the host did not remove it: the messages in it are lost");
        }
        Ok(vec![Piece::GapTo(end)])
    }
}

impl Inner {
    /// Returns whether the log has this segment.
    fn has(&self, sequence: u64) -> bool {
        read(&self.back).segments.iter().any(|segment| segment.header.sequence == sequence)
    }

    /// Counts messages that a reader cannot have: damaged ones once, however many read them.
    pub fn lose(&self, lost: Range<u64>, cause: GapCause) {
        let new = match cause {
            GapCause::Trimmed => lost.end - lost.start,
            GapCause::Damaged => lock(&self.told).add(lost.clone()),
        };
        self.metrics.gap(new, cause);
        if new > 0 && cause == GapCause::Damaged {
            tracing::error!(stream = %self.name, from = lost.start, to = lost.end,
                "messages are damaged or missing on disk and cannot be read");
        }
    }

    /// Names an offset and the file that has it, for a person.
    fn place_of(&self, offset: u64) -> String {
        let file =
            self.segment_of(offset).map(|(segment, _)| self.dir.join(segment::name(segment.header.sequence)));
        format!("offset {offset} in {}", file.unwrap_or_else(|| self.dir.clone()).display())
    }

    /// The segment that holds `offset`, and its end offset.
    fn segment_of(&self, offset: u64) -> Option<(Segment, u64)> {
        let back = read(&self.back);
        let after = back.segments.partition_point(|s| s.header.base <= offset);
        let segment = back.segments.get(after.checked_sub(1)?)?;
        let end = back.segments.get(after).map_or(back.end, |next| next.header.base);
        Some((segment.clone(), end))
    }

    /// Blocking: the first offset whose frame was appended at or after `append_us`.
    pub fn seek_time(&self, append_us: u64) -> io::Result<Offset> {
        let (segments, start, end) = {
            let back = read(&self.back);
            // The last segment that began before, and all after it.
            let first = back.segments.partition_point(|s| s.header.clock_us < append_us).saturating_sub(1);
            (back.segments.range(first..).cloned().collect::<Vec<_>>(), back.start(), back.end)
        };
        for (i, segment) in segments.iter().enumerate() {
            let segment_end = segments.get(i + 1).map_or(end, |next| next.header.base);
            let path = self.dir.join(segment::name(segment.header.sequence));
            let file = match self.disk.open(&path, Create::ReadOnly) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                other => other?,
            };
            let file = Arc::new(Patched::new(file, segment.given_up.clone()));
            let mut scan = Scan::new(file, &segment.header, segment.limit);
            loop {
                match scan.next()? {
                    Step::Frame { header, .. } if header.base >= segment_end => break,
                    Step::Frame { header, .. } if header.count > 0 && header.append_us >= append_us => {
                        return Ok(Offset(header.base.clamp(start, end)));
                    }
                    Step::End { .. } => break,
                    _ => {}
                }
            }
        }
        Ok(Offset(end))
    }
}
