//! The table of positions in the sink's own database. Positions are claimed at `open` and advanced in
//! the transaction of the rows.

use tokio_postgres::{Client, Error, Row, Statement};
use uuid::Uuid;

use super::schema;
use crate::batch::{Offset, Partition};
use crate::sinks::positions::Usurper;
use crate::sinks::{
    Advance, Claim, Epoch, Error as SinkError, LogPosition, Name, OtherLog, PassPosition, Position,
};
use crate::stream::Lineage;

/// Creates the table. `next_offset` is null until the first advance. `fillfactor` leaves room for
/// updates in place, one for each batch and partition: while any session holds a snapshot, no old
/// version of a row can be removed, and each version on another page costs a check of its index entries.
pub const CREATE: &str = r#"
CREATE TABLE headworks_positions (
    pipeline    TEXT        NOT NULL,
    sink        TEXT        NOT NULL,
    log         UUID        NOT NULL,
    generation  BIGINT      NOT NULL,
    "partition" INTEGER     NOT NULL,
    epoch       BIGINT      NOT NULL,
    next_offset BIGINT,
    openings    TEXT,
    table_name  TEXT,
    holder      TEXT        NOT NULL,
    claimed_at  TIMESTAMPTZ,
    letters     TEXT,
    updated_at  TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (pipeline, sink, log, generation, "partition")
) WITH (fillfactor = 10);
COMMENT ON TABLE headworks_positions IS
    'Up to where Headworks has written each pipeline. Moves with the rows: do not edit while it runs.';
"#;

/// Columns that 0.1.0 did not have.
const ADDED: [(&str, &str); 4] =
    [("openings", "TEXT"), ("table_name", "TEXT"), ("claimed_at", "TIMESTAMPTZ"), ("letters", "TEXT")];

const MISSING: &str = "SELECT name FROM unnest($1::text[]) AS name WHERE NOT EXISTS (
    SELECT FROM pg_attribute WHERE attrelid = to_regclass('headworks_positions') AND attname = name AND NOT attisdropped)";

/// Lock, held until the end of the transaction, that makes two hosts that open at the same time take
/// turns.
pub const LOCK: &str = "SELECT pg_advisory_xact_lock(hashtext('headworks_positions'))";

const HIGHEST: &str = "SELECT epoch, holder, claimed_at::text FROM headworks_positions
    WHERE pipeline = $1 AND sink = $2 AND log = $3::text::uuid AND generation = $4 ORDER BY epoch DESC LIMIT 1";

const CLAIM: &str = r#"
INSERT INTO headworks_positions AS p (pipeline, sink, log, generation, "partition", epoch, holder, claimed_at)
SELECT $1, $2, $3::text::uuid, $4, number, $6, $7, now() FROM generate_series(0, $5::integer - 1) AS number
ON CONFLICT (pipeline, sink, log, generation, "partition")
DO UPDATE SET epoch = EXCLUDED.epoch, holder = EXCLUDED.holder, updated_at = now(),
    claimed_at = CASE p.epoch WHEN EXCLUDED.epoch THEN p.claimed_at ELSE now() END
RETURNING "partition", next_offset, openings"#;

const HAS_POSITIONS: &str = "SELECT EXISTS (SELECT FROM headworks_positions
    WHERE pipeline = $1 AND sink = $2 AND log = $3::text::uuid AND generation = $4 AND next_offset IS NOT NULL)";

/// Copies positions to a new name. The epoch belongs to the claim.
const RENAME: &str = r#"
INSERT INTO headworks_positions
    (pipeline, sink, log, generation, "partition", epoch, next_offset, openings, letters, holder)
SELECT $1, $2, log, generation, "partition", 0, next_offset, openings, letters, holder FROM headworks_positions
WHERE pipeline = $5 AND sink = $6 AND log = $3::text::uuid AND generation = $4 AND next_offset IS NOT NULL
ON CONFLICT (pipeline, sink, log, generation, "partition")
DO UPDATE SET next_offset = EXCLUDED.next_offset, openings = EXCLUDED.openings, letters = EXCLUDED.letters"#;

