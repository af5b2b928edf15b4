//! Retention and segment files: which segments are removed, by age and by size, with regard to attached
//! readers; the next segment, which is prepared ahead; and the reserve for a full disk. Runs in the
//! keeper's thread and, when a segment is full, in the committer's.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::clock;
use super::commit::{CommitError, no_space_or};
use super::disk::{Create, File, SyncSite, is_full, lacking};
use super::recover::Segment;
use super::segment::{self, FRAMES_AT};
use super::{Inner, lock, read, state, write};
use crate::batch::Offset;
use crate::stream::{Attachment, BeginNow, Delivered, Lack, OnLag};
use crate::threads::{SHORT_TURN, offer_core};

/// Size of the first segment of a new log. Each next one is four times as large, up to `segment_bytes`.
const FIRST_SEGMENT_BYTES: u64 = 4 << 20;
const GROWTH: u64 = 4;
const RESERVE: &str = "reserve";
const RESERVE_NEW: &str = "reserve.tmp";
const ROLLED: &str = "next.tmp";
/// Part of `max_age` at which a segment ends. Its messages are removed at most that much later.
const AGE_PARTS: u32 = 8;
/// Longest interval between two rounds of the keeper.
const KEEP_EVERY_MS: u64 = 1_000;
/// How long size-based retention waits for a reader that was asked and makes no progress.
const ASKED_MAX: Duration = if cfg!(test) { Duration::from_millis(200) } else { Duration::from_secs(10) };
/// How many segments ahead a reader is asked.
const ASKED_SEGMENTS: u64 = 2;
/// Value of [`Mark::remembered`] once the reader has stated its position.
const SAID: u64 = u64::MAX;
const ZEROS: &[u8] = &[0; 1 << 20];

/// Number in the names of prepared files, so that a file that the committer took keeps its name while
/// the keeper creates the next. (`.tmp` files are removed at the next opening.)
static PREPARED: AtomicU64 = AtomicU64::new(0);

/// A reader that retention knows.
#[derive(Clone)]
pub struct Mark {
    pub next: Arc<AtomicU64>,
    /// How often it has reported progress.
    moves: Arc<AtomicU64>,
    pub on_lag: OnLag,
    /// Position before it was attached; [`SAID`] once it has stated its position.
    remembered: Arc<AtomicU64>,
    delivered: Arc<Mutex<Delivered>>,
    told: Arc<Mutex<Told>>,
    /// The mark as a restart would find it; `None` if it could not be stored yet.
    saved: Option<Kept>,
    /// Whether an earlier process stored the mark, and its reader is not attached.
    is_left: bool,
    asked: watch::Sender<Offset>,
    /// Position and progress at the last check at which it held a segment back, and since when.
    held: Option<((u64, u64), Instant)>,
}

impl Mark {
    fn new(next: u64, on_lag: OnLag) -> Self {
        Self {
            next: Arc::new(AtomicU64::new(next)),
            moves: Arc::default(),
            remembered: Arc::new(AtomicU64::new(SAID)),
            delivered: Arc::default(),
            told: Arc::default(),
            on_lag,
            saved: None,
            is_left: false,
            asked: watch::channel(Offset(0)).0,
            held: None,
        }
    }

    /// Returns the mark as it is to be stored. A reader that has not stated its position keeps the
    /// stored one, so that what it can never receive is known when it does.
    fn kept(&self) -> Kept {
        let remembered = self.remembered.load(Ordering::Relaxed);
        Kept {
            next: if remembered == SAID { self.next.load(Ordering::Relaxed) } else { remembered },
            on_lag: self.on_lag,
            delivered: *lock(&self.delivered),
            told: *lock(&self.told),
        }
    }

    /// Asks the reader to advance to `upto`. The reader is given some time for each step.
    fn ask(&mut self, upto: u64) {
        let next = self.next.load(Ordering::Relaxed);
        if !matches!(self.on_lag, OnLag::Ask | OnLag::Hold) || next >= upto {
            self.held = None;
            return;
        }
        let at = (next, self.moves.load(Ordering::Relaxed));
        if self.held.is_none_or(|(before, _)| before != at) {
            self.held = Some((at, Instant::now()));
        }
        self.asked.send_if_modified(|asked| {
            let is_more = asked.0 < upto;
            asked.0 = asked.0.max(upto);
            is_more
        });
    }

