//! Rules about what a client may publish, subscribe to and receive. They are compiled when the client
//! connects: variables are filled in, and rules for other clients are left out.
//!
//! A client may subscribe to a filter if every topic that the filter can match is allowed or, with
//! [`Overlap::Filter`], allowed except for some that are denied, whose messages are not delivered. If in
//! doubt, the answer is no: a filter that only several allow rules together cover is refused. Messages
//! are received through a subscription, so without a rule of its own receiving is allowed.

use std::collections::BTreeMap;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::config::{Overlap, Rule};
use crate::topic::TopicFilter;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Effect {
    Allow,
    Deny,
    /// The access plugin that gave the rule decides.
    #[serde(skip)]
    Ask,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    Publish,
    Subscribe,
    #[default]
    Both,
    /// Deliveries. Only an access plugin has such rules.
    #[serde(skip)]
    Receive,
}

/// The result of evaluating the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Yes,
    No,
    /// The access plugin must be asked.
    Ask,
}

/// The client for which rules are compiled.
#[derive(Clone, Copy, Debug)]
pub struct Who<'a> {
    pub client_id: &'a str,
    /// User name; `None` for an anonymous client.
    pub user: Option<&'a str>,
    pub fields: &'a BTreeMap<String, String>,
}

/// What one client may do.
#[derive(Clone, Debug, Default)]
pub struct Policy(Option<Arc<Compiled>>);

#[derive(Debug)]
struct Compiled {
    rules: Box<[CompiledRule]>,
    /// Whether deliveries must be checked.
    limits_receive: bool,
    asks: bool,
    overlap: Overlap,
}

#[derive(Debug)]
struct CompiledRule {
    effect: Effect,
    action: Action,
    patterns: Box<[Pattern]>,
}

impl Policy {
    /// Returns a policy that allows everything, as without rules and for a superuser.
    pub fn everything() -> Self {
        Self(None)
    }

    pub fn compile<'r>(rules: impl IntoIterator<Item = &'r Rule>, who: &Who<'_>, overlap: Overlap) -> Self {
        let fits = rules.into_iter().filter(|rule| rule.fits(who));
        let compiled = fits.map(|rule| CompiledRule {
            effect: rule.effect,
            action: rule.action,
            patterns: rule
                .topics
                .iter()
                .filter_map(|topic| Pattern::compile(topic, rule.effect, who))
                .collect(),
        });
        let rules: Box<[CompiledRule]> = compiled.filter(|rule| !rule.patterns.is_empty()).collect();
        let is_limit = |rule: &CompiledRule| match rule.action {
            Action::Receive => rule.effect != Effect::Allow,
            Action::Publish => false,
            Action::Subscribe | Action::Both => rule.effect == Effect::Deny && overlap == Overlap::Filter,
        };
        Self(Some(Arc::new(Compiled {
            limits_receive: rules.iter().any(is_limit),
            asks: rules.iter().any(|rule| rule.effect == Effect::Ask),
            overlap,
            rules,
        })))
    }

    /// Returns whether the client may publish to `topic`. Does not allocate.
    #[inline]
    pub fn publish(&self, topic: &str) -> Verdict {
        let Some(compiled) = &self.0 else { return Verdict::Yes };
        let is_of = |action| matches!(action, Action::Publish | Action::Both);
        compiled.first(topic, is_of).map_or(Verdict::No, Effect::verdict)
    }

    /// Returns whether every topic that `filter` can match is allowed, except for topics whose messages
    /// are not delivered.
    pub fn subscribe(&self, filter: &TopicFilter) -> Verdict {
        let Some(compiled) = &self.0 else { return Verdict::Yes };
        let filter = Pattern::of(filter.as_str());
        let mut otherwise = Verdict::Yes;
        let is_of = |rule: &&CompiledRule| matches!(rule.action, Action::Subscribe | Action::Both);
        for CompiledRule { effect, patterns, .. } in compiled.rules.iter().filter(is_of) {
            let overlaps = || patterns.iter().any(|pattern| filter.overlaps(pattern));
            let is_within = || patterns.iter().any(|pattern| filter.is_within(pattern));
            match effect {
                Effect::Allow if is_within() => return otherwise,
                Effect::Deny if is_within() => return Verdict::No,
                Effect::Deny if compiled.overlap == Overlap::Refuse && overlaps() => return Verdict::No,
                Effect::Ask if is_within() => return Verdict::Ask,
                // Of the others the rules that follow decide.
                Effect::Ask if overlaps() => otherwise = Verdict::Ask,
                _ => {}
            }
        }
        Verdict::No
    }

    /// Returns whether the client may receive a message of `topic`, to which it is subscribed. Does not
    /// allocate.
    pub fn receive(&self, topic: &str) -> Verdict {
        let Some(compiled) = self.0.as_ref().filter(|it| it.limits_receive) else { return Verdict::Yes };
        let first = compiled.first(topic, |action| action == Action::Receive);
        match first.map_or(Verdict::Yes, Effect::verdict) {
            Verdict::Yes if compiled.overlap == Overlap::Filter => {
                let first = compiled.first(topic, |it| matches!(it, Action::Subscribe | Action::Both));
                if first == Some(Effect::Deny) { Verdict::No } else { Verdict::Yes }
            }
            verdict => verdict,
        }
    }

    /// Returns whether deliveries must be checked.
    pub fn limits_receive(&self) -> bool {
        self.0.as_ref().is_some_and(|compiled| compiled.limits_receive)
    }

    /// Returns whether any rule asks the access plugin.
    pub fn asks(&self) -> bool {
        self.0.as_ref().is_some_and(|compiled| compiled.asks)
    }

    /// Returns whether publishes need no check.
    #[inline]
    pub fn is_everything(&self) -> bool {
        self.0.is_none()
    }
}

