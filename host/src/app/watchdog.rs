//! Ends a process whose runtime makes no progress: a supervisor can start a process
//! again that ended, and not one that hangs.
//!
//! A thread that is none of the runtime's gives each runtime a heartbeat, a task of no
//! work, once a tick, and counts the ticks that none of the runtime's threads took it up.
//! It counts its own ticks and asks no clock, so that a process that was stopped
//! (SIGSTOP, a suspended machine) continues where it was.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use tokio::runtime::Handle;

use crate::{telemetry, threads};

const TICK: Duration = Duration::from_secs(1);
/// Ticks without a heartbeat after which a runtime counts as hung.
const TICKS_MAX: u32 = 30;
/// Time to say why the process ends; the hung threads may hold what the log needs.
const SAY_MAX: Duration = if cfg!(test) { Duration::from_millis(50) } else { Duration::from_secs(1) };
/// The exit status of a panic: both are bugs.
const HUNG: i32 = 101;

/// Watches `runtimes`, each with its name, until the process ends.
pub fn start(runtimes: Vec<(&'static str, Handle)>) -> io::Result<()> {
    start_with(runtimes, || thread::sleep(TICK))
}

fn start_with(runtimes: Vec<(&'static str, Handle)>, tick: impl Fn() + Send + 'static) -> io::Result<()> {
    threads::spawn("watchdog".to_owned(), move || {
        let name = watch(&runtimes, tick);
        let said = threads::spawn("watchdog-log".to_owned(), move || {
            let s = TICK.as_secs() * u64::from(TICKS_MAX);
            tracing::error!(
                "the {name} threads have done nothing for {s} s: this is a bug in headworks, the process ends"
            );
        });
        let mut waits = SAY_MAX;
        while said.as_ref().is_ok_and(|said| !said.is_finished()) && !waits.is_zero() {
            let wait = Duration::from_millis(10);
            thread::sleep(wait);
            waits = waits.saturating_sub(wait);
        }
        telemetry::exit(HUNG);
    })?;
    Ok(())
}

/// Returns the name of the first runtime that hangs.
fn watch(runtimes: &[(&'static str, Handle)], tick: impl Fn()) -> &'static str {
    let mut pulses: Vec<Pulse> = runtimes.iter().map(|_| Pulse::default()).collect();
    loop {
        for ((name, runtime), pulse) in runtimes.iter().zip(&mut pulses) {
            if pulse.missed >= TICKS_MAX {
                return name;
            }
            if let Some(beat) = pulse.next() {
                runtime.spawn(async move { beat.store(true, Ordering::Release) });
            }
        }
        tick();
    }
}

/// The heartbeats of one runtime.
#[derive(Default)]
struct Pulse {
    /// Set once the runtime took up the heartbeat.
    beat: Option<Arc<AtomicBool>>,
    missed: u32,
}

impl Pulse {
    /// Counts a tick; returns the next heartbeat where the last one was taken up.
    fn next(&mut self) -> Option<Arc<AtomicBool>> {
        if self.beat.as_ref().is_some_and(|beat| !beat.load(Ordering::Acquire)) {
            self.missed += 1;
            return None;
        }
        self.missed = 0;
        Some(Arc::clone(self.beat.insert(Arc::default())))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_runtime_whose_threads_all_hang_is_named_and_one_that_works_is_not() {
        let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
        let (works, hangs) = (runtime(), runtime());
        let (release, held) = mpsc::channel::<()>();
        let (begun, begins) = mpsc::channel();
        hangs.spawn(async move {
            begun.send(()).unwrap();
            let _ = held.recv();
        });
        begins.recv().unwrap();
        let ticks = Cell::new(0);
        let tick = || {
            // A tick is as long as the runtime that works needs for one more task.
            works.block_on(works.spawn(async {})).unwrap();
            ticks.set(ticks.get() + 1);
        };
        let runtimes = [("working", works.handle().clone()), ("hung", hangs.handle().clone())];
        assert_eq!(watch(&runtimes, tick), "hung");
        assert_eq!(ticks.get(), TICKS_MAX + 1);
        drop(release);
    }

    #[test]
    fn a_process_that_hangs_ends_with_101_though_its_log_hangs_too() {
        const HANGS: &str = "HEADWORKS_TEST_HANGS";
        if std::env::var_os(HANGS).is_some() {
            let hang = || -> Vec<u8> {
                loop {
                    thread::park();
                }
            };
            tracing_subscriber::fmt().with_writer(hang).init();
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
            runtime.spawn(async {
                loop {
                    thread::park();
                }
            });
            println!("it hangs");
            start_with(vec![("runtime", runtime.handle().clone())], thread::yield_now).unwrap();
            loop {
                thread::park();
            }
        }
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        let test = "app::watchdog::tests::a_process_that_hangs_ends_with_101_though_its_log_hangs_too";
        child.args(["--exact", test, "--nocapture"]).env(HANGS, "1");
        let ended = child.output().unwrap();
        let said = String::from_utf8_lossy(&ended.stdout);
        // A test that fails ends with 101 too, and says so.
        assert!(said.contains("it hangs") && !said.contains("FAILED"), "{said}");
        assert_eq!(ended.status.code(), Some(HUNG));
    }

    #[test]
    fn only_ticks_in_a_row_count() {
        let mut pulse = Pulse::default();
        for _ in 0..3 {
            let beat = pulse.next().unwrap();
            for missed in 1..TICKS_MAX {
                assert!(pulse.next().is_none());
                assert_eq!(pulse.missed, missed);
            }
            beat.store(true, Ordering::Release);
        }
    }
}
