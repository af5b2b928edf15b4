//! The watched folder: which files are plugins, and when a file is whole.
//!
//! A rename counts at once, for the file that it names. A file written in place
//! counts once it has not changed for the settle time, so that half a copy is
//! never loaded. Hidden files are not looked at; links may lead within the
//! folder. A file is opened once, and what is open is looked at and read.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::config::ROUTES_RULE;
use super::host::printable;
use super::load::FILE_BYTES_MAX;
use super::{Error, is_step_name};
use crate::step::ROUTES_STEP;

/// Folder of marker files that `plugin remove` leaves, one per step.
const REMOVED_DIR: &str = ".removed";
/// In the cache's folder: steps that ran in folder mode, so that a file that went
/// while the host was down is missed too.
const KNOWN_STEPS_FILE: &str = "folder-steps";
/// Plugins of one folder.
const PLUGINS_MAX: usize = 256;
/// A plugin's config file.
const CONFIG_BYTES_MAX: u64 = 1 << 20;
/// Of the config beside a plugin; the first is what the documentation says.
const CONFIG_SUFFIXES: [&str; 2] = ["yaml", "yml"];

/// A plugin file as it lies there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// The file's stem without the number in front: the step's identity.
    pub name: String,
    /// The number in front; files without one come last.
    pub order: u64,
    pub path: PathBuf,
    /// `NAME.yaml` or `NAME.yml` beside it, if there is one.
    pub config: Option<PathBuf>,
    pub stamp: Stamp,
    /// Used, but hardly as it was meant.
    pub note: Option<String>,
}

/// Changes when a file or its config does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    wasm: FileStamp,
    config: Option<FileStamp>,
}

/// The times are those of the content and of any change: the second cannot be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileStamp {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// A plugin's files as they were read.
#[derive(Debug)]
pub(super) struct Files {
    pub stamp: Stamp,
    pub wasm: Vec<u8>,
    pub config: Option<String>,
}

/// What one look at the folder found.
#[derive(Debug, Default)]
pub(super) struct Listing {
    /// The folder is there.
    pub is_there: bool,
    pub found: BTreeMap<String, Found>,
    pub refused: Vec<RefusedFile>,
}

/// A file that is not looked into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RefusedFile {
    pub file: String,
    pub reason: String,
    /// It may have been meant as a step that no other file is.
    pub is_missed: bool,
}

/// What `plugin list` shows: a file, or a step whose file is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Of the step; of a refused file as far as it has one.
    pub name: String,
    pub path: PathBuf,
    pub state: FileState,
    /// Used, but hardly as it was meant.
    pub note: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileState {
    There,
    /// Why it is not looked at.
    Refused(String),
    /// It ran in folder mode, and nobody said that it may go.
    Removed,
}

/// The folder in the order it runs, as a host with this cache sees it.
pub fn survey(dir: &Path, cache_dir: &Path) -> Result<Vec<Listed>, Error> {
    let Listing { found, refused, .. } =
        list(dir).map_err(|error| Error::Read { path: dir.to_owned(), error })?;
    let is_removed = |(_, file): &(u64, String)| {
        let name = split_file(file).1;
        !found.contains_key(name) && !dir.join(REMOVED_DIR).join(name).exists()
    };
    let removed = known_steps(&known_steps_file(cache_dir))?.into_iter().filter(is_removed);
    let listed = |file: String, state, note| Listed {
        name: split_file(&file).1.to_owned(),
        path: dir.join(file),
        state,
        note,
    };
    let refused = refused.into_iter().map(|it| listed(it.file, FileState::Refused(it.reason), None));
    let mut all: Vec<Listed> = refused.collect();
    all.extend(removed.map(|(_, file)| listed(file, FileState::Removed, None)));
    all.extend(found.into_values().map(|it| listed(file_name(&it.path), FileState::There, it.note)));
    all.sort_by_key(|listed| {
        let file = file_name(&listed.path);
        (split_file(&file).0, file)
    });
    Ok(all)
}

pub(super) fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

pub(super) fn known_steps_file(cache_dir: &Path) -> PathBuf {
    cache_dir.join(KNOWN_STEPS_FILE)
}

