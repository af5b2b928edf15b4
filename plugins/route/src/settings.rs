//! The config of `route`; `config.schema.json` says the same.

use headworks_guest::config::{Config, Fields, Problem};
use headworks_guest::{abi, topic};

pub struct Settings {
    pub rules: Vec<Rule>,
    /// Route of what no rule takes.
    pub default: String,
    /// Every field that a rule looks at, each once.
    pub fields: Vec<String>,
}

pub struct Rule {
    pub topic: Option<String>,
    /// Field number and the text that it must read.
    pub metric: Option<(usize, String)>,
    pub threshold: Option<Threshold>,
    pub route: String,
    pub copy: bool,
}

/// A number outside of `below..=above` crosses it; with both set, either does.
pub struct Threshold {
    /// Number of the field in [`Settings::fields`].
    pub field: usize,
    pub above: Option<f64>,
    pub below: Option<f64>,
}

impl Threshold {
    pub fn crossed_by(&self, value: f64) -> bool {
        self.above.is_some_and(|limit| value > limit) || self.below.is_some_and(|limit| value < limit)
    }
}

impl Settings {
    pub const FIELDS_MAX: usize = 16;

    pub fn read(config: &Config) -> Result<Self, Vec<Problem>> {
        let mut names = Vec::new();
        let mut fields = config.fields();
        let settings = Self {
            rules: fields.objects("rules", |rule| read_rule(rule, &mut names)),
            default: route(&mut fields, "default"),
            fields: names,
        };
        if settings.fields.len() > Self::FIELDS_MAX {
            fields.problem("rules", format!("must look at most at {} different fields", Self::FIELDS_MAX));
        }
        fields.finish().map(|()| settings)
    }
}

fn read_rule(rule: &mut Fields<'_>, names: &mut Vec<String>) -> Rule {
    // For people only; read so that it counts as known.
    rule.optional_string("name");
    if rule.raw("route").is_none() {
        rule.problem("route", "is required");
    }
    let route = route(rule, "route");
    let copy = rule.bool("copy", false);
    rule.object("when", |when| {
        let topic = when.optional_string("topic");
        if let Some(Err(reason)) = topic.as_deref().map(topic::check_filter) {
            when.problem("topic", reason);
        }
        let metric_field = when.string("metric_field", "metric");
        let metric = when.optional_string("metric").map(|name| (number_of(names, &metric_field), name));
        let field = when.string("field", "value");
        let (above, below) = (when.optional_f64("above"), when.optional_f64("below"));
        let has_threshold = above.is_some() || below.is_some();
        let threshold = has_threshold.then(|| Threshold { field: number_of(names, &field), above, below });
        if topic.is_none() && metric.is_none() && threshold.is_none() {
            when.problem("", "needs at least one of topic, metric, above, below");
        }
        Rule { topic, metric, threshold, route, copy }
    })
}

fn route(fields: &mut Fields<'_>, key: &'static str) -> String {
    let route = fields.string(key, "");
    if route.len() > abi::ROUTE_BYTES_MAX {
        fields.problem(key, format!("must have at most {} bytes, has {}", abi::ROUTE_BYTES_MAX, route.len()));
    }
    route
}

fn number_of(names: &mut Vec<String>, name: &str) -> usize {
    names.iter().position(|known| known == name).unwrap_or_else(|| {
        names.push(name.to_owned());
        names.len() - 1
    })
}
