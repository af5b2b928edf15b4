//! The retained messages for new subscriptions. They stay where they are stored, whatever their number:
//! a subscription stores how far it has come among them, and one page at a time is looked up as the
//! client takes it. They do not count for the bounds of the queue and do not age. For a persistent
//! session the progress is stored in the subscription's record, so that it continues after a reconnect
//! or a restart.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::{Message, Outbox, Queued, Source};
use crate::listeners::mqtt::clock::Clock;
use crate::listeners::mqtt::retained::{Kept, Lookup, Retained};
use crate::listeners::mqtt::session::{Change, subscription_key};
use crate::listeners::mqtt::subscriptions::{Filter, Options};

/// Most retained messages of one lookup.
const PAGE_MESSAGES_MAX: usize = 64;
const PAGE_BYTES_MAX: usize = 256 << 10;
/// Bytes of the last delivered topic in the record. Messages of topics that share these bytes are
/// delivered again.
const TAKEN_BYTES_MAX: usize = 256;
/// Size of the time of the subscription in a record.
const SINCE_BYTES: usize = 8;

#[derive(Default)]
pub(super) struct Deliveries {
    open: VecDeque<Delivery>,
    /// Deliveries that ended since their record was written.
    ended: Vec<(Box<str>, Options)>,
    /// Bytes of the messages in pages.
    bytes: usize,
}

/// The pending retained messages of one subscription.
pub(super) struct Delivery {
    number: u64,
    filter: Filter,
    options: Options,
    from: RetainedFrom,
    /// Key of the last topic whose message was taken to be sent.
    taken: Option<Box<str>>,
    /// Lookup that continues after `page`; `None` if nothing is to be looked up.
    lookup: Option<Lookup>,
    page: VecDeque<Found>,
    /// Whether its record is not up to date.
    changed: bool,
}

/// The time from which a subscription receives messages live. Earlier ones it receives as retained.
#[derive(Clone, Debug)]
pub struct RetainedFrom {
    /// Broker time of the SUBSCRIBE.
    pub since_us: u64,
    /// Position of live delivery by stream; empty after a restart.
    pub upto: Box<[u64]>,
}

impl RetainedFrom {
    fn includes(&self, kept: &Kept, clock: &Clock) -> bool {
        match self.upto.get(kept.stream) {
            Some(upto) => kept.offset.0 < *upto,
            None => clock.of_wall(kept.message.received_us()) <= self.since_us,
        }
    }
}

struct Found {
    key: Box<str>,
    queued: Queued,
}

/// A page that is to be looked up, and what was found.
pub struct RetainedPage {
    number: u64,
    lookup: Lookup,
    from: RetainedFrom,
    options: Options,
    messages_max: usize,
    found: Vec<Found>,
    bytes: usize,
}

impl Delivery {
    /// Returns the record of its subscription, with its options and the progress.
    pub fn record(&self) -> Vec<u8> {
        let taken = self.taken.as_deref().unwrap_or_default();
        let taken = &taken[..taken.floor_char_boundary(TAKEN_BYTES_MAX)];
        let since = self.from.since_us.to_be_bytes();
        [&self.options.to_bytes()[..], &since, taken.as_bytes()].concat()
    }

    /// What was looked up and not taken is looked up again, but for what the broker made for the moment, which
    /// has no key.
    fn look_again(&mut self) {
        if self.page.front().is_some_and(|found| !found.key.is_empty()) {
            self.page = VecDeque::new();
            self.lookup = Some(Lookup::new(self.filter.topics(), self.taken.as_deref()));
        }
    }

    /// What comes behind its last page, where that was taken.
    fn next_page(&self) -> Option<RetainedPage> {
        let lookup = self.lookup.clone().filter(|_| self.page.is_empty())?;
        Some(RetainedPage {
            number: self.number,
            lookup,
            from: self.from.clone(),
            options: self.options,
            messages_max: PAGE_MESSAGES_MAX,
            found: Vec::new(),
            bytes: 0,
        })
    }
}

impl Found {
    fn bytes(&self) -> usize {
        size_of::<Self>() + self.key.len() + self.queued.bytes()
    }
}

impl RetainedPage {
    pub fn number(&self) -> u64 {
        self.number
    }

    pub fn is_done(&self) -> bool {
        self.lookup.is_done() || self.is_full()
    }

    #[cfg(test)]
    pub fn messages_max(&self) -> usize {
        self.messages_max
    }

    fn is_full(&self) -> bool {
        self.found.len() >= self.messages_max || self.bytes >= PAGE_BYTES_MAX
    }

