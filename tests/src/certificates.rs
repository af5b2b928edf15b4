//! A certificate authority of a test's own, its files in the test's folder.

use std::path::PathBuf;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, IsCa, Issuer, KeyIdMethod,
    KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber, date_time_ymd,
};

use crate::folder::Folder;

/// Where a certificate and its key are.
#[derive(Debug)]
pub struct Files {
    pub cert: PathBuf,
    pub key: PathBuf,
}

#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// `ca.pem`
    pub ca: PathBuf,
}

impl Authority {
    pub fn new(folder: &Folder) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "the test's CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().expect("a key");
        let ca = folder.write("ca.pem", params.self_signed(&key).expect("a certificate").pem());
        Self { issuer: Issuer::new(params, key), ca }
    }

    /// `NAME.pem` and `NAME.key` for this machine's loopback names, and NAME.
    pub fn sign(&self, folder: &Folder, name: &str, serial: u64) -> Files {
        let names = [name, "localhost", "127.0.0.1"].map(str::to_owned);
        let mut params = CertificateParams::new(names).expect("names");
        params.distinguished_name.push(DnType::CommonName, name);
        params.serial_number = Some(SerialNumber::from(serial));
        let key = KeyPair::generate().expect("a key");
        let cert = params.signed_by(&key, &self.issuer).expect("a certificate");
        Files {
            cert: folder.write(&format!("{name}.pem"), cert.pem()),
            key: folder.write(&format!("{name}.key"), key.serialize_pem()),
        }
    }

    /// Writes `crl.pem`.
    pub fn revoke(&self, folder: &Folder, serials: &[u64]) -> PathBuf {
        self.revoke_until(folder, serials, 2090)
    }

    /// The same, to be replaced by the first day of `year`.
    pub fn revoke_until(&self, folder: &Folder, serials: &[u64], year: i32) -> PathBuf {
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
        let list = list.signed_by(&self.issuer).expect("a list");
        folder.write("crl.pem", list.pem().expect("PEM"))
    }
}
