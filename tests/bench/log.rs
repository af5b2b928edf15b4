//! The log against the disk it lies on: 256 B records in batches of 256, one
//! sync each, against raw writes and fdatasync of the same size into a prefilled
//! file, the mode that the log's segments are in. The same size: of a frame,
//! which is the records, 40 B of index each, and its header. Raw writes of the
//! records alone are shown beside it. They take turns of some 10 ms, because a
//! disk's moods are longer.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use headworks::batch::Partition;
use headworks::stream::log::{Log, RealDisk};
use headworks::stream::{AppendError, Config, NewMessage, Retention, StateChange, Stream, Ticket};
use headworks::threads::take_short_slices;
use headworks::units::ByteSize;
use headworks_tests::folder::{Folder, target};
use headworks_tests::host::sum;
use tokio::runtime::Runtime;
use tokio::sync::watch;

use crate::results::Results;
use crate::rounds;

const RECORD: [u8; 256] = [b'r'; 256];
const BATCH: usize = 256;
/// Of one turn.
const COMMITS: usize = 70;
/// Of a round: in one segment, before its half, from which on the next is prepared.
const TURNS: usize = 5;
/// The measured part of a round is a twentieth of a second, and disks are moody.
const ROUNDS_FACTOR: usize = 3;
const RECORDS_BYTES: usize = RECORD.len() * BATCH;
/// A frame's header is 104 B, each of its sections has another of 16.
const FRAME_BYTES: usize = RECORDS_BYTES + 40 * BATCH + 136;
/// Segments grow: 4, 16, 64 MiB, each prefilled while the one before fills up.
/// After these commits, with a wait after each number, the log is in a prefilled
/// one that has room for all that is measured.
const WARM_UP: [usize; 3] = [45, 135, 135];
const PREFILL: Duration = Duration::from_secs(1);

pub fn run(results: &mut Results) {
    // A thread like those of the host that append; the sections after this one have theirs.
    let appender = || {
        take_short_slices();
        measure(results);
    };
    std::thread::scope(|scope| scope.spawn(appender).join().expect("a figure"));
    checkpoints(results);
}

/// Bytes that a log with 64 MiB of state writes for a byte of new messages: those of its checkpoints
/// beside them. Zeros that are written ahead of frames cost the same whatever the state.
fn checkpoints(results: &mut Results) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let metrics = headworks::admin::metrics::install().expect("nobody else counts in this process");
    let path = target().join("bench/checkpoints");
    let _ = std::fs::remove_dir_all(&path);
    let folder = Folder::at(&path);
    let retention = Retention { max_bytes: ByteSize::mib(512), ..Retention::default() };
    let config = Config { retention, ..Config::default() };
    let (log, _) = Log::open(Arc::new(RealDisk::default()), &folder.join("stream"), "state", &config)
        .expect("target can be written");
    let append = async |messages: &[NewMessage<'_>], state: &[StateChange<'_>]| loop {
        match log.append(messages, state) {
            Ok(appended) => break appended.ticket,
            Err(AppendError::Full) => log.writable().await,
            Err(error) => panic!("{error}"),
        }
    };
    let value = [7; 64 << 10];
    let payload = [b'r'; 64 << 10];
    let message = NewMessage { payload: &payload, ..message() };
    let mut ratios = Vec::new();
    runtime.block_on(async {
        for key in 0_u32..1_020 {
            append(&[], &[StateChange { key: &key.to_be_bytes(), value: Some(&value) }]).await;
        }
        for _ in 0..=rounds() {
            let counts = || {
                let text = metrics.render();
                let count = |name: &str| sum(&text, name, &[("stream", "state")]);
                ["headworks_stream_written_bytes_total", "headworks_stream_checkpoint_bytes_total"].map(count)
            };
            let before = counts();
            let mut last = Ticket::default();
            // Twice the state's size, in two segments or three.
            for _ in 0..2 * 1_024 {
                last = append(&[message], &[]).await;
            }
            log.durable().wait_for(|ticket| *ticket >= last).await.expect("the log runs");
            let [messages, checkpoints] = counts();
            let (messages, checkpoints) = (messages - before[0], checkpoints - before[1]);
            ratios.push((messages + checkpoints) / messages);
        }
        log.close().await;
    });
    let _ = std::fs::remove_dir_all(folder.path());
    // The first is that of the state itself.
    results.add("checkpoint_write_ratio_64mib", &ratios[1..]);
}

fn message() -> NewMessage<'static> {
    NewMessage {
        topic: "",
        payload: &RECORD,
        properties: &[],
        route: "",
        device: "",
        partition: Partition(0),
        flags: 0,
        received_us: 1,
        event_us: 0,
    }
}

