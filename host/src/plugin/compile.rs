//! Compiling in a child process, under limits.
//!
//! A compiler is an attack surface: a function of 530 KB took 28 s and 6.7 GB.
//! The child is this program again (`headworks plugin-compile`); it finds its
//! order in a variable, puts limits on itself before it reads a byte of
//! the plugin, and writes native code to a file. One child at a time.

use std::ffi::OsString;
use std::fs::DirBuilder;
use std::io::Read;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, setrlimit};
use serde::{Deserialize, Serialize};

use super::engine;
use crate::units::ByteSize;

/// First argument of the child.
pub const CHILD_COMMAND: &str = "plugin-compile";
/// The child's output file.
const ARTIFACT_BYTES_MAX: u64 = 1 << 30;
/// Wall time is limited to this many times the CPU limit.
const WALL_FACTOR: u64 = 10;
const POLL: Duration = Duration::from_millis(2);
const MESSAGE_BYTES_MAX: u64 = 4 << 10;

/// How plugins are compiled.
#[derive(Clone, Debug)]
pub struct Compiler {
    way: Way,
    pub(super) cpu_s: u64,
    wall_s: u64,
    pub(super) memory: ByteSize,
    one_at_a_time: Arc<Mutex<()>>,
}

#[derive(Clone, Debug)]
enum Way {
    Child { program: PathBuf, args: Vec<OsString> },
    InProcess,
}

/// Why a plugin could not be compiled.
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
    #[error("cannot be compiled: {0}")]
    Invalid(String),
    #[error("the compiler ended unexpectedly ({0})")]
    Died(String),
    #[error("cannot start the compiler {program}: {error}")]
    Start { program: PathBuf, error: std::io::Error },
    #[error("cannot read or write {path}: {error}")]
    File { path: PathBuf, error: std::io::Error },
}

/// What the child is told.
#[derive(Serialize, Deserialize)]
struct Order {
    component: PathBuf,
    artifact: PathBuf,
    cpu_s: u64,
    memory: u64,
}

impl Compiler {
    /// In a child of this program, which must call [`compile_child_main`] when
    /// its first argument is [`CHILD_COMMAND`].
    pub fn child(cpu_s: u64, memory: ByteSize) -> std::io::Result<Self> {
        Ok(Self::child_of(std::env::current_exe()?, vec![CHILD_COMMAND.into()], cpu_s, memory))
    }

    /// In a child of another program.
    pub fn child_of(program: PathBuf, args: Vec<OsString>, cpu_s: u64, memory: ByteSize) -> Self {
        let wall_s = cpu_s * WALL_FACTOR;
        Self { way: Way::Child { program, args }, cpu_s, wall_s, memory, one_at_a_time: Arc::default() }
    }

    /// In this process and without limits: for tests, and for commands that a
    /// person runs on a plugin of their own (`plugin bench`).
    pub fn in_process() -> Self {
        Self { way: Way::InProcess, cpu_s: 0, wall_s: 0, memory: ByteSize(0), one_at_a_time: Arc::default() }
    }

    /// Native code of a component. `scratch` is a folder for the child's files.
    pub(super) fn compile(&self, component: &[u8], scratch: &Path) -> Result<Vec<u8>, CompileError> {
        let _turn = self.one_at_a_time.lock().unwrap_or_else(PoisonError::into_inner);
        match &self.way {
            Way::InProcess => precompile(component).map_err(CompileError::Invalid),
            Way::Child { program, args } => self.compile_in_child(program, args, component, scratch),
        }
    }

    fn compile_in_child(
        &self,
        program: &Path,
        args: &[OsString],
        component: &[u8],
        scratch: &Path,
    ) -> Result<Vec<u8>, CompileError> {
        // Of its own and private: nobody can put another file in the place of the child's.
        let folder = scratch.join(format!(".compile-{}", uuid::Uuid::new_v4()));
        DirBuilder::new()
            .mode(0o700)
            .create(&folder)
            .map_err(|error| CompileError::File { path: folder.clone(), error })?;
        let order = Order {
            component: folder.join("component.wasm"),
            artifact: folder.join("artifact"),
            cpu_s: self.cpu_s,
            memory: self.memory.0,
        };
        let file = |path: &Path| {
            let path = path.to_owned();
            move |error| CompileError::File { path, error }
        };
        let result = std::fs::write(&order.component, component)
            .map_err(file(&order.component))
            .and_then(|()| self.run(program, args, &order))
            .and_then(|()| std::fs::read(&order.artifact).map_err(file(&order.artifact)));
        // Left over it takes space, and harms nothing.
        let _ = std::fs::remove_dir_all(&folder);
        result
    }

