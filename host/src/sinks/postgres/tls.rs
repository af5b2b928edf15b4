//! TLS according to PostgreSQL's `sslmode` (documentation, 34.19, "SSL Support").

use std::path::Path;
use std::sync::Arc;

use rustls::ClientConfig;
use rustls::client::WebPkiServerVerifier;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::config::{SslMode, Tls};
use super::verify::{Trusted, Verifier};
use crate::{files, trust};

/// Reads the certificates now, so that a renewed certificate is used at the next connect.
pub fn connector(mode: SslMode, tls: &Tls) -> Result<MakeRustlsConnect, String> {
    let provider = Arc::new(ring::default_provider());
    let trusted = match (mode, &tls.ca) {
        (SslMode::Disable | SslMode::Prefer | SslMode::Require, None)
        | (SslMode::Disable | SslMode::Prefer, _) => None,
        (SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull, ca) => {
            Some(trusted(ca.as_deref(), &provider, mode == SslMode::VerifyFull)?)
        }
    };
    let verifier = Arc::new(Verifier { algorithms: provider.signature_verification_algorithms, trusted });
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let config = match (&tls.cert, &tls.key) {
        (Some(cert), Some(key)) => {
            let shown = key.display();
            let key = PrivateKeyDer::from_pem_file(key)
                .map_err(|error| format!("cannot read the key {shown}: {error}"))?;
            builder
                .with_client_auth_cert(certificates(cert)?, key)
                .map_err(|error| format!("cannot use the certificate {}: {error}", cert.display()))?
        }
        _ => builder.with_no_client_auth(),
    };
    Ok(MakeRustlsConnect::new(config))
}

fn trusted(ca: Option<&Path>, provider: &Arc<CryptoProvider>, names_host: bool) -> Result<Trusted, String> {
    let file = trust::ca_file(ca).map_err(|reason| format!("{reason} in tls.ca"))?;
    let named = |reason: String| format!("{}: {reason}", file.display());
    let pem = files::read(&file).map_err(|error| named(error.to_string()))?;
    let roots = trust::roots(&pem).map_err(named)?;
    let listed = match ca {
        Some(_) => CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>(),
        None => Ok(Vec::new()),
    };
    let listed = listed.map_err(|error| named(error.to_string()))?;
    let chain = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .build()
        .map_err(|error| error.to_string())?;
    Ok(Trusted { chain, listed, names_host })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| format!("cannot read certificates from {}: {error}", path.display()))
}
