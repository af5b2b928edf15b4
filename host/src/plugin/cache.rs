//! The cache of compiled plugins.
//!
//! What lies here is native code that will run in this process, so the folder
//! is private (0700, ours, no symlink), a file is opened without following
//! links, and its digest is compared before the code is used. The key is the
//! SHA-256 of the plugin file and of what compiles it: this program's version,
//! the engine's settings and version.
//!
//! `KEY.native` is code, `KEY.lines` the files and lines of it, where there are, and
//! `KEY.json` says what it is; `KEY.killed` says that
//! the file ended its compiler, which then is not tried on these bytes again.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::hash::{Hash, Hasher};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use wasmtime::Engine;
use wasmtime::component::Component;

use super::Description;
use super::compile::ARTIFACT_BYTES_MAX;
use super::lines::{LINES_BYTES_MAX, Lines};
use super::load::Report;
use crate::step::VERSIONS_MAX;

/// Compiled plugins kept; the ones used longest ago go first.
const ENTRIES_MAX: usize = 64;
/// Native code kept, all together; larger code is not kept at all.
const BYTES_MAX: u64 = 512 << 20;
const NOTE_BYTES_MAX: u64 = 4 << 20;
/// Files that ended a compiler and are remembered.
const KILLED_MAX: usize = 256;

/// A private folder of compiled plugins.
#[derive(Clone, Debug)]
pub struct Cache {
    dir: PathBuf,
}

/// Beside each artifact.
#[derive(Serialize, Deserialize)]
pub(super) struct Note {
    artifact_sha256: String,
    lines_sha256: String,
    pub report: Report,
    pub description: Description,
}

/// How a file ended its compiler, and under which limits.
#[derive(Serialize, Deserialize)]
struct Killed {
    reason: String,
    cpu_s: u64,
    memory: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    #[error("plugin cache {0}: must be a folder of its own, not a link or a file")]
    NotAFolder(PathBuf),
    #[error("plugin cache {0}: must belong to the user that runs headworks")]
    Owner(PathBuf),
    #[error("plugin cache {0}: others may write to it (mode {1:o}), and it holds code: delete it")]
    Mode(PathBuf, u32),
    #[error("plugin cache: {bytes} bytes of native code, at most {} MiB are kept", BYTES_MAX >> 20)]
    TooLarge { bytes: u64 },
    #[error("plugin cache {0}: {1}")]
    Io(PathBuf, io::Error),
}

impl Cache {
    /// Makes the folder where there is none; refuses one that others can write to.
    pub fn open(dir: &Path) -> Result<Self, CacheError> {
        let failed = |error| CacheError::Io(dir.to_owned(), error);
        if let Some(parent) = dir.parent() {
            fs::create_dir_all(parent).map_err(failed)?;
        }
        match DirBuilder::new().mode(0o700).create(dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
            _ => {}
        }
        Self::check(dir)?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// One that is there already, of a host that may run: nothing is changed in it.
    pub fn existing(dir: &Path) -> Option<Self> {
        Self::check(dir).ok().map(|()| Self { dir: dir.to_owned() })
    }

    fn check(dir: &Path) -> Result<(), CacheError> {
        let failed = |error| CacheError::Io(dir.to_owned(), error);
        let metadata = fs::symlink_metadata(dir).map_err(failed)?;
        if !metadata.is_dir() {
            return Err(CacheError::NotAFolder(dir.to_owned()));
        }
        if metadata.uid() != rustix::process::geteuid().as_raw() {
            return Err(CacheError::Owner(dir.to_owned()));
        }
        if metadata.mode() & 0o022 != 0 {
            return Err(CacheError::Mode(dir.to_owned(), metadata.mode() & 0o777));
        }
        if metadata.mode() & 0o077 != 0 {
            fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).map_err(failed)?;
        }
        Ok(())
    }

