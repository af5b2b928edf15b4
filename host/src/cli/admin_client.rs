//! Asks the running host, over its admin address.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::app::run_file;
use crate::config::Config;

const ANSWER_BYTES_MAX: u64 = 16 << 20;

/// `POST path` with a JSON body; the answer's JSON.
pub async fn post<T: DeserializeOwned>(
    config: &Config,
    path: &str,
    body: &impl Serialize,
) -> anyhow::Result<T> {
    // What the running host wrote down, since its port may be any free one.
    let running = run_file::read(&config.data_dir).map(|running| running.admin);
    let address = running.or(config.admin.address()).context("admin.bind is not an address")?;
    let address = reachable(address);
    let mut stream = TcpStream::connect(address).await.with_context(|| {
        format!("no host runs at {address}: start it with `headworks run`, then try again")
    })?;
    let body = serde_json::to_string(body)?;
    let request = format!(
        "POST {path} HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n\
         content-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").with_context(|| {
        format!("{address} does not answer as headworks does: does something else use the port?")
    })?;
    let code = head.split(' ').nth(1).unwrap_or_default();
    if code == "200" {
        return serde_json::from_str(body).with_context(|| format!("cannot read the answer of {address}"));
    }
    let error = serde_json::from_str::<serde_json::Value>(body).ok();
    let error = error.as_ref().and_then(|error| error.get("error")?.as_str()).unwrap_or(body);
    bail!("{error} (the host at {address} answered {code})")
}

/// An address to connect to for one that listens everywhere.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}
