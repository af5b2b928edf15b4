//! The command line against a running host.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use headworks_tests::events::Events;
use headworks_tests::folder::root;
use headworks_tests::host::{Host, binary, fresh, prebuilt};
use headworks_tests::mqtt::Version;
use headworks_tests::packets::{Client, Connect, Publish};
use headworks_tests::process::{Lines, Process, interruptible, run};
use headworks_tests::{http, mosquitto, postgres, telemetry};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};

fn host(name: &str) -> Host {
    let mut host = Host::prepare(name, "");
    host.drop_plugin("10-normalize.wasm", prebuilt("normalize"));
    host.run();
    host
}

fn publish(host: &Host, topic: &str, payload: &str) {
    run(mosquitto::publish(host.mqtt()).args(["-q", "1", "-t", topic, "-m", payload]));
}

/// More than are listed, and than the host lists at a time.
#[test]
fn a_list_of_clients_says_how_to_see_those_that_it_leaves_out() {
    let host = host("cli-many-clients");
    let name = |n: usize| format!("{}-{n:04}", if n < 3 { "pump" } else { "edge" });
    for n in 0..1_003 {
        // Its session stays.
        Client::open(host.mqtt(), &Connect { clean: false, ..Connect::new(Version::V311, &name(n)) });
    }
    let ids = |list: &[serde_json::Value]| -> Vec<String> {
        list.iter().map(|client| client["client_id"].as_str().unwrap().to_owned()).collect()
    };
    let mut all: Vec<String> = (0..1_003).map(name).collect();
    all.sort_unstable();
    let text = host.cli(&["clients", "list"]);
    assert_eq!(text.matches("edge-").count(), 100);
    assert!(text.contains("\n903 more: --max 1003 shows all, a PREFIX"), "{text}");
    let text = host.cli(&["clients", "list", "--max", "1003"]);
    assert!(!text.contains(" more: ") && text.matches("edge-").count() == 1_000, "{text}");
    assert!(!host.cli(&["clients", "list", "pump"]).contains(" more: "));
    assert_eq!(ids(&host.cli_json(&["clients", "list"])), all, "JSON is not cut");
    assert_eq!(ids(&host.cli_json(&["clients", "list", "--max", "1002"])), all[..1_002]);
    let mut by_delivered = ids(&host.cli_json(&["clients", "list", "--sort", "delivered"]));
    by_delivered.sort_unstable();
    assert_eq!(by_delivered, all);
    assert_eq!(host.cli_json(&["clients", "list", "--sort", "missed", "--max", "3"]).len(), 3);
}

#[test]
fn a_host_may_open_as_many_files_as_its_hard_limit_lets_it() {
    let limit = getrlimit(Resource::Nofile);
    // As many service managers start it: the soft limit below the hard one.
    setrlimit(Resource::Nofile, Rlimit { current: Some(1_000), ..limit }).unwrap();
    let mut host = host("cli-files");
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", host.process().id())).unwrap();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    let values: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(values[0], values[1], "{line}");
    setrlimit(Resource::Nofile, limit).unwrap();
}

#[test]
fn connections_that_open_files_leave_no_room_for_are_told_at_the_start() {
    let mut host = Host::prepare("cli-few-files", "");
    let script = format!("#!/bin/sh\nulimit -n 600\nexec {} \"$@\"\n", binary().display());
    let script = host.folder.write("few-files", script);
    std::fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).expect("our file");
    host.launch_as(&script);
    host.wait_serving();
    host.says("the limit on open files, 600, leaves room for");
}

#[test]
fn streams_are_listed_and_shown_while_the_host_runs() {
    let host = host("cli-streams");
    let (topic, payload) = telemetry::message("sensor-1", 7);
    publish(&host, &topic, &payload);
    let list = host.cli(&["streams", "list"]);
    assert!(list.contains("telemetry"), "{list}");
    let tail = host.cli(&["streams", "tail", "telemetry", "--from", "start", "--max", "1"]);
    assert!(tail.contains(&topic) && tail.contains("sensor-1"), "{tail}");
}

#[test]
fn a_tail_past_the_end_says_where_the_stream_ends() {
    let host = host("cli-tail-past");
    let (topic, payload) = telemetry::message("sensor-1", 7);
    publish(&host, &topic, &payload);
    let tail = |from: &str| {
        let args = ["streams", "tail", "telemetry", "--from", from, "--config", "headworks.yaml"];
        let output = host.command(&args).output().expect("headworks runs");
        assert!(output.status.success(), "{output:?}");
        let said = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
        (said(output.stdout), said(output.stderr))
    };
    // What another process can prove to be durable may lag for a moment.
    host.writes("the message", || tail("0").0.contains(&topic).then_some(()));
    for from in ["1", "99"] {
        let told = format!("headworks: stream telemetry ends before offset {from}, the next message has 1\n");
        assert_eq!(tail(from), (String::new(), told));
    }
    let (shown, told) = tail("0");
    assert!(shown.contains(&topic) && told.is_empty(), "{shown}{told}");
}

#[test]
fn a_data_folder_that_is_not_there_is_no_empty_one() {
    let host = Host::prepare("cli-nothing", "");
    for args in [&["dead-letters", "list"][..], &["streams", "list"], &["streams", "tail"]] {
        let said = failed(host.command(&[args, &["--config", "headworks.yaml"]].concat()));
        let folder = host.folder.join("data").display().to_string();
        assert!(said.contains(&format!("no data folder {folder}")) && said.contains("--config"), "{said}");
    }
}

