//! A disk that is as bad as POSIX allows: at a crash, writes that were not
//! synced are kept, lost or torn by the sector in any order, and so are names
//! that their folder was not synced for. Syncs can fail (and mark the pages
//! clean), be left out by name, and the disk can be full.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use tokio::sync::watch;

use super::disk::{Create, Disk, File, SyncSite};

const SECTOR: usize = 512;

#[derive(Clone)]
pub struct SimDisk(Arc<Mutex<World>>);

#[derive(Clone)]
struct World {
    random: u64,
    files: Vec<Content>,
    /// What the process sees.
    names: BTreeMap<PathBuf, usize>,
    /// What a crash leaves, before what it keeps by luck.
    durable_names: BTreeMap<PathBuf, usize>,
    /// Changes of names since, in order.
    name_log: Vec<Change>,
    dirs: BTreeSet<PathBuf>,
    /// Files whose names went with the crash of a folder stay unreachable.
    durable_dirs: BTreeSet<PathBuf>,
    locks: BTreeSet<PathBuf>,
    /// Operations until the machine crashes: every call from then on fails.
    crash_in: Option<u64>,
    crashed: bool,
    operations: u64,
    left_out: Option<SyncSite>,
    fail_syncs: bool,
    fail_removals: bool,
    /// Every call that opens a file fails with this error.
    fail_opens: Option<i32>,
    fail_renames: Option<i32>,
    /// Bytes of a file that so many more reads cannot have.
    unreadable: Option<(usize, Range<usize>, u32)>,
    failed_reads: u64,
    /// A signal interrupts every other call that may fail; set to whether the next one is.
    interrupts: Option<bool>,
    bytes_max: u64,
    /// Bytes given to writes, but for those that are all zeros.
    written: u64,
    /// Called before each operation, outside the disk's own lock.
    before: Option<Before>,
    /// It refused something for want of room.
    was_full: watch::Sender<bool>,
}

type Before = Arc<dyn Fn() + Send + Sync>;

#[derive(Clone)]
enum Change {
    Set(PathBuf, usize),
    Unset(PathBuf),
    /// Atomic: both names change or none.
    Move(PathBuf, PathBuf, usize),
}

impl Change {
    fn dir(&self) -> Option<&Path> {
        match self {
            Self::Set(path, _) | Self::Unset(path) | Self::Move(_, path, _) => path.parent(),
        }
    }

    fn apply(self, names: &mut BTreeMap<PathBuf, usize>) {
        match self {
            Self::Set(path, file) => drop(names.insert(path, file)),
            Self::Unset(path) => drop(names.remove(&path)),
            Self::Move(from, to, file) => {
                names.remove(&from);
                names.insert(to, file);
            }
        }
    }
}

#[derive(Clone, Default)]
struct Content {
    seen: Vec<u8>,
    durable: Vec<u8>,
    /// Sectors written since the last sync.
    dirty: BTreeSet<usize>,
    removed: bool,
}

