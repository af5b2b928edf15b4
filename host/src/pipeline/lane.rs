//! A lane: one reader, its workers, the sinks that they hand out to.
//!
//! A pipeline has one lane, and one more for each sink that lags behind the
//! others. Steps that stand before a sink are pure, so that two lanes may run
//! the same message, each with the version of the steps that its offset has.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::outlet::Outlet;
use super::reader::{Attach, Reader, room_units};
use super::schedule::{Flip, OfWorker};
use super::worker::{Ended, Served, Shared, WORK_FRAMES_MAX, Worker};
use crate::batch::Offset;
use crate::stream::Stream;
use crate::threads;

/// Orders to a lane that it did not get to yet.
const CONTROLS_MAX: usize = 16;

pub type LaneId = u64;

/// A running lane, as its pipeline holds it.
pub struct Lane {
    pub id: LaneId,
    pub control: mpsc::Sender<Attach>,
    pub stop: CancellationToken,
    pub position: Arc<AtomicU64>,
    pub outlets: Vec<Outlet>,
}

pub struct LaneEnded {
    pub lane: LaneId,
    pub error: Option<String>,
}

impl Lane {
    /// Starts the threads and the reader; `ended` hears when all are gone. `versions` are the
    /// steps of all messages from `from` on, oldest first.
    pub fn start(
        id: LaneId,
        shared: &Arc<Shared>,
        stream: &Arc<dyn Stream>,
        from: Offset,
        (versions, hold): (Vec<Flip>, watch::Receiver<bool>),
        outlets: Vec<Outlet>,
        ended: mpsc::Sender<LaneEnded>,
    ) -> std::io::Result<Self> {
        let (control, controls) = mpsc::channel(CONTROLS_MAX);
        let stop = CancellationToken::new();
        let position = Arc::new(AtomicU64::new(from.0));
        let mut queues = Vec::new();
        let mut threads = Vec::new();
        let workers = shared.config.worker_count();
        let mut of_workers: Vec<_> = (0..workers).map(|_| OfWorker(Vec::new())).collect();
        let letters = versions.iter().map(|version| version.ticket).max().unwrap_or_default();
        for Flip { begins, steps, .. } in versions {
            for (of_worker, steps) in of_workers.iter_mut().zip(steps) {
                of_worker.push(Arc::clone(&begins), steps);
            }
        }
        for (number, versions) in of_workers.into_iter().enumerate() {
            let (queue, works) = mpsc::channel(WORK_FRAMES_MAX);
            queues.push(queue);
            let worker = Worker {
                number: number as u16,
                workers,
                shared: Arc::clone(shared),
                queue: works,
                versions,
                version: 0,
                runtime: Handle::current(),
                outlets: outlets
                    .iter()
                    .map(|outlet| Served::new(outlet.clone(), number as u16, from))
                    .collect(),
                done: from,
                letters,
                stop: stop.clone(),
                counts: true,
            };
            threads.push(spawn(worker)?);
        }
        let room_max = room_units(shared.config.read_ahead_bytes_max.0);
        let reader = Reader {
            lane: id,
            shared: Arc::clone(shared),
            cursor: stream.cursor(from),
            without: vec![0; queues.len()],
            workers: queues,
            control: controls,
            room: Arc::new(Semaphore::new(room_max as usize)),
            room_max,
            position: Arc::clone(&position),
            progress_every: shared.config.progress_every.0,
            hold,
            stop: stop.clone(),
        };
        tokio::spawn(run(id, reader, threads, ended));
        Ok(Self { id, control, stop, position, outlets })
    }

    /// Takes a sink out. `true`: none is left.
    pub fn detach(&mut self, sink: usize) -> bool {
        self.outlets.retain(|outlet| {
            if outlet.sink == sink {
                outlet.detach();
            }
            outlet.sink != sink
        });
        self.outlets.is_empty()
    }
}

type WorkerEnd = oneshot::Receiver<Result<(), String>>;

fn spawn(worker: Worker) -> std::io::Result<WorkerEnd> {
    let (end, ended) = oneshot::channel();
    let name = format!("{}-{}", worker.shared.name, worker.number);
    let nice = threads::nice_of_workers();
    threads::spawn(name, move || {
        // Devices wait for the threads that acknowledge, and nobody for this one.
        nice.into_iter().for_each(threads::give_way);
        let result = match catch_unwind(AssertUnwindSafe(|| worker.run())) {
            Ok(Ok(()) | Err(Ended::Aborted)) => Ok(()),
            Ok(Err(Ended::DeadLetters(error))) => Err(error.to_string()),
            Err(_) => Err("a worker thread panicked: see the log".to_owned()),
        };
        drop(end.send(result));
    })?;
    Ok(ended)
}

async fn run(lane: LaneId, reader: Reader, workers: Vec<WorkerEnd>, ended: mpsc::Sender<LaneEnded>) {
    // The reader owns the workers' queues: they end after it.
    let mut error = reader.run().await.err().map(|error| error.to_string());
    for worker in workers {
        if let Ok(Err(reason)) = worker.await {
            error.get_or_insert(reason);
        }
    }
    drop(ended.send(LaneEnded { lane, error }).await);
}
