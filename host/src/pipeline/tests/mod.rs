//! What a pipeline promises, on memory streams and sinks.

mod copies;
mod delivery;
mod derived;
mod exactly_once;
pub(crate) mod harness;
mod lanes;
mod letters;
mod names;
mod positions;
mod redrive;
mod redrive_routes;
mod redrive_steps;
mod restored;
mod swap;
mod through;
mod versions;
mod waiting_steps;
mod writer;
