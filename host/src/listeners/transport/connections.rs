//! The number of connections of a listener, with a bound that a reload may change.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Connections that a listener has at a time.
#[derive(Debug)]
pub struct Connections {
    max: AtomicUsize,
    taken: AtomicUsize,
}

/// Counts one connection until this is dropped.
#[derive(Debug)]
pub struct Counted(Arc<Connections>);

impl Connections {
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { max: AtomicUsize::new(max), taken: AtomicUsize::new(0) })
    }

    /// Changes the bound. Connections beyond a lower one stay, and no further one is accepted until there are
    /// fewer.
    pub fn set_max(&self, max: usize) {
        self.max.store(max, Ordering::Relaxed);
    }

    /// Counts another connection. Returns `None` if there are as many as there may be.
    pub fn enter(self: &Arc<Self>) -> Option<Counted> {
        let max = self.max.load(Ordering::Relaxed);
        let more = |taken: usize| (taken < max).then_some(taken + 1);
        self.taken.fetch_update(Ordering::AcqRel, Ordering::Relaxed, more).ok()?;
        Some(Counted(self.clone()))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lower_bound_keeps_the_connections_that_are_there_and_takes_no_more() {
        let connections = Connections::new(2);
        let (first, _second) = (connections.enter().unwrap(), connections.enter().unwrap());
        assert!(connections.enter().is_none());
        connections.set_max(1);
        drop(first);
        assert!(connections.enter().is_none(), "one is still there");
        connections.set_max(2);
        assert!(connections.enter().is_some());
    }
}
