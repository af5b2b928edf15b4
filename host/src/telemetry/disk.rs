//! Room on the disk of the data folder.

use std::io;
use std::path::Path;

/// Below a twentieth of the disk, but at least and at most so much, room is low:
/// a few segments of each stream still fit, and there is time to act.
const LOW_LEAST: u64 = 256 << 20;
const LOW_MOST: u64 = 5 << 30;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskSpace {
    /// Bytes that this user may still write.
    pub free: u64,
    pub total: u64,
}

impl DiskSpace {
    /// Of the disk that holds `path`.
    pub fn of(path: &Path) -> io::Result<Self> {
        let found = rustix::fs::statvfs(path)?;
        Ok(Self {
            free: found.f_bavail.saturating_mul(found.f_frsize),
            total: found.f_blocks.saturating_mul(found.f_frsize),
        })
    }

    pub fn is_low(&self) -> bool {
        self.free < (self.total / 20).clamp(LOW_LEAST, LOW_MOST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_low_before_it_is_gone_on_small_and_large_disks() {
        let low = |free, total| DiskSpace { free, total }.is_low();
        assert!(low(200 << 20, 8 << 30) && !low(1 << 30, 8 << 30));
        assert!(low(4 << 30, 4 << 40) && !low(6 << 30, 4 << 40));
        assert!(DiskSpace::of(Path::new("/")).unwrap().total > 0);
    }
}
