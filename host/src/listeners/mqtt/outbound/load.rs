//! Reads messages that wait in their streams, when it is their turn.

use std::collections::{BTreeSet, HashMap};
use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::PollSemaphore;

use super::{Message, Place};
use crate::batch::Offset;
use crate::stream::{Cursor, Read, ReadError, Stream};

/// Subscribers that are read for at a time: each holds up to 2 MiB meanwhile,
/// and takes a thread from those that serve connections.
pub const LOADS_MAX: usize = 4;
/// Messages between two that are wanted: past it a new cursor is cheaper.
const PASSED_MAX: u64 = 4_096;
/// After a read that failed.
const READ_RETRY_AFTER: Duration = Duration::from_secs(1);

/// What was asked for; `None`: it is no more, trimmed or damaged.
pub type Loaded = HashMap<Place, Option<Arc<Message>>>;

pub struct Loader {
    wanted: BTreeSet<Place>,
    found: Loaded,
    turn: PollSemaphore,
    /// Of `LOADS_MAX`.
    permit: Option<OwnedSemaphorePermit>,
    cursor: Option<(u16, Box<dyn Cursor>)>,
}

impl Loader {
    pub fn new(wanted: impl IntoIterator<Item = Place>, loads: &Arc<Semaphore>) -> Self {
        Self {
            wanted: wanted.into_iter().collect(),
            found: HashMap::new(),
            turn: PollSemaphore::new(loads.clone()),
            permit: None,
            cursor: None,
        }
    }

    /// Safe to drop and to call again. The reason where a stream has stopped.
    pub async fn run(&mut self, streams: &[Arc<dyn Stream>]) -> Result<Loaded, Arc<str>> {
        if self.permit.is_none() {
            // Keeps its place in the row where this is dropped.
            self.permit = poll_fn(|cx| self.turn.poll_acquire(cx)).await;
        }
        while let Some(&next) = self.wanted.first() {
            let near = |(stream, cursor): &(u16, Box<dyn Cursor>)| {
                let at = cursor.position().0;
                *stream == next.stream && at <= next.offset && next.offset - at <= PASSED_MAX
            };
            let cursor = match self.cursor.take_if(|cursor| near(cursor)) {
                Some(cursor) => self.cursor.insert(cursor),
                None => {
                    let stream = &streams[usize::from(next.stream)];
                    self.cursor.insert((next.stream, stream.cursor(Offset(next.offset))))
                }
            };
            // All that is wanted was durable once, so that this waits for the disk only.
            match cursor.1.next().await {
                Ok(Read::Batch(batch)) => {
                    for message in batch.messages() {
                        let place = Place { stream: next.stream, offset: message.offset().0 };
                        if self.wanted.remove(&place) {
                            self.found.insert(place, Some(Arc::new(Message::of(message))));
                        }
                    }
                    self.pass(next.stream);
                }
                Ok(Read::Gap { .. }) => self.pass(next.stream),
                Err(ReadError::PastEnd { .. }) => self.lose(next),
                Err(ReadError::Io(error)) => {
                    tracing::warn!(%error, "mqtt: cannot read what waits for a subscriber, tries again");
                    tokio::time::sleep(READ_RETRY_AFTER).await;
                }
                Err(ReadError::Stopped(reason)) => return Err(reason),
            }
        }
        (self.cursor, self.permit) = (None, None);
        Ok(std::mem::take(&mut self.found))
    }

    /// What lies before the cursor and was not there is no more.
    fn pass(&mut self, stream: u16) {
        let at = self.cursor.as_ref().map_or(0, |(_, cursor)| cursor.position().0);
        while let Some(&first) = self.wanted.first()
            && first.stream == stream
            && first.offset < at
        {
            self.lose(first);
        }
    }

    fn lose(&mut self, place: Place) {
        self.wanted.remove(&place);
        self.found.insert(place, None);
    }
}
