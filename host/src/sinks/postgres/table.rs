//! The table in the server, and how each column is written.

use tokio_postgres::{Client, Row};

use super::encode::{Length, Target};
use super::schema::quoted;
use crate::sinks::columns::{Columns, Kind};
use crate::sinks::config::OnConflict;

/// The server's description of a table.
pub struct Table {
    columns: Vec<TableColumn>,
    keys: Vec<Key>,
    writing: Writing,
    /// Equal as long as nothing changes on which a binding relies.
    pub fingerprint: String,
}

/// The server's description of how rows may be written.
struct Writing {
    /// Whether COPY does not write as INSERT does: for a view, a rule, or row-level security that
    /// applies to this user.
    insert_only: bool,
    /// Whether it has rules for INSERT or UPDATE, which exclude ON CONFLICT.
    has_rules: bool,
    /// Whether triggers before the insert may set any column from the contents of the row.
    has_triggers: bool,
    /// Whether ON CONFLICT names no key: the keys of a view and a foreign table are not known here, and
    /// under row-level security a named key requires more rights.
    takes_any_key: bool,
    /// Whether the database's encoding lacks characters, so that text is staged as bytes: a character
    /// that cannot be converted is then an error of one row, and not of COPY.
    text_as_bytes: bool,
    /// Whether the table or a partition of it is a foreign table.
    is_foreign: bool,
    /// Whether the table or a partition of it is UNLOGGED.
    is_unlogged: bool,
}

/// A unique key, or an exclusion constraint.
struct Key {
    name: String,
    /// Whether it is checked with each row, not at the end of a statement or transaction.
    is_immediate: bool,
    /// Its columns, including those of its predicate, which decide whether the key applies to a row. An
    /// expression has no name.
    columns: Vec<Option<String>>,
    /// Whether ON CONFLICT can name it by its columns.
    is_plain: bool,
}

struct TableColumn {
    name: String,
    /// Type without domains.
    oid: u32,
    is_enum: bool,
    /// Name of `oid`.
    base_name: String,
    /// Declared type, without and with its modifier.
    cast_name: String,
    type_name: String,
    modifier: i32,
    not_null: bool,
    has_default: bool,
    /// Expression of its default, if it has one that is not computed from other columns and whose type
    /// this user may use.
    default: Option<String>,
    /// Whether the table computes it from other columns.
    is_generated: bool,
    /// Whether it is GENERATED ALWAYS AS IDENTITY: COPY writes it, but INSERT only with OVERRIDING
    /// SYSTEM VALUE.
    is_always_identity: bool,
}

/// How one column is written.
#[derive(Clone, Debug)]
pub struct Bound {
    pub target: Target,
    /// Type of its column in the staging table.
    pub stage_type: String,
    /// Type of its column in the table, with its modifier.
    pub type_name: String,
    /// Type to which the staged value is cast, if assignment does not convert it.
    pub cast: Option<String>,
    /// Whether the column is GENERATED ALWAYS AS IDENTITY.
    pub is_always_identity: bool,
}

/// How a table is written.
#[derive(Clone, Debug)]
pub struct Binding {
    pub columns: Vec<Bound>,
    /// Whether rows must go through the staging table.
    pub staged: bool,
    /// Whether rules of the table may make several rows of one.
    pub has_rules: bool,
    /// Columns of the key of `on_conflict: upsert`.
    pub key: Vec<String>,
    /// Keys for which a row is ignored with `on_conflict: ignore`.
    pub ignores: Ignores,
    /// Columns that the table fills itself, by their defaults.
    pub defaults: Vec<DefaultColumn>,
    pub fingerprint: String,
}

/// The keys with which a row may conflict because of its own contents. A conflict with any other key
/// means that a default of the table gave two rows the same value, and not that the row already exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ignores {
    /// No key concerns the row's own contents.
    Nothing,
    /// The key of these columns.
    Key(Vec<String>),
    /// All keys concern the row's own contents; or ON CONFLICT can name only one of several; or it is
    /// not known which keys do.
    AnyKey {
        /// Whether there are keys that the table fills itself.
        of_table: bool,
    },
}

