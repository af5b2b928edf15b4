//! Positions that an earlier host wrote into a stream are those that this one goes on from.

use super::*;
use crate::sinks::conformance::{advance, claim, message, position, rows};
use crate::sinks::stream::Target;
use crate::sinks::{Rows, Sink, redrive_of};
use crate::stream::memory::MemoryStream;

/// Writes positions as sinks into streams did before there was one form for all.
struct FormerWriter<'s> {
    stream: &'s MemoryStream,
    claim: Vec<u8>,
}

impl<'s> FormerWriter<'s> {
    fn new(stream: &'s MemoryStream, claim: &Claim, epoch: u64) -> Self {
        let names = [b"out/", claim.pipeline.as_bytes(), &[0], claim.sink.as_bytes(), &[0]].concat();
        let key = [&names[..], claim.log.as_bytes(), &claim.generation.to_be_bytes()].concat();
        let writer = Self { stream, claim: key };
        let value = [&epoch.to_be_bytes()[..], b"edge-7 (process 4711)"].concat();
        writer.append(&[([&writer.claim[..], b"c"].concat(), Some(value))]);
        writer
    }

    fn position(&self, partition: u16, next: u64, lineage: &str, letters: Option<&str>) {
        let mut bytes = next.to_be_bytes().to_vec();
        bytes.extend((lineage.len() as u32).to_be_bytes());
        bytes.extend(lineage.as_bytes());
        if let Some(letters) = letters {
            bytes.push(1);
            bytes.extend(letters.as_bytes());
        }
        let put = |(chunk, bytes): (usize, &[u8])| {
            let key = [&self.claim[..], b"p", &partition.to_be_bytes(), &(chunk as u16).to_be_bytes()];
            (key.concat(), Some(bytes.to_vec()))
        };
        let chunks: Vec<_> = bytes.chunks(STATE_VALUE_BYTES_MAX).enumerate().map(put).collect();
        self.append(&chunks);
    }

    fn append(&self, changes: &[Change]) {
        self.stream.append(&[], &borrowed(changes)).expect("there is room");
    }
}

fn stream() -> Arc<MemoryStream> {
    MemoryStream::with_hooks("clean", 4)
}

fn sink(stream: &Arc<MemoryStream>) -> Box<dyn Sink> {
    Target::new(Arc::clone(stream) as Arc<dyn Stream>, None).sink()
}

async fn opened(stream: &Arc<MemoryStream>, claim: &Claim) -> (Box<dyn Sink>, Opened) {
    let mut sink = sink(stream);
    let opened = sink.open(claim, None).await.expect("opens");
    (sink, opened)
}

fn two() -> Claim {
    Claim { partitions: 2, ..claim() }
}

const LINEAGE: &str = "00000000000000aa:3 00000000000000bb";

fn lineage() -> Lineage {
    Lineage::read(Some(LINEAGE)).expect("reads")
}

#[tokio::test]
async fn positions_of_the_former_form_are_taken_over_whole_and_once() {
    let stream = stream();
    let former = FormerWriter::new(&stream, &two(), 4);
    former.position(0, 7, LINEAGE, None);
    former.position(1, 9, "", None);
    stream.keep_states();
    let kept = [Position { lineage: lineage(), ..position(0, 7) }, position(1, 9)];
    let (mut sink, first) = opened(&stream, &two()).await;
    assert_eq!((first.epoch, &first.positions[..]), (Epoch(5), &kept[..]));
    assert_eq!(stream.state(former::PREFIX), []);
    sink.commit(&rows([message("a", "1")]), &[advance(0, 7, 8)]).await.expect("goes on");
    // Killed behind each append: none has lost or doubled a position.
    let crashed = stream.crashes();
    assert_eq!(crashed.len(), 2);
    for (stream, next) in crashed.iter().zip([7, 8]) {
        let (_, again) = opened(stream, &two()).await;
        let first = Position { lineage: lineage(), ..position(0, next) };
        assert_eq!((again.epoch, again.positions), (Epoch(6), vec![first, position(1, 9)]));
        assert_eq!(stream.state(former::PREFIX), []);
    }
}

