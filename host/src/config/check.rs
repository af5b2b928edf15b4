//! Checks a value against its JSON Schema, and reports every unknown key, wrong type, missing key and
//! wrong unit at once, in words for people.
//!
//! It also repairs the value: whatever was reported is dropped or replaced by a valid value, so that the
//! rest can be deserialized and validated in the same run. Problems below a repaired path are not
//! reported again.

use serde_json::{Map, Value};

use super::suggest;
use crate::listeners::transport::{Bind, Network, SocketMode};
use crate::problems::{KeyPath, Problem, Problems};
use crate::units::{ByteSize, Period};

/// Most known keys that are listed for an unknown key.
const KNOWN_KEYS_SHOWN_MAX: usize = 12;
/// Prefix of top-level keys for the user's own YAML anchors.
const FOR_ANCHORS: &str = "x-";

#[derive(Debug)]
pub struct Checked {
    /// The value, repaired so that it matches the schema.
    pub value: Value,
    pub problems: Vec<Problem>,
    /// Paths at which `value` differs from the user's input.
    pub repaired: Vec<KeyPath>,
}

/// Checks a value. `schema` has its `$defs`, as [`super::schema`] creates it.
pub fn check(schema: &Value, value: &Value) -> Checked {
    let mut check = Check { root: schema, problems: Problems::default(), repaired: Vec::new() };
    let value = check.value(schema, value, &KeyPath::root()).unwrap_or_else(|| Value::Object(Map::new()));
    Checked { value, problems: check.problems.into_vec(), repaired: check.repaired }
}

struct Check<'s> {
    root: &'s Value,
    problems: Problems,
    repaired: Vec<KeyPath>,
}

impl<'s> Check<'s> {
    /// Returns the repaired value, or `None` if none of it can be used.
    fn value(&mut self, schema: &'s Value, value: &Value, path: &KeyPath) -> Option<Value> {
        let (schema, name) = self.resolve(schema);
        let refused = match (name, value) {
            ("ByteSize", Value::String(text)) => text.parse::<ByteSize>().err(),
            ("Period", Value::String(text)) => text.parse::<Period>().err(),
            ("Bind", Value::String(text)) => text.parse::<Bind>().err(),
            ("Network", Value::String(text)) => text.parse::<Network>().err(),
            ("SocketMode", Value::String(text)) => text.parse::<SocketMode>().err(),
            ("ByteSize", Value::Number(number)) if !number.is_u64() => {
                Some(format!("must be a size such as 64KiB or 20GiB, is {number}"))
            }
            ("ByteSize", Value::Number(_)) => None,
            ("Period", _) => Some(format!("must be a time such as 300ms, 5s or 7d, is {}", show(value))),
            ("ByteSize", _) => Some(format!("must be a size such as 64KiB or 20GiB, is {}", show(value))),
            _ => return self.by_keywords(schema, value, path),
        };
        match refused {
            None => Some(value.clone()),
            Some(message) => self.refuse(path, message),
        }
    }

    fn by_keywords(&mut self, schema: &'s Value, value: &Value, path: &KeyPath) -> Option<Value> {
        if let Some(options) = options(schema) {
            return self.choice(options, value, path);
        }
        if let Some(wanted) = schema.get("const") {
            return if wanted == value {
                Some(value.clone())
            } else {
                self.refuse(path, format!("must be {}, is {}", show(wanted), show(value)))
            };
        }
        if let Some(allowed) = schema.get("enum").and_then(Value::as_array) {
            return self.one_of(&allowed.iter().collect::<Vec<_>>(), value, path);
        }
        if !types(schema).is_empty() && !types(schema).iter().any(|wanted| is_a(value, wanted)) {
            return self.refuse(path, mismatch(&types(schema), value));
        }
        match value {
            Value::Object(entries) => Some(self.object(schema, entries, path)),
            Value::Array(items) => self.array(schema, items, path),
            Value::Number(_) => match out_of_range(schema, value) {
                Some(message) => self.refuse(path, message),
                None => Some(value.clone()),
            },
            Value::String(text) => match wrong_text(schema, text) {
                Some(message) => self.refuse(path, message),
                None => Some(value.clone()),
            },
            Value::Null | Value::Bool(_) => Some(value.clone()),
        }
    }

