//! A stream: a named, partitioned, durable, ordered sequence of messages.
//!
//! `log` is the embedded one, `memory` keeps nothing and serves tests; both
//! pass `conformance`. A Kafka topic will be a third.

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
    /// Messages that were appended and are not durable.
    pub messages: u64,
}

/// A disk that answers, and late, for a while now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slow {
    pub since: Instant,
    /// The longest write or sync of the last minute.
    pub longest: Duration,
}

/// What a position is a position of. A wiped data folder has another `log`, a stream
/// that was re-partitioned or moved another `generation`. A restored or copied folder
/// has the same of both: see [`Lineage`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    pub log: Uuid,
    pub generation: u32,
    /// At least 1.
    pub partitions: u16,
}

/// A time that a log was opened for writing, and the first offset written since.
///
/// Each opening draws an id of its own. A folder that was restored, copied or cut
/// short goes on with another opening than the one it is a copy of: two logs of one
/// UUID hold the same message at an offset where the same opening wrote it, and
/// everything before it is the same too. (Kafka's leader epochs, KIP-101 and KIP-320.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Opening {
    pub id: u64,
    pub first: Offset,
}

impl Opening {
    /// The id of what was written by versions that drew none.
    pub const UNKNOWN: u64 = 0;
}

/// A message on its way into a stream; all bytes are borrowed and copied once.
#[derive(Clone, Copy, Debug)]
pub struct NewMessage<'a> {
    pub topic: &'a str,
    pub payload: &'a [u8],
    /// See [`crate::properties`].
    pub properties: &'a [u8],
    pub route: &'a str,
    /// At most 256 bytes of UTF-8; stored once where it is a slice of `topic`.
    pub device: &'a str,
    pub partition: Partition,
    /// See [`crate::batch::flags`]; `EVENT_TIME` says that `event_us` is set.
    pub flags: u16,
    /// Microseconds since 1970, UTC.
    pub received_us: u64,
    pub event_us: i64,
}

/// Bound of [`StateChange::key`].
pub const STATE_KEY_BYTES_MAX: usize = 1 << 10;
/// Bound of [`StateChange::value`].
pub const STATE_VALUE_BYTES_MAX: usize = 64 << 10;

/// A change of the small durable map that a stream carries beside its messages:
/// QoS 2 packet ids, sessions. It becomes durable in the same frame as the
/// messages of the same append, and is there again after a restart.
#[derive(Clone, Copy, Debug)]
pub struct StateChange<'a> {
    /// At most [`STATE_KEY_BYTES_MAX`].
    pub key: &'a [u8],
    /// At most [`STATE_VALUE_BYTES_MAX`]; `None` removes the key.
    pub value: Option<&'a [u8]>,
}

/// Keys and values of the state map, in key order.
pub type StateEntries = Vec<(Vec<u8>, Vec<u8>)>;

/// Names the frame that an append went into. Ordered; the append is durable
/// once [`Stream::durable`] shows a ticket that is not smaller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(pub u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Appended {
    pub ticket: Ticket,
    /// Offset of the first message; the others follow without gaps.
    pub first: Offset,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    /// The buffer of the next commit is full: await [`Stream::writable`], then try again.
    #[error("the stream's commit buffer is full")]
    Full,
    /// The disk, or what retention allows, is full: withhold the ack; goes by
    /// itself, [`Stream::writable`] tells when.
    #[error("the stream has no room")]
    NoSpace,
    #[error("a message or state change over its size limit: {0}")]
    TooLarge(&'static str),
    /// A sync failed or the stream was closed. Nothing more will be acknowledged.
    #[error("the stream has stopped: {0}")]
    Stopped(Arc<str>),
}

impl AppendError {
    /// What [`AppendError::TooLarge`] names where everything in one append together is too large.
    pub const WHOLE: &'static str = "append";
}

