use headworks_test_certificates::{Authority, Settings};
use rcgen::{KeyPair, KeyUsagePurpose};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tokio_rustls::TlsConnector;

use super::super::config::Identity;
use super::super::reload::{Told, note_certificates, note_lists, note_reload};
use super::*;
use crate::telemetry::Failures;

struct Pki {
    dir: tempfile::TempDir,
    ca: Authority,
}

/// Its own certificate first.
struct Device {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

fn device_of(authority: &Authority, name: &str, serial: u64) -> Device {
    let signed = authority.sign(name, &[], serial);
    Device {
        chain: vec![CertificateDer::from_pem_slice(signed.cert.as_bytes()).unwrap()],
        key: PrivateKeyDer::from_pem_slice(signed.key.as_bytes()).unwrap(),
    }
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
            chain: vec![CertificateDer::from_pem_slice(signed.cert.as_bytes()).unwrap()],
            key: PrivateKeyDer::from_pem_slice(signed.key.as_bytes()).unwrap(),
        }
    }

    fn load(&self, identity: Identity) -> Arc<Tls> {
        self.load_with(|files| files.identity = identity)
    }

    fn load_with(&self, change: impl FnOnce(&mut config::Tls)) -> Arc<Tls> {
        let path = |name: &str| self.dir.path().join(name);
        let mut files = config::Tls {
            cert: path("server.pem"),
            key: path("server.key"),
            client_ca: Some(path("ca.pem")),
            client_cert: ClientCert::Required,
            crl: Some(path("crl.pem")),
            identity: Identity::Cn,
        };
        change(&mut files);
        Arc::new(Tls::load(files).unwrap())
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
            Some(device) => builder.with_client_auth_cert(device.chain, device.key).unwrap(),
            None => builder.with_no_client_auth(),
        };
        TlsConnector::from(Arc::new(config))
    }
}

type Accepted = Result<(TlsStream<TcpStream>, Option<Shown>), Failed>;

/// One handshake; both sides' ends.
async fn shake(
    tls: &Arc<Tls>,
    connector: &TlsConnector,
) -> (Accepted, io::Result<tokio_rustls::client::TlsStream<TcpStream>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (server, _) = listener.accept().await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    tokio::join!(tls.accept(server), connector.connect(name, client))
}

async fn refusal(tls: &Arc<Tls>, connector: &TlsConnector) -> String {
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
        let (_, shown) = shake(&tls, &pki.connector(Some(device))).await.0.ok().unwrap();
        assert_eq!(shown.unwrap().identity, Some(name.into()));
    }
}

#[tokio::test]
async fn a_connected_client_rests_on_the_authorities_that_its_listener_uses_now() {
    let pki = Pki::new();
    let tls = pki.load(Identity::Cn);
    let device = pki.connector(Some(pki.device(7)));
    let (_, shown) = shake(&tls, &device).await.0.ok().unwrap();
    let proof = shown.unwrap().proof;
    let next = pki.load(Identity::San);
    tls.give_way_to(Some(next.clone()));
    assert!(proof.holds(), "the other files have its authority");
    let without = pki.load_with(|files| (files.client_ca, files.crl) = (None, None));
    next.give_way_to(Some(without.clone()));
    assert!(!proof.holds());
    without.give_way_to(None);
    assert!(!proof.holds(), "the listener serves without TLS");
}

#[tokio::test]
async fn a_clients_certificate_is_looked_at_each_time_it_connects() {
    let pki = Pki::new();
    let tls = pki.load(Identity::Cn);
    let device = pki.connector(Some(pki.device(7)));
    for _ in 0..3 {
        let (server, client) = shake(&tls, &device).await;
        let ((mut server, _), mut client) = (server.ok().unwrap(), client.unwrap());
        assert_eq!(server.get_ref().1.handshake_kind(), Some(rustls::HandshakeKind::Full));
        // With what comes in the client gets the tickets too, if there are any.
        tokio::io::AsyncWriteExt::shutdown(&mut server).await.unwrap();
        assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);
    }
}

