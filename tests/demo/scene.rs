//! The demo's stage: a folder with a config, three plugins and a running host.

use std::fmt::Write;
use std::net::TcpListener;

use headworks_tests::folder::{root, target};
use headworks_tests::host::{Host, prebuilt};
use headworks_tests::telemetry::sqlite_count;

use crate::devices::{Sent, device_name, site};
use crate::show::{cut, number, table};

pub struct Scene {
    pub host: Host,
}

/// What became of messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub rows: u64,
    pub alerts: u64,
    pub dead_letters: u64,
}

impl Counts {
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            rows: self.rows + other.rows,
            alerts: self.alerts + other.alerts,
            dead_letters: self.dead_letters + other.dead_letters,
        }
    }

    fn total(&self) -> u64 {
        self.rows + self.alerts + self.dead_letters
    }

    pub fn show(&self, scene: &Scene, limit: f64) {
        let line = |name: &str, count: u64, what: &str| println!("  {name:12} {:>9}  {what}", number(count));
        line("rows", self.rows, &format!("table telemetry in {}", scene.shown("data/telemetry.db")));
        line("alerts", self.alerts, &format!("table alerts: value above {limit}"));
        line("dead letters", self.dead_letters, "refused, kept with the reason");
        line("all", self.total(), "nothing lost, nothing doubled");
    }
}

impl Scene {
    /// Starts the host in `target/demo`, as a person would: `headworks run --config headworks.yaml`.
    pub fn start(devices: usize, limit: f64) -> Self {
        let path = target().join("demo");
        let _ = std::fs::remove_dir_all(&path);
        let host = Host::at(&path);
        host.folder.write("headworks.yaml", config(port_or_any(1883), port_or_any(8080)));
        host.folder.write("devices.yaml", device_table(devices));
        for (name, file) in [("normalize", "10-normalize"), ("enrich", "20-enrich"), ("route", "30-route")] {
            host.drop_plugin(&format!("{file}.wasm"), prebuilt(name));
        }
        let scene = Self { host };
        scene.set_limit(limit);
        let mut scene = scene;
        scene.host.run();
        scene
    }

    /// A path below the demo's folder, as short as can be.
    pub fn shown(&self, name: &str) -> String {
        let path = self.host.folder.join(name);
        path.strip_prefix(root()).unwrap_or(&path).display().to_string()
    }

    pub fn set_limit(&self, limit: f64) {
        let before = self.host.log().len();
        self.host.folder.write("plugins/30-route.yaml", rule(limit));
        if before > 0 {
            // Taken once the file is quiet; the host says so.
            self.host.says_past(before, "route");
        }
    }

    pub fn limit_is(&self, limit: f64) -> bool {
        std::fs::read_to_string(self.host.folder.join("plugins/30-route.yaml"))
            .is_ok_and(|text| text == rule(limit))
    }

    /// Waits until something became of every message.
    pub fn wait_for(&self, sent: &Sent) -> Counts {
        self.wait_for_total(sent.sent)
    }

    pub fn wait_for_total(&self, total: u64) -> Counts {
        // What is refused is counted before a sink's position moves past it.
        self.host.writes("something became of every message", || {
            let counts = self.count();
            (counts.total() >= total).then_some(counts)
        })
    }

    fn count(&self) -> Counts {
        let path = self.host.folder.join("data/telemetry.db");
        let rows = sqlite_count(&path, "telemetry");
        let alerts = sqlite_count(&path, "alerts");
        let dead_letters = self.host.metric("headworks_dead_letters_total", &[]) as u64;
        Counts { rows, alerts, dead_letters }
    }

