//! The streams that a sink of a pipeline reads, one after the other.
//!
//! The sinks of a pipeline that has several read the pipeline's out stream, which the steps write once. A
//! pipeline with one sink has none: the sink reads the source, and the steps run in front of it. When the
//! config gives a pipeline more sinks, or fewer, each sink goes from one stream to the other at one place of
//! both: in the source, by partition, below which the out stream has what the steps made; and the offset in
//! the out stream behind that. So the legs of a sink's road are
//!
//! ```text
//! source until F1 | out stream from O1 until O2 | source from F2 until F3 | out stream from O3 ...
//! ```
//!
//! and each message of the source comes to the sink by one leg. Roads are entries of the state of the dead
//! letters, written before anything is delivered by them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::dead_letters::Error;
use super::letter::Names;
use crate::batch::Offset;
use crate::stream::{AppendError, Attachment, Delivered, Identity, OnLag, StateChange, Stream};

/// Begin of the state keys; then the pipeline, the log and the generation of the source, and the id of a
/// sink, or nothing for the pipeline itself.
const KEY: &str = "roads/";
/// In place of the id of a sink, which has no space in it: the record of the tables.
const TABLES: &str = " routes";
/// Tables that are remembered. What lies before the oldest goes by that.
const TABLES_MAX: usize = 32;
/// Legs of a road that are remembered. Those that a sink has behind it count too: its database may be an older one.
const LEGS_MAX: usize = 16;

/// One after the other, never empty: the last one has no end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Road {
    pub legs: Vec<Leg>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "of", rename_all = "snake_case")]
pub enum Leg {
    /// Offsets by partition. `from` is empty where the sink's own position alone says where it begins.
    Source {
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        from: Vec<Offset>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        until: Option<Vec<Offset>>,
        /// The records before were lost: a sink that has positions in the out stream has left the source, wherever
        /// its position there is.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        is_guess: bool,
    },
    /// Offsets of all partitions.
    Out {
        #[serde(with = "log_id")]
        log: Uuid,
        from: Offset,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        until: Option<Offset>,
    },
}

/// Where the steps began to write to the out stream: what lies before was delivered by other legs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Begun {
    #[serde(with = "log_id")]
    log: Uuid,
    from: Offset,
}

/// What the routes of a pipeline led to when its steps wrote messages to the out stream, from an offset of it on: the
/// ids of sinks by route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    pub from: Offset,
    pub to: BTreeMap<String, Vec<String>>,
}

/// The tables of one out stream, oldest first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Tables {
    #[serde(with = "log_id")]
    log: Uuid,
    tables: Vec<Table>,
}

/// What a pipeline has recorded. Sinks that are not in the config any more stay: they may come back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Roads {
    begun: Option<Begun>,
    tables: Option<Tables>,
    /// The road of each sink, by its id.
    of: BTreeMap<String, Road>,
}

/// The out stream of a pipeline, as a start finds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutNow {
    pub log: Uuid,
    pub start: Offset,
    pub end: Offset,
    /// What the steps have written, by partition of the source, as the out stream says itself.
    pub reached: Vec<Offset>,
    /// Whether the steps write to it: the pipeline has several sinks.
    pub is_written: bool,
}

impl Road {
    fn begin() -> Self {
        Self { legs: vec![Leg::Source { from: Vec::new(), until: None, is_guess: false }] }
    }

    /// Ends the last leg, which is of the out stream, and goes on with the source.
    fn back_to_source(&mut self, end: Offset, reached: &[Offset]) {
        if let Some(Leg::Out { until: until @ None, from, .. }) = self.legs.last_mut() {
            *until = Some(end.max(*from));
            self.legs.push(Leg::Source { from: reached.to_vec(), until: None, is_guess: false });
        }
    }

    fn on_to(&mut self, out: &OutNow, reached: &[Offset], are_lost: bool) {
        if let Some(Leg::Source { until: until @ None, is_guess, .. }) = self.legs.last_mut() {
            (*until, *is_guess) = (Some(reached.to_vec()), are_lost);
            self.legs.push(Leg::Out { log: out.log, from: out.end, until: None });
        }
    }

    /// Returns where the sink leaves the source for the last time, by partition; `None` if it stays.
    pub fn source_end(&self) -> Option<Vec<Offset>> {
        self.legs.iter().rev().find_map(|leg| match leg {
            Leg::Source { until, .. } => Some(until.clone()),
            Leg::Out { .. } => None,
        })?
    }

