//! A fixed number of places that callers share fairly.
//!
//! Waiting callers are served in turn, first by the addresses that clients connect from, then by the
//! users of one address, so that a caller that asks often, or for many users, does not delay the others.
//! Callers that use [`Fair::enter_first`] are served before the others, except for one turn in a few.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;
use xxhash_rust::xxh3::xxh3_128;

/// Number of turns in a row for callers with priority while others wait.
const FIRST_IN_A_ROW: u32 = 8;

/// Clients that share a turn: an IPv4 address, an IPv6 network of 64 bits, or a user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Source(IpAddr);

/// The places, and the callers that wait for one.
pub struct Fair(Mutex<State>);

#[derive(Default)]
struct State {
    free: usize,
    first: Queue,
    others: Queue,
    /// Turns of prioritised callers since the last turn of another caller.
    first_in_a_row: u32,
}

#[derive(Default)]
struct Queue {
    waiting: usize,
    /// The sources in the order of their turns. Each has a waiting caller.
    sources: VecDeque<(Source, VecDeque<User>)>,
}

struct User {
    name: Box<str>,
    waiting: VecDeque<oneshot::Sender<Place>>,
}

/// A place. It is free again when this is dropped.
pub struct Place(Option<Arc<Fair>>);

/// Too many callers wait already.
#[derive(Debug, PartialEq, Eq)]
pub struct Crowded;

impl Source {
    pub fn of(ip: IpAddr) -> Self {
        Self(match ip.to_canonical() {
            IpAddr::V4(ip) => ip.into(),
            IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64).into(),
        })
    }

    /// Returns the source of clients that are known as `name`, from whatever address they connect.
    pub fn of_user(name: &str) -> Self {
        Self(Ipv6Addr::from_bits(xxh3_128(name.as_bytes())).into())
    }

    pub fn bytes(self) -> [u8; 16] {
        match self.0 {
            IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
            IpAddr::V6(ip) => ip.octets(),
        }
    }
}

impl Fair {
    pub fn new(places: usize) -> Arc<Self> {
        Arc::new(Self(Mutex::new(State { free: places, ..State::default() })))
    }

    /// Returns a place when it is the caller's turn. If `waiting_max` callers wait, the source with the
    /// most of them gives up one for a source with fewer. Cancel safe: a dropped future no longer waits.
    pub async fn enter(
        self: &Arc<Self>,
        source: Source,
        user: &str,
        waiting_max: usize,
    ) -> Result<Place, Crowded> {
        let turn = {
            let mut state = self.lock();
            if state.free > 0 {
                state.free -= 1;
                return Ok(Place(Some(self.clone())));
            }
            state.others.make_room(source, waiting_max)?;
            state.others.wait(source, user)
        };
        // Its turn is given up where there is no room for it any more.
        turn.await.map_err(|_| Crowded)
    }

    /// Returns a place as [`Self::enter`] does, but before callers of that function. The caller must
    /// bound the number of calls.
    pub async fn enter_first(self: &Arc<Self>, source: Source, user: &str) -> Place {
        let turn = {
            let mut state = self.lock();
            if state.free > 0 {
                state.free -= 1;
                return Place(Some(self.clone()));
            }
            state.first.wait(source, user)
        };
        turn.await.expect("nobody who comes first gives a turn up for others")
    }

    /// Returns the number of turns before that of a new caller.
    pub fn turns_before(&self, source: Source) -> usize {
        let state = self.lock();
        if state.free > 0 {
            return 0;
        }
        let Queue { waiting, sources } = &state.others;
        let mine = sources.iter().find(|(of, _)| *of == source).map_or(0, |(_, users)| users.len());
        1 + (*waiting).min((mine + 1) * sources.len())
    }

