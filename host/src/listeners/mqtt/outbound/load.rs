//! Reads messages that wait in their streams, when it is their turn.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use tokio::task::yield_now;
use tokio_util::task::AbortOnDropHandle;

use super::{Message, Place};
use crate::listeners::mqtt::Broker;
use crate::listeners::mqtt::copies::CopyPicks;
use crate::listeners::mqtt::picks::Picks;
use crate::threads::{SHORT_TURN, in_turns};

/// Subscribers that are read for at a time: each holds up to 2 MiB meanwhile,
/// and takes a thread from those that serve connections.
pub const LOADS_MAX: usize = 4;

/// What was asked for; `None`: it is no more, trimmed or damaged.
pub type Loaded = HashMap<Place, Option<Arc<Message>>>;

/// One read, on a task of its own: a connection that is at something else meanwhile
/// keeps no turn from the others.
pub struct Loader(AbortOnDropHandle<Result<Loaded, Arc<str>>>);

impl Loader {
    pub fn new(wanted: Vec<Place>, broker: &Arc<Broker>) -> Self {
        Self(AbortOnDropHandle::new(
            broker.background.spawn(in_turns(SHORT_TURN, load(wanted, broker.clone()))),
        ))
    }

    /// Safe to drop and to call again. The reason where a stream has stopped.
    pub async fn loaded(&mut self) -> Result<Loaded, Arc<str>> {
        (&mut self.0).await.unwrap_or_else(|_| Err("the host ends".into()))
    }
}

async fn load(wanted: Vec<Place>, broker: Arc<Broker>) -> Result<Loaded, Arc<str>> {
    let _turn = broker.loads.acquire().await.expect("the semaphore is never closed");
    let copies = &broker.copies;
    let (mut streams, mut copied) = (BTreeMap::<u16, Picks>::new(), CopyPicks::default());
    let mut loaded = Loaded::new();
    for place in wanted {
        if !copied.add(copies, place) {
            streams.entry(place.stream).or_default().add(place.offset);
        }
    }
    for (stream, mut picks) in streams {
        while let Some(picked) = picks.next(&*broker.streams[usize::from(stream)]).await? {
            // A batch is some 100 µs; connections come first.
            yield_now().await;
            for offset in picked.gone {
                let place = Place { stream, offset };
                // Retention may have taken it just now.
                if !copied.add(copies, place) {
                    loaded.insert(place, None);
                }
            }
            if let Some((batch, found)) = picked.found {
                for message in found.into_iter().map(|at| batch.message(at)) {
                    let place = Place { stream, offset: message.offset().0 };
                    loaded.insert(place, Some(Arc::new(Message::of(message))));
                }
            }
        }
    }
    while let Some(found) = copied.next(copies).await? {
        for (place, copy) in found {
            let message = copy.map(|(batch, at)| Arc::new(Message::of(batch.message(at))));
            loaded.insert(place, message);
        }
    }
    Ok(loaded)
}
