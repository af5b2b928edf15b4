//! The user name in a client's certificate.

use rustls::pki_types::CertificateDer;
use x509_cert::Certificate;
use x509_cert::der::Decode;
use x509_cert::der::asn1::{Ia5StringRef, ObjectIdentifier, PrintableStringRef, Utf8StringRef};
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

use super::config::Identity;

const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");

/// Returns the name, or `None` if the certificate has none, or one that no user may have.
pub(super) fn of(certificate: &CertificateDer<'_>, identity: Identity) -> Option<Box<str>> {
    name(certificate, identity).filter(|name| !name.is_empty() && !name.chars().any(char::is_control))
}

fn name(certificate: &CertificateDer<'_>, identity: Identity) -> Option<Box<str>> {
    let certificate = Certificate::from_der(certificate).ok()?.tbs_certificate;
    match identity {
        Identity::Cn => {
            let mut parts = certificate.subject.0.iter().flat_map(|names| names.0.iter());
            let value = &parts.find(|part| part.oid == COMMON_NAME)?.value;
            let text = Utf8StringRef::try_from(value).map(|text| text.as_str().into());
            let text = text.or_else(|_| PrintableStringRef::try_from(value).map(|text| text.as_str().into()));
            text.or_else(|_| Ia5StringRef::try_from(value).map(|text| text.as_str().into())).ok()
        }
        Identity::San => {
            let extensions = certificate.extensions.unwrap_or_default();
            let names = extensions.iter().find(|extension| {
                extension.extn_id == <SubjectAltName as x509_cert::der::oid::AssociatedOid>::OID
            })?;
            let names = SubjectAltName::from_der(names.extn_value.as_bytes()).ok()?;
            names.0.iter().find_map(|name| match name {
                GeneralName::DnsName(name) => Some(name.as_str().into()),
                GeneralName::Rfc822Name(name) => Some(name.as_str().into()),
                GeneralName::UniformResourceIdentifier(name) => Some(name.as_str().into()),
                _ => None,
            })
        }
    }
}
