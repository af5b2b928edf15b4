use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::harness::{Act, World, chain, counting, number, published, selective_step, sorted, step, text};
use crate::batch::{Offset, Partition};
use crate::pipeline::{Batching, Retries, State};
use crate::sinks::memory::{Fault, MemoryRow};
use crate::stream::{GapCause, OnLag};
use crate::units::{ByteSize, Period};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_of_a_device_become_rows_in_order() {
    let world = World::new(8, &[("default", "w")]);
    let process = world.start(chain(1, &[step("pass", |_, _| Act::Pass)])).await;
    world.publish_many(20, 0, 2_000);
    process.drained().await;
    let rows = world.payloads("w");
    assert_eq!(sorted(rows.clone()), published(20, 2_000));
    for device in 0..20 {
        let numbers: Vec<_> = rows
            .iter()
            .filter(|row| row.starts_with(&format!("d{device}:")))
            .map(|row| number(row))
            .collect();
        assert!(numbers.is_sorted(), "d{device}: {numbers:?}");
    }
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_route_leads_to_its_sinks_and_an_unknown_one_to_dead_letters() {
    let world = World::new(2, &[("default", "w"), ("alert", "w a"), ("noise", "drop")]);
    let route = step("route", |message, _| match number(&text(message)) % 4 {
        0 => Act::Route("alert"),
        1 => Act::Route("noise"),
        2 => Act::Route("fast"),
        _ => Act::Pass,
    });
    let process = world.start(chain(1, &[route])).await;
    world.publish_many(3, 0, 40);
    process.drained().await;
    let count = |sink: &str| world.payloads(sink).len();
    assert_eq!((count("w"), count("a")), (20, 10));
    let letters = world.letters().await;
    assert_eq!(letters.len(), 10);
    let reason =
        "route \"fast\" is not one of this pipeline's routes: alert, default, noise; step \"route\" gave it";
    assert_eq!(letters[0].1, reason);
    process.stop().await;
}

/// Two hundred messages of five devices, every tenth of which becomes a dozen rows.
async fn written_within(batching: Batching) -> Vec<Vec<MemoryRow>> {
    let mut world = World::new(4, &[("default", "w")]);
    world.batching = batching;
    let times = step("times", |message, _| match number(&text(message)) % 10 {
        0 => Act::Times(12),
        _ => Act::Pass,
    });
    world.publish_many(5, 0, 200);
    let process = world.start(chain(1, &[times])).await;
    process.drained().await;
    process.stop().await;
    assert_eq!(world.payloads("w").len(), 180 + 20 * 12);
    world.database("w").transactions()
}

fn is_of_one_message(rows: &[MemoryRow]) -> bool {
    rows.iter().all(|row| row.offset == rows[0].offset)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_transaction_has_more_rows_than_rows_max_but_one_of_a_single_message() {
    let batching = Batching { rows_max: 7, ..Batching::default() };
    for rows in written_within(batching).await {
        assert!(rows.len() <= 7 || rows.len() == 12 && is_of_one_message(&rows), "{}", rows.len());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_transaction_has_more_bytes_than_bytes_max_but_one_of_a_single_message() {
    let batching = Batching { bytes_max: 30, ..Batching::default() };
    for rows in written_within(batching).await {
        let bytes: usize = rows.iter().map(|row| row.payload.len()).sum();
        assert!(bytes <= 30 || is_of_one_message(&rows), "{bytes}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pipeline_that_drops_everything_moves_its_positions() {
    let world = World::new(4, &[("default", "w")]);
    let process = world.start(chain(1, &[step("drop", |_, _| Act::Drop)])).await;
    world.publish_many(5, 0, 100);
    process.drained().await;
    assert!(world.payloads("w").is_empty());
    assert_eq!(world.memory.marks()["p/w"].0, Offset(100));
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_refused_are_durable_in_dead_letters_before_a_position_covers_them() {
    let mut world = World::new(1, &[("default", "w")]);
    let dead = crate::stream::memory::MemoryStream::with_manual_commit("dead-letters", 1);
    world.dead_memory = dead.clone();
    world.dead = std::sync::Arc::clone(&dead) as std::sync::Arc<dyn crate::stream::Stream>;
    let process = world
        .start(chain(
            1,
            &[step("check", |message, _| match number(&text(message)) {
                3 => Act::Refuse("not JSON".to_owned()),
                _ => Act::Pass,
            })],
        ))
        .await;
    world.publish_many(1, 0, 10);
    process.until("read", |status| status.read == Offset(10)).await;
    // A commit that goes out wrongly is over before a wait begins.
    tokio::select! {
        () = dead.awaited() => {}
        () = world.database("w").rows_at_least(1) => panic!("a row before the letter is durable"),
    }
    assert!(world.payloads("w").is_empty());
    assert_eq!(process.handle.status().sinks[0].committed, Some(Offset(0)));
    dead.commit();
    process.drained().await;
    assert_eq!(world.payloads("w").len(), 9);
    assert_eq!(world.letters().await, [("d0:3".to_owned(), "not JSON".to_owned())]);
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_that_runs_into_a_limit_is_halved_and_grows_again_and_nothing_goes_to_dead_letters() {
    use uuid::Uuid;

    use crate::sinks::{
        Advance, Claim, Epoch, Error, LogPosition, Name, Opened, Outcome, PassPosition, Rows, Sink, Written,
    };

    /// Takes so many rows at once.
    struct Narrow(crate::sinks::memory::MemorySink, Arc<AtomicUsize>, Arc<Mutex<Vec<usize>>>);
    #[async_trait::async_trait]
    impl Sink for Narrow {
        async fn open(&mut self, claim: &Claim, held: Option<Epoch>) -> Result<Opened, Error> {
            self.0.open(claim, held).await
        }
        async fn positions_of(&mut self, claims: &[Name], logs: &[Uuid]) -> Result<Vec<LogPosition>, Error> {
            self.0.positions_of(claims, logs).await
        }
        async fn passes_of(
            &mut self,
            claims: &[Name],
            log: Uuid,
            above: Offset,
        ) -> Result<Vec<PassPosition>, Error> {
            self.0.passes_of(claims, log, above).await
        }
        async fn commit(&mut self, rows: &Rows, advance: &[Advance]) -> Result<Outcome, Error> {
            if rows.len() > self.1.load(Ordering::Relaxed) {
                return Err(Error::TooMuch("statement timeout".to_owned()));
            }
            self.2.lock().unwrap().push(rows.len());
            self.0.commit(rows, advance).await
        }
        async fn set_letters(&mut self, letters: &[(Partition, String)]) -> Result<(), Error> {
            self.0.set_letters(letters).await
        }
        async fn finish(&mut self) -> Result<Written, Error> {
            self.0.finish().await
        }
    }

    let mut world = World::new(1, &[("default", "w")]);
    world.batching.rows_max = 200;
    let (limit, sizes) = (Arc::new(AtomicUsize::new(7)), Arc::<Mutex<Vec<usize>>>::default());
    let (_keep, chain) = tokio::sync::watch::channel(chain(1, &[]));
    let shutdown = tokio_util::sync::CancellationToken::new();
    let part = crate::pipeline::SinkPart {
        name: "w".to_owned(),
        sink: Box::new(Narrow(world.database("w").sink(), limit.clone(), sizes.clone())),
        target: "w".to_owned(),
        batching: world.batching,
        on_lag: OnLag::Block,
        renamed_from: None,
        begin: None,
        is_stream: false,
    };
    let deps = crate::pipeline::Deps {
        sink_names: Arc::default(),
        reasons: Arc::default(),
        recall: std::sync::Arc::new(|recipe| Err(crate::step::RecallError::Gone(recipe.to_owned()))),
        stream: world.stream.clone(),
        chain,
        sinks: vec![part],
        out: None,
        dead_letters: world.dead.clone(),
        dead_letters_bytes_max: world.dead_letters_bytes_max,
        configured: Default::default(),
        failures: Default::default(),
        shutdown: shutdown.clone(),
    };
    world.publish_many(7, 0, 300);
    let handle = crate::pipeline::start("p", &world.config, deps).await.unwrap();
    world.database("w").rows_at_least(300).await;
    assert!(sizes.lock().unwrap().iter().all(|size| *size <= 7));
    limit.store(usize::MAX, Ordering::Relaxed);
    world.publish_many(7, 300, 5_000);
    world.database("w").rows_at_least(5_300).await;
    shutdown.cancel();
    handle.join().await;
    assert_eq!(sorted(world.payloads("w")), published(7, 5_300));
    assert!(sizes.lock().unwrap().iter().any(|size| *size > 100), "grown again: {sizes:?}");
    assert!(world.letters().await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_that_is_doubted_again_and_again_gives_up_its_first_row_only() {
    let world = World::new(1, &[("default", "w")]);
    world.publish_many(1, 0, 10);
    let process = world.start(chain(1, &[])).await;
    // Open, and its claim committed.
    process.drained().await;
    let doubt = || Fault::Doubtful("operation not supported".to_owned());
    world.database("w").fail_commits([doubt(), doubt(), doubt(), doubt()]);
    world.publish(&(10..50).map(|n| ("d0", n)).collect::<Vec<_>>());
    process.drained().await;
    let expected: Vec<_> = published(1, 50).into_iter().filter(|payload| payload != "d0:10").collect();
    assert_eq!(sorted(world.payloads("w")), expected);
    assert_eq!(world.letters().await, [("d0:10".to_owned(), "operation not supported".to_owned())]);
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_cannot_be_written_and_comes_alone_does_not_stop_the_rows_after_it() {
    let world = World::new(1, &[("default", "w")]);
    let process = world.start(chain(1, &[])).await;
    process.drained().await;
    world.database("w").suspect(|message| text(message).starts_with("bad").then(|| "no policy".to_owned()));
    world.publish(&[("bad", 0)]);
    // Alone it may be the table.
    process
        .until(
            "waiting",
            |s| matches!(&s.sinks[0].state, State::Retrying(text) if text.contains("no policy")),
        )
        .await;
    assert!(world.letters().await.is_empty());
    world.publish_many(1, 1, 50);
    process.drained().await;
    process.stop().await;
    let expected: Vec<_> = (1..51).map(|n| format!("d0:{n}")).collect();
    assert_eq!(world.payloads("w"), expected);
    assert_eq!(world.letters().await, [("bad:0".to_owned(), "no policy".to_owned())]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fenced_sink_stops_and_says_why() {
    let world = World::new(1, &[("default", "w")]);
    let process = world.start(chain(1, &[])).await;
    world.publish_many(1, 0, 10);
    process.drained().await;
    world.database("w").fail_commits([Fault::Fenced("epoch 7 took over".to_owned())]);
    world.publish_many(1, 10, 10);
    let status = process.until("stopped", |s| matches!(s.sinks[0].state, State::Stopped(_))).await;
    let State::Stopped(reason) = &status.sinks[0].state else { unreachable!("just awaited") };
    assert!(reason.contains("epoch 7 took over"), "{reason}");
    assert!(!status.is_ready());
    process.stop().await;
    assert_eq!(world.payloads("w").len(), 10);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_position_beyond_the_stream_stops_the_sink() {
    let world = World::new(1, &[("default", "w")]);
    world.publish_many(1, 0, 10);
    let process = world.start(chain(1, &[])).await;
    process.drained().await;
    process.stop().await;
    // The same log with fewer messages: a data folder from an older copy.
    let claim = crate::sinks::Claim {
        pipeline: "p".to_owned(),
        sink: "w".to_owned(),
        log: world.id(),
        generation: world.stream.identity().generation,
        partitions: 1,
        formerly: Vec::new(),
    };
    let mut sink = world.database("w").sink();
    use crate::sinks::Sink;
    sink.open(&claim, None).await.unwrap();
    let advance = crate::sinks::conformance::advance(0, 10, 99);
    sink.commit(&crate::sinks::Rows::default(), &[advance]).await.unwrap();
    let process = world.start(chain(1, &[])).await;
    let status = process.until("stopped", |s| matches!(s.sinks[0].state, State::Stopped(_))).await;
    let State::Stopped(reason) = &status.sinks[0].state else { unreachable!("just awaited") };
    assert!(reason.contains("99") && reason.contains("beyond the end 10"), "{reason}");
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_detached_sink_goes_on_past_what_retention_removed() {
    let mut world = World::new(1, &[("default", "w")]);
    world.on_lag = OnLag::Detach;
    world.publish_many(1, 0, 10);
    let process = world.start(chain(1, &[])).await;
    process.drained().await;
    process.stop().await;
    world.publish_many(1, 10, 30);
    world.memory.trim(Offset(30));
    let process = world.start(chain(1, &[])).await;
    process.drained().await;
    process.stop().await;
    assert_eq!(world.payloads("w").len(), 20);
}

/// On one thread, whose recorder it is.
#[tokio::test]
async fn what_retention_took_from_a_sink_is_counted_once_however_often_it_is_opened() {
    let recorder = crate::admin::metrics::builder().build_recorder();
    let rendered = recorder.handle();
    let _recorder = metrics::set_default_local_recorder(&recorder);
    let mut world = World::new(1, &[("default", "w")]);
    world.on_lag = OnLag::Detach;
    world.publish_many(1, 0, 10);
    let process = world.start(chain(1, &[])).await;
    process.drained().await;
    process.stop().await;
    world.publish_many(1, 10, 30);
    world.memory.trim(Offset(30));
    world.database("w").fail_commits([Fault::Retry("down".to_owned()), Fault::UnknownLost]);
    let process = world.start(chain(1, &[])).await;
    process.drained().await;
    process.stop().await;
    let gap = "headworks_pipeline_gap_messages_total{pipeline=\"p\",cause=\"trimmed\"} ";
    let text = rendered.render();
    assert_eq!(text.lines().find_map(|line| line.strip_prefix(gap)), Some("20"), "{text}");
}

/// On one thread, whose recorder it is.
#[tokio::test]
async fn a_sink_that_was_never_open_is_told_what_it_can_never_have_once_and_over_restarts() {
    let mut world = World::new(2, &[("default", "w")]);
    world.on_lag = OnLag::Detach;
    world.database("w").set_down(Some("no route to host"));
    for _ in 0..2 {
        let process = world.start(chain(1, &[])).await;
        process.until("tried", |s| matches!(s.sinks[0].state, State::Retrying(_))).await;
        process.stop().await;
        world.publish_many(5, 0, 20);
        world.memory.trim(Offset(30));
    }
    assert_eq!(world.memory.lost(), []);
    world.database("w").set_down(None);
    // Each process counts anew.
    let recorder = crate::admin::metrics::builder().build_recorder();
    let rendered = recorder.handle();
    let _recorder = metrics::set_default_local_recorder(&recorder);
    for _ in 0..2 {
        let process = world.start(chain(1, &[])).await;
        process.drained().await;
        process.stop().await;
        assert_eq!(world.memory.lost(), [(Offset(0)..Offset(30), GapCause::Trimmed)]);
        assert_eq!(world.payloads("w").len(), 10);
    }
    let gap = "headworks_pipeline_gap_messages_total{pipeline=\"p\",cause=\"trimmed\"} ";
    let text = rendered.render();
    assert_eq!(text.lines().find_map(|line| line.strip_prefix(gap)), Some("30"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shutdown_commits_what_is_in_flight() {
    let mut world = World::new(4, &[("default", "w")]);
    world.batching.wait_max = Duration::from_secs(3600);
    world.batching.rows_max = 1_000_000;
    let (ran, steps) = counting();
    let process = world.start(steps).await;
    world.publish_many(5, 0, 100);
    process.until("the steps", |_| ran.load(Ordering::Acquire) == 100).await;
    process.stop().await;
    assert_eq!(sorted(world.payloads("w")), published(5, 100));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_asks_too_often_for_a_retry_is_rejected_and_the_rest_of_its_batch_is_not() {
    let world = World::new(1, &[("default", "w")]);
    let lookup = step("lookup", |message, attempt| match number(&text(message)) {
        0..10 if attempt < 2 => Act::Retry("table not loaded"),
        n @ 10..20 if n % 2 == 0 => Act::Retry("table is gone"),
        _ => Act::Pass,
    });
    let process = world.start(chain(1, &[lookup])).await;
    world.publish_many(1, 0, 30);
    process.drained().await;
    assert_eq!(world.payloads("w").len(), 25);
    let letters = world.letters().await;
    assert_eq!(letters.len(), 5);
    assert_eq!(letters[0].1, "table is gone");
    process.stop().await;
}

/// Else the messages that are not its own wait for hours.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_of_a_step_that_sees_some_messages_does_not_hold_the_others_for_all_its_waits() {
    let mut world = World::new(1, &[("default", "w")]);
    let hour = Period(Duration::from_secs(3_600));
    world.config.retries = Retries { max: 1_000, backoff_min: hour, backoff_max: hour };
    let lookup = selective_step("lookup", |message, _| match number(&text(message)) {
        3 => Act::Retry("table is gone"),
        _ => Act::Pass,
    });
    let process = world.start(chain(1, &[lookup])).await;
    world.publish_many(1, 0, 30);
    process.drained().await;
    assert_eq!((world.payloads("w").len(), world.letters().await.len()), (29, 1));
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_dead_letters_hold_the_pipeline_until_there_is_room() {
    let world = World::new(1, &[("default", "w")]);
    world.dead_memory.set_no_space(true);
    let check = step("check", |message, _| match number(&text(message)) {
        3 => Act::Refuse("no".to_owned()),
        _ => Act::Pass,
    });
    let process = world.start(chain(1, &[check])).await;
    world.publish_many(1, 0, 30);
    process.until("holding", |s| matches!(&s.state, State::Holding(why) if why.contains("full"))).await;
    world.dead_memory.set_no_space(false);
    process.drained().await;
    assert_eq!((world.payloads("w").len(), world.letters().await.len()), (29, 1));
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_that_rejects_more_than_its_share_pauses_once_the_letters_are_there_and_goes_on() {
    let mut world = World::new(1, &[("default", "w")]);
    // All in one commit, so that its share is known at once.
    world.batching.rows_max = 2_000;
    world.batching.bytes_max = 4 << 20;
    world.batching.wait_max = Duration::from_secs(3_600);
    world.config.sink_backoff.max = "1h".parse().unwrap();
    world
        .database("w")
        .refuse(|message| (number(&text(message)) < 2_000).then(|| "no such column".to_owned()));
    let process = world.start(chain(1, &[])).await;
    world.publish(&(0..2_000).map(|n| ("d0", n)).collect::<Vec<_>>());
    let paused = "rejected 2000 of 2000 rows, the first: no such column";
    process
        .until("paused", |s| matches!(&s.sinks[0].state, State::Retrying(why) if why.contains(paused)))
        .await;
    assert_eq!(world.letters().await.len(), 2_000);
    assert_eq!(process.handle.status().sinks[0].committed, Some(Offset(2_000)));
    process.stop().await;
    world.config.sink_backoff.max = "5ms".parse().unwrap();
    let process = world.start(chain(1, &[])).await;
    world.publish(&(2_000..4_000).map(|n| ("d0", n)).collect::<Vec<_>>());
    process.drained().await;
    assert_eq!(world.payloads("w").len(), 2_000);
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_whose_commit_failed_is_not_told_to_work_while_it_commits_again() {
    let world = World::new(1, &[("default", "w")]);
    let process = world.start(chain(1, &[])).await;
    world.publish_many(1, 0, 10);
    process.drained().await;
    world.database("w").fail_commits([Fault::Retry("down".to_owned())]);
    let handle = process.into_handle();
    let (state, seen) = std::sync::mpsc::channel();
    let asked = Arc::clone(&handle);
    // Asked of each row, in the commit that succeeds.
    world.database("w").refuse(move |_| {
        let _ = state.send(asked.status().sinks[0].state.clone());
        None
    });
    world.publish_many(1, 10, 10);
    world.database("w").rows_at_least(20).await;
    assert!(matches!(seen.recv().unwrap(), State::Retrying(why) if why.contains("down")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn steps_run_on_threads_that_give_way_to_those_that_acknowledge() {
    let world = World::new(1, &[("default", "w")]);
    let (nice, seen) = std::sync::mpsc::channel();
    let look = step("look", move |_, _| {
        let thread = Some(rustix::thread::gettid());
        let _ = nice.send(rustix::process::getpriority_process(thread).ok());
        Act::Pass
    });
    let process = world.start(chain(1, &[look])).await;
    world.publish_many(1, 0, 1);
    process.drained().await;
    let nice = seen.recv().unwrap();
    assert_eq!(nice, crate::threads::nice_of_workers());
    let own = rustix::process::getpriority_process(Some(rustix::thread::gettid())).ok();
    assert!(nice > own || own == Some(19), "{nice:?} is no nicer than {own:?}");
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_without_rows_that_the_database_refuses_is_tried_again_and_rejects_nothing() {
    let world = World::new(1, &[("default", "w")]);
    let process = world.start(chain(1, &[step("drop", |_, _| Act::Drop)])).await;
    process.until("open", |status| status.sinks[0].committed.is_some()).await;
    let (doubtful, too_much) = (Fault::Doubtful("22003".to_owned()), Fault::TooMuch("57014".to_owned()));
    world.database("w").fail_commits([doubtful.clone(), too_much.clone(), doubtful, too_much]);
    let before = world.database("w").commits();
    world.publish_many(1, 0, 10);
    process.drained().await;
    assert!(world.database("w").commits() > before + 4);
    assert!(world.letters().await.is_empty());
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_a_sink_has_already_hold_no_room_in_its_queue() {
    let mut world = World::new(2, &[("default", "w")]);
    // Each bundle takes the whole queue.
    world.config.sink_queue_bytes_max = ByteSize(1 << 10);
    world.config.progress_every = Period(Duration::from_secs(3_600));
    let process = world.start(chain(1, &[])).await;
    // One device: the position of the other partition stays behind.
    world.publish_many(1, 0, 500);
    world.database("w").rows_at_least(500).await;
    process.handle.crash();
    process.handle.join().await;
    world.config.progress_every = Period(Duration::from_millis(5));
    let process = world.start(chain(1, &[])).await;
    world.publish_many(1, 500, 500);
    process.drained().await;
    assert_eq!(sorted(world.payloads("w")), published(1, 1_000));
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_that_rejects_everything_works_again_only_once_it_wrote_a_row() {
    let world = World::new(1, &[("default", "w")]);
    let process = world.start(chain(1, &[])).await;
    world.database("w").refuse(|_| Some("check constraint".to_owned()));
    world.publish_many(1, 0, 1_500);
    let rejected = |state: &State| matches!(state, State::Retrying(reason) if reason.starts_with("rejected"));
    process.until("it pauses", |status| rejected(&status.sinks[0].state)).await;
    process.drained().await;
    // It is open, and its position has moved on: nothing was written.
    assert!(rejected(&process.handle.status().sinks[0].state));
    world.database("w").refuse(|_| None);
    world.publish_many(1, 1_500, 1);
    process.until("it works", |status| status.sinks[0].state == State::Running).await;
    assert_eq!(world.payloads("w").len(), 1);
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redrive_that_writes_what_a_sink_rejected_shows_that_it_works_again() {
    let world = World::new(1, &[("default", "w")]);
    let process = world.start(chain(1, &[])).await;
    world.database("w").refuse(|_| Some("check constraint".to_owned()));
    world.publish_many(1, 0, 1_500);
    process.drained().await;
    world.database("w").refuse(|_| None);
    let summary = process.handle.redrive(&crate::pipeline::Filter::default()).await.unwrap();
    assert_eq!((summary.sent, summary.failed), (1_500, Vec::new()));
    process.until("it works", |status| status.sinks[0].state == State::Running).await;
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_that_is_down_at_a_start_lags_by_what_it_has_not_committed() {
    let world = World::new(2, &[("default", "w")]);
    let process = world.start(chain(1, &[])).await;
    world.publish_many(5, 0, 1_000);
    process.drained().await;
    process.stop().await;
    world.database("w").set_down(Some("connection refused"));
    let process = world.start(chain(1, &[])).await;
    let down = |state: &State| matches!(state, State::Retrying(_));
    let status = process.until("it is down", |status| down(&status.sinks[0].state)).await;
    assert_eq!((status.sinks[0].committed, status.sinks[0].lag_messages), (None, 0));
    world.publish_many(5, 1_000, 10);
    let sink = process.handle.status().sinks.remove(0);
    assert_eq!((sink.next, sink.lag_messages), (Offset(1_000), 10));
    process.stop().await;
}
