//! Against a server that the test plays. `tests/tests/influxdb.rs` has a real one.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::Read;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use axum::Router;
use axum::body::to_bytes;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use proptest::prelude::*;
use serde_json::json;
use tokio::net::TcpListener;

use super::config::{Precision, Spread};
use super::line::{self, Backslash};
use super::points::Points;
use super::*;
use crate::batch::{Offset, flags};
use crate::problems::{KeyPath, Problems};
use crate::sinks::conformance::{self, Database, advance, batch, claim, rows};
use crate::sinks::{
    BuildContext, Claim, Error, Journal, Looked, Outcome, POSITIONS_PREFIX, Put, RefusedRow, Rows, Sink,
    SinkConfig, Target, look_up,
};
use crate::stream::Stream;
use crate::stream::memory::MemoryStream;
use crate::telemetry::Failures;
use crate::topic::Namespace;
use crate::units::Period;

/// A server of line protocol, and a host's journal.
struct Server {
    url: String,
    shared: Arc<Mutex<Shared>>,
    positions: Arc<MemoryStream>,
    journal: Journal,
    config: Config,
}

/// Status, body and headers.
type Answer = (u16, &'static str, Vec<(&'static str, &'static str)>);

#[derive(Default)]
struct Shared {
    /// Every line that was taken.
    taken: Vec<String>,
    /// Path, headers and number of lines of each request.
    requests: Vec<(String, HeaderMap, usize)>,
    /// Answers of the next requests.
    script: VecDeque<Answer>,
    /// Lines with this cannot be kept.
    refused: Option<&'static str>,
    /// Requests with more lines are too large.
    lines_max: Option<usize>,
    /// Requests are not answered.
    is_silent: bool,
}

impl Server {
    async fn start() -> Self {
        let shared = Arc::new(Mutex::new(Shared::default()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let routes = Router::new().fallback(serve).with_state(Arc::clone(&shared));
        tokio::spawn(async move { axum::serve(listener, routes).await });
        let streams = ["broker", "dead-letters"].map(|name| MemoryStream::with_hooks(name, 1));
        let journal = Journal::new(streams[0].clone(), streams[1].clone());
        let [positions, _] = streams;
        let config =
            Config { url: url.clone(), version: 1, database: Some("iot".to_owned()), ..Config::default() };
        Self { url, shared, positions, journal, config }
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap()
    }

    fn target(&self) -> target::InfluxTarget {
        self.config.target(Arc::new(Namespace::parse(Namespace::DEFAULT_PATTERN).unwrap()))
    }

    async fn put(&self, rows: &Rows) -> Result<Put, Error> {
        let mut target = self.target();
        target.open().await?;
        target.put(rows).await
    }

    fn answers(&self, status: u16, body: &'static str, headers: &[(&'static str, &'static str)]) {
        self.lock().script.push_back((status, body, headers.to_vec()));
    }
}

async fn serve(State(shared): State<Arc<Mutex<Shared>>>, request: Request) -> Response {
    let (path, headers) = (request.uri().to_string(), request.headers().clone());
    let mut body = to_bytes(request.into_body(), usize::MAX).await.unwrap().to_vec();
    if headers.get("content-encoding").is_some_and(|encoding| encoding == "gzip") {
        let mut plain = Vec::new();
        flate2::read::GzDecoder::new(&*body).read_to_end(&mut plain).unwrap();
        body = plain;
    }
    let lines: Vec<String> = String::from_utf8(body).unwrap().lines().map(str::to_owned).collect();
    if shared.lock().unwrap().is_silent && !lines.is_empty() {
        std::future::pending::<()>().await;
    }
    let shared = &mut *shared.lock().unwrap();
    shared.requests.push((path, headers, lines.len()));
    if let Some((status, body, headers)) = shared.script.pop_front() {
        let mut response = (StatusCode::from_u16(status).unwrap(), body).into_response();
        response.headers_mut().extend(
            headers.iter().map(|(name, value)| {
                (name.parse::<axum::http::HeaderName>().unwrap(), value.parse().unwrap())
            }),
        );
        return response;
    }
    if shared.lines_max.is_some_and(|most| lines.len() > most) {
        return StatusCode::PAYLOAD_TOO_LARGE.into_response();
    }
    let refused = shared.refused;
    let is_refused = |line: &&String| refused.is_some_and(|refused| line.contains(refused));
    let dropped = lines.iter().filter(is_refused).count();
    shared.taken.extend(lines.iter().filter(|line| !is_refused(line)).cloned());
    match dropped {
        0 => StatusCode::NO_CONTENT.into_response(),
        _ => (StatusCode::BAD_REQUEST, format!(r#"{{"error":"partial write: no dropped={dropped}"}}"#))
            .into_response(),
    }
}

#[async_trait]
impl Database for Server {
    async fn sink(&self) -> Box<dyn Sink> {
        self.config.build(BuildContext {
            name: "warehouse",
            namespace: Arc::new(Namespace::parse(Namespace::DEFAULT_PATTERN).unwrap()),
            journal: self.journal.clone(),
            failures: Failures::default(),
        })
    }

    async fn written(&self) -> Vec<(String, f64)> {
        let of = |line: &String| {
            let point = Point::parse(line);
            (point.tags["device_id"].clone(), point.fields["value"].parse().unwrap())
        };
        self.lock().taken.iter().map(of).collect()
    }

    async fn lose_positions(&self) {
        unreachable!("they are in the host")
    }

    async fn look(&self, claim: &Claim) -> Option<Looked> {
        let entries = self.positions.state(POSITIONS_PREFIX);
        look_up(&entries, vec![claim.clone()], &self.target().place()).unwrap().pop()
    }
}

conformance::repeating_conformance_tests!(Server::start().await);

/// A point as InfluxDB 1 and 2 read it.
#[derive(Clone, Debug, Default, PartialEq)]
struct Point {
    measurement: String,
    tags: BTreeMap<String, String>,
    /// Values as they stand, text without its quotes.
    fields: BTreeMap<String, String>,
    time: i64,
}

impl Point {
    fn parse(line: &str) -> Self {
        type Chars<'l> = std::iter::Peekable<std::str::Chars<'l>>;
        // A backslash counts only before what it escapes.
        fn until(rest: &mut Chars<'_>, ends: &[char], escaped: &[char]) -> (String, Option<char>) {
            let mut text = String::new();
            while let Some(c) = rest.next_if(|c| !ends.contains(c)) {
                match rest.peek() {
                    Some(next) if c == '\\' && escaped.contains(next) => text.extend(rest.next()),
                    _ => text.push(c),
                }
            }
            (text, rest.next())
        }
        const ESCAPED: [char; 3] = [',', ' ', '='];
        let mut rest: Chars<'_> = line.chars().peekable();
        let mut point = Point::default();
        let mut end;
        (point.measurement, end) = until(&mut rest, &[',', ' '], &[',', ' ']);
        while end == Some(',') {
            let (name, _) = until(&mut rest, &['='], &ESCAPED);
            let value;
            (value, end) = until(&mut rest, &[',', ' '], &ESCAPED);
            point.tags.insert(name, value);
        }
        loop {
            let (name, _) = until(&mut rest, &['='], &ESCAPED);
            let is_text = rest.next_if_eq(&'"').is_some();
            let value;
            if is_text {
                let mut text = String::new();
                while let Some(c) = rest.next().filter(|c| *c != '"') {
                    let is_escaped = c == '\\' && rest.peek().is_some_and(|next| "\"\\".contains(*next));
                    text.push(if is_escaped { rest.next().unwrap() } else { c });
                }
                (value, end) = (text, rest.next());
            } else {
                (value, end) = until(&mut rest, &[',', ' '], &ESCAPED);
            }
            point.fields.insert(name, value);
            if end != Some(',') {
                break;
            }
        }
        point.time = until(&mut rest, &[], &[]).0.parse().unwrap();
        point
    }
}

fn points(config: &Config) -> Points {
    Points::new(config, Arc::new(Namespace::parse(Namespace::DEFAULT_PATTERN).unwrap()))
}

/// Measurement, tags, fields: from JSON, as a config has them.
fn config(json: serde_json::Value) -> Config {
    serde_json::from_value(json).unwrap()
}

/// The only point of a payload, or why it is none.
fn point(config: &Config, payload: &str) -> Result<Point, String> {
    let lines = points(config).lines(&rows([("sensor-1", payload)]));
    match &lines.rejected[..] {
        [] => Ok(Point::parse(lines.text.trim_end_matches('\n'))),
        [rejected] => Err(rejected.reason.clone()),
        more => panic!("{more:?}"),
    }
}

proptest! {
    #[test]
    fn any_text_comes_back_as_it_was_or_is_rejected_for_what_no_line_can_hold(
        tag in ".*", text in "(?s).*", measurement in ".*", key in "[^_\\\\\\pC].{0,20}",
    ) {
        let holds = |text: &str| !text.contains(['\n', '\r']) && !text.ends_with('\\');
        prop_assume!(holds(&key) && key.len() <= 63 && key != "time");
        let config = config(json!({
            "measurement": "/m", "tags": { &key: "/tag" }, "fields": { "f": "/text" },
        }));
        let payload = json!({ "m": measurement, "tag": tag, "text": text }).to_string();
        match point(&config, &payload) {
            Ok(point) => {
                prop_assert!(holds(&tag) && holds(&measurement) && !measurement.starts_with('#'));
                prop_assert_eq!(&point.measurement, &measurement);
                let tags = if tag.is_empty() { BTreeMap::new() } else { BTreeMap::from([(key, tag)]) };
                prop_assert_eq!(&point.tags, &tags);
                prop_assert_eq!(&point.fields["f"], &text);
            }
            Err(reason) => {
                let is_held = holds(&tag) && holds(&measurement);
                prop_assert!(!is_held || measurement.is_empty() || measurement.starts_with('#'), "{}", reason);
            }
        }
    }

    #[test]
    fn any_finite_number_reads_as_the_same_number(number in any::<f64>().prop_filter("", |n| n.is_finite())) {
        let mut text = String::new();
        line::push_float(&mut text, number);
        prop_assert_eq!(text.parse::<f64>().unwrap().to_bits(), number.to_bits());
    }
}

#[test]
fn version_three_escapes_a_backslash_and_so_takes_one_at_the_end() {
    let escaped = |backslash| {
        let mut text = String::new();
        line::push_key(&mut text, "a\\,b=\\", backslash).map(|()| text)
    };
    assert_eq!(escaped(Backslash::Escaped).as_deref(), Ok(r"a\\\,b\=\\"));
    assert!(escaped(Backslash::Plain).is_err());
}

#[test]
fn values_are_written_as_what_they_are() {
    let typed = config(json!({
        "tags": { "site": "$site" },
        "fields": {
            "any": "/v", "whole": { "from": "/v", "type": "bigint" }, "at": { "from": "$received", "type": "bigint", "unit": "ms" },
            "on": { "from": "/on", "type": "bool" }, "raw": { "from": "/raw", "type": "jsonb" }, "missing": "/missing",
        },
    }));
    let point_of = |payload: &str| point(&typed, payload);
    let read = point_of(r#"{"v": 21, "on": true, "raw": {"a": "b"}}"#).unwrap();
    assert_eq!(read.tags, BTreeMap::from([("site".to_owned(), "factory-01".to_owned())]));
    let fields: Vec<_> = read.fields.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let at = conformance::RECEIVED_US / 1_000;
    assert_eq!(
        fields,
        [
            "any=21.0".to_owned(),
            format!("at={at}i"),
            "on=true".into(),
            r#"raw={"a": "b"}"#.into(),
            "whole=21i".into()
        ]
    );
    let free = config(json!({ "fields": { "v": "/v" } }));
    for (value, written) in [("true", "true"), ("-0.5", "-0.5"), (r#""a\"b\\""#, "a\"b\\"), ("[1]", "[1]")] {
        assert_eq!(point(&free, &format!(r#"{{"v":{value}}}"#)).unwrap().fields["v"], written);
    }
    for (payload, wanted) in [
        (r#"{"v": 21.5}"#, "field \"whole\": /v is not a whole number: 21.5"),
        (r#"{"v": 1e999}"#, "field \"any\": the payload is not JSON: number out of range"),
        (r#"{"v": NaN}"#, "the payload is not JSON"),
        (r#"{"on": "yes"}"#, "field \"on\": /on is not true or false: \"yes\""),
    ] {
        let reason = point_of(payload).unwrap_err();
        assert!(reason.contains(wanted), "{reason}");
    }
    let reason = point(&free, r#"{"w": 1}"#).unwrap_err();
    assert!(reason.starts_with("no field has a value") && reason.contains("`fields:`"), "{reason}");
}

/// Messages of one device and one time.
fn of_one_time(offsets: std::ops::Range<u64>) -> Rows {
    let mut all = batch(offsets.clone().map(|_| ("sensor-1", "1")));
    all.base = Offset(offsets.start);
    let mut rows = Rows::default();
    rows.push_batch(all);
    rows
}

#[test]
fn messages_of_one_time_are_points_of_their_own_and_the_same_ones_when_they_come_again() {
    let times = |config: &Config, rows: &Rows| -> Vec<i64> {
        points(config).lines(rows).text.lines().map(|line| Point::parse(line).time).collect()
    };
    let config = Config::default();
    let all = times(&config, &of_one_time(7..1_007));
    assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), 1_000);
    assert!(all.iter().all(|time| *time as u64 / 1_000 == conformance::RECEIVED_US));
    assert_eq!(times(&config, &of_one_time(500..600)), all[493..593], "however they are cut");
    // Several of one message, and those of the next ones.
    let mut made = batch((0..300).map(|_| ("sensor-1", "1")));
    made.entries.to_mut().iter_mut().enumerate().for_each(|(i, entry)| entry.offset = i as u32 / 10);
    let mut rows = Rows::default();
    rows.push_batch(made);
    assert_eq!(times(&config, &rows).iter().collect::<BTreeSet<_>>().len(), 300);
    for (precision, unit) in [(Precision::Us, 1), (Precision::Ms, 1_000), (Precision::S, 1_000_000)] {
        let config = Config { precision, spread: Spread::None, ..Config::default() };
        assert_eq!(times(&config, &of_one_time(0..1)), [conformance::RECEIVED_US as i64 / unit]);
    }
}

#[test]
fn a_time_that_influxdb_does_not_have_is_rejected() {
    let mut rows = Rows::default();
    let mut one = batch([("sensor-1", "1")]);
    for entry in one.entries.to_mut() {
        (entry.flags, entry.event_us) = (entry.flags | flags::EVENT_TIME, i64::MAX / 999);
    }
    rows.push_batch(one);
    let lines = points(&Config::default()).lines(&rows);
    assert!(
        lines.text.is_empty() && lines.rejected[0].reason.contains("outside of what InfluxDB"),
        "{lines:?}"
    );
}

#[tokio::test]
async fn points_that_the_server_does_not_take_are_found_and_the_others_written() {
    let server = Server::start().await;
    server.lock().refused = Some("device_id=bad");
    let bad = [3, 4, 250, 999];
    let rows = rows((0..1_000).map(|n| (if bad.contains(&n) { "bad" } else { "good" }, "1")));
    let put = server.put(&rows).await.unwrap();
    assert_eq!(put.rejected.iter().map(|row| row.row).collect::<Vec<_>>(), bad);
    assert!(put.rejected[0].reason.contains("partial write"), "{}", put.rejected[0].reason);
    assert_eq!((put.written.written, put.rejected[0].code.as_deref()), (996, Some("400")));
    let shared = server.lock();
    assert_eq!(shared.taken.iter().collect::<BTreeSet<_>>().len(), 996);
    assert!(shared.requests.len() <= 2 + bad.len() * 2 * 10, "{}", shared.requests.len());
}

#[tokio::test]
async fn what_is_too_large_is_tried_with_fewer_messages_and_one_alone_is_rejected() {
    let server = Server::start().await;
    server.lock().lines_max = Some(9);
    let error = server.put(&of_one_time(0..10)).await.unwrap_err();
    assert!(matches!(error, Error::TooMuch(_)), "{error:?}");
    assert_eq!(server.put(&of_one_time(0..9)).await.unwrap().written.written, 9);
    server.lock().lines_max = Some(0);
    let put = server.put(&of_one_time(0..1)).await.unwrap();
    assert!(matches!(&put.rejected[..], [RefusedRow { row: 0, reason, .. }] if reason.starts_with("413")));
}

#[tokio::test]
async fn an_answer_is_told_as_what_it_asks_for() {
    let server = Server::start().await;
    let (one, body) = (of_one_time(0..1), r#"{"error":"so it is"}"#);
    for (status, wanted) in [
        (401, "setup: 401 Unauthorized: so it is: correct the token"),
        (403, "setup: 403 Forbidden: so it is: correct the token"),
        (404, "setup: 404 Not Found: so it is: create it (CREATE DATABASE \"iot\")"),
        (405, "setup: 405 Method Not Allowed: so it is: correct `url`"),
        (500, "retry: 500 Internal Server Error: so it is"),
        (503, "retry: 503 Service Unavailable: so it is"),
        (400, "doubtful: 400 Bad Request: so it is"),
    ] {
        let mut target = server.target();
        target.open().await.unwrap();
        server.answers(status, body, &[]);
        let told = match target.put(&one).await.unwrap_err() {
            Error::Setup(reason) => format!("setup: {reason}"),
            Error::Retry(reason) => format!("retry: {reason}"),
            Error::Doubtful { context, reason } => format!("doubtful: {context}: {reason}"),
            other => panic!("{other:?}"),
        };
        let told = told.replace(&format!("{}: ", server.url), "");
        assert!(told.starts_with(wanted), "{told}");
    }
    // A place that is not there is found before the first message.
    server.answers(404, r#"{"error":"database not found"}"#, &[]);
    assert!(matches!(server.target().open().await, Err(Error::Setup(_))));
    server.answers(400, r#"{"code":"invalid","message":"no points"}"#, &[]);
    server.target().open().await.expect("version 2 and 3 want points, last of all");
}

#[tokio::test]
async fn a_server_that_asks_for_time_is_sent_nothing_until_then() {
    let server = Server::start().await;
    let mut target = server.target();
    target.open().await.unwrap();
    server.answers(429, "", &[("retry-after", "60")]);
    assert!(matches!(target.put(&of_one_time(0..1)).await, Err(Error::Retry(_))));
    let requests = server.lock().requests.len();
    for _ in 0..2 {
        let Err(Error::Retry(reason)) = target.open().await else { panic!("it is not a minute later") };
        assert!(reason.contains("Retry-After"), "{reason}");
    }
    assert_eq!(server.lock().requests.len(), requests);
}

#[tokio::test]
async fn a_server_that_does_not_answer_in_time_is_sent_fewer_points() {
    let mut server = Server::start().await;
    server.config.timeout = Period(Duration::from_millis(50));
    server.lock().is_silent = true;
    let error = server.put(&of_one_time(0..2)).await.unwrap_err();
    assert!(matches!(&error, Error::TooMuch(reason) if reason.contains("no answer")), "{error:?}");
}

#[tokio::test]
async fn a_connection_that_the_server_has_closed_is_opened_again_at_once() {
    let server = Server::start().await;
    let mut target = server.target();
    target.open().await.unwrap();
    server.answers(204, "", &[("connection", "close")]);
    target.put(&of_one_time(0..1)).await.unwrap();
    assert_eq!(target.put(&of_one_time(1..2)).await.unwrap().written.written, 1);
}

#[tokio::test]
async fn what_is_sent_says_who_asks_and_is_compressed() {
    let mut server = Server::start().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("secret");
    std::fs::write(&file, "s3cret\n").unwrap();
    let secret = || Some(crate::sinks::Password::File(file.clone()));
    let v2 = Config {
        version: 2,
        database: None,
        org: Some("acme".to_owned()),
        bucket: Some("iot".to_owned()),
        token: secret(),
        ..server.config.clone()
    };
    let v3 = Config { version: 3, token: secret(), ..server.config.clone() };
    let v1 = Config { user: Some("ann".to_owned()), password: secret(), ..server.config.clone() };
    for (config, path, authorization) in [
        (v1, "/write?db=iot&precision=ns", "Basic YW5uOnMzY3JldA=="),
        (v2, "/api/v2/write?org=acme&bucket=iot&precision=ns", "Token s3cret"),
        (v3, "/api/v3/write_lp?db=iot&precision=nanosecond", "Bearer s3cret"),
    ] {
        server.config = config;
        server.put(&of_one_time(0..100)).await.unwrap();
        let shared = server.lock();
        let (asked, headers, lines) = shared.requests.last().unwrap();
        assert_eq!((&**asked, *lines), (path, 100));
        assert_eq!(
            (&headers["authorization"], &headers["content-encoding"]),
            (&authorization.parse().unwrap(), &"gzip".parse().unwrap())
        );
    }
    assert_eq!(server.lock().taken.len(), 300);
}

#[tokio::test]
async fn rejected_rows_wait_for_finish_and_come_again_as_the_same_points_if_it_does_not_come() {
    let server = Server::start().await;
    let mut sink = Database::sink(&server).await;
    sink.open(&claim(), None).await.unwrap();
    let bad = rows([("a", "1"), ("b", "\"hot\""), ("c", "3")]);
    for _ in 0..2 {
        let outcome = sink.commit(&bad, &[advance(0, 0, 3)]).await.unwrap();
        assert!(matches!(outcome, Outcome::Rejected(rejected) if rejected.len() == 1));
    }
    sink.finish().await.unwrap();
    let shared = server.lock();
    assert_eq!((shared.taken.len(), shared.taken.iter().collect::<BTreeSet<_>>().len()), (4, 2));
}

#[test]
fn everything_wrong_is_said_at_once() {
    let said = |json| {
        let mut problems = Problems::default();
        config(json).validate(&KeyPath::root().key("s"), &mut problems);
        let mut said: Vec<_> =
            problems.into_vec().iter().map(|problem| problem.path.as_str().to_owned()).collect();
        said.sort();
        said
    };
    assert!(said(json!({ "url": "http://h:8086", "version": 1, "database": "iot" })).is_empty());
    let wrong = json!({
        "url": "ftp://h", "version": 2, "database": "iot", "org": "acme", "token": { "env": "" }, "user": "ann",
        "measurement": "#x", "tags": { "time": "$device", "a": "$device", "c": { "from": "/c", "type": "double" } },
        "fields": { "_value": "/v", "a": "/a", "b": { "from": "/b", "type": "bytes" } },
        "precision": "ms", "timeout": "0s",
    });
    assert_eq!(
        said(wrong),
        [
            "s.bucket",
            "s.database",
            "s.fields._value",
            "s.fields.a",
            "s.fields.b.type",
            "s.measurement",
            "s.spread",
            "s.tags.c.type",
            "s.tags.time",
            "s.timeout",
            "s.token",
            "s.token.env",
            "s.url",
            "s.user",
        ]
    );
    assert_eq!(
        said(json!({ "url": "http://h/?db=x", "version": 4, "tls": { "ca": "ca.pem" } })),
        ["s.url", "s.version"]
    );
}
