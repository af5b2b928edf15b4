//! Places of a disk that cannot be read, such as a bad sector. The read is tried again, since the reason may
//! pass; then what cannot be read counts as damage: it reads as zeros, which no frame is.
//!
//! That costs messages, so that it is done only where the disk answers otherwise: something of the beginning of the
//! same file can be read back, and no more than [`PATCHED_MAX`] of a read is missing. A disk that is gone is waited
//! for. What one reader has given up, no reader of the log asks the disk for again before the next start.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::disk::{Create, Disk, File, SyncSite};
use super::lock;
use super::segment::FRAMES_AT;

/// Tries of a read before what cannot be read counts as damage.
pub const READ_TRIES: u32 = 6;
/// Pause before the second try; each further one is twice as long.
const PAUSE_LEAST: Duration = if cfg!(test) { Duration::from_micros(1) } else { Duration::from_millis(100) };
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// Read at once around a place that cannot be read.
const BLOCK_BYTES: usize = 4_096;
/// Bytes of one read that may be missing.
const PATCHED_MAX: usize = 64 << 10;

/// Returns whether an error says that the disk cannot give what is in a file.
pub fn is_unreadable(error: &io::Error) -> bool {
    let named = error.get_ref().and_then(|inner| inner.downcast_ref::<Named>());
    let error = named.map_or(error, |named| &named.error);
    matches!(error.raw_os_error(), Some(libc::EIO | libc::EBADMSG | libc::EUCLEAN))
}

/// An error of a file.
#[derive(Debug, thiserror::Error)]
#[error("{}: {error}", .path.display())]
struct Named {
    path: PathBuf,
    error: io::Error,
}

/// Returns the pause after so many tries.
pub fn pause(tries: u32) -> Duration {
    (PAUSE_LEAST * 2_u32.saturating_pow(tries.saturating_sub(1))).min(PAUSE_MAX)
}

/// What of one file was given up. Clones are of the same file.
#[derive(Clone, Debug, Default)]
pub struct GivenUp(Arc<Places>);

#[derive(Debug, Default)]
struct Places {
    /// Where blocks begin that cannot be read; no more than the file has.
    blocks: Mutex<BTreeSet<u64>>,
    /// The file is not there.
    is_gone: AtomicBool,
}

impl GivenUp {
    /// Returns whether some block of these bytes was given up.
    fn has_some_of(&self, at: u64, len: usize) -> bool {
        let first = at - at % BLOCK_BYTES as u64;
        lock(&self.0.blocks).range(first..at.saturating_add(len as u64).max(first)).next().is_some()
    }

    fn has(&self, block: u64) -> bool {
        lock(&self.0.blocks).contains(&block)
    }

    /// Returns whether the block was not given up before.
    fn add(&self, block: u64) -> bool {
        lock(&self.0.blocks).insert(block)
    }

    /// Returns whether any block was given up.
    pub fn has_any(&self) -> bool {
        !lock(&self.0.blocks).is_empty()
    }

    /// Returns whether the whole file was given up, for it is not there.
    pub fn is_gone(&self) -> bool {
        self.0.is_gone.load(Ordering::Relaxed)
    }

    /// Gives up the whole file. Returns whether it was not before.
    pub fn set_gone(&self) -> bool {
        !self.0.is_gone.swap(true, Ordering::Relaxed)
    }
}

/// A file whose blocks that cannot be read, and were given up, read as zeros.
pub struct Patched {
    file: Arc<dyn File>,
    /// Whether a block that cannot be read is given up now.
    gives_up: AtomicBool,
    given_up: GivenUp,
    /// Blocks that were given up through this, and that nobody has asked for yet.
    unread: Mutex<Vec<Range<u64>>>,
}

impl Patched {
    pub fn new(file: Arc<dyn File>, given_up: GivenUp) -> Self {
        Self { file, gives_up: AtomicBool::new(false), given_up, unread: Mutex::default() }
    }

    /// Sets whether a block that cannot be read is given up from now on.
    pub fn set_gives_up(&self, gives_up: bool) {
        self.gives_up.store(gives_up, Ordering::Relaxed);
    }

    /// Returns which bytes were given up since the last call.
    pub fn take_unread(&self) -> Vec<Range<u64>> {
        std::mem::take(&mut *lock(&self.unread))
    }

    fn read_by_block(&self, buf: &mut [u8], at: u64) -> io::Result<usize> {
        let gives_up = self.gives_up.load(Ordering::Relaxed);
        let (mut done, mut known, mut new, mut failed) = (0, 0, Vec::new(), None);
        while done < buf.len() {
            let place = at + done as u64;
            let within = (place % BLOCK_BYTES as u64) as usize;
            let block = place - within as u64;
            let len = (BLOCK_BYTES - within).min(buf.len() - done);
            let part = &mut buf[done..done + len];
            if self.given_up.has(block) {
                part.fill(0);
                known += 1;
                done += len;
                continue;
            }
            match self.file.read_at(part, place) {
                Ok(read) => {
                    done += read;
                    if read < len {
                        break;
                    }
                }
                Err(error) if gives_up && is_unreadable(&error) => {
                    part.fill(0);
                    new.push(block);
                    failed = Some(error);
                    done += len;
                }
                Err(error) => return Err(error),
            }
        }
        if let Some(error) = failed {
            if (known + new.len()) * BLOCK_BYTES > PATCHED_MAX {
                return Err(error);
            }
            self.is_answered()?;
            let new = new.into_iter().filter(|block| self.given_up.add(*block));
            lock(&self.unread).extend(new.map(|block| block..block + BLOCK_BYTES as u64));
        }
        Ok(done)
    }

