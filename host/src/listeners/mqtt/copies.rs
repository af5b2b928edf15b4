//! Copies of messages that retention would remove while sessions still wait for them.
//!
//! Retention asks before it removes messages ([`OnLag::Ask`]). Messages for which a persistent session
//! waits are then appended to the broker's stream, once for all sessions, and synced. Only then may the
//! segment be removed. A session's references stay as they are: a copy is found by the original place of
//! its message. After a restart live delivery reads the copies first, as if they were still in their
//! stream.
//!
//! The broker's stream is kept small in the same way: before its oldest segment is removed, the copies
//! in it for which a session still waits are appended again. All other copies are removed with the
//! segment.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::acks::Stopped;
use super::lineages::Lineages;
use super::lock_order::{Locked, Rank, in_order};
use super::outbound::{Message, Place};
use super::picks::Picks;
use super::session::{Change, Session};
use super::{Broker, Deps, borrowed};
use crate::batch::{Batch, MessageRef, Offset, Partition};
use crate::stream::{AppendError, Attachment, Identity, NewMessage, OnLag, Read, ReadError, Stream};

/// Name of the reader that retention asks.
pub const READER: &str = "mqtt-queues";
/// Key in the state of the broker's stream: `co` + stream. Messages below the stored offset for which
/// sessions waited have been copied, or counted as lost.
const HANDLED: &[u8] = b"co";
/// Key in the state of the broker's stream: `cv` + stream. Lists the copies whose messages the stream no
/// longer has, 16 bytes each: the first such offset in the stream, and the offset in the broker's stream
/// below which the copies lie.
const VOID: &[u8] = b"cv";
/// Most entries. Each comes from a start on a stream that had lost messages, and is removed with a
/// segment of the broker's stream.
const VOID_MAX: usize = 1_024;
/// Bytes of copies in one append, which is then synced.
const CHUNK_BYTES: usize = 256 << 10;
const CHUNK_BATCHES: usize = 64;
/// Number of offsets that are examined together.
const SLICE_OFFSETS: u64 = 1 << 18;
/// Number of copies that are delivered together after a restart.
const REPLAY_MESSAGES: usize = 256;
const REPLAY_BYTES: u64 = 4 << 20;
/// Interval of checks for changes without a notification.
const LOOK_EVERY: Duration = Duration::from_millis(50);

pub struct Copies {
    /// The broker's stream.
    stream: Arc<dyn Stream>,
    identities: Arc<[Identity]>,
    bytes_max: u64,
    index: Mutex<Index>,
    /// Held by the thread that examines all sessions.
    looking: Mutex<()>,
    /// Retention's readers by stream, the last for the broker's own.
    readers: Box<[Box<dyn Attachment>]>,
}

#[derive(Default)]
struct Index {
    copies: BTreeMap<Place, Copy>,
    bytes: u64,
    handled: Box<[u64]>,
}

struct Copy {
    /// Offset in the broker's stream.
    offset: u64,
    len: u32,
    wanted: Wanted,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Wanted {
    No,
    Waits,
    /// The message may have been sent, so it no longer expires.
    Begun,
}

impl Wanted {
    fn of(is_begun: bool) -> Self {
        if is_begun { Self::Begun } else { Self::Waits }
    }
}

/// Copies of messages of one stream.
pub struct Page {
    /// The copies, by offset in that stream.
    pub found: Vec<(u64, Found)>,
    /// Number of copies that can no longer be read.
    pub lost: u64,
    /// Start of the next page.
    pub next: u64,
}

/// A message: a batch and an index in it.
pub type Found = (Batch, usize);

impl Copies {
    pub fn new(deps: &Deps, bytes_max: u64, lineages: &mut Lineages) -> Self {
        let (streams, stream) = (deps.ingest.streams().clone(), deps.broker.clone());
        let identities: Arc<[Identity]> = streams.iter().map(|stream| stream.identity()).collect();
        let mut handled: Box<[u64]> = vec![0; streams.len()].into();
        for (number, (handled, identity)) in handled.iter_mut().zip(&*identities).enumerate() {
            let known = stream.state(&handled_key(identity)).pop();
            *handled = known.and_then(|(_, value)| value.try_into().ok()).map_or(0, u64::from_be_bytes);
            let valid = lineages.valid()[number];
            if *handled > valid {
                *handled = valid;
                lineages.change((handled_key(identity), Some(valid.to_be_bytes().into())));
            }
        }
        let attach = |stream: &Arc<dyn Stream>| stream.attach(READER, stream.bounds().start, OnLag::Ask);
        Self {
            readers: streams.iter().chain([&stream]).map(attach).collect(),
            index: Mutex::new(Index { handled, ..Index::default() }),
            looking: Mutex::default(),
            identities,
            bytes_max,
            stream,
        }
    }

