//! Access plugins: the instances of one file, called for clients that connect.
//!
//! Calls block. An instance that faults or outgrows its memory is replaced; what
//! it knew of exchanges that run goes with it, and they are refused.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use wasmtime::Store;

use super::bindings::access::OnlyAccess;
use super::bindings::base::exports::headworks::plugin::lifecycle::Context;
use super::cache::Cache;
use super::compile::Compiler;
use super::host::{HostState, Telemetry};
use super::instance::{CallLimits, Instance, StartError};
use super::program::{Library, Program};
use super::{Config, Error, Limits, version};
use crate::devices::Devices;
use crate::problems::step_problems;
use crate::step::StepId;
use crate::topic::Namespace;

pub use super::bindings::access::exports::headworks::plugin::access::{Connecting, Decision, Refusal};
pub use super::bindings::access::exports::headworks::plugin::access::{Identity, Question, Rule};
pub use super::bindings::access::headworks::plugin::types::Property;

/// Compiles access plugins.
#[derive(Clone)]
pub struct AccessEngine(Library);

/// A file with its config.
pub struct AccessPlugin {
    program: Arc<Program>,
    step: StepId,
    context: Context,
    limits: Limits,
    telemetry: Arc<Telemetry>,
    slots: Box<[Mutex<Option<Seated>>]>,
    started: AtomicU64,
}

struct Seated {
    instance: Instance,
    number: u64,
}

/// The instance that an exchange goes on with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seat {
    slot: usize,
    number: u64,
}

impl AccessEngine {
    /// `cache_dir` is made, private, if needed; without one nothing is kept.
    pub fn new(config: &Config, cache_dir: Option<&Path>) -> Result<Self, Error> {
        let compiler = Compiler::child(config.compile_cpu_s, config.compile_memory);
        Library::new(compiler, cache_dir.map(Cache::open).transpose()?).map(Self)
    }

    /// Compiles and tries an instance with the config.
    pub fn load(
        &self,
        bytes: &[u8],
        config: &Value,
        limits: Limits,
        instances: usize,
    ) -> Result<AccessPlugin, Error> {
        let program = Arc::new(self.0.load(bytes)?);
        if !program.is_access() {
            return Err(Error::NoAccess);
        }
        let step = StepId { pipeline: "access".into(), step: program.description.name.as_str().into() };
        let plugin = AccessPlugin {
            context: version::context(&step, config, &Namespace::default(), 0),
            program,
            step,
            limits,
            telemetry: Arc::default(),
            slots: (0..instances.max(1)).map(|_| Mutex::default()).collect(),
            started: AtomicU64::new(0),
        };
        let first = plugin.start().map_err(Error::Config)?;
        *lock(&plugin.slots[0]) = Some(first);
        Ok(plugin)
    }
}

impl AccessPlugin {
    pub fn authenticate(&self, who: &Connecting) -> Result<(Decision, Seat), String> {
        let (slot, mut held) = self.free();
        let decision = self.call(&mut held, |access, store| {
            access.headworks_plugin_access().call_authenticate(store, who)
        })?;
        let number = held.as_ref().map_or(0, |seated| seated.number);
        Ok((decision, Seat { slot, number }))
    }

    pub fn go_on(&self, seat: Seat, exchange: u64, data: &[u8]) -> Result<Decision, String> {
        let mut held = lock(&self.slots[seat.slot]);
        if held.as_ref().is_none_or(|seated| seated.number != seat.number) {
            return Err("its instance was replaced while a client was asked".to_owned());
        }
        self.call(&mut held, |access, store| {
            access.headworks_plugin_access().call_continue_authentication(store, exchange, data)
        })
    }

    /// The answers are not checked.
    pub fn authorize(&self, questions: &[Question]) -> Result<Vec<u8>, String> {
        let (_, mut held) = self.free();
        self.call(&mut held, |access, store| {
            access.headworks_plugin_access().call_authorize(store, questions)
        })
    }

    /// One that nobody uses now, if there is one.
    fn free(&self) -> (usize, MutexGuard<'_, Option<Seated>>) {
        let free = self.slots.iter().enumerate().find_map(|(slot, held)| match held.try_lock() {
            Ok(held) => Some((slot, held)),
            Err(TryLockError::Poisoned(held)) => Some((slot, held.into_inner())),
            Err(TryLockError::WouldBlock) => None,
        });
        free.unwrap_or_else(|| (0, lock(&self.slots[0])))
    }

    fn call<T>(
        &self,
        held: &mut Option<Seated>,
        call: impl FnOnce(&OnlyAccess, &mut Store<HostState>) -> wasmtime::Result<T>,
    ) -> Result<T, String> {
        // Taken out, and put back only after a good answer: a fault discards it.
        let mut seated = match held.take() {
            Some(seated) => seated,
            None => self.start()?,
        };
        let limits = CallLimits {
            cpu: Duration::from_millis(self.limits.cpu_ms),
            bytes: self.limits.output_bytes_min.0,
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let answer = seated.instance.decide(now.as_micros() as u64, limits, call)?;
        seated.instance.commit();
        if !seated.instance.is_outgrown() {
            *held = Some(seated);
        }
        Ok(answer)
    }

    fn start(&self) -> Result<Seated, String> {
        let memory = self.limits.memory.0 as usize;
        let started = Instance::start(
            &self.program,
            &self.step,
            &Arc::<Devices>::default(),
            &self.telemetry,
            memory,
            &self.context,
        );
        let (instance, _) = started.map_err(|error| match error {
            StartError::Config(problems) => step_problems(&problems),
            StartError::Fault(reason) => reason,
        })?;
        Ok(Seated { instance, number: self.started.fetch_add(1, Ordering::Relaxed) + 1 })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::super::test_plugins::guarded;
    use super::*;
    use crate::units::ByteSize;

    #[test]
    fn an_access_plugin_that_ends_its_compiler_ends_nothing_else_and_is_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let runs = dir.path().join("runs");
        let script = format!("echo run >> {}; kill -SEGV $$", runs.display());
        let compiler =
            Compiler::child_of("/bin/sh".into(), vec!["-c".into(), script.into()], 60, ByteSize::gib(2));
        let cache = Cache::open(&dir.path().join("cache")).unwrap();
        let engine = AccessEngine(Library::new(compiler, Some(cache)).unwrap());
        for _ in 0..2 {
            let error = engine.load(&guarded(), &Value::Null, Limits::default(), 1).err().unwrap();
            assert!(error.to_string().contains("ended the compiler"), "{error}");
        }
        assert_eq!(std::fs::read_to_string(&runs).unwrap().lines().count(), 1);
    }
}
