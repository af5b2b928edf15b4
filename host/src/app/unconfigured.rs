//! Streams that the data folder has and the config does not: one was taken out, has another name now,
//! or the config is an older one. No pipeline reads what they hold, and no retention removes it.

use std::path::{Path, PathBuf};

use super::disks::stream_folder;
use crate::batch::Offset;
use crate::files::folder_bytes;
use crate::listeners::mqtt;
use crate::stream::log::ReadOnly;
use crate::units::ByteSize;

/// A stream's folder that the host leaves alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unconfigured {
    pub name: String,
    pub folder: PathBuf,
    /// What can be read of it, or why nothing can.
    pub holds: Result<Holds, String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holds {
    pub messages: u64,
    /// Messages that a sink lacked when the stream was open last.
    pub lacked: u64,
    /// Size of its files.
    pub bytes: u64,
}

/// Returns the streams below `data_dir` that are not configured, by name. Reads each to its end.
pub fn find(data_dir: &Path, is_configured: impl Fn(&str) -> bool) -> std::io::Result<Vec<Unconfigured>> {
    let mut names = ReadOnly::streams_in(&data_dir.join("streams"))?;
    names.retain(|name| !is_configured(name));
    let found = names.into_iter().map(|name| {
        let folder = stream_folder(data_dir, &name, true);
        Unconfigured { holds: holds(&folder).map_err(|error| error.to_string()), name, folder }
    });
    Ok(found.collect())
}

fn holds(folder: &Path) -> anyhow::Result<Holds> {
    let bytes = folder_bytes(folder)?;
    let Some(remembered) = ReadOnly::open(folder, Offset(0)).remembered()? else {
        return Ok(Holds { messages: 0, lacked: 0, bytes });
    };
    let messages = remembered.bounds.end.0 - remembered.bounds.start.0;
    Ok(Holds { messages, lacked: remembered.lacked(|reader| reader != mqtt::READER), bytes })
}

impl Unconfigured {
    /// Says that the stream is there, where, and what it holds.
    pub fn cause(&self) -> String {
        let Self { name, folder, holds } = self;
        let holds = match holds {
            Ok(Holds { messages, lacked, bytes }) => {
                format!("{messages} messages, of which sinks lacked {lacked}, in {}", ByteSize(*bytes))
            }
            Err(error) => format!("what cannot be read ({error})"),
        };
        format!(
            "the config has no stream \"{name}\", and {} holds {holds}: no pipeline reads it, and no retention \
             removes it",
            folder.display()
        )
    }

    /// Says what to do.
    pub fn advice(&self) -> String {
        format!(
            "put streams.{} and its pipeline back into the config, until its sinks have all; or, where nobody needs \
             what it holds, remove {}",
            self.name,
            self.folder.display()
        )
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::stream::conformance::message;
    use crate::stream::log::{Log, RealDisk};
    use crate::stream::{Config, OnLag, Stream};

    #[tokio::test]
    async fn a_stream_that_the_config_lacks_is_found_with_what_its_sinks_lacked() {
        let data = tempfile::tempdir().unwrap();
        let streams = data.path().join("streams");
        assert!(find(data.path(), |_| false).unwrap().is_empty());
        for name in ["alarms", "telemetry"] {
            let disk = Arc::new(RealDisk::default());
            let (log, _) = Log::open(disk, &streams.join(name), name, &Config::default()).unwrap();
            let readers = ["p/w", mqtt::READER].map(|reader| log.attach(reader, Offset(0), OnLag::Block));
            log.append(&[message("a/b", b"1"), message("a/b", b"2"), message("a/b", b"3")], &[]).unwrap();
            readers[0].advance(Offset(1));
            log.close().await;
        }
        // What a file system of its own has, and a file.
        std::fs::create_dir(streams.join("lost+found")).unwrap();
        std::fs::write(streams.join("notes"), "").unwrap();
        let found = find(data.path(), |name| name == "telemetry").unwrap();
        let [alarms] = &found[..] else { panic!("{found:?}") };
        assert_eq!((&*alarms.name, &*alarms.folder), ("alarms", &*streams.join("alarms")));
        let holds = alarms.holds.clone().unwrap();
        assert_eq!((holds.messages, holds.lacked), (3, 2));
        assert!(holds.bytes > 0);
        assert!(alarms.cause().contains("3 messages, of which sinks lacked 2"), "{}", alarms.cause());
        assert!(alarms.advice().contains("streams.alarms"), "{}", alarms.advice());
    }
}
