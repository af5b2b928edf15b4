//! The index of subscriptions: a tree by topic level, so that the cost of a publish depends on the
//! filters that match it, not on the number of filters. Levels are numbered, so that the texts of a
//! topic are hashed once, in however many branches they are looked up.
//!
//! Matching follows MQTT 5.0, section 4.7; shared subscriptions section 4.8.2.

mod share;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use super::session::Session;
use crate::topic::{self, TopicFilter};

pub use self::share::Share;

const SHARE: &str = "$share/";

/// Most levels of a filter. Deeper filters are refused, because matching recurses once for each level.
pub const FILTER_LEVELS_MAX: usize = 128;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    pub qos: u8,
    pub no_local: bool,
    pub retain_as_published: bool,
    /// Subscription identifier; 0 if there is none.
    pub id: u32,
}

impl Options {
    /// Returns the encoding in a session's durable state.
    pub fn to_bytes(self) -> [u8; 5] {
        let id = self.id.to_be_bytes();
        let bits = self.qos | u8::from(self.no_local) << 2 | u8::from(self.retain_as_published) << 3;
        [bits, id[0], id[1], id[2], id[3]]
    }

    /// Decodes the options. Also returns the rest of the record: the progress of the subscription among
    /// the retained messages, empty if all were delivered.
    pub fn from_bytes(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let [bits, a, b, c, d, rest @ ..] = bytes else { return None };
        let options = Self {
            qos: (bits & 3).min(2),
            no_local: bits & 4 != 0,
            retain_as_published: bits & 8 != 0,
            id: u32::from_be_bytes([*a, *b, *c, *d]),
        };
        Some((options, rest))
    }
}

/// A filter in a SUBSCRIBE: `sensors/#`, or `$share/NAME/sensors/#`.
#[derive(Clone, Debug)]
pub struct Filter {
    text: Box<str>,
    topics: TopicFilter,
}

impl Filter {
    /// Parses a filter. Returns `None` if it is not valid (4.7.1, 4.8.2).
    pub fn parse(text: &str) -> Option<Self> {
        let (share, topics) = split(text);
        let named = |name: &str| !name.is_empty() && !name.contains(['+', '#']);
        if (share.is_none() && text.starts_with(SHARE)) || share.is_some_and(|name| !named(name)) {
            return None;
        }
        Some(Self { text: text.into(), topics: TopicFilter::new(topics).ok()? })
    }

    /// Returns the filter as the client wrote it.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    pub fn is_shared(&self) -> bool {
        is_shared(&self.text)
    }

    pub fn is_live(&self) -> bool {
        is_live(&self.text)
    }

    pub fn topics(&self) -> &TopicFilter {
        &self.topics
    }
}

/// Splits a filter into the name of the share, if there is one, and the topic filter.
fn split(text: &str) -> (Option<&str>, &str) {
    match text.strip_prefix(SHARE).and_then(|rest| rest.split_once('/')) {
        Some((name, filter)) => (Some(name), filter),
        None => (None, text),
    }
}

/// Returns whether a valid filter is shared.
pub fn is_shared(text: &str) -> bool {
    split(text).0.is_some()
}

/// Returns the number of topic levels of a filter.
pub fn levels(text: &str) -> usize {
    1 + text.bytes().filter(|byte| *byte == b'/').count()
}

/// Returns the approximate memory of a subscription in its session, and in the tree if no other filter
/// has its levels.
pub fn memory_of(filter: &str) -> usize {
    memory(1, levels(filter), filter.len())
}

/// Returns the approximate memory of several filters, given their number, levels and bytes.
pub fn memory(filters: usize, levels: usize, bytes: usize) -> usize {
    const OF_FILTER: usize = 256;
    const OF_LEVEL: usize = 160;
    OF_FILTER * filters + OF_LEVEL * levels + 3 * bytes
}

/// Returns whether messages of streams can match. The broker's own topics are in no stream.
pub fn is_live(text: &str) -> bool {
    !topic::is_reserved(split(text).1)
}

/// The tree. `S` is the subscriber; subscribers are compared by `number`.
pub struct Tree<S = Arc<Session>> {
    root: Node<S>,
    levels: Levels,
}

/// The texts of all levels that are not wildcards, with their numbers.
#[derive(Default)]
struct Levels {
    /// Number of a level, and how many nodes have it.
    known: HashMap<Box<str>, (u64, usize)>,
    /// The last number. Numbers are not reused.
    last: u64,
}