/// What a cursor gives.
#[derive(Clone, Debug)]
pub enum Read {
    /// Messages of one frame, all partitions, in offset order.
    Batch(Batch),
    /// Offsets `from..to` cannot be read any more. Never silent: counted and logged by the reader.
    Gap { from: Offset, to: Offset, cause: GapCause },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GapCause {
    /// Damaged on disk.
    Damaged,
    /// Retention removed them: the reader was detached.
    Trimmed,
}

impl GapCause {
    /// Returns the name of the cause, as labels of metrics and log lines have it.
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
    /// Its messages stay; when the stream reaches its size limit, devices wait.
    #[default]
    Block,
    /// Its messages may go; the gap is counted and shown.
    Detach,
    /// It is asked before its messages go ([`Attachment::asked`]), to save what it
    /// still needs. For readers of the host itself, not for a config: retention by
    /// age waits for it, retention by bytes for as long as it moves on.
    #[serde(skip)]
    Ask,
    /// Retention by bytes waits for it for as long as it moves on. It ends with the process,
    /// and is not remembered.
    #[serde(skip)]
    Hold,
}

/// A durable, ordered sequence of messages.
///
/// Promises, kept by every implementation (`conformance`):
/// - messages of one `append` are adjacent, in order, in one frame: after a
///   crash all of them and their state changes are there, or none;
/// - once `durable()` shows the append's ticket it survives a crash;
/// - cursors show only durable messages, in offset order, each exactly once,
///   or a [`Read::Gap`];
/// - a failed sync stops the stream: `durable()` never advances again.
#[async_trait]
pub trait Stream: Send + Sync + 'static {
    fn name(&self) -> &str;

    fn identity(&self) -> Identity;

    /// Copies messages and state changes into the next frame, all or nothing.
    /// Never waits; the bound is the commit buffer ([`AppendError::Full`]). What adds
    /// to a full state map is refused as `NoSpace`, and only that.
    fn append(&self, messages: &[NewMessage<'_>], state: &[StateChange<'_>])
    -> Result<Appended, AppendError>;

    /// Ready when an append that was refused with `Full` or `NoSpace` may be
    /// tried again, or the stream has stopped. Safe to drop.
    async fn writable(&self);

    /// Ready while appends are refused with `NoSpace`, or the stream has stopped. Safe to drop.
    async fn out_of_space(&self);

    /// The highest durable ticket, now and as it moves. Closed when the stream stops.
    fn durable(&self) -> watch::Receiver<Ticket>;

    /// Offsets that can be read: first kept, and one past the last durable.
    fn bounds(&self) -> Range<Offset>;

    /// Returns the openings that wrote what the stream holds, oldest first. The last
    /// one is that of this process.
    fn openings(&self) -> Vec<Opening>;

    /// Whether what was appended then is past `max_age`. It goes within an eighth of that;
    /// lists and redrives pass it over.
    fn is_past_age(&self, append_us: u64) -> bool;

    /// A cursor whose first message is the first at or after `from`.
    fn cursor(&self, from: Offset) -> Box<dyn Cursor>;

    /// A cursor for a look that delivers to nobody: what it cannot have is not counted as
    /// lost.
    fn peek(&self, from: Offset) -> Box<dyn Cursor> {
        self.cursor(from)
    }

    /// Counts messages that a reader lost without a cursor, which counts those that it comes
    /// upon itself.
    fn lose(&self, lost: Range<Offset>, cause: GapCause);

    /// First offset whose frame was appended at or after `append_us`; the end if none.
    async fn seek_time(&self, append_us: u64) -> Result<Offset, ReadError>;

    /// Registers a reader whose position retention respects. One per name.
    fn attach(&self, consumer: &str, from: Offset, on_lag: OnLag) -> Box<dyn Attachment>;

    /// Gives a reader that is not attached another name, unless one has that name already: its place,
    /// and all that is remembered of it.
    fn rename_reader(&self, former: &str, consumer: &str);

    /// Returns what appends wait for.
    fn lack(&self) -> Option<Lack>;

