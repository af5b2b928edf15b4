//! The retained messages that a new subscription is given. They wait where they are kept,
//! whatever their number: a subscription knows how far it is among them, and a page at a
//! time is looked up as the client takes it. They count in no bound of the queue and do
//! not age. For a session that outlives its connection how far it is goes with the
//! subscription's record, so that it goes on there after a reconnect or a restart.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::{Message, Outbox, Queued, Source};
use crate::listeners::mqtt::clock::Clock;
use crate::listeners::mqtt::retained::{Kept, Lookup, Retained};
use crate::listeners::mqtt::session::{Change, subscription_key};
use crate::listeners::mqtt::subscriptions::{Filter, Options};

/// Retained messages that are looked up at a time, and their bytes.
const PAGE_MESSAGES_MAX: usize = 64;
const PAGE_BYTES_MAX: usize = 256 << 10;
/// Bytes of the last topic that was taken, in the record: those that share so much with it come again.
const TAKEN_BYTES_MAX: usize = 256;
/// In a record: when it was subscribed.
const SINCE_BYTES: usize = 8;

#[derive(Default)]
pub(super) struct Deliveries {
    open: VecDeque<Delivery>,
    /// Those that ended since their record was written.
    ended: Vec<(Box<str>, Options)>,
    last_number: u64,
    /// Number of bytes of the messages in pages.
    bytes: usize,
}

/// What one subscription is still to be given.
pub(super) struct Delivery {
    number: u64,
    filter: Filter,
    options: Options,
    from: RetainedFrom,
    /// Key of the last topic whose message was taken to be sent.
    taken: Option<Box<str>>,
    /// Goes on behind `page`; `None` where nothing is to be looked up.
    lookup: Option<Lookup>,
    page: VecDeque<Found>,
    /// Its record does not show what it is.
    changed: bool,
}

