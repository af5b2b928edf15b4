//! Verification of client certificates against the authorities in `tls.client_ca`, the individual client
//! certificates in it, and the revocation lists in `tls.crl`.
//!
//! webpki verifies the path of a certificate (RFC 5280, section 6.1). It knows only the name and key of
//! an authority, so the other contents of the authority's certificate are checked here: its dates, the
//! maximum path length below it, and whether it may sign clients at all. A certificate in the file that
//! may not sign others admits the client that presents this very certificate.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, TrustAnchor, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme};
use sha2::{Digest, Sha256};
use webpki::{
    CertRevocationList, EndEntityCert, KeyUsage as Usage, OwnedCertRevocationList, RevocationCheckDepth,
    RevocationOptionsBuilder, UnknownStatusPolicy, VerifiedPath,
};
use x509_cert::der::asn1::ObjectIdentifier;
use x509_cert::der::{Decode, Encode};
use x509_cert::ext::pkix::{BasicConstraints, ExtendedKeyUsage, KeyUsage};
use x509_cert::{Certificate, TbsCertificate, Version};

use super::tls::{Unusable, VERSION_1, cannot_use};

const CLIENT_AUTH: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.3.2");
const ANY_USAGE: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.37.0");
/// Most characters of a certificate's subject in a log line.
const SUBJECT_CHARS_MAX: usize = 200;

#[derive(Debug)]
pub(super) struct Authorities {
    anchors: Vec<TrustAnchor<'static>>,
    /// Certificates in the order of `anchors`.
    certificates: Vec<Own>,
    /// Individual client certificates, by their bytes.
    pinned: HashMap<Box<[u8]>, Own>,
    lists: Vec<CertRevocationList<'static>>,
    /// Names that clients receive to choose a certificate.
    hints: Vec<DistinguishedName>,
    algorithms: WebPkiSupportedAlgorithms,
    is_mandatory: bool,
}

/// Contents of a listed certificate.
#[derive(Debug)]
struct Own {
    subject: String,
    digest: [u8; 32],
    /// Name and serial number for revocation lists. `None` if the certificate's version has no such
    /// form.
    name: Option<Named>,
    from: SystemTime,
    until: SystemTime,
    /// Most authorities in a path below this one.
    path_len_max: Option<usize>,
}

/// Issuer and serial number, by which revocation lists identify a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Named {
    issuer: Box<[u8]>,
    serial: Box<[u8]>,
}

/// The certificates on which the admission of a client rests.
#[derive(Debug)]
pub(super) struct Basis {
    /// The certificates of the client and of the intermediate authorities.
    certificates: Box<[Named]>,
    /// Digest of the listed certificate.
    listed: [u8; 32],
    /// When the first of all these certificates expires.
    pub until: SystemTime,
}

/// What was found about a client's certificate during its handshake.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub subject: Option<String>,
    /// Why the certificate was refused, if rustls has no error for the reason.
    pub refusal: Option<String>,
    pub basis: Option<Basis>,
}

tokio::task_local! {
    /// Result of the verification in the current poll of a handshake. The verifier itself can only
    /// return yes or no.
    static SEEN: RefCell<Seen>;
}

/// Runs one handshake, and returns its result with what was found about the client's certificate.
pub(super) async fn observed<T>(handshake: impl Future<Output = T>) -> (T, Seen) {
    let handshake = async { (handshake.await, SEEN.with(RefCell::take)) };
    SEEN.scope(RefCell::default(), handshake).await
}

