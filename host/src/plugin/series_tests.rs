use proptest::prelude::*;

use super::*;

const STEP: [(&str, &str); 2] = [("pipeline", "p\\\"\n"), ("step", "s")];

/// Why `text` is not a valid exposition: a name that comes twice as a family, a
/// sample of no family, a series that comes twice, a label twice, a bad value.
fn wrong(text: &str) -> Option<String> {
    let mut kinds: BTreeMap<&str, &str> = BTreeMap::new();
    let mut series = BTreeSet::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ')?;
            if kinds.insert(name, kind).is_some() {
                return Some(format!("{name} twice"));
            }
            continue;
        }
        if line.starts_with("# HELP ") {
            continue;
        }
        let (key, value) = line.rsplit_once(' ').unwrap_or((line, ""));
        let (name, labels) = key.split_once('{').unwrap_or((key, "}"));
        let family = kinds.iter().any(|(family, kind)| {
            let histogram = *kind == "histogram";
            !histogram && name == *family
                || histogram && HISTOGRAM_SUFFIXES.iter().any(|s| name.strip_suffix(s) == Some(family))
        });
        if !family || !is_name(name) && name.len() <= 64 {
            return Some(format!("no family: {line}"));
        }
        let mut names = BTreeSet::new();
        let mut rest = labels;
        while let Some((label, after)) = rest.split_once("=\"") {
            if !names.insert(label.trim_start_matches(',')) {
                return Some(format!("a label twice: {line}"));
            }
            let mut escaped = false;
            let end = after.char_indices().find_map(|(at, c)| {
                let ends = c == '"' && !escaped;
                escaped = c == '\\' && !escaped;
                ends.then_some(at)
            });
            let Some(end) = end else { return Some(format!("no end: {line}")) };
            rest = &after[end + 1..];
        }
        if rest != "}" || !matches!(value, "NaN" | "+Inf" | "-Inf") && value.parse::<f64>().is_err() {
            return Some(format!("not a sample: {line}"));
        }
        if !series.insert(key) {
            return Some(format!("a series twice: {line}"));
        }
    }
    None
}

fn name() -> impl Strategy<Value = String> {
    prop_oneof![
        prop::sample::select(vec!["a", "a_sum", "a_bucket", "a_count", "b", "b_sum", "le", "", "A", "é"])
            .prop_map(str::to_owned),
        "[a-z_0-9]{0,70}",
    ]
}

fn labels() -> impl Strategy<Value = Labels> {
    let name = prop_oneof![
        prop::sample::select(vec!["le", "quantile", "step", "x", "y", "x-y"]).prop_map(str::to_owned),
        "[a-z]{1,3}",
    ];
    prop::collection::vec((name, prop_oneof!["[x\"\\\\\n{},= ]{0,6}", any::<String>()]), 0..4)
}

proptest! {
    #[test]
    fn a_scrape_is_valid_whatever_plugins_register_and_record(
        steps in prop::collection::vec(
            prop::collection::vec((0..5_u8, name(), any::<String>(), labels(), any::<f64>()), 0..8), 1..4),
    ) {
        let mut kept = Vec::new();
        for (step, registered) in steps.iter().enumerate() {
            let mut own = StepSeries::default();
            let step = step.to_string();
            for (kind, name, help, labels, value) in registered {
                let Some(kind) = Kind::of(*kind) else { continue };
                let of_step = [STEP[0], ("step", &*step)];
                if let Ok(series) = own.register(of_step, kind, name, help, labels.clone()) {
                    series.record(*value);
                }
            }
            kept.push(own);
        }
        prop_assert_eq!(wrong(&render()), None);
    }
}

#[test]
fn names_that_mean_something_to_prometheus_or_the_host_are_refused_with_the_reason() {
    let mut own = StepSeries::default();
    let mut register = |kind, name: &str, labels: &[(&str, &str)]| {
        let labels = labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        own.register(STEP, kind, name, "", labels).map(drop).map_err(|(_, reason)| reason)
    };
    assert!(register(Kind::Counter, "refused_le", &[("le", "1")]).unwrap_err().contains("le is reserved"));
    assert!(
        register(Kind::Counter, "refused_twice", &[("a", "1"), ("a", "2")]).unwrap_err().contains("twice")
    );
    assert_eq!(register(Kind::Counter, "refused_kind", &[]), Ok(()));
    assert!(
        register(Kind::Gauge, "refused_kind", &[("a", "")]).unwrap_err().contains("is a counter already")
    );
    assert_eq!(register(Kind::Histogram, "refused_h", &[]), Ok(()));
    assert!(register(Kind::Gauge, "refused_h_sum", &[]).unwrap_err().contains("\"refused_h\""));
}

#[test]
fn a_series_lives_as_long_as_a_step_that_has_it_and_the_next_version_goes_on_with_it() {
    let register = |own: &mut StepSeries| {
        own.register(STEP, Kind::Counter, "lives", "of a test", Vec::new()).unwrap().record(2.0);
    };
    let line = || {
        render().lines().find(|line| line.starts_with("headworks_plugin_metric_lives{")).map(str::to_owned)
    };
    let (mut old, mut new) = (StepSeries::default(), StepSeries::default());
    register(&mut old);
    register(&mut new);
    drop(old);
    assert!(line().unwrap().ends_with(" 4"), "{:?}", line());
    drop(new);
    assert_eq!(line(), None);
}
