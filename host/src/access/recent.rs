//! A cache of recent results, keyed by a keyed hash of their inputs. No password is kept in memory, and
//! no client can choose keys that collide.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use ring::hmac;
use ring::rand::SystemRandom;

pub struct Recent<T> {
    key: hmac::Key,
    ttl: Duration,
    entries_max: usize,
    entries: Mutex<HashMap<Fingerprint, (Instant, T)>>,
}

pub type Fingerprint = [u8; 32];

impl<T: Clone> Recent<T> {
    /// Creates a cache of at most `entries_max` results, each kept for `ttl`.
    pub fn new(entries_max: usize, ttl: Duration) -> Self {
        let key = hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new());
        let key = key.expect("the system gives random bytes");
        Self { key, ttl, entries_max, entries: Mutex::default() }
    }

    /// Returns the fingerprint of `parts` with their lengths, so that ("a", "bc") differs from ("ab",
    /// "c").
    pub fn fingerprint(&self, parts: &[&[u8]]) -> Fingerprint {
        let mut context = hmac::Context::with_key(&self.key);
        for part in parts {
            context.update(&(part.len() as u64).to_le_bytes());
            context.update(part);
        }
        let mut fingerprint = Fingerprint::default();
        fingerprint.copy_from_slice(context.sign().as_ref());
        fingerprint
    }

    pub fn get(&self, fingerprint: &Fingerprint, now: Instant) -> Option<T> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let (until, value) = entries.get(fingerprint)?;
        (now < *until).then(|| value.clone())
    }

    /// Adds a result. If the cache is full, an arbitrary other one is forgotten.
    pub fn put(&self, fingerprint: Fingerprint, value: T, now: Instant) {
        self.update(fingerprint, now, |_| value);
    }

    pub fn remove(&self, fingerprint: &Fingerprint) {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).remove(fingerprint);
    }

    /// Replaces a result by what `change` makes of the existing one.
    pub fn update(&self, fingerprint: Fingerprint, now: Instant, change: impl FnOnce(Option<T>) -> T) {
        if self.ttl.is_zero() {
            return;
        }
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let before = entries.get(&fingerprint).filter(|(until, _)| now < *until);
        let value = change(before.map(|(_, value)| value.clone()));
        if entries.len() >= self.entries_max && !entries.contains_key(&fingerprint) {
            let any = entries.keys().next().copied();
            any.and_then(|any| entries.remove(&any));
        }
        entries.insert(fingerprint, (now + self.ttl, value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_forgotten_in_time_and_never_more_are_kept_than_told() {
        let recent = Recent::new(2, Duration::from_secs(10));
        let now = Instant::now();
        let key = |n: u8| recent.fingerprint(&[&[n]]);
        recent.put(key(1), 1, now);
        assert_eq!(recent.get(&key(1), now), Some(1));
        assert_eq!(recent.get(&key(1), now + Duration::from_secs(10)), None);
        for n in 2..9 {
            recent.put(key(n), n, now);
            assert_eq!(recent.get(&key(n), now), Some(n));
        }
        assert_eq!(recent.entries.lock().unwrap().len(), 2);
        assert_ne!(recent.fingerprint(&[b"a", b"bc"]), recent.fingerprint(&[b"ab", b"c"]));
    }
}