/// A column that has a default and that `columns` does not fill.
#[derive(Clone, Debug)]
pub struct DefaultColumn {
    pub name: String,
    pub type_name: String,
    pub expression: String,
}

const COLUMNS: &str = "
SELECT a.attname::text, base.oid, base.typtype = 'e', format_type(base.oid, -1), format_type(a.atttypid, -1),
       format_type(a.atttypid, a.atttypmod),
       CASE WHEN declared.typtype = 'd' THEN declared.typtypmod ELSE a.atttypmod END,
       a.attnotnull OR base.not_null,
       a.atthasdef OR a.attidentity <> '' OR declared.typdefault IS NOT NULL, a.attidentity = 'a',
       CASE WHEN a.attgenerated = '' AND has_type_privilege(a.atttypid, 'USAGE')
                 AND has_schema_privilege(declared.typnamespace, 'USAGE')
            THEN coalesce(pg_get_expr(d.adbin, d.adrelid), pg_get_expr(declared.typdefaultbin, 0)) END,
       a.attgenerated <> ''
FROM pg_attribute a JOIN pg_type declared ON declared.oid = a.atttypid
LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
CROSS JOIN LATERAL (
    WITH RECURSIVE below AS (
        SELECT declared.oid, declared.typtype, declared.typbasetype, declared.typnotnull AS not_null
        UNION ALL
        SELECT t.oid, t.typtype, t.typbasetype, b.not_null OR t.typnotnull
        FROM below b JOIN pg_type t ON t.oid = b.typbasetype
    )
    SELECT * FROM below WHERE typtype <> 'd'
) AS base
WHERE a.attrelid = to_regclass($1)::oid AND a.attnum > 0 AND NOT a.attisdropped
ORDER BY a.attnum";

/// Keys of the table, and those that only a partition has. Rows can conflict with the latter, but ON
/// CONFLICT cannot name them.
const KEYS: &str = "
WITH RECURSIVE tables AS (
    SELECT to_regclass($1)::oid AS oid, true AS is_root
    UNION ALL
    SELECT c.oid, false FROM tables t
    JOIN pg_inherits h ON h.inhparent = t.oid JOIN pg_class c ON c.oid = h.inhrelid AND c.relispartition
)
SELECT array_agg(a.attname::text),
       t.is_root AND i.indisunique AND i.indimmediate AND i.indisvalid
           AND i.indpred IS NULL AND i.indexprs IS NULL,
       i.indexrelid::regclass::text, i.indimmediate
FROM tables t JOIN pg_index i ON i.indrelid = t.oid
CROSS JOIN LATERAL (
    SELECT unnest(i.indkey[0:i.indnkeyatts - 1])::integer
    UNION
    SELECT d.refobjsubid FROM pg_depend d
    WHERE i.indpred IS NOT NULL AND d.classid = 'pg_class'::regclass AND d.objid = i.indexrelid
      AND d.refclassid = d.classid AND d.refobjid = i.indrelid AND d.refobjsubid > 0
) AS k (attnum)
LEFT JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum AND k.attnum <> 0
WHERE (i.indisunique OR i.indisexclusion)
  AND (t.is_root OR NOT EXISTS (SELECT FROM pg_inherits h WHERE h.inhrelid = i.indexrelid))
GROUP BY t.is_root, i.indexrelid ORDER BY t.is_root DESC, i.indisprimary DESC, i.indexrelid";

