//! Every way for a client to reach the broker, by clients that people use.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;

use headworks_tests::certificates::{Authority, Files};
use headworks_tests::folder::{Folder, root};
use headworks_tests::host::Host;
use headworks_tests::mqtt::{self, Version};
use headworks_tests::process::{Lines, run};
use headworks_tests::{mosquitto, node, python};

const HUNG_AFTER: Duration = Duration::from_secs(30);
const DEVICE: u64 = 7;
const READING: &str = "acme/site-01/temperature/sensor-001/reading";

/// A host whose first listener is plain, for what the test itself publishes.
struct Setup {
    host: Host,
    ca: Authority,
    device: Files,
}

/// `listeners` in the notation of the config; `TLS` and `MTLS` stand for `tls:` sections.
fn setup(name: &str, listeners: &str) -> Setup {
    const TLS: &str = "tls: { cert: server.pem, key: server.key }";
    const MTLS: &str = "tls: { cert: server.pem, key: server.key, client_ca: ca.pem, crl: crl.pem }";
    let listeners = listeners.replace("MTLS", MTLS).replace("{ TLS", &format!("{{ {TLS}"));
    let mqtt = format!("mqtt:\n  listeners:\n    - {{ bind: 127.0.0.1:0 }}\n{listeners}");
    let mut host = Host::prepare_with(name, &mqtt, "");
    let ca = Authority::new(&host.folder);
    ca.sign(&host.folder, "server", 1);
    let device = ca.sign(&host.folder, "device-7", DEVICE);
    ca.revoke(&host.folder, &[]);
    host.run();
    Setup { host, ca, device }
}

impl Setup {
    fn ca(&self) -> &str {
        text(&self.ca.ca)
    }

    /// A publish on the plain listener.
    fn publish(&self, topic: &str, payload: &str) {
        run(mosquitto::publish(self.host.mqtt()).args(["-q", "1", "-t", topic, "-m", payload]));
    }

    /// mosquitto_pub on a listener, as the device.
    fn publish_as_device(&self, listener: usize, topic: &str) -> std::process::Output {
        mosquitto::publish(self.host.listener(listener))
            .args(["--cafile", self.ca(), "--cert", text(&self.device.cert), "--key", text(&self.device.key)])
            .args(["-q", "1", "-t", topic, "-m", "hello"])
            .output()
            .expect("mosquitto_pub is installed")
    }

    /// The page's Python program on a listener, its readings heard on the plain one.
    fn publish_python(&self, listener: usize, args: &[&str]) {
        let mut heard =
            Lines::of(mosquitto::subscribe(self.host.mqtt()).args(["-d", "-q", "1", "-t", READING]));
        heard.find("Subscribed");
        let port = self.host.listener(listener).port().to_string();
        let script = root().join("tests/clients/reference_publisher.py");
        let said = run(python::command().arg(script).args(["localhost", &port, "3"]).args(args));
        assert_eq!(said.trim(), "acknowledged 3");
        for value in ["20.0", "21.0", "22.0"] {
            heard.find(&format!("\"value\": {value}"));
        }
    }

    /// The page's Node.js program hears a reading.
    fn subscribe_node(&self, url: &str) {
        let script = root().join("tests/clients/reference_subscriber.js");
        let mut heard = Lines::of(node::command().arg(script).args([url, self.ca()]));
        assert_eq!(heard.line(), "subscribed 1");
        self.publish(READING, "21.5");
        assert_eq!(heard.line(), "iot-telemetry-raw sensor-001 21.5");
    }
}

#[test]
fn the_pages_python_client_publishes_with_mutual_tls() {
    let setup = setup("python-tls", "    - { bind: 127.0.0.1:0, MTLS }\n");
    let (cert, key) = (text(&setup.device.cert), text(&setup.device.key));
    setup.publish_python(1, &["tls", setup.ca(), cert, key]);
}

#[test]
fn the_pages_node_client_subscribes_over_tls() {
    let setup = setup("node-tls", "    - { TLS, bind: 127.0.0.1:0 }\n");
    setup.subscribe_node(&format!("mqtts://localhost:{}", setup.host.listener(1).port()));
}

