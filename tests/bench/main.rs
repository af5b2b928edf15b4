//! `make bench`: Headworks beside its rivals, in the same run, interleaved, on
//! the same machine. Prints a table, writes `target/bench/results.json`.
//!
//! `headworks-bench ingest,log` runs some sections only and keeps the other
//! sections' figures in the file. A section that cannot be measured right ends
//! the run with a panic rather than with a number.

mod broker;
mod crowd;
mod e2e;
mod honest;
mod http;
mod idle;
mod ingest;
mod load;
mod log;
mod plugin;
mod postgres;
mod readings;
mod results;
mod server_copy;
mod sinks;

use results::Results;

type Section = (&'static str, fn(&mut Results));

const SECTIONS: [Section; 10] = [
    ("ingest", ingest::run),
    ("http", http::run),
    ("broker", broker::run),
    ("idle", idle::run),
    ("plugin", plugin::run),
    ("postgres", postgres::run),
    ("e2e", e2e::run),
    ("sinks", sinks::run),
    ("log", log::run),
    ("honest", honest::run),
];

/// Rounds of each section at least; `BENCH_ROUNDS` raises it.
pub fn rounds() -> usize {
    std::env::var("BENCH_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(5).max(5)
}

fn main() {
    let only: Vec<String> = std::env::args()
        .skip(1)
        .flat_map(|list| list.split(',').map(str::to_owned).collect::<Vec<_>>())
        .collect();
    if let Some(unknown) = only.iter().find(|name| !SECTIONS.iter().any(|(section, _)| section == name)) {
        let names: Vec<&str> = SECTIONS.iter().map(|(name, _)| *name).collect();
        eprintln!("no section {unknown}; there are {}", names.join(", "));
        std::process::exit(2);
    }
    let mut results = Results::open();
    for (name, run) in SECTIONS {
        if only.is_empty() || only.iter().any(|wanted| wanted == name) {
            eprintln!("bench: {name}, {} rounds", rounds());
            run(&mut results);
            results.save();
        }
    }
    results.print();
}
