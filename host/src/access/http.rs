//! Authentication by an external service over HTTP/1.1, with or without TLS. Each connecting client
//! causes one request, whose answer is cached. An unclear answer refuses the client.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Request, StatusCode, Uri};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::config;
use super::fair::{Crowded, Fair, Source};
use super::recent::Recent;
use super::watched::Watched;
use super::{Credentials, Denied, Identity, jwt};
use crate::hints::Hint;
use crate::http_client::{Address, Connection, connector};
use crate::telemetry::{Failures, alike};
use crate::trust;

/// First words of the subjects of its failures.
const SUBJECT: &str = "access: the HTTP check ";
const ANSWER_BYTES_MAX: usize = 1 << 20;
/// Most requests that wait for their turn.
const WAITING_MAX: usize = 1_024;
const CA_FILE_BYTES_MAX: u64 = 16 << 20;

pub struct Http {
    config: config::Http,
    uri: Uri,
    /// The URL without its query, which may contain keys.
    service: String,
    address: Address,
    /// TLS settings, for https.
    trusted: Option<Arc<Watched<TlsConnector>>>,
    answers: Recent<Identity>,
    requests: Arc<Fair>,
    /// Whether the last answer was unusable or missing.
    fails: AtomicBool,
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

/// Returns the part of a URL that may be logged.
fn service_of(uri: &Uri) -> String {
    let authority = uri.authority().map_or("", |authority| authority.as_str());
    format!("{}://{authority}{}", uri.scheme_str().unwrap_or_default(), uri.path())
}

impl Http {
    pub fn new(config: &config::Http, failures: Failures) -> Result<Self, String> {
        let address = Address::parse(&config.url)?;
        let uri: Uri = config.url.parse().map_err(|_| "not a URL".to_owned())?;
        let trusted = address.tls.as_ref().map(|_| {
            let file = trust::ca_file(config.ca.as_deref()).map_err(|reason| format!("{reason} in `ca`"))?;
            Watched::open(&file, CA_FILE_BYTES_MAX, failures.clone(), connector).map(Arc::new)
        });
        Ok(Self {
            address,
            trusted: trusted.transpose()?,
            answers: Recent::new(config.cache_entries_max as usize, config.cache_ttl.0),
            requests: Fair::new(config.requests_max as usize),
            fails: AtomicBool::new(false),
            service: service_of(&uri),
            uri,
            failures,
            config: config.clone(),
        })
    }

