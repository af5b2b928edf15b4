//! A private PostgreSQL server: its own folder, its own port, ended with the test.

use std::future::poll_fn;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tokio_postgres::{AsyncMessage, NoTls, Row, types::ToSql};

use crate::events::{self, Events};
use crate::folder::Folder;
use crate::process::{Process, free_port, run};

#[derive(Debug)]
pub struct Postgres {
    port: u16,
    folder: Folder,
    process: Option<Process>,
    watcher: Option<ChildStdin>,
}

/// Only a hung test meets it.
const PATIENCE: Duration = Duration::from_secs(180);

/// Autovacuum is off so that rows lie in the order of their commits; the rest
/// is Debian's default: fsync and synchronous_commit on.
const SETTINGS: &[&str] =
    &["listen_addresses=127.0.0.1", "autovacuum=off", "max_connections=60", "track_commit_timestamp=on"];

impl Postgres {
    pub fn start() -> Self {
        let folder = Folder::new("postgres");
        let data = folder.join("data");
        if rustix::process::geteuid().is_root() {
            run(Command::new("chown").arg("postgres").arg(folder.path()));
        }
        run(as_server_user("initdb")
            .args(["--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync", "-D"])
            .arg(&data)
            .current_dir(folder.path()));
        let mut server = Self { port: free_port(), folder, process: None, watcher: None };
        server.restart();
        server
    }

    /// Starts it on its port and data; waits until it answers.
    pub fn restart(&mut self) {
        let path = self.folder.join("postgres.log");
        let log = std::fs::File::options().create(true).append(true).open(&path).expect("our folder");
        let said_before = log.metadata().expect("our file").len() as usize;
        // A server that was killed leaves its lock file; the next one reads it and goes on.
        let mut command = as_server_user("postgres");
        command.arg("-D").arg(self.folder.join("data")).arg("-p").arg(self.port.to_string());
        command.arg("-k").arg(self.folder.path()).current_dir(self.folder.path());
        for setting in SETTINGS {
            command.arg("-c").arg(setting);
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("our file")).stderr(log);
        let process = Process::spawn("postgres", &mut command);
        Events::of_files([&path]).while_runs(process.id()).until("PostgreSQL is ready", PATIENCE, || {
            let said = std::fs::read(&path).ok()?;
            let said = String::from_utf8_lossy(said.get(said_before..)?).into_owned();
            said.contains("ready to accept connections").then_some(())
        });
        self.process = Some(process);
        self.watcher = Some(end_with_us(self.folder.path()));
    }

    /// kill -9 of the postmaster; its children notice and end, as after a crash.
    pub fn kill(&mut self) {
        self.dismiss_watcher();
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
        // The next postmaster refuses to start while a backend of the killed one is attached.
        for backend in processes_in(&self.folder.join("data")) {
            assert!(events::ended(backend, PATIENCE), "backend {backend} of the killed server does not end");
        }
    }

    /// An immediate shutdown (SIGQUIT): as a crash to the clients, at once.
    pub fn stop(&mut self) {
        self.dismiss_watcher();
        if let Some(mut process) = self.process.take() {
            process.signal(Signal::QUIT);
            process.wait(Duration::from_secs(30));
        }
    }

    pub fn process(&self) -> &Process {
        self.process.as_ref().expect("the server runs")
    }

    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// A fresh database of this server.
    pub fn database(&self) -> Database {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("iot_{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        Database::connect(&self.url("postgres"))
            .and_then(|mut db| db.try_execute(&format!("CREATE DATABASE {name}")))
            .unwrap_or_else(|error| panic!("cannot create database {name}: {error}"));
        Database::connect(&self.url(&name)).expect("the database was just created")
    }

    fn dismiss_watcher(&mut self) {
        if let Some(mut watcher) = self.watcher.take() {
            // Who was ended already needs no word.
            let _ = watcher.write_all(b"\n");
        }
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.stop();
    }
}

/// One server for all tests of a binary that do not stop it; ended after the process.
pub fn shared() -> &'static Postgres {
    static SERVER: LazyLock<Postgres> = LazyLock::new(Postgres::start);
    &SERVER
}

