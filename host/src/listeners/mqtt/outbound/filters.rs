//! Changes of a persistent session's subscriptions on their way into the broker stream. They are
//! gathered where the subscriptions change, under one lock with them, so that the last change of a
//! filter is the one that is kept, and go with the session's next note, whoever writes that.

use std::collections::BTreeMap;

use super::Outbox;
use crate::listeners::mqtt::session::{Change, subscription_key};
use crate::listeners::mqtt::subscriptions::Options;

/// Number of bytes of changes of subscriptions in one append, about.
const AT_ONCE_BYTES: usize = 1 << 20;

/// The options of filters that are subscribed to; `None`: unsubscribed. Each change is not appended yet.
pub type FilterChanges = BTreeMap<Box<str>, Option<Options>>;

impl Outbox {
    /// A filter is subscribed to with these options; `None`: it is unsubscribed.
    pub fn change_filter(&mut self, filter: &str, options: Option<Options>) {
        if let Some(kept) = &mut self.kept {
            kept.filters.insert(filter.into(), options);
        }
    }

    /// Returns the first of the changes that are not appended, about [`AT_ONCE_BYTES`] of them, and
    /// whether these are all. Their caller says when they are appended: [`Outbox::filters_appended`].
    pub fn filter_changes(&self) -> (Vec<Change>, bool) {
        let Some(kept) = self.kept.as_ref().filter(|kept| !kept.filters.is_empty()) else {
            return (Vec::new(), true);
        };
        // A record also says how far the subscription is among the retained messages.
        let deliveries = self.retained.as_ref().map(|retained| retained.by_filter()).unwrap_or_default();
        let (mut some, mut bytes) = (Vec::new(), 0);
        for (filter, options) in &kept.filters {
            if bytes >= AT_ONCE_BYTES {
                return (some, false);
            }
            let key = subscription_key(kept.epoch(), filter);
            let value = options.map(|options| match deliveries.get(&**filter) {
                Some(delivery) => delivery.record(),
                None => options.to_bytes().into(),
            });
            bytes += key.len() + value.as_ref().map_or(0, Vec::len);
            some.push((key, value));
        }
        (some, true)
    }

    /// Forgets so many of the changes, from the first on: they were appended.
    pub fn filters_appended(&mut self, count: usize) {
        if let Some(kept) = &mut self.kept {
            for _ in 0..count {
                kept.filters.pop_first();
            }
        }
    }
}
