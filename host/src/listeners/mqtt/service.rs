//! The MQTT listener as a service of the transport.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::config::{Config, Endpoint};
use super::{Broker, connection, metrics};
use crate::listeners::transport::{Address, Bind, Io, Place, Plan, Remote, Service};
use crate::telemetry::Failures;

/// Returns what is served on an address.
pub(super) fn plan(endpoint: &Endpoint, config: &Config) -> Plan {
    let transport = match (&endpoint.bind, &endpoint.websocket, &endpoint.tls) {
        (Bind::Unix(_), ..) => 8,
        (_, None, None) => 1,
        (_, None, Some(_)) => 2,
        (_, Some(_), None) => 3,
        (_, Some(_), Some(_)) => 4,
    };
    let websocket = endpoint.websocket.as_ref().map(|websocket| websocket.settings(config));
    Plan { endpoint: endpoint.entry(), websocket, protocols: &[], transport }
}

impl Service for Broker {
    const NAME: &'static str = "mqtt";
    const GREETING: &'static str = "CONNECT";

    fn failures(&self) -> &Failures {
        &self.failures
    }

    fn shutdown(&self) -> &CancellationToken {
        &self.shutdown
    }

    fn handshake_timeout(&self) -> Duration {
        self.config().connect_timeout.0
    }

    fn looks_at_certificates(&self) -> bool {
        self.access.get().looks_at_certificates()
    }

    fn accepted(&self) {
        self.counters.sockets.increment(1);
    }

    fn lost(&self, cause: &'static str) {
        self.counters.refused_connect(cause);
    }

    fn refused(&self, cause: &'static str, kind: &str, who: Option<&str>, address: &Address, detail: &str) {
        self.refuse(cause, Some(kind), who, address, detail);
    }

    fn certificates_changed(&self, outcome: &'static str) {
        self.counters.tls_reload(outcome);
        if outcome == "taken" {
            self.access.get().recheck();
        }
    }

    fn show_certificate(&self, file: &Path, seconds_left: f64) {
        metrics::certificate_seconds_left(file, seconds_left);
    }

    fn show_revocation_list(&self, file: &Path, seconds_left: f64) {
        metrics::revocation_list_seconds_left(file, seconds_left);
    }

    fn serve<I: Io>(self: Arc<Self>, io: I, remote: Remote, place: Place) -> impl Future<Output = ()> + Send {
        connection::serve(self, io, remote, place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entrance_has_the_number_of_its_transport_in_the_plugin_contract() {
        let tls = || serde_json::from_str(r#"{ "cert": "x.pem", "key": "x.pem" }"#).unwrap();
        let websocket = || Some(serde_json::from_str("{}").unwrap());
        let endpoint = |bind: &str| Endpoint::at(bind.parse().unwrap());
        for (endpoint, transport) in [
            (endpoint("127.0.0.1:0"), 1),
            (Endpoint { tls: tls(), ..endpoint("[::1]:8883") }, 2),
            (Endpoint { websocket: websocket(), ..endpoint("127.0.0.1:80") }, 3),
            (Endpoint { websocket: websocket(), tls: tls(), ..endpoint("127.0.0.1:443") }, 4),
            (endpoint("unix:/run/mqtt.sock"), 8),
        ] {
            assert_eq!(plan(&endpoint, &Config::default()).transport, transport);
        }
    }
}
