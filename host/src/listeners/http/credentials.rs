//! Who sends a request: what it shows (RFC 6750 Bearer, RFC 7617 Basic, a client's certificate) goes to
//! the same access control as an MQTT client's CONNECT. What that says is kept for the next requests of
//! the connection, for as long as it holds.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Instant;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use hyper::StatusCode;
use hyper::header::{self, HeaderMap, HeaderName};

use super::Http;
use super::answer::{RETRY_AFTER, RETRY_AFTER_LONG, Refusal};
use crate::access::{self, Admitted, Credentials, Denied, UserPlace};
use crate::hints::Hint;
use crate::listeners::transport::Remote;

/// Names the client, as MQTT's client id does.
const CLIENT_ID: HeaderName = HeaderName::from_static("client-id");
/// As MQTT's bounds of a client id and a user name.
const CLIENT_ID_BYTES_MAX: usize = 512;
const USER_NAME_BYTES_MAX: usize = 1_024;

/// What a request shows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shown {
    client_id: Option<Box<str>>,
    username: Option<Box<str>>,
    password: Option<Box<[u8]>>,
}

/// A client that is served.
pub struct Client {
    pub rights: Admitted,
    /// The user, else its client id, else its address: what it is called in the log, and whose keys of
    /// requests are its own.
    pub name: Arc<str>,
    _place: Option<UserPlace>,
}

impl Shown {
    pub fn read(headers: &HeaderMap) -> Result<Self, Refusal> {
        let mut shown = Self::default();
        let wrong = |reason| Refusal::bad("header", reason);
        if let Some(value) = headers.get(CLIENT_ID) {
            let client_id = std::str::from_utf8(value.as_bytes()).ok();
            let is_valid = |id: &&str| (1..=CLIENT_ID_BYTES_MAX).contains(&id.len());
            let client_id = client_id
                .filter(is_valid)
                .ok_or_else(|| wrong("Client-Id is not 1 to 512 bytes of UTF-8"))?;
            shown.client_id = Some(client_id.into());
        }
        let Some(value) = headers.get(header::AUTHORIZATION) else { return Ok(shown) };
        let value = value.as_bytes();
        let (scheme, rest) =
            value.split_at(value.iter().position(|byte| *byte == b' ').unwrap_or(value.len()));
        let rest = rest.trim_ascii();
        if scheme.eq_ignore_ascii_case(b"bearer") {
            shown.password = Some(rest.into());
        } else if scheme.eq_ignore_ascii_case(b"basic") {
            let decoded = BASE64_STANDARD.decode(rest).ok();
            let split = decoded.as_deref().and_then(|both| {
                let colon = both.iter().position(|byte| *byte == b':')?;
                let user = std::str::from_utf8(&both[..colon]).ok()?;
                (user.len() <= USER_NAME_BYTES_MAX).then_some((user, &both[colon + 1..]))
            });
            let (user, password) =
                split.ok_or_else(|| wrong("Authorization: Basic is not base64 of USER:PASSWORD"))?;
            shown.username = Some(user.into());
            shown.password = Some(password.into());
        } else {
            return Err(wrong("Authorization: use Bearer or Basic"));
        }
        Ok(shown)
    }

    /// Whether a request that shows `other` is of the same user, perhaps with another client id.
    pub fn is_same_user(&self, other: &Self) -> bool {
        (&self.username, &self.password) == (&other.username, &other.password)
    }

    /// Returns the client id that the request names.
    pub fn client_id(&self) -> Option<&str> {
        self.client_id.as_deref()
    }

    /// What the log and the list of refused clients call it.
    fn who(&self) -> Option<&str> {
        self.username.as_deref().or(self.client_id.as_deref())
    }
}

impl Client {
    /// Whether it is still served as it was.
    pub fn holds(&self, access: &access::Current, remote: &Remote) -> bool {
        let is_over = self.rights.identity.valid_until.is_some_and(|until| until <= Instant::now());
        let is_stranger = self.rights.access().is_checked() && self.rights.identity.name.is_none();
        let is_served = !is_stranger || remote.entrance.allows_anonymous();
        !is_over && !self.rights.is_revoked() && access.is_of(&self.rights) && is_served
    }