struct Node<S> {
    /// Children by the number of their level.
    children: HashMap<u64, Node<S>, BuildHasherDefault<NumberHasher>>,
    /// Subscribers of filters that end at this level.
    here: Vec<Subscriber<S>>,
    /// Subscribers of filters that end with `#` below this level.
    rest: Vec<Subscriber<S>>,
    /// The child for `+`.
    any: Option<Box<Node<S>>>,
    /// Shared subscriptions that end here, without and with `#`.
    shares: Option<Box<[Vec<Share<S>>; 2]>>,
}

/// A subscription that a topic matches.
pub enum Found<'t, S> {
    One(&'t Subscriber<S>),
    Share(&'t Share<S>),
}

pub struct Subscriber<S> {
    pub number: u64,
    pub session: S,
    pub options: Options,
    /// Whether the session is persistent.
    pub is_kept: bool,
}

impl<S> Default for Node<S> {
    fn default() -> Self {
        Self { children: HashMap::default(), here: Vec::new(), rest: Vec::new(), any: None, shares: None }
    }
}

impl<S> Default for Tree<S> {
    fn default() -> Self {
        Self { root: Node::default(), levels: Levels::default() }
    }
}

impl Levels {
    fn number(&self, text: &str) -> Option<u64> {
        self.known.get(text).map(|(number, _)| *number)
    }

    /// Returns the number of a level for another node.
    fn take(&mut self, text: &str) -> u64 {
        if let Some((number, nodes)) = self.known.get_mut(text) {
            *nodes += 1;
            return *number;
        }
        self.last += 1;
        self.known.insert(text.into(), (self.last, 1));
        self.last
    }

    /// Records that a node with this level was removed.
    fn give_back(&mut self, text: &str) {
        let Some((_, nodes)) = self.known.get_mut(text) else { return };
        *nodes -= 1;
        if *nodes == 0 {
            self.known.remove(text);
        }
    }
}

/// Spreads numbers that this module assigns. Not suitable for keys that clients choose.
#[derive(Default)]
struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn write(&mut self, _: &[u8]) {
        unreachable!("keys are numbers");
    }

    fn write_u64(&mut self, number: u64) {
        // 2^64 over the golden ratio: the product's upper half depends on all bits.
        let product = u128::from(number) * 0x9e37_79b9_7f4a_7c15;
        self.0 = (product >> 64) as u64 ^ product as u64;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// The levels of the last topic that was looked up, with their numbers, as deep as any branch. The next
/// topic usually has the same levels.
#[derive(Default)]
pub struct Path<'a>(Vec<(&'a str, Option<u64>)>);

/// A topic during its lookup.
struct Walk<'a, 'p> {
    levels: &'p Levels,
    path: &'p mut Path<'a>,
    /// Number of levels in `path` that belong to this topic.
    depth: usize,
    /// The rest of the topic.
    rest: Option<&'a str>,
}

enum Level {
    /// A level that occurs in no filter, so that only wildcards match it.
    Unknown,
    Known(u64),
    /// The end of the topic.
    End,
}

impl Walk<'_, '_> {
    fn level(&mut self, depth: usize) -> Level {
        let path = &mut self.path.0;
        if depth == self.depth {
            let Some(rest) = self.rest else { return Level::End };
            let (text, rest) = match rest.split_once('/') {
                Some((text, rest)) => (text, Some(rest)),
                None => (rest, None),
            };
            if path.get(depth).is_none_or(|(known, _)| *known != text) {
                path.truncate(depth);
                path.push((text, self.levels.number(text)));
            }
            (self.depth, self.rest) = (depth + 1, rest);
        }
        path[depth].1.map_or(Level::Unknown, Level::Known)
    }
}

impl<S> Tree<S> {
    /// Adds a subscription. Returns true if the subscriber did not have this filter.
    pub fn insert(&mut self, text: &str, number: u64, session: S, options: Options, is_kept: bool) -> bool {
        let (share, filter) = split(text);
        let mut node = &mut self.root;
        let mut multi = false;
        for level in filter.split('/') {
            match level {
                "#" => multi = true,
                "+" => node = node.any.get_or_insert_with(Box::default),
                _ => {
                    let number = self.levels.take(level);
                    node = match node.children.entry(number) {
                        Entry::Occupied(known) => {
                            self.levels.give_back(level);
                            known.into_mut()
                        }
                        Entry::Vacant(new) => new.insert(Node::default()),
                    };
                }
            }
        }
        let subscriber = Subscriber { number, session, options, is_kept };
        let subscribers = match (share, multi) {
            (Some(_), multi) => {
                let shares = &mut node.shares.get_or_insert_default()[usize::from(multi)];
                let at = shares.iter().position(|share| **share.filter == *text).unwrap_or_else(|| {
                    shares.push(Share::new(text));
                    shares.len() - 1
                });
                return shares[at].put(subscriber);
            }
            (None, true) => &mut node.rest,
            (None, false) => &mut node.here,
        };
        if let Some(known) = subscribers.iter_mut().find(|s| s.number == number) {
            *known = subscriber;
            return false;
        }
        // Most filters of devices have one subscriber.
        if subscribers.is_empty() {
            subscribers.reserve_exact(1);
        }
        subscribers.push(subscriber);
        true
    }

