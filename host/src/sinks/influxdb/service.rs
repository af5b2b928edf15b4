//! The HTTP API of the versions: the path, the headers, and the meaning of answers.

use std::io::Write;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use http_body_util::Full;
use hyper::header::{AUTHORIZATION, CONTENT_ENCODING, CONTENT_TYPE, HOST, RETRY_AFTER, USER_AGENT};
use hyper::{HeaderMap, Request, StatusCode, Uri};
use jiff::Timestamp;
use jiff::fmt::rfc2822;
use serde_json::Value;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::config::{Config, Precision};
use crate::files;
use crate::http_client::{self, Address, Answer, Connection};
use crate::sinks::Error;
use crate::sinks::columns::excerpt;

const ANSWER_BYTES_MAX: usize = 1 << 20;
/// Smallest body that is compressed.
const GZIP_BYTES_MIN: usize = 1_024;
/// Longest wait that a server may request.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(300);

/// Address and credentials of the server.
pub struct Service {
    config: Config,
    /// Path of the API with its query.
    path: String,
}

/// A connection with its credentials.
pub struct Client {
    connection: Connection,
    authority: String,
    authorization: Option<String>,
    /// Whether a request was answered on the connection, so that the server may have closed it since.
    is_used: bool,
}

/// Meaning of an answer.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// All points are stored.
    Written,
    /// Some of the points were rejected, the others are stored.
    Rejected(String),
    /// The request was rejected, and the answer does not attribute this to the contents of points.
    Refused(String),
    /// The request is larger than the server accepts.
    TooLarge(String),
    /// An operator must act.
    Setup(StatusCode, String),
    /// The error may be temporary. The server may state how long to wait.
    Later(String, Option<Duration>),
}

impl Service {
    pub fn new(config: &Config) -> Self {
        let base = config.url.parse::<Uri>().map_or(String::new(), |uri| uri.path().to_owned());
        Self { path: format!("{}{}", base.trim_end_matches('/'), api(config)), config: config.clone() }
    }

    /// Reads the certificates now, so that a renewed certificate is used at the next connect.
    pub fn connector(&self) -> Result<TlsConnector, String> {
        let file = self.config.ca_file()?;
        let named = |reason: String| format!("{}: {reason}", file.display());
        let pem = files::read(&file).map_err(|error| named(error.to_string()))?;
        http_client::connector(&pem).map_err(named)
    }

    pub async fn connect(&self) -> Result<Client, Error> {
        let address = Address::parse(&self.config.url).map_err(Error::Setup)?;
        let authorization = self.authorization().map_err(Error::Setup)?;
        let tls = address.tls.is_some().then(|| self.connector()).transpose().map_err(Error::Setup)?;
        let limit = self.config.connect_timeout;
        let connected = timeout(limit.0, Connection::open(&address, tls.as_ref())).await;
        let silent = |_| Error::Retry(format!("cannot connect: no answer for {limit}"));
        let failed = |reason| Error::Retry(format!("cannot connect: {reason}"));
        let connection = connected.map_err(silent)?.map_err(failed)?;
        Ok(Client { connection, authority: address.authority, authorization, is_used: false })
    }

    fn authorization(&self) -> Result<Option<String>, String> {
        let Config { token, user, password, version, .. } = &self.config;
        if let Some(token) = token {
            let scheme = if *version == 2 { "Token" } else { "Bearer" };
            return Ok(Some(format!("{scheme} {}", token.read("token")?)));
        }
        let (Some(user), Some(password)) = (user, password) else { return Ok(None) };
        let shown = format!("{user}:{}", password.read("password")?);
        Ok(Some(format!("Basic {}", BASE64_STANDARD.encode(shown))))
    }

    /// Sends lines. If the server has closed an idle connection, the lines are sent on a new one.
    pub async fn write(&self, client: &mut Option<Client>, lines: &Bytes) -> Result<Verdict, Error> {
        let is_compressed = self.config.gzip && lines.len() >= GZIP_BYTES_MIN;
        let body = match is_compressed {
            true => compressed(lines.clone()).await,
            false => lines.clone(),
        };
        loop {
            let mut open = match client.take().filter(|client| client.connection.is_open()) {
                Some(open) => open,
                None => self.connect().await?,
            };
            let request = self.request(&open, body.clone(), is_compressed)?;
            let answered =
                timeout(self.config.timeout.0, open.connection.ask(request, ANSWER_BYTES_MAX)).await;
            match answered {
                Ok(Ok(answer)) => {
                    open.is_used = true;
                    *client = Some(open);
                    return Ok(verdict(&answer, self.config.version));
                }
                Ok(Err(_)) if open.is_used => {}
                Ok(Err(reason)) => return Err(Error::Retry(format!("no answer: {reason}"))),
                Err(_) => {
                    let limit = self.config.timeout;
                    return Err(Error::TooMuch(format!(
                        "no answer to {} bytes of points for {limit}",
                        lines.len()
                    )));
                }
            }
        }
    }

