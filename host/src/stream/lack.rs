//! What a stream can have too little of, for the log and for the list of problems.

use std::fmt;
use std::path::Path;

/// Something that a stream waits for before it takes appends again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Lack {
    Disk = 1,
    /// All segments that retention allows are there, and a reader still needs the oldest.
    Retention,
    FileDescriptor,
    Memory,
}

impl Lack {
    const ALL: [Self; 4] = [Self::Disk, Self::Retention, Self::FileDescriptor, Self::Memory];

    /// Returns the lack whose discriminant is `code`, `None` for 0.
    pub(super) fn of_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|lack| *lack as u8 == code)
    }

    /// Returns what a person can do about it, for a stream in `folder`.
    pub fn advice(self, folder: &Path) -> String {
        let folder = folder.display();
        match self {
            Self::Disk => {
                format!("free space on the disk of {folder}, or lower retention.max_bytes of the streams")
            }
            Self::Retention => {
                "mend the sink that lags, or raise retention.max_bytes of the stream".to_owned()
            }
            Self::FileDescriptor => {
                "raise the limit of open files (LimitNOFILE= of the service, `ulimit -n`), or lower \
                 mqtt.connections_max"
                    .to_owned()
            }
            Self::Memory => "free memory of this machine, or raise the limit of the service".to_owned(),
        }
    }
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Disk => "no room on disk",
            Self::Retention => "no room left in retention.max_bytes for another segment",
            Self::FileDescriptor => "no free file descriptor",
            Self::Memory => "no memory",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_lack_is_told_by_its_code_and_says_what_to_do() {
        for lack in Lack::ALL {
            assert_eq!(Lack::of_code(lack as u8), Some(lack));
            assert!(!lack.advice(Path::new("/data")).is_empty());
        }
        assert_eq!(Lack::of_code(0), None);
        assert!(Lack::Disk.advice(Path::new("/data")).contains("/data"));
    }
}
