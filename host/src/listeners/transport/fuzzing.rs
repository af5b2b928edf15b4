//! Targets of [`crate::fuzzing`]: what comes before a listener's own protocol.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::FutureExt;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf};

use super::config::ProxyProtocol;
use super::origin::Origins;
use super::websocket::{self as framing, Settings};
use super::{Address, Connections, Place, Remote, proxy};

const NOBODY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9);
const REQUEST: &[u8] = b"GET /mqtt HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
    Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
    Sec-WebSocket-Protocol: mqtt\r\n\r\n";

/// A client of this machine, with a place of its own.
pub fn somebody() -> (Remote, Place) {
    let one = Connections::new(1).enter().expect("one is free");
    let (address, entrance, closing) = (Address::Ip(NOBODY), Arc::default(), Arc::default());
    let remote = Remote { address, certificate: None, tls: None, entrance, closing };
    (remote, Place { _connection: one, handshake: None })
}

/// As the MQTT listener has them.
pub fn settings(frame_bytes_max: usize) -> Settings {
    Settings {
        protocol: "MQTT",
        subprotocols: &["mqtt", "mqttv3.1"],
        paths: ["/mqtt", "/", "/ws"].map(str::to_owned).into(),
        origins: Vec::new(),
        frame_bytes_max,
    }
}

/// A header is taken whole, and no byte more.
pub fn proxy_header(data: &[u8]) {
    let config = ProxyProtocol { from: vec!["127.0.0.0/8".parse().expect("a network")] };
    let accept = |mut bytes: &[u8]| {
        let accepted = proxy::accept(&mut bytes, NOBODY, &config).now_or_never().expect("bytes are there");
        accepted.ok().map(|client| (client, bytes.len()))
    };
    let Some((client, left)) = accept(data) else { return };
    let header = &data[..data.len() - left];
    assert_eq!(header.len(), 16 + usize::from(u16::from_be_bytes([header[14], header[15]])));
    assert_eq!(accept(header), Some((client, 0)));
    assert_eq!(accept(&header[..header.len() - 1]), None);
}

/// First byte: bit 0, an upgrade that is right comes in front. Second byte: how
/// the rest is cut.
pub fn websocket(data: &[u8]) {
    let [mode, cut, sent @ ..] = data else { return };
    let upgrade = if mode & 1 == 0 { &[][..] } else { REQUEST };
    let sent = [upgrade, sent].concat();
    let one = heard(&sent, sent.len());
    assert!(one.as_ref().is_none_or(|(heard, _)| heard.len() <= sent.len()));
    assert_eq!(one, heard(&sent, 1 + usize::from(*cut)));
}

/// What comes through a WebSocket, and whether it came to an end without an
/// error; `None` where the handshake failed.
fn heard(sent: &[u8], piece: usize) -> Option<(Vec<u8>, bool)> {
    let io = tokio::io::join(Pieces { rest: sent, piece }, tokio::io::sink());
    let origins = Origins { listed: &[], tls: false };
    async {
        let mut io = framing::accept(io, &settings(1 << 10), origins).await.ok()?;
        let mut heard = Vec::new();
        let mut buffer = [0; 256];
        loop {
            match io.read(&mut buffer).await {
                Ok(0) => return Some((heard, true)),
                Ok(len) => heard.extend_from_slice(&buffer[..len]),
                Err(_) => return Some((heard, false)),
            }
            let _ = io.flush().await;
        }
    }
    .now_or_never()
    .expect("neither side waits")
}

/// Bytes that come at most so many at a time.
struct Pieces<'a> {
    rest: &'a [u8],
    piece: usize,
}

impl AsyncRead for Pieces<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let (now, rest) = self.rest.split_at(self.piece.min(self.rest.len()).min(out.remaining()));
        out.put_slice(now);
        self.rest = rest;
        Poll::Ready(Ok(()))
    }
}
