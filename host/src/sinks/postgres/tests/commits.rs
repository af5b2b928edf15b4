//! Each row once, whoever else claims the position and whatever ends the connection or the server.

use super::*;

#[tokio::test]
async fn the_one_who_is_fenced_learns_who_took_over_and_what_to_do() {
    let fresh = Fresh::new().await;
    let mut older = fresh.sink();
    older.open(&claim(), None).await.unwrap();
    fresh.sink().open(&claim(), None).await.unwrap();
    let error = older.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.unwrap_err();
    let text = error.to_string();
    for part in ["(process ", "epoch 2 after our 1", "stop one of the two hosts"] {
        assert!(text.contains(part), "{text}");
    }
}

#[tokio::test]
async fn many_hosts_that_open_at_once_get_epochs_of_their_own() {
    let fresh = Fresh::new().await;
    let mut sinks: Vec<PostgresSink> = (0..8).map(|_| fresh.sink()).collect();
    let mut tasks = tokio::task::JoinSet::new();
    for mut sink in sinks.drain(..) {
        tasks.spawn(async move { sink.open(&claim(), None).await.map(|_| sink) });
    }
    let opened: Vec<PostgresSink> =
        tasks.join_all().await.into_iter().map(|sink| sink.expect("all may open")).collect();
    let mut written = 0;
    for mut sink in opened {
        match sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await {
            Ok(_) => written += 1,
            Err(error) => assert!(matches!(error, Error::Fenced(_)), "{error:?}"),
        }
    }
    assert_eq!((written, fresh.written().await.len()), (1, 1));
}

/// Between sink and server: ends the connection when a COMMIT comes by.
struct Cutter {
    port: u16,
    armed: Arc<Mutex<Option<Cut>>>,
}

#[derive(Clone, Copy, PartialEq)]
enum Cut {
    /// The server never sees the COMMIT.
    Before,
    /// The server commits, its answer is lost.
    After,
}

impl Cutter {
    async fn start(server: String) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let armed: Arc<Mutex<Option<Cut>>> = Arc::default();
        let cut = armed.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = tokio::net::TcpStream::connect(&server).await.unwrap();
                tokio::spawn(Self::carry(client, server, cut.clone()));
            }
        });
        Self { port, armed }
    }

    async fn carry(
        client: tokio::net::TcpStream,
        server: tokio::net::TcpStream,
        armed: Arc<Mutex<Option<Cut>>>,
    ) {
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_server, mut to_server) = server.into_split();
        let muted = Arc::new(Mutex::new(false));
        let is_muted = muted.clone();
        let back = tokio::spawn(async move {
            let mut buffer = vec![0; 64 << 10];
            while let Ok(n @ 1..) = from_server.read(&mut buffer).await {
                if !*is_muted.lock().unwrap() && to_client.write_all(&buffer[..n]).await.is_err() {
                    break;
                }
                if *is_muted.lock().unwrap() && buffer[..n].windows(7).any(|bytes| bytes == b"COMMIT\0") {
                    // Committed, and told: nobody hears it.
                    break;
                }
            }
        });
        let mut buffer = vec![0; 64 << 10];
        while let Ok(n @ 1..) = from_client.read(&mut buffer).await {
            let is_commit = buffer[..n].windows(7).any(|bytes| bytes == b"COMMIT\0");
            let cut = if is_commit { armed.lock().unwrap().take() } else { None };
            match cut {
                Some(Cut::Before) => {
                    back.abort();
                    return;
                }
                Some(Cut::After) => {
                    *muted.lock().unwrap() = true;
                    to_server.write_all(&buffer[..n]).await.unwrap();
                    back.await.unwrap();
                    return;
                }
                None => {
                    if to_server.write_all(&buffer[..n]).await.is_err() {
                        return;
                    }
                }
            }
        }
    }
}

/// Waits until no process of the server has a connection of the sink.
async fn connection_ends(client: &Client) {
    let there = "SELECT EXISTS (SELECT FROM pg_stat_activity
                 WHERE application_name = 'headworks/warehouse' AND datname = current_database())";
    while client.query_one(there, &[]).await.unwrap().get::<_, bool>(0) {}
}

const END: &str = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                   WHERE application_name = 'headworks/warehouse' AND datname = current_database()";

