//! mosquitto as Debian ships it: the rival in benchmarks, and its command line clients.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::events::Events;
use crate::folder::Folder;
use crate::process::{Process, free_port};

const START_MAX: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub struct Mosquitto {
    pub addr: SocketAddr,
    process: Process,
    _folder: Folder,
}

impl Mosquitto {
    /// A private broker with the settings of Debian's package: persistence on,
    /// a log file, all else mosquitto's defaults.
    pub fn start() -> Self {
        Self::start_with("")
    }

    /// The same with `more` settings.
    pub fn start_with(more: &str) -> Self {
        let folder = Folder::new("mosquitto");
        let addr = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let config = folder.write(
            "mosquitto.conf",
            format!(
                "listener {} 127.0.0.1\nallow_anonymous true\npersistence true\npersistence_location {}/\n\
                 log_dest file {}\n{}{more}",
                addr.port(),
                folder.path().display(),
                folder.join("mosquitto.log").display(),
                if rustix::process::geteuid().is_root() { "user root\n" } else { "" }
            ),
        );
        let log = folder.write("mosquitto.log", "");
        let process = Process::spawn(
            "mosquitto",
            Command::new(broker()).arg("-c").arg(config).stdout(Stdio::null()).stderr(Stdio::null()),
        );
        // Said once it listens.
        Events::of_files([&log]).while_runs(process.id()).until("mosquitto runs", START_MAX, || {
            std::fs::read_to_string(&log).ok()?.contains(" running").then_some(())
        });
        Self { addr, process, _folder: folder }
    }

    pub fn process(&self) -> &Process {
        &self.process
    }
}

fn broker() -> PathBuf {
    ["/usr/sbin/mosquitto", "/usr/local/sbin/mosquitto", "/usr/bin/mosquitto"]
        .iter()
        .map(PathBuf::from)
        .find(|path| path.exists())
        .unwrap_or_else(|| PathBuf::from("mosquitto"))
}

/// `mosquitto_pub` at this broker; add topic and message.
pub fn publish(addr: SocketAddr) -> Command {
    client("mosquitto_pub", addr)
}

/// `mosquitto_sub` at this broker; add topics.
pub fn subscribe(addr: SocketAddr) -> Command {
    client("mosquitto_sub", addr)
}

fn client(name: &str, addr: SocketAddr) -> Command {
    let mut command = Command::new(name);
    command.arg("-h").arg(addr.ip().to_string()).arg("-p").arg(addr.port().to_string());
    command
}
