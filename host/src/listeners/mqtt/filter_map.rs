//! A map by filter that takes no memory of its own for a single filter, because most sessions have one.

use std::collections::BTreeMap;

#[derive(Debug)]
pub struct FilterMap<V> {
    /// The entry of whichever filter came while the map had none here.
    single: Option<(Box<str>, V)>,
    others: BTreeMap<Box<str>, V>,
}

impl<V> Default for FilterMap<V> {
    fn default() -> Self {
        Self { single: None, others: BTreeMap::new() }
    }
}

impl<V> FilterMap<V> {
    pub fn len(&self) -> usize {
        usize::from(self.single.is_some()) + self.others.len()
    }

    pub fn contains(&self, filter: &str) -> bool {
        self.is_single(filter) || self.others.contains_key(filter)
    }

    /// Sets the value of a filter, and returns the one that it had.
    pub fn insert(&mut self, filter: &str, value: V) -> Option<V> {
        match &mut self.single {
            Some((known, before)) if **known == *filter => Some(std::mem::replace(before, value)),
            None if !self.others.contains_key(filter) => {
                self.single = Some((filter.into(), value));
                None
            }
            _ => self.others.insert(filter.into(), value),
        }
    }

    pub fn remove(&mut self, filter: &str) -> Option<V> {
        match self.single.take_if(|(known, _)| **known == *filter) {
            Some((_, value)) => Some(value),
            None => self.others.remove(filter),
        }
    }

    /// Returns the entries in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &V)> {
        let single = self.single.iter().map(|(filter, value)| (&**filter, value));
        single.chain(self.others.iter().map(|(filter, value)| (&**filter, value)))
    }

    /// Returns the filters in no order.
    pub fn filters(&self) -> impl Iterator<Item = &str> {
        self.iter().map(|(filter, _)| filter)
    }

    fn is_single(&self, filter: &str) -> bool {
        self.single.as_ref().is_some_and(|(known, _)| **known == *filter)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_has_what_a_map_has(
            changes in proptest::collection::vec((0_u8..4, any::<Option<u8>>()), 0..40),
        ) {
            let (mut map, mut model) = (FilterMap::default(), BTreeMap::new());
            for (filter, value) in changes {
                let filter = format!("f/{filter}");
                match value {
                    Some(value) => {
                        prop_assert_eq!(map.insert(&filter, value), model.insert(filter.clone(), value));
                    }
                    None => prop_assert_eq!(map.remove(&filter), model.remove(&filter)),
                }
                prop_assert_eq!(map.len(), model.len());
                prop_assert_eq!(map.contains(&filter), model.contains_key(&filter));
                let all: BTreeMap<_, _> = map.iter().map(|(filter, value)| (filter.to_owned(), *value)).collect();
                prop_assert_eq!(&all, &model);
            }
        }
    }
}
