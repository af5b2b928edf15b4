//! TLS for a listener: its certificate and key, the authorities for client certificates, and
//! explanations of failed handshakes.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime, SystemTimeError};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::NoServerSessionStorage;
use rustls::{AlertDescription, CertificateError, PeerIncompatible, ServerConfig};
use sha2::{Digest, Sha256};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use x509_cert::crl::CertificateList;
use x509_cert::der::Decode;
use x509_cert::{Certificate, Version};

use super::authorities::{Authorities, Basis, Seen, observed};
use super::config::{self, ClientCert};
use super::{Failed, Shown, identity};
use crate::access::Proof;
use crate::files;

/// Largest certificate file.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// How long before a certificate's expiry the operator is warned.
const ENDS_SOON: Duration = Duration::from_secs(30 * 24 * 3_600);
/// Longest lifetime of a connection with a certificate that expires later.
const LIVES_MAX: Duration = Duration::from_secs(365 * 24 * 3_600);

/// The certificates in use, and their files.
pub struct Tls {
    files: config::Tls,
    /// Protocols that are offered (ALPN, RFC 7301).
    protocols: &'static [&'static [u8]],
    current: RwLock<Acceptor>,
    /// Result of the last check of the files, so that a broken file is reported once.
    seen: Mutex<Result<[u8; 32], Unusable>>,
    /// Whether the last check found a certificate that is not valid yet, which is tried again.
    is_early: AtomicBool,
    /// What the listener uses instead, once its configuration names other files or none.
    successor: OnceLock<Option<Arc<Self>>>,
}

#[derive(Clone)]
struct Acceptor {
    tls: TlsAcceptor,
    /// Subject of the server's own certificate.
    subject: Arc<str>,
    /// Start and end of that certificate's validity.
    valid: (SystemTime, SystemTime),
    /// Authorities for client certificates, if clients present any.
    authorities: Option<Arc<Authorities>>,
    /// When the first of the revocation lists must be replaced, at the latest.
    lists_until: Option<SystemTime>,
}

/// The revocation lists of one file.
pub(super) struct Lists<'t> {
    pub file: &'t Path,
    /// When the first list must be replaced; `None` if no list gives a time.
    until: Option<SystemTime>,
}

/// Holds until the first certificate of the client's path expires, as long as none of them is revoked
/// and `tls.client_ca` contains the authority.
struct CertificateProof {
    tls: Arc<Tls>,
    basis: Basis,
    until: Instant,
}

pub(super) enum Reloaded {
    Same,
    Taken,
    Broken(Unusable),
}

/// A file that cannot be used. The reason names the file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Unusable {
    pub file: PathBuf,
    pub reason: String,
}

/// The contents of all files, read together.
struct Material {
    cert: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<(PathBuf, Vec<u8>)>,
    crl: Option<(PathBuf, Vec<u8>)>,
}

impl Tls {
    /// Reads the files.
    pub fn load(files: config::Tls) -> Result<Self, Unusable> {
        Self::load_for(files, &[])
    }