#[test]
fn python_and_node_clients_speak_over_websocket_with_tls_and_without() {
    let setup = setup(
        "websocket",
        "    - { bind: 127.0.0.1:0, websocket: {} }\n    - { TLS, bind: 127.0.0.1:0, websocket: {} }\n",
    );
    let port = |listener| setup.host.listener(listener).port();
    setup.publish_python(1, &["websockets"]);
    setup.publish_python(2, &["tls", setup.ca(), "websockets"]);
    setup.subscribe_node(&format!("ws://localhost:{}/mqtt", port(1)));
    setup.subscribe_node(&format!("wss://localhost:{}/mqtt", port(2)));
}

#[test]
fn a_page_of_another_site_is_refused_before_the_upgrade_and_counted() {
    let listener = "    - { bind: 127.0.0.1:0, websocket: { origins: ['https://plant.example'] } }\n";
    let setup = setup("origins", listener);
    let at = setup.host.listener(1);
    for (origin, status) in [
        ("https://plant.example", "HTTP/1.1 101"),
        ("http://127.0.0.1:3000", "HTTP/1.1 101"),
        ("http://evil.example", "HTTP/1.1 403"),
    ] {
        let mut socket = TcpStream::connect(at).expect("the host listens");
        socket.set_read_timeout(Some(HUNG_AFTER)).expect("a socket");
        let request = format!(
            "GET /mqtt HTTP/1.1\r\nHost: {at}\r\nOrigin: {origin}\r\nConnection: Upgrade\r\n\
             Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: mqtt\r\n\r\n"
        );
        socket.write_all(request.as_bytes()).expect("the host reads");
        let mut answer = [0; 12];
        socket.read_exact(&mut answer).expect("an answer");
        assert_eq!(std::str::from_utf8(&answer), Ok(status), "{origin}");
    }
    setup.host.says("pages of \"http://evil.example\" may not connect");
    let refused = |cause| setup.host.metric("headworks_mqtt_refused_connects_total", &[("cause", cause)]);
    assert_eq!(refused("websocket_origin"), 1.0);
}

#[test]
fn mosquittos_clients_speak_over_tls_and_a_client_without_a_certificate_is_told_apart() {
    let setup = setup("mosquitto-tls", "    - { bind: 127.0.0.1:0, MTLS }\n");
    let at = setup.host.listener(1);
    let certs = ["--cert", text(&setup.device.cert), "--key", text(&setup.device.key)];
    let mut heard = Lines::of(
        mosquitto::subscribe(at).args(["-d", "--cafile", setup.ca(), "-t", "tls/topic"]).args(certs),
    );
    heard.find("Subscribed");
    assert!(setup.publish_as_device(1, "tls/topic").status.success());
    heard.find("hello");
    let refused =
        mosquitto::publish(at).args(["--cafile", setup.ca(), "-t", "tls/topic", "-m", "x"]).output();
    assert!(!refused.expect("mosquitto_pub is installed").status.success());
    setup.host.says("the client showed no certificate: give it one");
    let refused = |cause| setup.host.metric("headworks_mqtt_refused_connects_total", &[("cause", cause)]);
    assert!(refused("tls_no_certificate") >= 1.0);

    let old = "import socket, ssl, sys\n\
               tls = ssl.create_default_context(cafile=sys.argv[2])\n\
               tls.maximum_version = ssl.TLSVersion.TLSv1_2\n\
               tls.set_ciphers('ECDHE-ECDSA-AES128-SHA256:ECDHE-RSA-AES128-SHA256')\n\
               to = socket.create_connection(('127.0.0.1', int(sys.argv[1])))\n\
               tls.wrap_socket(to, server_hostname='127.0.0.1')\n";
    let port = at.port().to_string();
    let tried = python::command().args(["-c", old, &port, setup.ca()]).output();
    assert!(!tried.expect("Python is installed").status.success());
    setup.host.says("no cipher suite in common: the client needs ECDHE");

    // Another authority of the same name.
    let elsewhere = Folder::new("transports-stranger");
    let stranger = Authority::new(&elsewhere).sign(&elsewhere, "stranger", 9);
    let certs = ["--cert", text(&stranger.cert), "--key", text(&stranger.key)];
    let mut client = mosquitto::publish(at);
    client.args(["--cafile", setup.ca(), "-t", "tls/topic", "-m", "x"]).args(certs);
    assert!(!client.output().expect("mosquitto_pub is installed").status.success());
    setup.host.says("no CA of tls.client_ca has signed the client's certificate");
    assert!(refused("tls_unknown_ca") >= 1.0);
    let listed = setup.host.cli_json(&["clients", "refused"]);
    let of = |cause| listed.iter().find(|client| client["cause"] == cause);
    let stranger = of("tls_unknown_ca").expect("it was refused");
    assert!(stranger["who"].as_str().is_some_and(|who| who.contains("stranger")), "{stranger}");
    assert_eq!(stranger["address"], "127.0.0.1");
    assert!(of("tls_no_certificate").is_some_and(|nameless| nameless["who"].is_null()), "{listed:?}");
    let shown = setup.host.cli(&["clients", "refused"]);
    assert!(shown.contains("stranger") && shown.contains("tls_unknown_ca"), "{shown}");
    assert!(shown.lines().all(|line| line.chars().count() <= 80), "{shown}");
}

