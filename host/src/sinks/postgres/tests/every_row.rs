//! What concerns every row of a table is set-up, and no row is rejected for it.

use super::*;

fn is_setup(outcome: &Result<Outcome, Error>, expected: &str) -> bool {
    matches!(outcome, Err(Error::Setup(text)) if text.contains(expected))
}

#[tokio::test]
async fn a_missing_partition_of_a_key_that_the_table_fills_itself_is_no_bad_row() {
    const FILLED: &str = "{TABLE}, id BIGSERIAL, created_at TIMESTAMPTZ NOT NULL DEFAULT now()";
    const ALL: &str = "CREATE TABLE rest PARTITION OF telemetry DEFAULT";
    for key in [
        "RANGE (created_at)",
        "RANGE (id)",
        "RANGE (created_at, id)",
        "RANGE (date_trunc('day', created_at AT TIME ZONE 'UTC'))",
    ] {
        let fresh = Fresh::with(&format!("CREATE TABLE telemetry ({FILLED}) PARTITION BY {key}")).await;
        let mut sink = fresh.sink();
        let batch = rows([("a", "1"), ("b", "2"), ("a", "3")]);
        sink.open(&claim(), None).await.unwrap();
        let outcome = sink.commit(&batch, &[advance(0, 0, 3)]).await;
        assert!(is_setup(&outcome, "create the partition"), "{key}: {outcome:?}");
        fresh.execute(ALL).await;
        sink.open(&claim(), None).await.unwrap();
        let outcome = sink.commit(&batch, &[advance(0, 0, 3)]).await.unwrap();
        assert_eq!(outcome, Outcome::Committed(Written { written: 3, ignored: 0 }), "{key}");
    }
}

#[tokio::test]
async fn a_row_that_decides_about_its_partition_is_rejected_alone() {
    for (table, prepare) in [
        // A part of the key is of the row.
        (
            "CREATE TABLE telemetry ({TABLE}, created_at TIMESTAMPTZ DEFAULT now()) PARTITION BY RANGE (device_id, created_at)",
            "CREATE TABLE a PARTITION OF telemetry FOR VALUES FROM ('a', MINVALUE) TO ('b', MINVALUE)",
        ),
        // Another table than the sink's, which a trigger fills with what it finds in the row.
        (
            "CREATE TABLE telemetry ({TABLE}); CREATE TABLE daily (name TEXT) PARTITION BY LIST (name);
             CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN INSERT INTO daily VALUES (NEW.device_id); RETURN NEW; END $$;
             CREATE TRIGGER t BEFORE INSERT ON telemetry FOR EACH ROW EXECUTE FUNCTION f()",
            "CREATE TABLE a PARTITION OF daily FOR VALUES IN ('a')",
        ),
    ] {
        let fresh = Fresh::with(table).await;
        fresh.execute(prepare).await;
        let mut sink = fresh.sink();
        sink.open(&claim(), None).await.unwrap();
        let refused = rejected(sink.commit(&rows([("a", "1"), ("z", "2")]), &[advance(0, 0, 2)]).await);
        assert_eq!(refused.iter().map(|row| row.row).collect::<Vec<_>>(), [1], "{table}: {refused:?}");
        assert_eq!(sink.finish().await.unwrap().written, 1);
    }
}

