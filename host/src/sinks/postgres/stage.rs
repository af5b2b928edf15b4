//! The staging table of a session, and the SQL that inserts its rows into the sink's table.
//!
//! Rows go through the staging table if COPY cannot express what should happen (`on_conflict`, views,
//! types without a binary form), and if the table rejected some of them. `headworks_isolate` inserts the
//! staged rows group by group, each group in a subtransaction of its own. A sequence counts the rows
//! that reach INSERT. Sequences are not rolled back, so an error tells at which row it occurred. The
//! group is inserted again without that row, which is rejected once the others get past its place. In
//! some cases the count does not identify the row: an error at the last row of a group, as from a
//! trigger AFTER INSERT; two errors at one place, as from a foreign table, which receives rows in
//! batches; upserts, which insert fewer rows than are staged; rules, which insert more. The group is
//! then inserted row by row. The function returns the rows that cannot be inserted and the number of
//! inserted ones, all within the caller's transaction and in one round trip.

use tokio_postgres::Client;

use super::connect::{text_forms, text_forms_differ};
use super::encode::Target;
use super::schema::{literal, quoted};
use super::table::{Binding, Bound, Ignores, column_list};
use crate::sinks::columns::{Column, Columns};
use crate::sinks::config::OnConflict;

/// Most staged rows that are inserted together, and the fewest if many are bad.
const GROUP_MAX: usize = 32;
const GROUP_MIN: usize = 8;

/// Calls `headworks_isolate`. Each result row has the index of a staged row, from 0, and why it cannot
/// be inserted. The last result row has no index, and the count.
pub const ISOLATE: &str = "SELECT * FROM pg_temp.headworks_isolate()";

/// Copies rows to the staging table, whose first column is the row's number.
pub const COPY: &str = "COPY headworks_stage FROM STDIN (FORMAT binary)";

/// Truncates the temporary tables of [`create`], including the one of [`probe`] if there is one.
pub const TRUNCATE: &str = "TRUNCATE pg_temp.headworks_stage";
pub const TRUNCATE_BOTH: &str = "TRUNCATE pg_temp.headworks_stage, pg_temp.headworks_probe";

/// Prefix of the reason if the server does not permit creating the staging table and its function.
pub const CANNOT: &str =
    "cannot make the temporary table and the PL/pgSQL function that isolate rejected rows";

/// Returns why this user cannot create the staging table and its function, with the statement for each
/// missing right.
pub async fn lacks_right(client: &Client) -> Result<Vec<String>, tokio_postgres::Error> {
    const SQL: &str = "
SELECT current_user::text, current_database()::text,
       NOT has_database_privilege(current_database(), 'TEMPORARY'),
       (SELECT NOT has_language_privilege(oid, 'USAGE') FROM pg_language WHERE lanname = 'plpgsql')";
    let row = client.query_one(SQL, &[]).await?;
    let (user, database): (String, String) = (row.get(0), row.get(1));
    let to = quoted(&user);
    let mut lacks = Vec::new();
    if row.get(2) {
        lacks.push(format!(
            "user {user} may not create temporary tables, through which rejected rows are isolated: \
             GRANT TEMPORARY ON DATABASE {} TO {to}",
            quoted(&database),
        ));
    }
    let language = match row.get(3) {
        Some(true) => format!("user {user} may not use PL/pgSQL"),
        None => format!("database {database} does not have PL/pgSQL"),
        Some(false) => return Ok(lacks),
    };
    let mend = match row.get::<_, Option<bool>>(3) {
        Some(_) => format!("GRANT USAGE ON LANGUAGE plpgsql TO {to}"),
        None => "CREATE EXTENSION plpgsql".to_owned(),
    };
    lacks.push(format!("{language}, in which a function isolates rejected rows: {mend}"));
    Ok(lacks)
}

/// Creates what [`create`] creates, and rolls it back, within a transaction, to find out whether it can
/// be created before the first row is rejected. It does not stay, because the server cannot vacuum the
/// temporary table of a session, which would hold back the age of the database's transactions as long as
/// the connection lasts.
pub async fn attempt(client: &Client, create: &str) -> Result<(), tokio_postgres::Error> {
    let sql = format!("SAVEPOINT headworks_stage; {create}; ROLLBACK TO SAVEPOINT headworks_stage");
    client.batch_execute(&sql).await
}

