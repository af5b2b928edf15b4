//! Deliveries to a client: the messages of its queue, as far as there is memory for them, and what they
//! wait for.

use std::future::pending;
use std::sync::Arc;

use rmqtt_codec::v5::DisconnectReasonCode;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{Connection, End, WRITE_BYTES_LEAST, WRITE_BYTES_MAX};
use crate::access::Verdict;
use crate::listeners::mqtt::Broker;
use crate::listeners::mqtt::handshake::may_see;
use crate::listeners::mqtt::outbound::{Loaded, Loader, Outbox, Space, Waits};
use crate::listeners::mqtt::session::Session;
use crate::listeners::mqtt::wire::Fault;
use crate::listeners::permits::{Permit, Permits, TooSlow};
use crate::stream::Ticket;

/// The permit of a large message for which there is no memory, from its request until the message's
/// packet is written.
pub struct Outgoing {
    permit: Option<Box<Permit>>,
    /// Whether the packet is in the write buffer.
    is_in_buffer: bool,
}

impl Outgoing {
    /// Requests a permit for a message of `bytes`. A permit for a smaller message is given back.
    fn ask(outgoing: &mut Option<Self>, bytes: usize, permits: &Arc<Permits>) {
        let outgoing = outgoing.get_or_insert(Self { permit: None, is_in_buffer: false });
        Permit::set(&mut outgoing.permit, Some(bytes), permits);
    }

    /// Returns the size of the message that the permit allows; 0 if it was not given.
    fn given(&self) -> usize {
        self.permit.as_ref().filter(|permit| permit.is_given()).map_or(0, |permit| permit.bytes())
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<'_, S> {
    /// Adds messages to the write buffer, and requests what the others wait for.
    pub(super) fn deliver(&mut self) {
        let has_room = self.inbound.memory.has_room(WRITE_BYTES_MAX);
        let bytes_max = if has_room { WRITE_BYTES_MAX } else { WRITE_BYTES_LEAST };
        if self.out.len() >= bytes_max || self.drains || self.answers_first() || self.renewing.is_some() {
            return;
        }
        // Its packet is written: the next one waits for its turn.
        let written = self.outward.as_mut().filter(|outward| outward.has_permit_in_buffer());
        written.into_iter().for_each(|outward| outward.outgoing = None);
        while self.fill(bytes_max) && self.out.len() < bytes_max {}
    }

    /// Fills the write buffer. Returns whether more may be added at once, under a permit that was just
    /// given.
    fn fill(&mut self, bytes_max: usize) -> bool {
        let broker = self.broker;
        let mut outbox = self.session.outbox();
        // Under the lock: what was queued since access control was replaced waits for the new rights.
        if !broker.access.is_of(self.inbound.rights()) {
            return false;
        }
        outbox.settle(&*broker.broker);
        let (rights, memory) = (self.inbound.rights(), &self.inbound.memory);
        let receive = |topic: &str| rights.receive(topic);
        let receive = rights.limits_receive().then_some(&receive as &dyn Fn(&str) -> Verdict);
        let space = Space { bytes_max, has_room: &|bytes| memory.has_room(bytes) };
        let (clock, out) = (&broker.clock, &mut self.out);
        let mut filled = outbox.fill(self.peer, &mut self.aliases, receive, clock, space, out);
        let note = || (broker.live.positions_of(broker, &self.session), broker.note_bytes_max());
        filled.too_large += outbox.record(&*broker.broker, note);
        let mut waits = outbox.waits(self.peer);
        waits.permit = waits.permit.max(filled.blocked);
        let unanswered = if filled.unanswered { outbox.unanswered(receive) } else { Vec::new() };
        drop(outbox);
        self.inbound.ask_to_receive(unanswered);
        broker.counters.filled(&filled);
        self.session.activity().filled(&filled);
        let wanted = waits.permit;
        Outward::set(&mut self.outward, waits, broker, &self.session);
        let Some(outward) = self.outward.as_mut().filter(|it| wanted > 0 || it.outgoing.is_some()) else {
            return false;
        };
        let is_full = self.out.len() >= bytes_max;
        let outbox = &mut self.session.outbox();
        outward.set_permit(wanted, filled.used_permit, is_full, outbox, &broker.outgoing_permits)
    }

    /// Continues deliveries.
    pub(super) fn moved(&mut self, moved: Moved) -> Result<(), End> {
        match moved {
            Moved::Again => {}
            Moved::Loaded(Loaded { messages, page }) => {
                self.outward.iter_mut().for_each(|outward| outward.loader = None);
                let may_see = may_see(self.inbound.rights(), &self.session);
                let mut outbox = self.session.outbox();
                if let Some(page) = page {
                    outbox.retained_found(page, &self.broker.retained());
                }
                let gone = outbox.loaded(&messages, may_see);
                drop(outbox);
                if gone > 0 {
                    self.broker.counters.gap.increment(gone);
                    self.session.activity().gone(gone);
                    let client_id = &*self.session.client_id;
                    let kind = "mqtt: messages went from their stream before their subscriber came";
                    self.broker.failures.report_by(kind, client_id, gone, &format!("client {client_id}"), "");
                }
            }
            Moved::Permitted(progress) => {
                let Some(outward) = &mut self.outward else { return Ok(()) };
                return outward.permitted(progress, &mut self.session.outbox());
            }
            Moved::Stopped => return Err(End::Stopped),
        }
        Ok(())
    }
}

/// What an outbox waits for, and the permit of its connection.
#[derive(Default)]
pub struct Outward {
    durable: Option<Ticket>,
    room: bool,
    loader: Option<Loader>,
    outgoing: Option<Outgoing>,
}

/// What ended a wait.
pub enum Moved {
    Again,
    Loaded(Loaded),
    /// A permit for a large message was given, or its packet makes too little progress.
    Permitted(Result<(), TooSlow>),
    /// The broker's stream, or that of the messages, has stopped.
    Stopped,
}

impl Outward {
    /// Sets what the outbox waits for. A running read continues, and a permit is kept.
    fn set(outward: &mut Option<Box<Self>>, mut waits: Waits, broker: &Arc<Broker>, session: &Arc<Session>) {
        let Self { loader, outgoing, .. } = outward.take().map(|outward| *outward).unwrap_or_default();
        if waits.is_none() && outgoing.is_none() {
            return;
        }
        let Waits { durable, room, .. } = waits;
        let reads = waits.reads();
        let loader = reads.then(|| loader.unwrap_or_else(|| Loader::new(&mut waits, broker, session)));
        *outward = Some(Box::new(Self { durable, room, loader, outgoing }));
    }

