//! What concerns the rows of one device, one partition or one foreign server holds no other rows up.

use super::*;

/// Commits until the sink answers something else than that it tries again, as a pipeline does.
async fn commit(sink: &mut PostgresSink, batch: &Rows, from: u64) -> Result<Outcome, Error> {
    for _ in 0..10 {
        sink.open(&claim(), None).await?;
        match sink.commit(batch, &[advance(0, from, from + batch.len() as u64)]).await {
            Err(Error::Retry(_)) => {}
            outcome => return outcome,
        }
    }
    panic!("the sink tries again for ever");
}

fn refused_rows(outcome: Result<Outcome, Error>) -> Vec<usize> {
    rejected(outcome).iter().map(|row| row.row).collect()
}

#[tokio::test]
async fn a_row_meets_another_at_a_key_whose_predicate_asks_what_it_holds() {
    let fresh = || {
        Fresh::with(
            "CREATE TABLE telemetry ({TABLE}, day DATE DEFAULT CURRENT_DATE, PRIMARY KEY (device_id, value));
             CREATE UNIQUE INDEX daily ON telemetry (day) WHERE device_id = 'total'",
        )
    };
    for on_conflict in [OnConflict::Ignore, OnConflict::Reject] {
        let fresh = fresh().await;
        let mut sink = sink(Config { on_conflict, ..fresh.config() });
        sink.open(&claim(), None).await.unwrap();
        sink.commit(&rows([("total", "1"), ("a", "1")]), &[advance(0, 0, 2)]).await.unwrap();
        let outcome = sink.commit(&rows([("total", "2"), ("a", "2"), ("b", "3")]), &[advance(0, 2, 5)]).await;
        if on_conflict == OnConflict::Ignore {
            assert_eq!(outcome.unwrap(), Outcome::Committed(Written { written: 2, ignored: 1 }));
        } else {
            assert_eq!(refused_rows(outcome), [0]);
            assert_eq!(sink.finish().await.unwrap().written, 2);
        }
    }
}

#[tokio::test]
async fn a_key_that_a_trigger_fills_counts_beside_one_of_the_row() {
    let fresh = Fresh::with(
        "CREATE TABLE telemetry ({TABLE}, hash TEXT UNIQUE, PRIMARY KEY (device_id, value));
         CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.hash := NEW.device_id; RETURN NEW; END $$;
         CREATE TRIGGER t BEFORE INSERT ON telemetry FOR EACH ROW EXECUTE FUNCTION f()",
    )
    .await;
    let mut sink = sink(Config { on_conflict: OnConflict::Ignore, ..fresh.config() });
    sink.open(&claim(), None).await.unwrap();
    let outcome =
        sink.commit(&rows([("a", "1"), ("a", "2"), ("b", "3")]), &[advance(0, 0, 3)]).await.unwrap();
    assert_eq!(outcome, Outcome::Committed(Written { written: 2, ignored: 1 }));
}

#[tokio::test]
async fn what_a_partition_asks_for_itself_concerns_its_rows_alone() {
    for own in [
        "ALTER TABLE b ALTER checked_by SET NOT NULL",
        "ALTER TABLE b ADD CONSTRAINT frozen CHECK (archived)",
        "CREATE UNIQUE INDEX one ON b (archived); INSERT INTO b SELECT now(), 'b', '', '', 0",
        "ALTER TABLE b ADD FOREIGN KEY (archived) REFERENCES closed",
        // Below a partition.
        "DROP TABLE b; CREATE TABLE b PARTITION OF telemetry FOR VALUES IN ('b') PARTITION BY RANGE (created_at)",
    ] {
        let fresh = Fresh::with(
            "CREATE TABLE closed (is_closed BOOLEAN PRIMARY KEY);
             CREATE TABLE telemetry ({TABLE}, archived BOOLEAN DEFAULT false, checked_by TEXT,
                                     created_at TIMESTAMPTZ DEFAULT now()) PARTITION BY LIST (device_id);
             CREATE TABLE a PARTITION OF telemetry FOR VALUES IN ('a');
             CREATE TABLE b PARTITION OF telemetry FOR VALUES IN ('b')",
        )
        .await;
        fresh.execute(own).await;
        let mut sink = fresh.sink();
        let outcome = commit(&mut sink, &rows([("a", "1"), ("b", "2"), ("a", "3")]), 0).await;
        assert_eq!(refused_rows(outcome), [1], "{own}");
        assert_eq!(sink.finish().await.unwrap().written, 2, "{own}");
    }
}

