//! The config of `enrich`; `config.schema.json` says the same.

use headworks_guest::config::{Config, Problem};

pub struct Settings {
    /// Fields of the device's object.
    fields: Vec<String>,
    /// The same with the prefix: their names in the payload.
    names: Vec<String>,
    pub overwrite: bool,
    pub unknown: Unknown,
}

/// What becomes of a message whose device is not in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unknown {
    Keep,
    Drop,
    Fail,
}

impl Settings {
    pub const FIELDS_MAX: usize = 16;

    pub fn read(config: &Config) -> Result<Self, Vec<Problem>> {
        let mut fields = config.fields();
        let wanted = fields.strings("fields", &["location", "site", "model"]);
        if wanted.len() > Self::FIELDS_MAX {
            fields.problem("fields", format!("must name at most {} fields", Self::FIELDS_MAX));
        }
        for (i, name) in wanted.iter().enumerate() {
            if wanted[..i].contains(name) {
                fields.problem(&format!("fields/{i}"), format!("names {name:?} twice"));
            }
        }
        let prefix = fields.string("prefix", "");
        let settings = Self {
            names: wanted.iter().map(|name| format!("{prefix}{name}")).collect(),
            fields: wanted,
            overwrite: fields.bool("overwrite", false),
            unknown: fields.choice(
                "unknown",
                &[("keep", Unknown::Keep), ("drop", Unknown::Drop), ("fail", Unknown::Fail)],
                Unknown::Keep,
            ),
        };
        fields.finish().map(|()| settings)
    }

    pub fn fields(&self) -> &[String] {
        &self.fields
    }

    pub fn names(&self) -> &[String] {
        &self.names
    }
}
