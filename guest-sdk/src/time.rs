//! Timestamps as devices send them, and RFC 3339 in UTC.
//!
//! Calendar arithmetic after Howard Hinnant, "chrono-Compatible Low-Level Date
//! Algorithms" (days_from_civil, civil_from_days).

use alloc::vec::Vec;

const DAY_US: i64 = 86_400_000_000;

/// Microseconds since 1970 of a number in seconds, milliseconds, microseconds
/// or nanoseconds, told apart by magnitude: below 10^11 seconds (the year
/// 5138), below 10^14 milliseconds, below 10^17 microseconds, else nanoseconds.
/// `number` is a decimal, `1718000000.25`; an exponent is read too, with the
/// precision of f64. Digits below a microsecond are cut. Digits that read as a
/// calendar date, `20260301` or `20260301120000`, are no such number.
pub fn parse_number(number: &[u8]) -> Option<i64> {
    let (negative, digits) = match number {
        [b'-', rest @ ..] => (true, rest),
        rest => (false, rest),
    };
    let point = digits.iter().position(|&b| b == b'.').unwrap_or(digits.len());
    let (whole, fraction) = (&digits[..point], digits.get(point + 1..).unwrap_or_default());
    if whole.is_empty() || (point < digits.len() && fraction.is_empty()) {
        return None;
    }
    if whole.len() == number.len() && is_calendar(whole) {
        return None;
    }
    let Some(magnitude) = decimal(whole).filter(|_| fraction.iter().all(u8::is_ascii_digit)) else {
        let text = core::str::from_utf8(number).ok()?;
        return if is_decimal(number) { from_f64(text.parse().ok()?) } else { None };
    };
    // `places`: how many digits behind the point are whole microseconds.
    let (scale, divisor, places) = match magnitude {
        0..100_000_000_000 => (1_000_000, 1, 6),
        100_000_000_000..100_000_000_000_000 => (1_000, 1, 3),
        100_000_000_000_000..100_000_000_000_000_000 => (1, 1, 0),
        _ => (1, 1_000, 0),
    };
    let mut part = 0;
    for i in 0..places {
        part = part * 10 + i64::from(fraction.get(i).map_or(0, |digit| digit - b'0'));
    }
    let us = (magnitude / divisor).checked_mul(scale)?.checked_add(part)?;
    Some(if negative { -us } else { us })
}

/// Whether a date of the years 1900 to 2199, with or without the time of day, is written without separators:
/// `20260301`, `202603011200`, `20260301120000`, `20260301120000123`, and `260301120000` of the years 2020 to
/// 2049. As a number each would be a time that no device means.
fn is_calendar(digits: &[u8]) -> bool {
    let is_full = |digits: &[u8]| {
        let clock = parse_date(digits).map(|(_, rest)| rest);
        let is_clock = |clock: &[u8]| clock.is_empty() || parse_clock(clock).is_some();
        matches!(digits, [b'1', b'9', ..] | [b'2', b'0' | b'1', ..]) && clock.is_some_and(is_clock)
    };
    match digits.len() {
        8 | 14 | 17 => is_full(digits),
        12 => {
            let mut full = *b"20000000000000";
            full[2..].copy_from_slice(digits);
            is_full(digits) || matches!(digits[0], b'2'..=b'4') && is_full(&full)
        }
        _ => false,
    }
}

fn decimal(digits: &[u8]) -> Option<i64> {
    let mut value: i64 = 0;
    for &digit in digits {
        if !digit.is_ascii_digit() {
            return None;
        }
        value = value.checked_mul(10)?.checked_add(i64::from(digit - b'0'))?;
    }
    Some(value)
}

/// Not `inf` or `nan`, which Rust would read.
fn is_decimal(number: &[u8]) -> bool {
    number.iter().all(|b| matches!(b, b'0'..=b'9' | b'.' | b'-' | b'+' | b'e' | b'E'))
}

fn from_f64(value: f64) -> Option<i64> {
    let us = match value.abs() {
        x if x < 1e11 => value * 1e6,
        x if x < 1e14 => value * 1e3,
        x if x < 1e17 => value,
        _ => value / 1e3,
    };
    (us.abs() < 9.2e18).then_some(us as i64)
}