    /// Reads the files, for a listener with these protocols, the preferred one first.
    pub fn load_for(files: config::Tls, protocols: &'static [&'static [u8]]) -> Result<Self, Unusable> {
        let material = Material::read(&files)?;
        let current = RwLock::new(material.acceptor(&files, protocols)?);
        let seen = Mutex::new(Ok(material.digest()));
        Ok(Self {
            files,
            protocols,
            current,
            seen,
            is_early: AtomicBool::new(false),
            successor: OnceLock::new(),
        })
    }

    /// Reads the files again and uses their contents. If anything is wrong, the current certificates
    /// stay in use. A certificate outside its validity period never replaces one that is within.
    pub(super) fn reload(&self) -> Reloaded {
        let material = Material::read(&self.files);
        let found = material.as_ref().map(Material::digest).map_err(Clone::clone);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let is_known = *seen == found;
        if is_known && !self.is_early.load(Ordering::Relaxed) {
            return Reloaded::Same;
        }
        *seen = found;
        self.is_early.store(false, Ordering::Relaxed);
        let acceptor = match material.and_then(|material| material.acceptor(&self.files, self.protocols)) {
            Ok(acceptor) => acceptor,
            Err(unusable) => return Reloaded::Broken(unusable),
        };
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        let now = SystemTime::now();
        if let (Some(wrong), None) = (acceptor.out_of_date(now), current.out_of_date(now)) {
            self.is_early.store(now < acceptor.valid.0, Ordering::Relaxed);
            return if is_known {
                Reloaded::Same
            } else {
                Reloaded::Broken(cannot_use(&self.files.cert, &wrong))
            };
        }
        *current = acceptor;
        Reloaded::Taken
    }

    /// Has the certificates of connected clients checked by what the listener uses from now on.
    pub(super) fn give_way_to(&self, next: Option<Arc<Self>>) {
        // Only once: it is not served after that.
        let _ = self.successor.set(next);
    }

    /// Returns what the listener of a connection with these certificates uses now.
    fn in_force(self: &Arc<Self>) -> Option<Arc<Self>> {
        let mut tls = self.clone();
        while let Some(next) = tls.successor.get().cloned() {
            tls = next?;
        }
        Some(tls)
    }

    fn current(&self) -> Acceptor {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns warnings about certificates in use that have expired or expire soon, and about overdue
    /// lists.
    pub fn warnings(&self, now: SystemTime) -> Vec<String> {
        let current = self.current();
        let mut warnings = Vec::from_iter(self.outdated_lists(now));
        let out_of_date = current.out_of_date(now);
        warnings.extend(
            out_of_date.map(|wrong| format!("{}: {wrong}, clients refuse it: renew it", self.name())),
        );
        for (file, subject, until) in self.ends(&current) {
            let (file, at) = (file.display(), humantime::format_rfc3339_seconds(until));
            if until > now && until < now + ENDS_SOON {
                warnings.push(format!("{file}: the certificate of {subject} ends at {at}: renew it before"));
            }
            if until <= now && file.to_string() != self.name().to_string() {
                warnings.push(format!(
                    "{file}: the certificate of {subject} has expired at {at} and admits no client: \
                     renew it, or remove it from the file"
                ));
            }
        }
        warnings
    }

    /// Returns for each file the worst problem with its certificates' validity periods.
    pub(super) fn faults(&self, now: SystemTime) -> BTreeMap<&Path, Option<String>> {
        let current = self.current();
        let mut faults: BTreeMap<&Path, Option<String>> = BTreeMap::new();
        let early = (now < current.valid.0).then(|| {
            let from = humantime::format_rfc3339_seconds(current.valid.0);
            format!("the certificate in it is not valid before {from}, by the clock of this machine: clients refuse it")
        });
        faults.insert(&self.files.cert, early);
        let mut ends = self.ends(&current);
        ends.sort_by_key(|(.., until)| *until);
        for (file, _, until) in ends {
            let left = seconds_until(until, now);
            let fault = if left <= 0.0 {
                Some("a certificate in it has ended: clients that need it cannot connect".to_owned())
            } else if left < ENDS_SOON.as_secs_f64() {
                Some(format!("a certificate in it ends within {} days", (left / 86_400.0).floor() + 1.0))
            } else {
                None
            };
            let known = faults.entry(file).or_default();
            *known = known.take().or(fault);
        }
        faults
    }

    /// Returns the seconds until the first certificate of each file expires, negative afterwards.
    pub(super) fn seconds_left(&self, now: SystemTime) -> BTreeMap<&Path, f64> {
        let mut left = BTreeMap::new();
        for (file, _, until) in self.ends(&self.current()) {
            let seconds = seconds_until(until, now);
            left.entry(file).and_modify(|least: &mut f64| *least = least.min(seconds)).or_insert(seconds);
        }
        left
    }

    /// Returns file, subject and expiry of each certificate in use.
    fn ends(&self, current: &Acceptor) -> Vec<(&Path, String, SystemTime)> {
        let mut ends = vec![(&*self.files.cert, current.subject.to_string(), current.valid.1)];
        if let (Some(path), Some(authorities)) = (&self.files.client_ca, &current.authorities) {
            ends.extend(authorities.ends().map(|(subject, until)| (&**path, subject.to_owned(), until)));
        }
        ends
    }

    /// Returns a warning if a revocation list in use is past its next update.
    fn outdated_lists(&self, now: SystemTime) -> Option<String> {
        let lists = self.lists()?;
        let overdue = lists.overdue(now)?;
        Some(format!("{} {overdue}; get a new list from the CA", lists.file.display()))
    }

    /// Returns the file of revocation lists, and when the first of them must be replaced.
    pub(super) fn lists(&self) -> Option<Lists<'_>> {
        Some(Lists { file: self.files.crl.as_deref()?, until: self.current().lists_until })
    }

    /// Returns the next time at which a certificate in use expires or a list must be replaced.
    pub(super) fn next_end(&self, now: SystemTime) -> Option<SystemTime> {
        let current = self.current();
        let ends = self.ends(&current).into_iter().map(|(_, _, until)| until);
        ends.chain(current.lists_until).chain([current.valid.0]).filter(|until| *until > now).min()
    }

    pub(super) fn name(&self) -> std::path::Display<'_> {
        self.cert().display()
    }

    pub(super) fn cert(&self) -> &Path {
        &self.files.cert
    }

    pub(super) fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.files().map(|(_, file)| file)
    }

    /// Returns the folders of the files.
    pub(super) fn folders(&self) -> impl Iterator<Item = &Path> {
        self.files().map(|file| match file.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        })
    }

    /// Performs the handshake. Returns the stream and what the client presented.
    pub(super) async fn accept(
        self: &Arc<Self>,
        socket: TcpStream,
    ) -> Result<(TlsStream<TcpStream>, Option<Shown>), Failed> {
        let acceptor = self.current().tls;
        let (io, seen) = observed(acceptor.accept(socket)).await;
        let io = io.map_err(|error| explain(&error, &seen))?;
        let own = io.get_ref().1.peer_certificates().and_then(<[_]>::first);
        let shown = own.zip(seen.basis).map(|(own, basis)| {
            let left = basis.until.duration_since(SystemTime::now()).unwrap_or_default().min(LIVES_MAX);
            let proof = CertificateProof { tls: self.clone(), basis, until: Instant::now() + left };
            Shown { identity: identity::of(own, self.files.identity), proof: Arc::new(proof) }
        });
        Ok((io, shown))
    }
}