#[tokio::test]
async fn what_a_partition_has_from_the_table_concerns_every_row() {
    for (of_table, mend) in [
        (
            "checked_by TEXT NOT NULL DEFAULT current_setting('app.by', true)",
            "ALTER checked_by SET DEFAULT 'x'",
        ),
        ("archived BOOLEAN DEFAULT false, CHECK (archived)", "ALTER archived SET DEFAULT true"),
        ("closed BOOLEAN DEFAULT true REFERENCES closed", "ALTER closed SET DEFAULT NULL"),
    ] {
        let fresh = Fresh::with(&format!(
            "CREATE TABLE closed (is_closed BOOLEAN PRIMARY KEY);
             CREATE TABLE telemetry ({{TABLE}}, {of_table}) PARTITION BY LIST (device_id);
             CREATE TABLE a PARTITION OF telemetry FOR VALUES IN ('a');
             CREATE TABLE b PARTITION OF telemetry FOR VALUES IN ('b') PARTITION BY LIST (value);
             CREATE TABLE below PARTITION OF b DEFAULT"
        ))
        .await;
        let mut sink = fresh.sink();
        let batch = rows([("b", "1"), ("a", "2"), ("b", "3")]);
        let outcome = commit(&mut sink, &batch, 0).await;
        assert!(matches!(outcome, Err(Error::Setup(_))), "{of_table}: {outcome:?}");
        fresh.execute(&format!("ALTER TABLE telemetry {mend}")).await;
        let outcome = commit(&mut sink, &batch, 0).await.unwrap();
        assert_eq!(outcome, Outcome::Committed(Written { written: 3, ignored: 0 }), "{of_table}");
    }
}

/// As of a trigger that reads a file or another server, or of a foreign table.
#[tokio::test]
async fn a_row_whose_foreign_server_fails_is_rejected_once_others_are_written_beside_it() {
    for code in ["HV00L", "58P01", "08001"] {
        let fresh = Fresh::with(&format!(
            "CREATE TABLE telemetry ({{TABLE}});
             CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             IF NEW.device_id = 'b' THEN RAISE 'no server of b' USING ERRCODE = '{code}'; END IF; RETURN NEW; END $$;
             CREATE TRIGGER t BEFORE INSERT ON telemetry FOR EACH ROW EXECUTE FUNCTION f()"
        ))
        .await;
        let mut sink = fresh.sink();
        sink.open(&claim(), None).await.unwrap();
        let batch = rows([("a", "1"), ("b", "2"), ("a", "3")]);
        let outcome = sink.commit(&batch, &[advance(0, 0, 3)]).await;
        assert!(matches!(outcome, Err(Error::Retry(_))), "the server may be back soon: {outcome:?}");
        assert_eq!(refused_rows(commit(&mut sink, &batch, 0).await), [1], "{code}");
        assert_eq!(sink.finish().await.unwrap().written, 2);
        // Where none is written, nothing tells that it is not the server.
        let outcome = commit(&mut sink, &rows([("b", "4"), ("b", "5")]), 3).await;
        assert!(matches!(outcome, Err(Error::Setup(_))), "{outcome:?}");
        assert_eq!(
            refused_rows(commit(&mut sink, &rows([("b", "4"), ("b", "5"), ("a", "6")]), 3).await),
            [0, 1]
        );
    }
}

#[tokio::test]
async fn keys_and_triggers_that_a_partition_gets_while_the_sink_runs_count() {
    let key = "CREATE UNIQUE INDEX ON a (device_id, value)";
    let trigger = "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN NEW.hash := NEW.device_id; RETURN NEW; END $$;
         CREATE TRIGGER t BEFORE INSERT ON a FOR EACH ROW EXECUTE FUNCTION f()";
    for (before, change) in [("", key), ("CREATE UNIQUE INDEX ON a (hash)", trigger)] {
        let fresh = Fresh::with(&format!(
            "CREATE TABLE telemetry ({{TABLE}}, hash TEXT DEFAULT md5(random()::text)) PARTITION BY LIST (device_id);
             CREATE TABLE a PARTITION OF telemetry FOR VALUES IN ('a'); {before}"
        ))
        .await;
        let mut sink = sink(Config { on_conflict: OnConflict::Ignore, ..fresh.config() });
        sink.open(&claim(), None).await.unwrap();
        sink.commit(&rows([("a", "1")]), &[advance(0, 0, 1)]).await.unwrap();
        fresh.execute(change).await;
        let mut from = 1;
        if change == trigger {
            sink.commit(&rows([("a", "1")]), &[advance(0, 1, 2)]).await.unwrap();
            from = 2;
        }
        let outcome = commit(&mut sink, &rows([("a", "1")]), from).await.unwrap();
        assert_eq!(outcome, Outcome::Committed(Written { written: 0, ignored: 1 }), "{change}");
    }
}
