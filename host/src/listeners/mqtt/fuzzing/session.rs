//! A client's session against a model: legal and illegal packets over several
//! connections, and restarts of the broker between them.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::{RUNTIME, broker_of, converse, kinds, messages, pieces};
use crate::listeners::mqtt::config::Config;
use crate::listeners::mqtt::system_clock;
use crate::listeners::mqtt::wire::{self, Version};
use crate::stream::Streams;
use crate::stream::memory::MemoryStream;
use crate::topic::TopicFilter;

const CONNECTIONS_MAX: usize = 16;
const PACKETS_MAX: usize = 64;
const VERSIONS: [Version; 3] = [Version::V31, Version::V3, Version::V5];
/// The last is not valid.
const FILTERS: [&str; 4] = ["a", "b/+", "$share/g/a", "a/#/b"];
/// Each is routed to a stream of its own.
const TOPICS: [&[u8]; 2] = [b"t", b"o"];

/// Packets that end a connection, whatever came before, in all versions.
const ILLEGAL: [&[u8]; 12] = [
    b"\x36\x05\0\x01t\0\x01",
    b"\x38\x03\0\x01t",
    b"\x30\x03\0\x01#",
    b"\x32\x05\0\x01t\0\0",
    b"\x60\x02\0\x01",
    b"\x62\x01\0",
    b"\x82\x02\0\x01",
    b"\xa2\x02\0\x01",
    b"\xc0\x01\0",
    b"\x20\x02\0\0",
    b"\0\0",
    b"\x30\xff\xff\xff\xff\x01",
];

/// Two bytes a packet: what it is, and what of it. The first of a connection is CONNECT.
pub fn session(data: &[u8]) {
    RUNTIME.with(|runtime| runtime.block_on(play(data)));
}

async fn play(data: &[u8]) {
    let streams = ["s", "other"].map(|name| MemoryStream::with_hooks(name, 1));
    let store = MemoryStream::with_hooks("broker", 1);
    let config = Config::default();
    let start = || {
        let filter = TopicFilter::new("o").expect("a filter");
        let routed = Streams::new(vec![(vec![filter], streams[1].clone())], streams[0].clone());
        broker_of(&config, routed, store.clone(), system_clock())
    };
    let mut served = start();
    let mut model = Model::default();
    let mut steps = data.chunks_exact(2).map(|step| (step[0], step[1]));
    for _ in 0..CONNECTIONS_MAX {
        let Some((how, cut)) = steps.next() else { return };
        if how & 0x40 != 0 {
            served = start();
        }
        let mut sent = model.connect(how);
        let packets = steps.by_ref().take(PACKETS_MAX);
        for (kind, of) in packets {
            model.packet(kind, of, &mut sent);
            if !model.is_open {
                break;
            }
        }
        model.end();
        let pieces = if cut == 0 { vec![Bytes::from(sent)] } else { pieces(&sent, cut) };
        let told = converse(&served, pieces).await;
        let mut told = answers(model.version, &told);
        told.sort();
        model.told.sort();
        assert_eq!(told, model.told, "{model:?}");
        model.told.clear();
        for (stream, expected) in streams.iter().zip(&model.messages) {
            let taken: Vec<_> = messages(&**stream).into_iter().map(|(_, payload, _)| payload).collect();
            assert_eq!(&taken, expected, "each message once, in order");
        }
        let kinds = kinds([&*streams[0], &*streams[1], &*store]);
        let kept = [&b"se"[..], b"sf", b"q2"].map(|kind| kinds.get(kind).copied().unwrap_or(0));
        let session = model.session.as_ref();
        let expected = [1, session.map_or(0, |it| it.filters.len()), session.map_or(0, |it| it.open.len())];
        assert_eq!(kept, session.map_or([0; 3], |_| expected), "{model:?}");
    }
}

/// What the broker is to know and to say.
#[derive(Debug)]
struct Model {
    version: Version,
    is_open: bool,
    /// The session outlives its connection.
    is_kept: bool,
    session: Option<Session>,
    /// What each stream has.
    messages: [Vec<Vec<u8>>; 2],
    told: Vec<Answer>,
    sent: u32,
}

#[derive(Debug, Default)]
struct Session {
    /// QoS 2 packet ids that are not released, and the topic and payload that each came with last.
    open: BTreeMap<u16, (usize, Vec<u8>)>,
    filters: BTreeSet<&'static str>,
}

impl Default for Model {
    fn default() -> Self {
        Self {
            version: Version::V3,
            is_open: false,
            is_kept: false,
            session: None,
            messages: Default::default(),
            told: Vec::new(),
            sent: 0,
        }
    }
}

/// First byte, packet id if any, and the codes that the model knows.
type Answer = (u8, u16, Vec<u8>);

impl Model {
    fn connect(&mut self, how: u8) -> Vec<u8> {
        self.version = VERSIONS[usize::from(how) % VERSIONS.len()];
        let is_clean = how & 0x10 != 0;
        let is_v5 = self.version == Version::V5;
        self.is_kept = if is_v5 { how & 0x20 != 0 } else { !is_clean };
        let present = !is_clean && self.session.is_some();
        if !present {
            self.session = Some(Session::default());
        }
        self.is_open = true;
        self.told.push((wire::CONNACK, 0, vec![present.into(), 0]));
        let name: &[u8] = match self.version {
            Version::V31 => b"\0\x06MQIsdp\x03",
            Version::V3 => b"\0\x04MQTT\x04",
            Version::V5 => b"\0\x04MQTT\x05",
        };
        let properties: &[u8] = match (is_v5, self.is_kept) {
            (false, _) => b"",
            (true, false) => b"\0",
            (true, true) => b"\x05\x11\0\0\x02\x58",
        };
        packet(wire::CONNECT, &[name, &[u8::from(is_clean) << 1, 0, 0], properties, b"\0\x01c"].concat())
    }