/// Rules by their event (2 is UPDATE, 3 INSERT), and triggers by their bits: BEFORE INSERT FOR EACH ROW.
const WRITING: &str = "
WITH RECURSIVE tables AS (
    SELECT to_regclass($1)::oid AS oid
    UNION ALL
    SELECT c.oid FROM tables t
    JOIN pg_inherits h ON h.inhparent = t.oid JOIN pg_class c ON c.oid = h.inhrelid AND c.relispartition
)
SELECT c.relkind = 'v' OR row_security_active(c.oid) OR coalesce(rules.events LIKE '%3%', false),
       rules.events IS NOT NULL,
       EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid IN (SELECT oid FROM tables)
               AND t.tgtype & 7 = 7 AND t.tgenabled <> 'D' AND NOT t.tgisinternal),
       row_security_active(c.oid)
           OR EXISTS (SELECT FROM pg_class p WHERE p.oid IN (SELECT oid FROM tables) AND p.relkind NOT IN ('r', 'p')),
       current_setting('server_encoding') NOT IN ('UTF8', 'SQL_ASCII'),
       EXISTS (SELECT FROM pg_class p WHERE p.oid IN (SELECT oid FROM tables) AND p.relkind = 'f'),
       EXISTS (SELECT FROM pg_class p WHERE p.oid IN (SELECT oid FROM tables) AND p.relpersistence = 'u')
FROM pg_class c CROSS JOIN LATERAL (
    SELECT string_agg(r.ev_type::text, '') FROM pg_rewrite r
    WHERE r.ev_class = c.oid AND r.ev_type IN ('2', '3') AND r.ev_enabled IN ('O', 'A')
) AS rules (events)
WHERE c.oid = to_regclass($1)::oid";

