//! The table of positions in the sink's own file. Positions are claimed at `open` and advanced in the
//! transaction of the rows.

use rusqlite::{Connection, OptionalExtension, Result, params};
use uuid::Uuid;

use crate::batch::{Offset, Partition};
use crate::sinks::positions::Usurper;
use crate::sinks::{
    Advance, Claim, Epoch, Error as SinkError, Found, LogPosition, Name, Opened, OtherLog, PassPosition,
    Position,
};
use crate::stream::Lineage;

/// `next_offset` is null until the first advance.
const CREATE: &str = r#"
CREATE TABLE IF NOT EXISTS headworks_positions (
    pipeline    TEXT    NOT NULL,
    sink        TEXT    NOT NULL,
    log         TEXT    NOT NULL,
    generation  INTEGER NOT NULL,
    "partition" INTEGER NOT NULL,
    epoch       INTEGER NOT NULL,
    next_offset INTEGER,
    openings    TEXT,
    table_name  TEXT,
    holder      TEXT    NOT NULL,
    claimed_at  TEXT,
    letters     TEXT,
    updated_at  TEXT    NOT NULL,
    PRIMARY KEY (pipeline, sink, log, generation, "partition")
) WITHOUT ROWID"#;

/// Columns that 0.1.0 did not have.
const ADDED: [&str; 4] = ["openings", "table_name", "claimed_at", "letters"];

const HIGHEST: &str = "SELECT epoch, holder, claimed_at FROM headworks_positions
    WHERE pipeline = ?1 AND sink = ?2 AND log = ?3 AND generation = ?4 ORDER BY epoch DESC LIMIT 1";

const CLAIM: &str = r#"
INSERT INTO headworks_positions
    (pipeline, sink, log, generation, "partition", epoch, holder, table_name, claimed_at, updated_at)
SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, now, now FROM (SELECT strftime('%Y-%m-%d %H:%M:%fZ', 'now') AS now) WHERE true
ON CONFLICT (pipeline, sink, log, generation, "partition")
DO UPDATE SET holder = excluded.holder, table_name = excluded.table_name, updated_at = excluded.updated_at, epoch = excluded.epoch,
    claimed_at = CASE epoch WHEN excluded.epoch THEN claimed_at ELSE excluded.claimed_at END
RETURNING next_offset, openings"#;

const ADVANCE: &str = r#"
UPDATE headworks_positions SET next_offset = ?7, openings = coalesce(?9, openings),
    letters = coalesce(?10, letters), updated_at = strftime('%Y-%m-%d %H:%M:%fZ', 'now')
WHERE pipeline = ?1 AND sink = ?2 AND log = ?3 AND generation = ?4 AND "partition" = ?5
  AND epoch = ?8 AND (next_offset = ?6 OR next_offset IS NULL)"#;

const SET_LETTERS: &str = r#"
UPDATE headworks_positions SET letters = ?6
WHERE pipeline = ?1 AND sink = ?2 AND log = ?3 AND generation = ?4 AND "partition" = ?5"#;

const LOOK: &str = r#"
SELECT next_offset FROM headworks_positions
WHERE pipeline = ?1 AND sink = ?2 AND log = ?3 AND generation = ?4 AND "partition" = ?5"#;

const HAS_POSITIONS: &str = "SELECT EXISTS (SELECT 1 FROM headworks_positions
    WHERE pipeline = ?1 AND sink = ?2 AND log = ?3 AND generation = ?4 AND next_offset IS NOT NULL)";

/// Copies positions to a new name. The epoch belongs to the claim.
const RENAME: &str = r#"
INSERT INTO headworks_positions
    (pipeline, sink, log, generation, "partition", epoch, next_offset, openings, letters, holder, updated_at)
SELECT ?1, ?2, log, generation, "partition", 0, next_offset, openings, letters, holder, updated_at
FROM headworks_positions
WHERE pipeline = ?5 AND sink = ?6 AND log = ?3 AND generation = ?4 AND next_offset IS NOT NULL
ON CONFLICT (pipeline, sink, log, generation, "partition")
DO UPDATE SET next_offset = excluded.next_offset, openings = excluded.openings, letters = excluded.letters"#;