    fn request(
        &self,
        client: &Client,
        body: Bytes,
        is_compressed: bool,
    ) -> Result<Request<Full<Bytes>>, Error> {
        let mut request = Request::post(&self.path)
            .header(HOST, &client.authority)
            .header(USER_AGENT, concat!("headworks/", env!("CARGO_PKG_VERSION")))
            .header(CONTENT_TYPE, "text/plain; charset=utf-8");
        if is_compressed {
            request = request.header(CONTENT_ENCODING, "gzip");
        }
        if let Some(authorization) = &client.authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        // The error does not hold the header: it may be a secret.
        request.body(Full::new(body)).map_err(|_| {
            Error::Setup(
                "the token, or the user and password, cannot be in a request: it may contain a line end"
                    .to_owned(),
            )
        })
    }

    /// Returns what an operator can do about an answer with this status.
    pub fn advice(&self, status: StatusCode) -> String {
        let Config { version, database, org, bucket, .. } = &self.config;
        let name = |name: &Option<String>| name.clone().unwrap_or_default();
        match (status, version) {
            (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, _) => {
                "correct the token, or user and password, and give it the right to write".to_owned()
            }
            (StatusCode::NOT_FOUND, 1) => {
                format!("create it (CREATE DATABASE \"{}\"), or correct `database`", name(database))
            }
            (StatusCode::NOT_FOUND, 2) => format!(
                "create it (influx bucket create --org {} --name {}), or correct `org` and `bucket`",
                name(org),
                name(bucket)
            ),
            (StatusCode::NOT_FOUND, _) => {
                format!("create it (influxdb3 create database {}), or correct `database`", name(database))
            }
            _ => "correct `url` and `version`".to_owned(),
        }
    }
}

async fn compressed(lines: Bytes) -> Bytes {
    let compress = move || {
        let mut gzip = GzEncoder::new(Vec::with_capacity(lines.len() / 4), Compression::fast());
        gzip.write_all(&lines).and_then(|()| gzip.finish()).expect("a Vec takes it").into()
    };
    // Not on a thread that others wait for: it may be megabytes.
    tokio::task::spawn_blocking(compress).await.expect("it does not panic")
}

fn api(config: &Config) -> String {
    let one = |key: &str, value: &Option<String>| {
        value.as_ref().map(|value| format!("{key}={}&", encoded(value))).unwrap_or_default()
    };
    let Config { database, retention_policy, org, bucket, precision, .. } = config;
    match config.version {
        1 => {
            let unit = match precision {
                Precision::Ns => "ns",
                Precision::Us => "u",
                Precision::Ms => "ms",
                Precision::S => "s",
            };
            format!("/write?{}{}precision={unit}", one("db", database), one("rp", retention_policy))
        }
        2 => {
            let unit = match precision {
                Precision::Ns => "ns",
                Precision::Us => "us",
                Precision::Ms => "ms",
                Precision::S => "s",
            };
            format!("/api/v2/write?{}{}precision={unit}", one("org", org), one("bucket", bucket))
        }
        _ => {
            let unit = match precision {
                Precision::Ns => "nanosecond",
                Precision::Us => "microsecond",
                Precision::Ms => "millisecond",
                Precision::S => "second",
            };
            format!("/api/v3/write_lp?{}precision={unit}", one("db", database))
        }
    }
}

/// Percent-encodes a text for a query, leaving the unreserved characters of RFC 3986, 2.3.
fn encoded(text: &str) -> String {
    let mut query = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                query.push(char::from(byte))
            }
            other => query.push_str(&format!("%{other:02X}")),
        }
    }
    query
}

/// Returns the meaning of an answer.
fn verdict(answer: &Answer, version: u8) -> Verdict {
    let reason = reason(answer);
    match answer.status.as_u16() {
        200..=299 => Verdict::Written,
        422 => Verdict::Rejected(reason),
        400 if is_of_points(&reason, version) => Verdict::Rejected(reason),
        400 => Verdict::Refused(reason),
        413 => Verdict::TooLarge(reason),
        408 | 429 | 500..=599 => Verdict::Later(reason, retry_after(&answer.headers)),
        _ => Verdict::Setup(answer.status, reason),
    }
}

/// Returns whether an answer says that some of the points were rejected, and the others stored.
fn is_of_points(reason: &str, version: u8) -> bool {
    // InfluxDB 1: "partial write: field type conflict: …", "unable to parse '…': …"; 2: the same in its
    // message; 3: "partial write of line protocol occurred".
    let said = ["partial write", "unable to parse", "field type conflict", "dropped="];
    said.iter().any(|said| reason.contains(said)) || version == 3 && reason.contains("line protocol")
}

