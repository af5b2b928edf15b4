//! Health, readiness, metrics and status over HTTP, and sending dead letters again.
//!
//! Serves what it is handed in [`Deps`]; it knows no other part. It listens on loopback
//! only, unless the config says otherwise. What acts, or lists clients, takes the token of
//! this run; a request that a web page made in the user's browser is refused.

pub mod config;
pub mod metrics;
mod problem;
mod routes;
mod server;

use std::sync::Arc;

use async_trait::async_trait;
use metrics_exporter_prometheus::PrometheusHandle;
use serde::{Deserialize, Serialize};

use crate::listeners::mqtt::ClientOrder;

pub use config::Config;
pub use problem::{AtStake, METRICS, PROBLEM_KINDS, Problem, problem_rank};
pub use server::{CONNECTIONS_MAX, Error, Handle, start};

/// Header of every answer, and of requests that are meant for one host only.
pub const INSTANCE: &str = "headworks-instance";

/// What the endpoints show and do. Closures are called at each request: cheap,
/// and they never wait.
#[derive(Clone)]
pub struct Deps {
    /// `/healthz`: why the process should be restarted; `None` while all is well.
    pub unhealthy: Arc<dyn Fn() -> Option<String> + Send + Sync>,
    /// `/readyz`: what acknowledgements of devices need.
    pub ready: Arc<dyn Fn() -> Vec<Component> + Send + Sync>,
    /// `/api/problems`, worst first.
    pub problems: Arc<dyn Fn() -> Vec<Problem> + Send + Sync>,
    /// `/api/status`.
    pub status: Arc<dyn Fn() -> serde_json::Value + Send + Sync>,
    /// `POST /api/dead-letters/redrive`.
    pub redrive: Arc<dyn Redrive>,
    /// `POST /api/clients/list`, `show`, `refused`, `kick` and `delete`.
    pub clients: Arc<dyn Clients>,
    /// Before `/metrics` is shown: sets the gauges that nobody keeps.
    pub measure: Arc<dyn Fn() + Send + Sync>,
    pub prometheus: PrometheusHandle,
    pub process: crate::telemetry::Process,
    pub failures: crate::telemetry::Failures,
    /// Identifies this run of the host.
    pub instance: Arc<str>,
    /// What requests that act show: `Authorization: Bearer TOKEN`.
    pub token: Arc<str>,
}

/// A part of the host and whether it works.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Component {
    /// `stream telemetry`, `sink telemetry/warehouse`
    pub name: String,
    pub ready: bool,
    /// Why not; empty when ready.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

/// Clients of the listeners. Cheap calls; those that end something wait until it has ended, and
/// end it also where their caller waits no longer.
#[async_trait]
pub trait Clients: Send + Sync {
    /// Those that are asked for.
    fn list(&self, request: &ClientListRequest) -> ClientList;

    /// Everything about one, its filters too.
    fn show(&self, client_id: &str) -> Option<serde_json::Value>;

    /// Those that were refused last, newest first, at most `max`.
    fn refused(&self, max: usize) -> ClientList;

    /// Ends the client's connection; false where it has none.
    async fn kick(&self, client_id: &str) -> bool;

    /// Ends the client's session; false where it has none. Waits until that is durable.
    async fn delete(&self, client_id: &str) -> bool;
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientList {
    /// How many there are, listed or not.
    pub found: usize,
    pub clients: Vec<serde_json::Value>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientListRequest {
    #[serde(default)]
    pub prefix: String,
    /// At most 10,000.
    pub max: usize,
    #[serde(default)]
    pub order: ClientOrder,
    /// Lists only ids behind this one, the last of the list before.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub after: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RefusedClientsRequest {
    /// At most 10,000.
    pub max: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientRequest {
    pub client_id: String,
}

/// Sends dead letters again.
#[async_trait]
pub trait Redrive: Send + Sync {
    /// Returns once each letter was written, refused again, or its sink failed.
    async fn redrive(&self, request: RedriveRequest) -> Result<RedriveAnswer, RedriveError>;

    /// Closes letters that nobody will send again. Returns once that is durable.
    async fn discard(&self, request: RedriveRequest) -> Result<DiscardAnswer, RedriveError>;
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiscardAnswer {
    /// Letters that were open.
    pub discarded: u64,
}

/// Which dead letters; conditions add up.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RedriveRequest {
    /// Offsets in the dead letters, at most 1,000; empty: all.
    pub ids: Vec<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pipeline: Option<String>,
    /// Only those that this sink refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sink: Option<String>,
    /// Only those that this step refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
    /// Also those that another copy of the data folder may have sent: their rows may come twice.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub possible_duplicates: bool,
    /// Only those that a step refused. Where the steps that a message has been through do not say where
    /// it enters, it enters at this one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from_step: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RedriveAnswer {
    /// Rows written.
    pub sent: u64,
    /// Rows and messages refused again.
    pub refused: u64,
    /// Letters that all their sinks have.
    #[serde(default)]
    pub letters_sent: u64,
    /// Letters that the same step or sink refused again: they are listed as before.
    #[serde(default)]
    pub letters_refused: u64,
    /// New letters, of messages that another step or sink refused than before.
    #[serde(default)]
    pub letters_new: u64,
    /// Letters that a sink could not take yet; the host sends them at its next start,
    /// or the next redrive does.
    #[serde(default)]
    pub letters_pending: u64,
    /// Letters that another copy of the data folder had sent: nothing was written, and they are closed.
    #[serde(default)]
    pub letters_sent_before: u64,
    /// Letters that another copy of the data folder may have sent, all or in part: they are not sent
    /// unless `possible_duplicates` is set.
    #[serde(default)]
    pub letters_possible_duplicates: u64,
    /// Sinks that could not take theirs, and why: ask again later.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed: Vec<String>,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum RedriveError {
    /// The request names what is not there: 404.
    #[error("{0}")]
    NotFound(String),
    /// Not now: 503.
    #[error("{0}")]
    Unavailable(String),
}

#[cfg(test)]
mod tests;
