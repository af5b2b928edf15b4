//! A plugin's own metrics, exposed as `headworks_plugin_metric_NAME{pipeline,step,…}`.
//! Registered in `Plugin::new` only. Natively: nothing is kept.

pub use crate::bindings::headworks::plugin::types::Error;

/// Counts up.
#[derive(Clone, Copy, Debug)]
pub struct Counter(u32);

/// Goes up and down.
#[derive(Clone, Copy, Debug)]
pub struct Gauge(u32);

/// A distribution of values.
#[derive(Clone, Copy, Debug)]
pub struct Histogram(u32);

pub fn counter(name: &str, help: &str, labels: &[(&str, &str)]) -> Result<Counter, Error> {
    register(1, name, help, labels).map(Counter)
}

pub fn gauge(name: &str, help: &str, labels: &[(&str, &str)]) -> Result<Gauge, Error> {
    register(2, name, help, labels).map(Gauge)
}

pub fn histogram(name: &str, help: &str, labels: &[(&str, &str)]) -> Result<Histogram, Error> {
    register(3, name, help, labels).map(Histogram)
}

impl Counter {
    pub fn add(&self, value: f64) {
        record(self.0, value);
    }
}

impl Gauge {
    pub fn set(&self, value: f64) {
        record(self.0, value);
    }
}

impl Histogram {
    pub fn observe(&self, value: f64) {
        record(self.0, value);
    }
}

#[cfg(target_family = "wasm")]
fn register(kind: u8, name: &str, help: &str, labels: &[(&str, &str)]) -> Result<u32, Error> {
    let labels: Vec<_> = labels.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
    crate::bindings::headworks::plugin::metrics::register(kind, name, help, &labels)
}

#[cfg(target_family = "wasm")]
fn record(series: u32, value: f64) {
    crate::bindings::headworks::plugin::metrics::record_value(series, value);
}

#[cfg(not(target_family = "wasm"))]
fn register(_: u8, _: &str, _: &str, _: &[(&str, &str)]) -> Result<u32, Error> {
    Ok(0)
}

#[cfg(not(target_family = "wasm"))]
fn record(_: u32, _: f64) {}