#[tokio::test]
async fn a_client_whose_certificate_is_revoked_is_refused_and_loses_its_standing() {
    let pki = Pki::new();
    let tls = pki.load(Identity::Cn);
    let device = pki.connector(Some(pki.device(7)));
    let other = pki.connector(Some(pki.device(8)));
    let proof = async |device| shake(&tls, device).await.0.ok().unwrap().1.unwrap().proof;
    let (revoked, good) = (proof(&device).await, proof(&other).await);
    pki.revoke(&[7]);
    assert!(matches!(tls.reload(), Reloaded::Taken));
    assert!(matches!(tls.reload(), Reloaded::Same));
    assert!(!revoked.holds() && good.holds());
    // The same connector: it would resume its session if it could.
    assert!(refusal(&tls, &device).await.contains("is revoked"));
    assert!(shake(&tls, &other).await.0.is_ok());
    pki.write("ca.pem", &Authority::new("another CA").pem);
    assert!(matches!(tls.reload(), Reloaded::Taken));
    assert!(!good.holds(), "its CA is no longer listed");
}

/// A device that `authority` has signed; it shows the authority's certificate too.
fn device_below(authority: &Authority) -> Device {
    let mut device = device_of(authority, "admin", 1);
    device.chain.push(CertificateDer::from_pem_slice(authority.pem.as_bytes()).unwrap());
    device
}

#[tokio::test]
async fn nothing_below_a_revoked_ca_gets_in_wherever_its_entry_and_its_certificate_are() {
    let pki = Pki::new();
    let site = pki.ca.authority("site CA", 50, Settings::ca());
    let sites = site.revoke_until(&[], 2090);
    let admin = |chain: bool| {
        pki.connector(Some(if chain { device_below(&site) } else { device_of(&site, "admin", 1) }))
    };
    let both = format!("{}{}", pki.ca.pem, site.pem);
    let (clean, listed) = (pki.ca.revoke_until(&[], 2090), pki.ca.revoke_until(&[50], 2090));
    let tls = pki.load(Identity::Cn);
    for (client_ca, chain) in [(&pki.ca.pem, true), (&both, true), (&both, false)] {
        pki.write("ca.pem", client_ca);
        // One list of each CA; only the one of the CA that signs clients; an entry in a second list.
        for (lists, gets_in) in [
            (vec![&clean, &sites], true),
            (vec![&sites], true),
            (vec![&listed, &sites], false),
            (vec![&clean, &sites, &listed], false),
            (vec![&clean], false),
        ] {
            pki.write("crl.pem", &lists.into_iter().cloned().collect::<String>());
            assert!(matches!(tls.reload(), Reloaded::Taken));
            assert_eq!(shake(&tls, &admin(chain)).await.0.is_ok(), gets_in, "chain {chain}");
        }
    }
}

#[tokio::test]
async fn a_listed_certificate_that_may_sign_nobody_lets_in_only_who_shows_it() {
    let pki = Pki::new();
    let of_a_path = Settings { path_len: Some(0), ..Settings::ca() };
    for settings in [
        Settings::default(),
        Settings { key_usages: vec![KeyUsagePurpose::DigitalSignature], ..Settings::ca() },
    ] {
        let pinned = Authority::with("press-7", settings);
        pki.write("ca.pem", &format!("{}{}", pki.ca.pem, pinned.pem));
        let tls = pki.load_with(|files| files.crl = None);
        let itself = Device {
            chain: vec![CertificateDer::from_pem_slice(pinned.pem.as_bytes()).unwrap()],
            key: PrivateKeyDer::from_pem_slice(pinned.key().as_bytes()).unwrap(),
        };
        let (_, shown) = shake(&tls, &pki.connector(Some(itself))).await.0.ok().unwrap();
        assert_eq!(shown.unwrap().identity, Some("press-7".into()));
        let signed = pki.connector(Some(device_of(&pinned, "admin", 1)));
        assert!(refusal(&tls, &signed).await.contains("no CA of tls.client_ca"));
        assert!(shake(&tls, &pki.connector(Some(pki.device(8)))).await.0.is_ok());
    }
    // A CA that allows no other below it.
    let narrow = Authority::with("narrow CA", of_a_path);
    pki.write("ca.pem", &narrow.pem);
    let tls = pki.load_with(|files| files.crl = None);
    let direct = pki.connector(Some(device_of(&narrow, "press-7", 1)));
    assert!(shake(&tls, &direct).await.0.is_ok());
    let deep = device_below(&narrow.authority("site CA", 50, Settings::ca()));
    assert!(shake(&tls, &pki.connector(Some(deep))).await.0.is_err());
}

