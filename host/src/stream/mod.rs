//! Streams: named, partitioned, durable, ordered sequences of messages.
//!
//! `log` is the embedded implementation. `memory` keeps nothing, and serves tests. Both pass
//! `conformance`. A Kafka topic will be a third implementation.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::watch;
use uuid::Uuid;

use crate::batch::{Batch, Offset, Partition};

mod config;
#[cfg(test)]
pub mod conformance;
mod lack;
mod lineage;
pub mod log;
pub mod memory;
mod prefixed;
mod set;

pub use config::{Config, Key, Retention};
pub use lack::Lack;
pub use lineage::Lineage;
pub use prefixed::Prefixed;
pub use set::Streams;

/// A write or sync that the disk has not answered, and how much waits for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stall {
    pub since: Instant,
    /// Number of messages that were appended and are not durable.
    pub messages: u64,
}

/// A disk that has been answering late for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slow {
    pub since: Instant,
    /// The longest write or sync of the last minute.
    pub longest: Duration,
}

/// The log to which a position belongs. After the data folder was deleted, `log` is different; after a
/// stream was re-partitioned or moved, `generation` is. A restored or copied folder has the same values
/// of both: see [`Lineage`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    pub log: Uuid,
    pub generation: u32,
    /// At least 1.
    pub partitions: u16,
}

/// An opening of a log for writing, and the first offset written since.
///
/// Each opening draws a random id. A folder that was restored, copied or cut short continues with
/// another opening than the original: two logs of one UUID have the same message at an offset if the
/// same opening wrote it, and then everything before it is the same too. (Kafka's leader epochs, KIP-101
/// and KIP-320.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Opening {
    pub id: u64,
    pub first: Offset,
}

impl Opening {
    /// Id of messages that were written by versions without opening ids.
    pub const UNKNOWN: u64 = 0;
}

/// A message to be appended to a stream. All bytes are borrowed and copied once.
#[derive(Clone, Copy, Debug)]
pub struct NewMessage<'a> {
    pub topic: &'a str,
    pub payload: &'a [u8],
    /// See [`crate::properties`].
    pub properties: &'a [u8],
    pub route: &'a str,
    /// At most 256 bytes of UTF-8. Stored once if it is a slice of `topic`.
    pub device: &'a str,
    pub partition: Partition,
    /// Flags: see [`crate::batch::flags`]. `EVENT_TIME` means that `event_us` is set.
    pub flags: u16,
    /// Microseconds since 1970, UTC.
    pub received_us: u64,
    pub event_us: i64,
}

/// Most bytes of [`StateChange::key`].
pub const STATE_KEY_BYTES_MAX: usize = 1 << 10;
/// Most bytes of [`StateChange::value`].
pub const STATE_VALUE_BYTES_MAX: usize = 64 << 10;

/// A change of the small durable map that a stream carries beside its messages, for QoS 2 packet ids and
/// sessions. It becomes durable in the same frame as the messages of the same append, and is restored
/// after a restart.
#[derive(Clone, Copy, Debug)]
pub struct StateChange<'a> {
    /// At most [`STATE_KEY_BYTES_MAX`].
    pub key: &'a [u8],
    /// At most [`STATE_VALUE_BYTES_MAX`]; `None` removes the key.
    pub value: Option<&'a [u8]>,
}

/// Keys and values of the state map, in key order.
pub type StateEntries = Vec<(Vec<u8>, Vec<u8>)>;

/// Identifies the frame of an append. Tickets are ordered; the append is durable once
/// [`Stream::durable`] shows a ticket that is not smaller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(pub u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Appended {
    pub ticket: Ticket,
    /// Offset of the first message. The others follow without gaps.
    pub first: Offset,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    /// The buffer of the next commit is full. The caller awaits [`Stream::writable`] and tries again.
    #[error("the stream's commit buffer is full")]
    Full,
    /// The disk is full, or the size that retention allows is reached. The caller withholds the
    /// acknowledgement. This resolves itself, and [`Stream::writable`] tells when.
    #[error("the stream has no room")]
    NoSpace,
    #[error("a message or state change over its size limit: {0}")]
    TooLarge(&'static str),
    /// A sync failed or the stream was closed. Nothing more will be acknowledged.
    #[error("the stream has stopped: {0}")]
    Stopped(Arc<str>),
}

impl AppendError {
    /// Value of [`AppendError::TooLarge`] if one append as a whole is too large.
    pub const WHOLE: &'static str = "append";
}