    /// Finds the copies that the last run left. Called before clients are served.
    pub async fn load(&self, lineages: &mut Lineages) -> Result<(), Arc<str>> {
        let bounds = self.stream.bounds();
        let known: Vec<Void> =
            self.identities.iter().map(|identity| Void::read(&*self.stream, identity)).collect();
        let mut is_new = vec![false; known.len()];
        let mut cursor = self.stream.cursor(bounds.start);
        // All that is not a message is skipped where there is none.
        while cursor.position() < bounds.end {
            match cursor.try_next().await {
                Ok(Some(Read::Batch(batch))) => {
                    let mut index = self.index();
                    for message in batch.messages() {
                        let Some(place) = self.place(message.device()) else { continue };
                        let number = usize::from(place.stream);
                        if known[number].has(place.offset, message.offset().0) {
                            continue;
                        }
                        if place.offset >= lineages.valid()[number] {
                            is_new[number] = true;
                            continue;
                        }
                        index.insert(place, message.offset().0, len_of(message));
                    }
                }
                Ok(Some(Read::Gap { .. })) => {}
                Ok(None) => break,
                Err(ReadError::Stopped(reason)) => return Err(reason),
                Err(error) => return Err(error.to_string().into()),
            }
        }
        for (number, mut void) in known.into_iter().enumerate().filter(|(number, _)| is_new[*number]) {
            void.add(lineages.valid()[number], &bounds);
            lineages.change((void_key(&self.identities[number]), Some(void.bytes())));
        }
        Ok(())
    }

    /// Returns the number of copies and their bytes.
    pub fn sizes(&self) -> (usize, u64) {
        let index = self.index();
        (index.copies.len(), index.bytes)
    }

    fn find(&self, place: Place) -> Option<u64> {
        self.index().copies.get(&place).map(|copy| copy.offset)
    }

    fn index(&self) -> Locked<MutexGuard<'_, Index>> {
        in_order(Rank::Last, || lock(&self.index))
    }

    /// Returns the device name under which a copy is written.
    fn name(&self, place: Place) -> String {
        let Identity { log, generation, .. } = &self.identities[usize::from(place.stream)];
        format!("{}/{generation}/{}", log.simple(), place.offset)
    }

    fn place(&self, name: &str) -> Option<Place> {
        let (stream, offset) = name.rsplit_once('/')?;
        let (log, generation) = stream.split_once('/')?;
        let (log, generation): (uuid::Uuid, u32) = (log.parse().ok()?, generation.parse().ok()?);
        let of = |it: &Identity| it.log == log && it.generation == generation;
        let stream = self.identities.iter().position(of)? as u16;
        Some(Place { stream, offset: offset.parse().ok()? })
    }

    /// Appends copies, with `change` in the last append, and waits for the sync. Returns those that are
    /// too large.
    async fn append(
        &self,
        chunk: &mut Vec<(Place, Found)>,
        change: Option<Change>,
    ) -> Result<Vec<Place>, Stopped> {
        let names: Vec<String> = chunk.iter().map(|(place, _)| self.name(*place)).collect();
        let messages = chunk.iter().zip(&names).map(|((_, (batch, at)), name)| {
            let message = batch.message(*at);
            NewMessage {
                topic: message.topic(),
                payload: message.payload(),
                properties: message.properties(),
                route: "",
                device: name,
                partition: Partition(0),
                flags: message.entry.flags,
                received_us: message.entry.received_us,
                event_us: message.entry.event_us,
            }
        });
        let messages: Vec<NewMessage<'_>> = messages.collect();
        let mut too_large = Vec::new();
        // All at once; else one by one, for the one that is too large.
        let mut parts: Vec<Range<usize>> = Vec::from_iter((!chunk.is_empty()).then_some(0..chunk.len()));
        while let Some(part) = parts.pop() {
            // The reserve is for the sessions themselves.
            while !self.stream.has_room() {
                tokio::time::sleep(LOOK_EVERY).await;
            }
            let changes = change.as_slice().get(..usize::from(parts.is_empty())).unwrap_or_default();
            let appended = match self.stream.append(&messages[part.clone()], &borrowed(changes)) {
                Ok(appended) => appended,
                Err(AppendError::Full | AppendError::NoSpace) => {
                    parts.push(part);
                    self.stream.writable().await;
                    continue;
                }
                Err(AppendError::TooLarge(_)) if part.len() > 1 => {
                    parts.extend(part.rev().map(|at| at..at + 1));
                    continue;
                }
                Err(AppendError::TooLarge(_)) => {
                    too_large.push(chunk[part.start].0);
                    continue;
                }
                Err(AppendError::Stopped(_)) => return Err(Stopped),
            };
            let mut durable = self.stream.durable();
            durable.wait_for(|durable| *durable >= appended.ticket).await.map_err(|_| Stopped)?;
            let mut index = self.index();
            for (offset, at) in (appended.first.0..).zip(part) {
                let (place, (batch, of)) = &chunk[at];
                index.insert(*place, offset, len_of(batch.message(*of)));
            }
        }
        chunk.clear();
        Ok(too_large)
    }