/// Returns the SQL that creates the staging table and the function of this session. `table` is the
/// quoted name of the sink's table with its schema, because SQL within the function is resolved again in
/// each transaction.
///
/// The deferred constraints of each subtransaction are checked at its end, after the triggers that its
/// rows fire, as COMMIT would check them. `of_time` is the column of times that determines a row's
/// partition, if the table has no partition for the row.
///
/// A trigger may set `search_path` and the settings for parsing text, which then apply to later rows.
/// `search_path` is reset to `path`, and the others to the values of the sink's session.
pub fn create(
    table: &str,
    columns: &Columns,
    binding: &Binding,
    on_conflict: OnConflict,
    path: &str,
) -> String {
    // Looked at first: setting them after each group made isolating a sixth slower.
    let restore = format!(
        "IF current_setting('search_path') <> {path} OR {differ} THEN
                    PERFORM set_config('search_path', {path}, true);
                    PERFORM {forms};
                END IF",
        path = literal(path),
        differ = text_forms_differ(),
        forms = text_forms(),
    );
    let fields: Vec<String> =
        binding.columns.iter().enumerate().map(|(i, of)| format!("c{i} {}", of.stage_type)).collect();
    let insert = |counted, only: &str| {
        let from = format!("headworks_stage {only}");
        insert_of(table, columns, binding, on_conflict, counted, &from)
    };
    let replaced = match on_conflict {
        OnConflict::Upsert => {
            format!("({})", replaced(columns, binding, "headworks_stage WHERE ctid = ANY (rows)"))
        }
        OnConflict::Reject | OnConflict::Refuse | OnConflict::Ignore | OnConflict::Auto => "0".to_owned(),
    };
    let (probe_table, probe) = probe(columns, binding);
    let diagnostics = format!(
        "GET STACKED DIAGNOSTICS code = RETURNED_SQLSTATE, message = MESSAGE_TEXT,
                        detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT,
                        of_column = COLUMN_NAME, of_constraint = CONSTRAINT_NAME,
                        of_schema = SCHEMA_NAME, of_table = TABLE_NAME, context = PG_EXCEPTION_CONTEXT;
                    of_time := NULL;
                    of_default := NULL;
                    IF code = '23514' AND of_constraint = '' THEN
                        {}
                    END IF",
        partition_key(table, columns)
    );
    // Concerns every row, not this one: a lock, room, time, a sequence at its end.
    let passing = "left(SQLSTATE, 2) IN ('40', '53', '57') OR SQLSTATE IN ('55P03', '2200H')";
    format!(
        "CREATE TEMPORARY TABLE headworks_stage (n INTEGER, {fields}) ON COMMIT DELETE ROWS;
{probe_table}CREATE TEMPORARY SEQUENCE headworks_count CACHE 1000000;
CREATE FUNCTION pg_temp.headworks_isolate(
    OUT place INTEGER, OUT written BIGINT, OUT code TEXT, OUT message TEXT, OUT detail TEXT, OUT hint TEXT,
    OUT of_column TEXT, OUT of_time TEXT, OUT context TEXT, OUT of_default BOOLEAN,
    OUT of_schema TEXT, OUT of_table TEXT, OUT of_constraint TEXT)
RETURNS SETOF record LANGUAGE plpgsql AS $headworks$
#variable_conflict use_column
DECLARE
    staged tid[];
    since INTEGER := 1;
    until INTEGER;
    size INTEGER := {GROUP_MAX};
    -- The group's rows without those that errors came at.
    rows tid[];
    -- Places in staged, from 1: of the group's rows that are bad for certain, and of the one that the last
    -- error came at, and how many of the others were before that.
    certain INTEGER[];
    suspect INTEGER;
    before_suspect INTEGER;
    counted BIGINT;
    before INTEGER;
    -- The place in staged of the row that an error is about.
    at INTEGER;
    bad INTEGER;
    inserted BIGINT;
    total BIGINT := 0;
BEGIN
    SELECT array_agg(ctid ORDER BY n) INTO staged FROM headworks_stage;
    WHILE since <= coalesce(cardinality(staged), 0) LOOP
        until := least(since + size - 1, cardinality(staged));
        rows := staged[since:until];
        certain := '{{}}';
        suspect := NULL;
        before_suspect := -1;
        bad := 0;
        WHILE cardinality(rows) > 0 LOOP
            counted := nextval('pg_temp.headworks_count');
            BEGIN
                {some};
                GET DIAGNOSTICS inserted = ROW_COUNT;
                SET CONSTRAINTS ALL IMMEDIATE;
                SET CONSTRAINTS ALL DEFERRED;
                {restore};
                total := total + inserted + {replaced};
                EXIT;
            EXCEPTION WHEN OTHERS OR ASSERT_FAILURE THEN
                IF {passing} THEN RAISE; END IF;
                before := currval('pg_temp.headworks_count') - counted - 1;
                IF before > before_suspect AND before < cardinality(rows) - 1 THEN
                    IF suspect IS NOT NULL THEN
                        place := suspect - 1;
                        RETURN NEXT;
                        certain := certain || suspect;
                    END IF;
                    {diagnostics};
                    -- All that are not in rows any more were before it.
                    at := since + before + bad;
                    {probe}
                    suspect := at;
                    before_suspect := before;
                    rows := rows[:before] || rows[before + 2:];
                    bad := bad + 1;
                    CONTINUE;
                END IF;
            END;
            -- The count does not tell.
            IF suspect IS NOT NULL THEN
                suspect := NULL;
                bad := bad - 1;
            END IF;
            FOR at IN since..until LOOP
                CONTINUE WHEN at = ANY (certain);
                BEGIN
                    {one};
                    GET DIAGNOSTICS inserted = ROW_COUNT;
                    SET CONSTRAINTS ALL IMMEDIATE;
                    SET CONSTRAINTS ALL DEFERRED;
                    {restore};
                    total := total + inserted;
                EXCEPTION WHEN OTHERS OR ASSERT_FAILURE THEN
                    IF {passing} THEN RAISE; END IF;
                    {diagnostics};
                    {probe}
                    place := at - 1;
                    RETURN NEXT;
                    bad := bad + 1;
                END;
            END LOOP;
            EXIT;
        END LOOP;
        IF suspect IS NOT NULL THEN
            place := suspect - 1;
            RETURN NEXT;
        END IF;
        since := until + 1;
        -- The more bad rows, the more of a large group is inserted in vain.
        size := CASE bad WHEN 0 THEN least(2 * size, {GROUP_MAX}) WHEN 1 THEN size
            ELSE greatest(size / 2, {GROUP_MIN}) END;
    END LOOP;
    place := NULL;
    written := total;
    RETURN NEXT;
END
$headworks$",
        fields = fields.join(", "),
        // In the order of their places, as TIDs are looked up.
        some = insert(true, "WHERE ctid = ANY (rows)"),
        one = insert(false, "WHERE ctid = staged[at]"),
    )
}

