//! A stream as a sink: rows become messages of a stream that other pipelines read and MQTT clients may
//! subscribe to.
//!
//! A commit is one append: the messages, and the positions that they bring the claim to as changes of the
//! stream's state map (`state_positions`). After a crash both are there or neither.

use std::sync::Arc;

use async_trait::async_trait;
use uuid::Uuid;

use super::state_positions::{self, Change, Entries, StatePositions, Store};
use super::{
    Advance, Claim, Epoch, Error, LogPosition, Name, Opened, Outcome, PassPosition, RefusedRow, Rows, Sink,
    Written,
};
use crate::batch::{MessageRef, Offset, Partition, flags};
use crate::stream::log::frame::message_fits;
use crate::stream::{AppendError, NewMessage, Stream, Ticket, partition_of};
use crate::topic::TOPIC_BYTES_MAX;

#[cfg(test)]
mod tests;

/// A stream that pipelines write to. Clones share the positions' lock: one for each stream of a host.
#[derive(Clone)]
pub struct Target {
    stream: Arc<dyn Stream>,
    positions: StatePositions,
    topic_bytes_max: usize,
    #[cfg(test)]
    refuse: Arc<std::sync::Mutex<Option<Vec<u8>>>>,
}

impl Target {
    /// `topic_prefix`: what subscribers see in front of the topics.
    pub fn new(stream: Arc<dyn Stream>, topic_prefix: Option<&str>) -> Self {
        let prefix_bytes = topic_prefix.map_or(0, |prefix| prefix.len() + 1);
        Self {
            positions: StatePositions::new(Arc::clone(&stream)),
            stream,
            topic_bytes_max: TOPIC_BYTES_MAX.saturating_sub(prefix_bytes),
            #[cfg(test)]
            refuse: Arc::default(),
        }
    }

    /// A sink that is not opened yet.
    pub fn sink(&self) -> Box<dyn Sink> {
        Box::new(StreamSink { target: self.clone(), mine: None, uncommitted: None })
    }

    /// Returns by partition up to where a claim has written what its log has: from the beginning where it has
    /// written nothing.
    pub fn reached(&self, claim: &Claim) -> Vec<Offset> {
        let own = (claim.pipeline.clone(), claim.sink.clone());
        let names: Vec<Name> = std::iter::once(own).chain(claim.formerly.iter().cloned()).collect();
        let mut reached = vec![Offset::default(); usize::from(claim.partitions)];
        for (_, partition, next) in self.positions.positions_of(&names, &[claim.log]) {
            if let Some(reached) = reached.get_mut(usize::from(partition.0)) {
                *reached = next.max(*reached);
            }
        }
        reached
    }

    /// Whether a claim with one of these names has written what lies at an offset of a log.
    pub fn has_passed(&self, names: &[Name], log: Uuid, partition: Partition, offset: Offset) -> bool {
        let positions = self.positions.positions_of(names, &[log]);
        positions.into_iter().any(|(_, of, next)| of == partition && next > offset)
    }

