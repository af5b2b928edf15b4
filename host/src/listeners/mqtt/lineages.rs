//! The openings of each stream to which the broker's records refer.
//!
//! Notes of sessions, records of QoS 2 packets and copies name a message by stream and offset. A stream
//! that lost its end, or whose folder is older than the broker's, continues at offsets that these
//! records have used for other messages ([`Lineage`]). So the broker's stream stores, for each stream,
//! the openings to which the records refer. A start compares them with the stream's openings. From the
//! point at which they diverge, records are ignored and written again, and then the stream's openings
//! are stored. A crash in between repeats the comparison.

use std::sync::Arc;

use uuid::Uuid;

use super::session::Change;
use crate::stream::{Identity, Lineage, Stream};
use crate::telemetry::Standing;

/// Prefix of a key in the state of the broker's stream, followed by the name of a stream.
const OPENINGS: &[u8] = b"ol";
/// Prefix of a key in the state of the broker's stream with the UUID of a stream's log, followed by the
/// stream's name.
const LOG: &[u8] = b"on";

/// Result of the comparison at a start, until the records are correct again.
pub struct Lineages {
    valid: Box<[u64]>,
    changes: Vec<Change>,
    other_logs: Vec<Standing>,
}

impl Lineages {
    /// Compares the records in the broker's stream with the streams.
    pub fn read(broker: &dyn Stream, streams: &[Arc<dyn Stream>]) -> Self {
        let (mut changes, mut other_logs) = (Vec::new(), Vec::new());
        for stream in streams {
            let (key, ours) = ([LOG, stream.name().as_bytes()].concat(), stream.identity().log);
            let known = broker.state(&key).into_iter().find(|(known, _)| *known == key);
            let known = known.and_then(|(_, value)| Uuid::from_slice(&value).ok());
            if known != Some(ours) {
                changes.push((key, Some(ours.as_bytes().to_vec())));
                other_logs.extend(known.map(|known| other_log(stream.name(), known, ours)));
            }
        }
        let mut valid = |stream: &Arc<dyn Stream>| {
            let key = key(&stream.identity());
            let (openings, kept) = (stream.openings(), stream.bounds());
            let text = broker.state(&key).pop().and_then(|(_, value)| String::from_utf8(value).ok());
            // 0.1.0 wrote none: the records are believed up to the end of the stream, as if it cannot be read.
            let known = Lineage::read(text.as_deref()).unwrap_or_default();
            let now = Lineage::of_all(&openings).to_string();
            if text.as_deref() != Some(&*now) {
                changes.push((key, Some(now.into_bytes())));
            }
            known.common(&openings, kept.start).0.min(kept.end.0)
        };
        let valid = streams.iter().map(&mut valid).collect();
        Self { valid, changes, other_logs }
    }

    /// Returns, for each stream, the offset up to which the records refer to messages that the stream
    /// has.
    pub fn valid(&self) -> &[u64] {
        &self.valid
    }

    /// Returns the problems of streams that are not those to which the records refer.
    pub fn other_logs(&self) -> &[Standing] {
        &self.other_logs
    }

    /// Adds a change that must be written together with the openings.
    pub fn change(&mut self, change: Change) {
        self.changes.push(change);
    }

    /// Returns the changes that mark the records as those of the present streams. They are written when
    /// all records are correct.
    pub fn changes(&self) -> &[Change] {
        &self.changes
    }
}

/// Returns the problem of a stream whose folder differs from that of the previous start, while there are
/// records of the previous one.
fn other_log(stream: &str, known: Uuid, ours: Uuid) -> Standing {
    Standing {
        part: format!("stream {stream}"),
        kind: "other_log",
        cause: format!(
            "when this host last ran, the stream was log {known}, and its folder now holds log {ours}: messages that are \
             only in the other log are not written, and sessions do not receive them"
        ),
        advice: "if the stream's folder was moved, or its disk is not mounted, stop the host and put the right folder \
                 back; if it was removed on purpose, nothing needs to be done: the next start does not report this again"
            .to_owned(),
    }
}

fn key(identity: &Identity) -> Vec<u8> {
    [OPENINGS, identity.log.as_bytes(), &identity.generation.to_be_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::StateChange;
    use crate::stream::memory::MemoryStream;

    #[test]
    fn a_stream_that_is_another_log_than_at_the_start_before_is_told_once() {
        let broker = MemoryStream::new("broker", 1);
        let [old, new, longer] = ["t", "t", "telemetry"].map(|name| MemoryStream::new(name, 1));
        let start = |streams: &[Arc<dyn Stream>]| {
            let found = Lineages::read(&*broker, streams);
            let changes = found.changes().iter();
            let changes: Vec<_> =
                changes.map(|(key, value)| StateChange { key, value: value.as_deref() }).collect();
            broker.append(&[], &changes).unwrap();
            found.other_logs().to_vec()
        };
        assert_eq!(start(&[longer.clone(), old.clone()]), [], "it knows of none before");
        assert_eq!(start(&[longer.clone(), old.clone()]), []);
        let told = start(&[longer.clone(), new.clone()]);
        assert_eq!(told.len(), 1);
        assert!(told[0].part == "stream t" && told[0].cause.contains(&old.identity().log.to_string()));
        assert!(told[0].cause.contains(&new.identity().log.to_string()));
        assert_eq!(start(&[longer, new]), []);
    }
}
