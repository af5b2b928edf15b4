//! One request, from its head to its answer: what it asks for, who sends it, its messages, their streams.

use std::borrow::Cow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hyper::body::{Body as _, Incoming};
use hyper::header::{self, HeaderMap, HeaderName};
use hyper::http::request::Parts;
use hyper::{Method, Request, StatusCode, Version};

use super::answer::{self, Answer, Outcome, RETRY_AFTER_LONG, Refusal};
use super::batch::{self, Format, Item, Items, Malformed, Properties};
use super::body::{self, Body};
use super::clients::Slot;
use super::connection::{Connection, HEADERS_MAX};
use super::credentials::{Client, Shown};
use super::http2;
use super::idempotency::{Id, KEY_BYTES_MAX};
use super::store;
use crate::access::{Act, Allowance, Identity, QUESTIONS_MAX, Verdict};
use crate::hints::Hint;
use crate::ingest::Place;
use crate::properties::facts as names;
use crate::topic;

const MESSAGES: &str = "/messages/";
const BATCH: &str = "/batch";
const USAGE: &str = "POST one message to /messages/TOPIC, or many to /batch";

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const RESPONSE_TOPIC: HeaderName = HeaderName::from_static("response-topic");
const CORRELATION_DATA: HeaderName = HeaderName::from_static("correlation-data");
const MESSAGE_EXPIRY: HeaderName = HeaderName::from_static("message-expiry");
const USER_PROPERTY: HeaderName = HeaderName::from_static("user-property");
/// What browsers say of each request (Fetch Metadata, W3C).
const FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
/// What curl says of each body by itself: it says nothing of the message.
const OF_CURL: &[u8] = b"application/x-www-form-urlencoded";

/// What a request asks for.
enum Asked {
    /// One message of this topic.
    One(String),
    /// Many; this is the topic of those that name none.
    Many(Format, Option<String>),
}

/// The messages of a request, and who sent them.
pub struct Sent<'b> {
    pub items: Vec<Item<'b>>,
    /// Where each of those that are accepted so far goes.
    pub places: Vec<Option<Place>>,
    pub properties: Vec<u8>,
    pub identity: Arc<Identity>,
    /// As MQTT's client id.
    pub client_id: Option<Box<str>>,
    /// Device of messages whose topics name none.
    pub client: Arc<str>,
    pub id: Option<Id>,
    pub now_us: u64,
}

impl Connection {
    /// Answers one request, and counts the answer.
    pub async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Answer {
        let (head, mut body) = request.into_parts();
        let (open, taken) = match self.begin() {
            Ok(open) => (Some(open), self.take(&head, &mut body).await),
            Err(refusal) => (None, Err(refusal)),
        };
        let is_broken_off = taken.as_ref().is_err_and(|refusal| refusal.cause == body::BROKEN_OFF);
        let mut answer = taken.unwrap_or_else(|refusal| {
            self.http.counters.refused_request(refusal.cause);
            refusal.answer()
        });
        self.http.counters.answered(head.version, answer.status().as_u16());
        // Nobody hears the answer to a request that its client has reset.
        if let Some(open) = open
            && !is_broken_off
        {
            answer.body_mut().hold(open);
        }
        if head.version == Version::HTTP_2 && !body.is_end_stream() {
            self.http.tasks.spawn(body::discard(body));
        }
        answer
    }

