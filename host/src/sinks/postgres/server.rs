//! A private PostgreSQL server for tests: a new cluster in a temporary folder, on a free port, run by
//! the user `postgres` if the tests run as root. It is stopped and removed when dropped. It uses only
//! the standard library, so that any test can use it.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::Duration;

pub struct Server {
    dir: PathBuf,
    bin: PathBuf,
    pub port: u16,
    process: Option<Running>,
}

struct Running {
    process: Child,
    /// Thread that collects the server's log. It ends with the last of its processes.
    log: JoinHandle<()>,
}

/// Timeout that only a hung test reaches.
const HUNG_AFTER: Duration = Duration::from_secs(120);

const MISSING: &str = "these tests need a real PostgreSQL: install its server (`apt-get install postgresql`), \
     or set HEADWORKS_TEST_POSTGRES to the url of one that they may fill";

impl Server {
    /// Starts a server. `settings` are lines of postgresql.conf.
    pub fn start(settings: &[&str]) -> Self {
        let bin = newest_bin().expect(MISSING);
        let dir = std::env::temp_dir().join(format!("headworks-pg-{}-{}", std::process::id(), free_port()));
        std::fs::create_dir_all(&dir).expect("a temporary folder can be made");
        let data = dir.join("data");
        if is_root() {
            run(Command::new("chown").arg("postgres").arg(&dir));
        }
        run(as_postgres(&bin.join("initdb"))
            .args(["--no-sync", "--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "-D"])
            .arg(&data));
        let mut server = Self { dir, bin, port: 0, process: None };
        let lines: Vec<String> = settings.iter().map(|line| format!("{line}\n")).collect();
        server.write("data/postgresql.auto.conf", &lines.concat());
        server.port = free_port();
        server.resume();
        server
    }

    pub fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }

    /// Writes a file that the server can read, below its folder.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.join(name);
        std::fs::write(&path, text).expect("the server's folder can be written");
        if is_root() {
            run(Command::new("chown").arg("postgres").arg(&path));
        }
        run(Command::new("chmod").arg("600").arg(&path));
        path
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Ends the server as a crash does, without a checkpoint or a clean shutdown.
    pub fn kill(&mut self) {
        let Some(Running { mut process, log }) = self.process.take() else { return };
        let pid_file = self.dir.join("data/postmaster.pid");
        let pid =
            std::fs::read_to_string(&pid_file).ok().and_then(|text| Some(text.lines().next()?.to_owned()));
        if let Some(pid) = pid {
            let _ = Command::new("kill").args(["-9", &pid]).stderr(Stdio::null()).status();
        }
        let _ = process.kill();
        let _ = process.wait();
        // Its children end by themselves once they see that it is gone, each has
        // its log open; a new one starts only after the last of them.
        let _ = log.join();
        let _ = std::fs::remove_file(pid_file);
    }

    /// Shuts the server down in one of the modes of pg_ctl.
    pub fn stop(&self, mode: &str) {
        run(as_postgres(&self.bin.join("pg_ctl"))
            .args(["stop", "-m", mode, "-D"])
            .arg(self.dir.join("data")));
    }

    /// Starts the server, also after `kill`, and waits until it is ready.
    pub fn resume(&mut self) {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.dir.join("log"));
        let mut file = log.expect("the log can be written");
        let mut process = as_postgres(&self.bin.join("postgres"))
            .arg("-D")
            .arg(self.dir.join("data"))
            .args(["-p", &self.port.to_string(), "-c", "listen_addresses=127.0.0.1"])
            .args(["-c", "unix_socket_directories="])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("postgres starts");
        let lines = BufReader::new(process.stderr.take().expect("piped")).lines();
        let (say, said) = channel();
        let log = std::thread::spawn(move || {
            // To its end, whoever listens: a full pipe would stop the server.
            for line in lines.map_while(Result::ok) {
                let _ = writeln!(file, "{line}");
                let _ = say.send(line);
            }
        });
        loop {
            match said.recv_timeout(HUNG_AFTER) {
                Ok(line) if line.contains("ready to accept connections") => break,
                Ok(_) => {}
                Err(error) => panic!("PostgreSQL does not start ({error}): {}", self.log()),
            }
        }
        self.process = Some(Running { process, log });
    }

    /// Starts a PgBouncer in front of the server, with these lines in its configuration. It ends when
    /// the result is dropped.
    pub fn pooler(&self, settings: &str) -> Pooler {
        const MISSING: &str = "these tests need PgBouncer: `apt-get install pgbouncer`";
        let path = std::env::var_os("PATH").unwrap_or_default();
        let program = std::env::split_paths(&path)
            .chain(["/usr/sbin".into()])
            .map(|folder| folder.join("pgbouncer"))
            .find(|program| program.exists())
            .expect(MISSING);
        let port = free_port();
        let users = self.write("users", "\"postgres\" \"\"\n");
        let file = self.write(
            "pgbouncer.ini",
            &format!(
                "[databases]\n* = host=127.0.0.1 port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
                 auth_type = trust\nauth_file = {}\nunix_socket_dir =\n{settings}\n",
                self.port,
                users.display()
            ),
        );
        let mut process = as_postgres(&program)
            .arg(file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("pgbouncer starts");
        let mut lines = BufReader::new(process.stderr.take().expect("piped")).lines().map_while(Result::ok);
        let is_up = lines.any(|line| line.contains("process up"));
        assert!(is_up, "PgBouncer does not start");
        // To its end: a full pipe would stop it.
        let log = std::thread::spawn(move || lines.for_each(drop));
        Pooler { port, process, log: Some(log) }
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }
}

pub struct Pooler {
    pub port: u16,
    process: Child,
    log: Option<JoinHandle<()>>,
}

impl Drop for Pooler {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        drop(self.log.take().map(JoinHandle::join));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Returns `/usr/lib/postgresql/15/bin` of the highest version, otherwise the folder of `initdb` in the
/// path.
fn newest_bin() -> Option<PathBuf> {
    let mut versions: Vec<(u32, PathBuf)> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin"))))
        .filter(|(_, bin)| bin.join("initdb").exists())
        .collect();
    versions.sort();
    versions
        .pop()
        .map(|(_, bin)| bin)
        .or_else(|| std::env::split_paths(&std::env::var_os("PATH")?).find(|bin| bin.join("initdb").exists()))
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|data| std::os::unix::fs::MetadataExt::uid(&data) == 0)
}

/// Returns a command that runs as the user `postgres`, because PostgreSQL refuses to run as root.
fn as_postgres(program: &Path) -> Command {
    if !is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]).arg(program);
    command.current_dir("/");
    command
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("it is bound").port()
}
