//! HTTP/2: Node.js as a client that sends many requests at a time, and frames by hand for clients that
//! misbehave.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Error, ErrorKind, Read, Result, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Deserialize;

use crate::folder::root;
use crate::node;
use crate::process::Process;

/// Only a hung test meets it.
const HUNG_AFTER: Duration = Duration::from_secs(120);

/// The answer to a request.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    id: u64,
    /// 0: there was no answer.
    pub status: u16,
    pub retry_after: Option<String>,
    pub body: String,
}

/// One connection of a Node.js client.
#[derive(Debug)]
pub struct Client {
    shared: Arc<Mutex<Pending>>,
    _process: Process,
}

#[derive(Debug)]
struct Pending {
    /// `None`: the connection has ended.
    input: Option<ChildStdin>,
    answers: HashMap<u64, Sender<Answer>>,
    next: u64,
}

impl Client {
    /// Connects by prior knowledge.
    pub fn plain(addr: SocketAddr) -> Self {
        Self::open(&[&format!("http://{addr}")])
    }

    /// `args`: the URL, and for https the files of the CA, the client's certificate and its key.
    pub fn open(args: &[&str]) -> Self {
        let mut command = node::command();
        command.arg(root().join("tests/clients/http2_client.js")).args(args);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("node is installed");
        let (input, output) = (child.stdin.take(), child.stdout.take().expect("piped"));
        let shared = Arc::new(Mutex::new(Pending { input, answers: HashMap::new(), next: 0 }));
        let reading = shared.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let answer: Answer = serde_json::from_str(&line).expect("an answer");
                if let Some(asked) = lock(&reading).answers.remove(&answer.id) {
                    // Whoever asked may have given up.
                    let _ = asked.send(answer);
                }
            }
            let mut pending = lock(&reading);
            pending.input = None;
            // Whoever waits for an answer is told that there is none.
            pending.answers.clear();
        });
        Self { shared, _process: Process::adopt("node", child) }
    }

    /// Begins a request; the answer comes by what is returned, which fails where there is none.
    pub fn begin(&self, path: &str, headers: &[(&str, &str)], body: &str) -> Receiver<Answer> {
        let (sender, receiver) = channel();
        let headers: serde_json::Map<_, _> =
            headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).into())).collect();
        let mut pending = lock(&self.shared);
        let id = pending.next;
        pending.next += 1;
        let line =
            serde_json::json!({ "id": id, "path": path, "headers": headers, "body": body }).to_string();
        if let Some(input) = &mut pending.input
            && input.write_all((line + "\n").as_bytes()).is_ok()
        {
            pending.answers.insert(id, sender);
        }
        receiver
    }

    /// Returns the answer; an error where there is none.
    pub fn post(&self, path: &str, headers: &[(&str, &str)], body: &str) -> Result<Answer> {
        let answer = self.begin(path, headers, body).recv_timeout(HUNG_AFTER);
        answer.ok().filter(|answer| answer.status > 0).ok_or_else(|| ErrorKind::ConnectionAborted.into())
    }
}

fn lock(pending: &Mutex<Pending>) -> MutexGuard<'_, Pending> {
    pending.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Types of frames (RFC 9113, 6).
pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const CONTINUATION: u8 = 9;
/// Flags of frames.
pub const ACK: u8 = 1;
pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;
/// `:status` 204, in a header block (RFC 7541, appendix A).
pub const NO_CONTENT: u8 = 0x89;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

/// A connection whose frames are written and read by hand.
#[derive(Debug)]
pub struct Frames {
    io: TcpStream,
    next: u32,
}

impl Frames {
    /// Sends the preface and `settings`, each an identifier and its value.
    pub fn open(addr: SocketAddr, settings: &[(u16, u32)], hung_after: Duration) -> Result<Self> {
        let io = TcpStream::connect(addr)?;
        Self::over(io, settings, hung_after)
    }

    pub fn over(mut io: TcpStream, settings: &[(u16, u32)], hung_after: Duration) -> Result<Self> {
        io.set_nodelay(true)?;
        io.set_read_timeout(Some(hung_after))?;
        io.set_write_timeout(Some(hung_after))?;
        io.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")?;
        let mut this = Self { io, next: 1 };
        let payload = settings.iter().flat_map(|(id, value)| {
            id.to_be_bytes().into_iter().chain(value.to_be_bytes()).collect::<Vec<_>>()
        });
        this.send(&frame(SETTINGS, 0, 0, &payload.collect::<Vec<_>>()))?;
        Ok(this)
    }