/// Removes positions from the old name, so that no process can continue there.
const RETIRE: &str = "
UPDATE headworks_positions SET next_offset = NULL, openings = NULL, epoch = epoch + 1, holder = ?5,
    claimed_at = strftime('%Y-%m-%d %H:%M:%fZ', 'now')
WHERE pipeline = ?1 AND sink = ?2 AND log = ?3 AND generation = ?4";

const OTHERS: &str = "
SELECT DISTINCT pipeline, sink FROM headworks_positions
WHERE log = ?3 AND generation = ?4 AND next_offset IS NOT NULL AND (pipeline <> ?1 OR sink <> ?2)
  AND (table_name IS NULL OR lower(table_name) = lower(?5)) ORDER BY pipeline, sink";

const OTHER_LOGS: &str = "
SELECT log, max(claimed_at) FROM headworks_positions
WHERE pipeline = ?1 AND sink = ?2 AND log <> ?3 AND next_offset IS NOT NULL
  AND (table_name IS NULL OR lower(table_name) = lower(?4)) GROUP BY log ORDER BY max(updated_at) DESC, log";

const POSITIONS_OF: &str = r#"
SELECT "partition", max(next_offset) FROM headworks_positions
WHERE pipeline = ?1 AND sink = ?2 AND log = ?3 AND next_offset IS NOT NULL GROUP BY "partition""#;

const PASSES_OF: &str = r#"
SELECT log, "partition", next_offset, openings, letters FROM headworks_positions
WHERE pipeline = ?1 AND sink = ?2 AND next_offset > ?4 AND substr(letters, 1, length(?3)) = ?3"#;

/// A claim with its epoch.
pub struct Held {
    claim: Claim,
    log: String,
    epoch: Epoch,
}

/// Creates the table, or adds the columns that an earlier version's table lacks.
pub fn create(connection: &Connection) -> Result<()> {
    connection.execute_batch(CREATE)?;
    for column in ADDED {
        let sql = "SELECT count(*) FROM pragma_table_info('headworks_positions') WHERE name = ?1";
        if connection.query_row(sql, [column], |row| row.get::<_, i64>(0))? == 0 {
            connection.execute_batch(&format!("ALTER TABLE headworks_positions ADD COLUMN {column} TEXT"))?;
        }
    }
    Ok(())
}

impl Held {
    /// Takes a claim, within an immediate transaction. The inner error means that the claim cannot be
    /// taken. `table` is the sink's table, and whether it has rows.
    pub fn claim(
        connection: &Connection,
        claim: &Claim,
        held: Option<Epoch>,
        holder: &str,
        (table, has_rows): (&str, bool),
    ) -> Result<std::result::Result<(Self, Opened), SinkError>> {
        let log = claim.log.to_string();
        if held.is_none() {
            rename(connection, claim, holder)?;
        }
        let epoch = match claim.take(held, highest(connection, claim)?.as_ref(), has_rows) {
            Ok(epoch) => epoch,
            Err(error) => return Ok(Err(error)),
        };
        let mut positions = Vec::new();
        let mut statement = connection.prepare(CLAIM)?;
        for partition in 0..claim.partitions {
            let (next, openings): (Option<i64>, Option<String>) = statement.query_row(
                params![
                    claim.pipeline,
                    claim.sink,
                    log,
                    claim.generation,
                    partition,
                    epoch.0 as i64,
                    holder,
                    table
                ],
                |row| Ok((row.get(0)?, row.get(1)?)),
            )?;
            let Some(next) = next else { continue };
            let partition = Partition(partition);
            match Lineage::read(openings.as_deref()) {
                Some(lineage) => positions.push(Position { partition, next: Offset(next as u64), lineage }),
                None => return Ok(Err(claim.unreadable(partition))),
            }
        }
        let mut found = Found::default();
        if positions.is_empty() {
            let mut statement = connection.prepare(OTHERS)?;
            let name = |row: &rusqlite::Row<'_>| Ok((row.get(0)?, row.get(1)?));
            let others = statement
                .query_map(params![claim.pipeline, claim.sink, log, claim.generation, table], name)?
                .collect::<Result<_>>()?;
            let other_logs = other_logs(connection, claim, table, OTHER_LOGS)?;
            found = Found { has_rows, others, other_logs };
        }
        Ok(Ok((Self { claim: claim.clone(), log, epoch }, Opened { epoch, positions, found })))
    }

