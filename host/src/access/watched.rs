//! A file that is read again when it changes. A new version that cannot be used
//! leaves the old one in place, and is reported.
//!
//! A file that is being written is left alone until it has been quiet for [`QUIET`].
//! A small file then counts at once ([`Watched::get`]). One that takes long to read is
//! read aside, and until that is done the old version answers ([`Watched::ready`]);
//! its first version is waited for ([`Opening`]).

use std::fmt;
use std::fs::Metadata;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;
use tokio::time::timeout;

use crate::telemetry::Failures;
use crate::threads;

/// Between the last write and the first look at what was written.
const QUIET: Duration = Duration::from_millis(300);
/// A version that could not be used is tried again when it is asked for then,
/// although the file is the same: the reason may have passed.
const RETRY_AFTER: Duration = Duration::from_secs(30);

pub struct Watched<T> {
    path: PathBuf,
    bytes_max: u64,
    parse: Box<Parse<T>>,
    failures: Failures,
    seen: Mutex<(Signature, Arc<T>)>,
    retry_at: Mutex<Option<Instant>>,
    /// Held by who reads a changed file; comes before `seen`.
    reading: Mutex<()>,
    is_read_aside: AtomicBool,
}

type Parse<T> = dyn Fn(&[u8]) -> Result<T, String> + Send + Sync;

#[derive(Clone, Copy, PartialEq, Eq)]
struct Signature {
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl<T> Watched<T> {
    /// Reads the file; errors name it.
    pub fn open(
        path: &Path,
        bytes_max: u64,
        failures: Failures,
        parse: impl Fn(&[u8]) -> Result<T, String> + Send + Sync + 'static,
    ) -> Result<Self, String> {
        let (signature, value) = read(path, bytes_max, &parse)?;
        Ok(Self {
            path: path.to_owned(),
            bytes_max,
            parse: Box::new(parse),
            failures,
            seen: Mutex::new((signature, Arc::new(value))),
            retry_at: Mutex::default(),
            reading: Mutex::default(),
            is_read_aside: AtomicBool::new(false),
        })
    }

    /// What the file says now. Blocks on the disk.
    pub fn get(&self) -> Arc<T> {
        let renewed = self.renew();
        self.tell(renewed);
        self.newest()
    }

    /// Whether the file says something else than `seen`, which becomes what it says. Blocks on the disk.
    pub fn refresh(&self, seen: &Mutex<Arc<T>>) -> bool {
        let now = self.get();
        let before = std::mem::replace(&mut *lock(seen), now.clone());
        !Arc::ptr_eq(&before, &now)
    }

    /// Reads it if it changed; whether it did.
    fn renew(&self) -> Result<bool, String> {
        if self.whole_change().is_none() {
            return Ok(false);
        }
        let _one_at_a_time = lock(&self.reading);
        let Some(change) = self.whole_change() else { return Ok(false) };
        let version = read(&self.path, self.bytes_max, &self.parse);
        *lock(&self.retry_at) = version.is_err().then(|| Instant::now() + RETRY_AFTER);
        let mut seen = lock(&self.seen);
        match (version, change) {
            (Ok((signature, value)), _) => *seen = (signature, Arc::new(value)),
            (Err(reason), Change::Gone) => return Err(reason),
            (Err(reason), Change::To(signature)) => {
                // Not looked into again until it changes once more, or the time for that has come.
                seen.0 = signature;
                return Err(reason);
            }
        }
        Ok(true)
    }

    fn tell(&self, renewed: Result<bool, String>) {
        match renewed {
            Ok(false) => {}
            Ok(true) => tracing::info!(file = %self.path.display(), "access: a changed file is in force"),
            Err(reason) => {
                let kind = format!("access: a changed file cannot be used: {reason}");
                self.failures.report(&kind, 1, "what it said before stays in force", "");
            }
        }
    }

    /// What it said when it was looked at last.
    pub fn newest(&self) -> Arc<T> {
        lock(&self.seen).1.clone()
    }

    fn change(&self) -> Option<Change> {
        match std::fs::metadata(&self.path) {
            Ok(found) => {
                let now = Signature::of(&found);
                let is_due = lock(&self.retry_at).is_some_and(|at| Instant::now() >= at);
                let is_changed = now != lock(&self.seen).0;
                (is_due || is_changed).then_some(Change::To(now))
            }
            Err(_) => Some(Change::Gone),
        }
    }

    /// A change that nobody is still writing.
    fn whole_change(&self) -> Option<Change> {
        self.change().filter(|change| match change {
            Change::To(signature) => signature.is_whole(),
            Change::Gone => true,
        })
    }
}

impl<T: Send + Sync + 'static> Watched<T> {
    /// The newest version that was read. A change is read on a thread of its own, which
    /// waits until nobody writes the file any more.
    pub fn ready(self: &Arc<Self>) -> Arc<T> {
        if self.change().is_some() && !self.is_read_aside.swap(true, Ordering::AcqRel) {
            let watched = self.clone();
            let read = move || {
                while watched.change().is_some() && watched.whole_change().is_none() {
                    thread::sleep(QUIET);
                }
                let renewed = watched.renew();
                watched.is_read_aside.store(false, Ordering::Release);
                watched.tell(renewed);
            };
            if let Err(error) = threads::spawn("access-file".to_owned(), read) {
                self.is_read_aside.store(false, Ordering::Release);
                self.tell(Err(format!("{}: no thread to read it: {error}", self.path.display())));
            }
        }
        self.newest()
    }
}

/// A [`Watched`] file whose first version is read on a thread of its own.
pub struct Opening<T> {
    open: Box<Open<T>>,
    failures: Failures,
    opened: OnceLock<Arc<Watched<T>>>,
    is_running: watch::Sender<bool>,
    failed_at: Mutex<Option<Instant>>,
}

