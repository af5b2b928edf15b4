//! Reads a log's folder from another process while the host runs: only
//! messages that something on disk proves durable.

use std::io;
use std::path::{Path, PathBuf};

use super::disk::{Create, Disk, RealDisk};
use super::generations;
use super::recover::{self, OpenError};
use super::scan::{Scan, Step};
use super::segment;
use super::tail::Frame;
use crate::batch::Offset;
use crate::stream::{GapCause, Read};

/// A reader that takes no lock and writes nothing.
pub struct ReadOnly {
    disk: Box<dyn Disk>,
    dir: PathBuf,
    at: u64,
}

impl ReadOnly {
    /// Reads from `from` on.
    pub fn open(dir: &Path, from: Offset) -> Self {
        Self { disk: Box::new(RealDisk), dir: dir.to_path_buf(), at: from.0 }
    }

    /// Offset of the next message to be read.
    pub fn position(&self) -> Offset {
        Offset(self.at)
    }

    /// First offset kept and one past the last that is proven durable.
    pub fn bounds(&self) -> Result<std::ops::Range<Offset>, OpenError> {
        let start = self.segments()?.first().map_or(0, |s| s.header.base);
        let mut all = Self { disk: Box::new(RealDisk), dir: self.dir.clone(), at: 0 };
        if let Some(newest) = self.segments()?.last() {
            all.at = newest.header.base;
        }
        while all.read()?.is_some() {}
        Ok(Offset(start)..Offset(all.at))
    }

    /// The next frame's messages, or a gap; `None` where nothing more is proven yet.
    pub fn read(&mut self) -> Result<Option<Read>, OpenError> {
        let segments = self.segments()?;
        let Some(first) = segments.first() else { return Ok(None) };
        if self.at < first.header.base {
            return Ok(Some(self.gap(first.header.base, GapCause::Trimmed)));
        }
        let after = segments.partition_point(|s| s.header.base <= self.at);
        let segment = &segments[after.saturating_sub(1)];
        let next = segments.get(after).map(|next| (next.header.base, next.header.first_frame));
        self.read_from(segment, next).map_err(|error| self.io_error(error))
    }

    fn read_from(
        &mut self,
        segment: &recover::Segment,
        next: Option<(u64, u64)>,
    ) -> io::Result<Option<Read>> {
        let path = self.dir.join(segment::name(segment.header.sequence));
        let file = match self.disk.open(&path, Create::ReadOnly) {
            // Trimmed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let mut scan = Scan::new(file, &segment.header, segment.limit);
        let (end, void_from) = next.unwrap_or((u64::MAX, u64::MAX));
        // A later segment proves all of this one.
        let mut proven = if next.is_some() { void_from } else { segment.header.first_frame };
        let mut waiting: Option<(u64, Result<Frame, u64>)> = None;
        loop {
            match &waiting {
                Some((sequence, frame)) if *sequence < proven => {
                    return Ok(Some(match frame {
                        Ok(frame) if frame.base > self.at => self.gap(frame.base, GapCause::Damaged),
                        Ok(frame) => {
                            let batch = frame.batch(self.at, usize::MAX >> 1);
                            self.at = frame.end();
                            Read::Batch(batch)
                        }
                        Err(to) => self.gap(*to, GapCause::Damaged),
                    }));
                }
                _ => {}
            }
            match scan.next()? {
                Step::Frame { header, .. } if header.sequence >= void_from => break,
                Step::Frame { header, at } => {
                    proven = proven.max(header.durable_frames);
                    if waiting.is_some() || header.count == 0 || header.end() <= self.at {
                        continue;
                    }
                    let body = scan.body(&header, at)?;
                    waiting = Some((header.sequence, body.map(|(frame, _)| frame).map_err(|_| header.end())));
                }
                Step::Broken { .. } => {}
                Step::End { .. } => break,
            }
        }
        Ok((next.is_some() && self.at < end).then(|| self.gap(end, GapCause::Damaged)))
    }

    fn gap(&mut self, to: u64, cause: GapCause) -> Read {
        let from = std::mem::replace(&mut self.at, to);
        Read::Gap { from: Offset(from), to: Offset(to), cause }
    }

    fn segments(&self) -> Result<Vec<recover::Segment>, OpenError> {
        let known = generations::read(&*self.disk, &self.dir).map_err(|error| self.io_error(error))?;
        recover::segments(&*self.disk, &self.dir, known.as_ref())
    }

    fn io_error(&self, error: io::Error) -> OpenError {
        OpenError::Io { dir: self.dir.display().to_string(), error }
    }
}
