//! A private InfluxDB 1 server, Debian's: its own folder, its own port, ended with the test.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::events::Events;
use crate::folder::Folder;
use crate::http;
use crate::process::{Process, free_port};

const START_MAX: Duration = Duration::from_secs(60);
const LOG: &str = "influxd.log";

#[derive(Debug)]
pub struct Influxdb {
    pub addr: SocketAddr,
    folder: Folder,
    process: Option<Process>,
}

impl Influxdb {
    /// With a database `iot`. What a write was answered for is on disk: `wal-fsync-delay` is 0, as by default.
    pub fn start() -> Self {
        let folder = Folder::new("influxdb");
        let addr = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let dir = folder.path().display();
        folder.write(
            "influxdb.conf",
            format!(
                "reporting-disabled = true\nbind-address = \"127.0.0.1:0\"\n[meta]\ndir = \"{dir}/meta\"\n\
                 [data]\ndir = \"{dir}/data\"\nwal-dir = \"{dir}/wal\"\n[monitor]\nstore-enabled = false\n\
                 [http]\nbind-address = \"{addr}\"\nlog-enabled = false\n"
            ),
        );
        let mut server = Self { addr, folder, process: None };
        server.restart();
        let (status, answer) = server.post("/query?q=CREATE%20DATABASE%20iot", "");
        assert_eq!(status, 200, "{answer}");
        server
    }

    /// Starts it on its port and data; waits until it answers.
    pub fn restart(&mut self) {
        let path = self.folder.join(LOG);
        let log = std::fs::File::options().create(true).append(true).open(&path).expect("our folder");
        let said_before = log.metadata().expect("our file").len() as usize;
        let mut command = Command::new(server());
        command.arg("run").arg("-config").arg(self.folder.join("influxdb.conf"));
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("our file")).stderr(log);
        let process = Process::spawn("influxd", &mut command);
        Events::of_files([&path]).while_runs(process.id()).until("influxd runs", START_MAX, || {
            let said = std::fs::read(&path).ok()?;
            String::from_utf8_lossy(said.get(said_before..)?).contains("Listening for signals").then_some(())
        });
        self.process = Some(process);
    }

    /// As `kill -9`.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Status and body.
    pub fn post(&self, path: &str, body: &str) -> (u16, String) {
        http::post(self.addr, path, body).expect("influxd answers")
    }

    /// The first series of a query on the database `iot`: its rows.
    pub fn query(&self, query: &str) -> Vec<Vec<Value>> {
        let query = query.replace(' ', "%20").replace('"', "%22");
        let (status, answer) = self.post(&format!("/query?db=iot&epoch=ns&q={query}"), "");
        assert_eq!(status, 200, "{answer}");
        let answer: Value = serde_json::from_str(&answer).expect("JSON");
        let rows = answer["results"][0]["series"][0]["values"].as_array().cloned().unwrap_or_default();
        rows.into_iter().map(|row| row.as_array().cloned().expect("a row")).collect()
    }
}

impl Drop for Influxdb {
    fn drop(&mut self) {
        self.kill();
    }
}

fn server() -> PathBuf {
    let known = ["/usr/bin/influxd", "/usr/local/bin/influxd", "/usr/sbin/influxd"];
    known.iter().map(PathBuf::from).find(|path| path.exists()).unwrap_or_else(|| PathBuf::from("influxd"))
}
