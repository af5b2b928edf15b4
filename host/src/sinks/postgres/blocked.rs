//! Finds the transaction whose lock another transaction waited for in vain.

use tokio_postgres::Client;

use super::config::Config;
use super::connect::connect;
use super::error;
use super::schema::quoted_table;
use crate::sinks::Error;
use crate::telemetry::Failures;

/// `lock_not_available`: `lock_timeout` has passed.
const LOCK_TIMEOUT: &str = "55P03";

/// The oldest transaction with a lock that can be in the way: on the table ($1), on the tables that its
/// foreign keys name, on those that the error names ($2), on the table of positions, or on opening a
/// sink. A prepared transaction has no process.
const OLDEST: &str = "
SELECT l.pid, a.application_name, a.usename::text, a.state, a.wait_event_type, a.wait_event,
       extract(epoch FROM now() - a.xact_start)::bigint
FROM pg_locks AS l LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
WHERE l.pid IS DISTINCT FROM pg_backend_pid()
  AND (l.locktype = 'advisory' AND l.objid = hashtext('headworks_positions')::oid
    OR l.locktype = 'relation' AND l.mode <> 'AccessShareLock'
      AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND l.relation IN (
        SELECT to_regclass('headworks_positions')::oid UNION SELECT to_regclass($1)::oid
        UNION SELECT confrelid FROM pg_constraint WHERE contype = 'f' AND conrelid = to_regclass($1)::oid
        UNION SELECT oid FROM pg_class WHERE relname = ANY ($2)))
  AND (l.granted OR l.mode IN ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock'))
ORDER BY a.xact_start NULLS LAST LIMIT 1";

/// Queries on a connection of its own, because the one that waited may still have unread answers.
pub struct Blocked {
    pub name: String,
    pub config: Config,
}

impl Blocked {
    /// Classifies an error as [`error::classify`] does, and adds the transaction that is likely in the
    /// way after a lock timeout.
    pub async fn classify(&self, context: &str, error: &tokio_postgres::Error) -> Error {
        let Some(db) = error.as_db_error().filter(|db| db.code().code() == LOCK_TIMEOUT) else {
            return error::classify(context, error);
        };
        let names: Vec<&str> = db.where_().unwrap_or_default().split('"').skip(1).step_by(2).collect();
        let reason = error::describe(error);
        let who = self.oldest(&names).await.map(|who| format!("; {who}")).unwrap_or_default();
        Error::Retry(format!("{context}: {reason}{who}"))
    }

    /// Returns the oldest transaction; `None` if it cannot be determined.
    async fn oldest(&self, names: &[&str]) -> Option<String> {
        let (client, _connection) = connect(&self.name, &self.config, &Failures::default()).await.ok()?;
        oldest(&client, &quoted_table(&self.config.table), names).await.ok()?
    }
}

async fn oldest(
    client: &Client,
    table: &str,
    names: &[&str],
) -> Result<Option<String>, tokio_postgres::Error> {
    let Some(row) = client.query_opt(OLDEST, &[&table, &names]).await? else { return Ok(None) };
    let Some(pid) = row.get::<_, Option<i32>>(0) else {
        return Ok(Some(
            "a prepared transaction has locks there: see pg_prepared_xacts, and COMMIT PREPARED or \
             ROLLBACK PREPARED it"
                .to_owned(),
        ));
    };
    let text = |at| row.get::<_, Option<String>>(at).filter(|text| !text.is_empty());
    let waits = match (text(4), text(5)) {
        (Some(kind), Some(event)) => Some(format!("waits for {kind}:{event}")),
        _ => None,
    };
    let of = [
        text(1).map(|name| format!("application {name}")),
        text(2).map(|user| format!("user {user}")),
        text(3),
        waits,
        row.get::<_, Option<i64>>(6).map(|seconds| format!("in its transaction for {seconds} s")),
    ];
    let of: Vec<String> = of.into_iter().flatten().collect();
    Ok(Some(format!(
        "the oldest transaction with locks there is that of process {pid} ({}): end it, or wait",
        of.join(", ")
    )))
}
