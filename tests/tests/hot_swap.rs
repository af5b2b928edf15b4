//! Plugins change under load: the next messages see the new one, none is lost, none doubled.

use std::time::Duration;

use headworks_tests::host::{Host, prebuilt};
use headworks_tests::http;
use headworks_tests::publisher::{Address, Plan, Publisher, Sent};
use headworks_tests::telemetry::{self, Repeats};

const CONFIG: &str = "streams: { telemetry: { partitions: 4 } }\n\
    pipelines: { telemetry: { from: telemetry, routes: { default: warehouse, alert: alerts } } }\n\
    sinks:\n  warehouse: { type: sqlite, path: data/telemetry.db, table: telemetry }\n  \
    alerts: { type: sqlite, path: data/alerts.db, table: alerts }\n";

fn threshold(above: u64) -> String {
    format!("rules:\n  - {{ when: {{ field: value, above: {above} }}, route: alert }}\n")
}

#[test]
fn a_changed_plugin_changes_the_next_messages_and_loses_none() {
    let mut host = Host::prepare("swap", CONFIG);
    host.drop_plugin("10-normalize.wasm", prebuilt("normalize"));
    host.run();
    let (rows, alerts) = (host.folder.join("data/telemetry.db"), host.folder.join("data/alerts.db"));
    let publishers = devices(&host);
    host.writes("rows", || (telemetry::sqlite_count(&rows, "telemetry") > 500).then_some(()));
    assert_eq!(telemetry::sqlite_count(&alerts, "alerts"), 0);

    // A new step: everything is an alert from here on.
    host.folder.write("plugins/30-route.yaml", threshold(0));
    host.drop_plugin("30-route.wasm", prebuilt("route"));
    host.writes("alerts", || (telemetry::sqlite_count(&alerts, "alerts") > 100).then_some(()));

    // The same plugin with another config: nothing is.
    host.folder.write("plugins/30-route.yaml", threshold(1_000_000_000));
    let before = telemetry::sqlite_count(&rows, "telemetry");
    host.writes("rows again", || (telemetry::sqlite_count(&rows, "telemetry") > before + 100).then_some(()));

    let sent: Vec<Sent> = publishers.into_iter().map(Publisher::finish).collect();
    for path in [&rows, &alerts] {
        telemetry::read_behind_steps(&host, path, host.end());
    }
    let mut all = telemetry::sqlite_rows(&rows, "telemetry");
    all.extend(telemetry::sqlite_rows(&alerts, "alerts"));
    // Two tables: the order across them is not known.
    all.sort();
    telemetry::assert_rows(&all, &sent, Repeats::None);
}

#[test]
fn each_message_has_one_table_though_a_sink_lags_through_changes_and_a_crash() {
    let mut host = Host::prepare("swap-lag", CONFIG);
    host.drop_plugin("10-normalize.wasm", prebuilt("normalize"));
    host.folder.write("plugins/30-route.yaml", threshold(1_000_000_000));
    host.drop_plugin("30-route.wasm", prebuilt("route"));
    host.run();
    let (rows, alerts) = (host.folder.join("data/telemetry.db"), host.folder.join("data/alerts.db"));
    let publishers = devices(&host);
    host.writes("rows", || (telemetry::sqlite_count(&rows, "telemetry") > 200).then_some(()));

    let away = rusqlite::Connection::open(&alerts).expect("the sink's");
    away.busy_timeout(Duration::from_secs(20)).expect("a timeout");
    away.execute_batch("BEGIN IMMEDIATE").expect("the host does not write now");
    // Everything is an alert, then nothing is.
    change_route(&host, threshold(0));
    for publisher in &publishers {
        publisher.await_acked(publisher.acked() + 50);
    }
    change_route(&host, threshold(1_000_000_000));
    let before = telemetry::sqlite_count(&rows, "telemetry");
    host.writes("rows again", || (telemetry::sqlite_count(&rows, "telemetry") > before + 100).then_some(()));
    let sent: Vec<Sent> = publishers.into_iter().map(Publisher::finish).collect();
    telemetry::read_behind_steps(&host, &rows, host.end());
    host.kill();
    host.folder.write("plugins/30-route.yaml", threshold(0));
    drop(away);

    host.run();
    for path in [&rows, &alerts] {
        telemetry::read_behind_steps(&host, path, host.end());
    }
    let mut all = telemetry::sqlite_rows(&rows, "telemetry");
    let of_alerts = telemetry::sqlite_rows(&alerts, "alerts");
    assert!(!of_alerts.is_empty());
    all.extend(of_alerts);
    all.sort();
    telemetry::assert_rows(&all, &sent, Repeats::None);
}