/// Microseconds since 1970 of a timestamp as text: as [`parse_text`] reads it,
/// or a number as [`parse_number`] reads it. Blanks around it do not count.
pub fn parse(text: &[u8], zone_minutes: Option<i32>) -> Option<i64> {
    let text = text.trim_ascii();
    parse_text(text, zone_minutes).or_else(|| parse_number(text))
}

/// As [`parse_text`], where the offset must be there.
pub fn parse_rfc3339(text: &[u8]) -> Option<i64> {
    parse_text(text, None)
}

/// Microseconds since 1970 of an RFC 3339 or ISO 8601 timestamp. `T`, `t` or a
/// space stands between date and time; both may be in the basic format
/// (`20240610T061320Z`); seconds and their fraction (`.` or `,`) may be left
/// out. The offset is `Z`, `z`, `+hh:mm`, `+hhmm` or `+hh`, after a space or
/// not, and a zone in brackets behind it is skipped (RFC 9557); where it is
/// missing, `zone_minutes` counts, and without that there is no time. A leap
/// second counts as the second after it. Digits below a microsecond are cut.
pub fn parse_text(text: &[u8], zone_minutes: Option<i32>) -> Option<i64> {
    let (days, rest) = parse_date(text)?;
    let (time_us, rest) = parse_clock(rest.split_first().filter(|(b, _)| b"Tt ".contains(b))?.1)?;
    let zone = match rest {
        [] => zone_minutes?,
        [b' ', zone @ ..] | zone => parse_zone(without_brackets(zone)?)?,
    };
    Some(days * DAY_US + time_us - i64::from(zone) * 60_000_000)
}

/// Days since 1970 of the date in a text, as it stands: of `2026-03-01`, `20260301`, or a timestamp as
/// [`parse_text`] reads it, with or without an offset, which does not count. Blanks around it do not either.
pub fn parse_day(text: &[u8]) -> Option<i64> {
    let text = text.trim_ascii();
    let (days, rest) = parse_date(text)?;
    (rest.is_empty() || parse_text(text, Some(0)).is_some()).then_some(days)
}

/// Minutes east of UTC of `Z`, `UTC`, `+hh:mm`, `+hhmm`, `+hh`.
pub fn parse_zone(zone: &[u8]) -> Option<i32> {
    let (sign, digits) = match zone {
        b"Z" | b"z" | b"UTC" => return Some(0),
        [b'+', digits @ ..] => (1, digits),
        [b'-', digits @ ..] => (-1, digits),
        _ => return None,
    };
    let (hours, minutes) = match digits {
        [h1, h2] => ([*h1, *h2], [b'0', b'0']),
        [h1, h2, m1, m2] | [h1, h2, b':', m1, m2] => ([*h1, *h2], [*m1, *m2]),
        _ => return None,
    };
    let (hours, minutes) = (decimal(&hours)?, decimal(&minutes)?);
    (hours <= 23 && minutes <= 59).then_some(sign * (hours * 60 + minutes) as i32)
}

/// `+02:00[Europe/Berlin]`: the offset counts.
fn without_brackets(zone: &[u8]) -> Option<&[u8]> {
    match zone.iter().position(|b| *b == b'[') {
        Some(at) => zone.ends_with(b"]").then_some(&zone[..at]),
        None => Some(zone),
    }
}

/// Days since 1970, and what follows the date.
fn parse_date(text: &[u8]) -> Option<(i64, &[u8])> {
    let (year, rest) = digits(text, 4)?;
    let (dash, rest) = separator(rest, b'-');
    let (month, rest) = digits(rest, 2)?;
    let rest = if dash { rest.strip_prefix(b"-")? } else { rest };
    let (day, rest) = digits(rest, 2)?;
    let valid = (1..=12).contains(&month) && day >= 1 && day <= days_in_month(year, month);
    valid.then(|| (days_from_civil(year, month, day), rest))
}

/// Microseconds since midnight, and what follows the time of day.
fn parse_clock(text: &[u8]) -> Option<(i64, &[u8])> {
    let (hour, rest) = digits(text, 2)?;
    let (colon, rest) = separator(rest, b':');
    let (minute, mut rest) = digits(rest, 2)?;
    let (mut second, mut part) = (0, 0);
    let seconds = if colon { rest.strip_prefix(b":") } else { Some(rest) };
    if let Some((found, after)) = seconds.and_then(|seconds| digits(seconds, 2)) {
        (second, rest) = (found, after);
        if let [b'.' | b',', after @ ..] = rest {
            let count = after.iter().take_while(|b| b.is_ascii_digit()).count();
            if count == 0 {
                return None;
            }
            for place in 0..6 {
                part = part * 10 + after[..count].get(place).map_or(0, |digit| i64::from(digit - b'0'));
            }
            rest = &after[count..];
        }
    }
    let valid = hour <= 23 && minute <= 59 && second <= 60;
    valid.then_some((((hour * 60 + minute) * 60 + second) * 1_000_000 + part, rest))
}

