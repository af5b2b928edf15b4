//! Topic aliases towards one client (MQTT 5.0, 3.3.2.3.4): the topics that it is
//! sent first get one each, for as long as its connection lasts.

use std::collections::HashMap;

/// An alias takes as much on its first use, and stands for the topic from then on.
const PROPERTY_BYTES: usize = 3;

pub struct Aliases {
    max: u16,
    #[expect(clippy::box_collection, reason = "most connections use none, and carry a pointer then")]
    known: Option<Box<HashMap<Box<str>, u16>>>,
}

/// How a PUBLISH names its topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name<'t> {
    /// Empty where the alias says it all.
    pub topic: &'t str,
    /// 0: none.
    pub alias: u16,
}

impl<'t> Name<'t> {
    pub fn plain(topic: &'t str) -> Self {
        Self { topic, alias: 0 }
    }

    /// The client learns the alias from this PUBLISH.
    pub fn is_new(self) -> bool {
        self.alias > 0 && !self.topic.is_empty()
    }
}

impl Aliases {
    /// At most `max`, which the client takes; 0: none.
    pub fn new(max: u16) -> Self {
        Self { max, known: None }
    }

    pub fn name<'t>(&self, topic: &'t str) -> Name<'t> {
        if self.max == 0 || topic.len() <= PROPERTY_BYTES {
            return Name::plain(topic);
        }
        let known = self.known.as_deref();
        let count = known.map_or(0, HashMap::len);
        match known.and_then(|known| known.get(topic)) {
            Some(alias) => Name { topic: "", alias: *alias },
            None if count < usize::from(self.max) => Name { topic, alias: count as u16 + 1 },
            None => Name::plain(topic),
        }
    }

    /// A PUBLISH with this name is on its way.
    pub fn sent(&mut self, name: Name<'_>) {
        if name.is_new() {
            self.known.get_or_insert_default().insert(name.topic.into(), name.alias);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_client_that_remembers_aliases_knows_every_topic(
            max in 0u16..5,
            topics in prop::collection::vec(("[a-c]{0,6}", any::<bool>()), 0..60),
        ) {
            let mut aliases = Aliases::new(max);
            let mut client: HashMap<u16, String> = HashMap::new();
            for (topic, is_sent) in &topics {
                let name = aliases.name(topic);
                prop_assert!(name.alias <= max);
                // Too large for the client, perhaps: it learns nothing.
                if !is_sent {
                    continue;
                }
                aliases.sent(name);
                if name.is_new() {
                    prop_assert!(client.insert(name.alias, name.topic.to_owned()).is_none(), "one topic each");
                }
                let known = if name.topic.is_empty() { client.get(&name.alias) } else { None };
                prop_assert_eq!(known.map_or(name.topic, |topic| topic), topic);
            }
        }
    }
}
