//! Resources that a stream may lack, for the log and for the list of problems.

use std::fmt;
use std::path::Path;

use crate::files::NO_DESCRIPTOR_ADVICE;
use crate::telemetry::DiskSpace;

/// A resource for which a stream waits before it accepts appends again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Lack {
    Disk = 1,
    /// All segments that retention allows exist, and a reader still needs the oldest.
    Retention,
    FileDescriptor,
    Memory,
    /// Retention may remove an old segment, but the system refuses to.
    Removal,
}

impl Lack {
    const ALL: [Self; 5] = [Self::Disk, Self::Retention, Self::FileDescriptor, Self::Memory, Self::Removal];

    /// Returns the lack with the discriminant `code`; `None` for 0.
    pub(super) fn of_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|lack| *lack as u8 == code)
    }

    /// Returns what is lacking on a disk with this much space. The system reports missing bytes and
    /// missing inodes with the same error.
    pub fn cause(self, space: Option<DiskSpace>) -> String {
        match self {
            Self::Disk if lacks_inodes(space) => "no inodes left on disk".to_owned(),
            lack => lack.to_string(),
        }
    }

    /// Returns what an operator can do about it, for a stream in `folder`, on a disk with this much
    /// space.
    pub fn advice(self, folder: &Path, space: Option<DiskSpace>) -> String {
        let folder = folder.display();
        match self {
            Self::Disk if lacks_inodes(space) => format!(
                "remove files from the disk of {folder}, or make its file system with more inodes: it can have \
                 no further file, however many bytes are free"
            ),
            Self::Disk => {
                format!("free space on the disk of {folder}, or lower retention.max_bytes of the streams")
            }
            Self::Retention => {
                "fix the sink that lags, or raise retention.max_bytes of the stream".to_owned()
            }
            Self::FileDescriptor => NO_DESCRIPTOR_ADVICE.to_owned(),
            Self::Memory => "free memory of this machine, or raise the limit of the service".to_owned(),
            Self::Removal => format!(
                "let the host's user remove files of {folder} (rights of the folder, attributes as of `lsattr`, a file \
                 system that is mounted read-only); the log has the system's error, and the host tries again by itself"
            ),
        }
    }
}

fn lacks_inodes(space: Option<DiskSpace>) -> bool {
    space.is_some_and(|space| space.lacks_inodes())
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Disk => "no room on disk",
            Self::Retention => "no room left in retention.max_bytes for another segment",
            Self::FileDescriptor => "no free file descriptor",
            Self::Memory => "no memory",
            Self::Removal => "no room left in retention.max_bytes, and old segments cannot be removed",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::Inodes;

    #[test]
    fn every_lack_is_told_by_its_code_and_says_what_to_do() {
        for lack in Lack::ALL {
            assert_eq!(Lack::of_code(lack as u8), Some(lack));
            assert!(!lack.advice(Path::new("/data"), None).is_empty());
        }
        assert_eq!(Lack::of_code(0), None);
        assert!(Lack::Disk.advice(Path::new("/data"), None).contains("/data"));
    }

    #[test]
    fn a_disk_without_inodes_is_told_apart_from_one_without_bytes() {
        let space = |free, inodes| DiskSpace {
            free,
            total: 1 << 40,
            inodes: Some(Inodes { free: inodes, total: 80 }),
            device: 1,
        };
        let told = |space| (Lack::Disk.cause(space), Lack::Disk.advice(Path::new("/data"), space));
        let (cause, advice) = told(Some(space(1 << 30, 0)));
        assert!(
            cause.contains("inodes") && advice.contains("inodes") && advice.contains("/data"),
            "{advice}"
        );
        let (cause, advice) = told(Some(space(0, 40)));
        assert!(cause == "no room on disk" && !advice.contains("inodes"), "{advice}");
        assert!(!Lack::Retention.cause(Some(space(1 << 30, 0))).contains("inodes"));
    }
}
