//! What `headworks status` tells a person of while the log alone would say it, or nothing would.

use std::io::{BufRead, BufReader};
use std::time::Duration;

use headworks_tests::certificates::Authority;
use headworks_tests::host::{Host, fresh, prebuilt};
use headworks_tests::mqtt::{Connection, Version};
use headworks_tests::packets::{Client, Connect, Publish};
use headworks_tests::process::run;
use headworks_tests::{http, mosquitto, telemetry};
use rustix::process::Signal;
use serde_json::Value;

/// Exit code and problems of `headworks status`.
fn status(host: &Host) -> (Option<i32>, Vec<Value>) {
    let args = ["status", "--config", "headworks.yaml", "--format", "json"];
    let output = host.command(&args).output().expect("headworks runs");
    let status: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    (output.status.code(), status["problems"].as_array().expect("a list").clone())
}

fn problem(host: &Host, kind: &str) -> Value {
    let (code, problems) = status(host);
    let found = problems.iter().find(|problem| problem["kind"] == kind);
    let found = found.unwrap_or_else(|| panic!("no {kind} in {problems:?}"));
    assert_eq!(code, Some(1), "{problems:?}");
    found.clone()
}

fn publish(host: &Host, topic: &str, payload: &str) {
    run(mosquitto::publish(host.mqtt()).args(["-q", "1", "-t", topic, "-m", payload]));
}

#[test]
fn devices_that_are_turned_away_are_a_problem_with_its_cause_and_the_last_one() {
    let mqtt = "mqtt: { listeners: [ { bind: 127.0.0.1:0 } ], sessions_max: 1 }";
    let mut host = Host::prepare_with("problems-turned-away", mqtt, "");
    host.run();
    let open = |client: &str| Connection::open(host.mqtt(), Version::V311, client, false);
    let _only = open("pump-1").expect("there is room for one");
    for client in ["pump-2", "pump-3"] {
        open(client).expect_err("there is none for another");
    }
    let refused = problem(&host, "refused");
    assert_eq!(refused["part"], "connections (sessions_max)");
    let cause = refused["cause"].as_str().expect("a text");
    assert!(cause.starts_with("2 connections were refused") && cause.contains("client pump-3 at"), "{cause}");
    let advice = refused["advice"].as_str().expect("a text");
    let list = "`headworks clients refused --config headworks.yaml` lists the clients";
    assert!(advice.contains("mqtt.sessions_max") && advice.contains(list), "{advice}");
}

#[test]
fn two_devices_with_one_client_id_are_a_problem_that_names_it_and_a_device_that_reconnects_is_none() {
    let mut host = Host::prepare("problems-takeovers", "");
    host.run();
    let open = |client: &str| Client::clean(host.mqtt(), Version::V311, client);
    let take_over = |client: &str, times: u32| {
        let mut older = open(client);
        for _ in 0..times {
            let newer = open(client);
            std::mem::replace(&mut older, newer).closed();
        }
        older
    };
    let _pump = take_over("pump-1", 2);
    let (_, problems) = status(&host);
    assert!(problems.iter().all(|problem| problem["kind"] != "takeovers"), "{problems:?}");
    let _meter = take_over("meter-7", 4);
    let takeovers = problem(&host, "takeovers");
    let cause = takeovers["cause"].as_str().expect("a text");
    let begin = "connections with client id \"meter-7\" ended each other 4 times";
    assert!(cause.starts_with(begin) && cause.contains("client meter-7 at 127.0.0.1:"), "{cause}");
    let advice = takeovers["advice"].as_str().expect("a text");
    assert!(advice.contains("`headworks clients show meter-7 --config headworks.yaml`"), "{advice}");
    for (client, times) in [("meter-7", 4), ("pump-1", 2)] {
        let shown = host.cli(&["clients", "show", client]);
        assert!(shown.contains(&format!("{times} times lately")), "{shown}");
    }
}

