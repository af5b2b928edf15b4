//! The log against a bad disk: crashes anywhere, syncs that are missing or
//! fail, damage, a full disk.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::clock::SET_US;
use super::sim::SimDisk;
use super::*;
use crate::stream::conformance::{message, read_all};
use crate::stream::{Retention, StateChange};
use crate::units::{ByteSize, Period};

mod crashes;
mod damage;
mod frames;
mod openings;
mod roll;
mod space;

const DIR: &str = "/data/telemetry";

fn small() -> Config {
    Config {
        segment_bytes: ByteSize(12 << 10),
        reserve_bytes: ByteSize(0),
        tail_bytes_max: ByteSize(2 << 10),
        commit_buffer_bytes_max: ByteSize(1 << 20),
        retention: Retention {
            max_age: Some(Period(Duration::from_secs(3_600))),
            max_bytes: ByteSize(1 << 30),
        },
        ..Config::default()
    }
}

/// A log without threads: the test commits and keeps.
fn manual(
    disk: &SimDisk,
    config: &Config,
    clock: &Arc<AtomicU64>,
) -> Result<(Arc<Log>, Recovery), OpenError> {
    let clock = Arc::clone(clock);
    let both = move || (clock.load(Ordering::Relaxed), clock.load(Ordering::Relaxed));
    manual_at(disk, config, Arc::new(both))
}

fn manual_at(
    disk: &SimDisk,
    config: &Config,
    clock: clock::Source,
) -> Result<(Arc<Log>, Recovery), OpenError> {
    let (inner, recovery) = open::open(Arc::new(disk.clone()), Path::new(DIR), "telemetry", config, clock)?;
    Ok((Arc::new(Log { inner, threads: Mutex::default() }), recovery))
}

fn commit(log: &Log) -> Result<(), commit::CommitError> {
    log.inner.take_in_hand(&mut lock(&log.inner.writer));
    log.inner.commit_in_hand()
}

fn new_clock() -> Arc<AtomicU64> {
    Arc::new(AtomicU64::new(SET_US + 1_000_000))
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
}

fn payload(offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = offset.to_le_bytes().to_vec();
    bytes.extend((0..len).map(|i| (offset as usize * 31 + i * 7) as u8));
    bytes
}
