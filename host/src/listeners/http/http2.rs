//! What HTTP/2 (RFC 9113) adds: its bounds, and the tasks of its requests.
//!
//! A connection carries many requests at a time, so that each bound of HTTP/1.1 that is one a connection is
//! here one a request, and all requests of all connections have a bound together
//! ([`FURTHER_MAX`](super::requests::FURTHER_MAX)). Data that a client sends before anybody reads it lies in
//! the window of its stream; windows of all clients count against one budget ([`window`]). The window of a
//! connection has room for those of all its streams: a request that waits holds up no other.

use std::sync::Arc;
use std::time::Duration;

use hyper::body::Body;
use hyper::rt::Executor;
use hyper::{StatusCode, Version};
use hyper_util::rt::TokioTimer;
use hyper_util::server::conn::auto;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;

use super::answer::{RETRY_AFTER, Refusal};
use super::connection::HEAD_BYTES_MAX;
use crate::listeners::permits::FREE_BYTES;

/// Name of HTTP/2 in the ALPN extension of TLS (RFC 9113, 3.2).
pub const ALPN: &[u8] = b"h2";
/// Bytes of one request's body that are not read yet: the protocol's initial window, so that no client
/// may send more before it has our settings.
pub const WINDOW_BYTES: u32 = 65_535;
/// Bytes of one frame, the least that the protocol allows.
const FRAME_BYTES_MAX: u32 = 16 << 10;
/// Bytes of answers that are on their way to one stream, beside the piece that is next.
const SEND_BYTES_MAX: usize = 16 << 10;
/// Requests that the client reset before they were looked at: one more, and the connection ends
/// (CVE-2023-44487). Those that were are counted by [`Requests`](super::requests::Requests).
const RESET_UNSEEN_MAX: usize = 20;
/// Requests that the client's own errors reset: one more, and the connection ends (CVE-2025-8671).
const RESET_BY_ERRORS_MAX: usize = 64;
/// A client that sends nothing for so long is asked whether it is there.
const PING_AFTER: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 20 });
/// Time within which a client must answer a PING. Otherwise its connection ends.
const PONG_WAIT_MAX: Duration = Duration::from_secs(if cfg!(test) { 5 } else { 20 });
/// The budget of windows counts these.
const WINDOW_UNIT_BYTES: usize = 1 << 10;

/// Runs each request of HTTP/2 as a task that the listener waits for.
#[derive(Clone, Debug)]
pub struct Tasks(pub TaskTracker);

impl<F: Future<Output: Send> + Send + 'static> Executor<F> for Tasks {
    fn execute(&self, request: F) {
        self.0.spawn(request);
    }
}

/// Sets the bounds of a connection that may have `streams_max` requests at a time.
pub fn bound(builder: &mut auto::Builder<Tasks>, streams_max: u32) {
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(streams_max)
        .max_header_list_size(HEAD_BYTES_MAX as u32)
        .max_frame_size(FRAME_BYTES_MAX)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES * streams_max)
        .max_send_buf_size(SEND_BYTES_MAX)
        .max_pending_accept_reset_streams(RESET_UNSEEN_MAX)
        .max_local_error_reset_streams(RESET_BY_ERRORS_MAX)
        .keep_alive_interval(PING_AFTER)
        .keep_alive_timeout(PONG_WAIT_MAX);
}

/// Returns the budget that the windows of all clients share.
pub fn windows(bytes_max: u64) -> Arc<Semaphore> {
    let units = usize::try_from(bytes_max / WINDOW_UNIT_BYTES as u64).unwrap_or(usize::MAX);
    Arc::new(Semaphore::new(units.clamp(1, Semaphore::MAX_PERMITS)))
}

/// Counts what the client may send of a body before it is read. Without room for it the request is refused:
/// nothing holds back what comes.
pub fn window(
    windows: &Arc<Semaphore>,
    version: Version,
    body: &impl Body,
) -> Result<Option<OwnedSemaphorePermit>, Refusal> {
    let most = body.size_hint().upper().unwrap_or(u64::MAX).min(WINDOW_BYTES.into()) as usize;
    if version != Version::HTTP_2 || most <= FREE_BYTES {
        return Ok(None);
    }
    let units = most.div_ceil(WINDOW_UNIT_BYTES) as u32;
    windows.clone().try_acquire_many_owned(units).map(Some).map_err(|_| {
        let reason = "too many requests send their bodies at a time, try again";
        Refusal::new(StatusCode::TOO_MANY_REQUESTS, "busy", reason).retry(RETRY_AFTER)
    })
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http_body_util::{Full, StreamBody};
    use hyper::body::Frame;

    use super::*;

    #[test]
    fn what_clients_may_send_unread_is_counted_for_all_of_them_together() {
        let windows = windows(100 << 10);
        let of = |bytes: usize| window(&windows, Version::HTTP_2, &Full::new(Bytes::from(vec![0; bytes])));
        let unknown = StreamBody::new(futures_util::stream::empty::<Result<Frame<Bytes>, ()>>());
        assert!(of(FREE_BYTES).unwrap().is_none());
        let first = window(&windows, Version::HTTP_2, &unknown).unwrap();
        let second = of(36 << 10).unwrap();
        let refusal = of(5 << 10).unwrap_err();
        assert_eq!((refusal.status, refusal.retry_after), (StatusCode::TOO_MANY_REQUESTS, Some(RETRY_AFTER)));
        assert!(window(&windows, Version::HTTP_11, &unknown).unwrap().is_none(), "its socket holds it back");
        drop(second);
        assert!(of(5 << 10).unwrap().is_some());
        assert!(first.is_some());
    }
}
