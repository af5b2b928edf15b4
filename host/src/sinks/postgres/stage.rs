//! The staging table of a session, and what takes rows on from there.
//!
//! Rows go through it where COPY cannot say what should happen (`on_conflict`,
//! views, types without a binary form), and where the table rejected some:
//! `headworks_isolate` inserts the staged rows by sixteens, each in a
//! subtransaction of its own, then those of a sixteen that fails one by one. It
//! returns the rows that cannot be inserted and the count of those that were,
//! all within the caller's transaction and in one round trip.

use super::schema::{literal, quoted, quoted_table};
use super::table::{Binding, Bound, column_list};
use crate::sinks::columns::Columns;
use crate::sinks::config::OnConflict;

/// One row of `headworks_isolate`: the place of a row among the staged, from 0,
/// and why it cannot be inserted; the last one has no place, and the count.
pub const ISOLATE: &str = "SELECT * FROM pg_temp.headworks_isolate()";

/// Copies to the staging table, whose first column is the row's number.
pub const COPY: &str = "COPY headworks_stage FROM STDIN (FORMAT binary)";

/// What makes the staging table and the function of this session.
pub fn create(table: &str, columns: &Columns, binding: &Binding, on_conflict: OnConflict) -> String {
    let fields: Vec<String> =
        binding.columns.iter().enumerate().map(|(i, of)| format!("c{i} {}", of.stage_type)).collect();
    let insert =
        |only: &str| insert_of(table, columns, binding, on_conflict, &format!("headworks_stage {only}"));
    // Concerns every row, not this one: no connection, lock, room, time.
    let (probe_table, probe) = probe(columns, binding);
    let passing = "left(SQLSTATE, 2) IN ('08', '40', '53', '57', '58', 'HV') OR SQLSTATE = '55P03'";
    format!(
        "CREATE TEMPORARY TABLE headworks_stage (n INTEGER, {fields}) ON COMMIT DELETE ROWS;
{probe_table}CREATE FUNCTION pg_temp.headworks_isolate(
    OUT place INTEGER, OUT written BIGINT, OUT code TEXT, OUT message TEXT, OUT detail TEXT, OUT hint TEXT,
    OUT of_column TEXT, OUT of_constraint TEXT, OUT context TEXT)
RETURNS SETOF record LANGUAGE plpgsql AS $headworks$
#variable_conflict use_column
DECLARE
    staged tid[];
    since INTEGER := 1;
    until INTEGER;
    inserted BIGINT;
    total BIGINT := 0;
BEGIN
    SET CONSTRAINTS ALL IMMEDIATE;
    SELECT array_agg(ctid ORDER BY n) INTO staged FROM headworks_stage;
    WHILE since <= coalesce(cardinality(staged), 0) LOOP
        until := least(since + 15, cardinality(staged));
        BEGIN
            {some};
            GET DIAGNOSTICS inserted = ROW_COUNT;
            total := total + inserted;
        EXCEPTION WHEN OTHERS OR ASSERT_FAILURE THEN
            IF {passing} THEN RAISE; END IF;
            FOR i IN since..until LOOP
                BEGIN
                    {one};
                    GET DIAGNOSTICS inserted = ROW_COUNT;
                    total := total + inserted;
                EXCEPTION WHEN OTHERS OR ASSERT_FAILURE THEN
                    IF {passing} THEN RAISE; END IF;
                    GET STACKED DIAGNOSTICS code = RETURNED_SQLSTATE, message = MESSAGE_TEXT,
                        detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT,
                        of_column = COLUMN_NAME, of_constraint = CONSTRAINT_NAME,
                        context = PG_EXCEPTION_CONTEXT;
                    {probe}
                    place := i - 1;
                    RETURN NEXT;
                END;
            END LOOP;
        END;
        since := until + 1;
    END LOOP;
    place := NULL;
    written := total;
    RETURN NEXT;
END
$headworks$",
        fields = fields.join(", "),
        some = insert("WHERE ctid = ANY (staged[since:until])"),
        one = insert("WHERE ctid = staged[i]"),
    )
}