/// What a subscription is given as retained; what came later it gets live.
#[derive(Clone, Debug)]
pub struct RetainedFrom {
    /// Broker time of the SUBSCRIBE.
    pub since_us: u64,
    /// Where the live delivery was, by stream; empty after a restart.
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
    /// Returns the record of its subscription: its options, and how far it is.
    pub fn record(&self) -> Vec<u8> {
        let taken = self.taken.as_deref().unwrap_or_default();
        let taken = &taken[..taken.floor_char_boundary(TAKEN_BYTES_MAX)];
        let since = self.from.since_us.to_be_bytes();
        [&self.options.to_bytes()[..], &since, taken.as_bytes()].concat()
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

    /// Looks at no more than `steps_max` topics.
    pub fn look(&mut self, retained: &Retained, clock: &Clock, steps_max: usize) {
        let mut lookup = self.lookup.clone();
        retained.look(&mut lookup, steps_max, |key, kept| {
            if self.from.includes(kept, clock) {
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
    /// A subscription is to be given what is retained.
    pub fn give_retained(&mut self, filter: &Filter, options: Options, from: RetainedFrom) {
        self.end_retained(filter.as_str());
        let lookup = Some(Lookup::new(filter.topics(), None));
        self.deliveries().push(filter, options, from, None, lookup, VecDeque::new());
        self.changed();
    }

    /// The same for messages that the broker makes at that moment.
    pub fn give_whole(&mut self, filter: &Filter, options: Options, since_us: u64, messages: Vec<Message>) {
        self.end_retained(filter.as_str());
        let page = messages.into_iter().map(|message| {
            let source = Source::Broker(Arc::new(message));
            Found { key: Box::default(), queued: Queued::whole(source, 0, options, since_us) }
        });
        let from = RetainedFrom { since_us, upto: Box::default() };
        self.deliveries().push(filter, options, from, None, None, page.collect());
        self.count_retained();
    }

    /// As a restart found it: see [`Outbox::note`].
    pub fn resume_retained(&mut self, filter: &Filter, options: Options, record: &[u8]) {
        let Some((since, taken)) = record.split_first_chunk::<SINCE_BYTES>() else { return };
        let from = RetainedFrom { since_us: u64::from_be_bytes(*since), upto: Box::default() };
        let taken = std::str::from_utf8(taken).ok().filter(|taken| !taken.is_empty());
        let lookup = Some(Lookup::new(filter.topics(), taken));
        self.deliveries().push(filter, options, from, taken.map(Into::into), lookup, VecDeque::new());
    }

    fn deliveries(&mut self) -> &mut Deliveries {
        self.retained.get_or_insert_default()
    }

    /// It was subscribed to again, and is not to be given more than before.
    pub fn change_retained(&mut self, filter: &str, options: Options) {
        let Some(retained) = &mut self.retained else { return };
        for delivery in retained.open.iter_mut().filter(|it| it.filter.as_str() == filter) {
            (delivery.options, delivery.changed) = (options, true);
        }
        retained.ended.retain(|(ended, _)| &**ended != filter);
    }

    /// It is subscribed to no more.
    pub fn end_retained(&mut self, filter: &str) {
        let Some(retained) = &mut self.retained else { return };
        retained.open.retain(|delivery| delivery.filter.as_str() != filter);
        retained.ended.retain(|(ended, _)| &**ended != filter);
        self.count_retained();
    }

    fn changed(&mut self) {
        if let Some(kept) = &mut self.kept {
            kept.changed = true;
        }
    }

    /// The page that is to be looked up next.
    pub(super) fn wants_page(&self) -> Option<RetainedPage> {
        self.retained.as_ref()?.open.front()?.next_page().map(|page| self.within_memory(page))
    }

    /// Makes the page one message where there is no memory for a whole page.
    fn within_memory(&self, page: RetainedPage) -> RetainedPage {
        let has_room = self.memory.has_room(self.size() + PAGE_BYTES_MAX);
        RetainedPage { messages_max: if has_room { PAGE_MESSAGES_MAX } else { 1 }, ..page }
    }

    fn count_retained(&mut self) {
        self.retained.iter_mut().for_each(|retained| retained.count());
        self.count();
    }

    /// Number of the newest subscription that is, or was, to be given what is retained.
    pub fn last_retained(&self) -> u64 {
        self.retained.as_ref().map_or(0, |retained| retained.last_number)
    }

    /// The first page of the next subscription behind number `behind`, unless a page of
    /// messages waits already.
    pub(super) fn first_page(&self, behind: u64) -> Option<RetainedPage> {
        let retained = self.retained.as_ref()?;
        let bytes: usize = retained.heads().map(|queued| queued.len as usize).sum();
        if retained.len() >= PAGE_MESSAGES_MAX || bytes >= PAGE_BYTES_MAX {
            return None;
        }
        let mut behind = retained.open.iter().filter(|delivery| delivery.number > behind);
        behind.find_map(Delivery::next_page).map(|page| self.within_memory(page))
    }

    /// Takes in what was looked up, but for what was replaced since. With both locked, so
    /// that what replaces one of these messages comes after it.
    pub fn retained_found(&mut self, page: RetainedPage, retained: &Retained) {
        let mut open = self.retained.iter_mut().flat_map(|retained| &mut retained.open);
        let Some(delivery) = open.find(|it| it.number == page.number) else { return };
        let is_current =
            |found: &Found| found.queued.message().is_some_and(|it| retained.is_current(&found.key, it));
        delivery.page.extend(page.found.into_iter().filter(is_current));
        delivery.lookup = (!page.lookup.is_done()).then_some(page.lookup);
        self.end_given();
        self.count_retained();
    }

    /// The next retained message in memory.
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
    fn push(
        &mut self,
        filter: &Filter,
        options: Options,
        from: RetainedFrom,
        taken: Option<Box<str>>,
        lookup: Option<Lookup>,
        page: VecDeque<Found>,
    ) {
        self.last_number += 1;
        let (number, filter) = (self.last_number, filter.clone());
        let changed = lookup.is_some();
        self.open.push_back(Delivery { number, filter, options, from, taken, lookup, page, changed });
    }

    /// Returns the number of bytes of messages that were looked up and wait.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn count(&mut self) {
        self.bytes = self.open.iter().flat_map(|delivery| &delivery.page).map(Found::bytes).sum();
    }

    /// Messages that were looked up and wait.
    pub fn len(&self) -> usize {
        self.open.iter().map(|delivery| delivery.page.len()).sum()
    }

    pub fn heads(&self) -> impl Iterator<Item = &Queued> {
        self.open.iter().flat_map(|delivery| &delivery.page).map(|found| &found.queued)
    }

    /// The connection ended: what was not taken is looked up again.
    pub fn disconnected(&mut self) {
        // What was made for the moment has no key.
        self.open.retain(|delivery| delivery.page.front().is_none_or(|found| !found.key.is_empty()));
        for delivery in self.open.iter_mut().filter(|delivery| !delivery.page.is_empty()) {
            delivery.page = VecDeque::new();
            delivery.lookup = Some(Lookup::new(delivery.filter.topics(), delivery.taken.as_deref()));
        }
        self.count();
    }

    /// The records of subscriptions that do not show how far they are.
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

    /// Returns what is still to be given by filter, but for what the broker made for the moment.
    pub fn by_filter(&self) -> HashMap<&str, &Delivery> {
        let open = self.open.iter().filter(|delivery| delivery.filter.is_live());
        open.map(|delivery| (delivery.filter.as_str(), delivery)).collect()
    }

    /// Their changes were appended.
    pub fn noted(&mut self) {
        self.ended.clear();
        self.open.iter_mut().for_each(|delivery| delivery.changed = false);
    }
}
