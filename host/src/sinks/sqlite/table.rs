//! The table in the file: its statements, and its comparison with the config.

use rusqlite::{Connection, OptionalExtension};

use super::config::Config;
use super::values::Affinity;
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

/// How the table is written.
pub struct Bound {
    /// Affinity of each column in the config.
    pub affinities: Vec<Affinity>,
    /// Warnings that the sink reports when it opens.
    pub warnings: Vec<String>,
    /// Columns of the key of `on_conflict: upsert`.
    key: Vec<String>,
    /// Whether the table itself defines what happens to a row that violates a constraint.
    has_clause: bool,
}

pub fn insert(config: &Config, columns: &Columns, bound: &Bound, rows: usize) -> String {
    let list: Vec<String> = columns.columns.iter().map(|column| quoted(&column.name)).collect();
    let row = format!("({})", vec!["?"; list.len()].join(", "));
    // Only where it is needed: it also counts within the triggers, in place of what their statements say.
    let or = if bound.has_clause { " OR ABORT" } else { "" };
    let conflict = match config.on_conflict {
        OnConflict::Reject | OnConflict::Refuse => String::new(),
        OnConflict::Ignore | OnConflict::Auto => " ON CONFLICT DO NOTHING".to_owned(),
        OnConflict::Upsert => {
            let set: Vec<String> = list.iter().map(|name| format!("{name} = excluded.{name}")).collect();
            let key: Vec<String> = bound.key.iter().map(|name| quoted(name)).collect();
            format!(" ON CONFLICT ({}) DO UPDATE SET {}", key.join(", "), set.join(", "))
        }
    };
    let table = quoted(&table_name(config));
    format!("INSERT{or} INTO {table} ({}) VALUES {}{conflict}", list.join(", "), vec![row; rows].join(", "))
}

/// Returns whether the table has rows. Also true if it may have rows elsewhere: for a view, whose
/// triggers write to tables, and for a table with a trigger.
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

/// Compares the config with the existing table, and takes over its NOT NULL, and whether its columns
/// hold times as numbers or text.
pub fn bind(
    connection: &Connection,
    config: &Config,
    columns: &mut Columns,
    was_there: bool,
) -> rusqlite::Result<Result<Bound, String>> {
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
    let is_strict = is_strict(connection, config)?;
    let (mut affinities, mut warnings) = (Vec::new(), Vec::new());
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
        let affinity = Affinity::of(declared, is_strict);
        let holds_numbers = matches!(affinity, Affinity::Integer | Affinity::Real);
        if column.is_time() && column.kind != Some(Kind::Bigint) && holds_numbers {
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
        if column.kind.is_none() && affinity == Affinity::Text {
            column.kind = Some(Kind::Text);
        }
        if column.kind == Some(Kind::Text) && affinity.is_of_numbers() {
            warnings.push(format!(
                "column \"{}\" of table {table} is {declared}, which SQLite takes for numbers: text that it would \
                 change, as 007 to 7, becomes dead letters; declare the column TEXT",
                column.name
            ));
        }
        affinities.push(affinity);
    }
    let missing = known.iter().find(|(name, not_null, _)| {
        *not_null && !columns.columns.iter().any(|column| column.name.eq_ignore_ascii_case(name))
    });
    let key = filled_key(connection, config, columns)?;
    if config.on_conflict == OnConflict::Upsert && key.is_none() {
        return Ok(Err(format!(
            "`on_conflict: upsert` needs a unique key of table {table} whose columns are all in `columns`: \
             add one, such as PRIMARY KEY (device_id, time)"
        )));
    }
    if let Some((name, ..)) = missing {
        return Ok(Err(format!(
            "column \"{name}\" of table {table} is NOT NULL without a default, and `columns` does not fill it"
        )));
    }
    let has_clause = has_clause(connection, config)?;
    if has_clause && let Some(trigger) = trigger_with_clause(connection)? {
        return Ok(Err(format!(
            "table {table} has an ON CONFLICT clause, which `on_conflict` of the sink overrides, and SQLite would \
             override the one of trigger {trigger} with it: take the clause out of the table or of the trigger"
        )));
    }
    Ok(Ok(Bound { affinities, warnings, key: key.unwrap_or_default(), has_clause }))
}

