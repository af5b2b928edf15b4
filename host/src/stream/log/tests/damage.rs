//! Damage is reported with its exact offsets; all else is read.

use super::*;

/// Twelve frames of two messages, cleanly closed.
fn written() -> (SimDisk, Arc<AtomicU64>, PathBuf) {
    let (disk, clock) = (SimDisk::new(7), new_clock());
    let (log, _) = manual(&disk, &small(), &clock).unwrap();
    for frame in 0..12_u64 {
        let payloads = [payload(2 * frame, 40), payload(2 * frame + 1, 40)];
        let messages = payloads.each_ref().map(|p| message("acme/d/reading", p));
        log.append(&messages, &[StateChange { key: b"k", value: Some(&[frame as u8]) }]).unwrap();
        commit(&log).unwrap();
    }
    log.inner.seal();
    disk.restart_process();
    (disk, clock, Path::new(DIR).join(segment::name(1)))
}

fn all(log: &Log) -> Vec<(u64, Option<Vec<u8>>)> {
    block_on(read_all(log, 0))
}

#[test]
fn a_flipped_byte_anywhere_loses_at_most_its_frame_and_says_so() {
    let (disk, clock, path) = written();
    let end = disk.fork();
    let end = end.open(&path, disk::Create::ReadOnly).unwrap().len().unwrap() as usize;
    for at in (0..end).step_by(5) {
        let disk = disk.fork();
        disk.flip(&path, at);
        let (log, recovery) = manual(&disk, &small(), &clock).unwrap_or_else(|e| panic!("byte {at}: {e}"));
        let read = all(&log);
        assert_eq!(read.len(), 24, "byte {at}: {recovery:?}");
        for from in [23, 5, 12, 0] {
            let again = block_on(read_all(&*log, from));
            assert_eq!(again, read[from as usize..], "byte {at}: the same from any offset");
        }
        let lost: Vec<u64> = read.iter().filter(|(_, p)| p.is_none()).map(|(offset, _)| *offset).collect();
        for (offset, found) in read {
            assert!(found.is_none_or(|found| found == payload(offset, 40)), "byte {at}, offset {offset}");
        }
        let reported: Vec<u64> =
            recovery.damaged.iter().flat_map(|d| d.offsets.start.0..d.offsets.end.0).collect();
        assert_eq!(lost, reported, "byte {at}");
        assert!(matches!(lost[..], [] | [_, _]), "byte {at} lost {lost:?}");
        assert_eq!(log.append(&[message("a/b", b"x")], &[]).unwrap().first, Offset(24));
    }
}

#[test]
fn a_torn_tail_is_cut_and_is_no_damage() {
    let (disk, clock, path) = written();
    let (log, _) = manual(&disk, &small(), &clock).unwrap();
    log.append(&[message("a/b", &payload(24, 2_000))], &[]).unwrap();
    commit(&log).unwrap();
    drop(log);
    let path = path.with_file_name(segment::name(2));
    let limit = {
        let file = disk.open(&path, disk::Create::ReadOnly).unwrap();
        let segments = recover::segments(&disk, Path::new(DIR), None).unwrap();
        let mut scan = scan::Scan::new(file, &segments[1].header, segments[1].file_len);
        let mut last = 0;
        while let scan::Step::Frame { at, .. } = scan.next().unwrap() {
            last = at;
        }
        last
    };
    disk.flip(&path, limit as usize + 1_500);
    disk.restart_process();
    let (log, recovery) = manual(&disk, &small(), &clock).unwrap();
    assert!(recovery.torn_bytes >= 2_000 && recovery.damaged.is_empty(), "{recovery:?}");
    assert_eq!(log.bounds().end, Offset(24));
    assert_eq!(log.append(&[message("a/b", b"x")], &[]).unwrap().first, Offset(24));
}

#[test]
fn damaged_metadata_is_made_again_from_the_segments() {
    let (disk, clock, path) = written();
    disk.flip(&path.with_file_name("STREAM"), 0);
    let (log, recovery) = manual(&disk, &small(), &clock).unwrap();
    assert!(recovery.metadata_rebuilt);
    assert_eq!(all(&log).len(), 24);
}

#[test]
fn another_partition_count_is_refused_with_what_to_do() {
    let (disk, clock, _) = written();
    let config = Config { partitions: 9, ..small() };
    let error = manual(&disk, &config, &clock).err().unwrap().to_string();
    assert!(error.contains("partitions: 4"), "{error}");
}

#[test]
fn after_a_failed_sync_nothing_is_acknowledged_and_the_next_opening_writes_it_again() {
    let (disk, clock, _) = written();
    let (log, _) = manual(&disk, &small(), &clock).unwrap();
    let durable = log.durable();
    disk.fail_syncs(true);
    let appended = log.append(&[message("a/b", &payload(24, 40))], &[]).unwrap();
    let Err(commit::CommitError::Failed(what, error)) = commit(&log) else { panic!("it was acknowledged") };
    log.inner.fail(what, &error);
    assert!(*durable.borrow() < appended.ticket && durable.has_changed().is_err());
    assert!(matches!(log.append(&[], &[]), Err(AppendError::Stopped(_))));
    assert_eq!(log.bounds().end, Offset(24));
    drop(log);

    // The page cache says that it is there; the disk never had it.
    disk.fail_syncs(false);
    disk.restart_process();
    let (log, recovery) = manual(&disk, &small(), &clock).unwrap();
    assert_eq!((recovery.rewritten, log.bounds().end), (1, Offset(25)));
    drop(log);
    disk.reboot();
    let (log, _) = manual(&disk, &small(), &clock).unwrap();
    assert_eq!(all(&log).last(), Some(&(24, Some(payload(24, 40)))));
}

#[test]
fn damage_is_counted_once_it_is_read_and_a_look_does_not_count() {
    let (disk, clock, path) = written();
    let end = disk.fork().open(&path, disk::Create::ReadOnly).unwrap().len().unwrap() as usize;
    let is_damaged = |at: &usize| {
        let disk = disk.fork();
        disk.flip(&path, *at);
        manual(&disk, &small(), &clock).is_ok_and(|(_, recovery)| {
            recovery.damaged.iter().any(|damaged| damaged.offsets.start < damaged.offsets.end)
        })
    };
    let at = (0..end).step_by(5).find(is_damaged).unwrap();
    disk.flip(&path, at);
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let log = metrics::with_local_recorder(&recorder, || manual(&disk, &small(), &clock).unwrap().0);
    let lost = || -> f64 {
        let rendered = recorder.handle().render();
        let lines = rendered.lines().filter(|line| line.starts_with("headworks_stream_gap_messages_total{"));
        lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
    };
    let before = lost();
    let mut look = log.peek(Offset(0));
    let mut gaps = 0;
    while let Some(read) = block_on(look.try_next()).unwrap() {
        gaps += usize::from(matches!(read, crate::stream::Read::Gap { .. }));
    }
    assert_eq!((gaps, lost()), (1, before));
    for _ in 0..3 {
        all(&log);
        assert_eq!(lost(), before + 2.0, "however many read it");
    }
}
