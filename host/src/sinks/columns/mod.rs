//! Maps messages to column values, in the same way for every sink with a table.
//!
//! [`Columns`] is the mapping, created once. A [`Reader`] processes the rows of one commit, and finds
//! all fields of a payload in one pass, without building a tree and without allocating for each message.

use std::sync::Arc;

use headworks_guest::json::{self, Raw};
use headworks_guest::time;

use super::RefusedRow;
use crate::batch::MessageRef;
use crate::topic::Namespace;

mod config;
mod value;

pub(crate) use config::is_name;
pub use config::{ColumnConfig, ColumnsConfig, FullColumn, Kind, OneOrMany, Unit};
pub use value::{TIME_BYTES, Value, excerpt, write_time};

/// Columns in the order in which they are written.
#[derive(Clone, Debug)]
pub struct Columns {
    pub columns: Vec<Column>,
    /// Top-level fields of the payload that the pointers use.
    keys: Vec<String>,
    namespace: Arc<Namespace>,
}

#[derive(Clone, Debug)]
pub struct Column {
    pub name: String,
    /// Type of the value; `None` for the type of the table's column, or of the value itself.
    pub kind: Option<Kind>,
    /// Whether the column must have a value.
    pub required: bool,
    /// Name of the column in the sink, and key of the config, for error messages.
    pub called: Called,
    pub(super) unit: Option<Unit>,
    /// Minutes east of UTC, for times without an offset.
    pub zone_minutes: Option<i32>,
    sources: Vec<Source>,
}

/// Name that a sink uses for a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Called {
    pub noun: &'static str,
    /// Key in the sink's config.
    pub key: &'static str,
}

#[derive(Clone, Debug, PartialEq)]
enum Source {
    Time,
    Received,
    Topic,
    LastLevel,
    Device,
    Payload,
    Route,
    /// A level of the topic, if the topic matches the namespace.
    Level(String),
    /// A field of the payload, and the path from there.
    Field {
        key: usize,
        path: Vec<String>,
        pointer: String,
    },
}

impl Columns {
    pub fn new(config: &ColumnsConfig, namespace: Arc<Namespace>) -> Self {
        let mut keys = Vec::new();
        let columns = config
            .0
            .iter()
            .map(|(name, column)| Column {
                name: name.clone(),
                kind: column.kind(),
                required: column.required(),
                called: Called { noun: "column", key: "columns" },
                unit: column.unit(),
                zone_minutes: column.zone().and_then(|zone| time::parse_zone(zone.as_bytes())),
                sources: column.sources().iter().map(|source| Source::parse(source, &mut keys)).collect(),
            })
            .collect();
        Self { columns, keys, namespace }
    }

    /// Returns the first column that holds the message's time.
    pub fn time(&self) -> Option<&Column> {
        self.columns.iter().find(|column| column.sources.first() == Some(&Source::Time))
    }

    /// Returns the first column that holds the device id.
    pub fn device(&self) -> Option<&Column> {
        self.columns.iter().find(|column| column.sources.first() == Some(&Source::Device))
    }

    /// Warns about times that are written as numbers in a unit that the config does not name.
    pub fn warn_of_times_without_unit(&self, sink: &str) {
        for column in self.columns.iter().filter(|column| column.is_time_without_unit()) {
            tracing::warn!(
                sink,
                "column \"{}\" is bigint: times are written as microseconds since 1970; \
                 say `unit: us`, or s, ms, ns, in `columns`",
                column.name
            );
        }
    }

    pub fn reader<'m>(&self) -> Reader<'_, 'm> {
        Reader { columns: self, found: Vec::with_capacity(self.keys.len()) }
    }
}

/// Why a column has no value: the type that it should have had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch(pub &'static str);

/// Reads the values of one message after another.
pub struct Reader<'c, 'm> {
    columns: &'c Columns,
    found: Vec<Option<Raw<'m>>>,
}

