//! The watched folder: which files are plugins, and when a file is whole.
//!
//! A rename counts at once. A file written in place counts once its size and
//! time have not changed for the settle time, so that half a copy is never
//! loaded. Hidden files are not looked at; links may lead within the folder.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use super::{Error, is_step_name};

/// Folder of marker files that `plugin remove` leaves, one per step.
const REMOVED_DIR: &str = ".removed";
/// In the cache's folder: steps that ran in folder mode, so that a file that went
/// while the host was down is missed too.
const KNOWN_STEPS_FILE: &str = "folder-steps";
/// Plugins of one folder.
const PLUGINS_MAX: usize = 256;

/// A plugin file as it lies there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// The file's stem without the number in front: the step's identity.
    pub name: String,
    /// The number in front; files without one come last.
    pub order: u64,
    pub path: PathBuf,
    /// `NAME.yaml` beside it, if there is one.
    pub config: Option<PathBuf>,
    pub stamp: Stamp,
}

/// Changes when a file or its config does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    wasm: FileStamp,
    config: Option<FileStamp>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct FileStamp {
    bytes: u64,
    inode: u64,
    modified: Option<SystemTime>,
}

/// What one look at the folder found.
#[derive(Debug, Default)]
pub(super) struct Listing {
    pub found: BTreeMap<String, Found>,
    /// File and why it is not looked at.
    pub refused: Vec<(String, String)>,
}

/// What `plugin list` shows: a file, or a step whose file is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Of the step; of a refused file as far as it has one.
    pub name: String,
    pub path: PathBuf,
    pub state: FileState,
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
    let Listing { found, refused } =
        list(dir).map_err(|error| Error::Read { path: dir.to_owned(), error })?;
    let is_removed = |(_, file): &(u64, String)| {
        let name = split_file(file).1;
        !found.contains_key(name) && !dir.join(REMOVED_DIR).join(name).exists()
    };
    let removed = known_steps(&known_steps_file(cache_dir)).into_iter().filter(is_removed);
    let mut all: Vec<(u64, String, FileState)> = refused
        .into_iter()
        .map(|(file, reason)| (split_file(&file).0, file, FileState::Refused(reason)))
        .chain(removed.map(|(order, file)| (order, file, FileState::Removed)))
        .collect();
    all.extend(found.values().map(|found| {
        let file = found.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        (found.order, file, FileState::There)
    }));
    all.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
    let listed = |(_, file, state): (u64, String, FileState)| Listed {
        name: split_file(&file).1.to_owned(),
        path: dir.join(file),
        state,
    };
    Ok(all.into_iter().map(listed).collect())
}

pub(super) fn known_steps_file(cache_dir: &Path) -> PathBuf {
    cache_dir.join(KNOWN_STEPS_FILE)
}

/// Order and file of the steps that ran in folder mode; none where nothing was noted.
pub(super) fn known_steps(path: &Path) -> Vec<(u64, String)> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let known = text.lines().filter_map(|line| line.split_once(' '));
    known.map(|(order, file)| (order.parse().unwrap_or(u64::MAX), file.to_owned())).collect()
}

/// Stamps that wait to be quiet.
#[derive(Debug, Default)]
pub(super) struct Settling(BTreeMap<String, (Stamp, Instant)>);

