//! `headworks streams`: shows what streams hold. Reads the data folder while the host may be running,
//! and writes nothing.

use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use jiff::Timestamp;
use serde_json::json;

use super::args::{Format, StreamsCommand, TailArgs};
use super::output::{Out, complain, shown, time};
use super::{block_on, data_folder, message};
use crate::batch::Offset;
use crate::config::{self, Config, DEAD_LETTERS};
use crate::files::folder_bytes;
use crate::pipeline::OUT;
use crate::stream::log::ReadOnly;
use crate::stream::{GapCause, Read};
use crate::units::{ByteSize, Period};

/// Messages that are shown if neither `--from` nor `--max` is given.
const LAST_MESSAGES: u64 = 10;
/// Interval of checks for new messages with `--follow`.
const POLL_EVERY: Duration = Duration::from_millis(100);

pub fn streams(command: StreamsCommand, out: &mut Out) -> anyhow::Result<()> {
    match command {
        StreamsCommand::List { config, format } => {
            let config = config::load(config.config.as_deref())?.config;
            list(&config, format.format, out)
        }
        StreamsCommand::Tail(args) => {
            let config = config::load(args.config.config.as_deref())?.config;
            let name = args.name.clone().unwrap_or_else(|| config.main_stream().to_owned());
            block_on(tail(&config, &name, &args, out))
        }
    }
}

/// Opens a stream of the data folder for reading from `from` on, even while the host writes it. Returns
/// `None` if nothing was written yet.
pub fn open(config: &Config, name: &str, from: Offset) -> anyhow::Result<Option<ReadOnly>> {
    if name != DEAD_LETTERS && !config.streams.contains_key(name) {
        let known: Vec<&str> = config.streams.keys().map(String::as_str).collect();
        bail!("no stream `{name}` in the config; it has {}, {DEAD_LETTERS}", known.join(", "));
    }
    let dir = config.stream_dir(name);
    let age_max = match config.streams.get(name) {
        Some(stream) => stream.retention.max_age,
        None => config.dead_letters.max_age,
    };
    let is_there = data_folder::is_there(&dir).map_err(|error| data_folder::refused(config, &error))?;
    Ok(is_there.then(|| ReadOnly::open(&dir, from).newer_than(age_max.map(|age| age.0))))
}

/// Fails if there is no data folder; most often the config is the wrong one.
pub fn must_be_there(config: &Config) -> anyhow::Result<()> {
    let folder = shown(&config.data_dir);
    if !data_folder::look(config)? {
        bail!("there is no data folder {folder}: give the host's config with --config, or start a host");
    }
    Ok(())
}

fn list(config: &Config, format: Format, out: &mut Out) -> anyhow::Result<()> {
    must_be_there(config)?;
    let dead_letters = config.dead_letters.stream();
    let written = config.written_streams();
    let streams = config.streams.iter().map(|(name, stream)| (name.as_str(), stream));
    let streams = streams.chain([(DEAD_LETTERS, &dead_letters)]).map(|(name, stream)| (name, Some(stream)));
    let mut others = ReadOnly::streams_in(&config.data_dir.join("streams"))?;
    others.retain(|name| !config.streams.contains_key(name));
    for (name, stream) in streams.chain(others.iter().map(|name| (name.as_str(), None))) {
        let held = Held::of(&config.stream_dir(name)).with_context(|| format!("stream {name}"))?;
        let Range { start: Offset(first), end: Offset(next) } = held.offsets;
        let partitions = stream.map_or(held.partitions, |stream| Some(stream.partitions));
        let topics = stream.map_or(&[][..], |stream| stream.topics.as_slice());
        if format == Format::Json {
            out.json(&json!({
                "stream": name, "first": first, "next": next, "bytes": held.bytes,
                "oldest": held.oldest_us.map(time), "newest": held.newest_us.map(time),
                "partitions": partitions, "topics": topics, "configured": stream.is_some(),
            }))?;
            continue;
        }
        let topics = match topics.join(" ") {
            _ if stream.is_none() => match name.strip_suffix(OUT) {
                Some(pipeline) if config.pipelines.contains_key(pipeline) => {
                    format!("what the sinks of pipeline {pipeline} may still need")
                }
                _ => "not in the config: no pipeline reads it".to_owned(),
            },
            none if none.is_empty() && name == DEAD_LETTERS => "refused messages".to_owned(),
            none if none.is_empty() && written.contains(name) => "what pipelines write".to_owned(),
            none if none.is_empty() => "all topics that no other stream takes".to_owned(),
            some => some,
        };
        let times = match (held.oldest_us, held.newest_us) {
            (Some(oldest), Some(newest)) => format!("{} to {}", time(oldest), time(newest)),
            _ => String::new(),
        };
        out.flow(
            0,
            &[
                name.to_owned(),
                format!("messages: {}", next - first),
                format!("offsets {first} to {next}"),
                format!("{} on disk", ByteSize(held.bytes)),
                times,
                partitions.map(|count| format!("partitions: {count}")).unwrap_or_default(),
                topics,
            ],
        )?;
    }
    Ok(())
}

