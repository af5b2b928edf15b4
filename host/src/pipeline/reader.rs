//! Reads a stream for one lane and hands its frames to the workers.
//!
//! Everything that must happen at one offset for all partitions (new steps,
//! one more sink) goes through the same queues as the frames. The task ends
//! when it is told to stop, when a worker is gone, or when the stream ends.
//! A frame is claimed before it is handed out, so that new steps begin at one
//! offset for all lanes: see [`super::schedule`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::lane::LaneId;
use super::metrics;
use super::outlet::Outlet;
use super::worker::{Frame, Shared, WORK_FRAMES_MAX, Work};
use crate::batch::{Batch, Offset};
use crate::stream::{Cursor, GapCause, Read, ReadError};

const ROOM_UNIT_BYTES: usize = 1_024;

/// One more sink for a lane; where it begins is stored in `starts_at`.
pub struct Attach {
    pub outlet: Outlet,
    pub starts_at: Arc<AtomicU64>,
}

pub struct Reader {
    pub lane: LaneId,
    pub shared: Arc<Shared>,
    pub cursor: Box<dyn Cursor>,
    pub workers: Vec<mpsc::Sender<Work>>,
    /// By worker: frames since it heard of one.
    pub without: Vec<usize>,
    pub control: mpsc::Receiver<Attach>,
    /// Bytes read and not through the steps.
    pub room: Arc<Semaphore>,
    pub room_max: u32,
    /// Offset of the next message that the reader has not in memory.
    pub position: Arc<AtomicU64>,
    pub progress_every: Duration,
    /// Whether the pipeline waits.
    pub hold: watch::Receiver<bool>,
    pub stop: CancellationToken,
}

/// A worker's queue closed: it says itself why.
struct WorkerGone;

pub fn room_units(bytes: u64) -> u32 {
    (bytes / ROOM_UNIT_BYTES as u64).clamp(1, 1 << 30) as u32
}

impl Reader {
    pub async fn run(mut self) -> Result<(), ReadError> {
        let stop = self.stop.clone();
        tokio::select! {
            biased;
            // Wherever it is: a frame that only some workers got is read again
            // by those that did not, since each has a progress of its own.
            () = stop.cancelled() => Ok(()),
            ended = self.read() => ended,
        }
    }

    async fn read(&mut self) -> Result<(), ReadError> {
        let mut tick = tokio::time::interval(self.progress_every);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut told = self.cursor.position();
        loop {
            let done = tokio::select! {
                biased;
                control = self.control.recv() => match control {
                    Some(attach) => self.attach(attach).await,
                    None => return Ok(()),
                },
                held = self.hold.changed() => match held {
                    Ok(()) => continue,
                    Err(_) => return Ok(()),
                },
                _ = tick.tick() => {
                    let upto = self.cursor.position();
                    if self.flip(upto).await.is_err() {
                        return Ok(());
                    }
                    if upto == told {
                        continue;
                    }
                    told = upto;
                    self.progress(upto).await
                }
                read = self.cursor.next(), if !*self.hold.borrow() => match read? {
                    Read::Batch(batch) => self.frame(batch).await,
                    Read::Gap { from, to, cause } => self.gap(from, to, cause).await,
                },
            };
            if done.is_err() {
                return Ok(());
            }
        }
    }

    async fn frame(&mut self, batch: Batch) -> Result<(), WorkerGone> {
        let upto = self.cursor.position();
        self.flip(upto).await?;
        self.position.store(upto.0, Ordering::Release);
        let bytes: usize = batch.segments.iter().map(bytes::Bytes::len).sum();
        let units = room_units(bytes as u64).min(self.room_max);
        let room = Arc::clone(&self.room).acquire_many_owned(units).await.map_err(|_| WorkerGone)?;
        let count = self.workers.len();
        let mut wanted = vec![false; count];
        for entry in &batch.entries {
            wanted[usize::from(entry.partition.0) % count] = true;
        }
        let from = batch.base;
        let frame = Arc::new(Frame { batch, upto, _room: room });
        // First the others: a worker that is full may wait for sinks to move past
        // letters, which they do once each worker has come so far.
        for (number, worker) in self.workers.iter().enumerate().filter(|(number, _)| !wanted[*number]) {
            self.without[number] += 1;
            if self.without[number] >= WORK_FRAMES_MAX
                && worker.try_send(Work::Progress { upto: from }).is_ok()
            {
                self.without[number] = 0;
            }
        }
        for (number, worker) in self.workers.iter().enumerate().filter(|(number, _)| wanted[*number]) {
            self.without[number] = 0;
            worker.send(Work::Frame(Arc::clone(&frame))).await.map_err(|_| WorkerGone)?;
        }
        Ok(())
    }

    async fn gap(&mut self, from: Offset, to: Offset, cause: GapCause) -> Result<(), WorkerGone> {
        match cause {
            // Told by the stream, once for all who read it.
            GapCause::Damaged => metrics::gap(&self.shared.name, cause.as_str()).increment(to.0 - from.0),
            GapCause::Trimmed => {
                tracing::error!(pipeline = %self.shared.name, from = from.0, to = to.0,
                    "retention removed messages before this pipeline read them");
                self.shared.gone.count(from.0..to.0);
            }
        }
        self.progress(to).await
    }

    async fn progress(&mut self, upto: Offset) -> Result<(), WorkerGone> {
        for worker in &self.workers {
            worker.send(Work::Progress { upto }).await.map_err(|_| WorkerGone)?;
        }
        self.position.store(upto.0, Ordering::Release);
        Ok(())
    }

    /// Claims the messages below `upto`, and gives the workers the versions of the steps that begin
    /// with any of them.
    async fn flip(&mut self, upto: Offset) -> Result<(), WorkerGone> {
        for flip in self.shared.schedule.claim(self.lane, upto) {
            for (worker, steps) in self.workers.iter().zip(flip.steps) {
                let begins = Arc::clone(&flip.begins);
                let flip = Work::Flip { begins, steps, ticket: flip.ticket };
                worker.send(flip).await.map_err(|_| WorkerGone)?;
            }
        }
        Ok(())
    }

    async fn attach(&mut self, Attach { outlet, starts_at }: Attach) -> Result<(), WorkerGone> {
        let from = self.cursor.position();
        // Each worker's own progress comes up to the place first.
        self.progress(from).await?;
        for worker in &self.workers {
            let outlet = outlet.clone();
            worker.send(Work::Attach { outlet, from }).await.map_err(|_| WorkerGone)?;
        }
        starts_at.store(from.0, Ordering::Release);
        Ok(())
    }
}
