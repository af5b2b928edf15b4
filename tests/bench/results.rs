//! Figures: medians, their spread, the aim, the table and the file.

use std::collections::BTreeMap;
use std::path::PathBuf;

use headworks_tests::folder::target;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// What the figures are to be: key, aim, whether more is better.
const AIMS: [(&str, f64, Better); 22] = [
    ("ingest_acks_ratio_vs_mosquitto", 6.0, Better::More),
    ("ingest_acks_ratio_vs_mosquitto_with_access", 6.0, Better::More),
    ("fanout_ratio_vs_mosquitto", 2.0, Better::More),
    ("pubsub_ratio_vs_mosquitto", 2.0, Better::More),
    ("subscribe_cost_ratio_100k", 1.3, Better::Less),
    ("idle_conn_kib", 8.0, Better::Less),
    ("plugin_pass_ratio_vs_native", 2.0, Better::Less),
    ("plugin_emit_ratio_vs_native", 2.5, Better::Less),
    ("plugin_json_ratio_vs_native", 2.3, Better::Less),
    ("postgres_rows_ratio_vs_server_copy", 0.8, Better::More),
    ("postgres_rows_ratio_vs_psycopg2", 4.0, Better::More),
    ("reject_cost_ratio_1pct", 2.0, Better::Less),
    ("reject_cost_ratio_10pct", 5.0, Better::Less),
    ("e2e_msgs_per_s", 100_000.0, Better::More),
    ("e2e_cpu_us_per_msg", 6.0, Better::Less),
    ("derived_stream_cpu_us_per_msg", 0.6, Better::Less),
    ("host_rss_mb", 150.0, Better::Less),
    ("log_append_ratio_vs_raw", 0.9, Better::More),
    ("checkpoint_write_ratio_64mib", 2.05, Better::Less),
    ("honest_p99_ratio_beside_misbehaving", 2.0, Better::Less),
    ("honest_p99_ratio_beside_misbehaving_log_in_memory", 2.0, Better::Less),
    ("ingest_acks_per_s", 0.0, Better::More),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Better {
    More,
    Less,
}

/// One figure's rounds.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Spread {
    median: f64,
    min: f64,
    max: f64,
    rounds: usize,
}

#[derive(Debug, Default)]
pub struct Results {
    spreads: BTreeMap<String, Spread>,
    /// Figures that are no single number.
    objects: BTreeMap<String, Value>,
}

impl Results {
    /// With what an earlier run left, so that sections can be run one by one.
    pub fn open() -> Self {
        let text = std::fs::read(path()).unwrap_or_default();
        let Ok(Value::Object(file)) = serde_json::from_slice::<Value>(&text) else { return Self::default() };
        let spreads = file.get("spread").cloned().and_then(|spread| serde_json::from_value(spread).ok());
        let objects = file.iter().filter(|(key, value)| value.is_object() && *key != "spread");
        Self {
            spreads: spreads.unwrap_or_default(),
            objects: objects.map(|(key, value)| (key.clone(), value.clone())).collect(),
        }
    }

    /// The median of the rounds is the figure.
    pub fn add(&mut self, key: &str, rounds: &[f64]) {
        assert!(rounds.len() >= 5, "{key}: {} rounds are too few", rounds.len());
        let spread = spread(key, rounds);
        eprintln!("bench: {key} {} ({} to {})", short(spread.median), short(spread.min), short(spread.max));
        self.spreads.insert(key.to_owned(), spread);
    }

    /// Ours to the rival's, round by round.
    pub fn add_ratio(&mut self, key: &str, ours: &[f64], rival: &[f64]) {
        assert_eq!(ours.len(), rival.len(), "{key}: rounds are measured in pairs");
        self.add(key, &ours.iter().zip(rival).map(|(ours, rival)| ours / rival).collect::<Vec<_>>());
    }

    pub fn add_object(&mut self, key: &str, rounds: &[(&str, Vec<f64>)]) {
        let medians: Map<String, Value> = rounds
            .iter()
            .map(|(name, rounds)| ((*name).to_owned(), json!(spread(key, rounds).median)))
            .collect();
        for (name, rounds) in rounds {
            self.spreads.insert(format!("{key}[{name}]"), spread(key, rounds));
        }
        eprintln!("bench: {key} {medians:?}");
        self.objects.insert(key.to_owned(), Value::Object(medians));
    }

    pub fn save(&self) {
        let mut file: Map<String, Value> = self
            .spreads
            .iter()
            .filter(|(key, _)| !key.contains('['))
            .map(|(key, spread)| (key.clone(), json!(spread.median)))
            .collect();
        file.extend(self.objects.clone());
        file.insert("spread".into(), json!(self.spreads));
        std::fs::create_dir_all(path().parent().expect("in target")).expect("target can be written");
        let text = serde_json::to_string_pretty(&file).expect("numbers and names");
        std::fs::write(path(), text + "\n").expect("target can be written");
    }

    pub fn print(&self) {
        println!("\n{:38} {:>12} {:>24} {:>10}", "figure", "median", "spread", "aim");
        for (key, spread) in &self.spreads {
            let aim = AIMS.iter().find(|(aim, at, _)| aim == key && *at > 0.0).map(|(_, at, better)| {
                let met = if *better == Better::More { spread.median >= *at } else { spread.median <= *at };
                let sign = if *better == Better::More { ">=" } else { "<=" };
                format!("{sign} {}{}", short(*at), if met { "" } else { "  MISSED" })
            });
            println!(
                "{key:38} {:>12} {:>24} {:>10}",
                short(spread.median),
                format!("{} to {}", short(spread.min), short(spread.max)),
                aim.unwrap_or_default()
            );
        }
        println!("\nwritten to {}", path().display());
    }
}

fn spread(key: &str, rounds: &[f64]) -> Spread {
    assert!(rounds.iter().all(|n| n.is_finite() && *n >= 0.0), "{key}: not numbers: {rounds:?}");
    let mut sorted = rounds.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let median =
        if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 };
    Spread { median, min: sorted[0], max: sorted[sorted.len() - 1], rounds: sorted.len() }
}

/// Three significant digits or whole numbers.
fn short(n: f64) -> String {
    match n.abs() {
        n if n >= 1000.0 => format!("{n:.0}"),
        n if n >= 10.0 => format!("{n:.1}"),
        n => format!("{n:.3}"),
    }
}

fn path() -> PathBuf {
    target().join("bench/results.json")
}
