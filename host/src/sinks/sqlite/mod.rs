//! Rows into a SQLite file: the embedded default, no server needed.
//!
//! A thread of its own holds the connection. Every commit is durable (WAL,
//! `synchronous = FULL`). Times are text such as `2026-02-23 10:00:00.123456Z`:
//! they sort, and SQLite's `datetime('now', '-5 minutes')` compares with them.

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