    async fn take(&self, head: &Parts, body: &mut Incoming) -> Result<Answer, Refusal> {
        let http = &self.http;
        if http.shutdown.is_cancelled() {
            let refusal = Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "stopping", "the host is stopping");
            return Err(refusal.retry(RETRY_AFTER_LONG));
        }
        // The headers of an HTTP/1.1 request were counted when they were read. Those of HTTP/2 were not.
        if head.headers.len() > HEADERS_MAX {
            let reason = format!("more than {HEADERS_MAX} headers");
            return Err(Refusal::new(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "header", reason));
        }
        let asked = Asked::read(&head.method, head.uri.path(), &head.headers)?;
        let body_max = match &asked {
            Asked::One(_) => self.config.max_message_size.0,
            Asked::Many(..) => self.config.max_batch_size.0,
        };
        check_length(&head.version, &head.headers, body, body_max)?;
        let key = idempotency_key(&head.headers)?;
        let shown = Shown::read(&head.headers)?;
        // Before anything of the body is read.
        self.within_rates()?;
        let window = http2::window(&http.windows, head.version, body)?;
        let slot = self.clients.slot(shown);
        drop(self.admit(&slot).await?);
        // One that came before is answered as it was then, whatever it may do now.
        if let (Asked::One(topic), None) = (&asked, key) {
            let outcome = self.allowed(&slot, std::slice::from_ref(topic)).await?[0];
            if outcome != Outcome::Accepted {
                self.count_rejected(&slot, &[outcome], topic).await;
                return Ok(answer::of_one(outcome, RETRY_AFTER_LONG));
            }
        }
        let time = self.config.request_timeout.0;
        let body = body::read(body, body_max as usize, time, &http.bodies, window).await?;
        let _whole = self.requests.whole();
        let Body { bytes, .. } = &body;
        let is_one = matches!(asked, Asked::One(_));
        let mut items = match &asked {
            Asked::One(topic) => one(topic, bytes, &head.headers),
            Asked::Many(format, topic) => {
                let most = self.config.batch_messages_max as usize;
                batch::parse(bytes, *format, topic.as_deref(), most).map_err(|malformed| match malformed {
                    Malformed::Json(error) => Refusal::bad("batch", format!("not a batch: {error}")),
                    Malformed::TooMany => {
                        let reason = format!("more than {most} messages: send several batches");
                        Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", reason)
                    }
                })?
            }
        };
        let sizes_max = self.config.max_message_size.0 as usize;
        for item in items.items.iter_mut().filter(|item| item.payload.len() > sizes_max) {
            item.outcome = Outcome::TooLarge;
        }
        let sent = self.sent(&slot, items, key, (head.uri.path(), &head.headers, &bytes[..])).await?;
        let stored = store::store(http, &sent).await?;
        self.spend(&sent, &stored.outcomes);
        let topic = sent.items.iter().zip(&stored.outcomes).find(|(_, outcome)| outcome.cause().is_some());
        let topic = topic.map_or(Cow::Borrowed(""), |(item, _)| item.topic.clone());
        self.count_rejected(&slot, &stored.outcomes, &topic).await;
        Ok(match stored.outcomes[..] {
            [outcome] if is_one => answer::of_one(outcome, stored.retry_after),
            _ => answer::of_batch(&stored.outcomes, stored.retry_after),
        })
    }

    /// Lets the client in, unless it is already.
    async fn admit<'s>(
        &self,
        slot: &'s Slot,
    ) -> Result<tokio::sync::MutexGuard<'s, Option<Client>>, Refusal> {
        self.clients.admit(&self.http, &self.remote, slot).await
    }

    /// What the rules and limits say of each topic; where they ask an access plugin, it is asked.
    async fn allowed(&self, slot: &Slot, topics: &[impl AsRef<str>]) -> Result<Vec<Outcome>, Refusal> {
        let mut client = self.admit(slot).await?;
        let rights = &mut client.as_mut().expect("it was let in").rights;
        let access = rights.access().clone();
        let known = |topic: &str| {
            if !topic::is_valid_name(topic) {
                return Some(Outcome::BadTopic);
            }
            if topic::is_reserved(topic) {
                return Some(Outcome::ReservedTopic);
            }
            access.is_too_deep(topic).then_some(Outcome::TopicLevels)
        };
        let mut outcomes = Vec::with_capacity(topics.len());
        for topics in topics.chunks(QUESTIONS_MAX) {
            let asked = topics.iter().map(AsRef::as_ref).filter(|topic| known(topic).is_none());
            let asked = asked.filter(|topic| rights.publish(topic) == Verdict::Ask);
            let mut asked: Vec<Box<str>> = asked.map(Into::into).collect();
            asked.sort_unstable();
            asked.dedup();
            if !asked.is_empty() {
                // An error: the answers are no for now.
                let _ = rights.ask_now(Act::Publish, asked).await;
            }
            outcomes.extend(topics.iter().map(AsRef::as_ref).map(|topic| {
                known(topic).unwrap_or_else(|| match rights.publish(topic) {
                    Verdict::Yes => Outcome::Accepted,
                    Verdict::No => Outcome::NotAuthorized,
                    Verdict::Ask => Outcome::Unavailable,
                })
            }));
        }
        Ok(outcomes)
    }

    /// Puts together what is to be stored.
    async fn sent<'b>(
        &self,
        slot: &Slot,
        Items { mut items, properties }: Items<'b>,
        key: Option<&[u8]>,
        (path, headers, body): (&str, &HeaderMap, &[u8]),
    ) -> Result<Sent<'b>, Refusal> {
        let topics: Vec<&str> =
            items.iter().filter(|item| item.outcome == Outcome::Accepted).map(|item| &*item.topic).collect();
        let outcomes = self.allowed(slot, &topics).await?;
        let accepted = items.iter_mut().filter(|item| item.outcome == Outcome::Accepted);
        accepted.zip(outcomes).for_each(|(item, outcome)| item.outcome = outcome);
        let ingest = &self.http.ingest;
        let place = |item: &Item<'_>| (item.outcome == Outcome::Accepted).then(|| ingest.place(&item.topic));
        let places = items.iter().map(place).collect();
        let client = self.admit(slot).await?;
        let client = client.as_ref().expect("it was let in");
        let id = key.map(|key| {
            let mut parts = vec![path.as_bytes(), body];
            let said =
                [header::CONTENT_TYPE, RESPONSE_TOPIC, CORRELATION_DATA, MESSAGE_EXPIRY, USER_PROPERTY];
            for name in &said {
                parts.push(name.as_str().as_bytes());
                parts.extend(headers.get_all(name).iter().map(|value| value.as_bytes()));
            }
            Id::new(&client.name, key, &parts)
        });
        Ok(Sent {
            places,
            items,
            properties,
            identity: client.rights.identity.clone(),
            client_id: slot.shown.client_id().map(Into::into),
            client: slot.shown.client_id().map_or_else(|| client.name.clone(), Into::into),
            id,
            now_us: now_us(),
        })
    }

    /// Whether the client, and all clients together, are within the rates of `mqtt.limits`.
    fn within_rates(&self) -> Result<(), Refusal> {
        let now = Instant::now();
        let wait = |allowance: &Mutex<Allowance>| {
            let mut allowance = lock(allowance);
            allowance.fill(now);
            allowance.wait()
        };
        let own = self.allowance.as_ref().map(|own| {
            let mut own = lock(own);
            own.fill(now);
            own.wait()
        });
        let access = self.http.access.get();
        let all = access.publishes().map(wait);
        let wait = own.into_iter().chain(all).max().unwrap_or_default();
        if wait.is_zero() {
            return Ok(());
        }
        let reason = "more messages than mqtt.limits allows: send them later";
        Err(Refusal::new(StatusCode::TOO_MANY_REQUESTS, "rate", reason).retry(wait))
    }

    fn spend(&self, sent: &Sent<'_>, outcomes: &[Outcome]) {
        let accepted =
            || sent.items.iter().zip(outcomes).filter(|(_, outcome)| **outcome == Outcome::Accepted);
        let messages = accepted().count() as u64;
        let bytes = accepted().map(|(item, _)| (item.topic.len() + item.payload.len()) as u64).sum();
        if let Some(own) = &self.allowance {
            lock(own).spend(messages, bytes);
        }
        if let Some(all) = self.http.access.get().publishes() {
            lock(all).spend(messages, bytes);
        }
    }

    /// Counts messages that were not accepted, and reports those that their client may not publish.
    async fn count_rejected(&self, slot: &Slot, outcomes: &[Outcome], topic: &str) {
        let http = &self.http;
        outcomes
            .iter()
            .filter_map(|outcome| outcome.cause())
            .for_each(|cause| http.counters.rejected_message(cause));
        let denied = outcomes.iter().filter(|outcome| outcome.status() == StatusCode::FORBIDDEN).count();
        if denied > 0 {
            let name = &*slot.name().await;
            let detail = format!("client {name} at {}, to {topic:.600}", self.remote);
            let kind = "http: messages refused by the access rules";
            let hint = http.failures.hint(Hint::Status);
            http.failures.report_client(kind, name, denied as u64, &detail, &hint);
        }
    }
}