    fn run(&self, program: &Path, args: &[OsString], order: &Order) -> Result<(), CompileError> {
        let start = |error| CompileError::Start { program: program.to_owned(), error };
        let mut child = Command::new(program)
            .args(args)
            .env_clear()
            .env(CHILD_VARIABLE, serde_json::to_string(order).expect("an order is plain text"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(start)?;
        let messages = child.stderr.take().map(|stderr| {
            thread::spawn(move || {
                let mut text = Vec::new();
                // Read to the end, keep the first part: a full pipe would stop the child.
                let mut stderr = stderr;
                let _ = stderr.by_ref().take(MESSAGE_BYTES_MAX).read_to_end(&mut text);
                let _ = std::io::copy(&mut stderr, &mut std::io::sink());
                String::from_utf8_lossy(&text).into_owned()
            })
        });
        let deadline = Instant::now() + Duration::from_secs(self.wall_s);
        let status = loop {
            match child.try_wait().map_err(start)? {
                Some(status) => break status,
                None if Instant::now() > deadline => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(CompileError::Wall(self.wall_s));
                }
                None => thread::sleep(POLL),
            }
        };
        let said = messages.and_then(|thread| thread.join().ok()).unwrap_or_default();
        self.judge(status, said.trim())
    }

    fn judge(&self, status: ExitStatus, said: &str) -> Result<(), CompileError> {
        let signal = |signal: rustix::process::Signal| status.signal() == Some(signal.as_raw());
        use rustix::process::Signal;
        if status.success() {
            Ok(())
        } else if signal(Signal::XCPU) {
            Err(CompileError::Cpu(self.cpu_s))
        } else if signal(Signal::XFSZ) {
            Err(CompileError::Size)
        } else if ["memory allocation of", "Cannot allocate memory"].iter().any(|text| said.contains(text)) {
            // Rust's allocator says so before it aborts, the system in its error.
            Err(CompileError::Memory(self.memory))
        } else if status.code() == Some(INVALID.into()) {
            Err(CompileError::Invalid(super::host::printable(said)))
        } else {
            Err(CompileError::Died(format!("{status}: {}", super::host::printable(said))))
        }
    }
}

/// Holds the child's order.
const CHILD_VARIABLE: &str = "HEADWORKS_PLUGIN_COMPILE";
/// Exit code: the plugin is at fault.
const INVALID: u8 = 3;
const INVALID_ORDER: u8 = 4;

/// `main` of the compiling child: to be called first thing when the first
/// argument is [`CHILD_COMMAND`]. The arguments are not used.
pub fn compile_child_main(_args: impl Iterator<Item = OsString>) -> ExitCode {
    ExitCode::from(child_main())
}

fn child_main() -> u8 {
    let order = std::env::var(CHILD_VARIABLE).ok().and_then(|text| serde_json::from_str::<Order>(&text).ok());
    let Some(order) = order else {
        eprintln!("{CHILD_COMMAND} is started by headworks itself");
        return INVALID_ORDER;
    };
    match compile_under_limits(&order) {
        Ok(()) => 0,
        Err(reason) => {
            eprintln!("{reason}");
            INVALID
        }
    }
}

fn compile_under_limits(order: &Order) -> Result<(), String> {
    let limit = |resource, value, slack| {
        setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value + slack) })
            .map_err(|error| format!("cannot set a limit: {error}"))
    };
    limit(Resource::As, order.memory, 0)?;
    // A second apart, so that its signal says which limit it was: SIGXCPU, not SIGKILL.
    limit(Resource::Cpu, order.cpu_s, 1)?;
    limit(Resource::Fsize, ARTIFACT_BYTES_MAX, 0)?;
    limit(Resource::Core, 0, 0)?;
    limit(Resource::Nofile, 32, 0)?;
    // Lower priority is a courtesy: without it the limits still hold.
    let _ = rustix::process::nice(19);
    let component = std::fs::read(&order.component).map_err(|error| error.to_string())?;
    let artifact = precompile(&component)?;
    std::fs::write(&order.artifact, artifact).map_err(|error| error.to_string())
}

fn precompile(component: &[u8]) -> Result<Vec<u8>, String> {
    engine::engine()
        .and_then(|engine| engine.precompile_component(component))
        .map_err(|error| format!("{error:#}"))
}

#[cfg(test)]
#[path = "compile_tests.rs"]
mod tests;
