//! Rules against a naive enumerator of topics.

use proptest::prelude::*;

use super::*;

fn rule(effect: Effect, topics: &[&str]) -> Rule {
    let topics = topics.iter().map(|topic| (*topic).to_owned()).collect();
    Rule { effect, user: None, client: None, anonymous: None, action: Action::Both, topics }
}

fn compile(rules: &[Rule], user: Option<&str>, client_id: &str, fields: &[(&str, &str)]) -> Policy {
    compile_with(Overlap::Refuse, rules, user, client_id, fields)
}

fn compile_with(
    overlap: Overlap,
    rules: &[Rule],
    user: Option<&str>,
    client_id: &str,
    fields: &[(&str, &str)],
) -> Policy {
    let fields = fields.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Policy::compile(rules, &Who { client_id, user, fields: &fields }, overlap)
}

trait May {
    fn may_publish(&self, topic: &str) -> bool;
    fn may_subscribe(&self, filter: &TopicFilter) -> bool;
}

impl May for Policy {
    fn may_publish(&self, topic: &str) -> bool {
        self.publish(topic) == Verdict::Yes
    }

    fn may_subscribe(&self, filter: &TopicFilter) -> bool {
        self.subscribe(filter) == Verdict::Yes
    }
}

fn filter(text: &str) -> TopicFilter {
    TopicFilter::new(text).unwrap()
}

/// Every topic of up to four levels over a small alphabet, `$` among it.
fn topics() -> Vec<String> {
    let mut all: Vec<String> = ["a", "b", "z", "$S", ""].map(str::to_owned).into();
    let mut last = all.clone();
    for _ in 0..3 {
        last = last
            .iter()
            .flat_map(|topic| ["a", "b", "z", "$S", ""].map(|level| format!("{topic}/{level}")))
            .collect();
        all.extend(last.clone());
    }
    all
}

fn a_filter() -> impl Strategy<Value = String> {
    let level = prop::sample::select(vec!["a", "b", "+", "$S"]);
    let levels = prop::collection::vec(level, 1..=3);
    (levels, any::<bool>()).prop_map(|(levels, rest)| {
        let mut text = levels.join("/");
        if rest {
            text.push_str("/#");
        }
        text
    })
}

fn an_effect() -> impl Strategy<Value = Effect> {
    prop::sample::select(vec![Effect::Allow, Effect::Deny, Effect::Ask])
}

fn any_filter() -> impl Strategy<Value = String> {
    prop_oneof![10 => a_filter(), 1 => Just("#".to_owned())]
}

proptest! {
    #[test]
    fn one_filter_is_within_another_exactly_when_all_its_topics_are(a in any_filter(), b in any_filter()) {
        let topics = topics();
        let naive = topics.iter().all(|topic| !filter(&a).matches(topic) || filter(&b).matches(topic));
        prop_assert_eq!(Pattern::of(&a).is_within(&Pattern::of(&b)), naive);
    }

    #[test]
    fn two_filters_overlap_exactly_when_they_share_a_topic(a in any_filter(), b in any_filter()) {
        let topics = topics();
        let naive = topics.iter().any(|topic| filter(&a).matches(topic) && filter(&b).matches(topic));
        prop_assert_eq!(Pattern::of(&a).overlaps(&Pattern::of(&b)), naive);
    }

    #[test]
    fn an_allowed_subscription_can_match_no_denied_topic(
        rules in prop::collection::vec((an_effect(), any_filter()), 0..6),
        wanted in any_filter(),
    ) {
        let rules: Vec<Rule> = rules.iter().map(|(effect, topic)| rule(*effect, &[topic])).collect();
        let policy = compile(&rules, None, "c", &[]);
        let naive = |topic: &str| {
            let first = rules.iter().find(|rule| filter(&rule.topics[0]).matches(topic));
            first.map_or(Verdict::No, |rule| rule.effect.verdict())
        };
        let may_subscribe = policy.subscribe(&filter(&wanted));
        for topic in topics() {
            let topic_is = naive(&topic);
            prop_assert_eq!(policy.publish(&topic), topic_is, "{}", topic);
            if !filter(&wanted).matches(&topic) {
                continue;
            }
            match may_subscribe {
                Verdict::Yes => prop_assert_eq!(topic_is, Verdict::Yes, "{}", topic),
                Verdict::Ask => prop_assert!(topic_is != Verdict::No, "{}", topic),
                Verdict::No => {}
            }
        }
    }
}