/// One text for everything on which a binding relies. If a rename puts another table in this one's
/// place, the oid changes.
const FINGERPRINT: &str = "
SELECT concat_ws('|', c.oid, c.relkind, c.relrowsecurity, c.relforcerowsecurity,
    (SELECT string_agg(concat_ws(':', a.attnum, a.attname, a.atttypid, a.atttypmod, a.attnotnull, a.atthasdef,
                                 a.attidentity), ',' ORDER BY a.attnum)
     FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
    (SELECT string_agg(concat_ws(':', i.indexrelid, i.indimmediate, i.indisvalid), ',' ORDER BY i.indexrelid)
     FROM pg_index i WHERE i.indrelid = c.oid AND (i.indisunique OR i.indisexclusion)),
    CASE WHEN c.relhasrules THEN
        (SELECT string_agg(concat_ws(':', r.oid, r.ev_enabled), ',' ORDER BY r.oid)
         FROM pg_rewrite r WHERE r.ev_class = c.oid AND r.ev_type IN ('2', '3'))
    END,
    CASE WHEN c.relhastriggers THEN
        (SELECT string_agg(concat_ws(':', t.oid, t.tgenabled), ',' ORDER BY t.oid)
         FROM pg_trigger t WHERE t.tgrelid = c.oid AND t.tgtype & 7 = 7 AND NOT t.tgisinternal)
    END)
FROM pg_class c WHERE c.oid = to_regclass($1)::oid";

/// Returns whether a constraint ($4), or otherwise NOT NULL of a column ($5), of a table ($2, $3)
/// affects every row of the sink's table ($1) alike. This is so if the sink's table itself has it, and
/// it concerns only columns that the table fills by itself and with the same result for every row, which
/// are not among $6. None of these may be computed from others or be different for each row, as
/// `random()` is, and no trigger may set them from the contents of the row.
///
/// A constraint that only a partition has affects the rows of that partition; one that it inherits from
/// the sink's table is looked up there, and so are defaults, because those of a partition do not apply
/// to rows that are inserted through its parent. The columns in the predicate of an index decide whether
/// a row conflicts with it, so they count as part of its key. A sequence fills its column alike for
/// every row if the constraint is a key, or if its number is the whole default: `nextval('s') % 5` may
/// violate a CHECK for one row and not for the next.
pub const FILLED_BY_TABLE: &str = "
WITH RECURSIVE tables AS (
    SELECT to_regclass($1)::oid AS oid, true AS is_root
    UNION ALL
    SELECT h.inhrelid, false FROM tables t JOIN pg_inherits h ON h.inhparent = t.oid
),
root AS (SELECT oid FROM tables WHERE is_root),
of_error AS (
    SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = $2 AND c.relname = $3 AND c.oid IN (SELECT oid FROM tables)
),
constraints AS (
    SELECT k.oid, k.contype FROM pg_constraint k JOIN of_error e ON e.oid = k.conrelid WHERE k.conname = $4
    UNION
    SELECT p.oid, p.contype FROM constraints c JOIN pg_constraint k ON k.oid = c.oid
    JOIN pg_constraint p ON p.oid = k.conparentid
        OR k.contype = 'c' AND p.contype = 'c' AND p.conname = k.conname AND p.conrelid = (SELECT oid FROM root)
),
indexes AS (
    SELECT i.indexrelid FROM pg_index i JOIN of_error e ON e.oid = i.indrelid
    JOIN pg_class c ON c.oid = i.indexrelid WHERE c.relname = $4
    UNION
    SELECT h.inhparent FROM indexes x JOIN pg_inherits h ON h.inhrelid = x.indexrelid
),
of_root AS (SELECT i.* FROM pg_index i JOIN indexes x ON x.indexrelid = i.indexrelid JOIN root r ON r.oid = i.indrelid),
keys AS (
    SELECT unnest(k.conkey)::integer AS attnum, k.contype IN ('p', 'u', 'x') AS is_key
    FROM constraints c JOIN pg_constraint k ON k.oid = c.oid JOIN root r ON r.oid = k.conrelid
    UNION
    SELECT unnest(i.indkey[0:i.indnkeyatts - 1]), true FROM of_root i
    UNION
    SELECT d.refobjsubid, true FROM of_root i JOIN pg_depend d
        ON d.classid = 'pg_class'::regclass AND d.objid = i.indexrelid AND d.refclassid = d.classid
        AND d.refobjid = i.indrelid AND d.refobjsubid > 0
    WHERE i.indpred IS NOT NULL
    UNION
    SELECT a.attnum, false FROM pg_attribute a JOIN root r ON r.oid = a.attrelid CROSS JOIN of_error
    WHERE $4 = '' AND a.attname = $5 AND a.attnotnull
)
SELECT coalesce(bool_and(coalesce(a.attname <> ALL ($6) AND a.attgenerated = '' AND NOT varies.is_anew, false)), false)
       AND NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid IN (SELECT oid FROM tables)
                       AND t.tgtype & 20 <> 0 AND t.tgenabled <> 'D' AND NOT t.tgisinternal)
FROM keys k CROSS JOIN root r
LEFT JOIN pg_attribute a ON a.attrelid = r.oid AND a.attnum = k.attnum
LEFT JOIN pg_type declared ON declared.oid = a.atttypid
LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
CROSS JOIN LATERAL (
    SELECT coalesce(pg_get_expr(d.adbin, d.adrelid), pg_get_expr(declared.typdefaultbin, 0)) AS text
) AS filled
CROSS JOIN LATERAL (
    SELECT EXISTS (
        SELECT FROM regexp_matches(filled.text, '([^ ().\"]+)\"?[(]', 'g') AS called (name)
        JOIN pg_proc p ON p.proname = called.name[1] AND p.pronamespace = 'pg_catalog'::regnamespace
        WHERE p.provolatile = 'v'
          AND (p.proname <> 'nextval' OR NOT k.is_key AND filled.text !~ '^nextval[(][^()]*[)]$'))
    OR EXISTS (
        SELECT FROM pg_depend u JOIN pg_proc p ON u.refclassid = 'pg_proc'::regclass AND p.oid = u.refobjid
        WHERE p.provolatile = 'v'
          AND CASE WHEN d.oid IS NULL THEN u.classid = 'pg_type'::regclass AND u.objid = declared.oid
              ELSE u.classid = 'pg_attrdef'::regclass AND u.objid = d.oid END) AS is_anew
) AS varies";

