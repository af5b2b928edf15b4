//! One sink's delivery from one stream: gathers what the workers hand out, writes it, moves the
//! positions. It ends when its lane is drained at a shutdown, when the sink is fenced or its positions
//! make no sense, at an abort, or where the sink goes on with another stream ([`super::road`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::Batching;
use super::config::Backoff;
use super::outlet::{Bundle, Intake};
use super::routes::SinkNumber;
use super::status::{CHOOSE, SinkShared, State};
use super::writer::{Failed, Writer};
use crate::batch::{Batch, Offset};
use crate::sinks::{Name, Rows, Sink};
use crate::stream::{Attachment, OnLag, Stream, Ticket};

/// What a delivery tells its pipeline.
#[derive(Debug)]
pub enum Event {
    /// Open, in no lane: send me everything from `from` on.
    Ready { sink: SinkNumber, from: Offset },
    /// Moved over to the lane that it was to join.
    Joined { sink: SinkNumber },
    /// `Some`: why it stopped, a person must act.
    Ended { sink: SinkNumber, stopped: Option<String> },
    /// The sink has all that comes to it by this stream, and goes on with another one.
    Left { sink: SinkNumber },
}

/// What a pipeline tells a delivery.
pub enum Control {
    /// Take from this lane.
    Start(Intake),
    /// Move over to this lane as soon as you have all that lies before it.
    Join(Intake),
}

/// A redrive borrows the sink; the delivery waits for it.
pub struct Lend {
    pub give: oneshot::Sender<Box<dyn Sink>>,
    pub back: oneshot::Receiver<Returned>,
}

/// A sink that was lent.
pub struct Returned {
    pub sink: Box<dyn Sink>,
    /// Rows were written with it.
    pub has_written: bool,
}

pub struct Delivery {
    pub number: SinkNumber,
    pub writer: Writer,
    pub stream: Arc<dyn Stream>,
    pub attachment: Arc<dyn Attachment>,
    pub on_lag: OnLag,
    pub batching: Batching,
    pub backoff: Backoff,
    pub progress_every: Duration,
    pub shared: Arc<SinkShared>,
    pub control: mpsc::Receiver<Control>,
    /// Redrives that want the sink. With another delivery while the sink has another stream.
    pub lends: Option<mpsc::Receiver<Lend>>,
    pub events: mpsc::Sender<Event>,
    /// The pipeline stops: what is in a lane is drained, the rest ends.
    pub stopping: CancellationToken,
    /// The pipeline's patience ends.
    pub abort: CancellationToken,
    pub intake: Option<Intake>,
    pub pending: Option<Intake>,
    /// By partition: all below is gathered or committed.
    pub received: Vec<Offset>,
    /// First offset of each partition that comes to the sink by this stream: the messages below came by another one.
    /// Empty if none did.
    pub floor: Vec<Offset>,
    /// Offset of each partition from which on messages come to the sink by another stream. `None` if none do.
    pub until: Option<Vec<Offset>>,
    /// The claim that the sink has in the stream with which it goes on: where it has positions there, it
    /// has left this one.
    pub next: Option<(Vec<Name>, Uuid)>,
    /// Set while the sink is only looked at here, since it has left this stream: the name of the reader, and what
    /// retention does for it where it is found to lack messages.
    pub hold: Option<(String, OnLag)>,
    /// The place from which the status reads in which stream the sink is shown, and the value that means this stream.
    pub shows: Option<(Arc<AtomicUsize>, usize)>,
}

/// How a delivery ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The sink has all that comes to it by this stream.
    Left,
    /// Nothing more is delivered in this process.
    Ended,
}

/// Why a delivery leaves what it does.
enum Leave {
    /// Out of its lane, or the sink's positions went back: begin again from them.
    Again,
    /// As `Again`, and the sink must be opened first.
    Reopen,
    Drained,
    Aborted,
    /// All that comes by this stream is committed.
    Done,
    Stop(String),
}