#[test]
fn a_sink_that_lags_delays_no_change_of_the_steps_and_gets_what_the_steps_of_each_moment_made() {
    // More changes than versions of the steps are kept for sinks that read the source.
    const CHANGES: u64 = 12;
    let mut host = Host::prepare("swap-lags", CONFIG);
    host.drop_plugin("10-normalize.wasm", prebuilt("normalize"));
    host.folder.write("plugins/30-route.yaml", threshold(0));
    host.drop_plugin("30-route.wasm", prebuilt("route"));
    host.run();
    let (rows, alerts) = (host.folder.join("data/telemetry.db"), host.folder.join("data/alerts.db"));
    let publishers = devices(&host);
    host.writes("alerts", || (telemetry::sqlite_count(&alerts, "alerts") > 50).then_some(()));
    let away = rusqlite::Connection::open(&alerts).expect("the sink's");
    away.busy_timeout(Duration::from_secs(20)).expect("a timeout");
    away.execute_batch("BEGIN IMMEDIATE").expect("the host does not write now");
    for publisher in &publishers {
        publisher.await_acked(publisher.acked() + 50);
    }
    // From here on nothing is an alert.
    for change in 0..CHANGES {
        let before = telemetry::sqlite_count(&rows, "telemetry");
        change_route(&host, threshold(1_000_000_000 + change));
        assert!(status(&host)["swap_waits"].is_null(), "the sink that lags is no reason to wait");
        host.writes("rows", || (telemetry::sqlite_count(&rows, "telemetry") > before + 20).then_some(()));
    }
    let sent: Vec<Sent> = publishers.into_iter().map(Publisher::finish).collect();
    host.kill();
    host.launch();
    host.wait_serving();
    drop(away);
    for path in [&rows, &alerts] {
        telemetry::read_behind_steps(&host, path, host.end());
    }
    let mut all = telemetry::sqlite_rows(&rows, "telemetry");
    all.extend(telemetry::sqlite_rows(&alerts, "alerts"));
    all.sort();
    telemetry::assert_rows(&all, &sent, Repeats::None);
}

fn status(host: &Host) -> serde_json::Value {
    let (_, status) = http::get(host.admin(), "/api/status").expect("it answers");
    let status: serde_json::Value = serde_json::from_str(&status).expect("JSON");
    status["pipelines"][0].clone()
}

/// Writes another config for the step, and waits until it runs, or waits for a sink.
fn change_route(host: &Host, config: String) {
    let generation = |status: &serde_json::Value| status["steps_generation"].as_u64();
    let before = generation(&status(host));
    host.folder.write("plugins/30-route.yaml", config);
    host.writes("the new steps are taken", || {
        let status = status(host);
        (generation(&status) > before || status["swap_waits"].is_string()).then_some(())
    });
}

#[test]
fn removing_a_plugin_file_holds_the_pipeline_until_it_is_said() {
    let mut host = Host::prepare("removed", &telemetry::config(&telemetry::sqlite_sink()));
    host.drop_plugin("10-normalize.wasm", prebuilt("normalize"));
    host.run();
    let rows = host.folder.join("data/telemetry.db");
    let publishers = devices(&host);
    host.writes("rows", || (telemetry::sqlite_count(&rows, "telemetry") > 100).then_some(()));

    std::fs::remove_file(host.folder.join("plugins/10-normalize.wasm")).expect("it was there");
    host.says("plugin remove normalize --config headworks.yaml");
    // Acks go on while the pipeline holds.
    for publisher in &publishers {
        publisher.await_acked(publisher.acked() + 25);
    }
    let sent: Vec<Sent> = publishers.into_iter().map(Publisher::finish).collect();

    host.drop_plugin("10-normalize.wasm", prebuilt("normalize"));
    telemetry::written_to_sqlite(&host, &rows);
    telemetry::assert_rows(&telemetry::sqlite_rows(&rows, "telemetry"), &sent, Repeats::None);
}

/// A filter that is missing would leak: nothing goes through, and no device waits for it.
#[test]
fn devices_are_acknowledged_while_a_plugin_of_the_start_does_not_run() {
    let mut host = Host::prepare("unready", &telemetry::config(&telemetry::sqlite_sink()));
    host.drop_bytes("10-normalize.wasm", b"half a copy");
    host.launch();
    host.wait_serving();
    let publishers = devices(&host);
    for publisher in &publishers {
        publisher.await_acked(25);
    }
    host.says("plugin remove normalize --config headworks.yaml");
    let sent: Vec<Sent> = publishers.into_iter().map(Publisher::finish).collect();

    host.drop_plugin("10-normalize.wasm", prebuilt("normalize"));
    let rows = host.folder.join("data/telemetry.db");
    telemetry::written_to_sqlite(&host, &rows);
    telemetry::assert_rows(&telemetry::sqlite_rows(&rows, "telemetry"), &sent, Repeats::None);
}

fn devices(host: &Host) -> Vec<Publisher> {
    let address = Address::new(host.mqtt());
    (0..4)
        .map(|number| {
            let plan = Plan { pause: Duration::from_millis(5), ..Plan::new(number, 1) };
            Publisher::start(plan, address.clone())
        })
        .collect()
}

#[test]
fn a_host_whose_binary_was_replaced_still_takes_new_plugins() {
    let mut host = Host::prepare("upgraded", &telemetry::config(&telemetry::sqlite_sink()));
    let binary = host.folder.join("headworks");
    std::fs::copy(headworks_tests::host::binary(), &binary).expect("our folder");
    host.launch_as(&binary);
    host.wait_ready();
    // As a package manager does: the next version takes the name, not the file.
    let next = host.folder.write("headworks.new", "not the version that runs");
    std::fs::rename(next, &binary).expect("our folder");
    host.drop_plugin("10-normalize.wasm", prebuilt("normalize"));
    host.says("plugin loaded file=\"10-normalize.wasm\"");
}
