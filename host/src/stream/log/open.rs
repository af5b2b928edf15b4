//! Opening a log for writing, in the order that makes each step safe.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, RwLock};

use tokio::sync::watch;
use uuid::Uuid;

use super::append::Front;
use super::clock::{Clock, Source};
use super::commit::{CommitError, Writer};
use super::disk::{Create, Disk, File, SlowDisk, SyncSite, Uninterrupted, is_full, parent};
use super::generations::{self, Metadata};
use super::recover::{self, Known, OpenError, Recovery, Replayed, Segment, Segments};
use super::tail::Tail;
use super::unreadable::{Salvaging, is_unreadable};
use super::{Back, Inner, lock, measure, read, retain, segment, write};
use crate::batch::Offset;
use crate::stream::{Config, GapCause, Identity, Opening, Ticket};
use crate::telemetry::Failures;

const LOCK: &str = "lock";
const GENERATION: u32 = 1;
/// Openings that a log remembers, so that it and a copy of it find where they part.
const OPENINGS_MAX: usize = 256;

pub fn open(
    disk: Arc<dyn Disk>,
    dir: &Path,
    name: &str,
    config: &Config,
    clock: Source,
) -> Result<(Arc<Inner>, Recovery), OpenError> {
    let io_error = |error| OpenError::Io { dir: dir.display().to_string(), error };
    let disk: Arc<dyn Disk> = match config.sync_delay {
        Some(extra) => Arc::new(SlowDisk { disk, extra: extra.0 }),
        None => disk,
    };
    let disk: Arc<dyn Disk> = Arc::new(Uninterrupted(disk));
    let mut recovery = Recovery { created: disk.create_dir(dir).map_err(io_error)?, ..Recovery::default() };
    let held = disk.lock(&dir.join(LOCK)).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => OpenError::Locked(dir.display().to_string()),
        _ => io_error(error),
    })?;
    for name in disk.list(dir).map_err(io_error)?.iter().filter(|name| name.ends_with(".tmp")) {
        disk.remove(&dir.join(name)).map_err(io_error)?;
    }

    let salvaging = Salvaging::new(&*disk);
    let (mut metadata, Segments { all: mut segments, left_out }) =
        metadata(&salvaging, dir, config, &mut recovery)?;
    if let Some(left_out) = &left_out {
        let path = dir.join(segment::name(left_out.sequence));
        // What the disk does not give reads as zeros, and may be frames.
        if metadata.closed.is_none() && salvaging.given_up(&path).has_any() {
            return Err(OpenError::Unreadable { path: path.display().to_string() });
        }
    }
    let opened_at = metadata.openings.last().map_or(0, |(_, first)| *first);
    let known = Known { closed: metadata.closed, opened_at, left_out };
    if known.left_out.is_none() {
        metadata.closed = None;
    }
    let replayed = recover::replay(&salvaging, dir, &segments, &known).map_err(io_error)?;
    recovery.unread = salvaging.take_unread();
    for segment in &mut segments {
        segment.given_up = salvaging.given_up(&dir.join(segment::name(segment.header.sequence)));
    }
    let openings = openings(metadata.openings(), &segments, replayed.next_offset);
    metadata.set_openings(&openings);
    let generation = metadata.generations.last().expect("made or read with at least one");
    let identity =
        Identity { log: metadata.log, generation: generation.generation, partitions: generation.partitions };
    recovery.torn_bytes = replayed.torn_bytes;
    recovery.damaged = replayed.damaged.clone();
    recovery.frames = replayed.frames;
    recovery.rewritten = replayed.unproven.iter().map(|frame| u64::from(frame.count)).sum();
    recovery.messages =
        replayed.next_offset - segments.first().map_or(replayed.next_offset, |s| s.header.base);

    let inner = Arc::new(
        build(disk, dir, name, config, clock, identity, segments, held, &replayed, metadata, openings)
            .map_err(io_error)?,
    );
    inner.begin(&replayed).map_err(io_error)?;
    inner.say(&recovery);
    Ok((inner, recovery))
}

