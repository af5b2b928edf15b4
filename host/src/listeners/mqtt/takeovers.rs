//! Detection of sessions that are taken over again and again.
//!
//! A device that lost its connection takes its session over occasionally. Two devices with the same
//! client id do so without end, because each ends the connection of the other.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Time within which takeovers of one session are counted together.
const WINDOW: Duration = Duration::from_secs(60);
/// Number of takeovers within [`WINDOW`] that a single reconnecting device does not reach.
const TAKEOVERS_MIN: u64 = 3;
/// Time without a takeover after which a client id is no longer contended.
const QUIET_AFTER: Duration = Duration::from_secs(600);
/// Most clients whose takeovers are counted at a time.
pub const CLIENTS_MAX: usize = 1_024;

/// Counts takeovers by client id.
#[derive(Default)]
pub struct Takeovers(Mutex<HashMap<Box<str>, Recent>>);

/// A client id that several devices seem to share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContendedId {
    pub client_id: String,
    /// Number of takeovers since they became so frequent.
    pub takeovers: u64,
    /// The two connections of the newest takeover.
    pub newest: String,
}

struct Recent {
    since: Instant,
    /// Number of takeovers since then.
    within: u64,
    contended: Option<Contended>,
}

struct Contended {
    takeovers: u64,
    last: Instant,
    newest: String,
}

impl Takeovers {
    /// Counts a takeover between the connections that `newest` names. Returns the number of takeovers
    /// within a minute, if it is higher than a single reconnecting device causes.
    pub fn note(&self, client_id: &str, newest: &str, now: Instant) -> Option<u64> {
        let mut recent = self.lock();
        if !recent.contains_key(client_id) && recent.len() >= CLIENTS_MAX {
            recent.retain(|_, of| !of.is_over(now));
            if recent.len() >= CLIENTS_MAX {
                return None;
            }
        }
        let begun = || Recent { since: now, within: 0, contended: None };
        recent.entry(client_id.into()).or_insert_with(begun).note(newest, now)
    }

    /// Returns the client ids that several devices seem to share, the most contended first.
    pub fn contended(&self, now: Instant) -> Vec<ContendedId> {
        let recent = self.lock();
        let contended = recent.iter().filter_map(|(client_id, of)| {
            let of = of.contended.as_ref().filter(|of| !of.is_over(now))?;
            let (takeovers, newest) = (of.takeovers, of.newest.clone());
            Some(ContendedId { client_id: client_id.to_string(), takeovers, newest })
        });
        let mut contended: Vec<_> = contended.collect();
        contended.sort_by(|a, b| b.takeovers.cmp(&a.takeovers).then_with(|| a.client_id.cmp(&b.client_id)));
        contended
    }

    /// Returns how often connections of this client recently ended each other: since this became
    /// frequent, or otherwise within a minute.
    pub fn lately(&self, client_id: &str, now: Instant) -> u64 {
        let recent = self.lock();
        let Some(of) = recent.get(client_id).filter(|of| !of.is_over(now)) else { return 0 };
        match of.contended.as_ref().filter(|contended| !contended.is_over(now)) {
            Some(contended) => contended.takeovers,
            None => of.within,
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Box<str>, Recent>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Recent {
    fn note(&mut self, newest: &str, now: Instant) -> Option<u64> {
        if now.saturating_duration_since(self.since) >= WINDOW {
            (self.since, self.within) = (now, 0);
        }
        self.within += 1;
        self.contended.take_if(|of| of.is_over(now));
        match &mut self.contended {
            Some(of) => *of = Contended { takeovers: of.takeovers + 1, last: now, newest: newest.to_owned() },
            None if self.within >= TAKEOVERS_MIN => {
                self.contended =
                    Some(Contended { takeovers: self.within, last: now, newest: newest.to_owned() });
            }
            None => {}
        }
        (self.within >= TAKEOVERS_MIN).then_some(self.within)
    }

    fn is_over(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) >= WINDOW
            && self.contended.as_ref().is_none_or(|of| of.is_over(now))
    }
}

impl Contended {
    fn is_over(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.last) >= QUIET_AFTER
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_reconnects_now_and_then_is_not_two() {
        let (takeovers, begin) = (Takeovers::default(), Instant::now());
        for minute in 0..10 {
            for second in [0, 30] {
                let now = begin + WINDOW * minute + Duration::from_secs(second);
                assert_eq!(takeovers.note("plc-7", "", now), None);
            }
        }
        assert_eq!(takeovers.contended(begin + 10 * WINDOW), []);
    }

    #[test]
    fn two_devices_that_throw_each_other_out_are_told_with_their_number() {
        let (takeovers, now) = (Takeovers::default(), Instant::now());
        let told: Vec<_> = (0..5).map(|_| takeovers.note("twin", "", now)).collect();
        assert_eq!(told, [None, None, Some(3), Some(4), Some(5)]);
    }

    #[test]
    fn a_client_id_is_contended_until_its_takeovers_have_ended_for_a_while() {
        let (takeovers, begin) = (Takeovers::default(), Instant::now());
        for client_id in ["twin", "twin", "twin", "other", "other", "other", "once"] {
            takeovers.note(client_id, "a by b", begin);
        }
        // One a minute is no new beginning, and shows that the old one goes on.
        let later = begin + QUIET_AFTER - Duration::from_secs(1);
        takeovers.note("twin", "b by a", later);
        let twin = |takeovers, newest: &str| ContendedId {
            client_id: "twin".to_owned(),
            takeovers,
            newest: newest.to_owned(),
        };
        let other = ContendedId { client_id: "other".to_owned(), ..twin(3, "a by b") };
        assert_eq!(takeovers.contended(later), [twin(4, "b by a"), other]);
        assert_eq!(takeovers.lately("twin", later), 4);
        assert_eq!(takeovers.contended(begin + QUIET_AFTER), [twin(4, "b by a")]);
        assert_eq!(takeovers.contended(later + QUIET_AFTER), []);
        takeovers.note("twin", "", later + QUIET_AFTER);
        assert_eq!(takeovers.contended(later + QUIET_AFTER), [], "what is over is not counted on");
        let lately = |client_id: &str, now| takeovers.lately(client_id, now);
        assert_eq!((lately("twin", later + QUIET_AFTER), lately("none", later)), (1, 0));
        assert_eq!(lately("twin", later + QUIET_AFTER + WINDOW), 0);
    }

    #[test]
    fn no_number_of_clients_takes_more_than_its_bound() {
        let (takeovers, begin) = (Takeovers::default(), Instant::now());
        for client in 0..2 * CLIENTS_MAX {
            takeovers.note(&format!("c{client}"), "", begin);
        }
        assert_eq!(takeovers.lock().len(), CLIENTS_MAX);
        let later = begin + WINDOW;
        let told: Vec<_> = (0..3).map(|_| takeovers.note("twin", "", later)).collect();
        assert_eq!(told, [None, None, Some(3)], "those of a minute ago give their place");
    }
}
