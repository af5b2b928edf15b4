//! The table: what it must be, what is there, what to do about the difference.

use tokio_postgres::Client;

use super::config::{Config, Hypertable};
use super::encode::Target;
use crate::sinks::columns::{Columns, Kind};

/// `"iot"."telemetry"`
pub fn quoted_table(table: &str) -> String {
    table.split('.').map(quoted).collect::<Vec<_>>().join(".")
}

pub fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// `"time", "device_id", ..`
pub fn column_list(columns: &Columns) -> String {
    columns.columns.iter().map(|column| quoted(&column.name)).collect::<Vec<_>>().join(", ")
}

/// Table and index; or which column needs a type.
pub fn create_table(config: &Config, columns: &Columns) -> Result<String, String> {
    let table = quoted_table(&config.table);
    let mut lines = Vec::new();
    for column in &columns.columns {
        let Some(kind) = column.kind else {
            return Err(format!(
                "table {} is missing, and to create it column \"{}\" needs a type: \
                 {{ from: ..., type: double }}",
                config.table, column.name
            ));
        };
        let not_null = if column.required { " NOT NULL" } else { "" };
        lines.push(format!("    {} {}{not_null}", quoted(&column.name), sql_type(kind)));
    }
    let mut sql = format!("CREATE TABLE {table} (\n{}\n);\n", lines.join(",\n"));
    if let (Some(device), Some(time)) = (columns.device(), columns.time()) {
        sql += &format!("CREATE INDEX ON {table} ({}, {});\n", quoted(&device.name), quoted(&time.name));
    }
    Ok(sql)
}

fn sql_type(kind: Kind) -> &'static str {
    match kind {
        Kind::Timestamptz => "TIMESTAMPTZ",
        Kind::Text => "TEXT",
        Kind::Double => "DOUBLE PRECISION",
        Kind::Bigint => "BIGINT",
        Kind::Bool => "BOOLEAN",
        Kind::Jsonb => "JSONB",
        Kind::Bytes => "BYTEA",
    }
}

/// For a table that was just created, where TimescaleDB is there.
pub fn hypertable(config: &Config, columns: &Columns) -> Option<String> {
    let time = columns.time()?;
    let table = literal(&quoted_table(&config.table));
    let interval = |period: crate::units::Period| format!("INTERVAL '{} seconds'", period.0.as_secs());
    let Hypertable { chunk, compress_after, retention } = config.hypertable;
    let segment = columns.device().map_or(String::new(), |device| {
        format!(", timescaledb.compress_segmentby = {}", literal(&quoted(&device.name)))
    });
    Some(format!(
        "SELECT create_hypertable({table}, {time}, chunk_time_interval => {chunk}, migrate_data => TRUE);
ALTER TABLE {name} SET (timescaledb.compress{segment}, timescaledb.compress_orderby = {order});
SELECT add_compression_policy({table}, {compress_after});
SELECT add_retention_policy({table}, {retention});
",
        time = literal(&time.name),
        chunk = interval(chunk),
        name = quoted_table(&config.table),
        order = literal(&format!("{} DESC", quoted(&time.name))),
        compress_after = interval(compress_after),
        retention = interval(retention),
    ))
}

/// What the server knows of a table.
pub struct Table {
    columns: Vec<TableColumn>,
    pub has_unique_key: bool,
}

struct TableColumn {
    name: String,
    /// Of the type below a domain.
    oid: u32,
    type_name: String,
    not_null: bool,
    has_default: bool,
}

const COLUMNS: &str = "
SELECT a.attname::text,
       CASE WHEN t.typtype = 'd' THEN t.typbasetype ELSE a.atttypid END,
       format_type(a.atttypid, a.atttypmod),
       a.attnotnull,
       a.atthasdef OR a.attidentity <> ''
FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
WHERE a.attrelid = to_regclass($1)::oid AND a.attnum > 0 AND NOT a.attisdropped";

const UNIQUE: &str =
    "SELECT EXISTS (SELECT 1 FROM pg_index WHERE indrelid = to_regclass($1)::oid AND indisunique)";