fn measure(results: &mut Results) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let (mut ours, mut raw, mut records_alone) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..ROUNDS_FACTOR * rounds() {
        // Below target: the temporary folder may not be a disk.
        let path = target().join(format!("bench/log-{round}"));
        // What a run that was ended left behind.
        let _ = std::fs::remove_dir_all(&path);
        let folder = Folder::at(&path);
        let mut frames = Raw::new(&folder, "frames", FRAME_BYTES);
        let mut records = Raw::new(&folder, "records", RECORDS_BYTES);
        let mut log = Logged::open(&folder, &runtime);
        let mut took = [Duration::ZERO; 3];
        for _ in 0..TURNS {
            took[0] += frames.turn();
            took[1] += log.turn(&runtime);
            took[2] += records.turn();
        }
        log.close(&runtime);
        let _ = std::fs::remove_dir_all(folder.path());
        for (per_s, took) in [&mut raw, &mut ours, &mut records_alone].into_iter().zip(took) {
            per_s.push((TURNS * COMMITS * BATCH) as f64 / took.as_secs_f64());
        }
    }
    results.add("log_append_records_per_s", &ours);
    results.add("log_append_records_per_s_raw", &raw);
    results.add_ratio("log_append_ratio_vs_raw", &ours, &raw);
    results.add("log_append_records_per_s_raw_records_alone", &records_alone);
}

/// A batch's bytes a write, and a sync, into a prefilled file.
struct Raw {
    file: std::fs::File,
    bytes: Vec<u8>,
    at: u64,
}

impl Raw {
    fn new(folder: &Folder, name: &str, bytes: usize) -> Self {
        let file = std::fs::File::create(folder.join(name)).expect("target can be written");
        for commit in 0..TURNS * COMMITS {
            file.write_all_at(&vec![0; bytes], (commit * bytes) as u64).expect("room");
        }
        file.sync_all().expect("a disk");
        Self { file, bytes: vec![b'r'; bytes], at: 0 }
    }

    fn turn(&mut self) -> Duration {
        let begin = Instant::now();
        for _ in 0..COMMITS {
            self.file.write_all_at(&self.bytes, self.at).expect("room");
            self.file.sync_data().expect("a disk");
            self.at += self.bytes.len() as u64;
        }
        begin.elapsed()
    }
}

struct Logged {
    log: Arc<Log>,
    durable: watch::Receiver<Ticket>,
    batch: Vec<NewMessage<'static>>,
}

impl Logged {
    fn open(folder: &Folder, runtime: &Runtime) -> Self {
        let config = Config {
            commit_buffer_bytes_max: ByteSize((RECORD.len() * BATCH * 3 / 2) as u64),
            // Full after the warm-up, as a host's is soon: what is appended finds memory.
            tail_bytes_max: ByteSize::mib(16),
            ..Config::default()
        };
        let (log, _) = Log::open(Arc::new(RealDisk::default()), &folder.join("stream"), "bench", &config)
            .expect("target can be written");
        let mut opened = Self { durable: log.durable(), log, batch: vec![message(); BATCH] };
        for commits in WARM_UP {
            runtime.block_on(opened.commit(commits));
            std::thread::sleep(PREFILL);
        }
        opened
    }

    fn turn(&mut self, runtime: &Runtime) -> Duration {
        let begin = Instant::now();
        runtime.block_on(self.commit(COMMITS));
        begin.elapsed()
    }

    /// One batch gathers while the one before is synced, as in a host; the buffer
    /// has room for one, so that each has a sync of its own.
    async fn commit(&mut self, count: usize) {
        let (mut first, mut last) = (None, Ticket::default());
        for _ in 0..count {
            last = loop {
                match self.log.append(&self.batch, &[]) {
                    Ok(appended) => break appended.ticket,
                    Err(AppendError::Full) => self.log.writable().await,
                    Err(error) => panic!("{error}"),
                }
            };
            first.get_or_insert(last);
        }
        self.durable.wait_for(|ticket| *ticket >= last).await.expect("the log runs");
        let syncs = last.0 + 1 - first.map_or(0, |ticket| ticket.0);
        assert_eq!(syncs, count as u64, "a sync for every batch");
    }

    fn close(self, runtime: &Runtime) {
        let bounds = self.log.bounds();
        let records = (TURNS * COMMITS + WARM_UP.iter().sum::<usize>()) * BATCH;
        assert_eq!(bounds.end.0 - bounds.start.0, records as u64, "all records are durable");
        runtime.block_on(self.log.close());
    }
}
