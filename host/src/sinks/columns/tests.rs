use super::*;
use crate::sinks::conformance::{RECEIVED_US, batch};

fn columns(yaml_like: &[(&str, &str)]) -> Columns {
    let config =
        yaml_like.iter().map(|(name, from)| ((*name).to_owned(), ColumnConfig::Source((*from).to_owned())));
    Columns::new(&ColumnsConfig(config.collect()), Arc::default())
}

/// Every value as text, or the reason.
fn read(columns: &Columns, payload: &str) -> Result<Vec<Option<String>>, String> {
    let batch = batch([("sensor-4a3b", payload)]);
    let mut values = Vec::new();
    columns
        .reader()
        .read(0, batch.message(0), |_, value| {
            values.push(value.text().map(|text| text.into_owned()));
            Ok(())
        })
        .map(|()| values)
        .map_err(|refused| refused.reason)
}

/// As a sink with typed columns sees the default table's `value`.
fn value_of(payload: &str) -> Result<f64, String> {
    let columns = Columns::new(&ColumnsConfig::default(), Arc::default());
    let batch = batch([("sensor-4a3b", payload)]);
    let mut number = f64::NAN;
    columns
        .reader()
        .read(7, batch.message(0), |i, value| {
            if i == 4 {
                number = value.f64().ok_or(Mismatch("a number"))?;
            }
            Ok(())
        })
        .map(|()| number)
        .map_err(|refused| refused.reason)
}

