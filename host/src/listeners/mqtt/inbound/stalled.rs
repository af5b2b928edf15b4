//! Messages for which a stream had no room, kept until it has.

use std::future::{pending, ready};
use std::pin::Pin;

use futures_util::future::select_all;

use super::Owed;
use super::withheld::Withheld;
use crate::batch::flags;
use crate::hints::Hint;
use crate::ingest::Owned;
use crate::listeners::mqtt::Broker;
use crate::listeners::mqtt::open_ids::Received;
use crate::listeners::mqtt::session::Session;

pub struct Stalled {
    pub stream: usize,
    pub messages: Vec<Owned>,
    pub owed: Vec<Owed>,
}

impl Stalled {
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty() && self.owed.is_empty()
    }

    fn has_unacknowledged(&self) -> bool {
        self.messages.iter().any(|message| message.flags & flags::QOS_MASK == 0)
    }

    /// Returns the number of bytes of memory that the messages take.
    pub fn bytes(&self) -> usize {
        self.messages.iter().map(Owned::bytes).sum::<usize>() + size_of_val(&*self.owed)
    }

    /// Drops, counts and reports the QoS 0 messages of a session. The others wait for room.
    pub fn drop_unacknowledged(&mut self, broker: &Broker, session: &Session) {
        let before = self.messages.len();
        self.messages.retain(|message| message.flags & flags::QOS_MASK != 0);
        let dropped = (before - self.messages.len()) as u64;
        if dropped > 0 {
            broker.counters.no_space.increment(dropped);
            session.activity().no_space(dropped);
            let (client_id, stream) = (&*session.client_id, broker.streams[self.stream].name());
            let kind = format!("mqtt: QoS 0 messages dropped: stream {stream} has no room");
            let detail = format!("client {client_id}: it would get no ack to wait for; QoS 1 and 2 wait");
            broker.failures.report_by(
                &kind,
                client_id,
                dropped,
                &detail,
                &broker.failures.hint(Hint::Status),
            );
        }
    }
}

/// Waits until there may be room for the stalled messages, until QoS 0 messages among them must be
/// dropped, or until the withheld publish may be checked again. Never returns if there is neither.
pub fn room<'a>(
    stalled: &[Stalled],
    withheld: Withheld,
    session: &Session,
    broker: &'a Broker,
) -> impl Future<Output = ()> + use<'a> {
    let mut waits: Vec<Pin<Box<dyn Future<Output = ()> + Send + 'a>>> = Vec::new();
    for stalled in stalled {
        let stream = &broker.streams[stalled.stream];
        waits.push(stream.writable());
        // They wait for a full buffer, and not for a stream without room: what found
        // the one may meet the other.
        if stalled.has_unacknowledged() {
            waits.push(stream.out_of_space());
        }
    }
    match withheld {
        Withheld::Nothing => {}
        Withheld::Room => waits.push(Box::pin(broker.sessions.open_ids.freed())),
        Withheld::Release(packet_id) => {
            let releasing = session.received().releasing(packet_id);
            match releasing {
                None => waits.push(Box::pin(ready(()))),
                Some(Received { stream, ticket: Some(ticket), .. }) => waits.push(Box::pin(async move {
                    // A stream that stopped is met by the next look.
                    let _ = broker.streams[stream].durable().wait_for(|durable| *durable >= ticket).await;
                })),
                // Its append is one of those that stalled.
                Some(Received { ticket: None, .. }) => {}
            }
        }
    }
    // Boxed: a connection that waits for nothing does not carry it.
    let any = (!waits.is_empty()).then(|| Box::new(select_all(waits)));
    async {
        match any {
            Some(any) => drop(any.await),
            None => pending().await,
        }
    }
}
