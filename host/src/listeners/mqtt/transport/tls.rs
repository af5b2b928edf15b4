//! TLS for a listener: certificate, key, who may sign clients' certificates and
//! which of those are revoked, and what a failed handshake means.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::SystemTime;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{AlertDescription, CertificateError, RootCertStore, ServerConfig};
use sha2::{Digest, Sha256};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use x509_cert::crl::CertificateList;
use x509_cert::der::Decode;

use super::super::config;
use super::{Failed, identity};

/// A file of certificates that is larger is not one.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// The certificates in use, and the files that they came from.
pub struct Tls {
    files: config::Tls,
    current: RwLock<Acceptor>,
    /// What the last look found, good or not: a broken file is said once.
    seen: Mutex<Result<[u8; 32], String>>,
}

#[derive(Clone)]
struct Acceptor {
    tls: TlsAcceptor,
    /// When the first of the revocation lists is to be replaced, at the latest.
    lists_until: Option<SystemTime>,
}

pub(super) enum Reloaded {
    Same,
    Taken,
    /// File and reason.
    Broken(String),
}

/// The files' bytes, read together.
struct Material {
    cert: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<(PathBuf, Vec<u8>)>,
    crl: Option<(PathBuf, Vec<u8>)>,
}

impl Tls {
    /// Reads the files; errors name the file.
    pub fn load(files: config::Tls) -> Result<Self, String> {
        let material = Material::read(&files)?;
        let current = RwLock::new(material.acceptor(&files)?);
        Ok(Self { files, current, seen: Mutex::new(Ok(material.digest())) })
    }

    /// Takes what is in the files now. Anything wrong: all stays as it is.
    /// Connections that are there are not touched.
    pub(super) fn reload(&self) -> Reloaded {
        let material = Material::read(&self.files);
        let found = material.as_ref().map(Material::digest).map_err(Clone::clone);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if *seen == found {
            return Reloaded::Same;
        }
        *seen = found;
        match material.and_then(|material| material.acceptor(&self.files)) {
            Ok(acceptor) => {
                *self.current.write().unwrap_or_else(PoisonError::into_inner) = acceptor;
                Reloaded::Taken
            }
            Err(reason) => Reloaded::Broken(reason),
        }
    }

    /// A revocation list in use is past its next update: what to tell a person.
    pub(super) fn outdated_lists(&self, now: SystemTime) -> Option<String> {
        let until = self.current.read().unwrap_or_else(PoisonError::into_inner).lists_until?;
        let crl = self.files.crl.as_ref()?;
        let due = humantime::format_rfc3339_seconds(until);
        (until < now).then(|| {
            format!(
                "{} was to be replaced by {due}: clients revoked since then still get in; get a new list from the CA",
                crl.display()
            )
        })
    }

    pub(super) fn name(&self) -> std::path::Display<'_> {
        self.files.cert.display()
    }

    /// Where its files lie.
    pub(super) fn folders(&self) -> impl Iterator<Item = &Path> {
        let config::Tls { cert, key, client_ca, crl, .. } = &self.files;
        let files = [Some(cert), Some(key), client_ca.as_ref(), crl.as_ref()];
        files.into_iter().flatten().map(|file| match file.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        })
    }

    pub(super) async fn accept(&self, socket: TcpStream) -> Result<TlsStream<TcpStream>, Failed> {
        let acceptor = self.current.read().unwrap_or_else(PoisonError::into_inner).tls.clone();
        acceptor.accept(socket).await.map_err(|error| explain(&error))
    }

    /// The client's name in the certificate that it showed.
    pub(super) fn client(&self, io: &TlsStream<TcpStream>) -> Option<Box<str>> {
        let shown = io.get_ref().1.peer_certificates()?.first()?;
        identity::of(shown, self.files.identity)
    }
}

/// The certificates of a client that has proved the first of them; at most what
/// one message of a TLS handshake holds, 64 KiB.
pub(super) fn shown(io: &TlsStream<TcpStream>) -> Box<[Box<[u8]>]> {
    let shown = io.get_ref().1.peer_certificates().unwrap_or_default();
    shown.iter().map(|certificate| certificate.as_ref().into()).collect()
}

