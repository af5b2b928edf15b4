//! What happens to the table of positions: earlier versions made it, people remove it.

use super::*;

const FIRST_VERSION: &str = r#"
CREATE TABLE headworks_positions (
    pipeline TEXT NOT NULL, sink TEXT NOT NULL, log UUID NOT NULL, generation BIGINT NOT NULL,
    "partition" INTEGER NOT NULL, epoch BIGINT NOT NULL, next_offset BIGINT, holder TEXT NOT NULL,
    updated_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (pipeline, sink, log, generation, "partition"));
INSERT INTO headworks_positions
VALUES ('telemetry', 'warehouse', '00000000-0000-0000-0000-000000005eed', 0, 0, 3, 41, 'edge-7 (process 1)')"#;

#[tokio::test]
async fn positions_of_the_first_version_are_read_and_get_what_they_lack() {
    let fresh = Fresh::with(&format!("CREATE TABLE telemetry ({{TABLE}}); {FIRST_VERSION}")).await;
    let mut sink = fresh.sink();
    let opened = sink.open(&claim(), None).await.unwrap();
    assert_eq!((opened.epoch.0, opened.positions), (4, vec![position(0, 41)]));
    sink.commit(&rows([message("a", "1")]), &[advance(0, 41, 42)]).await.unwrap();
    assert_eq!(fresh.sink().open(&claim(), None).await.unwrap().positions, [position(0, 42)]);
}

#[tokio::test]
async fn a_user_that_may_not_alter_the_table_of_the_first_version_is_told_what_its_owner_runs() {
    let fresh = Fresh::with(&format!("CREATE TABLE telemetry ({{TABLE}}); {FIRST_VERSION}")).await;
    let role = format!("r{}", uuid::Uuid::new_v4().simple());
    fresh
        .execute(&format!(
            "CREATE ROLE {role} LOGIN PASSWORD 'x'; GRANT INSERT ON telemetry TO {role};
             GRANT SELECT, INSERT, UPDATE ON headworks_positions TO {role}"
        ))
        .await;
    let url = fresh.url.replacen("postgres://postgres@", &format!("postgres://{role}:x@"), 1);
    let mut sink = sink(Config { url: Url(url), ..fresh.config() });
    let error = sink.open(&claim(), None).await.unwrap_err();
    let Error::Setup(text) = &error else { panic!("{error:?}") };
    let statement = text.split('`').nth(1).unwrap_or_else(|| panic!("{text}"));
    fresh.execute(statement).await;
    assert_eq!(sink.open(&claim(), None).await.unwrap().positions, [position(0, 41)]);
    drop(sink);
    fresh.execute(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
}

#[tokio::test]
async fn a_dropped_table_of_positions_is_not_made_again_under_a_running_host() {
    let fresh = Fresh::new().await;
    let mut sink = fresh.sink();
    let held = Some(sink.open(&claim(), None).await.unwrap().epoch);
    sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.unwrap();
    fresh.execute("ALTER TABLE headworks_positions RENAME TO aside").await;
    sink.commit(&rows([message("a", "2")]), &[advance(0, 1, 2)]).await.unwrap_err();
    let error = sink.open(&claim(), held).await.unwrap_err();
    assert!(matches!(&error, Error::Setup(text) if text.contains("are gone")), "{error:?}");
    fresh.execute("ALTER TABLE aside RENAME TO headworks_positions").await;
    assert_eq!(sink.open(&claim(), held).await.unwrap().positions, [position(0, 1)]);
}

/// As the docs grant it: a table that may be filled counts as filled.
#[tokio::test]
async fn a_user_that_may_not_read_the_table_does_not_fill_it_again_either() {
    let fresh = Fresh::with(
        "CREATE TABLE telemetry ({TABLE}) PARTITION BY RANGE (time); \
        CREATE TABLE part PARTITION OF telemetry DEFAULT",
    )
    .await;
    let role = format!("r{}", uuid::Uuid::new_v4().simple());
    fresh
        .execute(&format!(
            "CREATE ROLE {role} LOGIN PASSWORD 'x'; GRANT INSERT ON telemetry TO {role};
             GRANT CREATE ON SCHEMA public TO {role}"
        ))
        .await;
    let url = fresh.url.replacen("postgres://postgres@", &format!("postgres://{role}:x@"), 1);
    let mut sink = sink(Config { url: Url(url), ..fresh.config() });
    let held = Some(sink.open(&claim(), None).await.unwrap().epoch);
    fresh.execute("TRUNCATE headworks_positions").await;
    sink.open(&claim(), held).await.expect("the table is empty");
    sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.unwrap();
    fresh.execute("TRUNCATE headworks_positions").await;
    let error = sink.open(&claim(), held).await.unwrap_err();
    assert!(matches!(&error, Error::Setup(text) if text.contains("are gone")), "{error:?}");
    drop(sink);
    fresh.execute(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
}