    fn handled(&self, stream: usize, upto: u64) -> Change {
        (handled_key(&self.identities[stream]), Some(upto.to_be_bytes().into()))
    }

    /// Returns how many messages of a range were neither copied nor counted as lost.
    pub fn not_handled(&self, stream: usize, range: &Range<u64>) -> u64 {
        range.end.saturating_sub(self.index().handled[stream].max(range.start))
    }

    /// Returns the next copies of messages of a stream in `range`.
    pub async fn page(&self, stream: usize, range: Range<u64>) -> Result<Page, Arc<str>> {
        let place = |offset| Place { stream: stream as u16, offset };
        let mut picks = CopyPicks::default();
        let (mut places, mut bytes, mut next) = (Vec::new(), 0, range.end);
        for (place, copy) in self.index().copies.range(place(range.start)..place(range.end)) {
            bytes += u64::from(copy.len);
            if places.len() == REPLAY_MESSAGES || (bytes > REPLAY_BYTES && !places.is_empty()) {
                next = place.offset;
                break;
            }
            places.push(*place);
        }
        for place in places {
            picks.add(self, place);
        }
        let (mut found, mut lost) = (BTreeMap::new(), 0);
        while let Some(some) = picks.next(self).await? {
            for (place, copy) in some {
                lost += u64::from(copy.is_none());
                found.extend(copy.map(|copy| (place.offset, copy)));
            }
        }
        Ok(Page { found: found.into_iter().collect(), lost, next })
    }
}

/// Copies of messages that a stream has lost: pairs of the first lost offset in the stream and the end
/// of the copies in the broker's stream.
#[derive(Debug, Default, PartialEq, Eq)]
struct Void(Vec<(u64, u64)>);

impl Void {
    fn read(broker: &dyn Stream, identity: &Identity) -> Self {
        let value = broker.state(&void_key(identity)).pop().map(|(_, value)| value).unwrap_or_default();
        let number = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_be_bytes);
        Self(value.chunks_exact(16).map(|pair| (number(&pair[..8]), number(&pair[8..]))).collect())
    }

    fn bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|(from, below)| [from.to_be_bytes(), below.to_be_bytes()].concat()).collect()
    }

    fn has(&self, offset: u64, copy: u64) -> bool {
        self.0.iter().any(|(from, below)| offset >= *from && copy < *below)
    }

    /// Marks all copies in the part `bounds` of the broker's stream as void from this offset on.
    fn add(&mut self, from: u64, bounds: &Range<Offset>) {
        // What they say is gone with its segment, or is in what is said now.
        self.0.retain(|(known, below)| *below > bounds.start.0 && *known < from);
        self.0.push((from, bounds.end.0));
        let more = self.0.len().saturating_sub(VOID_MAX);
        self.0.drain(..more);
    }
}

impl Index {
    fn insert(&mut self, place: Place, offset: u64, len: u32) {
        let before = self.copies.insert(place, Copy { offset, len, wanted: Wanted::Begun });
        self.bytes = self.bytes + u64::from(len) - before.map_or(0, |before| before.len.into());
    }

    fn remove(&mut self, place: Place) {
        self.bytes -= self.copies.remove(&place).map_or(0, |copy| copy.len.into());
    }

