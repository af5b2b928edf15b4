//! A test's own folder, kept for a look when the test fails.

use std::path::{Path, PathBuf};

#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    stays: bool,
}

impl Folder {
    /// Below the system's temporary folder; other users may pass through (PostgreSQL's does).
    pub fn new(name: &str) -> Self {
        Self::below(&std::env::temp_dir(), name)
    }

    /// Where no disk is part of what is measured.
    pub fn in_memory(name: &str) -> Self {
        Self::below(Path::new("/dev/shm"), name)
    }

    fn below(parent: &Path, name: &str) -> Self {
        let dir = tempfile::Builder::new()
            .prefix(&format!("headworks-{name}-"))
            .tempdir_in(parent)
            .unwrap_or_else(|error| panic!("{}: {error}", parent.display()));
        let path = dir.keep();
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("our folder");
        Self { path, stays: false }
    }

    /// A folder that stays; made where it is missing.
    pub fn at(path: &Path) -> Self {
        std::fs::create_dir_all(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self { path: path.to_owned(), stays: true }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.join(name);
        std::fs::create_dir_all(path.parent().expect("below our folder")).expect("our folder");
        std::fs::write(&path, content).unwrap_or_else(|error| panic!("write {}: {error}", path.display()));
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if self.stays {
            return;
        }
        if std::thread::panicking() {
            eprintln!("kept for a look: {}", self.path.display());
        } else {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

/// The repository's root.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies below the root")
}

/// `target/`, wherever cargo was told to put it.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}
