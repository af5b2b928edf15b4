//! The table of positions in the sink's own database: claimed at `open`, moved
//! in the transaction of the rows.

use tokio_postgres::{Client, Error, Row, Statement};

use crate::batch::{Offset, Partition};
use crate::sinks::{Advance, Claim, Position};

/// `next_offset` is null until the first advance. `fillfactor` leaves room for
/// updates in place: one per batch and partition.
pub const CREATE: &str = r#"
CREATE TABLE headworks_positions (
    pipeline    TEXT        NOT NULL,
    sink        TEXT        NOT NULL,
    log         UUID        NOT NULL,
    generation  BIGINT      NOT NULL,
    "partition" INTEGER     NOT NULL,
    epoch       BIGINT      NOT NULL,
    next_offset BIGINT,
    holder      TEXT        NOT NULL,
    updated_at  TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (pipeline, sink, log, generation, "partition")
) WITH (fillfactor = 50);
COMMENT ON TABLE headworks_positions IS
    'Up to where Headworks has written each pipeline. Moves with the rows: do not edit while it runs.';
"#;

/// Two hosts that open at the same moment take turns: held to the end of the transaction.
pub const LOCK: &str = "SELECT pg_advisory_xact_lock(hashtext('headworks_positions'))";

const NEXT_EPOCH: &str = "SELECT coalesce(max(epoch), 0) + 1 FROM headworks_positions
    WHERE pipeline = $1 AND sink = $2 AND log = $3::text::uuid AND generation = $4";

const CLAIM: &str = r#"
INSERT INTO headworks_positions (pipeline, sink, log, generation, "partition", epoch, holder)
SELECT $1, $2, $3::text::uuid, $4, number, $6, $7 FROM generate_series(0, $5::integer - 1) AS number
ON CONFLICT (pipeline, sink, log, generation, "partition")
DO UPDATE SET epoch = EXCLUDED.epoch, holder = EXCLUDED.holder, updated_at = now()
RETURNING "partition", next_offset"#;

/// Any number of partitions in one statement. The affected rows are as many as
/// the advances, or somebody else was here.
const ADVANCE: &str = r#"
UPDATE headworks_positions AS p SET next_offset = a.until, updated_at = now()
FROM unnest($6::integer[], $7::bigint[], $8::bigint[]) AS a (number, since, until)
WHERE p.pipeline = $1 AND p.sink = $2 AND p.log = $3::text::uuid AND p.generation = $4
  AND p."partition" = a.number AND p.epoch = $5
  AND (p.next_offset = a.since OR p.next_offset IS NULL)"#;

const LOOK: &str = r#"
SELECT "partition", epoch, next_offset, holder, updated_at::text FROM headworks_positions
WHERE pipeline = $1 AND sink = $2 AND log = $3::text::uuid AND generation = $4
ORDER BY epoch DESC, "partition""#;

/// A claim as the statements' parameters.
pub struct Held {
    pipeline: String,
    sink: String,
    log: String,
    generation: i64,
    pub epoch: i64,
    advance: Statement,
}

impl Held {
    /// Within a transaction that holds [`LOCK`].
    pub async fn claim(client: &Client, claim: &Claim, holder: &str) -> Result<(Self, Vec<Position>), Error> {
        let (log, generation) = (claim.log.to_string(), i64::from(claim.generation));
        let (pipeline, sink) = (claim.pipeline.clone(), claim.sink.clone());
        let epoch: i64 =
            client.query_one(NEXT_EPOCH, &[&pipeline, &sink, &log, &generation]).await?.get(0);
        let partitions = i32::from(claim.partitions);
        let rows = client
            .query(CLAIM, &[&pipeline, &sink, &log, &generation, &partitions, &epoch, &holder])
            .await?;
        let mut positions: Vec<Position> = rows.iter().filter_map(position).collect();
        positions.sort_by_key(|position| position.partition);
        let advance = client.prepare(ADVANCE).await?;
        Ok((Self { pipeline, sink, log, generation, epoch, advance }, positions))
    }

    /// Moves positions; how many were where `advance` says and are ours.
    pub async fn advance(&self, client: &Client, advance: &[Advance]) -> Result<u64, Error> {
        let partitions: Vec<i32> = advance.iter().map(|step| i32::from(step.partition.0)).collect();
        let from: Vec<i64> = advance.iter().map(|step| step.from.0 as i64).collect();
        let to: Vec<i64> = advance.iter().map(|step| step.to.0 as i64).collect();
        client
            .execute(
                &self.advance,
                &[
                    &self.pipeline,
                    &self.sink,
                    &self.log,
                    &self.generation,
                    &self.epoch,
                    &partitions,
                    &from,
                    &to,
                ],
            )
            .await
    }

    /// Who is there instead of us, for a person.
    pub async fn usurper(&self, client: &Client, advance: &[Advance]) -> Result<String, Error> {
        let rows =
            client.query(LOOK, &[&self.pipeline, &self.sink, &self.log, &self.generation]).await?;
        let whose = format!("positions of pipeline \"{}\" in sink \"{}\"", self.pipeline, self.sink);
        let Some(newest) = rows.first() else {
            return Ok(format!("the {whose} were removed from headworks_positions: restart to begin again"));
        };
        let (epoch, holder, at): (i64, String, String) = (newest.get(1), newest.get(3), newest.get(4));
        if epoch != self.epoch {
            return Ok(format!(
                "{holder} took the {whose} over (epoch {epoch} after our {}, {at}): \
                 stop one of the two hosts, or give them pipelines of different names",
                self.epoch
            ));
        }
        let moved = advance.iter().find_map(|step| {
            let row = rows.iter().find(|row| row.get::<_, i32>(0) == i32::from(step.partition.0))?;
            let next = row.get::<_, Option<i64>>(2)?;
            (next != step.from.0 as i64).then(|| {
                format!("partition {} is at offset {next}, not at {}", step.partition.0, step.from.0)
            })
        });
        Ok(format!(
            "the {whose} are not where this host left them: {}; were rows of headworks_positions edited?",
            moved.unwrap_or_else(|| "a partition is missing".to_owned())
        ))
    }
}

fn position(row: &Row) -> Option<Position> {
    let (partition, next): (i32, Option<i64>) = (row.get(0), row.get(1));
    Some(Position { partition: Partition(partition as u16), next: Offset(next? as u64) })
}
