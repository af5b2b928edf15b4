//! What threads ask of Linux's scheduler (EEVDF), so that acknowledgements go out in
//! time on a full machine.
//!
//! Short slices: a thread that is woken comes before one with longer slices at once,
//! and before one with slices as short as its own within such a slice. Otherwise it may
//! wait for the next tick, up to 4 ms. They say nothing of shares.
//! Nice: a thread that works long on what nobody waits for takes a tenth of the share of
//! the others where all want to run.
//! Turns: a thread that works long offers its core now and then. One that waits for it
//! has it at the next tick otherwise, slice or not, even with a core idle beside.
//! Cores: the threads that serve connections keep to one each. Two of them share one
//! for milliseconds otherwise, with a core idle beside.

use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::getpriority_process;
use rustix::thread::{CpuSet, gettid, sched_getaffinity, sched_setaffinity, sched_yield};

/// The shortest there are (Linux 6.12 and later; earlier ones have none of a thread's own).
const SLICE: Duration = Duration::from_micros(100);
/// Of work that others wait for in small parts: it offers its core once a slice.
pub const SHORT_TURN: Duration = SLICE;
/// Of work that is the cheaper the more of it is done in one go.
pub const LONG_TURN: Duration = Duration::from_millis(1);
const NICER: i32 = 10;
const NICEST: i32 = 19;

/// Acknowledgements wait for this thread, or it is not to keep them waiting.
pub fn take_short_slices() {
    or_say(nice().and_then(set));
}

/// How nice threads are that give way to the one that calls.
pub fn nicer() -> io::Result<i32> {
    Ok((nice()? + NICER).min(NICEST))
}

/// This thread gives way to others.
pub fn give_way(nice: i32) {
    or_say(set(nice));
}

thread_local! {
    static TURN_BEGAN: Cell<Option<Instant>> = const { Cell::new(None) };
    static HAS_CORE: Cell<bool> = const { Cell::new(false) };
}

/// The cores that threads keep to; whoever keeps to none runs on any of them.
static CORES: OnceLock<Cores> = OnceLock::new();

struct Cores {
    any: CpuSet,
    each: Vec<usize>,
    next: AtomicUsize,
}

/// From now on so many threads may each [`keep_to_a_core`], where there are as many that
/// this process may run on: with fewer threads (a quota) all processes here would keep
/// to the same few.
pub fn share_out_cores(threads: usize) {
    let cores = sched_getaffinity(None).map_err(io::Error::from).map(Cores::new);
    match cores {
        Ok(cores) if cores.each.len() == threads && threads > 1 => _ = CORES.set(cores),
        Ok(_) => {}
        Err(error) => or_say(Err(error)),
    }
}

/// For a thread that does not end, and is called again and again.
pub fn keep_to_a_core() {
    if let Some(cores) = CORES.get()
        && !HAS_CORE.replace(true)
    {
        or_say(sched_setaffinity(None, &cores.take()).map_err(io::Error::from));
    }
}

/// A thread, or a process, begins with the cores of the thread that begins it.
pub fn run_on_any_core() {
    if let Some(cores) = CORES.get() {
        or_say(sched_setaffinity(None, &cores.any).map_err(io::Error::from));
    }
}

/// A thread that runs on any core.
pub fn spawn<T: Send + 'static>(
    name: String,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    std::thread::Builder::new().name(name).spawn(move || {
        run_on_any_core();
        work()
    })
}

impl Cores {
    fn new(any: CpuSet) -> Self {
        let each = (0..CpuSet::MAX_CPU).filter(|core| any.is_set(*core)).collect();
        Self { any, each, next: AtomicUsize::new(0) }
    }

    fn take(&self) -> CpuSet {
        let mut core = CpuSet::new();
        core.set(self.each[self.next.fetch_add(1, Ordering::Relaxed) % self.each.len()]);
        core
    }
}

/// This thread was woken, and has its core anew.
pub fn begin_turn() {
    TURN_BEGAN.set(Some(Instant::now()));
}

/// Lets another thread have this core that waits for it, where this one had it for `turn`.
pub fn offer_core(turn: Duration) {
    match TURN_BEGAN.get() {
        Some(began) if began.elapsed() < turn => return,
        Some(_) => sched_yield(),
        None => {}
    }
    begin_turn();
}

/// Offers the core between two steps of `work`, once a `turn`.
pub async fn in_turns<T>(turn: Duration, work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    poll_fn(|context| {
        let polled = work.as_mut().poll(context);
        offer_core(turn);
        polled
    })
    .await
}

/// It works all the same, later: so it is where somebody gave the host another policy.
fn or_say(set: io::Result<()>) {
    if let Err(error) = set {
        tracing::debug!(%error, "a thread is scheduled as the system does");
    }
}

fn nice() -> io::Result<i32> {
    Ok(getpriority_process(Some(gettid()))?)
}

fn set(nice: i32) -> io::Result<()> {
    let attributes = libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: 0,
        sched_flags: libc::SCHED_FLAG_KEEP_POLICY as u64,
        sched_nice: nice,
        sched_priority: 0,
        sched_runtime: SLICE.as_nanos() as u64,
        sched_deadline: 0,
        sched_period: 0,
    };
    let (this_thread, no_flags) = (0, 0);
    // SAFETY: the call reads `attributes`, which says its own size, and nothing else.
    #[allow(unsafe_code)]
    let failed =
        unsafe { libc::syscall(libc::SYS_sched_setattr, this_thread, &raw const attributes, no_flags) };
    if failed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_had_its_turn_begins_another() {
        let began = || TURN_BEGAN.get().unwrap();
        offer_core(SLICE);
        let first = began();
        while first.elapsed() < SLICE {
            std::hint::spin_loop();
        }
        offer_core(SLICE);
        assert!(began() > first);
    }

    #[test]
    fn threads_that_keep_to_a_core_have_one_each_and_begin_others_that_do_not() {
        let cores = || Cores::new(sched_getaffinity(None).unwrap()).each;
        let any = cores();
        share_out_cores(any.len());
        let keeping = move || {
            keep_to_a_core();
            keep_to_a_core();
            (cores(), spawn("begun".to_owned(), cores).unwrap().join().unwrap())
        };
        let (mut kept, begun): (Vec<_>, Vec<_>) =
            any.iter().map(|_| std::thread::spawn(keeping).join().unwrap()).unzip();
        kept.sort();
        assert_eq!(kept.concat(), any);
        assert!(begun.iter().all(|begun| *begun == any));
    }

    #[test]
    fn one_thread_gives_way_and_no_other() {
        let before = nice().unwrap();
        let nicer = nicer().unwrap();
        assert!(nicer > before || before == NICEST);
        let there = std::thread::spawn(move || {
            give_way(nicer);
            nice().unwrap()
        });
        assert_eq!(there.join().unwrap(), nicer);
        take_short_slices();
        assert_eq!(nice().unwrap(), before);
    }
}
