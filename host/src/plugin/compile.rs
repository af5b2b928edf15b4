//! Parsing and compiling a plugin file in a child process, under limits.
//!
//! A plugin file is an attack surface, all of it: one function of 530 KB took
//! 28 s and 6.7 GB to compile, one changed byte in a file's WIT metadata
//! overflowed the stack of the process that parsed it. The child is this program
//! again (`headworks plugin-compile`, see `compile_child.rs`). It takes the
//! file over a socket, and answers what the file is and its native code. The
//! host parses nothing but that answer, whose lengths it checks. One child at a time.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use super::engine;
use super::host::printable;
use super::lines::{self, LINES_BYTES_MAX};
use super::load::{LoadError, Report};
use crate::units::ByteSize;

/// First argument of the child.
pub const CHILD_COMMAND: &str = "plugin-compile";
/// The child itself while it runs: the host's own file, even where another version lies in its place by now.
const THIS_PROGRAM: &str = "/proc/self/exe";
/// Holds the child's order.
pub(super) const CHILD_VARIABLE: &str = "HEADWORKS_PLUGIN_COMPILE";
/// Native code of one plugin.
pub(super) const ARTIFACT_BYTES_MAX: usize = 512 << 20;
/// What the child says of the file, as JSON.
const REPORT_BYTES_MAX: usize = 1 << 20;
/// Wall time is limited to this many times the CPU limit.
const WALL_FACTOR: u64 = 10;
const POLL: Duration = Duration::from_millis(2);
/// Longest wait for the child's socket before the deadline is looked at.
const WAIT: Duration = Duration::from_millis(20);
const CHUNK_BYTES: usize = 256 << 10;
const MESSAGE_BYTES_MAX: u64 = 4 << 10;
/// What Rust's allocator says before it aborts, the compiler before it panics, the system in its error.
pub(super) const OUT_OF_MEMORY: [&str; 3] =
    ["memory allocation of", "out of memory", "Cannot allocate memory"];
/// How nice the child is while the host runs, and while pipelines wait for their first steps.
const NICE: i32 = 19;
const NICE_AT_START: i32 = 5;

/// How plugin files are parsed and compiled. Clones share the one child.
#[derive(Clone, Debug)]
pub struct Compiler {
    way: Way,
    cpu_s: u64,
    wall_s: u64,
    memory: ByteSize,
    nice: i32,
    stopped: Arc<AtomicBool>,
    one_at_a_time: Arc<Mutex<()>>,
}

#[derive(Clone, Debug)]
enum Way {
    Child { program: PathBuf, args: Vec<OsString> },
    InProcess,
}

/// What became of a file.
#[derive(Debug)]
pub(super) struct Compiled {
    pub report: Report,
    /// Files and lines of its code, see [`super::lines`]; empty where the file has none.
    pub lines: Vec<u8>,
    /// Native code; empty where the report refuses the file.
    pub artifact: Vec<u8>,
}

/// Why a file could not be compiled, although it may be a plugin.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    #[error("took over {0} s of CPU to compile: limit plugins.compile_cpu_s; is one of its functions huge?")]
    Cpu(u64),
    #[error("took over {0} s to compile: limit plugins.compile_cpu_s")]
    Wall(u64),
    #[error("needs more than {0} of memory to compile: limit plugins.compile_memory")]
    Memory(ByteSize),
    #[error("its native code has more than {} MiB", ARTIFACT_BYTES_MAX >> 20)]
    Size,
    #[error("ended the compiler ({0}): damaged, or made to do so; copy or build it again")]
    Died(String),
    #[error("the compiler was killed from outside ({0})")]
    Killed(String),
    #[error("the compiler's answer cannot be read")]
    Answer,
    #[error("the host ends")]
    Stopped,
    #[error("cannot start the compiler {program}: {error}")]
    Start { program: PathBuf, error: io::Error },
    #[error("cannot speak to the compiler: {0}")]
    Socket(io::Error),
}

/// What the child is told.
#[derive(Serialize, Deserialize)]
pub(super) struct Order {
    /// Process id of the host.
    pub parent: u32,
    pub cpu_s: u64,
    pub memory: u64,
    pub nice: i32,
}

