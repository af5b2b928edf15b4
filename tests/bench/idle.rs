//! Memory of a connection that has nothing to say: MQTT 5, keep alive on, by
//! the growth of the broker's resident memory. Over TCP beside mosquitto; over
//! TLS; and with a session that outlives it and has a subscription.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use headworks_tests::certificates::Authority;
use headworks_tests::host::Host;
use headworks_tests::mosquitto::Mosquitto;
use headworks_tests::mqtt::{self, Version, kind};
use headworks_tests::process::Process;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::results::Results;
use crate::{ingest, rounds};

const CONNECTIONS: usize = 20_000;
/// Of the limit on open files, for all that is no connection.
const OTHER_FILES: usize = 200;
/// They connect at the same time: fewer than any broker's backlog.
const THREADS: usize = 16;

pub fn run(results: &mut Results) {
    let count = connections();
    let [mut tcp, mut rival, mut tls, mut sessions] = [const { Vec::new() }; 4];
    for _ in 0..rounds() {
        let mut host = ingest::host("");
        tcp.push(grown(host.mqtt(), host.process(), count, |number, io| say_hello(number, true, io)));
        drop(host);
        let mosquitto = Mosquitto::start();
        let addr = mosquitto.addr;
        rival.push(grown(addr, mosquitto.process(), count, |number, io| say_hello(number, true, io)));
        drop(mosquitto);
        let (mut host, client) = with_tls();
        tls.push(grown(host.mqtt(), host.process(), count, |number, io| {
            let name = ServerName::try_from("localhost").expect("a name");
            let session = ClientConnection::new(client.clone(), name).expect("a client");
            say_hello(number, true, &mut StreamOwned::new(session, io));
        }));
        drop(host);
        let mut host = ingest::host("");
        sessions.push(grown(host.mqtt(), host.process(), count, |number, io| say_hello(number, false, io)));
    }
    results.add("idle_conn_kib", &tcp);
    results.add("idle_conn_kib_mosquitto", &rival);
    results.add("idle_conn_tls_kib", &tls);
    results.add("idle_session_kib", &sessions);
    results.add("idle_connections", &vec![count as f64; rounds()]);
}

/// As many as the limit on open files allows, which is raised as far as it may
/// be. The broker inherits it and needs as many.
fn connections() -> usize {
    let wanted = (CONNECTIONS + OTHER_FILES) as u64;
    let maximum = getrlimit(Resource::Nofile).maximum;
    let raised = Rlimit { current: Some(wanted), maximum: maximum.map(|hard| hard.max(wanted)) };
    if setrlimit(Resource::Nofile, raised).is_ok() {
        return CONNECTIONS;
    }
    // Above the hard limit, and not allowed to raise that.
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).expect("up to the hard limit");
    let hard = maximum.map_or(CONNECTIONS, |hard| usize::try_from(hard).unwrap_or(CONNECTIONS));
    let count = hard.saturating_sub(OTHER_FILES);
    eprintln!("bench: at most {hard} files may be open: {count} connections instead of {CONNECTIONS}");
    count
}

/// KiB of memory that the broker has more for each connection. `hello` returns
/// once the broker has answered; the socket then stays open.
fn grown(
    addr: SocketAddr,
    broker: &Process,
    count: usize,
    hello: impl Fn(usize, &mut &TcpStream) + Sync,
) -> f64 {
    let before = settled(broker);
    let open: Vec<Vec<TcpStream>> = std::thread::scope(|scope| {
        let hello = &hello;
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let open = move |number| {
                    let socket = TcpStream::connect(addr).expect("the broker accepts");
                    socket.set_nodelay(true).expect("a socket");
                    hello(number, &mut &socket);
                    socket
                };
                scope.spawn(move || (thread..count).step_by(THREADS).map(open).collect())
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("a client")).collect()
    });
    let after = settled(broker);
    assert_eq!(open.iter().flatten().count(), count);
    (after - before) as f64 / 1024.0 / count as f64
}

/// Resident bytes once the broker does nothing any more.
fn settled(broker: &Process) -> u64 {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let cpu = broker.cpu();
        std::thread::sleep(Duration::from_millis(500));
        if broker.cpu() - cpu <= Duration::from_millis(20) {
            return broker.rss_bytes();
        }
        assert!(Instant::now() < deadline, "the broker never rests");
    }
}

/// CONNECT to CONNACK; with a session that stays, also a subscription.
fn say_hello(number: usize, clean: bool, io: &mut (impl Read + Write)) {
    let mut out = Vec::new();
    mqtt::connect(&mut out, Version::V5, &format!("idle-{number:05}"), clean);
    if !clean {
        let filter = format!("acme/site-01/orders/idle-{number:05}/#");
        mqtt::subscribe(&mut out, Version::V5, 1, &[(&filter, 1)]);
    }
    io.write_all(&out).expect("the broker reads");
    let awaited = if clean { kind::CONNACK } else { kind::SUBACK };
    let (mut buffer, mut filled, mut last) = ([0; 512], 0, 0);
    while last != awaited {
        let read = io.read(&mut buffer[filled..]).expect("the broker answers");
        assert!(read > 0, "the broker closed connection {number}");
        filled += read;
        let mut rest = &buffer[..filled];
        while let Some(packet) = mqtt::take(&mut rest) {
            last = packet.kind();
            assert!(last != kind::CONNACK || packet.body[1] == 0, "connection {number} is refused");
        }
    }
}

/// A host that serves TLS, and what its clients trust.
fn with_tls() -> (Host, Arc<ClientConfig>) {
    let mqtt = "mqtt: { listeners: [ { bind: 127.0.0.1:0, tls: { cert: server.pem, key: server.key } } ] }";
    let mut host = Host::prepare_with("bench-idle-tls", mqtt, &ingest::config(""));
    let authority = Authority::new(&host.folder);
    authority.sign(&host.folder, "server", 1);
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(&authority.ca).expect("a certificate")).expect("a CA");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let client = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("TLS 1.2 and 1.3")
        .with_root_certificates(roots)
        .with_no_client_auth();
    host.run();
    (host, Arc::new(client))
}
