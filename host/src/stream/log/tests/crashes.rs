//! Crash before every single operation of random work; take out each sync.

use std::collections::BTreeMap;

use super::*;
use crate::stream::OnLag;

/// What a user of the log does.
#[derive(Clone, Debug)]
enum Op {
    /// Messages, their sizes, and a state key that gets this value or goes.
    Append(Vec<usize>, Option<(u8, Option<u8>)>),
    Commit,
    Keep {
        prepare: bool,
    },
    Hours(u64),
    Advance,
    Reopen,
    Close,
}

/// First offset, payloads, state change.
type Append = (u64, Vec<Vec<u8>>, Option<(u8, Option<u8>)>);

/// What must be true: an append is its messages and its state change.
#[derive(Default)]
struct Model {
    appends: Vec<Append>,
    acknowledged: usize,
    next: u64,
    pinned: u64,
    identity: Option<Identity>,
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

fn random_work(seed: u64, len: usize) -> Vec<Op> {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    (0..len)
        .map(|_| match random.below(20) {
            0..=7 => {
                let sizes = (0..random.below(4)).map(|_| random.below(1_500) as usize).collect();
                let change = (random.below(3) == 0)
                    .then(|| (random.below(4) as u8, (random.below(3) > 0).then(|| random.below(256) as u8)));
                Op::Append(sizes, change)
            }
            8..=13 => Op::Commit,
            14 | 15 => Op::Keep { prepare: random.below(2) == 0 },
            16 => Op::Hours(random.below(3)),
            17 => Op::Advance,
            18 => Op::Close,
            _ => Op::Reopen,
        })
        .collect()
}

/// Does the work until it is done or the machine is off.
fn work(disk: &SimDisk, ops: &[Op], model: &mut Model, clock: &Arc<AtomicU64>) -> Result<(), String> {
    let Some((mut log, mut reader)) = begin(disk, model, clock)? else { return Ok(()) };
    for op in ops {
        match op {
            Op::Append(sizes, change) => {
                let payloads: Vec<_> =
                    sizes.iter().enumerate().map(|(i, len)| payload(model.next + i as u64, *len)).collect();
                let messages: Vec<_> = payloads.iter().map(|p| message("acme/d/reading", p)).collect();
                let value = change.map(|(_, value)| [value.unwrap_or(0)]);
                let changes: Vec<_> = change
                    .iter()
                    .map(|(key, new)| StateChange {
                        key: std::slice::from_ref(key),
                        value: new.and(value.as_ref()).map(|v| &v[..]),
                    })
                    .collect();
                let appended = log.append(&messages, &changes).map_err(|e| e.to_string())?;
                if appended.first.0 != model.next {
                    return Err(format!("offset {:?}, not {}", appended.first, model.next));
                }
                model.next += messages.len() as u64;
                model.appends.push((appended.first.0, payloads, *change));
            }
            Op::Commit => match commit(&log) {
                Ok(()) => model.acknowledged = model.appends.len(),
                Err(_) if disk.has_crashed() => return Ok(()),
                Err(error) => return Err(format!("{error:?}")),
            },
            Op::Keep { prepare } => log.inner.keep(*prepare),
            Op::Hours(hours) => drop(clock.fetch_add(hours * 3_600_000_000, Ordering::Relaxed)),
            Op::Advance => {
                model.pinned = log.bounds().end.0;
                reader.advance(log.bounds().end);
            }
            Op::Reopen | Op::Close => {
                if commit(&log).is_err() {
                    return Ok(());
                }
                model.acknowledged = model.appends.len();
                if matches!(op, Op::Close) {
                    log.inner.seal();
                }
                drop((log, reader));
                disk.restart_process_unless_off();
                let Some(again) = begin(disk, model, clock)? else { return Ok(()) };
                (log, reader) = again;
            }
        }
    }
    Ok(())
}

type Open = (Arc<Log>, Box<dyn crate::stream::Attachment>);

/// Opens, and checks all that the log promises. `None` where the machine went off meanwhile.
fn begin(disk: &SimDisk, model: &mut Model, clock: &Arc<AtomicU64>) -> Result<Option<Open>, String> {
    let (log, recovery) = match manual(disk, &small(), clock) {
        Ok(opened) => opened,
        Err(_) if disk.has_crashed() => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    let ensure = |ok: bool, what: &str| if ok { Ok(()) } else { Err(format!("{what}: {recovery:?}")) };
    ensure(recovery.damaged.is_empty(), "a crash alone is no damage")?;
    ensure(!recovery.metadata_rebuilt, "a crash alone leaves the metadata whole")?;
    if model.acknowledged > 0 {
        ensure(model.identity == Some(log.identity()), "it is another log")?;
    }
    model.identity = Some(log.identity());
    let bounds = log.bounds();
    ensure(bounds.start.0 <= model.pinned, "retention went past a reader")?;
    // A prefix of the appends, all that were acknowledged among them, none by half.
    let kept =
        model.appends.iter().take_while(|(first, payloads, _)| first + payloads.len() as u64 <= bounds.end.0);
    let kept = kept.count().max(model.acknowledged);
    let end = model.appends[..kept].last().map_or(0, |(first, payloads, _)| first + payloads.len() as u64);
    ensure(bounds.end.0 == end, &format!("ends at {}, acknowledged or whole is {end}", bounds.end.0))?;
    let mut state: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
    let apply = |state: &mut BTreeMap<_, _>, change: &Option<(u8, Option<u8>)>| match change {
        Some((key, Some(value))) => drop(state.insert(vec![*key], vec![*value])),
        Some((key, None)) => drop(state.remove(&vec![*key])),
        None => {}
    };
    for (_, _, change) in &model.appends[..model.acknowledged] {
        apply(&mut state, change);
    }
    // State-only appends after the last message may or may not be there.
    let found: BTreeMap<_, _> = log.state(b"").into_iter().collect();
    let mut survivors = model.acknowledged;
    while survivors < kept && (found != state || end_of(model, survivors) != end) {
        apply(&mut state, &model.appends[survivors].2);
        survivors += 1;
    }
    ensure(found == state, &format!("state is {found:?}, not {state:?}"))?;
    let expected: BTreeMap<u64, &Vec<u8>> =
        model.appends.iter().flat_map(|(first, payloads, _)| (*first..).zip(payloads)).collect();
    for (offset, read) in block_on(read_all(&*log, bounds.start.0)) {
        ensure(
            read.as_ref() == expected.get(&offset).copied(),
            &format!("offset {offset} is not what it was"),
        )?;
    }
    model.appends.truncate(survivors);
    model.acknowledged = survivors;
    model.next = end;
    let reader = log.attach("reader", Offset(model.pinned.min(end)), OnLag::Block);
    model.pinned = model.pinned.min(end);
    Ok(Some((log, reader)))
}

fn end_of(model: &Model, appends: usize) -> u64 {
    model.appends[..appends].last().map_or(0, |(first, payloads, _)| first + payloads.len() as u64)
}

/// Work, power off before operation `n`, power on, check, work on, and once more.
fn round(seed: u64, crash_in: u64, left_out: Option<SyncSite>) -> Result<bool, String> {
    let disk = SimDisk::new(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ crash_in);
    if let Some(site) = left_out {
        disk.leave_out(site);
    }
    let (mut model, clock) = (Model::default(), new_clock());
    let ops = random_work(seed, 60);
    disk.crash_in(crash_in);
    work(&disk, &ops, &mut model, &clock)?;
    let crashed = disk.has_crashed();
    disk.reboot();
    // Off again soon, while it recovers or just after.
    disk.crash_in(seed % 17);
    work(&disk, &ops[30..], &mut model, &clock)?;
    disk.reboot();
    work(&disk, &ops[30..], &mut model, &clock)?;
    disk.reboot();
    begin(&disk, &mut model, &clock)?;
    Ok(crashed)
}

#[test]
fn what_was_acknowledged_survives_a_crash_before_any_operation() {
    for seed in 1..40 {
        let mut crash_in = 0;
        while round(seed, crash_in, None).unwrap_or_else(|e| panic!("seed {seed}, crash {crash_in}: {e}")) {
            crash_in += 1;
        }
    }
}

#[test]
fn every_single_sync_is_needed() {
    for site in SyncSite::ALL {
        let red = (1..200).any(|seed| (0..120).any(|crash_in| round(seed, crash_in, Some(site)).is_err()));
        assert!(red, "nothing was lost without the sync of {site:?}");
    }
}

mod model {
    use proptest::prelude::*;

    use super::*;

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            8 => (prop::collection::vec(0..3_000_usize, 0..5), prop::option::of((0..4_u8, prop::option::of(0..9_u8))))
                .prop_map(|(sizes, change)| Op::Append(sizes, change)),
            6 => Just(Op::Commit),
            2 => any::<bool>().prop_map(|prepare| Op::Keep { prepare }),
            1 => (0..3_u64).prop_map(Op::Hours),
            2 => Just(Op::Advance),
            1 => Just(Op::Reopen),
            1 => Just(Op::Close),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
        #[test]
        fn the_log_is_a_vector_and_a_map_through_any_operations_and_crashes(
            lives in prop::collection::vec((prop::collection::vec(op(), 0..40), 0..200_u64), 1..5),
            seed in 1..u64::MAX,
        ) {
            let disk = SimDisk::new(seed);
            let (mut model, clock) = (Model::default(), new_clock());
            for (ops, crash_in) in lives {
                disk.crash_in(crash_in);
                work(&disk, &ops, &mut model, &clock).map_err(TestCaseError::fail)?;
                disk.reboot();
            }
            begin(&disk, &mut model, &clock).map_err(TestCaseError::fail)?;
        }
    }
}

#[test]
fn a_signal_in_the_midst_of_any_call_loses_nothing_and_stops_no_stream() {
    let (disk, clock) = (SimDisk::new(3), new_clock());
    disk.interrupt_calls();
    let (log, _) = manual(&disk, &small(), &clock).unwrap();
    // Several segments.
    for n in 0..60 {
        log.append(&[message("a/b", &payload(n, 900))], &[]).unwrap();
        commit(&log).unwrap();
        log.inner.keep(true);
    }
    assert!(log.inner.sizes().0 > 3, "{:?}", log.inner.sizes());
    log.inner.seal();
    drop(log);
    disk.restart_process();
    let (log, recovery) = manual(&disk, &small(), &clock).unwrap();
    assert_eq!((recovery.torn_bytes, recovery.damaged.len()), (0, 0), "{recovery:?}");
    assert_eq!(log.bounds(), Offset(0)..Offset(60));
    assert_eq!(block_on(read_all(&*log, 0)).len(), 60);
}
