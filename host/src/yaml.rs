//! YAML text to a JSON value, with the line of each key.
//!
//! Reads the parser's events itself, so that keys given twice are all found,
//! aliases cannot blow up, and each key keeps its line.
//! Scalars: YAML 1.2, section 10.3 (core schema), so `on`, `yes` and `12:30` are text.

use std::collections::{BTreeMap, HashMap};

use saphyr_parser::{Event, Marker, Parser, ScalarStyle, Span, StrInput, Tag};
use serde_json::{Map, Number, Value};

use crate::problems::{KeyPath, Places, Problem, Problems};

/// Deeper nesting is refused.
const DEPTH_MAX: usize = 64;
/// Values that aliases stand for, all together; more are refused.
const ALIAS_VALUES_MAX: usize = 100_000;

/// A file as it was read.
#[derive(Debug, Default)]
pub struct Document {
    pub value: Value,
    /// Line (from 1) by path of the key.
    pub lines: BTreeMap<KeyPath, usize>,
    /// Keys given twice and the like; the first one of them counts.
    pub problems: Vec<Problem>,
}

/// Not YAML at all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct SyntaxError {
    pub line: usize,
    pub message: String,
}

/// `text` as a JSON value, for files that are data rather than the host's own
/// config: a plugin's config, a table of devices. An empty text is null.
pub fn to_json(text: &str) -> Result<Value, String> {
    let document = read(text, false).map_err(|error| format!("line {}: {error}", error.line))?;
    match document.problems.first() {
        Some(problem) => Err(Places::default().locate(problem)),
        None => Ok(document.value),
    }
}

/// The one document that `text` holds; an empty text is null.
pub fn parse(text: &str) -> Result<Document, SyntaxError> {
    read(text, true)
}

fn read(text: &str, with_lines: bool) -> Result<Document, SyntaxError> {
    let mut reader = Reader {
        parser: Parser::new_from_str(text.strip_prefix('\u{feff}').unwrap_or(text)),
        anchors: HashMap::new(),
        lines: BTreeMap::new(),
        problems: Problems::default(),
        with_lines,
        values: 0,
        alias_values: 0,
    };
    let mut value = None;
    loop {
        match reader.next()? {
            (Event::StreamEnd, _) => break,
            (Event::StreamStart | Event::DocumentEnd | Event::Nothing, _) => {}
            (Event::DocumentStart(_), span) if value.is_some() => {
                return Err(SyntaxError {
                    line: span.start.line(),
                    message: "a second document begins here, a config file holds one".to_owned(),
                });
            }
            (Event::DocumentStart(_), _) => {
                let (event, span) = reader.next()?;
                value = Some(reader.value(event, span, &KeyPath::root(), 0)?);
            }
            (event, span) => value = Some(reader.value(event, span, &KeyPath::root(), 0)?),
        }
    }
    Ok(Document {
        value: value.unwrap_or_default(),
        lines: reader.lines,
        problems: reader.problems.into_vec(),
    })
}

struct Reader<'i> {
    parser: Parser<'i, StrInput<'i>>,
    anchors: HashMap<usize, (Value, usize)>,
    lines: BTreeMap<KeyPath, usize>,
    problems: Problems,
    with_lines: bool,
    values: usize,
    alias_values: usize,
}

impl<'i> Reader<'i> {
    fn next(&mut self) -> Result<(Event<'i>, Span), SyntaxError> {
        match self.parser.next_event() {
            Some(Ok(event)) => Ok(event),
            Some(Err(error)) => Err(syntax(*error.marker(), format!("not YAML: {}", error.info()))),
            None => Err(SyntaxError { line: 1, message: "not YAML: ends early".to_owned() }),
        }
    }

