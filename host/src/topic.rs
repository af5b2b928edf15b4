//! MQTT topic names, topic filters and the topic namespace.
//!
//! A topic that fits the namespace pattern (`{org}/{site}/{device_type}/{device_id}/{measurement}`)
//! carries its device in one of its levels; one that does not fit is kept too,
//! and its device is the client that published it.
//! Rules of names and filters: MQTT 5.0, section 4.7.

use std::fmt;

/// MQTT's own bound: lengths are u16.
pub const TOPIC_BYTES_MAX: usize = 65_535;
/// The bound of the plugin contract.
pub const DEVICE_ID_BYTES_MAX: usize = 256;

/// Whether a topic, or all that a filter matches, is the broker's own: no client publishes
/// there. Other topics that begin with `$` are as any, but that a wildcard at the first
/// level does not match them (MQTT 5.0, 4.7.2).
pub fn is_reserved(topic: &str) -> bool {
    topic.starts_with('$') && matches!(topic.split('/').next(), Some("$SYS" | "$share"))
}

/// A topic filter, `acme/+/temperature/#`, checked when made.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TopicFilter(Box<str>);

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    #[error("a topic filter must not be empty")]
    Empty,
    #[error("a topic filter holds at most 65535 bytes")]
    TooLong,
    #[error("a topic filter must not contain a NUL character")]
    Nul,
    #[error("`#` must be a whole level and the last one")]
    MultiLevel,
    #[error("`+` must be a whole level")]
    SingleLevel,
}

