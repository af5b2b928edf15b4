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
