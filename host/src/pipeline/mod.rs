//! A pipeline: reads one stream, runs its steps, delivers each output to the
//! sinks its route names, exactly once per sink.
//!
//! ```text
//! stream -> reader -> workers (steps, routes) -> outlets -> deliveries -> sinks
//!                        \-> dead letters <-/
//! ```
//!
//! A pipeline with several sinks has a stream between its steps and its sinks, which the steps write once and
//! each sink reads by itself ([`road`]):
//!
//! ```text
//! stream -> steps -> PIPELINE.out -> sink
//!                                 \-> sink
//! ```
//!
//! [`start`] is the story; [`supervisor`] keeps it going: new steps, sinks that
//! lag, failures, the end. Why a crash between any two effects neither loses nor
//! doubles: `host/decisions/delivery-order.md` and `through-a-stream.md`.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::batch::Offset;
use crate::hints::Hint;
use crate::sinks::stream::Target;
use crate::sinks::{Begin, Name, Sink};
use crate::step::{Chain, ROUTES_STEP, Recall};
use crate::stream::{OnLag, Stream};
use crate::telemetry::{Failures, alike};

mod again;
mod answering;
mod assemble;
mod board;
mod claim;
mod config;
mod dead_letters;
mod dead_letters_config;
mod delivery;
mod destinations;
mod discard;
mod forget_marks;
mod former_redrives;
mod gone;
mod held;
mod known;
mod lane;
mod letter;
mod marks;
mod metrics;
mod missing;
mod open_letters;
mod outlet;
mod pass_letters;
mod reader;
mod reasons;
mod records;
mod redrive;
mod redrive_status;
mod redrive_steps;
mod road;
mod routes;
mod schedule;
mod sink_names;
mod status;
mod step_history;
mod step_run;
mod stripped;
mod supervisor;
mod swap;
mod travel;
mod unrouted;
mod versions;
mod worker;
mod writer;

#[cfg(test)]
pub(crate) mod tests;

pub use again::Ended;
pub use assemble::start;
pub use claim::{Beginning, FirstStart, claim_of, other_log};
pub use config::{Backoff, Config, DEFAULT_ROUTE, DROP, Retries, RouteTarget};
pub use dead_letters::{DeadLetters, Error as DeadLettersError};
pub use dead_letters_config::DeadLettersConfig;
pub use letter::Letter;
pub use marks::{MARK_PREFIX, Mark, Marks, Reopened};
pub use metrics::{METRICS, letters_gone};
pub use open_letters::{Open as OpenCount, OpenLetters};
pub use reasons::KeptReasons;
pub use records::recorded_recipes;
pub use redrive::{Filter, RedriveError, Summary, list_open};
pub use redrive_status::RedriveStatus;
pub use road::{OUT, need_out, out_stream_of};
pub use sink_names::{NAMES_PREFIX, SinkNames, name_sinks};
pub use status::{PipelineStatus, SinkStatus, State, ToDo};
pub use step_history::StepHistory;

use board::Boards;
use redrive::Lender;
use worker::Shared;

/// Orders to a delivery that it did not get to yet.
const CONTROLS_MAX: usize = 8;
/// Events that a pipeline did not get to yet, by sink.
const EVENTS_PER_SINK_MAX: usize = 16;

/// What a sink's transaction has at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batching {
    pub rows_max: usize,
    /// Bytes of payload. Rows are gathered until they keep so many bytes of memory, which are more.
    pub bytes_max: u64,
    /// Longest wait of the first row for its commit.
    pub wait_max: Duration,
}

impl Default for Batching {
    fn default() -> Self {
        Self { rows_max: 5_000, bytes_max: 16 << 20, wait_max: Duration::from_millis(100) }
    }
}

pub struct SinkPart {
    /// As the routes name it.
    pub name: String,
    pub sink: Box<dyn Sink>,
    /// Names its database and table for a person.
    pub target: String,
    pub batching: Batching,
    pub on_lag: OnLag,
    /// The name that it had.
    pub renamed_from: Option<String>,
    pub begin: Option<Begin>,
    /// The sink is a stream of this host.
    pub is_stream: bool,
}

/// The stream that a pipeline's steps write and its sinks read.
pub struct OutPart {
    pub part: SinkPart,
    pub stream: Arc<dyn Stream>,
    pub target: Target,
    /// Whether the steps write to it: the pipeline has several sinks. Else it has what is left from when it
    /// had.
    pub is_written: bool,
}