impl Compiled {
    #[inline]
    fn first(&self, topic: &str, is_of: impl Fn(Action) -> bool) -> Option<Effect> {
        let mut rules = self.rules.iter().filter(|rule| is_of(rule.action));
        let deciding = rules.find(|rule| rule.patterns.iter().any(|pattern| pattern.matches(topic)));
        deciding.map(|rule| rule.effect)
    }
}

impl Effect {
    fn verdict(self) -> Verdict {
        match self {
            Self::Allow => Verdict::Yes,
            Self::Deny => Verdict::No,
            Self::Ask => Verdict::Ask,
        }
    }
}

impl Rule {
    fn fits(&self, who: &Who<'_>) -> bool {
        let user = self.user.as_ref().is_none_or(|glob| who.user.is_some_and(|user| fits_glob(glob, user)));
        let client = self.client.as_ref().is_none_or(|glob| fits_glob(glob, who.client_id));
        user && client && self.anonymous.is_none_or(|anonymous| anonymous == who.user.is_none())
    }
}

/// Checks a topic of a rule: it must be a valid filter, and its variables well-formed.
pub fn check_topic(text: &str) -> Result<(), String> {
    TopicFilter::new(text).map_err(|error| error.to_string())?;
    if text.split('/').next() == Some("$share") {
        return Err(format!(
            "`{text}` matches nothing: of a shared subscription rules see the filter without $share/NAME/, write that alone"
        ));
    }
    text.split('/').try_for_each(|level| {
        fill(level, |name| match name {
            Variable::Field("") => Some("").filter(|_| false),
            _ => Some("x"),
        })
        .map(drop)
        .map_err(|()| {
            format!("`{level}`: a variable is %c (client id), %u (user name) or a field's name in braces such as {{site}}")
        })
    })
}

/// Returns whether a client id matches one of `patterns`, with variables filled in from `who`.
pub fn fits_client_id(patterns: &[String], who: &Who<'_>) -> bool {
    // A star in a name is no star of the pattern.
    let value = |variable: Variable<'_>| who.value(variable).filter(|value| !value.contains('*'));
    patterns.iter().any(|pattern| fill(pattern, value).is_ok_and(|glob| fits_glob(&glob, who.client_id)))
}

pub fn check_client_id(pattern: &str) -> Result<(), String> {
    let known = |variable: Variable<'_>| match variable {
        Variable::Client | Variable::Field("") => None,
        _ => Some("x"),
    };
    match fill(pattern, known) {
        Ok(filled) if !filled.is_empty() => Ok(()),
        _ => Err("must be a pattern such as %u, %u-* or {site}-*; %c is the id itself".to_owned()),
    }
}