impl Lists<'_> {
    /// Returns the seconds until the first list must be replaced, negative afterwards; infinite if no
    /// list gives a time.
    pub fn seconds_left(&self, now: SystemTime) -> f64 {
        self.until.map_or(f64::INFINITY, |until| seconds_until(until, now))
    }

    /// Returns a warning if a list was not replaced in time.
    pub fn overdue(&self, now: SystemTime) -> Option<String> {
        let until = self.until.filter(|until| *until < now)?;
        let due = humantime::format_rfc3339_seconds(until);
        Some(format!("was to be replaced by {due}: clients revoked since then still get in"))
    }
}

fn seconds_until(until: SystemTime, now: SystemTime) -> f64 {
    let passed = |error: SystemTimeError| -error.duration().as_secs_f64();
    until.duration_since(now).map_or_else(passed, |left| left.as_secs_f64())
}

impl Proof for CertificateProof {
    fn holds(&self) -> bool {
        let authorities = self.tls.in_force().and_then(|tls| tls.current().authorities);
        authorities.is_some_and(|authorities| authorities.trust(&self.basis))
    }

    fn valid_until(&self) -> Option<Instant> {
        Some(self.until)
    }
}

impl fmt::Debug for CertificateProof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificateProof").field("basis", &self.basis).finish_non_exhaustive()
    }
}

impl Acceptor {
    /// Returns why clients refuse the server's certificate, if it is outside its validity period.
    fn out_of_date(&self, now: SystemTime) -> Option<String> {
        let (from, until) = self.valid;
        let at = |time| humantime::format_rfc3339_seconds(time);
        if now > until {
            return Some(format!("it has expired at {}", at(until)));
        }
        (now < from).then(|| format!("it is not valid before {}", at(from)))
    }
}

/// Returns the certificates of a client that has proved possession of the first. They have at most the
/// size of one TLS handshake message, 64 KiB.
pub(super) fn shown(io: &TlsStream<TcpStream>) -> Box<[Box<[u8]>]> {
    let shown = io.get_ref().1.peer_certificates().unwrap_or_default();
    shown.iter().map(|certificate| certificate.as_ref().into()).collect()
}