/// Returns the SQL that finds the column of times in the partition key of the table `of_table`, which
/// has no partition for a row, and whether that table is the sink's and fills the key by itself, as in
/// `created_at TIMESTAMPTZ DEFAULT now()`. A missing partition of a partition concerns only the rows of
/// that partition. Columns within an expression are only in `pg_depend`.
fn partition_key(table: &str, columns: &Columns) -> String {
    let names = |of: &mut dyn Iterator<Item = &Column>| {
        let names: Vec<String> = of.map(|column| literal(&column.name)).collect();
        format!("ARRAY[{}]::text[]", names.join(", "))
    };
    format!(
        "SELECT min(a.attname::text) FILTER (WHERE a.attname = ANY ({times})),
                               bool_and(a.attname <> ALL ({filled}) AND c.oid = to_regclass({table})::oid)
                        INTO of_time, of_default
                        FROM pg_class AS c JOIN pg_namespace AS s ON s.oid = c.relnamespace
                        JOIN pg_partitioned_table AS p ON p.partrelid = c.oid
                        JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0
                        WHERE c.relname = of_table AND s.nspname = of_schema
                          AND (a.attnum = ANY (p.partattrs) OR EXISTS (
                            SELECT FROM pg_depend AS d
                            WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.objsubid = a.attnum
                              AND d.refclassid = d.classid AND d.refobjid = c.oid AND d.refobjsubid = 0
                              AND d.deptype = 'i'));",
        times = names(&mut columns.columns.iter().filter(|column| column.is_time())),
        filled = names(&mut columns.columns.iter()),
        table = literal(table),
    )
}

