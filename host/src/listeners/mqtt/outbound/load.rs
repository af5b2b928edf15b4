//! Reads messages that wait in their streams, when it is their turn.

use std::collections::{BTreeMap, HashMap};
use std::future::poll_fn;
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::PollSemaphore;

use super::{Message, Place};
use crate::listeners::mqtt::copies::{Copies, CopyPicks};
use crate::listeners::mqtt::picks::Picks;
use crate::stream::Stream;

/// Subscribers that are read for at a time: each holds up to 2 MiB meanwhile,
/// and takes a thread from those that serve connections.
pub const LOADS_MAX: usize = 4;

/// What was asked for; `None`: it is no more, trimmed or damaged.
pub type Loaded = HashMap<Place, Option<Arc<Message>>>;

pub struct Loader {
    /// Not looked for yet.
    places: Vec<Place>,
    streams: BTreeMap<u16, Picks>,
    copies: CopyPicks,
    found: Loaded,
    turn: PollSemaphore,
    /// Of `LOADS_MAX`.
    permit: Option<OwnedSemaphorePermit>,
}

impl Loader {
    pub fn new(wanted: impl IntoIterator<Item = Place>, loads: &Arc<Semaphore>) -> Self {
        Self {
            places: wanted.into_iter().collect(),
            streams: BTreeMap::new(),
            copies: CopyPicks::default(),
            found: HashMap::new(),
            turn: PollSemaphore::new(loads.clone()),
            permit: None,
        }
    }

    /// Safe to drop and to call again. The reason where a stream has stopped.
    pub async fn run(&mut self, streams: &[Arc<dyn Stream>], copies: &Copies) -> Result<Loaded, Arc<str>> {
        if self.permit.is_none() {
            // Keeps its place in the row where this is dropped.
            self.permit = poll_fn(|cx| self.turn.poll_acquire(cx)).await;
        }
        for place in self.places.drain(..) {
            if !self.copies.add(copies, place) {
                self.streams.entry(place.stream).or_default().add(place.offset);
            }
        }
        while let Some(mut entry) = self.streams.first_entry() {
            let stream = *entry.key();
            let Some(picked) = entry.get_mut().next(&*streams[usize::from(stream)]).await? else {
                entry.remove();
                continue;
            };
            for offset in picked.gone {
                let place = Place { stream, offset };
                // Retention may have taken it just now.
                if !self.copies.add(copies, place) {
                    self.found.insert(place, None);
                }
            }
            let (batch, at) = picked.found.unzip();
            for message in at.iter().flatten().zip(&batch).map(|(at, batch)| batch.message(*at)) {
                let place = Place { stream, offset: message.offset().0 };
                self.found.insert(place, Some(Arc::new(Message::of(message))));
            }
        }
        while let Some(found) = self.copies.next(copies).await? {
            for (place, copy) in found {
                let message = copy.map(|(batch, at)| Arc::new(Message::of(batch.message(at))));
                self.found.insert(place, message);
            }
        }
        self.permit = None;
        Ok(std::mem::take(&mut self.found))
    }
}