    /// Removes what a host left that was killed: files half written, code without
    /// its note, folders of compilers (of 0.1.0). For the one host of the folder, at its start.
    pub(super) fn clean_up(&self) {
        for (name, path) in self.files() {
            let key = name.strip_suffix(".native").or_else(|| name.strip_suffix(".lines"));
            let is_orphan = key.is_some_and(|key| !self.note(key).is_file());
            // What cannot be removed takes space, and harms nothing.
            if name.starts_with(".compile-") {
                let _ = fs::remove_dir_all(&path);
            } else if is_orphan || name.ends_with(".tmp") {
                let _ = fs::remove_file(&path);
            }
        }
        self.prune();
    }

    /// What is known of a file without its code.
    pub(super) fn note_of(&self, key: &str) -> Option<Note> {
        serde_json::from_slice(&self.read(&self.note(key), NOTE_BYTES_MAX)?).ok()
    }

    /// The compiled component, its note and its lines, where they are here and whole.
    pub(super) fn load(&self, key: &str, engine: &Engine) -> Option<(Component, Note, Lines)> {
        let note = self.note_of(key)?;
        let artifact = self.read(&self.artifact(key), ARTIFACT_BYTES_MAX as u64)?;
        if hex(&Sha256::digest(&artifact)) != note.artifact_sha256 {
            tracing::warn!(path = %self.artifact(key).display(), "compiled plugin was changed, compiling it again");
            return None;
        }
        let component = deserialize(engine, &artifact).ok()?;
        // Without them texts of traps say less.
        let lines = self.read(&self.lines(key), LINES_BYTES_MAX as u64).unwrap_or_default();
        let is_whole = hex(&Sha256::digest(&lines)) == note.lines_sha256;
        let lines = Lines::read(if is_whole { lines } else { Vec::new() });
        // For the pruning by age; where it fails this one goes early.
        let _ = File::options()
            .append(true)
            .open(self.note(key))
            .and_then(|file| file.set_modified(SystemTime::now()));
        Some((component, note, lines))
    }

    /// Keeps what a compiling child made, for the next start.
    pub(super) fn store(
        &self,
        key: &str,
        artifact: &[u8],
        lines: &Lines,
        report: &Report,
        description: &Description,
    ) -> Result<(), CacheError> {
        if artifact.len() as u64 > BYTES_MAX {
            return Err(CacheError::TooLarge { bytes: artifact.len() as u64 });
        }
        let artifact_sha256 = hex(&Sha256::digest(artifact));
        let lines_sha256 = hex(&Sha256::digest(lines.bytes()));
        let (report, description) = (report.clone(), description.clone());
        let note = Note { artifact_sha256, lines_sha256, report, description };
        let note = serde_json::to_vec(&note).expect("a note is plain text");
        // The note last: code without one does not count.
        self.write(&self.artifact(key), artifact)?;
        if !lines.bytes().is_empty() {
            self.write(&self.lines(key), lines.bytes())?;
        }
        self.write(&self.note(key), &note)?;
        self.prune();
        Ok(())
    }

    /// Why the file's compiler ended before, under limits (seconds of CPU, bytes) no lower than these.
    pub(super) fn killed(&self, key: &str, (cpu_s, memory): (u64, u64)) -> Option<String> {
        let killed: Killed =
            serde_json::from_slice(&self.read(&self.killed_note(key), NOTE_BYTES_MAX)?).ok()?;
        (cpu_s <= killed.cpu_s && memory <= killed.memory).then_some(killed.reason)
    }

    pub(super) fn note_killed(
        &self,
        key: &str,
        reason: &str,
        (cpu_s, memory): (u64, u64),
    ) -> Result<(), CacheError> {
        let killed = Killed { reason: reason.to_owned(), cpu_s, memory };
        self.write(&self.killed_note(key), &serde_json::to_vec(&killed).expect("a note is plain text"))?;
        self.prune();
        Ok(())
    }

    fn artifact(&self, key: &str) -> PathBuf {
        self.dir.join(format!("{key}.native"))
    }

    fn lines(&self, key: &str) -> PathBuf {
        self.dir.join(format!("{key}.lines"))
    }

