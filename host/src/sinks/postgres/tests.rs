//! Against a real server: the one that HEADWORKS_TEST_POSTGRES names, else a
//! private one that the tests start together.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use async_trait::async_trait;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_postgres::{Client, NoTls};

use super::server::Server;
use super::*;
use crate::sinks::columns::{ColumnConfig, ColumnsConfig};
use crate::sinks::conformance::{Database, advance, claim, conformance_tests, message, position, rows};
use crate::sinks::{Claim, Error, OnConflict, Rows, Sink};

/// A database of its own on the shared server.
struct Fresh {
    url: String,
    // Stopped when the last test ends.
    _server: Option<Arc<Server>>,
}

/// Ends with the last test that uses it.
fn shared() -> Arc<Server> {
    static SHARED: Mutex<Weak<Server>> = Mutex::new(Weak::new());
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    shared.upgrade().unwrap_or_else(|| {
        let server = Arc::new(Server::start(&["fsync = off"]));
        *shared = Arc::downgrade(&server);
        server
    })
}

async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.expect("the test's server answers");
    tokio::spawn(connection);
    client
}

impl Fresh {
    async fn new() -> Self {
        let (server, base) = match std::env::var("HEADWORKS_TEST_POSTGRES") {
            Ok(url) => (None, url),
            Err(_) => {
                let server = tokio::task::spawn_blocking(shared).await.unwrap();
                let url = server.url();
                (Some(server), url)
            }
        };
        let name = format!("headworks_{}", uuid::Uuid::new_v4().simple());
        connect(&base).await.batch_execute(&format!("CREATE DATABASE {name}")).await.unwrap();
        let (base, query) = base.split_once('?').map_or((base.as_str(), None), |(b, q)| (b, Some(q)));
        let authority = &base[..base.rfind('/').filter(|at| *at > 12).unwrap_or(base.len())];
        let query = query.map(|query| format!("?{query}")).unwrap_or_default();
        Self { url: format!("{authority}/{name}{query}"), _server: server }
    }

    fn config(&self) -> Config {
        Config { url: Url(self.url.clone()), ..Config::default() }
    }

    fn sink(&self) -> PostgresSink {
        sink(self.config())
    }

    async fn client(&self) -> Client {
        connect(&self.url).await
    }

    async fn execute(&self, sql: &str) {
        self.client().await.batch_execute(sql).await.unwrap();
    }
}

fn sink(config: Config) -> PostgresSink {
    PostgresSink::new("warehouse", config, Arc::default())
}

fn columns(columns: &[(&str, &str)]) -> ColumnsConfig {
    let column = |(name, from): &(&str, &str)| {
        ((*name).to_owned(), ColumnConfig::Source((*from).to_owned()))
    };
    ColumnsConfig(columns.iter().map(column).collect())
}

#[async_trait]
impl Database for Fresh {
    async fn sink(&self) -> Box<dyn Sink> {
        Box::new(Fresh::sink(self))
    }

    async fn written(&self) -> Vec<(String, f64)> {
        let rows = self.client().await.query("SELECT device_id, value FROM telemetry", &[]).await.unwrap();
        rows.iter().map(|row| (row.get(0), row.get(1))).collect()
    }
}

conformance_tests!(Fresh::new().await);

/// The same promises where rows go through the temporary table.
mod with_a_unique_key {
    use super::*;

    async fn fresh() -> Fresh {
        let fresh = Fresh::new().await;
        fresh
            .execute(
                "CREATE TABLE telemetry (id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
                 time TIMESTAMPTZ NOT NULL, device_id TEXT NOT NULL, location TEXT, metric TEXT NOT NULL,
                 value DOUBLE PRECISION NOT NULL)",
            )
            .await;
        fresh
    }

    conformance_tests!(fresh().await);
}

