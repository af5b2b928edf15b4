//! Checks JSON telemetry and brings its timestamp to UTC.
//!
//! A payload is an object with a device id, a value and a timestamp. What is
//! missing, of the wrong type or out of range is refused with its reason; what
//! is fine goes on with `ts_utc` added (RFC 3339) and its event time set.

mod settings;

pub use settings::{DeviceMustMatch, Settings};

use headworks_guest::json::{Kind, Raw};
use headworks_guest::prelude::*;
use headworks_guest::time;

pub struct Normalize {
    settings: Settings,
    /// `ts_utc` as JSON, before it is spliced in: used again for each message.
    ts_utc: Vec<u8>,
}

impl Plugin for Normalize {
    const CONFIG_SCHEMA: &'static str = include_str!("config.schema.json");

    fn new(config: &Config, _: &Context) -> Result<Self, Vec<Problem>> {
        Ok(Self { settings: Settings::read(config)?, ts_utc: Vec::new() })
    }

    fn process(&mut self, message: &Message<'_>, out: &mut Output<'_>) -> Verdict {
        self.normalize(message, out).unwrap_or_else(Verdict::fail)
    }
}

impl Normalize {
    fn normalize(&mut self, message: &Message<'_>, out: &mut Output<'_>) -> Result<Verdict, String> {
        let settings = &self.settings;
        let payload = message.payload();
        let keys = [&settings.device_id, &settings.value, &settings.timestamp, &settings.output];
        let [device, value, timestamp, earlier] = json::get_many(payload, keys.map(String::as_str))
            .map_err(|error| not_an_object(payload, &error))?;

        let device = required(device, &settings.device_id)?;
        check_device(settings, message, device)?;
        let value = required(value, &settings.value)?;
        check_value(settings, value)?;
        let timestamp = required(timestamp, &settings.timestamp)?;
        let event_us = read_timestamp(settings, timestamp)?;
        check_range(settings, timestamp, event_us, message.now_us())?;

        self.ts_utc.clear();
        self.ts_utc.push(b'"');
        time::write_rfc3339(&mut self.ts_utc, event_us);
        self.ts_utc.push(b'"');

        let mut record = out.emit();
        record.event_us(event_us);
        if !message.fits_namespace() {
            // The topic names no device: the payload does.
            record.device(&device.as_str().unwrap_or_default());
        }
        if earlier.is_none() && value.kind() == Kind::Number {
            record.payload_with(|buffer| {
                json::insert_field(payload, &settings.output, &self.ts_utc, buffer)
                    .expect("it was checked above");
            });
        } else {
            record.payload(&rewrite(settings, payload, value, &self.ts_utc));
        }
        Ok(record.verdict())
    }
}

/// What a message's device id may have.
const DEVICE_BYTES_MAX: usize = 256;

fn required<'a>(raw: Option<Raw<'a>>, key: &str) -> Result<Raw<'a>, String> {
    raw.ok_or_else(|| format!("field \"{key}\" is missing"))
}

/// Says what a payload is instead, where that can be told.
fn not_an_object(payload: &[u8], error: &json::Error) -> String {
    let what = match payload.trim_ascii() {
        [] => "it is empty",
        [0xef, 0xbb, 0xbf, ..] => "it begins with a byte order mark, which JSON does not have",
        [b'[', ..] => "it is an array, and one message is one reading",
        [b'{', .., 0] => "a NUL follows the object",
        other if json::parse(other).is_ok() => "it is a single value",
        _ => return format!("payload is not a JSON object: {error}"),
    };
    format!("payload is not a JSON object: {what}")
}

fn check_device(settings: &Settings, message: &Message<'_>, device: Raw<'_>) -> Result<(), String> {
    let key = &settings.device_id;
    let Some(content) = device.content() else {
        return Err(format!("field \"{key}\" must be a string, is {}", device.kind().name()));
    };
    if content.is_empty() {
        return Err(format!("field \"{key}\" is empty"));
    }
    if !message.fits_namespace() && device.as_str().is_none_or(|id| id.len() > DEVICE_BYTES_MAX) {
        return Err(format!(
            "field \"{key}\" must be text of at most {DEVICE_BYTES_MAX} bytes: {}",
            shown(device)
        ));
    }
    let compare = match settings.device_must_match {
        DeviceMustMatch::Topic => message.fits_namespace(),
        DeviceMustMatch::Always => true,
        DeviceMustMatch::Never => false,
    };
    // Almost always the same bytes; `is_str` is for a name with escapes.
    if !compare || content == message.device_bytes() || device.is_str(message.device()) {
        return Ok(());
    }
    let (named, from) = (device.as_str().unwrap_or_default(), message.device());
    let whose = if message.fits_namespace() { "its topic is of" } else { "its client is" };
    Err(format!("field \"{key}\" names the device {named:?}, but {whose} {from:?}"))
}