    /// Asks the service about a client. Returns `None` if the service does not know the client, or if
    /// the password cannot be sent, because JSON is text. Clients without credentials are not asked
    /// about if the listener does not serve them.
    pub async fn check(&self, who: &Credentials<'_>) -> Result<Option<Identity>, Denied> {
        if who.shows_nothing() && !who.allow_anonymous {
            return Ok(None);
        }
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
        let failed = |kind: &str, reason: &str| {
            let show = self.failures.hint(Hint::ClientsRefused);
            self.fails.store(true, Ordering::Relaxed);
            // Each reason has a line: the first one, such as no answer in time, may be the least of them.
            self.failures.report_by(kind, &alike(reason), 1, &format!("{}: {reason}", self.service), &show);
            Denied::Failed("http")
        };
        let user = who.username.unwrap_or(who.client_id);
        let place = self.requests.enter(Source::of(who.ip), user, WAITING_MAX).await;
        let place = place.map_err(|Crowded| Denied::Unavailable("http"))?;
        let asked = timeout(self.config.timeout.0, self.ask(who)).await;
        drop(place);
        let answer = asked.unwrap_or_else(|_| Err("no answer in time".to_owned())).map_err(|reason| {
            failed("access: the HTTP check gave no answer that can be used, clients are refused", &reason)
        })?;
        if self.fails.swap(false, Ordering::Relaxed) {
            self.failures.end(SUBJECT);
            tracing::info!(service = self.service, "access: the HTTP check answers again");
        }
        match answer.allow {
            None => Ok(None),
            Some(false) => Err(Denied::BadCredentials),
            Some(true) => {
                let rules = answer.rules.as_ref().map_or(Some(Vec::new()), jwt::read_rules);
                let rules = rules.ok_or_else(|| {
                    let kind =
                        "access: the HTTP check answered with rules that cannot be used, clients are refused";
                    failed(kind, "each is as in access.rules of the config, its topics filters, at most 1000")
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
        let body = json!({
            "action": "connect",
            "client_id": who.client_id,
            "username": who.username,
            "password": who.password.map(String::from_utf8_lossy),
            "ip": who.ip.to_string(),
        });
        let request = Request::post(self.uri.path_and_query().map_or("/", |path| path.as_str()))
            .header(HOST, &self.address.authority)
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body.to_string())))
            .map_err(|error| error.to_string())?;
        let tls = match &self.trusted {
            None => None,
            Some(trusted) => {
                let trusted = trusted.clone();
                let connector = super::off_the_reactor(move || trusted.get()).await;
                Some(connector.map_err(|_| "the host stops".to_owned())?)
            }
        };
        let mut connection = Connection::open(&self.address, tls.as_deref()).await?;
        let answer = connection.ask(request, ANSWER_BYTES_MAX).await?;
        if answer.status != StatusCode::OK {
            return Err(format!("answered {}", answer.status));
        }
        serde_json::from_slice(&answer.body).map_err(|error| format!("its answer: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio::sync::mpsc;
    use tokio_rustls::TlsAcceptor;

    use super::super::watched::put;
    use super::*;
    use crate::access::Entrance;

    fn authority() -> (Issuer<'static, KeyPair>, String) {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        (Issuer::new(params, key), pem)
    }

    fn acceptor(ca: &Issuer<'static, KeyPair>) -> TlsAcceptor {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap().signed_by(&key, ca);
        let chain = vec![CertificateDer::from_pem_slice(certificate.unwrap().pem().as_bytes()).unwrap()];
        let key = PrivateKeyDer::from_pem_slice(key.serialize_pem().as_bytes()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key);
        TlsAcceptor::from(Arc::new(config.unwrap()))
    }

    #[tokio::test]
    async fn an_https_check_is_asked_only_where_its_certificate_is_trusted() {
        let ((ca, ca_pem), (_, other_pem)) = (authority(), authority());
        let (service, acceptor) = (TcpListener::bind("127.0.0.1:0").await.unwrap(), acceptor(&ca));
        let url = format!("https://{}/auth", service.local_addr().unwrap());
        let serving = tokio::spawn(async move {
            loop {
                let Ok(mut io) = acceptor.accept(service.accept().await.unwrap().0).await else { continue };
                let mut request = Vec::new();
                while !request.ends_with(b"}") {
                    io.read_buf(&mut request).await.unwrap();
                }
                let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 14\r\n\r\n{\"allow\":true}";
                io.write_all(answer).await.unwrap();
                io.shutdown().await.unwrap();
            }
        });
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ca.pem");
        std::fs::write(&file, ca_pem).unwrap();
        let config = serde_json::json!({ "url": url, "ca": file, "cache_ttl": "0s", "timeout": "30s" });
        let check = Http::new(&serde_json::from_value(config).unwrap(), Failures::default()).unwrap();
        let entrance = Entrance::default();
        let who = who(Some("ann"), b"x", &entrance);
        assert_eq!(check.check(&who).await.unwrap().unwrap().name.as_deref(), Some("ann"));
        // A changed file counts at once; a broken one changes nothing.
        put(&file, "no certificate");
        assert!(check.check(&who).await.is_ok());
        put(&file, other_pem);
        assert_eq!(check.check(&who).await.err(), Some(Denied::Failed("http")));
        serving.abort();
    }

    /// A service that lets everybody in, and what it is asked.
    async fn service() -> (Http, mpsc::Receiver<Value>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
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

    fn who<'a>(username: Option<&'a str>, password: &'a [u8], entrance: &'a Entrance) -> Credentials<'a> {
        Credentials {
            client_id: "c",
            username,
            password: Some(password),
            certificate: None,
            proof: None,
            certificates: &[],
            ip: IpAddr::V4(Ipv4Addr::LOCALHOST),
            is_connected: false,
            entrance,
            allow_anonymous: false,
        }
    }

    #[tokio::test]
    async fn an_answer_for_an_empty_user_name_is_none_for_a_missing_one() {
        let (http, mut asked) = service().await;
        for username in [Some(""), None, Some(""), None] {
            let identity = http.check(&who(username, b"x", &Entrance::default())).await.unwrap().unwrap();
            assert_eq!(identity.name.as_deref(), username);
        }
        let asked: Vec<_> = [asked.recv().await.unwrap(), asked.recv().await.unwrap()].into();
        assert_eq!((&asked[0]["username"], &asked[1]["username"]), (&json!(""), &Value::Null));
    }

    #[tokio::test]
    async fn a_password_that_is_no_text_is_not_told_as_another() {
        let (http, mut asked) = service().await;
        assert!(http.check(&who(Some("ann"), b"\xff", &Entrance::default())).await.unwrap().is_none());
        assert!(asked.try_recv().is_err());
    }

    #[test]
    fn a_services_key_is_no_part_of_its_name() {
        let of = |url: &str| service_of(&url.parse().unwrap());
        assert_eq!(of("https://auth:8443/check?api_key=secret"), "https://auth:8443/check");
    }

    #[tokio::test]
    async fn a_client_that_shows_nothing_is_asked_for_only_where_such_clients_are_served() {
        let (http, mut asked) = service().await;
        let entrance = Entrance::default();
        let nothing = Credentials { password: None, ..who(None, b"", &entrance) };
        assert!(http.check(&nothing).await.unwrap().is_none());
        assert!(asked.try_recv().is_err());
        assert!(http.check(&Credentials { allow_anonymous: true, ..nothing }).await.unwrap().is_some());
    }

    /// A service that answers each request with the next of these.
    async fn answering(answers: Vec<String>) -> Http {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        tokio::spawn(async move {
            for answer in answers {
                let (mut io, _) = listener.accept().await.unwrap();
                let mut request = Vec::new();
                while !request.ends_with(b"}") {
                    io.read_buf(&mut request).await.unwrap();
                }
                // A client that has read enough is gone.
                drop(io.write_all(answer.as_bytes()).await);
            }
        });
        Http::new(&serde_json::from_value(json!({ "url": url })).unwrap(), Failures::default()).unwrap()
    }

    /// A status is not hidden behind an answer that came too late, and a service that answers again is said.
    #[tokio::test]
    async fn each_reason_of_a_check_that_fails_has_a_line_of_its_own() {
        let answers = vec![
            "not HTTP".to_owned(),
            response("401 Unauthorized", ""),
            response("200 OK", r#"{"allow":true}"#),
        ];
        let http = answering(answers).await;
        let check = async || http.check(&who(Some("ann"), b"x", &Entrance::default())).await.is_ok();
        assert!(!check().await && !check().await);
        let unsaid: u64 = http.failures.unsaid().iter().map(|(_, count)| count).sum();
        assert_eq!(unsaid, 0, "both are said at once");
        assert!(check().await);
        assert_eq!(http.failures.unsaid(), [], "they have ended");
    }

    fn response(status: &str, body: &str) -> String {
        format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len())
    }

    #[tokio::test]
    async fn what_is_not_a_plain_yes_lets_nobody_in() {
        let yes = r#"{"allow":true}"#;
        let ok = |body: &str| response("200 OK", body);
        let answers = vec![
            response("302 Found\r\nlocation: /yes", yes),
            response("201 Created", yes),
            response("500 Internal Server Error", yes),
            ok(""),
            ok("true"),
            ok(r#"{"allow":"true"}"#),
            ok(r#"{"allow":1}"#),
            ok(r#"{"allow":false,"allow":true}"#),
            ok(r#"{"allow":true} x"#),
            ok(r#"{"allow":true,"rules":[{"effect":"allow","topics":["a/#/b"]}]}"#),
            ok(&format!("{{\"allow\":true,\"fields\":{{\"a\":\"{}\"}}}}", "x".repeat(3 << 20))),
            format!("HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{yes}"),
            "not HTTP".to_owned(),
        ];
        let count = answers.len();
        let http = answering(answers.clone()).await;
        for answer in &answers[..count] {
            let outcome = http.check(&who(Some("ann"), b"x", &Entrance::default())).await;
            assert_eq!(outcome.err(), Some(Denied::Failed("http")), "{answer:.200}");
        }
    }

    #[tokio::test]
    async fn answers_are_kept_apart_however_names_and_passwords_are_cut() {
        let (http, mut asked) = service().await;
        let entrance = Entrance::default();
        for (name, password) in [("a", "bc"), ("ab", "c"), ("abc", ""), ("a\r\nx: y", "bc")] {
            let identity = http.check(&who(Some(name), password.as_bytes(), &entrance)).await;
            assert_eq!(identity.unwrap().unwrap().name.as_deref(), Some(name));
            let asked = asked.try_recv().expect("it is another client");
            assert_eq!((&asked["username"], &asked["password"]), (&json!(name), &json!(password)));
        }
    }
}