#[test]
fn messages_dropped_for_want_of_memory_of_all_queues_are_a_problem_of_their_own() {
    let mqtt = "mqtt: { listeners: [ { bind: 127.0.0.1:0 } ], queues_bytes_max: 64KiB }";
    let mut host = Host::prepare_with("problems-queues", mqtt, "");
    host.run();
    let mut lamp = Client::open(host.mqtt(), &Connect::resuming(Version::V5, "lamp-1"));
    lamp.subscribe("lamps/#", 1);
    lamp.leave();
    let mut switch = Client::clean(host.mqtt(), Version::V5, "switch");
    for number in 1..=900 {
        switch.publish_through(&Publish::new("lamps/1", 1, number, "on"));
    }
    host.says("messages dropped that waited for a session: client lamp-1: its queue is full, or");
    let dropped = problem(&host, "dropped");
    assert_eq!(dropped["part"], "subscribers (queues_full)");
    let advice = dropped["advice"].as_str().expect("a text");
    let list = "`headworks clients list --sort queued --config headworks.yaml` shows who holds the most";
    assert!(advice.contains("mqtt.queues_bytes_max") && advice.starts_with(list), "{advice}");
    assert_eq!(host.metric("headworks_mqtt_dropped_total", &[("cause", "queue_full")]), 0.0);
}

#[test]
fn a_changed_file_that_cannot_be_used_is_a_problem_until_it_can() {
    let mut host = Host::prepare("problems-file", "devices: { file: devices.yaml }\n");
    host.folder.write("devices.yaml", "a: { site: one }\n");
    host.run();
    host.folder.write("devices.yaml", "a: [\n");
    host.says("devices.yaml: line");
    let refused = problem(&host, "reload_refused");
    assert_eq!(refused["part"], "file devices.yaml");
    let advice = refused["advice"].as_str().expect("a text");
    assert!(advice.contains("`headworks validate --config headworks.yaml`"), "{advice}");
    host.folder.write("devices.yaml", "a: { site: two }\n");
    host.says("the table of devices has changed");
    let (_, problems) = status(&host);
    assert!(problems.iter().all(|problem| problem["kind"] != "reload_refused"), "{problems:?}");
}

#[test]
fn a_certificate_that_is_refused_is_a_problem_until_a_good_one_comes() {
    let mqtt = "mqtt: { listeners: [ { bind: 127.0.0.1:0 }, \
                { bind: 127.0.0.1:0, tls: { cert: server.pem, key: server.key } } ] }";
    let mut host = Host::prepare_with("problems-certificate", mqtt, "");
    let ca = Authority::new(&host.folder);
    ca.sign(&host.folder, "server", 1);
    host.run();
    ca.sign_until(&host.folder, "server", 2, 2021);
    host.says("has expired at 2021-01-01");
    let refused = problem(&host, "reload_refused");
    assert_eq!(refused["part"], "file server.pem");
    let text = |name: &str| refused[name].as_str().expect("a text").to_owned();
    assert!(text("cause").contains("has expired at 2021-01-01"), "{refused}");
    assert!(text("cause").contains("the previous contents stay in use"), "{refused}");
    assert!(text("advice").contains("`headworks validate --config headworks.yaml`"), "{refused}");
    let said = host.log().len();
    ca.sign(&host.folder, "server", 3);
    host.says_past(said, "new certificates, used for new connections");
    let (_, problems) = status(&host);
    assert!(problems.iter().all(|problem| problem["kind"] != "reload_refused"), "{problems:?}");
}

#[test]
fn messages_that_go_on_without_a_step_are_told() {
    let config = "pipelines: { telemetry: { steps: [ { plugin: hostile, on_failure: pass } ] } }\n";
    let mut host = Host::prepare("problems-skipped", config);
    host.drop_plugin("50-hostile.wasm", fresh("hostile"));
    host.run();
    // The first faults make dead letters.
    for _ in 0..5 {
        publish(&host, "acme/site-01/temperature/bad/reading", r#"{"do":"trap"}"#);
    }
    host.says("the message goes on without the step (on_failure: pass)");
    let skipped = problem(&host, "skipped");
    assert_eq!(skipped["part"], "step telemetry/hostile");
    assert_eq!(problem(&host, "faults")["part"], "step telemetry/hostile");
}

/// Lines of the log that warn and name this.
fn warnings(host: &Host, name: &str) -> Vec<String> {
    let log = host.log();
    log.lines().filter(|line| line.contains("WARN") && line.contains(name)).map(str::to_owned).collect()
}

#[test]
fn a_plugin_that_does_not_run_is_told_in_one_line_with_what_it_holds() {
    let pipelines =
        "pipelines: { telemetry: {}, again: { from: telemetry, routes: { default: telemetry } } }\n";
    for (number, name) in ["10-normalize.wasm", "normalize!.wasm"].into_iter().enumerate() {
        let mut host = Host::prepare(&format!("problems-line-{number}"), pipelines);
        host.drop_bytes(name, b"half a copy");
        host.launch();
        host.wait_serving();
        host.says("pipeline holds");
        let listed = host.cli(&["plugin", "list"]);
        assert!(listed.contains(name), "{listed}");
        host.stop();
        let lines = warnings(&host, name);
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(lines[0].contains("pipeline holds") && lines[0].contains("again, telemetry"), "{lines:?}");
    }
}

#[test]
fn a_version_that_is_not_used_is_told_in_one_line() {
    let mut host = Host::prepare("problems-version", "");
    host.drop_plugin("10-normalize.wasm", prebuilt("normalize"));
    host.run();
    host.drop_bytes("10-normalize.wasm", b"half a copy");
    host.says("plugin file 10-normalize.wasm is not used");
    host.stop();
    let lines = warnings(&host, "10-normalize.wasm");
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("the last good version stays"), "{lines:?}");
}

