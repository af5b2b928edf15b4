//! MQTT topic filters, on bytes and without allocation.

/// Whether a filter with `+` and `#` matches a topic (MQTT 5.0, 4.7): a
/// wildcard at the first level does not match a topic that starts with `$`.
pub fn matches(filter: &[u8], topic: &[u8]) -> bool {
    if topic.first() == Some(&b'$') && matches!(filter.first(), Some(b'+' | b'#')) {
        return false;
    }
    let mut filter = filter.split(|&b| b == b'/');
    let mut topic = topic.split(|&b| b == b'/');
    loop {
        match (filter.next(), topic.next()) {
            (Some(b"#"), _) => return true,
            (Some(b"+"), Some(_)) => {}
            (Some(wanted), Some(level)) if wanted == level => {}
            (None, None) => return true,
            _ => return false,
        }
    }
}

/// What is wrong with a filter, if anything is.
pub fn check_filter(filter: &str) -> Result<(), &'static str> {
    if filter.is_empty() || filter.contains('\0') {
        return Err("a topic filter must not be empty nor contain NUL");
    }
    let mut levels = filter.split('/').peekable();
    while let Some(level) = levels.next() {
        if level.contains('#') && (level != "#" || levels.peek().is_some()) {
            return Err("`#` must be a whole level of a topic filter, and its last");
        }
        if level.contains('+') && level != "+" {
            return Err("`+` must be a whole level of a topic filter");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_match_as_mqtt_says() {
        for (filter, topic, expected) in [
            ("a/b", "a/b", true),
            ("a/b", "a/b/c", false),
            ("a/+/c", "a/b/c", true),
            ("a/+", "a", false),
            ("a/#", "a", true),
            ("a/#", "a/b/c", true),
            ("#", "a/b", true),
            ("+/b", "/b", true),
            ("#", "$SYS/x", false),
            ("+/x", "$SYS/x", false),
            ("$SYS/#", "$SYS/x", true),
        ] {
            assert_eq!(matches(filter.as_bytes(), topic.as_bytes()), expected, "{filter} {topic}");
        }
    }

    #[test]
    fn a_wrong_filter_is_told() {
        for wrong in ["", "a/#/b", "a#", "a/b+", "\0"] {
            assert!(check_filter(wrong).is_err(), "{wrong:?}");
        }
        check_filter("+/a/#").unwrap();
    }
}
