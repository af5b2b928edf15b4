//! The HTTP listener with curl and Node.js, in both versions of HTTP, and under load through kill -9.
//!
//! `CRASH_ROUNDS` raises the number of kills (12 if not set).

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output};
use std::sync::mpsc::channel;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use headworks_tests::certificates::Authority;
use headworks_tests::folder::{Folder, root};
use headworks_tests::host::{Host, prebuilt};
use headworks_tests::http2::{self, Frames, frame};
use headworks_tests::mosquitto;
use headworks_tests::poster::{Poster, Shared};
use headworks_tests::process::{Lines, run};
use headworks_tests::publisher::{Address, Sent};
use headworks_tests::telemetry::{self, Repeats};

/// Only a hung test meets it.
const HUNG_AFTER: Duration = Duration::from_secs(60);
/// How curl speaks to an address without TLS.
const VERSIONS: [&str; 2] = ["--http1.1", "--http2-prior-knowledge"];
const TOPIC: &str = "acme/site-01/temperature/sensor-001/reading";
const PLAIN: &str = "http: { listeners: [ { bind: 127.0.0.1:0 } ] }\n";

/// Headers and body of what curl got.
fn curl(args: &[&str]) -> String {
    let Output { stdout, stderr, .. } = Command::new("curl")
        .args(["--silent", "--show-error", "--include"])
        .args(args)
        .output()
        .expect("curl");
    format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr))
}

fn status(answer: &str) -> u16 {
    let code = answer.split_whitespace().nth(1).and_then(|code| code.parse().ok());
    code.unwrap_or_else(|| panic!("no answer: {answer}"))
}

#[test]
fn every_message_answered_with_2xx_is_a_row_once_after_kills_of_the_host() {
    crash("http-crash", |address| {
        let batches = [("a", 1), ("b", 1), ("c", 5), ("d", 40)];
        batches.map(|(name, batch)| Poster::start(&format!("device-{name}"), batch, address.clone())).into()
    });
}

#[test]
fn every_message_answered_over_one_http2_connection_is_a_row_once_after_kills_of_the_host() {
    crash("http2-crash", |address| {
        let shared = Shared::new(address.clone());
        let batch = |number: usize| [1, 1, 5, 40][number % 4];
        let device = |number| Poster::start_on(&format!("device-{number}"), batch(number), shared.clone());
        (0..50).map(device).collect()
    });
}

