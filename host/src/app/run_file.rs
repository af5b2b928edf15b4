//! `data/run.json`: where the running host listens, for the commands that talk
//! to it and for whoever started it with port 0.

use std::fs::File;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::files::found;
use crate::listeners::transport::Bind;

const NAME: &str = "run.json";
/// Between two tries to write it.
const RETRY_EVERY: Duration = if cfg!(test) { Duration::from_millis(10) } else { Duration::from_secs(5) };

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunFile {
    pub pid: u32,
    /// New at each start; answers of the admin address carry it, so that another
    /// program on a port of a host that was killed is not taken for it.
    pub instance: String,
    pub mqtt: Vec<Bind>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub http: Vec<Bind>,
    pub admin: SocketAddr,
    /// What requests that act show to the admin address. Not there where the config names its file.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub token: String,
}

impl RunFile {
    /// Describes this process.
    pub fn new(instance: &str, (mqtt, http): (&[Bind], &[Bind]), admin: SocketAddr, token: String) -> Self {
        let (mqtt, http) = (mqtt.to_vec(), http.to_vec());
        Self { pid: std::process::id(), instance: instance.to_owned(), mqtt, http, admin, token }
    }
}

/// Written whole or not at all, once everything listens, and for its owner only to read.
fn write(data_dir: &Path, file: &RunFile) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(file)?;
    let temporary = data_dir.join("run.json.new");
    let put = || {
        // One that a killed run left behind may be for everybody to read.
        match std::fs::remove_file(&temporary) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = File::options().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.write_all(b"\n")?;
        std::fs::rename(&temporary, path(data_dir))
    };
    put().with_context(|| format!("cannot write {}", path(data_dir).display()))
}

/// Writes it as [`write`] does, now or, in a task, as soon as that can be: on a full disk
/// the host serves all the same. Until then commands do not find the host.
pub fn write_or_retry(data_dir: &Path, file: RunFile, stop: CancellationToken) {
    let Err(error) = write(data_dir, &file) else { return };
    tracing::warn!(
        error = format!("{error:#}"),
        "commands do not find this host until the file is written: \
         free space in the data folder; it is tried again every {} s",
        RETRY_EVERY.as_secs()
    );
    let data_dir = data_dir.to_owned();
    tokio::spawn(async move {
        while stop.run_until_cancelled(tokio::time::sleep(RETRY_EVERY)).await.is_some() {
            if write(&data_dir, &file).is_ok() {
                return;
            }
        }
    });
}

/// Reads the file of the host that runs on this data folder, or ran and was killed. Fails where this
/// user may not read it.
pub fn read(data_dir: &Path) -> io::Result<Option<RunFile>> {
    let text = found(std::fs::read(path(data_dir)))?;
    Ok(text.and_then(|text| serde_json::from_slice(&text).ok()))
}

pub fn remove(data_dir: &Path) {
    // A file that stays behind names an instance that nobody is: harmless.
    let _ = std::fs::remove_file(path(data_dir));
}

fn path(data_dir: &Path) -> PathBuf {
    data_dir.join(NAME)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};

    use super::*;

    #[tokio::test]
    async fn a_host_that_cannot_write_it_at_once_writes_it_when_it_can() {
        let folder = tempfile::tempdir().unwrap();
        // A folder that is not there yet stands for a disk without room.
        let data_dir = folder.path().join("data");
        let running =
            RunFile::new("i", (&[], &[]), SocketAddr::from((Ipv4Addr::LOCALHOST, 1)), String::new());
        write_or_retry(&data_dir, running.clone(), CancellationToken::new());
        assert_eq!(read(&data_dir).unwrap(), None);
        std::fs::create_dir(&data_dir).unwrap();
        while read(&data_dir).unwrap().is_none() {
            tokio::task::yield_now().await;
        }
        assert_eq!(read(&data_dir).unwrap(), Some(running));
    }
}
