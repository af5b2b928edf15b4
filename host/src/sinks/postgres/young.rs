//! Keeps the temporary tables of a session young, also while its sink has nothing to write.
//!
//! Each COMMIT empties them (`ON COMMIT DELETE ROWS`), and costs no round trip more for that. But the server
//! cannot vacuum the temporary tables of a session: they keep the age that their files had when these were
//! made, and with it that of the database, which in the end takes no transaction any more. TRUNCATE gives them
//! new files, and gives back the room of rows that a transaction left which was rolled back. It changes the
//! catalog, so that it is not done with each COMMIT: `decisions/postgres-staging.md`.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::{Mutex, Notify};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use super::error::classify;
use super::sink::Session;
use crate::sinks::Error;

/// Time between two truncations.
const TRUNCATE_EVERY: Duration = Duration::from_secs(3_600);
/// Pause where a transaction waits for its end.
const AGAIN_AFTER: Duration = Duration::from_secs(60);

/// The session of a sink. A call holds the lock, and takes the session out until it ended well.
pub type Slot = Arc<Mutex<Option<Session>>>;

/// Truncates the temporary tables of the session in a slot between its calls, for as long as this lives.
pub struct Keeper {
    #[cfg_attr(not(test), expect(dead_code, reason = "tests do not wait for an hour"))]
    wake: Arc<Notify>,
    _task: AbortOnDropHandle<()>,
}

impl Keeper {
    /// `name`: the sink's. `context` begins what is said of errors. No truncation takes longer than `limit`.
    pub fn new(slot: &Slot, name: &str, context: String, limit: Duration, truncate: &'static str) -> Self {
        let wake = Arc::<Notify>::default();
        let (slot, woken, name) = (Arc::downgrade(slot), Arc::clone(&wake), name.to_owned());
        let task = async move {
            let mut pause = TRUNCATE_EVERY;
            loop {
                let _ = timeout(pause, woken.notified()).await;
                pause = match truncate_tables(&slot, &context, limit, truncate).await {
                    Ok(Some(pause)) => pause,
                    Ok(None) => return,
                    Err(error) => {
                        tracing::warn!(sink = name, %error, "cannot truncate temporary tables, will try again");
                        TRUNCATE_EVERY
                    }
                };
            }
        };
        Self { wake, _task: AbortOnDropHandle::new(tokio::spawn(task)) }
    }

    /// Lets the time pass after which the tables are truncated.
    #[cfg(test)]
    pub fn wake(&self) {
        self.wake.notify_one();
    }
}

/// Returns the pause before the next truncation; `None` where the session is gone.
async fn truncate_tables(
    slot: &Weak<Mutex<Option<Session>>>,
    context: &str,
    limit: Duration,
    truncate: &str,
) -> Result<Option<Duration>, Error> {
    let Some(slot) = slot.upgrade() else { return Ok(None) };
    // Waits for the call that is under way.
    let slot = slot.lock().await;
    let Some(session) = &*slot else { return Ok(None) };
    if session.uncommitted.is_some() {
        return Ok(Some(AGAIN_AFTER));
    }
    match timeout(limit, session.client.batch_execute(truncate)).await {
        Ok(truncated) => truncated.map_err(|error| classify(context, &error))?,
        Err(_) => return Err(Error::Retry(format!("{context}: no answer for {} s", limit.as_secs()))),
    }
    Ok(Some(TRUNCATE_EVERY))
}
