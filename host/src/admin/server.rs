//! Binding, serving and ending.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::serve::Listener;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{Config, Deps, routes};

/// Connections at once; more wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 64;
/// Histogram samples are folded into buckets at least this often.
const UPKEEP_EVERY: Duration = Duration::from_secs(5);
/// What clients get at a shutdown.
const CLOSE_MAX: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("admin.bind: \"{0}\" is not an address and port such as 127.0.0.1:8080")]
    Address(String),
    #[error("admin.bind: cannot listen on {address}: {error}: free the port, or set admin.bind to another")]
    Bind { address: SocketAddr, error: std::io::Error },
}

/// The running server; ends with the token that `start` got.
#[derive(Debug)]
pub struct Handle {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Handle {
    /// Where it listens, the port filled in.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns when it ended, at most two seconds after the shutdown.
    pub async fn closed(self) {
        let _ = self.task.await;
    }
}

/// Listens from the moment it returns, until `shutdown`.
pub async fn start(config: &Config, deps: Deps, shutdown: CancellationToken) -> Result<Handle, Error> {
    let address = config.address().ok_or_else(|| Error::Address(config.bind.clone()))?;
    let failed = |error| Error::Bind { address, error };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let prometheus = deps.prometheus.clone();
    let router = routes::router(deps, address);
    let listener = Limited { listener, slots: Arc::new(Semaphore::new(CONNECTIONS_MAX)) };
    let task = tokio::spawn(async move {
        let serve = axum::serve(listener, router).with_graceful_shutdown(shutdown.clone().cancelled_owned());
        let upkeep = async {
            let mut ticks = tokio::time::interval(UPKEEP_EVERY);
            loop {
                ticks.tick().await;
                prometheus.run_upkeep();
            }
        };
        let closed = async {
            shutdown.cancelled().await;
            tokio::time::sleep(CLOSE_MAX).await;
        };
        tokio::select! {
            ended = serve.into_future() => {
                if let Err(error) = ended {
                    tracing::warn!(%error, "admin server ended");
                }
            }
            () = upkeep => {}
            () = closed => {}
        }
    });
    Ok(Handle { address, task })
}

/// A listener with at most [`CONNECTIONS_MAX`] connections.
struct Limited {
    listener: TcpListener,
    slots: Arc<Semaphore>,
}

impl Listener for Limited {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        let slot = self.slots.clone().acquire_owned().await.expect("the semaphore is never closed");
        let (stream, peer) = Listener::accept(&mut self.listener).await;
        (Connection { stream, _slot: slot }, peer)
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// Gives its slot back when it is dropped.
struct Connection {
    stream: TcpStream,
    _slot: OwnedSemaphorePermit,
}

mod io {
    use std::io;
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

    use super::Connection;

    impl AsyncRead for Connection {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Pin::new(&mut self.stream).poll_read(cx, buf)
        }
    }

    impl AsyncWrite for Connection {
        fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            Pin::new(&mut self.stream).poll_write(cx, buf)
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.stream).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.stream).poll_shutdown(cx)
        }
    }
}
