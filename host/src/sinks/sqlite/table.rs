//! The table in the file: its statements, and how it is compared with the config.

use rusqlite::Connection;

use super::config::Config;
use crate::sinks::columns::{Columns, Kind};
use crate::sinks::config::{OnConflict, missing_table, table_parts};

fn table_name(config: &Config) -> String {
    table_parts(&config.table).concat()
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

pub fn create_table(config: &Config, columns: &Columns) -> String {
    let lines: Vec<String> = columns
        .columns
        .iter()
        .map(|column| {
            let kind = match column.kind {
                Some(Kind::Timestamptz | Kind::Text | Kind::Jsonb) => " TEXT",
                Some(Kind::Double) => " DOUBLE PRECISION",
                Some(Kind::Bigint) => " BIGINT",
                Some(Kind::Bool) => " BOOLEAN",
                Some(Kind::Bytes) => " BLOB",
                None => "",
            };
            format!("    {}{kind}{}", quoted(&column.name), if column.required { " NOT NULL" } else { "" })
        })
        .collect();
    let table = quoted(&table_name(config));
    let mut sql = format!("CREATE TABLE IF NOT EXISTS {table} (\n{}\n);\n", lines.join(",\n"));
    if let (Some(device), Some(time)) = (columns.device(), columns.time()) {
        let index = quoted(&format!("{}_{}_{}_idx", table_name(config), device.name, time.name));
        let (device, time) = (quoted(&device.name), quoted(&time.name));
        sql += &format!("CREATE INDEX IF NOT EXISTS {index} ON {table} ({device}, {time});\n");
    }
    sql
}

pub fn insert(config: &Config, columns: &Columns, rows: usize) -> String {
    let list: Vec<String> = columns.columns.iter().map(|column| quoted(&column.name)).collect();
    let row = format!("({})", vec!["?"; list.len()].join(", "));
    let conflict = match config.on_conflict {
        OnConflict::Reject => String::new(),
        OnConflict::Ignore | OnConflict::Auto => " ON CONFLICT DO NOTHING".to_owned(),
        OnConflict::Upsert => {
            let set: Vec<String> = list.iter().map(|name| format!("{name} = excluded.{name}")).collect();
            format!(" ON CONFLICT DO UPDATE SET {}", set.join(", "))
        }
    };
    let table = quoted(&table_name(config));
    format!("INSERT INTO {table} ({}) VALUES {}{conflict}", list.join(", "), vec![row; rows].join(", "))
}

/// Whether the table is there and has rows, or may have rows elsewhere: a view, whose triggers put
/// them into tables, or a table with a trigger.
pub fn has_rows(connection: &Connection, config: &Config) -> rusqlite::Result<bool> {
    const KINDS: &str = "
SELECT EXISTS (SELECT 1 FROM sqlite_master WHERE type IN ('table', 'view') AND lower(name) = lower(?1)),
       EXISTS (SELECT 1 FROM sqlite_master WHERE type = 'view' AND lower(name) = lower(?1)
               OR type = 'trigger' AND lower(tbl_name) = lower(?1))";
    let name = table_name(config);
    let kinds = connection.query_row(KINDS, [&name], |row| Ok((row.get(0)?, row.get(1)?)))?;
    match kinds {
        (false, _) => return Ok(false),
        (true, true) => return Ok(true),
        (true, false) => {}
    }
    let sql = format!("SELECT EXISTS (SELECT 1 FROM {})", quoted(&name));
    connection.query_row(&sql, [], |row| row.get(0))
}

/// Compares with the table that is there; takes over its NOT NULL, and that it holds times as
/// numbers.
pub fn bind(
    connection: &Connection,
    config: &Config,
    columns: &mut Columns,
    was_there: bool,
) -> rusqlite::Result<Result<(), String>> {
    let mut statement = connection.prepare(
        "SELECT name, \"notnull\" <> 0 AND dflt_value IS NULL AND pk = 0, type FROM pragma_table_info(?1)",
    )?;
    let known: Vec<(String, bool, String)> = statement
        .query_map([table_name(config)], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?
        .collect::<rusqlite::Result<_>>()?;
    let table = &config.table;
    if known.is_empty() {
        return Ok(Err(missing_table(table, was_there)));
    }
    for column in &mut columns.columns {
        let found = known.iter().find(|(name, ..)| name.eq_ignore_ascii_case(&column.name));
        let Some((_, not_null, declared)) = found else {
            let names: Vec<&str> = known.iter().map(|(name, ..)| name.as_str()).collect();
            return Ok(Err(format!(
                "table {table} has no column \"{}\": it has {}; add it, or say in `columns` which to fill",
                column.name,
                names.join(", ")
            )));
        };
        column.required |= not_null;
        if column.is_time() && column.kind != Some(Kind::Bigint) && is_numeric(declared) {
            if column.unit.is_none() {
                return Ok(Err(format!(
                    "column \"{}\" of table {table} is {declared}, among whose numbers times would be text: say in \
                     which unit since 1970 it holds them, {{ from: $time, type: bigint, unit: s }} (or ms, us, ns), \
                     or make it TEXT",
                    column.name
                )));
            }
            column.kind = Some(Kind::Bigint);
        }
    }
    let missing = known.iter().find(|(name, not_null, _)| {
        *not_null && !columns.columns.iter().any(|column| column.name.eq_ignore_ascii_case(name))
    });
    if config.on_conflict == OnConflict::Upsert && !has_filled_key(connection, config, columns)? {
        return Ok(Err(format!(
            "`on_conflict: upsert` needs a unique key of table {table} whose columns are all in `columns`: \
             add one, such as PRIMARY KEY (device_id, time)"
        )));
    }
    Ok(match missing {
        Some((name, ..)) => Err(format!(
            "column \"{name}\" of table {table} is NOT NULL without a default, and `columns` does not fill it"
        )),
        None => Ok(()),
    })
}

/// Whether a column of this declared type holds numbers as such: affinity INTEGER or REAL
/// (SQLite documentation, "Datatypes In SQLite", 3.1).
fn is_numeric(declared: &str) -> bool {
    let declared = declared.to_ascii_uppercase();
    let has = |part: &&str| declared.contains(part);
    let is_text = ["CHAR", "CLOB", "TEXT", "BLOB"].iter().any(has);
    declared.contains("INT") || !is_text && ["REAL", "FLOA", "DOUB"].iter().any(has)
}

/// Whether there is the table, or a view of its name.
pub fn is_there(connection: &Connection, config: &Config) -> rusqlite::Result<bool> {
    let sql = "SELECT EXISTS (SELECT 1 FROM pragma_table_info(?1))";
    connection.query_row(sql, [table_name(config)], |row| row.get(0))
}

/// Whether a row can meet another one at all.
pub fn has_keys(connection: &Connection, config: &Config) -> rusqlite::Result<bool> {
    let sql = "SELECT EXISTS (SELECT 1 FROM pragma_index_list(?1) WHERE \"unique\"
        UNION ALL SELECT 1 FROM pragma_table_info(?1) WHERE pk > 0)";
    connection.query_row(sql, [table_name(config)], |row| row.get(0))
}

/// Whether there is a unique key all of whose columns are filled.
fn has_filled_key(connection: &Connection, config: &Config, columns: &Columns) -> rusqlite::Result<bool> {
    let mut statement = connection.prepare(
        "SELECT group_concat(i.name, char(10)) FROM pragma_index_list(?1) AS l, pragma_index_info(l.name) AS i
         WHERE l.\"unique\" AND NOT l.partial GROUP BY l.name HAVING count(*) = count(i.name)
         UNION ALL SELECT group_concat(name, char(10)) FROM pragma_table_info(?1) WHERE pk > 0",
    )?;
    let keys: Vec<Option<String>> =
        statement.query_map([table_name(config)], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
    let is_filled = |name: &str| columns.columns.iter().any(|column| column.name.eq_ignore_ascii_case(name));
    Ok(keys.iter().flatten().any(|key| key.split('\n').all(is_filled)))
}
