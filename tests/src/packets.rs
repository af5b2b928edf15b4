//! MQTT packets from their parts, the forbidden ones too, and a client that
//! takes one packet at a time: what tests of the protocol itself are written
//! with. (OASIS MQTT 3.1.1 and 5.0, chapters 2 and 3.)

use std::io::Write;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::host::Host;
use crate::mqtt::{self, Connection, Version, kind};

/// Only a hung test meets it.
const HUNG_AFTER: Duration = Duration::from_secs(30);
pub const PINGREQ: [u8; 2] = [0xc0, 0];
const PINGRESP: u8 = 0xd0;

/// A name that no other test of this process uses.
pub fn unique(what: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{what}-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// First byte, remaining length, body.
pub fn packet(first: u8, body: &[&[u8]]) -> Vec<u8> {
    let body = body.concat();
    let mut out = vec![first];
    out.extend(var_int(body.len()));
    out.extend(body);
    out
}

pub fn var_int(mut value: usize) -> Vec<u8> {
    let mut out = Vec::new();
    loop {
        let low = (value & 0x7f) as u8;
        value >>= 7;
        out.push(if value > 0 { low | 0x80 } else { low });
        if value == 0 {
            return out;
        }
    }
}

/// A text or binary field: two bytes of length, then the bytes.
pub fn field(bytes: impl AsRef<[u8]>) -> Vec<u8> {
    let bytes = bytes.as_ref();
    let len = u16::try_from(bytes.len()).expect("a field holds at most 65535 bytes");
    [&len.to_be_bytes(), bytes].concat()
}

/// A user property.
pub fn user(name: &str, value: &str) -> Vec<u8> {
    [vec![0x26], field(name), field(value)].concat()
}

/// Properties behind their length; nothing for MQTT 3.1.1.
fn properties(version: Version, properties: &[u8]) -> Vec<u8> {
    match version {
        Version::V311 => Vec::new(),
        Version::V5 => [&var_int(properties.len()), properties].concat(),
    }
}

/// CONNECT. The flags follow from the fields; `flip` changes them afterwards.
#[derive(Clone, Debug)]
pub struct Connect {
    pub version: Version,
    pub name: &'static str,
    pub level: u8,
    pub clean: bool,
    pub flip: u8,
    pub keep_alive: u16,
    pub properties: Vec<u8>,
    pub client_id: Vec<u8>,
    pub will: Option<Will>,
    pub username: Option<Vec<u8>>,
    pub password: Option<Vec<u8>>,
}

#[derive(Clone, Debug)]
pub struct Will {
    pub qos: u8,
    pub retain: bool,
    pub properties: Vec<u8>,
    pub topic: Vec<u8>,
    pub payload: Vec<u8>,
}

impl Will {
    pub fn new(topic: &str, qos: u8) -> Self {
        let (topic, payload) = (topic.into(), b"gone".into());
        Self { qos, retain: false, properties: Vec::new(), topic, payload }
    }
}

impl Connect {
    /// Clean, with the longest keep alive.
    pub fn new(version: Version, client_id: &str) -> Self {
        Self {
            version,
            name: "MQTT",
            level: if version == Version::V5 { 5 } else { 4 },
            clean: true,
            flip: 0,
            keep_alive: u16::MAX,
            properties: Vec::new(),
            client_id: client_id.into(),
            will: None,
            username: None,
            password: None,
        }
    }

    /// Not clean; MQTT 5 sessions are kept for ten minutes.
    pub fn resuming(version: Version, client_id: &str) -> Self {
        let properties = if version == Version::V5 { vec![0x11, 0, 0, 2, 0x58] } else { Vec::new() };
        Self { clean: false, properties, ..Self::new(version, client_id) }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut flags = u8::from(self.clean) << 1;
        let mut payload = field(&self.client_id);
        if let Some(will) = &self.will {
            flags |= 4 | will.qos << 3 | u8::from(will.retain) << 5;
            payload.extend(properties(self.version, &will.properties));
            payload.extend(field(&will.topic));
            payload.extend(field(&will.payload));
        }
        for (bit, bytes) in [(0x80, &self.username), (0x40, &self.password)] {
            if let Some(bytes) = bytes {
                flags |= bit;
                payload.extend(field(bytes));
            }
        }
        packet(
            0x10,
            &[
                &field(self.name),
                &[self.level, flags ^ self.flip],
                &self.keep_alive.to_be_bytes(),
                &properties(self.version, &self.properties),
                &payload,
            ],
        )
    }
}

/// PUBLISH, both ways. With QoS 0 the packet id is not written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publish {
    pub qos: u8,
    pub retain: bool,
    pub dup: bool,
    pub topic: String,
    pub packet_id: u16,
    /// Without their length.
    pub properties: Vec<u8>,
    pub payload: Vec<u8>,
}

