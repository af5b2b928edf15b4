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
        let segments = recover::segments(&disk, Path::new(DIR), None).unwrap().all;
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
fn damage_is_counted_once_when_a_start_finds_it_or_it_is_read_and_a_look_does_not_count() {
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
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let open = |disk| metrics::with_local_recorder(&recorder, || manual(disk, &small(), &clock).unwrap().0);
    let damaged = disk.fork();
    damaged.flip(&path, at);
    let log = open(&disk);
    disk.flip(&path, at);
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
    let log = open(&damaged);
    assert_eq!(lost(), before + 4.0, "by the start, whoever reads it");
    all(&log);
    assert_eq!(lost(), before + 4.0);
}

/// Frames of three quarters of a block.
fn written_large() -> (SimDisk, Arc<AtomicU64>, PathBuf) {
    let (disk, clock) = (SimDisk::new(7), new_clock());
    let config = Config { segment_bytes: ByteSize(64 << 10), ..small() };
    let (log, _) = manual(&disk, &config, &clock).unwrap();
    for offset in 0..12 {
        log.append(&[message("acme/d/reading", &payload(offset, 3_000))], &[]).unwrap();
        commit(&log).unwrap();
    }
    log.inner.seal();
    disk.restart_process();
    (disk, clock, Path::new(DIR).join(segment::name(1)))
}

#[test]
fn a_place_that_cannot_be_read_for_a_moment_costs_nothing_and_one_for_good_its_own_frames_alone() {
    for times in [1, unreadable::READ_TRIES - 1, u32::MAX] {
        let (disk, clock, path) = written_large();
        let (log, _) = manual(&disk, &small(), &clock).unwrap();
        disk.break_reads(&path, 20_500..21_000, times);
        let read = all(&log);
        let lost: Vec<_> = read.iter().filter(|(_, payload)| payload.is_none()).map(|(at, _)| *at).collect();
        assert_eq!(read.len(), 12);
        assert_eq!(lost.is_empty(), times != u32::MAX, "{times}: {lost:?}");
        assert!(lost.len() <= 3 && !lost.contains(&0) && !lost.contains(&11), "{lost:?}");
        assert_eq!(log.read_fault(), None);
    }
}

#[test]
fn a_reader_that_cannot_read_is_told_with_offset_and_file_until_it_can() {
    let (disk, clock, path) = written();
    let (log, _) = manual(&disk, &small(), &clock).unwrap();
    // The beginning, too: the disk is gone, and nothing counts as damage.
    disk.break_reads(&path, 0..usize::MAX, unreadable::READ_TRIES + 3);
    let mut cursor = log.cursor(Offset(0));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        let mut told = None;
        let read = {
            let mut next = std::pin::pin!(cursor.next());
            std::future::poll_fn(|context| {
                let polled = next.as_mut().poll(context);
                told = told.take().or(log.read_fault());
                polled
            })
            .await
        };
        assert!(
            matches!(read, Ok(crate::stream::Read::Batch(batch)) if batch.base == Offset(0)),
            "all is there"
        );
        assert_eq!(told.unwrap(), format!("offset 0 in {}: Input/output error (os error 5)", path.display()));
    });
    assert_eq!(log.read_fault(), None);
    // A look does not wait.
    disk.break_reads(&path, 0..usize::MAX, u32::MAX);
    let error = block_on(log.peek(Offset(5)).try_next()).unwrap_err().to_string();
    assert!(error.contains("offset 5 in ") && error.contains(".seg"), "{error}");
}

#[test]
fn a_start_does_without_what_the_disk_does_not_give_and_names_it() {
    for (bytes, times) in [(4_096 + 300..4_096 + 301, 2), (4_096 + 300..4_096 + 301, u32::MAX)] {
        let (disk, clock, path) = written();
        disk.break_reads(&path, bytes, times);
        let (log, recovery) = manual(&disk, &small(), &clock).unwrap();
        assert_eq!(recovery.unread.is_empty(), times == 2);
        assert_eq!(recovery.damaged.is_empty(), times == 2, "{recovery:?}");
        assert!(recovery.unread.iter().all(|unread| unread.path == path && unread.bytes.start == 4_096));
        assert_eq!(
            log.append(&[message("a/b", b"x")], &[]).unwrap().first,
            Offset(24),
            "no offset is used twice"
        );
    }
    let (disk, clock, path) = written();
    disk.break_reads(&path, 0..usize::MAX, u32::MAX);
    let error = manual(&disk, &small(), &clock).err().unwrap().to_string();
    assert!(error.contains(&path.display().to_string()), "a disk that is gone is no damage: {error}");
}

