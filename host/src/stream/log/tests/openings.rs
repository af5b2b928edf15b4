//! Who wrote which offsets, through restored, copied and shortened folders.

use super::*;
use crate::stream::Opening;

fn opened(disk: &SimDisk, clock: &Arc<AtomicU64>) -> (Arc<Log>, Recovery) {
    disk.restart_process();
    manual(disk, &small(), clock).unwrap()
}

fn append(log: &Log, count: u64) {
    for n in 0..count {
        log.append(&[message("a/b", &payload(n, 900))], &[]).unwrap();
        commit(log).unwrap();
    }
}

/// Ids and first offsets, the ids by the order in which they were seen.
fn firsts(log: &Log) -> Vec<u64> {
    log.openings().iter().map(|opening| opening.first.0).collect()
}

#[test]
fn each_opening_has_an_id_of_its_own_and_a_log_knows_those_that_wrote_what_it_holds() {
    let (disk, clock) = (SimDisk::new(3), new_clock());
    let (log, _) = opened(&disk, &clock);
    assert_eq!(firsts(&log), [0]);
    append(&log, 10);
    let first = log.openings()[0];
    log.inner.seal();
    let copy = disk.fork();
    let (log, _) = opened(&disk, &clock);
    append(&log, 3);
    let (other, _) = opened(&copy, &clock);
    assert_eq!((firsts(&log), firsts(&other)), (vec![0, 10], vec![0, 10]));
    assert_eq!((log.openings()[0], other.openings()[0]), (first, first), "up to here they are the same");
    assert_ne!(log.openings()[1].id, other.openings()[1].id, "from here on not");
    // An opening that wrote nothing leaves no trace, one that crashed does.
    drop(other);
    let (other, _) = opened(&copy, &clock);
    assert_eq!(firsts(&other), [0, 10]);
    let before = log.openings();
    drop(log);
    let (log, _) = opened(&disk, &clock);
    assert_eq!(log.openings()[..2], before[..]);
    assert_eq!(firsts(&log), [0, 10, 13]);
}

#[test]
fn openings_survive_damaged_metadata_and_go_with_their_segments() {
    let (disk, clock) = (SimDisk::new(3), new_clock());
    for _ in 0..4 {
        let (log, _) = opened(&disk, &clock);
        append(&log, 20);
        log.inner.seal();
    }
    let (log, _) = opened(&disk, &clock);
    let known = log.openings();
    assert_eq!(firsts(&log), [0, 20, 40, 60, 80]);
    append(&log, 1);
    drop(log);
    disk.flip(&Path::new(DIR).join("STREAM"), 0);
    let (log, recovery) = opened(&disk, &clock);
    assert!(recovery.metadata_rebuilt);
    assert_eq!(log.openings()[..5], known[..]);

    clock.fetch_add(2 * 3_600_000_000, Ordering::Relaxed);
    log.inner.keep(false);
    let start = log.bounds().start;
    assert!(start > Offset(20), "{start:?}");
    drop(log);
    let (log, _) = opened(&disk, &clock);
    let openings = log.openings();
    assert!(openings.len() < 7 && openings[1].first > start, "{openings:?} from {start:?}");
}

#[test]
fn what_nothing_proved_and_is_written_again_belongs_to_the_opening_that_acknowledged_it() {
    let (disk, clock) = (SimDisk::new(3), new_clock());
    let (log, _) = opened(&disk, &clock);
    append(&log, 5);
    drop(log);
    let (log, recovery) = opened(&disk, &clock);
    assert_eq!((recovery.rewritten, firsts(&log)), (1, vec![0, 5]));
}

#[test]
fn an_opening_that_appended_nothing_does_not_take_the_messages_of_the_next() {
    let (disk, clock) = (SimDisk::new(3), new_clock());
    let (log, _) = opened(&disk, &clock);
    append(&log, 5);
    drop(log);
    for _ in 0..3 {
        // Has a segment, with what nothing proved.
        drop(opened(&disk, &clock));
    }
    let (log, _) = opened(&disk, &clock);
    let known = log.openings();
    append(&log, 3);
    drop(log);
    let (log, _) = opened(&disk, &clock);
    assert_eq!(log.openings()[..known.len()], known[..]);
    assert_eq!(firsts(&log), [0, 5, 8]);
}

