//! What a transport needs of the listener whose connections it brings.

use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;

use super::{Address, Place, Remote};
use crate::telemetry::Failures;

/// A connection's bytes, whatever layers they came through.
pub trait Io: AsyncRead + AsyncWrite + Unpin + Send + 'static {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> Io for S {}

/// A listener: serves the connections of its entries, and has names of its own for all that a
/// transport counts, tells and refuses.
pub trait Service: Send + Sync + 'static {
    /// Name in front of its lines in the log.
    const NAME: &'static str;
    /// What a client sends first, for the log.
    const GREETING: &'static str;

    fn failures(&self) -> &Failures;

    fn shutdown(&self) -> &CancellationToken;

    /// Bound of PROXY, TLS and WebSocket together.
    fn handshake_timeout(&self) -> Duration;

    /// Whether access control looks at all that a client shows in TLS.
    fn looks_at_certificates(&self) -> bool;

    /// Counts a connection, whatever becomes of it.
    fn accepted(&self);

    /// Counts a connection that ended in its handshake and of which there is nothing to tell.
    fn lost(&self, cause: &'static str);

    /// Counts a connection that is not served, reports it as `kind`, and lists it: `who` where the
    /// client showed who it is.
    fn refused(&self, cause: &'static str, kind: &str, who: Option<&str>, address: &Address, detail: &str);

    /// Counts changed certificate files: `taken` or `refused`. Where they are taken, who was let in by
    /// the old ones is looked at again.
    fn certificates_changed(&self, outcome: &'static str);

    /// Shows how long the first certificate of a file is valid, negative once it is not.
    fn show_certificate(&self, file: &Path, seconds_left: f64);

    /// Shows when the first revocation list of a file is to be replaced.
    fn show_revocation_list(&self, file: &Path, seconds_left: f64);

    /// Serves one connection to its end.
    fn serve<I: Io>(
        self: std::sync::Arc<Self>,
        io: I,
        remote: Remote,
        place: Place,
    ) -> impl Future<Output = ()> + Send;
}