// Statics are not dropped, and a test may be killed: a small watcher ends the
// server when the pipe from us is closed before we sent it away. (A parent-death
// signal would come with the end of the *thread* that started it.)
#[expect(clippy::zombie_processes, reason = "the watcher ends after us")]
fn end_with_us(folder: &Path) -> ChildStdin {
    let mut end = as_server_user("pg_ctl");
    end.args(["stop", "-m", "immediate", "-D"]).arg(folder.join("data"));
    let mut watcher = Command::new("setsid")
        .args(["sh", "-c", r#"read -r _ || { folder=$1; shift; "$@"; rm -rf "$folder"; }"#, "watcher"])
        .arg(folder)
        .arg(end.get_program())
        .args(end.get_args())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .current_dir(folder)
        .spawn()
        .expect("a shell");
    watcher.stdin.take().expect("piped")
}

fn processes_in(data: &Path) -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").expect("Linux").flatten();
    let here =
        entries.filter(|entry| std::fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == data));
    here.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// initdb and postgres refuse root.
fn as_server_user(program: &str) -> Command {
    let path = bin().join(program);
    if rustix::process::geteuid().is_root() {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=postgres", "--regid=postgres", "--init-groups"]).arg(path);
        command
    } else {
        Command::new(path)
    }
}

fn bin() -> PathBuf {
    let mut found: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path().join("bin"))
        .filter(|path| path.join("initdb").exists())
        .collect();
    found.sort();
    found.pop().unwrap_or_else(|| {
        let output = Command::new("pg_config").arg("--bindir").output();
        let output = output.expect("PostgreSQL is missing: run `make setup`");
        PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())
    })
}

/// A connection to one database; blocking.
#[derive(Debug)]
pub struct Database {
    url: String,
    runtime: tokio::runtime::Runtime,
    client: tokio_postgres::Client,
    /// By NOTIFY.
    changed: Receiver<()>,
}

impl Database {
    pub fn connect(url: &str) -> Result<Self, tokio_postgres::Error> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime of one thread");
        let (change, changed) = channel();
        let client = runtime.block_on(async {
            let (client, mut connection) = tokio_postgres::connect(url, NoTls).await?;
            tokio::spawn(async move {
                while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
                    if matches!(message, AsyncMessage::Notification(_)) && change.send(()).is_err() {
                        return;
                    }
                }
            });
            Ok::<_, tokio_postgres::Error>(client)
        })?;
        Ok(Self { url: url.to_owned(), runtime, client, changed })
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    pub fn try_execute(&mut self, sql: &str) -> Result<(), tokio_postgres::Error> {
        self.runtime.block_on(self.client.batch_execute(sql))
    }

    pub fn execute(&mut self, sql: &str) {
        self.try_execute(sql).unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    pub fn try_query(
        &mut self,
        sql: &str,
        with: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, tokio_postgres::Error> {
        self.runtime.block_on(self.client.query(sql, with))
    }

    pub fn query(&mut self, sql: &str) -> Vec<Row> {
        self.try_query(sql, &[]).unwrap_or_else(|error| panic!("{sql}: {error:?}"))
    }

    /// Rows of a table; 0 while there is no such table.
    pub fn count(&mut self, table: &str) -> i64 {
        self.try_query(&format!("SELECT count(*) FROM {table}"), &[]).map_or(0, |rows| rows[0].get(0))
    }

    /// Waits for what a commit to this table brings about: the table is given a
    /// trigger that tells of each.
    pub fn changes<T>(&mut self, table: &str, what: &str, mut look: impl FnMut(&mut Self) -> Option<T>) -> T {
        self.execute(&format!(
            "CREATE OR REPLACE FUNCTION tell_{table}() RETURNS trigger LANGUAGE plpgsql
                 AS 'BEGIN NOTIFY {table}; RETURN NULL; END';
             CREATE OR REPLACE TRIGGER tell AFTER INSERT OR UPDATE ON {table}
                 FOR EACH STATEMENT EXECUTE FUNCTION tell_{table}();
             LISTEN {table}"
        ));
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = look(self) {
                return found;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            self.changed.recv_timeout(left).unwrap_or_else(|error| panic!("{what}: {error}"));
            while self.changed.try_recv().is_ok() {}
        }
    }
}