impl Settling {
    /// Whether `found` may be read now. `renamed`: files that came by a rename.
    pub fn is_settled(&mut self, found: &Found, settle: Duration, renamed: &HashSet<PathBuf>) -> bool {
        let now = Instant::now();
        let came_whole = renamed.contains(&found.path)
            || found.config.as_ref().is_some_and(|config| renamed.contains(config));
        let since = match self.0.get(&found.name) {
            Some((stamp, since)) if *stamp == found.stamp => *since,
            _ => {
                self.0.insert(found.name.clone(), (found.stamp.clone(), now));
                now
            }
        };
        let settled = came_whole || now.duration_since(since) >= settle;
        if settled {
            self.0.remove(&found.name);
        }
        settled
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Forgets files that went away before they were quiet.
    pub fn retain(&mut self, found: &BTreeMap<String, Found>) {
        self.0.retain(|name, _| found.contains_key(name));
    }
}

impl Stamp {
    /// Neither file has changed for `age`, by its own time: enough when the host starts.
    pub fn is_older_than(&self, age: Duration) -> bool {
        [Some(&self.wasm), self.config.as_ref()].into_iter().flatten().all(|file| {
            file.modified.and_then(|modified| modified.elapsed().ok()).is_some_and(|elapsed| elapsed >= age)
        })
    }
}

/// Looks at the folder; a folder that is not there is empty.
pub(super) fn list(dir: &Path) -> io::Result<Listing> {
    let mut listing = Listing::default();
    let root = match dir.canonicalize() {
        Ok(root) => root,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(listing),
        Err(error) => return Err(error),
    };
    let mut names: Vec<_> = fs::read_dir(dir)?
        .flatten()
        .filter_map(|file| file.file_name().into_string().ok())
        .filter(|name| !name.starts_with('.') && name.ends_with(".wasm"))
        .collect();
    names.sort();
    for file in names {
        match look(dir, &root, &file) {
            Ok(Some(found)) if listing.found.len() >= PLUGINS_MAX => listing
                .refused
                .push((file, format!("more than {PLUGINS_MAX} plugins; {} is one too many", found.name))),
            Ok(Some(found)) => match listing.found.get(&found.name) {
                Some(other) => {
                    let reason = format!(
                        "has the same name, {}, as {}: rename or remove one",
                        found.name,
                        other.path.file_name().unwrap_or_default().to_string_lossy()
                    );
                    listing.refused.push((file, reason));
                }
                None => {
                    listing.found.insert(found.name.clone(), found);
                }
            },
            Ok(None) => {}
            Err(reason) => listing.refused.push((file, reason)),
        }
    }
    Ok(listing)
}

/// `None`: it went away meanwhile.
fn look(dir: &Path, root: &Path, file: &str) -> Result<Option<Found>, String> {
    let (order, name) = split(file.strip_suffix(".wasm").unwrap_or(file));
    if !is_step_name(name) {
        return Err("its name must be like 10-normalize.wasm: letters, digits, `.`, `_` and `-`".into());
    }
    let path = dir.join(file);
    let Some(wasm) = stamp(&path, root)? else { return Ok(None) };
    let config = path.with_extension("yaml");
    let config_stamp = stamp(&config, root)?;
    Ok(Some(Found {
        name: name.to_owned(),
        order,
        path,
        config: config_stamp.is_some().then_some(config),
        stamp: Stamp { wasm, config: config_stamp },
    }))
}

fn stamp(path: &Path, root: &Path) -> Result<Option<FileStamp>, String> {
    let real = match path.canonicalize() {
        Ok(real) => real,
        Err(error) if error.kind() == io::ErrorKind::NotFound && path.is_symlink() => {
            return Err("is a link that leads nowhere".into());
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("cannot be looked at: {error}")),
    };
    if !real.starts_with(root) {
        return Err("is a link that leads out of the folder: copy the file here".into());
    }
    match fs::metadata(&real) {
        Ok(metadata) if metadata.is_file() => Ok(Some(FileStamp {
            bytes: metadata.len(),
            inode: metadata.ino(),
            modified: metadata.modified().ok(),
        })),
        Ok(_) => Err("is not a file".into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("cannot be looked at: {error}")),
    }
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

/// `10-normalize.wasm` is (10, `normalize`).
pub(super) fn split_file(file: &str) -> (u64, &str) {
    split(file.strip_suffix(".wasm").or_else(|| file.strip_suffix(".yaml")).unwrap_or(file))
}

/// Takes a plugin out of the folder for good: deletes its files and leaves a
/// mark that this was meant, so that pipelines go on without it. `missed`: steps
/// that have no file any more and may be taken out, too.
pub fn remove(dir: &Path, name: &str, missed: &[String]) -> Result<Vec<PathBuf>, Error> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |error| Error::Read { path, error }
    };
    let files: Vec<String> = match fs::read_dir(dir) {
        Ok(files) => files
            .flatten()
            .filter_map(|file| file.file_name().into_string().ok())
            .filter(|file| !file.starts_with('.') && (file.ends_with(".wasm") || file.ends_with(".yaml")))
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
        assert!(listing.refused[0].1.contains("leads out"), "{:?}", listing.refused);
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

    #[test]
    fn a_file_that_still_grows_is_not_settled_and_a_renamed_one_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("1-a.wasm");
        fs::write(&path, b"half").unwrap();
        let find = || list(dir.path()).unwrap().found.remove("a").unwrap();
        let mut settling = Settling::default();
        let (hour, none) = (Duration::from_secs(3600), HashSet::new());
        assert!(!settling.is_settled(&find(), hour, &none));
        assert!(settling.is_settled(&find(), Duration::ZERO, &none));
        fs::write(&path, b"half and half").unwrap();
        assert!(!settling.is_settled(&find(), hour, &none));
        assert!(settling.is_settled(&find(), hour, &HashSet::from([path.clone()])));
    }
}