impl Publish {
    pub fn new(topic: &str, qos: u8, packet_id: u16, payload: &str) -> Self {
        let (topic, payload) = (topic.into(), payload.into());
        Self { qos, retain: false, dup: false, topic, packet_id, properties: Vec::new(), payload }
    }

    pub fn retained(self) -> Self {
        Self { retain: true, ..self }
    }

    pub fn dup(self) -> Self {
        Self { dup: true, ..self }
    }

    pub fn with(self, properties: impl Into<Vec<u8>>) -> Self {
        Self { properties: properties.into(), ..self }
    }

    pub fn bytes(&self, version: Version) -> Vec<u8> {
        let first = 0x30 | u8::from(self.dup) << 3 | self.qos << 1 | u8::from(self.retain);
        let id = self.packet_id.to_be_bytes();
        let id: &[u8] = if self.qos > 0 { &id } else { &[] };
        packet(first, &[&field(&self.topic), id, &properties(version, &self.properties), &self.payload])
    }

    /// The PUBLISH that came as `packet`.
    pub fn read(version: Version, packet: &Packet) -> Self {
        let mut rest = &packet.body[..];
        let topic = take_field(&mut rest);
        let qos = packet.first >> 1 & 3;
        let packet_id =
            if qos > 0 { u16::from_be_bytes([take(&mut rest, 1)[0], take(&mut rest, 1)[0]]) } else { 0 };
        let len = if version == Version::V5 { take_var_int(&mut rest) } else { 0 };
        let properties = take(&mut rest, len).to_vec();
        Self {
            qos,
            retain: packet.first & 1 != 0,
            dup: packet.first & 8 != 0,
            topic: String::from_utf8(topic.to_vec()).expect("topics are UTF-8"),
            packet_id,
            properties,
            payload: rest.to_vec(),
        }
    }

    /// Each property: its identifier and its bytes, in order.
    pub fn each_property(&self) -> Vec<(u8, Vec<u8>)> {
        each_property(&self.properties)
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.payload).expect("the payload is a text")
    }
}

/// Each property: its identifier and its bytes as they stand, in order.
pub fn each_property(mut rest: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut found = Vec::new();
    while let Some((&id, tail)) = rest.split_first() {
        rest = tail;
        let before = rest;
        match id {
            0x01 | 0x17 | 0x19 | 0x24 | 0x25 | 0x28 | 0x29 | 0x2a => drop(take(&mut rest, 1)),
            0x13 | 0x21 | 0x22 | 0x23 => drop(take(&mut rest, 2)),
            0x02 | 0x11 | 0x18 | 0x27 => drop(take(&mut rest, 4)),
            0x0b => drop(take_var_int(&mut rest)),
            0x26 => drop((take_field(&mut rest), take_field(&mut rest))),
            _ => drop(take_field(&mut rest)),
        }
        found.push((id, before[..before.len() - rest.len()].to_vec()));
    }
    found
}

fn take<'a>(rest: &mut &'a [u8], len: usize) -> &'a [u8] {
    let (head, tail) = rest.split_at(len);
    *rest = tail;
    head
}

fn take_field<'a>(rest: &mut &'a [u8]) -> &'a [u8] {
    let len = take(rest, 2);
    take(rest, u16::from_be_bytes([len[0], len[1]]).into())
}

fn take_var_int(rest: &mut &[u8]) -> usize {
    let mut value = 0;
    for shift in 0.. {
        let byte = take(rest, 1)[0];
        value |= usize::from(byte & 0x7f) << (7 * shift);
        if byte & 0x80 == 0 {
            break;
        }
    }
    value
}

