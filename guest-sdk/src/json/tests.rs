use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use proptest::prelude::*;
use serde_json::Value;

use super::*;

fn text(doc: &[u8]) -> String {
    String::from_utf8_lossy(doc).into_owned()
}

/// Ours and serde_json say the same about a document: accepted or not, and
/// every field's value.
fn agrees(doc: &[u8]) {
    let theirs = serde_json::from_slice::<Value>(doc);
    let ours = parse(doc);
    assert_eq!(ours.is_ok(), theirs.is_ok(), "{}: ours {ours:?}, theirs {theirs:?}", text(doc));
    if let (Ok(raw), Ok(value)) = (ours, theirs) {
        same(raw, &value);
        if let Value::Object(fields) = &value {
            for (name, value) in fields {
                same(get(doc, name).unwrap().unwrap(), value);
                let token = name.replace('~', "~0").replace('/', "~1");
                same(pointer(doc, &format!("/{token}")).unwrap().unwrap(), value);
            }
            assert_eq!(get(doc, "no such field").unwrap(), None);
        } else {
            assert!(get(doc, "a").is_err());
        }
    }
}

fn same(raw: Raw<'_>, value: &Value) {
    match value {
        Value::Null => assert!(raw.is_null()),
        Value::Bool(b) => assert_eq!(raw.as_bool(), Some(*b)),
        Value::Number(n) => {
            let (ours, theirs) = (raw.as_f64().unwrap(), n.as_f64().unwrap());
            assert!((ours - theirs).abs() <= theirs.abs() * 1e-14, "{ours} {theirs}");
            if let Some(integer) = n.as_i64() {
                assert!(raw.as_i64() == Some(integer) || raw.as_bytes() == b"-0");
            }
        }
        Value::String(s) => {
            assert_eq!(raw.as_str().unwrap(), s.as_str());
            assert!(raw.is_str(s));
        }
        Value::Array(items) => {
            assert_eq!(raw.elements().count(), items.len());
            raw.elements().zip(items).for_each(|(raw, value)| same(raw, value));
        }
        Value::Object(fields) => {
            for (name, value) in fields {
                same(raw.get(name).unwrap(), value);
            }
            assert!(raw.members().all(|(name, _)| fields.contains_key(&*name)));
        }
    }
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (-1e9f64..1e9).prop_map(Value::from),
        prop::num::f64::NORMAL.prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        "[a-z\"\\\\/é🙂\n]{0,20}".prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 40, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::vec(("[a-c~/\"]{0,3}", inner), 0..6)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn reads_what_serde_json_writes(value in any_json(), pretty in any::<bool>()) {
        let doc = if pretty { serde_json::to_vec_pretty(&value) } else { serde_json::to_vec(&value) }.unwrap();
        agrees(&doc);
    }

    #[test]
    fn accepts_what_serde_json_accepts_after_damage(
        value in any_json(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3u8), 1..4),
    ) {
        let mut doc = serde_json::to_vec(&value).unwrap();
        for (index, byte, how) in damage {
            let at = index.index(doc.len().max(1));
            match how {
                0 if at < doc.len() => doc[at] = byte,
                1 if at < doc.len() => drop(doc.remove(at)),
                _ => doc.insert(at.min(doc.len()), byte),
            }
        }
        agrees(&doc);
    }

    #[test]
    fn accepts_what_serde_json_accepts_of_json_like_text(doc in "[\\[\\]{}:,\"\\\\ un0-9a-f.eE+-]{0,30}") {
        agrees(doc.as_bytes());
    }

    #[test]
    fn numbers_agree(number in "-?[0-9]{0,20}(\\.[0-9]{0,20})?([eE][+-]?[0-9]{1,3})?") {
        agrees(number.as_bytes());
    }

    #[test]
    fn strings_agree(content in "(\\\\u[dD][89a-fA-F][0-9a-f]{2}|\\\\[bfnrtu\"/x]|[a-z]|\\\\u00[0-9a-f]{2}|é){0,12}") {
        agrees(format!("{{\"k\":\"{content}\"}}").as_bytes());
        agrees(format!("{{\"{content}\":1}}").as_bytes());
    }

    #[test]
    fn a_spliced_field_is_read_back_and_the_others_stay(value in any_json(), key in any::<String>(), added in any_json()) {
        let fields = value.as_object().cloned().unwrap_or_default();
        let doc = serde_json::to_vec_pretty(&Value::Object(fields.clone())).unwrap();
        let mut out = Vec::new();
        set_field(&doc, &key, &serde_json::to_vec(&added).unwrap(), &mut out).unwrap();
        let mut expected = fields;
        expected.insert(key, added);
        prop_assert_eq!(parse(&out).unwrap().members().count(), expected.len());
        same(parse(&out).unwrap(), &Value::Object(expected));
    }

    #[test]
    fn a_written_string_is_what_serde_json_reads(s in any::<String>()) {
        let mut out = Vec::new();
        write_string(&mut out, &s);
        prop_assert_eq!(serde_json::from_slice::<String>(&out).unwrap(), s);
    }

    #[test]
    fn a_written_integer_is_read_back(n in any::<i64>()) {
        let mut out = Vec::new();
        write_i64(&mut out, n);
        prop_assert_eq!(text(&out), n.to_string());
    }

    #[test]
    fn short_decimals_are_exact(mantissa in 0..10_000_000_000_000_000u64, point in 0..16usize, negative in any::<bool>()) {
        let mut number = format!("{mantissa:017}");
        number.insert(17 - point, '.');
        let number = number.trim_start_matches('0');
        let number = if number.starts_with('.') { format!("0{number}") } else { number.to_string() };
        let number = format!("{}{}", if negative { "-" } else { "" }, number.trim_end_matches('.'));
        prop_assert_eq!(parse(number.as_bytes()).unwrap().as_f64().unwrap(), number.parse::<f64>().unwrap());
    }
}

