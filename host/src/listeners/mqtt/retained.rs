//! The last retained message of each topic: in memory for subscribers, and in the state of the stream to
//! which the message belongs, written in the same append. An acknowledgement therefore covers it too.

mod lookup;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, MutexGuard};

use sha2::{Digest, Sha256};

use super::Broker;
use super::blobs::{self, Blob, Id, Kind};
use super::lock_order::Locked;
use super::outbound::Message;
use super::session::Change;
use crate::batch::{Offset, flags};
use crate::stream::{Appended, NewMessage, Stream, Streams};
use crate::telemetry::Failures;

pub use self::lookup::Lookup;

const KIND: Kind = *b"rt";
const FORMAT: u8 = 2;
/// The same without the publisher.
const FORMAT_1: u8 = 1;
/// Format, flags, time received, lengths of topic, properties and publisher.
const HEAD_BYTES: usize = 1 + 2 + 8 + 2 + 4 + 2;

/// A retained message and its place. A subscriber receives it from here only if live delivery has passed
/// it, so that it is delivered once, and never before it is durable.
#[derive(Clone)]
pub struct Kept {
    pub message: Arc<Message>,
    /// Id of the client that published it, or left it as its will. `None`: a version that did not say it wrote it.
    publisher: Option<Arc<str>>,
    pub stream: usize,
    pub offset: Offset,
    blob: Blob,
}

impl Kept {
    /// Whether this client published it.
    pub fn is_of(&self, client_id: &str) -> bool {
        self.publisher.as_deref() == Some(client_id)
    }

    /// Returns the bytes that count towards the bound of all retained messages.
    fn len(&self) -> usize {
        self.message.len() + self.publisher.as_ref().map_or(0, |publisher| publisher.len())
    }
}

#[derive(Default)]
pub struct Retained {
    /// Messages by the topic's [`lookup::key`].
    topics: BTreeMap<Box<str>, Kept>,
    bytes: usize,
    messages_max: usize,
    bytes_max: usize,
}

/// Retained messages of an append that is not complete. If this is dropped without [`Staged::done`],
/// they are removed again. The retained messages stay locked meanwhile, so that the message that is
/// appended last is the one that stays.
pub struct Staged<'b> {
    retained: Locked<MutexGuard<'b, Retained>>,
    publisher: &'b Arc<str>,
    /// The topic's key, number of the message in the append, what was kept before.
    before: Vec<(Box<str>, usize, Option<Kept>)>,
    changes: Vec<Change>,
    /// Removals in streams to which a topic belonged under another configuration.
    elsewhere: Vec<(usize, Change)>,
    /// Topics whose messages found no room.
    refused: Vec<Box<str>>,
}

impl Retained {
    /// Loads the retained messages of the streams, and removes those that cannot be kept.
    pub fn load(
        streams: &[Arc<dyn Stream>],
        routes: &Streams,
        limits: (usize, usize),
        failures: &Failures,
    ) -> Self {
        let (messages_max, bytes_max) = limits;
        let mut removed: Vec<Vec<Change>> = vec![Vec::new(); streams.len()];
        let mut found = Vec::new();
        for (number, stream) in streams.iter().enumerate() {
            for (blob, bytes) in blobs::load(&**stream, KIND) {
                let decoded = decode(&bytes).filter(|(message, _)| id(message.topic()) == blob.id());
                let Some((message, publisher)) = decoded else {
                    failures.report("mqtt: a retained message cannot be read, removed", 1, stream.name(), "");
                    blob.remove(&mut removed[number]);
                    continue;
                };
                let topic = lookup::key(message.topic());
                let message = message.into();
                found.push((topic, Kept { message, publisher, stream: number, offset: Offset(0), blob }));
            }
        }
        // Put into the map in its order: one by one, each would be searched for among all.
        found.sort_by(|(a, _), (b, _)| a.cmp(b));
        let (mut topics, mut sum): (Vec<(Box<str>, Kept)>, usize) = (Vec::new(), 0);
        for (topic, mut kept) in found {
            if let Some((_, known)) = topics.last_mut().filter(|(known, _)| *known == topic) {
                // The topic moved to another stream, and has a newer one there.
                if Arc::ptr_eq(routes.route(kept.message.topic()), &streams[kept.stream]) {
                    sum = sum - known.len() + kept.len();
                    std::mem::swap(known, &mut kept);
                }
                kept.blob.remove(&mut removed[kept.stream]);
            } else if topics.len() >= messages_max || sum + kept.len() > bytes_max {
                let topic = format!("topic {}", kept.message.topic());
                failures.report("mqtt: no room for a retained message", 1, &topic, "");
                kept.blob.remove(&mut removed[kept.stream]);
            } else {
                sum += kept.len();
                topics.push((topic, kept));
            }
        }
        for (stream, removed) in streams.iter().zip(&removed) {
            super::append_unawaited(&**stream, removed);
        }
        Self { topics: topics.into_iter().collect(), bytes: sum, messages_max, bytes_max }
    }

