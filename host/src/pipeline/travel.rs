//! A sink on its road: what delivers to it from one stream, then from the next.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::mpsc;
use uuid::Uuid;

use super::answering::Shown;
use super::claim::FirstStart;
use super::delivery::{Delivery, End, Event, Lend};
use super::letter::Names;
use super::road::{self, Leg, Road};
use crate::batch::Offset;
use crate::sinks::Sink;
use crate::stream::{BeginNow, Identity, Stream};

pub struct Traveller {
    pub road: Road,
    /// Names the sink in the record of its road.
    pub id: String,
    pub names: Names,
    pub source: Identity,
    pub dead_letters: Arc<dyn Stream>,
    pub sink: Box<dyn Sink>,
    pub shown: Shown,
    pub lends: mpsc::Receiver<Lend>,
    pub at_source: Delivery,
    /// From the out stream, where the pipeline has one.
    pub at_out: Option<Delivery>,
    pub out: Uuid,
    /// An earlier process delivered from the out stream.
    pub has_begun: bool,
    /// And it has left the source for good: that is looked at once more only because its database may be an
    /// older one.
    pub begins_at_out: bool,
}

impl Traveller {
    /// Delivers leg by leg, until the process ends or the sink stops.
    pub async fn run(mut self) {
        let (mut sink, mut lends) = (self.sink, self.lends);
        let (mut was_behind, mut forgotten) = (false, 0);
        let legs = std::mem::take(&mut self.road.legs);
        for (place, leg) in legs.iter().enumerate() {
            let delivery = match (leg, &mut self.at_out) {
                (Leg::Source { from, until }, _) => {
                    let delivery = &mut self.at_source;
                    (delivery.floor, delivery.until) = (from.clone(), until.clone());
                    // A sink that was in the out stream before has positions there.
                    delivery.next.take_if(|_| !from.is_empty());
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
                    // A claim that is new begins where the sink left the source. Where one was there before
                    // and is gone, a person is asked, as anywhere.
                    if was_behind || !self.has_begun {
                        begin_at(delivery, *from);
                    }
                    delivery
                }
                (Leg::Out { log, .. }, _) => {
                    tracing::error!(
                        pipeline = self.names.pipeline(),
                        sink = self.id,
                        %log,
                        "the stream that the sink read before is gone, and with it what the sink had not got of it"
                    );
                    continue;
                }
            };
            self.shown.set(&delivery.shared);
            let is_a_look = self.begins_at_out && place == 0;
            if let Some((place, own)) = delivery.shows.as_ref().filter(|_| !is_a_look) {
                place.store(*own, Ordering::Release);
            }
            delivery.was_behind = false;
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
            was_behind |= delivery.was_behind;
            delivery.attachment.detach();
            sink = delivery.writer.sink.take().expect("a lent sink is back before a delivery ends");
            lends = delivery.lends.take().unwrap_or_else(|| mpsc::channel(1).1);
            if matches!(leg, Leg::Out { .. }) {
                let left = place + 1 - forgotten;
                road::forget_legs(&*self.dead_letters, &self.names, self.source, &self.id, left);
                forgotten += left;
            }
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
