//! Headworks receives messages from devices, runs each through sandboxed WebAssembly plugins, and
//! writes batches of rows to databases. `ARCHITECTURE.md` describes the structure of the code.

pub mod access;
pub mod admin;
pub mod app;
pub mod batch;
pub mod cli;
pub mod config;
pub mod devices;
mod files;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod hints;
mod http_client;
pub mod ingest;
pub mod listeners;
pub mod patience;
pub mod pipeline;
pub mod plugin;
pub mod problems;
pub mod properties;
mod room;
pub mod sinks;
pub mod step;
pub mod stream;
pub mod telemetry;
pub mod threads;
pub mod topic;
mod trust;
pub mod units;
pub mod yaml;