/// Frames of one message of 3,000 bytes each in several segments, cleanly closed; and where segments begin.
fn written_segments() -> (SimDisk, Arc<AtomicU64>, Vec<recover::Segment>) {
    let (disk, clock) = (SimDisk::new(7), new_clock());
    let (log, _) = manual(&disk, &small(), &clock).unwrap();
    for offset in 0..12 {
        log.append(&[message("acme/d/reading", &payload(offset, 3_000))], &[]).unwrap();
        commit(&log).unwrap();
    }
    log.inner.seal();
    disk.restart_process();
    let segments = recover::segments(&disk, Path::new(DIR), None).unwrap().all;
    assert!(segments.len() > 3, "{}", segments.len());
    (disk, clock, segments)
}

fn path_of(segment: &recover::Segment) -> PathBuf {
    Path::new(DIR).join(segment::name(segment.header.sequence))
}

/// The offsets of a segment.
fn offsets(segments: &[recover::Segment], at: usize) -> Vec<u64> {
    let end = segments.get(at + 1).map_or(12, |next| next.header.base);
    (segments[at].header.base..end).collect()
}

fn lost(read: &[(u64, Option<Vec<u8>>)]) -> Vec<u64> {
    read.iter().filter(|(_, payload)| payload.is_none()).map(|(offset, _)| *offset).collect()
}

#[test]
fn a_header_of_a_segment_that_the_disk_does_not_give_costs_no_message() {
    let (disk, clock, segments) = written_segments();
    for segment in &segments {
        let disk = disk.fork();
        disk.break_reads(&path_of(segment), 0..1, u32::MAX);
        let (log, recovery) = manual(&disk, &small(), &clock).unwrap();
        let unread = [Unread { path: path_of(segment), bytes: 0..4_096 }];
        assert_eq!((&recovery.damaged[..], &recovery.unread[..]), (&[][..], &unread[..]));
        let read = all(&log);
        assert_eq!((read.len(), lost(&read)), (12, Vec::new()));
        assert_eq!(log.append(&[message("a/b", b"x")], &[]).unwrap().first, Offset(12));
    }
}

#[test]
fn a_segment_whose_header_and_first_frame_the_disk_does_not_give_costs_its_own_messages_alone() {
    let (disk, clock, segments) = written_segments();
    let (newest, older) = segments.split_last().unwrap();
    for (at, segment) in older.iter().enumerate() {
        let disk = disk.fork();
        disk.break_reads(&path_of(segment), 0..4_200, u32::MAX);
        let (log, _) = manual(&disk, &small(), &clock).unwrap();
        let read = all(&log);
        assert_eq!((read.len(), lost(&read)), (12, offsets(&segments, at)), "segment {at}");
        assert_eq!(log.append(&[message("a/b", b"x")], &[]).unwrap().first, Offset(12));
    }
    // The log was closed, so that its end is known.
    disk.break_reads(&path_of(newest), 0..4_200, u32::MAX);
    let (log, recovery) = manual(&disk, &small(), &clock).unwrap();
    let read = all(&log);
    let own = offsets(&segments, older.len());
    assert_eq!((read.len(), lost(&read)), (12, own.clone()));
    let [damage] = &recovery.damaged[..] else { panic!("{recovery:?}") };
    assert_eq!(damage.segment, newest.header.sequence);
    assert_eq!(damage.offsets, Offset(own[0])..Offset(12));
    assert_eq!(log.append(&[message("a/b", b"x")], &[]).unwrap().first, Offset(12));
}

/// The same, opened once more and killed before it appended anything; and the file of its newest segment.
fn written_and_killed() -> (SimDisk, Arc<AtomicU64>, PathBuf) {
    let (disk, clock, segments) = written_segments();
    manual(&disk, &small(), &clock).unwrap();
    disk.restart_process();
    let path = Path::new(DIR).join(segment::name(segments.last().unwrap().header.sequence + 1));
    (disk, clock, path)
}

