//! Acknowledgements and PINGREQ packets of the client that are processed although the packet at the
//! front waits. They do not depend on earlier packets. If acknowledgements waited too, deliveries would
//! stop when the client's window is used up, and messages that it has acknowledged would be sent again
//! on its next connection.

use bytes::BytesMut;

use super::Inbound;
use crate::listeners::mqtt::outbound::Acked;
use crate::listeners::mqtt::wire::{self, Fault, Frame};

/// Offset from the front up to which the input was searched. The packets before it are skipped when it
/// is their turn.
#[derive(Default)]
pub struct Ahead {
    acks: usize,
    pings: usize,
}

impl Ahead {
    /// Records that `len` bytes were removed from the front.
    pub fn passed(&mut self, len: usize) {
        self.acks = self.acks.saturating_sub(len);
        self.pings = self.pings.saturating_sub(len);
    }

    pub fn has_ack(&self, at: usize) -> bool {
        at < self.acks
    }

    pub fn has_ping(&self, at: usize) -> bool {
        at < self.pings
    }
}

impl Inbound {
    /// Processes the client's acknowledgements in the whole input while its first packet waits.
    pub(super) fn take_acks_ahead(&mut self, bytes: &[u8], out: &mut BytesMut) {
        while let Ok(Some(frame)) = wire::frame(&bytes[self.ahead.acks..], self.config.packet_bytes_max()) {
            match self.version.first(frame.first) {
                wire::DISCONNECT => return,
                // One that is malformed is met again in its turn.
                first @ (wire::PUBACK | wire::PUBREC | wire::PUBCOMP)
                    if self.acked(Frame { first, ..frame }, out).is_err() =>
                {
                    return;
                }
                _ => self.ahead.acks += frame.len,
            }
        }
    }

    /// Handles an acknowledgement of a delivery.
    pub(super) fn acked(&self, frame: Frame<'_>, out: &mut BytesMut) -> Result<(), Fault> {
        let (packet_id, code) = wire::ack(self.version, &frame)?;
        match self.session.outbox().acked(frame.first, packet_id, code) {
            Acked::Release => wire::put_ack(out, wire::PUBREL, packet_id),
            // Its session ended: with a PUBREL the client can end the exchange too (4.3.3).
            Acked::Unknown => {
                wire::put_ack_with(out, self.version, wire::PUBREL, packet_id, wire::NOT_FOUND);
            }
            Acked::Nothing => {}
        }
        Ok(())
    }

    pub(super) fn answer_pings(&mut self, bytes: &[u8], out: &mut BytesMut) {
        while let Ok(Some(frame)) = wire::frame(&bytes[self.ahead.pings..], self.config.packet_bytes_max()) {
            if frame.first == wire::PINGREQ {
                wire::put_pingresp(out);
            }
            self.ahead.pings += frame.len;
        }
    }
}
