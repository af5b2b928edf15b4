//! A QoS 2 publish that cannot be accepted yet. It stays at the front of the input, and all later
//! packets wait. There are two reasons. If there is no room for its packet id ([`open_ids`]), later
//! PUBRELs of the client are processed, because they make room. If another stream has a record of the
//! id, the publish waits until the removal of that record is durable, so that no id has two records
//! after a restart.
//!
//! [`open_ids`]: crate::listeners::mqtt::open_ids

use bytes::BytesMut;

use super::{IdChange, Inbound, Owed, Trouble, Work};
use crate::listeners::mqtt::Broker;
use crate::listeners::mqtt::open_ids::{Known, Received};
use crate::listeners::mqtt::wire::{self, Fault, Frame};

/// What the publish at the front waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Withheld {
    Nothing,
    /// Room for its packet id.
    Room,
    /// The durable release of its own packet id.
    Release(u16),
}

const QOS_MASK: u8 = 0b0110;
const QOS_2: u8 = 0b0100;

impl Inbound {
    /// Returns whether this publish, at the front, must wait for room.
    pub(super) fn withholds(&mut self, broker: &Broker, frame: &Frame<'_>) -> Result<bool, Fault> {
        if frame.first & QOS_MASK != QOS_2 || self.session.received().has_room() {
            return Ok(false);
        }
        let packet_id = wire::publish(self.version, frame)?.packet_id;
        // One that is open already takes no more.
        let waits = self.session.received().get(packet_id).is_none();
        if waits {
            self.withheld = Withheld::Room;
            broker.counters.withheld.increment(1);
        }
        Ok(waits)
    }

    /// Removes the record of an open packet id from its stream, because another message, which goes to
    /// another stream, takes the id. The removal has no acknowledgement.
    pub(super) fn give_up(&mut self, packet_id: u16, known: Received, work: &mut Work<'_>) {
        self.session.received().release(packet_id);
        // Its PUBCOMP will never be written.
        self.unfinished = self.unfinished.saturating_sub(1);
        let change = IdChange::Release(Known::Open(known));
        work.owed.push(Owed { stream: known.stream, packet_id, ack: None, change, least: known.least() });
        self.withheld = Withheld::Release(packet_id);
    }

    /// Returns whether the release of a packet id is durable.
    pub(super) fn is_released(&self, broker: &Broker, packet_id: u16) -> Result<bool, Trouble> {
        let Some(releasing) = self.session.received().releasing(packet_id) else { return Ok(true) };
        let durable = broker.streams[releasing.stream].durable();
        if releasing.is_durable(*durable.borrow()) {
            return Ok(true);
        }
        durable.has_changed().map(|_| false).map_err(|_| Trouble::Stopped)
    }

    /// Processes the PUBRELs behind a withheld publish, which may make room for it.
    pub(super) fn release_ahead(
        &mut self,
        broker: &Broker,
        bytes: &[u8],
        out: &mut BytesMut,
    ) -> Result<(), Trouble> {
        let ((), appended) = self.gather(broker, |inbound, work| {
            while let Ok(Some(frame)) =
                wire::frame(&bytes[inbound.released_to..], inbound.config.packet_bytes_max())
            {
                // One that is malformed is met again in its turn.
                if inbound.version.first(frame.first) == wire::PUBREL
                    && inbound.release(&frame, out, work).is_err()
                {
                    break;
                }
                inbound.released_to += frame.len;
            }
        });
        if self.session.received().has_room() {
            self.withheld = Withheld::Nothing;
        }
        appended
    }
}