impl Material {
    fn read(files: &config::Tls) -> Result<Self, Unusable> {
        let named = |path: &Option<PathBuf>| match path {
            Some(path) => Ok(Some((path.clone(), read(path)?))),
            None => Ok(None),
        };
        Ok(Self {
            cert: read(&files.cert)?,
            key: read(&files.key)?,
            client_ca: named(&files.client_ca)?,
            crl: named(&files.crl)?,
        })
    }

    fn digest(&self) -> [u8; 32] {
        let (client_ca, crl) = (self.client_ca.as_ref(), self.crl.as_ref());
        let mut hash = Sha256::new();
        let rest = [client_ca, crl].map(|file| file.map_or(&[][..], |(_, bytes)| bytes));
        for part in [&self.cert[..], &self.key, rest[0], rest[1]] {
            hash.update(part.len().to_le_bytes());
            hash.update(part);
        }
        hash.finalize().into()
    }

    fn acceptor(&self, files: &config::Tls, protocols: &[&[u8]]) -> Result<Acceptor, Unusable> {
        let mut lists_until = None;
        let config::Tls { cert, key, .. } = files;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| cannot_use(cert, &error))?;
        let mut authorities = None;
        if let Some((path, bytes)) = &self.client_ca {
            let lists = match &self.crl {
                Some((path, bytes)) => Some((&**path, revoked(path, bytes)?)),
                None => None,
            };
            // Not enforced: see `Tls::outdated_lists`.
            lists_until = lists.iter().flat_map(|(_, lists)| lists).filter_map(next_update).min();
            let algorithms = provider.signature_verification_algorithms;
            let is_mandatory = files.client_cert == ClientCert::Required;
            let listed = (&**path, certificates(path, bytes)?);
            authorities = Some(Arc::new(Authorities::new(listed, lists, algorithms, is_mandatory)?));
        }
        let builder = match &authorities {
            None => builder.with_no_client_auth(),
            Some(authorities) => builder.with_client_cert_verifier(authorities.clone()),
        };
        let chain = certificates(cert, &self.cert)?;
        let own = Certificate::from_der(&chain[0]).map_err(|error| cannot_use(cert, &error))?.tbs_certificate;
        let (subject, dates) = (own.subject.to_string().into(), own.validity);
        let valid = (dates.not_before.to_system_time(), dates.not_after.to_system_time());
        let private = PrivateKeyDer::from_pem_slice(&self.key).map_err(|error| cannot_use(key, &error))?;
        let is_version_1 = own.version == Version::V1;
        let mut config = builder.with_single_cert(chain, private).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => {
                let (file, cert) = (key.clone(), cert.display());
                let reason =
                    format!("the key {} does not match the certificate {cert}: {error}", key.display());
                Unusable { file, reason }
            }
            _ if is_version_1 => cannot_use(cert, &VERSION_1),
            error => cannot_use(cert, &error),
        })?;
        config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
        if self.client_ca.is_some() {
            // A session that is resumed brings its certificate unchecked, expired perhaps.
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.send_tls13_tickets = 0;
        }
        Ok(Acceptor { tls: TlsAcceptor::from(Arc::new(config)), subject, valid, authorities, lists_until })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Unusable> {
    let size = std::fs::metadata(path).map_err(|error| cannot_use(path, &error))?.len();
    if size > FILE_BYTES_MAX {
        return Err(cannot_use(path, &format!("it has {size} bytes, at most {FILE_BYTES_MAX} are read")));
    }
    files::read(path).map_err(|error| cannot_use(path, &error))
}

fn certificates(path: &Path, bytes: &[u8]) -> Result<Vec<CertificateDer<'static>>, Unusable> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(bytes).collect();
    match found {
        Ok(found) if found.is_empty() => Err(cannot_use(path, &"it holds no certificate (PEM)")),
        found => found.map_err(|error| cannot_use(path, &error)),
    }
}

fn revoked(path: &Path, bytes: &[u8]) -> Result<Vec<CertificateRevocationListDer<'static>>, Unusable> {
    let found: Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(bytes).collect();
    match found {
        Ok(found) if found.is_empty() => Err(cannot_use(path, &"it holds no revocation list (PEM)")),
        found => found.map_err(|error| cannot_use(path, &error)),
    }
}

fn next_update(list: &CertificateRevocationListDer<'_>) -> Option<SystemTime> {
    let list = CertificateList::from_der(list).ok()?;
    list.tbs_cert_list.next_update.map(|time| time.to_system_time())
}

