use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

use super::*;
use crate::batch::MessageRef;
use crate::sinks::conformance::{self, Database, advance, batch, claim, message, position, rows};
use crate::sinks::{Looked, Position};
use crate::stream::memory::MemoryStream;

/// What the next `put` does instead of its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// Nothing is written.
    Fails,
    /// The first half is written.
    WritesHalf,
    /// All is written, and the answer is lost.
    LosesAnswer,
}

/// Partition, offset and index.
type Identity = (u16, u64, u32);

/// A store that a put writes to by identity, as a server outlives a process.
#[derive(Clone, Default)]
struct Store(Arc<Mutex<Stored>>);

#[derive(Default)]
struct Stored {
    /// Device and payload of each row.
    rows: BTreeMap<Identity, (String, Vec<u8>)>,
    /// The same of every row that was put, also again.
    puts: Vec<(String, Vec<u8>)>,
    faults: Vec<Fault>,
    refuses: Option<Vec<u8>>,
}

impl Store {
    fn lock(&self) -> MutexGuard<'_, Stored> {
        self.0.lock().unwrap()
    }

    /// The next puts fail so, the last of these first.
    fn fail(&self, faults: &[Fault]) {
        self.lock().faults = faults.to_vec();
    }

    fn identities(&self) -> Vec<Identity> {
        self.lock().rows.keys().copied().collect()
    }
}

fn of_row(message: MessageRef<'_>, index: u32) -> (Identity, (String, Vec<u8>)) {
    let identity = (message.entry.partition.0, message.offset().0, index);
    (identity, (message.device().to_owned(), message.payload().to_vec()))
}

#[async_trait]
impl Target for Store {
    fn place(&self) -> String {
        "memory".to_owned()
    }

    async fn open(&mut self) -> Result<(), Error> {
        Ok(())
    }

    async fn put(&mut self, rows: &Rows) -> Result<Put, Error> {
        let stored = &mut *self.lock();
        let fault = stored.faults.pop();
        let upto = match fault {
            Some(Fault::Fails) => 0,
            Some(Fault::WritesHalf) => rows.len() / 2,
            Some(Fault::LosesAnswer) | None => rows.len(),
        };
        let mut put = Put::default();
        for row in 0..upto {
            let (identity, stands) = of_row(rows.get(row), rows.index(row));
            if stored.refuses.as_ref() == Some(&stands.1) {
                put.rejected.push(RefusedRow { row, reason: "refused".to_owned(), code: None });
                continue;
            }
            stored.puts.push(stands.clone());
            stored.rows.insert(identity, stands);
            put.written.written += 1;
        }
        fault.map_or(Ok(put), |fault| Err(Error::Retry(format!("{fault:?}"))))
    }
}

/// The store, and the streams of the host that writes to it.
struct Host {
    store: Store,
    positions: Arc<MemoryStream>,
    dead_letters: Arc<MemoryStream>,
    journal: Journal,
}

impl Default for Host {
    fn default() -> Self {
        let streams = ["broker", "dead-letters"].map(|name| MemoryStream::with_hooks(name, 1));
        Self::on(Store::default(), streams)
    }
}

impl Host {
    fn on(store: Store, [positions, dead_letters]: [Arc<MemoryStream>; 2]) -> Self {
        let streams: [Arc<dyn Stream>; 2] = [positions.clone(), dead_letters.clone()];
        let [of_positions, of_letters] = streams;
        Self { store, positions, dead_letters, journal: Journal::new(of_positions, of_letters) }
    }

    fn sink(&self) -> Journaled<Store> {
        Journaled::new(self.store.clone(), self.journal.clone())
    }

    /// Where a process finds itself that starts now.
    async fn position(&self) -> u64 {
        let positions = self.sink().open(&claim(), None).await.unwrap().positions;
        positions.first().map_or(0, |position| position.next.0)
    }
}

#[async_trait]
impl Database for Host {
    async fn sink(&self) -> Box<dyn Sink> {
        Box::new(Host::sink(self))
    }

    async fn written(&self) -> Vec<(String, f64)> {
        let number = |payload: &[u8]| String::from_utf8_lossy(payload).parse().unwrap_or(f64::NAN);
        self.store.lock().puts.iter().map(|(device, payload)| (device.clone(), number(payload))).collect()
    }

    async fn lose_positions(&self) {
        unreachable!("they are in the host")
    }

    async fn look(&self, claim: &Claim) -> Option<Looked> {
        let entries = self.positions.state(state_positions::PREFIX);
        look_up(&entries, vec![claim.clone()], "memory").unwrap().pop()
    }

    fn refuses(&self, row: &str) {
        self.store.lock().refuses = Some(row.as_bytes().to_vec());
    }
}

conformance::repeating_conformance_tests!(Host::default());