#[test]
fn a_dead_letter_is_listed_shown_and_sent_again() {
    let host = host("cli-letters");
    publish(&host, "acme/site-01/temperature/sensor-2/reading", "not json");
    let letters = host.writes("a dead letter", || {
        let letters = host.cli_json(&["dead-letters", "list"]);
        (!letters.is_empty()).then_some(letters)
    });
    let id = letters[0]["id"].to_string();
    let shown = host.cli(&["dead-letters", "show", &id]);
    assert!(shown.contains("not json") && shown.contains("sensor-2"), "{shown}");
    let sinks = letters[0]["refused"]["sinks"].as_array().expect("a step's letter names its sinks");
    assert!(shown.contains("for sinks") && shown.contains(sinks[0].as_str().unwrap()), "{shown}");
    let (_, _, status) = status(&host);
    let problem = &problems(&status)[0];
    assert_eq!(problem["kind"], "dead_letters", "{status}");
    assert_eq!(problem["at_stake"]["messages"], 1, "{status}");
    let summary = host.cli(&["dead-letters", "summary"]);
    assert!(summary.starts_with("1  step normalize of pipeline telemetry\n"), "{summary}");
    for args in [&["dead-letters", "summary"][..], &["dead-letters", "list"], &["streams", "list"]] {
        let text = host.cli(args);
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    }
    for (option, name) in [("--sink", "typo"), ("--step", "typo"), ("--pipeline", "typo")] {
        for command in ["list", "summary"] {
            let said =
                failed(host.command(&["dead-letters", command, option, name, "--config", "headworks.yaml"]));
            assert!(said.contains("\"typo\", known are"), "{said}");
        }
    }
    host.cli(&["dead-letters", "list", "--step", "normalize"]);
    let said = failed(host.command(&["dead-letters", "redrive", "99", "--config", "headworks.yaml"]));
    assert!(said.contains("nothing to send"), "{said}");
    let said = failed(host.command(&["dead-letters", "show", "x"]));
    assert!(said.contains("dead-letters list"), "{said}");
    // It is refused again, by the same step: it is the same letter.
    let redrive = ["dead-letters", "redrive", &id, "--config", "headworks.yaml"];
    let said = failed(host.command(&redrive));
    assert!(said.contains("all were refused again"), "{said}");
    host.writes("the letter shows as refused again", || {
        let shown = host.cli(&["dead-letters", "show", &id]);
        shown
            .lines()
            .any(|line| line.starts_with("sent again") && line.ends_with("refused again"))
            .then_some(())
    });
    let listed = host.cli_json(&["dead-letters", "list"]);
    assert_eq!((listed.len(), &listed[0]["id"]), (1, &letters[0]["id"]));
    let refused =
        |letter: &serde_json::Value| (letter["refused"]["again"].clone(), letter["refused"]["at"].clone());
    assert_eq!(refused(&listed[0]), (1.into(), letters[0]["refused"]["at"].clone()), "as at first");
    let text = host.cli(&["dead-letters", "list"]);
    assert!(text.contains("refused again once"), "{text}");
    let args = ["dead-letters", "redrive", "--all", "--from-step", "typo", "--config", "headworks.yaml"];
    let said = failed(host.command(&args));
    assert!(said.contains("no step \"typo\", known are normalize, ") && said.contains(", routes"), "{said}");
}

#[test]
fn clients_are_listed_shown_and_sent_away() {
    let host = host("cli-clients");
    assert_eq!(host.cli(&["clients", "list"]).trim(), "no clients");
    let mut command = Command::new("mosquitto_sub");
    command.args(mosquitto::subscribe(host.mqtt()).get_args());
    command.args(["-d", "-i", "press-7", "-c", "-q", "1", "-u", "ann", "-t", "acme/#", "-t", "$share/g/b/+"]);
    command.args(["--will-topic", "gone", "--will-payload", "press-7 is gone"]);
    let mut client = Lines::of(&mut command);
    client.find("Subscribed");
    let shown = &host.cli_json(&["clients", "list", "press"])[0];
    assert_eq!(shown["subscriptions"], 2);
    // Nobody has checked the user name that it gave.
    assert_eq!(
        (&shown["client_id"], &shown["connection"]["user"]),
        (&"press-7".into(), &serde_json::Value::Null)
    );
    assert!(host.cli_json(&["clients", "list", "other"]).is_empty());
    publish(&host, "acme/x", "21");
    client.find("received PUBLISH");
    let list = host.cli(&["clients", "list", "--sort", "delivered"]);
    assert!(list.starts_with("press-7") && list.contains("published: 0, delivered: 1"), "{list}");
    assert!(list.lines().all(|line| line.chars().count() <= 80), "{list}");
    let shown = &host.cli_json(&["clients", "list", "press", "--sort", "missed"])[0];
    assert_eq!((&shown["counts"]["delivered"], &shown["counts"]["dropped"]), (&1.into(), &0.into()));
    assert!(shown["last_seen_us"].is_u64() && shown["session_bytes"].is_u64(), "{shown}");
    let text = host.cli(&["clients", "show", "press-7"]);
    for part in ["press-7", "127.0.0.1:", "3.1.1", "acme/#", "$share/g/b/+", "last seen", "1 messages"] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }

    let mut watcher = Lines::of(mosquitto::subscribe(host.mqtt()).args(["-d", "-t", "gone"]));
    watcher.find("Subscribed");
    host.cli(&["clients", "kick", "press-7"]);
    watcher.find("press-7 is gone");
    // It comes back at once.
    client.find("received CONNACK");
    assert_eq!(host.metric("headworks_mqtt_disconnects_total", &[("cause", "kicked")]), 1.0);
    client.kill();
    watcher.find("press-7 is gone");
    let waiting = &host.cli_json(&["clients", "list", "press"])[0];
    assert!(waiting["connection"].is_null() && waiting["subscriptions"] == 2, "{waiting}");
    host.cli(&["clients", "delete", "press-7"]);
    assert!(host.cli_json(&["clients", "list", "press"]).is_empty());
    for verb in ["kick", "delete"] {
        let failed = host.command(&["clients", verb, "nobody", "--config", "headworks.yaml"]).output();
        let failed = failed.expect("headworks runs");
        assert!(!failed.status.success() && String::from_utf8_lossy(&failed.stderr).contains("clients list"));
    }
}