/// Returns order and file of the steps that ran in folder mode; none where nothing was noted. Notes
/// that cannot be read are an error: a step that they name would be skipped.
pub(super) fn known_steps(path: &Path) -> Result<Vec<(u64, String)>, Error> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(Error::Read { path: path.to_owned(), error }),
    };
    let known = text.lines().filter_map(|line| line.split_once(' '));
    Ok(known.map(|(order, file)| (order.parse().unwrap_or(u64::MAX), file.to_owned())).collect())
}

/// Files that wait to be quiet, and since when they are; `None`: whole, by a rename.
#[derive(Debug, Default)]
pub(super) struct Settling(BTreeMap<PathBuf, (FileStamp, Option<Instant>)>);

impl Settling {
    /// Whether `found` may be read now: each of its files came by a rename, or is
    /// as it was when it was `read`, or has not changed for `settle`.
    pub fn is_settled(
        &mut self,
        found: &Found,
        read: Option<&Stamp>,
        settle: Duration,
        renamed: &HashSet<PathBuf>,
    ) -> bool {
        let config = found.config.as_ref().zip(found.stamp.config.as_ref());
        let wasm = (&found.path, &found.stamp.wasm, read.map(|stamp| &stamp.wasm));
        let config = config.map(|(path, stamp)| (path, stamp, read.and_then(|read| read.config.as_ref())));
        let mut settled = true;
        for (path, stamp, read) in [Some(wasm), config].into_iter().flatten() {
            settled &= read == Some(stamp) || self.is_whole(path, stamp, settle, renamed.contains(path));
        }
        if settled {
            self.forget(found);
        }
        settled
    }

