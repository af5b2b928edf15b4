//! The page "Your payload, your table": each example gives the rows that it shows.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use headworks_tests::folder::root;
use headworks_tests::host::Host;
use headworks_tests::process::run;
use rusqlite::types::ValueRef;

const BUSY_MAX: Duration = Duration::from_secs(30);

struct Example {
    title: String,
    config: String,
    commands: Vec<String>,
    rows: String,
}

#[test]
fn every_example_of_the_page_on_payloads_gives_its_rows() {
    let examples =
        examples(&std::fs::read_to_string(root().join("host/docs/payloads.md")).expect("the page"));
    assert!(examples.len() >= 5, "{} examples", examples.len());
    for Example { title, config, commands, rows } in examples {
        let host = Host::start("payloads", &config);
        for command in &commands {
            if let Some(publish) = command.strip_prefix("mosquitto_pub ") {
                let port = host.mqtt().port();
                run(Command::new("sh").args(["-c", &format!("mosquitto_pub -p {port} {publish}")]));
            } else {
                let query = command.strip_prefix("sqlite3 ").expect("mosquitto_pub or sqlite3");
                let (file, sql) = query.split_once(' ').expect("a file and a query");
                let file = host.folder.join(file);
                let found = host.writes(&title, || {
                    select(&file, sql.trim_matches('\''))
                        .filter(|found| found.lines().count() >= rows.lines().count())
                });
                assert_eq!(found, rows, "{title}");
            }
        }
    }
}

fn examples(page: &str) -> Vec<Example> {
    let sections = page.split("\n## ").skip(1);
    let block = |section: &str, language: &str| {
        let (_, rest) = section.split_once(&format!("```{language}\n"))?;
        Some(rest.split_once("```").expect("a block ends").0.to_owned())
    };
    let examples = sections.map(|section| Example {
        title: section.lines().next().unwrap_or_default().to_owned(),
        config: block(section, "yaml").expect("an example has a config"),
        commands: block(section, "sh").expect("an example has commands").lines().map(str::to_owned).collect(),
        rows: block(section, "text").expect("an example has rows"),
    });
    examples.collect()
}

/// The rows as `sqlite3` prints them; `None` until there is one.
fn select(file: &Path, sql: &str) -> Option<String> {
    let database =
        rusqlite::Connection::open_with_flags(file, rusqlite::OpenFlags::SQLITE_OPEN_READ_WRITE).ok()?;
    // A commit whose file was written may not be visible yet; with the lock of writers it is.
    database.busy_timeout(BUSY_MAX).expect("a timeout");
    database.execute_batch("BEGIN IMMEDIATE").expect("the host lets go of the lock");
    let mut statement = database.prepare(sql).ok()?;
    let columns = statement.column_count();
    let mut found = String::new();
    let mut rows = statement.query([]).ok()?;
    while let Some(row) = rows.next().ok()? {
        let cells = (0..columns).map(|column| match row.get_ref(column).expect("a column") {
            ValueRef::Null => String::new(),
            ValueRef::Integer(number) => number.to_string(),
            ValueRef::Real(number) => format!("{number:?}"),
            ValueRef::Text(text) | ValueRef::Blob(text) => String::from_utf8_lossy(text).into_owned(),
        });
        found += &(cells.collect::<Vec<_>>().join("|") + "\n");
    }
    (!found.is_empty()).then_some(found)
}