#[tokio::test]
async fn a_ca_that_has_expired_lets_nobody_in_and_is_told_of() {
    let pki = Pki::new();
    let old = Authority::with("old CA", Settings { until: Some(2021), ..Settings::ca() });
    pki.write("ca.pem", &format!("{}{}", pki.ca.pem, old.pem));
    let tls = pki.load_with(|files| files.crl = None);
    assert!(
        tls.warnings(SystemTime::now()).iter().any(|told| told.contains("old CA has expired at 2021-01-01"))
    );
    let refused = refusal(&tls, &pki.connector(Some(device_of(&old, "admin", 1)))).await;
    assert!(refused.contains("the CA that signed the client's certificate, CN=old CA"), "{refused}");
    assert!(tls.seconds_left(SystemTime::now())[pki.dir.path().join("ca.pem").as_path()] < 0.0);
    assert!(shake(&tls, &pki.connector(Some(pki.device(8)))).await.0.is_ok());
}

#[tokio::test]
async fn a_client_is_trusted_until_the_first_certificate_of_its_path_ends() {
    let pki = Pki::new();
    let tls = pki.load_with(|files| files.crl = None);
    let now = Instant::now();
    let hour = Duration::from_secs(3_600);
    let in_hours = |hours: u32| Some(SystemTime::now() + hour * hours);
    for (own, above, first) in [(2, 5, 2), (5, 2, 2)] {
        let site = pki.ca.authority("site CA", 50, Settings { ends: in_hours(above), ..Settings::ca() });
        let device = site.sign_with("press-7", 1, Settings { ends: in_hours(own), ..Settings::default() });
        let chain =
            [&device.cert, &site.pem].map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap());
        let key = PrivateKeyDer::from_pem_slice(device.key.as_bytes()).unwrap();
        let connector = pki.connector(Some(Device { chain: chain.into(), key }));
        let (_, shown) = shake(&tls, &connector).await.0.ok().unwrap();
        let left = shown.unwrap().proof.valid_until().unwrap() - now;
        assert!(left > hour * (first - 1) && left < hour * (first + 1), "{left:?}");
    }
}

#[tokio::test]
async fn with_an_optional_certificate_a_client_may_show_none_but_no_wrong_one() {
    let pki = Pki::new();
    let tls = pki.load_with(|files| files.client_cert = ClientCert::Optional);
    assert!(shake(&tls, &pki.connector(None)).await.0.ok().unwrap().1.is_none());
    assert!(shake(&tls, &pki.connector(Some(pki.device(7)))).await.0.ok().unwrap().1.is_some());
    let strangers = Pki::new().device(7);
    assert!(refusal(&tls, &pki.connector(Some(strangers))).await.contains("no CA of tls.client_ca"));
}

#[tokio::test]
async fn a_server_certificate_out_of_its_dates_never_replaces_one_that_works() {
    let pki = Pki::new();
    let tls = pki.load(Identity::Cn);
    let device = pki.connector(Some(pki.device(7)));
    for (settings, said) in [
        (Settings { until: Some(2021), ..Settings::default() }, "has expired at 2021-01-01"),
        (
            Settings { from: Some(2090), until: Some(2091), ..Settings::default() },
            "is not valid before 2090-01-01",
        ),
    ] {
        let expired = pki.ca.sign_with("server", 1, settings);
        pki.write("server.pem", &expired.cert);
        pki.write("server.key", &expired.key);
        let Reloaded::Broken(unusable) = tls.reload() else { panic!("taken") };
        assert!(unusable.reason.contains(said), "{unusable}");
        assert!(matches!(tls.reload(), Reloaded::Same));
        assert!(shake(&tls, &device).await.1.is_ok());
        let fresh = pki.load(Identity::Cn);
        assert!(fresh.warnings(SystemTime::now()).iter().any(|told| told.contains(said)));
    }
}