    /// Advances a position. Returns whether it was at the place in `step` and belongs to this process.
    pub fn advance(&self, connection: &Connection, step: &Advance) -> Result<bool> {
        let moved = connection.prepare_cached(ADVANCE)?.execute(params![
            self.claim.pipeline,
            self.claim.sink,
            self.log,
            self.claim.generation,
            step.partition.0,
            step.from.0 as i64,
            step.to.0 as i64,
            self.epoch.0 as i64,
            step.lineage.as_ref().map(Lineage::to_string),
            step.letters
        ])?;
        Ok(moved == 1)
    }

    /// Replaces the record of dead letters in a position.
    pub fn set_letters(&self, connection: &Connection, partition: Partition, letters: &str) -> Result<()> {
        let Self { claim, log, .. } = self;
        let of = params![claim.pipeline, claim.sink, log, claim.generation, partition.0, letters];
        connection.execute(SET_LETTERS, of)?;
        Ok(())
    }

    /// Returns why a position could not be advanced.
    pub fn refusal(&self, connection: &Connection, step: &Advance) -> Result<SinkError> {
        let Self { claim, log, .. } = self;
        let next: Option<Option<i64>> = connection
            .query_row(
                LOOK,
                params![claim.pipeline, claim.sink, log, claim.generation, step.partition.0],
                |row| row.get(0),
            )
            .optional()?;
        let (next, highest) = (next.flatten().map(|next| next as u64), highest(connection, claim)?);
        Ok(claim.refusal(self.epoch, highest.as_ref(), std::slice::from_ref(step), |_| next))
    }
}

/// Looks up what a claim would find, as [`Held::claim`] does, without writing. The table of positions
/// may be of an earlier version, or missing. `table` is the sink's table, and whether it has rows. The
/// inner error is a position that cannot be read.
pub fn look(
    connection: &Connection,
    claim: &Claim,
    (table, has_rows): (&str, bool),
) -> Result<std::result::Result<(Vec<Position>, Found), String>> {
    let mut statement = connection.prepare("SELECT name FROM pragma_table_info('headworks_positions')")?;
    let columns = statement.query_map([], |row| row.get(0))?.collect::<Result<Vec<String>>>()?;
    if columns.is_empty() {
        return Ok(Ok((Vec::new(), Found { has_rows, ..Found::default() })));
    }
    let column = |name: &'static str| if columns.iter().any(|known| known == name) { name } else { "NULL" };
    let sql = format!(
        "SELECT \"partition\", next_offset, {} FROM headworks_positions
         WHERE pipeline = ?1 AND sink = ?2 AND log = ?3 AND generation = ?4 AND \"partition\" < ?5
           AND next_offset IS NOT NULL ORDER BY \"partition\"",
        column("openings")
    );
    let mut statement = connection.prepare(&sql)?;
    let log = claim.log.to_string();
    for (pipeline, sink) in claim.names() {
        let mut rows = statement.query(params![pipeline, sink, log, claim.generation, claim.partitions])?;
        let mut positions = Vec::new();
        while let Some(row) = rows.next()? {
            let (partition, next) = (Partition(row.get(0)?), Offset(row.get::<_, i64>(1)? as u64));
            let openings: Option<String> = row.get(2)?;
            match Lineage::read(openings.as_deref()) {
                Some(lineage) => positions.push(Position { partition, next, lineage }),
                None => return Ok(Err(claim.unreadable(partition).to_string())),
            }
        }
        if !positions.is_empty() {
            return Ok(Ok((positions, Found::default())));
        }
    }
    let mut statement = connection.prepare(&OTHERS.replace("table_name", column("table_name")))?;
    let name = |row: &rusqlite::Row<'_>| Ok((row.get(0)?, row.get(1)?));
    let of = params![claim.pipeline, claim.sink, log, claim.generation, table];
    let others = statement.query_map(of, name)?.collect::<Result<_>>()?;
    let sql =
        OTHER_LOGS.replace("table_name", column("table_name")).replace("claimed_at", column("claimed_at"));
    let other_logs = other_logs(connection, claim, table, &sql)?;
    Ok(Ok((Vec::new(), Found { has_rows, others, other_logs })))
}

