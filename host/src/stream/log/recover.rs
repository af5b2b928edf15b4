//! Opening: what the segments hold, what of it is torn, damaged or unproven.
//!
//! A frame is proven durable when a later frame, a mark or a later segment says
//! so. Bytes that are no frame are damage where something proves that a frame
//! was there, a torn tail otherwise. The last frames that nothing proves were
//! perhaps acknowledged and perhaps only in the page cache of a failed sync:
//! they are written again, into a new segment, before the log serves.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use super::clock::Timeline;
use super::disk::{Create, Disk, File};
use super::frame::{self, Changes, Kind, flags};
use super::generations::{Closed, Metadata};
use super::scan::{Landmarks, Scan, Step};
use super::segment::{self, FRAMES_AT};
use super::state::{self, State};
use super::tail::Frame;
use super::unreadable::{GivenUp, Unread};
use crate::batch::Offset;
use crate::stream::Opening;

/// Bytes of a segment that are read at once to learn whether all are zero.
const ZEROS_AT_ONCE: usize = 256 << 10;

/// What opening found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// There was no stream before.
    pub created: bool,
    /// The metadata file was missing or damaged and was made again from the segments.
    pub metadata_rebuilt: bool,
    /// Bytes of a commit that never finished: nobody was told that it was there.
    pub torn_bytes: u64,
    /// Messages lost to damage, in the part that opening reads (the newest
    /// segment); older damage is found, and reported, by whoever reads it.
    pub damaged: Vec<Damage>,
    /// What the disk did not give, and the opening did without.
    pub unread: Vec<Unread>,
    /// Offsets that can be read.
    pub messages: u64,
    /// Frames that opening read.
    pub frames: u64,
    /// Messages that nothing proved durable and that were written again.
    pub rewritten: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    pub segment: u64,
    /// Bytes of the segment's file.
    pub bytes: Range<u64>,
    /// Empty where only state changes were lost.
    pub offsets: Range<Offset>,
}

/// One segment of the log.
#[derive(Clone, Debug)]
pub struct Segment {
    pub header: segment::Header,
    pub file_len: u64,
    /// End of the bytes that readers may look at.
    pub limit: u64,
    pub landmarks: Landmarks,
    pub given_up: GivenUp,
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("stream folder {0} is in use by another process: stop that process first")]
    Locked(String),
    #[error(
        "stream folder {dir} was made with {stored} partitions, the config says {wanted}: \
         set `partitions: {stored}`, or use another stream name"
    )]
    Partitions { dir: String, stored: u16, wanted: u16 },
    #[error("{path}: {cause}")]
    Segment { path: String, cause: segment::Broken },
    #[error("{path} belongs to another log: the folder was mixed with a copy of another")]
    Foreign { path: String },
    #[error(
        "{path}: header and first frame of the newest segment are both damaged, and frames may follow them: move the file \
         away to continue without it"
    )]
    Unreadable { path: String },
    #[error("{path}: the stream's metadata cannot be read, and no segment is there to make it from: {error}")]
    Metadata { path: String, error: io::Error },
    #[error("stream folder {dir}: {error}")]
    Io { dir: String, error: io::Error },
}

/// The newest segment, if header and first frame are both damaged, and the log can go on without it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftOut {
    pub sequence: u64,
    pub file_len: u64,
}

/// The segments of a folder.
#[derive(Debug)]
pub struct Segments {
    /// Oldest first.
    pub all: Vec<Segment>,
    pub left_out: Option<LeftOut>,
}

