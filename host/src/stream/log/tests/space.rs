//! A full disk and retention: devices wait, nothing is lost, it goes on by itself.

use super::*;
use crate::stream::conformance::durable;
use crate::stream::{Lack, OnLag, Read};

/// Appends until there is no room; how many messages were made durable.
async fn fill(log: &Log) -> u64 {
    loop {
        match log.append(&[message("a/b", &payload(0, 3_000))], &[]) {
            Ok(appended) => {
                let mut done = log.durable();
                let done = done.wait_for(|done| *done >= appended.ticket);
                if tokio::time::timeout(Duration::from_millis(300), done).await.is_err() {
                    break;
                }
            }
            Err(AppendError::NoSpace) => break,
            Err(other) => panic!("{other}"),
        }
    }
    log.bounds().end.0
}

#[tokio::test]
async fn a_full_disk_withholds_acks_and_recovers_by_itself() {
    let disk = SimDisk::new(3);
    disk.set_bytes_max(100 << 10);
    let (log, _) = Log::open(Arc::new(disk.clone()), Path::new(DIR), "t", &small()).unwrap();
    let full_at = fill(&log).await;
    assert!(full_at > 10);
    assert_eq!(log.append(&[message("a/b", b"x")], &[]), Err(AppendError::NoSpace));
    assert_eq!(read_all(&*log, 0).await.len() as u64, full_at, "reading goes on");

    disk.set_bytes_max(1 << 20);
    log.writable().await;
    let appended = log.append(&[message("a/b", b"x")], &[]).unwrap();
    durable(&*log, appended.ticket).await;
    assert!(log.bounds().end.0 > full_at);
    assert!(read_all(&*log, 0).await.iter().all(|(_, payload)| payload.is_some()));
}

#[tokio::test]
async fn a_blocking_reader_keeps_its_messages_until_it_moves_on() {
    let disk = SimDisk::new(3);
    let mut config = small();
    config.retention.max_bytes = ByteSize(64 << 10);
    let (log, _) = Log::open(Arc::new(disk), Path::new(DIR), "t", &config).unwrap();
    let reader = log.attach("warehouse", Offset(0), OnLag::Block);
    let full_at = fill(&log).await;
    assert_eq!(log.bounds().start, Offset(0));
    reader.advance(Offset(full_at));
    log.writable().await;
    let appended = log.append(&[message("a/b", b"x")], &[]).unwrap();
    durable(&*log, appended.ticket).await;
    assert!(log.bounds().start > Offset(0));
}

/// Why no sink keeps its position in the stream that it reads: see `decisions/journaled-sinks.md`.
#[tokio::test]
async fn a_log_that_waits_for_a_reader_takes_no_change_of_its_state_before_the_reader_moves_on() {
    let mut config = small();
    config.retention.max_bytes = ByteSize(64 << 10);
    let (log, _) = Log::open(Arc::new(SimDisk::new(3)), Path::new(DIR), "t", &config).unwrap();
    let reader = log.attach("warehouse", Offset(0), OnLag::Block);
    let full_at = fill(&log).await;
    let position = [StateChange { key: b"position", value: Some(b"7") }];
    assert_eq!(log.append(&[], &position), Err(AppendError::NoSpace));
    reader.advance(Offset(full_at));
    log.writable().await;
    log.append(&[], &position).unwrap();
}

#[tokio::test]
async fn a_log_that_a_reader_keeps_full_opens_again_and_drains() {
    let disk = SimDisk::new(3);
    let mut config = small();
    config.retention.max_bytes = ByteSize(64 << 10);
    let open = || {
        disk.restart_process();
        Log::open(Arc::new(disk.clone()), Path::new(DIR), "t", &config).unwrap().0
    };
    let log = open();
    let reader = log.attach("warehouse", Offset(0), OnLag::Block);
    let full_at = fill(&log).await;
    drop((reader, log));
    for _ in 0..3 {
        let log = open();
        assert_eq!(log.bounds(), Offset(0)..Offset(full_at));
    }
    let log = open();
    let reader = log.attach("warehouse", Offset(0), OnLag::Block);
    assert_eq!(read_all(&*log, 0).await.len() as u64, full_at);
    reader.advance(Offset(full_at));
    // Not acknowledged before there is room; then it is.
    let appended = log.append(&[message("a/b", b"x")], &[]).unwrap();
    durable(&*log, appended.ticket).await;
    assert!(log.bounds().start > Offset(0));
}

#[test]
fn the_next_prepared_file_is_another_than_the_one_that_is_taken() {
    let (disk, clock) = (SimDisk::new(3), new_clock());
    let (log, _) = manual(&disk, &small(), &clock).unwrap();
    log.inner.prepare();
    let (_, _, taken) = log.inner.new_file(1, 1).unwrap();
    log.inner.prepare();
    let (_, _, next) = log.inner.new_file(1, 1).unwrap();
    assert_ne!(taken, next);
    log.inner.prepare();
    let temporary = || {
        let names = disk.list(Path::new(DIR)).unwrap();
        names.iter().filter(|name| name.ends_with(".tmp")).count()
    };
    assert_eq!(temporary(), 3);
    let (file, len, _) = log.inner.new_file(1 << 20, 1 << 20).unwrap();
    assert_eq!((file.len().unwrap(), len), (1 << 20, 1 << 20), "one that is too small grows");
    assert_eq!(temporary(), 3);
    drop(log);
    disk.restart_process();
    drop(manual(&disk, &small(), &clock).unwrap());
    assert_eq!(temporary(), 0);
}

#[test]
fn another_process_reads_on_while_the_log_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let (log, _) = Log::open(Arc::new(RealDisk::default()), folder.path(), "t", &small()).unwrap();
    let written = 300;
    let writer = std::thread::spawn(move || {
        for n in 0..written {
            let appended = log.append(&[message("a/b", &payload(n, n as usize % 3_000))], &[]).unwrap();
            block_on(durable(&*log, appended.ticket));
        }
    });
    let changes = changes_in(folder.path());
    let mut reader = ReadOnly::open(folder.path(), Offset(0));
    let mut seen = 0;
    while seen < written {
        match reader.read().unwrap() {
            Some(Read::Batch(batch)) => {
                for message in batch.messages() {
                    assert_eq!(message.payload(), payload(seen, seen as usize % 3_000));
                    seen += 1;
                }
            }
            Some(gap) => panic!("{gap:?}"),
            None => changes.next(&format!("only {seen} were proven")),
        }
    }
    writer.join().unwrap();
    assert_eq!(ReadOnly::open(folder.path(), Offset(0)).bounds().unwrap(), Offset(0)..Offset(written));
}