impl Asked {
    fn read(method: &Method, path: &str, headers: &HeaderMap) -> Result<Self, Refusal> {
        let of_path = |encoded: &str| {
            let topic = unescape(encoded).filter(|topic| topic::is_valid_name(topic));
            topic.ok_or_else(|| Refusal::bad("path", Outcome::BadTopic.reason()))
        };
        let one = path.strip_prefix(MESSAGES);
        let many = path.strip_prefix(BATCH).filter(|rest| rest.is_empty() || rest.starts_with('/'));
        if one.is_none() && many.is_none() {
            return Err(Refusal::new(StatusCode::NOT_FOUND, "path", USAGE));
        }
        // A browser lets any page post to any host, this machine's too, and says whose page it is.
        if headers.contains_key(header::ORIGIN) || headers.contains_key(FETCH_SITE) {
            let reason = "web pages may not post messages";
            return Err(Refusal::new(StatusCode::FORBIDDEN, "origin", reason));
        }
        if method != Method::POST {
            return Err(Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "method", USAGE));
        }
        let encodings = headers.get_all(header::CONTENT_ENCODING);
        if encodings.iter().any(|encoding| !encoding.as_bytes().eq_ignore_ascii_case(b"identity")) {
            let reason = "Content-Encoding is not supported: send the body unencoded";
            return Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "encoding", reason));
        }
        if let Some(topic) = one {
            return of_path(topic).map(Self::One);
        }
        let format = headers.get(header::CONTENT_TYPE).and_then(|of| of.to_str().ok()).unwrap_or_default();
        let format = format.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        let format = match &*format {
            "application/json" => Format::Array,
            "application/x-ndjson" | "application/ndjson" | "application/jsonl" => Format::Lines,
            _ => {
                let reason =
                    "a batch is application/json (an array) or application/x-ndjson (a message a line)";
                return Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "content_type", reason));
            }
        };
        let topic = many.and_then(|rest| rest.strip_prefix('/')).filter(|topic| !topic.is_empty());
        Ok(Self::Many(format, topic.map(of_path).transpose()?))
    }
}