#[tokio::test]
async fn what_a_server_says_as_it_ends_an_idle_connection_is_the_reason_of_the_next_failure() {
    let fresh = Fresh::new().await;
    let client = fresh.client().await;
    let mut sink = fresh.sink();
    let held = Some(sink.open(&claim(), None).await.unwrap().epoch);
    client.batch_execute(END).await.unwrap();
    connection_ends(&client).await;
    let error = sink.commit(&rows([("a", "1")]), &[advance(0, 0, 1)]).await.unwrap_err();
    let words = "terminating connection due to administrator command (SQLSTATE 57P01)";
    assert!(matches!(&error, Error::Retry(reason) if reason.contains(words)), "{error:?}");

    sink.open(&claim(), held).await.unwrap();
    client.batch_execute(END).await.unwrap();
    connection_ends(&client).await;
    let error = sink.positions_of(&[("p".to_owned(), "w".to_owned())], &[claim().log]).await.unwrap_err();
    assert!(matches!(&error, Error::Retry(reason) if reason.contains(words)), "{error:?}");
}

#[tokio::test]
async fn what_a_server_says_as_it_ends_a_transaction_is_the_reason_of_the_failure() {
    let fresh = Fresh::with(
        "CREATE TABLE telemetry ({TABLE}, CHECK (value > 0));
         CREATE FUNCTION ends() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NEW; END $$;
         CREATE TRIGGER ends BEFORE INSERT ON telemetry FOR EACH ROW WHEN (NEW.device_id = 'end')
         EXECUTE FUNCTION ends()",
    )
    .await;
    let client = fresh.client().await;
    let mut sink = fresh.sink();
    let held = Some(sink.open(&claim(), None).await.unwrap().epoch);
    let error = sink.commit(&rows([("end", "1")]), &[advance(0, 0, 1)]).await.unwrap_err();
    assert!(error.to_string().contains("administrator command (SQLSTATE 57P01)"), "{error:?}");

    // Between the rejected rows and COMMIT.
    let mut sink = super::sink(Config { dead_after: "2s".parse().unwrap(), ..fresh.config() });
    sink.open(&claim(), held).await.unwrap();
    rejected(sink.commit(&rows([("a", "1"), ("a", "-1")]), &[advance(0, 0, 2)]).await);
    connection_ends(&client).await;
    let error = sink.finish().await.unwrap_err();
    let words = "terminating connection due to idle-in-transaction timeout (SQLSTATE 25P03)";
    assert!(error.to_string().contains(words), "{error:?}");
}

#[tokio::test]
async fn what_a_server_says_as_it_is_shut_down_is_the_reason_of_the_next_failure() {
    for (mode, words) in [
        ("fast", "terminating connection due to administrator command (SQLSTATE 57P01)"),
        ("immediate", "terminating connection due to immediate shutdown command (SQLSTATE 57P01)"),
    ] {
        let server = Arc::new(Server::start(&["fsync = off"]));
        let mut sink = sink(Config { url: Url(server.url()), ..Config::default() });
        sink.open(&claim(), None).await.unwrap();
        let stopped = Arc::clone(&server);
        tokio::task::spawn_blocking(move || stopped.stop(mode)).await.unwrap();
        // What the server said is in the socket: the connection's task reads it before the next call writes.
        for _ in 0..1_000 {
            tokio::task::yield_now().await;
        }
        let error = sink.commit(&rows([("a", "1")]), &[advance(0, 0, 1)]).await.unwrap_err();
        assert!(matches!(&error, Error::Retry(reason) if reason.contains(words)), "{mode}: {error:?}");
    }
}

#[tokio::test]
async fn an_unknown_commit_is_resolved_by_open() {
    let fresh = Fresh::new().await;
    let target = Url(fresh.url.clone()).target();
    let cutter = Cutter::start(target.split('/').next().unwrap().to_owned()).await;
    let through = fresh.url.replacen(&format!(":{}", port_of(&target)), &format!(":{}", cutter.port), 1);
    let config = Config { url: Url(through), sslmode: Some(SslMode::Disable), ..fresh.config() };
    let mut sink = sink(config);
    sink.open(&claim(), None).await.unwrap();
    let mut next = 0;
    let mut rows_there = 0;
    sink.commit(&Rows::default(), &[advance(0, 0, 0)]).await.unwrap();
    for (cut, is_written) in
        [(Cut::Before, false), (Cut::After, true), (Cut::After, true), (Cut::Before, false)]
    {
        *cutter.armed.lock().unwrap() = Some(cut);
        let batch = rows([message("a", "1"), message("b", "2")]);
        let error = sink.commit(&batch, &[advance(0, next, next + 2)]).await.unwrap_err();
        assert!(matches!(error, Error::Unknown(_)), "{error:?}");
        let again = sink.commit(&batch, &[advance(0, next, next + 2)]).await.unwrap_err();
        assert!(matches!(again, Error::Retry(_)), "not before another open: {again:?}");
        if is_written {
            next += 2;
            rows_there += 2;
        }
        assert_eq!(sink.open(&claim(), None).await.unwrap().positions, [position(0, next)]);
        assert_eq!(fresh.written().await.len(), rows_there);
    }
}

