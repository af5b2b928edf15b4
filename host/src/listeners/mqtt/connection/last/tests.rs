use std::future::pending;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Context;

use headworks_test_certificates::Authority;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncWriteExt, DuplexStream, ReadBuf};
use tokio::task::yield_now;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::super::End;
use super::super::tests::{connection, connection_of};
use super::*;
use crate::listeners::mqtt::config::Config;
use crate::listeners::mqtt::fuzzing::broker;
use crate::listeners::mqtt::wire::Version;
use crate::stream::Stream;
use crate::stream::memory::MemoryStream;

const GOODBYE: [u8; 2] = [0xe0, 0];

/// A publish of 102 bytes, the number of its packet id in front of the payload where the QoS is 1.
fn publish(qos: u8, packet_id: u16) -> Vec<u8> {
    let mut packet = vec![0x30 | qos << 1, 100, 0, 1, b'x'];
    if qos > 0 {
        packet.extend(packet_id.to_be_bytes());
    }
    packet.resize(102, 0);
    packet
}

/// Both ends of a TLS connection over a pipe that holds `bytes`.
async fn tls(bytes: usize) -> (client::TlsStream<DuplexStream>, server::TlsStream<DuplexStream>) {
    let ca = Authority::new("our CA");
    let signed = ca.sign("server", &["localhost"], 1);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let chain = vec![CertificateDer::from_pem_slice(signed.cert.as_bytes()).unwrap()];
    let key = PrivateKeyDer::from_pem_slice(signed.key.as_bytes()).unwrap();
    let server = ServerConfig::builder_with_provider(provider.clone());
    let server = server.with_safe_default_protocol_versions().unwrap().with_no_client_auth();
    let server = TlsAcceptor::from(Arc::new(server.with_single_cert(chain, key).unwrap()));
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.pem.as_bytes()).unwrap()).unwrap();
    let client = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let client = client.with_root_certificates(roots).with_no_client_auth();
    let (near, far) = tokio::io::duplex(bytes);
    let name = ServerName::try_from("localhost").unwrap();
    let (client, server) =
        tokio::join!(TlsConnector::from(Arc::new(client)).connect(name, near), server.accept(far));
    (client.unwrap(), server.unwrap())
}

#[tokio::test]
async fn a_goodbye_is_read_that_lies_behind_much_in_a_tls_connection() {
    let stream = MemoryStream::new("s", 1);
    let broker = &broker(&Config::default(), stream.clone(), MemoryStream::new("broker", 1));
    // All packets in one TLS record, then each packet in a record of its own.
    for records in [1, 7_000] {
        let before = stream.bounds().end.0;
        let (mut client, io) = tls(4 << 20).await;
        let sent = publish(0, 0).repeat(7_000 / records);
        for _ in 0..records {
            client.write_all(&sent).await.unwrap();
        }
        client.write_all(&GOODBYE).await.unwrap();
        client.flush().await.unwrap();
        let (session, _turn) = broker.sessions.claim("c", 9).await.unwrap();
        let mut other = std::pin::pin!(broker.sessions.claim("c", 9));
        assert!(futures_util::poll!(&mut other).is_pending());
        let mut connection = connection(broker, session, io);
        let end = connection.run().await;
        assert!(matches!(end, End::Disconnect { keep_will: false, .. }), "{records} records: {end:?}");
        assert_eq!(stream.bounds().end.0 - before, 7_000);
    }
}

/// The kernel of the client holds what finds no room in that of the host.
#[tokio::test]
async fn a_goodbye_is_read_that_is_on_its_way_behind_what_lies_there() {
    let stream = MemoryStream::new("s", 1);
    let broker = &broker(&Config::default(), stream.clone(), MemoryStream::new("broker", 1));
    for says_goodbye in [true, false] {
        let before = stream.bounds().end.0;
        let (mut client, io) = tokio::io::duplex(1 << 10);
        let (session, _turn) = broker.sessions.claim("c", 9).await.unwrap();
        let mut other = std::pin::pin!(broker.sessions.claim("c", 9));
        assert!(futures_util::poll!(&mut other).is_pending());
        let mut connection = connection(broker, session, io);
        let sends = async {
            for _ in 0..100 {
                client.write_all(&publish(0, 0)).await.unwrap();
                yield_now().await;
            }
            let goodbye = if says_goodbye { &GOODBYE[..] } else { &[] };
            client.write_all(goodbye).await.unwrap();
            pending().await
        };
        let end = tokio::select! {
            biased;
            () = sends => unreachable!("it stays"),
            end = connection.run() => end,
        };
        assert_eq!(matches!(end, End::Disconnect { .. }), says_goodbye, "{end:?}");
        assert_eq!(matches!(end, End::TakenOver), !says_goodbye, "{end:?}");
        assert_eq!(stream.bounds().end.0 - before, 100);
    }
}

