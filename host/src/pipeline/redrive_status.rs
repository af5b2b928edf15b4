//! What a pipeline shows of its redrives.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::again::Ended;
use super::metrics::RedriveMetrics;

/// The redrive that runs, or the last one of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RedriveStatus {
    pub since: Instant,
    /// `None`: it runs.
    pub ended: Option<Instant>,
    /// What became of its letters so far.
    pub letters: Ended,
}

/// Shows and counts what the redrives of a pipeline do.
pub struct Redrives {
    status: Mutex<Option<RedriveStatus>>,
    metrics: RedriveMetrics,
}

/// A redrive that runs, until it is dropped.
pub struct Running<'a>(&'a Redrives);

impl Redrives {
    pub fn new(pipeline: &str) -> Self {
        Self { status: Mutex::default(), metrics: RedriveMetrics::new(pipeline) }
    }

    /// A redrive begins.
    pub fn begin(&self) -> Running<'_> {
        let since = Instant::now();
        *self.lock() = Some(RedriveStatus { since, ended: None, letters: Ended::default() });
        self.metrics.running.set(1.0);
        Running(self)
    }

    /// Adds letters to those of the redrive that runs.
    pub fn add(&self, letters: Ended) {
        if let Some(status) = &mut *self.lock() {
            status.letters += letters;
        }
        self.metrics.sent.increment(letters.sent);
        self.metrics.sent_before.increment(letters.sent_before);
        self.metrics.refused.increment(letters.refused);
    }

    /// `None`: none has run in this process.
    pub fn status(&self) -> Option<RedriveStatus> {
        *self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, Option<RedriveStatus>> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if let Some(status) = &mut *self.0.lock() {
            status.ended = Some(Instant::now());
        }
        self.0.metrics.running.set(0.0);
    }
}
