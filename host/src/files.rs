//! Files that a person names in the config, read whole.

use std::fs::{File, Metadata, TryLockError};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

/// Opens a regular file for reading. Anything else is refused: the open of a FIFO, or the read of
/// a device, may never return.
pub fn open(path: &Path) -> io::Result<File> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok(file)
}

/// Reads all of a regular file.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Reads all of a regular file, as text.
pub fn read_to_string(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    open(path)?.read_to_string(&mut text)?;
    Ok(text)
}

/// Tells a file that is not there from one that this user may not look at.
pub fn found<T>(opened: io::Result<T>) -> io::Result<Option<T>> {
    match opened {
        Ok(it) => Ok(Some(it)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// What to do where no file can be opened, whichever it is: the process or the machine has too many open.
pub const NO_DESCRIPTOR_ADVICE: &str = "raise the limit of open files (LimitNOFILE= of the service, `ulimit -n`; of the \
     machine, fs.file-max), or lower mqtt.connections_max";

/// Returns whether there was no file descriptor left for a file: nothing is wrong with the file itself.
pub fn lacks_descriptor(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

/// Returns whether a path leads to the file that `held` describes, which an open file has.
pub fn is_at(held: &Metadata, path: &Path) -> io::Result<bool> {
    let there = std::fs::metadata(path)?;
    Ok((held.dev(), held.ino()) == (there.dev(), there.ino()))
}

/// Returns the size of the files that lie in a folder itself.
pub fn folder_bytes(folder: &Path) -> io::Result<u64> {
    Ok(std::fs::read_dir(folder)?.flatten().filter_map(|file| Some(file.metadata().ok()?.len())).sum())
}

/// A lock on an open file (`flock`), given back when it is dropped.
///
/// Closing the file is not enough for that: a child that this process starts has every file of the
/// process until it runs its program, and would keep the lock for so long.
#[derive(Debug)]
pub struct Locked(File);

impl Locked {
    /// Takes the lock for this owner alone; [`TryLockError::WouldBlock`] where another one has it.
    pub fn exclusive(file: File) -> Result<Self, TryLockError> {
        file.try_lock()?;
        Ok(Self(file))
    }

    /// Takes the lock together with others that share it.
    pub fn shared(file: File) -> Result<Self, TryLockError> {
        file.try_lock_shared()?;
        Ok(Self(file))
    }

    pub fn metadata(&self) -> io::Result<Metadata> {
        self.0.metadata()
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        // Where this fails, closing does it.
        let _ = self.0.unlock();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_given_back_while_a_child_still_has_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let open = || File::options().create(true).truncate(false).write(true).open(&path).unwrap();
        let file = open();
        // As a child that has not run its program yet has it.
        let of_child = file.try_clone().unwrap();
        let held = Locked::exclusive(file).unwrap();
        assert!(matches!(Locked::shared(open()), Err(TryLockError::WouldBlock)));
        drop(held);
        let shared = Locked::shared(open()).unwrap();
        Locked::shared(open()).unwrap();
        assert!(matches!(Locked::exclusive(open()), Err(TryLockError::WouldBlock)));
        drop(shared);
        Locked::exclusive(open()).unwrap();
        drop(of_child);
    }

    #[test]
    fn what_is_no_regular_file_is_refused_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU).unwrap();
        for path in [fifo.as_path(), folder.path(), Path::new("/dev/zero")] {
            let error = read(path).unwrap_err();
            assert_eq!(error.to_string(), "not a regular file", "{}", path.display());
        }
        let file = folder.path().join("file");
        std::fs::write(&file, "text").unwrap();
        std::os::unix::fs::symlink(&file, folder.path().join("link")).unwrap();
        assert_eq!(read_to_string(&folder.path().join("link")).unwrap(), "text");
    }
}