    /// Makes the reader appear to have held a segment back for this much longer.
    #[cfg(test)]
    pub fn age(&mut self, by: Duration) {
        if let Some((_, since)) = &mut self.held {
            *since -= by;
        }
    }

    /// Returns whether the reader prevents the removal of messages below `end`.
    fn pins(&self, end: u64, for_bytes: bool) -> bool {
        // A reader whose database was restored while no host ran may need what lies below the mark: its
        // place is known once it is attached.
        let waits_for_reader = self.is_left && self.on_lag == OnLag::Block;
        if self.next.load(Ordering::Relaxed) >= end && !waits_for_reader {
            return false;
        }
        // Who is not there yet after a restart cannot be asked.
        let is_attached = Arc::strong_count(&self.next) > 1;
        let is_over = || self.held.is_some_and(|(_, since)| since.elapsed() > ASKED_MAX);
        match self.on_lag {
            OnLag::Block => true,
            OnLag::Detach => false,
            OnLag::Ask => !(for_bytes && is_attached && is_over()),
            OnLag::Hold => for_bytes && !is_over(),
        }
    }
}

/// A file that was created ahead, with all its pages written.
pub struct Prepared {
    pub file: Arc<dyn File>,
    pub len: u64,
    pub path: PathBuf,
}

#[derive(Default)]
pub struct Wanted {
    pub prepare: bool,
    pub cut: bool,
    pub stop: bool,
}

/// Runs the keeper's thread.
pub fn run(inner: &Inner) {
    loop {
        let wanted = lock(&inner.wanted);
        let pause = Duration::from_millis(KEEP_EVERY_MS);
        let (mut wanted, _) = inner
            .keeper
            .wait_timeout_while(wanted, pause, |wanted| !wanted.stop && !wanted.prepare && !wanted.cut)
            .unwrap_or_else(PoisonError::into_inner);
        if wanted.stop {
            break;
        }
        let Wanted { prepare, .. } = std::mem::take(&mut *wanted);
        drop(wanted);
        inner.keep(prepare);
    }
    inner.failures.flush();
}

impl Inner {
    /// Performs one round of housekeeping.
    pub fn keep(&self, prepare: bool) {
        self.cut();
        self.end_by_age();
        self.save_marks(false);
        self.save_clock();
        self.trim(0);
        if prepare {
            self.prepare();
        }
        if self.lack().is_none() {
            self.fill_reserve();
        }
        let (segments, bytes) = self.sizes();
        self.metrics.kept(bytes, segments);
        self.failures.flush_due();
    }

    fn report(&self, kind: &str, error: &io::Error) {
        self.failures.report(&format!("stream {}: {kind}", self.name), 1, &error.to_string(), "");
    }

    pub fn ask_keeper_to_prepare(&self) {
        if !self.prepare_asked.swap(true, Ordering::Relaxed) {
            lock(&self.wanted).prepare = true;
            self.keeper.notify_all();
        }
    }

    /// Asks the committer for a new segment if the active one has messages and is old.
    fn end_by_age(&self) {
        let Some(age_max) = self.max_age else { return };
        let Some(since) = self.append_time(age_max / AGE_PARTS) else { return };
        let began = {
            let back = read(&self.back);
            let used = back.segments.back().filter(|segment| segment.header.base < back.end);
            used.map(|segment| segment.header.clock_us)
        };
        if began.is_some_and(|began| began <= since) {
            lock(&self.front).roll = true;
            self.wake.notify_all();
        }
    }

    /// Returns the append time before which messages are older than `max_age`, once the clock was set.
    pub fn kept_since_us(&self) -> Option<u64> {
        self.append_time(self.max_age?)
    }

    /// Returns the append time of `ago`, once the clock was set.
    fn append_time(&self, ago: Duration) -> Option<u64> {
        let mut clock = lock(&self.clock);
        clock::is_set(clock.now()).then(|| clock.ago(ago))
    }

    /// Stores the clock's timeline.
    fn save_clock(&self) {
        let Some(changed) = lock(&self.clock).changed() else { return };
        if !self.append_own(state::CLOCK, &[], Some(&changed)) {
            lock(&self.clock).not_saved();
        }
    }

    pub fn ask_keeper_to_cut(&self) {
        lock(&self.wanted).cut = true;
        self.keeper.notify_all();
    }

