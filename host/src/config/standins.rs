//! Until the parts are merged.
#![allow(missing_docs)]

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::problems::{KeyPath, Problems};
use crate::units::{ByteSize, Period};

pub mod mqtt {
    use super::*;
    #[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
    #[serde(default, deny_unknown_fields)]
    pub struct Config {
        /// Where to listen.
        pub listeners: Vec<Listener>,
    }
    #[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    pub struct Listener {
        /// Address and port.
        pub bind: String,
        #[serde(default)]
        pub websocket: bool,
    }
    impl Default for Config {
        fn default() -> Self {
            Self { listeners: vec![Listener { bind: "127.0.0.1:1883".into(), websocket: false }] }
        }
    }
    impl Config {
        pub fn validate(&self, _: &KeyPath, _: &mut Problems) {}
    }
}
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
pub mod plugin {
    use super::*;
    #[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
    #[serde(default, deny_unknown_fields)]
    pub struct Config {
        pub dir: std::path::PathBuf,
    }
    impl Default for Config {
        fn default() -> Self {
            Self { dir: "plugins".into() }
        }
    }
    impl Config {
        pub fn validate(&self, _: &KeyPath, _: &mut Problems) {}
    }
}
pub mod devices {
    use super::*;
    #[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
    #[serde(default, deny_unknown_fields)]
    pub struct Config {}
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
pub mod pipeline {
    use super::*;
    #[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
    #[serde(default, deny_unknown_fields)]
    pub struct Config {
        pub from: String,
        pub steps: Option<Vec<StepConfig>>,
        pub routes: BTreeMap<String, RouteTarget>,
    }
    #[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
    #[serde(default, deny_unknown_fields)]
    pub struct StepConfig {
        pub plugin: String,
        #[serde(rename = "as")]
        pub name: Option<String>,
        pub config: serde_json::Value,
    }
    #[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
    #[serde(untagged)]
    pub enum RouteTarget {
        One(String),
        Several(Vec<String>),
    }
    impl RouteTarget {
        pub fn sinks(&self) -> &[String] {
            match self {
                Self::One(name) => std::slice::from_ref(name),
                Self::Several(names) => names,
            }
        }
    }
    impl Config {
        pub fn sinks(&self) -> BTreeSet<&str> {
            self.routes.values().flat_map(|target| target.sinks()).map(String::as_str).collect()
        }
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
        pub fn validate(&self, path: &KeyPath, problems: &mut Problems) {
            if let Self::Postgres(postgres) = self
                && postgres.batch.rows_max == 0
            {
                problems.add(path.key("batch").key("rows_max"), "must be at least 1, is 0");
            }
        }
    }
}