#[tokio::test]
async fn a_row_that_is_there_is_left_alone_where_a_unique_key_says_so() {
    let fresh = Fresh::new().await;
    let mut sink = fresh.sink();
    sink.open(&claim()).await.unwrap();
    fresh.execute("CREATE UNIQUE INDEX ON telemetry (device_id, value)").await;
    sink.open(&claim()).await.unwrap();
    let batch = rows([message("a", "1"), message("a", "1"), message("a", "2")]);
    sink.commit(&batch, &[advance(0, 0, 3)]).await.unwrap();
    sink.commit(&batch, &[advance(0, 3, 6)]).await.unwrap();
    assert_eq!(fresh.written().await.len(), 2);

    let refuse = Config { on_conflict: OnConflict::Refuse, ..fresh.config() };
    let mut refusing = self::sink(refuse);
    refusing.open(&claim()).await.unwrap();
    let batch = rows([message("b", "1"), message("a", "2")]);
    let error = refusing.commit(&batch, &[advance(0, 6, 8)]).await.unwrap_err();
    let Error::Rows(refused) = error else { panic!("{error:?}") };
    assert_eq!(refused[0].row, 1, "{refused:?}");
    assert!(refused[0].reason.contains("23505"), "{refused:?}");
}

#[tokio::test]
async fn the_server_names_the_row_that_it_refuses() {
    let fresh = Fresh::new().await;
    fresh
        .execute(
            "CREATE TABLE telemetry (time TIMESTAMPTZ, device_id VARCHAR(3), location TEXT, metric TEXT,
             value DOUBLE PRECISION CHECK (value < 100))",
        )
        .await;
    let mut sink = fresh.sink();
    sink.open(&claim()).await.unwrap();
    // 22001: too long for its column. 23514: check.
    for (bad, code) in [(("long", "5"), "22001"), (("a", "500"), "23514")] {
        let many = rows((0..2_000).map(|i| if i == 1_777 { bad } else { ("a", "5") }));
        let error = sink.commit(&many, &[advance(0, 0, 2_000)]).await.unwrap_err();
        let Error::Rows(refused) = error else { panic!("{error:?}") };
        assert_eq!(refused.iter().map(|row| row.row).collect::<Vec<_>>(), [1_777], "{refused:?}");
        assert!(refused[0].reason.contains(code), "{refused:?}");
    }
    // Usable as it is, without another open.
    sink.commit(&rows([message("a", "5")]), &[advance(0, 0, 1)]).await.unwrap();
}

#[tokio::test]
async fn every_type_that_is_written_reads_back() {
    let fresh = Fresh::new().await;
    fresh
        .execute(
            "CREATE DOMAIN celsius AS REAL CHECK (value > -274);
             CREATE TABLE readings (i2 SMALLINT, i4 INTEGER, i8 BIGINT, f4 celsius, f8 DOUBLE PRECISION,
             n NUMERIC, n2 NUMERIC, n3 NUMERIC, n4 NUMERIC, b BOOLEAN, t TEXT, v VARCHAR(20), tz TIMESTAMPTZ,
             ts TIMESTAMP, d DATE, j JSON, jb JSONB, by BYTEA, u UUID, nothing TEXT)",
        )
        .await;
    let names = [
        "i2", "i4", "i8", "f4", "f8", "n", "n2", "n3", "n4", "b", "t", "v", "tz", "ts", "d", "j", "jb", "u", "nothing",
    ];
    let pointers: Vec<String> = names.iter().map(|name| format!("/{name}")).collect();
    let mut pairs: Vec<(&str, &str)> = names.into_iter().zip(pointers.iter().map(String::as_str)).collect();
    pairs.push(("by", "$topic"));
    let config = Config { table: "public.readings".to_owned(), columns: columns(&pairs), ..fresh.config() };
    let mut sink = self::sink(config);
    sink.open(&claim()).await.unwrap();
    let payload = r#"{"i2":-7,"i4":70000,"i8":9007199254740993,"f4":21.5,"f8":1e-3,"n":-12345.67890,"n2":1e20,
        "n3":0.00012,"n4":100000000,"b":true,"t":"caf\u00e9 \"x\"","v":12.50,"tz":1771840800123,
        "ts":"2026-02-23T12:00:00+02:00","d":"2026-02-23T23:00:00Z","j":{"a": [1]},"jb":[1, 2],
        "u":"a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11","nothing":null}"#;
    sink.commit(&rows([("s", payload)]), &[advance(0, 0, 1)]).await.unwrap();
    let client = fresh.client().await;
    client.batch_execute("SET timezone = 'UTC'").await.unwrap();
    let row = client.query_one("SELECT row_to_json(readings)::text FROM readings", &[]).await.unwrap();
    let row: serde_json::Value = serde_json::from_str(row.get(0)).unwrap();
    let numbers = client.query_one("SELECT concat_ws(' ', n, n2, n3, n4) FROM readings", &[]).await.unwrap();
    assert_eq!(numbers.get::<_, &str>(0), "-12345.67890 100000000000000000000 0.00012 100000000");
    for (name, expected) in [
        ("i2", serde_json::json!(-7)),
        ("i4", serde_json::json!(70_000)),
        ("i8", serde_json::json!(9_007_199_254_740_993_i64)),
        ("f4", serde_json::json!(21.5)),
        ("f8", serde_json::json!(0.001)),
        ("b", serde_json::json!(true)),
        ("t", serde_json::json!("café \"x\"")),
        ("v", serde_json::json!("12.50")),
        ("tz", serde_json::json!("2026-02-23T10:00:00.123+00:00")),
        ("ts", serde_json::json!("2026-02-23T10:00:00")),
        ("d", serde_json::json!("2026-02-23")),
        ("j", serde_json::json!({"a": [1]})),
        ("jb", serde_json::json!([1, 2])),
        ("u", serde_json::json!("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11")),
        ("nothing", serde_json::Value::Null),
    ] {
        assert_eq!(row[name], expected, "{name}");
    }
}

