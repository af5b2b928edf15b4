//! Reads queued messages from their streams when it is their turn.

use std::collections::{BTreeMap, HashMap};
use std::mem::take;
use std::sync::Arc;

use tokio::task::yield_now;
use tokio_util::task::AbortOnDropHandle;

use super::{Ids, Message, Place, RetainedPage, Waits};
use crate::batch::MessageRef;
use crate::listeners::mqtt::Broker;
use crate::listeners::mqtt::copies::CopyPicks;
use crate::listeners::mqtt::picks::Picks;
use crate::listeners::mqtt::session::Session;
use crate::properties::{self, Origin, facts};
use crate::threads::{SHORT_TURN, in_turns};

/// Number of subscribers for which streams are read at a time. Each read holds up to 2 MiB, and uses a
/// thread of those that serve connections.
pub const LOADS_MAX: usize = 4;

/// Number of retained topics that are examined while publishers of retained messages wait, and number of
/// such turns in one read. The next read continues.
const LOOKED_AT_ONCE: usize = 128;
const LOOKS_MAX: usize = 128;

/// The requested messages.
#[derive(Default)]
pub struct Loaded {
    /// The messages by place; `None` for one that was removed or damaged.
    pub messages: HashMap<Place, Option<Body>>,
    pub page: Option<RetainedPage>,
}

/// A message of a stream, with the identifiers of the session's subscriptions that match it.
pub struct Body {
    pub message: Arc<Message>,
    pub ids: Ids,
}

impl Body {
    fn of(message: MessageRef<'_>, session: &Session) -> Self {
        let publisher = properties::get(message.properties(), Origin::Listener, facts::CLIENT_ID);
        let ids = session.subscription_ids(message.topic(), publisher);
        Self { message: Arc::new(Message::of(message)), ids }
    }
}

/// A running read, on a task of its own, so that a connection that does something else meanwhile does
/// not keep the turn of others.
pub struct Loader(AbortOnDropHandle<Result<Loaded, Arc<str>>>);

impl Loader {
    pub fn new(waits: &mut Waits, broker: &Arc<Broker>, session: &Arc<Session>) -> Self {
        let load = load(take(&mut waits.load), waits.page.take(), broker.clone(), session.clone());
        Self(AbortOnDropHandle::new(broker.background.spawn(in_turns(SHORT_TURN, load))))
    }

    /// Returns the messages, or the reason if a stream has stopped. Cancel safe, and can be called
    /// again.
    pub async fn loaded(&mut self) -> Result<Loaded, Arc<str>> {
        (&mut self.0).await.unwrap_or_else(|_| Err("the host ends".into()))
    }
}

/// Looks up the retained messages for the subscriptions after number `behind` (see
/// [`Outbox::last_retained`](super::Outbox::last_retained)), as long as they are few. The rest waits
/// until the client takes it. No other read of these messages is running.
pub async fn look_up(broker: &Broker, session: &Session, mut behind: u64) {
    loop {
        let Some(mut page) = session.outbox().first_page(behind) else { return };
        behind = page.number();
        page.look(&broker.retained(), &session.client_id, &broker.clock, LOOKED_AT_ONCE);
        session.outbox().retained_found(page, &broker.retained());
        yield_now().await;
    }
}

async fn load(
    wanted: Vec<Place>,
    page: Option<RetainedPage>,
    broker: Arc<Broker>,
    session: Arc<Session>,
) -> Result<Loaded, Arc<str>> {
    let _turn = broker.loads.acquire().await.expect("the semaphore is never closed");
    let copies = &broker.copies;
    let (mut streams, mut copied) = (BTreeMap::<u16, Picks>::new(), CopyPicks::default());
    let mut loaded = Loaded { page, ..Loaded::default() };
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
                    loaded.messages.insert(place, None);
                }
            }
            if let Some((batch, found)) = picked.found {
                for message in found.into_iter().map(|at| batch.message(at)) {
                    let place = Place { stream, offset: message.offset().0 };
                    loaded.messages.insert(place, Some(Body::of(message, &session)));
                }
            }
        }
    }
    while let Some(found) = copied.next(copies).await? {
        for (place, copy) in found {
            let body = copy.map(|(batch, at)| Body::of(batch.message(at), &session));
            loaded.messages.insert(place, body);
        }
    }
    if let Some(page) = &mut loaded.page {
        for _ in 0..LOOKS_MAX {
            page.look(&broker.retained(), &session.client_id, &broker.clock, LOOKED_AT_ONCE);
            if page.is_done() {
                break;
            }
            yield_now().await;
        }
    }
    Ok(loaded)
}
