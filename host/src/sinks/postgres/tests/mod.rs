//! Against a real server: the one that HEADWORKS_TEST_POSTGRES names, else a
//! private one that the tests start together.

mod access;
mod check;
mod commits;
mod every_row;
mod of_some_rows;
mod poolers;
mod positions;
mod rejected;
mod rows;
mod schema;
mod settings;
mod text_forms;

use std::sync::{Arc, Mutex, PoisonError, Weak};

use async_trait::async_trait;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_postgres::{Client, NoTls};

use super::server::Server;
use super::*;
use crate::sinks::columns::{ColumnConfig, ColumnsConfig};
use crate::sinks::conformance::{
    Database, Keyed, advance, claim, conformance_tests, keyed_conformance_tests, message, position, rejected,
    rows,
};
use crate::sinks::{Claim, Error, Looked, OnConflict, Outcome, Rows, Sink, Written};
use crate::telemetry::Failures;

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
        Self::created("").await
    }

    /// `options` are those of CREATE DATABASE.
    async fn created(options: &str) -> Self {
        let (server, base) = match std::env::var("HEADWORKS_TEST_POSTGRES") {
            Ok(url) => (None, url),
            Err(_) => {
                let server = tokio::task::spawn_blocking(shared).await.unwrap();
                let url = server.url();
                (Some(server), url)
            }
        };
        let name = format!("headworks_{}", uuid::Uuid::new_v4().simple());
        connect(&base).await.batch_execute(&format!("CREATE DATABASE {name} {options}")).await.unwrap();
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
    PostgresSink::new("warehouse", config, Arc::default(), Failures::default())
}

fn columns(columns: &[(&str, &str)]) -> ColumnsConfig {
    let column = |(name, from): &(&str, &str)| ((*name).to_owned(), ColumnConfig::Source((*from).to_owned()));
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

    async fn lose_positions(&self) {
        self.execute("TRUNCATE headworks_positions").await;
    }

    async fn look(&self, claim: &Claim) -> Option<Looked> {
        let checked = check("warehouse", &self.config(), Arc::default(), vec![claim.clone()]).await;
        assert_eq!(checked.problems, [""; 0]);
        checked.claims.into_iter().next()
    }
}

conformance_tests!(Fresh::new().await);

impl Fresh {
    /// With a table as a user made it; `{TABLE}` stands for the columns of the default one.
    async fn with(sql: &str) -> Self {
        let fresh = Self::new().await;
        fresh.execute(&sql.replace("{TABLE}", TABLE)).await;
        fresh
    }
}

const TABLE: &str = "time TIMESTAMPTZ NOT NULL, device_id TEXT NOT NULL, location TEXT, metric TEXT NOT NULL, \
     value DOUBLE PRECISION NOT NULL";

/// The same promises where rows go through the staging table.
mod staged {
    use super::*;

    conformance_tests!(
        Fresh::with("CREATE TABLE readings ({TABLE}); CREATE VIEW telemetry AS SELECT * FROM readings").await
    );
}

mod with_a_deferred_foreign_key {
    use super::*;
    use crate::sinks::conformance::deferred_conformance_tests;

    deferred_conformance_tests!(
        Fresh::with(
            "CREATE TABLE devices (id TEXT PRIMARY KEY); INSERT INTO devices VALUES ('a'), ('b');
             CREATE TABLE telemetry ({TABLE}, FOREIGN KEY (device_id) REFERENCES devices DEFERRABLE INITIALLY DEFERRED);
             CREATE FUNCTION register() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN INSERT INTO devices VALUES (NEW.device_id) ON CONFLICT DO NOTHING; RETURN NULL; END $$;
             CREATE TRIGGER register AFTER INSERT ON telemetry FOR EACH ROW WHEN (NEW.device_id = 'new')
             EXECUTE FUNCTION register()"
        )
        .await
    );
}

mod with_a_unique_key {
    use super::*;

    #[async_trait]
    impl Keyed for Fresh {
        async fn sink_on_conflict(&self, on_conflict: OnConflict) -> Box<dyn Sink> {
            Box::new(super::sink(Config { on_conflict, ..self.config() }))
        }
    }

    keyed_conformance_tests!(
        Fresh::with("CREATE TABLE telemetry ({TABLE}, UNIQUE (value), PRIMARY KEY (device_id, metric))")
            .await
    );
}