    /// Looks at no more than `steps_max` topics. With No Local the client is not given what it published
    /// itself (MQTT 5.0, 3.8.3.1).
    pub fn look(&mut self, retained: &Retained, client_id: &str, clock: &Clock, steps_max: usize) {
        let mut lookup = self.lookup.clone();
        retained.look(&mut lookup, steps_max, |key, kept| {
            let is_own = self.options.no_local && kept.is_of(client_id);
            if !is_own && self.from.includes(kept, clock) {
                let source = Source::Retained(kept.message.clone());
                let qos = kept.message.qos.min(self.options.qos);
                let queued = Queued::whole(source, qos, self.options, self.from.since_us);
                self.bytes += kept.message.len();
                self.found.push(Found { key: key.into(), queued });
            }
            !self.is_full()
        });
        self.lookup = lookup;
    }
}

impl Outbox {
    /// Begins to deliver retained messages to a subscription.
    pub fn give_retained(&mut self, filter: &Filter, options: Options, from: RetainedFrom) {
        self.end_retained(filter.as_str());
        let lookup = Some(Lookup::new(filter.topics(), None));
        self.deliver(filter, options, from, None, lookup, VecDeque::new());
        self.changed();
    }

    /// Begins to deliver messages that the broker makes at that moment.
    pub fn give_whole(&mut self, filter: &Filter, options: Options, since_us: u64, messages: Vec<Message>) {
        self.end_retained(filter.as_str());
        let page = messages.into_iter().map(|message| {
            let source = Source::Broker(Arc::new(message));
            Found { key: Box::default(), queued: Queued::whole(source, 0, options, since_us) }
        });
        let from = RetainedFrom { since_us, upto: Box::default() };
        self.deliver(filter, options, from, None, None, page.collect());
        self.count_retained();
    }

    /// Restores a delivery that a restart found: see [`Outbox::note`].
    pub fn resume_retained(&mut self, filter: &Filter, options: Options, record: &[u8]) {
        let Some((since, taken)) = record.split_first_chunk::<SINCE_BYTES>() else { return };
        let from = RetainedFrom { since_us: u64::from_be_bytes(*since), upto: Box::default() };
        let taken = std::str::from_utf8(taken).ok().filter(|taken| !taken.is_empty());
        let lookup = Some(Lookup::new(filter.topics(), taken));
        self.deliver(filter, options, from, taken.map(Into::into), lookup, VecDeque::new());
    }

    fn deliver(
        &mut self,
        filter: &Filter,
        options: Options,
        from: RetainedFrom,
        taken: Option<Box<str>>,
        lookup: Option<Lookup>,
        page: VecDeque<Found>,
    ) {
        self.last_retained += 1;
        let (number, filter) = (self.last_retained, filter.clone());
        let changed = lookup.is_some();
        let delivery = Delivery { number, filter, options, from, taken, lookup, page, changed };
        self.retained.get_or_insert_default().open.push_back(delivery);
    }

    /// Frees the memory of deliveries once all have ended and are recorded: most clients subscribe once and
    /// then wait for months.
    pub(super) fn free_retained(&mut self) {
        self.retained.take_if(|retained| retained.open.is_empty() && retained.ended.is_empty());
    }

    /// Changes the options of a delivery, for a repeated subscription that requests no retained
    /// messages.
    pub fn change_retained(&mut self, filter: &str, options: Options) {
        let Some(retained) = &mut self.retained else { return };
        for delivery in retained.open.iter_mut().filter(|it| it.filter.as_str() == filter) {
            if delivery.options.no_local != options.no_local {
                delivery.look_again();
            }
            (delivery.options, delivery.changed) = (options, true);
        }
        retained.ended.retain(|(ended, _)| &**ended != filter);
        self.count_retained();
    }

    /// Ends the delivery of an unsubscribed filter.
    pub fn end_retained(&mut self, filter: &str) {
        let Some(retained) = &mut self.retained else { return };
        retained.open.retain(|delivery| delivery.filter.as_str() != filter);
        retained.ended.retain(|(ended, _)| &**ended != filter);
        self.count_retained();
        self.free_retained();
    }

    fn changed(&mut self) {
        if let Some(kept) = &mut self.kept {
            kept.changed = true;
        }
    }

    /// Returns the page that is to be looked up next.
    pub(super) fn wants_page(&self) -> Option<RetainedPage> {
        self.retained.as_ref()?.open.front()?.next_page().map(|page| self.within_memory(page))
    }

    /// Reduces the page to one message if there is no memory for a whole page.
    fn within_memory(&self, page: RetainedPage) -> RetainedPage {
        let has_room = self.memory.has_room(self.size() + PAGE_BYTES_MAX);
        RetainedPage { messages_max: if has_room { PAGE_MESSAGES_MAX } else { 1 }, ..page }
    }

    fn count_retained(&mut self) {
        self.retained.iter_mut().for_each(|retained| retained.count());
        self.count();
    }

    /// Returns the number of the newest subscription for which retained messages are, or were, to be
    /// delivered.
    pub fn last_retained(&self) -> u64 {
        self.last_retained
    }