/// Returns SQL that fails with a division by zero if the fingerprint ($2) has changed.
pub fn check() -> String {
    format!("SELECT 1 / (CASE WHEN ({FINGERPRINT}) IS NOT DISTINCT FROM $2::text THEN 1 ELSE 0 END)")
}

/// Returns the schemas in which names without a schema are looked up.
pub async fn search_path(client: &Client) -> Result<String, tokio_postgres::Error> {
    Ok(client.query_one("SELECT current_setting('search_path')", &[]).await?.get(0))
}

/// Returns the quoted name, with its schema, of the table that `name` denotes now. It denotes the same
/// table independent of `search_path` and of new tables in other schemas.
pub async fn qualified(client: &Client, name: &str) -> Result<String, tokio_postgres::Error> {
    const SQL: &str = "
SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.oid = to_regclass($1)::oid";
    let row = client.query_opt(SQL, &[&name]).await?;
    Ok(row.map_or_else(|| name.to_owned(), |row| row.get(0)))
}

/// Returns the fingerprint; `None` if there is no table of this quoted name.
pub async fn fingerprint(client: &Client, name: &str) -> Result<Option<String>, tokio_postgres::Error> {
    let row = client.query_opt(FINGERPRINT, &[&name]).await?;
    Ok(row.map(|row| row.get(0)))
}

impl Table {
    /// Reads the description of the table with this quoted name; `None` if there is none.
    pub async fn read(client: &Client, name: &str) -> Result<Option<Self>, tokio_postgres::Error> {
        let Some(fingerprint) = fingerprint(client, name).await? else { return Ok(None) };
        let columns = client.query(COLUMNS, &[&name]).await?;
        let columns = columns
            .iter()
            .map(|row| TableColumn {
                name: row.get(0),
                oid: row.get(1),
                is_enum: row.get(2),
                base_name: row.get(3),
                cast_name: row.get(4),
                type_name: row.get(5),
                modifier: row.get(6),
                not_null: row.get(7),
                has_default: row.get(8),
                is_always_identity: row.get(9),
                default: row.get(10),
                is_generated: row.get(11),
            })
            .collect();
        let keys = client.query(KEYS, &[&name]).await?;
        let key = |row: &Row| Key {
            columns: row.get(0),
            is_plain: row.get(1),
            name: row.get(2),
            is_immediate: row.get(3),
        };
        let keys = keys.iter().map(key).collect();
        let row = client.query_one(WRITING, &[&name]).await?;
        let writing = Writing {
            insert_only: row.get(0),
            has_rules: row.get(1),
            has_triggers: row.get(2),
            takes_any_key: row.get(3),
            text_as_bytes: row.get(4),
            is_foreign: row.get(5),
            is_unlogged: row.get(6),
        };
        Ok(Some(Self { columns, keys, writing, fingerprint }))
    }

