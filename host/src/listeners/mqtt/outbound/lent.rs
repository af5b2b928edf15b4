//! The message that a client needs to make progress and for which there is no memory. Its connection has
//! a permit for one such message at a time, and waits for it in turn.

use std::sync::{Arc, Weak};

use super::{Message, Outbox, Queued};

/// Largest message that needs no permit.
pub(super) const SMALL_BYTES_MAX: usize = 4 << 10;

/// A permit, and the message that was read under it.
pub struct Lent {
    bytes: usize,
    message: Option<Weak<Message>>,
}

impl Lent {
    /// Returns whether the message that was read under the permit is gone.
    pub fn is_spent(&self) -> bool {
        self.message.as_ref().is_some_and(|message| message.strong_count() == 0)
    }

    fn is_for(&self, message: &Arc<Message>) -> bool {
        self.message.as_ref().is_some_and(|lent| std::ptr::eq(lent.as_ptr(), Arc::as_ptr(message)))
    }
}

impl Outbox {
    /// Records that the connection has a permit for a message of `bytes`.
    pub fn lend(&mut self, bytes: usize) {
        self.lent = Some(Box::new(Lent { bytes, message: None }));
    }

    /// Returns whether there is an unused permit.
    pub fn is_lent(&self) -> bool {
        self.lent.as_ref().is_some_and(|lent| !lent.is_spent())
    }

    /// Returns whether there is a permit of `bytes`, under which no message was read.
    pub fn is_lent_for(&self, bytes: usize) -> bool {
        self.lent_bytes() == bytes
    }

    /// Returns whether a message that was read under the permit waits.
    pub fn holds_lent(&self) -> bool {
        self.lent.as_ref().is_some_and(|lent| lent.message.is_some() && !lent.is_spent())
    }

    /// Returns the size of a permit under which no message was read; 0 if there is none.
    pub(super) fn lent_bytes(&self) -> usize {
        self.lent.as_ref().filter(|lent| lent.message.is_none()).map_or(0, |lent| lent.bytes)
    }

    /// Returns whether `message` may be sent under the permit.
    pub(super) fn is_lent_to(&self, message: &Arc<Message>) -> bool {
        self.lent_bytes() >= message.len() || self.lent.as_ref().is_some_and(|lent| lent.is_for(message))
    }

    /// Records that a message was read under the permit.
    pub(super) fn read_under_permit(&mut self, message: &Arc<Message>) {
        self.lent.iter_mut().for_each(|lent| lent.message = Some(Arc::downgrade(message)));
    }

    /// Gives the permit back. The message that was read under it is read again when it is its turn.
    pub fn return_lent(&mut self) {
        let Some(lent) = self.lent.take() else { return };
        let is_lent = |body: &Option<Arc<Message>>| body.as_ref().is_some_and(|body| lent.is_for(body));
        for flight in self.inflight.iter_mut().skip(self.sent) {
            let held = flight.held();
            flight.waiting.iter_mut().filter(|queued| is_lent(&queued.body)).for_each(Queued::let_go);
            self.inflight_held -= held - flight.held();
        }
        for queued in self.queue.iter_mut().filter(|queued| is_lent(&queued.body)) {
            self.sums.subtract(queued);
            queued.let_go();
            self.sums.add(queued);
        }
        self.count();
    }
}
