//! What `validate --connect` finds out about a sink: whether it could write now.

use std::sync::Arc;

use super::{Claim, Config, Found, Position, postgres, sqlite};
use crate::topic::Namespace;

/// What a sink would meet if it opened now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Names what is there, or what the sink would create.
    pub found: Vec<String>,
    /// Says what keeps the sink from writing rows, each with what to do; none where it would write.
    pub problems: Vec<String>,
    /// Says what works and is hardly meant.
    pub warnings: Vec<String>,
    /// Says what each claim would find if it were taken now.
    pub claims: Vec<Looked>,
}

/// A claim that was looked up and not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Looked {
    pub claim: Claim,
    /// As [`super::Opened`] has them.
    pub positions: Vec<Position>,
    pub found: Found,
}

impl Config {
    /// Connects, logs in, compares the table with the config and looks `claims` up, as the
    /// sink would do it. Writes nothing. Ends within `connect_timeout` for each host
    /// to connect to and once more for the server's answers.
    pub async fn check(&self, name: &str, namespace: Arc<Namespace>, claims: Vec<Claim>) -> Checked {
        match self {
            Self::Postgres(config) => postgres::check(name, config, namespace, claims).await,
            Self::Sqlite(config) => {
                let config = config.clone();
                let checked = tokio::task::spawn_blocking(move || sqlite::check(&config, namespace, claims));
                checked.await.expect("a check does not panic")
            }
        }
    }
}