impl TopicFilter {
    pub fn new(filter: &str) -> Result<Self, FilterError> {
        if filter.is_empty() {
            return Err(FilterError::Empty);
        }
        if filter.len() > TOPIC_BYTES_MAX {
            return Err(FilterError::TooLong);
        }
        if filter.contains('\0') {
            return Err(FilterError::Nul);
        }
        let mut levels = filter.split('/').peekable();
        while let Some(level) = levels.next() {
            if level.contains('#') && (level != "#" || levels.peek().is_some()) {
                return Err(FilterError::MultiLevel);
            }
            if level.contains('+') && level != "+" {
                return Err(FilterError::SingleLevel);
            }
        }
        Ok(Self(filter.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Wildcards at the first level do not match topics that start with `$`
    /// (MQTT 5.0, 4.7.2).
    pub fn matches(&self, topic: &str) -> bool {
        filter_matches(&self.0, topic)
    }
}

/// As [`TopicFilter::matches`], of a text that was checked.
pub fn filter_matches(filter: &str, topic: &str) -> bool {
    if topic.starts_with('$') && filter.starts_with(['#', '+']) {
        return false;
    }
    let mut filter = filter.split('/');
    let mut levels = topic.split('/');
    loop {
        match (filter.next(), levels.next()) {
            (Some("#"), _) => return true,
            (Some("+"), Some(_)) => {}
            (Some(wanted), Some(level)) if wanted == level => {}
            (None, None) => return true,
            _ => return false,
        }
    }
}

impl fmt::Display for TopicFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether a name may be published to: not empty, no wildcard, no NUL, at most 65,535 bytes.
pub fn is_valid_name(topic: &str) -> bool {
    !topic.is_empty()
        && topic.len() <= TOPIC_BYTES_MAX
        && !topic.bytes().any(|b| matches!(b, b'+' | b'#' | 0))
}

/// The pattern that names a topic's levels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Field name by level.
    fields: Vec<String>,
    device_level: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NamespaceError {
    #[error("level `{0}` must be a field name in braces, such as {{site}}")]
    Level(String),
    #[error("field `{0}` is named twice")]
    Twice(String),
    #[error("one level must be {{device_id}}")]
    NoDevice,
}

impl Namespace {
    pub const DEFAULT_PATTERN: &str = "{org}/{site}/{device_type}/{device_id}/{measurement}";

    pub fn parse(pattern: &str) -> Result<Self, NamespaceError> {
        let mut fields: Vec<String> = Vec::new();
        for level in pattern.split('/') {
            let name = level
                .strip_prefix('{')
                .and_then(|rest| rest.strip_suffix('}'))
                .filter(|name| {
                    !name.is_empty() && name.bytes().all(|b| b == b'_' || b.is_ascii_alphanumeric())
                })
                .ok_or_else(|| NamespaceError::Level(level.to_owned()))?;
            if fields.iter().any(|known| known == name) {
                return Err(NamespaceError::Twice(name.to_owned()));
            }
            fields.push(name.to_owned());
        }
        let device_level =
            fields.iter().position(|name| name == "device_id").ok_or(NamespaceError::NoDevice)?;
        Ok(Self { fields, device_level })
    }

    /// Field names by level, first level first.
    pub fn fields(&self) -> &[String] {
        &self.fields
    }

    /// Byte range of the device id within a topic that fits: as many levels as
    /// the pattern, none empty, the device id at most 256 bytes. `None` otherwise.
    ///
    /// Asked for each message: one pass over the bytes, which is less work than a search for each `/`.
    pub fn device_span(&self, topic: &str) -> Option<std::ops::Range<usize>> {
        let mut device = 0..0;
        let (mut begin, mut level) = (0, 0);
        loop {
            let rest = &topic.as_bytes()[begin..];
            let len = rest.iter().position(|byte| *byte == b'/').unwrap_or(rest.len());
            if len == 0 {
                return None;
            }
            if level == self.device_level {
                device = begin..begin + len;
            }
            level += 1;
            if len == rest.len() {
                let fits = level == self.fields.len() && device.len() <= DEVICE_ID_BYTES_MAX;
                return fits.then_some(device);
            }
            begin += len + 1;
        }
    }

    /// The level that `field` names, when the topic fits.
    pub fn field<'t>(&self, topic: &'t str, field: &str) -> Option<&'t str> {
        self.device_span(topic)?;
        let level = self.fields.iter().position(|name| name == field)?;
        topic.split('/').nth(level)
    }
}

impl Default for Namespace {
    fn default() -> Self {
        Self::parse(Self::DEFAULT_PATTERN).expect("the default pattern is valid")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(text: &str) -> TopicFilter {
        TopicFilter::new(text).unwrap()
    }

    #[test]
    fn wildcards_match_as_mqtt_says() {
        assert!(filter("acme/factory-01/#").matches("acme/factory-01/vibration/motor-7c2d/reading"));
        assert!(filter("acme/factory-01/#").matches("acme/factory-01"));
        assert!(filter("acme/+/+/+/alert").matches("acme/a/b/c/alert"));
        assert!(!filter("acme/+/+/+/alert").matches("acme/a/b/alert"));
        assert!(filter("+/+").matches("/finance"));
        assert!(!filter("+").matches("/finance"));
        assert!(!filter("#").matches("$SYS/broker"));
        assert!(filter("$SYS/#").matches("$SYS/broker"));
    }

    #[test]
    fn filters_that_mqtt_forbids_are_refused() {
        for bad in ["", "a/#/b", "a#", "a/b+", "a\0"] {
            assert!(TopicFilter::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_topic_that_fits_names_its_device() {
        let namespace = Namespace::default();
        let topic = "acme/factory-01/temperature/sensor-4a3b/reading";
        assert_eq!(&topic[namespace.device_span(topic).unwrap()], "sensor-4a3b");
        assert_eq!(namespace.field(topic, "site"), Some("factory-01"));
        for other in ["", "/", "test/hello", "a/b/c/d/e/f", "a/b/c//e", "a/b/c/d/", "/b/c/d/e", "a/b/c/d/e/"]
        {
            assert_eq!(namespace.device_span(other), None, "{other}");
        }
        let of_len = |len| format!("a/b/c/{}/e", "d".repeat(len));
        assert_eq!(namespace.device_span(&of_len(256)), Some(6..262));
        assert_eq!(namespace.device_span(&of_len(257)), None);
        let last = Namespace::parse("{site}/{device_id}").unwrap();
        assert_eq!((last.device_span("a/b"), last.device_span("a/")), (Some(2..3), None));
    }
}