#[test]
fn plugins_are_listed_inspected_and_measured() {
    let host = host("cli-plugins");
    let list = host.cli(&["plugin", "list"]);
    assert!(list.contains("normalize"), "{list}");
    let file = prebuilt("normalize");
    let file = file.to_str().expect("UTF-8");
    let inspected = run(&mut host.command(&["plugin", "inspect", file]));
    assert!(inspected.contains("normalize") && inspected.contains("headworks:plugin/log"), "{inspected}");
    let measured = run(&mut host.command(&["plugin", "bench", file]));
    assert!(measured.contains("ns"), "{measured}");

    let bench = |name: &str, more: &[&str]| {
        let file = fresh(name);
        let file = file.to_str().expect("UTF-8");
        failed(host.command(&[&["plugin", "bench", file], more].concat()))
    };
    let no_step = bench("hostile-access", &[]);
    assert!(no_step.contains("is an access plugin, no step"), "{no_step}");
    let faulty = bench("hostile", &["--payload", r#"{"do":"trap"}"#]);
    assert!(faulty.contains("nothing was measured") && faulty.contains("a message asked for it"), "{faulty}");
}

#[test]
fn an_access_plugin_in_the_plugins_folder_holds_its_pipeline_and_rejects_no_message() {
    let mut host = Host::prepare("cli-access-as-step", "");
    host.drop_plugin("10-door.wasm", fresh("hostile-access"));
    host.launch();
    host.wait_serving();
    host.says("pipeline holds");
    let (code, text, _) = status(&host);
    assert_eq!(code, Some(1), "{text}");
    let said = text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(
        said.contains("is an access plugin, no step: name its file in mqtt.access.authenticate"),
        "{text}"
    );
    assert!(said.contains("mend or replace ") && said.contains("/10-door.wasm, which "), "{text}");
}

#[test]
fn a_log_level_that_is_none_is_refused_and_nothing_is_started() {
    let host = Host::prepare("cli-log-level", "");
    let run = |level: &str| host.command(&["run", "--config", "headworks.yaml", "--log", level]).output();
    let output = run("warning").expect("headworks runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("log filter \"warning\"") && said.contains("write a level, or target=level"),
        "{said}"
    );
    assert_eq!(output.status.code(), Some(2));
    assert!(!host.folder.join("data").exists());
}

#[test]
fn a_stream_without_room_is_named_with_its_folder_and_so_is_what_is_lost() {
    let config = "streams: { telemetry: { segment_bytes: 1MiB, retention: { max_bytes: 4MiB } } }\n\
                  sinks: { warehouse: { type: postgres, url: \"postgres://writer@127.0.0.1:1/iot\" } }\n";
    let mut host = Host::prepare("cli-no-room", config);
    host.launch();
    host.wait_serving();
    let mut meter = Client::clean(host.mqtt(), Version::V5, "meter-9");
    let reading = Publish::new("acme/site/power/meter-9/reading", 0, 0, &"x".repeat(100_000));
    // More than the stream takes, and than waits for two commits.
    for _ in 0..600 {
        meter.publish(&reading);
    }
    host.says("QoS 0 messages dropped: stream telemetry has no room: client meter-9");
    let log = host.log();
    let folder = host.folder.join("data/streams/telemetry").display().to_string();
    let line = log.lines().find(|line| line.contains("no room left in retention.max_bytes"));
    let line = line.unwrap_or_else(|| panic!("the log says it:\n{log}"));
    for part in [&*folder, "free_bytes=", "fix the sink that lags", "appends wait"] {
        assert!(line.contains(part), "{part} is not in {line}");
    }
    assert!(log.contains("headworks status --config headworks.yaml"), "{log}");

    let (code, body) = http::get(host.admin(), "/readyz").expect("the host serves it");
    assert!(code == 503 && body.contains("no room left in retention.max_bytes"), "{code} {body}");
    let (_, text, json) = status(&host);
    let problems = problems(&json);
    let is_named = |kind: &str, part: &str, advice: &str| {
        problems.iter().any(|problem| {
            let has = |key: &str, text: &str| problem[key].as_str().is_some_and(|it| it.contains(text));
            has("kind", kind) && has("part", part) && has("advice", advice)
        })
    };
    assert!(is_named("no_space", "stream telemetry", "fix the sink that lags"), "{text}");
    assert!(is_named("dropped", "publishers (no_space)", "QoS 1"), "{text}");
}

#[test]
fn what_a_session_that_is_away_loses_is_told_with_its_client() {
    let mqtt = "mqtt: { queue_messages_max: 10, listeners: [ { bind: 127.0.0.1:0 } ] }";
    let mut host = Host::prepare_with("cli-away", mqtt, "");
    host.run();
    let connect = Connect::resuming(Version::V5, "lamp-1");
    let mut lamp = Client::open(host.mqtt(), &connect);
    lamp.subscribe("lamps/#", 1);
    lamp.leave();
    let mut switch = Client::clean(host.mqtt(), Version::V5, "switch");
    for number in 1..=25 {
        switch.publish_through(&Publish::new("lamps/1", 1, number, "on"));
    }
    host.says("messages dropped that waited for a session: client lamp-1: its queue is full");
    assert!(host.log().contains("headworks clients show"), "{}", host.log());
    host.stop();
    // Said once at once, the others with their count at the end.
    let log = host.log();
    let lines: Vec<_> = log.lines().filter(|line| line.contains("client lamp-1")).collect();
    assert!(lines.len() <= 2, "{log}");
}

#[test]
fn a_list_as_json_is_never_cut() {
    let host = host("cli-letters-json");
    let mut device = Client::clean(host.mqtt(), Version::V5, "sensor-4");
    let count = 61;
    for number in 1..=count {
        let topic = "acme/site-01/temperature/sensor-4/reading";
        device.publish_through(&Publish::new(topic, 1, number, "not json"));
    }
    host.writes("the dead letters", || {
        let rejected = host.metric("headworks_dead_letters_total", &[]);
        (rejected == f64::from(count)).then_some(())
    });
    assert_eq!(host.cli_json(&["dead-letters", "list"]).len(), usize::from(count));
    let text = host.cli(&["dead-letters", "list"]);
    assert!(text.contains("--max 61 shows all"), "{text}");
}

#[test]
fn a_plugin_file_that_cannot_be_read_hides_no_other() {
    let host = Host::prepare("cli-unreadable", "");
    host.drop_plugin("10-normalize.wasm", prebuilt("normalize"));
    std::os::unix::fs::symlink("/nowhere", host.folder.join("plugins/05-gone.wasm")).expect("a link");
    let list = host.cli(&["plugin", "list"]);
    assert!(list.contains("05-gone.wasm") && list.contains("cannot run"), "{list}");
    assert!(list.contains("10-normalize.wasm  normalize"), "{list}");
}

/// The file is a plugin; what the host refuses is its config.
#[test]
fn plugin_list_says_what_the_running_host_says() {
    let mut host = Host::prepare("cli-refused-step", "");
    host.drop_plugin("10-normalize.wasm", prebuilt("normalize"));
    host.folder.write("plugins/10-normalize.yaml", "# nothing\nunknwon: drop\n");
    let config = ["validate", "--config", "headworks.yaml"];
    let refused = failed(host.command(&config));
    assert!(refused.contains("10-normalize.yaml:2: unknwon"), "{refused}");
    host.launch();
    host.wait_serving();
    host.says("pipeline holds");
    let list = host.cli(&["plugin", "list"]);
    assert!(
        list.contains("10-normalize.wasm  cannot run: ") && list.contains("10-normalize.yaml:2"),
        "{list}"
    );
    assert!(list.contains("pipeline telemetry: steps of generation 1, holding"), "{list}");
}

#[test]
fn a_plugin_whose_file_is_gone_is_listed_until_it_is_removed_by_its_name() {
    let host = host("cli-removed");
    std::fs::remove_file(host.folder.join("plugins/10-normalize.wasm")).expect("ours");
    let list = host.cli(&["plugin", "list"]);
    let command = "`headworks plugin remove normalize --config headworks.yaml`";
    for part in ["10-normalize.wasm", "removed: telemetry waits for it", command] {
        assert!(list.contains(part), "{part} is not in\n{list}");
    }
    assert_eq!(host.cli_json(&["plugin", "list"])[0]["state"], "removed");

    let unknown = host.command(&["plugin", "remove", "normalise", "--config", "headworks.yaml"]);
    let unknown = failed(unknown);
    assert!(unknown.contains("no plugin `normalise`") && unknown.contains("there is normalize"), "{unknown}");
    host.cli(&["plugin", "remove", "normalize"]);
    host.writes("the host goes on without it", || {
        host.cli(&["plugin", "list"]).contains("no plugins").then_some(())
    });
    host.says("plugin removed");
}

#[test]
fn a_host_that_was_killed_does_not_run_whoever_has_its_port_now() {
    let mut host = host("cli-stale");
    let admin = host.admin();
    host.kill();
    let list = |host: &Host| failed(host.command(&["clients", "list", "--config", "headworks.yaml"]));
    let said = list(&host);
    assert!(said.contains("no host runs on the data folder /") && said.contains("--config"), "{said}");

    let other = std::net::TcpListener::bind(admin).expect("its port is free");
    let answering = std::thread::spawn(move || {
        let (mut client, _) = other.accept().expect("the command connects");
        let body = "{\"found\":0,\"clients\":[]}";
        let length = body.len();
        write!(client, "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{body}").expect("it listens");
        // Closed in order: the command's request is read, not reset.
        client.shutdown(std::net::Shutdown::Write).expect("it listens");
        let _ = std::io::copy(&mut client, &mut std::io::sink());
    });
    let said = list(&host);
    assert!(said.contains("no host runs") && said.contains("another program"), "{said}");
    answering.join().expect("it answered");
}

#[test]
fn a_second_ctrl_c_ends_a_host_that_waits_for_its_sinks() {
    let config = telemetry::config(&telemetry::sqlite_sink());
    let config = config.replace("from: telemetry,", "from: telemetry, drain_max: 10m,");
    let config = config.replace("type: sqlite,", "type: sqlite, busy_timeout: 100ms,");
    let mut host = Host::start("cli-interrupt", &config);
    let database = rusqlite::Connection::open(host.folder.join("data/telemetry.db")).expect("the sink's");
    database.busy_timeout(Duration::from_secs(20)).expect("a timeout");
    database.execute_batch("BEGIN EXCLUSIVE").expect("the host does not write now");
    let (topic, payload) = telemetry::message("sensor-1", 7);
    publish(&host, &topic, &payload);
    host.says("database is locked");
    host.process().signal(Signal::INT);
    host.says("finishing what is in flight");
    assert!(host.process().alive());
    host.process().signal(Signal::INT);
    assert_eq!(host.process().wait(Duration::from_secs(60)).code(), Some(130));
}

/// What a command says that must fail.
fn failed(mut command: Command) -> String {
    let output = command.output().expect("headworks runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{said}");
    said
}

#[test]
fn validate_tries_certificates_and_password_files() {
    let mqtt = "mqtt:
  listeners:
    - { bind: 127.0.0.1:0 }
    - bind: 127.0.0.1:0
      tls: { cert: server.pem, key: server.key }
  access:
    authenticate:
      - { type: passwords, file: passwords }
";
    let host = Host::prepare_with("cli-validate-files", mqtt, "");
    let validate = || {
        let output = host.command(&["validate", "--config", "headworks.yaml"]).output().expect("the binary");
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (valid, said) = validate();
    assert!(!valid, "{said}");
    for wanted in [
        "headworks.yaml:8: mqtt.listeners[1].tls.cert: cannot read server.pem: ",
        "headworks.yaml:8: mqtt.listeners[1].tls.key: cannot read server.key: ",
        "authenticate[0]: passwords: ",
    ] {
        assert!(said.contains(wanted), "{wanted} in {said}");
    }
    let ca = headworks_tests::certificates::Authority::new(&host.folder);
    ca.sign(&host.folder, "server", 1);
    host.folder.write("passwords", "ann:plain\n");
    let (valid, said) = validate();
    assert!(!valid && said.contains("passwords: line 1: ") && !said.contains("server.pem"), "{said}");
    host.folder.write("passwords", "");
    let (valid, said) = validate();
    assert!(!valid && said.contains("passwords: has no user"), "{said}");
    host.passwd("ann", "secret", &[]);
    assert!(validate().0, "{}", validate().1);
}

#[test]
fn validate_tells_of_a_certificate_that_has_expired() {
    let mqtt = "mqtt: { listeners: [ { bind: 127.0.0.1:0, tls: { cert: server.pem, key: server.key } } ] }";
    let host = Host::prepare_with("cli-validate-expired", mqtt, "");
    let ca = headworks_tests::certificates::Authority::new(&host.folder);
    ca.sign_until(&host.folder, "server", 1, 2021);
    let said = host.cli(&["validate"]);
    let warning = said.lines().find(|line| line.starts_with("warning: ") && line.contains("server.pem"));
    assert!(warning.is_some_and(|line| line.contains("has expired at 2021-01-01")), "{said}");
    ca.sign(&host.folder, "server", 2);
    assert!(!host.cli(&["validate"]).contains("expired"), "it is good for long");
}

#[test]
fn passwd_leaves_a_file_to_the_group_that_may_read_it() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

    let host = Host::prepare("cli-passwd", "");
    host.passwd("ann", "secret", &[]);
    let file = host.folder.join("passwords");
    // Another group than the one that new files get, where this user may give files to one.
    let other = rustix::process::getgroups().expect("our groups").into_iter().map(|group| group.as_raw());
    let other = other.chain(rustix::process::geteuid().is_root().then_some(1));
    let group = other.last().unwrap_or(rustix::process::getegid().as_raw());
    chown(&file, None, Some(group)).expect("one of our groups");
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o640)).expect("our file");
    host.passwd("bob", "secret", &[]);
    run(&mut host.command(&["passwd", "passwords", "ann", "--delete"]));
    let data = file.metadata().expect("it is there");
    assert_eq!((data.gid(), data.mode() & 0o777), (group, 0o640));
    let text = std::fs::read_to_string(&file).expect("text");
    assert!(text.starts_with("bob:") && !text.contains("ann:"), "{text}");
}

