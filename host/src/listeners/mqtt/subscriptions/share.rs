//! The members of one shared subscription.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::{Options, Subscriber};
use crate::listeners::mqtt::outbound::ShareFilter;

/// The subscribers of one `$share/NAME/FILTER`. Each message is delivered to one of them.
pub struct Share<S> {
    pub filter: ShareFilter,
    /// The members, of which there is at least one.
    pub members: Vec<Subscriber<S>>,
    /// Number of persistent members with QoS 1 or 2.
    pub kept: usize,
    /// Number of non-persistent members with QoS 1 or 2.
    pub unkept: usize,
    /// Number of members with QoS 0.
    at_most_once: usize,
    turn: AtomicUsize,
    /// Number of clients that had arrived when none of its members was connected; 0 if not known.
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

    /// Adds a member. Returns true if it was not a member. A client that subscribes is connected.
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

    /// Removes a member, and returns its options.
    pub(super) fn take(&mut self, number: u64) -> Option<Options> {
        let at = self.members.iter().position(|member| member.number == number)?;
        let member = self.members.swap_remove(at);
        *self.count(&member) -= 1;
        Some(member.options)
    }

    /// Marks a member as one whose session ends with its connection.
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

    /// Returns the index of the member whose turn it is, and advances the turn.
    pub fn next_turn(&self) -> usize {
        self.turn.fetch_add(1, Ordering::Relaxed) % self.members.len()
    }

    /// Returns the members, beginning with this index.
    pub fn beginning_with(&self, first: usize) -> impl Iterator<Item = &Subscriber<S>> {
        self.members[first..].iter().chain(&self.members[..first])
    }

    /// Returns whether no member was connected when this number of clients had arrived. Unless another
    /// client has arrived since, none is connected now.
    pub fn is_deserted(&self, arrivals: u64) -> bool {
        self.deserted.load(Ordering::Relaxed) == arrivals
    }

    /// Records that no member was connected, all of them checked after `arrivals` was read.
    pub fn set_deserted(&self, arrivals: u64) {
        self.deserted.store(arrivals, Ordering::Relaxed);
    }
}
