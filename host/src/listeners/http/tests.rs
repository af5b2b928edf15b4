//! The listener over real sockets, against streams in memory.

mod http2;
mod reload;

use std::net::SocketAddr;

use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::*;
use crate::access::{self, Limits};
use crate::batch::{Batch, Offset, flags};
use crate::properties::{self, Origin};
use crate::stream::memory::MemoryStream;
use crate::stream::{Read, Stream, Streams};
use crate::topic::TopicFilter;

/// Only a hung test meets it.
const HUNG_AFTER: Duration = Duration::from_secs(30);

struct Host {
    address: SocketAddr,
    shutdown: CancellationToken,
    handle: Handle,
}

impl Host {
    async fn start(
        streams: Streams,
        change: impl FnOnce(&mut Config, &mut Option<access::Config>, &mut Limits),
    ) -> Self {
        let mut config = Config {
            listeners: serde_json::from_str(r#"[{ "bind": "127.0.0.1:0", "allow_anonymous": true }]"#)
                .unwrap(),
            ..Config::default()
        };
        let (mut rules, mut limits) = (None, Limits::default());
        change(&mut config, &mut rules, &mut limits);
        let failures = Failures::default();
        let deps =
            access::Deps { secret: &[0; 32], plugins: None, wait_max: HUNG_AFTER, failures: &failures };
        let access = access::Current::new(access::Access::open(rules.as_ref(), &limits, &deps).unwrap());
        let shutdown = CancellationToken::new();
        let deps = Deps {
            ingest: Arc::new(Ingest::new(streams, Arc::default())),
            access,
            refused_clients: Arc::default(),
            failures,
            shutdown: shutdown.clone(),
        };
        let handle = start(&config, deps).await.unwrap();
        Self { address: handle.addresses()[0].tcp().unwrap(), shutdown, handle }
    }

    async fn with(stream: Arc<dyn Stream>) -> Self {
        Self::start(Streams::new(vec![], stream), |_, _, _| {}).await
    }

    async fn client(&self) -> Client {
        Client::over(TcpStream::connect(self.address).await.unwrap()).await
    }

    async fn post(&self, path: &str, headers: &[(&str, &str)], body: &str) -> (u16, serde_json::Value) {
        self.client().await.post(path, headers, body).await
    }

    async fn stop(self) {
        self.shutdown.cancel();
        timeout(HUNG_AFTER, self.handle.join()).await.expect("the listener ends");
    }
}

struct Client(SendRequest<Full<bytes::Bytes>>);

impl Client {
    async fn over(io: TcpStream) -> Self {
        let (sender, connection) = http1::handshake(TokioIo::new(io)).await.unwrap();
        tokio::spawn(connection);
        Self(sender)
    }

    fn send(
        &mut self,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> impl Future<Output = (u16, serde_json::Value)> + use<> {
        let mut request = Request::post(path).header("host", "x");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let sent = self.0.send_request(request.body(Full::from(body.to_owned())).unwrap());
        async { read(timeout(HUNG_AFTER, sent).await.expect("an answer in time").unwrap()).await }
    }

    async fn post(&mut self, path: &str, headers: &[(&str, &str)], body: &str) -> (u16, serde_json::Value) {
        self.send(path, headers, body).await
    }
}

async fn read(answer: Response<hyper::body::Incoming>) -> (u16, serde_json::Value) {
    let status = answer.status().as_u16();
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&body).unwrap_or_default())
}

async fn batch(stream: &dyn Stream, from: u64) -> Batch {
    match timeout(HUNG_AFTER, stream.cursor(Offset(from)).next()).await.unwrap().unwrap() {
        Read::Batch(batch) => batch,
        gap => panic!("{gap:?}"),
    }
}

const LINES: (&str, &str) = ("content-type", "application/x-ndjson");

fn line(topic: &str, payload: u32) -> String {
    format!("{{\"topic\":\"{topic}\",\"payload\":{payload}}}\n")
}

