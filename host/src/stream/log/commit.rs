//! The committer: it takes appended messages, writes them as one frame, syncs once, and publishes what
//! is durable. It starts at once when it is idle, and gathers appends while a sync runs. If a segment is
//! full, `roll` creates the next one.

use std::io;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};

use super::append::Pending;
use super::disk::{File, SyncSite, lacking};
use super::frame::{self, Around, Header, Kind, flags};
use super::generations::{self, Closed, Metadata};
use super::state::{self, Change, State};
use super::tail::Frame;
use super::{Inner, lock, read, write};
use crate::stream::{Lack, Stall, Ticket};

/// Time without an append after which a mark proves that the last frame is durable.
const IDLE_MARK_MS: u64 = 20;
/// Duration of a write, sync or roll beyond which the disk counts as not answering.
pub const STALL_LEAST: Duration = if cfg!(test) { Duration::from_millis(20) } else { Duration::from_secs(5) };
/// Interval of attempts while the disk is full.
const NO_SPACE_RETRY_MS: u64 = 200;

/// State that belongs to the thread that commits.
pub struct Writer {
    pub file: Arc<dyn File>,
    /// Position of the next frame.
    pub at: u64,
    /// Length of the file.
    pub len: u64,
    pub salt: u64,
    pub segment: u64,
    pub epoch: u64,
    pub next_frame: u64,
    pub durable_frames: u64,
    pub durable_through: u64,
    pub previous_crc: u32,
    pub clock_us: u64,
    /// Number of the last change of the clock's timeline that is in the frames.
    pub clock_changes: u64,
    /// The state map as of the last durable frame.
    pub committed: State,
    /// Contents that were taken and are not durable yet.
    pub in_hand: Option<(Pending, Ticket)>,
    /// Buffers for reuse.
    pub spare: Option<(BytesMut, BytesMut)>,
    pub changes: Vec<u8>,
    pub marked: bool,
    /// Whether a caller waits for the room that was made when `in_hand` was taken.
    pub is_awaited: bool,
}

