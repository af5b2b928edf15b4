//! Until the parts are merged.
#![allow(missing_docs)]

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::problems::{KeyPath, Problems};
use crate::units::{ByteSize, Period};

pub mod stream {
    use super::*;
    #[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
    #[serde(default, deny_unknown_fields)]
    pub struct Config {
        pub topics: Vec<String>,
        pub partitions: u16,
        pub retention: Retention,
    }
    #[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
    #[serde(default, deny_unknown_fields)]
    pub struct Retention {
        pub max_age: Option<Period>,
        pub max_bytes: ByteSize,
    }
    impl Default for Retention {
        fn default() -> Self {
            Self { max_age: None, max_bytes: ByteSize::gib(10) }
        }
    }
    impl Config {
        pub fn validate(&self, _: &KeyPath, _: &mut Problems) {}
    }
}
pub mod dead_letters {
    use super::*;
    #[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
    #[serde(default, deny_unknown_fields)]
    pub struct Config {}
    impl Config {
        pub fn validate(&self, _: &KeyPath, _: &mut Problems) {}
    }
}
pub mod sinks {
    use super::*;
    #[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
    #[serde(tag = "type", rename_all = "lowercase")]
    pub enum Config {
        /// A file.
        Sqlite(Sqlite),
        /// A server.
        Postgres(Postgres),
    }
    #[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
    #[serde(default, deny_unknown_fields)]
    pub struct Sqlite {
        pub path: std::path::PathBuf,
        pub table: String,
    }
    #[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    pub struct Postgres {
        pub url: String,
        pub password: Option<Secret>,
        pub table: String,
        #[serde(default)]
        pub batch: Batch,
    }
    #[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    pub struct Secret {
        pub env: String,
    }
    #[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
    #[serde(default, deny_unknown_fields)]
    pub struct Batch {
        pub rows_max: u32,
    }
    impl Default for Batch {
        fn default() -> Self {
            Self { rows_max: 5_000 }
        }
    }
    impl Config {
        pub fn describe(&self) -> String {
            match self {
                Self::Sqlite(sqlite) => format!("SQLite {} table {}", sqlite.path.display(), sqlite.table),
                Self::Postgres(postgres) => format!("PostgreSQL table {}", postgres.table),
            }
        }
        pub fn validate(&self, path: &KeyPath, problems: &mut Problems) {
            if let Self::Postgres(postgres) = self
                && postgres.batch.rows_max == 0
            {
                problems.add(path.key("batch").key("rows_max"), "must be at least 1, is 0");
            }
        }
    }
}
