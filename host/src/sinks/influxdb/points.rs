//! Converts messages to points.

use std::sync::Arc;

use super::config::{Config, Precision, Spread};
use super::line::{self, Backslash};
use crate::sinks::columns::{Called, Columns, ColumnsConfig, Kind, Mismatch, Reader, Value};
use crate::sinks::{RefusedRow, Rows};
use crate::topic::Namespace;

/// Range of times in nanoseconds that InfluxDB supports (its `models.MinNanoTime` and `MaxNanoTime`).
const NANOS: std::ops::RangeInclusive<i64> = i64::MIN + 2..=i64::MAX - 1;
/// Nanoseconds in a microsecond, which is the number of messages of one time and series that are kept
/// apart.
const SPREAD: u64 = 1_000;
/// Distance between two consecutive messages of one series, so that several points of each do not
/// coincide.
const STRIDE: u64 = 31;

/// Converts messages to points.
#[derive(Debug)]
pub struct Points {
    columns: Columns,
    /// The fixed measurement; `None` if the first column has it.
    measurement: Option<String>,
    tags: std::ops::Range<usize>,
    fields: std::ops::Range<usize>,
    backslash: Backslash,
    spread: Spread,
    precision: Precision,
}

/// Lines of a batch.
#[derive(Debug, Default)]
pub struct Lines {
    pub text: String,
    /// Row, and end of its line in the text.
    pub rows: Vec<(usize, usize)>,
    /// Rows that cannot be points.
    pub rejected: Vec<RefusedRow>,
}

impl Points {
    pub fn new(config: &Config, namespace: Arc<Namespace>) -> Self {
        let measurement = config.measurement_source();
        let mut tags = config.tags.0.clone();
        // As InfluxDB advises: it would sort them.
        tags.sort_by(|(a, _), (b, _)| a.cmp(b));
        let first = usize::from(measurement.is_some());
        let name = measurement.is_none().then(|| config.measurement.clone());
        let (tags_end, fields_end) = (first + tags.len(), first + tags.len() + config.fields.0.len());
        let all = measurement.into_iter().flat_map(|source| source.0).chain(tags);
        let all = all.chain(config.fields.0.clone()).chain(config.time_source().0);
        let mut columns = Columns::new(&ColumnsConfig(all.collect()), namespace);
        for (i, column) in columns.columns.iter_mut().enumerate() {
            column.called = match i {
                i if i < first => Called { noun: "key", key: "measurement" },
                i if i < tags_end => Called { noun: "tag", key: "tags" },
                i if i < fields_end => Called { noun: "field", key: "fields" },
                _ => Called { noun: "key", key: "time" },
            };
        }
        let backslash = if config.version == 3 { Backslash::Escaped } else { Backslash::Plain };
        Self {
            columns,
            measurement: name,
            tags: first..tags_end,
            fields: tags_end..fields_end,
            backslash,
            spread: config.spread,
            precision: config.precision,
        }
    }

    pub fn lines(&self, rows: &Rows) -> Lines {
        let mut lines = Lines::default();
        let mut reader = self.columns.reader();
        for row in 0..rows.len() {
            let begin = lines.text.len();
            match self.push(&mut reader, rows, row, &mut lines.text) {
                Ok(()) => lines.rows.push((row, lines.text.len())),
                Err(rejected) => {
                    lines.text.truncate(begin);
                    lines.rejected.push(rejected);
                }
            }
        }
        lines
    }