impl Authorities {
    pub fn new(
        (path, listed): (&Path, Vec<CertificateDer<'static>>),
        lists: Option<(&Path, Vec<CertificateRevocationListDer<'static>>)>,
        algorithms: WebPkiSupportedAlgorithms,
        is_mandatory: bool,
    ) -> Result<Self, Unusable> {
        let mut authorities = Self {
            anchors: Vec::new(),
            certificates: Vec::new(),
            pinned: HashMap::new(),
            lists: Vec::new(),
            hints: Vec::new(),
            algorithms,
            is_mandatory,
        };
        for certificate in listed {
            authorities.add(certificate).map_err(|error| cannot_use(path, &error))?;
        }
        for (path, list) in lists.iter().flat_map(|(path, lists)| lists.iter().map(move |list| (path, list)))
        {
            let list = OwnedCertRevocationList::from_der(list).map_err(|error| cannot_use(path, &error))?;
            authorities.lists.push(list.into());
        }
        Ok(authorities)
    }

    fn add(&mut self, der: CertificateDer<'static>) -> Result<(), String> {
        let certificate = Certificate::from_der(&der).map_err(|error| error.to_string())?.tbs_certificate;
        let own = Own::of(&der, &certificate);
        if signs_clients(&certificate).map_err(|error| error.to_string())? {
            let anchor =
                webpki::anchor_from_trusted_cert(&der).map_err(|error| error.to_string())?.to_owned();
            self.hints.push(DistinguishedName::in_sequence(&anchor.subject));
            self.anchors.push(anchor);
            self.certificates.push(Own {
                path_len_max: certificate
                    .get::<BasicConstraints>()
                    .ok()
                    .flatten()
                    .and_then(|(_, constraints)| constraints.path_len_constraint.map(usize::from)),
                ..own
            });
        } else {
            let issuer = certificate.issuer.to_der().map_err(|error| error.to_string())?;
            self.hints.push(issuer.into());
            self.pinned.insert(der.as_ref().into(), own);
        }
        Ok(())
    }

    /// Verifies the certificates that a client presents.
    fn verify(
        &self,
        own: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<Basis, Refusal> {
        if let Some(pinned) = self.pinned.get(own.as_ref()) {
            pinned.check_dates(now)?;
            if pinned.name.as_ref().is_some_and(|name| self.is_revoked(name)) {
                return Err(webpki::Error::CertRevoked.into());
            }
            let certificates = pinned.name.iter().cloned().collect();
            return Ok(Basis { certificates, listed: pinned.digest, until: pinned.until });
        }
        let own = EndEntityCert::try_from(own)?;
        let ended = Cell::new(None);
        let holds = |path: &VerifiedPath<'_>| {
            let authority = self.authority_of(path);
            let between = path.intermediate_certificates();
            let depth = between.filter(|certificate| certificate.issuer() != certificate.subject()).count();
            if authority.path_len_max.is_some_and(|max| depth > max) {
                return Err(webpki::Error::PathLenConstraintViolated);
            }
            if names_of(path).iter().chain(&authority.name).any(|name| self.is_revoked(name)) {
                return Err(webpki::Error::CertRevoked);
            }
            authority.check_dates(now).inspect_err(|_| ended.set(Some(authority)))
        };
        let verify = |depth, unknown| {
            let lists: Vec<_> = self.lists.iter().collect();
            let lists = RevocationOptionsBuilder::new(&lists).ok();
            let revocation = lists.map(|lists| lists.with_depth(depth).with_status_policy(unknown).build());
            let usage = Usage::client_auth();
            let path = own.verify_for_usage(
                self.algorithms.all,
                &self.anchors,
                others,
                now,
                usage,
                revocation,
                Some(&holds),
            )?;
            let authority = self.authority_of(&path);
            let until = ends_of(&path).chain([authority.until]).min().unwrap_or(authority.until);
            Ok(Basis { certificates: names_of(&path), listed: authority.digest, until })
        };
        // The authority that signed the client must have a list; those above it may have one.
        let verified = verify(RevocationCheckDepth::EndEntity, UnknownStatusPolicy::Deny)
            .and_then(|_| verify(RevocationCheckDepth::Chain, UnknownStatusPolicy::Allow));
        verified.map_err(|error| Refusal { error, authority: ended.get().map(|it: &Own| it.subject.clone()) })
    }

    fn authority_of(&self, path: &VerifiedPath<'_>) -> &Own {
        let at = self.anchors.iter().position(|anchor| std::ptr::eq(anchor, path.anchor()));
        &self.certificates[at.expect("a path ends at one of the anchors that it was looked for")]
    }

    /// Returns whether any list contains the certificate. A list whose entries cannot be read counts as
    /// containing every certificate.
    fn is_revoked(&self, name: &Named) -> bool {
        let mut lists = self.lists.iter().filter(|list| list.issuer() == &*name.issuer);
        lists.any(|list| !matches!(list.find_serial(&name.serial), Ok(None)))
    }

    /// Returns whether the client would still be admitted, apart from expiry dates.
    pub fn trust(&self, basis: &Basis) -> bool {
        let mut listed = self.listed();
        let Some(own) = listed.find(|own| own.digest == basis.listed) else { return false };
        !own.name.iter().chain(&basis.certificates).any(|name| self.is_revoked(name))
    }

    /// Returns the subject and expiry of each listed certificate.
    pub fn ends(&self) -> impl Iterator<Item = (&str, SystemTime)> {
        self.listed().map(|own| (&*own.subject, own.until))
    }

    fn listed(&self) -> impl Iterator<Item = &Own> {
        self.certificates.iter().chain(self.pinned.values())
    }
}

impl Own {
    fn of(der: &CertificateDer<'_>, certificate: &TbsCertificate) -> Self {
        let name = EndEntityCert::try_from(der).ok().map(|parsed| Named::of(&parsed));
        Self {
            subject: certificate.subject.to_string(),
            digest: Sha256::digest(der).into(),
            name,
            from: certificate.validity.not_before.to_system_time(),
            until: certificate.validity.not_after.to_system_time(),
            path_len_max: None,
        }
    }

    fn check_dates(&self, now: UnixTime) -> Result<(), webpki::Error> {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(now.as_secs());
        let unix = |time: SystemTime| {
            UnixTime::since_unix_epoch(time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
        };
        if at < self.from {
            return Err(webpki::Error::CertNotValidYet { time: now, not_before: unix(self.from) });
        }
        if at > self.until {
            return Err(webpki::Error::CertExpired { time: now, not_after: unix(self.until) });
        }
        Ok(())
    }
}

impl Named {
    fn of(certificate: &webpki::Cert<'_>) -> Self {
        Self { issuer: certificate.issuer().into(), serial: certificate.serial().into() }
    }
}

/// Returns the names of the client's certificate and of the intermediates.
fn names_of(path: &VerifiedPath<'_>) -> Box<[Named]> {
    let own = Named::of(path.end_entity());
    std::iter::once(own).chain(path.intermediate_certificates().map(Named::of)).collect()
}

/// Returns the expiry of each certificate in the path.
fn ends_of(path: &VerifiedPath<'_>) -> impl Iterator<Item = SystemTime> {
    let between = path.intermediate_certificates().map(webpki::Cert::der);
    let ends: Vec<_> =
        std::iter::once(path.end_entity().der()).chain(between).map(|der| end_of(&der)).collect();
    ends.into_iter()
}

/// Returns the expiry of a certificate. One that cannot be read counts as expired.
fn end_of(der: &CertificateDer<'_>) -> SystemTime {
    let certificate = Certificate::from_der(der).ok();
    certificate.map_or(SystemTime::UNIX_EPOCH, |it| it.tbs_certificate.validity.not_after.to_system_time())
}

/// Returns whether this certificate may sign client certificates (RFC 5280, 4.2.1.3, 4.2.1.9, 4.2.1.12
/// and 6.1.4 k, n). A version 1 certificate does not say that it may.
fn signs_clients(certificate: &TbsCertificate) -> Result<bool, x509_cert::der::Error> {
    let is_ca = certificate.get::<BasicConstraints>()?.is_some_and(|(_, constraints)| constraints.ca);
    let signs = certificate.get::<KeyUsage>()?.is_none_or(|(_, usage)| usage.key_cert_sign());
    let is_of_clients =
        |usages: &ExtendedKeyUsage| usages.0.iter().any(|it| [CLIENT_AUTH, ANY_USAGE].contains(it));
    let clients = certificate.get::<ExtendedKeyUsage>()?.is_none_or(|(_, usages)| is_of_clients(&usages));
    Ok(certificate.version == Version::V3 && is_ca && signs && clients)
}

struct Refusal {
    error: webpki::Error,
    /// The authority whose dates caused the error, if it was an authority.
    authority: Option<String>,
}

impl From<webpki::Error> for Refusal {
    fn from(error: webpki::Error) -> Self {
        Self { error, authority: None }
    }
}

impl Refusal {
    /// Returns an explanation for the operator, if the error alone would be misleading.
    fn explained(&self) -> Option<String> {
        use webpki::Error as Cause;
        if matches!(self.error, Cause::UnsupportedCertVersion) {
            return Some(format!("the client's certificate cannot be used: {VERSION_1}"));
        }
        let authority = self.authority.as_ref()?;
        match self.error {
            Cause::CertExpired { .. } => Some(format!(
                "the CA that signed the client's certificate, {authority} in tls.client_ca, has expired: \
                 give the client a certificate of another CA"
            )),
            Cause::CertNotValidYet { .. } => Some(format!(
                "the CA that signed the client's certificate, {authority} in tls.client_ca, is not valid yet: \
                 set this machine's clock, or the CA's"
            )),
            _ => None,
        }
    }

    /// Returns the TLS error that tells the client the most.
    fn into_rustls(self) -> rustls::Error {
        use webpki::Error as Cause;
        rustls::Error::InvalidCertificate(match self.error {
            Cause::CertRevoked => CertificateError::Revoked,
            Cause::UnknownIssuer => CertificateError::UnknownIssuer,
            Cause::InvalidSignatureForPublicKey => CertificateError::BadSignature,
            Cause::CertExpired { .. } => CertificateError::Expired,
            Cause::CertNotValidYet { .. } => CertificateError::NotValidYet,
            Cause::UnknownRevocationStatus => CertificateError::UnknownRevocationStatus,
            Cause::RequiredEkuNotFoundContext(_) => CertificateError::InvalidPurpose,
            other => CertificateError::Other(OtherError(Arc::new(other))),
        })
    }
}

impl ClientCertVerifier for Authorities {
    fn client_auth_mandatory(&self) -> bool {
        self.is_mandatory
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.hints
    }

    fn verify_client_cert(
        &self,
        own: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let subject = Certificate::from_der(own).ok().map(|it| it.tbs_certificate.subject.to_string());
        let mut seen = Seen {
            subject: subject.map(|it| it.chars().take(SUBJECT_CHARS_MAX).collect()),
            ..Seen::default()
        };
        let answer = match self.verify(own, others, now) {
            Ok(basis) => {
                seen.basis = Some(basis);
                Ok(ClientCertVerified::assertion())
            }
            Err(refusal) => {
                seen.refusal = refusal.explained();
                Err(refusal.into_rustls())
            }
        };
        // The answer is the same where nobody looks.
        let _ = SEEN.try_with(|last| last.replace(seen));
        answer
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
