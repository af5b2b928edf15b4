//! Who wants which topics: a tree by topic level, so that a publish costs as
//! much as the filters that it meets, not as all filters there are.
//! Matching: MQTT 5.0, section 4.7; shared subscriptions: 4.8.2.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::session::Session;
use crate::topic::TopicFilter;

const SHARE: &str = "$share/";

/// Deeper filters are refused: matching recurses once per level.
pub const FILTER_LEVELS_MAX: usize = 128;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    pub qos: u8,
    pub no_local: bool,
    pub retain_as_published: bool,
    /// 0: none.
    pub id: u32,
}

impl Options {
    /// As kept in a session's durable state.
    pub fn to_bytes(self) -> [u8; 5] {
        let id = self.id.to_be_bytes();
        let bits = self.qos | u8::from(self.no_local) << 2 | u8::from(self.retain_as_published) << 3;
        [bits, id[0], id[1], id[2], id[3]]
    }

    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let &[bits, a, b, c, d] = bytes else { return None };
        Some(Self {
            qos: (bits & 3).min(2),
            no_local: bits & 4 != 0,
            retain_as_published: bits & 8 != 0,
            id: u32::from_be_bytes([a, b, c, d]),
        })
    }
}

/// What a SUBSCRIBE names: `sensors/#`, or `$share/NAME/sensors/#`.
#[derive(Clone, Debug)]
pub struct Filter {
    text: Box<str>,
    topics: TopicFilter,
}

impl Filter {
    /// `None`: not valid (4.7.1, 4.8.2).
    pub fn parse(text: &str) -> Option<Self> {
        let (share, topics) = split(text);
        let named = |name: &str| !name.is_empty() && !name.contains(['+', '#']);
        if (share.is_none() && text.starts_with(SHARE)) || share.is_some_and(|name| !named(name)) {
            return None;
        }
        Some(Self { text: text.into(), topics: TopicFilter::new(topics).ok()? })
    }

    /// As the client wrote it.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    pub fn is_shared(&self) -> bool {
        self.text.len() > self.topics.as_str().len()
    }

    pub fn topics(&self) -> &TopicFilter {
        &self.topics
    }
}

/// Name of the share, if any, and the filter of topics.
fn split(text: &str) -> (Option<&str>, &str) {
    match text.strip_prefix(SHARE).and_then(|rest| rest.split_once('/')) {
        Some((name, filter)) => (Some(name), filter),
        None => (None, text),
    }
}

/// Whether messages of streams can match: `$` topics lie in none.
pub fn is_live(text: &str) -> bool {
    !split(text).1.starts_with('$')
}

/// The tree. `S` is who subscribes; compared by `number`.
pub struct Tree<S = Arc<Session>> {
    root: Node<S>,
}

struct Node<S> {
    children: HashMap<Box<str>, Node<S>>,
    /// Filters that end at this level.
    here: Vec<Subscriber<S>>,
    /// Filters that end with `#` below this level.
    rest: Vec<Subscriber<S>>,
    /// The child `+`.
    any: Option<Box<Node<S>>>,
    /// Shared subscriptions that end here: with and without `#`.
    shares: Option<Box<[Vec<Share<S>>; 2]>>,
}

/// The subscribers of one `$share/NAME/FILTER`: each message goes to one.
pub struct Share<S> {
    /// As a client wrote it.
    pub filter: Arc<str>,
    /// At least one.
    pub members: Vec<Subscriber<S>>,
    turn: AtomicUsize,
}

impl<S> Share<S> {
    /// The members, beginning with the one whose turn it is; passes the turn on.
    pub fn in_turn(&self) -> impl Iterator<Item = &Subscriber<S>> {
        let first = self.turn.fetch_add(1, Ordering::Relaxed) % self.members.len();
        self.members[first..].iter().chain(&self.members[..first])
    }
}

