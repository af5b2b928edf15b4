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

/// Some of the changes, to be appended.
pub struct FilterPage {
    /// The filters that they are of.
    pub filters: Vec<Box<str>>,
    pub changes: Vec<Change>,
    /// Whether there are no more.
    pub is_last: bool,
}

impl Outbox {
    /// A filter is subscribed to with these options; `None`: it is unsubscribed.
    pub fn change_filter(&mut self, filter: &str, options: Option<Options>) {
        if let Some(kept) = &mut self.kept {
            kept.filters.insert(filter.into(), options);
        }
    }

    /// The change of a filter, which is a share's, is not appended before [`Outbox::record_written`].
    pub fn await_record(&mut self, filter: &str) {
        if let Some(kept) = &mut self.kept {
            kept.awaiting_records.insert(filter.into());
        }
    }

    /// The record of a share is written.
    pub fn record_written(&mut self, filter: &str) {
        if let Some(kept) = &mut self.kept {
            kept.awaiting_records.remove(filter);
        }
    }

    /// Whether changes wait for the record of a share.
    pub fn awaits_record(&self) -> bool {
        self.kept.as_ref().is_some_and(|kept| !kept.awaiting_records.is_empty())
    }

    /// Returns the first of the changes that may be appended, about [`AT_ONCE_BYTES`] of them, and
    /// whether these are all. Their caller says when they are appended: [`Outbox::filters_appended`].
    pub fn filter_changes(&self) -> FilterPage {
        let mut page = FilterPage { filters: Vec::new(), changes: Vec::new(), is_last: true };
        let Some(kept) = self.kept.as_ref().filter(|kept| !kept.filters.is_empty()) else { return page };
        // A record also says how far the subscription is among the retained messages.
        let deliveries = self.retained.as_ref().map(|retained| retained.by_filter()).unwrap_or_default();
        let mut bytes = 0;
        let changes = kept.filters.iter().filter(|(filter, _)| !kept.awaiting_records.contains(*filter));
        for (filter, options) in changes {
            if bytes >= AT_ONCE_BYTES {
                page.is_last = false;
                break;
            }
            let key = subscription_key(kept.epoch(), filter);
            let value = options.map(|options| match deliveries.get(&**filter) {
                Some(delivery) => delivery.record(),
                None => options.to_bytes().into(),
            });
            bytes += key.len() + value.as_ref().map_or(0, Vec::len);
            page.filters.push(filter.clone());
            page.changes.push((key, value));
        }
        page
    }

    /// Forgets the changes of these filters: they were appended.
    pub fn filters_appended(&mut self, filters: &[Box<str>]) {
        if let Some(kept) = &mut self.kept {
            filters.iter().for_each(|filter| _ = kept.filters.remove(filter));
        }
    }
}
