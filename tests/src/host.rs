//! The real binary in a folder of its own.
//!
//! The host listens on ports that the OS gives out and writes them to
//! `data/run.json` once it serves.

use std::fs::File;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use rustix::process::Signal;
use serde::Deserialize;

use crate::events::Events;
use crate::folder::{Folder, root, target};
use crate::mqtt::Version;
use crate::process::Process;
use crate::{http, process};

/// Generous: a busy machine with two cores runs several tests at once.
const START_MAX: Duration = Duration::from_secs(60);
const STOP_MAX: Duration = Duration::from_secs(60);
/// Only a hung test meets it.
const PATIENCE: Duration = Duration::from_secs(180);
const LOG: &str = "host.log";

#[derive(Debug)]
pub struct Host {
    pub folder: Folder,
    process: Option<Process>,
    bound: Option<Bound>,
    environment: Vec<(String, String)>,
}

/// What `data/run.json` says.
#[derive(Debug, Deserialize, Clone)]
struct Bound {
    mqtt: Vec<String>,
    #[serde(default)]
    http: Vec<String>,
    admin: SocketAddr,
}

/// One plain listener, on a port of its own.
pub const MQTT: &str = "mqtt: { listeners: [ { bind: 127.0.0.1:0 } ] }";

/// Data and plugins in the test's folder.
/// The admin port is chosen here: the command line reads it from the config.
fn head() -> String {
    let admin = process::free_port();
    format!(
        "data_dir: ./data\n\
         admin: {{ bind: 127.0.0.1:{admin} }}\n\
         plugins: {{ dir: ./plugins }}\n"
    )
}

impl Host {
    /// A folder with this config (below the head) and an empty plugins folder; not started.
    pub fn prepare(name: &str, config: &str) -> Self {
        Self::prepare_with(name, MQTT, config)
    }

    /// The same with an `mqtt:` section of its own.
    pub fn prepare_with(name: &str, mqtt: &str, config: &str) -> Self {
        Self::prepare_in(Folder::new(name), mqtt, config)
    }

    pub fn prepare_in(folder: Folder, mqtt: &str, config: &str) -> Self {
        folder.write("headworks.yaml", format!("{}{mqtt}\n{config}", head()));
        std::fs::create_dir_all(folder.join("plugins")).expect("our folder");
        Self { folder, process: None, bound: None, environment: Vec::new() }
    }

    /// A host in a folder that stays, without a config yet.
    pub fn at(path: &Path) -> Self {
        let folder = Folder::at(path);
        std::fs::create_dir_all(folder.join("plugins")).expect("our folder");
        Self { folder, process: None, bound: None, environment: Vec::new() }
    }

    /// Prepared, started and ready.
    pub fn start(name: &str, config: &str) -> Self {
        let mut host = Self::prepare(name, config);
        host.run();
        host
    }

    /// Sets a variable for the next [`Host::run`].
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Starts the process and waits until it is ready.
    pub fn run(&mut self) {
        self.launch();
        self.wait_ready();
    }

    /// Starts the process; it may not come up.
    pub fn launch(&mut self) {
        self.launch_as(&binary());
    }

    /// The same, of a copy of the binary.
    pub fn launch_as(&mut self, binary: &Path) {
        let log = self.log_file();
        self.launch_with(binary, log);
    }

    /// The same with its log in another place than the file that is waited on.
    pub fn launch_logging_to(&mut self, stderr: impl Into<Stdio>) {
        self.launch_with(&binary(), stderr);
    }

    fn log_file(&self) -> File {
        let file = File::options().create(true).append(true).open(self.folder.join(LOG));
        file.expect("our folder")
    }

    fn launch_with(&mut self, binary: &Path, stderr: impl Into<Stdio>) {
        let _ = std::fs::remove_file(self.folder.join("data/run.json"));
        let mut command = self.command_of(binary, &["run", "--config", "headworks.yaml"]);
        command.stdin(Stdio::null()).stdout(self.log_file()).stderr(stderr);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        self.process = Some(Process::spawn("headworks", &mut command));
        self.bound = None;
    }

    /// Starts it and kills it (-9) once its files have changed so often, or when it serves.
    pub fn launch_and_kill(&mut self, changes: usize) {
        let folders = ["data", "data/broker", "data/dead-letters", "data/streams/telemetry"];
        let events = Events::of_files(folders.map(|name| self.folder.join(name)));
        self.launch();
        let mut seen = 0;
        events.until("the host begins", START_MAX, || {
            seen += 1;
            (seen > changes || self.folder.join("data/run.json").exists()).then_some(())
        });
        self.kill();
    }