/// A request that says how long it is is refused before it sends that.
fn check_length(version: &Version, headers: &HeaderMap, body: &Incoming, most: u64) -> Result<(), Refusal> {
    let has_length =
        headers.contains_key(header::CONTENT_LENGTH) || headers.contains_key(header::TRANSFER_ENCODING);
    if *version < Version::HTTP_2 && !has_length {
        let reason =
            "neither Content-Length nor Transfer-Encoding: send Content-Length: 0 with an empty message";
        return Err(Refusal::new(StatusCode::LENGTH_REQUIRED, "length", reason));
    }
    if body.size_hint().exact().is_some_and(|len| len > most) {
        Err(body::too_large(most as usize))
    } else {
        Ok(())
    }
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<&[u8]>, Refusal> {
    let Some(key) = headers.get(IDEMPOTENCY_KEY) else { return Ok(None) };
    let key = key.as_bytes();
    if (1..=KEY_BYTES_MAX).contains(&key.len()) {
        return Ok(Some(key));
    }
    Err(Refusal::bad("idempotency_key", format!("Idempotency-Key must be 1 to {KEY_BYTES_MAX} bytes")))
}

/// A message whose properties are the request's headers.
fn one<'b>(topic: &'b str, payload: &'b [u8], headers: &HeaderMap) -> Items<'b> {
    let mut properties = Vec::new();
    let said = said(&mut Properties::new(&mut properties), headers);
    let outcome = said.err().unwrap_or(Outcome::Accepted);
    if outcome != Outcome::Accepted {
        properties.clear();
    }
    let whole = 0..properties.len();
    let (topic, payload) = (Cow::Borrowed(topic), Cow::Borrowed(payload));
    Items { items: vec![Item { topic, payload, properties: whole, outcome }], properties }
}

fn said(properties: &mut Properties<'_>, headers: &HeaderMap) -> Result<(), Outcome> {
    fn text(value: &header::HeaderValue) -> Result<&str, Outcome> {
        std::str::from_utf8(value.as_bytes()).map_err(|_| Outcome::BadProperty)
    }
    if let Some(value) = headers.get(header::CONTENT_TYPE).filter(|value| value.as_bytes() != OF_CURL) {
        properties.fact(names::CONTENT_TYPE, text(value)?)?;
    }
    if let Some(value) = headers.get(RESPONSE_TOPIC) {
        properties.fact(names::RESPONSE_TOPIC, text(value)?)?;
    }
    if let Some(value) = headers.get(CORRELATION_DATA) {
        properties.fact(names::CORRELATION_DATA, text(value)?)?;
    }
    if let Some(value) = headers.get(MESSAGE_EXPIRY) {
        let seconds: u32 = text(value)?.parse().map_err(|_| Outcome::BadProperty)?;
        properties.fact(names::EXPIRY_S, &seconds.to_string())?;
    }
    for value in headers.get_all(USER_PROPERTY) {
        let (name, value) = text(value)?.split_once('=').ok_or(Outcome::BadProperty)?;
        properties.user(name.trim(), value.trim())?;
    }
    Ok(())
}

/// Decodes a path (RFC 3986, 2.1); `None` where it is not UTF-8 or a `%` is not followed by two digits.
fn unescape(path: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let (digits, after) = rest.split_at_checked(2)?;
        let digits = std::str::from_utf8(digits).ok().filter(|digits| !digits.starts_with('+'))?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        rest = after;
    }
    String::from_utf8(bytes).ok()
}