    /// Returns the first page of the next subscription after number `behind`, unless a page of messages
    /// is already waiting.
    pub(super) fn first_page(&self, behind: u64) -> Option<RetainedPage> {
        let retained = self.retained.as_ref()?;
        let bytes: usize = retained.heads().map(|queued| queued.len as usize).sum();
        if retained.len() >= PAGE_MESSAGES_MAX || bytes >= PAGE_BYTES_MAX {
            return None;
        }
        let mut behind = retained.open.iter().filter(|delivery| delivery.number > behind);
        behind.find_map(Delivery::next_page).map(|page| self.within_memory(page))
    }

    /// Takes the results of a lookup, except messages that were replaced since. Both locks are held, so
    /// that a replacement is delivered after the retained message.
    pub fn retained_found(&mut self, page: RetainedPage, retained: &Retained) {
        let mut open = self.retained.iter_mut().flat_map(|retained| &mut retained.open);
        let Some(delivery) = open.find(|it| it.number == page.number) else { return };
        if delivery.options.no_local != page.options.no_local {
            // Its subscription was changed meanwhile: it is looked up again.
            return;
        }
        let is_current =
            |found: &Found| found.queued.message().is_some_and(|it| retained.is_current(&found.key, it));
        delivery.page.extend(page.found.into_iter().filter(is_current));
        delivery.lookup = (!page.lookup.is_done()).then_some(page.lookup);
        self.end_given();
        self.count_retained();
    }

    /// Returns the next retained message in memory.
    pub(super) fn retained_head(&self) -> Option<&Queued> {
        self.retained.as_ref()?.open.front()?.page.front().map(|found| &found.queued)
    }

    pub(super) fn take_retained(&mut self) -> Option<Queued> {
        let retained = self.retained.as_mut()?;
        let delivery = retained.open.front_mut()?;
        let found = delivery.page.pop_front()?;
        retained.bytes -= found.bytes();
        let Found { key, queued } = found;
        (delivery.taken, delivery.changed) = (Some(key), true);
        self.changed();
        self.end_given();
        Some(queued)
    }

    fn end_given(&mut self) {
        let is_given = |delivery: &Delivery| delivery.page.is_empty() && delivery.lookup.is_none();
        let Some(retained) = &mut self.retained else { return };
        while let Some(delivery) = retained.open.pop_front_if(|delivery| is_given(delivery)) {
            if let Some(kept) = &mut self.kept {
                retained.ended.push((delivery.filter.as_str().into(), delivery.options));
                kept.changed = true;
            }
        }
        self.free_retained();
    }

    pub(super) fn keep_only_retained(&mut self, may_see: impl Fn(&str) -> bool) {
        let Some(retained) = &mut self.retained else { return };
        for delivery in &mut retained.open {
            delivery.page.retain(|it| it.queued.message().is_none_or(|it| may_see(it.topic())));
        }
        retained.count();
        self.end_given();
    }
}

impl Deliveries {
    /// Returns the bytes of messages that were looked up and wait.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn count(&mut self) {
        self.bytes = self.open.iter().flat_map(|delivery| &delivery.page).map(Found::bytes).sum();
    }

    /// Returns the number of messages that were looked up and wait.
    pub fn len(&self) -> usize {
        self.open.iter().map(|delivery| delivery.page.len()).sum()
    }

    pub fn heads(&self) -> impl Iterator<Item = &Queued> {
        self.open.iter().flat_map(|delivery| &delivery.page).map(|found| &found.queued)
    }

    /// Handles the end of the connection: messages that were not taken are looked up again.
    pub fn disconnected(&mut self) {
        // What was made for the moment has no key.
        self.open.retain(|delivery| delivery.page.front().is_none_or(|found| !found.key.is_empty()));
        self.open.iter_mut().for_each(Delivery::look_again);
        self.count();
    }

    /// Returns the changes for records that are not up to date.
    pub fn changes(&self, epoch: u64) -> Vec<Change> {
        let ended = self
            .ended
            .iter()
            .map(|(filter, options)| (subscription_key(epoch, filter), Some(options.to_bytes().to_vec())));
        let open = self
            .open
            .iter()
            .filter(|delivery| delivery.changed)
            .map(|delivery| (subscription_key(epoch, delivery.filter.as_str()), Some(delivery.record())));
        ended.chain(open).collect()
    }

    /// Returns the pending deliveries by filter, except those of messages that the broker made for the
    /// moment.
    pub fn by_filter(&self) -> HashMap<&str, &Delivery> {
        let open = self.open.iter().filter(|delivery| delivery.filter.is_live());
        open.map(|delivery| (delivery.filter.as_str(), delivery)).collect()
    }

    /// Records that the changes were appended.
    pub fn noted(&mut self) {
        self.ended.clear();
        self.open.iter_mut().for_each(|delivery| delivery.changed = false);
    }
}