/// What a pipeline stands on.
pub struct Deps {
    pub stream: Arc<dyn Stream>,
    pub chain: watch::Receiver<Chain>,
    /// Makes the steps of earlier processes again.
    pub recall: Recall,
    /// At least one.
    pub sinks: Vec<SinkPart>,
    /// The stream between the steps and the sinks, where the pipeline has one or had one.
    pub out: Option<OutPart>,
    /// The dead letters of the whole host.
    pub dead_letters: Arc<dyn Stream>,
    /// What names of sinks mean in them.
    pub sink_names: Arc<SinkNames>,
    /// Why redrives of the whole host had dead letters rejected again.
    pub reasons: Arc<KeptReasons>,
    /// Bytes of this pipeline's dead letters whose sinks are not past them yet.
    pub dead_letters_bytes_max: u64,
    /// Names of all pipelines of the host and their sinks.
    pub configured: Arc<BTreeSet<Name>>,
    pub failures: Failures,
    /// Cancelled: drain, commit, end.
    pub shutdown: CancellationToken,
}

/// A running pipeline.
pub struct Handle {
    redriver: Arc<Redriver>,
    #[cfg(test)]
    shutdown: CancellationToken,
    /// Cancelled: each part of the pipeline ends in whatever it is in the midst of.
    #[cfg(test)]
    aborts: Vec<CancellationToken>,
    task: tokio::sync::Mutex<Option<tokio::task::JoinHandle<()>>>,
}

/// Sends dead letters of a pipeline again.
struct Redriver {
    boards: Boards,
    lenders: Vec<Lender>,
    dead_letters: Arc<dyn Stream>,
    shared: Arc<Shared>,
    /// Held by the redrive that runs.
    epochs: tokio::sync::Mutex<redrive::Epochs>,
    stopping: CancellationToken,
}

impl Redriver {
    /// No filter: only what an earlier redrive left.
    async fn redrive(&self, filter: Option<&Filter>) -> Result<Summary, RedriveError> {
        let mut epochs = self.epochs.lock().await;
        let chain = self.boards.chain().ok_or(RedriveError::NoSteps)?;
        // Steps may be missing in it.
        if let Some(reason) = &chain.hold {
            return Err(RedriveError::Held(format!("the pipeline holds: {reason}")));
        }
        let _running = self.shared.redrives.begin();
        self.open_missing().await?;
        let Self { shared, dead_letters, lenders, stopping, .. } = self;
        redrive::run(filter, &chain, shared, dead_letters, lenders, &mut epochs, stopping).await
    }

    /// Opens the letters that databases are found to have lost, between redrives.
    async fn watch_missing(self: Arc<Self>) {
        loop {
            self.shared.letters.sent().is_found().await;
            let _between = self.epochs.lock().await;
            if let Err(error) = self.open_missing().await {
                self.say(&error.to_string(), "dead letters that a sink's database has lost stay closed");
            }
        }
    }

    async fn open_missing(&self) -> Result<(), DeadLettersError> {
        let letters = &self.shared.letters;
        for (sink, count) in letters.sent().put_back().await? {
            tracing::error!(
                pipeline = &*self.shared.name,
                sink = letters.names().sink(sink),
                letters = count,
                show = self.shared.failures.hint(Hint::DeadLettersList),
                "the sink's database does not have dead letters that were sent to it: it was restored from before \
                 they were sent, or another database is in its place. They are open again for this sink"
            );
        }
        Ok(())
    }

    /// Continues the redrives that ended with the last process, and those of 0.1.0, until all is sent or the
    /// pipeline stops. Not to be dropped while it has borrowed a sink: the sink's delivery drains with it.
    async fn resume(self: Arc<Self>) {
        let mut from = Some(Offset(0));
        while let Some(begin) = from {
            let taken_over = {
                let _between = self.epochs.lock().await;
                let names = self.shared.letters.names();
                former_redrives::take_over(&self.dead_letters, names, begin).await
            };
            from = taken_over.unwrap_or_else(|error| {
                self.say_not_resumed(&error.to_string());
                None
            });
            if self.send_pending().await.is_break() {
                return;
            }
        }
    }