#[test]
fn new_certificates_and_revocations_end_only_the_connections_of_the_revoked() {
    let setup = setup("reload", "    - { bind: 127.0.0.1:0, MTLS }\n");
    let folder = &setup.host.folder;
    let other = setup.ca.sign(folder, "device-8", DEVICE + 1);
    let subscribe = |files: &Files| {
        let certs = ["--cafile", setup.ca(), "--cert", text(&files.cert), "--key", text(&files.key)];
        let mut client = mosquitto::subscribe(setup.host.listener(1));
        let mut heard = Lines::of(client.args(["-d", "-t", "reload/#"]).args(certs));
        heard.find("Subscribed");
        heard
    };
    let (mut heard, revoked) = (subscribe(&other), subscribe(&setup.device));
    let reloads = |outcome| setup.host.metric("headworks_mqtt_tls_reloads_total", &[("outcome", outcome)]);
    let taken = "new certificates, used for new connections";

    folder.write("server.pem", "not a certificate");
    setup.host.says("server.pem: it holds no certificate");
    assert!(reloads("refused") >= 1.0);
    assert!(setup.publish_as_device(1, "reload/broken").status.success());

    setup.ca.sign(folder, "server", 2);
    setup.host.says(taken);
    assert!(reloads("taken") >= 1.0);
    assert!(setup.publish_as_device(1, "reload/mended").status.success());

    let said = setup.host.log().len();
    setup.ca.revoke(folder, &[DEVICE]);
    setup.host.says_past(said, taken);
    assert!(!setup.publish_as_device(1, "reload/revoked").status.success());
    setup.host.says("the client's certificate is revoked");
    let log = setup.host.log();
    let line = log.lines().find(|line| line.contains("the client's certificate is revoked"));
    assert!(line.is_some_and(|line| line.contains("device-7")), "the line names the device:\n{log}");
    let listed = setup.host.cli_json(&["clients", "refused"]);
    let device = listed.iter().find(|client| client["cause"] == "tls_revoked").expect("it was refused");
    assert!(device["who"].as_str().is_some_and(|who| who.contains("device-7")), "{device}");
    assert!(device["count"].as_u64().is_some_and(|count| count >= 1), "{device}");
    assert!(!revoked.end().success(), "its connection ends with what let it in");
    setup.publish("reload/last", "still here");
    heard.find("still here");
}