/// Removes positions from the old name, so that no process can continue there.
const RETIRE: &str = "
UPDATE headworks_positions SET next_offset = NULL, openings = NULL, epoch = epoch + 1, holder = $5, claimed_at = now()
WHERE pipeline = $1 AND sink = $2 AND log = $3::text::uuid AND generation = $4";

/// Stores the table's name with its schema, independent of the search path at the time of the claim.
const SET_TABLE: &str = "
UPDATE headworks_positions SET table_name = name FROM (
    SELECT format('%I.%I', nspname, relname) AS name FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = relnamespace
    WHERE c.oid = to_regclass($5)) AS t
WHERE pipeline = $1 AND sink = $2 AND log = $3::text::uuid AND generation = $4 AND table_name IS DISTINCT FROM name";

const OTHERS: &str = "
SELECT DISTINCT pipeline, sink FROM headworks_positions AS p
WHERE log = $3::text::uuid AND generation = $4 AND next_offset IS NOT NULL AND (pipeline <> $1 OR sink <> $2)
  AND coalesce(to_jsonb(p) ->> 'table_name', '') IN ('', (
      SELECT format('%I.%I', nspname, relname) FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = relnamespace
      WHERE c.oid = to_regclass($5)))
ORDER BY pipeline, sink";

const OTHER_LOGS: &str = "
SELECT log::text, max(to_jsonb(p) ->> 'claimed_at') FROM headworks_positions AS p
WHERE pipeline = $1 AND sink = $2 AND log <> $3::text::uuid AND next_offset IS NOT NULL
  AND coalesce(to_jsonb(p) ->> 'table_name', '') IN ('', (
      SELECT format('%I.%I', nspname, relname) FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = relnamespace
      WHERE c.oid = to_regclass($4)))
GROUP BY log ORDER BY max(updated_at) DESC, log";

/// Advances any number of partitions in one statement. If the number of affected rows is not the number
/// of advances, another process has changed them.
const ADVANCE: &str = r#"
UPDATE headworks_positions AS p
SET next_offset = a.until, openings = coalesce(a.openings, p.openings), letters = coalesce(a.letters, p.letters),
    updated_at = now()
FROM unnest($6::integer[], $7::bigint[], $8::bigint[], $9::text[], $10::text[])
    AS a (number, since, until, openings, letters)
WHERE p.pipeline = $1 AND p.sink = $2 AND p.log = $3::text::uuid AND p.generation = $4
  AND p."partition" = a.number AND p.epoch = $5
  AND (p.next_offset = a.since OR p.next_offset IS NULL)"#;

const SET_LETTERS: &str = r#"
UPDATE headworks_positions AS p SET letters = a.letters
FROM unnest($5::integer[], $6::text[]) AS a (number, letters)
WHERE p.pipeline = $1 AND p.sink = $2 AND p.log = $3::text::uuid AND p.generation = $4 AND p."partition" = a.number"#;

const LOOK: &str = r#"
SELECT "partition", next_offset FROM headworks_positions
WHERE pipeline = $1 AND sink = $2 AND log = $3::text::uuid AND generation = $4"#;

/// Positions of a name, also from a table of 0.1.0.
const POSITIONS: &str = r#"
SELECT "partition", next_offset, to_jsonb(p) ->> 'openings' FROM headworks_positions AS p
WHERE pipeline = $1 AND sink = $2 AND log = $3::text::uuid AND generation = $4 AND "partition" < $5
  AND next_offset IS NOT NULL ORDER BY "partition""#;

/// Positions of some names in some logs.
const POSITIONS_OF: &str = r#"
SELECT log::text, "partition", max(next_offset) FROM headworks_positions
WHERE (pipeline, sink) IN (SELECT * FROM unnest($1::text[], $2::text[])) AND log = ANY ($3::text[]::uuid[])
  AND next_offset IS NOT NULL GROUP BY log, "partition""#;

