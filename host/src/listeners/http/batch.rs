//! Parses batches: a JSON array of messages, or one message per line (NDJSON), each an object `{"topic",
//! "payload" or "payload_base64", "content_type", "response_topic", "correlation_data", "expiry_s",
//! "user_properties"}`.
//!
//! A payload that is a string stands for its text; any other JSON value is taken as it is in the body. A
//! batch that is not valid JSON is refused as a whole; an invalid message is reported by itself.

use std::borrow::Cow;
use std::ops::Range;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use headworks_guest::json::{self, Kind, Raw};

use super::answer::Outcome;
use crate::ingest::facts;
use crate::properties::{PROPERTIES_BYTES_MAX, PROPERTIES_MAX, facts as names};
use crate::topic;

/// How a body represents its messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Array,
    Lines,
}

/// One message as the client sent it.
#[derive(Debug)]
pub struct Item<'b> {
    pub topic: Cow<'b, str>,
    pub payload: Cow<'b, [u8]>,
    /// Range in [`Items::properties`] of what the client states about it.
    pub properties: Range<usize>,
    pub outcome: Outcome,
}

/// Messages in order.
#[derive(Debug, Default)]
pub struct Items<'b> {
    pub items: Vec<Item<'b>>,
    pub properties: Vec<u8>,
}

/// Why a body is not a batch.
#[derive(Debug, PartialEq, Eq)]
pub enum Malformed {
    TooMany,
    Json(String),
}

/// Parses a batch of at most `messages_max` messages. `topic` is that of messages without one.
pub fn parse<'b>(
    body: &'b [u8],
    format: Format,
    topic: Option<&'b str>,
    messages_max: usize,
) -> Result<Items<'b>, Malformed> {
    let mut items = Items::default();
    let mut push = |value: Raw<'b>| {
        if items.items.len() == messages_max {
            return Err(Malformed::TooMany);
        }
        items.push(value, topic);
        Ok(())
    };
    match format {
        Format::Array => {
            let array = json::parse(body).map_err(|error| Malformed::Json(error.to_string()))?;
            if array.kind() != Kind::Array {
                let found = array.kind().name();
                return Err(Malformed::Json(format!("must be an array of messages, is {found}")));
            }
            array.elements().try_for_each(push)?;
        }
        Format::Lines => {
            for (number, line) in (1..).zip(body.split(|byte| *byte == b'\n')) {
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                let value = json::parse(line);
                push(value.map_err(|error| Malformed::Json(format!("line {number}: {error}")))?)?;
            }
        }
    }
    Ok(items)
}

impl<'b> Items<'b> {
    fn push(&mut self, value: Raw<'b>, default: Option<&'b str>) {
        let begin = self.properties.len();
        let (item, outcome) = match self.read(value, default) {
            Ok(read) => (read, Outcome::Accepted),
            Err(outcome) => (Default::default(), outcome),
        };
        if outcome != Outcome::Accepted {
            self.properties.truncate(begin);
        }
        let (topic, payload) = item;
        self.items.push(Item { topic, payload, properties: begin..self.properties.len(), outcome });
    }

    /// Reads topic and payload, and encodes the other fields of the object.
    fn read(
        &mut self,
        value: Raw<'b>,
        default: Option<&'b str>,
    ) -> Result<(Cow<'b, str>, Cow<'b, [u8]>), Outcome> {
        if value.kind() != Kind::Object {
            return Err(Outcome::BadPayload);
        }
        let mut topic = default.map(Cow::Borrowed);
        let (mut payload, mut encoded) = (None, None);
        let mut properties = Properties::new(&mut self.properties);
        for (name, value) in value.members() {
            let text = || value.as_str().ok_or(Outcome::BadProperty);
            match &*name {
                "topic" => topic = Some(value.as_str().ok_or(Outcome::BadTopic)?),
                "payload" => payload = Some(value),
                "payload_base64" => encoded = Some(value),
                "content_type" => properties.fact(names::CONTENT_TYPE, &text()?)?,
                "response_topic" => properties.fact(names::RESPONSE_TOPIC, &text()?)?,
                "correlation_data" => properties.fact(names::CORRELATION_DATA, &text()?)?,
                "expiry_s" => {
                    let seconds = value.as_i64().and_then(|seconds| u32::try_from(seconds).ok());
                    let seconds = seconds.ok_or(Outcome::BadProperty)?.to_string();
                    properties.fact(names::EXPIRY_S, &seconds)?;
                }
                "user_properties" if value.kind() == Kind::Object => {
                    for (name, value) in value.members() {
                        let text = value.as_str();
                        let text = text.unwrap_or(String::from_utf8_lossy(value.as_bytes()));
                        properties.user(&name, &text)?;
                    }
                }
                "user_properties" => return Err(Outcome::BadProperty),
                // What a later version may say.
                _ => {}
            }
        }
        let topic = topic.ok_or(Outcome::NoTopic)?;
        let payload = match (payload, encoded) {
            (Some(value), None) => match value.as_str() {
                Some(Cow::Borrowed(text)) => Cow::Borrowed(text.as_bytes()),
                Some(Cow::Owned(text)) => Cow::Owned(text.into_bytes()),
                // A string that is no text: half of a surrogate pair.
                None if value.kind() == Kind::String => return Err(Outcome::BadPayload),
                None => Cow::Borrowed(value.as_bytes()),
            },
            (None, Some(value)) => {
                let text = value.as_str().ok_or(Outcome::BadPayload)?;
                Cow::Owned(BASE64_STANDARD.decode(text.as_bytes()).map_err(|_| Outcome::BadPayload)?)
            }
            _ => return Err(Outcome::BadPayload),
        };
        Ok((topic, payload))
    }
}

