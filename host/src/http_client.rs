//! The host as a client of an HTTP/1.1 service, with or without TLS: one connection, one request at a
//! time. Every call may be dropped; the connection then goes with it.

use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{HeaderMap, Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;

use crate::trust;

/// The parts of a URL that a connection needs.
#[derive(Clone, Debug)]
pub struct Address {
    /// `host:port`
    pub authority: String,
    /// The name that the server's certificate must have.
    pub tls: Option<ServerName<'static>>,
}

impl Address {
    pub fn parse(url: &str) -> Result<Self, String> {
        let wanted = || format!("must be http://host:port/path or https://host:port/path, is \"{url}\"");
        let uri: Uri = url.parse().map_err(|_| wanted())?;
        let host = uri.host().ok_or_else(wanted)?;
        if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
            return Err("must have no user and password in it: they would not be sent".to_owned());
        }
        let (tls, port) = match uri.scheme_str() {
            Some("http") => (None, 80),
            Some("https") => {
                let name = host.trim_start_matches('[').trim_end_matches(']').to_owned();
                (Some(ServerName::try_from(name).map_err(|_| wanted())?), 443)
            }
            _ => return Err(wanted()),
        };
        Ok(Self { authority: format!("{host}:{}", uri.port_u16().unwrap_or(port)), tls })
    }
}

/// Trusts the CA certificates in a file's PEM.
pub fn connector(pem: &[u8]) -> Result<TlsConnector, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let config = builder.with_root_certificates(trust::roots(pem)?).with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

/// An open connection. What drives it ends with it.
pub struct Connection {
    sender: SendRequest<Full<Bytes>>,
    _driver: AbortOnDropHandle<()>,
}

/// What a service answered.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Connection {
    /// Connects. `tls` is needed where the address is one of https.
    pub async fn open(address: &Address, tls: Option<&TlsConnector>) -> Result<Self, String> {
        let socket = TcpStream::connect(&address.authority).await.map_err(|error| error.to_string())?;
        // A request is written at once, and its answer waited for.
        socket.set_nodelay(true).map_err(|error| error.to_string())?;
        let Some(name) = &address.tls else { return Self::over(socket).await };
        let tls = tls.ok_or_else(|| "nobody is trusted".to_owned())?;
        let socket = tls.connect(name.clone(), socket).await.map_err(|error| format!("tls: {error}"))?;
        Self::over(socket).await
    }

    async fn over<S>(socket: S) -> Result<Self, String>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, connection) =
            handshake(TokioIo::new(socket)).await.map_err(|error| error.to_string())?;
        // What went wrong is the error of the request that is waited for.
        let driver = tokio::spawn(async { drop(connection.await) });
        Ok(Self { sender, _driver: AbortOnDropHandle::new(driver) })
    }

    /// Whether another request may be sent: the service has not closed the connection, as far as is known.
    pub fn is_open(&self) -> bool {
        self.sender.is_ready()
    }

    /// Sends a request, and reads its answer of at most so many bytes.
    pub async fn ask(
        &mut self,
        request: Request<Full<Bytes>>,
        answer_bytes_max: usize,
    ) -> Result<Answer, String> {
        let response = self.sender.send_request(request).await.map_err(|error| describe(&error))?;
        let (parts, body) = response.into_parts();
        let body = Limited::new(body, answer_bytes_max).collect().await.map_err(|error| error.to_string())?;
        Ok(Answer { status: parts.status, headers: parts.headers, body: body.to_bytes() })
    }
}

/// Returns the text of an error with its cause, which hyper's own text leaves out.
fn describe(error: &hyper::Error) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_that_of_a_service() {
        let address = |url: &str| Address::parse(url).map(|it| (it.authority, it.tls.is_some())).ok();
        assert_eq!(address("http://auth/x"), Some(("auth:80".to_owned(), false)));
        assert_eq!(address("https://auth.plant"), Some(("auth.plant:443".to_owned(), true)));
        assert_eq!(address("https://[::1]:8443/x"), Some(("[::1]:8443".to_owned(), true)));
        for bad in ["auth:80", "ftp://auth", "https://", "/x"] {
            assert_eq!(address(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_url_with_what_would_not_be_sent_is_refused() {
        let told = Address::parse("https://user:secret@auth/check").err().unwrap();
        assert!(!told.contains("secret") && told.starts_with("must "), "{told}");
    }
}