impl Material {
    fn read(files: &config::Tls) -> Result<Self, String> {
        let named = |path: &Option<PathBuf>| match path {
            Some(path) => Ok::<_, String>(Some((path.clone(), read(path)?))),
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

    fn acceptor(&self, files: &config::Tls) -> Result<Acceptor, String> {
        let mut lists_until = None;
        let config::Tls { cert, key, .. } = files;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?;
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some((path, bytes)) => {
                let mut roots = RootCertStore::empty();
                for certificate in certificates(path, bytes)? {
                    roots.add(certificate).map_err(|error| cannot_use(path, &error))?;
                }
                let mut verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                if let Some((path, bytes)) = &self.crl {
                    let lists = revoked(path, bytes)?;
                    lists_until = lists.iter().filter_map(next_update).min();
                    // Not enforced: see `Tls::outdated_lists`.
                    verifier = verifier.with_crls(lists).only_check_end_entity_revocation();
                }
                let at = self.crl.as_ref().map_or(path, |(path, _)| path);
                builder.with_client_cert_verifier(verifier.build().map_err(|error| cannot_use(at, &error))?)
            }
        };
        let chain = certificates(cert, &self.cert)?;
        let private = PrivateKeyDer::from_pem_slice(&self.key).map_err(|error| cannot_use(key, &error))?;
        let mut config = builder.with_single_cert(chain, private).map_err(|error| {
            format!("the key {} does not fit the certificate {}: {error}", key.display(), cert.display())
        })?;
        if self.client_ca.is_some() {
            // A session that is resumed brings its certificate unchecked, expired perhaps.
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.send_tls13_tickets = 0;
        }
        Ok(Acceptor { tls: TlsAcceptor::from(Arc::new(config)), lists_until })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    let size = std::fs::metadata(path).map_err(|error| cannot_use(path, &error))?.len();
    if size > FILE_BYTES_MAX {
        return Err(cannot_use(path, &format!("it has {size} bytes, at most {FILE_BYTES_MAX} are read")));
    }
    std::fs::read(path).map_err(|error| cannot_use(path, &error))
}

fn certificates(path: &Path, bytes: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(bytes).collect();
    match found {
        Ok(found) if found.is_empty() => Err(format!("{} holds no certificate (PEM)", path.display())),
        found => found.map_err(|error| cannot_use(path, &error)),
    }
}

fn revoked(path: &Path, bytes: &[u8]) -> Result<Vec<CertificateRevocationListDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(bytes).collect();
    match found {
        Ok(found) if found.is_empty() => Err(format!("{} holds no revocation list (PEM)", path.display())),
        found => found.map_err(|error| cannot_use(path, &error)),
    }
}

fn next_update(list: &CertificateRevocationListDer<'_>) -> Option<SystemTime> {
    let list = CertificateList::from_der(list).ok()?;
    list.tbs_cert_list.next_update.map(|time| time.to_system_time())
}

fn cannot_use(path: &Path, error: &dyn std::fmt::Display) -> String {
    format!("cannot use {}: {error}", path.display())
}

/// What failed and what to do.
fn explain(error: &io::Error) -> Failed {
    use rustls::Error as Tls;
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<Tls>());
    let what = match cause {
        None => return Failed::lost(error),
        Some(Tls::NoCertificatesPresented) => {
            "the client showed no certificate: give it one that a CA of tls.client_ca has signed"
        }
        Some(Tls::InvalidCertificate(reason)) => match reason {
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
        Some(Tls::AlertReceived(alert)) => match alert {
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
        Some(Tls::InvalidMessage(_)) => {
            "the client does not speak TLS: switch TLS on there, or use the port without"
        }
        Some(Tls::PeerIncompatible(_)) => "the client is too old: TLS 1.2 or 1.3 is needed",
        Some(_) => "failed",
    };
    Failed::new("tls", format!("TLS handshake: {what}"), error)
}

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;
