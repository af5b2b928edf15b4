//! One connection: until it is idle for too long, gives its place to another, or the host stops.

use std::convert::Infallible;
use std::future::pending;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper::StatusCode;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::time::{Instant, sleep_until};

use super::Http;
use super::answer::{RETRY_AFTER, Refusal};
use super::clients::Clients;
use super::config::Config;
use super::http2::{self, Tasks};
use super::requests::{Open, Requests};
use crate::access::Allowance;
use crate::hints::Hint;
use crate::listeners::transport::{Io, Place, Remote};

/// Name of HTTP/1.1 in the ALPN extension of TLS (RFC 7301, 6).
pub const ALPN: &[u8] = b"http/1.1";
/// Headers of one request.
pub const HEADERS_MAX: usize = 64;
/// Bytes of the headers of one request, and in HTTP/1.1 of what is read ahead of its body.
pub const HEAD_BYTES_MAX: usize = 16 << 10;

/// What the requests of one connection share.
pub struct Connection {
    pub http: Arc<Http>,
    /// The configuration when the connection began.
    pub config: Arc<Config>,
    pub remote: Remote,
    pub clients: Clients,
    pub allowance: Option<Mutex<Box<Allowance>>>,
    pub requests: Requests,
}

impl Connection {
    /// Begins a request whose head has come.
    pub fn begin(self: &Arc<Self>) -> Result<Open, Refusal> {
        Requests::begin(self).ok_or_else(|| {
            let reason = "too many requests at a time, try again";
            Refusal::new(StatusCode::TOO_MANY_REQUESTS, "busy", reason).retry(RETRY_AFTER)
        })
    }

    /// Reports a client whose connection ends for what it does.
    fn report(&self, cause: &'static str, kind: &str) {
        self.http.counters.ended_connection(cause);
        let subject = self.remote.address.ip().to_string();
        let (failures, detail) = (&self.http.failures, self.remote.to_string());
        failures.report_client(kind, &subject, 1, &detail, &failures.hint(Hint::Status));
    }
}

/// Serves one connection to its end.
pub async fn serve<I: Io>(http: Arc<Http>, io: I, remote: Remote, place: Place) {
    http.counters.connections.increment(1.0);
    let allowance = http.access.get().allowance().map(Mutex::new);
    let requests = Requests::new(place);
    let (config, clients) = (http.config(), Clients::default());
    let connection =
        Arc::new(Connection { http: http.clone(), config, remote, clients, allowance, requests });
    // Boxed: the buffers of a protocol are large.
    Box::pin(run(&connection, io)).await;
    http.counters.connections.decrement(1.0);
    if !connection.requests.has_asked() {
        http.counters.refused_connect("lost");
    }
}

/// Reads the version off the first bytes where TLS has not agreed on one (RFC 9113, 3.3: prior knowledge).
fn builder(http: &Http, config: &Config, protocol: Option<&[u8]>) -> auto::Builder<Tasks> {
    let mut builder = auto::Builder::new(Tasks(http.tasks.clone()));
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(config.request_timeout.0.max(config.idle_timeout.0))
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX);
    http2::bound(&mut builder, config.http2_streams_max);
    match protocol {
        Some(http2::ALPN) => builder.http2_only(),
        Some(_) => builder.http1_only(),
        None => builder,
    }
}

async fn run<I: Io>(connection: &Arc<Connection>, io: I) {
    let http = &connection.http;
    let (requests, config) = (&connection.requests, &connection.config);
    let builder = builder(http, config, connection.remote.protocol());
    let answering = connection.clone();
    let service = service_fn(move |request| {
        let connection = answering.clone();
        async move { Ok::<_, Infallible>(connection.answer(request).await) }
    });
    let mut serving = pin!(builder.serve_connection(TokioIo::new(io), service));
    let mut ends_at: Option<Instant> = None;
    loop {
        let end_at = requests.end_at(config.request_timeout.0, config.idle_timeout.0);
        let over = async {
            match (ends_at, end_at) {
                (Some(until), _) => sleep_until(until).await,
                // A request that arrives during this sleep may set an earlier end of the connection.
                (None, Some(until)) => sleep_until(until.min(Instant::now() + config.idle_timeout.0)).await,
                // The end of the connection is computed again once the requests are answered.
                (None, None) => tokio::time::sleep(LOOK_EVERY.min(config.idle_timeout.0)).await,
            }
        };
        let is_ending = ends_at.is_some();
        let stops = async {
            tokio::select! {
                () = http.shutdown.cancelled() => {}
                () = connection.remote.closing.closed() => {}
            }
        };
        let gives_way = async { if is_ending { pending().await } else { requests.give_way().await } };
        tokio::select! {
            // A client that breaks off is its own affair.
            _ = serving.as_mut() => return,
            () = gives_way => {
                if requests.is_none_open() {
                    return;
                }
                serving.as_mut().graceful_shutdown();
                ends_at = Some(Instant::now() + config.drain_timeout.0);
            }
            () = stops, if !is_ending => {
                serving.as_mut().graceful_shutdown();
                ends_at = Some(Instant::now() + http.config().drain_timeout.0);
            }
            () = requests.too_many_resets() => {
                connection.report("resets", "http: connection closed: its client resets its requests");
                return;
            }
            () = over => {
                if is_ending {
                    return;
                }
                let end_at = requests.end_at(config.request_timeout.0, config.idle_timeout.0);
                if end_at.is_some_and(|until| until <= Instant::now()) {
                    if !requests.is_none_open() {
                        connection.report("unread", "http: connection closed: its client does not read the answers");
                    }
                    serving.as_mut().graceful_shutdown();
                    ends_at = Some(Instant::now() + CLOSE_MAX);
                }
            }
        }
    }
}

/// Between two looks at a connection whose requests are under way.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// An idle connection that is told to end has so long to take it.
const CLOSE_MAX: Duration = Duration::from_secs(2);
