//! An external check by HTTP/1.1: one request for one connect, its answer kept
//! for a while. What is not a clear answer refuses.

use std::collections::BTreeMap;
use std::time::Instant;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::config;
use super::recent::Recent;
use super::{Credentials, Denied, Identity, jwt};
use crate::telemetry::Failures;

const ANSWER_BYTES_MAX: usize = 1 << 20;

pub struct Http {
    config: config::Http,
    uri: Uri,
    authority: String,
    answers: Recent<Identity>,
    requests: Semaphore,
    failures: Failures,
}

#[derive(Deserialize)]
struct Answer {
    allow: Option<bool>,
    #[serde(default)]
    superuser: bool,
    rules: Option<Value>,
    #[serde(default)]
    fields: BTreeMap<String, String>,
}

/// `host:port` of a URL.
pub fn address(url: &str) -> Result<String, String> {
    let wanted = || format!("must be http://host:port/path, is \"{url}\"");
    let uri: Uri = url.parse().map_err(|_| wanted())?;
    let host = uri.host().filter(|_| uri.scheme_str() == Some("http")).ok_or_else(wanted)?;
    if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        return Err("must have no user and password in it: they would not be sent".to_owned());
    }
    Ok(format!("{host}:{}", uri.port_u16().unwrap_or(80)))
}

impl Http {
    pub fn new(config: &config::Http, failures: Failures) -> Result<Self, String> {
        Ok(Self {
            authority: address(&config.url)?,
            uri: config.url.parse().map_err(|_| "not a URL".to_owned())?,
            answers: Recent::new(config.cache_entries_max as usize, config.cache_ttl.0),
            requests: Semaphore::new(config.requests_max as usize),
            failures,
            config: config.clone(),
        })
    }

    /// `None` where the service does not know the client, or cannot be told its
    /// password: JSON is text.
    pub async fn check(&self, who: &Credentials<'_>) -> Result<Option<Identity>, Denied> {
        let user = who.username.unwrap_or_default();
        let ip = who.ip.to_string();
        let password = who.password.unwrap_or_default();
        if std::str::from_utf8(password).is_err() {
            return Ok(None);
        }
        let told = [who.username.is_some() as u8, who.password.is_some() as u8];
        let parts = [who.client_id.as_bytes(), user.as_bytes(), password, ip.as_bytes(), &told];
        let fingerprint = self.answers.fingerprint(&parts);
        if let Some(identity) = self.answers.get(&fingerprint, Instant::now()) {
            return Ok(Some(identity));
        }
        let unavailable = |kind: &str, reason: &str| {
            self.failures.report(kind, 1, &format!("{}: {reason}", self.config.url), "");
            Denied::Unavailable("http")
        };
        let asked = timeout(self.config.timeout.0, self.ask(who)).await;
        let answer = asked.unwrap_or_else(|_| Err("no answer in time".to_owned())).map_err(|reason| {
            unavailable("access: the HTTP check did not answer, clients are refused", &reason)
        })?;
        match answer.allow {
            None => Ok(None),
            Some(false) => Err(Denied::BadCredentials),
            Some(true) => {
                let rules = answer.rules.as_ref().map_or(Some(Vec::new()), jwt::read_rules);
                let rules = rules.ok_or_else(|| {
                    let kind =
                        "access: the HTTP check answered with rules that cannot be used, clients are refused";
                    unavailable(
                        kind,
                        "each is as in access.rules of the config, its topics filters, at most 1000",
                    )
                })?;
                let name = who.username.map(Into::into);
                let identity = Identity {
                    name,
                    fields: answer.fields,
                    rules,
                    superuser: answer.superuser,
                    ..Identity::default()
                };
                self.answers.put(fingerprint, identity.clone(), Instant::now());
                Ok(Some(identity))
            }
        }
    }

    async fn ask(&self, who: &Credentials<'_>) -> Result<Answer, String> {
        let _turn = self.requests.acquire().await.map_err(|error| error.to_string())?;
        let body = json!({
            "action": "connect",
            "client_id": who.client_id,
            "username": who.username,
            "password": who.password.map(String::from_utf8_lossy),
            "ip": who.ip.to_string(),
        });
        let request = Request::post(self.uri.path_and_query().map_or("/", |path| path.as_str()))
            .header(HOST, &self.authority)
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body.to_string())))
            .map_err(|error| error.to_string())?;
        let socket = TcpStream::connect(&self.authority).await.map_err(|error| error.to_string())?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(socket))
            .await
            .map_err(|error| error.to_string())?;
        let exchange = async {
            let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
            if response.status() != StatusCode::OK {
                return Err(format!("answered {}", response.status()));
            }
            let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
            let body = body.map_err(|error| error.to_string())?.to_bytes();
            serde_json::from_slice(&body).map_err(|error| format!("its answer: {error}"))
        };
        tokio::pin!(connection, exchange);
        // Driven here, so that both end with this request.
        tokio::select! {
            biased;
            answer = &mut exchange => answer,
            ended = &mut connection => match ended {
                Ok(()) => exchange.await,
                Err(error) => Err(error.to_string()),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::mpsc;

    use super::*;

    /// A service that lets everybody in, and what it is asked.
    async fn service() -> (Http, mpsc::Receiver<Value>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let (ask, asked) = mpsc::channel(9);
        tokio::spawn(async move {
            loop {
                let (mut io, _) = listener.accept().await.unwrap();
                let mut request = Vec::new();
                while !request.ends_with(b"}") {
                    io.read_buf(&mut request).await.unwrap();
                }
                let body = request.split_at(request.windows(4).position(|end| end == b"\r\n\r\n").unwrap()).1;
                ask.send(serde_json::from_slice(body).unwrap()).await.unwrap();
                io.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 14\r\n\r\n{\"allow\":true}").await.unwrap();
            }
        });
        let config = serde_json::from_value(json!({ "url": url })).unwrap();
        (Http::new(&config, Failures::default()).unwrap(), asked)
    }

    fn who<'a>(username: Option<&'a str>, password: &'a [u8]) -> Credentials<'a> {
        Credentials {
            client_id: "c",
            username,
            password: Some(password),
            certificate: None,
            ip: IpAddr::V4(Ipv4Addr::LOCALHOST),
            allow_anonymous: false,
        }
    }

    #[tokio::test]
    async fn an_answer_for_an_empty_user_name_is_none_for_a_missing_one() {
        let (http, mut asked) = service().await;
        for username in [Some(""), None, Some(""), None] {
            let identity = http.check(&who(username, b"x")).await.unwrap().unwrap();
            assert_eq!(identity.name.as_deref(), username);
        }
        let asked: Vec<_> = [asked.recv().await.unwrap(), asked.recv().await.unwrap()].into();
        assert_eq!((&asked[0]["username"], &asked[1]["username"]), (&json!(""), &Value::Null));
    }

    #[tokio::test]
    async fn a_password_that_is_no_text_is_not_told_as_another() {
        let (http, mut asked) = service().await;
        assert!(http.check(&who(Some("ann"), b"\xff")).await.unwrap().is_none());
        assert!(asked.try_recv().is_err());
    }

    #[test]
    fn a_url_with_what_would_not_be_sent_is_refused() {
        assert_eq!(address("http://auth:8080/check").as_deref(), Ok("auth:8080"));
        for bad in ["http://user:secret@auth/check", "https://auth/check", "auth:8080"] {
            let told = address(bad).unwrap_err();
            assert!(!told.contains("secret") && told.starts_with("must "), "{told}");
        }
    }
}
