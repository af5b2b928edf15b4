//! Changes of a persistent session's subscriptions that are not yet in the broker's stream. They are
//! collected under the lock under which subscriptions change, so that the last change of a filter is the
//! one that is stored, and are written with the session's next note.

use std::collections::BTreeMap;

use super::Outbox;
use crate::listeners::mqtt::session::{Change, subscription_key};
use crate::listeners::mqtt::subscriptions::Options;

/// Approximate number of bytes of subscription changes in one append.
const AT_ONCE_BYTES: usize = 1 << 20;

/// Changes that are not appended yet: the options of a subscribed filter, or `None` for an unsubscribed
/// one.
pub type FilterChanges = BTreeMap<Box<str>, Option<Options>>;

/// Some of the changes, which are to be appended.
pub struct FilterPage {
    /// The filters of these changes.
    pub filters: Vec<Box<str>>,
    pub changes: Vec<Change>,
    /// Whether there are no further changes.
    pub is_last: bool,
}

impl Outbox {
    /// Records that a filter was subscribed to with these options, or unsubscribed (`None`).
    pub fn change_filter(&mut self, filter: &str, options: Option<Options>) {
        if let Some(kept) = &mut self.kept {
            kept.filters.insert(filter.into(), options);
        }
    }

    /// Holds the change of a share's filter back until [`Outbox::record_written`].
    pub fn await_record(&mut self, filter: &str) {
        if let Some(kept) = &mut self.kept {
            kept.awaiting_records.insert(filter.into());
        }
    }

    /// Records that the record of a share is written.
    pub fn record_written(&mut self, filter: &str) {
        if let Some(kept) = &mut self.kept {
            kept.awaiting_records.remove(filter);
        }
    }

    /// Returns whether changes wait for the record of a share.
    pub fn awaits_record(&self) -> bool {
        self.kept.as_ref().is_some_and(|kept| !kept.awaiting_records.is_empty())
    }

    /// Returns the first changes that may be appended, about [`AT_ONCE_BYTES`] of them, and whether
    /// these are all. The caller reports that they are appended with [`Outbox::filters_appended`].
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

    /// Forgets the changes of these filters, which were appended.
    pub fn filters_appended(&mut self, filters: &[Box<str>]) {
        if let Some(kept) = &mut self.kept {
            filters.iter().for_each(|filter| _ = kept.filters.remove(filter));
        }
    }
}
