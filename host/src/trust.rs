//! Whom the host trusts when it is the client of a TLS server.

use std::path::{Path, PathBuf};

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

/// Where distributions keep the CAs that they trust.
const SYSTEM_CAS: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// `ca`, or the system's file.
pub fn ca_file(ca: Option<&Path>) -> Result<PathBuf, String> {
    let system = || SYSTEM_CAS.iter().map(Path::new).find(|path| path.exists());
    let found = ca.or_else(system).map(Path::to_owned);
    found.ok_or_else(|| "this system has no file of trusted CAs: name one".to_owned())
}

/// The CA certificates of a file's PEM.
pub fn roots(pem: &[u8]) -> Result<RootCertStore, String> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let certificates = certificates.map_err(|error| format!("cannot read certificates: {error}"))?;
    let mut roots = RootCertStore::empty();
    match roots.add_parsable_certificates(certificates) {
        (0, _) => Err("holds no CA certificate".to_owned()),
        _ => Ok(roots),
    }
}
