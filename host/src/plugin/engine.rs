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
#[derive(Debug, Default)]
pub struct Deadline {
    limit: Duration,
    /// CPU and wall time at the first tick of the call: none before it, so
    /// that a short call asks no clock.
    first_tick: Option<(Duration, Instant)>,
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
            if store.data_mut().deadline().tick() {
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
        *store.data_mut().deadline() = Deadline { limit, first_tick: None, exceeded: false };
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
    pub fn exceeded(&self) -> bool {
        self.exceeded
    }

    /// Whether the call may go on.
    fn tick(&mut self) -> bool {
        let cpu = thread_cpu_time();
        let (cpu_at_first, wall_at_first) = *self.first_tick.get_or_insert_with(|| (cpu, Instant::now()));
        self.exceeded = cpu.saturating_sub(cpu_at_first) >= self.limit
            || wall_at_first.elapsed() >= self.limit * WALL_FACTOR;
        !self.exceeded
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