    fn is_whole(&mut self, path: &Path, stamp: &FileStamp, settle: Duration, renamed: bool) -> bool {
        let now = Instant::now();
        let (known, since) = self.0.entry(path.to_owned()).or_insert((*stamp, Some(now)));
        if known != stamp {
            (*known, *since) = (*stamp, Some(now));
        }
        if renamed {
            *since = None;
        }
        since.is_none_or(|since| now.duration_since(since) >= settle)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn forget(&mut self, found: &Found) {
        self.0.retain(|path, _| *path != found.path && Some(path) != found.config.as_ref());
    }

    /// Forgets files that went away before they were quiet.
    pub fn retain(&mut self, found: &BTreeMap<String, Found>) {
        let there: BTreeSet<&PathBuf> =
            found.values().flat_map(|found| std::iter::once(&found.path).chain(&found.config)).collect();
        self.0.retain(|path, _| there.contains(path));
    }
}

impl Stamp {
    /// Neither file has changed for `age`: enough when the host starts.
    pub fn is_older_than(&self, age: Duration) -> bool {
        [Some(&self.wasm), self.config.as_ref()].into_iter().flatten().all(|file| file.is_older_than(age))
    }
}

impl FileStamp {
    fn of(file: &File) -> io::Result<Self> {
        let found = file.metadata()?;
        if !found.is_file() {
            return Err(io::Error::other("is not a file"));
        }
        Ok(Self {
            device: found.dev(),
            inode: found.ino(),
            bytes: found.len(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    }

    /// By the time of its last change, which no copy sets.
    fn is_older_than(&self, age: Duration) -> bool {
        let (seconds, nanoseconds) = self.changed;
        let since = Duration::new(seconds.max(0).unsigned_abs(), nanoseconds as u32);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        now.checked_sub(since).is_some_and(|elapsed| elapsed >= age)
    }
}

/// Looks at the folder. A folder that is not there is empty; one that cannot be read whole is an
/// error, since a file that is not seen may be a step. So is a link that leads nowhere: what it led
/// to may be a volume that is not mounted.
pub(super) fn list(dir: &Path) -> io::Result<Listing> {
    let mut listing = Listing::default();
    let root = match open_dir(dir) {
        Ok(root) => root,
        Err(Errno::NOENT) if fs::symlink_metadata(dir).is_err() => return Ok(listing),
        Err(error) => return Err(error.into()),
    };
    let names = fs::read_dir(dir)?.map(|file| file.map(|file| file.file_name()));
    let mut names = names.collect::<io::Result<Vec<_>>>()?;
    listing.is_there = true;
    names.retain(|name| !name.as_bytes().starts_with(b"."));
    names.sort();
    let mut configs = BTreeSet::new();
    for name in &names {
        let is_text = name.to_str().is_some();
        let file = printable(&name.to_string_lossy());
        let suffix = file.rsplit_once('.').map(|(_, suffix)| suffix).unwrap_or_default();
        if stem(&file).is_none() {
            continue;
        }
        if !suffix.eq_ignore_ascii_case("wasm") {
            configs.insert(file);
            continue;
        }
        let looked = match (is_text, suffix) {
            (false, _) => Err("its name is not UTF-8: rename it".to_owned()),
            (true, "wasm") => look(dir, &root, &file),
            _ => Err("its name must end in .wasm, in small letters: rename it".to_owned()),
        };
        let mut refuse =
            |file, reason, is_missed| listing.refused.push(RefusedFile { file, reason, is_missed });
        match looked {
            Ok(Some(found)) => match listing.found.get(&found.name) {
                Some(other) => {
                    let other = file_name(&other.path);
                    let name = found.name;
                    refuse(
                        file,
                        format!("has the same name, {name}, as {other}: rename or remove one"),
                        false,
                    );
                }
                None if listing.found.len() >= PLUGINS_MAX => {
                    refuse(
                        file,
                        format!("is one too many: a folder has at most {PLUGINS_MAX} plugins"),
                        true,
                    );
                }
                None => {
                    listing.found.insert(found.name.clone(), found);
                }
            },
            Ok(None) => {}
            Err(reason) => refuse(file, reason, true),
        }
    }
    for config in listing.found.values().filter_map(|found| found.config.as_deref()) {
        configs.remove(&file_name(config));
    }
    listing.refused.extend(configs.into_iter().map(|file| {
        let reason = unused_config(&file, &listing.found);
        RefusedFile { file, reason, is_missed: false }
    }));
    Ok(listing)
}

/// Why a config beside the plugins is nobody's.
fn unused_config(file: &str, found: &BTreeMap<String, Found>) -> String {
    match found.get(split_file(file).1) {
        Some(found) => {
            let config = file_name(&found.path.with_extension(CONFIG_SUFFIXES[0]));
            format!("is not read: the config of {} is {config}", file_name(&found.path))
        }
        None => "is not read: it is the config of no plugin here".to_owned(),
    }
}

/// `None`: it went away meanwhile.
fn look(dir: &Path, root: &OwnedFd, file: &str) -> Result<Option<Found>, String> {
    let stem = file.strip_suffix(".wasm").unwrap_or(file);
    let (order, name) = split(stem);
    if !is_step_name(name) {
        return Err("its name must be like 10-normalize.wasm: letters, digits, `.`, `_` and `-`".into());
    }
    if name == ROUTES_STEP {
        return Err(format!("its name {ROUTES_RULE}"));
    }
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if order == u64::MAX && stem.split_once('-').is_some_and(|(number, _)| is_number(number)) {
        return Err("the number in front of its name is too large".into());
    }
    let note = (order == u64::MAX && name.starts_with(|c: char| c.is_ascii_digit()))
        .then(|| format!("runs after the others, as the step {name}: its name has no number and `-` in front, as in 10-normalize.wasm"));
    let path = dir.join(file);
    let Some(wasm) = stamp(root, file)? else { return Ok(None) };
    let mut configs = Vec::new();
    for suffix in CONFIG_SUFFIXES {
        let config = format!("{stem}.{suffix}");
        if let Some(stamp) = stamp(root, &config).map_err(|reason| format!("{config} {reason}"))? {
            configs.push((dir.join(config), stamp));
        }
    }
    if configs.len() > 1 {
        return Err(format!("has two configs, {stem}.yaml and {stem}.yml: remove one"));
    }
    let (config, config_stamp) = configs.pop().unzip();
    let stamp = Stamp { wasm, config: config_stamp };
    Ok(Some(Found { name: name.to_owned(), order, path, config, stamp, note }))
}

fn stamp(root: &OwnedFd, file: &str) -> Result<Option<FileStamp>, String> {
    match open(root, file, OFlags::PATH) {
        Ok(open) => FileStamp::of(&open).map(Some).map_err(|error| error.to_string()),
        Err(Errno::NOENT) if rustix::fs::readlinkat(root, file, Vec::new()).is_ok() => {
            Err("is a link that leads nowhere".into())
        }
        Err(Errno::NOENT) => Ok(None),
        Err(Errno::XDEV) => {
            Err("is a link that leads out of the folder, or an absolute one: copy the file here".into())
        }
        Err(error) => Err(format!("cannot be opened: {error}")),
    }
}

/// The files of a plugin, which may have changed since they were `found`: see [`Files::stamp`].
pub(super) fn read(dir: &Path, found: &Found) -> Result<Files, Error> {
    let root = open_dir(dir).map_err(|error| Error::Read { path: dir.to_owned(), error: error.into() })?;
    let read = |path: &Path, bytes_max: u64| {
        let failed = |error| Error::Read { path: path.to_owned(), error };
        // Not blocked by a pipe that lies there now.
        let open = open(&root, &file_name(path), OFlags::RDONLY | OFlags::NONBLOCK);
        let file = open.map_err(|error| failed(error.into()))?;
        let stamp = FileStamp::of(&file).map_err(failed)?;
        let mut bytes = Vec::new();
        file.take(bytes_max + 1).read_to_end(&mut bytes).map_err(failed)?;
        Ok::<_, Error>((stamp, bytes))
    };
    let (wasm_stamp, wasm) = read(&found.path, FILE_BYTES_MAX)?;
    if wasm.len() as u64 > FILE_BYTES_MAX {
        return Err(Error::TooLarge { path: found.path.clone() });
    }
    let config = found.config.as_deref().map(|path| read(path, CONFIG_BYTES_MAX)).transpose()?;
    let stamp = Stamp { wasm: wasm_stamp, config: config.as_ref().map(|(stamp, _)| *stamp) };
    let config = match (config, found.config.as_deref().map(file_name)) {
        (Some((_, bytes)), Some(file)) if bytes.len() as u64 > CONFIG_BYTES_MAX => {
            return Err(Error::Config(format!("{file}: has more than {} KiB", CONFIG_BYTES_MAX >> 10)));
        }
        (Some((_, bytes)), Some(file)) => {
            Some(String::from_utf8(bytes).map_err(|_| Error::Config(format!("{file}: is not UTF-8 text")))?)
        }
        _ => None,
    };
    Ok(Files { stamp, wasm, config })
}

fn open_dir(dir: &Path) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(CWD, dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// Opens a file of the folder, through links that stay within it.
fn open(root: &OwnedFd, file: &str, flags: OFlags) -> Result<File, Errno> {
    let flags = flags | OFlags::CLOEXEC;
    let within = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    match rustix::fs::openat2(root, file, flags, Mode::empty(), within) {
        // A kernel before 5.6, or a sandbox that does not know the call: no links then.
        Err(Errno::NOSYS | Errno::PERM) => {
            rustix::fs::openat(root, file, flags | OFlags::NOFOLLOW, Mode::empty())
        }
        opened => opened,
    }
    .map(File::from)
}

/// `10-normalize` is (10, `normalize`).
fn split(stem: &str) -> (u64, &str) {
    if let Some((number, name)) = stem.split_once('-')
        && let Ok(order) = number.parse()
    {
        return (order, name);
    }
    (u64::MAX, stem)
}

/// `10-normalize.wasm` is (10, `normalize`), and so is its config.
pub(super) fn split_file(file: &str) -> (u64, &str) {
    split(stem(file).unwrap_or(file))
}

/// Of a plugin's file or its config, however its suffix is written.
fn stem(file: &str) -> Option<&str> {
    let (stem, suffix) = file.rsplit_once('.')?;
    let mut known = std::iter::once(&"wasm").chain(&CONFIG_SUFFIXES);
    known.any(|known| known.eq_ignore_ascii_case(suffix)).then_some(stem)
}

/// Takes a plugin out of the folder for good: deletes its files and leaves a
/// mark that this was meant, so that pipelines go on without it. `missed`: steps
/// that have no file any more and may be taken out, too.
pub fn remove(dir: &Path, name: &str, missed: &[String]) -> Result<Vec<PathBuf>, Error> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |error| Error::Read { path, error }
    };
    let names = |files: fs::ReadDir| {
        let names = files.map(|file| file.map(|file| file.file_name()));
        names.collect::<io::Result<Vec<_>>>()
    };
    let files: Vec<String> = match fs::read_dir(dir).and_then(names) {
        Ok(names) => names
            .into_iter()
            .filter_map(|name| name.into_string().ok())
            .filter(|file| !file.starts_with('.') && stem(file).is_some())
            .collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(failed(dir)(error)),
    };
    let known: BTreeSet<&str> =
        files.iter().map(|file| split_file(file).1).chain(missed.iter().map(String::as_str)).collect();
    if !known.contains(name) || !is_step_name(name) {
        let known = Vec::from_iter(known).join(", ");
        return Err(Error::Unknown { name: name.to_owned(), dir: dir.to_owned(), known });
    }
    let marks = dir.join(REMOVED_DIR);
    fs::create_dir_all(&marks).map_err(failed(&marks))?;
    // First the mark: a file that is gone without one holds the pipelines.
    fs::write(marks.join(name), b"").map_err(failed(&marks))?;
    let mut deleted = Vec::new();
    for file in files.iter().filter(|file| split_file(file).1 == name) {
        let path = dir.join(file);
        fs::remove_file(&path).map_err(failed(&path))?;
        deleted.push(path);
    }
    Ok(deleted)
}

/// Whether [`remove`] was called for a plugin that is gone; takes the mark away.
pub(super) fn take_removed_mark(dir: &Path, name: &str) -> bool {
    fs::remove_file(dir.join(REMOVED_DIR).join(name)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(dir: &Path) -> Vec<(String, u64)> {
        let mut found: Vec<_> = list(dir).unwrap().found.into_values().collect();
        found.sort_by(|a, b| (a.order, &a.name).cmp(&(b.order, &b.name)));
        found.into_iter().map(|f| (f.name, f.order)).collect()
    }

    #[test]
    fn a_steps_identity_is_the_stem_without_its_number() {
        let dir = tempfile::tempdir().unwrap();
        for file in
            ["20-enrich.wasm", "5-normalize.wasm", "route.wasm", ".x.wasm", "notes.txt", "7-a.wasm.part"]
        {
            fs::write(dir.path().join(file), b"x").unwrap();
        }
        let expected = [("normalize", 5), ("enrich", 20), ("route", u64::MAX)];
        assert_eq!(listing(dir.path()), expected.map(|(name, order)| (name.to_owned(), order)));
    }

    #[test]
    fn links_may_lead_within_the_folder_only() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::NamedTempFile::new().unwrap();
        fs::create_dir(dir.path().join("..data")).unwrap();
        fs::write(dir.path().join("..data/a.wasm"), b"x").unwrap();
        std::os::unix::fs::symlink("..data/a.wasm", dir.path().join("a.wasm")).unwrap();
        std::os::unix::fs::symlink(outside.path(), dir.path().join("b.wasm")).unwrap();
        let listing = list(dir.path()).unwrap();
        assert_eq!(listing.found.keys().collect::<Vec<_>>(), ["a"]);
        assert!(listing.refused[0].reason.contains("leads out"), "{:?}", listing.refused);
    }

    #[test]
    fn only_what_is_there_or_missed_can_be_removed() {
        let (dir, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(dir.path().join("20-enrich.wasm"), b"x").unwrap();
        fs::write(cache.path().join(KNOWN_STEPS_FILE), "10 10-redact.wasm\n20 20-enrich.wasm\n").unwrap();
        let states = || -> Vec<_> {
            let listed = survey(dir.path(), cache.path()).unwrap();
            listed.into_iter().map(|listed| (listed.name, listed.state)).collect()
        };
        let enrich = ("enrich".to_owned(), FileState::There);
        assert_eq!(states(), [("redact".to_owned(), FileState::Removed), enrich.clone()]);

        let missed = ["redact".to_owned()];
        let error = remove(dir.path(), "redcat", &missed).unwrap_err().to_string();
        assert!(error.contains("no plugin `redcat`") && error.contains("enrich, redact"), "{error}");
        assert!(!dir.path().join(REMOVED_DIR).exists(), "no mark is left");
        assert_eq!(remove(dir.path(), "redact", &missed).unwrap(), [""; 0].map(PathBuf::from));
        assert_eq!(states(), [enrich]);
        assert_eq!(remove(dir.path(), "enrich", &[]).unwrap(), [dir.path().join("20-enrich.wasm")]);
        let gone = dir.path().join("nowhere");
        assert!(remove(&gone, "enrich", &[]).is_err() && !gone.exists());
    }

    /// The names of what is refused, in a folder with these files.
    fn refused(files: &[&str]) -> Vec<String> {
        let dir = tempfile::tempdir().unwrap();
        files.iter().for_each(|file| fs::write(dir.path().join(file), b"x").unwrap());
        list(dir.path()).unwrap().refused.into_iter().map(|refused| refused.file).collect()
    }

    #[test]
    fn no_file_that_may_be_meant_as_a_plugin_or_its_config_is_passed_over_in_silence() {
        use std::ffi::OsStr;
        assert_eq!(refused(&["20-b.WASM", "notes.txt", "1-a.wasm"]), ["20-b.WASM"]);
        assert_eq!(refused(&["99999999999999999999999-a.wasm"]), ["99999999999999999999999-a.wasm"]);
        assert_eq!(refused(&["1-a.wasm", "1-a.yml"]), [""; 0]);
        assert_eq!(refused(&["1-a.wasm", "1-a.yml", "1-a.yaml"]), ["1-a.wasm", "1-a.yaml", "1-a.yml"]);
        assert_eq!(refused(&["1-a.wasm", "a.yaml", "1-a.YAML"]), ["1-a.YAML", "a.yaml"]);
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(OsStr::from_bytes(b"1-\xff.wasm")), b"x").unwrap();
        fs::write(dir.path().join("30_x.wasm"), b"x").unwrap();
        let listing = list(dir.path()).unwrap();
        assert!(listing.refused[0].reason.contains("not UTF-8"), "{:?}", listing.refused);
        assert!(listing.found["30_x"].note.as_ref().unwrap().contains("after the others"));
    }

    #[test]
    fn what_is_opened_is_what_is_looked_at_and_has_a_bound() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::NamedTempFile::new().unwrap();
        let (wasm, config) = (dir.path().join("1-a.wasm"), dir.path().join("1-a.yaml"));
        fs::write(&wasm, b"x").unwrap();
        fs::write(&config, b"a: 1").unwrap();
        let found = list(dir.path()).unwrap().found.remove("a").unwrap();
        let files = read(dir.path(), &found).unwrap();
        assert_eq!((files.stamp, files.config.as_deref()), (found.stamp.clone(), Some("a: 1")));
        fs::write(&config, "x".repeat(2 << 20)).unwrap();
        assert!(read(dir.path(), &found).unwrap_err().to_string().contains("KiB"));
        fs::remove_file(&config).unwrap();
        std::os::unix::fs::symlink(outside.path(), &config).unwrap();
        assert!(matches!(read(dir.path(), &found), Err(Error::Read { .. })), "swapped for a link");
        fs::remove_file(&wasm).unwrap();
        rustix::fs::mkfifoat(CWD, &wasm, Mode::RWXU).unwrap();
        assert!(read(dir.path(), &found).unwrap_err().to_string().contains("not a file"));
        assert!(list(dir.path()).unwrap().refused[0].reason.contains("not a file"));
    }

    #[test]
    fn a_change_in_place_is_seen_whatever_size_and_time_it_has() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("1-a.wasm");
        let put = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            File::options().append(true).open(&path).unwrap().set_modified(UNIX_EPOCH).unwrap();
            list(dir.path()).unwrap().found.remove("a").unwrap().stamp
        };
        let first = put(b"1.0.0");
        // The kernel's clock for it ticks every few milliseconds.
        while list(dir.path()).unwrap().found["a"].stamp == first {
            put(b"1.0.9");
        }
    }

