//! Verification of the server's certificate with webpki, which in addition accepts what OpenSSL accepts
//! for libpq, if that is equally safe: a certificate that `tls.ca` lists itself, one of version 1 that a
//! CA in `tls.ca` has signed (PostgreSQL's documentation, 19.9.5, creates both), and one that names its
//! host only in the common name (34.19.1).

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{
    WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature,
    verify_tls13_signature_with_raw_key,
};
use rustls::pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, SignatureScheme};
use webpki::{EndEntityCert, RawPublicKeyEntity};
use x509_cert::der::asn1::ObjectIdentifier;
use x509_cert::der::{Decode, Encode};
use x509_cert::ext::pkix::name::GeneralName;
use x509_cert::ext::pkix::{BasicConstraints, KeyUsage, SubjectAltName};
use x509_cert::{Certificate, Version};

const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");

#[derive(Debug)]
pub struct Verifier {
    pub algorithms: WebPkiSupportedAlgorithms,
    /// `None` accepts any certificate.
    pub trusted: Option<Trusted>,
}

#[derive(Debug)]
pub struct Trusted {
    pub chain: Arc<WebPkiServerVerifier>,
    /// The certificates in `tls.ca`. Empty if the system's CAs are trusted, which sign nothing that
    /// webpki does not accept.
    pub listed: Vec<CertificateDer<'static>>,
    /// Whether the certificate must name the host.
    pub names_host: bool,
}