#[test]
fn validate_says_everything_at_once_and_each_problem_as_fields() {
    let config = "data_dir: ~/data
mqtt:
  listeners:
    - bind: 127.0.0.1:0
      tls: { cert: nope.pem, key: nope.key, client_ca: nope-ca.pem }
streamz: {}
sinks:
  w: { type: postgres, url: postgres://writer@127.0.0.1/iot, password: { env: HEADWORKS_TESTS_UNSET } }
";
    let host = Host::prepare("cli-validate-all", "");
    host.folder.write("headworks.yaml", config);
    let output = host.command(&["validate", "--format", "json", "--config", "headworks.yaml"]).output();
    let output = output.expect("headworks runs");
    assert_eq!(output.status.code(), Some(2));
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let found: Vec<_> = found["problems"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|problem| {
            assert_eq!(problem["file"], "headworks.yaml");
            (problem["line"].as_u64().expect("a line"), problem["key"].as_str().expect("a key"))
        })
        .collect();
    let wanted = [
        (1, "data_dir"),
        (5, "mqtt.listeners[0].tls.cert"),
        (5, "mqtt.listeners[0].tls.client_ca"),
        (5, "mqtt.listeners[0].tls.key"),
        (6, "streamz"),
        (8, "sinks.w.password.env"),
    ];
    assert_eq!(found, wanted);
}

#[test]
fn validate_tries_the_files_of_devices_and_sinks() {
    let config = "devices: { file: devices.yaml }
sinks:
  w:
    type: postgres
    url: postgres://writer@127.0.0.1/iot?sslmode=verify-full
    password: { file: pgpass }
    tls: { ca: ca.pem }
";
    let host = Host::prepare("cli-validate-more", config);
    let said = failed(host.command(&["validate", "--config", "headworks.yaml"]));
    for wanted in [
        "headworks.yaml:5: devices.file: cannot read devices.yaml: ",
        "headworks.yaml:10: sinks.w.password.file: cannot read the password from pgpass: ",
        "headworks.yaml:11: sinks.w.tls: ",
    ] {
        assert!(said.contains(wanted), "{wanted} in {said}");
    }
    // Writes ca.pem.
    headworks_tests::certificates::Authority::new(&host.folder);
    host.folder.write("pgpass", "secret\n");
    host.folder.write("devices.yaml", "sensor-1: { site: north }\n");
    host.cli(&["validate"]);
}

#[test]
fn validate_connect_tries_every_sink_and_says_what_to_do() {
    let database = postgres::shared().database();
    let good = database.url();
    let config = format!(
        "pipelines: {{ telemetry: {{ routes: {{ default: [good, wrong, file] }} }} }}
sinks:
  good: {{ type: postgres, url: '{good}' }}
  wrong: {{ type: postgres, url: '{good}_not_there' }}
  file: {{ type: sqlite, path: headworks.yaml }}
"
    );
    let host = Host::prepare("cli-validate-connect", &config);
    let args = ["validate", "--connect", "--config", "headworks.yaml"];
    let output = host.command(&args).output().expect("headworks runs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let line =
        |name: &str| said.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{said}"));
    assert!(line("sinks.good: works: PostgreSQL ").contains("creates the table telemetry"), "{said}");
    assert!(line("sinks.wrong: does not work: ").contains("create the database"), "{said}");
    assert!(line("sinks.file: does not work: ").contains("is not a SQLite database"), "{said}");

    let output = host.command(&[&args[..], &["--format", "json"]].concat()).output().expect("headworks runs");
    assert_eq!(output.status.code(), Some(1));
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let works = |name: &str| found["sinks"][name]["works"].as_bool().expect("a flag");
    assert_eq!([works("good"), works("wrong"), works("file")], [true, false, false]);

    host.folder.write("headworks.yaml", format!("sinks: {{ good: {{ type: postgres, url: '{good}' }} }}\n"));
    host.cli(&["validate", "--connect"]);
}

#[test]
fn validate_connect_says_that_a_sink_would_hold_in_the_words_of_the_host() {
    let mut host = host("cli-validate-begin");
    let (topic, payload) = telemetry::message("sensor-1", 7);
    publish(&host, &topic, &payload);
    let rows = host.folder.join("data/telemetry.db");
    telemetry::written_to_sqlite(&host, &rows);
    let check = ["validate", "--connect"];
    assert!(host.cli(&check).contains("sinks.telemetry: works: "), "beside the host");
    host.stop();
    assert!(host.cli(&check).contains("sinks.telemetry: works: "), "before a start that goes on");

    let lose = "DELETE FROM headworks_positions";
    rusqlite::Connection::open(&rows).expect("a file").execute_batch(lose).expect("they are there");
    let mut command = host.command(&[&check[..], &["--config", "headworks.yaml"]].concat());
    let output = command.output().expect("headworks runs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let reason = said.lines().find_map(|line| line.strip_prefix("sinks.telemetry: does not work: "));
    let reason = reason.unwrap_or_else(|| panic!("{said}")).to_owned();
    assert!(reason.contains("are not in headworks_positions"), "{reason}");
    host.launch();
    host.wait_serving();
    host.says(&reason);
    host.stop();

    let config = std::fs::read_to_string(host.folder.join("headworks.yaml")).expect("ours");
    host.folder.write("headworks.yaml", config + "sinks: { telemetry: { type: sqlite, begin: now } }\n");
    assert!(host.cli(&check).contains("sinks.telemetry: works: "), "it was asked for");
    host.launch();
    host.wait_serving();
    let (topic, payload) = telemetry::message("sensor-1", 8);
    publish(&host, &topic, &payload);
    telemetry::written_to_sqlite(&host, &rows);
    host.stop();
    rusqlite::Connection::open(&rows).expect("a file").execute_batch(lose).expect("they are there");
    let mut command = host.command(&[&check[..], &["--config", "headworks.yaml"]].concat());
    let output = command.output().expect("headworks runs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("does not work: ") && said.contains("the sink has begun before"), "{said}");
}

#[test]
fn ctrl_c_ends_a_tail_in_the_midst_of_a_long_stream() {
    let host = Host::start("cli-tail", "");
    let lines = "0123456789".repeat(20) + "\n";
    let mut publish = mosquitto::publish(host.mqtt());
    let mut publish =
        publish.args(["-q", "1", "-t", "a/b", "-l"]).stdin(Stdio::piped()).spawn().expect("it runs");
    let mut stdin = publish.stdin.take().expect("piped");
    (0..2_000).for_each(|_| stdin.write_all(lines.as_bytes()).expect("it reads"));
    drop(stdin);
    assert!(publish.wait().expect("our child").success());
    // More than a pipe holds, so that each of them is in the midst of it.
    for _ in 0..8 {
        let command =
            host.command(&["streams", "tail", "default", "--from", "start", "--config", "headworks.yaml"]);
        let mut tail = interruptible(&command).stdout(Stdio::piped()).spawn().expect("headworks runs");
        let mut first = [0];
        let mut stdout = tail.stdout.take().expect("piped");
        stdout.read_exact(&mut first).expect("a line");
        let mut tail = Process::adopt("tail", tail);
        tail.signal(Signal::INT);
        assert!(tail.wait(Duration::from_secs(30)).code().is_none(), "ended by the signal");
    }
}

#[test]
fn validate_warns_of_a_step_without_a_file_and_names_the_one_that_was_meant() {
    let host =
        Host::prepare("cli-validate-step", "pipelines: { telemetry: { steps: [{ plugin: normalise }] } }\n");
    host.drop_plugin("10-normalize.wasm", prebuilt("normalize"));
    let said = host.cli(&["validate"]);
    assert!(said.contains("no file normalise.wasm in ./plugins"), "{said}");
    assert!(said.contains("did you mean `normalize`?"), "{said}");
}

#[test]
fn validate_accepts_what_runs_and_schema_describes_it() {
    let host = Host::prepare("cli-validate", &telemetry::config(&telemetry::sqlite_sink()));
    host.cli(&["validate"]);
    let schema: serde_json::Value = serde_json::from_str(&run(&mut host.command(&["schema"]))).expect("JSON");
    assert!(schema["properties"]["pipelines"].is_object(), "{schema}");
}

#[test]
fn a_second_host_on_one_data_folder_is_refused_with_a_reason() {
    let host = host("cli-lock");
    let output = host.command(&["run", "--config", "headworks.yaml"]).output().expect("it runs");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("data"), "{text}");
}

#[test]
fn every_metric_that_is_served_is_described() {
    let host = host("cli-metrics");
    let (topic, payload) = telemetry::message("sensor-3", 1);
    publish(&host, &topic, &payload);
    publish(&host, &topic, "not json");
    let path = host.folder.join("data/telemetry.db");
    host.writes("a row", || (telemetry::sqlite_count(&path, "telemetry") > 0).then_some(()));
    let (status, text) = http::get(host.admin(), "/metrics").expect("the host serves it");
    assert_eq!(status, 200);
    let described: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# HELP ")?.split_once(' ').filter(|(_, help)| !help.is_empty()))
        .map(|(name, _)| name)
        .collect();
    for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let name = line.split(['{', ' ']).next().unwrap_or(line);
        let base =
            ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
        assert!(described.contains(&name) || described.contains(&base), "{name} has no # HELP");
        assert!(name.starts_with("headworks_") || name.starts_with("process_"), "{name}");
    }
    assert!(described.len() > 10, "{described:?}");
}

#[test]
fn every_counter_whose_labels_are_known_is_there_from_the_start() {
    let host = host("cli-counters");
    let (_, served) = http::get(host.admin(), "/metrics").expect("the host serves it");
    let page = std::fs::read_to_string(root().join("host/METRICS.md")).expect("the page");
    let counters = page.lines().filter_map(|line| {
        let (name, rest) = line.strip_prefix("| `")?.split_once("` | ")?;
        rest.starts_with("counter").then_some(name)
    });
    let missing = counters.filter(|name| {
        let is_there = served
            .lines()
            .any(|line| line.strip_prefix(*name).is_some_and(|rest| rest.starts_with(['{', ' '])));
        // There is no access plugin here.
        !is_there && *name != "headworks_access_plugin_calls_total"
    });
    assert_eq!(missing.collect::<Vec<_>>(), [""; 0]);
}

#[test]
fn a_first_config_makes_no_dead_letter_of_any_topic() {
    let host = host("cli-first");
    for (topic, payload) in [("test/hello", "ping"), ("zigbee2mqtt/lamp", "{}"), ("a", "1")] {
        publish(&host, topic, payload);
    }
    let (topic, payload) = telemetry::message("sensor-3", 1);
    publish(&host, &topic, &payload);
    let path = host.folder.join("data/telemetry.db");
    host.writes("a row", || (telemetry::sqlite_count(&path, "telemetry") == 1).then_some(()));
    assert_eq!(host.cli(&["dead-letters", "summary"]).trim(), "no dead letters");
    assert_eq!(host.metric("headworks_stream_messages_total", &[("stream", "default")]), 3.0);
    assert_eq!(host.metric("headworks_mqtt_publishes_outside_namespace_total", &[]), 3.0);
    assert!(!host.log().contains("WARN"), "{}", host.log());
}

#[test]
fn a_taken_port_is_named_with_its_key_before_anything_is_made() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("bound");
    let mqtt = format!("mqtt: {{ listeners: [ {{ bind: {address} }} ] }}\n");
    let host = Host::prepare_with("cli-taken", &mqtt, "");
    let said = failed(host.command(&["run", "--config", "headworks.yaml"]));
    for part in ["mqtt.listeners", &address.to_string(), "stop the other process"] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
    assert!(!host.folder.join("data").exists());
}

#[test]
fn status_names_what_is_wrong_while_readiness_is_about_devices() {
    let away = "postgres://writer@127.0.0.1:1/iot";
    let config = format!("sinks: {{ warehouse: {{ type: postgres, url: \"{away}\" }} }}\n");
    let mut host = Host::prepare("cli-status", &config);
    host.folder.write("plugins/99-scratch.wasm", "not a plugin");
    host.launch();
    host.wait_serving();
    host.says("Connection refused");
    host.says("pipeline holds");
    let (topic, payload) = telemetry::message("sensor-1", 7);
    publish(&host, &topic, &payload);
    assert_eq!(http::get(host.admin(), "/readyz").expect("the host serves it").0, 200);

    let (code, text, json) = status(&host);
    assert_eq!(code, Some(1), "{text}");
    for part in [
        "problems",
        "sink telemetry/warehouse: retrying",
        "cannot connect to 127.0.0.1:1/iot",
        "99-scratch.wasm",
    ] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    let problems = problems(&json);
    assert!(problems.iter().any(|problem| problem["kind"] == "plugin_failed"), "{json}");
    let sink = problems.iter().find(|problem| problem["kind"] == "retrying").expect("the sink's");
    assert_eq!(sink["at_stake"]["messages"], 1, "{sink}");
    assert!(
        sink["since"].is_string() && sink["advice"].as_str().is_some_and(|advice| !advice.is_empty()),
        "{sink}"
    );
    host.stop();
    let (code, _, json) = status(&host);
    assert_eq!((code, &json["running"]), (Some(3), &false.into()));
}

#[test]
fn status_is_fine_where_all_works() {
    let host = host("cli-fine");
    let (code, text, json) = status(&host);
    assert!(problems(&json).is_empty() && text.contains("sink telemetry/telemetry  works, 0 rows"), "{text}");
    assert_eq!(code == Some(0), json["problems"].as_array().is_some_and(Vec::is_empty), "{json}");
}

#[test]
fn rows_that_were_there_already_are_shown_as_ignored_and_not_as_written() {
    let config = "sinks: { w: { type: sqlite, path: data/telemetry.db, on_conflict: ignore } }\n";
    let mut host = Host::prepare("cli-ignored", config);
    host.drop_plugin("10-normalize.wasm", prebuilt("normalize"));
    let file = host.folder.join("data/telemetry.db");
    std::fs::create_dir_all(host.folder.join("data")).expect("our folder");
    let table = "CREATE TABLE telemetry (time, device_id, location, metric, value, UNIQUE (device_id, time))";
    rusqlite::Connection::open(&file).expect("a file").execute_batch(table).expect("a table");
    host.run();
    let send = |device: &str| {
        let (topic, payload) = telemetry::message(device, 7);
        publish(&host, &topic, &payload);
    };
    send("sensor-1");
    send("sensor-1");
    telemetry::written_to_sqlite(&host, &file);
    // Once its row is there, what the commits before it wrote is counted.
    send("sensor-2");
    telemetry::written_to_sqlite(&host, &file);
    let (_, text, json) = status(&host);
    let rows = &json["pipelines"][0]["sinks"][0]["rows"];
    assert_eq!((&rows["ignored"], &rows["rejected"]), (&1.into(), &0.into()), "{json}");
    assert!(rows["written"].as_u64().is_some_and(|written| (1..=2).contains(&written)), "{json}");
    assert!(text.contains("rows written, 1 ignored"), "{text}");
    assert_eq!(telemetry::sqlite_count(&file, "telemetry"), 2);
}

/// Exit code, text and JSON of `headworks status`.
fn status(host: &Host) -> (Option<i32>, String, serde_json::Value) {
    let args = ["status", "--config", "headworks.yaml"];
    let text = host.command(&args).output().expect("headworks runs");
    let json = host.command(&[&args[..], &["--format", "json"]].concat()).output().expect("headworks runs");
    let json = serde_json::from_slice(&json.stdout).expect("JSON");
    (text.status.code(), String::from_utf8(text.stdout).expect("UTF-8"), json)
}

/// Problems but the room on the disk, which is the machine's.
fn problems(status: &serde_json::Value) -> Vec<&serde_json::Value> {
    let problems = status["problems"].as_array().expect("a list").iter();
    problems.filter(|problem| problem["kind"] != "low_space").collect()
}

#[test]
fn health_is_told_over_http() {
    let host = host("cli-health");
    for path in ["/healthz", "/readyz"] {
        assert_eq!(http::get(host.admin(), path).expect("the host serves it").0, 200, "{path}");
    }
    assert_eq!(http::get(host.admin(), "/nothing-here").expect("the host serves it").0, 404);
    let run = std::fs::metadata(host.folder.join("data/run.json")).expect("a running host has it");
    assert_eq!(run.permissions().mode() & 0o777, 0o600, "it holds the token");
}

#[test]
fn a_host_goes_on_where_what_it_prints_has_no_room() {
    let host = Host::prepare("cli-full", "");
    let full = || std::fs::File::options().write(true).open("/dev/full").expect("Linux has it");
    let mut command = host.command(&["run", "--config", "headworks.yaml"]);
    let data = host.folder.join("data");
    std::fs::create_dir(&data).expect("our folder");
    let started = Events::of_files([&data]);
    let mut process = Process::spawn("headworks", command.stdout(full()).stderr(full()));
    let is_up = || data.join("run.json").exists().then_some(());
    started.while_runs(process.id()).until("the host is up", Duration::from_secs(60), is_up);
    process.signal(Signal::TERM);
    assert_eq!(process.wait(Duration::from_secs(60)).code(), Some(0));

    let mut wrong = host.command(&["validate", "--config", "nowhere.yaml"]);
    assert_eq!(wrong.stdout(full()).stderr(full()).status().expect("headworks runs").code(), Some(2));
}

#[test]
fn help_says_what_each_command_does() {
    let text = run(Command::new(headworks_tests::host::binary()).arg("--help"));
    for command in ["run", "validate", "plugin", "streams", "clients", "dead-letters", "passwd", "schema"] {
        assert!(text.contains(command), "{command} is not in\n{text}");
    }
    std::io::stdout().flush().expect("stdout");
}
