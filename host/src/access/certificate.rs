//! The name in a client certificate that the TLS handshake has verified
//! (RFC 5280, 4.1.2.6 and 4.2.1.6).

use x509_cert::Certificate;
use x509_cert::der::asn1::{Ia5StringRef, ObjectIdentifier, PrintableStringRef, Utf8StringRef};
use x509_cert::der::{Decode, Tag, Tagged};
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

use super::config::CertificateName;

const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");
const SUBJECT_ALT_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.17");

/// `None` where the certificate has no such name, or one that no user may have.
pub fn name(der: &[u8], wanted: CertificateName) -> Option<String> {
    let certificate = Certificate::from_der(der).ok()?;
    let name = match wanted {
        CertificateName::CommonName => common_name(&certificate),
        _ => alternative(&certificate, wanted),
    };
    name.filter(|name| !name.is_empty() && !name.chars().any(char::is_control))
}

/// The last of them: the most specific (RFC 5280 orders names from the root).
fn common_name(certificate: &Certificate) -> Option<String> {
    let names = certificate.tbs_certificate.subject.0.iter().flat_map(|part| part.0.iter());
    let value = &names.filter(|name| name.oid == COMMON_NAME).last()?.value;
    match value.tag() {
        Tag::Utf8String => Utf8StringRef::try_from(value).ok().map(|text| text.as_str().to_owned()),
        Tag::PrintableString => PrintableStringRef::try_from(value).ok().map(|text| text.as_str().to_owned()),
        Tag::Ia5String => Ia5StringRef::try_from(value).ok().map(|text| text.as_str().to_owned()),
        _ => None,
    }
}

fn alternative(certificate: &Certificate, wanted: CertificateName) -> Option<String> {
    let extensions = certificate.tbs_certificate.extensions.as_ref()?;
    let found = extensions.iter().find(|extension| extension.extn_id == SUBJECT_ALT_NAME)?;
    let names = SubjectAltName::from_der(found.extn_value.as_bytes()).ok()?;
    names.0.iter().find_map(|name| match (wanted, name) {
        (CertificateName::Dns, GeneralName::DnsName(name)) => Some(name.as_str().to_owned()),
        (CertificateName::Email, GeneralName::Rfc822Name(name)) => Some(name.as_str().to_owned()),
        (CertificateName::Uri, GeneralName::UniformResourceIdentifier(name)) => {
            Some(name.as_str().to_owned())
        }
        _ => None,
    })
}