    /// Frees the space behind the last frame of full segments, where nothing valid lies. Holds no lock
    /// meanwhile, because a disk may take seconds for it.
    fn cut(&self) {
        let cuts: Vec<(u64, u64)> = {
            let back = read(&self.back);
            let full = back.segments.iter().rev().skip(1);
            full.filter(|s| s.file_len > s.limit).map(|s| (s.header.sequence, s.limit)).collect()
        };
        for (sequence, limit) in cuts {
            let path = self.dir.join(segment::name(sequence));
            let cut = self.disk.open(&path, Create::Existing).and_then(|file| file.truncate(limit));
            if let Err(error) = cut {
                // Retention has removed it meanwhile.
                if error.kind() != io::ErrorKind::NotFound {
                    self.report("cannot give back the unused room of a full segment, will try again", &error);
                }
                continue;
            }
            let segments = &mut write(&self.back).segments;
            if let Some(segment) = segments.iter_mut().find(|segment| segment.header.sequence == sequence) {
                segment.file_len = limit;
            }
        }
    }

    /// Creates a file for the next segment under a temporary name, with room for `least` bytes, and for
    /// `wanted` unless the log opens without that much room.
    pub fn new_file(&self, least: u64, wanted: u64) -> Result<(Arc<dyn File>, u64, PathBuf), CommitError> {
        let prepared = lock(&self.prepared).take();
        self.prepare_asked.store(false, Ordering::Relaxed);
        let mut len = prepared.as_ref().map_or_else(|| self.next_len(), |prepared| prepared.len).max(wanted);
        self.trim(len);
        let (segments, bytes) = self.sizes();
        // Two segments always fit, however large the state is that both begin with.
        if segments > 1 && bytes + len > self.max_bytes {
            if !self.opening.load(Ordering::Relaxed) {
                if let Some(prepared) = prepared {
                    self.put_prepared(prepared);
                }
                let lack = match self.removal_fails.load(Ordering::Relaxed) {
                    true => Lack::Removal,
                    false => Lack::Retention,
                };
                return Err(CommitError::NoSpace(lack));
            }
            // No more than is there already: readers must be able to drain it.
            len = least;
        }
        if let Some(Prepared { file, len: had, path }) = prepared {
            // The state grew since.
            if had >= len || file.preallocate(len).is_ok() {
                return Ok((file, len.max(had), path));
            }
            let _ = self.disk.remove(&path);
        }
        let path = self.dir.join(ROLLED);
        let made = self.disk.open(&path, Create::Fresh).and_then(|file| {
            file.preallocate(len)?;
            Ok(file)
        });
        match made {
            Ok(file) => Ok((file, len, path)),
            Err(error) if is_full(&error) => {
                let _ = self.disk.remove(&path);
                self.use_reserve(least, path)
            }
            Err(error) => Err(no_space_or("make a new segment")(error)),
        }
    }

    fn put_prepared(&self, prepared: Prepared) {
        let other = lock(&self.prepared).replace(prepared);
        if let Some(other) = other {
            let _ = self.disk.remove(&other.path);
        }
    }

    /// Turns the reserve, whose blocks are allocated, into the next segment.
    fn use_reserve(&self, least: u64, path: PathBuf) -> Result<(Arc<dyn File>, u64, PathBuf), CommitError> {
        let full = CommitError::NoSpace(Lack::Disk);
        if !self.may_use_reserve.load(Ordering::Relaxed) {
            return Err(full);
        }
        let reserve = self.dir.join(RESERVE);
        let Ok(file) = self.disk.open(&reserve, Create::Existing) else { return Err(full) };
        let len = file.len().map_err(no_space_or("look at the reserve"))?;
        if len < least {
            return Err(full);
        }
        self.disk.rename(&reserve, &path).map_err(no_space_or("rename the reserve"))?;
        self.reserve_lacks_room.store(true, Ordering::Relaxed);
        tracing::warn!(stream = %self.name, "the disk is full, continuing in the reserve");
        Ok((file, len, path))
    }