#[test]
fn a_newest_segment_in_which_no_frame_can_be_is_left_out_and_named() {
    let (disk, clock, path) = written_and_killed();
    let whole = disk.content(&path);
    // What is left of the header, and of the frame behind it, in bytes.
    let torn_headers = (0..128).map(|at| (at, 0));
    let torn_frames = (0..frame::HEADER_BYTES).map(|at| (0, at));
    for (of_header, of_frame) in torn_headers.chain(torn_frames) {
        let mut torn = vec![0; whole.len()];
        torn[..of_header].copy_from_slice(&whole[..of_header]);
        let frame = segment::FRAMES_AT as usize..segment::FRAMES_AT as usize + of_frame;
        torn[frame.clone()].copy_from_slice(&whole[frame]);
        for torn in [torn.clone(), torn[..of_header].to_vec()] {
            let disk = disk.fork();
            disk.set_content(&path, torn.clone());
            let what =
                format!("{of_header} bytes of the header, {of_frame} of the frame, {} in all", torn.len());
            let (log, recovery) = manual(&disk, &small(), &clock).unwrap_or_else(|e| panic!("{what}: {e}"));
            let [damage] = &recovery.damaged[..] else { panic!("{what}: {recovery:?}") };
            assert_eq!(
                (damage.bytes.clone(), &damage.offsets),
                (0..torn.len() as u64, &(Offset(12)..Offset(12)))
            );
            let read = all(&log);
            assert_eq!((read.len(), lost(&read)), (12, Vec::new()), "{what}");
            assert_eq!(log.append(&[message("a/b", &payload(12, 9))], &[]).unwrap().first, Offset(12));
            commit(&log).unwrap();
            log.inner.seal();
            drop(log);
            disk.restart_process();
            let (log, recovery) = manual(&disk, &small(), &clock).unwrap();
            assert_eq!((all(&log).len(), &recovery.damaged[..]), (13, &[][..]), "{what}");
            assert_eq!(disk.content(&path), torn, "a person can look at the file");
        }
    }
}

#[test]
fn a_newest_segment_that_may_have_frames_is_not_left_out_of_a_log_that_was_not_closed() {
    let (disk, clock, segments) = written_segments();
    let (log, _) = manual(&disk, &small(), &clock).unwrap();
    let path = Path::new(DIR).join(segment::name(segments.last().unwrap().header.sequence + 1));
    log.append(&[message("a/b", &payload(12, 9))], &[]).unwrap();
    commit(&log).unwrap();
    drop(log);
    disk.restart_process();
    let mut damaged = disk.content(&path);
    damaged[..segment::FRAMES_AT as usize + 8].fill(0);
    disk.set_content(&path, damaged);
    let error = manual(&disk, &small(), &clock).err().unwrap().to_string();
    assert!(error.contains(&path.display().to_string()), "{error}");
}

#[test]
fn a_log_without_any_segment_goes_on_behind_what_its_last_opening_found() {
    let (disk, clock, path) = written_and_killed();
    let zeros = vec![0; disk.content(&path).len()];
    disk.set_content(&path, zeros);
    for name in disk::Disk::list(&disk, Path::new(DIR)).unwrap() {
        let other = Path::new(DIR).join(&name);
        if segment::sequence_of(&name).is_some() && other != path {
            disk::Disk::remove(&disk, &other).unwrap();
        }
    }
    let (log, recovery) = manual(&disk, &small(), &clock).unwrap();
    assert_eq!(recovery.damaged[0].offsets, Offset(0)..Offset(12));
    assert_eq!(
        log.append(&[message("a/b", b"x")], &[]).unwrap().first,
        Offset(12),
        "no offset is used twice"
    );
}

#[test]
fn metadata_that_the_disk_does_not_give_is_made_again_from_the_segments_if_there_are_any() {
    let (disk, clock, path) = written();
    let metadata = path.with_file_name("STREAM");
    let lost = disk.fork();
    disk.break_reads(&metadata, 0..usize::MAX, u32::MAX);
    let (log, recovery) = manual(&disk, &small(), &clock).unwrap();
    assert!(recovery.metadata_rebuilt && !recovery.created);
    assert_eq!(all(&log).len(), 24);
    assert_eq!(log.append(&[message("a/b", b"x")], &[]).unwrap().first, Offset(24));
    // Without segments it would become another log.
    disk::Disk::remove(&lost, &path).unwrap();
    lost.break_reads(&metadata, 0..usize::MAX, u32::MAX);
    let error = manual(&lost, &small(), &clock).err().unwrap().to_string();
    assert!(error.contains(&metadata.display().to_string()), "{error}");
}