/// Returns whether `text` matches `glob`, in which `*` stands for any number of characters.
pub(super) fn fits_glob(glob: &str, text: &str) -> bool {
    let Some((head, rest)) = glob.split_once('*') else { return glob == text };
    let Some(mut text) = text.strip_prefix(head) else { return false };
    let mut parts: Vec<&str> = rest.split('*').collect();
    let tail = parts.pop().unwrap_or_default();
    for part in parts {
        let Some(at) = text.find(part) else { return false };
        text = &text[at + part.len()..];
    }
    text.ends_with(tail)
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Level {
    Literal(Box<str>),
    One,
    Rest,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Pattern(Box<[Level]>);

enum Variable<'a> {
    Client,
    User,
    Field(&'a str),
}

impl<'a> Who<'a> {
    fn value(&self, variable: Variable<'_>) -> Option<&'a str> {
        match variable {
            Variable::Client => Some(self.client_id),
            Variable::User => self.user,
            Variable::Field(name) => self.fields.get(name).map(String::as_str),
        }
    }
}

/// Fills in the variables of one level. Returns `Err` if one has no value.
fn fill<'v>(level: &str, value: impl Fn(Variable<'_>) -> Option<&'v str>) -> Result<String, ()> {
    let mut filled = String::new();
    let mut rest = level;
    while let Some(at) = rest.find(['%', '{', '}']) {
        filled.push_str(&rest[..at]);
        rest = &rest[at..];
        let (variable, len) = match rest.as_bytes() {
            [b'%', b'c', ..] => (Variable::Client, 2),
            [b'%', b'u', ..] => (Variable::User, 2),
            [b'{', ..] => {
                let end = rest.find('}').ok_or(())?;
                let name = &rest[1..end];
                if !name.bytes().all(|b| b == b'_' || b == b'-' || b.is_ascii_alphanumeric()) {
                    return Err(());
                }
                (Variable::Field(name), end + 1)
            }
            // A variable of another broker, perhaps.
            [b'%', next, ..] if next.is_ascii_alphanumeric() => return Err(()),
            [b'%', ..] => {
                filled.push('%');
                rest = &rest[1..];
                continue;
            }
            _ => return Err(()),
        };
        filled.push_str(value(variable).filter(|value| is_one_level(value)).ok_or(())?);
        rest = &rest[len..];
    }
    filled.push_str(rest);
    Ok(filled)
}

fn is_one_level(value: &str) -> bool {
    !value.is_empty() && !value.contains(['/', '+', '#', '\0'])
}

impl Pattern {
    /// Compiles a topic. Returns `None` if the client has no value for a variable and `effect` allows.
    fn compile(text: &str, effect: Effect, who: &Who<'_>) -> Option<Self> {
        let value = |variable: Variable<'_>| who.value(variable);
        let levels =
            text.split('/').enumerate().map(|(depth, level)| match (level, fill(level, value), effect) {
                ("+", ..) => Some(Level::One),
                ("#", ..) => Some(Level::Rest),
                // A client's name must not make a rule one of the broker's own topics.
                (_, Ok(filled), Effect::Allow)
                    if depth == 0 && filled.starts_with('$') && !level.starts_with('$') =>
                {
                    None
                }
                (_, Ok(filled), _) => Some(Level::Literal(filled.into())),
                (_, Err(()), Effect::Deny | Effect::Ask) => Some(Level::One),
                (_, Err(()), Effect::Allow) => None,
            });
        levels.collect::<Option<Vec<_>>>().map(Self::normal)
    }

    fn of(filter: &str) -> Self {
        let level = |level: &str| match level {
            "+" => Level::One,
            "#" => Level::Rest,
            literal => Level::Literal(literal.into()),
        };
        Self::normal(filter.split('/').map(level).collect())
    }

    /// Normalises levels: `+/#` matches the same topics as `#`, since every topic has a first level.
    fn normal(mut levels: Vec<Level>) -> Self {
        if levels == [Level::One, Level::Rest] {
            levels.remove(0);
        }
        Self(levels.into())
    }

    fn starts_wild(&self) -> bool {
        !matches!(self.0.first(), Some(Level::Literal(_)))
    }

    /// Returns whether the first level is one that wildcards do not match (MQTT 5.0, 4.7.2).
    fn starts_with_dollar(&self) -> bool {
        matches!(self.0.first(), Some(Level::Literal(level)) if level.starts_with('$'))
    }

    #[inline]
    fn matches(&self, topic: &str) -> bool {
        if topic.starts_with('$') && self.starts_wild() {
            return false;
        }
        let mut levels = topic.split('/');
        for wanted in &self.0 {
            match (wanted, levels.next()) {
                (Level::Rest, _) => return true,
                (Level::One, Some(_)) => {}
                (Level::Literal(wanted), Some(level)) if **wanted == *level => {}
                _ => return false,
            }
        }
        levels.next().is_none()
    }

    /// Returns whether `other` matches every topic that this filter matches.
    fn is_within(&self, other: &Self) -> bool {
        if self.starts_with_dollar() && other.starts_wild() {
            return false;
        }
        let mut mine = self.0.iter();
        for theirs in &other.0 {
            match (theirs, mine.next()) {
                (Level::Rest, _) => return true,
                (Level::One, Some(Level::One | Level::Literal(_))) => {}
                (Level::Literal(a), Some(Level::Literal(b))) if a == b => {}
                _ => return false,
            }
        }
        mine.next().is_none()
    }

    /// Returns whether both filters match some topic.
    fn overlaps(&self, other: &Self) -> bool {
        if (self.starts_with_dollar() && other.starts_wild())
            || (other.starts_with_dollar() && self.starts_wild())
        {
            return false;
        }
        let (mut mine, mut theirs) = (self.0.iter(), other.0.iter());
        loop {
            match (mine.next(), theirs.next()) {
                (None, None) | (Some(Level::Rest), _) | (_, Some(Level::Rest)) => return true,
                (Some(Level::Literal(a)), Some(Level::Literal(b))) if a != b => return false,
                (Some(_), Some(_)) => {}
                _ => return false,
            }
        }
    }
}

#[cfg(test)]
#[path = "rules_tests.rs"]
mod tests;
