//! Room on the disk of the data folder, and on those of streams whose folders are mounts or links.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use crate::telemetry::DiskSpace;

/// Folders of the host, with the room that there is on their disks.
#[derive(Clone, Debug, Default)]
pub struct Disks {
    data: Option<Disk>,
    /// Disk of each stream, by the stream's name.
    streams: BTreeMap<String, Disk>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    pub folder: PathBuf,
    pub space: DiskSpace,
}

impl Disks {
    /// Asks each disk. Blocks for as long as one does not answer.
    pub fn look(data_dir: PathBuf, streams: impl IntoIterator<Item = (String, PathBuf)>) -> Self {
        let disk = |folder: PathBuf| Some(Disk { space: DiskSpace::of(&folder).ok()?, folder });
        let streams = streams.into_iter().filter_map(|(name, folder)| Some((name, disk(folder)?)));
        Self { data: disk(data_dir), streams: streams.collect() }
    }

    /// Returns the room on the disk of the data folder, where that is known.
    pub fn data(&self) -> Option<DiskSpace> {
        self.data.as_ref().map(|disk| disk.space)
    }

    /// Returns the room on the disk of a stream's own folder, where that is known.
    pub fn of_stream(&self, name: &str) -> Option<DiskSpace> {
        self.streams.get(name).map(|disk| disk.space)
    }

    /// Returns each disk with little room once, by the data folder where that is on it.
    pub fn low(&self) -> Vec<&Disk> {
        let mut known = HashSet::new();
        let all = self.data.iter().chain(self.streams.values());
        all.filter(|disk| known.insert(disk.space.device) && disk.space.is_low()).collect()
    }
}

/// Returns the folder of a stream of the host; `is_configured`: it is one of `streams`, and none of the host's own.
pub fn stream_folder(data_dir: &Path, name: &str, is_configured: bool) -> PathBuf {
    let folder = if is_configured { data_dir.join("streams").join(name) } else { data_dir.join(name) };
    std::path::absolute(&folder).unwrap_or(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// /proc is a file system of its own, without room.
    #[test]
    fn a_stream_on_a_disk_of_its_own_has_the_room_of_that_one() {
        let data = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(data.path().join("streams/near")).unwrap();
        std::os::unix::fs::symlink("/proc", data.path().join("streams/far")).unwrap();
        let folders = ["near", "far"].map(|name| (name.to_owned(), stream_folder(data.path(), name, true)));
        let disks = Disks::look(data.path().to_path_buf(), folders);
        let device = |space: Option<DiskSpace>| space.unwrap().device;
        assert_eq!(device(disks.of_stream("near")), device(disks.data()));
        assert_ne!(device(disks.of_stream("far")), device(disks.data()));
        let far = DiskSpace::of(Path::new("/proc")).unwrap();
        assert_eq!(disks.of_stream("far").unwrap().total, far.total);
        let low: Vec<_> = disks.low().iter().map(|disk| &*disk.folder).collect();
        assert!(low.contains(&&*data.path().join("streams/far")), "{low:?}");
        assert!(!low.contains(&&*data.path().join("streams/near")), "its disk is told by the data folder");
    }
}
