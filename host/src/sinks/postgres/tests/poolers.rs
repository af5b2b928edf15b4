//! PgBouncer between sink and server.

use super::*;
use crate::sinks::postgres::server::Pooler;

/// A server with two tables, and a pooler before it.
struct Pooled {
    // First: it ends before its server.
    pooler: Pooler,
    server: Server,
}

impl Pooled {
    async fn start(mode: &'static str) -> Self {
        let started = tokio::task::spawn_blocking(move || {
            let server = Server::start(&["fsync = off"]);
            let settings = format!("pool_mode = {mode}\ndefault_pool_size = 5");
            Self { pooler: server.pooler(&settings), server }
        });
        let pooled = started.await.unwrap();
        let sql = format!("CREATE TABLE site_a ({TABLE}); CREATE TABLE site_b ({TABLE})");
        connect(&pooled.server.url()).await.batch_execute(&sql).await.unwrap();
        pooled
    }

    fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.pooler.port)
    }

    fn sink(&self, table: &str) -> PostgresSink {
        let config = Config { url: Url(self.url()), table: table.to_owned(), ..Config::default() };
        PostgresSink::new(table, config, Arc::default(), Failures::default())
    }

    async fn rows(&self, table: &str) -> i64 {
        let client = connect(&self.server.url()).await;
        client.query_one(&format!("SELECT count(*) FROM {table}"), &[]).await.unwrap().get(0)
    }
}

fn of(sink: &str) -> Claim {
    Claim { sink: sink.to_owned(), ..claim() }
}

fn is_named(error: &Error) -> bool {
    matches!(error, Error::Setup(text) if text.contains("PgBouncer") && text.contains("pool_mode = session"))
}

#[tokio::test]
async fn a_pooler_that_changes_connections_between_transactions_is_refused_by_name_before_a_row_is_written() {
    let pooled = Pooled::start("transaction").await;
    for writes_before in [true, false] {
        let claim = of(&format!("a-{writes_before}"));
        let (mut sink, before) = (pooled.sink("site_a"), pooled.rows("site_a").await);
        sink.open(&claim, None).await.unwrap();
        let mut at = 0;
        if writes_before {
            sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.unwrap();
            at = 1;
        }
        // Another client has the server's process that the sink had.
        let other = connect(&pooled.url()).await;
        other.batch_execute("BEGIN").await.unwrap();
        let error = sink.commit(&rows([message("a", "2")]), &[advance(0, at, at + 1)]).await.unwrap_err();
        assert!(is_named(&error), "{error:?}");
        assert_eq!(pooled.rows("site_a").await, before + at as i64);
        other.batch_execute("ROLLBACK").await.unwrap();
    }
    tokio::task::spawn_blocking(move || drop(pooled)).await.unwrap();
}

#[tokio::test]
async fn two_hosts_behind_one_such_pooler_write_nothing_into_each_others_tables() {
    let pooled = Pooled::start("transaction").await;
    let (mut a, mut b) = (pooled.sink("site_a"), pooled.sink("site_b"));
    a.open(&of("a"), None).await.unwrap();
    a.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.unwrap();
    let other = connect(&pooled.url()).await;
    other.batch_execute("BEGIN").await.unwrap();
    b.open(&of("b"), None).await.unwrap();
    b.commit(&rows([message("b", "1")]), &[advance(0, 0, 1)]).await.unwrap();
    // On the process of B, whose statements have the same names.
    let error = a.commit(&rows([message("a", "2")]), &[advance(0, 1, 2)]).await.unwrap_err();
    assert!(is_named(&error), "{error:?}");
    assert_eq!((pooled.rows("site_a").await, pooled.rows("site_b").await), (1, 1));
    drop(other);
    tokio::task::spawn_blocking(move || drop(pooled)).await.unwrap();
}

