//! Configuration of the admin address, which serves health, metrics and status.

use std::net::SocketAddr;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::files;
use crate::problems::{KeyPath, Problems};

/// Health, metrics and status over HTTP.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Address and port. Port 0 selects a free port.
    pub bind: String,
    /// Also serve other machines. Anyone who can reach the address can read metrics and status. Listing
    /// clients, disconnecting clients and sending dead letters again need the token.
    pub allow_remote: bool,
    /// Host names that requests may use, in addition to `localhost` and the host's addresses. A request
    /// with another name is refused, because a web page can make a name of its own resolve to this host.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<String>,
    /// File with the token for requests that list or disconnect clients or change dead letters, at least
    /// 32 characters. If unset, each start creates a token and stores it in `run.json` in the data
    /// folder, where commands on this machine find it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
}

/// Shortest token in bytes. A shorter token could be guessed.
const TOKEN_BYTES_MIN: usize = 32;

impl Default for Config {
    fn default() -> Self {
        Self { bind: "127.0.0.1:8080".to_owned(), allow_remote: false, names: Vec::new(), token_file: None }
    }
}

impl Config {
    /// Returns the address, or `None` if `validate` reports a problem with it.
    pub fn address(&self) -> Option<SocketAddr> {
        self.bind.parse().ok()
    }

    /// Reads the token from `token_file`. Returns `None` if no file is configured. Errors name the file.
    pub fn token(&self) -> Result<Option<String>, String> {
        let Some(file) = &self.token_file else { return Ok(None) };
        let named = |reason: &str| format!("{}: {reason}", file.display());
        let text = files::read_to_string(file).map_err(|error| named(&error.to_string()))?;
        let token = text.trim();
        if token.len() < TOKEN_BYTES_MIN || !token.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(named("must hold a token of at least 32 characters: openssl rand -hex 32"));
        }
        Ok(Some(token.to_owned()))
    }

    /// Reads the file that `token_file` names and adds what is wrong with it.
    pub fn look(&self, path: &KeyPath, problems: &mut Problems) {
        if let Err(reason) = self.token() {
            problems.add(path.key("token_file"), reason);
        }
    }

    pub fn validate(&self, path: &KeyPath, problems: &mut Problems) {
        for (i, name) in self.names.iter().enumerate().filter(|(_, name)| !is_host_name(name)) {
            let message = format!("must be the name of a host such as plant-3.example.com, is \"{name}\"");
            problems.add(path.key("names").index(i), message);
        }
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

fn is_host_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_open_to_others_must_be_meant() {
        let problems = |bind: &str, allow_remote| {
            let mut problems = Problems::default();
            Config { bind: bind.to_owned(), allow_remote, ..Config::default() }
                .validate(&KeyPath::root(), &mut problems);
            problems.into_vec().len()
        };
        assert_eq!(problems("127.0.0.1:8080", false), 0);
        assert_eq!(problems("[::1]:0", false), 0);
        assert_eq!(problems("0.0.0.0:8080", false), 1);
        assert_eq!(problems("0.0.0.0:8080", true), 0);
        assert_eq!(problems("8080", true), 1);
    }
}
