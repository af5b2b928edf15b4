//! Which sink a name means in a dead letter.
//!
//! Letters name sinks. A sink may get another name (`renamed_from`), and another sink the name that
//! it had: the name in an older letter still means the first one. Each sink has an id, which is the
//! first name that it had, with an offset behind it where another sink had that name before. The
//! state of the dead letters says of each name from which letter on it means which sink; a name of
//! which it says nothing is an id. Marks, records and the positions of passes have ids.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::stream::{AppendError, StateChange, StateEntries, Stream};

/// Begins the state keys; then the name.
pub const NAMES_PREFIX: &[u8] = b"sinks/";

/// What the names of sinks mean, and meant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SinkNames(BTreeMap<String, Vec<Meaning>>);

/// What a name means in letters at and above an offset.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Meaning {
    from: u64,
    /// None: no sink has the name. Several: a sink took over from one that is gone.
    ids: Vec<String>,
}

impl SinkNames {
    /// Reads the state of the dead letters below [`NAMES_PREFIX`].
    pub fn read(state: &StateEntries) -> Self {
        let meaning = |line: &str| {
            let (from, ids) = line.split_once(' ')?;
            let ids = ids.split(',').filter(|id| !id.is_empty()).map(str::to_owned).collect();
            Some(Meaning { from: from.parse().ok()?, ids })
        };
        let entry = |(key, value): &(Vec<u8>, Vec<u8>)| {
            let name = std::str::from_utf8(key.strip_prefix(NAMES_PREFIX)?).ok()?;
            let meanings = std::str::from_utf8(value).ok()?.lines().filter_map(meaning).collect();
            Some((name.to_owned(), meanings))
        };
        Self(state.iter().filter_map(entry).collect())
    }

    /// Returns the ids of the sinks that a letter at this offset means by a name.
    pub fn ids(&self, name: &str, letter: u64) -> Vec<String> {
        let mut meanings = self.0.get(name).into_iter().flatten();
        match meanings.rfind(|meaning| meaning.from <= letter) {
            Some(meaning) => meaning.ids.clone(),
            None => vec![name.to_owned()],
        }
    }

    /// Returns the ids of the sinks that a person means by a name: those of the sink that has it, or
    /// had it last.
    pub fn meant(&self, name: &str) -> Vec<String> {
        let now = self.ids(name, u64::MAX);
        let before = || self.0.get(name)?.iter().rev().find(|meaning| !meaning.ids.is_empty());
        match (now.is_empty(), before()) {
            (false, _) => now,
            (true, Some(meaning)) => meaning.ids.clone(),
            (true, None) => vec![name.to_owned()],
        }
    }

    /// Whether what a person means by the name of a sink is what a letter at this offset means by
    /// another.
    pub fn is_same(&self, sink: &str, by: &str, letter: u64) -> bool {
        let meant = self.meant(sink);
        self.ids(by, letter).iter().any(|id| meant.contains(id))
    }

    /// Returns the name of the sink with this id, or the id where no sink has it any more.
    pub fn name_of<'n>(&'n self, id: &'n str) -> &'n str {
        let has = |(_, meanings): &(&String, &Vec<Meaning>)| {
            meanings.last().is_some_and(|meaning| meaning.ids.iter().any(|own| own == id))
        };
        self.0.iter().find(has).map_or(id, |(name, _)| name)
    }

    /// Gives names to the sinks of a config, each with the one that it had. From the letter at `at`
    /// on they mean what they do now. Returns the names of which that is new.
    fn give(&mut self, sinks: &[(String, Option<String>)], at: u64) -> BTreeSet<String> {
        let before = self.clone();
        let mut changed = BTreeSet::new();
        let mut set = |name: &str, ids: Vec<String>| {
            if before.ids(name, u64::MAX) != ids {
                let meanings = self.0.entry(name.to_owned()).or_default();
                meanings.retain(|meaning| meaning.from < at);
                meanings.push(Meaning { from: at, ids });
                changed.insert(name.to_owned());
            }
        };
        for (name, renamed_from) in sinks {
            let is_free = |former: &&String| sinks.iter().all(|(name, _)| name != *former);
            let former = renamed_from.as_ref().filter(is_free);
            let ids = former.map_or_else(Vec::new, |former| before.ids(former, u64::MAX));
            if let Some(former) = former {
                set(former, Vec::new());
            }
            // Another sink had the name, and has another one since.
            let own = match before.ids(name, u64::MAX) {
                own if own.is_empty() => vec![format!("{name}@{at}")],
                own => own,
            };
            // The first id stays the first one.
            let (mut ids, more) = if before.0.contains_key(name) { (own, ids) } else { (ids, own) };
            let new: Vec<_> = more.into_iter().filter(|id| !ids.contains(id)).collect();
            ids.extend(new);
            set(name, ids);
        }
        changed
    }

    fn value(&self, name: &str) -> String {
        let line = |meaning: &Meaning| format!("{} {}\n", meaning.from, meaning.ids.join(","));
        self.0.get(name).into_iter().flatten().map(line).collect()
    }
}