    /// Returns the client that shows this, or why it is not served, which is reported. `is_first`: no client
    /// of the connection was let in before.
    pub async fn admit(http: &Http, shown: &Shown, remote: &Remote, is_first: bool) -> Result<Self, Refusal> {
        let denied = |cause: &'static str, status, reason: &str, is_reported: bool| {
            let refusal = Refusal::new(status, cause, reason);
            let user = shown.who().unwrap_or("anonymous");
            let detail = format!("user {user:.600} at {remote}");
            http.refuse_client(cause, !is_reported, shown.who(), remote, &detail);
            refusal
        };
        let access = http.access.get();
        if is_first && !access.may_connect(remote.address.ip()) {
            let reason = "too many connections per second, try again";
            let refusal = denied("connect_rate", StatusCode::TOO_MANY_REQUESTS, reason, false);
            return Err(refusal.retry(RETRY_AFTER));
        }
        // TLS checked the certificate when the connection began, which may be long ago.
        let is_over = |until: Instant| until <= Instant::now();
        if remote.proof().is_some_and(|proof| !proof.holds() || proof.valid_until().is_some_and(is_over)) {
            let reason = "the certificate of this connection is revoked or has expired: connect anew";
            return Err(denied("certificate", StatusCode::FORBIDDEN, reason, false));
        }
        let who = Credentials {
            client_id: shown.client_id.as_deref().unwrap_or_default(),
            username: shown.username.as_deref(),
            password: shown.password.as_deref(),
            certificate: remote.identity(),
            proof: remote.proof(),
            certificates: remote.certificates(),
            ip: remote.address.ip(),
            is_connected: false,
            entrance: &remote.entrance,
            allow_anonymous: remote.entrance.allows_anonymous(),
        };
        let shows_nothing = who.shows_nothing();
        let mut rights = access.admit(&who).await.map_err(|reason| match reason {
            Denied::BadCredentials => {
                let reason = "wrong user name, password or token";
                Refusal {
                    challenge: true,
                    ..denied("bad_credentials", StatusCode::UNAUTHORIZED, reason, false)
                }
            }
            Denied::NotAuthorized if shows_nothing => Refusal {
                challenge: true,
                ..denied("not_authorized", StatusCode::UNAUTHORIZED, "credentials needed", false)
            },
            Denied::NotAuthorized | Denied::BadMethod => {
                denied("not_authorized", StatusCode::FORBIDDEN, "not allowed", false)
            }
            Denied::TooMany => {
                let reason = "too many wrong passwords, try again later";
                denied("guessing", StatusCode::TOO_MANY_REQUESTS, reason, false).retry(RETRY_AFTER_LONG)
            }
            Denied::Unavailable(_) | Denied::Failed(_) => {
                let reason_text = "credentials cannot be checked now, try again";
                let is_reported = matches!(reason, Denied::Failed(_));
                let status = StatusCode::SERVICE_UNAVAILABLE;
                denied("access_unavailable", status, reason_text, is_reported).retry(RETRY_AFTER_LONG)
            }
        })?;
        let client_id = shown.client_id.as_deref().unwrap_or_default();
        if shown.client_id.is_some() && !access.may_have_id(&rights.identity, client_id) {
            return Err(denied(
                "client_id",
                StatusCode::FORBIDDEN,
                "this user may not have this client id",
                false,
            ));
        }
        let Some(place) = access.enter(&rights.identity, client_id) else {
            let reason = "this user has too many client ids";
            let refusal = denied("connections_per_user", StatusCode::TOO_MANY_REQUESTS, reason, false);
            return Err(refusal.retry(RETRY_AFTER_LONG));
        };
        // Looked at with each request: there is nothing to wake.
        access.watch(&mut rights, || {});
        let name: Cow<'_, str> = match (&rights.identity.name, &shown.client_id) {
            (Some(user), _) => Cow::Borrowed(user),
            (None, Some(client_id)) => Cow::Borrowed(client_id),
            (None, None) => Cow::Owned(remote.address.ip().to_string()),
        };
        Ok(Self { name: name.as_ref().into(), rights, _place: place })
    }
}

impl Http {
    /// Counts, reports and lists a client whose request is refused for who it is.
    fn refuse_client(
        &self,
        cause: &'static str,
        is_said: bool,
        who: Option<&str>,
        remote: &Remote,
        detail: &str,
    ) {
        let ip = remote.address.ip();
        if is_said {
            let subject = who.map_or_else(|| ip.to_string(), str::to_owned);
            let kind = format!("http: request refused: {cause}");
            let hint = self.failures.hint(Hint::ClientsRefused);
            self.failures.report_client(&kind, &subject, 1, detail, &hint);
        }
        self.refused_clients.add(cause, who, ip, detail);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(authorization: &str) -> Result<Shown, Refusal> {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, authorization.parse().unwrap());
        Shown::read(&headers)
    }

    #[test]
    fn a_request_shows_a_password_or_a_token() {
        let basic = read("Basic QWxhZGRpbjpvcGVuOnNlc2FtZQ==").unwrap();
        assert_eq!(
            (basic.username.as_deref(), basic.password.as_deref()),
            (Some("Aladdin"), Some(&b"open:sesame"[..]))
        );
        let bearer = read("bearer  a.b.c").unwrap();
        assert_eq!((bearer.username, bearer.password.as_deref()), (None, Some(&b"a.b.c"[..])));
        for wrong in ["Basic !", "Basic QWxhZGRpbg==", "Digest x", ""] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