#[derive(Debug)]
pub enum CommitError {
    /// The write failed for want of a resource. This resolves itself, and nothing that counts was
    /// written.
    NoSpace(Lack),
    /// Nothing may be acknowledged any more.
    Failed(&'static str, io::Error),
}

/// Classifies a failed write as one that can be repeated, or not.
pub fn no_space_or(what: &'static str) -> impl Fn(io::Error) -> CommitError {
    move |error| match lacking(&error) {
        Some(lack) => CommitError::NoSpace(lack),
        None => CommitError::Failed(what, error),
    }
}

/// Runs the committer's thread until the stream is closed or stops.
pub fn run(inner: &Inner) {
    loop {
        let committed = match inner.take() {
            Ok(false) => break inner.seal(),
            Ok(true) => inner.commit_in_hand(),
            Err(error) => Err(error),
        };
        match committed {
            Ok(()) => {}
            Err(CommitError::NoSpace(_)) => {
                if !inner.wait_for_space() {
                    break inner.stop("closed while there was no room; what was not acknowledged is lost");
                }
            }
            Err(CommitError::Failed(what, error)) => break inner.fail(what, &error),
        }
    }
}

impl Inner {
    /// Waits for appends and takes them in hand. Returns false once the log is closed and drained.
    fn take(&self) -> Result<bool, CommitError> {
        let mut writer = lock(&self.writer);
        if writer.in_hand.is_some() {
            return Ok(true);
        }
        self.at_work(|| self.finish_opening(&mut writer))?;
        let mut front = lock(&self.front);
        loop {
            if front.roll {
                drop(front);
                self.at_work(|| self.roll_if_asked(&mut writer))?;
                front = lock(&self.front);
            }
            if !front.pending.is_empty() {
                break;
            }
            if front.closing {
                return Ok(false);
            }
            front.idle = true;
            if writer.marked {
                front = self.wake.wait(front).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let pause = Duration::from_millis(IDLE_MARK_MS);
            let timeout;
            (front, timeout) = self.wake.wait_timeout(front, pause).unwrap_or_else(PoisonError::into_inner);
            if timeout.timed_out() && front.pending.is_empty() {
                drop(front);
                self.at_work(|| self.mark(&mut writer));
                front = lock(&self.front);
            }
        }
        front.idle = false;
        drop(front);
        Ok(self.take_in_hand(&mut writer))
    }

    /// Ends a segment that is old enough. If there is no room for another, it stays in use, and the
    /// keeper asks again.
    pub fn roll_if_asked(&self, writer: &mut Writer) -> Result<(), CommitError> {
        if !std::mem::take(&mut lock(&self.front).roll) {
            return Ok(());
        }
        match self.roll(writer, 0, &[]) {
            Err(CommitError::NoSpace(_)) => Ok(()),
            other => other,
        }
    }

    /// Takes the pending appends in hand. Returns false if there are none.
    pub fn take_in_hand(&self, writer: &mut Writer) -> bool {
        if writer.in_hand.is_some() {
            return true;
        }
        let fresh = Pending::new(writer.spare.take().unwrap_or_default());
        let mut front = lock(&self.front);
        if front.pending.is_empty() {
            drop(front);
            writer.spare = Some((fresh.entries, fresh.data));
            return false;
        }
        writer.is_awaited = front.refused == Some(front.ticket);
        let taken = front.take(fresh);
        drop(front);
        writer.in_hand = Some(taken);
        true
    }

    /// Writes and syncs what is in hand. After `NoSpace` it stays in hand.
    pub fn commit_in_hand(&self) -> Result<(), CommitError> {
        let mut writer = lock(&self.writer);
        let Some((mut pending, ticket)) = writer.in_hand.take() else { return Ok(()) };
        match self.at_work(|| self.write_frame(&mut writer, &mut pending)) {
            Ok(append_us) => {
                self.publish(&mut writer, pending, ticket, append_us);
                self.set_lack(None);
                Ok(())
            }
            Err(error) => {
                writer.in_hand = Some((pending, ticket));
                self.set_lack(match &error {
                    CommitError::NoSpace(lack) => Some(*lack),
                    CommitError::Failed(..) => None,
                });
                Err(error)
            }
        }
    }

    /// Returns the append time of a frame that is written now, and the change with the clock's jumps
    /// before that time, unless an earlier frame has them. It replaces what the keeper had stored about
    /// them, because an earlier frame may have had later jumps.
    fn stamp(&self, writer: &mut Writer, pending: &mut Pending) -> (u64, Option<Change>) {
        let is_noted = |(key, _): &Change| key.first() == Some(&state::CLOCK);
        let has_noted = pending.changes.iter().any(is_noted);
        let mut clock = lock(&self.clock);
        let stamp_us = clock.now();
        let (changes, timeline) = clock.timeline();
        if !has_noted && changes == writer.clock_changes {
            return (stamp_us, None);
        }
        let change = state::of_clock(timeline);
        // The keeper needs not have it noted.
        clock.changed();
        drop(clock);
        pending.changes.retain(|change| !is_noted(change));
        pending.changes.push(change.clone());
        writer.clock_changes = changes;
        lock(&self.front).state.apply(change.clone());
        (stamp_us, Some(change))
    }

    /// Records since when the committer is working on the disk.
    fn at_work<T>(&self, call: impl FnOnce() -> T) -> T {
        *lock(&self.at_work_since) = Some(Instant::now());
        let done = call();
        if let Some(began) = lock(&self.at_work_since).take() {
            lock(&self.slowness).ended(began, Instant::now());
        }
        done
    }

    /// Returns the work that the committer has been doing for long.
    pub fn stall(&self) -> Option<Stall> {
        let since = lock(&self.at_work_since).filter(|since| since.elapsed() >= STALL_LEAST)?;
        let end = read(&self.back).end;
        let messages = lock(&self.front).next_offset.saturating_sub(end);
        Some(Stall { since, messages })
    }

    fn write_frame(&self, writer: &mut Writer, pending: &mut Pending) -> Result<u64, CommitError> {
        let stamp = self.stamp(writer, pending);
        let stamp_us = stamp.0;
        writer.changes.clear();
        for (key, value) in &pending.changes {
            frame::push_change(&mut writer.changes, key, value.as_deref());
        }
        let len = frame::frame_len(pending.entries.len(), pending.data.len(), writer.changes.len()) as u64;
        if writer.at + len > writer.len {
            self.roll_at(writer, stamp, len, &[])?;
        }
        writer.clock_us = writer.clock_us.max(stamp_us);
        let mut header = Header {
            kind: if pending.count == 0 { Kind::Control } else { Kind::Data },
            base: pending.base,
            count: pending.count,
            received_least_us: pending.received_least_us,
            received_greatest_us: pending.received_greatest_us,
            ..writer.header()
        };
        let changes = std::mem::take(&mut writer.changes);
        let around = Around::summed(
            &mut header,
            (&pending.entries, pending.entries_crc),
            (&pending.data, pending.data_crc),
            &changes,
        );
        let written =
            writer.file.write_at(&around.parts(&pending.entries, &pending.data, &changes), writer.at);
        writer.changes = changes;
        if std::mem::take(&mut writer.is_awaited) {
            // Who is woken may take this core, with the disk idle if it had nothing yet.
            writer.file.start_sync(writer.at, header.total_len());
            self.space.send_modify(|n| *n += 1);
        }
        written.map_err(no_space_or("write"))?;
        let started = Instant::now();
        writer.file.sync(SyncSite::Frame).map_err(|error| CommitError::Failed("sync", error))?;
        self.metrics.synced(started.elapsed());
        writer.at += header.total_len();
        writer.next_frame += 1;
        writer.durable_frames = writer.next_frame;
        writer.durable_through = header.end();
        writer.previous_crc = header.crc;
        writer.marked = false;
        Ok(header.append_us)
    }

    /// Shows a durable frame to readers, then to callers that wait to acknowledge.
    fn publish(&self, writer: &mut Writer, pending: Pending, ticket: Ticket, append_us: u64) {
        self.metrics.committed(pending.count, pending.bytes());
        for change in pending.changes {
            writer.committed.apply(change);
        }
        let mut spare = (BytesMut::new(), BytesMut::new());
        let frame = Frame {
            base: pending.base,
            count: pending.count,
            append_us,
            entries: settle(pending.entries, &mut spare.0),
            data: settle(pending.data, &mut spare.1),
        };
        let end = frame.end();
        let left = {
            let mut back = write(&self.back);
            if let Some(active) = back.segments.back_mut() {
                active.limit = writer.at;
            }
            back.end = end;
            if frame.count == 0 { None } else { back.tail.push(frame) }
        };
        if let Some(durable) = &*lock(&self.durable) {
            durable.send_replace(ticket);
        }
        self.moved.send_modify(|n| *n += 1);
        // The buffers of a frame that left the tail: their pages are there already.
        if let Some(left) = left.and_then(Arc::into_inner) {
            reclaim(left.entries, &mut spare.0);
            reclaim(left.data, &mut spare.1);
        }
        writer.spare = Some(spare);
        if writer.at > writer.len / 2 {
            self.ask_keeper_to_prepare();
        }
    }

    /// Records in the file, without a sync, what is durable. The next frame overwrites this mark.
    pub fn mark(&self, writer: &mut Writer) {
        writer.marked = true;
        if writer.at + frame::HEADER_BYTES as u64 > writer.len {
            return;
        }
        let mut header = Header { kind: Kind::Pad, flags: flags::MARK, ..writer.header() };
        let around = Around::new(&mut header, &[], &[], &[]);
        if let Err(error) = writer.file.write_at(&around.parts(&[], &[], &[]), writer.at) {
            tracing::debug!(stream = %self.name, %error, "cannot write a mark");
        }
    }

    /// Finishes a clean close: the last frame is proven, so that the next opening has nothing to repeat
    /// and no zeros to read, and the end of the log is stored.
    pub fn seal(&self) {
        let mut writer = lock(&self.writer);
        self.mark(&mut writer);
        if let Err(error) = writer.file.sync(SyncSite::Frame) {
            return self.fail("sync", &error);
        }
        let _ = writer.file.truncate((writer.at + frame::HEADER_BYTES as u64).min(writer.len));
        let closed = Closed { offset: writer.durable_through, frames: writer.next_frame };
        let metadata = Metadata { closed: Some(closed), ..self.metadata.clone() };
        if let Err(error) = generations::write(&*self.disk, &self.dir, &metadata) {
            tracing::warn!(stream = %self.name, %error, "cannot record the end of the stream");
        }
        self.stop("closed");
    }

    /// Waits for space. Returns true to try again, false once closing.
    fn wait_for_space(&self) -> bool {
        let front = lock(&self.front);
        if front.closing {
            return false;
        }
        let pause = Duration::from_millis(NO_SPACE_RETRY_MS);
        let waited = self.wake.wait_timeout_while(front, pause, |front| !front.closing);
        drop(waited);
        true
    }
}

impl Writer {
    /// Returns a header with everything except what depends on the frame's contents.
    pub fn header(&self) -> Header {
        Header {
            marker: self.salt,
            kind: Kind::Control,
            flags: 0,
            stored_len: 0,
            base: self.durable_through,
            count: 0,
            body_crc: 0,
            durable_frames: self.durable_frames,
            durable_through: self.durable_through,
            append_us: self.clock_us,
            received_least_us: 0,
            received_greatest_us: 0,
            sequence: self.next_frame,
            previous_crc: self.previous_crc,
            header_len: 0,
            crc: 0,
        }
    }
}

/// Returns the bytes for the tail. A buffer that is mostly unused is copied from and kept.
fn settle(buffer: BytesMut, spare: &mut BytesMut) -> Bytes {
    if buffer.len() * 2 < buffer.capacity() {
        let bytes = Bytes::copy_from_slice(&buffer);
        *spare = buffer;
        spare.clear();
        bytes
    } else {
        buffer.freeze()
    }
}

fn reclaim(bytes: Bytes, spare: &mut BytesMut) {
    if let Ok(mut buffer) = bytes.try_into_mut() {
        buffer.clear();
        if buffer.capacity() > spare.capacity() {
            *spare = buffer;
        }
    }
}