/// Gives the sinks of a config their names in the dead letters that are written from now on: each
/// with the name that it had. What has no room is written once there is some.
pub fn name_sinks(dead_letters: &Arc<dyn Stream>, sinks: &[(String, Option<String>)]) -> Arc<SinkNames> {
    let mut names = SinkNames::read(&dead_letters.state(NAMES_PREFIX));
    let changed = names.give(sinks, dead_letters.bounds().end.0);
    let entry = |name: &String| ([NAMES_PREFIX, name.as_bytes()].concat(), names.value(name).into_bytes());
    let entries: Vec<_> = changed.iter().map(entry).collect();
    if !entries.is_empty() && write(&**dead_letters, &entries).is_err() {
        let stream = Arc::clone(dead_letters);
        tokio::spawn(async move {
            while let Err(AppendError::Full | AppendError::NoSpace) = write(&*stream, &entries) {
                stream.writable().await;
            }
        });
    }
    Arc::new(names)
}

fn write(dead_letters: &dyn Stream, entries: &StateEntries) -> Result<(), AppendError> {
    let changes: Vec<_> =
        entries.iter().map(|(key, value)| StateChange { key, value: Some(value) }).collect();
    dead_letters.append(&[], &changes).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn give(names: &mut SinkNames, at: u64, sinks: &[(&str, Option<&str>)]) -> Vec<String> {
        let owned = |(name, former): &(&str, Option<&str>)| ((*name).to_owned(), former.map(str::to_owned));
        let changed = names.give(&sinks.iter().map(owned).collect::<Vec<_>>(), at);
        let state =
            changed.iter().map(|name| ([NAMES_PREFIX, name.as_bytes()].concat(), names.value(name).into()));
        let read = SinkNames::read(&state.collect());
        assert!(changed.iter().all(|name| read.0[name] == names.0[name]), "reads as it was written");
        changed.into_iter().collect()
    }

    #[test]
    fn a_name_means_the_sink_that_had_it_when_the_letter_was_written() {
        let mut names = SinkNames::default();
        assert!(give(&mut names, 0, &[("w", None), ("v", None)]).is_empty(), "nothing to remember");
        assert_eq!(give(&mut names, 10, &[("x", Some("w")), ("v", None)]), ["w", "x"]);
        assert!(
            give(&mut names, 15, &[("x", Some("w")), ("v", None)]).is_empty(),
            "it may stay in the config"
        );
        assert_eq!(give(&mut names, 20, &[("x", None), ("w", Some("v"))]), ["v", "w"]);
        let (x, w) = (names.ids("x", 30), names.ids("w", 30));
        assert!(x.contains(&names.ids("w", 9)[0]) && w.contains(&names.ids("v", 19)[0]));
        assert!(x.iter().all(|id| !w.contains(id)), "{x:?} {w:?}");
        assert_eq!((names.name_of("w"), names.name_of("v")), ("x", "w"));
        assert_eq!((names.meant("w"), names.meant("v")), (w.clone(), vec!["v".to_owned()]));
        // Back again.
        give(&mut names, 40, &[("x", None), ("v", Some("w"))]);
        give(&mut names, 50, &[("w", Some("x")), ("v", None)]);
        assert_eq!((names.name_of("w"), names.name_of("v")), ("w", "v"));
        assert_eq!((names.name_of(&x[0]), names.name_of(&w[0])), ("w", "v"));
    }

    #[test]
    fn a_sink_keeps_its_letters_over_a_chain_of_names_and_a_new_one_of_an_old_name_has_none_of_them() {
        let mut names = SinkNames::default();
        give(&mut names, 10, &[("x", Some("w"))]);
        give(&mut names, 20, &[("y", Some("x")), ("w", None)]);
        let y = names.ids("y", 99);
        for (name, letter) in [("w", 5), ("x", 15), ("y", 25)] {
            assert!(names.ids(name, letter).iter().all(|id| y.contains(id)), "{name}");
        }
        assert_eq!(names.ids("w", 25), ["w@20"]);
        assert_eq!(names.meant("x"), names.ids("x", 15), "a person may still say it");
        // A sink that is gone for a while is the same when it is back.
        assert!(give(&mut names, 30, &[("y", None)]).is_empty());
        assert!(give(&mut names, 40, &[("y", None), ("w", None)]).is_empty());
        // A sink that takes over from one of its own time has the letters of both.
        give(&mut names, 50, &[("y", Some("w"))]);
        assert!(names.ids("y", 60).contains(&"w@20".to_owned()) && names.ids("y", 60).contains(&y[0]));
    }

    #[test]
    fn a_former_name_that_a_sink_has_is_not_taken_from_it() {
        let mut names = SinkNames::default();
        // `validate` refuses it.
        assert!(give(&mut names, 10, &[("a", Some("b")), ("b", Some("a"))]).is_empty());
    }
}
