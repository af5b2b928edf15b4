//! The reference page's commands and clients, as they stand there.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::Duration;

use headworks_tests::folder::root;
use headworks_tests::host::{Host, prebuilt};
use headworks_tests::process::{Process, eventually, run};
use headworks_tests::{mosquitto, postgres, python, telemetry};

#[test]
fn the_python_publisher_fills_the_telemetry_table_in_postgres() {
    let mut database = postgres::shared().database();
    // The page's own statement, less the TimescaleDB calls.
    database.execute(
        "CREATE TABLE telemetry (
             time        TIMESTAMPTZ NOT NULL,
             device_id   TEXT        NOT NULL,
             location    TEXT,
             metric      TEXT        NOT NULL,
             value       DOUBLE PRECISION NOT NULL
         )",
    );
    let config = telemetry::config(&telemetry::postgres_sink(database.url()));
    let mut host = Host::prepare("reference", &config);
    for (name, file) in [("normalize", "10-normalize"), ("enrich", "20-enrich"), ("route", "30-route")] {
        host.drop_plugin(&format!("{file}.wasm"), prebuilt(name));
    }
    host.run();

    let script = root().join("tests/clients/reference_publisher.py");
    let port = host.mqtt().port().to_string();
    run(python::command().arg(script).args(["127.0.0.1", &port, "50"]));

    eventually("50 rows", Duration::from_secs(30), || (database.count("telemetry") >= 50).then_some(()));
    let rows = database.query(
        "SELECT count(*), count(DISTINCT value), min(device_id), max(device_id), min(metric), min(value), max(value)
         FROM telemetry WHERE time > now() - interval '5 minutes'",
    );
    let row = &rows[0];
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (50, 50));
    assert_eq!((row.get::<_, &str>(2), row.get::<_, &str>(3)), ("sensor-001", "sensor-001"));
    assert_eq!(row.get::<_, &str>(4), "temperature_c");
    assert_eq!((row.get::<_, f64>(5), row.get::<_, f64>(6)), (20.0, 69.0));
}

#[test]
fn a_ping_to_test_hello_reaches_its_subscriber() {
    let host = Host::start("hello", "");
    let heard = listen(&host, &["-t", "test/hello"]);
    run(mosquitto::publish(host.mqtt()).args(["-t", "test/hello", "-m", "ping"]));
    assert_eq!(heard.first(), "ping");
}

#[test]
fn wildcards_show_what_lies_below_them() {
    let host = Host::start("wildcard", "");
    let site = listen(&host, &["-v", "-q", "1", "-t", "acme/factory-01/#"]);
    let alerts = listen(&host, &["-v", "-q", "1", "-t", "acme/factory-01/+/+/alert"]);
    for topic in ["acme/factory-02/temperature/x/reading", "acme/factory-01/temperature/sensor-4a3b/reading"]
    {
        run(mosquitto::publish(host.mqtt()).args(["-q", "1", "-t", topic, "-m", "1"]));
    }
    let alert = "acme/factory-01/vibration/motor-7c2d/alert";
    run(mosquitto::publish(host.mqtt()).args(["-q", "1", "-V", "mqttv5", "-t", alert, "-m", "2"]));
    assert_eq!(site.first(), "acme/factory-01/temperature/sensor-4a3b/reading 1");
    assert_eq!(alerts.first(), format!("{alert} 2"));
}

#[test]
fn the_diagnostic_command_shows_connected_clients() {
    let host = Host::start("sys", "");
    let connected = listen(&host, &["-v", "-t", "$SYS/broker/clients/connected"]);
    let line = connected.first();
    let count =
        line.strip_prefix("$SYS/broker/clients/connected ").and_then(|count| count.parse::<u32>().ok());
    assert!(count.is_some_and(|count| count >= 1), "{line}");
}

/// A `mosquitto_sub` that is surely subscribed: it hears a topic of its own first.
struct Listener {
    lines: std::sync::mpsc::Receiver<String>,
    _process: Process,
}

fn listen(host: &Host, args: &[&str]) -> Listener {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let own = format!("listening/{}", NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
    let mut command = std::process::Command::new("mosquitto_sub");
    command.args(mosquitto::subscribe(host.mqtt()).get_args());
    command.args(args).args(["-t", &own]).stdout(Stdio::piped());
    let mut child = command.spawn().expect("mosquitto_sub is installed");
    let out = child.stdout.take().expect("piped");
    let process = Process::adopt("mosquitto_sub", child);
    let (to, lines) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        BufReader::new(out).lines().map_while(Result::ok).try_for_each(|line| to.send(line))
    });
    let listener = Listener { lines, _process: process };
    let mut before = Vec::new();
    eventually("mosquitto_sub is subscribed", Duration::from_secs(20), || {
        run(mosquitto::publish(host.mqtt()).args(["-t", &own, "-m", "own-probe"]));
        while let Ok(line) = listener.lines.recv_timeout(Duration::from_millis(50)) {
            if line.ends_with("own-probe") {
                return Some(());
            }
            before.push(line);
        }
        None
    });
    // Messages that were there before ours ($SYS is retained) are still to be heard.
    if let Some(line) = before.into_iter().next() {
        let (to, lines) = std::sync::mpsc::channel();
        to.send(line).expect("open");
        return Listener { lines, ..listener };
    }
    listener
}

impl Listener {
    /// The first line that is not a probe.
    fn first(&self) -> String {
        loop {
            let line =
                self.lines.recv_timeout(Duration::from_secs(20)).expect("the subscriber hears the message");
            if !line.ends_with("own-probe") {
                return line;
            }
        }
    }
}
