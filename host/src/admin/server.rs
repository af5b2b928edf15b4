//! Accepts and serves connections of the admin address until shutdown.

use std::collections::VecDeque;
use std::future::Future;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{self, Next};
use axum::response::Response;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::{Sleep, sleep};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Config, Deps, routes};
use crate::telemetry::Failures;

/// Most connections at a time. For a further connection, the oldest idle one is closed; if all are busy,
/// the new connection waits.
pub const CONNECTIONS_MAX: usize = 64;
/// Time from the start of a connection, or its last answer, to the end of a request's headers. The body
/// may take as long again, and so may sending the answer. The connection of a slower client is closed,
/// so that silent clients cannot keep others from `/healthz`.
const REQUEST_MAX: Duration = Duration::from_secs(30);
/// Pause after a failed accept, which most likely found no free file descriptor.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// Longest interval between two times that histogram samples are folded into buckets.
const UPKEEP_EVERY: Duration = Duration::from_secs(5);
/// Time that clients have at a shutdown.
const CLOSE_MAX: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("admin.bind: \"{0}\" is not an address and port such as 127.0.0.1:8080")]
    Address(String),
    #[error("admin.bind: cannot listen on {address}: {error}; {}", crate::listeners::bind_advice(error))]
    Bind { address: SocketAddr, error: std::io::Error },
}

/// The running server. It ends with the token that was passed to `start`.
#[derive(Debug)]
pub struct Handle {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Handle {
    /// Returns the bound address with its actual port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits until the server has ended, which takes at most two seconds after the shutdown.
    pub async fn closed(self) {
        let _ = self.task.await;
    }
}

/// Starts the server. It listens when this returns, until `shutdown`.
pub async fn start(config: &Config, deps: Deps, shutdown: CancellationToken) -> Result<Handle, Error> {
    let limits = Limits { connections_max: CONNECTIONS_MAX, request_max: REQUEST_MAX };
    start_with(config, deps, shutdown, limits).await
}

#[derive(Clone, Copy)]
pub(super) struct Limits {
    pub connections_max: usize,
    pub request_max: Duration,
}

/// Starts the server with other limits.
pub(super) async fn start_with(
    config: &Config,
    deps: Deps,
    shutdown: CancellationToken,
    limits: Limits,
) -> Result<Handle, Error> {
    let address = config.address().ok_or_else(|| Error::Address(config.bind.clone()))?;
    let failed = |error| Error::Bind { address, error };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let prometheus = deps.prometheus.clone();
    let failures = deps.failures.clone();
    let router = routes::router(deps, &config.names, limits.request_max);
    let task = tokio::spawn(async move {
        let upkeep = async {
            let mut ticks = tokio::time::interval(UPKEEP_EVERY);
            loop {
                ticks.tick().await;
                prometheus.run_upkeep();
            }
        };
        let closed = async {
            shutdown.cancelled().await;
            sleep(CLOSE_MAX).await;
        };
        tokio::select! {
            () = serve(listener, router, limits, &failures, &shutdown) => {}
            () = upkeep => {}
            () = closed => {}
        }
    });
    Ok(Handle { address, task })
}

/// Serves connections. Returns when the last one is closed after the shutdown.
async fn serve(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    failures: &Failures,
    shutdown: &CancellationToken,
) {
    let slots = Arc::new(Semaphore::new(limits.connections_max));
    let connections = TaskTracker::new();
    let mut open: VecDeque<Weak<Client>> = VecDeque::new();
    let accepting = async {
        loop {
            let (stream, _) = accept(|| listener.accept(), ACCEPT_AGAIN_AFTER, failures).await;
            open.retain(|client| client.strong_count() > 0);
            if slots.available_permits() == 0 {
                let mut idle = open.iter().filter_map(Weak::upgrade).filter(|client| client.is_idle());
                idle.next().inspect(|oldest| oldest.closed.cancel());
            }
            let slot = Arc::clone(&slots).acquire_owned().await.expect("the semaphore is never closed");
            let client = Arc::new(Client::default());
            open.push_back(Arc::downgrade(&client));
            let serving = connection(stream, router.clone(), client, limits.request_max, shutdown.clone());
            connections.spawn(async move {
                serving.await;
                drop(slot);
            });
        }
    };
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = accepting => {}
    }
    connections.close();
    connections.wait().await;
}

/// Returns the next connection. A failed accept is reported, and tried again after a pause.
pub(super) async fn accept<T, F: Future<Output = io::Result<T>>>(
    mut accepted: impl FnMut() -> F,
    again_after: Duration,
    failures: &Failures,
) -> T {
    loop {
        match accepted().await {
            Ok(stream) => return stream,
            Err(error) => {
                failures.report("the admin server cannot accept connections", 1, &error.to_string(), "");
                sleep(again_after).await;
            }
        }
    }
}

/// The client of a connection.
#[derive(Default)]
struct Client {
    /// Whether a request of the client is being answered.
    is_served: AtomicBool,
    closed: CancellationToken,
}

impl Client {
    fn is_idle(&self) -> bool {
        !self.is_served.load(Ordering::Acquire) && !self.closed.is_cancelled()
    }

    async fn serve(State(client): State<Arc<Self>>, request: Request, next: Next) -> Response {
        client.is_served.store(true, Ordering::Release);
        let response = next.run(request).await;
        client.is_served.store(false, Ordering::Release);
        response
    }
}

async fn connection(
    stream: TcpStream,
    router: Router,
    client: Arc<Client>,
    request_max: Duration,
    shutdown: CancellationToken,
) {
    let router = router.layer(middleware::from_fn_with_state(client.clone(), Client::serve));
    let stream = Patient { stream, patience: request_max, waiting: None };
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(request_max)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut connection = std::pin::pin!(connection);
    // A client that breaks off is its own affair.
    tokio::select! {
        _ = connection.as_mut() => return,
        () = client.closed.cancelled() => return,
        () = shutdown.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await;
}

/// A connection whose client must take each answer within a time limit. After that, writes fail with
/// `TimedOut`.
struct Patient {
    stream: TcpStream,
    patience: Duration,
    /// Timer that runs since a part of an answer could not be written.
    waiting: Option<Pin<Box<Sleep>>>,
}

impl Patient {
    fn or_end<T>(&mut self, done: Poll<io::Result<T>>, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        if done.is_ready() {
            return done;
        }
        let patience = self.patience;
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(sleep(patience)));
        waiting.as_mut().poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Patient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Patient {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.or_end(done, cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.stream).poll_write_vectored(cx, parts);
        self.or_end(done, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// Marks the answer as sent: this is called once all of it was written.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.waiting = None;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
