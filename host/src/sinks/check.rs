//! What `validate --connect` finds out about a sink: whether it could write now.

use std::sync::Arc;

use super::{Config, postgres, sqlite};
use crate::topic::Namespace;

/// What a sink would meet if it opened now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// What is there, or what the sink would create.
    pub found: Vec<String>,
    /// What keeps the sink from writing rows, each with what to do; none where it would write.
    pub problems: Vec<String>,
    /// What works and is hardly meant.
    pub warnings: Vec<String>,
}

impl Config {
    /// Connects, logs in and compares the table with the config, as the sink
    /// would do it. Writes nothing. Ends within `connect_timeout` for each host
    /// to connect to and once more for the server's answers.
    pub async fn check(&self, name: &str, namespace: Arc<Namespace>) -> Checked {
        match self {
            Self::Postgres(config) => postgres::check(name, config, namespace).await,
            Self::Sqlite(config) => {
                let (name, config) = (name.to_owned(), config.clone());
                let checked = tokio::task::spawn_blocking(move || sqlite::check(&name, &config, namespace));
                checked.await.expect("a check does not panic")
            }
        }
    }
}