fn digits(text: &[u8], count: usize) -> Option<(i64, &[u8])> {
    let (digits, rest) = text.split_at_checked(count)?;
    Some((decimal(digits)?, rest))
}

/// Whether it begins with the separator of the extended format.
fn separator(text: &[u8], separator: u8) -> (bool, &[u8]) {
    match text {
        [first, rest @ ..] if *first == separator => (true, rest),
        _ => (false, text),
    }
}

/// `2024-06-10T06:13:20.123Z`: milliseconds, or microseconds where there are
/// some. Years 0 to 9999; outside of them nothing is written.
pub fn write_rfc3339(out: &mut Vec<u8>, us: i64) {
    let (days, rest) = (us.div_euclid(DAY_US), us.rem_euclid(DAY_US));
    let (year, month, day) = civil_from_days(days);
    if !(0..=9999).contains(&year) {
        return;
    }
    let seconds = (rest / 1_000_000) as u32;
    let part = (rest % 1_000_000) as u32;
    let mut text = *b"0000-00-00T00:00:00.000000Z";
    put(&mut text[0..4], year as u32);
    put(&mut text[5..7], month as u32);
    put(&mut text[8..10], day as u32);
    put(&mut text[11..13], seconds / 3_600);
    put(&mut text[14..16], seconds / 60 % 60);
    put(&mut text[17..19], seconds % 60);
    put(&mut text[20..26], part);
    if part.is_multiple_of(1_000) {
        text[23] = b'Z';
        out.extend_from_slice(&text[..24]);
    } else {
        out.extend_from_slice(&text);
    }
}

#[inline(always)]
fn put(digits: &mut [u8], mut value: u32) {
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (value % 10) as u8;
        value /= 10;
    }
}

