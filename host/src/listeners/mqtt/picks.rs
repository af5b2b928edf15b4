//! Reads single messages from arbitrary places of a stream.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use crate::batch::{Batch, Offset};
use crate::stream::{Cursor, ReadError, Stream};

/// Distance of two wanted messages beyond which a new cursor is cheaper than reading the messages
/// between them.
const PASSED_MAX: u64 = 256;
/// Pause after a failed read.
const READ_RETRY_AFTER: Duration = Duration::from_secs(1);

/// Messages of one stream that are to be read, in the order of their offsets.
#[derive(Default)]
pub struct Picks {
    wanted: BTreeSet<u64>,
    cursor: Option<Box<dyn Cursor>>,
}

/// Result of one read.
#[derive(Default)]
pub struct Picked {
    /// A batch, and the indices of the wanted messages in it.
    pub found: Option<(Batch, Vec<usize>)>,
    /// Offsets whose messages were removed or damaged.
    pub gone: Vec<u64>,
}

impl Picks {
    pub fn add(&mut self, offset: u64) {
        self.wanted.insert(offset);
    }

    pub fn is_empty(&self) -> bool {
        self.wanted.is_empty()
    }

    /// Returns the next messages, which were all durable; `None` when all were read. Returns the reason
    /// if the stream has stopped. Cancel safe, and can be called again.
    pub async fn next(&mut self, stream: &dyn Stream) -> Result<Option<Picked>, Arc<str>> {
        loop {
            let Some(&next) = self.wanted.first() else {
                self.cursor = None;
                return Ok(None);
            };
            let near = |cursor: &mut Box<dyn Cursor>| {
                let at = cursor.position().0;
                at <= next && next - at <= PASSED_MAX
            };
            let cursor = match self.cursor.take_if(near) {
                Some(cursor) => self.cursor.insert(cursor),
                None => self.cursor.insert(stream.cursor(Offset(next))),
            };
            let mut picked = Picked::default();
            match cursor.next().await {
                Ok(crate::stream::Read::Batch(batch)) => {
                    let found = self.found_in(&batch);
                    picked.found = (!found.is_empty()).then_some((batch, found));
                }
                Ok(crate::stream::Read::Gap { .. }) => {}
                Err(ReadError::PastEnd { .. }) => {
                    self.wanted.remove(&next);
                    picked.gone.push(next);
                }
                Err(ReadError::Io(error)) => {
                    let stream = stream.name();
                    tracing::warn!(%error, stream, "mqtt: cannot read a subscriber's queued messages, will try again");
                    tokio::time::sleep(READ_RETRY_AFTER).await;
                    continue;
                }
                Err(ReadError::Stopped(reason)) => return Err(reason),
            }
            // What lies before the cursor and was not there is no more.
            let at = self.cursor.as_ref().map_or(0, |cursor| cursor.position().0);
            while let Some(&first) = self.wanted.first().filter(|first| **first < at) {
                self.wanted.remove(&first);
                picked.gone.push(first);
            }
            if picked.found.is_some() || !picked.gone.is_empty() {
                return Ok(Some(picked));
            }
        }
    }

    /// Returns the indices of wanted messages in a batch, which are then no longer wanted.
    fn found_in(&mut self, batch: &Batch) -> Vec<usize> {
        let Some(last) = batch.entries.last() else { return Vec::new() };
        let offsets: Vec<u64> = self.wanted.range(batch.base.0..=batch.offset(last).0).copied().collect();
        let mut found = Vec::with_capacity(offsets.len());
        for offset in offsets {
            if let Ok(at) = batch.entries.binary_search_by_key(&offset, |entry| batch.offset(entry).0) {
                self.wanted.remove(&offset);
                found.push(at);
            }
        }
        found
    }
}