/// Result of reading with a cursor.
#[derive(Clone, Debug)]
pub enum Read {
    /// Messages of one frame, of all partitions, in offset order.
    Batch(Batch),
    /// Offsets `from..to` can no longer be read. The reader counts and logs each gap.
    Gap { from: Offset, to: Offset, cause: GapCause },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GapCause {
    /// Damaged on disk.
    Damaged,
    /// Removed by retention, because the reader was detached.
    Trimmed,
}

impl GapCause {
    /// Returns the name of the cause in labels of metrics and in log lines.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Damaged => "damaged",
            Self::Trimmed => "trimmed",
        }
    }
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum ReadError {
    #[error("offset {wanted} is past the stream's end {end}")]
    PastEnd { wanted: u64, end: u64 },
    #[error("the stream has stopped: {0}")]
    Stopped(Arc<str>),
    #[error("cannot read the stream: {0}")]
    Io(Arc<std::io::Error>),
}

/// What retention does when a reader lags.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum OnLag {
    /// The reader's messages are kept. When the stream reaches its size limit, devices wait.
    #[default]
    Block,
    /// The reader's messages may be removed. The gap is counted and reported.
    Detach,
    /// The reader is asked before its messages are removed ([`Attachment::asked`]), so that it can save
    /// what it still needs. For readers of the host itself, not for a config. Retention by age waits for
    /// the reader; retention by size waits as long as the reader makes progress.
    #[serde(skip)]
    Ask,
    /// Size-based retention waits for the reader as long as the reader makes progress. The reader ends
    /// with the process, and is not remembered.
    #[serde(skip)]
    Hold,
}

/// A durable, ordered sequence of messages.
///
/// Every implementation keeps these promises (`conformance`):
/// - the messages of one `append` are adjacent, in order, in one frame: after a crash either all of
///   them and their state changes are there, or none;
/// - once `durable()` shows the append's ticket, the append survives a crash;
/// - cursors show only durable messages, in offset order, each exactly once, or a [`Read::Gap`];
/// - a failed sync stops the stream: `durable()` never advances again.
#[async_trait]
pub trait Stream: Send + Sync + 'static {
    fn name(&self) -> &str;

    fn identity(&self) -> Identity;

    /// Copies messages and state changes into the next frame, all or nothing. Does not wait; the bound
    /// is the commit buffer ([`AppendError::Full`]). A change that adds to a full state map is refused
    /// as `NoSpace`, but other changes are not.
    fn append(&self, messages: &[NewMessage<'_>], state: &[StateChange<'_>])
    -> Result<Appended, AppendError>;

    /// Waits until an append that was refused with `Full` or `NoSpace` may be tried again, or the stream
    /// has stopped. Cancel safe.
    async fn writable(&self);

    /// Waits until appends are refused with `NoSpace`, or the stream has stopped. Cancel safe.
    async fn out_of_space(&self);

    /// Returns the highest durable ticket, now and as it advances. The channel is closed when the stream
    /// stops.
    fn durable(&self) -> watch::Receiver<Ticket>;

    /// Returns the offsets that can be read: the first stored, and one past the last durable.
    fn bounds(&self) -> Range<Offset>;

    /// Returns the openings that wrote what the stream holds, oldest first. The last one is that of this
    /// process.
    fn openings(&self) -> Vec<Opening>;

    /// Returns whether messages appended at this time are older than `max_age`. They are removed within
    /// an eighth of that; lists and redrives skip them.
    fn is_past_age(&self, append_us: u64) -> bool;

    /// Returns a cursor whose first message is the first at or after `from`.
    fn cursor(&self, from: Offset) -> Box<dyn Cursor>;

    /// Returns a cursor for reading without delivery. Messages that it cannot read are not counted as
    /// lost.
    fn peek(&self, from: Offset) -> Box<dyn Cursor> {
        self.cursor(from)
    }

    /// Counts messages that a reader lost without a cursor. A cursor counts those that it finds itself.
    fn lose(&self, lost: Range<Offset>, cause: GapCause);

    /// Returns the first offset whose frame was appended at or after `append_us`, or the end if there is
    /// none.
    async fn seek_time(&self, append_us: u64) -> Result<Offset, ReadError>;

    /// Registers a reader whose position retention respects. There is one reader for each name.
    fn attach(&self, consumer: &str, from: Offset, on_lag: OnLag) -> Box<dyn Attachment>;

    /// Renames a reader that is not attached, unless the new name is taken. Its position, and everything
    /// that is remembered about it, is kept.
    fn rename_reader(&self, former: &str, consumer: &str);

    /// Returns what appends wait for.
    fn lack(&self) -> Option<Lack>;

    /// Returns since when appends have been waiting for a disk that does not answer, if it is long.
    fn stall(&self) -> Option<Stall> {
        None
    }

    /// Returns why a reader cannot read now. It tries again, and finally treats the place as damaged.
    fn read_fault(&self) -> Option<String> {
        None
    }

    /// Returns whether appended messages go to a file that the next start finds. False once the stream's
    /// folder, or the file in it, was moved, removed or replaced. May block on a disk that does not
    /// answer.
    fn is_in_place(&self) -> bool {
        true
    }

    /// Returns since when the disk answers late, if it does so repeatedly.
    fn slow(&self) -> Option<Slow> {
        None
    }

    /// Returns whether there is room for appends that could also wait. Even a stream that lacks nothing
    /// has none while the disk has no room for its reserve.
    fn has_room(&self) -> bool {
        self.lack().is_none()
    }

    /// Returns the entries of the state map whose keys begin with `prefix`, in key order, as of the last
    /// append (durable or not).
    fn state(&self, prefix: &[u8]) -> StateEntries;

    /// Returns how many more bytes of keys and values the state map can hold.
    fn state_room(&self) -> usize;

    /// Returns why the stream stopped. Waits while it runs. Cancel safe.
    async fn stopped(&self) -> Arc<str>;

    /// Commits buffered appends, then stops. Idempotent.
    async fn close(&self);
}