/// Tells of every change to a folder's files.
struct Changes {
    events: std::sync::mpsc::Receiver<()>,
    _watcher: notify::RecommendedWatcher,
}

fn changes_in(folder: &Path) -> Changes {
    use notify::Watcher;
    let (tell, events) = std::sync::mpsc::channel();
    let on_event = move |event: notify::Result<notify::Event>| {
        if !event.unwrap().kind.is_access() {
            let _ = tell.send(());
        }
    };
    let mut watcher = notify::recommended_watcher(on_event).unwrap();
    watcher.watch(folder, notify::RecursiveMode::NonRecursive).unwrap();
    Changes { events, _watcher: watcher }
}

impl Changes {
    /// Waits for one that was not told of.
    fn next(&self, otherwise: &str) {
        self.events.recv_timeout(Duration::from_secs(60)).expect(otherwise);
        while self.events.try_recv().is_ok() {}
    }
}

/// Counts the bytes that are read from the disk below.
#[derive(Clone)]
struct Counting(RealDisk, Arc<AtomicU64>);

struct CountingFile(Arc<dyn disk::File>, Arc<AtomicU64>);

impl Disk for Counting {
    fn open(&self, path: &Path, create: disk::Create) -> io::Result<Arc<dyn disk::File>> {
        Ok(Arc::new(CountingFile(self.0.open(path, create)?, self.1.clone())))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.0.remove(path)
    }
    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.0.list(dir)
    }
    fn create_dir(&self, dir: &Path) -> io::Result<bool> {
        self.0.create_dir(dir)
    }
    fn sync_dir(&self, dir: &Path, site: SyncSite) -> io::Result<()> {
        self.0.sync_dir(dir, site)
    }
    fn lock(&self, path: &Path) -> io::Result<Box<dyn Send + Sync>> {
        self.0.lock(path)
    }
}

impl disk::File for CountingFile {
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<usize> {
        let read = self.0.read_at(buf, at)?;
        self.1.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }
    fn write_at(&self, parts: &[&[u8]], at: u64) -> io::Result<()> {
        self.0.write_at(parts, at)
    }
    fn sync(&self, site: SyncSite) -> io::Result<()> {
        self.0.sync(site)
    }
    fn preallocate(&self, len: u64) -> io::Result<()> {
        self.0.preallocate(len)
    }
    fn truncate(&self, len: u64) -> io::Result<()> {
        self.0.truncate(len)
    }
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
}

#[test]
fn a_reader_that_is_at_the_end_reads_a_few_bytes_until_there_is_more() {
    let folder = tempfile::tempdir().unwrap();
    let config = Config { segment_bytes: ByteSize(4 << 20), ..small() };
    let (log, _) = Log::open(Arc::new(RealDisk::default()), folder.path(), "t", &config).unwrap();
    let changes = changes_in(folder.path());
    let read = Arc::new(AtomicU64::new(0));
    let mut reader =
        ReadOnly::open_on(Box::new(Counting(RealDisk::default(), read.clone())), folder.path(), Offset(0));
    for n in 0..3_000 {
        // Now and then a segment is full.
        let appended = log.append(&[message("a/b", &payload(n, 3_000))], &[]).unwrap();
        block_on(durable(&*log, appended.ticket));
        if n % 1_000 != 0 {
            continue;
        }
        while reader.position() <= Offset(n) {
            // A mark proves the last message, a moment later.
            if reader.read().unwrap().is_none() {
                changes.next("a mark");
            }
        }
        reader.read().unwrap();
        read.store(0, Ordering::Relaxed);
        for _ in 0..10 {
            assert!(reader.read().unwrap().is_none());
        }
        let read = read.load(Ordering::Relaxed);
        assert!(read < 10 << 10, "{read} bytes for ten looks");
    }
}

#[test]
fn a_place_among_large_frames_costs_its_frame_and_the_headers_on_the_way() {
    let folder = tempfile::tempdir().unwrap();
    let config = Config { segment_bytes: ByteSize(8 << 20), ..small() };
    let read = Arc::new(AtomicU64::new(0));
    let disk = Arc::new(Counting(RealDisk::default(), read.clone()));
    let (log, _) = Log::open(disk, folder.path(), "t", &config).unwrap();
    for n in 0..200 {
        let appended = log.append(&[message("a/b", &payload(n, 16_000))], &[]).unwrap();
        block_on(durable(&*log, appended.ticket));
    }
    for at in [150, 20, 101] {
        read.store(0, Ordering::Relaxed);
        let Read::Batch(batch) = block_on(log.cursor(Offset(at)).next()).unwrap() else { panic!("a gap") };
        assert_eq!(batch.base, Offset(at));
        let read = read.load(Ordering::Relaxed);
        assert!(read < 16_000 + at * 1_000 + 4_000, "{read} bytes for message {at}");
    }
}

#[tokio::test]
async fn a_detached_reader_gets_a_gap_of_exact_size() {
    let disk = SimDisk::new(3);
    let mut config = small();
    config.retention.max_bytes = ByteSize(64 << 10);
    let (log, _) = Log::open(Arc::new(disk), Path::new(DIR), "t", &config).unwrap();
    log.attach("alerts", Offset(0), OnLag::Detach);
    let mut cursor = log.cursor(Offset(0));
    for n in 0..40 {
        let appended = log.append(&[message("a/b", &payload(n, 3_000))], &[]).unwrap();
        durable(&*log, appended.ticket).await;
    }
    let start = log.bounds().start;
    let Read::Gap { from, to, cause } = cursor.next().await.unwrap() else { panic!("no gap") };
    assert_eq!((from, to, cause), (Offset(0), start, crate::stream::GapCause::Trimmed));
    assert!(matches!(cursor.next().await.unwrap(), Read::Batch(batch) if batch.base == start));
}

