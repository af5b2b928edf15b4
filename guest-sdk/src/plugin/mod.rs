//! A plugin as its author sees it, and how it becomes a component.

pub mod clock;
pub mod devices;
#[doc(hidden)]
#[allow(unsafe_code)] // the canonical ABI is pointers and lengths
pub mod entry;
#[doc(hidden)]
pub mod exports;
pub mod log;
pub mod metrics;

use alloc::string::String;
use alloc::vec::Vec;

use crate::batch::{Answer, Message, Messages, Output, Verdict, run};
use crate::config::{Config, Problem};

/// A batch plugin. Name, version and summary are those of its Cargo package.
pub trait Plugin: Sized {
    /// MQTT filters of the topics it wants to see; empty for all of its pipeline.
    const TOPICS: &'static [&'static str] = &[];
    /// JSON Schema of its config; empty for none.
    const CONFIG_SCHEMA: &'static str = "";

    /// Once per instance, before any message, and to validate a config. Same
    /// config, same answer. Metrics are registered here.
    fn new(config: &Config, context: &Context) -> Result<Self, Vec<Problem>>;

    /// Topics narrowed by config; none keeps [`Self::TOPICS`].
    fn topics(&self) -> Option<Vec<String>> {
        None
    }

    /// Before the messages of a batch: a place to look things up for all of them.
    fn begin(&mut self, messages: &Messages<'_>) {
        let _ = messages;
    }

    /// The verdict for one message; new messages are made with [`Output::emit`].
    fn process(&mut self, message: &Message<'_>, out: &mut Output<'_>) -> Verdict;

    /// The answer to a batch: [`Self::process`] for each message. To be replaced
    /// where what a plugin does is chosen once a batch, not for each message:
    /// [`run`] with the function chosen.
    #[inline(always)]
    fn process_all(&mut self, messages: &Messages<'_>, answer: &mut Answer) {
        run(messages, answer, |message, out| self.process(message, out));
    }
}

/// What an instance knows about its place.
#[derive(Clone, Debug, Default)]
pub struct Context {
    /// `pipeline/step`: the identity of this use of the plugin.
    pub step: String,
    pub partition: u32,
    pub partitions: u32,
    /// Field names of the topic pattern by level.
    pub namespace: Vec<String>,
    pub generation: u64,
    /// For hash maps and sampling: the same again on replay.
    pub seed: u64,
    /// True while a config is only validated.
    pub dry_run: bool,
}

/// Makes a component of a type that is a [`Plugin`]: once per crate, which has
/// `crate-type = ["cdylib", "rlib"]`. Does nothing in a native build.
#[macro_export]
macro_rules! plugin {
    ($plugin:ty) => {
        // Natively, for tests: it is used, if only so that it is not reported as dead.
        #[cfg(not(target_family = "wasm"))]
        const _: fn(
            &$crate::config::Config,
            &$crate::plugin::Context,
        ) -> Result<$plugin, Vec<$crate::config::Problem>> = <$plugin as $crate::plugin::Plugin>::new;

        #[cfg(target_family = "wasm")]
        const _: () = {
            use $crate::batch::Header;
            use $crate::plugin::{entry, exports};

            ::std::thread_local! {
                static RUNNING: exports::Slot<$plugin> = const { exports::Slot::new() };
            }

            struct Component;

            impl exports::lifecycle::Guest for Component {
                fn describe() -> exports::lifecycle::Description {
                    exports::describe::<$plugin>(
                        env!("CARGO_PKG_NAME"),
                        env!("CARGO_PKG_VERSION"),
                        env!("CARGO_PKG_DESCRIPTION"),
                    )
                }

                fn init(
                    context: exports::lifecycle::Context,
                ) -> Result<exports::lifecycle::Ready, Vec<exports::lifecycle::Problem>> {
                    RUNNING.with(|slot| slot.init(context))
                }
            }

            // `batch.process`, in the names and types of the canonical ABI.
            #[unsafe(export_name = "headworks:plugin/batch@1.0.0#process")]
            unsafe extern "C" fn process(
                stride: u32,
                partition: u32,
                flags: u32,
                attempt: u32,
                base_offset: u64,
                now_us: u64,
                watermark_us: i64,
                index: *mut u8,
                index_len: usize,
                data: *mut u8,
                data_len: usize,
                has_later: u32,
                later: *mut entry::Bytes,
                later_len: usize,
            ) -> *const entry::Lists {
                let header = Header { stride, partition, flags, attempt, base_offset, now_us, watermark_us };
                // SAFETY: the host's arguments, as they came.
                let batch = unsafe {
                    entry::Lowered {
                        header,
                        index: entry::Bytes::new(index, index_len),
                        data: entry::Bytes::new(data, data_len),
                        later: entry::Lowered::later(has_later, later, later_len),
                    }
                };
                RUNNING.with(|slot| slot.process(&batch))
            }

    exports::export_base!(Component with_types_in exports::bindings);
    exports::export_only_batch!(Component with_types_in exports::only_batch);
        };
    };
}