#[test]
fn nests_as_deep_as_serde_json() {
    for depth in [126, 127, 128, 129] {
        agrees(format!("{}1{}", "[".repeat(depth), "]".repeat(depth)).as_bytes());
        agrees(format!("{}1{}", "{\"a\":".repeat(depth), "}".repeat(depth)).as_bytes());
    }
}

#[test]
fn the_last_of_two_fields_with_one_name_wins() {
    assert_eq!(get(br#"{"a":1,"\u0061":2}"#, "a").unwrap().unwrap().as_i64(), Some(2));
    agrees(br#"{"a":1,"b":0,"a":{"a":3}}"#);
}

#[test]
fn a_malformed_document_is_an_error_that_says_where() {
    let cases: [(&[u8], &str); 14] = [
        (br#"{"a":1,,}"#, "expected a field name in quotes at byte 7"),
        (br#"{"a":1,}"#, "expected a field name in quotes at byte 7"),
        (br#"{"a":}"#, "expected a value at byte 5"),
        (br#"{"a" 1}"#, "expected a colon at byte 5"),
        (br#"{"a":1 "b":2}"#, "expected a comma or a closing brace at byte 7"),
        (br#"{"a":[1 2]}"#, "expected a comma or a closing bracket at byte 8"),
        (br#"{"a":1} x"#, "unexpected text after the document at byte 8"),
        (br#"{"a":"x"#, "the document ends too early at byte 7"),
        (br#"{"a":"\x"}"#, "unknown escape at byte 7"),
        (br#"{"a":"\ud800"}"#, "half of a surrogate pair at byte 6"),
        (b"{\"a\":\"\xff\"}", "not UTF-8 at byte 6"),
        (b"{\"a\":\"\n\"}", "control character in a string at byte 6"),
        (b"", "the document ends too early at byte 0"),
        (b"ping", "expected a value at byte 0"),
    ];
    for (doc, message) in cases {
        assert_eq!(get(doc, "a").unwrap_err().to_string(), message, "{}", text(doc));
        agrees(doc);
    }
    assert_eq!(get(b"[1]", "a").unwrap_err().to_string(), "expected an object at byte 0");
}

#[test]
fn a_pointer_reaches_into_objects_and_arrays() {
    let doc = br#"{"a":{"b":[10,{"c/d":"x","~":true}]},"":0}"#;
    let at = |p: &str| pointer(doc, p).unwrap().map(|raw| text(raw.as_bytes()));
    assert_eq!(at("/a/b/0").as_deref(), Some("10"));
    assert_eq!(at("/a/b/1/c~1d").as_deref(), Some("\"x\""));
    assert_eq!(at("/a/b/1/~0").as_deref(), Some("true"));
    assert_eq!(at("/").as_deref(), Some("0"));
    assert_eq!(at("").map(|s| s.len()), Some(doc.len()));
    for none in ["/a/b/2", "/a/b/00", "/a/b/-", "/a/x", "/a/b/0/z"] {
        assert_eq!(at(none), None, "{none}");
    }
    assert!(pointer(doc, "a").is_err());
    let value: Value = serde_json::from_slice(doc).unwrap();
    assert_eq!(value.pointer("/a/b/0"), Some(&Value::from(10)));
    let c = pointer(doc, "/a/b/1/c~1d").unwrap().unwrap();
    assert_eq!(&doc[c.range()], c.as_bytes());
}

#[test]
fn an_empty_object_takes_a_field_without_a_comma() {
    let mut out = Vec::new();
    insert_field(b" { } ", "a", b"1", &mut out).unwrap();
    assert_eq!(text(&out), " {\"a\":1}");
    out.clear();
    insert_field(b"{\"a\":{}}", "b", b"{}", &mut out).unwrap();
    assert_eq!(text(&out), "{\"a\":{},\"b\":{}}");
    out.clear();
    insert_members(b"{\"a\":1}", b"", &mut out).unwrap();
    assert_eq!(text(&out), "{\"a\":1}");
}