/// Returns whether [`create`] makes a table for probes.
pub fn has_probe(columns: &Columns, binding: &Binding) -> bool {
    !probe(columns, binding).0.is_empty()
}

/// Ends a probe that found nothing. The exception is caught at once, and undoes what functions of
/// defaults or casts have written meanwhile.
const TAKE_BACK: &str = "RAISE EXCEPTION USING ERRCODE = 'HWPRB';";
const TAKEN_BACK: &str = "HWPRB";

/// Returns the SQL of a table with the columns whose values the server converts or measures, and those
/// that the table fills itself, and the SQL that determines which of them rejects the row `staged[at]`:
/// errors of class 22 (data exception) name none.
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
                            SELECT {} FROM headworks_stage WHERE ctid = staged[at];
                            {TAKE_BACK}
                        EXCEPTION WHEN SQLSTATE '{TAKEN_BACK}' THEN NULL;
                        WHEN data_exception THEN
                            of_column := {};
                        END;
                        END IF;
                        ",
            value(binding, i),
            literal(&column.name),
        );
    }
    for (i, default) in binding.defaults.iter().enumerate() {
        fields.push(format!("d{i} {}", default.type_name));
        probes += &format!(
            "IF of_column = '' THEN
                        BEGIN
                            INSERT INTO headworks_probe (d{i}) VALUES ({});
                            {TAKE_BACK}
                        EXCEPTION WHEN SQLSTATE '{TAKEN_BACK}' THEN NULL;
                        WHEN OTHERS THEN
                            -- Any other may be of this look alone: the user may not use what the default names.
                            IF SQLSTATE = code THEN
                                of_column := {};
                                of_default := TRUE;
                            END IF;
                        END;
                        END IF;
                        ",
            default.expression,
            literal(&default.name),
        );
    }
    if fields.is_empty() {
        return (String::new(), String::new());
    }
    let table = format!("CREATE TEMPORARY TABLE headworks_probe ({});\n", fields.join(", "));
    (table, format!("IF left(code, 2) = '22' THEN\n                        {probes}END IF;"))
}

/// Returns the staged value of a column as the table takes it.
fn value(binding: &Binding, i: usize) -> String {
    let of = &binding.columns[i];
    let staged = match of.stage_type.as_str() {
        "bytea" if of.target != Target::Bytea => format!("convert_from(c{i}, 'UTF8')"),
        _ => format!("c{i}"),
    };
    match &of.cast {
        Some(cast) => format!("{staged}::{cast}"),
        None => staged,
    }
}

/// Returns the INSERT of all staged rows into the table with the quoted name `table`.
pub fn insert(table: &str, columns: &Columns, binding: &Binding, on_conflict: OnConflict) -> String {
    let from = match on_conflict {
        OnConflict::Upsert => "headworks_stage",
        OnConflict::Reject | OnConflict::Refuse | OnConflict::Ignore | OnConflict::Auto => {
            "headworks_stage ORDER BY n"
        }
    };
    insert_of(table, columns, binding, on_conflict, false, from)
}

/// Returns the SQL that counts the rows of `from` that [`insert`] skips with `on_conflict: upsert`,
/// because a later row of the batch has the same key.
pub fn replaced(columns: &Columns, binding: &Binding, from: &str) -> String {
    let (key, nulls) = key(columns, binding);
    format!(
        "SELECT count(*) FROM (SELECT *, row_number() OVER (PARTITION BY {key} ORDER BY n DESC) AS newest \
         FROM {from}) AS s WHERE newest > 1 AND NOT ({nulls})"
    )
}

/// Returns the staged key of `on_conflict: upsert`, and the condition that a part of it is null.
fn key(columns: &Columns, binding: &Binding) -> (String, String) {
    let at = |name: &String| columns.columns.iter().position(|column| column.name == *name);
    let key: Vec<String> = binding.key.iter().filter_map(at).map(|i| value(binding, i)).collect();
    let nulls: Vec<String> = key.iter().map(|part| format!("{part} IS NULL")).collect();
    (key.join(", "), nulls.join(" OR "))
}