    /// Creates the reserve if it is missing or too short and there is room. It gets its name after its
    /// blocks are allocated.
    pub fn fill_reserve(&self) {
        let path = self.dir.join(RESERVE);
        if self.reserve_bytes == 0 {
            return;
        }
        match self.disk.open(&path, Create::ReadOnly).and_then(|reserve| reserve.len()) {
            Ok(len) if len >= self.reserve_bytes => {
                return self.reserve_lacks_room.store(false, Ordering::Relaxed);
            }
            // Nothing says that it is gone.
            Err(error) if !is_full(&error) && lacking(&error).is_some() => return,
            _ => {}
        }
        let temporary = self.dir.join(RESERVE_NEW);
        let made = self.disk.open(&temporary, Create::Fresh).and_then(|file| {
            file.preallocate(self.reserve_bytes)?;
            self.disk.rename(&temporary, &path)
        });
        self.reserve_lacks_room.store(made.as_ref().is_err_and(is_full), Ordering::Relaxed);
        if let Err(error) = made {
            let _ = self.disk.remove(&temporary);
            if !is_full(&error) {
                self.report("cannot make the reserve for a full disk, will try again", &error);
            }
        }
    }

    /// Writes the next segment's pages ahead, so that changing to it does not stall, and a sync changes
    /// no metadata of the file.
    pub fn prepare(&self) {
        if lock(&self.prepared).is_some() {
            return;
        }
        let checkpoint = lock(&self.front).state.checkpoint_bytes();
        let len = self.next_len();
        let path = self.dir.join(format!("prepared-{}.tmp", PREPARED.fetch_add(1, Ordering::Relaxed)));
        let fill = || -> io::Result<Arc<dyn File>> {
            let file = self.disk.open(&path, Create::Fresh)?;
            file.preallocate(len)?;
            // A checkpoint is written at once, with one sync.
            let mut at = checkpoint;
            while at < len {
                let part = (len - at).min(ZEROS.len() as u64);
                file.write_at(&[&ZEROS[..part as usize]], at)?;
                // Each for itself: a frame's sync waits for what is on its way to the disk.
                file.sync(SyncSite::Segment)?;
                at += part;
                offer_core(SHORT_TURN);
            }
            Ok(file)
        };
        match fill() {
            Ok(file) => self.put_prepared(Prepared { file, len, path }),
            // The committer makes its own, or finds out itself that it cannot.
            Err(error) => {
                let _ = self.disk.remove(&path);
                tracing::debug!(stream = %self.name, %error, "cannot prepare the next segment");
            }
        }
    }

    fn next_len(&self) -> u64 {
        let last = read(&self.back).segments.back().map(|segment| segment.file_len);
        last.map_or(FIRST_SEGMENT_BYTES, |last| (last * GROWTH).max(FIRST_SEGMENT_BYTES))
            .min(self.segment_bytes)
            .max(2 * FRAMES_AT + 2 * lock(&self.front).state.checkpoint_bytes())
    }

    /// Returns the number of segments, and the bytes of their files.
    pub fn sizes(&self) -> (usize, u64) {
        let back = read(&self.back);
        (back.segments.len(), back.segments.iter().map(|segment| segment.file_len).sum())
    }

    /// Removes expired segments, oldest first. `room` more bytes are about to be used.
    pub fn trim(&self, room: u64) {
        let mut is_removed = lock(&self.trimming);
        let mut trim = || -> io::Result<()> {
            loop {
                // Before the next goes: a crash must not bring back an older one alone.
                if *is_removed {
                    self.disk.sync_dir(&self.dir, SyncSite::Removal)?;
                    *is_removed = false;
                }
                let Some(oldest) = self.take_expired(room) else { return Ok(()) };
                self.remove(oldest)?;
                *is_removed = true;
            }
        };
        let trimmed = trim();
        self.removal_fails.store(trimmed.is_err(), Ordering::Relaxed);
        if let Err(error) = trimmed {
            self.report("cannot remove an old segment, will try again", &error);
        }
    }