    fn push<'r>(
        &self,
        reader: &mut Reader<'_, 'r>,
        rows: &'r Rows,
        row: usize,
        line: &mut String,
    ) -> Result<(), RefusedRow> {
        let message = rows.get(row);
        let (mut time_us, mut fields) = (0, 0);
        // What the line protocol cannot hold, and of which column.
        let mut unwritable: Option<(usize, &'static str)> = None;
        if let Some(name) = &self.measurement
            && let Err(reason) = line::push_measurement(line, name, self.backslash)
        {
            unwritable = Some((0, reason));
        }
        reader.read(row, message, |i, value| {
            let column = &self.columns.columns[i];
            if value == Value::Null {
                return Ok(());
            }
            let written = if self.tags.contains(&i) {
                self.push_tag(line, &column.name, &value)?
            } else if self.fields.contains(&i) {
                line.push(if fields == 0 { ' ' } else { ',' });
                fields += 1;
                let named = line::push_key(line, &column.name, self.backslash);
                line.push('=');
                push_field(line, column.kind, &value)?;
                named
            } else if i + 1 == self.columns.columns.len() {
                time_us = value.time_us().ok_or(Mismatch("a time"))?;
                Ok(())
            } else {
                line::push_measurement(line, &value.text().ok_or(Mismatch("text"))?, self.backslash)
            };
            if let Err(reason) = written {
                unwritable.get_or_insert((i, reason));
            }
            Ok(())
        })?;
        let reject = |reason| RefusedRow { row, reason, code: None };
        if let Some((i, reason)) = unwritable {
            let column = &self.columns.columns[i];
            return Err(reject(format!("{} \"{}\": {reason}", column.called.noun, column.name)));
        }
        if fields == 0 {
            return Err(reject(
                "no field has a value, and InfluxDB has no point without one: fill one from another source with \
                 `fields:` (host/docs/payloads.md)"
                    .to_owned(),
            ));
        }
        let time = self.time(time_us, message.offset().0, rows.index(row)).ok_or_else(|| {
            reject(format!("its time is outside of what InfluxDB has times for: {time_us} µs since 1970"))
        })?;
        line.push(' ');
        line.push_str(&time.to_string());
        line.push('\n');
        Ok(())
    }

    fn push_tag(
        &self,
        line: &mut String,
        name: &str,
        value: &Value<'_>,
    ) -> Result<Result<(), &'static str>, Mismatch> {
        let text = value.text().ok_or(Mismatch("text"))?;
        // To InfluxDB a tag that is empty is none.
        if text.is_empty() {
            return Ok(Ok(()));
        }
        line.push(',');
        let named = line::push_key(line, name, self.backslash);
        line.push('=');
        let written = line::push_key(line, &text, self.backslash);
        Ok(named.and(written))
    }

    /// Returns the time in the unit that is sent. In nanoseconds, the digits below the microsecond
    /// distinguish messages with the same time, and are the same if a message is written again.
    fn time(&self, us: i64, offset: u64, index: u32) -> Option<i64> {
        let nanos = us.checked_mul(1_000)?;
        let nanos = match self.spread {
            Spread::Nanoseconds => {
                let place = offset.wrapping_mul(STRIDE).wrapping_add(u64::from(index)) % SPREAD;
                nanos.checked_add(place as i64)?
            }
            Spread::None => nanos,
        };
        let divisor = match self.precision {
            Precision::Ns => 1,
            Precision::Us => 1_000,
            Precision::Ms => 1_000_000,
            Precision::S => 1_000_000_000,
        };
        NANOS.contains(&nanos).then(|| nanos.div_euclid(divisor))
    }
}

fn push_field(line: &mut String, kind: Option<Kind>, value: &Value<'_>) -> Result<(), Mismatch> {
    match kind {
        Some(Kind::Double) => line::push_float(line, value.f64().ok_or(Mismatch("a number"))?),
        Some(Kind::Bigint) => line::push_integer(line, value.i64().ok_or(Mismatch("a whole number"))?),
        Some(Kind::Bool) => line::push_bool(line, value.bool().ok_or(Mismatch("true or false"))?),
        Some(Kind::Jsonb) => line::push_text(line, &value.json_text().ok_or(Mismatch("JSON"))?),
        None if value.is_number() => line::push_float(line, value.f64().ok_or(Mismatch("a finite number"))?),
        None if value.bool().is_some() => line::push_bool(line, value.bool() == Some(true)),
        Some(Kind::Text | Kind::Bytes | Kind::Timestamptz) | None => {
            line::push_text(line, &value.text().ok_or(Mismatch("text"))?);
        }
    }
    Ok(())
}
