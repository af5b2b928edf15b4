//! Sends messages to named routes by threshold and topic.
//!
//! Rules are tried in order. The first that matches gives the message its
//! route; a rule with `copy` makes a copy for its route and the next rules are
//! tried. What no rule takes goes on to the default route.

mod settings;

pub use settings::{Rule, Settings, Threshold};

use headworks_guest::json::Raw;
use headworks_guest::prelude::*;
use headworks_guest::topic;

pub struct Route {
    settings: Settings,
}

impl Plugin for Route {
    const CONFIG_SCHEMA: &'static str = include_str!("config.schema.json");

    fn new(config: &Config, _: &Context) -> Result<Self, Vec<Problem>> {
        Ok(Self { settings: Settings::read(config)? })
    }

    fn process(&mut self, message: &Message<'_>, out: &mut Output<'_>) -> Verdict {
        let settings = &self.settings;
        // The payload is read once, and only if a rule asks for it.
        let mut found = [None; Settings::FIELDS_MAX];
        let mut is_read = false;
        let mut copies = false;
        for rule in &settings.rules {
            if !rule.topics_match(message) {
                continue;
            }
            if rule.needs_payload() && !is_read {
                if json::get_each(message.payload(), &settings.fields, &mut found).is_err() {
                    // No JSON object: no field to be above or below anything.
                    found = [None; Settings::FIELDS_MAX];
                }
                is_read = true;
            }
            if !rule.payload_matches(&found) {
                continue;
            }
            out.emit().route(&rule.route);
            if !rule.copy {
                return Verdict::Emit;
            }
            copies = true;
        }
        if copies || message.route() != settings.default {
            return out.emit().route(&settings.default).verdict();
        }
        Verdict::Keep
    }
}

impl Rule {
    fn topics_match(&self, message: &Message<'_>) -> bool {
        self.topic.as_ref().is_none_or(|filter| topic::matches(filter.as_bytes(), message.topic_bytes()))
    }

    fn needs_payload(&self) -> bool {
        self.metric.is_some() || self.threshold.is_some()
    }

    fn payload_matches(&self, found: &[Option<Raw<'_>>]) -> bool {
        let metric = self
            .metric
            .as_ref()
            .is_none_or(|(field, name)| found[*field].is_some_and(|value| value.is_str(name)));
        metric
            && self.threshold.as_ref().is_none_or(|threshold| {
                let value = found[threshold.field].and_then(|value| value.as_f64());
                value.is_some_and(|value| threshold.crossed_by(value))
            })
    }
}

headworks_guest::plugin!(Route);
