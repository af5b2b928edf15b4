//! Rows into PostgreSQL, by binary COPY, in one transaction with their position.
//!
//! Measured against UNNEST, multi-row INSERT and a temporary table: COPY is the
//! fastest way in. Where the table has a unique key, COPY goes into a temporary
//! table first, then `INSERT .. ON CONFLICT DO NOTHING`.

mod config;
mod encode;
mod error;
mod positions;
mod schema;
#[cfg(test)]
pub(crate) mod server;
mod sink;
#[cfg(test)]
mod tests;
mod tls;

pub use config::{Config, Hypertable, Password, SslMode, Tls, Url};
pub use sink::PostgresSink;