/// Returns the reason: `400 Bad Request: partial write: …`
fn reason(answer: &Answer) -> String {
    let json: Option<Value> = serde_json::from_slice(&answer.body).ok();
    let text = |key: &str| json.as_ref()?.get(key)?.as_str().map(str::to_owned);
    let of_line = || json.as_ref()?.pointer("/data/0/error_message")?.as_str().map(str::to_owned);
    let said = text("error").or_else(|| text("message"));
    let said = match (said, of_line()) {
        (Some(said), Some(line)) => Some(format!("{said}: {line}")),
        (said, line) => said.or(line),
    };
    let said = said.filter(|said| !said.is_empty()).unwrap_or_else(|| excerpt(answer.body.trim_ascii()));
    let status: StatusCode = answer.status;
    if said.is_empty() { status.to_string() } else { format!("{status}: {}", excerpt_of(&said)) }
}

/// Returns a server's text, cut to a length for dead letters and log lines.
fn excerpt_of(text: &str) -> String {
    const SHOWN_CHARS: usize = 400;
    let mut shown: String =
        text.chars().take(SHOWN_CHARS).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    shown
}

/// Returns the time to wait, from seconds or a date (RFC 9110, 10.2.3).
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let wait = match value.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => {
            let at = rfc2822::DateTimeParser::new().parse_timestamp(value).ok()?;
            Duration::try_from(at.duration_since(Timestamp::now())).ok()?
        }
    };
    Some(wait.min(RETRY_AFTER_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, body: &str) -> Answer {
        let status = StatusCode::from_u16(status).unwrap();
        Answer { status, headers: HeaderMap::new(), body: Bytes::from(body.to_owned()) }
    }

    #[test]
    fn points_go_to_the_address_of_their_version() {
        let named = |name: &str| Some(name.to_owned());
        let config = |version, url: &str| Config {
            url: url.to_owned(),
            version,
            database: named("iot/a b"),
            retention_policy: named("rp"),
            org: named("acme"),
            bucket: named("b&c"),
            ..Config::default()
        };
        let path = |config: &Config| Service::new(config).path;
        for (version, url, wanted) in [
            (1, "http://h", "/write?db=iot%2Fa%20b&rp=rp&precision=ns"),
            (1, "http://h/insert/0/", "/insert/0/write?db=iot%2Fa%20b&rp=rp&precision=ns"),
            (2, "https://h:1/", "/api/v2/write?org=acme&bucket=b%26c&precision=ns"),
            (3, "http://h", "/api/v3/write_lp?db=iot%2Fa%20b&precision=nanosecond"),
        ] {
            assert_eq!(path(&config(version, url)), wanted);
        }
        let coarse = Config { precision: Precision::Us, ..config(1, "http://h") };
        assert!(path(&coarse).ends_with("precision=u"));
    }

    #[test]
    fn an_answer_says_what_is_done_next() {
        let of = |status, body: &str| verdict(&answer(status, body), 1);
        assert_eq!(of(204, ""), Verdict::Written);
        let rejected = [
            (400, r#"{"error":"partial write: field type conflict: input field \"v\" … dropped=1"}"#),
            (400, r#"{"error":"unable to parse 'x': missing fields"}"#),
            (400, r#"{"code":"invalid","message":"unable to parse 'x': missing fields"}"#),
            (400, r#"{"error":"partial write of line protocol occurred","data":[{"error_message":"no"}]}"#),
            (422, r#"{"code":"unprocessable entity","message":"dropped 1 points outside retention policy"}"#),
        ];
        for (status, body) in rejected {
            assert!(matches!(of(status, body), Verdict::Rejected(_)), "{body}");
        }
        assert!(
            matches!(of(400, "bad gateway config"), Verdict::Refused(reason) if reason.ends_with("bad gateway config"))
        );
        assert!(matches!(of(413, ""), Verdict::TooLarge(_)));
        for status in [401, 403, 404, 405, 301] {
            assert!(matches!(of(status, ""), Verdict::Setup(..)), "{status}");
        }
        for status in [429, 500, 502, 503, 504] {
            assert!(matches!(of(status, ""), Verdict::Later(_, None)), "{status}");
        }
    }

    #[test]
    fn a_server_says_when_to_come_back() {
        let after = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, value.parse().unwrap());
            retry_after(&headers)
        };
        assert_eq!(after("7"), Some(Duration::from_secs(7)));
        assert_eq!(after("999999"), Some(RETRY_AFTER_MAX));
        assert_eq!(after("soon"), None);
        assert_eq!(after("Wed, 21 Oct 2015 07:28:00 GMT"), None, "it is over");
        assert!(after("Wed, 21 Oct 2099 07:28:00 GMT").is_some());
    }
}
