//! Delays clients that try wrong passwords, for each pair of user and address, and for each address.
//!
//! All methods of authentication share one bounded table. Users that do not exist are in it too.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Denied;
use super::fair::Source;
use super::recent::{Fingerprint, Recent};

const ENTRIES_MAX: usize = 100_000;
/// Time without a wrong password after which an entry is forgotten.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(600);
/// Number of wrong passwords of a user at one address that cause no delay.
const FREE: u32 = 5;
const WAIT_MIN: Duration = Duration::from_millis(500);
const WAIT_MAX: Duration = Duration::from_secs(60);
/// Number of wrong passwords at an address that cause no delay, whatever the users. It is larger because
/// many people may share an address, and none of them should be refused.
const SOURCE_FREE: u32 = 20;
const SOURCE_DELAY: Duration = Duration::from_millis(50);
const SOURCE_DELAY_MAX: Duration = Duration::from_secs(2);

pub struct Guesses(Recent<Wrong>);

/// A password that is being verified.
pub struct Guess<'g> {
    guesses: &'g Guesses,
    source: Source,
    key: Fingerprint,
    before: Option<Wrong>,
    is_settled: bool,
}

#[derive(Clone, Copy)]
struct Wrong {
    count: u32,
    at: Instant,
}

/// Fingerprints of the passwords that are being verified.
#[derive(Default)]
pub struct Trying(Mutex<HashMap<Fingerprint, Same>>);

/// Clients that sent the same password.
#[derive(Default)]
struct Same {
    clients: usize,
    /// Whether the guess of one of them counts for all.
    is_counted: bool,
}

/// One of several clients that sent the same password, until it is dropped.
pub struct Tried<'t> {
    trying: &'t Trying,
    fingerprint: Fingerprint,
    /// Whether the guess of this client counts for all.
    counts: bool,
    is_settled: bool,
}

impl Trying {
    pub fn enter(&self, fingerprint: Fingerprint) -> Tried<'_> {
        let mut trying = self.lock();
        let same = trying.entry(fingerprint).or_default();
        same.clients += 1;
        let counts = !std::mem::replace(&mut same.is_counted, true);
        Tried { trying: self, fingerprint, counts, is_settled: false }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Fingerprint, Same>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tried<'_> {
    /// Returns whether this client's guess is the one that counts. If the client that had it has gone before
    /// its password was verified, it is the next one that asks.
    pub fn counts(&mut self) -> bool {
        if !self.counts
            && let Some(same) = self.trying.lock().get_mut(&self.fingerprint)
        {
            self.counts = !std::mem::replace(&mut same.is_counted, true);
        }
        self.counts
    }

    /// Records that the password was verified.
    pub fn settle(&mut self) {
        self.is_settled = true;
    }
}

impl Drop for Tried<'_> {
    fn drop(&mut self) {
        let mut trying = self.trying.lock();
        if let Some(same) = trying.get_mut(&self.fingerprint) {
            same.clients -= 1;
            if self.counts && !self.is_settled {
                same.is_counted = false;
            }
            if same.clients == 0 {
                trying.remove(&self.fingerprint);
            }
        }
    }
}

impl Guesses {
    pub fn new() -> Self {
        Self(Recent::new(ENTRIES_MAX, FORGOTTEN_AFTER))
    }

    /// Begins a guess at the user's password from this address. Each wrong password doubles the time
    /// until the next is verified. The guess counts from now on, so that concurrent guesses are no
    /// faster than successive ones.
    pub fn begin(&self, source: Source, user: &str, now: Instant) -> Result<Guess<'_>, Denied> {
        let key = self.user(source, user);
        let mut before = None;
        let mut may_try = true;
        self.0.update(key, now, |wrong| {
            before = wrong;
            may_try = wrong.is_none_or(|wrong| now >= wrong.next());
            let counted = Wrong { count: wrong.map_or(0, |wrong| wrong.count) + 1, at: now };
            wrong.filter(|_| !may_try).unwrap_or(counted)
        });
        if !may_try {
            return Err(Denied::TooMany);
        }
        Ok(Guess { guesses: self, source, key, before, is_settled: false })
    }

    /// Returns by how long verifications from this address are delayed.
    pub fn delay(&self, source: Source, now: Instant) -> Duration {
        let wrong = self.0.get(&self.source(source), now);
        let over = wrong.map_or(0, |wrong| wrong.left(now).saturating_sub(SOURCE_FREE));
        SOURCE_DELAY.saturating_mul(over).min(SOURCE_DELAY_MAX)
    }

    /// Returns the number of wrong passwords of a user at an address.
    #[cfg(test)]
    pub fn count(&self, source: Source, user: &str) -> u32 {
        self.0.get(&self.user(source, user), Instant::now()).map_or(0, |wrong| wrong.count)
    }

    fn user(&self, source: Source, user: &str) -> Fingerprint {
        self.0.fingerprint(&[&source.bytes(), user.as_bytes()])
    }

    fn source(&self, source: Source) -> Fingerprint {
        self.0.fingerprint(&[&source.bytes()])
    }
}

