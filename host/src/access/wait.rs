//! How long clients wait for an answer: one value for all authenticators, which a reload changes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

#[derive(Clone, Debug)]
pub struct WaitMax(Arc<AtomicU64>);

impl WaitMax {
    pub fn new(wait_max: Duration) -> Self {
        let wait = Self(Arc::default());
        wait.set(wait_max);
        wait
    }

    pub fn get(&self) -> Duration {
        Duration::from_micros(self.0.load(Ordering::Relaxed))
    }

    pub fn set(&self, wait_max: Duration) {
        self.0.store(u64::try_from(wait_max.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}