/// Explains the problem with a certificate that `openssl x509 -req` makes without an extension file.
pub(super) const VERSION_1: &str = "it is of X.509 version 1, and TLS takes version 3 here: make it again with \
     `openssl x509 -req … -extfile`, whose file holds subjectAltName";

pub(super) fn cannot_use(path: &Path, error: &dyn std::fmt::Display) -> Unusable {
    Unusable { file: path.to_owned(), reason: format!("cannot use {}: {error}", path.display()) }
}

/// Describes what failed and what to do.
fn explain(error: &io::Error, seen: &Seen) -> Failed {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>());
    let (counted, what) = match cause {
        None => return Failed::lost(error),
        Some(tls) => (counted(tls), seen.refusal.as_deref().unwrap_or_else(|| meant(tls))),
    };
    let kind = format!("TLS handshake: {what}");
    match &seen.subject {
        Some(subject) => {
            let detail = format_args!("certificate of {subject}: {error}");
            Failed { who: Some(subject.clone()), ..Failed::new(counted, kind, detail) }
        }
        None => Failed::new(counted, kind, error),
    }
}

/// Returns the cause under which a failed handshake is counted.
fn counted(cause: &rustls::Error) -> &'static str {
    use rustls::Error::{InvalidCertificate, NoCertificatesPresented};
    match cause {
        NoCertificatesPresented => "tls_no_certificate",
        InvalidCertificate(CertificateError::Revoked) => "tls_revoked",
        InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            "tls_unknown_ca"
        }
        InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            "tls_expired"
        }
        _ => "tls",
    }
}

/// Returns the meaning of a failed handshake, and what to do.
fn meant(cause: &rustls::Error) -> &'static str {
    use rustls::Error as Tls;
    match cause {
        Tls::NoCertificatesPresented => {
            "the client showed no certificate: give it one that a CA of tls.client_ca has signed"
        }
        Tls::InvalidCertificate(reason) => match reason {
            CertificateError::Revoked => "the client's certificate is revoked: give it a new one",
            // The signature is wrong where another CA has the same name.
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                "no CA of tls.client_ca has signed the client's certificate: give it another, or add the CA"
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                "the client's certificate has expired: renew it, or set this machine's clock"
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "the client's certificate is not valid yet: set this machine's clock, or the CA's"
            }
            CertificateError::UnknownRevocationStatus => {
                "tls.crl has no list of the CA that signed the client's certificate: add it"
            }
            _ => "the client's certificate cannot be used: give it another",
        },
        Tls::AlertReceived(alert) => match alert {
            AlertDescription::UnknownCA
            | AlertDescription::DecryptError
            | AlertDescription::BadCertificate
            | AlertDescription::CertificateUnknown => {
                "the client does not trust tls.cert: give it the CA that signed it, and let the name fit"
            }
            AlertDescription::CertificateExpired => {
                "the client says that tls.cert has expired: renew it, or set the client's clock"
            }
            _ => "the client ended the handshake",
        },
        Tls::InvalidMessage(_) => {
            "the client does not speak TLS: switch TLS on there, or use the port without"
        }
        Tls::PeerIncompatible(what) => match what {
            PeerIncompatible::NoCipherSuitesInCommon => {
                "no cipher suite in common: the client needs ECDHE with AES-GCM or ChaCha20-Poly1305"
            }
            PeerIncompatible::NoKxGroupsInCommon | PeerIncompatible::NamedGroupsExtensionRequired => {
                "no key exchange group in common: the client needs X25519, P-256 or P-384"
            }
            PeerIncompatible::NoSignatureSchemesInCommon
            | PeerIncompatible::NoCertificateRequestSignatureSchemesInCommon => {
                "the client takes no signature that the key of tls.cert can make: use another kind of key"
            }
            PeerIncompatible::SupportedVersionsExtensionRequired
            | PeerIncompatible::ServerDoesNotSupportTls12Or13
            | PeerIncompatible::Tls12NotOffered
            | PeerIncompatible::Tls12NotOfferedOrEnabled => "the client is too old: TLS 1.2 or 1.3 is needed",
            _ => "the client and this host have no way of TLS in common",
        },
        _ => "failed",
    }
}

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;