    /// Marks a member of a share as one whose session ends with its connection.
    pub fn keep_no_more(&mut self, text: &str, number: u64) {
        if let Some(share) = self.share_mut(text) {
            share.keep_no_more(number);
        }
    }

    /// Removes a subscription, and returns its options.
    pub fn remove(&mut self, text: &str, number: u64) -> Option<Options> {
        let (share, filter) = split(text);
        self.root.remove(&mut self.levels, &mut filter.split('/'), share.map(|_| text), number)
    }

    /// Returns the share of this filter, if it has members.
    pub fn share(&self, text: &str) -> Option<&Share<S>> {
        let mut node = &self.root;
        let mut multi = false;
        for level in split(text).1.split('/') {
            match level {
                "#" => multi = true,
                "+" => node = node.any.as_ref()?,
                _ => node = node.children.get(&self.levels.number(level)?)?,
            }
        }
        node.shares.as_ref()?[usize::from(multi)].iter().find(|share| **share.filter == *text)
    }

    fn share_mut(&mut self, text: &str) -> Option<&mut Share<S>> {
        let mut node = &mut self.root;
        let mut multi = false;
        for level in split(text).1.split('/') {
            match level {
                "#" => multi = true,
                "+" => node = node.any.as_mut()?,
                _ => node = node.children.get_mut(&self.levels.number(level)?)?,
            }
        }
        node.shares.as_mut()?[usize::from(multi)].iter_mut().find(|share| **share.filter == *text)
    }

    /// Passes each matching subscription to `found`; a subscriber may occur more than once. `path` can
    /// be reused for the next topic as long as no filter is added or removed.
    pub fn matches<'t, 'a>(
        &'t self,
        topic: &'a str,
        path: &mut Path<'a>,
        found: &mut impl FnMut(Found<'t, S>),
    ) {
        let mut walk = Walk { levels: &self.levels, path, depth: 0, rest: Some(topic) };
        // Wildcards at the first level do not match `$` topics (4.7.2).
        if topic.starts_with('$') {
            if let Level::Known(number) = walk.level(0)
                && let Some(child) = self.root.children.get(&number)
            {
                child.matches(&mut walk, 1, found);
            }
        } else {
            self.root.matches(&mut walk, 0, found);
        }
    }
}

impl<S> Node<S> {
    fn matches<'t>(&'t self, walk: &mut Walk<'_, '_>, depth: usize, found: &mut impl FnMut(Found<'t, S>)) {
        self.rest.iter().map(Found::One).for_each(&mut *found);
        if let Some(shares) = &self.shares {
            shares[1].iter().map(Found::Share).for_each(&mut *found);
        }
        match walk.level(depth) {
            Level::Known(number) => {
                if let Some(child) = self.children.get(&number) {
                    child.matches(walk, depth + 1, found);
                }
            }
            Level::Unknown => {}
            Level::End => {
                self.here.iter().map(Found::One).for_each(&mut *found);
                if let Some(shares) = &self.shares {
                    shares[0].iter().map(Found::Share).for_each(found);
                }
                return;
            }
        }
        if let Some(child) = &self.any {
            child.matches(walk, depth + 1, found);
        }
    }

    /// Removes a subscription. `share` is the whole text of a shared subscription.
    fn remove(
        &mut self,
        known: &mut Levels,
        levels: &mut std::str::Split<'_, char>,
        share: Option<&str>,
        number: u64,
    ) -> Option<Options> {
        match levels.next() {
            None => self.take(share, 0, number),
            Some("#") => self.take(share, 1, number),
            Some("+") => {
                let child = self.any.as_mut()?;
                let removed = child.remove(known, levels, share, number);
                if child.is_empty() {
                    self.any = None;
                }
                removed
            }
            Some(level) => {
                let key = known.number(level)?;
                let child = self.children.get_mut(&key)?;
                let removed = child.remove(known, levels, share, number);
                if child.is_empty() {
                    self.children.remove(&key);
                    known.give_back(level);
                }
                removed
            }
        }
    }

