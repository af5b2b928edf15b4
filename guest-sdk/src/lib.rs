//! Write a Headworks plugin in Rust: a function of one borrowed message.
//!
//! ```
//! use headworks_guest::prelude::*;
//!
//! /// Sends every reading above `max` to the route `alert`.
//! struct Limits {
//!     max: f64,
//! }
//!
//! impl Plugin for Limits {
//!     fn new(config: &Config, _: &Context) -> Result<Self, Vec<Problem>> {
//!         let mut fields = config.fields();
//!         let limits = Limits { max: fields.f64("max", 30.0) };
//!         fields.finish().map(|()| limits)
//!     }
//!
//!     fn process(&mut self, message: &Message<'_>, out: &mut Output<'_>) -> Verdict {
//!         match message.json("value") {
//!             Ok(Some(value)) if value.as_f64() > Some(self.max) => out.emit().route("alert").verdict(),
//!             Ok(_) => Verdict::Keep,
//!             Err(error) => error.into(),
//!         }
//!     }
//! }
//!
//! headworks_guest::plugin!(Limits);
//! ```
//!
//! [`batch`] reads messages and writes the answer, [`json`] finds and adds
//! fields without a tree, [`config`] reads a step's config, [`time`] reads
//! timestamps. The host shares [`abi`] and [`json`] (no default features).

#![deny(unsafe_code)]

extern crate alloc;

pub mod abi;
pub mod batch;
pub mod config;
pub mod json;
pub mod testing;
pub mod time;
pub mod topic;

#[cfg(feature = "plugin")]
pub mod access;
#[cfg(feature = "plugin")]
#[doc(hidden)]
#[allow(unsafe_code)] // generated: the canonical ABI is pointers and lengths
pub mod bindings;
#[cfg(all(feature = "plugin", feature = "cases"))]
pub mod cases;
#[cfg(feature = "plugin")]
pub mod plugin;
#[cfg(feature = "plugin")]
pub use plugin::{clock, devices, log, metrics};

/// What most plugins need.
#[cfg(feature = "plugin")]
pub mod prelude {
    pub use crate::batch::{Message, Messages, Output, Verdict};
    pub use crate::config::{Config, Problem};
    pub use crate::plugin::{Context, Plugin};
    pub use crate::{clock, devices, json, log, metrics};
}