impl SimDisk {
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(World {
            random: seed | 1,
            files: Vec::new(),
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            name_log: Vec::new(),
            dirs: BTreeSet::from([PathBuf::from("/")]),
            durable_dirs: BTreeSet::from([PathBuf::from("/")]),
            locks: BTreeSet::new(),
            crash_in: None,
            crashed: false,
            operations: 0,
            left_out: None,
            fail_syncs: false,
            fail_removals: false,
            fail_opens: None,
            fail_renames: None,
            unreadable: None,
            failed_reads: 0,
            interrupts: None,
            bytes_max: u64::MAX,
            written: 0,
            before: None,
            was_full: watch::channel(false).0,
        })))
    }

    /// The next so many reads of these bytes fail.
    pub fn break_reads(&self, path: &Path, bytes: Range<usize>, times: u32) {
        self.world(|w| w.unreadable = Some((w.names[path], bytes, times)));
    }

    /// How often a read of bytes failed that [`Self::break_reads`] broke.
    pub fn failed_reads(&self) -> u64 {
        self.world(|w| w.failed_reads)
    }

    /// Another disk with the same content.
    pub fn fork(&self) -> Self {
        Self(Arc::new(Mutex::new(self.world(|w| w.clone()))))
    }

    fn world<T>(&self, with: impl FnOnce(&mut World) -> T) -> T {
        with(&mut self.0.lock().expect("no test panics over it"))
    }

    /// As `world`, for what a slow disk takes its time for.
    fn call<T>(&self, with: impl FnOnce(&mut World) -> T) -> T {
        if let Some(before) = self.world(|w| w.before.clone()) {
            before();
        }
        self.world(with)
    }

    /// Calls `before` whenever a file or folder is changed, synced or looked for.
    pub fn before_each(&self, before: impl Fn() + Send + Sync + 'static) {
        self.world(|w| w.before = Some(Arc::new(before)));
    }

    pub fn written(&self) -> u64 {
        self.world(|w| w.written)
    }

    /// The machine stops before its `n`th operation from now.
    pub fn crash_in(&self, n: u64) {
        self.world(|w| w.crash_in = Some(n));
    }

    pub fn has_crashed(&self) -> bool {
        self.world(|w| w.crashed)
    }

    pub fn leave_out(&self, site: SyncSite) {
        self.world(|w| w.left_out = Some(site));
    }

    pub fn fail_syncs(&self, fail: bool) {
        self.world(|w| w.fail_syncs = fail);
    }

    pub fn fail_removals(&self, fail: bool) {
        self.world(|w| w.fail_removals = fail);
    }

    /// Opening a file fails with this error of the system.
    pub fn fail_opens(&self, error: Option<i32>) {
        self.world(|w| w.fail_opens = error);
    }

    /// Renaming a file fails with this error of the system.
    pub fn fail_renames(&self, error: Option<i32>) {
        self.world(|w| w.fail_renames = error);
    }

    /// From now on a signal interrupts each call once, a write in the middle.
    pub fn interrupt_calls(&self) {
        self.world(|w| w.interrupts = Some(true));
    }

    /// How much all files together may hold.
    pub fn set_bytes_max(&self, bytes: u64) {
        self.world(|w| w.bytes_max = bytes);
    }

    pub fn bytes(&self) -> u64 {
        self.world(|w| w.bytes())
    }

    /// Returns once something found no room.
    pub async fn was_full(&self) {
        let mut was_full = self.world(|w| w.was_full.subscribe());
        // The sender lives as long as `self`.
        let _ = was_full.wait_for(|was_full| *was_full).await;
    }

    /// Power off and on: chance decides over everything that was not synced.
    pub fn reboot(&self) {
        self.world(World::reboot);
    }

    /// The process ends and starts again; the page cache stays.
    pub fn restart_process(&self) {
        self.world(|w| {
            w.locks.clear();
            w.crashed = false;
            w.crash_in = None;
        });
    }

    /// As `restart_process`; a machine that is off stays off.
    pub fn restart_process_unless_off(&self) {
        self.world(|w| w.locks.clear());
    }

    /// Returns what is on disk of a file.
    pub fn content(&self, path: &Path) -> Vec<u8> {
        self.world(|w| w.files[w.names[path]].seen.clone())
    }

    /// Replaces what is on disk of a file.
    pub fn set_content(&self, path: &Path, content: Vec<u8>) {
        self.world(|w| {
            let file = w.names[path];
            w.files[file].durable.clone_from(&content);
            w.files[file].seen = content;
        });
    }

    /// Flips a bit of what is on disk.
    pub fn flip(&self, path: &Path, at: usize) {
        self.world(|w| {
            let file = w.names[path];
            w.files[file].seen[at] ^= 0x20;
            w.files[file].durable = w.files[file].seen.clone();
        });
    }
}

impl World {
    fn chance(&mut self, of: u64) -> bool {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random.is_multiple_of(of)
    }

    /// Fails where a signal interrupts this call.
    fn signal(&mut self) -> io::Result<()> {
        match &mut self.interrupts {
            Some(is_next) => match std::mem::replace(is_next, !*is_next) {
                true => Err(io::ErrorKind::Interrupted.into()),
                false => Ok(()),
            },
            None => Ok(()),
        }
    }