/// What a topic meets.
pub enum Found<'t, S> {
    One(&'t Subscriber<S>),
    Share(&'t Share<S>),
}

pub struct Subscriber<S> {
    pub number: u64,
    pub session: S,
    pub options: Options,
}

impl<S> Default for Node<S> {
    fn default() -> Self {
        Self { children: HashMap::new(), here: Vec::new(), rest: Vec::new(), any: None, shares: None }
    }
}

impl<S> Default for Tree<S> {
    fn default() -> Self {
        Self { root: Node::default() }
    }
}

impl<S> Tree<S> {
    /// True when the subscriber did not have this filter yet.
    pub fn insert(&mut self, text: &str, number: u64, session: S, options: Options) -> bool {
        let (share, filter) = split(text);
        let mut node = &mut self.root;
        let mut multi = false;
        for level in filter.split('/') {
            match level {
                "#" => multi = true,
                "+" => node = node.any.get_or_insert_with(Box::default),
                // Looked up first: the key is made only for a new level.
                _ if node.children.contains_key(level) => {
                    node = node.children.get_mut(level).expect("it was just found");
                }
                _ => node = node.children.entry(level.into()).or_default(),
            }
        }
        let subscribers = match (share, multi) {
            (Some(_), multi) => {
                let shares = &mut node.shares.get_or_insert_default()[usize::from(multi)];
                let at = shares.iter().position(|share| &*share.filter == text).unwrap_or_else(|| {
                    let turn = AtomicUsize::new(0);
                    shares.push(Share { filter: text.into(), members: Vec::new(), turn });
                    shares.len() - 1
                });
                &mut shares[at].members
            }
            (None, true) => &mut node.rest,
            (None, false) => &mut node.here,
        };
        if let Some(known) = subscribers.iter_mut().find(|s| s.number == number) {
            known.options = options;
            return false;
        }
        subscribers.push(Subscriber { number, session, options });
        true
    }

    /// What the subscriber had this filter with.
    pub fn remove(&mut self, text: &str, number: u64) -> Option<Options> {
        let (share, filter) = split(text);
        self.root.remove(&mut filter.split('/'), share.map(|_| text), number)
    }

    /// The share of this filter, if it has members.
    pub fn share(&self, text: &str) -> Option<&Share<S>> {
        let mut node = &self.root;
        let mut multi = false;
        for level in split(text).1.split('/') {
            match level {
                "#" => multi = true,
                "+" => node = node.any.as_ref()?,
                _ => node = node.children.get(level)?,
            }
        }
        node.shares.as_ref()?[usize::from(multi)].iter().find(|share| &*share.filter == text)
    }

    /// Gives each subscription that matches; a subscriber may come more than once.
    pub fn matches<'t>(&'t self, topic: &str, found: &mut impl FnMut(Found<'t, S>)) {
        // Wildcards at the first level do not match `$` topics (4.7.2).
        if topic.starts_with('$') {
            let (first, rest) = match topic.split_once('/') {
                Some((first, rest)) => (first, Some(rest)),
                None => (topic, None),
            };
            if let Some(child) = self.root.children.get(first) {
                child.matches(rest, found);
            }
        } else {
            self.root.matches(Some(topic), found);
        }
    }
}

impl<S> Node<S> {
    fn matches<'t>(&'t self, topic: Option<&str>, found: &mut impl FnMut(Found<'t, S>)) {
        self.rest.iter().map(Found::One).for_each(&mut *found);
        if let Some(shares) = &self.shares {
            shares[1].iter().map(Found::Share).for_each(&mut *found);
        }
        let Some(topic) = topic else {
            self.here.iter().map(Found::One).for_each(&mut *found);
            if let Some(shares) = &self.shares {
                shares[0].iter().map(Found::Share).for_each(found);
            }
            return;
        };
        let (level, rest) = match topic.split_once('/') {
            Some((level, rest)) => (level, Some(rest)),
            None => (topic, None),
        };
        if let Some(child) = self.children.get(level) {
            child.matches(rest, found);
        }
        if let Some(child) = &self.any {
            child.matches(rest, found);
        }
    }

    /// `share`: the whole text of a shared subscription.
    fn remove(
        &mut self,
        levels: &mut std::str::Split<'_, char>,
        share: Option<&str>,
        number: u64,
    ) -> Option<Options> {
        match levels.next() {
            None => self.take(share, 0, number),
            Some("#") => self.take(share, 1, number),
            Some("+") => {
                let child = self.any.as_mut()?;
                let removed = child.remove(levels, share, number);
                if child.is_empty() {
                    self.any = None;
                }
                removed
            }
            Some(level) => {
                let child = self.children.get_mut(level)?;
                let removed = child.remove(levels, share, number);
                if child.is_empty() {
                    self.children.remove(level);
                }
                removed
            }
        }
    }

    /// `multi`: 1 for a filter that ends with `#`.
    fn take(&mut self, share: Option<&str>, multi: usize, number: u64) -> Option<Options> {
        let take = |subscribers: &mut Vec<Subscriber<S>>| {
            let at = subscribers.iter().position(|s| s.number == number)?;
            Some(subscribers.swap_remove(at).options)
        };
        let Some(text) = share else {
            return take(if multi == 1 { &mut self.rest } else { &mut self.here });
        };
        let both = self.shares.as_mut()?;
        let at = both[multi].iter().position(|share| &*share.filter == text)?;
        let taken = take(&mut both[multi][at].members);
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

    fn found(tree: &Tree<()>, topic: &str) -> Vec<u64> {
        let mut numbers = Vec::new();
        tree.matches(topic, &mut |found| match found {
            Found::One(subscriber) => numbers.push(subscriber.number),
            Found::Share(share) => numbers.extend(share.members.iter().map(|member| member.number)),
        });
        numbers.sort_unstable();
        numbers
    }

    #[test]
    fn options_survive_their_bytes() {
        assert_eq!(Options::from_bytes(&OPTIONS.to_bytes()), Some(OPTIONS));
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
            tree.insert("$share/g/a", number, (), OPTIONS);
        }
        let share = tree.share("$share/g/a").unwrap();
        let first: Vec<_> = (0..6).map(|_| share.in_turn().next().unwrap().number).collect();
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
                prop_assert!(tree.insert(filter, i as u64, (), OPTIONS));
                prop_assert!(!tree.insert(filter, i as u64, (), OPTIONS));
            }
            for (i, filter) in filters.iter().enumerate().filter(|(i, _)| gone[*i]) {
                prop_assert!(tree.remove(filter, i as u64).is_some());
                prop_assert!(tree.remove(filter, i as u64).is_none());
            }
            for topic in topics.iter().map(|levels| levels.join("/")).filter(|topic| !topic.is_empty()) {
                let naive: Vec<u64> = (0..filters.len()).filter(|i| !gone[*i])
                    .filter(|i| Filter::parse(&filters[*i]).unwrap().topics().matches(&topic))
                    .map(|i| i as u64).collect();
                prop_assert_eq!(found(&tree, &topic), naive, "{}", topic);
            }
            for (i, filter) in filters.iter().enumerate() {
                tree.remove(filter, i as u64);
            }
            prop_assert!(tree.root.is_empty());
        }
    }
}
