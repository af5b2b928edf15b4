//! The interface between a transport and the listener that it serves.

use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;

use super::{Address, Place, Remote};
use crate::telemetry::Failures;

/// The byte stream of a connection, whatever its layers.
pub trait Io: AsyncRead + AsyncWrite + Unpin + Send + 'static {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> Io for S {}

/// A listener. It serves the connections of its entries, and names what the transport counts, reports
/// and refuses.
pub trait Service: Send + Sync + 'static {
    /// Prefix of its log lines.
    const NAME: &'static str;
    /// The first packet or request of a client, for the log.
    const GREETING: &'static str;

    fn failures(&self) -> &Failures;

    fn shutdown(&self) -> &CancellationToken;

    /// Returns the time limit for PROXY, TLS and WebSocket handshakes together.
    fn handshake_timeout(&self) -> Duration;

    /// Returns whether access control uses all certificates that clients send.
    fn looks_at_certificates(&self) -> bool;

    /// Counts an accepted connection, whatever becomes of it.
    fn accepted(&self);

    /// Counts a connection that ended in its handshake, without a report.
    fn lost(&self, cause: &'static str);

    /// Counts a refused connection, reports it as `kind`, and adds it to the list of refused clients,
    /// with `who` if the client presented a name.
    fn refused(&self, cause: &'static str, kind: &str, who: Option<&str>, address: &Address, detail: &str);

    /// Counts changed certificate files, as `taken` or `refused`. If they are taken, clients that were
    /// admitted with the old ones are checked again.
    fn certificates_changed(&self, outcome: &'static str);

    /// Shows how long the first certificate of a file is valid, negative after its expiry.
    fn show_certificate(&self, file: &Path, seconds_left: f64);

    /// Shows when the first revocation list of a file must be replaced.
    fn show_revocation_list(&self, file: &Path, seconds_left: f64);

    /// Serves one connection until it ends.
    fn serve<I: Io>(
        self: std::sync::Arc<Self>,
        io: I,
        remote: Remote,
        place: Place,
    ) -> impl Future<Output = ()> + Send;
}
