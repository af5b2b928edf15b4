//! The list of clients that were refused last: name, address, reason and count.
//!
//! The log reports the first refusal of each kind at once and counts the others. This list is for an
//! operator who looks for one device.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Most entries. A further one replaces all entries of the address that was quiet longest.
const ENTRIES_MAX: usize = 1_024;
/// Most entries of one address. Its further clients share one entry for each cause, so that one address
/// does not displace all others.
const OF_ADDRESS_MAX: usize = 64;
const WHO_CHARS_MAX: usize = 200;
const DETAIL_CHARS_MAX: usize = 400;

/// Refusals of one client, from one address for one cause.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedClient {
    /// The client id, the user or the subject of the certificate. `None` if the client presented none,
    /// or if the entry stands for further clients of the address.
    pub who: Option<String>,
    pub address: IpAddr,
    /// Cause, as in `headworks_mqtt_refused_connects_total`.
    pub cause: String,
    /// Details of the newest refusal.
    pub detail: String,
    pub count: u64,
    /// Microseconds since 1970, UTC.
    pub first_us: u64,
    pub last_us: u64,
}

#[derive(Default)]
pub struct RefusedClients(Mutex<Known>);

#[derive(Default)]
struct Known {
    by_address: HashMap<IpAddr, OfAddress>,
    entries: usize,
}

#[derive(Default)]
struct OfAddress {
    last_us: u64,
    by_client: HashMap<(&'static str, Option<String>), RefusedClient>,
}

impl RefusedClients {
    pub fn add(&self, cause: &'static str, who: Option<&str>, address: IpAddr, detail: &str) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.lock().add(cause, who, address, detail, now.as_micros() as u64);
    }

    /// Returns the number of entries, and the newest `max` of them, newest first.
    pub fn newest(&self, max: usize) -> (usize, Vec<RefusedClient>) {
        let known = self.lock();
        let all = known.by_address.values().flat_map(|of_address| of_address.by_client.values());
        let mut all: Vec<_> = all.cloned().collect();
        drop(known);
        all.sort_by(|a, b| b.last_us.cmp(&a.last_us).then_with(|| a.who.cmp(&b.who)));
        let found = all.len();
        all.truncate(max);
        (found, all)
    }

    /// Returns the newest entry of a cause.
    pub fn last_of(&self, cause: &str) -> Option<RefusedClient> {
        let known = self.lock();
        let all = known.by_address.values().flat_map(|of_address| of_address.by_client.values());
        all.filter(|client| client.cause == cause).max_by_key(|client| client.last_us).cloned()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn add(&mut self, cause: &'static str, who: Option<&str>, address: IpAddr, detail: &str, now_us: u64) {
        let of_address = self.by_address.entry(address).or_default();
        of_address.last_us = now_us;
        let mut key = (cause, who.map(|who| shortened(who, WHO_CHARS_MAX)));
        if of_address.by_client.len() >= OF_ADDRESS_MAX && !of_address.by_client.contains_key(&key) {
            key.1 = None;
        }
        let entries = &mut self.entries;
        let entry = of_address.by_client.entry(key).or_insert_with_key(|(_, who)| {
            *entries += 1;
            RefusedClient {
                who: who.clone(),
                address,
                cause: cause.to_owned(),
                detail: String::new(),
                count: 0,
                first_us: now_us,
                last_us: now_us,
            }
        });
        entry.count += 1;
        entry.last_us = now_us;
        entry.detail = shortened(detail, DETAIL_CHARS_MAX);
        if self.entries > ENTRIES_MAX {
            self.forget_quietest(address);
        }
    }

    fn forget_quietest(&mut self, but: IpAddr) {
        let others = self.by_address.iter().filter(|(address, _)| **address != but);
        let quietest = others.min_by_key(|(_, of_address)| of_address.last_us).map(|(address, _)| *address);
        if let Some(gone) = quietest.and_then(|address| self.by_address.remove(&address)) {
            self.entries -= gone.by_client.len();
        }
    }
}

fn shortened(text: &str, chars_max: usize) -> String {
    match text.char_indices().nth(chars_max) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(number: u32) -> IpAddr {
        IpAddr::V4(number.into())
    }

    #[test]
    fn each_client_and_cause_is_counted_and_the_newest_comes_first() {
        let mut known = Known::default();
        for (time, cause, who) in
            [(1, "tls", "a"), (2, "bad_credentials", "a"), (3, "tls", "b"), (4, "tls", "a")]
        {
            known.add(cause, Some(who), address(7), &format!("at {time}"), time);
        }
        let list = RefusedClients(Mutex::new(known));
        let (found, clients) = list.newest(2);
        let shown: Vec<_> = clients
            .iter()
            .map(|it| (it.who.as_deref(), &*it.cause, it.count, it.first_us, it.last_us, &*it.detail))
            .collect();
        assert_eq!(found, 3);
        assert_eq!(shown, [(Some("a"), "tls", 2, 1, 4, "at 4"), (Some("b"), "tls", 1, 3, 3, "at 3")]);
    }

    #[test]
    fn no_number_of_clients_or_addresses_grows_the_list_and_none_takes_it_up_for_the_others() {
        let mut known = Known::default();
        known.add("tls", Some("of another"), address(0), "", 0);
        let mut refused = 1;
        for number in 0..10 * ENTRIES_MAX as u64 {
            let who = format!("{number} {}", "x".repeat(300));
            known.add("tls", Some(&who), address(1), &who, 1 + number);
            refused += 1;
        }
        assert_eq!(known.by_address[&address(1)].by_client.len(), OF_ADDRESS_MAX + 1);
        let list = RefusedClients(Mutex::new(known));
        let (found, clients) = list.newest(usize::MAX);
        assert_eq!((found, clients.iter().map(|it| it.count).sum::<u64>()), (OF_ADDRESS_MAX + 2, refused));
        assert!(clients.iter().all(|it| it.who.as_ref().is_none_or(|who| who.chars().count() <= 201)));
        assert_eq!(clients.last().and_then(|it| it.who.as_deref()), Some("of another"));

        for number in 0..3 * ENTRIES_MAX as u32 {
            list.lock().add("tls", None, address(2 + number), "", u64::MAX);
        }
        let (found, clients) = list.newest(usize::MAX);
        assert!((ENTRIES_MAX - OF_ADDRESS_MAX..=ENTRIES_MAX).contains(&found), "{found}");
        assert_eq!(found, list.lock().entries);
        assert!(clients.iter().all(|it| it.address > address(1)));
    }
}
