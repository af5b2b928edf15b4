//! A plugin file, compiled and described: what instances are made of.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use wasmtime::component::{Component, HasSelf, InstancePre, Linker};
use wasmtime::{Engine, Store};

use super::bindings::{access, base, batch, message};
use super::cache::{self, Cache};
use super::compile::{CompileError, Compiler};
use super::engine::Runtime;
use super::host::{HostState, Phase, printable};
use super::lines::Lines;
use super::load::{FILE_BYTES_MAX, Form, Kind, Report};
use super::{Error, Limits, is_step_name};
use crate::step::StepId;
use crate::topic::TopicFilter;

/// CPU time of `describe`.
const DESCRIBE_CPU: Duration = Duration::from_secs(2);
pub(super) const TOPICS_MAX: usize = 1_024;
/// Bytes that `describe` or `init` may give back, in one call, and in each call of the host.
pub(super) const INIT_ANSWER_BYTES_MAX: usize = 1 << 20;
const SCHEMA_BYTES_MAX: usize = 256 << 10;
const VERSION_BYTES_MAX: usize = 64;

/// What a plugin says of itself, once per file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    pub name: String,
    pub version: String,
    pub summary: String,
    /// MQTT filters; empty: every message of the pipeline.
    pub topics: Vec<String>,
    /// JSON Schema, or empty.
    pub config_schema: String,
    pub state_version: u32,
}

/// What `plugin inspect` shows of a file, whether it can run or not.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Inspection {
    pub file: String,
    pub bytes: u64,
    pub sha256: String,
    pub form: Option<Form>,
    pub kind: Option<Kind>,
    pub granted: Vec<String>,
    /// Import and why it is not served.
    pub denied: Vec<(String, String)>,
    pub exports: Vec<String>,
    pub description: Option<Description>,
    /// Why it cannot run here.
    pub problem: Option<String>,
}

/// Where programs come from: an engine, a compiler and a cache, shared.
#[derive(Clone)]
pub(super) struct Library {
    pub runtime: Runtime,
    pub compiler: Compiler,
    pub cache: Option<Cache>,
    linker: Arc<Linker<HostState>>,
}

/// A file that was looked into.
struct Found {
    sha256: String,
    /// In the cache.
    key: String,
    report: Report,
    /// `None` where the report refuses it.
    code: Option<Code>,
}

enum Code {
    Kept(Component, Description, Lines),
    Fresh(Vec<u8>, Lines),
}

/// A component, ready to be instantiated.
pub(super) struct Program {
    pub runtime: Runtime,
    pub pre: InstancePre<HostState>,
    pub exports: Exports,
    pub imports: Vec<String>,
    pub description: Description,
    pub lines: Arc<Lines>,
    pub filters: Vec<TopicFilter>,
    /// SHA-256 of the file.
    pub sha256: String,
}

/// Where the exports are, found once.
#[derive(Clone)]
pub(super) struct Exports {
    pub lifecycle: base::BaseIndices,
    pub process: ProcessIndices,
}

#[derive(Clone)]
pub(super) enum ProcessIndices {
    Batch(batch::OnlyBatchIndices),
    Message(message::OnlyMessageIndices),
    Access(access::OnlyAccessIndices),
}

impl Program {
    /// Returns whether it decides about clients, and is given no messages.
    pub fn is_access(&self) -> bool {
        matches!(self.exports.process, ProcessIndices::Access(_))
    }
}

impl Library {
    pub fn new(compiler: Compiler, cache: Option<Cache>) -> Result<Self, Error> {
        let runtime = Runtime::new().map_err(|error| Error::Engine(format!("{error:#}")))?;
        let linker = linker(runtime.engine()).map_err(|error| Error::Engine(format!("{error:#}")))?;
        Ok(Self { runtime, compiler, cache, linker: Arc::new(linker) })
    }

    /// Checks, compiles (or finds in the cache) and describes a plugin.
    pub fn load(&self, file: &[u8]) -> Result<Program, Error> {
        self.find(file).and_then(|found| self.program(found))
    }

    /// Returns the program of a file, by its SHA-256 in hexadecimal, where the cache has it.
    pub fn kept(&self, sha256: &str) -> Option<Program> {
        let key = cache::key(&cache::unhex(sha256)?, self.runtime.engine());
        let (component, note, lines) = self.cache.as_ref()?.load(&key, self.runtime.engine())?;
        let code = Some(Code::Kept(component, note.description, lines));
        self.program(Found { sha256: sha256.to_owned(), key, report: note.report, code }).ok()
    }