    /// Returns warnings about what prevents rows of the table from being there exactly once.
    pub fn warnings(&self, table: &str) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.writing.is_foreign {
            warnings.push(format!(
                "table {table} is a foreign table, or has a partition that is one: the foreign server \
                 commits rows before the position is committed here, so rows are written twice where this \
                 server fails between the two; let a sink of its own write to that server"
            ));
        }
        if self.writing.is_unlogged {
            warnings.push(format!(
                "table {table} is UNLOGGED, or has a partition that is: PostgreSQL empties it after a \
                 crash of the server, and the rows are not written again, because positions stay; run \
                 ALTER TABLE … SET LOGGED for each of them"
            ));
        }
        warnings
    }

    /// Returns how each column is written. The table's types and NOT NULL take precedence.
    pub fn bind(
        &self,
        table: &str,
        columns: &mut Columns,
        on_conflict: OnConflict,
    ) -> Result<Binding, String> {
        let mut bound = Vec::new();
        for column in &mut columns.columns {
            let Some(known) = self.columns.iter().find(|known| known.name == column.name) else {
                let names: Vec<&str> = self.columns.iter().map(|known| known.name.as_str()).collect();
                return Err(format!(
                    "table {table} has no column \"{}\": it has {}; add it, or say in `columns` which to fill",
                    column.name,
                    names.join(", ")
                ));
            };
            let of = known.bound(self.writing.text_as_bytes);
            column.kind = of.target.kind();
            if of.target == Target::Date {
                column.zone_minutes = None;
            }
            if column.holds_time() && matches!(of.target, Target::Int2 | Target::Int4) {
                return Err(format!(
                    "column \"{}\" of table {table} is {}, which cannot hold a time: make it timestamptz, or bigint",
                    column.name, known.type_name
                ));
            }
            column.required |= known.not_null && !known.has_default;
            bound.push(of);
        }
        let missing = self.columns.iter().find(|known| {
            known.not_null
                && !known.has_default
                && !columns.columns.iter().any(|column| column.name == known.name)
        });
        if let Some(known) = missing {
            return Err(format!(
                "column \"{}\" of table {table} is NOT NULL without a default, and `columns` does not fill it",
                known.name
            ));
        }
        if on_conflict != OnConflict::Reject && self.writing.has_rules {
            return Err(format!(
                "`on_conflict` other than reject does not work on table {table}, which has a rule for INSERT or \
                 UPDATE: PostgreSQL takes no ON CONFLICT there; drop the rule, or set `on_conflict: reject`"
            ));
        }
        if on_conflict == OnConflict::Ignore
            && let Some(key) = self.keys.iter().find(|key| !key.is_immediate)
        {
            return Err(format!(
                "`on_conflict: ignore` does not work on table {table}, whose key {} is DEFERRABLE: make the key \
                 NOT DEFERRABLE, or set `on_conflict: reject`",
                key.name
            ));
        }
        let is_filled = |name: &String| columns.columns.iter().any(|column| column.name == *name);
        let key = self.keys.iter().find_map(|key| {
            let names: Option<Vec<String>> = key.columns.iter().cloned().collect();
            names.filter(|names| key.is_plain && names.iter().all(is_filled))
        });
        if on_conflict == OnConflict::Upsert && key.is_none() {
            return Err(format!(
                "`on_conflict: upsert` needs a unique key of table {table} whose columns are all in `columns`: \
                 add one, such as PRIMARY KEY (device_id, time)"
            ));
        }
        let ignores = self.ignores(is_filled);
        let staged = self.writing.insert_only
            || on_conflict != OnConflict::Reject && !matches!(ignores, Ignores::Nothing)
            || bound.iter().any(|of| matches!(of.target, Target::Array { .. } | Target::Other));
        let key = key.unwrap_or_default();
        let unfilled = self.columns.iter().filter(|known| !is_filled(&known.name));
        let default = |known: &TableColumn| {
            let (name, type_name) = (known.name.clone(), known.type_name.clone());
            known.default.clone().map(|expression| DefaultColumn { name, type_name, expression })
        };
        let defaults = unfilled.filter_map(default).collect();
        let (has_rules, fingerprint) = (self.writing.has_rules, self.fingerprint.clone());
        Ok(Binding { columns: bound, staged, has_rules, key, ignores, defaults, fingerprint })
    }

    /// Returns whether each key has a column that the table numbers by itself, so that no row conflicts
    /// with another.
    pub fn numbers_keys(&self, is_filled: impl Fn(&String) -> bool) -> bool {
        let is_numbered = |known: &TableColumn| match &known.default {
            Some(default) => default.starts_with("nextval("),
            None => known.has_default && !known.is_generated,
        };
        let is_numbered = |name: &&String| {
            !is_filled(name) && self.columns.iter().any(|known| known.name == **name && is_numbered(known))
        };
        let has_number = |key: &Key| key.columns.iter().flatten().any(|name| is_numbered(&name));
        !self.keys.is_empty() && self.keys.iter().all(has_number)
    }

    /// Returns the keys for which a row is ignored with `on_conflict: ignore`. `is_filled` tells whether
    /// the sink fills a column.
    pub fn ignores(&self, is_filled: impl Fn(&String) -> bool) -> Ignores {
        let is_generated = |name: &String| self.columns.iter().any(|of| of.name == *name && of.is_generated);
        let is_of_row =
            |name: &Option<String>| name.as_ref().is_none_or(|name| is_filled(name) || is_generated(name));
        let (of_row, of_table): (Vec<_>, Vec<_>) =
            self.keys.iter().partition(|key| key.columns.iter().any(is_of_row));
        let Writing { has_triggers, takes_any_key, .. } = self.writing;
        match of_row[..] {
            _ if takes_any_key => Ignores::AnyKey { of_table: false },
            [] if !has_triggers || of_table.is_empty() => Ignores::Nothing,
            [key] if key.is_plain && !of_table.is_empty() && !has_triggers => {
                Ignores::Key(key.columns.iter().flatten().cloned().collect())
            }
            _ => Ignores::AnyKey { of_table: !of_table.is_empty() },
        }
    }
}