fn days_in_month(year: i64, month: i64) -> i64 {
    match month {
        2 if year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year - era * 400;
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days - era * 146_097;
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use alloc::string::String;
    use proptest::prelude::*;

    use super::*;

    fn rfc3339(us: i64) -> String {
        let mut out = Vec::new();
        write_rfc3339(&mut out, us);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_number_is_told_by_its_magnitude() {
        for (number, us) in [
            ("1718000000", 1_718_000_000_000_000),
            ("1718000000.25", 1_718_000_000_250_000),
            ("1718000000.1234567", 1_718_000_000_123_456),
            ("1718000000123", 1_718_000_000_123_000),
            ("1718000000123.5", 1_718_000_000_123_500),
            ("1718000000123456", 1_718_000_000_123_456),
            ("1718000000123456789", 1_718_000_000_123_456),
            ("1.718e9", 1_718_000_000_000_000),
            ("0", 0),
            ("-1.5", -1_500_000),
        ] {
            assert_eq!(parse_number(number.as_bytes()), Some(us), "{number}");
        }
        for number in ["", "-", "x", "1.", ".5", "1718000000Z", "inf", "nan", "1e300", "1 2", "١"] {
            assert_eq!(parse_number(number.as_bytes()), None, "{number}");
        }
    }

    #[test]
    fn a_date_without_separators_is_no_number() {
        for date in [
            "20260301",
            "19991231",
            "202603011200",
            "260301120000",
            "20260301120000",
            "20260301235959",
            "20260301120000123",
        ] {
            assert_eq!(parse(date.as_bytes(), Some(0)), None, "{date}");
        }
        for (number, us) in [
            ("20261301", 20_261_301_000_000),
            ("20260230", 20_260_230_000_000),
            ("20260301.5", 20_260_301_500_000),
            ("-20260301", -20_260_301_000_000),
            ("18000101", 18_000_101_000_000),
            ("950101120000", 950_101_120_000_000),
            ("2603011200", 2_603_011_200_000_000),
            ("20260301250000", 20_260_301_250_000_000),
        ] {
            assert_eq!(parse(number.as_bytes(), None), Some(us), "{number}");
        }
    }

    #[test]
    fn the_day_of_a_text_is_the_one_that_it_says() {
        for text in [
            "2026-03-01",
            "20260301",
            " 2026-03-01 ",
            "2026-03-01T00:30:00+02:00",
            "2026-03-01 23:59:59.9-05:00",
            "2026-03-01T12:00",
            "20260301T120000Z",
        ] {
            assert_eq!(parse_day(text.as_bytes()), Some(20_513), "{text}");
        }
        for text in
            ["", "2026-02-29", "2026-03-01T25:00", "2026-03-01x", "260301", "1772323200", "202603011200"]
        {
            assert_eq!(parse_day(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn rfc3339_is_read_as_its_section_5_6_allows() {
        let us = 1_718_000_000_123_000;
        for text in [
            "2024-06-10T06:13:20.123Z",
            "2024-06-10t06:13:20.123z",
            "2024-06-10 06:13:20.123Z",
            "2024-06-10T08:13:20.123+02:00",
            "2024-06-10T00:43:20.1230000999-05:30",
            "2024-06-10T08:13:20.123+0200",
            "2024-06-10 08:13:20.123+02",
            "2024-06-10 08:13:20,123 +02:00",
            "20240610T061320.123Z",
            "20240610T081320,123+02",
            "2024-06-10T08:13:20.123+02:00[Europe/Berlin]",
        ] {
            assert_eq!(parse_rfc3339(text.as_bytes()), Some(us), "{text}");
        }
        assert_eq!(parse_rfc3339(b"2016-12-31T23:59:60Z"), parse_rfc3339(b"2017-01-01T00:00:00Z"));
        for text in [
            "2024-06-10",
            "2024-06-10T06:13:20",
            "2024-13-10T06:13:20Z",
            "2023-02-29T00:00:00Z",
            "2024-06-10T24:00:00Z",
            "2024-06-10T06:13:20.Z",
            "2024-06-10T06:13:20+02000",
            "2024-06-10T06:13:20+2",
            "2024-06-10T06:13:20+02:00[Europe",
            "2024-0610T06:13:20Z",
            "2024-06-10T0613:20Z",
            "20240610",
            "24-06-10T06:13:20Z",
            "2024-06-10T06:13:20Zx",
            "2024-06-1xT06:13:20Z",
            "",
        ] {
            assert_eq!(parse_rfc3339(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn a_time_without_an_offset_is_of_the_zone_that_is_given() {
        for (text, zone) in [
            ("2024-06-10T08:13:20", "+02:00"),
            ("2024-06-10 08:13:20", "+0200"),
            ("20240610T011320", "-05"),
            ("2024-06-10T06:13:20", "UTC"),
            ("2024-06-10T06:13:20Z", "+02:00"),
            (" 1718000000 ", "+02:00"),
        ] {
            let minutes = parse_zone(zone.as_bytes());
            assert_eq!(parse(text.as_bytes(), minutes), Some(1_718_000_000_000_000), "{text} {zone}");
        }
        assert_eq!(parse(b"2024-06-10T06:13", Some(0)), Some(1_717_999_980_000_000));
        for zone in ["", "Europe/Berlin", "+24:00", "+02:60", "02:00", "+2"] {
            assert_eq!(parse_zone(zone.as_bytes()), None, "{zone}");
        }
    }

    #[test]
    fn utc_has_milliseconds_or_as_many_digits_as_needed() {
        assert_eq!(rfc3339(1_718_000_000_000_000), "2024-06-10T06:13:20.000Z");
        assert_eq!(rfc3339(1_718_000_000_123_456), "2024-06-10T06:13:20.123456Z");
        assert_eq!(rfc3339(-1), "1969-12-31T23:59:59.999999Z");
        assert_eq!(rfc3339(951_782_400_000_000), "2000-02-29T00:00:00.000Z");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(us in -62_167_219_200_000_000i64..253_402_300_800_000_000) {
            prop_assert_eq!(parse_rfc3339(rfc3339(us).as_bytes()), Some(us));
        }

        #[test]
        fn no_text_makes_it_panic(text in any::<Vec<u8>>(), like in "[0-9TZ:. +-]{0,30}") {
            parse(&text, Some(0));
            parse_day(like.as_bytes());
            parse(like.as_bytes(), None);
            parse_zone(like.as_bytes());
        }
    }
}