/// SUBSCRIBE; each filter with its options byte.
pub fn subscribe(version: Version, packet_id: u16, props: &[u8], filters: &[(&str, u8)]) -> Vec<u8> {
    let filters: Vec<u8> =
        filters.iter().flat_map(|(filter, options)| [field(filter), vec![*options]].concat()).collect();
    packet(0x82, &[&packet_id.to_be_bytes(), &properties(version, props), &filters])
}

pub fn unsubscribe(version: Version, packet_id: u16, filters: &[&str]) -> Vec<u8> {
    let filters: Vec<u8> = filters.iter().flat_map(field).collect();
    packet(0xa2, &[&packet_id.to_be_bytes(), &properties(version, &[]), &filters])
}

/// PUBACK, PUBREC, PUBREL or PUBCOMP that says success.
pub fn ack(first: u8, packet_id: u16) -> Vec<u8> {
    packet(first, &[&packet_id.to_be_bytes()])
}

/// AUTH with a method and data, both of them properties.
pub fn auth(code: u8, method: &str, data: &str) -> Vec<u8> {
    let properties = auth_properties(method, data);
    packet(0xf0, &[&[code], &var_int(properties.len()), &properties])
}

/// The same properties for CONNECT.
pub fn auth_properties(method: &str, data: &str) -> Vec<u8> {
    [vec![0x15], field(method), vec![0x16], field(data)].concat()
}

/// A packet as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    pub first: u8,
    pub body: Vec<u8>,
}

impl Packet {
    pub fn bytes(&self) -> Vec<u8> {
        packet(self.first, &[&self.body])
    }
}

/// A connection that hands out one packet at a time.
#[derive(Debug)]
pub struct Client {
    version: Version,
    connection: Connection,
    received: std::collections::VecDeque<Packet>,
    /// Of CONNACK: session present, then the properties.
    pub session_present: bool,
    pub properties: Vec<(u8, Vec<u8>)>,
}

impl Client {
    /// The socket only.
    pub fn raw(addr: SocketAddr, version: Version) -> Self {
        let connection = Connection::raw(addr).expect("the host listens");
        connection.stream.set_read_timeout(Some(HUNG_AFTER)).expect("a socket");
        connection.stream.set_write_timeout(Some(HUNG_AFTER)).expect("a socket");
        let received = std::collections::VecDeque::new();
        Self { version, connection, received, session_present: false, properties: Vec::new() }
    }

    /// Connected, and told so.
    pub fn open(addr: SocketAddr, connect: &Connect) -> Self {
        let mut client = Self::raw(addr, connect.version);
        client.send(connect.bytes());
        let answer = client.receive();
        assert_eq!(
            (answer.first, answer.body[0] & 0xfe, answer.body[1]),
            (0x20, 0, 0),
            "CONNACK: {answer:?}"
        );
        client.session_present = answer.body[0] == 1;
        if client.version == Version::V5 {
            let mut rest = &answer.body[2..];
            assert_eq!(take_var_int(&mut rest), rest.len());
            client.properties = each_property(rest);
        }
        client
    }

    /// Clean, with a name of its own.
    pub fn unique(host: &Host, version: Version) -> Self {
        Self::clean(host.mqtt(), version, &unique("client"))
    }

    /// Clean.
    pub fn clean(addr: SocketAddr, version: Version, client_id: &str) -> Self {
        Self::open(addr, &Connect::new(version, client_id))
    }

