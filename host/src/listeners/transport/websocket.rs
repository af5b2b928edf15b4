//! A protocol in WebSocket's binary frames (RFC 6455), as a byte stream in which frame boundaries have
//! no meaning. The listener describes its protocol in [`Settings`].

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use futures_util::{Sink, Stream};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::machine::TryParse;
use tokio_tungstenite::tungstenite::handshake::server::{Request, create_response, write_response};
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message};

use super::Failed;
use super::chunks::{CHUNK_BYTES, Chunks};
use super::origin::Origins;

/// Most bytes of the HTTP request that opens a WebSocket, including headers that proxies add.
const REQUEST_BYTES_MAX: usize = 16 << 10;
/// Size of the read buffer of each connection.
const READ_BUFFER_BYTES: usize = 4 << 10;
/// Most bytes of one outgoing frame.
const WRITE_BYTES_MAX: usize = 64 << 10;
/// Most bytes of frames that the client has not read. If there is no room for another pong, only the
/// last ping is answered (RFC 6455, 5.5.3).
const UNSENT_BYTES_MAX: usize = 2 * WRITE_BYTES_MAX;
/// Stands for any path.
pub const ANY: &str = "*";

/// What is served over WebSocket, and to which clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Name of the protocol, used in the answer to other requests.
    pub protocol: &'static str,
    /// Registered names of the subprotocol (RFC 6455, 1.9), the preferred one first.
    pub subprotocols: &'static [&'static str],
    /// Paths of the URL, or [`ANY`].
    pub paths: Vec<String>,
    /// Web pages that may connect: see [`Origins`].
    pub origins: Vec<String>,
    /// Largest message that a client may send, in one frame or several.
    pub frame_bytes_max: usize,
}

impl Settings {
    /// Returns whether a request for `path` is served. A trailing `/` makes no difference.
    pub fn serves(&self, path: &str) -> bool {
        let cut = |path: &str| path.trim_end_matches('/').to_owned();
        self.paths.iter().any(|known| known == ANY || cut(known) == cut(path))
    }
}

/// The payloads of binary frames as one byte stream.
pub(super) struct Bytes<S> {
    io: WebSocketStream<Chunks<S>>,
    rest: bytes::Bytes,
    /// Whether a frame, whose length was reported to the writer, is not sent yet.
    unsent: bool,
}

/// Answers the HTTP request. The answer to any other request explains what is served here.
pub(super) async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
    mut io: S,
    settings: &Settings,
    origins: Origins<'_>,
) -> Result<Bytes<S>, Failed> {
    let mut input = BytesMut::new();
    let request = loop {
        match Request::try_parse(&input) {
            Ok(Some((len, request))) => {
                input.advance(len);
                break request;
            }
            Ok(None) if input.len() < REQUEST_BYTES_MAX => {}
            Ok(None) => return Err(refuse(&mut io, 431, "the request's headers are too large").await),
            Err(_) => return Err(refuse(&mut io, 400, "not an HTTP GET request").await),
        }
        match io.read_buf(&mut input).await {
            Ok(0) => return Err(Failed::lost(&io::ErrorKind::UnexpectedEof.into())),
            Ok(_) => {}
            Err(error) => return Err(Failed::lost(&error)),
        }
    };
    let path = request.uri().path();
    let Settings { protocol, subprotocols, .. } = settings;
    if !settings.serves(path) {
        let told = format!("{protocol} over WebSocket is at {}", settings.paths.join(", "));
        return Err(refuse(&mut io, 404, &told).await);
    }
    if !request.headers().contains_key("upgrade") {
        let told = format!(
            "this is {protocol} over WebSocket: connect an {protocol} client to ws://HOST:PORT{path}"
        );
        return Err(refuse(&mut io, 426, &told).await);
    }
    if let Err(origin) = origins.check(request.headers()) {
        let told = format!("pages of {origin:?} may not connect: list them in websocket.origins");
        return Err(Failed { cause: "websocket_origin", ..refuse(&mut io, 403, &told).await });
    }
    let mut offered = request.headers().get_all("sec-websocket-protocol").iter();
    let subprotocol = offered.find_map(|offered| {
        let mut names = offered.to_str().ok()?.split(',').map(str::trim);
        names.find_map(|name| subprotocols.iter().copied().find(|known| *known == name))
    });
    let Some(subprotocol) = subprotocol else {
        let name = subprotocols.first().copied().unwrap_or_default();
        let told = format!("ask for the subprotocol {name} (Sec-WebSocket-Protocol: {name})");
        return Err(refuse(&mut io, 400, &told).await);
    };
    let mut response = match create_response(&request) {
        Ok(response) => response,
        Err(error) => return Err(refuse(&mut io, 400, &error.to_string()).await),
    };
    let chosen = subprotocol.parse().expect("our names are header values");
    response.headers_mut().insert("sec-websocket-protocol", chosen);
    let mut answer = Vec::new();
    write_response(&mut answer, &response).expect("memory can be written");
    io.write_all(&answer).await.map_err(|error| Failed::lost(&error))?;
    let limits = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER_BYTES)
        .write_buffer_size(0)
        .max_write_buffer_size(UNSENT_BYTES_MAX)
        .max_frame_size(Some(CHUNK_BYTES))
        .max_message_size(Some(CHUNK_BYTES));
    let io = Chunks::new(io, &input, settings.frame_bytes_max);
    let io = WebSocketStream::from_raw_socket(io, Role::Server, Some(limits)).await;
    Ok(Bytes { io, rest: bytes::Bytes::new(), unsent: false })
}

