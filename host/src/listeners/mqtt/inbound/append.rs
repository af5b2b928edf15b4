//! What one read brought goes into its streams: one append for each, whose
//! ticket the acks wait for.

use rmqtt_codec::v5::DisconnectReasonCode;

use super::stalled::{Owned, Stalled};
use super::{IdChange, Inbound, Owed, Scratch, Trouble, Work, cut_device, recycle};
use crate::access::Identity;
use crate::batch::flags;
use crate::listeners::mqtt::Broker;
use crate::listeners::mqtt::retained::{self, Staged};
use crate::listeners::mqtt::session::{Session, qos2_key};
use crate::listeners::mqtt::wire::Fault;
use crate::properties::{self, Origin};
use crate::stream::{AppendError, NewMessage, StateChange, partition_of};

impl Inbound {
    /// One append per stream.
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
            let partitions = broker.streams[number].identity().partitions;
            let mut messages: Vec<NewMessage<'_>> = std::mem::take(&mut scratch.messages);
            messages.extend(decoded().map(|decoded| {
                let topic = decoded.topic.as_str();
                let device = match &decoded.device {
                    Some(span) => &topic[span.clone()],
                    None => own,
                };
                NewMessage {
                    topic,
                    payload: decoded.payload,
                    properties: &work.properties[decoded.properties.clone()],
                    route: "",
                    device,
                    partition: partition_of(device, partitions),
                    flags: decoded.flags,
                    received_us: work.now_us,
                    event_us: 0,
                }
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
            Err(error @ (AppendError::Full | AppendError::NoSpace)) => {
                broker.counters.stalls.increment(1);
                let mut stalled = Stalled {
                    stream: number,
                    messages: messages.iter().map(Owned::of).collect(),
                    owed: owed.copied().collect(),
                };
                if error == AppendError::NoSpace {
                    stalled.drop_unacknowledged(broker, &self.session);
                }
                if !stalled.is_empty() {
                    self.stalled.push(stalled);
                    self.count_stalled();
                }
                Ok(())
            }
            Err(AppendError::TooLarge(_)) => {
                broker.counters.too_large.increment(1);
                undo(&self.session, owed);
                let code = DisconnectReasonCode::PacketTooLarge;
                Err(Fault { code, what: "a message is larger than its stream takes" }.into())
            }
            Err(AppendError::Stopped(_)) => {
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
    ) -> Result<(), AppendError> {
        let stream = &*broker.streams[number];
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
            let retaining = retained::stage(broker, number, messages);
            let retained = retaining.as_ref().map_or(&[][..], Staged::changes);
            changes.extend(retained.iter().map(|(key, value)| StateChange { key, value: value.as_deref() }));
            let appended = stream.append(messages, &changes);
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
        self.acks.queue(number, stream, ticket, owed.filter_map(|owed| owed.ack));
        Ok(())
    }

    /// Offers again what a stream had no room for.
    pub fn retry(&mut self, broker: &Broker) -> Result<(), Trouble> {
        let stalled = std::mem::take(&mut self.stalled);
        let mut result = Ok(());
        for stalled in stalled {
            let messages: Vec<_> = {
                let partitions = broker.streams[stalled.stream].identity().partitions;
                stalled.messages.iter().map(|owned| owned.message(partitions)).collect()
            };
            let owed = stalled.owed.iter();
            let appended =
                self.append_one(broker, stalled.stream, &messages, owed, &mut Vec::new(), &mut Vec::new());
            result = result.and(appended);
        }
        self.count_stalled();
        result
    }
}

/// Puts back what was known of each id, the last change first: an id may have been received,
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

/// What the listener says of the client with each of its messages.
#[inline]
pub fn push_sender(
    out: &mut Vec<u8>,
    broker: &Broker,
    client_id: &str,
    topic_names_device: bool,
    identity: &Identity,
) {
    if !topic_names_device || broker.config.keep_client_id || broker.live.wants_publisher() {
        properties::push(out, Origin::Listener, "client-id", client_id.as_bytes());
    }
    if let Some(username) = &identity.name {
        properties::push(out, Origin::Listener, "username", username.as_bytes());
    }
    out.extend_from_slice(&identity.attributes);
}

/// Counts what a stream took. Returns the bytes of the payloads.
pub fn taken_in(broker: &Broker, messages: &[NewMessage<'_>]) -> u64 {
    let (mut by_qos, mut bytes, mut outside) = ([0u64; 3], 0, 0);
    for message in messages {
        outside += u64::from(message.flags & flags::FITS_NAMESPACE == 0);
        by_qos[usize::from(message.flags & flags::QOS_MASK).min(2)] += 1;
        bytes += message.payload.len() as u64;
    }
    for (counter, count) in broker.counters.publishes.iter().zip(by_qos).filter(|(_, count)| *count > 0) {
        counter.increment(count);
    }
    broker.counters.publish_bytes.increment(bytes);
    if outside > 0 {
        broker.counters.outside_namespace.increment(outside);
    }
    bytes
}
