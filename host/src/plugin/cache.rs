//! The cache of compiled plugins.
//!
//! What lies here is native code that will run in this process, so the folder
//! is private (0700, ours, no symlink), a file is opened without following
//! links, and its digest is compared before the code is used. The key is the
//! SHA-256 of the component and of the engine's settings and version.

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

/// Compiled plugins kept; the ones used longest ago go first.
const ENTRIES_MAX: usize = 64;
const ARTIFACT_BYTES_MAX: u64 = 1 << 30;
const NOTE_BYTES_MAX: u64 = 4 << 20;

/// A private folder of compiled plugins.
#[derive(Clone, Debug)]
pub struct Cache {
    dir: PathBuf,
}

/// Beside each artifact.
#[derive(Serialize, Deserialize)]
struct Note {
    artifact_sha256: String,
    description: Option<Description>,
}

#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    #[error("plugin cache {0}: must be a folder of its own, not a link or a file")]
    NotAFolder(PathBuf),
    #[error("plugin cache {0}: must belong to the user that runs headworks")]
    Owner(PathBuf),
    #[error("plugin cache {0}: others may write to it (mode {1:o}), and it holds code: delete it")]
    Mode(PathBuf, u32),
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
        Ok(Self { dir: dir.to_owned() })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The compiled component and its description, where they are here and whole.
    pub(super) fn load(&self, key: &str, engine: &Engine) -> Option<(Component, Option<Description>)> {
        let note: Note = serde_json::from_slice(&self.read(&self.note(key), NOTE_BYTES_MAX)?).ok()?;
        let artifact = self.read(&self.artifact(key), ARTIFACT_BYTES_MAX)?;
        if hex(&Sha256::digest(&artifact)) != note.artifact_sha256 {
            tracing::warn!(path = %self.artifact(key).display(), "compiled plugin was changed, compiling it again");
            return None;
        }
        let component = deserialize(engine, &artifact).ok()?;
        // For the pruning by age; where it fails this one goes early.
        let _ = File::options()
            .append(true)
            .open(self.note(key))
            .and_then(|file| file.set_modified(SystemTime::now()));
        Some((component, note.description))
    }

    /// Keeps what a compiling child made, for the next start.
    pub(super) fn store(
        &self,
        key: &str,
        artifact: &[u8],
        description: Option<&Description>,
    ) -> Result<(), CacheError> {
        let note =
            Note { artifact_sha256: hex(&Sha256::digest(artifact)), description: description.cloned() };
        let note = serde_json::to_vec(&note).expect("a note is plain text");
        self.write(&self.artifact(key), artifact)?;
        self.write(&self.note(key), &note)?;
        self.prune();
        Ok(())
    }

    fn artifact(&self, key: &str) -> PathBuf {
        self.dir.join(format!("{key}.native"))
    }

    fn note(&self, key: &str) -> PathBuf {
        self.dir.join(format!("{key}.json"))
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
        let Ok(files) = fs::read_dir(&self.dir) else { return };
        let mut notes: Vec<(SystemTime, String)> = files
            .flatten()
            .filter_map(|file| {
                let key = file.file_name().to_str()?.strip_suffix(".json")?.to_owned();
                Some((file.metadata().ok()?.modified().ok()?, key))
            })
            .collect();
        notes.sort();
        for (_, key) in notes.iter().take(notes.len().saturating_sub(ENTRIES_MAX)) {
            let _ = fs::remove_file(self.artifact(key));
            let _ = fs::remove_file(self.note(key));
        }
    }
}

/// The key of a component compiled by `engine`.
pub(super) fn key(component: &[u8], engine: &Engine) -> String {
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
    hasher.write(&Sha256::digest(component));
    engine.precompile_compatibility_hash().hash(&mut hasher);
    hex(&hasher.0.finalize())
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Native code from the cache, or fresh from the compiler.
pub(super) fn deserialize(engine: &Engine, artifact: &[u8]) -> wasmtime::Result<Component> {
    // SAFETY: `deserialize` runs what it is given, so it must be what
    // `Engine::precompile_component` made. Both callers hold that: one has the
    // bytes straight from the compiling child or from this process; the other
    // read them, without following links, from a file that only this user can
    // write, in a folder that only this user can enter (`Cache::open`), and
    // compared their SHA-256 with the one noted when they were made. wasmtime
    // itself refuses another version's or another setting's code.
    #[allow(unsafe_code)]
    unsafe {
        Component::deserialize(engine, artifact)
    }
}
