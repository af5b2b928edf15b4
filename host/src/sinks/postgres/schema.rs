//! The statements that create the table.

use tokio_postgres::Client;

use super::config::{Config, Hypertable};
use crate::sinks::columns::{Columns, Kind};
use crate::sinks::config::{missing_table, table_parts};

/// Quotes a table's name: `"iot"."telemetry"`.
pub fn quoted_table(table: &str) -> String {
    table_parts(table).iter().map(|part| quoted(part)).collect::<Vec<_>>().join(".")
}

pub fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Returns a table or view in the searched schemas whose name differs only in case.
pub async fn in_other_case(client: &Client, table: &str) -> Result<Option<String>, tokio_postgres::Error> {
    const SQL: &str = "
SELECT relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE lower(relname) = lower($1) AND relname <> $1 AND relkind IN ('r', 'p', 'v', 'f')
  AND CASE WHEN $2::text IS NULL THEN nspname = ANY (current_schemas(false)) ELSE nspname = $2 END
LIMIT 1";
    let parts = table_parts(table);
    let (name, schema) = (parts.last(), parts.len().checked_sub(2).map(|at| &parts[at]));
    Ok(client.query_opt(SQL, &[&name, &schema]).await?.map(|row| row.get(0)))
}

/// Returns whether the table of this quoted name has rows. Also true if it may have rows that this user
/// cannot see, or if its rows are elsewhere; false only if it certainly has none. Runs within a
/// transaction.
pub async fn has_rows(client: &Client, name: &str) -> Result<bool, tokio_postgres::Error> {
    const TABLE: &str = "
SELECT oid, relkind IN ('r', 'p') AND has_table_privilege(oid, 'SELECT') AND NOT row_security_active(oid)
FROM pg_class WHERE oid = to_regclass($1)";
    // The table, the partitions and chunks below it, and what a view reads. First whether one of them may
    // put rows elsewhere: a foreign table, a trigger for INSERT, a rule that does something instead. Those
    // of TimescaleDB do not. Then whether one has bytes, or is a chunk, whose rows may be compressed into
    // another table.
    const PARTS: &str = r"
WITH RECURSIVE parts AS (
    SELECT $1::oid AS part
    UNION
    SELECT below.part FROM parts CROSS JOIN LATERAL (
        SELECT inhrelid FROM pg_inherits WHERE inhparent = parts.part
        UNION ALL
        SELECT d.refobjid FROM pg_rewrite r JOIN pg_depend d ON d.objid = r.oid
        WHERE r.ev_class = parts.part AND r.ev_type = '1' AND d.classid = 'pg_rewrite'::regclass
          AND d.refclassid = 'pg_class'::regclass
    ) AS below (part))
SELECT bool_or(c.relkind NOT IN ('r', 'p', 'v')
           OR EXISTS (SELECT FROM pg_trigger t
                      JOIN pg_proc f ON f.oid = t.tgfoid JOIN pg_namespace n ON n.oid = f.pronamespace
                      WHERE t.tgrelid = c.oid AND NOT t.tgisinternal AND t.tgtype & 4 <> 0
                        AND t.tgenabled <> 'D' AND n.nspname !~ '^_timescaledb_')
           OR EXISTS (SELECT FROM pg_rewrite r WHERE r.ev_class = c.oid AND r.ev_type = '3' AND r.is_instead
                      AND r.ev_enabled <> 'D')),
       coalesce(sum(pg_relation_size(c.oid)) > 0, false) OR bool_or(n.nspname ~ '^_timescaledb_')
FROM parts JOIN pg_class c ON c.oid = parts.part JOIN pg_namespace n ON n.oid = c.relnamespace";
    let Some(row) = client.query_opt(TABLE, &[&name]).await? else { return Ok(false) };
    let (oid, sees_all): (u32, bool) = (row.get(0), row.get(1));
    let row = client.query_one(PARTS, &[&oid]).await?;
    let (may_be_elsewhere, has_bytes): (bool, bool) = (row.get(0), row.get(1));
    if may_be_elsewhere || !sees_all {
        return Ok(may_be_elsewhere || has_bytes);
    }
    // Read in a savepoint: a sink that may insert needs no SELECT that works.
    client.batch_execute("SAVEPOINT headworks_rows").await?;
    let found = match client.query_one(&format!("SELECT EXISTS (SELECT FROM {name})"), &[]).await {
        Ok(row) => row.get(0),
        Err(error) if error.code().is_some_and(|code| !is_passing(code.code())) => has_bytes,
        Err(error) => return Err(error),
    };
    client.batch_execute("ROLLBACK TO headworks_rows").await?;
    Ok(found)
}

/// Returns whether an error may be temporary: of the connection, a lock, space, or the server's
/// shutdown.
fn is_passing(code: &str) -> bool {
    ["08", "40", "53", "55", "57P", "58"].iter().any(|class| code.starts_with(class))
}

/// Returns why there is no table to write to.
pub async fn no_table(
    client: &Client,
    table: &str,
    was_there: bool,
) -> Result<String, tokio_postgres::Error> {
    Ok(match in_other_case(client, table).await? {
        Some(similar) => format!(
            "there is no table {table}, but there is {similar}: names are taken exactly as in `table`; \
             write it there as the database has it"
        ),
        None => missing_table(table, was_there),
    })
}

/// Quotes a string constant in a form that does not depend on `standard_conforming_strings`.
pub fn literal(text: &str) -> String {
    let quoted = text.replace('\'', "''");
    match quoted.contains('\\') {
        true => format!("E'{}'", quoted.replace('\\', "\\\\")),
        false => format!("'{quoted}'"),
    }
}

/// Returns the SQL for table and index, or which column needs a type.
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

/// Returns the SQL that makes a newly created table a hypertable, if TimescaleDB is installed.
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
