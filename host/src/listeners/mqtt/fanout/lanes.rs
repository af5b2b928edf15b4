//! Lanes: sessions that a restart found behind the live delivery of a stream catch up with
//! it, those that are about as far behind together, the nearest first. No lane reads more
//! than [`LANE_SPREAD`] times what its nearest session needs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::owed::{Found, Owed};
use super::{IDLE, Live, follow};
use crate::listeners::mqtt::Broker;
use crate::listeners::mqtt::session::Session;

/// The sessions of a lane are at most so many times as far behind as the nearest of them,
/// which reads no more for the others' sake.
const LANE_SPREAD: u64 = 4;
/// Nearer than this, in messages, all are in one lane.
const LANE_LEAST: u64 = 1 << 14;

/// Sessions that catch up with the live delivery of one stream together, and members of shares that are
/// owed something of it.
pub(super) struct Lane {
    sessions: Vec<Arc<Session>>,
    /// Offset of the next message to be delivered.
    pub(super) position: AtomicU64,
}

/// Brings the sessions that a restart found behind up to the live delivery, lane by lane.
pub async fn catch_up(broker: Arc<Broker>, number: usize) {
    for lane in 1..=broker.live.streams[number].lanes.len() {
        tokio::select! {
            () = follow(&broker, number, lane as u8) => {}
            () = broker.shutdown.cancelled() => return,
        }
    }
}

/// What a lane delivers for.
enum Behind<'f> {
    Session(&'f Arc<Session>),
    /// The members of a share.
    Share(&'f mut Owed),
}

/// The sessions that have not been offered all before `end`, and the shares whose members are owed
/// some of it, by how far they are behind.
pub(super) fn lanes(
    sessions: &[Arc<Session>],
    shares: &mut [Found],
    streams: usize,
    number: usize,
    end: u64,
) -> Box<[Lane]> {
    let sessions = sessions.iter().filter(|session| session.filters() > 0);
    let sessions = sessions.map(|session| (session.outbox().begins_at(number), Behind::Session(session)));
    let shares = shares.iter_mut().map(|share| &mut share.owed);
    let shares = shares.filter_map(|owed| Some((owed.first(number)?, Behind::Share(owed))));
    let all = sessions.chain(shares).map(|(from, behind)| (end.saturating_sub(from), behind));
    let mut all: Vec<_> = all.filter(|(behind, _)| *behind > 0).collect();
    all.sort_unstable_by_key(|(behind, _)| *behind);
    let mut lanes: Vec<Lane> = Vec::new();
    let mut most = 0;
    for (behind, of) in all {
        if lanes.is_empty() || behind > most {
            most = behind.max(LANE_LEAST).saturating_mul(LANE_SPREAD);
            lanes.push(Lane { sessions: Vec::new(), position: AtomicU64::new(end) });
        }
        let count = lanes.len() as u8;
        let lane = lanes.last_mut().expect("there is one");
        *lane.position.get_mut() = end - behind;
        match of {
            Behind::Session(session) => {
                session.set_lane(streams, number, count);
                lane.sessions.push(session.clone());
            }
            Behind::Share(owed) => owed.set_lane(number, count),
        }
    }
    lanes.into()
}

impl Live {
    /// True where the lane has come as far as the live delivery, to which its sessions
    /// belong from now on.
    pub(super) fn join(&self, number: usize, lane: u8) -> bool {
        let tail = &self.streams[number];
        let Some(Lane { sessions, position }) = tail.lane(lane) else { return false };
        let at = position.load(Ordering::Relaxed);
        // With nobody subscribed there is nothing to be delivered.
        let has_caught_up = || match tail.position.load(Ordering::Relaxed) {
            IDLE => true,
            live => at >= live,
        };
        if !has_caught_up() {
            return false;
        }
        // Nothing is delivered meanwhile.
        let _index = self.index_to_change();
        if !has_caught_up() {
            return false;
        }
        for session in sessions {
            session.outbox().pass(number, at);
            session.set_lane(self.streams.len(), number, 0);
        }
        position.store(IDLE, Ordering::Release);
        self.lanes.fetch_sub(1, Ordering::AcqRel);
        true
    }
}
