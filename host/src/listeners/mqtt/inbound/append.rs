//! Appends the messages of one read to their streams. There is one append for each stream, and its
//! acknowledgements wait for the ticket.

use rmqtt_codec::v5::DisconnectReasonCode;

use super::stalled::Stalled;
use super::{IdChange, Inbound, Owed, Scratch, Trouble, Work, recycle};
use crate::access::Identity;
use crate::ingest::{Draft, Owned, Rejected, Taken, cut_device, facts};
use crate::listeners::mqtt::Broker;
use crate::listeners::mqtt::config::Config;
use crate::listeners::mqtt::retained::{self, Staged};
use crate::listeners::mqtt::session::{Session, qos2_key};
use crate::listeners::mqtt::wire::Fault;
use crate::stream::{NewMessage, StateChange};

impl Inbound {
    /// Makes one append for each stream.
    pub(super) fn append(
        &mut self,
        broker: &Broker,
        work: &Work<'_>,
        scratch: &mut Scratch,
    ) -> Result<(), Trouble> {
        let mut result = Ok(());
        let client_id = self.session.client_id.clone();
        let own = self.rights.identity.device.clone();
        let own = own.as_deref().unwrap_or(cut_device(&client_id));
        for number in 0..broker.streams.len() {
            let decoded = || work.decoded.iter().filter(|decoded| decoded.stream == number);
            let owed = || work.owed.iter().filter(|owed| owed.stream == number);
            if decoded().next().is_none() && owed().next().is_none() {
                continue;
            }
            let mut messages: Vec<NewMessage<'_>> = std::mem::take(&mut scratch.messages);
            messages.extend(decoded().map(|decoded| {
                let topic = decoded.topic.as_str();
                let device = match &decoded.device {
                    Some(span) => &topic[span.clone()],
                    None => own,
                };
                let (payload, flags, received_us) = (decoded.payload, decoded.flags, work.now_us);
                let properties = &work.properties[decoded.properties.clone()];
                broker
                    .ingest
                    .message(number, Draft { topic, payload, properties, device, flags, received_us })
            }));
            let mut keys = std::mem::take(&mut scratch.keys);
            let mut changes = std::mem::take(&mut scratch.changes);
            let appended = self.append_one(broker, number, &messages, owed(), &mut keys, &mut changes);
            keys.clear();
            (scratch.keys, scratch.changes) = (keys, changes);
            result = result.and(appended);
            scratch.messages = recycle(messages);
        }
        result
    }

    fn append_one<'o>(
        &mut self,
        broker: &Broker,
        number: usize,
        messages: &[NewMessage<'_>],
        owed: impl DoubleEndedIterator<Item = &'o Owed> + Clone,
        keys: &mut Vec<([u8; 12], IdChange)>,
        spare: &mut Vec<StateChange<'static>>,
    ) -> Result<(), Trouble> {
        match self.try_append(broker, number, messages, owed.clone(), keys, spare) {
            Ok(()) => Ok(()),
            Err(Rejected::NoRoom { lasts }) => {
                broker.counters.stalls.increment(1);
                let mut stalled = Stalled {
                    stream: number,
                    messages: messages.iter().map(Owned::of).collect(),
                    owed: owed.copied().collect(),
                };
                if lasts {
                    stalled.drop_unacknowledged(broker, &self.session);
                }
                if !stalled.is_empty() {
                    self.stalled.push(stalled);
                    self.count_stalled();
                }
                Ok(())
            }
            Err(Rejected::TooLarge(_)) => {
                broker.counters.too_large.increment(1);
                undo(&self.session, owed);
                let code = DisconnectReasonCode::PacketTooLarge;
                Err(Fault { code, what: "a message is larger than its stream takes" }.into())
            }
            Err(Rejected::Stopped(_)) => {
                undo(&self.session, owed);
                Err(Trouble::Stopped)
            }
        }
    }