    fn note(&self, key: &str) -> PathBuf {
        self.dir.join(format!("{key}.json"))
    }

    fn killed_note(&self, key: &str) -> PathBuf {
        self.dir.join(format!("{key}.killed"))
    }

    /// Names and paths; none where the folder cannot be listed.
    fn files(&self) -> Vec<(String, PathBuf)> {
        let files = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        files.filter_map(|file| Some((file.file_name().into_string().ok()?, file.path()))).collect()
    }

    fn read(&self, path: &Path, bytes_max: u64) -> Option<Vec<u8>> {
        let file =
            OpenOptions::new().read(true).custom_flags(OFlags::NOFOLLOW.bits() as i32).open(path).ok()?;
        let metadata = file.metadata().ok()?;
        let ours = metadata.is_file() && metadata.uid() == rustix::process::geteuid().as_raw();
        if !ours || metadata.mode() & 0o022 != 0 || metadata.len() > bytes_max {
            return None;
        }
        let mut bytes = Vec::with_capacity(metadata.len() as usize);
        file.take(bytes_max).read_to_end(&mut bytes).ok()?;
        Some(bytes)
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), CacheError> {
        let temporary = self.dir.join(format!(".{}.tmp", uuid::Uuid::new_v4()));
        let written = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)
            .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
            .and_then(|()| fs::rename(&temporary, path));
        if written.is_err() {
            // Nothing to add to the error that is returned.
            let _ = fs::remove_file(&temporary);
        }
        written.map_err(|error| CacheError::Io(path.to_owned(), error))
    }

    /// Best effort: what cannot be listed or removed stays until next time.
    fn prune(&self) {
        let modified = |path: &Path| fs::metadata(path).and_then(|file| file.modified()).ok();
        let with_suffix = |suffix: &str| {
            let keyed = self
                .files()
                .into_iter()
                .filter_map(|(name, path)| Some((modified(&path)?, name.strip_suffix(suffix)?.to_owned())));
            let mut keyed: Vec<_> = keyed.collect();
            keyed.sort();
            keyed.reverse();
            keyed.into_iter().map(|(_, key)| key)
        };
        let (mut entries, mut bytes) = (0, 0);
        let mut versions: HashMap<String, usize> = HashMap::new();
        for key in with_suffix(".json") {
            let bytes_of = |path: &Path| fs::metadata(path).map_or(0, |file| file.len());
            let size = bytes_of(&self.artifact(&key)) + bytes_of(&self.lines(&key));
            // One that cannot be read is of another version of Headworks.
            let is_kept = self.note_of(&key).is_some_and(|note| {
                let versions = versions.entry(note.description.name).or_default();
                *versions += 1;
                *versions <= VERSIONS_MAX && entries < ENTRIES_MAX && bytes + size <= BYTES_MAX
            });
            if is_kept {
                entries += 1;
                bytes += size;
            } else {
                let _ = fs::remove_file(self.note(&key));
                let _ = fs::remove_file(self.artifact(&key));
                let _ = fs::remove_file(self.lines(&key));
            }
        }
        for key in with_suffix(".killed").skip(KILLED_MAX) {
            let _ = fs::remove_file(self.killed_note(&key));
        }
    }
}

