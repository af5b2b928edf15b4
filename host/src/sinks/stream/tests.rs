use std::sync::Arc;

use super::*;
use crate::sinks::conformance::{self, Database, advance, claim, message, rejected, rows};
use crate::sinks::state_positions::PREFIX;
use crate::stream::memory::MemoryStream;
use crate::stream::{Opening, Read, StateChange};

struct Messages {
    memory: Arc<MemoryStream>,
    target: Target,
}

impl Messages {
    fn new() -> Self {
        let memory = MemoryStream::with_hooks("clean", 4);
        let target = Target::new(Arc::clone(&memory) as Arc<dyn Stream>, None);
        Self { memory, target }
    }

    async fn all(&self) -> Vec<(NewMessageOwned, Partition)> {
        let mut cursor = self.memory.cursor(Offset(0));
        let mut all = Vec::new();
        while let Some(Read::Batch(batch)) = cursor.try_next().await.expect("it runs") {
            all.extend(batch.messages().map(|message| (owned(&message), message.entry.partition)));
        }
        all
    }

    async fn opened(&self) -> Box<dyn Sink> {
        let mut sink = self.target.sink();
        sink.open(&claim(), None).await.expect("opens");
        sink
    }
}

/// Topic, payload, properties, route, device, times.
type NewMessageOwned = (String, Vec<u8>, Vec<u8>, String, String, (u64, Option<i64>));

fn owned(message: &MessageRef<'_>) -> NewMessageOwned {
    let text = str::to_owned;
    let times = (message.entry.received_us, message.event_us());
    let (payload, properties) = (message.payload().to_vec(), message.properties().to_vec());
    (text(message.topic()), payload, properties, text(message.route()), text(message.device()), times)
}

#[async_trait]
impl Database for Messages {
    async fn sink(&self) -> Box<dyn Sink> {
        self.target.sink()
    }

    async fn written(&self) -> Vec<(String, f64)> {
        let number = |payload: &[u8]| String::from_utf8_lossy(payload).parse().unwrap_or(f64::NAN);
        self.all()
            .await
            .iter()
            .map(|((_, payload, .., device, _), _)| (device.clone(), number(payload)))
            .collect()
    }

    async fn lose_positions(&self) {
        let entries = self.memory.state(PREFIX);
        let removed: Vec<_> = entries.iter().map(|(key, _)| StateChange { key, value: None }).collect();
        self.memory.append(&[], &removed).expect("there is room");
    }

    fn refuses(&self, payload: &str) {
        *self.target.refuse.lock().expect("no panic") = Some(payload.into());
    }
}

crate::sinks::conformance::conformance_tests!(Messages::new());

#[tokio::test]
async fn a_message_comes_into_the_stream_as_the_steps_left_it_in_the_partition_of_its_device() {
    let messages = Messages::new();
    let source = MemoryStream::with_hooks("telemetry", 1);
    let mut properties = Vec::new();
    crate::properties::push(&mut properties, crate::properties::Origin::Device, "k", b"v");
    let topic = "acme/site/temperature/sensor-4a3b/reading";
    let sent = NewMessage {
        topic,
        payload: b"\x00\xff",
        properties: &properties,
        route: "alert",
        device: &topic[22..33],
        partition: Partition(0),
        flags: flags::EVENT_TIME | flags::CHANGED | flags::FITS_NAMESPACE | 1,
        received_us: 123,
        event_us: -5,
    };
    source.append(&[sent], &[]).expect("there is room");
    let Read::Batch(batch) = source.cursor(Offset(0)).next().await.expect("it is there") else {
        panic!("a gap")
    };
    let expected = owned(&batch.message(0));
    assert_eq!((&*expected.4, expected.5), ("sensor-4a3b", (123, Some(-5))));
    let mut rows = Rows::default();
    rows.push_batch(batch);
    messages.opened().await.commit(&rows, &[advance(0, 0, 1)]).await.expect("commits");
    assert_eq!(messages.all().await, [(expected, partition_of("sensor-4a3b", 4))]);
    let Ok(Read::Batch(batch)) = messages.memory.cursor(Offset(0)).next().await else {
        panic!("it is there")
    };
    assert_eq!(batch.entries[0].flags, sent.flags & !flags::CHANGED);
}

#[tokio::test]
async fn a_commit_is_answered_once_it_is_durable_and_so_is_an_open() {
    let messages = Messages::new();
    let mut sink = messages.opened().await;
    messages.memory.hold_commits();
    let first = rows([message("a", "1")]);
    let steps = [advance(0, 0, 1)];
    tokio::select! {
        biased;
        outcome = sink.commit(&first, &steps) => panic!("it is not durable: {outcome:?}"),
        () = messages.memory.awaited() => {}
    }
    // The commit was given up, and is part of the stream all the same.
    let claim = claim();
    tokio::select! {
        biased;
        opened = sink.open(&claim, Some(Epoch(1))) => panic!("its positions are not durable: {opened:?}"),
        () = messages.memory.awaited() => {}
    }
    messages.memory.commit();
    messages.memory.hold_commits();
    let opened = async {
        let opened = sink.open(&claim, Some(Epoch(1))).await;
        opened.expect("opens").positions
    };
    let durable = async {
        messages.memory.awaited().await;
        messages.memory.commit();
        std::future::pending::<()>().await;
    };
    tokio::select! {
        positions = opened => assert_eq!(positions, [conformance::position(0, 1)]),
        () = durable => unreachable!("pending"),
    }
    assert_eq!(messages.written().await, [("a".to_owned(), 1.0)]);
}

