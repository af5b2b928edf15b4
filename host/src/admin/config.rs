//! Where health, metrics and status are served.

use std::net::SocketAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::problems::{KeyPath, Problems};

/// Health, metrics and status over HTTP.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Address and port. Port 0 takes any free one.
    pub bind: String,
    /// Serve other machines too. There is no password yet: whoever reaches the
    /// address can read the status, send dead letters again and disconnect clients.
    pub allow_remote: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self { bind: "127.0.0.1:8080".to_owned(), allow_remote: false }
    }
}

impl Config {
    /// `None` where `validate` has a problem with it.
    pub fn address(&self) -> Option<SocketAddr> {
        self.bind.parse().ok()
    }

    pub fn validate(&self, path: &KeyPath, problems: &mut Problems) {
        match self.address() {
            None => problems.add(
                path.key("bind"),
                format!("must be an address and port such as 127.0.0.1:8080, is \"{}\"", self.bind),
            ),
            Some(address) if !address.ip().is_loopback() && !self.allow_remote => problems.add(
                path.key("bind"),
                format!(
                    "{address} is open to other machines: set `allow_remote: true`, or bind to 127.0.0.1"
                ),
            ),
            Some(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_open_to_others_must_be_meant() {
        let problems = |bind: &str, allow_remote| {
            let mut problems = Problems::default();
            Config { bind: bind.to_owned(), allow_remote }.validate(&KeyPath::root(), &mut problems);
            problems.into_vec().len()
        };
        assert_eq!(problems("127.0.0.1:8080", false), 0);
        assert_eq!(problems("[::1]:0", false), 0);
        assert_eq!(problems("0.0.0.0:8080", false), 1);
        assert_eq!(problems("0.0.0.0:8080", true), 0);
        assert_eq!(problems("8080", true), 1);
    }
}