    fn operation(&mut self) -> io::Result<()> {
        self.signal()?;
        self.operations += 1;
        if let Some(left) = &mut self.crash_in {
            if *left == 0 {
                self.crashed = true;
            } else {
                *left -= 1;
            }
        }
        if self.crashed { Err(io::Error::other("the machine is off")) } else { Ok(()) }
    }

    fn bytes(&self) -> u64 {
        self.files.iter().filter(|f| !f.removed).map(|f| f.seen.len() as u64).sum()
    }

    fn room(&self, more: u64) -> io::Result<()> {
        if self.bytes() + more <= self.bytes_max {
            return Ok(());
        }
        self.was_full.send_replace(true);
        Err(io::ErrorKind::StorageFull.into())
    }

    fn change(&mut self, change: Change) {
        change.clone().apply(&mut self.names);
        self.name_log.push(change);
    }

    fn sync(&mut self, file: usize, site: SyncSite) -> io::Result<()> {
        self.operation()?;
        if self.fail_syncs {
            // The kernel marks the pages clean: they are seen, and never written.
            self.files[file].dirty.clear();
            return Err(io::Error::other("the disk answered with an error"));
        }
        if self.left_out != Some(site) {
            let content = &mut self.files[file];
            content.durable.resize(content.seen.len(), 0);
            for sector in std::mem::take(&mut content.dirty) {
                let begin = (sector * SECTOR).min(content.seen.len());
                let end = (begin + SECTOR).min(content.seen.len());
                content.durable[begin..end].copy_from_slice(&content.seen[begin..end]);
            }
        }
        Ok(())
    }

    fn reboot(&mut self) {
        for change in std::mem::take(&mut self.name_log) {
            // A journal keeps a folder's order; POSIX does not promise even that.
            if self.chance(2) {
                change.apply(&mut self.durable_names);
            }
        }
        for dir in self.dirs.clone() {
            if self.chance(2) {
                self.durable_dirs.insert(dir);
            }
        }
        for i in 0..self.files.len() {
            let mut content = std::mem::take(&mut self.files[i]);
            if content.durable.len() != content.seen.len() && self.chance(2) {
                content.durable.resize(content.seen.len(), 0);
            }
            for sector in std::mem::take(&mut content.dirty) {
                let begin = (sector * SECTOR).min(content.durable.len()).min(content.seen.len());
                let end = (begin + SECTOR).min(content.durable.len()).min(content.seen.len());
                if self.chance(2) {
                    content.durable[begin..end].copy_from_slice(&content.seen[begin..end]);
                }
            }
            content.seen = content.durable.clone();
            self.files[i] = content;
        }
        let dirs = self.durable_dirs.clone();
        self.durable_names.retain(|path, _| path.parent().is_some_and(|dir| dirs.contains(dir)));
        self.dirs = dirs;
        self.names = self.durable_names.clone();
        for (i, content) in self.files.iter_mut().enumerate() {
            content.removed = !self.names.values().any(|file| *file == i);
        }
        self.locks.clear();
        self.crashed = false;
        self.crash_in = None;
    }
}

struct SimFile {
    disk: SimDisk,
    file: usize,
}

