//! Connections whose rights may end while they are connected. The proof that admitted a client is
//! checked again when a file on which it rests has changed.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// The proof that admitted a client.
pub trait Proof: fmt::Debug + Send + Sync {
    /// Returns whether the proof would admit the client now. Cheap, and reads no file.
    fn holds(&self) -> bool;

    /// Returns when the proof expires, if that is known.
    fn valid_until(&self) -> Option<Instant> {
        None
    }
}

/// The standings of all connections whose proofs can change.
#[derive(Default)]
pub struct Standings(Arc<Mutex<Entries>>);

#[derive(Default)]
struct Entries {
    next: u64,
    by_number: HashMap<u64, Arc<Entry>>,
}

struct Entry {
    proofs: Vec<Arc<dyn Proof>>,
    is_revoked: AtomicBool,
    wake: Box<dyn Fn() + Send + Sync>,
}

/// The standing of one connection, until it is dropped.
pub struct Standing {
    number: u64,
    entry: Arc<Entry>,
    entries: Arc<Mutex<Entries>>,
}

impl Standings {
    /// Adds a connection. `wake` is called when its rights end, possibly at once.
    pub fn enter(&self, proofs: Vec<Arc<dyn Proof>>, wake: impl Fn() + Send + Sync + 'static) -> Standing {
        let entry = Arc::new(Entry { proofs, is_revoked: AtomicBool::new(false), wake: Box::new(wake) });
        let mut entries = lock(&self.0);
        let number = entries.next;
        entries.next += 1;
        entries.by_number.insert(number, entry.clone());
        drop(entries);
        // What changed since the client was let in is seen now, what changes later by `recheck`.
        entry.check();
        Standing { number, entry, entries: self.0.clone() }
    }

    /// Checks all connections, and returns how many lost their rights.
    pub fn recheck(&self) -> usize {
        let entries: Vec<_> = lock(&self.0).by_number.values().cloned().collect();
        entries.iter().filter(|entry| entry.check()).count()
    }
}

impl Entry {
    /// Checks one connection, and returns whether its rights ended in this call.
    fn check(&self) -> bool {
        let is_over = !self.proofs.iter().all(|proof| proof.holds());
        let is_new = is_over && !self.is_revoked.swap(true, Ordering::AcqRel);
        if is_new {
            (self.wake)();
        }
        is_new
    }
}

impl Standing {
    pub fn is_revoked(&self) -> bool {
        self.entry.is_revoked.load(Ordering::Acquire)
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        lock(&self.entries).by_number.remove(&self.number);
    }
}

fn lock(entries: &Mutex<Entries>) -> MutexGuard<'_, Entries> {
    entries.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    use super::super::{Access, Deps, Identity, Limits};
    use super::*;
    use crate::telemetry::Failures;

    #[derive(Debug, Default)]
    struct Switch(AtomicBool);

    impl Proof for Switch {
        fn holds(&self) -> bool {
            !self.0.load(Ordering::SeqCst)
        }
    }

    #[test]
    fn who_rests_on_what_no_longer_holds_is_told_once_and_nobody_else() {
        let (standings, woken) = (Standings::default(), Arc::new(AtomicUsize::new(0)));
        let proofs = [Arc::new(Switch::default()), Arc::new(Switch::default())];
        let enter = |on: &[usize]| {
            let woken = woken.clone();
            let on = on.iter().map(|at| proofs[*at].clone() as Arc<dyn Proof>).collect();
            standings.enter(on, move || {
                woken.fetch_add(1, Ordering::SeqCst);
            })
        };
        let (both, second, gone) = (enter(&[0, 1]), enter(&[1]), enter(&[0]));
        drop(gone);
        assert_eq!(standings.recheck(), 0);
        proofs[0].0.store(true, Ordering::SeqCst);
        assert_eq!((standings.recheck(), standings.recheck(), woken.load(Ordering::SeqCst)), (1, 0, 1));
        assert!(both.is_revoked() && !second.is_revoked());
        // Between the look at the file and here.
        assert!(enter(&[0]).is_revoked());
        drop((both, second));
        assert!(lock(&standings.0).by_number.is_empty());
    }

    #[derive(Debug)]
    struct Until(Instant);

    impl Proof for Until {
        fn holds(&self) -> bool {
            true
        }

        fn valid_until(&self) -> Option<Instant> {
            Some(self.0)
        }
    }

    #[test]
    fn rights_never_outlast_the_certificate_whoever_gives_them() {
        let (secret, wait_max) = (&[0; 32], Duration::ZERO);
        let deps = Deps { secret, plugins: None, wait_max, failures: &Failures::default() };
        let access = Arc::new(Access::open(None, &Limits::default(), &deps).unwrap());
        let now = Instant::now();
        let hours = |hours: u64| now + Duration::from_secs(3_600 * hours);
        let proof: Arc<dyn Proof> = Arc::new(Until(hours(2)));
        for (given, until) in [(None, 2), (Some(1), 1), (Some(3), 2)] {
            let identity = Identity { valid_until: given.map(hours), ..Identity::default() };
            let rights = access.rights(identity, "c", Some(&proof));
            assert_eq!(rights.identity.valid_until, Some(hours(until)));
        }
    }
}
