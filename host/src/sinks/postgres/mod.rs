//! Rows into PostgreSQL, by binary COPY, in one transaction with their position.
//!
//! Measured against UNNEST, multi-row INSERT and a temporary table: COPY is the
//! fastest way in. What COPY cannot do (`on_conflict`, views, types without a
//! binary form, isolating a bad row) goes through a temporary table.

mod blocked;
mod check;
mod config;
mod connect;
mod encode;
mod error;
mod positions;
mod schema;
#[cfg(test)]
pub(crate) mod server;
mod sink;
mod stage;
mod table;
#[cfg(test)]
mod tests;
mod tls;
mod transaction;
mod verify;
mod young;

pub use check::check;
pub use config::{Config, Hypertable, SslMode, Tls, Url};
pub use sink::PostgresSink;
