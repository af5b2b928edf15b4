//! Connections in their handshakes: at most `handshakes_max` for each listener, shared fairly between
//! the addresses that they come from.
//!
//! If all places are taken, a connection whose client has sent nothing gives way: the address with the
//! most such connections loses its oldest to an address with fewer. Between addresses with equally many,
//! a connection gives way only after [`SILENT_MAX`], so that a storm of reconnecting devices does not
//! end its own handshakes over and over.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::Address;

/// Time of silence after which a connection gives way to any other.
const SILENT_MAX: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub struct Handshakes {
    max: AtomicUsize,
    places: Mutex<Places>,
    freed: Notify,
}

#[derive(Debug, Default)]
struct Places {
    /// Number of places in use. It exceeds the limit while a connection that gives way has not ended
    /// yet.
    taken: usize,
    next: u64,
    /// Connections whose clients have sent nothing, the oldest first.
    silent: HashMap<Source, BTreeSet<u64>>,
    /// When each of these connections was accepted, and how it is told to give way.
    waiting: HashMap<u64, (Instant, Arc<Notify>)>,
}

/// Clients that share places: an IPv4 address, an IPv6 network of 64 bits, or all Unix sockets of this
/// machine. For clients behind a load balancer it is the balancer's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Source {
    Ip(IpAddr),
    Unix,
}

impl Source {
    fn of(address: &Address) -> Self {
        match address {
            Address::Unix { .. } => Self::Unix,
            Address::Ip(_) => Self::Ip(match address.ip() {
                IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64).into(),
                ip => ip,
            }),
        }
    }
}

/// One place. It is free again when this is dropped.
#[derive(Debug)]
pub struct Handshake {
    of: Arc<Handshakes>,
    /// Number of the connection, changed under the lock of `of`.
    number: AtomicU64,
    source: Source,
    gives_way: Arc<Notify>,
}