/// Positions of redrives' passes with some names, past an offset, that sent dead letters of a log.
const PASSES_OF: &str = r#"
SELECT log::text, "partition", next_offset, openings, letters FROM headworks_positions
WHERE (pipeline, sink) IN (SELECT * FROM unnest($1::text[], $2::text[])) AND next_offset > $4
  AND left(letters, length($3)) = $3"#;

/// A claim as parameters of the statements, with its epoch.
pub struct Held {
    claim: Claim,
    log: String,
    generation: i64,
    pub epoch: Epoch,
    advance: Statement,
}

/// Why a claim cannot be taken.
pub enum Refusal {
    Server(Error),
    /// Another process has it, or it cannot be read.
    Sink(SinkError),
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Server(error)
    }
}

/// Returns the SQL that upgrades the table of an earlier version; `None` if nothing is missing.
pub async fn upgrade(client: &Client) -> Result<Option<String>, Error> {
    let names: Vec<&str> = ADDED.iter().map(|(name, _)| *name).collect();
    let missing: Vec<String> = client.query(MISSING, &[&names]).await?.iter().map(|row| row.get(0)).collect();
    let add = ADDED
        .iter()
        .filter(|(name, _)| missing.iter().any(|missing| missing == name))
        .map(|(name, kind)| format!("ADD COLUMN IF NOT EXISTS {name} {kind}"))
        .collect::<Vec<_>>();
    Ok((!add.is_empty()).then(|| format!("ALTER TABLE headworks_positions {}", add.join(", "))))
}

impl Held {
    /// Takes a claim, within a transaction that holds [`LOCK`]. `table` is the quoted name of the sink's
    /// table.
    pub async fn claim(
        client: &Client,
        claim: &Claim,
        held: Option<Epoch>,
        holder: &str,
        table: &str,
    ) -> Result<(Self, Vec<Position>), Refusal> {
        let (log, generation) = (claim.log.to_string(), i64::from(claim.generation));
        let Claim { pipeline, sink, .. } = claim;
        if held.is_none() {
            rename(client, claim, holder).await?;
        }
        let highest = highest(client, claim).await?;
        let has_rows = held.is_some() && highest.is_none() && schema::has_rows(client, table).await?;
        let epoch = claim.take(held, highest.as_ref(), has_rows).map_err(Refusal::Sink)?;
        let (partitions, number) = (i32::from(claim.partitions), epoch.0 as i64);
        let rows =
            client.query(CLAIM, &[pipeline, sink, &log, &generation, &partitions, &number, &holder]).await?;
        let mut positions = Vec::new();
        for row in &rows {
            positions.extend(position(claim, row).map_err(Refusal::Sink)?);
        }
        positions.sort_by_key(|position| position.partition);
        let advance = client.prepare(ADVANCE).await?;
        Ok((Self { claim: claim.clone(), log, generation, epoch, advance }, positions))
    }

    /// Stores which table the claim fills. `table` is its quoted name.
    pub async fn set_table(&self, client: &Client, table: &str) -> Result<(), Error> {
        let Claim { pipeline, sink, .. } = &self.claim;
        client.execute(SET_TABLE, &[pipeline, sink, &self.log, &self.generation, &table]).await?;
        Ok(())
    }

    /// Advances positions. Returns how many were at the place in `advance` and belong to this process.
    pub async fn advance(&self, client: &Client, advance: &[Advance]) -> Result<u64, Error> {
        let partitions: Vec<i32> = advance.iter().map(|step| i32::from(step.partition.0)).collect();
        let from: Vec<i64> = advance.iter().map(|step| step.from.0 as i64).collect();
        let to: Vec<i64> = advance.iter().map(|step| step.to.0 as i64).collect();
        let openings: Vec<Option<String>> =
            advance.iter().map(|step| step.lineage.as_ref().map(Lineage::to_string)).collect();
        let letters: Vec<Option<&str>> = advance.iter().map(|step| step.letters.as_deref()).collect();
        client
            .execute(
                &self.advance,
                &[
                    &self.claim.pipeline,
                    &self.claim.sink,
                    &self.log,
                    &self.generation,
                    &(self.epoch.0 as i64),
                    &partitions,
                    &from,
                    &to,
                    &openings,
                    &letters,
                ],
            )
            .await
    }