    /// Whether some leg is of this out stream.
    pub fn reads_out(&self, out: Option<&OutNow>) -> bool {
        let is_it = |leg: &Leg| matches!(leg, Leg::Out { log, .. } if out.is_some_and(|out| out.log == *log));
        self.legs.iter().any(is_it)
    }

    /// Forgets the oldest legs of a sink whose pipeline changed often: a database from then would lack them.
    fn shorten(&mut self) {
        while self.legs.len() > LEGS_MAX {
            self.legs.drain(..2);
        }
    }

    fn log(&self) -> Option<Uuid> {
        match self.legs.last() {
            Some(Leg::Out { log, .. }) => Some(*log),
            _ => None,
        }
    }

    /// Brings places back of streams that have lost their ends: what comes there is new.
    fn cut(&mut self, end: Offset, out: Option<&OutNow>) {
        let cut =
            |offsets: &mut Vec<Offset>| offsets.iter_mut().for_each(|offset| *offset = end.min(*offset));
        for leg in &mut self.legs {
            match leg {
                Leg::Source { from, until, .. } => {
                    cut(from);
                    until.iter_mut().for_each(cut);
                }
                Leg::Out { log, from, until } => {
                    let Some(out) = out.filter(|out| out.log == *log) else { continue };
                    *from = out.end.min(*from);
                    until.iter_mut().for_each(|until| *until = out.end.min(*until));
                }
            }
        }
    }

    /// Writes offsets that are the same for all partitions once, and reads them again.
    fn each_partition(&mut self, change: impl Fn(&mut Vec<Offset>)) {
        for leg in &mut self.legs {
            if let Leg::Source { from, until, .. } = leg {
                change(from);
                until.iter_mut().for_each(&change);
            }
        }
    }

    /// Writes offsets as the least of them, and where they differ how far each is above that.
    fn bytes(&self) -> Vec<u8> {
        let mut road = self.clone();
        road.each_partition(|offsets| {
            let Some(least) = offsets.iter().min().copied() else { return };
            let above = offsets.iter().map(|offset| Offset(offset.0 - least.0));
            let above: Vec<_> =
                if offsets.iter().all(|offset| *offset == least) { Vec::new() } else { above.collect() };
            *offsets = std::iter::once(least).chain(above).collect();
        });
        json(&road)
    }

    fn from_bytes(bytes: &[u8], partitions: u16) -> Option<Self> {
        let mut road: Self =
            serde_json::from_slice(bytes).ok().filter(|road: &Self| !road.legs.is_empty())?;
        road.each_partition(|offsets| {
            let Some((least, above)) = offsets.split_first() else { return };
            *offsets = match above {
                [] => vec![*least; usize::from(partitions)],
                above => above.iter().map(|above| Offset(least.0 + above.0)).collect(),
            };
        });
        let is_whole = |offsets: &Vec<Offset>| offsets.is_empty() || offsets.len() == usize::from(partitions);
        let is_sound = road.legs.iter().all(|leg| match leg {
            Leg::Source { from, until, .. } => is_whole(from) && until.as_ref().is_none_or(is_whole),
            Leg::Out { .. } => true,
        });
        is_sound.then_some(road)
    }

    /// Whether some leg is of the out stream.
    fn needs_out(&self) -> bool {
        self.legs.iter().any(|leg| matches!(leg, Leg::Out { .. }))
    }
}

impl Leg {
    /// Returns where this leg begins if it is of the same stream as another one.
    pub fn begin(&self, other: &Self) -> Option<Offset> {
        match (self, other) {
            (Self::Source { from, .. }, Self::Source { .. }) => from.iter().min().copied(),
            (Self::Out { log, from, .. }, Self::Out { log: other, .. }) => (log == other).then_some(*from),
            _ => None,
        }
    }
}