    /// Returns an error where the disk gives nothing of the file's beginning. Zeros say nothing: a disk that is
    /// gone gives those of blocks that were never written.
    fn is_answered(&self) -> io::Result<()> {
        self.file.forget_cached((PATCHED_MAX + BLOCK_BYTES) as u64);
        let mut failed = io::Error::from_raw_os_error(libc::EIO);
        for place in (0..=PATCHED_MAX as u64).step_by(BLOCK_BYTES).filter(|place| !self.given_up.has(*place))
        {
            let mut block = [0; BLOCK_BYTES];
            match self.file.read_at(&mut block, place) {
                Ok(_) if block.iter().any(|byte| *byte != 0) => return Ok(()),
                Ok(_) => {}
                Err(error) if is_unreadable(&error) => failed = error,
                Err(error) => return Err(error),
            }
        }
        Err(failed)
    }
}

impl File for Patched {
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<usize> {
        if !self.given_up.has_some_of(at, buf.len()) {
            match self.file.read_at(buf, at) {
                Err(error) if is_unreadable(&error) => {}
                other => return other,
            }
        }
        self.read_by_block(buf, at)
    }
    fn write_at(&self, parts: &[&[u8]], at: u64) -> io::Result<()> {
        self.file.write_at(parts, at)
    }
    fn sync(&self, site: SyncSite) -> io::Result<()> {
        self.file.sync(site)
    }
    fn preallocate(&self, len: u64) -> io::Result<()> {
        self.file.preallocate(len)
    }
    fn truncate(&self, len: u64) -> io::Result<()> {
        self.file.truncate(len)
    }
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }
}

/// Bytes of a file that could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unread {
    pub path: PathBuf,
    pub bytes: Range<u64>,
}

impl Unread {
    /// Returns whether this is the header of a segment and nothing else. A start makes it again from the first
    /// frame, or does not go on.
    pub fn is_header(&self) -> bool {
        self.path.extension().is_some_and(|extension| extension == "seg") && self.bytes.end <= FRAMES_AT
    }
}

/// The disk as an opening reads it: it waits for a place that cannot be read, and then does without it.
/// Blocks. Each error names its file.
pub struct Salvaging<'d> {
    disk: &'d dyn Disk,
    given_up: Mutex<BTreeMap<PathBuf, GivenUp>>,
    unread: Arc<Mutex<Vec<Unread>>>,
}

struct SalvagedFile {
    patched: Patched,
    path: PathBuf,
    unread: Arc<Mutex<Vec<Unread>>>,
}

impl<'d> Salvaging<'d> {
    pub fn new(disk: &'d dyn Disk) -> Self {
        Self { disk, given_up: Mutex::default(), unread: Arc::default() }
    }

    /// Returns what of a file was given up, and from then on is.
    pub fn given_up(&self, path: &Path) -> GivenUp {
        lock(&self.given_up).entry(path.to_owned()).or_default().clone()
    }

    /// Returns what could not be read, each place once, in order.
    pub fn take_unread(&self) -> Vec<Unread> {
        let mut unread = std::mem::take(&mut *lock(&self.unread));
        unread.sort_by(|a, b| (&a.path, a.bytes.start).cmp(&(&b.path, b.bytes.start)));
        unread.dedup();
        unread
    }
}

fn named(path: &Path) -> impl Fn(io::Error) -> io::Error {
    move |error| match error.kind() {
        // Told apart by who opens it.
        io::ErrorKind::NotFound => error,
        kind => io::Error::new(kind, Named { path: path.to_owned(), error }),
    }
}

impl File for SalvagedFile {
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<usize> {
        let mut tries = 0;
        let read = loop {
            self.patched.set_gives_up(tries == READ_TRIES);
            match self.patched.read_at(buf, at) {
                Err(error) if is_unreadable(&error) && tries < READ_TRIES => {
                    tries += 1;
                    if tries == 1 {
                        tracing::warn!(file = %self.path.display(), at, %error, "cannot read, will try again");
                    }
                    std::thread::sleep(pause(tries));
                }
                other => break other,
            }
        };
        let unread = self.patched.take_unread().into_iter();
        lock(&self.unread).extend(unread.map(|bytes| Unread { path: self.path.clone(), bytes }));
        read.map_err(named(&self.path))
    }
    fn write_at(&self, parts: &[&[u8]], at: u64) -> io::Result<()> {
        self.patched.write_at(parts, at)
    }
    fn sync(&self, site: SyncSite) -> io::Result<()> {
        self.patched.sync(site)
    }
    fn preallocate(&self, len: u64) -> io::Result<()> {
        self.patched.preallocate(len)
    }
    fn truncate(&self, len: u64) -> io::Result<()> {
        self.patched.truncate(len)
    }
    fn len(&self) -> io::Result<u64> {
        self.patched.len().map_err(named(&self.path))
    }
}

impl Disk for Salvaging<'_> {
    fn open(&self, path: &Path, create: Create) -> io::Result<Arc<dyn File>> {
        let file = self.disk.open(path, create).map_err(named(path))?;
        let patched = Patched::new(file, self.given_up(path));
        let (path, unread) = (path.to_owned(), Arc::clone(&self.unread));
        Ok(Arc::new(SalvagedFile { patched, path, unread }))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.disk.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.disk.remove(path)
    }
    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.disk.list(dir)
    }
    fn create_dir(&self, dir: &Path) -> io::Result<bool> {
        self.disk.create_dir(dir)
    }
    fn sync_dir(&self, dir: &Path, site: SyncSite) -> io::Result<()> {
        self.disk.sync_dir(dir, site)
    }
    fn lock(&self, path: &Path) -> io::Result<Box<dyn Send + Sync>> {
        self.disk.lock(path)
    }
}
