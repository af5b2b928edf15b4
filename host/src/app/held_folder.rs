//! The data folder of the running host, which holds a lock on a file in it. A folder that is moved,
//! removed or replaced takes its open files along: the host goes on writing where no path leads, or
//! another one, and the next start finds none of it.

use std::fs::Metadata;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::LOCK;
use crate::files::Locked;
use crate::telemetry::{Failures, Standing};

/// Kind of the problem.
const KIND: &str = "data_folder";

/// Keeps the lock for as long as it lives.
pub struct HeldFolder {
    folder: PathBuf,
    lock: Locked,
}

impl HeldFolder {
    pub fn new(folder: &Path, lock: Locked) -> Self {
        Self { folder: std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned()), lock }
    }

    /// Whether the folder is still where the config says. A disk that does not answer may keep the
    /// caller waiting.
    fn is_in_place(&self) -> bool {
        let identity = |data: Metadata| (data.dev(), data.ino());
        match std::fs::metadata(self.folder.join(LOCK)) {
            Ok(there) => self.lock.metadata().map_or(true, |held| identity(held) == identity(there)),
            Err(error) => !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory),
        }
    }

    /// Looks once, and says what has changed since the last look.
    pub fn look(&self, failures: &Failures) {
        let fault = fault(&self.folder);
        let was_in_place = !failures.standing().contains(&fault);
        match (was_in_place, self.is_in_place()) {
            (true, false) => {
                tracing::error!(folder = %self.folder.display(), "{}; {}", fault.cause, fault.advice);
                failures.stands(fault);
            }
            (false, true) => {
                tracing::info!(folder = %self.folder.display(), "the data folder is back");
                failures.mended(&fault.part, KIND);
            }
            _ => {}
        }
    }
}

/// What is told while the folder is away.
fn fault(folder: &Path) -> Standing {
    let shown = folder.display();
    Standing {
        part: part(folder),
        kind: KIND,
        cause: "the data folder was moved, removed or replaced while the host runs, which still writes to the \
                files that it had open: what devices are acknowledged for is not in a folder of this path, and where \
                those files were removed it is lost when the host ends"
            .to_owned(),
        advice: format!(
            "put the folder back as {shown} before the host ends; where it was removed, keep devices from \
             publishing until what the log still holds is written, then start the host again"
        ),
    }
}

/// Names the folder in the list of problems; `folder` is absolute.
pub fn part(folder: &Path) -> String {
    format!("data folder {}", folder.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_is_moved_removed_or_replaced_is_a_problem_until_it_is_back() {
        let parent = tempfile::tempdir().unwrap();
        let [folder, away] = ["data", "away"].map(|name| parent.path().join(name));
        let held = HeldFolder::new(&folder, crate::app::lock(&folder).unwrap());
        let failures = Failures::default();
        let told = || {
            held.look(&failures);
            failures.standing().into_iter().map(|fault| fault.part).collect::<Vec<_>>()
        };
        assert_eq!(told(), [""; 0]);
        std::fs::rename(&folder, &away).unwrap();
        assert_eq!(told(), [part(&folder)]);
        let other = crate::app::lock(&folder).unwrap();
        assert_eq!(told(), [part(&folder)], "another host's");
        drop(other);
        std::fs::remove_dir_all(&folder).unwrap();
        std::fs::rename(&away, &folder).unwrap();
        assert_eq!(told(), [""; 0]);
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(told(), [part(&folder)]);
    }
}
