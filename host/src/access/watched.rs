//! A file that is read again when it changes. A new version that cannot be used
//! leaves the old one in place, and is reported.

use std::fs::Metadata;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::telemetry::Failures;

pub struct Watched<T> {
    path: PathBuf,
    bytes_max: u64,
    parse: Box<Parse<T>>,
    failures: Failures,
    seen: Mutex<(Signature, Arc<T>)>,
}

type Parse<T> = dyn Fn(&[u8]) -> Result<T, String> + Send + Sync;

#[derive(Clone, Copy, PartialEq, Eq)]
struct Signature {
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl<T> Watched<T> {
    /// Reads the file; errors name it.
    pub fn open(
        path: &Path,
        bytes_max: u64,
        failures: Failures,
        parse: impl Fn(&[u8]) -> Result<T, String> + Send + Sync + 'static,
    ) -> Result<Self, String> {
        let (signature, value) = read(path, bytes_max, &parse)?;
        let seen = Mutex::new((signature, Arc::new(value)));
        Ok(Self { path: path.to_owned(), bytes_max, parse: Box::new(parse), failures, seen })
    }

    /// What the file says now. Blocks on the disk.
    pub fn get(&self) -> Arc<T> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let now = std::fs::metadata(&self.path).ok().map(|found| Signature::of(&found));
        if now == Some(seen.0) {
            return seen.1.clone();
        }
        match read(&self.path, self.bytes_max, &self.parse) {
            Ok((signature, value)) => *seen = (signature, Arc::new(value)),
            Err(reason) => {
                let detail = format!("{reason}; what it said before stays in force");
                self.failures.report("access: a changed file cannot be used", 1, &detail, "");
                // Not looked into again until it changes once more.
                if let Some(now) = now {
                    seen.0 = now;
                }
            }
        }
        seen.1.clone()
    }
}

impl Signature {
    fn of(found: &Metadata) -> Self {
        Self {
            inode: found.ino(),
            bytes: found.len(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        }
    }
}

fn read<T>(
    path: &Path,
    bytes_max: u64,
    parse: &dyn Fn(&[u8]) -> Result<T, String>,
) -> Result<(Signature, T), String> {
    let named = |reason: String| format!("{}: {reason}", path.display());
    let file = std::fs::File::open(path).map_err(|error| named(error.to_string()))?;
    // Of the open file, before its bytes: a change meanwhile is seen as one.
    let signature = Signature::of(&file.metadata().map_err(|error| named(error.to_string()))?);
    let mut bytes = Vec::new();
    file.take(bytes_max + 1).read_to_end(&mut bytes).map_err(|error| named(error.to_string()))?;
    if bytes.len() as u64 > bytes_max {
        return Err(named(format!("must have at most {bytes_max} bytes")));
    }
    Ok((signature, parse(&bytes).map_err(named)?))
}