/// Messages from `from` on, two of them made of each offset.
fn from_offset(from: u64, count: u64) -> Rows {
    let mut two = batch((0..count).flat_map(|_| [("a", "1"), ("b", "2")]));
    two.base = Offset(from);
    for (i, entry) in two.entries.to_mut().iter_mut().enumerate() {
        entry.offset = i as u32 / 2;
    }
    let mut rows = Rows::default();
    rows.push_batch(two);
    rows
}

fn identities(offsets: std::ops::Range<u64>) -> Vec<Identity> {
    offsets.flat_map(|offset| [(0, offset, 0), (0, offset, 1)]).collect()
}

#[tokio::test]
async fn rows_that_a_lost_answer_or_a_crash_brings_again_are_the_rows_that_they_were() {
    let host = Host::default();
    let (mut done, mut next_position) = (0, 0);
    for fault in [Fault::Fails, Fault::WritesHalf, Fault::LosesAnswer] {
        let mut sink = host.sink();
        sink.open(&claim(), None).await.unwrap();
        host.store.fail(&[fault]);
        let rows = from_offset(done, 5);
        let step = [advance(0, done, done + 5)];
        let error = sink.commit(&rows, &step).await.unwrap_err();
        assert!(matches!(error, Error::Retry(_)), "{error:?}");
        assert_eq!(host.position().await, next_position, "{fault:?}");
        // The process dies; the next one writes all of it again, in another cut.
        let mut sink = host.sink();
        sink.open(&claim(), None).await.unwrap();
        sink.commit(&from_offset(done, 2), &[advance(0, done, done + 2)]).await.unwrap();
        sink.commit(&from_offset(done + 2, 3), &[advance(0, done + 2, done + 5)]).await.unwrap();
        done += 5;
        next_position = done;
        assert_eq!(host.store.identities(), identities(0..done), "{fault:?}");
    }
}

#[tokio::test]
async fn a_position_is_not_told_before_it_is_durable() {
    let host = Host::default();
    let mut sink = host.sink();
    sink.open(&claim(), None).await.unwrap();
    host.positions.hold_commits();
    let (rows, step) = (from_offset(0, 1), [advance(0, 0, 1)]);
    let mut commit = std::pin::pin!(sink.commit(&rows, &step));
    tokio::select! {
        biased;
        outcome = &mut commit => panic!("not durable yet: {outcome:?}"),
        () = host.positions.awaited() => {}
    }
    host.positions.commit();
    assert_eq!(commit.await.unwrap(), Outcome::Committed(Written { written: 2, ignored: 0 }));
}

/// Killed behind each append: the position is never past what the store has.
#[tokio::test]
async fn a_process_that_is_killed_at_any_append_skips_no_row() {
    let host = Host::default();
    host.positions.keep_states();
    let mut sink = host.sink();
    sink.open(&claim(), None).await.unwrap();
    sink.commit(&Rows::default(), &[advance(0, 0, 0)]).await.unwrap();
    for n in 0..20 {
        let before = host.store.identities();
        if n % 3 == 1 {
            host.store.fail(&[[Fault::Fails, Fault::WritesHalf, Fault::LosesAnswer][n as usize % 3]]);
            sink.commit(&from_offset(n, 1), &[advance(0, n, n + 1)]).await.unwrap_err();
        }
        if n % 4 == 2 {
            host.positions.set_no_space(true);
            sink.commit(&from_offset(n, 1), &[advance(0, n, n + 1)]).await.unwrap_err();
            host.positions.set_no_space(false);
        }
        sink.commit(&from_offset(n, 1), &[advance(0, n, n + 1)]).await.unwrap();
        for killed in host.positions.crashes() {
            let next = Host::on(host.store.clone(), [killed, host.dead_letters.clone()]).position().await;
            let has = |identity: &Identity| host.store.lock().rows.contains_key(identity);
            assert!(identities(0..next).iter().all(has), "{next}");
            assert!(next * 2 >= before.len() as u64, "no further back than the commit before: {next}");
        }
    }
}

#[tokio::test]
async fn a_sink_waits_while_its_position_has_no_room_and_says_why() {
    let host = Host::default();
    let mut sink = host.sink();
    let held = Some(sink.open(&claim(), None).await.unwrap().epoch);
    host.positions.set_no_space(true);
    for _ in 0..2 {
        let error = sink.commit(&from_offset(0, 1), &[advance(0, 0, 1)]).await.unwrap_err();
        let Error::Retry(reason) = error else { panic!("{error:?}") };
        assert!(reason.contains("position cannot be written") && reason.contains("\"broker\""), "{reason}");
    }
    host.positions.set_no_space(false);
    assert_eq!(sink.open(&claim(), held).await.unwrap().positions, []);
    sink.commit(&from_offset(0, 1), &[advance(0, 0, 1)]).await.unwrap();
    assert_eq!((host.position().await, host.store.identities()), (1, identities(0..1)));
}

