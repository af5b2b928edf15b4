//! The stream's metadata: the identity of the log, and its generations. It is one small JSON file,
//! `STREAM`, which is replaced as a whole.
//!
//! A generation is the messages written with one partition count. More than one generation comes with
//! re-partitioning, for which the format is ready. Segments repeat the metadata, so that a damaged file
//! can be rebuilt from them.
//!
//! `openings` records who wrote which offsets (see [`Opening`]), and `closed` how far the log went when
//! it was last closed, so that an end that was lost since is detected.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::disk::{Create, Disk, SyncSite, read_all};
use super::segment;
use crate::batch::Offset;
use crate::stream::Opening;

pub const NAME: &str = "STREAM";
pub const TEMPORARY: &str = "STREAM.tmp";
const BYTES_MAX: u64 = 1 << 20;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    pub version: u32,
    #[serde(with = "uuid_text")]
    pub log: Uuid,
    /// Number of openings for writing.
    pub epoch: u64,
    /// Generations, oldest first. The last one is written to.
    pub generations: Vec<Generation>,
    /// Ids and first offsets of openings, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub openings: Vec<(u64, u64)>,
    /// End of the closed log; `None` while it is being written, and after a crash.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closed: Option<Closed>,
}

/// The end of a log that was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Closed {
    /// One past the last message.
    pub offset: u64,
    /// One past the sequence number of the last frame.
    pub frames: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generation {
    pub generation: u32,
    /// `log`; a Kafka topic will be another value.
    pub backend: String,
    pub partitions: u16,
    /// How a device is mapped to its partition: `xxh3-64`.
    pub hash: String,
    /// Whether nothing is added any more.
    pub frozen: bool,
}

impl Metadata {
    pub fn new(log: Uuid, generation: u32, partitions: u16, epoch: u64) -> Self {
        let (backend, hash) = ("log".to_owned(), "xxh3-64".to_owned());
        let generation = Generation { generation, backend, partitions, hash, frozen: false };
        Self { version: 1, log, epoch, generations: vec![generation], openings: Vec::new(), closed: None }
    }

    /// Rebuilds the metadata from the newest segments.
    pub fn from_segment(header: &segment::Header) -> Self {
        Self::new(header.log, header.generation, header.partitions, header.epoch)
    }

    /// Returns whether the log was never written.
    pub fn is_new(&self) -> bool {
        self.epoch <= 1
    }

    pub fn openings(&self) -> Vec<Opening> {
        self.openings.iter().map(|(id, first)| Opening { id: *id, first: Offset(*first) }).collect()
    }

    pub fn set_openings(&mut self, openings: &[Opening]) {
        self.openings = openings.iter().map(|opening| (opening.id, opening.first.0)).collect();
    }

    pub fn current(&self) -> Option<&Generation> {
        self.generations.last().filter(|generation| !generation.frozen)
    }
}

/// Reads the metadata. Returns `Ok(None)` if there is none, `InvalidData` if it is damaged.
pub fn read(disk: &dyn Disk, dir: &Path) -> io::Result<Option<Metadata>> {
    let file = match disk.open(&dir.join(NAME), Create::ReadOnly) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let bytes = read_all(&*file, BYTES_MAX)?;
    let metadata: Metadata =
        serde_json::from_slice(&bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    if metadata.generations.is_empty() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "no generation"));
    }
    Ok(Some(metadata))
}

/// Replaces the metadata. After a crash either the old or the new file is there, complete.
pub fn write(disk: &dyn Disk, dir: &Path, metadata: &Metadata) -> io::Result<()> {
    let bytes = serde_json::to_vec_pretty(metadata).map_err(io::Error::other)?;
    let temporary = dir.join(TEMPORARY);
    let file = disk.open(&temporary, Create::Fresh)?;
    file.write_at(&[&bytes], 0)?;
    file.sync(SyncSite::Metadata)?;
    disk.rename(&temporary, &dir.join(NAME))?;
    disk.sync_dir(dir, SyncSite::MetadataName)
}

mod uuid_text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use uuid::Uuid;

    pub fn serialize<S: Serializer>(uuid: &Uuid, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(uuid)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Uuid, D::Error> {
        Uuid::parse_str(&String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}