impl Roads {
    /// Reads what is recorded under the name that the pipeline had, if there is any: at the first start with
    /// `renamed_from` nothing else is its own.
    pub fn read(dead_letters: &dyn Stream, pipelines: &[String], source: Identity) -> Self {
        let of = |pipeline: &String| {
            let prefix = prefix(pipeline, source);
            let mut roads = Self::default();
            for (key, value) in dead_letters.state(prefix.as_bytes()) {
                let Some(Ok(sink)) = key.get(prefix.len()..).map(std::str::from_utf8) else { continue };
                match sink {
                    "" => roads.begun = serde_json::from_slice(&value).ok(),
                    TABLES => roads.tables = serde_json::from_slice(&value).ok(),
                    sink => {
                        let road = Road::from_bytes(&value, source.partitions);
                        roads.of.extend(road.map(|road| (sink.to_owned(), road)));
                    }
                }
            }
            (roads != Self::default()).then_some(roads)
        };
        pipelines.iter().rev().find_map(of).unwrap_or_default()
    }

    /// Returns the roads as they are from this start on. `out`: the pipeline's out stream, written or left
    /// over; `goes_on`: where the steps go on in the source if the out stream that they wrote is gone; `sinks`: the
    /// ids of each of the pipeline's sinks; `end`: where the source ends.
    fn turned(
        &self,
        out: Option<&OutNow>,
        goes_on: Offset,
        sinks: &[Vec<String>],
        end: Offset,
        partitions: usize,
    ) -> Self {
        let mut now = self.clone();
        for ids in sinks {
            // A sink may have its road under an id that it had.
            if let Some((first, others)) = ids.split_first()
                && !now.of.contains_key(first)
                && let Some(road) = others.iter().find_map(|id| now.of.remove(id))
            {
                now.of.insert(first.clone(), road);
            }
        }
        now.begun.iter_mut().for_each(|begun| begun.from = begun.from.min(end));
        now.of.values_mut().for_each(|road| road.cut(end, out));
        let written = out.filter(|out| out.is_written);
        let begun = now.begun;
        let have_written = |out: &OutNow| out.reached.iter().any(|reached| *reached > Offset(0));
        let are_lost = begun.is_none() && self.of.is_empty() && out.is_some_and(have_written);
        now.begun = written.map(|out| match begun {
            Some(begun) if begun.log == out.log => begun,
            Some(_) => Begun { log: out.log, from: goes_on.min(end) },
            // All records are lost, and the steps have written: they go on where they were.
            None if are_lost => Begun { log: out.log, from: Offset(0) },
            None => Begun { log: out.log, from: end },
        });
        let reached = |out: &OutNow, begun: Option<Begun>| -> Vec<Offset> {
            let from = begun.filter(|begun| begun.log == out.log).map(|begun| begun.from).unwrap_or_default();
            out.reached.iter().map(|reached| from.max(*reached).min(end)).collect()
        };
        // Those that read another out stream, or one that nobody writes any more.
        for road in now.of.values_mut() {
            let is_left = road.log().is_some_and(|log| written.is_none_or(|out| out.log != log));
            match out.filter(|out| road.log() == Some(out.log)) {
                _ if !is_left => {}
                Some(out) => road.back_to_source(out.end, &reached(out, begun)),
                // The stream is gone, and with it what was in it and not yet in the sink.
                None => {
                    let goes_on = vec![goes_on.min(end); partitions];
                    road.back_to_source(Offset(0), &written.map_or(goes_on, |out| reached(out, now.begun)));
                }
            }
        }
        for sink in sinks.iter().filter_map(|ids| ids.first()) {
            let road = now.of.entry(sink.clone()).or_insert_with(Road::begin);
            if let Some(out) = written {
                road.on_to(out, &reached(out, now.begun), are_lost);
            }
        }
        now.of.values_mut().for_each(Road::shorten);
        // A sink that has only ever read the source needs no note.
        now.of.retain(|_, road| *road != Road::begin());
        now
    }

    /// Whether the out stream of the records is gone.
    fn lack(&self, out: Option<&OutNow>) -> bool {
        let is_other = |log: Uuid| out.is_none_or(|out| out.log != log);
        self.begun.is_some_and(|begun| is_other(begun.log))
            || self.of.values().filter_map(Road::log).any(is_other)
    }

    /// Takes down what the routes lead to from now on.
    fn turn_routes(&mut self, out: &OutNow, routes: &BTreeMap<String, Vec<String>>) {
        let known = self.tables.take().filter(|tables| tables.log == out.log);
        let mut tables = known.map(|known| known.tables).unwrap_or_default();
        if tables.last().is_none_or(|last| last.to != *routes) {
            // What earlier versions wrote goes by the first table.
            let from = if tables.is_empty() { Offset(0) } else { out.end };
            tables.push(Table { from, to: routes.clone() });
        }
        let is_over = |next: &Table| next.from <= out.start;
        while tables.len() > TABLES_MAX || tables.get(1).is_some_and(is_over) {
            tables.remove(0);
        }
        self.tables = Some(Tables { log: out.log, tables });
    }