    fn take(&mut self, topic: &str) -> Option<Kept> {
        let old = self.topics.remove(topic)?;
        self.bytes -= old.len();
        Some(old)
    }

    /// Adds a message. Returns false if there is no room.
    fn insert(&mut self, topic: Box<str>, kept: Kept) -> bool {
        let bytes = self.bytes + kept.len();
        if self.topics.len() >= self.messages_max || bytes > self.bytes_max {
            return false;
        }
        self.bytes = bytes;
        self.topics.insert(topic, kept);
        true
    }

    /// Returns all messages by their ids, for the sessions of the last run.
    pub fn by_id(&self) -> HashMap<Id, Arc<Message>> {
        self.topics.values().map(|kept| (kept.blob.id(), kept.message.clone())).collect()
    }

    /// Returns whether the message is still the retained one of its topic.
    pub fn is_current(&self, key: &str, message: &Arc<Message>) -> bool {
        self.topics.get(key).is_some_and(|kept| Arc::ptr_eq(&kept.message, message))
    }

    /// Returns the number of messages and their bytes.
    pub fn sizes(&self) -> (usize, usize) {
        (self.topics.len(), self.bytes)
    }

    /// Continues a lookup for at most `steps_max` topics, since publishers wait meanwhile.
    pub fn look(&self, lookup: &mut Lookup, steps_max: usize, found: impl FnMut(&str, &Kept) -> bool) {
        lookup.advance(&self.topics, steps_max, found);
    }
}

/// What an append of `messages` of one client to stream `number` retains; `None`: nothing.
pub fn stage<'b>(
    broker: &'b Broker,
    number: usize,
    publisher: &'b Arc<str>,
    messages: &[NewMessage<'_>],
) -> Option<Staged<'b>> {
    let to_retain = || messages.iter().enumerate().filter(|(_, message)| message.flags & flags::RETAIN != 0);
    to_retain().next()?;
    let mut staged = Staged {
        retained: broker.retained(),
        publisher,
        before: Vec::new(),
        changes: Vec::new(),
        elsewhere: Vec::new(),
        refused: Vec::new(),
    };
    for (i, message) in to_retain() {
        staged.set(number, i, message);
    }
    Some(staged)
}

impl Staged<'_> {
    /// Stores, replaces or, for an empty payload, removes a message. If there is no room, the topic has
    /// no retained message afterwards, rather than an old one.
    fn set(&mut self, stream: usize, i: usize, new: &NewMessage<'_>) {
        let topic = lookup::key(new.topic);
        let old = self.retained.take(&topic);
        let mut old_here = None;
        match &old {
            Some(old) if old.stream == stream => old_here = Some(old.blob),
            Some(old) => {
                let mut removed = Vec::new();
                old.blob.remove(&mut removed);
                self.elsewhere.extend(removed.into_iter().map(|change| (old.stream, change)));
            }
            None => {}
        }
        self.before.push((topic.clone(), i, old));
        let mut written = false;
        if !new.payload.is_empty() {
            let bytes = encode(new, self.publisher);
            let blob = Blob::new(KIND, id(new.topic), &bytes);
            let message = Arc::new(Message::of_new(new));
            let publisher = Some(self.publisher.clone());
            let kept = Kept { message, publisher, stream, offset: Offset(u64::MAX), blob };
            written = self.retained.insert(topic.clone(), kept);
            if written {
                blob.write(&bytes, old_here.as_ref(), &mut self.changes);
            } else {
                self.refused.push(new.topic.into());
            }
        }
        if let Some(old) = old_here.filter(|_| !written) {
            old.remove(&mut self.changes);
        }
    }

    /// Returns the changes that the append must contain.
    pub fn changes(&self) -> &[Change] {
        &self.changes
    }

    /// Records that the append was accepted.
    pub fn done(mut self, broker: &Broker, appended: Appended) {
        for (topic, i, _) in std::mem::take(&mut self.before) {
            if let Some(kept) = self.retained.topics.get_mut(&topic) {
                kept.offset = Offset(appended.first.0 + i as u64);
            }
        }
        for (stream, change) in std::mem::take(&mut self.elsewhere) {
            super::append_unawaited(&*broker.streams[stream], &[change]);
        }
        for topic in &self.refused {
            broker.counters.retained_full.increment(1);
            let detail = format!("topic {topic}");
            broker.failures.report_client("mqtt: no room for a retained message", "", 1, &detail, "");
        }
    }
}