/// What the stream is, and its segments.
fn metadata(
    disk: &dyn Disk,
    dir: &Path,
    config: &Config,
    recovery: &mut Recovery,
) -> Result<(Metadata, Segments), OpenError> {
    let io_error = |error| OpenError::Io { dir: dir.display().to_string(), error };
    let mut unread = None;
    let stored = match generations::read(disk, dir) {
        Err(error) if is_unreadable(&error) => {
            unread = Some(error);
            None
        }
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            tracing::error!(dir = %dir.display(), %error, "the stream's metadata is damaged, read from its segments");
            recovery.metadata_rebuilt = true;
            None
        }
        other => other.map_err(io_error)?,
    };
    let segments = recover::segments(disk, dir, stored.as_ref())?;
    if let Some(error) = unread {
        let path = dir.join(generations::NAME).display().to_string();
        if segments.all.is_empty() {
            return Err(OpenError::Metadata { path, error });
        }
        tracing::error!(file = path, %error,
            "the disk does not give the stream's metadata, which is read from its segments: replace the disk; messages \
             that it lost at the end of the log are not told");
    }
    let mut metadata = match (stored, segments.all.last()) {
        (Some(stored), _) => stored,
        (None, Some(newest)) => {
            recovery.metadata_rebuilt = true;
            Metadata::from_segment(&newest.header)
        }
        (None, None) => {
            recovery.created = true;
            Metadata::new(Uuid::new_v4(), GENERATION, config.partitions, 0)
        }
    };
    let newest_epoch = segments.all.iter().map(|s| s.header.epoch).max().unwrap_or(0);
    metadata.epoch = metadata.epoch.max(newest_epoch) + 1;
    let stored = metadata.current().map_or(0, |generation| generation.partitions);
    if stored != config.partitions {
        let dir = dir.display().to_string();
        return Err(OpenError::Partitions { dir, stored, wanted: config.partitions });
    }
    Ok((metadata, segments))
}

/// The openings that wrote what the log holds, as the metadata and the segments tell, and the
/// one that begins now.
fn openings(stored: Vec<Opening>, segments: &[Segment], end: u64) -> Vec<Opening> {
    let mut all = stored;
    let start = segments.first().map_or(end, |segment| segment.header.base);
    for header in segments.iter().map(|segment| &segment.header) {
        let is_known = all.iter().any(|opening| opening.id == header.opening);
        if header.opening != Opening::UNKNOWN && !is_known {
            all.push(Opening { id: header.opening, first: Offset(header.opening_first) });
        }
    }
    // Of several that begin at one offset only the newest can have messages. It has the last
    // segment of them; one without a segment appended nothing.
    let place = |id| segments.iter().position(|segment| segment.header.opening == id);
    all.sort_by_key(|opening| (opening.first, place(opening.id)));
    if start < end && all.first().is_none_or(|oldest| oldest.first.0 > start) {
        all.insert(0, Opening { id: Opening::UNKNOWN, first: Offset(start) });
    }
    // Those that have messages in the log.
    let nexts: Vec<u64> = all.iter().skip(1).map(|next| next.first.0.min(end)).chain([end]).collect();
    let mut nexts = nexts.into_iter();
    all.retain(|opening| nexts.next().is_some_and(|next| opening.first.0.max(start) < next));
    all.push(Opening { id: uuid::Uuid::new_v4().as_u64_pair().0.max(1), first: Offset(end) });
    let gone = all.len().saturating_sub(OPENINGS_MAX);
    all.split_off(gone)
}

