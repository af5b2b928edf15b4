//! The workers of a pipeline that wait for a new version of a step that holds.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

/// Each waiting worker, for as long as its lane goes on.
#[derive(Default)]
pub struct HeldWorkers(Mutex<Waits>);

#[derive(Default)]
struct Waits {
    next: u64,
    by_number: BTreeMap<u64, Held>,
}

struct Held {
    /// Generation of the chain in which the worker waits.
    generation: u64,
    why: String,
    /// Cancelled: its lane ends. The worker may see this later, when a call of a plugin returns.
    stop: CancellationToken,
}

/// A worker waits until this is dropped.
pub struct Waiting<'a> {
    of: &'a HeldWorkers,
    number: u64,
}

impl HeldWorkers {
    /// Notes that a worker waits, of a lane that ends with `stop`.
    pub fn wait(&self, generation: u64, why: &str, stop: &CancellationToken) -> Waiting<'_> {
        let mut waits = self.lock();
        let number = waits.next;
        waits.next += 1;
        waits.by_number.insert(number, Held { generation, why: why.to_owned(), stop: stop.clone() });
        Waiting { of: self, number }
    }

    /// Returns the generations of the chains in which workers wait.
    pub fn generations(&self) -> BTreeSet<u64> {
        self.lock().of_lanes().map(|held| held.generation).collect()
    }

    /// Returns why a worker waits in the chain of this generation, if one does.
    pub fn why(&self, generation: u64) -> Option<String> {
        self.lock().of_lanes().find(|held| held.generation == generation).map(|held| held.why.clone())
    }

    fn lock(&self) -> MutexGuard<'_, Waits> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting<'_> {
    /// Notes that the worker waits for another reason.
    pub fn set_why(&self, why: &str) {
        if let Some(held) = self.of.lock().by_number.get_mut(&self.number) {
            why.clone_into(&mut held.why);
        }
    }
}

impl Waits {
    /// Returns the workers whose lanes go on, in the order in which they began to wait.
    fn of_lanes(&self) -> impl Iterator<Item = &Held> {
        self.by_number.values().filter(|held| !held.stop.is_cancelled())
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.of.lock().by_number.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_waits_until_it_goes_on_or_its_lane_ends() {
        let (held, lanes) = (HeldWorkers::default(), [(); 2].map(|()| CancellationToken::new()));
        let first = held.wait(1, "first", &lanes[0]);
        let _second = held.wait(1, "second", &lanes[0]);
        let _newer = held.wait(2, "newer", &lanes[1]);
        assert_eq!((held.generations(), held.why(1)), ([1, 2].into(), Some("first".to_owned())));
        first.set_why("still");
        assert_eq!(held.why(1).as_deref(), Some("still"));
        drop(first);
        assert_eq!((held.generations(), held.why(1)), ([1, 2].into(), Some("second".to_owned())));
        lanes[0].cancel();
        assert_eq!((held.generations(), held.why(1)), ([2].into(), None));
        // It looked at its lane just before that ended.
        let _late = held.wait(1, "late", &lanes[0]);
        assert_eq!(held.generations(), [2].into());
    }
}
