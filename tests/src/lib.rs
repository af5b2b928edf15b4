//! What the tests and benchmarks stand on: the real binary, real servers, real
//! clients, each private to one test, on ports that the OS gave out.
//!
//! Blocking on purpose: a test reads as a script. Nothing here retries or
//! polls: a test awaits the event, up to a deadline.

pub mod certificates;
pub mod events;
pub mod folder;
pub mod host;
pub mod http;
pub mod http2;
pub mod influxdb;
pub mod misbehaving;
pub mod moments;
pub mod mosquitto;
pub mod mqtt;
pub mod node;
pub mod packets;
pub mod poster;
pub mod postgres;
pub mod process;
pub mod publisher;
pub mod python;
pub mod scram;
pub mod telemetry;