    /// Replaces the records of dead letters in positions. `path` is the `search_path` of the sink's own
    /// statements, because triggers of earlier rows may have set another.
    pub async fn set_letters(
        &self,
        client: &Client,
        path: &str,
        letters: &[(Partition, String)],
    ) -> Result<(), Error> {
        let Claim { pipeline, sink, .. } = &self.claim;
        let (partitions, letters): (Vec<i32>, Vec<&str>) =
            letters.iter().map(|(partition, letters)| (i32::from(partition.0), letters.as_str())).unzip();
        client.execute("SELECT set_config('search_path', $1, true)", &[&path]).await?;
        let of = (&self.log, &self.generation);
        client.execute(SET_LETTERS, &[pipeline, sink, of.0, of.1, &partitions, &letters]).await?;
        Ok(())
    }

    /// Returns why positions could not be advanced.
    pub async fn refusal(&self, client: &Client, advance: &[Advance]) -> Result<SinkError, Error> {
        let claim = &self.claim;
        let highest = highest(client, claim).await?;
        let rows = client.query(LOOK, &[&claim.pipeline, &claim.sink, &self.log, &self.generation]).await?;
        let next = |partition: Partition| {
            let row = rows.iter().find(|row| row.get::<_, i32>(0) == i32::from(partition.0))?;
            row.get::<_, Option<i64>>(1).map(|next| next as u64)
        };
        Ok(claim.refusal(self.epoch, highest.as_ref(), advance, next))
    }
}

