use headworks_test_certificates::Authority;
use rcgen::KeyPair;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tokio_rustls::TlsConnector;

use super::super::super::config::Identity;
use super::*;

struct Pki {
    dir: tempfile::TempDir,
    ca: Authority,
}

struct Device {
    cert: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

impl Pki {
    fn new() -> Self {
        let pki = Self { dir: tempfile::tempdir().unwrap(), ca: Authority::new("our CA") };
        pki.write("ca.pem", &pki.ca.pem);
        let server = pki.ca.sign("server", &["localhost"], 1);
        pki.write("server.pem", &server.cert);
        pki.write("server.key", &server.key);
        pki.revoke(&[]);
        pki
    }

    fn write(&self, name: &str, content: &str) {
        std::fs::write(self.dir.path().join(name), content).unwrap();
    }

    fn revoke(&self, serials: &[u64]) {
        self.revoke_until(serials, 2090);
    }

    fn revoke_until(&self, serials: &[u64], year: i32) {
        self.write("crl.pem", &self.ca.revoke_until(serials, year));
    }

    fn device(&self, serial: u64) -> Device {
        let name = format!("{serial}.devices.example");
        let signed = self.ca.sign(&format!("device-{serial}"), &[&name], serial);
        Device {
            cert: CertificateDer::from_pem_slice(signed.cert.as_bytes()).unwrap(),
            key: PrivateKeyDer::from_pem_slice(signed.key.as_bytes()).unwrap(),
        }
    }

    fn load(&self, identity: Identity) -> Tls {
        let path = |name: &str| self.dir.path().join(name);
        let files = config::Tls {
            cert: path("server.pem"),
            key: path("server.key"),
            client_ca: Some(path("ca.pem")),
            crl: Some(path("crl.pem")),
            identity,
        };
        Tls::load(files).unwrap()
    }

    fn connector(&self, device: Option<Device>) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.ca.pem.as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let config = match device {
            Some(device) => builder.with_client_auth_cert(vec![device.cert], device.key).unwrap(),
            None => builder.with_no_client_auth(),
        };
        TlsConnector::from(Arc::new(config))
    }
}

/// One handshake; both sides' ends.
async fn shake(
    tls: &Tls,
    connector: &TlsConnector,
) -> (Result<TlsStream<TcpStream>, Failed>, io::Result<tokio_rustls::client::TlsStream<TcpStream>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (server, _) = listener.accept().await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    tokio::join!(tls.accept(server), connector.connect(name, client))
}

async fn refusal(tls: &Tls, connector: &TlsConnector) -> String {
    let (server, _client) = shake(tls, connector).await;
    let Err(failed) = server else { panic!("taken") };
    failed.kind
}

#[tokio::test]
async fn the_clients_name_is_the_one_that_the_config_asks_for() {
    let pki = Pki::new();
    for (identity, name) in [(Identity::Cn, "device-7"), (Identity::San, "7.devices.example")] {
        let tls = pki.load(identity);
        let device = pki.device(7);
        let io = shake(&tls, &pki.connector(Some(device))).await.0.ok().unwrap();
        assert_eq!(tls.client(&io), Some(name.into()));
    }
}

#[tokio::test]
async fn a_clients_certificate_is_looked_at_each_time_it_connects() {
    let pki = Pki::new();
    let tls = pki.load(Identity::Cn);
    let device = pki.connector(Some(pki.device(7)));
    for _ in 0..3 {
        let (server, client) = shake(&tls, &device).await;
        let (mut server, mut client) = (server.ok().unwrap(), client.unwrap());
        assert_eq!(server.get_ref().1.handshake_kind(), Some(rustls::HandshakeKind::Full));
        // With what comes in the client gets the tickets too, if there are any.
        tokio::io::AsyncWriteExt::shutdown(&mut server).await.unwrap();
        assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);
    }
}

