//! A thousand clients that each break the protocol, or its manners, in another
//! way. Nobody of them reads: what the host says to them piles up.

use std::io::{ErrorKind, Write};
use std::net::{SocketAddr, TcpStream};

use rustix::process::{Resource, getrlimit, setrlimit};

use crate::mqtt::Version;
use crate::packets::{
    Connect, PINGREQ, Publish, Will, ack, field, packet, subscribe, unsubscribe, user, var_int,
};

pub const CROWD: usize = 1_000;
/// A host that takes nothing more for so many steps will not.
const STUCK_STEPS_MAX: usize = 20;
const BOTH: [Version; 2] = [Version::V311, Version::V5];

/// What one client does: sends bytes, so many at each step, then ends.
#[derive(Clone, Debug)]
pub struct Script {
    pub what: String,
    pub bytes: Vec<u8>,
    pub step_bytes: usize,
    pub end: End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Stays, and says no more.
    Hold,
    Close,
    /// With what the host said unread, so that the kernel resets the connection.
    Reset,
}

/// All of them, against one host.
#[derive(Debug)]
pub struct Crowd {
    addr: SocketAddr,
    members: Vec<Member>,
}

#[derive(Debug)]
struct Member {
    script: Script,
    socket: Option<TcpStream>,
    sent: usize,
    stuck: usize,
    done: bool,
}

impl Crowd {
    pub fn new(addr: SocketAddr, scripts: Vec<Script>) -> Self {
        let member = |script| Member { script, socket: None, sent: 0, stuck: 0, done: false };
        Self { addr, members: scripts.into_iter().map(member).collect() }
    }

    /// Each does a little; false once all have done what they came for. The
    /// connections that are held end with the crowd.
    pub fn step(&mut self) -> bool {
        let mut busy = false;
        for member in &mut self.members {
            if !member.done {
                member.done = member.step(self.addr).unwrap_or(true);
                busy |= !member.done;
            }
        }
        busy
    }
}

impl Member {
    /// True: it has done all. An error is the host's, which has had enough.
    fn step(&mut self, addr: SocketAddr) -> std::io::Result<bool> {
        let Some(socket) = &mut self.socket else {
            let socket = TcpStream::connect(addr)?;
            socket.set_nodelay(true)?;
            socket.set_nonblocking(true)?;
            self.socket = Some(socket);
            return Ok(false);
        };
        let Script { bytes, step_bytes, end, .. } = &self.script;
        let rest = &bytes[self.sent..];
        if !rest.is_empty() {
            match socket.write(&rest[..rest.len().min(*step_bytes)]) {
                Ok(len) => (self.sent, self.stuck) = (self.sent + len, 0),
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.stuck += 1,
                Err(error) => return Err(error),
            }
            return Ok(self.stuck > STUCK_STEPS_MAX);
        }
        match end {
            End::Hold => return Ok(true),
            End::Close => {}
            End::Reset => {
                self.stuck += 1;
                if socket.peek(&mut [0]).is_err() && self.stuck <= STUCK_STEPS_MAX {
                    return Ok(false);
                }
            }
        }
        self.socket = None;
        Ok(true)
    }
}

/// As many open files as may be, for the crowd's sockets; the host inherits it.
pub fn raise_open_files() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).expect("up to the hard limit");
}

/// [`CROWD`] of them, no two alike.
pub fn scripts() -> Vec<Script> {
    let mut all = Scripts::default();
    for version in BOTH {
        all.cut_conversations(version);
        all.packets_of_any_kind(version);
        all.lengths(version);
        all.texts(version);
        all.acks_of_nothing(version);
        all.floods(version);
        all.too_much(version);
    }
    all.properties();
    all.strangers();
    all.storms();
    all.flipped_bits();
    assert!(all.0.len() >= CROWD, "only {} ways to misbehave", all.0.len());
    all.0.truncate(CROWD);
    all.0
}

#[derive(Default)]
struct Scripts(Vec<Script>);

fn text(version: Version) -> &'static str {
    if version == Version::V5 { "5.0" } else { "3.1.1" }
}