    fn packet(&mut self, kind: u8, of: u8, sent: &mut Vec<u8>) {
        let Some(session) = &mut self.session else { return };
        let is_v5 = self.version == Version::V5;
        let no_properties: &[u8] = if is_v5 { b"\0" } else { b"" };
        let id = u16::from(of % 4) + 1;
        let id_bytes = id.to_be_bytes();
        let filter = FILTERS[usize::from(of) % FILTERS.len()];
        let filter_bytes = [&(filter.len() as u16).to_be_bytes(), filter.as_bytes()].concat();
        // In MQTT 3.1 these may be sent again with DUP.
        let dup = if self.version == Version::V31 { of & 0x08 } else { 0 };
        match kind % 10 {
            qos @ 0..=2 => {
                // An open id with the message that it came with is a repeat, and with another one a new
                // message, marked or not.
                let before = session.open.get(&id).filter(|_| qos == 2 && of & 0x10 != 0);
                let is_same = before.is_some();
                let is_marked = qos > 0 && of & 0x20 != 0;
                self.sent += 1;
                let other = || (usize::from(of & 0x40 != 0), self.sent.to_string().into_bytes());
                let (topic, payload) = before.cloned().unwrap_or_else(other);
                let id_bytes: &[u8] = if qos == 0 { b"" } else { &id_bytes };
                let body = [b"\0\x01", TOPICS[topic], id_bytes, no_properties, &payload].concat();
                sent.extend(packet(wire::PUBLISH | u8::from(is_marked) << 3 | qos << 1, &body));
                if !is_same {
                    self.messages[topic].push(payload.clone());
                    if qos == 2 {
                        session.open.insert(id, (topic, payload));
                    }
                }
                match qos {
                    0 => {}
                    1 => self.told.push((wire::PUBACK, id, vec![])),
                    _ => self.told.push((wire::PUBREC, id, vec![])),
                }
            }
            3 | 4 => {
                sent.extend(packet(wire::PUBREL | dup, &id_bytes));
                session.open.remove(&id);
                self.told.push((wire::PUBCOMP, id, vec![]));
            }
            5 => {
                let body = [&id_bytes, no_properties, &filter_bytes, &[of % 3]].concat();
                sent.extend(packet(0x82 | dup, &body));
                let is_valid = filter != FILTERS[3];
                if is_valid {
                    session.filters.insert(filter);
                }
                let invalid = if is_v5 { 0x8f } else { 0x80 };
                self.told.push((0x90, id, vec![if is_valid { of % 3 } else { invalid }]));
            }
            6 => {
                let body = [&id_bytes, no_properties, &filter_bytes].concat();
                sent.extend(packet(0xa2 | dup, &body));
                let had = session.filters.remove(filter);
                let code = if had { 0 } else { 0x11 };
                self.told.push((0xb0, id, if is_v5 { vec![code] } else { vec![] }));
            }
            7 => {
                sent.extend(packet(wire::PINGREQ, b""));
                self.told.push((0xd0, 0, vec![]));
            }
            8 if of & 1 == 0 => {
                sent.extend(packet(wire::DISCONNECT, b""));
                self.is_open = false;
            }
            // Lost.
            8 => self.is_open = false,
            _ => {
                sent.extend_from_slice(ILLEGAL[usize::from(of) % ILLEGAL.len()]);
                // Nothing behind it counts.
                sent.extend(packet(wire::PINGREQ, b""));
                if is_v5 {
                    self.told.push((wire::DISCONNECT, 0, vec![]));
                }
                self.is_open = false;
            }
        }
    }

    fn end(&mut self) {
        if !self.is_kept {
            self.session = None;
        }
    }
}

fn packet(first: u8, body: &[u8]) -> Vec<u8> {
    let len = u8::try_from(body.len()).ok().filter(|len| *len < 0x80).expect("a short packet");
    [&[first, len], body].concat()
}

fn answers(version: Version, mut told: &[u8]) -> Vec<Answer> {
    let mut answers = Vec::new();
    while let Ok(Some(frame)) = wire::frame(told, usize::MAX) {
        told = &told[frame.len..];
        let id = || u16::from_be_bytes([frame.body[0], frame.body[1]]);
        // A length of one byte, and the properties.
        let properties =
            if version == Version::V5 { 3 + usize::from(frame.body.get(2).copied().unwrap_or(0)) } else { 2 };
        answers.push(match frame.first {
            wire::CONNACK => (frame.first, 0, frame.body[..2].to_vec()),
            0x90 | 0xb0 => (frame.first, id(), frame.body[properties..].to_vec()),
            0xd0 | wire::DISCONNECT => (frame.first, 0, vec![]),
            first => (first, id(), vec![]),
        });
    }
    assert!(told.is_empty(), "whole packets");
    answers
}
