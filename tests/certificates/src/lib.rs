//! Certificates of a test's own authority, in PEM.

use std::time::SystemTime;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, IsCa, Issuer, KeyIdMethod,
    KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber, date_time_ymd,
};

#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Its own certificate.
    pub pem: String,
}

/// A certificate and its key.
#[derive(Debug)]
pub struct Signed {
    pub cert: String,
    pub key: String,
}

/// What a certificate says of itself.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    pub is_ca: bool,
    /// Authorities below it.
    pub path_len: Option<u8>,
    pub key_usages: Vec<KeyUsagePurpose>,
    /// Valid from the first day of this year, and until.
    pub from: Option<i32>,
    pub until: Option<i32>,
    /// Or until this moment.
    pub ends: Option<SystemTime>,
}

impl Settings {
    pub fn ca() -> Self {
        let key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Self { is_ca: true, key_usages, ..Self::default() }
    }

    fn params(self, common_name: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.is_ca = match (self.is_ca, self.path_len) {
            (false, _) => IsCa::ExplicitNoCa,
            (true, None) => IsCa::Ca(BasicConstraints::Unconstrained),
            (true, Some(len)) => IsCa::Ca(BasicConstraints::Constrained(len)),
        };
        params.key_usages = self.key_usages;
        let year = |year: i32| date_time_ymd(year, 1, 1);
        params.not_before = self.from.map_or(params.not_before, year);
        params.not_after = self.until.map_or(params.not_after, year);
        params.not_after = self.ends.map_or(params.not_after, Into::into);
        params
    }
}

impl Authority {
    pub fn new(name: &str) -> Self {
        Self::with(name, Settings::ca())
    }

    /// Signed by itself.
    pub fn with(name: &str, settings: Settings) -> Self {
        let params = settings.params(name);
        let key = KeyPair::generate().expect("a key");
        let pem = params.self_signed(&key).expect("a certificate").pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// Another, signed by this one.
    pub fn authority(&self, name: &str, serial: u64, settings: Settings) -> Self {
        let mut params = settings.params(name);
        params.serial_number = Some(SerialNumber::from(serial));
        let key = KeyPair::generate().expect("a key");
        let pem = params.signed_by(&key, &self.issuer).expect("a certificate").pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// PEM.
    pub fn key(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    /// For these DNS names and addresses.
    pub fn sign(&self, common_name: &str, names: &[&str], serial: u64) -> Signed {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("names");
        params.distinguished_name.push(DnType::CommonName, common_name);
        self.signed(params, serial)
    }

    pub fn sign_with(&self, common_name: &str, serial: u64, settings: Settings) -> Signed {
        self.signed(settings.params(common_name), serial)
    }

    fn signed(&self, mut params: CertificateParams, serial: u64) -> Signed {
        params.serial_number = Some(SerialNumber::from(serial));
        let key = KeyPair::generate().expect("a key");
        let cert = params.signed_by(&key, &self.issuer).expect("a certificate");
        Signed { cert: cert.pem(), key: key.serialize_pem() }
    }

    /// A revocation list, to be replaced by the first day of `year`.
    pub fn revoke_until(&self, serials: &[u64], year: i32) -> String {
        let day = date_time_ymd(2020, 1, 1);
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: day,
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: day,
            next_update: date_time_ymd(year, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.issuer).expect("a list").pem().expect("PEM")
    }
}