impl TableColumn {
    fn bound(&self, text_as_bytes: bool) -> Bound {
        let length = match self.base_name.as_str() {
            "character varying" | "bpchar" if self.modifier >= 4 => Length::Chars(self.modifier as u32 - 4),
            "numeric" if self.modifier >= 4 => {
                // Precision and scale, as numeric.c packs them: 11 bits of scale, signed.
                let packed = self.modifier - 4;
                let scale = ((packed & 0x7ff) ^ 1_024) - 1_024;
                Length::Digits((packed >> 16 & 0xffff) - scale)
            }
            _ => Length::Any,
        };
        let target = match self.is_enum {
            true => Target::Text(Length::Any),
            false if self.base_name.ends_with("[]") => {
                Target::Array { of_json: matches!(self.base_name.as_str(), "json[]" | "jsonb[]") }
            }
            false => Target::of(self.oid, length),
        };
        let text = || if text_as_bytes { "bytea" } else { "text" }.to_owned();
        let (stage_type, cast) = match target {
            Target::Text(_) if self.is_enum => (text(), Some(self.cast_name.clone())),
            Target::Text(_) => (text(), None),
            // Their syntax is checked as the row is inserted, where a bad one is isolated.
            Target::Json | Target::Jsonb | Target::Array { .. } | Target::Other => {
                (text(), Some(self.cast_name.clone()))
            }
            _ => (self.base_name.clone(), None),
        };
        let (type_name, is_always_identity) = (self.type_name.clone(), self.is_always_identity);
        Bound { target, stage_type, type_name, cast, is_always_identity }
    }
}

impl Target {
    fn kind(self) -> Option<Kind> {
        Some(match self {
            Self::Bool => Kind::Bool,
            Self::Int2 | Self::Int4 | Self::Int8 => Kind::Bigint,
            Self::Float4 | Self::Float8 | Self::Numeric(_) => Kind::Double,
            Self::Text(_) | Self::Uuid | Self::Array { .. } | Self::Other => Kind::Text,
            Self::Timestamp | Self::Date => Kind::Timestamptz,
            Self::Json | Self::Jsonb => Kind::Jsonb,
            Self::Bytea => Kind::Bytes,
        })
    }
}

/// Returns the quoted columns: `"time", "device_id", ..`
pub fn column_list(columns: &Columns) -> String {
    columns.columns.iter().map(|column| quoted(&column.name)).collect::<Vec<_>>().join(", ")
}