impl<'m> Reader<'_, 'm> {
    /// Passes each column's value to `write`, in order. A row is rejected with a reason if `write`
    /// cannot take a value, if a required value is missing, or if the payload yields no value although
    /// columns are filled from it.
    pub fn read(
        &mut self,
        row: usize,
        message: MessageRef<'m>,
        mut write: impl FnMut(usize, Value<'m>) -> Result<(), Mismatch>,
    ) -> Result<(), RefusedRow> {
        let payload = message.payload();
        let found = self.find(payload);
        let broken = found.err();
        let mut is_taken = matches!(found, Ok(true));
        for (i, column) in self.columns.columns.iter().enumerate() {
            let (value, source) = self.first(column, &message);
            is_taken |= source == Some(&Source::Payload);
            let outcome = match value {
                Value::Null if column.required => Err(Mismatch(expected(column.kind))),
                Value::Null => write(i, Value::Null),
                value => column.as_time(value).and_then(|value| write(i, value)),
            };
            if let Err(Mismatch(expected)) = outcome {
                let reason = reason(column, source, value, expected, broken, payload);
                return Err(RefusedRow { row, reason, code: None });
            }
        }
        // Also where no column is required: what the device sent would be NULLs in silence.
        let lost = match broken {
            Some(_) => self.columns.columns.iter().find(|column| column.has_field()),
            None if is_taken => None,
            None => self.columns.columns.iter().find(|column| column.wants_payload()),
        };
        match lost {
            None => Ok(()),
            Some(column) => {
                let reason = reason(column, None, Value::Null, expected(column.kind), broken, payload);
                Err(RefusedRow { row, reason, code: None })
            }
        }
    }

    /// Finds all fields in one pass, and returns whether the payload is an object, which may have
    /// fields. A payload that begins as an object, possibly after a byte order mark, and is not valid
    /// JSON is an error.
    fn find(&mut self, payload: &'m [u8]) -> Result<bool, json::Error> {
        self.found.clear();
        self.found.resize(self.columns.keys.len(), None);
        let text = payload.strip_prefix(BYTE_ORDER_MARK).unwrap_or(payload);
        let is_object = text.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'{');
        if !is_object || self.columns.keys.is_empty() {
            return Ok(false);
        }
        let outcome = json::get_each(payload, &self.columns.keys, &mut self.found);
        if outcome.is_err() {
            // Fields found before the damage do not count.
            self.found.fill(None);
        }
        outcome.map(|()| true)
    }

    /// Returns the value of the first source that exists and is not null, and the source.
    fn first<'c>(&self, column: &'c Column, message: &MessageRef<'m>) -> (Value<'m>, Option<&'c Source>) {
        for source in &column.sources {
            let value = match source {
                Source::Time => Value::Time(message.event_us().unwrap_or(message.entry.received_us as i64)),
                Source::Received => Value::Time(message.entry.received_us as i64),
                Source::Topic => Value::Text(message.topic()),
                Source::LastLevel => Value::Text(message.topic().rsplit('/').next().unwrap_or_default()),
                Source::Device => Value::Text(message.device()),
                Source::Payload if column.wants_scalar() && !is_scalar(message.payload()) => Value::Null,
                Source::Payload => Value::Payload(message.payload()),
                Source::Route => Value::Text(message.route()),
                Source::Level(field) => {
                    self.columns.namespace.field(message.topic(), field).map_or(Value::Null, Value::Text)
                }
                Source::Field { key, path, .. } => {
                    let field = self.found.get(*key).copied().flatten();
                    let value = path.iter().fold(field, |value, token| child(value?, token));
                    value.filter(|value| !value.is_null()).map_or(Value::Null, Value::Json)
                }
            };
            if value != Value::Null {
                return (value, Some(source));
            }
        }
        (Value::Null, None)
    }
}

impl Column {
    /// Returns whether `$time` or `$received` is written to this column.
    pub fn holds_time(&self) -> bool {
        self.sources.iter().any(|source| matches!(source, Source::Time | Source::Received))
    }

    /// Returns whether the column holds times, by its sources or its type.
    pub fn is_time(&self) -> bool {
        self.holds_time() || self.kind == Some(Kind::Timestamptz)
    }

    /// Returns whether times become numbers in this column, and the config does not name the unit.
    fn is_time_without_unit(&self) -> bool {
        self.holds_time() && self.unit.is_none() && self.kind == Some(Kind::Bigint)
    }

    /// Converts a time to the column's unit and zone. Other values are returned unchanged.
    fn as_time<'m>(&self, value: Value<'m>) -> Result<Value<'m>, Mismatch> {
        const NOT: Mismatch = Mismatch("a time");
        match (self.kind, self.unit) {
            (Some(Kind::Bigint), Some(unit)) => {
                let us = value.time_in(self.zone_minutes).ok_or(NOT)?;
                unit.of_us(us).map(Value::Epoch).ok_or(NOT)
            }
            (Some(Kind::Timestamptz), _) if self.zone_minutes.is_some() => {
                value.time_in(self.zone_minutes).map(Value::Time).ok_or(NOT)
            }
            _ => Ok(value),
        }
    }

    fn has_field(&self) -> bool {
        self.sources.iter().any(|source| matches!(source, Source::Field { .. }))
    }

    /// Returns whether the column is filled from the payload or one of its fields.
    fn wants_payload(&self) -> bool {
        self.has_field() || self.sources.contains(&Source::Payload)
    }

    /// Returns whether an object or an array is no valid value for this column.
    fn wants_scalar(&self) -> bool {
        matches!(self.kind, Some(Kind::Double | Kind::Bigint | Kind::Bool | Kind::Timestamptz))
    }
}

