//! `headworks streams`: what streams hold. Reads the data folder beside a
//! running host, writes nothing.

use std::sync::Arc;

use anyhow::{Context, bail};
use jiff::Timestamp;
use serde_json::json;

use super::args::{Format, StreamsCommand, TailArgs};
use super::output::Out;
use super::{block_on, message};
use crate::batch::Offset;
use crate::config::{self, Config, DEAD_LETTERS};
use crate::stream::{Cursor, Read, Stream};
use crate::units::Period;

/// Shown where neither `--from` nor `--max` says otherwise.
const LAST_MESSAGES: u64 = 10;

pub fn streams(command: StreamsCommand, out: &mut Out) -> anyhow::Result<()> {
    match command {
        StreamsCommand::List { config, format } => {
            let config = config::load(config.config.as_deref())?.config;
            block_on(list(&config, format.format, out))
        }
        StreamsCommand::Tail(args) => {
            let config = config::load(args.config.config.as_deref())?.config;
            let name = args.name.clone().unwrap_or_else(|| config.default_stream().to_owned());
            block_on(async { tail(&*open(&config, &name).await?, &args, out).await })
        }
    }
}

/// Reads a stream of the data folder, also while the host writes it.
pub async fn open(config: &Config, name: &str) -> anyhow::Result<Arc<dyn Stream>> {
    if name != DEAD_LETTERS && !config.streams.contains_key(name) {
        let known: Vec<&str> = config.streams.keys().map(String::as_str).collect();
        bail!("no stream `{name}` in the config, known are {}, {DEAD_LETTERS}", known.join(", "));
    }
    // Wired to the log's reader where the log is merged.
    bail!("cannot read {}: the log is not part of this build", config.data_dir.display())
}

async fn list(config: &Config, format: Format, out: &mut Out) -> anyhow::Result<()> {
    let head = ["STREAM", "TOPICS", "PARTITIONS", "FIRST", "NEXT", "MESSAGES"];
    let mut table = vec![head.map(str::to_owned).to_vec()];
    for name in config.streams.keys().map(String::as_str).chain([DEAD_LETTERS]) {
        let topics = match config.streams.get(name) {
            Some(stream) if stream.topics.is_empty() => "all others".to_owned(),
            Some(stream) => stream.topics.join(" "),
            None => "refused messages".to_owned(),
        };
        let (partitions, bounds, problem) = match open(config, name).await {
            Ok(stream) => (stream.identity().partitions, stream.bounds(), None),
            Err(error) => (0, Offset(0)..Offset(0), Some(format!("{error:#}"))),
        };
        let (first, next) = (bounds.start.0, bounds.end.0);
        match (format, problem) {
            (Format::Json, problem) => out.json(&json!({
                "stream": name, "topics": config.streams.get(name).map(|stream| &stream.topics),
                "partitions": partitions, "first": first, "next": next, "problem": problem,
            }))?,
            (Format::Text, Some(problem)) => table.push(vec![name.to_owned(), topics, problem]),
            (Format::Text, None) => {
                let numbers = [u64::from(partitions), first, next, next - first];
                let mut row = vec![name.to_owned(), topics];
                row.extend(numbers.map(|number| number.to_string()));
                table.push(row);
            }
        }
    }
    if format == Format::Text { out.table(&table) } else { Ok(()) }
}

async fn tail(stream: &dyn Stream, args: &TailArgs, out: &mut Out) -> anyhow::Result<()> {
    let bounds = stream.bounds();
    let from = match args.from.as_deref().map(From::parse).transpose()? {
        Some(From::Offset(offset)) => offset,
        Some(From::Start) => bounds.start,
        Some(From::End) => bounds.end,
        Some(From::Time(us)) => stream.seek_time(us).await?,
        None => Offset(bounds.end.0.saturating_sub(args.max.unwrap_or(LAST_MESSAGES))),
    };
    let mut cursor = stream.cursor(from.clamp(bounds.start, bounds.end));
    let mut left = args.max.unwrap_or(u64::MAX);
    while left > 0 {
        let Some(read) = next(&mut *cursor, args.follow).await? else {
            break;
        };
        match read {
            Read::Gap { from, to, cause } => {
                eprintln!("headworks: offsets {} to {} cannot be read: {cause:?}", from.0, to.0);
            }
            Read::Batch(batch) => {
                for message in batch.messages().filter(|message| message.offset() >= from) {
                    match args.format.format {
                        Format::Json => out.json(&message::to_json(&message))?,
                        Format::Text => out.line(message::to_line(&message))?,
                    }
                    left -= 1;
                    if left == 0 {
                        break;
                    }
                }
            }
        }
    }
    Ok(())
}

async fn next(cursor: &mut dyn Cursor, wait: bool) -> anyhow::Result<Option<Read>> {
    if !wait {
        return Ok(cursor.try_next().await?);
    }
    tokio::select! {
        read = cursor.next() => Ok(Some(read?)),
        _ = tokio::signal::ctrl_c() => Ok(None),
    }
}

/// Where a tail begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    Offset(Offset),
    Start,
    End,
    /// Microseconds since 1970, UTC.
    Time(u64),
}

impl From {
    fn parse(text: &str) -> anyhow::Result<Self> {
        Self::parse_at(text, Timestamp::now())
    }

    fn parse_at(text: &str, now: Timestamp) -> anyhow::Result<Self> {
        if let Ok(offset) = text.parse() {
            return Ok(Self::Offset(Offset(offset)));
        }
        let time = match (text, text.parse::<Period>(), text.parse::<Timestamp>()) {
            ("start", ..) => return Ok(Self::Start),
            ("end", ..) => return Ok(Self::End),
            (_, Ok(ago), _) => now.checked_sub(ago.0).with_context(|| format!("{text} ago is before all time"))?,
            (_, _, Ok(time)) => time,
            _ => bail!("--from must be an offset, `start`, `end`, a time such as 2026-11-23T06:00:00Z, or 10m, is \"{text}\""),
        };
        Ok(Self::Time(u64::try_from(time.as_microsecond()).unwrap_or(0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_begins_at_an_offset_or_a_time() {
        let now: Timestamp = "2026-11-23T06:10:00Z".parse().unwrap();
        let parse = |text: &str| From::parse_at(text, now);
        assert_eq!(parse("17").unwrap(), From::Offset(Offset(17)));
        assert_eq!(parse("start").unwrap(), From::Start);
        assert_eq!(parse("10m").unwrap(), parse("2026-11-23T06:00:00Z").unwrap());
        assert!(parse("yesterday").is_err());
    }
}
