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
    assert!(matches!(&error, Error::Choose(text) if text.contains("are gone")), "{error:?}");
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
    assert!(matches!(&error, Error::Choose(text) if text.contains("are gone")), "{error:?}");
    drop(sink);
    fresh.execute(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
}

/// A trigger function that inserts its row into `readings`, and what it returns.
fn moves(returned: &str) -> String {
    format!(
        "CREATE TABLE readings ({{TABLE}});
         CREATE FUNCTION move() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
         BEGIN INSERT INTO readings VALUES (NEW.*); RETURN {returned}; END $$;"
    )
}

#[tokio::test]
async fn a_table_counts_as_filled_unless_it_is_certain_that_it_has_no_rows() {
    let (before, instead) = (moves("NULL"), moves("NEW"));
    // The last: whether it is certain before anything was written.
    for (sql, is_certain) in [
        (
            "CREATE TABLE telemetry ({TABLE}); ALTER TABLE telemetry ENABLE ROW LEVEL SECURITY;
             CREATE POLICY p ON telemetry FOR INSERT WITH CHECK (true)"
                .to_owned(),
            true,
        ),
        // Reading it fails.
        (
            "CREATE TABLE telemetry ({TABLE}); ALTER TABLE telemetry ENABLE ROW LEVEL SECURITY;
             CREATE POLICY r ON telemetry FOR SELECT USING (location = current_setting('app.tenant'));
             CREATE POLICY i ON telemetry FOR INSERT WITH CHECK (true)"
                .to_owned(),
            true,
        ),
        (
            "CREATE TABLE readings ({TABLE});
             CREATE VIEW telemetry AS SELECT * FROM readings WHERE value < 0"
                .to_owned(),
            true,
        ),
        (
            instead
                + "CREATE VIEW telemetry AS SELECT * FROM readings WHERE false;
                   CREATE TRIGGER t INSTEAD OF INSERT ON telemetry FOR EACH ROW EXECUTE FUNCTION move()",
            false,
        ),
        (
            before.clone()
                + "CREATE TABLE telemetry ({TABLE});
                   CREATE TRIGGER t BEFORE INSERT ON telemetry FOR EACH ROW EXECUTE FUNCTION move()",
            false,
        ),
        (
            before
                + "CREATE TABLE telemetry ({TABLE}) PARTITION BY RANGE (time);
                   CREATE TABLE part PARTITION OF telemetry DEFAULT;
                   CREATE TRIGGER t BEFORE INSERT ON part FOR EACH ROW EXECUTE FUNCTION move()",
            false,
        ),
        (
            "CREATE TABLE readings ({TABLE}); CREATE TABLE telemetry ({TABLE});
             CREATE FUNCTION move() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
             BEGIN INSERT INTO readings SELECT * FROM telemetry; DELETE FROM telemetry; RETURN NULL; END $$;
             CREATE TRIGGER t AFTER INSERT ON telemetry EXECUTE FUNCTION move()"
                .to_owned(),
            false,
        ),
        (
            "CREATE TABLE readings ({TABLE}); CREATE TABLE telemetry ({TABLE});
             CREATE RULE r AS ON INSERT TO telemetry DO INSTEAD INSERT INTO readings VALUES (NEW.*)"
                .to_owned(),
            false,
        ),
        // What says nothing about where rows are.
        (
            "CREATE TABLE devices (id TEXT PRIMARY KEY); INSERT INTO devices VALUES ('a');
             CREATE TABLE telemetry ({TABLE}, FOREIGN KEY (device_id) REFERENCES devices);
             INSERT INTO telemetry VALUES (now(), 'a', NULL, 'm', 1); DELETE FROM telemetry;
             CREATE FUNCTION stay() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
             CREATE TRIGGER t BEFORE UPDATE ON telemetry FOR EACH ROW EXECUTE FUNCTION stay()"
                .to_owned(),
            true,
        ),
    ] {
        let fresh = Fresh::with(&sql).await;
        let role = format!("r{}", uuid::Uuid::new_v4().simple());
        fresh
            .execute(&format!(
                "CREATE ROLE {role} LOGIN PASSWORD 'x'; GRANT INSERT, SELECT ON telemetry TO {role};
                 GRANT CREATE ON SCHEMA public TO {role}"
            ))
            .await;
        let url = fresh.url.replacen("postgres://postgres@", &format!("postgres://{role}:x@"), 1);
        let mut sink = sink(Config { url: Url(url), ..fresh.config() });
        let opened = sink.open(&claim(), None).await.unwrap();
        assert_eq!(opened.found.has_rows, !is_certain, "{sql}");
        sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.unwrap();
        fresh.execute("TRUNCATE headworks_positions").await;
        let error = sink.open(&claim(), Some(opened.epoch)).await.unwrap_err();
        assert!(matches!(&error, Error::Choose(text) if text.contains("are gone")), "{sql}: {error:?}");
        assert!(sink.open(&claim(), None).await.unwrap().found.has_rows, "{sql}");
        drop(sink);
        fresh.execute(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
    }
}

/// Each version on another page is one more entry of the index for each later move to look at.
#[tokio::test]
async fn most_moves_of_a_position_stay_on_their_page_while_a_snapshot_is_held() {
    const MOVES: u64 = 300;
    let fresh = Fresh::new().await;
    let mut sink = fresh.sink();
    let all = |from, to| (0..16).map(|partition| advance(partition, from, to)).collect::<Vec<_>>();
    sink.open(&Claim { partitions: 16, ..claim() }, None).await.unwrap();
    sink.commit(&Rows::default(), &all(0, 0)).await.unwrap();
    let reader = fresh.client().await;
    reader
        .batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM headworks_positions")
        .await
        .unwrap();
    for n in 0..MOVES {
        sink.commit(&Rows::default(), &all(n, n + 1)).await.unwrap();
    }
    // The server's process tells what it counted as it ends.
    drop(sink);
    let client = fresh.client().await;
    let counted =
        "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'headworks_positions'";
    let (moves, in_place) = loop {
        let row = client.query_one(counted, &[]).await.unwrap();
        let (moves, in_place): (i64, i64) = (row.get(0), row.get(1));
        if moves >= (MOVES * 16) as i64 {
            break (moves, in_place);
        }
    };
    assert!(in_place * 10 >= moves * 8, "{in_place} of {moves}");
}

#[tokio::test]
async fn positions_that_are_gone_are_missed_whatever_the_tables_name_is() {
    let fresh = Fresh::with("CREATE TABLE \"Site.1\" ({TABLE})").await;
    let mut sink = sink(Config { table: "\"Site.1\"".to_owned(), ..fresh.config() });
    let epoch = sink.open(&claim(), None).await.unwrap().epoch;
    sink.commit(&rows([("a", "1")]), &[advance(0, 0, 1)]).await.unwrap();
    fresh.lose_positions().await;
    let error = sink.open(&claim(), Some(epoch)).await.err().unwrap();
    assert!(matches!(&error, Error::Choose(text) if text.contains("are gone")), "{error:?}");
}
