//! The disk operations that the log uses: files and folders, with a name for each sync.
//!
//! The real disk uses plain POSIX calls. The simulated one (`sim`) loses, reorders and tears data that
//! was not synced. [`Uninterrupted`] repeats calls that a signal interrupted, and [`SlowDisk`] adds time
//! to every sync.

use std::collections::HashMap;
use std::fs;
use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::files::{Locked, is_at, lacks_descriptor};
use crate::stream::Lack;

/// Place of a sync in the log's protocol. A test removes each in turn and shows that something
/// acknowledged is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SyncSite {
    /// Sync of the frame for which acknowledgements wait.
    Frame,
    /// Sync of header, checkpoint and rewritten frames of a new segment, before the segment gets its
    /// name.
    Segment,
    /// Sync of the folder after a new segment got its name.
    SegmentName,
    /// Sync of the stream's metadata, before the file gets its name.
    Metadata,
    /// Sync of the folder after the metadata got its name.
    MetadataName,
    /// Sync of the parent folder after the stream's folder was created.
    Folder,
    /// Sync of the folder after a segment was removed, before the next one is removed.
    Removal,
}

impl SyncSite {
    pub const ALL: [SyncSite; 7] = [
        SyncSite::Frame,
        SyncSite::Segment,
        SyncSite::SegmentName,
        SyncSite::Metadata,
        SyncSite::MetadataName,
        SyncSite::Folder,
        SyncSite::Removal,
    ];
}

#[expect(clippy::len_without_is_empty, reason = "nobody asks a segment file whether it is empty")]
/// An open file. Reads and writes state their position. Nothing is durable before `sync`.
pub trait File: Send + Sync {
    /// Fills `buf` from `at`; returns less only at the end of the file.
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<usize>;

    /// Writes all parts one after the other.
    fn write_at(&self, parts: &[&[u8]], at: u64) -> io::Result<()>;

    /// Starts writing these bytes to the disk for the next sync, if possible. It makes nothing durable,
    /// and errors are reported by that sync.
    fn start_sync(&self, _at: u64, _len: u64) {}

    /// Makes contents and length durable (fdatasync).
    fn sync(&self, site: SyncSite) -> io::Result<()>;

    /// Allocates the blocks for the first `len` bytes, so that writes there cannot run out of space. The
    /// bytes read as zeros.
    fn preallocate(&self, len: u64) -> io::Result<()>;

    fn truncate(&self, len: u64) -> io::Result<()>;

    fn len(&self) -> io::Result<u64>;

    /// Drops the first `len` bytes from the cache, so that they are read from the disk next time.
    fn forget_cached(&self, _len: u64) {}

    /// Returns whether the path leads to this file. A disk whose folders cannot move always returns
    /// true.
    fn is_at(&self, _path: &Path) -> io::Result<bool> {
        Ok(true)
    }
}

/// Files and folders. All paths are absolute, or relative to the process.
pub trait Disk: Send + Sync {
    /// Creates or opens a file for reading and writing.
    fn open(&self, path: &Path, create: Create) -> io::Result<Arc<dyn File>>;

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Returns the names of the files in a folder, in any order.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;

    /// Creates a folder if it is missing, and returns whether it was.
    fn create_dir(&self, dir: &Path) -> io::Result<bool>;

    /// Makes names that were created, renamed or removed in the folder durable.
    fn sync_dir(&self, dir: &Path, site: SyncSite) -> io::Result<()>;

    /// Takes a lock, which is held until the result is dropped. Fails with `WouldBlock` if another
    /// process holds it.
    fn lock(&self, path: &Path) -> io::Result<Box<dyn Send + Sync>>;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Create {
    /// An empty file, which replaces any existing one.
    Fresh,
    /// The existing file, which must exist.
    Existing,
    /// The existing file, which is never written.
    ReadOnly,
}

/// Returns whether an error means that there is no room: out of space or over quota.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Returns the lacking resource for an error that resolves itself, so that the call can be repeated
/// later.
pub fn lacking(error: &io::Error) -> Option<Lack> {
    match error.raw_os_error() {
        _ if is_full(error) => Some(Lack::Disk),
        _ if lacks_descriptor(error) => Some(Lack::FileDescriptor),
        Some(libc::ENOMEM) => Some(Lack::Memory),
        _ => None,
    }
}

/// Repeats a call until no signal interrupts it.
fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// Reads a whole file of at most `len_max` bytes.
pub fn read_all(file: &dyn File, len_max: u64) -> io::Result<Vec<u8>> {
    let len = file.len()?;
    if len > len_max {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("longer than {len_max} bytes")));
    }
    let mut bytes = vec![0; len as usize];
    let read = file.read_at(&mut bytes, 0)?;
    bytes.truncate(read);
    Ok(bytes)
}

