//! The members of one shared subscription.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::{Options, Subscriber};
use crate::listeners::mqtt::outbound::ShareFilter;

/// The subscribers of one `$share/NAME/FILTER`: each message goes to one.
pub struct Share<S> {
    pub filter: ShareFilter,
    /// At least one.
    pub members: Vec<Subscriber<S>>,
    /// Number of members with QoS 1 or 2 whose sessions outlive their connections.
    pub kept: usize,
    /// Number of members with QoS 1 or 2 whose sessions do not.
    pub unkept: usize,
    /// Number of members with QoS 0.
    at_most_once: usize,
    turn: AtomicUsize,
    /// Number of clients that had arrived when none of its members was connected; 0: not known.
    deserted: AtomicU64,
}

impl<S> Share<S> {
    pub(super) fn new(text: &str) -> Self {
        Self {
            filter: Arc::new(text.into()),
            members: Vec::new(),
            kept: 0,
            unkept: 0,
            at_most_once: 0,
            turn: AtomicUsize::new(0),
            deserted: AtomicU64::new(0),
        }
    }

    /// Puts a member in; true when it was none yet. A client that subscribes is connected.
    pub(super) fn put(&mut self, member: Subscriber<S>) -> bool {
        *self.deserted.get_mut() = 0;
        *self.count(&member) += 1;
        match self.members.iter().position(|known| known.number == member.number) {
            Some(at) => {
                let known = std::mem::replace(&mut self.members[at], member);
                *self.count(&known) -= 1;
                false
            }
            None => {
                self.members.push(member);
                true
            }
        }
    }

    /// Takes a member out; returns what it had subscribed with.
    pub(super) fn take(&mut self, number: u64) -> Option<Options> {
        let at = self.members.iter().position(|member| member.number == number)?;
        let member = self.members.swap_remove(at);
        *self.count(&member) -= 1;
        Some(member.options)
    }

    /// The session of a member ends with its connection from now on.
    pub(super) fn keep_no_more(&mut self, number: u64) {
        let Some(at) = self.members.iter().position(|member| member.number == number) else { return };
        let Subscriber { options, is_kept, .. } = self.members[at];
        *self.count_of(is_kept, options) -= 1;
        self.members[at].is_kept = false;
        *self.count_of(false, options) += 1;
    }

    fn count(&mut self, member: &Subscriber<S>) -> &mut usize {
        self.count_of(member.is_kept, member.options)
    }

    fn count_of(&mut self, is_kept: bool, options: Options) -> &mut usize {
        match (options.qos, is_kept) {
            (0, _) => &mut self.at_most_once,
            (_, true) => &mut self.kept,
            (_, false) => &mut self.unkept,
        }
    }

    /// Returns the member whose turn it is, by its place among the members, and passes the turn on.
    pub fn next_turn(&self) -> usize {
        self.turn.fetch_add(1, Ordering::Relaxed) % self.members.len()
    }

    /// The members, beginning with the one at this place.
    pub fn beginning_with(&self, first: usize) -> impl Iterator<Item = &Subscriber<S>> {
        self.members[first..].iter().chain(&self.members[..first])
    }

    /// Whether no member was connected when this many clients had arrived, so that none is unless
    /// another arrived since.
    pub fn is_deserted(&self, arrivals: u64) -> bool {
        self.deserted.load(Ordering::Relaxed) == arrivals
    }

    /// No member was connected, all seen after `arrivals` was read.
    pub fn set_deserted(&self, arrivals: u64) {
        self.deserted.store(arrivals, Ordering::Relaxed);
    }
}