    fn object(&mut self, schema: &'s Value, entries: &Map<String, Value>, path: &KeyPath) -> Value {
        let known = schema.get("properties").and_then(Value::as_object);
        let others = schema.get("additionalProperties");
        let required: Vec<&str> = schema
            .get("required")
            .and_then(Value::as_array)
            .map(|names| names.iter().filter_map(Value::as_str).collect())
            .unwrap_or_default();
        let mut kept = Map::new();
        for (key, value) in entries {
            let is_top = path.as_str().is_empty();
            let path = path.key(key);
            if let Some(schema) = known.and_then(|known| known.get(key)) {
                let unset = value.is_null() && !self.takes_null(schema);
                if unset && !required.contains(&key.as_str()) {
                    continue; // `mqtt:` with all below it commented out: as if not there
                }
                if let Some(value) = self.value(schema, value, &path) {
                    kept.insert(key.clone(), value);
                }
            } else if let Some(schema) = others.filter(|others| others.is_object()) {
                let empty = Value::Object(Map::new());
                let is_object = types(self.resolve(schema).0) == ["object"];
                let value = if value.is_null() && is_object { &empty } else { value };
                let value = self.value(schema, value, &path).unwrap_or_else(|| self.stand_in(schema));
                kept.insert(key.clone(), value);
            } else if is_top && key.starts_with(FOR_ANCHORS) {
                // Holds what aliases elsewhere stand for.
            } else if others == Some(&Value::Bool(false)) {
                let free: Vec<&str> = known
                    .into_iter()
                    .flat_map(Map::keys)
                    .map(String::as_str)
                    .filter(|name| !entries.contains_key(*name))
                    .collect();
                let meant = suggest::closest(key, free.iter().copied());
                self.problems.add(path.clone(), unknown_key(meant, &free));
                if let Some((name, schema)) = meant.and_then(|name| Some((name, known?.get(name)?)))
                    && let Some(value) = self.value(schema, value, &path)
                {
                    kept.insert(name.to_owned(), value);
                }
            } else {
                kept.insert(key.clone(), value.clone());
            }
        }
        for name in required {
            if kept.contains_key(name) {
                continue;
            }
            if !entries.contains_key(name) {
                self.refuse(&path.key(name), "is missing".to_owned());
            }
            if let Some(schema) = known.and_then(|known| known.get(name)) {
                kept.insert(name.to_owned(), self.stand_in(schema));
            }
        }
        Value::Object(kept)
    }

    fn array(&mut self, schema: &'s Value, items: &[Value], path: &KeyPath) -> Option<Value> {
        let count = |key: &str| schema.get(key).and_then(Value::as_u64);
        if let Some(least) = count("minItems").filter(|least| (items.len() as u64) < *least) {
            return self.refuse(path, format!("must have at least {least} items, has {}", items.len()));
        }
        if let Some(most) = count("maxItems").filter(|most| items.len() as u64 > *most) {
            return self.refuse(path, format!("must have at most {most} items, has {}", items.len()));
        }
        let Some(schema) = schema.get("items") else {
            return Some(Value::Array(items.to_vec()));
        };
        let items = items.iter().enumerate().map(|(i, item)| {
            self.value(schema, item, &path.index(i)).unwrap_or_else(|| self.stand_in(schema))
        });
        Some(Value::Array(items.collect()))
    }

    fn choice(&mut self, options: &'s [Value], value: &Value, path: &KeyPath) -> Option<Value> {
        let resolved: Vec<&'s Value> = options.iter().map(|option| self.resolve(option).0).collect();
        if let Some(allowed) = constants(&resolved) {
            return self.one_of(&allowed, value, path);
        }
        if value.is_null() && resolved.iter().any(|option| types(option).contains(&"null")) {
            return Some(Value::Null);
        }
        if let Some(tag) = tag(&resolved) {
            return self.tagged(tag, &resolved, value, path);
        }
        // The first that fits, else what the closest one says.
        let mut closest: Option<Check<'s>> = None;
        let mut closest_value = None;
        let mut wanted: Vec<&str> = Vec::new();
        for option in options {
            let (schema, name) = self.resolve(option);
            let named = matches!(name, "ByteSize" | "Period");
            if !types(schema).is_empty() && !types(schema).iter().any(|t| is_a(value, t)) && !named {
                wanted.extend(types(schema).into_iter().filter(|t| *t != "null"));
                continue;
            }
            let mut attempt = Check { root: self.root, problems: Problems::default(), repaired: Vec::new() };
            let fitted = attempt.value(option, value, path);
            if attempt.problems.is_empty() {
                return fitted;
            }
            let count = |check: &Check<'_>| check.problems.clone().into_vec().len();
            if closest.as_ref().is_none_or(|known| count(&attempt) < count(known)) {
                closest = Some(attempt);
                closest_value = fitted;
            }
        }
        match closest {
            None => self.refuse(path, mismatch(&wanted, value)),
            Some(closest) => {
                for Problem { path, message } in closest.problems.into_vec() {
                    self.problems.add(path, message);
                }
                self.repaired.extend(closest.repaired);
                closest_value
            }
        }
    }