proptest! {
    #[test]
    fn of_an_overlapping_subscription_no_denied_topic_is_received_and_no_allowed_one_is_missed(
        rules in prop::collection::vec((an_effect(), any_filter()), 0..6),
        wanted in any_filter(),
    ) {
        let rules: Vec<Rule> = rules.iter().map(|(effect, topic)| rule(*effect, &[topic])).collect();
        let [policy, strict] = [Overlap::Filter, Overlap::Refuse].map(|it| compile_with(it, &rules, None, "c", &[]));
        let wanted = filter(&wanted);
        let verdict = policy.subscribe(&wanted);
        if strict.subscribe(&wanted) != Verdict::No {
            prop_assert_eq!(verdict, strict.subscribe(&wanted));
        }
        for topic in topics().iter().filter(|topic| verdict != Verdict::No && wanted.matches(topic)) {
            let first = rules.iter().find(|rule| filter(&rule.topics[0]).matches(topic));
            let effect = first.map(|rule| rule.effect);
            prop_assert_eq!(policy.receive(topic) == Verdict::No, effect == Some(Effect::Deny), "{}", topic);
            prop_assert!(effect.is_some() && policy.limits_receive() | (effect != Some(Effect::Deny)), "{}", topic);
        }
    }
}

#[test]
fn what_no_rule_allows_is_refused() {
    let policy = compile(&[], Some("u"), "c", &[]);
    assert!(!policy.may_publish("a") && !policy.may_subscribe(&filter("a")));
    assert!(Policy::everything().may_publish("a"));
}

#[test]
fn variables_stand_for_the_client_and_never_for_more_than_a_level() {
    let rules = [rule(Effect::Allow, &["dev/%c/up", "user/%u/#", "acme/{site}/+"])];
    let policy = compile(&rules, Some("ann"), "c1", &[("site", "f1")]);
    for topic in ["dev/c1/up", "user/ann/x/y", "acme/f1/t"] {
        assert!(policy.may_publish(topic), "{topic}");
    }
    for topic in ["dev/c2/up", "user/bob", "acme/f2/t"] {
        assert!(!policy.may_publish(topic), "{topic}");
    }
    for odd in ["+", "#", "c1/up", ""] {
        let policy = compile(&rules, Some(odd), odd, &[("site", odd)]);
        for topic in ["dev/c1/up", "dev/c1/up/up", "user/ann", "dev/+/up", "acme/f1/t"] {
            assert!(!policy.may_publish(topic), "{odd} {topic}");
        }
        let denies = [rule(Effect::Deny, &["dev/%c"]), rule(Effect::Allow, &["#"])];
        assert!(!compile(&denies, None, odd, &[]).may_publish("dev/x"), "{odd}");
    }
}

#[test]
fn a_name_never_opens_the_brokers_own_topics() {
    let rules = [rule(Effect::Allow, &["%c/#", "{site}/#", "$SYS/%u"])];
    let policy = compile(&rules, Some("ann"), "$SYS", &[("site", "$SYS")]);
    assert!(!policy.may_subscribe(&filter("$SYS/#")) && !policy.may_subscribe(&filter("$SYS/broker")));
    assert!(policy.may_subscribe(&filter("$SYS/ann")), "where the rule says so");
    let denies = [rule(Effect::Deny, &["%c/#"]), rule(Effect::Allow, &["$SYS/#", "#"])];
    assert!(!compile(&denies, None, "$SYS", &[]).may_subscribe(&filter("$SYS/broker")));
}

#[test]
fn rules_fit_users_clients_and_the_anonymous() {
    let mut rules =
        [rule(Effect::Allow, &["named"]), rule(Effect::Allow, &["open"]), rule(Effect::Allow, &["read"])];
    (rules[0].user, rules[0].client) = (Some("line-*-press".into()), Some("*7".into()));
    rules[1].anonymous = Some(true);
    rules[2].action = Action::Subscribe;
    let named = compile(&rules, Some("line-4-press"), "c7", &[]);
    assert!(named.may_publish("named") && !named.may_publish("open"));
    assert!(!compile(&rules, Some("line-4-press"), "c8", &[]).may_publish("named"));
    let anonymous = compile(&rules, None, "c7", &[]);
    assert!(anonymous.may_publish("open") && !anonymous.may_publish("named"));
    assert!(anonymous.may_subscribe(&filter("read")) && !anonymous.may_publish("read"));
}