#[tokio::test]
async fn a_default_or_a_trigger_that_fails_for_every_row_is_set_up_until_it_is_mended() {
    for (sql, code, mend) in [
        (
            "CREATE TABLE telemetry (id SMALLSERIAL, {TABLE}); SELECT setval('telemetry_id_seq', 32766)",
            "2200H",
            "ALTER TABLE telemetry ALTER id TYPE bigint; ALTER SEQUENCE telemetry_id_seq AS bigint",
        ),
        (
            "CREATE SEQUENCE numbers START 2147483646;
             CREATE TABLE telemetry (id INTEGER DEFAULT nextval('numbers'), {TABLE})",
            "22003",
            "ALTER TABLE telemetry ALTER id TYPE bigint",
        ),
        (
            "CREATE TABLE telemetry (site VARCHAR(3) DEFAULT current_setting('application_name'), {TABLE})",
            "22001",
            "ALTER TABLE telemetry ALTER site TYPE text",
        ),
        // INCLUDE columns are not of the key.
        (
            "CREATE TABLE telemetry (id SERIAL, {TABLE}, PRIMARY KEY (id) INCLUDE (device_id));
             INSERT INTO telemetry SELECT n, now(), 'a', '', '', 0 FROM generate_series(1, 1000) AS n",
            "23505",
            "SELECT setval('telemetry_id_seq', 1000)",
        ),
        // What the predicate asks is of the table, too.
        (
            "CREATE TABLE telemetry (id SERIAL, {TABLE}, deleted_at TIMESTAMPTZ);
             CREATE UNIQUE INDEX numbers ON telemetry (id) WHERE deleted_at IS NULL;
             INSERT INTO telemetry SELECT n, now(), 'a', '', '', 0 FROM generate_series(1, 1000) AS n",
            "23505",
            "SELECT setval('telemetry_id_seq', 1000)",
        ),
        // A function of this name elsewhere is not the default's.
        (
            "CREATE SCHEMA other; CREATE FUNCTION other.now() RETURNS int LANGUAGE sql VOLATILE AS 'SELECT 1';
             CREATE TABLE telemetry ({TABLE}, at TIMESTAMPTZ DEFAULT now() CHECK (at < '2020-01-01'))",
            "23514",
            "ALTER TABLE telemetry ALTER at SET DEFAULT '2019-01-01'",
        ),
        // As after a restore without the sequence.
        (
            "CREATE TABLE telemetry (id SERIAL PRIMARY KEY, {TABLE});
             INSERT INTO telemetry SELECT n, now(), 'a', '', '', 0 FROM generate_series(1, 1000) AS n",
            "23505",
            "SELECT setval('telemetry_id_seq', 1000)",
        ),
        (
            "CREATE TABLE sites (id INTEGER PRIMARY KEY);
             CREATE TABLE telemetry ({TABLE}, site INTEGER DEFAULT 7 REFERENCES sites)",
            "23503",
            "INSERT INTO sites VALUES (7)",
        ),
        (
            "CREATE TABLE telemetry ({TABLE}, site INTEGER DEFAULT 7 CHECK (site < 5))",
            "23514",
            "ALTER TABLE telemetry ALTER site SET DEFAULT 3",
        ),
        (
            "CREATE TABLE telemetry ({TABLE}, site TEXT NOT NULL DEFAULT current_setting('app.site', true))",
            "23502",
            "ALTER TABLE telemetry ALTER site SET DEFAULT 'x'",
        ),
        (
            "CREATE TABLE telemetry ({TABLE});
             CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NULL; END $$;
             CREATE TRIGGER t BEFORE INSERT ON telemetry FOR EACH ROW EXECUTE FUNCTION f()",
            "2F005",
            "DROP TRIGGER t ON telemetry",
        ),
    ] {
        let fresh = Fresh::with(sql).await;
        let mut sink = fresh.sink();
        let batch = rows([("a", "1"), ("b", "2"), ("a", "3")]);
        sink.open(&claim(), None).await.unwrap();
        let outcome = sink.commit(&batch, &[advance(0, 0, 3)]).await;
        assert!(is_setup(&outcome, code), "{outcome:?}");
        fresh.execute(mend).await;
        sink.open(&claim(), None).await.unwrap();
        let outcome = sink.commit(&batch, &[advance(0, 0, 3)]).await.unwrap();
        assert_eq!(outcome, Outcome::Committed(Written { written: 3, ignored: 0 }), "{code}");
    }
}