#[allow(clippy::too_many_arguments)]
fn build(
    disk: Arc<dyn Disk>,
    dir: &Path,
    name: &str,
    config: &Config,
    clock: Source,
    identity: Identity,
    segments: Vec<Segment>,
    held: Box<dyn Send + Sync>,
    replayed: &Replayed,
    metadata: Metadata,
    openings: Vec<Opening>,
) -> io::Result<Inner> {
    let last = segments.last();
    let file: Arc<dyn File> = match last {
        Some(last) => disk.open(&dir.join(segment::name(last.header.sequence)), Create::Existing)?,
        None => Arc::new(NoFile),
    };
    let base = replayed.unproven.first().map_or(replayed.next_offset, |frame| frame.base);
    let active = (last.map_or(0, |last| last.header.sequence), Arc::clone(&file));
    let writer = Writer {
        file,
        at: replayed.proven_at,
        len: replayed.proven_at,
        salt: 0,
        segment: replayed.newest,
        epoch: metadata.epoch,
        next_frame: replayed.first_frame,
        durable_frames: replayed.first_frame,
        durable_through: base,
        previous_crc: replayed.previous_crc,
        clock_us: replayed.clock_us,
        clock_changes: 0,
        committed: replayed.state.clone(),
        in_hand: None,
        spare: None,
        changes: Vec::new(),
        marked: false,
        is_awaited: false,
    };
    let tail_bytes_max = config.tail_bytes_max.0 as usize;
    Ok(Inner {
        name: name.to_owned(),
        dir: dir.to_path_buf(),
        disk,
        identity,
        buffer_bytes_max: config.commit_buffer_bytes_max.0 as usize,
        takes_any_message: config.takes_any_message,
        segment_bytes: config.segment_bytes.0,
        reserve_bytes: config.reserve_bytes.0,
        max_bytes: config.retention.max_bytes.0,
        max_age: config.retention.max_age.map(|age| age.0),
        opening: AtomicBool::new(true),
        // Opening may: a full disk must not keep the host from draining it.
        may_use_reserve: AtomicBool::new(true),
        reserve_lacks_room: AtomicBool::new(false),
        removal_fails: AtomicBool::new(false),
        use_reserve_while_running: config.may_use_reserve,
        clock: Mutex::new(Clock::new(clock, replayed.timeline(), replayed.clock_us)),
        metadata,
        openings,
        metrics: measure::Meters::new(name),
        told: Mutex::default(),
        read_faults: Mutex::default(),
        failures: Failures::default(),
        front: Mutex::new(Front::new(replayed.next_offset, replayed.state.clone())),
        wake: Condvar::new(),
        writer: Mutex::new(writer),
        active: Mutex::new(active),
        back: RwLock::new(Back {
            segments: segments.into(),
            tail: Tail::new(tail_bytes_max),
            end: replayed.next_offset,
            marks: retain::marks(&replayed.state),
        }),
        lack: AtomicU8::new(0),
        at_work_since: Mutex::new(None),
        slowness: Mutex::default(),
        prepared: Mutex::new(None),
        prepare_asked: AtomicBool::new(false),
        trimming: Mutex::new(false),
        wanted: Mutex::default(),
        keeper: Condvar::new(),
        durable: Mutex::new(Some(watch::channel(Ticket::default()).0)),
        moved: watch::channel(0).0,
        space: watch::channel(0).0,
        stopped: watch::channel(None).0,
        _lock: held,
    })
}

impl Inner {
    /// Metadata, then a segment of this opening with all that nothing proved,
    /// both durable before anything is served. A log without room for the segment
    /// is served all the same: readers drain it, and appends wait.
    fn begin(&self, replayed: &Replayed) -> io::Result<()> {
        // Each opening: a crash may have come between the folder and this.
        self.disk.sync_dir(&parent(&self.dir), SyncSite::Folder)?;
        self.write_metadata(&self.metadata)?;
        let mut writer = lock(&self.writer);
        match self.roll(&mut writer, 0, &replayed.unproven) {
            Ok(()) => self.opened(),
            Err(CommitError::NoSpace(lack)) if !read(&self.back).segments.is_empty() => {
                self.prove_in_place(&mut writer, replayed)?;
                self.set_lack(Some(lack));
                Ok(())
            }
            Err(CommitError::NoSpace(lack)) => Err(io::Error::other(lack.to_string())),
            Err(CommitError::Failed(_, error)) => Err(error),
        }
    }

    fn write_metadata(&self, metadata: &Metadata) -> io::Result<()> {
        match generations::write(&*self.disk, &self.dir, metadata) {
            // The old one stays: epoch and opening are in the segments too.
            Err(error) if is_full(&error) && !metadata.is_new() => {
                let _ = self.disk.remove(&self.dir.join(generations::TEMPORARY));
                Ok(())
            }
            other => other,
        }
    }

    /// Makes durable where it lies what nothing proves, for want of room to repeat it. It is
    /// written over with the same bytes: a crash meanwhile changes nothing that was durable, and
    /// the sync is one for these pages, whatever an earlier one did with them.
    fn prove_in_place(&self, writer: &mut Writer, replayed: &Replayed) -> io::Result<()> {
        let (at, end) = (replayed.proven_at, replayed.whole_at);
        if at < end {
            let mut bytes = vec![0; (end - at) as usize];
            if writer.file.read_at(&mut bytes, at)? < bytes.len() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            writer.file.write_at(&[&bytes], at)?;
            writer.file.sync(SyncSite::Frame)?;
        }
        writer.at = end;
        writer.len = end;
        writer.next_frame = replayed.end_frame.max(replayed.first_frame);
        writer.durable_frames = writer.next_frame;
        writer.durable_through = replayed.next_offset;
        if let Some(last) = write(&self.back).segments.back_mut() {
            last.limit = end;
        }
        Ok(())
    }

