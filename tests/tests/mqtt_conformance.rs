//! The table of MQTT's statements (`host/docs/mqtt-conformance.md`) does not
//! rot: every statement is in it once, and every test that it names exists.

use std::collections::BTreeSet;
use std::path::PathBuf;

use headworks_tests::folder::root;

/// Section, first and last number: the appendices of both standards that list their statements.
type Numbers = &'static [(&'static str, u32, u32)];

/// 141 statements: appendix B of MQTT 3.1.1.
#[rustfmt::skip]
const V311: Numbers = &[
    ("1.5.3", 1, 3), ("2.2.2", 1, 2), ("2.3.1", 1, 7), ("3.1.0", 1, 2), ("3.1.2", 1, 24), ("3.1.3", 1, 11),
    ("3.1.4", 1, 5), ("3.2.0", 1, 1), ("3.2.2", 1, 6), ("3.3.1", 1, 12), ("3.3.2", 1, 3), ("3.3.4", 1, 1),
    ("3.3.5", 1, 2), ("3.6.1", 1, 1), ("3.8.1", 1, 1), ("3.8.3", 1, 4), ("3.8.4", 1, 6), ("3.9.3", 1, 2),
    ("3.10.1", 1, 1), ("3.10.3", 1, 2), ("3.10.4", 1, 6), ("3.12.4", 1, 1), ("3.14.1", 1, 1), ("3.14.4", 1, 3),
    ("4.1.0", 1, 2), ("4.3.1", 1, 1), ("4.3.2", 1, 2), ("4.3.3", 1, 2), ("4.4.0", 1, 1), ("4.5.0", 1, 2),
    ("4.6.0", 1, 6), ("4.7.1", 1, 3), ("4.7.2", 1, 1), ("4.7.3", 1, 4), ("4.8.0", 1, 2), ("6.0.0", 1, 4),
    ("7.0.0", 1, 2), ("7.1.1", 1, 1), ("7.1.2", 1, 1),
];

/// 251 statements: appendix B of MQTT 5.0.
#[rustfmt::skip]
const V5: Numbers = &[
    ("1.5.4", 1, 3), ("1.5.5", 1, 1), ("1.5.7", 1, 1), ("2.1.3", 1, 1), ("2.2.1", 2, 6), ("2.2.2", 1, 1),
    ("3.1.0", 1, 2), ("3.1.2", 1, 30), ("3.1.3", 1, 12), ("3.1.4", 1, 6), ("3.2.0", 1, 2), ("3.2.2", 1, 22),
    ("3.3.1", 1, 13), ("3.3.2", 1, 20), ("3.3.4", 1, 10), ("3.4.2", 1, 3), ("3.5.2", 1, 3), ("3.6.1", 1, 1),
    ("3.6.2", 1, 3), ("3.7.2", 1, 3), ("3.8.1", 1, 1), ("3.8.3", 1, 5), ("3.8.4", 1, 8), ("3.9.2", 1, 2),
    ("3.9.3", 1, 2), ("3.10.1", 1, 1), ("3.10.3", 1, 2), ("3.10.4", 1, 6), ("3.11.2", 1, 2), ("3.11.3", 1, 2),
    ("3.12.4", 1, 1), ("3.14.0", 1, 1), ("3.14.1", 1, 1), ("3.14.2", 1, 4), ("3.14.4", 1, 3), ("3.15.1", 1, 1),
    ("3.15.2", 1, 3), ("4.1.0", 1, 2), ("4.2.0", 1, 1), ("4.3.1", 1, 1), ("4.3.2", 1, 5), ("4.3.3", 1, 13),
    ("4.4.0", 1, 2), ("4.5.0", 1, 2), ("4.6.0", 1, 6), ("4.7.0", 1, 1), ("4.7.1", 1, 2), ("4.7.2", 1, 1),
    ("4.7.3", 1, 4), ("4.8.2", 1, 6), ("4.9.0", 1, 3), ("4.12.0", 1, 7), ("4.12.1", 1, 2), ("4.13.1", 1, 1),
    ("4.13.2", 1, 1), ("6.0.0", 1, 4),
];

struct Row {
    id: String,
    covered: String,
}

/// The rows of the two tables, in their order.
fn tables() -> [Vec<Row>; 2] {
    let path = root().join("host/docs/mqtt-conformance.md");
    let text = std::fs::read_to_string(path).expect("the table");
    let (_, tables) = text.split_once("\n## MQTT 3.1.1\n").expect("a section for 3.1.1");
    let (v311, v5) = tables.split_once("\n## MQTT 5.0\n").expect("a section for 5.0");
    [v311, v5].map(|section| {
        let lines = section.lines().filter(|line| line.starts_with("| ")).skip(2);
        lines
            .map(|line| {
                let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
                let [id, what, covered] = cells[..] else { panic!("three cells: {line}") };
                assert!(!what.is_empty(), "{line}");
                Row { id: id.into(), covered: covered.into() }
            })
            .collect()
    })
}

#[test]
fn every_statement_of_both_standards_is_in_the_table_once_and_in_order() {
    for (table, numbers) in tables().iter().zip([V311, V5]) {
        let wanted = numbers.iter().flat_map(|(section, first, last)| {
            (*first..=*last).map(move |number| format!("{section}-{number}"))
        });
        let found: Vec<&str> = table.iter().map(|row| &*row.id).collect();
        assert_eq!(found, wanted.collect::<Vec<_>>());
    }
}

#[test]
fn every_test_that_the_table_names_exists() {
    let mut known = std::collections::HashMap::new();
    for row in tables().iter().flatten() {
        let named: Vec<&str> = row.covered.split('`').filter(|part| part.contains("::")).collect();
        let excused = ["client: ", "n/a: ", "not yet: "].iter().any(|mark| row.covered.starts_with(mark));
        assert!(excused || !named.is_empty(), "{}: neither a test nor a reason", row.id);
        for name in named {
            let (file, test) = name.split_once("::").expect("it has ::");
            let tests = known.entry(file.to_owned()).or_insert_with(|| tests_of(file));
            assert!(tests.contains(test), "{}: no test {test} in {file}", row.id);
        }
    }
}

/// Names of the test functions of a file, as the table names files.
fn tests_of(file: &str) -> BTreeSet<String> {
    let path: PathBuf = match file.contains('/') {
        true => root().join(format!("host/src/{file}.rs")),
        false => root().join(format!("tests/tests/{file}.rs")),
    };
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut tests = BTreeSet::new();
    let mut is_test = false;
    for line in text.lines().map(str::trim) {
        if line == "#[test]" || line == "#[tokio::test]" {
            is_test = true;
        } else if let Some((name, _)) =
            line.trim_start_matches("async ").strip_prefix("fn ").and_then(|rest| rest.split_once('('))
            && std::mem::take(&mut is_test)
        {
            tests.insert(name.to_owned());
        }
    }
    tests
}