    /// The tables of the out stream, oldest first; none: the routes have always led where they lead now.
    pub fn tables(&self) -> &[Table] {
        self.tables.as_ref().map(|tables| &tables.tables[..]).unwrap_or_default()
    }

    pub fn of(&self, sink: &str) -> Road {
        self.of.get(sink).cloned().unwrap_or_else(Road::begin)
    }

    /// Returns where the steps began to write to the out stream.
    pub fn begun(&self) -> Offset {
        self.begun.map(|begun| begun.from).unwrap_or_default()
    }
}

/// Whether sinks of a pipeline with these names may have messages of its out stream still to come, those among
/// them that are not in the config now.
pub fn need_out(dead_letters: &dyn Stream, pipelines: &[String], source: Identity) -> bool {
    Roads::read(dead_letters, pipelines, source).of.values().any(Road::needs_out)
}

/// Suffix behind the name of a pipeline, which names the stream of its steps' output.
pub const OUT: &str = ".out";

/// Name of the stream of what a pipeline's steps made.
pub fn out_stream_of(pipeline: &str) -> String {
    format!("{pipeline}{OUT}")
}

/// Decides by which legs the sinks of a pipeline go on, and writes it down. Returns once that survives a crash.
pub async fn plan(
    dead_letters: &Arc<dyn Stream>,
    names: &Names,
    source: &dyn Stream,
    out: Option<&OutNow>,
    sinks: &[Vec<String>],
    routes: &BTreeMap<String, Vec<String>>,
) -> Result<Roads, Error> {
    let (identity, end) = (source.identity(), source.bounds().end);
    let before = Roads::read(&**dead_letters, &names.pipelines, identity);
    let partitions = usize::from(identity.partitions);
    let goes_on = before.lack(out).then(|| GoesOn::of(names.pipeline(), source));
    let at = goes_on.as_ref().map_or(end, |goes_on| goes_on.at);
    let mut now = before.turned(out, at, sinks, end, partitions);
    if let Some(out) = out.filter(|out| out.is_written) {
        now.turn_routes(out, routes);
    }
    let prefix = prefix(names.pipeline(), identity);
    let of = |roads: &Roads| -> BTreeMap<String, Vec<u8>> {
        let begun = roads.begun.iter().map(|begun| (String::new(), json(begun)));
        let tables = roads.tables.iter().map(|tables| (TABLES.to_owned(), json(tables)));
        begun.chain(tables).chain(roads.of.iter().map(|(sink, road)| (sink.clone(), road.bytes()))).collect()
    };
    let stored: BTreeMap<Vec<u8>, Vec<u8>> = names
        .pipelines
        .iter()
        .flat_map(|pipeline| dead_letters.state(self::prefix(pipeline, identity).as_bytes()))
        .collect();
    let wanted: BTreeMap<Vec<u8>, Vec<u8>> =
        of(&now).into_iter().map(|(sink, value)| (format!("{prefix}{sink}").into_bytes(), value)).collect();
    let keys: BTreeSet<&Vec<u8>> = stored.keys().chain(wanted.keys()).collect();
    let changes: Vec<_> = keys
        .into_iter()
        .filter(|key| stored.get(*key) != wanted.get(*key))
        .map(|key| StateChange { key, value: wanted.get(key).map(Vec::as_slice) })
        .collect();
    write(dead_letters, &changes).await?;
    // The steps write to no stream any more.
    if let Some(goes_on) = goes_on.filter(|_| out.is_none_or(|out| !out.is_written)) {
        goes_on.attachment.detach();
    }
    Ok(now)
}

/// The steps' place in the source, as it remembers the out stream as its reader.
struct GoesOn {
    at: Offset,
    attachment: Box<dyn Attachment>,
}

impl GoesOn {
    fn of(pipeline: &str, source: &dyn Stream) -> Self {
        let bounds = source.bounds();
        let consumer = format!("{pipeline}/{}", out_stream_of(pipeline));
        // As the steps attach it, so that retention keeps what they need.
        let attachment = source.attach(&consumer, bounds.start, OnLag::Block);
        let is_known = attachment.delivered() == Delivered::ToThis;
        let at = if is_known { attachment.remembered() } else { bounds.end };
        Self { at, attachment }
    }
}