    fn try_append<'o>(
        &mut self,
        broker: &Broker,
        number: usize,
        messages: &[NewMessage<'_>],
        owed: impl Iterator<Item = &'o Owed> + Clone,
        keys: &mut Vec<([u8; 12], IdChange)>,
        spare: &mut Vec<StateChange<'static>>,
    ) -> Result<(), Rejected> {
        if let Some(epoch) = self.epoch {
            let changed = owed.clone().filter(|owed| owed.change != IdChange::None);
            keys.extend(changed.map(|owed| (qos2_key(epoch, owed.packet_id), owed.change)));
        }
        let least = owed.clone().map(|owed| owed.least).max().unwrap_or_default();
        let ticket = if messages.is_empty() && keys.is_empty() {
            least
        } else {
            let mut changes: Vec<StateChange<'_>> = std::mem::take(spare);
            changes.extend(keys.iter().map(|(key, change)| StateChange {
                key,
                value: match change {
                    IdChange::Receive { content, .. } => Some(content.bytes()),
                    IdChange::Release(_) | IdChange::None => None,
                },
            }));
            let publisher = &self.session.client_id;
            let retaining = retained::stage(broker, number, publisher, messages);
            let retained = retaining.as_ref().map_or(&[][..], Staged::changes);
            changes.extend(retained.iter().map(|(key, value)| StateChange { key, value: value.as_deref() }));
            let appended = broker.ingest.append(number, messages, &changes);
            *spare = recycle(changes);
            let appended = appended?;
            let bytes = taken_in(broker, messages);
            self.session.activity().published(messages.len(), bytes);
            if let Some(retaining) = retaining {
                retaining.done(broker, appended);
            }
            appended.ticket.max(least)
        };
        if owed.clone().any(|owed| owed.change != IdChange::None) {
            let mut received = self.session.received();
            for owed in owed.clone().filter(|owed| owed.change != IdChange::None) {
                received.appended(owed.packet_id, ticket);
            }
        }
        self.acks.queue(number, broker.ingest.stream(number), ticket, owed.filter_map(|owed| owed.ack));
        Ok(())
    }

    /// Tries again to append what a stream had no room for.
    pub fn retry(&mut self, broker: &Broker) -> Result<(), Trouble> {
        let stalled = std::mem::take(&mut self.stalled);
        let mut result = Ok(());
        for stalled in stalled {
            let owned = stalled.messages.iter();
            let messages: Vec<_> = owned.map(|owned| owned.message(&broker.ingest, stalled.stream)).collect();
            let owed = stalled.owed.iter();
            let appended =
                self.append_one(broker, stalled.stream, &messages, owed, &mut Vec::new(), &mut Vec::new());
            result = result.and(appended);
        }
        self.count_stalled();
        result
    }
}

/// Restores the previous state of each id, the last change first, because an id may have been received,
/// released and received again.
pub fn undo<'o>(session: &Session, owed: impl DoubleEndedIterator<Item = &'o Owed>) {
    let mut received = session.received();
    for owed in owed.rev() {
        match owed.change {
            IdChange::None => {}
            IdChange::Receive { before, .. } => received.put_back(owed.packet_id, before),
            IdChange::Release(before) => received.put_back(owed.packet_id, Some(before)),
        }
    }
}

/// Appends the facts about the client to the properties of a message. The client id is left out if the
/// topic names the device and the client id is not requested.
#[inline]
pub fn push_sender(
    out: &mut Vec<u8>,
    (broker, config): (&Broker, &Config),
    client_id: &str,
    topic_names_device: bool,
    identity: &Identity,
) {
    let says_id = !topic_names_device || config.keep_client_id || broker.live.wants_publisher();
    facts::push_sender(out, says_id.then_some(client_id), identity);
}

/// Counts messages that a stream accepted. Returns the bytes of their payloads.
pub fn taken_in(broker: &Broker, messages: &[NewMessage<'_>]) -> u64 {
    let Taken { by_qos, bytes, outside_namespace } = Taken::of(messages);
    for (counter, count) in broker.counters.publishes.iter().zip(by_qos).filter(|(_, count)| *count > 0) {
        counter.increment(count);
    }
    broker.counters.publish_bytes.increment(bytes);
    if outside_namespace > 0 {
        broker.counters.outside_namespace.increment(outside_namespace);
    }
    bytes
}