/// What a device may say in its life, one packet each.
fn conversation(version: Version, client_id: &str) -> Vec<Vec<u8>> {
    let publish = |qos| Publish::new("mis/behaving", qos, u16::from(qos) + 1, "x").bytes(version);
    vec![
        Connect { will: Some(Will::new("mis/will", 1)), ..Connect::resuming(version, client_id) }.bytes(),
        subscribe(version, 9, &[], &[("mis/+", 1)]),
        publish(0),
        publish(1),
        publish(2),
        ack(0x62, 3),
        unsubscribe(version, 10, &["mis/+"]),
        PINGREQ.to_vec(),
        vec![0xe0, 0],
    ]
}

impl Scripts {
    fn add(&mut self, what: impl Into<String>, bytes: Vec<u8>, end: End) {
        self.0.push(Script { what: what.into(), bytes, step_bytes: usize::MAX, end });
    }

    fn slowly(&mut self, what: impl Into<String>, bytes: Vec<u8>, end: End) {
        self.0.push(Script { what: what.into(), bytes, step_bytes: 1, end });
    }

    fn client_id(&self) -> String {
        format!("mis-{}", self.0.len())
    }

    fn connect(&self, version: Version) -> Vec<u8> {
        Connect::new(version, &self.client_id()).bytes()
    }

    /// After a CONNECT that is right.
    fn then(&mut self, version: Version, what: impl std::fmt::Display, bytes: impl AsRef<[u8]>, end: End) {
        let all = [&self.connect(version)[..], bytes.as_ref()].concat();
        self.add(format!("{}: {what}", text(version)), all, end);
    }

    fn cut_conversations(&mut self, version: Version) {
        let len = conversation(version, &self.client_id()).concat().len();
        for at in 1..len {
            let end = [End::Hold, End::Close, End::Reset][at % 3];
            let bytes = conversation(version, &self.client_id()).concat()[..at].to_vec();
            self.add(format!("{}: cut after byte {at}, {end:?}", text(version)), bytes, end);
        }
        for end in [End::Hold, End::Close, End::Reset] {
            let bytes = conversation(version, &self.client_id()).concat();
            self.slowly(format!("{}: a byte at a time, {end:?}", text(version)), bytes, end);
        }
    }

    /// Each first byte there is, half of them in each version, and each type in
    /// front of CONNECT.
    fn packets_of_any_kind(&mut self, version: Version) {
        for first in (u8::from(version == Version::V5)..=u8::MAX).step_by(2) {
            let body: &[u8] = [&[][..], b"\0\x01", b"\0\x01a\0\x01"][usize::from(first) % 3];
            self.then(version, format_args!("first byte {first:#04x}"), packet(first, &[body]), End::Hold);
        }
        for kind in 0..16 {
            let late = [packet(kind << 4, &[b"\0\x01"]), self.connect(version)].concat();
            self.add(format!("{}: type {kind} before CONNECT", text(version)), late, End::Hold);
        }
        let connect = self.connect(version);
        self.then(version, "CONNECT twice", connect, End::Hold);
        let other = Connect::new(version, "mis-other").bytes();
        self.then(version, "CONNECT as somebody else", other, End::Hold);
    }

    fn lengths(&mut self, version: Version) {
        for kind in 1..16_u8 {
            let first = kind << 4 | if matches!(kind, 6 | 8 | 10) { 2 } else { 0 };
            for (what, length) in [
                ("256 MiB to come", &[0xff, 0xff, 0xff, 0x7f][..]),
                ("a length without end", &[0xff, 0xff, 0xff, 0xff, 0xff]),
            ] {
                let sent = [&[first], length].concat();
                self.then(version, format_args!("{first:#04x}, {what}"), &sent, End::Hold);
            }
        }
        let sent = [&[0x30][..], &var_int(1 << 20), &[0; 4_096]].concat();
        self.slowly(format!("{}: a megabyte, a byte at a time", text(version)), sent, End::Hold);
    }

    fn texts(&mut self, version: Version) {
        for (name, wrong) in [("no UTF-8", &b"a\xff"[..]), ("a surrogate", b"\xed\xa0\x80"), ("NUL", b"a\0")]
        {
            let connect = |change: &dyn Fn(&mut Connect)| {
                let mut connect = Connect::new(version, "mis-text");
                change(&mut connect);
                connect.bytes()
            };
            let will = || Will { topic: wrong.into(), ..Will::new("t", 1) };
            self.add(format!("{name} as client id"), connect(&|c| c.client_id = wrong.into()), End::Hold);
            self.add(format!("{name} as user"), connect(&|c| c.username = Some(wrong.into())), End::Hold);
            self.add(format!("{name} as will"), connect(&|c| c.will = Some(will())), End::Hold);
            let none: &[u8] = if version == Version::V5 { &[0] } else { &[] };
            let publish = packet(0x32, &[&field(wrong), &[0, 1], none]);
            let subscribe = packet(0x82, &[&[0, 1], none, &field(wrong), &[1]]);
            for (what, sent) in [("topic", publish), ("filter", subscribe)] {
                self.then(version, format_args!("{name} as {what}"), sent, End::Hold);
            }
        }
    }