impl Table {
    /// `None` where there is no such table.
    pub async fn read(client: &Client, table: &str) -> Result<Option<Self>, tokio_postgres::Error> {
        let name = quoted_table(table);
        let rows = client.query(COLUMNS, &[&name]).await?;
        if rows.is_empty() {
            return Ok(None);
        }
        let columns = rows
            .iter()
            .map(|row| TableColumn {
                name: row.get(0),
                oid: row.get(1),
                type_name: row.get(2),
                not_null: row.get(3),
                has_default: row.get(4),
            })
            .collect();
        let has_unique_key = client.query_one(UNIQUE, &[&name]).await?.get(0);
        Ok(Some(Self { columns, has_unique_key }))
    }

    /// How each column is written. Takes over what the table knows better:
    /// types and NOT NULL.
    pub fn bind(&self, table: &str, columns: &mut Columns) -> Result<Vec<Target>, String> {
        let mut targets = Vec::new();
        for column in &mut columns.columns {
            let Some(known) = self.columns.iter().find(|known| known.name == column.name) else {
                let names: Vec<&str> = self.columns.iter().map(|known| known.name.as_str()).collect();
                return Err(format!(
                    "table {table} has no column \"{}\": it has {}; add it, or say in `columns` which to fill",
                    column.name,
                    names.join(", ")
                ));
            };
            let Some(target) = Target::of(known.oid) else {
                return Err(format!(
                    "column \"{}\" of table {table} is {}, which cannot be written: use one of {}",
                    column.name,
                    known.type_name,
                    Target::NAMES
                ));
            };
            column.kind = Some(kind_of(target));
            column.required |= known.not_null && !known.has_default || column.required;
            targets.push(target);
        }
        let missing = self.columns.iter().find(|known| {
            known.not_null
                && !known.has_default
                && !columns.columns.iter().any(|column| column.name == known.name)
        });
        match missing {
            Some(known) => Err(format!(
                "column \"{}\" of table {table} is NOT NULL without a default, and `columns` does not fill it",
                known.name
            )),
            None => Ok(targets),
        }
    }
}

fn kind_of(target: Target) -> Kind {
    match target {
        Target::Bool => Kind::Bool,
        Target::Int2 | Target::Int4 | Target::Int8 => Kind::Bigint,
        Target::Float4 | Target::Float8 | Target::Numeric => Kind::Double,
        Target::Text | Target::Uuid => Kind::Text,
        Target::Timestamp | Target::Date => Kind::Timestamptz,
        Target::Json | Target::Jsonb => Kind::Jsonb,
        Target::Bytea => Kind::Bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sinks::columns::ColumnsConfig;

    #[test]
    fn the_default_table_is_the_reference_table() {
        let columns = Columns::new(&ColumnsConfig::default(), std::sync::Arc::default());
        let sql = create_table(&Config::default(), &columns).unwrap();
        assert_eq!(
            sql,
            "CREATE TABLE \"telemetry\" (
    \"time\" TIMESTAMPTZ NOT NULL,
    \"device_id\" TEXT NOT NULL,
    \"location\" TEXT,
    \"metric\" TEXT NOT NULL,
    \"value\" DOUBLE PRECISION NOT NULL
);
CREATE INDEX ON \"telemetry\" (\"device_id\", \"time\");
"
        );
    }

    #[test]
    fn a_hypertable_is_compressed_and_has_an_end() {
        let columns = Columns::new(&ColumnsConfig::default(), std::sync::Arc::default());
        let sql = hypertable(&Config::default(), &columns).unwrap();
        for part in [
            "create_hypertable('\"telemetry\"', 'time', chunk_time_interval => INTERVAL '86400 seconds'",
            "timescaledb.compress_segmentby = '\"device_id\"'",
            "add_compression_policy('\"telemetry\"', INTERVAL '604800 seconds')",
            "add_retention_policy('\"telemetry\"', INTERVAL '31536000 seconds')",
        ] {
            assert!(sql.contains(part), "{sql}");
        }
    }

    #[test]
    fn names_are_quoted() {
        assert_eq!(quoted_table("iot.odd\"name"), "\"iot\".\"odd\"\"name\"");
    }
}