async fn write(dead_letters: &Arc<dyn Stream>, changes: &[StateChange<'_>]) -> Result<(), Error> {
    if changes.is_empty() {
        return Ok(());
    }
    let appended = loop {
        match dead_letters.append(&[], changes) {
            Ok(appended) => break appended,
            Err(AppendError::Full) => dead_letters.writable().await,
            Err(error) => return Err(error.into()),
        }
    };
    let mut durable = dead_letters.durable();
    let reached = durable.wait_for(|durable| *durable >= appended.ticket).await.is_ok();
    if reached { Ok(()) } else { Err(AppendError::Stopped(dead_letters.stopped().await).into()) }
}

/// The UUID of a log as text.
mod log_id {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use uuid::Uuid;

    pub fn serialize<S: Serializer>(log: &Uuid, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(log)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Uuid, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("plain fields")
}

fn prefix(pipeline: &str, source: Identity) -> String {
    format!("{KEY}{pipeline}/{}/{}/", source.log, source.generation)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: Uuid = Uuid::from_u128(7);

    fn offsets(offsets: [u64; 2]) -> Vec<Offset> {
        offsets.map(Offset).to_vec()
    }

    fn out(end: u64, reached: [u64; 2], is_written: bool) -> OutNow {
        OutNow { log: LOG, start: Offset(0), end: Offset(end), reached: offsets(reached), is_written }
    }

    fn turned(roads: &Roads, out: Option<&OutNow>, sinks: &[&str], end: u64) -> Roads {
        let sinks: Vec<_> = sinks.iter().map(|sink| vec![(*sink).to_owned()]).collect();
        roads.turned(out, Offset(30), &sinks, Offset(end), 2)
    }

    fn source(from: Option<[u64; 2]>, until: Option<[u64; 2]>) -> Leg {
        Leg::Source {
            from: from.map(offsets).unwrap_or_default(),
            until: until.map(offsets),
            is_guess: false,
        }
    }

    fn by_out(from: u64, until: Option<u64>) -> Leg {
        Leg::Out { log: LOG, from: Offset(from), until: until.map(Offset) }
    }

    #[test]
    fn sinks_go_over_to_the_out_stream_and_back_at_one_place_of_both() {
        let direct = turned(&Roads::default(), None, &["a"], 5);
        assert_eq!(direct, Roads::default(), "nothing is recorded of a sink that has only read the source");
        let both = turned(&direct, Some(&out(0, [0, 0], true)), &["a", "b"], 9);
        for sink in ["a", "b"] {
            assert_eq!(both.of(sink).legs, [source(None, Some([9, 9])), by_out(0, None)]);
        }
        assert_eq!(both.begun(), Offset(9));
        // Nothing changes while the sinks are the same, however far the steps are.
        assert_eq!(turned(&both, Some(&out(40, [30, 31], true)), &["a", "b"], 50), both);
        let three = turned(&both, Some(&out(40, [30, 31], true)), &["a", "b", "c"], 50);
        assert_eq!(three.of("c").legs, [source(None, Some([30, 31])), by_out(40, None)]);
        assert_eq!(three.of("a"), both.of("a"));
        let alone = turned(&three, Some(&out(60, [50, 48], false)), &["c"], 70);
        assert_eq!(
            alone.of("c").legs,
            [source(None, Some([30, 31])), by_out(40, Some(60)), source(Some([50, 48]), None)]
        );
        let again = turned(&alone, Some(&out(60, [50, 48], true)), &["a", "c"], 90);
        assert_eq!(again.begun(), Offset(90), "what came while it was alone is not written");
        assert_eq!(again.of("c").legs[2..], [source(Some([50, 48]), Some([90, 90])), by_out(60, None)]);
        assert_eq!(
            again.of("a").legs[1..],
            [by_out(0, Some(60)), source(Some([50, 48]), Some([90, 90])), by_out(60, None)]
        );
    }

    #[test]
    fn a_source_that_lost_its_end_brings_the_places_back() {
        let both = turned(&Roads::default(), Some(&out(0, [0, 0], true)), &["a"], 9);
        let cut = turned(&both, Some(&out(0, [0, 0], true)), &["a"], 4);
        assert_eq!((cut.begun(), cut.of("a").legs[0].clone()), (Offset(4), source(None, Some([4, 4]))));
        assert_eq!(turned(&cut, Some(&out(0, [0, 0], true)), &["a"], 20), cut, "and keeps them");
    }

    #[test]
    fn an_out_stream_that_is_gone_is_begun_anew_where_the_steps_were() {
        let both = turned(&Roads::default(), Some(&out(0, [0, 0], true)), &["a"], 9);
        let new = OutNow { log: Uuid::from_u128(8), ..out(0, [0, 0], true) };
        let anew = turned(&both, Some(&new), &["a"], 50);
        assert_eq!(anew.begun(), Offset(30));
        let last = Leg::Out { log: new.log, from: Offset(0), until: None };
        assert_eq!(anew.of("a").legs[2..], [source(Some([30, 30]), Some([30, 30])), last]);
        let alone = turned(&both, None, &["a"], 50);
        assert_eq!(alone.of("a").legs[1..], [by_out(0, Some(0)), source(Some([30, 30]), None)]);
    }

    #[test]
    fn steps_go_on_where_they_were_when_all_records_are_lost() {
        let lost = turned(&Roads::default(), Some(&out(40, [30, 31], true)), &["a"], 50);
        assert_eq!(lost.begun(), Offset(0), "the out stream says itself how far they were");
        let guess = Leg::Source { from: Vec::new(), until: Some(offsets([30, 31])), is_guess: true };
        assert_eq!(lost.of("a").legs, [guess, by_out(40, None)]);
    }

    #[test]
    fn a_sink_has_the_road_of_any_name_that_it_had() {
        let both = turned(&Roads::default(), Some(&out(0, [0, 0], true)), &["w"], 9);
        let ids = vec![vec!["w@7".to_owned(), "w".to_owned(), "x".to_owned()]];
        let renamed = both.turned(Some(&out(5, [9, 9], true)), Offset(0), &ids, Offset(9), 2);
        assert_eq!((renamed.of("w@7"), renamed.of.len()), (both.of("w"), 1));
    }

    #[test]
    fn routes_are_remembered_for_as_long_as_the_out_stream_has_messages_of_their_time() {
        let to = |sink: &str| BTreeMap::from([("default".to_owned(), vec![sink.to_owned()])]);
        let mut roads = Roads::default();
        roads.turn_routes(&out(0, [0, 0], true), &to("a"));
        roads.turn_routes(&out(7, [0, 0], true), &to("a"));
        roads.turn_routes(&out(9, [0, 0], true), &to("b"));
        let from = |roads: &Roads| roads.tables().iter().map(|table| table.from.0).collect::<Vec<_>>();
        assert_eq!(from(&roads), [0, 9]);
        roads.turn_routes(&OutNow { start: Offset(9), ..out(12, [0, 0], true) }, &to("c"));
        assert_eq!(from(&roads), [9, 12]);
        for end in 20..90 {
            roads.turn_routes(&out(end, [0, 0], true), &to(&end.to_string()));
        }
        assert_eq!(roads.tables().len(), TABLES_MAX);
        roads.turn_routes(&OutNow { log: Uuid::from_u128(8), ..out(3, [0, 0], true) }, &to("a"));
        assert_eq!(from(&roads), [0], "of another stream");
    }

    #[test]
    fn a_road_has_a_bounded_number_of_legs() {
        let mut roads = Roads::default();
        for change in 0..20 {
            roads = turned(&roads, Some(&out(change, [change; 2], true)), &["a"], change);
            roads = turned(&roads, Some(&out(change, [change; 2], false)), &["a"], change);
        }
        let legs = roads.of("a").legs;
        assert!(legs.len() <= LEGS_MAX && matches!(legs[0], Leg::Source { .. }), "{legs:?}");
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        for legs in [
            vec![source(None, Some([9, 9])), by_out(3, None)],
            vec![source(Some([4, 4]), Some([9, 8])), by_out(3, Some(4)), source(Some([5, 5]), None)],
        ] {
            let road = Road { legs };
            assert_eq!(Road::from_bytes(&road.bytes(), 2), Some(road));
        }
        assert_eq!(Road::from_bytes(b"{\"legs\":[]}", 2), None);
    }
}