#[test]
fn a_log_opens_on_a_full_disk_with_its_reserve() {
    let (disk, clock) = (SimDisk::new(3), new_clock());
    let config = Config { reserve_bytes: ByteSize(32 << 10), ..small() };
    drop(manual(&disk, &config, &clock).unwrap());
    disk.restart_process();
    disk.set_bytes_max(disk.bytes());
    let (log, _) = manual(&disk, &config, &clock).unwrap();
    log.append(&[message("a/b", b"x")], &[]).unwrap();
    commit(&log).unwrap();
}

#[tokio::test]
async fn a_log_opens_where_there_is_no_room_at_all_again_and_again_and_loses_nothing() {
    for power in [false, true] {
        let disk = SimDisk::new(7);
        let open = || Log::open(Arc::new(disk.clone()), Path::new(DIR), "t", &small()).unwrap().0;
        let (log, _) = manual(&disk, &small(), &new_clock()).unwrap();
        for n in 0..10 {
            log.append(&[message("a/b", &payload(n, 900))], &[StateChange { key: b"k", value: Some(b"v") }])
                .unwrap();
            commit(&log).unwrap();
        }
        // The last frame is durable, and nothing proves it.
        drop(log);
        disk.restart_process();
        disk.set_bytes_max(disk.bytes());
        for _ in 0..3 {
            let log = open();
            assert_eq!(log.bounds(), Offset(0)..Offset(10));
            assert_eq!(log.state(b"k").len(), 1);
            assert!(!log.has_room());
            assert_eq!(log.append(&[message("a/b", b"x")], &[]), Err(AppendError::NoSpace));
            assert!(read_all(&*log, 0).await.iter().all(|(_, payload)| payload.is_some()));
            drop(log);
            if power { disk.reboot() } else { disk.restart_process() }
        }
        let log = open();
        disk.set_bytes_max(1 << 20);
        log.writable().await;
        let appended = log.append(&[message("a/b", b"x")], &[]).unwrap();
        durable(&*log, appended.ticket).await;
        drop(log);
        disk.restart_process();
        let log = open();
        assert_eq!(log.bounds(), Offset(0)..Offset(11));
        assert!(read_all(&*log, 0).await.iter().all(|(_, payload)| payload.is_some()));
        assert_eq!(log.state(b"k").len(), 1);
    }
}