/// Encodes the properties of one message, within their bounds.
pub struct Properties<'o> {
    out: &'o mut Vec<u8>,
    begin: usize,
    count: usize,
}

impl<'o> Properties<'o> {
    pub fn new(out: &'o mut Vec<u8>) -> Self {
        let begin = out.len();
        Self { out, begin, count: 0 }
    }

    pub fn fact(&mut self, fact: &str, value: &str) -> Result<(), Outcome> {
        let is_topic = fact == names::RESPONSE_TOPIC;
        if is_topic && !topic::is_valid_name(value) {
            return Err(Outcome::BadProperty);
        }
        self.check(fact, value)?;
        facts::push(self.out, fact, value.as_bytes());
        self.within()
    }

    pub fn user(&mut self, name: &str, value: &str) -> Result<(), Outcome> {
        self.check(name, value)?;
        facts::push_user(self.out, name, value.as_bytes());
        self.within()
    }

    /// Checks a property, which subscribers receive as MQTT strings (MQTT 5.0, 1.5.4).
    fn check(&self, name: &str, value: &str) -> Result<(), Outcome> {
        let is_text = |text: &str| text.len() <= usize::from(u16::MAX) && !text.contains('\0');
        let fits = is_text(name) && is_text(value) && self.count < PROPERTIES_MAX;
        if fits { Ok(()) } else { Err(Outcome::BadProperty) }
    }

    fn within(&mut self) -> Result<(), Outcome> {
        self.count += 1;
        if self.out.len() - self.begin > PROPERTIES_BYTES_MAX { Err(Outcome::BadProperty) } else { Ok(()) }
    }
}