/// Returns the segments of a folder. A damaged header is made again from the segment's first frame. A
/// segment whose first frame is damaged too is left out, and readers find a gap there. The newest
/// segment is left out only if the log was closed, so that its end is known, or if no frame can
/// follow the first one. Otherwise nobody would know where the log ended.
pub fn segments(disk: &dyn Disk, dir: &Path, known: Option<&Metadata>) -> Result<Segments, OpenError> {
    let io_error = |error| OpenError::Io { dir: dir.display().to_string(), error };
    let mut sequences: Vec<u64> =
        disk.list(dir).map_err(io_error)?.iter().filter_map(|name| segment::sequence_of(name)).collect();
    sequences.sort_unstable();
    let mut found: Vec<Segment> = Vec::with_capacity(sequences.len());
    let newest = sequences.last().copied();
    let mut left_out = None;
    for sequence in sequences {
        let path = dir.join(segment::name(sequence));
        let shown = || path.display().to_string();
        let file = match disk.open(&path, Create::ReadOnly) {
            // Read from another process: trimmed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other.map_err(io_error)?,
        };
        let mut head = vec![0; FRAMES_AT as usize + frame::HEADER_BYTES];
        let read = file.read_at(&mut head, 0).map_err(io_error)?;
        head.truncate(read);
        let header = match segment::Header::decode(&head) {
            Ok(header) if header.sequence == sequence => header,
            Err(cause @ segment::Broken::Newer(..)) => {
                return Err(OpenError::Segment { path: shown(), cause });
            }
            _ => {
                let of_log =
                    known.cloned().or_else(|| found.last().map(|s| Metadata::from_segment(&s.header)));
                let is_known = of_log.is_some();
                let header = of_log.and_then(|of_log| salvage(&head, sequence, &of_log));
                match header {
                    Some(header) => {
                        tracing::error!(segment = %shown(), "the segment's header is damaged, read from its first frame");
                        header
                    }
                    None if Some(sequence) == newest => {
                        let is_closed = known.is_some_and(|known| known.closed.is_some());
                        if !is_known || !is_closed && may_have_frames(&*file).map_err(io_error)? {
                            return Err(OpenError::Unreadable { path: shown() });
                        }
                        let file_len = file.len().map_err(io_error)?;
                        left_out = Some(LeftOut { sequence, file_len });
                        continue;
                    }
                    None => {
                        tracing::error!(segment = %shown(),
                            "header and first frame of the segment are both damaged: its messages are lost; move the \
                             file away");
                        continue;
                    }
                }
            }
        };
        let file_len = file.len().map_err(io_error)?;
        let log = known.map_or_else(|| found.last().map(|s| s.header.log), |known| Some(known.log));
        if log.is_some_and(|log| log != header.log) {
            return Err(OpenError::Foreign { path: shown() });
        }
        let (landmarks, given_up) = (Landmarks::default(), GivenUp::default());
        found.push(Segment { header, file_len, limit: file_len, landmarks, given_up });
    }
    Ok(Segments { all: found, left_out })
}

/// Returns whether a frame may lie behind the header of the first one. Each frame begins with the salt of
/// its segment, so none does where all bytes are zero.
fn may_have_frames(file: &dyn File) -> io::Result<bool> {
    let mut at = FRAMES_AT + frame::HEADER_BYTES as u64;
    let mut bytes = vec![0; ZEROS_AT_ONCE];
    loop {
        match file.read_at(&mut bytes, at)? {
            0 => return Ok(false),
            read if bytes[..read].iter().any(|byte| *byte != 0) => return Ok(true),
            read => at += read as u64,
        }
    }
}

fn salvage(head: &[u8], sequence: u64, known: &Metadata) -> Option<segment::Header> {
    let first = frame::decode_header(head.get(FRAMES_AT as usize..)?).ok()?;
    let generation = known.generations.last()?;
    Some(segment::Header {
        log: known.log,
        generation: generation.generation,
        sequence,
        base: first.base,
        first_frame: first.sequence,
        epoch: known.epoch,
        salt: first.marker,
        partitions: generation.partitions,
        clock_us: first.append_us,
        previous_crc: first.previous_crc,
        opening: Opening::UNKNOWN,
        opening_first: first.base,
    })
}

/// What the newest segments hold.
pub struct Replayed {
    pub state: State,
    pub next_offset: u64,
    /// Sequence of the first frame that nothing proves, or of the next.
    pub first_frame: u64,
    /// One past the sequence of the last frame.
    pub end_frame: u64,
    /// Messages of frames that nothing proves durable, in order.
    pub unproven: Vec<Frame>,
    /// In the last segment: end of what is proven, and of the whole frames behind it.
    pub proven_at: u64,
    pub whole_at: u64,
    pub torn_bytes: u64,
    pub damaged: Vec<Damage>,
    pub frames: u64,
    pub clock_us: u64,
    pub previous_crc: u32,
    /// Sequence of the newest segment, left out or not; 0 if there is none.
    pub newest: u64,
}