    /// Returns the message as the stream has it. Its partition is that of its device in this stream.
    fn message<'r>(&self, row: &MessageRef<'r>) -> NewMessage<'r> {
        let device = row.device();
        NewMessage {
            topic: row.topic(),
            payload: row.payload(),
            properties: row.properties(),
            route: row.route(),
            device,
            partition: partition_of(device, self.stream.identity().partitions),
            // Whether a step changed it is said from step to step.
            flags: row.entry.flags & !flags::CHANGED,
            received_us: row.entry.received_us,
            event_us: row.entry.event_us,
        }
    }

    /// Returns why a message can never be in the stream.
    fn misfit(&self, message: &NewMessage<'_>) -> Option<String> {
        #[cfg(test)]
        if self.refuse.lock().expect("no panic").as_deref() == Some(message.payload) {
            return Some("column \"value\": refused".to_owned());
        }
        let fits = match message.topic.len() > self.topic_bytes_max {
            true => Err("topic"),
            false => message_fits(message),
        };
        fits.err().map(|what| format!("{}: the {what} is too long for it", self.named()))
    }

    fn named(&self) -> String {
        format!("stream \"{}\"", self.stream.name())
    }

    /// Returns why nothing is appended now; the pipeline tries again.
    fn no_space(&self) -> Error {
        let lack = match self.stream.lack() {
            Some(lack) => lack.cause(None),
            None => "its state map is full".to_owned(),
        };
        Error::Retry(format!("{} takes no appends: {lack}", self.named()))
    }

    fn stopped(&self, reason: &str) -> Error {
        Error::Retry(format!("{} has stopped: {reason}", self.named()))
    }

    /// Returns once an append, and all before it, survive a crash.
    async fn durable(&self, ticket: Ticket) -> Result<(), Error> {
        let mut durable = self.stream.durable();
        let reached = durable.wait_for(|durable| *durable >= ticket).await;
        reached.map(drop).map_err(|_| Error::Unknown(self.named()))
    }

    /// Appends what `make` gives together with the messages, and returns once that is durable. `Ok(None)`:
    /// it is too large for one append.
    async fn append<T: Send>(
        &self,
        messages: &[NewMessage<'_>],
        make: impl Fn(Entries<'_>) -> Result<(T, Vec<Change>), Error> + Send + Sync,
    ) -> Result<Option<T>, Error> {
        match self.positions.append(messages, make).await? {
            Ok((made, ticket)) => self.durable(ticket).await.map(|()| Some(made)),
            Err(AppendError::NoSpace) => Err(self.no_space()),
            Err(AppendError::TooLarge(AppendError::WHOLE)) => Ok(None),
            Err(AppendError::TooLarge(what)) => {
                Err(Error::Setup(format!("{}: over its limit: {what}", self.named())))
            }
            Err(AppendError::Stopped(reason)) => Err(self.stopped(&reason)),
            Err(error @ AppendError::Full) => Err(Error::Retry(format!("{}: {error}", self.named()))),
        }
    }
}

struct StreamSink {
    target: Target,
    mine: Option<(Claim, Epoch)>,
    /// What `finish` appends.
    uncommitted: Option<(Rows, Vec<Advance>)>,
}

impl StreamSink {
    /// Returns whether the append was not too large.
    async fn append(&self, rows: &Rows, advance: &[Advance]) -> Result<bool, Error> {
        let Self { target, mine, .. } = self;
        let (claim, epoch) = mine.as_ref().ok_or_else(|| Error::Retry("commit before open".to_owned()))?;
        let messages: Vec<_> = rows.iter().map(|row| target.message(&row)).collect();
        let moved = |entries: Entries<'_>| Ok(((), state_positions::moved(entries, claim, *epoch, advance)?));
        Ok(target.append(&messages, moved).await?.is_some())
    }

    fn too_much(&self, rows: &Rows) -> String {
        format!(
            "{}: {} messages are larger than streams.{}.commit_buffer_bytes_max together",
            self.target.named(),
            rows.len(),
            self.target.stream.name()
        )
    }
}

#[async_trait]
impl Sink for StreamSink {
    async fn open(&mut self, claim: &Claim, held: Option<Epoch>) -> Result<Opened, Error> {
        (self.mine, self.uncommitted) = (None, None);
        let take = |entries: Entries<'_>| {
            let bounds = self.target.stream.bounds();
            let store = Store::Stream { has_rows: bounds.start < bounds.end };
            state_positions::take(entries, claim, held, store)
        };
        // The positions may be those of an append that was not durable yet.
        let opened = self.target.append(&[], take).await?;
        let opened = opened.ok_or_else(|| Error::Setup(self.too_much(&Rows::default())))?;
        self.mine = Some((claim.clone(), opened.epoch));
        Ok(opened)
    }

    async fn positions_of(&mut self, claims: &[Name], logs: &[Uuid]) -> Result<Vec<LogPosition>, Error> {
        Ok(self.target.positions.positions_of(claims, logs))
    }

    async fn passes_of(
        &mut self,
        claims: &[Name],
        log: Uuid,
        above: Offset,
    ) -> Result<Vec<PassPosition>, Error> {
        Ok(self.target.positions.passes_of(claims, log, above))
    }

    async fn commit(&mut self, rows: &Rows, advance: &[Advance]) -> Result<Outcome, Error> {
        self.uncommitted = None;
        let misfit = |(row, message): (usize, MessageRef<'_>)| {
            let reason = self.target.misfit(&self.target.message(&message))?;
            Some(RefusedRow { row, reason, code: None })
        };
        let mut rejected: Vec<_> = rows.iter().enumerate().filter_map(misfit).collect();
        if rejected.is_empty() {
            if self.append(rows, advance).await? {
                return Ok(Outcome::Committed(Written { written: rows.len() as u64, ignored: 0 }));
            }
            // The messages that a step made of one are in one append, as a position cannot lie between them.
            if !rows.is_of_one_message() {
                return Err(Error::TooMuch(self.too_much(rows)));
            }
            let reason = self.too_much(rows);
            let reject = |row| RefusedRow { row, reason: reason.clone(), code: None };
            rejected = (0..rows.len()).map(reject).collect();
        }
        let is_rejected = |row: &usize| rejected.binary_search_by_key(row, |rejected| rejected.row).is_ok();
        let kept = rows.select((0..rows.len()).filter(|row| !is_rejected(row)));
        self.uncommitted = Some((kept, advance.to_vec()));
        Ok(Outcome::Rejected(rejected))
    }

    async fn set_letters(&mut self, letters: &[(Partition, String)]) -> Result<(), Error> {
        let (_, advance) = self.uncommitted.as_mut().ok_or_else(nothing_to_finish)?;
        for (partition, letters) in letters {
            let own = advance.iter_mut().filter(|step| step.partition == *partition);
            own.for_each(|step| step.letters = Some(letters.clone()));
        }
        Ok(())
    }

    async fn finish(&mut self) -> Result<Written, Error> {
        let (rows, advance) = self.uncommitted.take().ok_or_else(nothing_to_finish)?;
        if self.append(&rows, &advance).await? {
            return Ok(Written { written: rows.len() as u64, ignored: 0 });
        }
        Err(Error::TooMuch(self.too_much(&rows)))
    }
}

fn nothing_to_finish() -> Error {
    Error::Retry("nothing to finish".to_owned())
}