async fn refuse<S: AsyncRead + AsyncWrite + Unpin>(io: &mut S, status: u16, told: &str) -> Failed {
    let reason = match status {
        403 => "Forbidden",
        404 => "Not Found",
        426 => "Upgrade Required",
        431 => "Request Header Fields Too Large",
        _ => "Bad Request",
    };
    let upgrade =
        if status == 426 { "Connection: upgrade, close\r\nUpgrade: websocket" } else { "Connection: close" };
    let answer = format!(
        "HTTP/1.1 {status} {reason}\r\n{upgrade}\r\nContent-Type: text/plain; charset=utf-8\r\n\
         Content-Length: {}\r\n\r\n{told}\n",
        told.len() + 1
    );
    // The client may be gone: then nobody needs the answer.
    let _ = io.write_all(answer.as_bytes()).await;
    let _ = io.shutdown().await;
    // What it still sends would end the connection before it has read that. The caller bounds the time.
    let mut discarded = io.take(REQUEST_BYTES_MAX as u64);
    let _ = tokio::io::copy(&mut discarded, &mut tokio::io::sink()).await;
    Failed::new("websocket", format!("WebSocket refused with {status}"), told)
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Bytes<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.rest.is_empty() {
            match ready!(Pin::new(&mut self.io).poll_next(cx)) {
                Some(Ok(Message::Binary(payload))) => self.rest = payload,
                // Answered by the library: with a pong, or with a close of its own.
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Close(_) | Message::Frame(_))) => {}
                Some(Ok(Message::Text(_))) => {
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "a text frame")));
                }
                Some(Err(error)) => return Poll::Ready(Err(failed(error))),
                None => return Poll::Ready(Ok(())),
            }
        }
        let len = self.rest.len().min(out.remaining());
        out.put_slice(&self.rest[..len]);
        self.rest.advance(len);
        if self.rest.is_empty() {
            // Not an empty slice of the frame: that would keep its memory.
            self.rest = bytes::Bytes::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Bytes<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        // Not poll_ready: pongs that wait would leave no room for the frame.
        ready!(Pin::new(&mut self.io).poll_flush(cx)).map_err(failed)?;
        let len = bytes.len().min(WRITE_BYTES_MAX);
        let frame = Message::Binary(bytes::Bytes::copy_from_slice(&bytes[..len]));
        Pin::new(&mut self.io).start_send(frame).map_err(failed)?;
        self.unsent = true;
        Poll::Ready(Ok(len))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.unsent {
            ready!(Pin::new(&mut self.io).poll_flush(cx)).map_err(failed)?;
            self.unsent = false;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_close(cx).map_err(failed)
    }
}

fn failed(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        error => io::Error::new(io::ErrorKind::InvalidData, error),
    }
}

#[cfg(test)]
#[path = "websocket_tests.rs"]
mod tests;