#[test]
fn the_default_columns_are_the_reference_table() {
    let columns = Columns::new(&ColumnsConfig::default(), Arc::default());
    let row =
        read(&columns, r#"{"device_id":"x","value":21.5,"metric":"temperature_c","location":"hall 2"}"#);
    let mut time = String::new();
    write_time(RECEIVED_US as i64, &mut time).unwrap();
    let expected = [&time, "sensor-4a3b", "hall 2", "temperature_c", "21.5"];
    assert_eq!(row.unwrap(), expected.map(|text| Some(text.to_owned())));
    assert_eq!(time, "2026-02-23 10:00:00.123456Z");
}

#[test]
fn a_bare_number_is_a_value_and_the_topic_its_metric() {
    assert_eq!(value_of("21.5"), Ok(21.5));
    let columns = Columns::new(&ColumnsConfig::default(), Arc::default());
    let row = read(&columns, "21.5").unwrap();
    assert_eq!((row[2].as_deref(), row[3].as_deref()), (None, Some("reading")));
}

/// The table of numbers in payloads.md is held to what columns take.
#[test]
fn numbers_are_those_that_the_page_on_payloads_names() {
    let page = include_str!("../../../docs/payloads.md");
    let (_, table) = page.split_once("| payload | in a column of type `double` |").expect("the table");
    let mut checked = 0;
    for row in table.lines().skip(2).take_while(|line| line.starts_with('|')) {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        let [payloads, double, bigint] = cells[..] else { panic!("{row}") };
        for payload in payloads.split('`').skip(1).step_by(2) {
            let in_object = format!("{{\"location\":\"x\",\"value\":{payload}}}");
            for payload in [payload, &in_object] {
                match double.parse::<f64>() {
                    Ok(number) => assert_eq!(value_of(payload), Ok(number), "{payload}"),
                    Err(_) => {
                        let reason = value_of(payload).unwrap_err();
                        assert!(reason.starts_with("column \"value\": "), "{payload}: {reason}");
                    }
                }
            }
            let whole = crate::sinks::columns::Value::Payload(payload.as_bytes()).i64();
            assert_eq!(whole, bigint.parse().ok(), "{payload}");
            checked += 1;
        }
    }
    assert!(checked > 15, "{checked}");
    // A column of text keeps each.
    let text = columns(&[("raw", "$payload")]);
    assert_eq!(read(&text, " +21,5 "), Ok(vec![Some(" +21,5 ".to_owned())]));
}

#[test]
fn a_reason_names_column_and_payload() {
    for (payload, expected) in [
        (
            "{\"device_id\": \"x\"}",
            "column \"value\": the payload has no number at /value: {\"device_id\": \"x\"}; fill it from another field with `columns:` (host/docs/payloads.md)",
        ),
        (
            "{\"value\": null}",
            "column \"value\": the payload has no number at /value: {\"value\": null}; fill it from another field with `columns:` (host/docs/payloads.md)",
        ),
        ("{\"value\": \"hot\"}", "column \"value\": /value is not a number: \"hot\""),
        ("ping", "column \"value\": the payload is not a number: ping"),
        (
            "",
            "column \"value\": the payload is empty, it has no number at /value: ; a column can hold it whole (`$payload`, host/docs/payloads.md)",
        ),
        (
            "[1]",
            "column \"value\": the payload is an array (one message is one row), it has no number at /value: [1]; a column can hold it whole (`$payload`, host/docs/payloads.md)",
        ),
    ] {
        assert_eq!(value_of(payload).unwrap_err(), expected);
    }
    let broken = value_of("{\"value\": 1").unwrap_err();
    assert!(broken.starts_with("column \"value\": the payload is not JSON: "), "{broken}");
    let ended = value_of("{\"value\": 1}\0").unwrap_err();
    assert!(ended.contains("the payload is not JSON: a NUL follows the document"), "{ended}");
    let marked = value_of("\u{feff}{\"value\": 1}").unwrap_err();
    assert!(marked.contains("preceded by a byte order mark"), "{marked}");
}

#[test]
fn pointers_go_into_objects_and_arrays() {
    let columns = columns(&[("a", "/a/b/1"), ("b", "/x~1y"), ("c", "/a/missing"), ("d", "/a")]);
    let row = read(&columns, r#"{"x/y":"s\n","a":{"b":[1,{"k":2}]}}"#).unwrap();
    let row: Vec<Option<&str>> = row.iter().map(Option::as_deref).collect();
    assert_eq!(row, [Some("{\"k\":2}"), Some("s\n"), None, Some("{\"b\":[1,{\"k\":2}]}")]);
}

#[test]
fn levels_of_the_topic_are_values() {
    let columns = columns(&[("s", "$site"), ("t", "$device_type"), ("topic", "$topic"), ("m", "$nothing")]);
    let row = read(&columns, "1").unwrap();
    assert_eq!(row[0].as_deref(), Some("factory-01"));
    assert_eq!(row[1].as_deref(), Some("temperature"));
    assert_eq!(row[2].as_deref(), Some("acme/factory-01/temperature/sensor-4a3b/reading"));
    assert_eq!(row[3], None);
}

#[test]
fn a_config_keeps_the_order_and_says_all_that_is_wrong() {
    let text =
        r#"{"z": "$device", "a": ["/a", "$site"], "m": {"from": "/v", "type": "double", "required": true}}"#;
    let config: ColumnsConfig = serde_json::from_str(text).unwrap();
    assert_eq!(config.0.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["z", "a", "m"]);
    let path = crate::problems::KeyPath::root().key("columns");
    let mut problems = crate::problems::Problems::default();
    config.validate(&path, &mut problems);
    config.validate_namespace(&Namespace::default(), &path, &mut problems);
    assert!(problems.is_empty(), "{problems:?}");

    let bad: ColumnsConfig =
        serde_json::from_str(r#"{"": "$device", "a": "value", "b": [], "c": "$sight"}"#).unwrap();
    bad.validate(&path, &mut problems);
    bad.validate_namespace(&Namespace::default(), &path, &mut problems);
    let problems = problems.into_vec();
    let paths: Vec<&str> = problems.iter().map(|problem| problem.path.as_str()).collect();
    assert_eq!(paths, ["columns.", "columns.a", "columns.b", "columns.c"]);
    assert!(problems[3].message.contains("$site"), "{}", problems[3].message);
    assert!(serde_json::from_str::<ColumnsConfig>(r#"{"a": "/a", "a": "/b"}"#).is_err());
}

#[test]
fn a_document_that_is_broken_is_rejected_also_where_no_column_is_required() {
    let optional = columns(&[("device", "$device"), ("temperature", "/t"), ("raw", "$payload")]);
    for payload in [
        "{\"t\":nan,\"h\":40.5}",
        "{\"t\":NaN}",
        "{\"t\":+21.5}",
        "{\"t\":.5}",
        "{\"t\":21.5}\0",
        "{\"t\":21.5",
        "{\"t\":21.5,}",
        "{\"t\":21.5}{\"t\":21.5}",
        " {",
    ] {
        let reason = read(&optional, payload).unwrap_err();
        assert!(
            reason.starts_with("column \"temperature\": the payload is not JSON: "),
            "{payload}: {reason}"
        );
    }
    let reason = read(&optional, "\u{feff}{\"t\":21.5}").unwrap_err();
    assert!(
        reason.starts_with("column \"temperature\": the payload is preceded by a byte order mark"),
        "{reason}"
    );
    // What is no object has no fields, and is kept whole where a column holds it.
    for payload in ["21.5", "[{\"t\":1}]", "[INFO] ready", "ping", "", "\u{feff}21.5"] {
        let row = read(&optional, payload).unwrap();
        assert_eq!((row[1].as_deref(), row[2].as_deref()), (None, Some(payload)));
    }
    // A table without fields takes any bytes.
    let whole = columns(&[("device", "$device"), ("raw", "$payload")]);
    assert_eq!(read(&whole, "{\"t\":nan").unwrap()[1].as_deref(), Some("{\"t\":nan"));
}

#[test]
fn a_payload_of_which_a_row_would_have_nothing_is_rejected() {
    let fields = columns(&[("device", "$device"), ("state", "/state"), ("level", "/battery/level")]);
    for (payload, form) in [
        ("", "empty"),
        (" \n", "empty"),
        ("offline", "not JSON"),
        ("null", "a single value"),
        ("21.5", "a single value"),
        ("\"ON\"", "a single value"),
        ("[{\"state\":\"ON\"}]", "an array (one message is one row)"),
    ] {
        let reason = read(&fields, payload).unwrap_err();
        let expected = format!("column \"state\": the payload is {form}, it has no value at /state: ");
        assert!(reason.starts_with(&expected) && reason.contains("host/docs/payloads.md"), "{reason}");
    }
    let marked = read(&fields, "\u{feff}21.5").unwrap_err();
    assert!(marked.contains("preceded by a byte order mark"), "{marked}");
    // An object may have other fields than those that are asked for.
    for payload in ["{}", " {\"linkquality\":87}", "{\"state\":null}"] {
        assert_eq!(read(&fields, payload).unwrap()[1..], [None, None], "{payload}");
    }
    // A column of numbers holds no document, and none is asked of a table that takes nothing of payloads.
    let config = r#"{"device": "$device", "value": {"from": ["/value", "$payload"], "type": "double"}}"#;
    let number = Columns::new(&serde_json::from_str(config).unwrap(), Arc::default());
    for payload in ["", "[21.5]"] {
        assert!(read(&number, payload).is_err(), "{payload}");
    }
    assert_eq!(read(&number, "21.5").unwrap()[1].as_deref(), Some("21.5"));
    let topics = columns(&[("device", "$device"), ("topic", "$topic")]);
    for payload in ["", "offline", "[1]", "{}", "{"] {
        read(&topics, payload).unwrap();
    }
}
