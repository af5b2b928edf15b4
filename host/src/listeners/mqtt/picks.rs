//! Single messages out of a stream, wherever they lie in it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use crate::batch::{Batch, Offset};
use crate::stream::{Cursor, ReadError, Stream};

/// Messages between two that are wanted: past it a new cursor is cheaper.
const PASSED_MAX: u64 = 256;
/// After a read that failed.
const READ_RETRY_AFTER: Duration = Duration::from_secs(1);

/// Messages of one stream that are to be read, in the order of their offsets.
#[derive(Default)]
pub struct Picks {
    wanted: BTreeSet<u64>,
    cursor: Option<Box<dyn Cursor>>,
}

/// What one read gave.
#[derive(Default)]
pub struct Picked {
    /// A batch and which of its messages were wanted.
    pub found: Option<(Batch, Vec<usize>)>,
    /// Offsets that are no more: trimmed or damaged.
    pub gone: Vec<u64>,
}

impl Picks {
    pub fn add(&mut self, offset: u64) {
        self.wanted.insert(offset);
    }

    pub fn is_empty(&self) -> bool {
        self.wanted.is_empty()
    }

    /// The next of them, all durable once; `None` when all were read. Safe to
    /// drop and to call again. The reason where the stream has stopped.
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
                    tracing::warn!(%error, stream, "mqtt: cannot read what waits for a subscriber, tries again");
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

    /// Which of its messages are wanted; not any more then.
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
