use futures_util::{SinkExt, StreamExt};
use tokio::io::DuplexStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{Data, OpCode};

use super::super::fuzzing::settings;
use super::*;

const FRAME_BYTES_MAX: usize = 1_024;
const PIPE_BYTES: usize = 64 << 10;
const NO_PAGES: Origins<'_> = Origins { listed: &[], tls: false };

async fn open() -> (WebSocketStream<DuplexStream>, Bytes<DuplexStream>) {
    open_with(FRAME_BYTES_MAX).await
}

async fn open_with(frame_bytes_max: usize) -> (WebSocketStream<DuplexStream>, Bytes<DuplexStream>) {
    let (client, server) = tokio::io::duplex(PIPE_BYTES);
    let mut request = "ws://localhost/mqtt".into_client_request().unwrap();
    request.headers_mut().insert("sec-websocket-protocol", "chat, mqtt".parse().unwrap());
    let settings = settings(frame_bytes_max);
    let (client, server) =
        tokio::join!(tokio_tungstenite::client_async(request, client), accept(server, &settings, NO_PAGES));
    let (client, response) = client.unwrap();
    assert_eq!(response.headers()["sec-websocket-protocol"], "mqtt");
    (client, server.ok().unwrap())
}

#[tokio::test]
async fn frames_and_packets_need_not_begin_together() {
    let (mut client, mut server) = open().await;
    let frame = |payload: &'static [u8], code, last| {
        Message::Frame(Frame::message(bytes::Bytes::from_static(payload), OpCode::Data(code), last))
    };
    client.send(Message::Binary("onetw".into())).await.unwrap();
    client.send(Message::Ping("still there".into())).await.unwrap();
    client.send(Message::Binary("".into())).await.unwrap();
    client.send(frame(b"othr", Data::Binary, false)).await.unwrap();
    client.send(frame(b"ee", Data::Continue, true)).await.unwrap();
    let mut heard = [0; 11];
    server.read_exact(&mut heard).await.unwrap();
    assert_eq!(&heard, b"onetwothree");
    server.write_all(b"back").await.unwrap();
    server.flush().await.unwrap();
    let mut answers = Vec::new();
    while answers.len() < 2 {
        answers.push(client.next().await.unwrap().unwrap());
    }
    assert!(answers.contains(&Message::Pong("still there".into())), "{answers:?}");
    assert!(answers.contains(&Message::Binary("back".into())), "{answers:?}");
}

/// So nothing of it is kept for its end, which may come slowly or never.
#[tokio::test]
async fn a_large_frame_is_heard_before_it_is_whole() {
    let (mut client, mut server) = open_with(1 << 20).await;
    let header = [0x82, 0xff, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0];
    client.get_mut().write_all(&header).await.unwrap();
    client.get_mut().write_all(&[b'x'; 50_000]).await.unwrap();
    let mut heard = vec![0; 50_000 / CHUNK_BYTES * CHUNK_BYTES];
    server.read_exact(&mut heard).await.unwrap();
    assert!(heard.iter().all(|byte| *byte == b'x'));
}

#[tokio::test]
async fn a_close_is_the_end_and_text_or_too_much_an_error() {
    let (mut client, mut server) = open().await;
    let ends = tokio::spawn(async move { server.read(&mut [0; 8]).await });
    client.close(None).await.unwrap();
    assert_eq!(ends.await.unwrap().unwrap(), 0);

    let (mut client, mut server) = open().await;
    client.send(Message::Text("text".into())).await.unwrap();
    assert!(server.read(&mut [0; 8]).await.is_err());

    let (mut client, mut server) = open().await;
    client.send(Message::Binary(vec![0; FRAME_BYTES_MAX + 1].into())).await.unwrap();
    assert!(server.read(&mut [0; 8]).await.is_err());
}

#[tokio::test]
async fn pongs_that_a_client_does_not_read_are_not_piled_up() {
    const PINGS: usize = 10_000;
    let (mut client, mut server) = open().await;
    let served = tokio::spawn(async move {
        server.read_exact(&mut [0; 3]).await.unwrap();
        server.write_all(b"told").await.unwrap();
        server.flush().await.unwrap();
    });
    // All are read by the server, and none of its pongs by the client.
    for _ in 0..PINGS {
        let ping = [&[0x89, 0xfd, 0, 0, 0, 0][..], &[b'x'; 125]].concat();
        client.get_mut().write_all(&ping).await.unwrap();
    }
    client.get_mut().write_all(&[0x82, 0x83, 0, 0, 0, 0, b'e', b'n', b'd']).await.unwrap();
    let mut pongs = 0;
    loop {
        match client.next().await.unwrap().unwrap() {
            Message::Pong(_) => pongs += 1,
            told => break assert_eq!(told, Message::Binary("told".into())),
        }
    }
    served.await.unwrap();
    assert!(pongs > 0 && pongs * 127 < UNSENT_BYTES_MAX + 2 * PIPE_BYTES, "{pongs} of {PINGS}");
}

#[tokio::test]
async fn who_asks_for_something_else_is_told_how() {
    let upgrade = "Host: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                   Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    let from = |origin: &str| format!("GET /mqtt HTTP/1.1\r\nOrigin: {origin}\r\n{upgrade}\r\n");
    for (request, status, hint, cause) in [
        ("GET /mqtt HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "426 ", "ws://HOST:PORT/mqtt", "websocket"),
        ("GET /elsewhere HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "404 ", "is at /mqtt, /, /ws", "websocket"),
        (from("http://evil.example"), "403 ", "list them in websocket.origins", "websocket_origin"),
        (format!("GET /mqtt HTTP/1.1\r\n{upgrade}\r\n"), "400 ", "Sec-WebSocket-Protocol: mqtt", "websocket"),
        ("POST /mqtt HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "400 ", "GET", "websocket"),
        (
            format!("GET /mqtt HTTP/1.1\r\nX: {}\r\n", "x".repeat(REQUEST_BYTES_MAX)),
            "431 ",
            "too large",
            "websocket",
        ),
    ] {
        let (mut client, server) = tokio::io::duplex(64 << 10);
        client.write_all(request.as_bytes()).await.unwrap();
        client.shutdown().await.unwrap();
        let refused = accept(server, &settings(FRAME_BYTES_MAX), NO_PAGES).await.err().unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")) && answer.contains(hint), "{answer}");
        assert_eq!(refused.cause, cause);
    }
}

#[tokio::test]
async fn clients_that_were_told_no_path_find_it() {
    for (path, is_served) in
        [("", true), ("/", true), ("/mqtt", true), ("/mqtt/", true), ("/ws", true), ("/mqtts", false)]
    {
        let (client, server) = tokio::io::duplex(PIPE_BYTES);
        let mut request = format!("ws://localhost{path}").into_client_request().unwrap();
        request.headers_mut().insert("sec-websocket-protocol", "mqtt".parse().unwrap());
        let settings = settings(FRAME_BYTES_MAX);
        let served = accept(server, &settings, NO_PAGES);
        let (connected, served) = tokio::join!(tokio_tungstenite::client_async(request, client), served);
        assert_eq!((connected.is_ok(), served.is_ok()), (is_served, is_served), "{path}");
    }
    let any = Settings { paths: vec![ANY.to_owned()], ..settings(FRAME_BYTES_MAX) };
    assert!(any.serves("/anything/at/all"));
}
