//! The data folder of the running host, which holds a lock on a file in it, and the folders of streams
//! in it. A folder that is moved, removed or replaced takes its open files along: the host goes on
//! writing where no path leads, or another one, and the next start finds none of it.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::LOCK;
use crate::files::{Locked, is_at};
use crate::stream::Stream;
use crate::telemetry::{Failures, Standing};

/// Kind of the problem.
pub const KIND: &str = "data_folder";

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
        let Ok(held) = self.lock.metadata() else { return true };
        is_at(&held, &self.folder.join(LOCK))
            .unwrap_or_else(|error| !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory))
    }

    /// Looks once, and says what has changed since the last look; `streams` with their folders.
    pub fn look<'s>(&self, failures: &Failures, streams: impl Iterator<Item = (PathBuf, &'s dyn Stream)>) {
        let is_in_place = self.is_in_place();
        say(failures, whole_fault(&self.folder), is_in_place);
        for (folder, stream) in streams {
            // Where the whole folder is away, its problem stands for all that it has.
            let is_told = !is_in_place && folder.starts_with(&self.folder);
            say(failures, stream_fault(&folder, stream.name()), is_told || stream.is_in_place());
        }
    }
}

/// Says a change of what is known of a folder.
fn say(failures: &Failures, fault: Standing, is_in_place: bool) {
    let was_in_place = !failures.standing().contains(&fault);
    match (was_in_place, is_in_place) {
        (true, false) => {
            tracing::error!(part = fault.part, "{}; {}", fault.cause, fault.advice);
            failures.stands(fault);
        }
        (false, true) => {
            tracing::info!("the {} is back", fault.part);
            failures.mended(&fault.part, KIND);
        }
        _ => {}
    }
}

/// What is told while the whole folder is away.
fn whole_fault(folder: &Path) -> Standing {
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

/// What is told while the folder of one stream, or the file that is written to in it, is away.
fn stream_fault(folder: &Path, stream: &str) -> Standing {
    let shown = folder.display();
    Standing {
        part: format!("folder {shown}"),
        kind: KIND,
        cause: format!(
            "the folder of stream \"{stream}\", or the newest *.seg file in it, was moved, removed or replaced \
             while the host runs, which still writes to the file that it had open: the next start does not find \
             what the stream was given since"
        ),
        advice: format!(
            "put it back as {shown} before the host ends; where it was removed, keep devices from publishing until \
             the sinks have all, then start the host again"
        ),
    }
}

/// Names the folder in the list of problems; `folder` is absolute.
pub fn part(folder: &Path) -> String {
    format!("data folder {}", folder.display())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::stream::Config;
    use crate::stream::conformance::message;
    use crate::stream::log::{Log, RealDisk};
    use crate::units::ByteSize;

    #[test]
    fn a_folder_that_is_moved_removed_or_replaced_is_a_problem_until_it_is_back() {
        let parent = tempfile::tempdir().unwrap();
        let [folder, away] = ["data", "away"].map(|name| parent.path().join(name));
        let held = HeldFolder::new(&folder, crate::app::lock(&folder).unwrap());
        let failures = Failures::default();
        let told = || {
            held.look(&failures, std::iter::empty());
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

    #[tokio::test]
    async fn a_stream_whose_folder_or_newest_segment_is_away_is_a_problem_until_it_is_back() {
        let parent = tempfile::tempdir().unwrap();
        let data = parent.path().join("data");
        let held = HeldFolder::new(&data, crate::app::lock(&data).unwrap());
        let [folder, away] = [data.join("streams/t"), parent.path().join("away")];
        let config = Config { segment_bytes: ByteSize::kib(64), ..Config::default() };
        let (log, _) = Log::open(Arc::new(RealDisk::default()), &folder, "t", &config).unwrap();
        let failures = Failures::default();
        let told = || {
            held.look(&failures, std::iter::once((folder.clone(), &*log as &dyn Stream)));
            failures.standing().into_iter().map(|fault| fault.part).collect::<Vec<_>>()
        };
        let stream = format!("folder {}", folder.display());
        let payload = vec![b'x'; 20 << 10];
        for _ in 0..9 {
            let appended = log.append(&[message("a/b", &payload)], &[]).unwrap();
            log.durable().wait_for(|ticket| *ticket >= appended.ticket).await.unwrap();
            assert_eq!(told(), [""; 0], "whatever segment is written to");
        }
        std::fs::rename(&folder, &away).unwrap();
        assert_eq!(told(), [&*stream]);
        std::fs::create_dir_all(&folder).unwrap();
        assert_eq!(told(), [&*stream], "another folder");
        std::fs::remove_dir_all(&folder).unwrap();
        std::fs::rename(&away, &folder).unwrap();
        assert_eq!(told(), [""; 0]);
        // The whole folder is one problem.
        std::fs::rename(&data, &away).unwrap();
        assert_eq!(told(), [part(&data)]);
        std::fs::rename(&away, &data).unwrap();
        for file in std::fs::read_dir(&folder).unwrap().flatten() {
            if file.path().extension().is_some_and(|extension| extension == "seg") {
                std::fs::remove_file(file.path()).unwrap();
            }
        }
        assert_eq!(told(), [&*stream]);
    }
}
