//! The table of positions in the sink's own file: claimed at `open`, moved in
//! the transaction of the rows.

use rusqlite::{Connection, OptionalExtension, Result, params};

use crate::batch::{Offset, Partition};
use crate::sinks::{Advance, Claim, Position};

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
    holder      TEXT    NOT NULL,
    updated_at  TEXT    NOT NULL,
    PRIMARY KEY (pipeline, sink, log, generation, "partition")
) WITHOUT ROWID"#;

const NEXT_EPOCH: &str = "SELECT coalesce(max(epoch), 0) + 1 FROM headworks_positions
    WHERE pipeline = ?1 AND sink = ?2 AND log = ?3 AND generation = ?4";

const CLAIM: &str = r#"
INSERT INTO headworks_positions (pipeline, sink, log, generation, "partition", epoch, holder, updated_at)
VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, strftime('%Y-%m-%d %H:%M:%fZ', 'now'))
ON CONFLICT (pipeline, sink, log, generation, "partition")
DO UPDATE SET epoch = excluded.epoch, holder = excluded.holder, updated_at = excluded.updated_at
RETURNING next_offset"#;

const ADVANCE: &str = r#"
UPDATE headworks_positions SET next_offset = ?7, updated_at = strftime('%Y-%m-%d %H:%M:%fZ', 'now')
WHERE pipeline = ?1 AND sink = ?2 AND log = ?3 AND generation = ?4 AND "partition" = ?5
  AND epoch = ?8 AND (next_offset = ?6 OR next_offset IS NULL)"#;

const LOOK: &str = r#"
SELECT epoch, next_offset, holder, updated_at FROM headworks_positions
WHERE pipeline = ?1 AND sink = ?2 AND log = ?3 AND generation = ?4 AND "partition" = ?5"#;

/// A claim as the statements' parameters.
pub struct Held {
    pipeline: String,
    sink: String,
    log: String,
    generation: u32,
    epoch: i64,
}

pub fn create(connection: &Connection) -> Result<()> {
    connection.execute_batch(CREATE)
}

impl Held {
    /// Within an immediate transaction.
    pub fn claim(connection: &Connection, claim: &Claim, holder: &str) -> Result<(Self, Vec<Position>)> {
        let log = claim.log.to_string();
        let epoch: i64 = connection.query_row(
            NEXT_EPOCH,
            params![claim.pipeline, claim.sink, log, claim.generation],
            |row| row.get(0),
        )?;
        let mut positions = Vec::new();
        let mut statement = connection.prepare(CLAIM)?;
        for partition in 0..claim.partitions {
            let next: Option<i64> = statement.query_row(
                params![claim.pipeline, claim.sink, log, claim.generation, partition, epoch, holder],
                |row| row.get(0),
            )?;
            if let Some(next) = next {
                positions.push(Position { partition: Partition(partition), next: Offset(next as u64) });
            }
        }
        let (pipeline, sink) = (claim.pipeline.clone(), claim.sink.clone());
        Ok((Self { pipeline, sink, log, generation: claim.generation, epoch }, positions))
    }

    /// Whether the position was where `step` says and is ours.
    pub fn advance(&self, connection: &Connection, step: &Advance) -> Result<bool> {
        let moved = connection.prepare_cached(ADVANCE)?.execute(params![
            self.pipeline,
            self.sink,
            self.log,
            self.generation,
            step.partition.0,
            step.from.0 as i64,
            step.to.0 as i64,
            self.epoch
        ])?;
        Ok(moved == 1)
    }

    /// Who is there instead of us, for a person.
    pub fn usurper(&self, connection: &Connection, step: &Advance) -> Result<String> {
        let whose = format!("positions of pipeline \"{}\" in sink \"{}\"", self.pipeline, self.sink);
        let partition = step.partition.0;
        let row: Option<(i64, Option<i64>, String, String)> = connection
            .query_row(
                LOOK,
                params![self.pipeline, self.sink, self.log, self.generation, partition],
                |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)),
            )
            .optional()?;
        Ok(match row {
            None => format!("the {whose} were removed from headworks_positions: restart to begin again"),
            Some((epoch, _, holder, at)) if epoch != self.epoch => format!(
                "{holder} took the {whose} over (epoch {epoch} after our {}, {at}): \
                 stop one of the two hosts, or give them pipelines of different names",
                self.epoch
            ),
            Some((_, next, _, _)) => format!(
                "the {whose} are not where this host left them: partition {partition} is at offset {}, \
                 not at {}; were rows of headworks_positions edited?",
                next.unwrap_or_default(),
                step.from.0
            ),
        })
    }
}