    fn retain(&mut self, mut stays: impl FnMut(&Place, &mut Copy) -> bool) {
        self.copies.retain(|place, copy| stays(place, copy));
        self.bytes = self.copies.values().map(|copy| u64::from(copy.len)).sum();
    }
}

/// Copies that are to be read.
#[derive(Default)]
pub struct CopyPicks {
    picks: Picks,
    places: BTreeMap<u64, Place>,
}

impl CopyPicks {
    pub fn is_empty(&self) -> bool {
        self.picks.is_empty()
    }

    /// Adds a copy. Returns false if there is none.
    pub fn add(&mut self, copies: &Copies, place: Place) -> bool {
        let Some(offset) = copies.find(place) else { return false };
        self.picks.add(offset);
        self.places.insert(offset, place);
        true
    }

    /// Returns the next copies, in any order, with `None` for one that is lost; returns `None` when all
    /// were read. Cancel safe, and can be called again.
    pub async fn next(&mut self, copies: &Copies) -> Result<Option<Vec<(Place, Option<Found>)>>, Arc<str>> {
        let Some(picked) = self.picks.next(&*copies.stream).await? else { return Ok(None) };
        let mut found = Vec::new();
        for offset in picked.gone {
            // It was perhaps appended again meanwhile.
            if let Some(place) = self.places.remove(&offset)
                && !(copies.find(place) != Some(offset) && self.add(copies, place))
            {
                found.push((place, None));
            }
        }
        let (batch, at) = picked.found.unzip();
        for (at, batch) in at.iter().flatten().zip(batch.iter().cycle()) {
            let place = self.places.remove(&batch.message(*at).offset().0);
            found.extend(place.map(|place| (place, Some((batch.clone(), *at)))));
        }
        Ok(Some(found))
    }
}

/// Answers retention of one stream, or, with the last number, of the broker's own.
pub async fn run(broker: Arc<Broker>, number: usize) {
    let mut asked = broker.copies.readers[number].asked();
    let mut done = 0;
    loop {
        let answered = async {
            let upto = asked.wait_for(|upto| upto.0 > done).await.map_err(|_| Stopped)?.0;
            if number < broker.streams.len() {
                save(&broker, number, done..upto).await?;
            } else {
                renew(&broker, upto).await?;
            }
            Ok::<_, Stopped>(upto)
        };
        tokio::select! {
            answered = answered => match answered {
                Ok(upto) => done = upto,
                // Who serves from the stream says so.
                Err(Stopped) => return,
            },
            () = broker.shutdown.cancelled() => return,
        }
    }
}

/// Copies the messages in a range for which sessions wait.
async fn save(broker: &Arc<Broker>, number: usize, range: Range<u64>) -> Result<(), Stopped> {
    // What the live delivery has yet to offer, nobody waits for yet.
    while broker.live.positions(&broker.streams)[number] < range.end {
        tokio::time::sleep(LOOK_EVERY).await;
    }
    let mut from = broker.streams[number].bounds().start.0.max(range.start);
    while from < range.end {
        let to = range.end.min(from + SLICE_OFFSETS);
        let looked = broker.clone();
        let (any, wanted) = blocking(move || looked.copies.wanted(&looked, number, from..to)).await;
        copy(broker, number, wanted).await?;
        broker.copies.index().handled[number] = to;
        if any {
            handled(&*broker.broker, broker.copies.handled(number, to)).await?;
        }
        broker.copies.readers[number].advance(Offset(to));
        from = to;
    }
    Ok(())
}

/// Appends a change without waiting for room, because only counters after a crash depend on it.
async fn handled(stream: &dyn Stream, change: Change) -> Result<(), Stopped> {
    let Ok(appended) = stream.append(&[], &borrowed(&[change])) else { return Ok(()) };
    let mut durable = stream.durable();
    durable.wait_for(|durable| *durable >= appended.ticket).await.map(drop).map_err(|_| Stopped)
}