/// Returns the other claims that filled this table from the same log. `table` is its quoted name.
pub async fn others(client: &Client, claim: &Claim, table: &str) -> Result<Vec<Name>, Error> {
    let (log, generation) = (claim.log.to_string(), i64::from(claim.generation));
    let rows = client.query(OTHERS, &[&claim.pipeline, &claim.sink, &log, &generation, &table]).await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// Returns the other logs from which this claim filled this table. `table` is its quoted name.
pub async fn other_logs(client: &Client, claim: &Claim, table: &str) -> Result<Vec<OtherLog>, Error> {
    let log = claim.log.to_string();
    let rows = client.query(OTHER_LOGS, &[&claim.pipeline, &claim.sink, &log, &table]).await?;
    let other =
        |row: &Row| Some(OtherLog { log: row.get::<_, &str>(0).parse().ok()?, claimed_at: row.get(1) });
    Ok(rows.iter().filter_map(other).collect())
}

/// Returns the positions that a claim would find, as [`Held::claim`] does, without taking it.
pub async fn look(client: &Client, claim: &Claim) -> Result<Vec<Position>, Refusal> {
    let (log, generation) = (claim.log.to_string(), i64::from(claim.generation));
    for (pipeline, sink) in claim.names() {
        let partitions = i32::from(claim.partitions);
        let rows = client.query(POSITIONS, &[&pipeline, &sink, &log, &generation, &partitions]).await?;
        if !rows.is_empty() {
            let positions: Result<Vec<_>, _> = rows.iter().map(|row| position(claim, row)).collect();
            return Ok(positions.map_err(Refusal::Sink)?.into_iter().flatten().collect());
        }
    }
    Ok(Vec::new())
}

/// Returns the positions, by log and partition, of claims with these names in these logs.
pub async fn positions_of(
    client: &Client,
    claims: &[Name],
    logs: &[Uuid],
) -> Result<Vec<LogPosition>, Error> {
    let (pipelines, sinks): (Vec<&str>, Vec<&str>) =
        claims.iter().map(|(pipeline, sink)| (pipeline.as_str(), sink.as_str())).unzip();
    let logs: Vec<String> = logs.iter().map(Uuid::to_string).collect();
    let rows = client.query(POSITIONS_OF, &[&pipelines, &sinks, &logs]).await?;
    let position = |row: &Row| {
        let log = row.get::<_, &str>(0).parse().ok()?;
        Some((log, Partition(row.get::<_, i32>(1) as u16), Offset(row.get::<_, i64>(2) as u64)))
    };
    Ok(rows.iter().filter_map(position).collect())
}

/// Returns the positions of redrives' passes with these names, past `above`, that sent dead letters of
/// this log.
pub async fn passes_of(
    client: &Client,
    claims: &[Name],
    log: Uuid,
    above: Offset,
) -> Result<Vec<PassPosition>, Error> {
    let (pipelines, sinks): (Vec<&str>, Vec<&str>) =
        claims.iter().map(|(pipeline, sink)| (pipeline.as_str(), sink.as_str())).unzip();
    let rows = client.query(PASSES_OF, &[&pipelines, &sinks, &log.to_string(), &(above.0 as i64)]).await?;
    let told = |row: &Row| {
        let position = Position {
            partition: Partition(row.get::<_, i32>(1) as u16),
            next: Offset(row.get::<_, i64>(2) as u64),
            lineage: Lineage::read(row.get::<_, Option<&str>>(3))?,
        };
        Some(PassPosition { pass: row.get::<_, &str>(0).parse().ok()?, position, letters: row.get(4) })
    };
    Ok(rows.iter().filter_map(told).collect())
}

/// Takes over the positions of the first former name of the claim that has any.
async fn rename(client: &Client, claim: &Claim, holder: &str) -> Result<(), Error> {
    let (log, generation) = (claim.log.to_string(), i64::from(claim.generation));
    let Claim { pipeline, sink, .. } = claim;
    if claim.formerly.is_empty() || has_positions(client, claim, (pipeline, sink)).await? {
        return Ok(());
    }
    for (old_pipeline, old_sink) in &claim.formerly {
        if has_positions(client, claim, (old_pipeline, old_sink)).await? {
            client.execute(RENAME, &[pipeline, sink, &log, &generation, old_pipeline, old_sink]).await?;
            let holder = claim.renamed(holder);
            client.execute(RETIRE, &[old_pipeline, old_sink, &log, &generation, &holder]).await?;
            return Ok(());
        }
    }
    Ok(())
}

/// Returns whether a claim of this name has positions in the claim's log.
async fn has_positions(
    client: &Client,
    claim: &Claim,
    (pipeline, sink): (&String, &String),
) -> Result<bool, Error> {
    let (log, generation) = (claim.log.to_string(), i64::from(claim.generation));
    Ok(client.query_one(HAS_POSITIONS, &[pipeline, sink, &log, &generation]).await?.get(0))
}

/// Returns the highest epoch of a claim, and its holder.
async fn highest(client: &Client, claim: &Claim) -> Result<Option<Usurper>, Error> {
    let (log, generation) = (claim.log.to_string(), i64::from(claim.generation));
    let row = client.query_opt(HIGHEST, &[&claim.pipeline, &claim.sink, &log, &generation]).await?;
    Ok(row.map(|row| Usurper { epoch: row.get::<_, i64>(0) as u64, holder: row.get(1), at: row.get(2) }))
}

fn position(claim: &Claim, row: &Row) -> Result<Option<Position>, SinkError> {
    let partition = Partition(row.get::<_, i32>(0) as u16);
    let Some(next) = row.get::<_, Option<i64>>(1) else { return Ok(None) };
    let lineage = Lineage::read(row.get::<_, Option<&str>>(2)).ok_or_else(|| claim.unreadable(partition))?;
    Ok(Some(Position { partition, next: Offset(next as u64), lineage }))
}
