//! One connection: until it is idle for too long, gives its place to another, or the host stops.

use std::convert::Infallible;
use std::future::pending;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::time::{Instant, sleep_until};

use super::Http;
use super::credentials::Client;
use crate::access::Allowance;
use crate::listeners::transport::{Io, Place, Remote};

/// Headers of one request.
pub const HEADERS_MAX: usize = 64;
/// Bytes of the headers of one request, and of what is read ahead of its body.
pub const HEAD_BYTES_MAX: usize = 16 << 10;
/// What the requests of one connection share.
pub struct Connection {
    pub http: Arc<Http>,
    pub remote: Remote,
    place: Place,
    /// Who sent the last request.
    pub client: tokio::sync::Mutex<Option<Client>>,
    pub allowance: Option<Mutex<Box<Allowance>>>,
    /// Requests that are under way, and those of them whose body is there.
    open: AtomicUsize,
    heard: AtomicUsize,
    /// The connection counts as idle from this time on.
    since: Mutex<Instant>,
    has_asked: std::sync::atomic::AtomicBool,
}

/// A request that is under way.
pub struct Open<'c>(&'c Connection);

/// A request that is whole: its connection gives way to no other.
pub struct Heard<'c>(&'c Connection);

impl Connection {
    pub fn begin(&self) -> Open<'_> {
        self.open.fetch_add(1, Ordering::AcqRel);
        self.has_asked.store(true, Ordering::Release);
        Open(self)
    }

    pub fn heard(&self) -> Heard<'_> {
        if self.heard.fetch_add(1, Ordering::AcqRel) == 0 {
            self.place.heard();
        }
        Heard(self)
    }

    pub fn has_asked(&self) -> bool {
        self.has_asked.load(Ordering::Acquire)
    }

    /// When it is idle for too long; `None` while it is not idle.
    fn idle_until(&self) -> Option<Instant> {
        if self.open.load(Ordering::Acquire) > 0 {
            return None;
        }
        let config = &self.http.config;
        let idle_max = if self.has_asked() { config.idle_timeout.0 } else { config.request_timeout.0 };
        Some(*self.since() + idle_max)
    }

    fn since(&self) -> MutexGuard<'_, Instant> {
        self.since.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        *self.0.since() = Instant::now();
        self.0.open.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Drop for Heard<'_> {
    fn drop(&mut self) {
        if self.0.heard.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.place.waits_again();
        }
    }
}

/// Serves one connection to its end.
pub async fn serve<I: Io>(http: Arc<Http>, io: I, remote: Remote, place: Place) {
    http.counters.connections.increment(1.0);
    let allowance = http.access.allowance().map(Mutex::new);
    let connection = Arc::new(Connection {
        http: http.clone(),
        remote,
        place,
        client: tokio::sync::Mutex::default(),
        allowance,
        open: AtomicUsize::new(0),
        heard: AtomicUsize::new(0),
        since: Mutex::new(Instant::now()),
        has_asked: false.into(),
    });
    // Boxed: the buffers of a protocol are large.
    Box::pin(run(&connection, io)).await;
    http.counters.connections.decrement(1.0);
    if !connection.has_asked() {
        http.counters.refused_connect("lost");
    }
}

async fn run<I: Io>(connection: &Arc<Connection>, io: I) {
    let http = &connection.http;
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(http.config.request_timeout.0.max(http.config.idle_timeout.0))
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX);
    let answering = connection.clone();
    let service = service_fn(move |request| {
        let connection = answering.clone();
        async move { Ok::<_, Infallible>(connection.answer(request).await) }
    });
    let mut serving = pin!(builder.serve_connection(TokioIo::new(io), service));
    let mut ends_at: Option<Instant> = None;
    loop {
        let idle_until = connection.idle_until();
        let over = async {
            match (ends_at, idle_until) {
                (Some(until), _) | (None, Some(until)) => sleep_until(until).await,
                // It is looked at again once the request is answered.
                (None, None) => tokio::time::sleep(LOOK_EVERY).await,
            }
        };
        let is_ending = ends_at.is_some();
        let gives_way =
            async { if is_ending { pending().await } else { connection.place.gives_way().await } };
        tokio::select! {
            // A client that breaks off is its own affair.
            _ = serving.as_mut() => return,
            () = gives_way => {
                if connection.open.load(Ordering::Acquire) == 0 {
                    return;
                }
                serving.as_mut().graceful_shutdown();
                ends_at = Some(Instant::now() + http.config.drain_timeout.0);
            }
            () = http.shutdown.cancelled(), if !is_ending => {
                serving.as_mut().graceful_shutdown();
                ends_at = Some(Instant::now() + http.config.drain_timeout.0);
            }
            () = over => {
                if is_ending {
                    return;
                }
                if connection.idle_until().is_some_and(|until| until <= Instant::now()) {
                    serving.as_mut().graceful_shutdown();
                    ends_at = Some(Instant::now() + CLOSE_MAX);
                }
            }
        }
    }
}

/// Between two looks at a connection whose request is under way.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// An idle connection that is told to end has so long to take it.
const CLOSE_MAX: Duration = Duration::from_secs(2);