impl Handshakes {
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { max: AtomicUsize::new(max), places: Mutex::default(), freed: Notify::new() })
    }

    /// Takes a place for a connection from `address`, for which another connection may have to give way.
    /// Returns `None` if all places are taken by connections with an equal claim.
    pub fn enter(self: &Arc<Self>, address: &Address, now: Instant) -> Option<Handshake> {
        let source = Source::of(address);
        let mut places = self.lock();
        if places.taken >= self.max.load(Ordering::Relaxed) {
            places.make_room(source, now)?.notify_one();
        }
        let gives_way = Arc::new(Notify::new());
        places.taken += 1;
        let number = places.wait(source, now, &gives_way);
        Some(Handshake { of: self.clone(), number: number.into(), source, gives_way })
    }

    /// Changes the number of places. Connections beyond a lower number keep theirs.
    pub fn set_max(&self, max: usize) {
        self.max.store(max, Ordering::Relaxed);
    }

    /// Waits until a place has become free. Cancel safe.
    pub async fn freed(&self) {
        self.freed.notified().await;
    }

    fn lock(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Places {
    /// Takes the place of a silent connection. Returns the notification that tells that connection.
    fn make_room(&mut self, newcomer: Source, now: Instant) -> Option<Arc<Notify>> {
        let first = |numbers: &BTreeSet<u64>| numbers.first().copied().unwrap_or(u64::MAX);
        let most = self.silent.iter().max_by_key(|(_, numbers)| (numbers.len(), u64::MAX - first(numbers)));
        let (source, numbers) = most?;
        let number = first(numbers);
        let own = self.silent.get(&newcomer).map_or(0, BTreeSet::len);
        let (since, _) = self.waiting.get(&number)?;
        if own + 1 >= numbers.len() && now.duration_since(*since) < SILENT_MAX {
            return None;
        }
        let source = *source;
        self.no_more_silent(source, number)
    }

    fn wait(&mut self, source: Source, now: Instant, gives_way: &Arc<Notify>) -> u64 {
        let number = self.next;
        self.next += 1;
        self.silent.entry(source).or_default().insert(number);
        self.waiting.insert(number, (now, gives_way.clone()));
        number
    }

    fn no_more_silent(&mut self, source: Source, number: u64) -> Option<Arc<Notify>> {
        if let Some(numbers) = self.silent.get_mut(&source) {
            numbers.remove(&number);
            if numbers.is_empty() {
                self.silent.remove(&source);
            }
        }
        self.waiting.remove(&number).map(|(_, gives_way)| gives_way)
    }
}

impl Handshake {
    /// Records that the client has sent something. From now on its connection gives way to no other.
    pub fn heard(&self) {
        self.of.lock().no_more_silent(self.source, self.number.load(Ordering::Relaxed));
    }

    /// Records that the client is awaited again. Its connection is the youngest of those that give way.
    pub fn waits_again(&self, now: Instant) {
        let mut places = self.of.lock();
        let number = places.wait(self.source, now, &self.gives_way);
        self.number.store(number, Ordering::Relaxed);
    }

    /// Waits until the connection must end for another one. Cancel safe.
    pub async fn gives_way(&self) {
        self.gives_way.notified().await;
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        let mut places = self.of.lock();
        places.no_more_silent(self.source, self.number.load(Ordering::Relaxed));
        places.taken -= 1;
        self.of.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use futures_util::FutureExt;

    use super::*;

    fn from(ip: &str) -> Address {
        Address::Ip(SocketAddr::new(ip.parse().unwrap(), 1))
    }

    fn gone(handshakes: &[Handshake]) -> Vec<usize> {
        let gone = |(i, handshake): (usize, &Handshake)| handshake.gives_way().now_or_never().map(|()| i);
        handshakes.iter().enumerate().filter_map(gone).collect()
    }

    #[test]
    fn the_address_with_the_most_silent_connections_gives_way_to_others() {
        let (places, now) = (Handshakes::new(4), Instant::now());
        let enter = |ip: &str| places.enter(&from(ip), now);
        // Addresses of one network of 64 bits are one client's.
        let silent: Vec<_> = (1..=4).map(|i| enter(&format!("2001:db8::{i}")).unwrap()).collect();
        assert!(enter("2001:db8::5").is_none(), "its own are as young");
        let other = enter("2001:db8:0:1::1").unwrap();
        assert_eq!(gone(&silent), [0]);
        silent[1].heard();
        let another = enter("192.0.2.1").unwrap();
        assert_eq!(gone(&silent), [2], "not one whose client has spoken");
        assert!(enter("192.0.2.2").is_none(), "each has one");
        assert_eq!((gone(&silent), gone(&[other, another])), (vec![], vec![]));
    }

    #[test]
    fn a_connection_that_waits_again_is_the_youngest_of_its_address() {
        let (places, now) = (Handshakes::new(3), Instant::now());
        let of_one: Vec<_> = (0..3).map(|_| places.enter(&from("192.0.2.1"), now).unwrap()).collect();
        of_one[0].heard();
        of_one[0].waits_again(now);
        let _others = [places.enter(&from("192.0.2.2"), now).unwrap()];
        assert_eq!(gone(&of_one), [1]);
    }

    #[test]
    fn the_oldest_silent_connection_gives_way_to_any_other() {
        let (places, now) = (Handshakes::new(3), Instant::now());
        let silent: Vec<_> =
            (0..3).map(|s| places.enter(&from("192.0.2.1"), now + Duration::from_secs(s)).unwrap()).collect();
        silent[0].heard();
        let later = now + Duration::from_secs(1) + SILENT_MAX;
        let new = places.enter(&from("192.0.2.1"), later).unwrap();
        assert_eq!(gone(&silent), [1]);
        assert!(places.enter(&from("192.0.2.1"), later).is_none());
        drop((silent, new));
        assert!(
            (0..3)
                .map(|_| places.enter(&from("192.0.2.1"), later))
                .collect::<Vec<_>>()
                .iter()
                .all(Option::is_some)
        );
    }
}