/// As where each host counts its statements from 0: those of the next here.
#[tokio::test]
async fn a_statement_of_another_host_in_the_way_is_told_by_the_pooler_that_mixes_them() {
    let pooled = Pooled::start("transaction").await;
    let counted = connect(&pooled.server.url()).await;
    let statement = counted.prepare("SELECT name FROM pg_prepared_statements").await.unwrap();
    let name: String = counted.query_one(&statement, &[]).await.unwrap().get(0);
    let number: u64 = name.trim_start_matches('s').parse().unwrap();
    let other = connect(&pooled.url()).await;
    let taken: Vec<String> =
        (number..number + 5_000).map(|number| format!("PREPARE s{number} AS SELECT 1;")).collect();
    other.batch_execute(&taken.concat()).await.unwrap();
    let error = pooled.sink("site_a").open(&of("a"), None).await.unwrap_err();
    assert!(is_named(&error), "{error:?}");
    drop((other, counted));
    tokio::task::spawn_blocking(move || drop(pooled)).await.unwrap();
}

#[tokio::test]
async fn a_pooler_that_keeps_a_connection_for_a_session_is_fine() {
    let pooled = Pooled::start("session").await;
    let (mut a, mut b) = (pooled.sink("site_a"), pooled.sink("site_b"));
    a.open(&of("a"), None).await.unwrap();
    b.open(&of("b"), None).await.unwrap();
    for n in 0..20 {
        a.commit(&rows([message("a", "1")]), &[advance(0, n, n + 1)]).await.unwrap();
        b.commit(&rows([message("b", "1")]), &[advance(0, n, n + 1)]).await.unwrap();
    }
    assert_eq!((pooled.rows("site_a").await, pooled.rows("site_b").await), (20, 20));
    drop((a, b));
    tokio::task::spawn_blocking(move || drop(pooled)).await.unwrap();
}

/// Passes everything on but one question, as Pgpool-II does.
async fn fake_pgpool(server: String) -> u16 {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let server = tokio::net::TcpStream::connect(&server).await.unwrap();
            let ((mut from_client, to_client), (mut from_server, mut to_server)) =
                (client.into_split(), server.into_split());
            let to_client = Arc::new(tokio::sync::Mutex::new(to_client));
            let back = Arc::clone(&to_client);
            tokio::spawn(async move {
                let mut buffer = vec![0; 64 << 10];
                while let Ok(n @ 1..) = from_server.read(&mut buffer).await {
                    let _ = back.lock().await.write_all(&buffer[..n]).await;
                }
            });
            tokio::spawn(async move {
                let mut buffer = vec![0; 64 << 10];
                while let Ok(n @ 1..) = from_client.read(&mut buffer).await {
                    if buffer[..n].ends_with(b"SHOW pool_version\0") {
                        let column = b"T\0\0\0\x25\0\x01pool_version\0\0\0\0\0\0\0\0\0\0\x19\xff\xff\xff\xff\xff\xff\0\0";
                        let row = b"D\0\0\0\x0f\0\x01\0\0\0\x054.3.5";
                        let end = b"C\0\0\0\x09SHOW\0Z\0\0\0\x05I";
                        let answer = [&column[..], row, end].concat();
                        let _ = to_client.lock().await.write_all(&answer).await;
                    } else {
                        let _ = to_server.write_all(&buffer[..n]).await;
                    }
                }
            });
        }
    });
    port
}

#[tokio::test]
async fn pgpool_is_refused_by_name_before_a_row_is_written_and_other_proxies_are_not() {
    let fresh = Fresh::new().await;
    let (head, rest) = fresh.url.split_once('@').unwrap();
    let (server, database) = rest.split_once('/').unwrap();
    let port = fake_pgpool(server.to_owned()).await;
    let config = Config { url: Url(format!("{head}@127.0.0.1:{port}/{database}")), ..fresh.config() };
    let error = super::sink(config.clone()).open(&claim(), None).await.unwrap_err();
    assert!(matches!(&error, Error::Setup(text) if text.contains("Pgpool-II")), "{error:?}");
    let problems = super::super::check("warehouse", &config, Arc::default(), Vec::new()).await.problems;
    assert!(problems.len() == 1 && problems[0].contains("Pgpool-II"), "{problems:?}");
}