    /// Whether the cache knows a file, so that nothing is compiled for it.
    pub fn knows(&self, file: &[u8]) -> bool {
        let key = cache::key(&Sha256::digest(file), self.runtime.engine());
        self.cache.as_ref().is_some_and(|cache| {
            cache.note_of(&key).is_some() || cache.killed(&key, self.compiler.limits()).is_some()
        })
    }

    /// What the cache or the compiler knows of a file.
    fn find(&self, file: &[u8]) -> Result<Found, Error> {
        let sha256 = Sha256::digest(file);
        let key = cache::key(&sha256, self.runtime.engine());
        let sha256 = cache::hex(&sha256);
        if let Some(cache) = &self.cache {
            if let Some((component, note, lines)) = cache.load(&key, self.runtime.engine()) {
                let code = Some(Code::Kept(component, note.description, lines));
                return Ok(Found { sha256, key, report: note.report, code });
            }
            if let Some(reason) = cache.killed(&key, self.compiler.limits()) {
                return Err(Error::Killed(reason));
            }
        }
        metrics::counter!("headworks_plugin_compiles_total").increment(1);
        let compiled = self.compiler.compile(file).inspect_err(|error| {
            if let Some(cache) = &self.cache
                && error.is_of_the_file()
                && let Err(error) = cache.note_killed(&key, &error.to_string(), self.compiler.limits())
            {
                tracing::warn!(%error, "a plugin ended its compiler, which is not noted: the next start tries it again");
            }
        })?;
        let lines = Lines::read(compiled.lines);
        let code = (!compiled.artifact.is_empty()).then_some(Code::Fresh(compiled.artifact, lines));
        Ok(Found { sha256, key, report: compiled.report, code })
    }

    fn program(&self, found: Found) -> Result<Program, Error> {
        let Found { sha256, key, report, code } = found;
        let kind = report.kind.clone()?;
        let (component, known, fresh, lines) = match code {
            Some(Code::Kept(component, description, lines)) => (component, Some(description), None, lines),
            Some(Code::Fresh(artifact, lines)) => {
                let component = cache::deserialize(self.runtime.engine(), &artifact).map_err(Error::wasm)?;
                (component, None, Some(artifact), lines)
            }
            None => return Err(CompileError::Answer.into()),
        };
        let lines = Arc::new(lines);
        let pre = self.linker.instantiate_pre(&component).map_err(Error::wasm)?;
        let exports = exports(&pre, kind)?;
        let description = match known {
            Some(description) => description,
            None => self.describe(&pre, &exports, &lines)?,
        };
        let filters = check(&description)?;
        if let (Some(cache), Some(artifact)) = (&self.cache, &fresh)
            && let Err(error) = cache.store(&key, artifact, &lines, &report, &description)
        {
            tracing::warn!(%error, "compiled plugin is not kept, the next start compiles it again");
        }
        let runtime = self.runtime.clone();
        Ok(Program { runtime, pre, exports, imports: report.imports, description, lines, filters, sha256 })
    }

    /// Calls `describe` in an instance of its own whose imports trap.
    fn describe(
        &self,
        pre: &InstancePre<HostState>,
        exports: &Exports,
        lines: &Lines,
    ) -> Result<Description, Error> {
        let memory = Limits::default().memory.0 as usize;
        let step = StepId { pipeline: "-".into(), step: "describe".into() };
        let mut store =
            new_store(&self.runtime, HostState::new(step, Arc::default(), Arc::default(), memory));
        store.set_hostcall_fuel(INIT_ANSWER_BYTES_MAX);
        let running = self.runtime.start(&mut store, DESCRIBE_CPU);
        let result = pre.instantiate(&mut store).and_then(|instance| {
            store.data_mut().phase = Phase::Describe;
            let base = exports.lifecycle.load(&mut store, &instance)?;
            base.headworks_plugin_lifecycle().call_describe(&mut store)
        });
        drop(running);
        let raw = result.map_err(|error| {
            let why = super::instance::explain(&error, store.data(), lines, DESCRIBE_CPU, memory);
            Error::Describe(why)
        })?;
        Ok(Description {
            name: raw.name,
            version: raw.version,
            summary: printable(&raw.summary),
            topics: raw.topics,
            config_schema: raw.config_schema,
            state_version: raw.state_version,
        })
    }

