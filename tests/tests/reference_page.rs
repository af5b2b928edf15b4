//! The reference page's commands and clients, as they stand there.

use headworks_tests::folder::root;
use headworks_tests::host::{Host, prebuilt};
use headworks_tests::process::{Lines, run};
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

    database.changes("telemetry", "50 rows", |database| (database.count("telemetry") >= 50).then_some(()));
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

/// A `mosquitto_sub` that is subscribed.
struct Listener(Lines);

fn listen(host: &Host, args: &[&str]) -> Listener {
    let mut command = std::process::Command::new("mosquitto_sub");
    command.args(mosquitto::subscribe(host.mqtt()).get_args()).arg("-d").args(args);
    let mut lines = Lines::of(&mut command);
    lines.find("Subscribed");
    Listener(lines)
}

impl Listener {
    /// The first line that is a message, and not what `-d` says.
    fn first(mut self) -> String {
        loop {
            let line = self.0.line();
            if !line.starts_with("Client ") {
                return line;
            }
        }
    }
}
