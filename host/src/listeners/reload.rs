//! What a changed configuration changes in a running listener, key by key.

use serde::Serialize;

/// Keys of a section that differ, by when the new value applies.
#[derive(Debug, Default)]
pub struct Comparison {
    section: &'static str,
    /// What changes, in words for a person.
    pub told: Vec<String>,
    /// Keys whose new values need a restart.
    pub needs_restart: Vec<String>,
}

impl Comparison {
    pub fn of(section: &'static str) -> Self {
        Self { section, ..Self::default() }
    }

    /// Compares the values of a key that applies at once.
    pub fn in_place<T: PartialEq + Serialize>(&mut self, key: &str, now: &T, next: &T) {
        self.tell(key, now, next, "at once");
    }

    /// Compares the values of a key that applies to connections from now on.
    pub fn next_connection<T: PartialEq + Serialize>(&mut self, key: &str, now: &T, next: &T) {
        self.tell(key, now, next, "for new connections");
    }

    /// Compares the values of a key that is only read at the start. The present value stays in force.
    pub fn restart<T: PartialEq + Clone>(&mut self, key: &str, now: &T, next: &mut T) {
        if now != next {
            self.needs_restart.push(format!("{}.{key}", self.section));
            next.clone_from(now);
        }
    }

    fn tell<T: PartialEq + Serialize>(&mut self, key: &str, now: &T, next: &T, when: &str) {
        if now != next {
            let (section, now, next) = (self.section, shown(now), shown(next));
            self.told.push(format!("{section}.{key}: {now} becomes {next}, {when}"));
        }
    }
}

/// Returns a value as the configuration writes it.
fn shown(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(text)) => text,
        Ok(serde_json::Value::Null) | Err(_) => "unset".to_owned(),
        Ok(value) => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_told_with_both_values_and_one_for_a_restart_keeps_its_own() {
        let mut compared = Comparison::of("mqtt");
        let mut next = 2;
        compared.restart("sessions", &1, &mut next);
        compared.in_place("same", &1, &1);
        compared.in_place("age", &"7d", &"1d");
        compared.next_connection("keep_alive_max", &None, &Some(60));
        assert_eq!((next, compared.needs_restart), (1, vec!["mqtt.sessions".to_owned()]));
        let told = [
            "mqtt.age: 7d becomes 1d, at once",
            "mqtt.keep_alive_max: unset becomes 60, for new connections",
        ];
        assert_eq!(compared.told, told);
    }
}
