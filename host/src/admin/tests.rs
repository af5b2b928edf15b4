use std::collections::BTreeSet;
use std::future::pending;
use std::sync::Mutex;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::telemetry::Failures;

const TOKEN: &str = "0123456789abcdef0123456789abcdef";

#[derive(Default)]
struct Redriven(Mutex<Vec<RedriveRequest>>);

#[async_trait]
impl Redrive for Redriven {
    async fn redrive(&self, request: RedriveRequest) -> Result<RedriveAnswer, RedriveError> {
        if request.sink.as_deref() == Some("none") {
            return Err(RedriveError::NotFound("no sink `none`".to_owned()));
        }
        self.0.lock().unwrap().push(request);
        Ok(RedriveAnswer { sent: 3, refused: 1, ..RedriveAnswer::default() })
    }

    async fn discard(&self, request: RedriveRequest) -> Result<DiscardAnswer, RedriveError> {
        let discarded = request.ids.len() as u64;
        self.0.lock().unwrap().push(request);
        Ok(DiscardAnswer { discarded })
    }
}

/// Asks for a list that no socket takes at once.
const LARGE: &str = "large";
const LARGE_BYTES: usize = 16 << 20;

/// `pump-1`, connected, and [`STUCK`].
struct OneClient;

/// A client whose connection does not end.
const STUCK: &str = "stuck";

#[async_trait]
impl Clients for OneClient {
    fn list(&self, request: &ClientListRequest) -> ClientList {
        let ClientListRequest { prefix, max, .. } = request;
        if prefix == LARGE {
            return ClientList { found: 1, clients: vec![" ".repeat(LARGE_BYTES).into()] };
        }
        let clients: Vec<_> = "pump-1"
            .starts_with(prefix.as_str())
            .then(|| json!({ "client_id": "pump-1" }))
            .into_iter()
            .collect();
        ClientList { found: clients.len(), clients: clients.into_iter().take(*max).collect() }
    }

    fn show(&self, client_id: &str) -> Option<serde_json::Value> {
        (client_id == "pump-1").then(|| json!({ "client_id": "pump-1" }))
    }

    fn refused(&self, _: usize) -> ClientList {
        ClientList::default()
    }

    async fn kick(&self, client_id: &str) -> bool {
        if client_id == STUCK {
            return pending().await;
        }
        client_id == "pump-1"
    }

