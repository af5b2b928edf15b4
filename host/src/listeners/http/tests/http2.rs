//! The same over HTTP/2: many requests of one connection at a time.

use bytes::Bytes;
use futures_util::{StreamExt, future, stream};
use http_body_util::StreamBody;
use http_body_util::combinators::BoxBody;
use hyper::body::Frame;
use hyper::client::conn::http2;
use hyper::rt::Executor;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;

use super::*;

type Body = BoxBody<Bytes, std::convert::Infallible>;

#[derive(Clone)]
struct Spawn;

impl<F: Future<Output: Send> + Send + 'static> Executor<F> for Spawn {
    fn execute(&self, task: F) {
        tokio::spawn(task);
    }
}

struct Client {
    sender: http2::SendRequest<Body>,
    connection: JoinHandle<hyper::Result<()>>,
}

impl Client {
    async fn of(host: &Host) -> Self {
        Self::with(host, |_| {}).await
    }

    async fn with(host: &Host, change: impl FnOnce(&mut http2::Builder<Spawn>)) -> Self {
        let mut builder = http2::Builder::new(Spawn);
        change(&mut builder);
        let io = TcpStream::connect(host.address).await.unwrap();
        io.set_nodelay(true).unwrap();
        let (sender, connection) = builder.handshake(TokioIo::new(io)).await.unwrap();
        Self { sender, connection: tokio::spawn(connection) }
    }

    fn send_body(
        &self,
        path: &str,
        headers: &[(&str, &str)],
        body: Body,
    ) -> impl Future<Output = hyper::Result<Response<hyper::body::Incoming>>> + use<> {
        let mut request = Request::post(format!("http://host{path}"));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut sender = self.sender.clone();
        async move {
            sender.ready().await?;
            sender.send_request(request.body(body).unwrap()).await
        }
    }

