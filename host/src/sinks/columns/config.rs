//! `columns:` of a sink: which column gets which part of a message.
//!
//! ```yaml
//! columns:
//!   time: $time                     # the device's time, else when it was received
//!   device_id: $device
//!   line: $site                     # a level of the topic, by its name in `topics:`
//!   temp: /reading/temp             # a JSON pointer (RFC 6901) into the payload
//!   unit: [/unit, /meta/unit]       # the first that is there
//!   raw: { from: $payload, type: jsonb, required: true }
//! ```

use std::{borrow::Cow, fmt};

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use headworks_guest::time;

use crate::problems::{KeyPath, Problems};
use crate::topic::Namespace;

/// Most columns of one table.
pub const COLUMNS_MAX: usize = 256;
/// PostgreSQL cuts longer names off.
pub const NAME_BYTES_MAX: usize = 63;
const WORDS: [&str; 7] = ["time", "received", "topic", "last_level", "device", "payload", "route"];

/// Columns in the order in which they are written.
#[derive(Clone, Debug, PartialEq)]
pub struct ColumnsConfig(pub Vec<(String, ColumnConfig)>);

/// Source of a column's value: `$time` (the time that the device sent, otherwise the time of receipt),
/// `$received`, `$topic`, `$last_level` (of the topic), `$device`, `$payload`, `$route`, `$` and the
/// name of a level in `topics:`, or a JSON pointer such as `/value`.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum ColumnConfig {
    /// `$device`, `/value`
    Source(String),
    /// Several sources. The first whose value exists and is not null is used.
    Sources(Vec<String>),
    /// One or several sources, with further options.
    Full(FullColumn),
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FullColumn {
    /// One source, or several, of which the first whose value exists and is not null is used.
    pub from: OneOrMany,
    /// Type of the column, needed if Headworks creates the table. An existing table has its own types.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<Kind>,
    /// A message without this value becomes a dead letter (NOT NULL).
    #[serde(default)]
    pub required: bool,
    /// Unit, since 1970, in which a time is written to this `bigint` column. If unset, `$time` and
    /// `$received` are written in microseconds, and numbers of the payload are written unchanged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<Unit>,
    /// Time zone of times that name none: `UTC`, `+02:00`. If unset, a message with such a time becomes
    /// a dead letter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
}

/// Unit of a time that is written as a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Unit {
    S,
    Ms,
    Us,
    Ns,
}

