//! What a test awaits of other processes, by the kernel's own events: a file
//! that changes (inotify(7)), a process that ends (pidfd_open(2)). The state is
//! looked at once the watch is set and after each event, never by the clock.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

#[derive(Debug)]
pub struct Events {
    files: OwnedFd,
    process: Option<OwnedFd>,
}

impl Events {
    /// Of these files, and of what lies right in these folders; all are there.
    pub fn of_files<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>) -> Self {
        let files = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).expect("inotify");
        let what = WatchFlags::MODIFY | WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::DELETE;
        for path in paths {
            let path = path.as_ref();
            inotify::add_watch(&files, path, what)
                .unwrap_or_else(|error| panic!("cannot watch {}: {error}", path.display()));
        }
        Self { files, process: None }
    }

    /// The state is for this child to bring about: its end, too, is an event, and the last.
    pub fn while_runs(self, process: u32) -> Self {
        Self { process: Some(handle(process).expect("a child that was not waited for")), ..self }
    }

    /// Waits until `look` finds something; fails past the deadline.
    pub fn until<T>(&self, what: &str, at_most: Duration, mut look: impl FnMut() -> Option<T>) -> T {
        let deadline = Instant::now() + at_most;
        loop {
            // Before the look: what comes during it is an event for the next one.
            let has_ended = self.process.as_ref().is_some_and(|process| is_ready(process, Duration::ZERO));
            if let Some(found) = look() {
                return found;
            }
            assert!(!has_ended, "{what}: the process ended before");
            let mut fds = vec![PollFd::new(&self.files, PollFlags::IN)];
            fds.extend(self.process.iter().map(|process| PollFd::new(process, PollFlags::IN)));
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(wait(&mut fds, left), "{what}: not within {at_most:?}");
            self.take_all();
        }
    }

    fn take_all(&self) {
        let mut events = [0; 16 << 10];
        while rustix::io::read(&self.files, &mut events).is_ok_and(|bytes| bytes > 0) {}
    }
}

/// Waits for the end of a process; false past `at_most`.
pub fn ended(process: u32, at_most: Duration) -> bool {
    handle(process).is_none_or(|process| is_ready(&process, at_most))
}

/// `None` where there is no such process, or no longer.
fn handle(process: u32) -> Option<OwnedFd> {
    let pid = Pid::from_raw(process.cast_signed()).expect("a process's id is not 0");
    match pidfd_open(pid, PidfdFlags::empty()) {
        Err(Errno::SRCH) => None,
        opened => Some(opened.expect("Linux 5.3 or newer")),
    }
}

fn is_ready(fd: &OwnedFd, at_most: Duration) -> bool {
    wait(&mut [PollFd::new(fd, PollFlags::IN)], at_most)
}

/// False where nothing came in time.
fn wait(fds: &mut [PollFd<'_>], at_most: Duration) -> bool {
    let deadline = Instant::now() + at_most;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match poll(fds, Some(&left)) {
            Err(Errno::INTR) => {}
            ready => return ready.expect("open descriptors") > 0,
        }
    }
}