#[test]
fn a_certificate_is_a_problem_a_month_before_it_ends_and_while_it_is_not_valid_yet() {
    let (pki, failures) = (Pki::new(), Failures::default());
    let day = Duration::from_secs(86_400);
    let certificate = pki.ca.sign_with(
        "server",
        1,
        Settings { from: Some(2041), until: Some(2043), ..Settings::default() },
    );
    pki.write("server.pem", &certificate.cert);
    pki.write("server.key", &certificate.key);
    let tls = pki.load(Identity::Cn);
    let from = humantime::parse_rfc3339("2041-01-01T00:00:00Z").unwrap();
    let until = humantime::parse_rfc3339("2043-01-01T00:00:00Z").unwrap();
    let causes = |now| {
        note_certificates(&[Arc::clone(&tls), Arc::clone(&tls)], &failures, now);
        let standing = failures.standing().into_iter();
        standing.filter(|it| it.part.ends_with("server.pem")).map(|it| it.cause).collect::<Vec<_>>()
    };
    let early = causes(from - day);
    assert!(early.len() == 1 && early[0].contains("not valid before 2041-01-01"), "{early:?}");
    assert_eq!(tls.next_end(from - day), Some(from), "it is looked at in the moment that it becomes valid");
    assert_eq!(causes(from + day), [""; 0]);
    assert_eq!(causes(until - 6 * day - day / 2), ["a certificate in it ends within 7 days"]);
    assert_eq!(causes(until + day), ["a certificate in it has ended: clients that need it cannot connect"]);
}

#[tokio::test]
async fn a_list_past_its_next_update_stays_in_force_and_is_told_of() {
    let (pki, failures) = (Pki::new(), Failures::default());
    let tls = pki.load(Identity::Cn);
    assert_eq!(tls.warnings(SystemTime::now()), [""; 0]);
    pki.revoke_until(&[7], 2021);
    assert!(matches!(tls.reload(), Reloaded::Taken));
    let told = tls.warnings(SystemTime::now()).concat();
    assert!(told.contains("crl.pem was to be replaced by 2021-01-01"), "{told}");
    let problems = |tls: &Arc<Tls>| {
        note_lists(std::slice::from_ref(tls), &failures, SystemTime::now());
        failures.standing()
    };
    let problem = problems(&tls).remove(0);
    assert!(problem.part.starts_with("revocation list ") && problem.part.ends_with("crl.pem"));
    assert!(problem.kind == "certificate" && problem.cause.contains("still get in"), "{problem:?}");
    assert!(tls.lists().unwrap().seconds_left(SystemTime::now()) < 0.0);
    assert!(refusal(&tls, &pki.connector(Some(pki.device(7)))).await.contains("is revoked"));
    assert!(shake(&tls, &pki.connector(Some(pki.device(8)))).await.0.is_ok());
    pki.revoke(&[7]);
    assert!(matches!(tls.reload(), Reloaded::Taken));
    assert_eq!(tls.warnings(SystemTime::now()), [""; 0]);
    assert_eq!(problems(&tls), []);
}

#[test]
fn a_list_is_told_of_in_the_moment_that_it_is_due_and_then_daily() {
    let pki = Pki::new();
    pki.revoke_until(&[7], 2080);
    let tls = pki.load(Identity::Cn);
    let due = tls.next_end(SystemTime::now()).unwrap();
    let lists = tls.lists().unwrap();
    assert!((lists.overdue(due), lists.seconds_left(due)) == (None, 0.0), "the list ends first");
    let soon = due + Duration::from_millis(10);
    assert!(tls.warnings(soon).iter().any(|told| told.contains("crl.pem was to be replaced by 2080")));
    assert!(tls.next_end(soon).unwrap() > soon);

    let (mut told, start, hour) = (Told::default(), tokio::time::Instant::now(), Duration::from_secs(3_600));
    let mut news = |warnings: &[&str], after| {
        told.news(warnings.iter().map(|warning| (*warning).to_owned()).collect(), start + after)
    };
    assert_eq!(news(&["a", "a"], Duration::ZERO), ["a"]);
    assert_eq!(news(&["a", "b"], hour), ["b"]);
    assert_eq!(news(&["a"], 24 * hour), ["a"]);
    assert_eq!(news(&["a", "b"], 24 * hour), ["b"], "it had ended");
}