/// Returns the other logs from which this claim filled this table, with a form of [`OTHER_LOGS`].
fn other_logs(connection: &Connection, claim: &Claim, table: &str, sql: &str) -> Result<Vec<OtherLog>> {
    let mut statement = connection.prepare(sql)?;
    let other = |row: &rusqlite::Row<'_>| Ok((row.get::<_, String>(0)?, row.get(1)?));
    let of = params![claim.pipeline, claim.sink, claim.log.to_string(), table];
    let others = statement.query_map(of, other)?.collect::<Result<Vec<_>>>()?.into_iter();
    let read = |(log, claimed_at): (String, _)| Some(OtherLog { log: log.parse().ok()?, claimed_at });
    Ok(others.filter_map(read).collect())
}

/// Returns the positions, by log and partition, of claims with these names in these logs.
pub fn positions_of(connection: &Connection, claims: &[Name], logs: &[Uuid]) -> Result<Vec<LogPosition>> {
    let mut statement = connection.prepare(POSITIONS_OF)?;
    let mut positions = Vec::new();
    for log in logs {
        for (pipeline, sink) in claims {
            let position = |row: &rusqlite::Row<'_>| {
                Ok((*log, Partition(row.get(0)?), Offset(row.get::<_, i64>(1)? as u64)))
            };
            for position in statement.query_map(params![pipeline, sink, log.to_string()], position)? {
                positions.push(position?);
            }
        }
    }
    Ok(positions)
}

/// Returns the positions of redrives' passes with these names, past `above`, that sent dead letters of
/// this log.
pub fn passes_of(
    connection: &Connection,
    claims: &[Name],
    log: Uuid,
    above: Offset,
) -> Result<Vec<PassPosition>> {
    let mut statement = connection.prepare(PASSES_OF)?;
    let mut passes = Vec::new();
    for (pipeline, sink) in claims {
        let mut rows = statement.query(params![pipeline, sink, log.to_string(), above.0 as i64])?;
        while let Some(row) = rows.next()? {
            let (pass, openings): (String, Option<String>) = (row.get(0)?, row.get(3)?);
            let (Ok(pass), Some(lineage)) = (pass.parse(), Lineage::read(openings.as_deref())) else {
                continue;
            };
            let (partition, next) = (Partition(row.get(1)?), Offset(row.get::<_, i64>(2)? as u64));
            let position = Position { partition, next, lineage };
            passes.push(PassPosition { pass, position, letters: row.get(4)? });
        }
    }
    Ok(passes)
}

/// Returns the highest epoch of a claim, and its holder.
fn highest(connection: &Connection, claim: &Claim) -> Result<Option<Usurper>> {
    let log = claim.log.to_string();
    connection
        .query_row(HIGHEST, params![claim.pipeline, claim.sink, log, claim.generation], |row| {
            Ok(Usurper { epoch: row.get::<_, i64>(0)? as u64, holder: row.get(1)?, at: row.get(2)? })
        })
        .optional()
}

/// Takes over the positions of the first former name of the claim that has any.
fn rename(connection: &Connection, claim: &Claim, holder: &str) -> Result<()> {
    let (log, generation) = (claim.log.to_string(), claim.generation);
    let has_positions = |pipeline: &str, sink: &str| {
        connection.query_row(HAS_POSITIONS, params![pipeline, sink, log, generation], |row| row.get(0))
    };
    if has_positions(&claim.pipeline, &claim.sink)? {
        return Ok(());
    }
    for (pipeline, sink) in &claim.formerly {
        if has_positions(pipeline, sink)? {
            connection
                .execute(RENAME, params![claim.pipeline, claim.sink, log, generation, pipeline, sink])?;
            connection.execute(RETIRE, params![pipeline, sink, log, generation, claim.renamed(holder)])?;
            return Ok(());
        }
    }
    Ok(())
}