fn is_strict(connection: &Connection, config: &Config) -> rusqlite::Result<bool> {
    let sql = "SELECT EXISTS (SELECT 1 FROM pragma_table_list(?1) WHERE schema = 'main' AND strict)";
    connection.query_row(sql, [table_name(config)], |row| row.get(0))
}

/// Returns whether the table was created with an ON CONFLICT clause.
fn has_clause(connection: &Connection, config: &Config) -> rusqlite::Result<bool> {
    let sql = "SELECT sql FROM sqlite_master WHERE type = 'table' AND lower(name) = lower(?1)";
    let made: Option<String> =
        connection.query_row(sql, [table_name(config)], |row| row.get(0)).optional()?;
    Ok(made.is_some_and(|made| one_spaced(&made).contains("ON CONFLICT ")))
}

/// Returns a trigger, of any table, whose statements define what happens to a row that violates a
/// constraint.
fn trigger_with_clause(connection: &Connection) -> rusqlite::Result<Option<String>> {
    let mut statement = connection.prepare("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'")?;
    let triggers: Vec<(String, String)> =
        statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect::<rusqlite::Result<_>>()?;
    let has_clause = |sql: &str| {
        let sql = one_spaced(sql);
        ["INSERT OR ", "UPDATE OR ", "REPLACE INTO "].iter().any(|clause| sql.contains(clause))
    };
    Ok(triggers.into_iter().find(|(_, sql)| has_clause(sql)).map(|(name, _)| name))
}

/// Returns SQL in upper case, with each white space replaced by one blank.
fn one_spaced(sql: &str) -> String {
    sql.to_ascii_uppercase().split_ascii_whitespace().collect::<Vec<_>>().join(" ")
}

/// Returns whether the table, or a view of its name, exists.
pub fn is_there(connection: &Connection, config: &Config) -> rusqlite::Result<bool> {
    let sql = "SELECT EXISTS (SELECT 1 FROM pragma_table_info(?1))";
    connection.query_row(sql, [table_name(config)], |row| row.get(0))
}

/// Returns whether a row can conflict with another one at all.
pub fn has_keys(connection: &Connection, config: &Config) -> rusqlite::Result<bool> {
    let sql = "SELECT EXISTS (SELECT 1 FROM pragma_index_list(?1) WHERE \"unique\"
        UNION ALL SELECT 1 FROM pragma_table_info(?1) WHERE pk > 0)";
    connection.query_row(sql, [table_name(config)], |row| row.get(0))
}

/// Returns the primary key, otherwise the first unique key, all of whose columns are filled.
fn filled_key(
    connection: &Connection,
    config: &Config,
    columns: &Columns,
) -> rusqlite::Result<Option<Vec<String>>> {
    let mut statement = connection.prepare(
        "SELECT group_concat(name, char(10)) FROM pragma_table_info(?1) WHERE pk > 0
         UNION ALL
         SELECT group_concat(i.name, char(10)) FROM pragma_index_list(?1) AS l, pragma_index_info(l.name) AS i
         WHERE l.\"unique\" AND NOT l.partial GROUP BY l.name HAVING count(*) = count(i.name)",
    )?;
    let keys: Vec<Option<String>> =
        statement.query_map([table_name(config)], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
    let is_filled = |name: &str| columns.columns.iter().any(|column| column.name.eq_ignore_ascii_case(name));
    let key = keys.iter().flatten().find(|key| key.split('\n').all(is_filled));
    Ok(key.map(|key| key.split('\n').map(str::to_owned).collect()))
}
