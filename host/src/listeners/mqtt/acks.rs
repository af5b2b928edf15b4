//! Acknowledgements that wait until their stream is durable.
//!
//! There is one lane for each stream: acknowledgements are sent in order for each connection and stream,
//! and a stalled stream delays only its own. A group is the acknowledgements of one append. A whole
//! group, often all that are waiting, is sent in one write.

use std::collections::VecDeque;
use std::future::{Future, pending};
use std::pin::Pin;

use bytes::BytesMut;
use futures_util::future::select_all;
use tokio::sync::watch;

use super::wire::{self, Version};
use crate::stream::{Stream, Ticket};

/// First byte and packet id of an acknowledgement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ack {
    pub first: u8,
    pub packet_id: u16,
    /// MQTT 5 reason code for a refused publish, or for an id that was already released; 0 for an
    /// accepted publish, and in versions without reason codes.
    pub code: u8,
}

/// Returns the reason string for a refused publish.
fn reason(code: u8) -> &'static str {
    match code {
        wire::NOT_AUTHORIZED => "publishing to this topic is not allowed",
        wire::TOPIC_NAME_INVALID => "the topic has more levels than are allowed",
        _ => "",
    }
}

/// The stream stopped. These acknowledgements will never be sent.
#[derive(Debug, PartialEq, Eq)]
pub struct Stopped;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    pub acks: u32,
    /// Number of acknowledgements that complete a publish: PUBACK and PUBCOMP.
    pub finished: u32,
}

/// Acknowledgements that a connection still owes its client, at most `receive_maximum` or
/// `inflight_max`.
pub struct Acks {
    lanes: Vec<Lane>,
    waiting: usize,
    tells_reasons: bool,
}

struct Lane {
    durable: watch::Receiver<Ticket>,
    /// Tickets, and how many of `acks` each is for.
    groups: VecDeque<(Ticket, u32)>,
    acks: VecDeque<Ack>,
    stream: usize,
}

impl Acks {
    /// Creates an empty queue. `tells_reasons` says whether refusals have a reason string.
    pub fn new(tells_reasons: bool) -> Self {
        Self { lanes: Vec::new(), waiting: 0, tells_reasons }
    }

    /// Returns the number of waiting acknowledgements.
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    /// Queues `acks`, to be sent once `ticket` is durable in the stream with index `stream`.
    pub fn queue(
        &mut self,
        number: usize,
        stream: &dyn Stream,
        ticket: Ticket,
        acks: impl Iterator<Item = Ack>,
    ) {
        let lane = match self.lanes.iter().position(|lane| lane.stream == number) {
            Some(i) => &mut self.lanes[i],
            None => {
                self.lanes.push(Lane {
                    durable: stream.durable(),
                    groups: VecDeque::new(),
                    acks: VecDeque::new(),
                    stream: number,
                });
                self.lanes.last_mut().expect("it was just pushed")
            }
        };
        let before = lane.acks.len();
        lane.acks.extend(acks);
        let count = lane.acks.len() - before;
        if count > 0 {
            lane.groups.push_back((ticket, count as u32));
            self.waiting += count;
        }
    }

    /// Writes the acknowledgements whose tickets are durable, and passes each of them to `wrote`, with
    /// its stream and the ticket that is durable there.
    pub fn write_durable(
        &mut self,
        out: &mut BytesMut,
        mut wrote: impl FnMut(Ack, usize, Ticket),
    ) -> Written {
        let mut written = Written::default();
        if self.waiting == 0 {
            return written;
        }
        for lane in &mut self.lanes {
            if lane.groups.is_empty() {
                continue;
            }
            let durable = *lane.durable.borrow_and_update();
            while let Some(&(ticket, count)) = lane.groups.front()
                && ticket <= durable
            {
                lane.groups.pop_front();
                out.reserve(4 * count as usize);
                for ack in lane.acks.drain(..count as usize) {
                    wrote(ack, lane.stream, durable);
                    if ack.code == 0 {
                        wire::put_ack(out, ack.first, ack.packet_id);
                        written.finished += u32::from(ack.first != wire::PUBREC);
                    } else if self.tells_reasons && !reason(ack.code).is_empty() {
                        let [high, low] = ack.packet_id.to_be_bytes();
                        wire::put_with_reason(out, ack.first, &[high, low, ack.code], reason(ack.code));
                    } else {
                        wire::put_ack_with(out, Version::V5, ack.first, ack.packet_id, ack.code);
                    }
                }
                written.acks += count;
            }
        }
        self.waiting -= written.acks as usize;
        written
    }

    /// Waits until a stream with pending acknowledgements has made progress. Never returns if there are
    /// none. Cancel safe.
    pub async fn moved(&mut self) -> Result<(), Stopped> {
        let mut holding = self.lanes.iter_mut().filter(|lane| !lane.groups.is_empty());
        let moved = match (holding.next(), holding.next()) {
            (None, _) => pending().await,
            (Some(lane), None) => lane.durable.changed().await,
            (Some(one), Some(two)) => {
                type Change<'a> =
                    Pin<Box<dyn Future<Output = Result<(), watch::error::RecvError>> + Send + 'a>>;
                let lanes = [one, two].into_iter().chain(holding);
                let changes: Vec<Change<'_>> =
                    lanes.map(|lane| Box::pin(lane.durable.changed()) as Change<'_>).collect();
                select_all(changes).await.0
            }
        };
        moved.map_err(|_| Stopped)
    }
}