    /// Returns since when appends wait for a disk that does not answer, where that is long.
    fn stall(&self) -> Option<Stall> {
        None
    }

    /// Returns why a reader cannot read now: it tries again, and takes the place for damaged in the end.
    fn read_fault(&self) -> Option<String> {
        None
    }

    /// Returns whether what is appended goes to a file that the next start finds: false once the stream's
    /// folder, or the file in it, was moved, removed or replaced. A disk that does not answer may keep the
    /// caller waiting.
    fn is_in_place(&self) -> bool {
        true
    }

    /// Returns since when the disk answers late, where it does so again and again.
    fn slow(&self) -> Option<Slow> {
        None
    }

    /// Returns whether there is room for appends that could also wait. A stream that lacks nothing has
    /// none while the disk has no room for its reserve.
    fn has_room(&self) -> bool {
        self.lack().is_none()
    }

    /// The state map's live entries whose keys begin with `prefix`, in key order,
    /// as of the last append (durable or not).
    fn state(&self, prefix: &[u8]) -> StateEntries;

    /// How many bytes of keys and values the state map still takes.
    fn state_room(&self) -> usize;

    /// Why the stream stopped; pending while it runs. Safe to drop.
    async fn stopped(&self) -> Arc<str>;

    /// Commits what is buffered, then stops. Idempotent.
    async fn close(&self);
}

/// Reads a stream from one offset on.
#[async_trait]
pub trait Cursor: Send {
    /// The next durable messages; waits for them. Safe to drop: nothing is
    /// skipped by a call that did not return.
    async fn next(&mut self) -> Result<Read, ReadError>;

    /// As `next`, `None` where it would wait.
    async fn try_next(&mut self) -> Result<Option<Read>, ReadError>;

    /// Offset of the next message to be read.
    fn position(&self) -> Offset;
}

/// What a stream was delivered to, as far as it remembers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Delivered {
    #[default]
    ToNobody,
    /// Other readers had advanced when this one came first.
    ToOthers,
    /// This reader has advanced.
    ToThis,
}

/// What it means for a reader to begin "now".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BeginNow {
    /// The reader begins here: where the stream ended when that was said first.
    At(Offset),
    /// The reader has begun since.
    Followed,
}

/// A reader that retention knows of. Dropping it leaves the mark until restart;
/// [`Attachment::detach`] removes it.
pub trait Attachment: Send + Sync {
    /// All below `next` is done with; never goes back. The reader has begun.
    fn advance(&self, next: Offset);

    /// The reader needs all from `next` on again, as far as it is still there. When this returns,
    /// retention takes nothing more of that, and the stream's bounds show what it has taken before.
    /// Remembered as the place is.
    fn go_back(&self, next: Offset);

    /// Takes down whether the reader is told to begin at the end of the stream, as of this start,
    /// and returns what that means. Remembered from the first start at which it is said until one
    /// at which it is not.
    fn begin_now(&self, is_told: bool) -> Option<BeginNow>;

    /// Returns where the stream remembers the reader from before it was attached: as of the
    /// last clean end, else at or below where it was. A reader that never advanced is remembered
    /// where it was attached first, also once the stream does not have that message any more.
    fn remembered(&self) -> Offset;

    /// What the stream remembers of deliveries, in this process and those before.
    fn delivered(&self) -> Delivered;

    /// With [`OnLag::Ask`]: what lies below is about to go, once the reader has
    /// advanced so far. Asked early enough that writers need not wait for it.
    fn asked(&self) -> watch::Receiver<Offset>;

    /// With [`OnLag::Hold`]: the reader moves on, though its first message stays needed.
    fn moves_on(&self);

    fn detach(&self);
}

/// Partition of a device: the same for all its messages, in all versions of
/// Headworks (XXH3-64 of the device id, modulo the partition count).
pub fn partition_of(device: &str, partitions: u16) -> Partition {
    Partition((xxhash_rust::xxh3::xxh3_64(device.as_bytes()) % u64::from(partitions.max(1))) as u16)
}
