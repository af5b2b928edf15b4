//! Warnings about settings in the section `mqtt` that are valid but probably not intended.

use super::config::Config;
use crate::access::{self, Authenticator};

impl Config {
    /// Returns the warnings, each beginning with its key. Reads the files that the section names.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        for (i, endpoint) in self.listeners.iter().enumerate() {
            let at = format!("mqtt.listeners[{i}]");
            warnings.extend(endpoint.tls.iter().flat_map(|tls| tls.warnings(&format!("{at}.tls"))));
            let takes_secrets = self.access.as_ref().is_some_and(access::Config::takes_secrets);
            if endpoint.entry().is_clear_text() && takes_secrets {
                warnings.push(format!(
                    "{at}: passwords and tokens cross the network in clear text: set tls, or bind to 127.0.0.1"
                ));
            }
        }
        let Some(access) = &self.access else { return warnings };
        let shows =
            |endpoint: &super::Endpoint| endpoint.tls.as_ref().is_some_and(|tls| tls.client_ca.is_some());
        if access.takes_certificates() && !self.listeners.iter().any(shows) {
            let i = access.authenticate.iter().position(|one| matches!(one, Authenticator::Certificate(_)));
            warnings.push(format!(
                "mqtt.access.authenticate[{}]: no listener has tls.client_ca: no client can be identified by a certificate",
                i.unwrap_or_default()
            ));
        }
        warnings.extend(access.warnings().into_iter().map(|warning| format!("mqtt.access.{warning}")));
        warnings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_that_nobody_can_use_or_everybody_can_read_is_told_of() {
        let warnings = |json: &str| {
            let config: Config = serde_json::from_str(json).unwrap();
            config.warnings().iter().map(|it| it.split(": ").next().unwrap().to_owned()).collect::<Vec<_>>()
        };
        let access = |kind: &str, bind: &str| {
            format!(
                r#"{{ "listeners": [{{ "bind": "{bind}" }}],
                     "access": {{ "authenticate": [{kind}], "client_ids": ["%u"] }} }}"#
            )
        };
        let http = r#"{ "type": "http", "url": "http://127.0.0.1:1/" }"#;
        let certificate = r#"{ "type": "certificate" }"#;
        assert_eq!(warnings(&access(http, "0.0.0.0:1883")), ["mqtt.listeners[0]"]);
        assert_eq!(warnings(&access(http, "127.0.0.1:1883")), [""; 0]);
        assert_eq!(warnings(&access(certificate, "127.0.0.1:1883")), ["mqtt.access.authenticate[0]"]);
    }
}
