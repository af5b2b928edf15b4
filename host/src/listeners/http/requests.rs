//! The requests that a connection has under way: how many, since when there is none, which answers its
//! client does not take, and how many requests it has reset.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit};
use tokio::time::Instant;

use super::connection::Connection;
use crate::listeners::transport::Place;

/// Requests under way beside the first of each connection, of all connections.
pub const FURTHER_MAX: usize = if cfg!(test) { 100 } else { 4_096 };
/// Requests that a client may reset before they are answered; each that is answered gives one back.
const RESETS_MAX: u32 = 100;

/// The requests of one connection.
pub struct Requests {
    place: Place,
    state: Mutex<State>,
    /// Notified once the client has reset too many.
    too_many_resets: Notify,
}

struct State {
    /// Requests whose answers are not sent yet.
    open: usize,
    /// Open requests that were received completely and are not answered.
    whole: usize,
    has_asked: bool,
    /// When the last one ended, or the connection began.
    since: Instant,
    /// When answers were ready whose bodies are not sent yet, in this order.
    unsent: BTreeMap<u64, Instant>,
    answers: u64,
    resets_left: u32,
}

/// A request that is under way, until its answer is sent.
pub struct Open {
    of: Arc<Connection>,
    _further: Option<OwnedSemaphorePermit>,
    state: OpenState,
}

enum OpenState {
    Asked,
    Answered,
    /// The answer has a body that is not sent yet. The number is that of the answer.
    Unsent(u64),
}

/// A request that has come whole: its connection gives way to no other until it is answered.
pub struct Whole<'r>(&'r Requests);

impl Requests {
    pub fn new(place: Place) -> Self {
        let state = State {
            open: 0,
            whole: 0,
            has_asked: false,
            since: Instant::now(),
            unsent: BTreeMap::new(),
            answers: 0,
            resets_left: RESETS_MAX,
        };
        Self { place, state: Mutex::new(state), too_many_resets: Notify::new() }
    }

    /// Counts a request whose head has come; `None`: there are too many of all connections.
    pub fn begin(of: &Arc<Connection>) -> Option<Open> {
        let mut state = of.requests.lock();
        state.has_asked = true;
        let further = match state.open {
            0 => None,
            _ => Some(of.http.further_requests.clone().try_acquire_owned().ok()?),
        };
        state.open += 1;
        Some(Open { of: of.clone(), _further: further, state: OpenState::Asked })
    }

    pub fn whole(&self) -> Whole<'_> {
        let mut state = self.lock();
        state.whole += 1;
        if state.whole == 1 {
            self.place.heard();
        }
        Whole(self)
    }

    pub fn has_asked(&self) -> bool {
        self.lock().has_asked
    }

    pub fn is_none_open(&self) -> bool {
        self.lock().open == 0
    }

    /// Returns when the connection is to end: it asks nothing, or does not take an answer. `None` while all
    /// requests wait for their answers.
    pub fn end_at(&self, request_timeout: Duration, idle_timeout: Duration) -> Option<Instant> {
        let state = self.lock();
        if state.open == 0 {
            let idle_max = if state.has_asked { idle_timeout } else { request_timeout };
            return Some(state.since + idle_max);
        }
        state.unsent.values().next().map(|ready_at| *ready_at + idle_timeout)
    }

    /// Returns where the connection is to end for another one's. Safe to drop.
    pub async fn give_way(&self) {
        self.place.gives_way().await;
    }

    /// Returns once the client has reset too many requests. Safe to drop.
    pub async fn too_many_resets(&self) {
        self.too_many_resets.notified().await;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Open {
    /// The answer is ready. `has_body`: the client may leave a part of it untaken.
    pub fn answered(&mut self, has_body: bool) {
        self.state = OpenState::Answered;
        if has_body {
            let mut state = self.of.requests.lock();
            state.answers += 1;
            let number = state.answers;
            state.unsent.insert(number, Instant::now());
            self.state = OpenState::Unsent(number);
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let mut state = self.of.requests.lock();
        state.open -= 1;
        state.since = Instant::now();
        if let OpenState::Unsent(number) = self.state {
            state.unsent.remove(&number);
        }
        if matches!(self.state, OpenState::Asked) {
            state.resets_left = state.resets_left.saturating_sub(1);
            if state.resets_left == 0 {
                self.of.requests.too_many_resets.notify_one();
            }
        } else {
            state.resets_left = RESETS_MAX.min(state.resets_left + 1);
        }
    }
}

impl Drop for Whole<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.whole -= 1;
        if state.whole == 0 {
            self.0.place.waits_again();
        }
    }
}