    fn send(
        &self,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> impl Future<Output = (u16, serde_json::Value)> + use<> {
        let sent = self.send_body(path, headers, BoxBody::new(Full::from(body.to_owned())));
        async { read(timeout(HUNG_AFTER, sent).await.expect("an answer in time").unwrap()).await }
    }

    /// Returns how the connection ended.
    async fn end(self) -> hyper::Result<()> {
        let Self { sender: _sender, connection } = self;
        timeout(HUNG_AFTER, connection).await.expect("the connection ends").unwrap()
    }
}

/// A body whose end is not sent yet.
fn open_body(first: &'static [u8]) -> (UnboundedSender<Bytes>, Body) {
    let (sender, mut receiver) = unbounded_channel();
    sender.send(Bytes::from_static(first)).unwrap();
    let pieces = stream::poll_fn(move |cx| receiver.poll_recv(cx)).map(|bytes| Ok(Frame::data(bytes)));
    (sender, BoxBody::new(StreamBody::new(pieces)))
}

/// Returns once so many messages are appended.
async fn appended(stream: &MemoryStream, count: u64) {
    while stream.appended() < Offset(count) {
        tokio::task::yield_now().await;
    }
}

/// Commits what comes in until the future is ready.
async fn committing<T>(stream: &MemoryStream, future: impl Future<Output = T>) -> T {
    let commits = async {
        loop {
            stream.awaited().await;
            stream.commit();
            tokio::task::yield_now().await;
        }
    };
    match future::select(std::pin::pin!(future), std::pin::pin!(commits)).await {
        future::Either::Left((ready, _)) => ready,
        future::Either::Right(((), _)) => unreachable!(),
    }
}

#[tokio::test]
async fn requests_of_one_connection_are_answered_as_they_are_durable_and_repeated_ones_as_the_first() {
    let stream = MemoryStream::with_hooks("s", 1);
    let host = Host::with(stream.clone()).await;
    let client = Client::of(&host).await;
    let body = [line("a/b", 1), "7\n".to_owned(), line("a/c", 2)].concat();
    let key = |key| [("idempotency-key", key), LINES];
    let answers = (0..40).map(|_| client.send("/batch", &key("k-1"), body.as_bytes()));
    let answers = future::join_all(answers).await;
    assert_eq!((answers[0].0, &answers[0].1["accepted"]), (207, &2.into()));
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
    assert_eq!(stream.bounds().end, Offset(2));
    assert_eq!(client.send("/batch", &key("k-1"), b"7\n").await.0, 422);
    assert_eq!(host.post("/batch", &key("k-1"), &body).await, answers[0], "over HTTP/1.1");
    assert_eq!(client.send("/messages/a/+", &[], b"1").await.0, 400);
    assert_eq!(client.send("/messages/a", &[], b"").await.0, 204, "an empty message");
    let many: Vec<String> = (0..70).map(|n| format!("x-{n}")).collect();
    let many: Vec<_> = many.iter().map(|name| (&**name, "1")).collect();
    assert_eq!(client.send("/messages/a", &many, b"1").await.0, 431);
    host.stop().await;
}

#[tokio::test]
async fn a_body_that_comes_slowly_or_waits_for_room_holds_up_no_other_request() {
    let stream = MemoryStream::with_hooks("s", 1);
    let change = |config: &mut Config, _: &mut Option<access::Config>, _: &mut Limits| {
        config.max_message_size = crate::units::ByteSize(256 << 10);
        config.max_batch_size = crate::units::ByteSize(256 << 10);
        config.partial_bodies_bytes_max = crate::units::ByteSize(256 << 10);
    };
    let host = Host::start(Streams::new(vec![], stream.clone()), change).await;
    let client = Client::of(&host).await;
    let large = ("content-length", "262144");
    // This request takes all the room for bodies, and sends no more of its body for now.
    let (rest, body) = open_body(&[1; 5_000]);
    let slow = tokio::spawn(client.send_body("/messages/slow", &[large], body));
    while !host.handle.http.bodies.is_taken() {
        tokio::task::yield_now().await;
    }
    // These requests wait for room. Their bodies are as large as the windows of all clients together.
    let waiting: Vec<_> =
        (0..4).map(|_| tokio::spawn(client.send("/messages/waits", &[], &[2; 60 << 10]))).collect();
    while host.handle.http.bodies.waiting() < 4 {
        tokio::task::yield_now().await;
    }
    let (_, told) = client.send("/messages/refused", &[], &[3; 60 << 10]).await;
    assert_eq!(told["error"], "too many requests send their bodies at a time, try again");
    for _ in 0..100 {
        assert_eq!(client.send("/messages/small", &[], &[4; 4_000]).await.0, 204);
    }
    rest.send(Bytes::from(vec![1; (256 << 10) - 5_000])).unwrap();
    drop(rest);
    assert_eq!(timeout(HUNG_AFTER, slow).await.unwrap().unwrap().unwrap().status(), 204);
    for answer in waiting {
        assert_eq!(answer.await.unwrap().0, 204);
    }
    assert_eq!(stream.bounds().end, Offset(105));
    host.stop().await;
}

#[tokio::test]
async fn past_the_bound_of_all_requests_a_further_one_is_told_to_come_again() {
    let stream = MemoryStream::with_manual_commit("s", 1);
    let change = |config: &mut Config, _: &mut Option<access::Config>, _: &mut Limits| {
        config.http2_streams_max = 1_000;
    };
    let host = Host::start(Streams::new(vec![], stream.clone()), change).await;
    let client = Client::of(&host).await;
    let most = requests::FURTHER_MAX + 1;
    let open: Vec<_> = (0..most).map(|_| tokio::spawn(client.send("/messages/a", &[], b"1"))).collect();
    appended(&stream, most as u64).await;
    let refused = client.send_body("/messages/a", &[], BoxBody::new(Full::from("1"))).await.unwrap();
    assert_eq!((refused.status().as_u16(), &refused.headers()["retry-after"]), (429, &"1".parse().unwrap()));
    // The first request of a connection is never refused.
    let other = Client::of(&host).await;
    let others = tokio::spawn(other.send("/messages/b", &[], b"1"));
    let answers = committing(&stream, future::join_all(open)).await;
    assert!(answers.into_iter().all(|answer| answer.unwrap().0 == 204));
    assert_eq!(committing(&stream, others).await.unwrap().0, 204);
    assert_eq!(committing(&stream, client.send("/messages/a", &[], b"1")).await.0, 204);
    host.stop().await;
}

#[tokio::test]
async fn a_client_that_resets_its_requests_loses_its_connection_and_nobody_else_does() {
    let stream = MemoryStream::with_manual_commit("s", 1);
    let host = Host::with(stream.clone()).await;
    let client = Client::of(&host).await;
    let other = Client::of(&host).await;
    let others = tokio::spawn(other.send("/messages/b", &[], b"1"));
    stream.awaited().await;
    let mut resets = 0;
    loop {
        let before = stream.appended().0;
        let mut request = Box::pin(client.send_body("/messages/a", &[], BoxBody::new(Full::from("1"))));
        match future::select(request.as_mut(), std::pin::pin!(appended(&stream, before + 1))).await {
            future::Either::Left((ended, _)) => break assert!(ended.is_err()),
            future::Either::Right(_) => resets += 1,
        }
        assert!(resets < 200, "it is still served");
    }
    assert!(resets >= 99, "{resets}");
    client.end().await.unwrap_err();
    assert_eq!(committing(&stream, others).await.unwrap().0, 204);
    host.stop().await;
}

#[tokio::test]
async fn a_client_that_takes_no_answers_is_served_until_they_are_too_old() {
    let stream = MemoryStream::with_hooks("s", 1);
    let change = |config: &mut Config, _: &mut Option<access::Config>, _: &mut Limits| {
        config.request_timeout = crate::units::Period(10 * HUNG_AFTER);
        config.idle_timeout = crate::units::Period(Duration::from_millis(500));
    };
    let host = Host::start(Streams::new(vec![], stream.clone()), change).await;
    let client = Client::with(&host, |builder| {
        builder.initial_stream_window_size(0);
    })
    .await;
    let wrong = client.send_body("/batch", &[LINES], BoxBody::new(Full::from("7\n".repeat(1_000)))).await;
    let wrong = wrong.unwrap();
    assert_eq!(wrong.status(), 400);
    // Requests go on beside it, so that the connection is never idle.
    let mut answered = 0;
    let served = async {
        while let Ok(answer) = client.send_body("/messages/a", &[], BoxBody::new(Full::from("1"))).await {
            assert_eq!(answer.status(), 204);
            answered += 1;
        }
    };
    timeout(HUNG_AFTER, served).await.expect("the connection ends");
    assert!(answered > 0);
    wrong.into_body().collect().await.unwrap_err();
    host.stop().await;
}

#[tokio::test]
async fn at_shutdown_open_requests_are_answered_and_their_connection_ends() {
    let stream = MemoryStream::with_manual_commit("s", 1);
    let host = Host::with(stream.clone()).await;
    let client = Client::of(&host).await;
    let open: Vec<_> = (0..10).map(|_| tokio::spawn(client.send("/messages/a", &[], b"1"))).collect();
    appended(&stream, 10).await;
    host.shutdown.cancel();
    let answers = committing(&stream, future::join_all(open)).await;
    assert!(answers.into_iter().all(|answer| answer.unwrap().0 == 204));
    client.end().await.expect("it is told to go away");
    timeout(HUNG_AFTER, host.handle.join()).await.expect("the listener ends");
}

#[tokio::test]
async fn a_connection_that_asks_nothing_is_told_to_end_and_its_pings_do_not_keep_it() {
    let stream = MemoryStream::with_hooks("s", 1);
    let change = |config: &mut Config, _: &mut Option<access::Config>, _: &mut Limits| {
        config.request_timeout = crate::units::Period(10 * HUNG_AFTER);
        config.idle_timeout = crate::units::Period(Duration::from_millis(300));
    };
    let host = Host::start(Streams::new(vec![], stream.clone()), change).await;
    let client = Client::with(&host, |builder| {
        builder
            .timer(hyper_util::rt::TokioTimer::new())
            .keep_alive_interval(Duration::from_millis(20))
            .keep_alive_while_idle(true);
    })
    .await;
    assert_eq!(client.send("/messages/a", &[], b"1").await.0, 204);
    client.end().await.expect("it is told to go away");
    host.stop().await;
}

#[tokio::test]
async fn a_client_that_begins_a_request_and_stops_loses_its_connection() {
    let stream = MemoryStream::with_hooks("s", 1);
    let change = |config: &mut Config, _: &mut Option<access::Config>, _: &mut Limits| {
        config.request_timeout = crate::units::Period(Duration::from_millis(300));
        config.idle_timeout = crate::units::Period(10 * HUNG_AFTER);
    };
    let host = Host::start(Streams::new(vec![], stream.clone()), change).await;
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    // A HEADERS frame without END_HEADERS that contains the method POST and nothing else.
    let head = [0, 0, 1, 1, 0, 0, 0, 0, 1, 0x83];
    for sent in [
        &preface[..10],
        preface,
        &[preface, &settings[..]].concat(),
        &[preface, &settings[..], &head].concat(),
    ] {
        let mut raw = TcpStream::connect(host.address).await.unwrap();
        raw.write_all(sent).await.unwrap();
        let mut told = Vec::new();
        // The connection may be closed or reset, because the host has not read all that was sent.
        let _ = timeout(HUNG_AFTER, raw.read_to_end(&mut told)).await.expect("its connection ends");
    }
    host.stop().await;
}

#[tokio::test]
async fn a_client_that_is_gone_without_a_word_is_found_out_while_its_request_waits() {
    let stream = MemoryStream::with_manual_commit("s", 1);
    let host = Host::with(stream.clone()).await;
    let mut raw = TcpStream::connect(host.address).await.unwrap();
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    // POST http://x/messages/a, with its end.
    let block = [&[0x83, 0x86, 0x04, 11][..], b"/messages/a", &[0x01, 1], b"x"].concat();
    let head = [&[0, 0, block.len() as u8, 1, 5, 0, 0, 0, 1][..], &block].concat();
    let sent = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &settings, &head].concat();
    raw.write_all(&sent).await.unwrap();
    appended(&stream, 1).await;
    let mut told = Vec::new();
    // No ping is answered.
    let _ = timeout(HUNG_AFTER, raw.read_to_end(&mut told)).await.expect("its connection ends");
    host.stop().await;
}