    /// Removes the file of a segment that was taken out of the list. If it cannot be removed, the
    /// segment returns to the list, where it counts and is tried again.
    fn remove(&self, oldest: Segment) -> io::Result<()> {
        match self.disk.remove(&self.dir.join(segment::name(oldest.header.sequence))) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                write(&self.back).segments.push_front(oldest);
                Err(error)
            }
            _ => {
                self.metrics.trimmed(oldest.file_len);
                Ok(())
            }
        }
    }

    /// Takes the oldest segment out of the list, if it may be removed, so that a new reader gets a gap
    /// and not an error. Asks readers about the next ones. Holds one lock throughout, so that a reader
    /// that goes back either keeps the segment or finds that it is gone.
    fn take_expired(&self, room: u64) -> Option<Segment> {
        let ahead = ASKED_SEGMENTS * self.next_len();
        let kept_since = self.kept_since_us();
        let back = &mut *write(&self.back);
        let by_bytes = self.over(back, room);
        let due = by_bytes.max(kept_since.map_or(0, |since| aged(back, since)));
        let soon = self.over(back, room + ahead).max(due);
        if let Some(first_kept) = back.segments.get(soon).filter(|_| soon > 0) {
            back.marks.values_mut().for_each(|mark| mark.ask(first_kept.header.base));
        }
        let end = back.segments.get(1)?.header.base;
        let pinned = back.marks.values().any(|mark| mark.pins(end, by_bytes > 0));
        if due == 0 || pinned { None } else { back.segments.pop_front() }
    }

    /// Returns how many segments must be removed so that all together, with `room` more bytes, take no
    /// more than `max_bytes`; never the last.
    fn over(&self, back: &super::Back, room: u64) -> usize {
        let mut bytes = room + back.segments.iter().map(|segment| segment.file_len).sum::<u64>();
        let is_over = |segment: &&Segment| {
            let is_over = bytes > self.max_bytes;
            bytes -= segment.file_len;
            is_over
        };
        let older = back.segments.len().saturating_sub(1);
        back.segments.iter().take(older).take_while(is_over).count()
    }

    /// Stores the positions of readers, once for each segment and at a clean end: after a restart
    /// retention must not remove anything before they are attached again, and their lag is known.
    pub fn save_marks(&self, is_end: bool) {
        let moved: Vec<(String, Kept)> = {
            let back = read(&self.back);
            let segment_of = |offset: u64| back.segments.partition_point(|s| s.header.base <= offset);
            let due = |mark: &Mark, kept: Kept| match mark.saved {
                Some(saved) => {
                    let with_segment = |kept: Kept| Kept { next: segment_of(kept.next) as u64, ..kept };
                    is_end && kept.next != saved.next || with_segment(kept) != with_segment(saved)
                }
                None => true,
            };
            let lasting = back.marks.iter().filter(|(_, mark)| mark.on_lag != OnLag::Hold);
            let marks = lasting.map(|(name, mark)| (name, mark, mark.kept()));
            marks
                .filter(|(_, mark, kept)| due(mark, *kept))
                .map(|(name, _, kept)| (name.clone(), kept))
                .collect()
        };
        for (name, kept) in moved {
            self.save_mark(&name, kept);
        }
    }

    /// Stores one mark. If there is no room, it is tried again in the next round.
    fn save_mark(&self, consumer: &str, kept: Kept) {
        if self.append_own(state::OWN, consumer.as_bytes(), Some(&kept.encode()))
            && let Some(mark) = write(&self.back).marks.get_mut(consumer)
        {
            mark.saved = Some(kept);
        }
    }

    pub fn attach(self: &Arc<Self>, consumer: &str, from: Offset, on_lag: OnLag) -> Box<dyn Attachment> {
        let mut mark = Mark::new(from.0, on_lag);
        let (next, moves, asked) = (Arc::clone(&mark.next), Arc::clone(&mark.moves), mark.asked.clone());
        let (kept, remembered, delivered, told);
        let is_saved = {
            let marks = &mut write(&self.back).marks;
            let known = marks.get(consumer).filter(|known| known.on_lag == on_lag);
            if let Some(known) = marks.get(consumer) {
                mark.delivered = Arc::clone(&known.delivered);
                mark.told = Arc::clone(&known.told);
                mark.remembered.store(known.kept().next, Ordering::Relaxed);
            } else {
                *lock(&mark.delivered) = delivered_to(marks, consumer);
            }
            kept = mark.kept();
            mark.saved = known.and_then(|known| known.saved).filter(|saved| saved.next == kept.next);
            (remembered, delivered) = (Arc::clone(&mark.remembered), Arc::clone(&mark.delivered));
            told = Arc::clone(&mark.told);
            let is_saved = mark.saved.is_some() || on_lag == OnLag::Hold;
            marks.insert(consumer.to_owned(), mark);
            is_saved
        };
        if !is_saved {
            self.save_mark(consumer, kept);
        }
        let (inner, consumer, detached) = (Arc::clone(self), consumer.to_owned(), AtomicBool::new(false));
        let before = Offset(kept.next);
        Box::new(Attached {
            inner,
            consumer,
            next,
            moves,
            before,
            remembered,
            delivered,
            told,
            asked,
            detached,
        })
    }

    pub fn rename(&self, former: &str, consumer: &str) {
        let kept = {
            let marks = &mut write(&self.back).marks;
            if marks.contains_key(consumer) {
                return;
            }
            let Some(mark) = marks.remove(former) else { return };
            let kept = mark.kept();
            marks.insert(consumer.to_owned(), Mark { saved: None, ..mark });
            kept
        };
        // In this order: a crash in between leaves the place under both names.
        self.save_mark(consumer, kept);
        self.append_own(state::OWN, former.as_bytes(), None);
    }

    pub fn detach(&self, consumer: &str) {
        let removed = write(&self.back).marks.remove(consumer);
        if removed.is_some_and(|mark| mark.on_lag != OnLag::Hold) {
            self.append_own(state::OWN, consumer.as_bytes(), None);
        }
    }
}