impl Replayed {
    /// Returns how append time passed in the log.
    pub fn timeline(&self) -> Timeline {
        let saved = self.state.range(&[state::CLOCK]).next();
        saved.and_then(|(_, value)| Timeline::decode(value)).unwrap_or_default()
    }

    /// Goes on at the end that is known, and takes what is missing before it for damage, and a segment
    /// that was left out.
    fn end_at_least(&mut self, segments: &[Segment], known: &Known) {
        let Some(least) = known.end() else { return };
        let is_short = self.next_offset < least.offset || self.end_frame < least.frames;
        let (segment, bytes) = match (&known.left_out, segments.last()) {
            (Some(left_out), _) => (left_out.sequence, 0..left_out.file_len),
            (None, Some(last)) if is_short => (last.header.sequence, self.proven_at..last.limit),
            (None, None) if is_short => (0, self.proven_at..0),
            (None, _) => return,
        };
        self.newest = segment.max(self.newest);
        let offsets = Offset(self.next_offset)..Offset(least.offset.max(self.next_offset));
        if is_short {
            // What proves the end proves the frames that lie before it.
            self.unproven.clear();
            self.proven_at = self.whole_at;
            self.torn_bytes = 0;
            self.next_offset = offsets.end.0;
            self.first_frame = self.end_frame.max(least.frames);
        }
        self.damaged.push(Damage { segment, bytes, offsets });
    }
}

/// What proves how far the log went, beside its segments.
#[derive(Default)]
pub struct Known {
    /// The end of the log when it was last closed.
    pub closed: Option<Closed>,
    /// First offset of the last opening that the metadata has: all before it was in the log.
    pub opened_at: u64,
    pub left_out: Option<LeftOut>,
}

impl Known {
    /// Returns the least end of the log: less is damage.
    fn end(&self) -> Option<Closed> {
        let opened = self.left_out.as_ref().map(|_| Closed { offset: self.opened_at, frames: 0 });
        self.closed.or(opened)
    }
}

/// Returns the state from the newest whole checkpoint on, and the end of the log. What is missing before
/// the end that is known is damage.
pub fn replay(disk: &dyn Disk, dir: &Path, segments: &[Segment], known: &Known) -> io::Result<Replayed> {
    let mut replayed = Replayed {
        state: State::default(),
        next_offset: 0,
        first_frame: 0,
        end_frame: 0,
        unproven: Vec::new(),
        proven_at: FRAMES_AT,
        whole_at: FRAMES_AT,
        torn_bytes: 0,
        damaged: Vec::new(),
        frames: 0,
        clock_us: 0,
        previous_crc: 0,
        newest: segments.last().map_or(0, |last| last.header.sequence),
    };
    let mut first = segments.len().saturating_sub(1);
    while first > 0 && !has_checkpoint(open(disk, dir, &segments[first])?, &segments[first])? {
        first -= 1;
    }
    for i in first..segments.len() {
        let file = open(disk, dir, &segments[i])?;
        let durable = known.closed.map_or(0, |closed| closed.frames);
        walk(&mut replayed, file, &segments[i], segments.get(i + 1), i == first, durable)?;
    }
    replayed.end_at_least(segments, known);
    Ok(replayed)
}

fn open(disk: &dyn Disk, dir: &Path, segment: &Segment) -> io::Result<Arc<dyn File>> {
    disk.open(&dir.join(segment::name(segment.header.sequence)), Create::ReadOnly)
}

