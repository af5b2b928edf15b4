//! The order in which a thread takes the locks of the listener.
//!
//! If two threads take two of these locks in opposite orders, they wait for each other for ever, and
//! every thread that needs either lock waits too. Each lock is therefore taken through [`in_order`]. In
//! tests it panics if the thread already holds a lock that comes later, so that every test of the
//! listener checks the order.

use std::ops::{Deref, DerefMut};

/// The locks in the order in which they are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rank {
    /// Permits one examination at a time of what sessions wait for (`copies.rs`).
    Looking,
    /// Messages that members of shares hand to each other (`fanout/pass_on.rs`), and the records of
    /// shares (`fanout/share_records.rs`).
    Passed,
    /// Index of subscriptions (`fanout.rs`).
    Subscriptions,
    /// State of one session (`session.rs`).
    State,
    /// Outbox of one session (`outbound`).
    Outbox,
    /// Retained messages.
    Retained,
    /// The map of sessions, the index of copies, and a session's open packet ids. No other lock is taken
    /// while one of them is held.
    Last,
}

/// A guard which, in tests, also holds the rank of its lock.
pub struct Locked<G> {
    guard: G,
    #[cfg(test)]
    _held: held::Held,
}

/// Takes a lock of `rank` with `take`.
pub fn in_order<G>(rank: Rank, take: impl FnOnce() -> G) -> Locked<G> {
    #[cfg(not(test))]
    let _ = rank;
    Locked {
        #[cfg(test)]
        _held: held::Held::new(rank),
        guard: take(),
    }
}

impl<G: Deref> Deref for Locked<G> {
    type Target = G::Target;

    #[inline]
    fn deref(&self) -> &G::Target {
        &self.guard
    }
}

impl<G: DerefMut> DerefMut for Locked<G> {
    #[inline]
    fn deref_mut(&mut self) -> &mut G::Target {
        &mut self.guard
    }
}

#[cfg(test)]
mod held {
    use std::cell::RefCell;

    use super::Rank;

    thread_local! {
        static HELD: RefCell<Vec<Rank>> = const { RefCell::new(Vec::new()) };
    }

    pub struct Held(Rank);

    impl Held {
        pub fn new(rank: Rank) -> Self {
            HELD.with_borrow_mut(|held| {
                let later = held.iter().find(|held| **held >= rank);
                assert!(later.is_none(), "{rank:?} is locked while {later:?} is held: see `Rank`");
                held.push(rank);
            });
            Self(rank)
        }
    }

    impl Drop for Held {
        fn drop(&mut self) {
            HELD.with_borrow_mut(|held| held.retain(|held| *held != self.0));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn a_lock_is_not_taken_while_a_later_one_is_held() {
        let (state, map) = (Mutex::new(1), Mutex::new(2));
        let below = || {
            let _state = in_order(Rank::State, || state.lock().unwrap());
            *in_order(Rank::Last, || map.lock().unwrap())
        };
        assert_eq!(below(), 2);
        let above = std::panic::catch_unwind(|| {
            let _map = in_order(Rank::Last, || map.lock().unwrap());
            *in_order(Rank::State, || state.lock().unwrap())
        });
        assert!(above.is_err());
        assert_eq!(*in_order(Rank::State, || state.lock().unwrap()), 1, "what was held is given back");
    }
}
