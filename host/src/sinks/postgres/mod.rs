//! Writes rows to PostgreSQL with binary COPY, in one transaction with their position.
//!
//! In measurements, COPY was faster than UNNEST, multi-row INSERT and a temporary table. What COPY
//! cannot do (`on_conflict`, views, types without a binary form, isolating a bad row) uses a temporary
//! table.

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