impl CompileError {
    /// Whether the file is the cause, so that the same bytes under the same limits fail again.
    pub(super) fn is_of_the_file(&self) -> bool {
        matches!(self, Self::Cpu(_) | Self::Memory(_) | Self::Size | Self::Died(_) | Self::Answer)
    }
}

impl Compiler {
    /// In a child of this program, which must call [`super::compile_child_main`]
    /// when its first argument is [`CHILD_COMMAND`].
    pub fn child(cpu_s: u64, memory: ByteSize) -> Self {
        Self::child_of(THIS_PROGRAM.into(), vec![CHILD_COMMAND.into()], cpu_s, memory)
    }

    /// In a child of another program.
    pub fn child_of(program: PathBuf, args: Vec<OsString>, cpu_s: u64, memory: ByteSize) -> Self {
        Self::new(Way::Child { program, args }, cpu_s, memory)
    }

    /// In this process and without limits: for tests and benchmarks with plugins of the tree.
    pub fn in_process() -> Self {
        Self::new(Way::InProcess, 0, ByteSize(0))
    }

    fn new(way: Way, cpu_s: u64, memory: ByteSize) -> Self {
        Self {
            way,
            cpu_s,
            wall_s: cpu_s * WALL_FACTOR,
            memory,
            nice: NICE,
            stopped: Arc::default(),
            one_at_a_time: Arc::default(),
        }
    }

    /// CPU seconds and bytes of memory that one file may take.
    pub(super) fn limits(&self) -> (u64, u64) {
        (self.cpu_s, self.memory.0)
    }

    /// Whether pipelines wait for what is compiled: the child is less nice then.
    pub(super) fn set_awaited(&mut self, awaited: bool) {
        self.nice = if awaited { NICE_AT_START } else { NICE };
    }

    /// Ends the child, and lets no other begin.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
    }

    /// What `file` is, and its native code where it is a plugin for this host.
    pub(super) fn compile(&self, file: &[u8]) -> Result<Compiled, CompileError> {
        let _turn = self.one_at_a_time.lock().unwrap_or_else(PoisonError::into_inner);
        match &self.way {
            Way::InProcess => Ok(compile(file)),
            Way::Child { program, args } => self.compile_in_child(program, args, file),
        }
    }

    fn compile_in_child(
        &self,
        program: &Path,
        args: &[OsString],
        file: &[u8],
    ) -> Result<Compiled, CompileError> {
        let start = |error| CompileError::Start { program: program.to_owned(), error };
        let order =
            Order { parent: std::process::id(), cpu_s: self.cpu_s, memory: self.memory.0, nice: self.nice };
        let (socket, childs) = UnixStream::pair().map_err(CompileError::Socket)?;
        let child = Command::new(program)
            .args(args)
            .env_clear()
            .env(CHILD_VARIABLE, serde_json::to_string(&order).expect("an order is plain text"))
            .stdin(OwnedFd::from(childs))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(start)?;
        let mut child = Running(child);
        let messages = child.0.stderr.take().map(|mut stderr| {
            thread::spawn(move || {
                let mut text = Vec::new();
                // Read to the end, keep the first part: a full pipe would stop the child.
                let _ = stderr.by_ref().take(MESSAGE_BYTES_MAX).read_to_end(&mut text);
                let _ = io::copy(&mut stderr, &mut io::sink());
                String::from_utf8_lossy(&text).into_owned()
            })
        });
        let deadline = Instant::now() + Duration::from_secs(self.wall_s);
        let answer = self.exchange(&socket, file, deadline)?;
        let status = loop {
            match child.0.try_wait().map_err(start)? {
                Some(status) => break status,
                None => self.check(deadline)?,
            }
            thread::sleep(POLL);
        };
        let said = messages.and_then(|thread| thread.join().ok()).unwrap_or_default();
        self.judge(status, said.trim())?;
        Compiled::decode(answer).ok_or(CompileError::Answer)
    }

    /// Sends the file, and reads the answer until the child closes its end.
    fn exchange(
        &self,
        mut socket: &UnixStream,
        file: &[u8],
        deadline: Instant,
    ) -> Result<Vec<u8>, CompileError> {
        let timeouts = socket.set_write_timeout(Some(WAIT)).and(socket.set_read_timeout(Some(WAIT)));
        timeouts.map_err(CompileError::Socket)?;
        let is_wait = |error: &io::Error| {
            use io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
            matches!(error.kind(), WouldBlock | TimedOut | Interrupted)
        };
        let mut unsent = file;
        while !unsent.is_empty() {
            match socket.write(unsent) {
                Ok(sent) => unsent = &unsent[sent..],
                Err(error) if is_wait(&error) => {}
                // The child has ended: its status says why.
                Err(_) => break,
            }
            self.check(deadline)?;
        }
        // Fails only where the child has ended.
        let _ = socket.shutdown(Shutdown::Write);
        let (mut answer, mut chunk) = (Vec::new(), vec![0; CHUNK_BYTES]);
        loop {
            match socket.read(&mut chunk) {
                Ok(0) => return Ok(answer),
                Ok(read) => answer.extend_from_slice(&chunk[..read]),
                Err(error) if is_wait(&error) => {}
                Err(_) => return Ok(answer),
            }
            if answer.len() > ARTIFACT_BYTES_MAX + REPORT_BYTES_MAX + LINES_BYTES_MAX {
                return Err(CompileError::Size);
            }
            self.check(deadline)?;
        }
    }

    /// Whether the child may go on.
    fn check(&self, deadline: Instant) -> Result<(), CompileError> {
        if self.stopped.load(Ordering::Acquire) {
            Err(CompileError::Stopped)
        } else if Instant::now() > deadline {
            Err(CompileError::Wall(self.wall_s))
        } else {
            Ok(())
        }
    }

    fn judge(&self, status: ExitStatus, said: &str) -> Result<(), CompileError> {
        let died = || match said {
            "" => status.to_string(),
            said => format!("{status}: {}", printable(said)),
        };
        let signal = |signal: Signal| status.signal() == Some(signal.as_raw());
        if status.success() {
            Ok(())
        } else if signal(Signal::XCPU) {
            Err(CompileError::Cpu(self.cpu_s))
        } else if OUT_OF_MEMORY.iter().any(|text| said.contains(text)) {
            Err(CompileError::Memory(self.memory))
        } else if signal(Signal::KILL) || signal(Signal::TERM) {
            Err(CompileError::Killed(died()))
        } else {
            Err(CompileError::Died(died()))
        }
    }
}