/// Copies messages of one stream, by offset, that have no copy yet.
async fn copy(broker: &Arc<Broker>, number: usize, wanted: BTreeMap<u64, Wanted>) -> Result<(), Stopped> {
    let (copies, stream) = (&broker.copies, &*broker.streams[number]);
    let mut picks = Picks::default();
    wanted.keys().for_each(|offset| picks.add(*offset));
    let (mut chunk, mut bytes, mut batches) = (Vec::new(), 0, 0);
    let (mut lost, mut expired) = (BTreeSet::new(), BTreeSet::new());
    let place = |offset| Place { stream: number as u16, offset };
    let (mut is_freed, mut done) = (false, 0);
    while let Some(picked) = picks.next(stream).await.map_err(|_| Stopped)? {
        done = picked.gone.last().map_or(done, |last| done.max(last + 1));
        lost.extend(picked.gone.into_iter().map(place));
        let (batch, at) = picked.found.unzip();
        for (at, batch) in at.iter().flatten().zip(batch.iter().cycle()) {
            let message = batch.message(*at);
            let offset = message.offset().0;
            done = done.max(offset + 1);
            if wanted[&offset] == Wanted::Waits && is_expired(broker, message) {
                expired.insert(place(offset));
                continue;
            }
            let len = len_of(message) as usize;
            let is_full = || copies.sizes().1 + (bytes + len) as u64 > copies.bytes_max;
            if is_full() && !is_freed {
                is_freed = true;
                let looked = broker.clone();
                blocking(move || looked.copies.free(&looked)).await;
            }
            if is_full() {
                lost.insert(place(offset));
                continue;
            }
            bytes += len;
            chunk.push((place(offset), (batch.clone(), *at)));
        }
        batches += 1;
        if bytes >= CHUNK_BYTES || batches >= CHUNK_BATCHES || picks.is_empty() {
            let count = chunk.len();
            // What is lost is counted first.
            let change = lost.is_empty().then(|| copies.handled(number, done));
            let too_large = copies.append(&mut chunk, change).await?;
            broker.counters.copied.increment((count - too_large.len()) as u64);
            lost.extend(too_large);
            broker.counters.expired.increment(forget(broker, std::mem::take(&mut expired)).await);
            give_up(broker, stream.name(), std::mem::take(&mut lost)).await;
            // Retention goes on meanwhile.
            copies.index().handled[number] = done;
            copies.readers[number].advance(Offset(done));
            (bytes, batches) = (0, 0);
        }
    }
    Ok(())
}

/// Makes the sessions forget messages that retention removes and that have no copy. Counts and reports
/// them.
async fn give_up(broker: &Arc<Broker>, stream: &str, lost: BTreeSet<Place>) {
    let lost = forget(broker, lost).await;
    if lost > 0 {
        broker.counters.gap.increment(lost);
        let detail = format!("stream {stream}");
        let kind = "mqtt: retention took messages that wait for sessions, and they could not be copied";
        broker.failures.report(kind, lost, &detail, "");
    }
}

/// Makes the sessions forget lost messages. Returns the number of lost deliveries.
async fn forget(broker: &Arc<Broker>, gone: BTreeSet<Place>) -> u64 {
    if gone.is_empty() {
        return 0;
    }
    let broker = broker.clone();
    let is_gone = move |place: Place| gone.contains(&place);
    blocking(move || broker.sessions.all().iter().map(|session| forget_in(session, &is_gone)).sum()).await
}

/// Makes one session forget lost messages, and counts them.
fn forget_in(session: &Session, is_gone: &dyn Fn(Place) -> bool) -> u64 {
    let lost = session.outbox().forget(is_gone);
    session.activity().gone(lost);
    lost
}

/// Appends the copies below `upto` that are still needed again, and frees all others.
async fn renew(broker: &Arc<Broker>, upto: u64) -> Result<(), Stopped> {
    let copies = &broker.copies;
    let looked = broker.clone();
    blocking(move || looked.copies.free(&looked)).await;
    let mut picks = CopyPicks::default();
    let old: Vec<(Place, Wanted)> = {
        let index = copies.index();
        let old = index.copies.iter().filter(|(_, copy)| copy.offset < upto);
        old.map(|(place, copy)| (*place, copy.wanted)).collect()
    };
    for (place, _) in &old {
        picks.add(copies, *place);
    }
    let wanted: BTreeMap<Place, Wanted> = old.into_iter().collect();
    let reader = &copies.readers[broker.streams.len()];
    let (mut chunk, mut bytes, mut batches) = (Vec::new(), 0, 0);
    let (mut expired, mut done) = (BTreeSet::new(), 0);
    while let Some(found) = picks.next(copies).await.map_err(|_| Stopped)? {
        for (place, copy) in found {
            // Whoever waits for it finds that it is no more.
            let Some((batch, at)) = copy else {
                copies.index().remove(place);
                continue;
            };
            let message = batch.message(at);
            done = done.max(message.offset().0 + 1);
            if wanted[&place] == Wanted::Waits && is_expired(broker, message) {
                expired.insert(place);
            } else {
                bytes += len_of(message) as usize;
                chunk.push((place, (batch, at)));
            }
        }
        batches += 1;
        if bytes >= CHUNK_BYTES || batches >= CHUNK_BATCHES || picks.is_empty() {
            let too_large = copies.append(&mut chunk, None).await?;
            too_large.iter().chain(&expired).for_each(|place| copies.index().remove(*place));
            give_up(broker, copies.stream.name(), too_large.into_iter().collect()).await;
            broker.counters.expired.increment(forget(broker, std::mem::take(&mut expired)).await);
            reader.advance(Offset(done));
            (bytes, batches) = (0, 0);
        }
    }
    reader.advance(Offset(upto));
    Ok(())
}

