//! Reads a log's folder from another process while the host runs. Returns only messages that something
//! on disk proves to be durable.
//!
//! The host may be writing, so bytes that were read may be partly old. A whole frame that is proven is
//! final. Absence or damage is accepted only after the file was read again.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::clock;
use super::disk::{Create, Disk, RealDisk, Uninterrupted};
use super::frame::flags;
use super::generations;
use super::recover::{self, Known, OpenError};
use super::retain::{Mark, begin_now, delivered_to, marks};
use super::scan::{Place, Scan, Step};
use super::segment;
use super::state::{self, USERS};
use super::tail::Frame;
use crate::batch::Offset;
use crate::files::found;
use crate::stream::{BeginNow, Delivered, GapCause, Identity, Read, StateEntries};

/// Most attempts to read a folder whose oldest segments are removed meanwhile.
const LOOKS_MAX: usize = 8;

/// A reader that takes no lock and writes nothing.
pub struct ReadOnly {
    disk: Box<dyn Disk>,
    dir: PathBuf,
    at: u64,
    /// Append time before which frames are skipped.
    since_us: u64,
    open: Option<Open>,
}

/// What a log remembers about its readers, for programs that determine what a host would do with it.
pub struct Remembered {
    pub identity: Identity,
    /// First stored offset, and one past the last that is proven to be durable.
    pub bounds: Range<Offset>,
    marks: BTreeMap<String, Mark>,
}

impl Remembered {
    /// Returns what a reader of this name would be told about earlier deliveries.
    pub fn delivered(&self, consumer: &str) -> Delivered {
        delivered_to(&self.marks, consumer)
    }

    /// Returns the first of these names that a reader has, otherwise the first of them: the reader whose
    /// place a new reader with the others as former names would take.
    pub fn reader(&self, consumer: String, mut formerly: impl Iterator<Item = String>) -> String {
        match self.marks.contains_key(&consumer) {
            true => consumer,
            false => formerly.find(|name| self.marks.contains_key(name)).unwrap_or(consumer),
        }
    }

    /// Returns how many messages the reader that is farthest behind lacks, of the readers for which
    /// `is_meant` is true.
    pub fn lacked(&self, is_meant: impl Fn(&str) -> bool) -> u64 {
        let readers = self.marks.iter().filter(|(name, _)| is_meant(name));
        let next = readers.map(|(_, mark)| mark.next.load(Ordering::Relaxed).max(self.bounds.start.0));
        next.map(|next| self.bounds.end.0.saturating_sub(next)).max().unwrap_or(0)
    }

    /// Returns what `begin: now` would mean for a reader of this name.
    pub fn begin_now(&self, consumer: &str) -> Option<BeginNow> {
        begin_now(&self.marks, consumer, self.bounds.end)
    }
}

/// The segment that is being read.
struct Open {
    sequence: u64,
    first_frame: u64,
    /// Base offset and first frame of the next segment, which proves all of this one.
    next: Option<(u64, u64)>,
    scan: Scan,
    /// Place before which nothing wanted lies. Never after a mark, which is overwritten.
    from: Place,
    /// Position of the next frame, and the mark that is there, with zeros after it. While this is so,
    /// there is nothing new in this segment.
    end: Option<(u64, Vec<u8>)>,
}

enum Found {
    Frame(Frame),
    /// There is no whole frame up to here.
    GapTo(u64),
    Nothing,
}

impl ReadOnly {
    /// Reads from `from` on.
    pub fn open(dir: &Path, from: Offset) -> Self {
        Self::open_on(Box::new(RealDisk::default()), dir, from)
    }

    pub(super) fn open_on(disk: Box<dyn Disk>, dir: &Path, from: Offset) -> Self {
        let disk = Box::new(Uninterrupted(disk.into()));
        Self { disk, dir: dir.to_path_buf(), at: from.0, since_us: 0, open: None }
    }

    /// Skips messages older than `age_max`, as if retention had already removed them.
    pub fn newer_than(mut self, age_max: Option<Duration>) -> Self {
        let (wall_us, _) = clock::system()();
        self.since_us = age_max.map_or(0, |age_max| self.append_time(wall_us, age_max));
        self
    }

    /// Returns the append time of `ago`; 0 if it is not known. The host that writes the log measures
    /// more exactly.
    fn append_time(&self, wall_us: u64, ago: Duration) -> u64 {
        let replay =
            |segments: Vec<_>| recover::replay(&*self.disk, &self.dir, &segments, &Known::default()).ok();
        let Some(replayed) = self.segments().ok().and_then(replay) else { return 0 };
        let now_us = wall_us.max(replayed.clock_us);
        if !clock::is_set(now_us) {
            return 0;
        }
        let timeline = replayed.timeline();
        timeline.append_at(timeline.elapsed_at(now_us).saturating_sub(ago.as_micros() as u64))
    }