impl From<Failed> for Leave {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::Later { .. } => Self::Reopen,
            Failed::Stop(reason) => Self::Stop(reason),
        }
    }
}

#[derive(Default)]
struct Gathered {
    rows: Rows,
    /// Rows that have a letter already.
    refused_before: Vec<usize>,
    kib: usize,
    rooms: Vec<OwnedSemaphorePermit>,
    letters: Ticket,
    since: Option<Instant>,
    /// A worker waits for the commit.
    urgent: bool,
    /// The lane's queue is closed and empty.
    last: bool,
}

impl Gathered {
    fn is_enough(&self, batching: Batching) -> bool {
        self.rows.len() >= batching.rows_max || self.kib as u64 * 1_024 >= batching.bytes_max
    }

    /// Whether one transaction can have the bundle too. Alone each bundle has room: the writer cuts it.
    fn has_room_for(&self, bundle: &Bundle, batching: Batching) -> bool {
        let rows: usize = bundle.batches.iter().map(Batch::len).sum();
        let kib = bundle.room.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let fits = self.rows.len() + rows <= batching.rows_max
            && (self.kib + kib) as u64 * 1_024 <= batching.bytes_max;
        self.rows.is_empty() || rows == 0 || fits
    }
}

impl Delivery {
    pub async fn run(&mut self) -> End {
        let left = self.deliver().await;
        // What is queued for nobody must not hold the lane up.
        for intake in self.intake.take().iter().chain(&self.pending.take()) {
            intake.cancel.cancel();
        }
        let stopped = match left {
            Leave::Done => {
                self.writer.letters.serve(self.number, None);
                drop(self.events.send(Event::Left { sink: self.number }).await);
                return End::Left;
            }
            Leave::Stop(reason) => {
                tracing::error!(
                    sink = self.writer.claim.sink,
                    pipeline = self.writer.claim.pipeline,
                    "{reason}"
                );
                self.shared.set(State::Stopped(reason.clone()));
                Some(reason)
            }
            Leave::Aborted | Leave::Drained | Leave::Again | Leave::Reopen => None,
        };
        drop(self.events.send(Event::Ended { sink: self.number, stopped }).await);
        End::Ended
    }

    async fn deliver(&mut self) -> Leave {
        let mut open = true;
        loop {
            for intake in self.intake.take().iter().chain(&self.pending.take()) {
                intake.cancel.cancel();
            }
            self.writer.letters.serve(self.number, None);
            let left = match self.begin(open).await {
                Ok(()) => match self.deliver_from_lane().await {
                    Ok(()) => Leave::Drained,
                    Err(leave) => leave,
                },
                Err(leave) => leave,
            };
            match left {
                Leave::Again => open = false,
                Leave::Reopen => open = true,
                leave => return leave,
            }
        }
    }

    /// Opens where that is due, then waits to be put into a lane.
    async fn begin(&mut self, open: bool) -> Result<(), Leave> {
        if open {
            self.open().await?;
        }
        self.go_back();
        if self.is_done() || self.has_left().await? {
            return Err(Leave::Done);
        }
        if let Some((consumer, on_lag)) = self.hold.take() {
            let attachment: Arc<dyn Attachment> = self.stream.attach(&consumer, self.lowest(), on_lag).into();
            self.writer.attachment = Some(Arc::clone(&attachment));
            self.attachment = attachment;
        }
        if let Some((place, own)) = &self.shows {
            place.store(*own, Ordering::Release);
        }
        let from = self.received.iter().copied().min().unwrap_or_default();
        if self.events.send(Event::Ready { sink: self.number, from }).await.is_err() {
            return Err(Leave::Aborted);
        }
        while self.intake.is_none() {
            // What a lane has read for it already is drained too: the lane may have come while the
            // sink was lent.
            let control = tokio::select! {
                biased;
                control = self.control.recv() => control,
                Some(lend) = asked(&mut self.lends) => {
                    self.lend(lend).await?;
                    self.open().await?;
                    self.go_back();
                    continue;
                }
                () = self.stopping.cancelled() => return Err(Leave::Drained),
            };
            match control {
                // The pipeline is gone before it had a lane for us.
                None => return Err(Leave::Drained),
                Some(Control::Start(intake)) => self.take_from(intake),
                Some(Control::Join(intake)) => intake.cancel.cancel(),
            }
        }
        Ok(())
    }