/// Returns how many segments are older than `since_us`. A segment is as old as the start of the next
/// one. A segment from a time without a clock is as old as the first one with a clock.
fn aged(back: &super::Back, since_us: u64) -> usize {
    let clocks = back.segments.iter().map(|segment| segment.header.clock_us);
    let set = clocks.enumerate().skip(1).filter(|(_, us)| clock::is_set(*us));
    set.take_while(|(_, us)| *us < since_us).last().map_or(0, |(at, _)| at)
}

struct Attached {
    inner: Arc<Inner>,
    consumer: String,
    next: Arc<AtomicU64>,
    moves: Arc<AtomicU64>,
    /// Position before it was attached.
    before: Offset,
    remembered: Arc<AtomicU64>,
    delivered: Arc<Mutex<Delivered>>,
    told: Arc<Mutex<Told>>,
    asked: watch::Sender<Offset>,
    detached: AtomicBool,
}

impl Attachment for Attached {
    fn advance(&self, next: Offset) {
        self.remembered.store(SAID, Ordering::Relaxed);
        if self.next.fetch_max(next.0, Ordering::Relaxed) < next.0 {
            *lock(&self.delivered) = Delivered::ToThis;
        }
        lock(&self.told).follow();
    }

    fn moves_on(&self) {
        self.moves.fetch_add(1, Ordering::Relaxed);
    }

    fn go_back(&self, next: Offset) {
        let is_lower = {
            // Under the lock that retention takes segments with: what is there now stays.
            let back = write(&self.inner.back);
            let next = next.0.max(back.start());
            let lower = |remembered| (remembered != SAID && next < remembered).then_some(next);
            let remembered = self.remembered.fetch_update(Ordering::Relaxed, Ordering::Relaxed, lower);
            self.next.fetch_min(next, Ordering::Relaxed) > next || remembered.is_ok()
        };
        if is_lower {
            self.inner.save_marks(false);
        }
    }

    fn begin_now(&self, is_told: bool) -> Option<BeginNow> {
        let (kept, begin) = {
            let back = write(&self.inner.back);
            let mark = back.marks.get(&self.consumer)?;
            let told = Told::now(is_told, Some(mark.kept()), back.end);
            *lock(&self.told) = told;
            (mark.kept(), told.begin_now())
        };
        self.inner.save_mark(&self.consumer, kept);
        begin
    }

    fn remembered(&self) -> Offset {
        self.before
    }

    fn delivered(&self) -> Delivered {
        *lock(&self.delivered)
    }

    fn asked(&self) -> watch::Receiver<Offset> {
        self.asked.subscribe()
    }

    fn detach(&self) {
        if !self.detached.swap(true, Ordering::Relaxed) {
            self.inner.detach(&self.consumer);
        }
    }
}

/// What a reader was told at its last start about where to begin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Told {
    /// The last version that had the reader did not record it.
    Unknown,
    #[default]
    Nothing,
    /// Begin at this offset, which was the end of the stream when this was first set.
    Now(u64),
    /// Begin at the end; the reader has begun since.
    Followed,
}