/// Gives what it has once it was asked so many times, as a socket does of which the runtime has not been told yet.
/// It is told then.
struct Late<'a>(u8, &'a [u8]);

impl AsyncRead for Late<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.0 > 0 {
            self.0 -= 1;
            if self.0 == 0 {
                cx.waker().wake_by_ref();
            }
            return Poll::Pending;
        }
        Pin::new(&mut self.1).poll_read(cx, out)
    }
}

#[tokio::test]
async fn a_goodbye_is_read_of_which_the_runtime_is_told_after_the_takeover() {
    let stores = || MemoryStream::new("s", 1);
    let broker = &broker(&Config::default(), stores(), stores());
    for asked in 2..6 {
        let (session, _turn) = broker.sessions.claim("c", 9).await.unwrap();
        let io = tokio::io::join(Late(asked, &GOODBYE), tokio::io::sink());
        let mut connection = connection(broker, session, io);
        let end = {
            let mut run = Box::pin(connection.run());
            assert!(futures_util::poll!(&mut run).is_pending(), "it waits for its client");
            let mut other = std::pin::pin!(broker.sessions.claim("c", 9));
            assert!(futures_util::poll!(&mut other).is_pending());
            run.await
        };
        assert!(matches!(end, End::Disconnect { .. }), "asked {asked} times: {end:?}");
    }
}

/// MQTT 3.1.1 has no Receive Maximum: what comes beyond `mqtt.inflight_max` waits for acks.
#[tokio::test]
async fn a_goodbye_is_read_that_lies_behind_publishes_whose_acks_wait_for_the_disk() {
    for is_wanted in [true, false] {
        let stream = MemoryStream::with_manual_commit("s", 1);
        let broker = &broker(&Config::default(), stream.clone(), MemoryStream::new("broker", 1));
        // The last few wait behind acks when the end of the connection is read.
        let count = 3 * broker.config().inflight_max + 50;
        let sent = (1..=count).flat_map(|id| publish(1, id)).chain(GOODBYE).collect::<Vec<u8>>();
        let (session, _turn) = broker.sessions.claim("c", 9).await.unwrap();
        let mut other = std::pin::pin!(broker.sessions.claim("c", 9));
        if is_wanted {
            assert!(futures_util::poll!(&mut other).is_pending());
        }
        let io = tokio::io::join(&*sent, tokio::io::sink());
        let mut connection = connection_of(broker, session, Version::V3, io);
        let disk = async {
            loop {
                stream.awaited().await;
                stream.commit();
            }
        };
        let end = tokio::select! {
            end = connection.run() => end,
            () = disk => unreachable!("it commits without end"),
        };
        assert!(matches!(end, End::Disconnect { .. }), "is wanted: {is_wanted}, {end:?}");
        stream.commit();
        assert_eq!(stream.bounds().end.0, u64::from(count));
    }
}

/// The write side of a socket whose peer has closed it.
struct Closed;

impl AsyncWrite for Closed {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
    }
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
    }
}

/// A client that publishes with QoS 1, says goodbye and closes its socket reads no more acks.
#[tokio::test]
async fn a_goodbye_is_read_where_its_client_has_closed_the_socket_and_takes_no_acks() {
    let stream = MemoryStream::new("s", 1);
    let broker = &broker(&Config::default(), stream.clone(), MemoryStream::new("broker", 1));
    let sent = (1..=1_000).flat_map(|id| publish(1, id)).chain(GOODBYE).collect::<Vec<u8>>();
    for (len, says_goodbye) in [(sent.len(), true), (sent.len() - GOODBYE.len(), false)] {
        let before = stream.bounds().end.0;
        let (session, _turn) = broker.sessions.claim("c", 9).await.unwrap();
        let mut connection = connection(broker, session, tokio::io::join(&sent[..len], Closed));
        let end = connection.run().await;
        assert_eq!(matches!(end, End::Disconnect { .. }), says_goodbye, "{end:?}");
        assert_eq!(matches!(end, End::Lost), !says_goodbye, "{end:?}");
        assert_eq!(stream.bounds().end.0 - before, 1_000);
    }
}

#[test]
fn much_is_read_within_a_time_and_little_after_it() {
    let begun = Instant::now();
    let read = |now| {
        let (mut last, mut read) = (LastReads::new(begun), 0);
        while last.begin_read(now) {
            last.add(1_000);
            read += 1_000;
        }
        read
    };
    let of = |max: u32| max - max / 10..max + 1_000;
    assert!(of(LAST_BYTES_MAX).contains(&read(begun + LAST_TIME_MAX / 2)));
    assert!(of(LAST_BYTES_LEAST).contains(&read(begun + LAST_TIME_MAX)));
}