#[tokio::test]
async fn a_message_is_answered_once_it_is_durable_and_says_who_sent_it() {
    let stream = MemoryStream::with_manual_commit("s", 1);
    let host = Host::with(stream.clone()).await;
    let mut client = host.client().await;
    let topic = "/messages/acme/site/meter/m-1/reading";
    let headers = [("client-id", "gateway"), ("user-property", "unit=C"), ("content-type", "text/plain")];
    let mut answer = Box::pin(client.send(topic, &headers, "21"));
    stream.awaited().await;
    assert!(futures_util::FutureExt::now_or_never(answer.as_mut()).is_none());
    stream.commit();
    assert_eq!(answer.await.0, 204);
    let batch = batch(&*stream, 0).await;
    let message = batch.messages().next().unwrap();
    assert_eq!(
        (message.topic(), message.payload(), message.device()),
        ("acme/site/meter/m-1/reading", &b"21"[..], "m-1")
    );
    assert_eq!(message.entry.flags & flags::QOS_MASK, 1);
    let get = |origin, name| properties::get(message.properties(), origin, name);
    assert_eq!(get(Origin::Device, "unit"), Some(&b"C"[..]));
    assert_eq!(get(Origin::Listener, "client-id"), Some(&b"gateway"[..]));
    assert_eq!(get(Origin::Listener, "content-type"), Some(&b"text/plain"[..]));
    host.stop().await;
}

#[tokio::test]
async fn a_repeated_request_is_answered_as_the_first_and_appends_nothing_also_after_a_restart() {
    let stream = MemoryStream::with_hooks("s", 1);
    let host = Host::with(stream.clone()).await;
    let key = [("idempotency-key", "k-1"), LINES, ("client-id", "a")];
    let body = [line("a/b", 1), "7\n".to_owned(), line("a/c", 2)].concat();
    let first = host.post("/batch", &key, &body).await;
    assert_eq!((first.0, &first.1["accepted"]), (207, &2.into()));
    assert_eq!(host.post("/batch", &key, &body).await, first);
    assert_eq!(host.post("/batch", &key, &line("a/b", 3)).await.0, 422, "another request");
    let other = [("idempotency-key", "k-1"), LINES, ("client-id", "b")];
    assert_eq!(host.post("/batch", &other, &line("a/b", 1)).await.0, 200, "of another client");
    host.stop().await;
    let host = Host::with(stream.clone()).await;
    assert_eq!(host.post("/batch", &key, &body).await, first);
    assert_eq!(stream.bounds().end, Offset(3));
    host.stop().await;
}

/// Else one of the streams would lose its messages, or have them twice.
#[tokio::test]
async fn a_request_for_two_streams_goes_on_where_one_of_them_had_no_room() {
    let (one, two) = (MemoryStream::with_hooks("one", 1), MemoryStream::with_hooks("two", 1));
    let filters = vec![TopicFilter::new("one/#").unwrap()];
    let host = Host::start(Streams::new(vec![(filters, one.clone())], two.clone()), |_, _, _| {}).await;
    let key = [("idempotency-key", "k"), LINES];
    let body = [line("two/a", 1), line("one/a", 2), line("two/b", 3)].concat();
    two.set_no_space(true);
    let statuses = |answer: &serde_json::Value| {
        answer["messages"]
            .as_array()
            .unwrap()
            .iter()
            .map(|it| it["status"].as_u64().unwrap())
            .collect::<Vec<_>>()
    };
    let (status, answer) = host.post("/batch", &key, &body).await;
    assert_eq!((status, statuses(&answer)), (207, vec![429, 204, 429]));
    two.set_no_space(false);
    for _ in 0..2 {
        assert_eq!(host.post("/batch", &key, &body).await.0, 200);
        assert_eq!((one.bounds().end, two.bounds().end), (Offset(1), Offset(2)));
    }
    host.stop().await;
}