impl Trusted {
    fn verify(
        &self,
        own: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        host: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> Result<(), rustls::Error> {
        let certificate = Certificate::from_der(own).map_err(|_| CertificateError::BadEncoding)?;
        if self.listed.contains(own) {
            check_dates(&certificate, now)?;
        } else if certificate.tbs_certificate.version == Version::V1 {
            self.verify_signature(&certificate, now, algorithms)?;
        } else {
            return match self.chain.verify_server_cert(own, others, host, ocsp, now) {
                // The name is the last thing that is checked: the chain was good.
                Err(rustls::Error::InvalidCertificate(
                    CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
                )) if !self.names_host || self.common_name_fits(&certificate, host) => Ok(()),
                outcome => outcome.map(drop),
            };
        }
        let names = EndEntityCert::try_from(own);
        let fits = names.is_ok_and(|own| own.verify_is_valid_for_subject_name(host).is_ok());
        match fits || !self.names_host || self.common_name_fits(&certificate, host) {
            true => Ok(()),
            false => Err(CertificateError::NotValidForName.into()),
        }
    }

    /// Returns whether a listed CA has signed a version 1 certificate, which webpki does not read. It
    /// has no extensions that would have to be checked.
    fn verify_signature(
        &self,
        certificate: &Certificate,
        now: UnixTime,
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> Result<(), rustls::Error> {
        check_dates(certificate, now)?;
        let signed = certificate.tbs_certificate.to_der().map_err(|_| CertificateError::BadEncoding)?;
        let signature = certificate.signature.raw_bytes();
        for authority in &self.listed {
            let Ok(authority) = Certificate::from_der(authority) else { continue };
            let is_named = authority.tbs_certificate.subject == certificate.tbs_certificate.issuer;
            if !is_named || !signs_certificates(&authority) || check_dates(&authority, now).is_err() {
                continue;
            }
            let Ok(key) = public_key(&authority) else { continue };
            let Ok(key) = RawPublicKeyEntity::try_from(&key) else { continue };
            // All of them are strong: which of them it was made with does not matter.
            if algorithms.all.iter().any(|it| key.verify_signature(*it, &signed, signature).is_ok()) {
                return Ok(());
            }
        }
        Err(CertificateError::UnknownIssuer.into())
    }

    /// Returns whether the common name is the host's, if no alternative name is present. Not used with
    /// the system's CAs, which always write alternative names.
    fn common_name_fits(&self, certificate: &Certificate, host: &ServerName<'_>) -> bool {
        let certificate = &certificate.tbs_certificate;
        let is_host =
            |name: &GeneralName| matches!(name, GeneralName::DnsName(_) | GeneralName::IpAddress(_));
        let alternatives = certificate.get::<SubjectAltName>();
        let has_none =
            alternatives.is_ok_and(|found| found.is_none_or(|(_, names)| !names.0.iter().any(is_host)));
        let mut attributes = certificate.subject.0.iter().flat_map(|part| part.0.iter());
        let common = attributes.find(|attribute| attribute.oid == COMMON_NAME);
        let common = common.and_then(|attribute| std::str::from_utf8(attribute.value.value()).ok());
        !self.listed.is_empty() && has_none && common.is_some_and(|common| fits(common, host))
    }
}

/// Returns whether a common name, which may begin with `*.` for one label, is the host's.
fn fits(common: &str, host: &ServerName<'_>) -> bool {
    match host {
        ServerName::DnsName(host) => {
            let host = host.as_ref();
            let rest = host.split_once('.').filter(|(label, _)| !label.is_empty()).map(|(_, rest)| rest);
            common.eq_ignore_ascii_case(host)
                || matches!((common.strip_prefix("*."), rest), (Some(common), Some(rest)) if common.eq_ignore_ascii_case(rest))
        }
        ServerName::IpAddress(address) => common == std::net::IpAddr::from(*address).to_string(),
        _ => false,
    }
}

/// Returns whether a certificate is a CA. Version 1 does not say so; there, a self-signed certificate
/// counts as one.
fn signs_certificates(authority: &Certificate) -> bool {
    let authority = &authority.tbs_certificate;
    if authority.version == Version::V1 {
        return authority.subject == authority.issuer;
    }
    let constraints = authority.get::<BasicConstraints>().ok().flatten();
    let usage = authority.get::<KeyUsage>().ok().flatten();
    constraints.is_some_and(|(_, it)| it.ca) && usage.is_none_or(|(_, usage)| usage.key_cert_sign())
}

fn check_dates(certificate: &Certificate, now: UnixTime) -> Result<(), rustls::Error> {
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(now.as_secs());
    let dates = &certificate.tbs_certificate.validity;
    if now < dates.not_before.to_system_time() {
        return Err(CertificateError::NotValidYet.into());
    }
    if now > dates.not_after.to_system_time() {
        return Err(CertificateError::Expired.into());
    }
    Ok(())
}

fn public_key(certificate: &Certificate) -> Result<SubjectPublicKeyInfoDer<'static>, rustls::Error> {
    let key = certificate.tbs_certificate.subject_public_key_info.to_der();
    Ok(key.map_err(|_| CertificateError::BadEncoding)?.into())
}

/// Returns the key of a version 1 certificate.
fn key_of_version_1(own: &CertificateDer<'_>) -> Option<SubjectPublicKeyInfoDer<'static>> {
    let certificate = Certificate::from_der(own).ok()?;
    (certificate.tbs_certificate.version == Version::V1).then(|| public_key(&certificate).ok())?
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        own: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        host: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if let Some(trusted) = &self.trusted {
            trusted.verify(own, others, host, ocsp, now, &self.algorithms)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let Some(key) = key_of_version_1(own) else {
            return verify_tls12_signature(message, own, signed, &self.algorithms);
        };
        let key = RawPublicKeyEntity::try_from(&key).map_err(|_| CertificateError::BadEncoding)?;
        let mut of_scheme = self.algorithms.mapping.iter().filter(|(scheme, _)| *scheme == signed.scheme);
        let algorithms = of_scheme.next().map_or(&[][..], |(_, algorithms)| algorithms);
        match algorithms.iter().any(|it| key.verify_signature(*it, message, signed.signature()).is_ok()) {
            true => Ok(HandshakeSignatureValid::assertion()),
            false => Err(CertificateError::BadSignature.into()),
        }
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        match key_of_version_1(own) {
            Some(key) => verify_tls13_signature_with_raw_key(message, &key, signed, &self.algorithms),
            None => verify_tls13_signature(message, own, signed, &self.algorithms),
        }
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_common_name_stands_for_one_host_or_one_label() {
        for (common, host, expected) in [
            ("db.example", "DB.example", true),
            ("*.example.com", "db.example.com", true),
            ("*.example.com", "a.db.example.com", false),
            ("*.example.com", "example.com", false),
            ("*", "localhost", false),
            ("*.0.0.1", "127.0.0.1", false),
            ("127.0.0.1", "127.0.0.1", true),
            ("db.example\0.evil", "db.example", false),
        ] {
            assert_eq!(fits(common, &ServerName::try_from(host).unwrap()), expected, "{common} {host}");
        }
    }
}