    fn take_from(&mut self, intake: Intake) {
        self.writer.letters.serve(self.number, Some(Arc::clone(&intake.handed_out)));
        self.intake = Some(intake);
    }

    async fn deliver_from_lane(&mut self) -> Result<(), Leave> {
        let mut committed_at = Instant::now();
        loop {
            let mut gathered = self.gather(committed_at).await?;
            let last = gathered.last;
            self.commit(&mut gathered).await?;
            committed_at = Instant::now();
            if self.is_done() {
                return Err(Leave::Done);
            }
            if last {
                return Ok(());
            }
        }
    }

    /// Gathers rows until there are enough for a commit, or the first has waited long enough.
    async fn gather(&mut self, committed_at: Instant) -> Result<Gathered, Leave> {
        let mut gathered = Gathered::default();
        loop {
            self.join_when_there().await;
            if gathered.is_enough(self.batching) || gathered.urgent || self.has_received_all() {
                return Ok(gathered);
            }
            let due = match gathered.since {
                Some(since) => Some(since + self.batching.wait_max),
                None if self.received != self.writer.positions => Some(committed_at + self.progress_every),
                None => None,
            };
            if due.is_some_and(|due| due <= Instant::now()) {
                return Ok(gathered);
            }
            let intake = self.intake.as_mut().expect("begin waits for it");
            tokio::select! {
                biased;
                () = self.abort.cancelled() => return Err(Leave::Aborted),
                () = intake.cancel.clone().cancelled_owned() => return Err(Leave::Again),
                control = self.control.recv(), if !self.control.is_closed() => match control {
                    Some(Control::Join(intake)) => self.pending = Some(intake),
                    Some(Control::Start(intake)) => intake.cancel.cancel(),
                    None => {}
                },
                Some(lend) = asked(&mut self.lends) => self.lend_between_commits(lend).await?,
                bundle = intake.recv() => match bundle {
                    Some(bundle) if !gathered.has_room_for(&bundle, self.batching) => {
                        intake.put_back(bundle);
                        return Ok(gathered);
                    }
                    Some(bundle) => self.take(bundle, &mut gathered)?,
                    None => {
                        // Closed by `cancel` in the meantime, or drained.
                        if intake.cancel.is_cancelled() {
                            return Err(Leave::Again);
                        }
                        gathered.last = true;
                        return Ok(gathered);
                    }
                },
                () = sleep_until(due) => return Ok(gathered),
            }
        }
    }

