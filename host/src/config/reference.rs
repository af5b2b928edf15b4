//! Generates the reference page `CONFIG.md` from the JSON Schema.

use std::fmt::Write;

use serde_json::{Map, Value};

use crate::telemetry::MADE_FROM;

/// Deepest level of keys on the page. Deeper keys are only in the schema.
const DEPTH_MAX: usize = 8;

/// Returns the page, which lists every key with type, default and meaning.
pub fn docs() -> String {
    let mut page = "# Config\n\n\
        The configuration is one YAML file, or a folder of `.yaml` files that are merged by top-level key (a key in two files\n\
        is an error): `headworks run --config headworks.yaml`. Relative paths are relative to the working directory.\n\
        `headworks validate --config headworks.yaml` reports all problems at once, each with file, line and key.\n\
        `headworks schema` prints a JSON Schema for editors. Top-level keys that begin with `x-` are ignored; use them for YAML\n\
        anchors.\n\n\
        Defaults for keys that are left out:\n\n\
        - none of `streams`, `pipelines` and `sinks`: the stream `telemetry` takes the topics that have as many levels as\n\
        \x20 `topics` names, and its messages become rows; the stream `default` takes all other topics, for subscribers only;\n\
        - no `streams` in any other case: one stream, `telemetry`, with 4 partitions, takes every topic;\n\
        - all `streams` have `topics`: one more stream, `default`, takes all other topics;\n\
        - no `sinks`: one sink, `telemetry`, writes to the table `telemetry` in `telemetry.db` in the data folder (SQLite),\n\
        \x20 unless all pipelines have `routes` or `to` and none leads to a sink of this name;\n\
        - no `pipelines`: one pipeline for each stream, with the name of the stream, runs the plugins of the folder;\n\
        - a pipeline without `from` reads the stream that has the pipeline's name, otherwise the only stream;\n\
        - a pipeline without `routes` sends everything to the stream of `to`, otherwise to the only sink;\n\
        - these defaults do not apply to a stream that a pipeline writes to (`to`, or a route); devices write to such a stream\n\
        \x20 only if it has `topics`.\n\n\
        A size is a number of bytes, or has a unit, as in `64KiB` and `20GiB`. A time has a unit, as in `300ms`, `5s` and `7d`.\n\
        `<name>` stands for a name of your choice, and `[]` for each item of a list.\n\n\
        | key | type | default | meaning |\n| --- | --- | --- | --- |\n"
        .to_owned();
    let schema = super::schema();
    let defaults = serde_json::to_value(super::Config::default()).unwrap_or_default();
    Page { root: &schema, page: &mut page }.keys(&schema, "", Some(&defaults), 0);
    page += MADE_FROM;
    page
}

/// Fails if the committed page differs from `wanted`. With `BLESS=1` the page is written.
#[cfg(test)]
pub fn in_step(name: &str, wanted: &str) {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, wanted).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(found == wanted, "{name} is out of step with the code: BLESS=1 writes it anew");
}

struct Page<'s, 'p> {
    root: &'s Value,
    page: &'p mut String,
}

