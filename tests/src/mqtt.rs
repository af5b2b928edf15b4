//! MQTT 3.1.1 and 5.0 packets by hand: what a publisher needs, cheap enough to
//! be the load generator, and raw enough to send what no client library would.
//! (OASIS MQTT 3.1.1 and 5.0, chapters 2 and 3.)

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    V311,
    V5,
}

pub mod kind {
    pub const CONNACK: u8 = 2;
    pub const PUBLISH: u8 = 3;
    pub const PUBACK: u8 = 4;
    pub const PUBREC: u8 = 5;
    pub const PUBREL: u8 = 6;
    pub const PUBCOMP: u8 = 7;
    pub const SUBACK: u8 = 9;
    pub const PINGRESP: u8 = 13;
    pub const DISCONNECT: u8 = 14;
}

/// CONNECT. A session that is not clean never expires.
pub fn connect(out: &mut Vec<u8>, version: Version, client_id: &str, clean: bool) {
    connect_as(out, version, client_id, clean, None);
}

/// The same with user name and password.
pub fn connect_as(
    out: &mut Vec<u8>,
    version: Version,
    client_id: &str,
    clean: bool,
    user: Option<(&str, &str)>,
) {
    let mut body = Vec::new();
    text(&mut body, "MQTT");
    body.push(if version == Version::V5 { 5 } else { 4 });
    body.push(if clean { 2 } else { 0 } | if user.is_some() { 0xc0 } else { 0 });
    body.extend(60u16.to_be_bytes());
    if version == Version::V5 {
        if clean {
            body.push(0);
        } else {
            // Session Expiry Interval: never.
            body.extend([5, 0x11, 0xff, 0xff, 0xff, 0xff]);
        }
    }
    text(&mut body, client_id);
    if let Some((name, password)) = user {
        text(&mut body, name);
        text(&mut body, password);
    }
    packet(out, 0x10, &body);
}

/// PUBLISH; `packet_id` is not written for QoS 0.
pub fn publish(
    out: &mut Vec<u8>,
    version: Version,
    qos: u8,
    dup: bool,
    topic: &str,
    packet_id: u16,
    payload: &[u8],
) {
    let properties = usize::from(version == Version::V5);
    let length = 2 + topic.len() + if qos > 0 { 2 } else { 0 } + properties + payload.len();
    out.push(0x30 | qos << 1 | u8::from(dup) << 3);
    remaining_length(out, length);
    text(out, topic);
    if qos > 0 {
        out.extend(packet_id.to_be_bytes());
    }
    if properties > 0 {
        out.push(0);
    }
    out.extend(payload);
}

/// SUBSCRIBE to filters, each with its greatest QoS.
pub fn subscribe(out: &mut Vec<u8>, version: Version, packet_id: u16, filters: &[(&str, u8)]) {
    let mut body = packet_id.to_be_bytes().to_vec();
    if version == Version::V5 {
        body.push(0);
    }
    for (filter, qos) in filters {
        text(&mut body, filter);
        body.push(*qos);
    }
    packet(out, 0x82, &body);
}

pub fn pubrel(out: &mut Vec<u8>, packet_id: u16) {
    out.extend([0x62, 2]);
    out.extend(packet_id.to_be_bytes());
}

pub fn disconnect(out: &mut Vec<u8>) {
    out.extend([0xe0, 0]);
}

fn packet(out: &mut Vec<u8>, first: u8, body: &[u8]) {
    out.push(first);
    remaining_length(out, body.len());
    out.extend(body);
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u16).to_be_bytes());
    out.extend(text.as_bytes());
}

fn remaining_length(out: &mut Vec<u8>, mut length: usize) {
    loop {
        let low = (length & 0x7f) as u8;
        length >>= 7;
        out.push(if length > 0 { low | 0x80 } else { low });
        if length == 0 {
            return;
        }
    }
}

/// A packet as it came.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    pub first: u8,
    pub body: &'a [u8],
}

impl Packet<'_> {
    pub fn kind(&self) -> u8 {
        self.first >> 4
    }

    /// Of PUBACK, PUBREC, PUBREL, PUBCOMP.
    pub fn packet_id(&self) -> u16 {
        u16::from_be_bytes([self.body[0], self.body[1]])
    }

    /// Reason code of an ack; MQTT 5 leaves out success.
    pub fn reason(&self) -> u8 {
        self.body.get(2).copied().unwrap_or(0)
    }
}

/// Takes the first whole packet off the front of `input`.
pub fn take<'a>(input: &mut &'a [u8]) -> Option<Packet<'a>> {
    let first = *input.first()?;
    let (mut length, mut at) = (0usize, 1usize);
    loop {
        let byte = *input.get(at)?;
        length |= usize::from(byte & 0x7f) << (7 * (at - 1));
        at += 1;
        if byte & 0x80 == 0 {
            break;
        }
        assert!(at <= 4, "remaining length of more than four bytes");
    }
    let body = input.get(at..at + length)?;
    *input = &input[at + length..];
    Some(Packet { first, body })
}