#[tokio::test]
async fn a_revoked_client_is_refused_after_the_reload_and_those_connected_go_on() {
    let pki = Pki::new();
    let tls = pki.load(Identity::Cn);
    let device = pki.connector(Some(pki.device(7)));
    let (server, client) = shake(&tls, &device).await;
    let (mut server, mut client) = (server.ok().unwrap(), client.unwrap());

    pki.revoke(&[7]);
    assert!(matches!(tls.reload(), Reloaded::Taken));
    assert!(matches!(tls.reload(), Reloaded::Same));
    // The same connector: it would resume its session if it could.
    assert!(refusal(&tls, &device).await.contains("is revoked"));
    let other = pki.connector(Some(pki.device(8)));
    assert!(shake(&tls, &other).await.0.is_ok());

    tokio::io::AsyncWriteExt::write_all(&mut client, b"on").await.unwrap();
    tokio::io::AsyncWriteExt::flush(&mut client).await.unwrap();
    let mut heard = [0; 2];
    server.read_exact(&mut heard).await.unwrap();
    assert_eq!(&heard, b"on");
}

#[tokio::test]
async fn a_list_past_its_next_update_stays_in_force_and_is_told_of() {
    let pki = Pki::new();
    let tls = pki.load(Identity::Cn);
    assert_eq!(tls.outdated_lists(SystemTime::now()), None);
    pki.revoke_until(&[7], 2021);
    assert!(matches!(tls.reload(), Reloaded::Taken));
    let told = tls.outdated_lists(SystemTime::now()).unwrap();
    assert!(told.contains("crl.pem was to be replaced by 2021-01-01"), "{told}");
    assert!(refusal(&tls, &pki.connector(Some(pki.device(7)))).await.contains("is revoked"));
    assert!(shake(&tls, &pki.connector(Some(pki.device(8)))).await.0.is_ok());
    pki.revoke(&[7]);
    assert!(matches!(tls.reload(), Reloaded::Taken));
    assert_eq!(tls.outdated_lists(SystemTime::now()), None);
}

#[tokio::test]
async fn a_broken_file_is_named_once_and_the_old_certificates_stay() {
    let pki = Pki::new();
    let tls = pki.load(Identity::Cn);
    let device = pki.connector(Some(pki.device(7)));
    let key = std::fs::read_to_string(pki.dir.path().join("server.key")).unwrap();
    for (file, content) in [
        ("server.pem", "nothing"),
        ("server.key", &KeyPair::generate().unwrap().serialize_pem()),
        ("ca.pem", ""),
        ("crl.pem", "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"),
    ] {
        let before = std::fs::read_to_string(pki.dir.path().join(file)).unwrap();
        pki.write(file, content);
        let Reloaded::Broken(reason) = tls.reload() else { panic!("{file} was taken") };
        assert!(reason.contains(file), "{reason}");
        assert!(matches!(tls.reload(), Reloaded::Same));
        assert!(shake(&tls, &device).await.0.is_ok());
        pki.write(file, &before);
        assert!(matches!(tls.reload(), Reloaded::Taken));
    }
    std::fs::remove_file(pki.dir.path().join("server.key")).unwrap();
    assert!(matches!(tls.reload(), Reloaded::Broken(_)));
    assert!(shake(&tls, &device).await.0.is_ok());
    pki.write("server.key", &key);
    assert!(matches!(tls.reload(), Reloaded::Taken));
}

#[tokio::test]
async fn a_failed_handshake_says_what_to_do() {
    let pki = Pki::new();
    let tls = pki.load(Identity::Cn);
    assert!(refusal(&tls, &pki.connector(None)).await.contains("showed no certificate"));
    let stranger = Pki::new();
    let device = pki.connector(Some(stranger.device(7)));
    assert!(refusal(&tls, &device).await.contains("no CA of tls.client_ca"));
    assert!(refusal(&tls, &stranger.connector(None)).await.contains("does not trust tls.cert"));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut client, b"\x10\x0c\x00\x04MQTT\x05\x02\x00\x3c").await.unwrap();
    let (server, _) = listener.accept().await.unwrap();
    assert!(tls.accept(server).await.err().unwrap().kind.contains("does not speak TLS"));
}