    fn take(&mut self, bundle: Bundle, gathered: &mut Gathered) -> Result<(), Leave> {
        let mine = || {
            (bundle.worker..self.writer.claim.partitions)
                .step_by(usize::from(bundle.workers))
                .map(usize::from)
        };
        let is_over = |p: usize| self.until.as_ref().is_some_and(|until| self.received[p] >= until[p]);
        if mine().any(|p| bundle.from > self.received[p] && !is_over(p)) {
            tracing::warn!(
                sink = self.writer.claim.sink,
                from = bundle.from.0,
                "a lane skipped messages; reading them again"
            );
            return Err(Leave::Again);
        }
        let again = mine().any(|p| bundle.from < self.received[p]);
        let mut batches = bundle.batches;
        if again || self.until.is_some() {
            for batch in &mut batches {
                let (base, partition) = (batch.base.0, batch.entries.first().map(|entry| entry.partition.0));
                let partition = usize::from(partition.unwrap_or_default());
                let until = self.until.as_ref().map_or(u64::MAX, |until| until[partition].0);
                let own = self.received[partition].0..until;
                batch.entries.to_mut().retain(|entry| own.contains(&(base + u64::from(entry.offset))));
            }
        }
        batches.retain(|batch| !batch.is_empty());
        let taken = self.writer.letters.take(self.number, &batches, &bundle.seen, mine(), bundle.upto);
        let Ok(refused_before) = taken else {
            tracing::debug!(
                sink = self.writer.claim.sink,
                from = bundle.from.0,
                "another lane refused messages meanwhile; reading them again"
            );
            return Err(Leave::Again);
        };
        let has_rows = !batches.is_empty();
        let mut refused_before = refused_before.into_iter().peekable();
        for (b, batch) in batches.into_iter().enumerate() {
            let row = gathered.rows.len();
            while let Some((_, i)) = refused_before.next_if(|(of, _)| *of == b) {
                gathered.refused_before.push(row + i);
            }
            gathered.rows.push_batch(batch);
        }
        for p in mine() {
            let until = self.until.as_ref().map_or(bundle.upto, |until| until[p]);
            self.received[p] = self.received[p].max(bundle.upto.min(until));
        }
        gathered.letters = gathered.letters.max(bundle.letters);
        gathered.urgent |= bundle.urgent;
        // Without rows of it nothing would be due, which gives the room back.
        if has_rows {
            gathered.since.get_or_insert_with(Instant::now);
            gathered.kib += bundle.room.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
            gathered.rooms.extend(bundle.room);
        }
        self.shared.received.store(self.received.iter().min().map_or(0, |o| o.0), Ordering::Release);
        Ok(())
    }

    /// Writes until it is written, or cannot be.
    async fn commit(&mut self, gathered: &mut Gathered) -> Result<(), Leave> {
        self.leave_out_refused(gathered).await?;
        let mut attempt = 0;
        let written = self.writer.written;
        loop {
            let write = self.writer.write(&mut gathered.rows, &self.received);
            let failed = tokio::select! {
                written = write => written,
                () = self.abort.cancelled() => return Err(Leave::Aborted),
            };
            let Err(failed) = failed else {
                self.shared.committed(self.writer.written > written);
                self.publish();
                return Ok(());
            };
            self.shared.commit_failed(matches!(failed, Failed::Later { kind: "refusals", .. }));
            self.publish();
            let is_setup = matches!(failed, Failed::Later { kind: "setup" | CHOOSE, .. });
            self.back_off(failed, attempt).await?;
            attempt += 1;
            let before = self.writer.positions.clone();
            self.open().await?;
            if self.writer.positions.iter().zip(&before).any(|(now, before)| now < before) {
                return Err(Leave::Again);
            }
            for (received, position) in self.received.iter_mut().zip(&self.writer.positions) {
                *received = (*received).max(*position);
            }
            self.writer.letters.set_received(self.number, &self.received);
            // An unknown commit may have been one.
            let left: Vec<_> = (0..gathered.rows.len())
                .filter(|row| {
                    let message = gathered.rows.get(*row);
                    message.offset() >= self.writer.positions[usize::from(message.entry.partition.0)]
                })
                .collect();
            if left.len() < gathered.rows.len() {
                gathered.rows = gathered.rows.select(left);
            }
            if is_setup {
                self.gather_more(gathered)?;
                self.leave_out_refused(gathered).await?;
            }
        }
    }

    /// Takes what has come since. Where none of some rows can be written, others beside them show whether
    /// that is due to these rows or to the table.
    fn gather_more(&mut self, gathered: &mut Gathered) -> Result<(), Leave> {
        while !gathered.is_enough(self.batching) {
            let Some(bundle) = self.intake.as_mut().and_then(Intake::try_recv) else { break };
            self.take(bundle, gathered)?;
        }
        Ok(())
    }