/// Contents of a stream's folder.
#[derive(Default)]
struct Held {
    /// Offset of the first stored message, and one past the last.
    offsets: Range<Offset>,
    /// Size of all files.
    bytes: u64,
    /// When the first and the last message were appended, microseconds since 1970, UTC.
    oldest_us: Option<u64>,
    newest_us: Option<u64>,
    /// Number of partitions with which the log was created.
    partitions: Option<u16>,
}

impl Held {
    fn of(dir: &Path) -> anyhow::Result<Self> {
        if !data_folder::is_there(dir)? {
            return Ok(Self::default());
        }
        let reader = ReadOnly::open(dir, Offset(0));
        let offsets = reader.bounds()?;
        let appended = |offset| {
            let mut reader = ReadOnly::open(dir, offset);
            while let Ok(Some(read)) = reader.read() {
                if let Read::Batch(batch) = read {
                    return Some(batch.now_us);
                }
            }
            None
        };
        let last = Offset(offsets.end.0.saturating_sub(1));
        Ok(Self {
            bytes: folder_bytes(dir)?,
            oldest_us: appended(offsets.start),
            newest_us: appended(last),
            partitions: reader.partitions()?,
            offsets,
        })
    }
}

async fn tail(config: &Config, name: &str, args: &TailArgs, out: &mut Out) -> anyhow::Result<()> {
    let wanted = args.from;
    if !args.follow {
        must_be_there(config)?;
    }
    let mut reader = loop {
        match open(config, name, Offset(0))? {
            Some(reader) => break reader,
            None if !args.follow => return Ok(()),
            None => tokio::time::sleep(POLL_EVERY).await,
        }
    };
    let (from, since_us) = match wanted {
        Some(From::Offset(offset)) => (offset, 0),
        Some(From::Start) => (Offset(0), 0),
        Some(From::Time(us)) => (Offset(0), us),
        Some(From::End) => (reader.bounds()?.end, 0),
        None => (Offset(reader.bounds()?.end.0.saturating_sub(args.max.unwrap_or(LAST_MESSAGES))), 0),
    };
    let end = reader.bounds()?.end;
    if from > end || (from == end && matches!(wanted, Some(From::Offset(_)))) {
        complain(&format!(
            "headworks: stream {name} ends before offset {}, the next message has {}",
            from.0, end.0
        ));
    }
    reader.seek(from);
    let mut left = args.max.unwrap_or(u64::MAX);
    let mut has_waited = false;
    while left > 0 {
        match reader.read()? {
            None if args.follow => tokio::time::sleep(POLL_EVERY).await,
            // A running host proves its last messages durable in the file a moment after the ack.
            None if !has_waited => {
                has_waited = true;
                tokio::time::sleep(POLL_EVERY).await;
            }
            None => break,
            Some(Read::Gap { cause: GapCause::Trimmed, .. }) => {}
            Some(Read::Gap { from, to, cause: GapCause::Damaged }) => {
                complain(&format!("headworks: offsets {} to {} are damaged on disk", from.0, to.0));
            }
            // A batch has one append time: that of its frame.
            Some(Read::Batch(batch)) if batch.now_us < since_us => {}
            Some(Read::Batch(batch)) => {
                let count = left.min(batch.len() as u64);
                for message in batch.messages().take(count as usize) {
                    match args.format.format {
                        Format::Json => out.json(&message::to_json(&message))?,
                        Format::Text => out.line(message::to_line(&message))?,
                    }
                }
                left -= count;
            }
        }
    }
    Ok(())
}

/// Where `tail` begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    Offset(Offset),
    Start,
    End,
    /// Microseconds since 1970, UTC.
    Time(u64),
}

impl From {
    /// Parses an argument of the command line.
    pub fn parse(text: &str) -> Result<Self, String> {
        Self::parse_at(text, Timestamp::now())
    }

    fn parse_at(text: &str, now: Timestamp) -> Result<Self, String> {
        if let Ok(offset) = text.parse() {
            return Ok(Self::Offset(Offset(offset)));
        }
        let time = match (text, text.parse::<Period>(), text.parse::<Timestamp>()) {
            ("start", ..) => return Ok(Self::Start),
            ("end", ..) => return Ok(Self::End),
            (_, Ok(ago), _) => {
                now.checked_sub(ago.0).map_err(|_| format!("{text} ago is before all time"))?
            }
            (_, _, Ok(time)) => time,
            _ => {
                return Err(
                    "must be an offset, `start`, `end`, a time such as 2026-11-23T06:00:00Z, or 10m".into()
                );
            }
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