    /// Waits until every part works.
    pub fn wait_ready(&mut self) {
        self.wait_until("the host is ready", |admin| {
            let (_, status) = http::get(admin, "/api/status").ok()?;
            let status: serde_json::Value = serde_json::from_str(&status).ok()?;
            status["components"].as_array()?.iter().all(|part| part["ready"] == true).then_some(())
        });
    }

    /// Waits until devices are acknowledged; sinks and plugins may not work yet.
    pub fn wait_serving(&mut self) {
        self.wait_until("the host serves devices", |admin| {
            matches!(http::get(admin, "/readyz"), Ok((200, _))).then_some(())
        });
    }

    fn wait_until(&mut self, what: &str, is_so: impl Fn(SocketAddr) -> Option<()>) {
        let run = self.folder.join("data/run.json");
        let process = self.process.as_ref().expect("launched").id();
        // It says when it listens, and when each sink is open and each pipeline runs.
        let events = Events::of_files([self.folder.join(LOG)]).while_runs(process);
        self.bound = Some(events.until(what, START_MAX, || {
            let bound: Bound = serde_json::from_slice(&std::fs::read(&run).ok()?).ok()?;
            is_so(bound.admin).map(|()| bound)
        }));
    }

    pub fn mqtt(&self) -> SocketAddr {
        self.listener(0)
    }

    /// The address of a listener that is not a Unix socket, in the order of the config.
    pub fn listener(&self, number: usize) -> SocketAddr {
        let bound = &self.bound.as_ref().expect("ready").mqtt[number];
        bound.parse().unwrap_or_else(|error| panic!("{bound}: {error}"))
    }

    /// The address of an HTTP listener, in the order of the config.
    pub fn http(&self, number: usize) -> SocketAddr {
        let bound = &self.bound.as_ref().expect("ready").http[number];
        bound.parse().unwrap_or_else(|error| panic!("{bound}: {error}"))
    }

    pub fn admin(&self) -> SocketAddr {
        self.bound.as_ref().expect("ready").admin
    }

    pub fn process(&mut self) -> &mut Process {
        self.process.as_mut().expect("launched")
    }

    /// As `kill -9`.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
    }

    /// SIGTERM, then waits: a clean end.
    pub fn stop(&mut self) -> ExitStatus {
        let mut process = self.process.take().expect("launched");
        process.signal(Signal::TERM);
        process.wait(STOP_MAX)
    }

    /// `headworks ARGS` in the host's folder.
    pub fn command(&self, args: &[&str]) -> Command {
        self.command_of(&binary(), args)
    }

    fn command_of(&self, binary: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(binary);
        command.args(args).current_dir(self.folder.path()).env_remove("RUST_LOG");
        command
    }

    /// `headworks passwd passwords USER`, and these options.
    pub fn passwd(&self, user: &str, password: &str, options: &[&str]) {
        let mut command = self.command(&["passwd", "passwords", user]);
        let mut child =
            command.args(options).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("the binary");
        writeln!(child.stdin.take().expect("piped"), "{password}").expect("the command reads");
        assert!(child.wait().expect("our child").success());
    }

    /// Runs `headworks ARGS --config headworks.yaml`; fails unless it succeeds.
    pub fn cli(&self, args: &[&str]) -> String {
        process::run(self.command(args).args(["--config", "headworks.yaml"]))
    }

    /// The same with `--format json`: one object a line.
    pub fn cli_json(&self, args: &[&str]) -> Vec<serde_json::Value> {
        let text = self.cli(&[args, &["--format", "json"]].concat());
        let parse = |line| {
            serde_json::from_str(line)
                .unwrap_or_else(|error| panic!("{args:?} printed no JSON ({error}): {line}"))
        };
        text.lines().map(parse).collect()
    }

    /// Drops a file into the plugins folder as a person would: under another name, then renamed.
    pub fn drop_plugin(&self, name: &str, from: impl AsRef<Path>) {
        self.drop_bytes(
            name,
            &std::fs::read(&from).unwrap_or_else(|error| panic!("{}: {error}", from.as_ref().display())),
        );
    }

    pub fn drop_bytes(&self, name: &str, bytes: &[u8]) {
        let partial = self.folder.write(&format!("plugins/.{name}.part"), bytes);
        std::fs::rename(partial, self.folder.join("plugins").join(name)).expect("our folder");
    }

    /// The value of a metric, summed over all series whose labels include `labels`.
    pub fn metric(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let (_, text) = http::get(self.admin(), "/metrics").expect("the host serves /metrics");
        sum(&text, name, labels)
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join(LOG)).unwrap_or_default()
    }

    /// Waits until the log holds a text.
    pub fn says(&self, text: &str) {
        self.says_past(0, text);
    }

    /// The same past so many bytes of the log.
    pub fn says_past(&self, begin: usize, text: &str) {
        let events = Events::of_files([self.folder.join(LOG)]);
        events.until(&format!("the host says {text:?}"), PATIENCE, || {
            self.log().get(begin..).is_some_and(|log| log.contains(text)).then_some(())
        });
    }

    /// Waits for what the host writes to its sinks' files, dead letters or the plugins' folder of its own.
    pub fn writes<T>(&self, what: &str, look: impl FnMut() -> Option<T>) -> T {
        let folders = ["data", "data/dead-letters", "data/plugin-cache"].map(|name| self.folder.join(name));
        Events::of_files(folders).until(what, PATIENCE, look)
    }

    /// One past the last message of the stream `telemetry`.
    pub fn end(&self) -> u64 {
        let (_, status) = http::get(self.admin(), "/api/status").expect("the host serves it");
        let status: serde_json::Value = serde_json::from_str(&status).expect("JSON");
        let streams = status["streams"].as_array().expect("a list").iter();
        let stream =
            streams.clone().find(|stream| stream["name"] == "telemetry").expect("the default stream");
        stream["end"].as_u64().expect("a number")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("---- end of the host's log ----\n{}", tail(&self.folder.join(LOG)));
        }
        self.kill();
    }
}