    async fn delete(&self, client_id: &str) -> bool {
        self.kick(client_id).await
    }
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn an_accept_that_fails_again_and_again_is_logged_once() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
    let mut left = 5;
    let accepted = || {
        left -= 1;
        let error = std::io::Error::from_raw_os_error(libc::EMFILE);
        std::future::ready(if left > 0 { Err(error) } else { Ok("a connection") })
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let failures = Failures::default();
    let accepting = server::accept(accepted, Duration::ZERO, &failures);
    let accepted = tracing::subscriber::with_default(subscriber, || runtime.block_on(accepting));
    assert_eq!(accepted, "a connection");
    let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert_eq!(log.lines().count(), 1, "{log}");
    assert!(log.contains("cannot accept connections: Too many open files"), "{log}");
}

struct Running {
    handle: Handle,
    shutdown: CancellationToken,
    redriven: Arc<Redriven>,
    trouble: Arc<Mutex<Option<String>>>,
    status_bytes: Arc<Mutex<usize>>,
}

async fn run() -> Running {
    run_with(server::Limits { connections_max: 64, request_max: Duration::from_secs(30) }).await
}

async fn run_with(limits: server::Limits) -> Running {
    let redriven = Arc::new(Redriven::default());
    let trouble = Arc::new(Mutex::new(None::<String>));
    let status_bytes = Arc::new(Mutex::new(0));
    let recorder = metrics::builder().build_recorder();
    ::metrics::with_local_recorder(&recorder, metrics::begin);
    let (sick, not_ready) = (trouble.clone(), trouble.clone());
    let deps = Deps {
        unhealthy: Arc::new(move || sick.lock().unwrap().clone()),
        ready: Arc::new(move || {
            let detail = not_ready.lock().unwrap().clone().unwrap_or_default();
            vec![Component { name: "sink telemetry".into(), ready: detail.is_empty(), detail }]
        }),
        problems: Arc::new(Vec::new),
        status: Arc::new({
            let status_bytes = status_bytes.clone();
            move || json!({ "streams": [], "padding": " ".repeat(*status_bytes.lock().unwrap()) })
        }),
        redrive: redriven.clone(),
        clients: Arc::new(OneClient),
        measure: Arc::new(|| ()),
        prometheus: recorder.handle(),
        process: crate::telemetry::Process::default(),
        failures: Failures::default(),
        instance: "this-one".into(),
        token: TOKEN.into(),
    };
    let shutdown = CancellationToken::new();
    let names = vec!["plant-3.example".to_owned()];
    let config = Config { bind: "127.0.0.1:0".to_owned(), names, ..Config::default() };
    let handle = server::start_with(&config, deps, shutdown.clone(), limits).await.unwrap();
    Running { handle, shutdown, redriven, trouble, status_bytes }
}

impl Running {
    async fn ask(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(self.handle.address()).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    async fn get(&self, path: &str) -> String {
        self.ask(&format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")).await
    }

    async fn post(&self, body: &str, content_type: &str) -> String {
        self.ask(&format!(
            "POST /api/dead-letters/redrive HTTP/1.1\r\nhost: 127.0.0.1:1\r\nconnection: close\r\n\
             authorization: Bearer {TOKEN}\r\ncontent-type: {content_type}\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        ))
        .await
    }
}

#[tokio::test]
async fn health_and_readiness_follow_the_parts() {
    let running = run().await;
    assert!(running.get("/healthz").await.starts_with("HTTP/1.1 200"));
    assert!(
        running
            .get("/readyz")
            .await
            .ends_with(r#"{"components":[{"name":"sink telemetry","ready":true}],"ready":true}"#)
    );
    *running.trouble.lock().unwrap() = Some("stream telemetry stopped".to_owned());
    let answer = running.get("/healthz").await;
    assert!(answer.starts_with("HTTP/1.1 503") && answer.ends_with("stream telemetry stopped\n"), "{answer}");
    let answer = running.get("/readyz").await;
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains(r#""detail":"stream"#), "{answer}");
    assert!(running.get("/api/problems").await.ends_with(r#"{"problems":[]}"#));
}

#[tokio::test]
async fn metrics_are_prometheus_text_and_all_described() {
    let running = run().await;
    let answer = running.get("/metrics").await;
    assert!(answer.contains("content-type: text/plain; version=0.0.4"), "{answer}");
    assert!(answer.contains("# TYPE process_resident_memory_bytes gauge"), "{answer}");
    assert_eq!(metrics::undescribed(&answer), [""; 0]);
    let mut shown = BTreeSet::new();
    let mut is_shown_again = |line: &str| line.starts_with("# ") && !shown.insert(line.to_owned());
    assert_eq!(answer.lines().find(|line| is_shown_again(line)), None, "a scrape with it is refused");
    assert!(running.get("/api/status").await.ends_with(r#"{"padding":"","streams":[]}"#));
    assert!(running.get("/nothing").await.starts_with("HTTP/1.1 404"));
}

#[tokio::test]
async fn a_redrive_reaches_the_host() {
    let running = run().await;
    let answer = running.post(r#"{"ids":[7],"sink":"warehouse"}"#, "application/json").await;
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.contains(r#"{"sent":3,"refused":1,"letters_sent":0,"#),
        "{answer}"
    );
    let asked =
        RedriveRequest { ids: vec![7], sink: Some("warehouse".to_owned()), ..RedriveRequest::default() };
    assert_eq!(*running.redriven.0.lock().unwrap(), [asked]);
    let answer = running.post(r#"{"sink":"none"}"#, "application/json").await;
    assert!(answer.starts_with("HTTP/1.1 404") && answer.contains("no sink `none`"), "{answer}");
}

#[tokio::test]
async fn a_web_page_in_the_browser_cannot_use_it() {
    let running = run().await;
    let answer = running.post("{}", "text/plain").await;
    assert!(answer.starts_with("HTTP/1.1 415"), "{answer}");
    let get = |host: &str| format!("GET /api/status HTTP/1.1\r\nhost: {host}\r\n\r\n");
    // Refused, and the connection closed with it.
    assert!(running.ask(&get("evil.example:8080")).await.starts_with("HTTP/1.1 403"));
    for ours in ["10.1.2.3:8080", "[2001:db8::1]", "localhost", "Plant-3.example:80"] {
        let request = get(ours).replace("\r\n\r\n", "\r\nconnection: close\r\n\r\n");
        assert!(running.ask(&request).await.starts_with("HTTP/1.1 200"), "{ours}");
    }
    for (origin, status) in [("http://evil.example", 403), ("null", 403), ("http://127.0.0.1:1", 200)] {
        let request = format!(
            "POST /api/dead-letters/redrive HTTP/1.1\r\nhost: 127.0.0.1:1\r\norigin: {origin}\r\nconnection: close\r\n\
             authorization: Bearer {TOKEN}\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{{}}"
        );
        assert!(running.ask(&request).await.starts_with(&format!("HTTP/1.1 {status}")), "{origin}");
    }
    assert_eq!(running.redriven.0.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn what_acts_takes_the_token_and_looking_does_not() {
    let running = run().await;
    for path in
        ["dead-letters/redrive", "dead-letters/discard", "clients/list", "clients/show", "clients/kick"]
    {
        for shown in ["", "authorization: Bearer x\r\n", "authorization: Bearer \r\n"] {
            let request = format!(
                "POST /api/{path} HTTP/1.1\r\nhost: localhost\r\n{shown}content-type: application/json\r\n\
                 content-length: 22\r\n\r\n{{\"client_id\":\"pump-1\"}}"
            );
            assert!(running.ask(&request).await.starts_with("HTTP/1.1 401"), "{path} {shown}");
        }
    }
    for path in ["/healthz", "/readyz", "/metrics", "/api/status"] {
        assert!(running.get(path).await.starts_with("HTTP/1.1 200"), "{path}");
    }
}

#[tokio::test]
async fn it_ends_with_the_shutdown_and_a_taken_port_is_named() {
    let running = run().await;
    let taken = Config { bind: running.handle.address().to_string(), ..Config::default() };
    let deps = run().await;
    let prometheus = metrics::builder().build_recorder().handle();
    let error = start(
        &taken,
        Deps {
            unhealthy: Arc::new(|| None),
            ready: Arc::new(Vec::new),
            problems: Arc::new(Vec::new),
            status: Arc::new(|| serde_json::Value::Null),
            redrive: deps.redriven.clone(),
            clients: Arc::new(OneClient),
            measure: Arc::new(|| ()),
            prometheus,
            process: crate::telemetry::Process::default(),
            failures: Failures::default(),
            instance: "other".into(),
            token: TOKEN.into(),
        },
        CancellationToken::new(),
    )
    .await
    .unwrap_err()
    .to_string();
    assert!(error.contains(&taken.bind) && error.contains("admin.bind"), "{error}");
    running.shutdown.cancel();
    running.handle.closed().await;
}

/// More than there are places for, and nobody loses patience with them.
#[tokio::test]
async fn clients_that_say_nothing_or_half_a_request_keep_nobody_out() {
    let running =
        run_with(server::Limits { connections_max: 64, request_max: Duration::from_secs(600) }).await;
    let mut slow = Vec::new();
    for number in 0..130 {
        let mut stream = TcpStream::connect(running.handle.address()).await.unwrap();
        let part = [
            "",
            "GET /healthz HTT",
            "GET /api/status HTTP/1.1\r\nhost: localhost\r\n\r\nGET /he",
            "POST /api/clients/list HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{",
        ];
        stream.write_all(part[number % part.len()].as_bytes()).await.unwrap();
        slow.push(stream);
    }
    assert!(running.get("/healthz").await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn a_client_that_does_not_take_its_answer_loses_its_place() {
    let limits = server::Limits { connections_max: 1, request_max: Duration::from_millis(50) };
    let running = run_with(limits).await;
    // More than the kernel holds for both ends.
    *running.status_bytes.lock().unwrap() = 32 << 20;
    let mut stalled = TcpStream::connect(running.handle.address()).await.unwrap();
    stalled.write_all(b"GET /api/status HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    stalled.readable().await.unwrap();
    assert!(running.get("/healthz").await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn a_request_for_another_host_is_not_done() {
    let running = run().await;
    let body = r#"{"client_id":"pump-1"}"#;
    let kick = |instance: &str| {
        format!(
            "POST /api/clients/kick HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\
             headworks-instance: {instance}\r\nauthorization: Bearer {TOKEN}\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    let answer = running.ask(&kick("killed-one")).await;
    assert!(
        answer.starts_with("HTTP/1.1 421") && answer.contains("headworks-instance: this-one"),
        "{answer}"
    );
    assert!(running.ask(&kick("this-one")).await.ends_with(r#"{"kicked":true}"#));
}

#[tokio::test]
async fn a_client_whose_connection_or_session_does_not_end_is_not_said_to_have_ended() {
    let running = run().await;
    let body = json!({ "client_id": STUCK }).to_string();
    for what in ["kick", "delete"] {
        let answer = running
            .ask(&format!(
                "POST /api/clients/{what} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\
                 authorization: Bearer {TOKEN}\r\ncontent-type: application/json\r\n\
                 content-length: {}\r\n\r\n{body}",
                body.len()
            ))
            .await;
        assert!(answer.starts_with("HTTP/1.1 504") && answer.contains("has not finished after"), "{answer}");
    }
}

#[tokio::test]
async fn a_body_past_the_bound_is_refused() {
    let running = run().await;
    let answer = running.post(&" ".repeat((64 << 10) + 1), "application/json").await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    assert!(running.redriven.0.lock().unwrap().is_empty());
}

#[tokio::test]
async fn few_lists_of_clients_are_in_memory_at_a_time_and_a_further_one_is_told_to_ask_again() {
    let running = run().await;
    let request = |prefix: &str| {
        let body = json!({ "prefix": prefix, "max": 1 }).to_string();
        format!(
            "POST /api/clients/list HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
             authorization: Bearer {TOKEN}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    let mut askers = Vec::new();
    for _ in 0..routes::LISTS_MAX {
        let mut asker = TcpStream::connect(running.handle.address()).await.unwrap();
        asker.write_all(request(LARGE).as_bytes()).await.unwrap();
        let mut begin = [0; 12];
        asker.read_exact(&mut begin).await.unwrap();
        assert_eq!(&begin, b"HTTP/1.1 200");
        askers.push(asker);
    }
    assert!(running.ask(&request("")).await.starts_with("HTTP/1.1 503"));
    assert!(running.get("/healthz").await.starts_with("HTTP/1.1 200"));
    let mut taken = Vec::new();
    askers.remove(0).read_to_end(&mut taken).await.unwrap();
    assert!(taken.len() > LARGE_BYTES);
    while running.ask(&request("")).await.starts_with("HTTP/1.1 503") {
        // Its end is told to the host a moment later.
        tokio::task::yield_now().await;
    }
    drop(askers);
    running.shutdown.cancel();
    running.handle.closed().await;
}
