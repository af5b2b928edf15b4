//! Lanes, in which sessions that a restart found behind live delivery catch up. A lane has the sessions
//! that are about equally far behind, and the nearest lane runs first. No lane reads more than
//! [`LANE_SPREAD`] times what its nearest session needs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::owed::{Found, Owed};
use super::{IDLE, Live, follow};
use crate::listeners::mqtt::Broker;
use crate::listeners::mqtt::session::Session;

/// How many times farther behind than the nearest one the sessions of a lane may be. The nearest session
/// reads no more than that for the others.
const LANE_SPREAD: u64 = 4;
/// Distance in messages within which all sessions are in one lane.
const LANE_LEAST: u64 = 1 << 14;

/// Sessions that catch up with live delivery of one stream together, and shares whose members are owed
/// messages of it.
pub(super) struct Lane {
    sessions: Vec<Arc<Session>>,
    /// Offset of the next message to deliver.
    pub(super) position: AtomicU64,
}

/// Delivers, lane by lane, to the sessions that a restart found behind live delivery.
pub async fn catch_up(broker: Arc<Broker>, number: usize) {
    for lane in 1..=broker.live.streams[number].lanes.len() {
        tokio::select! {
            () = follow(&broker, number, lane as u8) => {}
            () = broker.shutdown.cancelled() => return,
        }
    }
}

/// Receiver for which a lane delivers.
enum Behind<'f> {
    Session(&'f Arc<Session>),
    /// The members of a share.
    Share(&'f mut Owed),
}

/// Returns the sessions that have not been offered all messages before `end`, and the shares whose
/// members are owed some of them, grouped by how far they are behind.
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
    /// Returns whether the lane has reached live delivery. Its sessions belong to live delivery from
    /// then on.
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