/// One host for all tests of a file that run at the same time; it ends with the last of them.
#[derive(Debug, Default)]
pub struct Shared(Mutex<Weak<Host>>);

impl Shared {
    pub const fn new() -> Self {
        Self(Mutex::new(Weak::new()))
    }

    pub fn get(&self, name: &str, config: &str) -> Arc<Host> {
        self.get_with(|| Host::start(name, config))
    }

    /// Runs a test of a host with the default config, once in each version of MQTT.
    pub fn in_both_versions(&self, name: &str, test: impl Fn(&Host, Version)) {
        let host = self.get(name, "");
        for version in [Version::V311, Version::V5] {
            test(&host, version);
        }
    }

    /// The same for a host that `start` prepares and runs.
    pub fn get_with(&self, start: impl FnOnce() -> Host) -> Arc<Host> {
        let mut shared = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(host) = shared.upgrade() {
            return host;
        }
        let host = Arc::new(start());
        *shared = Arc::downgrade(&host);
        host
    }
}

/// Sum of a metric's series in Prometheus' text format.
pub fn sum(text: &str, name: &str, labels: &[(&str, &str)]) -> f64 {
    text.lines()
        .filter(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']))
                && labels.iter().all(|(key, value)| line.contains(&format!("{key}=\"{value}\"")))
        })
        .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok())
        .sum()
}

/// `target/release/headworks`, which `make build` leaves.
pub fn binary() -> PathBuf {
    let path =
        std::env::var_os("HEADWORKS").map_or_else(|| target().join("release/headworks"), PathBuf::from);
    assert!(path.exists(), "{} is missing: run `make build`", path.display());
    path
}

/// A standard plugin as it lies in the tree: `plugins/prebuilt/NN-NAME.wasm`.
pub fn prebuilt(name: &str) -> PathBuf {
    let number = match name {
        "normalize" => 10,
        "enrich" => 20,
        "route" => 30,
        other => panic!("no standard plugin {other}"),
    };
    root().join(format!("plugins/prebuilt/{number}-{name}.wasm"))
}

/// Any plugin of the tree, built afresh by `plugins/build.sh`.
pub fn fresh(name: &str) -> PathBuf {
    let file = format!("{}.wasm", name.replace('-', "_"));
    let path = root().join("target/wasm/wasm32-unknown-unknown/plugin").join(file);
    assert!(path.exists(), "{} is missing: run `plugins/build.sh`", path.display());
    path
}

fn tail(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}