/// A table of the columns whose values the server converts or measures, and what finds out
/// which of them rejects the row `staged[i]`: errors of class 22 (data exception) name none.
fn probe(columns: &Columns, binding: &Binding) -> (String, String) {
    let (mut fields, mut probes) = (Vec::new(), String::new());
    for (i, (column, of)) in columns.columns.iter().zip(&binding.columns).enumerate() {
        if of.cast.is_none() && of.stage_type == of.type_name {
            continue;
        }
        fields.push(format!("c{i} {}", of.type_name));
        probes += &format!(
            "IF of_column = '' THEN
                        BEGIN
                            INSERT INTO headworks_probe (c{i})
                            SELECT {} FROM headworks_stage WHERE ctid = staged[i];
                        EXCEPTION WHEN data_exception THEN
                            of_column := {};
                        END;
                        END IF;
                        ",
            value(binding, i),
            literal(&column.name),
        );
    }
    if fields.is_empty() {
        return (String::new(), String::new());
    }
    let table =
        format!("CREATE TEMPORARY TABLE headworks_probe ({}) ON COMMIT DELETE ROWS;\n", fields.join(", "));
    (table, format!("IF left(code, 2) = '22' THEN\n                        {probes}END IF;"))
}

/// The staged value of a column as the table takes it.
fn value(binding: &Binding, i: usize) -> String {
    match &binding.columns[i].cast {
        Some(cast) => format!("c{i}::{cast}"),
        None => format!("c{i}"),
    }
}

/// Takes all staged rows on.
pub fn insert(table: &str, columns: &Columns, binding: &Binding, on_conflict: OnConflict) -> String {
    insert_of(table, columns, binding, on_conflict, "headworks_stage")
}

/// Has the server plan the INSERT of a row without values: it answers as it would
/// to the real one to names, types, rights and keys. Writes nothing.
pub fn explain(table: &str, columns: &Columns, binding: &Binding, on_conflict: OnConflict) -> String {
    let field = |(i, of): (usize, &Bound)| format!("NULL::{} AS c{i}", of.stage_type);
    let fields: Vec<String> = binding.columns.iter().enumerate().map(field).collect();
    let row = format!("(SELECT 0 AS n, {}) AS headworks_stage", fields.join(", "));
    format!("EXPLAIN {}", insert_of(table, columns, binding, on_conflict, &row))
}

fn insert_of(
    table: &str,
    columns: &Columns,
    binding: &Binding,
    on_conflict: OnConflict,
    from: &str,
) -> String {
    let value = |i: usize| value(binding, i);
    let values: Vec<String> = (0..binding.columns.len()).map(value).collect();
    let (table, list, values) = (quoted_table(table), column_list(columns), values.join(", "));
    let insert = format!("INSERT INTO {table} ({list}) SELECT {values} FROM");
    match on_conflict {
        OnConflict::Reject => format!("{insert} {from} ORDER BY n"),
        OnConflict::Ignore | OnConflict::Auto => {
            format!("{insert} {from} ORDER BY n ON CONFLICT DO NOTHING")
        }
        OnConflict::Upsert => {
            let at = |name: &String| columns.columns.iter().position(|column| column.name == *name);
            let key: Vec<String> = binding.key.iter().filter_map(at).map(value).collect();
            let nulls: Vec<String> = key.iter().map(|part| format!("{part} IS NULL")).collect();
            let set: Vec<String> = columns
                .columns
                .iter()
                .map(|column| quoted(&column.name))
                .map(|name| format!("{name} = EXCLUDED.{name}"))
                .collect();
            let named: Vec<String> = binding.key.iter().map(|name| quoted(name)).collect();
            // One statement cannot write a row twice: the last of a batch is the one that stays.
            format!(
                "{insert} (SELECT *, row_number() OVER (PARTITION BY {key} ORDER BY n DESC) AS newest \
                 FROM {from}) AS s WHERE newest = 1 OR {nulls} ORDER BY n \
                 ON CONFLICT ({named}) DO UPDATE SET {set}",
                key = key.join(", "),
                nulls = nulls.join(" OR "),
                named = named.join(", "),
                set = set.join(", "),
            )
        }
    }
}