    /// The host may have closed already: then reading shows it.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let sent = self.connection.stream.write_all(bytes.as_ref());
        let is_hung = sent.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock);
        assert!(!is_hung, "nothing is read within {HUNG_AFTER:?}");
    }

    /// `None`: the connection is closed.
    pub fn try_receive(&mut self) -> Option<Packet> {
        while self.received.is_empty() {
            let received = &mut self.received;
            let read = self.connection.receive(|packet: mqtt::Packet<'_>| {
                received.push_back(Packet { first: packet.first, body: packet.body.to_vec() });
            });
            match read {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    panic!("neither a packet nor the end within {HUNG_AFTER:?}")
                }
                Err(_) => break,
                Ok(()) => {}
            }
        }
        self.received.pop_front()
    }

    pub fn receive(&mut self) -> Packet {
        self.try_receive().expect("the connection is open")
    }

    /// The next packet is these bytes.
    pub fn expect(&mut self, bytes: impl AsRef<[u8]>) {
        assert_eq!(self.receive().bytes(), bytes.as_ref());
    }

    pub fn publish(&mut self, publish: &Publish) {
        let bytes = publish.bytes(self.version);
        self.send(bytes);
    }

    /// Publishes and sees the whole flow of its QoS through.
    pub fn publish_through(&mut self, publish: &Publish) {
        self.publish(publish);
        match publish.qos {
            0 => self.ping(),
            1 => self.expect(ack(0x40, publish.packet_id)),
            _ => {
                self.expect(ack(0x50, publish.packet_id));
                self.send(ack(0x62, publish.packet_id));
                self.expect(ack(0x70, publish.packet_id));
            }
        }
    }

    pub fn published(&mut self) -> Publish {
        let packet = self.receive();
        assert_eq!(packet.first >> 4, kind::PUBLISH, "a PUBLISH: {packet:?}");
        Publish::read(self.version, &packet)
    }

    /// A PUBLISH, acknowledged to its end.
    pub fn delivered(&mut self) -> Publish {
        let publish = self.published();
        match publish.qos {
            0 => {}
            1 => self.send(ack(0x40, publish.packet_id)),
            _ => {
                self.send(ack(0x50, publish.packet_id));
                self.expect_among_others(&ack(0x62, publish.packet_id));
                self.send(ack(0x70, publish.packet_id));
            }
        }
        publish
    }

    /// These bytes come; what comes before them is kept.
    fn expect_among_others(&mut self, bytes: &[u8]) {
        let mut others = Vec::new();
        loop {
            let packet = self.receive();
            if packet.bytes() == bytes {
                break;
            }
            others.push(packet);
        }
        for packet in others.into_iter().rev() {
            self.received.push_front(packet);
        }
    }

    /// An ack that says no comes, with a reason string or without.
    pub fn expect_refused(&mut self, first: u8, packet_id: u16, code: u8) {
        let answer = self.receive();
        let [high, low] = packet_id.to_be_bytes();
        assert_eq!((answer.first, &answer.body[..3]), (first, &[high, low, code][..]), "{answer:?}");
    }

    /// One filter; the SUBACK's code.
    pub fn subscribe(&mut self, filter: &str, options: u8) -> u8 {
        self.subscribe_all(&[], &[(filter, options)])[0]
    }

    pub fn subscribe_all(&mut self, props: &[u8], filters: &[(&str, u8)]) -> Vec<u8> {
        self.send(subscribe(self.version, 77, props, filters));
        self.codes(0x90, 77)
    }

    pub fn unsubscribe(&mut self, filter: &str) -> Vec<u8> {
        self.send(unsubscribe(self.version, 78, &[filter]));
        self.codes(0xb0, 78)
    }

    /// Codes of the SUBACK or UNSUBACK that comes next.
    pub fn codes(&mut self, first: u8, packet_id: u16) -> Vec<u8> {
        let answer = self.receive();
        assert_eq!((answer.first, &answer.body[..2]), (first, &packet_id.to_be_bytes()[..]), "{answer:?}");
        // A length of one byte, and a reason string where a filter is refused.
        let properties = match self.version {
            Version::V5 => 1 + usize::from(answer.body[2]),
            _ => 0,
        };
        answer.body[2 + properties..].to_vec()
    }

    /// Everything sent before was taken in, and nothing but this is answered.
    pub fn ping(&mut self) {
        self.send(PINGREQ);
        self.expect([PINGRESP, 0]);
    }

    /// DISCONNECT came, and nothing after it; its reason code.
    pub fn disconnected(&mut self) -> u8 {
        let packet = self.receive();
        assert_eq!(packet.first, kind::DISCONNECT << 4, "a DISCONNECT: {packet:?}");
        self.closed();
        packet.body.first().copied().unwrap_or(0)
    }

    /// The connection ends, without a further packet.
    pub fn closed(&mut self) {
        assert_eq!(self.try_receive(), None, "the connection is closed");
    }

    /// Ends the connection as a lost network would.
    pub fn cut(&self) {
        let _ = self.connection.stream.shutdown(std::net::Shutdown::Both);
    }

    /// Ends the connection as the protocol asks, and sees it ended.
    pub fn leave(mut self) {
        self.send([0xe0, 0]);
        self.closed();
    }
}