/// Reads a stream from one offset on.
#[async_trait]
pub trait Cursor: Send {
    /// Returns the next durable messages, and waits for them. Cancel safe: a call that did not return
    /// skips nothing.
    async fn next(&mut self) -> Result<Read, ReadError>;

    /// Returns the next messages as `next` does, or `None` instead of waiting.
    async fn try_next(&mut self) -> Result<Option<Read>, ReadError>;

    /// Returns the offset of the next message to be read.
    fn position(&self) -> Offset;
}

/// To which readers a stream was delivered, as far as it remembers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Delivered {
    #[default]
    ToNobody,
    /// Other readers had advanced when this one was first attached.
    ToOthers,
    /// This reader has advanced.
    ToThis,
}

/// What beginning "now" means for a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BeginNow {
    /// The reader begins here, where the stream ended when this was first set.
    At(Offset),
    /// The reader has begun since.
    Followed,
}

/// A reader that retention knows. Dropping it keeps the mark until the restart; [`Attachment::detach`]
/// removes it.
pub trait Attachment: Send + Sync {
    /// States that the reader no longer needs anything below `next`, which never goes back. The reader
    /// has begun.
    fn advance(&self, next: Offset);

    /// States that the reader needs everything from `next` on again, as far as it still exists. When
    /// this returns, retention removes nothing more of that, and the stream's bounds show what it has
    /// removed before. The position is remembered.
    fn go_back(&self, next: Offset);

    /// Records whether the reader is told to begin at the end of the stream, as of this start, and
    /// returns what that means. It is remembered from the first start with this setting until one
    /// without it.
    fn begin_now(&self, is_told: bool) -> Option<BeginNow>;

    /// Returns the reader's remembered position from before it was attached: that of the last clean end,
    /// otherwise the position or a lower one. A reader that never advanced is remembered where it was
    /// first attached, even if the stream no longer has that message.
    fn remembered(&self) -> Offset;

    /// Returns what the stream remembers about deliveries, in this process and earlier ones.
    fn delivered(&self) -> Delivered;

    /// With [`OnLag::Ask`]: messages below this offset will be removed once the reader has advanced so
    /// far. The reader is asked early enough that writers need not wait for it.
    fn asked(&self) -> watch::Receiver<Offset>;

    /// With [`OnLag::Hold`]: states that the reader makes progress, although it still needs its first
    /// message.
    fn moves_on(&self);

    fn detach(&self);
}

/// Returns the partition of a device, which is the same for all its messages and in all versions of
/// Headworks (XXH3-64 of the device id, modulo the partition count).
pub fn partition_of(device: &str, partitions: u16) -> Partition {
    Partition((xxhash_rust::xxh3::xxh3_64(device.as_bytes()) % u64::from(partitions.max(1))) as u16)
}
