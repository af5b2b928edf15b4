//! A file that is read again when it changes. A new version that cannot be used leaves the old one in
//! place, and is reported.
//!
//! Only one thread for each file touches the disk, so that a disk that does not answer blocks no other
//! thread. A caller waits for a check by that thread for at most [`LOOK_MAX`] ([`Watched::get`]), or not
//! at all ([`Watched::ready`]), and receives the newest version. A file that is being written is not
//! read until it has been unchanged for [`QUIET`]. If the first version takes long to read, callers wait
//! for it ([`Opening`]).

use std::fmt;
use std::fs::Metadata;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;
use tokio::time::timeout;

use crate::files;
use crate::telemetry::Failures;
use crate::threads;

/// Time between the last write to a file and the first check of its contents.
const QUIET: Duration = Duration::from_millis(300);
/// Longest time that a caller waits for a check. While a check takes longer, no caller waits for it.
const LOOK_MAX: Duration = if cfg!(test) { Duration::from_secs(10) } else { Duration::from_secs(1) };
/// Time after which a version that could not be used is tried again on request, although the file is the
/// same, because the reason may be gone.
const RETRY_AFTER: Duration = Duration::from_secs(30);

pub struct Watched<T> {
    shared: Arc<Shared<T>>,
    look_max: Duration,
}

/// State that the thread and the callers share.
struct Shared<T> {
    path: PathBuf,
    bytes_max: u64,
    parse: Box<Parse<T>>,
    failures: Failures,
    newest: Mutex<Arc<T>>,
    looks: Mutex<Looks>,
    /// Wakes waiters on `looks` when a check is requested or finished.
    moved: Condvar,
}

#[derive(Default)]
struct Looks {
    asked: u64,
    done: u64,
    begun: Option<Instant>,
    ended: Option<Instant>,
    /// Whether a check was requested too soon after the last one; another one follows after [`QUIET`].
    again: bool,
    is_over: bool,
}

type Parse<T> = dyn Fn(&[u8]) -> Result<T, String> + Send + Sync;

#[derive(Clone, Copy, PartialEq, Eq)]
struct Signature {
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl<T: Send + Sync + 'static> Watched<T> {
    /// Reads the file. Errors name it.
    pub fn open(
        path: &Path,
        bytes_max: u64,
        failures: Failures,
        parse: impl Fn(&[u8]) -> Result<T, String> + Send + Sync + 'static,
    ) -> Result<Self, String> {
        let (signature, value) = read(path, bytes_max, &parse)?;
        let shared = Arc::new(Shared {
            path: path.to_owned(),
            bytes_max,
            parse: Box::new(parse),
            failures,
            newest: Mutex::new(Arc::new(value)),
            looks: Mutex::default(),
            moved: Condvar::new(),
        });
        let reader = Reader { shared: shared.clone(), signature, retry_at: None };
        threads::spawn("access-file".to_owned(), move || reader.run())
            .map_err(|error| format!("{}: no thread to read it: {error}", path.display()))?;
        Ok(Self { shared, look_max: LOOK_MAX })
    }
}

impl<T> Watched<T> {
    /// Returns the file's current contents, or those at the last check that ended in time. Blocks until
    /// a check is done.
    pub fn get(&self) -> Arc<T> {
        let looks = self.shared.ask();
        let number = looks.asked;
        let waits_for =
            self.look_max.saturating_sub(looks.begun.map_or(Duration::ZERO, |begun| begun.elapsed()));
        let is_open = |looks: &mut Looks| looks.done < number;
        drop(self.shared.moved.wait_timeout_while(looks, waits_for, is_open));
        self.newest()
    }

    /// Returns the file's contents at the last check, and requests another check, at most once in
    /// [`QUIET`].
    pub fn ready(&self) -> Arc<T> {
        let mut looks = lock(&self.shared.looks);
        if looks.asked == looks.done {
            match looks.ended.is_none_or(|ended| ended.elapsed() >= QUIET) {
                true => looks.asked += 1,
                false => looks.again = true,
            }
            self.shared.moved.notify_all();
        }
        drop(looks);
        self.newest()
    }

    /// Returns the file's contents at the last check.
    pub fn newest(&self) -> Arc<T> {
        lock(&self.shared.newest).clone()
    }

    /// Returns whether the file's contents differ from `seen`, which is set to them. Blocks until a
    /// check is done.
    pub fn refresh(&self, seen: &Mutex<Arc<T>>) -> bool {
        let now = self.get();
        let before = std::mem::replace(&mut *lock(seen), now.clone());
        !Arc::ptr_eq(&before, &now)
    }
}

impl<T> Drop for Watched<T> {
    fn drop(&mut self) {
        lock(&self.shared.looks).is_over = true;
        self.shared.moved.notify_all();
    }
}

impl<T> Shared<T> {
    fn ask(&self) -> MutexGuard<'_, Looks> {
        let mut looks = lock(&self.looks);
        looks.asked += 1;
        self.moved.notify_all();
        looks
    }
}

/// The thread that reads the file.
struct Reader<T> {
    shared: Arc<Shared<T>>,
    signature: Signature,
    retry_at: Option<Instant>,
}

