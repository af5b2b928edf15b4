//! The admin server: health, readiness, metrics and status over HTTP, and operations on dead letters and
//! clients.
//!
//! It serves what it is given in [`Deps`], and depends on no other part. It listens on loopback only,
//! unless the config says otherwise. Requests that change something or list clients need the token of
//! this run. A request that a web page made in the user's browser is refused.

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

/// What the endpoints show and do. The closures are called for each request; they are cheap and do not
/// block.
#[derive(Clone)]
pub struct Deps {
    /// `/healthz`: why the process should be restarted, or `None` if it is healthy.
    pub unhealthy: Arc<dyn Fn() -> Option<String> + Send + Sync>,
    /// `/readyz`: the components that are needed to acknowledge messages of devices.
    pub ready: Arc<dyn Fn() -> Vec<Component> + Send + Sync>,
    /// `/api/problems`, worst first.
    pub problems: Arc<dyn Fn() -> Vec<Problem> + Send + Sync>,
    /// `/api/status`.
    pub status: Arc<dyn Fn() -> serde_json::Value + Send + Sync>,
    /// `POST /api/dead-letters/redrive`.
    pub redrive: Arc<dyn Redrive>,
    /// `POST /api/clients/list`, `show`, `refused`, `kick` and `delete`.
    pub clients: Arc<dyn Clients>,
    /// Sets the gauges that are not updated continuously, before `/metrics` is rendered.
    pub measure: Arc<dyn Fn() + Send + Sync>,
    pub prometheus: PrometheusHandle,
    pub process: crate::telemetry::Process,
    pub failures: crate::telemetry::Failures,
    /// Identifies this run of the host.
    pub instance: Arc<str>,
    /// Token of requests that change something or list clients: `Authorization: Bearer TOKEN`.
    pub token: Arc<str>,
}

/// A component of the host and whether it is ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Component {
    /// Name, such as `stream telemetry` or `sink telemetry/warehouse`.
    pub name: String,
    pub ready: bool,
    /// Why the component is not ready; empty if it is.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

/// Clients of the listeners. The calls are cheap. Those that end a connection or session wait until it
/// has ended, and end it even if their caller no longer waits.
#[async_trait]
pub trait Clients: Send + Sync {
    /// Returns the requested clients.
    fn list(&self, request: &ClientListRequest) -> ClientList;

    /// Returns all information about one client, including its filters.
    fn show(&self, client_id: &str) -> Option<serde_json::Value>;

    /// Returns the clients that were refused last, newest first, at most `max`.
    fn refused(&self, max: usize) -> ClientList;

    /// Ends the client's connection. Returns false if it has none.
    async fn kick(&self, client_id: &str) -> bool;

    /// Ends the client's session. Returns false if it has none. Waits until the end is durable.
    async fn delete(&self, client_id: &str) -> bool;
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientList {
    /// Number of matching clients, listed or not.
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
    /// Lists only ids after this one, which is the last id of the previous list.
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
    /// Sends dead letters. Returns when each of them was written or rejected again, or its sink failed.
    async fn redrive(&self, request: RedriveRequest) -> Result<RedriveAnswer, RedriveError>;

    /// Closes dead letters without sending them. Returns when that is durable.
    async fn discard(&self, request: RedriveRequest) -> Result<DiscardAnswer, RedriveError>;
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiscardAnswer {
    /// Number of open dead letters that were closed.
    pub discarded: u64,
}

/// Selects dead letters. All given conditions must match.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RedriveRequest {
    /// Offsets in the dead letters, at most 1,000. An empty list selects all.
    pub ids: Vec<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pipeline: Option<String>,
    /// Selects dead letters that this sink rejected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sink: Option<String>,
    /// Selects dead letters that this step rejected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
    /// Also selects dead letters that another copy of the data folder may have sent, whose rows may be
    /// duplicated.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub possible_duplicates: bool,
    /// Selects dead letters of steps. A dead letter for which the passed steps do not determine where it
    /// starts, starts at this step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from_step: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RedriveAnswer {
    /// Number of rows written.
    pub sent: u64,
    /// Number of rows and messages that were rejected again.
    pub refused: u64,
    /// Number of dead letters that all their sinks have received.
    #[serde(default)]
    pub letters_sent: u64,
    /// Number of dead letters that the same step or sink rejected again. They stay listed.
    #[serde(default)]
    pub letters_refused: u64,
    /// Number of new dead letters, for messages that another step or sink rejected than before.
    #[serde(default)]
    pub letters_new: u64,
    /// Number of dead letters that a sink could not take yet. They are sent at the next start of the
    /// host, or by the next redrive.
    #[serde(default)]
    pub letters_pending: u64,
    /// Number of dead letters that another copy of the data folder had sent. Nothing was written, and
    /// they are closed.
    #[serde(default)]
    pub letters_sent_before: u64,
    /// Number of dead letters that another copy of the data folder may have sent, in full or in part.
    /// They are sent only if `possible_duplicates` is set.
    #[serde(default)]
    pub letters_possible_duplicates: u64,
    /// Sinks that could not take their dead letters, with the reason. The request can be repeated later.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed: Vec<String>,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum RedriveError {
    /// The request names something that does not exist: 404.
    #[error("{0}")]
    NotFound(String),
    /// The request cannot be served now: 503.
    #[error("{0}")]
    Unavailable(String),
}

#[cfg(test)]
mod tests;