#[tokio::test]
async fn a_commit_that_finds_the_buffer_full_goes_on_when_there_is_room() {
    let host = Host::default();
    let mut sink = host.sink();
    sink.open(&claim(), None).await.unwrap();
    host.positions.set_buffer_full(true);
    let (rows, step) = (from_offset(0, 1), [advance(0, 0, 1)]);
    let (outcome, ()) = tokio::join!(sink.commit(&rows, &step), async {
        host.positions.refused().await;
        host.positions.set_buffer_full(false);
    });
    outcome.unwrap();
    assert_eq!(host.position().await, 1);
}

#[tokio::test]
async fn long_lineages_and_letters_of_many_partitions_are_kept_whole() {
    let claim = Claim { pipeline: crate::sinks::redrive_of("p"), partitions: 40, ..claim() };
    let host = Host::default();
    let openings: Vec<String> = (1..=1_000).map(|n| format!("{n:016x}:{n}")).collect();
    let lineage = crate::stream::Lineage::read(Some(&openings.join(" "))).unwrap();
    let letters: String = (0..40_000u32).map(|n| format!("{},", n * 2)).collect();
    let of = |partition, letters: &str| Advance {
        lineage: Some(lineage.clone()),
        letters: Some(format!("{} {letters}", Uuid::nil())),
        ..advance(partition, 0, 7)
    };
    let all: Vec<_> = (0..40).map(|partition| of(partition, &letters)).collect();
    let mut sink = host.sink();
    sink.open(&claim, None).await.unwrap();
    sink.commit(&Rows::default(), &all).await.unwrap();
    let names = [(claim.pipeline.clone(), claim.sink.clone())];
    let told = sink.passes_of(&names, Uuid::nil(), Offset(0)).await.unwrap();
    assert_eq!(told.len(), 40);
    let is_whole = |told: &PassPosition| {
        told.letters == format!("{} {letters}", Uuid::nil()) && told.position.lineage == lineage
    };
    assert!(told.iter().all(is_whole));
    // Fewer letters leave nothing of the chunks of more.
    let fewer = Advance { from: Offset(7), to: Offset(8), ..of(3, "5") };
    sink.commit(&Rows::default(), &[fewer]).await.unwrap();
    let told = sink.passes_of(&names, Uuid::nil(), Offset(7)).await.unwrap();
    assert_eq!(told.iter().map(|told| &*told.letters).collect::<Vec<_>>(), [format!("{} 5", Uuid::nil())]);
}

#[tokio::test]
async fn a_pass_of_a_redrive_is_forgotten_with_the_letters_that_it_sent() {
    let host = Host::default();
    let pass =
        |pass: u128| Claim { pipeline: crate::sinks::redrive_of("p"), log: Uuid::from_u128(pass), ..claim() };
    let letter = crate::stream::conformance::message("a/b", b"x");
    host.dead_letters.append(&[letter; 9], &[]).unwrap();
    for (number, next) in [(1, 3), (2, 7)] {
        let mut sink = host.sink();
        sink.open(&pass(number), None).await.unwrap();
        sink.commit(&Rows::default(), &[advance(0, 0, next)]).await.unwrap();
    }
    let known = |host: &Host| {
        let logs = [1, 2, 3].map(Uuid::from_u128);
        let names = [(pass(1).pipeline, pass(1).sink)];
        let told = host.journal.0.dead_letters.positions_of(&names, &logs);
        told.into_iter().map(|(_, _, next)| next.0).collect::<Vec<_>>()
    };
    host.sink().open(&pass(3), None).await.unwrap();
    assert_eq!(known(&host), [3, 7]);
    host.dead_letters.trim(Offset(9));
    let after = MemoryStream::copied(&host.dead_letters, Offset(9));
    assert_eq!(after.bounds().start, Offset(9));
    host.sink().open(&pass(3), None).await.unwrap();
    assert!(known(&host).is_empty(), "nobody asks for them any more");
}

#[tokio::test]
async fn a_claim_that_moves_to_another_name_fences_the_old_one_for_good() {
    let host = Host::default();
    let mut old = host.sink();
    let held = Some(old.open(&claim(), None).await.unwrap().epoch);
    old.commit(&from_offset(0, 1), &[advance(0, 0, 1)]).await.unwrap();
    let formerly = vec![(claim().pipeline, claim().sink)];
    let renamed = Claim { sink: "lake".to_owned(), formerly, ..claim() };
    let positions: Vec<Position> = host.sink().open(&renamed, None).await.unwrap().positions;
    assert_eq!(positions, [position(0, 1)]);
    let error = old.open(&claim(), held).await.unwrap_err();
    assert!(matches!(&error, Error::Fenced(text) if text.contains("sink \"lake\"")), "{error:?}");
    let again = rows([message("a", "1")]);
    assert!(matches!(old.commit(&again, &[advance(0, 1, 2)]).await, Err(Error::Retry(_))));
}