/// A child that ends where it is not waited for.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only where the child has ended and was waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Compiled {
    /// Lengths of the report and of the lines, the report, the lines, native code.
    pub(super) fn encode(&self) -> Vec<u8> {
        let report = serde_json::to_vec(&self.report).expect("a report is plain text");
        let length = |part: &[u8]| u32::try_from(part.len()).expect("both are bounded").to_le_bytes();
        [&length(&report)[..], &length(&self.lines), &report, &self.lines, &self.artifact].concat()
    }

    pub(super) fn decode(mut answer: Vec<u8>) -> Option<Self> {
        let length = |at: usize| Some(u32::from_le_bytes(*answer.get(at..)?.first_chunk()?) as usize);
        let (report_bytes, lines_bytes) = (length(0)?, length(4)?);
        if report_bytes > REPORT_BYTES_MAX || lines_bytes > LINES_BYTES_MAX {
            return None;
        }
        let lines_at = 8 + report_bytes;
        let report: Report = serde_json::from_slice(answer.get(8..lines_at)?).ok()?;
        let lines = answer.get(lines_at..lines_at + lines_bytes)?.to_vec();
        let artifact = answer.split_off(lines_at + lines_bytes);
        let fits = report.kind.is_ok() != artifact.is_empty() && artifact.len() <= ARTIFACT_BYTES_MAX;
        fits.then_some(Self { report, lines, artifact })
    }
}

/// Parses and compiles a file in this process.
pub(super) fn compile(file: &[u8]) -> Compiled {
    let (mut report, component) = Report::of(file);
    let (mut artifact, mut lines) = (Vec::new(), Vec::new());
    if report.kind.is_ok() {
        let engine = engine::engine();
        match engine.and_then(|engine| engine.precompile_component(&component)) {
            Ok(code) => (artifact, lines) = (code, lines::of(&component)),
            Err(error) => report.kind = Err(LoadError::Invalid(printable(&format!("{error:#}")))),
        }
    }
    Compiled { report, lines, artifact }
}

#[cfg(test)]
#[path = "compile_tests.rs"]
pub(super) mod tests;
