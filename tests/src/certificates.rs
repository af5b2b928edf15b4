//! A certificate authority of a test's own, its files in the test's folder.

use std::path::PathBuf;

use headworks_test_certificates::Settings;

use crate::folder::Folder;

/// Where a certificate and its key are.
#[derive(Debug)]
pub struct Files {
    pub cert: PathBuf,
    pub key: PathBuf,
}

#[derive(Debug)]
pub struct Authority {
    signs: headworks_test_certificates::Authority,
    /// `ca.pem`
    pub ca: PathBuf,
}

impl Authority {
    pub fn new(folder: &Folder) -> Self {
        let signs = headworks_test_certificates::Authority::new("the test's CA");
        let ca = folder.write("ca.pem", &signs.pem);
        Self { signs, ca }
    }

    /// `NAME.pem` and `NAME.key` for this machine's loopback names, and NAME.
    pub fn sign(&self, folder: &Folder, name: &str, serial: u64) -> Files {
        let signed = self.signs.sign(name, &[name, "localhost", "127.0.0.1"], serial);
        Files {
            cert: folder.write(&format!("{name}.pem"), signed.cert),
            key: folder.write(&format!("{name}.key"), signed.key),
        }
    }

    /// The same, valid until the first day of `year`.
    pub fn sign_until(&self, folder: &Folder, name: &str, serial: u64, year: i32) -> Files {
        let signed =
            self.signs.sign_with(name, serial, Settings { until: Some(year), ..Settings::default() });
        Files {
            cert: folder.write(&format!("{name}.pem"), signed.cert),
            key: folder.write(&format!("{name}.key"), signed.key),
        }
    }

    /// Writes `crl.pem`.
    pub fn revoke(&self, folder: &Folder, serials: &[u64]) -> PathBuf {
        self.revoke_until(folder, serials, 2090)
    }

    /// The same, to be replaced by the first day of `year`.
    pub fn revoke_until(&self, folder: &Folder, serials: &[u64], year: i32) -> PathBuf {
        folder.write("crl.pem", self.signs.revoke_until(serials, year))
    }
}