impl Copies {
    /// Returns the messages in a range of a stream for which sessions wait and that have no copy, and
    /// whether there is a persistent session.
    fn wanted(&self, broker: &Broker, number: usize, range: Range<u64>) -> (bool, BTreeMap<u64, Wanted>) {
        let _one_at_a_time = in_order(Rank::Looking, || lock(&self.looking));
        let mut wanted = BTreeMap::new();
        let any = look(broker, |places| {
            for (place, is_begun) in places {
                if usize::from(place.stream) == number && range.contains(&place.offset) {
                    let known = wanted.entry(place.offset).or_insert(Wanted::Waits);
                    *known = Wanted::of(*is_begun).max(*known);
                }
            }
        });
        let index = self.index();
        wanted.retain(|offset, _| {
            !index.copies.contains_key(&Place { stream: number as u16, offset: *offset })
        });
        (any, wanted)
    }

    /// Forgets copies for which no session waits.
    fn free(&self, broker: &Broker) {
        let _one_at_a_time = in_order(Rank::Looking, || lock(&self.looking));
        let positions = broker.live.positions(&broker.streams);
        for (place, copy) in &mut self.index().copies {
            // After a restart: not offered to the sessions yet.
            let is_ahead = place.offset >= positions[usize::from(place.stream)];
            copy.wanted = if is_ahead { Wanted::Begun } else { Wanted::No };
        }
        look(broker, |places| {
            let mut index = self.index();
            for (place, is_begun) in places {
                if let Some(copy) = index.copies.get_mut(place) {
                    copy.wanted = Wanted::of(*is_begun).max(copy.wanted);
                }
            }
        });
        // A copy that was made meanwhile counts as wanted.
        self.index().retain(|_, copy| copy.wanted != Wanted::No);
    }
}

/// Passes to `see` the messages for which each persistent session waits, and whether their sending had
/// begun. Returns false if there is no persistent session. Messages that move between sessions meanwhile
/// are seen too.
fn look(broker: &Broker, mut see: impl FnMut(&[(Place, bool)])) -> bool {
    let age_us = u64::try_from(broker.config().queue_age_max.0.as_micros()).unwrap_or(u64::MAX);
    let oldest_us = broker.clock.now_us().saturating_sub(age_us);
    let (mut any, mut places) = (false, Vec::new());
    broker.live.note_passed();
    for session in broker.sessions.all() {
        let mut outbox = session.outbox();
        let dropped = outbox.drop_older(oldest_us);
        any |= outbox.references(|place, is_begun| places.push((place, is_begun)));
        drop(outbox);
        if dropped > 0 {
            broker.counters.queue_age.increment(dropped);
        }
        if !places.is_empty() {
            see(&places);
            places.clear();
        }
    }
    let passed: Vec<_> = broker.live.passed().into_iter().map(|place| (place, true)).collect();
    see(&passed);
    any
}

fn is_expired(broker: &Broker, message: MessageRef<'_>) -> bool {
    Message::of(message).lifetime(&broker.clock).is_none()
}

/// Returns the size of a message for the bound in bytes.
fn len_of(message: MessageRef<'_>) -> u32 {
    Message::len_of(message)
}

fn handled_key(identity: &Identity) -> Vec<u8> {
    [HANDLED, identity.log.as_bytes(), &identity.generation.to_be_bytes()].concat()
}

fn void_key(identity: &Identity) -> Vec<u8> {
    [VOID, identity.log.as_bytes(), &identity.generation.to_be_bytes()].concat()
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    // A panic ends the process.
    tokio::task::spawn_blocking(work).await.expect("it does not panic")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