    fn leave(self: &Arc<Self>) {
        loop {
            let next = {
                let mut state = self.lock();
                let next = state.next();
                state.free += usize::from(next.is_none());
                next
            };
            match next.map(|next| next.send(Place(Some(self.clone())))) {
                // It has gone in this moment.
                Some(Err(mut place)) => place.0 = None,
                Some(Ok(())) | None => return,
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn next(&mut self) -> Option<oneshot::Sender<Place>> {
        let is_others_turn = self.first_in_a_row >= FIRST_IN_A_ROW && self.others.waiting > 0;
        if !is_others_turn && let Some(next) = self.first.next() {
            self.first_in_a_row = self.first_in_a_row.saturating_add(1);
            return Some(next);
        }
        self.first_in_a_row = 0;
        self.others.next()
    }
}

impl Queue {
    fn wait(&mut self, source: Source, user: &str) -> oneshot::Receiver<Place> {
        let (turn, wait) = oneshot::channel();
        let at = self.sources.iter().position(|(of, _)| *of == source).unwrap_or_else(|| {
            self.sources.push_back((source, VecDeque::new()));
            self.sources.len() - 1
        });
        let users = &mut self.sources[at].1;
        match users.iter_mut().find(|known| *known.name == *user) {
            Some(known) => known.waiting.push_back(turn),
            None => users.push_back(User { name: user.into(), waiting: [turn].into() }),
        }
        self.waiting += 1;
        wait
    }

    fn make_room(&mut self, source: Source, waiting_max: usize) -> Result<(), Crowded> {
        if self.waiting < waiting_max {
            return Ok(());
        }
        self.retain(|turn| !turn.is_closed());
        if self.waiting < waiting_max {
            return Ok(());
        }
        let count = |users: &VecDeque<User>| users.iter().map(|user| user.waiting.len()).sum::<usize>();
        let mine = self.sources.iter().find(|(of, _)| *of == source).map_or(0, |(_, users)| count(users));
        let most = self.sources.iter_mut().map(|(_, users)| users).max_by_key(|users| count(users));
        let most = most.filter(|users| count(users) > mine + 1).ok_or(Crowded)?;
        let greediest = most.iter_mut().max_by_key(|user| user.waiting.len()).ok_or(Crowded)?;
        drop(greediest.waiting.pop_back());
        self.retain(|_| true);
        Ok(())
    }

    fn retain(&mut self, stays: impl Fn(&oneshot::Sender<Place>) -> bool) {
        self.sources.retain_mut(|(_, users)| {
            users.retain_mut(|user| {
                user.waiting.retain(&stays);
                !user.waiting.is_empty()
            });
            !users.is_empty()
        });
        let users = self.sources.iter().flat_map(|(_, users)| users);
        self.waiting = users.map(|user| user.waiting.len()).sum();
    }

    fn next(&mut self) -> Option<oneshot::Sender<Place>> {
        let (source, mut users) = self.sources.pop_front()?;
        let mut user = users.pop_front()?;
        let next = user.waiting.pop_front();
        self.waiting -= 1;
        if !user.waiting.is_empty() {
            users.push_back(user);
        }
        if !users.is_empty() {
            self.sources.push_back((source, users));
        }
        next
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(fair) = self.0.take() {
            fair.leave();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures_util::FutureExt;
    use futures_util::future::{BoxFuture, select_all};

    use super::*;

    type Waited = (u8, &'static str, Result<Place, Crowded>);

    fn source(n: u8) -> Source {
        Source::of([10, 0, 0, n].into())
    }

    /// Who waits in this order; each has asked.
    fn waiting(fair: &Arc<Fair>, who: &[(u8, &'static str)], max: usize) -> Vec<BoxFuture<'static, Waited>> {
        let wait = |&(n, user): &(u8, &'static str)| {
            let fair = fair.clone();
            let mut wait = async move { (n, user, fair.enter(source(n), user, max).await) }.boxed();
            assert!((&mut wait).now_or_never().is_none());
            wait
        };
        who.iter().map(wait).collect()
    }

    #[tokio::test]
    async fn addresses_take_turns_and_so_do_the_users_of_one() {
        let fair = Fair::new(1);
        let mut place = fair.enter(source(9), "x", 9).await.unwrap();
        let mut wait = waiting(&fair, &[(1, "a"), (1, "a"), (1, "b"), (1, "a"), (2, "c"), (1, "d")], 9);
        let mut served = Vec::new();
        while !wait.is_empty() {
            drop(place);
            let ((n, user, given), _, rest) = select_all(wait).await;
            served.push((n, user));
            (place, wait) = (given.unwrap(), rest);
        }
        assert_eq!(served, [(1, "a"), (2, "c"), (1, "b"), (1, "d"), (1, "a"), (1, "a")]);
        drop(place);
        assert_eq!(fair.lock().free, 1);
    }

    #[tokio::test]
    async fn with_no_room_who_waits_the_most_gives_way_and_who_has_gone_takes_none() {
        let fair = Fair::new(1);
        let place = fair.enter(source(9), "x", 3).await.unwrap();
        let mut wait = waiting(&fair, &[(1, "a"), (1, "b"), (1, "b")], 3);
        assert!(matches!(fair.enter(source(1), "c", 3).now_or_never(), Some(Err(Crowded))));
        let other = waiting(&fair, &[(2, "c")], 3).remove(0);
        let (_, user, given) = wait.pop().unwrap().await;
        assert!(user == "b" && given.is_err());
        // The first has gone: the other address is next.
        drop(wait.remove(0));
        drop(place);
        assert_eq!(fair.lock().others.waiting, 1);
        let mut last = pin!(wait.pop().unwrap());
        let (.., given) = other.await;
        assert!((&mut last).now_or_never().is_none());
        drop(given);
        assert!(last.await.2.is_ok());
    }

    #[tokio::test]
    async fn those_who_come_first_are_served_before_others_who_still_have_a_turn_now_and_then() {
        let fair = Fair::new(1);
        let mut place = fair.enter(source(9), "x", 9).await.unwrap();
        let mut wait = waiting(&fair, &[(1, "a"), (2, "b")], 9);
        for n in 0..2 * FIRST_IN_A_ROW as u8 {
            let fair = fair.clone();
            // Half of them as one user: users take turns as well.
            let of = Source::of_user(if n % 2 == 0 { "ann" } else { "bob" });
            let mut first = async move { (n, "first", Ok(fair.enter_first(of, "c").await)) }.boxed();
            assert!((&mut first).now_or_never().is_none());
            wait.push(first);
        }
        let mut served = Vec::new();
        while !wait.is_empty() {
            drop(place);
            let ((_, user, given), _, rest) = select_all(wait).await;
            served.push(user);
            (place, wait) = (given.unwrap(), rest);
        }
        let first = ["first"; FIRST_IN_A_ROW as usize];
        assert_eq!(served, [&first[..], &["a"], &first, &["b"]].concat());
        drop(place);
        assert_eq!(fair.lock().free, 1);
    }

    #[test]
    fn a_source_is_an_address_or_a_network_of_ipv6() {
        let of = |ip: &str| Source::of(ip.parse().unwrap());
        assert_eq!(of("::ffff:10.0.0.1"), of("10.0.0.1"));
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:2"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
    }
}
