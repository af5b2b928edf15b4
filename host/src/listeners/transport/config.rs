//! Configuration of one address to listen on, the same for every listener.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::bind::{Bind, SocketMode};
use super::network::Network;
use super::tls;
use crate::problems::{KeyPath, Problems};

/// One address to listen on.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Endpoint {
    /// Address and port; port 0 selects a free port. Or a Unix socket: `unix:` and an absolute path.
    pub bind: Bind,
    /// Serve TLS on this address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<Tls>,
    /// A load balancer connects to this address and names the client of each connection in a PROXY
    /// protocol header, version 2. Connections from other addresses are closed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_protocol: Option<ProxyProtocol>,
    /// File mode of the Unix socket, which decides who may connect. `"0660"` if unset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<SocketMode>,
    /// Serve clients without credentials, as far as `mqtt.access.rules` allow. Needed for an address
    /// that is not loopback, unless `mqtt.access.authenticate` or `tls.client_ca` identifies clients;
    /// with `mqtt.access` it is needed on loopback too.
    #[serde(default)]
    pub allow_anonymous: bool,
}

/// Certificate files in PEM format. They are read again when they change, and on SIGHUP. New connections
/// use the new certificates; if the new files cannot be used, the old certificates stay in use.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// The server's certificate, followed by its intermediates.
    pub cert: PathBuf,
    /// The private key of `cert`.
    pub key: PathBuf,
    /// Certificate authorities for client certificates. A certificate in this file that is not a CA
    /// admits only a client that presents this very certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_ca: Option<PathBuf>,
    /// Whether a client must present a certificate, if `client_ca` is set. With `optional`,
    /// `access.authenticate` and `allow_anonymous` decide about a client without one.
    #[serde(default)]
    pub client_cert: ClientCert,
    /// Revocation lists: one for each CA that signs client certificates, and any for the CAs above. A
    /// client is refused if its certificate or a CA in its chain is listed, or if the CA that signed its
    /// certificate has no list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crl: Option<PathBuf>,
    /// The part of a client's certificate that becomes its user name: `cn` is the subject's common name,
    /// `san` the first DNS name, e-mail address or URI of the subject's alternative names.
    #[serde(default)]
    pub identity: Identity,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ClientCert {
    #[default]
    Required,
    Optional,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Identity {
    /// The subject's common name.
    #[default]
    Cn,
    /// The first DNS name, e-mail address or URI of the subject's alternative names.
    San,
}

/// Load balancers that may name the client of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProxyProtocol {
    /// Networks of the load balancers, such as `10.0.0.0/8`.
    pub from: Vec<Network>,
}

impl Endpoint {
    /// Returns an endpoint for plain connections.
    pub fn at(bind: Bind) -> Self {
        Self { bind, tls: None, proxy_protocol: None, mode: None, allow_anonymous: false }
    }

    /// Names the protocol served at this endpoint with its layers: `http tls proxied`.
    pub fn kind(&self, protocol: &str) -> String {
        let tls = if self.tls.is_some() { " tls" } else { "" };
        let proxied = if self.proxy_protocol.is_some() { " proxied" } else { "" };
        format!("{protocol}{tls}{proxied}")
    }

    /// Returns whether only clients of this machine can connect. A load balancer on this machine
    /// forwards other clients.
    pub fn is_local(&self) -> bool {
        self.bind.is_loopback() && self.proxy_protocol.is_none()
    }

    /// Returns whether the endpoint is local, its clients are authenticated, or the config allows
    /// anonymous clients.
    fn is_safe(&self) -> bool {
        let mutual = self.tls.as_ref().is_some_and(Tls::requires_certificates);
        self.is_local() || mutual || self.allow_anonymous
    }

    /// Returns whether secrets that clients send can be read on the network.
    pub fn is_clear_text(&self) -> bool {
        self.tls.is_none() && !self.is_local() && self.proxy_protocol.is_none()
    }

    /// Adds what is wrong with the endpoint. Reads no file. `asks_for_credentials` says whether unknown
    /// clients are refused.
    pub fn validate(&self, at: &KeyPath, asks_for_credentials: bool, problems: &mut Problems) {
        if !self.is_safe() && !asks_for_credentials {
            problems.add(
                at.key("bind"),
                format!(
                    "{} can be reached from other machines and there are no credentials: bind to 127.0.0.1, \
                     set mqtt.access.authenticate or tls.client_ca, or set allow_anonymous: true",
                    self.bind
                ),
            );
        }
        let is_unix = matches!(self.bind, Bind::Unix(_));
        if is_unix && self.tls.is_some() {
            problems.add(at.key("tls"), "has no use on a Unix socket: leave it out");
        }
        if is_unix && self.proxy_protocol.is_some() {
            problems.add(at.key("proxy_protocol"), "has no use on a Unix socket: leave it out");
        }
        if !is_unix && self.mode.is_some() {
            problems.add(at.key("mode"), "is of a Unix socket (bind: unix:/path): leave it out");
        }
        if let Some(Tls { client_ca: None, crl, client_cert, .. }) = &self.tls {
            if crl.is_some() {
                problems.add(at.key("tls").key("crl"), "lists clients' certificates: set client_ca too");
            }
            if *client_cert == ClientCert::Optional {
                problems.add(
                    at.key("tls").key("client_cert"),
                    "is about clients' certificates: set client_ca too",
                );
            }
        }
        if let Some(proxy) = &self.proxy_protocol
            && proxy.from.is_empty()
        {
            let path = at.key("proxy_protocol").key("from");
            problems.add(path, "must name a network of load balancers, such as 10.0.0.0/8");
        }
    }
}

impl Tls {
    /// Returns whether every client needs a certificate.
    fn requires_certificates(&self) -> bool {
        self.client_ca.is_some() && self.client_cert == ClientCert::Required
    }

    /// Returns the files of the endpoint, each with its key.
    pub fn files(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let Self { cert, key, client_ca, crl, .. } = self;
        let files = [
            ("cert", Some(cert)),
            ("key", Some(key)),
            ("client_ca", client_ca.as_ref()),
            ("crl", crl.as_ref()),
        ];
        files.into_iter().filter_map(|(name, file)| Some((name, &**file?)))
    }

    /// Reads the files and adds what is wrong with them.
    pub fn look(&self, at: &KeyPath, problems: &mut Problems) {
        let mut all_there = true;
        for (key, file) in self.files() {
            if let Err(error) = crate::files::open(file) {
                problems.add(at.key(key), format!("cannot read {}: {error}", file.display()));
                all_there = false;
            }
        }
        if all_there && let Err(unusable) = tls::Tls::load(self.clone()) {
            problems.add(at.clone(), unusable.reason);
        }
    }

    /// Returns warnings about settings that are valid but probably not intended. Reads the files.
    pub fn warnings(&self, at: &str) -> Vec<String> {
        let mut warnings = Vec::new();
        if crate::access::is_for_all(&self.key) {
            warnings.push(format!("{at}.key: {}", crate::access::readable(&self.key)));
        }
        // What cannot be loaded is a problem, and said as one.
        let loaded = tls::Tls::load(self.clone()).ok();
        let dates = loaded.iter().flat_map(|tls| tls.warnings(std::time::SystemTime::now()));
        warnings.extend(dates.map(|warning| format!("{at}: {warning}")));
        warnings
    }
}
