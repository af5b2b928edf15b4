//! Writes rows to a SQLite file. This is the embedded default, which needs no server.
//!
//! A separate thread holds the connection. Every commit is durable (WAL, `synchronous = FULL`). Times
//! are text such as `2026-02-23 10:00:00.123456Z`, which can be sorted, and compared with SQLite's
//! `datetime('now', '-5 minutes')`.

mod check;
mod config;
mod connection;
mod positions;
mod sink;
mod table;
#[cfg(test)]
mod tests;
mod values;

pub use check::check;
pub use config::Config;
pub use sink::SqliteSink;
