//! A private PostgreSQL server: its own folder, its own port, ended with the test.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::process::Signal;
use tokio_postgres::{NoTls, Row, types::ToSql};

use crate::folder::Folder;
use crate::process::{Process, eventually, free_port, run};

#[derive(Debug)]
pub struct Postgres {
    port: u16,
    folder: Folder,
    process: Option<Process>,
}

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
        let mut server = Self { port: free_port(), folder, process: None };
        server.restart();
        server
    }

    /// Starts it on its port and data; waits until it answers.
    pub fn restart(&mut self) {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.folder.join("postgres.log"))
            .expect("our folder");
        // A server that was killed leaves its lock file; the next one reads it and goes on.
        let mut command = as_server_user("postgres");
        command.arg("-D").arg(self.folder.join("data")).arg("-p").arg(self.port.to_string());
        command.arg("-k").arg(self.folder.path()).current_dir(self.folder.path());
        for setting in SETTINGS {
            command.arg("-c").arg(setting);
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("our file")).stderr(log);
        let mut process = Process::spawn("postgres", &mut command);
        eventually("PostgreSQL answers", Duration::from_secs(60), || {
            assert!(process.alive(), "postgres ended at its start, see {}", self.folder.path().display());
            Database::connect(&self.url("postgres")).ok()
        });
        end_with_us(process.id(), self.folder.path());
        self.process = Some(process);
    }

    /// kill -9 of the postmaster; its children notice and end, as after a crash.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
        self.wait_for_children();
    }

    /// An immediate shutdown (SIGQUIT): as a crash to the clients, at once.
    pub fn stop(&mut self) {
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

    // The next postmaster refuses to start while a backend of the killed one is attached.
    fn wait_for_children(&self) {
        let needle = self.folder.join("data");
        eventually("backends of the killed server end", Duration::from_secs(30), || {
            (!processes_in(&needle)).then_some(())
        });
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
// server after us. (A parent-death signal would come with the end of the
// *thread* that started it.)
fn end_with_us(server: u32, folder: &Path) {
    let script = format!(
        "while kill -0 {us} 2>/dev/null; do kill -0 {server} 2>/dev/null || exit 0; sleep 0.5; done; \
         kill -QUIT {server} 2>/dev/null && sleep 2 && rm -rf '{folder}'",
        us = std::process::id(),
        folder = folder.display()
    );
    let _ = Command::new("setsid")
        .args(["sh", "-c", &script])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
}

fn processes_in(data: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir("/proc") else { return false };
    entries.flatten().any(|entry| std::fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == data))
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
}

impl Database {
    pub fn connect(url: &str) -> Result<Self, tokio_postgres::Error> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime of one thread");
        let client = runtime.block_on(async {
            let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
            tokio::spawn(connection);
            Ok::<_, tokio_postgres::Error>(client)
        })?;
        Ok(Self { url: url.to_owned(), runtime, client })
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
}
