//! One borrowed value of a message, and its conversion to a database's type.
//!
//! Conversions are strict: a JSON string is not a number, and `21.5` is not a bigint. A value that
//! cannot be converted makes its message a dead letter; it is never guessed.

use std::borrow::Cow;

use headworks_guest::json::{self, Kind as JsonKind, Raw};
use headworks_guest::time;

use crate::telemetry::is_printable;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'m> {
    Null,
    /// Time in microseconds since 1970, UTC.
    Time(i64),
    /// Time in the unit of its column.
    Epoch(i64),
    Text(&'m str),
    Json(Raw<'m>),
    /// The whole payload: JSON, text or neither.
    Payload(&'m [u8]),
}

impl<'m> Value<'m> {
    fn json(&self) -> Option<Raw<'m>> {
        match *self {
            Self::Json(raw) => Some(raw),
            Self::Payload(bytes) => json::parse(bytes).ok(),
            _ => None,
        }
    }

    /// Returns whether the value is a JSON number.
    pub fn is_number(&self) -> bool {
        self.json().is_some_and(|raw| raw.kind() == JsonKind::Number)
    }

    /// Returns a finite number.
    pub fn f64(&self) -> Option<f64> {
        self.json()?.as_f64().filter(|number| number.is_finite())
    }

    /// Returns a number without a fraction. A time is returned in microseconds since 1970, or in its
    /// column's unit.
    pub fn i64(&self) -> Option<i64> {
        if let Self::Time(number) | Self::Epoch(number) = *self {
            return Some(number);
        }
        let raw = self.json()?;
        raw.as_i64().or_else(|| {
            // 21.0 and 2e3 are whole, exactly so below 2^53.
            let number = raw.as_f64()?;
            (number.fract() == 0.0 && number.abs() < 9_007_199_254_740_992.0).then_some(number as i64)
        })
    }

    pub fn bool(&self) -> Option<bool> {
        self.json()?.as_bool()
    }

    /// Returns a time in microseconds since 1970, UTC, from text, or from a number of seconds,
    /// milliseconds, microseconds or nanoseconds, which are distinguished by size. Plugins parse times
    /// with the same function.
    pub fn time_us(&self) -> Option<i64> {
        self.time_in(None)
    }

    /// Returns a time as [`Value::time_us`] does. Text without an offset is in this zone.
    pub fn time_in(&self, zone_minutes: Option<i32>) -> Option<i64> {
        match *self {
            Self::Time(us) => Some(us),
            Self::Text(text) => time::parse(text.as_bytes(), zone_minutes),
            _ => {
                let raw = self.json()?;
                match raw.as_str() {
                    Some(text) => time::parse(text.as_bytes(), zone_minutes),
                    None if raw.kind() == JsonKind::Number => time::parse_number(raw.as_bytes()),
                    None => None,
                }
            }
        }
    }

    /// Returns a date as days since 1970: the date in a text or in digits (`20260301`), otherwise the
    /// day of a time in UTC.
    pub fn day(&self) -> Option<i64> {
        let written = match *self {
            Self::Text(text) => time::parse_day(text.as_bytes()),
            Self::Null | Self::Time(_) | Self::Epoch(_) => None,
            Self::Json(_) | Self::Payload(_) => {
                let raw = self.json()?;
                match raw.as_str() {
                    Some(text) => time::parse_day(text.as_bytes()),
                    None => time::parse_day(raw.as_bytes()),
                }
            }
        };
        written.or_else(|| Some(self.time_us()?.div_euclid(DAY_US)))
    }

    /// Returns text. A value that is not a JSON string is returned as it is in the payload.
    pub fn text(&self) -> Option<Cow<'m, str>> {
        match *self {
            Self::Null => None,
            Self::Time(us) => {
                let mut text = String::with_capacity(TIME_BYTES);
                write_time(us, &mut text)?;
                Some(Cow::Owned(text))
            }
            Self::Epoch(number) => Some(Cow::Owned(number.to_string())),
            Self::Text(text) => Some(Cow::Borrowed(text)),
            Self::Json(raw) => match raw.kind() {
                JsonKind::String => raw.as_str(),
                _ => std::str::from_utf8(raw.as_bytes()).ok().map(Cow::Borrowed),
            },
            Self::Payload(bytes) => std::str::from_utf8(bytes).ok().map(Cow::Borrowed),
        }
    }

    /// Returns one JSON value.
    pub fn json_text(&self) -> Option<Cow<'m, str>> {
        if let Some(raw) = self.json() {
            return std::str::from_utf8(raw.as_bytes()).ok().map(Cow::Borrowed);
        }
        match self {
            Self::Payload(_) => None,
            other => serde_json::to_string(&other.text()?).ok().map(Cow::Owned),
        }
    }

    pub fn bytes(&self) -> Option<Cow<'m, [u8]>> {
        match *self {
            Self::Payload(bytes) => Some(Cow::Borrowed(bytes)),
            _ => self.text().map(|text| match text {
                Cow::Borrowed(text) => Cow::Borrowed(text.as_bytes()),
                Cow::Owned(text) => Cow::Owned(text.into_bytes()),
            }),
        }
    }
}