impl File for SimFile {
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<usize> {
        self.disk.world(|w| {
            w.signal()?;
            if let Some((file, bytes, times)) = &mut w.unreadable
                && *file == self.file
                && bytes.start < at as usize + buf.len()
                && (at as usize) < bytes.end
                && *times > 0
            {
                *times -= 1;
                w.failed_reads += 1;
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            let seen = &w.files[self.file].seen;
            let begin = (at as usize).min(seen.len());
            let len = buf.len().min(seen.len() - begin);
            buf[..len].copy_from_slice(&seen[begin..begin + len]);
            Ok(len)
        })
    }

    fn write_at(&self, parts: &[&[u8]], at: u64) -> io::Result<()> {
        let bytes = parts.concat();
        self.disk.call(|w| {
            let (begin, end) = (at as usize, at as usize + bytes.len());
            let more = end.saturating_sub(w.files[self.file].seen.len());
            w.room(more as u64)?;
            // A crash in the middle of a write: the pages are there, or not, by chance.
            let result = w.operation();
            if bytes.iter().any(|byte| *byte != 0) {
                w.written += bytes.len() as u64;
            }
            let content = &mut w.files[self.file];
            if content.seen.len() < end {
                content.seen.resize(end, 0);
            }
            content.seen[begin..end].copy_from_slice(&bytes);
            content.dirty.extend(begin / SECTOR..end.div_ceil(SECTOR));
            result
        })
    }

    fn sync(&self, site: SyncSite) -> io::Result<()> {
        self.disk.call(|w| w.sync(self.file, site))
    }

    fn preallocate(&self, len: u64) -> io::Result<()> {
        self.disk.call(|w| {
            let had = w.files[self.file].seen.len() as u64;
            w.room(len.saturating_sub(had))?;
            w.operation()?;
            w.files[self.file].seen.resize(len.max(had) as usize, 0);
            Ok(())
        })
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.disk.call(|w| {
            w.operation()?;
            w.files[self.file].seen.resize(len as usize, 0);
            Ok(())
        })
    }

    fn len(&self) -> io::Result<u64> {
        self.disk.world(|w| {
            w.signal()?;
            Ok(w.files[self.file].seen.len() as u64)
        })
    }
}

impl Disk for SimDisk {
    fn open(&self, path: &Path, create: Create) -> io::Result<Arc<dyn File>> {
        self.call(|w| {
            if let Some(error) = w.fail_opens {
                return Err(io::Error::from_raw_os_error(error));
            }
            if create != Create::Fresh {
                w.signal()?;
            }
            if create == Create::Fresh {
                w.operation()?;
                if !path.parent().is_some_and(|dir| w.dirs.contains(dir)) {
                    return Err(io::ErrorKind::NotFound.into());
                }
                w.files.push(Content::default());
                let file = w.files.len() - 1;
                w.change(Change::Set(path.to_path_buf(), file));
            } else if w.crashed {
                return Err(io::Error::other("the machine is off"));
            }
            let file = *w.names.get(path).ok_or(io::ErrorKind::NotFound)?;
            Ok(Arc::new(SimFile { disk: self.clone(), file }) as Arc<dyn File>)
        })
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.call(|w| {
            if let Some(error) = w.fail_renames {
                return Err(io::Error::from_raw_os_error(error));
            }
            w.operation()?;
            let file = *w.names.get(from).ok_or(io::ErrorKind::NotFound)?;
            w.change(Change::Move(from.to_path_buf(), to.to_path_buf(), file));
            Ok(())
        })
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.call(|w| {
            w.operation()?;
            if w.fail_removals {
                return Err(io::ErrorKind::PermissionDenied.into());
            }
            let file = *w.names.get(path).ok_or(io::ErrorKind::NotFound)?;
            w.files[file].removed = true;
            w.change(Change::Unset(path.to_path_buf()));
            Ok(())
        })
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.call(|w| {
            w.signal()?;
            let inside = w.names.keys().filter(|path| path.parent() == Some(dir));
            Ok(inside.filter_map(|path| Some(path.file_name()?.to_str()?.to_owned())).collect())
        })
    }

    fn create_dir(&self, dir: &Path) -> io::Result<bool> {
        self.call(|w| {
            w.operation()?;
            Ok(w.dirs.insert(dir.to_path_buf()))
        })
    }

    fn sync_dir(&self, dir: &Path, site: SyncSite) -> io::Result<()> {
        self.call(|w| {
            w.operation()?;
            if w.fail_syncs {
                return Err(io::Error::other("the disk answered with an error"));
            }
            if w.left_out == Some(site) {
                return Ok(());
            }
            let inside = w.dirs.iter().filter(|d| d.parent() == Some(dir)).cloned().collect::<Vec<_>>();
            w.durable_dirs.extend(inside);
            for change in std::mem::take(&mut w.name_log) {
                if change.dir() == Some(dir) {
                    change.apply(&mut w.durable_names);
                } else {
                    w.name_log.push(change);
                }
            }
            Ok(())
        })
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn Send + Sync>> {
        let taken = self.world(|w| w.locks.insert(path.to_path_buf()));
        // Given back by `restart_process` and `reboot`.
        if taken { Ok(Box::new(())) } else { Err(io::ErrorKind::WouldBlock.into()) }
    }
}