    fn tagged(&mut self, tag: &str, options: &[&'s Value], value: &Value, path: &KeyPath) -> Option<Value> {
        let Value::Object(entries) = value else {
            return self.refuse(path, mismatch(&["object"], value));
        };
        let names: Vec<&Value> = options.iter().filter_map(|option| tag_value(option, tag)).collect();
        let path_of_tag = path.key(tag);
        let Some(given) = entries.get(tag) else {
            self.repaired.push(path.clone());
            return self.refuse(&path_of_tag, format!("is missing, must be {}", list(&names)));
        };
        match options.iter().find(|option| tag_value(option, tag) == Some(given)) {
            Some(option) => Some(self.object(option, entries, path)),
            None => {
                self.repaired.push(path.clone());
                self.one_of(&names, given, &path_of_tag).and(None)
            }
        }
    }

    fn one_of(&mut self, allowed: &[&Value], value: &Value, path: &KeyPath) -> Option<Value> {
        if allowed.contains(&value) {
            return Some(value.clone());
        }
        let mut message = format!("must be {}, is {}", list(allowed), show(value));
        let words = allowed.iter().filter_map(|allowed| allowed.as_str());
        if let Some(meant) = value.as_str().and_then(|word| suggest::closest(word, words)) {
            message += &format!(" (did you mean `{meant}`?)");
        }
        self.refuse(path, message)
    }

    fn refuse(&mut self, path: &KeyPath, message: String) -> Option<Value> {
        self.problems.add(path.clone(), message);
        self.repaired.push(path.clone());
        None
    }

    /// Resolves `$ref`. Returns the schema and the name under which it was found.
    fn resolve(&self, schema: &'s Value) -> (&'s Value, &'s str) {
        let (mut schema, mut name) = (schema, "");
        while let Some(target) = schema.get("$ref").and_then(Value::as_str) {
            name = target.rsplit('/').next().unwrap_or_default();
            match self.root.get("$defs").and_then(|defs| defs.get(name)) {
                Some(next) => schema = next,
                None => break,
            }
        }
        (schema, name)
    }

    fn takes_null(&self, schema: &'s Value) -> bool {
        let schema = self.resolve(schema).0;
        match options(schema) {
            Some(options) => options.iter().any(|option| self.takes_null(option)),
            None => {
                types(schema).contains(&"null")
                    || (types(schema).is_empty()
                        && schema.get("const").is_none()
                        && schema.get("enum").is_none())
            }
        }
    }

    /// Returns a value that can be deserialized, to replace a rejected one.
    fn stand_in(&self, schema: &'s Value) -> Value {
        let (schema, name) = self.resolve(schema);
        match name {
            "ByteSize" => return Value::from(1 << 20),
            "Period" => return Value::from("1s"),
            "Bind" => return Value::from("127.0.0.1:0"),
            "Network" => return Value::from("127.0.0.1"),
            "SocketMode" => return Value::from("0600"),
            _ => {}
        }
        for key in ["default", "const"] {
            if let Some(value) = schema.get(key) {
                return value.clone();
            }
        }
        if let Some(first) = schema.get("enum").and_then(|allowed| allowed.get(0)) {
            return first.clone();
        }
        if let Some(first) = options(schema).and_then(<[Value]>::first) {
            return self.stand_in(first);
        }
        match types(schema).first() {
            Some(&"string") => Value::from("x"),
            Some(&("integer" | "number")) => schema.get("minimum").cloned().unwrap_or(Value::from(1)),
            Some(&"boolean") => Value::Bool(false),
            Some(&"array") => Value::Array(Vec::new()),
            Some(&"object") => {
                let known = schema.get("properties");
                let required = schema.get("required").and_then(Value::as_array);
                let entries = required.into_iter().flatten().filter_map(|name| {
                    let name = name.as_str()?;
                    Some((name.to_owned(), self.stand_in(known?.get(name)?)))
                });
                Value::Object(entries.collect())
            }
            _ => Value::Null,
        }
    }
}

fn options(schema: &Value) -> Option<&[Value]> {
    let options = schema.get("oneOf").or_else(|| schema.get("anyOf"))?;
    options.as_array().map(Vec::as_slice)
}

/// Returns the types that a schema allows. An empty list allows any.
fn types(schema: &Value) -> Vec<&str> {
    match schema.get("type") {
        Some(Value::String(one)) => vec![one],
        Some(Value::Array(many)) => many.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    }
}

fn is_a(value: &Value, wanted: &str) -> bool {
    match wanted {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_u64() || value.is_i64(),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        _ => true,
    }
}

/// Returns the values that an enum without fields allows.
fn constants<'s>(options: &[&'s Value]) -> Option<Vec<&'s Value>> {
    let mut words = Vec::new();
    for option in options {
        match (option.get("const"), option.get("enum").and_then(Value::as_array)) {
            (Some(word), _) => words.push(word),
            (None, Some(some)) => words.extend(some),
            (None, None) => return None,
        }
    }
    Some(words)
}

