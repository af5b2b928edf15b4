//! Values that are written in their text form mean the same whatever the session is set to.

use super::*;

const TABLE: &str = "CREATE TABLE telemetry (at TIMESTAMPTZ[], during TSTZRANGE, daily TIMETZ, days DATE[],
     stamps TIMESTAMP[], spans INTERVAL[], doc XML, device_id TEXT)";
const FIELDS: [(&str, &str); 8] = [
    ("at", "/at"),
    ("during", "/during"),
    ("daily", "/daily"),
    ("days", "/days"),
    ("stamps", "/stamps"),
    ("spans", "/spans"),
    ("doc", "/doc"),
    ("device_id", "$device"),
];
const PAYLOAD: &str = r#"{"at": ["2026-02-23T10:00:00", "2026-02-23T10:00:00+02:00"],
     "during": "[2026-02-23 10:00,2026-02-23 11:00)", "daily": "14:30", "days": ["2026-02-03"],
     "stamps": ["2026-02-23T10:00:00"], "spans": ["-1 2:00:00", null], "doc": "x<a/>"}"#;
const OTHERS: [&str; 6] = [
    "timezone = 'America/New_York'",
    "datestyle = 'SQL, DMY'",
    "intervalstyle = 'sql_standard'",
    "array_nulls = off",
    "xmloption = document",
    "client_encoding = 'LATIN1'",
];

/// The rows as UTC and ISO show them.
async fn shown(fresh: &Fresh) -> Vec<String> {
    let client = fresh.client().await;
    client
        .batch_execute("SET timezone = 'UTC'; SET datestyle = 'ISO'; SET intervalstyle = postgres")
        .await
        .unwrap();
    let rows = client.query("SELECT telemetry::text FROM telemetry", &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// What a message becomes where nothing is set.
async fn as_it_is() -> String {
    let fresh = Fresh::with(TABLE).await;
    let mut sink = sink(Config { columns: columns(&FIELDS), ..fresh.config() });
    sink.open(&claim(), None).await.unwrap();
    sink.commit(&rows([("d\u{e9}", PAYLOAD)]), &[advance(0, 0, 1)]).await.unwrap();
    let shown = shown(&fresh).await;
    assert!(shown[0].contains("2026-02-23 10:00:00+00") && shown[0].contains("d\u{e9}"), "{shown:?}");
    shown[0].clone()
}

#[tokio::test]
async fn text_forms_are_read_alike_whatever_the_role_is_set_to() {
    let fresh = Fresh::with(TABLE).await;
    let client = fresh.client().await;
    let database: String = client.query_one("SELECT current_database()::text", &[]).await.unwrap().get(0);
    for other in OTHERS {
        client.batch_execute(&format!("ALTER DATABASE {database} SET {other}")).await.unwrap();
    }
    let mut sink = sink(Config { columns: columns(&FIELDS), ..fresh.config() });
    sink.open(&claim(), None).await.unwrap();
    sink.commit(&rows([("d\u{e9}", PAYLOAD)]), &[advance(0, 0, 1)]).await.unwrap();
    assert_eq!(shown(&fresh).await, [as_it_is().await]);
}

#[tokio::test]
async fn text_forms_are_read_alike_whatever_a_trigger_sets() {
    let sets = OTHERS.map(|other| format!("SET {other};")).concat();
    for when in ["BEFORE", "AFTER"] {
        let fresh = Fresh::with(&format!(
            "{TABLE}; CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN {sets} IF NEW.device_id = 'bad' THEN RAISE 'no'; END IF; RETURN NEW; END $$;
             CREATE TRIGGER t {when} INSERT ON telemetry FOR EACH ROW EXECUTE FUNCTION f()"
        ))
        .await;
        let mut sink = sink(Config { columns: columns(&FIELDS), ..fresh.config() });
        sink.open(&claim(), None).await.unwrap();
        let one = rows([("d\u{e9}", PAYLOAD)]);
        sink.commit(&one, &[advance(0, 0, 1)]).await.unwrap();
        sink.commit(&one, &[advance(0, 1, 2)]).await.unwrap();
        // Isolated: row by row, since a trigger after the rows does not tell which is bad.
        let mixed = rows((0..40).map(|n| (if n % 10 == 3 { "bad" } else { "d\u{e9}" }, PAYLOAD)));
        let refused = rejected(sink.commit(&mixed, &[advance(0, 2, 42)]).await);
        assert_eq!(refused.iter().map(|row| row.row).collect::<Vec<_>>(), [3, 13, 23, 33]);
        sink.finish().await.unwrap();
        assert_eq!(shown(&fresh).await, vec![as_it_is().await; 38], "{when}");
    }
}

/// A scalar column refuses the same text.
#[tokio::test]
async fn a_date_that_does_not_say_which_part_is_the_month_is_rejected() {
    let fresh = Fresh::with("CREATE TABLE telemetry (device_id TEXT, days DATE[])").await;
    let fields = columns(&[("device_id", "$device"), ("days", "/days")]);
    let mut sink = sink(Config { columns: fields, ..fresh.config() });
    sink.open(&claim(), None).await.unwrap();
    let days = rows([("a", r#"{"days": ["02/03/2026"]}"#), ("b", r#"{"days": ["2026-03-02"]}"#)]);
    let refused = rejected(sink.commit(&days, &[advance(0, 0, 2)]).await);
    assert_eq!(refused.iter().map(|row| row.row).collect::<Vec<_>>(), [0]);
    assert!(refused[0].reason.contains("column \"days\""), "{refused:?}");
}

#[tokio::test]
async fn a_time_without_a_zone_is_utc_in_columns_and_defaults() {
    let fresh = Fresh::with(
        "CREATE TABLE telemetry (device_id TEXT, at TIMESTAMP, made TIMESTAMP DEFAULT localtimestamp,
                                 made_at TIMESTAMPTZ DEFAULT now())",
    )
    .await;
    let client = fresh.client().await;
    let database: String = client.query_one("SELECT current_database()::text", &[]).await.unwrap().get(0);
    client.batch_execute(&format!("ALTER DATABASE {database} SET timezone = 'Asia/Kolkata'")).await.unwrap();
    let fields = columns(&[("device_id", "$device"), ("at", "/at")]);
    let mut sink = sink(Config { columns: fields, ..fresh.config() });
    sink.open(&claim(), None).await.unwrap();
    let at = rows([("a", r#"{"at": "2026-02-23T12:00:00+02:00"}"#)]);
    sink.commit(&at, &[advance(0, 0, 1)]).await.unwrap();
    let sql = "SELECT at = '2026-02-23 10:00:00', made = made_at AT TIME ZONE 'UTC' FROM telemetry";
    let row = client.query_one(sql, &[]).await.unwrap();
    assert_eq!((row.get(0), row.get(1)), (true, true));
}
