//! Writes points over HTTP to InfluxDB, or to a store that accepts its line protocol.
//!
//! The store has no transactions, so [`Journaled`](super::Journaled) keeps the positions. A point is
//! identified by its series and its time, so a point that is written again replaces itself. `spread`
//! puts the identity of the message into digits of the time that the message does not use.

mod config;
mod line;
mod points;
mod service;
mod target;
#[cfg(test)]
mod tests;

pub use config::Config;