const DAY_US: i64 = 86_400_000_000;

/// Length of `2026-02-23 10:00:00.123456Z`.
pub const TIME_BYTES: usize = 27;

/// Appends a time in the format of RFC 3339 with a space (section 5.6), always with six digits of
/// fraction, so that it can be sorted as text, and read and compared by SQLite's own functions. Returns
/// `None` outside the years 0 to 9999.
pub fn write_time(us: i64, out: &mut String) -> Option<()> {
    const DAY_US: i64 = 86_400_000_000;
    let (days, in_day) = (us.div_euclid(DAY_US), us.rem_euclid(DAY_US));
    // Days to a date: H. Hinnant, "chrono-compatible low-level date algorithms", civil_from_days.
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    if !(0..=9_999).contains(&year) {
        return None;
    }
    let digits = |out: &mut String, mut number: i64, width: usize| {
        let mut text = [b'0'; 6];
        for digit in text[..width].iter_mut().rev() {
            *digit = b'0' + (number % 10) as u8;
            number /= 10;
        }
        out.push_str(std::str::from_utf8(&text[..width]).unwrap_or_default());
    };
    for (number, width, after) in [
        (year, 4, '-'),
        (month, 2, '-'),
        (day, 2, ' '),
        (in_day / 3_600_000_000, 2, ':'),
        (in_day / 60_000_000 % 60, 2, ':'),
        (in_day / 1_000_000 % 60, 2, '.'),
        (in_day % 1_000_000, 6, 'Z'),
    ] {
        digits(out, number, width);
        out.push(after);
    }
    Some(())
}

/// Returns the first characters of some bytes, for an error message.
pub fn excerpt(bytes: &[u8]) -> String {
    const SHOWN_BYTES: usize = 80;
    let mut shown = String::new();
    for c in String::from_utf8_lossy(&bytes[..bytes.len().min(SHOWN_BYTES)]).chars() {
        if is_printable(c) {
            shown.push(c);
        } else {
            shown.extend(c.escape_default());
        }
    }
    if bytes.len() > SHOWN_BYTES {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(payload: &str) -> Value<'_> {
        Value::Payload(payload.as_bytes())
    }

    #[test]
    fn conversions_do_not_guess() {
        assert_eq!(of(" 21.5 ").f64(), Some(21.5));
        assert_eq!(of("\"21.5\"").f64(), None);
        assert_eq!(of("1e999").f64(), None);
        assert_eq!(of("NaN").f64(), None);
        assert_eq!(of("21.0").i64(), Some(21));
        assert_eq!(of("21.5").i64(), None);
        assert_eq!(of("9223372036854775807").i64(), Some(i64::MAX));
        assert_eq!(of("true").bool(), Some(true));
        assert_eq!(of("1").bool(), None);
        assert_eq!(Value::Text("a\"b").json_text().as_deref(), Some("\"a\\\"b\""));
        assert_eq!(of("ping").json_text(), None);
    }

    #[test]
    fn times_are_told_by_their_size() {
        let expected = Some(1_771_840_800_000_000);
        for text in [
            "1771840800",
            "1771840800000",
            "1771840800000000",
            "1771840800000000000",
            "1771840800.0",
            "\"2026-02-23T10:00:00Z\"",
            "\"2026-02-23T12:00:00+02:00\"",
            "\"2026-02-23 12:00:00+0200\"",
            "\"20260223T120000+02\"",
            "\"1771840800\"",
        ] {
            assert_eq!(of(text).time_us(), expected, "{text}");
        }
        assert_eq!(of("\"yesterday\"").time_us(), None);
        assert_eq!(of("true").time_us(), None);
        assert_eq!(of("\"2026-02-23T12:00:00\"").time_us(), None);
        assert_eq!(of("\"2026-02-23T12:00:00\"").time_in(Some(120)), expected);
    }

    #[test]
    fn times_print_as_a_calendar_library_prints_them() {
        for us in [0, -1, 1_771_840_800_123_456, 951_826_271_000_001, -62_167_219_200_000_000] {
            let mut text = String::new();
            write_time(us, &mut text).expect("a year of four digits");
            let expected = jiff::Timestamp::from_microsecond(us).unwrap();
            assert_eq!(text, expected.strftime("%Y-%m-%d %H:%M:%S.%6fZ").to_string());
            assert_eq!(text.len(), TIME_BYTES);
        }
        assert_eq!(write_time(i64::MAX, &mut String::new()), None);
    }

    #[test]
    fn an_excerpt_has_no_control_characters_and_an_end() {
        assert_eq!(excerpt(b"a\nb"), "a\\nb");
        assert_eq!(excerpt("\u{feff}{".as_bytes()), "\\u{feff}{");
        assert!(excerpt(&[b'x'; 200]).len() < 90);
    }
}
