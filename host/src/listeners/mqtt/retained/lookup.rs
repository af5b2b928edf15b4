//! Finds the retained topics that a filter matches. The topics are sorted by their levels, so that a
//! lookup steps from one match to the next and skips the topics between. Its cost depends on the matches
//! and on the branches of a `+`, not on the number of topics. A lookup stores only its last topic, and
//! continues from there after any change.

use std::collections::BTreeMap;
use std::ops::Bound;

use crate::topic::TopicFilter;

/// Sorts before all characters of a topic, so that the topics below a level follow it.
const SEPARATOR: char = '\0';
/// Sorts after a level and all topics below it.
const BEHIND_LEVEL: char = '\u{1}';
/// Sorts just after all topics that begin with `$`.
const BEHIND_DOLLAR: &str = "%";

/// Returns the form in which a topic or filter is sorted.
pub fn key(topic: &str) -> Box<str> {
    topic.replace('/', "\0").into()
}

/// A lookup and its progress.
#[derive(Clone, Debug)]
pub struct Lookup {
    filter: Box<str>,
    from: Bound<Box<str>>,
    is_done: bool,
}

/// Result of comparing a topic with the filter.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    Match,
    /// No topic before this one matches.
    To(String),
    Nothing,
}

impl Lookup {
    /// Begins a lookup. Topics up to the key `after` are left out.
    pub fn new(filter: &TopicFilter, after: Option<&str>) -> Self {
        let filter = key(filter.as_str());
        let begin = filter.split(['+', '#']).next().unwrap_or_default();
        // `a/#` matches `a` too.
        let from = Bound::Included(begin.trim_end_matches(SEPARATOR).into());
        let from = after.map_or(from, |after| Bound::Excluded(after.into()));
        Self { filter, from, is_done: false }
    }

    /// Returns whether the lookup is complete.
    pub fn is_done(&self) -> bool {
        self.is_done
    }

    /// Examines at most `steps_max` topics. `found` returns whether to continue.
    pub fn advance<'t, T>(
        &mut self,
        topics: &'t BTreeMap<Box<str>, T>,
        steps_max: usize,
        mut found: impl FnMut(&'t str, &'t T) -> bool,
    ) {
        let mut range = topics.range::<str, _>((self.from.as_ref().map(|from| &**from), Bound::Unbounded));
        let mut skip_to: Option<String> = None;
        for _ in 0..steps_max {
            let Some((topic, value)) = range.next() else {
                self.is_done = true;
                return;
            };
            if let Some(to) = skip_to.take_if(|to| **to > **topic) {
                range = topics.range::<str, _>((Bound::Included(&*to), Bound::Unbounded));
                self.from = Bound::Included(to.into());
                continue;
            }
            match next(&self.filter, topic) {
                Next::Match => {
                    skip_to = None;
                    self.from = Bound::Excluded(topic.clone());
                    if !found(topic, value) {
                        return;
                    }
                }
                Next::To(to) => {
                    self.from = Bound::Included(to.as_str().into());
                    skip_to = Some(to);
                }
                Next::Nothing => {
                    self.is_done = true;
                    return;
                }
            }
        }
    }
}