/// The key of a plugin file, by its SHA-256, where `engine` runs it.
pub(super) fn key(file_sha256: &[u8], engine: &Engine) -> String {
    struct Bytes(Sha256);
    impl Hasher for Bytes {
        fn finish(&self) -> u64 {
            0
        }
        fn write(&mut self, bytes: &[u8]) {
            self.0.update(bytes);
        }
    }
    let mut hasher = Bytes(Sha256::new());
    hasher.write(file_sha256);
    hasher.write(concat!("headworks ", env!("CARGO_PKG_VERSION"), " report 3").as_bytes());
    engine.precompile_compatibility_hash().hash(&mut hasher);
    hex(&hasher.0.finalize())
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes that [`hex`] makes such a text of.
pub(super) fn unhex(text: &str) -> Option<Vec<u8>> {
    let byte = |at| u8::from_str_radix(text.get(at..at + 2)?, 16).ok();
    (0..text.len()).step_by(2).map(byte).collect()
}

/// Native code from the cache, or fresh from the compiler.
pub(super) fn deserialize(engine: &Engine, artifact: &[u8]) -> wasmtime::Result<Component> {
    // SAFETY: `deserialize` runs what it is given, so it must be what
    // `Engine::precompile_component` made. Both callers hold that: one has the
    // bytes straight from the compiling child, which runs this program and is
    // trusted as far as that, or from this process; the other read them, without following links, from a file that only this user can
    // write, in a folder that only this user can enter (`Cache::open`), and
    // compared their SHA-256 with the one noted when they were made. wasmtime
    // itself refuses another version's or another setting's code.
    #[allow(unsafe_code)]
    unsafe {
        Component::deserialize(engine, artifact)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugin::Kind;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn the_last_versions_of_a_plugin_are_kept_and_nothing_of_a_host_that_was_killed() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path()).unwrap();
        let report = Report { form: None, imports: Vec::new(), exports: Vec::new(), kind: Ok(Kind::Batch) };
        let put = |key: &str, name: &str| {
            let description = Description { name: name.to_owned(), ..Description::default() };
            cache.store(key, b"code", &Lines::default(), &report, &description).unwrap();
        };
        put("other", "route");
        for version in 1..=VERSIONS_MAX + 2 {
            put(&format!("v{version}"), "enrich");
        }
        let kept: Vec<_> = names(dir.path()).into_iter().filter(|name| name.ends_with(".json")).collect();
        assert!(kept.len() == VERSIONS_MAX + 1 && kept.contains(&"other.json".to_owned()), "{kept:?}");
        let last = format!("v{}.json", VERSIONS_MAX + 2);
        assert!(kept.contains(&last) && !kept.contains(&"v1.json".to_owned()), "{kept:?}");
        let whole = names(dir.path());
        for left in [".x.tmp", "orphan.native", "folder-steps.tmp"] {
            fs::write(dir.path().join(left), b"x").unwrap();
        }
        fs::create_dir_all(dir.path().join(".compile-1/x")).unwrap();
        // As 0.1.0 wrote it: of no use to this version.
        fs::write(dir.path().join("old.json"), br#"{"artifact_sha256":"00","description":null}"#).unwrap();
        fs::write(dir.path().join("old.native"), b"x").unwrap();
        cache.clean_up();
        assert_eq!(names(dir.path()), whole);
    }

    #[test]
    fn a_file_that_ended_its_compiler_is_remembered_until_the_limits_are_raised() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path()).unwrap();
        cache.note_killed("key", "took over 30 s", (30, 100)).unwrap();
        assert_eq!(cache.killed("key", (30, 100)).as_deref(), Some("took over 30 s"));
        assert!(cache.killed("key", (10, 100)).is_some());
        assert!(cache.killed("key", (31, 100)).is_none() && cache.killed("key", (30, 101)).is_none());
        assert!(cache.killed("other", (1, 1)).is_none());
    }

    #[test]
    fn native_code_past_the_bound_goes_oldest_first() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path()).unwrap();
        let report = Report { form: None, imports: Vec::new(), exports: Vec::new(), kind: Ok(Kind::Batch) };
        let put = |name: &str| {
            let description = Description { name: name.to_owned(), ..Description::default() };
            cache.store(name, b"code", &Lines::default(), &report, &description).unwrap();
        };
        for name in ["first", "second"] {
            put(name);
            // Takes no room on disk: all of it is a hole.
            let file = fs::File::options().write(true).open(cache.artifact(name)).unwrap();
            file.set_len(BYTES_MAX / 2).unwrap();
        }
        put("third");
        let kept: Vec<_> = names(dir.path()).into_iter().filter(|name| name.ends_with(".json")).collect();
        assert_eq!(kept, ["second.json", "third.json"]);
    }
}