impl<'s> Page<'s, '_> {
    fn keys(&mut self, schema: &'s Value, prefix: &str, defaults: Option<&Value>, depth: usize) {
        if depth > DEPTH_MAX {
            return;
        }
        let required: Vec<&str> = schema
            .get("required")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        for (name, key) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
            let path = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
            let target = self.resolve(key);
            if key.get("const").is_some() {
                continue; // the tag of a choice, which its heading has
            }
            let default = defaults.and_then(|defaults| defaults.get(name)).or_else(|| key.get("default"));
            let is_shown = !is_section(target);
            let shown = match default {
                _ if required.contains(&name.as_str()) => "required".to_owned(),
                Some(Value::Null) | None => String::new(),
                Some(Value::Object(_)) => String::new(),
                Some(value) if is_shown => format!("`{value}`"),
                Some(_) => String::new(),
            };
            self.row(&path, key, &shown, None);
            self.below(target, &path, default, depth);
        }
    }

    /// Adds a row. `about` is the meaning if neither the key nor its type has one.
    fn row(&mut self, path: &str, key: &'s Value, default: &str, about: Option<&str>) {
        let (kind, about) = (self.kind(key), one_line(self.about(key).or(about).unwrap_or_default()));
        let _ = writeln!(self.page, "| `{path}` | {kind} | {default} | {about} |");
    }

    fn about(&self, key: &'s Value) -> Option<&'s str> {
        text(key, "description").or_else(|| text(self.resolve(key), "description"))
    }

    /// Adds the keys inside a section, a map, a list, or each kind of a tagged choice.
    fn below(&mut self, schema: &'s Value, path: &str, default: Option<&Value>, depth: usize) {
        if schema.get("properties").is_some() {
            self.keys(schema, path, default, depth + 1);
        } else if let Some(each) = schema.get("additionalProperties").filter(|each| each.is_object()) {
            let path = format!("{path}.<name>");
            let target = self.resolve(each);
            let is_tagged = options(target).is_some_and(|options| self.is_tagged(options));
            if !is_section(target) && !is_tagged && self.about(each).is_some() {
                self.row(&path, each, "", None);
            }
            self.below(target, &path, None, depth + 1);
        } else if let Some(each) = schema.get("items") {
            self.below(self.resolve(each), &format!("{path}[]"), None, depth + 1);
        } else if let Some(options) = options(schema) {
            let keyed = options.iter().filter(|option| only_key(self.resolve(option)).is_some()).count();
            for option in options {
                let option = self.resolve(option);
                let tag = option.get("properties").and_then(Value::as_object).and_then(tag);
                match tag {
                    Some((key, value)) => {
                        let about = one_line(text(option, "description").unwrap_or_default());
                        let _ = writeln!(self.page, "| **`{path}`** with `{key}: {value}` | | | {about} |");
                        self.keys(option, path, default, depth + 1);
                    }
                    None => match only_key(option) {
                        // One key of several, which says which one it is.
                        Some((name, key)) => {
                            let path = format!("{path}.{name}");
                            let default = if keyed > 1 { "one of these" } else { "required" };
                            self.row(&path, key, default, text(option, "description"));
                            self.below(self.resolve(key), &path, None, depth + 1);
                        }
                        None => self.below(option, path, default, depth + 1),
                    },
                }
            }
        }
    }

    fn is_tagged(&self, options: &'s [Value]) -> bool {
        let tags = |option| self.resolve(option).get("properties").and_then(Value::as_object).and_then(tag);
        options.iter().any(|option| tags(option).is_some())
    }

    fn kind(&self, key: &'s Value) -> String {
        let (schema, name) = (self.resolve(key), key.get("$ref").and_then(Value::as_str).unwrap_or_default());
        match name.rsplit('/').next() {
            Some("ByteSize") => return "size".to_owned(),
            Some("Period") => return "time".to_owned(),
            _ => {}
        }
        if let Some(word) = schema.get("const") {
            return format!("`{}`", plain(word));
        }
        if let Some(allowed) = schema.get("enum").and_then(Value::as_array) {
            return allowed.iter().map(|word| format!("`{}`", plain(word))).collect::<Vec<_>>().join(", ");
        }
        if let Some(options) = options(schema) {
            let mut kinds: Vec<String> = Vec::new();
            for kind in options.iter().map(|option| self.kind(option)).filter(|kind| kind != "null") {
                if !kinds.contains(&kind) {
                    kinds.push(kind);
                }
            }
            let joint = if kinds.iter().all(|kind| kind.starts_with('`')) { ", " } else { " or " };
            return kinds.join(joint);
        }
        match schema.get("type") {
            Some(Value::String(kind)) => self.simple(kind, schema),
            Some(Value::Array(kinds)) => {
                let kinds: Vec<String> = kinds
                    .iter()
                    .filter_map(Value::as_str)
                    .filter(|kind| *kind != "null")
                    .map(|kind| self.simple(kind, schema))
                    .collect();
                kinds.join(" or ")
            }
            _ => "any".to_owned(),
        }
    }

    fn simple(&self, kind: &str, schema: &'s Value) -> String {
        match kind {
            "string" => "text".to_owned(),
            "integer" => "whole number".to_owned(),
            "boolean" => "true, false".to_owned(),
            "array" => match schema.get("items") {
                Some(each) => format!("list of {}", self.kind(each)),
                None => "list".to_owned(),
            },
            "object" if schema.get("additionalProperties").is_some_and(Value::is_object) => "map".to_owned(),
            "object" => "section".to_owned(),
            other => other.to_owned(),
        }
    }

    fn resolve(&self, schema: &'s Value) -> &'s Value {
        let mut schema = schema;
        while let Some(target) = schema.get("$ref").and_then(Value::as_str) {
            let name = target.rsplit('/').next().unwrap_or_default();
            match self.root.get("$defs").and_then(|defs| defs.get(name)) {
                Some(next) => schema = next,
                None => break,
            }
        }
        schema
    }
}

fn options(schema: &Value) -> Option<&[Value]> {
    schema.get("oneOf").or_else(|| schema.get("anyOf"))?.as_array().map(Vec::as_slice)
}

fn tag(properties: &Map<String, Value>) -> Option<(&str, String)> {
    properties.iter().find_map(|(key, value)| Some((key.as_str(), plain(value.get("const")?))))
}

/// Returns the only key of an option that is identified by it, such as `env` of `{ env: NAME }`.
fn only_key(option: &Value) -> Option<(&String, &Value)> {
    let properties = option.get("properties")?.as_object().filter(|properties| properties.len() == 1)?;
    let (name, key) = properties.iter().next()?;
    let is_required = option.get("required")?.as_array()?.iter().any(|required| required == name);
    is_required.then_some((name, key))
}

fn is_section(schema: &Value) -> bool {
    schema.get("properties").is_some()
}

fn text<'v>(schema: &'v Value, key: &str) -> Option<&'v str> {
    schema.get(key).and_then(Value::as_str)
}

fn plain(word: &Value) -> String {
    word.as_str().map_or_else(|| word.to_string(), str::to_owned)
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_reference_page_is_in_step() {
        super::in_step("CONFIG.md", &super::docs());
    }
}
