//! A QoS 2 publish whose packet id finds no room ([`open_ids`]): it stays at the
//! front of what was read, and what lies behind it waits, except for the client's
//! PUBRELs, which make room.
//!
//! [`open_ids`]: crate::listeners::mqtt::open_ids

use bytes::BytesMut;

use super::{Inbound, Trouble};
use crate::listeners::mqtt::Broker;
use crate::listeners::mqtt::wire::{self, Fault, Frame};

const QOS_MASK: u8 = 0b0110;
const QOS_2: u8 = 0b0100;

impl Inbound {
    /// Whether this publish, at the front, must wait for room.
    pub(super) fn withholds(&mut self, broker: &Broker, frame: &Frame<'_>) -> Result<bool, Fault> {
        if frame.first & QOS_MASK != QOS_2 || self.session.received().has_room() {
            return Ok(false);
        }
        let packet_id = wire::publish(self.version, frame)?.packet_id;
        // One that is open already takes no more.
        self.withheld = self.session.received().get(packet_id).is_none();
        broker.counters.withheld.increment(self.withheld.into());
        Ok(self.withheld)
    }

    /// The PUBRELs behind a publish that is withheld; then there may be room for it.
    pub(super) fn release_ahead(
        &mut self,
        broker: &Broker,
        bytes: &[u8],
        out: &mut BytesMut,
    ) -> Result<(), Trouble> {
        let ((), appended) = self.gather(broker, |inbound, work| {
            while let Ok(Some(frame)) = wire::frame(&bytes[inbound.released_to..], broker.packet_bytes_max) {
                // One that is malformed is met again in its turn.
                if inbound.version.first(frame.first) == wire::PUBREL
                    && inbound.release(&frame, out, work).is_err()
                {
                    break;
                }
                inbound.released_to += frame.len;
            }
        });
        self.withheld = !self.session.received().has_room();
        appended
    }
}