    /// Takes the rows out that have a letter already, once their letters are durable.
    async fn leave_out_refused(&mut self, gathered: &mut Gathered) -> Result<(), Leave> {
        let refused = std::mem::take(&mut gathered.refused_before);
        if !refused.is_empty() {
            let mut refused = refused.into_iter().peekable();
            gathered.rows = gathered
                .rows
                .select((0..gathered.rows.len()).filter(|row| refused.next_if_eq(row).is_none()));
            gathered.letters = gathered.letters.max(self.writer.letters.ticket());
        }
        // Before any position covers what was refused: see `delivery-order.md`.
        let stopped = |error: super::dead_letters::Error| Leave::Stop(error.to_string());
        self.writer.letters.durable(gathered.letters).await.map_err(stopped)
    }

    /// Opens the sink, however long it takes, and checks what it says.
    async fn open(&mut self) -> Result<(), Leave> {
        let mut attempt = 0;
        loop {
            let delivered = self.attachment.delivered();
            let opened = tokio::select! {
                opened = self.writer.open(&*self.stream, delivered) => opened,
                () = self.abort.cancelled() => return Err(Leave::Aborted),
            };
            if !self.writer.positions.is_empty() {
                // Also where they make no sense: a person is told of all that is at stake.
                self.shared.committed.store(self.lowest().0, Ordering::Release);
            }
            match opened {
                Ok(()) => break,
                Err(failed) => self.back_off(failed, attempt).await?,
            }
            attempt += 1;
        }
        self.shared.opened();
        self.check_positions()
    }

    fn check_positions(&self) -> Result<(), Leave> {
        let kept = self.stream.bounds();
        let stream = self.stream.name();
        let lowest = self.lowest();
        if self.is_done() {
            return Ok(());
        }
        if lowest < kept.start && self.on_lag == OnLag::Block {
            return Err(Leave::Stop(format!(
                "its position {} is below the first kept message {} of stream \"{stream}\": the messages at offsets {} \
                 to {} are missing on disk, where retention keeps them for the sink (on_lag: block), and it has not got \
                 them. Put the missing files of the stream's folder back; or set `on_lag: detach` to go on without \
                 these messages; then restart",
                lowest.0,
                kept.start.0,
                lowest.0,
                kept.start.0 - 1
            )));
        }
        for (partition, position) in self.writer.positions.iter().enumerate() {
            if *position > kept.end {
                return Err(Leave::Stop(format!(
                    "its position {} in partition {partition} is beyond the end {} of stream \"{stream}\", \
                     although this data folder was the last to move it: was the row in headworks_positions edited? \
                     Put next_offset back to at most {}, then restart",
                    position.0, kept.end.0, kept.end.0
                )));
            }
        }
        // Below the first kept one: the lane's reader says and counts it.
        Ok(())
    }