impl Unit {
    /// Converts microseconds since 1970 to this unit. Returns `None` if the result is out of range.
    pub fn of_us(self, us: i64) -> Option<i64> {
        match self {
            Self::S => Some(us.div_euclid(1_000_000)),
            Self::Ms => Some(us.div_euclid(1_000)),
            Self::Us => Some(us),
            Self::Ns => us.checked_mul(1_000),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// What a column holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Timestamptz,
    Text,
    Double,
    Bigint,
    Bool,
    Jsonb,
    Bytes,
}

impl ColumnConfig {
    pub fn sources(&self) -> &[String] {
        match self {
            Self::Source(one) | Self::Full(FullColumn { from: OneOrMany::One(one), .. }) => {
                std::slice::from_ref(one)
            }
            Self::Sources(many) | Self::Full(FullColumn { from: OneOrMany::Many(many), .. }) => many,
        }
    }

    /// Returns the configured type, otherwise the type of the first source.
    pub fn kind(&self) -> Option<Kind> {
        if let Self::Full(FullColumn { kind: Some(kind), .. }) = self {
            return Some(*kind);
        }
        match self.sources().first().and_then(|source| source.strip_prefix('$')) {
            Some("time" | "received") => Some(Kind::Timestamptz),
            Some("payload") => Some(Kind::Bytes),
            Some(_) => Some(Kind::Text),
            None => None,
        }
    }

    pub fn unit(&self) -> Option<Unit> {
        if let Self::Full(full) = self { full.unit } else { None }
    }

    pub fn zone(&self) -> Option<&str> {
        if let Self::Full(full) = self { full.zone.as_deref() } else { None }
    }

    pub fn required(&self) -> bool {
        matches!(self, Self::Full(FullColumn { required: true, .. }))
    }
}

impl Default for ColumnsConfig {
    /// The table `telemetry` of the reference pipeline.
    fn default() -> Self {
        let column = |name: &str, from: &[&str], kind, required| {
            let from = OneOrMany::Many(from.iter().map(|&source| source.to_owned()).collect());
            (
                name.to_owned(),
                ColumnConfig::Full(FullColumn { from, kind: Some(kind), required, unit: None, zone: None }),
            )
        };
        Self(vec![
            column("time", &["$time"], Kind::Timestamptz, true),
            column("device_id", &["$device"], Kind::Text, true),
            column("location", &["/location"], Kind::Text, false),
            column("metric", &["/metric", "$last_level"], Kind::Text, true),
            column("value", &["/value", "$payload"], Kind::Double, true),
        ])
    }
}

impl ColumnsConfig {
    pub fn validate(&self, path: &KeyPath, problems: &mut Problems) {
        if self.0.is_empty() || self.0.len() > COLUMNS_MAX {
            problems
                .add(path.clone(), format!("must name 1 to {COLUMNS_MAX} columns, names {}", self.0.len()));
        }
        for (name, column) in &self.0 {
            let path = path.key(name);
            if !is_name(name) {
                problems.add(
                    path.clone(),
                    format!("a column's name must have 1 to {NAME_BYTES_MAX} bytes and no NUL"),
                );
            }
            if column.zone().is_some_and(|zone| time::parse_zone(zone.as_bytes()).is_none()) {
                problems.add(
                    path.key("zone"),
                    "must be UTC or an offset such as +02:00; zones with summer time are not known",
                );
            }
            if column.unit().is_some()
                && column.kind().is_some_and(|kind| kind != Kind::Bigint)
                && matches!(column, ColumnConfig::Full(FullColumn { kind: Some(_), .. }))
            {
                problems.add(path.key("unit"), "is for a column of type bigint");
            }
            if column.sources().is_empty() {
                problems.add(path.clone(), "must have a source, such as $device or /value");
            }
            for source in column.sources() {
                let is_pointer = source.starts_with('/') || source.is_empty();
                if !is_pointer && source.strip_prefix('$').is_none_or(str::is_empty) {
                    problems.add(
                        path.clone(),
                        format!(
                            "must be a JSON pointer such as /value, or one of {}, is \"{source}\"",
                            words(None)
                        ),
                    );
                }
            }
        }
    }

    /// Validates the sources that name a level of the topic.
    pub fn validate_namespace(&self, namespace: &Namespace, path: &KeyPath, problems: &mut Problems) {
        for (name, column) in &self.0 {
            for source in column.sources() {
                let Some(word) = source.strip_prefix('$') else { continue };
                if !WORDS.contains(&word) && !namespace.fields().iter().any(|field| field == word) {
                    problems.add(
                        path.key(name),
                        format!("must be one of {}, is \"{source}\"", words(Some(namespace))),
                    );
                }
            }
        }
    }
}

pub(crate) fn is_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= NAME_BYTES_MAX && !name.contains('\0')
}

fn words(namespace: Option<&Namespace>) -> String {
    let fields = namespace.map_or(&[][..], Namespace::fields).iter().map(String::as_str);
    let all: Vec<String> = WORDS.into_iter().chain(fields).map(|word| format!("${word}")).collect();
    all.join(", ")
}

// A map in a config, but its order counts: written by hand.
impl<'de> Deserialize<'de> for ColumnsConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = ColumnsConfig;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("columns, such as `device_id: $device`")
            }
            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut columns: Vec<(String, ColumnConfig)> = Vec::new();
                while let Some((name, column)) = map.next_entry::<String, ColumnConfig>()? {
                    if columns.iter().any(|(known, _)| *known == name) {
                        return Err(de::Error::custom(format!("column `{name}` is named twice")));
                    }
                    columns.push((name, column));
                }
                Ok(ColumnsConfig(columns))
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}

impl Serialize for ColumnsConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, column)| (name, column)))
    }
}

impl JsonSchema for ColumnsConfig {
    fn schema_name() -> Cow<'static, str> {
        "Columns".into()
    }
    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        std::collections::BTreeMap::<String, ColumnConfig>::json_schema(generator)
    }
}