    /// Makes the segment of this opening, where there was no room for it before. Readers have
    /// been served meanwhile, and nothing was appended.
    pub fn finish_opening(&self, writer: &mut Writer) -> Result<(), CommitError> {
        if self.opening.load(Ordering::Relaxed) {
            self.roll(writer, 0, &[])?;
            self.opened().map_err(|error| CommitError::Failed("remove a replaced segment", error))?;
            self.set_lack(None);
        }
        Ok(())
    }

    /// The segment of this opening is there.
    fn opened(&self) -> io::Result<()> {
        self.remove_replaced()?;
        // Until now it said where the log ended whose newest segment is left out: a crash before this line
        // leaves a log that can be opened again.
        if self.metadata.closed.is_some() {
            self.write_metadata(&Metadata { closed: None, ..self.metadata.clone() })?;
        }
        self.opening.store(false, Ordering::Relaxed);
        self.may_use_reserve.store(self.use_reserve_while_running, Ordering::Relaxed);
        self.fill_reserve();
        Ok(())
    }

    /// The segment before ours, when ours repeats all that it had.
    fn remove_replaced(&self) -> io::Result<()> {
        let replaced = {
            let mut back = write(&self.back);
            let [.., old, new] = &back.segments.make_contiguous()[..] else { return Ok(()) };
            if old.header.base != new.header.base {
                return Ok(());
            }
            let at = back.segments.len() - 2;
            back.segments.remove(at)
        };
        let Some(replaced) = replaced else { return Ok(()) };
        self.disk.remove(&self.dir.join(segment::name(replaced.header.sequence)))?;
        self.disk.sync_dir(&self.dir, SyncSite::Removal)
    }

    fn say(&self, recovery: &Recovery) {
        let back = read(&self.back);
        let (start, end) = (back.start(), back.end);
        tracing::info!(stream = %self.name, start, end, segments = back.segments.len(), "stream open");
        let Recovery { torn_bytes, rewritten, .. } = *recovery;
        if torn_bytes > 0 || rewritten > 0 {
            tracing::info!(stream = %self.name, torn_bytes, rewritten,
                "the last run ended without closing the stream: cut unacknowledged bytes, wrote the last commit again");
        }
        let (headers, unread): (Vec<_>, Vec<_>) =
            recovery.unread.iter().partition(|unread| unread.is_header());
        for unread in headers {
            tracing::error!(stream = %self.name, file = %unread.path.display(), bytes = ?unread.bytes,
                "the disk does not give the header of this file, and no message is lost by that: replace the disk");
        }
        for unread in unread {
            tracing::error!(stream = %self.name, file = %unread.path.display(), bytes = ?unread.bytes,
                "the disk does not give these bytes, and the start did without them: what they hold is lost");
        }
        for damage in &recovery.damaged {
            let Offset(from) = damage.offsets.start;
            let Offset(to) = damage.offsets.end;
            // Here, and not where a reader comes upon it: none may ever do.
            let new = lock(&self.told).add(from..to);
            self.metrics.gap(new, GapCause::Damaged);
            let what = if from < to { "messages" } else { "state changes" };
            tracing::error!(stream = %self.name, segment = damage.segment, bytes = ?damage.bytes, from, to,
                "{what} lost: their bytes on disk are damaged or missing");
        }
    }
}

/// Stands for the last segment of a log that has none yet.
struct NoFile;

impl File for NoFile {
    fn read_at(&self, _: &mut [u8], _: u64) -> io::Result<usize> {
        Ok(0)
    }
    fn write_at(&self, _: &[&[u8]], _: u64) -> io::Result<()> {
        Err(io::ErrorKind::NotFound.into())
    }
    fn sync(&self, _: SyncSite) -> io::Result<()> {
        Ok(())
    }
    fn preallocate(&self, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn truncate(&self, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn len(&self) -> io::Result<u64> {
        Ok(0)
    }
}