#[tokio::test]
async fn a_renamed_claim_takes_over_positions_of_the_former_form() {
    let stream = stream();
    FormerWriter::new(&stream, &two(), 4).position(1, 9, LINEAGE, None);
    let formerly = vec![(claim().pipeline, "none".to_owned()), (claim().pipeline, claim().sink)];
    let renamed = Claim { sink: "lake".to_owned(), formerly, ..two() };
    let (_, new) = opened(&stream, &renamed).await;
    let kept = Position { lineage: lineage(), ..position(1, 9) };
    assert_eq!((new.epoch, new.positions), (Epoch(1), vec![kept]));
    assert_eq!(stream.state(former::PREFIX), []);
    let mut old = sink(&stream);
    let error = old.open(&two(), Some(Epoch(4))).await.expect_err("it has another name");
    assert!(matches!(&error, Error::Fenced(text) if text.contains("sink \"lake\"")), "{error:?}");
    let back = old.open(&two(), None).await.expect("opens");
    let others = vec![("telemetry".to_owned(), "lake".to_owned())];
    assert_eq!((back.positions, back.found.others), (Vec::new(), others));
}

#[tokio::test]
async fn claims_of_the_former_form_are_told_and_not_taken() {
    let stream = stream();
    let other = Claim { pipeline: "alerts".to_owned(), ..claim() };
    let of_another_log = Claim { log: Uuid::from_u128(0xbeef), ..claim() };
    FormerWriter::new(&stream, &other, 1).position(0, 5, "", None);
    FormerWriter::new(&stream, &of_another_log, 1).position(0, 6, "", None);
    // This sink has a claim and no position.
    FormerWriter::new(&stream, &Claim { pipeline: "idle".to_owned(), ..claim() }, 1);
    let before = stream.state(former::PREFIX);
    let (mut sink, opened) = opened(&stream, &claim()).await;
    assert_eq!(opened.positions, []);
    assert_eq!(opened.found.others, [("alerts".to_owned(), "warehouse".to_owned())]);
    let logs: Vec<_> = opened.found.other_logs.iter().map(|other| other.log).collect();
    assert_eq!(logs, [of_another_log.log]);
    let names = [(other.pipeline.clone(), other.sink.clone()), (claim().pipeline, claim().sink)];
    let mut told = sink.positions_of(&names, &[claim().log, of_another_log.log]).await.expect("answers");
    told.sort();
    let at = |log, next| (log, Partition(0), Offset(next));
    assert_eq!(told, [at(claim().log, 5), at(of_another_log.log, 6)]);
    assert_eq!(stream.state(former::PREFIX), before);
}

#[tokio::test]
async fn letters_of_passes_of_the_former_form_are_told_and_taken_over_at_any_length() {
    let stream = stream();
    let log = Uuid::from_u128(77);
    let pass = Claim { pipeline: redrive_of("telemetry"), log: Uuid::from_u128(1), ..claim() };
    let letters = (0..60_000).map(|n| format!(" {}", 2 * n)).collect::<String>();
    let letters = format!("{log}{letters}");
    FormerWriter::new(&stream, &pass, 1).position(0, 9, LINEAGE, Some(&letters));
    let names = [(pass.pipeline.clone(), pass.sink.clone())];
    let position = Position { lineage: lineage(), ..position(0, 9) };
    let told = PassPosition { pass: pass.log, position, letters };
    let (mut sink, _) = opened(&stream, &claim()).await;
    assert_eq!(sink.passes_of(&names, log, Offset(8)).await.expect("answers"), std::slice::from_ref(&told));
    // The pass goes on after the upgrade.
    let (mut sink, _) = opened(&stream, &pass).await;
    assert_eq!(sink.passes_of(&names, log, Offset(8)).await.expect("answers"), [told]);
    sink.commit(&Rows::default(), &[advance(0, 9, 10)]).await.expect("goes on");
    assert_eq!(sink.passes_of(&names, log, Offset(9)).await.expect("answers")[0].position.next, Offset(10));
    assert_eq!(stream.state(former::PREFIX), []);
}

/// A host of the version before ran again in between: it knows none of the positions that this one wrote.
#[tokio::test]
async fn what_an_older_host_wrote_meanwhile_counts() {
    let stream = stream();
    let (mut sink, _) = opened(&stream, &two()).await;
    sink.commit(&Rows::default(), &[advance(0, 0, 3), advance(1, 0, 4)]).await.expect("commits");
    FormerWriter::new(&stream, &two(), 1).position(0, 8, "", None);
    let (_, again) = opened(&stream, &two()).await;
    assert_eq!((again.epoch, again.positions), (Epoch(2), vec![position(0, 8), position(1, 4)]));
    assert_eq!(stream.state(former::PREFIX), []);
}