#[test]
fn what_one_reader_or_the_start_has_given_up_no_other_reader_waits_for() {
    let (disk, clock, path) = written_large();
    let (log, _) = manual(&disk, &small(), &clock).unwrap();
    disk.break_reads(&path, 20_500..21_000, u32::MAX);
    let read = all(&log);
    let failed = disk.failed_reads();
    assert!(!lost(&read).is_empty() && failed > u64::from(unreadable::READ_TRIES));
    for from in [0, 3, 11] {
        assert_eq!(block_on(read_all(&*log, from)), read[from as usize..]);
    }
    let mut look = log.peek(Offset(0));
    while block_on(look.try_next()).unwrap().is_some() {}
    block_on(log.seek_time(u64::MAX)).unwrap();
    assert_eq!(disk.failed_reads(), failed, "the disk was not asked again");
    // A start asks once for all its looks at the file, and its readers do not ask again.
    let (disk, clock, path) = written_large();
    disk.break_reads(&path, 20_500..21_000, u32::MAX);
    let (log, recovery) = manual(&disk, &small(), &clock).unwrap();
    let failed = disk.failed_reads();
    assert!(!recovery.unread.is_empty() && failed <= 2 * u64::from(unreadable::READ_TRIES + 1), "{failed}");
    assert_eq!((all(&log), disk.failed_reads()), (read, failed));
}

#[test]
fn a_segment_that_somebody_removes_is_a_gap_told_once_by_the_running_host_and_after_a_restart() {
    let (disk, clock, segments) = written_segments();
    for at in 0..segments.len() - 1 {
        let disk = disk.fork();
        let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
        let open = || metrics::with_local_recorder(&recorder, || manual(&disk, &small(), &clock).unwrap().0);
        let counted = || {
            let rendered = recorder.handle().render();
            let lines =
                rendered.lines().filter(|line| line.starts_with("headworks_stream_gap_messages_total{"));
            lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<usize>().ok()).sum::<usize>()
        };
        let log = open();
        disk.remove(&path_of(&segments[at])).unwrap();
        let gone = offsets(&segments, at);
        let mut look = log.peek(Offset(gone[0]));
        let read = block_on(look.try_next()).unwrap();
        assert!(matches!(read, Some(crate::stream::Read::Gap { .. })), "a look does not wait: {read:?}");
        assert_eq!(counted(), 0);
        for _ in 0..2 {
            let read = all(&log);
            assert_eq!((read.len(), lost(&read), log.read_fault()), (12, gone.clone(), None));
            assert_eq!(counted(), gone.len(), "segment {at}");
        }
        drop(log);
        disk.restart_process();
        let log = open();
        let read = all(&log);
        assert_eq!((read.len(), lost(&read)), (12, gone), "segment {at}");
    }
}

#[test]
fn a_reader_waits_for_a_folder_that_is_away_and_misses_nothing_of_it() {
    let parent = tempfile::tempdir().unwrap();
    let [folder, away] = ["telemetry", "away"].map(|name| parent.path().join(name));
    let config = Config { segment_bytes: ByteSize(12 << 10), ..small() };
    let (log, _) = Log::open(Arc::new(RealDisk::default()), &folder, "telemetry", &config).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        for offset in 0..12 {
            let appended = log.append(&[message("a/b", &payload(offset, 3_000))], &[]).unwrap();
            log.durable().wait_for(|durable| *durable >= appended.ticket).await.unwrap();
        }
        std::fs::rename(&folder, &away).unwrap();
        let mut cursor = log.cursor(Offset(0));
        let mut tries = 0;
        let mut next = std::pin::pin!(cursor.next());
        let read = std::future::poll_fn(|context| {
            let polled = next.as_mut().poll(context);
            tries += 1;
            if tries == 4 * unreadable::READ_TRIES {
                let told = log.read_fault().expect("it is told");
                assert!(told.starts_with("offset 0 in "), "{told}");
                std::fs::rename(&away, &folder).unwrap();
            }
            polled
        });
        let read = read.await;
        assert!(matches!(read, Ok(crate::stream::Read::Batch(_))), "{read:?}");
        assert!(tries >= 4 * unreadable::READ_TRIES);
        assert_eq!(lost(&read_all(&*log, 0).await), Vec::<u64>::new());
    });
}
