//! `data/run.json`: where the running host listens, for the commands that talk
//! to it and for whoever started it with port 0.

use std::fs::File;
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::listeners::mqtt::Bind;

const NAME: &str = "run.json";

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunFile {
    pub pid: u32,
    /// New at each start; answers of the admin address carry it, so that another
    /// program on a port of a host that was killed is not taken for it.
    pub instance: String,
    pub mqtt: Vec<Bind>,
    pub admin: SocketAddr,
    /// What requests that act show to the admin address. Not there where the config names its file.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub token: String,
}

impl RunFile {
    /// Of this process.
    pub fn new(instance: &str, mqtt: &[Bind], admin: SocketAddr, token: String) -> Self {
        Self { pid: std::process::id(), instance: instance.to_owned(), mqtt: mqtt.to_vec(), admin, token }
    }
}

/// Written whole or not at all, once everything listens, and for its owner only to read.
pub fn write(data_dir: &Path, file: &RunFile) -> anyhow::Result<()> {
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

/// Of the host that runs on this data folder, or ran and was killed.
pub fn read(data_dir: &Path) -> Option<RunFile> {
    serde_json::from_slice(&std::fs::read(path(data_dir)).ok()?).ok()
}

pub fn remove(data_dir: &Path) {
    // A file that stays behind names an instance that nobody is: harmless.
    let _ = std::fs::remove_file(path(data_dir));
}

fn path(data_dir: &Path) -> PathBuf {
    data_dir.join(NAME)
}