#[tokio::test]
async fn a_table_that_does_not_fit_is_an_error_that_names_the_column() {
    let base = "time TIMESTAMPTZ, device_id TEXT, location TEXT, metric TEXT";
    for (table, expected) in [
        (format!("{base}, reading REAL"), "no column \"value\": it has time, device_id, location, metric, reading"),
        (format!("{base}, value POINT"), "column \"value\" of table telemetry is point, which cannot be written"),
        (format!("{base}, value REAL, site TEXT NOT NULL"), "column \"site\" of table telemetry is NOT NULL"),
    ] {
        let fresh = Fresh::new().await;
        fresh.execute(&format!("CREATE TABLE telemetry ({table})")).await;
        let error = fresh.sink().open(&claim()).await.unwrap_err();
        assert!(matches!(error, Error::Setup(_)), "{error:?}");
        assert!(error.to_string().contains(expected), "{error}");
    }
    let fresh = Fresh::new().await;
    let config = Config { create: false, ..fresh.config() };
    let error = sink(config).open(&claim()).await.unwrap_err();
    assert!(matches!(&error, Error::Setup(text) if text.contains("no table telemetry")), "{error:?}");
}

#[tokio::test]
async fn the_one_who_is_fenced_learns_who_took_over_and_what_to_do() {
    let fresh = Fresh::new().await;
    let mut older = fresh.sink();
    older.open(&claim()).await.unwrap();
    fresh.sink().open(&claim()).await.unwrap();
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
        tasks.spawn(async move { sink.open(&claim()).await.map(|_| sink) });
    }
    let opened: Vec<PostgresSink> =
        tasks.join_all().await.into_iter().map(|sink| sink.expect("all may open")).collect();
    let mut written = 0;
    for mut sink in opened {
        match sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await {
            Ok(()) => written += 1,
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

    async fn carry(client: tokio::net::TcpStream, server: tokio::net::TcpStream, armed: Arc<Mutex<Option<Cut>>>) {
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

#[tokio::test]
async fn an_unknown_commit_is_resolved_by_open() {
    let fresh = Fresh::new().await;
    let target = Url(fresh.url.clone()).target();
    let cutter = Cutter::start(target.split('/').next().unwrap().to_owned()).await;
    let through = fresh.url.replacen(&format!(":{}", port_of(&target)), &format!(":{}", cutter.port), 1);
    let config = Config { url: Url(through), sslmode: Some(SslMode::Disable), ..fresh.config() };
    let mut sink = sink(config);
    sink.open(&claim()).await.unwrap();
    let mut next = 0;
    let mut rows_there = 0;
    sink.commit(&Rows::default(), &[advance(0, 0, 0)]).await.unwrap();
    for (cut, is_written) in [(Cut::Before, false), (Cut::After, true), (Cut::After, true), (Cut::Before, false)] {
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
        assert_eq!(sink.open(&claim()).await.unwrap(), [position(0, next)]);
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
    sink.open(&claim()).await.unwrap();
    sink.commit(&Rows::default(), &[advance(0, 0, 0)]).await.unwrap();
    let batch = rows((0..1_000).map(|_| ("a", "1")));
    {
        let steps = [advance(0, 0, 1_000)];
        let mut commit = std::pin::pin!(sink.commit(&batch, &steps));
        assert!(futures_util::poll!(commit.as_mut()).is_pending());
    }
    let error = sink.commit(&batch, &[advance(0, 0, 1_000)]).await.unwrap_err();
    assert!(matches!(error, Error::Retry(_)), "{error:?}");
    assert_eq!(sink.open(&claim()).await.unwrap(), [position(0, 0)]);
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
            let mut next = match sink.open(&claim()).await {
                Ok(positions) => positions.first().map_or(0, |position| position.next.0),
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
                    Ok(()) => {
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

/// A server with a certificate for `localhost` from its own CA, and passwords.
fn guarded() -> (Server, std::path::PathBuf) {
    let mut server = Server::start(&[]);
    let dir = server.dir().to_owned();
    let openssl = |arguments: &str| {
        let output =
            std::process::Command::new("openssl").args(arguments.split(' ')).current_dir(&dir).output().unwrap();
        assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    };
    openssl("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=ca -keyout ca.key -out ca.pem");
    openssl("req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost -keyout s.key -out s.csr");
    server.write("ext", "subjectAltName=DNS:localhost\n");
    openssl("x509 -req -in s.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out s.pem");
    for (from, to) in [("s.key", "data/server.key"), ("s.pem", "data/server.crt")] {
        let text = std::fs::read_to_string(dir.join(from)).unwrap();
        server.write(to, &text);
    }
    let psql = |sql: &str| {
        let url = server.url();
        let output = std::process::Command::new("psql").args([&url, "-qc", sql]).output().unwrap();
        assert!(output.status.success(), "{sql}: {}", String::from_utf8_lossy(&output.stderr));
    };
    psql("CREATE ROLE writer LOGIN PASSWORD 'open sesame'");
    psql("CREATE DATABASE iot OWNER writer");
    server.write("data/postgresql.auto.conf", "ssl = on\n");
    server.write("data/pg_hba.conf", "hostssl all writer all scram-sha-256\nhost all postgres all trust\n");
    server.kill();
    server.resume();
    let ca = dir.join("ca.pem");
    (server, ca)
}

#[tokio::test]
async fn tls_and_passwords_are_as_sslmode_says() {
    let (server, ca) = tokio::task::spawn_blocking(guarded).await.unwrap();
    let password = Some(Password::File(server.write("password", "open sesame\n")));
    let open = |host: &str, mode: SslMode, ca: Option<&std::path::Path>, password: Option<Password>| {
        let config = Config {
            url: Url(format!("postgres://writer@{host}:{}/iot", server.port)),
            sslmode: Some(mode),
            tls: Tls { ca: ca.map(Into::into), ..Tls::default() },
            password,
            ..Config::default()
        };
        async move { sink(config).open(&claim()).await.map(|_| ()).map_err(|error| format!("{error:?}")) }
    };
    let by_ca = Some(ca.as_path());
    open("localhost", SslMode::VerifyFull, by_ca, password.clone()).await.expect("the name is in it");
    open("127.0.0.1", SslMode::VerifyCa, by_ca, password.clone()).await.expect("the name does not count");
    open("127.0.0.1", SslMode::Require, None, password.clone()).await.expect("nothing is verified");
    open("127.0.0.1", SslMode::Prefer, None, password.clone()).await.expect("nothing is verified");

    let stranger = open("127.0.0.1", SslMode::VerifyFull, by_ca, password.clone()).await.unwrap_err();
    assert!(stranger.starts_with("Setup") && stranger.contains("certificate"), "{stranger}");
    let unknown_ca = open("localhost", SslMode::VerifyFull, None, password.clone()).await.unwrap_err();
    assert!(unknown_ca.starts_with("Setup"), "{unknown_ca}");
    let plain = open("localhost", SslMode::Disable, None, password.clone()).await.unwrap_err();
    assert!(plain.starts_with("Setup") && plain.contains("28000"), "{plain}");

    let wrong = Some(Password::File(server.write("wrong", "close sesame")));
    let wrong = open("localhost", SslMode::Require, None, wrong).await.unwrap_err();
    assert!(wrong.starts_with("Setup") && wrong.contains("28P01"), "{wrong}");
    assert!(wrong.contains("password authentication failed for user \\\"writer\\\""), "{wrong}");
    assert!(!wrong.contains("sesame"), "{wrong}");
    let none = open("localhost", SslMode::Require, None, None).await.unwrap_err();
    assert!(none.starts_with("Setup"), "{none}");
    let unset = Some(Password::Env("HEADWORKS_TEST_NO_SUCH_VARIABLE".to_owned()));
    let unset = open("localhost", SslMode::Require, None, unset).await.unwrap_err();
    assert!(unset.contains("HEADWORKS_TEST_NO_SUCH_VARIABLE for the password is not set"), "{unset}");
    tokio::task::spawn_blocking(move || drop(server)).await.unwrap();
}

#[test]
fn a_password_comes_from_the_environment() {
    // PATH is set everywhere; tests that run beside this one may not be given another variable.
    assert_eq!(Password::Env("PATH".to_owned()).read(), Ok(std::env::var("PATH").unwrap()));
}

#[tokio::test]
async fn a_user_without_rights_is_told_which_table_cannot_be_made() {
    let fresh = Fresh::new().await;
    let role = format!("r{}", uuid::Uuid::new_v4().simple());
    fresh
        .execute(&format!("CREATE ROLE {role} LOGIN PASSWORD 'x'; REVOKE CREATE ON SCHEMA public FROM PUBLIC"))
        .await;
    let target = Url(fresh.url.clone()).target();
    let config = Config { url: Url(format!("postgres://{role}:x@{target}")), ..fresh.config() };
    let error = sink(config).open(&claim()).await.unwrap_err();
    fresh.execute(&format!("DROP ROLE {role}")).await;
    let text = error.to_string();
    assert!(matches!(error, Error::Setup(_)) && text.contains("headworks_positions"), "{text}");
}

#[tokio::test]
async fn a_server_that_is_not_there_is_tried_again() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let config = Config { url: Url(format!("postgres://writer@127.0.0.1:{port}/iot")), ..Config::default() };
    let error = sink(config).open(&claim()).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::Retry(_)), "{text}");
    assert!(text.contains(&format!("sink \"warehouse\": cannot connect to 127.0.0.1:{port}/iot")), "{text}");
    assert!(text.to_lowercase().contains("connection refused"), "{text}");
}

#[tokio::test]
async fn a_row_lock_that_lasts_is_tried_again_and_never_waits_for_ever() {
    let fresh = Fresh::new().await;
    let config = Config { lock_timeout: "1s".parse().unwrap(), ..fresh.config() };
    let mut sink = self::sink(config);
    sink.open(&claim()).await.unwrap();
    sink.commit(&Rows::default(), &[advance(0, 0, 0)]).await.unwrap();
    let mut other = fresh.client().await;
    let transaction = other.transaction().await.unwrap();
    transaction.batch_execute("SELECT * FROM headworks_positions FOR UPDATE").await.unwrap();
    let error = sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.unwrap_err();
    assert!(matches!(&error, Error::Retry(text) if text.contains("55P03")), "{error:?}");
    transaction.rollback().await.unwrap();
    assert_eq!(sink.open(&claim()).await.unwrap(), [position(0, 0)]);
}

#[tokio::test]
async fn a_batch_of_many_chunks_is_one_transaction() {
    let fresh = Fresh::new().await;
    let mut sink = fresh.sink();
    let claim = Claim { partitions: 4, ..claim() };
    sink.open(&claim).await.unwrap();
    let filler = "x".repeat(1_000);
    let payload = format!("{{\"value\": 1.5, \"location\": \"{filler}\"}}");
    let many = rows((0..5_000).map(|_| ("a", payload.as_str())));
    let steps: Vec<_> = (0..4).map(|partition| advance(partition, 0, 5_000)).collect();
    sink.commit(&many, &steps).await.unwrap();
    let row = fresh
        .client()
        .await
        .query_one("SELECT count(*), count(DISTINCT xmin::text), min(length(location)) FROM telemetry", &[])
        .await
        .unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1), row.get::<_, i32>(2)), (5_000, 1, 1_000));
}