    pub fn send(&mut self, frames: &[u8]) -> Result<()> {
        self.io.write_all(frames)
    }

    pub fn next_stream(&mut self) -> u32 {
        let stream = self.next;
        self.next += 2;
        stream
    }

    pub fn read(&mut self) -> Result<Frame> {
        let mut head = [0; 9];
        self.io.read_exact(&mut head)?;
        let [a, b, c, kind, flags, stream @ ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        self.io.read_exact(&mut payload)?;
        Ok(Frame { kind, flags, stream: u32::from_be_bytes(stream) & 0x7fff_ffff, payload })
    }

    /// Reads up to a frame of this kind, which is no acknowledgement, and answers settings.
    pub fn find(&mut self, kind: u8) -> Result<Frame> {
        loop {
            let found = self.read()?;
            let is_ack = matches!(found.kind, SETTINGS | PING) && found.flags & ACK != 0;
            if found.kind == SETTINGS && !is_ack {
                // If the connection has ended, the next read returns the reason.
                let _ = self.send(&frame(SETTINGS, ACK, 0, &[]));
            }
            if found.kind == kind && !is_ack {
                return Ok(found);
            }
            if found.kind == GOAWAY {
                return Err(Error::other(format!("GOAWAY {}", reason(&found))));
            }
        }
    }

    /// Posts a message; an error where it is not answered with 204.
    pub fn post(&mut self, path: &str, body: &[u8]) -> Result<()> {
        let stream = self.next_stream();
        let head = frame(HEADERS, END_HEADERS, stream, &head(path));
        self.send(&[head, frame(DATA, END_STREAM, stream, body)].concat())?;
        let answer = self.find(HEADERS)?;
        if (answer.stream, answer.payload.first()) == (stream, Some(&NO_CONTENT)) {
            return Ok(());
        }
        Err(Error::other(format!("{answer:?}")))
    }

    /// Sends until the host ends the connection; returns what the last GOAWAY said, if one came. `frames`
    /// makes what is sent next, `most` times at most.
    pub fn flood(
        mut self,
        most: usize,
        mut frames: impl FnMut(&mut Self) -> Vec<u8>,
    ) -> std::result::Result<Option<Vec<u8>>, &'static str> {
        let mut reader = Self { io: self.io.try_clone().expect("a socket"), next: 0 };
        let reading = std::thread::spawn(move || {
            let mut said = None;
            while let Ok(frame) = reader.read() {
                if frame.kind == GOAWAY {
                    said = Some(frame.payload);
                }
            }
            said
        });
        for _ in 0..most {
            let next = frames(&mut self);
            if self.send(&next).is_err() {
                return Ok(reading.join().expect("the reader"));
            }
        }
        Err("the connection took all of it")
    }
}

/// The reason of a GOAWAY.
pub fn reason(goaway: &Frame) -> u32 {
    u32::from_be_bytes(goaway.payload[4..8].try_into().expect("GOAWAY has a reason"))
}

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let [_, length @ ..] = (payload.len() as u32).to_be_bytes();
    [&length[..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// The header block of a POST.
pub fn head(path: &str) -> Vec<u8> {
    // `:method: POST`, `:scheme: http` (RFC 7541, appendix A); `:path` and `:authority` as they are.
    let mut block = vec![0x83, 0x86];
    block.extend(literal(0x04, path));
    block.extend(literal(0x01, "host"));
    block
}

/// A field whose name stands in the static table, not indexed (RFC 7541, 6.2.2).
pub fn literal(name: u8, value: &str) -> Vec<u8> {
    [&[name], &*length(value.len()), value.as_bytes()].concat()
}

/// A field with a name of its own, not indexed.
pub fn field(name: &str, value: &str) -> Vec<u8> {
    [&[0], &*length(name.len()), name.as_bytes(), &*length(value.len()), value.as_bytes()].concat()
}

/// RFC 7541, 5.1, with a prefix of 7 bits.
fn length(len: usize) -> Vec<u8> {
    if len < 127 {
        return vec![len as u8];
    }
    let (mut rest, mut bytes) = (len - 127, vec![127]);
    while rest >= 128 {
        bytes.push(rest as u8 | 128);
        rest >>= 7;
    }
    bytes.push(rest as u8);
    bytes
}