/// Compares a topic with the filter, both in sorted form.
fn next(filter: &str, topic: &str) -> Next {
    // Behind the last level that a `+` stands for: where the next branch begins.
    let mut branch = None;
    let behind = |branch: Option<usize>| match branch {
        Some(end) => Next::To([&topic[..end], &String::from(BEHIND_LEVEL)].concat()),
        None => Next::Nothing,
    };
    let (mut at, mut rest) = (0, Some(topic));
    for (depth, wanted) in filter.split(SEPARATOR).enumerate() {
        if depth == 0 && matches!(wanted, "+" | "#") && topic.starts_with('$') {
            return Next::To(BEHIND_DOLLAR.into());
        }
        if wanted == "#" {
            return Next::Match;
        }
        let Some(text) = rest else {
            let wanted = if wanted == "+" { "" } else { wanted };
            return Next::To([topic, "\0", wanted].concat());
        };
        let (level, below) = match text.split_once(SEPARATOR) {
            Some((level, below)) => (level, Some(below)),
            None => (text, None),
        };
        let end = at + level.len();
        if wanted == "+" {
            branch = Some(end);
        } else if level < wanted {
            return Next::To([&topic[..at], wanted].concat());
        } else if level > wanted {
            return behind(branch);
        }
        (at, rest) = (end + 1, below);
    }
    if rest.is_none() { Next::Match } else { behind(branch) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn topics(names: impl IntoIterator<Item = String>) -> BTreeMap<Box<str>, ()> {
        names.into_iter().map(|name| (key(&name), ())).collect()
    }

    /// What is found, and how many topics were looked at.
    fn look(topics: &BTreeMap<Box<str>, ()>, filter: &str, at_once: usize) -> (Vec<String>, usize) {
        let filter = TopicFilter::new(filter).unwrap();
        let (mut lookup, mut found, mut rounds) = (Lookup::new(&filter, None), Vec::new(), 0);
        while !lookup.is_done() {
            lookup.advance(topics, at_once, |topic, ()| {
                found.push(topic.replace(SEPARATOR, "/"));
                true
            });
            rounds += 1;
        }
        (found, rounds * at_once)
    }

    proptest! {
        #[test]
        fn a_lookup_finds_what_the_naive_matcher_finds_however_it_is_cut(
            names in prop::collection::vec(prop::collection::vec(
                prop_oneof![Just("a"), Just("ab"), Just("b"), Just("!"), Just("$s"), Just(""), Just("\u{1}")], 1..5), 0..40),
            filters in prop::collection::vec((prop::collection::vec(
                prop_oneof![Just("+"), Just("a"), Just("ab"), Just("b"), Just("$s"), Just("")], 1..5),
                any::<bool>()), 1..10),
            at_once in 1..5_usize,
        ) {
            let names: Vec<String> = names.iter().map(|levels| levels.join("/")).filter(|it| !it.is_empty()).collect();
            let topics = topics(names.iter().cloned());
            for (levels, multi) in filters {
                let filter = levels.join("/") + if multi { "/#" } else { "" };
                let Ok(parsed) = TopicFilter::new(&filter) else { continue };
                let mut naive: Vec<String> = names.iter().filter(|name| parsed.matches(name)).cloned().collect();
                naive.sort();
                naive.dedup();
                let (mut found, _) = look(&topics, &filter, at_once);
                found.sort();
                prop_assert_eq!(found, naive, "{}", filter);
            }
            prop_assert_eq!(look(&topics, "#", at_once).0.len(), topics.keys().filter(|it| !it.starts_with('$')).count());
        }
    }

    #[test]
    fn a_lookup_costs_what_it_finds_and_its_branches() {
        let names = (0..10_000).map(|n| format!("dev/{}/state/{}", n / 10, n % 10));
        let topics = topics(names.chain((0..10_000).map(|n| format!("other/{n}"))));
        for (filter, finds, steps_max) in [
            ("dev/7/cmd/#", 0, 3),
            ("dev/7/state/#", 10, 13),
            ("dev/7/+/3", 1, 5),
            ("+/7/state/3", 1, 8),
            ("+/x/#", 0, 8),
            ("dev/+/cmd", 0, 3_100),
            ("dev/+/state/3", 1_000, 3_100),
        ] {
            let (found, steps) = look(&topics, filter, 1);
            assert_eq!(found.len(), finds, "{filter}");
            assert!(steps <= steps_max, "{filter}: {steps}");
        }
    }

    #[test]
    fn a_topic_of_as_many_levels_as_fit_is_found() {
        let deep = "/".repeat(crate::topic::TOPIC_BYTES_MAX);
        let topics = topics([deep.clone()]);
        assert_eq!(look(&topics, "#", 1).0, std::slice::from_ref(&deep));
        assert_eq!(look(&topics, "/+/#", 1).0, [deep]);
    }
}