impl Guess<'_> {
    pub fn wrong(mut self, now: Instant) {
        self.is_settled = true;
        let again = |before: Option<Wrong>| Wrong { count: before.map_or(0, |it| it.left(now)) + 1, at: now };
        self.guesses.0.update(self.guesses.source(self.source), now, again);
    }

    pub fn right(mut self) {
        self.is_settled = true;
        self.guesses.0.remove(&self.key);
    }
}

impl Drop for Guess<'_> {
    /// Takes the guess back if it was given up before the password was verified, since nothing was
    /// learned from it.
    fn drop(&mut self) {
        if !self.is_settled {
            let at = self.before.map_or_else(Instant::now, |before| before.at);
            let count = |wrong: Option<Wrong>| wrong.map_or(0, |wrong| wrong.count.saturating_sub(1));
            self.guesses.0.update(self.key, Instant::now(), |wrong| Wrong { count: count(wrong), at });
        }
    }
}

impl Wrong {
    /// Returns when the next guess is verified.
    fn next(self) -> Instant {
        let doubled = self.count.checked_sub(FREE).map(|more| WAIT_MIN * (1 << more.min(10)));
        self.at + doubled.unwrap_or_default().min(WAIT_MAX)
    }

    /// Returns the number of guesses that still count. One is forgotten each second.
    fn left(self, now: Instant) -> u32 {
        let passed = now.saturating_duration_since(self.at).as_secs();
        self.count.saturating_sub(u32::try_from(passed).unwrap_or(u32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_guesses_waits_ever_longer_and_others_do_not() {
        let (guesses, now) = (Guesses::new(), Instant::now());
        let here = Source::of([10, 0, 0, 1].into());
        let there = Source::of([10, 0, 0, 2].into());
        let mut waited = Vec::new();
        let mut at = now;
        for _ in 0..16 {
            let begun = at;
            let guess = loop {
                match guesses.begin(here, "ann", at) {
                    Ok(guess) => break guess,
                    Err(_) => at += Duration::from_millis(500),
                }
            };
            waited.push((at - begun).as_millis());
            guess.wrong(at);
        }
        assert_eq!(waited[..9], [0, 0, 0, 0, 0, 500, 1_000, 2_000, 4_000]);
        assert_eq!(waited[15], 60_000);
        assert!(guesses.begin(there, "ann", at).is_ok() && guesses.begin(here, "bob", at).is_ok());
        assert!(guesses.begin(here, "ann", at).is_err());
        guesses.begin(here, "ann", at + WAIT_MAX).unwrap().right();
        assert!(guesses.begin(here, "ann", at + WAIT_MAX).is_ok());
    }

    #[test]
    fn guesses_at_a_time_count_and_those_that_were_given_up_do_not() {
        let (guesses, now) = (Guesses::new(), Instant::now());
        let here = Source::of([10, 0, 0, 1].into());
        for _ in 0..3 {
            let at_a_time: Vec<_> = (0..9).map_while(|_| guesses.begin(here, "ann", now).ok()).collect();
            assert_eq!(at_a_time.len(), 5);
        }
    }

    #[test]
    fn an_address_of_many_wrong_passwords_is_served_later_until_it_stops() {
        let (guesses, now) = (Guesses::new(), Instant::now());
        let here = Source::of([10, 0, 0, 1].into());
        for n in 0..1_000 {
            guesses.begin(here, &n.to_string(), now).unwrap().wrong(now);
        }
        assert_eq!(guesses.delay(here, now), SOURCE_DELAY_MAX);
        assert_eq!(guesses.delay(Source::of([10, 0, 0, 2].into()), now), Duration::ZERO);
        assert_eq!(guesses.delay(here, now + Duration::from_secs(599)), SOURCE_DELAY_MAX);
        assert_eq!(guesses.delay(here, now + FORGOTTEN_AFTER), Duration::ZERO);
    }
}
