//! A sink on its road: what delivers to it from one stream, then from the next.

use std::sync::atomic::Ordering;

use tokio::sync::mpsc;
use uuid::Uuid;

use super::answering::Shown;
use super::claim::FirstStart;
use super::delivery::{Delivery, End, Event, Lend};
use super::road::{Leg, Road};
use crate::batch::Offset;
use crate::sinks::{Name, Sink};
use crate::stream::BeginNow;

/// Stands for the position of a sink in a stream that it has left for good.
const LEFT: u64 = u64::MAX - 1;

pub struct Traveller {
    pub road: Road,
    pub id: String,
    pub pipeline: String,
    pub sink: Box<dyn Sink>,
    pub shown: Shown,
    pub lends: mpsc::Receiver<Lend>,
    pub at_source: Delivery,
    /// Delivers from the out stream; `None` if the pipeline has none.
    pub at_out: Option<Delivery>,
    pub out: Uuid,
    /// Names of the sink's claim in the out stream, and that stream's log.
    pub in_out: Option<(Vec<Name>, Uuid)>,
    /// An earlier process delivered from the out stream.
    pub has_begun: bool,
    /// In an earlier process it left the source for good: that is looked at once more only because its database
    /// may be an older one.
    pub begins_at_out: bool,
}

impl Traveller {
    /// Delivers leg by leg, until the process ends or the sink stops.
    pub async fn run(mut self) {
        let (mut sink, mut lends) = (self.sink, self.lends);
        let legs = std::mem::take(&mut self.road.legs);
        for (place, leg) in legs.iter().enumerate() {
            let delivery = match (leg, &mut self.at_out) {
                (Leg::Source { from, until, is_guess }, _) => {
                    let delivery = &mut self.at_source;
                    (delivery.floor, delivery.until) = (from.clone(), until.clone());
                    delivery.next = self.in_out.clone().filter(|_| *is_guess);
                    delivery.writer.letters.set_until_of(delivery.number, until.clone());
                    delivery
                }
                (Leg::Out { log, from, until }, Some(delivery)) if *log == self.out => {
                    let partitions = usize::from(delivery.writer.claim.partitions);
                    let until = until.map(|until| vec![until; partitions]);
                    // What others got while the sink read the source, or was not there, it has from there.
                    let was_back = place.checked_sub(1).is_some_and(
                        |before| matches!(&legs[before], Leg::Source { from, .. } if !from.is_empty()),
                    );
                    delivery.floor = if was_back { vec![*from; partitions] } else { Vec::new() };
                    delivery.writer.letters.set_until_of(delivery.number, until.clone());
                    delivery.until = until;
                    // A claim that is new begins where the sink left the source. Where one was there before and
                    // is gone, a person is asked, as anywhere; not where the database is from before that.
                    if !self.has_begun || self.at_source.writer.has_found {
                        begin_at(delivery, *from);
                    }
                    delivery
                }
                (Leg::Out { log, .. }, _) => {
                    tracing::error!(
                        pipeline = self.pipeline,
                        sink = self.id,
                        %log,
                        "the stream that the sink read before is gone, and with it what the sink had not got of it"
                    );
                    continue;
                }
            };
            self.shown.set(&delivery.shared);
            let is_a_look = self.begins_at_out && place + 1 < legs.len();
            if let Some((place, own)) = delivery.shows.as_ref().filter(|_| !is_a_look) {
                place.store(*own, Ordering::Release);
            }
            delivery.writer.sink = Some(sink);
            delivery.lends = Some(lends);
            if delivery.run().await == End::Ended {
                let number = delivery.number;
                let others = std::iter::once(&self.at_source).chain(&self.at_out);
                let others: Vec<_> = others.map(|delivery| delivery.events.clone()).collect();
                drop(self.at_source);
                drop(self.at_out);
                for events in others {
                    drop(events.send(Event::Ended { sink: number, stopped: None }).await);
                }
                return;
            }
            // What the next leg of this stream needs stays.
            match legs[place + 1..].iter().find_map(|other| other.begin(leg)) {
                Some(next) => delivery.attachment.advance(next),
                None => {
                    delivery.attachment.detach();
                    delivery.shared.committed.store(LEFT, Ordering::Release);
                }
            }
            sink = delivery.writer.sink.take().expect("a lent sink is back before a delivery ends");
            lends = delivery.lends.take().unwrap_or_else(|| mpsc::channel(1).1);
        }
    }
}

/// Lets a claim without positions begin there.
pub fn begin_at(delivery: &mut Delivery, from: Offset) {
    if let Some(beginning) = &mut delivery.writer.beginning {
        beginning.begin = Some(FirstStart::Now(BeginNow::At(from)));
    }
    if let Some(waiting) = &mut delivery.writer.waiting {
        waiting.from = waiting.from.max(from);
    }
    delivery.shared.remembered.fetch_max(from.0, Ordering::AcqRel);
}