fn has_checkpoint(file: Arc<dyn File>, segment: &Segment) -> io::Result<bool> {
    let mut scan = Scan::new(file, &segment.header, segment.limit);
    let mut wanted = flags::CHECKPOINT_BEGIN;
    while let Step::Frame { header, at } = scan.next()? {
        if header.kind != Kind::Control || header.flags & wanted != wanted || scan.body(&header, at)?.is_err()
        {
            return Ok(false);
        }
        if header.flags & flags::CHECKPOINT_END != 0 {
            return Ok(true);
        }
        wanted = 0;
    }
    Ok(false)
}

/// A place where a frame should be.
struct Missing {
    at: u64,
    sequence: u64,
}

fn walk(
    replayed: &mut Replayed,
    file: Arc<dyn File>,
    segment: &Segment,
    next: Option<&Segment>,
    trust_checkpoint: bool,
    durable_frames: u64,
) -> io::Result<()> {
    let mut scan = Scan::new(file, &segment.header, segment.limit);
    let void_from = next.map_or(u64::MAX, |next| next.header.first_frame);
    let mut offset = segment.header.base;
    let mut next_frame = segment.header.first_frame;
    let mut proven = segment.header.first_frame.max(durable_frames);
    let mut missing: Option<Missing> = None;
    let mut unproven: Vec<(u64, u64, Frame, Bytes)> = Vec::new();
    replayed.clock_us = replayed.clock_us.max(segment.header.clock_us);
    let mut damaged = Vec::new();
    let mut damage = |bytes: Range<u64>, offsets: Range<u64>| {
        let offsets = Offset(offsets.start)..Offset(offsets.end);
        damaged.push(Damage { segment: segment.header.sequence, bytes, offsets });
    };
    let mut ends_at = loop {
        match scan.next()? {
            Step::End { at, torn } => {
                let torn_from = missing.as_ref().map_or(at, |missing| missing.at);
                if next.is_none() {
                    replayed.torn_bytes = at + torn - torn_from;
                }
                break torn_from;
            }
            Step::Broken { at, .. } => {
                missing.get_or_insert(Missing { at, sequence: scan.expected() });
            }
            Step::Frame { header, at } if header.sequence >= void_from => break at,
            Step::Frame { header, at } => {
                if let Some(gone) = &missing {
                    if next.is_none() && proven.max(header.durable_frames) <= gone.sequence {
                        replayed.torn_bytes = at + header.total_len() - gone.at;
                        break gone.at;
                    }
                    damage(gone.at..at, offset..header.base);
                    missing = None;
                }
                replayed.frames += 1;
                proven = proven.max(header.durable_frames);
                unproven.retain(|(sequence, ..)| *sequence >= proven);
                match scan.body(&header, at)? {
                    Err(_) => missing = Some(Missing { at, sequence: header.sequence }),
                    Ok((frame, state)) => {
                        if header.flags & flags::CHECKPOINT_BEGIN != 0 && trust_checkpoint {
                            replayed.state.clear();
                        }
                        for (key, value) in Changes(&state) {
                            replayed.state.apply((key.into(), value.map(Into::into)));
                        }
                        offset = header.end();
                        replayed.clock_us = replayed.clock_us.max(header.append_us);
                        replayed.previous_crc = header.crc;
                        if header.flags & flags::MARK == 0 {
                            next_frame = header.sequence + 1;
                            if header.sequence >= proven {
                                unproven.push((header.sequence, at, frame, state));
                                replayed.whole_at = at + header.total_len();
                            }
                        } else {
                            next_frame = next_frame.max(header.sequence);
                        }
                    }
                }
            }
        }
    };
    if let Some(next) = next {
        if offset < next.header.base {
            damage(ends_at..segment.limit, offset..next.header.base);
        }
        offset = next.header.base;
    }
    replayed.end_frame = next_frame;
    if let Some((sequence, at, ..)) = unproven.first() {
        next_frame = *sequence;
        ends_at = *at;
    }
    replayed.damaged.append(&mut damaged);
    replayed.next_offset = offset;
    replayed.first_frame = next_frame;
    replayed.proven_at = ends_at;
    replayed.whole_at = if unproven.is_empty() { ends_at } else { replayed.whole_at };
    replayed.unproven = unproven.into_iter().map(|(.., frame, _)| frame).filter(|f| f.count > 0).collect();
    Ok(())
}