#[tokio::test]
#[expect(clippy::await_holding_lock, reason = "the disk hangs for as long as it is held")]
async fn a_disk_that_does_not_answer_is_told_with_what_waits_until_it_does() {
    let disk = SimDisk::new(3);
    let (log, _) = Log::open(Arc::new(disk.clone()), Path::new(DIR), "t", &small()).unwrap();
    let appended = log.append(&[message("a/b", b"x")], &[]).unwrap();
    durable(&*log, appended.ticket).await;
    let gate = Arc::new(Mutex::new(()));
    let hung = gate.lock().unwrap();
    let passes = Arc::clone(&gate);
    disk.before_each(move || drop(lock(&passes)));
    log.append(&[message("a/b", b"x"), message("a/b", b"y")], &[]).unwrap();
    let stall = loop {
        match log.stall() {
            Some(stall) => break stall,
            None => tokio::task::yield_now().await,
        }
    };
    assert_eq!(stall.messages, 2);
    let last = log.append(&[message("a/b", b"z")], &[]).unwrap();
    assert_eq!(log.stall().map(|stall| (stall.since, stall.messages)), Some((stall.since, 3)));
    drop(hung);
    durable(&*log, last.ticket).await;
    while log.stall().is_some() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_log_whose_folder_is_moved_lacks_nothing_while_it_takes_messages() {
    let parent = tempfile::tempdir().unwrap();
    let [folder, away] = ["log", "away"].map(|name| parent.path().join(name));
    let config = Config { reserve_bytes: ByteSize(32 << 10), ..small() };
    let (log, _) = Log::open(Arc::new(RealDisk::default()), &folder, "t", &config).unwrap();
    std::fs::rename(&folder, &away).unwrap();
    log.inner.keep(false);
    let appended = log.append(&[message("a/b", b"x")], &[]).unwrap();
    durable(&*log, appended.ticket).await;
    assert_eq!((log.lack(), log.has_room()), (None, true));
}

#[test]
fn a_reserve_that_is_empty_or_short_is_filled_again_and_no_crash_leaves_one() {
    let clock = new_clock();
    let config = Config { reserve_bytes: ByteSize(32 << 10), ..small() };
    let path = Path::new(DIR).join("reserve");
    for left in [0, 5_000] {
        let disk = SimDisk::new(3);
        let (log, _) = manual(&disk, &config, &clock).unwrap();
        let len = || disk.open(&path, disk::Create::ReadOnly).unwrap().len().unwrap();
        disk.open(&path, disk::Create::Existing).unwrap().truncate(left).unwrap();
        log.inner.keep(false);
        assert_eq!(len(), 32 << 10);
        // As full as it may be: the short one stays, and that there is no whole one is told.
        disk.open(&path, disk::Create::Existing).unwrap().truncate(left).unwrap();
        disk.set_bytes_max(disk.bytes());
        log.inner.keep(false);
        assert_eq!((len(), log.has_room()), (left, false));
        disk.set_bytes_max(u64::MAX);
        log.inner.keep(false);
        assert_eq!((len(), log.has_room()), (32 << 10, true));
    }
    for operations in 0..60 {
        let disk = SimDisk::new(operations);
        disk.crash_in(operations);
        drop(manual(&disk, &config, &clock));
        disk.restart_process();
        let reserve = disk.open(&path, disk::Create::ReadOnly).and_then(|file| file.len());
        assert!(reserve.is_err() || reserve.is_ok_and(|len| len == 32 << 10), "after {operations}");
    }
}

#[test]
fn age_counts_only_once_the_clock_is_set_and_never_after_a_jump_by_decades() {
    use super::clock::tests::Hands;
    let (disk, hands) = (SimDisk::new(3), Hands::at(5));
    let (log, _) = manual_at(&disk, &small(), hands.source()).unwrap();
    let fill = || {
        for n in 0..20 {
            log.append(&[message("a/b", &payload(n, 3_000))], &[]).unwrap();
            commit(&log).unwrap();
        }
    };
    let hour = 3_600_000_000;
    fill();
    hands.pass(10 * hour);
    log.inner.keep(false);
    assert_eq!(log.bounds().start, Offset(0), "the clock was never set");
    hands.jump(SET_US as i64);
    fill();
    log.inner.keep(false);
    assert_eq!(log.bounds().start, Offset(0), "as young as the first with a clock");
    hands.jump(50 * 365 * 24 * hour as i64);
    log.inner.keep(false);
    hands.pass(hour / 2);
    log.inner.keep(false);
    assert_eq!(log.bounds().start, Offset(0), "a jump by decades");
    hands.pass(hour);
    log.inner.keep(false);
    assert!(log.bounds().start > Offset(0));
}

#[test]
fn a_full_state_map_refuses_only_what_adds_to_it() {
    let (disk, clock) = (SimDisk::new(3), new_clock());
    let config = Config { commit_buffer_bytes_max: ByteSize(256 << 20), ..small() };
    let (log, _) = manual(&disk, &config, &clock).unwrap();
    let value = vec![7; crate::stream::STATE_VALUE_BYTES_MAX];
    let set = |key: &u32, value| {
        let key = &key.to_be_bytes()[..];
        log.append(&[message("a/b", b"x")], &[StateChange { key, value }]).map(drop)
    };
    let full = Err(AppendError::NoSpace);
    let fit = (0..).take_while(|key| set(key, Some(&value)).is_ok()).count() as u32;
    assert_eq!(fit as usize, state::STATE_BYTES_MAX / (value.len() + 5));
    assert!(log.state_room() < value.len());
    assert_eq!(set(&fit, Some(&value)), full);

    log.append(&[message("a/b", b"x")], &[]).unwrap();
    assert_eq!(set(&0, Some(&value)), Ok(()), "in place of as much");
    let [first, new] = [0, fit].map(u32::to_be_bytes);
    let moved = [(&first, None), (&new, Some(&value[..]))].map(|(key, value)| StateChange { key, value });
    log.append(&[], &moved).unwrap();
    assert_eq!(set(&0, Some(&value)), full);
    assert_eq!(set(&1, None), Ok(()));
    assert_eq!(set(&0, Some(&value)), Ok(()));
}

#[test]
fn a_segment_that_cannot_be_removed_counts_and_goes_before_those_behind_it() {
    let (disk, clock) = (SimDisk::new(3), new_clock());
    let config = Config { retention: Retention { max_age: None, max_bytes: ByteSize(64 << 10) }, ..small() };
    let (log, _) = manual(&disk, &config, &clock).unwrap();
    let append = || {
        log.append(&[message("a/b", &payload(0, 3_000))], &[]).unwrap();
        commit(&log)
    };
    disk.fail_removals(true);
    while append().is_ok() {}
    assert_eq!(log.bounds().start, Offset(0));
    assert!(log.inner.sizes().1 <= 64 << 10, "it counts");
    log.inner.keep(false);
    assert_eq!(log.bounds().start, Offset(0), "none behind it goes");
    commit(&log).unwrap_err();
    assert_eq!(log.lack(), Some(Lack::Removal), "no sink lags");
    disk.fail_removals(false);
    commit(&log).unwrap();
    assert_eq!(log.lack(), None);
    let start = log.bounds().start;
    assert!(start > Offset(0));
    drop(log);
    disk.restart_process();
    let (log, recovery) = manual(&disk, &config, &clock).unwrap();
    assert!(log.bounds().start >= start);
    assert_eq!(recovery.damaged, []);
}

#[test]
fn what_housekeeping_cannot_do_is_said_for_as_long_as_it_lasts() {
    let (disk, clock) = (SimDisk::new(3), new_clock());
    let retention = Retention { max_age: None, max_bytes: ByteSize(64 << 10) };
    let config = Config { retention, ..small() };
    let (log, _) = manual(&disk, &config, &clock).unwrap();
    let append = || {
        log.append(&[message("a/b", &payload(0, 3_000))], &[]).unwrap();
        commit(&log)
    };
    let failures = &log.inner.failures;
    disk.fail_removals(true);
    while append().is_ok() {}
    commit(&log).unwrap_err();
    assert!(matches!(&failures.unsaid()[..], [(kind, 1..)] if kind.contains("cannot remove an old segment")));
    failures.pass_time();
    log.inner.keep(false);
    assert_eq!(failures.unsaid()[0].1, 0, "said again");
    // Once it has worked for as long, the next failure is said at once.
    disk.fail_removals(false);
    commit(&log).unwrap();
    failures.pass_time();
    log.inner.keep(false);
    assert_eq!(failures.unsaid(), []);
    disk.fail_removals(true);
    while append().is_ok() {}
    commit(&log).unwrap_err();
    lock(&log.inner.wanted).stop = true;
    retain::run(&log.inner);
    assert_eq!(failures.unsaid()[0].1, 0, "said at the end");
}

#[test]
fn a_disk_that_does_not_give_or_take_back_room_is_said() {
    let (disk, clock) = (SimDisk::new(3), new_clock());
    let config = Config { reserve_bytes: ByteSize(32 << 10), ..small() };
    let (log, _) = manual(&disk, &config, &clock).unwrap();
    while log.inner.sizes().0 < 2 {
        log.append(&[message("a/b", &payload(0, 3_000))], &[]).unwrap();
        commit(&log).unwrap();
    }
    // EIO.
    disk.fail_opens(Some(5));
    log.inner.keep(false);
    let mut kinds: Vec<_> = log.inner.failures.unsaid().into_iter().map(|(kind, _)| kind).collect();
    kinds.sort();
    assert_eq!(
        kinds,
        [
            "stream telemetry: cannot give back the unused room of a full segment, will try again",
            "stream telemetry: cannot make the reserve for a full disk, will try again"
        ]
    );
    disk.fail_opens(None);
    log.inner.keep(false);
    let back = read(&log.inner.back);
    assert!(back.segments.iter().rev().skip(1).all(|segment| segment.file_len == segment.limit));
}

#[test]
fn a_reader_that_could_not_be_written_down_is_so_once_there_is_room() {
    let (disk, clock) = (SimDisk::new(3), new_clock());
    let (log, _) = manual(&disk, &small(), &clock).unwrap();
    log.inner.set_lack(Some(Lack::Disk));
    log.attach("warehouse", Offset(0), OnLag::Block);
    log.inner.set_lack(None);
    log.inner.keep(false);
    commit(&log).unwrap();
    drop(log);
    disk.restart_process();
    let (log, _) = manual(&disk, &small(), &clock).unwrap();
    assert_eq!(log.remembered(), [("warehouse".to_owned(), Offset(0))]);
}

/// Appends until a segment more would take one that `reader` needs.
async fn until_asked(log: &Log, asked: &mut tokio::sync::watch::Receiver<Offset>) -> Offset {
    loop {
        let appended = log.append(&[message("a/b", &payload(0, 3_000))], &[]).unwrap();
        durable(log, appended.ticket).await;
        let upto = *asked.borrow_and_update();
        if upto > Offset(0) {
            return upto;
        }
    }
}

#[tokio::test]
async fn a_reader_that_is_asked_keeps_its_messages_until_it_has_saved_them_and_writers_need_not_wait() {
    let disk = SimDisk::new(3);
    let mut config = small();
    config.retention.max_bytes = ByteSize(64 << 10);
    let (log, _) = Log::open(Arc::new(disk), Path::new(DIR), "t", &config).unwrap();
    let reader = log.attach("copies", Offset(0), OnLag::Ask);
    let mut asked = reader.asked();
    let upto = until_asked(&log, &mut asked).await;
    assert_eq!(log.bounds().start, Offset(0), "nothing has gone yet");
    reader.advance(upto);
    while log.bounds().start < upto {
        let appended = log.append(&[message("a/b", &payload(0, 3_000))], &[]).unwrap();
        durable(&*log, appended.ticket).await;
        let upto = *asked.borrow_and_update();
        assert!(log.bounds().start <= upto, "more went than was asked for");
        reader.advance(upto);
    }
}

#[tokio::test]
async fn a_hold_keeps_messages_for_as_long_as_it_moves_on() {
    let disk = SimDisk::new(3);
    let mut config = small();
    config.retention.max_bytes = ByteSize(64 << 10);
    let (log, _) = Log::open(Arc::new(disk), Path::new(DIR), "t", &config).unwrap();
    let hold = log.attach("redrive", Offset(0), OnLag::Hold);
    let upto = until_asked(&log, &mut hold.asked()).await;
    assert_eq!(log.bounds().start, Offset(0), "nothing has gone yet");
    hold.advance(upto);
    while log.bounds().start < upto {
        let appended = log.append(&[message("a/b", &payload(0, 3_000))], &[]).unwrap();
        durable(&*log, appended.ticket).await;
    }
}

#[test]
fn a_hold_that_moves_on_holds_however_long_its_first_message_is_needed() {
    let mut config = small();
    config.retention.max_bytes = ByteSize(64 << 10);
    let (log, _) = manual(&SimDisk::new(3), &config, &new_clock()).unwrap();
    let hold = log.attach("redrive", Offset(0), OnLag::Hold);
    let mut count = 0;
    while commit(&log).is_ok() {
        log.append(&[message("a/b", &payload(count, 3_000))], &[]).unwrap();
        count += 1;
    }
    for _ in 0..5 {
        hold.moves_on();
        assert!(commit(&log).is_err(), "there is no room");
        let marks = &mut write(&log.inner.back).marks;
        marks.get_mut("redrive").unwrap().age(Duration::from_secs(30));
    }
    commit(&log).unwrap();
    assert!(log.bounds().start > Offset(0), "one that stands is not waited for");
}

#[test]
fn a_hold_that_a_kill_left_holds_nothing() {
    let (disk, clock) = (SimDisk::new(3), new_clock());
    let (log, _) = manual(&disk, &small(), &clock).unwrap();
    let hold = log.attach("redrive", Offset(0), OnLag::Hold);
    for n in 0..20 {
        log.append(&[message("a/b", &payload(n, 3_000))], &[]).unwrap();
        commit(&log).unwrap();
        log.inner.keep(false);
    }
    drop((hold, log));
    disk.restart_process();
    let (log, _) = manual(&disk, &small(), &clock).unwrap();
    assert!(read(&log.inner.back).marks.is_empty());
}

#[tokio::test]
async fn retention_by_bytes_does_not_wait_for_ever_for_a_reader_that_was_asked() {
    let disk = SimDisk::new(3);
    let mut config = small();
    config.retention.max_bytes = ByteSize(64 << 10);
    let (log, _) = Log::open(Arc::new(disk), Path::new(DIR), "t", &config).unwrap();
    let reader = log.attach("copies", Offset(0), OnLag::Ask);
    let upto = until_asked(&log, &mut reader.asked()).await;
    while log.bounds().start < upto {
        match log.append(&[message("a/b", &payload(0, 3_000))], &[]) {
            Ok(appended) => durable(&*log, appended.ticket).await,
            Err(AppendError::NoSpace) => log.writable().await,
            Err(other) => panic!("{other}"),
        }
    }
}

#[test]
fn retention_by_age_waits_for_a_reader_that_was_asked_also_after_a_restart() {
    let (disk, clock) = (SimDisk::new(3), new_clock());
    let (log, _) = manual(&disk, &small(), &clock).unwrap();
    let reader = log.attach("copies", Offset(0), OnLag::Ask);
    for n in 0..20 {
        log.append(&[message("a/b", &payload(n, 3_000))], &[]).unwrap();
        commit(&log).unwrap();
    }
    let asked = reader.asked();
    clock.fetch_add(2 * 3_600_000_000, Ordering::Relaxed);
    log.inner.keep(false);
    let upto = *asked.borrow();
    assert!(upto > Offset(0));
    assert_eq!(log.bounds().start, Offset(0));
    drop((reader, log));
    disk.restart_process();
    let (log, _) = manual(&disk, &small(), &clock).unwrap();
    log.inner.keep(false);
    assert_eq!(log.bounds().start, Offset(0), "it cannot be asked yet");
    log.attach("copies", upto, OnLag::Ask);
    log.inner.keep(false);
    assert_eq!(log.bounds().start, upto);
}

#[test]
fn what_is_past_max_age_goes_also_from_a_stream_that_nobody_writes_to() {
    let (disk, clock) = (SimDisk::new(3), new_clock());
    let (log, _) = manual(&disk, &small(), &clock).unwrap();
    log.append(&[message("a/b", b"a name")], &[]).unwrap();
    commit(&log).unwrap();
    let minute = 60_000_000;
    let mut minutes = 0;
    while log.bounds().start == Offset(0) {
        minutes += 1;
        clock.fetch_add(minute, Ordering::Relaxed);
        log.inner.keep(false);
        log.inner.roll_if_asked(&mut lock(&log.inner.writer)).unwrap();
        assert!(minutes <= 60 + 60 / 8 + 2, "max_age and an eighth have passed");
    }
    assert!(minutes > 60, "{minutes}");
    assert_eq!(log.bounds(), Offset(1)..Offset(1));
    for _ in 0..20 {
        clock.fetch_add(60 * minute, Ordering::Relaxed);
        log.inner.keep(false);
        log.inner.roll_if_asked(&mut lock(&log.inner.writer)).unwrap();
    }
    assert_eq!(log.inner.sizes().0, 1, "an empty segment needs no other");
}

#[test]
fn a_slow_stream_ends_its_segments_by_age_and_readers_pass_over_what_is_too_old() {
    let (disk, clock) = (SimDisk::new(3), new_clock());
    let (log, _) = manual(&disk, &small(), &clock).unwrap();
    let minute = 60_000_000;
    for n in 0..300 {
        log.append(&[message("a/b", &payload(n, 10))], &[]).unwrap();
        commit(&log).unwrap();
        clock.fetch_add(minute, Ordering::Relaxed);
        log.inner.keep(false);
        log.inner.roll_if_asked(&mut lock(&log.inner.writer)).unwrap();
        let start = log.bounds().start.0;
        assert!(start + 60 + 9 >= n, "after message {n} the oldest is {start}");
    }
    assert!(log.inner.sizes().0 <= 11);
    let now = clock.load(Ordering::Relaxed);
    assert!(log.is_past_age(now - 61 * minute) && !log.is_past_age(now - 59 * minute));
    assert!(!log.is_past_age(5), "of a time without a clock");
}

#[test]
fn a_clock_that_jumps_makes_no_message_older_also_after_a_restart() {
    use super::clock::tests::{Hands, NOW};
    let (disk, hands) = (SimDisk::new(3), Hands::at(NOW));
    let (second, day) = (1_000_000, 24 * 3_600_000_000_i64);
    let (log, _) = manual_at(&disk, &small(), hands.source()).unwrap();
    let pass = |log: &Log, seconds: u64| {
        for _ in 0..seconds {
            hands.pass(second);
            log.append(&[message("a/b", &payload(0, 100))], &[]).unwrap();
            commit(log).unwrap();
            log.inner.keep(false);
            log.inner.roll_if_asked(&mut lock(&log.inner.writer)).unwrap();
        }
    };
    // A wrong answer of a time server, then one that is believed, then the right time.
    pass(&log, 60);
    for (by, seconds) in [(60 * day, 5), (-60 * day, 30), (60 * day, 90), (-60 * day, 30)] {
        hands.jump(by);
        pass(&log, seconds);
    }
    assert_eq!(log.bounds().start, Offset(0));
    assert!(!log.is_past_age(NOW + second), "of the first message");
    drop(log);
    disk.restart_process();
    let (log, _) = manual_at(&disk, &small(), hands.source()).unwrap();
    pass(&log, 3_300);
    assert_eq!(log.bounds().start, Offset(0));
    assert!(!log.is_past_age(NOW + second), "of the first message");
    pass(&log, 600);
    assert!(log.bounds().start > Offset(0), "it ages by what passes");
    assert!(log.is_past_age(NOW + second));
}

#[test]
fn a_jump_is_durable_with_the_first_message_after_it() {
    use super::clock::tests::{Hands, NOW};
    let (disk, hands) = (SimDisk::new(3), Hands::at(NOW));
    let open = || {
        disk.restart_process();
        manual_at(&disk, &small(), hands.source()).unwrap().0
    };
    let append = |log: &Log| {
        log.append(&[message("a/b", b"x")], &[]).unwrap();
        commit(log).unwrap();
    };
    let log = open();
    append(&log);
    hands.jump(60 * 24 * 3_600_000_000);
    for _ in 0..3 {
        hands.pass(31_000_000);
        append(&log);
    }
    // The keeper has done nothing yet.
    drop(log);
    let log = open();
    assert!(!log.is_past_age(NOW), "of the first message");
    assert!(!log.is_past_age(hands.wall()), "followed");
    drop(log);
    // The clock is far ahead at a start, and the log ends before anything is appended.
    hands.jump(60 * 24 * 3_600_000_000);
    drop(open());
    assert!(!open().is_past_age(NOW), "of the first message");
}

/// Crashes before each operation of `act` in turn; a crash must not make the first message older.
fn crash_after_a_jump(prepare: impl Fn(&Log, &dyn Fn(u64)), act: impl Fn(&Log)) {
    use super::clock::tests::{Hands, NOW};
    let mut crashed = 0;
    for crash_in in 0..40 {
        let (disk, hands) = (SimDisk::new(3), Hands::at(NOW));
        let open = || {
            disk.restart_process_unless_off();
            manual_at(&disk, &small(), hands.source()).unwrap().0
        };
        let log = open();
        log.append(&[message("a/b", &[b'x'; 6_000])], &[]).unwrap();
        commit(&log).unwrap();
        hands.jump(60 * 24 * 3_600_000_000);
        prepare(&log, &|us| hands.pass(us));
        disk.crash_in(crash_in);
        act(&log);
        drop(log);
        let has_crashed = disk.has_crashed();
        disk.crash_in(u64::MAX);
        if has_crashed {
            crashed += 1;
            disk.reboot();
        }
        assert!(!open().is_past_age(NOW), "a crash before operation {crash_in}");
    }
    assert!((1..40).contains(&crashed), "it crashed at {crashed} operations");
}

/// Passes half of the time after which a jump is believed.
const HALF_US: u64 = 31_000_000;

#[test]
fn a_jump_is_durable_with_the_segment_that_a_frame_needs() {
    let append = |log: &Log, len: usize| {
        log.append(&[message("a/b", &vec![b'x'; len])], &[]).unwrap();
        commit(log)
    };
    let prepare = |log: &Log, pass: &dyn Fn(u64)| {
        for _ in 0..2 {
            pass(HALF_US);
            append(log, 1).unwrap();
        }
        pass(HALF_US);
    };
    crash_after_a_jump(prepare, |log| drop(append(log, 9_000)));
}

#[test]
fn a_jump_that_the_keeper_has_noted_is_durable_with_a_segment_that_ends_by_age() {
    let prepare = |log: &Log, pass: &dyn Fn(u64)| {
        for _ in 0..3 {
            pass(HALF_US);
            log.inner.keep(false);
        }
        lock(&log.inner.front).roll = true;
    };
    crash_after_a_jump(prepare, |log| {
        drop(log.inner.roll_if_asked(&mut lock(&log.inner.writer)));
    });
}

#[test]
fn a_jump_that_the_keeper_has_noted_is_durable_with_the_frame_in_hand() {
    let prepare = |log: &Log, pass: &dyn Fn(u64)| {
        pass(HALF_US);
        log.inner.keep(false);
        log.append(&[message("a/b", b"x")], &[]).unwrap();
        assert!(log.inner.take_in_hand(&mut lock(&log.inner.writer)));
        pass(2 * HALF_US);
        // Noted in the next frame, and the one in hand is stamped after it.
        log.inner.keep(false);
    };
    crash_after_a_jump(prepare, |log| drop(log.inner.commit_in_hand()));
}

#[test]
fn what_the_keeper_noted_of_the_clock_does_not_undo_what_an_earlier_frame_has() {
    use super::clock::tests::{Hands, NOW};
    let (disk, hands) = (SimDisk::new(3), Hands::at(NOW));
    let log = manual_at(&disk, &small(), hands.source()).unwrap().0;
    let append = |payload: &[u8]| log.append(&[message("a/b", payload)], &[]).unwrap();
    append(b"first");
    commit(&log).unwrap();
    let follow_jump = |note: &dyn Fn()| {
        hands.jump(60 * 24 * 3_600_000_000);
        for _ in 0..3 {
            hands.pass(HALF_US);
            note();
        }
    };
    append(b"in hand");
    assert!(log.inner.take_in_hand(&mut lock(&log.inner.writer)));
    follow_jump(&|| log.inner.keep(false));
    follow_jump(&|| assert!(lock(&log.inner.clock).now() > NOW));
    log.inner.commit_in_hand().unwrap();
    // With what the keeper noted of the first jump only.
    commit(&log).unwrap();
    drop(log);
    disk.restart_process();
    let log = manual_at(&disk, &small(), hands.source()).unwrap().0;
    assert!(!log.is_past_age(NOW), "of the first message");
}

#[test]
fn a_log_remembers_whom_it_was_delivered_to_through_restarts_and_new_names() {
    use crate::stream::Delivered;
    let (disk, clock) = (SimDisk::new(3), new_clock());
    let open = || {
        disk.restart_process();
        manual(&disk, &small(), &clock).unwrap().0
    };
    let close = |log: Arc<Log>| {
        log.inner.start_closing();
        commit(&log).unwrap();
    };
    let log = open();
    let reader = log.attach("p/w", Offset(0), OnLag::Block);
    assert_eq!(reader.delivered(), Delivered::ToNobody);
    log.attach("copies", Offset(0), OnLag::Ask).advance(Offset(1));
    assert_eq!(log.attach("p/x", Offset(0), OnLag::Block).delivered(), Delivered::ToNobody, "the host's own");
    log.append(&[message("a/b", b"x")], &[]).unwrap();
    commit(&log).unwrap();
    reader.advance(Offset(1));
    assert_eq!(reader.delivered(), Delivered::ToThis);
    close(log);

    let log = open();
    assert_eq!(log.attach("p/w", Offset(0), OnLag::Detach).delivered(), Delivered::ToThis);
    assert_eq!(log.attach("q/w", Offset(0), OnLag::Block).delivered(), Delivered::ToOthers);
    log.forget("p/w");
    close(log);
    let log = open();
    assert_eq!(log.attach("q/w", Offset(0), OnLag::Block).delivered(), Delivered::ToOthers);
}

#[test]
fn a_reader_with_another_name_has_its_place_and_what_is_remembered_of_it_through_restarts() {
    use crate::stream::{BeginNow, Delivered};
    let (disk, clock) = (SimDisk::new(3), new_clock());
    let open = || {
        disk.restart_process();
        manual(&disk, &small(), &clock).unwrap().0
    };
    let log = open();
    for _ in 0..3 {
        log.append(&[message("a/b", b"x")], &[]).unwrap();
        commit(&log).unwrap();
    }
    // One that was never open, one that has begun.
    let waiting = log.attach("p/w", Offset(1), OnLag::Detach);
    assert_eq!(waiting.begin_now(true), Some(BeginNow::At(Offset(3))));
    log.attach("p/begun", Offset(0), OnLag::Block).advance(Offset(2));
    log.inner.start_closing();
    commit(&log).unwrap();
    for _ in 0..2 {
        let log = open();
        for (former, name) in [("p/w", "q/lake"), ("p/begun", "q/begun"), ("p/none", "q/none")] {
            log.rename_reader(former, name);
            // That name is taken now, or nobody has the former one.
            log.rename_reader("p/none", name);
        }
        let lake = log.attach("q/lake", Offset(2), OnLag::Detach);
        assert_eq!((lake.remembered(), lake.begin_now(true)), (Offset(1), Some(BeginNow::At(Offset(3)))));
        let begun = log.attach("q/begun", Offset(0), OnLag::Block);
        assert_eq!((begun.remembered(), begun.delivered()), (Offset(2), Delivered::ToThis));
        let left: Vec<_> = log.remembered().into_iter().map(|(name, _)| name).collect();
        assert_eq!(left, Vec::<String>::new());
        log.inner.start_closing();
        commit(&log).unwrap();
    }
}

#[tokio::test]
async fn a_clean_end_remembers_where_each_reader_was() {
    let disk = SimDisk::new(3);
    let open = || {
        disk.restart_process();
        Log::open(Arc::new(disk.clone()), Path::new(DIR), "t", &small()).unwrap().0
    };
    let log = open();
    let reader = log.attach("warehouse", Offset(0), OnLag::Block);
    assert_eq!(reader.remembered(), Offset(0));
    for n in 0..10 {
        let appended = log.append(&[message("a/b", &payload(n, 100))], &[]).unwrap();
        durable(&*log, appended.ticket).await;
    }
    reader.advance(Offset(7));
    log.close().await;
    drop((reader, log));
    // Attached at the first message again, which retention respects, and not at work yet.
    for _ in 0..2 {
        let log = open();
        let reader = log.attach("warehouse", Offset(0), OnLag::Block);
        assert_eq!(reader.remembered(), Offset(7));
        log.close().await;
        drop((reader, log));
    }
    // A sink that was restored says so.
    let log = open();
    let reader = log.attach("warehouse", Offset(0), OnLag::Block);
    reader.advance(Offset(3));
    log.close().await;
    drop((reader, log));
    let log = open();
    assert_eq!(log.attach("warehouse", Offset(0), OnLag::Block).remembered(), Offset(3));
}

/// Appends and commits until retention takes a segment, and returns the first offset that is kept then.
fn until_trimmed(log: &Log, reader: &dyn crate::stream::Attachment) -> Offset {
    let start = log.bounds().start;
    while log.bounds().start == start {
        log.append(&[message("a/b", &payload(0, 3_000))], &[]).unwrap();
        commit(log).unwrap();
        reader.advance(log.bounds().end);
        log.inner.keep(false);
    }
    log.bounds().start
}

#[test]
fn a_reader_that_goes_back_keeps_what_is_still_there_also_through_a_crash() {
    let (disk, clock) = (SimDisk::new(3), new_clock());
    let mut config = small();
    config.retention.max_bytes = ByteSize(64 << 10);
    let (log, _) = manual(&disk, &config, &clock).unwrap();
    let reader = log.attach("p/w", Offset(0), OnLag::Block);
    let start = until_trimmed(&log, &*reader);
    log.inner.save_marks(true);
    commit(&log).unwrap();
    let end = log.bounds().end;
    // Its database is one of before what retention has taken already.
    reader.go_back(Offset(1));
    reader.advance(Offset(1));
    while log.append(&[message("a/b", &payload(0, 3_000))], &[]).is_ok() && commit(&log).is_ok() {
        log.inner.keep(false);
    }
    assert_eq!(log.bounds().start, start);
    assert!(log.bounds().end > end);
    drop((reader, log));
    disk.restart_process();
    let (log, _) = manual(&disk, &config, &clock).unwrap();
    assert_eq!(log.remembered(), [("p/w".to_owned(), start)]);
    assert_eq!(log.bounds().start, start);
}

#[test]
fn what_a_reader_was_past_before_a_restart_stays_until_it_says_where_it_is() {
    let (disk, clock) = (SimDisk::new(3), new_clock());
    let (log, _) = manual(&disk, &small(), &clock).unwrap();
    let reader = log.attach("p/w", Offset(0), OnLag::Block);
    for n in 0..20 {
        log.append(&[message("a/b", &payload(n, 3_000))], &[]).unwrap();
        commit(&log).unwrap();
    }
    reader.advance(Offset(20));
    log.inner.start_closing();
    commit(&log).unwrap();
    drop((reader, log));
    clock.fetch_add(2 * 3_600_000_000, Ordering::Relaxed);
    disk.restart_process();
    let (log, _) = manual(&disk, &small(), &clock).unwrap();
    log.inner.keep(false);
    assert_eq!(log.bounds().start, Offset(0), "its database may have been restored meanwhile");
    let reader = log.attach("p/w", Offset(0), OnLag::Block);
    log.inner.keep(false);
    assert_eq!(log.bounds().start, Offset(0));
    reader.advance(Offset(20));
    log.inner.keep(false);
    assert!(log.bounds().start > Offset(0));
}

#[test]
fn a_log_remembers_what_begin_now_means_for_a_reader_until_it_has_begun() {
    use crate::stream::BeginNow;
    let (disk, clock) = (SimDisk::new(3), new_clock());
    let crash = |log: Option<Arc<Log>>| {
        log.iter().for_each(|log| commit(log).unwrap());
        drop(log);
        disk.restart_process();
        manual(&disk, &small(), &clock).unwrap().0
    };
    let append = |log: &Log| {
        log.append(&[message("a/b", b"x")], &[]).unwrap();
        commit(log).unwrap();
    };
    let attach = |log: &Arc<Log>| log.attach("p/w", log.bounds().start, OnLag::Block);
    let log = crash(None);
    append(&log);
    assert_eq!(attach(&log).begin_now(true), Some(BeginNow::At(Offset(1))));
    append(&log);
    let log = crash(Some(log));
    let reader = attach(&log);
    assert_eq!(reader.begin_now(true), Some(BeginNow::At(Offset(1))), "of the first start");
    reader.advance(Offset(1));
    log.inner.keep(false);
    drop(reader);
    let log = crash(Some(log));
    assert_eq!(attach(&log).begin_now(true), Some(BeginNow::Followed));
    append(&log);
    let log = crash(Some(log));
    assert_eq!(attach(&log).begin_now(false), None);
    let mut log = crash(Some(log));
    assert_eq!(attach(&log).begin_now(true), Some(BeginNow::At(Offset(3))), "said anew");
    // As an earlier version wrote it: of a reader that has begun, and of one that has not.
    for (delivered, expected) in [(1, BeginNow::Followed), (0, BeginNow::At(Offset(2)))] {
        let mut earlier = 2_u64.to_le_bytes().to_vec();
        earlier.extend([0, delivered]);
        assert!(log.inner.append_own(super::super::state::OWN, b"p/w", Some(&earlier)));
        log = crash(Some(log));
        assert_eq!(attach(&log).begin_now(true), Some(expected));
    }
}