#[tokio::test]
async fn a_row_whose_number_of_the_table_is_taken_is_not_there_already() {
    let unique = "UNIQUE (device_id, value),";
    let triggers = "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$;
         CREATE TRIGGER a AFTER INSERT ON telemetry FOR EACH ROW EXECUTE FUNCTION f();
         CREATE TRIGGER b BEFORE UPDATE ON telemetry FOR EACH ROW EXECUTE FUNCTION f();
         CREATE TRIGGER c AFTER INSERT ON telemetry FOR EACH STATEMENT EXECUTE FUNCTION f();";
    for (keys, triggers) in [("", ""), (unique, ""), ("", triggers), (unique, triggers)] {
        let fresh = Fresh::with(&format!(
            "CREATE TABLE telemetry (id SERIAL PRIMARY KEY, {keys} {{TABLE}}); {triggers}
             INSERT INTO telemetry SELECT n, now(), n, '', '', 0 FROM generate_series(1, 1000) AS n"
        ))
        .await;
        let ignore = Config { on_conflict: OnConflict::Ignore, ..fresh.config() };
        let mut sink = sink(ignore);
        sink.open(&claim(), None).await.unwrap();
        let batch = rows([("a", "1"), ("b", "2"), ("a", "3")]);
        let outcome = sink.commit(&batch, &[advance(0, 0, 3)]).await;
        match triggers {
            "" => assert!(is_setup(&outcome, "23505"), "{keys}: {outcome:?}"),
            // A trigger may have set it: rejected, and not left out.
            _ => assert_eq!(rejected(outcome).len(), 3, "{keys}"),
        }
        fresh.execute("SELECT setval('telemetry_id_seq', 1000)").await;
        sink.open(&claim(), None).await.unwrap();
        let outcome = sink.commit(&batch, &[advance(0, 0, 3)]).await.unwrap();
        assert_eq!(outcome, Outcome::Committed(Written { written: 3, ignored: 0 }), "{keys}");
        let outcome = sink.commit(&batch, &[advance(0, 3, 6)]).await.unwrap();
        let ignored = if keys.is_empty() { 0 } else { 3 };
        assert_eq!(outcome, Outcome::Committed(Written { written: 3 - ignored, ignored }), "{keys}");
    }
}

#[tokio::test]
async fn a_row_meets_another_at_a_key_below_a_view() {
    let fresh = Fresh::with(
        "CREATE TABLE readings ({TABLE}, PRIMARY KEY (device_id, value)); CREATE VIEW telemetry AS SELECT * FROM readings",
    )
    .await;
    let ignore = Config { on_conflict: OnConflict::Ignore, ..fresh.config() };
    let mut sink = sink(ignore);
    sink.open(&claim(), None).await.unwrap();
    let outcome = sink.commit(&rows([("a", "1"), ("a", "1")]), &[advance(0, 0, 2)]).await.unwrap();
    assert_eq!(outcome, Outcome::Committed(Written { written: 1, ignored: 1 }));
}

/// A key of what the table makes of a row is the row's.
#[tokio::test]
async fn a_row_meets_another_at_a_key_that_the_table_computes_of_it() {
    let trigger = "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN NEW.uid := NEW.device_id || NEW.value; RETURN NEW; END $$;
         CREATE TRIGGER t BEFORE INSERT ON telemetry FOR EACH ROW EXECUTE FUNCTION f()";
    for sql in [
        "CREATE TABLE telemetry (id SERIAL PRIMARY KEY, {TABLE},
                                 uid TEXT GENERATED ALWAYS AS (device_id || value) STORED UNIQUE)",
        &format!("CREATE TABLE telemetry ({{TABLE}}, uid TEXT UNIQUE); {trigger}"),
    ] {
        let fresh = Fresh::with(sql).await;
        let mut sink = sink(Config { on_conflict: OnConflict::Ignore, ..fresh.config() });
        sink.open(&claim(), None).await.unwrap();
        let outcome = sink.commit(&rows([("a", "1"), ("a", "1")]), &[advance(0, 0, 2)]).await.unwrap();
        assert_eq!(outcome, Outcome::Committed(Written { written: 1, ignored: 1 }), "{sql}");
    }
}

