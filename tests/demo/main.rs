//! `make demo`: a few hundred simulated devices, the host with its three
//! plugins, and what became of every message; then a plugin changes.
//!
//! On a terminal it waits for Enter before each change; elsewhere it does all
//! by itself. `--check` counts everything at the end.

mod devices;
mod scene;
mod show;

use std::io::IsTerminal;

use devices::{Load, Readings};
use scene::Scene;
use show::{number, table, title};

const DEVICES: usize = 300;
const READINGS: usize = 100;
const LIMIT: f64 = 80.0;
const LOWER_LIMIT: f64 = 25.0;

fn main() {
    let interactive = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let check = std::env::args().any(|argument| argument == "--check");

    title("Headworks demo");
    let scene = Scene::start(DEVICES, LIMIT);
    table(&[
        ["host", &format!("MQTT {}, admin http://{}", scene.host.mqtt(), scene.host.admin())],
        ["plugins", &format!("10-normalize, 20-enrich, 30-route in {}", scene.shown("plugins"))],
        ["rows", &format!("SQLite {}", scene.shown("data/telemetry.db"))],
    ]);

    title(&format!("{DEVICES} devices send {READINGS} readings each"));
    let first = Load::new(DEVICES, Readings { from: 0, count: READINGS }, LIMIT).send(scene.host.mqtt());
    let counts = scene.wait_for(&first);
    println!(
        "{} messages in {:.1} s: {} messages/s, each acknowledged after it was\nsynced to disk.\n",
        number(first.sent),
        first.took.as_secs_f64(),
        number((first.sent as f64 / first.took.as_secs_f64()) as u64)
    );
    counts.show(&scene, LIMIT);

    title("Rows, as the plugins made them");
    scene.show_rows("telemetry", 4);
    println!("\nAlerts:\n");
    scene.show_rows("alerts", 3);
    title("Dead letters, each with its reason");
    scene.show_letters();

    title("A plugin changes while messages flow");
    if interactive {
        println!("The limit is {LIMIT} in {}.", scene.shown("plugins/30-route.yaml"));
        println!(
            "Press Enter and the demo lowers it to {LOWER_LIMIT}; or edit the file, save it,\nthen press Enter."
        );
        wait_for_enter();
    }
    if !interactive || scene.limit_is(LIMIT) {
        scene.set_limit(LOWER_LIMIT);
    }
    let second =
        Load::new(DEVICES, Readings { from: READINGS, count: 10 }, LOWER_LIMIT).send(scene.host.mqtt());
    let after = scene.wait_for_total(first.sent + second.sent);
    println!(
        "No restart: of the next {} messages {} became alerts\n(before: {} of {}).",
        number(second.sent),
        number(after.alerts - counts.alerts),
        number(counts.alerts),
        number(first.sent)
    );
    if check {
        assert_eq!(counts, first.expected, "what became of the first readings");
        assert_eq!(after, first.expected.plus(&second.expected), "what became of all of them");
        println!("check: ok");
    }

    title("Where to look next");
    scene.show_next_steps();
    if interactive {
        println!("\nThe host goes on until you press Enter.");
        wait_for_enter();
    }
    scene.end();
}

fn wait_for_enter() {
    let mut line = String::new();
    let _ = std::io::stdin().read_line(&mut line);
}