    #[test]
    fn a_file_that_still_grows_is_not_settled_and_a_renamed_one_is() {
        let dir = tempfile::tempdir().unwrap();
        let (path, config) = (dir.path().join("1-a.wasm"), dir.path().join("1-a.yaml"));
        fs::write(&path, b"half").unwrap();
        let find = || list(dir.path()).unwrap().found.remove("a").unwrap();
        let mut settling = Settling::default();
        let (hour, none) = (Duration::from_secs(3600), HashSet::new());
        assert!(!settling.is_settled(&find(), None, hour, &none));
        assert!(settling.is_settled(&find(), None, Duration::ZERO, &none) && settling.is_empty());
        fs::write(&path, b"half and half").unwrap();
        assert!(!settling.is_settled(&find(), None, hour, &none));
        fs::write(&config, b"a: 1").unwrap();
        let config = HashSet::from([config]);
        assert!(
            !settling.is_settled(&find(), None, hour, &config),
            "the rename of a config is not the plugin's"
        );
        assert!(settling.is_settled(&find(), None, hour, &HashSet::from([path.clone()])), "both are whole");
        let read = find().stamp;
        fs::write(dir.path().join("1-a.yaml"), b"a: 2").unwrap();
        assert!(settling.is_settled(&find(), Some(&read), hour, &config), "the plugin is as it was read");
    }
}