    fn acks_of_nothing(&mut self, version: Version) {
        for first in [0x40, 0x50, 0x62, 0x70] {
            for id in [1_u16, u16::MAX] {
                self.then(
                    version,
                    format_args!("{first:#04x} of nothing, id {id}"),
                    ack(first, id),
                    End::Hold,
                );
            }
            let many: Vec<u8> = (0..5_000).flat_map(|id| ack(first, id)).collect();
            self.then(version, format_args!("{first:#04x} of nothing, of 5,000 ids"), many, End::Hold);
        }
    }

    fn floods(&mut self, version: Version) {
        for count in [100, 10_000, 200_000] {
            self.then(version, format_args!("{count} PINGREQ"), PINGREQ.repeat(count), End::Hold);
            self.then(version, format_args!("{count} PINGREQ, then gone"), PINGREQ.repeat(count), End::Reset);
        }
        let publishes = |qos, id: fn(u16) -> u16| -> Vec<u8> {
            let one = |number| Publish::new("mis/flood", qos, id(number), "0123456789").bytes(version);
            (1..=3_000).flat_map(one).collect()
        };
        self.then(version, "3,000 QoS 0, no answer read", publishes(0, |id| id), End::Hold);
        self.then(version, "more than Receive Maximum of QoS 1", publishes(1, |id| id), End::Hold);
        self.then(version, "QoS 2 and never PUBREL", publishes(2, |id| id), End::Hold);
        self.then(version, "one packet id for all, QoS 1", publishes(1, |_| 7), End::Hold);
        self.then(version, "one packet id for all, QoS 2", publishes(2, |_| 7), End::Hold);
        let retained =
            |number: u16| Publish::new(&format!("mis/kept/{number}"), 0, 0, "x").retained().bytes(version);
        self.then(
            version,
            "1,000 retained topics",
            (0..1_000).flat_map(retained).collect::<Vec<_>>(),
            End::Close,
        );
    }

    fn too_much(&mut self, version: Version) {
        for qos in 0..3 {
            for filter in ["#", "honest/#", "+/+"] {
                let sent = subscribe(version, 1, &[], &[(filter, qos)]);
                self.then(version, format_args!("{filter} at QoS {qos}, never read"), sent, End::Hold);
            }
        }
        let deep = "a/".repeat(5_000);
        let many: Vec<String> = (0..5_000).map(|number| format!("mis/{number}")).collect();
        let many: Vec<(&str, u8)> = many.iter().map(|filter| (&**filter, 1)).collect();
        for (what, sent) in [
            ("a filter of 5,000 levels", subscribe(version, 1, &[], &[(&deep, 0)])),
            ("5,000 filters", subscribe(version, 1, &[], &many)),
            ("no filter", subscribe(version, 1, &[], &[])),
            ("a filter that is none", subscribe(version, 1, &[], &[("a#/b", 0), ("$share//a", 1), ("", 2)])),
            ("packet id 0", subscribe(version, 0, &[], &[("a", 0)])),
            ("QoS 3", packet(0x36, &[&field("mis"), &[0, 1, 0]])),
            ("a topic with wildcards", Publish::new("mis/#", 1, 1, "x").bytes(version)),
            ("a topic of 5,000 levels", Publish::new(&deep, 1, 1, "x").bytes(version)),
            ("an empty topic", Publish::new("", 0, 0, "x").bytes(version)),
            ("below $SYS", Publish::new("$SYS/broker", 1, 1, "x").bytes(version).repeat(500)),
            ("over the packet size", Publish::new("mis", 0, 0, &"x".repeat(2 << 20)).bytes(version)),
        ] {
            self.then(version, what, sent, End::Hold);
        }
        let will = Will { payload: vec![b'x'; 60_000], ..Will::new("mis/will", 2) };
        let connect = Connect { will: Some(will), ..Connect::new(version, &self.client_id()) };
        self.add(format!("{}: a will of 60,000 bytes, lost", text(version)), connect.bytes(), End::Reset);
    }