#[test]
fn a_fault_of_a_plugin_is_told_in_one_line_with_its_file() {
    let mut host =
        Host::prepare("problems-fault", "pipelines: { telemetry: { steps: [ { plugin: hostile } ] } }\n");
    host.drop_plugin("50-hostile.wasm", fresh("hostile"));
    host.run();
    publish(&host, "acme/site-01/temperature/bad/reading", r#"{"do":"trap"}"#);
    host.says("fault in 50-hostile.wasm");
    let summary = || host.cli(&["dead-letters", "summary"]);
    host.writes("a dead letter", || (!summary().contains("no dead letters")).then_some(()));
    host.stop();
    let lines = warnings(&host, "telemetry/hostile");
    assert_eq!(lines.len(), 1, "{lines:?}");
}

#[test]
fn a_sink_that_does_not_work_is_told_in_one_line() {
    let sinks = "sinks: { warehouse: { type: sqlite, path: headworks.yaml } }\n\
                 pipelines: { telemetry: { routes: { default: warehouse } } }\n";
    let mut host = Host::prepare("problems-sink", sinks);
    host.launch();
    host.wait_serving();
    host.says(
        "sink \"warehouse\" of pipeline \"telemetry\": cannot write until a person acts: headworks.yaml: ",
    );
    let retrying = problem(&host, "retrying");
    assert_eq!(retrying["part"], "sink telemetry/warehouse");
    assert!(
        retrying["cause"].as_str().is_some_and(|cause| cause.starts_with("headworks.yaml: ")),
        "{retrying}"
    );
    host.stop();
    let lines = warnings(&host, "warehouse");
    assert_eq!(lines.len(), 1, "{lines:?}");
}

#[test]
fn rows_that_a_trigger_leaves_out_are_told() {
    let mut host = Host::prepare("problems-trigger", "");
    host.drop_plugin("10-normalize.wasm", prebuilt("normalize"));
    host.run();
    let file = host.folder.join("data/telemetry.db");
    let send = |device: &str| {
        let (topic, payload) = telemetry::message(device, 7);
        publish(&host, &topic, &payload);
        telemetry::written_to_sqlite(&host, &file);
    };
    send("sensor-1");
    let trigger = "CREATE TRIGGER leaves_out BEFORE INSERT ON telemetry WHEN NEW.device_id = 'sensor-2' \
                   BEGIN SELECT RAISE(IGNORE); END";
    rusqlite::Connection::open(&file).expect("a file").execute_batch(trigger).expect("a trigger");
    send("sensor-2");
    // Once its row is there, what the commit before it left out is counted.
    send("sensor-3");
    let ignored = problem(&host, "ignored");
    assert_eq!(ignored["part"], "sink telemetry/telemetry");
    assert!(
        ignored["cause"]
            .as_str()
            .is_some_and(|cause| cause.starts_with("1 row was sent that the database did not")),
        "{ignored}"
    );
}

#[test]
fn rows_that_a_view_writes_into_other_tables_are_no_problem() {
    let config = "sinks: { w: { type: sqlite, path: data/telemetry.db, create: false } }\n";
    let mut host = Host::prepare("problems-view", config);
    host.drop_plugin("10-normalize.wasm", prebuilt("normalize"));
    let file = host.folder.join("data/telemetry.db");
    std::fs::create_dir_all(host.folder.join("data")).expect("our folder");
    let view = "CREATE TABLE readings (time, device_id, location, metric, value);
                CREATE VIEW telemetry AS SELECT * FROM readings;
                CREATE TRIGGER t INSTEAD OF INSERT ON telemetry BEGIN INSERT INTO readings
                VALUES (NEW.time, NEW.device_id, NEW.location, NEW.metric, NEW.value); END";
    rusqlite::Connection::open(&file).expect("a file").execute_batch(view).expect("a view");
    host.run();
    // Once the second row is there, what the commit before it wrote is counted.
    for device in ["sensor-1", "sensor-2"] {
        let (topic, payload) = telemetry::message(device, 7);
        publish(&host, &topic, &payload);
        telemetry::written_to_sqlite(&host, &file);
    }
    assert_eq!(telemetry::sqlite_count(&file, "readings"), 2);
    let (_, problems) = status(&host);
    assert!(problems.iter().all(|problem| problem["kind"] != "ignored"), "{problems:?}");
}

/// The last good version runs: whoever takes the file away makes its pipeline hold.
#[test]
fn the_advice_about_a_plugin_names_the_file_that_is_wrong() {
    let mut host = Host::prepare("problems-plugin", "");
    host.drop_plugin("10-normalize.wasm", prebuilt("normalize"));
    host.drop_plugin("20-route.wasm", prebuilt("route"));
    host.run();
    host.drop_bytes("10-normalize.wasm", b"no plugin");
    host.folder.write("plugins/20-route.yaml", "rulez: 3\n");
    host.says("plugin file 10-normalize.wasm is not used");
    host.says("20-route.yaml:1: rulez");
    let (_, problems) = status(&host);
    let of = |part: &str| {
        let found = problems.iter().find(|problem| problem["part"] == part);
        let found = found.unwrap_or_else(|| panic!("no {part} in {problems:?}"));
        let text = |name: &str| found[name].as_str().expect("a text").to_owned();
        (text("cause"), text("advice"))
    };
    for (part, file, inspected) in [
        ("plugin 10-normalize.wasm", "10-normalize.wasm", true),
        ("plugin 20-route.wasm", "20-route.yaml", false),
    ] {
        let (cause, advice) = of(part);
        assert!(cause.ends_with("the last good version runs"), "{cause}");
        assert!(advice.contains(file) && !advice.contains("plugin remove"), "{advice}");
        assert_eq!(advice.contains("plugin inspect"), inspected, "{advice}");
    }
    let list = host.cli(&["plugin", "list"]);
    assert!(list.contains("not used, the last good version runs: "), "{list}");
}

#[test]
fn a_data_folder_that_is_moved_under_the_host_is_told_by_host_and_commands_until_it_is_back() {
    let host = Host::start("problems-moved-folder", "");
    let [data, away] = ["data", "away"].map(|name| host.folder.join(name));
    std::fs::rename(&data, &away).expect("our folder");
    host.says("the data folder was moved, removed or replaced");
    let moved = problem(&host, "data_folder");
    assert_eq!(moved["part"], format!("data folder {}", data.display()));
    let list = host.command(&["clients", "list", "--config", "headworks.yaml"]).output().expect("it runs");
    let said = String::from_utf8_lossy(&list.stderr);
    assert!(!list.status.success() && said.contains("was moved or removed meanwhile"), "{said}");
    std::fs::rename(&away, &data).expect("our folder");
    host.says(&format!("the data folder {} is back", data.display()));
    let (code, problems) = status(&host);
    assert_eq!((code, problems), (Some(0), vec![]));
    host.cli(&["clients", "list"]);
}

#[test]
fn a_stream_whose_folder_is_moved_under_the_host_makes_it_unready_until_it_is_back() {
    let host = Host::start("problems-moved-stream", "");
    for folder in ["streams/telemetry", "broker", "dead-letters"] {
        let [at, away] = [format!("data/{folder}"), "away".to_owned()].map(|name| host.folder.join(name));
        let ready = || http::get(host.admin(), "/readyz").expect("the host serves it");
        assert_eq!(ready().0, 200);
        std::fs::rename(&at, &away).expect("our folder");
        host.says(&format!("part=\"folder {}\"", at.display()));
        assert_eq!(problem(&host, "data_folder")["part"], format!("folder {}", at.display()));
        let (code, body) = ready();
        assert!(code == 503 && body.contains(&at.display().to_string()), "{code} {body}");
        std::fs::rename(&away, &at).expect("our folder");
        host.says(&format!("the folder {} is back", at.display()));
        assert_eq!(status(&host), (Some(0), vec![]));
    }
}

#[test]
fn a_start_without_the_folder_of_a_stream_says_that_another_log_was_there_and_the_next_does_not() {
    let mut host = Host::prepare("problems-other-log", "");
    let others = |host: &Host| -> Vec<String> {
        let problems = status(host).1.into_iter().filter(|problem| problem["kind"] == "other_log");
        problems.map(|problem| problem["part"].as_str().expect("a text").to_owned()).collect()
    };
    host.run();
    assert_eq!(others(&host), [""; 0]);
    publish(&host, "acme/site/power/pump-1/reading", r#"{"value": 1}"#);
    assert!(host.stop().success());
    std::fs::rename(host.folder.join("data/streams/telemetry"), host.folder.join("away"))
        .expect("our folder");
    let begin = host.log().len();
    host.run();
    host.says_past(begin, "headworks_positions has positions of log");
    let told = others(&host);
    assert!(told.len() == 2 && told.contains(&"stream telemetry".to_owned()), "{told:?}");
    assert!(told.iter().any(|part| part.starts_with("sink ")), "{told:?}");
    assert!(host.stop().success());
    host.run();
    assert_eq!(others(&host), [""; 0]);
}

#[test]
fn a_start_without_the_folder_of_the_dead_letters_says_so_and_the_next_does_not() {
    let mut host = Host::prepare("problems-lost-letters", "");
    let others = |host: &Host| -> Vec<String> {
        let problems = status(host).1.into_iter().filter(|problem| problem["kind"] == "other_log");
        problems.map(|problem| problem["part"].as_str().expect("a text").to_owned()).collect()
    };
    host.run();
    assert_eq!(others(&host), [""; 0]);
    assert!(host.stop().success());
    std::fs::rename(host.folder.join("data/dead-letters"), host.folder.join("away")).expect("our folder");
    host.run();
    assert_eq!(others(&host), ["stream dead-letters"]);
    assert!(host.stop().success());
    host.run();
    assert_eq!(others(&host), [""; 0]);
}

#[test]
fn a_host_that_ends_and_lets_no_client_in_is_not_ready() {
    let config = telemetry::config(&telemetry::sqlite_sink());
    let config = config.replace("from: telemetry,", "from: telemetry, drain_max: 10m,");
    let config = config.replace("type: sqlite,", "type: sqlite, busy_timeout: 100ms,");
    let mut host = Host::start("problems-unreached", &config);
    let admin = host.admin();
    let ready = || http::get(admin, "/readyz").expect("the host serves it");
    assert_eq!(ready().0, 200);
    // The host cannot end before the row is written that its pipeline has in flight.
    let database = rusqlite::Connection::open(host.folder.join("data/telemetry.db")).expect("the sink's");
    database.busy_timeout(Duration::from_secs(20)).expect("a timeout");
    database.execute_batch("BEGIN EXCLUSIVE").expect("the host does not write now");
    let (topic, payload) = telemetry::message("sensor-1", 7);
    publish(&host, &topic, &payload);
    host.says("database is locked");
    let mut meter = Client::clean(host.mqtt(), Version::V5, "meter-1");
    host.process().signal(Signal::TERM);
    meter.disconnected();
    let (code, body) = ready();
    assert!(code == 503 && body.contains("the host ends"), "{code} {body}");
    database.execute_batch("ROLLBACK").expect("the host writes again");
    assert!(host.process().wait(Duration::from_secs(60)).success());
}

#[test]
fn a_reader_of_the_log_that_stops_holds_up_nobody_and_is_told_that_it_missed_lines() {
    let mut host = Host::prepare("problems-log-reader", "").env("RUST_LOG", "trace");
    let (reader, writer) = std::io::pipe().expect("a pipe");
    host.launch_logging_to(writer);
    host.wait_serving();
    // Each answer is some lines of this log.
    while host.metric("headworks_log_dropped_lines_total", &[]) == 0.0 {}
    publish(&host, "acme/site/power/pump-1/reading", "{}");
    let mut lines = BufReader::new(reader).lines().map(|line| line.expect("text"));
    let told = lines.find(|line| line.contains("WARN log lines were dropped"));
    assert!(told.is_some_and(|line| line.contains(" lines=")), "the host goes on and tells it");
    // Nobody reads now; nor is the end held up.
    drop(lines);
    assert!(host.stop().success());
}

#[test]
fn what_retention_takes_from_a_sink_that_is_down_is_told_at_once() {
    let config = "streams: { telemetry: { segment_bytes: 1MiB, retention: { max_bytes: 4MiB } } }\n\
                  sinks: { warehouse: { type: postgres, url: \"postgres://writer@127.0.0.1:1/iot\", \
                  on_lag: detach } }\n";
    let mut host = Host::prepare("problems-detached", config);
    host.launch();
    host.wait_serving();
    let payload = "x".repeat(100_000);
    let mut meter = Client::clean(host.mqtt(), Version::V5, "meter-9");
    for id in 1..=100 {
        meter.publish_through(&Publish::new("acme/site/power/meter-9/reading", 1, id, &payload));
    }
    host.says(
        "sink \"warehouse\" of pipeline \"telemetry\": retention removed messages before the sink had them",
    );
    let gap = problem(&host, "gap");
    assert_eq!(gap["part"], "pipeline telemetry");
    assert!(gap["cause"].as_str().is_some_and(|cause| cause.contains("removed by retention")), "{gap}");
    let at_stake = &problem(&host, "retrying")["at_stake"];
    let gone = at_stake["gone_messages"].as_u64().expect("a number");
    assert_eq!((gone > 0, at_stake["messages"].as_u64()), (true, Some(100 - gone)), "{at_stake}");
}

#[test]
fn a_sqlite_file_that_is_moved_under_the_host_holds_its_sink_until_it_is_back() {
    let backoff = "pipelines: { telemetry: { sink_backoff: { max: 100ms } } }\n";
    let mut host = Host::prepare("problems-moved-file", backoff);
    host.drop_plugin("10-normalize.wasm", prebuilt("normalize"));
    host.run();
    let [file, away] = ["data/telemetry.db", "data/old.db"].map(|name| host.folder.join(name));
    let send = |device: &str| {
        let (topic, payload) = telemetry::message(device, 7);
        publish(&host, &topic, &payload);
    };
    send("sensor-1");
    telemetry::written_to_sqlite(&host, &file);
    std::fs::rename(&file, &away).expect("our folder");
    send("sensor-2");
    host.says("the file is gone: it was moved or removed while the host runs");
    let retrying = problem(&host, "retrying");
    assert_eq!(retrying["part"], "sink telemetry/telemetry");
    assert!(retrying["cause"].as_str().is_some_and(|cause| cause.contains("Put it back")), "{retrying}");
    assert!(!file.exists(), "no new file hides it");
    std::fs::rename(&away, &file).expect("our folder");
    host.says("the sink works again");
    telemetry::written_to_sqlite(&host, &file);
    let rows = telemetry::sqlite_rows(&file, "telemetry");
    assert_eq!(rows.len(), 2, "{rows:?}");
}

#[test]
fn a_stream_that_the_config_does_not_have_any_more_is_told_until_its_folder_is_removed() {
    let config = "streams: { telemetry: { topics: [ 'acme/#' ] }, alarms: { topics: [ 'alarms/#' ] } }\n\
                  pipelines: { telemetry: { routes: { default: telemetry } }, alarms: { routes: { default: down } } }\n\
                  sinks: { telemetry: { type: sqlite }, \
                  down: { type: postgres, url: \"postgres://writer@127.0.0.1:1/iot\" } }\n";
    let mut host = Host::prepare("problems-unconfigured", config);
    host.launch();
    host.wait_serving();
    for number in 1..=3 {
        publish(&host, "alarms/site-01/door/north/opened", &format!("{number}"));
    }
    host.stop();
    let with = std::fs::read_to_string(host.folder.join("headworks.yaml")).expect("a config");
    host.folder
        .write("headworks.yaml", with.replace(config, "streams: { telemetry: { topics: [ 'acme/#' ] } }\n"));
    let said = host.log().len();
    host.run();
    let folder = host.folder.join("data/streams/alarms");
    host.says_past(said, "the config has no stream \"alarms\"");
    let unconfigured = problem(&host, "unconfigured");
    assert_eq!(unconfigured["part"], "stream alarms");
    assert_eq!(unconfigured["at_stake"]["messages"], 3);
    let text = |name: &str| unconfigured[name].as_str().expect("a text").to_owned();
    let holds = format!("{} holds 3 messages, of which sinks lacked 3", folder.display());
    assert!(text("cause").contains(&holds), "{unconfigured}");
    assert!(text("advice").contains("put streams.alarms and its pipeline back"), "{unconfigured}");
    let list = host.cli(&["streams", "list"]);
    assert!(
        list.contains("alarms") && list.contains("messages: 3") && list.contains("not in the config"),
        "{list}"
    );
    std::fs::remove_dir_all(&folder).expect("our folder");
    while status(&host).1.iter().any(|problem| problem["kind"] == "unconfigured") {}
    assert!(!host.cli(&["streams", "list"]).contains("alarms"));
}
