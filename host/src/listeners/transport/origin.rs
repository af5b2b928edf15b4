//! The check of which web pages may connect. A browser lets every page open a WebSocket to every host,
//! including this machine, and names the page's origin in `Origin` (RFC 6455, 10.2; RFC 6454). Other
//! clients send no `Origin`.

use std::net::IpAddr;

use tokio_tungstenite::tungstenite::http::uri::Authority;
use tokio_tungstenite::tungstenite::http::{HeaderMap, HeaderValue, Uri, header};

/// Allows any page.
const ANY: &str = "*";
/// Origin that a browser sends for a page without a site, such as a file.
const NONE: &str = "null";

/// The pages that may connect to a listener.
#[derive(Clone, Copy, Debug)]
pub(super) struct Origins<'c> {
    pub listed: &'c [String],
    /// Whether TLS has proved to the browser that this host has the requested name.
    pub tls: bool,
}

impl Origins<'_> {
    /// Checks the `Origin` of a request. The error is the origin that may not connect.
    pub fn check<'h>(&self, headers: &'h HeaderMap) -> Result<(), &'h HeaderValue> {
        let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
        let may_connect = |origin: &HeaderValue| {
            let Ok(origin) = origin.to_str() else { return false };
            self.listed.iter().any(|listed| listed == ANY || listed.eq_ignore_ascii_case(origin))
                || host.is_some_and(|host| self.is_own(origin, host))
        };
        headers.get_all(header::ORIGIN).iter().find(|origin| !may_connect(origin)).map_or(Ok(()), Err)
    }

    /// Returns whether the page comes from the host to which it connects, whatever the ports. Without
    /// TLS the host must be an address or `localhost`: the owner of any other name could make it resolve
    /// to this host (DNS rebinding), and serve the page.
    fn is_own(&self, origin: &str, host: &str) -> bool {
        let (Ok(origin), Ok(host)) = (origin.parse::<Uri>(), host.parse::<Authority>()) else { return false };
        let (Some(scheme), Some(site)) = (origin.scheme_str(), origin.host()) else { return false };
        let address = site.trim_start_matches('[').trim_end_matches(']');
        let is_fixed = site.eq_ignore_ascii_case("localhost") || address.parse::<IpAddr>().is_ok();
        site.eq_ignore_ascii_case(host.host()) && (is_fixed || (self.tls && scheme == "https"))
    }
}

/// Returns whether a browser can send this origin; see `websocket.origins`.
pub fn is_valid(origin: &str) -> bool {
    let has_no_path = |uri: &Uri| uri.scheme().is_some() && !origin.ends_with('/') && uri.path() == "/";
    [ANY, NONE].contains(&origin)
        || origin.parse::<Uri>().is_ok_and(|uri| has_no_path(&uri) && uri.query().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn may_connect(origins: &Origins<'_>, origin: &str, host: &str) -> bool {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, host.parse().unwrap());
        headers.insert(header::ORIGIN, origin.parse().unwrap());
        origins.check(&headers).is_ok()
    }

    #[test]
    fn a_client_that_is_no_browser_may_connect() {
        assert!(Origins { listed: &[], tls: false }.check(&HeaderMap::new()).is_ok());
    }

    #[test]
    fn a_page_may_connect_to_the_host_that_it_is_from_and_to_no_other() {
        let plain = Origins { listed: &[], tls: false };
        for (origin, host) in [
            ("http://localhost:3000", "localhost:8083"),
            ("http://127.0.0.1", "127.0.0.1:8083"),
            ("http://[::1]:3000", "[::1]:8083"),
            ("https://10.0.0.5", "10.0.0.5"),
        ] {
            assert!(may_connect(&plain, origin, host), "{origin} {host}");
        }
        for (origin, host) in [
            ("http://evil.example", "127.0.0.1:8083"),
            ("http://localhost.evil.example", "localhost:8083"),
            ("http://127.0.0.1:3000", "localhost:8083"),
            ("null", "null"),
            ("file://", "localhost"),
            ("localhost", "localhost"),
        ] {
            assert!(!may_connect(&plain, origin, host), "{origin} {host}");
        }
    }

    #[test]
    fn a_name_counts_where_tls_proves_it_and_may_point_anywhere_elsewhere() {
        let (plain, tls) = (Origins { listed: &[], tls: false }, Origins { listed: &[], tls: true });
        assert!(!may_connect(&plain, "http://plant.example", "plant.example:8083"));
        assert!(may_connect(&tls, "https://plant.example", "Plant.Example:8084"));
        assert!(!may_connect(&tls, "http://plant.example", "plant.example:8084"));
        assert!(!may_connect(&tls, "https://evil.example", "plant.example:8084"));
    }

    #[test]
    fn listed_origins_may_connect_and_one_that_is_not_among_several_may_not() {
        let listed = ["https://plant.example:8443".to_owned(), "null".to_owned()];
        let some = Origins { listed: &listed, tls: false };
        assert!(may_connect(&some, "https://Plant.example:8443", "broker:8083"));
        assert!(may_connect(&some, "null", "broker:8083"));
        assert!(!may_connect(&some, "https://plant.example", "broker:8083"));
        let mut headers = HeaderMap::new();
        headers.append(header::ORIGIN, "null".parse().unwrap());
        headers.append(header::ORIGIN, "https://evil.example".parse().unwrap());
        assert_eq!(some.check(&headers), Err(&"https://evil.example".parse().unwrap()));
        assert!(may_connect(&Origins { listed: &["*".to_owned()], tls: false }, "https://evil.example", "x"));
    }

    #[test]
    fn an_origin_is_a_scheme_a_host_and_perhaps_a_port() {
        for valid in ["*", "null", "https://plant.example", "http://127.0.0.1:3000", "http://[::1]:80"] {
            assert!(is_valid(valid), "{valid}");
        }
        for wrong in
            ["", "plant.example", "https://plant.example/", "https://plant.example/mqtt", "https://*/?a"]
        {
            assert!(!is_valid(wrong), "{wrong}");
        }
    }
}
