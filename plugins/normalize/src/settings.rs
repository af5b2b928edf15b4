//! The config of `normalize`; `config.schema.json` says the same.

use headworks_guest::config::{Config, Fields, Problem};
use headworks_guest::time;

const SECOND_US: f64 = 1e6;

pub struct Settings {
    /// Names of the fields.
    pub device_id: String,
    pub value: String,
    pub timestamp: String,
    /// The field that is added.
    pub output: String,
    /// Take `"21.5"` for 21.5.
    pub coerce: bool,
    pub device_must_match: DeviceMustMatch,
    /// Of timestamps that do not say theirs; None: those are refused.
    pub zone_minutes: Option<i32>,
    /// None: no bound.
    pub future_max_us: Option<i64>,
    pub past_max_us: Option<i64>,
    /// 2000-01-01: a device that counts from its own start has no clock.
    pub earliest_us: i64,
}

/// When the payload's device must be the message's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceMustMatch {
    /// Where the topic fits the namespace.
    Topic,
    /// Also elsewhere, where the client id is the device.
    Always,
    Never,
}

impl Settings {
    pub fn read(config: &Config) -> Result<Self, Vec<Problem>> {
        let mut fields = config.fields();
        let settings = Self {
            device_id: fields.string("device_id", "device_id"),
            value: fields.string("value", "value"),
            timestamp: fields.string("timestamp", "ts"),
            output: fields.string("output", "ts_utc"),
            coerce: fields.bool("coerce", false),
            device_must_match: fields.choice(
                "device_must_match",
                &[
                    ("topic", DeviceMustMatch::Topic),
                    ("always", DeviceMustMatch::Always),
                    ("never", DeviceMustMatch::Never),
                ],
                DeviceMustMatch::Topic,
            ),
            zone_minutes: zone_minutes(&mut fields),
            future_max_us: bound_us(fields.f64("future_max_s", 86_400.0)),
            past_max_us: bound_us(fields.f64("past_max_s", 0.0)),
            earliest_us: 946_684_800_000_000,
        };
        for (key, name) in [
            ("device_id", &settings.device_id),
            ("value", &settings.value),
            ("timestamp", &settings.timestamp),
        ] {
            if *name == settings.output {
                fields.problem("output", format!("must not be the same field as {key}, {name:?}"));
            }
        }
        fields.finish().map(|()| settings)
    }
}

fn zone_minutes(fields: &mut Fields<'_>) -> Option<i32> {
    let zone = fields.optional_string("zone")?;
    let minutes = time::parse_zone(zone.as_bytes());
    if minutes.is_none() {
        fields.problem("zone", "must be UTC or an offset such as +02:00");
    }
    minutes
}

/// 0 or less: no bound.
fn bound_us(seconds: f64) -> Option<i64> {
    (seconds > 0.0).then_some((seconds * SECOND_US) as i64)
}