    /// Returns whether the packet under the permit is in the write buffer.
    fn has_permit_in_buffer(&self) -> bool {
        self.outgoing.as_ref().is_some_and(|outgoing| outgoing.is_in_buffer)
    }

    /// Counts bytes that the client has read.
    pub fn wrote(&mut self, bytes: usize) {
        let permit = self.outgoing.as_mut().and_then(|outgoing| outgoing.permit.as_mut());
        permit.into_iter().for_each(|permit| permit.add(bytes));
    }

    /// Requests a permit for a message of `wanted` bytes (0: for none), and gives back a permit that is
    /// not needed. Returns whether it was given at once.
    pub fn set_permit(
        &mut self,
        wanted: usize,
        is_used: bool,
        is_full: bool,
        outbox: &mut Outbox,
        permits: &Arc<Permits>,
    ) -> bool {
        if let Some(outgoing) = self.outgoing.as_mut().filter(|_| is_used && is_full) {
            outgoing.is_in_buffer = true;
            return false;
        }
        let is_held = self.outgoing.as_ref().is_some_and(|outgoing| outgoing.given() > 0);
        // Its message went without it, or waits behind another that needs one.
        let is_spent = is_held && !outbox.is_lent();
        if is_spent || outbox.holds_lent() && wanted > 0 {
            outbox.return_lent();
            self.outgoing = None;
        }
        if outbox.holds_lent() || is_full && wanted > 0 {
            return false;
        }
        if wanted == 0 {
            outbox.return_lent();
            self.outgoing = None;
            return false;
        }
        Outgoing::ask(&mut self.outgoing, wanted, permits);
        let given = self.outgoing.as_ref().map_or(0, |outgoing| outgoing.given());
        if given > 0 && outbox.is_lent_for(given) {
            return false;
        }
        outbox.return_lent();
        if given > 0 {
            outbox.lend(given);
        }
        given > 0
    }

    /// Handles a permit that was given, or too little progress of its packet while others wait.
    pub fn permitted(&mut self, progress: Result<(), TooSlow>, outbox: &mut Outbox) -> Result<(), End> {
        let Some(outgoing) = &self.outgoing else { return Ok(()) };
        match progress {
            Ok(()) => outbox.lend(outgoing.given()),
            Err(TooSlow) if outgoing.is_in_buffer => {
                return Err(End::Fault(Fault {
                    code: DisconnectReasonCode::QuotaExceeded,
                    what: "a large packet that it takes too slowly while others wait for its room",
                }));
            }
            // What it waits for is not its client: it asks again behind the others.
            Err(TooSlow) => {
                outbox.return_lent();
                self.outgoing = None;
            }
        }
        Ok(())
    }
}

/// Waits until deliveries can continue. Never returns if nothing is waited for. Cancel safe.
pub async fn outward(broker: &Broker, waiting: &mut Option<Box<Outward>>) -> Moved {
    let Some(waiting) = waiting else { return pending().await };
    let Outward { durable, room, loader, outgoing } = &mut **waiting;
    let permit = outgoing.as_mut().and_then(|outgoing| outgoing.permit.as_deref_mut());
    let (durable, room) = (*durable, *room);
    // Boxed: a connection that waits for nothing does not carry it.
    Box::pin(async move {
        let durable = async {
            let Some(ticket) = durable else { return pending().await };
            match broker.broker.durable().wait_for(|durable| *durable >= ticket).await {
                Ok(_) => Moved::Again,
                Err(_) => Moved::Stopped,
            }
        };
        let load = async {
            let Some(loader) = loader else { return pending().await };
            loader.loaded().await.map_or(Moved::Stopped, Moved::Loaded)
        };
        tokio::select! {
            biased;
            moved = durable => moved,
            moved = load => moved,
            progress = Permit::changed(permit) => Moved::Permitted(progress),
            () = broker.broker.writable(), if room => Moved::Again,
        }
    })
    .await
}