    /// Looks at a file without running it in a pipeline. What the cache knows is
    /// taken from there, and nothing is compiled or started for it.
    pub fn inspect(&self, path: &Path) -> Result<Inspection, Error> {
        let file = read(path)?;
        let sha256 = Sha256::digest(&file);
        let mut inspection = Inspection {
            file: path.display().to_string(),
            bytes: file.len() as u64,
            sha256: cache::hex(&sha256),
            ..Inspection::default()
        };
        let key = cache::key(&sha256, self.runtime.engine());
        if let Some(note) = self.cache.as_ref().and_then(|cache| cache.note_of(&key)) {
            inspection.report(&note.report);
            inspection.description = Some(note.description);
            return Ok(inspection);
        }
        let program = self.find(&file).and_then(|found| {
            inspection.report(&found.report);
            self.program(found)
        });
        match program {
            Ok(program) => inspection.description = Some(program.description),
            Err(error) => inspection.problem = Some(error.to_string()),
        }
        Ok(inspection)
    }
}

impl Inspection {
    fn report(&mut self, report: &Report) {
        self.form = report.form;
        (self.granted, self.denied) = report.granted_and_denied();
        self.exports.clone_from(&report.exports);
        self.kind = report.kind.as_ref().ok().copied();
    }
}

/// A file, as much of it as a plugin may have.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let failed = |error| Error::Read { path: path.to_owned(), error };
    let mut bytes = Vec::new();
    // Bounded by what is read: a pipe or a device has no length to ask for.
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(Error::TooLarge { path: path.to_owned() });
    }
    Ok(bytes)
}

pub(super) fn new_store(runtime: &Runtime, state: HostState) -> Store<HostState> {
    let mut store = Store::new(runtime.engine(), state);
    store.limiter(|state| state);
    Runtime::watch(&mut store);
    store
}

fn linker(engine: &Engine) -> wasmtime::Result<Linker<HostState>> {
    let mut linker = Linker::new(engine);
    base::Base::add_to_linker::<_, HasSelf<_>>(&mut linker, |state| state)?;
    Ok(linker)
}

fn exports(pre: &InstancePre<HostState>, kind: Kind) -> Result<Exports, Error> {
    let lifecycle = base::BaseIndices::new(pre).map_err(Error::wasm)?;
    let process = match kind {
        Kind::Batch => batch::OnlyBatchIndices::new(pre).map(ProcessIndices::Batch),
        Kind::Message => message::OnlyMessageIndices::new(pre).map(ProcessIndices::Message),
        Kind::Access => access::OnlyAccessIndices::new(pre).map(ProcessIndices::Access),
    };
    Ok(Exports { lifecycle, process: process.map_err(Error::wasm)? })
}

/// Checks a description and gives its topics as filters.
fn check(description: &Description) -> Result<Vec<TopicFilter>, Error> {
    let bad = |what: String| Err(Error::Describe(what));
    let Description { name, version, topics, config_schema, state_version, .. } = description;
    if !is_step_name(name)
        || name.bytes().any(|b| !(b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'))
    {
        return bad(format!("name \"{}\" must match [a-z0-9-]{{1,64}}", printable(name)));
    }
    if version.len() > VERSION_BYTES_MAX || semver::Version::parse(version).is_err() {
        return bad(format!("version \"{}\" must be semver, such as 1.0.0", printable(version)));
    }
    if *state_version != 0 {
        return bad("state-version must be 0: state is not served by this version of Headworks".into());
    }
    if config_schema.len() > SCHEMA_BYTES_MAX || topics.len() > TOPICS_MAX {
        return bad(format!("at most {TOPICS_MAX} topics and {SCHEMA_BYTES_MAX} bytes of config-schema"));
    }
    filters(topics).map_err(Error::Describe)
}

pub(super) fn filters(topics: &[String]) -> Result<Vec<TopicFilter>, String> {
    topics
        .iter()
        .map(|topic| {
            TopicFilter::new(topic).map_err(|error| format!("topic \"{}\": {error}", printable(topic)))
        })
        .collect()
}