fn port_of(target: &str) -> &str {
    target.split('/').next().and_then(|place| place.rsplit(':').next()).unwrap()
}

#[tokio::test]
async fn a_commit_that_was_dropped_midway_needs_another_open() {
    let fresh = Fresh::new().await;
    let mut sink = fresh.sink();
    sink.open(&claim(), None).await.unwrap();
    sink.commit(&Rows::default(), &[advance(0, 0, 0)]).await.unwrap();
    let batch = rows((0..1_000).map(|_| ("a", "1")));
    {
        let steps = [advance(0, 0, 1_000)];
        let mut commit = std::pin::pin!(sink.commit(&batch, &steps));
        assert!(futures_util::poll!(commit.as_mut()).is_pending());
    }
    let error = sink.commit(&batch, &[advance(0, 0, 1_000)]).await.unwrap_err();
    assert!(matches!(error, Error::Retry(_)), "{error:?}");
    assert_eq!(sink.open(&claim(), None).await.unwrap().positions, [position(0, 0)]);
    sink.commit(&batch, &[advance(0, 0, 1_000)]).await.unwrap();
    assert_eq!(fresh.written().await.len(), 1_000);
}

#[tokio::test]
async fn a_server_that_is_killed_again_and_again_has_each_row_exactly_once() {
    const ROUNDS: u64 = 5;
    const BATCH: u64 = 200;
    let mut server = tokio::task::spawn_blocking(|| Server::start(&[])).await.unwrap();
    let config = Config { url: Url(server.url()), ..Config::default() };
    let (progress, mut seen) = tokio::sync::watch::channel(0_u64);
    let stop = tokio_util::sync::CancellationToken::new();
    let stopped = stop.clone();
    let delivery = tokio::spawn(async move {
        // As a pipeline delivers: read the position, go on from there, open again after errors.
        let mut sink = sink(config);
        loop {
            let mut next = match sink.open(&claim(), None).await {
                Ok(opened) => opened.positions.first().map_or(0, |position| position.next.0),
                Err(Error::Fenced(reason)) => panic!("{reason}"),
                Err(_) => continue,
            };
            loop {
                if stopped.is_cancelled() {
                    return next;
                }
                let numbers: Vec<String> = (next..next + BATCH).map(|n| n.to_string()).collect();
                let batch = rows(numbers.iter().map(|number| ("a", number.as_str())));
                match sink.commit(&batch, &[advance(0, next, next + BATCH)]).await {
                    Ok(_) => {
                        next += BATCH;
                        progress.send_replace(next);
                    }
                    Err(error @ (Error::Retry(_) | Error::Unknown(_))) => {
                        tracing::debug!(%error);
                        break;
                    }
                    Err(error) => panic!("{error:?}"),
                }
            }
        }
    });
    for round in 1..=ROUNDS {
        let goal = *seen.borrow() + 3 * BATCH;
        seen.wait_for(|next| *next >= goal).await.unwrap();
        server = tokio::task::spawn_blocking(move || {
            server.kill();
            server.resume();
            server
        })
        .await
        .unwrap();
        tracing::debug!(round, "killed and back");
    }
    let goal = *seen.borrow() + 3 * BATCH;
    seen.wait_for(|next| *next >= goal).await.unwrap();
    stop.cancel();
    let next = delivery.await.unwrap();
    let client = connect(&server.url()).await;
    let row = client
        .query_one("SELECT count(*), count(DISTINCT value), coalesce(max(value), -1) FROM telemetry", &[])
        .await
        .unwrap();
    let (count, distinct, max): (i64, i64, f64) = (row.get(0), row.get(1), row.get(2));
    assert_eq!((count as u64, distinct as u64, max), (next, next, (next - 1) as f64));
    tokio::task::spawn_blocking(move || drop(server)).await.unwrap();
}

#[tokio::test]
async fn a_server_that_is_not_there_is_tried_again() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let config = Config { url: Url(format!("postgres://writer@127.0.0.1:{port}/iot")), ..Config::default() };
    let error = sink(config).open(&claim(), None).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::Retry(_)), "{text}");
    assert!(text.contains(&format!("cannot connect to 127.0.0.1:{port}/iot")), "{text}");
    assert!(text.to_lowercase().contains("connection refused"), "{text}");
}

