//! Sizes and times as people write them in a config: `20GiB`, `7d`, `300ms`.

use std::{borrow::Cow, fmt, str::FromStr, time::Duration};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A number of bytes; in a config a number, or text such as `64KiB`, `20GiB`, `1GB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// A length of time; in a config text such as `300ms`, `5s`, `1h 30m`, `7d`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Period(pub Duration);

/// 100 years: a moment plus a time always is a moment.
const PERIOD_MAX: Duration = Duration::from_secs(36_525 * DAY_S);
const DAY_S: u64 = 86_400;

impl ByteSize {
    pub const fn kib(n: u64) -> Self {
        Self(n << 10)
    }
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }
    pub const fn gib(n: u64) -> Self {
        Self(n << 30)
    }
}

impl FromStr for ByteSize {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        text.parse::<bytesize::ByteSize>()
            .map(|size| Self(size.as_u64()))
            .map_err(|_| format!("must be a size such as 64KiB or 20GiB, is \"{text}\""))
    }
}

impl FromStr for Period {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let time = humantime::parse_duration(text)
            .map_err(|_| format!("must be a time such as 300ms, 5s or 7d, is \"{text}\""))?;
        if time > PERIOD_MAX {
            return Err(format!("must be at most {}, is \"{text}\"", Self(PERIOD_MAX)));
        }
        Ok(Self(time))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", bytesize::ByteSize(self.0).display().iec())
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Days, not humantime's months of 30.44 of them.
        let (days, rest) = (self.0.as_secs() / DAY_S, self.0.as_secs() % DAY_S);
        let rest = Duration::new(rest, self.0.subsec_nanos());
        match (days, rest.is_zero()) {
            (0, _) => write!(f, "{}", humantime::format_duration(rest)),
            (_, true) => write!(f, "{days}d"),
            (_, false) => write!(f, "{days}d {}", humantime::format_duration(rest)),
        }
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Raw {
            Number(u64),
            Text(String),
        }
        match Raw::deserialize(deserializer)
            .map_err(|_| de::Error::custom("must be a size such as 64KiB or 20GiB"))?
        {
            Raw::Number(bytes) => Ok(Self(bytes)),
            Raw::Text(text) => text.parse().map_err(de::Error::custom),
        }
    }
}

impl<'de> Deserialize<'de> for Period {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)
            .map_err(|_| de::Error::custom("must be a time such as 300ms, 5s or 7d"))?
            .parse()
            .map_err(de::Error::custom)
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for Period {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl JsonSchema for ByteSize {
    fn schema_name() -> Cow<'static, str> {
        "ByteSize".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": ["string", "integer"], "minimum": 0,
            "description": "A number of bytes, or a size such as 64KiB or 20GiB." })
    }
}

impl JsonSchema for Period {
    fn schema_name() -> Cow<'static, str> {
        "Period".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "description": "A time such as 300ms, 5s or 7d." })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_shown_as_it_was_written() {
        for text in ["0s", "300ms", "5s", "1h 30m", "7d", "365d", "36525d", "1d 12h", "1d 1ms"] {
            assert_eq!(text.parse::<Period>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn a_time_past_all_clocks_is_refused() {
        assert_eq!(
            "500000000000years".parse::<Period>().unwrap_err(),
            "must be at most 36525d, is \"500000000000years\""
        );
        for wrong in ["", "5", "-1s", "99999999999999999999d", "1 fortnight"] {
            assert!(wrong.parse::<Period>().is_err(), "{wrong}");
        }
    }
}
