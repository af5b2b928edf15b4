//! YAML text as a JSON value, for the files that are data rather than the
//! host's own config: a plugin's config, a table of devices.

use saphyr::{LoadableYamlNode, Scalar, Yaml};
use serde_json::{Map, Number, Value};

/// The first document of `text`; an empty text is null.
pub fn to_json(text: &str) -> Result<Value, String> {
    let documents = Yaml::load_from_str(text).map_err(|error| error.to_string())?;
    match documents.first() {
        Some(document) => value(document),
        None => Ok(Value::Null),
    }
}

fn value(node: &Yaml<'_>) -> Result<Value, String> {
    Ok(match node {
        Yaml::Value(Scalar::Null) => Value::Null,
        Yaml::Value(Scalar::Boolean(flag)) => Value::Bool(*flag),
        Yaml::Value(Scalar::Integer(number)) => Value::Number((*number).into()),
        Yaml::Value(Scalar::FloatingPoint(number)) => Number::from_f64(number.into_inner())
            .map(Value::Number)
            .ok_or_else(|| format!("{number} is not a number that JSON has"))?,
        Yaml::Value(Scalar::String(text)) => Value::String(text.to_string()),
        Yaml::Sequence(items) => Value::Array(items.iter().map(value).collect::<Result<_, _>>()?),
        Yaml::Mapping(entries) => {
            let mut map = Map::new();
            for (key, item) in entries {
                map.insert(key_text(key)?, value(item)?);
            }
            Value::Object(map)
        }
        _ => return Err("tags, aliases to nothing and bad values are not read".into()),
    })
}

fn key_text(key: &Yaml<'_>) -> Result<String, String> {
    match value(key)? {
        Value::String(text) => Ok(text),
        Value::Number(number) => Ok(number.to_string()),
        Value::Bool(flag) => Ok(flag.to_string()),
        _ => Err("a key must be text".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yaml_and_json_read_alike() {
        let yaml = "a: 1\nb: [x, 2.5, true, null]\nc: { 7: \"y\" }\n";
        let json = r#"{"a": 1, "b": ["x", 2.5, true, null], "c": {"7": "y"}}"#;
        assert_eq!(to_json(yaml).unwrap(), serde_json::from_str::<Value>(json).unwrap());
        assert_eq!(to_json(json).unwrap(), serde_json::from_str::<Value>(json).unwrap());
        assert_eq!(to_json("").unwrap(), Value::Null);
        assert!(to_json("a: [1").is_err());
    }
}