impl<T> Reader<T> {
    fn run(mut self) {
        let shared = self.shared.clone();
        let mut is_being_written = false;
        loop {
            let mut looks = lock(&shared.looks);
            let is_idle = |looks: &mut Looks| !looks.is_over && looks.asked == looks.done;
            if !is_being_written {
                let waits = |looks: &mut Looks| is_idle(looks) && !looks.again;
                looks = shared.moved.wait_while(looks, waits).unwrap_or_else(PoisonError::into_inner);
            }
            let waited = shared.moved.wait_timeout_while(looks, QUIET, is_idle);
            let mut looks = waited.unwrap_or_else(PoisonError::into_inner).0;
            looks.again = false;
            if looks.is_over {
                return;
            }
            let number = looks.asked;
            looks.begun = Some(Instant::now());
            drop(looks);
            let looking = shared.failures.look_at(&shared.path);
            is_being_written = self.look();
            drop(looking);
            let mut looks = lock(&shared.looks);
            looks.done = number;
            looks.begun = None;
            looks.ended = Some(Instant::now());
            drop(looks);
            shared.moved.notify_all();
        }
    }

    /// Reads the file if it has changed. Returns whether it is still being written.
    fn look(&mut self) -> bool {
        let change = self.change();
        if let Some(Change::To(signature)) = &change
            && !signature.is_whole()
        {
            return true;
        }
        if let Some(change) = change {
            self.renew(&change);
        }
        false
    }

    fn renew(&mut self, change: &Change) {
        let shared = &self.shared;
        let version = read(&shared.path, shared.bytes_max, &shared.parse);
        self.retry_at = version.is_err().then(|| Instant::now() + RETRY_AFTER);
        match version {
            Ok((signature, value)) => {
                self.signature = signature;
                *lock(&shared.newest) = Arc::new(value);
                shared.failures.reloaded(&shared.path);
                tracing::info!(file = %shared.path.display(), "access: a changed file is in use");
            }
            Err(reason) => {
                // Not looked into again until it changes once more, or the time for that has come.
                if let Change::To(signature) = change {
                    self.signature = *signature;
                }
                shared.failures.reload_refused(&shared.path, &reason);
                let kind = format!("access: a changed file cannot be used: {reason}");
                shared.failures.report(&kind, 1, "the previous contents stay in use", "");
            }
        }
    }

    fn change(&self) -> Option<Change> {
        match std::fs::metadata(&self.shared.path) {
            Ok(found) => {
                let now = Signature::of(&found);
                let is_due = self.retry_at.is_some_and(|at| Instant::now() >= at);
                (is_due || now != self.signature).then_some(Change::To(now))
            }
            Err(_) => Some(Change::Gone),
        }
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

    /// Waits for the first version while it is being read. Returns `None` if there is none.
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

/// A change of the file since it was read.
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

    /// Returns whether writing has ended: the file was renamed, or given its mode, after its last byte
    /// was written, or it has not been written for a while. A time stamp in the future tells nothing.
    fn is_whole(&self) -> bool {
        let (s, ns) = self.modified;
        let modified = Duration::new(u64::try_from(s).unwrap_or(0), u32::try_from(ns).unwrap_or(0));
        let quiet = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH + modified);
        self.modified != self.changed || quiet.map_or(true, |quiet| quiet >= QUIET)
    }
}

impl<T> fmt::Debug for Watched<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched").field("path", &self.shared.path).finish_non_exhaustive()
    }
}

fn read<T>(
    path: &Path,
    bytes_max: u64,
    parse: &dyn Fn(&[u8]) -> Result<T, String>,
) -> Result<(Signature, T), String> {
    let named = |reason: String| format!("{}: {reason}", path.display());
    let file = files::open(path).map_err(|error| named(error.to_string()))?;
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

/// Writes a file that is read at once, because its last write is made to look old.
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
        // Asked for right after a look, the next one comes without another request.
        put(&file, "newest");
        watched.ready();
        begins.recv_timeout(Duration::from_secs(30)).unwrap();
        go_on.send(()).unwrap();
    }

    #[test]
    fn while_a_look_hangs_the_old_version_answers_and_nobody_else_waits() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "old").unwrap();
        let ((begun, begins), (go_on, goes_on)) = (channel(), channel::<()>());
        let goes_on = Mutex::new(goes_on);
        let parse = move |bytes: &[u8]| {
            if bytes != b"old" {
                begun.send(()).unwrap();
                let _ = goes_on.lock().unwrap().recv();
            }
            Ok(bytes.to_vec())
        };
        let mut watched = Watched::open(&file, 100, Failures::default(), parse).unwrap();
        watched.look_max = Duration::from_millis(1);
        put(&file, "newer");
        assert_eq!(*watched.get(), b"old");
        begins.recv().unwrap();
        for _ in 0..1_000 {
            assert_eq!(*watched.get(), b"old", "it hangs");
        }
        go_on.send(()).unwrap();
        watched.look_max = LOOK_MAX;
        assert_eq!(*watched.get(), b"newer");
    }

    #[test]
    fn a_file_that_a_fifo_replaces_stays_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let (file, fifo) = (folder.path().join("file"), folder.path().join("fifo"));
        std::fs::write(&file, "old").unwrap();
        let open = || Watched::open(&file, 100, Failures::default(), |bytes| Ok(bytes.to_vec()));
        let watched = open().unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU).unwrap();
        std::fs::rename(&fifo, &file).unwrap();
        assert_eq!(*watched.get(), b"old");
        assert!(open().unwrap_err().ends_with("not a regular file"));
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
