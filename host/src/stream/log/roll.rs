//! The change to a new segment: header, a checkpoint of the state map, then
//! frames that are written again. All of it is synced before the file has the
//! segment's name, so that a segment that has a name is whole.
//!
//! What a checkpoint costs: a segment has room for at least as many bytes of
//! frames as its checkpoint takes, so that of all that is written at most half
//! are checkpoints, whatever the state's size.

use std::io;
use std::sync::Arc;

use super::clock::Timeline;
use super::commit::{CommitError, Writer, no_space_or};
use super::disk::{File, SyncSite};
use super::frame::{self, Around, Header, Kind, flags};
use super::recover::Segment;
use super::scan::Landmarks;
use super::segment::{self, FRAMES_AT};
use super::state::{self, Change};
use super::tail::Frame;
use super::unreadable::GivenUp;
use super::{Inner, lock, write};

/// How far the frames of a new segment go.
struct Begun {
    at: u64,
    next_frame: u64,
    previous_crc: u32,
}

impl Inner {
    /// Goes on in a new segment that begins with `again` and has room for a frame of `need` bytes.
    pub fn roll(&self, writer: &mut Writer, need: u64, again: &[Frame]) -> Result<(), CommitError> {
        // What was noted of the clock may wait in a frame that is not durable yet.
        let (stamp_us, changes, noted, is_news) = {
            let mut clock = lock(&self.clock);
            let stamp_us = clock.now();
            let is_news = clock.changed().is_some();
            let (changes, timeline) = clock.timeline();
            let noted = (*timeline != Timeline::default()).then(|| state::of_clock(timeline));
            (stamp_us, changes, noted, is_news)
        };
        let rolled = self.roll_at(writer, (stamp_us, noted), need, again);
        match rolled {
            Ok(()) => writer.clock_changes = changes,
            Err(_) if is_news => lock(&self.clock).not_saved(),
            Err(_) => {}
        }
        rolled
    }

    /// The same at an append time. An append time that follows a jump of the clock is durable only
    /// together with the jump, so `noted` is what has to be noted of the clock.
    pub fn roll_at(
        &self,
        writer: &mut Writer,
        (stamp_us, noted): (u64, Option<Change>),
        need: u64,
        again: &[Frame],
    ) -> Result<(), CommitError> {
        noted.into_iter().for_each(|change| writer.committed.apply(change));
        let before_us = std::mem::replace(&mut writer.clock_us, stamp_us);
        let rolled = self.roll_stamped(writer, need, again);
        if rolled.is_err() {
            // What is written to the old segment does not have the jump.
            writer.clock_us = before_us;
        }
        rolled
    }

    fn roll_stamped(&self, writer: &mut Writer, need: u64, again: &[Frame]) -> Result<(), CommitError> {
        let sequence = writer.segment + 1;
        let opening = self.openings.last().expect("an opening adds itself");
        let base = again.first().map_or(writer.durable_through, |frame| frame.base);
        let header = segment::Header {
            log: self.identity.log,
            generation: self.identity.generation,
            sequence,
            base,
            first_frame: writer.next_frame,
            epoch: writer.epoch,
            salt: uuid::Uuid::new_v4().as_u64_pair().0,
            partitions: self.identity.partitions,
            clock_us: writer.clock_us,
            previous_crc: writer.previous_crc,
            opening: opening.id,
            opening_first: opening.first.0,
        };
        let checkpoint = writer.committed.checkpoint_bytes();
        let repeated = again.iter().map(|f| frame::frame_len(f.entries.len(), f.data.len(), 0) as u64);
        let begun = FRAMES_AT + checkpoint + repeated.sum::<u64>();
        let (file, len, temporary) = self.new_file(begun + need, begun + need.max(checkpoint))?;
        let path = self.dir.join(segment::name(sequence));
        let named = begin(&*file, &header, writer, again).map_err(no_space_or("write")).and_then(|begun| {
            file.sync(SyncSite::Segment).map_err(|error| CommitError::Failed("sync a new segment", error))?;
            self.disk.rename(&temporary, &path).map_err(no_space_or("rename a new segment"))?;
            Ok(begun)
        });
        let begun = match named {
            Err(error @ CommitError::NoSpace(_)) => {
                let _ = self.disk.remove(&temporary);
                return Err(error);
            }
            other => other?,
        };
        self.disk
            .sync_dir(&self.dir, SyncSite::SegmentName)
            .map_err(|error| CommitError::Failed("sync the folder", error))?;
        self.metrics.checkpoint(begun.at - FRAMES_AT);

        let end = again.last().map_or(base, Frame::end);
        let old_at = std::mem::replace(&mut writer.at, begun.at);
        *lock(&self.active) = (sequence, Arc::clone(&file));
        writer.file = file;
        writer.len = len;
        writer.salt = header.salt;
        writer.segment = sequence;
        writer.next_frame = begun.next_frame;
        writer.durable_frames = begun.next_frame;
        writer.durable_through = end;
        writer.previous_crc = begun.previous_crc;
        writer.marked = false;
        {
            let mut back = write(&self.back);
            if let Some(old) = back.segments.back_mut() {
                old.limit = old_at;
            }
            back.segments.push_back(Segment {
                given_up: GivenUp::default(),
                header,
                file_len: len,
                limit: begun.at,
                landmarks: Landmarks::default(),
            });
            back.end = end;
        }
        self.ask_keeper_to_cut();
        Ok(())
    }
}

/// Writes header, checkpoint and `again`. Nobody sees the file's name before all of it
/// is synced, so each frame may say that it is durable itself.
fn begin(file: &dyn File, segment: &segment::Header, writer: &Writer, again: &[Frame]) -> io::Result<Begun> {
    file.write_at(&[&segment.encode()], 0)?;
    let mut begun =
        Begun { at: FRAMES_AT, next_frame: segment.first_frame, previous_crc: segment.previous_crc };
    let mut put = |header: Header, entries: &[u8], data: &[u8], state: &[u8]| -> io::Result<()> {
        let mut header = Header {
            marker: segment.salt,
            sequence: begun.next_frame,
            durable_frames: begun.next_frame + 1,
            previous_crc: begun.previous_crc,
            ..header
        };
        let around = Around::new(&mut header, entries, data, state);
        file.write_at(&around.parts(entries, data, state), begun.at)?;
        begun.at += header.total_len();
        begun.next_frame += 1;
        begun.previous_crc = header.crc;
        Ok(())
    };
    let mut begin = flags::CHECKPOINT_BEGIN;
    let mut sections = writer.committed.sections().peekable();
    while let Some(state) = sections.next() {
        let end = if sections.peek().is_none() { flags::CHECKPOINT_END } else { 0 };
        let flags = std::mem::take(&mut begin) | end;
        put(Header { kind: Kind::Control, flags, base: segment.base, ..writer.header() }, &[], &[], &state)?;
    }
    for frame in again {
        let header = Header {
            kind: Kind::Data,
            base: frame.base,
            count: frame.count,
            append_us: frame.append_us,
            ..writer.header()
        };
        put(header, &frame.entries, &frame.data, &[])?;
    }
    Ok(begun)
}