#[test]
fn the_brokers_own_topics_are_only_for_who_is_allowed_by_name() {
    let policy = compile(&[rule(Effect::Allow, &["#"])], None, "c", &[]);
    assert!(policy.may_subscribe(&filter("#")) && !policy.may_subscribe(&filter("$SYS/#")));
    let policy = compile(&[rule(Effect::Allow, &["$SYS/#"])], None, "c", &[]);
    assert!(policy.may_subscribe(&filter("$SYS/broker/+")) && !policy.may_subscribe(&filter("#")));
}

#[test]
fn a_client_id_is_bound_to_who_the_client_is() {
    let fields = BTreeMap::from([("site".to_owned(), "f1".to_owned())]);
    let fits = |pattern: &str, user: Option<&str>, client_id: &str| {
        fits_client_id(&[pattern.to_owned()], &Who { client_id, user, fields: &fields })
    };
    assert!(fits("%u", Some("ann"), "ann") && !fits("%u", Some("ann"), "bob"));
    assert!(fits("%u-*", Some("ann"), "ann-2") && !fits("%u-*", Some("ann"), "anna-2"));
    assert!(fits("{site}-*", Some("ann"), "f1-x") && !fits("{line}-*", Some("ann"), "-x"));
    assert!(!fits("%u", None, "") && !fits("%u-*", None, "-x"));
    for odd in ["*", "a*", "", "+"] {
        assert!(!fits("%u", Some(odd), "ann") && !fits("%u-*", Some(odd), "ann-2"), "{odd}");
    }
    for good in ["%u", "plc-*", "{site}/%u"] {
        assert_eq!(check_client_id(good), Ok(()), "{good}");
    }
    for bad in ["", "%c", "{", "{}", "{a b}", "%i-*"] {
        assert!(check_client_id(bad).is_err(), "{bad}");
    }
}

#[test]
fn what_is_received_is_limited_only_by_rules_of_its_own() {
    let receive = |effect, topic| Rule { action: Action::Receive, ..rule(effect, &[topic]) };
    let rules = [
        receive(Effect::Allow, "a/open"),
        receive(Effect::Ask, "a/+"),
        receive(Effect::Deny, "a/#"),
        rule(Effect::Allow, &["#"]),
    ];
    let policy = compile(&rules, None, "c", &[]);
    assert!(policy.limits_receive() && policy.asks());
    for (topic, wanted) in
        [("a/open", Verdict::Yes), ("a/x", Verdict::Ask), ("a/x/y", Verdict::No), ("b", Verdict::Yes)]
    {
        assert_eq!(policy.receive(topic), wanted, "{topic}");
        assert!(policy.may_publish(topic), "{topic}");
    }
    assert!(policy.may_subscribe(&filter("a/#")));
    let policy = compile(&rules[3..], None, "c", &[]);
    assert!(!policy.limits_receive() && policy.receive("a/x") == Verdict::Yes);
}

#[test]
fn a_rule_that_asks_for_a_variable_without_a_value_asks_for_the_whole_level() {
    let rules = [rule(Effect::Ask, &["acme/{site}/+"]), rule(Effect::Allow, &["#"])];
    let policy = compile(&rules, None, "c", &[]);
    assert_eq!(policy.publish("acme/any/x"), Verdict::Ask);
    assert_eq!(policy.subscribe(&filter("acme/+/x")), Verdict::Ask);
    assert_eq!(policy.subscribe(&filter("acme/#")), Verdict::Ask, "a part of it is");
}

#[test]
fn topics_of_rules_are_checked() {
    for good in ["a/+/#", "dev/%c/{site}", "100%/x", "x-%u-{a_b}"] {
        assert_eq!(check_topic(good), Ok(()), "{good}");
    }
    for bad in
        ["", "a/#/b", "{site", "site}", "{}", "{a b}", "%c+", "%i/x", "a/x-%l", "$share/g/a", "$share/#"]
    {
        assert!(check_topic(bad).is_err(), "{bad}");
    }
}