#[tokio::test]
async fn a_broken_file_is_named_once_and_the_old_certificates_stay() {
    let (pki, failures) = (Pki::new(), Failures::default());
    let tls = pki.load(Identity::Cn);
    let device = pki.connector(Some(pki.device(7)));
    let told = |reloaded: &Reloaded| {
        note_reload(&tls, &failures, reloaded);
        failures.standing().into_iter().map(|fault| fault.part).collect::<Vec<_>>()
    };
    let key = std::fs::read_to_string(pki.dir.path().join("server.key")).unwrap();
    for (file, content) in [
        ("server.pem", "nothing"),
        ("server.key", &KeyPair::generate().unwrap().serialize_pem()),
        ("ca.pem", ""),
        ("crl.pem", "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"),
    ] {
        let before = std::fs::read_to_string(pki.dir.path().join(file)).unwrap();
        pki.write(file, content);
        let reloaded = tls.reload();
        let Reloaded::Broken(unusable) = &reloaded else { panic!("{file} was taken") };
        assert!(unusable.reason.contains(file), "{unusable}");
        let path = pki.dir.path().join(file);
        assert_eq!(told(&reloaded), [format!("file {}", path.display())]);
        assert!(matches!(tls.reload(), Reloaded::Same));
        assert!(shake(&tls, &device).await.0.is_ok());
        pki.write(file, &before);
        let reloaded = tls.reload();
        assert!(matches!(reloaded, Reloaded::Taken));
        assert_eq!(told(&reloaded), [""; 0]);
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

#[test]
fn a_failed_handshake_counts_for_what_is_wrong_with_the_clients_certificate() {
    use rustls::Error as Tls;
    let counted = |error: Tls| explain(&io::Error::other(error), &Seen::default()).cause;
    let invalid = |why| counted(Tls::InvalidCertificate(why));
    assert_eq!(counted(Tls::NoCertificatesPresented), "tls_no_certificate");
    assert_eq!(invalid(CertificateError::UnknownIssuer), "tls_unknown_ca");
    assert_eq!(invalid(CertificateError::Expired), "tls_expired");
    assert_eq!(invalid(CertificateError::Revoked), "tls_revoked");
    assert_eq!(invalid(CertificateError::BadEncoding), "tls");
    assert_eq!(counted(Tls::PeerIncompatible(PeerIncompatible::Tls12NotOffered)), "tls");
    let left = io::Error::from(io::ErrorKind::ConnectionReset);
    assert_eq!(explain(&left, &Seen::default()).cause, "lost");
}

#[tokio::test]
async fn a_certificate_of_version_1_is_told_with_how_to_make_it_again() {
    let pki = Pki::new();
    let dir = pki.dir.path();
    let openssl = |arguments: &str| {
        let mut command = std::process::Command::new("openssl");
        let output = command.args(arguments.split(' ')).current_dir(dir).output().unwrap();
        assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    };
    const KEY: &str = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    openssl(&format!("req -x509 {KEY} -days 2 -subj /CN=CA -keyout ca.key -out ca.pem"));
    openssl(&format!("req -new {KEY} -subj /CN=localhost -keyout v1.key -out v1.csr"));
    openssl("x509 -req -days 2 -in v1.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out v1.pem");
    let tls = pki.load_with(|files| files.crl = None);
    let read = |name: &str| std::fs::read(dir.join(name)).unwrap();
    let chain = vec![CertificateDer::from_pem_slice(&read("v1.pem")).unwrap()];
    let key = PrivateKeyDer::from_pem_slice(&read("v1.key")).unwrap();
    let key = rustls::crypto::ring::sign::any_supported_type(&key).unwrap();
    let shown = rustls::sign::SingleCertAndKey::from(rustls::sign::CertifiedKey::new(chain, key));
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(pki.ca.pem.as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_client_cert_resolver(Arc::new(shown));
    let said = refusal(&tls, &TlsConnector::from(Arc::new(config))).await;
    assert!(said.contains("version 1") && said.contains("-extfile"), "{said}");

    for (cert, key, expected) in
        [("v1.pem", "v1.key", "version 1"), ("server.pem", "v1.key", "does not match")]
    {
        let files = config::Tls {
            cert: dir.join(cert),
            key: dir.join(key),
            client_ca: None,
            client_cert: ClientCert::default(),
            crl: None,
            identity: Identity::Cn,
        };
        let said = Tls::load(files).err().unwrap().reason;
        assert!(said.contains(expected) && said.contains(cert), "{said}");
    }
}
