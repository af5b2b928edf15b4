//! The HTTP listener with curl, and under load through kill -9.
//!
//! `CRASH_ROUNDS` raises the number of kills (12 if not set).

use std::process::{Command, Output};

use headworks_tests::certificates::Authority;
use headworks_tests::folder::root;
use headworks_tests::host::{Host, prebuilt};
use headworks_tests::mosquitto;
use headworks_tests::poster::Poster;
use headworks_tests::process::{Lines, run};
use headworks_tests::publisher::{Address, Sent};
use headworks_tests::telemetry::{self, Repeats};

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
    let rounds: u64 = std::env::var("CRASH_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(12);
    let config = format!("{PLAIN}{}", telemetry::config(&telemetry::sqlite_sink()));
    let mut host = Host::prepare("http-crash", &config);
    host.drop_plugin("10-normalize.wasm", prebuilt("normalize"));
    host.drop_plugin("20-enrich.wasm", prebuilt("enrich"));
    host.run();
    let address = Address::new(host.http(0));
    let posters = [("a", 1), ("b", 1), ("c", 5), ("d", 40)]
        .map(|(name, batch)| Poster::start(&format!("device-{name}"), batch, address.clone()));
    for round in 0..rounds {
        for (poster, step) in posters.iter().zip([3, 7, 20, 80]) {
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
    let sent: Vec<Sent> = posters.map(Poster::finish).into();
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
    let header = ["-H", "Content-Type: application/json", "-H", "User-Property: unit=C"];
    let answer = curl(&[&header[..], &["--data-binary", "{\"value\":21.5}", &url]].concat());
    assert_eq!(status(&answer), 204, "{answer}");
    heard.find(&format!("{TOPIC}|{{\"value\":21.5}}|unit:C|application/json"));
    let batch = format!("[{{\"topic\":\"{TOPIC}\",\"payload\":\"one\"}},{{\"payload_base64\":\"dHdv\"}}]");
    let url = format!("http://{}/batch/a/b", host.http(0));
    let answer = curl(&["-H", "Content-Type: application/json", "--data-binary", &batch, &url]);
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
    let post = |user: &[&str], topic: &str| status(&curl(&[user, &["-d", "1", &url(topic)]].concat()));
    assert_eq!(post(&["-u", "ann:secret"], "acme/a"), 204);
    assert_eq!(post(&["-u", "ann:secret"], "other/a"), 403);
    assert_eq!(post(&["-u", "ann:wrong"], "acme/a"), 401);
    assert_eq!(post(&["-H", "Authorization: Bearer a.b.c"], "acme/a"), 401);
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
    let of_device = curl(&[&shown[..], &[&secure("dev/device-7/a")]].concat());
    assert_eq!(status(&of_device), 204, "{of_device}");
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
