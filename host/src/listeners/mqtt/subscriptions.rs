//! Who wants which topics: a tree by topic level, so that a publish costs as
//! much as the filters that it meets, not as all filters there are.
//! Matching: MQTT 5.0, section 4.7.

use std::collections::HashMap;
use std::sync::Arc;

use super::session::Session;

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
}

pub struct Subscriber<S> {
    pub number: u64,
    pub session: S,
    pub options: Options,
}

impl<S> Default for Node<S> {
    fn default() -> Self {
        Self { children: HashMap::new(), here: Vec::new(), rest: Vec::new(), any: None }
    }
}

impl<S> Default for Tree<S> {
    fn default() -> Self {
        Self { root: Node::default() }
    }
}

impl<S> Tree<S> {
    /// True when the subscriber did not have this filter yet.
    pub fn insert(&mut self, filter: &str, number: u64, session: S, options: Options) -> bool {
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
        let subscribers = if multi { &mut node.rest } else { &mut node.here };
        if let Some(known) = subscribers.iter_mut().find(|s| s.number == number) {
            known.options = options;
            return false;
        }
        subscribers.push(Subscriber { number, session, options });
        true
    }

    /// What the subscriber had this filter with.
    pub fn remove(&mut self, filter: &str, number: u64) -> Option<Options> {
        self.root.remove(&mut filter.split('/'), number)
    }

    /// Gives each subscription that matches; a subscriber may come more than once.
    pub fn matches<'t>(&'t self, topic: &str, found: &mut impl FnMut(&'t Subscriber<S>)) {
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
    fn matches<'t>(&'t self, topic: Option<&str>, found: &mut impl FnMut(&'t Subscriber<S>)) {
        self.rest.iter().for_each(&mut *found);
        let Some(topic) = topic else {
            self.here.iter().for_each(found);
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

    fn remove(&mut self, levels: &mut std::str::Split<'_, char>, number: u64) -> Option<Options> {
        let take = |subscribers: &mut Vec<Subscriber<S>>| {
            let at = subscribers.iter().position(|s| s.number == number)?;
            Some(subscribers.swap_remove(at).options)
        };
        match levels.next() {
            None => take(&mut self.here),
            Some("#") => take(&mut self.rest),
            Some("+") => {
                let child = self.any.as_mut()?;
                let removed = child.remove(levels, number);
                if child.is_empty() {
                    self.any = None;
                }
                removed
            }
            Some(level) => {
                let child = self.children.get_mut(level)?;
                let removed = child.remove(levels, number);
                if child.is_empty() {
                    self.children.remove(level);
                }
                removed
            }
        }
    }

    fn is_empty(&self) -> bool {
        self.children.is_empty() && self.here.is_empty() && self.rest.is_empty() && self.any.is_none()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::topic::TopicFilter;

    const OPTIONS: Options = Options { qos: 1, no_local: false, retain_as_published: true, id: 7 };

    fn found(tree: &Tree<()>, topic: &str) -> Vec<u64> {
        let mut numbers = Vec::new();
        tree.matches(topic, &mut |s| numbers.push(s.number));
        numbers.sort_unstable();
        numbers
    }

    #[test]
    fn options_survive_their_bytes() {
        assert_eq!(Options::from_bytes(&OPTIONS.to_bytes()), Some(OPTIONS));
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
        ) {
            let filters: Vec<String> = filters.iter().zip(&multi)
                .map(|(levels, multi)| levels.join("/") + if *multi { "/#" } else { "" })
                .filter(|filter| !filter.is_empty()).collect();
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
                    .filter(|i| TopicFilter::new(&filters[*i]).unwrap().matches(&topic))
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