#[tokio::test]
async fn what_is_wrong_is_told_before_anything_is_stored() {
    let stream = MemoryStream::new("s", 1);
    let change = |config: &mut Config, _: &mut Option<access::Config>, _: &mut Limits| {
        config.max_message_size = crate::units::ByteSize(10);
        config.max_batch_size = crate::units::ByteSize(1_000);
        config.batch_messages_max = 2;
    };
    let host = Host::start(Streams::new(vec![], stream.clone()), change).await;
    let many = line("a", 1).repeat(3);
    for (path, headers, body, status) in [
        ("/messages/a", &[][..], "12345678901", 413),
        ("/messages/$SYS/x", &[], "1", 403),
        ("/messages/a/+", &[], "1", 400),
        ("/messages/a", &[("response-topic", "#")], "1", 400),
        ("/messages/a", &[("idempotency-key", "")], "1", 400),
        ("/batch", &[("content-type", "application/json")], "{}", 400),
        ("/batch", &[LINES], &many, 413),
        ("/batch", &[LINES], "{\"payload\":1}", 400),
        ("/batch", &[LINES], "{\"topic\":\"a\",\"payload\":\"12345678901\"}", 413),
        ("/elsewhere", &[], "1", 404),
    ] {
        let (found, told) = host.post(path, headers, body).await;
        assert_eq!(found, status, "{path} {headers:?}: {told}");
        assert!(told["error"].is_string() || told["messages"].is_array(), "{told}");
    }
    let mut raw = TcpStream::connect(host.address).await.unwrap();
    raw.write_all(b"POST /messages/a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut told = String::new();
    raw.read_to_string(&mut told).await.unwrap();
    assert!(told.starts_with("HTTP/1.1 411 "), "{told}");
    assert_eq!(stream.bounds().end, Offset(0));
    host.stop().await;
}

#[tokio::test]
async fn a_stream_without_room_and_a_client_over_its_rate_are_told_to_come_later() {
    let stream = MemoryStream::with_hooks("s", 1);
    let change = |_: &mut Config, _: &mut Option<access::Config>, limits: &mut Limits| {
        limits.client_messages_per_s = Some(1);
    };
    let host = Host::start(Streams::new(vec![], stream.clone()), change).await;
    stream.set_no_space(true);
    assert_eq!(host.post("/messages/a", &[], "1").await.0, 429);
    stream.set_no_space(false);
    let mut client = host.client().await;
    assert_eq!(client.post("/messages/a", &[], "1").await.0, 204);
    assert_eq!(client.post("/messages/a", &[], "1").await.0, 429);
    assert_eq!(stream.bounds().end, Offset(1));
    host.stop().await;
}

#[tokio::test]
async fn an_idle_connection_gives_way_to_another_address_and_one_with_a_request_does_not() {
    let stream = MemoryStream::with_manual_commit("s", 1);
    let change =
        |config: &mut Config, _: &mut Option<access::Config>, _: &mut Limits| config.connections_max = 3;
    let host = Host::start(Streams::new(vec![], stream.clone()), change).await;
    let mut busy = host.client().await;
    let answer = busy.send("/messages/a", &[], "1");
    stream.awaited().await;
    let mut idle = TcpStream::connect(host.address).await.unwrap();
    // Half of a request is none.
    idle.write_all(b"POST /mess").await.unwrap();
    let _younger = TcpStream::connect(host.address).await.unwrap();
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    let mut other = Client::over(socket.connect(host.address).await.unwrap()).await;
    let mut end = Vec::new();
    timeout(HUNG_AFTER, idle.read_to_end(&mut end)).await.expect("it gives way").unwrap();
    let others = other.send("/messages/a", &[], "1");
    stream.commit();
    let committing = async {
        loop {
            stream.awaited().await;
            stream.commit();
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        (one, two) = async { tokio::join!(answer, others) } => assert_eq!((one.0, two.0), (204, 204)),
        () = committing => {}
    }
    host.stop().await;
}

#[tokio::test]
async fn a_request_that_is_under_way_is_answered_at_shutdown_and_a_new_one_is_not_taken() {
    let stream = MemoryStream::with_manual_commit("s", 1);
    let host = Host::with(stream.clone()).await;
    let mut client = host.client().await;
    let answer = client.send("/messages/a", &[], "1");
    stream.awaited().await;
    host.shutdown.cancel();
    stream.commit();
    assert_eq!(answer.await.0, 204);
    timeout(HUNG_AFTER, host.handle.join()).await.expect("the listener ends");
    assert!(TcpStream::connect(host.address).await.is_err());
}