/// Microseconds since 1970, UTC.
pub fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since: Duration| since.as_micros() as u64)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(method: &str, path: &str, headers: &[(&'static str, &str)]) -> Result<Asked, u16> {
        let headers =
            headers.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap()));
        let method = method.parse().unwrap();
        Asked::read(&method, path, &headers.collect()).map_err(|refusal| refusal.status.as_u16())
    }

    #[test]
    fn the_path_is_the_topic_as_it_stands_or_escaped() {
        for (path, wanted) in
            [("/messages/a/b", "a/b"), ("/messages//a/", "/a/"), ("/messages/a%2Fb%20c/%C3%BC", "a/b c/ü")]
        {
            match asked("POST", path, &[]) {
                Ok(Asked::One(topic)) => assert_eq!(topic, wanted),
                _ => panic!("{path}"),
            }
        }
        for path in
            ["/messages/", "/messages/a/+", "/messages/%23", "/messages/%FF", "/messages/%2", "/messages/%+1"]
        {
            assert_eq!(asked("POST", path, &[]).err(), Some(400), "{path}");
        }
    }

    #[test]
    fn what_is_asked_for_in_another_way_is_told_how() {
        let json = [("content-type", "application/json; charset=utf-8")];
        assert!(matches!(asked("POST", "/batch", &json), Ok(Asked::Many(Format::Array, None))));
        let lines = [("content-type", "application/x-ndjson")];
        match asked("POST", "/batch/a/b", &lines) {
            Ok(Asked::Many(Format::Lines, topic)) => assert_eq!(topic.as_deref(), Some("a/b")),
            _ => panic!("a batch"),
        }
        for (method, path, headers, status) in [
            ("GET", "/", &[][..], 404),
            ("POST", "/batches", &json, 404),
            ("GET", "/messages/a", &[], 405),
            ("POST", "/batch", &[], 415),
            ("POST", "/messages/a", &[("content-encoding", "gzip")], 415),
            ("POST", "/messages/a", &[("origin", "https://evil.example")], 403),
            ("POST", "/messages/a", &[("sec-fetch-site", "same-origin")], 403),
        ] {
            assert_eq!(asked(method, path, headers).err(), Some(status), "{method} {path}");
        }
    }

    #[test]
    fn headers_are_the_properties_of_a_message() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            (header::CONTENT_TYPE, "text/csv"),
            (MESSAGE_EXPIRY, "060"),
            (USER_PROPERTY, "unit=C"),
            (USER_PROPERTY, "eq=a=b"),
        ] {
            headers.append(name, value.parse().unwrap());
        }
        let items = one("a", b"1", &headers);
        let found: Vec<_> =
            crate::properties::iter(&items.properties).map(|it| (it.name, it.value)).collect();
        let wanted: [(&str, &[u8]); 4] =
            [("content-type", b"text/csv"), ("expiry-s", b"60"), ("unit", b"C"), ("eq", b"a=b")];
        assert_eq!(found, wanted);
        headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_bytes(OF_CURL).unwrap());
        assert!(!one("a", b"1", &headers).properties.starts_with(b"\x01\x00\x0c"));
        headers.append(USER_PROPERTY, "none".parse().unwrap());
        assert_eq!(one("a", b"1", &headers).items[0].outcome, Outcome::BadProperty);
    }
}