#[tokio::test]
async fn a_full_buffer_is_waited_for_and_a_full_disk_is_told() {
    let messages = Messages::new();
    let mut sink = messages.opened().await;
    messages.memory.set_buffer_full(true);
    let (first, steps) = (rows([message("a", "1")]), [advance(0, 0, 1)]);
    let free = async {
        messages.memory.refused().await;
        messages.memory.set_buffer_full(false);
        std::future::pending::<()>().await;
    };
    tokio::select! {
        outcome = sink.commit(&first, &steps) => drop(outcome.expect("commits")),
        () = free => unreachable!("pending"),
    }
    messages.memory.set_no_space(true);
    let error = sink.commit(&rows([message("a", "2")]), &[advance(0, 1, 2)]).await.expect_err("no room");
    let told = "stream \"clean\" takes no appends: no room on disk";
    assert!(matches!(&error, Error::Retry(reason) if reason == told), "{error:?}");
    assert!(matches!(sink.open(&claim(), Some(Epoch(1))).await, Err(Error::Retry(_))));
    messages.memory.set_no_space(false);
    sink.open(&claim(), Some(Epoch(1))).await.expect("opens");
    sink.commit(&rows([message("a", "2")]), &[advance(0, 1, 2)]).await.expect("commits");
    assert_eq!(messages.written().await.len(), 2);
}

#[tokio::test]
async fn a_batch_over_the_commit_buffer_is_too_much_and_one_message_over_it_is_rejected() {
    let messages = Messages::new();
    let mut sink = messages.opened().await;
    let large = "1".repeat(100);
    let two = rows([message("a", "1"), message("a", "2")]);
    messages.memory.set_append_bytes_max(60);
    let error = sink.commit(&two, &[advance(0, 0, 2)]).await.expect_err("over the bound");
    assert!(matches!(error, Error::TooMuch(_)), "{error:?}");
    sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.expect("one has room");
    let mut one = Rows::default();
    one.push_batch(conformance::batch([("a", &*large)]));
    let refused = rejected(sink.commit(&one, &[advance(0, 1, 2)]).await);
    assert!(refused[0].reason.contains("streams.clean.commit_buffer_bytes_max"), "{refused:?}");
    assert_eq!(sink.finish().await.expect("moves on"), Written::default());
    assert_eq!(messages.written().await, [("a".to_owned(), 1.0)]);
}

#[tokio::test]
async fn a_topic_that_has_no_room_for_what_subscribers_see_before_it_is_rejected() {
    let Messages { memory, .. } = Messages::new();
    let target = Target::new(memory, Some("clean"));
    let topic = "t".repeat(TOPIC_BYTES_MAX - "clean/".len());
    let mut of = NewMessage {
        topic: &topic,
        payload: b"",
        properties: b"",
        route: "",
        device: "d",
        partition: Partition(0),
        flags: 0,
        received_us: 0,
        event_us: 0,
    };
    assert_eq!(target.misfit(&of), None);
    let topic = format!("{topic}t");
    of.topic = &topic;
    assert_eq!(target.misfit(&of).as_deref(), Some("stream \"clean\": the topic is too long for it"));
}

/// A value of the state map holds 64 KiB; what a redrive says of its letters may be longer, and shorter again.
#[tokio::test]
async fn positions_of_any_length_are_kept() {
    let messages = Messages::new();
    let log = Uuid::from_u128(7);
    let mut sink = messages.opened().await;
    let lineage =
        crate::stream::Lineage::default().moved(&[Opening { id: 9, first: Offset(0) }], Offset(0), Offset(1));
    let names = [(claim().pipeline, claim().sink)];
    for (number, numbers) in [0..30_000_u64, 0..60_000, 0..3, 0..20_000].into_iter().enumerate() {
        let letters = numbers.map(|n| format!(" {}", 2 * n)).collect::<String>();
        let letters = Some(format!("{log}{letters}"));
        let at = number as u64;
        let step = crate::sinks::Advance { lineage: lineage.clone(), letters, ..advance(0, at, at + 1) };
        sink.commit(&Rows::default(), std::slice::from_ref(&step)).await.expect("commits");
        let told = sink.passes_of(&names, log, Offset(0)).await.expect("answers");
        assert_eq!(Some(&told[0].letters), step.letters.as_ref(), "{number}");
        assert_eq!(Some(&told[0].position.lineage), lineage.as_ref());
    }
}