/// A socket and what came on it but was not taken yet.
#[derive(Debug)]
pub struct Connection {
    pub stream: TcpStream,
    pub session_present: bool,
    buffer: Vec<u8>,
    filled: usize,
}

impl Connection {
    /// Connects and awaits CONNACK.
    pub fn open(addr: SocketAddr, version: Version, client_id: &str, clean: bool) -> std::io::Result<Self> {
        Self::open_as(addr, version, client_id, clean, None)
    }

    /// The same with user name and password.
    pub fn open_as(
        addr: SocketAddr,
        version: Version,
        client_id: &str,
        clean: bool,
        user: Option<(&str, &str)>,
    ) -> std::io::Result<Self> {
        let mut connection = Self::raw(addr)?;
        let mut out = Vec::new();
        connect_as(&mut out, version, client_id, clean, user);
        connection.stream.write_all(&out)?;
        let mut answer = None;
        while answer.is_none() {
            connection.receive(|packet| answer = Some((packet.kind(), packet.body.to_vec())))?;
        }
        match answer {
            Some((kind::CONNACK, body)) if body.len() >= 2 && body[1] == 0 => {
                connection.session_present = body[0] & 1 == 1;
                Ok(connection)
            }
            other => Err(std::io::Error::other(format!("refused: {other:?}"))),
        }
    }

    /// Connects the socket only.
    pub fn raw(addr: SocketAddr) -> std::io::Result<Self> {
        let stream = TcpStream::connect_timeout(&addr, Duration::from_secs(5))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, session_present: false, buffer: vec![0; 64 * 1024], filled: 0 })
    }

    /// Subscribes and awaits SUBACK; an error where a filter is refused.
    pub fn subscribe(&mut self, version: Version, filters: &[(&str, u8)]) -> std::io::Result<()> {
        let mut out = Vec::new();
        subscribe(&mut out, version, 1, filters);
        self.stream.write_all(&out)?;
        let mut answer = None;
        while answer.is_none() {
            self.receive(|packet| answer = (packet.kind() == kind::SUBACK).then(|| packet.body.to_vec()))?;
        }
        let properties = usize::from(version == Version::V5);
        match answer.as_deref().and_then(|body| body.get(2 + properties..)) {
            Some(codes) if codes.len() == filters.len() && codes.iter().all(|code| *code <= 2) => Ok(()),
            other => Err(std::io::Error::other(format!("refused: {other:?}"))),
        }
    }

    /// Tells the broker that this client is there, and awaits its answer.
    pub fn ping(&mut self) -> std::io::Result<()> {
        self.stream.write_all(&[0xc0, 0])?;
        let mut answered = false;
        while !answered {
            self.receive(|packet| answered |= packet.kind() == kind::PINGRESP)?;
        }
        Ok(())
    }

    /// Reads once (blocking, up to the socket's timeout) and hands out every whole packet.
    pub fn receive(&mut self, mut each: impl FnMut(Packet<'_>)) -> std::io::Result<()> {
        if self.filled == self.buffer.len() {
            self.buffer.resize(2 * self.filled, 0);
        }
        let read = self.stream.read(&mut self.buffer[self.filled..])?;
        if read == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        self.filled += read;
        let mut rest = &self.buffer[..self.filled];
        while let Some(packet) = take(&mut rest) {
            each(packet);
        }
        let left = rest.len();
        self.buffer.copy_within(self.filled - left..self.filled, 0);
        self.filled = left;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_publish_is_laid_out_as_the_standard_says() {
        let mut out = Vec::new();
        publish(&mut out, Version::V311, 1, false, "a/b", 10, b"hi");
        assert_eq!(out, [0x32, 9, 0, 3, b'a', b'/', b'b', 0, 10, b'h', b'i']);
        out.clear();
        publish(&mut out, Version::V5, 2, true, "a/b", 10, &[0; 200]);
        assert_eq!(out[..12], [0x3c, 0xd0, 1, 0, 3, b'a', b'/', b'b', 0, 10, 0, 0]);
    }

    #[test]
    fn packets_are_taken_whole_or_not_at_all() {
        let mut input: &[u8] = &[0x40, 2, 0, 7, 0x50, 2, 1];
        let packet = take(&mut input).unwrap();
        assert_eq!((packet.kind(), packet.packet_id(), packet.reason()), (kind::PUBACK, 7, 0));
        assert!(take(&mut input).is_none());
        assert_eq!(input.len(), 3);
    }
}
