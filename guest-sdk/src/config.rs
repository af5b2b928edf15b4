//! A step's config, read field by field, all problems found at once.
//!
//! ```
//! # use headworks_guest::config::{Config, Problem};
//! let config = Config::new(r#"{"max": 80, "fields": ["site"]}"#);
//! let mut fields = config.fields();
//! let max = fields.f64("max", 30.0);
//! let names = fields.strings("fields", &["location", "site"]);
//! assert_eq!((max, names.len()), (80.0, 1));
//! assert!(fields.finish().is_ok());
//! ```

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::rc::Rc;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::cell::RefCell;

use crate::json::{self, Kind, Raw};

/// What is wrong with a step's config; the host prints it with file and line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// JSON pointer into the config: `/rules/0/route`.
    pub path: String,
    pub reason: String,
}

impl Problem {
    pub fn new(path: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { path: path.into(), reason: reason.into() }
    }
}

/// A step's config as JSON text.
#[derive(Clone, Debug)]
pub struct Config {
    text: String,
}

impl Config {
    /// An empty text is an empty object.
    pub fn new(text: impl Into<String>) -> Self {
        Self { text: text.into() }
    }

    /// For authors who would rather read it with serde.
    pub fn text(&self) -> &str {
        if self.text.trim_ascii().is_empty() { "{}" } else { &self.text }
    }

    /// Its fields; a config that is no JSON object is a problem that
    /// [`Fields::finish`] returns.
    pub fn fields(&self) -> Fields<'_> {
        let problems = Problems::default();
        let object = match json::parse(self.text().as_bytes()) {
            Ok(raw) if raw.is_null() => None,
            Ok(raw) => Some(raw),
            Err(error) => {
                problems.add("", format!("not JSON: {error}"));
                None
            }
        };
        Fields::new(object, String::new(), problems)
    }
}

#[derive(Clone, Default)]
struct Problems(Rc<RefCell<Vec<Problem>>>);

impl Problems {
    fn add(&self, path: &str, reason: impl Into<String>) {
        self.0.borrow_mut().push(Problem::new(path, reason));
    }
}

/// The fields of one object. Each getter notes its key; what is left over at
/// the end is a typing mistake and reported.
pub struct Fields<'a> {
    members: Vec<(String, Raw<'a>)>,
    path: String,
    known: Vec<&'static str>,
    problems: Problems,
}

impl<'a> Fields<'a> {
    fn new(object: Option<Raw<'a>>, path: String, problems: Problems) -> Self {
        let mut members = Vec::new();
        match object {
            Some(raw) if raw.kind() == Kind::Object => {
                members.extend(raw.members().map(|(name, value)| (name.into_owned(), value)));
            }
            Some(raw) => problems.add(&path, format!("must be an object, is {}", raw.kind().name())),
            None => {}
        }
        Self { members, path, known: Vec::new(), problems }
    }

    /// The value of `key`; none where it is missing or null.
    pub fn raw(&mut self, key: &'static str) -> Option<Raw<'a>> {
        self.known.push(key);
        self.members
            .iter()
            .rev()
            .find(|(name, _)| name == key)
            .map(|(_, raw)| *raw)
            .filter(|raw| !raw.is_null())
    }

    pub fn f64(&mut self, key: &'static str, default: f64) -> f64 {
        self.optional_f64(key).unwrap_or(default)
    }

    pub fn optional_f64(&mut self, key: &'static str) -> Option<f64> {
        self.read(key, "a number", |raw| raw.as_f64())
    }

    pub fn i64(&mut self, key: &'static str, default: i64) -> i64 {
        self.read(key, "a whole number", |raw| raw.as_i64()).unwrap_or(default)
    }

    pub fn bool(&mut self, key: &'static str, default: bool) -> bool {
        self.read(key, "true or false", |raw| raw.as_bool()).unwrap_or(default)
    }

    pub fn string(&mut self, key: &'static str, default: &str) -> String {
        self.optional_string(key).unwrap_or_else(|| default.to_owned())
    }

    pub fn optional_string(&mut self, key: &'static str) -> Option<String> {
        self.read(key, "a string", |raw| raw.as_str().map(|text| text.into_owned()))
    }

    pub fn required_string(&mut self, key: &'static str) -> String {
        if !self.members.iter().any(|(name, _)| name == key) {
            self.problem(key, "is required");
        }
        self.string(key, "")
    }

    /// One of a few names; `default` is one of them.
    pub fn choice<T: Copy>(&mut self, key: &'static str, choices: &[(&str, T)], default: T) -> T {
        let Some(name) = self.optional_string(key) else { return default };
        if let Some((_, choice)) = choices.iter().find(|(known, _)| *known == name) {
            return *choice;
        }
        let known: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        self.problem(key, format!("must be one of {}, is {name}", known.join(", ")));
        default
    }

    pub fn strings(&mut self, key: &'static str, default: &[&str]) -> Vec<String> {
        let Some(raw) = self.array(key) else { return default.iter().map(|text| text.to_string()).collect() };
        let mut strings = Vec::new();
        for (i, element) in raw.elements().enumerate() {
            match element.as_str() {
                Some(text) => strings.push(text.into_owned()),
                None => self.problem(
                    &format!("{key}/{i}"),
                    format!("must be a string, is {}", element.kind().name()),
                ),
            }
        }
        strings
    }

    /// A list of objects, each read by `read`.
    pub fn objects<T>(&mut self, key: &'static str, mut read: impl FnMut(&mut Fields<'a>) -> T) -> Vec<T> {
        let Some(raw) = self.array(key) else { return Vec::new() };
        let objects = raw.elements().enumerate();
        objects.map(|(i, element)| self.nested(&format!("{key}/{i}"), Some(element), &mut read)).collect()
    }