#[tokio::test]
async fn a_row_lock_that_lasts_is_tried_again_and_never_waits_for_ever() {
    let fresh = Fresh::new().await;
    let config = Config { lock_timeout: "1s".parse().unwrap(), ..fresh.config() };
    let mut sink = self::sink(config);
    sink.open(&claim(), None).await.unwrap();
    sink.commit(&Rows::default(), &[advance(0, 0, 0)]).await.unwrap();
    let mut other = fresh.client().await;
    let transaction = other.transaction().await.unwrap();
    transaction.batch_execute("SELECT * FROM headworks_positions FOR UPDATE").await.unwrap();
    let error = sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.unwrap_err();
    assert!(matches!(&error, Error::Retry(text) if text.contains("55P03")), "{error:?}");
    transaction.rollback().await.unwrap();
    assert_eq!(sink.open(&claim(), None).await.unwrap().positions, [position(0, 0)]);
}

/// The server may not have noticed yet that a sink gave a connection up.
async fn until_no_sink_is_in_a_transaction(client: &tokio_postgres::Client) {
    let busy = "SELECT count(*) FROM pg_stat_activity \
                WHERE application_name LIKE 'headworks/%' AND state LIKE 'idle in transaction%'";
    while client.query_one(busy, &[]).await.unwrap().get::<_, i64>(0) > 0 {}
}

#[tokio::test]
async fn a_lock_timeout_is_told_with_what_is_locked_and_by_whom() {
    let fresh = Fresh::with(
        "CREATE TABLE devices (id TEXT PRIMARY KEY); INSERT INTO devices VALUES ('a');
         CREATE TABLE telemetry ({TABLE}, FOREIGN KEY (device_id) REFERENCES devices)",
    )
    .await;
    let other = fresh.client().await;
    other.batch_execute("SET application_name = 'reports'").await.unwrap();
    let pid: i32 = other.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    let config = Config { lock_timeout: "50ms".parse().unwrap(), ..fresh.config() };
    let mut sink = self::sink(config);
    sink.open(&claim(), None).await.unwrap();
    sink.commit(&Rows::default(), &[advance(0, 0, 0)]).await.unwrap();
    for (lock, there) in [
        ("SELECT * FROM devices FOR UPDATE", "relation \"devices\""),
        ("UPDATE headworks_positions SET holder = 'x'", "relation \"headworks_positions\""),
        ("LOCK TABLE telemetry", "lock timeout"),
    ] {
        until_no_sink_is_in_a_transaction(&other).await;
        other.batch_execute(&format!("BEGIN; {lock}")).await.unwrap();
        let error = sink.commit(&rows([("a", "1")]), &[advance(0, 0, 1)]).await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::Retry(_)) && text.contains(there), "{text}");
        let who = format!("process {pid} (application reports, user postgres, idle in transaction");
        assert!(text.contains(&who), "{text}");
        other.batch_execute("ROLLBACK").await.unwrap();
        sink.open(&claim(), None).await.unwrap();
    }
    other
        .batch_execute("BEGIN; SELECT pg_advisory_xact_lock(hashtext('headworks_positions'))")
        .await
        .unwrap();
    let error = sink.open(&claim(), None).await.unwrap_err();
    assert!(error.to_string().contains(&format!("process {pid} (")), "{error:?}");
    other.batch_execute("COMMIT").await.unwrap();
    sink.open(&claim(), None).await.unwrap();
    sink.commit(&rows([("a", "1")]), &[advance(0, 0, 1)]).await.unwrap();
}

#[tokio::test]
async fn warnings_of_the_server_are_counted_by_sink() {
    let fresh = Fresh::with(
        "CREATE TABLE telemetry ({TABLE}, CHECK (value < 1000));
         CREATE FUNCTION warn() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN RAISE WARNING 'odd: %', NEW.value; RETURN NEW; END $$;
         CREATE TRIGGER warn BEFORE INSERT ON telemetry FOR EACH ROW EXECUTE FUNCTION warn()",
    )
    .await;
    let failures = Failures::default();
    let mut sink = PostgresSink::new("warehouse", fresh.config(), Arc::default(), failures.clone());
    sink.open(&claim(), None).await.unwrap();
    let values: Vec<String> = (0..100).map(|n| n.to_string()).collect();
    let many = rows(values.iter().map(|value| ("a", value.as_str())));
    sink.commit(&many, &[advance(0, 0, 100)]).await.unwrap();
    let kind = "sink \"warehouse\": the database says WARNING".to_owned();
    // The first one has a line.
    assert_eq!(failures.unsaid(), [(kind.clone(), 99)]);
    rejected(sink.commit(&rows([("a", "1"), ("a", "5000")]), &[advance(0, 100, 102)]).await);
    sink.finish().await.unwrap();
    let kinds: Vec<String> = failures.unsaid().into_iter().map(|(kind, _)| kind).collect();
    assert_eq!(kinds, [kind]);
}