impl Told {
    /// Returns what a reader with this mark is told, if the stream ends at `end`. "Now" is the start of
    /// the host at which the setting was first used, until a start without it.
    fn now(is_told: bool, mark: Option<Kept>, end: u64) -> Self {
        match mark {
            _ if !is_told => Self::Nothing,
            None | Some(Kept { told: Self::Nothing, .. }) => Self::Now(end),
            Some(Kept { told: Self::Unknown, delivered: Delivered::ToThis, .. }) => Self::Followed,
            Some(Kept { told: Self::Unknown, next, .. }) => Self::Now(next),
            Some(Kept { told, .. }) => told,
        }
    }

    fn follow(&mut self) {
        if matches!(self, Self::Now(_)) {
            *self = Self::Followed;
        }
    }

    fn begin_now(self) -> Option<BeginNow> {
        match self {
            Self::Now(at) => Some(BeginNow::At(Offset(at))),
            Self::Followed => Some(BeginNow::Followed),
            Self::Unknown | Self::Nothing => None,
        }
    }
}

/// A mark as it is stored.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Kept {
    next: u64,
    on_lag: OnLag,
    delivered: Delivered,
    told: Told,
}

impl Kept {
    fn has_delivered(self) -> bool {
        self.delivered != Delivered::ToNobody
    }

    fn encode(self) -> Vec<u8> {
        let mut value = self.next.to_le_bytes().to_vec();
        value.push(match self.on_lag {
            OnLag::Block => 0,
            OnLag::Detach => 1,
            OnLag::Ask | OnLag::Hold => 2,
        });
        value.push(match self.delivered {
            Delivered::ToNobody => 0,
            Delivered::ToThis => 1,
            Delivered::ToOthers => 2,
        });
        match self.told {
            Told::Unknown => {}
            Told::Nothing => value.push(0),
            Told::Now(at) => {
                value.push(1);
                value.extend(at.to_le_bytes());
            }
            Told::Followed => value.push(2),
        }
        value
    }

    /// Decodes a mark. Version 0.1.0 wrote no `delivered` and no `told`.
    fn decode(value: &[u8]) -> Option<Self> {
        let (next, rest) = value.split_first_chunk::<8>()?;
        let on_lag = match rest.first()? {
            1 => OnLag::Detach,
            2 => OnLag::Ask,
            _ => OnLag::Block,
        };
        let delivered = match rest.get(1) {
            Some(1) => Delivered::ToThis,
            Some(2) => Delivered::ToOthers,
            _ => Delivered::ToNobody,
        };
        let told = match rest.get(2..).and_then(<[u8]>::split_first) {
            Some((0, _)) => Told::Nothing,
            Some((1, at)) => at.first_chunk().map_or(Told::Unknown, |at| Told::Now(u64::from_le_bytes(*at))),
            Some((2, _)) => Told::Followed,
            _ => Told::Unknown,
        };
        Some(Self { next: u64::from_le_bytes(*next), on_lag, delivered, told })
    }
}

/// Returns what a reader of this name is told about earlier deliveries.
pub fn delivered_to(marks: &BTreeMap<String, Mark>, consumer: &str) -> Delivered {
    let delivers = |mark: &Mark| matches!(mark.on_lag, OnLag::Block | OnLag::Detach);
    let other = |mark: &Mark| delivers(mark) && mark.kept().has_delivered();
    match marks.get(consumer) {
        Some(known) => known.kept().delivered,
        None if marks.values().any(other) => Delivered::ToOthers,
        None => Delivered::ToNobody,
    }
}

/// Returns what `begin: now` means for a reader of this name in a host that starts now.
pub fn begin_now(marks: &BTreeMap<String, Mark>, consumer: &str, end: Offset) -> Option<BeginNow> {
    Told::now(true, marks.get(consumer).map(Mark::kept), end.0).begin_now()
}

/// Returns the marks in the state map.
pub fn marks(all: &state::State) -> BTreeMap<String, Mark> {
    let own = [state::OWN];
    all.range(&own)
        .filter_map(|(key, value)| {
            let name = String::from_utf8(key[1..].to_vec()).ok()?;
            let kept = Kept::decode(value)?;
            let mark = Mark::new(kept.next, kept.on_lag);
            *lock(&mark.delivered) = kept.delivered;
            *lock(&mark.told) = kept.told;
            Some((name, Mark { saved: Some(kept), is_left: true, ..mark }))
        })
        .collect()
}