/// Returns SQL that lets the server plan the INSERT of a row without values. The server answers as it
/// would to the real INSERT about names, types, rights and keys. Writes nothing.
pub fn explain(table: &str, columns: &Columns, binding: &Binding, on_conflict: OnConflict) -> String {
    let field = |(i, of): (usize, &Bound)| format!("NULL::{} AS c{i}", of.stage_type);
    let fields: Vec<String> = binding.columns.iter().enumerate().map(field).collect();
    let row = format!("(SELECT 0 AS n, {}) AS headworks_stage", fields.join(", "));
    format!("EXPLAIN {}", insert_of(table, columns, binding, on_conflict, false, &row))
}

/// Returns an INSERT. With `counted`, a sequence counts each row just before it is inserted. Upserts are
/// not counted, and neither are rows that rules process further, which would be counted again.
fn insert_of(
    table: &str,
    columns: &Columns,
    binding: &Binding,
    on_conflict: OnConflict,
    counted: bool,
    from: &str,
) -> String {
    let value = |i: usize| value(binding, i);
    let mut values: Vec<String> = (0..binding.columns.len()).map(value).collect();
    let mut from = from.to_owned();
    if counted && on_conflict != OnConflict::Upsert && !binding.has_rules {
        // Values are converted below ORDER BY, all of them before the first row is inserted: its triggers may
        // set what text is read by. The count, being volatile, is called above it, as INSERT takes the row.
        let named = values.iter().enumerate().map(|(i, value)| format!("{value} AS v{i}"));
        from = format!("(SELECT n, {} FROM {from} ORDER BY n) AS s", named.collect::<Vec<_>>().join(", "));
        values = (0..values.len()).map(|i| format!("v{i}")).collect();
        values[0] = "CASE WHEN nextval('pg_temp.headworks_count') > 0 THEN v0 END".to_owned();
    }
    let (list, values) = (column_list(columns), values.join(", "));
    // As COPY does in any case.
    let overrides = binding.columns.iter().any(|of| of.is_always_identity);
    let overriding = if overrides { " OVERRIDING SYSTEM VALUE" } else { "" };
    let insert = format!("INSERT INTO {table} ({list}){overriding} SELECT {values} FROM");
    match on_conflict {
        OnConflict::Reject | OnConflict::Refuse => format!("{insert} {from}"),
        OnConflict::Ignore | OnConflict::Auto => match &binding.ignores {
            Ignores::Nothing => format!("{insert} {from}"),
            Ignores::Key(names) => {
                let names: Vec<String> = names.iter().map(|name| quoted(name)).collect();
                format!("{insert} {from} ON CONFLICT ({}) DO NOTHING", names.join(", "))
            }
            Ignores::AnyKey { .. } => format!("{insert} {from} ON CONFLICT DO NOTHING"),
        },
        OnConflict::Upsert => {
            let (key, nulls) = key(columns, binding);
            // An identity in the key is the same, and no UPDATE may name it.
            let is_set = |(column, of): &(&Column, &Bound)| {
                !(of.is_always_identity && binding.key.contains(&column.name))
            };
            let set: Vec<String> = columns
                .columns
                .iter()
                .zip(&binding.columns)
                .filter(is_set)
                .map(|(column, _)| quoted(&column.name))
                .map(|name| format!("{name} = EXCLUDED.{name}"))
                .collect();
            let update = match set.is_empty() {
                true => "NOTHING".to_owned(),
                false => format!("UPDATE SET {}", set.join(", ")),
            };
            let named: Vec<String> = binding.key.iter().map(|name| quoted(name)).collect();
            // One statement cannot write a row twice: the last of a batch is the one that stays.
            format!(
                "{insert} (SELECT *, row_number() OVER (PARTITION BY {key} ORDER BY n DESC) AS newest \
                 FROM {from}) AS s WHERE newest = 1 OR {nulls} ORDER BY n \
                 ON CONFLICT ({named}) DO {update}",
                named = named.join(", "),
            )
        }
    }
}
