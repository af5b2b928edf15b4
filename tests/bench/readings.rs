//! Readings as a plant's thousand devices send them, one a second each. Few
//! devices, one time for all or values that grow by one would make a database's
//! index cheaper than a plant's does.

use std::fmt::Write;

pub const DEVICES: u64 = 1_000;
/// Between two readings of one device.
const EVERY_US: u64 = 1_000_000;

/// The reading of this number, over all devices, which take turns.
pub struct Reading {
    pub device: String,
    /// Microseconds since 1970, UTC.
    pub time_us: u64,
    pub value: f64,
}

impl Reading {
    /// Makes a plant whose first reading is from `begin_us`.
    pub fn new(number: u64, begin_us: u64) -> Self {
        Self {
            device: device(number % DEVICES),
            time_us: begin_us + number * EVERY_US / DEVICES,
            value: 15.0 + (number * 7_919 % 10_007) as f64 / 1_000.0,
        }
    }

    pub fn topic(&self) -> String {
        format!("acme/site-01/temperature/{}/reading", self.device)
    }

    /// A JSON object; `more` are further members, each with a comma before it.
    pub fn payload(&self, more: &str) -> String {
        let Self { device, time_us, value } = self;
        let mut text = String::with_capacity(128);
        let _ = write!(
            text,
            r#"{{"device_id":"{device}","metric":"temperature_c","value":{value},"ts":{time_us}{more}}}"#
        );
        text
    }
}

pub fn device(number: u64) -> String {
    format!("sensor-{number:04}")
}