fn crash(name: &str, posters: impl FnOnce(&Address) -> Vec<Poster>) {
    let rounds: u64 = std::env::var("CRASH_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(12);
    let config = format!("{PLAIN}{}", telemetry::config(&telemetry::sqlite_sink()));
    let mut host = Host::prepare(name, &config);
    host.drop_plugin("10-normalize.wasm", prebuilt("normalize"));
    host.drop_plugin("20-enrich.wasm", prebuilt("enrich"));
    host.run();
    let address = Address::new(host.http(0));
    let posters = posters(&address);
    for round in 0..rounds {
        for (poster, step) in posters.iter().zip([3, 7, 20, 80].into_iter().cycle()) {
            poster.await_acked(poster.acked() + step * (round % 3 + 1));
        }
        address.set(None);
        host.kill();
        if round % 3 == 2 {
            // Once in a while also during recovery.
            host.launch_and_kill(round as usize);
        }
        host.run();
        address.set(Some(host.http(0)));
    }
    let sent: Vec<Sent> = posters.into_iter().map(Poster::finish).collect();
    assert!(sent.iter().all(|device| device.count > 0 && device.reconnects > rounds as u32 / 2));
    let path = host.folder.join("data/telemetry.db");
    telemetry::written_to_sqlite(&host, &path);
    telemetry::assert_rows(&telemetry::sqlite_rows(&path, "telemetry"), &sent, Repeats::None);
    let letters = host.cli_json(&["dead-letters", "list"]);
    assert!(letters.is_empty(), "{letters:?}");
}

#[test]
fn a_message_that_curl_posts_reaches_mqtt_subscribers_with_its_properties() {
    let host = Host::start("http-curl", PLAIN);
    let mut heard = Lines::of(mosquitto::subscribe(host.mqtt()).args([
        "-d",
        "-V",
        "5",
        "-q",
        "1",
        "-t",
        "#",
        "-F",
        "%t|%p|%P|%C",
    ]));
    heard.find("Subscribed");
    let url = format!("http://{}/messages/{TOPIC}", host.http(0));
    for version in VERSIONS {
        posted_with_curl(&host, version, &url, &mut heard);
    }
    let answered =
        |version| host.metric("headworks_http_requests_total", &[("version", version), ("status", "204")]);
    assert_eq!((answered("1.0"), answered("1.1"), answered("2")), (0.0, 1.0, 1.0));
}

fn posted_with_curl(host: &Host, version: &str, url: &str, heard: &mut Lines) {
    let header = ["-H", "Content-Type: application/json", "-H", "User-Property: unit=C"];
    let answer = curl(&[&header[..], &[version, "--data-binary", "{\"value\":21.5}", url]].concat());
    assert_eq!(status(&answer), 204, "{answer}");
    heard.find(&format!("{TOPIC}|{{\"value\":21.5}}|unit:C|application/json"));
    let batch = format!("[{{\"topic\":\"{TOPIC}\",\"payload\":\"one\"}},{{\"payload_base64\":\"dHdv\"}}]");
    let url = format!("http://{}/batch/a/b", host.http(0));
    let answer = curl(&[version, "-H", "Content-Type: application/json", "--data-binary", &batch, &url]);
    assert_eq!(status(&answer), 200, "{answer}");
    assert!(answer.contains("{\"accepted\":2,\"rejected\":0}"), "{answer}");
    // They come by two streams, which have no order between them.
    let mut awaited = vec![format!("{TOPIC}|one|"), "a/b|two|".to_owned()];
    while !awaited.is_empty() {
        let line = heard.line();
        awaited.retain(|text| !line.contains(text));
    }
}

#[test]
fn passwords_certificates_and_rules_hold_as_for_mqtt_and_who_is_refused_is_listed() {
    let mqtt = r#"mqtt:
  listeners: [ { bind: 127.0.0.1:0, allow_anonymous: true } ]
  access:
    authenticate: [ { type: certificate }, { type: passwords, file: passwords } ]
    rules:
      - { user: ann, effect: allow, action: publish, topics: ["acme/#"] }
      - { user: device-7, effect: allow, action: publish, topics: ["dev/%u/#"] }
"#;
    let http = "http:
  listeners:
    - { bind: 127.0.0.1:0 }
    - { bind: 127.0.0.1:0, tls: { cert: server.pem, key: server.key, client_ca: ca.pem } }
";
    let mut host = Host::prepare_with("http-access", mqtt, http);
    let ca = Authority::new(&host.folder);
    ca.sign(&host.folder, "server", 1);
    let device = ca.sign(&host.folder, "device-7", 2);
    host.passwd("ann", "secret", &[]);
    host.run();
    let url = |topic: &str| format!("http://{}/messages/{topic}", host.http(0));
    for version in VERSIONS {
        let post =
            |user: &[&str], topic: &str| status(&curl(&[user, &[version, "-d", "1", &url(topic)]].concat()));
        assert_eq!(post(&["-u", "ann:secret"], "acme/a"), 204);
        assert_eq!(post(&["-u", "ann:secret"], "other/a"), 403);
        assert_eq!(post(&["-u", "ann:wrong"], "acme/a"), 401);
        assert_eq!(post(&["-H", "Authorization: Bearer a.b.c"], "acme/a"), 401);
    }
    let nobody = curl(&["-d", "1", &url("acme/a")]);
    assert!(
        status(&nobody) == 401 && nobody.to_ascii_lowercase().contains("www-authenticate: basic"),
        "{nobody}"
    );
    let refused = host.cli(&["clients", "refused"]);
    assert!(refused.contains("ann") && refused.contains("bad_credentials"), "{refused}");

    let (ca, cert, key) = (text(&ca.ca), text(&device.cert), text(&device.key));
    let secure = |topic: &str| format!("https://localhost:{}/messages/{topic}", host.http(1).port());
    let shown = ["--cacert", ca, "--cert", cert, "--key", key, "-d", "1"];
    // The newest version that both support is used, and HTTP/1.1 for a client that does not offer HTTP/2.
    for (offered, wanted) in
        [("--http2", "HTTP/2 204"), ("--http1.1", "HTTP/1.1 204"), ("--no-alpn", "HTTP/1.1 204")]
    {
        let of_device = curl(&[&shown[..], &[offered, &secure("dev/device-7/a")]].concat());
        assert!(of_device.starts_with(wanted), "{offered}: {of_device}");
    }
    assert_eq!(status(&curl(&[&shown[..], &[&secure("acme/a")]].concat())), 403);
    let without = curl(&["--cacert", ca, "-d", "1", &secure("dev/device-7/a")]);
    assert!(!without.starts_with("HTTP/"), "{without}");
}

fn text(path: &std::path::Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// The block of the README that begins with the comment, pasted into a shell where the host runs.
#[test]
fn the_curl_commands_of_the_readme_make_rows() {
    let readme = std::fs::read_to_string(root().join("README.md")).expect("README.md");
    let (_, rest) = readme.split_once("```sh\ncurl ").expect("a block that begins with curl");
    let (block, _) = rest.split_once("\n```").expect("the end of the block");
    let port = headworks_tests::process::free_port();
    let mut host = Host::prepare("http-readme", &PLAIN.replace("127.0.0.1:0", &format!("127.0.0.1:{port}")));
    host.run();
    let script = format!("curl {block}").replace("127.0.0.1:8088", &format!("127.0.0.1:{port}"));
    run(Command::new("sh").args(["-ec", &script]));
    let path = host.folder.join("data/telemetry.db");
    telemetry::written_to_sqlite(&host, &path);
    assert_eq!(telemetry::sqlite_count(&path, "telemetry"), 3);
}

#[test]
fn a_token_is_taken_until_its_time_is_over_and_says_who_its_client_is() {
    const SECRET: &[u8] = b"0123456789abcdef0123456789abcdef";
    let mqtt = r#"mqtt:
  listeners: [ { bind: 127.0.0.1:0, allow_anonymous: true } ]
  access:
    authenticate: [ { type: jwt, secret_file: secret, issuer: plant } ]
    rules: [ { effect: allow, action: publish, topics: ["dev/%u/#"] } ]
"#;
    let mut host = Host::prepare_with("http-token", mqtt, PLAIN);
    host.folder.write("secret", std::str::from_utf8(SECRET).expect("text"));
    host.run();
    let token = |user: &str, issuer: &str, until: u64| {
        let claims = serde_json::json!({ "sub": user, "iss": issuer, "exp": until }).to_string();
        let encode = |part: &[u8]| BASE64_URL_SAFE_NO_PAD.encode(part);
        let signed = format!("{}.{}", encode(b"{\"alg\":\"HS256\"}"), encode(claims.as_bytes()));
        let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, SECRET);
        let signature = ring::hmac::sign(&key, signed.as_bytes());
        format!("Authorization: Bearer {signed}.{}", encode(signature.as_ref()))
    };
    let far = 32_503_680_000;
    let url = |topic: &str| format!("http://{}/messages/{topic}", host.http(0));
    for version in VERSIONS {
        let post = |shown: &str, topic: &str| status(&curl(&[version, "-H", shown, "-d", "1", &url(topic)]));
        assert_eq!(post(&token("ann", "plant", far), "dev/ann/a"), 204);
        assert_eq!(post(&token("ann", "plant", far), "dev/bob/a"), 403);
        assert_eq!(post(&token("ann", "plant", 1_000), "dev/ann/a"), 401);
        assert_eq!(post(&token("ann", "elsewhere", far), "dev/ann/a"), 401);
    }
}

#[test]
fn requests_of_one_connection_have_each_their_own_client_and_their_own_answer() {
    let mqtt = r#"mqtt:
  listeners: [ { bind: 127.0.0.1:0, allow_anonymous: true } ]
  access:
    authenticate: [ { type: passwords, file: passwords } ]
    rules: [ { effect: allow, action: publish, topics: ["dev/%u/#"] } ]
"#;
    let http =
        "http: { listeners: [ { bind: 127.0.0.1:0 } ], max_message_size: 1KiB, max_batch_size: 100KiB }\n";
    let mut host = Host::prepare_with("http-multiplexed", mqtt, http);
    host.passwd("ann", "secret", &[]);
    host.passwd("bob", "secret", &[]);
    host.run();
    let client = http2::Client::plain(host.http(0));
    let basic =
        |user: &str| format!("Basic {}", base64::prelude::BASE64_STANDARD.encode(format!("{user}:secret")));
    let (ann, bob, eve) = (basic("ann"), basic("bob"), basic("eve"));
    let large = "x".repeat(10 << 10);
    let batch = "{\"topic\":\"dev/ann/a\",\"payload\":1}\n{\"topic\":\"dev/bob/a\",\"payload\":1}\n";
    let lines = ("content-type", "application/x-ndjson");
    let asked = [
        ("/messages/dev/ann/a", &ann, "1", 204),
        ("/messages/dev/bob/a", &bob, "1", 204),
        ("/messages/dev/bob/a", &ann, "1", 403),
        ("/messages/dev/eve/a", &eve, "1", 401),
        ("/messages/dev/ann/a", &ann, &large, 413),
        ("/batch", &ann, batch, 207),
    ];
    let answers: Vec<_> = (0..10)
        .flat_map(|_| asked)
        .map(|(path, user, body, status)| {
            (client.begin(path, &[("authorization", user), lines], body), path, status)
        })
        .collect();
    for (answer, path, status) in answers {
        let answer = answer.recv_timeout(HUNG_AFTER).expect("an answer");
        // The wrong password is asked for again and again.
        let is_told = answer.status == status || (status, answer.status) == (401, 429);
        assert!(is_told, "{path}: {answer:?}");
        if status == 207 {
            assert!(answer.body.contains("[{\"status\":204},{\"status\":403,"), "{answer:?}");
        }
    }
}

#[test]
fn a_rate_is_told_to_each_request_with_the_time_to_come_again() {
    let mqtt = "mqtt: { listeners: [ { bind: 127.0.0.1:0 } ], limits: { client_messages_per_s: 1 } }";
    let mut host = Host::prepare_with("http-rate", mqtt, PLAIN);
    host.run();
    let client = http2::Client::plain(host.http(0));
    let batch = "{\"topic\":\"a\",\"payload\":1}\n".repeat(100);
    let lines = [("content-type", "application/x-ndjson")];
    assert_eq!(client.post("/batch", &lines, &batch).expect("an answer").status, 200);
    let answers: Vec<_> = (0..20).map(|_| client.begin("/messages/a", &[], "1")).collect();
    for answer in answers {
        let answer = answer.recv_timeout(HUNG_AFTER).expect("an answer");
        let wait: u64 = answer.retry_after.as_deref().unwrap_or_default().parse().expect("seconds");
        assert!(answer.status == 429 && (90..=100).contains(&wait), "{answer:?}");
    }
    assert_eq!(
        http2::Client::plain(host.http(0)).post("/messages/a", &[], "1").expect("an answer").status,
        204
    );
}

#[test]
fn connections_per_second_are_bounded_as_for_mqtt() {
    let mqtt = "mqtt: { listeners: [ { bind: 127.0.0.1:0 } ], limits: { connects_per_s: 1 } }";
    let mut host = Host::prepare_with("http-connects", mqtt, PLAIN);
    host.run();
    let mut statuses = Vec::new();
    for version in VERSIONS.into_iter().cycle() {
        let answer = curl(&[version, "-d", "1", &format!("http://{}/messages/a", host.http(0))]);
        statuses.push(status(&answer));
        if statuses.last() == Some(&429) {
            assert!(answer.to_ascii_lowercase().contains("retry-after: 1"), "{answer}");
            break;
        }
    }
    assert_eq!(statuses[0], 204);
    assert!(host.cli(&["clients", "refused"]).contains("connect_rate"));
}

#[test]
fn behind_a_load_balancer_and_on_a_unix_socket_both_versions_are_served() {
    let folder = Folder::new("http-unix");
    let path = folder.join("http.sock");
    let http = format!(
        "http:
  listeners:
    - {{ bind: 127.0.0.1:0, allow_anonymous: true, proxy_protocol: {{ from: [127.0.0.0/8] }} }}
    - {{ bind: 'unix:{}', mode: '0600' }}
",
        path.display()
    );
    let mqtt = "mqtt:
  listeners: [ { bind: 127.0.0.1:0, allow_anonymous: true } ]
  access:
    authenticate: [ { type: passwords, file: passwords } ]
    rules: [ { effect: allow, topics: [\"#\"] } ]
";
    let mut host = Host::prepare_with("http-behind", mqtt, &http);
    host.passwd("ann", "secret", &[]);
    host.run();
    let over_socket = ["--unix-socket", text(&path), "-u", "ann:secret", "-d", "1"];
    for (version, wanted) in VERSIONS.into_iter().zip(["HTTP/1.1 204", "HTTP/2 204"]) {
        let answer = curl(&[&over_socket[..], &[version, "http://host/messages/a"]].concat());
        assert!(answer.starts_with(wanted), "{answer}");
    }
    let behind = |client: [u8; 4]| {
        let mut io = TcpStream::connect(host.http(0)).expect("the host listens");
        let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".to_vec();
        header.extend(client);
        header.extend([127, 0, 0, 1, 0x30, 0x39, 0x1f, 0x98]);
        io.write_all(&header).expect("the host reads");
        io.set_read_timeout(Some(HUNG_AFTER)).expect("a socket");
        io
    };
    let mut first = behind([192, 0, 2, 7]);
    let wrong = "POST /messages/a HTTP/1.1\r\nHost: x\r\nAuthorization: Basic YW5uOndyb25n\r\n\
                 Connection: close\r\nContent-Length: 1\r\n\r\n1";
    first.write_all(wrong.as_bytes()).expect("the host reads");
    let mut answer = String::new();
    first.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
    let mut second = Frames::over(behind([192, 0, 2, 8]), &[], HUNG_AFTER).expect("the host reads");
    second.post("/messages/a", b"1").expect("anybody may, on this listener");
    let stream = second.next_stream();
    let block = [http2::head("/messages/a"), http2::field("authorization", "Basic YW5uOndyb25n")].concat();
    let flags = http2::END_HEADERS | http2::END_STREAM;
    second.send(&frame(http2::HEADERS, flags, stream, &block)).expect("the host reads");
    second.find(http2::HEADERS).expect("an answer");
    let refused = host.cli_json(&["clients", "refused"]);
    for address in ["192.0.2.7", "192.0.2.8"] {
        let of = refused.iter().find(|client| client["address"] == address);
        assert!(of.is_some_and(|client| client["cause"] == "bad_credentials"), "{refused:?}");
    }
}

#[test]
fn new_certificates_are_taken_and_a_revoked_one_counts_no_longer_on_an_open_connection() {
    const TLS: &str = "tls: { cert: server.pem, key: server.key, client_ca: ca.pem, crl: crl.pem }";
    let mqtt = "mqtt:
  listeners: [ { bind: 127.0.0.1:0, allow_anonymous: true } ]
  access:
    authenticate: [ { type: certificate } ]
    rules: [ { effect: allow, topics: [\"#\"] } ]
";
    let http = format!("http: {{ listeners: [ {{ bind: 127.0.0.1:0, {TLS} }} ] }}\n");
    let mut host = Host::prepare_with("http-reload", mqtt, &http);
    let ca = Authority::new(&host.folder);
    ca.sign(&host.folder, "server", 1);
    let (device, other) = (ca.sign(&host.folder, "device-7", 7), ca.sign(&host.folder, "device-8", 8));
    ca.revoke(&host.folder, &[]);
    host.run();
    let url = format!("https://localhost:{}", host.http(0).port());
    let [open, open_too] = [&device, &other]
        .map(|files| http2::Client::open(&[&url, text(&ca.ca), text(&files.cert), text(&files.key)]));
    let post = |client: &http2::Client| client.post("/messages/a", &[], "1").map(|answer| answer.status);
    assert_eq!((post(&open).ok(), post(&open_too).ok()), (Some(204), Some(204)));
    let taken = "new certificates, used for new connections";
    ca.sign(&host.folder, "server", 2);
    host.says(taken);
    assert!(host.metric("headworks_http_tls_reloads_total", &[("outcome", "taken")]) >= 1.0);
    let said = host.log().len();
    ca.revoke(&host.folder, &[7]);
    host.says_past(said, taken);
    // The connection of this client was made with a certificate that is revoked now.
    assert!(matches!(post(&open), Ok(401 | 403)), "{:?}", post(&open));
    assert_eq!(post(&open_too).ok(), Some(204));
    let certs = ["--cacert", text(&ca.ca), "--cert", text(&device.cert), "--key", text(&device.key)];
    let refused = curl(&[&certs[..], &["-d", "1", &format!("{url}/messages/a")]].concat());
    assert!(!refused.contains("HTTP/"), "{refused}");
    let listed = host.cli_json(&["clients", "refused"]);
    assert!(listed.iter().any(|client| client["cause"] == "tls_revoked"), "{listed:?}");
}

#[test]
fn a_client_that_waits_to_be_let_in_holds_up_no_other_of_its_connection() {
    // It lets everybody in but bob, of whom it says nothing until the test is over.
    let check = TcpListener::bind("127.0.0.1:0").expect("a port");
    let mqtt = format!(
        "mqtt:
  listeners: [ {{ bind: 127.0.0.1:0, allow_anonymous: true }} ]
  access:
    authenticate: [ {{ type: http, url: 'http://{}/', timeout: 2m }} ]
    rules: [ {{ effect: allow, topics: [\"#\"] }} ]
",
        check.local_addr().expect("a port")
    );
    let (asked_for_bob, is_asked) = channel();
    std::thread::spawn(move || {
        let mut held = Vec::new();
        for io in check.incoming() {
            let mut io = io.expect("a connection");
            let mut request = Vec::new();
            while !request.ends_with(b"}") {
                let mut byte = [0];
                io.read_exact(&mut byte).expect("a request");
                request.push(byte[0]);
            }
            if String::from_utf8_lossy(&request).contains("bob") {
                held.push(io);
                let _ = asked_for_bob.send(());
                continue;
            }
            let answer =
                b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 14\r\n\r\n{\"allow\":true}";
            io.write_all(answer).expect("the host reads");
        }
    });
    let mut host = Host::prepare_with("http-slow-client", &mqtt, PLAIN);
    host.run();
    let client = http2::Client::plain(host.http(0));
    let (bob, ann) = (("authorization", "Basic Ym9iOng="), ("authorization", "Basic YW5uOng="));
    let bobs: Vec<_> = (0..30).map(|_| client.begin("/messages/bob", &[bob], "1")).collect();
    is_asked.recv_timeout(HUNG_AFTER).expect("the check is asked for bob");
    for _ in 0..100 {
        assert_eq!(client.post("/messages/ann", &[ann], "1").expect("an answer").status, 204);
    }
    assert!(bobs.iter().all(|answer| answer.try_recv().is_err()));
    host.kill();
}

#[test]
fn at_shutdown_a_connection_is_told_to_go_away() {
    let mut host = Host::start("http2-shutdown", PLAIN);
    let mut client = Frames::open(host.http(0), &[], HUNG_AFTER).expect("a connection");
    client.post("/messages/a", b"1").expect("204");
    host.process().signal(rustix::process::Signal::TERM);
    let told = client.find(http2::GOAWAY).expect("GOAWAY");
    assert_eq!(http2::reason(&told), 0);
    // The answer to this PING tells the host that the client has seen GOAWAY. The host takes no request after it.
    let ping = client.find(http2::PING).expect("a ping");
    client.send(&frame(http2::PING, http2::ACK, 0, &ping.payload)).expect("the host reads");
    client.find(http2::GOAWAY).expect("the last request that is answered");
    assert!(host.process().wait(HUNG_AFTER).success());
}

/// A reset would overtake what the client still sends, which curl takes for an error.
#[test]
fn a_request_that_is_answered_before_its_body_has_come_is_not_reset() {
    let host = Host::start("http2-early-answer", PLAIN);
    let mut client = Frames::open(host.http(0), &[], HUNG_AFTER).expect("a connection");
    let stream = client.next_stream();
    let head = frame(http2::HEADERS, http2::END_HEADERS, stream, &http2::head("/elsewhere"));
    client.send(&head).expect("the host reads");
    let answer = client.find(http2::DATA).expect("the end of a 404");
    assert_eq!((answer.stream, answer.flags & http2::END_STREAM), (stream, http2::END_STREAM));
    let body = frame(http2::DATA, http2::END_STREAM, stream, b"1");
    client.send(&[body, frame(http2::PING, 0, 0, &[7; 8])].concat()).expect("the host reads");
    loop {
        let found = client.read().expect("the answer to the ping");
        assert_ne!(found.kind, http2::RST_STREAM, "{found:?}");
        if found.kind == http2::PING {
            break;
        }
    }
    client.post("/messages/a", b"1").expect("204");
}