    /// Continues to read from `from`.
    pub fn seek(&mut self, from: Offset) {
        self.at = from.0;
        self.open = None;
    }

    /// Returns the offset of the next message to be read.
    pub fn position(&self) -> Offset {
        Offset(self.at)
    }

    /// Returns the names of the folders in `dir` that hold a log, in order.
    pub fn streams_in(dir: &Path) -> io::Result<Vec<String>> {
        let Some(folders) = found(std::fs::read_dir(dir))? else { return Ok(Vec::new()) };
        let has_log = |folder: &Path| !matches!(Self::open(folder, Offset(0)).partitions(), Ok(None));
        let folders = folders.flatten().filter(|folder| folder.path().is_dir() && has_log(&folder.path()));
        let mut names: Vec<_> =
            folders.map(|folder| folder.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        Ok(names)
    }

    /// Returns the number of partitions with which the log was created; `None` if it was never opened
    /// for writing.
    pub fn partitions(&self) -> io::Result<Option<u16>> {
        let metadata = generations::read(&*self.disk, &self.dir)?;
        Ok(metadata.and_then(|metadata| metadata.current().map(|generation| generation.partitions)))
    }

    /// Returns how often the log was opened for writing.
    pub fn openings(&self) -> io::Result<u64> {
        Ok(generations::read(&*self.disk, &self.dir)?.map_or(0, |metadata| metadata.epoch))
    }

    /// Returns what the log remembers about its readers; `None` if it was never opened for writing.
    pub fn remembered(&self) -> Result<Option<Remembered>, OpenError> {
        let failed = |error| self.io_error(error);
        let Some(metadata) = generations::read(&*self.disk, &self.dir).map_err(failed)? else {
            return Ok(None);
        };
        let Some(current) = metadata.current() else { return Ok(None) };
        let identity =
            Identity { log: metadata.log, generation: current.generation, partitions: current.partitions };
        let replayed =
            recover::replay(&*self.disk, &self.dir, &self.segments()?, &Known::default()).map_err(failed)?;
        let marks = marks(&replayed.state);
        Ok(Some(Remembered { identity, bounds: self.bounds()?, marks }))
    }

    /// Returns the first stored offset, and one past the last that is proven to be durable.
    pub fn bounds(&self) -> Result<Range<Offset>, OpenError> {
        let segments = self.segments()?;
        let start = segments.first().map_or(0, |s| s.header.base);
        let newest = segments.last().map_or(0, |s| s.header.base);
        let mut all = Self::open(&self.dir, Offset(newest));
        while all.read()?.is_some() {}
        Ok(Offset(start)..Offset(all.at))
    }

    /// Returns the next frame's messages, or a gap; `None` if nothing more is proven yet.
    pub fn read(&mut self) -> Result<Option<Read>, OpenError> {
        if self.has_nothing_new().map_err(|error| self.io_error(error))? {
            return Ok(None);
        }
        if let Some(open) = &mut self.open {
            open.scan.stay_in_chunk();
            let found = open.look(self.at);
            if let Found::Frame(frame) = found.map_err(|error| self.io_error(error))? {
                return Ok(Some(self.batch(&frame)));
            }
        }
        for _ in 0..LOOKS_MAX {
            let segments = self.segments()?;
            let Some(first) = segments.first() else { return Ok(None) };
            if self.at < first.header.base {
                return Ok(Some(self.gap(first.header.base, GapCause::Trimmed)));
            }
            let after = segments.partition_point(|s| s.header.base <= self.at);
            let segment = &segments[after.saturating_sub(1)];
            let next = segments.get(after).map(|next| (next.header.base, next.header.first_frame));
            match self.read_from(segment, next) {
                // Trimmed meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                read => return read.map_err(|error| self.io_error(error)),
            }
        }
        Ok(None)
    }

    /// Returns the entries of the state map whose keys begin with `prefix`, in key order. A very recent
    /// change may be missing, or not proven to be durable yet.
    pub fn state(&self, prefix: &[u8]) -> Result<StateEntries, OpenError> {
        let prefix = state::key(USERS, prefix);
        for _ in 0..LOOKS_MAX {
            match recover::replay(&*self.disk, &self.dir, &self.segments()?, &Known::default()) {
                Ok(replayed) => {
                    let entries = replayed.state.range(&prefix);
                    return Ok(entries.map(|(key, value)| (key[1..].to_vec(), value.to_vec())).collect());
                }
                // Trimmed meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(self.io_error(error)),
            }
        }
        Ok(Vec::new())
    }

    /// Returns whether there is nothing new, by reading a few bytes, if the last read came to the end.
    fn has_nothing_new(&self) -> io::Result<bool> {
        let Some(Open { sequence, scan, end: Some((at, before)), .. }) = &self.open else {
            return Ok(false);
        };
        let is_newer = |name: &String| segment::sequence_of(name).is_some_and(|other| other > *sequence);
        Ok(scan.is_still(*at, before)? && !self.disk.list(&self.dir)?.iter().any(is_newer))
    }

    fn read_from(
        &mut self,
        segment: &recover::Segment,
        next: Option<(u64, u64)>,
    ) -> io::Result<Option<Read>> {
        let header = &segment.header;
        let mut open = match self.open.take() {
            Some(open) if open.sequence == header.sequence => open,
            _ => {
                let path = self.dir.join(segment::name(header.sequence));
                let scan = Scan::new(self.disk.open(&path, Create::ReadOnly)?, header, segment.limit);
                let from = scan.place();
                let end = None;
                Open { sequence: header.sequence, first_frame: header.first_frame, next, scan, from, end }
            }
        };
        open.next = next;
        let mut gap = None;
        loop {
            open.scan.refresh(segment.limit);
            match open.look(self.at)? {
                Found::Frame(frame) => {
                    self.open = Some(open);
                    return Ok(Some(self.batch(&frame)));
                }
                Found::Nothing => {
                    self.open = Some(open);
                    return Ok(None);
                }
                // Twice the same: what was half written the first time is whole the second.
                Found::GapTo(to) if gap == Some(to) => {
                    self.open = Some(open);
                    return Ok(Some(self.gap(to, GapCause::Damaged)));
                }
                Found::GapTo(to) => gap = Some(to),
            }
        }
    }

    fn batch(&mut self, frame: &Frame) -> Read {
        if clock::is_set(frame.append_us) && frame.append_us < self.since_us {
            return self.gap(frame.end(), GapCause::Trimmed);
        }
        let batch = frame.batch(self.at, usize::MAX >> 1);
        self.at = frame.end();
        Read::Batch(batch)
    }

    fn gap(&mut self, to: u64, cause: GapCause) -> Read {
        let from = std::mem::replace(&mut self.at, to);
        Read::Gap { from: Offset(from), to: Offset(to), cause }
    }

    fn segments(&self) -> Result<Vec<recover::Segment>, OpenError> {
        let known = generations::read(&*self.disk, &self.dir).map_err(|error| self.io_error(error))?;
        Ok(recover::segments(&*self.disk, &self.dir, known.as_ref())?.all)
    }

    fn io_error(&self, error: io::Error) -> OpenError {
        OpenError::Io { dir: self.dir.display().to_string(), error }
    }
}

impl Open {
    /// Returns the first proven frame that holds something from `at` on.
    fn look(&mut self, at: u64) -> io::Result<Found> {
        let (end, void_from) = self.next.unwrap_or((u64::MAX, u64::MAX));
        let mut mark = Vec::new();
        self.end = None;
        let mut proven = if self.next.is_some() { void_from } else { self.first_frame };
        let mut passed: Option<(u64, Place)> = None;
        let mut waiting: Option<(u64, Place, Result<Frame, u64>)> = None;
        self.scan.back_to(self.from);
        loop {
            match waiting.take() {
                Some((sequence, after, frame)) if sequence < proven => {
                    return Ok(match frame {
                        Ok(frame) if frame.base > at => Found::GapTo(frame.base),
                        Ok(frame) => {
                            self.from = after;
                            Found::Frame(frame)
                        }
                        Err(to) => Found::GapTo(to),
                    });
                }
                other => waiting = other,
            }
            match self.scan.next()? {
                Step::Frame { header, .. } if header.sequence >= void_from => break,
                Step::Frame { header, at: place } => {
                    mark.clear();
                    if header.flags & flags::MARK != 0 {
                        mark.extend_from_slice(&self.scan.bytes(&header, place)?);
                    }
                    proven = proven.max(header.durable_frames);
                    if let Some((_, place)) = passed.take_if(|(sequence, _)| *sequence < proven) {
                        self.from = place;
                    }
                    if waiting.is_some() || header.flags & flags::MARK != 0 {
                        continue;
                    }
                    if header.end() <= at {
                        passed = Some((header.sequence, self.scan.place()));
                        continue;
                    }
                    if header.count > 0 {
                        let after = self.scan.place();
                        let body = self.scan.body(&header, place)?;
                        let body = body.map(|(frame, _)| frame).map_err(|_| header.end());
                        waiting = Some((header.sequence, after, body));
                    }
                }
                Step::Broken { .. } => {}
                Step::End { at, torn: 0 } if self.next.is_none() => {
                    self.end = Some((at - mark.len() as u64, mark));
                    break;
                }
                Step::End { .. } => break,
            }
        }
        Ok(if self.next.is_some() && at < end { Found::GapTo(end) } else { Found::Nothing })
    }
}