impl Source {
    fn parse(text: &str, keys: &mut Vec<String>) -> Self {
        match text.strip_prefix('$') {
            Some("time") => Self::Time,
            Some("received") => Self::Received,
            Some("topic") => Self::Topic,
            Some("last_level") => Self::LastLevel,
            Some("device") => Self::Device,
            Some("payload") => Self::Payload,
            Some("route") => Self::Route,
            Some(level) => Self::Level(level.to_owned()),
            None if text.is_empty() => Self::Payload,
            None => {
                // RFC 6901, section 3: ~1 is a slash, ~0 a tilde.
                let mut tokens =
                    text.split('/').skip(1).map(|token| token.replace("~1", "/").replace("~0", "~"));
                let first = tokens.next().unwrap_or_default();
                let key = keys.iter().position(|key| *key == first).unwrap_or_else(|| {
                    keys.push(first);
                    keys.len() - 1
                });
                Self::Field { key, path: tokens.collect(), pointer: text.to_owned() }
            }
        }
    }

    fn name(&self) -> &str {
        match self {
            Self::Time => "the message's time",
            Self::Received => "the time received",
            Self::Topic => "the topic",
            Self::LastLevel => "the topic's last level",
            Self::Device => "the device id",
            Self::Payload => "the payload",
            Self::Route => "the route",
            Self::Level(field) => field,
            Self::Field { pointer, .. } => pointer,
        }
    }
}

fn child<'m>(value: Raw<'m>, token: &str) -> Option<Raw<'m>> {
    value.get(token).or_else(|| value.elements().nth(token.parse().ok()?))
}

fn is_scalar(payload: &[u8]) -> bool {
    payload.iter().find(|byte| !byte.is_ascii_whitespace()).is_some_and(|byte| !b"{[".contains(byte))
}

fn expected(kind: Option<Kind>) -> &'static str {
    match kind {
        Some(Kind::Double) => "a number",
        Some(Kind::Bigint) => "a whole number",
        Some(Kind::Bool) => "true or false",
        Some(Kind::Timestamptz) => "a time",
        Some(Kind::Text) => "text",
        Some(Kind::Jsonb) => "JSON",
        Some(Kind::Bytes) | None => "value",
    }
}

/// Byte order mark of UTF-8, which some editors and programs put in front of a text.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Returns the reason of a rejected row: `column "value": the payload has no number at /value:
/// {"device_id"…`
fn reason(
    column: &Column,
    source: Option<&Source>,
    value: Value<'_>,
    expected: &str,
    broken: Option<json::Error>,
    payload: &[u8],
) -> String {
    let Column { name, called: Called { noun: called, key }, .. } = column;
    let noun = expected.trim_start_matches("a ");
    if matches!(source, None | Some(Source::Payload)) && payload.starts_with(BYTE_ORDER_MARK) {
        let shown = excerpt(payload);
        return format!(
            "{called} \"{name}\": the payload is preceded by a byte order mark, which JSON does not have: {shown}"
        );
    }
    match (source, value) {
        (Some(source), Value::Json(raw)) => {
            format!("{called} \"{name}\": {} is not {expected}: {}", source.name(), excerpt(raw.as_bytes()))
        }
        (Some(source), Value::Text(text)) => {
            format!("{called} \"{name}\": {} is not {expected}: {}", source.name(), excerpt(text.as_bytes()))
        }
        (Some(source), _) => {
            format!("{called} \"{name}\": {} is not {expected}: {}", source.name(), excerpt(payload))
        }
        (None, _) => {
            let shown = excerpt(payload);
            if let Some(error) = broken {
                // As C programs send a string with its end.
                let error = match payload {
                    [.., 0] => "a NUL follows the document".to_owned(),
                    _ => error.to_string(),
                };
                return format!("{called} \"{name}\": the payload is not JSON: {error}: {shown}");
            }
            let first = column.sources.iter().find(|source| **source != Source::Payload);
            let missing = match first {
                Some(Source::Field { pointer, .. }) => match form(payload) {
                    Some(form) => {
                        return format!(
                            "{called} \"{name}\": the payload is {form}, it has no {noun} at {pointer}: {shown}; a \
                             {called} can hold it whole (`$payload`, host/docs/payloads.md)"
                        );
                    }
                    None => format!("the payload has no {noun} at {pointer}: {shown}"),
                },
                Some(Source::Level(field)) => {
                    format!("the topic has no level {field}, it does not match the namespace")
                }
                _ => format!("the payload is not {expected}: {shown}"),
            };
            format!(
                "{called} \"{name}\": {missing}; fill it from another field with `{key}:` (host/docs/payloads.md)"
            )
        }
    }
}

/// Returns the kind of a payload that is not an object.
fn form(payload: &[u8]) -> Option<&'static str> {
    match payload.trim_ascii() {
        [] => Some("empty"),
        [b'[', ..] => Some("an array (one message is one row)"),
        [b'{', ..] => None,
        other => Some(json::parse(other).map_or("not JSON", |_| "a single value")),
    }
}

#[cfg(test)]
mod tests;
