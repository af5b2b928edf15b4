//! Places of a disk that cannot be read, such as a bad sector. The read is tried again, since the reason may
//! pass; then what cannot be read counts as damage: it reads as zeros, which no frame is.
//!
//! That costs messages, so that it is done only where the disk answers otherwise: the beginning of the same file
//! can be read back, and no more than [`PATCHED_MAX`] of a read is missing. A disk that is gone is waited for.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::disk::{Create, Disk, File, SyncSite};
use super::lock;

/// Tries of a read before what cannot be read counts as damage.
pub const READ_TRIES: u32 = 6;
/// Pause before the second try; each further one is twice as long.
const PAUSE_LEAST: Duration = if cfg!(test) { Duration::from_micros(1) } else { Duration::from_millis(100) };
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// Read at once around a place that cannot be read.
const BLOCK_BYTES: usize = 4_096;
/// Bytes of one read that may be missing.
const PATCHED_MAX: usize = 64 << 10;

/// Whether an error says that the disk cannot give what is in a file.
pub fn is_unreadable(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EIO | libc::EBADMSG | libc::EUCLEAN))
}

/// Returns the pause after so many tries.
pub fn pause(tries: u32) -> Duration {
    (PAUSE_LEAST * 2_u32.saturating_pow(tries.saturating_sub(1))).min(PAUSE_MAX)
}

/// A file whose blocks that cannot be read, and were given up, read as zeros.
pub struct Patched {
    file: Arc<dyn File>,
    /// Whether a block that cannot be read is given up now.
    gives_up: AtomicBool,
    /// Places of the blocks that were given up.
    given_up: Mutex<BTreeSet<u64>>,
    /// Those that nobody has asked for yet.
    unread: Mutex<Vec<Range<u64>>>,
}

impl Patched {
    pub fn new(file: Arc<dyn File>) -> Self {
        Self { file, gives_up: AtomicBool::new(false), given_up: Mutex::default(), unread: Mutex::default() }
    }

    /// Sets whether a block that cannot be read is given up from now on.
    pub fn set_gives_up(&self, gives_up: bool) {
        self.gives_up.store(gives_up, Ordering::Relaxed);
    }

    /// Returns which bytes were given up since the last call.
    pub fn take_unread(&self) -> Vec<Range<u64>> {
        std::mem::take(&mut *lock(&self.unread))
    }

    fn read_by_block(&self, buf: &mut [u8], at: u64, error: io::Error) -> io::Result<usize> {
        self.file.forget_cached(BLOCK_BYTES as u64);
        self.file.read_at(&mut [0; BLOCK_BYTES], 0)?;
        let (mut done, mut unread) = (0, Vec::new());
        while done < buf.len() {
            let place = at + done as u64;
            let within = (place % BLOCK_BYTES as u64) as usize;
            let len = (BLOCK_BYTES - within).min(buf.len() - done);
            let part = &mut buf[done..done + len];
            match self.file.read_at(part, place) {
                Ok(read) => {
                    done += read;
                    if read < len {
                        break;
                    }
                }
                Err(error) if is_unreadable(&error) => {
                    part.fill(0);
                    unread.push(place - within as u64);
                    done += len;
                }
                Err(error) => return Err(error),
            }
        }
        let mut given_up = lock(&self.given_up);
        let may = self.gives_up.load(Ordering::Relaxed) && unread.len() * BLOCK_BYTES <= PATCHED_MAX;
        if !may && unread.iter().any(|block| !given_up.contains(block)) {
            return Err(error);
        }
        let new = unread.into_iter().filter(|block| given_up.insert(*block));
        lock(&self.unread).extend(new.map(|block| block..block + BLOCK_BYTES as u64));
        Ok(done)
    }
}

impl File for Patched {
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<usize> {
        match self.file.read_at(buf, at) {
            Err(error) if is_unreadable(&error) => self.read_by_block(buf, at, error),
            other => other,
        }
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

/// The disk as an opening reads it: it waits for a place that cannot be read, and then does without it.
/// Blocks. Each error names its file.
pub struct Salvaging<'d> {
    disk: &'d dyn Disk,
    unread: Arc<Mutex<Vec<Unread>>>,
}

struct SalvagedFile {
    patched: Patched,
    path: PathBuf,
    unread: Arc<Mutex<Vec<Unread>>>,
}

impl<'d> Salvaging<'d> {
    pub fn new(disk: &'d dyn Disk) -> Self {
        Self { disk, unread: Arc::default() }
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
        kind => io::Error::new(kind, format!("{}: {error}", path.display())),
    }
}

impl File for SalvagedFile {
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<usize> {
        let mut tries = 0;
        let read = loop {
            match self.patched.file.read_at(buf, at) {
                Err(error) if is_unreadable(&error) && tries < READ_TRIES => {
                    tries += 1;
                    if tries == 1 {
                        tracing::warn!(file = %self.path.display(), at, %error, "cannot read, tries again");
                    }
                    std::thread::sleep(pause(tries));
                }
                Err(error) if is_unreadable(&error) => break self.patched.read_by_block(buf, at, error),
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
        let (path, unread) = (path.to_owned(), Arc::clone(&self.unread));
        let patched = Patched::new(file);
        patched.set_gives_up(true);
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
