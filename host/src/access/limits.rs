//! Token buckets, and the connections of each user.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::config::Limits;
use super::fair::Source;

/// Most addresses that are distinguished in one second.
const SOURCES_MAX: usize = 65_536;

/// A rate with bursts of one second's worth. The bucket may be overdrawn; the caller then waits until
/// the debt is paid.
#[derive(Clone, Debug)]
pub struct Bucket {
    per_s: f64,
    tokens: f64,
    filled_at: Instant,
}

/// Rates of messages and bytes. A rate that is not set is not limited.
#[derive(Clone, Debug)]
pub struct Allowance {
    messages: Option<Bucket>,
    bytes: Option<Bucket>,
}

impl Bucket {
    pub fn new(per_s: u64, now: Instant) -> Self {
        Self { per_s: per_s as f64, tokens: per_s as f64, filled_at: now }
    }

    fn fill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.filled_at).as_secs_f64();
        self.tokens = self.per_s.min(self.tokens + passed * self.per_s);
        self.filled_at = self.filled_at.max(now);
    }

    fn spend(&mut self, count: u64) {
        self.tokens -= count as f64;
    }

    fn is_spent(&self) -> bool {
        self.tokens < 1.0
    }

    /// Returns the time until a token is available.
    fn wait(&self) -> Duration {
        Duration::from_secs_f64(((1.0 - self.tokens) / self.per_s).max(0.0))
    }
}

/// Rate of CONNECT packets of all clients. When it is used up, an address that has had less than its
/// share in this second may still connect, and the others wait until that is paid.
#[derive(Debug)]
pub struct Connects {
    bucket: Bucket,
    second: Instant,
    /// CONNECT packets in this second, by address.
    taken: HashMap<Source, u32>,
}

impl Connects {
    pub fn new(per_s: u32, now: Instant) -> Self {
        Self { bucket: Bucket::new(per_s.into(), now), second: now, taken: HashMap::new() }
    }

    pub fn try_take(&mut self, from: Source, now: Instant) -> bool {
        if now.saturating_duration_since(self.second) >= Duration::from_secs(1) {
            self.second = now;
            self.taken.clear();
        }
        self.bucket.fill(now);
        let is_full = self.taken.len() >= SOURCES_MAX && !self.taken.contains_key(&from);
        let (per_s, left) = (self.bucket.per_s, self.bucket.tokens);
        if is_full {
            return false;
        }
        let taken = self.taken.entry(from).or_insert(0);
        let mine = f64::from(*taken);
        *taken += 1;
        let share = per_s / self.taken.len() as f64;
        let has = left >= 1.0 || (mine < share && left > -per_s);
        if has {
            self.bucket.spend(1);
        }
        has
    }
}

impl Allowance {
    pub fn new(messages_per_s: Option<u64>, bytes_per_s: Option<u64>, now: Instant) -> Option<Self> {
        let bucket = |per_s: Option<u64>| per_s.map(|per_s| Bucket::new(per_s, now));
        let allowance = Self { messages: bucket(messages_per_s), bytes: bucket(bytes_per_s) };
        (messages_per_s.is_some() || bytes_per_s.is_some()).then_some(allowance)
    }

    pub fn of_client(limits: &Limits, now: Instant) -> Option<Self> {
        let bytes = limits.client_bytes_per_s.map(|bytes| bytes.0);
        Self::new(limits.client_messages_per_s.map(u64::from), bytes, now)
    }

    pub fn of_all(limits: &Limits, now: Instant) -> Option<Self> {
        Self::new(limits.messages_per_s.map(u64::from), limits.bytes_per_s.map(|bytes| bytes.0), now)
    }

    fn buckets(&mut self) -> impl Iterator<Item = &mut Bucket> {
        self.messages.iter_mut().chain(self.bytes.iter_mut())
    }

    pub fn fill(&mut self, now: Instant) {
        self.buckets().for_each(|bucket| bucket.fill(now));
    }

    pub fn spend(&mut self, messages: u64, bytes: u64) {
        if let Some(bucket) = &mut self.messages {
            bucket.spend(messages);
        }
        if let Some(bucket) = &mut self.bytes {
            bucket.spend(bytes);
        }
    }

    #[inline]
    pub fn is_spent(&self) -> bool {
        self.messages.iter().chain(&self.bytes).any(Bucket::is_spent)
    }

