//! Points into InfluxDB, or a store that takes its line protocol, by HTTP.
//!
//! The store has no transactions: [`Journaled`](super::Journaled) keeps the positions. A point is named by
//! its series and its time, so that one that comes again takes the place of the one that is there; `spread`
//! puts the identity of the message into the digits of the time that the message does not have.

mod config;
mod line;
mod points;
mod service;
mod target;
#[cfg(test)]
mod tests;

pub use config::Config;