type Open<T> = dyn Fn() -> Result<Watched<T>, String> + Send + Sync;

impl<T: Send + Sync + 'static> Opening<T> {
    pub fn begin(
        failures: Failures,
        open: impl Fn() -> Result<Watched<T>, String> + Send + Sync + 'static,
    ) -> Arc<Self> {
        let opening = Arc::new(Self {
            open: Box::new(open),
            failures,
            opened: OnceLock::new(),
            is_running: watch::Sender::new(false),
            failed_at: Mutex::default(),
        });
        opening.run();
        opening
    }

    /// Waits for the first version while it is being read; `None` where there is none.
    pub async fn opened(self: &Arc<Self>, wait_max: Duration) -> Option<Arc<Watched<T>>> {
        if self.opened.get().is_none() {
            if lock(&self.failed_at).is_some_and(|at| at.elapsed() >= RETRY_AFTER) {
                self.run();
            }
            // Late: there is none yet.
            let _ = timeout(wait_max, self.is_running.subscribe().wait_for(|running| !running)).await;
        }
        self.opened.get().cloned()
    }

    fn run(self: &Arc<Self>) {
        if !self.is_running.send_if_modified(|running| !std::mem::replace(running, true)) {
            return;
        }
        let opening = self.clone();
        let read = move || {
            match (opening.open)() {
                Ok(watched) => drop(opening.opened.set(Arc::new(watched))),
                Err(reason) => opening.failed(&reason),
            }
            opening.is_running.send_replace(false);
        };
        if let Err(error) = threads::spawn("access-file".to_owned(), read) {
            self.failed(&format!("no thread to read it: {error}"));
            self.is_running.send_replace(false);
        }
    }

    fn failed(&self, reason: &str) {
        *lock(&self.failed_at) = Some(Instant::now());
        let kind = format!("access: a file cannot be used: {reason}");
        self.failures.report(&kind, 1, "clients that it knows are refused until it can", "");
    }
}

/// Since the file was read.
enum Change {
    To(Signature),
    Gone,
}

impl Signature {
    fn of(found: &Metadata) -> Self {
        Self {
            inode: found.ino(),
            bytes: found.len(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        }
    }

    /// Nobody writes it any more: it was renamed, or given its mode, after its last byte was written;
    /// or nothing has been written for a while. A time stamp to come tells nothing.
    fn is_whole(&self) -> bool {
        let (s, ns) = self.modified;
        let modified = Duration::new(u64::try_from(s).unwrap_or(0), u32::try_from(ns).unwrap_or(0));
        let quiet = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH + modified);
        self.modified != self.changed || quiet.map_or(true, |quiet| quiet >= QUIET)
    }
}

impl<T> fmt::Debug for Watched<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched").field("path", &self.path).finish_non_exhaustive()
    }
}

fn read<T>(
    path: &Path,
    bytes_max: u64,
    parse: &dyn Fn(&[u8]) -> Result<T, String>,
) -> Result<(Signature, T), String> {
    let named = |reason: String| format!("{}: {reason}", path.display());
    let file = std::fs::File::open(path).map_err(|error| named(error.to_string()))?;
    // Of the open file, before its bytes: a change meanwhile is seen as one.
    let signature = Signature::of(&file.metadata().map_err(|error| named(error.to_string()))?);
    let mut bytes = Vec::new();
    file.take(bytes_max + 1).read_to_end(&mut bytes).map_err(|error| named(error.to_string()))?;
    if bytes.len() as u64 > bytes_max {
        return Err(named(format!("must have at most {bytes_max} bytes")));
    }
    Ok((signature, parse(&bytes).map_err(named)?))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes a file that counts at once: its last write was long ago.
#[cfg(test)]
pub fn put(path: &Path, content: impl AsRef<[u8]>) {
    std::fs::write(path, content).unwrap();
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_modified(SystemTime::now() - 2 * QUIET).unwrap();
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn the_old_version_answers_until_the_new_one_is_ready() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "old").unwrap();
        let ((begun, begins), (go_on, goes_on)) = (channel(), channel());
        let goes_on = Mutex::new(goes_on);
        let parse = move |bytes: &[u8]| {
            if bytes != b"old" {
                begun.send(()).unwrap();
                goes_on.lock().unwrap().recv().unwrap();
            }
            Ok(bytes.to_vec())
        };
        let watched = Arc::new(Watched::open(&file, 100, Failures::default(), parse).unwrap());
        put(&file, "newer");
        assert_eq!(*watched.ready(), b"old");
        begins.recv().unwrap();
        assert_eq!(*watched.ready(), b"old", "while the new one is read");
        go_on.send(()).unwrap();
        assert_eq!(*watched.get(), b"newer", "once it was read");
        assert_eq!(*watched.ready(), b"newer");
    }

    #[test]
    fn a_file_that_is_being_written_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "whole").unwrap();
        let watched = Watched::open(&file, 100, Failures::default(), |bytes| Ok(bytes.to_vec())).unwrap();
        // Half of it is there; a time stamp of a moment ago says so.
        std::fs::write(&file, "ha").unwrap();
        let is_fresh = || std::fs::metadata(&file).unwrap().modified().unwrap().elapsed().unwrap() < QUIET;
        let seen = watched.get();
        assert!(!is_fresh() || *seen == b"whole");
        std::fs::write(folder.path().join("new"), "half").unwrap();
        put(&folder.path().join("new"), "renamed");
        std::fs::rename(folder.path().join("new"), &file).unwrap();
        assert_eq!(*watched.get(), b"renamed");
    }
}
