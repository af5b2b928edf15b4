//! The order in which a thread takes the locks of the listener.
//!
//! Two threads that take two of these locks in opposite orders wait for each other for ever, and
//! with them every thread that needs either lock. Each of the locks is therefore taken through
//! [`in_order`]. Under test it panics where a thread already holds a lock that comes later, so that
//! every test of the listener tries the order, on however few threads it runs.

use std::ops::{Deref, DerefMut};

/// The locks in the order in which they are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rank {
    /// Allows one look at what sessions wait for at a time (`copies.rs`).
    Looking,
    /// The messages that members of shares hand to each other (`fanout/pass_on.rs`), and the records of
    /// shares (`fanout/share_records.rs`).
    Passed,
    /// The index of subscriptions (`fanout.rs`).
    Subscriptions,
    /// The state of one session (`session.rs`).
    State,
    /// The outbox of one session (`outbound`).
    Outbox,
    /// The retained messages.
    Retained,
    /// The map of sessions, the index of copies and a session's open packet ids. Nothing is locked
    /// below one of them.
    Last,
}

/// A guard, and under test the rank of its lock.
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
