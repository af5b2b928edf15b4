//! HTTP/1.1 over a plain socket: single requests, and posts on a connection that is kept.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Status and body of a GET; an error where nobody answers.
pub fn get(addr: SocketAddr, path: &str) -> std::io::Result<(u16, String)> {
    ask(addr, "GET", path, "")
}

/// The same of a POST.
pub fn post(addr: SocketAddr, path: &str, body: &str) -> std::io::Result<(u16, String)> {
    ask(addr, "POST", path, &format!("Content-Length: {}\r\n\r\n{body}", body.len()))
}

/// `rest`: further headers and the body.
fn ask(addr: SocketAddr, method: &str, path: &str, rest: &str) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&addr, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let rest = if rest.is_empty() { "\r\n" } else { rest };
    write!(stream, "{method} {path} HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n{rest}")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    let bad = || std::io::Error::new(std::io::ErrorKind::InvalidData, format!("not HTTP: {answer:?}"));
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(bad)?;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or_else(bad)?;
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    Ok((status, if chunked { unchunk(body) } else { body.to_owned() }))
}

/// A connection that is kept for the next request.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    input: Vec<u8>,
}

impl Connection {
    pub fn open(addr: SocketAddr, read_max: Duration) -> std::io::Result<Self> {
        let stream = TcpStream::connect(addr)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(read_max))?;
        Ok(Self { stream, input: Vec::new() })
    }

    /// Status and body of the answer; an error where there is none.
    pub fn post(
        &mut self,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> std::io::Result<(u16, String)> {
        let mut request = format!("POST {path} HTTP/1.1\r\nHost: host\r\nContent-Length: {}\r\n", body.len());
        for (name, value) in headers {
            request += &format!("{name}: {value}\r\n");
        }
        request += "\r\n";
        self.stream.write_all(&[request.as_bytes(), body].concat())?;
        let end = loop {
            match self.input.windows(4).position(|four| four == b"\r\n\r\n") {
                Some(at) => break at + 4,
                None => self.read()?,
            }
        };
        let head = String::from_utf8_lossy(&self.input[..end]).to_ascii_lowercase();
        let bad = || std::io::Error::new(std::io::ErrorKind::InvalidData, format!("not HTTP: {head:?}"));
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or_else(bad)?;
        let length = head.split("content-length: ").nth(1).and_then(|rest| rest.split("\r\n").next());
        let length: usize = length.map_or(Ok(0), str::parse).map_err(|_| bad())?;
        while self.input.len() < end + length {
            self.read()?;
        }
        let body = String::from_utf8_lossy(&self.input[end..end + length]).into_owned();
        self.input.drain(..end + length);
        Ok((status, body))
    }

    fn read(&mut self) -> std::io::Result<()> {
        let mut bytes = [0; 4096];
        match self.stream.read(&mut bytes)? {
            0 => Err(std::io::ErrorKind::UnexpectedEof.into()),
            len => {
                self.input.extend_from_slice(&bytes[..len]);
                Ok(())
            }
        }
    }
}

fn unchunk(mut body: &str) -> String {
    let mut text = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let Ok(size) = usize::from_str_radix(size.trim(), 16) else { break };
        if size == 0 || rest.len() < size {
            break;
        }
        text.push_str(&rest[..size]);
        body = rest[size..].trim_start_matches("\r\n");
    }
    text
}