#[test]
fn a_folder_of_a_version_without_openings_has_one_of_unknown_id() {
    let (disk, clock) = (SimDisk::new(3), new_clock());
    let (log, _) = opened(&disk, &clock);
    append(&log, 5);
    log.inner.seal();
    drop(log);
    let segment = Path::new(DIR).join(segment::name(1));
    let file = disk.open(&segment, disk::Create::Existing).unwrap();
    let mut head = [0; segment::FRAMES_AT as usize];
    file.read_at(&mut head, 0).unwrap();
    let header = segment::Header::decode(&head).unwrap();
    file.write_at(&[&segment::Header { opening: 0, opening_first: 0, ..header }.encode()], 0).unwrap();
    let metadata = generations::Metadata::from_segment(&header);
    generations::write(&disk, Path::new(DIR), &metadata).unwrap();
    let (log, _) = opened(&disk, &clock);
    let openings = log.openings();
    assert_eq!(openings[0], Opening { id: Opening::UNKNOWN, first: Offset(0) });
    assert_eq!(firsts(&log), [0, 5]);
    assert_ne!(openings[1].id, Opening::UNKNOWN);
}

#[test]
fn a_closed_log_that_lost_its_end_says_which_offsets_and_never_uses_them_again() {
    let (disk, clock) = (SimDisk::new(3), new_clock());
    let (log, _) = opened(&disk, &clock);
    append(&log, 7);
    log.append(&[], &[StateChange { key: b"k", value: Some(b"v") }]).unwrap();
    commit(&log).unwrap();
    let at = log.inner.writer.lock().unwrap().at;
    log.inner.seal();
    drop(log);
    let path = Path::new(DIR).join(segment::name(1));
    // What is left of the file, and how many messages that is.
    for (left, kept) in [(at, 7), (at - 100, 7), (at - 2_000, 5), (segment::FRAMES_AT + 1_500, 1)] {
        for zeros in [false, true] {
            let disk = disk.fork();
            let file = disk.open(&path, disk::Create::Existing).unwrap();
            let len = file.len().unwrap();
            if zeros {
                file.write_at(&[&vec![0; (len - left) as usize]], left).unwrap();
            } else {
                file.truncate(left).unwrap();
            }
            let (log, recovery) = opened(&disk, &clock);
            let lost: Vec<_> =
                recovery.damaged.iter().map(|d| (d.offsets.start.0, d.offsets.end.0)).collect();
            assert_eq!((recovery.torn_bytes, recovery.rewritten), (0, 0), "{left}: nothing was torn");
            assert_eq!(log.bounds(), Offset(0)..Offset(7), "{left}");
            if left == at {
                // The mark alone is no loss.
                assert!(lost.is_empty(), "{lost:?}");
                continue;
            }
            assert_eq!(lost, [(kept, 7)], "{left}");
            append(&log, 2);
            let read = block_on(read_all(&*log, 0));
            let gone: Vec<u64> =
                read.iter().filter(|(_, p)| p.is_none()).map(|(offset, _)| *offset).collect();
            assert_eq!((gone, read.len()), ((kept..7).collect(), 9));
        }
    }
    // Without its metadata nobody knows.
    disk.remove(&path.with_file_name("STREAM")).unwrap();
    let (_, recovery) = opened(&disk, &clock);
    assert_eq!(recovery.damaged, []);
}

#[test]
fn a_closed_log_has_no_zeros_to_read_at_the_next_opening() {
    let (disk, clock) = (SimDisk::new(3), new_clock());
    let (log, _) = opened(&disk, &clock);
    append(&log, 2);
    log.inner.seal();
    let file = disk.open(&Path::new(DIR).join(segment::name(1)), disk::Create::ReadOnly).unwrap();
    assert!(file.len().unwrap() < 4_096 + 4 * 1_100);
}

#[test]
fn restarts_without_a_message_leave_no_more_segments_however_the_host_ended() {
    for is_closed in [true, false] {
        let (disk, clock) = (SimDisk::new(3), new_clock());
        let (log, _) = opened(&disk, &clock);
        append(&log, 3);
        let mut counts = Vec::new();
        let mut last = log;
        for _ in 0..6 {
            if is_closed {
                last.inner.seal();
            }
            drop(last);
            (last, _) = opened(&disk, &clock);
            counts.push(last.inner.sizes().0);
        }
        assert_eq!(counts[1..], [counts[1]; 5], "closed: {is_closed}");
    }
}
