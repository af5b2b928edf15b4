//! The stream's metadata: which log this is, and its generations. One small
//! JSON file, `STREAM`, replaced as a whole.
//!
//! A generation is the messages written with one partition count; more than
//! one comes with re-partitioning, for which the format is ready. Segments
//! repeat what is here, so that a damaged file can be made again from them.
//!
//! `openings` says who wrote which offsets (see [`Opening`]), `closed` how far the log
//! went when it was last closed, so that an end that got lost since is known.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::disk::{Create, Disk, SyncSite, read_all};
use super::segment;
use crate::batch::Offset;
use crate::stream::Opening;

const NAME: &str = "STREAM";
pub const TEMPORARY: &str = "STREAM.tmp";
const BYTES_MAX: u64 = 1 << 20;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    pub version: u32,
    #[serde(with = "uuid_text")]
    pub log: Uuid,
    /// Counts the openings for writing.
    pub epoch: u64,
    /// Oldest first; the last is written to.
    pub generations: Vec<Generation>,
    /// Id and first offset, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub openings: Vec<(u64, u64)>,
    /// `None` while it is written to, and after a crash.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closed: Option<Closed>,
}

/// The end of a log that was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Closed {
    /// One past the last message.
    pub offset: u64,
    /// One past the sequence of the last frame.
    pub frames: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generation {
    pub generation: u32,
    /// `log`; a Kafka topic will be another.
    pub backend: String,
    pub partitions: u16,
    /// How a device finds its partition: `xxh3-64`.
    pub hash: String,
    /// Nothing is added any more.
    pub frozen: bool,
}

impl Metadata {
    pub fn new(log: Uuid, generation: u32, partitions: u16, epoch: u64) -> Self {
        let (backend, hash) = ("log".to_owned(), "xxh3-64".to_owned());
        let generation = Generation { generation, backend, partitions, hash, frozen: false };
        Self { version: 1, log, epoch, generations: vec![generation], openings: Vec::new(), closed: None }
    }

    /// As the newest segments tell it.
    pub fn from_segment(header: &segment::Header) -> Self {
        Self::new(header.log, header.generation, header.partitions, header.epoch)
    }

    /// Never written before.
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

/// `Ok(None)` where there is none, `InvalidData` where it is damaged.
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

/// Replaces it: after a crash the old or the new one is there, whole.
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
