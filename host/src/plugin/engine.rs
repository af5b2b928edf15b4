//! The one wasmtime engine of a process and the clock that cuts calls short.
//!
//! Epochs, not fuel: a thread counts the epoch up every 5 ms while any call
//! runs, and a running call then checks its thread's CPU time against the
//! limit and wall time against ten times it, so that a busy machine does not
//! kill the innocent. The settings are fixed, so that compiled plugins can be
//! shared between processes of one version.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use wasmtime::{Config, Engine, Store, UpdateDeadline};

use crate::threads;

/// Between two checks of a running call.
const TICK: Duration = Duration::from_millis(5);
/// Ticks without a call before the ticker sleeps until the next one.
const IDLE_TICKS: u32 = 200;
/// A call's stack.
const STACK_BYTES_MAX: usize = 512 << 10;
/// Wall time may be this many times the CPU limit.
const WALL_FACTOR: u32 = 10;

/// Engine and ticker; clones share both.
#[derive(Clone)]
pub struct Runtime(Arc<Shared>);

struct Shared {
    engine: Engine,
    ticker: Arc<Ticker>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Ticker {
    running: AtomicU64,
    sleeping: AtomicBool,
    stopped: AtomicBool,
}

/// What is left of a call's time; lives in the store's data.
#[derive(Debug)]
pub struct Deadline {
    limit: Duration,
    began: Instant,
    /// CPU time of the thread when the call began, known from the first look on. Reading
    /// that clock costs half a microsecond, so a call that ends before a tick never does.
    cpu_at_begin: Option<Duration>,
    exceeded: bool,
}

/// A store's data has its call's deadline.
pub trait HasDeadline {
    fn deadline(&mut self) -> &mut Deadline;
}

/// A call in progress: the ticker runs while one lives.
pub struct Running<'r>(&'r Shared);

impl Runtime {
    pub fn new() -> wasmtime::Result<Self> {
        let engine = engine()?;
        let ticker = Arc::new(Ticker::default());
        let ticking = (engine.clone(), Arc::clone(&ticker));
        let thread = threads::spawn("plugin-clock".to_owned(), move || ticking.1.run(&ticking.0))
            .map_err(|error| wasmtime::format_err!("cannot start the plugins' clock: {error}"))?;
        Ok(Self(Arc::new(Shared { engine, ticker, thread: Some(thread) })))
    }

    pub fn engine(&self) -> &Engine {
        &self.0.engine
    }

    /// Installs the check of `deadline` in a new store.
    pub fn watch<T: HasDeadline + 'static>(store: &mut Store<T>) {
        store.epoch_deadline_callback(|mut store| {
            if store.data_mut().deadline().look() {
                Ok(UpdateDeadline::Continue(1))
            } else {
                Err(wasmtime::format_err!("out of time"))
            }
        });
    }

    /// Starts a call that may take `limit` of CPU time.
    pub fn start<'r, T: HasDeadline + 'static>(
        &'r self,
        store: &mut Store<T>,
        limit: Duration,
    ) -> Running<'r> {
        *store.data_mut().deadline() = Deadline::new(limit);
        store.set_epoch_deadline(1);
        self.0.ticker.running.fetch_add(1, Ordering::SeqCst);
        if self.0.ticker.sleeping.load(Ordering::SeqCst)
            && let Some(thread) = &self.0.thread
        {
            thread.thread().unpark();
        }
        Running(&self.0)
    }
}

impl Deadline {
    pub fn new(limit: Duration) -> Self {
        Self { limit, began: Instant::now(), cpu_at_begin: None, exceeded: false }
    }

    pub fn exceeded(&self) -> bool {
        self.exceeded
    }

    /// Returns whether the call may go on. Host calls that may take long ask too: no tick
    /// interrupts them.
    pub fn look(&mut self) -> bool {
        let (cpu, wall) = (thread_cpu_time(), self.began.elapsed());
        // Until the first look the call has used at most `wall`. A thread that had to wait for
        // its core used less, so that no more than this is held against a call.
        let first = || cpu.saturating_sub(wall.min(TICK).min(self.limit / 2));
        let cpu_at_begin = *self.cpu_at_begin.get_or_insert_with(first);
        self.exceeded =
            cpu.saturating_sub(cpu_at_begin) >= self.limit || wall >= self.limit.saturating_mul(WALL_FACTOR);
        !self.exceeded
    }
}

impl Default for Deadline {
    fn default() -> Self {
        Self::new(Duration::MAX)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.ticker.running.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.ticker.stopped.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It ends within one tick; a panic in it would have ended nothing else.
            let _ = thread.join();
        }
    }
}

impl Ticker {
    fn run(&self, engine: &Engine) {
        let mut idle = 0;
        while !self.stopped.load(Ordering::SeqCst) {
            thread::park_timeout(TICK);
            engine.increment_epoch();
            idle = if self.running.load(Ordering::SeqCst) == 0 { idle + 1 } else { 0 };
            if idle >= IDLE_TICKS {
                self.sleeping.store(true, Ordering::SeqCst);
                // A call that starts after this load sees `sleeping` and wakes us.
                if self.running.load(Ordering::SeqCst) == 0 && !self.stopped.load(Ordering::SeqCst) {
                    thread::park();
                }
                self.sleeping.store(false, Ordering::SeqCst);
                idle = 0;
            }
        }
    }
}

/// The engine alone: all that the compiling child needs.
pub fn engine() -> wasmtime::Result<Engine> {
    let mut config = Config::new();
    config
        .epoch_interruption(true)
        .memory_init_cow(true)
        .max_wasm_stack(STACK_BYTES_MAX)
        .concurrency_support(false)
        .wasm_memory64(false)
        .wasm_component_model(true)
        .cranelift_nan_canonicalization(true);
    Engine::new(&config)
}

fn thread_cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keeps this thread's CPU busy for `time`.
    fn work(time: Duration) {
        let begun = thread_cpu_time();
        while thread_cpu_time().saturating_sub(begun) < time {}
    }

    #[test]
    fn a_calls_time_counts_from_its_start_however_late_it_is_looked_at() {
        let limit = Duration::from_millis(1);
        let mut deadline = Deadline::new(limit);
        work(limit * WALL_FACTOR);
        assert!(!deadline.look() && deadline.exceeded());

        let limit = TICK;
        let mut deadline = Deadline::new(limit);
        work(limit / 2);
        deadline.look();
        work(limit / 2);
        assert!(!deadline.look());
    }

    #[test]
    fn a_call_that_only_waited_for_its_core_is_not_out_of_time() {
        let mut deadline = Deadline::new(Duration::from_secs(3_600));
        // It began a minute ago and used next to nothing.
        deadline.began = deadline.began.checked_sub(Duration::from_secs(60)).unwrap_or(deadline.began);
        assert!(deadline.look() && !deadline.exceeded());
        let cpu_at_begin = deadline.cpu_at_begin.expect("it was looked at");
        assert!(thread_cpu_time().saturating_sub(cpu_at_begin) < deadline.limit / 2);
    }
}