    fn value(
        &mut self,
        event: Event<'i>,
        span: Span,
        path: &KeyPath,
        depth: usize,
    ) -> Result<Value, SyntaxError> {
        self.values += 1;
        if depth > DEPTH_MAX {
            return Err(syntax(span.start, format!("nested deeper than {DEPTH_MAX}")));
        }
        let before = self.values;
        let (value, anchor) = match event {
            Event::Scalar(text, style, anchor, tag) => (scalar(&text, style, tag.as_deref(), span)?, anchor),
            Event::SequenceStart(anchor, _) => (self.sequence(path, depth)?, anchor),
            Event::MappingStart(anchor, _) => (self.mapping(path, depth)?, anchor),
            Event::Alias(anchor) => {
                let (value, size) = self
                    .anchors
                    .get(&anchor)
                    .cloned()
                    .ok_or_else(|| syntax(span.start, "an alias within its own anchor".to_owned()))?;
                self.values += size;
                self.alias_values += size;
                if self.alias_values > ALIAS_VALUES_MAX {
                    let message = format!("aliases stand for more than {ALIAS_VALUES_MAX} values");
                    return Err(syntax(span.start, message));
                }
                (value, 0)
            }
            _ => return Err(syntax(span.start, "a value is missing here".to_owned())),
        };
        if anchor > 0 {
            self.anchors.insert(anchor, (value.clone(), self.values - before + 1));
        }
        Ok(value)
    }

    fn sequence(&mut self, path: &KeyPath, depth: usize) -> Result<Value, SyntaxError> {
        let mut items = Vec::new();
        loop {
            let (event, span) = self.next()?;
            if matches!(event, Event::SequenceEnd) {
                return Ok(Value::Array(items));
            }
            let path = path.index(items.len());
            self.note(&path, span.start.line());
            items.push(self.value(event, span, &path, depth + 1)?);
        }
    }

    fn mapping(&mut self, path: &KeyPath, depth: usize) -> Result<Value, SyntaxError> {
        let mut entries = Map::new();
        loop {
            let (event, span) = self.next()?;
            let key = match event {
                Event::MappingEnd => return Ok(Value::Object(entries)),
                Event::Scalar(text, ..) => text.into_owned(),
                _ => return Err(syntax(span.start, "a key must be a plain word".to_owned())),
            };
            let (path, line) = (path.key(&key), span.start.line());
            if key == "<<" {
                let message = "merge keys are not YAML 1.2: write the keys themselves, or name the whole value by its alias";
                return Err(syntax(span.start, message.to_owned()));
            }
            let (event, span) = self.next()?;
            if entries.contains_key(&key) {
                self.problems.add(path.clone(), format!("is given twice, here and on line {line}"));
                // Read and dropped, under a path that cannot hide the first one's lines.
                self.value(event, span, &path.index(usize::MAX), depth + 1)?;
                continue;
            }
            self.note(&path, line);
            let value = self.value(event, span, &path, depth + 1)?;
            entries.insert(key, value);
        }
    }

    fn note(&mut self, path: &KeyPath, line: usize) {
        if self.with_lines {
            self.lines.insert(path.clone(), line);
        }
    }
}

fn syntax(at: Marker, message: String) -> SyntaxError {
    SyntaxError { line: at.line(), message }
}

fn scalar(text: &str, style: ScalarStyle, tag: Option<&Tag>, span: Span) -> Result<Value, SyntaxError> {
    match tag {
        Some(tag) if tag.is_yaml_core_schema() && tag.suffix == "str" => Ok(Value::String(text.to_owned())),
        Some(tag) if !tag.is_yaml_core_schema() => Err(syntax(
            span.start,
            format!("the tag {}{} has no meaning here, write the value itself", tag.handle, tag.suffix),
        )),
        _ if style == ScalarStyle::Plain => Ok(plain(text)),
        _ => Ok(Value::String(text.to_owned())),
    }
}

fn plain(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "true" | "True" | "TRUE" => return Value::Bool(true),
        "false" | "False" | "FALSE" => return Value::Bool(false),
        _ => {}
    }
    number(text).map_or_else(|| Value::String(text.to_owned()), Value::Number)
}

