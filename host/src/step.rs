//! A step of a pipeline: takes a batch, gives a verdict for each message.
//!
//! Plugins are steps; the pipeline knows only this page.

use std::sync::Arc;

use crate::batch::{Batch, Partition};
use crate::problems::Problem;

/// Versions of the steps of a pipeline that are kept for sinks that lag, the newest among them: each
/// is compiled code, and one instance of every step for each worker that has still to run messages
/// with it. The cache keeps as many versions of a plugin.
pub const VERSIONS_MAX: usize = 8;
/// Stands for a pipeline's routes where the name of a step is expected: in dead letters of messages that
/// found no route, and where a person says that a message enters behind all steps. No step has this name.
pub const ROUTES_STEP: &str = "routes";

/// Identity of one use of a plugin: `telemetry/normalize`. State, metrics and
/// logs belong to it, not to the file.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StepId {
    pub pipeline: Arc<str>,
    pub step: Arc<str>,
}

/// One instance of a step, owned by one worker thread.
pub trait Step: Send {
    fn id(&self) -> &StepId;

    /// Runs the step over a batch of one partition. Blocks the calling thread
    /// for at most the step's limits. Never panics on what the plugin does: a
    /// fault refuses only the messages that cause it. On the last attempt it
    /// does not ask for another one, unless it is held.
    fn run(&mut self, batch: Batch, partition: Partition, attempt: Attempt) -> Outcome;

    /// Whether the step is given every message of its pipeline. Where it is not,
    /// the messages that do not concern it must not wait long for it.
    fn sees_all(&self) -> bool {
        true
    }
}

/// Which run of a batch this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// Counts from 1.
    pub number: u32,
    /// No other one follows: messages that ask for a retry are rejected.
    pub is_last: bool,
}

impl Attempt {
    /// The first of several.
    pub const FIRST: Self = Self { number: 1, is_last: false };
    /// The only one.
    pub const ONLY: Self = Self { number: 1, is_last: true };
}

/// What a step made of a batch.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Goes on to the next step; order kept, `base` and `now_us` as they came.
    pub passed: Batch,
    /// To dead letters. Indexes into the batch that went in, ascending.
    pub refused: Vec<Refused>,
    /// Dropped on purpose, counted.
    pub dropped: u64,
    /// The step asks for these messages again after a backoff: the pipeline
    /// runs the whole batch again, up to its bound of attempts.
    pub retry: Option<String>,
    /// With `retry`: the step waits for a new version or config of itself. Not
    /// counted against any bound; nothing is refused for it.
    pub held: bool,
}

/// A message that will not become a row, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Entry of the batch that went in.
    pub index: u32,
    pub kind: RefusedKind,
    /// For a person: `payload is not JSON: unexpected "p" at byte 0`. At most 4 KiB.
    pub reason: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusedKind {
    /// The plugin said so.
    Failed,
    /// The plugin trapped, looped, ate its memory or answered nonsense.
    Fault,
    /// It asked to retry more often than it may.
    Retries,
    /// A sink cannot write it.
    Sink,
}

impl RefusedKind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Fault => "fault",
            Self::Retries => "retries",
            Self::Sink => "sink",
        }
    }
}

/// Makes instances of a step: one version of a plugin with one config.
pub trait StepFactory: Send + Sync {
    fn id(&self) -> &StepId;

    /// `normalize 1.2.0 (10-normalize.wasm, 3f9c…)`
    fn describe(&self) -> String;

    /// A fresh, initialised instance for one worker. Errors carry paths below
    /// the step's config.
    fn instantiate(&self, worker: u32) -> Result<Box<dyn Step>, Vec<Problem>>;

    /// Returns a text that another process can make the step from again: see [`Recall`].
    fn recipe(&self) -> String;

    /// Returns whether what the recipe names is stored, so that it outlives the process.
    fn is_stored(&self) -> bool {
        true
    }

    /// A newer version takes over, and only messages that a sink has already are still run by this
    /// one, for other sinks: it holds the pipeline no more, and what it faults on is rejected.
    fn let_go(&self) {}
}

/// Makes a step of an earlier version again from its recipe. May compile.
pub type Recall = Arc<dyn Fn(&str) -> Result<Arc<dyn StepFactory>, RecallError> + Send + Sync>;

/// Why a step cannot be made again; each names the step.
#[derive(Debug)]
pub enum RecallError {
    /// What it is made of is gone, or is of no use to this version of Headworks.
    Gone(String),
    /// It may be made later.
    Later(String),
}

/// The steps of a pipeline, in order. A new chain replaces the old one for all
/// partitions at one offset, or for none.
#[derive(Clone)]
pub struct Chain {
    /// Counts the changes since the start of the process; 0: steps of an earlier process.
    pub generation: u64,
    pub steps: Arc<[Arc<dyn StepFactory>]>,
    /// Set: why the pipeline must wait (a plugin file was removed without `plugin remove`).
    pub hold: Option<Arc<str>>,
}