/// Number of spare file descriptors of a disk.
const SPARES: usize = 3;

/// The disk of this machine.
#[derive(Clone, Debug, Default)]
pub struct RealDisk {
    /// Folders that were synced, kept open, so that a new name can be synced even without a free file
    /// descriptor.
    folders: Arc<Mutex<HashMap<PathBuf, Arc<fs::File>>>>,
    spares: Arc<Spares>,
}

impl File for fs::File {
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            match FileExt::read_at(self, &mut buf[done..], at + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    fn write_at(&self, parts: &[&[u8]], mut at: u64) -> io::Result<()> {
        let mut slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
        let mut rest = &mut slices[..];
        IoSlice::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            match rustix::io::pwritev(self, rest, at) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    at += n as u64;
                    IoSlice::advance_slices(&mut rest, n);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn start_sync(&self, at: u64, len: u64) {
        // SAFETY: the call has numbers only, and the file is open.
        #[allow(unsafe_code)]
        unsafe {
            libc::sync_file_range(self.as_raw_fd(), at as i64, len as i64, libc::SYNC_FILE_RANGE_WRITE);
        }
    }

    fn sync(&self, _: SyncSite) -> io::Result<()> {
        self.sync_data()
    }

    fn preallocate(&self, len: u64) -> io::Result<()> {
        let flags = rustix::fs::FallocateFlags::empty();
        match rustix::fs::fallocate(self, flags, 0, len) {
            Ok(()) => Ok(()),
            // The file grows as it is written instead.
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.set_len(len)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn forget_cached(&self, len: u64) {
        let len = std::num::NonZero::new(len);
        // Where it is not followed, the read is one of memory.
        let _ = rustix::fs::fadvise(self, 0, len, rustix::fs::Advice::DontNeed);
    }

    fn is_at(&self, path: &Path) -> io::Result<bool> {
        is_at(&self.metadata()?, path)
    }
}

/// File descriptors that are reserved, so that the log can open a file when the process has no more.
#[derive(Debug, Default)]
struct Spares(Mutex<Vec<fs::File>>);

impl Spares {
    /// Opens a file. Releases spares while there is no free file descriptor, and reserves new ones if
    /// there are any.
    fn open(&self, open: impl Fn() -> io::Result<fs::File>) -> io::Result<fs::File> {
        let mut opened = open();
        let mut spares = super::lock(&self.0);
        while opened.as_ref().is_err_and(|error| lacking(error) == Some(Lack::FileDescriptor)) {
            let Some(spare) = spares.pop() else { return opened };
            drop(spare);
            opened = open();
        }
        if spares.len() < SPARES
            && opened.is_ok()
            && let Ok(spare) = fs::File::open("/dev/null")
        {
            spares.push(spare);
        }
        opened
    }
}

impl Disk for RealDisk {
    fn open(&self, path: &Path, create: Create) -> io::Result<Arc<dyn File>> {
        let mut options = fs::OpenOptions::new();
        options.read(true);
        match create {
            Create::Fresh => options.write(true).create(true).truncate(true),
            Create::Existing => options.write(true),
            Create::ReadOnly => &mut options,
        };
        Ok(Arc::new(self.spares.open(|| options.open(path))?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let entries = fs::read_dir(dir)?;
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    }

    fn create_dir(&self, dir: &Path) -> io::Result<bool> {
        if dir.is_dir() {
            return Ok(false);
        }
        fs::create_dir_all(dir).map(|()| true)
    }

    fn sync_dir(&self, dir: &Path, _: SyncSite) -> io::Result<()> {
        let known = super::lock(&self.folders).get(dir).cloned();
        let folder = match known {
            Some(folder) => folder,
            None => {
                let path = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
                let folder = Arc::new(self.spares.open(|| fs::File::open(path))?);
                super::lock(&self.folders).insert(dir.to_path_buf(), Arc::clone(&folder));
                folder
            }
        };
        folder.sync_all()
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn Send + Sync>> {
        let mut options = fs::OpenOptions::new();
        options.create(true).truncate(false).write(true);
        let file = options.open(path)?;
        Ok(Box::new(Locked::exclusive(file).map_err(io::Error::from)?))
    }
}

/// A disk whose calls are repeated if a signal interrupted them. Every call can be, because a write
/// states its position.
pub struct Uninterrupted(pub Arc<dyn Disk>);

struct UninterruptedFile(Arc<dyn File>);

impl File for UninterruptedFile {
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<usize> {
        uninterrupted(|| self.0.read_at(buf, at))
    }
    fn write_at(&self, parts: &[&[u8]], at: u64) -> io::Result<()> {
        uninterrupted(|| self.0.write_at(parts, at))
    }
    fn start_sync(&self, at: u64, len: u64) {
        self.0.start_sync(at, len);
    }
    fn sync(&self, site: SyncSite) -> io::Result<()> {
        uninterrupted(|| self.0.sync(site))
    }
    fn preallocate(&self, len: u64) -> io::Result<()> {
        uninterrupted(|| self.0.preallocate(len))
    }
    fn truncate(&self, len: u64) -> io::Result<()> {
        uninterrupted(|| self.0.truncate(len))
    }
    fn len(&self) -> io::Result<u64> {
        uninterrupted(|| self.0.len())
    }
    fn forget_cached(&self, len: u64) {
        self.0.forget_cached(len);
    }
    fn is_at(&self, path: &Path) -> io::Result<bool> {
        uninterrupted(|| self.0.is_at(path))
    }
}

impl Disk for Uninterrupted {
    fn open(&self, path: &Path, create: Create) -> io::Result<Arc<dyn File>> {
        Ok(Arc::new(UninterruptedFile(uninterrupted(|| self.0.open(path, create))?)))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        uninterrupted(|| self.0.rename(from, to))
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        uninterrupted(|| self.0.remove(path))
    }
    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        uninterrupted(|| self.0.list(dir))
    }
    fn create_dir(&self, dir: &Path) -> io::Result<bool> {
        uninterrupted(|| self.0.create_dir(dir))
    }
    fn sync_dir(&self, dir: &Path, site: SyncSite) -> io::Result<()> {
        uninterrupted(|| self.0.sync_dir(dir, site))
    }
    fn lock(&self, path: &Path) -> io::Result<Box<dyn Send + Sync>> {
        uninterrupted(|| self.0.lock(path))
    }
}

/// A disk whose every sync takes longer, for benchmarks.
pub struct SlowDisk {
    pub disk: Arc<dyn Disk>,
    pub extra: Duration,
}

struct SlowFile {
    file: Arc<dyn File>,
    extra: Duration,
}

impl File for SlowFile {
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<usize> {
        self.file.read_at(buf, at)
    }
    fn write_at(&self, parts: &[&[u8]], at: u64) -> io::Result<()> {
        self.file.write_at(parts, at)
    }
    fn start_sync(&self, at: u64, len: u64) {
        self.file.start_sync(at, len);
    }
    fn sync(&self, site: SyncSite) -> io::Result<()> {
        std::thread::sleep(self.extra);
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
    fn forget_cached(&self, len: u64) {
        self.file.forget_cached(len);
    }
    fn is_at(&self, path: &Path) -> io::Result<bool> {
        self.file.is_at(path)
    }
}

impl Disk for SlowDisk {
    fn open(&self, path: &Path, create: Create) -> io::Result<Arc<dyn File>> {
        let file = self.disk.open(path, create)?;
        Ok(Arc::new(SlowFile { file, extra: self.extra }))
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
        std::thread::sleep(self.extra);
        self.disk.sync_dir(dir, site)
    }
    fn lock(&self, path: &Path) -> io::Result<Box<dyn Send + Sync>> {
        self.disk.lock(path)
    }
}

/// Returns the folder that holds `dir`.
pub fn parent(dir: &Path) -> PathBuf {
    dir.parent().map(Path::to_path_buf).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn a_log_opens_files_where_others_have_taken_all_file_descriptors() {
        let spares = Spares::default();
        let open = || fs::File::open("/dev/null");
        for _ in 0..SPARES {
            spares.open(open).unwrap();
        }
        // No descriptor is free but those that are given up; another thread takes the first.
        for (lacking, has_one) in [(0, true), (2, true), (SPARES, true), (SPARES + 1, false)] {
            let left = Cell::new(lacking);
            let opened = spares.open(|| {
                if left.get() == 0 {
                    return open();
                }
                left.set(left.get() - 1);
                Err(io::Error::from_raw_os_error(libc::EMFILE))
            });
            assert_eq!(opened.is_ok(), has_one, "{lacking}");
            for _ in 0..SPARES {
                spares.open(open).unwrap();
            }
        }
        let gone = spares.open(|| Err(io::ErrorKind::NotFound.into())).unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::NotFound);
        assert_eq!(super::super::lock(&spares.0).len(), SPARES, "none is given up for another reason");
    }
}