fn number(text: &str) -> Option<Number> {
    if let Some(hex) = text.strip_prefix("0x") {
        return u64::from_str_radix(hex, 16).ok().map(Number::from);
    }
    if let Some(octal) = text.strip_prefix("0o") {
        return u64::from_str_radix(octal, 8).ok().map(Number::from);
    }
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    if !unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return None;
    }
    let positive = text.strip_prefix('+').unwrap_or(text);
    if let Ok(whole) = positive.parse::<u64>() {
        return Some(whole.into());
    }
    if let Ok(whole) = positive.parse::<i64>() {
        return Some(whole.into());
    }
    positive.parse::<f64>().ok().and_then(Number::from_f64)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn scalars_are_those_of_the_core_schema() {
        let read = parse(
            "{ a: 1, b: 1.5, c: yes, d: 'no', e: ~, f: 1883:1883, g: 0x10, h: -3, i: true, j: '7', k: 7d, l: 1e3 }",
        );
        assert_eq!(
            read.unwrap().value,
            json!({ "a": 1, "b": 1.5, "c": "yes", "d": "no", "e": null, "f": "1883:1883", "g": 16,
                "h": -3, "i": true, "j": "7", "k": "7d", "l": 1000.0 })
        );
    }

    #[test]
    fn each_key_has_its_line() {
        let read = parse("# first\nmqtt:\n  listeners:\n    - bind: a\n    - { bind: b,\n        tls: c }\n")
            .unwrap();
        let line =
            |path: &str| read.lines.iter().find(|(known, _)| known.as_str() == path).map(|(_, line)| *line);
        assert_eq!(line("mqtt"), Some(2));
        assert_eq!(line("mqtt.listeners[0].bind"), Some(4));
        assert_eq!(line("mqtt.listeners[1].tls"), Some(6));
    }

    #[test]
    fn keys_given_twice_are_all_found() {
        let read = parse("a: 1\nb: { c: 1, c: 2 }\na:\n  x: 3\n").unwrap();
        let problems: Vec<_> =
            read.problems.iter().map(|p| format!("{}: {}", p.path.as_str(), p.message)).collect();
        assert_eq!(
            problems,
            ["b.c: is given twice, here and on line 2", "a: is given twice, here and on line 3"]
        );
        assert_eq!(read.value, json!({ "a": 1, "b": { "c": 1 } }));
    }

    #[test]
    fn what_is_not_yaml_says_where() {
        assert_eq!(parse("a: 1\nb: [1, 2\nc: 3\n").unwrap_err().line, 3);
        assert_eq!(parse("a: !secret x").unwrap_err().line, 1);
        assert_eq!(parse("a: 1\n---\nb: 2").unwrap_err().line, 2);
    }

    #[test]
    fn aliases_cannot_blow_up() {
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..12 {
            let item = format!("*a{}", level - 1);
            bomb += &format!("a{level}: &a{level} [{}]\n", vec![item; 10].join(", "));
        }
        assert!(parse(&bomb).unwrap_err().message.contains("values"));
        assert_eq!(parse("a: &x { b: 1 }\nc: *x").unwrap().value["c"], json!({ "b": 1 }));
    }

    #[test]
    fn yaml_and_json_read_alike() {
        let yaml = "a: 1\nb: [x, 2.5, true, null]\nc: { 7: \"y\" }\n";
        let json = r#"{"a": 1, "b": ["x", 2.5, true, null], "c": {"7": "y"}}"#;
        assert_eq!(to_json(yaml).unwrap(), serde_json::from_str::<Value>(json).unwrap());
        assert_eq!(to_json(json).unwrap(), serde_json::from_str::<Value>(json).unwrap());
        assert_eq!(to_json("# nothing\n").unwrap(), Value::Null);
        assert!(to_json("a: [1").is_err());
        assert!(to_json("a: 1\na: 2").is_err());
    }
}