    fn properties(&mut self) {
        let users: Vec<u8> = (0..2_000).flat_map(|number| user("key", &number.to_string())).collect();
        for (what, properties) in [
            ("topic alias 0", vec![0x23, 0, 0]),
            ("topic alias 65,535", vec![0x23, 0xff, 0xff]),
            ("an alias twice", vec![0x23, 0, 1, 0x23, 0, 1]),
            ("a subscription identifier", vec![0x0b, 1]),
            ("an unknown property", vec![0x7f, 1, 2]),
            ("a property cut short", vec![0x26, 0, 9]),
            ("2,000 user properties", users),
        ] {
            let sent = Publish::new("mis", 1, 1, "x").with(properties).bytes(Version::V5);
            self.then(Version::V5, what, sent, End::Hold);
        }
        for properties in
            [vec![0x21, 0, 0], vec![0x27, 0, 0, 0, 0], vec![0x27, 0, 0, 0, 1], vec![0x15, 0, 1, b'x']]
        {
            let what = format!("CONNECT with {properties:?}");
            let connect = Connect { properties, ..Connect::new(Version::V5, &self.client_id()) };
            self.add(what, connect.bytes(), End::Hold);
        }
        let slow = Connect { properties: vec![0x21, 0, 1], ..Connect::new(Version::V5, &self.client_id()) };
        let sent = [slow.bytes(), subscribe(Version::V5, 1, &[], &[("honest/#", 2)])].concat();
        self.add("Receive Maximum 1, never acknowledged", sent, End::Hold);
    }

    /// Who does not speak MQTT.
    fn strangers(&mut self) {
        let hello = [&[0x16, 3, 1, 0, 0xc8, 1, 0, 0, 0xc4, 3, 3][..], &[0x5a; 80]].concat();
        let proxy = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x7f\0\0\x01\x7f\0\0\x01\0\x01\0\x02".to_vec();
        for (what, bytes) in [
            ("a TLS hello, then garbage", [&hello[..], &[0xa5; 4_096]].concat()),
            ("a TLS hello, cut", hello[..20].to_vec()),
            ("HTTP", b"GET / HTTP/1.1\r\nHost: broker\r\n\r\n".to_vec()),
            ("a WebSocket's HTTP", b"GET /mqtt HTTP/1.1\r\nUpgrade: websocket\r\n".to_vec()),
            ("SSH", b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()),
            ("a PROXY header nobody asked for", proxy),
            ("zeros", vec![0; 100_000]),
            ("another protocol's name", packet(0x10, &[&field("MQTS"), &[4, 2, 0, 60], &field("x")])),
            ("level 6", packet(0x10, &[&field("MQTT"), &[6, 2, 0, 60], &field("x")])),
            ("nothing at all", Vec::new()),
        ] {
            self.add(what, bytes.clone(), End::Hold);
            self.add(format!("{what}, then gone"), bytes, End::Close);
        }
    }

    fn storms(&mut self) {
        for number in 0..60 {
            let version = BOTH[number % 2];
            let own = self.connect(version);
            let same = Connect::resuming(version, "mis-taken").bytes();
            self.add(format!("connect storm, {number}"), own, End::Reset);
            self.add(format!("one client id for all, {number}"), same, End::Hold);
        }
    }

    /// Conversations with one wrong bit each, as many as are still wanted.
    fn flipped_bits(&mut self) {
        for number in 0_usize.. {
            let version = BOTH[number % 2];
            let mut bytes = conversation(version, &self.client_id()).concat();
            let bit = number / 2;
            if self.0.len() >= CROWD || bit / 8 >= bytes.len() {
                return;
            }
            bytes[bit / 8] ^= 1 << (bit % 8);
            self.add(format!("{}: bit {bit} flipped", text(version)), bytes, End::Hold);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thousand_misbehave_and_no_two_alike() {
        let mut scripts: Vec<_> =
            scripts().into_iter().map(|script| (script.bytes, script.step_bytes, script.end as u8)).collect();
        scripts.sort();
        scripts.dedup();
        // One client id for all is the point of some.
        assert!(scripts.len() > CROWD - 70, "{}", scripts.len());
    }
}
