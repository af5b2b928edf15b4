//! The plugin files that recorded versions of steps are made of.
//!
//! The cache of compiled plugins is one: what it drops is compiled again. These files are what it is
//! compiled from once the plugins folder has others, and they stay for as long as a record names
//! them or the process uses them. `SHA256.wasm` is written and synced before a version is recorded.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::program;
use crate::telemetry::Failures;

/// Returns the SHA-256 of each file that a record names; `None` where that is not known.
pub(super) type Named = Box<dyn Fn() -> Option<BTreeSet<String>> + Send + Sync>;

/// The folder of kept plugin files, which one thread writes to: what is removed may be what another
/// one is about to put in place.
pub(super) struct KeptFiles {
    folder: KeptFolder,
    named: Named,
    failures: Failures,
    /// Files that the process uses, by SHA-256.
    used: HashMap<String, Weak<KeptFile>>,
}

/// The folder for whoever only reads it.
#[derive(Clone)]
pub(super) struct KeptFolder(Arc<Path>);

/// Keeps a plugin file in the folder while the process uses it.
#[derive(Default)]
pub(super) struct KeptFile {
    /// The bytes, until they are stored. Locked while they are written and synced.
    unstored: Mutex<Option<Vec<u8>>>,
    /// Whether they still are to be stored; can be asked while they are written.
    is_unstored: AtomicBool,
}

impl KeptFiles {
    pub fn new(dir: &Path, named: Named, failures: Failures) -> Self {
        Self { folder: KeptFolder(dir.into()), named, failures, used: HashMap::new() }
    }

    pub fn folder(&self) -> &KeptFolder {
        &self.folder
    }

    /// Stores a file. Where that fails its bytes are kept in memory for [`Self::retry`].
    pub fn keep(&mut self, sha256: &str, bytes: Vec<u8>) -> Arc<KeptFile> {
        if let Some(file) = self.used.get(sha256).and_then(Weak::upgrade) {
            return file;
        }
        let file =
            Arc::new(KeptFile { unstored: Mutex::new(Some(bytes)), is_unstored: AtomicBool::new(true) });
        self.used.insert(sha256.to_owned(), Arc::downgrade(&file));
        self.store(sha256, &file);
        self.tidy();
        file
    }

    /// Tries again to store what could not be stored.
    pub fn retry(&mut self) {
        let used = self.used.iter().filter_map(|(sha256, file)| Some((sha256, file.upgrade()?)));
        used.filter(|(_, file)| !file.is_stored()).for_each(|(sha256, file)| self.store(sha256, &file));
    }

    fn store(&self, sha256: &str, file: &KeptFile) {
        let mut unstored = lock(&file.unstored);
        let Some(bytes) = &*unstored else { return };
        match self.write(&self.folder.path(sha256), bytes) {
            Ok(()) => {
                *unstored = None;
                file.is_unstored.store(false, Ordering::Release);
            }
            Err(error) => {
                let kind = "cannot store a plugin file, so that a restart may not find the steps of earlier messages";
                let detail = format!("{}: {error}; it is tried again", self.folder.0.display());
                self.failures.report(kind, 1, &detail, "");
            }
        }
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        if !fs::read(path).is_ok_and(|found| found == bytes) {
            let dir = &self.folder.0;
            DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
            dir.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())?;
            let temporary = path.with_extension("tmp");
            let mut options = OpenOptions::new();
            let written = options.write(true).create(true).truncate(true).mode(0o600).open(&temporary);
            let written = written
                .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
                .and_then(|()| fs::rename(&temporary, path));
            if written.is_err() {
                // Nothing to add to the error that is returned.
                let _ = fs::remove_file(&temporary);
            }
            written?;
        }
        // Also where the file is there already: an earlier call may have failed here.
        File::open(&self.folder.0)?.sync_all()
    }

    /// Removes the files that neither a record names nor the process uses, and what a crash left half
    /// written. What cannot be listed or removed takes space, and is tried again with the next file.
    fn tidy(&mut self) {
        let used = self.used();
        // Read second: a version that is needed leaves the process only once it is recorded.
        let Some(mut kept) = (self.named)() else { return };
        kept.extend(used);
        for file in fs::read_dir(&self.folder.0).into_iter().flatten().flatten() {
            let name = file.file_name();
            let sha256 = name.to_str().and_then(|name| name.strip_suffix(".wasm"));
            if sha256.is_none_or(|sha256| !kept.contains(sha256)) {
                let _ = fs::remove_file(file.path());
            }
        }
    }

    fn used(&mut self) -> Vec<String> {
        self.used.retain(|_, file| file.strong_count() > 0);
        self.used.keys().cloned().collect()
    }
}

impl KeptFolder {
    /// Returns the bytes of a file; `None` where it is not there.
    pub fn read(&self, sha256: &str) -> Result<Option<Vec<u8>>, super::Error> {
        match program::read(&self.path(sha256)) {
            Err(super::Error::Read { error, .. }) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            read => read.map(Some),
        }
    }

    fn path(&self, sha256: &str) -> PathBuf {
        self.0.join(format!("{sha256}.wasm"))
    }
}

impl KeptFile {
    pub fn is_stored(&self) -> bool {
        !self.is_unstored.load(Ordering::Acquire)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
