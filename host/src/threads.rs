//! What threads ask of Linux's scheduler (EEVDF), so that acknowledgements go out in
//! time on a full machine.
//!
//! Nice: a thread that works long on what nobody waits for takes a tenth of the share of
//! the others where all want to run.
//! Turns: a thread that works long offers its core now and then. One that waits for it
//! has it at the next tick otherwise, slice or not, even with a core idle beside.
//! Short slices, where `runtime.short_slices` asks for them: a thread that is woken comes
//! before one with longer slices at once, and before one with slices as short as its own
//! within such a slice. Otherwise it may wait for the next tick, up to 4 ms. They say
//! nothing of shares.
//!
//! No thread is bound to a core: one that is cannot leave it to a neighbour's work.

use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{getpriority_process, setpriority_process};
use rustix::thread::{gettid, sched_yield};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the host's threads ask of the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Ask for short time slices (0.1 ms) for the threads that acknowledge messages, so that they wait
    /// less while another process uses the core. Other processes on the machine are interrupted more
    /// often. Needs Linux 6.12 or later, and has no effect on earlier versions.
    pub short_slices: bool,
}

/// The shortest there are (Linux 6.12 and later; earlier ones have none of a thread's own).
const SLICE: Duration = Duration::from_micros(100);
/// Of work that others wait for in small parts: it offers its core once a slice.
pub const SHORT_TURN: Duration = SLICE;
/// Of work that is the cheaper the more of it is done in one go.
pub const LONG_TURN: Duration = Duration::from_millis(1);
const NICER: i32 = 10;
const NICEST: i32 = 19;

static SHORT_SLICES: AtomicBool = AtomicBool::new(false);

/// For all threads of this process that begin from now on.
pub fn configure(config: &Config) {
    SHORT_SLICES.store(config.short_slices, Ordering::Relaxed);
}

/// Acknowledgements wait for this thread, or it is not to keep them waiting.
pub fn take_short_slices() {
    or_say(nice().and_then(set));
}

/// How nice threads are that give way to the one that calls.
pub fn nicer() -> io::Result<i32> {
    Ok((nice()? + NICER).min(NICEST))
}

/// How nice the threads are that run steps: between those that acknowledge and those
/// of the background. `None` where the system does not say.
pub fn nice_of_workers() -> Option<i32> {
    nice().ok().map(|nice| (nice + NICER / 2).min(NICEST))
}

/// This thread gives way to others.
pub fn give_way(nice: i32) {
    or_say(set(nice));
}

thread_local! {
    static TURN_BEGAN: Cell<Option<Instant>> = const { Cell::new(None) };
}

pub fn spawn<T: Send + 'static>(
    name: String,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    std::thread::Builder::new().name(name).spawn(work)
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
    if SHORT_SLICES.load(Ordering::Relaxed) {
        set_slice(nice)
    } else {
        Ok(setpriority_process(Some(gettid()), nice)?)
    }
}

/// Threads that a library begins from this one have what every other thread has
/// (`SCHED_FLAG_RESET_ON_FORK`).
fn set_slice(nice: i32) -> io::Result<()> {
    let attributes = libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: libc::SCHED_OTHER as u32,
        sched_flags: libc::SCHED_FLAG_RESET_ON_FORK as u64,
        sched_nice: nice,
        sched_priority: 0,
        sched_runtime: SLICE.as_nanos() as u64,
        sched_deadline: 0,
        sched_period: 0,
    };
    let (this_thread, no_flags) = (0, 0);
    // SAFETY: it takes no pointer.
    #[allow(unsafe_code)]
    let policy = unsafe { libc::sched_getscheduler(this_thread) };
    if policy != libc::SCHED_OTHER {
        return Err(io::Error::other("somebody gave it another scheduling policy"));
    }
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

    /// Of this thread, as the kernel has it.
    fn slice() -> u64 {
        // SAFETY: all its fields are numbers.
        #[allow(unsafe_code)]
        let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
        let size = size_of::<libc::sched_attr>();
        // SAFETY: the call writes at most `size` bytes to `attributes`.
        #[allow(unsafe_code)]
        let read = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) };
        assert_eq!(read, 0);
        attributes.sched_runtime
    }

    #[test]
    fn a_slice_is_as_the_kernel_has_it_unless_configured_and_no_other_thread_inherits_it() {
        let slices = |config: Config| {
            std::thread::spawn(move || {
                configure(&config);
                take_short_slices();
                configure(&Config::default());
                (slice(), std::thread::spawn(slice).join().unwrap())
            })
            .join()
            .unwrap()
        };
        let ordinary = slice();
        assert_eq!(slices(Config::default()), (ordinary, ordinary));
        let (own, begun) = slices(Config { short_slices: true });
        assert_eq!(begun, ordinary);
        // Kernels before 6.12 know no slice of a thread's own.
        assert!(own == ordinary || own == SLICE.as_nanos() as u64, "{own}");
    }

    #[test]
    fn no_thread_is_bound_to_a_core() {
        use rustix::thread::sched_getaffinity;
        let all = sched_getaffinity(None).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .on_thread_start(take_short_slices)
            .on_thread_unpark(begin_turn)
            .build()
            .unwrap();
        let there = runtime.spawn(async { sched_getaffinity(None).unwrap() });
        assert_eq!(runtime.block_on(there).unwrap(), all);
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