    /// Removes a subscriber from this node. `multi` is 1 for a filter that ends with `#`.
    fn take(&mut self, share: Option<&str>, multi: usize, number: u64) -> Option<Options> {
        let Some(text) = share else {
            let subscribers = if multi == 1 { &mut self.rest } else { &mut self.here };
            let at = subscribers.iter().position(|s| s.number == number)?;
            return Some(subscribers.swap_remove(at).options);
        };
        let both = self.shares.as_mut()?;
        let at = both[multi].iter().position(|share| **share.filter == *text)?;
        let taken = both[multi][at].take(number);
        if both[multi][at].members.is_empty() {
            both[multi].swap_remove(at);
        }
        if both.iter().all(Vec::is_empty) {
            self.shares = None;
        }
        taken
    }

    fn is_empty(&self) -> bool {
        let plain = self.here.is_empty() && self.rest.is_empty() && self.shares.is_none();
        plain && self.children.is_empty() && self.any.is_none()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    const OPTIONS: Options = Options { qos: 1, no_local: false, retain_as_published: true, id: 7 };

    fn found<'a>(tree: &Tree<()>, topic: &'a str, path: &mut Path<'a>) -> Vec<u64> {
        let mut numbers = Vec::new();
        tree.matches(topic, path, &mut |found| match found {
            Found::One(subscriber) => numbers.push(subscriber.number),
            Found::Share(share) => numbers.extend(share.members.iter().map(|member| member.number)),
        });
        numbers.sort_unstable();
        numbers
    }

    #[test]
    fn options_survive_their_bytes() {
        assert_eq!(Options::from_bytes(&OPTIONS.to_bytes()), Some((OPTIONS, &[][..])));
    }

    #[test]
    fn a_share_has_a_name_without_wildcards_and_a_filter() {
        for wrong in ["$share/a", "$share//a", "$share/+/a", "$share/a#/b", "$share/a/", "$share/a/b#"] {
            assert!(Filter::parse(wrong).is_none(), "{wrong}");
        }
        let filter = Filter::parse("$share/group/+/a").unwrap();
        assert!(filter.is_shared() && filter.topics().as_str() == "+/a");
        // The share itself is no topic's first level.
        assert!(!Filter::parse("share/group/a").unwrap().is_shared());
    }

    #[test]
    fn the_turn_goes_round() {
        let mut tree = Tree::default();
        for number in 0..3 {
            tree.insert("$share/g/a", number, (), OPTIONS, true);
        }
        let share = tree.share("$share/g/a").unwrap();
        let first = || share.beginning_with(share.next_turn()).next().unwrap().number;
        let first: Vec<_> = (0..6).map(|_| first()).collect();
        assert_eq!(first, [0, 1, 2, 0, 1, 2]);
    }

    proptest! {
        #[test]
        fn the_tree_finds_what_the_naive_matcher_finds(
            filters in prop::collection::vec(prop::collection::vec(
                prop_oneof![Just("a"), Just("b"), Just("$s"), Just(""), Just("+")], 1..5), 1..20),
            multi in prop::collection::vec(any::<bool>(), 20),
            topics in prop::collection::vec(prop::collection::vec(
                prop_oneof![Just("a"), Just("b"), Just("$s"), Just("")], 1..5), 1..20),
            gone in prop::collection::vec(any::<bool>(), 20),
            shared in prop::collection::vec(prop_oneof![Just(""), Just("$share/g/"), Just("$share/h/")], 20),
        ) {
            let filters: Vec<String> = filters.iter().zip(&multi)
                .map(|(levels, multi)| levels.join("/") + if *multi { "/#" } else { "" })
                .zip(&shared).filter(|(filter, _)| !filter.is_empty())
                .map(|(filter, share)| format!("{share}{filter}")).collect();
            let mut tree = Tree::default();
            for (i, filter) in filters.iter().enumerate() {
                prop_assert!(tree.insert(filter, i as u64, (), OPTIONS, true));
                prop_assert!(!tree.insert(filter, i as u64, (), OPTIONS, true));
            }
            for (i, filter) in filters.iter().enumerate().filter(|(i, _)| gone[*i]) {
                prop_assert!(tree.remove(filter, i as u64).is_some());
                prop_assert!(tree.remove(filter, i as u64).is_none());
            }
            let topics: Vec<String> = topics.iter().map(|levels| levels.join("/")).collect();
            let mut path = Path::default();
            for topic in topics.iter().filter(|topic| !topic.is_empty()) {
                let naive: Vec<u64> = (0..filters.len()).filter(|i| !gone[*i])
                    .filter(|i| Filter::parse(&filters[*i]).unwrap().topics().matches(topic))
                    .map(|i| i as u64).collect();
                prop_assert_eq!(found(&tree, topic, &mut path), naive, "{}", topic);
            }
            for (i, filter) in filters.iter().enumerate() {
                tree.remove(filter, i as u64);
            }
            prop_assert!(tree.root.is_empty() && tree.levels.known.is_empty());
        }
    }
}
