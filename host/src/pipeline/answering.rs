//! A sink whose status tells while it does not answer.

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use uuid::Uuid;

use super::status::SinkShared;
use crate::batch::{Offset, Partition};
use crate::sinks::{
    Advance, Claim, Epoch, Error, LogPosition, Name, Opened, Outcome, PassPosition, Rows, Sink, Written,
};

pub struct Answering {
    pub sink: Box<dyn Sink>,
    pub shown: Shown,
}

/// The status that calls of the sink are told to: that of the stream which the sink reads now. Clones share it.
#[derive(Clone)]
pub struct Shown(Arc<Mutex<Arc<SinkShared>>>);

impl Shown {
    pub fn new(shared: Arc<SinkShared>) -> Self {
        Self(Arc::new(Mutex::new(shared)))
    }

    pub fn set(&self, shared: &Arc<SinkShared>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(shared);
    }

    fn get(&self) -> Arc<SinkShared> {
        Arc::clone(&self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[async_trait]
impl Sink for Answering {
    async fn open(&mut self, claim: &Claim, held: Option<Epoch>) -> Result<Opened, Error> {
        self.shown.get().answer(self.sink.open(claim, held)).await
    }

    async fn positions_of(&mut self, claims: &[Name], logs: &[Uuid]) -> Result<Vec<LogPosition>, Error> {
        self.shown.get().answer(self.sink.positions_of(claims, logs)).await
    }

    async fn passes_of(
        &mut self,
        claims: &[Name],
        log: Uuid,
        above: Offset,
    ) -> Result<Vec<PassPosition>, Error> {
        self.shown.get().answer(self.sink.passes_of(claims, log, above)).await
    }

    async fn commit(&mut self, rows: &Rows, advance: &[Advance]) -> Result<Outcome, Error> {
        self.shown.get().answer(self.sink.commit(rows, advance)).await
    }

    async fn set_letters(&mut self, letters: &[(Partition, String)]) -> Result<(), Error> {
        self.shown.get().answer(self.sink.set_letters(letters)).await
    }

    async fn finish(&mut self) -> Result<Written, Error> {
        self.shown.get().answer(self.sink.finish()).await
    }
}
