//! Room on a disk.

use std::io;
use std::path::Path;

/// Below a twentieth of the disk, but at least and at most so much, room is low:
/// a few segments of each stream still fit, and there is time to act.
const LOW_LEAST: u64 = 256 << 20;
const LOW_MOST: u64 = 5 << 30;
/// The same for inodes: a segment is a file.
const INODES_LOW_LEAST: u64 = 16;
const INODES_LOW_MOST: u64 = 10_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskSpace {
    /// Bytes that this user may still write.
    pub free: u64,
    pub total: u64,
    /// `None` where bytes alone bound the number of files.
    pub inodes: Option<Inodes>,
    /// Tells this disk from others.
    pub device: u64,
}

/// Files that a disk can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inodes {
    /// Those that this user may still make.
    pub free: u64,
    pub total: u64,
}

impl DiskSpace {
    /// Of the disk that holds `path`.
    pub fn of(path: &Path) -> io::Result<Self> {
        let found = rustix::fs::statvfs(path)?;
        let inodes = Inodes { free: found.f_favail, total: found.f_files };
        Ok(Self {
            free: found.f_bavail.saturating_mul(found.f_frsize),
            total: found.f_blocks.saturating_mul(found.f_frsize),
            inodes: Some(inodes).filter(|inodes| inodes.total > 0),
            device: rustix::fs::stat(path)?.st_dev,
        })
    }

    pub fn is_low(&self) -> bool {
        self.free < (self.total / 20).clamp(LOW_LEAST, LOW_MOST) || self.low_inodes().is_some()
    }

    /// Returns how many more files fit, where these are few.
    pub fn low_inodes(&self) -> Option<u64> {
        let is_low = |it: &Inodes| it.free < (it.total / 20).clamp(INODES_LOW_LEAST, INODES_LOW_MOST);
        self.inodes.filter(is_low).map(|inodes| inodes.free)
    }

    /// Whether no file can be made, however many bytes are free.
    pub fn lacks_inodes(&self) -> bool {
        self.inodes.is_some_and(|inodes| inodes.free == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(free: u64, total: u64) -> DiskSpace {
        DiskSpace { free, total, inodes: None, device: 1 }
    }

    #[test]
    fn room_is_low_before_it_is_gone_on_small_and_large_disks() {
        let low = |free, total| space(free, total).is_low();
        assert!(low(200 << 20, 8 << 30) && !low(1 << 30, 8 << 30));
        assert!(low(4 << 30, 4 << 40) && !low(6 << 30, 4 << 40));
        assert!(DiskSpace::of(Path::new("/")).unwrap().total > 0);
    }

    #[test]
    fn inodes_run_low_before_they_are_gone_whatever_bytes_are_free() {
        let with =
            |free, total| DiskSpace { inodes: Some(Inodes { free, total }), ..space(1 << 40, 1 << 40) };
        assert!(with(0, 80).is_low() && with(0, 80).lacks_inodes());
        assert!(with(15, 80).is_low() && !with(15, 80).lacks_inodes() && !with(40, 80).is_low());
        assert!(with(9_000, 1 << 30).is_low() && !with(11_000, 1 << 30).is_low());
        assert!(!space(1 << 40, 1 << 40).is_low(), "there they have no bound");
    }
}
