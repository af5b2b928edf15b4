//! Between the generated bindings and [`Plugin`]; used by `plugin!` only.

use alloc::string::ToString;
use alloc::vec::Vec;
use core::cell::RefCell;

pub use crate::bindings::exports::headworks::plugin::lifecycle;
pub use crate::bindings::{self, export_base, only_batch, only_batch::export_only_batch};

use super::entry::{Lists, Lowered};
use super::{Context, Plugin};
use crate::batch::Answer;
use crate::config::{Config, Problem};

/// The one instance of a component.
pub struct Slot<P> {
    running: RefCell<Option<Running<P>>>,
}

struct Running<P> {
    plugin: P,
    namespace: Vec<String>,
    /// Of the last batch: used again for the next one.
    answer: Answer,
    /// Where the host finds it.
    lists: Lists,
}

impl<P: Plugin> Slot<P> {
    #[allow(clippy::new_without_default)]
    pub const fn new() -> Self {
        Self { running: RefCell::new(None) }
    }

    pub fn init(&self, context: lifecycle::Context) -> Result<lifecycle::Ready, Vec<lifecycle::Problem>> {
        let (plugin, context) = start(context, P::new)?;
        let topics = plugin.topics();
        let answer = Answer::new();
        let lists = Lists::of(&answer);
        *self.running.borrow_mut() = Some(Running { plugin, namespace: context.namespace, answer, lists });
        Ok(lifecycle::Ready { topics, extras: Vec::new() })
    }

    /// The answer stays where it is until the next call.
    #[inline]
    pub fn process(&self, batch: &Lowered) -> *const Lists {
        let mut running = self.running.borrow_mut();
        let Running { plugin, namespace, answer, lists } =
            running.as_mut().expect("the host calls init first");
        let messages = batch.messages(namespace);
        // Nothing of the last batch, whatever the plugin's own `process_all` writes.
        answer.clear();
        plugin.begin(&messages);
        plugin.process_all(&messages, answer);
        *lists = Lists::of(answer);
        lists
    }
}

/// What `init` does for any kind of plugin.
pub(crate) fn start<T>(
    context: lifecycle::Context,
    new: fn(&Config, &Context) -> Result<T, Vec<Problem>>,
) -> Result<(T, Context), Vec<lifecycle::Problem>> {
    super::log::install_panic_hook();
    let config = Config::new(context.config);
    let context = Context {
        step: context.step,
        partition: context.partition,
        partitions: context.partitions,
        namespace: context.namespace,
        generation: context.generation,
        seed: context.seed,
        dry_run: context.dry_run,
    };
    match new(&config, &context) {
        Ok(plugin) => Ok((plugin, context)),
        Err(problems) => {
            let problems = problems.into_iter();
            Err(problems.map(|p| lifecycle::Problem { path: p.path, reason: p.reason }).collect())
        }
    }
}

pub fn describe<P: Plugin>(name: &str, version: &str, summary: &str) -> lifecycle::Description {
    lifecycle::Description {
        name: name.replace('_', "-"),
        version: version.to_string(),
        summary: summary.to_string(),
        topics: P::TOPICS.iter().map(|topic| topic.to_string()).collect(),
        config_schema: P::CONFIG_SCHEMA.to_string(),
        state_version: 0,
        extras: Vec::new(),
    }
}
