//! Lines on their way to stderr.
//!
//! A thread of its own writes them, so that a reader of stderr that stops (a terminal with Ctrl-S, a
//! pager, a stuck log driver) blocks no thread that logs. Lines wait in a buffer with a bound; a line
//! that finds no room is dropped and counted.

use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use crate::threads;

/// Bytes of lines that wait; as many again are with the thread that writes.
const LINES_BYTES_MAX: usize = 1 << 20;
/// Time that the end of the process waits for lines that are not written yet.
const FLUSH_MAX: Duration = Duration::from_secs(1);
/// Pause before another write to a stderr that is set to nonblocking and full.
const WRITE_AGAIN_AFTER: Duration = Duration::from_millis(10);

static TO_STDERR: OnceLock<LogQueue> = OnceLock::new();

/// Starts the thread that writes this process's log lines, and returns where they wait for it.
pub(super) fn to_stderr() -> io::Result<&'static LogQueue> {
    let queue = TO_STDERR.get_or_init(LogQueue::default);
    threads::spawn("log".to_owned(), move || {
        queue.run(&mut Stderr, |lines| {
            tracing::warn!(lines, "log lines were dropped while the reader of stderr did not keep up");
        });
    })?;
    Ok(queue)
}

/// Writes text to stderr behind the log lines that wait; where no log was set up, at once.
pub fn say(text: &str) {
    match TO_STDERR.get() {
        Some(queue) => queue.push(text.as_bytes()),
        // Where stderr takes nothing the exit code says it alone.
        None => {
            let _ = io::stderr().write_all(text.as_bytes());
        }
    }
}

/// Waits until all log lines are written, for a second at the most.
pub fn flush_logs() {
    if let Some(queue) = TO_STDERR.get() {
        queue.flush(FLUSH_MAX);
    }
}

/// Ends the process once its log lines are written, or cannot be.
pub fn exit(code: i32) -> ! {
    flush_logs();
    std::process::exit(code)
}

/// Returns how many log lines were dropped since the start of the process.
pub(super) fn dropped_lines() -> u64 {
    TO_STDERR.get().map_or(0, |queue| queue.lock().dropped)
}

#[derive(Default)]
pub(super) struct LogQueue {
    lines: Mutex<Lines>,
    changed: Condvar,
}

#[derive(Default)]
struct Lines {
    waiting: Vec<u8>,
    /// The thread has taken lines that it has not written yet.
    is_writing: bool,
    dropped: u64,
    /// How many of the dropped lines the log has told of.
    told: u64,
}

impl LogQueue {
    /// Adds whole lines, or drops them.
    fn push(&self, text: &[u8]) {
        let mut lines = self.lock();
        if lines.waiting.len() + text.len() > LINES_BYTES_MAX {
            lines.dropped += count(text);
            return;
        }
        lines.waiting.extend_from_slice(text);
        drop(lines);
        self.changed.notify_all();
    }

    /// Writes lines for as long as the process runs. Calls `tell` with the number of lines that were
    /// dropped behind those that it has taken to write.
    fn run(&self, to: &mut impl Write, tell: impl Fn(u64)) {
        let mut taken = Vec::new();
        let mut can_write = true;
        loop {
            taken.clear();
            let untold = self.take(&mut taken, can_write);
            // There is room for the line that tells it.
            if untold > 0 {
                tell(untold);
            }
            let unwritten = write(to, &taken);
            can_write = unwritten.is_empty();
            let mut lines = self.lock();
            lines.is_writing = false;
            lines.dropped += count(unwritten);
            drop(lines);
            self.changed.notify_all();
        }
    }

    /// Waits for lines and takes all. Returns how many dropped lines are to be told of: none where lines
    /// cannot be written, since a line that tells of them would be one of those.
    fn take(&self, taken: &mut Vec<u8>, can_write: bool) -> u64 {
        let waits = |lines: &mut Lines| lines.waiting.is_empty();
        let lines = self.changed.wait_while(self.lock(), waits);
        let mut lines = lines.unwrap_or_else(PoisonError::into_inner);
        std::mem::swap(&mut lines.waiting, taken);
        lines.is_writing = true;
        if !can_write {
            return 0;
        }
        let untold = lines.dropped - lines.told;
        lines.told = lines.dropped;
        untold
    }

    /// Returns whether all lines are written within `wait_max`.
    fn flush(&self, wait_max: Duration) -> bool {
        let waits = |lines: &mut Lines| lines.is_writing || !lines.waiting.is_empty();
        let waited = self.changed.wait_timeout_while(self.lock(), wait_max, waits);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes the lines of a subscriber, each in one write.
impl Write for &LogQueue {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        self.push(lines);
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Returns the bytes that could not be written.
fn write<'b>(to: &mut impl Write, mut bytes: &'b [u8]) -> &'b [u8] {
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(written) if written > 0 => bytes = &bytes[written..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(WRITE_AGAIN_AFTER),
            _ => break,
        }
    }
    bytes
}

fn count(lines: &[u8]) -> u64 {
    lines.iter().filter(|byte| **byte == b'\n').count() as u64
}

/// Standard error without the lock of [`io::Stderr`], which a write that blocks would keep.
struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(io::stderr().as_fd(), bytes)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, mpsc};

    use super::*;

    /// A reader that takes one write for each permit, and none once there are no more permits.
    struct Reader {
        begun: mpsc::Sender<()>,
        permits: mpsc::Receiver<()>,
        read: mpsc::Sender<Vec<u8>>,
    }

    impl Write for Reader {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.begun.send(());
            self.permits.recv().map_err(|_| ErrorKind::BrokenPipe)?;
            let _ = self.read.send(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_stops_blocks_nobody_who_logs_and_is_told_what_it_missed() {
        let queue = Arc::new(LogQueue::default());
        let (begun, begins) = mpsc::channel();
        let (permit, permits) = mpsc::channel();
        let (read, reads) = mpsc::channel();
        let (tell, told) = mpsc::channel();
        let writes = Arc::clone(&queue);
        threads::spawn("log".to_owned(), move || {
            writes.run(&mut Reader { begun, permits, read }, |lines| tell.send(lines).unwrap());
        })
        .unwrap();
        let line = [&[b'x'; 1_023][..], b"\n"].concat();
        queue.push(&line);
        begins.recv().unwrap();
        for _ in 0..LINES_BYTES_MAX / line.len() + 7 {
            queue.push(&line);
        }
        assert_eq!(queue.lock().dropped, 7);
        assert!(!queue.flush(Duration::ZERO), "what the reader has not taken is not written");
        permit.send(()).unwrap();
        assert_eq!((reads.recv().unwrap().len(), told.recv().unwrap()), (line.len(), 7));
        permit.send(()).unwrap();
        assert_eq!(reads.recv().unwrap().len(), LINES_BYTES_MAX);
        assert!(queue.flush(Duration::MAX));
        drop(permit);
        queue.push(&line);
        assert!(queue.flush(Duration::MAX), "a reader that is gone is not waited for");
        assert!(
            told.try_recv().is_err() && queue.lock().dropped == 8,
            "nobody could read that it missed one"
        );
    }
}