#[tokio::test]
async fn a_default_that_is_drawn_anew_for_each_row_holds_no_other_row_up() {
    for draw in ["draw()", "nextval('draws') % 5"] {
        let fresh = Fresh::with(&format!(
            "CREATE SEQUENCE draws;
             CREATE FUNCTION draw() RETURNS bigint LANGUAGE sql VOLATILE AS $$ SELECT nextval('draws') % 5 $$;
             CREATE TABLE telemetry ({{TABLE}}, code BIGINT DEFAULT {draw} CHECK (code <> 3))"
        ))
        .await;
        let mut sink = fresh.sink();
        sink.open(&claim(), None).await.unwrap();
        let batch = rows((0..20).map(|_| ("a", "1")));
        let refused = rejected(sink.commit(&batch, &[advance(0, 0, 20)]).await).len() as u64;
        let written = sink.finish().await.unwrap().written;
        assert!(written > 0 && written + refused == 20, "{draw}: {written} written, {refused} refused");
    }
}

/// PostgreSQL asks for no right on what a default names.
#[tokio::test]
async fn a_default_out_of_a_schema_that_the_writer_may_not_use_is_filled() {
    let fresh = Fresh::with(
        "CREATE SCHEMA private; CREATE TYPE private.kind AS ENUM ('new', 'seen');
         CREATE FUNCTION private.shift() RETURNS int LANGUAGE sql AS 'SELECT 3';
         CREATE TABLE telemetry ({TABLE}, kind private.kind DEFAULT 'new', shift INT DEFAULT private.shift(),
                                 inverse FLOAT8 GENERATED ALWAYS AS (1 / (value - 50)) STORED)",
    )
    .await;
    let writer = super::check::Writer::new(&fresh).await;
    let mut sink = sink(writer.config());
    writer.follow("GRANT CREATE, USAGE ON SCHEMA public TO PUBLIC").await;
    writer.follow("GRANT INSERT ON telemetry TO PUBLIC").await;
    sink.open(&claim(), None).await.unwrap();
    let refused = rejected(sink.commit(&rows([("a", "1"), ("b", "50")]), &[advance(0, 0, 2)]).await);
    assert_eq!(refused.iter().map(|row| row.row).collect::<Vec<_>>(), [1], "{refused:?}");
    assert_eq!(sink.finish().await.unwrap().written, 1);
    drop(sink);
    writer.end().await;
}

#[tokio::test]
async fn a_sequence_that_ends_amid_the_rows_beside_a_bad_one_rejects_none_of_them() {
    for (id, mend) in [
        ("SMALLINT", "ALTER SEQUENCE numbers AS bigint; ALTER TABLE telemetry ALTER id TYPE bigint"),
        ("BIGINT", "ALTER TABLE telemetry ALTER id TYPE bigint"),
    ] {
        let fresh = Fresh::with(&format!(
            "CREATE SEQUENCE numbers AS {id} START 32764;
             CREATE TABLE telemetry (id SMALLINT DEFAULT nextval('numbers'), {{TABLE}}, CHECK (value > 0))"
        ))
        .await;
        let mut sink = fresh.sink();
        sink.open(&claim(), None).await.unwrap();
        // The bad row alone takes two of the four numbers that are left.
        let batch = rows(["-1", "1", "2", "3", "4", "5"].map(|value| ("a", value)));
        let outcome = sink.commit(&batch, &[advance(0, 0, 6)]).await;
        assert!(matches!(outcome, Err(Error::Setup(_))), "{id}: {outcome:?}");
        fresh.execute(mend).await;
        sink.open(&claim(), None).await.unwrap();
        let refused = rejected(sink.commit(&batch, &[advance(0, 0, 6)]).await);
        assert_eq!(refused.iter().map(|row| row.row).collect::<Vec<_>>(), [0], "{id}");
        assert_eq!(sink.finish().await.unwrap().written, 5);
    }
}