#[test]
fn sighup_takes_new_certificates_and_passwords_at_once() {
    let mqtt = "mqtt:
  listeners:
    - { bind: 127.0.0.1:0, tls: { cert: link.pem, key: link.key } }
  access:
    authenticate: [ { type: passwords, file: passwords } ]
    rules: [ { effect: allow, topics: [\"#\"] } ]
";
    let mut host = Host::prepare_with("sighup", mqtt, "");
    let ca = Authority::new(&host.folder);
    // What is behind a link lies in no folder that is watched.
    let elsewhere = Folder::new("sighup-elsewhere");
    ca.sign(&elsewhere, "server", 1);
    for kind in ["pem", "key"] {
        let file = elsewhere.join(format!("server.{kind}"));
        std::os::unix::fs::symlink(file, host.folder.join(format!("link.{kind}"))).expect("our folder");
    }
    host.passwd("ann", "old", &[]);
    host.run();
    let publish = |host: &Host, password: &str| {
        let mut command = mosquitto::publish(host.mqtt());
        command.args([
            "--cafile",
            text(&ca.ca),
            "-u",
            "ann",
            "-P",
            password,
            "-q",
            "1",
            "-t",
            "t",
            "-m",
            "x",
        ]);
        command.output().expect("mosquitto_pub is installed").status.success()
    };
    assert!(publish(&host, "old"));
    ca.sign(&elsewhere, "server", 2);
    host.passwd("ann", "new", &[]);
    host.process().signal(rustix::process::Signal::HUP);
    host.says("new certificates, used for new connections");
    host.says("a changed file is in use");
    assert!(publish(&host, "new") && !publish(&host, "old"));
}

#[test]
fn a_host_without_certificates_lives_on_after_sighup() {
    let mut host = Host::start("sighup-plain", "");
    host.process().signal(rustix::process::Signal::HUP);
    run(mosquitto::publish(host.mqtt()).args(["-q", "1", "-t", "t", "-m", "x"]));
    assert!(host.stop().success(), "ended by itself, not by the signal");
}

#[test]
fn an_outdated_revocation_list_is_told_of_at_the_start() {
    let mut host = Host::prepare_with(
        "old-list",
        "mqtt: { listeners: [ { bind: 127.0.0.1:0, tls: { cert: server.pem, key: server.key, client_ca: ca.pem, crl: crl.pem } } ] }",
        "",
    );
    let ca = Authority::new(&host.folder);
    ca.sign(&host.folder, "server", 1);
    ca.revoke_until(&host.folder, &[], 2021);
    host.run();
    host.says("crl.pem was to be replaced by 2021-01-01");
}

#[test]
fn a_unix_socket_has_its_mode_and_serves_mosquittos_clients() {
    let dir = Folder::new("unix");
    let path = dir.join("mqtt.sock");
    let listener = format!("    - {{ bind: 'unix:{}', mode: '0600' }}\n", path.display());
    let mut setup = setup("unix", &listener);
    assert_eq!(std::fs::metadata(&path).expect("bound").permissions().mode() & 0o777, 0o600);
    assert!(setup.host.log().contains(&format!("mqtt on unix:{}", path.display())));
    let mut heard = Lines::of(mosquitto::subscribe(setup.host.mqtt()).args(["-d", "-t", "unix/topic"]));
    heard.find("Subscribed");
    run(Command::new("mosquitto_pub").arg("--unix").arg(&path).args([
        "-q",
        "1",
        "-t",
        "unix/topic",
        "-m",
        "hello",
    ]));
    heard.find("hello");

    setup.host.kill();
    assert!(path.exists(), "a killed host leaves its socket");
    setup.host.run();
    run(Command::new("mosquitto_pub").arg("--unix").arg(&path).args([
        "-q",
        "1",
        "-t",
        "unix/topic",
        "-m",
        "again",
    ]));
    setup.host.stop();
    assert!(!path.exists(), "a host that stops removes it");
}

#[test]
fn behind_a_load_balancer_the_clients_own_address_is_the_one_that_is_told() {
    let setup = setup(
        "proxy",
        "    - { bind: 127.0.0.1:0, allow_anonymous: true, proxy_protocol: { from: [127.0.0.0/8] } }\n    \
         - { bind: 127.0.0.1:0, allow_anonymous: true, proxy_protocol: { from: [10.0.0.0/8] } }\n",
    );
    let header = |client: [u8; 4]| {
        let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".to_vec();
        header.extend(client);
        header.extend([127, 0, 0, 1, 0x30, 0x39, 7, 0x5b]);
        header
    };
    let mut connect = Vec::new();
    mqtt::connect(&mut connect, Version::V5, "behind", true);

    let mut socket = TcpStream::connect(setup.host.listener(1)).expect("the host listens");
    socket.set_nodelay(true).expect("a socket");
    for byte in header([192, 0, 2, 7]).iter().chain(&connect) {
        socket.write_all(&[*byte]).expect("the host reads");
    }
    let mut answer = [0; 4];
    socket.read_exact(&mut answer).expect("CONNACK");
    assert_eq!((answer[0], answer[3]), (0x20, 0));
    socket.write_all(&[0xf0, 0]).expect("the host reads");
    setup.host.says("client behind at 192.0.2.7:12345");

    for (listener, sent) in [(1, &connect), (2, &header([192, 0, 2, 7]))] {
        let mut socket = TcpStream::connect(setup.host.listener(listener)).expect("the host listens");
        socket.set_read_timeout(Some(HUNG_AFTER)).expect("a socket");
        // Closed perhaps before all of it is written.
        let _ = socket.write_all(sent);
        let closed = socket.read(&mut [0; 16]);
        let reset = |error: &std::io::Error| error.kind() == std::io::ErrorKind::ConnectionReset;
        assert!(
            closed.as_ref().is_ok_and(|len| *len == 0) || closed.as_ref().is_err_and(reset),
            "{closed:?}"
        );
    }
    setup.host.says("no PROXY header");
    setup.host.says("not one of proxy_protocol.from");
}

#[test]
fn stalled_handshakes_past_the_bound_are_shed_and_harm_no_other_listener() {
    let mqtt = "mqtt: { handshakes_max: 2, listeners: [ { bind: 127.0.0.1:0 }, { bind: 127.0.0.1:0 } ] }";
    let mut host = Host::prepare_with("storm", mqtt, "");
    host.run();
    let connect = || {
        let socket = TcpStream::connect(host.listener(1)).expect("the host listens");
        socket.set_read_timeout(Some(HUNG_AFTER)).expect("a socket");
        socket
    };
    let stalled = [connect(), connect()];
    assert_eq!(connect().read(&mut [0; 1]).expect("closed"), 0);
    host.says("handshakes_max reached");
    let refused = host.metric("headworks_mqtt_refused_connects_total", &[("cause", "handshakes_max")]);
    assert!(refused >= 1.0);
    run(mosquitto::publish(host.listener(0)).args(["-q", "1", "-t", "storm/topic", "-m", "x"]));

    // Their places are free again: one for a client that is slow, one for another.
    for mut socket in stalled {
        socket.shutdown(Shutdown::Write).expect("open");
        assert_eq!(socket.read(&mut [0; 1]).expect("the host closes it, too"), 0);
    }
    let _slow = connect();
    run(mosquitto::publish(host.listener(1)).args(["-q", "1", "-t", "storm/topic", "-m", "x"]));
    assert_eq!(host.metric("headworks_mqtt_refused_connects_total", &[("cause", "lost")]), 2.0);
}

/// mosquitto_pub sends the host that it connects to as server name, an IP address too, of which rustls warns.
#[test]
fn a_client_that_names_an_address_as_server_name_is_no_line_in_the_log() {
    let mut setup = setup("server-name", "    - { TLS, bind: 127.0.0.1:0 }\n");
    for _ in 0..3 {
        run(mosquitto::publish(setup.host.listener(1)).args([
            "--cafile",
            setup.ca(),
            "-q",
            "1",
            "-t",
            "name/topic",
            "-m",
            "x",
        ]));
    }
    setup.host.stop();
    let log = setup.host.log();
    assert!(!log.contains("SNI"), "{log}");
}

fn text(path: &std::path::Path) -> &str {
    path.to_str().expect("our paths are UTF-8")
}