    /// The last rows of a table.
    pub fn show_rows(&self, name: &str, count: usize) {
        let path = self.host.folder.join("data/telemetry.db");
        let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY;
        let database = rusqlite::Connection::open_with_flags(path, flags).expect("the table was filled");
        let sql = format!(
            "SELECT time, device_id, coalesce(location, '-'), metric, value FROM {name} ORDER BY rowid DESC LIMIT {count}"
        );
        let mut statement = database.prepare(&sql).expect("the table of the reference page");
        println!("  {:24}  {:10}  {:14}  {:14}  {:>6}", "time", "device_id", "location", "metric", "value");
        let rows = statement
            .query_map([], |row| {
                let time: rusqlite::types::Value = row.get(0)?;
                Ok((
                    time,
                    row.get::<_, String>(1)?,
                    row.get::<_, String>(2)?,
                    row.get::<_, String>(3)?,
                    row.get::<_, f64>(4)?,
                ))
            })
            .expect("a query");
        for (time, device, location, metric, value) in rows.flatten() {
            let time = match time {
                rusqlite::types::Value::Text(text) => text,
                rusqlite::types::Value::Integer(number) => number.to_string(),
                other => format!("{other:?}"),
            };
            println!(
                "  {:24}  {device:10}  {:14}  {metric:14}  {value:>6.1}",
                // To the millisecond.
                time.chars().take(23).collect::<String>(),
                cut(&location, 14)
            );
        }
    }

    /// How often each reason, with one message as an example.
    pub fn show_letters(&self) {
        for line in self.host.cli(&["dead-letters", "summary"]).lines() {
            println!("{line}");
        }
    }

    pub fn show_next_steps(&self) {
        let admin = self.host.admin();
        let config = self.shown("headworks.yaml");
        println!("  The host has ended. Start it again, then try the rest in another terminal,");
        println!("  in {}:\n", self.shown(""));
        table(&[
            ["the host", &format!("cd {} && ../release/headworks run -c headworks.yaml", self.shown(""))],
            ["status", "../release/headworks status -c headworks.yaml"],
            ["one letter", "../release/headworks dead-letters show 0 -c headworks.yaml"],
            ["the stream", "../release/headworks streams tail -c headworks.yaml"],
            ["plugins", "../release/headworks plugin list -c headworks.yaml"],
            ["metrics", &format!("curl http://{admin}/metrics")],
            ["listen", &format!("mosquitto_sub -p {} -v -t 'acme/north/#'", self.host.mqtt().port())],
            ["the config", &config],
            ["write one", "plugins/README.md, examples/plugin-threshold"],
        ]);
    }

    pub fn end(mut self) {
        assert!(self.host.stop().success(), "the host ends cleanly");
    }
}

fn config(mqtt: u16, admin: u16) -> String {
    format!(
        "data_dir: ./data\n\
         mqtt: {{ listeners: [ {{ bind: 127.0.0.1:{mqtt} }} ] }}\n\
         admin: {{ bind: 127.0.0.1:{admin} }}\n\
         # The watched folder: its plugins run by the number in front of their names.\n\
         plugins: {{ dir: ./plugins }}\n\
         # What 20-enrich adds to each reading.\n\
         devices: {{ file: devices.yaml }}\n\
         pipelines:\n  \
           telemetry: {{ from: telemetry, routes: {{ default: telemetry, alert: alerts }} }}\n\
         sinks:\n  \
           telemetry: {{ type: sqlite, path: data/telemetry.db, table: telemetry }}\n  \
           alerts: {{ type: sqlite, path: data/telemetry.db, table: alerts }}\n"
    )
}

fn rule(limit: f64) -> String {
    format!("rules:\n  - {{ name: high, when: {{ above: {limit} }}, route: alert }}\n")
}

fn device_table(devices: usize) -> String {
    let mut text = String::new();
    for device in 0..devices {
        let _ = writeln!(
            text,
            "{}: {{ location: \"{} hall {}\", site: {}, model: T{} }}",
            device_name(device),
            site(device),
            device % 5 + 1,
            site(device),
            100 + device % 3
        );
    }
    text
}

/// The usual port where it is free, so that the commands of any tutorial work; else any.
fn port_or_any(usual: u16) -> u16 {
    let free = |port| TcpListener::bind(("127.0.0.1", port)).and_then(|socket| socket.local_addr());
    free(usual).or_else(|_| free(0)).expect("loopback").port()
}