    /// An object, read by `read`, which sees no fields where it is missing.
    pub fn object<T>(&mut self, key: &'static str, read: impl FnOnce(&mut Fields<'a>) -> T) -> T {
        let raw = self.raw(key);
        self.nested(key, raw, read)
    }

    /// Adds a problem with the value of `key` ("" for the object itself).
    pub fn problem(&self, key: &str, reason: impl Into<String>) {
        let path = if key.is_empty() { self.path.clone() } else { format!("{}/{key}", self.path) };
        self.problems.add(&path, reason);
    }

    /// All problems found, fields that nothing asked for among them.
    pub fn finish(mut self) -> Result<(), Vec<Problem>> {
        self.report_unknown();
        let problems = self.problems.0.take();
        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }

    fn nested<T>(&self, key: &str, raw: Option<Raw<'a>>, read: impl FnOnce(&mut Fields<'a>) -> T) -> T {
        let mut fields = Fields::new(raw, format!("{}/{key}", self.path), self.problems.clone());
        let value = read(&mut fields);
        fields.report_unknown();
        value
    }

    fn array(&mut self, key: &'static str) -> Option<Raw<'a>> {
        self.read(key, "a list", |raw| (raw.kind() == Kind::Array).then_some(*raw))
    }

    fn read<T>(
        &mut self,
        key: &'static str,
        what: &str,
        read: impl FnOnce(&Raw<'a>) -> Option<T>,
    ) -> Option<T> {
        let raw = self.raw(key)?;
        let value = read(&raw);
        if value.is_none() {
            self.problem(key, format!("must be {what}, is {}", String::from_utf8_lossy(raw.as_bytes())));
        }
        value
    }

    fn report_unknown(&mut self) {
        for (name, _) in &self.members {
            if !self.known.iter().any(|known| known == name) {
                let token = name.replace('~', "~0").replace('/', "~1");
                self.problem(&token, format!("unknown key; known are {}", self.known.join(", ")));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(problems: Vec<Problem>) -> Vec<String> {
        problems.into_iter().map(|p| format!("{}: {}", p.path, p.reason)).collect()
    }

    #[test]
    fn all_problems_are_found_at_once_with_their_pointers() {
        let config = Config::new(
            r#"{"max":"x","mode":"fast","names":[1],"rules":[{"route":"a"},{"rout/e":1},7],"extra":{}}"#,
        );
        let mut fields = config.fields();
        fields.f64("max", 1.0);
        fields.choice("mode", &[("slow", 1), ("off", 2)], 1);
        fields.strings("names", &[]);
        fields.objects("rules", |rule| rule.required_string("route"));
        assert_eq!(
            paths(fields.finish().unwrap_err()),
            [
                "/max: must be a number, is \"x\"",
                "/mode: must be one of slow, off, is fast",
                "/names/0: must be a string, is a number",
                "/rules/1/route: is required",
                "/rules/1/rout~1e: unknown key; known are route",
                "/rules/2: must be an object, is a number",
                "/rules/2/route: is required",
                "/extra: unknown key; known are max, mode, names, rules",
            ]
        );
    }

    #[test]
    fn no_config_means_all_defaults() {
        for text in ["", " ", "{}", "null"] {
            let config = Config::new(text);
            let mut fields = config.fields();
            assert_eq!(fields.string("a", "b"), "b");
            assert!(fields.strings("list", &["x"]) == ["x"] && fields.bool("c", true));
            assert_eq!(fields.object("o", |o| o.i64("n", 3)), 3);
            fields.finish().unwrap();
        }
    }

    #[test]
    fn text_that_is_not_json_is_a_problem() {
        let config = Config::new("max: 3");
        assert_eq!(paths(config.fields().finish().unwrap_err()), [": not JSON: expected a value at byte 0"]);
    }
}
