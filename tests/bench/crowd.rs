//! Many clients on one thread: sockets that epoll watches, packets read where
//! the kernel put them. It takes little of the cores that it shares with the broker.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Duration;

use headworks_tests::mqtt::{self, Connection, Packet, Version};
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};

/// Without a packet for so long the broker has lost some.
const SILENCE_MAX: Duration = Duration::from_secs(30);
const READ_BYTES: usize = 256 << 10;
const EVENTS_MAX: usize = 1_024;

pub struct Crowd {
    members: Vec<Member>,
    epoll: OwnedFd,
    buffer: Vec<u8>,
}

struct Member {
    connection: Connection,
    /// The beginning of a packet that is not whole.
    left: Vec<u8>,
}

impl Crowd {
    /// `count` clients `PREFIX-N`, connected; `filter` where each subscribes.
    pub fn connect(
        addr: SocketAddr,
        prefix: &str,
        count: usize,
        subscribe: Option<(u8, &dyn Fn(usize) -> String)>,
    ) -> Self {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).expect("epoll");
        let mut members = Vec::with_capacity(count);
        for number in 0..count {
            let id = format!("{prefix}-{number}");
            let mut connection =
                Connection::open(addr, Version::V311, &id, true).expect("the broker accepts");
            if let Some((qos, filter)) = subscribe {
                connection
                    .subscribe(Version::V311, &[(&filter(number), qos)])
                    .expect("the broker subscribes");
            }
            let data = epoll::EventData::new_u64(number as u64);
            epoll::add(&epoll, &connection.stream, data, epoll::EventFlags::IN).expect("a socket");
            members.push(Member { connection, left: Vec::new() });
        }
        Self { members, epoll, buffer: vec![0; READ_BYTES] }
    }

    /// Sends from a client; what a socket does not take at once is waited for.
    pub fn send(&mut self, number: usize, bytes: &[u8]) {
        self.members[number].connection.stream.write_all(bytes).expect("the broker reads");
    }

    /// To send from another thread than the one that receives.
    pub fn streams(&self) -> Vec<TcpStream> {
        let stream = |member: &Member| member.connection.stream.try_clone().expect("a socket");
        self.members.iter().map(stream).collect()
    }

    /// Waits until something came, and reads once from each client that has
    /// something: `each` packet, and whose, then what to `answer` with.
    pub fn receive(&mut self, mut each: impl FnMut(usize, Packet<'_>, &mut Vec<u8>)) {
        let mut events = Vec::with_capacity(EVENTS_MAX);
        let silence = Timespec::try_from(SILENCE_MAX).expect("seconds");
        epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&silence)).expect("epoll");
        assert!(!events.is_empty(), "nothing came for {SILENCE_MAX:?}: the broker lost messages");
        let mut answer = Vec::new();
        for event in &events {
            let number = event.data.u64() as usize;
            let member = &mut self.members[number];
            let kept = member.left.len();
            self.buffer[..kept].copy_from_slice(&member.left);
            let read = member.connection.stream.read(&mut self.buffer[kept..]).expect("the broker is there");
            assert!(read > 0, "the broker closed the connection of client {number}");
            let mut rest = &self.buffer[..kept + read];
            while let Some(packet) = mqtt::take(&mut rest) {
                each(number, packet, &mut answer);
            }
            member.left.clear();
            member.left.extend_from_slice(rest);
            if !answer.is_empty() {
                member.connection.stream.write_all(&answer).expect("the broker reads");
                answer.clear();
            }
        }
    }
}
