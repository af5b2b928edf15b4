//! The change to a new segment: what it costs, and what does not wait for it.

use super::*;

/// Appends messages of `len` bytes, each in a frame of its own.
fn frames(log: &Log, count: u64, len: usize) {
    for n in 0..count {
        log.append(&[message("a/b", &payload(n, len))], &[]).unwrap();
        commit(log).unwrap();
    }
}

#[test]
fn a_checkpoint_is_written_at_most_once_per_its_own_size_of_new_frames() {
    for (prepare, state_bytes) in [(false, 0), (false, 400 << 10), (true, 40 << 10), (true, 2_500 << 10)] {
        let (disk, clock) = (SimDisk::new(3), new_clock());
        let (log, _) = manual(&disk, &small(), &clock).unwrap();
        let value = vec![7; 10 << 10];
        for key in 0..(state_bytes / value.len()) as u32 {
            log.append(&[], &[StateChange { key: &key.to_be_bytes(), value: Some(&value) }]).unwrap();
            commit(&log).unwrap();
        }
        let before = disk.written();
        let frames_of = |n: u64| n * frame::frame_len(frame::ENTRY_BYTES, 2_000 + 8 + 3 + 1, 0) as u64;
        let (mut count, mut rolls) = (0, log.inner.sizes().0);
        while frames_of(count) < 4 * state_bytes as u64 + (200 << 10) {
            frames(&log, 10, 2_000);
            count += 10;
            if prepare {
                log.inner.keep(true);
            }
        }
        rolls = log.inner.sizes().0 - rolls;
        assert!(rolls > 1, "{rolls} segments with {state_bytes} bytes of state");
        let written = disk.written() - before;
        let frames = frames_of(count);
        // One more checkpoint than frames paid for: that of the segment in use. Headers beside them.
        let most = 2 * frames + state_bytes as u64 + rolls as u64 * (2 * segment::FRAMES_AT);
        assert!(written <= most, "{written} bytes for {frames} of frames, {state_bytes} of state");
        drop(log);
        disk.restart_process();
        let (log, _) = manual(&disk, &small(), &clock).unwrap();
        assert_eq!(log.state(b"").len(), state_bytes / value.len());
        assert_eq!(block_on(read_all(&*log, 0)).len() as u64, count);
    }
}

#[test]
fn no_call_to_the_disk_is_made_under_a_lock_that_a_connection_or_reader_takes() {
    let (disk, clock) = (SimDisk::new(3), new_clock());
    let config = Config { reserve_bytes: ByteSize(8 << 10), ..small() };
    let (log, _) = manual(&disk, &config, &clock).unwrap();
    let calls = Arc::new(AtomicU64::new(0));
    let (inner, counted) = (Arc::downgrade(&log.inner), Arc::clone(&calls));
    disk.before_each(move || {
        let Some(inner) = inner.upgrade() else { return };
        counted.fetch_add(1, Ordering::Relaxed);
        assert!(inner.front.try_lock().is_ok(), "an append would wait for the disk");
        assert!(inner.back.try_write().is_ok(), "a cursor would wait for the disk");
        assert!(inner.durable.try_lock().is_ok(), "who subscribes to acks would wait for the disk");
    });
    let reader = log.attach("reader", Offset(0), crate::stream::OnLag::Block);
    for round in 0..8 {
        frames(&log, 10, 2_000);
        log.inner.keep(round % 2 == 0);
        reader.advance(log.bounds().end);
        clock.fetch_add(3_600_000_000, Ordering::Relaxed);
    }
    log.inner.keep(true);
    log.inner.seal();
    assert!(log.bounds().start > Offset(0), "segments went");
    assert!(calls.load(Ordering::Relaxed) > 100);
}

#[test]
fn the_room_behind_the_last_frame_of_a_full_segment_is_given_back() {
    let (disk, clock) = (SimDisk::new(3), new_clock());
    let (log, _) = manual(&disk, &small(), &clock).unwrap();
    frames(&log, 10, 2_000);
    log.inner.keep(false);
    for segment in read(&log.inner.back).segments.iter().rev().skip(1) {
        let path = Path::new(DIR).join(segment::name(segment.header.sequence));
        let len = disk.open(&path, disk::Create::ReadOnly).unwrap().len().unwrap();
        assert_eq!((len, segment.file_len), (segment.limit, segment.limit));
    }
}

#[test]
fn what_passes_by_itself_withholds_acks_and_stops_no_stream() {
    for (error, renames) in [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::ENOSPC, libc::EDQUOT]
        .into_iter()
        .flat_map(|error| [(error, false), (error, true)])
    {
        let (disk, clock) = (SimDisk::new(3), new_clock());
        let (log, _) = manual(&disk, &small(), &clock).unwrap();
        let fail = |error| if renames { disk.fail_renames(error) } else { disk.fail_opens(error) };
        fail(Some(error));
        let mut count = 0;
        let lack = loop {
            log.append(&[message("a/b", &payload(count, 2_000))], &[]).unwrap();
            match commit(&log) {
                Ok(()) => count += 1,
                Err(commit::CommitError::NoSpace(lack)) => break lack,
                Err(other) => panic!("{error}: {other:?}"),
            }
        };
        assert_eq!(log.append(&[message("a/b", b"x")], &[]), Err(AppendError::NoSpace), "{lack}");
        for _ in 0..5 {
            log.inner.keep(true);
            assert!(commit(&log).is_err());
        }
        let temporary = || disk.list(Path::new(DIR)).unwrap().iter().filter(|n| n.ends_with(".tmp")).count();
        assert!(temporary() <= 1, "{error}: a file is left behind for each try");
        fail(None);
        commit(&log).unwrap();
        assert_eq!(log.bounds().end, Offset(count + 1));
        log.append(&[message("a/b", b"x")], &[]).unwrap();
    }
}

#[tokio::test]
async fn a_reader_without_a_file_descriptor_reads_on_once_there_is_one() {
    let disk = SimDisk::new(3);
    let (log, _) = Log::open(Arc::new(disk.clone()), Path::new(DIR), "t", &small()).unwrap();
    for n in 0..10 {
        let appended = log.append(&[message("a/b", &payload(n, 2_000))], &[]).unwrap();
        crate::stream::conformance::durable(&*log, appended.ticket).await;
    }
    disk.fail_opens(Some(libc::EMFILE));
    let mut cursor = log.cursor(Offset(0));
    let mut next = std::pin::pin!(cursor.next());
    let refused = tokio::time::timeout(Duration::from_millis(50), &mut next).await;
    assert!(refused.is_err(), "it waits: {refused:?}");
    disk.fail_opens(None);
    assert!(matches!(next.await, Ok(crate::stream::Read::Batch(batch)) if batch.base == Offset(0)));
}