#[tokio::test]
async fn a_column_that_the_table_fills_of_what_the_row_holds_rejects_that_row_alone() {
    let trigger = "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN NEW.site := NEW.device_id; RETURN NEW; END $$;
         CREATE TRIGGER t BEFORE INSERT ON telemetry FOR EACH ROW EXECUTE FUNCTION f()";
    let after = "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN UPDATE telemetry SET site = NEW.device_id WHERE device_id = NEW.device_id; RETURN NULL; END $$;
         CREATE TRIGGER t AFTER INSERT ON telemetry FOR EACH ROW EXECUTE FUNCTION f()";
    for sql in [
        "CREATE TABLE telemetry ({TABLE}, twice FLOAT8 GENERATED ALWAYS AS (2 * value) STORED CHECK (twice < 100))",
        "CREATE TABLE telemetry ({TABLE}, twice SMALLINT GENERATED ALWAYS AS (1000 * value) STORED)",
        "CREATE TABLE telemetry ({TABLE}, site TEXT DEFAULT 'x', UNIQUE (value, site))",
        &format!("CREATE TABLE telemetry ({{TABLE}}, site TEXT DEFAULT 'x' CHECK (site <> 'b')); {trigger}"),
        &format!("CREATE TABLE telemetry ({{TABLE}}, site VARCHAR(3) DEFAULT 'x'); {trigger}"),
        &format!("CREATE TABLE telemetry ({{TABLE}}, site TEXT DEFAULT 'x' CHECK (site <> 'b')); {after}"),
    ] {
        let fresh = Fresh::with(sql).await;
        let mut sink = fresh.sink();
        sink.open(&claim(), None).await.unwrap();
        let taken = if sql.contains("UNIQUE") { "70" } else { "1" };
        sink.commit(&rows([("c", taken)]), &[advance(0, 0, 1)]).await.unwrap();
        let device = if sql.contains("VARCHAR") { "long" } else { "b" };
        let refused = rejected(sink.commit(&rows([("a", "1"), (device, "70")]), &[advance(0, 1, 3)]).await);
        assert_eq!(refused.iter().map(|row| row.row).collect::<Vec<_>>(), [1], "{sql}: {refused:?}");
        assert_eq!(sink.finish().await.unwrap().written, 1);
    }
}

/// Partitions as they were made before PostgreSQL 10, by a trigger.
#[tokio::test]
async fn a_table_that_a_trigger_misses_is_of_the_row_where_others_are_written_and_else_set_up() {
    let fresh = Fresh::with(
        "CREATE TABLE telemetry ({TABLE}); CREATE TABLE telemetry_a () INHERITS (telemetry);
         CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN EXECUTE 'INSERT INTO telemetry_' || NEW.device_id || ' VALUES ($1.*)' USING NEW; RETURN NULL; END $$;
         CREATE TRIGGER t BEFORE INSERT ON telemetry FOR EACH ROW EXECUTE FUNCTION f()",
    )
    .await;
    let mut sink = fresh.sink();
    sink.open(&claim(), None).await.unwrap();
    let refused = rejected(sink.commit(&rows([("a", "1"), ("b", "2")]), &[advance(0, 0, 2)]).await);
    let of: Vec<_> = refused.iter().map(|row| (row.row, row.code.as_deref())).collect();
    assert_eq!(of, [(1, Some("42P01"))]);
    sink.finish().await.unwrap();
    let outcome = sink.commit(&rows([("b", "3"), ("b", "4")]), &[advance(0, 2, 4)]).await;
    assert!(is_setup(&outcome, "telemetry_b"), "{outcome:?}");
    assert_eq!(fresh.written().await, [("a".to_owned(), 1.0)]);
}