    /// Returns `Break` if the pipeline stops.
    async fn send_pending(&self) -> ControlFlow<()> {
        let name = &self.shared.name;
        let names = &self.shared.letters.names().pipelines;
        let mut attempt = 0;
        while again::is_pending(&*self.dead_letters, names) {
            if self.stopping.run_until_cancelled(self.boards.has_chain()).await.is_none() {
                return ControlFlow::Break(());
            }
            match self.redrive(None).await {
                // What is pending now waits for a sink that the pipeline does not have.
                Ok(summary) if summary.failed.is_empty() => {
                    let Ended { sent, refused, .. } = summary.letters;
                    tracing::info!(pipeline = %name, sent, refused, "finished the redrive of dead letters that the last run left");
                    return ControlFlow::Continue(());
                }
                Ok(summary) => self.say_not_resumed(&summary.failed.join("; ")),
                Err(RedriveError::Stopping) => return ControlFlow::Break(()),
                Err(error) => self.say_not_resumed(&error.to_string()),
            }
            let pause = tokio::time::sleep(self.shared.config.sink_backoff.delay(attempt));
            if self.stopping.run_until_cancelled(pause).await.is_none() {
                return ControlFlow::Break(());
            }
            attempt += 1;
        }
        ControlFlow::Continue(())
    }

    fn say_not_resumed(&self, reason: &str) {
        self.say(reason, "the redrive of dead letters does not go on");
    }

    fn say(&self, reason: &str, what: &str) {
        let kind = format!("pipeline \"{}\": {what}", self.shared.name);
        let show = self.shared.failures.hint(Hint::DeadLettersList);
        self.shared.failures.report_by(&kind, &alike(reason), 1, reason, &show);
    }
}

impl Handle {
    pub fn name(&self) -> &str {
        &self.redriver.shared.name
    }

    /// The name that it has, then those that it had.
    pub fn names(&self) -> &[String] {
        &self.redriver.shared.letters.names().pipelines
    }

    /// Names of the sinks that the routes lead to.
    pub fn sinks(&self) -> &[String] {
        self.redriver.shared.letters.names().shown()
    }

    /// Whether one of the sinks has this name, or had it.
    pub fn knows_sink(&self, name: &str) -> bool {
        self.redriver.shared.letters.names().is_known(name)
    }

    pub fn status(&self) -> PipelineStatus {
        self.redriver.boards.status()
    }

    /// The redrive that runs, or the last one of this process.
    pub fn last_redrive(&self) -> Option<RedriveStatus> {
        self.redriver.shared.redrives.status()
    }

    /// Sends dead letters again: a sink's to that sink, a step's from that step
    /// on. A letter goes once, however often this is called.
    pub async fn redrive(&self, filter: &Filter) -> Result<Summary, RedriveError> {
        self.redriver.redrive(Some(filter)).await
    }

    /// Closes dead letters without sending them, those of any pipeline where none is named, and
    /// returns their number; `None` while a redrive of this pipeline runs.
    pub async fn discard(
        &self,
        filter: &Filter,
        pipeline: Option<&str>,
    ) -> Result<Option<u64>, DeadLettersError> {
        let Some(_held) = self.without_redrives() else { return Ok(None) };
        discard::discard(&self.redriver.dead_letters, filter, pipeline).await.map(Some)
    }

    /// Keeps redrives of this pipeline from running while the result is held; `None` while one runs.
    pub fn without_redrives(&self) -> Option<impl Sized + Send + '_> {
        self.redriver.epochs.try_lock().ok()
    }

    /// Ends at once, in whatever it is in the midst of, as a kill would.
    #[cfg(test)]
    fn crash(&self) {
        self.aborts.iter().for_each(CancellationToken::cancel);
        self.shutdown.cancel();
    }

    /// Until its supervisor has been at work once more.
    #[cfg(test)]
    async fn looked_after(&self) {
        self.redriver.boards.shown().await;
    }

    /// Until the pipeline has ended, which `Deps::shutdown` makes it do.
    pub async fn join(&self) {
        if let Some(task) = self.task.lock().await.take()
            && let Err(error) = task.await
        {
            tracing::error!(pipeline = self.name(), %error, "the pipeline's supervisor failed");
        }
    }
}

/// The name that a part has, then the one that it had.
pub fn names_of(name: &str, renamed_from: &Option<String>) -> Vec<String> {
    std::iter::once(name).chain(renamed_from.as_deref()).map(str::to_owned).collect()
}
