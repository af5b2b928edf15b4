//! A child process that never outlives its test.

use std::hash::{BuildHasher, RandomState};
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::events;

/// Only a hung test meets it.
const HUNG_AFTER: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
}

impl Process {
    pub fn spawn(name: &str, command: &mut Command) -> Self {
        let child =
            command.spawn().unwrap_or_else(|error| panic!("cannot start {name} ({command:?}): {error}"));
        Self { name: name.to_owned(), child }
    }

    /// Takes charge of a child that was started elsewhere, with its pipes.
    pub fn adopt(name: &str, child: Child) -> Self {
        Self { name: name.to_owned(), child }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Still running.
    pub fn alive(&mut self) -> bool {
        self.exited().is_none()
    }

    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("our child")
    }

    /// As `kill -9`: nothing of it runs any more when this returns.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id().cast_signed()).expect("a child's id is not 0");
        let _ = kill_process(pid, signal);
    }

    /// Waits for the end; kills and fails past the deadline.
    pub fn wait(&mut self, at_most: Duration) -> ExitStatus {
        // Of one that was waited for, the id may be another's.
        if let Some(status) = self.exited() {
            return status;
        }
        if !events::ended(self.id(), at_most) {
            self.kill();
            panic!("{} did not end within {at_most:?}", self.name);
        }
        self.child.wait().expect("our child")
    }

    /// Resident memory in bytes.
    pub fn rss_bytes(&self) -> u64 {
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.id())).unwrap_or_default();
        let pages: u64 = statm.split_ascii_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
        pages * rustix::param::page_size() as u64
    }

    /// The most resident memory that it ever had, in bytes.
    pub fn peak_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id())).unwrap_or_default();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = peak.and_then(|peak| peak.trim().trim_end_matches(" kB").parse::<u64>().ok());
        kib.expect("the kernel says it") << 10
    }

    /// User and system CPU time so far.
    pub fn cpu(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.id())).unwrap_or_default();
        // proc(5): the name may hold blanks, what follows its ")" does not; utime and stime are fields 14 and 15.
        let after = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let ticks: u64 =
            after.split_ascii_whitespace().skip(11).take(2).filter_map(|n| n.parse::<u64>().ok()).sum();
        Duration::from_nanos(ticks * 1_000_000_000 / rustix::param::clock_ticks_per_second())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What a client prints, line by line.
#[derive(Debug)]
pub struct Lines {
    lines: Receiver<String>,
    process: Process,
}

impl Lines {
    pub fn of(command: &mut Command) -> Self {
        // Line by line, also into a pipe.
        let mut buffered = through(&["stdbuf", "-oL"], command);
        let mut child = buffered.stdout(Stdio::piped()).spawn().expect("the client is installed");
        let out = child.stdout.take().expect("piped");
        let (to, lines) = channel();
        std::thread::spawn(move || {
            BufReader::new(out).lines().map_while(Result::ok).try_for_each(|line| to.send(line))
        });
        Self { lines, process: Process::adopt("client", child) }
    }

    pub fn line(&mut self) -> String {
        self.lines.recv_timeout(HUNG_AFTER).expect("the client prints another line")
    }

    /// The next line with this text.
    pub fn find(&mut self, text: &str) -> String {
        loop {
            let line = self.line();
            if line.contains(text) {
                return line;
            }
        }
    }

    /// Waits until the client ends by itself.
    pub fn end(mut self) -> ExitStatus {
        self.process.wait(HUNG_AFTER)
    }

    /// As `kill -9`.
    pub fn kill(mut self) -> ExitStatus {
        self.process.kill();
        self.process.wait(HUNG_AFTER)
    }
}

/// The command as a shell at a terminal starts it: SIGINT is not ignored, as it is
/// in all that a script starts in the background, tests among it.
pub fn interruptible(command: &Command) -> Command {
    through(&["env", "--default-signal=INT"], command)
}

/// The same, started by a program that becomes it.
fn through(wrapper: &[&str], command: &Command) -> Command {
    let mut wrapped = Command::new(wrapper[0]);
    wrapped.args(&wrapper[1..]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        wrapped.env(name, value.unwrap_or_default());
    }
    if let Some(folder) = command.get_current_dir() {
        wrapped.current_dir(folder);
    }
    wrapped
}

/// Runs to the end; fails with all that it said unless it succeeds.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{command:?} failed: {}\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// A port that is free now, for servers that cannot say which port the OS gave
/// them: below those that the kernel gives to sockets that connect.
pub fn free_port() -> u16 {
    let random = || u16::try_from(10_000 + RandomState::new().hash_one(()) % 20_000).expect("below 30,000");
    std::iter::repeat_with(random)
        .find(|port| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .expect("a free port")
}