    /// Says why, then waits; `Err` where waiting is over for another reason.
    async fn back_off(&mut self, failed: Failed, attempt: u32) -> Result<(), Leave> {
        let Failed::Later { kind, reason } = failed else { return Err(failed.into()) };
        self.shared.failed(kind, reason);
        let slow = matches!(kind, "setup" | "refusals" | CHOOSE);
        let wait = if slow { self.backoff.max.0 } else { self.backoff.delay(attempt) };
        let until = Instant::now() + wait;
        loop {
            let detached = async {
                match &self.intake {
                    Some(intake) => intake.cancel.cancelled().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.abort.cancelled() => return Err(Leave::Aborted),
                () = detached => return Err(Leave::Reopen),
                () = self.stopping.cancelled(), if self.intake.is_none() => return Err(Leave::Drained),
                () = tokio::time::sleep_until(until) => return Ok(()),
                control = self.control.recv(), if !self.control.is_closed() => match control {
                    Some(Control::Join(intake) | Control::Start(intake)) => intake.cancel.cancel(),
                    None => {}
                },
                Some(lend) = asked(&mut self.lends) => self.lend(lend).await?,
            }
        }
    }

    /// Moves over to the pending lane once nothing before it is missing.
    async fn join_when_there(&mut self) {
        let Some(pending) = &self.pending else { return };
        if pending.cancel.is_cancelled() {
            self.pending = None;
        } else if self.received.iter().all(|received| received.0 >= pending.starts_at.load(Ordering::Acquire))
        {
            if let Some(intake) = self.pending.take() {
                self.take_from(intake);
            }
            drop(self.events.send(Event::Joined { sink: self.number }).await);
        }
    }

    async fn lend_between_commits(&mut self, lend: Lend) -> Result<(), Leave> {
        self.lend(lend).await?;
        let before = self.writer.positions.clone();
        self.open().await?;
        if self.writer.positions == before { Ok(()) } else { Err(Leave::Again) }
    }

    async fn lend(&mut self, lend: Lend) -> Result<(), Leave> {
        let Some(sink) = self.writer.sink.take() else { return Ok(()) };
        if let Err(sink) = lend.give.send(sink) {
            self.writer.sink = Some(sink);
            return Ok(());
        }
        tokio::select! {
            back = lend.back => match back {
                Ok(returned) => {
                    self.writer.sink = Some(returned.sink);
                    if returned.has_written {
                        self.shared.has_written();
                    }
                }
                Err(_) => {
                    return Err(Leave::Stop("it was lost in a redrive: restart".to_owned()));
                }
            },
            () = self.abort.cancelled() => return Err(Leave::Aborted),
        }
        Ok(())
    }

    /// To the positions: what was taken above them and not written is open again.
    fn go_back(&mut self) {
        self.received = (0..self.writer.positions.len()).map(|p| self.reached(p)).collect();
        self.writer.letters.set_received(self.number, &self.received);
        self.publish();
    }

    /// Where the sink goes on in a partition: at its position, or behind what came to it by another stream.
    fn reached(&self, partition: usize) -> Offset {
        let floor = self.floor.get(partition).copied().unwrap_or_default();
        self.writer.positions[partition].max(floor)
    }

    fn lowest(&self) -> Offset {
        (0..self.writer.positions.len()).map(|p| self.reached(p)).min().unwrap_or_default()
    }

    /// Whether all that comes by this stream is committed.
    fn is_done(&self) -> bool {
        let committed = |until: &Vec<Offset>| (0..until.len()).all(|p| self.reached(p) >= until[p]);
        !self.writer.positions.is_empty() && self.until.as_ref().is_some_and(committed)
    }

    fn has_received_all(&self) -> bool {
        let received = |until: &Vec<Offset>| self.received.iter().zip(until).all(|(at, until)| at >= until);
        self.until.as_ref().is_some_and(received)
    }

    /// Whether the sink has positions in the stream with which it goes on, whatever its position here is:
    /// it was let go from here by a process whose notes are lost.
    async fn has_left(&mut self) -> Result<bool, Leave> {
        let Some((claims, log)) = self.next.clone().filter(|_| self.until.is_some()) else {
            return Ok(false);
        };
        let mut attempt = 0;
        loop {
            let Some(sink) = self.writer.sink.as_mut() else { return Ok(false) };
            match sink.positions_of(&claims, &[log]).await {
                Ok(positions) => return Ok(!positions.is_empty()),
                Err(error) => {
                    let failed = self.writer.failed(error);
                    self.back_off(failed, attempt).await?;
                }
            }
            attempt += 1;
            self.open().await?;
        }
    }

    fn publish(&self) {
        let lowest = self.lowest();
        self.attachment.advance(lowest);
        // Below the sink's own position: one that lags keeps no letters of the others.
        self.writer.letters.forget_below(self.number, lowest);
        self.shared.committed.store(lowest.0, Ordering::Release);
        self.shared.received.store(self.received.iter().min().map_or(0, |o| o.0), Ordering::Release);
    }
}

/// Returns the next redrive that wants the sink; waits for ever where none can any more.
async fn asked(lends: &mut Option<mpsc::Receiver<Lend>>) -> Option<Lend> {
    match lends {
        Some(open) => match open.recv().await {
            Some(lend) => Some(lend),
            None => {
                *lends = None;
                std::future::pending().await
            }
        },
        None => std::future::pending().await,
    }
}

async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// `u64::MAX`: not known yet.
pub fn unknown() -> AtomicU64 {
    AtomicU64::new(u64::MAX)
}