    /// Returns how long nothing may be accepted; zero while there are tokens left.
    pub fn wait(&self) -> Duration {
        self.messages.iter().chain(&self.bytes).map(Bucket::wait).max().unwrap_or_default()
    }
}

/// Connected client ids by user name. Each client id has one connection: a connection that takes over
/// shares the place of the older one.
#[derive(Debug, Default)]
pub struct Users(Arc<Mutex<Clients>>);

/// Number of connections that share a place, by user and client id.
type Clients = HashMap<Arc<str>, HashMap<Box<str>, u32>>;

/// The place of one client id of a user. It is free again when this is dropped.
#[derive(Debug)]
pub struct UserPlace {
    user: Arc<str>,
    client_id: Box<str>,
    users: Arc<Mutex<Clients>>,
}

impl Users {
    /// Returns a place, or `None` if the user has `max` other client ids already.
    pub fn enter(&self, user: &Arc<str>, client_id: &str, max: u32) -> Option<UserPlace> {
        let mut users = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let clients = users.entry(user.clone()).or_default();
        if !clients.contains_key(client_id) && clients.len() >= max as usize {
            return None;
        }
        *clients.entry(client_id.into()).or_insert(0) += 1;
        Some(UserPlace { user: user.clone(), client_id: client_id.into(), users: self.0.clone() })
    }
}

impl Drop for UserPlace {
    fn drop(&mut self) {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(clients) = users.get_mut(&self.user) else { return };
        if let Some(sharing) = clients.get_mut(&self.client_id) {
            *sharing -= 1;
            if *sharing == 0 {
                clients.remove(&self.client_id);
            }
        }
        if clients.is_empty() {
            users.remove(&self.user);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_lets_a_seconds_worth_through_and_debt_is_waited_for() {
        let start = Instant::now();
        let mut allowance = Allowance::new(Some(10), Some(1_000), start).unwrap();
        allowance.spend(10, 100);
        assert!(allowance.is_spent());
        assert_eq!(allowance.wait(), Duration::from_millis(100));
        allowance.fill(start + Duration::from_millis(100));
        assert!(!allowance.is_spent());
        allowance.spend(1, 3_000);
        assert!(allowance.wait() > Duration::from_secs(2));
        allowance.fill(start + Duration::from_secs(3_600));
        assert!(!allowance.is_spent());
    }

    #[test]
    fn one_address_that_uses_the_connects_up_leaves_the_others_their_share() {
        let mut now = Instant::now();
        let source = |n: u8| Source::of([10, 0, 0, n].into());
        let mut connects = Connects::new(100, now);
        // Alone it has them all.
        assert_eq!((0..1_000).filter(|_| connects.try_take(source(1), now)).count(), 100);
        let mut had = [0; 3];
        for _ in 0..10 {
            now += Duration::from_secs(1);
            for n in 0..1_000 {
                had[0] += u32::from(connects.try_take(source(1), now));
                had[1] += u32::from(connects.try_take(source(1), now));
                if n % 50 == 0 {
                    had[2] += u32::from(connects.try_take(source(2), now));
                }
            }
        }
        assert_eq!(had[2], 200, "all that it asked for");
        assert!((700..=1_000).contains(&(had[0] + had[1])), "{had:?}");
    }

    #[test]
    fn a_user_has_so_many_client_ids_until_one_ends() {
        let users = Users::default();
        let ann: Arc<str> = "ann".into();
        let first = users.enter(&ann, "a", 1).unwrap();
        assert!(users.enter(&ann, "b", 1).is_none());
        assert!(users.enter(&"bob".into(), "b", 1).is_some());
        drop(first);
        assert!(users.enter(&ann, "b", 1).is_some());
        assert!(users.0.lock().unwrap().is_empty());
    }

    #[test]
    fn a_place_is_shared_by_those_who_take_over_and_free_when_the_last_of_them_ends() {
        let users = Users::default();
        let ann: Arc<str> = "ann".into();
        let older = users.enter(&ann, "a", 1).unwrap();
        let newer = users.enter(&ann, "a", 1).unwrap();
        drop(older);
        assert!(users.enter(&ann, "b", 1).is_none());
        drop(newer);
        assert!(users.enter(&ann, "b", 1).is_some());
    }
}
