//! Refuses values that only a shell would expand: `~/data`, `$HOME/data`, `${PGUSER}`. Without
//! expansion, `~/data` would create a folder `~` in the working directory.

use serde_json::Value;

use crate::problems::{KeyPath, Problems};

/// Sections with topics or a plugin's own texts, in which `~` and `$` have other meanings.
const OTHERS: [&str; 4] = ["topics", "columns", "config", "rules"];

/// Checks `config` as it was written.
pub fn check(config: &Value, problems: &mut Problems) {
    walk(config, &KeyPath::root(), problems);
}

fn walk(value: &Value, path: &KeyPath, problems: &mut Problems) {
    match value {
        Value::Object(entries) => {
            for (key, value) in entries.iter().filter(|(key, _)| !OTHERS.contains(&key.as_str())) {
                walk(value, &path.key(key), problems);
            }
        }
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(i, item)| walk(item, &path.index(i), problems));
        }
        Value::String(text) => {
            if let Some(message) = refused(text) {
                problems.add(path.clone(), message);
            }
        }
        _ => {}
    }
}

fn refused(text: &str) -> Option<String> {
    let first = text.split('/').next().unwrap_or_default();
    if first.starts_with('~') {
        return Some(format!("`{first}` is not replaced by a home folder here: write the whole path"));
    }
    let name = |text: &str| {
        let end = text.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(text.len());
        text[..end].to_owned()
    };
    let variable = match (text.find("${"), first.strip_prefix('$').map(name)) {
        (Some(at), _) => format!("${{{}}}", name(&text[at + 2..])),
        (None, Some(name)) if name.starts_with(|c: char| c.is_ascii_uppercase() || c == '_') => {
            format!("${name}")
        }
        _ => return None,
    };
    Some(format!("environment variables are not replaced here: write the value of `{variable}` itself"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_shell_would_replace_is_refused_by_name_where_it_has_no_other_meaning() {
        let said = |text: &str| refused(text).unwrap_or_default();
        assert!(
            said("~/data").contains("`~`") && said("~").contains("`~`") && said("~ann/x").contains("`~ann`")
        );
        assert!(said("$HOME/data").contains("`$HOME`"));
        assert!(said("postgres://${PGUSER}@db/iot").contains("`${PGUSER}`"));
        assert!(said("/srv/${X").contains("`${X}`"));
        for fine in ["data", "./a~b", "/srv/$x", "postgres://u:a$B@h/d", "$device", ""] {
            assert_eq!(refused(fine), None, "{fine}");
        }
        let config = serde_json::json!({
            "streams": { "a": { "topics": ["~/x", "$SYS/${x}"] } },
            "pipelines": { "p": { "steps": [{ "plugin": "a", "config": { "text": "${x}" } }] } },
            "sinks": { "w": { "path": "~/w.db" } },
        });
        let mut problems = Problems::default();
        check(&config, &mut problems);
        let paths: Vec<_> = problems.into_vec().into_iter().map(|p| p.path.as_str().to_owned()).collect();
        assert_eq!(paths, ["sinks.w.path"]);
    }
}