fn check_value(settings: &Settings, value: Raw<'_>) -> Result<(), String> {
    let key = &settings.value;
    match value.kind() {
        Kind::Number => Ok(()),
        Kind::String if settings.coerce => match coerced(value) {
            Some(_) => Ok(()),
            None => Err(format!("field \"{key}\" must be a number, is the string {}", shown(value))),
        },
        Kind::String => Err(format!("field \"{key}\" must be a number, is the string {}", shown(value))),
        other => Err(format!("field \"{key}\" must be a number, is {}", other.name())),
    }
}

/// The number that a string's content reads as JSON, within f64.
fn coerced<'a>(value: Raw<'a>) -> Option<&'a [u8]> {
    let text = value.content()?.trim_ascii();
    let number = json::parse(text).ok()?;
    (number.kind() == Kind::Number).then_some(text)
}

fn read_timestamp(settings: &Settings, raw: Raw<'_>) -> Result<i64, String> {
    let key = &settings.timestamp;
    let read = match raw.kind() {
        Kind::Number => time::parse_number(raw.as_bytes()),
        Kind::String => time::parse(raw.content().unwrap_or_default(), settings.zone_minutes),
        other => {
            return Err(format!("field \"{key}\" must be a timestamp, is {}", other.name()));
        }
    };
    read.ok_or_else(|| {
        let zone = if settings.zone_minutes.is_none() { " with an offset" } else { "" };
        format!(
            "field \"{key}\" is no timestamp (RFC 3339{zone}, or a number in s, ms, us or ns): {}",
            shown(raw)
        )
    })
}

fn check_range(settings: &Settings, raw: Raw<'_>, event_us: i64, now_us: u64) -> Result<(), String> {
    let now_us = i64::try_from(now_us).unwrap_or(i64::MAX);
    let too_late = settings.future_max_us.is_some_and(|max| event_us > now_us.saturating_add(max));
    let too_early = settings.past_max_us.is_some_and(|max| event_us < now_us.saturating_sub(max));
    if !(too_late || too_early || event_us < settings.earliest_us || event_us >= END_US) {
        return Ok(());
    }
    let key = &settings.timestamp;
    let mut at = Vec::new();
    time::write_rfc3339(&mut at, event_us);
    // A year that RFC 3339 cannot write is shown as it was sent.
    let at = if at.is_empty() { shown(raw) } else { String::from_utf8_lossy(&at).into_owned() };
    let why = if too_late || event_us >= END_US { "too far in the future" } else { "too far in the past" };
    Err(format!("field \"{key}\" is {why}: {at}"))
}

/// The year 10000, which RFC 3339 cannot write.
const END_US: i64 = 253_402_300_800_000_000;

/// The rare ways: a value that was a string becomes a number, or `ts_utc`
/// takes the place of what the device sent.
fn rewrite(settings: &Settings, payload: &[u8], value: Raw<'_>, ts_utc: &[u8]) -> Vec<u8> {
    let mut with_number = Vec::new();
    let number = coerced(value).unwrap_or(value.as_bytes());
    json::set_field(payload, &settings.value, number, &mut with_number).expect("it was checked before");
    let mut rewritten = Vec::new();
    json::set_field(&with_number, &settings.output, ts_utc, &mut rewritten).expect("still an object");
    rewritten
}

/// The start of a value, for a reason.
fn shown(raw: Raw<'_>) -> String {
    let text = String::from_utf8_lossy(raw.as_bytes());
    let end = text.floor_char_boundary(64);
    if end < text.len() { format!("{}…", &text[..end]) } else { text.into_owned() }
}

headworks_guest::plugin!(Normalize);