impl Drop for Staged<'_> {
    fn drop(&mut self) {
        // The last first: a topic may be in one append twice.
        for (topic, _, old) in std::mem::take(&mut self.before).into_iter().rev() {
            self.retained.take(&topic);
            if let Some(old) = old {
                // It had its room before.
                self.retained.bytes += old.len();
                self.retained.topics.insert(topic, old);
            }
        }
    }
}

/// Returns the id of a topic, which may be longer than a key of the state.
pub fn id(topic: &str) -> Id {
    let digest: [u8; 32] = Sha256::digest(topic).into();
    *digest.first_chunk().expect("it is longer")
}

fn encode(message: &NewMessage<'_>, publisher: &str) -> Vec<u8> {
    let NewMessage { topic, payload, properties, flags, received_us, .. } = *message;
    let parts = topic.len() + properties.len() + publisher.len() + payload.len();
    let mut bytes = Vec::with_capacity(HEAD_BYTES + parts);
    bytes.push(FORMAT);
    bytes.extend(flags.to_be_bytes());
    bytes.extend(received_us.to_be_bytes());
    bytes.extend((topic.len() as u16).to_be_bytes());
    bytes.extend((properties.len() as u32).to_be_bytes());
    bytes.extend((publisher.len() as u16).to_be_bytes());
    bytes.extend_from_slice(topic.as_bytes());
    bytes.extend_from_slice(properties);
    bytes.extend_from_slice(publisher.as_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// The message, and who published it.
fn decode(bytes: &[u8]) -> Option<(Message, Option<Arc<str>>)> {
    let (format, rest) = bytes.split_first()?;
    let (flags, rest) = rest.split_first_chunk()?;
    let (received_us, rest) = rest.split_first_chunk()?;
    let (topic_len, rest) = rest.split_first_chunk()?;
    let (properties_len, rest) = rest.split_first_chunk()?;
    let (publisher_len, rest) = match *format {
        FORMAT => rest.split_first_chunk()?,
        FORMAT_1 => (&[0; 2], rest),
        _ => return None,
    };
    let (topic, rest) = rest.split_at_checked(u16::from_be_bytes(*topic_len).into())?;
    let (properties, rest) = rest.split_at_checked(u32::from_be_bytes(*properties_len) as usize)?;
    let (publisher, payload) = rest.split_at_checked(u16::from_be_bytes(*publisher_len).into())?;
    let (topic, publisher) = (std::str::from_utf8(topic).ok()?, std::str::from_utf8(publisher).ok()?);
    let (flags, received_us) = (u16::from_be_bytes(*flags), u64::from_be_bytes(*received_us));
    crate::properties::is_valid(properties).then(|| {
        let message = Message::new(topic, payload, properties, flags, received_us);
        (message, (*format == FORMAT).then(|| publisher.into()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::Partition;

    /// Records of format 1 are on disks: they say all but who published the message.
    #[test]
    fn a_record_of_an_earlier_version_is_read_and_is_nobodys_own() {
        let new = NewMessage {
            topic: "a/b",
            payload: b"21",
            properties: b"",
            route: "",
            device: "",
            partition: Partition(0),
            flags: flags::RETAIN | 1,
            received_us: 7,
            event_us: 0,
        };
        let kept = |bytes: &[u8]| {
            let (message, publisher) = decode(bytes).expect("it can be read");
            let blob = Blob::new(KIND, id("a/b"), bytes);
            Kept { message: message.into(), publisher, stream: 0, offset: Offset(0), blob }
        };
        let now = kept(&encode(&new, "c"));
        assert!(now.is_of("c") && !now.is_of("d"));
        let record = b"\x01\x00\x05\0\0\0\0\0\0\0\x07\0\x03\0\0\0\0a/b21";
        assert_eq!(flags::RETAIN | 1, 5, "as the record has it");
        let before = kept(record);
        assert!(!before.is_of("c") && !before.is_of(""));
        for kept in [&now, &before] {
            let message = &kept.message;
            assert_eq!((message.topic(), message.payload(), message.received_us()), ("a/b", &b"21"[..], 7));
            assert_eq!((message.qos, message.retain), (1, true));
        }
        assert_eq!(now.len(), before.len() + 1, "the publisher counts");
        assert!(decode(&record[..record.len() - 3]).is_none() && decode(b"\x03").is_none());
    }
}