/// Parses any bytes, and returns the properties of each message that would be accepted.
#[cfg(any(test, fuzzing))]
pub fn taken(body: &[u8], format: Format, topic: Option<&str>) -> Vec<Vec<u8>> {
    const MOST: usize = 5;
    let Ok(Items { items, properties }) = parse(body, format, topic, MOST) else { return Vec::new() };
    assert!(items.len() <= MOST);
    let mut taken = Vec::new();
    for Item { payload, properties: own, outcome, .. } in items {
        assert!(payload.len() <= body.len() && crate::properties::is_valid(&properties[own.clone()]));
        if outcome == Outcome::Accepted {
            taken.push(properties[own].to_vec());
        }
    }
    taken
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::properties;

    fn outcomes(body: &str, format: Format) -> Vec<Outcome> {
        let items = parse(body.as_bytes(), format, None, 100).unwrap();
        items.items.iter().map(|item| item.outcome).collect()
    }

    #[test]
    fn a_payload_is_any_value_as_it_stands_a_text_or_bytes() {
        let body = r#"[
            {"topic":"a","payload":{"v": 21.50}},
            {"topic":"b","payload":"tex\u0074"},
            {"payload_base64":"AP8=","topic":"c"},
            {"topic":"d","payload":null}
        ]"#;
        let items = parse(body.as_bytes(), Format::Array, None, 4).unwrap().items;
        let payloads: Vec<&[u8]> = items.iter().map(|item| &*item.payload).collect();
        assert_eq!(payloads, [&br#"{"v": 21.50}"#[..], b"text", &[0, 0xff], b"null"]);
        assert!(items.iter().all(|item| item.outcome == Outcome::Accepted));
        assert_eq!(parse(body.as_bytes(), Format::Array, None, 3).unwrap_err(), Malformed::TooMany);
    }

    #[test]
    fn a_message_that_cannot_be_one_is_told_of_by_itself() {
        let body = "{\"topic\":\"a\",\"payload\":1}\r\n\n7\n{\"payload\":1}\n{\"topic\":\"a\"}\n\
                    {\"topic\":\"a\",\"payload\":1,\"payload_base64\":\"\"}\n\
                    {\"topic\":\"a\",\"payload_base64\":\"!\"}\n{\"topic\":\"a\",\"payload\":1,\"expiry_s\":-1}";
        let outcomes = outcomes(body, Format::Lines);
        use Outcome::{Accepted, BadPayload, BadProperty, NoTopic};
        let bad = [BadPayload; 3];
        assert_eq!(outcomes, [&[Accepted, BadPayload, NoTopic][..], &bad, &[BadProperty]].concat());
    }

    #[test]
    fn what_is_no_json_is_told_with_its_place() {
        let error = |body: &str, format| match parse(body.as_bytes(), format, None, 9) {
            Err(Malformed::Json(error)) => error,
            other => panic!("{other:?}"),
        };
        assert!(error("{}\n{", Format::Lines).starts_with("line 2: "));
        assert!(error("[1,", Format::Array).contains("at byte 3"));
        assert_eq!(error("{}", Format::Array), "must be an array of messages, is an object");
    }

    #[test]
    fn what_the_client_says_of_a_message_becomes_its_properties() {
        let body = r#"{"topic":"a","payload":1,"content_type":"text/csv","expiry_s":60,
            "user_properties":{"unit":"C","n":7},"correlation_data":"x"}"#
            .replace('\n', " ");
        let items = parse(body.as_bytes(), Format::Lines, None, 1).unwrap();
        let found = properties::iter(&items.properties[items.items[0].properties.clone()]);
        let found: Vec<_> = found.map(|it| (it.origin, it.name, String::from_utf8_lossy(it.value))).collect();
        let wanted = [
            (1, "content-type", "text/csv"),
            (1, "expiry-s", "60"),
            (0, "unit", "C"),
            (0, "n", "7"),
            (1, "correlation-data", "x"),
        ];
        assert_eq!(found, wanted.map(|(origin, name, value)| (origin, name, value.into())));
        let bad = r#"{"topic":"a","payload":1,"response_topic":"a/#"}"#;
        assert_eq!(outcomes(bad, Format::Lines)[0], Outcome::BadProperty);
    }

    /// Pieces of batches in any order.
    fn pieces() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop::sample::select(vec![
            "[",
            "]",
            "{",
            "}",
            ",",
            ":",
            "\n",
            "\"",
            "\\u0000",
            "\\ud800",
            "\"topic\":",
            "\"payload\":",
            "\"a\"",
            "\"payload_base64\":\"AAA=\"",
            "\"user_properties\":{\"a\":\"b\"}",
            "1",
            "null",
            "\"expiry_s\":5",
            "{\"topic\":\"a\",\"payload\":1}",
            "\u{0}",
            "ü",
            "\\",
        ]);
        prop::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat().into_bytes())
    }

    proptest! {
        #[test]
        fn no_body_breaks_the_parsers(bytes in prop::collection::vec(any::<u8>(), 0..300), pieces in pieces()) {
            for format in [Format::Array, Format::Lines] {
                taken(&bytes, format, Some("t"));
                taken(&pieces, format, None);
            }
        }

        #[test]
        fn as_many_messages_are_taken_as_were_sent(payloads in prop::collection::vec(".{0,20}", 0..6)) {
            let objects: Vec<String> = payloads
                .iter()
                .map(|payload| serde_json::json!({ "topic": "a/b", "payload": payload }).to_string())
                .collect();
            let bodies = [(format!("[{}]", objects.join(",")), Format::Array), (objects.join("\n"), Format::Lines)];
            for (body, format) in &bodies {
                let items = parse(body.as_bytes(), *format, None, 6).unwrap().items;
                let found: Vec<_> = items.iter().map(|item| String::from_utf8(item.payload.to_vec()).unwrap()).collect();
                prop_assert_eq!(&found, &payloads);
            }
        }
    }
}