/// Returns the key that distinguishes the options: it is required in each of them, and a constant.
fn tag<'s>(options: &[&'s Value]) -> Option<&'s str> {
    let first = options.first()?.get("properties")?.as_object()?;
    first.keys().map(String::as_str).find(|key| options.iter().all(|option| tag_value(option, key).is_some()))
}

fn tag_value<'s>(option: &'s Value, tag: &str) -> Option<&'s Value> {
    option.get("properties")?.get(tag)?.get("const")
}

fn unknown_key(meant: Option<&str>, free: &[&str]) -> String {
    match meant {
        Some(meant) => format!("unknown key, did you mean `{meant}`?"),
        None if free.is_empty() => "unknown key".to_owned(),
        None if free.len() > KNOWN_KEYS_SHOWN_MAX => {
            format!("unknown key, known are {}, ...", free[..KNOWN_KEYS_SHOWN_MAX].join(", "))
        }
        None => format!("unknown key, known are {}", free.join(", ")),
    }
}

fn mismatch(wanted: &[&str], value: &Value) -> String {
    let mut names: Vec<&str> = Vec::new();
    for name in wanted.iter().filter(|wanted| **wanted != "null").map(|wanted| in_words(wanted)) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let quotes = match value {
        Value::Number(_) | Value::Bool(_) if wanted.contains(&"string") => ": put it in quotes",
        _ => "",
    };
    format!("must be {}, is {}{quotes}", names.join(" or "), show(value))
}

fn in_words(name: &str) -> &str {
    match name {
        "boolean" => "true or false",
        "integer" => "a whole number",
        "number" => "a number",
        "string" => "text",
        "array" => "a list",
        "object" => "a mapping (`key: value`)",
        other => other,
    }
}

fn show(value: &Value) -> String {
    match value {
        Value::Null => "empty".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "a mapping".to_owned(),
        scalar => scalar.to_string(),
    }
}

fn list(allowed: &[&Value]) -> String {
    let words: Vec<String> =
        allowed.iter().map(|word| word.as_str().map_or_else(|| word.to_string(), str::to_owned)).collect();
    match words.as_slice() {
        [one] => format!("`{one}`"),
        many => format!("one of {}", many.join(", ")),
    }
}

fn out_of_range(schema: &Value, value: &Value) -> Option<String> {
    let number = value.as_f64()?;
    let bits = match schema.get("format").and_then(Value::as_str) {
        Some("uint8") => Some(u64::from(u8::MAX)),
        Some("uint16") => Some(u64::from(u16::MAX)),
        Some("uint32") => Some(u64::from(u32::MAX)),
        _ => None,
    };
    let least = schema.get("minimum");
    let most = schema.get("maximum").cloned().or(bits.map(Value::from));
    if let Some(least) = least.filter(|least| least.as_f64().is_some_and(|least| number < least)) {
        return Some(format!("must be at least {least}, is {value}"));
    }
    if let Some(most) = most.filter(|most| most.as_f64().is_some_and(|most| number > most)) {
        return Some(format!("must be at most {most}, is {value}"));
    }
    None
}

fn wrong_text(schema: &Value, text: &str) -> Option<String> {
    let chars = text.chars().count();
    let bound = |key: &str| schema.get(key).and_then(Value::as_u64);
    if bound("minLength").is_some_and(|least| least > 0) && chars == 0 {
        return Some("must not be empty".to_owned());
    }
    if let Some(least) = bound("minLength").filter(|least| (chars as u64) < *least) {
        return Some(format!("must have at least {least} characters, has {chars}"));
    }
    let most = bound("maxLength").filter(|most| chars as u64 > *most)?;
    Some(format!("must have at most {most} characters, has {chars}"))
}

#[cfg(test)]
#[path = "check_tests.rs"]
mod tests;
